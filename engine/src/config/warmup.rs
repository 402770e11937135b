//! `[warmup."ip-new"]`: how many recipients a day a new source may send to, by provider.

use std::collections::BTreeMap;

use jiff::civil::Date;

use super::document::{Node, Value};
use super::error::Wrong;
use super::reader::Section;
use super::value::did_you_mean;
use super::{Config, Warmup};
use crate::limits;

impl Warmup {
    /// What may go on a day (days since 1970, in UTC) to a provider, or to a site that none rolls up. None: any number.
    pub fn quota(&self, rollup: &str, day: u64) -> Option<u32> {
        let daily = self.daily.get(rollup).or(self.default.as_ref())?;
        match day.checked_sub(self.start_day) {
            None => Some(0),
            Some(place) => daily.get(usize::try_from(place).ok()?).copied(),
        }
    }
}

impl Config {
    pub fn warmup_of(&self, source: usize) -> Option<&Warmup> {
        self.warmups.iter().find(|warmup| warmup.source == source)
    }
}

/// Tables by the names of sources.
pub(super) fn read(section: Section<'_>, config: &Config) -> Vec<Warmup> {
    let mut warmups = Vec::new();
    for (name, entry) in section.others() {
        let Some(source) = config.egress_sources.iter().position(|source| source.name == name) else {
            let instead = match did_you_mean(name, config.egress_sources.iter().map(|source| source.name.as_str())) {
                Some(meant) => format!("write {meant:?}"),
                None => "write the name of an [[egress_source]]".into(),
            };
            section.wrong(entry.key_place, name, Wrong::new("there is no such egress source").instead(instead));
            continue;
        };
        let Value::Table(table) = &entry.node.value else {
            let wrong = Wrong::new(format!("is {}, not a table", entry.node.value.kind()));
            section.wrong(entry.node.place, name, wrong.instead(format!("write [warmup.{name:?}]")));
            continue;
        };
        let own = Section::new(section.path_of(name), entry.node.place, table, section.report);
        warmups.extend(read_warmup(own, source, config));
    }
    warmups
}

fn read_warmup(section: Section<'_>, source: usize, config: &Config) -> Option<Warmup> {
    let start = section.text("start", "\"2026-12-01\"", day);
    if section.place_of("start").is_none() {
        section.missing("start", "\"2026-12-01\"");
    }
    let daily = section.table("daily", "daily.default = [100, 500, 2000]");
    if section.place_of("daily").is_none() {
        section.missing("daily", "{ default = [100, 500, 2000] }");
    }
    let mut default = None;
    let mut by_provider = BTreeMap::new();
    if let Some(daily) = daily {
        default = daily.node("default").and_then(|node| numbers(&daily, "default", node));
        for (name, entry) in daily.others() {
            if !config.shaping_rules.providers.iter().any(|provider| provider.name == name) {
                let names = config.shaping_rules.providers.iter().map(|provider| provider.name.as_str());
                let instead = match did_you_mean(name, names.chain(["default"])) {
                    Some(meant) => format!("write {meant}"),
                    None => "write the name of a provider, or \"default\"".into(),
                };
                daily.wrong(entry.key_place, name, Wrong::new("there is no such provider").instead(instead));
                continue;
            }
            by_provider.extend(numbers(&daily, name, &entry.node).map(|numbers| (name.to_owned(), numbers)));
        }
        if default.is_none()
            && by_provider.is_empty()
            && daily.place_of("default").is_none()
            && daily.others().is_empty()
        {
            daily.missing("default", "[100, 500, 2000]");
        }
    }
    section.finish();
    Some(Warmup { source, start_day: start?.value, daily: by_provider, default })
}

/// One number a day.
fn numbers(section: &Section<'_>, key: &str, node: &Node) -> Option<Vec<u32>> {
    let example = "[100, 500, 2000]";
    let Value::List(list) = &node.value else {
        section.wrong_kind(key, node, "a list of numbers", example);
        return None;
    };
    if list.is_empty() || list.len() > limits::CONFIG_WARMUP_DAYS_MAX {
        let wrong = Wrong::new(format!("is not for 1 to {} days", limits::CONFIG_WARMUP_DAYS_MAX));
        section.wrong(node.place, key, wrong.instead(format!("write for example {key} = {example}")));
        return None;
    }
    let number = |element: &Node| {
        if let Value::Integer(_, Some(number)) = &element.value
            && let Ok(number) = u32::try_from(*number)
            && number <= limits::CONFIG_RATE_COUNT_MAX
        {
            return Some(number);
        }
        let wrong = Wrong::new(format!("has an element that is no number from 0 to {}", limits::CONFIG_RATE_COUNT_MAX));
        section.wrong(element.place, key, wrong.instead(format!("write for example {key} = {example}")));
        None
    };
    list.iter().map(number).collect()
}

/// Days since 1970.
fn day(text: &str) -> Result<u64, Wrong> {
    let wrong =
        || Wrong::new(format!("{text:?} is not a day")).instead("write for example \"2026-12-01\", a day in UTC");
    let date: Date = text.parse().map_err(|_| wrong())?;
    let days = date.since(jiff::civil::date(1970, 1, 1)).map_err(|_| wrong())?.get_days();
    u64::try_from(days).map_err(|_| wrong())
}
