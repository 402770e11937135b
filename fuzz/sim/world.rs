//! A whole engine in virtual time, over several lives: its shards, disk, clients, peers, network, DNS, event log and
//! control thread.
//!
//! A run has two phases. In the first everything fails that the run's mix has in it, and the promises of safety must
//! hold at every moment. Then all heals and no mail comes any more: within bounded time every message must have come to
//! its end.
//!
//! Over 500 lines: each event of a run, and all actions of a shard, meet here.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider::accept::Policy;
use postrider::admin::metrics::ShardMetrics;
use postrider::admin::{MessageFilter, MessageRow};
use postrider::config::{
    AutomationRule, Chunking, Config, DomainPattern, EgressPool, EgressSource, InDoubt, RetrySchedule, Route,
    RouteMatch, RouteTarget, TlsMode, Wildcard,
};
use postrider::deliver::route::{RouteFailure, RouteFailureKind};
use postrider::deliver::verdict::SESSION_RULES;
use postrider::handover::{self, Ask, ControlMessage, PairKey, RouteKey, ShardMessage, Told};
use postrider::limits::MemoryBounds;
use postrider::outcome::event::{Logged, LoggedRecord};
use postrider::pool::connection::ConnectionKey;
use postrider::pool::rate::Past;
use postrider::pool::suspension::Suspension;
use postrider::progress::{self, Progress, SharedProgress};
use postrider::shard::{Action, Reservation, SessionKey, Shard, ShardOptions};
use postrider_spool::record::{LogId, Outcome};
use postrider_spool::sim::SimDisk;
use postrider_spool::{Completion, Durability, Operation, Spool, SpoolOptions};

use crate::back_off::Failures;
use crate::blame;
use crate::calm::{self, Connects};
use crate::canary::Canary;
use crate::checker::{Counts, Ledger, Marker, domain_of};
use crate::client::Client;
use crate::clock::{Clock, HOUR, MINUTE, MS, Micros, SECOND, WALL_MS_AT_START};
use crate::counted::Counted;
use crate::disk::Weather;
use crate::dns::{Dns, IMPLICIT, SMTP_PORT};
use crate::dsn;
use crate::event_log::EventLog;
use crate::families;
use crate::fired::Fired;
use crate::lmtp;
use crate::mix::{Fault, Mix, spread};
use crate::moves::Moves;
use crate::net::{Link, LinkId, NetEvent, address_of};
use crate::operate;
use crate::peer::Host;
use crate::press::Press;
use crate::providers::{self, Rollup};
use crate::random::Random;
use crate::rates::{self, Rates};
use crate::reload::Reloads;
use crate::suspensions::{self, InForce};
use crate::tenants;
use crate::tls::{Policies, Told as ToldPolicies};
use crate::wall;
use crate::warmup;
use crate::workload::{self, Campaign};

/// What happens next, and to whom.
#[derive(Debug)]
pub(crate) enum Event {
    /// A shard wanted a turn by now.
    Turn {
        shard: usize,
    },
    Execute(u64),
    Completed {
        shard: usize,
        log: LogId,
        completion: Completion,
    },
    Mail {
        to: usize,
    },
    /// The control thread's answers overtake each other.
    Answer {
        to: usize,
        message: Box<ShardMessage>,
    },
    /// What the DNS said of a domain, under so manieth configuration.
    Routed {
        to: usize,
        key: RouteKey,
        result: Box<Result<handover::Route, RouteFailure>>,
        policies: Option<Box<ToldPolicies>>,
        reloads: usize,
    },
    /// It is durable.
    Reserved {
        to: usize,
        reservation: Reservation,
    },
    Net(LinkId, NetEvent),
    Operate,
    Client {
        shard: usize,
        session: SessionKey,
    },
    Submit,
    WriteEvents,
    Compare,
    /// Hosts go down, and come back.
    Hosts,
    /// Pairs are to move to another shard.
    Move,
    Reload,
    SetClock,
    /// A limit may have little left, while mail waits.
    Press,
    EndLife,
    Heal,
}

/// What a run was like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) counts: Counts,
    pub(crate) duration: Micros,
    pub(crate) shards_max: usize,
    pub(crate) crashes: u64,
    /// Pairs that moved to another shard.
    pub(crate) moves: u64,
    pub(crate) faults: Vec<(&'static str, u64)>,
    pub(crate) verdicts: BTreeMap<&'static str, u64>,
    /// Verdicts on sessions.
    pub(crate) sessions: BTreeMap<&'static str, u64>,
    pub(crate) events: u64,
    /// The most turns that all shards took in one second.
    pub(crate) turns_max: u64,
    /// Of all that happened, and when.
    pub(crate) digest: u64,
}

impl Report {
    /// Whether the run was long and full enough to show anything.
    pub(crate) fn counts_as_run(&self) -> bool {
        self.duration >= HOUR && self.counts.recipients >= 2_000 && self.shards_max >= 2 && self.crashes >= 1
    }
}

pub(crate) struct World {
    pub(crate) clock: Clock<Event>,
    pub(crate) random: Random,
    /// For what only some runs have, so that the others stay as they were.
    pub(crate) own: Random,
    pub(crate) mix: Mix,
    pub(crate) canary: Option<Canary>,
    pub(crate) ledger: Ledger,
    /// There are tenants, rates and limits.
    pub(crate) has_rates: bool,
    pub(crate) rates: Rates,
    pub(crate) rollup: Rollup,
    pub(crate) tls: Policies,
    events: EventLog,
    /// New messages that may still wait for it.
    waiting_messages: usize,
    events_fail_until: Micros,

    // the world around
    pub(crate) hosts: Vec<Host>,
    pub(crate) dns: Dns,
    pub(crate) links: BTreeMap<LinkId, Link>,
    pub(crate) links_of: BTreeMap<(usize, ConnectionKey), LinkId>,
    pub(crate) next_link: LinkId,
    pub(crate) clients: BTreeMap<(usize, SessionKey), Client>,
    pub(crate) injections: BTreeMap<u64, Marker>,
    pub(crate) campaigns: Vec<Campaign>,
    pub(crate) next_content: u64,
    pub(crate) recipients_wanted: u64,
    pub(crate) pause_max: Micros,
    /// In bounded time after this everything must have come to its end.
    heal_at: Micros,
    lives_left: u64,

    // the disk
    pub(crate) disk: SimDisk,
    pub(crate) weather: Weather,
    pub(crate) operations: BTreeMap<u64, (usize, LogId, Operation)>,
    pub(crate) next_operation: u64,

    /// As the operator has written it; a canary may have the engine read another.
    pub(crate) wanted: Arc<Config>,
    /// What was reserved of limits, over all lives.
    pub(crate) reserved: HashMap<String, Past>,
    pub(crate) reloads: Reloads,
    pub(crate) press: Press,
    pub(crate) counted: Counted,

