//! A whole shard in memory: the test is its clock, its clients, its peers and the executor of its spool's operations.
//!
//! Over 500 lines: that world, which the tests in `tests/` share, and what looks at a shard as a whole.

mod acknowledge;
mod ask;
mod automation;
mod body;
mod clock_steps;
mod expiry;
mod families;
mod gathering;
mod hosts;
mod in_doubt;
mod injection;
mod limits;
mod lookups;
mod moving;
mod openings;
mod operate;
mod progress;
mod receiving;
mod reload;
mod stalled_disk;
mod stop;
mod suspend;
mod unplaced;
mod unplumbed;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::record::{Fate, LogId, Sequence};
use postrider_spool::{Operation, Spool, SpoolOptions};
use tempfile::TempDir;

use super::{Action, ConnectError, Connected, Reservation, SessionKey, Shard, ShardOptions, TlsStarted};
use crate::accept::Policy;
use crate::admin::{Chosen, Inspected, MessageFilter, MessageRow};
use crate::config::{
    Chunking, Config, Credentials, DeliveryProtocol, DkimIdentity, DkimKeyPem, DomainPattern, Priority, RetryInterval,
    RetryRules, Route, RouteTarget, SmtpListener, Tenant, Terms, TlsMode,
};
use crate::deliver::dane::HostDane;
use crate::deliver::route::{Host, Site};
use crate::handover::{self, Ask, ControlMessage, RouteKey, ShardMessage, TlsRequirement, Told};
use crate::limits::{MemoryBounds, SERVER_IDLE_MAX, SESSION_CLOSE_MAX};
use crate::mail::endpoint::Endpoint;
use crate::mail::time::Now;
use crate::outcome::event::{Logged, LoggedRecord};
use crate::pool::connection::ConnectionKey;
use crate::pool::pair::OwnerState;
use crate::pool::suspension::Suspension;
use crate::progress::Suspect;

const CLIENT: &str = "EHLO client.example\r\nMAIL FROM:<a@client.example>\r\nRCPT TO:<b@peer.example>\r\nDATA\r\n";
const CONTENT: &str = "Subject: x\r\n\r\nHello\r\n.\r\n";

const START: Now = Now { monotonic: Duration::from_secs(1), wall_ms: 1_800_000_000_000 };

struct World {
    shard: Shard,
    now: Now,
    /// Operations that the test has not executed yet.
    operations: Vec<(LogId, Operation)>,
    /// What clients and peers were sent.
    to_client: String,
    to_peer: String,
    /// Pieces of input that were to be acknowledged at once.
    acknowledged: usize,
    connects: Vec<(ConnectionKey, Endpoint)>,
    /// The source of each connection that was begun.
    connect_sources: Vec<usize>,
    /// Routes that were asked for, and that the configuration does not tell.
    lookups: usize,
    /// Handshakes that are wanted.
    handshakes: Vec<(ConnectionKey, TlsRequirement)>,
    closed: Vec<ConnectionKey>,
    broken_off: Vec<ConnectionKey>,
    /// Clients whose connections are broken off.
    aborted: Vec<SessionKey>,
    /// What was let go to another shard.
    released: Option<Box<OwnerState>>,
    /// What the control thread was told.
    suspensions: Vec<Suspension>,
    events: Vec<LoggedRecord>,
    /// What the last question was answered.
    rows: Option<Vec<MessageRow>>,
    chosen: Option<Chosen>,
    inspected: Option<Option<Inspected>>,
    directory: TempDir,
    // Holds the lock of the spool's directory.
    _spool: Spool,
}

impl World {
    fn new() -> Self {
        Self::open(TempDir::new().unwrap(), START, Config::new("mta.example"))
    }

    fn open(directory: TempDir, now: Now, config: Config) -> Self {
        Self::open_with(directory, now, config, 1 << 20)
    }

    fn open_with(directory: TempDir, now: Now, config: Config, segment_bytes: u64) -> Self {
        Self::open_after(directory, now, config, segment_bytes, &[])
    }

    /// The last parameter: what earlier lives died over.
    fn open_after(directory: TempDir, now: Now, config: Config, segment_bytes: u64, quarantined: &[Suspect]) -> Self {
        let options = SpoolOptions { segment_bytes, ..SpoolOptions::default() };
        let spool = Spool::open(directory.path(), options).unwrap();
        Self::open_spool(directory, spool, now, config, quarantined)
    }

    fn open_spool(directory: TempDir, mut spool: Spool, now: Now, mut config: Config, quarantined: &[Suspect]) -> Self {
        let to = vec![RouteTarget::Address("127.0.0.1:25".parse().unwrap())];
        config.routes.push(Route { tls: Some(TlsMode::Disabled), ..Route::new(DomainPattern::Any, to) });
        let config = Arc::new(config);
        let policy = Arc::new(Policy::new(&config).unwrap());
        let logs = spool.assign(1).unwrap().remove(0);
        let metrics = Arc::default();
        let (progress, quarantined) = (crate::progress::in_memory(), quarantined.into());
        let options = ShardOptions {
            id: 0,
            shards: 1,
            config,
            policy,
            metrics,
            progress,
            quarantined,
            seed: 7,
            sockets_max: 100,
            memory: MemoryBounds::MOST,
        };
        let mut shard = Shard::new(options);
        for log in logs {
            shard.recover(log, Sequence(0), 7).unwrap();
        }
        Self {
            shard,
            now,
            operations: Vec::new(),
            to_client: String::new(),
            to_peer: String::new(),
            acknowledged: 0,
            connects: Vec::new(),
            connect_sources: Vec::new(),
            lookups: 0,
            handshakes: Vec::new(),
            closed: Vec::new(),
            broken_off: Vec::new(),
            aborted: Vec::new(),
            released: None,
            suspensions: Vec::new(),
            events: Vec::new(),
            rows: None,
            chosen: None,
            inspected: None,
            directory,
            _spool: spool,
        }
    }

    /// Turns until nothing more happens by itself.
    fn settle(&mut self) {
        loop {
            self.shard.turn(self.now);
            let mut acted = false;
            while let Some(action) = self.shard.poll_action() {
                acted = true;
                self.carry_out(action);
            }
            if !acted && !self.shard.has_more() {
                return;
            }
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::SessionSend { bytes, .. } => self.to_client.push_str(std::str::from_utf8(&bytes).unwrap()),
            Action::Spool { log, operation } => self.operations.push((log, operation)),
            Action::Connect { connection, source, to } => {
                self.connects.push((connection, to));
                self.connect_sources.push(source);
            }
            Action::ConnectionSend { connection, chunks } => {
                let octets: usize = chunks.iter().map(|chunk| chunk.as_ref().len()).sum();
                for chunk in &chunks {
                    self.to_peer.push_str(std::str::from_utf8(chunk.as_ref()).unwrap());
                }
                self.shard.connection_sent(self.now, connection, octets);
            }
            Action::ConnectionStartTls { connection, tls, .. } => self.handshakes.push((connection, tls)),
            Action::SessionAcknowledge { .. } | Action::ConnectionAcknowledge { .. } => self.acknowledged += 1,
            Action::ConnectionClose { connection } => self.closed.push(connection),
            Action::ConnectionAbort { connection } => self.broken_off.push(connection),
            Action::SessionAbort { session } => self.aborted.push(session),
            Action::Control(ControlMessage::Released { state, .. }) => self.released = state,
            Action::Control(ControlMessage::FindOwner { pair, .. }) => {
                self.shard.handle_message(ShardMessage::Owner { pair, owner: 0 });
            }
            Action::Control(ControlMessage::FindRoute { key, .. }) => {
                // Without a route the test answers.
                let Some(config) = self.shard.config.route_of(&key.domain, key.matched) else {
                    self.lookups += 1;
                    return;
                };
                let RouteTarget::Address(address) = config.to[0] else { return };
                let host = Host {
                    name: address.ip().to_string(),
                    preference: 0,
                    addresses: vec![address.into()],
                    dane: HostDane::default(),
                };
                let site = Site { name: address.to_string(), hosts: vec![host], expires: Duration::MAX };
                let route = handover::Route {
                    site: Arc::new(site),
                    tls: config.tls.unwrap_or(TlsMode::Opportunistic),
                    sts: None,
                    dane: true,
                    terms: Arc::default(),
                };
                self.shard.handle_message(ShardMessage::Routed { key, result: Ok(route) });
            }
            Action::Control(ControlMessage::Answer { told: Told::Messages(rows), .. }) => self.rows = Some(rows),
            Action::Control(ControlMessage::Answer { told: Told::Chosen(chosen), .. }) => self.chosen = Some(chosen),
            Action::Control(ControlMessage::Answer { told: Told::Inspected(found), .. }) => {
                self.inspected = Some(found.map(|found| *found));
            }
            Action::Control(ControlMessage::Suspend(suspension)) => self.suspensions.push(*suspension),
            Action::Reserve(Reservation { limit, units, .. }) => {
                self.shard.handle_message(ShardMessage::Reserved { limit, units });
            }
            Action::Events(mut records) => self.events.append(&mut records),
            _ => {}
        }
    }

