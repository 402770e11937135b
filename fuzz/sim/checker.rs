//! What was promised, and what became of it: the one who complains.
//!
//! It is fed by what clients were answered, by what peers took, and by the records that shards tell the event log. A
//! crash takes nothing from it. After one, the records behind the event cursor are told again, and what was told, what
//! was answered and what is scheduled must still fit together.
//!
//! The simulator and the crash images (`engine/tests/crash`) share it. A broken promise is a panic that names it.
//!
//! Over 500 lines: what was promised of a message, from its answer to its events, is one account.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use postrider::admin::{MessageRow, MessageState};
use postrider::config::RetrySchedule;
use postrider::mail::queue_name::QueueName;
use postrider::outcome::event::{Logged, LoggedRecord};
use postrider_spool::record::{Answer, Envelope, Fate, LogId, MessageId, Outcome, RecipientResult, Sequence};

/// A message as its sender wrote it. Its marker is in the reverse path and in the content.
pub(crate) type Marker = u64;

#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) reverse_path: String,
    pub(crate) recipients: Vec<String>,
    /// Fields for the engine, which are not to travel.
    pub(crate) steering: String,
    /// What follows the fields that the engine puts in front.
    pub(crate) content: Vec<u8>,
    /// The egress sources that it may leave by.
    pub(crate) sources: Vec<usize>,
    /// Before this nothing is to be tried.
    pub(crate) first_attempt_ms: Option<u64>,
}

/// What a peer takes at the end of a transaction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Delivered<'a> {
    pub(crate) source: usize,
    pub(crate) reverse_path: &'a str,
    pub(crate) recipients: &'a [String],
    pub(crate) content: &'a [u8],
    /// The engine waits for the reply. Else it has given the transaction up already, and what it sent was on its way.
    pub(crate) is_awaited: bool,
    /// The peer refused MAIL, and takes it under the reverse path of another message.
    pub(crate) is_foreign: bool,
}

/// What the sender knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    /// The final dot is not out: nobody may take it for a message.
    Unfinished,
    /// It is with the engine.
    None,
    Accepted(MessageId),
    Refused,
}

/// A message whose record is durable.
#[derive(Debug, Clone)]
pub(crate) struct Durable {
    marker: Marker,
    pub(crate) expires_ms: u64,
    pub(crate) told: Told,
    pub(crate) recipients: Vec<Recipient>,
}

/// What each event of a message says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Told {
    reverse_path: String,
    pub(crate) tenant: String,
    campaign: String,
    egress_pool: String,
    pub(crate) created_ms: u64,
    size: u64,
    headers: Vec<(String, String)>,
    meta: Vec<(String, String)>,
}

/// As the last durable outcome left it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipient {
    pub(crate) attempts: u32,
    pub(crate) due_ms: u64,
    /// Attempts that ended without MAIL, because the peer lacked what the message needs.
    refused_by_us: u32,
    pub(crate) fate: Option<Fate>,
    /// The peer is about to be sent the end of the content; what became of that is not durable.
    is_intended: bool,
    /// It may have left, and must not be sent again.
    is_held: bool,
}

/// A peer took the message for one recipient.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    times: u64,
    /// The engine can't know of the last time, so that it may come again.
    is_unknown: bool,
    /// Attempts on record when it was last taken: with more, the engine has recorded that it heard nothing.
    attempts: u32,
}

#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    retry: RetrySchedule,
    /// What is in doubt is not sent again.
    pub(crate) holds: bool,
    sent: BTreeMap<Marker, (Arc<Sent>, Reply)>,
    /// Refused because a commit failed: the record may be on the medium until the log is open again.
    doubts: BTreeMap<Marker, LogId>,
    is_recovering: bool,
    /// When the engine that is there now was started.
    pub(crate) began_ms: u64,
    /// By how much the wall clock was set back, in all. Retries that waited come earlier by as much, also after a crash
    /// where a checkpoint has told so.
    pub(crate) back_ms: u64,
    /// And forward: what is under way then may be over at once.
    pub(crate) forward_ms: u64,
    /// From the first attempt on, where all messages have the same.
    pub(crate) max_age_ms: Option<u64>,
    /// Of sites, and of tenants, that have their own.
    pub(crate) retries: BTreeMap<String, RetrySchedule>,
    /// By how much retries were varied, in thousandths of what they may be.
    varied: Vec<i64>,
    pub(crate) durable: BTreeMap<MessageId, Durable>,
    /// Recipients of durable messages that have no fate yet.
    open: usize,
    pub(crate) ids: BTreeMap<Marker, MessageId>,
    taken: BTreeMap<(Marker, String), Taken>,
    refused_by_peer: BTreeSet<(Marker, String)>,
    /// How often MAIL was written for a message, where somebody counts it.
    pub(crate) mails: Option<BTreeMap<Marker, u32>>,
    /// The sources that a site has blamed in a row, each of which handed over to another at once.
    blamed: BTreeMap<(Marker, String), BTreeSet<(String, String)>>,
    /// Taken under another's reverse path: the engine may know it, and then does not send it again.
    foreign: BTreeSet<Marker>,
    /// What an operator has bounced: in any life, and in this one.
    pub(crate) bounced: BTreeSet<(MessageId, String)>,
    pub(crate) unwanted: BTreeSet<(MessageId, String)>,
    /// What was held, and when an operator let it be tried again.
    pub(crate) released: BTreeMap<(MessageId, String), u64>,
    /// Domains of which the DNS said that they take no mail.
    undeliverable: BTreeSet<String>,
    /// What peers did not offer, by address.
    lacks: BTreeSet<(String, Lack)>,
    /// Records that were told and are not in the event log yet; in this life, or before the crash.
    told: BTreeMap<(LogId, Sequence), Arc<LoggedRecord>>,
    untold: BTreeMap<(LogId, Sequence), Arc<LoggedRecord>>,
    last_told: BTreeMap<LogId, Sequence>,
    last_of_life: BTreeMap<LogId, Sequence>,
    pub(crate) counts: Counts,
}

