//! A log of its home, with what waits for its commits.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use ahash::HashSet;
use postrider_spool::record::{Envelope, MessageId, Outcome, Sequence};
use postrider_spool::{AppendError, Closed, CommitNumber, Log, Summarize};

use super::SessionKey;
use crate::accept::Refusal;
use crate::handover::IntentKey;
use crate::limits::{
    COMMIT_PATIENCE, FAILURE_COMPLAINT_INTERVAL, OUTCOME_COMMIT_DELAY, OUTCOMES_GATHERED_MAX, REOPEN_PAUSE_MAX,
    REOPEN_PAUSE_MIN, UPKEEP_DELAY, WRITE_PATIENCE,
};
use crate::mail::time::Now;
use crate::outcome::event::LoggedRecord;
use crate::schedule::queue::{EntryKey, Home};
use crate::schedule::summary::SummaryWriter;

/// A log with what waits for its commits.
#[derive(Debug)]
pub(super) struct HomeLog {
    pub(super) log: Log,
    /// In commit order.
    pub(super) uncommitted: VecDeque<(CommitNumber, Uncommitted)>,
    /// Outcomes that the log does not take now, and those of commits that failed, in the order in which they came
    /// about: the latest record about a recipient counts.
    pub(super) waiting: VecDeque<Decided>,
    /// Records that are durable and not yet given to the event log.
    pub(super) events: Vec<LoggedRecord>,
    /// Nobody waits for an outcome's commit, so it may ride with a message's until then.
    commit_at: Duration,
    /// The outcomes among what the next commit takes.
    outcomes_gathered: usize,
    /// What the log has to do for itself doesn't wait as long for that commit.
    upkeep_at: Duration,
    /// Senders that shared a commit come back about together. So behind such a one the next waits until then for more
    /// to share it: fewer syncs, and in the mean the answers come sooner.
    pub(super) gather_until: Duration,
    pub(super) running_operations: usize,
    /// When the running commit began.
    pub(super) committing_since: Option<Duration>,
    /// Turns whose commit went before the log's upkeep, one behind the other.
    pub(super) upkeep_skipped: u32,
    /// What the log's checkpoints tell of its messages.
    pub(super) summaries: SummaryWriter,
    failures: Failures,
    /// No next start would find what goes into it.
    pub(super) is_gone: bool,
}

/// Of a log that failed to write. One whose disk is gone would otherwise be opened, and fail, as fast as that goes.
#[derive(Debug, Default)]
struct Failures {
    /// Since the first one, until the log is open again.
    since: Option<Duration>,
    last: Option<Duration>,
    /// When somebody was told.
    told: Duration,
    /// Between the last failure and the next try. None behind the first of several: most are over with it.
    pause: Duration,
    reopen_at: Option<Duration>,
}

#[derive(Debug)]
pub(super) enum Uncommitted {
    Message(Appended),
    Outcome(Sequence, Decided),
}

/// An outcome that is not durable yet.
#[derive(Debug)]
pub(super) struct Decided {
    pub(super) outcome: Box<Outcome>,
    /// It is an intent, and somebody waits for it.
    pub(super) intent: Option<IntentKey>,
    /// The recipients whose message was sent, of which a crash knows more once this is durable.
    pub(super) sent: u32,
}

/// A message in the log's memory: nobody is told of it, and nothing is done with it, before its commit.
#[derive(Debug)]
pub(super) struct Appended {
    pub(super) message: MessageId,
    pub(super) envelope: Box<Envelope>,
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
pub(super) struct Summaries<'a> {
    pub(super) home: &'a Home,
    /// Messages of which the schedule knows more than the log.
    pub(super) ahead: HashSet<u64>,
    pub(super) writer: &'a mut SummaryWriter,
}

/// Why a home takes no mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoMail {
    /// The spool is no longer where the next start looks for it.
    Gone,
    Log(Closed),
}

impl NoMail {
    /// Want of room is told as such (RFC 3463 §3.4, X.3.1); all else has no code of its own.
    pub(super) fn refusal(self) -> Refusal {
        let (code, enhanced) = match self {
            Self::Log(Closed::NoFile) => (451, (4, 3, 0)),
            Self::Log(_) | Self::Gone => (452, (4, 3, 1)),
        };
        Refusal::new(code, enhanced, format!("Spool takes no mail now: {self}"))
    }
}

impl fmt::Display for NoMail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the spool's directory is no longer in its place"),
            Self::Log(closed) => closed.fmt(f),
        }
    }
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

impl HomeLog {
    /// `events`: what its records since the last start have to tell.
    pub(super) fn new(log: Log, events: Vec<LoggedRecord>, summaries: SummaryWriter) -> Self {
        Self {
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
            summaries,
            failures: Failures::default(),
            is_gone: false,
        }
    }

