//! What must not be sent for a while: suspensions, made by automation rules or by the operator. A rule may also put
//! stricter limits in force; such a suspension stops nothing by itself.
//!
//! A suspension names what it is about by up to five parts; a part that it leaves out matches everything. All shards
//! have all suspensions: a home leaves suspended sources out when it chooses one, an owner of a suspended pair starts
//! nothing. The control thread keeps the list on disk, so times are wall times.
//!
//! See also: `shard/suspend.rs` for who obeys them, `runtime/suspension_list.rs` for the file.

use std::collections::BTreeSet;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use ahash::{HashMap, HashMapExt as _};

use super::automation::Limited;
use crate::config::{HalvedLimits, LimitSettings};
use crate::handover::PairKey;
use crate::limits::SUSPENSIONS_MAX;

/// What a suspension stops.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Scope {
    /// Index into the configuration's egress sources.
    pub source: Option<usize>,
    /// A roll-up or, of a provider, one of its sites.
    pub rollup: Option<Arc<str>>,
    pub tenant: Option<Arc<str>>,
    pub campaign: Option<Arc<str>>,
    /// Recipients' domain.
    pub domain: Option<Arc<str>>,
}

/// Whose mail it is.
#[derive(Debug, Clone, Copy)]
pub struct Flow<'a> {
    pub tenant: &'a str,
    pub campaign: &'a str,
    pub domain: &'a str,
}

/// Where it goes: a site, and what rolls it up; itself, where no provider does.
#[derive(Debug, Clone, Copy)]
pub struct Destination<'a> {
    pub rollup: &'a Arc<str>,
    pub site: &'a Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspension {
    /// Random; shown as a UUID.
    pub id: u128,
    pub scope: Scope,
    pub effect: Effect,
    /// The rule and the answer that it matched, or the operator's words.
    pub reason: Arc<str>,
    pub until_ms: u64,
}

/// What a suspension does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing is sent.
    Stop,
    /// What is sent by a source at a roll-up's sites has these limits as well.
    Limit(Limited),
}

/// The limits that rules have put in force at a source and a roll-up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StricterLimits {
    pub settings: LimitSettings,
    pub reason: Arc<str>,
}

/// What a scope names: source, roll-up, tenant, campaign, domain.
type Parts<'a> = (Option<usize>, [Option<&'a str>; 4]);

/// Which of these parts it names.
type Shape = (bool, [bool; 4]);

/// All suspensions that are in force. One a scope and kind of effect. What stops a message is looked up by each shape
/// of scope that there is, so it does not matter how many there are.
#[derive(Debug, Clone, Default)]
pub struct Suspensions {
    /// By the sum of a scope's parts.
    by_parts: HashMap<u64, Vec<Suspension>>,
    shapes: BTreeSet<Shape>,
    len: usize,
}

impl Scope {
    pub fn pair(pair: &PairKey) -> Self {
        Self { source: Some(pair.source), rollup: Some(Arc::clone(&pair.rollup)), ..Self::default() }
    }

    fn parts(&self) -> Parts<'_> {
        let Self { source, rollup, tenant, campaign, domain } = self;
        (*source, [rollup, tenant, campaign, domain].map(Option::as_deref))
    }

    fn shape(&self) -> Shape {
        let (source, names) = self.parts();
        (source.is_some(), names.map(|name| name.is_some()))
    }

    /// Whether it stops everything at the pairs that it covers, and not only some flows.
    pub fn is_whole(&self) -> bool {
        self.tenant.is_none() && self.campaign.is_none() && self.domain.is_none()
    }

    pub fn covers_pair(&self, pair: &PairKey) -> bool {
        self.source.is_none_or(|source| source == pair.source)
            && self.rollup.as_ref().is_none_or(|rollup| *rollup == pair.rollup || *rollup == pair.site)
    }
}

