//! Whose turn it is among flows that want to go the same way.
//!
//! Three priority classes share 16:4:1; within a class tenants share evenly, and within a tenant its campaigns do. So a
//! tenant gets no more by having many campaigns, and a small flow is not buried by another's bulk. What is counted are
//! recipients, because peers count them. Whoever has had least, by its class's part, goes next; who comes begins where
//! the one stood that went last, and so neither waits for what was before it nor is ahead of those that waited
//! (start-time fair queueing: Goyal, Vin and Cheng, SIGCOMM 1996).
//!
//! A home goes by it among its own entries, and a pair's owner among the flows of all homes.
//!
//! # What a pair promises (FAIR)
//!
//! Service is recipients whose MAIL was written. Let a flow have mail at a pair, held back by no limit of its own, and
//! let *w* be what others may have for each recipient of its: 1 within its class, 4 or 16 where they are of a higher
//! one, a 4th or a 16th where they are of a lower one. Until *n* of its recipients are served, others are served at
//! most *wn + max(w, 1) + A + 2h + 2*:
//!
//! * *wn + max(w, 1)* by turns. Nobody has had more than one turn above whoever waits.
//! * *A* are credits out and tickets in hand, which had their turns before: at a paced pair what goes in 0.1 s, and at
//!   least 2. A ticket of a lower class is passed on the way only as often as its class has not been yet.
//! * *2h* are the standing credits of *h* homes, which send without asking and are charged when they come.
//! * 2 are on the way: one that rides already, and one whose permit was the first at a keeper's limit.
//!
//! A flow is charged when it gets a credit. What comes to nothing before its MAIL is refunded: a credit that is given
//! back or void, a ticket that goes home. So rate waits, refusals and permits that came too late change nothing about
//! whose turn it is. A permit of limits over many pairs goes to whose turn it is of those that it covers
//! (`pool/demand.rs`), whoever asked for it. Mail that moves to the pair from another source has mail there from then
//! on.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use ahash::{HashMap, HashMapExt as _};

use crate::limits::FAIR_DEBTORS_KEPT;

/// Who shares: the messages of one tenant's campaign, in one class.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
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

/// Each delivery looks flows up some fifteen times: classes and pools alone hardly tell two apart.
impl Hash for Flow {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.tenant.hash(state);
        self.campaign.hash(state);
        self.domain.hash(state);
    }
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
    /// What the class that went last had had before.
    now: i64,
}

#[derive(Debug, Default)]
struct Class {
    /// Recipients, each at the class's cost.
    had: i64,
    tenants: Line<Arc<str>>,
    campaigns: HashMap<Arc<str>, Line<Arc<Flow>>>,
}

impl Turns {
    /// The flow wants turns from now on.
    pub fn enter(&mut self, flow: &Arc<Flow>) {
        let now = self.now;
        let class = &mut self.classes[flow.class()];
        if class.tenants.next().is_none() {
            class.had = class.had.max(now);
        }
        class.campaigns.entry(Arc::clone(&flow.tenant)).or_default().enter(flow);
        class.tenants.enter(&flow.tenant);
    }

    /// The flow wants none for a while. What it has had is still counted against what others have.
    pub fn pause(&mut self, flow: &Arc<Flow>) {
        let class = &mut self.classes[flow.class()];
        let Some(campaigns) = class.campaigns.get_mut(&flow.tenant) else { return };
        campaigns.pause(flow);
        if campaigns.next().is_none() {
            class.tenants.pause(&flow.tenant);
        }
    }

    /// The flow wants none any more.
    pub fn leave(&mut self, flow: &Arc<Flow>) {
        let class = &mut self.classes[flow.class()];
        let Some(campaigns) = class.campaigns.get_mut(&flow.tenant) else { return };
        campaigns.leave(flow);
        if campaigns.is_empty() {
            class.campaigns.remove(&flow.tenant);
            class.tenants.leave(&flow.tenant);
        } else if campaigns.next().is_none() {
            class.tenants.pause(&flow.tenant);
        }
        // Debts are to those that are there.
        if self.is_empty() {
            self.now = 0;
            self.classes.iter_mut().for_each(|class| class.had = 0);
        }
    }

    /// The flow whose turn it is.
    pub fn next(&self) -> Option<&Arc<Flow>> {
        let class = &self.classes[self.next_class()?];
        class.campaigns.get(class.tenants.next()?)?.next()
    }

    /// The same; it has the turn, and is charged with one recipient.
    pub fn take(&mut self) -> Option<Arc<Flow>> {
        let flow = Arc::clone(self.next()?);
        self.take_for(&flow);
        Some(flow)
    }

