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

use crate::format::{LATER_OUTCOME_SCHEMA, TOMBSTONES_SCHEMA};
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
        peer_name: own_peer_name(outcome),
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

/// Appends an outcome of which much is as in another one of the same frame.
pub(crate) fn write_later_outcome(outcome: &Outcome, base: &Outcome, buffer: &mut Vec<u8>) {
    let base_result = base.results.first().map(PackedResult::from);
    let packed = PackedLaterOutcome {
        at_ms: outcome.at_ms,
        results: outcome.results.iter().map(|result| PackedLaterResult::new(result, base_result.as_ref())).collect(),
        reverse_path: unless_same(&outcome.reverse_path, &base.reverse_path),
        tenant: unless_same(&outcome.tenant, &base.tenant),
        campaign: unless_same(&outcome.campaign, &base.campaign),
        egress_pool: unless_same(&outcome.egress_pool, &base.egress_pool),
        created_ms: outcome.created_ms,
        size: outcome.size,
        reception_protocol: unless_same(&outcome.reception_protocol, &base.reception_protocol),
        headers: (outcome.headers != base.headers).then_some(Cow::Borrowed(&outcome.headers)),
        meta: (outcome.meta != base.meta).then_some(Cow::Borrowed(&outcome.meta)),
        site: unless_same(&outcome.site, &base.site),
        peer_name: (own_peer_name(outcome) != own_peer_name(base)).then_some(own_peer_name(outcome)),
        peer_address: unless_same(&outcome.peer_address, &base.peer_address),
        egress_source: unless_same(&outcome.egress_source, &base.egress_source),
        source_address: unless_same(&outcome.source_address, &base.source_address),
        delivery_protocol: unless_same(&outcome.delivery_protocol, &base.delivery_protocol),
        tls_protocol: unless_same(&outcome.tls_protocol, &base.tls_protocol),
        tls_cipher: unless_same(&outcome.tls_cipher, &base.tls_cipher),
        session_id: outcome.session_id,
    };
    write(&packed, buffer);
}

fn unless_same<'a>(text: &'a str, base: &str) -> Option<&'a str> {
    (text != base).then_some(text)
}

fn own_peer_name(outcome: &Outcome) -> Option<&str> {
    unless_same(&outcome.peer_name, &outcome.site)
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

/// An outcome about `message` of which some is told by another one; `None` where the bytes are none.
pub(crate) fn read_later_outcome(message: u64, bytes: &[u8], base: &Outcome) -> Option<Outcome> {
    read::<PackedLaterOutcome<'_>>(bytes)?.unpack(message, base)
}

/// What it tells of recipients, by index, without the other one.
pub(crate) fn read_later_fates(schema: u8, bytes: &[u8]) -> Option<Vec<(u32, Fate)>> {
    if schema != LATER_OUTCOME_SCHEMA {
        return None;
    }
    let results = read::<PackedLaterOutcome<'_>>(bytes)?.results;
    Some(results.into_iter().map(|result| (result.index, result.fate.into())).collect())
}

/// An outcome about `message` that is told by itself; `None` where the bytes are none.
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

/// `None`: as in the outcome that it refers to.
#[derive(Serialize, Deserialize)]
struct PackedLaterOutcome<'a> {
    at_ms: u64,
    #[serde(borrow)]
    results: Vec<PackedLaterResult<'a>>,
    reverse_path: Option<&'a str>,
    tenant: Option<&'a str>,
    campaign: Option<&'a str>,
    egress_pool: Option<&'a str>,
    created_ms: u64,
    size: u64,
    reception_protocol: Option<&'a str>,
    headers: Option<Cow<'a, [(String, String)]>>,
    meta: Option<Cow<'a, [(String, String)]>>,
    site: Option<&'a str>,
    peer_name: Option<Option<&'a str>>,
    peer_address: Option<&'a str>,
    egress_source: Option<&'a str>,
    source_address: Option<&'a str>,
    delivery_protocol: Option<&'a str>,
    tls_protocol: Option<&'a str>,
    tls_cipher: Option<&'a str>,
    session_id: u64,
}