/// What a message needs, and a peer lacks: the engine refuses it in the peer's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lack {
    Size,
    EightBit,
    Utf8,
}

/// What happened, so that a test can tell that it tested something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) accepted: u64,
    pub(crate) recipients: u64,
    pub(crate) refused: u64,
    pub(crate) delivered: u64,
    pub(crate) bounced: u64,
    pub(crate) expired: u64,
    pub(crate) admin_bounced: u64,
    pub(crate) deferred: u64,
    /// Records that a crash image held although nobody had been told of them.
    pub(crate) found: u64,
    /// Recipients that were held as in doubt.
    pub(crate) held: u64,
    /// Deliveries that a crash, or a lost reply, made the engine forget; and those that were made again.
    pub(crate) forgotten: u64,
    pub(crate) repeated: u64,
}

impl Ledger {
    pub(crate) fn new(retry: RetrySchedule, holds: bool, counts: Counts) -> Self {
        Self {
            retry,
            holds,
            sent: BTreeMap::new(),
            doubts: BTreeMap::new(),
            is_recovering: false,
            began_ms: 0,
            back_ms: 0,
            forward_ms: 0,
            max_age_ms: None,
            retries: BTreeMap::new(),
            varied: Vec::new(),
            durable: BTreeMap::new(),
            open: 0,
            ids: BTreeMap::new(),
            taken: BTreeMap::new(),
            refused_by_peer: BTreeSet::new(),
            mails: None,
            blamed: BTreeMap::new(),
            foreign: BTreeSet::new(),
            undeliverable: BTreeSet::new(),
            bounced: BTreeSet::new(),
            unwanted: BTreeSet::new(),
            released: BTreeMap::new(),
            lacks: BTreeSet::new(),
            told: BTreeMap::new(),
            untold: BTreeMap::new(),
            last_told: BTreeMap::new(),
            last_of_life: BTreeMap::new(),
            counts,
        }
    }

    /// A sender has begun to write it.
    pub(crate) fn send(&mut self, sent: impl FnOnce(Marker) -> Sent) -> Marker {
        let marker = self.sent.len() as Marker;
        self.sent.insert(marker, (Arc::new(sent(marker)), Reply::Unfinished));
        marker
    }

    pub(crate) fn sent(&self, marker: Marker) -> Arc<Sent> {
        Arc::clone(&self.sent[&marker].0)
    }

    pub(crate) fn finish(&mut self, marker: Marker) {
        self.answer(marker, Reply::None);
    }

    pub(crate) fn accept(&mut self, marker: Marker, id: MessageId) {
        let known = self.ids.get(&marker);
        assert!(known.is_none_or(|known| *known == id), "RIGHT-ENVELOPE: {marker} is {known:?}, answered was {id}");
        self.answer(marker, Reply::Accepted(id));
        self.counts.accepted += 1;
        self.counts.recipients += self.sent[&marker].0.recipients.len() as u64;
    }

    /// `in_doubt` names the log whose commit failed.
    pub(crate) fn refuse(&mut self, marker: Marker, in_doubt: Option<LogId>) {
        assert!(!self.ids.contains_key(&marker), "ACCEPTED-ONCE: {marker} is durable and was refused");
        self.answer(marker, Reply::Refused);
        self.doubts.extend(in_doubt.map(|log| (marker, log)));
        self.counts.refused += 1;
    }

    fn answer(&mut self, marker: Marker, answer: Reply) {
        self.sent.get_mut(&marker).expect("it was sent").1 = answer;
    }

