//! Outcomes and states as records hold them (schema 2): every field, one behind the other, in Postcard's wire format.
//!
//! There are more of them than of messages, and they are read only at a start and when what they tell is copied; so
//! they are made small. (Envelopes are read at each attempt, in place, and stay rkyv archives.) What a field repeats is
//! left out: the message, which the record's header names; the domain at a queue's end, which is the recipient's; the
//! peer's name where it is the site's.
//!
//! Nothing here trusts what it decodes: anything but the whole of what was written is refused.

use std::borrow::Cow;
use std::mem;

use rkyv::rancor::Failure;
use serde::{Deserialize, Serialize};

use crate::format::TOMBSTONES_SCHEMA;
use crate::record::{Answer, ArchivedCopiedState, ArchivedOutcome, CopiedState, Fate, Outcome, RecipientResult};
use crate::tombstone::Final;

/// Appends an outcome.
pub(crate) fn write_outcome(outcome: &Outcome, buffer: &mut Vec<u8>) {
    let packed = PackedOutcome {
        at_ms: outcome.at_ms,
        results: outcome.results.iter().map(PackedResult::from).collect(),
        reverse_path: &outcome.reverse_path,
        tenant: &outcome.tenant,
        campaign: &outcome.campaign,
        egress_pool: &outcome.egress_pool,
        created_ms: outcome.created_ms,
        size: outcome.size,
        reception_protocol: &outcome.reception_protocol,
        headers: Cow::Borrowed(&outcome.headers),
        meta: Cow::Borrowed(&outcome.meta),
        site: &outcome.site,
        peer_name: (outcome.peer_name != outcome.site).then_some(&outcome.peer_name),
        peer_address: &outcome.peer_address,
        egress_source: &outcome.egress_source,
        source_address: &outcome.source_address,
        delivery_protocol: &outcome.delivery_protocol,
        tls_protocol: &outcome.tls_protocol,
        tls_cipher: &outcome.tls_cipher,
        session_id: outcome.session_id,
    };
    write(&packed, buffer);
}

/// Appends a state.
pub(crate) fn write_state(state: &CopiedState, buffer: &mut Vec<u8>) {
    let packed = PackedState {
        recipients: state.recipients,
        finished: Cow::Borrowed(&state.finished),
        deferred: state.deferred.iter().map(PackedResult::from).collect(),
    };
    write(&packed, buffer);
}

/// Appends tombstones, which are sorted: fewer messages than recipients.
pub(crate) fn write_tombstones(finals: &[Final], buffer: &mut Vec<u8>) {
    let mut before = 0;
    let packed: Vec<PackedTombstone> = finals
        .chunk_by(|(one, _), (other, _)| one == other)
        .map(|finals| {
            let sequence = finals[0].0;
            let distance = sequence - mem::replace(&mut before, sequence);
            PackedTombstone { distance, recipients: finals.iter().map(|(_, index)| *index).collect() }
        })
        .collect();
    write(&packed, buffer);
}

/// Messages with their recipients; `None` where the bytes are none.
pub(crate) fn read_tombstones(schema: u8, bytes: &[u8]) -> Option<Vec<(u64, Vec<u32>)>> {
    if schema != TOMBSTONES_SCHEMA {
        return None;
    }
    let mut sequence = 0_u64;
    let unpack = |packed: PackedTombstone| {
        sequence = sequence.checked_add(packed.distance)?;
        Some((sequence, packed.recipients))
    };
    read::<Vec<PackedTombstone>>(bytes)?.into_iter().map(unpack).collect()
}

/// An outcome about `message`; `None` where the bytes are none.
pub(crate) fn read_outcome(schema: u8, message: u64, bytes: &[u8]) -> Option<Outcome> {
    match schema {
        1 => {
            let archived = rkyv::access::<ArchivedOutcome, Failure>(bytes).ok()?;
            (archived.message == message).then(|| archived.to_outcome())
        }
        2 => read::<PackedOutcome<'_>>(bytes).map(|packed| packed.unpack(message)),
        _ => None,
    }
}

