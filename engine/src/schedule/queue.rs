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
//! Here are an entry's begin and end, its due time, and what is known of it. The ways between the other places:
//! `routing.rs` (to a site and a source), `pairs.rs` (ready, and out by a credit), `out.rs` (back from its owner),
//! `withdrawal.rs` (taken from wherever it waits). `queues.rs` keeps the queues.

mod out;
mod pairs;
mod queues;
mod routing;
mod withdrawal;

use std::collections::VecDeque;
use std::sync::Arc;

use ahash::{HashMap, HashSet};
use postrider_spool::record::MessageId;

use super::answer::{AnswerId, Answers};
use super::due::DueTimes;
pub use super::entry::EntryKey;
use super::entry::{Entries, NewEntry, State};
use super::fair::FairQueue;
pub use super::recipients::Recipients;
use crate::config::{LimitId, MatchedRoute, SharedLimits};
use crate::fair::Flow;
use crate::handover::{Backlog, Blocked, Credit, PairKey, RollupKey, RouteKey, Spooled, Ticket};
use crate::limits::{EXPIRY_SWEEP_ENTRIES, RETRY_PAUSE_MAX};

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
    /// Why it was blocked last.
    last_block: Option<Arc<str>>,
    /// What has a route waits too.
    held: bool,
}

impl Domain {
    fn block(&mut self, blocked: Blocked) {
        self.last_block = Some(Arc::clone(&blocked.reason));
        self.blocked = Some(blocked);
    }
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
    /// number; each must be given to [`Self::remove`]. What waits for longer than any retry does was deferred while the
    /// clock stood wrong: it is due now.
    pub fn sweep_expired(&mut self, wall_ms: u64) -> Vec<(EntryKey, Option<Arc<str>>)> {
        let far_ms = wall_ms + RETRY_PAUSE_MAX.as_millis() as u64;
        let mut expired = Vec::new();
        for _ in 0..self.entries.places().min(EXPIRY_SWEEP_ENTRIES) {
            self.sweep = if self.sweep + 1 < self.entries.places() { self.sweep + 1 } else { 0 };
            let key = EntryKey(self.sweep as u32);
            let Some(entry) = self.entries.get(key) else { continue };
            if entry.expires_ms() <= wall_ms && !matches!(entry.state(), State::Out { .. } | State::Withdrawn) {
                expired.push(key);
            } else if entry.due_ms() > far_ms && entry.is_retry() && matches!(entry.state(), State::Due { .. }) {
                self.due.remove(&mut self.entries, key);
                self.entries[key].set_state(State::Unrouted);
                self.set_due(key, wall_ms);
                self.due.insert(&mut self.entries, key);
            }
        }
        let reason = |&key: &EntryKey| self.blocked_by(key).map(|blocked| Arc::clone(&blocked.reason));
        let reasons: Vec<Option<Arc<str>>> = expired.iter().map(reason).collect();
        self.withdraw(&expired);
        expired.into_iter().zip(reasons).collect()
    }

    /// The wall clock was set back by so much, to `wall_ms`. What was due stays due, and what waits for its next
    /// attempt or for the end of a block waits as long as it would have. Other times stay: of first attempts to
    /// come, of what is held, and of expiry.
    pub fn set_clock_back(&mut self, wall_ms: u64, by_ms: u64) {
        let before_ms = wall_ms.saturating_add(by_ms);
        let waiting = self.due.take_all();
        for &key in &waiting {
            self.entries[key].set_state(State::Unrouted);
        }
        let keys: Vec<EntryKey> = self.entries.keys().collect();
        for key in keys {
            let entry = &self.entries[key];
            let due_ms = entry.due_ms();
            if entry.is_held() {
                continue;
            }
            if due_ms <= before_ms {
                self.set_due(key, due_ms.min(wall_ms));
            } else if entry.is_retry() {
                self.set_due(key, due_ms - by_ms);
            }
        }
        for key in waiting {
            self.due.insert(&mut self.entries, key);
        }
        let domains = self.domains.values_mut().filter_map(|domain| domain.blocked.as_mut());
        let sourceless = self.sourceless.values_mut().map(|waiting| &mut waiting.blocked);
        let limits = self.limit_holds.values_mut();
        let pairs = self.pairs.iter_mut().flatten();
        let pairs = pairs.flat_map(|pair| pair.blocked.iter_mut().chain(pair.paced.as_mut().map(|p| &mut p.blocked)));
        for blocked in domains.chain(sourceless).chain(limits).chain(pairs) {
            blocked.until_ms = blocked.until_ms.saturating_sub(by_ms);
        }
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

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.len() == 0
    }

    /// Recipients that are not finished.
    pub fn recipients(&self) -> u64 {
        self.entries.recipient_count()
    }

    /// Those of them that are not due yet.
    pub fn scheduled_recipients(&self) -> u64 {
        self.due.recipient_count()
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

    fn set_due(&mut self, key: EntryKey, due_ms: u64) {
        let attempts = self.entries[key].attempts();
        self.entries[key].set_due(due_ms, attempts);
    }

    pub(super) fn insert_entry(&mut self, entry: NewEntry<'_>, behind: Option<EntryKey>) -> EntryKey {
        self.queue_mut(entry.queue).depth += 1;
        let key = self.entries.insert(entry, behind);
        self.due.insert(&mut self.entries, key);
        key
    }
}

/// Reference counts of a queue's texts.
const TEXTS_OVERHEAD_BYTES: usize = 5 * 2 * size_of::<usize>();

#[cfg(test)]
mod tests;