    /// Executes what the spool wants done, and all that follows from it.
    fn sync(&mut self) {
        self.settle();
        while !self.operations.is_empty() {
            for (log, operation) in std::mem::take(&mut self.operations) {
                let completion = postrider_spool::execute(operation);
                self.shard.spool_completed(self.now, log, completion);
            }
            self.settle();
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now.monotonic += time;
        self.now.wall_ms += time.as_millis() as u64;
        self.sync();
    }

    /// Time goes by, and the disk does nothing.
    fn pass_unsynced(&mut self, time: Duration) {
        self.now.monotonic += time;
        self.now.wall_ms += time.as_millis() as u64;
        self.settle();
    }

    fn connect_client(&mut self) -> SessionKey {
        let client = "127.0.0.1:4000".parse().unwrap();
        let session = self.shard.open_session(self.now, &SmtpListener::default(), client).unwrap();
        self.settle();
        session
    }

    fn client_says(&mut self, session: SessionKey, text: &str) -> String {
        self.to_client.clear();
        self.shard.session_received(self.now, session, text.as_bytes());
        self.settle();
        std::mem::take(&mut self.to_client)
    }

    fn peer_says(&mut self, connection: ConnectionKey, text: &str) -> String {
        self.to_peer.clear();
        self.shard.connection_received(self.now, connection, text.as_bytes());
        self.settle();
        std::mem::take(&mut self.to_peer)
    }

    /// Accepts the connection that the shard wants to make, up to the end of its EHLO.
    fn accept_connection(&mut self) -> ConnectionKey {
        let (connection, peer) = self.connects.pop().expect("a connection is wanted");
        let made = Connected { local: "127.0.0.1:5000".parse().ok(), peer };
        self.shard.connected(self.now, connection, made);
        assert_eq!(self.peer_says(connection, "220 peer.example\r\n"), "EHLO mta.example\r\n");
        connection
    }

    fn ask(&mut self, filter: MessageFilter) {
        self.shard.handle_message(ShardMessage::Ask { question: 1, ask: Box::new(Ask::Messages { filter }) });
        self.settle();
    }

    /// Every recipient's, in the order of their records.
    fn fates(&self) -> Vec<Fate> {
        let outcomes = self.events.iter().filter_map(|event| match &event.record {
            Logged::Outcome(outcome) => Some(outcome),
            _ => None,
        });
        outcomes.flat_map(|outcome| outcome.results.iter().map(|result| result.fate)).collect()
    }

    /// A peer that offers STARTTLS, up to the end of the handshake, which ends as told.
    fn accept_tls(&mut self, certificate_is_good: bool) -> ConnectionKey {
        let connection = self.accept_connection();
        assert_eq!(self.peer_says(connection, "250-peer.example\r\n250 STARTTLS\r\n"), "STARTTLS\r\n");
        self.peer_says(connection, "220 go\r\n");
        let (wanted, requirement) = self.handshakes.pop().expect("a handshake is wanted");
        assert_eq!(wanted, connection);
        let verified = requirement == TlsRequirement::Verified;
        self.to_peer.clear();
        if verified && !certificate_is_good {
            self.shard.connection_tls(self.now, connection, Err("UnknownIssuer".to_owned().into()));
            self.shard.connection_gone(self.now, connection);
        } else {
            self.shard.connection_tls(self.now, connection, Ok(TlsStarted::default()));
        }
        self.settle();
        connection
    }

    /// Takes the message whose envelope was just sent. Returns what follows.
    fn take_message(&mut self, connection: ConnectionKey) -> String {
        self.peer_says(connection, "250 ok\r\n");
        self.peer_says(connection, "250 ok\r\n");
        assert!(self.peer_says(connection, "354 go\r\n").ends_with("\r\n.\r\n"));
        self.peer_says(connection, "250 taken\r\n")
    }

    fn outcomes(&self) -> usize {
        self.events.iter().filter(|event| matches!(event.record, Logged::Outcome(_))).count()
    }
}

fn accepted(world: &mut World) {
    accepted_for(world, "peer.example");
}

fn accepted_for(world: &mut World, domain: &str) {
    let session = world.connect_client();
    world.client_says(session, &CLIENT.replace("peer.example", domain));
    world.client_says(session, CONTENT);
    world.sync();
    assert!(world.to_client.starts_with("250 2.0.0 OK id="), "{}", world.to_client);
}

/// Events name a client's session by its number: the same after a start would make two sessions one.
#[test]
fn sessions_are_numbered_anew_after_a_start() {
    let numbered = |seed| -> Vec<u64> {
        let first = super::accept::first_session(seed);
        (1..100).map(|number| first.wrapping_add(number)).collect()
    };
    let (before, after) = (numbered(1), numbered(2));
    assert!(before.iter().all(|number| !after.contains(number)));
    let mut world = World::new();
    let session = world.connect_client();
    assert_ne!(session.0, 1, "it is what events say");
}

/// An attempt is counted once MAIL was written: not where a message is too large for what the peer says first.
#[test]
fn a_refusal_of_our_own_is_no_attempt() {
    let mut world = World::new();
    accepted(&mut world);
    let peer = world.accept_connection();
    let said = world.peer_says(peer, "250-peer.example\r\n250 SIZE 10\r\n");
    assert!(!said.contains("MAIL"), "{said}");
    world.pass(Duration::from_millis(10));
    let Some(Logged::Outcome(outcome)) = world.events.last().map(|event| &event.record) else { panic!("an outcome") };
    assert_eq!((outcome.results[0].fate, outcome.results[0].attempts), (Fate::Bounced, 0));
}

/// Tenant, provider, site: each key that the later one has stands in for the one before.
#[test]
fn a_sites_retries_stand_over_its_providers() {
    let rules = "hostname = \"mta.example\"\n[spool]\nallow_filesystem = true\n[retry]\nretry_interval = [\"1m\"]\n\
                 [provider.p]\nmatch = [{ domain = \"peer.example\" }, { domain = \"other.example\" }]\n\
                 retry = { retry_interval = [\"7m\"] }\n";
    let site = "[shaping.\"peer.example\"]\nmx_rollup = false\nretry = { retry_interval = [\"9m\"] }\n";
    for (rules, minutes) in [(rules.to_owned(), 7), (format!("{rules}{site}"), 9)] {
        let config = Config::from_toml(&rules, "t.toml", std::path::Path::new("/nonexistent")).unwrap();
        let mut world = World::open(TempDir::new().unwrap(), START, config);
        accepted(&mut world);
        accepted_for(&mut world, "third.example");
        for _ in 0..2 {
            let peer = world.accept_connection();
            world.peer_says(peer, "250 peer.example\r\n");
            world.peer_says(peer, "451 later\r\n");
        }
        world.pass(Duration::from_secs(1));
        let minutes_until = |fate: Fate| match fate {
            Fate::Deferred { due_ms } => (due_ms - START.wall_ms) / 60_000,
            other => panic!("{other:?}"),
        };
        let mut due: Vec<u64> = world.fates().into_iter().map(minutes_until).collect();
        due.sort_unstable();
        assert_eq!(due, [1, minutes]);
    }
}

/// Whatever a client is refused, by whichever command, and a session's end by our 421.
#[test]
fn refusals_are_counted() {
    let mut world = World::new();
    let count = |world: &World| world.shard.metrics.rejections.get();
    let session = world.connect_client();
    world.client_says(session, "FOO\r\nMAIL FROM:<a@b.example>\r\n");
    assert_eq!(count(&world), 2, "neither is known or in order");
    world.client_says(session, "EHLO c\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<@>\r\nRCPT TO:<a@b.example>\r\nDATA\r\n");
    assert_eq!(count(&world), 3);
    world.client_says(session, "Subject: \0\r\n\r\n.\r\n");
    assert_eq!(count(&world), 4, "by the session");
    world.client_says(session, "MAIL FROM:<a@b.example>\r\nRCPT TO:<a@b.example>\r\nDATA\r\n");
    world.client_says(session, &format!("{}\r\n.\r\n", "Received: x\r\n".repeat(101)));
    assert!(world.to_client.is_empty() && count(&world) == 5, "by policy: {}", count(&world));
    accepted(&mut world);
    assert_eq!(count(&world), 5);
    world.pass(Duration::from_secs(600));
    assert_eq!(count(&world), 7, "both sessions were idle for too long");
}

/// A client that does not even read our 421 would keep its place among the sessions.
#[test]
fn a_client_that_does_not_close_is_cut_off() {
    let mut world = World::new();
    let session = world.connect_client();
    world.pass(SERVER_IDLE_MAX);
    assert!(world.to_client.contains("421 4.4.2"), "{}", world.to_client);
    world.pass(SESSION_CLOSE_MAX - Duration::from_secs(1));
    assert_eq!(world.aborted, []);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.aborted.first(), Some(&session));
}

