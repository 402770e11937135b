//! The spool's directory: which logs there are, whose they are, and that nobody else has them open.
//!
//! ```text
//! SPOOL          the meta file: format version, next log id; the spool's lock is taken on LOCK beside it
//! LOCK
//! log-0003/      one log; its own lock is taken on LOCK in it
//!   LOCK
//!   segment-0000, segment-0001, …
//!   checkpoint-0, checkpoint-1, checkpoint-2
//!   kept/        bytes that recovery cut or quarantined
//! gone-0002      a removed log whose files are not all gone yet
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use crate::error::OpenError;
use crate::file::FileStorage;
use crate::format::{FORMAT_VERSION, META_BYTES, Meta, MetaError};
use crate::limits::{
    BLOCK_BYTES, HOT_BYTES_DEFAULT, MAX_BYTES_DEFAULT, PENDING_MAIL_BYTES_MAX, READ_BYTES_MAX, SEGMENT_BYTES_DEFAULT,
    SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN,
};
use crate::record::LogId;
use crate::segment::Budget;
use crate::storage::{LockGuard, Storage, read_exact_at};

/// When a commit counts as durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// When it is on the medium.
    #[default]
    Fsync,
    /// When the operating system has it: a crash of the machine may lose it. For benchmarks.
    None,
}

/// How a spool is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolOptions {
    pub durability: Durability,
    /// What all segments in use may hold before mail is refused, less a reserve for outcomes. Files are allocated
    /// ahead, so a few segments more may be taken on disk.
    pub max_bytes: u64,
    /// Size of new segment files: a multiple of 4 KiB. It bounds a message.
    pub segment_bytes: u64,
    /// Of each log's newest segments, this much is served from the map.
    pub hot_bytes: u64,
    /// What waits for its commit in one log, above which mail is refused. One message may be larger.
    pub pending_bytes: u64,
    /// What one log may have read that is still in somebody's hands. One message may be larger.
    pub read_bytes: u64,
}

impl SpoolOptions {
    pub const DEFAULT: Self = Self {
        durability: Durability::Fsync,
        max_bytes: MAX_BYTES_DEFAULT,
        segment_bytes: SEGMENT_BYTES_DEFAULT,
        hot_bytes: HOT_BYTES_DEFAULT,
        pending_bytes: PENDING_MAIL_BYTES_MAX,
        read_bytes: READ_BYTES_MAX,
    };
}

impl Default for SpoolOptions {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A spool that is open, and locked against others for as long as this value or one of its logs lives.
#[derive(Debug)]
pub struct Spool {
    shared: Arc<Shared>,
    meta: Meta,
}

/// What a spool's logs have in common.
#[derive(Debug)]
struct Shared {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    options: SpoolOptions,
    budget: Budget,
    _lock: Box<dyn LockGuard>,
}

impl Spool {
    /// Opens the spool in a directory, or makes one there.
    pub fn open(path: &Path, options: SpoolOptions) -> Result<Self, OpenError> {
        Self::open_on(Arc::new(FileStorage), path, options)
    }

    /// The same on another storage.
    pub fn open_on(storage: Arc<dyn Storage>, path: &Path, options: SpoolOptions) -> Result<Self, OpenError> {
        check_options(&options)?;
        let failed = |path: &Path, error| OpenError::Io { path: path.to_owned(), error };
        storage.create_directory(path).map_err(|error| failed(path, error))?;
        let lock = take_lock(storage.as_ref(), &path.join(LOCK_FILE))?;
        let names = storage.names(path).map_err(|error| failed(path, error))?;
        let meta_path = path.join(META_FILE);
        let meta = if names.iter().any(|name| name == META_FILE) {
            read_meta(storage.as_ref(), &meta_path)?
        } else if names.iter().any(|name| parse_log_name(name).is_some()) {
            let reason =
                "the meta file is missing, but there are logs; restore it from a backup, or move the logs away";
            return Err(OpenError::Meta { path: meta_path, reason });
        } else {
            let meta = Meta { next_log: 0 };
            storage.replace(&meta_path, &meta.encode()).map_err(|error| failed(&meta_path, error))?;
            meta
        };
        for name in names.iter().filter(|name| name.starts_with(GONE_PREFIX)) {
            let gone = path.join(name);
            storage.remove_directory(&gone).map_err(|error| failed(&gone, error))?;
        }
        Ok(Self::locked(storage, path, options, lock, meta))
    }

