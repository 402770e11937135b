//! A whole engine in memory, one life of it: its shards on a simulated disk, clients, peers and the control thread.
//!
//! Every [`World::step`] draws one thing to happen next, so that all that may overlap does. One seed replays all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider::accept::{Admitted, Policy, Received, SharedContent};
use postrider::admin::metrics::ShardMetrics;
use postrider::admin::{MessageFilter, MessageRow};
use postrider::config::{
    Config, DomainPattern, EgressSource, InDoubt, RetrySchedule, Route, RouteTarget, SmtpListener, TlsMode,
};
use postrider::deliver::dane::HostDane;
use postrider::deliver::route::{Host, RouteFailure, RouteFailureKind, Site};
use postrider::handover::{self, Ask, ControlMessage, PairKey, ShardMessage, Told};
use postrider::limits::MemoryBounds;
use postrider::mail::time::Now;
use postrider::pool::connection::ConnectionKey;
use postrider::shard::{Action, ConnectError, Connected, SessionKey, Shard, ShardOptions};
use postrider_spool::record::LogId;
use postrider_spool::sim::{Faults, SimDisk};
use postrider_spool::{Completion, Durability, Operation, Spool, SpoolOptions};

use crate::checker::{Counts, Ledger, Marker, Sent};
use crate::client::Client;
use crate::event_log::EventLog;
use crate::peer::Peer;
use crate::random::Random;

/// What outlives a crash: what others know of the engine.
#[derive(Debug, Clone)]
pub(crate) struct Past {
    pub(crate) ledger: Ledger,
    pub(crate) events: EventLog,
    pub(crate) wall_ms: u64,
    pub(crate) seen: Seen,
}

/// What happened beside the mail.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) failed_operations: u64,
    pub(crate) logs_removed: u64,
    /// Messages of campaigns that were accepted.
    pub(crate) sharing: u64,
    pub(crate) schedules_compared: u64,
    /// On the disk when a life ended: finished checkpoints, segments of copies, and uses of a segment's file after its
    /// first.
    pub(crate) checkpoints: u64,
    pub(crate) copies: u64,
    pub(crate) reused: u64,
    pub(crate) steps: u64,
}

impl Past {
    /// Of an engine that was never started; the counts go on.
    pub(crate) fn new(holds: bool, counts: Counts, seen: Seen) -> Self {
        let mut ledger = Ledger::new(config(holds).retry.schedule, holds, counts);
        // Time goes on in leaps: what is over is seen before the turn that ends it.
        ledger.forward_ms = FAR_MS;
        Self { ledger, events: EventLog::default(), wall_ms: 1_800_000_000_000, seen }
    }
}

/// An engine that runs. Its disk outlives it.
pub(crate) struct World {
    pub(crate) past: Past,
    pub(crate) disk: SimDisk,
    pub(crate) random: Random,
    policy: Arc<Policy>,
    now: Now,
    shards: Vec<Shard>,
    metrics: Vec<Arc<ShardMetrics>>,
    /// The log of each shard that takes mail.
    active: Vec<LogId>,
    /// On their way to each shard.
    mail: Vec<VecDeque<ShardMessage>>,
    pub(crate) operations: Vec<(usize, LogId, Operation)>,
    /// Executed, and the shard does not know yet.
    pub(crate) completions: Vec<(usize, LogId, Completion)>,
    clients: BTreeMap<(usize, SessionKey), Client>,
    peers: BTreeMap<(usize, ConnectionKey), Peer>,
    owners: BTreeMap<(usize, Arc<str>), usize>,
    injections: BTreeMap<u64, Marker>,
    /// The embedding API's handles, each with the shard that takes its messages.
    campaigns: Vec<(usize, Arc<SharedContent>)>,
    campaigns_begun: u64,
    answers: BTreeMap<u64, Vec<MessageRow>>,
    questions: u64,
    /// Peers take what comes, and no new mail does.
    is_kind: bool,
    // Holds the lock of the spool's directory.
    _spool: Spool,
}

