//! Stage 2 at a shard: commits, and what waits for them.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ahash::{HashMap, HashMapExt as _, HashSet};
use postrider_spool::record::{Answer, Envelope, Fate, LogId, MessageId, Outcome, RecipientResult, Sequence};
use postrider_spool::{
    AppendError, Closed, CommitNumber, Completion, Fetch, Log, LogDirectory, Message, Operation, Progress, ReadError,
    RecordRef, RecoverError, RecoverOptions, Recovered, Summarize,
};

use super::schedule::PendingRead;
use super::{Action, SessionKey, Shard};
use crate::accept::Refusal;
use crate::admin::answer_text;
use crate::config::{Config, RoutedMail};
use crate::handover::{IntentKey, RecipientGroup, ShardMessage, Spooled};
use crate::limits::{
    COMMIT_GATHER, COMMIT_PATIENCE, OUTCOME_COMMIT_DELAY, OUTCOMES_GATHERED_MAX, UNCLEAN_STARTS_MAX, UNREAD_PER_TURN,
    UPKEEP_DELAY, UPKEEP_SKIPPED_MAX,
};
use crate::mail::address::queue_domain;
use crate::mail::time::Now;
use crate::outcome::event::{Logged, LoggedRecord};
use crate::progress::Suspect;
use crate::schedule::queue::{Entry, EntryKey, Home};
use crate::schedule::summary::{SummaryError, SummaryReader, SummaryWriter};

/// How the last answer of a quarantined message begins.
pub(super) const QUARANTINED: &str = "Quarantined:";

/// A log with what waits for its commits.
#[derive(Debug)]
pub(super) struct HomeLog {
    pub(super) log: Log,
    /// In commit order.
    pub(super) uncommitted: VecDeque<(CommitNumber, Uncommitted)>,
    /// Outcomes that the log does not take now, and those of commits that failed, in the order in which they came
    /// about: the latest record about a recipient counts.
    waiting: VecDeque<Decided>,
    /// Records that are durable and not yet given to the event log.
    events: Vec<LoggedRecord>,
    /// Nobody waits for an outcome's commit, so it may ride with a message's until then.
    commit_at: Duration,
    /// The outcomes among what the next commit takes.
    outcomes_gathered: usize,
    /// What the log has to do for itself doesn't wait as long for that commit.
    upkeep_at: Duration,
    /// Senders that shared a commit come back about together. So behind such a one the next waits until then for more
    /// to share it: fewer syncs, and in the mean the answers come sooner.
    gather_until: Duration,
    running_operations: usize,
    /// When the running commit began.
    committing_since: Option<Duration>,
    /// Turns whose commit went before the log's upkeep, one behind the other.
    upkeep_skipped: u32,
    /// What the log's checkpoints tell of its messages.
    summaries: SummaryWriter,
}

#[derive(Debug)]
pub(super) enum Uncommitted {
    Message(Box<Appended>),
    Outcome(Sequence, Decided),
}

/// An outcome that is not durable yet.
#[derive(Debug)]
pub(super) struct Decided {
    outcome: Box<Outcome>,
    /// It is an intent, and somebody waits for it.
    intent: Option<IntentKey>,
    /// The recipients whose message was sent, of which a crash knows more once this is durable.
    sent: u32,
}

/// A message in the log's memory: nobody is told of it, and nothing is done with it, before its commit.
#[derive(Debug)]
pub(super) struct Appended {
    pub(super) message: MessageId,
    pub(super) envelope: Envelope,
    pub(super) size: u64,
    pub(super) answer_to: AnswerTo,
}

/// Who waits for the commit.
#[derive(Debug, Clone, Copy)]
pub(super) enum AnswerTo {
    Session(SessionKey),
    Injection(u64),
}

/// Tells a log's checkpoints what the schedule knows of its messages.
struct Summaries<'a> {
    home: &'a Home,
    /// Messages of which the schedule knows more than the log.
    ahead: HashSet<u64>,
    writer: &'a mut SummaryWriter,
}

