//! Which host of a site is tried next, and which are left alone for a while.

use std::sync::Arc;
use std::time::Duration;

use ahash::HashMap;

use crate::handover::{AttemptOrder, Elsewhere, Need, TlsRequirement};
use crate::limits::{
    CLEAR_AT_ONCE, CLEAR_MEMORY, HOST_MEMORIES_MAX, LACK_MEMORY, PORT_PAUSE, PROBE_PATIENCE, UNWELL_MEMORY,
};
use crate::mail::endpoint::Endpoint;

/// What one pair remembers of the hosts that it connected to.
#[derive(Debug, Default)]
pub struct Hosts {
    memories: HashMap<(Endpoint, Concern), Memory>,
    /// The host whose TLS has just failed, until it is chosen again or that is no longer just now.
    retry: Option<(Endpoint, Duration)>,
}

/// What a host failed in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Concern {
    Everything,
    /// Only mail with such a TLS requirement.
    Tls(TlsRequirement),
}

#[derive(Debug, Clone)]
struct Memory {
    failures: u32,
    until: Duration,
    /// One connection is on its way to find out whether the host is back; until then the others leave it alone.
    probed_until: Duration,
    reason: Arc<str>,
    /// Until then opportunistic TLS isn't tried with it.
    clear_until: Duration,
    /// Until then it is known not to offer these.
    lacks_eight_bit_until: Duration,
    lacks_utf8_until: Duration,
    /// It has put a message off for its own sake, and taken none since.
    unwell_until: Duration,
}

impl Memory {
    fn waits_until(&self) -> Duration {
        self.until.max(self.probed_until)
    }

    fn lacks_until(&mut self, need: Need) -> &mut Duration {
        match need {
            Need::EightBitMime => &mut self.lacks_eight_bit_until,
            Need::SmtpUtf8 => &mut self.lacks_utf8_until,
        }
    }

    fn lacks(&self, now: Duration, needs: &dyn Fn(Need) -> bool) -> bool {
        (needs(Need::EightBitMime) && self.lacks_eight_bit_until > now)
            || (needs(Need::SmtpUtf8) && self.lacks_utf8_until > now)
    }

    fn matters(&self, now: Duration) -> bool {
        let lacks_until = self.lacks_eight_bit_until.max(self.lacks_utf8_until);
        [self.waits_until(), self.clear_until, lacks_until, self.unwell_until].iter().any(|time| *time > now)
    }
}

/// How long a host is left alone: `first` after one failure, doubling up to `max`.
#[derive(Debug, Clone, Copy)]
pub struct BackOff {
    pub first: Duration,
    pub max: Duration,
}

/// What a host has made of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reception {
    Taken,
    /// Put off for the host's own sake.
    Unwell,
    /// A retry was put off for another reason: this host is no better than those that were unwell.
    RetryPutOff,
}

/// The next host to try, or when the first of them may be tried again and why not now.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    /// Index into the site's hosts, and the address.
    Connect { host: usize, to: Endpoint },
    Wait {
        until: Duration,
        reason: Arc<str>,
        /// Hosts would be there for other mail: with another TLS requirement, or that may go to more of the site's.
        is_own: bool,
    },
    /// The site has no address at all, or none that may be used.
    Nowhere,
}

impl Hosts {
    /// Takes the first address of `order` that isn't backing off; that whose TLS just failed first of all, for mail
    /// that goes in the clear instead. `requirement` tells what is required of a host; None: it must not be used.
    pub fn choose(
        &self,
        now: Duration,
        order: &AttemptOrder,
        requirement: impl Fn(usize) -> Option<TlsRequirement>,
    ) -> Choice {
        if let Some((retry, until)) = self.retry
            && now < until
            && let Some(&(host, to)) = order.iter().find(|(_, to)| *to == retry)
            && requirement(host) == Some(TlsRequirement::Opportunistic)
            && self.waits(now, to, Concern::Everything).is_none()
        {
            return Choice::Connect { host, to };
        }
        let mut soonest: Option<&Memory> = None;
        let (mut for_other_tls, mut for_others) = (false, false);
        for &(host, to) in order {
            let broken = self.waits(now, to, Concern::Everything);
            let Some(requirement) = requirement(host) else {
                for_others |= broken.is_none();
                continue;
            };
            let refused = self.waits(now, to, Concern::of(&requirement));
            for_other_tls |= broken.is_none() && refused.is_some();
            let later = broken.into_iter().chain(refused).max_by_key(|memory| memory.waits_until());
            let Some(memory) = later else { return Choice::Connect { host, to } };
            if soonest.is_none_or(|soonest| memory.waits_until() < soonest.waits_until()) {
                soonest = Some(memory);
            }
        }
        match soonest {
            Some(memory) => Choice::Wait {
                until: memory.waits_until(),
                reason: Arc::clone(&memory.reason),
                // A host that is just tried again may be there for it in a moment.
                is_own: for_other_tls || for_others && memory.until > now,
            },
            None => Choice::Nowhere,
        }
    }

