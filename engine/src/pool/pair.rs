//! The pairs that a shard owns: their tickets, credits, connections and back-off.
//!
//! A pair of (egress source, site) has one owner at a time, so each of its limits is kept by one piece of state,
//! exactly and without locks. Homes tell how much is ready; the owner gives credits; a home answers a credit with a
//! ticket. What the owner decides comes out of [`Pools::poll_order`], oldest decision first.
//!
//! A pair none of whose hosts can be tried now is *blocked*: it holds no ticket and no credit, and each home knows why
//! and until when.
//!
//! Over 500 lines: whatever comes to a pair changes its tickets, connections and demand together, so all that comes
//! stands here; what is a thing of its own is in `pair/`.

mod limiters;
mod moving;
mod opening;
mod order;
mod pacing;
mod permit;
mod quota;
mod reload;
mod rollup;
mod tickets;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ahash::{HashMap, HashMapExt as _};

use self::moving::Leaving;
pub use self::moving::OwnerState;
pub use self::order::{Connect, HostFate, Order};
use self::pacing::{Pace, Wake};
use self::rollup::Rollup;
use self::tickets::Rank;
use super::connection::{ConnectionKey, Slot, SlotState, Slots};
use super::demand::{Demand, Turn};
use super::openings::Openings;
use super::rate::{PastLimits, Started};
use super::site::{BackOff, Hosts, Reception};
use super::suspension::StricterLimits;
use super::trust::Trust;
use super::warmup::DayQuota;
use crate::config::{Chunking, EgressSource, LimitSettings, Shaping, SharedLimits, Terms, Warmup};
use crate::fair::{CLASSES, Flow};
use crate::handover::{Attempt, Backlog, Blocked, Credit, Elsewhere, Generation, Need, PairKey, Permit, Route};
use crate::limits::{DELIVERIES_IN_A_ROW, PAIRS_KEPT};
use crate::mail::time::Now;

/// Limits of every pair.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// What holds until a pair's first ticket tells.
    pub default: Arc<Shaping>,
    /// By their index.
    pub sources: Vec<EgressSource>,
    pub back_off: BackOff,
    pub warmups: Vec<Warmup>,
    /// Over many pairs.
    pub shared_limits: Arc<SharedLimits>,
    /// Homes, that is, shards.
    pub homes: usize,
}

/// All pairs that one shard owns.
#[derive(Debug)]
pub struct Pools {
    options: PoolOptions,
    pairs: Vec<Pair>,
    /// Places in `pairs` whose pair was forgotten.
    free: Vec<u32>,
    keys: HashMap<PairKey, u32>,
    /// When blocked pairs are tried again.
    blocked: BTreeSet<(Duration, u32)>,
    /// What providers' sites have in common.
    rollups: Vec<Rollup>,
    rollup_keys: HashMap<(usize, Arc<str>), u32>,
    /// When rates let something go on.
    wakes: BTreeSet<(Duration, Wake)>,
    /// The pair whose turn it is in its roll-up.
    serving: Option<u32>,
    started: Option<Started>,
    turn_began: Duration,
    /// Of the configuration, and of all tickets that are taken.
    generation: Generation,
    /// The latest that each home has told something under.
    heard: Vec<Generation>,
    /// What rules have put in force, by source and roll-up.
    stricter: HashMap<(usize, Arc<str>), StricterLimits>,
    /// What was reserved before the start, by limit.
    past: Arc<PastLimits>,
    /// Of sources in their warm-up, by source and roll-up.
    days: HashMap<(usize, Arc<str>), DayQuota>,
    /// The day on which those that are over were last forgotten.
    days_forgotten: u64,
    /// Limits that have asked for a reservation.
    reserving: HashMap<Arc<str>, limiters::LimitOf>,
    slots: Slots,
    openings: Openings,
    trust: Trust,
    /// What is about to move to another shard, and how often anything was.
    leaving: Option<Leaving>,
    releases: u64,
    orders: VecDeque<Order>,
    stopping: bool,
}

