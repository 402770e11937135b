//! What homes have ready for a pair, flow by flow, and whose turn it is.
//!
//! The owner gives credits one turn at a time: to the flow that [`Turns`] names among those of all homes, and of the
//! homes that have such mail to the one whose oldest entry was due first. So a tenant's share is the same on one shard
//! and on many. A home answers each credit with a ticket or gives it back.
//!
//! A flow under limits over many pairs gets no credit at its turn: a permit is wanted, and the credit is given when it
//! comes. While the want waits, the flow wants no turn. Flows under the same limits are a *lane*. A permit serves any
//! flow that is under no other limits, so whose it is is decided when it comes, by turns.
//!
//! A flow is charged for what it holds, credits and tickets, and for what was written of it: what comes to nothing is
//! refunded. To ask costs nothing: whose turn it is asks first.
//!
//! Over 500 lines: flows, lanes and their turns change together.

use std::collections::VecDeque;
use std::sync::Arc;

use ahash::{HashMap, HashMapExt as _};

use crate::config::{LimitId, SharedLimits};
use crate::fair::{CLASSES, Flow, Turns};
use crate::handover::{Backlog, Credit, PairKey, Permit};
use crate::limits::STANDING_CREDITS;

/// The demand for one pair.
#[derive(Debug)]
pub(super) struct Demand {
    /// Of flows that may get a credit, or ask for a permit.
    turns: Turns,
    /// Of flows under the same limits, whether or not they may ask.
    lanes: HashMap<Arc<[LimitId]>, Turns>,
    /// What there is of a flow. One of which no home has anything is not kept.
    flows: HashMap<Arc<Flow>, Offered>,
    /// How many of them each class has.
    present: [usize; CLASSES],
    homes: Vec<Home>,
    /// Credits that were given to flows, and permits that were asked for, and are not answered yet.
    granted: usize,
    shared_limits: Arc<SharedLimits>,
    /// Homes' flows that want no turn until the pair has moved.
    postponed: Vec<(usize, Arc<Flow>)>,
}

/// A flow, and what each home has of it.
#[derive(Debug)]
struct Offered {
    /// Those over many pairs that it is under; nearly always none.
    limits: Option<Arc<[LimitId]>>,
    shares: Vec<Share>,
    /// Tickets that are not begun.
    tickets: usize,
    /// Whether it wants turns, and such of its lane, as these were told last.
    wants_turns: bool,
    wants_lane: bool,
}

/// A home's part of a flow.
#[derive(Debug, Clone, Default)]
struct Share {
    backlog: Backlog,
    granted: usize,
    /// Only of flows under limits.
    limited: Option<Box<Limited>>,
}

#[derive(Debug, Clone, Default)]
struct Limited {
    /// Wants that are not answered yet, and such as were answered that they wait.
    asked: usize,
    waiting: usize,
    /// Wants that were permitted at once since one waited: so many more may be asked for at a time.
    flowing: usize,
    /// Of credits that are out, in their order.
    permits: VecDeque<Permit>,
    is_postponed: bool,
}

/// Whose turn it is, and what is to be done about it.
#[derive(Debug)]
pub(super) enum Turn {
    Credit { home: usize, flow: Arc<Flow> },
    Want { home: usize, flow: Arc<Flow>, limits: Arc<[LimitId]>, units: u32 },
}

#[derive(Debug, Clone, Copy, Default)]
struct Home {
    /// It has been heard of, so that it has a word on the pair's owner.
    known: bool,
    /// Its standing credits.
    standing: u32,
}

impl Demand {
    pub(super) fn new(homes: usize, shared_limits: Arc<SharedLimits>) -> Self {
        Self {
            turns: Turns::default(),
            lanes: HashMap::new(),
            flows: HashMap::new(),
            present: [0; CLASSES],
            homes: vec![Home::default(); homes],
            granted: 0,
            shared_limits,
            postponed: Vec::new(),
        }
    }

    /// A home that is heard of for the first time has its standing credits already.
    pub(super) fn meet(&mut self, home: usize) {
        let home = &mut self.homes[home];
        if !home.known {
            *home = Home { known: true, standing: STANDING_CREDITS };
        }
    }