    // the engine's present life
    pub(crate) config: Arc<Config>,
    spool_options: SpoolOptions,
    pub(crate) policy: Arc<Policy>,
    /// Of each shard, sessions and connections.
    pub(crate) sockets_max: usize,
    pub(crate) shards: Vec<Shard>,
    pub(crate) metrics: Vec<Arc<ShardMetrics>>,
    /// What this life notes for the next.
    pub(crate) progress: Vec<SharedProgress>,
    /// The log of each shard that takes mail.
    active: Vec<LogId>,
    /// Those that no shard has of its own: they drain.
    draining: BTreeSet<LogId>,
    stopped: Vec<bool>,
    is_stopping: bool,
    armed: Vec<Micros>,
    /// The second of the last turn, and the turns that were taken in it.
    turns: (Micros, u64),
    stalled_until: Vec<Micros>,
    waiting_mail: Vec<VecDeque<ShardMessage>>,
    mail_at: Vec<Micros>,
    pub(crate) owners: BTreeMap<(usize, Arc<str>), usize>,
    pub(crate) moves: Moves,
    /// What rules have made, as the control thread keeps it over lives.
    pub(crate) suspensions: Vec<Suspension>,
    /// By shard, when it hears of the last of them: the control thread's mailboxes keep their order.
    suspensions_heard: BTreeMap<usize, Micros>,
    pub(crate) in_force: InForce,
    pub(crate) failures: Failures,
    pub(crate) fired: Fired,
    answers: BTreeMap<u64, Vec<MessageRow>>,
    pub(crate) questions: u64,
    pub(crate) operator: Option<Random>,
    /// For the time behind the run.
    pub(crate) calm: Option<Random>,
    pub(crate) connects: Option<Connects>,
    /// What those draw that speak LMTP.
    pub(crate) lmtp: Option<Random>,
    /// Senders ask for notifications, and peers offer them.
    pub(crate) has_dsn: bool,
    /// How many recipients an operator's choice were.
    pub(crate) chosen: BTreeMap<u64, u64>,
    // Holds the lock of the spool's directory.
    spool: Option<Spool>,

    report: Report,
}

/// What a run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Whole,
    Shares,
}

impl World {
    /// One run, to its end. Panics where a promise is broken.
    pub(crate) fn run(seed: u64, canary: Option<Canary>) -> Report {
        let mut world = Self::new(seed, canary, Kind::Whole);
        world.start(1 + (seed % 3) as usize);
        for event in [Event::Submit, Event::WriteEvents, Event::Hosts, Event::Compare] {
            world.clock.after(0, event);
        }
        for at in world.reloads.times(world.has_rates || world.tls.are_drawn, world.heal_at) {
            world.clock.at(at, Event::Reload);
        }
        if world.has_rates {
            world.clock.after(0, Event::Press);
        }
        if !world.has_rates && world.wanted.warmups.is_empty() && world.wanted.shaping.automation.is_empty() {
            wall::times(seed, world.heal_at).into_iter().for_each(|at| world.clock.at(at, Event::SetClock));
        }
        if world.mix.has(Fault::PairMoved) {
            world.clock.after(0, Event::Move);
        }
        if world.operator.is_some() {
            world.clock.after(10 * MINUTE, Event::Operate);
        }
        let lives = world.lives_left;
        for life in 1..=lives {
            let at = world.heal_at * life / (lives + 1) + world.random.below(MINUTE);
            world.clock.at(at, Event::EndLife);
        }
        world.clock.at(world.heal_at, Event::Heal);
        while !world.is_over() {
            world.step();
        }
        if world.is_plain() && !world.rollup.is_there() {
            world.be_calm();
        }
        for _ in 0..if world.has_rates { 2 } else { 0 } {
            world.compare_shares();
        }
        if world.has_rates {
            world.compare_campaigns();
        }
        world.finish()
    }

    /// Nothing but comparisons of shares, in a world that is well from the beginning.
    pub(crate) fn run_shares(seed: u64, canary: Option<Canary>) -> Report {
        let mut world = Self::new(RATES_EVERY * seed + RATES_AT, canary, Kind::Shares);
        world.start(1 + (seed % 3) as usize);
        world.heal_at = 0;
        world.heal();
        world.clock.after(0, Event::WriteEvents);
        for _ in 0..COMPARISONS {
            world.compare_shares();
        }
        world.compare_classes();
        world.finish()
    }

    pub(crate) fn step(&mut self) {
        let event = self.clock.next().expect("shards always want another turn");
        self.happen(event);
    }

    /// What the seed's mix is, for those who look for the cause of something.
    pub(crate) fn mix_of(seed: u64) -> Mix {
        Self::new(seed, None, Kind::Whole).mix
    }

