//! The engine as a value: start, inject, watch, shut down. Several live in one process.
//!
//! Over 500 lines, because the one list of what is started, in which order, and what each part is given stands here.

mod campaign;
mod reload;

use std::fmt;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use postrider_spool::record::{LogId, MessageId};
use postrider_spool::{LogDirectory, Spool, SpoolOptions};
use tokio::sync::{mpsc, oneshot};

pub use self::campaign::{Campaign, CampaignMessage};
pub use self::reload::ReloadError;
use self::reload::{Live, Source};
use crate::accept::Refusal;
use crate::accept::smtp_data::clean_content;
use crate::accept::{Admitted, Policy, Received};
use crate::admin::metrics::{Metrics, ShardMetrics};
use crate::admin::{
    Backend, Chosen, EventsStatus, Inspected, LimitsRow, ListenerStatus, MailChoice, MessageFilter, MessageRow,
    QueueReport, QueueRow, Reloaded, Reply, SpoolStatus, Status, SuspensionEnd, SuspensionRow, TlsReportRow,
    Unavailable, WallTime,
};
use crate::config::{Config, ConfigErrors, Durability, LimitSettings, LineEndings, ReceivedDetail, SmtpListener};
use crate::handover::{AcceptAnswer, Ask, ShardMessage, Told};
use crate::limits::{
    CAPTURED_FIELDS_MAX, DESCRIPTORS_OWN, DESCRIPTORS_OWN_PER_SHARD, DESCRIPTORS_PER_SHARD_MIN, HEARTBEAT_PATIENCE,
    INJECT_PATIENCE, MAILBOX_CAPACITY, ROUTING_NAME_BYTES_MAX, SEGMENT_BYTES_MIN, SEGMENT_BYTES_UNIT,
    SEGMENTS_PER_SHARD_MIN, SUSPENSION_MAX,
};
use crate::mail::address::Address;
use crate::mail::dsn::{self, BadDsn, DsnRequest};
use crate::outcome::event_log::EventStream;
use crate::pool::rate::PastLimits;
use crate::pool::suspension::{Effect, Scope, Suspension};
use crate::progress::{SharedProgress, Suspect};
use crate::runtime::clock::Clock;
use crate::runtime::control::{self, Addresses, Command, ControlSetup, Heartbeats, SuspensionAnswer, SuspensionCall};
use crate::runtime::directory::ThreadTimes;
use crate::runtime::dns::Resolver;
use crate::runtime::event_file::{EventLog, EventLogHandle, EventLogOptions, EventSender, node_id};
use crate::runtime::limit_file::{LimitFile, LimitMail};
use crate::runtime::mailbox::{self, Full, Sender};
use crate::runtime::mta_sts::PolicyStore;
use crate::runtime::random::os_random_u64;
use crate::runtime::renewal::{ListenerPolicy, Verifiers};
use crate::runtime::shard_loop::{self, ListenerSetup, Mail, ShardSetup};
use crate::runtime::suspension_list::{id_text, parse_id};
use crate::runtime::{net, progress_file, uring};
use crate::shard::{Reload, Reservation, ShardOptions};

/// A running engine. Dropping it without [`Engine::shutdown`] shuts it down as well, and waits for that.
pub struct Engine {
    shared: Arc<Shared>,
    events: Option<EventLogHandle>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
    addresses: Addresses,
    limits: std::sync::mpsc::Sender<LimitMail>,
    limit_thread: Option<JoinHandle<std::io::Result<()>>>,
    spool: Option<Spool>,
}

struct Shared {
    /// Read by whoever needs it, for a moment; written by one reload at a time.
    live: RwLock<Arc<Live>>,
    policy: Arc<RwLock<Arc<Policy>>>,
    reloading: tokio::sync::Mutex<()>,
    source: Option<Source>,
    addresses: Addresses,
    clock: Clock,
    started_ms: u64,
    node: String,
    shards: Vec<Sender<Mail>>,
    next_shard: AtomicUsize,
    next_campaign: AtomicU64,
    /// Handles that there are.
    campaigns: AtomicUsize,
    commands: mpsc::UnboundedSender<Command>,
    /// No new mail is accepted; what is on the wire is being finished.
    stopping: AtomicBool,
    metrics: Arc<Metrics>,
    heartbeats: Heartbeats,
    listeners: Vec<ListenerStatus>,
    events: EventSender,
}

/// Makes an [`Engine`].
pub struct EngineBuilder {
    config: Config,
    source: Option<Source>,
}

/// A message for [`Engine::inject`].
#[derive(Debug, Clone, Default)]
pub struct Message {
    /// Empty: the null reverse path.
    pub reverse_path: String,
    pub recipients: Vec<String>,
    /// RFC 5322: header, empty line, body. Bare CR and LF become CRLF.
    pub content: Vec<u8>,
    /// What is passed on to peers that offer DSN. Nobody else is told: this engine makes no notifications yet.
    pub dsn: DsnRequest,
    /// Names and values that stand in the message's events as `[events] meta` says: at most 64, each name once, of 1
    /// to 255 octets; of a value the first 1,024 octets are kept.
    pub meta: Vec<(String, String)>,
}

