//! What homes have ready for a pair, flow by flow, and whose turn it is.
//!
//! The owner gives credits one turn at a time: to the flow that [`Turns`] names among those of all homes, and of the
//! homes that have such mail to the one whose oldest entry was due first. So a tenant's share is the same on one shard
//! and on many. A home answers each credit with a ticket or gives it back.

use std::collections::HashMap;
use std::sync::Arc;

use crate::fair::{Flow, Turns};
use crate::handover::{Backlog, Credit};
use crate::limits::STANDING_CREDITS;

/// The demand for one pair.
#[derive(Debug)]
pub(super) struct Demand {
    turns: Turns,
    /// What each home has of a flow. A flow of which no home has anything is not kept.
    flows: HashMap<Arc<Flow>, Vec<Share>>,
    homes: Vec<Home>,
    /// Credits that were given to flows and are not answered yet.
    granted: usize,
}

/// A home's part of a flow.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    backlog: Backlog,
    granted: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Home {
    /// It has been heard of, so that it has a word on the pair's owner.
    known: bool,
    /// Its standing credits.
    standing: u32,
}

impl Demand {
    pub(super) fn new(homes: usize) -> Self {
        Self { turns: Turns::default(), flows: HashMap::new(), homes: vec![Home::default(); homes], granted: 0 }
    }

    /// A home that is heard of for the first time has its standing credits already.
    pub(super) fn meet(&mut self, home: usize) {
        let home = &mut self.homes[home];
        if !home.known {
            *home = Home { known: true, standing: STANDING_CREDITS };
        }
    }

    /// What a home has now of a flow; `unused` of its credits have come back.
    pub(super) fn tell(&mut self, home: usize, flow: &Arc<Flow>, backlog: Backlog, unused: u32) {
        let share = share_of(&mut self.flows, self.homes.len(), home, flow);
        let unused = share.granted.min(unused as usize);
        share.backlog = backlog;
        share.granted -= unused;
        self.granted -= unused;
        self.follow(flow);
    }

    /// A home's ticket, for so many recipients; `left` is ready behind it.
    pub(super) fn take(&mut self, home: usize, flow: &Arc<Flow>, left: Backlog, credit: Credit, recipients: u32) {
        let share = share_of(&mut self.flows, self.homes.len(), home, flow);
        share.backlog = left;
        match credit {
            Credit::Standing => {
                self.homes[home].standing = self.homes[home].standing.saturating_sub(1);
                self.turns.charge(flow, recipients);
            }
            Credit::Turn => {
                let answered = share.granted.min(1);
                share.granted -= answered;
                self.granted -= answered;
                // One was charged with the credit.
                self.turns.charge(flow, recipients.saturating_sub(1));
            }
        }
        self.follow(flow);
    }

    /// Gives a credit: whose turn it is, and at which home.
    pub(super) fn next(&mut self) -> Option<(usize, Arc<Flow>)> {
        let flow = self.turns.take()?;
        let shares = self.flows.get_mut(&flow).expect("a flow that wants turns is kept");
        let hungry = shares.iter_mut().enumerate().filter(|(_, share)| share.is_hungry());
        let (home, share) = hungry
            .min_by_key(|(_, share)| share.backlog.oldest_due_ms)
            .expect("a flow that wants turns is hungry at some home");
        share.granted += 1;
        self.granted += 1;
        self.follow(&flow);
        Some((home, flow))
    }

    /// Gives homes that have used up their standing credits new ones.
    pub(super) fn renew_standing(&mut self) -> impl Iterator<Item = (usize, u32)> {
        let spent = self.homes.iter_mut().enumerate().filter(|(_, home)| home.known && home.standing == 0);
        spent.map(|(place, home)| {
            home.standing = STANDING_CREDITS;
            (place, STANDING_CREDITS)
        })
    }

    /// All credits are void.
    pub(super) fn void(&mut self) {
        self.granted = 0;
        self.homes.iter_mut().for_each(|home| home.standing = 0);
        let mut flows: Vec<Arc<Flow>> = self.flows.keys().cloned().collect();
        flows.sort_unstable();
        for flow in flows {
            self.flows.get_mut(&flow).into_iter().flatten().for_each(|share| share.granted = 0);
            self.follow(&flow);
        }
    }

    /// Credits of flows that are not answered yet.
    pub(super) fn granted(&self) -> usize {
        self.granted
    }

    /// The homes that have been heard of.
    pub(super) fn homes(&self) -> impl Iterator<Item = usize> {
        self.homes.iter().enumerate().filter(|(_, home)| home.known).map(|(place, _)| place)
    }

