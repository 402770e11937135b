//! `[[….automation]]`: what is done about the answers of a peer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use regex::{Regex, RegexBuilder};

use super::document::{Node, Value};
use super::error::Wrong;
use super::reader::Section;
use super::value::{any_of, duration_text};
use super::{Rate, Shaping};
use crate::limits;

/// A rule: answers that `when` matches lead to `action`, once there are as many as `threshold` says.
#[derive(Debug, Clone)]
pub struct AutomationRule {
    /// As operators read it, and no other rule is called: `rule 2 of [provider."yahoo"]`.
    pub name: Arc<str>,
    /// On "CODE X.Y.Z text", a reply's lines joined by spaces.
    pub when: Regex,
    /// None: at once.
    pub threshold: Option<Threshold>,
    pub action: AutomationAction,
    /// How long the action holds; of [`AutomationAction::Halve`], how long each step back takes.
    pub duration: Duration,
    /// An answer that it is for.
    pub example: Option<String>,
}

/// This many answers within any time of this length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threshold {
    pub count: u32,
    pub window: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutomationAction {
    /// The source, at the roll-up.
    Suspend,
    /// The message's tenant, by the source at the roll-up.
    SuspendTenant,
    /// The message's campaign, by the source at the roll-up.
    SuspendCampaign,
    /// The source, everywhere.
    SuspendSource,
    /// Limits of the source at the roll-up's sites, where they are not stricter already.
    Set(LimitSettings),
    /// Halves limits there, which then climb back.
    Halve(HalvedLimits),
    /// The answer counts as a 4xx.
    Defer,
    /// The answer counts as a 5xx.
    Fail,
    /// Ends the mail that waits in the message's queue.
    BounceQueue,
}

/// Limits that hold beside those configured; one that is None is as configured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitSettings {
    pub connection_limit: Option<u32>,
    pub max_deliveries_per_connection: Option<u32>,
    pub max_message_rate: Option<Rate>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HalvedLimits {
    pub connection_limit: bool,
    pub max_message_rate: bool,
}

impl PartialEq for AutomationRule {
    fn eq(&self, other: &Self) -> bool {
        let Self { name, when, threshold, action, duration, example } = self;
        *name == other.name
            && when.as_str() == other.when.as_str()
            && (threshold, action, duration, example)
                == (&other.threshold, &other.action, &other.duration, &other.example)
    }
}

impl Eq for AutomationRule {}

impl LimitSettings {
    /// Of each limit the stricter one.
    #[must_use]
    pub fn stricter(self, other: Self) -> Self {
        let rate = match (self.max_message_rate, other.max_message_rate) {
            (Some(one), Some(other)) => Some(if other.is_stricter_than(one) { other } else { one }),
            (one, other) => one.or(other),
        };
        Self {
            connection_limit: least(self.connection_limit, other.connection_limit),
            max_deliveries_per_connection: least(
                self.max_deliveries_per_connection,
                other.max_deliveries_per_connection,
            ),
            max_message_rate: rate,
        }
    }

    /// What they leave of a shaping. The rate holds beside the configured one, which goes on counting.
    #[must_use]
    pub fn applied_to(self, shaping: &Arc<Shaping>) -> Arc<Shaping> {
        let connections = shaping.connection_limit.min(self.connection_limit.unwrap_or(u32::MAX));
        let deliveries = self.max_deliveries_per_connection.unwrap_or(u32::MAX);
        let deliveries = shaping.max_deliveries_per_connection.min(deliveries);
        if (connections, deliveries) == (shaping.connection_limit, shaping.max_deliveries_per_connection) {
            return Arc::clone(shaping);
        }
        let mut stricter = Shaping::clone(shaping);
        stricter.connection_limit = connections;
        stricter.max_deliveries_per_connection = deliveries;
        Arc::new(stricter)
    }

    /// The most recipients of one transaction.
    pub fn batch_max(self) -> usize {
        self.max_message_rate.map_or(usize::MAX, |rate| rate.batch_max() as usize)
    }
}

fn least(one: Option<u32>, other: Option<u32>) -> Option<u32> {
    one.into_iter().chain(other).min()
}

impl AutomationAction {
    /// Whether it holds for a time, and not only for one answer.
    fn lasts(self) -> bool {
        !matches!(self, Self::Defer | Self::Fail | Self::BounceQueue)
    }
}

/// As `check` shows it.
impl fmt::Display for AutomationRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}", self.when.as_str(), self.action)?;
        if self.action.lasts() {
            let each = if matches!(self.action, AutomationAction::Halve(_)) { "a step back each" } else { "for" };
            write!(f, " {each} {}", duration_text(self.duration))?;
        }
        match self.threshold {
            None => Ok(()),
            Some(Threshold { count, window }) => write!(f, ", after {count} in {}", duration_text(window)),
        }
    }
}