/// A message that the engine has taken over: it is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    pub id: MessageId,
}

/// Why a message wasn't taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InjectError {
    /// An address or the content is unacceptable, or the engine takes nothing now: the text of an SMTP reply.
    Refused(String),
    /// The engine is ending.
    Ended,
}

/// Why an engine could not start; the text says what to do.
#[derive(Debug)]
pub struct StartError(String);

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

impl fmt::Display for InjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(reply) => f.write_str(reply),
            Self::Ended => f.write_str("the engine is shutting down"),
        }
    }
}

impl std::error::Error for InjectError {}

impl From<Refusal> for InjectError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.to_string())
    }
}

impl fmt::Debug for EngineBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EngineBuilder {:?}", self.config)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine {:?}", self.addresses)
    }
}

impl Engine {
    pub fn builder(config: Config) -> EngineBuilder {
        EngineBuilder { config, source: None }
    }

    /// Hands a message over. When this returns `Ok`, the message is durable and will be delivered or reported.
    ///
    /// The caller's thread applies policy and signs. Runs on any executor.
    pub async fn inject(&self, message: Message) -> Result<Accepted, InjectError> {
        let now = self.shared.clock.now();
        let received = received(message, self.shared.message_bytes_max())?;
        let mut admitted = self.shared.policy().admit(now, received, [os_random_u64(), os_random_u64()])?;
        admitted.sign(now)?;
        let shard = self.shared.next_shard.fetch_add(1, Ordering::Relaxed) % self.shared.shards.len();
        self.shared.send(shard, admitted)?.answer().await
    }

    /// The engine's events from now on.
    pub fn events(&self) -> EventStream {
        self.events.as_ref().expect("the event log runs as long as the engine").subscribe()
    }

    /// Where the listeners are bound; of interest where the configuration says port 0.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Every queued recipient's count by queue, as `GET /api/admin/queues/v1`.
    pub async fn queues(&self, limit: usize) -> Result<QueueReport, Unavailable> {
        self.shared.queues(limit).await
    }

    /// Queued messages, as `GET /api/admin/messages/v1`.
    pub async fn messages(&self, filter: MessageFilter) -> Result<Vec<MessageRow>, Unavailable> {
        self.shared.messages(filter).await
    }

    /// What TLS sessions came to since the start, as `GET /api/admin/tls-report/v1`.
    pub async fn tls_report(&self) -> Result<Vec<TlsReportRow>, Unavailable> {
        self.shared.tls_report().await
    }

    /// What is suspended now, as `GET /api/admin/suspend-ready-q/v1` and `GET /api/admin/suspend/v1` together.
    pub async fn suspensions(&self) -> Result<Vec<SuspensionRow>, Unavailable> {
        self.shared.suspensions().await
    }

    /// A message that is not finished, as `GET /api/admin/inspect-message/v1`.
    pub async fn inspect(&self, id: MessageId, want_body: bool) -> Result<Option<Inspected>, Unavailable> {
        self.shared.inspect(id, want_body).await
    }

    /// Ends mail as AdminBounce, as `POST /api/admin/bounce/v1`; tells what was chosen, before it has ended.
    pub async fn bounce(&self, choice: MailChoice, reason: &str) -> Result<Chosen, Unavailable> {
        Ok(self.shared.bounce(choice, reason.to_owned()).await?.1)
    }

    /// Tries again, of what is chosen, what is held as in doubt, as `POST /api/admin/release/v1`.
    pub async fn release(&self, choice: MailChoice, reason: &str) -> Result<Chosen, Unavailable> {
        self.shared.release(choice, reason.to_owned()).await
    }

    /// Ends a suspension, or limits that a rule has set, before their time. False: there is none with this id.
    pub async fn resume(&self, id: &str) -> Result<bool, Unavailable> {
        self.shared.resume(id.to_owned()).await
    }

    /// Stops accepting, finishes what is on the wire within `shutdown_grace`, commits, and ends all threads.
    pub fn shutdown(mut self) -> Result<(), StartError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), StartError> {
        if self.threads.is_empty() {
            return Ok(());
        }
        let grace = self.shared.config().shutdown_grace;
        self.shared.stopping.store(true, Ordering::Relaxed);
        // The control thread is there until its shards have ended.
        let _ = self.shared.commands.send(Command::Shutdown { grace });
        let mut result = Ok(());
        let mut join = |thread: JoinHandle<std::io::Result<()>>| match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => result = Err(StartError(format!("a thread failed: {error}"))),
            Err(_) => result = Err(StartError("a thread panicked".to_owned())),
        };
        self.threads.drain(..).for_each(&mut join);
        // Shards that have ended ask for nothing.
        let _ = self.limits.send(LimitMail::Stop);
        self.limit_thread.take().into_iter().for_each(join);
        if let Some(events) = self.events.take() {
            events.shutdown().map_err(|error| StartError(format!("event log: {error}")))?;
        }
        if result.is_ok()
            && let Err(error) = progress_file::forget_suspects(&self.shared.config().spool.path)
        {
            tracing::debug!(%error, "the file of progress stays as it is");
        }
        self.spool = None;
        result
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "the engine did not end cleanly");
        }
    }
}