    /// A connection is begun where [`Self::choose`] has told. If the host has failed, others wait for what becomes of
    /// it: a host that is still down would keep all of them for as long as a connection may take.
    pub fn begin(&mut self, now: Duration, address: Endpoint) {
        self.retry = None;
        if let Some(memory) = self.memories.get_mut(&(address, Concern::Everything))
            && memory.failures > 0
        {
            memory.probed_until = now + PROBE_PATIENCE;
        }
    }

    /// What was begun is over, whatever came of it.
    pub fn end_probe(&mut self, address: Endpoint) {
        if let Some(memory) = self.memories.get_mut(&(address, Concern::Everything)) {
            memory.probed_until = Duration::ZERO;
        }
    }

    pub fn failed(&mut self, now: Duration, address: Endpoint, back_off: BackOff, reason: Arc<str>) {
        self.leave_alone(now, (address, Concern::Everything), back_off, reason);
    }

    /// The host can't be had with such TLS; mail that requires less, or something else, may go to it.
    pub fn failed_tls(
        &mut self,
        now: Duration,
        address: Endpoint,
        requirement: &TlsRequirement,
        back_off: BackOff,
        reason: Arc<str>,
    ) {
        self.leave_alone(now, (address, Concern::of(requirement)), back_off, reason);
    }

    /// A host that goes down fails all connections that are on their way to it: that is one failure, whose pause goes
    /// on.
    fn leave_alone(&mut self, now: Duration, of: (Endpoint, Concern), back_off: BackOff, reason: Arc<str>) {
        self.make_room(now);
        let memory = self.memory(of);
        if now < memory.until {
            return;
        }
        let doublings = memory.failures.min(16);
        memory.failures += 1;
        memory.until = now + (back_off.first * (1 << doublings)).min(back_off.max);
        memory.reason = reason;
    }

    /// It is tried again in a moment, and has not failed.
    pub fn pause(&mut self, now: Duration, address: Endpoint, reason: Arc<str>) {
        self.make_room(now);
        let memory = self.memory((address, Concern::Everything));
        if memory.until <= now {
            memory.until = now + PORT_PAUSE;
            memory.reason = reason;
        }
    }

    /// A session that was begun with this requirement is up.
    pub fn succeeded(&mut self, address: Endpoint, requirement: &TlsRequirement) {
        for concern in [Concern::Everything, Concern::of(requirement)] {
            if let Some(memory) = self.memories.get_mut(&(address, concern)) {
                memory.failures = 0;
                memory.until = Duration::ZERO;
                memory.probed_until = Duration::ZERO;
            }
        }
    }

    /// The host's TLS is broken: opportunistic deliveries go in the clear for a while.
    pub fn clear_only(&mut self, now: Duration, address: Endpoint) {
        self.make_room(now);
        self.memory((address, Concern::Everything)).clear_until = now + CLEAR_MEMORY;
        self.retry = Some((address, now + CLEAR_AT_ONCE));
    }

    /// The TLS to use with this host where `asked` is required.
    pub fn tls_to_use(&self, now: Duration, address: Endpoint, asked: TlsRequirement) -> TlsRequirement {
        let memory = self.memories.get(&(address, Concern::Everything));
        let clear = memory.is_some_and(|memory| memory.clear_until > now);
        if clear && asked == TlsRequirement::Opportunistic { TlsRequirement::Disabled } else { asked }
    }