impl fmt::Display for AutomationAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(settings) => write!(f, "set {settings}"),
            Self::Halve(halved) => {
                let named =
                    [("connection_limit", halved.connection_limit), ("max_message_rate", halved.max_message_rate)];
                let named: Vec<&str> =
                    named.iter().filter(|(_, is_halved)| *is_halved).map(|(name, _)| *name).collect();
                write!(f, "halve {}", named.join(" and "))
            }
            simple => {
                let word = ACTIONS.iter().find(|(_, action)| action == simple).map_or("?", |(word, _)| word);
                f.write_str(word)
            }
        }
    }
}

impl fmt::Display for LimitSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.connection_limit.map(|limit| format!("connection_limit {limit}")));
        parts.extend(self.max_deliveries_per_connection.map(|limit| format!("max_deliveries_per_connection {limit}")));
        parts.extend(self.max_message_rate.map(|rate| format!("max_message_rate {rate}")));
        f.write_str(&parts.join(", "))
    }
}

/// The rules of a section. `title` names the section in what operators read.
pub(super) fn read(section: &Section<'_>, title: &str) -> Vec<Arc<AutomationRule>> {
    let mut tables = section.tables("automation", "[[….automation]]");
    if let Some(beyond) = tables.get(limits::CONFIG_AUTOMATION_RULES_MAX) {
        let wrong = Wrong::new(format!("more than {} rules", limits::CONFIG_AUTOMATION_RULES_MAX));
        section.wrong(beyond.place, "automation", wrong.instead("put patterns together with \"|\""));
        tables.truncate(limits::CONFIG_AUTOMATION_RULES_MAX);
    }
    let rules = tables.into_iter().enumerate();
    let rules = rules.filter_map(|(place, table)| read_rule(table, format!("rule {} of [{title}]", place + 1).into()));
    rules.map(Arc::new).collect()
}

fn read_rule(section: Section<'_>, name: Arc<str>) -> Option<AutomationRule> {
    let when = section.text("when", "'^421 .*rate limited'", pattern);
    if section.place_of("when").is_none() {
        section.missing("when", "'^421 .*rate limited'");
    }
    let threshold = section.text("threshold", "\"3/min\"", threshold).map(|found| found.value);
    let action = match section.node("action") {
        Some(node) => read_action(&section, node),
        None => {
            section.missing("action", "\"suspend\"");
            None
        }
    };
    let duration = section.duration("for", "2h", DURATION_MIN..=DURATION_MAX).map(|found| found.value);
    let example = section.text("example", "\"421 4.7.0 try again later\"", |text| Ok(text.to_owned()));
    if let (Some(when), Some(example)) = (&when, &example)
        && !when.value.is_match(&example.value)
    {
        let wrong = Wrong::new(format!("{:?} is not matched by {}", example.value, when.value.as_str()));
        section.wrong(example.place, "example", wrong.instead("write an answer that the rule is for"));
    }
    match action {
        Some(action) if action.lasts() && section.place_of("for").is_none() => section.missing("for", "\"2h\""),
        Some(action) if !action.lasts() => {
            section.inapplicable(&["for"], "with this action, which is done at once");
            if action != AutomationAction::BounceQueue {
                section.inapplicable(&["threshold"], "with this action, which is about a single answer");
            }
        }
        _ => {}
    }
    section.finish();
    let (when, action) = (when?.value, action?);
    let duration = if action.lasts() { duration? } else { Duration::ZERO };
    Some(AutomationRule { name, when, threshold, action, duration, example: example.map(|found| found.value) })
}

fn read_action(section: &Section<'_>, node: &Node) -> Option<AutomationAction> {
    match &node.value {
        Value::Text(_) => section.choice("action", &ACTIONS, &[]),
        Value::Table(_) => {
            let table = section.table("action", "action = { set = { connection_limit = 1 } }")?;
            let action = read_limits(&table);
            table.finish();
            action
        }
        _ => {
            section.wrong_kind("action", node, "an action", "\"suspend\"");
            None
        }
    }
}

