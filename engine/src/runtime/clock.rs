//! The clocks, read once per turn and handed to the cores as [`Now`].
#![expect(unsafe_code, reason = "std does not tell the clocks of supervisors and of the machine's start")]

use std::fs;
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

/// By how much the wall clock is ahead of the time since the machine was started, until somebody sets it: so wall times
/// that were noted before can be told in its present terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WallScale {
    /// Which start of the machine. Empty: not known.
    pub(crate) boot: String,
    pub(crate) ahead_ms: i64,
}

impl WallScale {
    pub(crate) fn now() -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { boot: boot.trim().to_owned(), ahead_ms: ahead_ms() }
    }

    /// As it is now; None: as it was.
    pub(crate) fn changed(&self) -> Option<Self> {
        let now = Self { boot: self.boot.clone(), ahead_ms: ahead_ms() };
        (now.moved_ms(self) != 0).then_some(now)
    }

    /// What is to be added to wall times that were noted by the other.
    pub(crate) fn moved_ms(&self, since: &Self) -> i64 {
        let is_known = !self.boot.is_empty() && self.boot == since.boot;
        let moved_ms = self.ahead_ms.saturating_sub(since.ahead_ms);
        if is_known && moved_ms.unsigned_abs() >= SET_MS_MIN { moved_ms } else { 0 }
    }
}

fn ahead_ms() -> i64 {
    let look = |_| {
        let before_us = read_clock_us(libc::CLOCK_BOOTTIME);
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let took_us = read_clock_us(libc::CLOCK_BOOTTIME) - before_us;
        (took_us, (wall.as_millis() as i64).saturating_sub((before_us / 1_000) as i64))
    };
    // Whoever is interrupted between the two clocks sees them further apart.
    let (_, ahead_ms) = (0..LOOKS).map(look).min().expect("there are looks");
    ahead_ms
}

/// CLOCK_MONOTONIC in microseconds, by which a supervisor puts what it is told in order (sd_notify(3), MONOTONIC_USEC).
pub(crate) fn supervisor_clock_us() -> u64 {
    read_clock_us(libc::CLOCK_MONOTONIC)
}

fn read_clock_us(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that lives through the call, which writes nothing else. It can't fail: the clocks
    // that are asked for are on every Linux, and the pointer is good.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1_000
}

/// What is less may be the time between looks at the two clocks.
const SET_MS_MIN: u64 = 100;
const LOOKS: usize = 5;

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

    #[test]
    fn a_clock_that_is_set_moves_what_was_noted() {
        let scale = WallScale::now();
        assert!(!scale.boot.is_empty() && scale.changed().is_none(), "{scale:?}");
        let before = WallScale { ahead_ms: scale.ahead_ms - 5_000, ..scale.clone() };
        assert_eq!(before.changed().map(|now| now.boot), Some(scale.boot.clone()));
        assert_eq!((scale.moved_ms(&before), before.moved_ms(&scale)), (5_000, -5_000));
        let of_another_boot = WallScale { boot: "another".to_owned(), ..before };
        assert_eq!(scale.moved_ms(&of_another_boot), 0, "nothing is known of what was between them");
        let unknown = WallScale { boot: String::new(), ahead_ms: 7 };
        assert_eq!(unknown.moved_ms(&WallScale { ahead_ms: 3, ..unknown.clone() }), 0);
    }
}
