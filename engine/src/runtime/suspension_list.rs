//! The list of suspensions that the control thread keeps, and the file that carries it over a restart.
//!
//! `suspensions.json` in the spool's directory names sources by their names, because a changed configuration may number
//! them anew. What names a source that is no longer there is dropped at a start.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state_file::StateFile;
use crate::config::{Config, EgressSource, LimitSettings, Rate};
use crate::pool::automation::{Limited, Recovery};
use crate::pool::suspension::{Effect, Scope, Suspension, Suspensions};
use crate::pool::warmup::{DAY_MS, spent_quota};

pub(crate) struct SuspensionList {
    list: Suspensions,
    file: StateFile,
    /// The names of the configuration's egress sources.
    sources: Vec<String>,
    /// The file doesn't have what the list has.
    changed: bool,
}

/// A suspension with names.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rollup: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    campaign: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
    /// None: nothing is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    limits: Option<StoredLimits>,
    reason: String,
    until_ms: u64,
}

/// What a rule has put in force beside the configured limits.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredLimits {
    connection_limit: Option<u32>,
    max_deliveries_per_connection: Option<u32>,
    /// Recipients, milliseconds, burst.
    max_message_rate: Option<(u32, u64, u32)>,
    /// Since when it climbs back, milliseconds of a step, connections and recipients of a step.
    recovery: Option<(u64, u64, u32, u32)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredList {
    version: u32,
    suspensions: Vec<Stored>,
}

impl SuspensionList {
    /// Reads what an earlier run left. A file that can't be read is told of and replaced with the next change.
    pub(crate) fn open(directory: &Path, sources: &[EgressSource], now_ms: u64) -> Self {
        let file = StateFile::new(directory, "suspensions.json");
        let sources = sources.iter().map(|source| source.name.clone()).collect();
        let mut this = Self { list: Suspensions::default(), file, sources, changed: false };
        if let Err(error) = this.load(now_ms) {
            let path = this.file.path().display();
            tracing::error!(%path, error, "the suspensions of the last run can not be read; nothing is suspended");
        }
        this
    }

    /// Those of another configuration, by the indices that are known.
    pub(crate) fn set_sources(&mut self, sources: &[EgressSource]) {
        self.sources = sources.iter().map(|source| source.name.clone()).collect();
    }

    fn load(&mut self, now_ms: u64) -> Result<(), String> {
        let Some(bytes) = self.file.read().map_err(|error| error.to_string())? else { return Ok(()) };
        let stored: StoredList = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        if !(1..=VERSION).contains(&stored.version) {
            return Err(format!("its version is {}, not {VERSION}", stored.version));
        }
        for stored in stored.suspensions {
            let source = match &stored.source {
                None => None,
                Some(name) => match self.sources.iter().position(|source| source == name) {
                    Some(source) => Some(source),
                    None => {
                        tracing::info!(source = name, "a suspension of a source that is no longer there is dropped");
                        continue;
                    }
                },
            };
            let id = parse_id(&stored.id).ok_or_else(|| format!("{:?} is no id", stored.id))?;
            let Stored { rollup, tenant, campaign, domain, limits, reason, until_ms, .. } = stored;
            let effect = match limits {
                None => Effect::Stop,
                Some(limits) => Effect::Limit(limits.load()?),
            };
            let part = |part: Option<String>| part.map(|part| Arc::from(&*part));
            let (rollup, tenant, campaign, domain) = (part(rollup), part(tenant), part(campaign), part(domain));
            let scope = Scope { source, rollup, tenant, campaign, domain };
            if until_ms > now_ms {
                self.list.insert(now_ms, Suspension { id, scope, effect, reason: Arc::from(&*reason), until_ms });
            }
        }
        Ok(())
    }

    /// Puts a suspension in force and says it as all are to know it: one that goes on keeps its id. None: there are too
    /// many.
    pub(crate) fn insert(&mut self, now_ms: u64, mut suspension: Suspension) -> Option<Suspension> {
        let present = self.list.present(now_ms, &suspension);
        if let Some(present) = present {
            suspension.id = present.id;
        }
        if present.is_none_or(|present| present.effect != suspension.effect) {
            let what = self.describe(&suspension);
            let until = crate::admin::WallTime(suspension.until_ms);
            tracing::warn!(%until, reason = &*suspension.reason, "{what}");
        }
        self.list.insert(now_ms, suspension.clone());
        self.changed = true;
        self.list.present(now_ms, &suspension).is_some().then_some(suspension)
    }

