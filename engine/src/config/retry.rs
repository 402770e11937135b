//! `[retry]`, also of a tenant, a provider and a site: when a deferred recipient is tried again.

use std::time::Duration;

use super::document::Value;
use super::error::{Placed, Wrong};
use super::reader::Section;
use super::{RetryConfig, RetryInterval, RetryRules, RetrySchedule, value};
use crate::limits;

const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = limits::RETRY_INTERVAL_MAX;
const AGE_MAX: Duration = Duration::from_secs(365 * 86_400);
/// Where doubling stops when nothing says so.
const DOUBLED_INTERVAL_MAX: Duration = Duration::from_secs(4 * 3_600);

impl RetrySchedule {
    /// The interval behind a message's `attempts`-th counted attempt (from 1), without jitter.
    pub fn interval(&self, attempts: u32) -> Duration {
        let earlier = attempts.saturating_sub(1);
        match self {
            Self::Doubling { first, max } => {
                let factor = 1_u32.checked_shl(earlier).unwrap_or(u32::MAX);
                // Beyond 2^31 the maximum was reached long ago: no interval is below a second.
                first.checked_mul(factor).unwrap_or(*max).min(*max)
            }
            Self::Listed(intervals) => {
                let index = usize::try_from(earlier).unwrap_or(usize::MAX).min(intervals.len().saturating_sub(1));
                intervals.get(index).copied().unwrap_or(INTERVAL_MAX)
            }
        }
    }
}

impl RetryRules {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl RetryConfig {
    /// What holds where `rules` say more: each key that they have stands in for the one before.
    #[must_use]
    pub fn with(&self, rules: &RetryRules) -> Self {
        let schedule = match (&rules.interval, &self.schedule) {
            (Some(RetryInterval::Listed(intervals)), _) => RetrySchedule::Listed(intervals.clone()),
            (Some(RetryInterval::First(first)), before) => {
                let before = match before {
                    RetrySchedule::Doubling { max, .. } => *max,
                    RetrySchedule::Listed(_) => DOUBLED_INTERVAL_MAX,
                };
                RetrySchedule::Doubling { first: *first, max: rules.max_interval.unwrap_or(before).max(*first) }
            }
            (None, RetrySchedule::Doubling { first, max }) => {
                RetrySchedule::Doubling { first: *first, max: rules.max_interval.unwrap_or(*max).max(*first) }
            }
            // A list has its longest interval in itself.
            (None, listed @ RetrySchedule::Listed(_)) => listed.clone(),
        };
        Self { schedule, max_age: rules.max_age.unwrap_or(self.max_age) }
    }
}

/// Reads the retry table of a provider or a site. How long a message is kept is decided when it is accepted, before it
/// is known where it goes.
pub(super) fn read_of_site(section: Section<'_>, base: &RetryConfig) -> RetryRules {
    section.inapplicable(&["max_age"], "here: how long a message is kept is decided when it is accepted");
    let rules = read_rules(&section, base, None);
    let first = base.with(&rules).schedule.interval(1);
    if base.max_age < first
        && let Some(place) = section.place_of("retry_interval")
    {
        let (max_age, first) = (value::duration_text(base.max_age), value::duration_text(first));
        let wrong =
            Wrong::new(format!("the first retry is after {first}, when retry.max_age, which is {max_age}, is over"));
        let instead = format!("write \"{max_age}\" or less, or a longer max_age in [retry]");
        section.wrong(place, "retry_interval", wrong.instead(instead));
    }
    section.finish();
    rules
}

/// Reads a retry table, and checks what it makes of the one that it stands on.
pub(super) fn read(section: Section<'_>, base: &RetryConfig) -> RetryRules {
    let age = section.duration("max_age", "5d", INTERVAL_MIN..=AGE_MAX);
    let rules = read_rules(&section, base, age.as_ref());
    let retry = base.with(&rules);
    let first = retry.schedule.interval(1);
    if retry.max_age < first && (age.is_some() || section.place_of("max_age").is_none()) {
        let place = age.map(|found| found.place).or_else(|| section.place_of("retry_interval"));
        let (max_age, first) = (value::duration_text(retry.max_age), value::duration_text(first));
        let wrong = Wrong::new(format!("{max_age} is over before the first retry, which is after {first}"));
        section.wrong(place.unwrap_or(section.place), "max_age", wrong.instead(format!("write more than \"{first}\"")));
    }
    section.finish();
    rules
}

fn read_rules(section: &Section<'_>, base: &RetryConfig, age: Option<&Placed<Duration>>) -> RetryRules {
    let longest = section.duration("max_retry_interval", "4h", INTERVAL_MIN..=INTERVAL_MAX);
    let listed = section.node("retry_interval").filter(|node| matches!(node.value, Value::List(_)));
    let interval = if let Some(node) = listed {
        let intervals = read_list(section);
        if matches!(&node.value, Value::List(list) if list.is_empty()) {
            let wrong = Wrong::new("has no interval");
            section.wrong(node.place, "retry_interval", wrong.instead("write for example retry_interval = \"20m\""));
        }
        (!intervals.is_empty()).then_some(RetryInterval::Listed(intervals))
    } else {
        let given = section.duration("retry_interval", "20m", INTERVAL_MIN..=INTERVAL_MAX);
        given.map(|found| RetryInterval::First(found.value))
    };
    let rules = RetryRules {
        interval,
        max_interval: longest.as_ref().map(|found| found.value),
        max_age: age.map(|found| found.value),
    };
    let retry = base.with(&rules);
    match (&retry.schedule, longest) {
        (RetrySchedule::Doubling { first, .. }, Some(Placed { value: max, place })) if max < *first => {
            let (max, first) = (value::duration_text(max), value::duration_text(*first));
            let wrong = Wrong::new(format!("{max} is less than retry_interval, which is {first}"));
            section.wrong(place, "max_retry_interval", wrong.instead(format!("write \"{first}\" or more")));
        }
        (RetrySchedule::Listed(_), Some(_)) => {
            let place = section.place_of("max_retry_interval").unwrap_or(section.place);
            let wrong = Wrong::new("conflicts with a list as retry_interval, whose last interval is the longest");
            section.wrong(place, "max_retry_interval", wrong.instead("leave one of them out"));
        }
        _ => {}
    }
    rules
}

fn read_list(section: &Section<'_>) -> Vec<Duration> {
    let example = "[\"1m\", \"5m\", \"20m\", \"1h\"]";
    let list = section.list("retry_interval", example, |text| {
        let interval = value::duration(text, "20m")?;
        if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
            let (min, max) = (value::duration_text(INTERVAL_MIN), value::duration_text(INTERVAL_MAX));
            let wrong = Wrong::new(format!("{text:?} is not between {min} and {max}"));
            return Err(wrong.instead("write another interval"));
        }
        Ok(interval)
    });
    let Some(list) = list else { return Vec::new() };
    if list.value.len() > limits::CONFIG_RETRY_INTERVALS_MAX {
        let wrong = Wrong::new(format!("has more than {} intervals", limits::CONFIG_RETRY_INTERVALS_MAX));
        section.wrong(list.place, "retry_interval", wrong.instead("leave some out; the last one is repeated"));
    }
    list.value.into_iter().map(|interval| interval.value).collect()
}
