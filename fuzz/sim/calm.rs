//! Behind some runs, once all is well and what was wrong is forgotten: mail goes at once, to the hosts that the DNS
//! prefers; and neither a recipient that is put off nor a site that is down delays any other mail.
//!
//! What is drawn here comes from a generator of its own.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;

use postrider::accept::Received;
use postrider::admin::{MessageRow, MessageState};
use postrider::config::{Config, RetrySchedule};
use postrider::handover::{ControlMessage, ShardMessage};
use postrider::limits::SOURCE_AVOIDED;
use postrider::pool::suspension::{Effect, Scope, Suspension};

use crate::checker::{Ledger, Marker, Sent};
use crate::clock::{HOUR, MINUTE, MS, Micros, SECOND};
use crate::random::Random;
use crate::rates;
use crate::world::{BY_SENDER, SITES, World};

/// Of every so manieth seed.
const EVERY: u64 = 2;

/// Connections that were begun: when, by which source, to which host, and to which of its addresses.
pub(crate) type Connects = Vec<(Micros, usize, usize, SocketAddr)>;

/// Whether there is such a time behind the run.
pub(crate) fn draw(seed: u64) -> Option<Random> {
    let mut random = Random::new(seed.rotate_left(4) ^ 0x6361_6c6d);
    random.one_in(EVERY).then_some(random)
}

impl World {
    pub(crate) fn be_calm(&mut self) {
        let Some(mut random) = self.calm.take() else { return };
        self.operator = None;
        // What the DNS said before is forgotten with it.
        self.reload();
        // What is suspended is so for longer where the clock was set back.
        self.pass(FORGOTTEN_WITHIN + self.ledger.back_ms * MS);
        self.connects = Some(Vec::new());
        let domains: Vec<String> = self.dns.that_take_mail().map(str::to_owned).collect();
        let idle = self.config.shaping.idle_timeout.as_micros() as Micros;
        for _ in 0..ROUNDS {
            domains.iter().for_each(|domain| _ = self.post("r", domain, &mut random));
            self.see_it_go(0, "nothing is wrong");
            self.pass(idle + 2 * SECOND + random.below(SECOND));
        }
        self.check_preference();
        // Rules suspend whole sites for an answer.
        if self.wanted.shaping.automation.is_empty() {
            self.put_one_off(&domains, &mut random);
        }
        self.suspend_one(&domains, &mut random);
        self.move_to_other(&domains, &mut random);
        self.take_one_down(&domains, &mut random);
        self.connects = None;
        if random.one_in(3) {
            self.pass(SOURCE_AVOIDED.as_micros() as Micros);
            self.share_by_weight(&domains, &mut random);
        }
    }

    /// NOBODY-WAITS: once all has been well for long, what is due goes, and does not wait for its end.
    pub(crate) fn check_none_stuck(&self, rows: &[MessageRow]) {
        // What was suspended when the clock was set back is so for longer.
        let is_looked_at = self.is_plain() && !self.rollup.is_there() && self.ledger.back_ms == 0;
        if !is_looked_at || !self.is_well_since(FORGOTTEN_WITHIN + HOUR / 4) {
            return;
        }
        let since_ms = self.clock.now().wall_ms.saturating_sub((FORGOTTEN_WITHIN + HOUR / 4) / MS);
        let is_stuck =
            |row: &&MessageRow| row.state != MessageState::Held && row.due.is_some_and(|due| due.0 < since_ms);
        let stuck = rows.iter().find(is_stuck);
        assert!(stuck.is_none(), "NOBODY-WAITS: nothing is wrong, and this was due at {since_ms}: {stuck:#?}");
    }

    /// A message to one recipient at the domain.
    fn post(&mut self, name: &str, domain: &str, random: &mut Random) -> Marker {
        let shard = random.below(self.shards.len() as u64) as usize;
        self.post_at(shard, name, domain)
    }

