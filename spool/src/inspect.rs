//! A spool as it lies there: read by the engine's own recovery, and left as it is.
//!
//! ```
//! # use postrider_spool::{Log, RecoverOptions, Recovered, Sequence, Spool, SpoolOptions};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path();
//! # drop(Spool::open(path, SpoolOptions { segment_bytes: 1 << 20, ..SpoolOptions::default() })?.assign(1)?);
//! let inspection = Spool::inspect(path)?;
//! for log in inspection.log_ids() {
//!     let options = RecoverOptions { seed: 0, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
//!     Log::recover(inspection.log_directory(*log)?, options, &mut |recovered| {
//!         if let Recovered::Message { id, message, .. } = recovered {
//!             println!("{id}: {} octets", message.size());
//!         }
//!     })?;
//! }
//! inspection.check_undisturbed()?;
//! # Ok(())
//! # }
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::directory::{
    LOCK_FILE, LogDirectory, META_FILE, Spool, SpoolOptions, parse_log_name, parse_segment_name, read_meta, take_lock,
};
use crate::error::OpenError;
use crate::format::Meta;
use crate::read_only::{ReadOnlyStorage, last_locked};
use crate::record::LogId;
use crate::storage::Storage as _;

/// A spool that nobody has open, to be read only: nothing in its directory is changed.
///
/// Nobody is kept from opening it meanwhile, so that looking never keeps an engine from starting. Whoever did spoils
/// what is read, which [`Inspection::check_undisturbed`] tells.
#[derive(Debug)]
pub struct Inspection {
    spool: Spool,
    logs: Vec<LogId>,
    meta_error: Option<OpenError>,
    lock_path: PathBuf,
    locked: Option<SystemTime>,
}

impl Spool {
    /// Looks at the spool in a directory. One that somebody has open is refused.
    pub fn inspect(path: &Path) -> Result<Inspection, OpenError> {
        let storage = ReadOnlyStorage;
        let failed = |path: &Path, error| OpenError::Io { path: path.to_owned(), error };
        let lock_path = path.join(LOCK_FILE);
        // In this order: who takes the lock from here on is seen, now or at the end.
        let locked = last_locked(&lock_path).map_err(|error| match error.kind() {
            io::ErrorKind::NotADirectory => nothing(path, "no directory; a spool is one"),
            _ => failed(&lock_path, error),
        })?;
        let lock = take_lock(&storage, &lock_path)?;
        let names = storage.names(path).map_err(|error| failed(path, error))?;
        let mut logs: Vec<LogId> = names.iter().filter_map(|name| parse_log_name(name)).collect();
        logs.sort_unstable();
        let has_meta = names.iter().any(|name| name == META_FILE);
        if logs.is_empty() {
            let is_log = names.iter().any(|name| parse_segment_name(name).is_some());
            let reason = match (has_meta, is_log) {
                (true, _) => "a spool without any log: it has never taken mail, or its logs were moved away",
                (false, true) => "one log of a spool; name the directory above it",
                (false, false) => "no spool: neither a meta file (SPOOL) nor logs (log-0000 and so on) are in it",
            };
            return Err(nothing(path, reason));
        }
        let meta_path = path.join(META_FILE);
        let meta_error = match read_meta(&storage, &meta_path) {
            Ok(_) => None,
            Err(error @ OpenError::NewerVersion { .. }) => return Err(error),
            Err(_) if !has_meta => Some(OpenError::Meta { path: meta_path, reason: "the meta file is missing" }),
            Err(error) => Some(error),
        };
        // No log is made here, so the next id does not matter.
        let meta = Meta { next_log: 0 };
        let spool = Self::locked(Arc::new(storage), path, SpoolOptions::default(), lock, meta);
        Ok(Inspection { spool, logs, meta_error, lock_path, locked })
    }
}

impl Inspection {
    /// The ids of all logs, ascending.
    pub fn log_ids(&self) -> &[LogId] {
        &self.logs
    }

    /// What is wrong with the meta file. Logs are found by their names, so it keeps nobody from reading them.
    pub fn meta_error(&self) -> Option<&OpenError> {
        self.meta_error.as_ref()
    }

    /// For [`crate::Log::recover`]. The log that it gives can be read, but every write of it fails.
    pub fn log_directory(&self, id: LogId) -> Result<LogDirectory, OpenError> {
        self.spool.log_directory(id, false)
    }

    /// To be asked when all is read: whether somebody has opened the spool since.
    pub fn check_undisturbed(&self) -> Result<(), OpenError> {
        take_lock(&ReadOnlyStorage, &self.lock_path)?;
        match last_locked(&self.lock_path) {
            Ok(locked) if locked == self.locked => Ok(()),
            _ => Err(OpenError::Disturbed { path: self.lock_path.clone() }),
        }
    }
}

fn nothing(path: &Path, reason: &'static str) -> OpenError {
    OpenError::NothingThere { path: path.to_owned(), reason }
}