    /// A spool whose lock is taken and whose meta file is read.
    pub(crate) fn locked(
        storage: Arc<dyn Storage>,
        path: &Path,
        options: SpoolOptions,
        lock: Box<dyn LockGuard>,
        meta: Meta,
    ) -> Self {
        let budget = Budget::new(options.max_bytes, options.segment_bytes);
        let shared = Shared { storage, path: path.to_owned(), options, budget, _lock: lock };
        Self { shared: Arc::new(shared), meta }
    }

    /// Shares the logs out: for each shard its own active log, made where there is none, then those that it drains. Log
    /// i belongs to shard i mod `shards`.
    pub fn assign(&mut self, shards: usize) -> Result<Vec<Vec<LogDirectory>>, OpenError> {
        let shards = u32::try_from(shards)
            .ok()
            .filter(|shards| (1..=1 << 12).contains(shards))
            .ok_or_else(|| OpenError::Option { reason: format!("{shards} shards; there can be 1 to 4096") })?;
        let mut ids = self.log_ids()?;
        let mut assigned = Vec::new();
        for shard in 0..shards {
            let own = ids.extract_if(.., |id| u32::from(id.0) % shards == shard).collect::<Vec<_>>();
            let mut logs = Vec::new();
            if own.is_empty() {
                logs.push(self.create_log(shard, shards)?);
            }
            for (position, id) in own.into_iter().enumerate() {
                logs.push(self.log_directory(id, position == 0)?);
            }
            assigned.push(logs);
        }
        Ok(assigned)
    }

    /// The ids of all logs, ascending.
    pub fn log_ids(&self) -> Result<Vec<LogId>, OpenError> {
        let names = self.shared.storage.names(&self.shared.path);
        let names = names.map_err(|error| OpenError::Io { path: self.shared.path.clone(), error })?;
        let mut ids: Vec<LogId> = names.iter().filter_map(|name| parse_log_name(name)).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// Bytes that count against the maximum, over all logs.
    pub fn used_bytes(&self) -> u64 {
        self.shared.budget.used()
    }

    fn create_log(&mut self, shard: u32, shards: u32) -> Result<LogDirectory, OpenError> {
        let mut id = self.meta.next_log;
        while id % shards != shard {
            id += 1;
        }
        let log = LogId(u16::try_from(id).map_err(|_| OpenError::LogIdsExhausted)?);
        // The id counts as used before there is a directory of that name.
        let meta = Meta { next_log: self.meta.next_log.max(id + 1) };
        let failed = |path: &Path, error| OpenError::Io { path: path.to_owned(), error };
        let meta_path = self.shared.path.join(META_FILE);
        self.shared.storage.replace(&meta_path, &meta.encode()).map_err(|error| failed(&meta_path, error))?;
        self.meta = meta;
        let path = self.shared.path.join(log_name(log));
        self.shared.storage.create_directory(&path).map_err(|error| failed(&path, error))?;
        self.log_directory(log, true)
    }

    pub(crate) fn log_directory(&self, id: LogId, is_active: bool) -> Result<LogDirectory, OpenError> {
        let path = self.shared.path.join(log_name(id));
        let lock = take_lock(self.shared.storage.as_ref(), &path.join(LOCK_FILE))?;
        Ok(LogDirectory { id, is_active, path, shared: Arc::clone(&self.shared), _lock: lock })
    }
}

/// One log's directory, locked.
pub struct LogDirectory {
    id: LogId,
    is_active: bool,
    path: PathBuf,
    shared: Arc<Shared>,
    _lock: Box<dyn LockGuard>,
}

impl LogDirectory {
    pub fn id(&self) -> LogId {
        self.id
    }