    pub(crate) fn remove(&mut self, now_ms: u64, id: u128) -> bool {
        self.expire(now_ms);
        let Some(removed) = self.list.remove(id) else { return false };
        tracing::info!("no longer {}", self.describe(&removed));
        self.changed = true;
        true
    }

    /// Ends those of warm-up days that have another quota by now: whether it is used up is found out anew.
    pub(crate) fn end_other_quotas(&mut self, now_ms: u64, config: &Config) -> Vec<u128> {
        let is_another = |suspension: &&Suspension| {
            let Scope { source: Some(source), rollup: Some(rollup), tenant: None, campaign: None, domain: None } =
                &suspension.scope
            else {
                return false;
            };
            let Some(last_day) = (suspension.until_ms / DAY_MS).checked_sub(1) else { return false };
            let quota = config.warmup_of(*source).and_then(|warmup| warmup.quota(rollup, last_day));
            spent_quota(&suspension.reason).is_some_and(|spent| quota != Some(spent))
        };
        let ids: Vec<u128> = self.list.iter().filter(is_another).map(|suspension| suspension.id).collect();
        ids.into_iter().filter(|id| self.remove(now_ms, *id)).collect()
    }

    pub(crate) fn expire(&mut self, now_ms: u64) {
        for over in self.list.iter().filter(|it| it.until_ms <= now_ms) {
            tracing::info!("no longer {}", self.describe(over));
        }
        self.list.expire(now_ms);
        // The file may keep them: they are over for whoever reads it, too.
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Suspension> {
        self.list.iter()
    }

    /// The file and what it has to hold, where it doesn't yet.
    pub(crate) fn take_change(&mut self) -> Option<(StateFile, Vec<u8>)> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let mut suspensions: Vec<Stored> = self.list.iter().map(|suspension| self.store(suspension)).collect();
        suspensions.sort_by(|a, b| (a.until_ms, &a.id).cmp(&(b.until_ms, &b.id)));
        let bytes = serde_json::to_vec(&StoredList { version: VERSION, suspensions });
        Some((self.file.clone(), bytes.expect("names and numbers are JSON")))
    }

    /// What was taken could not be written.
    pub(crate) fn put_back_change(&mut self) {
        self.changed = true;
    }

    fn store(&self, suspension: &Suspension) -> Stored {
        let Suspension { id, scope, effect, reason, until_ms } = suspension.clone();
        let part = |part: Option<Arc<str>>| part.map(|part| part.to_string());
        Stored {
            id: id_text(id),
            source: scope.source.map(|source| self.sources[source].clone()),
            rollup: part(scope.rollup),
            tenant: part(scope.tenant),
            campaign: part(scope.campaign),
            domain: part(scope.domain),
            limits: match effect {
                Effect::Stop => None,
                Effect::Limit(limited) => Some(StoredLimits::new(limited)),
            },
            reason: reason.to_string(),
            until_ms,
        }
    }

    /// For the log: `suspended: source "ip-a", site "google"`.
    fn describe(&self, suspension: &Suspension) -> String {
        let scope = &suspension.scope;
        let source = scope.source.map(|source| format!("source {:?}", self.sources[source]));
        let part = |what: &str, name: &Option<Arc<str>>| name.as_ref().map(|name| format!("{what} {name:?}"));
        let parts = [
            source,
            part("site", &scope.rollup),
            part("tenant", &scope.tenant),
            part("campaign", &scope.campaign),
            part("domain", &scope.domain),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        let about = if parts.is_empty() { "everything".to_owned() } else { parts.join(", ") };
        match suspension.effect {
            Effect::Stop => format!("suspended: {about}"),
            Effect::Limit(limited) => format!("limited to {}: {about}", limited.settings),
        }
    }
}

impl StoredLimits {
    fn new(limited: Limited) -> Self {
        let LimitSettings { connection_limit, max_deliveries_per_connection, max_message_rate } = limited.settings;
        let rate = |rate: Rate| (rate.count, rate.period.as_millis() as u64, rate.max_burst);
        let recovery = |it: Recovery| (it.since_ms, it.step_ms, it.connections, it.recipients);
        Self {
            connection_limit,
            max_deliveries_per_connection,
            max_message_rate: max_message_rate.map(rate),
            recovery: limited.recovery.map(recovery),
        }
    }