    fn new(seed: u64, canary: Option<Canary>, kind: Kind) -> Self {
        let mut random = Random::new(seed);
        let mut mix = Mix::draw(&mut random, &mut Moves::new(seed).random);
        let mut config = config(&mut random);
        let holds = seed.is_multiple_of(3);
        if seed % 4 == 1 {
            config.shaping.automation = rules(&mut Random::new(seed));
        }
        let (has_rates, mut own) = (seed % RATES_EVERY == RATES_AT, Random::new(!seed));
        if has_rates {
            rates::draw(&mut config, &mut own);
            if kind == Kind::Whole {
                rates::draw_bursts(&mut config, &mut Random::new(seed.rotate_left(16)));
            }
        }
        let mut tls = Policies::new(seed, kind == Kind::Whole);
        tls.change_config(&mut config);
        config.shaping.in_doubt = if holds { InDoubt::Hold } else { InDoubt::Retry };
        let (mut hosts, mut dns) = internet(&config, &mut random, &mut mix);
        if kind == Kind::Whole && !has_rates {
            families::mix(seed, &mut config, &mut hosts);
        }
        dns.is_reversed = canary == Some(Canary::ReversedPreference);
        tls.begin(&hosts, &mut dns);
        let lmtp = if kind == Kind::Whole { lmtp::draw(seed, &mut dns) } else { None };
        if has_rates {
            rates::draw_narrow(&mut config, &hosts, &mut Random::new(seed.rotate_left(32)));
            if kind == Kind::Whole {
                rates::draw_shared_bursts(&mut config, &mut Random::new(seed.rotate_left(24)));
            }
        }
        let small = random.one_in(6);
        let (segment_bytes, max_bytes) = if small { (48 << 10, 3 << 20) } else { (128 << 10, 16 << 20) };
        let spool_options = SpoolOptions {
            segment_bytes,
            max_bytes,
            hot_bytes: 64 << 10,
            durability: Durability::Fsync,
            ..SpoolOptions::default()
        };
        let heal_at = HOUR + spread(&mut random, HOUR, 3);
        let may_warm_up = kind == Kind::Whole && !has_rates;
        let wall_ms = if may_warm_up { warmup::draw(&mut config, seed, heal_at) } else { WALL_MS_AT_START };
        let mut retries = BTreeMap::new();
        if has_rates && kind == Kind::Whole {
            retries = tenants::draw(seed, &mut config);
        }
        let mut rollup = Rollup::default();
        if kind == Kind::Whole && config.warmups.is_empty() {
            rollup = providers::draw(seed, &mut config, has_rates);
        }
        let config = Arc::new(config);
        let mut ledger = Ledger::new(config.retry.schedule.clone(), holds, Counts::default());
        retries.extend(rollup.retries(&hosts));
        ledger.retries = retries;
        ledger.max_age_ms = Some(config.retry.max_age.as_millis() as u64);
        let report = Report {
            counts: Counts::default(),
            duration: 0,
            shards_max: 0,
            crashes: 0,
            moves: 0,
            faults: Vec::new(),
            verdicts: BTreeMap::new(),
            sessions: BTreeMap::new(),
            events: 0,
            turns_max: 0,
            digest: 0,
        };
        let mut given = Config::clone(&config);
        given.shaping.connection_limit += u32::from(canary == Some(Canary::HigherLimit));
        if canary == Some(Canary::HigherRate) {
            rates::double(&mut given);
        }
        canary.iter().for_each(|canary| canary.misread(&mut given));
        let policy = Arc::new(Policy::new(&given).expect("it has no keys"));
        let given = Arc::new(given);
        Self {
            clock: Clock::new(wall_ms),
            own,
            mix,
            canary,
            ledger,
            has_rates,
            rates: Rates::default(),
            rollup,
            tls,
            events: EventLog::default(),
            waiting_messages: 0,
            events_fail_until: 0,
            hosts,
            dns,
            links: BTreeMap::new(),
            links_of: BTreeMap::new(),
            next_link: 0,
            clients: BTreeMap::new(),
            injections: BTreeMap::new(),
            campaigns: Vec::new(),
            next_content: 0,
            recipients_wanted: 2_000 + random.below(400),
            pause_max: (heal_at / 60).max(MINUTE),
            heal_at,
            lives_left: 1 + random.below(3),
            disk: SimDisk::new(seed),
            weather: Weather::default(),
            operations: BTreeMap::new(),
            next_operation: 0,
            sockets_max: if seed.is_multiple_of(SOCKETS_FEW_EVERY) { SOCKETS_FEW } else { SOCKETS_MAX },
            reloads: Reloads::new(seed, &config, &given, &policy),
            press: Press::new(seed),
            counted: Counted::default(),
            wanted: config,
            reserved: HashMap::new(),
            config: given,
            spool_options,
            policy,
            shards: Vec::new(),
            metrics: Vec::new(),
            progress: Vec::new(),
            active: Vec::new(),
            draining: BTreeSet::new(),
            stopped: Vec::new(),
            is_stopping: false,
            armed: Vec::new(),
            turns: (0, 0),
            stalled_until: Vec::new(),
            waiting_mail: Vec::new(),
            mail_at: Vec::new(),
            owners: BTreeMap::new(),
            moves: Moves::new(seed),
            suspensions: Vec::new(),
            suspensions_heard: BTreeMap::new(),
            in_force: InForce::default(),
            failures: Failures::default(),
            fired: Fired::default(),
            answers: BTreeMap::new(),
            questions: 0,
            calm: calm::draw(seed),
            connects: None,
            operator: operate::draw(seed).filter(|_| kind == Kind::Whole),
            lmtp,
            has_dsn: dsn::draw(seed) && kind == Kind::Whole,
            chosen: BTreeMap::new(),
            spool: None,
            random,
            report,
        }
    }

    /// What the shards of this life have counted.
    fn count_sessions(&mut self) {
        self.end_counting();
        for metrics in std::mem::take(&mut self.metrics) {
            for (rule, count) in SESSION_RULES.iter().zip(&metrics.session_failures) {
                *self.report.sessions.entry(rule.name).or_default() += count.get();
            }
        }
    }

    /// Starts an engine on what is on the disk, and checks that it is what was promised.
    fn start(&mut self, shards: usize) {
        self.calm_disk();
        self.disk.hold_syncs(self.canary == Some(Canary::EarlySync));
        let disk = Arc::new(self.disk.clone());
        let mut spool = Spool::open_on(disk, Path::new(SPOOL), self.spool_options).expect("the spool opens");
        let logs = spool.assign(shards).expect("there are logs");
        self.spool = Some(spool);
        self.shards.clear();
        self.active.clear();
        self.draining.clear();
        self.metrics = (0..shards).map(|_| Arc::default()).collect();
        let unrecorded = Progress::unrecorded(self.progress.iter().map(|progress| &***progress));
        self.progress = (0..shards).map(|_| progress::in_memory()).collect();
        for (id, logs) in logs.into_iter().enumerate() {
            let mut shard = Shard::new(ShardOptions {
                id,
                shards,
                config: Arc::clone(&self.config),
                policy: Arc::clone(&self.policy),
                metrics: Arc::clone(&self.metrics[id]),
                progress: Arc::clone(&self.progress[id]),
                quarantined: Arc::default(),
                seed: self.random.below(u64::MAX),
                sockets_max: self.sockets_max,
                memory: MemoryBounds::MOST,
            });
            self.active.push(logs[0].id());
            self.draining.extend(logs.iter().skip(1).map(|log| log.id()));
            shard.recall_limits(Arc::new(self.reserved.clone()));
            for log in logs {
                let cursor = self.events.cursor(log.id());
                shard.recover(log, cursor, self.random.below(u64::MAX)).expect("the log recovers");
            }
            for suspension in &self.suspensions {
                shard.handle_message(ShardMessage::Suspend(Box::new(suspension.clone())));
            }
            if self.canary == Some(Canary::MadeUpSuspension) {
                shard.handle_message(ShardMessage::Suspend(Box::new(blame::made_up(self.clock.now().wall_ms))));
            }
            self.shards.push(shard);
        }
        let now_ms = self.clock.now().wall_ms;
        self.in_force.begin_life(shards, &self.suspensions, self.clock.micros(), now_ms);
        self.failures.begin_life();
        self.fired.begin_life(now_ms);
        self.reloads.begin_life(self.clock.micros());
        self.tls.begin_life();
        self.stopped = vec![false; shards];
        self.is_stopping = false;
        self.armed = vec![Micros::MAX; shards];
        self.stalled_until = vec![0; shards];
        self.waiting_mail = (0..shards).map(|_| VecDeque::new()).collect();
        self.mail_at = vec![0; shards];
        self.moves.begin(shards);
        self.report.shards_max = self.report.shards_max.max(shards);
        self.ledger.crash();
        self.events.crash();
        self.waiting_messages = 0;
        for shard in 0..shards {
            self.turn(shard);
        }
        for metrics in &self.metrics {
            assert_eq!(metrics.spool_quarantined_records.get(), 0, "NOTHING-LOST: a crash is not damage");
            assert_eq!(metrics.spool_held_messages.get(), 0, "NOTHING-LOST: a checkpoint was there");
        }
        self.ledger.began_ms = self.clock.now().wall_ms;
        self.ledger.check_recovered(unrecorded);
        self.begin_counting(unrecorded);
        let rows = self.ask().expect("a life begins without reads");
        self.ledger.check_schedule(&rows, self.clock.now().wall_ms);
    }

