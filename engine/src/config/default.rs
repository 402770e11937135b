//! What holds where the configuration says nothing. The readers of each section start from these values.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::egress::UNBOUND_SOURCE;
use super::{
    Chunking, Config, DnsConfig, Dnssec, Durability, EgressPool, EgressSource, EightBit, EventsConfig, HttpListener,
    InDoubt, LineEndings, ReceivedDetail, RetryConfig, RetrySchedule, Shaping, ShapingRules, SmtpListener, SpoolConfig,
    Timeouts, TlsConfig, TlsMode, shipped, value,
};

const MINUTE: Duration = Duration::from_secs(60);

impl Default for Config {
    /// What `postrider serve` runs without a file, under the system's host name.
    fn default() -> Self {
        Self::new(&system_hostname())
    }
}

impl Config {
    /// The defaults under a given host name, which is also the EHLO name of the unbound source.
    pub fn new(hostname: &str) -> Self {
        Self {
            hostname: hostname.into(),
            shards: None,
            pin: false,
            spool: SpoolConfig::default(),
            smtp_listeners: vec![SmtpListener::default()],
            http_listeners: vec![HttpListener::default()],
            dns: DnsConfig::default(),
            tls: TlsConfig::default(),
            routes: Vec::new(),
            egress_sources: vec![EgressSource::unbound(hostname)],
            egress_pools: vec![EgressPool { name: "default".into(), sources: vec![(0, 1)] }],
            warmups: Vec::new(),
            tenants: Vec::new(),
            limits: Vec::new(),
            return_path_domains: Vec::new(),
            dkim: Vec::new(),
            retry: RetryConfig::default(),
            shaping: Shaping::default(),
            shaping_rules: ShapingRules { providers: shipped::providers(), ..ShapingRules::default() },
            events: EventsConfig::default(),
            shutdown_grace: Duration::from_secs(30),
            feedback_reference: true,
            warnings: Vec::new(),
        }
    }
}

impl Default for SpoolConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::from("postrider-data"),
            durability: Durability::Fsync,
            max_size_bytes: 50 << 30,
            allow_filesystem: false,
        }
    }
}

impl Default for SmtpListener {
    fn default() -> Self {
        let loopback = loopback_networks();
        Self {
            address: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 2525),
            relay_from: loopback.clone(),
            trusted_hosts: loopback,
            max_message_bytes: 50 << 20,
            line_endings: LineEndings::Fix,
            received: ReceivedDetail::Full,
            tls: None,
        }
    }
}

impl Default for HttpListener {
    fn default() -> Self {
        Self { address: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 8025), admin_token_sha256: Vec::new() }
    }
}

impl Default for DnsConfig {
    fn default() -> Self {
        // Loopback, unspecified, link-local, multicast, and the limited broadcast address.
        const PROHIBITED: [&str; 9] = [
            "127.0.0.0/8",
            "::1/128",
            "0.0.0.0/8",
            "::/128",
            "169.254.0.0/16",
            "fe80::/10",
            "224.0.0.0/4",
            "ff00::/8",
            "255.255.255.255/32",
        ];
        let prohibited_hosts = PROHIBITED.iter().map(|text| text.parse().expect("a valid network"));
        Self {
            servers: Vec::new(),
            prohibited_hosts: prohibited_hosts.collect(),
            dnssec: Dnssec::Off,
            trust_anchor: None,
        }
    }
}

impl EgressSource {
    /// The source that leaves the choice of the address to the kernel.
    pub fn unbound(ehlo_domain: &str) -> Self {
        Self {
            name: UNBOUND_SOURCE.into(),
            source_address: None,
            ehlo_domain: ehlo_domain.into(),
            suspend_when_unplumbed: true,
            is_retired: false,
        }
    }
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            schedule: RetrySchedule::Doubling { first: 20 * MINUTE, max: 240 * MINUTE },
            max_age: Duration::from_secs(5 * 86_400),
        }
    }
}

impl Default for Shaping {
    fn default() -> Self {
        Self {
            connection_limit: 10,
            max_message_rate: None,
            max_connection_rate: None,
            provider_connection_limit: None,
            provider_max_message_rate: None,
            max_deliveries_per_connection: 100,
            max_recipients_per_batch: 100,
            idle_timeout: MINUTE,
            pipelining: true,
            chunking: Chunking::On,
            max_in_flight: 8,
            in_doubt: InDoubt::Retry,
            eight_bit: EightBit::Fail,
            tls: TlsMode::Opportunistic,
            mta_sts: true,
            dane: true,
            timeouts: Timeouts::default(),
            automation: Arc::default(),
        }
    }
}

impl Default for Timeouts {
    /// RFC 5321 §4.5.3.2: banner, MAIL and RCPT 5 min, DATA 2 min, a block 3 min, the final dot 10 min. It does not
    /// name the others; after QUIT nothing is at stake any more.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            banner: 5 * MINUTE,
            ehlo: 5 * MINUTE,
            mail: 5 * MINUTE,
            rcpt: 5 * MINUTE,
            data: 2 * MINUTE,
            data_block: 3 * MINUTE,
            data_end: 10 * MINUTE,
            quit: Duration::from_secs(10),
        }
    }
}

fn loopback_networks() -> Vec<IpNet> {
    ["127.0.0.0/8", "::1/128"].map(|text| text.parse().expect("a valid network")).into()
}

/// The system's host name; `localhost` where it has none that could stand in EHLO.
pub(super) fn system_hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    value::domain(name.trim()).unwrap_or_else(|_| "localhost".into())
}
