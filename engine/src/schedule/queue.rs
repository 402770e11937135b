//! The entries of one home shard, and where each stands.
//!
//! An *entry* is the recipients of one message at one domain that share a due time and an attempt count; it is what a
//! transaction delivers. It is in exactly one place at a time:
//!
//! | state | where | leaves by |
//! |---|---|---|
//! | `Due` | `DueTimes` | its time comes |
//! | `Unrouted` | its domain's list | the domain's site is known |
//! | `Unrouted` | its queue's list of those without a source | a source of its pool may be used again |
//! | `Ready` | its pair's [`FairQueue`] | a credit of the pair's owner |
//! | `Out` | a ticket at the owner (the spool counts a pin) | the ticket comes back |
//!
//! The home knows neither sockets nor DNS: it is told the site of a domain, the owner of a pair and the owner's
//! credits, and says what it needs through [`Home::poll_need`].
//!
//! Over 500 lines, because every place that an entry can be in, and each way between two of them, is kept true here.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use ahash::{HashMap, HashSet};
use postrider_spool::record::MessageId;

use super::answer::{AnswerId, Answers, Identity};
use super::due::DueTimes;
pub use super::entry::EntryKey;
use super::entry::{Entries, NewEntry, State};
use super::fair::FairQueue;
pub use super::recipients::Recipients;
use crate::config::{LimitId, MatchedRoute, SharedLimits};
use crate::fair::Flow;
use crate::handover::{Backlog, Blocked, Credit, PairKey, RollupKey, RouteKey, Spooled, Ticket};
use crate::limits::{EXPIRY_SWEEP_ENTRIES, PACED_NOTICE_INTERVAL, PAIRS_KEPT, QUEUES_KEPT, STANDING_CREDITS};
use crate::mail::queue_name::QueueName;

/// A queue's place in its home.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueKey(pub u32);

/// What is known of an entry.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    pub message: MessageId,
    /// Indices into the envelope's recipients; never empty.
    pub recipients: Recipients<'a>,
    pub queue: QueueKey,
    pub attempts: u32,
    pub due_ms: u64,
    pub expires_ms: u64,
    pub last_answer: Option<&'a str>,
}

impl Entry<'_> {
    /// It may have left already, and is not sent again by itself: it has been tried, and is due when it expires.
    pub fn is_held(&self) -> bool {
        self.attempts > 0 && self.due_ms >= self.expires_ms
    }
}

/// These recipients of an entry are about to be in doubt, and on record as held.
#[derive(Debug)]
pub struct Intent {
    pub recipients: Vec<u32>,
    /// What stands in place of their last answer.
    pub answer: String,
}

/// KumoMTA's scheduled queue: a tenant's campaign to one domain, through one pool.
#[derive(Debug)]
pub struct Queue {
    /// `campaign:tenant@domain`, as far as there are such.
    pub name: Arc<str>,
    pub domain: Arc<str>,
    /// Where its mail goes.
    pub route: RouteKey,
    pub tenant: Arc<str>,
    pub campaign: Arc<str>,
    pub pool: Arc<str>,
    pub priority: u8,
    pub depth: u64,
    pub last_answer: Option<Arc<str>>,
    /// Tells the last answer from those before.
    last_answer_serial: u64,
    /// Recipients delivered a second, averaged over about ten.
    pub rate_per_s: f64,
    /// Recipients delivered since the average was last brought up to date.
    delivered: u32,
    pub flow: Arc<Flow>,
    /// Tells it from other queues that had its place.
    serial: u64,
}

/// What makes a queue.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct QueueParts {
    pub(super) domain: Arc<str>,
    pub(super) tenant: String,
    pub(super) campaign: String,
    pub(super) pool: String,
    pub(super) priority: u8,
    pub(super) matched: Option<MatchedRoute>,
}

/// What is known of where a domain's mail goes.
#[derive(Debug, Default)]
struct Domain {
    unrouted: Vec<EntryKey>,
    asked: bool,
    blocked: Option<Blocked>,
    /// What has a route waits too.
    held: bool,
}

/// Entries of one queue that have a route, but no source to go by.
#[derive(Debug)]
struct Sourceless {
    entries: Vec<EntryKey>,
    blocked: Blocked,
}

#[derive(Debug)]
struct Pair {
    key: PairKey,
    ready: FairQueue,
    owner: Owner,
    /// Standing credits; those of a flow are spent at once or given back.
    credits: u32,
    blocked: Option<Blocked>,
    /// Why it was blocked last.
    last_block: Option<Arc<str>>,
    paced: Option<Paced>,
    out: u64,
}

/// A rate holds a pair: it takes tickets, only slowly.
#[derive(Debug)]
struct Paced {
    blocked: Blocked,
    /// Those that the owner had, and had not begun when it told.
    waiting: Box<[Ticket]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Unknown,
    Asked,
    Shard(usize),
}

/// What a home needs from outside.
#[derive(Debug, PartialEq, Eq)]
pub enum Need {
    /// The site of this mail: answer with [`Home::take_unrouted`] or [`Home::block_domain`].
    Route { key: RouteKey },
    /// The owner of this pair: answer with [`Home::set_owner`].
    Owner { pair: PairKey },
    /// The owner is to know how much of a flow is ready, and gets credits back.
    Tell { owner: usize, pair: PairKey, flow: Arc<Flow>, backlog: Backlog, unused: u32 },
    /// A ticket for this entry is to be made and sent.
    Ticket { owner: usize, pair: PairKey, entry: EntryKey, credit: Credit },
}