/// The same for a state.
pub(crate) fn read_state(schema: u8, bytes: &[u8]) -> Option<CopiedState> {
    match schema {
        1 => rkyv::access::<ArchivedCopiedState, Failure>(bytes).ok().map(ArchivedCopiedState::to_state),
        2 => read::<PackedState<'_>>(bytes).map(PackedState::unpack),
        _ => None,
    }
}

fn write(packed: &impl Serialize, buffer: &mut Vec<u8>) {
    // It can fail only where the writer does, and memory does not.
    *buffer = postcard::to_extend(packed, mem::take(buffer)).expect("an archive in memory");
}

fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    let (packed, rest) = postcard::take_from_bytes(bytes).ok()?;
    rest.is_empty().then_some(packed)
}

/// The order of the fields is the format, as `FORMAT.md` has it; a new one means a new schema.
#[derive(Serialize, Deserialize)]
struct PackedOutcome<'a> {
    at_ms: u64,
    #[serde(borrow)]
    results: Vec<PackedResult<'a>>,
    reverse_path: &'a str,
    tenant: &'a str,
    campaign: &'a str,
    egress_pool: &'a str,
    created_ms: u64,
    size: u64,
    reception_protocol: &'a str,
    headers: Cow<'a, [(String, String)]>,
    meta: Cow<'a, [(String, String)]>,
    site: &'a str,
    /// `None`: the site's.
    peer_name: Option<&'a str>,
    peer_address: &'a str,
    egress_source: &'a str,
    source_address: &'a str,
    delivery_protocol: &'a str,
    tls_protocol: &'a str,
    tls_cipher: &'a str,
    session_id: u64,
}

#[derive(Serialize, Deserialize)]
struct PackedResult<'a> {
    index: u32,
    recipient: &'a str,
    /// Whether the recipient's domain is to be put behind `queue`.
    ends_in_domain: bool,
    queue: &'a str,
    fate: PackedFate,
    attempts: u32,
    code: u16,
    enhanced: Option<(u8, u16, u16)>,
    text: &'a str,
    command: &'a str,
}

#[derive(Serialize, Deserialize)]
enum PackedFate {
    Deferred { due_ms: u64 },
    Delivered,
    Bounced,
    Expired,
    AdminBounced,
}

#[derive(Serialize, Deserialize)]
struct PackedState<'a> {
    recipients: u32,
    finished: Cow<'a, [u32]>,
    #[serde(borrow)]
    deferred: Vec<PackedResult<'a>>,
}

#[derive(Serialize, Deserialize)]
struct PackedTombstone {
    /// From the sequence of the message before.
    distance: u64,
    recipients: Vec<u32>,
}

impl PackedOutcome<'_> {
    fn unpack(self, message: u64) -> Outcome {
        Outcome {
            message,
            at_ms: self.at_ms,
            results: self.results.into_iter().map(RecipientResult::from).collect(),
            reverse_path: self.reverse_path.to_owned(),
            tenant: self.tenant.to_owned(),
            campaign: self.campaign.to_owned(),
            egress_pool: self.egress_pool.to_owned(),
            created_ms: self.created_ms,
            size: self.size,
            reception_protocol: self.reception_protocol.to_owned(),
            headers: self.headers.into_owned(),
            meta: self.meta.into_owned(),
            site: self.site.to_owned(),
            peer_name: self.peer_name.unwrap_or(self.site).to_owned(),
            peer_address: self.peer_address.to_owned(),
            egress_source: self.egress_source.to_owned(),
            source_address: self.source_address.to_owned(),
            delivery_protocol: self.delivery_protocol.to_owned(),
            tls_protocol: self.tls_protocol.to_owned(),
            tls_cipher: self.tls_cipher.to_owned(),
            session_id: self.session_id,
        }
    }
}

impl PackedState<'_> {
    fn unpack(self) -> CopiedState {
        CopiedState {
            recipients: self.recipients,
            finished: self.finished.into_owned(),
            deferred: self.deferred.into_iter().map(RecipientResult::from).collect(),
        }
    }
}