    fn happen(&mut self, event: Event) {
        self.report.events += 1;
        if let Some(shard) = self.shard_of(&event) {
            if shard >= self.shards.len() {
                return;
            }
            if self.stalled_until[shard] > self.clock.micros() {
                let until = self.stalled_until[shard];
                return self.clock.at(until, event);
            }
            if self.mix.strikes(Fault::ShardStalled, &mut self.random) {
                self.stalled_until[shard] = self.clock.micros() + self.random.below(20 * SECOND);
            }
        }
        self.digest(&event);
        match event {
            Event::Turn { shard } => {
                // A shard that stood still gets its turn later than it wanted.
                if self.armed[shard] <= self.clock.micros() {
                    self.armed[shard] = Micros::MAX;
                    self.turn(shard);
                }
            }
            Event::Execute(operation) => self.execute(operation),
            Event::Completed { shard, log, completion } => {
                self.shards[shard].spool_completed(self.clock.now(), log, completion);
                self.turn(shard);
            }
            Event::Mail { to } => {
                let message = self.waiting_mail[to].pop_front().expect("it was sent");
                self.shards[to].handle_message(message);
                self.turn(to);
            }
            Event::Answer { to, message } => {
                let suspension = if let ShardMessage::Suspend(told) = &*message { Some(told.clone()) } else { None };
                if suspension.is_none() || self.canary != Some(Canary::UnheardSuspension) {
                    self.shards[to].handle_message(*message);
                }
                suspension.iter().for_each(|suspension| self.in_force.tell(to, suspension));
                self.turn(to);
            }
            Event::Routed { to, key, result, policies, reloads } => {
                // A lookup for an earlier configuration ends with it. Where nothing of that decides, it goes on.
                if self.tls.are_drawn && reloads != self.reloads.epochs().len() {
                    return;
                }
                if let (Ok(route), Some(policies)) = (&*result, policies)
                    && key.matched.is_none()
                {
                    let until = self.clock.micros_of(route.site.expires);
                    self.tls.tell(to, &key.domain, self.clock.micros(), until, *policies);
                }
                self.shards[to].handle_message(ShardMessage::Routed { key, result: *result });
                self.turn(to);
            }
            Event::Reserved { to, reservation: Reservation { limit, at_ms, units, .. } } => {
                self.reserved.entry(limit.to_string()).or_default().reserved.push((at_ms, units));
                self.shards[to].handle_message(ShardMessage::Reserved { limit, units });
                self.turn(to);
            }
            Event::Net(link, event) => self.net(link, event),
            Event::Client { shard, session } => self.step_client(shard, session),
            Event::Submit => self.submit(),
            Event::WriteEvents => self.write_events(),
            Event::Compare => self.compare(),
            Event::Hosts => self.trouble_hosts(),
            Event::Move => self.begin_move(),
            Event::Reload => self.reload(),
            Event::SetClock => self.set_wall_clock(),
            Event::Press => self.press(),
            Event::Operate => self.operate(),
            Event::EndLife => self.end_life(),
            Event::Heal => self.heal(),
        }
    }

    /// The shard that an event is for.
    fn shard_of(&self, event: &Event) -> Option<usize> {
        match event {
            Event::Turn { shard } | Event::Completed { shard, .. } | Event::Client { shard, .. } => Some(*shard),
            Event::Mail { to } | Event::Answer { to, .. } => Some(*to),
            Event::Reserved { to, .. } | Event::Routed { to, .. } => Some(*to),
            _ => None,
        }
    }

    /// Two runs of one seed are the same run.
    fn digest(&mut self, event: &Event) {
        let kind = match event {
            Event::Turn { shard } => *shard as u64,
            Event::Execute(operation) => 100 + operation,
            Event::Net(link, _) => 1 << 40 | link,
            Event::Client { session, .. } => 1 << 41 | session.0,
            _ => 1 << 42,
        };
        for value in [self.clock.micros(), kind] {
            self.report.digest = (self.report.digest ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
        }
    }

    /// Gives a shard its turns, carries out what it wants, and plans its next turn.
    pub(crate) fn turn(&mut self, shard: usize) {
        let blocked = self.events.waiting() > EVENTS_WAITING_MAX || self.events_fail_until > self.clock.micros();
        self.shards[shard].set_events_blocked(blocked && self.canary != Some(Canary::EndlessEvents));
        self.shards[shard].set_events_full(self.events.waiting() > EVENTS_HELD_MAX);
        let now = self.clock.now();
        loop {
            self.count_turn(shard);
            self.shards[shard].turn(now);
            self.carry_out(shard);
            if !self.shards[shard].has_more() {
                break;
            }
        }
        self.in_force.end_turn(shard, self.clock.micros(), now.wall_ms);
        let next = self.clock.micros_of(self.shards[shard].next_timeout(now));
        // What is overdue after a turn waits for something else.
        self.arm(shard, next.max(self.clock.micros() + MS));
    }

    /// It is to take a turn by then.
    pub(crate) fn arm(&mut self, shard: usize, next: Micros) {
        if next < self.armed[shard] || self.armed[shard] <= self.clock.micros() {
            self.armed[shard] = next;
            self.clock.at(next, Event::Turn { shard });
        }
    }

    /// A shard that goes round and round does nothing else, and burns a processor.
    fn count_turn(&mut self, shard: usize) {
        let second = self.clock.micros() / SECOND;
        let turns = if self.turns.0 == second { self.turns.1 + 1 } else { 1 };
        self.turns = (second, turns);
        self.report.turns_max = self.report.turns_max.max(turns);
        assert!(turns <= TURNS_A_SECOND_MAX, "shard {shard} takes turns without end");
    }

    fn carry_out(&mut self, shard: usize) {
        while let Some(action) = self.shards[shard].poll_action() {
            match action {
                Action::SessionSend { session, bytes } => {
                    let (log, now_ms) = (self.active[shard], self.clock.now().wall_ms);
                    if let Some(client) = self.clients.get_mut(&(shard, session)) {
                        let (random, own, has_rates) = (&mut self.random, &mut self.own, self.has_rates);
                        let mut write = |marker| {
                            let tenants = has_rates.then_some(&mut *own);
                            workload::message(marker, false, now_ms, &self.dns, random, tenants)
                        };
                        client.hear(&bytes, log, &mut self.ledger, &mut write);
                    }
                }
                Action::SessionClose { session } | Action::SessionAbort { session } => {
                    self.clients.remove(&(shard, session));
                    self.shards[shard].session_closed(session);
                }
                Action::SessionResume { .. } => {}
                // The simulated network keeps nothing back.
                Action::SessionAcknowledge { .. } | Action::ConnectionAcknowledge { .. } => {}
                Action::Spool { log, operation } => self.begin_operation(shard, log, operation),
                Action::RemoveLog(log) => {
                    assert!(self.draining.remove(&log.id()), "NOTHING-LOST: {:?} takes mail", log.id());
                    // After a failure the next start removes it.
                    let _ = log.remove();
                }
                Action::Connect { connection, source, to } => {
                    let other = usize::from(self.canary == Some(Canary::OtherSource) && self.random.one_in(50));
                    let to = to.as_socket().expect("no host has a Unix socket");
                    self.connect(shard, connection, (source + other) % 3, to);
                }
                Action::ConnectionSend { connection, chunks } => {
                    let octets: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.as_ref()).copied().collect();
                    self.send(shard, connection, &octets);
                }
                Action::ConnectionClose { connection } => self.close(shard, connection),
                Action::ConnectionAbort { connection } => self.abort(shard, connection),
                Action::ConnectionStartTls { connection, host_name, tls } => {
                    self.start_tls(shard, connection, host_name, tls);
                }
                Action::SessionStartTls { .. } => unreachable!("it is not offered"),
                Action::Shard { to, message } => {
                    if let ShardMessage::Settled(settled) = &message {
                        for (_, verdict) in &settled.result.results {
                            *self.report.verdicts.entry(verdict.rule).or_default() += 1;
                        }
                    }
                    let is_lost = self.canary == Some(Canary::DroppedMail) && self.random.one_in(300);
                    if let Some((to, answer)) = self.forged_answer(to, &message) {
                        self.mail(to, answer);
                    } else if !is_lost {
                        self.mail(to, message);
                    }
                }
                Action::Control(message) => {
                    if let ControlMessage::Suspend(suspension) = &message {
                        let rules = &self.wanted.shaping.automation;
                        suspensions::check_made(suspension, rules, self.clock.now().wall_ms);
                        self.in_force.tell(shard, suspension);
                        self.fired.note(self.clock.now().wall_ms, suspension);
                    }
                    self.control(message);
                }
                Action::Reserve(reservation) => {
                    let wait = 100 + self.random.below(20 * MS);
                    self.clock.after(wait, Event::Reserved { to: shard, reservation });
                }
                Action::Injected { injection, answer } => {
                    let marker = self.injections.remove(&injection).expect("it was injected");
                    match answer {
                        Ok(id) => self.ledger.accept(marker, id),
                        Err(refusal) => {
                            let in_doubt = refusal.text().contains("Spool failed").then_some(self.active[shard]);
                            self.ledger.refuse(marker, in_doubt);
                        }
                    }
                }
                Action::Events(records) => self.tell(records),
            }
        }
    }

