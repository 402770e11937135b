//! Stage 2 at a shard: commits, and what waits for them.

use postrider_spool::record::{LogId, MessageId, Outcome, Sequence};
use postrider_spool::{CommitNumber, Completion, Fetch, Log, Message, Operation, Progress, ReadError};

use super::home_log::{Appended, Decided, HomeLog, Summaries, Uncommitted};
use super::schedule::PendingRead;
use super::spooled::{match_routes, spooled};
use super::{Action, Shard};
use crate::accept::Refusal;
use crate::handover::{IntentKey, ShardMessage};
use crate::limits::{COMMIT_GATHER, UNREAD_PER_TURN, UPKEEP_SKIPPED_MAX};
use crate::mail::time::Now;
use crate::outcome::event::{Logged, LoggedRecord};

impl Shard {
    /// A log without a shard of its own takes no mail; once it is empty, nothing is left to serve.
    pub(super) fn give_up_drained_logs(&mut self) {
        let drained = |home: &HomeLog| home.log.is_drained() && home.is_quiet() && home.running_operations == 0;
        while let Some(place) = self.logs.iter().skip(1).position(drained) {
            let home = self.logs.remove(place + 1);
            tracing::info!(log = home.log.id().0, "the log has drained and is removed");
            self.actions.push_back(Action::RemoveLog(Box::new(home.log)));
        }
    }

    /// An operation of a log has ended.
    pub fn spool_completed(&mut self, now: Now, log: LogId, completion: Completion) {
        let place = self.log_index(log);
        self.logs[place].running_operations -= 1;
        match self.logs[place].log.handle_completion(now.monotonic, completion) {
            // A message that shares its body takes two reads, and the second must not wait for a commit.
            Progress::Nothing => {
                while let Some(operation) = self.logs[place].log.poll_read() {
                    self.start_operation(place, operation);
                }
            }
            Progress::Damaged { id, error } => {
                self.metrics.spool_damaged_messages.inc();
                tracing::error!(%id, %error, "a message that waits is damaged on the disk");
            }
            Progress::Durable(commit) => self.release_durable(now, place, commit),
            Progress::Read { id, result } => self.handle_read(now, id, result),
            Progress::Failed { error } => self.handle_spool_failure(now, place, &error),
            Progress::NotMade { path, error } => {
                self.metrics.spool_files_not_made.inc();
                let path = path.display();
                tracing::error!(log = log.0, %path, %error, "a file of the spool can't be made; it is tried again");
            }
            // The turn appends what waits for it.
            Progress::Reopened => {
                self.logs[place].reopened();
                tracing::warn!(log = log.0, "the spool is open again");
            }
        }
    }

    /// Whether everything that was appended is durable and told to the event log.
    pub fn is_committed(&self) -> bool {
        self.logs.iter().all(HomeLog::is_quiet)
    }

    /// Begins what the logs want done: for a message's sake at once, or when a few have come together, for outcomes
    /// alone a little later.
    pub(super) fn commit(&mut self, now: Now) {
        for home in &mut self.logs {
            home.reopen_when_due(now);
            // What still finds no room is tried again with the next turn.
            let _ = home.append_waiting(now);
            if home.is_gathering(now) {
                continue;
            }
            let ahead = home.waiting.iter().map(|decided| decided.outcome.message).collect();
            let HomeLog { log, summaries, uncommitted, committing_since, running_operations, upkeep_skipped, .. } =
                home;
            let mut summaries = Summaries { home: &self.home, ahead, writer: summaries };
            // What is committed with this turn goes out behind it, so upkeep waits for a turn in which nothing is.
            let is_urgent = log.has_uncommitted() && !log.is_committing() && *upkeep_skipped < UPKEEP_SKIPPED_MAX;
            *upkeep_skipped = if is_urgent { *upkeep_skipped + 1 } else { 0 };
            let mut poll = |log: &mut Log| {
                if is_urgent {
                    log.poll_awaited(now.monotonic)
                } else {
                    log.poll_operation(now.monotonic, &mut summaries)
                }
            };
            while let Some(operation) = poll(log) {
                if !uncommitted.is_empty() {
                    committing_since.get_or_insert(now.monotonic);
                }
                *running_operations += 1;
                self.actions.push_back(Action::Spool { log: log.id(), operation });
            }
        }
    }

    pub(super) fn start_operation(&mut self, place: usize, operation: Operation) {
        self.logs[place].running_operations += 1;
        self.actions.push_back(Action::Spool { log: self.logs[place].log.id(), operation });
    }

    /// Gives what is durable to the event log.
    pub(super) fn publish(&mut self) {
        for home in &mut self.logs {
            if !home.events.is_empty() {
                self.actions.push_back(Action::Events(std::mem::take(&mut home.events)));
            }
        }
    }

    /// Writes an outcome's record; the events follow once it is durable. `sent`: recipients counted as sent to.
    pub(super) fn append_outcome(&mut self, now: Now, outcome: Box<Outcome>, sent: u32) {
        self.append_decided(now, Decided { outcome, intent: None, sent });
    }

    /// Writes an intent's record, and tells who waits for it once it is durable.
    pub(super) fn append_intent(&mut self, now: Now, outcome: Outcome, key: IntentKey) {
        self.append_decided(now, Decided { outcome: Box::new(outcome), intent: Some(key), sent: 0 });
    }

    fn append_decided(&mut self, now: Now, decided: Decided) {
        let place = self.log_index(MessageId::from_raw(decided.outcome.message).log());
        let home = &mut self.logs[place];
        home.waiting.push_back(decided);
        if let Err(error) = home.append_waiting(now)
            && home.waiting.len() == 1
        {
            let log = home.log.id().0;
            tracing::error!(log, %error, "outcomes wait for the spool; no attempt is begun meanwhile");
        }
    }

