//! What a pair's owner makes of its peer's answers: which rules fire, and which limits they change.
//!
//! The owner shows every answer that isn't a success to [`Automation::handle_answer`], with the rules that hold there;
//! what fires is carried out by the shard, because it reaches beyond the pair (`suspension.rs`, a queue).
//!
//! Thresholds are sliding windows in monotonic time: a rule "3/min" fires when the third answer of any 60 s comes, and
//! then counts anew. What they remember is bounded and not kept over a restart; what fired is.
//!
//! See also: `config/automation.rs` for the rules, `engine/rules/providers.toml` for those shipped.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ahash::HashMap;

use super::suspension::Flow;
use crate::config::{AutomationAction, AutomationRule, HalvedLimits, LimitSettings, Rate, Threshold};
use crate::handover::{CountsAs, PairKey, RollupKey};
use crate::limits::{AUTOMATION_WINDOWS_MAX, HALVE_PAUSE};

/// The answers that rules with a threshold have seen lately.
#[derive(Debug, Default)]
pub struct Automation {
    windows: HashMap<WindowKey, Window>,
}

/// What one rule has seen somewhere.
#[derive(Debug)]
pub(crate) struct Counted {
    key: WindowKey,
    window: Window,
}

/// A rule counts for each source and roll-up; one about a tenant, a campaign or a queue for each of those.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct WindowKey {
    rule: Arc<str>,
    source: usize,
    rollup: Arc<str>,
    /// Tenant, campaign and domain, as far as the rule is about them.
    flow: [String; 3],
}

#[derive(Debug, Default)]
struct Window {
    length: Duration,
    seen: VecDeque<Duration>,
}

impl Automation {
    /// The rules that fire on this answer, which is "CODE X.Y.Z text". Without a flow it came before any transaction.
    pub fn handle_answer(
        &mut self,
        now: Duration,
        rules: &[Arc<AutomationRule>],
        pair: &PairKey,
        flow: Option<Flow<'_>>,
        answer: &str,
    ) -> Vec<Arc<AutomationRule>> {
        let mut fired = Vec::new();
        for rule in rules {
            let Some(counted) = counted(rule.action, flow) else { continue };
            if !rule.when.is_match(answer) {
                continue;
            }
            if let Some(threshold) = rule.threshold {
                let (rule, rollup) = (Arc::clone(&rule.name), Arc::clone(&pair.rollup));
                let flow = counted.map(str::to_owned);
                if !self.count(now, WindowKey { rule, source: pair.source, rollup, flow }, threshold) {
                    continue;
                }
            }
            fired.push(Arc::clone(rule));
        }
        fired
    }

    /// Forgets what rules have seen at a roll-up, and returns it.
    pub(crate) fn take_out(&mut self, rollup: &RollupKey) -> Vec<Counted> {
        let is_of = |key: &WindowKey| key.source == rollup.source && key.rollup == rollup.rollup;
        let taken = self.windows.extract_if(|key, _| is_of(key));
        taken.map(|(key, window)| Counted { key, window }).collect()
    }

    /// What rules have seen at another shard.
    pub(crate) fn put(&mut self, now: Duration, counted: Vec<Counted>) {
        for Counted { key, window } in counted {
            self.make_room(now, &key);
            self.windows.insert(key, window);
        }
    }

    fn make_room(&mut self, now: Duration, key: &WindowKey) {
        if self.windows.len() >= AUTOMATION_WINDOWS_MAX && !self.windows.contains_key(key) {
            self.windows.retain(|_, window| window.seen.back().is_some_and(|last| now < *last + window.length));
            if self.windows.len() >= AUTOMATION_WINDOWS_MAX {
                // So many at once tell of trouble that no single one of them will end.
                self.windows.clear();
            }
        }
    }

    /// Whether the answer fills the window.
    fn count(&mut self, now: Duration, key: WindowKey, threshold: Threshold) -> bool {
        self.make_room(now, &key);
        let window = self.windows.entry(key).or_default();
        window.length = threshold.window;
        while window.seen.front().is_some_and(|first| now >= *first + threshold.window) {
            window.seen.pop_front();
        }
        window.seen.push_back(now);
        let is_full = window.seen.len() >= threshold.count as usize;
        if is_full {
            window.seen.clear();
        }
        is_full
    }
}

/// What the first rule that says so makes of an answer.
pub fn counts_as(rules: &[Arc<AutomationRule>], answer: &str) -> Option<CountsAs> {
    rules.iter().find_map(|rule| {
        let counts_as = match rule.action {
            AutomationAction::Defer => CountsAs::Transient,
            AutomationAction::Fail => CountsAs::Permanent,
            _ => return None,
        };
        rule.when.is_match(answer).then_some(counts_as)
    })
}