impl Summarize for Summaries<'_> {
    fn begin(&mut self) {
        self.writer.begin();
    }

    /// A message that has no entry yet, or none any more, is read at the next start. So is one whose outcome the log
    /// didn't take yet: a checkpoint must not tell what no record does.
    fn summarize(&mut self, id: MessageId, handle: u32, summary: &mut Vec<u8>) {
        if self.ahead.contains(&id.to_raw()) {
            return;
        }
        if let Some(first) = entry_of(self.home, id, handle) {
            self.writer.summarize(self.home, first, summary);
        }
    }
}

/// One of the message's entries. The log keeps its place, one higher, as the message's handle.
pub(super) fn entry_of(home: &Home, id: MessageId, handle: u32) -> Option<EntryKey> {
    let key = EntryKey(handle.checked_sub(1)?);
    (home.has_entry(key) && home.entry(key).message == id).then_some(key)
}

fn handle_of(entry: EntryKey) -> u32 {
    entry.0 + 1
}

impl HomeLog {
    pub(super) fn set_entry(&mut self, id: MessageId, entry: Option<EntryKey>) {
        if let Some(entry) = entry {
            self.log.set_handle(id, handle_of(entry));
        }
    }

    pub(super) fn appended_message(&mut self, now: Now) {
        self.commit_at = now.monotonic.max(self.gather_until);
    }