    /// The host does not offer it; says where else, of what is `usable`, a message that needs all of this can go. A
    /// host that has only the one, and lacks another, is no place for it: each would send it to the other.
    pub fn lacks(
        &mut self,
        now: Duration,
        address: Endpoint,
        need: Need,
        usable: &[(Endpoint, TlsRequirement)],
        needs: &dyn Fn(Need) -> bool,
    ) -> Elsewhere {
        self.make_room(now);
        *self.memory((address, Concern::Everything)).lacks_until(need) = now + LACK_MEMORY;
        let needs = |asked| asked == need || needs(asked);
        let others = || usable.iter().filter(|(address, _)| !self.is_lacking(now, *address, &needs));
        match others().next() {
            None => Elsewhere::Nowhere,
            Some(_) if others().all(|(address, requirement)| self.backs_off(now, *address, requirement)) => {
                Elsewhere::Later
            }
            Some(_) => Elsewhere::AtOnce,
        }
    }

    /// Whether the host is known to lack some of what is needed.
    pub fn is_lacking(&self, now: Duration, address: Endpoint, needs: &dyn Fn(Need) -> bool) -> bool {
        self.memories.get(&(address, Concern::Everything)).is_some_and(|memory| memory.lacks(now, needs))
    }

    /// Whether nobody knows better than that some host lacks nothing of what is needed; if that can't be waited for,
    /// one that can be tried now.
    fn is_served(
        &self,
        now: Duration,
        mut usable: impl Iterator<Item = (Endpoint, TlsRequirement)>,
        can_wait: bool,
        needs: &dyn Fn(Need) -> bool,
    ) -> bool {
        usable.any(|(address, requirement)| {
            !self.is_lacking(now, address, needs) && (can_wait || !self.backs_off(now, address, &requirement))
        })
    }

    /// Whether a message may go to this host: it lacks nothing, or all that are `usable` do and one has to say so, as
    /// one has where those that may serve can't be had now and the message keeps its whole pair waiting (not
    /// `can_wait`). And its retry does not find it unwell while [`Self::choose`] would find another.
    pub fn may_take<U: Iterator<Item = (Endpoint, TlsRequirement)>>(
        &self,
        now: Duration,
        address: Endpoint,
        usable: impl Fn() -> U,
        is_retry: bool,
        can_wait: bool,
        needs: &dyn Fn(Need) -> bool,
    ) -> bool {
        if self.is_lacking(now, address, needs) {
            return !self.is_served(now, usable(), can_wait, needs);
        }
        let is_better = |(other, requirement): (Endpoint, TlsRequirement)| {
            let serves = !self.is_lacking(now, other, needs) && !self.is_unwell(now, other);
            serves && !self.backs_off(now, other, &requirement)
        };
        !is_retry || !self.is_unwell(now, address) || !usable().any(is_better)
    }

    /// What a host has made of a message.
    pub fn said(&mut self, now: Duration, address: Endpoint, reception: Reception) {
        match reception {
            Reception::Unwell => {
                self.make_room(now);
                self.memory((address, Concern::Everything)).unwell_until = now + UNWELL_MEMORY;
            }
            Reception::Taken => {
                if let Some(memory) = self.memories.get_mut(&(address, Concern::Everything)) {
                    memory.unwell_until = Duration::ZERO;
                }
            }
            // A backup may put off everything while the first host is up.
            Reception::RetryPutOff => {
                self.memories.values_mut().for_each(|memory| memory.unwell_until = Duration::ZERO)
            }
        }
    }

    fn is_unwell(&self, now: Duration, address: Endpoint) -> bool {
        self.memories.get(&(address, Concern::Everything)).is_some_and(|memory| memory.unwell_until > now)
    }

    /// Hosts that put messages off for their own sake come behind the others.
    pub fn put_unwell_last(&self, now: Duration, order: &mut AttemptOrder) {
        order.sort_by_key(|&(_, address)| self.is_unwell(now, address));
    }

    /// Leaves out the hosts that lack what is needed, unless a message may go there: see [`Self::may_take`].
    pub fn keep_serving(
        &self,
        now: Duration,
        order: &mut AttemptOrder,
        requirement: impl Fn(usize) -> Option<TlsRequirement>,
        can_wait: bool,
        needs: &dyn Fn(Need) -> bool,
    ) {
        let usable = order.iter().filter_map(|&(host, address)| Some((address, requirement(host)?)));
        if self.is_served(now, usable, can_wait, needs) {
            order.retain(|&(_, address)| !self.is_lacking(now, address, needs));
        }
    }

    /// Whether there is anything worth keeping.
    pub fn remembers(&self, now: Duration) -> bool {
        self.memories.values().any(|memory| memory.matters(now))
    }

