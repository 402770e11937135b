//! The event log's files and the thread that alone writes them.
//!
//! Files are named `events-NUMBER-START.jsonl.zst`; the highest number is the newest. What stands in them is described
//! in `outcome/event_log.rs`. One frame is gathered in memory and written with its seal in one go; then the file is
//! synced, and only then are the cursors reported that let the spool reuse its segments.
//!
//! Invariants: whatever the moment of a crash, each event is in the files exactly once after the spool has handed its
//! records again. Bytes behind the last sealed frame of the newest file are never read as events: they are cut at the
//! next start. The cursors of another node (a new spool beside old event files) are never taken.
//!
//! What can fail: the disk. Then the frame is kept and written again, from the same place, until it succeeds;
//! meanwhile nothing more is taken, the queue fills, and [`EventSender::is_blocked`] closes admission. Nothing is
//! lost, since the cursor stays where it was.
//!
//! Over 500 lines: the writer's loop and the one file that it keeps whole belong together.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{fmt, thread};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use postrider_spool::record::{LogId, Sequence};

use crate::limits::{EVENT_BATCHES_MAX, EVENT_FILE_AGE_MAX, EVENT_FILE_BYTES_MAX, EVENT_RETRY_PAUSE_MAX};
use crate::outcome::event::{LoggedRecord, NodeId};
use crate::outcome::event_log::{Cursors, EventStream, FrameEncoder, Subscribers};

mod directory;

pub(crate) use directory::node_id;
use directory::{DirectoryLock, EventFileName, cut, last_seal, lock_directory};

/// Where events go and how often they are synced.
#[derive(Debug, Clone)]
pub(crate) struct EventLogOptions {
    pub(crate) path: PathBuf,
    pub(crate) node: NodeId,
    /// Compressed; a file exceeds it by at most one frame.
    pub(crate) file_bytes_max: u64,
    pub(crate) file_age_max: Duration,
    /// A frame ends when no event has come for so long,
    pub(crate) idle: Duration,
    /// and in any case so long after its first event.
    pub(crate) sync_interval: Duration,
}

impl EventLogOptions {
    pub(crate) fn new(path: PathBuf, node: NodeId) -> Self {
        Self {
            path,
            node,
            file_bytes_max: EVENT_FILE_BYTES_MAX,
            file_age_max: EVENT_FILE_AGE_MAX,
            idle: Duration::from_millis(50),
            sync_interval: Duration::from_secs(1),
        }
    }
}

/// Why the event log can't be opened, or could not be written at the end.
#[derive(Debug)]
pub(crate) enum EventLogError {
    /// Another engine writes there.
    Locked {
        path: PathBuf,
    },
    Io {
        what: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
}

impl EventLogError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { what, path: path.to_owned(), cause }
    }
}

impl fmt::Display for EventLogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked { path } => write!(
                f,
                "{}: another engine writes its events here; give each engine an [events] path of its own",
                path.display()
            ),
            Self::Io { what, path, cause } => {
                let remedy = match cause.kind() {
                    io::ErrorKind::PermissionDenied => "; give the directory to the user that the engine runs as",
                    _ => "",
                };
                write!(f, "{}: can't {what}: {cause}{remedy}", path.display())
            }
        }
    }
}

impl std::error::Error for EventLogError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Locked { .. } => None,
            Self::Io { cause, .. } => Some(cause),
        }
    }
}

/// What [`EventLog::open`] found, for the operator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct OpenReport {
    /// The file that the cursors come from.
    pub(crate) file: Option<PathBuf>,
    /// The file that an unfinished frame was cut from, and its bytes.
    pub(crate) cut: Option<(PathBuf, u64)>,
}

/// An opened event log, not yet running.
pub(crate) struct EventLog {
    writer: EventWriter,
}