/// From MAIL to the answer, on either side; and how old a message was when it was delivered.
#[test]
fn what_took_how_long_is_counted_on_its_own_side() {
    let mut world = World::new();
    let session = world.connect_client();
    world.pass(Duration::from_secs(7));
    world.client_says(session, "EHLO c\r\nMAIL FROM:<a@b.example>\r\nRSET\r\n");
    world.pass(Duration::from_secs(5));
    // From its MAIL on, whatever else it says meanwhile.
    let (mail, rest) = CLIENT.split_at(CLIENT.find("RCPT").unwrap());
    world.client_says(session, mail);
    world.pass(Duration::from_secs(1));
    world.client_says(session, rest);
    world.pass(Duration::from_secs(1));
    world.client_says(session, CONTENT);
    world.sync();
    let metrics = Arc::clone(&world.shard.metrics);
    assert_eq!(metrics.transaction_duration_s.count_and_sum(), (1, 2.0));
    world.pass(Duration::from_secs(4));
    let peer = world.accept_connection();
    world.peer_says(peer, "250-peer.example\r\n250-PIPELINING\r\n250 8BITMIME\r\n");
    world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
    world.pass(Duration::from_secs(3));
    world.peer_says(peer, "250 taken\r\n");
    assert_eq!(metrics.delivery_duration_s.count_and_sum(), (1, 3.0));
    assert_eq!(metrics.delivered_age_s.count_and_sum(), (1, 7.0));
    assert_eq!(metrics.transaction_duration_s.count_and_sum(), (1, 2.0));
}

/// What hangs in its socket would hold the slot for as long as the peer likes.
#[test]
fn a_peer_that_falls_silent_is_broken_off() {
    let mut world = World::new();
    accepted(&mut world);
    let peer = world.accept_connection();
    assert!(world.peer_says(peer, "250 peer.example\r\n").starts_with("MAIL FROM:"));
    // RFC 5321 §4.5.3.2.2.
    world.pass(Duration::from_secs(299));
    assert!(world.broken_off.is_empty());
    world.pass(Duration::from_secs(2));
    assert_eq!(world.broken_off, [peer]);
}

/// What is scheduled is not due yet; both gauges count recipients, and each of them once.
#[test]
fn gauges_count_recipients_that_wait_for_a_time_and_those_that_are_due() {
    let mut world = World::new();
    let session = world.connect_client();
    let two = "RCPT TO:<b@peer.example>\r\nRCPT TO:<c@peer.example>\r\n";
    world.client_says(session, &CLIENT.replace("RCPT TO:<b@peer.example>\r\n", two));
    world.client_says(session, CONTENT);
    world.sync();
    let metrics = Arc::clone(&world.shard.metrics);
    let gauges = || (metrics.scheduled.get(), metrics.ready.get());
    world.pass(Duration::from_secs(1));
    assert_eq!(gauges(), (0, 2), "they wait for a connection");
    let peer = world.accept_connection();
    world.peer_says(peer, "250-peer.example\r\n250-PIPELINING\r\n250 8BITMIME\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(gauges(), (0, 2), "they are being tried");
    world.peer_says(peer, "250 ok\r\n250 ok\r\n451 later\r\n354 go\r\n");
    world.peer_says(peer, "250 taken\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(gauges(), (1, 0), "one is delivered, one waits for its retry");
}

/// ACK-AFTER-SYNC: neither the answer, nor an attempt, nor an event comes before the commit's completion.
#[test]
fn nothing_is_said_or_done_before_the_commit() {
    let mut world = World::new();
    let session = world.connect_client();
    assert!(world.client_says(session, CLIENT).ends_with("\r\n"));
    assert_eq!(world.client_says(session, CONTENT), "");
    assert!(!world.operations.is_empty(), "the commit was begun");
    assert!(world.connects.is_empty() && world.events.is_empty());
    world.sync();
    assert!(world.to_client.starts_with("250 2.0.0 OK id="), "{}", world.to_client);
    assert_eq!((world.connects.len(), world.events.len()), (1, 1));
}

/// A deadline that is over while an operation runs would keep the thread from parking, and the ring from submitting.
#[test]
fn nothing_is_overdue_while_a_commit_runs() {
    let mut world = World::new();
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.client_says(session, CONTENT);
    let other = world.connect_client();
    world.client_says(other, CLIENT);
    world.client_says(other, CONTENT);
    for _ in 0..1_000 {
        world.now.monotonic += Duration::from_millis(100);
        world.now.wall_ms += 100;
        world.settle();
        let next = world.shard.next_timeout(world.now);
        assert!(next > world.now.monotonic, "{next:?} is over at {:?}", world.now.monotonic);
    }
}

#[test]
fn a_message_is_delivered_and_recorded_once() {
    let mut world = World::new();
    accepted(&mut world);
    let peer = world.accept_connection();
    let envelope = world.peer_says(peer, "250-peer.example\r\n250-PIPELINING\r\n250 8BITMIME\r\n");
    assert!(envelope.starts_with("MAIL FROM:<a@client.example>"), "{envelope}");
    assert!(envelope.ends_with("RCPT TO:<b@peer.example>\r\nDATA\r\n"), "{envelope}");
    let content = world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
    assert!(content.starts_with("Received: ") && content.ends_with("\r\n\r\nHello\r\n.\r\n"), "{content}");
    world.peer_says(peer, "250 taken\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.outcomes(), 1);
    let Some(Logged::Outcome(outcome)) = world.events.last().map(|event| &event.record) else { panic!("an outcome") };
    assert_ne!(outcome.session_id, 0, "its event names the session");
    let rates: Vec<f64> = world.shard.home.queues().map(|queue| queue.rate_per_s).collect();
    assert!(rates.len() == 1 && rates[0] > 0.0, "{rates:?}");
    assert_eq!(world.shard.home.len(), 0);
    world.pass(Duration::from_secs(3600));
    assert_eq!(world.outcomes(), 1, "and it stays at one");
}

/// A world with one connection, whose peer has said what it offers.
fn with_peer(chunking: Chunking, offers: &str, messages: usize) -> (World, ConnectionKey, String) {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    config.shaping.chunking = chunking;
    config.shaping.max_in_flight = 3;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for _ in 0..messages {
        accepted(&mut world);
    }
    let peer = world.accept_connection();
    let said = world.peer_says(peer, offers);
    (world, peer, said)
}

const ENVELOPE: &str = "MAIL FROM:<a@client.example>\r\nRCPT TO:<b@peer.example>\r\n";
const CHUNKING: &str = "250-peer.example\r\n250-CHUNKING\r\n250 PIPELINING\r\n";
const WHOLE: Chunking = Chunking::BackToBack;
const ALL_TAKEN: &str = "250 mail\r\n250 rcpt\r\n250 taken\r\n";

/// The next envelope goes out with the content, RSET first, in one write, and each message has its own outcome.
#[test]
fn the_next_message_rides_behind_the_content() {
    let (mut world, peer, said) = with_peer(Chunking::On, "250-peer.example\r\n250 PIPELINING\r\n", 3);
    assert_eq!(said, format!("{ENVELOPE}DATA\r\n"));
    let riding = format!("\r\nHello\r\n.\r\nRSET\r\n{ENVELOPE}DATA\r\n");
    let said = world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
    assert!(said.ends_with(&riding), "{said}");
    assert_eq!(world.peer_says(peer, "250 first\r\n250 reset\r\n250 ok\r\n"), "");
    let said = world.peer_says(peer, "250 ok\r\n354 go\r\n");
    assert!(said.ends_with(&riding), "{said}");
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), world.shard.home.len()), (1, 2), "only the first is answered");
    let said = world.peer_says(peer, "250 second\r\n250 reset\r\n550 5.7.1 no\r\n503 no\r\n503 no\r\n");
    assert_eq!(said, "", "no content behind a refused MAIL");
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), world.shard.home.len()), (3, 0));
    let fates: Vec<Fate> = world.fates();
    assert_eq!(fates, [Fate::Delivered, Fate::Delivered, Fate::Bounced]);
}

