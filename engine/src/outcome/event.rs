//! One event: a spooled record, seen by one of its recipients, as one line of JSON.
//!
//! The fields are those of KumoMTA's log records, by name and type, so that what reads its logs reads ours. Beyond
//! them stand `event_id`, `tenant` and `campaign`. An event is derived from a durable record alone and from nothing
//! else, so deriving it again (after a crash) gives the same line with the same `event_id`; readers may rely on that
//! to recognise what they have seen.
//!
//! Where we differ from KumoMTA in meaning: `num_attempts` counts the attempt that the record tells of, `size` is
//! always known, and a peer's port is told unless it is 25.
//!
//! See also: `event_log.rs` for how lines get to disk, `classify.rs` for `bounce_classification`.
//!
//! Over 500 lines: every field of every event, and where it comes from.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;

use postrider_spool::record::{Answer, Envelope, Fate, LogId, MessageId, Outcome, RecipientResult, Sequence};

use crate::mail::address::queue_domain;
use crate::mail::queue_name::QueueName;
use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};

use super::classify::{BounceClass, classify};
pub use super::event_id::{EventId, NodeId, ParseIdError};

/// A record of the spool that tells events, and where it stands. It is durable when it comes here.
#[derive(Debug, Clone)]
pub struct LoggedRecord {
    pub log: LogId,
    pub sequence: Sequence,
    pub record: Logged,
}

/// The kinds of records that tell events.
#[derive(Debug, Clone)]
pub enum Logged {
    /// A message was accepted: one Reception for each recipient. `size` is that of the content in bytes.
    Message { envelope: Box<Envelope>, size: u64 },
    /// A transaction or decision: one event for each result.
    Outcome(Box<Outcome>),
}

/// What an event tells, in KumoMTA's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum EventKind {
    Reception,
    Delivery,
    TransientFailure,
    Bounce,
    Expiration,
    AdminBounce,
}

impl EventKind {
    /// Exactly one final event exists for each accepted recipient.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Reception | Self::TransientFailure)
    }

    /// Whether its answer tells why something failed.
    fn is_failure(self) -> bool {
        !matches!(self, Self::Reception | Self::Delivery)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reception => "Reception",
            Self::Delivery => "Delivery",
            Self::TransientFailure => "TransientFailure",
            Self::Bounce => "Bounce",
            Self::Expiration => "Expiration",
            Self::AdminBounce => "AdminBounce",
        }
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Fate> for EventKind {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Deferred { .. } => Self::TransientFailure,
            Fate::Delivered => Self::Delivery,
            Fate::Bounced => Self::Bounce,
            Fate::Expired => Self::Expiration,
            Fate::AdminBounced => Self::AdminBounce,
        }
    }
}

/// A moment of wall time in Unix milliseconds, written as RFC 3339 in UTC with milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct WallTime(pub u64);

impl fmt::Display for WallTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A record may hold any number; what no calendar can show is shown as the last moment that it can.
        let clamped = i64::try_from(self.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        write!(f, "{:.3}", clamped.unwrap_or(jiff::Timestamp::MAX))
    }
}

impl Serialize for WallTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        as_text(self, serializer)
    }
}

