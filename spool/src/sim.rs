//! A disk in memory whose crashes can be looked at: it keeps what is durable apart from what is only cached.
//!
//! The medium promises what `FORMAT.md` assumes: a write that was synced is whole; one that was not may have reached
//! the medium in any subset of its 512-octet sectors, and of one sector possibly a part only. After a failed sync the
//! cache shows what was written as clean, although it may not be on the medium. Changes of directories are durable when
//! their call returns, as [`Storage`] demands.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::file::Map;
use crate::storage::{LockGuard, Storage, StorageFile};

/// The disk. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

/// What goes wrong, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// This many operations that change something succeed before one fails; `None`: all succeed.
    pub operations_left: Option<u64>,
    /// Failing goes on after the first time.
    pub is_permanent: bool,
    /// A failing write leaves this many of its sectors on the medium, spread by the seed of the disk.
    pub sectors_written: u64,
    /// Writes are cut short to at most this.
    pub write_bytes_max: Option<usize>,
    /// All files together can't grow above this.
    pub capacity: Option<u64>,
    /// What fails is about files whose names begin so.
    pub only: Option<&'static str>,
    /// What fails is interrupted before it has begun, and may be tried again.
    pub is_interruption: bool,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<PathBuf, Arc<Mutex<Content>>>,
    directories: BTreeSet<PathBuf>,
    locks: BTreeSet<PathBuf>,
    faults: Faults,
    holds_syncs: bool,
    random: u64,
    operations: u64,
    failures: u64,
    last_write: u64,
}

/// A file's bytes.
#[derive(Debug, Clone, Default)]
struct Content {
    /// On the medium.
    durable: Vec<u8>,
    /// As reads see it.
    cached: Vec<u8>,
    /// Sectors of `cached` that may not be on the medium and are to be written by the next sync.
    dirty: BTreeSet<usize>,
    /// Those of them whose sync returned while syncs were held.
    held: BTreeSet<usize>,
    /// Sectors whose sync failed: shown as written, but not on the medium.
    lying: BTreeSet<usize>,
}

impl SimDisk {
    pub fn new(seed: u64) -> Self {
        let disk = Self::default();
        disk.state().random = seed;
        disk
    }

    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// While this is on, syncs return at once and leave sectors unsynced: a crash image then shows the moment before
    /// they would have returned. Turning it off makes those durable, and nothing else.
    pub fn hold_syncs(&self, holds: bool) {
        let mut state = self.state();
        state.holds_syncs = holds;
        if !holds {
            for content in state.files.values() {
                lock(content).write_back_held();
            }
        }
    }

    /// Operations so far that changed something.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Operations so far that were made to fail.
    pub fn failures(&self) -> u64 {
        self.state().failures
    }

    /// Where in its file the last write began.
    pub fn last_write(&self) -> u64 {
        self.state().last_write
    }

    /// Sectors that the next crash may take back.
    pub fn unsynced(&self) -> usize {
        self.state().files.values().map(|content| lock(content).dirty.len()).sum()
    }

