//! Runs a shard on a ring: carries out its actions, and feeds it what happened.
//!
//! One thread, one ring, one [`Shard`]. A task a connection (`link.rs`) receives and sends; a task a listener accepts;
//! one takes what other threads send; one gives the shard its turns. Whoever feeds the shard wakes the turn, which runs
//! behind everything that is ready just then: so one commit, one batch of signatures and one wake-up of another shard
//! serve all that happened in the meantime.
//!
//! Over 500 lines: everything that a shard's thread waits for meets here.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use ahash::HashMap;
use postrider_spool::record::{LogId, Sequence};
use postrider_spool::{LogDirectory, Operation};
use tokio::sync::{Notify, Semaphore, oneshot};

use super::clock::{self, Clock};
use super::dane::DaneVerifiers;
use super::directory::ThreadTimes;
use super::event_file::EventSender;
use super::limit_file::LimitMail;
use super::link::{Link, Side};
use super::mailbox::{Full, Receiver, Sender};
use super::net::is_local_address;
use super::renewal::{ListenerPolicy, Renewal, Verifiers};
use super::socket::{ConnectOptions, Listener, Socket, is_out_of_descriptors};
use super::uring;
use crate::accept::Admitted;
use crate::config::Config;
use crate::handover::{AcceptAnswer, ControlMessage, ShardMessage};
use crate::limits::{
    EVENTS_WAITING_MAX, LISTENER_COMPLAINT_INTERVAL, LISTENER_PAUSE, MAILBOX_BATCH, OVERDUE_PAUSE, QUIET_DELAY,
    QUIET_MESSAGES_MAX, SESSIONS_ABOVE_SHARE, SHARE_PAUSE, SHUTDOWN_COMMIT_GRACE, TURN_INPUTS,
};
use crate::mail::endpoint::Endpoint;
use crate::outcome::event::LoggedRecord;
use crate::pool::connection::ConnectionKey;
use crate::pool::rate::PastLimits;
use crate::shard::{Action, ConnectError, SessionKey, Shard, ShardOptions};

/// What other threads send to a shard's thread.
#[derive(Debug)]
pub(crate) enum Mail {
    Core(ShardMessage),
    Inject {
        admitted: Box<Admitted>,
        reply: oneshot::Sender<AcceptAnswer>,
    },
    /// Another configuration.
    Reload(Arc<Renewal>),
    /// The thread ends.
    Exit,
}

/// What a shard's thread is started with.
pub(crate) struct ShardSetup {
    pub(crate) options: ShardOptions,
    pub(crate) clock: Clock,
    pub(crate) cpu: Option<usize>,
    pub(crate) listeners: Vec<ListenerSetup>,
    pub(crate) logs: Vec<(LogDirectory, Sequence)>,
    pub(crate) mailbox: Receiver<Mail>,
    pub(crate) shards: Vec<Sender<Mail>>,
    pub(crate) control: Sender<ControlMessage>,
    pub(crate) limits: std::sync::mpsc::Sender<LimitMail>,
    /// What was reserved of limits before.
    pub(crate) past_limits: Arc<PastLimits>,
    pub(crate) events: EventSender,
    pub(crate) verifiers: Verifiers,
    /// Sessions of every shard, so that each can keep to its share.
    pub(crate) session_counts: Arc<Vec<AtomicUsize>>,
    /// Bumped every second while the shard takes turns and its ring completes operations.
    pub(crate) heartbeat: Arc<AtomicU64>,
    pub(crate) thread_times: Arc<ThreadTimes>,
    pub(crate) started: std::sync::mpsc::Sender<Result<usize, String>>,
}

pub(crate) struct ListenerSetup {
    pub(crate) socket: Arc<TcpListener>,
    pub(crate) policy: Arc<ListenerPolicy>,
}

/// Runs a shard on this thread until it is told to exit.
pub(crate) fn run(setup: ShardSetup) -> io::Result<()> {
    let name = format!("shard {}", setup.options.id);
    if let Some(cpu) = setup.cpu
        && let Err(error) = super::net::pin_to_cpu(cpu)
    {
        tracing::warn!(%error, cpu, "the shard's thread can not be pinned");
    }
    setup.thread_times.register(setup.options.id);
    uring::run_shard(&name, start(setup))?
}