#[derive(Debug)]
struct Pair {
    key: PairKey,
    /// As the newest ticket has them, and what rules have put in force beside.
    configured: Arc<Shaping>,
    stricter: LimitSettings,
    /// What both come to.
    shaping: Arc<Shaping>,
    terms: Arc<Terms>,
    hosts: Hosts,
    /// By class, and as they came.
    tickets: VecDeque<Box<Attempt>>,
    /// How often tickets of a rank were passed since one of it was begun.
    passes: BTreeMap<Rank, u32>,
    /// How many tickets of higher classes were begun while there was something of a class, since one of it was.
    waits: [u32; CLASSES],
    pace: Pace,
    demand: Demand,
    /// Connections in any state: what `connection_limit` counts.
    open: Vec<ConnectionKey>,
    opening: u32,
    busy: u32,
    blocked_until: Option<Duration>,
    /// When a connection became idle, or a transaction was begun, last.
    moved_at: Option<Duration>,
    /// Blocked by a suspension: also what is connected takes nothing more.
    suspended: bool,
    carried: Carried,
}

/// Transactions that were begun: since the last tick, and in a second lately.
#[derive(Debug, Default)]
struct Carried {
    now: u32,
    lately: f64,
}

impl Pools {
    pub fn new(options: PoolOptions) -> Self {
        assert!(options.homes > 0, "an engine has a shard");
        Self {
            heard: vec![Generation::default(); options.homes],
            options,
            pairs: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            blocked: BTreeSet::new(),
            rollups: Vec::new(),
            rollup_keys: HashMap::new(),
            wakes: BTreeSet::new(),
            serving: None,
            started: None,
            turn_began: Duration::ZERO,
            generation: Generation::default(),
            stricter: HashMap::new(),
            past: Arc::default(),
            days: HashMap::new(),
            days_forgotten: 0,
            reserving: HashMap::new(),
            slots: Slots::default(),
            openings: Openings::default(),
            trust: Trust::default(),
            leaving: None,
            releases: 0,
            orders: VecDeque::new(),
            stopping: false,
        }
    }

    /// What a home tells comes first to this. What one that is behind has counts as nothing: its tickets would come
    /// only to go home, as often as it had a credit. With the configuration it tells all that it has anew.
    pub fn hear(&mut self, home: usize, generation: Generation, backlog: Backlog) -> Backlog {
        self.heard[home] = self.heard[home].max(generation);
        if generation < self.generation { Backlog::default() } else { backlog }
    }

    /// What a home has of a flow for a pair; `unused` of its credits have come back.
    pub fn handle_ready(
        &mut self,
        now: Now,
        home: usize,
        key: &PairKey,
        flow: &Arc<Flow>,
        backlog: Backlog,
        unused: u32,
    ) {
        let place = self.meet(home, key);
        let unused = self.pairs[place as usize].demand.tell(home, key, flow, backlog, unused);
        unused.into_iter().for_each(|permit| self.give_back(permit));
        self.grant(now, place);
        self.tell_newcomer(now, place, home);
    }

    /// A home's ticket; `left` is ready of its flow behind it.
    pub fn handle_ticket(
        &mut self,
        now: Now,
        random: &mut dyn FnMut(u64) -> u64,
        mut attempt: Box<Attempt>,
        left: Backlog,
        credit: Credit,
    ) {
        let (place, permit) = self.take_ticket(&attempt, left, credit);
        self.shape(place, &attempt.shaping);
        if self.is_leaving(place) {
            permit.into_iter().for_each(|permit| self.give_back(permit));
            return self.send_back(place, attempt);
        }
        if !self.permit(place, &mut attempt, permit) {
            let pair = &mut self.pairs[place as usize];
            pair.demand.expect_back(attempt.ticket.home, &attempt.flow, attempt.recipients.len() as u32);
            let order = pair.send_home(attempt);
            self.orders.push_back(order);
            return self.grant(now, place);
        }
        let pair = &mut self.pairs[place as usize];
        pair.terms = Arc::clone(&attempt.route.terms);
        let home = attempt.ticket.home;
        self.pairs[place as usize].insert(attempt);
        self.advance(now, place, random);
        self.tell_newcomer(now, place, home);
    }

    /// A home's ticket of another generation: it was sent before its home knew.
    pub fn refuse_ticket(&mut self, attempt: Box<Attempt>, left: Backlog, credit: Credit) {
        self.refuse(&attempt, left, credit);
        self.orders.push_back(Order::Return { attempt, stays: false });
    }

