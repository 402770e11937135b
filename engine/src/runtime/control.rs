//! The control thread: routes, owners, questions, HTTP, and the start, reload and end of all other threads.
//!
//! Ordinary tokio. A shard waits for it only where it has no route for a domain or no owner for a pair yet.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;

use super::aside::aside;
use super::clock::{self, Clock};
use super::directory::{self, Directory, ThreadTimes};
use super::dns::Resolver;
use super::mailbox::{Full, Receiver, Sender};
use super::mta_sts::PolicyStore;
use super::net::is_local_address;
use super::questions::Questions;
use super::renewal::Renewal;
use super::shard_loop::Mail;
use super::spool_place::SpoolPlace;
use super::suspension_list::SuspensionList;
use crate::admin::http_admin::{self, AdminOptions};
use crate::admin::metrics::Metrics;
use crate::config::{Config, EgressSource, HttpListener};
use crate::handover::{Ask, ControlMessage, Generation, ShardMessage, Told};
use crate::limits::{LOOKUPS_RUNNING_MAX, MAILBOX_BATCH, MOVE_LOOK_INTERVAL, PLUMBING_INTERVAL, SHUTDOWN_COMMIT_GRACE};
use crate::mail::time::StepWatch;
use crate::pool::suspension::Suspension;

mod lookups;
mod reloads;

use reloads::Reloads;
pub(crate) use reloads::TakenUp;

/// What the control thread is started with.
pub(crate) struct ControlSetup {
    pub(crate) config: Arc<Config>,
    pub(crate) clock: Clock,
    pub(crate) resolver: Resolver,
    pub(crate) policies: PolicyStore,
    pub(crate) mailbox: Receiver<ControlMessage>,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) shards: Vec<Sender<Mail>>,
    pub(crate) thread_times: Arc<ThreadTimes>,
    pub(crate) http: Vec<(std::net::TcpListener, HttpListener)>,
    pub(crate) backend: Arc<dyn crate::admin::Backend>,
    pub(crate) metrics: Arc<Metrics>,
}

/// What the engine's handles ask of the control thread. Admin calls and shutdown: their number is bounded by the HTTP
/// server's connections.
#[derive(Debug)]
pub(crate) enum Command {
    /// Asks every shard; their answers come back in any order.
    Ask { ask: Ask, reply: oneshot::Sender<Vec<Told>> },
    /// What is suspended, to be looked at or changed.
    Suspensions { call: SuspensionCall, reply: oneshot::Sender<SuspensionAnswer> },
    /// All shards are to take up another configuration; answered once they have.
    Reload { renewal: Arc<Renewal>, taken_up: TakenUp },
    /// Ends all shards, waiting for what is on the wire for at most `grace`.
    Shutdown { grace: Duration },
}

#[derive(Debug)]
pub(crate) enum SuspensionCall {
    List,
    Add(Suspension),
    Remove { id: u128 },
}

#[derive(Debug)]
pub(crate) enum SuspensionAnswer {
    List(Vec<Suspension>),
    /// Its id; None: there are too many.
    Added(Option<u128>),
    /// Whether there was one.
    Removed(bool),
}

/// Runs until [`Command::Shutdown`] is done.
pub(crate) fn run(setup: ControlSetup) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(Control::start(setup))
}

struct Control {
    config: Arc<Config>,
    clock: Clock,
    resolver: Resolver,
    policies: PolicyStore,
    lookups: Arc<Semaphore>,
    /// Lookups for an earlier configuration end.
    lookups_of: watch::Sender<Generation>,
    reloads: Reloads,
    /// Of each HTTP server.
    http_options: Vec<watch::Sender<AdminOptions>>,
    /// Domains with a shaping table of their own whose site was not asked for yet.
    unknown_rule_sites: watch::Receiver<usize>,
    shards: Vec<Sender<Mail>>,
    directory: Directory,
    thread_times: Arc<ThreadTimes>,
    questions: Questions,
    unplumbed: Vec<bool>,
    spool_place: SpoolPlace,
    suspensions: SuspensionList,
    saving: Option<oneshot::Receiver<std::io::Result<()>>>,
    steps: StepWatch,
    stopped: usize,
    grace_ends: Option<Duration>,
}