async fn start(setup: ShardSetup) -> io::Result<()> {
    let ShardSetup { options, clock, logs, started, mailbox, .. } = setup;
    let (config, seed) = (Arc::clone(&options.config), options.seed);
    let mut shard = Shard::new(options);
    shard.recall_limits(setup.past_limits);
    let policies = setup.listeners.iter().map(|listener| Arc::clone(&listener.policy)).collect();
    // Nobody else keeps their sockets: where no shard accepts any more, clients are refused.
    let listeners = setup.listeners.into_iter().map(|listener| Listener::new(&listener.socket));
    let ready = recover(&mut shard, logs, seed).and_then(|()| {
        let listeners = listeners.collect::<io::Result<Vec<_>>>().map_err(|error| format!("listener: {error}"))?;
        let mailbox = mailbox.on_shard().map_err(|error| format!("mailbox: {error}"))?;
        Ok((listeners, mailbox))
    });
    let (listeners, mailbox) = match ready {
        Ok(ready) => ready,
        Err(error) => {
            let _ = started.send(Err(error));
            return Ok(());
        }
    };
    let shard_loop = Rc::new(ShardLoop {
        shard: RefCell::new(shard),
        config: RefCell::new(config),
        listeners: RefCell::new(policies),
        clock,
        verifiers: RefCell::new(setup.verifiers),
        dane: DaneVerifiers::default(),
        turn: Notify::new(),
        inputs: Semaphore::new(TURN_INPUTS),
        links: RefCell::default(),
        injections: RefCell::default(),
        next_injection: Cell::new(0),
        quiet: RefCell::new(vec![Quiet::default(); setup.shards.len()]),
        shards: setup.shards,
        waiting_mail: RefCell::default(),
        control: setup.control,
        limits: setup.limits,
        waiting_control: RefCell::default(),
        events: setup.events,
        waiting_events: RefCell::default(),
        running_operations: Cell::new(0),
        session_counts: setup.session_counts,
        heartbeat: setup.heartbeat,
        turns: Cell::new(0),
        stopping: Notify::new(),
        is_stopping: Cell::new(false),
        progress: Notify::new(),
    });
    for (place, listener) in listeners.into_iter().enumerate() {
        uring::spawn(Rc::clone(&shard_loop).accept(listener, place));
    }
    uring::spawn(Rc::clone(&shard_loop).take_turns());
    uring::spawn(Rc::clone(&shard_loop).each_second());
    let id = shard_loop.shard.borrow().id();
    let _ = started.send(Ok(id));
    // Whoever waits for all shards hears of one whose ring could not be set up by nobody being left to report.
    drop(started);
    shard_loop.turn.notify_one();
    Rc::clone(&shard_loop).take_mail(mailbox).await;
    shard_loop.finish().await
}

fn recover(shard: &mut Shard, logs: Vec<(LogDirectory, Sequence)>, seed: u64) -> Result<(), String> {
    for (directory, cursor) in logs {
        let log = directory.id();
        let seed = seed ^ u64::from(log.0).rotate_left(17);
        shard.recover(directory, cursor, seed).map_err(|error| format!("log {}: {error}", log.0))?;
    }
    Ok(())
}

/// A shard with all that is its thread's.
pub(super) struct ShardLoop {
    pub(super) shard: RefCell<Shard>,
    config: RefCell<Arc<Config>>,
    /// In the order in which they are bound.
    listeners: RefCell<Vec<Arc<ListenerPolicy>>>,
    pub(super) clock: Clock,
    pub(super) verifiers: RefCell<Verifiers>,
    pub(super) dane: DaneVerifiers,
    turn: Notify,
    /// What peers may still bring before the next turn.
    inputs: Semaphore,
    pub(super) links: RefCell<HashMap<Side, Rc<Link>>>,
    injections: RefCell<HashMap<u64, oneshot::Sender<AcceptAnswer>>>,
    next_injection: Cell<u64>,
    shards: Vec<Sender<Mail>>,
    /// Messages that found a mailbox full. The credits bound how many there can be.
    waiting_mail: RefCell<Vec<(usize, VecDeque<ShardMessage>)>>,
    /// By shard: what was sent to it without waking it.
    quiet: RefCell<Vec<Quiet>>,
    control: Sender<ControlMessage>,
    limits: std::sync::mpsc::Sender<LimitMail>,
    waiting_control: RefCell<VecDeque<ControlMessage>>,
    events: EventSender,
    waiting_events: RefCell<Vec<LoggedRecord>>,
    running_operations: Cell<usize>,
    session_counts: Arc<Vec<AtomicUsize>>,
    heartbeat: Arc<AtomicU64>,
    turns: Cell<u64>,
    stopping: Notify,
    pub(super) is_stopping: Cell<bool>,
    /// An operation of the spool has ended.
    progress: Notify,
}