impl<'a> From<&'a RecipientResult> for PackedResult<'a> {
    fn from(result: &'a RecipientResult) -> Self {
        let RecipientResult { index, recipient, queue, fate, attempts, answer } = result;
        let without = Some(domain(recipient)).filter(|domain| !domain.is_empty());
        let without = without.and_then(|domain| queue.strip_suffix(domain));
        Self {
            index: *index,
            recipient,
            ends_in_domain: without.is_some(),
            queue: without.unwrap_or(queue),
            fate: PackedFate::from(*fate),
            attempts: *attempts,
            code: answer.code,
            enhanced: answer.enhanced,
            text: &answer.text,
            command: &answer.command,
        }
    }
}

impl From<PackedResult<'_>> for RecipientResult {
    fn from(packed: PackedResult<'_>) -> Self {
        let rest = if packed.ends_in_domain { domain(packed.recipient) } else { "" };
        Self {
            index: packed.index,
            recipient: packed.recipient.to_owned(),
            queue: [packed.queue, rest].concat(),
            fate: packed.fate.into(),
            attempts: packed.attempts,
            answer: Answer {
                code: packed.code,
                enhanced: packed.enhanced,
                text: packed.text.to_owned(),
                command: packed.command.to_owned(),
            },
        }
    }
}

impl From<Fate> for PackedFate {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Deferred { due_ms } => Self::Deferred { due_ms },
            Fate::Delivered => Self::Delivered,
            Fate::Bounced => Self::Bounced,
            Fate::Expired => Self::Expired,
            Fate::AdminBounced => Self::AdminBounced,
        }
    }
}

impl From<PackedFate> for Fate {
    fn from(packed: PackedFate) -> Self {
        match packed {
            PackedFate::Deferred { due_ms } => Self::Deferred { due_ms },
            PackedFate::Delivered => Self::Delivered,
            PackedFate::Bounced => Self::Bounced,
            PackedFate::Expired => Self::Expired,
            PackedFate::AdminBounced => Self::AdminBounced,
        }
    }
}