/// A transaction rides only within the connection's quota of deliveries, and within its peer's MAILMAX (RFC 9422 §4).
#[test]
fn nothing_rides_beyond_the_deliveries_of_a_connection() {
    for (deliveries_max, limits) in [(2, ""), (100, "250-LIMITS MAILMAX=2\r\n")] {
        let mut config = Config::new("mta.example");
        config.shaping.connection_limit = 1;
        config.shaping.max_deliveries_per_connection = deliveries_max;
        config.shaping.chunking = WHOLE;
        let mut world = World::open(TempDir::new().unwrap(), START, config);
        (0..3).for_each(|_| accepted(&mut world));
        let peer = world.accept_connection();
        let said = world.peer_says(peer, &CHUNKING.replace("250 ", &format!("{limits}250 ")));
        assert_eq!(said.matches("MAIL FROM").count(), 2, "{said}");
        let said = world.peer_says(peer, &format!("{ALL_TAKEN}250 reset\r\n{ALL_TAKEN}"));
        assert_eq!(said, "QUIT\r\n");
    }
}

/// RFC 9422 §4: where nothing rides, too; the next message gets a connection of its own.
#[test]
fn a_connection_with_as_many_deliveries_as_its_peer_takes_is_ended() {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    accepted(&mut world);
    for _ in 0..2 {
        let peer = world.accept_connection();
        let said = world.peer_says(peer, "250-peer.example\r\n250 LIMITS MAILMAX=1\r\n");
        assert_eq!(said, "MAIL FROM:<a@client.example>\r\n");
        assert_eq!(world.take_message(peer), "");
        accepted(&mut world);
        assert_eq!(world.to_peer, "QUIT\r\n");
        world.shard.connection_gone(world.now, peer);
        world.settle();
    }
}

#[test]
fn whole_transactions_are_in_flight_up_to_their_limit() {
    let (mut world, peer, said) = with_peer(WHOLE, CHUNKING, 5);
    assert_eq!(said.matches(ENVELOPE).count(), 3, "{said}");
    assert_eq!((said.matches("BDAT ").count(), said.matches("RSET\r\n").count()), (3, 2), "{said}");
    let said = world.peer_says(peer, ALL_TAKEN);
    assert!(said.starts_with(&format!("RSET\r\n{ENVELOPE}BDAT ")), "one answered, one more begun: {said}");
    let said = world.peer_says(peer, &format!("250 reset\r\n{ALL_TAKEN}").repeat(3));
    assert!(said.starts_with(&format!("{ENVELOPE}BDAT ")), "all are answered, the last is begun: {said}");
    world.peer_says(peer, ALL_TAKEN);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), world.shard.home.len()), (5, 0));
    assert_eq!(world.fates(), [Fate::Delivered; 5]);
}

/// The message may have left under another's envelope: held until it expires, and nothing rides at that site for a day.
#[test]
fn a_foreign_envelope_is_held_and_ends_riding_for_a_day() {
    let (mut world, peer, _) = with_peer(WHOLE, CHUNKING, 2);
    world.peer_says(peer, ALL_TAKEN);
    let said = world.peer_says(peer, "250 reset\r\n503 sender already given\r\n250 rcpt\r\n250 taken\r\n");
    assert_eq!((said.as_str(), world.closed.as_slice()), ("", &[peer][..]));
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_secs(1));
    assert!(matches!(world.fates()[..], [Fate::Delivered, Fate::Deferred { .. }]), "{:?}", world.fates());
    let state = |world: &World| {
        let (_, entry) = world.shard.home.entries().next().expect("it is held");
        (entry.due_ms, entry.expires_ms, entry.last_answer.map(str::to_owned))
    };
    let (due_ms, expires_ms, answer) = state(&world);
    assert_eq!(due_ms, expires_ms, "never sent again by itself");
    assert!(answer.is_some_and(|answer| answer.contains("another envelope")));
    (0..2).for_each(|_| accepted(&mut world));
    let peer = world.accept_connection();
    assert_eq!(world.peer_says(peer, CHUNKING), format!("{ENVELOPE}DATA\r\n"), "one step after the other");
    let said = world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
    assert!(said.ends_with("\r\nHello\r\n.\r\n"), "nothing rides: {said}");
    world.peer_says(peer, "250 ok\r\n");
    world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
    world.peer_says(peer, "250 ok\r\n");
    world.pass(crate::limits::DISTRUST);
    world.shard.connection_closed(world.now, peer, "gone");
    world.settle();
    world.shard.connection_gone(world.now, peer);
    (0..2).for_each(|_| accepted(&mut world));
    let peer = world.accept_connection();
    let said = world.peer_says(peer, CHUNKING);
    assert_eq!(said.matches("BDAT ").count(), 2, "a day later it is trusted again: {said}");
}

/// Lost with whole transactions in flight: all are in doubt, sent again and counted; then one at a time for a day.
#[test]
fn a_loss_in_flight_is_in_doubt_and_ends_whole_transactions_for_a_day() {
    let (mut world, peer, _) = with_peer(WHOLE, CHUNKING, 2);
    world.shard.connection_closed(world.now, peer, "reset");
    world.settle();
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.metrics.possible_duplicates.get(), 2);
    assert!(world.shard.home.entries().all(|(_, entry)| entry.attempts == 1 && entry.due_ms < entry.expires_ms));
    accepted(&mut world);
    world.pass(Duration::from_secs(3_600));
    let peer = world.accept_connection();
    assert_eq!(world.peer_says(peer, CHUNKING), ENVELOPE, "content waits for its recipient");
    let said = world.peer_says(peer, "250 ok\r\n250 ok\r\n");
    assert!(said.starts_with("BDAT ") && said.ends_with(&format!("RSET\r\n{ENVELOPE}")), "{said}");
}

