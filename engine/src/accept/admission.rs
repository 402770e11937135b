//! Policy and header work between a received message and the spool.
//!
//! In the order that `docs/smtp.md` tells users: too many hops are refused; fields that steer us or that must not
//! travel are taken out; Date, Message-ID and X-Postrider-Ref go in front where they belong; then signatures; then
//! Received on top, unsigned. All else stays byte for byte, whatever it is. On the wire a message is
//! [`Admitted::prefix`] followed by [`Admitted::content`].
//!
//! A header block with a line that is no field is broken: from that line on nothing is interpreted or taken out,
//! because most readers take it for the body. Where even the first line is none, all of the content is body, and an
//! empty line goes between it and what we add.
//!
//! Over 500 lines: the order of all these steps is what was promised.

use std::collections::HashSet;
use std::io::Write as _;
use std::ops::Range;
use std::sync::Arc;

use aws_lc_rs::digest;
use memchr::memmem;
use postrider_spool::record::{Envelope, Recipient};
use serde::Deserialize;

use super::dkim_sign::{BodyHash, Signers};
use super::tenant::{Tenant, Tenants};
use super::{Received, Refusal};
use crate::config::{Config, Priority, ReceivedDetail};
use crate::limits::{
    CAPTURED_FIELDS_MAX, CAPTURED_VALUE_BYTES_MAX, RECEIVED_FIELDS_MAX, ROUTING_NAME_BYTES_MAX,
    SCHEDULE_FIELD_BYTES_MAX,
};
use crate::mail::header::{self, Field, FromDomains, Line};
use crate::mail::json::Object;
use crate::mail::message_id;
use crate::mail::time::Now;

mod sharing;

pub use sharing::SharedContent;

/// What the configuration says about incoming mail, prepared once.
#[derive(Debug)]
pub struct Policy {
    hostname: String,
    signers: Arc<Signers>,
    tenants: Tenants,
    max_age_ms: u64,
    captured: Vec<NamePattern>,
    /// Of metadata.
    captured_meta: Vec<NamePattern>,
    pools: HashSet<String>,
    sources: HashSet<String>,
    feedback_reference: bool,
}

/// A message ready to be signed and then appended to the spool.
#[derive(Debug)]
pub struct Admitted {
    pub envelope: Envelope,
    /// What goes in front of `content`; ends with CRLF. Empty only if nothing is added.
    pub prefix: Vec<u8>,
    /// The message without the fields that were taken out; empty where it is shared.
    pub content: Vec<u8>,
    /// In place of `content`.
    pub shared: Option<Arc<SharedContent>>,
    /// Where signatures go into `prefix`: behind the Received field.
    signatures_at: usize,
    /// Where the header block of `content` ends and the body begins.
    header_end: usize,
    body_start: usize,
    /// Of whom, and which of them: those of the policy that admitted it, whatever comes meanwhile.
    signers: Arc<Signers>,
    chosen: Vec<usize>,
    rsa_signatures: usize,
}

impl Admitted {
    /// Octets on the wire.
    pub fn size(&self) -> u64 {
        let content = self.shared.as_ref().map_or(self.content.len(), |shared| shared.octets().len());
        (self.prefix.len() + content) as u64
    }

    /// How many slow signatures [`Self::sign`] will make.
    pub fn rsa_signatures(&self) -> usize {
        self.rsa_signatures
    }

    pub fn ed25519_signatures(&self) -> usize {
        self.chosen.len() - self.rsa_signatures
    }

