//! One log of a spool on a ring, driven as the engine drives it: what it asks for runs on tokio-uring, what was
//! appended goes with the next commit, and the event cursor follows what is durable.
//!
//! The only file of the bench that calls [`Log`]; the measurements know this driver.

use std::collections::VecDeque;
use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use postrider_spool::{
    AppendError, CommitNumber, Completion, Log, MessageId, Operation, Progress, RecoverOptions, Sequence, Spool,
    Summarize, execute_on_ring,
};
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout_at;

use super::mail::{Mail, Turnout};

/// How the log is set up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup<'a> {
    /// A directory of its own is made in it, and removed with the driver.
    pub(super) parent: &'a Path,
    pub(super) segment_bytes: u64,
    pub(super) max_bytes: u64,
}

/// What the log did since it was opened.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counters {
    pub(super) commits: u64,
    /// All that was given to writes, but for zeroing.
    pub(super) written_bytes: u64,
    pub(super) messages: u64,
    pub(super) message_bytes: u64,
    pub(super) outcomes: u64,
    pub(super) outcome_bytes: u64,
    pub(super) copies: u64,
    pub(super) copy_bytes: u64,
    pub(super) checkpoint_bytes: u64,
    pub(super) zeroed_bytes: u64,
    pub(super) segments_retired: u64,
}

impl Counters {
    pub(super) fn since(&self, earlier: &Self) -> Self {
        Self {
            commits: self.commits - earlier.commits,
            written_bytes: self.written_bytes - earlier.written_bytes,
            messages: self.messages - earlier.messages,
            message_bytes: self.message_bytes - earlier.message_bytes,
            outcomes: self.outcomes - earlier.outcomes,
            outcome_bytes: self.outcome_bytes - earlier.outcome_bytes,
            copies: self.copies - earlier.copies,
            copy_bytes: self.copy_bytes - earlier.copy_bytes,
            checkpoint_bytes: self.checkpoint_bytes - earlier.checkpoint_bytes,
            zeroed_bytes: self.zeroed_bytes - earlier.zeroed_bytes,
            segments_retired: self.segments_retired - earlier.segments_retired,
        }
    }

    /// Headers of frames and segments, and what fills frames up to whole blocks.
    pub(super) fn padding_bytes(&self) -> u64 {
        let records = self.message_bytes + self.outcome_bytes + self.copy_bytes + self.checkpoint_bytes;
        self.written_bytes.saturating_sub(records)
    }
}

/// What is in the spool now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Holdings {
    pub(super) live_messages: u64,
    pub(super) live_bytes: u64,
    pub(super) used_bytes: u64,
}

/// Tells of each message as much as the engine does of one with a single recipient.
struct LikeTheEngine;

impl Summarize for LikeTheEngine {
    fn begin(&mut self) {}

    fn summarize(&mut self, _: MessageId, _: u32, summary: &mut Vec<u8>) {
        summary.extend([0; 18]);
    }
}

/// An open log with its operations.
#[derive(Debug)]
pub(super) struct Driver {
    log: Log,
    /// It holds the lock.
    _spool: Spool,
    started: Instant,
    ended: UnboundedReceiver<Completion>,
    ends: UnboundedSender<Completion>,
    running: usize,
    /// The last sequence of each commit that is not durable yet.
    cursors: VecDeque<(CommitNumber, Sequence)>,
    messages: Records,
    zeroed_bytes: u64,
    // Last: it is removed when everything above is closed.
    _directory: TempDir,
}

impl Driver {
    /// Opens a new spool and waits until its first segments are ready.
    pub(super) async fn open(setup: &Setup<'_>) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("postbench-spool-").tempdir_in(setup.parent)?;
        let (segment_bytes, max_bytes) = (setup.segment_bytes, setup.max_bytes);
        let options =
            postrider_spool::SpoolOptions { segment_bytes, max_bytes, ..postrider_spool::SpoolOptions::default() };
        let mut spool = Spool::open(directory.path(), options)?;
        let own = spool.assign(1)?.remove(0).remove(0);
        let log = Log::recover(
            own,
            RecoverOptions { seed: SEED, event_cursor: Sequence(0), ..RecoverOptions::default() },
            &mut |_| {},
        )?;
        let (ends, ended) = unbounded_channel();
        let mut driver = Self {
            log,
            _spool: spool,
            started: Instant::now(),
            ended,
            ends,
            running: 0,
            cursors: VecDeque::new(),
            messages: Records::default(),
            zeroed_bytes: 0,
            _directory: directory,
        };
        driver.rest().await?;
        Ok(driver)
    }