    /// This flow has a turn, whosever it is by the order.
    pub fn take_for(&mut self, flow: &Arc<Flow>) {
        let class = &mut self.classes[flow.class()];
        if class.tenants.next().is_none() {
            class.had = class.had.max(self.now);
        }
        self.now = class.had;
        class.had += cost(flow.class());
        class.tenants.take_for(&flow.tenant);
        if let Some(campaigns) = class.campaigns.get_mut(&flow.tenant) {
            campaigns.take_for(flow);
        }
    }

    /// The lower, the earlier it would go, also where it pauses. Of flows that are here, no two are alike.
    pub fn place_of(&self, flow: &Arc<Flow>) -> impl Ord + use<> {
        let class = &self.classes[flow.class()];
        let had = if class.tenants.next().is_some() { class.had } else { class.had.max(self.now) };
        let campaigns = class.campaigns.get(&flow.tenant);
        let places = (class.tenants.place_of(&flow.tenant), campaigns.map(|campaigns| campaigns.place_of(flow)));
        (had, flow.class(), places)
    }

    /// A flow has had so many recipients, or more than it was charged with. Where nobody else is, nobody is owed
    /// anything.
    pub fn charge(&mut self, flow: &Arc<Flow>, recipients: u32) {
        if recipients == 0 || self.is_empty() {
            return;
        }
        let now = self.now;
        let class = &mut self.classes[flow.class()];
        if class.tenants.next().is_none() {
            class.had = class.had.max(now);
        }
        class.had += i64::from(recipients) * cost(flow.class());
        class.tenants.charge(&flow.tenant, recipients);
        if let Some(campaigns) = class.campaigns.get_mut(&flow.tenant) {
            campaigns.charge(flow, recipients);
        }
    }

    /// A flow was charged for what it has not had after all: among those that have had as much it goes first.
    pub fn refund(&mut self, flow: &Arc<Flow>, recipients: u32) {
        if recipients == 0 || self.is_empty() {
            return;
        }
        let class = &mut self.classes[flow.class()];
        class.had -= i64::from(recipients) * cost(flow.class());
        class.tenants.refund(&flow.tenant, recipients);
        if let Some(campaigns) = class.campaigns.get_mut(&flow.tenant) {
            campaigns.refund(flow, recipients);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.classes.iter().all(|class| class.tenants.is_empty())
    }

    /// Of those that have had as much, the highest.
    fn next_class(&self) -> Option<usize> {
        let waiting = (0..CLASSES).filter(|&class| self.classes[class].tenants.next().is_some());
        waiting.min_by_key(|&class| self.classes[class].had)
    }
}

/// What a recipient costs its class.
fn cost(class: usize) -> i64 {
    CLASS_WEIGHTS[0] / CLASS_WEIGHTS[class]
}

/// Those that share evenly: whoever has had least goes next. Who comes, or comes back, begins where the one stood that
/// went last: what was saved up is not kept, what is owed is.
#[derive(Debug)]
struct Line<K> {
    members: HashMap<K, Member>,
    /// How many of them are there, the others being remembered for what they owe.
    present: usize,
    /// Those that want turns.
    waiting: BTreeMap<Place, K>,
    /// What the one that went last had had before.
    now: i64,
    /// The next to come among equals, and the next to go before them.
    last: i64,
    first: i64,
}

#[derive(Debug)]
struct Member {
    place: Place,
    is_present: bool,
}

/// Recipients, and an order among equals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    had: i64,
    order: i64,
}

impl<K: Clone + Eq + Hash> Line<K> {
    fn is_empty(&self) -> bool {
        self.present == 0
    }

    fn enter(&mut self, key: &K) {
        let (now, last) = (self.now, &mut self.last);
        let member = self.members.entry(key.clone()).or_insert_with(|| {
            *last += 1;
            Member { place: Place { had: now, order: *last }, is_present: false }
        });
        self.present += usize::from(!std::mem::replace(&mut member.is_present, true));
        let waits = self.waiting.contains_key(&member.place);
        if !waits {
            member.place.had = member.place.had.max(now);
            self.waiting.insert(member.place, key.clone());
        }
    }

    fn pause(&mut self, key: &K) {
        if let Some(member) = self.members.get(key) {
            self.waiting.remove(&member.place);
        }
    }

    fn leave(&mut self, key: &K) {
        let Some(member) = self.members.get_mut(key).filter(|member| member.is_present) else { return };
        member.is_present = false;
        self.waiting.remove(&member.place);
        self.present -= 1;
        // There is an end to how many debts are remembered.
        if self.present == 0 {
            self.members.clear();
            (self.now, self.last, self.first) = (0, 0, 0);
        } else if member.place.had <= self.now {
            self.members.remove(key);
        } else if self.members.len() > 2 * self.present + FAIR_DEBTORS_KEPT {
            let now = self.now;
            self.members.retain(|_, member| member.is_present || member.place.had > now);
            if self.members.len() > self.present + FAIR_DEBTORS_KEPT {
                self.members.retain(|_, member| member.is_present);
            }
        }
    }

