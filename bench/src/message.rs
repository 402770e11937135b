//! The messages that the injector sends: sizes and recipient domains drawn from distributions, a unique
//! `X-Bench-Id` in each, and the time at which it was due in `X-Bench-Sent`.
//!
//! Everything but a few fields of fixed width is made once per size, so that a message costs a few copies:
//! what is measured is the engine, on the same cores.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;

use crate::units::parse_bytes;

/// Names a message across processes: which run of the injector, which message of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BenchId {
    pub run: u64,
    pub sequence: u64,
}

impl fmt::Display for BenchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:012}", self.run, self.sequence)
    }
}

impl BenchId {
    /// Reads what `Display` wrote; `None` for anything else.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?.trim();
        let (run, sequence) = text.split_once('-')?;
        if run.len() != 16 || sequence.len() != SEQUENCE_DIGITS {
            return None;
        }
        Some(Self { run: u64::from_str_radix(run, 16).ok()?, sequence: sequence.parse().ok()? })
    }
}

/// The recipient domain of this number, where there are several.
pub fn numbered_domain(number: usize, recipient_domain: &str) -> String {
    format!("d{number:06}.{recipient_domain}")
}

/// The sender domain of this number, where there are several tenants.
pub fn tenant_domain(number: usize, sender_domain: &str) -> String {
    format!("t{number:06}.{sender_domain}")
}

/// A number that no other run draws.
pub fn draw_run_id() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Message sizes (octets of the whole message, before dot-stuffing) with their weights: `2k`, or `1k:70,4k:25,100k:5`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sizes(Vec<(usize, f64)>);

impl Sizes {
    pub fn fixed(bytes: usize) -> Self {
        Self(vec![(bytes, 1.0)])
    }

    /// The mean size in octets.
    pub fn mean(&self) -> f64 {
        let total: f64 = self.0.iter().map(|(_, weight)| weight).sum();
        self.0.iter().map(|(bytes, weight)| *bytes as f64 * weight).sum::<f64>() / total
    }
}

impl FromStr for Sizes {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut sizes = Vec::new();
        for part in text.split(',') {
            let (bytes, weight) = match part.split_once(':') {
                Some((bytes, weight)) => {
                    (bytes, weight.trim().parse().with_context(|| format!("weight {weight:?} is not a number"))?)
                }
                None => (part, 1.0),
            };
            ensure!(weight > 0.0, "weight {weight} in {text:?} is not above 0");
            let bytes = parse_bytes(bytes)?;
            ensure!(bytes <= MESSAGE_BYTES_MAX, "{bytes} octets are above the limit of {MESSAGE_BYTES_MAX}");
            sizes.push((bytes, weight));
        }
        Ok(Self(sizes))
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = match self.0.as_slice() {
            [(bytes, _)] => vec![bytes.to_string()],
            several => several.iter().map(|(bytes, weight)| format!("{bytes}:{weight}")).collect(),
        };
        f.write_str(&parts.join(","))
    }
}

/// What all messages of a run have in common.
#[derive(Debug, Clone)]
pub struct Stock {
    run: u64,
    sender: String,
    recipient_domain: String,
    domains: Option<Zipf>,
    tenants: Option<Zipf>,
    header: Arc<[u8]>,
    places: Places,
    bodies: Vec<Body>,
    size_weights: Cumulative,
}

#[derive(Debug, Clone)]
struct Body {
    /// Stuffed, with the terminating dot.
    wire: Arc<[u8]>,
    /// Octets of the whole message as SIZE counts them (RFC 1870 §3: before dot-stuffing).
    message_bytes: usize,
}

/// Where the fields of fixed width begin in the header.
#[derive(Debug, Clone, Copy)]
struct Places {
    sequence: [usize; 4],
    sent: usize,
    domain: Option<usize>,
    tenant: Option<usize>,
}

/// How a [`Stock`] is made.
#[derive(Debug, Clone)]
pub struct StockOptions {
    pub run: u64,
    pub sender: String,
    pub recipient_domain: String,
    /// How many recipient domains; above one they are `d000007.<recipient_domain>`, drawn by Zipf's law.
    pub domains: usize,
    /// How many tenants; above one each sends from a domain of its own, `t000007.<sender's domain>`, drawn likewise.
    pub tenants: usize,
    /// Of Zipf's law; 0 draws them evenly.
    pub domain_exponent: f64,
    pub sizes: Sizes,
    /// Every third body line begins with a dot.
    pub dotted: bool,
    /// `X-Schedule` asks for no attempt before this.
    pub first_attempt: Option<Timestamp>,
}

