//! The engine as a value: start, inject, watch, shut down. Several live in one process.
//!
//! Here is what runs, and how it ends. `start.rs` starts it, `inject.rs` and `campaign.rs` hand mail over, `backend.rs`
//! answers who watches and operates, `reload.rs` takes up another configuration.

mod backend;
mod campaign;
mod inject;
mod listeners;
mod reload;
mod start;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;

use postrider_spool::Spool;
use postrider_spool::record::MessageId;
use tokio::sync::mpsc;

pub use self::campaign::{Campaign, CampaignMessage};
pub use self::inject::{Accepted, InjectError, Message};
pub use self::reload::ReloadError;
use self::reload::{Live, Source};
pub use self::start::EngineBuilder;
use crate::accept::Policy;
use crate::admin::metrics::Metrics;
use crate::admin::{
    Backend, Chosen, Inspected, ListenerStatus, MailChoice, MessageFilter, MessageRow, QueueReport, Status,
    SuspensionEnd, SuspensionRow, TlsReportRow, Unavailable,
};
use crate::mail::address::ascii_domain;
use crate::outcome::event_log::EventStream;
use crate::runtime::clock::Clock;
use crate::runtime::control::{Addresses, Command};
use crate::runtime::event_file::{EventLogHandle, EventSender};
use crate::runtime::heartbeats::Heartbeats;
use crate::runtime::limit_file::LimitMail;
use crate::runtime::mailbox::Sender;
use crate::runtime::progress_file;
use crate::runtime::shard_loop::Mail;

/// A running engine. Dropping it without [`Engine::shutdown`] shuts it down as well, and waits for that.
pub struct Engine {
    shared: Arc<Shared>,
    events: Option<EventLogHandle>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
    addresses: Addresses,
    limits: std::sync::mpsc::Sender<LimitMail>,
    limit_thread: Option<JoinHandle<std::io::Result<()>>>,
    spool: Option<Spool>,
}

struct Shared {
    /// Read by whoever needs it, for a moment; written by one reload at a time.
    live: RwLock<Arc<Live>>,
    policy: Arc<RwLock<Arc<Policy>>>,
    reloading: tokio::sync::Mutex<()>,
    source: Option<Source>,
    addresses: Addresses,
    clock: Clock,
    started_ms: u64,
    node: String,
    shards: Vec<Sender<Mail>>,
    next_shard: AtomicUsize,
    next_campaign: AtomicU64,
    /// Handles that there are.
    campaigns: AtomicUsize,
    commands: mpsc::UnboundedSender<Command>,
    /// No new mail is accepted; what is on the wire is being finished.
    stopping: AtomicBool,
    metrics: Arc<Metrics>,
    heartbeats: Heartbeats,
    listeners: Vec<ListenerStatus>,
    events: EventSender,
}

/// Why an engine could not start; the text says what to do.
#[derive(Debug)]
pub struct StartError(String);

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// Why mail wasn't suspended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SuspendError {
    /// What was asked for can't be; the text says why.
    Refused(String),
    /// The engine does not answer now.
    Unavailable(Unavailable),
}

impl fmt::Display for SuspendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(why) => f.write_str(why),
            Self::Unavailable(unavailable) => unavailable.fmt(f),
        }
    }
}

impl std::error::Error for SuspendError {}

impl From<Unavailable> for SuspendError {
    fn from(unavailable: Unavailable) -> Self {
        Self::Unavailable(unavailable)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine {:?}", self.addresses)
    }
}

impl Engine {
    /// The engine's events from now on.
    pub fn events(&self) -> EventStream {
        self.events.as_ref().expect("the event log runs as long as the engine").subscribe()
    }

    /// Where the listeners are bound; of interest where the configuration says port 0.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Every queued recipient's count by queue, as `GET /api/admin/queues/v1`.
    pub async fn queues(&self, limit: usize) -> Result<QueueReport, Unavailable> {
        self.shared.queues(limit).await
    }

    /// Queued messages, as `GET /api/admin/messages/v1`. An error, too, where more of them would have to be read from
    /// the disk than four seconds allow.
    pub async fn messages(&self, filter: MessageFilter) -> Result<Vec<MessageRow>, Unavailable> {
        self.shared.messages(filter).await
    }