    /// Puts the signature fields into the prefix. To be called once; does nothing where no identity signs.
    pub fn sign(&mut self, now: Now) -> Result<(), Refusal> {
        let chosen = std::mem::take(&mut self.chosen);
        self.rsa_signatures = 0;
        if chosen.is_empty() {
            return Ok(());
        }
        let (unsigned, added) = self.prefix.split_at(self.signatures_at);
        let own_hash;
        let (header, body_hash) = match &self.shared {
            Some(shared) => (shared.header(), &shared.body_hash),
            None => {
                own_hash = BodyHash::of(&self.content[self.body_start..]);
                (&self.content[..self.header_end], &own_hash)
            }
        };
        let signatures = self
            .signers
            .sign(&chosen, &[added, header], body_hash, now.wall_ms / 1_000)
            .map_err(|_| Refusal::new(451, (4, 3, 0), "the message could not be signed"))?;
        self.prefix = [unsigned, &signatures, added].concat();
        Ok(())
    }
}

impl Policy {
    /// Fails if a DKIM key is unusable, which `check` has told before.
    pub fn new(config: &Config) -> Result<Self, String> {
        Ok(Self {
            hostname: config.hostname.clone(),
            signers: Arc::new(Signers::new(&config.dkim)?),
            tenants: Tenants::new(config),
            max_age_ms: u64::try_from(config.retry.max_age.as_millis()).unwrap_or(u64::MAX),
            captured: config.events.headers.iter().map(|pattern| NamePattern::new(pattern)).collect(),
            captured_meta: config.events.meta.iter().map(|pattern| NamePattern::new(pattern)).collect(),
            pools: config.egress_pools.iter().map(|pool| pool.name.clone()).collect(),
            sources: sources_in_use(config).collect(),
            feedback_reference: config.feedback_reference,
        })
    }

    /// `random` must be unpredictable: X-Postrider-Ref is made of it.
    pub fn admit(&self, now: Now, received: Received, random: [u64; 2]) -> Result<Admitted, Refusal> {
        let scan = Scan::of(&received.content, &self.captured);
        self.admit_scanned(now, received, scan, None, random)
    }

    fn admit_scanned(
        &self,
        now: Now,
        received: Received,
        mut scan: Scan,
        shared: Option<&Arc<SharedContent>>,
        random: [u64; 2],
    ) -> Result<Admitted, Refusal> {
        let names = MessageNames::derive(random);
        let (tenant, steering) = self.decide(now, &received, &scan)?;
        let max_age_ms = tenant.map_or(self.max_age_ms, |tenant| tenant.max_age_ms);
        let expires_ms = steering.expires_ms.unwrap_or(steering.first_attempt_ms.saturating_add(max_age_ms));
        let chosen = self.signers.select(scan.from_domain.as_deref());
        let rsa_signatures = chosen.iter().filter(|index| self.signers.is_rsa(**index)).count();
        let mut captured = std::mem::take(&mut scan.captured);
        let (mut prefix, signatures_at) = self.write_prefix(now, &received, &scan, &names, &mut captured);

        let removed_bytes: usize = scan.removed.iter().map(Range::len).sum();
        let mut content = received.content;
        remove_ranges(&mut content, &scan.removed);
        let (mut header_end, mut body_start) = (scan.header_end - removed_bytes, scan.body_start - removed_bytes);
        let mut eight_bit = !content.is_ascii() || !prefix.is_ascii();
        let mut header_is_ascii = content[..header_end].is_ascii();
        let mut dot_lines = has_dot_lines(&content);
        if let Some(shared) = shared {
            eight_bit |= shared.eight_bit;
            header_is_ascii &= shared.header().is_ascii();
            dot_lines |= shared.dot_lines;
            prefix.append(&mut content);
            (header_end, body_start) = (0, 0);
        }
        let addresses_ascii = received.reverse_path.is_ascii() && received.recipients.iter().all(|r| r.is_ascii());
        // Octets above 127 in the header of a message that was not declared SMTPUTF8 are older practice than RFC 6531,
        // in whatever character set; peers have always passed them on, and would be asked for what nobody promised
        // them.
        let header_needs_smtputf8 = received.smtputf8_declared && !header_is_ascii;
        let mut envelope = Envelope {
            reverse_path: received.reverse_path,
            recipients: received.recipients.into_iter().map(|address| Recipient { address }).collect(),
            tenant: tenant.map(|tenant| tenant.name.clone()).unwrap_or_default(),
            campaign: steering.campaign,
            egress_pool: steering.egress_pool,
            priority: tenant.map_or(Priority::Normal, |tenant| tenant.priority) as u8,
            created_ms: now.wall_ms,
            first_attempt_ms: steering.first_attempt_ms,
            expires_ms,
            eight_bit,
            smtputf8: !addresses_ascii || header_needs_smtputf8,
            dot_lines,
            reception_protocol: received.protocol.to_owned(),
            client_address: received.client.map(|client| client.to_string()).unwrap_or_default(),
            client_name: received.helo,
            session_id: received.session_id,
            headers: captured,
            meta: Vec::new(),
        };
        envelope.meta = self.capture_meta(received.meta, &envelope);
        envelope.set_dsn(&received.dsn);
        let shared = shared.map(Arc::clone);
        Ok(Admitted {
            envelope,
            prefix,
            content,
            shared,
            signatures_at,
            header_end,
            body_start,
            signers: Arc::clone(&self.signers),
            chosen,
            rsa_signatures,
        })
    }

