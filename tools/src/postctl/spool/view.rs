//! A live message as people and programs are shown it. Names are those of the engine's HTTP calls.

use jiff::Timestamp;
use postrider_spool::record::Answer;
use serde_json::{Map, Value, json};

use super::reading::{Live, RecipientState};
use crate::render::{Cell, bytes};

pub(crate) fn row(live: &Live<'_>, recipient: &RecipientState<'_>) -> Vec<Cell> {
    vec![
        Cell::text(&live.id.to_string()),
        Cell::text(&live.envelope.reverse_path),
        Cell::text(recipient.address),
        Cell::number(live.message.size()),
        Cell::text(&time(live.envelope.created_ms)),
        Cell::number(attempts(recipient)),
        Cell::maybe(recipient.due_ms.map(time).as_deref()),
        Cell::maybe(if live.is_held { Some(HELD.to_owned()) } else { last_answer(recipient) }.as_deref()),
    ]
}

pub(crate) fn row_json(live: &Live<'_>, recipient: &RecipientState<'_>) -> Value {
    let envelope = &live.envelope;
    json!({
        "id": live.id.to_string(), "sender": envelope.reverse_path, "recipient": recipient.address,
        "queue": recipient.result.map(|result| &result.queue), "size": live.message.size(),
        "tenant": present(&envelope.tenant), "campaign": present(&envelope.campaign),
        "created": time(envelope.created_ms), "expires": time(envelope.expires_ms),
        "num_attempts": attempts(recipient), "due": recipient.due_ms.map(time), "last_answer": last_answer(recipient),
        "held": live.is_held,
    })
}

pub(crate) fn recipient_row(recipient: &RecipientState<'_>) -> Vec<Cell> {
    // What became of a finished recipient is in the event log.
    let attempts = if recipient.is_pending { attempts(recipient).to_string() } else { "-".into() };
    vec![
        Cell::text(recipient.address),
        Cell::text(state(recipient)),
        Cell::number(attempts),
        Cell::maybe(recipient.due_ms.map(time).as_deref()),
        Cell::maybe(last_answer(recipient).as_deref()),
    ]
}

pub(crate) fn envelope_pairs(live: &Live<'_>) -> Vec<(&'static str, String)> {
    let envelope = &live.envelope;
    let or_none = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let sender = if envelope.reverse_path.is_empty() { "<> (the null reverse path)" } else { &envelope.reverse_path };
    let octets = if envelope.eight_bit { "8 bit" } else { "7 bit" };
    let names = if envelope.smtputf8 { ", needs SMTPUTF8" } else { "" };
    let client: Vec<&str> = [&envelope.client_name, &envelope.client_address]
        .into_iter()
        .map(String::as_str)
        .filter(|it| !it.is_empty())
        .collect();
    let mut pairs = vec![
        ("id", live.id.to_string()),
        ("sender", sender.to_owned()),
        ("size", format!("{} ({} octets)", bytes(live.message.size()), live.message.size())),
        ("content", format!("{octets}{names}")),
        ("accepted", time(envelope.created_ms)),
        ("first attempt", time(envelope.first_attempt_ms)),
        ("given up", time(envelope.expires_ms)),
        ("tenant", or_none(&envelope.tenant)),
        ("campaign", or_none(&envelope.campaign)),
        ("egress pool", or_none(&envelope.egress_pool)),
        ("priority", priority(envelope.priority)),
        ("received by", or_none(envelope.reception_protocol())),
        ("client", or_none(&client.join(" "))),
    ];
    pairs.extend(envelope.headers.iter().map(|(name, value)| ("header", format!("{name}: {value}"))));
    pairs.extend(envelope.meta.iter().map(|(name, value)| ("meta", format!("{name}: {value}"))));
    pairs
}

pub(crate) fn message_json(live: &Live<'_>) -> Value {
    let envelope = &live.envelope;
    let recipients: Vec<Value> = live.recipients().map(|recipient| recipient_json(&recipient)).collect();
    json!({
        "id": live.id.to_string(), "sender": envelope.reverse_path, "size": live.message.size(),
        "tenant": present(&envelope.tenant), "campaign": present(&envelope.campaign),
        "egress_pool": present(&envelope.egress_pool), "priority": priority(envelope.priority),
        "created": time(envelope.created_ms), "first_attempt": time(envelope.first_attempt_ms),
        "expires": time(envelope.expires_ms), "eight_bit": envelope.eight_bit, "smtputf8": envelope.smtputf8,
        "reception_protocol": present(envelope.reception_protocol()),
        "client_address": present(&envelope.client_address), "client_name": present(&envelope.client_name),
        "headers": envelope.headers, "meta": fields(&envelope.meta), "recipients": recipients,
    })
}

fn recipient_json(recipient: &RecipientState<'_>) -> Value {
    let answer = recipient.result.map(|result| {
        let Answer { code, enhanced, text, command } = &result.answer;
        json!({ "code": code, "enhanced": enhanced, "content": text, "command": command })
    });
    json!({
        "index": recipient.index, "recipient": recipient.address, "state": state(recipient),
        "queue": recipient.result.map(|result| &result.queue),
        "num_attempts": recipient.is_pending.then(|| attempts(recipient)), "due": recipient.due_ms.map(time),
        "last_answer": last_answer(recipient), "answer": answer,
    })
}

/// In place of an answer: no checkpoint could be read when the engine started, and what would tell is gone.
const HELD: &str = "held: it may have been delivered";

fn state(recipient: &RecipientState<'_>) -> &'static str {
    if recipient.is_pending { "pending" } else { "finished" }
}

fn attempts(recipient: &RecipientState<'_>) -> u32 {
    recipient.result.map_or(0, |result| result.attempts)
}

/// As on the wire: `451 4.2.0 later`.
fn last_answer(recipient: &RecipientState<'_>) -> Option<String> {
    let Answer { code, enhanced, text, .. } = &recipient.result?.answer;
    let text = match (code, enhanced) {
        (0, _) => text.clone(),
        (code, None) => format!("{code} {text}"),
        (code, Some((class, subject, detail))) => format!("{code} {class}.{subject}.{detail} {text}"),
    };
    Some(text.trim_end().to_owned()).filter(|text| !text.is_empty())
}

fn priority(priority: u8) -> String {
    match priority {
        0 => "high".into(),
        1 => "normal".into(),
        2 => "bulk".into(),
        other => other.to_string(),
    }
}

fn time(ms: u64) -> String {
    format!("{:.3}", timestamp(ms))
}

/// A time that no calendar has becomes the last one that it has.
pub(crate) fn timestamp(ms: u64) -> Timestamp {
    i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok()).unwrap_or(Timestamp::MAX)
}

fn fields(pairs: &[(String, String)]) -> Map<String, Value> {
    pairs.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect()
}

fn present(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}