fn domain(recipient: &str) -> &str {
    recipient.rsplit_once('@').map_or("", |(_, domain)| domain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![Just(String::new()), "[a-z@:.\\n]{0,12}", Just("mx.example.net".to_owned()), ".{0,200}"]
    }

    fn fate() -> impl Strategy<Value = Fate> {
        prop_oneof![
            any::<u64>().prop_map(|due_ms| Fate::Deferred { due_ms }),
            Just(Fate::Delivered),
            Just(Fate::Bounced),
            Just(Fate::Expired),
            Just(Fate::AdminBounced),
        ]
    }

    prop_compose! {
        fn result()(
            index: u32,
            recipient in prop_oneof![text(), Just("b@example.net".to_owned()), Just("c@".to_owned())],
            queue in prop_oneof![text(), Just("camp:ten@example.net".to_owned()), Just("example.net".to_owned())],
            fate in fate(),
            attempts: u32,
            (code, enhanced) in any::<(u16, Option<(u8, u16, u16)>)>(),
            text in text(),
            command in text(),
        ) -> RecipientResult {
            let answer = Answer { code, enhanced, text, command };
            RecipientResult { index, recipient, queue, fate, attempts, answer }
        }
    }

    prop_compose! {
        fn outcome()(
            (message, at_ms, created_ms, size, session_id) in any::<(u64, u64, u64, u64, u64)>(),
            results in prop::collection::vec(result(), 0..4),
            texts in prop::collection::vec(text(), 13),
            headers in prop::collection::vec((text(), text()), 0..3),
            meta in prop::collection::vec((text(), text()), 0..3),
        ) -> Outcome {
            let mut texts = texts.into_iter();
            let mut next = || texts.next().unwrap_or_default();
            Outcome {
                message, at_ms, created_ms, size, session_id, results, headers, meta,
                reverse_path: next(),
                tenant: next(),
                campaign: next(),
                egress_pool: next(),
                reception_protocol: next(),
                site: next(),
                peer_name: next(),
                peer_address: next(),
                egress_source: next(),
                source_address: next(),
                delivery_protocol: next(),
                tls_protocol: next(),
                tls_cipher: next(),
            }
        }
    }

    proptest! {
        #[test]
        fn an_outcome_comes_out_as_it_went_in(outcome in outcome(), before in 0_usize..3) {
            let mut bytes = vec![9; before];
            write_outcome(&outcome, &mut bytes);
            prop_assert_eq!(&bytes[..before], &[9, 9, 9][..before]);
            let bytes = &bytes[before..];
            prop_assert_eq!(read_outcome(2, outcome.message, bytes), Some(outcome.clone()));
            // Neither a part of it nor more than it.
            prop_assert_eq!(read_outcome(2, outcome.message, &bytes[..bytes.len() - 1]), None);
            prop_assert_eq!(read_outcome(2, outcome.message, &[bytes, &[0]].concat()), None);
            prop_assert_eq!(read_outcome(3, outcome.message, bytes), None);
            // And as schema 1 had it, which is about one message only.
            let archive = rkyv::to_bytes::<Failure>(&outcome).expect("it is serialised");
            prop_assert_eq!(read_outcome(1, outcome.message.wrapping_add(1), &archive), None);
            prop_assert_eq!(read_outcome(1, outcome.message, &archive), Some(outcome));
        }

        #[test]
        fn a_state_comes_out_as_it_went_in(
            recipients: u32,
            finished in prop::collection::vec(any::<u32>(), 0..5),
            deferred in prop::collection::vec(result(), 0..4),
        ) {
            let state = CopiedState { recipients, finished, deferred };
            let mut bytes = Vec::new();
            write_state(&state, &mut bytes);
            prop_assert_eq!(read_state(2, &bytes), Some(state.clone()));
            prop_assert_eq!(read_state(2, &bytes[..bytes.len() - 1]), None);
            let archive = rkyv::to_bytes::<Failure>(&state).expect("it is serialised");
            prop_assert_eq!(read_state(1, &archive), Some(state));
        }

        #[test]
        fn tombstones_come_out_as_they_went_in(finals in prop::collection::btree_set((0_u64..20, 0_u32..9), 0..40)) {
            let finals: Vec<Final> = finals.into_iter().collect();
            let mut bytes = Vec::new();
            write_tombstones(&finals, &mut bytes);
            let read = read_tombstones(TOMBSTONES_SCHEMA, &bytes).expect("what was written is read");
            let flat = read.iter().flat_map(|(message, indexes)| indexes.iter().map(|index| (*message, *index)));
            prop_assert_eq!(flat.collect::<Vec<Final>>(), finals);
            prop_assert!(read.is_sorted_by(|(one, _), (other, _)| one < other));
            prop_assert_eq!(read_tombstones(TOMBSTONES_SCHEMA + 1, &bytes), None);
        }

        /// A disk may say anything: it is refused, or it is something.
        #[test]
        fn bytes_are_not_trusted(bytes in prop::collection::vec(any::<u8>(), 0..300), schema in 0_u8..4) {
            let outcome = read_outcome(schema, 1, &bytes);
            prop_assert!(outcome.is_none_or(|outcome| outcome.message == 1));
            let state = read_state(schema, &bytes);
            prop_assert!(state.is_none_or(|state| state.deferred.len() <= bytes.len()));
            let tombstones = read_tombstones(schema, &bytes);
            prop_assert!(tombstones.is_none_or(|messages| messages.len() <= bytes.len()));
        }
    }

    #[test]
    fn what_is_repeated_is_left_out() {
        let result = |queue: &str| RecipientResult {
            index: 0,
            recipient: "b@example.net".into(),
            queue: queue.into(),
            fate: Fate::Delivered,
            attempts: 1,
            answer: Answer::default(),
        };
        let outcome = |queue: &str, peer: &str| {
            let (site, peer_name) = ("mx.example.net".into(), peer.into());
            let mut bytes = Vec::new();
            write_outcome(&Outcome { results: vec![result(queue)], site, peer_name, ..Outcome::default() }, &mut bytes);
            bytes.len()
        };
        let least = outcome("example.net", "mx.example.net");
        assert_eq!(outcome("ten@example.net", "mx.example.net") - least, "ten@".len());
        assert_eq!(outcome("example.org", "mx.example.net") - least, "example.org".len());
        assert_eq!(outcome("example.net", "my.example.net") - least, 1 + "my.example.net".len());
    }
}