    /// Whether the message may be sent, as whose, and what becomes of it.
    fn decide(&self, now: Now, received: &Received, scan: &Scan) -> Result<(Option<&Tenant>, Steering), Refusal> {
        if scan.received_fields > RECEIVED_FIELDS_MAX {
            // RFC 5321 §6.3.
            return Err(Refusal::new(554, (5, 4, 6), "too many Received fields: the message loops"));
        }
        if let Some(field) = scan.contradictory.filter(|_| received.trusted) {
            let text = format!("{field}: is there more than once, and says different things; leave all but one out");
            return Err(Refusal::new(550, (5, 6, 0), text));
        }
        let named = scan.tenant.as_deref().filter(|_| received.trusted);
        let tenant = self.tenants.choose(named, &received.reverse_path, &scan.from)?;
        let mut steering = Steering::at(now, tenant);
        if received.trusted {
            self.steer(&mut steering, scan, now, tenant)?;
        }
        Ok((tenant, steering))
    }

    /// What a trusted client asks for in header fields.
    fn steer(&self, steering: &mut Steering, scan: &Scan, now: Now, tenant: Option<&Tenant>) -> Result<(), Refusal> {
        if let Some(campaign) = scan.campaign.as_ref().or(scan.job.as_ref()) {
            check_routing_name("X-Campaign", campaign)?;
            steering.campaign.clone_from(campaign);
        }
        if let Some(name) = &scan.virtual_mta {
            check_routing_name("X-Virtual-MTA", name)?;
            if !self.pools.contains(name) && !self.sources.contains(name) {
                let text = format!("X-Virtual-MTA: no egress pool or source is called {name}");
                return Err(Refusal::new(550, (5, 7, 1), text));
            }
            if let Some(tenant) = tenant.filter(|tenant| !tenant.may_use(name)) {
                let text =
                    format!("X-Virtual-MTA: {name} is neither the pool of tenant {} nor a source of it", tenant.name);
                return Err(Refusal::new(550, (5, 7, 1), text));
            }
            steering.egress_pool.clone_from(name);
        }
        if let Some(schedule) = &scan.schedule {
            steering.schedule(schedule, now).map_err(|error| {
                let text = format!("X-Schedule: {error}; write {{\"first_attempt\":\"2026-12-01T00:00:00Z\"}}");
                Refusal::new(550, (5, 6, 0), text)
            })?;
        }
        Ok(())
    }