impl EngineBuilder {
    /// Where the configuration is read anew for [`Engine::reload_source`] and `POST /api/admin/reload/v1`.
    #[must_use]
    pub fn reload_from(mut self, read: impl Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(read));
        self
    }

    /// Opens the spool, takes up its messages, binds the listeners, and starts delivering.
    pub fn start(self) -> Result<Engine, StartError> {
        let config = Arc::new(self.config);
        let failed = |what: &str, error: &dyn fmt::Display| StartError(format!("{what}: {error}"));
        uring::check_available().map_err(|error| StartError(error.to_string()))?;
        let fd_limit = net::raise_fd_limit().map_err(|error| failed("file descriptor limit", &error))?;
        config.spool.filesystem().map_err(StartError)?;
        let policy = Arc::new(Policy::new(&config).map_err(StartError)?);
        let cpus = net::allowed_cpus();
        let shards = config.shards.unwrap_or(cpus.len());
        let sockets_max = sockets_max(fd_limit.soft, shards).map_err(StartError)?;

        let mut spool = Spool::open(&config.spool.path, spool_options(&config, shards))
            .map_err(|error| failed(&format!("spool {}", config.spool.path.display()), &error))?;
        let logs = spool.assign(shards).map_err(|error| failed("spool", &error))?;
        let node =
            node_id(&config.spool.path, [os_random_u64(), os_random_u64()]).map_err(|error| failed("spool", &error))?;
        let node_text = node.to_string();
        let events_path = config.events_path();
        let (event_log, cursors, report) = EventLog::open(EventLogOptions::new(events_path.clone(), node))
            .map_err(|error| failed(&format!("event log {}", events_path.display()), &error))?;
        if let Some((file, bytes)) = report.cut {
            tracing::warn!(file = %file.display(), bytes, "an unfinished frame of the event log was cut");
        }

        let listeners = Listeners::bind(&config)?;
        let mut own = listeners.addresses.smtp.clone();
        own.extend(&listeners.addresses.http);
        let resolver = Resolver::new(&config.dns, config.uses_dane(), own).map_err(|error| failed("DNS", &error))?;
        let clock = Clock::start();
        let verifiers = Verifiers::new(&config.tls).map_err(|error| failed("TLS", &error))?;
        let directory = config.spool.path.join("mta-sts");
        let policies = PolicyStore::open(directory, clock, resolver.clone(), &verifiers.public_roots)
            .map_err(|error| failed("MTA-STS policies", &error))?;
        let (mail_senders, mail_receivers) = mailboxes(shards).map_err(|error| failed("mailbox", &error))?;
        let (control_sender, control_receiver) =
            mailbox::mailbox(MAILBOX_CAPACITY).map_err(|error| failed("mailbox", &error))?;
        let event_shards = mail_senders.clone();
        let events = event_log
            .start(move |cursors| send_cursors(&event_shards, cursors))
            .map_err(|error| failed("event log", &error))?;
        let is_synced = config.spool.durability == Durability::Fsync;
        let (limit_file, past_limits) = LimitFile::open(&config.spool.path, clock.now().wall_ms, is_synced)
            .map_err(|error| failed("file of limits", &error))?;
        let limit_shards = mail_senders.clone();
        let (limits, limit_thread) = limit_file
            .start(move |shard, reservation| send_reserved(&limit_shards[shard], reservation))
            .map_err(|error| failed("thread of limits", &error))?;
        let shard_metrics: Vec<Arc<ShardMetrics>> = (0..shards).map(|_| Arc::default()).collect();
        let metrics = Arc::new(Metrics::new(shard_metrics.clone(), {
            let events = events.sender();
            move || events.statistics()
        }));
        let (commands, command_receiver) = mpsc::unbounded_channel();
        let event_sender = events.sender();
        let shared = Arc::new(Shared {
            live: RwLock::new(Arc::new(Live {
                reload: Arc::new(Reload::first(Arc::clone(&config), Arc::clone(&policy))),
                since_ms: clock.now().wall_ms,
                resolver: resolver.clone(),
                verifiers: verifiers.clone(),
            })),
            policy: Arc::new(RwLock::new(Arc::clone(&policy))),
            reloading: tokio::sync::Mutex::new(()),
            source: self.source,
            addresses: listeners.addresses.clone(),
            clock,
            started_ms: clock.now().wall_ms,
            node: node_text,
            shards: mail_senders.clone(),
            next_shard: AtomicUsize::new(0),
            next_campaign: AtomicU64::new(0),
            campaigns: AtomicUsize::new(0),
            commands,
            stopping: AtomicBool::new(false),
            metrics: Arc::clone(&metrics),
            heartbeats: Heartbeats::new(shards),
            listeners: listeners.statuses(),
            events: event_sender,
        });
        let mut engine = Engine {
            shared: Arc::clone(&shared),
            events: Some(events),
            threads: Vec::new(),
            addresses: listeners.addresses.clone(),
            limits: limits.clone(),
            limit_thread: Some(limit_thread),
            spool: Some(spool),
        };

        let (progress, left) = progress_file::take_up(&config.spool.path, shards);
        if left.unrecorded > 0 {
            shard_metrics[0].possible_duplicates.add(left.unrecorded);
            let recipients = left.unrecorded;
            tracing::warn!(
                recipients,
                "the engine died before it had recorded what became of these: they may get theirs twice"
            );
        }
        let thread_times = Arc::new(ThreadTimes::new(shards));
        let setup = ShardThreads {
            progress,
            quarantined: left.suspects.into_iter().filter(Suspect::is_quarantined).collect(),
            config: &config,
            policy: &policy,
            clock,
            cpus: &cpus,
            sockets_max,
            shards,
            senders: &mail_senders,
            control: &control_sender,
            limits,
            past_limits: Arc::new(past_limits),
            metrics: &shard_metrics,
            listeners: &listeners,
            thread_times: &thread_times,
            verifiers,
        };
        setup.start(&mut engine, logs, mail_receivers, |log| cursors.get(log))?;
        let control = ControlSetup {
            config,
            clock,
            resolver,
            policies,
            mailbox: control_receiver,
            commands: command_receiver,
            shards: mail_senders,
            thread_times,
            http: listeners.http,
            backend: shared,
            metrics,
        };
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(move || control::run(control));
        engine.threads.push(thread.map_err(|error| failed("control thread", &error))?);
        Ok(engine)
    }
}

