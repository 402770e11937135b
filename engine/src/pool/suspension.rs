//! What must not be sent for a while: suspensions, made by automation rules or by the operator.
//!
//! A suspension names what it stops by up to five parts; a part that it leaves out matches everything. Every shard has
//! all suspensions: a home leaves suspended sources out when it chooses one, an owner of a suspended pair starts
//! nothing. The control thread keeps the list on disk, so times are wall times.
//!
//! See also: `shard/suspend.rs` for who obeys them, `runtime/suspension_list.rs` for the file.

use std::collections::HashMap;
use std::sync::Arc;

use crate::handover::PairKey;
use crate::limits::SUSPENSIONS_MAX;

/// What a suspension stops.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Scope {
    /// Index into the configuration's egress sources.
    pub source: Option<usize>,
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

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspension {
    /// Random; shown as a UUID.
    pub id: u128,
    pub scope: Scope,
    /// The rule and the answer that it matched, or the operator's words.
    pub reason: Arc<str>,
    pub until_ms: u64,
}

/// Source and roll-up, as far as a scope names them.
type ScopePlace = (Option<usize>, Option<Arc<str>>);

/// All suspensions that are in force. One a scope.
#[derive(Debug, Clone, Default)]
pub struct Suspensions {
    by_place: HashMap<ScopePlace, Vec<Suspension>>,
    len: usize,
}

impl Scope {
    pub fn pair(pair: &PairKey) -> Self {
        Self { source: Some(pair.source), rollup: Some(Arc::clone(&pair.rollup)), ..Self::default() }
    }

    /// Whether it stops everything at the pairs that it covers, and not only some flows.
    pub fn is_whole(&self) -> bool {
        self.tenant.is_none() && self.campaign.is_none() && self.domain.is_none()
    }

    pub fn covers_pair(&self, pair: &PairKey) -> bool {
        self.source.is_none_or(|source| source == pair.source)
            && self.rollup.as_ref().is_none_or(|rollup| *rollup == pair.rollup)
    }

    pub fn covers_flow(&self, flow: Flow<'_>) -> bool {
        let fits = |part: &Option<Arc<str>>, name: &str| part.as_ref().is_none_or(|part| **part == *name);
        fits(&self.tenant, flow.tenant) && fits(&self.campaign, flow.campaign) && fits(&self.domain, flow.domain)
    }
}

impl Suspension {
    /// As it stands in `blocked_by`, where the time follows.
    pub fn blocked_by(&self) -> Arc<str> {
        format!("suspended: {}", self.reason).into()
    }
}

impl Suspensions {
    /// Puts a suspension in force in place of the one with the same scope. False: there was one already, and it goes
    /// on; or there are too many.
    pub fn insert(&mut self, now_ms: u64, suspension: Suspension) -> bool {
        if self.len >= SUSPENSIONS_MAX {
            self.expire(now_ms);
        }
        let place = (suspension.scope.source, suspension.scope.rollup.clone());
        let here = self.by_place.entry(place).or_default();
        if let Some(present) = here.iter_mut().find(|present| present.scope == suspension.scope) {
            let is_new = present.until_ms <= now_ms;
            *present = suspension;
            return is_new;
        }
        if self.len >= SUSPENSIONS_MAX {
            return false;
        }
        here.push(suspension);
        self.len += 1;
        true
    }

    /// What stops a flow at a source and a roll-up; the one that lasts longest.
    pub fn find(&self, now_ms: u64, source: usize, rollup: &Arc<str>, flow: Flow<'_>) -> Option<&Suspension> {
        let here = self.at(now_ms, source, rollup);
        here.filter(|suspension| suspension.scope.covers_flow(flow)).max_by_key(|suspension| suspension.until_ms)
    }

    /// What stops everything at a pair.
    pub fn of_pair(&self, now_ms: u64, pair: &PairKey) -> Option<&Suspension> {
        let here = self.at(now_ms, pair.source, &pair.rollup);
        here.filter(|suspension| suspension.scope.is_whole()).max_by_key(|suspension| suspension.until_ms)
    }

    /// The suspension in force with just this scope.
    pub fn of_scope(&self, now_ms: u64, scope: &Scope) -> Option<&Suspension> {
        let here = self.by_place.get(&(scope.source, scope.rollup.clone()))?;
        here.iter().find(|suspension| suspension.until_ms > now_ms && suspension.scope == *scope)
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
        self.by_place.values().flatten()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn at(&self, now_ms: u64, source: usize, rollup: &Arc<str>) -> impl Iterator<Item = &Suspension> {
        let all = [(Some(source), Some(rollup)), (Some(source), None), (None, Some(rollup)), (None, None)];
        // Nearly always there is none.
        let places = if self.len == 0 { &[][..] } else { &all[..] };
        let here = places.iter().filter_map(|&(source, rollup)| self.by_place.get(&(source, rollup.cloned())));
        here.flatten().filter(move |suspension| suspension.until_ms > now_ms).collect::<Vec<_>>().into_iter()
    }

    fn retain(&mut self, mut keep: impl FnMut(&Suspension) -> bool) {
        self.by_place.retain(|_, here| {
            here.retain(&mut keep);
            !here.is_empty()
        });
        self.len = self.by_place.values().map(Vec::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspension(id: u128, scope: Scope, until_ms: u64) -> Suspension {
        Suspension { id, scope, reason: "because".into(), until_ms }
    }

    fn pair_of(source: usize, rollup: &Arc<str>) -> PairKey {
        PairKey { source, rollup: Arc::clone(rollup), site: "mx.example".into() }
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
        assert!(all.find(0, 1, &google, flow("t", "c")).is_some());
        assert!(all.find(0, 2, &google, flow("t", "c")).is_none(), "another source");
        assert!(all.find(0, 1, &yahoo, flow("t", "c")).is_none(), "another roll-up");
        assert!(all.find(100, 1, &google, flow("t", "c")).is_none(), "it is over");
        assert_eq!(all.of_pair(0, &pair).map(|found| found.id), Some(1));

        let tenant = Scope { tenant: Some("acme".into()), ..Scope::pair(&pair_of(2, &yahoo)) };
        assert!(all.insert(0, suspension(2, tenant, 100)));
        assert!(all.find(0, 2, &yahoo, flow("acme", "any")).is_some());
        assert!(all.find(0, 2, &yahoo, flow("other", "any")).is_none());
        assert!(all.of_pair(0, &pair_of(2, &yahoo)).is_none(), "not the whole pair");

        assert!(all.insert(0, suspension(3, Scope { source: Some(5), ..Scope::default() }, 100)));
        assert!(all.find(0, 5, &google, flow("t", "c")).is_some() && all.find(0, 5, &yahoo, flow("t", "c")).is_some());
        let everywhere = Scope { tenant: Some("bad".into()), campaign: Some("x".into()), ..Scope::default() };
        assert!(all.insert(0, suspension(4, everywhere, 100)));
        assert!(
            all.find(0, 9, &google, flow("bad", "x")).is_some() && all.find(0, 9, &google, flow("bad", "y")).is_none()
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
        assert_eq!(all.find(200, 1, &google, flow("", "")).map(|found| found.id), Some(4));
        assert_eq!(all.remove(4).map(|found| found.id), Some(4));
        assert!(all.remove(4).is_none());
        all.expire(300);
        assert!(all.is_empty() && all.iter().next().is_none());
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
