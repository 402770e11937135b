//! Stage 6 at a message's home: what became of its recipients, recorded before anything else is done about it.

use std::sync::Arc;

use postrider_spool::record::{Answer, ArchivedEnvelope, Fate, MessageId, Outcome, RecipientResult};
use postrider_spool::{Message, ReadError};

use super::Shard;
use super::schedule::{Ending, PendingRead, expired};
use crate::admin::answer_text;
use crate::config::{DeliveryProtocol, RouteTarget};
use crate::deliver::verdict::{self, Retry, When};
use crate::handover::{Attempt, Blocked, DeliveryContext, Settled};
use crate::mail::time::Now;
use crate::schedule::queue::EntryKey;
use crate::schedule::retry::next_attempt_ms;

/// What becomes of an entry's recipients: some are settled, some wait, some are held as in doubt, some go by another
/// source, some go on at once.
#[derive(Debug, Default)]
struct Disposition {
    results: Vec<RecipientResult>,
    deferred: Waiting,
    held: Waiting,
    moved: Waiting,
    at_once: Vec<u32>,
    attempts: u32,
}

/// Recipients that are due at one time.
#[derive(Debug, Default)]
struct Waiting {
    recipients: Vec<u32>,
    due_ms: u64,
    last_answer: String,
}

impl Shard {
    /// An attempt was made: its outcome is recorded, and what remains of the entry goes on.
    pub(super) fn settle(&mut self, now: Now, settled: Settled) {
        let Settled { attempt, result, context } = settled;
        let sent = result.sent_recipients;
        let key = attempt.ticket.entry;
        self.progress.begin_work(attempt.message.id());
        self.unpin(attempt.message.id());
        let disposition = self.dispose(now, &attempt, result.results);
        let Disposition { results, deferred, held, moved, at_once, attempts } = disposition;
        let delivered = results.iter().filter(|result| result.fate == Fate::Delivered).count();
        self.home.count_delivered(key, delivered as u32);
        if results.is_empty() {
            self.progress.add_recorded(u64::from(sent));
        } else {
            let outcome = self.outcome_of_attempt(now, *attempt, &context, results);
            self.append_outcome(now, outcome, sent);
        }
        let entry = self.home.entry(key);
        let (old_attempts, old_due_ms) = (entry.attempts, entry.due_ms);
        let mut waiting = [deferred, held, moved].into_iter().filter(|waiting| !waiting.recipients.is_empty());
        match (waiting.next(), at_once.is_empty()) {
            (None, true) => self.remove_entry(key),
            (None, false) => {
                self.home.take_back(key);
                self.home.keep_only(key, &at_once);
                self.route(now, key);
            }
            (Some(Waiting { recipients, due_ms, last_answer }), _) => {
                // What goes on at once has had no answer since the last one.
                if !at_once.is_empty() {
                    self.split(key, &at_once, old_attempts, old_due_ms);
                }
                self.home.defer(key, &recipients, attempts, due_ms, &last_answer);
                for Waiting { recipients, due_ms, last_answer } in waiting {
                    let part = self.split(key, &recipients, attempts, due_ms);
                    self.home.set_answer(part, &last_answer);
                }
            }
        }
        self.bounce_returned(key);
        self.progress.end_work();
    }

    /// The entry is done with. The message's handle goes to another of its entries, where there is one.
    fn remove_entry(&mut self, key: EntryKey) {
        let id = self.home.entry(key).message;
        let other = self.home.remove(key);
        let place = self.log_index(id.log());
        self.logs[place].set_entry(id, other);
    }

    /// A ticket came back without an attempt; it `stays` at its source where its turn had come there.
    pub(super) fn take_back(&mut self, now: Now, attempt: Attempt, stays: bool) {
        self.unpin(attempt.message.id());
        let key = attempt.ticket.entry;
        match stays {
            true => self.home.take_back_to(key, attempt.pair.source),
            false => self.home.take_back(key),
        }
        if !self.bounce_returned(key) {
            self.route(now, key);
        }
    }

    /// A ticket came back without an attempt, and nothing can go to its domain for a while.
    pub(super) fn hold_domain(&mut self, attempt: Attempt, blocked: Blocked) {
        let key = attempt.ticket.entry;
        self.unpin(attempt.message.id());
        self.home.take_back(key);
        if !self.bounce_returned(key) {
            self.home.hold(key, &attempt.pair, blocked);
        }
    }

    /// Ends all recipients of an entry that is not out, by our own decision; or lets them be tried again.
    pub(super) fn end_entry(&mut self, now: Now, ending: Ending) {
        let id = self.home.entry(ending.entry).message;
        self.home.withdraw_routed(ending.entry);
        self.fetch(now, id, PendingRead::End(ending));
    }