impl Control {
    async fn start(setup: ControlSetup) -> std::io::Result<()> {
        let (stop_http, http_stopped) = watch::channel(false);
        let (mut servers, mut http_options) = (Vec::new(), Vec::new());
        for (listener, config) in setup.http {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let (sender, options) = watch::channel(AdminOptions { admin_token_sha256: config.admin_token_sha256 });
            http_options.push(sender);
            let mut stopped = http_stopped.clone();
            let shutdown = async move {
                // An error says that the sender is gone, which is the end as well.
                let _ = stopped.wait_for(|stop| *stop).await;
            };
            let (backend, metrics) = (Arc::clone(&setup.backend), Arc::clone(&setup.metrics));
            servers.push(tokio::spawn(http_admin::serve(listener, options, backend, metrics, shutdown)));
        }
        let (rule_sites, unknown_rule_sites) = watch::channel(0);
        let now_ms = setup.clock.now().wall_ms;
        let mut suspensions = SuspensionList::open(&setup.config.spool.path, &setup.config.egress_sources, now_ms);
        suspensions.end_other_quotas(now_ms, &setup.config);
        let control = Self {
            unknown_rule_sites,
            unplumbed: vec![false; setup.config.egress_sources.len()],
            spool_place: SpoolPlace::new(&setup.config.spool.path),
            suspensions,
            saving: None,
            config: setup.config,
            steps: StepWatch::new(setup.clock.now()),
            clock: setup.clock,
            resolver: setup.resolver,
            policies: setup.policies,
            lookups: Arc::new(Semaphore::new(LOOKUPS_RUNNING_MAX)),
            lookups_of: watch::Sender::new(Generation::default()),
            reloads: Reloads::new(setup.shards.len()),
            http_options,
            questions: Questions::new(setup.shards.len()),
            directory: Directory::new(setup.shards.len()),
            thread_times: setup.thread_times,
            shards: setup.shards,
            stopped: 0,
            grace_ends: None,
        };
        control.follow_rule_sites(rule_sites);
        control.serve(setup.mailbox, setup.commands).await?;
        let _ = stop_http.send(true);
        for server in servers {
            server.abort();
        }
        Ok(())
    }

    async fn serve(
        mut self,
        mailbox: Receiver<ControlMessage>,
        mut commands: mpsc::UnboundedReceiver<Command>,
    ) -> std::io::Result<()> {
        let mut mailbox = mailbox.on_control()?;
        let mut batch = Vec::with_capacity(MAILBOX_BATCH);
        let mut plumbing = tokio::time::interval(PLUMBING_INTERVAL);
        let mut loads = tokio::time::interval(MOVE_LOOK_INTERVAL);
        loads.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Before any owner is told, and so before anything can be sent.
        let suspensions: Vec<Suspension> = self.suspensions.iter().cloned().collect();
        for suspension in suspensions {
            self.tell_all(|| ShardMessage::Suspend(Box::new(suspension.clone()))).await;
        }
        while self.stopped < self.shards.len() {
            let grace_ends = self.grace_ends.unwrap_or(Duration::MAX);
            let grace = grace_ends.saturating_sub(self.clock.now().monotonic).min(Duration::from_secs(86_400));
            tokio::select! {
                _ = mailbox.recv_batch(&mut batch, MAILBOX_BATCH) => {
                    for message in batch.drain(..) {
                        self.receive(message).await;
                    }
                }
                command = commands.recv() => match command {
                    Some(Command::Ask { ask, reply }) => {
                        self.questions.add(ask, reply);
                        self.ask().await;
                    }
                    Some(Command::Suspensions { call, reply }) => {
                        let answer = self.serve_suspensions(call).await;
                        // Who asked may have given up.
                        let _ = reply.send(answer);
                    }
                    Some(Command::Reload { renewal, taken_up }) => {
                        self.reloads.waiting.push_back((renewal, taken_up));
                        self.reload_waiting().await;
                    }
                    Some(Command::Shutdown { grace }) => self.shut_down(grace).await,
                    None => self.shut_down(self.config.shutdown_grace).await,
                },
                _ = plumbing.tick() => {
                    if let Some(step_ms) = self.steps.wall_stepped(self.clock.now()) {
                        tracing::warn!(step_ms, "the wall clock was set; see \"The clock\" in operating.md");
                    }
                    self.look_at_sources().await;
                    self.look_at_spool().await;
                    self.suspensions.expire(self.clock.now().wall_ms);
                    self.save_suspensions();
                }
                _ = loads.tick(), if self.shards.len() > 1 => self.look_at_loads().await,
                result = saved(&mut self.saving) => {
                    self.saving = None;
                    match result {
                        Ok(()) => self.save_suspensions(),
                        Err(error) => self.could_not_save(&error),
                    }
                }
                () = clock::sleep(grace) => {
                    tracing::warn!("shutdown_grace is over; what is still on the wire is broken off");
                    break;
                }
            }
        }
        for shard in &self.shards {
            send(shard, Mail::Exit).await;
        }
        self.save_suspensions();
        while self.saving.is_some() {
            let result = tokio::time::timeout(SHUTDOWN_COMMIT_GRACE, saved(&mut self.saving)).await;
            self.saving = None;
            result.map_err(|_| std::io::Error::other("the list of suspensions can not be written: no answer"))??;
            self.save_suspensions();
        }
        Ok(())
    }

