//! `[shaping.default]`: how one (egress source, site) is treated.

use std::time::Duration;

use super::document::Value;
use super::error::{Placed, Wrong};
use super::reader::Section;
use super::route::TLS_MODES;
use super::value::did_you_mean;
use super::{Shaping, Timeouts};
use crate::limits;

const TIMEOUT_MIN: Duration = Duration::from_millis(1);
const TIMEOUT_MAX: Duration = Duration::from_secs(86_400);

pub(super) fn read(section: Section<'_>) -> Shaping {
    let shaping = section.table("default", "[shaping.default]").map_or_else(Shaping::default, read_default);
    for (name, entry) in section.others() {
        let is_table = matches!(entry.node.value, Value::Table(_));
        let wrong = if is_table && did_you_mean(name, ["default"]).is_none() {
            Wrong::new("shaping for one domain is not available yet").instead("write [shaping.default] or leave it out")
        } else {
            Wrong::new("is not a known key").instead("write it below [shaping.default]")
        };
        section.wrong(entry.key_place, name, wrong);
    }
    shaping
}

fn read_default(section: Section<'_>) -> Shaping {
    let mut shaping = Shaping::default();
    let number = |key, otherwise: u32, max| {
        let found: Option<Placed<u64>> = section.integer(key, otherwise.into(), 1..=max);
        found.and_then(|found| u32::try_from(found.value).ok()).unwrap_or(otherwise)
    };
    shaping.connection_limit =
        number("connection_limit", shaping.connection_limit, limits::CONFIG_CONNECTION_LIMIT_MAX);
    shaping.max_deliveries_per_connection = number(
        "max_deliveries_per_connection",
        shaping.max_deliveries_per_connection,
        limits::CONFIG_DELIVERIES_PER_CONNECTION_MAX,
    );
    shaping.max_recipients_per_batch =
        number("max_recipients_per_batch", shaping.max_recipients_per_batch, limits::CONFIG_RECIPIENTS_PER_BATCH_MAX);
    let idle = section.duration("idle_timeout", "60s", TIMEOUT_MIN..=TIMEOUT_MAX);
    shaping.idle_timeout = idle.map_or(shaping.idle_timeout, |found| found.value);
    shaping.pipelining = section.boolean("pipelining").unwrap_or(shaping.pipelining);
    shaping.riding =
        section.choice("chunking", &[("on", true), ("off", false)], &["back_to_back"]).unwrap_or(shaping.riding);
    shaping.tls = section.choice("tls", &TLS_MODES, &[]).unwrap_or(shaping.tls);
    if let Some(timeouts) = section.table("timeouts", "timeouts = { connect = \"30s\" }") {
        shaping.timeouts = read_timeouts(timeouts);
    }
    section.not_yet(&[
        ("max_message_rate", Some("\"unlimited\"")),
        ("max_connection_rate", Some("\"unlimited\"")),
        ("max_in_flight", None),
        ("mta_sts", Some("false")),
        ("dane", Some("false")),
        ("mx_rollup", None),
        ("retry", None),
        ("automation", None),
        ("sources", None),
    ]);
    section.finish();
    shaping
}

fn read_timeouts(section: Section<'_>) -> Timeouts {
    let mut timeouts = Timeouts::default();
    let read = |key, example, timeout: &mut Duration| {
        if let Some(found) = section.duration(key, example, TIMEOUT_MIN..=TIMEOUT_MAX) {
            *timeout = found.value;
        }
    };
    read("connect", "30s", &mut timeouts.connect);
    read("banner", "5m", &mut timeouts.banner);
    read("ehlo", "5m", &mut timeouts.ehlo);
    read("mail", "5m", &mut timeouts.mail);
    read("rcpt", "5m", &mut timeouts.rcpt);
    read("data", "2m", &mut timeouts.data);
    read("data_block", "3m", &mut timeouts.data_block);
    read("data_end", "10m", &mut timeouts.data_end);
    read("quit", "10s", &mut timeouts.quit);
    section.finish();
    timeouts
}