    /// What its sender said of the message, and what the engine found, under the names that KumoMTA has for it.
    fn capture_meta(&self, given: Vec<(String, String)>, envelope: &Envelope) -> Vec<(String, String)> {
        // Nearly always nothing is asked for.
        if self.captured_meta.is_empty() {
            return Vec::new();
        }
        let found = [
            ("tenant", &envelope.tenant),
            ("campaign", &envelope.campaign),
            ("egress_pool", &envelope.egress_pool),
            ("received_from", &envelope.client_address),
            ("reception_protocol", &envelope.reception_protocol),
        ];
        let found = found.into_iter().filter(|(_, value)| !value.is_empty());
        let found: Vec<_> = found.map(|(name, value)| (name.to_owned(), value.clone())).collect();
        let is_given = |name: &str| given.iter().any(|(given, _)| given == name);
        let found = found.into_iter().filter(|(name, _)| !is_given(name)).collect::<Vec<_>>();
        let asked_for = |name: &str| self.captured_meta.iter().any(|pattern| pattern.fits(name.as_bytes()));
        let all = given.into_iter().chain(found).filter(|(name, _)| asked_for(name)).take(CAPTURED_FIELDS_MAX);
        all.map(|(name, mut value)| {
            value.truncate(value.floor_char_boundary(CAPTURED_VALUE_BYTES_MAX));
            (name, value)
        })
        .collect()
    }

    /// The fields that go in front of a message, and where signatures go among them.
    fn write_prefix(
        &self,
        now: Now,
        received: &Received,
        scan: &Scan,
        names: &MessageNames,
        captured: &mut Vec<(String, String)>,
    ) -> (Vec<u8>, usize) {
        let mut prefix = Vec::with_capacity(PREFIX_BYTES_TYPICAL);
        let date = header::format_date(now.wall_ms);
        self.write_received(received, names, &date, &mut prefix);
        let signatures_at = prefix.len();
        let mut add = |name: &str, value: &str| {
            for part in [name, ": ", value, "\r\n"] {
                prefix.extend_from_slice(part.as_bytes());
            }
            capture(&self.captured, captured, name.as_bytes(), value.as_bytes());
        };
        if !scan.has_date {
            add("Date", &date);
        }
        if !scan.has_message_id {
            add("Message-ID", &message_id::generate(now.wall_ms, names.public, &self.hostname));
        }
        if self.feedback_reference {
            add(FEEDBACK_REFERENCE, &names.secret);
        }
        if scan.all_body {
            prefix.extend_from_slice(b"\r\n");
        }
        (prefix, signatures_at)
    }

    /// RFC 5321 §4.4. The spool gives a message its id when it is appended, so the id here is another one; it finds the
    /// message in the events by its Message-ID and session all the same.
    fn write_received(&self, received: &Received, names: &MessageNames, date: &str, out: &mut Vec<u8>) {
        if received.received_detail == ReceivedDetail::None {
            return;
        }
        out.extend_from_slice(b"Received:");
        match received.client.filter(|_| received.received_detail == ReceivedDetail::Full) {
            Some(client) => {
                let address = match client.ip().to_canonical() {
                    std::net::IpAddr::V4(address) => format!("[{address}]"),
                    std::net::IpAddr::V6(address) => format!("[IPv6:{address}]"),
                };
                let helo = if received.helo.is_empty() { &address } else { &received.helo };
                let _ = write!(out, " from {helo} ({address})\r\n\t");
            }
            None => out.push(b' '),
        }
        let _ = write!(out, "by {} with {} id {:016x}", self.hostname, received.protocol, names.public);
        // RFC 5321 §7.6: with several recipients it would tell each of the others.
        if let [recipient] = &received.recipients[..] {
            let _ = write!(out, "\r\n\tfor <{recipient}>");
        }
        let _ = write!(out, ";\r\n\t{date}\r\n");
    }
}

/// By the names that X-Virtual-MTA may ask for.
fn sources_in_use(config: &Config) -> impl Iterator<Item = String> {
    config.egress_sources.iter().filter(|source| !source.is_retired).map(|source| source.name.clone())
}

/// Two names for one message, neither of which tells the other.
struct MessageNames {
    /// For Message-ID and Received.
    public: u64,
    /// For X-Postrider-Ref: 128 bits.
    secret: String,
}