impl EventLog {
    /// Creates the directory where missing, locks it, and cuts an unfinished frame. The spool has to hand again every
    /// record above the cursors; it may hand older ones too.
    pub(crate) fn open(options: EventLogOptions) -> Result<(Self, Cursors, OpenReport), EventLogError> {
        let (writer, report) = EventWriter::open(options)?;
        let cursors = writer.synced.clone();
        Ok((Self { writer }, cursors, report))
    }

    /// Starts the writer's thread. It calls `on_synced` with the logs whose cursor moved, after each sync.
    pub(crate) fn start(
        self,
        on_synced: impl FnMut(&[(LogId, Sequence)]) + Send + 'static,
    ) -> Result<EventLogHandle, EventLogError> {
        let (batches_in, batches) = bounded(EVENT_BATCHES_MAX);
        let (stop_in, stop) = bounded(1);
        let path = self.writer.options.path.clone();
        let shared = Arc::clone(&self.writer.shared);
        let loop_ = WriterLoop { writer: self.writer, batches, stop, stopping: false, on_synced };
        let thread = thread::Builder::new()
            .name("events".into())
            .spawn(move || loop_.run())
            .map_err(EventLogError::io("start the writer's thread", &path))?;
        Ok(EventLogHandle { sender: EventSender { batches: batches_in, shared }, stop: stop_in, thread })
    }
}

/// A running event log. Dropping it ends the writer as [`shutdown`](Self::shutdown) does, without waiting.
pub(crate) struct EventLogHandle {
    sender: EventSender,
    stop: Sender<()>,
    thread: JoinHandle<Result<(), EventLogError>>,
}

impl EventLogHandle {
    /// One for each shard.
    pub(crate) fn sender(&self) -> EventSender {
        self.sender.clone()
    }

    pub(crate) fn subscribe(&self) -> EventStream {
        self.sender.shared.subscribers.subscribe()
    }

    /// Writes and syncs all that was sent before, reports the cursors, and ends. On a failing disk it tries once more
    /// and then leaves the rest to the next start.
    pub(crate) fn shutdown(self) -> Result<(), EventLogError> {
        // A full stop queue or a writer that is gone means that it stops anyway.
        let _ = self.stop.try_send(());
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// A shard's way to the event writer.
#[derive(Clone)]
pub(crate) struct EventSender {
    batches: Sender<Vec<LoggedRecord>>,
    shared: Arc<Shared>,
}

impl EventSender {
    /// Never waits. Records of one log come in the order of their sequences, and after they are durable. Gives the
    /// batch back when the queue is full or the writer has ended; try again later.
    pub(crate) fn try_send(&self, batch: Vec<LoggedRecord>) -> Result<(), Vec<LoggedRecord>> {
        self.batches.try_send(batch).map_err(|error| match error {
            TrySendError::Full(batch) | TrySendError::Disconnected(batch) => batch,
        })
    }

    /// The event disk fails: what is sent now waits for it.
    pub(crate) fn is_failing(&self) -> bool {
        self.shared.failing.load(Ordering::Relaxed)
    }

    /// The event disk fails or can't keep up.
    pub(crate) fn is_blocked(&self) -> bool {
        self.shared.failing.load(Ordering::Relaxed) || self.batches.is_full()
    }

    /// What the disk said, while it fails.
    pub(crate) fn blocked_reason(&self) -> Option<String> {
        self.shared.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn statistics(&self) -> EventLogStatistics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        EventLogStatistics {
            events: read(&self.shared.events),
            frames: read(&self.shared.frames),
            bytes: read(&self.shared.bytes),
            files: read(&self.shared.files),
            failures: read(&self.shared.failures),
            waiting_batches: self.batches.len() as u64,
            blocked: self.is_blocked(),
        }
    }
}

/// Counted since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EventLogStatistics {
    pub events: u64,
    pub frames: u64,
    /// Compressed, seals included.
    pub bytes: u64,
    pub files: u64,
    pub failures: u64,
    pub waiting_batches: u64,
    pub blocked: bool,
}

#[derive(Default)]
struct Shared {
    subscribers: Subscribers,
    failing: AtomicBool,
    reason: Mutex<Option<String>>,
    events: AtomicU64,
    frames: AtomicU64,
    bytes: AtomicU64,
    files: AtomicU64,
    failures: AtomicU64,
}

/// The thread's loop. See [`EventLog::start`].
struct WriterLoop<F> {
    writer: EventWriter,
    batches: Receiver<Vec<LoggedRecord>>,
    stop: Receiver<()>,
    /// The stop was received: a failing disk gets one more try.
    stopping: bool,
    on_synced: F,
}

impl<F: FnMut(&[(LogId, Sequence)])> WriterLoop<F> {
    fn run(mut self) -> Result<(), EventLogError> {
        let result = self.run_until_stopped();
        self.writer.shared.subscribers.end();
        result
    }

