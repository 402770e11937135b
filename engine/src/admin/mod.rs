//! What operators see and ask, on the control thread: HTTP calls, metrics, log lines.
//!
//! `http_admin` serves; what it tells it asks of a [`Backend`], which the engine implements over its shards. Of the
//! calls only those of `http_suspend`, `http_bounce` and `http_reload` change anything in the engine. They are
//! described for users in `engine/docs/http-api.md` and for programs in `openapi.json` beside this file.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use postrider_spool::record::MessageId;
use serde::Serialize;

use crate::config::Changes;
use crate::engine::ReloadError;
use crate::limits::HTTP_ROWS_DEFAULT;
use crate::mail::queue_name::QueueName;

pub use crate::outcome::event::WallTime;
pub use crate::outcome::tls_report::TlsReportRow;

pub mod http_admin;
mod http_bounce;
mod http_connection;
mod http_crowd;
mod http_inspect;
mod http_reload;
mod http_suspend;
pub mod log;
pub mod metrics;

/// An answer that takes a hop over the shards.
pub type Reply<'a, T> = Pin<Box<dyn Future<Output = Result<T, Unavailable>> + Send + 'a>>;

/// Why the engine can't answer now; told as 503. Safe to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable(pub String);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

/// Whom the HTTP service asks. Its replies are given up after `HTTP_BACKEND_TIMEOUT`, so they must be safe to drop.
pub trait Backend: Send + Sync + 'static {
    /// At most `limit` queues, those with most recipients first.
    fn queues(&self, limit: usize) -> Reply<'_, QueueReport>;
    /// The rows that pass every part of the filter, at most `filter.limit`.
    fn messages(&self, filter: MessageFilter) -> Reply<'_, Vec<MessageRow>>;
    /// What TLS sessions came to since the start, by policy, sorted.
    fn tls_report(&self) -> Reply<'_, Vec<TlsReportRow>>;
    fn status(&self) -> Reply<'_, Status>;
    fn suspensions(&self) -> Reply<'_, Vec<SuspensionRow>>;
    /// Puts a suspension in force; its id and its end are made here. Returns the id, or what is wrong with it.
    fn suspend(&self, suspension: SuspensionRow, end: SuspensionEnd) -> Reply<'_, Result<String, String>>;
    /// Whether the configuration has a tenant of this name.
    fn has_tenant(&self, name: &str) -> bool;
    /// Ends a suspension. False: there is none with this id.
    fn resume(&self, id: String) -> Reply<'_, bool>;
    /// A message that is not finished; None: there is none with this id.
    fn inspect(&self, id: MessageId, want_body: bool) -> Reply<'_, Option<Inspected>>;
    /// Ends mail as AdminBounce. Tells the bounce's id, and what was chosen, before it has ended.
    fn bounce(&self, choice: MailChoice, reason: String) -> Reply<'_, (String, Chosen)>;
    /// Tries again, of what is chosen, what is held as in doubt.
    fn release(&self, choice: MailChoice, reason: String) -> Reply<'_, Chosen>;
    /// Takes up the configuration as it is written now.
    fn reload(&self) -> Reply<'_, Result<Reloaded, ReloadError>>;
    /// Whether mail is taken. Looks at flags only.
    fn readiness(&self) -> Result<(), String>;
    /// Whether a restart would not help. Looks at flags only.
    fn liveness(&self) -> Result<(), String>;
}

/// Which recipients to show. A part that is None lets all pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MessageFilter {
    pub id: Option<MessageId>,
    /// Its domain is in lower case.
    pub recipient: Option<String>,
    pub tenant: Option<String>,
    /// The Message-ID field, without angle brackets.
    pub message_id: Option<String>,
    pub limit: usize,
}

impl Default for MessageFilter {
    /// All mail, and as many rows as the HTTP service tells without being asked for more.
    fn default() -> Self {
        Self { id: None, recipient: None, tenant: None, message_id: None, limit: HTTP_ROWS_DEFAULT }
    }
}