    /// A home's ticket for a pair, or of a flow, that is suspended.
    pub fn refuse_suspended(&mut self, attempt: Box<Attempt>, left: Backlog, credit: Credit) {
        self.refuse(&attempt, left, credit);
        self.orders.push_back(Order::Suspended { attempt });
    }

    fn refuse(&mut self, attempt: &Attempt, left: Backlog, credit: Credit) {
        let (place, permit) = self.take_ticket(attempt, left, credit);
        permit.into_iter().for_each(|permit| self.give_back(permit));
        self.pairs[place as usize].demand.send_home(&attempt.flow, attempt.recipients.len() as u32);
    }

    fn take_ticket(&mut self, attempt: &Attempt, left: Backlog, credit: Credit) -> (u32, Option<Permit>) {
        let Attempt { ticket, pair, flow, recipients, .. } = attempt;
        let place = self.meet(ticket.home, pair);
        let demand = &mut self.pairs[place as usize].demand;
        (place, demand.take(ticket.home, pair, flow, left, credit, recipients.len() as u32))
    }

    /// The session is up, or its transaction is over: the connection can take the next.
    pub fn handle_idle(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64, connection: ConnectionKey) {
        let was = self.slots.state(connection);
        self.slots.set_state(connection, SlotState::Idle { since: now.monotonic });
        let slot = self.slots.get(connection);
        let place = slot.pair;
        let pair = &mut self.pairs[place as usize];
        pair.moved_at = Some(now.monotonic);
        match was {
            SlotState::Opening => {
                pair.opening -= 1;
                pair.hosts.succeeded(slot.address, &slot.tls);
            }
            _ => pair.busy -= 1,
        }
        if self.slots.get(connection).is_retired || self.gives_way(connection, was == SlotState::Opening) {
            self.quit(connection);
        }
        self.advance(now, place, random);
    }

    /// The peer takes so many deliveries on this connection.
    pub fn bound_deliveries(&mut self, connection: ConnectionKey, max: u32) {
        self.slots.bound_deliveries(connection, max);
    }

    /// The handshake has succeeded, with the TLS that the connection was opened for.
    pub fn handle_encrypted(&mut self, connection: ConnectionKey) {
        self.slots.set_encrypted(connection);
    }

    /// The connection can't be used any more; it still counts until [`Self::handle_gone`].
    pub fn handle_closing(&mut self, now: Now, connection: ConnectionKey, fate: HostFate) {
        let was = self.slots.state(connection);
        if was != SlotState::Closing {
            self.slots.set_state(connection, SlotState::Closing);
        }
        let &Slot { pair, address, ref tls, .. } = self.slots.get(connection);
        let pair = &mut self.pairs[pair as usize];
        match was {
            SlotState::Opening => {
                pair.opening -= 1;
                pair.hosts.end_probe(address);
            }
            SlotState::Busy => pair.busy -= 1,
            SlotState::Idle { .. } | SlotState::Closing => {}
        }
        match fate {
            HostFate::Fine => {}
            HostFate::BackOff { reason } => pair.hosts.failed(now.monotonic, address, self.options.back_off, reason),
            HostFate::BackOffTls { reason } => {
                pair.hosts.failed_tls(now.monotonic, address, tls, self.options.back_off, reason);
            }
            HostFate::RetryInClear => pair.hosts.clear_only(now.monotonic, address),
            HostFate::Pause { reason } => pair.hosts.pause(now.monotonic, address, reason),
        }
    }

    /// The peer has closed too: the connection no longer counts.
    pub fn handle_gone(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64, connection: ConnectionKey) {
        let slot = self.slots.free(connection);
        self.pairs[slot.pair as usize].open.retain(|&open| open != connection);
        self.leave_rollup(now, slot.pair, connection, random);
        self.advance(now, slot.pair, random);
    }