impl World {
    /// Starts an engine on what is on the disk, and checks that it is what was promised.
    pub(crate) fn start(mut past: Past, disk: SimDisk, seed: u64, shards: usize) -> Self {
        let mut random = Random::new(seed);
        let config = Arc::new(config(past.ledger.holds));
        let policy = Arc::new(Policy::new(&config).unwrap());
        let now = Now { monotonic: Duration::from_millis(1 + random.below(1 << 20)), wall_ms: past.wall_ms };
        let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new(SPOOL), OPTIONS).unwrap();
        let logs = spool.assign(shards).unwrap();
        let metrics: Vec<Arc<ShardMetrics>> = (0..shards).map(|_| Arc::default()).collect();
        let mut active = Vec::new();
        let mut made = Vec::new();
        for (id, logs) in logs.into_iter().enumerate() {
            let mut shard = Shard::new(ShardOptions {
                id,
                shards,
                config: Arc::clone(&config),
                policy: Arc::clone(&policy),
                metrics: Arc::clone(&metrics[id]),
                progress: postrider::progress::in_memory(),
                quarantined: Arc::default(),
                seed: random.below(u64::MAX),
                sockets_max: 16,
                memory: MemoryBounds::MOST,
            });
            active.push(logs[0].id());
            for log in logs {
                let cursor = past.events.cursor(log.id());
                shard.recover(log, cursor, random.below(u64::MAX)).unwrap();
            }
            made.push(shard);
        }
        past.ledger.crash();
        past.events.crash();
        let mut world = Self {
            past,
            disk,
            random,
            policy,
            now,
            shards: made,
            metrics,
            active,
            mail: (0..shards).map(|_| VecDeque::new()).collect(),
            operations: Vec::new(),
            completions: Vec::new(),
            clients: BTreeMap::new(),
            peers: BTreeMap::new(),
            owners: BTreeMap::new(),
            injections: BTreeMap::new(),
            campaigns: Vec::new(),
            campaigns_begun: 0,
            answers: BTreeMap::new(),
            questions: 0,
            is_kind: false,
            _spool: spool,
        };
        world.check_start();
        world
    }

    fn check_start(&mut self) {
        for shard in 0..self.shards.len() {
            self.turn(shard);
        }
        for metrics in &self.metrics {
            let quarantined = metrics.spool_quarantined_records.get();
            assert_eq!(quarantined, 0, "NOTHING-LOST: a crash is not damage");
            assert_eq!(metrics.spool_held_messages.get(), 0, "NOTHING-LOST: a checkpoint was there");
        }
        // When the machine stops, what was noted is older than what was sent.
        self.past.ledger.check_recovered(u64::MAX);
        let rows = self.ask();
        self.past.ledger.check_schedule(&rows, self.now.wall_ms);
    }

    /// Asks all shards for their messages. What these have to read for it is read; nothing else happens meanwhile.
    fn ask(&mut self) -> Vec<MessageRow> {
        let mut rows = Vec::new();
        for shard in 0..self.shards.len() {
            let pending = self.past.ledger.pending().into_iter().map(|(id, ..)| id);
            let ids: Vec<_> = pending.filter(|id| usize::from(id.log().0) % self.shards.len() == shard).collect();
            if ids.len() < ASK_READS_MAX {
                rows.extend(self.ask_shard(shard, MessageFilter::default()));
                continue;
            }
            // Of more entries one answer does not tell all.
            for id in ids.into_iter().collect::<BTreeSet<_>>() {
                rows.extend(self.ask_shard(shard, MessageFilter { id: Some(id), ..MessageFilter::default() }));
            }
        }
        self.past.seen.schedules_compared += 1;
        rows
    }

    fn ask_shard(&mut self, shard: usize, filter: MessageFilter) -> Vec<MessageRow> {
        self.questions += 1;
        let ask = Ask::Messages { filter: MessageFilter { limit: usize::MAX, ..filter } };
        self.shards[shard].handle_message(ShardMessage::Ask { question: self.questions, ask: Box::new(ask) });
        self.turn(shard);
        while !self.answers.contains_key(&self.questions) {
            let is_read =
                |(at, _, operation): &(usize, LogId, Operation)| *at == shard && operation.describe().0 == "read";
            let place = self.operations.iter().position(is_read).expect("an answer waits for reads only");
            let (_, log, operation) = self.operations.remove(place);
            self.shards[shard].spool_completed(self.now, log, postrider_spool::execute(operation));
            self.turn(shard);
        }
        self.answers.remove(&self.questions).expect("it was just there")
    }

    /// Where nothing waits for a commit, the schedule in memory must be what is durable.
    pub(crate) fn compare(&mut self) {
        let is_committed = |world: &Self| world.shards.iter().all(Shard::is_committed);
        if !is_committed(self) {
            return;
        }
        let rows = self.ask();
        if is_committed(self) {
            self.past.ledger.check_schedule(&rows, self.now.wall_ms);
        }
    }

    /// Lets one thing happen.
    pub(crate) fn step(&mut self) {
        self.past.seen.steps += 1;
        match self.random.below(48) {
            0 if !self.is_kind => self.open_session(),
            1 if !self.is_kind && self.random.one_in(2) => self.step_campaigns(),
            1 if !self.is_kind => self.inject(),
            2 if !self.is_kind => self.set_faults(),
            0..3 => self.step_peers(),
            3..11 => self.step_client(),
            11..25 if self.is_kind => self.step_peers(),
            11..25 => self.step_peer(),
            25..30 => self.step_mail(),
            30..35 => self.complete(),
            35 => self.step_events(),
            36..38 => self.pass(),
            38 if self.random.one_in(12) => self.compare(),
            _ => self.execute(),
        }
    }

    /// Gives a shard its turns, and carries out what it wants.
    fn turn(&mut self, shard: usize) {
        let blocked = self.past.events.waiting() > EVENTS_WAITING_MAX;
        self.shards[shard].set_events_blocked(blocked);
        loop {
            self.shards[shard].turn(self.now);
            self.carry_out(shard);
            if !self.shards[shard].has_more() {
                return;
            }
        }
    }

    fn carry_out(&mut self, shard: usize) {
        while let Some(action) = self.shards[shard].poll_action() {
            match action {
                Action::SessionSend { session, bytes } => {
                    if let Some(client) = self.clients.get_mut(&(shard, session)) {
                        let mut write = |marker| message(marker, &mut self.random);
                        client.hear(&bytes, self.active[shard], &mut self.past.ledger, &mut write);
                    }
                }
                Action::SessionClose { session } | Action::SessionAbort { session } => {
                    self.clients.remove(&(shard, session));
                    self.shards[shard].session_closed(session);
                }
                Action::SessionResume { .. }
                | Action::SessionAcknowledge { .. }
                | Action::ConnectionAcknowledge { .. } => {}
                Action::Spool { log, operation } => self.operations.push((shard, log, operation)),
                Action::RemoveLog(log) => {
                    // After a failure the next start removes it.
                    self.past.seen.logs_removed += u64::from(log.remove().is_ok());
                }
                Action::Connect { connection, source, to } => {
                    let other = self
                        .peers
                        .insert((shard, connection), Peer::new(to.as_socket().expect("no Unix sockets"), source));
                    assert!(other.is_none(), "a connection's place is given to one at a time");
                }
                Action::ConnectionSend { connection, chunks } => {
                    if let Some(peer) = self.peers.get_mut(&(shard, connection)) {
                        peer.incoming.extend(chunks.iter().flat_map(|chunk| chunk.as_ref()));
                    }
                }
                Action::ConnectionClose { connection } => {
                    if let Some(peer) = self.peers.get_mut(&(shard, connection)) {
                        peer.is_closing = true;
                    }
                }
                Action::ConnectionAbort { connection } => {
                    if let Some(peer) = self.peers.get_mut(&(shard, connection)) {
                        peer.is_aborted = true;
                    }
                }
                Action::SessionStartTls { .. } | Action::ConnectionStartTls { .. } => unreachable!("nobody offers TLS"),
                Action::Shard { to, message } => self.mail[to].push_back(message),
                Action::Control(message) => self.control(message),
                Action::Reserve(_) => unreachable!("no limit is over a minute or longer"),
                Action::Injected { injection, answer } => {
                    let marker = self.injections.remove(&injection).expect("it was injected");
                    match answer {
                        Ok(id) => {
                            let sent = self.past.ledger.sent(marker);
                            let is_sharing =
                                sent.content.windows(SHARED.len()).any(|octets| octets == SHARED.as_bytes());
                            self.past.seen.sharing += u64::from(is_sharing);
                            self.past.ledger.accept(marker, id);
                        }
                        Err(refusal) => {
                            let in_doubt = refusal.text().contains("Spool failed").then_some(self.active[shard]);
                            self.past.ledger.refuse(marker, in_doubt);
                        }
                    }
                }
                Action::Events(records) => {
                    for record in records {
                        let record = Arc::new(record);
                        self.past.ledger.tell(&record);
                        self.past.events.take(record);
                    }
                }
            }
        }
    }

    /// The control thread.
    fn control(&mut self, message: ControlMessage) {
        match message {
            ControlMessage::FindRoute { shard, key } => {
                let result = self.route(&key.domain);
                self.mail[shard].push_back(ShardMessage::Routed { key, result });
            }
            ControlMessage::FindOwner { shard, pair } => {
                let PairKey { source, rollup, .. } = pair.clone();
                let drawn = self.random.below(self.shards.len() as u64) as usize;
                let owner = *self.owners.entry((source, rollup)).or_insert(drawn);
                self.mail[shard].push_back(ShardMessage::Owner { pair, owner });
            }
            ControlMessage::Answer { question, told: Told::Messages(rows) } => {
                self.answers.insert(question, rows);
            }
            message => unreachable!("{message:?}"),
        }
    }

    fn route(&mut self, domain: &str) -> Result<handover::Route, RouteFailure> {
        if domain == "nowhere.example" {
            self.past.ledger.undeliverable(domain);
            let text = "no such domain".to_owned();
            return Err(RouteFailure::bounce(550, (5, 1, 2), text));
        }
        let expires = self.now.monotonic + Duration::from_secs(1 + self.random.below(60));
        if !self.is_kind && self.random.one_in(5) {
            let text = "no name server answered".to_owned();
            let kind = RouteFailureKind::Defer;
            return Err(RouteFailure { kind, code: 451, enhanced: (4, 4, 3), text, expires });
        }
        let addresses = vec![SocketAddr::from(([10, 0, 0, 9], 25)).into()];
        let hosts = vec![Host { name: "mx.example".to_owned(), preference: 0, addresses, dane: HostDane::default() }];
        let site = Arc::new(Site { name: "mx.example".to_owned(), hosts, expires });
        Ok(handover::Route { site, tls: TlsMode::Disabled, sts: None, dane: false, terms: Arc::default() })
    }

    fn open_session(&mut self) {
        let shard = self.draw_shard();
        let client = SocketAddr::from(([127, 0, 0, 1], 4_000));
        let Some(session) = self.shards[shard].open_session(self.now, &SmtpListener::default(), client) else { return };
        self.clients.insert((shard, session), Client::new(&mut self.random));
        self.turn(shard);
    }

    fn inject(&mut self) {
        let shard = self.draw_shard();
        let marker = self.past.ledger.send(|marker| message(marker, &mut self.random));
        let sent = self.past.ledger.sent(marker);
        let received = received(&sent, sent.content.clone());
        let admitted = self.policy.admit(self.now, received, [marker, marker]).unwrap();
        self.send(shard, marker, admitted);
    }

    /// A campaign's handle is made or dropped, or sends a few messages.
    fn step_campaigns(&mut self) {
        let count = self.campaigns.len();
        if count == 0 || count < 3 && self.random.one_in(4) {
            let content = shared_content(self.campaigns_begun, &mut self.random);
            let content = Arc::new(self.policy.share(self.campaigns_begun, content).unwrap());
            self.campaigns_begun += 1;
            self.campaigns.push((self.random.below(self.shards.len() as u64) as usize, content));
            return;
        }
        let place = self.random.below(count as u64) as usize;
        if self.random.one_in(6) {
            self.campaigns.swap_remove(place);
            return;
        }
        for _ in 0..1 + self.random.below(4) {
            let (shard, shared) = self.campaigns[place].clone();
            let mut own = Vec::new();
            let marker = self.past.ledger.send(|marker| {
                own = format!("Subject: m{marker} by itself\r\n").into_bytes();
                Sent { content: [&own, shared.octets()].concat(), ..message(marker, &mut self.random) }
            });
            let sent = self.past.ledger.sent(marker);
            let received = received(&sent, own);
            let admitted = self.policy.admit_sharing(self.now, received, &shared, [marker, marker]).unwrap();
            self.send(shard, marker, admitted);
        }
    }

    fn send(&mut self, shard: usize, marker: Marker, admitted: Admitted) {
        self.past.ledger.finish(marker);
        self.injections.insert(marker, marker);
        self.mail[shard].push_back(ShardMessage::Inject { injection: marker, admitted: Box::new(admitted) });
    }

    fn step_client(&mut self) {
        let clients: Vec<_> = self.clients.keys().copied().collect();
        let Some(key @ (shard, session)) = self.draw(&clients) else { return };
        let client = self.clients.get_mut(&key).expect("it was drawn");
        if client.is_done || self.random.one_in(80) {
            self.clients.remove(&key);
            self.shards[shard].session_closed(session);
        } else if client.has_output() && self.shards[shard].session_wants_input(session) {
            let input = client.take_output(&mut self.random, &mut self.past.ledger);
            self.shards[shard].session_received(self.now, session, &input);
        }
        self.turn(shard);
    }

    fn step_peers(&mut self) {
        for _ in 0..4 {
            self.step_peer();
        }
    }

    fn step_peer(&mut self) {
        // Now and then one that has nothing to do.
        let any = self.random.one_in(20);
        let works = |(key, peer): (&(usize, ConnectionKey), &Peer)| (any || peer.has_work()).then_some(*key);
        let works: Vec<_> = self.peers.iter().filter_map(works).collect();
        let Some(key @ (shard, connection)) = self.draw(&works) else { return };
        let (now, is_kind) = (self.now, self.is_kind);
        let peer = self.peers.get_mut(&key).expect("it was drawn");
        if !peer.is_up {
            if peer.is_aborted || !is_kind && self.random.one_in(15) {
                self.peers.remove(&key);
                let error = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
                self.shards[shard].connect_failed(now, connection, &error);
            } else {
                let local = SocketAddr::from(([10, 1, 0, 1], 5_000));
                let made = Connected { local: Some(local), peer: peer.address.into() };
                peer.greet(&mut self.random, is_kind);
                self.shards[shard].connected(now, connection, made);
            }
        } else if peer.is_aborted {
            self.lose(key);
        } else if peer.has_input() && (self.random.one_in(2) || !peer.has_replies()) {
            let octets = peer.read(&mut self.random, is_kind, &mut self.past.ledger);
            self.shards[shard].connection_sent(now, connection, octets);
        } else if peer.is_closing {
            peer.end(&mut self.past.ledger);
            self.peers.remove(&key);
            self.shards[shard].connection_gone(now, connection);
        } else if peer.has_replies() {
            let replies = peer.take_replies(&mut self.random);
            self.shards[shard].connection_received(now, connection, replies.as_bytes());
        } else if peer.hangs_up || !is_kind && self.random.one_in(20) {
            self.lose(key);
        }
        self.turn(shard);
    }

    /// The connection breaks off.
    fn lose(&mut self, key: (usize, ConnectionKey)) {
        let (shard, connection) = key;
        let mut peer = self.peers.remove(&key).expect("it is there");
        peer.end(&mut self.past.ledger);
        self.shards[shard].connection_closed(self.now, connection, "the connection was closed");
        self.shards[shard].connection_gone(self.now, connection);
    }

    /// Some messages reach a shard.
    fn step_mail(&mut self) {
        let shard = self.draw_shard();
        let count = self.random.below(self.mail[shard].len() as u64 + 1) as usize;
        for message in self.mail[shard].drain(..count) {
            self.shards[shard].handle_message(message);
        }
        self.turn(shard);
    }

    fn step_events(&mut self) {
        let records = if self.is_kind { usize::MAX } else { self.random.below(60) as usize };
        for (log, sequence) in self.past.events.write(records, &mut self.past.ledger) {
            let shard = usize::from(log.0) % self.shards.len();
            self.mail[shard].push_back(ShardMessage::EventCursor { log, sequence });
        }
    }

    /// An operation whose result is known reaches its shard.
    fn complete(&mut self) {
        if self.completions.is_empty() {
            return;
        }
        let place = self.random.below(self.completions.len() as u64) as usize;
        let (shard, log, completion) = self.completions.swap_remove(place);
        self.shards[shard].spool_completed(self.now, log, completion);
        self.turn(shard);
    }

    fn set_faults(&mut self) {
        let faults = match self.random.below(20) {
            0 => Faults {
                operations_left: Some(self.random.below(6)),
                sectors_written: self.random.below(30),
                ..Faults::default()
            },
            1 => Faults { write_bytes_max: Some(1 + self.random.below(9_000) as usize), ..Faults::default() },
            _ => Faults::default(),
        };
        self.past.seen.failed_operations += u64::from(faults.operations_left.is_some());
        self.disk.set_faults(faults);
    }

    /// Time goes by: a little, or up to what somebody waits for.
    fn pass(&mut self) {
        let wait = match self.random.below(8) {
            0..6 => Duration::from_micros(self.random.below(4_000)),
            6 => {
                let next = self.shards.iter().map(|shard| shard.next_timeout(self.now)).min();
                next.unwrap_or_default().saturating_sub(self.now.monotonic)
            }
            _ if self.random.one_in(30) => Duration::from_secs(10 + self.random.below(50)),
            _ => Duration::from_millis(self.random.below(2_000)),
        };
        self.advance(wait);
    }

    fn advance(&mut self, wait: Duration) {
        // To the next millisecond, so that both clocks reach what is due.
        let wait_ms = wait.as_micros().div_ceil(1_000) as u64;
        self.now.monotonic += Duration::from_millis(wait_ms);
        self.now.wall_ms += wait_ms;
        self.past.wall_ms = self.now.wall_ms;
        for shard in 0..self.shards.len() {
            self.turn(shard);
        }
    }

    /// Peers heal and no mail comes any more: everything must come to its end.
    pub(crate) fn finish(mut self) -> Past {
        self.is_kind = true;
        self.campaigns.clear();
        self.disk.set_faults(Faults::default());
        let last = self.past.seen.steps + STEPS_TO_END_MAX;
        let is_over = |world: &Self| {
            let is_quiet = world.shards.iter().all(Shard::is_committed) && world.mail.iter().all(VecDeque::is_empty);
            let is_idle = world.operations.is_empty() && world.completions.is_empty() && world.clients.is_empty();
            is_quiet && is_idle && world.past.ledger.open() == 0 && world.past.events.waiting() == 0
        };
        while !is_over(&self) {
            if self.past.seen.steps >= last {
                let rows = self.ask();
                let pending = self.past.ledger.pending();
                panic!("NOTHING-LOST: after {STEPS_TO_END_MAX} steps {pending:#?} wait; scheduled are {rows:#?}");
            }
            for _ in 0..20 {
                self.step();
            }
            if self.is_idle() {
                let wait = Duration::from_secs(1 + self.random.below(15));
                self.advance(wait);
            }
        }
        let rows = self.ask();
        assert!(rows.is_empty(), "NOTHING-LOST: {rows:#?}");
        self.past.ledger.check_finished();
        self.past
    }

    /// Whether everybody waits for time to pass.
    fn is_idle(&self) -> bool {
        self.operations.is_empty()
            && self.completions.is_empty()
            && self.mail.iter().all(VecDeque::is_empty)
            && !self.peers.values().any(Peer::has_work)
    }

    fn draw_shard(&mut self) -> usize {
        self.random.below(self.shards.len() as u64) as usize
    }

    fn draw<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        let bound = (all.len() as u64).max(1);
        all.get(self.random.below(bound) as usize).copied()
    }
}

