//! Which host of a site is tried next, and which are left alone for a while.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::config::TlsMode;
use crate::handover::AttemptOrder;
use crate::limits::{CLEAR_MEMORY, HOST_MEMORIES_MAX};

/// What one pair remembers of the hosts that it connected to.
#[derive(Debug, Default)]
pub struct Hosts {
    memories: HashMap<SocketAddr, Memory>,
}

#[derive(Debug, Clone)]
struct Memory {
    failures: u32,
    until: Duration,
    reason: Arc<str>,
    /// Until then opportunistic TLS isn't tried with it.
    clear_until: Duration,
}

/// How long a host is left alone: `first` after one failure, doubling up to `max`.
#[derive(Debug, Clone, Copy)]
pub struct BackOff {
    pub first: Duration,
    pub max: Duration,
}

/// The next host to try, or when the first of them may be tried again and why not now.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    /// Index into the site's hosts, and the address.
    Connect {
        host: usize,
        to: SocketAddr,
    },
    Wait {
        until: Duration,
        reason: Arc<str>,
    },
    /// The site has no address at all.
    Nowhere,
}

impl Hosts {
    /// Takes the first address of `order` that isn't backing off.
    pub fn choose(&self, now: Duration, order: &AttemptOrder) -> Choice {
        let mut soonest: Option<&Memory> = None;
        for &(host, to) in order {
            match self.memories.get(&to) {
                Some(memory) if memory.until > now => {
                    if soonest.is_none_or(|soonest| memory.until < soonest.until) {
                        soonest = Some(memory);
                    }
                }
                _ => return Choice::Connect { host, to },
            }
        }
        match soonest {
            Some(memory) => Choice::Wait { until: memory.until, reason: Arc::clone(&memory.reason) },
            None => Choice::Nowhere,
        }
    }

    pub fn failed(&mut self, now: Duration, address: SocketAddr, back_off: BackOff, reason: Arc<str>) {
        self.make_room(now);
        let memory = self.memory(address);
        let doublings = memory.failures.min(16);
        memory.failures += 1;
        memory.until = now + (back_off.first * (1 << doublings)).min(back_off.max);
        memory.reason = reason;
    }

    pub fn succeeded(&mut self, address: SocketAddr) {
        if let Some(memory) = self.memories.get_mut(&address) {
            memory.failures = 0;
            memory.until = Duration::ZERO;
        }
    }

    /// The host's TLS is broken: opportunistic deliveries go in the clear for a while.
    pub fn clear_only(&mut self, now: Duration, address: SocketAddr) {
        self.make_room(now);
        self.memory(address).clear_until = now + CLEAR_MEMORY;
    }

    /// The TLS to use with this host where `asked` is asked for.
    pub fn tls_mode(&self, now: Duration, address: SocketAddr, asked: TlsMode) -> TlsMode {
        let clear = self.memories.get(&address).is_some_and(|memory| memory.clear_until > now);
        if clear && asked == TlsMode::Opportunistic { TlsMode::Disabled } else { asked }
    }

    /// Whether there is anything worth keeping.
    pub fn remembers(&self, now: Duration) -> bool {
        self.memories.values().any(|memory| memory.until > now || memory.clear_until > now)
    }

    fn memory(&mut self, address: SocketAddr) -> &mut Memory {
        self.memories.entry(address).or_insert_with(|| Memory {
            failures: 0,
            until: Duration::ZERO,
            reason: Arc::from(""),
            clear_until: Duration::ZERO,
        })
    }

    /// Forgets what no longer matters once there is much of it.
    fn make_room(&mut self, now: Duration) {
        if self.memories.len() >= HOST_MEMORIES_MAX {
            self.memories.retain(|_, memory| memory.until > now || memory.clear_until > now);
        }
        if self.memories.len() >= HOST_MEMORIES_MAX {
            self.memories.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACK_OFF: BackOff = BackOff { first: Duration::from_secs(30), max: Duration::from_secs(300) };

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, last], 25))
    }

    #[test]
    fn a_failed_host_is_passed_over_until_its_time() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1)), (1, address(2))];
        let at = Duration::from_secs;
        assert_eq!(hosts.choose(at(0), &order), Choice::Connect { host: 0, to: address(1) });
        hosts.failed(at(0), address(1), BACK_OFF, "refused".into());
        assert_eq!(hosts.choose(at(1), &order), Choice::Connect { host: 1, to: address(2) });
        hosts.failed(at(1), address(2), BACK_OFF, "reset".into());
        assert_eq!(hosts.choose(at(2), &order), Choice::Wait { until: at(30), reason: "refused".into() });
        assert_eq!(hosts.choose(at(30), &order), Choice::Connect { host: 0, to: address(1) });
    }

    #[test]
    fn the_pause_doubles_to_its_maximum_and_ends_with_success() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1))];
        let mut pauses = Vec::new();
        for _ in 0..6 {
            hosts.failed(Duration::ZERO, address(1), BACK_OFF, "refused".into());
            let Choice::Wait { until, .. } = hosts.choose(Duration::ZERO, &order) else { panic!("it backs off") };
            pauses.push(until.as_secs());
        }
        assert_eq!(pauses, [30, 60, 120, 240, 300, 300]);
        hosts.succeeded(address(1));
        hosts.failed(Duration::ZERO, address(1), BACK_OFF, "refused".into());
        let Choice::Wait { until, .. } = hosts.choose(Duration::ZERO, &order) else { panic!("it backs off") };
        assert_eq!(until.as_secs(), 30);
    }

    #[test]
    fn broken_tls_clears_only_what_was_opportunistic() {
        let mut hosts = Hosts::default();
        hosts.clear_only(Duration::ZERO, address(1));
        let mode = |asked| hosts.tls_mode(Duration::from_secs(60), address(1), asked);
        assert_eq!(mode(TlsMode::Opportunistic), TlsMode::Disabled);
        assert_eq!(mode(TlsMode::Required), TlsMode::Required);
        assert_eq!(hosts.tls_mode(CLEAR_MEMORY, address(1), TlsMode::Opportunistic), TlsMode::Opportunistic);
    }
}