    /// Appends the next message; `None` when the spool takes none now.
    pub(super) fn append(&mut self, mail: &mut Mail) -> Result<Option<(MessageId, CommitNumber)>> {
        let before = self.pending_before(self.messages);
        let (envelope, prefix, body) = mail.draw();
        match self.log.append_message(envelope, prefix, body) {
            Ok((id, commit)) => {
                self.messages.enter(&self.log, before);
                self.note(commit, id.sequence());
                Ok(Some((id, commit)))
            }
            Err(AppendError::Full(_)) => Ok(None),
            Err(error) => bail!("{error}"),
        }
    }

    /// Appends what became of a message; false when that must wait.
    pub(super) fn append_outcome(&mut self, mail: &mut Mail, id: MessageId, turnout: Turnout) -> Result<bool> {
        match self.log.append_outcome(mail.outcome(id, turnout)) {
            Ok((sequence, commit)) => {
                self.note(commit, sequence);
                Ok(true)
            }
            Err(AppendError::Full(_)) => Ok(false),
            Err(error) => bail!("{error}"),
        }
    }

    /// Begins what there is to do and waits until something of it has ended, or the log or the caller wants its turn.
    /// False when there is nothing to wait for.
    pub(super) async fn turn(&mut self, until: Option<Instant>) -> Result<bool> {
        self.send_off().await?;
        while let Some(operation) = self.log.poll_operation(self.started.elapsed(), &mut LikeTheEngine) {
            self.begin(operation);
        }
        // The scrub's next round is nothing to wait for.
        let soon = self.started.elapsed() + REST_PATIENCE;
        let timeout = self.log.next_timeout().filter(|timeout| *timeout < soon);
        let timeout = timeout.map(|timeout| self.started + timeout);
        let completion = match timeout.into_iter().chain(until).min() {
            // Its own sender keeps the channel open.
            None if self.running == 0 => return Ok(false),
            None => self.ended.recv().await,
            Some(until) => {
                // One that is over would not let the ring have its turn.
                let until = until.max(Instant::now() + TURN_MIN);
                timeout_at(until.into(), self.ended.recv()).await.ok().flatten()
            }
        };
        if let Some(completion) = completion {
            self.take_in(completion)?;
        }
        while let Ok(completion) = self.ended.try_recv() {
            self.take_in(completion)?;
        }
        Ok(true)
    }

    /// Begins what waits for the medium, a commit above all, and lets the ring have it at once.
    pub(super) async fn send_off(&mut self) -> Result<()> {
        let mut is_begun = false;
        while let Some(operation) = self.log.poll_awaited(self.started.elapsed()) {
            self.begin(operation);
            is_begun = true;
        }
        if is_begun {
            // The ring submits only when the thread parks.
            tokio_uring::no_op().await?;
        }
        Ok(())
    }

    /// Until there is nothing left to do: all committed, dead segments retired, spares filled with zeros.
    pub(super) async fn rest(&mut self) -> Result<()> {
        let end = Instant::now() + REST_PATIENCE;
        while self.turn(None).await? {
            if Instant::now() > end {
                bail!("the spool did not come to rest within {REST_PATIENCE:?}");
            }
        }
        Ok(())
    }

    /// Waits for what is under way, which must not outlive the ring.
    pub(super) async fn close(mut self) {
        while self.running > 0 && self.ended.recv().await.is_some() {
            self.running -= 1;
        }
    }

    pub(super) fn durable(&self) -> CommitNumber {
        self.log.durable()
    }

    pub(super) fn has_uncommitted(&self) -> bool {
        self.log.has_uncommitted()
    }

