//! Runs in which the machine's wall clock is set, forward or back, while engines run.
//!
//! What is drawn here comes from a generator of its own.

use postrider::pool::rate::Past;

use crate::clock::{HOUR, MS, Micros, SECOND};
use crate::mix::{Fault, spread};
use crate::random::Random;
use crate::world::World;

/// Of every so manieth seed that has no limits over a wall clock's time.
const EVERY: u64 = 4;

/// When it is set, from the begin of the run to its end.
pub(crate) fn times(seed: u64, lasts: Micros) -> Vec<Micros> {
    let mut random = Random::new(seed.rotate_left(8));
    let count = if random.one_in(EVERY) { 1 + random.below(4) } else { 0 };
    (0..count).map(|_| random.below(lasts)).collect()
}

fn move_times(past: &mut Past, step_ms: i64) {
    let used = past.used.iter_mut().map(|(at_ms, _)| at_ms);
    let reserved = past.reserved.iter_mut().map(|(at_ms, _)| at_ms);
    let due = past.due.iter_mut().map(|due| &mut due.at_ms);
    for at_ms in used.chain(reserved).chain(due) {
        *at_ms = at_ms.saturating_add_signed(step_ms);
    }
}

impl World {
    /// By up to four hours. Each shard takes a turn at least once a second, and so comes to know of it.
    pub(crate) fn set_wall_clock(&mut self) {
        let by_ms = spread(&mut self.own, HOUR / MS, 2);
        let is_back = self.own.one_in(2);
        self.mix.count(if is_back { Fault::ClockSetBack } else { Fault::ClockSetForward });
        if is_back {
            self.in_force.set_back(self.clock.now().wall_ms);
            self.clock.set_wall_back(by_ms);
            self.ledger.back_ms += by_ms;
        } else {
            self.clock.set_wall_forward(by_ms);
            self.ledger.forward_ms += by_ms;
        }
        // As the file of what was reserved tells it in terms of the new time (`engine/src/runtime/limit_file.rs`).
        let step_ms = if is_back { -(by_ms as i64) } else { by_ms as i64 };
        self.reserved.values_mut().for_each(|past| move_times(past, step_ms));
        for shard in 0..self.shards.len() {
            let at = self.clock.micros() + self.own.below(SECOND);
            self.arm(shard, at);
        }
    }
}