/// A home's scheduled and ready mail.
#[derive(Debug, Default)]
pub struct Home {
    entries: Entries,
    due: DueTimes,
    pub(super) answers: Answers,
    queues: Vec<Option<Queue>>,
    free_queues: Vec<u32>,
    queue_serial: u64,
    queue_answer_serial: u64,
    queue_names: HashMap<QueueParts, QueueKey>,
    flows: HashSet<Arc<Flow>>,
    domains: HashMap<RouteKey, Domain>,
    /// By queue: what holds one tenant's mail must not hold another's at the same domain.
    sourceless: HashMap<QueueKey, Sourceless>,
    pairs: Vec<Option<Pair>>,
    free_pairs: Vec<u32>,
    pair_keys: HashMap<PairKey, u32>,
    needs: VecDeque<Need>,
    /// Of entries that are out: what their records say that is about to happen.
    intents: HashMap<EntryKey, Intent>,
    /// Pairs that are about to get another owner.
    moving: HashSet<RollupKey>,
    /// By which source entries were about to go, and are to go yet.
    stays_at: HashMap<EntryKey, usize>,
    /// Over many pairs, and those of them that hold something.
    shared_limits: Arc<SharedLimits>,
    limit_holds: HashMap<LimitId, Blocked>,
    /// Where the next expiry sweep goes on.
    sweep: usize,
    stopping: bool,
}

impl Home {
    pub fn new(shared_limits: Arc<SharedLimits>) -> Self {
        Self { shared_limits, ..Self::default() }
    }

    /// Takes a durable message; its entries wait for their due times. Returns the first one.
    pub fn insert(&mut self, spooled: &Spooled) -> Option<EntryKey> {
        let (mut first, mut last) = (None, None);
        for group in &spooled.groups {
            let queue = self.queue(QueueParts {
                domain: Arc::clone(&group.domain),
                tenant: spooled.tenant.clone(),
                campaign: spooled.campaign.clone(),
                pool: spooled.egress_pool.clone(),
                priority: spooled.priority,
                matched: group.matched,
            });
            let answer = group.last_answer.as_deref().map_or(AnswerId::NONE, |answer| self.keep_answer(queue, answer));
            let entry = NewEntry {
                message: spooled.message,
                recipients: &group.recipients,
                queue,
                attempts: group.attempts,
                due_ms: group.due_ms,
                expires_ms: spooled.expires_ms,
                answer,
            };
            last = Some(self.insert_entry(entry, last));
            first = first.or(last);
        }
        first
    }

    /// The next entry whose time has come; it must be given to [`Self::make_ready`], [`Self::wait_for_route`] or
    /// [`Self::remove`].
    pub fn pop_due(&mut self, wall_ms: u64) -> Option<EntryKey> {
        if self.stopping {
            return None;
        }
        let key = self.due.pop_due(&mut self.entries, wall_ms)?;
        self.entries[key].set_state(State::Unrouted);
        Some(key)
    }

    /// Wall milliseconds of the next due entry or of the next blocked domain's next try.
    pub fn next_due_ms(&self) -> Option<u64> {
        if self.stopping {
            return None;
        }
        self.due.next_ms(&self.entries)
    }

    /// The entry waits until its domain's site is known, which is asked for.
    pub fn wait_for_route(&mut self, key: EntryKey) {
        let route = self.queue_of(key).route.clone();
        let domain = self.domains.entry(route.clone()).or_default();
        domain.unrouted.push(key);
        if !domain.asked && domain.blocked.is_none() {
            domain.asked = true;
            self.needs.push_back(Need::Route { key: route });
        }
    }

    /// The entry has a route but no source to go by: it waits with its queue until `blocked.until_ms`.
    pub fn wait_for_source(&mut self, key: EntryKey, blocked: Blocked) {
        let queue = self.entries[key].queue;
        let waiting = self
            .sourceless
            .entry(queue)
            .or_insert_with(|| Sourceless { entries: Vec::new(), blocked: blocked.clone() });
        waiting.entries.push(key);
        waiting.blocked = blocked;
    }

    /// What waits for a source until `wall_ms` or earlier is due again.
    pub fn retry_sources(&mut self, wall_ms: u64) {
        self.release(|waiting| waiting.blocked.until_ms <= wall_ms);
    }

    /// All that waits for a source is due again, because there may be one.
    pub fn retry_all_sources(&mut self) {
        self.release(|_| true);
    }

    /// The entries that waited for their route; each must be given to [`Self::make_ready`], [`Self::wait_for_route`] or
    /// [`Self::remove`].
    pub fn take_unrouted(&mut self, route: &RouteKey) -> Vec<EntryKey> {
        self.domains.remove(route).map(|domain| domain.unrouted).unwrap_or_default()
    }

    /// The domain has no route for now: its entries keep attempts and due time, and it is asked for again at
    /// `blocked.until_ms`.
    pub fn block_domain(&mut self, route: &RouteKey, blocked: Blocked) {
        if let Some(domain) = self.domains.get_mut(route) {
            domain.asked = false;
            domain.blocked = Some(blocked);
        }
    }

    /// No host that a pair could reach may have mail for the entry's domain until then. The entry waits with its
    /// domain, and so does what is ready for it at that pair, and what comes.
    pub fn hold(&mut self, key: EntryKey, pair_key: &PairKey, blocked: Blocked) {
        let route = self.queue_of(key).route.clone();
        let domain = self.domains.entry(route.clone()).or_default();
        domain.unrouted.push(key);
        if domain.asked || domain.held {
            return;
        }
        domain.held = true;
        domain.blocked = Some(blocked);
        let pair = self.pair(pair_key);
        for key in self.pair_mut(pair).ready.drain() {
            if self.queue_of(key).route == route {
                self.entries[key].set_state(State::Unrouted);
                self.domains.entry(route.clone()).or_default().unrouted.push(key);
            } else {
                self.push_ready(key, pair);
            }
        }
        self.serve(pair);
    }

