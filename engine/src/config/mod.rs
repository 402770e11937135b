//! Configuration: text → checked [`Config`], at start and again for each reload.
//!
//! [`Config`] is what the rest of the engine sees: every default filled in, every name resolved, every file read.
//!
//! Over 500 lines: all that a configuration says is found in one place, as the engine has it.
#![expect(clippy::disallowed_methods, reason = "reads its files before anything goes by them, off the shards")]

mod align;
mod automation;
mod change;
mod default;
mod describe;
mod dkim;
mod document;
mod egress;
mod error;
mod filesystem;
mod include;
mod limit;
mod listener;
mod load;
mod rate;
mod reader;
mod retry;
mod route;
mod route_index;
mod route_match;
mod shaping;
mod shipped;
mod tenant;
mod tls;
mod value;
mod warmup;
mod whole;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

pub use crate::mail::endpoint::UnixPath;
pub use automation::{AutomationAction, AutomationRule, HalvedLimits, LimitSettings, Threshold};
pub use change::Changes;
pub use describe::describe;
pub use error::{ConfigError, ConfigErrors};
pub use filesystem::Filesystem;
pub use limit::{LimitId, SharedLimits, Subject};
pub use rate::Rate;
pub(crate) use route_index::RouteIndex;
pub use route_match::{MatchedRoute, RouteMatch, RoutedMail, Wildcard};
pub use shaping::Settings;
pub use shipped::SHIPPED_PROVIDERS;

/// A checked configuration. [`Config::default`] is what `postrider serve` runs without a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub hostname: String,
    /// None: one per allowed CPU.
    pub shards: Option<usize>,
    /// Whether each shard's thread is pinned to its CPU.
    pub pin: bool,
    pub spool: SpoolConfig,
    pub smtp_listeners: Vec<SmtpListener>,
    pub http_listeners: Vec<HttpListener>,
    pub dns: DnsConfig,
    pub tls: TlsConfig,
    pub routes: Vec<Route>,
    /// Never empty: without any configured, one unbound source named "unspecified".
    pub egress_sources: Vec<EgressSource>,
    /// Never without a pool named "default"; without one configured, all of the unbound source.
    pub egress_pools: Vec<EgressPool>,
    /// One a source.
    pub warmups: Vec<Warmup>,
    pub tenants: Vec<Tenant>,
    pub limits: Vec<Limit>,
    /// Domains that every tenant may use in MAIL FROM, those below included.
    pub return_path_domains: Vec<String>,
    pub dkim: Vec<DkimIdentity>,
    pub retry: RetryConfig,
    /// What holds where no rule says otherwise.
    pub shaping: Shaping,
    pub shaping_rules: ShapingRules,
    pub events: EventsConfig,
    pub shutdown_grace: Duration,
    /// Whether `X-Postrider-Ref` is added.
    pub feedback_reference: bool,
    /// What `check` has to tell of how it was read. Nothing else goes by it.
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct SpoolConfig {
    pub path: PathBuf,
    pub durability: Durability,
    pub max_size_bytes: u64,
    pub allow_filesystem: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    Fsync,
    /// Written, not synced: a crash of the machine loses mail. For benchmarks.
    None,
}

