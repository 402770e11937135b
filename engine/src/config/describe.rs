//! What `postrider check` prints for a configuration without errors: what will be done, in an operator's words, with
//! the DNS records to publish and with warnings about what is allowed but seldom meant.

use std::fmt::{self, Write};
use std::time::Duration;

use super::egress::{DEFAULT_POOL, UNBOUND_SOURCE};
use super::value::{duration_text, size_text};
use super::{
    Chunking, Config, DeliveryProtocol, DkimAlgorithm, Dnssec, Durability, InDoubt, Layer, LineEndings, Priority,
    ProviderMatch, Rate, ReceivedDetail, RetryConfig, RetrySchedule, Settings, TlsMode,
};

/// Retries spelled out before "then every …" takes over.
const RETRIES_SHOWN: usize = 12;
/// A character-string of a TXT record holds at most 255 octets (RFC 1035 §3.3.14).
const TXT_STRING_BYTES_MAX: usize = 255;

/// The effective configuration as text for people; not made to be parsed.
pub fn describe(config: &Config) -> String {
    let mut out = String::new();
    write_all(config, &mut out).expect("writing to a String does not fail");
    out
}

fn write_all(config: &Config, out: &mut String) -> fmt::Result {
    writeln!(out, "hostname  {}", config.hostname)?;
    match config.shards {
        Some(shards) => write!(out, "shards    {shards}")?,
        None => write!(out, "shards    one per allowed CPU")?,
    }
    writeln!(out, "{}", if config.pin { ", each pinned to its CPU" } else { "" })?;
    write_spool(config, out)?;
    write_listeners(config, out)?;
    write_egress(config, out)?;
    write_tenants(config, out)?;
    write_routing(config, out)?;
    write_dkim(config, out)?;
    write_retry(config, out)?;
    write_shaping(config, out)?;
    writeln!(out, "\nevents    {}", config.events_path().display())?;
    let list = |names: &[String]| if names.is_empty() { "none".into() } else { names.join(", ") };
    writeln!(out, "          headers: {}; meta: {}", list(&config.events.headers), list(&config.events.meta))?;
    let reference = if config.feedback_reference { "added" } else { "not added" };
    writeln!(out, "          X-Postrider-Ref: {reference}")?;
    writeln!(out, "shutdown  up to {} for what is on the wire", duration_text(config.shutdown_grace))?;
    let warnings = warnings(config);
    if !warnings.is_empty() {
        writeln!(out)?;
    }
    warnings.iter().try_for_each(|warning| writeln!(out, "warning: {warning}"))
}

fn write_spool(config: &Config, out: &mut String) -> fmt::Result {
    let spool = &config.spool;
    writeln!(out, "\nspool     {}", spool.path.display())?;
    match spool.filesystem() {
        Ok(found) => writeln!(out, "          file system {} at {}", found.kind, found.mount_point.display())?,
        Err(reason) => writeln!(out, "          refused: {reason}")?,
    }
    let durability = match spool.durability {
        Durability::Fsync => "every 250 waits for a synced write",
        Durability::None => "nothing is synced",
    };
    writeln!(out, "          up to {}; {durability}", size_text(spool.max_size_bytes))
}

fn write_listeners(config: &Config, out: &mut String) -> fmt::Result {
    writeln!(out, "\nlisteners")?;
    for listener in &config.smtp_listeners {
        let networks = |networks: &[ipnet::IpNet]| match networks {
            [] => "nobody".to_owned(),
            networks => networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        };
        let starttls = if listener.tls.is_some() { "STARTTLS" } else { "no STARTTLS" };
        let size = size_text(listener.max_message_bytes);
        let endings = match listener.line_endings {
            LineEndings::Fix => "bare CR and LF are fixed",
            LineEndings::Reject => "bare CR and LF are refused",
        };
        let received = match listener.received {
            ReceivedDetail::Full => "full",
            ReceivedDetail::NoClient => "no-client",
            ReceivedDetail::None => "none",
        };
        writeln!(out, "  smtp    {}  {starttls}; up to {size}; {endings}; Received: {received}", listener.address)?;
        writeln!(out, "          relays for {}", networks(&listener.relay_from))?;
        if listener.trusted_hosts != listener.relay_from {
            writeln!(out, "          trusts {}", networks(&listener.trusted_hosts))?;
        }
    }
    for listener in &config.http_listeners {
        let tokens = match listener.admin_token_sha256.len() {
            0 => "loopback clients only, without a token".to_owned(),
            1 => "1 admin token".to_owned(),
            several => format!("{several} admin tokens"),
        };
        writeln!(out, "  http    {}  {tokens}", listener.address)?;
    }
    Ok(())
}