/// Whose answers a rule counts together; None where the action has no meaning for this answer.
fn counted<'a>(action: AutomationAction, flow: Option<Flow<'a>>) -> Option<[&'a str; 3]> {
    match action {
        AutomationAction::Suspend
        | AutomationAction::SuspendSource
        | AutomationAction::Set(_)
        | AutomationAction::Halve(_) => Some(["", "", ""]),
        AutomationAction::SuspendTenant => flow.map(|flow| [flow.tenant, "", ""]),
        AutomationAction::SuspendCampaign => flow.map(|flow| [flow.tenant, flow.campaign, ""]),
        AutomationAction::BounceQueue => flow.map(|flow| [flow.tenant, flow.campaign, flow.domain]),
        AutomationAction::Defer | AutomationAction::Fail => None,
    }
}

/// Limits that a rule has put beside those configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limited {
    /// As they were set; [`Self::at`] is what they are now.
    pub settings: LimitSettings,
    pub recovery: Option<Recovery>,
}

/// How limits climb back: so much with each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery {
    pub since_ms: u64,
    pub step_ms: u64,
    pub connections: u32,
    pub recipients: u32,
}

impl Limited {
    /// Halves what holds now of what is configured, and with it how long it takes to climb back. None: there is nothing
    /// to halve, or it was done just now.
    pub fn halved(
        now_ms: u64,
        limits: HalvedLimits,
        step: Duration,
        configured: LimitSettings,
        present: Option<&Self>,
    ) -> Option<(Self, Duration)> {
        // Answers to what was under way when the limits were halved say nothing new.
        let since = present.and_then(|present| present.recovery).map(|recovery| recovery.since_ms);
        if since.is_some_and(|since_ms| now_ms < since_ms + HALVE_PAUSE.as_millis() as u64) {
            return None;
        }
        let now = present.map_or(configured, |present| present.at(now_ms).stricter(configured));
        let mut settings = LimitSettings::default();
        let mut recovery =
            Recovery { since_ms: now_ms, step_ms: step.as_millis() as u64, connections: 0, recipients: 0 };
        let mut steps = 0;
        if let (true, Some(whole), Some(limit)) =
            (limits.connection_limit, configured.connection_limit, now.connection_limit)
        {
            let half = (limit / 2).max(1);
            recovery.connections = whole.div_ceil(STEPS);
            steps = steps.max(whole.saturating_sub(half).div_ceil(recovery.connections));
            settings.connection_limit = Some(half);
        }
        if let (true, Some(whole), Some(rate)) =
            (limits.max_message_rate, configured.max_message_rate, now.max_message_rate)
        {
            let half = (rate.count / 2).max(1);
            recovery.recipients = whole.count.div_ceil(STEPS);
            steps = steps.max(whole.count.saturating_sub(half).div_ceil(recovery.recipients));
            settings.max_message_rate = Some(with_count(rate, half));
        }
        let lasts = step * steps;
        (settings != LimitSettings::default()).then_some((Self { settings, recovery: Some(recovery) }, lasts))
    }

    pub fn at(&self, now_ms: u64) -> LimitSettings {
        let mut settings = self.settings;
        let Some(Recovery { since_ms, step_ms, connections, recipients }) = self.recovery else { return settings };
        let steps = u32::try_from(now_ms.saturating_sub(since_ms) / step_ms.max(1)).unwrap_or(u32::MAX);
        let climbed = |from: u32, by: u32| from.saturating_add(by.saturating_mul(steps));
        settings.connection_limit = settings.connection_limit.map(|limit| climbed(limit, connections));
        settings.max_message_rate =
            settings.max_message_rate.map(|rate| with_count(rate, climbed(rate.count, recipients)));
        settings
    }

    /// Whether it is what came of halving these.
    pub fn is_of(&self, halved: HalvedLimits) -> bool {
        self.recovery.is_some()
            && (halved.connection_limit || self.settings.connection_limit.is_none())
            && (halved.max_message_rate || self.settings.max_message_rate.is_none())
    }

    /// Whether the one stands in for the other.
    pub fn is_like(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.settings, &other.settings);
        self.recovery.is_some() == other.recovery.is_some()
            && ours.connection_limit.is_some() == theirs.connection_limit.is_some()
            && ours.max_deliveries_per_connection.is_some() == theirs.max_deliveries_per_connection.is_some()
            && ours.max_message_rate.is_some() == theirs.max_message_rate.is_some()
    }
}

fn with_count(rate: Rate, count: u32) -> Rate {
    Rate { count, max_burst: rate.max_burst.min(count), ..rate }
}

/// A limit that was halved once is back after at most half as many steps; each gives back this part of the whole.
const STEPS: u32 = 10;

#[cfg(test)]
mod tests;
