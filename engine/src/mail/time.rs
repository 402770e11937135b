//! The time that cores are given: they never ask a clock.

use std::time::Duration;

/// One reading of both clocks.
///
/// Timeouts and pacing use `monotonic`; due times, expiry and events use `wall_ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Since an arbitrary start; never goes back.
    pub monotonic: Duration,
    /// Unix time in milliseconds; may step.
    pub wall_ms: u64,
}

/// Notices that somebody set the wall clock: wall time then no longer advances as monotonic time does.
///
/// Slow drift and slewing stay below two seconds between two looks and are not steps.
#[derive(Debug)]
pub struct StepWatch {
    last: Now,
}

impl StepWatch {
    pub fn new(now: Now) -> Self {
        Self { last: now }
    }

    /// By how many milliseconds the wall clock was set since the last call: positive is forward. Call it every second
    /// or more often.
    pub fn wall_stepped(&mut self, now: Now) -> Option<i64> {
        let elapsed = now.monotonic.saturating_sub(self.last.monotonic).as_millis();
        let advanced = i128::from(now.wall_ms) - i128::from(self.last.wall_ms);
        let step = advanced - i128::try_from(elapsed).unwrap_or(i128::MAX);
        self.last = now;
        let step = i64::try_from(step).unwrap_or(if step < 0 { i64::MIN } else { i64::MAX });
        (step.unsigned_abs() >= STEP_MIN.as_millis() as u64).then_some(step)
    }
}

const STEP_MIN: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    fn at(monotonic_ms: u64, wall_ms: u64) -> Now {
        Now { monotonic: Duration::from_millis(monotonic_ms), wall_ms }
    }

    #[test]
    fn steps_are_told_from_drift_once() {
        let mut watch = StepWatch::new(at(0, 1_000_000));
        assert_eq!(watch.wall_stepped(at(1_000, 1_001_000)), None);
        assert_eq!(watch.wall_stepped(at(2_000, 1_002_400)), None, "slewed");
        assert_eq!(watch.wall_stepped(at(3_000, 1_062_400)), Some(59_000));
        assert_eq!(watch.wall_stepped(at(4_000, 1_063_400)), None, "told only once");
        assert_eq!(watch.wall_stepped(at(5_000, 4_400)), Some(-1_060_000));
        assert_eq!(watch.wall_stepped(at(5_001, 0)), Some(-4_401));
        assert_eq!(watch.wall_stepped(at(5_001, u64::MAX)), Some(i64::MAX));
    }
}
