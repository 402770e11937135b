//! Whose turn it is among flows that want to go the same way.
//!
//! Three priority classes share 16:4:1; within a class tenants take turns by deficit round robin, and within a tenant
//! its campaigns do. So a tenant gets no more by having many campaigns, and a small flow is not buried by another's
//! bulk. What is counted are recipients, because peers count them.
//!
//! A home goes by it among its own entries, and a pair's owner among the flows of all homes.

use std::collections::VecDeque;
use std::hash::Hash;
use std::sync::Arc;

use ahash::{HashMap, HashMapExt as _};

use crate::limits::FAIR_DEBTORS_KEPT;

/// Who shares: the messages of one tenant's campaign, in one class.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow {
    /// 0 high, 1 normal, 2 bulk; anything above counts as bulk.
    pub priority: u8,
    /// Empty: the engine's own.
    pub tenant: Arc<str>,
    pub campaign: Arc<str>,
    /// Its egress pool, where a limit over many pairs asks for it; else empty, so that pools share a turn.
    pub pool: Arc<str>,
    /// The same of the recipients' domain.
    pub domain: Arc<str>,
}

impl Flow {
    /// An index below [`CLASSES`].
    pub fn class(&self) -> usize {
        usize::from(self.priority).min(CLASSES - 1)
    }
}

/// How many turns a higher class has for one of a lower.
pub fn class_ratio(higher: u8, lower: u8) -> u32 {
    let weight = |class: u8| CLASS_WEIGHTS[usize::from(class).min(CLASSES - 1)];
    (weight(higher) / weight(lower)) as u32
}

/// The flows that want turns, and what each has had.
#[derive(Debug, Default)]
pub struct Turns {
    classes: [Class; CLASSES],
}

#[derive(Debug, Default)]
struct Class {
    tenants: Ring<Arc<str>>,
    campaigns: HashMap<Arc<str>, Ring<Arc<Flow>>>,
    /// What the class may still take of the present round.
    credit: i64,
}

impl Turns {
    /// The flow wants turns from now on.
    pub fn enter(&mut self, flow: &Arc<Flow>) {
        let class = self.class_of(flow);
        class.campaigns.entry(Arc::clone(&flow.tenant)).or_default().enter(flow);
        class.tenants.enter(&flow.tenant);
    }

    /// The same of a flow whose turn was of no use to it: it is the next of its class.
    pub fn enter_first(&mut self, flow: &Arc<Flow>) {
        self.enter(flow);
        let class = self.class_of(flow);
        class.tenants.put_first(&flow.tenant);
        if let Some(campaigns) = class.campaigns.get_mut(&flow.tenant) {
            campaigns.put_first(flow);
        }
    }

    /// The flow wants none any more.
    pub fn leave(&mut self, flow: &Arc<Flow>) {
        let class = self.class_of(flow);
        let Some(campaigns) = class.campaigns.get_mut(&flow.tenant) else { return };
        campaigns.leave(flow);
        if campaigns.is_empty() {
            class.campaigns.remove(&flow.tenant);
            class.tenants.leave(&flow.tenant);
        }
        // Debts are to those that wait.
        if self.is_empty() {
            self.classes.iter_mut().for_each(|class| class.credit = 0);
        }
    }

    /// The flow that goes next, charged with one recipient.
    pub fn take(&mut self) -> Option<Arc<Flow>> {
        let class = self.next_class()?;
        let class = &mut self.classes[class];
        let tenant = class.tenants.next()?;
        let flow = class.campaigns.get_mut(&tenant)?.next()?;
        class.charge(&flow, 1);
        Some(flow)
    }

    /// What a flow took has turned out to be so many more recipients. Where nobody wants a turn, nobody is owed one.
    pub fn charge(&mut self, flow: &Arc<Flow>, recipients: u32) {
        if !self.is_empty() {
            self.class_of(flow).charge(flow, recipients);
        }
    }

    /// A flow's turn, which was charged with one recipient, was of no use to it.
    pub fn refund(&mut self, flow: &Arc<Flow>) {
        self.class_of(flow).charge_signed(flow, -1);
    }

    pub fn is_empty(&self) -> bool {
        self.classes.iter().all(|class| class.tenants.is_empty())
    }

    /// A class takes its weight's worth of recipients a round, the high one first; the round ends when none that wants
    /// turns has credit. A class in debt sits out as many rounds as it takes.
    fn next_class(&mut self) -> Option<usize> {
        let rounds = self.classes.iter().zip(CLASS_WEIGHTS).filter(|(class, _)| !class.tenants.is_empty());
        let rounds = rounds.map(|(class, weight)| (weight - class.credit).div_euclid(weight)).min()?;
        if rounds > 0 {
            for (class, weight) in self.classes.iter_mut().zip(CLASS_WEIGHTS) {
                class.credit = (class.credit + rounds * weight).min(weight);
            }
        }
        self.classes.iter().position(|class| !class.tenants.is_empty() && class.credit > 0)
    }