    fn tell(&mut self, records: Vec<LoggedRecord>) {
        for record in records {
            let is_outcome = matches!(record.record, Logged::Outcome(_));
            if is_outcome && self.canary == Some(Canary::DroppedOutcome) && self.random.one_in(200) {
                continue;
            }
            if let Logged::Outcome(outcome) = &record.record {
                self.check_peer(outcome);
                self.check_moved(outcome);
                self.fired.hear(outcome, &self.wanted.shaping.automation);
            }
            let record = Arc::new(record);
            self.ledger.tell(&record);
            self.waiting_messages += usize::from(!is_outcome);
            self.events.take(record);
        }
    }

    /// EVENTS-ONCE: an event names the host that was connected to, and the source that it was connected to by.
    fn check_peer(&self, outcome: &Outcome) {
        let Outcome { egress_source, source_address, peer_name, peer_address, .. } = outcome;
        if peer_address.is_empty() {
            return;
        }
        let peer: SocketAddr = peer_address.parse().expect("an address and a port");
        let is_it = |host: &&Host| host.addresses().any(|address| address == peer);
        let host = self.hosts.iter().find(is_it).expect("a host of these was connected to");
        assert_eq!(host.name, *peer_name, "EVENTS-ONCE: the host of {outcome:?}");
        if host.site < SITES {
            assert_eq!(rates::name_of(&self.hosts, host.site), outcome.site, "EVENTS-ONCE: the site of {outcome:?}");
        }
        let is_lmtp = |address: &str| self.lmtp.is_some() && domain_of(address) == lmtp::BY_LMTP;
        let protocol = if outcome.results.iter().any(|it| is_lmtp(&it.recipient)) { "LMTP" } else { "ESMTP" };
        assert_eq!(outcome.delivery_protocol, protocol, "EVENTS-ONCE: the protocol of {outcome:?}");
        let source = self.config.egress_sources.iter().position(|source| source.name == *egress_source);
        let address = source.map(|source| address_of(source, peer).to_string());
        assert_eq!(address.as_ref(), Some(source_address), "EVENTS-ONCE: the source of {outcome:?}");
    }

    /// A message to a shard, behind those that were sent before it.
    pub(crate) fn mail(&mut self, to: usize, message: ShardMessage) {
        let late = self.mix.strikes(Fault::MailDelayed, &mut self.random);
        let takes = if late { self.random.below(5 * SECOND) } else { 1 + self.random.below(50) };
        let at = (self.clock.micros() + takes).max(self.mail_at[to]);
        self.mail_at[to] = at;
        self.waiting_mail[to].push_back(message);
        let waiting = self.waiting_mail[to].len();
        assert!(waiting <= MAIL_WAITING_MAX, "BOUNDED-MEMORY: {waiting} messages wait for shard {to}");
        self.clock.at(at, Event::Mail { to });
    }