    /// A peer has taken a transaction's content, and is about to say so.
    pub(crate) fn take(&mut self, delivered: Delivered<'_>) -> Marker {
        let Delivered { source, reverse_path, recipients, content, is_awaited, is_foreign } = delivered;
        let text = String::from_utf8_lossy(content);
        let marker = text.lines().find_map(|line| line.strip_prefix("Subject: m")).expect("it has a marker");
        let marker = marker.split(' ').next().expect("a first word");
        let marker: Marker = marker.parse().expect("a number");
        let sent = self.sent(marker);
        assert_eq!(sent.reverse_path != reverse_path, is_foreign, "RIGHT-ENVELOPE: {marker}");
        assert!(content.ends_with(&sent.content), "RIGHT-ENVELOPE: the content of {marker} is another: {text}");
        let mut in_front = content[..content.len() - sent.content.len()].split(|octet| *octet == b'\n');
        let travels = in_front.find(|line| STEERING.iter().any(|field| line.starts_with(field.as_bytes())));
        assert!(travels.is_none(), "RIGHT-ENVELOPE: {marker} tells its peer what was said to the engine: {text}");
        assert!(sent.sources.contains(&source), "RIGHT-ENVELOPE: {marker} left by source {source}");
        let id = *self.ids.get(&marker).unwrap_or_else(|| panic!("ACK-AFTER-SYNC: {marker} left before its commit"));
        for recipient in recipients {
            let index = sent.recipients.iter().position(|known| known == recipient);
            let index = index.unwrap_or_else(|| panic!("RIGHT-ENVELOPE: {marker} has no recipient {recipient}"));
            let fate = self.durable[&id].recipients[index].fate;
            let is_late = !is_awaited && fate == Some(Fate::Expired);
            assert!(fate.is_none() || is_late, "DELIVERED-ONCE: {marker} came to {recipient}, whose fate is {fate:?}");
            let taken = self.taken.entry((marker, recipient.clone())).or_default();
            // Its record may still be on its way to the disk.
            let is_released = self.released.contains_key(&(id, recipient.clone()));
            assert!(
                taken.times == 0 || taken.is_unknown || is_released,
                "DELIVERED-ONCE: {marker} came to {recipient} again, and nothing had been forgotten"
            );
            let held = self.durable[&id].recipients[index].is_held;
            let may_come = !held || !is_awaited || is_released;
            assert!(may_come, "DELIVERED-ONCE: {marker} came to {recipient}, and was held");
            let may_repeat = !self.holds || is_released;
            assert!(taken.times == 0 || may_repeat, "DELIVERED-ONCE: {marker} came to {recipient} again");
            self.counts.repeated += u64::from(taken.times > 0);
            taken.times += 1;
            taken.is_unknown = false;
            taken.attempts = self.durable[&id].recipients[index].attempts;
            if is_foreign {
                self.foreign.insert(marker);
            }
        }
        marker
    }

    /// The engine will not hear that the peer took it.
    pub(crate) fn forget(&mut self, marker: Marker, recipients: &[String]) {
        for recipient in recipients {
            let taken = self.taken.get_mut(&(marker, recipient.clone())).expect("it was taken");
            self.counts.forgotten += u64::from(!taken.is_unknown);
            taken.is_unknown = true;
        }
    }

    /// A peer refused the recipient or the content for good, or, without a recipient, the sender.
    pub(crate) fn bounce(&mut self, reverse_path: &str, recipient: &str) {
        let marker = marker_of(reverse_path);
        self.refused_by_peer.insert((marker, recipient.to_owned()));
    }

    /// The peer at this address does not offer what some messages need.
    pub(crate) fn lack(&mut self, address: String, lack: Lack) {
        self.lacks.insert((address, lack));
    }

    /// The DNS said that the domain takes no mail.
    pub(crate) fn undeliverable(&mut self, domain: &str) {
        if !self.undeliverable.contains(domain) {
            self.undeliverable.insert(domain.to_owned());
        }
    }

    /// A shard told the event log of a durable record.
    pub(crate) fn tell(&mut self, record: &Arc<LoggedRecord>) {
        let key = (record.log, record.sequence);
        let last = self.last_of_life.insert(record.log, record.sequence);
        assert!(last.is_none_or(|last| last < record.sequence), "EVENTS-ONCE: {key:?} was told after {last:?}");
        if let Some(known) = self.untold.remove(&key) {
            assert!(is_same(&known.record, &record.record), "EVENTS-ONCE: told {record:?}, and before it {known:?}");
            self.told.insert(key, known);
            return;
        }
        assert!(!self.told.contains_key(&key), "EVENTS-ONCE: {key:?} was told twice");
        let last = self.last_told.insert(record.log, record.sequence);
        assert!(last.is_none_or(|last| last < record.sequence), "EVENTS-ONCE: {key:?} was told after {last:?}");
        self.told.insert(key, Arc::clone(record));
        match &record.record {
            Logged::Message { envelope, size } => {
                self.found_message(MessageId::new(record.log, record.sequence), envelope, *size);
            }
            Logged::Outcome(outcome) => self.found_outcome(outcome),
        }
        if self.is_recovering {
            self.counts.found += 1;
        } else {
            // The log is open, and has voided what failed.
            self.doubts.retain(|_, log| *log != record.log);
        }
    }