    /// Whether [`Self::hold`] keeps mail from going, although it has a route.
    pub fn is_held(&self, route: &RouteKey) -> bool {
        self.domains.get(route).is_some_and(|domain| domain.held)
    }

    /// Asks again for the domains whose block is over.
    pub fn unblock_domains(&mut self, wall_ms: u64) {
        let mut unblocked = Vec::new();
        for (name, domain) in &mut self.domains {
            if domain.blocked.as_ref().is_some_and(|blocked| blocked.until_ms <= wall_ms) {
                domain.blocked = None;
                domain.asked = true;
                unblocked.push(name.clone());
            }
        }
        // A map has no order, but what comes next must not depend on chance.
        unblocked.sort_unstable();
        self.needs.extend(unblocked.into_iter().map(|key| Need::Route { key }));
    }

    /// The entry may go through this pair as soon as the pair's owner gives a credit.
    pub fn make_ready(&mut self, key: EntryKey, pair_key: &PairKey) {
        let pair = self.pair(pair_key);
        self.entries[key].set_state(State::Ready { pair });
        let flow = self.push_ready(key, pair);
        self.serve(pair);
        self.tell_if_news(pair, &flow, Some(key));
    }

    /// What is ready of a flow behind a ticket that is just sent; its owner learns it with that.
    pub fn left_behind(&mut self, pair_key: &PairKey, flow: &Arc<Flow>) -> Backlog {
        let place = self.pair(pair_key);
        self.pair_mut(place).ready.tell(flow);
        self.backlog(place, flow)
    }

    /// The pair's owner, as the directory had it; while the pair moves, [`Self::follow_owner`] tells.
    pub fn set_owner(&mut self, pair_key: &PairKey, owner: usize) {
        if self.moving.contains(&pair_key.rollup_key()) {
            return;
        }
        let pair = self.pair(pair_key);
        let known = self.pair_mut(pair);
        known.owner = Owner::Shard(owner);
        known.credits = STANDING_CREDITS;
        self.serve(pair);
        for flow in self.known_pair(pair).ready.flows() {
            self.tell_if_news(pair, &flow, None);
        }
    }

    /// The pairs may get another owner: nothing goes to the one that they have until [`Self::follow_owner`].
    pub fn withdraw_from(&mut self, rollup: RollupKey) {
        for pair in self.pairs.iter_mut().flatten().filter(|pair| rollup.covers(&pair.key)) {
            if let Owner::Shard(_) = pair.owner {
                pair.owner = Owner::Asked;
                pair.credits = 0;
            }
        }
        self.moving.insert(rollup);
    }

    /// The pairs have this owner from now on, which knows nothing of this home.
    pub fn follow_owner(&mut self, rollup: &RollupKey, owner: usize) {
        self.moving.remove(rollup);
        for place in 0..self.pairs.len() as u32 {
            let pair = self.pairs[place as usize].as_mut().filter(|pair| rollup.covers(&pair.key));
            let Some(pair) = pair.filter(|pair| pair.owner != Owner::Unknown) else { continue };
            pair.owner = Owner::Shard(owner);
            pair.credits = STANDING_CREDITS;
            self.serve(place);
            for flow in self.known_pair(place).ready.flows() {
                self.tell(place, owner, &flow, 0);
            }
        }
    }

    /// Whether the pair's tickets go to this shard.
    pub fn is_owned_by(&self, pair: &PairKey, owner: usize) -> bool {
        let place = self.pair_keys.get(pair);
        place.is_some_and(|&place| self.known_pair(place).owner == Owner::Shard(owner))
    }

    /// The owner takes `credits` more tickets of the flow, or of any, and is not blocked.
    pub fn add_credits(&mut self, pair_key: &PairKey, flow: Option<&Arc<Flow>>, credits: u32) {
        let place = self.pair(pair_key);
        let pair = self.pair_mut(place);
        pair.blocked = None;
        let Some(flow) = flow else {
            pair.credits += credits;
            return self.serve(place);
        };
        let Owner::Shard(owner) = pair.owner else { return };
        for left in (0..credits).rev() {
            let entry = if self.stopping { None } else { self.pair_mut(place).ready.pop_of(flow) };
            match entry {
                Some(entry) => self.send_out(place, owner, flow, entry, Credit::Turn),
                None => return self.tell(place, owner, flow, left + 1),
            }
        }
    }

    /// A ticket could not be made after all: the owner that gave the credit takes another in its place. Another owner
    /// knows nothing of it.
    pub fn return_credit(&mut self, owner: usize, pair_key: &PairKey, flow: &Arc<Flow>, credit: Credit) {
        let place = self.pair(pair_key);
        match credit {
            _ if self.known_pair(place).owner != Owner::Shard(owner) => {}
            Credit::Standing => {
                self.pair_mut(place).credits += 1;
                self.serve(place);
            }
            Credit::Turn => self.tell(place, owner, flow, 1),
        }
    }

    /// The owner takes nothing until it gives credits again.
    pub fn block_pair(&mut self, pair_key: &PairKey, blocked: Blocked) {
        let pair = self.pair(pair_key);
        let pair = self.pair_mut(pair);
        pair.credits = 0;
        pair.last_block = Some(Arc::clone(&blocked.reason));
        pair.blocked = Some(blocked);
    }

    /// Why a pair was blocked last, also when it is not any more.
    pub fn last_block(&self, pair_key: &PairKey) -> Option<Arc<str>> {
        let pair = self.pairs[*self.pair_keys.get(pair_key)? as usize].as_ref()?;
        pair.last_block.clone()
    }