/// Messages to a shard that may sleep on for a while.
#[derive(Debug, Clone, Copy, Default)]
struct Quiet {
    messages: usize,
    /// When it is to be woken; of no meaning without messages.
    until: Duration,
}

impl ShardLoop {
    /// Feeds the shard, carries out what it wants done, and asks for a turn.
    pub(super) fn feed<T>(self: &Rc<Self>, input: impl FnOnce(&mut Shard) -> T) -> T {
        let value = input(&mut self.shard.borrow_mut());
        self.carry_out();
        self.turn.notify_one();
        value
    }

    /// Lets only so many peers be served between two turns. Clients are not asked to wait: thousands of connections
    /// that are busy would else go before each command of theirs.
    pub(super) async fn stand_in_line(&self) {
        self.inputs.acquire().await.expect("it is never closed").forget();
    }

    async fn take_turns(self: Rc<Self>) {
        let mut timer = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
        let mut armed = Duration::ZERO;
        let mut was_overdue = false;
        loop {
            let now = self.clock.now();
            self.shard.borrow_mut().turn(now);
            self.turns.set(self.turns.get() + 1);
            self.inputs.add_permits(TURN_INPUTS - self.inputs.available_permits());
            self.carry_out();
            self.send_waiting();
            self.wake_quiet(now.monotonic);
            if self.shard.borrow().has_more() {
                // The ring submits only when the thread parks: a trip through it lets commits and replies go out.
                uring::breathe().await;
                continue;
            }
            let mut deadline = self.next_turn(now.monotonic);
            if deadline > now.monotonic {
                was_overdue = false;
            } else if was_overdue {
                // What is overdue after a turn waits for something else, and mostly for an operation.
                deadline = now.monotonic + OVERDUE_PAUSE;
            } else {
                // A timer that is always over would keep the thread from parking, and so its operations in the queue.
                was_overdue = true;
                uring::breathe().await;
                continue;
            }
            if deadline != armed {
                armed = deadline;
                let wait = deadline.saturating_sub(self.clock.now().monotonic);
                timer.as_mut().reset(tokio::time::Instant::now() + wait);
            }
            tokio::select! {
                biased;
                () = self.turn.notified() => {}
                () = &mut timer => armed = Duration::ZERO,
            }
        }
    }

    fn next_turn(&self, monotonic: Duration) -> Duration {
        let now = crate::mail::time::Now { monotonic, ..self.clock.now() };
        let next = self.shard.borrow().next_timeout(now);
        let waits = !self.waiting_mail.borrow().is_empty()
            || !self.waiting_control.borrow().is_empty()
            || !self.waiting_events.borrow().is_empty();
        let next = if waits { next.min(monotonic + Duration::from_millis(1)) } else { next };
        let quiet = self.quiet.borrow();
        quiet.iter().filter(|quiet| quiet.messages > 0).map(|quiet| quiet.until).fold(next, Duration::min)
    }