    async fn receive(&mut self, message: ControlMessage) {
        match message {
            ControlMessage::FindRoute { shard, key } => self.find_route(shard, key),
            ControlMessage::FindOwner { shard, pair } => {
                let owner = self.directory.owner(&pair);
                send(&self.shards[shard], Mail::Core(ShardMessage::Owner { pair, owner })).await;
            }
            ControlMessage::Unplumbed { source } => self.set_plumbed(source, false).await,
            ControlMessage::Answer { question, told } => {
                self.questions.answer(question, told);
                self.ask().await;
            }
            ControlMessage::Suspend(suspension) => _ = self.suspend(*suspension).await,
            ControlMessage::Carried { carried, .. } => {
                // What moves has its configuration with it, so nothing does until all shards have the same.
                let carried = if self.reloads.are_under_way() { Vec::new() } else { carried };
                let told = self.directory.handle_carried(self.clock.now().monotonic, &carried);
                self.tell(told).await;
            }
            ControlMessage::Released { rollup, state, .. } => {
                let told = self.directory.handle_released(self.clock.now().monotonic, rollup, state);
                self.tell(told).await;
                self.reload_waiting().await;
            }
            ControlMessage::TookOver { rollup, .. } => {
                let (rollup, owner) = self.directory.handle_took_over(self.clock.now().monotonic, rollup);
                self.tell_all(|| ShardMessage::Moved { rollup: rollup.clone(), owner }).await;
                self.reload_waiting().await;
            }
            ControlMessage::Reloaded { shard } => self.reloads.taken_up(shard),
            ControlMessage::Stopped { .. } => self.stopped += 1,
        }
    }

    /// Puts a suspension in force everywhere, and on disk soon. None: there are too many.
    async fn suspend(&mut self, suspension: Suspension) -> Option<u128> {
        let suspension = self.suspensions.insert(self.clock.now().wall_ms, suspension)?;
        self.tell_all(|| ShardMessage::Suspend(Box::new(suspension.clone()))).await;
        self.save_suspensions();
        Some(suspension.id)
    }

    async fn serve_suspensions(&mut self, call: SuspensionCall) -> SuspensionAnswer {
        let now_ms = self.clock.now().wall_ms;
        match call {
            SuspensionCall::List => {
                let in_force = self.suspensions.iter().filter(|suspension| suspension.until_ms > now_ms);
                SuspensionAnswer::List(in_force.cloned().collect())
            }
            SuspensionCall::Add(suspension) => SuspensionAnswer::Added(self.suspend(suspension).await),
            SuspensionCall::Remove { id } => {
                let removed = self.suspensions.remove(now_ms, id);
                if removed {
                    self.tell_all(|| ShardMessage::Resume { id }).await;
                    self.save_suspensions();
                }
                SuspensionAnswer::Removed(removed)
            }
        }
    }