    /// What a home has now of a flow; `unused` of its credits have come back. Returns their permits.
    pub(super) fn tell(
        &mut self,
        home: usize,
        pair: &PairKey,
        flow: &Arc<Flow>,
        backlog: Backlog,
        unused: u32,
    ) -> VecDeque<Permit> {
        let share = self.share(home, pair, flow);
        let unused = share.granted.min(unused as usize);
        share.backlog = backlog;
        share.granted -= unused;
        let granted = share.granted;
        let permits = share.limited.as_mut().map(|limited| limited.permits.split_off(granted));
        self.granted -= unused;
        self.refund(flow, unused as u32);
        self.follow(flow);
        permits.unwrap_or_default()
    }

    /// A home's ticket, for so many recipients; `left` is ready behind it. Returns the permit of its credit.
    pub(super) fn take(
        &mut self,
        home: usize,
        pair: &PairKey,
        flow: &Arc<Flow>,
        left: Backlog,
        credit: Credit,
        recipients: u32,
    ) -> Option<Permit> {
        let share = self.share(home, pair, flow);
        share.backlog = left;
        let mut permit = None;
        // One was charged with the credit.
        let mut paid = 0;
        match credit {
            Credit::Standing => self.homes[home].standing = self.homes[home].standing.saturating_sub(1),
            Credit::Turn => {
                let answered = share.granted.min(1);
                share.granted -= answered;
                permit = share.limited.as_mut().and_then(|limited| limited.permits.pop_front());
                self.granted -= answered;
                paid = answered as u32;
            }
        }
        self.flows.get_mut(flow).expect("it is kept for its share").tickets += 1;
        self.charge(flow, recipients.saturating_sub(paid));
        self.follow(flow);
        permit
    }

    /// A ticket is begun.
    pub(super) fn started(&mut self, flow: &Arc<Flow>) {
        self.flows.get_mut(flow).expect("a flow with a ticket is kept").tickets -= 1;
        self.follow(flow);
    }

    /// A ticket goes home without an attempt.
    pub(super) fn send_home(&mut self, flow: &Arc<Flow>, recipients: u32) {
        self.refund(flow, recipients);
        self.started(flow);
    }

    /// A ticket for so many recipients goes home because its permit is too small, and goes next there again. What was
    /// told with it is of those behind it: a permit for these would be too small for it once more, and so on for ever.
    pub(super) fn expect_back(&mut self, home: usize, flow: &Arc<Flow>, recipients: u32) {
        let backlog = &mut self.flows.get_mut(flow).expect("a flow with a ticket is kept").shares[home].backlog;
        backlog.ready += 1;
        backlog.next_recipients = recipients;
        self.follow(flow);
    }

    /// What a flow was charged with has come to nothing before its MAIL.
    pub(super) fn refund(&mut self, flow: &Arc<Flow>, recipients: u32) {
        self.turns.refund(flow, recipients);
        if let Some(lane) = self.lane(flow) {
            lane.refund(flow, recipients);
        }
    }

    fn charge(&mut self, flow: &Arc<Flow>, recipients: u32) {
        self.turns.charge(flow, recipients);
        if let Some(lane) = self.lane(flow) {
            lane.charge(flow, recipients);
        }
    }

    fn lane(&mut self, flow: &Arc<Flow>) -> Option<&mut Turns> {
        self.lanes.get_mut(self.flows.get(flow)?.limits.as_ref()?)
    }

    /// Whose turn it is, and at which home; [`Self::begin`] takes it. A transaction of the pair has so many recipients
    /// at most.
    pub(super) fn next(&self, batch_max: usize) -> Option<Turn> {
        let flow = self.turns.next()?;
        let offered = self.flows.get(flow).expect("a flow that wants turns is kept");
        let home = offered.oldest(Share::is_hungry).expect("a flow that wants turns is hungry at some home");
        let flow = Arc::clone(flow);
        let Some(limits) = &offered.limits else { return Some(Turn::Credit { home, flow }) };
        let units = self.units(&offered.shares[home], limits, batch_max);
        Some(Turn::Want { home, flow, limits: Arc::clone(limits), units })
    }

