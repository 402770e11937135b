//! Flows under limits over many pairs: each ticket of theirs needs a permit of the limits' keeper.
//!
//! What is permitted counts against the limit from then on, so that the pair takes a permit only for what it can write
//! soon, and gives it back where it turns out that it can't: then others use it.

use std::time::Duration;

use super::{Order, Pools, Rank};
use crate::handover::{Attempt, Permit, WantAnswer};
use crate::limits::{PACED_AHEAD, PERMIT_PATIENCE};
use crate::mail::time::Now;
use crate::pool::connection::SlotState;

impl Pools {
    /// The keeper's answer to [`Order::Want`]. Of an earlier generation nobody knows any more.
    pub fn handle_permit(&mut self, now: Now, answer: WantAnswer) {
        let WantAnswer { home, pair, ref flow, generation, waited, permit } = answer;
        let place = self.keys.get(&pair).copied().filter(|_| generation == self.generation);
        let (place, permit) = match (place, permit) {
            (Some(place), Some(permit)) => (place, permit),
            (Some(place), None) => {
                self.pairs[place as usize].demand.wait(home, flow);
                return self.grant(now, place);
            }
            (None, permit) => return permit.into_iter().for_each(|permit| self.give_back(permit)),
        };
        if self.is_leaving(place) {
            self.pairs[place as usize].demand.decline(home, flow, waited);
            return self.give_back(permit);
        }
        let pair = &mut self.pairs[place as usize];
        let batch_max = pair.batch_max();
        let Some((taker_home, taker)) = pair.demand.permitted(home, flow, waited, &permit, batch_max) else {
            self.give_back(permit);
            return self.grant(now, place);
        };
        if self.may_soon_write(now, place, permit.units, (taker.priority, false)) {
            let pair = &mut self.pairs[place as usize];
            let left = pair.demand.give(taker_home, &taker, permit);
            let pair = pair.key.clone();
            self.orders.push_back(Order::Credits { home: taker_home, pair, flow: Some(taker), credits: 1 });
            left.into_iter().for_each(|left| self.give_back(left));
        } else {
            self.pairs[place as usize].demand.postpone(home, flow);
            self.give_back(permit);
        }
        self.grant(now, place);
    }

    /// Puts the permit that came with its credit onto a ticket. Without one that is large enough it goes home.
    pub(super) fn permit(&mut self, place: u32, attempt: &mut Attempt, permit: Option<Permit>) -> bool {
        let limits = self.pairs[place as usize].key.shared_limits(&self.options.shared_limits, &attempt.flow);
        if limits.is_none() {
            return true;
        }
        let units = attempt.recipients.len() as u32;
        match permit {
            Some(permit) if permit.units >= units => {
                if permit.units > units {
                    self.give_back(Permit { units: permit.units - units, ..permit.clone() });
                }
                attempt.permit = Some(Permit { units, ..permit });
                true
            }
            permit => {
                permit.into_iter().for_each(|permit| self.give_back(permit));
                false
            }
        }
    }

    /// MAIL was written under a permit.
    pub(super) fn spend(&mut self, now: Now, attempt: &mut Attempt) {
        if let Some(permit) = attempt.permit.take() {
            // The keeper's clock may be a turn ahead.
            let at = Some(now.monotonic.max(permit.given));
            self.orders.push_back(Order::Spent { permit, at });
        }
    }

    pub(super) fn give_back(&mut self, permit: Permit) {
        self.orders.push_back(Order::Spent { permit, at: None });
    }

    /// Tickets that hold a permit for too long go home, so that others can use it.
    pub(super) fn release_permits(&mut self, now: Now, place: usize) {
        let is_stale = |attempt: &Attempt| {
            attempt.permit.as_ref().is_some_and(|permit| permit.given + PERMIT_PATIENCE <= now.monotonic)
        };
        let pair = &mut self.pairs[place];
        while let Some(stale) = pair.tickets.iter().position(|attempt| is_stale(attempt)) {
            let attempt = pair.tickets.remove(stale).expect("it was just found");
            pair.demand.send_home(&attempt.flow, attempt.recipients.len() as u32);
            self.orders.push_back(Order::Return { attempt, stays: true });
        }
    }

    /// Whether what is permitted now would be written soon, as far as the pair's rates, back-off and connections go,
    /// and what it has in hand that a ticket of this rank does not pass. If not, the pair advances once it may.
    pub(super) fn may_soon_write(&mut self, now: Now, place: u32, units: u32, rank: Rank) -> bool {
        let pair = &self.pairs[place as usize];
        if self.stopping || pair.suspended || pair.blocked_until.is_some_and(|until| until > now.monotonic) {
            return false;
        }
        let before = pair.place_of(rank) + pair.demand.granted();
        if before >= pair.in_hand_max() {
            return false;
        }
        let paced = self.pace_of(now, place) * u32::try_from(before).unwrap_or(u32::MAX);
        let ready = self.own_ready_at(place, units).max(now.monotonic).saturating_add(paced);
        if ready > now.monotonic + PACED_AHEAD {
            // One that is never ready waits for a reservation, or for another to tell that its MAIL is written.
            let at = if ready == Duration::MAX { now.monotonic + PACED_AHEAD } else { ready - PACED_AHEAD };
            self.wake_pair(now, place, at);
            return false;
        }
        let pair = &self.pairs[place as usize];
        let has_idle = || pair.open.iter().any(|&open| matches!(self.slots.state(open), SlotState::Idle { .. }));
        let has_moved = pair.moved_at.is_some_and(|moved| now.monotonic < moved + PERMIT_PATIENCE);
        let may_open = pair.opening == 0 && pair.open.len() < pair.shaping.connection_limit as usize;
        has_moved || may_open || has_idle()
    }
}