/// An event that borrows from its record. Its JSON has the fields in this order.
#[derive(Debug, Clone, Serialize)]
pub struct Event<'a> {
    #[serde(rename = "type")]
    kind: EventKind,
    #[serde(serialize_with = "as_text")]
    id: MessageId,
    #[serde(serialize_with = "as_text")]
    event_id: EventId,
    sender: &'a str,
    recipient: &'a str,
    #[serde(serialize_with = "as_text")]
    queue: Queue<'a>,
    site: &'a str,
    size: u64,
    response: Response<'a>,
    peer_address: Option<PeerAddress<'a>>,
    /// Unix seconds.
    timestamp: u64,
    event_time: WallTime,
    /// Unix seconds.
    created: u64,
    created_time: WallTime,
    num_attempts: u32,
    bounce_classification: BounceClass,
    egress_pool: Option<&'a str>,
    egress_source: Option<&'a str>,
    source_address: Option<SourceAddress<'a>>,
    feedback_report: Option<()>,
    delivery_protocol: Option<&'a str>,
    reception_protocol: Option<&'a str>,
    #[serde(serialize_with = "as_text")]
    nodeid: NodeId,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_cipher: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_protocol_version: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_verified_by: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tls_peer_subject_name: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text_if_any")]
    session_id: Option<NodeId>,
    tenant: Option<&'a str>,
    campaign: Option<&'a str>,
    meta: Pairs<'a>,
    headers: Pairs<'a>,
    #[serde(skip)]
    due_ms: Option<u64>,
    #[serde(skip)]
    at_ms: u64,
    #[serde(skip)]
    created_ms: u64,
}

/// The events of a record, in the order of their indexes. An intent has none: what became of it has.
pub fn events<'a>(record: &'a LoggedRecord, node: &'a NodeId) -> impl Iterator<Item = Event<'a>> {
    let count = match &record.record {
        Logged::Message { envelope, .. } => envelope.recipients.len(),
        Logged::Outcome(outcome) => outcome.results.len(),
    };
    let is_intent = |place: &usize| match &record.record {
        Logged::Message { .. } => false,
        Logged::Outcome(outcome) => outcome.results[*place].is_intent(),
    };
    (0..count).filter(move |place| !is_intent(place)).map(move |place| {
        // A transaction has at most a few thousand recipients (`limits.rs`).
        let index = u32::try_from(place).expect("a record has fewer than 2^32 recipients");
        let event_id = EventId { log: record.log, sequence: record.sequence, index };
        match &record.record {
            Logged::Message { envelope, size } => reception(event_id, envelope, place, *size, node),
            Logged::Outcome(outcome) => from_result(event_id, outcome, &outcome.results[place], node),
        }
    })
}

fn reception<'a>(event_id: EventId, envelope: &'a Envelope, place: usize, size: u64, node: &NodeId) -> Event<'a> {
    let recipient = envelope.recipients[place].address.as_str();
    Event {
        kind: EventKind::Reception,
        id: MessageId::new(event_id.log, event_id.sequence),
        event_id,
        sender: &envelope.reverse_path,
        recipient,
        queue: Queue::Parts { campaign: &envelope.campaign, tenant: &envelope.tenant, recipient },
        site: "",
        size,
        response: Response { code: 250, enhanced_code: None, content: "", command: None },
        peer_address: PeerAddress::client(&envelope.client_name, &envelope.client_address),
        timestamp: envelope.created_ms / 1_000,
        event_time: WallTime(envelope.created_ms),
        created: envelope.created_ms / 1_000,
        created_time: WallTime(envelope.created_ms),
        num_attempts: 0,
        bounce_classification: BounceClass::Uncategorized,
        egress_pool: if_any(&envelope.egress_pool),
        egress_source: None,
        source_address: None,
        feedback_report: None,
        delivery_protocol: None,
        reception_protocol: if_any(envelope.reception_protocol()),
        nodeid: *node,
        tls_cipher: None,
        tls_protocol_version: None,
        tls_verified_by: None,
        tls_peer_subject_name: Vec::new(),
        session_id: (envelope.session_id != 0).then(|| node.session(envelope.session_id)),
        tenant: if_any(&envelope.tenant),
        campaign: if_any(&envelope.campaign),
        meta: Pairs(&envelope.meta),
        headers: Pairs(&envelope.headers),
        due_ms: None,
        at_ms: envelope.created_ms,
        created_ms: envelope.created_ms,
    }
}

