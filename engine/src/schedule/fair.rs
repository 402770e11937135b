//! The entries of a home that are ready for one (egress source, roll-up) pair.
//!
//! Each flow's entries stand in the order of their due times. The pair's owner names the flow whose turn it is among
//! all homes; what an owner takes unasked goes by the home's own turns.

use std::collections::VecDeque;
use std::sync::Arc;

use ahash::HashMap;

use super::queue::EntryKey;
use crate::fair::{Flow, Turns};

/// Ready entries of one pair at one home.
#[derive(Debug, Default)]
pub struct FairQueue {
    flows: HashMap<Arc<Flow>, Waiting>,
    turns: Turns,
    len: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    /// With the recipients of each.
    entries: VecDeque<(EntryKey, u32)>,
    /// Under limits over many pairs: it goes by the owner's credits only, and takes no turns here.
    is_limited: bool,
    /// The count that the pair's owner was last told.
    told: usize,
}

impl FairQueue {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts an entry behind those of its flow that are due no later, as `due_ms` tells; `recipients` is its cost.
    pub fn push(
        &mut self,
        flow: &Arc<Flow>,
        entry: EntryKey,
        recipients: u32,
        is_limited: bool,
        due_ms: impl Fn(EntryKey) -> u64,
    ) {
        let waiting = self.flows.entry(Arc::clone(flow)).or_default();
        waiting.is_limited = is_limited;
        let own = due_ms(entry);
        // Nearly always the last one; what comes back from an owner was among the first.
        let place = match waiting.entries.back() {
            Some(&(last, _)) if due_ms(last) > own => {
                waiting.entries.partition_point(|&(other, _)| due_ms(other) <= own)
            }
            _ => waiting.entries.len(),
        };
        waiting.entries.insert(place, (entry, recipients.max(1)));
        if !is_limited {
            self.turns.enter(flow);
        }
        self.len += 1;
    }

    /// The entry whose turn it is, of flows that no limit over many pairs holds.
    pub fn pop(&mut self) -> Option<(Arc<Flow>, EntryKey)> {
        let flow = self.turns.take()?;
        let entry = self.take(&flow, 1)?;
        Some((flow, entry))
    }

    /// The next entry of a flow.
    pub fn pop_of(&mut self, flow: &Arc<Flow>) -> Option<EntryKey> {
        self.take(flow, 0)
    }

    /// How many entries a flow has, and the one that goes next.
    pub fn waiting(&self, flow: &Arc<Flow>) -> Option<(usize, EntryKey)> {
        let entries = &self.flows.get(flow)?.entries;
        Some((entries.len(), entries.front()?.0))
    }

    /// Whether the owner is to be told of a flow that got this entry: it has grown from nothing or doubled since, or
    /// permits are asked for by the entry that goes next, and this is it. It then was told.
    pub fn is_news(&mut self, flow: &Arc<Flow>, entry: Option<EntryKey>) -> bool {
        let Some(waiting) = self.flows.get_mut(flow) else { return false };
        let is_next = waiting.is_limited && waiting.entries.front().is_some_and(|&(next, _)| Some(next) == entry);
        let is_news = is_next || waiting.entries.len() >= 2 * waiting.told;
        if is_news {
            waiting.told = waiting.entries.len();
        }
        is_news
    }

    /// The owner learns a flow's count from what it is just sent.
    pub fn tell(&mut self, flow: &Arc<Flow>) {
        if let Some(waiting) = self.flows.get_mut(flow) {
            waiting.told = waiting.entries.len();
        }
    }

    /// Takes out the entries that are meant: flow by flow in the order of their names, each in its own order. The
    /// others stay where they stand. Returns the flows that had such, too.
    pub fn withdraw(&mut self, is_meant: impl Fn(EntryKey) -> bool) -> (Vec<Arc<Flow>>, Vec<EntryKey>) {
        let has_meant = |waiting: &Waiting| waiting.entries.iter().any(|&(entry, _)| is_meant(entry));
        let flows = self.flows.iter().filter(|(_, waiting)| has_meant(waiting));
        let mut flows: Vec<Arc<Flow>> = flows.map(|(flow, _)| Arc::clone(flow)).collect();
        flows.sort_unstable();
        let mut withdrawn = Vec::new();
        for flow in &flows {
            let waiting = self.flows.get_mut(flow).expect("it was just there");
            let (meant, others): (VecDeque<_>, VecDeque<_>) =
                waiting.entries.drain(..).partition(|&(entry, _)| is_meant(entry));
            waiting.entries = others;
            if waiting.entries.is_empty() {
                self.flows.remove(flow);
                self.turns.leave(flow);
            }
            withdrawn.extend(meant.into_iter().map(|(entry, _)| entry));
        }
        self.len -= withdrawn.len();
        (flows, withdrawn)
    }

    /// All flows, in the order of their names.
    pub fn flows(&self) -> Vec<Arc<Flow>> {
        let mut flows: Vec<Arc<Flow>> = self.flows.keys().cloned().collect();
        flows.sort_unstable();
        flows
    }

    /// Empties the queue: flow by flow in the order of their names, each in its own order.
    pub fn drain(&mut self) -> Vec<EntryKey> {
        let mut flows: Vec<(Arc<Flow>, Waiting)> = self.flows.drain().collect();
        flows.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        (self.turns, self.len) = (Turns::default(), 0);
        flows.into_iter().flat_map(|(_, waiting)| waiting.entries).map(|(entry, _)| entry).collect()
    }

