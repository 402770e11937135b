//! A roll-up's pairs come from another shard or go to one, and a home hears of it. `pool/pair/moving.rs` has the steps.

use super::{Action, Shard};
use crate::handover::{ControlMessage, RollupKey, ShardMessage};
use crate::mail::time::Now;
use crate::pool::pair::OwnerState;

impl Shard {
    /// What this shard owns there is to go to another.
    pub(super) fn release(&mut self, now: Now, rollup: RollupKey) {
        self.metrics.moves_begun.inc();
        self.pools.release(now, rollup);
    }

    /// Hands over what is ready to go, or goes on with it where that takes too long.
    pub(super) fn finish_release(&mut self, now: Now) {
        let Some((rollup, state)) = self.pools.poll_released(now, &mut |below| self.random.u64(0..below)) else {
            return;
        };
        let state = state.map(|mut state| {
            state.counted = self.automation.take_out(&rollup);
            state
        });
        if state.is_none() {
            self.metrics.moves_given_up.inc();
            self.carry_out_orders(now);
        }
        self.actions.push_back(Action::Control(ControlMessage::Released { shard: self.id, rollup, state }));
    }

    /// What another shard has let go is this one's.
    pub(super) fn take_over(&mut self, now: Now, mut state: OwnerState) {
        self.metrics.moves_done.inc();
        let rollup = state.rollup().clone();
        self.automation.put(now.monotonic, std::mem::take(&mut state.counted));
        self.pools.take_over(now, &mut |below| self.random.u64(0..below), state);
        self.actions.push_back(Action::Control(ControlMessage::TookOver { shard: self.id, rollup }));
    }

    /// This home sends no more to the owner until it is told who that is.
    pub(super) fn withdraw(&mut self, rollup: RollupKey, owner: usize, number: u64) {
        self.home.withdraw_from(rollup);
        self.tell(owner, ShardMessage::Withdrawn { home: self.id, number });
    }

    pub(super) fn tell_carried(&mut self) {
        let carried = self.pools.carried();
        self.actions.push_back(Action::Control(ControlMessage::Carried { shard: self.id, carried }));
    }
}