    /// Whether the host can't be tried now with such TLS.
    fn backs_off(&self, now: Duration, address: Endpoint, requirement: &TlsRequirement) -> bool {
        [Concern::Everything, Concern::of(requirement)].into_iter().any(|it| self.waits(now, address, it).is_some())
    }

    /// What keeps the host from being tried now.
    fn waits(&self, now: Duration, address: Endpoint, concern: Concern) -> Option<&Memory> {
        self.memories.get(&(address, concern)).filter(|memory| memory.waits_until() > now)
    }

    fn memory(&mut self, of: (Endpoint, Concern)) -> &mut Memory {
        self.memories.entry(of).or_insert_with(|| Memory {
            failures: 0,
            until: Duration::ZERO,
            probed_until: Duration::ZERO,
            reason: Arc::from(""),
            clear_until: Duration::ZERO,
            lacks_eight_bit_until: Duration::ZERO,
            lacks_utf8_until: Duration::ZERO,
            unwell_until: Duration::ZERO,
        })
    }

    /// Forgets what no longer matters once there is much of it.
    fn make_room(&mut self, now: Duration) {
        if self.memories.len() >= HOST_MEMORIES_MAX {
            self.memories.retain(|_, memory| memory.matters(now));
        }
        if self.memories.len() >= HOST_MEMORIES_MAX {
            self.memories.clear();
        }
    }
}