    /// `paid` recipients of its cost are charged already.
    fn take(&mut self, flow: &Arc<Flow>, paid: u32) -> Option<EntryKey> {
        let waiting = self.flows.get_mut(flow)?;
        let (entry, cost) = waiting.entries.pop_front()?;
        self.len -= 1;
        if !waiting.is_limited {
            self.turns.charge(flow, cost - paid);
        }
        if waiting.entries.is_empty() {
            self.flows.remove(flow);
            self.turns.leave(flow);
        } else if waiting.entries.len() < waiting.entries.capacity() / 8 {
            waiting.entries.shrink_to_fit();
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(priority: u8, tenant: &str) -> Arc<Flow> {
        Arc::new(Flow { priority, tenant: tenant.into(), campaign: "".into(), ..Flow::default() })
    }

    fn push(queue: &mut FairQueue, flow: &Arc<Flow>, entries: std::ops::Range<u32>, recipients: u32) {
        entries.for_each(|entry| queue.push(flow, EntryKey(entry), recipients, false, |entry| u64::from(entry.0)));
    }

    fn popped(queue: &mut FairQueue) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop()).map(|(_, entry)| entry.0).collect()
    }

    #[test]
    fn a_small_flow_is_not_buried_by_bulk() {
        let mut queue = FairQueue::default();
        push(&mut queue, &flow(1, "large"), 0..10_000, 1);
        push(&mut queue, &flow(1, "small"), 10_000..10_100, 1);
        let order = popped(&mut queue);
        assert_eq!(order.len(), 10_100);
        let last_of_small = order.iter().rposition(|&entry| entry >= 10_000).expect("they are there");
        assert!(last_of_small < 202, "the small flow's last left at {last_of_small}");
        let bulk: Vec<u32> = order.iter().copied().filter(|&entry| entry < 10_000).collect();
        assert!(bulk.is_sorted(), "a flow keeps its own order");
        assert!(queue.is_empty() && queue.flows.is_empty());
    }

    #[test]
    fn cost_counts_recipients() {
        let mut queue = FairQueue::default();
        push(&mut queue, &flow(1, "large"), 0..20, 16);
        push(&mut queue, &flow(1, "small"), 100..120, 1);
        let large = popped(&mut queue).iter().take(18).filter(|&&entry| entry < 100).count();
        assert!(large <= 2, "{large} entries of sixteen recipients went before eighteen of one");
    }

    /// What an owner takes by name counts too.
    #[test]
    fn named_turns_are_charged() {
        let mut queue = FairQueue::default();
        let (one, two) = (flow(1, "one"), flow(1, "two"));
        push(&mut queue, &one, 0..20, 1);
        push(&mut queue, &two, 100..120, 1);
        for entry in 0..5 {
            assert_eq!(queue.pop_of(&one), Some(EntryKey(entry)));
        }
        assert_eq!(queue.waiting(&one), Some((15, EntryKey(5))));
        let next: Vec<u32> = popped(&mut queue).into_iter().take(5).collect();
        assert_eq!(next, [100, 101, 102, 103, 104]);
        assert_eq!(queue.pop_of(&one), None);
    }

    #[test]
    fn what_comes_back_stands_where_it_stood() {
        let mut queue = FairQueue::default();
        let flow = flow(1, "");
        push(&mut queue, &flow, 0..10, 1);
        let first: Vec<EntryKey> = (0..3).filter_map(|_| queue.pop_of(&flow)).collect();
        for entry in first {
            queue.push(&flow, entry, 1, false, |entry| u64::from(entry.0));
        }
        assert_eq!(popped(&mut queue), (0..10).collect::<Vec<u32>>());
    }

    /// What others have had, and how many of theirs the owner knows of, is as it was.
    #[test]
    fn what_is_withdrawn_costs_others_nothing() {
        let mut queue = FairQueue::default();
        let (one, two, three) = (flow(1, "one"), flow(1, "two"), flow(1, "three"));
        [&one, &two].into_iter().zip([0, 100]).for_each(|(flow, from)| push(&mut queue, flow, from..from + 4, 1));
        push(&mut queue, &three, 200..202, 1);
        assert!(queue.is_news(&one, None) && queue.is_news(&two, None));
        assert_eq!(queue.pop_of(&one), Some(EntryKey(0)));
        assert_eq!(queue.withdraw(|_| false), (Vec::new(), Vec::new()));
        let (flows, withdrawn) = queue.withdraw(|EntryKey(entry)| entry % 100 == 1 || entry >= 200);
        assert_eq!(flows, [Arc::clone(&one), three, two]);
        assert_eq!(withdrawn, [1, 200, 201, 101].map(EntryKey));
        assert_eq!((queue.len(), queue.is_news(&one, None)), (5, false));
        assert_eq!(popped(&mut queue), [100, 2, 102, 3, 103]);
        assert!(queue.is_empty() && queue.flows.is_empty());
    }

    #[test]
    fn news_is_growth_from_nothing_or_by_half() {
        let mut queue = FairQueue::default();
        let flow = flow(1, "");
        let mut news = Vec::new();
        for entry in 0..20 {
            push(&mut queue, &flow, entry..entry + 1, 1);
            if queue.is_news(&flow, None) {
                news.push(queue.len());
            }
        }
        assert_eq!(news, [1, 2, 4, 8, 16]);
        (0..20).for_each(|_| drop(queue.pop()));
        assert!(!queue.is_news(&flow, None), "the last ticket told that none is left");
    }
}