    /// The control thread.
    pub(crate) fn control(&mut self, message: ControlMessage) {
        match message {
            ControlMessage::FindRoute { shard, key } => {
                let slow = self.mix.strikes(Fault::DnsSlow, &mut self.random);
                let wait = if slow { self.random.below(30 * SECOND) } else { 100 + self.random.below(20 * MS) };
                let now = self.clock.now();
                let mut result = self.dns.resolve(&key.domain, now, &self.hosts, &mut self.random, &mut self.mix);
                if let Err(failure) = &result
                    && failure.kind == RouteFailureKind::Bounce
                {
                    self.ledger.undeliverable(&key.domain);
                }
                let by_mx = self.config.route_of(&key.domain, key.matched).is_none();
                let policies = result
                    .as_mut()
                    .ok()
                    .map(|route| Box::new(self.tls.add_to(&key.domain, by_mx, route, &self.hosts, &mut self.mix)));
                let mut at = self.clock.micros() + wait;
                if self.tls.are_drawn {
                    // Behind the configuration that it is for.
                    at = at.max(self.mail_at[shard]);
                }
                let (result, reloads) = (Box::new(result), self.reloads.epochs().len());
                self.clock.at(at, Event::Routed { to: shard, key, result, policies, reloads });
            }
            ControlMessage::FindOwner { shard, pair } => {
                let PairKey { source, rollup, .. } = pair.clone();
                let drawn = self.random.below(self.shards.len() as u64) as usize;
                let owner = *self.owners.entry((source, rollup)).or_insert(drawn);
                let message = Box::new(ShardMessage::Owner { pair, owner });
                let wait = 20 + self.random.below(500);
                self.moves.tell(shard, self.clock.micros() + wait);
                self.clock.after(wait, Event::Answer { to: shard, message });
            }
            ControlMessage::Released { rollup, state, .. } => self.released(&rollup, state),
            ControlMessage::TookOver { rollup, .. } => self.took_over(&rollup),
            ControlMessage::Answer { question, told: Told::Messages(rows) } => {
                self.answers.insert(question, rows);
            }
            ControlMessage::Answer { question, told: Told::Chosen(chosen) } => {
                self.chosen.insert(question, chosen.recipients.values().sum());
            }
            ControlMessage::Suspend(suspension) => {
                for to in 0..self.shards.len() {
                    let message = Box::new(ShardMessage::Suspend(suspension.clone()));
                    let heard = self.suspensions_heard.entry(to).or_default();
                    let at = (self.clock.micros() + 20 + self.random.below(500)).max(*heard + 1);
                    *heard = at;
                    self.moves.tell(to, at);
                    self.clock.at(at, Event::Answer { to, message });
                }
                self.suspensions.push(*suspension);
            }
            ControlMessage::Reloaded { .. } => self.reloads.taken_up(self.clock.micros()),
            ControlMessage::Stopped { shard } => self.stop_over(shard),
            message => unreachable!("{message:?}"),
        }
    }

    /// Asks all shards for their messages. What these have to read for it is read; nothing else happens meanwhile. None
    /// where they wait for reads that the disk has done and not told of yet.
    pub(crate) fn ask(&mut self) -> Option<Vec<MessageRow>> {
        let mut rows = Vec::new();
        for shard in 0..self.shards.len() {
            let pending = self.ledger.pending();
            let ids = pending.into_iter().map(|(id, ..)| id);
            let ids: Vec<_> = ids.filter(|id| usize::from(id.log().0) % self.shards.len() == shard).collect();
            if ids.len() < ASK_READS_MAX {
                rows.extend(self.ask_shard(shard, MessageFilter::default())?);
                continue;
            }
            // Of more entries one answer may not tell all, and it may be short of those that end while it is made.
            let ids: BTreeSet<_> = ids.into_iter().collect();
            for id in ids {
                rows.extend(self.ask_shard(shard, MessageFilter { id: Some(id), ..MessageFilter::default() })?);
            }
        }
        if self.canary == Some(Canary::ChangedDue)
            && let Some(due) = rows.last_mut().and_then(|row| row.due.as_mut())
        {
            due.0 += 1_000;
        }
        Some(rows)
    }

    pub(crate) fn ask_shard(&mut self, shard: usize, filter: MessageFilter) -> Option<Vec<MessageRow>> {
        self.questions += 1;
        let ask = Ask::Messages { filter: MessageFilter { limit: usize::MAX, ..filter } };
        self.shards[shard].handle_message(ShardMessage::Ask { question: self.questions, ask: Box::new(ask) });
        self.turn(shard);
        while !self.answers.contains_key(&self.questions) {
            let is_read =
                |(at, _, operation): &(usize, LogId, Operation)| *at == shard && operation.describe().0 == "read";
            let id = *self.operations.iter().find(|(_, operation)| is_read(operation))?.0;
            let (_, log, operation) = self.operations.remove(&id).expect("it was just there");
            self.shards[shard].spool_completed(self.clock.now(), log, postrider_spool::execute(operation));
            self.turn(shard);
        }
        self.answers.remove(&self.questions)
    }

    /// Where nothing waits for a commit, the schedule in memory must be what is durable.
    fn compare(&mut self) {
        let wait = MINUTE + self.random.below(self.pause_max * 4);
        self.clock.after(wait, Event::Compare);
        let is_committed = |world: &Self| world.shards.iter().all(Shard::is_committed);
        if !is_committed(self) {
            return;
        }
        let Some(rows) = self.ask() else { return };
        if is_committed(self) {
            self.ledger.check_schedule(&rows, self.clock.now().wall_ms);
            self.check_none_stuck(&rows);
        }
    }

    /// All that was accepted has ended, and the event log has it.
    pub(crate) fn is_quiet(&self) -> bool {
        self.ledger.open() == 0 && self.events.waiting() == 0 && self.shards.iter().all(Shard::is_committed)
    }

    /// Nothing but what fails, and what rules say, keeps mail from going.
    pub(crate) fn is_plain(&self) -> bool {
        !self.has_rates && !self.tls.are_drawn && self.wanted.warmups.is_empty()
    }

    pub(crate) fn is_well_since(&self, time: Micros) -> bool {
        self.mix.is_healed() && self.clock.micros() > self.heal_at + time
    }

    pub(crate) fn events_waiting(&self) -> usize {
        self.events.waiting()
    }

    fn write_events(&mut self) {
        let now = self.clock.micros();
        if self.mix.strikes(Fault::EventsFail, &mut self.random) {
            self.events_fail_until = now + self.random.below(10 * MINUTE);
        }
        let slow = self.mix.strikes(Fault::EventsSlow, &mut self.random);
        let wait = if slow { self.random.below(10 * SECOND) } else { 100 * MS };
        self.clock.after(wait, Event::WriteEvents);
        let waiting = self.waiting_messages;
        let bound = EVENTS_WAITING_MAX + self.shards.len() * (SOCKETS_MAX + INJECTIONS_MAX);
        assert!(waiting <= bound, "BOUNDED-MEMORY: {waiting} new messages wait for the event log, of {bound}");
        if self.events_fail_until > now || self.events.waiting() == 0 {
            return;
        }
        let records = if slow { self.random.below(60) as usize } else { usize::MAX };
        // Of those that are left, none may be a message.
        self.waiting_messages = self.waiting_messages.min(self.events.waiting().saturating_sub(records));
        for (log, sequence) in self.events.write(records, &mut self.ledger) {
            let shard = usize::from(log.0) % self.shards.len();
            self.mail(shard, ShardMessage::EventCursor { log, sequence });
        }
    }

    fn trouble_hosts(&mut self) {
        self.clock.after(10 * MINUTE, Event::Hosts);
        let now = self.clock.micros();
        self.tls.change(&mut self.hosts, &mut self.mix);
        for host in &mut self.hosts {
            if host.down_until < now && self.random.one_in(6) && self.mix.strikes(Fault::HostDown, &mut self.random) {
                host.down_until = now + spread(&mut self.random, HOUR, 2);
                host.is_down_silently = self.random.one_in(2);
            }
            if host.busy_until < now && self.random.one_in(6) && self.mix.strikes(Fault::Storm, &mut self.random) {
                host.busy_until = now + self.random.below(20 * MINUTE);
            }
        }
    }

