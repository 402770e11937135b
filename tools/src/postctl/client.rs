//! One question to the engine, and what can go wrong with it.

use std::fmt;
use std::io;
use std::time::Duration;

use serde_json::Value;

/// Where the engine answers and as whom we ask.
pub(crate) struct Client {
    agent: ureq::Agent,
    /// Without a slash at its end.
    url: String,
    token: Option<String>,
}

impl Client {
    pub(crate) fn new(url: &str, token: Option<String>) -> Result<Self, Failure> {
        let url = url.trim_end_matches('/').to_owned();
        let host = url.strip_prefix("http://").ok_or_else(|| Failure::Url(url.clone()))?;
        if host.is_empty() || host.contains(['/', '?', '#', ' ']) {
            return Err(Failure::Url(url));
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            // The engine is asked directly, whatever proxies the shell has for the web.
            .proxy(None)
            .max_redirects(0)
            .user_agent(concat!("postctl/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { agent: config.into(), url, token })
    }

    /// GETs `path`; each `query` value is percent-encoded.
    pub(crate) fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, Failure> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        for (name, value) in query {
            request = request.query(name, value);
        }
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let unreachable = |cause| Failure::Unreachable { url: self.url.clone(), cause };
        let mut response = request.call().map_err(unreachable)?;
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string().map_err(unreachable)?;
        let strange = || Failure::Strange { url: self.url.clone(), status };
        let body: Value = serde_json::from_str(&text).map_err(|_| strange())?;
        if status == 200 {
            return Ok(body);
        }
        let message = body["error"]["message"].as_str().ok_or_else(strange)?.to_owned();
        Err(Failure::Refused { status, message })
    }

    pub(crate) fn strange(&self) -> Failure {
        Failure::Strange { url: self.url.clone(), status: 200 }
    }
}

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
        message: String,
    },
    /// Something answers there, but not as Postrider does.
    Strange {
        url: String,
        status: u16,
    },
    NoSuchQueue(String),
    Write(io::Error),
}

impl Failure {
    pub(crate) fn is_usage(&self) -> bool {
        matches!(self, Self::Url(_))
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
            Self::Refused { status: 401, message } => {
                write!(f, "{message}\n  Give the token with --token or POSTRIDER_TOKEN.")
            }
            Self::Refused { status: 403, message } => {
                write!(f, "{message}\n  Run postctl on the engine's machine, or give the listener admin_tokens.")
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
            Self::Write(error) => write!(f, "can't write: {error}"),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

/// The engine gives up its own questions after 5 s.
const PATIENCE: Duration = Duration::from_secs(20);
/// 10,000 rows, each with an answer of 4 KiB.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
