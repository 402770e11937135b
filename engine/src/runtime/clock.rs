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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_share_the_start_and_never_go_back() {
        let clock = Clock::start();
        let copy = clock;
        let first = clock.now();
        let second = std::thread::spawn(move || copy.now()).join().unwrap();
        assert!(second.monotonic >= first.monotonic);
        assert!(first.wall_ms > 1_700_000_000_000);
    }
}
