//! Rates: `"100/s"`, `"1000/min,max_burst=20"`, `"unlimited"`.

use std::fmt;
use std::time::Duration;

use super::error::Wrong;
use super::value::duration_text;
use crate::limits::{CONFIG_RATE_COUNT_MAX, RESERVED_PERIOD_MIN};

/// At most `count` in any window of the length `period`, paced evenly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rate {
    /// From 1.
    pub count: u32,
    pub period: Duration,
    /// As many may go at once after a pause, from 1 to `count`.
    pub max_burst: u32,
}

const PERIODS: [(&str, u64); 4] = [("s", 1), ("min", 60), ("h", 3_600), ("d", 86_400)];

impl Rate {
    pub(super) fn parse(text: &str) -> Result<Option<Self>, Wrong> {
        if text == "unlimited" {
            return Ok(None);
        }
        let example = "write for example \"100/s\", \"1000/min,max_burst=20\", \"5000/h\" or \"unlimited\"";
        let not = || Wrong::new(format!("{text:?} is not a rate")).instead(example);
        let (rate, burst) = text.split_once(',').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
        let (count, unit) = rate.split_once('/').ok_or_else(not)?;
        let count = number(count).ok_or_else(not)?;
        let Some((_, seconds)) = PERIODS.iter().find(|(name, _)| *name == unit) else {
            let meant = match unit.to_ascii_lowercase().trim_end_matches('s') {
                "sec" | "second" => "s",
                "m" | "minute" => "min",
                "hr" | "hour" => "h",
                "day" => "d",
                _ => return Err(not()),
            };
            let wrong = Wrong::new(format!("{text:?} has no period that is known here"));
            return Err(wrong.instead(format!("write \"{count}/{meant}\" (periods: s, min, h, d)")));
        };
        if !(1..=CONFIG_RATE_COUNT_MAX).contains(&count) {
            let wrong = Wrong::new(format!("{count} is not between 1 and {CONFIG_RATE_COUNT_MAX}"));
            return Err(wrong.instead("suspend the source to send nothing; write \"unlimited\" for no limit"));
        }
        let max_burst = match burst {
            None => 1,
            Some(burst) => burst.strip_prefix("max_burst=").and_then(number).ok_or_else(not)?,
        };
        if !(1..=count).contains(&max_burst) {
            let wrong = Wrong::new(format!("max_burst={max_burst} is not between 1 and {count}"));
            let instead = format!("write for example \"{rate},max_burst={}\"", count.div_ceil(10));
            return Err(wrong.instead(instead));
        }
        Ok(Some(Self { count, period: Duration::from_secs(*seconds), max_burst }))
    }

    /// The same for what others do: nobody paces them, so that a whole period's worth may come at once unless a burst
    /// is written.
    pub(super) fn parse_unpaced(text: &str) -> Result<Option<Self>, Wrong> {
        let rate = Self::parse(text)?;
        let unpaced = |rate: Self| Self { max_burst: rate.count, ..rate };
        Ok(if text.contains("max_burst") { rate } else { rate.map(unpaced) })
    }

    /// The most recipients of one transaction: with more, pacing would be uneven, and the rate not be reached, because
    /// a transaction is written as a whole.
    pub fn batch_max(&self) -> u32 {
        // Of a period that is reserved ahead, this is also what is reserved at a time: two at most are out.
        let part = if self.period >= RESERVED_PERIOD_MIN { 200 } else { 20 };
        self.max_burst.max(self.count / part).max(1)
    }
}

impl Rate {
    /// Lets less pass in the long run.
    pub fn is_stricter_than(self, other: Self) -> bool {
        u128::from(self.count) * other.period.as_nanos() < u128::from(other.count) * self.period.as_nanos()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = PERIODS.iter().find(|(_, seconds)| Duration::from_secs(*seconds) == self.period);
        match unit {
            Some((unit, _)) => write!(f, "{}/{unit}", self.count)?,
            None => write!(f, "{} in {}", self.count, duration_text(self.period))?,
        }
        if self.max_burst > 1 { write!(f, ",max_burst={}", self.max_burst) } else { Ok(()) }
    }
}

fn number(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) { None } else { text.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_read_back() {
        for text in ["100/s", "1000/min,max_burst=20", "5000/h", "1/d"] {
            assert_eq!(Rate::parse(text).unwrap().unwrap().to_string(), text);
        }
        assert_eq!(Rate::parse("unlimited"), Ok(None));
        assert_eq!(Rate::parse("60/min,max_burst=1").unwrap(), Rate::parse("60/min").unwrap());
        assert_eq!(Rate::parse_unpaced("60/min").unwrap(), Rate::parse("60/min,max_burst=60").unwrap());
        assert_eq!(Rate::parse_unpaced("60/min,max_burst=1").unwrap(), Rate::parse("60/min").unwrap());
    }

    #[test]
    fn what_is_wrong_is_told() {
        let wrong = |text| {
            let wrong = Rate::parse(text).unwrap_err();
            format!("{}; {}", wrong.what, wrong.instead.unwrap_or_default())
        };
        let example = "write for example \"100/s\", \"1000/min,max_burst=20\", \"5000/h\" or \"unlimited\"";
        for text in ["100", "", "/s", "-1/s", "1.5/s", "100/fortnight", "9999999999/s", "1/s,burst=2", "1/s,max_burst="]
        {
            assert_eq!(wrong(text), format!("{text:?} is not a rate; {example}"));
        }
        assert_eq!(
            wrong("100/minute"),
            "\"100/minute\" has no period that is known here; write \"100/min\" (periods: s, min, h, d)"
        );
        assert_eq!(
            wrong("0/s"),
            "0 is not between 1 and 10000000; suspend the source to send nothing; write \"unlimited\" for no limit"
        );
        assert_eq!(
            wrong("10/s,max_burst=11"),
            "max_burst=11 is not between 1 and 10; write for example \"10/s,max_burst=1\""
        );
    }
}