/// `None`: as in the first result of the outcome that it refers to.
#[derive(Serialize, Deserialize)]
struct PackedLaterResult<'a> {
    index: u32,
    recipient: &'a str,
    /// As [`PackedResult`] has them.
    #[serde(borrow)]
    queue: Option<(bool, &'a str)>,
    fate: PackedFate,
    attempts: u32,
    code: u16,
    enhanced: Option<(u8, u16, u16)>,
    /// With so many octets of that result's text the text begins.
    shared: u32,
    text: &'a str,
    command: Option<&'a str>,
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

impl PackedLaterOutcome<'_> {
    fn unpack(self, message: u64, base: &Outcome) -> Option<Outcome> {
        let own = |own: Option<&str>, base: &str| own.unwrap_or(base).to_owned();
        let base_result = base.results.first().map(PackedResult::from);
        let results = self.results.into_iter().map(|result| result.unpack(base_result.as_ref()));
        let results = results.collect::<Option<Vec<RecipientResult>>>()?;
        let site = own(self.site, &base.site);
        Some(Outcome {
            message,
            at_ms: self.at_ms,
            results,
            reverse_path: own(self.reverse_path, &base.reverse_path),
            tenant: own(self.tenant, &base.tenant),
            campaign: own(self.campaign, &base.campaign),
            egress_pool: own(self.egress_pool, &base.egress_pool),
            created_ms: self.created_ms,
            size: self.size,
            reception_protocol: own(self.reception_protocol, &base.reception_protocol),
            headers: self.headers.map_or_else(|| base.headers.clone(), Cow::into_owned),
            meta: self.meta.map_or_else(|| base.meta.clone(), Cow::into_owned),
            peer_name: self.peer_name.unwrap_or_else(|| own_peer_name(base)).unwrap_or(&site).to_owned(),
            site,
            peer_address: own(self.peer_address, &base.peer_address),
            egress_source: own(self.egress_source, &base.egress_source),
            source_address: own(self.source_address, &base.source_address),
            delivery_protocol: own(self.delivery_protocol, &base.delivery_protocol),
            tls_protocol: own(self.tls_protocol, &base.tls_protocol),
            tls_cipher: own(self.tls_cipher, &base.tls_cipher),
            session_id: self.session_id,
        })
    }
}

impl<'a> PackedLaterResult<'a> {
    fn new(result: &'a RecipientResult, base: Option<&PackedResult<'_>>) -> Self {
        let PackedResult { index, recipient, ends_in_domain, queue, fate, attempts, code, enhanced, text, command } =
            result.into();
        let has_same_queue = base.is_some_and(|base| (base.ends_in_domain, base.queue) == (ends_in_domain, queue));
        let shared = base.map_or(0, |base| shared_octets(text, base.text));
        Self {
            index,
            recipient,
            queue: (!has_same_queue).then_some((ends_in_domain, queue)),
            fate,
            attempts,
            code,
            enhanced,
            shared: shared as u32,
            text: &text[shared..],
            command: base.map_or(Some(command), |base| unless_same(command, base.command)),
        }
    }

    /// `None` where it refers to something that is not there.
    fn unpack(self, base: Option<&PackedResult<'_>>) -> Option<RecipientResult> {
        let (ends_in_domain, queue) = match self.queue {
            Some(queue) => queue,
            None => base.map(|base| (base.ends_in_domain, base.queue))?,
        };
        let shared = base.map_or("", |base| base.text).get(..self.shared as usize)?;
        let text = [shared, self.text].concat();
        let packed = PackedResult {
            index: self.index,
            recipient: self.recipient,
            ends_in_domain,
            queue,
            fate: self.fate,
            attempts: self.attempts,
            code: self.code,
            enhanced: self.enhanced,
            text: &text,
            command: match self.command {
                Some(command) => command,
                None => base?.command,
            },
        };
        Some(packed.into())
    }
}

/// Octets with which both texts begin, whole characters.
fn shared_octets(text: &str, other: &str) -> usize {
    let same = text.bytes().zip(other.bytes()).take_while(|(one, other)| one == other).count();
    text.floor_char_boundary(same)
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
        fn a_later_outcome_comes_out_as_it_went_in(outcome in outcome(), base in outcome(), like in any::<u32>()) {
            // Some of its fields are as in the other one.
            let mut outcome = outcome;
            let pick = |bit: u32| like >> bit & 1 == 1;
            let own = outcome.clone();
            if pick(0) { outcome = Outcome { message: own.message, ..base.clone() } }
            if pick(1) { outcome.site.clone_from(&base.site) }
            if pick(2) { outcome.peer_name.clone_from(&base.peer_name) }
            if pick(3) { outcome.peer_name = outcome.site.clone() }
            if pick(4) { outcome.headers.clone_from(&base.headers) }
            if pick(5) { outcome.results.extend(base.results.first().cloned()) }
            if pick(6) { outcome.tls_cipher = own.tls_cipher }
            let mut bytes = Vec::new();
            write_later_outcome(&outcome, &base, &mut bytes);
            prop_assert_eq!(read_later_outcome(outcome.message, &bytes, &base), Some(outcome.clone()));
            prop_assert_eq!(read_later_outcome(outcome.message, &bytes[..bytes.len() - 1], &base), None);
            let fates: Vec<(u32, Fate)> = outcome.results.iter().map(|result| (result.index, result.fate)).collect();
            prop_assert_eq!(read_later_fates(LATER_OUTCOME_SCHEMA, &bytes), Some(fates));
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
            let later = read_later_outcome(1, &bytes, &Outcome::default());
            prop_assert!(later.is_none_or(|outcome| outcome.message == 1));
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