    fn load(self) -> Result<Limited, String> {
        let Self { connection_limit, max_deliveries_per_connection, max_message_rate, recovery } = self;
        let is_null = |limit: Option<u32>| limit == Some(0);
        let rate_is_null =
            max_message_rate.is_some_and(|(count, period_ms, burst)| count == 0 || period_ms == 0 || burst == 0);
        if is_null(connection_limit) || is_null(max_deliveries_per_connection) || rate_is_null {
            return Err("a limit lets nothing pass".to_owned());
        }
        let rate = |(count, period_ms, max_burst)| Rate { count, period: Duration::from_millis(period_ms), max_burst };
        let max_message_rate = max_message_rate.map(rate);
        let settings = LimitSettings { connection_limit, max_deliveries_per_connection, max_message_rate };
        let recovery = recovery.map(|(since_ms, step_ms, connections, recipients)| Recovery {
            since_ms,
            step_ms,
            connections,
            recipients,
        });
        Ok(Limited { settings, recovery })
    }
}

/// As a UUID.
pub(crate) fn id_text(id: u128) -> String {
    crate::outcome::event::NodeId(id.to_be_bytes()).to_string()
}

pub(crate) fn parse_id(text: &str) -> Option<u128> {
    let parsed: crate::outcome::event::NodeId = text.parse().ok()?;
    Some(u128::from_be_bytes(parsed.0))
}

/// 2 has limits; without, it is as 1.
const VERSION: u32 = 2;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Warmup;
    use crate::pool::warmup::spent_reason;

    fn sources(names: &[&str]) -> Vec<EgressSource> {
        let source = |name: &&str| EgressSource {
            name: (*name).to_owned(),
            source_address: None,
            ehlo_domain: "mta.example".to_owned(),
            suspend_when_unplumbed: true,
            is_retired: false,
        };
        names.iter().map(source).collect()
    }

    fn suspension(id: u128, scope: Scope, until_ms: u64) -> Suspension {
        Suspension { id, scope, effect: Effect::Stop, reason: "421 4.7.0 \"later\"".into(), until_ms }
    }

    fn save(list: &mut SuspensionList) {
        let (file, bytes) = list.take_change().expect("it has changed");
        file.replace(&bytes).unwrap();
        assert!(list.take_change().is_none());
    }

    #[test]
    fn suspensions_survive_a_restart_and_a_new_order_of_sources() {
        let directory = tempfile::tempdir().unwrap();
        let mut list = SuspensionList::open(directory.path(), &sources(&["a", "b"]), 0);
        let pair = Scope { source: Some(1), rollup: Some("google".into()), ..Scope::default() };
        let tenant = Scope { tenant: Some("acme".into()), domain: Some("d.example".into()), ..pair.clone() };
        assert!(list.insert(0, suspension(7, pair.clone(), 1_000)).is_some());
        assert!(list.insert(0, suspension(8, tenant.clone(), 2_000)).is_some());
        assert!(list.insert(0, suspension(9, Scope { source: Some(0), ..Scope::default() }, 3_000)).is_some());
        save(&mut list);

        let list = SuspensionList::open(directory.path(), &sources(&["b", "c"]), 1_500);
        let moved = Scope { source: Some(0), ..tenant };
        let found: Vec<Suspension> = list.iter().cloned().collect();
        assert_eq!(found, [suspension(8, moved, 2_000)], "one is over, one has lost its source");
    }

