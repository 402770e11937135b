//! Another configuration for the pairs of an owner.
//!
//! What was counted stays counted: a limiter that goes on under another rate keeps its windows. All tickets go home,
//! where it is decided anew how their messages go; what is on the wire comes to its end. Connections stay, but for
//! those of a source that is gone or has another address, and for those that a limit no longer lets be: these end when
//! they are idle.

use std::sync::Arc;

use super::{PoolOptions, Pools};
use crate::config::{EgressSource, Shaping};
use crate::handover::{Generation, PairKey};
use crate::mail::time::Now;
use crate::pool::connection::SlotState;

impl Pools {
    /// `shaping_of` tells what holds at a pair from now on, where anything does.
    pub fn reload(
        &mut self,
        now: Now,
        random: &mut dyn FnMut(u64) -> u64,
        generation: Generation,
        options: PoolOptions,
        shaping_of: &mut dyn FnMut(&PairKey) -> Option<Arc<Shaping>>,
    ) {
        let before = std::mem::replace(&mut self.options, options);
        self.generation = generation;
        let places: Vec<u32> = (0..self.pairs.len() as u32)
            // Places of forgotten pairs keep their last key.
            .filter(|place| self.keys.get(&self.pairs[*place as usize].key) == Some(place))
            .collect();
        self.set_quotas();
        for &place in &places {
            let pair = &mut self.pairs[place as usize];
            self.orders.extend(pair.send_all_home());
            let permits = pair.demand.reload(&pair.key, &self.options.shared_limits);
            // What holds the pair may hold it no more; if it does, it is found out at once.
            if !pair.suspended
                && let Some(until) = pair.blocked_until.take()
            {
                self.blocked.remove(&(until, place));
            }
            permits.into_iter().for_each(|permit| self.give_back(permit));
            let source = self.pairs[place as usize].key.source;
            if is_another(&before.sources[source], &self.options.sources[source]) {
                self.retire_connections(place);
            }
            if let Some(shaping) = shaping_of(&self.pairs[place as usize].key) {
                self.shape(place, &shaping);
            }
        }
        // Only now do all of a roll-up have their limits.
        for place in places {
            self.dismiss_surplus(place);
            self.advance(now, place, random);
        }
    }

    fn retire_connections(&mut self, place: u32) {
        for connection in self.pairs[place as usize].open.clone() {
            match self.slots.state(connection) {
                SlotState::Idle { .. } => self.quit(connection),
                SlotState::Opening | SlotState::Busy => self.slots.retire(connection),
                SlotState::Closing => {}
            }
        }
    }

    fn dismiss_surplus(&mut self, place: u32) {
        for connection in self.pairs[place as usize].open.clone() {
            if matches!(self.slots.state(connection), SlotState::Idle { .. }) && self.is_surplus(place) {
                self.quit(connection);
            }
        }
    }
}

/// Whether what was sent by the one is not to be sent by the other.
fn is_another(before: &EgressSource, now: &EgressSource) -> bool {
    now.is_retired || before.source_address != now.source_address || before.ehlo_domain != now.ehlo_domain
}