    /// The event log has it on its disk.
    pub(crate) fn write(&mut self, log: LogId, sequence: Sequence) {
        assert!(self.told.remove(&(log, sequence)).is_some(), "it was told");
    }

    fn found_message(&mut self, id: MessageId, envelope: &Envelope, size: u64) {
        let marker = marker_of(&envelope.reverse_path);
        let (sent, answer) = self.sent.get(&marker).expect("somebody sent it");
        let recipients: Vec<&String> = envelope.recipients.iter().map(|recipient| &recipient.address).collect();
        assert!(recipients.into_iter().eq(&sent.recipients), "RIGHT-ENVELOPE: {marker}: {:?}", envelope.recipients);
        match *answer {
            Reply::Unfinished => panic!("ACCEPTED-ONCE: {marker} was never sent whole"),
            Reply::Accepted(answered) => assert_eq!(answered, id, "RIGHT-ENVELOPE: {marker}"),
            Reply::Refused => {
                let may_be = self.is_recovering && self.doubts.contains_key(&marker);
                assert!(may_be, "ACCEPTED-ONCE: {marker} was refused, and is there");
            }
            Reply::None => {}
        }
        let asked = sent.first_attempt_ms;
        let expires_ms = self.max_age_ms.map(|max_age_ms| envelope.first_attempt_ms + max_age_ms);
        assert!(
            expires_ms.is_none_or(|expires_ms| envelope.expires_ms == expires_ms),
            "EXACT-RETRY-STATE: {marker} ends at {}, not at {expires_ms:?}",
            envelope.expires_ms
        );
        let is_exact = asked.is_none_or(|asked_ms| envelope.first_attempt_ms == asked_ms.max(envelope.created_ms));
        assert!(is_exact, "EXACT-RETRY-STATE: {marker} is due at {}, not {asked:?}", envelope.first_attempt_ms);
        let first = Recipient {
            attempts: 0,
            due_ms: envelope.first_attempt_ms,
            refused_by_us: 0,
            fate: None,
            is_intended: false,
            is_held: false,
        };
        let recipients = vec![first; sent.recipients.len()];
        let other = self.ids.insert(marker, id);
        assert!(other.is_none(), "ACCEPTED-ONCE: {marker} is both {other:?} and {id}");
        self.open += recipients.len();
        let told = Told {
            reverse_path: envelope.reverse_path.clone(),
            tenant: envelope.tenant.clone(),
            campaign: envelope.campaign.clone(),
            egress_pool: envelope.egress_pool.clone(),
            created_ms: envelope.created_ms,
            size,
            headers: envelope.headers.clone(),
            meta: envelope.meta.clone(),
        };
        self.durable.insert(id, Durable { marker, expires_ms: envelope.expires_ms, told, recipients });
    }

    fn found_outcome(&mut self, outcome: &Outcome) {
        let id = MessageId::from_raw(outcome.message);
        let mut durable = self.durable.remove(&id).expect("an outcome follows its message");
        // An intent has no event.
        if !outcome.results.iter().all(RecipientResult::is_intent) {
            let told = Told {
                reverse_path: outcome.reverse_path.clone(),
                tenant: outcome.tenant.clone(),
                campaign: outcome.campaign.clone(),
                egress_pool: outcome.egress_pool.clone(),
                created_ms: outcome.created_ms,
                size: outcome.size,
                headers: outcome.headers.clone(),
                meta: outcome.meta.clone(),
            };
            assert_eq!(told, durable.told, "EVENTS-ONCE: what an event of {} says of it", durable.marker);
        }
        for result in &outcome.results {
            self.found_result(outcome, result, &mut durable);
        }
        self.durable.insert(id, durable);
    }