impl MessageNames {
    fn derive(random: [u64; 2]) -> Self {
        let mut seed = [0; 16];
        seed[..8].copy_from_slice(&random[0].to_le_bytes());
        seed[8..].copy_from_slice(&random[1].to_le_bytes());
        let digest = digest::digest(&digest::SHA256, &seed);
        let number = |octets: &[u8]| octets.iter().fold(0, |number, octet| number << 8 | u128::from(*octet));
        let (secret, rest) = digest.as_ref().split_at(SECRET_BYTES);
        Self { public: number(&rest[..8]) as u64, secret: format!("{:032x}", number(secret)) }
    }
}

/// One look at the header block.
#[derive(Debug, Default)]
struct Scan {
    removed: Vec<Range<usize>>,
    has_date: bool,
    has_message_id: bool,
    received_fields: usize,
    /// That signatures go by.
    from_domain: Option<String>,
    from: FromDomains,
    tenant: Option<String>,
    campaign: Option<String>,
    job: Option<String>,
    virtual_mta: Option<String>,
    schedule: Option<String>,
    /// A field that steers and says different things.
    contradictory: Option<&'static str>,
    captured: Vec<(String, String)>,
    header_end: usize,
    body_start: usize,
    /// The content has no header block at all, nor the empty line in its place.
    all_body: bool,
}

impl Scan {
    fn of(content: &[u8], captured: &[NamePattern]) -> Self {
        let mut scan = Self::default();
        let mut lines = header::lines(content);
        let mut broken = false;
        for line in lines.by_ref() {
            match line {
                Line::Field(field) => {
                    scan.header_end = field.end;
                    scan.look_at(&field, broken);
                    if !broken {
                        capture(captured, &mut scan.captured, field.name, field.value);
                    }
                }
                // A mailbox file's separator that came along is no reason to take the header for a body.
                Line::Junk { start: 0, end } if content.starts_with(b"From ") => scan.header_end = end,
                Line::Junk { start: 0, .. } => return Self { all_body: true, ..Self::default() },
                Line::Junk { end, .. } => {
                    scan.header_end = end;
                    broken = true;
                }
            }
        }
        scan.body_start = lines.body_start();
        scan
    }

    fn look_at(&mut self, field: &Field<'_>, broken: bool) {
        if field.is("Received") {
            self.received_fields += 1;
        } else if field.is("Date") {
            self.has_date = true;
        } else if field.is("Message-ID") {
            self.has_message_id = true;
        } else if field.is("From") {
            let first = self.from.add(field.value);
            self.from_domain = self.from_domain.take().or(first);
        } else if !broken && REMOVED_FIELDS.iter().any(|name| field.is(name)) {
            self.removed.push(field.range());
            self.steered_by(field);
        }
    }

    /// An empty one says nothing.
    fn steered_by(&mut self, field: &Field<'_>) {
        let steering = [
            ("X-Tenant", &mut self.tenant),
            ("X-Campaign", &mut self.campaign),
            ("X-Job", &mut self.job),
            ("X-Virtual-MTA", &mut self.virtual_mta),
            ("X-Schedule", &mut self.schedule),
        ];
        let Some((name, slot)) = steering.into_iter().find(|(name, _)| field.is(name)) else { return };
        let value = header::unfold(field.value);
        match slot {
            _ if value.is_empty() => {}
            None => *slot = Some(value),
            Some(before) if *before == value => {}
            Some(_) => self.note_contradiction(name),
        }
    }

    /// Of several, the first by name is told, in whatever order they stand.
    fn note_contradiction(&mut self, name: &'static str) {
        self.contradictory = Some(self.contradictory.map_or(name, |other| other.min(name)));
    }
}

/// Where a message goes and when, as far as its sender may say.
#[derive(Debug)]
struct Steering {
    campaign: String,
    egress_pool: String,
    first_attempt_ms: u64,
    expires_ms: Option<u64>,
}

/// The X-Schedule field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Schedule {
    first_attempt: Option<String>,
    expires: Option<String>,
}

