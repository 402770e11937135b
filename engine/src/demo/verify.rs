//! Whether what arrived is what was sent, and how often: the demo's judge.
//!
//! A [`Verifier`] looks at one message: envelope, octets, added fields, both signatures. A [`Tally`] keeps the books
//! over all of them, and at the end names everything that is missing, doubled or wrong.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mail_auth::common::parse::TxtRecordParser;
use mail_auth::common::verify::DomainKey;
use mail_auth::{AuthenticatedMessage, DkimOutput, DkimResult, DnsError, MessageAuthenticator, ResolverCache, Txt};
use postrider_spool::record::MessageId;

use super::message::{ADDED_WHERE_MISSING, Generated, Generator, NUMBER_FIELD};
use crate::config::DkimIdentity;
use crate::mail::header::{self, Field};
use crate::outcome::event::EventKind;

/// A message as the sink got it.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    /// On the run's clock.
    pub(crate) at: Duration,
    pub(crate) reverse_path: String,
    pub(crate) recipients: Vec<String>,
    pub(crate) content: Vec<u8>,
}

/// What a verifier found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// None: it can't be told which message this is, or was.
    pub(crate) number: Option<u32>,
    pub(crate) at: Duration,
    /// Empty: it is right.
    pub(crate) faults: Vec<String>,
}

/// Judges messages one by one, without network: the published keys are known.
pub(crate) struct Verifier {
    generator: Generator,
    selectors: Vec<String>,
    keys: PublishedKeys,
    authenticator: MessageAuthenticator,
    runtime: tokio::runtime::Runtime,
}

impl Verifier {
    /// `identities`: each is to have signed every message, once.
    pub(crate) fn new(generator: Generator, identities: &[DkimIdentity]) -> Result<Self, String> {
        let error = |error: &dyn fmt::Display| format!("the verifier can't start: {error}");
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|reason| error(&reason))?;
        // Its resolver is never asked: `PublishedKeys` has an answer for every name.
        let authenticator = {
            let _guard = runtime.enter();
            MessageAuthenticator::new_google().map_err(|reason| error(&reason))?
        };
        Ok(Self {
            generator,
            selectors: identities.iter().map(|identity| identity.selector.clone()).collect(),
            keys: PublishedKeys::new(identities).map_err(|reason| error(&reason))?,
            authenticator,
            runtime,
        })
    }

    pub(crate) fn verify(&self, arrival: &Arrival) -> Verdict {
        let number = self.generator.number_of(&arrival.content).or_else(|| recipient_number(arrival));
        let mut faults = Vec::new();
        match number {
            Some(number) => {
                let sent = self.generator.message(number);
                check_envelope(&sent, arrival, &mut faults);
                check_content(&sent, &arrival.content, &mut faults);
            }
            None => faults.push("it does not bear the number of any message".to_owned()),
        }
        self.check_signatures(&arrival.content, &mut faults);
        Verdict { number, at: arrival.at, faults }
    }

    fn check_signatures(&self, content: &[u8], faults: &mut Vec<String>) {
        let Some(message) = AuthenticatedMessage::parse(content) else {
            faults.push("it can't be parsed to verify its signatures".to_owned());
            return;
        };
        let parameters = mail_auth::Parameters::from(&message).with_txt_cache(&self.keys);
        let results = self.runtime.block_on(self.authenticator.verify_dkim(parameters));
        for selector in &self.selectors {
            let made_by = |result: &&DkimOutput<'_>| result.signature().is_some_and(|made| made.s == *selector);
            match results.iter().filter(made_by).collect::<Vec<_>>()[..] {
                [] => faults.push(format!("it has no DKIM signature {selector}")),
                [result] if *result.result() == DkimResult::Pass => {}
                [result] => faults.push(format!("its DKIM signature {selector} is wrong: {}", reason(result.result()))),
                _ => faults.push(format!("it has several DKIM signatures {selector}")),
            }
        }
        if results.len() > self.selectors.len() {
            faults.push(format!("it has {} DKIM signatures", results.len()));
        }
    }
}

