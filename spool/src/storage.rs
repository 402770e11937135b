//! The seam between the log and the medium: what a log asks for, and what it is told.
//!
//! While it runs, a log is a core without I/O: [`crate::Log::poll_operation`] yields an [`Operation`], which owns all
//! that it names (its file, its buffers), and [`crate::Log::handle_completion`] takes the [`Completion`]. [`execute`]
//! runs one by plain positioned I/O; with the feature `uring`, `execute_on_ring` runs it on the current tokio-uring
//! ring.
//!
//! [`Storage`] and [`StorageFile`] are plain and synchronous: opening and recovery use them directly.
//! [`crate::FileStorage`] is the real one; the simulated disk (feature `sim`) keeps unsynced sectors apart.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use rkyv::util::AlignedVec;

use crate::file::Map;
use crate::limits::ALIGN_BYTES;

/// A tree of directories and files. Every method that changes a directory returns after the change is durable.
pub trait Storage: fmt::Debug + Send + Sync {
    /// The names in a directory, in no order. `NotFound` where there is none.
    fn names(&self, directory: &Path) -> io::Result<Vec<String>>;
    /// Creates the directory and those above it; one that exists is fine.
    fn create_directory(&self, path: &Path) -> io::Result<()>;
    /// Takes an exclusive lock named by a file, which is created where missing. `WouldBlock` when somebody has it.
    /// Dropping the guard gives it back.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>>;
    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>>;
    /// Opens or creates the file and allocates it to `bytes`; bytes never written read as zeros.
    fn create(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn StorageFile>>;
    /// Writes a small file whole: after a crash there is the old one or the new one.
    fn replace(&self, path: &Path, contents: &[u8]) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory and all in it, in no order.
    fn remove_directory(&self, path: &Path) -> io::Result<()>;
}

/// A lock that lasts as long as this value.
pub trait LockGuard: fmt::Debug + Send + Sync {}

/// One file, read and written at positions.
pub trait StorageFile: fmt::Debug + Send + Sync {
    fn length(&self) -> io::Result<u64>;
    /// May read less than asked; 0 at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// May write less than asked. With `sync`, what it says it wrote is durable when it returns.
    fn write_at(&self, bytes: &[u8], offset: u64, sync: bool) -> io::Result<usize>;
    /// Up to where the file's blocks were written, as opposed to allocated only.
    fn written_prefix(&self) -> io::Result<u64>;
    /// Makes everything written so far durable, then drops clean pages of the range, so that later reads of it see the
    /// medium. With an empty range it only syncs.
    fn sync_and_drop_cache(&self, range: Range<u64>) -> io::Result<()>;
    /// A read-only map of the whole file, where the storage has such a thing.
    fn map(&self) -> io::Result<Option<Map>>;
    /// The descriptor for a ring; `None` where operations are executed by the methods above.
    #[cfg(feature = "uring")]
    fn descriptor(&self) -> Option<std::os::fd::RawFd>;
}

/// One thing for the medium to do.
///
/// It owns everything that it names, so that it may outlive the log that asked for it.
#[derive(Debug)]
pub struct Operation {
    pub(crate) token: u64,
    pub(crate) work: Work,
}

impl Operation {
    /// For traces and simulators: what kind of operation it is, and how many bytes it moves.
    pub fn describe(&self) -> (&'static str, u64) {
        match &self.work {
            Work::Write { buffer, start, .. } => ("write", (buffer.len() - start) as u64),
            Work::Zero { bytes, .. } => ("zero", *bytes as u64),
            Work::Read { buffer, .. } => ("read", buffer.len() as u64),
            Work::Create { bytes, .. } => ("create", *bytes),
            Work::Remove { .. } => ("remove", 0),
            Work::DropCache { .. } => ("drop cache", 0),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Work {
    /// Writes `buffer[start..]` at `offset`.
    Write {
        file: Arc<dyn StorageFile>,
        offset: u64,
        buffer: Vec<u8>,
        start: usize,
        sync: bool,
    },
    /// Writes `bytes` zeros at `offset`. There are more of them by a block, so that they can begin where one does.
    Zero {
        file: Arc<dyn StorageFile>,
        offset: u64,
        zeros: Arc<[u8]>,
        bytes: usize,
        sync: bool,
    },
    /// Fills `buffer` from `offset`.
    Read {
        file: Arc<dyn StorageFile>,
        offset: u64,
        buffer: ReadBuffer,
    },
    Create {
        storage: Arc<dyn Storage>,
        path: PathBuf,
        bytes: u64,
    },
    Remove {
        storage: Arc<dyn Storage>,
        path: PathBuf,
    },
    DropCache {
        file: Arc<dyn StorageFile>,
    },
}

/// Memory for reads: aligned as archives want it.
pub(crate) type ReadBuffer = AlignedVec<{ ALIGN_BYTES as usize }>;

/// What came of an [`Operation`].
#[derive(Debug)]
pub struct Completion {
    pub(crate) token: u64,
    pub(crate) done: Done,
}

#[derive(Debug)]
pub(crate) enum Done {
    /// Bytes written; the buffer comes back for the rest or for reuse.
    Write {
        buffer: Vec<u8>,
        start: usize,
        result: io::Result<usize>,
    },
    Zero {
        result: io::Result<usize>,
    },
    Read {
        buffer: ReadBuffer,
        result: io::Result<()>,
    },
    Create {
        result: io::Result<Arc<dyn StorageFile>>,
    },
    Remove {
        result: io::Result<()>,
    },
    DropCache,
}

/// Executes an operation by plain positioned I/O. It blocks for as long as the medium takes.
pub fn execute(operation: Operation) -> Completion {
    let Operation { token, work } = operation;
    let done = match work {
        Work::Write { file, offset, buffer, start, sync } => {
            let result = file.write_at(&buffer[start..], offset, sync);
            Done::Write { buffer, start, result }
        }
        Work::Zero { file, offset, zeros, bytes, sync } => {
            Done::Zero { result: file.write_at(&zeros[..bytes], offset, sync) }
        }
        Work::Read { file, offset, mut buffer } => {
            let result = read_exact_at(file.as_ref(), &mut buffer, offset);
            Done::Read { buffer, result }
        }
        Work::Create { storage, path, bytes } => Done::Create { result: storage.create(&path, bytes) },
        Work::Remove { storage, path } => Done::Remove { result: storage.remove(&path) },
        Work::DropCache { file } => {
            // Its result tells nothing new: the log has already failed, and what it reads next is checked.
            let _ = file.sync_and_drop_cache(0..u64::MAX);
            Done::DropCache
        }
    };
    Completion { token, done }
}

/// Fills the whole buffer, or fails.
pub(crate) fn read_exact_at(file: &dyn StorageFile, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
