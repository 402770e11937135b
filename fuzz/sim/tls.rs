//! TLS policies: what domains require of their hosts, what hosts show, and whether each transaction rode on what its
//! own domain requires. The network stands in for rustls: it knows what a handshake has proved, whatever the engine
//! believes.
//!
//! In some runs domains share hosts and differ in what they require: by the operator's word, an MTA-STS policy, or the
//! hosts' TLSA records; and hosts' TLS, certificates and records change over time. What is drawn here comes from a
//! generator of its own, so that the other runs are what they were. All runs are checked.
//!
//! Over 500 lines: what is required, what is shown and what is checked mirror each other.

use std::collections::BTreeMap;
use std::sync::Arc;

use postrider::config::{Config, DomainPattern, Route, RouteTarget, TlsMode};
use postrider::deliver::dane::{HostDane, TlsaRecord};
use postrider::deliver::mta_sts::StsPolicy;
use postrider::deliver::route::Site;
use postrider::handover::{self, HandshakeError, TlsFailure, TlsRequirement};

use crate::canary::Canary;
use crate::checker::{Ledger, marker_of};
use crate::clock::{HOUR, MINUTE, Micros, SECOND};
use crate::dns::{Dns, IMPLICIT};
use crate::mix::{Fault, Mix};
use crate::peer::{Host, Tls};
use crate::random::Random;
use crate::reload::Epoch;
use crate::world::SITES;

/// How a connection stands with TLS, as the network knows it.
#[derive(Debug)]
pub(crate) enum Session {
    Clear,
    /// STARTTLS was said.
    Asked,
    /// With a server of this name, and a certificate that is to meet this.
    Handshaking(String, TlsRequirement),
    Up(Proof),
}

/// What a handshake has proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Nobody looked at the certificate.
    Encrypted,
    /// It was good for the host's name, and somebody is trusted who vouches for it.
    Named,
    /// It was held against TLSA records, has this key, and is for the host's name or not.
    Key { key: u64, is_named: bool },
}

/// What all policies are at present, and what shards were told of them.
#[derive(Debug)]
pub(crate) struct Policies {
    random: Random,
    /// They differ and change in this run.
    pub(crate) are_drawn: bool,
    domains: BTreeMap<String, Domain>,
    /// In the order of the world's hosts.
    hosts: Vec<HostTls>,
    /// What each shard was told of each domain in this life.
    told: BTreeMap<(usize, String), Vec<Told>>,
    /// When TLS failed last at a host, from a source.
    failed_at: BTreeMap<(usize, usize), Micros>,
}

#[derive(Debug, Clone, Default)]
struct Domain {
    sts: Option<Sts>,
    /// Its MX set is vouched for, and so its hosts' TLSA records count.
    is_signed: bool,
}

/// An MTA-STS policy.
#[derive(Debug, Clone)]
struct Sts {
    is_enforced: bool,
    hosts: Vec<String>,
}

#[derive(Debug, Clone)]
struct HostTls {
    key: u64,
    /// What is wrong with its certificate.
    flaw: Option<Flaw>,
    tlsa: Tlsa,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    SelfSigned,
    OtherName,
    Expired,
}

/// A host's TLSA records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Tlsa {
    #[default]
    Absent,
    Unusable,
    /// Nobody can say.
    Unknown,
    Keys {
        keys: Vec<u64>,
        /// They are trust anchors', so a certificate has to be for the right name, too.
        names_count: bool,
    },
}

/// A domain's hosts and policies, as an answer of the DNS had them.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    from: Micros,
    until: Micros,
    hosts: Vec<(usize, Tlsa)>,
    sts: Option<Sts>,
}

/// What a connection is like that a transaction rides on.
#[derive(Debug)]
pub(crate) struct Watch<'a> {
    pub(crate) policies: &'a Policies,
    /// The configurations that the operator wanted.
    pub(crate) epochs: &'a [Epoch],
    pub(crate) shards: usize,
    pub(crate) session: &'a Session,
    /// When the connection was begun.
    pub(crate) begun: Micros,
}

