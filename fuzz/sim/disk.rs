//! The spool's operations on the simulated disk: fast ones, slow ones, and those that fail.

use postrider_spool::record::LogId;
use postrider_spool::sim::{Faults, SimDisk};
use postrider_spool::{Operation, execute};

use crate::canary::Canary;
use crate::clock::{MINUTE, MS, Micros, SECOND};
use crate::mix::Fault;
use crate::world::{Event, World};

/// What the medium is like for a while.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weather {
    fails_until: Micros,
    full_until: Micros,
}

impl World {
    pub(crate) fn begin_operation(&mut self, shard: usize, log: LogId, operation: Operation) {
        let slow = self.mix.strikes(Fault::DiskSlow, &mut self.random);
        let takes = if slow { self.random.below(20 * SECOND) } else { 50 + self.random.below(2 * MS) };
        let id = self.next_operation;
        self.next_operation += 1;
        self.operations.insert(id, (shard, log, operation));
        self.clock.after(takes, Event::Execute(id));
    }

    /// Executes an operation; its shard learns of it a little later.
    pub(crate) fn execute(&mut self, id: u64) {
        let Some((shard, log, operation)) = self.operations.remove(&id) else { return };
        let now = self.clock.micros();
        if self.mix.strikes(Fault::DiskFailsOn, &mut self.random) {
            self.weather.fails_until = now + self.random.below(5 * MINUTE);
        }
        if self.mix.strikes(Fault::DiskFull, &mut self.random) {
            self.weather.full_until = now + self.random.below(20 * MINUTE);
        }
        let fails = self.weather.fails_until > now || self.mix.strikes(Fault::DiskFails, &mut self.random);
        let short = self.mix.strikes(Fault::DiskShort, &mut self.random);
        self.disk.set_faults(Faults {
            operations_left: fails.then_some(0),
            sectors_written: if fails { self.random.below(30) } else { 0 },
            write_bytes_max: short.then(|| 1 + self.random.below(9_000) as usize),
            capacity: (self.weather.full_until > now).then_some(0),
            ..Faults::default()
        });
        let completion = execute(operation);
        self.disk.set_faults(Faults::default());
        let wait = 5 + self.random.below(100);
        self.clock.after(wait, Event::Completed { shard, log, completion });
    }

    /// The disk as the next life finds it.
    pub(crate) fn crash_disk(&mut self, is_kill: bool) -> SimDisk {
        self.disk.hold_syncs(true);
        // Some of what was under way may be there all the same.
        for (_, (_, _, operation)) in std::mem::take(&mut self.operations) {
            if self.random.one_in(2) {
                execute(operation);
            }
        }
        if is_kill { self.disk.restart() } else { self.disk.crash(self.random.below(1 << 30)) }
    }

    pub(crate) fn calm_disk(&mut self) {
        self.weather = Weather::default();
        if self.canary != Some(Canary::EarlySync) {
            self.disk.hold_syncs(false);
        }
    }
}
