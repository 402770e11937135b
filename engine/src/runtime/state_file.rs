//! A small file of the engine's own state in the spool's directory, replaced as a whole.
//!
//! A new version is written beside the old one, synced, and renamed over it, so that a crash leaves one of the two. For
//! state that is short and seldom changes: what is big or changes with each message belongs into the spool's logs.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use crate::limits::STATE_FILE_BYTES_MAX;

#[derive(Debug, Clone)]
pub(crate) struct StateFile {
    path: PathBuf,
}

impl StateFile {
    pub(crate) fn new(directory: &Path, name: &str) -> Self {
        Self { path: directory.join(name) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// None: it was never written.
    pub(crate) fn read(&self) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(STATE_FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > STATE_FILE_BYTES_MAX {
            return Err(io::Error::other(format!("it is larger than {STATE_FILE_BYTES_MAX} bytes")));
        }
        Ok(Some(bytes))
    }

    /// When this returns `Ok`, the new content is what a restart reads.
    pub(crate) fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() as u64 > STATE_FILE_BYTES_MAX {
            return Err(io::Error::other(format!("the state takes more than {STATE_FILE_BYTES_MAX} bytes")));
        }
        let unfinished = self.path.with_added_extension("new");
        let mut file = File::create(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, &self.path)?;
        let directory = self.path.parent().unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_content_is_read_whatever_a_crash_left() {
        let directory = tempfile::tempdir().unwrap();
        let file = StateFile::new(directory.path(), "state.json");
        assert_eq!(file.read().unwrap(), None);
        file.replace(b"one").unwrap();
        file.replace(b"two").unwrap();
        // A crash in the middle of the next write.
        fs::write(directory.path().join("state.json.new"), b"thr").unwrap();
        assert_eq!(file.read().unwrap().as_deref(), Some(&b"two"[..]));
        file.replace(b"three").unwrap();
        assert_eq!(StateFile::new(directory.path(), "state.json").read().unwrap().as_deref(), Some(&b"three"[..]));
        let left: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["state.json"]);
    }

    #[test]
    fn it_stays_small() {
        let directory = tempfile::tempdir().unwrap();
        let file = StateFile::new(directory.path(), "state.json");
        let most = vec![b'x'; STATE_FILE_BYTES_MAX as usize];
        file.replace(&most).unwrap();
        assert_eq!(file.read().unwrap().map(|bytes| bytes.len()), Some(most.len()));
        file.replace(&[&most[..], b"x"].concat()).unwrap_err();
        fs::write(file.path(), [&most[..], b"x"].concat()).unwrap();
        file.read().unwrap_err();
    }
}
