//! `[retry]`: when a deferred recipient is tried again.

use std::time::Duration;

use super::document::Value;
use super::error::{Placed, Wrong};
use super::reader::Section;
use super::{RetryConfig, RetrySchedule, value};
use crate::limits;

const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(7 * 86_400);
const AGE_MAX: Duration = Duration::from_secs(365 * 86_400);

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

pub(super) fn read(section: Section<'_>) -> RetryConfig {
    let mut retry = RetryConfig::default();
    let RetrySchedule::Doubling { first, max } = retry.schedule else { unreachable!("the default doubles") };
    let longest = section.duration("max_retry_interval", "4h", INTERVAL_MIN..=INTERVAL_MAX);
    let age = section.duration("max_age", "5d", INTERVAL_MIN..=AGE_MAX);
    retry.max_age = age.as_ref().map_or(retry.max_age, |found| found.value);

    let listed = section.node("retry_interval").filter(|node| matches!(node.value, Value::List(_)));
    retry.schedule = if let Some(node) = listed {
        if longest.is_some() {
            let place = section.place_of("max_retry_interval").unwrap_or(section.place);
            let wrong = Wrong::new("conflicts with a list as retry_interval, whose last interval is the longest");
            section.wrong(place, "max_retry_interval", wrong.instead("leave one of them out"));
        }
        let intervals = read_list(&section);
        if matches!(&node.value, Value::List(list) if list.is_empty()) {
            let wrong = Wrong::new("has no interval");
            section.wrong(node.place, "retry_interval", wrong.instead("write for example retry_interval = \"20m\""));
        }
        if intervals.is_empty() { retry.schedule.clone() } else { RetrySchedule::Listed(intervals) }
    } else {
        let given = section.duration("retry_interval", "20m", INTERVAL_MIN..=INTERVAL_MAX);
        let first = given.as_ref().map_or(first, |found| found.value);
        match (&given, longest) {
            (_, Some(Placed { value: max, place })) if max < first => {
                let (max, first) = (value::duration_text(max), value::duration_text(first));
                let wrong = Wrong::new(format!("{max} is less than retry_interval, which is {first}"));
                section.wrong(place, "max_retry_interval", wrong.instead(format!("write \"{first}\" or more")));
                retry.schedule.clone()
            }
            (_, longest) => RetrySchedule::Doubling { first, max: longest.map_or(max.max(first), |found| found.value) },
        }
    };

    let first = retry.schedule.interval(1);
    if retry.max_age < first && (age.is_some() || section.place_of("max_age").is_none()) {
        let place = age.map(|found| found.place).or_else(|| section.place_of("retry_interval"));
        let (max_age, first) = (value::duration_text(retry.max_age), value::duration_text(first));
        let wrong = Wrong::new(format!("{max_age} is over before the first retry, which is after {first}"));
        section.wrong(place.unwrap_or(section.place), "max_age", wrong.instead(format!("write more than \"{first}\"")));
    }
    section.finish();
    retry
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
