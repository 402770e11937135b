//! One shard: the core that owns all state of one thread, from the client's session to the outcome's record.
//!
//! A shard does no I/O. It is fed what happened (`open_session`, `session_received`, `spool_completed`, `connected`,
//! `connection_received`, `handle_message`, …), does its [`Shard::turn`], and is asked with [`Shard::poll_action`] what
//! is to be done and with [`Shard::next_timeout`] when it wants its next turn at the latest. `runtime/shard_loop.rs`
//! does so with a ring, the simulator with a seed.
//!
//! A shard is two things at once. As *home* it owns the durable state of the messages that it accepted; as *owner* it
//! holds the connections of the (egress source, roll-up) pairs that were given to it. Both sides talk in
//! [`ShardMessage`]s even when they are the same shard.
//!
//! Calling order after each input: `turn`, then `poll_action` until there is none.

mod accept;
mod ask;
mod automation;
mod body;
mod deliver;
mod gauges;
mod home_log;
mod intent;
mod message;
mod moving;
mod operate;
mod orders;
mod outcome;
mod recover;
mod reload;
mod routes;
mod schedule;
mod shaping;
mod spool;
mod spooled;
mod suspend;
#[cfg(test)]
mod tests;
mod unplaced;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ahash::{HashMap, HashMapExt as _};
use postrider_spool::record::{LogId, MessageId};
use postrider_spool::{Log, Operation};

use self::accept::{Asking, Session, Signing};
use self::ask::Asked;
use self::automation::Bouncing;
use self::body::HeldBodies;
use self::deliver::Delivery;
pub use self::deliver::{ConnectError, Connected, TlsStarted};
use self::home_log::{HomeLog, NoMail};
pub use self::reload::Reload;
use self::routes::{RouteCache, StaticRoutes};
use self::schedule::PendingRead;
use self::shaping::Shapings;
use self::unplaced::Unplaced;
use crate::accept::Policy;
use crate::admin::metrics::ShardMetrics;
use crate::config::{Config, SharedLimits};
use crate::deliver::content::Chunk;
use crate::handover::{AcceptAnswer, ControlMessage, Generation, ShardMessage, TlsRequirement};
use crate::limits::{INBOX_MESSAGES_PER_TURN, MemoryBounds, SWEEP_INTERVAL};
use crate::mail::endpoint::Endpoint;
use crate::mail::time::{Now, StepWatch};
use crate::outcome::event::LoggedRecord;
use crate::outcome::tls_report::TlsReport;
use crate::pool::automation::Automation;
use crate::pool::connection::ConnectionKey;
use crate::pool::egress::{AvoidedSources, EgressTurns};
use crate::pool::keeper::Keeper;
use crate::pool::pair::Pools;
use crate::pool::rate::{Past, PastLimits};
use crate::pool::suspension::{Suspension, Suspensions};
use crate::progress::{SharedProgress, Suspect};
use crate::schedule::queue::Home;
use crate::schedule::retry::Retries;

/// Names a client's session for as long as its shard lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey(pub u64);