/// After a 421 what is behind goes back at once, and counts no attempt.
#[test]
fn after_a_421_what_was_in_flight_goes_back_at_once() {
    let (mut world, peer, _) = with_peer(WHOLE, CHUNKING, 3);
    world.peer_says(peer, &format!("{ALL_TAKEN}250 reset\r\n421 4.3.2 closing\r\n"));
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_millis(100));
    assert_eq!(world.fates(), [Fate::Delivered]);
    assert!(world.shard.home.entries().all(|(_, entry)| entry.attempts == 0), "no attempt is counted");
    assert_eq!(world.shard.metrics.possible_duplicates.get(), 0);
    let unrecorded = crate::progress::Progress::unrecorded([&**world.shard.progress]);
    assert_eq!(unrecorded, 0, "what was sent in vain is nothing that a kill would repeat");
    let peer = world.accept_connection();
    let said = world.peer_says(peer, CHUNKING);
    assert_eq!(said.matches("BDAT ").count(), 2, "a 421 is no reason to trust it less: {said}");
}

fn to_peer(terms: Terms) -> Route {
    let to = vec![RouteTarget::Address("127.0.0.1:24".parse().unwrap())];
    Route { tls: Some(TlsMode::Disabled), terms: Arc::new(terms), ..Route::new(DomainPattern::Any, to) }
}

fn routed(route: Route) -> World {
    let mut config = Config::new("mta.example");
    config.routes = vec![route];
    World::open(TempDir::new().unwrap(), START, config)
}

/// RFC 2033 §4.2: each recipient has its own reply to the content, and its own fate.
#[test]
fn an_lmtp_route_settles_each_recipient_by_its_own_reply() {
    let mut world = routed(to_peer(Terms { protocol: DeliveryProtocol::Lmtp, ..Terms::default() }));
    let session = world.connect_client();
    let two = "RCPT TO:<b@peer.example>\r\nRCPT TO:<c@peer.example>\r\n";
    world.client_says(session, &CLIENT.replace("RCPT TO:<b@peer.example>\r\n", two));
    world.client_says(session, CONTENT);
    world.sync();
    let (connection, peer) = world.connects.pop().expect("a connection is wanted");
    world.shard.connected(world.now, connection, Connected { local: "127.0.0.1:5000".parse().ok(), peer });
    assert_eq!(world.peer_says(connection, "220 lmtp.example\r\n"), "LHLO mta.example\r\n");
    world.peer_says(connection, "250-lmtp.example\r\n250 PIPELINING\r\n");
    world.peer_says(connection, "250 ok\r\n250 ok\r\n250 ok\r\n354 go\r\n");
    world.peer_says(connection, "250 stored\r\n452 4.2.2 full\r\n");
    world.pass(Duration::from_secs(1));
    assert!(matches!(world.fates()[..], [Fate::Delivered, Fate::Deferred { .. }]), "{:?}", world.fates());
    let Some(Logged::Outcome(outcome)) = world.events.last().map(|event| &event.record) else { panic!("an outcome") };
    assert_eq!(outcome.delivery_protocol, "LMTP");
}

/// A password that the smarthost refuses is nobody's mail's fault: the host is blocked, and no attempt is counted.
#[test]
fn refused_credentials_block_the_host_and_count_no_attempt() {
    let (username, password) = ("user".to_owned(), "pass".to_owned());
    let auth = Some(Credentials { username, password, without_tls: true });
    let mut world = routed(to_peer(Terms { auth, ..Terms::default() }));
    accepted(&mut world);
    let peer = world.accept_connection();
    let said = world.peer_says(peer, "250-smart.example\r\n250 AUTH PLAIN\r\n");
    assert_eq!(said, "AUTH PLAIN AHVzZXIAcGFzcw==\r\n");
    world.peer_says(peer, "535 5.7.8 wrong\r\n");
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.outcomes(), 0);
    let (key, entry) = world.shard.home.entries().next().expect("it waits");
    assert_eq!(entry.attempts, 0);
    let blocked = world.shard.home.blocked_by(key).expect("it is blocked").clone();
    assert!(blocked.reason.contains("535 5.7.8 wrong"), "{blocked:?}");
    assert!(!format!("{blocked:?}").contains("AHVz"), "what was said of us is not told");
    world.pass(Duration::from_millis(blocked.until_ms - world.now.wall_ms));
    let peer = world.accept_connection();
    world.peer_says(peer, "250-smart.example\r\n250 AUTH PLAIN\r\n");
    let said = world.peer_says(peer, "235 2.7.0 welcome\r\n");
    assert_eq!(said, "MAIL FROM:<a@client.example>\r\n");
}

/// Two routes to one host: what was said of us on a connection for one is not used for the other's mail.
#[test]
fn a_connection_serves_routes_with_its_own_terms_only() {
    let (username, password) = ("user".to_owned(), "pass".to_owned());
    let auth = Some(Credentials { username, password, without_tls: true });
    let to_peer_of = |domain: &str, terms| Route { domain: DomainPattern::Exact(domain.to_owned()), ..to_peer(terms) };
    let mut config = Config::new("mta.example");
    config.routes = vec![
        to_peer_of("peer.example", Terms { auth, ..Terms::default() }),
        to_peer_of("other.example", Terms::default()),
    ];
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    accepted(&mut world);
    let first = world.accept_connection();
    world.peer_says(first, "250-smart.example\r\n250 AUTH PLAIN\r\n");
    world.peer_says(first, "235 welcome\r\n");
    world.peer_says(first, "450 no\r\n");
    world.pass(Duration::from_secs(1));
    let session = world.connect_client();
    world.client_says(session, &CLIENT.replace("peer.example", "other.example"));
    world.client_says(session, CONTENT);
    world.sync();
    assert!(!world.to_peer.contains("MAIL"), "not on the idle connection");
    let second = world.accept_connection();
    let said = world.peer_says(second, "250-smart.example\r\n250 AUTH PLAIN\r\n");
    assert_eq!(said, "MAIL FROM:<a@client.example>\r\n", "on one of its own, without AUTH");
}

/// What the route says of its peer stands over what shaping says of all.
#[test]
fn a_route_says_how_content_goes_to_its_peer() {
    let mut world = routed(to_peer(Terms { chunking: Some(Chunking::Off), ..Terms::default() }));
    accepted(&mut world);
    let peer = world.accept_connection();
    let said = world.peer_says(peer, "250-peer.example\r\n250-PIPELINING\r\n250 CHUNKING\r\n");
    assert!(said.ends_with("DATA\r\n"), "{said}");
}

/// A dry run: nothing is connected to, and the outcome says so.
#[test]
fn what_a_route_discards_counts_as_delivered_and_says_so() {
    let mut world = routed(Route::new(DomainPattern::Any, vec![RouteTarget::Discard]));
    accepted(&mut world);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.fates().as_slice(), world.connects.len()), (&[Fate::Delivered][..], 0));
    assert_eq!(world.shard.home.len(), 0);
    let Some(Logged::Outcome(outcome)) = world.events.last().map(|event| &event.record) else { panic!("an outcome") };
    assert_eq!((outcome.site.as_str(), outcome.results[0].recipient.as_str()), ("discard", "b@peer.example"));
    assert_eq!(outcome.results[0].answer.text, "discarded as its route says; nothing was sent");
}

/// New connections are shared among the targets of a balanced route, where else the first takes all.
#[test]
fn a_balanced_route_shares_its_connections() {
    let first = |balance| {
        let to = (1..=4).map(|host| RouteTarget::Address(SocketAddr::from(([127, 0, 0, host], 25)))).collect();
        let mut world = routed(Route { balance, tls: Some(TlsMode::Disabled), ..Route::new(DomainPattern::Any, to) });
        for _ in 0..10 {
            accepted(&mut world);
        }
        assert_eq!(world.connects.len(), 10);
        let hosts: std::collections::BTreeSet<Endpoint> = world.connects.iter().map(|(_, to)| *to).collect();
        hosts.len()
    };
    assert_eq!(first(false), 1);
    assert!(first(true) >= 3, "{}", first(true));
}