    /// A disk as it may be found after the power went: durable bytes, and of each unsynced sector the old, the new, or
    /// the begin of the new and the end of the old. Locks are free.
    pub fn crash(&self, seed: u64) -> Self {
        let state = self.state();
        let mut random = seed | 1;
        let mut files = BTreeMap::new();
        for (path, content) in &state.files {
            let content = lock(content);
            let mut bytes = content.durable.clone();
            // How likely a sector is to have been written differs by image, so that all and nothing are among them.
            let odds = draw(&mut random) % 5;
            for sector in &content.dirty {
                let range = sector_range(*sector, bytes.len());
                match draw(&mut random) % 4 {
                    roll if roll < odds => bytes[range.clone()].copy_from_slice(&content.cached[range]),
                    _ if draw(&mut random).is_multiple_of(8) => {
                        let torn = range.start..range.start + (draw(&mut random) as usize % range.len());
                        bytes[torn.clone()].copy_from_slice(&content.cached[torn]);
                    }
                    _ => {}
                }
            }
            let content = Content { cached: bytes.clone(), durable: bytes, ..Content::default() };
            files.insert(path.clone(), Arc::new(Mutex::new(content)));
        }
        let state = State { files, directories: state.directories.clone(), random: seed, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// The same disk after the process died and the operating system lived: all that was written is there. Locks are
    /// free.
    pub fn restart(&self) -> Self {
        let state = self.state();
        let files =
            state.files.iter().map(|(path, content)| (path.clone(), Arc::new(Mutex::new(lock(content).clone()))));
        let state =
            State { files: files.collect(), directories: state.directories.clone(), random: 1, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// The paths of all files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.state().files.keys().cloned().collect()
    }

    /// A file's bytes as reads see them.
    pub fn bytes(&self, path: &Path) -> Vec<u8> {
        lock(&self.state().files[path]).cached.clone()
    }

    /// Puts other bytes into a file, durably.
    pub fn set_bytes(&self, path: &Path, bytes: Vec<u8>) {
        let content = Content { cached: bytes.clone(), durable: bytes, ..Content::default() };
        *lock(self.state().files.entry(path.to_owned()).or_default()) = content;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn file(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        let content = self.state().files.get(path).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { disk: self.clone(), path: path.to_owned(), content }))
    }
}

impl State {
    /// Whether another file of this size has room.
    fn check_room(&self, bytes: u64) -> io::Result<()> {
        let used: u64 = self.files.values().map(|content| lock(content).durable.len() as u64).sum();
        let is_full = self.faults.capacity.is_some_and(|capacity| used + bytes > capacity);
        if is_full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// Counts an operation, and tells whether it may succeed.
    fn step(&mut self, path: &Path) -> io::Result<()> {
        self.operations += 1;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if self.faults.only.is_some_and(|only| !name.starts_with(only)) {
            return Ok(());
        }
        match &mut self.faults.operations_left {
            Some(0) => {
                if !self.faults.is_permanent {
                    self.faults.operations_left = None;
                }
                self.failures += 1;
                let is_interruption = self.faults.is_interruption;
                Err(if is_interruption {
                    io::ErrorKind::Interrupted.into()
                } else {
                    io::Error::other("injected fault")
                })
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Storage for SimDisk {
    fn names(&self, directory: &Path) -> io::Result<Vec<String>> {
        let state = self.state();
        if !state.directories.contains(directory) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let all = state.files.keys().chain(&state.directories);
        let inside = all.filter(|path| path.parent() == Some(directory));
        Ok(inside.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect())
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.step(path)?;
        for ancestor in path.ancestors() {
            state.directories.insert(ancestor.to_owned());
        }
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>> {
        if !self.state().locks.insert(path.to_owned()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(SimLock { disk: self.clone(), path: path.to_owned() }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        self.file(path)
    }

    fn create(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn StorageFile>> {
        {
            let mut state = self.state();
            state.step(path)?;
            state.check_room(bytes)?;
            let mut content = lock(state.files.entry(path.to_owned()).or_default());
            content.durable.resize(bytes as usize, 0);
            content.cached.resize(bytes as usize, 0);
        }
        self.file(path)
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        {
            let mut state = self.state();
            state.step(path)?;
            state.check_room(contents.len() as u64)?;
        }
        self.set_bytes(path, contents.to_vec());
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.step(from)?;
        let moved = |path: &PathBuf| {
            path.strip_prefix(from).ok().map(|rest| if rest == Path::new("") { to.to_owned() } else { to.join(rest) })
        };
        state.files = std::mem::take(&mut state.files)
            .into_iter()
            .map(|(path, content)| (moved(&path).unwrap_or(path), content))
            .collect();
        state.directories =
            std::mem::take(&mut state.directories).into_iter().map(|path| moved(&path).unwrap_or(path)).collect();
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.step(path)?;
        state.files.remove(path).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.step(path)?;
        state.files.retain(|file, _| !file.starts_with(path));
        state.directories.retain(|directory| !directory.starts_with(path));
        Ok(())
    }
}

#[derive(Debug)]
struct SimLock {
    disk: SimDisk,
    path: PathBuf,
}

impl LockGuard for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.disk.state().locks.remove(&self.path);
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    path: PathBuf,
    content: Arc<Mutex<Content>>,
}

impl StorageFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        Ok(lock(&self.content).cached.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = lock(&self.content);
        let rest = content.cached.get(offset as usize..).unwrap_or_default();
        let read = rest.len().min(buffer.len());
        buffer[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64, sync: bool) -> io::Result<usize> {
        let mut state = self.disk.state();
        let bytes = &bytes[..bytes.len().min(state.faults.write_bytes_max.unwrap_or(usize::MAX))];
        let allowed = state.step(&self.path);
        state.last_write = offset;
        if allowed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let mut content = lock(&self.content);
        let range = offset as usize..offset as usize + bytes.len();
        if range.end > content.cached.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        content.cached[range.clone()].copy_from_slice(bytes);
        let sectors: Vec<usize> = (range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES)).collect();
        if let Err(error) = allowed {
            for _ in 0..state.faults.sectors_written {
                let sector = sectors[draw(&mut state.random) as usize % sectors.len()];
                content.write_back(sector);
            }
            content.lying.extend(&sectors);
            return Err(error);
        }
        for sector in sectors {
            content.lying.remove(&sector);
            content.dirty.insert(sector);
            content.held.remove(&sector);
            match (sync, state.holds_syncs) {
                (true, true) => {
                    content.held.insert(sector);
                }
                (true, false) => content.write_back(sector),
                (false, _) => {}
            }
        }
        Ok(bytes.len())
    }

    fn written_prefix(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn sync_and_drop_cache(&self, range: Range<u64>) -> io::Result<()> {
        let mut content = lock(&self.content);
        content.write_back_all();
        let sectors = range.start as usize / SECTOR_BYTES..(range.end as usize).div_ceil(SECTOR_BYTES);
        for sector in content.lying.clone().into_iter().filter(|sector| sectors.contains(sector)) {
            content.forget(sector);
        }
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

impl Content {
    fn write_back_all(&mut self) {
        for sector in std::mem::take(&mut self.dirty) {
            self.write_back(sector);
        }
    }

    fn write_back_held(&mut self) {
        for sector in std::mem::take(&mut self.held) {
            self.write_back(sector);
        }
    }

    fn forget(&mut self, sector: usize) {
        let range = sector_range(sector, self.cached.len());
        self.cached[range.clone()].copy_from_slice(&self.durable[range]);
        self.lying.remove(&sector);
    }

    fn write_back(&mut self, sector: usize) {
        let range = sector_range(sector, self.cached.len());
        self.durable[range.clone()].copy_from_slice(&self.cached[range]);
        self.dirty.remove(&sector);
    }
}

fn sector_range(sector: usize, length: usize) -> Range<usize> {
    sector * SECTOR_BYTES..((sector + 1) * SECTOR_BYTES).min(length)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A step of a linear congruential generator; its upper bits are random enough here.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

const SECTOR_BYTES: usize = 512;