    /// The owner takes what it has credits for, but a rate holds it now.
    pub fn pace_pair(&mut self, pair_key: &PairKey, blocked: Blocked, waiting: Box<[Ticket]>) {
        let pair = self.pair(pair_key);
        self.pair_mut(pair).paced = Some(Paced { blocked, waiting });
    }

    /// What is under this limit waits.
    pub fn hold_limit(&mut self, limit: LimitId, blocked: Blocked) {
        self.limit_holds.insert(limit, blocked);
    }

    /// The most recipients of one transaction, as far as limits over many pairs go.
    pub fn limited_batch_max(&self, pair: &PairKey, flow: &Flow) -> usize {
        self.shared_limits.batch_max(self.shared_limits.of(pair.subject(flow))) as usize
    }

    /// A paced pair is told of again and again, and a limit likewise; what is old no longer holds.
    pub fn forget_paced(&mut self, wall_ms: u64) {
        let kept_ms = 2 * PACED_NOTICE_INTERVAL.as_millis() as u64;
        self.limit_holds.retain(|_, blocked| wall_ms < blocked.until_ms + kept_ms);
        for pair in self.pairs.iter_mut().flatten() {
            pair.paced = pair.paced.take().filter(|paced| wall_ms < paced.blocked.until_ms + kept_ms);
        }
    }

    /// Takes what is ready away from pairs and queues that must not send any more, so that it can go another way. Each
    /// entry must be given to [`Self::make_ready`], [`Self::wait_for_route`], [`Self::wait_for_source`] or
    /// [`Self::remove`].
    pub fn withdraw_ready(
        &mut self,
        pairs: impl Fn(&PairKey) -> bool,
        queues: impl Fn(&Queue) -> bool,
    ) -> Vec<EntryKey> {
        let mut withdrawn = Vec::new();
        for place in 0..self.pairs.len() as u32 {
            let Some(pair) = self.pairs[place as usize].as_mut().filter(|pair| pairs(&pair.key)) else { continue };
            let flows = pair.ready.flows();
            for key in pair.ready.drain() {
                if queues(self.queue_of(key)) {
                    self.entries[key].set_state(State::Unrouted);
                    withdrawn.push(key);
                } else {
                    self.push_ready(key, place);
                }
            }
            if let Owner::Shard(owner) = self.known_pair(place).owner {
                flows.iter().for_each(|flow| self.tell(place, owner, flow, 0));
                self.serve(place);
            }
        }
        withdrawn
    }

    /// Another configuration: what is ready, and what waits for a route or a source, is due again at its own time, and
    /// goes as is said now. `matched` tells the route with a `match` that a queue's mail takes.
    pub fn reload(&mut self, shared_limits: Arc<SharedLimits>, matched: impl Fn(&Queue) -> Option<MatchedRoute>) {
        let mut released = self.withdraw_ready(|_| true, |_| true);
        let mut domains: Vec<(RouteKey, Domain)> = self.domains.drain().collect();
        // A map has no order, but what comes next must not depend on chance.
        domains.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        released.extend(domains.into_iter().flat_map(|(_, domain)| domain.unrouted));
        for key in released {
            self.due.insert(&mut self.entries, key);
        }
        self.retry_all_sources();
        self.stays_at.clear();
        self.shared_limits = shared_limits;
        self.flows.clear();
        for place in 0..self.queues.len() {
            let Some(queue) = &self.queues[place] else { continue };
            let matched = matched(queue);
            let (tenant, campaign) = (Arc::clone(&queue.tenant), Arc::clone(&queue.campaign));
            let flow =
                self.flow(queue.priority, tenant, campaign, &Arc::clone(&queue.pool), &Arc::clone(&queue.domain));
            let queue = self.queues[place].as_mut().expect("it was just there");
            (queue.flow, queue.route.matched) = (flow, matched);
        }
        let names = std::mem::take(&mut self.queue_names);
        self.queue_names.extend(names.into_iter().map(|(parts, key)| {
            let matched = self.queues[key.0 as usize].as_ref().and_then(|queue| queue.route.matched);
            (QueueParts { matched, ..parts }, key)
        }));
    }

    /// Takes all that waits in some queues, due or not, from wherever it waits. Each entry must be given to
    /// [`Self::remove`]. Tells as well which of their entries are out.
    pub fn withdraw_queues(&mut self, is_meant: impl Fn(&Queue) -> bool) -> (Vec<EntryKey>, Vec<EntryKey>) {
        let is_meant = |place: &Option<Queue>| place.as_ref().is_some_and(|queue| queue.depth > 0 && is_meant(queue));
        let meant: Vec<bool> = self.queues.iter().map(is_meant).collect();
        let (mut waiting, mut out) = (Vec::new(), Vec::new());
        if !meant.contains(&true) {
            return (waiting, out);
        }
        for key in self.entries.keys().filter(|key| meant[self.entries[*key].queue.0 as usize]) {
            match self.entries[key].state() {
                State::Out { .. } => out.push(key),
                State::Withdrawn => {}
                _ => waiting.push(key),
            }
        }
        self.withdraw(&waiting);
        (waiting, out)
    }

    /// The same for a single entry. False: it was taken already.
    pub fn withdraw_one(&mut self, key: EntryKey) -> bool {
        let waits = !matches!(self.entries[key].state(), State::Out { .. } | State::Withdrawn);
        if waits {
            self.withdraw(&[key]);
        }
        waits
    }

    pub fn is_out(&self, key: EntryKey) -> bool {
        matches!(self.entries[key].state(), State::Out { .. })
    }