impl Stock {
    pub fn new(options: &StockOptions) -> Result<Self> {
        ensure!((1..=DOMAINS_MAX).contains(&options.domains), "domains: write 1 to {DOMAINS_MAX}");
        ensure!((1..=DOMAINS_MAX).contains(&options.tenants), "tenants: write 1 to {DOMAINS_MAX}");
        let many = options.domains > 1;
        let many_tenants = options.tenants > 1;
        let (local, sender_domain) =
            options.sender.rsplit_once('@').with_context(|| format!("{:?} is no address", options.sender))?;
        let sender =
            if many_tenants { format!("{local}@{TENANT_MARK}.{sender_domain}") } else { options.sender.clone() };
        let domain =
            if many { format!("{DOMAIN_MARK}.{}", options.recipient_domain) } else { options.recipient_domain.clone() };
        let date = jiff::fmt::rfc2822::to_string(&Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC))?;
        let run = options.run;
        let schedule = options.first_attempt.map_or_else(String::new, |first_attempt| {
            format!("X-Schedule: {{\"first_attempt\":\"{first_attempt:.3}\"}}\r\n")
        });
        let header = format!(
            "{schedule}From: Postbench <{sender}>\r\nTo: <r{SEQUENCE_MARK}@{domain}>\r\n\
             Subject: Postbench message {SEQUENCE_MARK}\r\nDate: {date}\r\n\
             Message-ID: <{run:016x}.{SEQUENCE_MARK}@postbench.test>\r\n\
             X-Bench-Id: {run:016x}-{SEQUENCE_MARK}\r\nX-Bench-Sent: {SENT_MARK}\r\nMIME-Version: 1.0\r\n\
             Content-Type: text/plain; charset=us-ascii\r\n\r\n",
        );
        let places = Places::find(&header, many, many_tenants)?;
        let mut bodies = Vec::new();
        for (bytes, _) in &options.sizes.0 {
            let body = plain_body(bytes.saturating_sub(header.len()), options.dotted);
            let mut wire = Vec::with_capacity(body.len() + body.len() / 64 + 3);
            stuff(&body, &mut wire);
            bodies.push(Body { wire: wire.into(), message_bytes: header.len() + body.len() });
        }
        Ok(Self {
            run,
            sender,
            recipient_domain: options.recipient_domain.clone(),
            domains: many.then(|| Zipf::new(options.domains, options.domain_exponent)),
            tenants: many_tenants.then(|| Zipf::new(options.tenants, options.domain_exponent)),
            header: header.into_bytes().into(),
            places,
            bodies,
            size_weights: Cumulative::new(options.sizes.0.iter().map(|(_, weight)| *weight)),
        })
    }

    pub fn run(&self) -> u64 {
        self.run
    }
}

/// One session's message in the making; its buffers are reused from message to message.
#[derive(Debug)]
pub struct Draft {
    stock: Arc<Stock>,
    random: Random,
    /// MAIL and RCPT are apart, for clients that wait for each answer.
    pub mail: Vec<u8>,
    pub rcpt: Vec<u8>,
    pub header: Vec<u8>,
    pub body: Arc<[u8]>,
    pub message_bytes: usize,
}

impl Draft {
    pub fn new(stock: Arc<Stock>, seed: u64) -> Self {
        let header = stock.header.to_vec();
        let body = stock.bodies[0].wire.clone();
        Self { stock, random: Random::new(seed), mail: Vec::new(), rcpt: Vec::new(), header, body, message_bytes: 0 }
    }