    fn class_of(&mut self, flow: &Flow) -> &mut Class {
        &mut self.classes[flow.class()]
    }
}

impl Class {
    fn charge(&mut self, flow: &Arc<Flow>, recipients: u32) {
        self.charge_signed(flow, recipients.into());
    }

    fn charge_signed(&mut self, flow: &Arc<Flow>, recipients: i64) {
        self.credit -= recipients;
        self.tenants.charge(&flow.tenant, recipients);
        if let Some(campaigns) = self.campaigns.get_mut(&flow.tenant) {
            campaigns.charge(flow, recipients);
        }
    }
}

/// Deficit round robin, paid afterwards: whoever has taken more than its share lets the others pass until they have had
/// as much.
#[derive(Debug)]
struct Ring<K> {
    members: HashMap<K, Member>,
    /// Those that want turns, the one whose turn it is in front.
    turns: VecDeque<K>,
}

#[derive(Debug, Default)]
struct Member {
    /// What it may take before its turn is over; a debt, where negative.
    credit: i64,
    waits: bool,
}

impl<K: Clone + Eq + Hash> Ring<K> {
    fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    fn enter(&mut self, key: &K) {
        let member = self.members.entry(key.clone()).or_default();
        if !member.waits {
            member.waits = true;
            // What was saved up is not kept, what is owed is.
            member.credit = (member.credit + QUANTUM).min(QUANTUM);
            self.turns.push_back(key.clone());
        }
    }

    /// It waits, and its turn comes now.
    fn put_first(&mut self, key: &K) {
        self.turns.retain(|other| other != key);
        self.turns.push_front(key.clone());
    }

    fn leave(&mut self, key: &K) {
        let Some(member) = self.members.get_mut(key).filter(|member| member.waits) else { return };
        member.waits = false;
        if self.turns.front() == Some(key) {
            self.turns.pop_front();
        } else {
            self.turns.retain(|other| other != key);
        }
        // Debts are to those that wait, and there is an end to how many are remembered.
        if self.turns.is_empty() {
            self.members.clear();
        } else if self.members.len() > self.turns.len() + FAIR_DEBTORS_KEPT {
            self.members.retain(|_, member| member.waits);
        } else if self.members.get(key).is_some_and(|member| member.credit >= 0) {
            self.members.remove(key);
        }
    }

    /// The member whose turn it is.
    fn next(&mut self) -> Option<K> {
        loop {
            for _ in 0..self.turns.len() {
                let front = self.turns.front()?;
                let member = self.members.get_mut(front)?;
                if member.credit > 0 {
                    return Some(front.clone());
                }
                member.credit += QUANTUM;
                self.turns.rotate_left(1);
            }
            // All that wait are in debt: the rounds in which nobody would go are over at once.
            let most = self.turns.iter().filter_map(|key| self.members.get(key)).map(|member| member.credit).max()?;
            if most <= 0 {
                let rounds = (QUANTUM - most).div_euclid(QUANTUM);
                self.turns.iter().for_each(|key| {
                    if let Some(member) = self.members.get_mut(key) {
                        member.credit += rounds * QUANTUM;
                    }
                });
            }
        }
    }

    fn charge(&mut self, key: &K, recipients: i64) {
        if let Some(member) = self.members.get_mut(key) {
            member.credit -= recipients;
        } else if recipients > 0 && !self.turns.is_empty() && self.members.len() < self.turns.len() + FAIR_DEBTORS_KEPT
        {
            self.members.insert(key.clone(), Member { credit: -recipients, waits: false });
        }
    }
}

impl<K> Default for Ring<K> {
    fn default() -> Self {
        Self { members: HashMap::new(), turns: VecDeque::new() }
    }
}

/// Priority classes.
pub const CLASSES: usize = 3;