    /// The power goes, the process dies, or it is asked to stop; a start follows, at times with other shards.
    fn end_life(&mut self) {
        let faults = [Fault::PowerCut, Fault::Killed, Fault::Stopped];
        // One of them it is.
        let fault = if self.report.crashes == 0 { self.random.below(2) } else { self.random.below(3) };
        let fault = faults[fault as usize];
        if fault == Fault::Stopped {
            return self.stop();
        }
        self.mix.count(fault);
        self.crash(fault == Fault::Killed);
    }

    pub(crate) fn stop(&mut self) {
        self.mix.count(Fault::Stopped);
        self.is_stopping = true;
        for shard in 0..self.shards.len() {
            self.mail(shard, ShardMessage::Stop);
        }
    }

    fn stop_over(&mut self, shard: usize) {
        assert!(self.is_stopping, "nobody asked shard {shard} to stop");
        self.stopped[shard] = true;
    }

    fn crash(&mut self, is_kill: bool) {
        self.report.crashes += 1;
        self.end_all_links();
        self.shards.clear();
        self.spool = None;
        self.disk = self.crash_disk(is_kill);
        if self.canary == Some(Canary::LostSegment) {
            self.lose_segment();
        }
        self.begin_life();
    }

    /// What was on its way in the old process is gone.
    fn begin_life(&mut self) {
        self.clock.retain(|event| {
            matches!(event, Event::Submit | Event::WriteEvents | Event::Compare | Event::Hosts | Event::Move)
                || matches!(event, Event::EndLife | Event::Heal | Event::Reload | Event::Press)
                || matches!(event, Event::Operate | Event::SetClock)
        });
        self.clients.clear();
        self.injections.clear();
        self.campaigns.clear();
        self.owners.clear();
        let before = self.metrics.len();
        self.count_sessions();
        let shards = 1 + self.random.below(3) as usize;
        if shards != before {
            self.mix.count(Fault::ShardsChanged);
        }
        self.start(shards);
    }