/// What is to be done outside.
#[derive(Debug)]
pub enum Action {
    /// Send to a client.
    SessionSend {
        session: SessionKey,
        bytes: Vec<u8>,
    },
    /// Send what is to be sent, then shake hands.
    SessionStartTls {
        session: SessionKey,
    },
    /// Send what is to be sent, then close.
    SessionClose {
        session: SessionKey,
    },
    /// Break off whatever the session does.
    SessionAbort {
        session: SessionKey,
    },
    /// More input is wanted from a client that was waiting for an answer.
    SessionResume {
        session: SessionKey,
    },
    /// Acknowledge what came now, although nothing is said that would: a client that writes in small pieces may keep
    /// back the next until then (RFC 896), and the kernel may take 40 ms for it (RFC 1122 §4.2.3.2).
    SessionAcknowledge {
        session: SessionKey,
    },
    /// Execute, and give the completion to [`Shard::spool_completed`].
    Spool {
        log: LogId,
        operation: Operation,
    },
    /// The log of a shard that is no more has drained: its directory is to be removed.
    RemoveLog(Box<Log>),
    /// Connect from the source's address; answer with [`Shard::connected`] or [`Shard::connection_closed`].
    Connect {
        connection: ConnectionKey,
        source: usize,
        to: Endpoint,
    },
    /// Send to a peer, and report with [`Shard::connection_sent`].
    ConnectionSend {
        connection: ConnectionKey,
        chunks: Vec<Chunk<postrider_spool::Piece>>,
    },
    /// As [`Action::SessionAcknowledge`], for a peer that writes each of several replies by itself.
    ConnectionAcknowledge {
        connection: ConnectionKey,
    },
    /// Send what is to be sent, then shake hands with the host of this name.
    ConnectionStartTls {
        connection: ConnectionKey,
        host_name: String,
        tls: TlsRequirement,
    },
    /// Send what is to be sent, close, wait a little for the peer's FIN, and report with [`Shard::connection_gone`].
    ConnectionClose {
        connection: ConnectionKey,
    },
    /// Break off whatever the connection does.
    ConnectionAbort {
        connection: ConnectionKey,
    },
    /// Carry to another shard.
    Shard {
        to: usize,
        message: ShardMessage,
    },
    Control(ControlMessage),
    /// Record durably that units of a limit are used up from now on, then tell [`ShardMessage::Reserved`].
    Reserve(Reservation),
    /// The embedding API's message is durable, or was refused.
    Injected {
        injection: u64,
        answer: AcceptAnswer,
    },
    /// Durable records, for the event log.
    Events(Vec<LoggedRecord>),
}

/// Units of a limit that are about to be used, so that a crash does not make them be forgotten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    pub limit: Arc<str>,
    /// Wall time.
    pub at_ms: u64,
    pub units: u32,
    /// The limit's.
    pub period: Duration,
}

/// What a shard is made of.
#[derive(Debug)]
pub struct ShardOptions {
    pub id: usize,
    pub shards: usize,
    pub config: Arc<Config>,
    pub policy: Arc<Policy>,
    pub metrics: Arc<ShardMetrics>,
    pub progress: SharedProgress,
    /// What is not to be worked on again: found in a shard's hands at so many starts.
    pub quarantined: Arc<[Suspect]>,
    /// Seeds jitter, shuffles and session numbers.
    pub seed: u64,
    /// Sessions and connections that the shard may have together; bounded by file descriptors.
    pub sockets_max: usize,
    pub memory: MemoryBounds,
}

/// A shard's whole state.
pub struct Shard {
    id: usize,
    config: Arc<Config>,
    policy: Arc<Policy>,
    generation: Generation,
    metrics: Arc<ShardMetrics>,
    progress: SharedProgress,
    quarantined: Arc<[Suspect]>,
    random: fastrand::Rng,

    sockets_max: usize,
    /// So many there are just now, of those.
    sockets_left: usize,
    /// What peers have brought since the last turn.
    inputs: usize,

    // accept
    sessions: HashMap<SessionKey, Session>,
    next_session: u64,
    memory: MemoryBounds,
    /// Of all sessions, see [`crate::limits::RECEIVING_BYTES_MAX`].
    receiving_bytes: u64,
    /// Of messages that were received and wait to be signed, or to be let in.
    held_bytes: u64,
    signing: VecDeque<Signing>,
    unplaced: Unplaced,
    asking: Asking,
    events_blocked: bool,
    events_full: bool,

    // spool; the first log is the one that takes mail
    logs: Vec<HomeLog>,
    /// The most recipients of an entry: see [`Config::recipients_per_batch_max`], which looks at every rule.
    batch_max: usize,
    bodies: HeldBodies,

    // schedule
    home: Home,
    retries: Retries,
    tls_report: TlsReport,
    routes: RouteCache,
    shapings: Shapings,
    egress: HashMap<String, EgressTurns>,
    avoided: AvoidedSources,
    suspensions: Suspensions,
    /// Those that were decided here and that the control thread has not told of yet, in their order.
    announced: Vec<Suspension>,
    /// Whether each source's address is on this machine.
    plumbed: Vec<bool>,
    reading: HashMap<MessageId, Vec<PendingRead>>,
    /// Waits for reads that are under way to end.
    unread: VecDeque<(MessageId, PendingRead)>,
    asked: HashMap<u64, Asked>,

    bouncing: Bouncing,

    // pool, deliver
    pools: Pools,
    /// Of use at one shard only.
    keeper: Keeper,
    shared_limits: Arc<SharedLimits>,
    automation: Automation,
    deliveries: HashMap<ConnectionKey, Delivery>,
    /// Intents that were asked for so far.
    intents: u64,