    pub(super) fn set_entry(&mut self, id: MessageId, entry: Option<EntryKey>) {
        if let Some(entry) = entry {
            self.log.set_handle(id, handle_of(entry));
        }
    }

    pub(super) fn appended_message(&mut self, now: Now) {
        self.commit_at = now.monotonic.max(self.gather_until);
    }

    /// Appends what waits, for as long as the log takes it.
    pub(super) fn append_waiting(&mut self, now: Now) -> Result<(), AppendError> {
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
    pub(super) fn takes_mail(&self, now: Now) -> Result<(), NoMail> {
        if self.is_gone {
            return Err(NoMail::Gone);
        }
        self.log.is_open_for_mail().map_err(NoMail::Log)?;
        if self.is_stalled(now) { Err(NoMail::Log(Closed::Backlog)) } else { Ok(()) }
    }

    /// Whether what becomes of its messages can be written down, and if not, why not.
    pub(super) fn takes_outcomes(&self, now: Now) -> Result<(), Closed> {
        self.log.is_open_for_outcomes()?;
        if self.waiting.is_empty() && !self.is_stalled(now) { Ok(()) } else { Err(Closed::Backlog) }
    }

    /// The disk does not answer.
    pub(super) fn is_stalled(&self, now: Now) -> bool {
        self.committing_since.is_some_and(|since| now.monotonic >= since + COMMIT_PATIENCE)
    }

    /// The log has failed and is opened again, by and by. Whether that is to be told: not each time where it goes on.
    pub(super) fn handle_failure(&mut self, now: Now) -> bool {
        let Failures { since, last, told, pause, reopen_at } = &mut self.failures;
        since.get_or_insert(now.monotonic);
        let goes_on = last.is_some_and(|last| now.monotonic < last + 2 * REOPEN_PAUSE_MAX);
        *last = Some(now.monotonic);
        *pause = if goes_on { (*pause * 2).clamp(REOPEN_PAUSE_MIN, REOPEN_PAUSE_MAX) } else { Duration::ZERO };
        *reopen_at = Some(now.monotonic + *pause);
        let is_told = !goes_on || now.monotonic >= *told + FAILURE_COMPLAINT_INTERVAL;
        if is_told {
            *told = now.monotonic;
        }
        is_told
    }

    pub(super) fn reopened(&mut self) {
        self.failures.since = None;
    }

    /// Whether it has taken no write for long: they fail, or the disk does not answer.
    pub(super) fn is_broken(&self, now: Now) -> bool {
        let since = self.failures.since.or(self.committing_since);
        since.is_some_and(|since| now.monotonic >= since + WRITE_PATIENCE)
    }

    pub(super) fn reopen_when_due(&mut self, now: Now) {
        if self.failures.reopen_at.is_some_and(|at| at <= now.monotonic) {
            self.failures.reopen_at = None;
            self.log.begin_reopen();
        }
    }

    pub(super) fn next_timeout(&self) -> Duration {
        let reopening = self.failures.reopen_at.unwrap_or(Duration::MAX);
        let upkeep = self.log.next_timeout().unwrap_or(Duration::MAX).min(reopening);
        match self.log.has_uncommitted() {
            false => upkeep,
            true if self.log.is_committing() => upkeep.max(self.upkeep_at.min(self.commit_at)),
            true => self.commit_at.min(upkeep.max(self.upkeep_at)),
        }
    }

    /// Whether what is to be committed waits for more that shares its commit.
    pub(super) fn is_gathering(&self, now: Now) -> bool {
        let is_upkeep_due = || self.log.next_timeout().is_some_and(|due| due <= now.monotonic);
        let waits = self.log.has_uncommitted() && now.monotonic < self.commit_at;
        waits && (now.monotonic < self.upkeep_at || !is_upkeep_due())
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.uncommitted.is_empty() && self.waiting.is_empty() && self.events.is_empty() && !self.log.has_uncommitted()
    }
}

/// One of the message's entries. The log keeps its place, one higher, as the message's handle.
pub(super) fn entry_of(home: &Home, id: MessageId, handle: u32) -> Option<EntryKey> {
    let key = EntryKey(handle.checked_sub(1)?);
    (home.has_entry(key) && home.entry(key).message == id).then_some(key)
}

pub(super) fn handle_of(entry: EntryKey) -> u32 {
    entry.0 + 1
}

#[cfg(test)]
mod tests {
    use postrider_spool::record::{LogId, Sequence};

    use super::*;
    use crate::handover::{RecipientGroup, Spooled};

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