/// What all shards' threads are started with.
struct ShardThreads<'a> {
    config: &'a Arc<Config>,
    policy: &'a Arc<Policy>,
    clock: Clock,
    cpus: &'a [usize],
    sockets_max: usize,
    shards: usize,
    senders: &'a [Sender<Mail>],
    control: &'a Sender<crate::handover::ControlMessage>,
    limits: std::sync::mpsc::Sender<LimitMail>,
    past_limits: Arc<PastLimits>,
    metrics: &'a [Arc<ShardMetrics>],
    progress: Vec<SharedProgress>,
    quarantined: Arc<[Suspect]>,
    listeners: &'a Listeners,
    thread_times: &'a Arc<ThreadTimes>,
    verifiers: Verifiers,
}

impl ShardThreads<'_> {
    /// Starts all shards and waits until each has taken up its messages.
    fn start(
        self,
        engine: &mut Engine,
        logs: Vec<Vec<LogDirectory>>,
        mailboxes: Vec<mailbox::Receiver<Mail>>,
        cursor: impl Fn(LogId) -> postrider_spool::record::Sequence,
    ) -> Result<(), StartError> {
        let failed = |what: &str, error: &dyn fmt::Display| StartError(format!("{what}: {error}"));
        let session_counts = Arc::new((0..self.shards).map(|_| AtomicUsize::new(0)).collect());
        let (started, starts) = std::sync::mpsc::channel();
        for (id, (logs, mailbox)) in logs.into_iter().zip(mailboxes).enumerate() {
            let setup = ShardSetup {
                options: ShardOptions {
                    id,
                    shards: self.shards,
                    config: Arc::clone(self.config),
                    policy: Arc::clone(self.policy),
                    metrics: Arc::clone(&self.metrics[id]),
                    progress: Arc::clone(&self.progress[id]),
                    quarantined: Arc::clone(&self.quarantined),
                    seed: os_random_u64(),
                    sockets_max: self.sockets_max,
                },
                clock: self.clock,
                cpu: self.config.pin.then(|| self.cpus[id % self.cpus.len()]),
                listeners: self.listeners.setups(),
                logs: logs.into_iter().map(|log| (log.id(), log)).map(|(id, log)| (log, cursor(id))).collect(),
                mailbox,
                shards: self.senders.to_vec(),
                control: self.control.clone(),
                limits: self.limits.clone(),
                past_limits: Arc::clone(&self.past_limits),
                events: engine.events.as_ref().expect("it was just started").sender(),
                verifiers: self.verifiers.clone(),
                session_counts: Arc::clone(&session_counts),
                heartbeat: Arc::clone(&engine.shared.heartbeats.beats[id]),
                thread_times: Arc::clone(self.thread_times),
                started: started.clone(),
            };
            let thread = std::thread::Builder::new().name(format!("shard-{id}"));
            let thread = thread.spawn(move || shard_loop::run(setup));
            engine.threads.push(thread.map_err(|error| failed("shard thread", &error))?);
        }
        drop(started);
        for _ in 0..self.shards {
            match starts.recv() {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(self.abandon(engine, error)),
                Err(_) => return Err(self.abandon(engine, "a shard's thread ended at its start".to_owned())),
            }
        }
        Ok(())
    }

    /// One shard could not start: the others end, and what they said is told.
    fn abandon(&self, engine: &mut Engine, error: String) -> StartError {
        for shard in self.senders {
            let _ = shard.send(Mail::Exit);
        }
        for thread in engine.threads.drain(..) {
            if let Ok(Err(error)) = thread.join() {
                return StartError(error.to_string());
            }
        }
        StartError(error)
    }
}

