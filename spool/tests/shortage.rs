//! Files that can't be made: the cause is told once, want of space is told from other wants, and what is over is over.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postrider_spool::sim::SimDisk;
use postrider_spool::{
    AppendError, Closed, Envelope, Fate, LockGuard, Log, MessageId, Outcome, Progress, Recipient, RecipientResult,
    RecoverOptions, Sequence, Spool, SpoolOptions, Storage, StorageFile, execute,
};

const SEGMENT_BYTES: u64 = 64 << 10;

/// A disk where no file can be made while there is an error number.
#[derive(Debug)]
struct Scarce {
    disk: SimDisk,
    code: AtomicI32,
    /// Names of the files that can't be made begin so.
    prefix: Mutex<&'static str>,
}

impl Storage for Scarce {
    fn names(&self, directory: &Path) -> io::Result<Vec<String>> {
        self.disk.names(directory)
    }
    fn create_directory(&self, path: &Path) -> io::Result<()> {
        self.disk.create_directory(path)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn LockGuard>> {
        self.disk.lock(path)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        self.disk.open(path)
    }
    fn create(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn StorageFile>> {
        let name = path.file_name().unwrap().to_str().unwrap();
        match self.code.load(Ordering::Relaxed) {
            code if code != 0 && name.starts_with(*self.prefix.lock().unwrap()) => {
                Err(io::Error::from_raw_os_error(code))
            }
            _ => self.disk.create(path, bytes),
        }
    }
    fn replace(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        self.disk.replace(path, contents)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_directory(path)
    }
}

struct Rig {
    storage: Arc<Scarce>,
    log: Log,
    now: Duration,
    ids: VecDeque<MessageId>,
    /// What could not be made.
    told: Vec<(PathBuf, Option<i32>)>,
    /// Operations that make files take their time.
    is_slow: bool,
}

impl Rig {
    /// `prefix`: names of the files that can't be made, from now on.
    fn new(prefix: &'static str, code: i32) -> Self {
        let code = AtomicI32::new(code);
        let storage = Arc::new(Scarce { disk: SimDisk::new(1), code, prefix: Mutex::new(prefix) });
        let options = SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() };
        let mut spool = Spool::open_on(Arc::clone(&storage) as _, Path::new("/spool"), options).unwrap();
        let directory = spool.assign(1).unwrap().remove(0).remove(0);
        let recover = RecoverOptions { seed: 1, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
        let log = Log::recover(directory, recover, &mut |_| {}).unwrap();
        Self { storage, log, now: Duration::ZERO, ids: VecDeque::new(), told: Vec::new(), is_slow: false }
    }

    fn fail_with(&self, code: i32) {
        self.storage.code.store(code, Ordering::Relaxed);
    }

    fn settle(&mut self) {
        while let Some(operation) = self.log.poll_operation(self.now, &mut ()) {
            if self.is_slow && operation.describe().0 == "create" {
                continue;
            }
            match self.log.handle_completion(self.now, execute(operation)) {
                Progress::NotMade { path, error } => self.told.push((path, error.raw_os_error())),
                Progress::Failed { error } => panic!("{error}"),
                _ => {}
            }
        }
    }

    /// Three seconds.
    fn rest(&mut self) {
        for _ in 0..60 {
            self.now += Duration::from_millis(50);
            self.settle();
        }
    }

    fn append(&mut self) -> Result<(), AppendError> {
        let envelope =
            Envelope { recipients: vec![Recipient { address: "b@example.net".into() }], ..Envelope::default() };
        let (id, _) = self.log.append_message(&envelope, b"", &[b'x'; 3_000])?;
        self.ids.push_back(id);
        self.settle();
        Ok(())
    }

    fn fill(&mut self) -> Closed {
        for _ in 0..1_000 {
            match self.append() {
                Ok(()) => {}
                Err(AppendError::Full(closed)) => return closed,
                Err(error) => panic!("{error}"),
            }
        }
        panic!("it never filled");
    }

    fn empty(&mut self) {
        while let Some(id) = self.ids.pop_front() {
            let result = RecipientResult {
                index: 0,
                recipient: "b@example.net".into(),
                queue: "example.net".into(),
                fate: Fate::Delivered,
                attempts: 1,
                answer: Default::default(),
            };
            let outcome = Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() };
            self.log.append_outcome(&outcome).unwrap();
            self.settle();
        }
        self.rest();
    }

    fn codes(&self) -> Vec<i32> {
        self.told.iter().filter_map(|(_, code)| *code).collect()
    }
}

#[test]
fn a_segment_that_cannot_be_made_is_told_once_for_each_cause() {
    let mut rig = Rig::new("segment", 0);
    rig.settle();
    rig.fail_with(libc::EMFILE);
    assert_eq!(rig.fill(), Closed::NoFile);
    assert_eq!(rig.log.is_open_for_mail(), Err(Closed::NoFile));
    rig.rest();
    assert_eq!(rig.codes(), [libc::EMFILE], "it was tried several times");
    assert!(rig.told[0].0.starts_with("/spool/log-0000/"), "{:?}", rig.told);
    rig.fail_with(libc::ENOSPC);
    rig.rest();
    assert_eq!(rig.log.is_open_for_mail(), Err(Closed::NoSpace));
    rig.fail_with(libc::ENOMEM);
    rig.rest();
    assert_eq!(rig.log.is_open_for_mail(), Err(Closed::NoFile));
    assert_eq!(rig.codes(), [libc::EMFILE, libc::ENOSPC, libc::ENOMEM]);
    rig.fail_with(0);
    rig.rest();
    assert_eq!(rig.log.is_open_for_mail(), Ok(()));
}

#[test]
fn a_checkpoint_file_that_cannot_be_made_is_told_with_its_cause() {
    let mut rig = Rig::new("checkpoint", libc::ENFILE);
    rig.rest();
    assert_eq!(rig.log.is_open_for_mail(), Err(Closed::NoFile));
    assert_eq!(rig.codes(), [libc::ENFILE]);
    assert!(rig.told[0].0.ends_with("checkpoint-0"), "{:?}", rig.told);
    rig.fail_with(libc::ENOSPC);
    rig.rest();
    assert_eq!(rig.log.is_open_for_mail(), Err(Closed::NoSpace));
    // While another try takes its time, the reason is the same, and nobody is woken for nothing.
    rig.is_slow = true;
    rig.rest();
    assert_eq!(rig.log.is_open_for_mail(), Err(Closed::NoSpace));
    assert!(rig.log.next_timeout().is_none_or(|at| at > rig.now));
}

/// Once, what had failed some time ago was the reason whenever segments were filled faster than others were made.
#[test]
fn a_failure_is_over_once_no_file_is_wanted_any_more() {
    let mut rig = Rig::new("segment", 0);
    (0..200).for_each(|_| rig.append().unwrap());
    rig.fail_with(libc::ENOSPC);
    assert_eq!(rig.fill(), Closed::NoSpace);
    rig.empty();
    assert_eq!(rig.log.is_open_for_mail(), Ok(()), "what is empty is used again");
    rig.fail_with(0);
    rig.is_slow = true;
    assert_eq!(rig.fill(), Closed::Preparing);
    assert_eq!(rig.log.is_open_for_outcomes(), Ok(()));
}
