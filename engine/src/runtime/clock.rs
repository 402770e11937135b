//! The clocks, read once per turn and handed to the cores as [`Now`].
#![expect(unsafe_code, reason = "std does not tell the clock that supervisors ask for")]

use std::time::{Duration, Instant, SystemTime};

use crate::mail::time::Now;

/// An engine's clock. Copies share its start, so that their monotonic times compare across threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Now { monotonic: self.start.elapsed(), wall_ms: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX) }
    }

    /// Sleeps until `monotonic` has come, on the scale of [`Now::monotonic`].
    pub(crate) async fn sleep_until(&self, monotonic: Duration) {
        tokio::time::sleep_until((self.start + monotonic).into()).await;
    }
}

/// CLOCK_MONOTONIC in microseconds, by which a supervisor puts what it is told in order (sd_notify(3), MONOTONIC_USEC).
pub(crate) fn supervisor_clock_us() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that lives through the call, which writes nothing else. It can't fail: the clock is
    // on every Linux, and the pointer is good.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1_000
}

/// Sleeps, on a shard or on the control thread.
pub(crate) async fn sleep(duration: Duration) {
    tokio::time::sleep(duration).await;
}

/// Notices that somebody set the wall clock: wall time then no longer advances as monotonic time does.
///
/// Slow drift and slewing stay below [`STEP_MIN`] between two looks and are not steps.
#[derive(Debug)]
pub(crate) struct StepWatch {
    last: Now,
}

impl StepWatch {
    pub(crate) fn new(now: Now) -> Self {
        Self { last: now }
    }

    /// By how many milliseconds the wall clock was set since the last call: positive is forward. Call it every second
    /// or so.
    pub(crate) fn wall_stepped(&mut self, now: Now) -> Option<i64> {
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
    fn copies_share_the_start_and_never_go_back() {
        let clock = Clock::start();
        let copy = clock;
        let first = clock.now();
        let second = std::thread::spawn(move || copy.now()).join().unwrap();
        assert!(second.monotonic >= first.monotonic);
        assert!(first.wall_ms > 1_700_000_000_000);
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
