//! A spool's files for whoever only looks: whatever would change anything is refused.
//!
//! Recovery takes a refused change for one that is not made: what it would put aside stays where it is. Files are
//! opened for reading, so that neither they nor their directories need be writable. Nothing is mapped, because nobody
//! is kept from writing; everything that is read lies in memory of its own and is checked there.

use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use crate::file::{FileStorage, Map, PlainFile, held_by};
use crate::storage::{LockGuard, Storage, StorageFile};

/// Directories and files of the operating system, not to be changed.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReadOnlyStorage;

impl Storage for ReadOnlyStorage {
    fn names(&self, directory: &Path) -> io::Result<Vec<String>> {
        FileStorage.names(directory)
    }

    fn create_directory(&self, _: &Path) -> io::Result<()> {
        Err(refusal())
    }

    /// Only looks whether somebody has the lock, and gives it back at once: nobody who starts an engine waits for
    /// somebody who reads.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>> {
        let file = match File::open(path) {
            // Where there is no file to be locked, nobody has locked it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Box::new(NotHeld)),
            file => file?,
        };
        match file.try_lock_shared() {
            // Not only by closing it: see `FileLock`.
            Ok(()) => file.unlock().map(|()| Box::new(NotHeld) as Box<dyn LockGuard>),
            Err(TryLockError::WouldBlock) => Err(held_by(path)),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        Ok(Arc::new(ReadOnlyFile { file: PlainFile::open_read_only(path)? }))
    }

    fn create(&self, _: &Path, _: u64) -> io::Result<Arc<dyn StorageFile>> {
        Err(refusal())
    }

    fn replace(&self, _: &Path, _: &[u8]) -> io::Result<()> {
        Err(refusal())
    }

    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        Err(refusal())
    }

    fn remove(&self, _: &Path) -> io::Result<()> {
        Err(refusal())
    }

    fn remove_directory(&self, _: &Path) -> io::Result<()> {
        Err(refusal())
    }
}

/// When the lock was last taken: [`FileStorage::lock`] writes its holder into the file. `None` without a file.
pub(crate) fn last_locked(path: &Path) -> io::Result<Option<SystemTime>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        metadata => metadata?.modified().map(Some),
    }
}

#[derive(Debug)]
struct NotHeld;

impl LockGuard for NotHeld {}

#[derive(Debug)]
struct ReadOnlyFile {
    file: PlainFile,
}

impl StorageFile for ReadOnlyFile {
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, _: &[u8], _: u64, _: bool) -> io::Result<usize> {
        Err(refusal())
    }

    fn written_prefix(&self) -> io::Result<u64> {
        self.file.written_prefix()
    }

    fn sync_and_drop_cache(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn map(&self) -> io::Result<Option<Map>> {
        Ok(None)
    }

    #[cfg(feature = "uring")]
    fn descriptor(&self) -> Option<std::os::fd::RawFd> {
        None
    }
}

fn refusal() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the spool is only read")
}