    inbox: VecDeque<ShardMessage>,
    actions: VecDeque<Action>,
    next_sweep: Duration,
    /// From the first turn on.
    steps: Option<StepWatch>,
    /// Why no mail is taken, as the log was told last.
    closed: Option<NoMail>,
    stopping: bool,
    stopped: bool,
}

impl Shard {
    /// A shard without logs; they are added by [`Self::recover`] before the first turn.
    pub fn new(options: ShardOptions) -> Self {
        let ShardOptions { id, shards, config, policy, metrics, progress, quarantined, seed, sockets_max, memory } =
            options;
        let routes = Arc::new(StaticRoutes::new(&config.routes));
        let shared_limits = Arc::new(SharedLimits::new(&config));
        let shapings = Shapings::new(&config, Arc::clone(&routes.index));
        let mut shard = Self {
            id,
            policy,
            generation: Generation::default(),
            metrics,
            progress,
            quarantined,
            random: fastrand::Rng::with_seed(seed),
            sockets_max,
            sockets_left: sockets_max,
            inputs: 0,
            sessions: HashMap::new(),
            next_session: accept::first_session(seed),
            memory,
            receiving_bytes: 0,
            held_bytes: 0,
            signing: VecDeque::new(),
            unplaced: Unplaced::default(),
            asking: Asking::default(),
            events_blocked: false,
            events_full: false,
            logs: Vec::new(),
            batch_max: config.recipients_per_batch_max(),
            bodies: HeldBodies::default(),
            home: Home::new(Arc::clone(&shared_limits)),
            retries: Retries::new(&config),
            tls_report: TlsReport::default(),
            routes: RouteCache::new(routes),
            shapings,
            egress: HashMap::new(),
            avoided: AvoidedSources::default(),
            suspensions: Suspensions::default(),
            announced: Vec::new(),
            plumbed: vec![true; config.egress_sources.len()],
            reading: HashMap::new(),
            unread: VecDeque::new(),
            asked: HashMap::new(),
            bouncing: Bouncing::default(),
            pools: Pools::new(orders::pool_options(&config, shards, Arc::clone(&shared_limits))),
            keeper: Keeper::new(Arc::clone(&shared_limits)),
            shared_limits,
            automation: Automation::default(),
            deliveries: HashMap::new(),
            intents: 0,
            inbox: VecDeque::new(),
            actions: VecDeque::new(),
            next_sweep: Duration::ZERO,
            steps: None,
            closed: None,
            stopping: false,
            stopped: false,
            config,
        };
        shard.learn_fixed_sites();
        shard
    }

    /// One round through the six stages: everything that can go on goes on, each stage within its bound.
    pub fn turn(&mut self, now: Now) {
        self.metrics.turns.inc();
        self.notice_step(now);
        self.pools.begin(now);
        self.keeper.begin(now);
        self.sweep(now);
        self.open_waiting(now); //      pool: connections that had to wait
        self.place_waiting(now); //     accept: messages that found no room
        self.sign_waiting(now); //      accept: signatures, at most a few
        self.release_due(now); //       schedule: entries whose time has come
        self.end_bouncing(now); //      schedule: entries of queues that bounce
        for _ in 0..INBOX_MESSAGES_PER_TURN {
            self.serve_needs(now); //   schedule → pool: tickets, questions
            self.carry_out_orders(now); // pool → deliver: connections, transactions, credits
            self.pass_on_permits(now); //  pool: limits over many pairs
            let Some(message) = self.inbox.pop_front() else { break };
            self.receive(now, message); // deliver → outcome, and all else that shards tell each other
        }
        self.finish_release(now); //    pool: pairs that move to another shard
        self.fetch_waiting(now); //     schedule: messages that could not be read yet
        self.commit(now); //            spool: one write for everything that waits
        self.publish(); //              outcome: events of what is durable
        self.report_stopped();
    }

    /// What is to be done next; `None` when all is said.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When the next turn is due at the latest, in monotonic time.
    pub fn next_timeout(&self, now: Now) -> Duration {
        let mut next = self.next_sweep;
        if self.has_more() {
            return now.monotonic;
        }
        if let Some(due_ms) = self.home.next_due_ms() {
            next = next.min(now.monotonic + Duration::from_millis(due_ms.saturating_sub(now.wall_ms)));
        }
        for until in self.pools.next_timeout().into_iter().chain(self.keeper.next_timeout()) {
            next = next.min(until);
        }
        for log in &self.logs {
            next = next.min(log.next_timeout());
        }
        next
    }