fn from_result<'a>(event_id: EventId, outcome: &'a Outcome, result: &'a RecipientResult, node: &NodeId) -> Event<'a> {
    let kind = EventKind::from(result.fate);
    let failure = kind.is_failure();
    let (tls_protocol, tls_verified_by) = outcome.tls_protocol();
    let (tls_cipher, tls_peer_subject) = outcome.tls_cipher();
    Event {
        kind,
        id: MessageId::from_raw(outcome.message),
        event_id,
        sender: &outcome.reverse_path,
        recipient: &result.recipient,
        queue: Queue::Named(&result.queue),
        site: &outcome.site,
        size: outcome.size,
        response: Response::new(&result.answer),
        peer_address: PeerAddress::server(&outcome.peer_name, &outcome.peer_address),
        timestamp: outcome.at_ms / 1_000,
        event_time: WallTime(outcome.at_ms),
        created: outcome.created_ms / 1_000,
        created_time: WallTime(outcome.created_ms),
        num_attempts: result.attempts,
        bounce_classification: if failure { classify(&result.answer) } else { BounceClass::Uncategorized },
        egress_pool: if_any(&outcome.egress_pool),
        egress_source: if_any(&outcome.egress_source),
        source_address: if_any(&outcome.source_address).map(|address| SourceAddress { address }),
        feedback_report: None,
        delivery_protocol: if_any(&outcome.delivery_protocol),
        reception_protocol: if_any(&outcome.reception_protocol),
        nodeid: *node,
        tls_cipher: if_any(tls_cipher),
        tls_protocol_version: if_any(tls_protocol),
        tls_verified_by: if_any(tls_verified_by),
        tls_peer_subject_name: tls_peer_subject.collect(),
        session_id: (outcome.session_id != 0).then(|| node.session(outcome.session_id)),
        tenant: if_any(&outcome.tenant),
        campaign: if_any(&outcome.campaign),
        meta: Pairs(&outcome.meta),
        headers: Pairs(&outcome.headers),
        due_ms: if let Fate::Deferred { due_ms } = result.fate { Some(due_ms) } else { None },
        at_ms: outcome.at_ms,
        created_ms: outcome.created_ms,
    }
}

/// Appends the event as one line, ended by LF.
pub fn write_line(event: &Event<'_>, out: &mut Vec<u8>) {
    serde_json::to_writer(&mut *out, event).expect("a Vec takes all bytes and every key is a string");
    out.push(b'\n');
}

/// An event that owns what it tells: what subscribers get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    pub event_id: EventId,
    pub kind: EventKind,
    pub message: MessageId,
    pub sender: String,
    pub recipient: String,
    pub queue: String,
    pub site: String,
    pub egress_source: String,
    /// With its port; empty where nothing was connected.
    pub source_address: String,
    pub code: u16,
    /// RFC 3463 class, subject, detail.
    pub enhanced: Option<(u8, u16, u16)>,
    pub text: String,
    pub command: String,
    /// Attempts made so far.
    pub attempts: u32,
    pub at_ms: u64,
    pub created_ms: u64,
    /// Of a TransientFailure: when the next attempt is due.
    pub due_ms: Option<u64>,
    pub size: u64,
    pub tenant: String,
    pub campaign: String,
    json: Box<str>,
}

impl EventRecord {
    /// `line` is what [`write_line`] made of the same event.
    pub(crate) fn new(event: &Event<'_>, line: &[u8]) -> Self {
        let owned = |text: Option<&str>| text.unwrap_or_default().to_owned();
        Self {
            event_id: event.event_id,
            kind: event.kind,
            message: event.id,
            sender: event.sender.to_owned(),
            recipient: event.recipient.to_owned(),
            queue: event.queue.to_string(),
            site: event.site.to_owned(),
            egress_source: owned(event.egress_source),
            source_address: owned(event.source_address.as_ref().map(|source| source.address)),
            code: event.response.code,
            enhanced: event.response.enhanced_code.map(|code| (code.class, code.subject, code.detail)),
            text: event.response.content.to_owned(),
            command: owned(event.response.command),
            attempts: event.num_attempts,
            at_ms: event.at_ms,
            created_ms: event.created_ms,
            due_ms: event.due_ms,
            size: event.size,
            tenant: owned(event.tenant),
            campaign: owned(event.campaign),
            json: String::from_utf8_lossy(line.trim_ascii_end()).into(),
        }
    }

