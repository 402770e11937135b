//! When messages are due: at once (closed loop), or by the clock (open loop).

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// The time at which message number n of an open loop is due.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    start: Instant,
    gap: Duration,
}

impl Pace {
    pub(super) fn new(start: Instant, per_second: f64) -> Self {
        Self { start, gap: Duration::from_secs_f64(1.0 / per_second) }
    }

    pub(super) fn due(&self, number: u64) -> Instant {
        self.start + Duration::from_secs_f64(self.gap.as_secs_f64() * number as f64)
    }
}

/// A timer with the kernel's resolution: tokio's own rounds up to the next millisecond, which would count as latency.
#[derive(Debug)]
pub(super) struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    #[expect(
        deprecated,
        reason = "its replacement is unsafe for types that may close early; an OwnedFd lives as long as it"
    )]
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(AsyncFd::new(timerfd_create(TimerfdClockId::Monotonic, flags)?)?))
    }

    pub(super) async fn wait_until(&self, due: Instant) -> io::Result<()> {
        let wait = due.saturating_duration_since(Instant::now());
        if wait.is_zero() {
            return Ok(());
        }
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: i64::from(wait.subsec_nanos()) };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: zero, it_value: value })?;
        loop {
            let mut ready = self.0.readable().await?;
            let read = |fd: &AsyncFd<OwnedFd>| Ok(rustix::io::read(fd, &mut [0; 8])?);
            match ready.try_io(read) {
                Ok(result) => return result.map(|_| ()),
                Err(_would_block) => {}
            }
        }
    }
}