/// Sessions and connections that one shard may have: its share of the descriptors that the engine leaves over, but for
/// an eighth, so that the event log, lookups and HTTP still find one when all of these are taken.
fn sockets_max(descriptors: u64, shards: usize) -> Result<usize, String> {
    let own = DESCRIPTORS_OWN + DESCRIPTORS_OWN_PER_SHARD * shards;
    let needed = own + DESCRIPTORS_PER_SHARD_MIN * shards;
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    if descriptors < needed {
        return Err(format!(
            "only {descriptors} file descriptors are allowed, {shards} shards need {needed} and more: raise the limit \
             (`ulimit -n`, LimitNOFILE= under systemd)"
        ));
    }
    Ok((descriptors - own) / 8 * 7 / shards)
}

/// Bound sockets, made before anything is started: a port in use ends the start.
struct Listeners {
    smtp: Vec<ListenerSetup>,
    http: Vec<(TcpListener, crate::config::HttpListener)>,
    addresses: Addresses,
}

impl Listeners {
    fn bind(config: &Config) -> Result<Self, StartError> {
        let error = |error: std::io::Error| StartError(error.to_string());
        let mut listeners = Self { smtp: Vec::new(), http: Vec::new(), addresses: Addresses::default() };
        for listener in &config.smtp_listeners {
            let socket = net::bind_listener(listener.address).map_err(error)?;
            listeners.addresses.smtp.push(socket.local_addr().map_err(error)?);
            let policy = ListenerPolicy::new(listener)
                .map_err(|error| StartError(format!("listener {}: {error}", listener.address)))?;
            listeners.smtp.push(ListenerSetup { socket: Arc::new(socket), policy: Arc::new(policy) });
        }
        for listener in &config.http_listeners {
            let socket = net::bind_listener(listener.address).map_err(error)?;
            socket.set_nonblocking(true).map_err(error)?;
            listeners.addresses.http.push(socket.local_addr().map_err(error)?);
            listeners.http.push((socket, listener.clone()));
        }
        Ok(listeners)
    }

    fn setups(&self) -> Vec<ListenerSetup> {
        let setup = |listener: &ListenerSetup| ListenerSetup {
            socket: Arc::clone(&listener.socket),
            policy: Arc::clone(&listener.policy),
        };
        self.smtp.iter().map(setup).collect()
    }

    fn statuses(&self) -> Vec<ListenerStatus> {
        let status = |protocol: &str, address: &std::net::SocketAddr| ListenerStatus {
            protocol: protocol.to_owned(),
            address: address.to_string(),
        };
        let smtp = self.addresses.smtp.iter().map(|address| status("smtp", address));
        smtp.chain(self.addresses.http.iter().map(|address| status("http", address))).collect()
    }
}

/// A message that a shard has been sent.
struct Waiting(oneshot::Receiver<AcceptAnswer>);

impl Waiting {
    async fn answer(self) -> Result<Accepted, InjectError> {
        match self.0.await {
            Ok(Ok(id)) => Ok(Accepted { id }),
            Ok(Err(refusal)) => Err(refusal.into()),
            Err(_) => Err(InjectError::Ended),
        }
    }
}

impl Shared {
    fn send(&self, shard: usize, admitted: Admitted) -> Result<Waiting, InjectError> {
        let (reply, answer) = oneshot::channel();
        let mut mail = Mail::Inject { admitted: Box::new(admitted), reply };
        let mut give_up = None;
        while let Err(Full(back)) = self.shards[shard].send(mail) {
            if self.shards[shard].is_closed() {
                return Err(InjectError::Ended);
            }
            let now = self.clock.now().monotonic;
            if now >= *give_up.get_or_insert(now + INJECT_PATIENCE) {
                return Err(InjectError::Refused("452 4.3.1 The shard's mailbox is full, try again".to_owned()));
            }
            mail = back;
            std::thread::yield_now();
        }
        Ok(Waiting(answer))
    }

    /// The largest that a listener takes is what an embedder may inject.
    fn message_bytes_max(&self) -> u64 {
        let config = self.config();
        let listeners = config.smtp_listeners.iter().map(|listener| listener.max_message_bytes);
        listeners.max().unwrap_or_else(|| SmtpListener::default().max_message_bytes)
    }

    async fn ask(&self, ask: Ask) -> Result<Vec<Told>, Unavailable> {
        let (reply, answers) = oneshot::channel();
        let ended = || Unavailable("the engine is shutting down".to_owned());
        self.commands.send(Command::Ask { ask, reply }).map_err(|_| ended())?;
        answers.await.map_err(|_| ended())
    }
}

impl Shared {
    async fn choose(&self, ask: Ask) -> Result<Chosen, Unavailable> {
        let mut all = Chosen::default();
        for told in self.ask(ask).await? {
            let Told::Chosen(chosen) = told else { continue };
            for (queue, recipients) in chosen.recipients {
                *all.recipients.entry(queue).or_default() += recipients;
            }
        }
        Ok(all)
    }