    fn next(&self) -> Option<&K> {
        self.waiting.first_key_value().map(|(_, key)| key)
    }

    fn place_of(&self, key: &K) -> Option<Place> {
        let place = self.members.get(key)?.place;
        let had = if self.waiting.contains_key(&place) { place.had } else { place.had.max(self.now) };
        Some(Place { had, ..place })
    }

    fn take_for(&mut self, key: &K) {
        let Some(member) = self.members.get_mut(key) else { return };
        self.last += 1;
        let waiting = self.waiting.remove(&member.place);
        let had = if waiting.is_some() { member.place.had } else { member.place.had.max(self.now) };
        self.now = had;
        member.place = Place { had: had + 1, order: self.last };
        if let Some(key) = waiting {
            self.waiting.insert(member.place, key);
        }
    }

    fn charge(&mut self, key: &K, recipients: u32) {
        self.last += 1;
        let (now, order, recipients) = (self.now, self.last, i64::from(recipients));
        let is_forgotten = self.is_empty() || self.members.len() >= self.present + FAIR_DEBTORS_KEPT;
        match self.members.get_mut(key) {
            Some(member) => {
                let waiting = self.waiting.remove(&member.place);
                let had = if waiting.is_some() { member.place.had } else { member.place.had.max(now) };
                member.place = Place { had: had + recipients, order };
                if let Some(key) = waiting {
                    self.waiting.insert(member.place, key);
                }
            }
            None if is_forgotten => {}
            None => {
                let place = Place { had: now + recipients, order };
                self.members.insert(key.clone(), Member { place, is_present: false });
            }
        }
    }

    fn refund(&mut self, key: &K, recipients: u32) {
        self.first -= 1;
        let Some(member) = self.members.get_mut(key) else { return };
        let place = Place { had: member.place.had - i64::from(recipients), order: self.first };
        if let Some(key) = self.waiting.remove(&std::mem::replace(&mut member.place, place)) {
            self.waiting.insert(place, key);
        }
    }
}

impl<K> Default for Line<K> {
    fn default() -> Self {
        Self { members: HashMap::new(), present: 0, waiting: BTreeMap::new(), now: 0, last: 0, first: 0 }
    }
}

/// Priority classes.
pub const CLASSES: usize = 3;

/// High, normal, bulk.
const CLASS_WEIGHTS: [i64; CLASSES] = [16, 4, 1];

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
        turns.refund(&one, 1);
        turns.enter(&one);
        assert_eq!(shares(&mut turns, 1, &[&one, &two]), [1, 0]);
        assert_eq!(shares(&mut turns, 10, &[&one, &two]), [5, 5]);
    }

    /// While it was away it has saved nothing up.
    #[test]
    fn a_class_that_comes_begins_where_the_others_are() {
        let mut turns = Turns::default();
        let (high, bulk) = (flow(0, "a", ""), flow(2, "b", ""));
        turns.enter(&bulk);
        assert_eq!(shares(&mut turns, 100, &[&bulk]), [100]);
        turns.enter(&high);
        let shares = shares(&mut turns, 34, &[&high, &bulk]);
        assert!(shares[1] >= 1 && shares[0] >= 31, "{shares:?}");
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

    /// What it has had is counted on, but what others had meanwhile is not made up for.
    #[test]
    fn a_pause_saves_nothing_up_and_forgets_nothing() {
        let mut turns = Turns::default();
        let (one, two) = (flow(1, "one", ""), flow(1, "two", ""));
        turns.enter(&one);
        turns.enter(&two);
        turns.charge(&one, 5);
        turns.pause(&one);
        turns.enter(&one);
        assert_eq!(shares(&mut turns, 5, &[&one, &two]), [0, 5]);
        turns.pause(&one);
        assert_eq!(shares(&mut turns, 100, &[&one, &two]), [0, 100]);
        turns.enter(&one);
        assert_eq!(shares(&mut turns, 10, &[&one, &two]), [5, 5]);
        turns.leave(&two);
        turns.pause(&one);
        assert_eq!((turns.next(), turns.is_empty()), (None, false));
        turns.leave(&one);
        assert!(turns.is_empty());
    }

    /// However often it happens.
    #[test]
    fn what_came_to_nothing_is_made_up_for() {
        let mut turns = Turns::default();
        let (high, bulk) = (flow(0, "a", ""), flow(2, "b", ""));
        turns.enter(&high);
        turns.enter(&bulk);
        let (mut of_high, mut of_bulk) = (0_u32, 0_u32);
        for attempt in 0..3_400 {
            let flow = turns.take().expect("both want turns");
            match flow == bulk {
                true if attempt % 2 == 0 => turns.refund(&bulk, 1),
                true => of_bulk += 1,
                false => of_high += 1,
            }
        }
        assert!(of_bulk.abs_diff(of_high / 16) <= 1, "{of_bulk} beside {of_high}");
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