    /// Dismisses connections that were idle too long, and forgets pairs that hold nothing.
    pub fn tick(&mut self, now: Now) {
        for place in 0..self.pairs.len() {
            for connection in self.pairs[place].open.clone() {
                if let SlotState::Idle { since } = self.slots.state(connection)
                    && (self.stopping || now.monotonic >= since + self.pairs[place].shaping.idle_timeout)
                {
                    self.quit(connection);
                }
            }
            if !self.options.shared_limits.is_empty() {
                self.release_permits(now, place);
            }
            self.pairs[place].carried.tick();
        }
        self.forget_idle_pairs(now);
        self.forget_days(now);
    }

    /// Tries again the pairs whose block is over.
    pub fn unblock(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64) {
        while let Some(&(until, place)) = self.blocked.first()
            && until <= now.monotonic
        {
            self.blocked.pop_first();
            self.pairs[place as usize].blocked_until = None;
            self.pairs[place as usize].suspended = false;
            self.advance(now, place, random);
            self.grant(now, place);
        }
        self.wake(now, random);
    }

    /// A turn begins, and peers have brought so much since the last one. Pairs that waited for it open connections;
    /// where there may be no more than there are, the longest idle ones are dismissed for those that wait.
    pub fn open_waiting(
        &mut self,
        now: Now,
        random: &mut dyn FnMut(u64) -> u64,
        inputs: usize,
        connections_max: usize,
    ) {
        self.openings.begin(inputs, connections_max.saturating_sub(self.slots.len()));
        while let Some(place) = self.openings.next() {
            self.advance(now, place, random);
        }
        let wanted = self.openings.short_of_room(|place| self.pairs[place as usize].wants_connection());
        for connection in self.slots.longest_idle(wanted.saturating_sub(self.slots.closing())) {
            self.quit(connection);
        }
    }

    /// A connection found no socket: no other is tried before the next turn.
    pub fn out_of_sockets(&mut self) {
        self.openings.out_of_room();
    }

    /// Whether pairs wait for a connection that the next turn may bring.
    pub fn has_more(&self) -> bool {
        self.openings.has_more()
    }

    /// A ticket that may ride behind the content that is just being sent on a connection.
    pub fn take_riding(&mut self, now: Now, connection: ConnectionKey) -> Option<Box<Attempt>> {
        let slot = self.slots.get(connection);
        let place = slot.pair;
        let is_used_up = self.pairs[place as usize].is_used_up(slot);
        if self.stopping || slot.is_retired || is_used_up || self.is_leaving(place) {
            return None;
        }
        let pair = &self.pairs[place as usize];
        let next = pair.first_that_fits(now, &self.options.sources[pair.key.source], slot)?;
        if slot.deliveries >= DELIVERIES_IN_A_ROW && self.is_short_of_room(now, place) {
            return None;
        }
        let units = pair.tickets[next].recipients.len() as u32;
        if self.is_surplus(place) || self.has_to_give_way(connection) || !self.may_write(now, place, units) {
            return None;
        }
        self.take_units(now, place, units);
        let pair = &mut self.pairs[place as usize];
        pair.moved_at = Some(now.monotonic);
        let attempt = pair.tickets.remove(next)?;
        pair.begin(&attempt);
        self.slots.count_delivery(connection);
        self.grant(now, place);
        Some(attempt)
    }

    /// A connection's host does not offer what a message needs; says where else it can go.
    pub fn lacks(&mut self, now: Now, connection: ConnectionKey, attempt: &Attempt, need: Need) -> Elsewhere {
        let Slot { pair, address, .. } = *self.slots.get(connection);
        let pair = &mut self.pairs[pair as usize];
        let source = &self.options.sources[pair.key.source];
        let usable: Vec<_> = attempt.route.usable(|to| source.reaches(to)).collect();
        pair.hosts.lacks(now.monotonic, address, need, &usable, &|need| attempt.needs(need))
    }

    /// What a connection's host has made of a message.
    pub fn host_said(&mut self, now: Now, connection: ConnectionKey, reception: Reception) {
        let Slot { pair, address, .. } = *self.slots.get(connection);
        self.pairs[pair as usize].hosts.said(now.monotonic, address, reception);
    }

    /// How much may be in flight on a connection from now on.
    pub fn chunking(&self, now: Now, connection: ConnectionKey) -> Chunking {
        let slot = self.slots.get(connection);
        let asked = slot.terms.chunking.unwrap_or(self.pairs[slot.pair as usize].shaping.chunking);
        self.trust.chunking(now.monotonic, &slot.site, asked)
    }