    /// The line that the event log has for it, without its line ending.
    pub fn to_json(&self) -> &str {
        &self.json
    }
}

#[derive(Debug, Clone, Copy)]
enum Queue<'a> {
    Named(&'a str),
    Parts { campaign: &'a str, tenant: &'a str, recipient: &'a str },
}

impl fmt::Display for Queue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Named(name) => f.write_str(name),
            Self::Parts { campaign, tenant, recipient } => {
                QueueName { campaign, tenant, domain: &queue_domain(recipient) }.fmt(f)
            }
        }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Response<'a> {
    code: u16,
    enhanced_code: Option<EnhancedCode>,
    content: &'a str,
    command: Option<&'a str>,
}

impl<'a> Response<'a> {
    fn new(answer: &'a Answer) -> Self {
        Self {
            code: answer.code,
            enhanced_code: answer.enhanced.map(|(class, subject, detail)| EnhancedCode { class, subject, detail }),
            content: &answer.text,
            command: if_any(&answer.command),
        }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
struct EnhancedCode {
    class: u8,
    subject: u16,
    detail: u16,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PeerAddress<'a> {
    name: &'a str,
    #[serde(serialize_with = "as_text")]
    addr: PeerHost<'a>,
}

impl<'a> PeerAddress<'a> {
    /// A client's port says nothing, so only its IP address is told.
    fn client(name: &'a str, address: &'a str) -> Option<Self> {
        Self::new(name, address, |_| false)
    }

    /// A server's port is told unless it is the one that everybody expects.
    fn server(name: &'a str, address: &'a str) -> Option<Self> {
        Self::new(name, address, |port| port != SMTP_PORT)
    }

    fn new(name: &'a str, address: &'a str, tells_port: impl Fn(u16) -> bool) -> Option<Self> {
        if name.is_empty() && address.is_empty() {
            return None;
        }
        let addr = match address.parse::<SocketAddr>() {
            Ok(socket) if !tells_port(socket.port()) => PeerHost::Ip(socket.ip()),
            _ => PeerHost::AsGiven(address),
        };
        Some(Self { name, addr })
    }
}

#[derive(Debug, Clone, Copy)]
enum PeerHost<'a> {
    Ip(std::net::IpAddr),
    AsGiven(&'a str),
}

impl fmt::Display for PeerHost<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::AsGiven(text) => f.write_str(text),
        }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
struct SourceAddress<'a> {
    address: &'a str,
}

/// An object of strings; a name that occurs several times gets an array of its values.
#[derive(Debug, Clone, Copy)]
struct Pairs<'a>(&'a [(String, String)]);

impl Serialize for Pairs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (place, (name, value)) in self.0.iter().enumerate() {
            let same = |pair: &&(String, String)| pair.0.eq_ignore_ascii_case(name);
            if self.0[..place].iter().any(|pair| same(&pair)) {
                continue;
            }
            if self.0[place + 1..].iter().any(|pair| same(&pair)) {
                let values: Vec<&str> = self.0[place..].iter().filter(same).map(|(_, value)| value.as_str()).collect();
                map.serialize_entry(name, &values)?;
            } else {
                map.serialize_entry(name, value)?;
            }
        }
        map.end()
    }
}

fn if_any(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// Formats first, since the serializer would look for what must be escaped in each piece by itself.
fn as_text<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    let mut text = ShortText { octets: [0; 64], length: 0 };
    match write!(text, "{value}") {
        Ok(()) => serializer.serialize_str(text.as_str()),
        Err(fmt::Error) => serializer.collect_str(value),
    }
}