    /// Draws the next message. `sent_unix_ns` is when it was due, by the wall clock.
    pub fn write(&mut self, sequence: u64, sent_unix_ns: u64, declare_size: bool) {
        use std::io::Write as _;
        let stock = &self.stock;
        let body = &stock.bodies[stock.size_weights.draw(&mut self.random)];
        self.body = body.wire.clone();
        self.message_bytes = body.message_bytes;
        let mut digits = [b'0'; SEQUENCE_DIGITS];
        write_digits(&mut digits, sequence);
        for place in stock.places.sequence {
            self.header[place..place + SEQUENCE_DIGITS].copy_from_slice(&digits);
        }
        write_digits(&mut self.header[stock.places.sent..stock.places.sent + SENT_MARK.len()], sent_unix_ns);
        self.mail.clear();
        self.rcpt.clear();
        // Writing into a Vec cannot fail.
        let _ = write!(self.mail, "MAIL FROM:<{}>", stock.sender);
        if let (Some(zipf), Some(place)) = (&stock.tenants, stock.places.tenant) {
            let field = &mut self.header[place..place + TENANT_MARK.len()];
            field[0] = b't';
            write_digits(&mut field[1..], zipf.0.draw(&mut self.random) as u64);
            if let Some(mark) = memchr::memmem::find(&self.mail, TENANT_MARK.as_bytes()) {
                self.mail[mark..mark + TENANT_MARK.len()].copy_from_slice(field);
            }
        }
        if declare_size {
            let _ = write!(self.mail, " SIZE={}", body.message_bytes);
        }
        self.mail.extend_from_slice(b"\r\n");
        self.rcpt.extend_from_slice(b"RCPT TO:<r");
        self.rcpt.extend_from_slice(&digits);
        self.rcpt.push(b'@');
        if let (Some(zipf), Some(place)) = (&stock.domains, stock.places.domain) {
            let field = &mut self.header[place..place + DOMAIN_MARK.len()];
            field[0] = b'd';
            write_digits(&mut field[1..], zipf.0.draw(&mut self.random) as u64);
            self.rcpt.extend_from_slice(field);
            self.rcpt.push(b'.');
        }
        self.rcpt.extend_from_slice(stock.recipient_domain.as_bytes());
        self.rcpt.extend_from_slice(b">\r\n");
    }
}

impl Places {
    fn find(header: &str, many_domains: bool, many_tenants: bool) -> Result<Self> {
        let found: Vec<usize> = header.match_indices(SEQUENCE_MARK).map(|(place, _)| place).collect();
        let Ok(sequence) = <[usize; 4]>::try_from(found) else {
            bail!("sender or recipient domain contains {SEQUENCE_MARK}");
        };
        let sent = header.find(SENT_MARK).context("the header has no place for the time")?;
        let domain = if many_domains { header.find(DOMAIN_MARK) } else { None };
        let tenant = if many_tenants { header.find(TENANT_MARK) } else { None };
        Ok(Self { sequence, sent, domain, tenant })
    }
}

/// `bytes` octets (0, or at least 2) of CRLF lines of 64 octets; the last one is longer or shorter.
pub(crate) fn plain_body(bytes: usize, dotted: bool) -> Vec<u8> {
    let mut body = Vec::with_capacity(bytes);
    let mut line_number = 0;
    while body.len() + 2 <= bytes {
        let left = bytes - body.len();
        // One octet can't be a line of its own.
        let line_bytes = if left == LINE_BYTES + 1 { left } else { left.min(LINE_BYTES) };
        let text_bytes = line_bytes - 2;
        let start = body.len();
        if dotted && line_number % 3 == 0 {
            body.push(b'.');
        }
        while body.len() - start < text_bytes {
            body.push(b'a' + ((body.len() - start + line_number) % 26) as u8);
        }
        body.truncate(start + text_bytes);
        body.extend_from_slice(b"\r\n");
        line_number += 1;
    }
    body
}

/// RFC 5321 §4.5.2: a line's leading dot is doubled; then the lone dot that ends the content.
/// Content that doesn't end with CRLF gets one, as it can't be sent by DATA otherwise.
pub fn stuff(content: &[u8], wire: &mut Vec<u8>) {
    let mut rest = content;
    if rest.first() == Some(&b'.') {
        wire.push(b'.');
    }
    let finder = memchr::memmem::Finder::new(b"\r\n.");
    while let Some(place) = finder.find(rest) {
        wire.extend_from_slice(&rest[..place + 2]);
        wire.push(b'.');
        rest = &rest[place + 2..];
    }
    wire.extend_from_slice(rest);
    if !content.is_empty() && !content.ends_with(b"\r\n") {
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b".\r\n");
}