    fn carry_out(self: &Rc<Self>) {
        loop {
            let Some(action) = self.shard.borrow_mut().poll_action() else { return };
            match action {
                Action::SessionSend { session, bytes } => {
                    self.link(Side::Session(session), |link| link.send_bytes(bytes))
                }
                Action::SessionStartTls { session } => self.link(Side::Session(session), Link::start_tls_server),
                Action::SessionClose { session } => self.link(Side::Session(session), Link::close),
                Action::SessionAbort { session } => self.link(Side::Session(session), Link::abort),
                Action::SessionAcknowledge { session } => self.link(Side::Session(session), Link::acknowledge),
                Action::SessionResume { session } => self.link(Side::Session(session), Link::wake),
                Action::ConnectionSend { connection, chunks } => {
                    self.link(Side::Connection(connection), |link| link.send(chunks));
                }
                Action::ConnectionAcknowledge { connection } => {
                    self.link(Side::Connection(connection), Link::acknowledge);
                }
                Action::ConnectionStartTls { connection, host_name, tls } => {
                    self.link(Side::Connection(connection), |link| link.start_tls_client(host_name, tls));
                }
                Action::ConnectionClose { connection } => self.link(Side::Connection(connection), Link::close),
                Action::ConnectionAbort { connection } => self.link(Side::Connection(connection), Link::abort),
                Action::Connect { connection, source, to } => self.connect(connection, source, to),
                Action::Spool { log, operation } => {
                    // Counted here, so that the thread can't end between this and the task's first turn.
                    self.running_operations.set(self.running_operations.get() + 1);
                    uring::spawn(Rc::clone(self).execute(log, operation));
                }
                Action::RemoveLog(log) => {
                    let id = log.id();
                    if let Err(error) = log.remove() {
                        tracing::warn!(log = id.0, %error, "the drained log is left for the next start to remove");
                    }
                }
                Action::Shard { to, message } => self.send_mail(to, message),
                Action::Control(message) => self.send_control(message),
                Action::Reserve(reservation) => {
                    let shard = self.shard.borrow().id();
                    // The thread that reserves outlives the shards.
                    let _ = self.limits.send(LimitMail::Reserve { shard, reservation });
                }
                Action::Injected { injection, answer } => {
                    if let Some(reply) = self.injections.borrow_mut().remove(&injection) {
                        // Who no longer waits for it finds it in the event log.
                        let _ = reply.send(answer);
                    }
                }
                Action::Events(records) => self.send_events(records),
            }
        }
    }

    fn link(&self, side: Side, act: impl FnOnce(&Link)) {
        if let Some(link) = self.links.borrow().get(&side) {
            act(link);
        }
    }

    async fn execute(self: Rc<Self>, log: LogId, operation: Operation) {
        if uring::is_closing() {
            return;
        }
        let completion = postrider_spool::execute_on_ring(operation).await;
        self.running_operations.set(self.running_operations.get() - 1);
        let now = self.clock.now();
        self.feed(|shard| shard.spool_completed(now, log, completion));
        self.progress.notify_waiters();
    }

    fn connect(self: &Rc<Self>, connection: ConnectionKey, source: usize, to: Endpoint) {
        let config = Arc::clone(&self.config.borrow());
        let source_config = &config.egress_sources[source];
        let options = ConnectOptions { source: source_config.source_address, freebind: false, to };
        let opened = Socket::open(&options);
        let socket = match opened {
            Ok(socket) => socket,
            Err(error) => {
                let unplumbed = error.raw_os_error() == Some(libc::EADDRNOTAVAIL)
                    && source_config.source_address.is_some_and(|address| !is_local_address(address));
                let error = match error {
                    _ if unplumbed => ConnectError::Unplumbed,
                    error if is_out_of_descriptors(&error) => ConnectError::NoSocket,
                    error => ConnectError::Failed(error),
                };
                let this = Rc::clone(self);
                uring::spawn(async move {
                    let now = this.clock.now();
                    this.feed(|shard| shard.connect_failed(now, connection, &error));
                });
                return;
            }
        };
        let link = Rc::new(Link::new(Side::Connection(connection), socket));
        self.links.borrow_mut().insert(Side::Connection(connection), Rc::clone(&link));
        uring::spawn(link.run_connection(Rc::clone(self), connection, to));
    }

    async fn accept(self: Rc<Self>, listener: Listener, place: usize) {
        // Each session begins under what is in force when it does.
        let policy = || Arc::clone(&self.listeners.borrow()[place]);
        let mut complain_again = Duration::ZERO;
        loop {
            if self.is_stopping.get() {
                break;
            }
            if self.is_over_its_share() {
                clock::sleep(SHARE_PAUSE).await;
                continue;
            }
            tokio::select! {
                biased;
                () = self.stopping.notified() => break,
                accepted = listener.accept() => match accepted {
                    Ok((socket, client)) => self.open_session(socket, client, &policy()),
                    Err(error) => {
                        let now = self.clock.now().monotonic;
                        if now >= complain_again {
                            complain_again = now + LISTENER_COMPLAINT_INTERVAL;
                            let address = policy().config.address;
                            if is_out_of_descriptors(&error) {
                                let advice = "clients wait until connections end; raise `ulimit -n`";
                                tracing::warn!(%error, %address, "{advice}");
                            } else {
                                tracing::warn!(%error, %address, "accept failed");
                            }
                        }
                        clock::sleep(LISTENER_PAUSE).await;
                    }
                },
            }
        }
        if let Some((socket, client)) = listener.close().await {
            self.open_session(socket, client, &policy());
        }
    }