    /// Something went wrong between messages at a site, after which no more than this is done there.
    pub fn distrust(&mut self, now: Now, site: &Arc<str>, leaves: Chunking) {
        self.trust.lapse(now.monotonic, site, leaves);
    }

    pub fn homes(&self) -> usize {
        self.options.homes
    }

    /// When [`Self::unblock`] has something to do.
    pub fn next_timeout(&self) -> Option<Duration> {
        let blocked = self.blocked.first().map(|&(until, _)| until);
        let paced = self.wakes.first().map(|&(at, _)| at);
        blocked.into_iter().chain(paced).chain(self.leaving_until()).min()
    }

    /// What an attempt at a connection's host is to be told of it.
    pub fn slot(&self, connection: ConnectionKey) -> &Slot {
        self.slots.get(connection)
    }

    pub fn pair_of(&self, connection: ConnectionKey) -> &PairKey {
        &self.pairs[self.slots.get(connection).pair as usize].key
    }

    pub fn source_of(&self, connection: ConnectionKey) -> usize {
        self.pairs[self.slots.get(connection).pair as usize].key.source
    }

    /// Gives back every ticket that isn't begun, and dismisses idle connections.
    pub fn stop(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64) {
        self.stopping = true;
        for place in 0..self.pairs.len() {
            self.advance(now, place as u32, random);
        }
        self.tick(now);
    }

    /// The tickets of these pairs go home, where it is decided anew how their messages go.
    pub fn call_back(&mut self, covered: impl Fn(&PairKey) -> bool) {
        for pair in self.pairs.iter_mut().filter(|pair| covered(&pair.key)) {
            self.orders.extend(pair.send_all_home());
        }
    }

    /// The same for such tickets of any pair.
    pub fn call_back_tickets(&mut self, is_meant: impl Fn(&Attempt) -> bool) {
        for pair in &mut self.pairs {
            let (called, rest): (VecDeque<_>, VecDeque<_>) =
                pair.tickets.drain(..).partition(|attempt| is_meant(attempt));
            pair.tickets = rest;
            self.orders.extend(called.into_iter().map(|attempt| pair.send_home(attempt)));
        }
    }

    /// Nothing more is sent by these pairs until then; what is on the wire comes to its end.
    pub fn suspend(&mut self, now: Now, covered: impl Fn(&PairKey) -> bool, blocked: &Blocked) {
        let wait = Duration::from_millis(blocked.until_ms.saturating_sub(now.wall_ms));
        for place in 0..self.pairs.len() {
            let pair = &mut self.pairs[place];
            // Places of forgotten pairs keep their last key.
            if !covered(&pair.key) || self.keys.get(&pair.key) != Some(&(place as u32)) {
                continue;
            }
            pair.suspended = true;
            self.close_pair(now, place as u32, now.monotonic + wait, &blocked.reason);
            for connection in self.pairs[place].open.clone() {
                if matches!(self.slots.state(connection), SlotState::Idle { .. }) {
                    self.quit(connection);
                }
            }
        }
    }

    /// The suspension of these pairs has ended before its time.
    pub fn resume(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64, covered: impl Fn(&PairKey) -> bool) {
        for place in 0..self.pairs.len() {
            let pair = &mut self.pairs[place];
            if pair.suspended && covered(&pair.key) {
                pair.suspended = false;
                if let Some(until) = pair.blocked_until.take() {
                    self.blocked.remove(&(until, place as u32));
                }
                self.advance(now, place as u32, random);
            }
        }
    }

    pub fn poll_order(&mut self) -> Option<Order> {
        self.orders.pop_front()
    }

    /// Connections in any state.
    pub fn connections(&self) -> usize {
        self.slots.len()
    }

    fn meet(&mut self, home: usize, key: &PairKey) -> u32 {
        let place = match self.keys.get(key) {
            Some(&place) => place,
            None => {
                let place = self.put(Pair::new(key.clone(), &self.options));
                let shaping = Arc::clone(&self.options.default);
                self.shape(place, &shaping);
                place
            }
        };
        self.pairs[place as usize].demand.meet(home);
        place
    }