/// EXACT-RETRY-STATE: attempts and due time are the same after a restart, to the millisecond.
#[test]
fn a_deferred_message_is_due_at_the_same_time_after_a_restart() {
    let mut world = World::new();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "250 ok\r\n");
    world.peer_says(peer, "451 4.2.1 not now\r\n");
    world.pass(Duration::from_secs(1));
    let state = |shard: &Shard| {
        let (_, entry) = shard.home.entries().next().expect("it waits");
        (entry.message, entry.attempts, entry.due_ms, entry.last_answer.map(str::to_owned))
    };
    let before = state(&world.shard);
    assert_eq!((before.1, before.3.as_deref()), (1, Some("451 4.2.1 not now")));
    assert!(before.2 > world.now.wall_ms);

    let World { directory, now, shard, _spool, .. } = world;
    drop((shard, _spool));
    let mut world = World::open(directory, now, Config::new("mta.example"));
    assert_eq!(state(&world.shard), before);
    world.settle();
    assert!(world.connects.is_empty(), "not before its time");
    let wait = Duration::from_millis(before.2 - now.wall_ms);
    world.pass(wait - Duration::from_millis(1));
    assert!(world.connects.is_empty(), "not a millisecond before its time");
    world.pass(Duration::from_millis(1));
    assert_eq!(world.connects.len(), 1);
    assert!(world.directory.path().exists());
}

/// What is past its expiry is never begun, neither when it comes due nor when its turn comes: not even before the next
/// sweep.
#[test]
fn an_expired_message_is_not_begun() {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let times = |from: u32, to: u32| {
        let time = |ms: u32| format!("2027-01-15T08:00:00.{ms:03}Z");
        format!("X-Schedule: {{\"first_attempt\":\"{}\",\"expires\":\"{}\"}}\r\n", time(from), time(to))
    };
    let send = |world: &mut World, schedule: &str| {
        let session = world.connect_client();
        world.client_says(session, CLIENT);
        world.client_says(session, &format!("{schedule}{CONTENT}"));
        world.sync();
        assert!(world.to_client.starts_with("250 2.0.0 OK id="), "{}", world.to_client);
        world.shard.session_closed(session);
    };
    for _ in 0..8 {
        send(&mut world, &times(0, 600));
    }
    let (out, waiting) = (world.shard.home.out(), world.shard.home.ready());
    assert!(out > 0 && waiting > 0, "{out} are out, {waiting} wait for their turn");
    send(&mut world, &times(500, 650));
    world.now = Now { monotonic: START.monotonic + Duration::from_millis(700), wall_ms: START.wall_ms + 700 };
    assert!(world.shard.next_sweep > world.now.monotonic, "the sweep is still to come");
    let home = &world.shard.home;
    let ready = home.entries().find_map(|(key, _)| Some((home.pair_of(key)?.clone(), home.queue_of(key).flow.clone())));
    let (pair, flow) = ready.expect("some are ready");
    world.shard.handle_message(ShardMessage::Credits { pair, flow: Some(flow), credits: 20 });
    world.settle();
    assert_eq!((world.shard.home.out(), world.shard.home.len() as u64), (out, out), "only what is out is left");
    world.pass(Duration::from_millis(10));
    let expired = |event: &&LoggedRecord| match &event.record {
        Logged::Outcome(outcome) => outcome.results[0].fate == Fate::Expired,
        _ => false,
    };
    assert_eq!(world.events.iter().filter(expired).count(), waiting + 1);
}

/// `[tenant.retry]` holds for the tenant's messages alone, and as exactly.
#[test]
fn a_tenants_message_is_retried_after_its_own_interval() {
    let mut config = Config::new("mta.example");
    let retry = RetryRules {
        interval: Some(RetryInterval::Listed(vec![Duration::from_secs(7)])),
        max_age: Some(Duration::from_secs(20)),
        ..RetryRules::default()
    };
    config.tenants = vec![Tenant {
        name: "acme".to_owned(),
        egress_pool: "default".to_owned(),
        domains: vec!["client.example".to_owned()],
        priority: Priority::High,
        max_message_rate: None,
        max_injection_rate: None,
        retry,
    }];
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    accepted(&mut world);
    let began_ms = world.now.wall_ms;
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "250 ok\r\n");
    world.peer_says(peer, "451 4.2.1 not now\r\n");
    let (key, entry) = world.shard.home.entries().next().expect("it waits");
    assert_eq!((entry.due_ms - began_ms, entry.expires_ms - began_ms), (7_000, 20_000));
    let queue = world.shard.home.queue_of(key);
    assert_eq!((&*queue.name, &*queue.tenant, queue.priority), ("acme@peer.example", "acme", 0));
}

/// Ready RSA signatures in a row would hold up commits and replies: a turn makes a few, and the rest wait.
#[test]
fn a_turn_signs_a_few_messages_only() {
    let key = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
    let der = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&key).unwrap();
    let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, der.as_ref());
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n");
    let key = Arc::new(DkimKeyPem::from_pem("rsa.pem".into(), pem).unwrap());
    let (domain, selector) = ("client.example".to_owned(), "s1".to_owned());
    let mut config = Config::new("mta.example");
    config.dkim = vec![DkimIdentity { domain, selector, key, sign_for: vec!["*".to_owned()], headers: Vec::new() }];
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let sessions: Vec<SessionKey> = (0..10).map(|_| world.connect_client()).collect();
    for &session in &sessions {
        world.client_says(session, CLIENT);
    }
    for &session in &sessions {
        world.shard.session_received(world.now, session, CONTENT.as_bytes());
    }
    let mut waiting = vec![world.shard.signing.len()];
    while world.shard.has_more() {
        world.shard.turn(world.now);
        waiting.push(world.shard.signing.len());
    }
    assert_eq!(waiting, [10, 6, 2, 0]);
    world.sync();
    assert_eq!(world.to_client.matches("250 2.0.0 OK id=").count(), 10);
}

/// Those that are made at once count like those that wait for their turn.
#[test]
fn every_signature_is_counted() {
    use crate::accept::dkim_sign::tests::identity;
    for (kinds, expected) in [(&[false][..], (0, 1)), (&[true], (1, 0)), (&[true, false, false], (1, 2)), (&[], (0, 0))]
    {
        let mut config = Config::new("mta.example");
        let signer = |(place, rsa): (usize, &bool)| identity("client.example", &format!("s{place}"), *rsa, &["*"]);
        config.dkim = kinds.iter().enumerate().map(signer).collect();
        let mut world = World::open(TempDir::new().unwrap(), START, config);
        accepted(&mut world);
        let metrics = &world.shard.metrics;
        assert_eq!((metrics.signatures_rsa.get(), metrics.signatures_ed25519.get()), expected, "{kinds:?}");
    }
}

/// LIMITS-HOLD: a connection counts from its SYN until the peer's FIN was seen, whatever became of it.
#[test]
fn connections_never_exceed_their_limit() {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 2;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for _ in 0..10 {
        accepted(&mut world);
    }
    assert_eq!(world.connects.len(), 2, "ten messages wait, two connections are begun");
    let first = world.accept_connection();
    world.peer_says(first, "250 peer.example\r\n");
    assert_eq!(world.connects.len(), 1);
    world.shard.connection_closed(world.now, first, "reset");
    world.settle();
    assert_eq!(world.closed, [first]);
    assert_eq!(world.connects.len(), 1, "the peer may still count the closed one");
    world.shard.connection_gone(world.now, first);
    world.pass(Duration::from_secs(60));
    assert_eq!(world.connects.len(), 2, "now there is room for one");
}

/// One MX set for a domain whose mail wants a good certificate, and one whose mail takes any.
fn two_domains() -> World {
    two_domains_by(1)
}

fn two_domains_by(connections: u32) -> World {
    let to = vec![RouteTarget::Address("127.0.0.1:25".parse().unwrap())];
    let route = |domain: &str, tls| {
        let domain = DomainPattern::Exact(domain.to_owned());
        Route { tls: Some(tls), ..Route::new(domain, to.clone()) }
    };
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = connections;
    config.routes = vec![route("strict.example", TlsMode::Verified), route("plain.example", TlsMode::Opportunistic)];
    World::open(TempDir::new().unwrap(), START, config)
}