    /// One write at a time, on a thread that may wait for the disk; what changes meanwhile goes with the next.
    fn save_suspensions(&mut self) {
        if self.saving.is_none()
            && let Some((file, bytes)) = self.suspensions.take_change()
        {
            match aside("suspensions", move || file.replace(&bytes)) {
                Ok(saving) => self.saving = Some(saving),
                Err(error) => self.could_not_save(&error),
            }
        }
    }

    fn could_not_save(&mut self, error: &std::io::Error) {
        tracing::error!(%error, "the list of suspensions can not be written; it is tried again");
        self.suspensions.put_back_change();
    }

    async fn tell_all(&self, message: impl Fn() -> ShardMessage) {
        for shard in &self.shards {
            send(shard, Mail::Core(message())).await;
        }
    }

    /// Looks whether something should move from a busy shard to another.
    async fn look_at_loads(&mut self) {
        if self.grace_ends.is_none() {
            let told = self.directory.look(self.clock.now().monotonic, &self.thread_times);
            self.tell(told).await;
        }
    }

    async fn tell(&self, told: Option<directory::Told>) {
        if let Some((shard, message)) = told {
            send(&self.shards[shard], Mail::Core(message)).await;
        }
    }

    async fn ask(&mut self) {
        while let Some((question, ask)) = self.questions.poll() {
            for shard in &self.shards {
                send(shard, Mail::Core(ShardMessage::Ask { question, ask: Box::new(ask.clone()) })).await;
            }
        }
    }

    async fn shut_down(&mut self, grace: Duration) {
        if self.grace_ends.is_some() {
            return;
        }
        self.grace_ends = Some(self.clock.now().monotonic + grace);
        for shard in &self.shards {
            send(shard, Mail::Core(ShardMessage::Stop)).await;
        }
    }

    /// Whether each source's address is on this machine, looked at every few seconds.
    async fn look_at_sources(&mut self) {
        for source in 0..self.config.egress_sources.len() {
            let config = &self.config.egress_sources[source];
            match config.source_address.filter(|_| config.suspend_when_unplumbed && !config.is_retired) {
                Some(address) => self.set_plumbed(source, is_local_address(address)).await,
                // It may have been, under an earlier configuration.
                None => self.set_plumbed(source, true).await,
            }
        }
    }

    /// While it is gone no mail is taken, and what was taken goes out.
    async fn look_at_spool(&mut self) {
        let Some(gone) = self.spool_place.look() else { return };
        if gone {
            tracing::error!("the spool's directory was moved, removed or mounted over: put it back before a restart");
        }
        for shard in &self.shards {
            send(shard, Mail::Core(ShardMessage::SpoolGone { gone })).await;
        }
    }

    async fn set_plumbed(&mut self, source: usize, plumbed: bool) {
        if self.unplumbed[source] != plumbed {
            return;
        }
        self.unplumbed[source] = !plumbed;
        let EgressSource { name, source_address, .. } = &self.config.egress_sources[source];
        let address = source_address.map(tracing::field::display);
        if plumbed {
            tracing::info!(source = name, address, "the source's address is on this machine");
        } else {
            tracing::warn!(
                source = name,
                address,
                "the source's address is not on this machine; the source is suspended"
            );
        }
        for shard in &self.shards {
            send(shard, Mail::Core(ShardMessage::SourcePlumbed { source, plumbed })).await;
        }
    }
}

/// The end of the write that is under way; never, where there is none.
async fn saved(saving: &mut Option<oneshot::Receiver<std::io::Result<()>>>) -> std::io::Result<()> {
    match saving {
        Some(saving) => saving.await.map_err(std::io::Error::other)?,
        None => std::future::pending().await,
    }
}

/// Sends to a shard, waiting while its mailbox is full; a shard that is gone needs nothing any more.
async fn send(shard: &Sender<Mail>, mut mail: Mail) {
    while let Err(Full(back)) = shard.send(mail) {
        if shard.is_closed() {
            return;
        }
        mail = back;
        clock::sleep(Duration::from_millis(1)).await;
    }
}

/// Where an engine's listeners are bound.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    pub smtp: Vec<SocketAddr>,
    pub http: Vec<SocketAddr>,
}