    fn post_at(&mut self, shard: usize, name: &str, domain: &str) -> Marker {
        let marker = self.ledger.send(|marker| Sent {
            reverse_path: format!("m{marker}@client.example"),
            recipients: vec![format!("{name}@{domain}")],
            steering: String::new(),
            content: format!("Subject: m{marker}\r\n\r\n").into_bytes(),
            sources: vec![0, 1],
            first_attempt_ms: None,
        });
        let sent = self.ledger.sent(marker);
        let received = Received::embedded(sent.reverse_path.clone(), sent.recipients.clone(), sent.content.clone());
        self.ledger.finish(marker);
        let admitted = self.policy.admit(self.clock.now(), received, [marker, marker]).expect("it is as it should be");
        self.injections.insert(marker, marker);
        self.mail(shard, ShardMessage::Inject { injection: marker, admitted: Box::new(admitted) });
        marker
    }

    /// NOBODY-WAITS: all but so many recipients come to their end soon.
    fn see_it_go(&mut self, others: usize, why: &str) {
        let until = self.clock.micros() + AT_ONCE;
        while !self.injections.is_empty() || self.ledger.open() > others {
            self.step();
            let is_late = self.clock.micros() > until;
            assert!(!is_late, "NOBODY-WAITS: {why}, but {:?} wait: {:#?}", self.ledger.pending(), self.ask());
        }
    }

    /// The hosts of a site that a source reaches, and that it is to try first.
    fn preferred(&self, source: usize, site: usize) -> Vec<usize> {
        let mut hosts = self.reached(source, site);
        let first = hosts.iter().map(|place| self.hosts[*place].preference).min();
        hosts.retain(|place| Some(self.hosts[*place].preference) == first);
        hosts
    }

    pub(crate) fn reached(&self, source: usize, site: usize) -> Vec<usize> {
        let bound = self.config.egress_sources[source].source_address;
        let reaches = |place: &usize| {
            let mut addresses = self.hosts[*place].addresses();
            addresses.any(|address| bound.is_none_or(|bound| bound.is_ipv4() == address.is_ipv4()))
        };
        let of_site = (0..self.hosts.len()).filter(|place| self.hosts[*place].site == site);
        of_site.filter(reaches).collect()
    }

    /// ROUTED: connections go to the hosts of the lowest preference, and to each of these (RFC 5321 §5.1).
    fn check_preference(&self) {
        let mut begun: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut first: BTreeMap<(usize, usize), Micros> = BTreeMap::new();
        for &(at, source, host, _) in self.connects.iter().flatten() {
            let site = self.hosts[host].site;
            // Static ones have one host.
            if site >= SITES {
                continue;
            }
            // A host that failed before has one connection until that is up, and others do not wait for it.
            match first.entry((source, site)) {
                Entry::Occupied(first) if at < first.get() + UP_WITHIN => continue,
                Entry::Occupied(_) => {}
                Entry::Vacant(first) => _ = first.insert(at),
            }
            let preferred = self.preferred(source, site);
            assert!(preferred.contains(&host), "ROUTED: source {source} connects to {}", self.hosts[host].name);
            begun.entry(site).or_default().push(host);
        }
        for (site, begun) in begun {
            let of_both = self.preferred(0, site).into_iter().filter(|host| self.preferred(1, site).contains(host));
            let missed: Vec<usize> = of_both.filter(|host| !begun.contains(host)).collect();
            assert!(begun.len() < ENOUGH || missed.is_empty(), "ROUTED: of {} none to {missed:?}", begun.len());
        }
    }