impl Effect {
    /// Whether the one stands in for the other.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Stop, Self::Stop) => true,
            (Self::Limit(one), Self::Limit(other)) => one.is_like(other),
            _ => false,
        }
    }
}

impl Suspension {
    /// Whether the one stands in for the other.
    pub fn is_like(&self, other: &Self) -> bool {
        self.scope == other.scope && self.effect.is_like(&other.effect)
    }

    fn stops(&self) -> bool {
        self.effect == Effect::Stop
    }

    /// As it stands in `blocked_by`, where the time follows.
    pub fn blocked_by(&self) -> Arc<str> {
        format!("suspended: {}", self.reason).into()
    }
}

impl Suspensions {
    /// Puts a suspension in force in place of the one with the same scope and effect. False: there was one already, and
    /// it goes on; or there are too many.
    pub fn insert(&mut self, now_ms: u64, suspension: Suspension) -> bool {
        if self.len >= SUSPENSIONS_MAX {
            self.expire(now_ms);
        }
        let sum = sum(&suspension.scope.parts());
        let here = self.by_parts.get_mut(&sum);
        if let Some(present) = here.and_then(|here| here.iter_mut().find(|present| present.is_like(&suspension))) {
            let is_new = present.until_ms <= now_ms;
            *present = suspension;
            return is_new;
        }
        if self.len >= SUSPENSIONS_MAX {
            return false;
        }
        self.shapes.insert(suspension.scope.shape());
        self.by_parts.entry(sum).or_default().push(suspension);
        self.len += 1;
        true
    }

    /// What stops a flow that goes there by a source; the one that lasts longest.
    pub fn find(&self, now_ms: u64, source: usize, to: Destination<'_>, flow: Flow<'_>) -> Option<&Suspension> {
        let here = self.at(now_ms, source, to, Some(flow));
        here.into_iter().filter(|it| it.stops()).max_by_key(|suspension| suspension.until_ms)
    }

    /// What stops everything at a pair.
    pub fn of_pair(&self, now_ms: u64, pair: &PairKey) -> Option<&Suspension> {
        let here = self.at(now_ms, pair.source, pair.destination(), None);
        here.into_iter().filter(|it| it.stops()).max_by_key(|suspension| suspension.until_ms)
    }

    /// The suspension in force that this one would stand in for.
    pub fn present(&self, now_ms: u64, suspension: &Suspension) -> Option<&Suspension> {
        let here = self.by_parts.get(&sum(&suspension.scope.parts()))?;
        here.iter().find(|present| present.until_ms > now_ms && present.is_like(suspension))
    }

    /// What rules have halved at a pair, as far as it is not back.
    pub fn recovering(&self, now_ms: u64, pair: &PairKey, halved: HalvedLimits) -> Option<&Limited> {
        let scope = Scope::pair(pair);
        let here = self.by_parts.get(&sum(&scope.parts()))?;
        let mut in_force = here.iter().filter(|it| it.until_ms > now_ms && it.scope == scope);
        in_force.find_map(|it| match &it.effect {
            Effect::Limit(limited) if limited.is_of(halved) => Some(limited),
            _ => None,
        })
    }

    /// All limits that are in force by rules now, by source and roll-up.
    pub fn limits(&self, now_ms: u64) -> HashMap<(usize, Arc<str>), StricterLimits> {
        let mut limits: HashMap<_, StricterLimits> = HashMap::new();
        for suspension in self.iter().filter(|it| it.until_ms > now_ms) {
            let (Effect::Limit(limited), Scope { source: Some(source), rollup: Some(rollup), .. }) =
                (suspension.effect, &suspension.scope)
            else {
                continue;
            };
            let settings = limited.at(now_ms);
            match limits.entry((*source, Arc::clone(rollup))) {
                Entry::Vacant(place) => {
                    place.insert(StricterLimits { settings, reason: Arc::clone(&suspension.reason) });
                }
                Entry::Occupied(place) => {
                    let known = place.into_mut();
                    known.settings = known.settings.stricter(settings);
                    // The rate is what mail waits for, and so what the reason is asked for.
                    if known.settings.max_message_rate == settings.max_message_rate {
                        known.reason = Arc::clone(&suspension.reason);
                    }
                }
            }
        }
        limits
    }