/// Where the content does not tell: its recipient does, `m<number>@…`.
fn recipient_number(arrival: &Arrival) -> Option<u32> {
    arrival.recipients.first()?.strip_prefix('m')?.split_once('@')?.0.parse().ok()
}

fn check_envelope(sent: &Generated, arrival: &Arrival, faults: &mut Vec<String>) {
    if arrival.reverse_path != sent.reverse_path {
        faults.push(format!("it came from <{}>, but was sent from <{}>", arrival.reverse_path, sent.reverse_path));
    }
    if arrival.recipients != [sent.recipient.as_str()] {
        faults.push(format!("it came to <{}>, but was sent to <{}>", arrival.recipients.join(">, <"), sent.recipient));
    }
}

fn check_content(sent: &Generated, content: &[u8], faults: &mut Vec<String>) {
    // The number is the first field of what was sent; the engine's fields are in front of it.
    let start = header::fields(content).find(|field| field.is(NUMBER_FIELD)).map_or(0, |field| field.start);
    let expected = sent.expected();
    if content[start..] != expected {
        faults.push(difference(&expected, &content[start..]));
    }
    let added: Vec<Field<'_>> = header::fields(content).take_while(|field| field.start < start).collect();
    let count = |name: &str| added.iter().filter(|field| field.is(name)).count();
    if !added.first().is_some_and(|field| field.is("Received")) || count("Received") != 1 {
        faults.push("it does not have one new Received field, on top".to_owned());
    }
    for name in ADDED_WHERE_MISSING {
        let wanted = usize::from(sent.missing.contains(&name));
        if count(name) != wanted {
            faults.push(format!("{} {name} fields were added instead of {wanted}", count(name)));
        }
    }
    if count("X-Postrider-Ref") != 1 {
        faults.push("it does not have one X-Postrider-Ref field".to_owned());
    }
    let known = ["Received", "DKIM-Signature", "Date", "Message-ID", "X-Postrider-Ref"];
    for field in added.iter().filter(|field| !known.iter().any(|name| field.is(name))) {
        faults.push(format!("a field {} was added", String::from_utf8_lossy(field.name)));
    }
}

/// Where two contents part, for a human.
fn difference(expected: &[u8], arrived: &[u8]) -> String {
    let at = expected.iter().zip(arrived).position(|(a, b)| a != b).unwrap_or(expected.len().min(arrived.len()));
    let part = if at < header::body_start(expected) { "header" } else { "body" };
    let show = |content: &[u8]| match &content[at..] {
        [] => "the end".to_owned(),
        rest => format!("\"{}\"", rest[..rest.len().min(SHOWN_OCTETS)].escape_ascii()),
    };
    format!("its {part} differs at octet {at}: sent {}, arrived {}", show(expected), show(arrived))
}

fn reason(result: &DkimResult) -> String {
    match result {
        DkimResult::Neutral(error)
        | DkimResult::Fail(error)
        | DkimResult::PermError(error)
        | DkimResult::TempError(error) => error.to_string(),
        DkimResult::Pass | DkimResult::None => "no result".to_owned(),
    }
}

/// DNS as a map that knows of everything whether it exists, so that no query leaves this machine.
struct PublishedKeys(HashMap<Box<str>, Txt>);

impl PublishedKeys {
    fn new(identities: &[DkimIdentity]) -> Result<Self, String> {
        let mut keys = HashMap::new();
        for identity in identities {
            let (name, record) = identity.dns_record();
            let key = DomainKey::parse(record.as_bytes()).map_err(|error| format!("{name}: {error}"))?;
            keys.insert(format!("{name}.").into_boxed_str(), Txt::DomainKey(Arc::new(key)));
        }
        Ok(Self(keys))
    }
}

impl ResolverCache<Box<str>, Txt> for PublishedKeys {
    fn get<Q: Hash + Eq + ?Sized>(&self, name: &Q) -> Option<Txt>
    where
        Box<str>: Borrow<Q>,
    {
        let missing = || Txt::Error(mail_auth::Error::Dns(DnsError::Resolver("no such key".to_owned())));
        Some(self.0.get(name).cloned().unwrap_or_else(missing))
    }

