//! Limits that hold over many pairs, and so over many owners: a tenant's, and `[[limit]]`.
//!
//! One shard is their *keeper*. An owner whose turn comes to a flow under such limits gives no credit at once: it sends
//! a [`Want`], and gives the credit when a [`Permit`] comes, with which the home's ticket is written. So a flow whose
//! limit is used up takes up no ticket and no connection, and holds up nobody at the same pair. What is permitted
//! counts in every window until the owner tells when MAIL was written, or that it was not: so the windows hold to the
//! unit, whatever lies between.
//!
//! It also counts what tenants inject, and says at once whether there is room for more.
//!
//! Wants that must wait stand at the limit that holds them, and go by [`Turns`] like the flows of a pair. One that has
//! waited at one limit and finds another used up goes to the front of that one.
//!
//! Calling order: [`Keeper::begin`]; then any `handle_*`, and [`Keeper::wake`] at [`Keeper::next_timeout`]; after each,
//! [`Keeper::poll`] until there is none.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ahash::{HashMap, HashMapExt as _};

use super::rate::{Limiter, Past, PastLimits, Started};
use crate::config::{LimitId, SharedLimits};
use crate::fair::{Flow, Turns};
use crate::handover::{Blocked, Generation, Permit, RollupKey, Want, WantAnswer};
use crate::limits::PACED_NOTICE_INTERVAL;
use crate::mail::time::Now;

/// What the keeper says.
#[derive(Debug)]
pub enum Said {
    Answer {
        owner: usize,
        answer: WantAnswer,
    },
    /// To an owner: none of its wants at the roll-up's pairs waits any more.
    Unwanted {
        owner: usize,
        rollup: RollupKey,
        number: u64,
    },
    /// Units of a limit are to be reserved durably; [`Keeper::handle_reserved`] is the answer.
    Reserve {
        limit: Arc<str>,
        units: u32,
        period: Duration,
    },
    /// To all homes: what is under this limit waits.
    Holds {
        limit: LimitId,
        blocked: Blocked,
    },
}

/// All such limits.
#[derive(Debug)]
pub struct Keeper {
    rules: Arc<SharedLimits>,
    /// Those that were needed so far.
    kept: HashMap<LimitId, Kept>,
    wakes: BTreeSet<(Duration, LimitId)>,
    /// Those that have asked for a reservation, by name.
    reserving: HashMap<Arc<str>, LimitId>,
    /// What tenants have injected, by their names.
    injected: HashMap<Arc<str>, Limiter>,
    past: Arc<PastLimits>,
    started: Option<Started>,
    generation: Generation,
    said: VecDeque<Said>,
}

#[derive(Debug)]
struct Kept {
    limiter: Limiter,
    turns: Turns,
    wants: HashMap<Arc<Flow>, VecDeque<Waiting>>,
    /// Whose turn has come, and who waits for time to pass.
    next: Option<Waiting>,
    wakes_at: Option<Duration>,
    told_at: Option<Duration>,
}

#[derive(Debug)]
struct Waiting {
    want: Want,
    /// The limit at which it has had its turn already.
    turn: Option<LimitId>,
}

impl Keeper {
    pub fn new(rules: Arc<SharedLimits>) -> Self {
        Self {
            rules,
            kept: HashMap::new(),
            wakes: BTreeSet::new(),
            reserving: HashMap::new(),
            injected: HashMap::new(),
            past: Arc::default(),
            started: None,
            generation: Generation::default(),
            said: VecDeque::new(),
        }
    }

    /// Other limits, by the ids that are known. What was counted stays counted. Nobody waits any more: who wants
    /// something still asks again, once it has the same configuration.
    pub fn reload(&mut self, now: Now, generation: Generation, rules: Arc<SharedLimits>) {
        let started = self.started.expect("limits began with the first turn");
        for (&limit, kept) in &mut self.kept {
            let past = self.past.get(&**rules.name(limit));
            kept.limiter.set_rate(now.monotonic, rules.rate(limit), started, past);
            (kept.turns, kept.next, kept.wakes_at, kept.told_at) = (Turns::default(), None, None, None);
            kept.wants.clear();
        }
        self.wakes.clear();
        for (tenant, limiter) in &mut self.injected {
            if let Some(rate) = rules.injection(tenant) {
                limiter.set_fresh_rate(now.monotonic, rate);
            }
        }
        (self.rules, self.generation) = (rules, generation);
    }