/// What a domain requires of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Required<'a> {
    Clear,
    /// TLS where it is to be had.
    Opportunistic,
    Encrypted,
    Named,
    Key {
        keys: &'a [u64],
        names_count: bool,
    },
    /// No mail goes there.
    Nothing,
}

impl Policies {
    /// `may_draw`: what domains require may differ in this run.
    pub(crate) fn new(seed: u64, may_draw: bool) -> Self {
        let mut random = Random::new(seed.rotate_left(48) ^ 0x7374_7373);
        let are_drawn = random.one_in(4) && may_draw;
        Self {
            random,
            are_drawn,
            domains: BTreeMap::new(),
            hosts: Vec::new(),
            told: BTreeMap::new(),
            failed_at: BTreeMap::new(),
        }
    }

    /// The world has these hosts and domains; most of them share a site with others.
    pub(crate) fn begin(&mut self, hosts: &[Host], dns: &mut Dns) {
        let good = |place| HostTls { key: place as u64, flaw: None, tlsa: Tlsa::Absent };
        self.hosts = (0..hosts.len()).map(good).collect();
        if self.are_drawn {
            dns.share_sites(SITES_SHARED, &mut self.random);
            self.domains = dns.with_mx().map(|domain| (domain.to_owned(), Domain::default())).collect();
            for _ in 0..4 {
                self.change_domains(&mut None);
            }
            for (place, host) in hosts.iter().enumerate() {
                self.change_host(place, host.site);
            }
        }
    }

    /// What the operator says of domains' TLS.
    pub(crate) fn change_config(&mut self, config: &mut Config) {
        if self.are_drawn {
            draw_modes(config, &mut self.random);
        }
    }

    /// Time goes by: certificates and keys are others, records follow or don't, and so do policies.
    pub(crate) fn change(&mut self, hosts: &mut [Host], mix: &mut Mix) {
        if !self.are_drawn || mix.is_healed() {
            return;
        }
        for (place, host) in hosts.iter_mut().enumerate() {
            if self.random.one_in(3) {
                mix.count(Fault::TlsChanged);
                let kinds = [Tls::NotOffered, Tls::Refused, Tls::Broken, Tls::Injected, Tls::Works];
                // It works in two of three.
                host.habits.tls = kinds[self.random.below(12).min(4) as usize];
                self.change_host(place, host.site);
            }
        }
        self.change_domains(&mut Some(mix));
    }

    fn change_host(&mut self, place: usize, site: usize) {
        let random = &mut self.random;
        let host = &mut self.hosts[place];
        let flaws = [Some(Flaw::SelfSigned), Some(Flaw::OtherName), Some(Flaw::Expired), None];
        host.flaw = flaws[random.below(7).min(3) as usize];
        let before = host.key;
        if random.one_in(3) {
            host.key += 1_000;
        }
        // The last site's domain takes part in comparisons of shares.
        if site >= SITES - 1 {
            return;
        }
        host.tlsa = match random.below(10) {
            0..4 => Tlsa::Absent,
            4 => Tlsa::Unusable,
            5 => Tlsa::Unknown,
            6 => Tlsa::Keys { keys: vec![host.key + 500], names_count: random.one_in(2) },
            7 => Tlsa::Keys { keys: vec![before], names_count: random.one_in(2) },
            _ => Tlsa::Keys { keys: vec![host.key, host.key + 1_000], names_count: random.one_in(2) },
        };
    }

    fn change_domains(&mut self, mix: &mut Option<&mut Mix>) {
        let random = &mut self.random;
        for domain in self.domains.values_mut() {
            if !random.one_in(4) {
                continue;
            }
            if let Some(mix) = mix {
                mix.count(Fault::PolicyChanged);
            }
            domain.is_signed = random.one_in(2);
            let hosts = match random.below(4) {
                // Mostly it names some of the domain's hosts.
                0 => vec!["mx1.s0.example".to_owned(), "mx1.s1.example".to_owned(), "mx2.s2.example".to_owned()],
                1 => vec!["elsewhere.example".to_owned()],
                _ => all_hosts(),
            };
            domain.sts = match random.below(4) {
                0 => Some(Sts { is_enforced: false, hosts }),
                1 | 2 => Some(Sts { is_enforced: true, hosts }),
                _ => None,
            };
        }
    }