fn write_digits(field: &mut [u8], mut value: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Zipf's law: the k-th domain is drawn with probability ∝ 1/k^exponent, as real recipients' domains nearly are.
#[derive(Debug, Clone)]
struct Zipf(Cumulative);

impl Zipf {
    fn new(count: usize, exponent: f64) -> Self {
        Self(Cumulative::new((1..=count).map(|rank| (rank as f64).powf(-exponent))))
    }
}

/// Weights summed up from the left, to draw from.
#[derive(Debug, Clone)]
struct Cumulative(Vec<f64>);

impl Cumulative {
    fn new(weights: impl Iterator<Item = f64>) -> Self {
        let mut total = 0.0;
        Self(
            weights
                .map(|weight| {
                    total += weight;
                    total
                })
                .collect(),
        )
    }

    fn draw(&self, random: &mut Random) -> usize {
        let [.., total] = self.0.as_slice() else {
            return 0;
        };
        if self.0.len() == 1 {
            return 0;
        }
        let point = random.unit() * total;
        self.0.partition_point(|sum| *sum <= point).min(self.0.len() - 1)
    }
}

/// SplitMix64: a run is repeatable from its seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

const SEQUENCE_DIGITS: usize = 12;
/// Stands where the sequence goes; as long as the sequence.
const SEQUENCE_MARK: &str = "%%SEQUENCE%%";
/// As long as the nanoseconds of any time to come.
const SENT_MARK: &str = "%%%%%%%%SENT%%%%%%%%";
const DOMAIN_MARK: &str = "%DOMAIN";
const TENANT_MARK: &str = "%TENANT";
const LINE_BYTES: usize = 64;
const MESSAGE_BYTES_MAX: usize = 256 << 20;
const DOMAINS_MAX: usize = 1_000_000;

const _: () = assert!(SEQUENCE_MARK.len() == SEQUENCE_DIGITS);

#[cfg(test)]
mod tests {
    use super::*;

    fn stock(sizes: &str, domains: usize, dotted: bool) -> Arc<Stock> {
        Arc::new(Stock::new(&stock_options(sizes, domains, dotted)).unwrap())
    }

    fn stock_options(sizes: &str, domains: usize, dotted: bool) -> StockOptions {
        StockOptions {
            run: 0x1234,
            sender: "bench@sender.test".into(),
            recipient_domain: "bench.test".into(),
            domains,
            tenants: 1,
            domain_exponent: 1.0,
            sizes: sizes.parse().unwrap(),
            dotted,
            first_attempt: None,
        }
    }

    #[test]
    fn a_first_attempt_is_asked_for_in_the_first_field() {
        let first_attempt = Some("2026-12-01T10:20:30.4Z".parse().unwrap());
        let options = StockOptions { first_attempt, ..stock_options("2k", 1, false) };
        let mut draft = Draft::new(Arc::new(Stock::new(&options).unwrap()), 1);
        draft.write(7, 0, true);
        let field = b"X-Schedule: {\"first_attempt\":\"2026-12-01T10:20:30.400Z\"}\r\nFrom: ";
        assert!(draft.header.starts_with(field), "{}", String::from_utf8_lossy(&draft.header));
        assert_eq!(draft.header.len() + draft.body.len() - 3, 2_048);
    }

    #[test]
    fn an_id_is_read_back_as_written() {
        let id = BenchId { run: 0xfeed, sequence: 42 };
        assert_eq!(id.to_string(), "000000000000feed-000000000042");
        assert_eq!(BenchId::parse(id.to_string().as_bytes()), Some(id));
        assert_eq!(BenchId::parse(b"000000000000feed-42"), None);
        assert_eq!(BenchId::parse(b"\xff"), None);
    }

    #[test]
    fn a_message_has_the_size_asked_for_and_only_full_lines() {
        for size in ["1024", "1025", "1026", "2k", "100k", "2111"] {
            let mut draft = Draft::new(stock(size, 1, false), 1);
            draft.write(7, 1_700_000_000_000_000_000, true);
            assert_eq!(draft.message_bytes, parse_bytes(size).unwrap());
            assert_eq!(draft.header.len() + draft.body.len() - 3, draft.message_bytes);
            assert!(draft.body.ends_with(b"\r\n.\r\n"));
            let header = String::from_utf8(draft.header.clone()).unwrap();
            assert!(header.contains("X-Bench-Id: 0000000000001234-000000000007\r\n"), "{header}");
            assert!(header.contains("X-Bench-Sent: 01700000000000000000\r\n"), "{header}");
            assert!(!header.contains('%'), "{header}");
        }
    }

    #[test]
    fn a_size_below_the_header_gives_an_empty_body() {
        let mut draft = Draft::new(stock("10", 1, false), 1);
        draft.write(7, 0, false);
        assert_eq!(&draft.body[..], b".\r\n");
        assert_eq!(draft.mail, b"MAIL FROM:<bench@sender.test>\r\n");
    }

    #[test]
    fn domains_follow_zipfs_law() {
        let mut draft = Draft::new(stock("1k", 100, false), 1);
        let mut first = 0;
        for sequence in 0..10_000 {
            draft.write(sequence, 0, false);
            assert!(draft.rcpt.ends_with(b".bench.test>\r\n"));
            first += u32::from(draft.rcpt.windows(8).any(|part| part == b"@d000000"));
        }
        // 1 / H(100) = 19.3 %.
        assert!((1_800..2_060).contains(&first), "{first}");
    }

    #[test]
    fn each_tenant_has_a_domain_in_envelope_and_header() {
        let options = StockOptions {
            run: 1,
            sender: "bench@sender.test".into(),
            recipient_domain: "bench.test".into(),
            domains: 1,
            tenants: 3,
            domain_exponent: 0.0,
            sizes: Sizes::fixed(1024),
            dotted: false,
            first_attempt: None,
        };
        let mut draft = Draft::new(Arc::new(Stock::new(&options).unwrap()), 1);
        let mut counts = [0; 3];
        for sequence in 0..3_000 {
            draft.write(sequence, 0, true);
            let mail = String::from_utf8(draft.mail.clone()).unwrap();
            let domain = mail.split(['@', '>']).nth(1).unwrap();
            let header = String::from_utf8(draft.header.clone()).unwrap();
            assert!(header.starts_with(&format!("From: Postbench <bench@{domain}>\r\n")), "{header}");
            assert!(mail.ends_with("> SIZE=1024\r\n"), "{mail}");
            counts[(0..3).find(|number| tenant_domain(*number, "sender.test") == domain).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (850..1_150).contains(count)), "{counts:?}");
    }

    #[test]
    fn domains_are_named_by_number_and_drawn_evenly() {
        let options = StockOptions {
            run: 1,
            sender: "bench@sender.test".into(),
            recipient_domain: "bench.test".into(),
            domains: 4,
            tenants: 1,
            domain_exponent: 0.0,
            sizes: Sizes::fixed(1024),
            dotted: false,
            first_attempt: None,
        };
        let mut draft = Draft::new(Arc::new(Stock::new(&options).unwrap()), 1);
        let last = format!("@{}>\r\n", numbered_domain(3, "bench.test"));
        let mut drawn = 0;
        for sequence in 0..10_000 {
            draft.write(sequence, 0, false);
            drawn += u32::from(draft.rcpt.ends_with(last.as_bytes()));
        }
        assert!((2_350..2_650).contains(&drawn), "{drawn}");
    }

    #[test]
    fn leading_dots_are_doubled() {
        let cases: [(&[u8], &[u8]); 6] = [
            (b"", b".\r\n"),
            (b".\r\n", b"..\r\n.\r\n"),
            (b"a\r\n.b\r\n..c\r\n", b"a\r\n..b\r\n...c\r\n.\r\n"),
            (b"a\n.b\r\n", b"a\n.b\r\n.\r\n"),
            (b"\r\n.\r\n.\r\n", b"\r\n..\r\n..\r\n.\r\n"),
            (b"no end", b"no end\r\n.\r\n"),
        ];
        for (content, expected) in cases {
            let mut wire = Vec::new();
            stuff(content, &mut wire);
            assert_eq!(wire, expected);
        }
    }

    #[test]
    fn size_lists_are_checked() {
        assert_eq!("1k:3,4k:1".parse::<Sizes>().unwrap().mean(), 1792.0);
        assert_eq!("2k".parse::<Sizes>().unwrap().to_string(), "2048");
        assert!("1k:0".parse::<Sizes>().is_err());
        assert!("1k:many".parse::<Sizes>().is_err());
        assert!("1000m".parse::<Sizes>().is_err());
    }
}