    fn found_result(&mut self, outcome: &Outcome, result: &RecipientResult, durable: &mut Durable) {
        let RecipientResult { index, recipient, fate, attempts, answer, .. } = result;
        let (marker, expires_ms) = (durable.marker, durable.expires_ms);
        let state = &mut durable.recipients[*index as usize];
        let expected = &self.sent[&marker].0.recipients[*index as usize];
        assert_eq!(recipient, expected, "RIGHT-ENVELOPE: {marker}");
        assert!(state.fate.is_none(), "NOTHING-LOST: {marker} to {recipient} ended as {state:?}, and {fate:?} now");
        if answer.text.starts_with("Administrator released") {
            return self.found_release(outcome, result, (marker, expires_ms), state);
        }
        let by_attempt = *attempts == state.attempts + 1;
        let is_end = matches!(fate, Fate::Bounced | Fate::Expired | Fate::AdminBounced);
        let by_decision = is_end && *attempts == state.attempts;
        assert!(by_attempt || by_decision, "EXACT-RETRY-STATE: {marker} to {recipient}: {state:?}, now {result:?}");
        if result.is_intent() {
            let is_last_word = *fate == Fate::Deferred { due_ms: expires_ms };
            assert!(by_attempt && is_last_word, "EXACT-RETRY-STATE: {marker} to {recipient} intends {result:?}");
            assert!(self.holds, "nobody asked for {result:?}");
            state.is_intended = true;
            return;
        }
        state.is_intended = false;
        state.attempts = *attempts;
        check_words(result, outcome);
        if own_refusal(answer).is_some() || answer.text.ends_with(LACKING) {
            state.refused_by_us += 1;
        }
        self.check_attempts(result, marker, state);
        match *fate {
            Fate::Deferred { due_ms } if answer.text.starts_with("in doubt: ") => {
                let is_wanted = self.holds || self.foreign.contains(&marker);
                assert!(is_wanted && due_ms == expires_ms, "EXACT-RETRY-STATE: {marker} is held: {result:?}");
                state.due_ms = due_ms;
                state.is_held = true;
                self.counts.held += 1;
            }
            Fate::Deferred { due_ms } => {
                self.check_deferral(outcome, result, marker, due_ms, state.due_ms != due_ms);
                state.due_ms = due_ms;
                self.counts.deferred += 1;
            }
            _ => {
                self.check_end(outcome, result, marker, expires_ms, by_attempt);
                let is_marked = answer.text.contains("in doubt: ");
                let may_end = *fate == Fate::AdminBounced || *fate == Fate::Expired && is_marked;
                assert!(!state.is_held || may_end, "NOTHING-LOST: held, and {result:?}");
                state.fate = Some(*fate);
                self.open -= 1;
            }
        }
    }

    /// What was held goes on, as the operator asked; what was over by then, to its end.
    fn found_release(
        &mut self,
        outcome: &Outcome,
        result: &RecipientResult,
        (marker, expires_ms): (Marker, u64),
        state: &mut Recipient,
    ) {
        let RecipientResult { recipient, fate, attempts, .. } = result;
        let id = MessageId::from_raw(outcome.message);
        let at_ms = self.released.get(&(id, recipient.clone())).copied();
        let at_ms = at_ms.unwrap_or_else(|| panic!("nobody released {marker} to {recipient}"));
        let due_ms = at_ms.min(expires_ms - 1);
        assert!(state.is_held, "EXACT-RETRY-STATE: {marker} to {recipient} was not held: {result:?}");
        assert_eq!((*fate, *attempts), (Fate::Deferred { due_ms }, state.attempts), "EXACT-RETRY-STATE: {marker}");
        (state.is_held, state.due_ms) = (false, due_ms);
        self.counts.deferred += 1;
    }

    /// No more attempts count than MAIL were written, or would have been but for our own refusal.
    fn check_attempts(&self, result: &RecipientResult, marker: Marker, state: &Recipient) {
        let RecipientResult { recipient, attempts, .. } = result;
        if let Some(mails) = &self.mails
            && is_plain(recipient)
            && is_plain(&self.sent[&marker].0.reverse_path)
        {
            let written = mails.get(&marker).copied().unwrap_or_default() + state.refused_by_us;
            assert!(
                *attempts <= written,
                "EXACT-RETRY-STATE: {marker} to {recipient} has {attempts} attempts, of {written} MAIL"
            );
        }
    }

    /// Its site's, or its tenant's, where these have their own.
    fn retry_of(&self, outcome: &Outcome) -> &RetrySchedule {
        let own = self.retries.get(&outcome.site).or_else(|| self.retries.get(&outcome.tenant));
        own.unwrap_or(&self.retry)
    }