    fn open_session(self: &Rc<Self>, socket: Socket, client: std::net::SocketAddr, policy: &ListenerPolicy) {
        let now = self.clock.now();
        let Some(session) = self.shard.borrow_mut().open_session(now, &policy.config, client) else {
            uring::spawn(async move {
                let refusal = b"421 4.3.2 Too many connections, try again later\r\n".to_vec();
                let _ = socket.send(vec![refusal]).await;
                let _ = socket.finish();
            });
            return;
        };
        self.count_sessions();
        let link = Rc::new(Link::new(Side::Session(session), socket));
        self.links.borrow_mut().insert(Side::Session(session), Rc::clone(&link));
        self.carry_out();
        self.turn.notify_one();
        uring::spawn(link.run_session(Rc::clone(self), session, policy.tls.clone()));
    }

    pub(super) fn end_session(self: &Rc<Self>, session: SessionKey) {
        self.links.borrow_mut().remove(&Side::Session(session));
        self.feed(|shard| shard.session_closed(session));
        self.count_sessions();
    }

    fn count_sessions(&self) {
        let shard = self.shard.borrow();
        self.session_counts[shard.id()].store(shard.sessions(), Ordering::Relaxed);
    }

    /// All shards accept on one socket, and the kernel wakes whom it likes: one that has clearly more sessions than the
    /// others leaves the next to them.
    fn is_over_its_share(&self) -> bool {
        let counts = self.session_counts.iter().map(|count| count.load(Ordering::Relaxed));
        let (own, total) = (self.shard.borrow().sessions(), counts.sum::<usize>());
        own > total / self.session_counts.len() + SESSIONS_ABOVE_SHARE
    }

    async fn take_mail(self: Rc<Self>, mut mailbox: super::mailbox::ShardReceiver<Mail>) {
        let mut batch = Vec::with_capacity(MAILBOX_BATCH);
        while mailbox.recv_batch(&mut batch, MAILBOX_BATCH).await > 0 {
            for mail in batch.drain(..) {
                match mail {
                    Mail::Core(message) => {
                        if matches!(message, ShardMessage::Stop) {
                            self.is_stopping.set(true);
                            self.stopping.notify_waiters();
                        }
                        self.shard.borrow_mut().handle_message(message);
                    }
                    Mail::Inject { admitted, reply } => {
                        let injection = self.next_injection.get();
                        self.next_injection.set(injection + 1);
                        self.injections.borrow_mut().insert(injection, reply);
                        self.shard.borrow_mut().handle_message(ShardMessage::Inject { injection, admitted });
                    }
                    Mail::Reload(renewal) => {
                        *self.config.borrow_mut() = Arc::clone(&renewal.reload.config);
                        self.listeners.borrow_mut().clone_from(&renewal.listeners);
                        *self.verifiers.borrow_mut() = renewal.verifiers.clone();
                        let reload = Arc::clone(&renewal.reload);
                        self.shard.borrow_mut().handle_message(ShardMessage::Reload(reload));
                    }
                    Mail::Exit => return,
                }
            }
            self.turn.notify_one();
        }
    }

    fn send_mail(&self, to: usize, message: ShardMessage) {
        let mut waiting = self.waiting_mail.borrow_mut();
        if let Some((_, queue)) = waiting.iter_mut().find(|(shard, _)| *shard == to) {
            queue.push_back(message);
            return;
        }
        // An outcome waits for others at its home anyway.
        let may_wait = matches!(message, ShardMessage::Settled(_));
        if let Err(Full(Mail::Core(message))) = self.shards[to].send_quietly(Mail::Core(message)) {
            waiting.push((to, VecDeque::from([message])));
        }
        let mut quiet = self.quiet.borrow_mut();
        if !may_wait || quiet[to].messages >= QUIET_MESSAGES_MAX {
            quiet[to].messages = 0;
            self.shards[to].wake();
        } else {
            if quiet[to].messages == 0 {
                quiet[to].until = self.clock.now().monotonic + QUIET_DELAY;
            }
            quiet[to].messages += 1;
        }
    }