    /// Gives a pair a place.
    fn put(&mut self, pair: Pair) -> u32 {
        let key = pair.key.clone();
        let place = match self.free.pop() {
            Some(place) => {
                self.pairs[place as usize] = pair;
                place
            }
            None => {
                self.pairs.push(pair);
                self.pairs.len() as u32 - 1
            }
        };
        self.keys.insert(key, place);
        place
    }

    /// Takes a pair from its place, which keeps its name.
    fn vacate(&mut self, place: u32, key: PairKey) -> Pair {
        let nothing = Pair::new(key, &PoolOptions { homes: 0, ..self.options.clone() });
        self.free.push(place);
        std::mem::replace(&mut self.pairs[place as usize], nothing)
    }

    /// Puts the pair's tickets on connections, opens connections, and asks homes for more.
    fn advance(&mut self, now: Now, place: u32, random: &mut dyn FnMut(u64) -> u64) {
        if self.is_leaving(place) {
            return self.wind_down(place);
        }
        if self.stopping || self.pairs[place as usize].suspended {
            self.orders.extend(self.pairs[place as usize].send_all_home());
            for connection in self.pairs[place as usize].open.clone() {
                if matches!(self.slots.state(connection), SlotState::Idle { .. }) {
                    self.quit(connection);
                }
            }
            return;
        }
        self.pairs[place as usize].demand.resume_postponed();
        if self.start(now, place) {
            self.connect(now, place, random);
        }
        self.grant(now, place);
    }

    /// Starts tickets on idle connections that fit them, as rates allow. Whether more connections would be of use.
    fn start(&mut self, now: Now, place: u32) -> bool {
        let mut idle = self.idle_connections(now, place);
        let mut waiting = VecDeque::<Box<Attempt>>::new();
        let mut is_held = false;
        while !idle.is_empty()
            && let Some(attempt) = self.pairs[place as usize].tickets.pop_front()
        {
            let pair = &self.pairs[place as usize];
            let source = &self.options.sources[pair.key.source];
            let fits = |connection: &ConnectionKey| pair.fits(now, source, self.slots.get(*connection), &attempt);
            // Nearly always a ticket is like the one before it, for which there was none.
            let is_in_vain = waiting.back().is_some_and(|passed| alike(passed, &attempt));
            let found = if is_in_vain { None } else { idle.iter().position(fits) };
            let Some(found) = found else {
                waiting.push_back(attempt);
                continue;
            };
            let units = attempt.recipients.len() as u32;
            if !self.may_write(now, place, units) {
                waiting.push_back(attempt);
                is_held = true;
                break;
            }
            self.take_units(now, place, units);
            let connection = idle.remove(found);
            self.slots.set_state(connection, SlotState::Busy);
            let pair = &mut self.pairs[place as usize];
            pair.begin(&attempt);
            pair.busy += 1;
            pair.moved_at = Some(now.monotonic);
            self.orders.push_back(Order::Start { connection, attempt });
        }
        let pair = &mut self.pairs[place as usize];
        while let Some(attempt) = waiting.pop_back() {
            pair.tickets.push_front(attempt);
        }
        if is_held {
            self.tell_again(now, place);
        }
        !is_held
    }

    /// What can take a ticket, if there is any: the most recently opened first, so that surplus ones stay idle and time
    /// out. Those that are used up are dismissed, and one that has had its share where the first ticket fits none.
    fn idle_connections(&mut self, now: Now, place: u32) -> Vec<ConnectionKey> {
        let pair = &self.pairs[place as usize];
        if pair.tickets.is_empty() {
            return Vec::new();
        }
        let is_idle = |key: &ConnectionKey| matches!(self.slots.state(*key), SlotState::Idle { .. });
        let idle = pair.open.iter().rev().copied().filter(is_idle);
        let (mut used_up, mut idle) = idle.partition::<Vec<_>, _>(|key| pair.is_used_up(self.slots.get(*key)));
        let had_its_share = |key: &ConnectionKey| self.slots.get(*key).deliveries >= DELIVERIES_IN_A_ROW;
        if used_up.is_empty()
            && let Some(at) = idle.iter().rposition(had_its_share)
            && self.is_short_of_room(now, place)
        {
            used_up.push(idle.remove(at));
        }
        for connection in used_up {
            self.quit(connection);
        }
        idle
    }