    /// From now on all hosts have what is required of them.
    pub(crate) fn heal(&mut self) {
        for host in &mut self.hosts {
            host.flaw = None;
            host.tlsa = match &host.tlsa {
                Tlsa::Keys { names_count, .. } => Tlsa::Keys { keys: vec![host.key], names_count: *names_count },
                _ => Tlsa::Absent,
            };
        }
        for sts in self.domains.values_mut().filter_map(|domain| domain.sts.as_mut()) {
            sts.hosts = all_hosts();
        }
    }

    /// All connections and answers are gone.
    pub(crate) fn begin_life(&mut self) {
        self.told.clear();
    }

    /// Adds the policies to what the DNS says of a domain. `by_mx`: no route leads there.
    pub(crate) fn add_to(
        &self,
        domain: &str,
        by_mx: bool,
        route: &mut handover::Route,
        hosts: &[Host],
        mix: &mut Mix,
    ) -> Told {
        let policies = self.domains.get(domain).cloned().unwrap_or_default();
        let mut told = Told { from: 0, until: 0, hosts: Vec::new(), sts: policies.sts };
        let mut site = Site::clone(&route.site);
        for host in &mut site.hosts {
            let place = hosts.iter().position(|known| known.name == host.name).expect("it is one of the hosts");
            let tlsa = if policies.is_signed { self.hosts[place].tlsa.clone() } else { Tlsa::Absent };
            host.dane = tlsa.as_told(&host.name, domain);
            match tlsa {
                Tlsa::Unknown => mix.count(Fault::TlsaUnknown),
                Tlsa::Unusable => mix.count(Fault::TlsaUnusable),
                Tlsa::Absent | Tlsa::Keys { .. } => {}
            }
            told.hosts.push((place, tlsa));
        }
        if let Some(sts) = told.sts.as_ref().filter(|_| by_mx) {
            route.sts = Some(Arc::new(sts.as_told()));
            let is_named = |host: &postrider::deliver::route::Host| sts.names(&host.name);
            if sts.is_enforced && !site.hosts.iter().all(is_named) {
                mix.count(Fault::PolicyNamesOthers);
            }
        }
        route.site = Arc::new(site);
        told
    }

    /// An answer has come to its shard, and counts there until it expires or another comes.
    pub(crate) fn tell(&mut self, shard: usize, domain: &str, now: Micros, until: Micros, told: Told) {
        let of_domain = self.told.entry((shard, domain.to_owned())).or_default();
        if let Some(last) = of_domain.last_mut() {
            last.until = last.until.min(now);
        }
        of_domain.retain(|told| told.until + UNDER_WAY_MAX >= now);
        // What asked for it is served in any case.
        of_domain.push(Told { from: now, until: until.max(now + SECOND), ..told });
    }

    /// How a handshake ends, and what it has proved: what was asked for. A canary has others told as good, too.
    pub(crate) fn shake_hands(
        &self,
        place: usize,
        host: &Host,
        session: &Session,
        canary: Option<Canary>,
        mix: &mut Mix,
    ) -> Result<Proof, HandshakeError> {
        let Session::Handshaking(name, asked) = session else { unreachable!("it was asked for: {session:?}") };
        if host.habits.tls != Tls::Works {
            return Err("the handshake failed".to_owned().into());
        }
        let HostTls { key, flaw, .. } = self.hosts[place];
        let is_named = *name == host.name && flaw != Some(Flaw::OtherName);
        let octets = key.to_be_bytes();
        let wrong = match asked {
            TlsRequirement::Disabled => unreachable!("there is no handshake then"),
            TlsRequirement::Opportunistic | TlsRequirement::Encrypted => return Ok(Proof::Encrypted),
            TlsRequirement::Verified => match flaw {
                None if is_named => return Ok(Proof::Named),
                None | Some(Flaw::OtherName) => (TlsFailure::CertificateHostMismatch, Fault::TlsOtherName),
                Some(Flaw::SelfSigned) => (TlsFailure::CertificateNotTrusted, Fault::TlsSelfSigned),
                Some(Flaw::Expired) => (TlsFailure::CertificateExpired, Fault::TlsExpired),
            },
            TlsRequirement::Dane(policy) => {
                let by_anchor = policy.names_anchor(&octets, &octets);
                if policy.names_certificate(&octets, &octets) || by_anchor && is_named {
                    return Ok(Proof::Key { key, is_named });
                }
                (TlsFailure::TlsaInvalid, if by_anchor { Fault::TlsOtherName } else { Fault::TlsaMismatch })
            }
        };
        if canary == Some(Canary::TrustingHandshake) {
            return Ok(Proof::Encrypted);
        }
        mix.count(wrong.1);
        Err(HandshakeError { failure: wrong.0, text: "the certificate is not good".to_owned() })
    }