    /// The turn that [`Self::next`] told is taken.
    pub(super) fn begin(&mut self, turn: &Turn) {
        let (Turn::Credit { home, flow } | Turn::Want { home, flow, .. }) = turn;
        let share = &mut self.flows.get_mut(flow).expect("a flow that wants turns is kept").shares[*home];
        match (turn, &mut share.limited) {
            (Turn::Want { .. }, Some(limited)) => limited.asked += 1,
            _ => {
                share.granted += 1;
                self.turns.take_for(flow);
            }
        }
        self.granted += 1;
        self.follow(flow);
    }

    /// The want of a home's flow waits.
    pub(super) fn wait(&mut self, home: usize, flow: &Arc<Flow>) {
        let Some(limited) = self.limited(home, flow) else { return };
        limited.asked -= 1;
        limited.waiting += 1;
        limited.flowing = 0;
        self.granted -= 1;
        self.follow(flow);
    }

    /// A want was permitted, after it `waited` or at once. Tells whose mail is to have the permit: whose turn it is
    /// of those that it is enough for; [`Self::give`] or [`Self::postpone`] follows.
    pub(super) fn permitted(
        &mut self,
        home: usize,
        flow: &Arc<Flow>,
        waited: bool,
        permit: &Permit,
        batch_max: usize,
    ) -> Option<(usize, Arc<Flow>)> {
        let limited = self.limited(home, flow)?;
        if waited {
            limited.waiting -= 1;
        } else {
            limited.asked -= 1;
            limited.flowing += 1;
            self.granted -= 1;
        }
        self.follow(flow);
        let covered = self.lanes.iter().filter(|(limits, _)| limits.iter().all(|id| permit.limits.contains(id)));
        let next = covered.filter_map(|(_, lane)| lane.next());
        let fitting = next.filter_map(|next| Some((self.covered_home(next, permit, batch_max)?, next)));
        let taker = fitting.min_by_key(|(_, next)| self.turns.place_of(next));
        // Only what it is enough for: a ticket of more would go home, and the same be asked for again.
        let own = || Some((self.covered_home(flow, permit, batch_max)?, flow));
        taker.or_else(own).map(|(home, flow)| (home, Arc::clone(flow)))
    }

    /// The home of a flow's oldest entry, of those whose next one is known to need no more than a permit has.
    fn covered_home(&self, flow: &Flow, permit: &Permit, batch_max: usize) -> Option<usize> {
        let offered = self.flows.get(flow)?;
        let limits = offered.limits.as_ref()?;
        offered.oldest(|share| {
            let is_known = share.has_mail() && share.is_known(share.granted);
            is_known && self.units(share, limits, batch_max) <= permit.units
        })
    }

    /// What the next entry needs of limits. The home divides what is too large in the same way.
    fn units(&self, share: &Share, limits: &[LimitId], batch_max: usize) -> u32 {
        let limited = self.shared_limits.batch_max(limits.iter().copied());
        share.backlog.next_recipients.min(batch_max as u32).clamp(1, limited)
    }

    /// A permit becomes a credit of this flow. Returns what it does not need of it.
    pub(super) fn give(&mut self, home: usize, flow: &Arc<Flow>, mut permit: Permit) -> Option<Permit> {
        let limits = self.flows.get(flow).and_then(|offered| offered.limits.clone()).expect("it is under limits");
        let left = permit.leave(limits);
        self.turns.take_for(flow);
        if let Some(lane) = self.lane(flow) {
            lane.take_for(flow);
        }
        let share = &mut self.flows.get_mut(flow).expect("it has mail").shares[home];
        share.limited.as_mut().expect("it is under limits").permits.push_back(permit);
        share.granted += 1;
        self.granted += 1;
        self.follow(flow);
        left
    }

    /// The pair has no use for what was asked for now: it asks again once it has moved.
    pub(super) fn postpone(&mut self, home: usize, flow: &Arc<Flow>) {
        let Some(share) = self.flows.get_mut(flow).map(|offered| &mut offered.shares[home]) else { return };
        let has_mail = share.has_mail();
        if let Some(limited) = &mut share.limited
            && has_mail
            && !std::mem::replace(&mut limited.is_postponed, true)
        {
            self.postponed.push((home, Arc::clone(flow)));
        }
        self.follow(flow);
    }