    /// Gives credits to the flows whose turn it is: enough for every connection to have one ticket under way, one
    /// riding and one waiting, or all that it may have in flight once more; and, where nobody waits for a turn, a
    /// standing few to each home. Of a paced pair only as many as go soon, so that what comes later and is more urgent
    /// need not wait behind them.
    fn grant(&mut self, now: Now, place: u32) {
        let ahead = self.paced_ahead(place);
        let pair = &mut self.pairs[place as usize];
        let is_blocked = pair.blocked_until.is_some_and(|until| until > now.monotonic);
        if self.stopping || is_blocked || self.is_leaving(place) {
            return;
        }
        let pair = &mut self.pairs[place as usize];
        let limit = pair.shaping.connection_limit as usize;
        let batch_max = pair.batch_max();
        let in_hand_max = pair.in_hand_max();
        let mut room = match ahead {
            None => in_hand_max.saturating_sub(pair.busy as usize + pair.tickets.len() + pair.demand.granted()),
            Some(ahead) => ahead.min(in_hand_max).saturating_sub(pair.tickets.len() + pair.demand.granted()),
        };
        let mut last: Option<(usize, Arc<Flow>, u32)> = None;
        while room > 0
            && let Some(turn) = self.pairs[place as usize].demand.next(batch_max)
        {
            if let Turn::Want { units, ref flow, .. } = turn
                && !self.may_soon_write(now, place, units, (flow.priority, false))
            {
                // Nobody passes it: what could be written soon would be its own.
                room = 0;
                break;
            }
            self.pairs[place as usize].demand.begin(&turn);
            room -= 1;
            let pair = &self.pairs[place as usize];
            let (home, flow) = match turn {
                Turn::Credit { home, flow } => (home, flow),
                Turn::Want { home, flow, limits, units } => {
                    let pair = pair.key.clone();
                    self.orders.push_back(Order::Want { home, pair, flow, limits, units });
                    continue;
                }
            };
            match &mut last {
                Some((same_home, same_flow, credits)) if *same_home == home && *same_flow == flow => *credits += 1,
                _ => {
                    if let Some((home, flow, credits)) = last.replace((home, flow, 1)) {
                        let (pair, flow) = (pair.key.clone(), Some(flow));
                        self.orders.push_back(Order::Credits { home, pair, flow, credits });
                    }
                }
            }
        }
        let pair = &mut self.pairs[place as usize];
        if let Some((home, flow, credits)) = last {
            self.orders.push_back(Order::Credits { home, pair: pair.key.clone(), flow: Some(flow), credits });
        }
        // While anybody waits for a turn, none goes without one.
        if room > 0 && pair.tickets.len() < limit {
            for (home, credits) in pair.demand.renew_standing(|home| self.heard[home] >= self.generation) {
                self.orders.push_back(Order::Credits { home, pair: pair.key.clone(), flow: None, credits });
            }
        }
    }

    /// A pair without connections, tickets and back-off is nothing but its name; a home's standing credits survive it,
    /// because a new acquaintance begins with them.
    fn forget_idle_pairs(&mut self, now: Now) {
        if self.keys.len() <= PAIRS_KEPT {
            return;
        }
        let (pairs, free, options) = (&mut self.pairs, &mut self.free, &self.options);
        self.keys.retain(|key, place| {
            let pair = &mut pairs[*place as usize];
            let idle = pair.open.is_empty()
                && pair.tickets.is_empty()
                && pair.blocked_until.is_none()
                && pair.demand.is_idle()
                && !pair.hosts.remembers(now.monotonic)
                && pair.pace.is_idle(now.monotonic);
            if idle {
                *pair = Pair::new(key.clone(), &PoolOptions { homes: 0, ..options.clone() });
                free.push(*place);
            }
            !idle
        });
        free.sort_unstable();
    }

    fn quit(&mut self, connection: ConnectionKey) {
        self.slots.set_state(connection, SlotState::Closing);
        self.orders.push_back(Order::Quit { connection });
    }
}