    /// Limits count from here on; to be called before anything else, and again as one likes.
    pub fn begin(&mut self, now: Now) {
        self.started.get_or_insert(Started { monotonic: now.monotonic, wall_ms: now.wall_ms });
    }

    /// What was reserved before this start, by limit; to be called before anything else.
    pub fn recall(&mut self, past: Arc<PastLimits>) {
        self.past = past;
    }

    pub fn poll(&mut self) -> Option<Said> {
        self.said.pop_front()
    }

    /// When [`Self::wake`] has something to do.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.wakes.first().map(|&(at, _)| at)
    }

    /// Somebody wants to write MAIL.
    pub fn handle_want(&mut self, now: Now, want: Want) {
        assert!(want.generation <= self.generation, "the keeper is the first to have another configuration");
        if want.generation < self.generation {
            return;
        }
        for &limit in &*want.limits {
            self.meet(limit);
        }
        let obstacle = want.limits.iter().copied().find(|&limit| !self.is_free(now, limit, want.units));
        let Some(limit) = obstacle else { return self.permit(now, want, None) };
        self.answer(&want, false, None);
        self.queue(limit, Waiting { want, turn: None });
        self.serve(now, limit);
    }

    /// A permit was used at that time, or not at all.
    pub fn handle_spent(&mut self, now: Now, permit: &Permit, at: Option<Duration>) {
        let Permit { ref limits, units, .. } = *permit;
        if at.is_none()
            && let Some(kept) = permit.turn.and_then(|limit| self.kept.get_mut(&limit))
        {
            kept.turns.refund(&permit.asker, units);
        }
        self.count_spent(permit, at);
        for &limit in &**limits {
            self.serve(now, limit);
        }
    }

    /// The same where nobody waits any more.
    pub fn count_spent(&mut self, permit: &Permit, at: Option<Duration>) {
        for limit in &*permit.limits {
            let Some(kept) = self.kept.get_mut(limit) else { continue };
            match at {
                Some(at) => kept.limiter.settle(at, permit.units),
                None => kept.limiter.give_back(permit.units),
            }
        }
    }

    /// What an owner wants for a roll-up's pairs, and waits, is not wanted any more.
    pub fn handle_unwant(&mut self, now: Now, owner: usize, rollup: RollupKey, number: u64) {
        let is_meant = |waiting: &Waiting| waiting.want.owner == owner && rollup.covers(&waiting.want.pair);
        // A map has no order, but what comes next must not depend on chance.
        let mut limits: Vec<LimitId> = self.kept.keys().copied().collect();
        limits.sort_unstable();
        let mut changed = Vec::new();
        for limit in limits {
            let forgotten = self.kept(limit).forget(limit, is_meant);
            changed.extend((!forgotten.is_empty()).then_some(limit));
            for Waiting { want, turn } in forgotten {
                // It had its turn there, and used none of it.
                if let Some(kept) = turn.and_then(|turn| self.kept.get_mut(&turn)) {
                    kept.turns.refund(&want.flow, want.units);
                }
            }
        }
        self.said.push_back(Said::Unwanted { owner, rollup, number });
        changed.into_iter().for_each(|limit| self.serve(now, limit));
    }

    /// What the next engine has to know, where this one gives no more permits: of each limit that was needed.
    pub fn past(&self, now: Now) -> impl Iterator<Item = (Arc<str>, Past)> {
        self.kept
            .iter()
            .filter_map(move |(&limit, kept)| Some((Arc::clone(self.rules.name(limit)), kept.limiter.past(now)?)))
    }

    /// Units that [`Said::Reserve`] asked for are durably reserved. False: it is none of these limits.
    pub fn handle_reserved(&mut self, now: Now, limit: &str, units: u32) -> bool {
        let Some(&id) = self.reserving.get(limit) else { return false };
        if let Some(kept) = self.kept.get_mut(&id) {
            kept.limiter.reserved(units);
        }
        self.serve(now, id);
        true
    }

    /// Whether a tenant may inject so many recipients now; then they count.
    pub fn may_inject(&mut self, now: Now, tenant: &Arc<str>, recipients: u32) -> bool {
        let Some(rate) = self.rules.injection(tenant) else { return true };
        let limiter = self.injected.entry(Arc::clone(tenant)).or_insert_with(|| Limiter::fresh(rate));
        let is_free = limiter.ready_at(recipients) <= now.monotonic;
        if is_free {
            limiter.take(now.monotonic, recipients);
        }
        is_free
    }

    /// Lets go on what has waited for its time.
    pub fn wake(&mut self, now: Now) {
        while let Some(&(at, limit)) = self.wakes.first()
            && at <= now.monotonic
        {
            self.wakes.pop_first();
            if let Some(kept) = self.kept.get_mut(&limit) {
                kept.wakes_at = None;
            }
            self.serve(now, limit);
        }
    }

    fn meet(&mut self, limit: LimitId) {
        let started = self.started.expect("limits began with the first turn");
        let (rules, past) = (&self.rules, &self.past);
        self.kept.entry(limit).or_insert_with(|| Kept {
            limiter: Limiter::new(rules.rate(limit), started, past.get(&**rules.name(limit))),
            turns: Turns::default(),
            wants: HashMap::new(),
            next: None,
            wakes_at: None,
            told_at: None,
        });
    }

    fn kept(&mut self, limit: LimitId) -> &mut Kept {
        self.kept.get_mut(&limit).expect("it was met when it was wanted first")
    }

    /// Serves those that wait at a limit, for as long as it lets them.
    fn serve(&mut self, now: Now, limit: LimitId) {
        loop {
            let Some(kept) = self.kept.get_mut(&limit) else { return };
            let Some(waiting) = kept.take_next() else { return };
            let units = waiting.want.units;
            let ready = self.ready_at(limit, units);
            if ready > now.monotonic {
                self.kept(limit).next = Some(waiting);
                self.wake_at(now, limit, ready);
                return;
            }
            let others = waiting.want.limits.iter().copied().filter(|&other| other != limit);
            let others: Vec<LimitId> = others.collect();
            let turn = waiting.turn.or(Some(limit));
            let stands = |keeper: &mut Self, other| match waiting.turn {
                Some(_) => keeper.ready_at(other, units) > now.monotonic,
                None => !keeper.is_free(now, other, units),
            };
            match others.into_iter().find(|&other| stands(self, other)) {
                None => self.permit(now, waiting.want, turn),
                Some(other) => {
                    self.queue(other, Waiting { turn, ..waiting });
                    let ready = self.ready_at(other, units);
                    self.wake_at(now, other, ready);
                }
            }
        }
    }

    /// `turn`: where it has waited and had its turn.
    fn permit(&mut self, now: Now, want: Want, turn: Option<LimitId>) {
        for &limit in &*want.limits {
            self.kept(limit).limiter.lend(now.monotonic, want.units);
            self.reserve(limit);
        }
        let (limits, asker) = (Arc::clone(&want.limits), Arc::clone(&want.flow));
        let permit = Permit { limits, units: want.units, given: now.monotonic, asker, turn };
        self.answer(&want, turn.is_some(), Some(permit));
    }

    fn answer(&mut self, want: &Want, waited: bool, permit: Option<Permit>) {
        let Want { owner, home, generation, .. } = *want;
        let (pair, flow) = (want.pair.clone(), Arc::clone(&want.flow));
        let answer = WantAnswer { home, pair, flow, generation, waited, permit };
        self.said.push_back(Said::Answer { owner, answer });
    }

    /// Puts a want where it waits for its turn; in front, where it has had one.
    fn queue(&mut self, limit: LimitId, waiting: Waiting) {
        let kept = self.kept(limit);
        if waiting.turn.is_some() && kept.next.is_none() {
            kept.next = Some(waiting);
            return;
        }
        let flow = Arc::clone(&waiting.want.flow);
        let wants = kept.wants.entry(Arc::clone(&flow)).or_default();
        if waiting.turn.is_some() {
            wants.push_front(waiting)
        } else {
            wants.push_back(waiting)
        }
        kept.turns.enter(&flow);
    }

    /// Whether nobody waits at the limit, and it lets so many units pass.
    fn is_free(&mut self, now: Now, limit: LimitId, units: u32) -> bool {
        let kept = self.kept(limit);
        kept.next.is_none() && kept.wants.is_empty() && self.ready_at(limit, units) <= now.monotonic
    }

    /// When so many units may be lent; never, as long as they wait for others to come back or for a reservation.
    fn ready_at(&mut self, limit: LimitId, units: u32) -> Duration {
        self.reserve(limit);
        let limiter = &self.kept(limit).limiter;
        if limiter.is_reserved(units) { limiter.ready_at(units) } else { Duration::MAX }
    }

    fn reserve(&mut self, limit: LimitId) {
        while let Some(units) = self.kept(limit).limiter.reserve() {
            let name = Arc::clone(self.rules.name(limit));
            self.reserving.insert(Arc::clone(&name), limit);
            let period = self.rules.rate(limit).period;
            self.said.push_back(Said::Reserve { limit: name, units, period });
        }
    }

    /// Homes learn why their mail waits, and until when; not more often than anybody could read it.
    fn wake_at(&mut self, now: Now, limit: LimitId, at: Duration) {
        if at == Duration::MAX {
            return;
        }
        let kept = self.kept.get_mut(&limit).expect("it was met when it was wanted first");
        if kept.wakes_at.is_none_or(|earlier| at < earlier) {
            if let Some(later) = kept.wakes_at.replace(at) {
                self.wakes.remove(&(later, limit));
            }
            self.wakes.insert((at, limit));
        }
        let is_told = kept.told_at.is_some_and(|told| now.monotonic < told + PACED_NOTICE_INTERVAL);
        if !is_told {
            kept.told_at = Some(now.monotonic);
            let reason = format!("rate limit of {} of {}", self.rules.rate(limit), self.rules.name(limit)).into();
            let until_ms = now.wall_ms + at.saturating_sub(now.monotonic).as_millis() as u64;
            self.said.push_back(Said::Holds { limit, blocked: Blocked { until_ms, reason } });
        }
    }
}

