//! A file that is mapped and whose disk goes: to touch it must not end the process.
//!
//! Where the kernel has dropped a page and can't read it again, or has written it back and the file system takes no
//! more (a bad sector, an XFS that has shut itself down, a file that was cut off), who touches it gets a SIGBUS. A map
//! that is [`Guarded`] is replaced by empty memory then, and says so from then on: whoever has read it asks
//! [`Guarded::is_lost`] before anything comes of what it read; what is stored there is there for this process, and the
//! file keeps what it had. Every other SIGBUS goes to whoever handled it before.

#![expect(unsafe_code, reason = "a signal's handler, which replaces a map")]

use std::ffi::c_void;
use std::io;
use std::mem;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use memmap2::MmapRaw;

use crate::limits::GUARDED_MAPS_MAX;

/// A map that can be touched whatever becomes of its file. Its octets may turn to zero.
#[derive(Debug)]
pub struct Guarded {
    map: MmapRaw,
    place: &'static Place,
}

impl Guarded {
    /// Fails where a process has too many, or its SIGBUS can't be handled.
    pub fn new(map: MmapRaw) -> io::Result<Self> {
        HANDLER.get_or_init(install).as_ref().map_err(|code| io::Error::from_raw_os_error(*code))?;
        let start = map.as_ptr().addr();
        let is_taken = |place: &&Place| place.start.compare_exchange(0, start, ORDER, ORDER).is_ok();
        let place = PLACES.iter().find(is_taken).ok_or_else(|| io::Error::other("too many maps in a process"))?;
        place.is_lost.store(false, ORDER);
        place.bytes.store(map.len(), ORDER);
        Ok(Self { map, place })
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.map.as_ptr()
    }

    #[expect(clippy::len_without_is_empty, reason = "no file of no octets is mapped")]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether memory has taken the map's place, so that what was read from it may never have been in the file.
    pub fn is_lost(&self) -> bool {
        self.place.is_lost.load(ORDER)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.place.bytes.store(0, ORDER);
        self.place.start.store(0, ORDER);
    }
}

/// Where a guarded map is; 0: there is none.
#[derive(Debug)]
struct Place {
    start: AtomicUsize,
    bytes: AtomicUsize,
    is_lost: AtomicBool,
}

impl Place {
    const fn free() -> Self {
        Self { start: AtomicUsize::new(0), bytes: AtomicUsize::new(0), is_lost: AtomicBool::new(false) }
    }

    fn holds(&self, address: usize) -> bool {
        address.wrapping_sub(self.start.load(ORDER)) < self.bytes.load(ORDER)
    }

    /// All of it, so that the size of a page need not be known. False: the kernel has no memory.
    fn replace(&self) -> bool {
        // Nobody is to see a zero before.
        self.is_lost.store(true, ORDER);
        let (start, bytes) = (self.start.load(ORDER), self.bytes.load(ORDER));
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        // SAFETY: these are the pages of a map that is guarded, and so there: who has touched it holds it. Whoever
        // guards it has said that its octets may turn to zero while they are read: those that are written are read
        // through atomics only, and nothing comes of the others once the map is lost.
        let replaced = unsafe { libc::mmap(ptr::without_provenance_mut(start), bytes, access, kind, -1, 0) };
        replaced != libc::MAP_FAILED
    }
}

static PLACES: [Place; GUARDED_MAPS_MAX] = [const { Place::free() }; GUARDED_MAPS_MAX];

/// Who handled SIGBUS before us, or the error number for which we don't. Set before the first map is guarded.
static HANDLER: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

fn install() -> Result<libc::sigaction, i32> {
    // SAFETY: zeroes are a sigaction: no handler, no flags, an empty mask.
    let (mut ours, mut before): (libc::sigaction, libc::sigaction) = unsafe { mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) = on_bus_error;
    ours.sa_sigaction = handler as *const () as usize;
    // On the thread's alternative stack where it has one, as the handlers before us may want.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both structures live through the call, and the handler does nothing that a handler must not do.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, &raw mut before) } {
        0 => Ok(before),
        _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
    }
}

/// Only atomics and system calls: whatever the thread was doing, it may hold locks.
extern "C" fn on_bus_error(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel hands a valid structure.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // One that somebody has sent has no address, and a code of 0 or less.
    let guarded = PLACES.iter().find(|place| code > 0 && place.holds(address));
    if guarded.is_some_and(Place::replace) {
        return;
    }
    // A map is guarded only after this is set; a SIGBUS in the moment before finds none, and none to go to.
    let before = HANDLER.get().and_then(|handler| handler.as_ref().ok());
    // SAFETY: the handler is what the kernel would have called, with the arguments that it would have had. Where there
    // was none the signal's own meaning is put back: the faulting instruction meets it when it is run again.
    unsafe {
        match before {
            Some(before) if before.sa_sigaction != libc::SIG_DFL && before.sa_sigaction != libc::SIG_IGN => {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) =
                        mem::transmute(before.sa_sigaction);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(i32) = mem::transmute(before.sa_sigaction);
                    handler(signal);
                }
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
                if code <= 0 {
                    libc::raise(signal);
                }
            }
        }
    }
}

const ORDER: Ordering = Ordering::SeqCst;

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::sync::atomic::AtomicU64;

    use tempfile::TempDir;

    use super::*;

    fn file(directory: &TempDir) -> File {
        let path = directory.path().join("mapped");
        std::fs::write(&path, [7; 16 << 10]).unwrap();
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    fn word(map: &Guarded, at: usize) -> &AtomicU64 {
        assert!(at + 8 <= map.len());
        // SAFETY: it is within the map, which begins on a page, and `at` is a multiple of eight.
        unsafe { &*map.as_ptr().add(at).cast::<AtomicU64>() }
    }

    /// A file that was cut off stands in for a disk that is gone: the kernel's answer is the same.
    #[test]
    fn a_store_goes_on_where_the_file_can_not() {
        let directory = TempDir::new().unwrap();
        let file = file(&directory);
        let map = Guarded::new(MmapRaw::map_raw(&file).unwrap()).unwrap();
        let last = map.len() - 8;
        word(&map, last).store(1, Ordering::Relaxed);
        file.set_len(0).unwrap();
        word(&map, last).store(2, Ordering::Relaxed);
        word(&map, 0).store(3, Ordering::Relaxed);
        assert_eq!([0, 8, last].map(|at| word(&map, at).load(Ordering::Relaxed)), [3, 0, 2]);
        assert!(map.is_lost());
        let other = directory.path().join("other");
        std::fs::write(&other, [7; 4096]).unwrap();
        drop(map);
        let map = Guarded::new(MmapRaw::map_raw(&File::options().read(true).write(true).open(other).unwrap()).unwrap());
        assert!(!map.unwrap().is_lost(), "the next one in its place");
    }

    /// What is not guarded, or no longer, ends the process as it would without us.
    #[test]
    fn other_maps_are_as_they_were() {
        let directory = TempDir::new().unwrap();
        let file = file(&directory);
        let guarded = Guarded::new(MmapRaw::map_raw(&file).unwrap()).unwrap();
        let (start, end) = (guarded.as_ptr().addr(), guarded.as_ptr().addr() + guarded.len());
        let is_held = |address| PLACES.iter().any(|place| place.holds(address));
        assert_eq!([start - 1, start, end - 1, end].map(is_held), [false, true, true, false]);
        drop(guarded);
        assert!(!is_held(start));
    }
}
