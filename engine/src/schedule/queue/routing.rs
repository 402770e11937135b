//! Entries without a site, or without a source to go by: by domain, and by queue.

use std::sync::Arc;

use super::{EntryKey, Home, Need, QueueKey, Sourceless};
use crate::handover::{Blocked, PairKey, RouteKey};
use crate::schedule::entry::State;

impl Home {
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

    /// The entries that waited for their route, and why the domain was blocked last, if it was; each must be given to
    /// [`Self::make_ready`], [`Self::wait_for_route`] or [`Self::remove`].
    pub fn take_unrouted(&mut self, route: &RouteKey) -> (Vec<EntryKey>, Option<Arc<str>>) {
        self.domains.remove(route).map(|domain| (domain.unrouted, domain.last_block)).unwrap_or_default()
    }

    /// Why a domain was blocked last, also when it is not any more, as long as its mail waits for its route.
    pub fn last_block_of_domain(&self, route: &RouteKey) -> Option<Arc<str>> {
        self.domains.get(route)?.last_block.clone()
    }

    /// The domain has no route for now: its entries keep attempts and due time, and it is asked for again at
    /// `blocked.until_ms`.
    pub fn block_domain(&mut self, route: &RouteKey, blocked: Blocked) {
        if let Some(domain) = self.domains.get_mut(route) {
            domain.asked = false;
            domain.block(blocked);
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
        // It may wait for an answer of the DNS already, and for longer.
        if domain.blocked.as_ref().is_none_or(|present| present.until_ms < blocked.until_ms) {
            domain.block(blocked);
        }
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

    pub(super) fn release(&mut self, over: impl Fn(&Sourceless) -> bool) {
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
}