    /// A connection of that source to that host came to its end before TLS was there, or without it.
    pub(crate) fn fail(&mut self, source: usize, host: usize, now: Micros) {
        self.failed_at.insert((source, host), now);
    }
}

impl Watch<'_> {
    /// RIGHT-TLS: a transaction rides only on a connection whose handshake has proved what its own domain requires of
    /// that host; `at` is when MAIL was written. `is_offered`: the peer has said on this connection that it has TLS.
    pub(crate) fn check(
        &self,
        at: Micros,
        reverse_path: &str,
        recipient: &str,
        (source, place, host): (usize, usize, &Host),
        is_offered: bool,
        ledger: &Ledger,
    ) {
        // What left before its commit is complained of elsewhere.
        let Some(id) = ledger.ids.get(&marker_of(reverse_path)) else { return };
        let domain = recipient.rsplit_once('@').map_or("", |(_, domain)| domain);
        let home = usize::from(id.log().0) % self.shards;
        let failed_at = self.policies.failed_at.get(&(source, place)).copied();
        let has_failed = failed_at.is_some_and(|failed_at| failed_at + CLEAR_MAX >= self.begun);
        let has_reason = !is_offered || has_failed || matches!(self.session, Session::Asked);
        let nothing = Vec::new();
        let told = self.policies.told.get(&(home, domain.to_owned())).unwrap_or(&nothing);
        let told = || told.iter().filter(|told| told.from <= at && told.until + UNDER_WAY_MAX >= at);
        let epochs = self.epochs.iter().filter(|epoch| epoch.from <= at && epoch.until >= at);
        let required = epochs.flat_map(|epoch| {
            let config = &epoch.config;
            let fixed = host.site.checked_sub(SITES).map(|place| Required::by_word(mode(config, place)));
            let by_dns =
                told().filter(move |_| fixed.is_none()).map(move |told| told.required(config, domain, place, host));
            fixed.into_iter().chain(by_dns)
        });
        let required: Vec<Required<'_>> = required.collect();
        assert!(
            required.iter().any(|required| required.is_met_by(self.session, has_reason)),
            "RIGHT-TLS: {reverse_path} to {recipient} at {} requires one of {required:?}, and the connection of {} is \
             {:?}; TLS is offered: {is_offered}, and failed at {failed_at:?}",
            host.name,
            self.begun,
            self.session,
        );
    }
}

impl Told {
    fn required(&self, config: &Config, domain: &str, place: usize, host: &Host) -> Required<'_> {
        let Some((_, tlsa)) = self.hosts.iter().find(|(known, _)| *known == place) else { return Required::Nothing };
        let route = config.route_for(domain);
        let mode = route.and_then(|route| route.tls).unwrap_or(config.shaping.tls);
        let sts = self.sts.as_ref().filter(|sts| sts.is_enforced && route.is_none());
        match (mode, tlsa, sts) {
            (TlsMode::Disabled, ..) => Required::Clear,
            (_, Tlsa::Unknown, _) => Required::Nothing,
            (_, Tlsa::Keys { keys, names_count }, _) => Required::Key { keys, names_count: *names_count },
            (_, _, Some(sts)) if sts.names(&host.name) => Required::Named,
            (_, _, Some(_)) => Required::Nothing,
            // Records that can't be used still say that there is TLS.
            (TlsMode::Opportunistic, Tlsa::Unusable, None) => Required::Encrypted,
            (mode, ..) => Required::by_word(mode),
        }
    }
}