    /// The same, now that the message is at hand, or known to be unreadable: that changes nothing for its
    /// recipients.
    pub(super) fn end_entry_of(&mut self, now: Now, ending: &Ending, message: Result<&Message, &ReadError>) {
        let decided = message.map_err(ToString::to_string).and_then(|message| {
            let read = message.read(|envelope| {
                let recipient = |index: u32| {
                    let recipient = envelope.recipients.get(index as usize);
                    recipient.map(|recipient| recipient.address.as_str().to_owned()).unwrap_or_default()
                };
                let outcome = outcome_of(message.id(), message.size(), envelope);
                Outcome { results: self.decided(ending, recipient), ..outcome }
            });
            read.map_err(|error| error.to_string())
        });
        let mut outcome = Box::new(decided.unwrap_or_else(|error| {
            let id = self.home.entry(ending.entry).message;
            tracing::error!(%id, error, "a message ends without being readable");
            let results = self.decided(ending, |_| String::new());
            Outcome { message: id.to_raw(), results, ..Outcome::default() }
        }));
        outcome.at_ms = now.wall_ms;
        if ending.fate == Fate::Delivered {
            outcome.site = RouteTarget::Discard.to_string();
            self.home.count_delivered(ending.entry, outcome.results.len() as u32);
        }
        self.count(&outcome.results);
        self.append_outcome(now, outcome, 0);
        match ending.fate {
            // It ends not, but is held, or tried again although it may have been delivered.
            Fate::Deferred { due_ms } => {
                let Answer { code, enhanced, text, .. } = &ending.answer;
                let entry = self.home.entry(ending.entry);
                if due_ms < entry.expires_ms {
                    self.metrics.possible_duplicates.add(entry.recipients.len() as u64);
                }
                self.home.put_back(ending.entry, due_ms, &answer_text(*code, *enhanced, text));
            }
            _ => self.remove_entry(ending.entry),
        }
    }

    fn dispose(&mut self, now: Now, attempt: &Attempt, verdicts: Vec<(u32, verdict::RecipientVerdict)>) -> Disposition {
        let entry = self.home.entry(attempt.ticket.entry);
        let (attempts, expires_ms) = (entry.attempts + 1, entry.expires_ms);
        let queue = self.home.queue_of(attempt.ticket.entry);
        let retry = self.retries.of_tenant(&queue.tenant);
        let (queue, key) = (Arc::clone(&queue.name), queue.route.clone());
        let retry = self.shapings.retry(retry, &key, &attempt.route);
        let due_ms = next_attempt_ms(&retry, attempts, now.wall_ms, self.random.u64(..));
        let results = Vec::with_capacity(verdicts.len());
        let mut disposition = Disposition { results, attempts, ..Disposition::default() };
        let by_another = |(_, verdict): &(u32, verdict::RecipientVerdict)| {
            matches!(verdict.fate, verdict::Fate::Retry(Retry { when: When::OtherSource, .. }))
        };
        let mut moves = false;
        if verdicts.iter().any(by_another) {
            self.avoided.refused(now.monotonic, &key.domain, attempt.pair.source);
            moves = self.has_welcome_source(now, attempt.ticket.entry, attempt.pair.destination(), &attempt.route.site);
        }
        for (index, verdict) in verdicts {
            let answer = verdict.answer;
            let (fate, answer) = match verdict.fate {
                verdict::Fate::Delivered => (Fate::Delivered, answer),
                verdict::Fate::Bounce => (Fate::Bounced, answer),
                verdict::Fate::BounceIfLastHost(_) => unreachable!("its owner looks for another host"),
                verdict::Fate::Retry(Retry { counts_attempt: false, .. }) => {
                    disposition.at_once.push(index);
                    continue;
                }
                verdict::Fate::Retry(Retry { in_doubt, when, .. }) => {
                    if in_doubt {
                        self.metrics.possible_duplicates.inc();
                    }
                    let due_ms = if when == When::OtherSource && moves { now.wall_ms } else { due_ms };
                    if due_ms < expires_ms {
                        (Fate::Deferred { due_ms }, answer)
                    } else {
                        let last = answer_text(answer.code, answer.enhanced, &answer.text);
                        let why = format!("Message would expire before its next attempt; last answer: {last}");
                        (Fate::Expired, expired(why))
                    }
                }
                // It may have left: it waits for the operator, or for its expiry.
                verdict::Fate::Hold => {
                    tracing::warn!(id = %attempt.message.id(), index, "held: {}", answer.text);
                    (Fate::Deferred { due_ms: expires_ms }, answer)
                }
            };
            if let Fate::Deferred { due_ms } = fate {
                let waiting = match verdict.fate {
                    verdict::Fate::Hold => &mut disposition.held,
                    _ if due_ms == now.wall_ms => &mut disposition.moved,
                    _ => &mut disposition.deferred,
                };
                waiting.recipients.push(index);
                waiting.due_ms = due_ms;
                waiting.last_answer = answer_text(answer.code, answer.enhanced, &answer.text);
            }
            let recipient = attempt.recipients.iter().find(|(place, _)| *place == index);
            let recipient = recipient.expect("a verdict is about one of the transaction's recipients").1.clone();
            let queue = queue.to_string();
            // Our own refusal, without a MAIL, was no attempt.
            let is_refused = fate == Fate::Bounced && !attempt.is_counted;
            let attempts = if is_refused { attempts - 1 } else { attempts };
            disposition.results.push(RecipientResult { index, recipient, queue, fate, attempts, answer });
        }
        assert_eq!(
            disposition.results.len() + disposition.at_once.len(),
            attempt.recipients.len(),
            "each recipient has one verdict"
        );
        disposition
    }

