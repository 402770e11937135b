//! `Config::load` and `Config::from_toml`: files → tree → [`Config`], with every error found on the way.
//!
//! Order: read and merge the files (syntax errors end it there, since everything behind them would be guesswork); read
//! each section; check sections against one another.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::proto::dnssec::TrustAnchors;

use super::document::Table;
use super::error::{Place, Report, Wrong};
use super::reader::Section;
use super::{
    Config, ConfigErrors, DnsConfig, Dnssec, Durability, EventsConfig, SpoolConfig, default, dkim, egress, include,
    limit, listener, retry, route, shaping, tenant, value, warmup,
};
use crate::limits;

impl Config {
    /// Reads a file and what it includes. Relative paths in a file are relative to that file's directory.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        let mut report = Report::default();
        let name = path.display().to_string();
        let root = match read_text(path, limits::CONFIG_FILE_BYTES_MAX) {
            Ok(text) => include::read_all(&text, &name, directory_of(path), &mut report),
            Err(reason) => {
                let is_text = !reason.starts_with(NOT_UTF8);
                let wrong = Wrong::new(format!("cannot be read: {reason}"));
                let instead = if is_text { "write the path of a configuration file" } else { "save it as UTF-8" };
                report.add_whole_file(&name, wrong.instead(instead));
                None
            }
        };
        Self::from_tree(root, report)
    }

    /// Like [`Config::load`] from a text: `file_name` is for errors, `base_dir` is where relative paths begin.
    pub fn from_toml(text: &str, file_name: &str, base_dir: &Path) -> Result<Self, ConfigErrors> {
        let mut report = Report::default();
        let root = include::read_all(text, file_name, base_dir, &mut report);
        Self::from_tree(root, report)
    }

    fn from_tree(root: Option<Table>, mut report: Report) -> Result<Self, ConfigErrors> {
        let mut config = Self::new("");
        if let Some(root) = root
            && !report.has_errors()
        {
            let top = Section::new("", Place { file: 0, offset: 0 }, &root, &report);
            config = read_top(top);
        }
        config.warnings = std::mem::take(&mut report.warnings);
        report.into_result()?;
        Ok(config)
    }
}

fn read_top(top: Section<'_>) -> Config {
    let hostname = top.text("hostname", "\"mta.example.com\"", value::domain);
    let hostname = hostname.map_or_else(default::system_hostname, |found| found.value);
    let mut config = Config::new(&hostname);

    let shards = top.integer("shards", 2, 1..=limits::CONFIG_SHARDS_MAX);
    config.shards = shards.and_then(|found| usize::try_from(found.value).ok());
    config.pin = top.boolean("pin").unwrap_or(config.pin);
    let grace_max = Duration::from_secs(3_600);
    let grace = top.duration("shutdown_grace", "30s", Duration::ZERO..=grace_max);
    config.shutdown_grace = grace.map_or(config.shutdown_grace, |found| found.value);
    config.feedback_reference = top.boolean("feedback_reference").unwrap_or(config.feedback_reference);
    // Read and merged already.
    let _ = top.node("include");

    config.spool = read_spool(&top);
    listener::read(&top, &mut config);
    if let Some(section) = top.table("dns", "[dns]") {
        config.dns = read_dns(section);
    }
    if let Some(section) = top.table("tls", "[tls]") {
        config.tls = super::tls::read(section);
    }
    (config.egress_sources, config.egress_pools) = egress::read(&top, &hostname);
    config.dkim = dkim::read(&top);
    if let Some(section) = top.table("retry", "[retry]") {
        config.retry = config.retry.with(&retry::read(section, &config.retry));
    }
    config.tenants = tenant::read(&top, &config);
    config.routes = route::read(&top, &config);
    if let Some(section) = top.table("return_path", "[return_path]") {
        config.return_path_domains = tenant::read_return_path(section);
    }
    if let Some(section) = top.table("shaping", "[shaping.default]") {
        shaping::read(section, &mut config);
    }
    if top.boolean("shipped_providers") == Some(false) {
        config.shaping_rules.providers.clear();
    }
    if let Some(section) = top.table("provider", "[provider.\"name\"]") {
        shaping::read_providers(section, &mut config);
    }
    if let Some(section) = top.table("warmup", "[warmup.\"ip-a\"]") {
        config.warmups = warmup::read(section, &config);
    }
    if let Some(section) = top.table("events", "[events]") {
        config.events = read_events(section);
    }
    if let Some(section) = top.table("dsn", "[dsn]") {
        section.not_yet(&[("generate", Some("\"never\""))]);
        section.finish();
    }
    config.limits = limit::read(&top, &config);
    top.finish();
    config
}

fn read_spool(top: &Section<'_>) -> SpoolConfig {
    let mut spool = SpoolConfig::default();
    let Some(section) = top.table("spool", "[spool]") else {
        spool.path = top.report.base_dir(top.place).join(spool.path);
        check_filesystem(top, top.place, &spool);
        return spool;
    };
    let path = section.text("path", "\"/var/spool/postrider\"", not_empty);
    let place = path.as_ref().map_or(section.place, |found| found.place);
    spool.path = section.report.base_dir(place).join(path.map_or(spool.path, |found| found.value));
    let durabilities = [("fsync", Durability::Fsync), ("none", Durability::None)];
    spool.durability = section.choice("durability", &durabilities, &[]).unwrap_or(spool.durability);
    let size = section.size("max_size", "50GiB", limits::CONFIG_SPOOL_BYTES_MIN..=u64::MAX);
    spool.max_size_bytes = size.map_or(spool.max_size_bytes, |found| found.value);
    spool.allow_filesystem = section.boolean("allow_filesystem").unwrap_or(spool.allow_filesystem);
    check_filesystem(top, place, &spool);
    section.finish();
    spool
}

