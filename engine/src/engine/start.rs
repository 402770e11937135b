//! What is started, in which order, and what each part is given.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use postrider_spool::record::LogId;
use postrider_spool::{LogDirectory, Spool, SpoolOptions};
use tokio::sync::mpsc;

use super::listeners::Listeners;
use super::reload::{Live, Source};
use super::{Engine, Shared, StartError};
use crate::accept::Policy;
use crate::admin::metrics::{Metrics, ShardMetrics};
use crate::config::{Config, ConfigErrors, Durability};
use crate::handover::ShardMessage;
use crate::limits::{
    DESCRIPTORS_OWN, DESCRIPTORS_OWN_PER_SHARD, DESCRIPTORS_PER_SHARD_MIN, MAILBOX_CAPACITY, MemoryBounds,
    SEGMENT_BYTES_MIN, SEGMENT_BYTES_UNIT, SEGMENTS_PER_SHARD_MIN,
};
use crate::outcome::event::NodeId;
use crate::outcome::event_log::Cursors;
use crate::pool::rate::PastLimits;
use crate::progress::{SharedProgress, Suspect};
use crate::runtime::cgroup;
use crate::runtime::clock::Clock;
use crate::runtime::control::{self, ControlSetup};
use crate::runtime::directory::ThreadTimes;
use crate::runtime::dns::Resolver;
use crate::runtime::event_file::{EventLog, EventLogOptions, node_id};
use crate::runtime::heartbeats::Heartbeats;
use crate::runtime::limit_file::{LimitFile, LimitMail};
use crate::runtime::mailbox::{self, Full, Sender};
use crate::runtime::mta_sts::PolicyStore;
use crate::runtime::random::os_random_u64;
use crate::runtime::renewal::Verifiers;
use crate::runtime::shard_loop::{self, Mail, ShardSetup};
use crate::runtime::{net, progress_file, uring};
use crate::shard::{Reload, Reservation, ShardOptions};

/// Makes an [`Engine`].
pub struct EngineBuilder {
    config: Config,
    source: Option<Source>,
}

impl fmt::Debug for EngineBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EngineBuilder {:?}", self.config)
    }
}