    /// Appends what waits, for as long as the log takes it.
    fn append_waiting(&mut self, now: Now) -> Result<(), AppendError> {
        while let Some(decided) = self.waiting.pop_front() {
            if !self.log.has_uncommitted() {
                self.commit_at = now.monotonic + OUTCOME_COMMIT_DELAY;
                self.upkeep_at = now.monotonic + UPKEEP_DELAY;
                self.outcomes_gathered = 0;
            }
            if decided.intent.is_some() || self.outcomes_gathered + 1 >= OUTCOMES_GATHERED_MAX {
                self.commit_at = self.commit_at.min(now.monotonic);
            }
            match self.log.append_outcome(&decided.outcome) {
                Ok((sequence, commit)) => {
                    self.outcomes_gathered += 1;
                    self.uncommitted.push_back((commit, Uncommitted::Outcome(sequence, decided)));
                }
                Err(error) => {
                    self.waiting.push_front(decided);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether mail is taken, and if not, why not.
    pub(super) fn takes_mail(&self, now: Now) -> Result<(), Closed> {
        self.log.is_open_for_mail()?;
        if self.is_stalled(now) { Err(Closed::Backlog) } else { Ok(()) }
    }

    /// Whether what becomes of its messages can be written down, and if not, why not.
    pub(super) fn takes_outcomes(&self, now: Now) -> Result<(), Closed> {
        self.log.is_open_for_outcomes()?;
        if self.waiting.is_empty() && !self.is_stalled(now) { Ok(()) } else { Err(Closed::Backlog) }
    }

    /// The disk does not answer.
    fn is_stalled(&self, now: Now) -> bool {
        self.committing_since.is_some_and(|since| now.monotonic >= since + COMMIT_PATIENCE)
    }

    pub(super) fn next_timeout(&self) -> Duration {
        let upkeep = self.log.next_timeout().unwrap_or(Duration::MAX);
        match self.log.has_uncommitted() {
            false => upkeep,
            true if self.log.is_committing() => upkeep.max(self.upkeep_at.min(self.commit_at)),
            true => self.commit_at.min(upkeep.max(self.upkeep_at)),
        }
    }

    /// Whether what is to be committed waits for more that shares its commit.
    fn is_gathering(&self, now: Now) -> bool {
        let is_upkeep_due = || self.log.next_timeout().is_some_and(|due| due <= now.monotonic);
        let waits = self.log.has_uncommitted() && now.monotonic < self.commit_at;
        waits && (now.monotonic < self.upkeep_at || !is_upkeep_due())
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.uncommitted.is_empty() && self.waiting.is_empty() && self.events.is_empty() && !self.log.has_uncommitted()
    }
}

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
        let of_log = |(_, entry): &(EntryKey, Entry<'_>)| entry.message.log() == log_id && entry.is_held();
        let held: usize = self.home.entries().filter(of_log).map(|(_, entry)| entry.recipients.len()).sum();
        if held > 0 {
            tracing::warn!(log = log_id.0, recipients = held, "held as in doubt: peers may have taken their messages");
        }
        self.logs.push(HomeLog {
            log,
            uncommitted: VecDeque::new(),
            waiting: VecDeque::new(),
            events,
            commit_at: Duration::ZERO,
            outcomes_gathered: 0,
            upkeep_at: Duration::ZERO,
            gather_until: Duration::ZERO,
            running_operations: 0,
            committing_since: None,
            upkeep_skipped: 0,
            summaries: SummaryWriter::new(sender_routes),
        });
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
            // The turn appends what waits for it.
            Progress::Reopened => tracing::warn!(log = log.0, "the spool is open again"),
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
    pub(super) fn append_outcome(&mut self, now: Now, outcome: Outcome, sent: u32) {
        self.append_decided(now, Decided { outcome: Box::new(outcome), intent: None, sent });
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
                    let Appended { message, envelope, size, answer_to } = *appended;
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
                    let record = Logged::Outcome(*outcome);
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
        let log = self.logs[place].log.id();
        tracing::error!(log = log.0, %error, "the spool failed to write; it takes no mail until it is reopened");
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
        self.logs[place].log.begin_reopen();
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
            (PendingRead::Ticket(ticket), Err(error)) => self.fail_ticket(now, &ticket, error),
            (PendingRead::Ask { question, rows }, result) => self.ask_read(question, rows, result),
            (PendingRead::Inspect { question, want_body }, result) => {
                self.tell_inspected(question, want_body, result.ok())
            }
            (PendingRead::End(ending), result) => self.end_entry_of(now, &ending, result),
        }
    }
}

/// What a durable message means for the schedule.
fn spooled(message: MessageId, envelope: &Envelope, batch_max: usize) -> Spooled {
    let recipients = envelope.recipients.iter().enumerate();
    let recipients = recipients.map(|(index, recipient)| GroupedRecipient {
        index: index as u32,
        domain: queue_domain(&recipient.address),
        attempts: 0,
        due_ms: envelope.first_attempt_ms,
        last_answer: None,
    });
    Spooled {
        message,
        tenant: envelope.tenant.clone(),
        campaign: envelope.campaign.clone(),
        egress_pool: envelope.egress_pool.clone(),
        priority: envelope.priority,
        expires_ms: envelope.expires_ms,
        groups: group(recipients, batch_max),
    }
}

fn recovered_message(
    id: MessageId,
    message: &Message,
    pending: &[u32],
    results: &[RecipientResult],
    batch_max: usize,
    matching: Option<&Config>,
) -> Result<Spooled, ReadError> {
    let envelope = message.envelope()?;
    let first_attempt_ms = envelope.first_attempt_ms.to_native();
    let recipient = |&index: &u32| {
        let address = envelope.recipients.get(index as usize)?.address.as_str();
        let state = results.iter().find(|result| result.index == index);
        let (attempts, due_ms) = match state {
            Some(RecipientResult { attempts, fate: Fate::Deferred { due_ms }, .. }) => (*attempts, *due_ms),
            _ => (0, first_attempt_ms),
        };
        let answer = state.map(|result| &result.answer);
        let last_answer = answer.map(|answer| Arc::from(answer_text(answer.code, answer.enhanced, &answer.text)));
        Some(GroupedRecipient { index, domain: queue_domain(address), attempts, due_ms, last_answer })
    };
    let mut spooled = Spooled {
        message: id,
        tenant: envelope.tenant.as_str().to_owned(),
        campaign: envelope.campaign.as_str().to_owned(),
        egress_pool: envelope.egress_pool.as_str().to_owned(),
        priority: envelope.priority,
        expires_ms: envelope.expires_ms.to_native(),
        groups: group(pending.iter().filter_map(recipient), batch_max),
    };
    if let Some(config) = matching {
        match_routes(config, &mut spooled, envelope.reverse_path.as_str());
    }
    Ok(spooled)
}

/// Which of the routes with a `match` the message's recipients take.
fn match_routes(config: &Config, spooled: &mut Spooled, sender: &str) {
    let mail = RoutedMail { tenant: &spooled.tenant, campaign: &spooled.campaign, sender };
    for group in &mut spooled.groups {
        group.matched = config.matched_route(&group.domain, &mail);
    }
}

struct GroupedRecipient<'a> {
    index: u32,
    domain: Cow<'a, str>,
    attempts: u32,
    due_ms: u64,
    last_answer: Option<Arc<str>>,
}

impl GroupedRecipient<'_> {
    fn alone(&self) -> RecipientGroup {
        RecipientGroup {
            domain: Arc::from(&*self.domain),
            recipients: [self.index].into(),
            attempts: self.attempts,
            due_ms: self.due_ms,
            last_answer: self.last_answer.clone(),
            matched: None,
        }
    }
}

/// Recipients at one domain with the same state share an entry, and so a transaction, up to `batch_max`.
fn group<'a>(mut recipients: impl Iterator<Item = GroupedRecipient<'a>>, batch_max: usize) -> Vec<RecipientGroup> {
    let (first, second) = (recipients.next(), recipients.next());
    if let (Some(only), None) = (&first, &second) {
        return vec![only.alone()];
    }
    let recipients = first.into_iter().chain(second).chain(recipients);
    let mut groups: Vec<(RecipientGroup, Vec<u32>)> = Vec::new();
    let mut places = HashMap::new();
    for recipient in recipients {
        let key = (recipient.domain.clone(), recipient.attempts, recipient.due_ms);
        let place = *places.entry(key.clone()).or_insert(groups.len());
        if place == groups.len() || groups[place].1.len() == batch_max {
            places.insert(key, groups.len());
            groups.push((recipient.alone(), vec![recipient.index]));
        } else {
            groups[place].1.push(recipient.index);
        }
    }
    let finish = |(group, indices): (RecipientGroup, Vec<u32>)| RecipientGroup { recipients: indices.into(), ..group };
    groups.into_iter().map(finish).collect()
}