impl Steering {
    fn at(now: Now, tenant: Option<&Tenant>) -> Self {
        Self {
            campaign: String::new(),
            egress_pool: tenant.map_or(DEFAULT_POOL, |tenant| &tenant.egress_pool).to_owned(),
            first_attempt_ms: now.wall_ms,
            expires_ms: None,
        }
    }

    fn schedule(&mut self, text: &str, now: Now) -> Result<(), String> {
        if text.len() > SCHEDULE_FIELD_BYTES_MAX {
            return Err("too long".to_owned());
        }
        let Object(schedule): Object<Schedule> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if let Some(first_attempt) = schedule.first_attempt {
            self.first_attempt_ms = parse_time("first_attempt", &first_attempt)?.max(now.wall_ms);
        }
        if let Some(expires) = schedule.expires {
            let expires_ms = parse_time("expires", &expires)?;
            if expires_ms <= self.first_attempt_ms {
                return Err("expires before the first attempt".to_owned());
            }
            self.expires_ms = Some(expires_ms);
        }
        Ok(())
    }
}

/// RFC 3339 → Unix milliseconds; times before 1970 are 1970.
fn parse_time(key: &str, text: &str) -> Result<u64, String> {
    let time: jiff::Timestamp = text.parse().map_err(|_| format!("{key} is no RFC 3339 time"))?;
    Ok(u64::try_from(time.as_millisecond()).unwrap_or(0))
}

fn check_routing_name(field: &str, name: &str) -> Result<(), Refusal> {
    if name.len() > ROUTING_NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(Refusal::new(550, (5, 6, 0), format!("{field}: the name is too long or not printable")));
    }
    Ok(())
}

/// A name of `[events] headers` or `meta`; a `*` at its end stands for any rest.
#[derive(Debug)]
struct NamePattern {
    name: Vec<u8>,
    prefix_only: bool,
}

impl NamePattern {
    fn new(pattern: &str) -> Self {
        let prefix = pattern.strip_suffix('*');
        Self { name: prefix.unwrap_or(pattern).as_bytes().to_vec(), prefix_only: prefix.is_some() }
    }

    fn fits(&self, name: &[u8]) -> bool {
        let start = name.get(..self.name.len()).is_some_and(|start| start.eq_ignore_ascii_case(&self.name));
        start && (self.prefix_only || name.len() == self.name.len())
    }
}

fn capture(patterns: &[NamePattern], captured: &mut Vec<(String, String)>, name: &[u8], value: &[u8]) {
    if captured.len() >= CAPTURED_FIELDS_MAX || !patterns.iter().any(|pattern| pattern.fits(name)) {
        return;
    }
    let mut value = header::unfold(value);
    value.truncate(value.floor_char_boundary(CAPTURED_VALUE_BYTES_MAX));
    captured.push((String::from_utf8_lossy(name).into_owned(), value));
}

/// Closes the gaps in place; `ranges` are in order and apart. Without any, nothing is touched.
fn remove_ranges(content: &mut Vec<u8>, ranges: &[Range<usize>]) {
    let Some(first) = ranges.first() else { return };
    let mut end = first.start;
    for (number, range) in ranges.iter().enumerate() {
        let next = ranges.get(number + 1).map_or(content.len(), |next| next.start);
        content.copy_within(range.end..next, end);
        end += next - range.end;
    }
    content.truncate(end);
}

/// RFC 5321 §4.5.2. What we put in front has no such line, and ends with CRLF.
fn has_dot_lines(content: &[u8]) -> bool {
    content.starts_with(b".") || memmem::find(content, b"\r\n.").is_some()
}

const REMOVED_FIELDS: &[&str] =
    &["X-Tenant", "X-Campaign", "X-Job", "X-Virtual-MTA", "X-Schedule", "Return-Path", "Bcc"];
const FEEDBACK_REFERENCE: &str = "X-Postrider-Ref";
const DEFAULT_POOL: &str = "default";
const SECRET_BYTES: usize = 16;
const PREFIX_BYTES_TYPICAL: usize = 512;

#[cfg(test)]
mod tests;