    fn lose_segment(&self) {
        let is_segment = |path: &&std::path::PathBuf| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("segment-"))
        };
        let paths = self.disk.paths();
        if let Some(path) = paths.iter().filter(is_segment).max_by_key(|path| self.disk.bytes(path)[8..16].to_vec()) {
            let bytes = self.disk.bytes(path).len();
            self.disk.set_bytes(path, vec![0; bytes]);
        }
    }

    fn heal(&mut self) {
        self.mix.heal();
        self.calm_disk();
        self.events_fail_until = 0;
        for host in &mut self.hosts {
            host.heal();
        }
        self.tls.heal();
        self.break_all_links();
        if self.reloads.has_begun() {
            self.clock.after(0, Event::Reload);
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    fn is_over(&mut self) -> bool {
        if self.is_stopping && self.stopped.iter().all(|stopped| *stopped) {
            self.end_all_links();
            self.check_counted();
            self.leave_limits();
            self.shards.clear();
            self.spool = None;
            self.disk = self.crash_disk(true);
            self.begin_life();
            if self.mix.is_healed() && self.reloads.has_begun() {
                self.clock.after(0, Event::Reload);
            }
        }
        if !self.mix.is_healed() {
            return false;
        }
        let latest = self.heal_at + self.patience();
        let is_over = self.is_quiet() && self.clients.is_empty() && self.injections.is_empty();
        if !is_over && self.clock.micros() > latest {
            let pending = self.ledger.pending();
            let rows = self.ask();
            panic!(
                "NOTHING-LOST: {} after all healed {pending:#?} wait; scheduled are {rows:#?}; clients: {:?}",
                self.clock.micros() - self.heal_at,
                self.clients
            );
        }
        is_over
    }

    /// What was reserved and not used is given back; of limits that no shard tells of it is not.
    fn leave_limits(&mut self) {
        let now = self.clock.now();
        let mut left: HashMap<String, Past> = HashMap::new();
        for (limit, mut past) in self.shards.iter_mut().flat_map(|shard| shard.leave_limits(now)) {
            if self.canary == Some(Canary::ForgottenUse) {
                past.used.clear();
            }
            left.entry(limit.to_string()).or_default().add(past);
        }
        self.reserved.extend(left);
    }

    /// LIMITS-HOLD: where nothing waits, nothing that a limit has lent is out: it would be lost to it for good.
    fn check_nothing_lent(&mut self) {
        let now = self.clock.now();
        for (limit, past) in self.shards.iter_mut().flat_map(|shard| shard.leave_limits(now)) {
            assert!(past.reserved.is_empty(), "LIMITS-HOLD: {:?} of {limit} is out, and nothing waits", past.reserved);
        }
    }

    /// How long everything may take once all is well.
    fn patience(&self) -> Micros {
        let back = self.ledger.back_ms * MS;
        let longest = self.config.retry.schedule.interval(100).as_micros() as Micros;
        let usual =
            back + workload::FIRST_ATTEMPT_IN_MAX + longest + longest / 8 + BACK_OFF_MAX + DNS_MEMORY_MAX + HOUR;
        // What is held ends by its age alone.
        let max_age = self.config.retry.max_age.as_micros() as Micros;
        let may_hold = self.ledger.holds || self.mix.has(Fault::Foreign);
        if may_hold { usual + max_age } else { usual }
    }

    fn finish(mut self) -> Report {
        self.check_counted();
        self.count_sessions();
        self.check_duplicates();
        self.pass(self.config.shaping.idle_timeout.as_micros() as Micros + 10 * SECOND);
        assert!(self.links.is_empty(), "IDLE-CLOSE: nobody needs {:?} any more", self.links);
        assert!(self.draining.is_empty(), "BOUNDED-MEMORY: {:?} have drained, and are there", self.draining);
        let rows = self.ask().expect("nothing is left to be read");
        assert!(rows.is_empty(), "NOTHING-LOST: {rows:#?}");
        self.ledger.check_finished();
        if self.has_rates {
            self.pass(MINUTE);
            self.check_nothing_lent();
        }
        self.rates.check(self.reloads.epochs(), &self.ledger, &self.hosts, SITES);
        self.rollup.check(&self.rates);
        tenants::check(&self.wanted, &self.ledger, self.fired.lives());
        let names: Vec<String> = self.wanted.egress_sources.iter().map(|source| source.name.clone()).collect();
        let rolled_up: Vec<String> = self.rollup.retries(&self.hosts).into_keys().collect();
        self.fired.check(&self.wanted.shaping.automation, &names, |site| rolled_up.iter().any(|name| name == site));
        warmup::check(&self.wanted, &self.rates, |at| self.clock.wall_ms_of(at));
        self.report.counts = self.ledger.counts;
        self.report.duration = self.clock.micros();
        self.report.moves = self.moves.done;
        self.report.faults = self.mix.struck().collect();
        self.report
    }
}

/// Limits, retry and pools, drawn for one run.
fn config(random: &mut Random) -> Config {
    let mut config = Config::new("mta.example");
    let route = |place: u8, tls| {
        let to = vec![RouteTarget::Address(SocketAddr::from(([10, 99, place, 1], SMTP_PORT)))];
        Route { tls: Some(tls), ..Route::new(DomainPattern::Exact(format!("s{place}.example")), to) }
    };
    config.routes = vec![route(0, TlsMode::Disabled), route(1, TlsMode::Required)];
    if random.one_in(2) {
        let matched = |place, tls, domain: &str, matches| {
            let domain = DomainPattern::Exact(domain.to_owned());
            Route { domain, matches: Some(matches), ..route(place, tls) }
        };
        let sender = Some(Wildcard::new("m*7@client.example"));
        let campaign = Some(Wildcard::new("c1"));
        config.routes.push(matched(
            2,
            TlsMode::Opportunistic,
            BY_SENDER,
            RouteMatch { sender, ..RouteMatch::default() },
        ));
        config.routes.push(matched(
            3,
            TlsMode::Required,
            BY_CAMPAIGN,
            RouteMatch { campaign, ..RouteMatch::default() },
        ));
    }
    let source = |name: &str, ehlo_domain: &str| EgressSource {
        name: name.to_owned(),
        source_address: None,
        ehlo_domain: ehlo_domain.to_owned(),
        suspend_when_unplumbed: false,
        is_retired: false,
    };
    config.egress_sources =
        ["one", "two", "three"].into_iter().zip(EHLO_DOMAINS).map(|it| source(it.0, it.1)).collect();
    config.egress_pools[0].sources = vec![(0, 2), (1, 1)];
    config.egress_pools.push(EgressPool { name: OTHER_POOL.to_owned(), sources: vec![(2, 1)] });
    config.shaping.connection_limit = 1 + random.below(4) as u32;
    config.shaping.max_deliveries_per_connection = 1 + random.below(20) as u32;
    config.shaping.max_recipients_per_batch = 1 + random.below(20) as u32;
    config.shaping.idle_timeout = Duration::from_secs(5 + random.below(60));
    config.shaping.chunking = [Chunking::Off, Chunking::On, Chunking::BackToBack][random.below(3) as usize];
    config.retry.schedule = if random.one_in(4) {
        RetrySchedule::Listed([1, 5, 20, 60].map(|minutes| Duration::from_secs(60 * minutes)).to_vec())
    } else {
        let first = Duration::from_secs(60 + random.below(1_200));
        RetrySchedule::Doubling { first, max: first * (1 << random.below(4)) }
    };
    config.retry.max_age = Duration::from_secs(1_800 << random.below(5));
    config
}

/// Rules that some of the peers' troubles fire: they hold mail back and move it, but lose none.
fn rules(random: &mut Random) -> Arc<[Arc<AutomationRule>]> {
    let actions = [
        "\"suspend\"",
        "\"suspend_campaign\"",
        "\"suspend_source\"",
        "{ set = { connection_limit = 1, max_message_rate = \"8/min\" } }",
        "{ halve = [\"connection_limit\"] }",
    ];
    let mut text = "[spool]\nallow_filesystem = true\n".to_owned();
    for (when, action) in [("^421", random.below(5)), ("^45", random.below(5)), ("^5", random.below(5))] {
        let (count, seconds) = (1 + random.below(5), 10 + random.below(600));
        let action = actions[action as usize];
        text += &format!(
            "[[shaping.default.automation]]\nwhen = '{when}'\nthreshold = \"{count}/min\"\naction = {action}\n\
             for = \"{seconds}s\"\n"
        );
    }
    let config = Config::from_toml(&text, "rules", Path::new(".")).expect("rules as they are described");
    config.shaping.automation
}

/// The hosts of all sites, static ones included, and the DNS that leads to them.
fn internet(config: &Config, random: &mut Random, mix: &mut Mix) -> (Vec<Host>, Dns) {
    let mut hosts = Vec::new();
    for site in 0..SITES {
        let is_implicit = site == SITES - 1;
        let count = if is_implicit { 1 } else { 1 + random.below(3) as u8 };
        for place in 1..=count {
            let name = if is_implicit { IMPLICIT.to_owned() } else { format!("mx{place}.s{site}.example") };
            let address = SocketAddr::from(([10, 0, site as u8, place], SMTP_PORT));
            hosts.push(Host::new(name, address, site, random, mix));
        }
    }
    let dns = Dns::new(SITES, random);
    for (place, route) in config.routes.iter().enumerate() {
        // The others lead to the same sites.
        let RouteTarget::Address(address) = route.to[0] else { continue };
        hosts.push(Host::new(address.ip().to_string(), address, SITES + place, random, mix));
    }
    (hosts, dns)
}

/// Which runs have tenants, rates and limits.
const RATES_EVERY: u64 = 5;
const RATES_AT: u64 = 2;

/// Comparisons of shares, one after the other, in a run that does nothing else.
const COMPARISONS: usize = 4;

/// Domains with a route of their own for some of their mail: that whose marker ends with 7, and that
/// of one campaign, which is to go encrypted.
pub(crate) const BY_SENDER: &str = "d1.example";
pub(crate) const BY_CAMPAIGN: &str = "d2.example";

/// Sites with an MX set; the last is a domain without one.
pub(crate) const SITES: usize = 6;

/// Of all shards. Runs need some thousands at most, as they tell at their end; this is five times as many.
const TURNS_A_SECOND_MAX: u64 = 40_000;

const SPOOL: &str = "/spool";

/// Of sources, by their indexes.
pub(crate) const EHLO_DOMAINS: [&str; 3] = ["mt1.example", "mt2.example", "mt3.example"];

/// A pool with one source, for those who ask for it.
pub(crate) const OTHER_POOL: &str = "other";

/// Sessions and connections of one shard; of every so manieth seed, fewer than there are pairs.
const SOCKETS_MAX: usize = 64;
const SOCKETS_FEW: usize = 8;
const SOCKETS_FEW_EVERY: u64 = 7;

/// With more records the event log is behind, and no mail is taken; outcomes of what is there already still come.
const EVENTS_WAITING_MAX: usize = 20;
/// Beyond so many, no delivery is begun.
const EVENTS_HELD_MAX: usize = 200;

/// Injections of one shard that can be on their way at once.
const INJECTIONS_MAX: usize = 40;

/// As `engine/src/limits.rs` has them.
pub(crate) const ASK_READS_MAX: usize = 1_000;
const MAIL_WAITING_MAX: usize = 65_536;
const BACK_OFF_MAX: Micros = 600 * SECOND;

/// The longest time for which an answer of the DNS counts.
const DNS_MEMORY_MAX: Micros = 8_192 * SECOND;