    /// ROUTED: a reload gives the pool's sources other shares, and what a home sends goes by these.
    fn share_by_weight(&mut self, domains: &[String], random: &mut Random) {
        let mut weights = vec![(0, 1 + random.below(3) as u32), (1, 5)];
        if random.one_in(2) {
            weights.reverse();
        }
        let mut config = Config::clone(&self.reloads.wanted_now());
        config.egress_pools[0].sources.clone_from(&weights);
        while self.moves.is_under_way() {
            self.step();
        }
        self.reload_to(config);
        while self.reloads.is_under_way() {
            self.step();
        }
        let is_met_by_both = |domain: &&String| {
            let site = self.dns.site_of(domain);
            site.is_some_and(|site| [0, 1].into_iter().all(|source| !self.reached(source, site).is_empty()))
        };
        // Some of its mail has a route of its own.
        let mut plain = domains.iter().filter(|domain| **domain != BY_SENDER);
        let Some(domain) = plain.find(is_met_by_both).cloned() else { return };
        let shard = random.below(self.shards.len() as u64) as usize;
        let whole: u32 = weights.iter().map(|(_, weight)| weight).sum();
        let markers: Vec<Marker> = (0..WEIGHED * whole).map(|_| self.post_at(shard, "r", &domain)).collect();
        let until = self.clock.micros() + 5 * MINUTE;
        while !self.injections.is_empty() || self.ledger.open() > 0 {
            assert!(
                self.clock.micros() < until,
                "NOBODY-WAITS: nothing is wrong, but {:?} wait",
                self.ledger.pending()
            );
            self.step();
        }
        for (source, weight) in weights {
            let went = self.rates.count(source, &markers);
            let share = (WEIGHED * weight) as usize;
            // Turns of the pool may have been taken before, and not all of a round.
            let is_right = went.abs_diff(share) <= 2;
            assert!(is_right, "ROUTED: {went} of {} to {domain} went by source {source}, not {share}", markers.len());
        }
    }

    /// A recipient is put off: that is nothing to the others. It is tried again when it is due.
    fn put_one_off(&mut self, domains: &[String], random: &mut Random) {
        let domain = &domains[random.below(domains.len() as u64) as usize];
        let marker = self.post(PUT_OFF, domain, random);
        let since = self.clock.micros();
        while self.ledger.deferred_until(marker).is_none() {
            assert!(self.clock.micros() < since + AT_ONCE, "NOBODY-WAITS: {marker} is not tried");
            self.step();
        }
        domains.iter().for_each(|domain| _ = self.post("r", domain, random));
        self.see_it_go(1, "one recipient is put off");
        let due_ms = self.ledger.deferred_until(marker).expect("it is put off");
        while self.clock.now().wall_ms < due_ms {
            self.step();
        }
        self.see_it_go(0, "it is due");
    }

    /// An operator suspends a domain: that is nothing to the others. It goes on when that is over before its time.
    fn suspend_one(&mut self, domains: &[String], random: &mut Random) {
        let domain = &domains[random.below(domains.len() as u64) as usize];
        let scope = Scope { domain: Some(domain.as_str().into()), ..Scope::default() };
        let id = self.suspend(scope, random);
        domains.iter().for_each(|domain| _ = self.post("r", domain, random));
        self.see_it_go(1, "one domain is suspended");
        self.pass(AT_ONCE);
        assert_eq!(self.ledger.open(), 1, "SUSPENDED: mail to {domain} went");
        self.suspensions.retain(|suspension| suspension.id != id);
        for shard in 0..self.shards.len() {
            self.mail(shard, ShardMessage::Resume { id });
            self.in_force.forget(shard, id);
        }
        self.see_it_go(0, "nothing is suspended any more");
    }

    /// A source is suspended at a site while mail waits there: it goes by the other.
    fn move_to_other(&mut self, domains: &[String], random: &mut Random) {
        let domain = &domains[random.below(domains.len() as u64) as usize];
        let site = self.dns.site_of(domain).filter(|site| *site < SITES - 1).unwrap_or_default();
        if [0, 1].into_iter().any(|source| self.preferred(source, site).is_empty()) {
            return;
        }
        (0..WAITING).for_each(|_| _ = self.post("r", domain, random));
        let rollup = Some(rates::name_of(&self.hosts, site).as_str().into());
        self.suspend(Scope { source: Some(random.below(2) as usize), rollup, ..Scope::default() }, random);
        self.see_it_go(0, "a source is suspended, and another is there");
    }

    /// For an hour.
    fn suspend(&mut self, scope: Scope, random: &mut Random) -> u128 {
        let id = u128::from(random.below(u64::MAX));
        let until_ms = self.clock.now().wall_ms + HOUR / MS;
        let suspension = Suspension { id, scope, effect: Effect::Stop, reason: "calm".into(), until_ms };
        self.control(ControlMessage::Suspend(Box::new(suspension)));
        self.pass(SECOND);
        id
    }