    fn run_until_stopped(&mut self) -> Result<(), EventLogError> {
        loop {
            let patience = match self.writer.deadline() {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => WAKE_INTERVAL,
            };
            crossbeam::select! {
                recv(self.batches) -> batch => match batch {
                    Ok(batch) => {
                        self.take(&batch)?;
                        self.gather();
                    }
                    Err(_) => break,
                },
                recv(self.stop) -> _ => {
                    self.stopping = true;
                    break;
                }
                default(patience) => {}
            }
            if self.stopping {
                break;
            }
            // Those that are there now: who never finds the queue empty would see neither the deadline nor the stop.
            for _ in 0..self.batches.len() {
                let Ok(batch) = self.batches.try_recv() else { break };
                self.take(&batch)?;
            }
            if self.writer.deadline().is_some_and(|deadline| deadline <= Instant::now()) {
                self.flush()?;
            }
        }
        let rest: Vec<_> = self.batches.try_iter().collect();
        for batch in rest {
            self.take(&batch)?;
        }
        self.flush()
    }

    /// Lets more come before the next look, since a shard has to wake a thread that waits for it.
    fn gather(&mut self) {
        for _ in 0..GATHER_STEPS {
            if self.batches.len() > EVENT_BATCHES_MAX / 8 || self.stopping {
                return;
            }
            self.stopping = !matches!(self.stop.recv_timeout(GATHER_STEP), Err(RecvTimeoutError::Timeout));
        }
    }