    /// The pair has moved: flows whose permits were of no use to it want turns again.
    pub(super) fn resume_postponed(&mut self) {
        for (home, flow) in std::mem::take(&mut self.postponed) {
            let Some(limited) = self.limited(home, &flow) else { continue };
            limited.is_postponed = false;
            self.follow(&flow);
        }
    }

    fn limited(&mut self, home: usize, flow: &Arc<Flow>) -> Option<&mut Limited> {
        self.flows.get_mut(flow)?.shares[home].limited.as_deref_mut()
    }

    /// Gives those homes that have used up their standing credits, and may have some, new ones.
    pub(super) fn renew_standing(&mut self, may: impl Fn(usize) -> bool) -> impl Iterator<Item = (usize, u32)> {
        let homes = self.homes.iter_mut().enumerate();
        let spent = homes.filter(move |(place, home)| home.known && home.standing == 0 && may(*place));
        spent.map(|(place, home)| {
            home.standing = STANDING_CREDITS;
            (place, STANDING_CREDITS)
        })
    }

    /// All credits are void. Returns their permits.
    pub(super) fn void(&mut self) -> Vec<Permit> {
        self.homes.iter_mut().for_each(|home| home.standing = 0);
        // A host that is down has it done again and again, while of very many flows few have a credit.
        let has_credit = |offered: &Offered| offered.shares.iter().any(|share| share.granted > 0);
        let credited = self.flows.iter().filter(|(_, offered)| has_credit(offered));
        let mut flows: Vec<Arc<Flow>> = credited.map(|(flow, _)| Arc::clone(flow)).collect();
        flows.sort_unstable();
        let mut permits = Vec::new();
        for flow in flows {
            let mut void = 0;
            for share in self.flows.get_mut(&flow).into_iter().flat_map(|offered| &mut offered.shares) {
                void += std::mem::take(&mut share.granted);
                permits.extend(share.limited.iter_mut().flat_map(|limited| limited.permits.drain(..)));
            }
            self.granted -= void;
            self.refund(&flow, void as u32);
            self.follow(&flow);
        }
        permits
    }

    /// A home has heard that the pair may get another owner: what each has told the other is void.
    /// Returns the permits of its credits.
    pub(super) fn leave(&mut self, home: usize) -> Vec<Permit> {
        self.homes[home] = Home::default();
        let mut flows: Vec<Arc<Flow>> = self.flows.keys().cloned().collect();
        flows.sort_unstable();
        let mut permits = Vec::new();
        for flow in flows {
            let share = &mut self.flows.get_mut(&flow).expect("it was just there").shares[home];
            share.backlog = Backlog::default();
            let void = std::mem::take(&mut share.granted);
            permits.extend(share.limited.iter_mut().flat_map(|limited| limited.permits.drain(..)));
            self.granted -= void;
            self.refund(&flow, void as u32);
            self.follow(&flow);
        }
        permits
    }

    /// Other limits over many pairs, and no ticket in hand: credits of flows and wants that are out count no more.
    /// Returns the permits of these credits.
    pub(super) fn reload(&mut self, pair: &PairKey, shared_limits: &Arc<SharedLimits>) -> Vec<Permit> {
        let homes = self.homes.clone();
        let permits = self.void();
        // Those are each home's to spend, whatever holds.
        self.homes = homes;
        self.shared_limits = Arc::clone(shared_limits);
        self.lanes.clear();
        self.postponed.clear();
        self.granted = 0;
        let mut flows: Vec<Arc<Flow>> = self.flows.keys().cloned().collect();
        flows.sort_unstable();
        for flow in flows {
            let offered = self.flows.get_mut(&flow).expect("it was just there");
            offered.limits = pair.shared_limits(shared_limits, &flow);
            offered.wants_lane = false;
            let is_limited = offered.limits.is_some();
            offered.shares.iter_mut().for_each(|share| share.limited = is_limited.then(Box::default));
            self.follow(&flow);
        }
        permits
    }

    /// None of the wants that were answered to wait waits any more.
    pub(super) fn unwanted(&mut self) {
        let mut flows: Vec<Arc<Flow>> = self.flows.keys().cloned().collect();
        flows.sort_unstable();
        for flow in flows {
            let shares = &mut self.flows.get_mut(&flow).expect("it was just there").shares;
            shares.iter_mut().filter_map(|share| share.limited.as_mut()).for_each(|limited| limited.waiting = 0);
            self.follow(&flow);
        }
    }