/// High, normal, bulk.
const CLASS_WEIGHTS: [i64; CLASSES] = [16, 4, 1];
/// Recipients that a tenant, or a campaign of its, may take each time its turn comes.
const QUANTUM: i64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(priority: u8, tenant: &str, campaign: &str) -> Arc<Flow> {
        Arc::new(Flow { priority, tenant: tenant.into(), campaign: campaign.into(), ..Flow::default() })
    }

    /// So many turns, and how many each of the flows had.
    fn shares(turns: &mut Turns, count: usize, flows: &[&Arc<Flow>]) -> Vec<usize> {
        let taken: Vec<Arc<Flow>> = (0..count).map(|_| turns.take().expect("somebody wants a turn")).collect();
        flows.iter().map(|flow| taken.iter().filter(|taken| taken == flow).count()).collect()
    }

    #[test]
    fn a_tenant_gets_no_more_by_having_many_campaigns() {
        let mut turns = Turns::default();
        let one = flow(1, "one", "");
        let many: Vec<Arc<Flow>> = (0..10).map(|campaign| flow(1, "many", &campaign.to_string())).collect();
        many.iter().for_each(|flow| turns.enter(flow));
        turns.enter(&one);
        assert_eq!(shares(&mut turns, 200, &[&one, &many[0], &many[9]]), [100, 10, 10]);
    }

    #[test]
    fn classes_share_sixteen_four_one() {
        let mut turns = Turns::default();
        let flows = [0, 1, 2].map(|priority| flow(priority, "a", ""));
        flows.iter().for_each(|flow| turns.enter(flow));
        let [high, normal, bulk] = &flows;
        assert_eq!(shares(&mut turns, 210, &[high, normal, bulk]), [160, 40, 10]);
        turns.leave(normal);
        assert_eq!(shares(&mut turns, 170, &[high, bulk]), [160, 10]);
        turns.leave(high);
        assert_eq!(shares(&mut turns, 50, &[bulk]), [50], "a lone class is not held back");
        turns.enter(high);
        assert_eq!(shares(&mut turns, 1, &[high]), [1], "and lets a higher one pass at once");
    }

    /// Whoever takes a hundred recipients at once waits until the others have had as many.
    #[test]
    fn shares_are_counted_in_recipients() {
        let mut turns = Turns::default();
        let (large, small) = (flow(1, "large", ""), flow(1, "small", ""));
        turns.enter(&large);
        turns.enter(&small);
        let mut recipients = [0_u32; 2];
        for _ in 0..10_000 {
            let next = turns.take().unwrap();
            if next == large {
                turns.charge(&large, 99);
                recipients[0] += 100;
            } else {
                recipients[1] += 1;
            }
        }
        assert!(recipients[0].abs_diff(recipients[1]) <= 100, "{recipients:?}");
    }

    /// Who comes for each message anew does not lose its debt by going in between.
    #[test]
    fn a_debt_outlives_an_absence() {
        let mut turns = Turns::default();
        let (large, small) = (flow(1, "large", ""), flow(1, "small", ""));
        turns.enter(&small);
        let mut recipients = [0_u32; 2];
        for _ in 0..10_000 {
            turns.enter(&large);
            let next = turns.take().unwrap();
            if next == large {
                turns.leave(&large);
                turns.charge(&large, 99);
                recipients[0] += 100;
            } else {
                recipients[1] += 1;
            }
        }
        assert!(recipients[0].abs_diff(recipients[1]) <= 100, "{recipients:?}");
    }

    #[test]
    fn debts_of_a_class_are_paid_in_rounds() {
        let mut turns = Turns::default();
        let (high, bulk) = (flow(0, "a", ""), flow(2, "b", ""));
        turns.enter(&high);
        turns.enter(&bulk);
        let mut recipients = [0_u32; 2];
        for _ in 0..34_000 {
            let next = turns.take().unwrap();
            recipients[usize::from(next.priority) / 2] += 1;
            if next == bulk {
                turns.charge(&bulk, 999);
                recipients[1] += 999;
            }
        }
        assert!(recipients[1].abs_diff(recipients[0] / 16) <= 1_000, "{recipients:?}");
        turns.leave(&high);
        assert_eq!(turns.take(), Some(bulk), "nobody waits for a debt to be paid to nobody");
    }

    /// Who could not use its turn has lost nothing.
    #[test]
    fn a_turn_of_no_use_comes_again_at_once() {
        let mut turns = Turns::default();
        let (one, two) = (flow(1, "one", ""), flow(1, "two", ""));
        turns.enter(&one);
        turns.enter(&two);
        assert_eq!(turns.take().as_ref(), Some(&one));
        turns.leave(&one);
        turns.refund(&one);
        turns.enter_first(&one);
        assert_eq!(shares(&mut turns, 1, &[&one, &two]), [1, 0]);
        assert_eq!(shares(&mut turns, 10, &[&one, &two]), [5, 5]);
    }

    /// What a class took while nobody waited, or from those that have gone, is owed to nobody.
    #[test]
    fn a_class_owes_nothing_where_nobody_waits() {
        let mut turns = Turns::default();
        let (high, bulk) = (flow(0, "a", ""), flow(2, "b", ""));
        turns.charge(&bulk, 1_000);
        turns.enter(&high);
        turns.enter(&bulk);
        turns.charge(&bulk, 1_000);
        turns.leave(&high);
        turns.leave(&bulk);
        turns.enter(&high);
        turns.enter(&bulk);
        assert_eq!(shares(&mut turns, 34, &[&high, &bulk]), [32, 2]);
    }

    #[test]
    fn without_a_flow_there_is_no_turn() {
        let mut turns = Turns::default();
        assert_eq!(turns.take(), None);
        let flow = flow(7, "", "");
        turns.enter(&flow);
        turns.enter(&flow);
        assert_eq!(turns.take(), Some(Arc::clone(&flow)));
        turns.leave(&flow);
        turns.leave(&flow);
        assert_eq!(turns.take(), None);
        assert!(turns.is_empty());
        turns.charge(&flow, 1_000);
        turns.enter(&flow);
        assert_eq!(turns.take(), Some(flow));
    }
}
