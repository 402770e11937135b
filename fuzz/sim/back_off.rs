//! Addresses that can't be connected to, as the network sees it: a source leaves each alone, the longer the more often
//! in a row it has failed. All that is kept here is the least that the engine must know.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use postrider::config::RetrySchedule;

use crate::clock::{MS, Micros, SECOND};
use crate::world::{SITES, World};

/// What became of connections in this life, by source and address.
#[derive(Debug, Default)]
pub(crate) struct Failures(BTreeMap<(usize, SocketAddr), Failed>);

#[derive(Debug, Clone, Copy, Default)]
struct Failed {
    /// In a row, of which each was begun after the one before had failed, and nothing else was under way.
    times: u32,
    left_alone_until: Micros,
    /// When the engine heard last of any connection there: that may have counted in place of what was begun before it.
    heard_at: Micros,
}

/// A connection that comes up, is over, or never comes up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard {
    pub(crate) source: usize,
    pub(crate) to: SocketAddr,
    pub(crate) begun: Micros,
    pub(crate) now: Micros,
}

impl Failures {
    /// A process begins with nothing.
    pub(crate) fn begin_life(&mut self) {
        self.0.clear();
    }

    /// The host may be back: a session that comes up ends its back-off.
    pub(crate) fn may_be_back(&mut self, Heard { source, to, now, .. }: Heard) {
        self.0.insert((source, to), Failed { heard_at: now, ..Failed::default() });
    }

    /// A connection came to nothing, and that is not the host's fault.
    pub(crate) fn hear(&mut self, Heard { source, to, now, .. }: Heard) {
        self.0.entry((source, to)).or_default().heard_at = now;
    }

    /// The address could not be connected to. `is_up`: another connection is, whose session may come up, or have
    /// failed before.
    pub(crate) fn fail(&mut self, heard: Heard, is_up: bool, retry: &RetrySchedule) {
        let failed = self.0.entry((heard.source, heard.to)).or_default();
        let is_one_more = heard.begun > failed.heard_at && !is_up;
        failed.heard_at = heard.now;
        if is_one_more {
            failed.times += 1;
            failed.left_alone_until = heard.now + pause(retry, failed.times);
        }
    }

    /// Whether it has failed, and was not up since.
    pub(crate) fn has_failed(&self, source: usize, to: SocketAddr) -> bool {
        self.0.get(&(source, to)).is_some_and(|failed| failed.times > 0)
    }
}

impl World {
    /// BACK-OFF: a connection is begun. Of what a route leads to by its address nobody says here which site it is of.
    pub(crate) fn check_back_off(&self, source: usize, host: usize, to: SocketAddr) {
        let (now, host) = (self.clock.micros(), &self.hosts[host]);
        let Some(Failed { times, left_alone_until, .. }) = self.failures.0.get(&(source, to)) else { return };
        assert!(
            now + MS >= *left_alone_until || host.site >= SITES,
            "BACK-OFF: {} ({to}) is tried by source {source} at {now}, and after {times} failures is to be left alone \
             until {left_alone_until}",
            host.name
        );
    }
}

/// As `engine/src/shard/orders.rs` has it, and `engine/src/limits.rs`.
fn pause(retry: &RetrySchedule, times: u32) -> Micros {
    let (first, max) = match retry {
        RetrySchedule::Doubling { first, max } => (*first, *max),
        RetrySchedule::Listed(intervals) => (intervals[0], *intervals.last().expect("there is one")),
    };
    let [first, max] = [first, max].map(|pause: Duration| pause.as_micros() as Micros);
    let first = first.min(FIRST_MAX);
    (first << (times - 1).min(16)).min(max.min(MAX).max(first))
}

const FIRST_MAX: Micros = 30 * SECOND;
const MAX: Micros = 600 * SECOND;
