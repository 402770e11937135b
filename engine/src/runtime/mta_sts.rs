//! MTA-STS policies (RFC 8461), on the control thread: announced by TXT, fetched by HTTPS, kept in the spool's folder.
//!
//! A policy that is in force is never given up because something fails: neither the DNS, nor the policy's server, nor
//! our own disk (RFC 8461 §5.1, §10.2). Fetching is bounded in time, size and number, follows no redirect, and goes
//! only where mail may go (`prohibited_hosts`).
//!
//! A policy is a file of its own, named by its domain: a line with the id, a line with the time of its fetch, and the
//! policy as it came. It is written beside and renamed; a crash loses the last fetch at worst.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fmt, fs};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;

use super::aside::aside;
use super::clock::Clock;
use super::dns::{PolicyRecord, Resolver};
use super::tls::{TlsVerifier, server_name};
use crate::deliver::mta_sts::StsPolicy;
use crate::limits::{
    STS_FETCH_PAUSE, STS_FETCH_TIMEOUT, STS_FETCHES_MAX, STS_PAUSES_KEPT, STS_POLICIES_MAX, STS_POLICY_BYTES_MAX,
    STS_REFRESH_AGE,
};

/// The policies that are known. Clones share them.
#[derive(Clone)]
pub(crate) struct PolicyStore(Arc<Inner>);

struct Inner {
    directory: PathBuf,
    clock: Clock,
    resolver: Resolver,
    connector: TlsConnector,
    fetches: Semaphore,
    port: u16,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    policies: HashMap<String, Kept>,
    /// By domain: when a fetch may be tried again, on the monotonic scale.
    pauses: HashMap<String, Duration>,
    /// Who fetches a domain's policy holds its gate; others wait for what comes of it.
    gates: HashMap<String, Arc<tokio::sync::Mutex<()>>>,
}

#[derive(Clone)]
struct Kept {
    id: String,
    fetched_ms: u64,
    policy: Arc<StsPolicy>,
}

impl Kept {
    fn expires_ms(&self) -> u64 {
        self.fetched_ms.saturating_add(self.policy.max_age.as_millis() as u64)
    }
}

impl PolicyStore {
    /// Takes up the policies that an earlier run fetched.
    pub(crate) fn open(
        directory: PathBuf,
        clock: Clock,
        resolver: Resolver,
        verifier: &TlsVerifier,
    ) -> io::Result<Self> {
        Self::open_with_port(directory, clock, resolver, verifier, HTTPS_PORT)
    }

