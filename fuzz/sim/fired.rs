//! Whether rules fire: so many answers of a peer within their time bring about what the operator wants then.

use std::collections::BTreeMap;

use postrider::config::{AutomationAction, AutomationRule};
use postrider::pool::suspension::Suspension;
use postrider_spool::record::Outcome;

use crate::providers::PROVIDER;

/// What peers have said, and what came of it.
#[derive(Debug, Default)]
pub(crate) struct Fired {
    /// When each life began, and the present one's number.
    lives: Vec<u64>,
    /// By rule, source and site: in which life, and when.
    answers: BTreeMap<(usize, String, String), Vec<(usize, u64)>>,
    /// Since when.
    made: Vec<(u64, Suspension)>,
}

impl Fired {
    pub(crate) fn begin_life(&mut self, now_ms: u64) {
        self.lives.push(now_ms);
    }

    /// When each began.
    pub(crate) fn lives(&self) -> &[u64] {
        &self.lives
    }

    pub(crate) fn note(&mut self, now_ms: u64, suspension: &Suspension) {
        self.made.push((now_ms, suspension.clone()));
    }

    /// An outcome's record: what the peer said to each transaction counts once, however many recipients it is about.
    pub(crate) fn hear(&mut self, outcome: &Outcome, rules: &[std::sync::Arc<AutomationRule>]) {
        let life = self.lives.len();
        // Of an earlier life nothing is counted any more.
        if self.lives.last().is_none_or(|began| outcome.at_ms < *began) {
            return;
        }
        for (place, rule) in rules.iter().enumerate() {
            if !shows(rule) {
                continue;
            }
            let answers = outcome.results.iter().map(|result| &result.answer);
            let heard = answers.filter(|answer| SAID.contains(&&*answer.text));
            let mut matching: Vec<String> = heard.map(|answer| format!("{} {}", answer.code, answer.text)).collect();
            matching.retain(|answer| rule.when.is_match(answer));
            matching.sort_unstable();
            matching.dedup();
            let key = (place, outcome.egress_source.clone(), outcome.site.clone());
            let of_place = self.answers.entry(key).or_default();
            of_place.extend(matching.iter().map(|_| (life, outcome.at_ms)));
        }
    }

    /// A peer has greeted a source with this.
    pub(crate) fn hear_greeting(
        &mut self,
        now_ms: u64,
        (source, site): (&str, &str),
        greeting: &str,
        rules: &[std::sync::Arc<AutomationRule>],
    ) {
        let is_meant = |rule: &AutomationRule| shows(rule) && rule.when.is_match(greeting);
        for (place, _) in rules.iter().enumerate().filter(|(_, rule)| is_meant(rule)) {
            let key = (place, source.to_owned(), site.to_owned());
            self.answers.entry(key).or_default().push((self.lives.len(), now_ms));
        }
    }

    /// SUSPENDED: where answers have filled a rule's threshold, something was suspended.
    pub(crate) fn check(
        &self,
        rules: &[std::sync::Arc<AutomationRule>],
        source_names: &[String],
        is_rolled_up: impl Fn(&str) -> bool,
    ) {
        for ((place, source, site), answers) in &self.answers {
            let rule = &rules[*place];
            let (count, window_ms) =
                rule.threshold.map_or((1, SLACK_MS), |it| (it.count as usize, it.window.as_millis() as u64));
            // Records of several shards come in another order.
            let mut answers = answers.clone();
            answers.sort_unstable();
            for filled in answers.windows(count) {
                let [(life, first), .., (last_life, last)] = filled else {
                    let [(life, at)] = filled else { continue };
                    self.check_one(rule, (source, site), (*life, *at, *at), source_names, &is_rolled_up);
                    continue;
                };
                if life == last_life && first <= last && last - first + SLACK_MS <= window_ms {
                    self.check_one(rule, (source, site), (*life, *first, *last), source_names, &is_rolled_up);
                }
            }
        }
    }

    fn check_one(
        &self,
        rule: &AutomationRule,
        (source, site): (&str, &str),
        (life, first, last): (usize, u64, u64),
        source_names: &[String],
        is_rolled_up: &impl Fn(&str) -> bool,
    ) {
        // It may not have come to that.
        if self.lives.get(life).is_some_and(|next| last + 2 * SLACK_MS > *next) {
            return;
        }
        let is_meant = |(made, suspension): &&(u64, Suspension)| {
            let scope = &suspension.scope;
            let is_of_site = |name: &str| name == site || name == PROVIDER && is_rolled_up(site);
            *made <= last + SLACK_MS
                && suspension.until_ms + SLACK_MS >= first
                && scope.source.is_some_and(|index| source_names[index] == source)
                && scope.rollup.as_ref().is_none_or(|name| is_of_site(name))
        };
        assert!(
            self.made.iter().any(|made| is_meant(&made)),
            "SUSPENDED: {} was to fire for {source} at {site}, of answers from {first} to {last}",
            rule.name
        );
    }
}

/// Where others are in force already, or have no more to halve, nothing is to be seen; and some want a message.
fn shows(rule: &AutomationRule) -> bool {
    matches!(rule.action, AutomationAction::Suspend | AutomationAction::SuspendSource)
}

/// What peers say of a recipient or a message, and nobody else does.
const SAID: [&str; 6] =
    ["later", "greylisted", "unknown", "nobody in this transaction", "too much mail from you", "no room"];

/// Between what is said and its record: a shard stands still, a message between shards is late.
const SLACK_MS: u64 = 30_000;