    async fn ask_suspensions(&self, call: SuspensionCall) -> Result<SuspensionAnswer, Unavailable> {
        let (reply, answer) = oneshot::channel();
        let ended = || Unavailable("the engine is shutting down".to_owned());
        self.commands.send(Command::Suspensions { call, reply }).map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }
}

impl Backend for Shared {
    fn queues(&self, limit: usize) -> Reply<'_, QueueReport> {
        Box::pin(async move {
            let mut report = QueueReport { total: 0, queues: Vec::new() };
            for told in self.ask(Ask::Queues { limit }).await? {
                if let Told::Queues { total, rows, .. } = told {
                    report.total += total;
                    for row in rows {
                        merge(&mut report.queues, row);
                    }
                }
            }
            report.queues.truncate(limit);
            Ok(report)
        })
    }

    fn tls_report(&self) -> Reply<'_, Vec<TlsReportRow>> {
        Box::pin(async move {
            let mut all: Vec<TlsReportRow> = Vec::new();
            for told in self.ask(Ask::TlsReport).await? {
                let Told::TlsReport(rows) = told else { continue };
                all.extend(rows);
            }
            all.sort();
            all.dedup_by(|row, kept| {
                let of =
                    |row: &TlsReportRow| (row.policy_type, row.policy_domain.clone(), row.recipient_domain.clone());
                let same = of(row) == of(kept);
                if same {
                    kept.successful_sessions += row.successful_sessions;
                    for (name, count) in &row.failed_sessions {
                        *kept.failed_sessions.entry(name).or_default() += count;
                    }
                }
                same
            });
            Ok(all)
        })
    }

    fn messages(&self, filter: MessageFilter) -> Reply<'_, Vec<MessageRow>> {
        Box::pin(async move {
            let limit = filter.limit;
            let mut rows = Vec::new();
            for told in self.ask(Ask::Messages { filter }).await? {
                if let Told::Messages(mut more) = told {
                    rows.append(&mut more);
                }
            }
            rows.sort_by(|a, b| (&a.id, &a.recipient).cmp(&(&b.id, &b.recipient)));
            rows.truncate(limit);
            Ok(rows)
        })
    }

    fn status(&self) -> Reply<'_, Status> {
        Box::pin(async move {
            let (mut recipients, mut messages) = (0, 0);
            for told in self.ask(Ask::Queues { limit: 0 }).await? {
                if let Told::Queues { total, messages: of_shard, .. } = told {
                    recipients += total;
                    messages += of_shard;
                }
            }
            let (now, config) = (self.clock.now(), self.config());
            let sum = |field: fn(&ShardMetrics) -> u64| self.metrics.sum(field);
            let closed = self.readiness().err();
            Ok(Status {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                hostname: config.hostname.clone(),
                node_id: self.node.clone(),
                started: WallTime(self.started_ms),
                uptime_s: now.wall_ms.saturating_sub(self.started_ms) / 1000,
                shards: self.shards.len() as u32,
                listeners: self.listeners.clone(),
                spool: SpoolStatus {
                    path: config.spool.path.display().to_string(),
                    durability: match config.spool.durability {
                        Durability::Fsync => "fsync".to_owned(),
                        Durability::None => "none".to_owned(),
                    },
                    used_bytes: sum(|metrics| metrics.spool_used_bytes.get()),
                    max_bytes: config.spool.max_size_bytes,
                    open: closed.is_none(),
                    closed_reason: closed,
                },
                events: EventsStatus {
                    path: config.events_path().display().to_string(),
                    blocked: self.events.blocked_reason(),
                },
                messages,
                recipients,
                connections_in: sum(|metrics| metrics.connections_in.get()),
                connections_out: sum(|metrics| metrics.connections_out.get()),
                received: sum(|metrics| {
                    metrics.received_smtp.get() + metrics.received_http.get() + metrics.received_embedded.get()
                }),
                delivered: sum(|metrics| metrics.delivered.get()),
                deferred: sum(|metrics| metrics.transient_failures.get()),
                failed: sum(|metrics| metrics.failures.get()),
            })
        })
    }

    fn suspensions(&self) -> Reply<'_, Vec<SuspensionRow>> {
        Box::pin(async move {
            let SuspensionAnswer::List(list) = self.ask_suspensions(SuspensionCall::List).await? else {
                return Ok(Vec::new());
            };
            let text = |part: Option<Arc<str>>| part.map(|part| part.to_string());
            let (now_ms, config) = (self.clock.now().wall_ms, self.config());
            let row = |suspension: Suspension| SuspensionRow {
                left: Duration::from_millis(suspension.until_ms.saturating_sub(now_ms)),
                id: id_text(suspension.id),
                egress_source: suspension.scope.source.map(|source| config.egress_sources[source].name.clone()),
                site: text(suspension.scope.rollup),
                tenant: text(suspension.scope.tenant),
                campaign: text(suspension.scope.campaign),
                domain: text(suspension.scope.domain),
                limits: match suspension.effect {
                    Effect::Stop => None,
                    Effect::Limit(limited) => Some(limits_row(limited.at(now_ms))),
                },
                reason: suspension.reason.to_string(),
                until: WallTime(suspension.until_ms),
            };
            let mut rows: Vec<SuspensionRow> = list.into_iter().map(row).collect();
            rows.sort_by(|a, b| (a.until.0, &a.id).cmp(&(b.until.0, &b.id)));
            Ok(rows)
        })
    }

    fn suspend(&self, suspension: SuspensionRow, end: SuspensionEnd) -> Reply<'_, Result<String, String>> {
        Box::pin(async move {
            let now_ms = self.clock.now().wall_ms;
            let until_ms = match end {
                SuspensionEnd::After(lasts) => now_ms.saturating_add(lasts.as_millis() as u64),
                SuspensionEnd::At(WallTime(until_ms)) => until_ms,
            };
            if until_ms <= now_ms || until_ms - now_ms > SUSPENSION_MAX.as_millis() as u64 {
                return Ok(Err("it has to end at a time from now on, at most a year ahead".to_owned()));
            }
            let source = match &suspension.egress_source {
                None => None,
                Some(name) => match self.config().source_named(name) {
                    Some(source) => Some(source),
                    None => return Ok(Err(format!("there is no egress source {name:?}"))),
                },
            };
            let part = |part: Option<String>| part.map(|part| Arc::from(&*part));
            let SuspensionRow { site, tenant, campaign, domain, reason, .. } = suspension;
            let (rollup, tenant, campaign, domain) = (part(site), part(tenant), part(campaign), part(domain));
            let scope = Scope { source, rollup, tenant, campaign, domain };
            let id = u128::from(os_random_u64()) << 64 | u128::from(os_random_u64());
            let suspension = Suspension { id, scope, effect: Effect::Stop, reason: Arc::from(&*reason), until_ms };
            match self.ask_suspensions(SuspensionCall::Add(suspension)).await? {
                SuspensionAnswer::Added(Some(id)) => Ok(Ok(id_text(id))),
                _ => Ok(Err("there are too many suspensions".to_owned())),
            }
        })
    }

    fn resume(&self, id: String) -> Reply<'_, bool> {
        Box::pin(async move {
            let Some(id) = parse_id(&id) else { return Ok(false) };
            let answer = self.ask_suspensions(SuspensionCall::Remove { id }).await?;
            Ok(matches!(answer, SuspensionAnswer::Removed(true)))
        })
    }

    fn inspect(&self, id: MessageId, want_body: bool) -> Reply<'_, Option<Inspected>> {
        Box::pin(async move {
            let told = self.ask(Ask::Inspect { id, want_body }).await?;
            Ok(told
                .into_iter()
                .find_map(|told| if let Told::Inspected(found) = told { found } else { None })
                .map(|it| *it))
        })
    }

    fn bounce(&self, choice: MailChoice, reason: String) -> Reply<'_, (String, Chosen)> {
        Box::pin(async move {
            let id = id_text(u128::from(os_random_u64()) << 64 | u128::from(os_random_u64()));
            tracing::warn!(%id, reason, "mail is bounced by the operator: {choice}");
            Ok((id, self.choose(Ask::Bounce { choice, reason: reason.into() }).await?))
        })
    }

    fn release(&self, choice: MailChoice, reason: String) -> Reply<'_, Chosen> {
        Box::pin(async move {
            tracing::warn!(reason, "mail that is held as in doubt is released by the operator: {choice}");
            self.choose(Ask::Release { choice, reason: reason.into() }).await
        })
    }

    fn reload(&self) -> Reply<'_, Result<Reloaded, ReloadError>> {
        Box::pin(async { Ok(self.reload_source().await) })
    }

    fn readiness(&self) -> Result<(), String> {
        if self.stopping.load(Ordering::Relaxed) || self.commands.is_closed() {
            return Err("the engine is shutting down".to_owned());
        }
        let closed = self.metrics.sum(|metrics| metrics.spool_closed.get());
        if closed > 0 {
            return Err(format!("the spool takes no mail at {closed} of {} shards", self.shards.len()));
        }
        match self.events.blocked_reason() {
            Some(reason) => Err(format!("the event log can not be written: {reason}")),
            None => Ok(()),
        }
    }

    fn liveness(&self) -> Result<(), String> {
        match self.heartbeats.stuck(self.clock.now().monotonic, HEARTBEAT_PATIENCE) {
            Some(shard) => Err(format!("shard {shard} has taken no turn for {HEARTBEAT_PATIENCE:?}")),
            None => Ok(()),
        }
    }
}

