//! Entries that are taken from wherever they wait: by the operator, at their expiry, or for another configuration.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Domain, EntryKey, Home, Queue, QueueParts};
use crate::config::{MatchedRoute, SharedLimits};
use crate::handover::RouteKey;
use crate::schedule::entry::State;

impl Home {
    /// Another configuration: what is ready, and what waits for a route or a source, is due again at its own time, and
    /// goes as is said now. `matched` tells the route with a `match` that a queue's mail takes.
    pub fn reload(&mut self, shared_limits: Arc<SharedLimits>, matched: impl Fn(&Queue) -> Option<MatchedRoute>) {
        let mut released = self.withdraw_ready(|_| true, |_, _| true);
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

    /// Takes entries that are not out from wherever they wait. What else stands in the same places keeps its order.
    pub(super) fn withdraw(&mut self, keys: &[EntryKey]) {
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
