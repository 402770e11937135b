//! Whether the spool's directory is still where the configuration says. What goes into one that was removed, moved away
//! or mounted over is durable, but no next start finds it.
//!
//! The disk may not answer: who looks does not wait for it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::aside::aside;

pub(crate) struct SpoolPlace {
    /// The file that the engine holds the spool's lock on, and which one it was at the start.
    lock: PathBuf,
    identity: Option<(u64, u64)>,
    looking: Option<oneshot::Receiver<Option<bool>>>,
    is_gone: bool,
}

impl SpoolPlace {
    pub(crate) fn new(directory: &Path) -> Self {
        let lock = directory.join("LOCK");
        Self { identity: identity(&lock).ok(), lock, looking: None, is_gone: false }
    }

    /// Looks once more, and tells what was found the time before, if that is news: whether it is gone. To be called
    /// every few seconds.
    pub(crate) fn look(&mut self) -> Option<bool> {
        let found = match self.looking.as_mut().map(oneshot::Receiver::try_recv) {
            Some(Err(TryRecvError::Empty)) => return None,
            Some(Ok(found)) => found,
            Some(Err(TryRecvError::Closed)) | None => None,
        };
        let (lock, known) = (self.lock.clone(), self.identity);
        // Without a thread it looks the next time.
        self.looking = aside("spool place", move || is_gone(&lock, known)).ok();
        found.filter(|&is_gone| std::mem::replace(&mut self.is_gone, is_gone) != is_gone)
    }
}

/// None: nobody can tell.
fn is_gone(lock: &Path, known: Option<(u64, u64)>) -> Option<bool> {
    match identity(lock) {
        Ok(found) => known.map(|known| known != found),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Some(true),
        Err(_) => None,
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_moved_replaced_or_removed_is_gone() {
        let around = tempfile::tempdir().unwrap();
        let [spool, away] = ["spool", "away"].map(|name| around.path().join(name));
        fs::create_dir(&spool).unwrap();
        fs::write(spool.join("LOCK"), b"").unwrap();
        let SpoolPlace { lock, identity, .. } = SpoolPlace::new(&spool);
        assert_eq!(is_gone(&lock, identity), Some(false));
        fs::rename(&spool, &away).unwrap();
        assert_eq!(is_gone(&lock, identity), Some(true));
        fs::create_dir(&spool).unwrap();
        fs::write(spool.join("LOCK"), b"").unwrap();
        assert_eq!(is_gone(&lock, identity), Some(true), "another has its name");
        fs::remove_dir_all(&spool).unwrap();
        fs::write(&spool, b"").unwrap();
        assert_eq!(is_gone(&lock, identity), Some(true));
        fs::remove_file(&spool).unwrap();
        fs::rename(&away, &spool).unwrap();
        assert_eq!(is_gone(&lock, identity), Some(false));
    }

    #[test]
    fn news_is_told_once() {
        let around = tempfile::tempdir().unwrap();
        let lock = around.path().join("LOCK");
        fs::write(&lock, b"").unwrap();
        let mut place = SpoolPlace::new(around.path());
        assert_eq!(next(&mut place), None);
        fs::remove_file(&lock).unwrap();
        let mut told = Vec::new();
        for _ in 0..4 {
            told.extend(next(&mut place));
        }
        assert_eq!(told, [true]);
    }

    /// What a look that has ended by the next one tells.
    fn next(place: &mut SpoolPlace) -> Option<bool> {
        let told = place.look();
        while place.looking.as_ref().is_some_and(oneshot::Receiver::is_empty) {
            std::thread::yield_now();
        }
        told
    }
}
