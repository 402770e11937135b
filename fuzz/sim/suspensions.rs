//! What automation rules have put in force, as it shows outside: nothing is begun of what is suspended, and what rules
//! have limited stays within that. It counts from the end of the turn in which the shard heard of it on: what was begun
//! before comes to its end.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use postrider::config::{AutomationAction, AutomationRule, LimitSettings};
use postrider::limits::SOURCE_REFUSED_PAUSE;
use postrider::pool::suspension::{Effect, Scope, Suspension};

use crate::checker::{Sent, domain_of};
use crate::clock::{MS, Micros, SECOND};
use crate::warmup::DAY_MS;

/// Of one life.
#[derive(Debug, Default)]
pub(crate) struct InForce {
    /// By shard.
    known: Vec<Vec<Known>>,
    /// Told in a turn that is not over.
    coming: Vec<(usize, Suspension)>,
    /// When transactions were begun lately, by source and site.
    begun: BTreeMap<(usize, String), VecDeque<Micros>>,
}

#[derive(Debug, Clone)]
struct Known {
    suspension: Suspension,
    since: Micros,
}

/// What is about to be begun, and where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Begun<'a> {
    pub(crate) shard: usize,
    pub(crate) source: usize,
    pub(crate) site: &'a str,
    /// What rolls it up; itself, where no provider does.
    pub(crate) rollup: &'a str,
    pub(crate) at: Micros,
    pub(crate) now_ms: u64,
}

impl InForce {
    /// What was begun in the lives before is remembered.
    pub(crate) fn begin_life(&mut self, shards: usize, all: &[Suspension], now: Micros, now_ms: u64) {
        self.known = vec![Vec::new(); shards];
        self.coming.clear();
        for suspension in all {
            (0..shards).for_each(|shard| self.put(shard, suspension, now, now_ms));
        }
    }

    /// The shard hears of it in this turn.
    pub(crate) fn tell(&mut self, shard: usize, suspension: &Suspension) {
        self.coming.push((shard, suspension.clone()));
    }

    /// It has ended before its time.
    pub(crate) fn forget(&mut self, shard: usize, id: u128) {
        self.known[shard].retain(|known| known.suspension.id != id);
    }

    /// A shard has ended its turn. What was over by then is, also where the wall clock is set back behind it.
    pub(crate) fn end_turn(&mut self, shard: usize, now: Micros, now_ms: u64) {
        self.known[shard].retain(|known| known.suspension.until_ms > now_ms);
        if self.coming.iter().any(|(to, _)| *to == shard) {
            let (told, rest): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.coming).into_iter().partition(|it| it.0 == shard);
            self.coming = rest;
            told.iter().for_each(|(_, suspension)| self.put(shard, suspension, now, now_ms));
        }
    }

    /// The wall clock is set back. Shards know of it within a second; what ends meanwhile may be over for them.
    pub(crate) fn set_back(&mut self, before_ms: u64) {
        self.known.iter_mut().for_each(|known| known.retain(|it| it.suspension.until_ms > before_ms + SECOND / MS));
    }

    fn put(&mut self, shard: usize, suspension: &Suspension, now: Micros, now_ms: u64) {
        let here = &mut self.known[shard];
        let is_like =
            |known: &Known| known.suspension.scope == suspension.scope && kind(&known.suspension) == kind(suspension);
        let before = here.iter().position(is_like).map(|place| here.swap_remove(place));
        let is_same =
            |known: &Known| known.suspension.effect == suspension.effect && known.suspension.until_ms > now_ms;
        let goes_on = before.filter(is_same);
        let since = goes_on.map_or(now, |known| known.since);
        here.push(Known { suspension: suspension.clone(), since });
    }

    /// SUSPENDED, LIMITS-HOLD: a connection is made, with which there are so many.
    pub(crate) fn check_connection(&self, begun: Begun<'_>, open: usize) {
        for Known { suspension, .. } in self.at(begun) {
            let is_stop = suspension.effect == Effect::Stop && suspension.scope.is_whole();
            assert!(!is_stop, "SUSPENDED: a connection, {begun:?}, although {suspension:?}");
            let limit = settings(suspension, begun.now_ms).and_then(|settings| settings.connection_limit);
            let is_within = limit.is_none_or(|limit| open <= limit as usize);
            assert!(is_within, "LIMITS-HOLD: {open} connections, {begun:?}, although {suspension:?}");
        }
    }

    /// The same where a transaction is begun.
    pub(crate) fn check_transaction(&mut self, begun: Begun<'_>, sent: &Sent) {
        let times = self.begun.entry((begun.source, begun.site.to_owned())).or_default();
        times.push_back(begun.at);
        while times.front().is_some_and(|first| first + REMEMBERED < begun.at) {
            times.pop_front();
        }
        let times = &self.begun[&(begun.source, begun.site.to_owned())];
        for Known { suspension, .. } in self.at(begun) {
            let is_meant = |field: &str, part: &Option<Arc<str>>| {
                part.as_ref().is_none_or(|name| steered(sent, field).unwrap_or_default() == &**name)
            };
            let scope = &suspension.scope;
            let is_of_domain = |domain: &str| sent.recipients.iter().all(|it| domain_of(it) == domain);
            let is_meant = is_meant("X-Tenant", &scope.tenant)
                && is_meant("X-Campaign", &scope.campaign)
                && scope.domain.as_deref().is_none_or(is_of_domain);
            let is_stop = suspension.effect == Effect::Stop && is_meant;
            assert!(!is_stop, "SUSPENDED: {} was begun, {begun:?}, although {suspension:?}", sent.reverse_path);
            let rate = settings(suspension, begun.now_ms).and_then(|settings| settings.max_message_rate);
            let (Some(rate), Some(since)) = (rate, self.everywhere_since(suspension)) else { continue };
            // What was begun in the turn that brought it is from before.
            let since = (since + 1).max((begun.at + 1).saturating_sub(rate.period.as_micros() as Micros));
            let lately = times.iter().rev().take_while(|at| **at >= since).count();
            assert!(lately <= rate.count as usize, "LIMITS-HOLD: {lately} since {since}, {begun:?}, {suspension:?}");
        }
    }

    fn at(&self, begun: Begun<'_>) -> impl Iterator<Item = &Known> {
        self.known[begun.shard].iter().filter(move |Known { suspension, .. }| {
            let scope = &suspension.scope;
            suspension.until_ms > begun.now_ms
                && scope.source.is_none_or(|source| source == begun.source)
                && scope.rollup.as_ref().is_none_or(|name| **name == *begun.site || **name == *begun.rollup)
        })
    }

    /// Since when all shards have known it: a pair may have come from another.
    fn everywhere_since(&self, suspension: &Suspension) -> Option<Micros> {
        let is_it =
            |known: &&Known| known.suspension.effect == suspension.effect && known.suspension.scope == suspension.scope;
        let since = |known: &Vec<Known>| Some(known.iter().find(is_it)?.since);
        self.known.iter().map(since).try_fold(0, |latest, since| Some(since?.max(latest)))
    }
}