    fn check_deferral(
        &mut self,
        outcome: &Outcome,
        result: &RecipientResult,
        marker: Marker,
        due_ms: u64,
        is_later: bool,
    ) {
        let RecipientResult { recipient, attempts, answer, .. } = result;
        let (interval_ms, spread_ms) = interval(self.retry_of(outcome), *attempts);
        let wait_ms = due_ms.saturating_sub(outcome.at_ms);
        // A refused address hands over to another of its pool at once.
        let moves = wait_ms == 0 && BLAME.ends_with(answer.text.as_str());
        assert!(
            moves || wait_ms.abs_diff(interval_ms) <= spread_ms,
            "EXACT-RETRY-STATE: {marker} waits {wait_ms} ms after attempt {attempts}, not {interval_ms} ms"
        );
        if matches!(self.retry_of(outcome), RetrySchedule::Doubling { .. }) && !moves && is_later {
            self.varied.push((wait_ms as i64 - interval_ms as i64) * 1_000 / spread_ms as i64);
        }
        let blamed = self.blamed.entry((marker, recipient.clone())).or_default();
        if !moves {
            blamed.clear();
        }
        blamed.retain(|(site, _)| *site == outcome.site);
        if moves {
            blamed.insert((outcome.site.clone(), outcome.egress_source.clone()));
        }
        assert!(
            blamed.len() < self.sent[&marker].0.sources.len(),
            "EXACT-RETRY-STATE: {marker} to {recipient} goes on at once, by no other source"
        );
        let is_final = answer.code / 100 == 5 && !is_excused(answer);
        assert!(!is_final, "NOTHING-LOST: {marker} to {recipient} is tried again after {answer:?}");
    }

    /// A final fate has its reason in the world outside.
    fn check_end(
        &mut self,
        outcome: &Outcome,
        result: &RecipientResult,
        marker: Marker,
        expires_ms: u64,
        by_attempt: bool,
    ) {
        let RecipientResult { recipient, attempts, answer, .. } = result;
        let key = (marker, recipient.clone());
        match result.fate {
            Fate::Deferred { .. } => unreachable!("it is no end"),
            Fate::Delivered => {
                assert!(self.taken.contains_key(&key), "NOTHING-LOST: no peer took {marker} to {recipient}");
                self.counts.delivered += 1;
            }
            Fate::Bounced => {
                let nowhere = !by_attempt && self.undeliverable.contains(domain_of(recipient));
                let by_us = match own_refusal(answer) {
                    Some(lack) => self.lacks.contains(&(outcome.peer_address.clone(), lack)),
                    None => !is_plain(recipient) || !is_plain(&self.sent[&marker].0.reverse_path),
                };
                let by_peer =
                    self.refused_by_peer.contains(&key) || self.refused_by_peer.contains(&(marker, String::new()));
                let refused = nowhere || by_us || by_peer;
                assert!(refused, "NOTHING-LOST: no peer refused {marker} to {recipient}: {result:?}");
                self.counts.bounced += 1;
            }
            Fate::Expired => {
                let (interval_ms, spread_ms) = interval(self.retry_of(outcome), *attempts);
                let is_over = outcome.at_ms + if by_attempt { interval_ms + spread_ms } else { 0 };
                assert!(
                    is_over + self.back_ms >= expires_ms,
                    "NOTHING-LOST: {marker} to {recipient} expired at {}, before {expires_ms}",
                    outcome.at_ms
                );
                self.counts.expired += 1;
            }
            Fate::AdminBounced => {
                let id = MessageId::from_raw(outcome.message);
                let is_bounced = self.bounced.contains(&(id, recipient.clone()));
                assert!(is_bounced, "NOTHING-LOST: nobody bounced {marker} to {recipient}");
                self.counts.admin_bounced += 1;
            }
        }
    }

    /// A crash: what was told and is not in the event log is to be told again.
    pub(crate) fn crash(&mut self) {
        assert!(self.untold.is_empty());
        self.unwanted.clear();
        self.is_recovering = true;
        self.untold = std::mem::take(&mut self.told);
        self.last_of_life.clear();
    }

    /// The engine has told all that it found: whatever was promised must be among it. `unrecorded` is what the life
    /// before had noted as sent without a durable outcome, which bounds what is sent again.
    pub(crate) fn check_recovered(&mut self, unrecorded: u64) {
        self.is_recovering = false;
        self.doubts.clear();
        assert!(self.untold.is_empty(), "ACK-AFTER-SYNC: these were told, and are gone: {:#?}", self.untold);
        for (marker, (_, answer)) in &mut self.sent {
            match *answer {
                Reply::Accepted(id) => {
                    let is_there = self.durable.contains_key(&id);
                    assert!(is_there, "ACK-AFTER-SYNC: {marker} was answered 250 as {id}, and is gone");
                }
                // What was not found can't come later.
                Reply::None if !self.ids.contains_key(marker) => *answer = Reply::Refused,
                _ => {}
            }
        }
        self.blamed.clear();
        for durable in self.durable.values_mut() {
            let expires_ms = durable.expires_ms;
            for state in durable.recipients.iter_mut().filter(|state| state.is_intended) {
                state.attempts += 1;
                (state.due_ms, state.is_intended, state.is_held) = (expires_ms, false, true);
                self.counts.held += 1;
            }
        }
        let mut unnoted = 0;
        for ((marker, recipient), taken) in &mut self.taken {
            let index = self.sent[marker].0.recipients.iter().position(|known| known == recipient);
            let state = self.durable[&self.ids[marker]].recipients[index.expect("one of its recipients")];
            if state.fate.is_none() && !taken.is_unknown {
                taken.is_unknown = true;
                self.counts.forgotten += 1;
                unnoted += u64::from(state.attempts == taken.attempts);
            }
        }
        assert!(
            self.holds || unnoted <= unrecorded,
            "DELIVERED-ONCE: {unnoted} deliveries were forgotten, and only {unrecorded} noted as such"
        );
    }