fn logged(log: LogId, sequence: Sequence, record: RecordRef<'_>) -> LoggedRecord {
    let record = match record {
        RecordRef::Message { envelope, size, .. } => Logged::Message { envelope: envelope.to_envelope(), size },
        RecordRef::Outcome { outcome } => Logged::Outcome(outcome.clone()),
    };
    LoggedRecord { log, sequence, record }
}

#[cfg(test)]
mod tests {
    use postrider_spool::record::{LogId, Sequence};

    use super::*;
    use crate::handover::RecipientGroup;

    /// A checkpoint that tells of an attempt whose record isn't in the log would, after a crash, hide that its event is
    /// missing. The simulator found one.
    #[test]
    fn a_checkpoint_is_not_told_what_the_log_has_not_taken() {
        let mut home = Home::default();
        let messages = [7, 8].map(|number| {
            let group = RecipientGroup {
                domain: "example.net".into(),
                recipients: [0].into(),
                attempts: 2,
                due_ms: 1_000,
                last_answer: Some("451 later".into()),
                matched: None,
            };
            let id = MessageId::new(LogId(0), Sequence(number));
            let spooled = Spooled {
                message: id,
                tenant: String::new(),
                campaign: String::new(),
                egress_pool: "default".to_owned(),
                priority: 1,
                expires_ms: 9_000,
                groups: vec![group],
            };
            (id, handle_of(home.insert(&spooled).expect("it has an entry")))
        });
        let mut writer = SummaryWriter::default();
        let ahead = HashSet::from_iter([messages[0].0.to_raw()]);
        let mut summaries = Summaries { home: &home, ahead, writer: &mut writer };
        summaries.begin();
        let told = messages.map(|(id, handle)| {
            let mut summary = Vec::new();
            summaries.summarize(id, handle, &mut summary);
            !summary.is_empty()
        });
        assert_eq!(told, [false, true]);
    }
}