impl Concern {
    fn of(requirement: &TlsRequirement) -> Self {
        Self::Tls(requirement.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACK_OFF: BackOff = BackOff { first: Duration::from_secs(30), max: Duration::from_secs(300) };

    fn address(last: u8) -> Endpoint {
        std::net::SocketAddr::from(([127, 0, 0, last], 25)).into()
    }

    fn any(_: usize) -> Option<TlsRequirement> {
        Some(TlsRequirement::Opportunistic)
    }

    fn waits(hosts: &mut Hosts, order: &AttemptOrder) -> Duration {
        let Choice::Wait { until, .. } = hosts.choose(Duration::ZERO, order, any) else { panic!("it backs off") };
        until
    }

    #[test]
    fn a_failed_host_is_passed_over_until_its_time() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1)), (1, address(2))];
        let at = Duration::from_secs;
        assert_eq!(hosts.choose(at(0), &order, any), Choice::Connect { host: 0, to: address(1) });
        hosts.failed(at(0), address(1), BACK_OFF, "refused".into());
        assert_eq!(hosts.choose(at(1), &order, any), Choice::Connect { host: 1, to: address(2) });
        hosts.failed(at(1), address(2), BACK_OFF, "reset".into());
        let wait = Choice::Wait { until: at(30), reason: "refused".into(), is_own: false };
        assert_eq!(hosts.choose(at(2), &order, any), wait);
        assert_eq!(hosts.choose(at(30), &order, any), Choice::Connect { host: 0, to: address(1) });
    }

    #[test]
    fn the_pause_doubles_to_its_maximum_and_ends_with_success() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1))];
        let (mut pauses, mut now) = (Vec::new(), Duration::ZERO);
        for _ in 0..6 {
            hosts.failed(now, address(1), BACK_OFF, "refused".into());
            pauses.push((waits(&mut hosts, &order) - now).as_secs());
            now = waits(&mut hosts, &order);
        }
        assert_eq!(pauses, [30, 60, 120, 240, 300, 300]);
        hosts.succeeded(address(1), &TlsRequirement::Verified);
        hosts.failed(Duration::ZERO, address(1), BACK_OFF, "refused".into());
        assert_eq!(waits(&mut hosts, &order).as_secs(), 30);
    }

    #[test]
    fn a_domain_waits_by_itself_while_others_have_a_host() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1)), (1, address(2))];
        let named = |host: usize| (host == 0).then_some(TlsRequirement::Verified);
        let own = |hosts: &Hosts, second| match hosts.choose(Duration::from_secs(second), &order, named) {
            Choice::Wait { is_own, .. } => is_own,
            other => panic!("{other:?}"),
        };
        hosts.failed(Duration::ZERO, address(1), BACK_OFF, "refused".into());
        assert!(own(&hosts, 1));
        hosts.begin(Duration::from_secs(30), address(1));
        assert!(!own(&hosts, 31), "it is just tried again");
        hosts.end_probe(address(1));
        hosts.failed(Duration::from_secs(31), address(1), BACK_OFF, "refused".into());
        hosts.failed(Duration::from_secs(31), address(2), BACK_OFF, "refused".into());
        assert!(!own(&hosts, 32), "nobody has one");
    }

    /// Ten connections are begun together, and the host is down.
    #[test]
    fn what_fails_together_is_one_failure() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1))];
        let at = Duration::from_secs;
        for second in 0..10 {
            hosts.failed(at(second), address(1), BACK_OFF, "refused".into());
        }
        assert_eq!(waits(&mut hosts, &order), at(30));
        hosts.failed(at(30), address(1), BACK_OFF, "refused".into());
        hosts.failed(at(31), address(1), BACK_OFF, "refused".into());
        assert_eq!(waits(&mut hosts, &order), at(90));
    }

    #[test]
    fn a_pause_is_short_and_no_failure() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1)), (1, address(2))];
        let mut now = Duration::from_secs(1);
        for _ in 0..5 {
            hosts.pause(now, address(1), "no port".into());
            hosts.pause(now, address(2), "no port".into());
            assert_eq!(waits(&mut hosts, &order), now + PORT_PAUSE);
            now += PORT_PAUSE;
        }
        let back_off = BackOff { first: Duration::from_secs(10), max: Duration::from_secs(60) };
        for last in [1, 2] {
            hosts.failed(now, address(last), back_off, "refused".into());
            hosts.pause(now, address(last), "no port".into());
        }
        assert_eq!(waits(&mut hosts, &order), now + back_off.first, "as after a first failure, and no sooner");
    }

    #[test]
    fn one_connection_finds_out_whether_a_host_is_back() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1)), (1, address(2))];
        let at = Duration::from_secs;
        let chosen = |hosts: &mut Hosts, second| match hosts.choose(at(second), &order, any) {
            Choice::Connect { host, to } => {
                hosts.begin(at(second), to);
                host
            }
            other => panic!("{other:?}"),
        };
        assert_eq!([chosen(&mut hosts, 0), chosen(&mut hosts, 0)], [0, 0], "nothing is known of it");
        hosts.failed(at(0), address(1), BACK_OFF, "timed out".into());
        assert_eq!([chosen(&mut hosts, 30), chosen(&mut hosts, 30), chosen(&mut hosts, 31)], [0, 1, 1]);
        hosts.end_probe(address(1));
        assert_eq!([chosen(&mut hosts, 32), chosen(&mut hosts, 32)], [0, 1], "nothing came of it");
        let until = at(32) + PROBE_PATIENCE;
        assert_eq!(waits(&mut hosts, &vec![(0, address(1))]), until, "who has no other host waits for it");
        assert_eq!(chosen(&mut hosts, until.as_secs()), 0, "but no longer than so");
        hosts.end_probe(address(1));
        hosts.failed(until, address(1), BACK_OFF, "timed out".into());
        assert_eq!(chosen(&mut hosts, until.as_secs() + 59), 1);
        assert_eq!(chosen(&mut hosts, until.as_secs() + 60), 0);
        hosts.succeeded(address(1), &TlsRequirement::Opportunistic);
        assert_eq!([chosen(&mut hosts, 200), chosen(&mut hosts, 200)], [0, 0], "it is back");
    }

    #[test]
    fn what_a_host_lacks_is_looked_for_at_the_others() {
        let mut hosts = Hosts::default();
        let site = [address(1), address(2)].map(|address| (address, TlsRequirement::Opportunistic));
        let at = Duration::from_secs;
        let eight_bit = |need| need == Need::EightBitMime;
        let both = |_| true;
        let nothing = |_| false;
        let order_of = |hosts: &Hosts, can_wait, needs: &dyn Fn(Need) -> bool| {
            let mut order = vec![(0, address(1)), (1, address(2))];
            hosts.keep_serving(at(1), &mut order, any, can_wait, needs);
            order.into_iter().map(|(host, _)| host).collect::<Vec<_>>()
        };
        let order = |hosts: &Hosts, needs: &dyn Fn(Need) -> bool| order_of(hosts, true, needs);
        assert_eq!(hosts.lacks(at(0), address(1), Need::EightBitMime, &site, &eight_bit), Elsewhere::AtOnce);
        assert_eq!(order(&hosts, &eight_bit), [1]);
        assert_eq!(order(&hosts, &nothing), [0, 1]);
        let may_take = |hosts: &Hosts, last, needs: &dyn Fn(Need) -> bool| {
            hosts.may_take(at(1), address(last), || site.clone().into_iter(), false, true, needs)
        };
        assert!(!may_take(&hosts, 1, &both) && may_take(&hosts, 2, &both) && may_take(&hosts, 1, &nothing));
        hosts.failed(at(0), address(2), BACK_OFF, "refused".into());
        assert_eq!(hosts.lacks(at(1), address(1), Need::EightBitMime, &site, &eight_bit), Elsewhere::Later);
        let usable = || site.clone().into_iter();
        for (can_wait, hosts_left) in [(true, vec![1]), (false, vec![0, 1])] {
            assert_eq!(order_of(&hosts, can_wait, &eight_bit), hosts_left, "2 can't be had now");
            assert_eq!(hosts.may_take(at(1), address(1), usable, false, can_wait, &eight_bit), !can_wait);
        }
        let utf8 = |need| need == Need::SmtpUtf8;
        let elsewhere = hosts.lacks(at(1), address(2), Need::SmtpUtf8, &site, &utf8);
        assert_eq!(elsewhere, Elsewhere::AtOnce, "1 was not asked for it");
        assert_eq!(order(&hosts, &both), [0, 1], "each lacks something: either may say so");
        for (last, need) in [(1, Need::EightBitMime), (2, Need::SmtpUtf8)] {
            assert_eq!(hosts.lacks(at(1), address(last), need, &site, &both), Elsewhere::Nowhere, "and it ends there");
        }
        assert_eq!(hosts.lacks(at(2), address(2), Need::EightBitMime, &site, &eight_bit), Elsewhere::Nowhere);
        assert!(may_take(&hosts, 1, &eight_bit) && may_take(&hosts, 2, &eight_bit), "somebody has to say so");
        assert!(!hosts.is_lacking(at(2) + LACK_MEMORY, address(2), &both), "it is asked again later");
    }

    /// RFC 5321 §5.1: another address is tried, once a message has been put off for the host's own sake.
    #[test]
    fn a_retry_finds_an_unwell_host_only_where_no_other_can_be_had() {
        let mut hosts = Hosts::default();
        let at = Duration::from_secs;
        let order = |hosts: &Hosts, second| {
            let mut order = vec![(0, address(1)), (1, address(2)), (2, address(3))];
            hosts.put_unwell_last(at(second), &mut order);
            order.into_iter().map(|(host, _)| host).collect::<Vec<_>>()
        };
        let fits = |hosts: &Hosts, second, last, is_retry| {
            let usable = || [1, 2].map(|last| (address(last), TlsRequirement::Verified)).into_iter();
            hosts.may_take(at(second), address(last), usable, is_retry, true, &|need| need == Need::EightBitMime)
        };
        hosts.said(at(0), address(1), Reception::Unwell);
        assert_eq!(order(&hosts, 1), [1, 2, 0]);
        assert!(fits(&hosts, 1, 1, false), "other mail may be luckier");
        assert!(!fits(&hosts, 1, 1, true) && fits(&hosts, 1, 2, true));
        hosts.failed(at(1), address(2), BACK_OFF, "refused".into());
        assert!(fits(&hosts, 1, 1, true), "the other can't be reached");
        assert!(!fits(&hosts, 31, 1, true));
        hosts.failed_tls(at(31), address(2), &TlsRequirement::Verified, BACK_OFF, "self-signed".into());
        assert!(fits(&hosts, 31, 1, true) && !fits(&hosts, 61, 1, true));
        let usable = [1, 2].map(|last| (address(last), TlsRequirement::Verified));
        hosts.lacks(at(61), address(2), Need::EightBitMime, &usable, &|need| need == Need::EightBitMime);
        assert!(fits(&hosts, 61, 1, true), "the other lacks what is needed");
        hosts.said(at(62), address(2), Reception::Unwell);
        hosts.said(at(62), address(3), Reception::Unwell);
        assert_eq!(order(&hosts, 63), [0, 1, 2], "all are alike");
        hosts.said(at(64), address(2), Reception::Taken);
        assert_eq!(order(&hosts, 65), [1, 0, 2], "it takes mail again");
        hosts.said(at(65), address(2), Reception::RetryPutOff);
        assert_eq!(order(&hosts, 66), [0, 1, 2], "it is no better than the others");
        hosts.said(at(66), address(1), Reception::Unwell);
        assert_eq!(order(&hosts, 66 + UNWELL_MEMORY.as_secs()), [0, 1, 2]);
    }

    #[test]
    fn broken_tls_clears_only_what_was_opportunistic() {
        use TlsRequirement::{Disabled, Encrypted, Opportunistic};
        let mut hosts = Hosts::default();
        hosts.clear_only(Duration::ZERO, address(1));
        let to_use = |asked| hosts.tls_to_use(Duration::from_secs(60), address(1), asked);
        assert_eq!(to_use(Opportunistic), Disabled);
        assert_eq!(to_use(Encrypted), Encrypted);
        assert_eq!(hosts.tls_to_use(CLEAR_MEMORY, address(1), Opportunistic), Opportunistic);
    }

    /// RFC 7435 §3: the same host again, in the clear, though another of the same preference stands in front.
    #[test]
    fn a_host_whose_tls_failed_is_tried_again_at_once() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1)), (1, address(2))];
        hosts.clear_only(Duration::ZERO, address(2));
        assert_eq!(hosts.choose(Duration::ZERO, &order, any), Choice::Connect { host: 1, to: address(2) });
        hosts.begin(Duration::ZERO, address(2));
        assert_eq!(hosts.choose(Duration::ZERO, &order, any), Choice::Connect { host: 0, to: address(1) }, "once");
        hosts.clear_only(Duration::ZERO, address(2));
        let chosen = hosts.choose(Duration::ZERO, &order, |_| Some(TlsRequirement::Verified));
        assert_eq!(chosen, Choice::Connect { host: 0, to: address(1) });
    }

    /// Nobody waited when its TLS failed. What comes hours later goes to the host that the DNS prefers.
    #[test]
    fn a_backup_whose_tls_failed_long_ago_is_not_preferred() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1)), (1, address(2))];
        hosts.clear_only(Duration::ZERO, address(2));
        assert_eq!(hosts.choose(CLEAR_AT_ONCE, &order, any), Choice::Connect { host: 0, to: address(1) });
        hosts.clear_only(Duration::ZERO, address(2));
        let just_now = CLEAR_AT_ONCE - Duration::from_millis(1);
        assert_eq!(hosts.choose(just_now, &order, any), Choice::Connect { host: 1, to: address(2) });
    }

    /// A certificate that is no good for one domain's mail says nothing about another's.
    #[test]
    fn a_tls_failure_keeps_away_only_mail_with_the_same_requirement() {
        let mut hosts = Hosts::default();
        let order = vec![(0, address(1))];
        let verified = |_| Some(TlsRequirement::Verified);
        hosts.failed_tls(Duration::ZERO, address(1), &TlsRequirement::Verified, BACK_OFF, "self-signed".into());
        assert_eq!(hosts.choose(Duration::ZERO, &order, any), Choice::Connect { host: 0, to: address(1) });
        let until = Duration::from_secs(30);
        let wait = Choice::Wait { until, reason: "self-signed".into(), is_own: true };
        assert_eq!(hosts.choose(Duration::ZERO, &order, verified), wait);
        hosts.succeeded(address(1), &TlsRequirement::Opportunistic);
        assert_eq!(hosts.choose(Duration::ZERO, &order, verified), wait, "that others get through changes nothing");
        hosts.failed(Duration::ZERO, address(1), BACK_OFF, "refused".into());
        assert_eq!(waits(&mut hosts, &order), until);
        hosts.succeeded(address(1), &TlsRequirement::Verified);
        assert_eq!(hosts.choose(Duration::ZERO, &order, verified), Choice::Connect { host: 0, to: address(1) });
    }
    /// RFC 8461 §5.1: a host that the domain's policy doesn't name is no host of it.
    #[test]
    fn a_host_that_must_not_be_used_is_passed_over() {
        let hosts = Hosts::default();
        let order = vec![(0, address(1)), (1, address(2))];
        let second = |host| (host == 1).then_some(TlsRequirement::Verified);
        assert_eq!(hosts.choose(Duration::ZERO, &order, second), Choice::Connect { host: 1, to: address(2) });
        assert_eq!(hosts.choose(Duration::ZERO, &order, |_| None), Choice::Nowhere);
    }
}