#[derive(Debug, Clone, PartialEq)]
pub struct SmtpListener {
    pub address: SocketAddr,
    pub relay_from: Vec<IpNet>,
    /// May give X-Tenant and the like; default: `relay_from`.
    pub trusted_hosts: Vec<IpNet>,
    pub max_message_bytes: u64,
    pub line_endings: LineEndings,
    pub received: ReceivedDetail,
    /// PEM files that were readable and fit together at check; None: STARTTLS is not offered.
    pub tls: Option<ListenerTls>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ListenerTls {
    pub certificate_pem: Arc<Vec<u8>>,
    pub key_pem: Arc<Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineEndings {
    /// A bare CR or LF in content becomes CRLF.
    Fix,
    /// A bare CR or LF in content is answered 554 5.6.0.
    Reject,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceivedDetail {
    Full,
    NoClient,
    None,
}

#[derive(Debug, Clone, PartialEq)]
pub struct HttpListener {
    pub address: SocketAddr,
    /// Lower-case hexadecimal SHA-256 of each token. Empty: only loopback clients are served.
    pub admin_token_sha256: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct DnsConfig {
    /// Empty: the system's resolvers.
    pub servers: Vec<SocketAddr>,
    pub prohibited_hosts: Vec<IpNet>,
    pub dnssec: Dnssec,
    /// DNSKEY records as in a zone file, for [`Dnssec::Validate`]; None: the root's, which are built in.
    pub trust_anchor: Option<Arc<str>>,
}

/// Who checks the DNS's signatures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dnssec {
    /// Nobody; then there is no DANE.
    Off,
    /// The resolver, whose AD bit is believed.
    TrustAd,
    /// The engine.
    Validate,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct TlsConfig {
    /// Root certificates that are trusted beside the public ones.
    pub extra_roots_pem: Arc<Vec<u8>>,
}

/// A static route; the first that fits is used.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    pub domain: DomainPattern,
    /// Whose mail goes by it; None: everybody's.
    pub matches: Option<RouteMatch>,
    pub to: Vec<RouteTarget>,
    /// The targets share the load instead of being tried in their order.
    pub balance: bool,
    /// None: as shaping says; with credentials that are not said in the clear, at least [`TlsMode::Required`].
    pub tls: Option<TlsMode>,
    pub terms: Arc<Terms>,
}

/// How a route's hosts are spoken to. A connection serves routes with the same terms only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    pub protocol: DeliveryProtocol,
    pub auth: Option<Credentials>,
    /// None: as shaping says.
    pub chunking: Option<Chunking>,
    pub max_in_flight: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeliveryProtocol {
    #[default]
    Smtp,
    /// RFC 2033.
    Lmtp,
}

/// What we say of ourselves to a smarthost (RFC 4954).
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub username: String,
    pub password: String,
    /// They may be said in the clear.
    pub without_tls: bool,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials of {}", self.username)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DomainPattern {
    Any,
    /// `*.example.com`: every domain below, not example.com itself. Stored as `.example.com`.
    Suffix(String),
    Exact(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteTarget {
    Address(SocketAddr),
    /// A socket in the file system.
    Unix(UnixPath),
    /// A host name looked up by A and AAAA.
    Host {
        name: String,
        port: u16,
    },
    /// `mx:host`: that name's MX set instead of the recipient domain's.
    Mx(String),
    /// Nothing is sent; the mail counts as delivered. For dry runs.
    Discard,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    /// Encrypts where offered, with any certificate; falls back to clear on a new connection.
    Opportunistic,
    /// Any certificate.
    Required,
    /// A certificate that the public roots vouch for, for the host's name.
    Verified,
    Disabled,
}

#[derive(Debug, Clone, PartialEq)]
pub struct EgressSource {
    pub name: String,
    /// None: the kernel chooses.
    pub source_address: Option<IpAddr>,
    /// Default: the hostname.
    pub ehlo_domain: String,
    pub suspend_when_unplumbed: bool,
    /// Only an earlier configuration has it, before a reload: it keeps its index, and nothing goes by it.
    pub is_retired: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct EgressPool {
    pub name: String,
    /// Index into [`Config::egress_sources`] and weight ≥ 1.
    pub sources: Vec<(usize, u32)>,
}

/// A source's warm-up: recipients for each day from its first on, by provider. Then there is no such limit.
#[derive(Debug, Clone, PartialEq)]
pub struct Warmup {
    /// Index into [`Config::egress_sources`].
    pub source: usize,
    /// Days since 1970, in UTC. Before it nothing goes by the source.
    pub start_day: u64,
    pub daily: BTreeMap<String, Vec<u32>>,
    /// Of each other provider or site. None: they have no limit.
    pub default: Option<Vec<u32>>,
}

/// Whose mail it is: what may stand in it, how it goes, and how much of a busy pair it gets.
#[derive(Debug, Clone, PartialEq)]
pub struct Tenant {
    pub name: String,
    /// The name of one of [`Config::egress_pools`].
    pub egress_pool: String,
    /// May stand in From and MAIL FROM, those below included; in lower case. Empty: any may.
    pub domains: Vec<String>,
    pub priority: Priority,
    /// Recipients, counted when MAIL is written, over all sources and sites.
    pub max_message_rate: Option<Rate>,
    /// Recipients of what is accepted.
    pub max_injection_rate: Option<Rate>,
    pub retry: RetryRules,
}

/// A rate of all mail that the other fields describe; what is None describes any. Counted when MAIL is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    pub name: String,
    pub tenant: Option<String>,
    pub campaign: Option<String>,
    pub provider: Option<String>,
    /// Index into [`Config::egress_sources`].
    pub source: Option<usize>,
    pub egress_pool: Option<String>,
    /// As events name it.
    pub site: Option<String>,
    /// The recipients', in lower case.
    pub domain: Option<String>,
    pub max_message_rate: Rate,
}

/// The classes that share a busy pair 16:4:1, by the numbers that envelopes have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Priority {
    High = 0,
    #[default]
    Normal = 1,
    Bulk = 2,
}

#[derive(Debug, Clone, PartialEq)]
pub struct DkimIdentity {
    pub domain: String,
    pub selector: String,
    pub key: Arc<DkimKeyPem>,
    /// From domains (those below included), or "*"; default: `domain`.
    pub sign_for: Vec<String>,
    /// Empty: the default list.
    pub headers: Vec<String>,
}

/// A private key that parsed at check.
#[derive(PartialEq)]
pub struct DkimKeyPem {
    pub path: PathBuf,
    /// PKCS#1 or PKCS#8.
    pub pem: String,
    pub algorithm: DkimAlgorithm,
    /// The `p=` of the DNS record.
    pub public_key_base64: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DkimAlgorithm {
    RsaSha256 { bits: u32 },
    Ed25519Sha256,
}

impl std::fmt::Debug for DkimKeyPem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DkimKeyPem({})", self.path.display())
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct RetryConfig {
    pub schedule: RetrySchedule,
    pub max_age: Duration,
}

/// What a tenant, a provider or a site says about retries: what it leaves out is as for all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RetryRules {
    pub interval: Option<RetryInterval>,
    pub max_interval: Option<Duration>,
    pub max_age: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RetryInterval {
    /// Doubles.
    First(Duration),
    Listed(Vec<Duration>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RetrySchedule {
    /// The interval doubles from `first` up to `max`, with jitter.
    Doubling { first: Duration, max: Duration },
    /// One interval per attempt, the last one repeated; exact.
    Listed(Vec<Duration>),
}

/// How one (egress source, site) is treated. A rate or limit of None is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shaping {
    pub connection_limit: u32,
    /// Recipients, counted when MAIL is written.
    pub max_message_rate: Option<Rate>,
    pub max_connection_rate: Option<Rate>,
    /// Over all of a provider's sites.
    pub provider_connection_limit: Option<u32>,
    pub provider_max_message_rate: Option<Rate>,
    pub max_deliveries_per_connection: u32,
    pub max_recipients_per_batch: u32,
    pub idle_timeout: Duration,
    pub pipelining: bool,
    pub chunking: Chunking,
    pub max_in_flight: u32,
    pub in_doubt: InDoubt,
    pub eight_bit: EightBit,
    pub tls: TlsMode,
    /// Whether domains' MTA-STS policies are looked for and followed.
    pub mta_sts: bool,
    /// Whether hosts' TLSA records are followed, where DNSSEC is not off.
    pub dane: bool,
    pub timeouts: Timeouts,
    /// What is done about answers; of the narrowest table first.
    pub automation: Arc<[Arc<AutomationRule>]>,
}

/// What `[shaping]` and `[provider]` say beside the default. Lists are sorted by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ShapingRules {
    /// By index of the egress source.
    pub default_sources: Vec<(usize, Settings)>,
    /// The configuration's own, then the shipped ones.
    pub providers: Vec<Provider>,
    pub domains: Vec<DomainShaping>,
}

/// A roll-up of sites.
#[derive(Debug, Clone, PartialEq)]
pub struct Provider {
    pub name: String,
    pub matches: Vec<ProviderMatch>,
    pub layer: Layer,
    /// As it comes with Postrider, with nothing of the configuration's own.
    pub is_shipped: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProviderMatch {
    /// Each of a domain's MX hosts ends with one of the provider's suffixes.
    MxSuffix(String),
    Domain(String),
}

#[derive(Debug, Clone, PartialEq)]
pub struct DomainShaping {
    pub domain: String,
    /// Whether it holds for the whole site that the domain's MX set is. Else the domain is a site of its own.
    pub mx_rollup: bool,
    pub layer: Layer,
}

/// What one table says, and what it says of single egress sources, by their index.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Layer {
    pub settings: Settings,
    /// `max_age` is none: it is decided at acceptance.
    pub retry: RetryRules,
    pub sources: Vec<(usize, Settings)>,
}

/// What becomes of a message that the peer may have taken: its last octet was written, and no reply came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InDoubt {
    /// It is sent again, and counted as a possible duplicate.
    Retry,
    /// It waits for its expiry or for the operator. That it is about to be in doubt is durable before its last octet is
    /// written, so that a crash does not make it be forgotten.
    Hold,
}

/// What is done with 8-bit content where no host of the site offers 8BITMIME.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EightBit {
    /// RFC 6152 §3: it is not sent; 5.6.3.
    Fail,
    /// It is sent as it is. Nearly every server takes it.
    Send,
}

/// How content is sent, and how many messages are in flight on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunking {
    /// One transaction after the other, content by DATA.
    Off,
    /// Content by BDAT where CHUNKING is offered; the next envelope rides behind it.
    On,
    /// Up to `max_in_flight` whole transactions where CHUNKING and PIPELINING are offered; else as `On`.
    BackToBack,
}

/// RFC 5321 §4.5.3.2 unless configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    pub banner: Duration,
    pub ehlo: Duration,
    pub mail: Duration,
    pub rcpt: Duration,
    pub data: Duration,
    pub data_block: Duration,
    pub data_end: Duration,
    pub quit: Duration,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct EventsConfig {
    /// None: `events` in the spool's directory; see [`Config::events_path`].
    pub path: Option<PathBuf>,
    /// Header names captured at acceptance; a trailing `*` matches any rest.
    pub headers: Vec<String>,
    /// Names of metadata captured likewise.
    pub meta: Vec<String>,
}

impl Config {
    /// Where the event log is.
    pub fn events_path(&self) -> PathBuf {
        self.events.path.clone().unwrap_or_else(|| self.spool.path.join("events"))
    }
}
