//! Entries that are ready for a pair: what its owner is told of them, and those that its credits send out.

use std::sync::Arc;

use super::{EntryKey, Home, Need, Owner, Paced, Pair, Queue};
use crate::config::LimitId;
use crate::fair::Flow;
use crate::handover::{Backlog, Blocked, Credit, PairKey, RollupKey, Ticket};
use crate::limits::{PACED_NOTICE_INTERVAL, STANDING_CREDITS};
use crate::schedule::entry::State;
use crate::schedule::fair::FairQueue;

impl Home {
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
        queues: impl Fn(&PairKey, &Queue) -> bool,
    ) -> Vec<EntryKey> {
        let mut withdrawn = Vec::new();
        for place in 0..self.pairs.len() as u32 {
            let Some(mut pair) = self.pairs[place as usize].take_if(|pair| pairs(&pair.key)) else { continue };
            // It may be about a few, while very many are ready.
            let (flows, keys) = pair.ready.withdraw(|key| queues(&pair.key, self.queue_of(key)));
            self.pairs[place as usize] = Some(pair);
            if flows.is_empty() {
                continue;
            }
            for &key in &keys {
                self.entries[key].set_state(State::Unrouted);
            }
            withdrawn.extend(keys);
            if let Owner::Shard(owner) = self.known_pair(place).owner {
                flows.iter().for_each(|flow| self.tell(place, owner, flow, 0));
                self.serve(place);
            }
        }
        withdrawn
    }

    pub(super) fn push_ready(&mut self, key: EntryKey, pair: u32) -> Arc<Flow> {
        let (flow, recipients) = (Arc::clone(&self.queue_of(key).flow), self.entries.recipients(key).len() as u32);
        let entries = &self.entries;
        let pair = self.pairs[pair as usize].as_mut().expect("a pair that is pushed to exists");
        let is_limited = self.shared_limits.of(pair.key.subject(&flow)).next().is_some();
        pair.ready.push(&flow, key, recipients, is_limited, |entry| entries[entry].due_ms());
        flow
    }

    pub(super) fn pair(&mut self, key: &PairKey) -> u32 {
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

    pub(super) fn known_pair(&self, place: u32) -> &Pair {
        self.pairs[place as usize].as_ref().expect("an entry's pair exists")
    }

    pub(super) fn pair_mut(&mut self, place: u32) -> &mut Pair {
        self.pairs[place as usize].as_mut().expect("a pair that holds something exists")
    }

    /// Spends the pair's standing credits.
    pub(super) fn serve(&mut self, place: u32) {
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

    pub(super) fn send_out(&mut self, place: u32, owner: usize, flow: &Arc<Flow>, entry: EntryKey, credit: Credit) {
        self.entries[entry].set_state(State::Out { pair: place });
        let pair = self.pair_mut(place);
        pair.out += 1;
        pair.ready.tell(flow);
        let pair = pair.key.clone();
        self.needs.push_back(Need::Ticket { owner, pair, entry, credit });
    }

    /// Tells the owner of a flow that has grown from nothing or doubled.
    pub(super) fn tell_if_news(&mut self, place: u32, flow: &Arc<Flow>, key: Option<EntryKey>) {
        if let Owner::Shard(owner) = self.known_pair(place).owner
            && self.pair_mut(place).ready.is_news(flow, key)
        {
            self.tell(place, owner, flow, 0);
        }
    }

    pub(super) fn tell(&mut self, place: u32, owner: usize, flow: &Arc<Flow>, unused: u32) {
        let backlog = self.backlog(place, flow);
        let pair = self.pair_mut(place);
        pair.ready.tell(flow);
        let (pair, flow) = (pair.key.clone(), Arc::clone(flow));
        self.needs.push_back(Need::Tell { owner, pair, flow, backlog, unused });
    }

    pub(super) fn backlog(&self, place: u32, flow: &Arc<Flow>) -> Backlog {
        match self.known_pair(place).ready.waiting(flow) {
            Some((ready, next)) => {
                let next_recipients = self.entries.recipients(next).len() as u32;
                Backlog { ready, oldest_due_ms: self.entries[next].due_ms(), next_recipients }
            }
            None => Backlog::default(),
        }
    }
}