/// A message as it lies in the spool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspected {
    pub sender: String,
    /// Those that are not finished.
    pub recipients: Vec<String>,
    pub tenant: String,
    pub campaign: String,
    pub egress_pool: String,
    pub num_attempts: u32,
    pub due: WallTime,
    /// As it is sent, header fields that were put in front included; the first part of one that is very long.
    pub data: Option<Vec<u8>>,
}

/// Which mail an operator means: what all parts fit. A part that is None, or empty, fits all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MailChoice {
    pub message: Option<MessageId>,
    pub tenant: Option<String>,
    pub campaign: Option<String>,
    /// In lower case.
    pub domain: Option<String>,
    /// Names as queues have them.
    pub queues: Vec<String>,
    /// Only what is held as in doubt.
    pub held: bool,
}

/// For the log.
impl fmt::Display for MailChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { message, tenant, campaign, domain, queues, held } = self;
        let named = [("tenant", tenant), ("campaign", campaign), ("domain", domain)];
        let named = named.into_iter().filter_map(|(name, value)| Some(format!("{name} {}", value.as_ref()?)));
        let parts = message.iter().map(|message| format!("message {message}")).chain(named);
        let parts: Vec<String> = parts.chain(queues.iter().map(|queue| format!("queue {queue}"))).collect();
        let whose = if parts.is_empty() { "all mail".to_owned() } else { parts.join(", ") };
        write!(f, "{whose}{}", if *held { ", as far as it is held" } else { "" })
    }
}

impl MailChoice {
    /// Whether mail of this queue is meant, as far as its queue tells.
    pub fn fits(&self, queue: QueueName<'_>) -> bool {
        let fits = |part: &Option<String>, text: &str| part.as_deref().is_none_or(|part| part == text);
        fits(&self.tenant, queue.tenant)
            && fits(&self.campaign, queue.campaign)
            && fits(&self.domain, queue.domain)
            && (self.queues.is_empty() || self.queues.contains(&queue.to_string()))
    }
}

/// What was chosen: recipients by queue.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    pub recipients: BTreeMap<String, u64>,
}

impl Chosen {
    pub fn total(&self) -> u64 {
        self.recipients.values().sum()
    }
}

/// The queues that hold mail.
#[derive(Debug, Clone, Default, Serialize)]
pub struct QueueReport {
    /// Recipients over all queues, those not listed included.
    pub total: u64,
    pub queues: Vec<QueueRow>,
}

/// A scheduled queue on its way to one site from one source.
#[derive(Debug, Clone, Default, Serialize)]
pub struct QueueRow {
    pub queue: String,
    pub domain: String,
    pub tenant: Option<String>,
    pub campaign: Option<String>,
    pub site: Option<String>,
    pub egress_source: Option<String>,
    /// Recipients not yet finished.
    pub depth: u64,
    /// Of these, those that are due.
    pub ready: u64,
    /// Recipients delivered each second, lately.
    pub rate_per_s: f64,
    pub next_due: Option<WallTime>,
    /// `CODE X.Y.Z text`, see [`answer_text`].
    pub last_answer: Option<String>,
}

