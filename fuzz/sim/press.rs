//! Runs with rates, where a limit has little left and mail waits: only then does it show that something forgot what was
//! counted. So there the engine stops in order, or gets another configuration, more often than chance would have it.
//!
//! What is drawn here comes from a generator of its own.

use crate::clock::{Micros, SECOND};
use crate::random::Random;
use crate::world::{Event, World};

/// How often it comes to that in this run.
#[derive(Debug)]
pub(crate) struct Press {
    random: Random,
    left: u64,
}

impl Press {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed.rotate_left(32) ^ 0x7072_6573);
        let left = 1 + random.below(PRESSES_MAX);
        Self { random, left }
    }
}

impl World {
    /// Looks whether there is such a limit just now.
    pub(crate) fn press(&mut self) {
        if self.press.left == 0 || self.mix.is_healed() {
            return;
        }
        self.clock.after(LOOK_EVERY, Event::Press);
        let may_change = !self.is_stopping() && !self.reloads.is_under_way();
        if !may_change || self.ledger.open() < WAITING_MIN {
            return;
        }
        let config = self.reloads.wanted_now();
        if self.rates.is_used_up(self.clock.micros(), &config, &self.ledger, &self.hosts) && self.press.random.one_in(3)
        {
            self.press.left -= 1;
            if self.press.random.one_in(2) { self.reload() } else { self.stop() }
        }
    }
}

const PRESSES_MAX: u64 = 8;

/// Most periods are longer than this.
const LOOK_EVERY: Micros = 4 * SECOND;

/// Recipients that are to be sent to, so that what was forgotten is used.
const WAITING_MIN: usize = 20;