    /// What is scheduled must be what is durable, to the millisecond.
    pub(crate) fn check_schedule(&self, rows: &[MessageRow], now_ms: u64) {
        let mut scheduled = BTreeMap::new();
        for row in rows {
            let id: MessageId = row.id.parse().expect("an id");
            let other = scheduled.insert((id, row.recipient.as_str()), row);
            assert!(other.is_none(), "NOTHING-LOST: {row:?} is scheduled twice");
        }
        for (id, durable) in &self.durable {
            let recipients = &self.sent[&durable.marker].0.recipients;
            for (recipient, state) in recipients.iter().zip(&durable.recipients) {
                let row = scheduled.remove(&(*id, recipient.as_str()));
                if state.fate.is_some() {
                    assert!(row.is_none(), "NOTHING-LOST: {recipient} of {id} has a fate, and is scheduled: {row:?}");
                    continue;
                }
                let Some(row) = row else {
                    // Its end may wait for the message to be read.
                    let is_unwanted = self.unwanted.contains(&(*id, recipient.clone()));
                    let is_over = durable.expires_ms <= now_ms + self.back_ms || is_unwanted;
                    let may_end = is_over || self.undeliverable.contains(domain_of(recipient));
                    assert!(may_end, "NOTHING-LOST: {recipient} of {id} is not scheduled; it was {state:?}");
                    continue;
                };
                assert_eq!(row.num_attempts, state.attempts, "EXACT-RETRY-STATE: {recipient} of {id}: {row:?}");
                let is_unwanted = self.unwanted.contains(&(*id, recipient.clone()));
                let may_wait = !is_unwanted || row.state == MessageState::Delivering;
                assert!(may_wait, "NOTHING-LOST: an operator has bounced {recipient} of {id}, and it waits: {row:?}");
                // What has expired is at its turn, and ends there.
                let is_over = durable.expires_ms <= now_ms + self.back_ms;
                // A transaction may have been under way until an engine died.
                let ends_from = durable.expires_ms.max(self.began_ms);
                let is_long_over = ends_from + ENDS_WITHIN_MS + self.forward_ms < now_ms;
                assert!(
                    !is_long_over || row.state == MessageState::Delivering,
                    "NOTHING-LOST: {recipient} of {id} is over at {}, and waits: {row:?}",
                    durable.expires_ms
                );
                assert!(
                    state.attempts == 0 || row.last_answer.is_some(),
                    "EXACT-RETRY-STATE: the operator is not told why {recipient} of {id} was put off: {row:?}"
                );
                let is_shown = row.state == MessageState::Held || state.is_held && is_over;
                assert_eq!(is_shown, state.is_held, "NOTHING-LOST: the operator is not told of {row:?}: {state:?}");
                let due_ms = row.due.expect("it waits").0;
                let is_exact = if due_ms > state.due_ms {
                    row.blocked_by.is_some()
                } else {
                    state.due_ms - due_ms <= self.back_ms
                };
                assert!(is_exact, "EXACT-RETRY-STATE: {recipient} of {id} is due at {}: {row:?}", state.due_ms);
            }
        }
        assert!(scheduled.is_empty(), "NOTHING-LOST: nobody knows of {scheduled:#?}");
    }

    /// How many recipients are durable and have no fate yet.
    pub(crate) fn open(&self) -> usize {
        self.open
    }

    /// What is durable and has no fate yet.
    pub(crate) fn pending(&self) -> Vec<(MessageId, Marker, usize)> {
        let pending = self.durable.iter().flat_map(|(id, durable)| {
            let recipients = durable.recipients.iter().enumerate();
            let pending = recipients.filter(|(_, recipient)| recipient.fate.is_none());
            pending.map(|(index, _)| (*id, durable.marker, index))
        });
        pending.collect()
    }

