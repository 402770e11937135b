//! What can go wrong, each with its cause and, where there is one, the next step.

use std::path::PathBuf;
use std::{error, fmt, io};

use crate::record::LogId;

/// The spool directory can't be opened.
#[derive(Debug)]
pub enum OpenError {
    /// Another process holds the lock at this path.
    Locked {
        path: PathBuf,
        /// Who, as far as it is known.
        holder: Option<String>,
    },
    /// Written by a newer version of this program.
    NewerVersion {
        path: PathBuf,
        found: u16,
        known: u16,
    },
    /// The meta file is damaged, or missing beside existing logs.
    Meta {
        path: PathBuf,
        reason: &'static str,
    },
    /// There is nothing to inspect in this place.
    NothingThere {
        path: PathBuf,
        reason: &'static str,
    },
    /// Somebody opened the spool while it was inspected, so that what was found may be wrong.
    Disturbed {
        path: PathBuf,
    },
    /// An option makes no sense.
    Option {
        reason: String,
    },
    /// No log id is left; each is used once.
    LogIdsExhausted,
    Io {
        path: PathBuf,
        error: io::Error,
    },
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked { path, holder } => {
                let holder = holder.as_deref().unwrap_or("another process");
                write!(f, "{}: in use by {holder}; stop it, or choose another spool.path", path.display())
            }
            Self::NewerVersion { path, found, known } => write!(
                f,
                "{}: format version {found} is newer than {known}, the newest that this program knows; \
                 use the program that wrote it",
                path.display()
            ),
            Self::Meta { path, reason } | Self::NothingThere { path, reason } => {
                write!(f, "{}: {reason}", path.display())
            }
            Self::Disturbed { path } => write!(
                f,
                "{}: opened by another process meanwhile; what was found may be wrong, so look again while nobody \
                 uses the spool",
                path.display()
            ),
            Self::Option { reason } => f.write_str(reason),
            Self::LogIdsExhausted => f.write_str("all 65536 log ids of this spool have been used; start a new spool"),
            Self::Io { path, error } => write!(f, "{}: {error}{}", path.display(), remedy(error)),
        }
    }
}

impl error::Error for OpenError {}

/// A log can't be recovered. Damage is no such reason: it is reported and worked around.
#[derive(Debug)]
pub enum RecoverError {
    NewerVersion {
        path: PathBuf,
        found: u16,
        known: u16,
    },
    /// A segment of another log, put here by hand.
    ForeignSegment {
        path: PathBuf,
        log: LogId,
    },
    Io {
        path: PathBuf,
        error: io::Error,
    },
}

impl fmt::Display for RecoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NewerVersion { path, found, known } => write!(
                f,
                "{}: format version {found} is newer than {known}, the newest that this program knows; \
                 use the program that wrote it",
                path.display()
            ),
            Self::ForeignSegment { path, log } => {
                write!(f, "{}: belongs to log {}; move it back to its own directory", path.display(), log.0)
            }
            Self::Io { path, error } => write!(f, "{}: {error}{}", path.display(), remedy(error)),
        }
    }
}

impl error::Error for RecoverError {}

/// What to do about the failure that an operator meets first.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "; run this as the spool's owner, or give the directory to the user it runs as"
        }
        _ => "",
    }
}

/// A record was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AppendError {
    /// No room now; it recovers by itself.
    Full(Closed),
    /// A write failed; nothing is taken until the log is reopened.
    Failed,
    /// It fits into no segment.
    TooLarge { bytes: u64, bytes_max: u64 },
    /// The body to share is not in this log, or nobody holds it any more.
    UnknownBody,
}

impl fmt::Display for AppendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(closed) => write!(f, "{closed}"),
            Self::Failed => f.write_str("a write to the spool failed"),
            Self::TooLarge { bytes, bytes_max } => {
                write!(f, "a record of {bytes} bytes is larger than a segment holds ({bytes_max} bytes)")
            }
            Self::UnknownBody => f.write_str("the body to share is not there any more"),
        }
    }
}

impl error::Error for AppendError {}

/// Why a log takes no mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Closed {
    /// The spool holds as much as it may.
    MaxSize,
    /// The device has no room for another segment, or the log has as many as it can name.
    NoSpace,
    /// A file that the log needs can't be made, and not for want of space: [`crate::Progress::NotMade`] says why.
    NoFile,
    /// Segments were filled faster than others are made ready; some are being made ready.
    Preparing,
    /// More waits for its commit than may.
    Backlog,
    /// A write failed, and the log has not been reopened yet.
    Failed,
    /// The log has no shard of its own and only drains.
    Draining,
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MaxSize => "the spool has reached its maximum size",
            Self::NoSpace => "no space left for the spool",
            Self::NoFile => "a file of the spool can't be made",
            Self::Preparing => "room in the spool is being made ready",
            Self::Backlog => "the spool's disk does not keep up",
            Self::Failed => "a write to the spool failed",
            Self::Draining => "the log drains and takes no mail",
        })
    }
}

/// A message can't be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadError {
    /// Not a live message of this log.
    Unknown,
    /// Its commit is not durable yet.
    NotDurable,
    /// As many reads as may be are under way, or as many bytes of read messages are in use. It is to be asked for again
    /// later.
    Busy,
    /// Its bytes on disk are not what was written.
    Damaged {
        what: &'static str,
    },
    Io {
        kind: io::ErrorKind,
        message: String,
    },
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("no such message in this log"),
            Self::NotDurable => f.write_str("the message is not durable yet"),
            Self::Busy => f.write_str("too many reads are under way"),
            Self::Damaged { what } => write!(f, "the message is damaged on disk: {what}"),
            Self::Io { message, .. } => write!(f, "the message can't be read: {message}"),
        }
    }
}

impl error::Error for ReadError {}

impl From<&io::Error> for ReadError {
    fn from(error: &io::Error) -> Self {
        Self::Io { kind: error.kind(), message: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_not_be_opened_says_what_to_do() {
        let open = |kind: io::ErrorKind| OpenError::Io { path: "/s/LOCK".into(), error: kind.into() }.to_string();
        assert_eq!(
            open(io::ErrorKind::PermissionDenied),
            "/s/LOCK: permission denied; run this as the spool's owner, or give the directory to the user it runs as"
        );
        assert_eq!(open(io::ErrorKind::StorageFull), "/s/LOCK: no storage space");
    }
}