    /// Whether it takes mail; others only drain.
    pub fn is_active(&self) -> bool {
        self.is_active
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.shared.storage)
    }

    pub(crate) fn options(&self) -> &SpoolOptions {
        &self.shared.options
    }

    pub(crate) fn budget(&self) -> &Budget {
        &self.shared.budget
    }

    pub(crate) fn segment_path(&self, slot: u16) -> PathBuf {
        self.path.join(format!("{SEGMENT_PREFIX}{slot:04x}"))
    }

    pub(crate) fn checkpoint_path(&self, file: usize) -> PathBuf {
        self.path.join(format!("{CHECKPOINT_PREFIX}{file}"))
    }

    pub(crate) fn kept_path(&self) -> PathBuf {
        self.path.join(KEPT_DIRECTORY)
    }

    /// Removes the directory: at once as far as a later start can see, then its files.
    pub(crate) fn remove(self) -> io::Result<()> {
        let gone = self.shared.path.join(format!("{GONE_PREFIX}{:04x}", self.id.0));
        self.shared.storage.rename(&self.path, &gone)?;
        self.shared.storage.remove_directory(&gone)
    }
}

impl fmt::Debug for LogDirectory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogDirectory").field("id", &self.id).field("is_active", &self.is_active).finish_non_exhaustive()
    }
}

/// The slot that a file's name tells, if it is a segment's.
pub(crate) fn parse_segment_name(name: &str) -> Option<u16> {
    parse_number(name.strip_prefix(SEGMENT_PREFIX)?)
}

pub(crate) fn parse_log_name(name: &str) -> Option<LogId> {
    parse_number(name.strip_prefix(LOG_PREFIX)?).map(LogId)
}

fn parse_number(digits: &str) -> Option<u16> {
    let is_ours = digits.len() == 4 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_ours.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
}

fn log_name(id: LogId) -> String {
    format!("{LOG_PREFIX}{:04x}", id.0)
}

fn check_options(options: &SpoolOptions) -> Result<(), OpenError> {
    let fits = (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&options.segment_bytes);
    if !fits || !options.segment_bytes.is_multiple_of(BLOCK_BYTES) {
        let reason = format!(
            "a segment of {} bytes; it can have {SEGMENT_BYTES_MIN} to {SEGMENT_BYTES_MAX}, a multiple of \
             {BLOCK_BYTES}",
            options.segment_bytes
        );
        return Err(OpenError::Option { reason });
    }
    Ok(())
}

pub(crate) fn take_lock(storage: &dyn Storage, path: &Path) -> Result<Box<dyn LockGuard>, OpenError> {
    storage.lock(path).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            OpenError::Locked { path: path.to_owned(), holder: error.get_ref().map(ToString::to_string) }
        }
        _ => OpenError::Io { path: path.to_owned(), error },
    })
}

pub(crate) fn read_meta(storage: &dyn Storage, path: &Path) -> Result<Meta, OpenError> {
    let failed = |error| OpenError::Io { path: path.to_owned(), error };
    let file = storage.open(path).map_err(failed)?;
    let mut bytes = [0; META_BYTES];
    match read_exact_at(file.as_ref(), &mut bytes, 0) {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(failed(error)),
        // A short one is damaged, and found to be so.
        _ => {}
    }
    Meta::decode(&bytes).map_err(|error| match error {
        MetaError::Damaged => {
            let reason =
                "the meta file is damaged; restore it from a backup, or `postctl spool export` the mail and begin anew";
            OpenError::Meta { path: path.to_owned(), reason }
        }
        MetaError::Newer { version } => {
            OpenError::NewerVersion { path: path.to_owned(), found: version, known: FORMAT_VERSION }
        }
    })
}

pub(crate) const META_FILE: &str = "SPOOL";
pub(crate) const LOCK_FILE: &str = "LOCK";
const LOG_PREFIX: &str = "log-";
const GONE_PREFIX: &str = "gone-";
const SEGMENT_PREFIX: &str = "segment-";
const CHECKPOINT_PREFIX: &str = "checkpoint-";
const KEPT_DIRECTORY: &str = "kept";