/// One recipient of a message that is not finished.
#[derive(Debug, Clone, Serialize)]
pub struct MessageRow {
    pub id: String,
    pub recipient: String,
    pub queue: String,
    /// Attempts made.
    pub num_attempts: u32,
    /// When it will be tried next; None while it is being tried.
    pub due: Option<WallTime>,
    /// `CODE X.Y.Z text`, see [`answer_text`].
    pub last_answer: Option<String>,
    /// Why it does not go although it is due, and until when, in words.
    pub blocked_by: Option<String>,
    pub state: MessageState,
    pub sender: String,
    pub created: WallTime,
    /// When it ends as Expiration.
    pub expires: WallTime,
    pub size: u64,
    pub tenant: Option<String>,
    pub campaign: Option<String>,
    pub site: Option<String>,
    pub egress_source: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MessageState {
    /// Waits for its due time.
    Scheduled,
    /// Is due and waits for a connection.
    Ready,
    /// Is with a connection.
    Delivering,
    /// Waits for the operator.
    Held,
}

/// What must not be sent for a while. A part that is None lets all pass: the suspension stops what all parts match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SuspensionRow {
    /// A UUID.
    pub id: String,
    pub egress_source: Option<String>,
    /// The site's name; a provider's, where one rolls it up.
    pub site: Option<String>,
    pub tenant: Option<String>,
    pub campaign: Option<String>,
    pub domain: Option<String>,
    /// It stops nothing, but a rule has set these limits for the source at the site.
    pub limits: Option<LimitsRow>,
    pub reason: String,
    pub until: WallTime,
    /// The same, from now on.
    pub left: Duration,
}

/// Limits as they are in force now; one that is None is as configured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LimitsRow {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_limit: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_deliveries_per_connection: Option<u32>,
    /// As in the configuration: `30/min`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_message_rate: Option<String>,
}

/// When a suspension ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SuspensionEnd {
    After(Duration),
    At(WallTime),
}

/// The engine at a glance.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    pub version: String,
    pub hostname: String,
    pub node_id: String,
    pub started: WallTime,
    pub uptime_s: u64,
    pub shards: u32,
    pub listeners: Vec<ListenerStatus>,
    pub spool: SpoolStatus,
    pub events: EventsStatus,
    /// Messages in the spool that have a recipient left.
    pub messages: u64,
    /// Recipients left.
    pub recipients: u64,
    pub connections_in: u64,
    pub connections_out: u64,
    /// Messages accepted since the start.
    pub received: u64,
    /// Recipients since the start.
    pub delivered: u64,
    pub deferred: u64,
    pub failed: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct ListenerStatus {
    pub protocol: String,
    /// As bound, so never with port 0.
    pub address: String,
}

#[derive(Debug, Clone, Serialize)]
pub struct SpoolStatus {
    pub path: String,
    pub durability: String,
    pub used_bytes: u64,
    pub max_bytes: u64,
    /// Takes mail.
    pub open: bool,
    pub closed_reason: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct EventsStatus {
    pub path: String,
    /// Why events can't be written.
    pub blocked: Option<String>,
}

/// A configuration that is in force, and what it has changed of the one before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reloaded {
    #[serde(flatten)]
    pub changes: Changes,
    pub since: WallTime,
}

/// An answer as operators read it: `451 4.2.0 text`. Empty where there was none.
pub fn answer_text(code: u16, enhanced: Option<(u8, u16, u16)>, text: &str) -> String {
    match (code, enhanced) {
        (0, _) => text.to_owned(),
        (code, None) => format!("{code} {text}").trim_end().to_owned(),
        (code, Some((class, subject, detail))) => {
            format!("{code} {class}.{subject}.{detail} {text}").trim_end().to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_read_as_on_the_wire() {
        assert_eq!(answer_text(451, Some((4, 2, 0)), "later"), "451 4.2.0 later");
        assert_eq!(answer_text(451, None, "later"), "451 later");
        assert_eq!(answer_text(451, None, ""), "451");
        assert_eq!(answer_text(0, None, "connection refused"), "connection refused");
    }

    #[test]
    fn what_an_operator_chooses_is_told_in_words() {
        let all = MailChoice::default();
        let held = MailChoice { tenant: Some("acme".to_owned()), held: true, ..all.clone() };
        let queues = vec!["example.org".to_owned()];
        let some = MailChoice { domain: Some("example.net".to_owned()), queues, ..all.clone() };
        assert_eq!(all.to_string(), "all mail");
        assert_eq!(held.to_string(), "tenant acme, as far as it is held");
        assert_eq!(some.to_string(), "domain example.net, queue example.org");
    }
}
