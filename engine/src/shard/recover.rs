//! A start: what a log holds becomes entries, and its records that were not told yet become events.

use std::sync::Arc;

use postrider_spool::record::{Answer, Fate, LogId, MessageId, Sequence};
use postrider_spool::{Log, LogDirectory, RecordRef, RecoverError, RecoverOptions, Recovered};

use super::Shard;
use super::home_log::{HomeLog, handle_of};
use super::spooled::recovered_message;
use crate::limits::UNCLEAN_STARTS_MAX;
use crate::outcome::event::{Logged, LoggedRecord};
use crate::progress::Suspect;
use crate::schedule::queue::{Entry, EntryKey};
use crate::schedule::summary::{SummaryError, SummaryReader, SummaryWriter};

/// How the last answer of a quarantined message begins.
pub(super) const QUARANTINED: &str = "Quarantined:";

impl Shard {
    /// Takes a log: its live messages become entries, its records after `event_cursor` are told to the event log.
    pub fn recover(&mut self, directory: LogDirectory, event_cursor: Sequence, seed: u64) -> Result<(), RecoverError> {
        let mut events = Vec::new();
        let log_id = directory.id();
        let options = RecoverOptions { seed, event_cursor, ..RecoverOptions::default() };
        let batch_max = self.batch_max;
        let (home, metrics, progress) = (&mut self.home, &self.metrics, &self.progress);
        // One that ended the engine even while it was to be held is not looked at any more.
        let is_left = |id: MessageId| {
            let suspect = self.quarantined.iter().find(|suspect| suspect.message == id);
            suspect.is_some_and(|suspect| suspect.starts > UNCLEAN_STARTS_MAX)
        };
        let matching = self.routes.statics.any_matched.then_some(&*self.config);
        let sender_routes = self.config.sender_routes();
        let mut summaries = SummaryReader::new(batch_max, matching);
        let log = Log::recover(directory, options, &mut |recovered| match recovered {
            Recovered::Record { sequence, record } => events.push(logged(log_id, sequence, record)),
            Recovered::Summary { id, .. } if is_left(id) => {}
            Recovered::Summary { id, summary, pending, handle } => match summaries.read(home, id, summary, pending) {
                Ok(entry) => *handle = entry.map(handle_of),
                Err(SummaryError::Sender) => {}
                Err(error) => tracing::warn!(%id, %error, "a summary can not be used; the message is read instead"),
            },
            Recovered::Held { id, .. } => {
                metrics.spool_held_messages.inc();
                tracing::error!(%id, "held: it may have been delivered; see `postctl spool`");
            }
            Recovered::Message { id, .. } if is_left(id) => {
                metrics.quarantined_messages.inc();
                tracing::error!(%id, "quarantined: the engine died even over holding it; it stays in the spool");
            }
            Recovered::Message { id, message, pending, results, handle } => {
                progress.begin_work(id);
                match recovered_message(id, message, pending, results, batch_max, matching) {
                    Ok(spooled) => *handle = home.insert(&spooled).map_or(0, handle_of),
                    Err(error) => tracing::error!(%id, %error, "a message can not be read; it stays in the spool"),
                }
            }
            Recovered::Quarantined(quarantine) => {
                metrics.spool_quarantined_records.inc();
                tracing::error!("spool damage: {quarantine}");
            }
            Recovered::Cut(cut) => tracing::warn!("spool: {cut}"),
        })?;
        self.progress.end_work();
        if event_cursor == Sequence::default() && !events.is_empty() {
            tracing::warn!(
                log = log_id.0,
                records = events.len(),
                "the event log has nothing of this spool: what the spool still holds is told from its beginning, under \
                 the same event ids"
            );
        }
        let of_log = |(_, entry): &(EntryKey, Entry<'_>)| entry.message.log() == log_id && entry.is_held();
        let held: usize = self.home.entries().filter(of_log).map(|(_, entry)| entry.recipients.len()).sum();
        if held > 0 {
            tracing::warn!(log = log_id.0, recipients = held, "held as in doubt: peers may have taken their messages");
        }
        self.logs.push(HomeLog::new(log, events, SummaryWriter::new(sender_routes)));
        self.quarantine(log_id);
        Ok(())
    }

    /// Holds what the engine died of, it seems, so that the rest goes on: as what is in doubt, until an operator
    /// releases or bounces it, or it expires.
    fn quarantine(&mut self, log: LogId) {
        let of_log: Vec<Suspect> =
            self.quarantined.iter().filter(|suspect| suspect.message.log() == log).copied().collect();
        for Suspect { message, starts } in of_log {
            let entries: Vec<EntryKey> = self.entries_of(message).collect();
            for key in entries {
                let entry = self.home.entry(key);
                let expires_ms = entry.expires_ms;
                if entry.is_held() || !self.home.withdraw_one(key) {
                    continue;
                }
                self.metrics.quarantined_messages.inc();
                tracing::error!(id = %message, starts, "quarantined: the engine died each time that it worked on it");
                let text = format!("{QUARANTINED} the engine died {starts} times while it worked on this message");
                // RFC 3463 §3.4: X.3.0, our own system.
                let answer = Answer { code: 451, enhanced: Some((4, 3, 0)), text, command: String::new() };
                self.decide(vec![key], Fate::Deferred { due_ms: expires_ms }, Arc::new(answer));
            }
        }
    }
}

fn logged(log: LogId, sequence: Sequence, record: RecordRef<'_>) -> LoggedRecord {
    let record = match record {
        RecordRef::Message { envelope, size, .. } => {
            Logged::Message { envelope: Box::new(envelope.to_envelope()), size }
        }
        RecordRef::Outcome { outcome } => Logged::Outcome(Box::new(outcome.clone())),
    };
    LoggedRecord { log, sequence, record }
}