/// SUSPENDED: it lasts as long as whoever made it says.
pub(crate) fn check_made(suspension: &Suspension, rules: &[Arc<AutomationRule>], now_ms: u64) {
    let is_by = |rule: &&Arc<AutomationRule>| suspension.reason.starts_with(&format!("{}: ", rule.name));
    let rule = rules.iter().find(is_by);
    if let Some(rule) = rule {
        let Scope { source, rollup, tenant, campaign, domain } = &suspension.scope;
        let [source, rollup] = [source.is_some(), rollup.is_some()];
        let named = [source, rollup, tenant.is_some(), campaign.is_some(), domain.is_some()];
        let wanted = match rule.action {
            AutomationAction::SuspendSource => [true, false, false, false, false],
            AutomationAction::SuspendTenant => [true, true, true, false, false],
            AutomationAction::SuspendCampaign => [true, true, true, true, false],
            _ => [true, true, false, false, false],
        };
        assert_eq!(named, wanted, "SUSPENDED: source, roll-up, tenant, campaign, domain of {suspension:?}");
    }
    let lasts = match rule {
        // One that climbs back lasts as many steps as that takes.
        Some(rule) if matches!(rule.action, AutomationAction::Halve(_)) => return,
        Some(rule) => rule.duration,
        None if suspension.reason.starts_with("warm-up: ") => Duration::from_millis(DAY_MS - now_ms % DAY_MS),
        None => SOURCE_REFUSED_PAUSE,
    };
    assert_eq!(
        suspension.until_ms,
        now_ms + lasts.as_millis() as u64,
        "SUSPENDED: {suspension:?} is to last {lasts:?}"
    );
}

/// What a field says to the engine.
fn steered<'a>(sent: &'a Sent, field: &str) -> Option<&'a str> {
    sent.steering.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(": "))
}

/// Those of one kind stand in for each other: a stop, and limits of the same things.
fn kind(suspension: &Suspension) -> Option<(bool, [bool; 3])> {
    let Effect::Limit(limited) = &suspension.effect else { return None };
    let LimitSettings { connection_limit, max_deliveries_per_connection, max_message_rate } = limited.settings;
    let settings = [connection_limit.is_some(), max_deliveries_per_connection.is_some(), max_message_rate.is_some()];
    Some((limited.recovery.is_some(), settings))
}

fn settings(suspension: &Suspension, now_ms: u64) -> Option<LimitSettings> {
    match &suspension.effect {
        Effect::Limit(limited) => Some(limited.at(now_ms)),
        Effect::Stop => None,
    }
}

/// No period that a rule sets is longer.
const REMEMBERED: Micros = 120_000 * MS;
