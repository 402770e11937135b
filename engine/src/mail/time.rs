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