    /// What was reserved of limits before the engine's start, by limit; to be called before the first turn.
    pub fn recall_limits(&mut self, past: Arc<PastLimits>) {
        self.keeper.recall(Arc::clone(&past));
        self.pools.recall(past);
    }

    /// What the engine's next start has to know of limits over a minute or longer, so that it goes on as if there had
    /// been none: each limit that the shard kept, by name. A name may come twice; both then count.
    ///
    /// To be called at the end, once this shard takes no more turns: what is used after that nobody would know of.
    pub fn leave_limits(&mut self, now: Now) -> Vec<(Arc<str>, Past)> {
        // What other shards' permits came to may have come behind the last turn.
        for message in std::mem::take(&mut self.inbox) {
            if let ShardMessage::Spent { permit, at } = message {
                self.keeper.count_spent(&permit, at);
            }
        }
        let mut past = self.pools.past(now);
        past.extend(self.keeper.past(now));
        past
    }

    pub fn memory(&self) -> MemoryBounds {
        self.memory
    }

    /// A message from another shard or the control thread; the next turn handles it.
    pub fn handle_message(&mut self, message: ShardMessage) {
        self.inbox.push_back(message);
    }

    /// Whether signatures, messages, entries or connections wait for the next turn only because of a turn's bound.
    pub fn has_more(&self) -> bool {
        !self.signing.is_empty() || !self.inbox.is_empty() || !self.bouncing.is_empty() || self.pools.has_more()
    }

    pub fn id(&self) -> usize {
        self.id
    }

    /// What is looked at once a second: time limits of sessions and connections, expiry, blocked domains and pairs.
    fn sweep(&mut self, now: Now) {
        if self.pools.next_timeout().is_some_and(|until| until <= now.monotonic) {
            self.pools.unblock(now, &mut |below| self.random.u64(0..below));
        }
        if self.keeper.next_timeout().is_some_and(|until| until <= now.monotonic) {
            self.keeper.wake(now);
        }
        if now.monotonic < self.next_sweep {
            return;
        }
        self.next_sweep = now.monotonic + SWEEP_INTERVAL;
        self.sockets_left = self.sockets_max;
        self.time_out_sessions(now);
        self.time_out_deliveries(now);
        self.home.unblock_domains(now.wall_ms);
        self.home.retry_sources(now.wall_ms);
        self.suspensions.expire(now.wall_ms);
        self.refresh_limits(now);
        self.sweep_bouncing();
        // What is over during a stop the next start ends: a shard that has said that it is done waits for others.
        if !self.stopping {
            self.expire(now);
        }
        self.home.update_rates();
        self.home.forget_paced(now.wall_ms);
        self.home.forget_idle();
        self.release_bodies();
        self.give_up_drained_logs();
        self.pools.tick(now);
        self.update_gauges(now);
    }

    /// Finishes what is on the wire and takes nothing new.
    fn stop(&mut self, now: Now) {
        self.stopping = true;
        self.stop_asking(now);
        self.stop_waiting_for_room(now);
        self.stop_sessions(now);
        self.home.stop();
        self.bound_quits(now);
        self.pools.stop(now, &mut |below| self.random.u64(0..below));
    }

    fn report_stopped(&mut self) {
        let quiet = self.stopping
            && self.sessions.is_empty()
            && self.signing.is_empty()
            && self.inbox.is_empty()
            && self.bouncing.is_empty()
            // What has been decided to end may be among them.
            && self.reading.is_empty()
            && self.unread.is_empty()
            && self.home.out() == 0
            && self.pools.connections() == 0
            && self.logs.iter().all(HomeLog::is_quiet);
        if quiet && !self.stopped {
            self.stopped = true;
            self.actions.push_back(Action::Control(ControlMessage::Stopped { shard: self.id }));
        }
    }

    fn log_index(&self, log: LogId) -> usize {
        let found = self.logs.iter().position(|home| home.log.id() == log);
        found.expect("a message's log is served by its home")
    }
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shard {}: {} entries, {} sessions", self.id, self.home.len(), self.sessions.len())
    }
}