fn as_text_if_any<T: fmt::Display, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => as_text(value, serializer),
        None => serializer.serialize_none(),
    }
}

/// Text of at most 64 octets; more does not fit and is an error.
struct ShortText {
    octets: [u8; 64],
    length: usize,
}

impl ShortText {
    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.octets[..self.length]).expect("it was written as text")
    }
}

impl fmt::Write for ShortText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let rest = &mut self.octets[self.length..];
        rest.get_mut(..text.len()).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.length += text.len();
        Ok(())
    }
}

const SMTP_PORT: u16 = 25;

#[cfg(test)]
pub(crate) mod tests {
    use postrider_spool::record::Recipient;

    use super::*;

    pub(crate) const NODE: NodeId =
        NodeId([0x55, 0x7f, 0x3a, 0xd4, 0x2c, 0x8c, 0x41, 0xee, 0x97, 0x6e, 0x78, 0x2d, 0x7e, 0x12, 0xe1, 0x73]);

    pub(crate) fn message(log: u16, sequence: u64, recipients: &[&str]) -> LoggedRecord {
        let envelope = Envelope {
            reverse_path: "news@acme.example".into(),
            recipients: recipients.iter().map(|&address| Recipient { address: address.into() }).collect(),
            tenant: "acme".into(),
            campaign: "spring".into(),
            egress_pool: "shared".into(),
            created_ms: 1_795_000_000_123,
            reception_protocol: "ESMTP".into(),
            client_address: "192.0.2.7:40112".into(),
            client_name: "app.acme.example".into(),
            session_id: 0x1234,
            headers: vec![
                ("Subject".into(), "Grüße \"1\"".into()),
                ("X-Customer-Tag".into(), "a".into()),
                ("x-customer-tag".into(), "b".into()),
            ],
            meta: vec![("customer".into(), "17".into())],
            ..Envelope::default()
        };
        LoggedRecord {
            log: LogId(log),
            sequence: Sequence(sequence),
            record: Logged::Message { envelope: Box::new(envelope), size: 1_047 },
        }
    }

    pub(crate) fn outcome(log: u16, sequence: u64, message: MessageId, fates: &[Fate]) -> LoggedRecord {
        let results = fates.iter().zip(0..).map(|(&fate, index)| RecipientResult {
            index,
            recipient: format!("r{index}@example.net"),
            queue: "spring:acme@example.net".into(),
            fate,
            attempts: 3,
            answer: Answer {
                code: 550,
                enhanced: Some((5, 1, 1)),
                text: "No such user".into(),
                command: format!("RCPT TO:<r{index}@example.net>"),
            },
        });
        let outcome = Outcome {
            message: message.to_raw(),
            at_ms: 1_795_000_060_007,
            results: results.collect(),
            reverse_path: "news@acme.example".into(),
            tenant: "acme".into(),
            campaign: "spring".into(),
            egress_pool: "shared".into(),
            created_ms: 1_795_000_000_123,
            size: 1_047,
            reception_protocol: "ESMTP".into(),
            site: "mx.example.net".into(),
            peer_name: "mx1.example.net".into(),
            peer_address: "198.51.100.4:25".into(),
            egress_source: "ip-a".into(),
            source_address: "203.0.113.11:51000".into(),
            delivery_protocol: "ESMTP".into(),
            tls_protocol: "TLSv1.3\ndane".into(),
            tls_cipher: "TLS_AES_256_GCM_SHA384\nO=Example, Inc.\nCN=mx.example.net".into(),
            session_id: 0xab,
            ..Outcome::default()
        };
        LoggedRecord { log: LogId(log), sequence: Sequence(sequence), record: Logged::Outcome(Box::new(outcome)) }
    }

