//! LIMITS-HOLD, as the peers see it: several shards, virtual time, and sinks that log when MAIL arrives, over a crash.
//!
//! `ENGINE_LIMITS_QUEUED` sets how many messages are queued for the limited site, and by the large tenant; else it is
//! what can go and some more.

mod moves;
mod reload;
mod shared;
mod warmup;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;

use postrider_spool::sim::SimDisk;
use postrider_spool::{Durability, Log};

use super::*;
use crate::accept::Received;
use crate::config::{DomainPattern, Route, RouteTarget, TlsMode};
use crate::handover::{PairKey, RollupKey};
use crate::mail::endpoint::Endpoint;
use crate::pool::rate::Past;
use crate::pool::suspension::{Effect, Scope};

/// Who is sent to, by its address, and what came of it.
#[derive(Debug, Default)]
struct Sink {
    open: usize,
    open_most: usize,
    opened: usize,
    /// When MAIL arrived, and for how many recipients.
    mails: Vec<(Duration, u32)>,
}

#[derive(Debug, Default)]
struct Peer {
    to: Option<Endpoint>,
    source: usize,
    input: Vec<u8>,
    is_content: bool,
}

#[derive(Debug)]
enum Event {
    Connected(usize, ConnectionKey),
    Replies(usize, ConnectionKey, String),
    Gone(usize, ConnectionKey),
    Reserved(usize, Reservation),
}

/// An engine of some shards. Time goes on over its lives; monotonic time begins anew in each.
struct Engine {
    config: Arc<Config>,
    policy: Arc<Policy>,
    reload: Arc<crate::shard::Reload>,
    disk: SimDisk,
    shards: Vec<Shard>,
    mail: Vec<VecDeque<ShardMessage>>,
    owners: HashMap<(usize, Arc<str>), usize>,
    peers: HashMap<(usize, ConnectionKey), Peer>,
    events: BTreeMap<(Duration, u64), Event>,
    next_event: u64,
    now: Duration,
    born: Duration,
    sinks: BTreeMap<Endpoint, Sink>,
    /// When each sender's MAIL arrived, by the first label of its domain.
    senders: BTreeMap<String, Vec<Duration>>,
    /// Recipients by each source at each address.
    sources: BTreeMap<(usize, Endpoint), u32>,
    reserved: HashMap<String, Past>,
    /// Messages above their tenant's injection rate.
    put_off: usize,
    /// Where pairs that move are to go, and what came of those that did.
    moving: HashMap<RollupKey, usize>,
    moves: Vec<(RollupKey, bool)>,
    /// How long it takes until something is durably reserved.
    reserving_takes: Duration,
    /// A shard that hears nothing for now.
    deaf: Option<usize>,
    /// How long the sinks take to answer content; and whether they refuse connections, and what was tried meanwhile.
    content_takes: Duration,
    are_sinks_down: bool,
    refused: Vec<Duration>,
    /// The sinks have no PIPELINING, and refuse the recipient of every second MAIL.
    are_sinks_odd: bool,
    _spool: Spool,
}

const OPTIONS: SpoolOptions = SpoolOptions {
    segment_bytes: 8 << 20,
    max_bytes: 1 << 30,
    hot_bytes: 64 << 20,
    durability: Durability::Fsync,
    ..SpoolOptions::DEFAULT
};

/// One after the other, while no time passes.
const TURNS_MAX: usize = 50_000;
const ROUND_TRIP: Duration = Duration::from_millis(10);
const SLOW: &str = "127.0.0.1:25";
const SLOW_DOMAIN: &str = "slow.test";
const FAST: &str = "127.0.0.2:25";

fn config(rules: &str) -> Config {
    let text = format!(
        "hostname = \"mta.example\"\n[[route]]\ndomain = \"slow.test\"\nto = [\"{SLOW}\"]\n[[route]]\ndomain = \"*\"\n\
         to = [\"{FAST}\"]\n{rules}\n[spool]\nallow_filesystem = true\n"
    );
    Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap()
}

impl Engine {
    fn start(rules: &str, shards: usize) -> Self {
        Self::live(Arc::new(config(rules)), SimDisk::new(1), shards, Duration::ZERO, BTreeMap::new(), HashMap::new())
    }