/// `{ set = { … } }` or `{ halve = [ … ] }`.
fn read_limits(action: &Section<'_>) -> Option<AutomationAction> {
    let set = action.table("set", "set = { connection_limit = 1 }");
    let set = set.and_then(|set| read_settings(set).map(AutomationAction::Set));
    let names = action.list("halve", "[\"connection_limit\"]", |name| match name {
        "connection_limit" | "max_message_rate" => Ok(name.to_owned()),
        _ => {
            let wrong = Wrong::new(format!("{name:?} can not be halved"));
            Err(wrong.instead("write \"connection_limit\", \"max_message_rate\" or both"))
        }
    });
    if let (Some(place), Some(_)) = (action.place_of("halve"), action.place_of("set")) {
        let wrong = Wrong::new("stands beside set");
        action.wrong(place, "halve", wrong.instead("write two rules"));
        return None;
    }
    if action.place_of("set").or(action.place_of("halve")).is_none() {
        action.missing("set", "{ connection_limit = 1 }");
    }
    let halve = names.and_then(|names| {
        let has = |wanted: &str| names.value.iter().any(|name| name.value == wanted);
        let halved =
            HalvedLimits { connection_limit: has("connection_limit"), max_message_rate: has("max_message_rate") };
        if halved == HalvedLimits::default() {
            let wrong = Wrong::new("names no limit").instead("write for example halve = [\"connection_limit\"]");
            action.wrong(names.place, "halve", wrong);
            return None;
        }
        Some(AutomationAction::Halve(halved))
    });
    set.or(halve)
}

fn read_settings(set: Section<'_>) -> Option<LimitSettings> {
    let number = |key, max| {
        let found = set.integer(key, 1, 1..=max);
        found.and_then(|found| u32::try_from(found.value).ok())
    };
    let settings = LimitSettings {
        connection_limit: number("connection_limit", limits::CONFIG_CONNECTION_LIMIT_MAX),
        max_deliveries_per_connection: number(
            "max_deliveries_per_connection",
            limits::CONFIG_DELIVERIES_PER_CONNECTION_MAX,
        ),
        max_message_rate: set.text("max_message_rate", "\"30/min\"", Rate::parse).and_then(|found| found.value),
    };
    if ["connection_limit", "max_deliveries_per_connection", "max_message_rate"]
        .iter()
        .all(|key| set.place_of(key).is_none())
    {
        set.missing("connection_limit", "1");
    }
    set.finish();
    (settings != LimitSettings::default()).then_some(settings)
}

fn pattern(text: &str) -> Result<Regex, Wrong> {
    if text.len() > limits::CONFIG_PATTERN_BYTES_MAX {
        let wrong = Wrong::new(format!("is longer than {} bytes", limits::CONFIG_PATTERN_BYTES_MAX));
        return Err(wrong.instead("write a shorter pattern, or several rules"));
    }
    let built = RegexBuilder::new(text)
        .size_limit(limits::CONFIG_PATTERN_COMPILED_BYTES_MAX)
        .dfa_size_limit(limits::CONFIG_PATTERN_COMPILED_BYTES_MAX)
        .build();
    built.map_err(|error| {
        // The library draws the pattern with a marker below; its last line says what is wrong.
        let error = error.to_string();
        let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
        let wrong = Wrong::new(format!("{text:?} is not a regular expression: {reason}"));
        wrong.instead("write it in the syntax of Rust's regex crate, which has no look-around and no back-references")
    })
}

/// `3/min`.
fn threshold(text: &str) -> Result<Threshold, Wrong> {
    let wrong = |why: String| Err(Wrong::new(format!("{text:?} {why}")).instead("write for example \"3/min\""));
    let Some((count, unit)) = text.split_once('/') else {
        return wrong("is not a count and a time".to_owned());
    };
    let Ok(count) = count.parse::<u32>() else { return wrong("does not begin with a count".to_owned()) };
    if count == 0 || count > limits::CONFIG_THRESHOLD_MAX {
        return wrong(format!("does not count from 1 to {}", limits::CONFIG_THRESHOLD_MAX));
    }
    let Some((_, seconds)) = THRESHOLD_UNITS.iter().find(|(name, _)| *name == unit) else {
        let units = any_of(THRESHOLD_UNITS.iter().map(|(name, _)| *name));
        return wrong(format!("has no time that is known here, which are {units}"));
    };
    Ok(Threshold { count, window: Duration::from_secs(*seconds) })
}

const ACTIONS: [(&str, AutomationAction); 7] = [
    ("suspend", AutomationAction::Suspend),
    ("suspend_tenant", AutomationAction::SuspendTenant),
    ("suspend_campaign", AutomationAction::SuspendCampaign),
    ("suspend_source", AutomationAction::SuspendSource),
    ("defer", AutomationAction::Defer),
    ("fail", AutomationAction::Fail),
    ("bounce_queue", AutomationAction::BounceQueue),
];

const THRESHOLD_UNITS: [(&str, u64); 4] = [("s", 1), ("min", 60), ("h", 3_600), ("d", 86_400)];

const DURATION_MIN: Duration = Duration::from_secs(1);
const DURATION_MAX: Duration = Duration::from_secs(30 * 86_400);
