//! Virtual time: what is to happen, in the order of its time. Nothing waits for a real clock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use postrider::mail::time::Now;

/// Microseconds of virtual time.
pub(crate) type Micros = u64;

pub(crate) const MS: Micros = 1_000;
pub(crate) const SECOND: Micros = 1_000 * MS;
pub(crate) const MINUTE: Micros = 60 * SECOND;
pub(crate) const HOUR: Micros = 60 * MINUTE;

/// Events of the same time come in the order in which they were planned.
#[derive(Debug)]
pub(crate) struct Clock<E> {
    now: Micros,
    wall_ms_at_start: u64,
    planned: u64,
    queue: BinaryHeap<Reverse<Planned<E>>>,
}

#[derive(Debug)]
struct Planned<E> {
    at: Micros,
    order: u64,
    event: E,
}

impl<E> Clock<E> {
    pub(crate) fn new(wall_ms_at_start: u64) -> Self {
        Self { now: 0, wall_ms_at_start, planned: 0, queue: BinaryHeap::new() }
    }

    pub(crate) fn micros(&self) -> Micros {
        self.now
    }

    /// Both of the engine's clocks.
    pub(crate) fn now(&self) -> Now {
        let monotonic = Duration::from_micros(MONOTONIC_AT_START + self.now);
        Now { monotonic, wall_ms: self.wall_ms_of(self.now) }
    }

    pub(crate) fn set_wall_forward(&mut self, by_ms: u64) {
        self.wall_ms_at_start += by_ms;
    }

    pub(crate) fn set_wall_back(&mut self, by_ms: u64) {
        self.wall_ms_at_start -= by_ms;
    }

    /// As the wall clock is set now.
    pub(crate) fn wall_ms_of(&self, at: Micros) -> u64 {
        self.wall_ms_at_start + at / MS
    }

    /// Virtual time at which the engine's monotonic clock shows this.
    pub(crate) fn micros_of(&self, monotonic: Duration) -> Micros {
        (monotonic.as_nanos().div_ceil(1_000) as u64).saturating_sub(MONOTONIC_AT_START)
    }

    pub(crate) fn at(&mut self, at: Micros, event: E) {
        self.planned += 1;
        self.queue.push(Reverse(Planned { at: at.max(self.now), order: self.planned, event }));
    }

    pub(crate) fn after(&mut self, wait: Micros, event: E) {
        self.at(self.now + wait, event);
    }

    /// The next event; time goes on to it.
    pub(crate) fn next(&mut self) -> Option<E> {
        let Reverse(planned) = self.queue.pop()?;
        self.now = planned.at;
        Some(planned.event)
    }

    /// Forgets what was planned for others than these.
    pub(crate) fn retain(&mut self, keep: impl Fn(&E) -> bool) {
        self.queue.retain(|Reverse(planned)| keep(&planned.event));
    }
}

impl<E> PartialEq for Planned<E> {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl<E> Eq for Planned<E> {}

impl<E> PartialOrd for Planned<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Planned<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

const MONOTONIC_AT_START: Micros = 12_345_678;
/// Mostly.
pub(crate) const WALL_MS_AT_START: u64 = 1_800_000_000_000;