impl Kept {
    /// Forgets some of those that wait, and returns them.
    fn forget(&mut self, limit: LimitId, is_meant: impl Fn(&Waiting) -> bool) -> Vec<Waiting> {
        let next = self.next.take_if(|next| is_meant(next));
        let mut forgotten: Vec<Waiting> =
            next.map(|next| Waiting { turn: next.turn.or(Some(limit)), ..next }).into_iter().collect();
        let mut flows: Vec<Arc<Flow>> = self.wants.keys().cloned().collect();
        flows.sort_unstable();
        for flow in flows {
            let wants = self.wants.get_mut(&flow).expect("it was just there");
            let (meant, rest): (VecDeque<_>, VecDeque<_>) = std::mem::take(wants).into_iter().partition(&is_meant);
            forgotten.extend(meant);
            *wants = rest;
            if wants.is_empty() {
                self.wants.remove(&flow);
                self.turns.leave(&flow);
            }
        }
        forgotten
    }

    /// The want whose turn it is.
    fn take_next(&mut self) -> Option<Waiting> {
        if let Some(next) = self.next.take() {
            return Some(next);
        }
        let flow = self.turns.take()?;
        let wants = self.wants.get_mut(&flow).expect("a flow that wants turns has wants");
        let waiting = wants.pop_front().expect("a flow that wants turns has wants");
        self.turns.charge(&flow, waiting.want.units.saturating_sub(1));
        if wants.is_empty() {
            self.wants.remove(&flow);
            self.turns.leave(&flow);
        }
        Some(waiting)
    }
}

#[cfg(test)]
mod tests;