fn write_egress(config: &Config, out: &mut String) -> fmt::Result {
    writeln!(out, "\negress sources")?;
    for source in &config.egress_sources {
        let address = source.source_address.map_or_else(|| "any address".into(), |address| address.to_string());
        let unplumbed = match (source.source_address, source.suspend_when_unplumbed) {
            (Some(_), false) => "; not suspended when the address is missing",
            _ => "",
        };
        writeln!(out, "  {}{address}  EHLO {}{unplumbed}", column(&source.name), source.ehlo_domain)?;
    }
    writeln!(out, "\negress pools")?;
    for pool in &config.egress_pools {
        let total: u64 = pool.sources.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let members = pool.sources.iter().map(|(index, weight)| {
            let name = config.egress_sources.get(*index).map_or("?", |source| source.name.as_str());
            let percent = 100.0 * f64::from(*weight) / (total.max(1) as f64);
            format!("{name} {weight} ({percent:.1} %)")
        });
        writeln!(out, "  {}{}", column(&pool.name), members.collect::<Vec<_>>().join(", "))?;
    }
    for warmup in &config.warmups {
        let name = config.egress_sources.get(warmup.source).map_or("?", |source| source.name.as_str());
        let lists = warmup.daily.iter().map(|(name, list)| (name.as_str(), list));
        let lists = lists.chain(warmup.default.as_ref().map(|list| ("every other", list)));
        for (whom, list) in lists {
            let numbers: Vec<String> = list.iter().map(ToString::to_string).collect();
            writeln!(out, "  warm-up of {name}: {whom} {} recipients a day, then no limit", numbers.join(", "))?;
        }
    }
    Ok(())
}

/// A name and what is between it and the next column; a long one has a space, too.
pub(super) fn column(name: &str) -> String {
    format!("{name:<13} ")
}

fn write_tenants(config: &Config, out: &mut String) -> fmt::Result {
    if !config.tenants.is_empty() {
        writeln!(out, "\ntenants")?;
    }
    for tenant in &config.tenants {
        let domains = if tenant.domains.is_empty() { "any domain".into() } else { tenant.domains.join(", ") };
        let priority = match tenant.priority {
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Bulk => "bulk",
        };
        writeln!(out, "  {}{domains}; pool {}; priority {priority}", column(&tenant.name), tenant.egress_pool)?;
        if let Some(rate) = tenant.max_injection_rate {
            writeln!(out, "                accepts up to {rate}")?;
        }
        if let Some(rate) = tenant.max_message_rate {
            writeln!(out, "                up to {rate} over all sources and sites")?;
        }
        if !tenant.retry.is_empty() {
            write!(out, "                retries ")?;
            write_schedule(&config.retry.with(&tenant.retry), "                ", out)?;
        }
    }
    if !config.return_path_domains.is_empty() {
        writeln!(out, "  MAIL FROM     also {} for every tenant", config.return_path_domains.join(", "))?;
    }
    if !config.limits.is_empty() {
        writeln!(out, "\nlimits over sources and sites")?;
    }
    config.limits.iter().try_for_each(|limit| limit.write(config, out))?;
    Ok(())
}