    fn live(
        config: Arc<Config>,
        disk: SimDisk,
        count: usize,
        now: Duration,
        sinks: BTreeMap<Endpoint, Sink>,
        reserved: HashMap<String, Past>,
    ) -> Self {
        let policy = Arc::new(Policy::new(&config).unwrap());
        let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), OPTIONS).unwrap();
        let past = Arc::new(reserved.clone());
        let make = |(id, logs): (usize, Vec<_>)| {
            let (config, policy) = (Arc::clone(&config), Arc::clone(&policy));
            let (metrics, seed) = (Arc::default(), id as u64);
            let (progress, quarantined) = (crate::progress::in_memory(), Arc::default());
            let options = ShardOptions {
                id,
                shards: count,
                config,
                policy,
                metrics,
                progress,
                quarantined,
                seed,
                sockets_max: 1_000,
                memory: MemoryBounds::MOST,
            };
            let mut shard = Shard::new(options);
            shard.recall_limits(Arc::clone(&past));
            for log in logs {
                shard.recover(log, Sequence(0), seed).unwrap();
            }
            shard
        };
        let reload = Arc::new(crate::shard::Reload::first(Arc::clone(&config), Arc::clone(&policy)));
        let shards = spool.assign(count).unwrap().into_iter().enumerate().map(make).collect();
        Self {
            policy,
            reload,
            disk,
            shards,
            mail: (0..count).map(|_| VecDeque::new()).collect(),
            owners: HashMap::new(),
            peers: HashMap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            now,
            born: now,
            sinks,
            senders: BTreeMap::new(),
            sources: BTreeMap::new(),
            reserved,
            put_off: 0,
            moving: HashMap::new(),
            moves: Vec::new(),
            reserving_takes: Duration::from_millis(3),
            deaf: None,
            content_takes: Duration::ZERO,
            are_sinks_down: false,
            refused: Vec::new(),
            are_sinks_odd: false,
            config,
            _spool: spool,
        }
    }

    /// kill -9: what was written is there, what was on its way is not; the peers see the connections end.
    fn kill(mut self, shards: usize) -> Self {
        for sink in self.sinks.values_mut() {
            sink.open = 0;
        }
        let Self { config, disk, now, sinks, sources, reserved, shards: old, _spool, .. } = self;
        drop((old, _spool));
        let now = now + Duration::from_millis(20);
        Self { sources, ..Self::live(config, disk.restart(), shards, now, sinks, reserved) }
    }

    fn clock(&self) -> Now {
        let wall = Duration::from_millis(START.wall_ms) + self.now;
        Now { monotonic: START.monotonic + self.now - self.born, wall_ms: wall.as_millis() as u64 }
    }

    fn inject(&mut self, home: usize, recipient: &str, priority: Priority) {
        self.inject_to(home, vec![recipient.to_owned()], priority);
    }

    fn inject_to(&mut self, home: usize, recipients: Vec<String>, priority: Priority) {
        let content = b"Subject: x\r\n\r\nHello\r\n".to_vec();
        let received = Received::embedded("a@client.example".to_owned(), recipients, content);
        let mut admitted = self.policy.admit(self.clock(), received, [1, 2]).unwrap();
        admitted.envelope.priority = priority as u8;
        self.mail[home].push_back(ShardMessage::Inject { injection: 0, admitted: Box::new(admitted) });
    }

    /// A tenant's message, of a campaign of its, to the slow site.
    fn inject_of(&mut self, home: usize, tenant: &str, campaign: usize) {
        self.inject_for(home, tenant, campaign, vec![format!("r@{SLOW_DOMAIN}")]);
    }

    fn inject_for(&mut self, home: usize, tenant: &str, campaign: usize, recipients: Vec<String>) {
        let content = format!("X-Tenant: {tenant}\r\nX-Campaign: {campaign}\r\n\r\nHello\r\n").into_bytes();
        let received = Received::embedded(format!("a@{tenant}.example"), recipients, content);
        let admitted = self.policy.admit(self.clock(), received, [1, 2]).unwrap();
        self.mail[home].push_back(ShardMessage::Inject { injection: 0, admitted: Box::new(admitted) });
    }

    fn soon(&mut self, wait: Duration, event: Event) {
        self.next_event += 1;
        self.events.insert((self.now + wait, self.next_event), event);
    }

    /// All that happens up to a time.
    fn run_until(&mut self, end: Duration) {
        while self.now < end {
            let mut turns = 0;
            while (0..self.shards.len()).filter(|&shard| self.turn(shard)).count() > 0 {
                turns += 1;
                assert!(turns < TURNS_MAX, "no end of turns without time at {:?}", self.now);
            }
            let now = self.clock();
            let hearing = self.shards.iter().filter(|shard| self.deaf != Some(shard.id()));
            let turns = hearing.map(|shard| shard.next_timeout(now));
            let turn = turns.min().unwrap().saturating_sub(now.monotonic).max(Duration::from_micros(100));
            let event = self.events.first_key_value().map_or(Duration::MAX, |((at, _), _)| *at);
            self.now = (self.now + turn).min(event).min(end);
            while let Some(first) = self.events.first_entry()
                && first.key().0 <= self.now
            {
                let event = first.remove();
                self.happen(event);
            }
        }
    }

    fn turn(&mut self, shard: usize) -> bool {
        let now = self.clock();
        if self.deaf == Some(shard) {
            return false;
        }
        let mut acted = !self.mail[shard].is_empty();
        for message in std::mem::take(&mut self.mail[shard]) {
            self.shards[shard].handle_message(message);
        }
        self.shards[shard].turn(now);
        while let Some(action) = self.shards[shard].poll_action() {
            acted = true;
            self.carry_out(shard, action);
        }
        acted || self.shards[shard].has_more()
    }

    fn carry_out(&mut self, shard: usize, action: Action) {
        match action {
            Action::Spool { log, operation } => {
                let completion = postrider_spool::execute(operation);
                let now = self.clock();
                self.shards[shard].spool_completed(now, log, completion);
            }
            Action::RemoveLog(log) => Log::remove(*log).unwrap(),
            Action::Connect { connection, source, to } => {
                let sink = self.sinks.entry(to).or_default();
                sink.open += 1;
                sink.opened += 1;
                sink.open_most = sink.open_most.max(sink.open);
                self.peers.insert((shard, connection), Peer { to: Some(to), source, ..Peer::default() });
                self.soon(ROUND_TRIP, Event::Connected(shard, connection));
            }
            Action::ConnectionSend { connection, chunks } => {
                let octets: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.as_ref()).copied().collect();
                let now = self.clock();
                self.shards[shard].connection_sent(now, connection, octets.len());
                let replies = self.read(shard, connection, &octets);
                if !replies.is_empty() {
                    let takes = if replies.contains("taken") { self.content_takes } else { Duration::ZERO };
                    self.soon(ROUND_TRIP + takes, Event::Replies(shard, connection, replies));
                }
            }
            Action::ConnectionClose { connection } => self.soon(ROUND_TRIP, Event::Gone(shard, connection)),
            Action::Shard { to, message } => self.mail[to].push_back(message),
            Action::Control(ControlMessage::FindOwner { shard, pair }) => {
                let PairKey { source, rollup, .. } = pair.clone();
                let owner = self.owners.len() % self.shards.len();
                let owner = *self.owners.entry((source, rollup)).or_insert(owner);
                self.mail[shard].push_back(ShardMessage::Owner { pair, owner });
            }
            Action::Control(ControlMessage::Suspend(suspension)) => {
                for mail in &mut self.mail {
                    mail.push_back(ShardMessage::Suspend(suspension.clone()));
                }
            }
            Action::Control(ControlMessage::Released { rollup, state, .. }) => match state {
                Some(state) => self.mail[self.moving[&rollup]].push_back(ShardMessage::TakeOver(state)),
                None => self.moves.push((rollup, false)),
            },
            Action::Control(ControlMessage::TookOver { shard, rollup }) => {
                self.owners.insert((rollup.source, Arc::clone(&rollup.rollup)), shard);
                for mail in &mut self.mail {
                    mail.push_back(ShardMessage::Moved { rollup: rollup.clone(), owner: shard });
                }
                self.moves.push((rollup, true));
            }
            Action::Control(ControlMessage::Reloaded { .. }) => {}
            Action::Reserve(reservation) => self.soon(self.reserving_takes, Event::Reserved(shard, reservation)),
            Action::Injected { answer: Err(refusal), .. } if refusal.code() == 450 => self.put_off += 1,
            Action::Injected { answer, .. } => _ = answer.unwrap(),
            Action::Events(_) | Action::SessionAcknowledge { .. } | Action::ConnectionAcknowledge { .. } => {}
            action => unreachable!("{action:?}"),
        }
    }

    /// A sink takes everything.
    fn read(&mut self, shard: usize, connection: ConnectionKey, octets: &[u8]) -> String {
        let peer = self.peers.get_mut(&(shard, connection)).unwrap();
        peer.input.extend_from_slice(octets);
        let mut replies = String::new();
        while let Some(end) = peer.input.windows(2).position(|pair| pair == b"\r\n") {
            let line: Vec<u8> = peer.input.drain(..end + 2).collect();
            let line = String::from_utf8(line).unwrap();
            if peer.is_content {
                if line == ".\r\n" {
                    peer.is_content = false;
                    replies += "250 taken\r\n";
                }
                continue;
            }
            let mails = &mut self.sinks.get_mut(&peer.to.unwrap()).unwrap().mails;
            match &line[..4] {
                "EHLO" if self.are_sinks_odd => replies += "250-peer.example\r\n250 8BITMIME\r\n",
                "EHLO" => replies += "250-peer.example\r\n250-PIPELINING\r\n250 8BITMIME\r\n",
                "RCPT" if self.are_sinks_odd && mails.len().is_multiple_of(2) => {
                    replies += "550 5.1.1 nobody\r\n";
                    continue;
                }
                "MAIL" => {
                    mails.push((self.now, 0));
                    let domain = line.split(['@', '.']).nth(1).unwrap_or_default();
                    self.senders.entry(domain.to_owned()).or_default().push(self.now);
                }
                "RCPT" => {
                    mails.last_mut().unwrap().1 += 1;
                    *self.sources.entry((peer.source, peer.to.unwrap())).or_default() += 1;
                }
                "DATA" => {
                    replies += "354 go\r\n";
                    peer.is_content = true;
                    continue;
                }
                "QUIT" | "RSET" => {}
                _ => unreachable!("{line}"),
            }
            if !line.starts_with("EHLO") {
                replies += "250 ok\r\n";
            }
        }
        replies
    }

    fn happen(&mut self, event: Event) {
        let now = self.clock();
        match event {
            Event::Connected(shard, connection) => {
                let Some(peer) = self.peers.get(&(shard, connection)) else { return };
                if self.are_sinks_down {
                    self.refused.push(self.now);
                    let peer = self.peers.remove(&(shard, connection)).unwrap();
                    self.sinks.get_mut(&peer.to.unwrap()).unwrap().open -= 1;
                    let error = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
                    return self.shards[shard].connect_failed(now, connection, &error);
                }
                let made = Connected { local: "127.0.0.1:5000".parse().ok(), peer: peer.to.unwrap() };
                self.shards[shard].connected(now, connection, made);
                self.shards[shard].connection_received(now, connection, b"220 peer.example\r\n");
            }
            Event::Replies(shard, connection, replies) => {
                self.shards[shard].connection_received(now, connection, replies.as_bytes());
            }
            Event::Gone(shard, connection) => {
                let Some(peer) = self.peers.remove(&(shard, connection)) else { return };
                self.sinks.get_mut(&peer.to.unwrap()).unwrap().open -= 1;
                self.shards[shard].connection_gone(now, connection);
            }
            Event::Reserved(shard, Reservation { limit, at_ms, units, .. }) => {
                self.reserved.entry(limit.to_string()).or_default().reserved.push((at_ms, units));
                self.mail[shard].push_back(ShardMessage::Reserved { limit, units });
            }
        }
    }

    fn sink(&self, address: &str) -> &Sink {
        &self.sinks[&Endpoint::Ip(address.parse().unwrap())]
    }
}