    /// A want was permitted, and nobody is to have the permit.
    pub(super) fn decline(&mut self, home: usize, flow: &Arc<Flow>, waited: bool) {
        if let Some(limited) = self.limited(home, flow) {
            if waited {
                limited.waiting -= 1;
            } else {
                limited.asked -= 1;
                self.granted -= 1;
            }
            self.follow(flow);
        }
    }

    /// Whether any home has something of this class, or is about to send it, or a ticket of it is in hand.
    pub(super) fn has_class(&self, class: usize) -> bool {
        self.present[class] > 0
    }

    /// Credits of flows, and wants, that are not answered yet.
    pub(super) fn granted(&self) -> usize {
        self.granted
    }

    /// The homes that have been heard of.
    pub(super) fn homes(&self) -> impl Iterator<Item = usize> {
        self.homes.iter().enumerate().filter(|(_, home)| home.known).map(|(place, _)| place)
    }

    /// The homes where something is ready.
    pub(super) fn homes_with_mail(&self) -> impl Iterator<Item = usize> {
        let has_mail = |home: usize| self.flows.values().any(|offered| offered.shares[home].backlog.ready > 0);
        self.homes().filter(move |&home| has_mail(home))
    }

    /// Nothing is ready anywhere, and nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.flows.is_empty()
    }

    /// A flow wants turns while some home has more of it than it has credits, and may ask for a permit where it needs
    /// one; those of its lane also while it may not. It is there until nothing
    /// of it is asked for, given or in hand.
    fn follow(&mut self, flow: &Arc<Flow>) {
        let Some(offered) = self.flows.get_mut(flow) else { return };
        let Offered { limits, shares, tickets, wants_turns, wants_lane } = offered;
        let follow = |turns: &mut Turns, wants: bool| if wants { turns.enter(flow) } else { turns.pause(flow) };
        let is_hungry = shares.iter().any(Share::is_hungry);
        if std::mem::replace(wants_turns, is_hungry) != is_hungry {
            follow(&mut self.turns, is_hungry);
        }
        if let Some(limits) = limits {
            let has_mail = shares.iter().any(Share::has_mail);
            if std::mem::replace(wants_lane, has_mail) != has_mail {
                follow(self.lanes.entry(Arc::clone(limits)).or_default(), has_mail);
            }
        }
        if *tickets == 0 && shares.iter().all(Share::is_idle) {
            self.turns.leave(flow);
            if let Some(limits) = limits
                && let Some(lane) = self.lanes.get_mut(limits)
            {
                lane.leave(flow);
                if lane.is_empty() {
                    self.lanes.remove(limits);
                }
            }
            self.flows.remove(flow);
            self.present[flow.class()] -= 1;
        }
    }

    fn share(&mut self, home: usize, pair: &PairKey, flow: &Arc<Flow>) -> &mut Share {
        let (homes, shared_limits) = (self.homes.len(), &self.shared_limits);
        let offered = self.flows.entry(Arc::clone(flow)).or_insert_with(|| {
            let limits = pair.shared_limits(shared_limits, flow);
            let limited = limits.as_ref().map(|_| Box::default());
            self.present[flow.class()] += 1;
            let shares = vec![Share { limited, ..Share::default() }; homes];
            Offered { limits, shares, tickets: 0, wants_turns: false, wants_lane: false }
        });
        &mut offered.shares[home]
    }
}

impl Offered {
    /// The home of its oldest entry, among some.
    fn oldest(&self, is_meant: impl Fn(&Share) -> bool) -> Option<usize> {
        let shares = self.shares.iter().enumerate().filter(|(_, share)| is_meant(share));
        shares.min_by_key(|(_, share)| share.backlog.oldest_due_ms).map(|(home, _)| home)
    }
}

impl Share {
    /// More of it may be given a credit.
    fn has_mail(&self) -> bool {
        self.backlog.ready > self.granted
    }

    fn is_hungry(&self) -> bool {
        let Some(limited) = &self.limited else { return self.has_mail() };
        let given = self.granted + limited.asked;
        let may_ask = limited.waiting == 0 && limited.asked <= limited.flowing && !limited.is_postponed;
        may_ask && self.is_known(given) && self.backlog.ready > given
    }