    /// A site is down: that is nothing to the others, its hosts are left alone for a while each time, and its mail goes
    /// when they are back.
    fn take_one_down(&mut self, domains: &[String], random: &mut Random) {
        let site = random.below(SITES as u64) as usize;
        let (domain, others): (Vec<&String>, Vec<&String>) =
            domains.iter().partition(|domain| self.dns.site_of(domain) == Some(site));
        let Some(domain) = domain.first() else { return };
        self.connects = Some(Vec::new());
        let begin = self.clock.micros();
        let is_silent = random.one_in(2);
        for host in self.hosts.iter_mut().filter(|host| host.site == site) {
            (host.down_until, host.is_down_silently) = (begin + DOWN_FOR, is_silent);
        }
        // By a route of its own it goes elsewhere.
        let down = (0..2).map(|_| self.post(DOWN, domain, random)).collect::<Vec<Marker>>();
        for _ in 0..3 {
            others.iter().for_each(|domain| _ = self.post("r", domain, random));
            self.see_it_go(down.len(), "another site is down");
            self.pass(10 * SECOND);
        }
        while self.clock.micros() < begin + DOWN_FOR {
            self.step();
        }
        // Where nobody answers, others may be begun before the first of them has failed.
        if !is_silent {
            self.check_left_alone(site);
        }
        let until = begin + DOWN_FOR + FORGOTTEN_WITHIN;
        while self.ledger.open() > 0 {
            assert!(self.clock.micros() < until, "NOBODY-WAITS: {domain} is back, and its mail waits");
            self.step();
        }
    }

    /// An address that can't be connected to is left alone before it is tried again, for half a minute at least where
    /// retries are no more frequent.
    fn check_left_alone(&self, site: usize) {
        let first = match &self.config.retry.schedule {
            RetrySchedule::Doubling { first, .. } => *first,
            RetrySchedule::Listed(intervals) => intervals[0],
        };
        let pause = (first.as_micros() as Micros).min(30 * SECOND) - SECOND;
        let mut last: BTreeMap<(usize, SocketAddr), Micros> = BTreeMap::new();
        for &(at, source, host, to) in self.connects.iter().flatten().filter(|it| self.hosts[it.2].site == site) {
            let before = last.insert((source, to), at);
            let waited = before.map(|before| at - before);
            // Those that were begun together are one.
            assert!(
                waited.is_none_or(|waited| waited < TOGETHER || waited >= pause),
                "BACK-OFF: {} ({to}) is tried by source {source} at {at}, and was at {before:?}",
                self.hosts[host].name
            );
        }
    }
}

impl Ledger {
    /// When the only recipient is tried again, if it was put off.
    pub(crate) fn deferred_until(&self, marker: Marker) -> Option<u64> {
        let recipient = self.durable[self.ids.get(&marker)?].recipients[0];
        (recipient.attempts > 0 && recipient.fate.is_none()).then_some(recipient.due_ms)
    }
}

/// Recipients of this name are put off when they are first tried.
pub(crate) const PUT_OFF: &str = "later";
const DOWN: &str = "down";

/// From when on nothing keeps mail from going: a host is left alone for ten minutes, a source that was refused for
/// half an hour.
const FORGOTTEN_WITHIN: Micros = 31 * MINUTE;

/// Some turns of the DNS, the disk and the network.
const AT_ONCE: Micros = 15 * SECOND;
const TOGETHER: Micros = 500 * MS;
/// Until a connection can take a message.
const UP_WITHIN: Micros = 5 * SECOND;

/// That wait where a source is suspended.
const WAITING: usize = 4;

/// Rounds of a pool's turns.
const WEIGHED: u32 = 5;

const ROUNDS: usize = 14;
/// With so many, by chance, each of two hosts has had one but in one of a million.
const ENOUGH: usize = 24;
const DOWN_FOR: Micros = 7 * MINUTE;