    /// What TLS sessions came to since the start, as `GET /api/admin/tls-report/v1`.
    pub async fn tls_report(&self) -> Result<Vec<TlsReportRow>, Unavailable> {
        self.shared.tls_report().await
    }

    /// The engine at a glance, as `GET /api/admin/status/v1`.
    pub async fn status(&self) -> Result<Status, Unavailable> {
        self.shared.status().await
    }

    /// Whether mail is taken now, and if not, why not, as `GET /api/check-readiness/v1`.
    pub fn readiness(&self) -> Result<(), Unavailable> {
        self.shared.readiness().map_err(Unavailable)
    }

    /// What is suspended now, as `GET /api/admin/suspend-ready-q/v1` and `GET /api/admin/suspend/v1` together.
    pub async fn suspensions(&self) -> Result<Vec<SuspensionRow>, Unavailable> {
        self.shared.suspensions().await
    }

    /// A message that is not finished, as `GET /api/admin/inspect-message/v1`.
    pub async fn inspect(&self, id: MessageId, want_body: bool) -> Result<Option<Inspected>, Unavailable> {
        self.shared.inspect(id, want_body).await
    }

    /// Ends mail as AdminBounce, as `POST /api/admin/bounce/v1`; tells what was chosen, before it has ended.
    pub async fn bounce(&self, choice: MailChoice, reason: &str) -> Result<Chosen, Unavailable> {
        Ok(self.shared.bounce(choice, reason.to_owned()).await?.1)
    }

    /// Tries again, of what is chosen, what is held as in doubt, as `POST /api/admin/release/v1`.
    pub async fn release(&self, choice: MailChoice, reason: &str) -> Result<Chosen, Unavailable> {
        self.shared.release(choice, reason.to_owned()).await
    }

    /// Stops mail for a while, as `POST /api/admin/suspend/v1` and `POST /api/admin/suspend-ready-q/v1`: what all parts
    /// match that `what` has. Its id, its limits and its end count for nothing: they are made here.
    ///
    /// Tells the id, which [`Engine::resume`] wants. An error where no part is given, which would stop all mail, where
    /// there is no such source, or where `end` is not ahead, or by more than a year.
    pub async fn suspend(&self, mut what: SuspensionRow, end: SuspensionEnd) -> Result<String, SuspendError> {
        let SuspensionRow { egress_source, site, tenant, campaign, domain, .. } = &mut what;
        if [&egress_source, &site, &tenant, &campaign, &domain].iter().all(|part| part.is_none()) {
            return Err(SuspendError::Refused("nothing is named; all mail would stop".to_owned()));
        }
        *domain = domain.take().map(|domain| ascii_domain(&domain.to_lowercase()).into_owned());
        self.shared.suspend(what, end).await?.map_err(SuspendError::Refused)
    }

    /// Ends a suspension, or limits that a rule has set, before their time. False: there is none with this id.
    pub async fn resume(&self, id: &str) -> Result<bool, Unavailable> {
        self.shared.resume(id.to_owned()).await
    }

    /// Stops accepting, finishes what is on the wire within `shutdown_grace`, commits, and ends all threads.
    pub fn shutdown(mut self) -> Result<(), StartError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), StartError> {
        if self.threads.is_empty() {
            return Ok(());
        }
        let grace = self.shared.config().shutdown_grace;
        self.shared.stopping.store(true, Ordering::Relaxed);
        // The control thread is there until its shards have ended.
        let _ = self.shared.commands.send(Command::Shutdown { grace });
        let mut result = Ok(());
        let mut join = |thread: JoinHandle<std::io::Result<()>>| match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => result = Err(StartError(format!("a thread failed: {error}"))),
            Err(_) => result = Err(StartError("a thread panicked".to_owned())),
        };
        self.threads.drain(..).for_each(&mut join);
        // Shards that have ended ask for nothing, and use nothing more of what they have left.
        let _ = self.limits.send(LimitMail::Stop);
        self.limit_thread.take().into_iter().for_each(join);
        if let Some(events) = self.events.take() {
            events.shutdown().map_err(|error| StartError(format!("event log: {error}")))?;
        }
        if result.is_ok()
            && let Err(error) = progress_file::forget_suspects(&self.shared.config().spool.path)
        {
            tracing::debug!(%error, "the file of progress stays as it is");
        }
        self.spool = None;
        result
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "the engine did not end cleanly");
        }
    }
}