fn write_routing(config: &Config, out: &mut String) -> fmt::Result {
    writeln!(out, "\nroutes")?;
    for route in &config.routes {
        let between = if route.balance { " or " } else { ", then " };
        let targets = route.to.iter().map(ToString::to_string).collect::<Vec<_>>().join(between);
        let of = route.matches.as_ref().map_or(String::new(), |matches| format!("; only {matches}"));
        let domain = column(&route.domain.to_string());
        if route.discards() {
            writeln!(out, "  {domain}discarded: counts as delivered, nothing is sent{of}")?;
            continue;
        }
        let protocol = if route.terms.protocol == DeliveryProtocol::Lmtp { "; LMTP" } else { "" };
        let user = route.terms.auth.as_ref().map_or(String::new(), |auth| format!("; AUTH as {}", auth.username));
        let tls = tls_word(route.tls_beside(config.shaping.tls));
        writeln!(out, "  {domain}{targets}{protocol}; TLS {tls}{user}{of}")?;
    }
    let servers = match config.dns.servers.as_slice() {
        [] => "the system's resolvers".to_owned(),
        servers => servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let rest = if config.routes.is_empty() { "every domain" } else { "the rest" };
    let dnssec = match (config.dns.dnssec, &config.dns.trust_anchor) {
        (Dnssec::Off, _) => "",
        (Dnssec::TrustAd, _) => ", whose AD bit is believed",
        (Dnssec::Validate, None) => ", checking signatures from the root's keys on",
        (Dnssec::Validate, Some(_)) => ", checking signatures from the trust anchor on",
    };
    writeln!(out, "  {rest} by MX, asking {servers}{dnssec}; never to")?;
    let prohibited: Vec<String> = config.dns.prohibited_hosts.iter().map(ToString::to_string).collect();
    let prohibited = if prohibited.is_empty() { "our own listeners".into() } else { prohibited.join(", ") };
    writeln!(out, "                {prohibited}")
}

fn write_dkim(config: &Config, out: &mut String) -> fmt::Result {
    writeln!(out, "\ndkim")?;
    if config.dkim.is_empty() {
        writeln!(out, "  nothing is signed")?;
    }
    for identity in &config.dkim {
        let algorithm = match identity.key.algorithm {
            DkimAlgorithm::RsaSha256 { bits } => format!("RSA, {bits} bits"),
            DkimAlgorithm::Ed25519Sha256 => "Ed25519".to_owned(),
        };
        let sign_for: Vec<&str> =
            identity.sign_for.iter().map(|domain| if domain == "*" { "every From domain" } else { domain }).collect();
        let sign_for = if sign_for.is_empty() { "nobody".into() } else { sign_for.join(", ") };
        let headers = if identity.headers.is_empty() { "the default list".into() } else { identity.headers.join(", ") };
        writeln!(out, "  {} {}  {algorithm}; signs for {sign_for}", identity.domain, identity.selector)?;
        writeln!(out, "    headers: {headers}; key: {}", identity.key.path.display())?;
        let (name, text) = identity.dns_record();
        writeln!(out, "    publish:\n    {name}. IN TXT {}", txt_strings(&text))?;
    }
    Ok(())
}

/// A TXT record's text as a zone file has it.
fn txt_strings(text: &str) -> String {
    let bytes: Vec<String> = text
        .as_bytes()
        .chunks(TXT_STRING_BYTES_MAX)
        .map(|chunk| format!("\"{}\"", String::from_utf8_lossy(chunk)))
        .collect();
    if bytes.len() == 1 { bytes.concat() } else { format!("( {} )", bytes.join(" ")) }
}

fn write_retry(config: &Config, out: &mut String) -> fmt::Result {
    write!(out, "\nretries   ")?;
    write_schedule(&config.retry, "          ", out)
}

/// `indent` is for further lines.
fn write_schedule(retry: &RetryConfig, indent: &str, out: &mut String) -> fmt::Result {
    let jitter = match retry.schedule {
        RetrySchedule::Doubling { .. } => ", each interval with jitter",
        RetrySchedule::Listed(_) => "",
    };
    let (times, more) = retry_times(&retry.schedule, retry.max_age);
    let times: Vec<String> = times.into_iter().map(duration_text).collect();
    let times = if times.is_empty() { "none".into() } else { times.join(", ") };
    writeln!(out, "{times} after the first attempt{jitter}")?;
    if let Some((interval, count)) = more {
        writeln!(out, "{indent}then {count} more, every {}", duration_text(interval))?;
    }
    writeln!(out, "{indent}given up {} after acceptance", duration_text(retry.max_age))
}

/// The first retries' times after the first attempt; and the interval and the number of those behind them.
fn retry_times(schedule: &RetrySchedule, max_age: Duration) -> (Vec<Duration>, Option<(Duration, u128)>) {
    let mut times = Vec::new();
    let mut elapsed = Duration::ZERO;
    for attempts in 1_u32.. {
        let interval = schedule.interval(attempts);
        if elapsed + interval > max_age {
            return (times, None);
        }
        let is_last_interval = match schedule {
            RetrySchedule::Doubling { max, .. } => interval == *max,
            RetrySchedule::Listed(intervals) => times.len() >= intervals.len(),
        };
        if times.len() >= RETRIES_SHOWN && is_last_interval {
            let count = (max_age - elapsed).as_nanos() / interval.as_nanos().max(1);
            return (times, Some((interval, count)));
        }
        elapsed += interval;
        times.push(elapsed);
    }
    (times, None)
}

fn write_shaping(config: &Config, out: &mut String) -> fmt::Result {
    let shaping = &config.shaping;
    writeln!(
        out,
        "\nshaping   per source and site: {} connections, {} deliveries on each, {} recipients a transaction",
        shaping.connection_limit, shaping.max_deliveries_per_connection, shaping.max_recipients_per_batch
    )?;
    let pipelining = if shaping.pipelining { "pipelining where offered" } else { "no pipelining" };
    let idle = duration_text(shaping.idle_timeout);
    let policies = if shaping.mta_sts { "followed" } else { "not looked for" };
    let tlsa = match (config.dns.dnssec, shaping.dane) {
        (Dnssec::Off, _) => "",
        (_, true) => ", TLSA records followed",
        (_, false) => ", TLSA records not looked for",
    };
    let tls = format!("TLS {}, MTA-STS policies {policies}{tlsa}", tls_word(shaping.tls));
    writeln!(out, "          {pipelining}; {tls}; idle connections close after {idle}")?;
    let chunking = match shaping.chunking {
        Chunking::Off => "one message after the other, content by DATA".to_owned(),
        Chunking::On => "BDAT where offered; the next envelope rides behind the content".to_owned(),
        Chunking::BackToBack => {
            let max = shaping.max_in_flight;
            format!("up to {max} whole transactions in flight where CHUNKING and PIPELINING are offered")
        }
    };
    let in_doubt = match shaping.in_doubt {
        InDoubt::Retry => "sent again",
        InDoubt::Hold => "held for the operator, never sent again by itself",
    };
    writeln!(out, "          {chunking}")?;
    writeln!(out, "          what a peer may have taken without saying so is {in_doubt}")?;
    let timeouts = &shaping.timeouts;
    let named = [
        ("connect", timeouts.connect),
        ("banner", timeouts.banner),
        ("ehlo", timeouts.ehlo),
        ("mail", timeouts.mail),
        ("rcpt", timeouts.rcpt),
        ("data", timeouts.data),
        ("data_block", timeouts.data_block),
        ("data_end", timeouts.data_end),
        ("quit", timeouts.quit),
    ];
    let named: Vec<String> =
        named.iter().map(|(name, timeout)| format!("{name} {}", duration_text(*timeout))).collect();
    writeln!(out, "          timeouts: {}", named.join(", "))?;
    let rate = |rate: Option<Rate>| rate.map_or_else(|| "unlimited".to_owned(), |rate| rate.to_string());
    let (messages, connections) = (rate(shaping.max_message_rate), rate(shaping.max_connection_rate));
    writeln!(out, "          rates: recipients {messages}, new connections {connections}")?;
    write_shaping_rules(config, out)
}

/// Where something else holds, in the order in which it is applied: later wins.
fn write_shaping_rules(config: &Config, out: &mut String) -> fmt::Result {
    let rules = &config.shaping_rules;
    let source_name = |source: usize| config.egress_sources.get(source).map_or("?", |source| source.name.as_str());
    let write_sources = |out: &mut String, sources: &[(usize, Settings)]| {
        sources
            .iter()
            .try_for_each(|(source, settings)| writeln!(out, "            by {}: {settings}", source_name(*source)))
    };
    write_sources(out, &rules.default_sources)?;
    for provider in rules.providers.iter().filter(|provider| !provider.is_shipped) {
        let matches = provider.matches.iter().map(|known| match known {
            ProviderMatch::MxSuffix(suffix) if suffix.starts_with('.') => format!("*{suffix}"),
            ProviderMatch::MxSuffix(host) => format!("{host} and below"),
            ProviderMatch::Domain(domain) => format!("the domain {domain}"),
        });
        let matches = matches.collect::<Vec<_>>().join(" or ");
        writeln!(out, "  provider {}: all MX hosts are {matches}", provider.name)?;
        writeln!(out, "            {}", provider.layer.settings)?;
        write_own_retry(config, &provider.layer, out)?;
        write_sources(out, &provider.layer.sources)?;
    }
    let shipped = rules.providers.iter().filter(|provider| provider.is_shipped).map(|provider| &*provider.name);
    let shipped: Vec<&str> = shipped.collect();
    if !shipped.is_empty() {
        writeln!(out, "  providers as shipped: {}", shipped.join(", "))?;
    }
    for rule in &rules.domains {
        let whom = if rule.mx_rollup { "and all domains with its MX hosts" } else { "only, as a site of its own" };
        writeln!(out, "  {} {whom}", rule.domain)?;
        writeln!(out, "            {}", rule.layer.settings)?;
        write_own_retry(config, &rule.layer, out)?;
        write_sources(out, &rule.layer.sources)?;
    }
    Ok(())
}

fn write_own_retry(config: &Config, layer: &Layer, out: &mut String) -> fmt::Result {
    if layer.retry.is_empty() {
        return Ok(());
    }
    write!(out, "            retries ")?;
    write_schedule(&config.retry.with(&layer.retry), "            ", out)
}

fn tls_word(mode: TlsMode) -> &'static str {
    match mode {
        TlsMode::Opportunistic => "opportunistic",
        TlsMode::Required => "required",
        TlsMode::Verified => "verified",
        TlsMode::Disabled => "disabled",
    }
}

fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = config.warnings.clone();
    if !config.hostname.contains('.') {
        let text = "is not a full domain name; many servers refuse it in EHLO: set hostname";
        warnings.push(format!("hostname {:?} {text}", config.hostname));
    }
    if config.spool.durability == Durability::None {
        warnings.push("durability = \"none\": a crash of the machine loses accepted mail".into());
    }
    if config.spool.filesystem().is_ok_and(|found| !found.is_supported()) {
        warnings.push("the spool's file system is neither ext4 nor XFS; its durability is untested".into());
    }
    for listener in &config.smtp_listeners {
        if listener.relay_from.iter().any(|network| network.prefix_len() == 0) {
            warnings.push(format!("the listener on {} relays for the whole Internet", listener.address));
        }
    }
    let has_other_pools = config.egress_pools.iter().any(|pool| pool.name != DEFAULT_POOL);
    let default_is_unbound = config.pool(DEFAULT_POOL).is_some_and(|pool| {
        let name_of = |index: usize| config.egress_sources.get(index).map(|source| source.name.as_str());
        pool.sources.iter().all(|(index, _)| name_of(*index) == Some(UNBOUND_SOURCE))
    });
    if has_other_pools && default_is_unbound {
        let text =
            "mail that names no pool leaves from any address of this machine, as the pool \"default\" is unbound";
        warnings.push(text.into());
    }
    for (index, source) in config.egress_sources.iter().enumerate() {
        if !config.egress_pools.iter().any(|pool| pool.sources.iter().any(|(member, _)| *member == index)) {
            warnings.push(format!("egress source {:?} is in no pool", source.name));
        }
    }
    warnings
}