fn check_filesystem(top: &Section<'_>, place: Place, spool: &SpoolConfig) {
    if spool.path.exists() && !spool.path.is_dir() {
        return top.report.add(place, "spool.path", not_a_directory(&spool.path));
    }
    if let Err(reason) = spool.filesystem() {
        let instead = "put it on ext4 or XFS, or write allow_filesystem = true at your own risk";
        top.report.add(place, "spool.path", Wrong::new(reason).instead(instead));
    }
}

fn not_a_directory(path: &Path) -> Wrong {
    let wrong = Wrong::new(format!("{} is not a directory", path.display()));
    wrong.instead("write the path of a directory, or of a new one")
}

fn read_dns(section: Section<'_>) -> DnsConfig {
    let mut dns = DnsConfig::default();
    let servers = section.list("servers", "[\"127.0.0.1:5300\"]", |text| match text.parse() {
        Ok(address) => Ok(std::net::SocketAddr::new(address, 53)),
        Err(_) => value::socket_address(text, 53),
    });
    if let Some(servers) = servers {
        for server in &servers.value {
            if server.value.port() == 0 || server.value.ip().is_unspecified() {
                let wrong = Wrong::new(format!("\"{}\" cannot be connected to", server.value));
                section.wrong(server.place, "servers", wrong.instead("write for example \"127.0.0.1:5300\""));
            }
        }
        dns.servers = servers.value.into_iter().map(|server| server.value).collect();
    }
    if let Some(hosts) = section.list("prohibited_hosts", "[\"127.0.0.0/8\"]", value::network) {
        dns.prohibited_hosts = hosts.value.into_iter().map(|host| host.value).collect();
    }
    let modes = [("off", Dnssec::Off), ("trust_ad", Dnssec::TrustAd), ("validate", Dnssec::Validate)];
    dns.dnssec = section.choice("dnssec", &modes, &[]).unwrap_or(dns.dnssec);
    if dns.dnssec == Dnssec::Validate {
        dns.trust_anchor = read_trust_anchor(&section);
    } else {
        section.inapplicable(&["trust_anchor"], "without dnssec = \"validate\"");
    }
    section.finish();
    dns
}

fn read_trust_anchor(section: &Section<'_>) -> Option<Arc<str>> {
    let file = section.text("trust_anchor", "\"root.key\"", not_empty)?;
    let path = section.report.base_dir(file.place).join(file.value);
    let read = read_text(&path, limits::PEM_FILE_BYTES_MAX).and_then(|text| {
        if !text.contains("DNSKEY") {
            return Err("it has no DNSKEY record".to_owned());
        }
        let parsed: Result<TrustAnchors, _> = text.parse();
        parsed.map(|_| text).map_err(|error| format!("it is no list of DNSKEY records: {error}"))
    });
    match read {
        Ok(text) => Some(text.into()),
        Err(reason) => {
            let wrong = Wrong::new(format!("{} cannot be used: {reason}", path.display()));
            let instead = "write the path of a file with DNSKEY records, relative to this file";
            section.wrong(file.place, "trust_anchor", wrong.instead(instead));
            None
        }
    }
}

fn read_events(section: Section<'_>) -> EventsConfig {
    let mut events = EventsConfig::default();
    if let Some(path) = section.text("path", "\"/var/log/postrider\"", not_empty) {
        let directory = section.report.base_dir(path.place).join(path.value);
        if directory.exists() && !directory.is_dir() {
            section.wrong(path.place, "path", not_a_directory(&directory));
        }
        events.path = Some(directory);
    }
    if let Some(headers) = section.list("headers", "[\"Subject\"]", name_pattern) {
        events.headers = headers.value.into_iter().map(|header| header.value).collect();
    }
    if let Some(meta) = section.list("meta", "[\"*\"]", name_pattern) {
        events.meta = meta.value.into_iter().map(|name| name.value).collect();
    }
    section.not_yet(&[("webhook", None)]);
    section.finish();
    events
}

/// A header field's name (RFC 5322 §2.2), or its beginning and `*`.
fn name_pattern(text: &str) -> Result<String, Wrong> {
    let name = text.strip_suffix('*').unwrap_or(text);
    let fits = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':' && byte != b'*');
    if text.is_empty() || !fits {
        let wrong = Wrong::new(format!("{text:?} is neither a header's name nor the beginning of one and \"*\""));
        return Err(wrong.instead("write for example \"Subject\" or \"X-Customer-*\""));
    }
    Ok(text.into())
}

fn not_empty(text: &str) -> Result<PathBuf, Wrong> {
    if text.is_empty() || text.contains('\0') {
        return Err(Wrong::new(format!("{text:?} is not a path")).instead("write the path of a directory"));
    }
    Ok(text.into())
}

/// The directory a file is in; `.` for a bare file name.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

const NOT_UTF8: &str = "it is not UTF-8";

/// A whole small file as text; the error is for people.
pub(super) fn read_text(path: &Path, bytes_max: u64) -> Result<String, String> {
    let reason = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        std::io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        std::io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
        _ => error.to_string(),
    };
    let file = std::fs::File::open(path).map_err(reason)?;
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(reason)?;
    if bytes.len() as u64 > bytes_max {
        return Err(format!("it is larger than {}", value::size_text(bytes_max)));
    }
    String::from_utf8(bytes).map_err(|error| format!("{NOT_UTF8} from byte {}", error.utf8_error().valid_up_to()))
}