fn limits_row(settings: LimitSettings) -> LimitsRow {
    LimitsRow {
        connection_limit: settings.connection_limit,
        max_deliveries_per_connection: settings.max_deliveries_per_connection,
        max_message_rate: settings.max_message_rate.map(|rate| rate.to_string()),
    }
}

/// A queue has entries at several homes: one row tells of all.
fn merge(rows: &mut Vec<QueueRow>, row: QueueRow) {
    let Some(known) = rows.iter_mut().find(|known| known.queue == row.queue) else {
        rows.push(row);
        return;
    };
    known.depth += row.depth;
    known.ready += row.ready;
    known.rate_per_s += row.rate_per_s;
    known.next_due = match (known.next_due, row.next_due) {
        (Some(a), Some(b)) => Some(if a.0 <= b.0 { a } else { b }),
        (a, b) => a.or(b),
    };
    known.site = known.site.take().or(row.site);
    known.egress_source = known.egress_source.take().or(row.egress_source);
    known.last_answer = known.last_answer.take().or(row.last_answer);
}

fn received(message: Message, bytes_max: u64) -> Result<Received, InjectError> {
    let address = |text: &str| {
        let parsed =
            Address::parse(text).map_err(|error| InjectError::Refused(format!("553 5.1.3 <{text}>: {error}")))?;
        Ok::<_, InjectError>(parsed.to_string())
    };
    let reverse_path = if message.reverse_path.is_empty() { String::new() } else { address(&message.reverse_path)? };
    let mut recipients = Vec::with_capacity(message.recipients.len());
    let mut places = Vec::with_capacity(message.recipients.len());
    for recipient in &message.recipients {
        let recipient = address(recipient)?;
        let known = recipients.iter().position(|known| *known == recipient);
        places.push(known.unwrap_or(recipients.len()) as u32);
        if known.is_none() {
            recipients.push(recipient);
        }
    }
    if message.dsn.recipients.len() > places.len() {
        return Err(InjectError::Refused("501 5.5.4 DSN requests for more recipients than there are".to_owned()));
    }
    let dsn = dsn::parameters(&message.dsn, |place| places[place])
        .map_err(|BadDsn(why)| InjectError::Refused(format!("501 5.5.4 {why}")))?;
    if message.meta.len() > CAPTURED_FIELDS_MAX {
        return Err(InjectError::Refused(format!("501 5.5.4 meta: more than {CAPTURED_FIELDS_MAX} names")));
    }
    for (number, (name, _)) in message.meta.iter().enumerate() {
        let is_name = (1..=ROUTING_NAME_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control);
        if !is_name || message.meta[..number].iter().any(|(other, _)| other == name) {
            return Err(InjectError::Refused(format!("501 5.5.4 meta: {name:?} is no name, or is there twice")));
        }
    }
    if recipients.is_empty() {
        return Err(InjectError::Refused("554 5.5.1 No valid recipients".to_owned()));
    }
    Ok(Received {
        reverse_path,
        recipients,
        content: clean_content(&message.content, LineEndings::Fix, bytes_max)?,
        eight_bit_declared: true,
        smtputf8_declared: true,
        helo: String::new(),
        protocol: "embedded",
        client: None,
        session_id: 0,
        trusted: true,
        received_detail: ReceivedDetail::Full,
        dsn,
        meta: message.meta,
    })
}