    fn outcome_of_attempt(
        &self,
        now: Now,
        attempt: Attempt,
        context: &DeliveryContext,
        results: Vec<RecipientResult>,
    ) -> Box<Outcome> {
        self.count(&results);
        let source = &self.config.egress_sources[attempt.pair.source];
        let mut outcome = attempt.outcome;
        outcome.at_ms = now.wall_ms;
        if results.iter().any(|result| result.fate == Fate::Delivered) {
            let age_ms = now.wall_ms.saturating_sub(outcome.created_ms);
            self.metrics.delivered_age_s.observe(age_ms as f64 / 1000.0);
        }
        outcome.results = results;
        outcome.site = attempt.pair.site.to_string();
        outcome.egress_source = source.name.clone();
        outcome.delivery_protocol = match attempt.route.terms.protocol {
            DeliveryProtocol::Smtp => "ESMTP".to_owned(),
            DeliveryProtocol::Lmtp => "LMTP".to_owned(),
        };
        outcome.peer_name.clone_from(&context.peer_name);
        outcome.peer_address.clone_from(&context.peer_address);
        outcome.source_address.clone_from(&context.source_address);
        outcome.set_tls_protocol(&context.tls_protocol, context.tls_verified_by);
        outcome.set_tls_cipher(&context.tls_cipher, &context.tls_peer_subject);
        outcome.session_id = context.session_id;
        outcome
    }

    fn decided(&self, ending: &Ending, recipient: impl Fn(u32) -> String) -> Vec<RecipientResult> {
        let entry = self.home.entry(ending.entry);
        let queue = &self.home.queue_of(ending.entry).name;
        let result = |index: u32| RecipientResult {
            index,
            recipient: recipient(index),
            queue: queue.to_string(),
            fate: ending.fate,
            // What is held has been tried, though nothing may have come of it.
            attempts: if ending.fate.is_final() { entry.attempts } else { entry.attempts.max(1) },
            answer: ending.answer.clone(),
        };
        entry.recipients.map(result).collect()
    }

    fn count(&self, results: &[RecipientResult]) {
        for result in results {
            match result.fate {
                Fate::Delivered => self.metrics.delivered.inc(),
                Fate::Deferred { .. } => self.metrics.transient_failures.inc(),
                Fate::Bounced | Fate::Expired | Fate::AdminBounced => self.metrics.failures.inc(),
            }
        }
    }
}

/// What an outcome copies from its message, so that the event needs nothing else.
pub(super) fn outcome_of(id: MessageId, size: u64, envelope: &ArchivedEnvelope) -> Outcome {
    Outcome {
        message: id.to_raw(),
        reverse_path: envelope.reverse_path.as_str().to_owned(),
        tenant: envelope.tenant.as_str().to_owned(),
        campaign: envelope.campaign.as_str().to_owned(),
        egress_pool: envelope.egress_pool.as_str().to_owned(),
        created_ms: envelope.created_ms.to_native(),
        size,
        reception_protocol: envelope.reception_protocol().to_owned(),
        headers: owned(envelope.headers.iter().map(|pair| (pair.0.as_str(), pair.1.as_str()))),
        meta: owned(envelope.meta.iter().map(|pair| (pair.0.as_str(), pair.1.as_str()))),
        ..Outcome::default()
    }
}

fn owned<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<(String, String)> {
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}