fn held(world: &World) -> Vec<(String, u32, String)> {
    let entries = world.shard.home.entries();
    let held = entries.map(|(key, entry)| {
        let reason = world.shard.home.blocked_by(key).map(|blocked| blocked.reason.to_string());
        (world.shard.home.queue_of(key).domain.to_string(), entry.attempts, reason.unwrap_or_default())
    });
    held.collect()
}

fn assert_only_the_strict_one_waits(world: &World) {
    let held = held(world);
    assert!(held.iter().all(|(domain, attempts, _)| domain == "strict.example" && *attempts == 0), "{held:?}");
    assert!(held.iter().all(|(_, _, reason)| reason.contains("UnknownIssuer")), "{held:?}");
}

/// MTA-STS belongs to the domain, the connection to the host: a certificate that is no good for one domain's mail keeps
/// nothing else from the same hosts.
#[test]
fn a_domain_whose_tls_fails_does_not_hold_up_another_at_the_same_hosts() {
    let mut world = two_domains();
    for _ in 0..3 {
        accepted_for(&mut world, "strict.example");
    }
    world.accept_tls(false);
    assert_eq!(world.outcomes(), 0);
    assert_eq!(held(&world).len(), 3);
    assert_only_the_strict_one_waits(&world);
    assert!(world.connects.is_empty(), "and it is not tried over and over");

    accepted_for(&mut world, "plain.example");
    let peer = world.accept_tls(false);
    assert!(world.peer_says(peer, "250 peer.example\r\n").starts_with("MAIL FROM:"));
    assert_eq!(world.take_message(peer), "");
    // New mail for the strict domain waits too, and does not go on the connection that is up.
    accepted_for(&mut world, "strict.example");
    assert_eq!((world.to_peer.as_str(), world.connects.len()), ("", 0));
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), held(&world).len()), (1, 4));
    assert_only_the_strict_one_waits(&world);
}

/// One handshake of two fails: its message goes by the connection that is up, and nothing waits for the host's time.
#[test]
fn what_a_connection_carries_does_not_wait_for_another() {
    let mut world = two_domains_by(2);
    for _ in 0..3 {
        accepted_for(&mut world, "strict.example");
    }
    let peer = world.accept_tls(true);
    assert!(world.peer_says(peer, "250 peer.example\r\n").starts_with("MAIL FROM:"));
    world.accept_tls(false);
    assert_eq!(held(&world), vec![("strict.example".to_owned(), 0, String::new()); 3], "no reason is told");
    assert!(world.connects.is_empty(), "and no other is tried");
    for left in [2, 1, 0] {
        let said = world.take_message(peer);
        assert_eq!(said.starts_with("MAIL FROM:"), left > 0, "{said}");
    }
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), held(&world).len()), (3, 0));
}

/// The same the other way round: what a warm connection did not prove, it does not carry.
#[test]
fn a_warm_connection_does_not_carry_what_requires_more() {
    let mut world = two_domains();
    accepted_for(&mut world, "plain.example");
    let peer = world.accept_tls(false);
    assert!(world.peer_says(peer, "250 peer.example\r\n").starts_with("MAIL FROM:"));
    accepted_for(&mut world, "strict.example");
    assert_eq!(world.take_message(peer), "QUIT\r\n", "it makes room for one that fits");
    world.shard.connection_gone(world.now, peer);
    world.settle();
    world.accept_tls(false);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), held(&world).len()), (1, 1));
    assert_only_the_strict_one_waits(&world);
    // Once its certificate is good, everything goes by one connection.
    for _ in 0..40 {
        world.pass(Duration::from_secs(1));
    }
    let peer = world.accept_tls(true);
    assert!(world.peer_says(peer, "250 peer.example\r\n").starts_with("MAIL FROM:"));
    assert_eq!(world.take_message(peer), "");
    accepted_for(&mut world, "plain.example");
    assert!(world.to_peer.contains("RCPT TO:") || world.to_peer.contains("MAIL FROM:"), "{}", world.to_peer);
    assert!(world.connects.is_empty() && held(&world).len() == 1);
}

/// RFC 7435: after a failed handshake the same host at once, in the clear, on a new connection.
#[test]
fn opportunistic_mail_goes_in_the_clear_where_tls_is_broken() {
    let mut world = two_domains();
    accepted_for(&mut world, "plain.example");
    let broken = world.accept_connection();
    world.peer_says(broken, "250-peer.example\r\n250 STARTTLS\r\n");
    world.peer_says(broken, "220 go\r\n");
    world.shard.connection_tls(world.now, broken, Err("HandshakeFailure".to_owned().into()));
    world.shard.connection_gone(world.now, broken);
    world.settle();
    let clear = world.accept_connection();
    let said = world.peer_says(clear, "250-peer.example\r\n250 STARTTLS\r\n");
    assert!(said.starts_with("MAIL FROM:"), "no STARTTLS again: {said}");
    world.take_message(clear);
    // What wants encryption does not go on this connection.
    accepted_for(&mut world, "strict.example");
    assert!(!world.to_peer.contains("MAIL FROM:"), "{}", world.to_peer);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.outcomes(), 1);
}

/// A host that can't be connected to costs no attempt; the message keeps its due time and says what holds it.
/// RFC 8460 §4.3.1, §4.3.2: by what its handshake came to, however often it is idle afterwards; where no TLS is
/// wanted, there is nothing to tell.
#[test]
fn a_session_counts_once_in_the_tls_report() {
    let rows = |world: &World| world.shard.tls_report.rows().collect::<Vec<_>>();
    let mut world = World::new();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    assert_eq!(rows(&world), []);
    let mut world = two_domains();
    accepted_for(&mut world, "plain.example");
    let peer = world.accept_tls(true);
    world.peer_says(peer, "250 peer.example\r\n");
    world.take_message(peer);
    let [row] = &rows(&world)[..] else { panic!("{:?}", rows(&world)) };
    assert_eq!((row.successful_sessions, row.failed_sessions.len()), (1, 0), "{row:?}");
}

#[test]
fn a_refused_connection_counts_no_attempt() {
    let mut world = World::new();
    accepted(&mut world);
    let (connection, _) = world.connects.pop().expect("a connection is wanted");
    let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
    world.shard.connect_failed(world.now, connection, &refused);
    world.settle();
    let (key, entry) = world.shard.home.entries().next().expect("it waits");
    assert_eq!(entry.attempts, 0);
    let blocked = world.shard.home.blocked_by(key).expect("it is blocked").clone();
    assert!(blocked.reason.contains("127.0.0.1:25"), "{blocked:?}");
    assert!(world.connects.is_empty() && world.outcomes() == 0);
    assert_eq!(world.shard.metrics.connections_out.get(), 0);
    world.pass(Duration::from_millis(blocked.until_ms - world.now.wall_ms));
    assert_eq!(world.connects.len(), 1, "and it is tried again at that time");
}

/// What waits for its turn then is held by nothing, and nobody is told so.
#[test]
fn a_host_that_is_tried_again_blocks_nothing() {
    let mut world = World::new();
    accepted(&mut world);
    let (connection, _) = world.connects.pop().expect("a connection is wanted");
    let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
    world.shard.connect_failed(world.now, connection, &refused);
    for _ in 0..40 {
        accepted(&mut world);
    }
    assert!(held(&world).iter().all(|(_, _, reason)| reason.contains("127.0.0.1:25")));
    let (key, _) = world.shard.home.entries().next().expect("it waits");
    let until_ms = world.shard.home.blocked_by(key).expect("it is blocked").until_ms;
    world.pass(Duration::from_millis(until_ms - world.now.wall_ms));
    assert!(world.shard.home.ready() > 0, "some are left for later credits");
    assert!(held(&world).iter().all(|(_, _, reason)| reason.is_empty()), "{:?}", held(&world));
}