    pub(super) fn counters(&self) -> Counters {
        let statistics = self.log.statistics();
        Counters {
            commits: statistics.commits,
            written_bytes: statistics.bytes_written,
            messages: statistics.messages_appended,
            message_bytes: self.messages.bytes(),
            outcomes: statistics.outcomes_appended,
            outcome_bytes: statistics.bytes_outcomes,
            copies: statistics.messages_copied,
            copy_bytes: statistics.bytes_copied,
            checkpoint_bytes: statistics.bytes_checkpoints,
            zeroed_bytes: self.zeroed_bytes,
            segments_retired: statistics.segments_retired,
        }
    }

    pub(super) fn holdings(&self) -> Holdings {
        let statistics = self.log.statistics();
        Holdings {
            live_messages: statistics.live_messages,
            live_bytes: statistics.live_bytes,
            used_bytes: statistics.used_bytes,
        }
    }

    fn begin(&mut self, operation: Operation) {
        if let ("zero", bytes) = operation.describe() {
            self.zeroed_bytes += bytes;
        }
        self.running += 1;
        let ends = self.ends.clone();
        tokio_uring::spawn(async move {
            // Nobody is left to tell when the driver is gone.
            let _ = ends.send(execute_on_ring(operation).await);
        });
    }

    fn take_in(&mut self, completion: Completion) -> Result<()> {
        self.running -= 1;
        match self.log.handle_completion(self.started.elapsed(), completion) {
            Progress::Durable(durable) => {
                while let Some((_, sequence)) = self.cursors.pop_front_if(|(commit, _)| *commit <= durable) {
                    self.log.set_event_cursor(sequence);
                }
                Ok(())
            }
            Progress::Failed { error } => bail!("a commit failed: {error}"),
            Progress::Damaged { id, error } => bail!("{id} is damaged: {error}"),
            Progress::Nothing | Progress::Read { .. } | Progress::Reopened | Progress::NotMade { .. } => Ok(()),
        }
    }

    /// What waits for its commit, where that is still needed to tell how long a record is.
    fn pending_before(&self, records: Records) -> u64 {
        if records.count == 0 { self.log.statistics().pending_bytes } else { 0 }
    }

    fn note(&mut self, commit: CommitNumber, sequence: Sequence) {
        match self.cursors.back_mut() {
            Some((last, cursor)) if *last == commit => *cursor = sequence,
            _ => self.cursors.push_back((commit, sequence)),
        }
    }
}

/// Records of messages, all of the same length: the first tells it.
#[derive(Debug, Clone, Copy, Default)]
struct Records {
    count: u64,
    bytes_each: u64,
}

impl Records {
    fn enter(&mut self, log: &Log, pending_before: u64) {
        if self.count == 0 {
            self.bytes_each = log.statistics().pending_bytes - pending_before;
        }
        self.count += 1;
    }

    fn bytes(&self) -> u64 {
        self.count * self.bytes_each
    }
}

/// Bytes of one message's record.
pub(super) async fn record_bytes(mail: &mut Mail, parent: &Path) -> Result<u64> {
    let segment_bytes = (4 * mail.message_bytes()).max(1 << 20).next_multiple_of(4096);
    let mut driver = Driver::open(&Setup { parent, segment_bytes, max_bytes: u64::MAX }).await?;
    let appended = driver.append(mail);
    let settled = driver.rest().await;
    let bytes = driver.messages.bytes();
    driver.close().await;
    ensure!(appended?.is_some(), "an empty spool took no message");
    settled.map(|()| bytes)
}

/// Runs `future` on a ring with the engine's flags, on this thread.
pub(crate) fn on_ring<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let mut flags = tokio_uring::uring_builder();
    flags.setup_coop_taskrun().setup_single_issuer();
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES).uring_builder(&flags);
    tokio_uring::Runtime::new(&builder)?.block_on(future)
}

const SEED: u64 = 1;
const RING_ENTRIES: u32 = 256;
const TURN_MIN: Duration = Duration::from_micros(50);
const REST_PATIENCE: Duration = Duration::from_secs(60);