    /// Policies are at port 443, but for tests.
    pub(crate) fn open_with_port(
        directory: PathBuf,
        clock: Clock,
        resolver: Resolver,
        verifier: &TlsVerifier,
        port: u16,
    ) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        let policies = load(&directory, clock.now().wall_ms)?;
        let state = Mutex::new(State { policies, ..State::default() });
        let fetches = Semaphore::new(STS_FETCHES_MAX);
        let connector = TlsConnector::from(verifier.client_config());
        Ok(Self(Arc::new(Inner { directory, clock, resolver, connector, fetches, port, state })))
    }

    /// The policy in force for a domain, fetched now if it is new, and until when that answer is good, on the monotonic
    /// scale.
    pub(crate) async fn find(&self, domain: &str) -> (Option<Arc<StsPolicy>>, Duration) {
        let Some(domain) = file_name(domain) else { return (None, Duration::MAX) };
        let now = self.0.clock.now();
        let PolicyRecord { id, expires } = self.0.resolver.policy_record(now, &domain).await;
        let kept = self.kept(&domain);
        let policy = match (id, kept) {
            (Some(id), Some(kept)) if kept.id == id => {
                let age = Duration::from_millis(now.wall_ms.saturating_sub(kept.fetched_ms));
                // RFC 8461 §3.3: refreshed before they expire; mail need not wait for it.
                if age >= STS_REFRESH_AGE.min(kept.policy.max_age / 2) {
                    let (store, domain, seen_ms) = (self.clone(), domain.clone(), kept.fetched_ms);
                    tokio::spawn(async move { store.fetch(&domain, id, Some(seen_ms)).await });
                }
                Some(kept.policy)
            }
            (Some(id), kept) => self.fetch(&domain, id, None).await.or(kept.map(|kept| kept.policy)),
            // RFC 8461 §5.1: what is not announced any more, or can't be asked for, holds until it expires.
            (None, kept) => kept.map(|kept| kept.policy),
        };
        (policy, expires)
    }

    fn kept(&self, domain: &str) -> Option<Kept> {
        let now_ms = self.0.clock.now().wall_ms;
        let kept = self.state().policies.get(domain)?.clone();
        (kept.expires_ms() > now_ms).then_some(kept)
    }

    /// Fetches, keeps and returns the policy. None: it can't be had now. One that was fetched at `old_ms` is too old;
    /// where many notice that, the first fetches another for all.
    async fn fetch(&self, domain: &str, id: String, old_ms: Option<u64>) -> Option<Arc<StsPolicy>> {
        let gate = Arc::clone(self.state().gates.entry(domain.to_owned()).or_default());
        let policy = {
            let _turn = gate.lock().await;
            match self.kept(domain).filter(|kept| old_ms != Some(kept.fetched_ms) && kept.id == id) {
                Some(kept) => Some(kept.policy),
                None => self.fetch_alone(domain, id).await,
            }
        };
        let mut state = self.state();
        // This one and the map's: nobody else waits.
        if Arc::strong_count(&gate) == 2 {
            state.gates.remove(domain);
        }
        policy
    }

    async fn fetch_alone(&self, domain: &str, id: String) -> Option<Arc<StsPolicy>> {
        let now = self.0.clock.now().monotonic;
        if self.state().pauses.get(domain).is_some_and(|until| *until > now) {
            return None;
        }
        let permit = self.0.fetches.acquire().await;
        let fetched = match tokio::time::timeout(STS_FETCH_TIMEOUT, self.0.get(domain)).await {
            Ok(fetched) => fetched,
            Err(_) => Err(format!("not within {} s", STS_FETCH_TIMEOUT.as_secs())),
        };
        drop(permit);
        let parsed = fetched.and_then(|text| match StsPolicy::parse(&text) {
            Ok(policy) => Ok((text, policy)),
            Err(error) => Err(error.to_string()),
        });
        match parsed {
            Ok((text, policy)) => {
                let policy = Arc::new(policy);
                let kept = Kept { id, fetched_ms: self.0.clock.now().wall_ms, policy: Arc::clone(&policy) };
                self.keep(domain, kept, text).await;
                Some(policy)
            }
            Err(reason) => {
                self.state().pause(domain, self.0.clock.now().monotonic);
                tracing::warn!(domain, reason, "the MTA-STS policy that the domain announces can not be had");
                None
            }
        }
    }

    async fn keep(&self, domain: &str, kept: Kept, text: String) {
        let content = format!("{}\n{}\n{text}", kept.id, kept.fetched_ms);
        let removed = self.state().insert(domain, kept);
        let (directory, file) = (self.0.directory.clone(), domain.to_owned());
        let written = aside("policy", move || {
            if let Some(removed) = removed {
                fs::remove_file(directory.join(removed))?;
            }
            write(&directory, &file, &content)
        });
        let written = match written {
            Ok(written) => written.await.unwrap_or_else(|error| Err(io::Error::other(error))),
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            tracing::warn!(domain, %error, "an MTA-STS policy can not be kept for the next start");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PolicyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyStore {}", self.0.directory.display())
    }
}

impl State {
    /// A fetch has failed: the next is for later (RFC 8461 §3.3).
    fn pause(&mut self, domain: &str, now: Duration) {
        if self.pauses.len() >= STS_PAUSES_KEPT {
            self.pauses.retain(|_, until| *until > now);
        }
        if self.pauses.len() >= STS_PAUSES_KEPT {
            self.pauses.clear();
        }
        self.pauses.insert(domain.to_owned(), now + STS_FETCH_PAUSE);
    }

    /// Returns the domain whose policy made room.
    fn insert(&mut self, domain: &str, kept: Kept) -> Option<String> {
        let full = self.policies.len() >= STS_POLICIES_MAX && !self.policies.contains_key(domain);
        // The one that ends first is the least loss.
        let ends_first = self.policies.iter().min_by_key(|(_, kept)| kept.expires_ms());
        let removed = ends_first.filter(|_| full).map(|(domain, _)| domain.clone());
        if let Some(removed) = &removed {
            self.policies.remove(removed);
        }
        self.policies.insert(domain.to_owned(), kept);
        removed
    }
}

