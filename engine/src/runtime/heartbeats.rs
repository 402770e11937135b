//! Whether the shards' threads still take turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Shards that have not taken a turn since the last look are stuck.
#[derive(Debug)]
pub(crate) struct Heartbeats {
    pub(crate) beats: Vec<Arc<AtomicU64>>,
    /// Beat and monotonic time of the last change.
    seen: std::sync::Mutex<Vec<(u64, Duration)>>,
}

impl Heartbeats {
    pub(crate) fn new(shards: usize) -> Self {
        let beats = (0..shards).map(|_| Arc::default()).collect();
        Self { beats, seen: std::sync::Mutex::new(vec![(0, Duration::ZERO); shards]) }
    }

    /// The first shard that took no turn for longer than `patience`.
    pub(crate) fn stuck(&self, now: Duration, patience: Duration) -> Option<usize> {
        let mut seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut stuck = None;
        for (shard, (beat, seen)) in self.beats.iter().zip(seen.iter_mut()).enumerate() {
            let beat = beat.load(Ordering::Relaxed);
            if beat != seen.0 || seen.1 == Duration::ZERO {
                *seen = (beat, now.max(Duration::from_nanos(1)));
            } else if now.saturating_sub(seen.1) > patience {
                stuck = stuck.or(Some(shard));
            }
        }
        stuck
    }
}