impl Engine {
    pub fn builder(config: Config) -> EngineBuilder {
        EngineBuilder { config, source: None }
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
        config.check().map_err(|error| StartError(format!("configuration: {error}")))?;
        uring::check_available().map_err(|error| StartError(error.to_string()))?;
        let fd_limit = net::raise_fd_limit().map_err(|error| failed("file descriptor limit", &error))?;
        net::survive_file_size_limit().map_err(|error| failed("file size limit", &error))?;
        config.spool.filesystem().map_err(StartError)?;
        let policy = Arc::new(Policy::new(&config).map_err(StartError)?);
        let cpus = net::allowed_cpus();
        let shards = config.shards.unwrap_or(cpus.len());
        let sockets_max = sockets_max(fd_limit.soft, shards).map_err(StartError)?;

        let memory = memory_bounds(&config, shards);

        let (spool, logs) = open_spool(&config, shards, memory)?;
        let node =
            node_id(&config.spool.path, [os_random_u64(), os_random_u64()]).map_err(|error| failed("spool", &error))?;
        let (event_log, cursors) = open_event_log(config.events_path(), node)?;

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
            node: node.to_string(),
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

        let (progress, quarantined) = take_up_progress(&config, &shard_metrics);
        let thread_times = Arc::new(ThreadTimes::new(shards));
        let setup = ShardThreads {
            progress,
            quarantined,
            config: &config,
            policy: &policy,
            clock,
            cpus: &cpus,
            sockets_max,
            memory,
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
    memory: MemoryBounds,
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
                    memory: self.memory,
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

fn failed(what: &str, error: &dyn fmt::Display) -> StartError {
    StartError(format!("{what}: {error}"))
}

/// The spool, and the logs that each shard serves.
fn open_spool(
    config: &Config,
    shards: usize,
    memory: MemoryBounds,
) -> Result<(Spool, Vec<Vec<LogDirectory>>), StartError> {
    let mut spool = Spool::open(&config.spool.path, spool_options(config, shards, memory))
        .map_err(|error| failed(&format!("spool {}", config.spool.path.display()), &error))?;
    let logs = spool.assign(shards).map_err(|error| failed("spool", &error))?;
    Ok((spool, logs))
}

/// The event log, and how far of each log of the spool it has told.
fn open_event_log(path: PathBuf, node: NodeId) -> Result<(EventLog, Cursors), StartError> {
    let what = format!("event log {}", path.display());
    let (event_log, cursors, report) =
        EventLog::open(EventLogOptions::new(path, node)).map_err(|error| failed(&what, &error))?;
    if let Some((file, bytes)) = report.cut {
        tracing::warn!(file = %file.display(), bytes, "an unfinished frame of the event log was cut");
    }
    Ok((event_log, cursors))
}

/// What each shard is at, for the next start; and the messages that the last ones died of.
fn take_up_progress(config: &Config, metrics: &[Arc<ShardMetrics>]) -> (Vec<SharedProgress>, Arc<[Suspect]>) {
    let (progress, left) = progress_file::take_up(&config.spool.path, metrics.len());
    if left.unrecorded > 0 {
        metrics[0].possible_duplicates.add(left.unrecorded);
        let recipients = left.unrecorded;
        tracing::warn!(
            recipients,
            "the engine ended before it had recorded what became of these: they may get theirs twice"
        );
    }
    (progress, left.suspects.into_iter().filter(Suspect::is_quarantined).collect())
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

/// A spool gives back whole segments, so a small one has small segments: at least eight a shard. What doesn't fit into
/// a segment is refused with 552.
fn segment_bytes(max_bytes: u64, shards: usize) -> u64 {
    let share = max_bytes / (SEGMENTS_PER_SHARD_MIN * shards as u64);
    share.clamp(SEGMENT_BYTES_MIN, SpoolOptions::default().segment_bytes) & !(SEGMENT_BYTES_UNIT - 1)
}

/// From what the machine or the control group has at the start.
fn memory_bounds(config: &Config, shards: usize) -> MemoryBounds {
    let memory_bytes = cgroup::memory_bytes().unwrap_or(u64::MAX);
    let bounds = MemoryBounds::of(memory_bytes, shards);
    let largest = config.smtp_listeners.iter().map(|listener| listener.max_message_bytes).max().unwrap_or(0);
    if bounds.receiving_bytes < largest {
        let (memory_mib, receiving_mib) = (memory_bytes >> 20, bounds.receiving_bytes >> 20);
        tracing::warn!(
            memory_mib,
            receiving_mib,
            "there is little memory: of a shard's sessions, so much is received at once, and what is larger is refused \
             with 452 even where max_message_size allows it"
        );
    }
    bounds
}

fn spool_options(config: &Config, shards: usize, memory: MemoryBounds) -> SpoolOptions {
    SpoolOptions {
        durability: match config.spool.durability {
            Durability::Fsync => postrider_spool::Durability::Fsync,
            Durability::None => postrider_spool::Durability::None,
        },
        max_bytes: config.spool.max_size_bytes,
        segment_bytes: segment_bytes(config.spool.max_size_bytes, shards),
        pending_bytes: memory.pending_bytes,
        read_bytes: memory.read_bytes,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A shard that starts serves a client, and can deliver what it takes.
    #[test]
    fn the_fewest_descriptors_allowed_are_enough() {
        for shards in 1..=64 {
            let allowed = (0..10_000).find(|descriptors| sockets_max(*descriptors, shards).is_ok()).unwrap();
            let sockets = sockets_max(allowed, shards).unwrap();
            assert!(
                sockets / 4 > 0 && sockets / 4 * 3 > 0,
                "{shards} shards start with {allowed}: {sockets} sockets each"
            );
            assert!(sockets_max(allowed - 1, shards).unwrap_err().contains(&format!("need {allowed} and more")));
        }
    }
}