    #[test]
    fn a_day_with_another_quota_is_not_used_up() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = Config::new("mta.example.com");
        config.egress_sources = sources(&["a", "b"]);
        let warmup = |source, today| Warmup {
            source,
            start_day: 9,
            daily: BTreeMap::from([("google".to_owned(), vec![10, today])]),
            default: Some(vec![5, 50]),
        };
        config.warmups = vec![warmup(0, 20)];
        let pair =
            |source, rollup: &str| Scope { source: Some(source), rollup: Some(rollup.into()), ..Scope::default() };
        let day = |id, scope, quota: u32| Suspension {
            reason: spent_reason(quota).into(),
            ..suspension(id, scope, 11 * DAY_MS)
        };
        let mut list = SuspensionList::open(directory.path(), &config.egress_sources, 0);
        for suspension in [
            day(1, pair(0, "google"), 20),
            day(2, pair(0, "mx.example"), 50),
            day(3, pair(1, "google"), 20),
            suspension(4, pair(1, "yahoo"), 11 * DAY_MS),
        ] {
            list.insert(0, suspension);
        }
        assert_eq!(list.end_other_quotas(0, &config), [3], "that source has no warm-up any more");
        config.warmups = vec![warmup(0, 30), warmup(1, 20)];
        assert_eq!(list.end_other_quotas(0, &config), [1], "there are ten more");
        config.warmups.clear();
        assert_eq!(list.end_other_quotas(0, &config), [2]);
        assert_eq!(list.iter().map(|left| left.id).collect::<Vec<_>>(), [4], "a rule's stays");
    }

    #[test]
    fn limits_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let mut list = SuspensionList::open(directory.path(), &sources(&["a"]), 0);
        let rate = Rate { count: 30, period: Duration::from_secs(60), max_burst: 2 };
        let settings = LimitSettings { connection_limit: Some(3), max_message_rate: Some(rate), ..Default::default() };
        let recovery = Some(Recovery { since_ms: 5, step_ms: 60_000, connections: 1, recipients: 10 });
        let scope = Scope { source: Some(0), rollup: Some("google".into()), ..Scope::default() };
        let effect = Effect::Limit(Limited { settings, recovery });
        let limited = Suspension { effect, ..suspension(7, scope.clone(), 1_000) };
        assert!(list.insert(0, limited.clone()).is_some());
        assert!(list.insert(0, suspension(8, scope, 1_000)).is_some(), "it is another");
        save(&mut list);
        let list = SuspensionList::open(directory.path(), &sources(&["a"]), 500);
        assert_eq!(list.iter().count(), 2);
        assert_eq!(list.iter().find(|it| it.id == 7), Some(&limited));
    }

    #[test]
    fn what_goes_on_keeps_its_id() {
        let directory = tempfile::tempdir().unwrap();
        let mut list = SuspensionList::open(directory.path(), &sources(&["a"]), 0);
        let scope = Scope { source: Some(0), ..Scope::default() };
        assert_eq!(list.insert(0, suspension(1, scope.clone(), 1_000)).map(|it| it.id), Some(1));
        let longer = list.insert(500, suspension(2, scope.clone(), 1_500)).unwrap();
        assert_eq!((longer.id, longer.until_ms), (1, 1_500));
        assert!(!list.remove(600, 2) && list.remove(600, 1));
        assert_eq!(list.insert(700, suspension(3, scope, 2_000)).map(|it| it.id), Some(3));
        assert!(!list.remove(2_000, 3), "it is over");
    }

    #[test]
    fn a_damaged_file_stops_nothing() {
        let directory = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"version\":3,\"suspensions\":[]}", "{\"version\":1,\"suspensions\":[{\"id\":\"x\"}]}"]
        {
            std::fs::write(directory.path().join("suspensions.json"), text).unwrap();
            let mut list = SuspensionList::open(directory.path(), &sources(&["a"]), 0);
            assert!(list.iter().next().is_none());
            let scope = Scope { source: Some(0), ..Scope::default() };
            list.insert(0, suspension(1, scope, 1_000));
            save(&mut list);
            assert_eq!(SuspensionList::open(directory.path(), &sources(&["a"]), 0).iter().count(), 1);
        }
    }

    #[test]
    fn ids_are_uuids() {
        let text = id_text(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        assert_eq!(text, "01234567-89ab-cdef-0123-456789abcdef");
        assert_eq!(parse_id(&text), Some(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef));
        assert_eq!(parse_id("x"), None);
    }
}