/// A spool gives back whole segments, so a small one has small segments: at least eight a shard. What doesn't fit into
/// a segment is refused with 552.
fn segment_bytes(max_bytes: u64, shards: usize) -> u64 {
    let share = max_bytes / (SEGMENTS_PER_SHARD_MIN * shards as u64);
    share.clamp(SEGMENT_BYTES_MIN, SpoolOptions::default().segment_bytes) & !(SEGMENT_BYTES_UNIT - 1)
}

fn spool_options(config: &Config, shards: usize) -> SpoolOptions {
    SpoolOptions {
        durability: match config.spool.durability {
            Durability::Fsync => postrider_spool::Durability::Fsync,
            Durability::None => postrider_spool::Durability::None,
        },
        max_bytes: config.spool.max_size_bytes,
        segment_bytes: segment_bytes(config.spool.max_size_bytes, shards),
        ..SpoolOptions::default()
    }
}

type Mailboxes = (Vec<Sender<Mail>>, Vec<mailbox::Receiver<Mail>>);

fn mailboxes(shards: usize) -> std::io::Result<Mailboxes> {
    let pairs: std::io::Result<Vec<_>> = (0..shards).map(|_| mailbox::mailbox(MAILBOX_CAPACITY)).collect();
    Ok(pairs?.into_iter().unzip())
}

/// Runs on the thread of limits.
#[expect(clippy::disallowed_methods, reason = "it may wait: only reservations come behind it")]
fn send_reserved(shard: &Sender<Mail>, reservation: Reservation) {
    let Reservation { limit, units, .. } = reservation;
    let mut mail = Mail::Core(ShardMessage::Reserved { limit, units });
    while let Err(Full(back)) = shard.send(mail) {
        if shard.is_closed() {
            return;
        }
        mail = back;
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs on the event log's thread. A cursor must not be lost: the next may come only with the next event.
#[expect(clippy::disallowed_methods, reason = "it may wait: only events come behind it")]
fn send_cursors(shards: &[Sender<Mail>], cursors: &[(LogId, postrider_spool::record::Sequence)]) {
    for &(log, sequence) in cursors {
        let shard = &shards[usize::from(log.0) % shards.len()];
        let mut mail = Mail::Core(ShardMessage::EventCursor { log, sequence });
        while let Err(Full(back)) = shard.send(mail) {
            if shard.is_closed() {
                break;
            }
            mail = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