    /// The ticket came back without an attempt: the entry keeps its attempts and due time, and is routed anew.
    pub fn take_back(&mut self, key: EntryKey) {
        self.leave_out(key);
        self.entries[key].set_state(State::Unrouted);
    }

    /// The same where the entry's turn had come, and its route had expired meanwhile or its permit came too early: it
    /// stays at its source, if it can.
    pub fn take_back_to(&mut self, key: EntryKey, source: usize) {
        self.take_back(key);
        self.stays_at.insert(key, source);
    }

    /// The source that the entry is to stay at.
    pub fn take_source(&mut self, key: EntryKey) -> Option<usize> {
        self.stays_at.remove(&key)
    }

    /// The entry is out, and so much of what happens to it goes on record first. It holds until the ticket comes back.
    pub fn intend(&mut self, key: EntryKey, intent: Intent) {
        assert!(matches!(self.entries[key].state(), State::Out { .. }), "only what is out can be in doubt");
        self.intents.insert(key, intent);
    }

    pub fn intent_of(&self, key: EntryKey) -> Option<&Intent> {
        self.intents.get(&key)
    }

    /// Part of the entry's recipients are settled.
    pub fn keep_only(&mut self, key: EntryKey, recipients: &[u32]) {
        self.entries.set_recipients(key, recipients);
    }

    /// An entry that [`Self::pop_due`], [`Self::take_unrouted`] or [`Self::sweep_expired`] gave out is about to end.
    pub fn withdraw_routed(&mut self, key: EntryKey) {
        let entry = &mut self.entries[key];
        assert!(matches!(entry.state(), State::Unrouted | State::Withdrawn), "it waits nowhere");
        entry.set_state(State::Withdrawn);
    }

    /// The ticket came back with an attempt made: what remains of the entry waits for a new due time.
    pub fn defer(&mut self, key: EntryKey, recipients: &[u32], attempts: u32, due_ms: u64, answer: &str) {
        self.leave_out(key);
        self.entries.set_recipients(key, recipients);
        self.set_answer(key, answer);
        self.entries[key].set_due(due_ms, attempts);
        self.due.insert(&mut self.entries, key);
    }

    /// An entry that [`Self::withdraw_one`] took waits for a new due time.
    pub fn put_back(&mut self, key: EntryKey, due_ms: u64, answer: &str) {
        // As the record has it: it was tried, though nothing may have come of it.
        let attempts = self.entries[key].attempts().max(1);
        assert!(matches!(self.entries[key].state(), State::Withdrawn), "it was taken from where it waited");
        self.set_answer(key, answer);
        self.entries[key].set_due(due_ms, attempts);
        self.due.insert(&mut self.entries, key);
    }

    /// Part of an entry's recipients go on by themselves: a new entry beside it, ready to be routed.
    pub fn split(&mut self, key: EntryKey, recipients: &[u32], attempts: u32, due_ms: u64) -> EntryKey {
        let entry = &self.entries[key];
        let part = NewEntry {
            message: entry.message,
            recipients,
            queue: entry.queue,
            attempts,
            due_ms,
            expires_ms: entry.expires_ms(),
            answer: self.answers.share(entry.answer()),
        };
        self.insert_entry(part, Some(key))
    }

    /// The entry's recipients are settled. Returns another entry of its message, if one is left.
    pub fn remove(&mut self, key: EntryKey) -> Option<EntryKey> {
        self.leave_out(key);
        self.stays_at.remove(&key);
        let entry = &self.entries[key];
        let (queue, answer, state) = (entry.queue, entry.answer(), entry.state());
        if matches!(state, State::Due { .. }) {
            self.due.remove(&mut self.entries, key);
        }
        self.queue_mut(queue).depth -= 1;
        self.answers.release(answer);
        self.entries.remove(key)
    }

    /// Entries past their expiry that are not with an owner, with what held them, looking at no more than a bounded
    /// number; each must be given to [`Self::remove`].
    pub fn sweep_expired(&mut self, wall_ms: u64) -> Vec<(EntryKey, Option<Arc<str>>)> {
        let mut expired = Vec::new();
        for _ in 0..self.entries.places().min(EXPIRY_SWEEP_ENTRIES) {
            self.sweep = if self.sweep + 1 < self.entries.places() { self.sweep + 1 } else { 0 };
            let key = EntryKey(self.sweep as u32);
            let Some(entry) = self.entries.get(key) else { continue };
            if entry.expires_ms() <= wall_ms && !matches!(entry.state(), State::Out { .. } | State::Withdrawn) {
                expired.push(key);
            }
        }
        let reason = |&key: &EntryKey| self.blocked_by(key).map(|blocked| Arc::clone(&blocked.reason));
        let reasons: Vec<Option<Arc<str>>> = expired.iter().map(reason).collect();
        self.withdraw(&expired);
        expired.into_iter().zip(reasons).collect()
    }

    /// What is needed next; the caller looks until there is nothing.
    pub fn poll_need(&mut self) -> Option<Need> {
        let need = self.needs.pop_front()?;
        if let Need::Ticket { entry, .. } = &need {
            assert!(
                matches!(self.entries[*entry].state(), State::Out { .. }),
                "only an entry that is out has a ticket"
            );
        }
        Some(need)
    }