    /// The homes where something is ready.
    pub(super) fn homes_with_mail(&self) -> impl Iterator<Item = usize> {
        let has_mail = |home: usize| self.flows.values().any(|shares| shares[home].backlog.ready > 0);
        self.homes().filter(move |&home| has_mail(home))
    }

    /// Nothing is ready anywhere, and nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.flows.is_empty()
    }

    /// A flow wants turns while some home has more of it than it has credits.
    fn follow(&mut self, flow: &Arc<Flow>) {
        let Some(shares) = self.flows.get(flow) else { return };
        if shares.iter().any(Share::is_hungry) {
            self.turns.enter(flow);
            return;
        }
        self.turns.leave(flow);
        if shares.iter().all(|share| share.granted == 0 && share.backlog.ready == 0) {
            self.flows.remove(flow);
        }
    }
}

impl Share {
    fn is_hungry(&self) -> bool {
        self.backlog.ready > self.granted
    }
}

fn share_of<'a>(
    flows: &'a mut HashMap<Arc<Flow>, Vec<Share>>,
    homes: usize,
    home: usize,
    flow: &Arc<Flow>,
) -> &'a mut Share {
    &mut flows.entry(Arc::clone(flow)).or_insert_with(|| vec![Share::default(); homes])[home]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(priority: u8, tenant: &str) -> Arc<Flow> {
        Arc::new(Flow { priority, tenant: tenant.into(), campaign: "".into() })
    }

    fn backlog(ready: usize, oldest_due_ms: u64) -> Backlog {
        Backlog { ready, oldest_due_ms }
    }

    /// The homes of so many credits.
    fn granted(demand: &mut Demand, count: usize) -> Vec<(usize, Arc<str>)> {
        (0..count).filter_map(|_| demand.next()).map(|(home, flow)| (home, Arc::clone(&flow.tenant))).collect()
    }

    /// A tenant whose mail is at one home gets as much as one whose mail is at all of them.
    #[test]
    fn a_tenants_share_does_not_depend_on_where_its_mail_is() {
        let mut demand = Demand::new(4);
        let (a, b) = (flow(1, "a"), flow(1, "b"));
        (0..4).for_each(|home| demand.tell(home, &a, backlog(25_000, 10), 0));
        demand.tell(2, &b, backlog(100, 900), 0);
        let given = granted(&mut demand, 100);
        assert_eq!(given.iter().filter(|(_, tenant)| **tenant == *"b").count(), 50);
        assert!(given.iter().all(|(home, tenant)| **tenant != *"b" || *home == 2));
    }

    #[test]
    fn of_a_flows_homes_the_oldest_due_goes_first() {
        let mut demand = Demand::new(3);
        let flow = flow(1, "a");
        for (home, due_ms) in [(0, 30), (1, 10), (2, 20)] {
            demand.tell(home, &flow, backlog(2, due_ms), 0);
        }
        let homes: Vec<usize> = granted(&mut demand, 9).into_iter().map(|(home, _)| home).collect();
        assert_eq!(homes, [1, 1, 2, 2, 0, 0], "and nobody gets more credits than it has entries");
        assert_eq!(demand.granted(), 6);
        demand.take(1, &flow, backlog(5, 15), Credit::Turn, 1);
        assert_eq!(granted(&mut demand, 9).len(), 4, "one of the two is still out");
    }

    #[test]
    fn credits_that_come_back_are_given_again() {
        let mut demand = Demand::new(2);
        let flow = flow(1, "a");
        demand.tell(0, &flow, backlog(3, 1), 0);
        assert_eq!(granted(&mut demand, 9).len(), 3);
        demand.tell(0, &flow, backlog(0, 0), 3);
        assert_eq!((demand.granted(), demand.is_idle()), (0, true));
        demand.tell(1, &flow, backlog(1, 1), 0);
        assert_eq!(granted(&mut demand, 9).len(), 1);
        demand.void();
        assert_eq!((demand.granted(), granted(&mut demand, 9).len()), (0, 1), "what is void is given anew");
    }

    #[test]
    fn standing_credits_are_renewed_when_they_are_spent() {
        let mut demand = Demand::new(2);
        let flow = flow(1, "a");
        demand.meet(0);
        assert_eq!(demand.renew_standing().count(), 0);
        for _ in 0..STANDING_CREDITS {
            demand.take(0, &flow, Backlog::default(), Credit::Standing, 1);
        }
        assert_eq!(demand.renew_standing().collect::<Vec<_>>(), [(0, STANDING_CREDITS)]);
        assert!(demand.is_idle() && demand.homes().eq([0]));
    }
}
