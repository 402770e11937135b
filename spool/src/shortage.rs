//! A file that a log needs could not be made: why, and when it is tried again.
//!
//! It lasts from the first failure until a file could be made, or none is needed any more; so what it tells doesn't
//! change while another try is under way. See also `retire.rs` and `checkpoint.rs`.

use std::io;
use std::time::Duration;

use crate::error::Closed;

#[derive(Debug, Default)]
pub(crate) struct Shortage {
    failed: Option<Failed>,
    /// The last failure's cause, until a file could be made: a log that can't be written is opened again and again, and
    /// wants a file each time.
    told: Option<Cause>,
}

#[derive(Debug)]
struct Failed {
    retry_at: Duration,
    closed: Closed,
}

type Cause = (io::ErrorKind, Option<i32>);

impl Shortage {
    /// Notes a failure. Whether it is another than the last one, or the first since a file could be made.
    pub(crate) fn note(&mut self, retry_at: Duration, error: &io::Error) -> bool {
        let closed = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Closed::NoSpace,
            _ => Closed::NoFile,
        };
        self.failed = Some(Failed { retry_at, closed });
        let cause = (error.kind(), error.raw_os_error());
        self.told.replace(cause) != Some(cause)
    }

    /// No file is wanted any more.
    pub(crate) fn end(&mut self) {
        self.failed = None;
    }

    /// One could be made.
    pub(crate) fn made(&mut self) {
        (self.failed, self.told) = (None, None);
    }

    /// When it is tried again; none before.
    pub(crate) fn retry_at(&self) -> Option<Duration> {
        self.failed.as_ref().map(|failed| failed.retry_at)
    }

    /// Why there is no such file.
    pub(crate) fn closed(&self) -> Option<Closed> {
        self.failed.as_ref().map(|failed| failed.closed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_want_of_space_is_told_as_such() {
        let now = Duration::from_secs(1);
        let mut shortage = Shortage::default();
        assert_eq!((shortage.closed(), shortage.retry_at()), (None, None));
        let told = [libc::ENOSPC, libc::ENOSPC, libc::EDQUOT, libc::EMFILE, libc::ENFILE, libc::ENOMEM].map(|code| {
            let is_news = shortage.note(now, &io::Error::from_raw_os_error(code));
            (is_news, shortage.closed())
        });
        let (space, file) = (Some(Closed::NoSpace), Some(Closed::NoFile));
        assert_eq!(told, [(true, space), (false, space), (true, space), (true, file), (true, file), (true, file)]);
        assert_eq!(shortage.retry_at(), Some(now));
        shortage.end();
        assert_eq!((shortage.closed(), shortage.retry_at()), (None, None));
    }

    /// A log on a file system that had turned read-only told it with each try to open it.
    #[test]
    fn what_lasts_is_told_once() {
        let mut shortage = Shortage::default();
        let read_only = io::Error::from_raw_os_error(libc::EROFS);
        assert!(shortage.note(Duration::ZERO, &read_only));
        shortage.end();
        assert!(!shortage.note(Duration::ZERO, &read_only));
        shortage.made();
        assert!(shortage.note(Duration::ZERO, &read_only));
    }
}