    pub fn remove(&mut self, id: u128) -> Option<Suspension> {
        let mut removed = None;
        self.retain(|suspension| {
            let found = suspension.id == id;
            if found {
                removed = Some(suspension.clone());
            }
            !found
        });
        removed
    }

    /// Forgets those that are over.
    pub fn expire(&mut self, now_ms: u64) {
        self.retain(|suspension| suspension.until_ms > now_ms);
    }

    pub fn iter(&self) -> impl Iterator<Item = &Suspension> {
        self.by_parts.values().flatten()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Those in force for a flow there; without one, those that are about no flows.
    fn at(&self, now_ms: u64, source: usize, to: Destination<'_>, flow: Option<Flow<'_>>) -> Vec<&Suspension> {
        let of_flow = [flow.map(|flow| flow.tenant), flow.map(|flow| flow.campaign), flow.map(|flow| flow.domain)];
        // A site that no provider rolls up has one name.
        let names_of_place = [Some(to.rollup), Some(to.site).filter(|site| *site != to.rollup)];
        // Nearly always there is none.
        let here = self.shapes.iter().flat_map(|(names_source, named)| {
            let places = names_of_place.iter().flatten().take(if named[0] { 2 } else { 1 });
            places.filter_map(move |place| {
                let names = [Some(&***place), of_flow[0], of_flow[1], of_flow[2]];
                let parts = (names_source.then_some(source), std::array::from_fn(|i| names[i].filter(|_| named[i])));
                // What a scope names and nobody asks for is not there.
                let is_asked = named.iter().zip(&names).all(|(named, name)| !named || name.is_some());
                let here = is_asked.then(|| self.by_parts.get(&sum(&parts))).flatten()?;
                Some(here.iter().filter(move |it| it.until_ms > now_ms && it.scope.parts() == parts))
            })
        });
        here.flatten().collect()
    }

    fn retain(&mut self, mut keep: impl FnMut(&Suspension) -> bool) {
        self.by_parts.retain(|_, here| {
            here.retain(&mut keep);
            !here.is_empty()
        });
        self.len = self.by_parts.values().map(Vec::len).sum();
        self.shapes = self.iter().map(|suspension| suspension.scope.shape()).collect();
    }
}

/// Others may have the same.
fn sum(parts: &Parts<'_>) -> u64 {
    ahash::RandomState::with_seeds(1, 2, 3, 4).hash_one(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspension(id: u128, scope: Scope, until_ms: u64) -> Suspension {
        Suspension { id, scope, effect: Effect::Stop, reason: "because".into(), until_ms }
    }

    fn pair_of(source: usize, rollup: &Arc<str>) -> PairKey {
        PairKey { source, rollup: Arc::clone(rollup), site: "mx.example".into() }
    }

    fn to(rollup: &Arc<str>) -> Destination<'_> {
        Destination { rollup, site: rollup }
    }

    fn flow<'a>(tenant: &'a str, campaign: &'a str) -> Flow<'a> {
        Flow { tenant, campaign, domain: "d.example" }
    }

    #[test]
    fn a_scope_stops_what_all_its_parts_match() {
        let (google, yahoo): (Arc<str>, Arc<str>) = ("google".into(), "yahoo".into());
        let pair = pair_of(1, &google);
        let mut all = Suspensions::default();
        assert!(all.insert(0, suspension(1, Scope::pair(&pair), 100)));
        assert!(all.find(0, 1, to(&google), flow("t", "c")).is_some());
        assert!(all.find(0, 2, to(&google), flow("t", "c")).is_none(), "another source");
        assert!(all.find(0, 1, to(&yahoo), flow("t", "c")).is_none(), "another roll-up");
        assert!(all.find(100, 1, to(&google), flow("t", "c")).is_none(), "it is over");
        assert_eq!(all.of_pair(0, &pair).map(|found| found.id), Some(1));

        let tenant = Scope { tenant: Some("acme".into()), ..Scope::pair(&pair_of(2, &yahoo)) };
        assert!(all.insert(0, suspension(2, tenant, 100)));
        assert!(all.find(0, 2, to(&yahoo), flow("acme", "any")).is_some());
        assert!(all.find(0, 2, to(&yahoo), flow("other", "any")).is_none());
        assert!(all.of_pair(0, &pair_of(2, &yahoo)).is_none(), "not the whole pair");

        assert!(all.insert(0, suspension(3, Scope { source: Some(5), ..Scope::default() }, 100)));
        assert!(
            all.find(0, 5, to(&google), flow("t", "c")).is_some()
                && all.find(0, 5, to(&yahoo), flow("t", "c")).is_some()
        );
        let everywhere = Scope { tenant: Some("bad".into()), campaign: Some("x".into()), ..Scope::default() };
        assert!(all.insert(0, suspension(4, everywhere, 100)));
        assert!(
            all.find(0, 9, to(&google), flow("bad", "x")).is_some()
                && all.find(0, 9, to(&google), flow("bad", "y")).is_none()
        );
    }

    #[test]
    fn one_suspension_a_scope_and_the_longest_is_told() {
        let google: Arc<str> = "google".into();
        let pair = pair_of(1, &google);
        let mut all = Suspensions::default();
        assert!(all.insert(0, suspension(1, Scope::pair(&pair), 100)));
        assert!(!all.insert(50, suspension(2, Scope::pair(&pair), 150)), "it goes on");
        assert_eq!((all.len(), all.of_pair(120, &pair).map(|found| found.id)), (1, Some(2)));
        assert!(all.insert(200, suspension(3, Scope::pair(&pair), 300)), "the one before was over");
        assert!(all.insert(200, suspension(4, Scope { source: Some(1), ..Scope::default() }, 400)));
        assert_eq!(all.find(200, 1, to(&google), flow("", "")).map(|found| found.id), Some(4));
        assert_eq!(all.remove(4).map(|found| found.id), Some(4));
        assert!(all.remove(4).is_none());
        all.expire(300);
        assert!(all.is_empty() && all.iter().next().is_none());
    }

    /// `queue list` shows a provider's sites, and who copies a name from there means it.
    #[test]
    fn a_providers_site_is_stopped_by_its_own_name() {
        let (google, one, other): (Arc<str>, Arc<str>, Arc<str>) =
            ("google".into(), "mx.one".into(), "mx.other".into());
        let pair = |site: &Arc<str>| PairKey { source: 1, rollup: Arc::clone(&google), site: Arc::clone(site) };
        for source in [Some(1), None] {
            let scope = Scope { source, rollup: Some(Arc::clone(&one)), ..Scope::default() };
            assert!(scope.covers_pair(&pair(&one)) && !scope.covers_pair(&pair(&other)));
            let mut all = Suspensions::default();
            assert!(all.insert(0, suspension(1, scope, 100)));
            assert_eq!(all.of_pair(0, &pair(&one)).map(|found| found.id), Some(1));
            assert!(all.of_pair(0, &pair(&other)).is_none());
            let found = |site| all.find(0, 1, Destination { rollup: &google, site }, flow("t", "c")).is_some();
            assert!(found(&one) && !found(&other));
        }
    }

    /// What stops one tenant does not stand in for what stops another, or all, at the same place.
    #[test]
    fn suspensions_of_one_place_stand_beside_one_another() {
        let google: Arc<str> = "google".into();
        let of = |tenant: Option<&str>| Scope { tenant: tenant.map(Arc::from), ..Scope::pair(&pair_of(1, &google)) };
        let mut all = Suspensions::default();
        for (id, tenant) in [(1, Some("a")), (2, Some("b")), (3, None)] {
            assert!(all.insert(0, suspension(id, of(tenant), 100 * id as u64)));
        }
        let found = |all: &Suspensions, now_ms, tenant| {
            all.find(now_ms, 1, to(&google), flow(tenant, "")).map(|found| found.id)
        };
        assert_eq!(["a", "b", "c"].map(|tenant| found(&all, 0, tenant)), [Some(3); 3]);
        assert!(all.remove(3).is_some());
        assert_eq!(["a", "b", "c"].map(|tenant| found(&all, 0, tenant)), [Some(1), Some(2), None]);
        assert_eq!(["a", "b"].map(|tenant| found(&all, 100, tenant)), [None, Some(2)]);
    }

    /// However many there are, only those are looked at that may be about the flow.
    #[test]
    fn many_suspensions_cost_a_message_nothing() {
        let google: Arc<str> = "google".into();
        let of = |number: usize| Scope { domain: Some(format!("d{number}.example").into()), ..Scope::default() };
        let mut all = Suspensions::default();
        for number in 0..SUSPENSIONS_MAX {
            assert!(all.insert(0, suspension(number as u128, of(number), 100)));
        }
        assert!(!all.insert(0, suspension(0, of(SUSPENSIONS_MAX), 100)), "there are no more than that");
        let looked_at = |domain| all.at(0, 1, to(&google), Some(Flow { domain, ..flow("t", "c") })).len();
        assert_eq!(["d7.example", "d.example"].map(looked_at), [1, 0]);
        assert_eq!((all.at(0, 1, to(&google), None).len(), all.shapes.len()), (0, 1));
        assert!(all.by_parts.values().all(|here| here.len() == 1), "sums differ");
    }

    #[test]
    fn limits_stop_nothing_and_the_stricter_holds() {
        let google: Arc<str> = "google".into();
        let pair = pair_of(1, &google);
        let limit = |id, connections, deliveries, until_ms| {
            let settings = LimitSettings {
                connection_limit: connections,
                max_deliveries_per_connection: deliveries,
                max_message_rate: None,
            };
            let effect = Effect::Limit(Limited { settings, recovery: None });
            Suspension { effect, ..suspension(id, Scope::pair(&pair), until_ms) }
        };
        let mut all = Suspensions::default();
        assert!(all.insert(0, limit(1, Some(3), None, 100)));
        assert!(all.insert(0, limit(2, Some(2), Some(9), 50)), "of another kind");
        assert!(!all.insert(0, limit(3, Some(4), None, 100)), "in the first one's place");
        assert!(all.find(0, 1, to(&google), flow("t", "c")).is_none() && all.of_pair(0, &pair).is_none());
        let at = |now_ms| all.limits(now_ms).get(&(1, Arc::clone(&google))).map(|limits| limits.settings);
        let (first, later) = (at(0).unwrap(), at(50).unwrap());
        assert_eq!((first.connection_limit, first.max_deliveries_per_connection), (Some(2), Some(9)));
        assert_eq!((later.connection_limit, later.max_deliveries_per_connection), (Some(4), None));
        assert_eq!(at(100), None);
        assert!(all.insert(0, suspension(4, Scope::pair(&pair), 100)), "and a stop is something else");
        assert_eq!(all.of_pair(0, &pair).map(|found| found.id), Some(4));
    }

    #[test]
    fn there_are_only_so_many() {
        let mut all = Suspensions::default();
        for number in 0..SUSPENSIONS_MAX {
            let pair = pair_of(0, &number.to_string().into());
            assert!(all.insert(0, suspension(number as u128, Scope::pair(&pair), 100)));
        }
        let scope = Scope { source: Some(1), ..Scope::default() };
        assert!(!all.insert(0, suspension(0, scope.clone(), 100)), "full");
        assert!(all.insert(100, suspension(0, scope, 200)), "all others are over");
        assert_eq!(all.len(), 1);
    }
}