    /// Wakes those that have slept on long enough.
    fn wake_quiet(&self, monotonic: Duration) {
        for (shard, quiet) in self.shards.iter().zip(self.quiet.borrow_mut().iter_mut()) {
            if quiet.messages > 0 && quiet.until <= monotonic {
                quiet.messages = 0;
                shard.wake();
            }
        }
    }

    fn send_control(&self, message: ControlMessage) {
        let mut waiting = self.waiting_control.borrow_mut();
        if !waiting.is_empty() {
            waiting.push_back(message);
        } else if let Err(Full(message)) = self.control.send(message) {
            waiting.push_back(message);
        }
    }

    fn send_events(&self, mut records: Vec<LoggedRecord>) {
        let mut waiting = self.waiting_events.borrow_mut();
        if waiting.is_empty() {
            if let Err(back) = self.events.try_send(records) {
                *waiting = back;
            }
        } else {
            waiting.append(&mut records);
        }
    }

    /// Tries again what found a queue full.
    fn send_waiting(&self) {
        self.waiting_mail.borrow_mut().retain_mut(|(to, queue)| {
            while let Some(message) = queue.pop_front() {
                if let Err(Full(Mail::Core(message))) = self.shards[*to].send(Mail::Core(message)) {
                    queue.push_front(message);
                    return true;
                }
            }
            false
        });
        let mut control = self.waiting_control.borrow_mut();
        while let Some(message) = control.pop_front() {
            if let Err(Full(message)) = self.control.send(message) {
                control.push_front(message);
                break;
            }
        }
        let mut events = self.waiting_events.borrow_mut();
        if !events.is_empty()
            && let Err(back) = self.events.try_send(std::mem::take(&mut events))
        {
            *events = back;
        }
        // A queue that is full for a moment is what `waiting_events` is for; only what piles up there stops the mail.
        let mut shard = self.shard.borrow_mut();
        let held_max = shard.memory().events;
        let waiting_max = EVENTS_WAITING_MAX.min(held_max / 5);
        let blocked = events.len() > waiting_max || self.events.is_failing();
        shard.set_events_blocked(blocked);
        shard.set_events_full(events.len() > held_max);
    }

    /// Once a second: shows that the shard lives, and tells it how far large sends have come, so that a slow peer isn't
    /// taken for a dead one.
    async fn each_second(self: Rc<Self>) {
        let mut turns = 0;
        loop {
            clock::sleep(Duration::from_secs(1)).await;
            // A thread that turns without its ring, or whose ring goes without turns, is as good as dead.
            uring::breathe().await;
            if turns != self.turns.get() {
                turns = self.turns.get();
                self.heartbeat.fetch_add(1, Ordering::Relaxed);
            }
            let links: Vec<Rc<Link>> = self.links.borrow().values().cloned().collect();
            for link in links {
                link.report_sent(&self);
            }
        }
    }

    /// What is durable or about to be is finished before the thread ends. An error: the spool did not take all of it.
    async fn finish(self: &Rc<Self>) -> io::Result<()> {
        let deadline = self.clock.now().monotonic + SHUTDOWN_COMMIT_GRACE;
        self.turn.notify_one();
        loop {
            let now = self.clock.now();
            let quiet = self.shard.borrow().is_committed() && self.running_operations.get() == 0;
            if (quiet && self.waiting_events.borrow().is_empty()) || now.monotonic >= deadline {
                break;
            }
            clock::sleep(Duration::from_millis(1)).await;
        }
        // The ring must not go while the spool's operations use it.
        while self.running_operations.get() > 0 {
            self.progress.notified().await;
        }
        let past = self.shard.borrow_mut().leave_limits(self.clock.now());
        let _ = self.limits.send(LimitMail::Leave(past));
        if self.shard.borrow().is_committed() {
            return Ok(());
        }
        Err(io::Error::other("the spool does not take what became of some messages; they are sent again"))
    }
}