impl Required<'_> {
    fn by_word(mode: TlsMode) -> Self {
        match mode {
            TlsMode::Disabled => Self::Clear,
            TlsMode::Opportunistic => Self::Opportunistic,
            TlsMode::Required => Self::Encrypted,
            TlsMode::Verified => Self::Named,
        }
    }

    /// `has_reason`: TLS was not to be had.
    fn is_met_by(&self, session: &Session, has_reason: bool) -> bool {
        let proof = if let Session::Up(proof) = session { Some(*proof) } else { None };
        match (self, proof) {
            (Self::Nothing, _) => false,
            (Self::Clear, proof) => proof.is_none(),
            (Self::Opportunistic, None) => has_reason,
            (Self::Opportunistic | Self::Encrypted, proof) => proof.is_some(),
            (Self::Named, proof) => proof == Some(Proof::Named),
            (Self::Key { keys, names_count }, Some(Proof::Key { key, is_named })) => {
                keys.contains(&key) && (is_named || !names_count)
            }
            (Self::Key { .. }, _) => false,
        }
    }
}

impl Tlsa {
    fn as_told(&self, host: &str, domain: &str) -> HostDane {
        match self {
            Self::Absent => HostDane::Absent,
            Self::Unusable => HostDane::Unusable,
            Self::Unknown => HostDane::Unknown("SERVFAIL".into()),
            Self::Keys { keys, names_count } => {
                let usage = if *names_count { DANE_TA } else { DANE_EE };
                // The whole key is in it.
                let record =
                    |key: &u64| TlsaRecord { usage, selector: 1, matching: 0, data: key.to_be_bytes().to_vec() };
                HostDane::of_records(host, &[domain.to_owned()], keys.iter().map(record))
            }
        }
    }
}

impl Sts {
    fn names(&self, host: &str) -> bool {
        let fits = |pattern: &String| match pattern.strip_prefix('*') {
            Some(rest) => host.split_once('.').is_some_and(|(_, behind)| rest[1..] == *behind),
            None => host == pattern,
        };
        self.hosts.iter().any(fits)
    }

    fn as_told(&self) -> StsPolicy {
        let mode = if self.is_enforced { "enforce" } else { "testing" };
        let hosts: String = self.hosts.iter().map(|host| format!("mx: {host}\n")).collect();
        StsPolicy::parse(&format!("version: STSv1\nmode: {mode}\n{hosts}max_age: 86400\n")).expect("it is a policy")
    }
}

/// Of all sites. The last one's host is a domain without an MX set, but others' may lead there.
fn all_hosts() -> Vec<String> {
    let of_sites = (0..SITES).map(|site| format!("*.s{site}.example"));
    of_sites.chain([IMPLICIT.to_owned()]).collect()
}

/// Of a static route.
fn mode(config: &Config, place: usize) -> TlsMode {
    config.routes[place].tls.expect("it says so")
}

/// Some domains have a word of their own, others what all have.
pub(crate) fn draw_modes(config: &mut Config, random: &mut Random) {
    let modes = [TlsMode::Disabled, TlsMode::Required, TlsMode::Verified, TlsMode::Opportunistic];
    config.shaping.tls = modes[random.below(8).min(3) as usize];
    config.routes.retain(|route| !matches!(route.to[..], [RouteTarget::Mx(_)]));
    for place in 0..SITES {
        if random.one_in(2) {
            let domain = format!("d{place}.example");
            let to = vec![RouteTarget::Mx(domain.clone())];
            let tls = Some(modes[random.below(4) as usize]);
            config.routes.push(Route { tls, ..Route::new(DomainPattern::Exact(domain), to) });
        }
    }
}

/// As many have to do for all domains with an MX set.
const SITES_SHARED: u64 = 3;

/// Certificate usages (RFC 7218).
const DANE_TA: u8 = 2;
const DANE_EE: u8 = 3;

/// Until the MAIL of what was begun is written: one host after the other may take minutes to connect, to greet, and to
/// answer EHLO.
const UNDER_WAY_MAX: Micros = 45 * MINUTE;

/// For so long after TLS has failed a host may get opportunistic mail in the clear: as `engine/src/limits.rs` has it,
/// and for as long as a shard may stand still.
const CLEAR_MAX: Micros = HOUR + MINUTE;