impl Inner {
    /// RFC 8461 §3.3: `https://mta-sts.DOMAIN/.well-known/mta-sts.txt`, with a certificate for that host's name.
    async fn get(&self, domain: &str) -> Result<String, String> {
        let host = format!("mta-sts.{domain}");
        let addresses = self.resolver.policy_host(self.clock.now(), &host, self.port).await?;
        let mut stream = Err(format!("{host} has no address"));
        for address in addresses {
            stream = TcpStream::connect(address).await.map_err(|error| format!("{address}: {error}"));
            if stream.is_ok() {
                break;
            }
        }
        let name = server_name(&host).map_err(|error| error.to_string())?;
        let stream = self.connector.connect(name, stream?).await.map_err(|error| format!("{host}: {error}"))?;
        let failed = |error: hyper::Error| format!("{host}: {error}");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        let connection = tokio::spawn(connection);
        let request = Request::get(WELL_KNOWN).header(HOST, &host).header(USER_AGENT, "postrider");
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(failed)?;
        // RFC 8461 §3.3: redirects are not followed, caches not asked.
        if response.status() != StatusCode::OK {
            return Err(format!("{host} answers {}", response.status()));
        }
        let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("text/plain") {
            return Err(format!("{host} sends {kind:?} instead of text/plain"));
        }
        let body = Limited::new(response.into_body(), STS_POLICY_BYTES_MAX).collect().await;
        connection.abort();
        let body = body.map_err(|error| format!("{host}: {error}"))?.to_bytes();
        String::from_utf8(body.to_vec()).map_err(|_| format!("{host} sends something else than text"))
    }
}

/// A domain's name as a file's: in lower case, of letters, digits, hyphens, underscores and single dots. None: such a
/// domain has no policy, an address literal for example.
fn file_name(domain: &str) -> Option<String> {
    let lower = domain.trim_end_matches('.').to_ascii_lowercase();
    let label = |label: &str| {
        !label.is_empty() && label.bytes().all(|octet| octet.is_ascii_alphanumeric() || b"-_".contains(&octet))
    };
    (lower.len() <= 240 && lower.split('.').all(label)).then_some(lower)
}

fn write(directory: &Path, file: &str, content: &str) -> io::Result<()> {
    let beside = directory.join(format!("{file}~"));
    let mut written = fs::File::create(&beside)?;
    written.write_all(content.as_bytes())?;
    written.sync_all()?;
    fs::rename(&beside, directory.join(file))
}

/// What is no policy, or has expired, is removed.
fn load(directory: &Path, now_ms: u64) -> io::Result<HashMap<String, Kept>> {
    let mut policies = HashMap::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let read = path.file_name().and_then(|name| file_name(name.to_str()?));
        let kept = read.and_then(|domain| Some((domain, read_file(&path)?)));
        match kept {
            Some((domain, kept)) if kept.expires_ms() > now_ms && policies.len() < STS_POLICIES_MAX => {
                policies.insert(domain, kept);
            }
            _ => {
                if let Err(error) = fs::remove_file(&path) {
                    tracing::warn!(file = %path.display(), %error, "no MTA-STS policy, and it can not be removed");
                }
            }
        }
    }
    Ok(policies)
}

fn read_file(path: &Path) -> Option<Kept> {
    let text = fs::read_to_string(path).ok()?;
    let (id, rest) = text.split_once('\n')?;
    let (fetched_ms, policy) = rest.split_once('\n')?;
    let policy = Arc::new(StsPolicy::parse(policy).ok()?);
    Some(Kept { id: id.to_owned(), fetched_ms: fetched_ms.parse().ok()?, policy })
}

const HTTPS_PORT: u16 = 443;
const WELL_KNOWN: &str = "/.well-known/mta-sts.txt";

#[cfg(test)]
#[path = "../../tests/support/policy_server.rs"]
mod policy_server;

#[cfg(test)]
mod tests;