    /// No more entries become ready; what is out comes back.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    pub fn has_entry(&self, key: EntryKey) -> bool {
        self.entries.get(key).is_some()
    }

    pub fn entry(&self, key: EntryKey) -> Entry<'_> {
        let entry = &self.entries[key];
        let last_answer = match entry.answer() {
            AnswerId::OF_QUEUE => self.queue_of(key).last_answer.as_ref(),
            own => self.answers.text(own),
        };
        Entry {
            message: entry.message,
            recipients: self.entries.recipients(key),
            queue: entry.queue,
            attempts: entry.attempts(),
            due_ms: entry.due_ms(),
            expires_ms: entry.expires_ms(),
            last_answer: last_answer.map(|answer| &**answer),
        }
    }

    /// The entries of a message, from any one of them on.
    pub fn entries_of(&self, first: EntryKey) -> impl Iterator<Item = EntryKey> {
        self.entries.ring(first)
    }

    pub fn queue_of(&self, key: EntryKey) -> &Queue {
        self.queues[self.entries[key].queue.0 as usize].as_ref().expect("an entry's queue exists")
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.len() == 0
    }

    /// Tickets that owners hold.
    pub fn out(&self) -> u64 {
        self.pairs.iter().flatten().map(|pair| pair.out).sum()
    }

    /// Entries that wait for a route, for a source or for a pair's owner.
    pub fn ready(&self) -> usize {
        self.pairs.iter().flatten().map(|pair| pair.ready.len()).sum::<usize>()
            + self.domains.values().map(|domain| domain.unrouted.len()).sum::<usize>()
            + self.sourceless.values().map(|waiting| waiting.entries.len()).sum::<usize>()
    }

    pub fn entries(&self) -> impl Iterator<Item = (EntryKey, Entry<'_>)> {
        self.entries.keys().map(|key| (key, self.entry(key)))
    }

    /// The queue of this name; a new one where there is none.
    pub(super) fn queue(&mut self, name: QueueParts) -> QueueKey {
        if let Some(&key) = self.queue_names.get(&name) {
            return key;
        }
        let (tenant, campaign) = (Arc::<str>::from(&*name.tenant), Arc::<str>::from(&*name.campaign));
        let flow = self.flow(name.priority, Arc::clone(&tenant), Arc::clone(&campaign), &name.pool, &name.domain);
        self.queue_serial += 1;
        let queue = Queue {
            name: QueueName { campaign: &campaign, tenant: &tenant, domain: &name.domain }.to_string().into(),
            domain: Arc::clone(&name.domain),
            route: RouteKey { domain: Arc::clone(&name.domain), matched: name.matched },
            tenant,
            campaign,
            pool: Arc::from(&*name.pool),
            priority: name.priority,
            depth: 0,
            last_answer: None,
            last_answer_serial: 0,
            rate_per_s: 0.0,
            delivered: 0,
            flow,
            serial: self.queue_serial,
        };
        let key = match self.free_queues.pop() {
            Some(place) => {
                self.queues[place as usize] = Some(queue);
                QueueKey(place)
            }
            None => {
                self.queues.push(Some(queue));
                QueueKey(self.queues.len() as u32 - 1)
            }
        };
        self.queue_names.insert(name, key);
        key
    }

    /// The flow of these, shared among the queues that have it.
    fn flow(&mut self, priority: u8, tenant: Arc<str>, campaign: Arc<str>, pool: &str, domain: &str) -> Arc<Flow> {
        let (pool, domain) = (self.shared_limits.told_pool(pool), self.shared_limits.told_domain(domain));
        let flow = Flow { priority, tenant, campaign, pool, domain };
        if let Some(known) = self.flows.get(&flow) {
            return Arc::clone(known);
        }
        let flow = Arc::new(flow);
        self.flows.insert(Arc::clone(&flow));
        flow
    }

    /// Why an entry has not gone, where something holds it.
    pub fn blocked_by(&self, key: EntryKey) -> Option<&Blocked> {
        match self.entries[key].state() {
            State::Due { .. } | State::Withdrawn => None,
            State::Out { pair } => {
                let waits = |paced: &&Paced| paced.waiting.iter().any(|ticket| ticket.entry == key);
                self.known_pair(pair).paced.as_ref().filter(waits).map(|paced| &paced.blocked)
            }
            State::Unrouted => match self.sourceless.get(&self.entries[key].queue) {
                Some(waiting) => Some(&waiting.blocked),
                None => self.domains.get(&self.queue_of(key).route)?.blocked.as_ref(),
            },
            State::Ready { pair } => {
                let pair = self.known_pair(pair);
                let limits = self.shared_limits.of(pair.key.subject(&self.queue_of(key).flow));
                let mut holding = limits.filter_map(|limit| self.limit_holds.get(&limit));
                pair.blocked.as_ref().or_else(|| holding.next()).or(pair.paced.as_ref().map(|paced| &paced.blocked))
            }
        }
    }

    /// The pair that an entry stands at, if it is ready or out.
    pub fn pair_of(&self, key: EntryKey) -> Option<&PairKey> {
        match self.entries[key].state() {
            State::Due { .. } | State::Unrouted | State::Withdrawn => None,
            State::Ready { pair } | State::Out { pair } => Some(&self.known_pair(pair).key),
        }
    }

    pub fn state_name(&self, key: EntryKey) -> &'static str {
        match self.entries[key].state() {
            State::Due { .. } => "scheduled",
            State::Unrouted | State::Withdrawn => "routing",
            State::Ready { .. } => "ready",
            // Its pair's owner has it, and a rate holds it there.
            State::Out { .. } if self.blocked_by(key).is_some() => "ready",
            State::Out { .. } => "in delivery",
        }
    }

    pub fn queues(&self) -> impl Iterator<Item = &Queue> {
        self.queues.iter().flatten()
    }

    pub fn count_delivered(&mut self, key: EntryKey, recipients: u32) {
        let queue = self.entries[key].queue;
        self.queue_mut(queue).delivered += recipients;
    }

    /// Brings the queues' rates up to date; called once a second.
    pub fn update_rates(&mut self) {
        for queue in self.queues.iter_mut().flatten() {
            let delivered = f64::from(std::mem::take(&mut queue.delivered));
            queue.rate_per_s += (delivered - queue.rate_per_s) / RATE_SECONDS;
        }
    }

    /// One more than the highest [`QueueKey`] in use.
    pub fn queue_places(&self) -> usize {
        self.queues.len()
    }

    /// Forgets queues and pairs that hold nothing, once there are many.
    pub fn forget_idle(&mut self) {
        if self.queue_names.len() > QUEUES_KEPT {
            let (queues, free) = (&mut self.queues, &mut self.free_queues);
            self.queue_names.retain(|_, key| {
                let place = &mut queues[key.0 as usize];
                let idle = place.as_ref().is_none_or(|queue| queue.depth == 0);
                if idle {
                    *place = None;
                    free.push(key.0);
                }
                !idle
            });
            free.sort_unstable();
            self.flows = self.queues.iter().flatten().map(|queue| Arc::clone(&queue.flow)).collect();
        }
        if self.pair_keys.len() > PAIRS_KEPT {
            let (pairs, free) = (&mut self.pairs, &mut self.free_pairs);
            self.pair_keys.retain(|_, place| {
                let pair = &mut pairs[*place as usize];
                let idle = pair.as_ref().is_none_or(|pair| pair.ready.is_empty() && pair.out == 0);
                if idle {
                    *pair = None;
                    free.push(*place);
                }
                !idle
            });
            free.sort_unstable();
        }
    }

    /// What entries, due times, answers and queues take of the heap, by the capacity of their tables. Entries that are
    /// ready stand in their pair's queue besides.
    pub fn allocated_bytes(&self) -> usize {
        let texts = |queue: &Queue| {
            let Queue { name, domain, tenant, campaign, pool, .. } = queue;
            name.len() + domain.len() + 2 * (tenant.len() + campaign.len() + pool.len()) + TEXTS_OVERHEAD_BYTES
        };
        self.entries.allocated_bytes()
            + self.due.allocated_bytes()
            + self.answers.allocated_bytes()
            + self.queues.capacity() * size_of::<Option<Queue>>()
            + self.queue_names.capacity() * (size_of::<(QueueParts, QueueKey)>() + 1)
            + self.queues().map(texts).sum::<usize>()
    }

    pub(super) fn insert_entry(&mut self, entry: NewEntry<'_>, behind: Option<EntryKey>) -> EntryKey {
        self.queue_mut(entry.queue).depth += 1;
        let key = self.entries.insert(entry, behind);
        self.due.insert(&mut self.entries, key);
        key
    }

    pub(super) fn queue_identity(&self, key: QueueKey) -> Identity {
        let queue = self.queues[key.0 as usize].as_ref().expect("the queue exists");
        Identity { place: key.0, serial: queue.serial }
    }

    /// The queue that was found to have this identity, unless it has been forgotten since.
    pub(super) fn queue_identified(&self, identity: Identity) -> Option<QueueKey> {
        let queue = self.queues.get(identity.place as usize)?.as_ref()?;
        (queue.serial == identity.serial).then_some(QueueKey(identity.place))
    }

    /// None where the entry's last answer is its queue's.
    pub(super) fn answer_identity(&self, key: EntryKey) -> Option<Identity> {
        self.answers.identity(self.entries[key].answer())
    }

    pub(super) fn queue_answer_identity(&self, key: QueueKey) -> Identity {
        let queue = self.queues[key.0 as usize].as_ref().expect("the queue exists");
        Identity { place: key.0, serial: queue.last_answer_serial }
    }

    /// Counts one use of an answer for an entry of this queue.
    pub(super) fn keep_answer(&mut self, queue: QueueKey, answer: &str) -> AnswerId {
        let id = self.answers.keep(answer);
        if id == AnswerId::OF_QUEUE && self.queue_mut(queue).last_answer.is_none() {
            self.set_queue_answer(queue, Arc::from(answer));
        }
        id
    }

    /// What a peer said last about the entry, and so about its queue.
    pub fn set_answer(&mut self, key: EntryKey, answer: &str) {
        let id = self.answers.keep(answer);
        let text = self.answers.text(id).map_or_else(|| Arc::from(answer), Arc::clone);
        let entry = &mut self.entries[key];
        let (queue, before) = (entry.queue, entry.answer());
        entry.set_answer(id);
        self.answers.release(before);
        self.set_queue_answer(queue, text);
    }

    fn set_queue_answer(&mut self, queue: QueueKey, answer: Arc<str>) {
        self.queue_answer_serial += 1;
        let serial = self.queue_answer_serial;
        let queue = self.queue_mut(queue);
        queue.last_answer = Some(answer);
        queue.last_answer_serial = serial;
    }

    fn push_ready(&mut self, key: EntryKey, pair: u32) -> Arc<Flow> {
        let (flow, recipients) = (Arc::clone(&self.queue_of(key).flow), self.entries.recipients(key).len() as u32);
        let entries = &self.entries;
        let pair = self.pairs[pair as usize].as_mut().expect("a pair that is pushed to exists");
        let is_limited = self.shared_limits.of(pair.key.subject(&flow)).next().is_some();
        pair.ready.push(&flow, key, recipients, is_limited, |entry| entries[entry].due_ms());
        flow
    }

    fn pair(&mut self, key: &PairKey) -> u32 {
        if let Some(&pair) = self.pair_keys.get(key) {
            return pair;
        }
        let pair = Some(Pair {
            key: key.clone(),
            ready: FairQueue::default(),
            owner: Owner::Unknown,
            credits: 0,
            blocked: None,
            last_block: None,
            paced: None,
            out: 0,
        });
        let place = match self.free_pairs.pop() {
            Some(place) => {
                self.pairs[place as usize] = pair;
                place
            }
            None => {
                self.pairs.push(pair);
                self.pairs.len() as u32 - 1
            }
        };
        self.pair_keys.insert(key.clone(), place);
        place
    }

    fn known_pair(&self, place: u32) -> &Pair {
        self.pairs[place as usize].as_ref().expect("an entry's pair exists")
    }

    fn pair_mut(&mut self, place: u32) -> &mut Pair {
        self.pairs[place as usize].as_mut().expect("a pair that holds something exists")
    }

    fn queue_mut(&mut self, key: QueueKey) -> &mut Queue {
        self.queues[key.0 as usize].as_mut().expect("an entry's queue exists")
    }

    /// Spends the pair's standing credits.
    fn serve(&mut self, place: u32) {
        let pair = self.pairs[place as usize].as_mut().expect("a pair that holds something exists");
        let owner = match pair.owner {
            Owner::Shard(owner) => owner,
            Owner::Asked => return,
            Owner::Unknown => {
                pair.owner = Owner::Asked;
                self.needs.push_back(Need::Owner { pair: pair.key.clone() });
                return;
            }
        };
        while self.known_pair(place).credits > 0 && !self.stopping {
            let Some((flow, entry)) = self.pair_mut(place).ready.pop() else { return };
            self.pair_mut(place).credits -= 1;
            self.send_out(place, owner, &flow, entry, Credit::Standing);
        }
    }

    fn send_out(&mut self, place: u32, owner: usize, flow: &Arc<Flow>, entry: EntryKey, credit: Credit) {
        self.entries[entry].set_state(State::Out { pair: place });
        let pair = self.pair_mut(place);
        pair.out += 1;
        pair.ready.tell(flow);
        let pair = pair.key.clone();
        self.needs.push_back(Need::Ticket { owner, pair, entry, credit });
    }

    /// Tells the owner of a flow that has grown from nothing or doubled.
    fn tell_if_news(&mut self, place: u32, flow: &Arc<Flow>, key: Option<EntryKey>) {
        if let Owner::Shard(owner) = self.known_pair(place).owner
            && self.pair_mut(place).ready.is_news(flow, key)
        {
            self.tell(place, owner, flow, 0);
        }
    }

    fn tell(&mut self, place: u32, owner: usize, flow: &Arc<Flow>, unused: u32) {
        let backlog = self.backlog(place, flow);
        let pair = self.pair_mut(place);
        pair.ready.tell(flow);
        let (pair, flow) = (pair.key.clone(), Arc::clone(flow));
        self.needs.push_back(Need::Tell { owner, pair, flow, backlog, unused });
    }

    fn backlog(&self, place: u32, flow: &Arc<Flow>) -> Backlog {
        match self.known_pair(place).ready.waiting(flow) {
            Some((ready, next)) => {
                let next_recipients = self.entries.recipients(next).len() as u32;
                Backlog { ready, oldest_due_ms: self.entries[next].due_ms(), next_recipients }
            }
            None => Backlog::default(),
        }
    }

    fn release(&mut self, over: impl Fn(&Sourceless) -> bool) {
        if self.sourceless.is_empty() {
            return;
        }
        let mut released: Vec<(QueueKey, Sourceless)> =
            self.sourceless.extract_if(|_, waiting| over(waiting)).collect();
        // A map has no order, but what comes next must not depend on chance.
        released.sort_by_key(|(queue, _)| *queue);
        for key in released.into_iter().flat_map(|(_, waiting)| waiting.entries) {
            self.due.insert(&mut self.entries, key);
        }
    }

    fn leave_out(&mut self, key: EntryKey) {
        if let State::Out { pair } = self.entries[key].state() {
            self.intents.remove(&key);
            self.pair_mut(pair).out -= 1;
        }
    }

    /// Takes entries that are not out from wherever they wait. What else stands in the same places keeps its order.
    fn withdraw(&mut self, keys: &[EntryKey]) {
        let mut pairs = BTreeSet::new();
        let mut domains = BTreeSet::new();
        let mut queues = BTreeSet::new();
        for &key in keys {
            match self.entries[key].state() {
                State::Due { .. } => self.due.remove(&mut self.entries, key),
                State::Unrouted => {
                    domains.insert(self.queue_of(key).route.clone());
                    queues.insert(self.entries[key].queue);
                }
                State::Ready { pair } => _ = pairs.insert(pair),
                State::Out { .. } | State::Withdrawn => unreachable!("only what waits is withdrawn, once"),
            }
            self.entries[key].set_state(State::Withdrawn);
        }
        for name in domains {
            let Some(domain) = self.domains.get_mut(&name) else { continue };
            let entries = &self.entries;
            domain.unrouted.retain(|&key| entries[key].state() == State::Unrouted);
        }
        for queue in queues {
            let Some(waiting) = self.sourceless.get_mut(&queue) else { continue };
            let entries = &self.entries;
            waiting.entries.retain(|&key| entries[key].state() == State::Unrouted);
            if waiting.entries.is_empty() {
                self.sourceless.remove(&queue);
            }
        }
        for pair in pairs {
            for key in self.pair_mut(pair).ready.drain() {
                if matches!(self.entries[key].state(), State::Ready { .. }) {
                    self.push_ready(key, pair);
                }
            }
        }
    }
}

/// Reference counts of a queue's texts.
const TEXTS_OVERHEAD_BYTES: usize = 5 * 2 * size_of::<usize>();
/// Over how many seconds a queue's rate is averaged.
const RATE_SECONDS: f64 = 10.0;

#[cfg(test)]
mod tests;