impl Sink {
    /// The most recipients in any half-open window of this length.
    fn most_within(&self, period: Duration) -> u32 {
        let window = |&(from, _): &(Duration, u32)| {
            let within = self.mails.iter().filter(|(at, _)| (from..from + period).contains(at));
            within.map(|(_, recipients)| recipients).sum()
        };
        self.mails.iter().map(window).max().unwrap_or_default()
    }

    fn between(&self, from: Duration, to: Duration) -> usize {
        self.mails.iter().filter(|(at, _)| (from..to).contains(at)).count()
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// As many are queued as could not go in the time; the other site's mail is queued behind them.
fn queue(engine: &mut Engine, slow: usize, fast: usize) {
    for (count, domain) in [(slow, "slow.test"), (fast, "fast.test")] {
        for number in 0..count {
            engine.inject(number % engine.shards.len(), &format!("r{number}@{domain}"), Priority::Normal);
        }
    }
}

/// As the environment says, or else so many.
fn queued(usual: usize) -> usize {
    std::env::var("ENGINE_LIMITS_QUEUED").map_or(usual, |count| count.parse().unwrap())
}

fn holds_over_a_kill(rules: &str, shards: [usize; 2], period: Duration, limit: u32, life: Duration) {
    let mut engine = Engine::start(rules, shards[0]);
    let mean = f64::from(limit) / period.as_secs_f64();
    queue(&mut engine, queued((3.0 * mean * life.as_secs_f64()) as usize), 2_000);
    engine.run_until(seconds(10));
    assert_eq!(engine.sink(FAST).mails.len(), 2_000, "the other site is not held up");
    engine.run_until(life);
    let mut engine = engine.kill(shards[1]);
    let again = engine.now;
    engine.run_until(again + life);
    let slow = engine.sink(SLOW);
    assert!(slow.open_most <= 5, "{} connections", slow.open_most);
    let most = slow.most_within(period);
    assert!(most <= limit, "{most} within {period:?}");
    for from in [Duration::ZERO, again] {
        // The first second of a life counts as used up.
        let (from, to) = (from + seconds(1), from + life);
        let sent = slow.between(from, to) as f64 / (to - from).as_secs_f64();
        assert!(sent >= 0.95 * mean, "{sent} a second from {from:?} on, of {mean}");
    }
}

const TWENTY: &str = "[shaping.\"slow.test\"]\nconnection_limit = 5\nmax_message_rate = \"20/s\"\n";

#[test]
fn a_rate_and_a_connection_limit_hold_over_a_kill() {
    holds_over_a_kill(TWENTY, [2, 2], seconds(1), 20, seconds(20));
}

#[test]
fn they_hold_with_more_shards_and_after_a_change_of_their_number() {
    holds_over_a_kill(TWENTY, [4, 2], seconds(1), 20, seconds(20));
    holds_over_a_kill(TWENTY, [1, 4], seconds(1), 20, seconds(20));
}

/// A window of a minute spans the crash: what was sent before counts after it.
#[test]
fn a_longer_rate_holds_over_a_kill() {
    let rules = "[shaping.\"slow.test\"]\nconnection_limit = 5\nmax_message_rate = \"600/min\"\n";
    holds_over_a_kill(rules, [2, 4], seconds(60), 600, seconds(90));
}

/// After the kill only what the last minute left over, and no more than a hundredth is lost.
#[test]
fn a_burst_is_remembered_over_a_kill() {
    let rules = "[shaping.\"slow.test\"]\nconnection_limit = 5\nmax_message_rate = \"600/min,max_burst=300\"\n";
    let mut engine = Engine::start(rules, 2);
    queue(&mut engine, 3_000, 0);
    engine.run_until(seconds(25));
    let before = engine.sink(SLOW).mails.len();
    assert!(before >= 500, "{before}");
    let mut engine = engine.kill(2);
    engine.run_until(seconds(55));
    let sent = engine.sink(SLOW).mails.len();
    assert!(sent <= 600, "{sent} in the first minute");
    engine.run_until(seconds(200));
    let most = engine.sink(SLOW).most_within(seconds(60));
    assert!((500..=600).contains(&most), "{most}");
}

/// A paced pair holds few tickets, and what is more urgent goes first.
#[test]
fn an_urgent_message_passes_bulk_at_a_paced_site() {
    for shards in [1, 2, 4] {
        let mut engine = Engine::start(TWENTY, shards);
        for number in 0..2_000 {
            engine.inject(number % shards, &format!("r{number}@slow.test"), Priority::Bulk);
        }
        engine.run_until(seconds(5));
        engine.inject(shards - 1, "urgent@slow.test", Priority::High);
        engine.run_until(seconds(5) + Duration::from_millis(200));
        let left = |engine: &Engine| {
            let home = &engine.shards[shards - 1].home;
            home.entries().filter(|(key, _)| home.queue_of(*key).priority == Priority::High as u8).count()
        };
        assert_eq!(left(&engine), 0, "with {shards} shards it has gone within 0.2 s");
    }
}

/// The provider's limits are over its sites; each gets its turn.
#[test]
fn a_providers_limits_hold_over_its_sites() {
    let rules = "[provider.p]\nmatch = [{ domain = \"slow.test\" }, { domain = \"fast.test\" }]\nconnection_limit = 3\n\
                 provider_connection_limit = 4\nprovider_max_message_rate = \"20/s\"\n";
    let mut engine = Engine::start(rules, 2);
    queue(&mut engine, 1_000, 1_000);
    engine.run_until(seconds(21));
    let (slow, fast) = (engine.sink(SLOW), engine.sink(FAST));
    assert!(slow.open_most + fast.open_most <= 6 && slow.open_most <= 3 && fast.open_most <= 3);
    let mut all = Sink { mails: [slow.mails.clone(), fast.mails.clone()].concat(), ..Sink::default() };
    all.mails.sort();
    assert!(all.most_within(seconds(1)) <= 20);
    assert!(all.mails.len() >= 380, "{}", all.mails.len());
    assert!(slow.mails.len().abs_diff(fast.mails.len()) < 40, "{} and {}", slow.mails.len(), fast.mails.len());
}

/// Few messages for a provider whose rate is reserved ahead: each goes, though nothing comes behind it, and those that
/// wait say so.
#[test]
fn a_providers_rate_lets_few_messages_pass() {
    for (shards, both) in [(1, false), (1, true), (2, false), (2, true)] {
        let rules = "[provider.p]\nmatch = [{ domain = \"slow.test\" }, { domain = \"fast.test\" }]\n\
                     provider_max_message_rate = \"1/min\"\n";
        let mut engine = Engine::start(rules, shards);
        let what = format!("{shards} shards, both sites: {both}");
        for (number, domain) in ["slow.test", if both { "fast.test" } else { "slow.test" }].iter().enumerate() {
            engine.inject(number % shards, &format!("r{number}@{domain}"), Priority::Normal);
        }
        let sent = |engine: &Engine| engine.sinks.values().map(|sink| sink.mails.len()).sum::<usize>();
        engine.run_until(seconds(5));
        assert_eq!(sent(&engine), 1, "{what}");
        let homes = engine.shards.iter().map(|shard| &shard.home);
        let waiting: Vec<_> = homes.flat_map(|home| home.entries().map(move |(key, _)| (home, key))).collect();
        assert_eq!(waiting.len(), 1, "{what}");
        for (home, key) in waiting {
            assert_eq!(home.blocked_by(key).map(|it| &*it.reason), Some("rate limit of 1/min"), "{what}");
        }
        engine.run_until(seconds(65));
        assert_eq!(sent(&engine), 2, "{what}");
    }
}

/// One connection for two sites: neither keeps it for ever.
#[test]
fn a_providers_connections_go_round() {
    let rules = "[provider.p]\nmatch = [{ domain = \"slow.test\" }, { domain = \"fast.test\" }]\n\
                 provider_connection_limit = 1\nmax_deliveries_per_connection = 10\n";
    let mut engine = Engine::start(rules, 2);
    queue(&mut engine, 500, 500);
    engine.run_until(seconds(10));
    for (address, sink) in &engine.sinks {
        assert_eq!(sink.open_most, 1);
        assert!(sink.mails.len() >= 100, "{address}: {}", sink.mails.len());
    }
    engine.run_until(seconds(60));
    assert!(engine.sinks.values().all(|sink| sink.mails.len() == 500));
}

/// Two sites want more than there are, and their messages take long: what one of them gets is used before the other
/// has it, and who has as many as the other keeps them.
#[test]
fn a_providers_connections_are_used_before_they_give_way() {
    for deliveries in [1, 100] {
        let rules = format!(
            "[provider.p]\nmatch = [{{ domain = \"slow.test\" }}, {{ domain = \"fast.test\" }}]\n\
             connection_limit = 3\nprovider_connection_limit = 4\n\
             max_deliveries_per_connection = {deliveries}\n"
        );
        let mut engine = Engine::start(&rules, 2);
        engine.content_takes = seconds(5);
        queue(&mut engine, 100, 100);
        engine.run_until(seconds(61));
        let [slow, fast] = [SLOW, FAST].map(|address| engine.sink(address));
        let (sent, opened) = ([slow.mails.len(), fast.mails.len()], slow.opened + fast.opened);
        assert!(sent.iter().all(|sent| *sent >= 20), "{deliveries} a connection: {sent:?}");
        let used_most = if deliveries == 1 { sent[0] + sent[1] } else { 5 };
        assert!(opened <= used_most, "{deliveries} a connection: {opened} connections for {sent:?}");
    }
}

/// The only connection may make many deliveries, and is no good for one domain's mail: that waits for a hundred.
#[test]
fn mail_that_fits_no_connection_gets_one() {
    for limit in [
        "[shaping.default]\nconnection_limit = 1\n",
        "[provider.p]\nmatch = [{ domain = \"fast.test\" }, { domain = \"other.test\" }]\n\
         provider_connection_limit = 1\n",
    ] {
        let mut config = config(&format!("{limit}max_deliveries_per_connection = 100000\n"));
        let route = Route::new(DomainPattern::Exact("fast.test".into()), config.routes[1].to.clone());
        config.routes.insert(0, Route { tls: Some(TlsMode::Disabled), ..route });
        let mut engine =
            Engine::live(Arc::new(config), SimDisk::new(1), 1, Duration::ZERO, BTreeMap::new(), HashMap::new());
        engine.content_takes = Duration::from_millis(10);
        queue(&mut engine, 0, 1_000);
        engine.run_until(seconds(1));
        let others = (0..3).map(|number| format!("r{number}@other.test")).collect();
        engine.inject_to(0, others, Priority::High);
        engine.run_until(seconds(60));
        let fast = engine.sink(FAST);
        let sent_before = fast.mails.iter().position(|(_, recipients)| *recipients == 3);
        assert!(sent_before.is_some_and(|sent| sent <= 300), "{limit}: {sent_before:?} of {}", fast.mails.len());
        assert_eq!((fast.mails.len(), fast.opened), (1_001, 2), "{limit}");
    }
}

/// The only connection that a provider allows is busy, and may be for long: after a hundred deliveries who stands first
/// in line has it. The busy site stood there before the other one.
#[test]
fn sites_take_turns_at_the_only_connection_of_their_provider() {
    let rules = "[provider.p]\nmatch = [{ domain = \"slow.test\" }, { domain = \"fast.test\" }]\n\
                 provider_connection_limit = 1\nmax_deliveries_per_connection = 100000\n";
    let mut engine = Engine::start(rules, 2);
    engine.content_takes = Duration::from_millis(10);
    queue(&mut engine, 0, 1_000);
    engine.run_until(seconds(1));
    let sent_before = engine.sink(FAST).mails.len();
    queue(&mut engine, 150, 0);
    engine.run_until(seconds(60));
    let [slow, fast] = [SLOW, FAST].map(|address| engine.sink(address));
    assert_eq!((slow.mails.len(), fast.mails.len()), (150, 1_000));
    let first = slow.mails[0].0;
    let meanwhile = fast.mails.iter().filter(|(at, _)| *at < first).count() - sent_before;
    assert!(meanwhile <= 200, "{meanwhile} went before the other site's first");
    assert_eq!(slow.opened, 2, "a hundred in a row");
    assert!(fast.opened <= 5, "{} connections: none is in the other's way any more", fast.opened);
}

/// At one of its sites no host has the TLS that is required. One domain after the other finds out, and makes no room
/// for what it can't use: the other site's connections would come and go, one for each of them.
#[test]
fn who_can_not_connect_takes_no_connection_of_a_provider() {
    let domains: Vec<String> = (0..40).map(|number| format!("d{number}.test")).collect();
    let matched = domains.iter().map(String::as_str).chain(["fast.test"]);
    let matched: Vec<String> = matched.map(|domain| format!("{{ domain = \"{domain}\" }}")).collect();
    let mut config =
        config(&format!("[provider.p]\nmatch = [{}]\nprovider_connection_limit = 2\n", matched.join(", ")));
    for domain in &domains {
        let to = vec![RouteTarget::Address(SLOW.parse().unwrap())];
        let route = Route::new(DomainPattern::Exact(domain.clone()), to);
        config.routes.insert(0, Route { tls: Some(TlsMode::Required), ..route });
    }
    let mut engine =
        Engine::live(Arc::new(config), SimDisk::new(1), 1, Duration::ZERO, BTreeMap::new(), HashMap::new());
    engine.inject(0, &format!("r@{}", domains[0]), Priority::Normal);
    engine.run_until(seconds(1));
    assert_eq!(engine.sink(SLOW).opened, 1, "it is known what it lacks");
    engine.content_takes = Duration::from_millis(100);
    queue(&mut engine, 0, 400);
    engine.run_until(seconds(2));
    let before = engine.sink(FAST).opened;
    for (place, domain) in domains.iter().enumerate().skip(1) {
        engine.inject(0, &format!("r@{domain}"), Priority::Normal);
        engine.run_until(seconds(2) + place as u32 * Duration::from_millis(200));
    }
    let fast = engine.sink(FAST);
    assert!(fast.mails.len() > 100 && engine.sink(SLOW).mails.is_empty(), "{}", fast.mails.len());
    assert!(fast.opened <= before + 2, "{} connections for {} messages", fast.opened, fast.mails.len());
}

#[test]
fn new_connections_are_paced() {
    let rules = "[shaping.\"slow.test\"]\nmax_connection_rate = \"2/s\"\nmax_deliveries_per_connection = 1\n";
    let mut engine = Engine::start(rules, 2);
    queue(&mut engine, 100, 0);
    engine.run_until(seconds(11));
    let sent = engine.sink(SLOW).mails.len();
    assert!((19..=20).contains(&sent), "one message a connection, two connections a second: {sent}");
}

/// `blocked_by` says what holds a message that waits for its rate.
#[test]
fn a_paced_message_says_what_holds_it() {
    let mut engine = Engine::start("[shaping.\"slow.test\"]\nmax_message_rate = \"1/min\"\n", 1);
    queue(&mut engine, 10, 0);
    engine.run_until(seconds(5));
    let home = &engine.shards[0].home;
    let blocked = home.entries().find_map(|(key, _)| home.blocked_by(key)).expect("one of them tells");
    assert_eq!(&*blocked.reason, "rate limit of 1/min");
    let next = blocked.until_ms - START.wall_ms;
    assert!((60_000..61_000).contains(&next), "{next}");
}

/// So does all that waits with it: tickets that the owner has, and what comes while nothing may go.
#[test]
fn all_that_waits_for_a_rate_says_so() {
    for shards in [1, 2] {
        let mut engine = Engine::start("[shaping.\"slow.test\"]\nmax_message_rate = \"1/min\"\n", shards);
        for second in 1..=4 {
            for number in 0..2 {
                engine.inject(second as usize % shards, &format!("r{second}{number}@slow.test"), Priority::Normal);
            }
            engine.run_until(seconds(second));
        }
        engine.run_until(seconds(5));
        assert_eq!(engine.sink(SLOW).mails.len(), 1);
        let homes = engine.shards.iter().map(|shard| &shard.home);
        let waiting: Vec<_> = homes.flat_map(|home| home.entries().map(move |(key, _)| (home, key))).collect();
        assert_eq!(waiting.len(), 7, "with {shards} shards");
        for (home, key) in waiting {
            let reason = home.blocked_by(key).map(|blocked| &*blocked.reason);
            assert_eq!((home.state_name(key), reason), ("ready", Some("rate limit of 1/min")), "with {shards} shards");
        }
    }
}

/// The same for what comes while the first one is on its way, whenever that is.
#[test]
fn what_comes_while_another_is_on_its_way_says_what_it_waits_for() {
    for shaping in [
        "[shaping.\"slow.test\"]\nmax_message_rate",
        "[provider.p]\nmatch = [{ domain = \"slow.test\" }]\n\
                     provider_max_message_rate",
    ] {
        for late_ms in 0..40 {
            let shards = 1 + late_ms as usize % 2;
            let mut engine = Engine::start(&format!("{shaping} = \"1/min\"\n"), shards);
            engine.run_until(seconds(1));
            for number in 0..3 {
                engine.inject(number % shards, &format!("r{number}@slow.test"), Priority::Normal);
                engine.run_until(seconds(1) + Duration::from_millis(late_ms * (number as u64 + 1)));
            }
            engine.run_until(seconds(8));
            assert_eq!(engine.sink(SLOW).mails.len(), 1, "{late_ms} ms");
            let homes = engine.shards.iter().map(|shard| &shard.home);
            for (home, key) in homes.flat_map(|home| home.entries().map(move |(key, _)| (home, key))) {
                let reason = home.blocked_by(key).map(|blocked| &*blocked.reason);
                let state = (home.state_name(key), reason);
                assert_eq!(state, ("ready", Some("rate limit of 1/min")), "{shaping}, {late_ms} ms");
            }
        }
    }
}

/// A transaction of many recipients would be a burst.
#[test]
fn a_transaction_is_divided_as_its_rate_asks() {
    let mut engine = Engine::start("[shaping.\"slow.test\"]\nmax_message_rate = \"100/s\"\n", 1);
    engine.inject_to(0, (0..52).map(|place| format!("r{place}@slow.test")).collect(), Priority::Normal);
    engine.run_until(seconds(3));
    let sizes: Vec<u32> = engine.sink(SLOW).mails.iter().map(|(_, recipients)| *recipients).collect();
    assert_eq!(sizes.iter().sum::<u32>(), 52, "each once");
    assert!(sizes.iter().all(|size| *size <= 5), "{sizes:?}");
}

const TENANTS: &str = "[[tenant]]\nname = \"large\"\n[[tenant]]\nname = \"small\"\n[[tenant]]\nname = \"bulk\"\n\
                       priority = \"bulk\"\n[[tenant]]\nname = \"high\"\npriority = \"high\"\n";

fn tenants(rate: &str) -> String {
    format!("{TENANTS}[shaping.\"slow.test\"]\nmax_message_rate = \"{rate}\"\n")
}

/// FAIR: a tenant's hundred messages are not buried by another's many, wherever they are, and however many campaigns
/// the other spreads its own over.
#[test]
fn a_small_tenant_is_not_buried_by_a_large_one() {
    for shards in [1, 2, 4] {
        for (campaigns, spread) in [(1, true), (1, false), (50, false)] {
            let mut engine = Engine::start(&tenants("100/s"), shards);
            for number in 0..queued(3_000) {
                engine.inject_of(number % shards, "large", number % campaigns);
            }
            engine.run_until(seconds(2));
            let large = engine.senders["large"].len();
            for number in 0..100 {
                engine.inject_of(if spread { number % shards } else { shards - 1 }, "small", 0);
            }
            engine.run_until(seconds(5));
            let what = format!("{shards} shards, {campaigns} campaigns, spread: {spread}");
            assert_eq!(engine.senders["small"].len(), 100, "{what}: the last leaves within 3 s");
            let large = engine.senders["large"].len() - large;
            assert!(large >= 95 * 3 - 100, "{what}: {large} of the others meanwhile");
            assert!(engine.sink(SLOW).most_within(seconds(1)) <= 100);
        }
    }
}

/// FAIR: one high message passes all bulk, and any number of them leave bulk its part of twenty-one.
#[test]
fn high_passes_bulk_and_bulk_does_not_starve() {
    for shards in [1, 2, 4] {
        let mut engine = Engine::start(&tenants("20/s"), shards);
        for number in 0..queued(3_000) {
            engine.inject_of(number % shards, "bulk", 0);
        }
        for second in 5..10 {
            engine.run_until(seconds(second));
            engine.inject_of(second as usize % shards, "high", 0);
            engine.run_until(seconds(second) + Duration::from_millis(200));
            let sent = engine.senders["high"].len();
            assert_eq!(sent, second as usize - 4, "with {shards} shards it has left within 0.2 s");
        }
        for number in 0..3_000 {
            engine.inject_of(number % shards, "high", 0);
        }
        engine.run_until(seconds(10));
        let before = engine.senders["bulk"].len();
        engine.run_until(seconds(10 + 63));
        let (bulk, all) = (engine.senders["bulk"].len() - before, engine.sink(SLOW).between(seconds(10), seconds(73)));
        assert!(all >= 63 * 19, "{all}");
        assert!(bulk >= all / 21 - 1, "{bulk} of {all} with {shards} shards");
        assert!(bulk <= all / 17 + 4, "{bulk} of {all} with {shards} shards: nothing normal waits");
    }
}

/// FAIR: higher classes pass a lower one's only message some times, not for as long as they last.
#[test]
fn a_lone_bulk_message_is_not_passed_for_ever() {
    for shards in [1, 2, 4] {
        let mut engine = Engine::start(&tenants("20/s"), shards);
        for number in 0..3_000 {
            engine.inject_of(number % shards, "high", 0);
        }
        engine.run_until(seconds(5));
        engine.inject_of(shards - 1, "bulk", 0);
        engine.run_until(seconds(7));
        assert_eq!(engine.senders["bulk"].len(), 1, "with {shards} shards");
    }
}

/// Without PIPELINING a MAIL behind a refused transaction waits for the reply to RSET: it counts when it is written.
#[test]
fn what_waits_behind_a_reset_counts_when_it_is_written() {
    let rules = "[shaping.\"slow.test\"]\nconnection_limit = 1\nmax_message_rate = \"2/s\"\n";
    let mut engine = Engine::start(rules, 1);
    engine.are_sinks_odd = true;
    queue(&mut engine, 60, 0);
    engine.run_until(seconds(20));
    let sink = engine.sink(SLOW);
    assert!(sink.mails.len() >= 36, "{}", sink.mails.len());
    let times: Vec<Duration> = sink.mails.iter().map(|(at, _)| *at).collect();
    assert!(times.windows(3).all(|three| three[2] - three[0] >= seconds(1)), "{times:?}");
}

/// A site that takes nothing holds up none of another's mail.
#[test]
fn a_slow_site_never_delays_another() {
    for shards in [1, 2, 4] {
        let mut engine = Engine::start(&tenants("1/min"), shards);
        queue(&mut engine, 2_000, 0);
        engine.run_until(seconds(2));
        assert!(engine.sink(SLOW).mails.len() <= 1);
        queue(&mut engine, 0, 1_000);
        engine.run_until(seconds(5));
        assert_eq!(engine.sink(FAST).mails.len(), 1_000, "with {shards} shards");
    }
}

/// Its home would send the owner the same ticket without end.
#[test]
fn what_only_its_owner_takes_for_suspended_does_not_go_to_and_fro() {
    let mut engine = Engine::start("", 2);
    let until = seconds(60);
    let suspension = Suspension {
        id: 1,
        scope: Scope { domain: Some(SLOW_DOMAIN.into()), ..Scope::default() },
        effect: Effect::Stop,
        reason: "slow down".into(),
        until_ms: engine.clock().wall_ms + until.as_millis() as u64,
    };
    engine.inject(1, &format!("r@{SLOW_DOMAIN}"), Priority::Normal);
    engine.run_until(seconds(1));
    assert_eq!(engine.owners.values().collect::<Vec<_>>(), [&0], "the other shard has the pair");
    engine.mail[0].push_back(ShardMessage::Suspend(Box::new(suspension)));
    engine.run_until(seconds(2));
    let sent = engine.sink(SLOW).mails.len();
    (0..5).for_each(|_| engine.inject(1, &format!("r@{SLOW_DOMAIN}"), Priority::Normal));
    engine.run_until(seconds(30));
    assert_eq!(engine.sink(SLOW).mails.len(), sent);
    assert_eq!(engine.shards[1].home.ready(), 5, "they wait, and are tried once a second");
    engine.run_until(until + seconds(2));
    assert_eq!(engine.sink(SLOW).mails.len(), sent + 5);
}