fn received(sent: &Sent, content: Vec<u8>) -> Received {
    Received::embedded(sent.reverse_path.clone(), sent.recipients.clone(), content)
}

/// What a campaign's messages share: header fields and a body of many lengths.
fn shared_content(number: u64, random: &mut Random) -> Vec<u8> {
    let mut content = format!("{SHARED}{number}\r\n\r\n").into_bytes();
    for _ in 0..random.below(120) {
        let dot = if random.one_in(20) { "." } else { "" };
        content.extend_from_slice(format!("{dot}{:=<60}\r\n", random.below(1 << 30)).as_bytes());
    }
    content
}

/// One to six recipients at a few domains, and content of many lengths.
fn message(marker: Marker, random: &mut Random) -> Sent {
    let count = if random.one_in(12) { 6 + random.below(30) } else { 1 + random.below(5) };
    let recipients = (0..count).map(|place| {
        let domain = match random.below(40) {
            0 => "nowhere.example",
            1..6 => "looked-up.example",
            draw => ["a.example", "b.example", "c.example", "d.example"][draw as usize % 4],
        };
        format!("r{place}@{domain}")
    });
    let recipients = recipients.collect();
    let mut content = format!("Subject: m{marker}\r\n\r\n").into_bytes();
    let octets = if random.one_in(15) { 4_000 + random.below(16_000) } else { random.below(1_500) };
    while (content.len() as u64) < octets {
        let dot = if random.one_in(20) { "." } else { "" };
        content.extend_from_slice(format!("{dot}{:-<60}\r\n", random.below(1 << 30)).as_bytes());
    }
    Sent {
        reverse_path: format!("m{marker}@client.example"),
        recipients,
        steering: String::new(),
        content,
        sources: vec![0, 1],
        first_attempt_ms: None,
    }
}

