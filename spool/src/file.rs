//! Real files: plain positioned I/O, read-only maps, and the ring. The crate's only `unsafe` code is here and in
//! `file/`.
//!
//! Durable writes carry `RWF_DSYNC`: the write and what is needed to read it back are on the medium when it completes,
//! in one call. A separate `fdatasync` linked behind a write is never used: tokio-uring may split a link when its
//! submission queue is full, and the sync could finish before its write.
//!
//! See also `storage.rs` for the traits.

#![expect(
    unsafe_code,
    reason = "maps, pwritev2, fallocate, statvfs and posix_fadvise have no safe form in the standard library"
)]

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::slice;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

pub use self::bus_error::Guarded;
use crate::storage::{LockGuard, Storage, StorageFile};

mod bus_error;

/// Directories and files of the operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileStorage;

impl Storage for FileStorage {
    fn names(&self, directory: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory)? {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            self.create_directory(parent)?;
        }
        match fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
            Ok(()) => sync_parent(path),
        }
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>> {
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
        match file.try_lock() {
            Ok(()) => {
                // Only for whoever finds it locked; a disk too full for it must not keep a spool from being opened.
                let holder = format!("{}\n", std::process::id());
                let _ = file.set_len(0).and_then(|()| file.write_all_at(holder.as_bytes(), 0));
                Ok(Box::new(FileLock { file }))
            }
            Err(TryLockError::WouldBlock) => Err(held_by(path)),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Arc::new(PlainFile { file }))
    }

    fn create(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn StorageFile>> {
        make(path, bytes).map_err(|error| with_what_is_free(path, error))
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        let mut file = File::create(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        self.rename(Path::new(&temporary), path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        sync_parent(to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)?;
        sync_parent(path)
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)?;
        sync_parent(path)
    }
}

/// A file that has its space.
fn make(path: &Path, bytes: u64) -> io::Result<Arc<dyn StorageFile>> {
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    if let Err(error) = allocate(&file, bytes) {
        // A new file without its space is worth nothing, and would be found at the next start. One that was to grow
        // keeps what it holds.
        let _ = if length == 0 { fs::remove_file(path) } else { file.set_len(length) };
        return Err(error);
    }
    file.sync_all()?;
    sync_parent(path)?;
    Ok(Arc::new(PlainFile { file }))
}

/// Want of space has several causes, and one kind of error: a full disk, a reserve for others, no room for more names.
fn with_what_is_free(path: &Path, error: io::Error) -> io::Error {
    if error.kind() != io::ErrorKind::StorageFull {
        return error;
    }
    match free_at(path.parent().unwrap_or(path)) {
        Some((bytes, files)) => {
            let text = format!("{error}; {} MiB and {files} files are free", bytes >> 20);
            io::Error::new(error.kind(), text)
        }
        None => error,
    }
}

/// Octets and files that the file system still takes of us.
fn free_at(path: &Path) -> Option<(u64, u64)> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut found = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with a zero and outlives the call, which writes nothing but the structure it is given.
    let result = unsafe { libc::statvfs(path.as_ptr(), found.as_mut_ptr()) };
    // SAFETY: the call has filled it where it says so.
    let found = (result == 0).then(|| unsafe { found.assume_init() })?;
    Some((found.f_bavail.saturating_mul(found.f_frsize), found.f_favail))
}

/// The error that a lock which somebody has gets, and whom the file names.
pub(crate) fn held_by(path: &Path) -> io::Error {
    let holder = fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u32>().ok());
    match holder {
        Some(holder) => io::Error::new(io::ErrorKind::WouldBlock, format!("process {holder}")),
        None => io::ErrorKind::WouldBlock.into(),
    }
}

/// Read-only maps of a file that only grows in meaning: the log asks for ranges that were written and acknowledged, and
/// writes them again only when nobody holds the map (see `retire.rs`).
///
/// There are two of the whole file, because its disk may fail. We read the one, which is empty memory from then on: so
/// what was read is used only where it is not lost. The kernel reads the other when it sends, and fails.
#[derive(Debug)]
pub struct Map {
    read: Guarded,
    sent: MmapRaw,
}

