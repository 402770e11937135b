//! What can go wrong, each with what to check next.

use std::path::PathBuf;
use std::{fmt, io};

use postrider_spool::{MessageId, OpenError};
use serde_json::{Value, json};

/// Why a command did not do what it was asked. Displayed with what to check next.
#[derive(Debug)]
pub(crate) enum Failure {
    Url(String),
    Unreachable {
        url: String,
        cause: ureq::Error,
    },
    Refused {
        status: u16,
        code: String,
        message: String,
    },
    /// The engine's configuration, as it is written now, can't be taken up.
    Configuration(String),
    /// Something answers there, but not as Postrider does.
    Strange {
        url: String,
        status: u16,
    },
    NoSuchQueue(String),
    /// Arguments that don't go together.
    Usage(String),
    /// The spool can't be read at all.
    Spool(OpenError),
    /// The spool was read, but not all of it is there.
    Damage {
        what: String,
        next: &'static str,
    },
    NoSuchMessages(Vec<MessageId>),
    /// A file that was to be written.
    File {
        path: PathBuf,
        error: io::Error,
    },
    Write(io::Error),
}

impl Failure {
    pub(crate) fn is_usage(&self) -> bool {
        matches!(self, Self::Url(_) | Self::Usage(_) | Self::Configuration(_))
    }

    /// What a refusal of `reload` means.
    pub(crate) fn of_reload(self) -> Self {
        match self {
            Self::Refused { status: 409 | 422, message, .. } => Self::Configuration(message),
            other => other,
        }
    }

    /// As the HTTP service tells its errors. The code is what a program may look at.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "error": { "code": self.code(), "message": self.to_string() } })
    }

    fn code(&self) -> &str {
        match self {
            Self::Url(_) | Self::Usage(_) => "usage",
            Self::Unreachable { .. } => "unreachable",
            Self::Refused { code, .. } => code,
            Self::Strange { .. } => "strange",
            Self::NoSuchQueue(_) | Self::NoSuchMessages(_) => "not_found",
            Self::Spool(_) => "spool",
            Self::Damage { .. } => "damage",
            Self::File { .. } | Self::Write(_) => "file",
            Self::Configuration(_) => "configuration",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => write!(f, "--url {url}: write http://HOST:PORT, as in http://127.0.0.1:8025"),
            Self::Unreachable { url, cause } => write!(
                f,
                "no engine answers at {url}: {cause}\n  \
                 Is it running? (`systemctl status postrider`, or start `postrider serve`)\n  \
                 Does its [[listener]] with protocol = \"http\" have this address? Give another with --url or \
                 POSTRIDER_URL."
            ),
            Self::Refused { status: 401, message, .. } => {
                write!(f, "{message}\n  Give the token with --token or POSTRIDER_TOKEN.")
            }
            Self::Refused { status: 403, message, .. } => {
                write!(f, "{message}\n  Run postctl on the engine's machine, or give the listener admin_tokens.")
            }
            Self::Configuration(errors) => {
                write!(f, "the configuration was not taken up; the engine goes on as before\n{errors}")
            }
            Self::Refused { message, .. } => f.write_str(message),
            Self::Strange { url, status } => write!(
                f,
                "{url} answered {status} with something that postctl can't read\n  \
                 Is it a Postrider engine, and as new as this postctl ({})?",
                env!("CARGO_PKG_VERSION")
            ),
            Self::NoSuchQueue(queue) => {
                write!(f, "no mail is in a queue named {queue}; `postctl queue list` shows all")
            }
            Self::Usage(text) => f.write_str(text),
            Self::Spool(OpenError::Locked { path, holder }) => write!(
                f,
                "{}: in use by {}\n  \
                 Ask a running engine by `postctl message show` or `why`; this command reads a spool at rest.",
                path.display(),
                holder.as_deref().unwrap_or("another process")
            ),
            Self::Spool(error) => write!(f, "{error}"),
            Self::Damage { what, next } => write!(f, "damage was found: {what}\n  {next}"),
            Self::NoSuchMessages(ids) => {
                let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "no recipient of {} waits in the spool; if one did, the event log has the outcome",
                    ids.join(", ")
                )
            }
            Self::File { path, error } => write!(f, "{}: {error}", path.display()),
            Self::Write(error) => write!(f, "can't write: {error}"),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}