impl Pair {
    fn new(key: PairKey, options: &PoolOptions) -> Self {
        Self {
            key,
            configured: Arc::clone(&options.default),
            stricter: LimitSettings::default(),
            shaping: Arc::clone(&options.default),
            terms: Arc::default(),
            hosts: Hosts::default(),
            tickets: VecDeque::new(),
            passes: BTreeMap::new(),
            waits: [0; CLASSES],
            demand: Demand::new(options.homes, Arc::clone(&options.shared_limits)),
            open: Vec::new(),
            opening: 0,
            busy: 0,
            blocked_until: None,
            moved_at: None,
            pace: Pace::default(),
            suspended: false,
            carried: Carried::default(),
        }
    }

    /// No attempt is made of this ticket here: its flow has not had what it was charged with.
    fn send_home(&mut self, attempt: Box<Attempt>) -> Order {
        self.demand.send_home(&attempt.flow, attempt.recipients.len() as u32);
        Order::Return { attempt, stays: false }
    }

    fn send_all_home(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.tickets).into_iter().map(|attempt| self.send_home(attempt)).collect()
    }

    /// As many deliveries as a connection may make.
    fn is_used_up(&self, slot: &Slot) -> bool {
        slot.deliveries >= self.shaping.max_deliveries_per_connection.min(slot.deliveries_max)
    }

    /// Whether more tickets wait than connections are on their way.
    fn wants_connection(&self) -> bool {
        self.tickets.len() > self.opening as usize
    }

    /// The most recipients of one transaction.
    fn batch_max(&self) -> usize {
        self.configured.batch_max().min(self.stricter.batch_max())
    }

    /// Tickets that the pair's connections can use at a time.
    fn in_hand_max(&self) -> usize {
        let of_connection = match self.terms.chunking.unwrap_or(self.shaping.chunking) {
            Chunking::BackToBack => self.terms.max_in_flight.unwrap_or(self.shaping.max_in_flight) as usize + 2,
            Chunking::On | Chunking::Off => 3,
        };
        of_connection * self.shaping.connection_limit as usize
    }

    /// Which ticket a connection can take. Nearly always one is like the one before it, which it could not.
    fn first_that_fits(&self, now: Now, source: &EgressSource, slot: &Slot) -> Option<usize> {
        let mut passed: Option<&Attempt> = None;
        self.tickets.iter().position(|attempt| {
            let is_in_vain = passed.replace(attempt).is_some_and(|passed| alike(passed, attempt));
            !is_in_vain && self.fits(now, source, slot, attempt)
        })
    }

    /// Whether a message may go by a connection: it stays with its own site, at a host that is its domain's too, with
    /// its own domain's TLS, and not at one that lacks what another host may offer, or that has just put it off while
    /// another may take it.
    fn fits(&self, now: Now, source: &EgressSource, slot: &Slot, attempt: &Attempt) -> bool {
        let route = &attempt.route;
        let usable = || route.usable(|to| source.reaches(to));
        let needs = |need| attempt.needs(need);
        *slot.site == *route.site.name
            && slot.terms == route.terms
            && route.is_met_by(&slot.host_name, &slot.proof)
            && self.hosts.may_take(now.monotonic, slot.address, usable, attempt.is_retry, self.is_under_way(), &needs)
    }

    /// Whether connections are in use, or on their way: where no host can be tried, tickets wait for them.
    fn is_under_way(&self) -> bool {
        self.busy > 0 || self.opening > 0
    }
}

/// Whether what fits one of them fits the other.
fn alike(a: &Attempt, b: &Attempt) -> bool {
    let needs = |attempt: &Attempt| (attempt.eight_bit, attempt.smtputf8, attempt.is_retry);
    same_route(&a.route, &b.route) && needs(a) == needs(b)
}

/// What fits one fits the other.
fn same_route(a: &Route, b: &Route) -> bool {
    a.tls == b.tls
        && a.sts == b.sts
        && a.dane == b.dane
        && a.terms == b.terms
        && (Arc::ptr_eq(&a.site, &b.site) || a.site.name == b.site.name && a.site.hosts == b.site.hosts)
}