    /// Everything that was accepted has ended, and is in the event log.
    pub(crate) fn check_finished(&self) {
        for durable in self.durable.values() {
            let pending = durable.recipients.iter().position(|recipient| recipient.fate.is_none());
            assert!(pending.is_none(), "NOTHING-LOST: {durable:?} has no end");
        }
        for (marker, (_, answer)) in &self.sent {
            if let Reply::Accepted(id) = answer {
                assert_eq!(self.ids.get(marker), Some(id), "NOTHING-LOST: {marker} was answered 250");
            }
        }
        // Of so many, by chance, none is far from the others in less than one of a thousand million runs.
        let bounds = self.varied.iter().min().zip(self.varied.iter().max());
        if let Some((least, most)) = bounds.filter(|_| self.varied.len() >= VARIED_MIN) {
            let is_varied = *least < -500 && *most > 500;
            assert!(
                is_varied,
                "EXACT-RETRY-STATE: retries are varied by {least} to {most} thousandths of what they may"
            );
        }
        let unwritten = self.told.len() + self.untold.len();
        assert_eq!(unwritten, 0, "EVENTS-ONCE: records are not in the event log");
    }
}

pub(crate) fn marker_of(reverse_path: &str) -> Marker {
    let local = reverse_path.strip_prefix('m').and_then(|rest| rest.split_once('@'));
    local.and_then(|(marker, _)| marker.parse().ok()).expect("a marker is in the reverse path")
}

/// How long a recipient waits after so many attempts, in ms, and how much that is varied.
fn interval(retry: &RetrySchedule, attempts: u32) -> (u64, u64) {
    let interval_ms = retry.interval(attempts).as_millis() as u64;
    match retry {
        RetrySchedule::Doubling { .. } => (interval_ms, interval_ms / 8 + 1),
        RetrySchedule::Listed(_) => (interval_ms, 0),
    }
}

/// EVENTS-ONCE: an event's words fit what it says became of the recipient, and it names the queue.
fn check_words(result: &RecipientResult, outcome: &Outcome) {
    let RecipientResult { recipient, queue, fate, answer, .. } = result;
    let fits = match fate {
        Fate::Delivered => answer.code / 100 == 2,
        Fate::Bounced | Fate::Expired | Fate::AdminBounced => answer.code / 100 == 5,
        // Those before it went, so there is a transaction for the rest at once (RFC 5321 §4.5.3.1.10).
        Fate::Deferred { .. } => {
            let went = |other: &RecipientResult| other.fate == Fate::Delivered && other.index < result.index;
            !answer.text.ends_with("too many") || !outcome.results.iter().any(went)
        }
    };
    assert!(fits, "EVENTS-ONCE: {recipient} is {fate:?} by {answer:?}");
    let (tenant, campaign) = (&*outcome.tenant, &*outcome.campaign);
    let name = QueueName { campaign, tenant, domain: domain_of(recipient) }.to_string();
    assert_eq!(*queue, name, "EVENTS-ONCE: the queue of {recipient}");
}

/// What the engine refuses without asking the peer, for what the peer lacks.
fn own_refusal(answer: &Answer) -> Option<Lack> {
    match (answer.code, answer.enhanced?) {
        (552, (5, 3, 4)) => Some(Lack::Size),
        (554, (5, 6, 3)) => Some(Lack::EightBit),
        (553, (5, 6, 7)) | (554, (5, 6, 9)) => Some(Lack::Utf8),
        _ => None,
    }
}

/// Refusals that sound final, and are about our address, the transaction, the session or a command.
fn is_excused(answer: &Answer) -> bool {
    let is_of_session = matches!(answer.code, 500 | 503 | 530);
    is_of_session || BLAME.ends_with(answer.text.as_str()) || (answer.code, answer.enhanced) == (552, Some((5, 5, 3)))
}

pub(crate) fn domain_of(recipient: &str) -> &str {
    recipient.rsplit('@').next().unwrap_or_default()
}

/// Whether an address can be written into a command.
fn is_plain(address: &str) -> bool {
    !address.contains([' ', '<', '>'])
}

fn is_same(one: &Logged, other: &Logged) -> bool {
    match (one, other) {
        (Logged::Message { envelope, size }, Logged::Message { envelope: other, size: other_size }) => {
            envelope == other && size == other_size
        }
        (Logged::Outcome(one), Logged::Outcome(other)) => one == other,
        _ => false,
    }
}

/// Fields by which a sender tells the engine what to do.
const STEERING: [&str; 5] = ["X-Tenant:", "X-Campaign:", "X-Job:", "X-Virtual-MTA:", "X-Schedule:"];

/// What is over ends within a second, unless the disk is slow or takes nothing for a while.
const ENDS_WITHIN_MS: u64 = 20 * 60_000;

/// With fewer it may be chance.
const VARIED_MIN: usize = 70;

/// How a deferral ends for what a peer lacks, while other hosts that may have it back off.
const LACKING: &str = "other hosts, which may, can not be reached now";

/// What some peers refuse mail with. Another address may be welcome, so nobody may bounce for it.
pub(crate) const BLAME: &str = "554 5.7.1 client host [192.0.2.1] blocked: it is listed by bl.example";