    fn take(&mut self, batch: &[LoggedRecord]) -> Result<(), EventLogError> {
        for record in batch {
            self.writer.push(record);
            if self.writer.encoder.is_full() {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Returns an error only when told to stop while the disk fails.
    fn flush(&mut self) -> Result<(), EventLogError> {
        let mut pause = RETRY_PAUSE_FIRST;
        loop {
            match self.writer.try_flush() {
                Ok(moved) => {
                    if !moved.is_empty() {
                        (self.on_synced)(&moved);
                    }
                    return Ok(());
                }
                Err(error) if self.stopping => return Err(error),
                Err(_) => {
                    // A message and a handle that is gone mean the same.
                    let waited = self.stop.recv_timeout(pause);
                    self.stopping = !matches!(waited, Err(RecvTimeoutError::Timeout));
                    pause = (2 * pause).min(EVENT_RETRY_PAUSE_MAX);
                }
            }
        }
    }
}

/// Everything but the waiting: files, the frame being gathered, cursors.
struct EventWriter {
    options: EventLogOptions,
    shared: Arc<Shared>,
    encoder: FrameEncoder,
    /// What is durable in the files.
    synced: Cursors,
    file: Option<ActiveFile>,
    next_number: u64,
    /// When the frame's first and last records came.
    gathering: Option<(Instant, Instant)>,
    failures_in_a_row: u32,
    /// Held as long as we may write.
    lock: DirectoryLock,
}

/// The newest file.
struct ActiveFile {
    file: File,
    path: PathBuf,
    started_ms: u64,
    /// Behind the last synced frame; the next is written here.
    end: u64,
    /// A write began that did not succeed, so that there may be bytes behind `end`.
    dirty: bool,
}

impl EventWriter {
    fn open(options: EventLogOptions) -> Result<(Self, OpenReport), EventLogError> {
        let path = &options.path;
        fs::create_dir_all(path).map_err(EventLogError::io("create the directory", path))?;
        let lock = lock_directory(path)?;
        let names = EventFileName::list(path).map_err(EventLogError::io("read the directory", path))?;
        let next_number = names.last().map_or(1, |name| name.number + 1);
        let mut report = OpenReport::default();
        let mut synced = Cursors::default();
        let mut file = None;
        for (age, name) in names.iter().rev().enumerate() {
            let path = path.join(&name.file_name);
            let read = EventLogError::io("read the event file", &path);
            let seal = last_seal(&path).map_err(read)?;
            if age == 0 {
                let end = seal.as_ref().map(|(_, end)| *end);
                report.cut = cut(&path, end).map_err(EventLogError::io("cut an unfinished frame", &path))?;
            }
            let Some((seal, end)) = seal.filter(|(seal, _)| seal.node == options.node) else {
                continue;
            };
            synced = seal.cursors;
            if age == 0 {
                let opened = OpenOptions::new().read(true).write(true).open(&path);
                let opened = opened.map_err(EventLogError::io("open the event file", &path))?;
                let started_ms = name.started_ms;
                file = Some(ActiveFile { file: opened, path: path.clone(), started_ms, end, dirty: false });
            }
            report.file = Some(path);
            break;
        }
        let encoder = FrameEncoder::new(options.node, synced.clone());
        let encoder = encoder.map_err(EventLogError::io("set up compression", path))?;
        let writer = Self {
            shared: Arc::default(),
            encoder,
            synced,
            file,
            next_number,
            gathering: None,
            failures_in_a_row: 0,
            lock,
            options,
        };
        Ok((writer, report))
    }

    fn push(&mut self, record: &LoggedRecord) {
        if self.encoder.push(record, &self.shared.subscribers) {
            let now = Instant::now();
            self.gathering = Some((self.gathering.map_or(now, |(first, _)| first), now));
        }
    }

    /// When the frame being gathered has to be written.
    fn deadline(&self) -> Option<Instant> {
        let (first, last) = self.gathering?;
        Some((first + self.options.sync_interval).min(last + self.options.idle))
    }

    /// Writes and syncs what was gathered. After an error everything is as before and it may be called again.
    fn try_flush(&mut self) -> Result<Vec<(LogId, Sequence)>, EventLogError> {
        if self.gathering.is_none() {
            return Ok(Vec::new());
        }
        match self.write_frame() {
            Ok(bytes) => {
                let moved = self.encoder.cursors().ahead_of(&self.synced);
                self.synced = self.encoder.cursors().clone();
                self.shared.events.fetch_add(u64::from(self.encoder.events()), Ordering::Relaxed);
                self.shared.frames.fetch_add(1, Ordering::Relaxed);
                self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
                self.encoder.clear();
                self.gathering = None;
                self.note_success();
                Ok(moved)
            }
            Err(error) => {
                self.note_failure(&error);
                Err(error)
            }
        }
    }

    fn write_frame(&mut self) -> Result<u64, EventLogError> {
        self.encoder.compress().map_err(EventLogError::io("compress events for", &self.options.path))?;
        if self.file.as_mut().is_some_and(|file| !file.is_usable(&self.options)) {
            self.file = None;
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = self.options.create(self.next_number, &mut self.lock)?;
                self.next_number += 1;
                self.shared.files.fetch_add(1, Ordering::Relaxed);
                self.file.insert(file)
            }
        };
        let bytes = self.encoder.seal(file.end);
        file.dirty = true;
        // Written from the same place after a failed sync too: the pages are then dirty again, and go to disk again.
        file.file.write_all_at(bytes, file.end).map_err(EventLogError::io("write events to", &file.path))?;
        file.file.sync_data().map_err(EventLogError::io("sync events to", &file.path))?;
        file.end += bytes.len() as u64;
        file.dirty = false;
        Ok(bytes.len() as u64)
    }

    fn note_success(&mut self) {
        if self.failures_in_a_row > 0 {
            self.failures_in_a_row = 0;
            self.shared.failing.store(false, Ordering::Relaxed);
            *self.shared.reason.lock().unwrap_or_else(PoisonError::into_inner) = None;
            tracing::info!("the event log is written again");
        }
    }

    fn note_failure(&mut self, error: &EventLogError) {
        if self.failures_in_a_row == 0 {
            tracing::error!(
                "{error}. No mail is accepted until this works again; \
                 it is retried every few seconds and no event is lost"
            );
        }
        self.failures_in_a_row += 1;
        self.shared.failures.fetch_add(1, Ordering::Relaxed);
        self.shared.failing.store(true, Ordering::Relaxed);
        *self.shared.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
        let Some(file) = &mut self.file else { return };
        // So that zstdcat does not stumble over it meanwhile. When it fails, the next write or start sees to it.
        if file.file.set_len(file.end).is_ok() {
            file.dirty = false;
        }
        let full = matches!(error, EventLogError::Io { cause, .. } if is_full(cause));
        if self.failures_in_a_row >= FAILURES_BEFORE_ANOTHER_FILE && !full && file.end > 0 {
            // This file's part of the disk may be broken; another file may do.
            self.file = None;
        }
    }
}

impl EventLogOptions {
    fn create(&self, number: u64, lock: &mut DirectoryLock) -> Result<ActiveFile, EventLogError> {
        let started_ms = wall_ms();
        let path = self.path.join(EventFileName::compose(number, started_ms));
        let failed = || EventLogError::io("create the event file", &path);
        // Where the directory was removed and made anew, ours is a lock of the one that is gone.
        if !lock.is_of(&self.path) {
            *lock = lock_directory(&self.path).map_err(|error| match error {
                EventLogError::Io { cause, .. } => failed()(cause),
                locked @ EventLogError::Locked { .. } => locked,
            })?;
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o640).open(&path);
        let file = file.map_err(failed())?;
        // Else the file may be gone after a power cut, although its content was synced.
        File::open(&self.path).and_then(|directory| directory.sync_all()).map_err(failed())?;
        Ok(ActiveFile { file, path, started_ms, end: 0, dirty: false })
    }
}

impl ActiveFile {
    /// Whether the next frame belongs here: not into a file that somebody removed, moved away or cut, nor one that is
    /// old or large. A start looks for what was told under the files' own names; and behind a hole, where a file was
    /// cut that is written on, nobody could read the frames.
    fn is_usable(&mut self, options: &EventLogOptions) -> bool {
        let gone = match (self.file.metadata(), fs::metadata(&self.path)) {
            (Ok(own), Ok(_)) if own.len() < self.end => {
                let (bytes, path) = (self.end - own.len(), self.path.display());
                tracing::warn!("{path}: somebody cut {bytes} bytes off while it was written; another file begins");
                true
            }
            (Ok(own), Ok(there)) => (own.dev(), own.ino()) != (there.dev(), there.ino()),
            (_, Err(error)) => error.kind() == io::ErrorKind::NotFound,
            (Err(_), Ok(_)) => false,
        };
        // A step of the clock backwards makes an age of 0.
        let age = Duration::from_millis(wall_ms().saturating_sub(self.started_ms));
        let done = self.end > 0 && !self.dirty && (self.end >= options.file_bytes_max || age >= options.file_age_max);
        !gone && !done
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How long the thread waits where nothing is due; any input wakes it.
const WAKE_INTERVAL: Duration = Duration::from_secs(3_600);
/// Events come to readers so much later at most.
const GATHER_STEPS: u32 = 4;
const GATHER_STEP: Duration = Duration::from_millis(1);
const RETRY_PAUSE_FIRST: Duration = Duration::from_millis(50);
const FAILURES_BEFORE_ANOTHER_FILE: u32 = 3;

#[cfg(test)]
mod tests;