    pub(crate) fn lines(record: &LoggedRecord) -> Vec<String> {
        let mut out = Vec::new();
        for event in events(record, &NODE) {
            write_line(&event, &mut out);
        }
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_reception_is_golden() {
        let lines = lines(&message(1, 0x2a, &["r0@example.net", "r1@example.org"]));
        assert_eq!(lines.len(), 2);
        assert_eq!(
            lines[0],
            concat!(
                r#"{"type":"Reception","id":"000100000000002a","event_id":"0001-00000000002a-0","#,
                r#""sender":"news@acme.example","recipient":"r0@example.net","#,
                r#""queue":"spring:acme@example.net","site":"","size":1047,"#,
                r#""response":{"code":250,"enhanced_code":null,"content":"","command":null},"#,
                r#""peer_address":{"name":"app.acme.example","addr":"192.0.2.7"},"#,
                r#""timestamp":1795000000,"event_time":"2026-11-18T11:06:40.123Z","#,
                r#""created":1795000000,"created_time":"2026-11-18T11:06:40.123Z","num_attempts":0,"#,
                r#""bounce_classification":"Uncategorized","egress_pool":"shared","egress_source":null,"#,
                r#""source_address":null,"feedback_report":null,"delivery_protocol":null,"#,
                r#""reception_protocol":"ESMTP","nodeid":"557f3ad4-2c8c-41ee-976e-782d7e12e173","#,
                r#""session_id":"557f3ad4-2c8c-81ee-8000-000000001234","tenant":"acme","campaign":"spring","#,
                r#""meta":{"customer":"17"},"headers":{"Subject":"Grüße \"1\"","X-Customer-Tag":["a","b"]}}"#,
            )
        );
        assert!(lines[1].contains(r#""event_id":"0001-00000000002a-1""#));
        assert!(lines[1].contains(r#""recipient":"r1@example.org","queue":"spring:acme@example.org""#));
    }

    #[test]
    fn a_bounce_is_golden() {
        let id = MessageId::new(LogId(1), Sequence(0x2a));
        let lines = lines(&outcome(1, 0x2b, id, &[Fate::Bounced]));
        assert_eq!(
            lines,
            [concat!(
                r#"{"type":"Bounce","id":"000100000000002a","event_id":"0001-00000000002b-0","#,
                r#""sender":"news@acme.example","recipient":"r0@example.net","#,
                r#""queue":"spring:acme@example.net","site":"mx.example.net","size":1047,"#,
                r#""response":{"code":550,"enhanced_code":{"class":5,"subject":1,"detail":1},"#,
                r#""content":"No such user","command":"RCPT TO:<r0@example.net>"},"#,
                r#""peer_address":{"name":"mx1.example.net","addr":"198.51.100.4"},"#,
                r#""timestamp":1795000060,"event_time":"2026-11-18T11:07:40.007Z","#,
                r#""created":1795000000,"created_time":"2026-11-18T11:06:40.123Z","num_attempts":3,"#,
                r#""bounce_classification":"InvalidRecipient","egress_pool":"shared","egress_source":"ip-a","#,
                r#""source_address":{"address":"203.0.113.11:51000"},"feedback_report":null,"#,
                r#""delivery_protocol":"ESMTP","reception_protocol":"ESMTP","#,
                r#""nodeid":"557f3ad4-2c8c-41ee-976e-782d7e12e173","tls_cipher":"TLS_AES_256_GCM_SHA384","#,
                r#""tls_protocol_version":"TLSv1.3","tls_verified_by":"dane","#,
                r#""tls_peer_subject_name":["O=Example, Inc.","CN=mx.example.net"],"#,
                r#""session_id":"557f3ad4-2c8c-81ee-8000-0000000000ab","#,
                r#""tenant":"acme","campaign":"spring","meta":{},"headers":{}}"#,
            )]
        );
    }

    /// docs/events.md has each field, each type and each class.
    #[test]
    fn the_document_is_whole() {
        let document = include_str!("../../docs/events.md");
        let said = |word: &str| assert!(document.contains(&format!("`{word}`")), "docs/events.md lacks {word}");
        let id = MessageId::new(LogId(1), Sequence(1));
        let fates = [Fate::Deferred { due_ms: 9 }, Fate::Delivered, Fate::Bounced, Fate::Expired, Fate::AdminBounced];
        for line in lines(&outcome(1, 2, id, &fates)).into_iter().chain(lines(&message(1, 1, &["a@example.net"]))) {
            let value: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&line).unwrap();
            value.keys().for_each(|key| said(key));
            said(value["type"].as_str().unwrap());
        }
        let classes = include_str!("classify.rs").split("pub enum BounceClass {").nth(1).unwrap();
        let classes = classes.split('}').next().unwrap().lines().map(str::trim);
        let classes: Vec<_> = classes.filter(|line| !line.is_empty() && !line.starts_with("//")).collect();
        assert!(classes.len() > 20, "{classes:?}");
        classes.iter().for_each(|class| said(class.trim_end_matches(',')));
    }

    /// What ends without a connection was in none of its sessions.
    #[test]
    fn without_a_session_none_is_told() {
        let mut record = outcome(1, 2, MessageId::new(LogId(1), Sequence(1)), &[Fate::Expired]);
        if let Logged::Outcome(outcome) = &mut record.record {
            outcome.session_id = 0;
        }
        assert!(!lines(&record)[0].contains("session_id"));
    }

    #[test]
    fn each_fate_has_its_kind_and_only_failures_are_classified() {
        let id = MessageId::new(LogId(1), Sequence(1));
        let fates = [Fate::Deferred { due_ms: 9 }, Fate::Delivered, Fate::Bounced, Fate::Expired, Fate::AdminBounced];
        let record = outcome(1, 2, id, &fates);
        let kinds: Vec<_> = events(&record, &NODE).map(|event| event.kind).collect();
        use EventKind::*;
        assert_eq!(kinds, [TransientFailure, Delivery, Bounce, Expiration, AdminBounce]);
        for (event, fate) in events(&record, &NODE).zip(fates) {
            assert_eq!(event.kind.is_final(), fate.is_final());
            let classified = event.bounce_classification != BounceClass::Uncategorized;
            assert_eq!(classified, event.kind != Delivery, "{fate:?}");
        }
        assert_eq!(events(&record, &NODE).next().unwrap().due_ms, Some(9));
    }

    #[test]
    fn every_line_is_json_on_one_line_whatever_the_peer_said() {
        let id = MessageId::new(LogId(1), Sequence(1));
        let mut record = outcome(1, 2, id, &[Fate::Bounced]);
        let Logged::Outcome(outcome) = &mut record.record else { unreachable!() };
        outcome.results[0].answer.text = "a\r\n\u{0}\"\\{}\u{2028}b".into();
        outcome.peer_address = "not an address".into();
        outcome.at_ms = u64::MAX;
        outcome.results[0].queue = "q".repeat(65);
        let lines = lines(&record);
        assert_eq!(lines.len(), 1);
        let value: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(value["response"]["content"], "a\r\n\u{0}\"\\{}\u{2028}b");
        assert_eq!(value["peer_address"]["addr"], "not an address");
        assert_eq!(value["queue"], "q".repeat(65));
        assert_eq!(value["event_time"], "9999-12-30T22:00:00.999Z");
    }

    #[test]
    fn a_port_is_told_when_it_says_something() {
        let told = |address| {
            let (client, server) = (PeerAddress::client("n", address), PeerAddress::server("n", address));
            [client.unwrap().addr.to_string(), server.unwrap().addr.to_string()]
        };
        assert_eq!(told("127.0.0.1:2526"), ["127.0.0.1", "127.0.0.1:2526"]);
        assert_eq!(told("[2001:db8::1]:25"), ["2001:db8::1", "2001:db8::1"]);
        assert_eq!(told("/run/lmtp.sock"), ["/run/lmtp.sock", "/run/lmtp.sock"]);
        assert!(PeerAddress::server("", "").is_none());
    }
}