    pub(super) fn set_event_cursor(&mut self, log: LogId, sequence: Sequence) {
        if let Some(home) = self.logs.iter_mut().find(|home| home.log.id() == log) {
            home.log.set_event_cursor(sequence);
        }
    }

    /// Everything of commits up to `commit` is durable: senders are answered, entries scheduled, events told.
    fn release_durable(&mut self, now: Now, place: usize, commit: CommitNumber) {
        if let Some(since) = self.logs[place].committing_since.take() {
            self.metrics.spool_commit_duration_s.observe(now.monotonic.saturating_sub(since).as_secs_f64());
        }
        let released = self.logs[place].uncommitted.iter().take_while(|(number, _)| *number <= commit).count();
        self.metrics.spool_commit_records.observe(released as f64);
        self.metrics.spool_commits.inc();
        let is_message = |(_, uncommitted): &&(_, Uncommitted)| matches!(uncommitted, Uncommitted::Message(_));
        if self.logs[place].uncommitted.iter().take(released).filter(is_message).count() > 1 {
            self.logs[place].gather_until = now.monotonic + COMMIT_GATHER;
        }
        while self.logs[place].uncommitted.front().is_some_and(|(number, _)| *number <= commit) {
            let Some((_, uncommitted)) = self.logs[place].uncommitted.pop_front() else { return };
            let log = self.logs[place].log.id();
            match uncommitted {
                Uncommitted::Message(appended) => {
                    let Appended { message, envelope, size, answer_to } = appended;
                    let mut spooled = spooled(message, &envelope, self.batch_max);
                    if self.routes.statics.any_matched {
                        match_routes(&self.config, &mut spooled, &envelope.reverse_path);
                    }
                    self.answer_sender(now, answer_to, Ok(spooled.message));
                    let entry = self.home.insert(&spooled);
                    self.logs[place].set_entry(message, entry);
                    let record = Logged::Message { envelope, size };
                    self.logs[place].events.push(LoggedRecord { log, sequence: message.sequence(), record });
                }
                Uncommitted::Outcome(sequence, Decided { outcome, intent, sent }) => {
                    self.progress.add_recorded(u64::from(sent));
                    let record = Logged::Outcome(outcome);
                    self.logs[place].events.push(LoggedRecord { log, sequence, record });
                    if let Some(key) = intent {
                        self.tell(key.owner, ShardMessage::Intended(key));
                    }
                }
            }
        }
    }

    /// A write or sync failed: what was in memory is void, and nobody was told of it.
    fn handle_spool_failure(&mut self, now: Now, place: usize, error: &std::io::Error) {
        if self.logs[place].handle_failure(now) {
            let log = self.logs[place].log.id().0;
            tracing::error!(log, %error, "the spool failed to write; it takes no mail until it is open again");
        }
        let waiting = std::mem::take(&mut self.logs[place].waiting);
        for (_, uncommitted) in std::mem::take(&mut self.logs[place].uncommitted) {
            match uncommitted {
                Uncommitted::Outcome(_, decided) => self.logs[place].waiting.push_back(decided),
                Uncommitted::Message(appended) => {
                    let refusal = Refusal::new(451, (4, 3, 0), "Spool failed, try again later");
                    self.answer_sender(now, appended.answer_to, Err(refusal));
                }
            }
        }
        self.logs[place].waiting.extend(waiting);
        self.logs[place].committing_since = None;
        self.logs[place].reopen_when_due(now);
    }

    /// Gets a message that something waits for: at once where it is in memory, else by a read.
    pub(super) fn fetch(&mut self, now: Now, id: MessageId, pending: PendingRead) {
        let place = self.log_index(id.log());
        match self.logs[place].log.message(id) {
            Ok(Fetch::Ready(message)) => self.give_message(now, pending, Ok(&message)),
            Ok(Fetch::Read(operation)) => {
                self.reading.entry(id).or_default().push(pending);
                self.start_operation(place, operation);
            }
            // The log reads only so many at once. It is asked again in the turns that follow.
            Err(ReadError::Busy) => self.unread.push_back((id, pending)),
            Err(error) => self.give_message(now, pending, Err(&error)),
        }
    }

    fn handle_read(&mut self, now: Now, id: MessageId, result: Result<Message, ReadError>) {
        for pending in self.reading.remove(&id).unwrap_or_default() {
            self.give_message(now, pending, result.as_ref());
        }
    }

    /// Asks again for messages that had to wait for reads under way, or for memory.
    pub(super) fn fetch_waiting(&mut self, now: Now) {
        for _ in 0..self.unread.len().min(UNREAD_PER_TURN) {
            if let Some((id, pending)) = self.unread.pop_front() {
                self.fetch(now, id, pending);
            }
        }
    }

    fn give_message(&mut self, now: Now, pending: PendingRead, result: Result<&Message, &ReadError>) {
        match (pending, result) {
            (PendingRead::Ticket(ticket), Ok(message)) => {
                self.progress.begin_work(message.id());
                self.send_ticket(now, ticket, message.clone());
                self.progress.end_work();
            }
            (PendingRead::Ticket(ticket), Err(error)) => self.hold_unreadable(now, &ticket, error),
            (PendingRead::Ask { question, rows }, result) => self.ask_read(now, question, rows, result),
            (PendingRead::Inspect { question, want_body }, result) => {
                self.tell_inspected(question, want_body, result.ok())
            }
            (PendingRead::End(ending), result) => self.end_entry_of(now, &ending, result),
        }
    }
}