/// After a restart all that was queued may be due at once, and has to be read. The log reads only so many messages at a
/// time; once, the others were held for an hour as if they could not be read.
#[test]
fn messages_wait_for_their_turn_to_be_read() {
    let mut world = World::new();
    let session = world.connect_client();
    world.shard.session_received(world.now, session, b"EHLO client.example\r\n");
    let count = postrider_spool::limits::READS_MAX + 50;
    for _ in 0..count {
        let envelope = "MAIL FROM:<a@client.example>\r\nRCPT TO:<b@peer.example>\r\nDATA\r\n";
        world.shard.session_received(world.now, session, envelope.as_bytes());
        world.shard.session_received(world.now, session, CONTENT.as_bytes());
        world.sync();
    }
    assert_eq!(world.to_client.matches("250 2.0.0 OK id=").count(), count);
    let World { directory, now, _spool: spool, shard, .. } = world;
    drop((shard, spool));
    let mut world = World::open(directory, now, Config::new("mta.example"));
    // The pair's owner asks for all of them.
    world.settle();
    let pair = world.shard.home.entries().find_map(|(key, _)| world.shard.home.pair_of(key).cloned()).unwrap();
    world.shard.handle_message(ShardMessage::Credits { pair, flow: None, credits: 10 * count as u32 });
    world.pass(Duration::from_millis(10));
    assert_eq!(world.shard.home.out(), count as u64);
    let held = world.shard.home.entries().filter(|(_, entry)| entry.last_answer.is_some()).count();
    assert_eq!(held, 0, "none of them counts as unreadable");
}

/// The log takes no outcome while it has no segment for it: the outcome is recorded as soon as there is one, and not
/// only when the log fails and is opened again. Meanwhile no attempt is begun, since a restart would make it again.
#[test]
fn an_outcome_that_finds_no_room_is_recorded_later() {
    let mut world = World::open_with(TempDir::new().unwrap(), START, Config::new("mta.example"), 32 << 10);
    let recipients: String = (0..60).map(|place| format!("RCPT TO:<b{place}@peer.example>\r\n")).collect();
    let envelope = format!("MAIL FROM:<a@client.example>\r\n{recipients}DATA\r\n");
    // More than are given to the pair's owner before the first of them comes back, and than outcomes find room for;
    // fewer than a connection takes.
    let messages = 95;
    let session = world.connect_client();
    world.client_says(session, "EHLO client.example\r\n");
    for _ in 0..messages {
        world.client_says(session, &envelope);
        world.client_says(session, CONTENT);
        world.sync();
    }
    let peer = world.accept_connection();
    let refuse_all = |world: &mut World, mut said: String| {
        let mut refused = 0;
        while !said.is_empty() {
            let is_mail = said.starts_with("MAIL");
            refused += usize::from(is_mail);
            said = world.peer_says(peer, if is_mail { "550 5.7.1 not from you\r\n" } else { "250 2.0.0 ok\r\n" });
        }
        refused
    };
    let said = world.peer_says(peer, "250 peer.example\r\n");
    let mut refused = refuse_all(&mut world, said);
    assert_eq!((refused + world.shard.home.len(), world.outcomes()), (messages, 0), "nothing is written yet");
    assert!(!world.shard.is_committed());
    assert!(refused < messages, "what waited at home is not begun");
    let home = &world.shard.home;
    let waits = |key| home.blocked_by(key).is_some_and(|blocked| blocked.reason.contains("takes no outcomes"));
    assert!(home.entries().all(|(key, entry)| waits(key) && entry.attempts == 0));
    for _ in 0..30 {
        world.pass(Duration::from_secs(1));
        let said = std::mem::take(&mut world.to_peer);
        refused += refuse_all(&mut world, said);
    }
    assert_eq!((refused, world.outcomes()), (messages, messages));
    assert!(world.shard.is_committed());
}

/// RFC 5321 §4.5.3.1.10: those beyond the peer's limit go on at once, whatever the others wait for, and have had no
/// attempt; and a queue's rate tells of what was delivered.
#[test]
fn recipients_beyond_the_peers_limit_go_on_at_once() {
    let mut world = World::new();
    let session = world.connect_client();
    let recipients = "RCPT TO:<b@peer.example>\r\nRCPT TO:<c@peer.example>\r\nRCPT TO:<d@peer.example>\r\n";
    world.client_says(session, &CLIENT.replace("RCPT TO:<b@peer.example>\r\n", recipients));
    world.client_says(session, CONTENT);
    world.sync();
    let peer = world.accept_connection();
    world.peer_says(peer, "250-peer.example\r\n250 PIPELINING\r\n");
    world.peer_says(peer, "250 ok\r\n250 ok\r\n452 4.5.3 too many\r\n450 4.2.0 later\r\n354 go\r\n");
    world.peer_says(peer, "250 ok\r\n");
    world.pass(Duration::from_millis(1));
    let said = std::mem::take(&mut world.to_peer);
    assert!(said.contains("MAIL FROM:") && said.contains("RCPT TO:<c@peer.example>"), "{said}");
    let mut attempts: Vec<(Vec<u32>, u32)> =
        world.shard.home.entries().map(|(_, entry)| (entry.recipients.collect(), entry.attempts)).collect();
    attempts.sort();
    assert_eq!(attempts, [(vec![1], 0), (vec![2], 1)]);
    world.pass(Duration::from_secs(1));
    let rate = world.shard.home.queues().next().unwrap().rate_per_s;
    assert!((rate - 0.1).abs() < 1e-9, "one of three, over ten seconds: {rate}");
}

/// Between two turns a connection may become free and then end: its next message goes by another.
#[test]
fn a_connection_that_ends_before_its_next_message_begins_gives_it_back() {
    let (mut world, peer, said) = with_peer(Chunking::Off, "250 peer.example\r\n", 2);
    assert!(said.starts_with("MAIL"), "{said}");
    for reply in ["250 ok\r\n", "250 ok\r\n", "354 go\r\n"] {
        world.peer_says(peer, reply);
    }
    world.shard.connection_received(world.now, peer, b"250 taken\r\n");
    world.shard.connection_closed(world.now, peer, "the connection was closed");
    world.shard.connection_gone(world.now, peer);
    world.sync();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates(), [Fate::Delivered]);
    let peer = world.accept_connection();
    assert!(world.peer_says(peer, "250 peer.example\r\n").starts_with("MAIL"));
}

/// A route that expires while entries wait for credits costs the pair none: its owner would wait for tickets for ever.
#[test]
fn an_expired_route_leaves_the_credits_where_they_are() {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    config.shaping.chunking = Chunking::Off;
    let mut world = World::open(TempDir::new().unwrap(), START, config.clone());
    world.shard.config = Arc::new(config);
    world.shard.routes = super::RouteCache::new(Arc::new(super::StaticRoutes::new(&[])));
    let route = |world: &mut World| {
        let address: SocketAddr = "127.0.0.1:25".parse().unwrap();
        let (addresses, dane) = (vec![address.into()], HostDane::default());
        let host = Host { name: "mx.example".to_owned(), preference: 0, addresses, dane };
        let expires = world.now.monotonic + Duration::from_secs(30);
        let site = Arc::new(Site { name: "mx.example".to_owned(), hosts: vec![host], expires });
        let result = Ok(handover::Route { site, tls: TlsMode::Disabled, terms: Arc::default(), sts: None, dane: true });
        world.shard.handle_message(ShardMessage::Routed { key: RouteKey::of_domain("peer.example"), result });
        world.sync();
    };
    let messages = 6;
    for _ in 0..messages {
        accepted(&mut world);
    }
    route(&mut world);
    let peer = world.accept_connection();
    let mut said = world.peer_says(peer, "250 peer.example\r\n");
    world.pass(Duration::from_secs(60));
    while !said.is_empty() {
        let reply = if said == "DATA\r\n" { "354 go\r\n" } else { "250 ok\r\n" };
        said = world.peer_says(peer, reply);
        if said.is_empty() {
            route(&mut world);
            said = std::mem::take(&mut world.to_peer);
        }
    }
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), world.shard.home.len()), (messages, 0));
}