impl Map {
    /// The bytes at `start..start + length`. The range must lie in acknowledged frames of the map's present use.
    pub(crate) fn bytes(&self, start: usize, length: usize) -> &[u8] {
        check_range(start, length, self.read.len());
        // SAFETY: the range lies inside the map (checked), which lives as long as the borrow. Its bytes do not change
        // meanwhile: a log writes each block of a segment once per use, hands out only blocks whose write has
        // completed, and uses a segment again only after every clone of the `Arc` of this map is gone. Files of a spool
        // are locked against other processes of ours and are never shortened while open. Where the kernel can't read
        // the file, a thread that touches the map waits in a signal's handler until zeroes are there; whoever reads
        // meanwhile finds either, and nothing comes of it.
        unsafe { slice::from_raw_parts(self.read.as_ptr().add(start), length) }
    }

    /// The same for the kernel, and for nobody else: where the file can't be read, to touch them ends the process.
    pub(crate) fn bytes_to_send(&self, start: usize, length: usize) -> &[u8] {
        check_range(start, length, self.sent.len());
        // SAFETY: as above; this map stays the file's.
        unsafe { slice::from_raw_parts(self.sent.as_ptr().add(start), length) }
    }

    /// Whether the file could not be read, so that [`Self::bytes`] may have been zeroes.
    pub(crate) fn is_lost(&self) -> bool {
        self.read.is_lost()
    }
}

fn check_range(start: usize, length: usize, whole: usize) {
    let end = start.checked_add(length).expect("a range inside a segment");
    assert!(end <= whole);
}

#[derive(Debug)]
struct FileLock {
    file: File,
}

impl LockGuard for FileLock {}

impl Drop for FileLock {
    /// Closing it is not enough: a child that was just forked for a program has the descriptor too, until its exec.
    fn drop(&mut self) {
        // What can't be unlocked is when it is closed.
        let _ = self.file.unlock();
    }
}

#[derive(Debug)]
pub(crate) struct PlainFile {
    file: File,
}

impl PlainFile {
    pub(crate) fn open_read_only(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)? })
    }
}

impl StorageFile for PlainFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64, sync: bool) -> io::Result<usize> {
        let vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let flags = if sync { libc::RWF_DSYNC } else { 0 };
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            // SAFETY: the descriptor is open for as long as `self`; the one vector names `bytes`, which the call only
            // reads and which outlives it.
            let written = unsafe { libc::pwritev2(self.file.as_raw_fd(), &raw const vector, 1, offset, flags) };
            match usize::try_from(written) {
                Ok(written) => return Ok(written),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn written_prefix(&self) -> io::Result<u64> {
        // SAFETY: the call takes no pointers; the descriptor is open for as long as `self`. It moves the file position,
        // which nothing here uses.
        let hole = unsafe { libc::lseek(self.file.as_raw_fd(), 0, libc::SEEK_HOLE) };
        u64::try_from(hole).map_err(|_| io::Error::last_os_error())
    }

    fn sync_and_drop_cache(&self, range: Range<u64>) -> io::Result<()> {
        let synced = self.file.sync_data();
        if range.is_empty() {
            return synced;
        }
        let start = libc::off_t::try_from(range.start).map_err(|_| io::ErrorKind::InvalidInput)?;
        // A length of 0 means up to the end.
        let length = libc::off_t::try_from(range.end.saturating_sub(range.start)).unwrap_or(0);
        // SAFETY: the call takes no pointers; the descriptor is open for as long as `self`.
        let advised = unsafe { libc::posix_fadvise(self.file.as_raw_fd(), start, length, libc::POSIX_FADV_DONTNEED) };
        synced?;
        if advised == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(advised)) }
    }

    fn map(&self) -> io::Result<Option<Map>> {
        let map = || MmapOptions::new().map_raw_read_only(&self.file);
        Ok(Some(Map { read: Guarded::new(map()?)?, sent: map()? }))
    }

    #[cfg(feature = "uring")]
    fn descriptor(&self) -> Option<std::os::fd::RawFd> {
        Some(self.file.as_raw_fd())
    }
}

fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    let bytes = libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    loop {
        // SAFETY: the call takes no pointers; the descriptor is open for as long as `file`.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

#[cfg(feature = "uring")]
pub use ring::execute_on_ring;

/// Operations on the current tokio-uring ring.
///
/// tokio-uring queues an entry and submits it when the runtime next parks, so each operation's stable data owns what
/// the entry names: the file (hence its descriptor) and the buffer, whose heap memory does not move with it. None of it
/// touches the ring when dropped. Every operation completes once and none is linked to another. The caller must let all
/// operations complete before it drops the runtime, because tokio-uring 0.5 frees stable data before it cancels.
#[cfg(feature = "uring")]
mod ring {
    use std::fs::{File, OpenOptions};
    use std::future::poll_fn;
    use std::io;
    use std::os::fd::{AsRawFd, RawFd};
    use std::os::unix::fs::OpenOptionsExt;
    use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
    use std::task::{Poll, Waker};
    use std::thread;

    use io_uring::{cqueue, opcode, squeue, types};
    use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot};

    use crate::limits::BLOCK_BYTES;
    use crate::storage::{Completion, Done, Operation, ReadBuffer, StorageFile, Work, execute};

    /// Executes an operation on the ring of the current thread.
    ///
    /// What has no entry of its own in a ring, or would block the submitting thread (creating and removing files, which
    /// sync their directory), runs on a thread made for it: it is rare.
    pub async fn execute_on_ring(operation: Operation) -> Completion {
        let Operation { token, work } = operation;
        let done = match work {
            Work::Write { file, offset, buffer, start, sync } => match file.descriptor() {
                Some(descriptor) => {
                    let entry = write_entry(descriptor, &buffer[start..], offset, sync);
                    let (result, Held { memory: buffer, .. }) =
                        submit(Held { _file: file, memory: buffer }, entry).await;
                    Done::Write { buffer, start, result }
                }
                None => return execute(Operation { token, work: Work::Write { file, offset, buffer, start, sync } }),
            },
            Work::Zero { file, offset, zeros, bytes, sync } => match file.descriptor() {
                Some(descriptor) => {
                    Done::Zero { result: write_zeros(file, descriptor, offset, zeros, bytes, sync).await }
                }
                None => return execute(Operation { token, work: Work::Zero { file, offset, zeros, bytes, sync } }),
            },
            Work::Read { file, offset, buffer } => match file.descriptor() {
                Some(descriptor) => read_whole(file, descriptor, offset, buffer).await,
                None => return execute(Operation { token, work: Work::Read { file, offset, buffer } }),
            },
            work @ (Work::Create { .. } | Work::Remove { .. } | Work::DropCache { .. }) => {
                return on_a_thread(Operation { token, work }).await;
            }
        };
        Completion { token, done }
    }

    async fn read_whole(
        mut file: Arc<dyn StorageFile>,
        descriptor: RawFd,
        offset: u64,
        mut buffer: ReadBuffer,
    ) -> Done {
        let mut filled = 0;
        while filled < buffer.len() {
            let rest = &mut buffer[filled..];
            let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
            let entry = opcode::Read::new(types::Fd(descriptor), rest.as_mut_ptr(), length)
                .offset(offset + filled as u64)
                .build();
            let (result, held) = submit(Held { _file: file, memory: buffer }, entry).await;
            Held { _file: file, memory: buffer } = held;
            match result {
                Ok(0) => return Done::Read { buffer, result: Err(io::ErrorKind::UnexpectedEof.into()) },
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Done::Read { buffer, result: Err(error) },
            }
        }
        Done::Read { buffer, result: Ok(()) }
    }

    /// Past the page cache where the file system can: the zeros are never read, and copying them there cost a fifth of
    /// what a new spool's commits did.
    async fn write_zeros(
        file: Arc<dyn StorageFile>,
        descriptor: RawFd,
        offset: u64,
        zeros: Arc<[u8]>,
        bytes: usize,
        sync: bool,
    ) -> io::Result<usize> {
        let start = zeros.as_ptr().align_offset(BLOCK_BYTES as usize);
        let aligned = offset.is_multiple_of(BLOCK_BYTES) && (bytes as u64).is_multiple_of(BLOCK_BYTES);
        let direct = (aligned && start + bytes <= zeros.len()).then(|| open_direct(descriptor)).flatten();
        if let Some(direct) = direct {
            let entry = write_entry(direct.as_raw_fd(), &zeros[start..start + bytes], offset, sync);
            let memory = (direct, Arc::clone(&zeros));
            let (result, _) = submit(Held { _file: Arc::clone(&file), memory }, entry).await;
            // Some file systems take the flag and refuse the write.
            if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput) {
                return result;
            }
        }
        let entry = write_entry(descriptor, &zeros[..bytes], offset, sync);
        submit(Held { _file: file, memory: zeros }, entry).await.0
    }

    /// The same file once more. None where there is no `/proc`, or the file system knows no direct writes.
    fn open_direct(descriptor: RawFd) -> Option<File> {
        let path = format!("/proc/self/fd/{descriptor}");
        OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).ok()
    }

    fn write_entry(descriptor: RawFd, bytes: &[u8], offset: u64, sync: bool) -> squeue::Entry {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let flags = if sync { libc::RWF_DSYNC } else { 0 };
        opcode::Write::new(types::Fd(descriptor), bytes.as_ptr(), length).offset(offset).rw_flags(flags).build()
    }

    /// What an entry names, kept until it completes.
    struct Held<M> {
        _file: Arc<dyn StorageFile>,
        memory: M,
    }

    async fn submit<M: 'static>(held: Held<M>, entry: squeue::Entry) -> (io::Result<usize>, Held<M>) {
        UnsubmittedOneshot::new(Box::new(held), GiveBack(std::marker::PhantomData), entry).submit().await
    }

    struct GiveBack<M>(std::marker::PhantomData<fn(M)>);

    impl<M: 'static> OneshotOutputTransform for GiveBack<M> {
        type Output = (io::Result<usize>, Held<M>);
        type StoredData = Box<Held<M>>;

        fn transform_oneshot_output(self, data: Box<Held<M>>, entry: cqueue::Entry) -> Self::Output {
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().wrapping_neg()));
            (result, *data)
        }
    }

    /// What a thread is to do, where it leaves its result, and whom it wakes.
    struct Slot {
        operation: Option<Operation>,
        completion: Option<Completion>,
        waker: Option<Waker>,
    }

    async fn on_a_thread(operation: Operation) -> Completion {
        let slot = Slot { operation: Some(operation), completion: None, waker: None };
        let slot = Arc::new(Mutex::new(slot));
        let theirs = Arc::clone(&slot);
        let spawned = thread::Builder::new().name("spool file".to_owned()).spawn(move || run(&theirs));
        if spawned.is_err() {
            // There may be no more threads; better late than never.
            run(&slot);
        }
        poll_fn(|context| {
            let mut slot = lock(&slot);
            match slot.completion.take() {
                Some(completion) => Poll::Ready(completion),
                None => {
                    slot.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    fn run(slot: &Mutex<Slot>) {
        let operation = lock(slot).operation.take().expect("it is run once");
        let completion = execute(operation);
        let mut slot = lock(slot);
        slot.completion = Some(completion);
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
    }

    fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
        slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;
    use crate::storage::{Completion, Done, Operation, Work, execute};

    fn write(file: &Arc<dyn StorageFile>, sync: bool) -> Operation {
        Operation {
            token: 0,
            work: Work::Write { file: Arc::clone(file), offset: 0, buffer: BLOCK.into(), start: 0, sync },
        }
    }

    /// A checkpoint's file grows while the log runs. Once it was removed when the disk had no room for that, with the
    /// checkpoint in it.
    #[test]
    fn a_file_that_can_not_grow_keeps_what_it_holds() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("file");
        let file = FileStorage.create(&path, 8_192).expect("a small file");
        file.write_at(b"held", 4_096, true).expect("a write into it");
        FileStorage.create(&path, 1 << 62).expect_err("no disk has room for that");
        let bytes = fs::read(&path).expect("the file is still there");
        assert_eq!((bytes.len(), &bytes[4_096..4_100]), (8_192, &b"held"[..]));
        let fresh = directory.path().join("fresh");
        FileStorage.create(&fresh, 1 << 62).expect_err("no disk has room for that");
        assert!(!fresh.exists());
    }

    #[test]
    fn want_of_space_is_told_with_what_is_free() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("file");
        let told = |code| with_what_is_free(&path, io::Error::from_raw_os_error(code));
        let full = told(libc::ENOSPC);
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert!(full.to_string().ends_with(" files are free"), "{full}");
        assert_eq!(told(libc::EMFILE).raw_os_error(), Some(libc::EMFILE));
    }

    /// As a child has it between its fork and its exec.
    #[test]
    fn a_lock_ends_with_its_guard_whoever_has_a_copy_of_the_descriptor() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("LOCK");
        let file = File::create(&path).expect("a file to lock");
        file.try_lock().expect("nobody has locked it");
        let copy = file.try_clone().expect("a copy of the descriptor");
        FileStorage.lock(&path).expect_err("it is locked");
        drop(FileLock { file });
        FileStorage.lock(&path).expect("it is not locked any more");
        drop(copy);
    }

    fn check(completion: &Completion) {
        assert!(matches!(completion.done, Done::Write { result: Ok(written), .. } if written == BLOCK.len()));
    }

    /// How many pages of a file are not on the medium. `None` where the kernel (before 6.5) can't tell.
    fn dirty_pages(file: &File) -> Option<u64> {
        /// As in `linux/mman.h`: a range, then what is found of its pages.
        #[derive(Default)]
        #[repr(C)]
        struct Range {
            offset: u64,
            length: u64,
        }
        #[derive(Default)]
        #[repr(C)]
        struct Found {
            cached: u64,
            dirty: u64,
            in_writeback: u64,
            evicted: u64,
            recently_evicted: u64,
        }
        let (range, mut found) = (Range::default(), Found::default());
        // SAFETY: the two pointers name what the call reads and writes, in the kernel's layout, and outlive it.
        let result =
            unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), ptr::from_ref(&range), ptr::from_mut(&mut found), 0) };
        match result {
            0 => Some(found.dirty + found.in_writeback),
            _ => None,
        }
    }

    /// A file that says by its pages what is on the medium; `None` where nothing says so: on tmpfs, or an old kernel.
    fn telling_file() -> Option<(Arc<dyn StorageFile>, File)> {
        let file = tempfile::tempfile().unwrap();
        let plain: Arc<dyn StorageFile> = Arc::new(PlainFile { file: file.try_clone().unwrap() });
        check(&execute(write(&plain, false)));
        let dirty = dirty_pages(&file)?;
        file.sync_all().unwrap();
        (dirty > 0 && dirty_pages(&file) == Some(0)).then_some((plain, file))
    }

    #[test]
    fn a_write_is_on_the_medium_when_it_completes() {
        let Some((plain, file)) = telling_file() else { return };
        check(&execute(write(&plain, false)));
        assert!(dirty_pages(&file) > Some(0));
        check(&execute(write(&plain, true)));
        assert_eq!(dirty_pages(&file), Some(0));
    }

    #[cfg(feature = "uring")]
    #[test]
    fn a_write_on_a_ring_is_on_the_medium_when_it_completes() {
        let Some((plain, file)) = telling_file() else { return };
        tokio_uring::start(async {
            check(&execute_on_ring(write(&plain, false)).await);
            assert!(dirty_pages(&file) > Some(0));
            check(&execute_on_ring(write(&plain, true)).await);
            assert_eq!(dirty_pages(&file), Some(0));
        });
    }

    /// tokio-uring may split two linked operations, and then the sync may be over before the write. A pipe tells how
    /// many there are: it takes a write with `RWF_DSYNC`, and can't be synced.
    #[cfg(feature = "uring")]
    #[test]
    fn a_durable_write_on_a_ring_is_one_operation() {
        use std::io::Read as _;
        use std::os::fd::OwnedFd;

        let (mut reader, writer) = io::pipe().unwrap();
        let file: Arc<dyn StorageFile> = Arc::new(PlainFile { file: File::from(OwnedFd::from(writer)) });
        assert_eq!(file.sync_and_drop_cache(0..0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        tokio_uring::start(async {
            check(&execute_on_ring(write(&file, true)).await);
        });
        drop(file);
        let mut written = Vec::new();
        reader.read_to_end(&mut written).unwrap();
        assert_eq!(written, BLOCK);
    }

    const BLOCK: [u8; 4_096] = [7; 4_096];
    const CACHESTAT: libc::c_long = 451;
}