/// `holds`: what is in doubt is not sent again.
fn config(holds: bool) -> Config {
    let mut config = Config::new("mta.example");
    let sites = [("a.example", 1), ("b.example", 2), ("c.example", 3), ("d.example", 3)];
    let route = |(domain, host): (&str, u8)| {
        let to = vec![RouteTarget::Address(SocketAddr::from(([10, 0, 0, host], 25)))];
        Route { tls: Some(TlsMode::Disabled), ..Route::new(DomainPattern::Exact(domain.to_owned()), to) }
    };
    config.routes = sites.into_iter().map(route).collect();
    let source = |name: &str| EgressSource {
        name: name.to_owned(),
        source_address: None,
        ehlo_domain: "mta.example".to_owned(),
        suspend_when_unplumbed: false,
        is_retired: false,
    };
    config.egress_sources = vec![source("one"), source("two")];
    config.egress_pools[0].sources = vec![(0, 2), (1, 1)];
    config.shaping.in_doubt = if holds { InDoubt::Hold } else { InDoubt::Retry };
    config.shaping.connection_limit = 3;
    config.shaping.max_deliveries_per_connection = 6;
    config.shaping.max_recipients_per_batch = 10;
    config.shaping.idle_timeout = Duration::from_secs(20);
    config.retry.schedule = RetrySchedule::Doubling { first: Duration::from_secs(4), max: Duration::from_secs(30) };
    config.retry.max_age = Duration::from_secs(3_600);
    config
}

const SHARED: &str = "X-Shared: ";

const SPOOL: &str = "/spool";

/// Small, so that segments are used again all the time.
const OPTIONS: SpoolOptions = SpoolOptions {
    segment_bytes: 48 << 10,
    max_bytes: 2 << 20,
    hot_bytes: 64 << 10,
    durability: Durability::Fsync,
    ..SpoolOptions::DEFAULT
};

/// With more records the event log is behind, and no mail is taken.
const FAR_MS: u64 = 1 << 50;

const EVENTS_WAITING_MAX: usize = 120;

const STEPS_TO_END_MAX: u64 = 400_000;

/// As `engine/src/limits.rs` has it.
const ASK_READS_MAX: usize = 1_000;