    fn remove<Q: Hash + Eq + ?Sized>(&self, _name: &Q) -> Option<Txt>
    where
        Box<str>: Borrow<Q>,
    {
        None
    }

    fn insert(&self, _name: Box<str>, _key: Txt, _valid_until: Instant) {}
}

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// None: not about one message of this run.
    pub(crate) number: Option<u32>,
    pub(crate) what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            Some(number) => write!(f, "message {number}: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// The books of a run.
#[derive(Debug)]
pub(crate) struct Tally {
    messages: Vec<Entry>,
    events: HashMap<MessageId, EventCounts>,
    strays: Vec<Problem>,
    pub(crate) content_bytes: u64,
    pub(crate) accepted: u32,
    /// Distinct messages that arrived, right or not.
    pub(crate) arrived: u32,
    /// Answers 4xx to a sender, which then tried again.
    pub(crate) postponed: u64,
    /// Deliveries that were tried and put off.
    pub(crate) transient_failures: u64,
    pub(crate) receptions: u64,
    pub(crate) deliveries: u64,
    pub(crate) accepted_at: Duration,
    pub(crate) arrived_at: Duration,
}

#[derive(Debug, Clone, Default)]
struct Entry {
    sent_at: Option<Duration>,
    accepted: Option<MessageId>,
    accepted_after: Duration,
    /// The last refusal, or what else came between.
    refusal: Option<String>,
    arrivals: u32,
    arrived_after: Duration,
    faults: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default)]
struct EventCounts {
    receptions: u32,
    deliveries: u32,
}

/// How far a run is. Any change is progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Progress {
    pub(crate) accepted: u32,
    pub(crate) delivered: u64,
    pub(crate) arrived: u32,
    events: u64,
}

impl Tally {
    pub(crate) fn new(messages: u32) -> Self {
        Self {
            messages: vec![Entry::default(); messages as usize],
            events: HashMap::with_capacity(messages as usize),
            strays: Vec::new(),
            content_bytes: 0,
            accepted: 0,
            arrived: 0,
            postponed: 0,
            transient_failures: 0,
            receptions: 0,
            deliveries: 0,
            accepted_at: Duration::ZERO,
            arrived_at: Duration::ZERO,
        }
    }

    /// Its content begins to go to the engine.
    pub(crate) fn send(&mut self, number: u32, content_bytes: usize, at: Duration) {
        if self.messages[number as usize].sent_at.replace(at).is_none() {
            self.content_bytes += content_bytes as u64;
        }
    }

    /// The engine said 250.
    pub(crate) fn accept(&mut self, number: u32, id: MessageId, at: Duration) {
        let entry = &mut self.messages[number as usize];
        assert!(entry.accepted.is_none(), "a sender sends each message until it is accepted");
        entry.accepted = Some(id);
        entry.accepted_after = at.saturating_sub(entry.sent_at.unwrap_or(at));
        self.accepted += 1;
        self.accepted_at = self.accepted_at.max(at);
    }

    /// The engine did not take it, this time.
    pub(crate) fn refuse(&mut self, number: u32, why: String, again: bool) {
        self.postponed += u64::from(again);
        self.messages[number as usize].refusal = Some(why);
    }

    /// Something that concerns no single message.
    pub(crate) fn note(&mut self, what: String) {
        if self.strays.len() < STRAYS_MAX {
            self.strays.push(Problem { number: None, what });
        }
    }

    /// The sink got something.
    pub(crate) fn arrive(&mut self, verdict: Verdict) {
        let entry = verdict.number.and_then(|number| self.messages.get_mut(number as usize));
        let Some(entry) = entry else {
            self.note(format!("something arrived that was not sent: {}", verdict.faults.join("; ")));
            return;
        };
        if entry.arrivals == 0 {
            entry.arrived_after = verdict.at.saturating_sub(entry.sent_at.unwrap_or(verdict.at));
            self.arrived += 1;
            self.arrived_at = self.arrived_at.max(verdict.at);
        }
        entry.arrivals += 1;
        entry.faults.extend(verdict.faults);
    }