    /// Whether it is known how many recipients the entry has that goes behind so many: only of the next one it is told.
    /// Behind one that has one, the others mostly do.
    fn is_known(&self, given: usize) -> bool {
        given == 0 || self.backlog.next_recipients == 1
    }

    fn is_idle(&self) -> bool {
        let is_unasked = self.limited.as_ref().is_none_or(|limited| limited.asked + limited.waiting == 0);
        self.granted == 0 && self.backlog.ready == 0 && is_unasked
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn flow(priority: u8, tenant: &str) -> Arc<Flow> {
        Arc::new(Flow { priority, tenant: tenant.into(), campaign: "".into(), ..Flow::default() })
    }

    fn backlog(ready: usize, oldest_due_ms: u64) -> Backlog {
        Backlog { ready, oldest_due_ms, next_recipients: 1 }
    }

    fn pair() -> PairKey {
        PairKey { source: 0, rollup: "mx.test".into(), site: "mx.test".into() }
    }

    fn new_demand(homes: usize) -> Demand {
        Demand::new(homes, Arc::default())
    }

    /// With a limit over many pairs, and two campaigns that are under it.
    fn new_limited_demand(homes: usize) -> (Demand, Arc<Flow>, Arc<Flow>) {
        let tenant = "[[tenant]]\nname = \"a\"\nmax_message_rate = \"600/min,max_burst=600\"\n";
        let text = format!("{tenant}[spool]\nallow_filesystem = true\n");
        let config = Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).expect("a configuration");
        let of_campaign = |name: &str| Arc::new(Flow { campaign: name.into(), ..Flow::clone(&flow(1, "a")) });
        (Demand::new(homes, Arc::new(SharedLimits::new(&config))), of_campaign("x"), of_campaign("y"))
    }

    fn permit(demand: &Demand, asker: &Arc<Flow>, units: u32) -> Permit {
        let limits = pair().shared_limits(&demand.shared_limits, asker).expect("it is under the limit");
        Permit { limits, units, given: std::time::Duration::ZERO, asker: Arc::clone(asker), turn: None }
    }

    /// The homes of so many credits.
    fn granted(demand: &mut Demand, count: usize) -> Vec<(usize, Arc<str>)> {
        let credit = |turn| match turn {
            Turn::Credit { home, flow } => (home, Arc::clone(&flow.tenant)),
            turn @ Turn::Want { .. } => unreachable!("{turn:?}"),
        };
        let mut next = |_| {
            let turn = demand.next(100)?;
            demand.begin(&turn);
            Some(turn)
        };
        (0..count).filter_map(&mut next).map(credit).collect()
    }

    /// A tenant whose mail is at one home gets as much as one whose mail is at all of them.
    #[test]
    fn a_tenants_share_does_not_depend_on_where_its_mail_is() {
        let mut demand = new_demand(4);
        let (a, b) = (flow(1, "a"), flow(1, "b"));
        (0..4).for_each(|home| drop(demand.tell(home, &pair(), &a, backlog(25_000, 10), 0)));
        demand.tell(2, &pair(), &b, backlog(100, 900), 0);
        let given = granted(&mut demand, 100);
        assert_eq!(given.iter().filter(|(_, tenant)| **tenant == *"b").count(), 50);
        assert!(given.iter().all(|(home, tenant)| **tenant != *"b" || *home == 2));
    }

    #[test]
    fn of_a_flows_homes_the_oldest_due_goes_first() {
        let mut demand = new_demand(3);
        let flow = flow(1, "a");
        for (home, due_ms) in [(0, 30), (1, 10), (2, 20)] {
            demand.tell(home, &pair(), &flow, backlog(2, due_ms), 0);
        }
        let homes: Vec<usize> = granted(&mut demand, 9).into_iter().map(|(home, _)| home).collect();
        assert_eq!(homes, [1, 1, 2, 2, 0, 0], "and nobody gets more credits than it has entries");
        assert_eq!(demand.granted(), 6);
        demand.take(1, &pair(), &flow, backlog(5, 15), Credit::Turn, 1);
        assert_eq!(granted(&mut demand, 9).len(), 4, "one of the two is still out");
    }

    #[test]
    fn credits_that_come_back_are_given_again() {
        let mut demand = new_demand(2);
        let flow = flow(1, "a");
        demand.tell(0, &pair(), &flow, backlog(3, 1), 0);
        assert_eq!(granted(&mut demand, 9).len(), 3);
        demand.tell(0, &pair(), &flow, backlog(0, 0), 3);
        assert_eq!((demand.granted(), demand.is_idle()), (0, true));
        demand.tell(1, &pair(), &flow, backlog(1, 1), 0);
        assert_eq!(granted(&mut demand, 9).len(), 1);
        demand.void();
        assert_eq!((demand.granted(), granted(&mut demand, 9).len()), (0, 1), "what is void is given anew");
    }

    /// Whose turn it is in the lane needs more, and so does the oldest entry of the flow that asked, as far as is
    /// known: a permit for it would come back as a ticket of more recipients, and be asked for again, for ever.
    #[test]
    fn a_permit_goes_where_it_is_known_to_be_enough() {
        let (mut demand, x, y) = new_limited_demand(2);
        let backlog = |oldest_due_ms, next_recipients| Backlog { ready: 22, oldest_due_ms, next_recipients };
        let (two, one) = (permit(&demand, &x, 2), permit(&demand, &x, 1));
        let asks = |demand: &mut Demand| {
            let Some(turn @ Turn::Want { home, units, .. }) = demand.next(100) else { panic!("it is to ask") };
            demand.begin(&turn);
            (home, units)
        };

        demand.tell(0, &pair(), &x, backlog(10, 2), 0);
        assert_eq!(asks(&mut demand), (0, 2));
        assert_eq!(demand.permitted(0, &x, false, &two, 100), Some((0, Arc::clone(&x))));
        demand.give(0, &x, two);
        demand.tell(1, &pair(), &x, backlog(20, 1), 0);
        assert_eq!(asks(&mut demand), (1, 1));
        demand.tell(0, &pair(), &y, backlog(5, 2), 0);
        assert_eq!(demand.permitted(1, &x, false, &one, 100), Some((1, x)));
    }

    /// Also where it was another's when the permit was asked for, and a reload has come before.
    #[test]
    fn a_permit_goes_to_whose_turn_it_is() {
        for is_reloaded in [false, true] {
            let (mut demand, x, y) = new_limited_demand(1);
            [&x, &y].into_iter().for_each(|flow| drop(demand.tell(0, &pair(), flow, backlog(9, 1), 0)));
            if is_reloaded {
                let shared_limits = Arc::clone(&demand.shared_limits);
                assert_eq!(demand.reload(&pair(), &shared_limits), []);
            }
            let Some(turn @ Turn::Want { .. }) = demand.next(100) else { panic!("it is to ask") };
            demand.begin(&turn);
            demand.take(0, &pair(), &x, backlog(8, 1), Credit::Standing, 5);
            let one = permit(&demand, &x, 1);
            assert_eq!(demand.permitted(0, &x, false, &one, 100), Some((0, y)), "reloaded: {is_reloaded}");
        }
    }

    #[test]
    fn a_ticket_that_goes_home_costs_no_turn() {
        let mut demand = new_demand(1);
        let (a, b) = (flow(1, "a"), flow(1, "b"));
        [&a, &b].into_iter().for_each(|flow| drop(demand.tell(0, &pair(), flow, backlog(10, 1), 0)));
        for _ in 0..3 {
            assert_eq!(&*granted(&mut demand, 1)[0].1, "a");
            demand.take(0, &pair(), &a, backlog(10, 1), Credit::Turn, 1);
            demand.send_home(&a, 1);
        }
    }

    #[test]
    fn standing_credits_are_renewed_when_they_are_spent() {
        let mut demand = new_demand(2);
        let flow = flow(1, "a");
        demand.meet(0);
        assert_eq!(demand.renew_standing(|_| true).count(), 0);
        for _ in 0..STANDING_CREDITS {
            demand.take(0, &pair(), &flow, Backlog::default(), Credit::Standing, 1);
            demand.started(&flow);
        }
        assert_eq!(demand.renew_standing(|_| true).collect::<Vec<_>>(), [(0, STANDING_CREDITS)]);
        assert!(demand.is_idle() && demand.homes().eq([0]));
    }
}