    /// The event log said something.
    pub(crate) fn event(&mut self, kind: EventKind, id: MessageId, text: &str) {
        let counts = self.events.entry(id).or_default();
        match kind {
            EventKind::Reception => {
                counts.receptions += 1;
                self.receptions += 1;
            }
            EventKind::Delivery => {
                counts.deliveries += 1;
                self.deliveries += 1;
            }
            EventKind::TransientFailure => self.transient_failures += 1,
            other => self.note(format!("event {other} of {id}: {text}")),
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        Progress {
            accepted: self.accepted,
            delivered: self.deliveries,
            arrived: self.arrived,
            events: self.receptions + self.deliveries + self.transient_failures,
        }
    }

    /// Everything accepted has arrived and is in the event log.
    pub(crate) fn is_settled(&self) -> bool {
        let accepted = u64::from(self.accepted);
        self.arrived >= self.accepted && self.receptions >= accepted && self.deliveries >= accepted
    }

    /// How many messages were accepted, arrived once, are right, and have one Reception and one Delivery.
    pub(crate) fn verified(&self) -> u32 {
        let right = |entry: &&Entry| self.problem(entry).is_none();
        u32::try_from(self.messages.iter().filter(right).count()).expect("a run has fewer than 2^32 messages")
    }

    /// All that is wrong, by message.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let of_messages = (0..)
            .zip(&self.messages)
            .filter_map(|(number, entry)| self.problem(entry).map(|what| Problem { number: Some(number), what }));
        let mut problems: Vec<Problem> = of_messages.collect();
        problems.extend(self.strays.iter().cloned());
        let ids: HashSet<MessageId> = self.messages.iter().filter_map(|entry| entry.accepted).collect();
        let unknown = self.events.keys().filter(|id| !ids.contains(id)).count();
        if unknown > 0 {
            problems
                .push(Problem { number: None, what: format!("{unknown} ids in the event log were never given out") });
        }
        if ids.len() < self.accepted as usize {
            problems.push(Problem { number: None, what: "an id was given to several messages".to_owned() });
        }
        problems
    }

    /// Sorted: content sent to 250; content sent to the whole message at the sink.
    pub(crate) fn latencies(&self) -> (Vec<Duration>, Vec<Duration>) {
        let accepted = self.messages.iter().filter(|entry| entry.accepted.is_some());
        let mut acceptance: Vec<Duration> = accepted.map(|entry| entry.accepted_after).collect();
        let arrived = self.messages.iter().filter(|entry| entry.arrivals > 0);
        let mut end_to_end: Vec<Duration> = arrived.map(|entry| entry.arrived_after).collect();
        acceptance.sort_unstable();
        end_to_end.sort_unstable();
        (acceptance, end_to_end)
    }

    fn problem(&self, entry: &Entry) -> Option<String> {
        let mut what = Vec::new();
        match (entry.accepted, &entry.refusal) {
            (Some(id), _) => {
                let counts = self.events.get(&id).copied().unwrap_or_default();
                match entry.arrivals {
                    0 => what.push(format!("missing: it was accepted as {id} and did not arrive")),
                    1 => {}
                    times => what.push(format!("doubled: it arrived {times} times")),
                }
                if (counts.receptions, counts.deliveries) != (1, 1) {
                    let (receptions, deliveries) = (counts.receptions, counts.deliveries);
                    what.push(format!("the event log has {receptions} Reception and {deliveries} Delivery of {id}"));
                }
            }
            (None, Some(refusal)) => what.push(format!("not accepted: {refusal}")),
            (None, None) if entry.sent_at.is_some() => {
                what.push("not accepted: it was not answered in time".to_owned())
            }
            (None, None) => what.push("not accepted: it was not sent in time".to_owned()),
        }
        if entry.accepted.is_none() && entry.arrivals > 0 {
            what.push(format!("it arrived all the same, {} times", entry.arrivals));
        }
        what.extend(entry.faults.iter().map(|fault| format!("wrong: {fault}")));
        (!what.is_empty()).then(|| what.join("; "))
    }
}

const SHOWN_OCTETS: usize = 24;
/// Problems kept that concern no single message.
const STRAYS_MAX: usize = 1_000;

#[cfg(test)]
mod tests;
