//! The sink's books: what arrived, from whom, when, and whether twice.
//!
//! A message is known by its `X-Bench-Id`, else by its Message-ID together with each recipient, so that a list message
//! that reaches two recipients in two transactions is no duplicate.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use memchr::memmem;
use serde::Serialize;
use tokio::sync::Notify;

use super::faults::Stage;
use super::session::ReceivedMessage;
use crate::message::BenchId;
use crate::report::{Latencies, LatencySummary};

/// Shared by a sink's threads and whoever waits for its counts.
#[derive(Debug)]
pub struct Ledger {
    books: Mutex<Books>,
    reached: Notify,
    audit: bool,
}

#[derive(Debug)]
struct Books {
    messages: u64,
    recipients: u64,
    bytes: u64,
    chunked: u64,
    duplicates: u64,
    without_id: u64,
    refused: BTreeMap<&'static str, u64>,
    greylisted: u64,
    tls: BTreeMap<String, u64>,
    tls_failed: u64,
    connections_open: u64,
    connections_high: u64,
    peers: HashMap<IpAddr, Peer>,
    /// Per run of the injector, how often each sequence came (255 stays 255).
    seen: HashMap<u64, Vec<u8>>,
    seen_elsewhere: HashMap<Box<[u8]>, u32>,
    first: Option<Instant>,
    last: Option<Instant>,
    /// The last moments' arrivals, for the audit of kills.
    recent: VecDeque<Instant>,
    latencies: Latencies,
    target: Option<u64>,
}

#[derive(Debug, Default)]
struct Peer {
    connections: u64,
    messages: u64,
    recipients: u64,
    ehlo: BTreeMap<String, u64>,
}

/// What a sink reports at its end.
#[derive(Debug, Clone, Serialize)]
pub struct SinkSummary {
    pub messages: u64,
    /// Transactions' recipients, all messages together.
    pub recipients: u64,
    /// Message octets on the wire.
    pub bytes: u64,
    /// Messages that came by BDAT.
    pub chunked: u64,
    /// Arrivals beyond the first of the same message.
    pub duplicates: u64,
    pub messages_without_id: u64,
    pub connections: u64,
    pub connections_open_max: u64,
    pub refused: BTreeMap<&'static str, u64>,
    pub greylisted: u64,
    /// Handshakes by version and kind: `TLSv1_3 full`, `TLSv1_3 resumed`.
    pub tls: BTreeMap<String, u64>,
    pub tls_failed: u64,
    /// From the first message to the last.
    pub seconds: f64,
    pub messages_per_second: f64,
    pub mb_per_second: f64,
    /// From `X-Bench-Sent` to the answer to the final dot.
    pub end_to_end: Option<LatencySummary>,
    pub peers: BTreeMap<IpAddr, PeerSummary>,
}

#[derive(Debug, Clone, Serialize)]
pub struct PeerSummary {
    pub connections: u64,
    pub messages: u64,
    pub recipients: u64,
    /// Names given by EHLO or HELO, and how often.
    pub ehlo: BTreeMap<String, u64>,
}

/// The quickly changing counts.
#[derive(Debug, Clone, Copy)]
pub struct Totals {
    pub messages: u64,
    pub duplicates: u64,
    pub bytes: u64,
    pub refused: u64,
    pub connections_open: u64,
    pub first: Option<Instant>,
    pub last: Option<Instant>,
}

impl Totals {
    /// Messages counted once each.
    pub fn distinct(&self) -> u64 {
        self.messages - self.duplicates
    }
}

impl Ledger {
    /// Without `audit` duplicates are not looked for, which saves memory for each message.
    pub fn new(audit: bool) -> Self {
        let books = Books {
            messages: 0,
            recipients: 0,
            bytes: 0,
            chunked: 0,
            duplicates: 0,
            without_id: 0,
            refused: BTreeMap::new(),
            greylisted: 0,
            tls: BTreeMap::new(),
            tls_failed: 0,
            connections_open: 0,
            connections_high: 0,
            peers: HashMap::new(),
            seen: HashMap::new(),
            seen_elsewhere: HashMap::new(),
            first: None,
            last: None,
            recent: VecDeque::new(),
            latencies: Latencies::new(),
            target: None,
        };
        Self { books: Mutex::new(books), reached: Notify::new(), audit }
    }

    pub(super) fn connected(&self, peer: IpAddr) {
        let mut books = self.books();
        books.connections_open += 1;
        books.connections_high = books.connections_high.max(books.connections_open);
        books.peers.entry(peer).or_default().connections += 1;
    }

    pub(super) fn disconnected(&self) {
        self.books().connections_open -= 1;
    }

    pub(super) fn greeted(&self, peer: IpAddr, ehlo: &str) {
        *self.books().peers.entry(peer).or_default().ehlo.entry(ehlo.to_owned()).or_default() += 1;
    }

    pub(super) fn refused(&self, stage: Stage) {
        *self.books().refused.entry(stage.name()).or_default() += 1;
    }

    pub(super) fn greylisted(&self) {
        self.books().greylisted += 1;
    }

    pub(super) fn secured(&self, how: String) {
        *self.books().tls.entry(how).or_default() += 1;
    }

    pub(super) fn tls_failed(&self) {
        self.books().tls_failed += 1;
    }

    /// Enters a message; gives its number.
    pub(super) fn received(&self, message: &ReceivedMessage<'_>) -> u64 {
        let marks = Marks::find(message.content);
        let mut books = self.books();
        books.messages += 1;
        books.recipients += message.recipients.len() as u64;
        books.bytes += message.wire_bytes;
        books.chunked += u64::from(message.chunked);
        let peer = books.peers.entry(message.peer).or_default();
        peer.messages += 1;
        peer.recipients += message.recipients.len() as u64;
        if self.audit {
            books.audit(&marks, message.recipients);
        }
        books.first.get_or_insert(message.now);
        books.last = Some(message.now);
        books.note_arrival(message.now);
        if let Some(latency) = marks.sent_unix_ns.and_then(since_unix_ns) {
            books.latencies.record(latency);
        }
        if books.target.is_some_and(|target| books.messages - books.duplicates >= target) {
            books.target = None;
            self.reached.notify_one();
        }
        books.messages
    }

    /// Waits until `count` different messages have arrived. One waiter at a time.
    pub async fn wait_for(&self, count: u64) {
        loop {
            {
                let mut books = self.books();
                if books.messages - books.duplicates >= count {
                    books.target = None;
                    return;
                }
                books.target = Some(count);
            }
            self.reached.notified().await;
        }
    }

    pub fn totals(&self) -> Totals {
        let books = self.books();
        Totals {
            messages: books.messages,
            duplicates: books.duplicates,
            bytes: books.bytes,
            refused: books.refused.values().sum::<u64>() + books.greylisted,
            connections_open: books.connections_open,
            first: books.first,
            last: books.last,
        }
    }

    /// Arrivals between `from` and `to`, of the last [`ARRIVALS_KEPT_FOR`].
    pub fn arrivals_between(&self, from: Instant, to: Instant) -> u64 {
        self.books().recent.iter().filter(|arrival| (from..=to).contains(*arrival)).count() as u64
    }

    /// How often a message of the injector's came.
    pub fn times_seen(&self, id: BenchId) -> u8 {
        let books = self.books();
        books.seen.get(&id.run).and_then(|run| run.get(usize::try_from(id.sequence).ok()?)).copied().unwrap_or(0)
    }

    /// How many different messages of one run came.
    pub fn distinct_of_run(&self, run: u64) -> u64 {
        self.books().seen.get(&run).map_or(0, |run| run.iter().filter(|times| **times > 0).count() as u64)
    }

    pub fn latencies(&self) -> Latencies {
        self.books().latencies.clone()
    }

    /// Counts anew from here, for what was only to warm up. Connections stay.
    pub fn forget_messages(&self) {
        let mut books = self.books();
        books.messages = 0;
        books.recipients = 0;
        books.bytes = 0;
        books.chunked = 0;
        books.duplicates = 0;
        books.without_id = 0;
        books.refused.clear();
        books.greylisted = 0;
        books.seen.clear();
        books.seen_elsewhere.clear();
        books.first = None;
        books.last = None;
        books.latencies.clear();
        for peer in books.peers.values_mut() {
            peer.messages = 0;
            peer.recipients = 0;
        }
    }

    pub fn summary(&self) -> SinkSummary {
        let books = self.books();
        let seconds = books.first.zip(books.last).map_or(0.0, |(first, last)| (last - first).as_secs_f64());
        let per_second = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
        let peer_summary = |peer: &Peer| PeerSummary {
            connections: peer.connections,
            messages: peer.messages,
            recipients: peer.recipients,
            ehlo: peer.ehlo.clone(),
        };
        SinkSummary {
            messages: books.messages,
            recipients: books.recipients,
            bytes: books.bytes,
            chunked: books.chunked,
            duplicates: books.duplicates,
            messages_without_id: books.without_id,
            connections: books.peers.values().map(|peer| peer.connections).sum(),
            connections_open_max: books.connections_high,
            refused: books.refused.clone(),
            greylisted: books.greylisted,
            tls: books.tls.clone(),
            tls_failed: books.tls_failed,
            seconds,
            messages_per_second: per_second(books.messages as f64),
            mb_per_second: per_second(books.bytes as f64 / 1e6),
            end_to_end: books.latencies.summary(),
            peers: books.peers.iter().map(|(address, peer)| (*address, peer_summary(peer))).collect(),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // A panic ends the process (`abort_on_panic`), or the test.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    fn audit(&mut self, marks: &Marks<'_>, recipients: &[Vec<u8>]) {
        match (marks.bench_id, marks.message_id) {
            // A sequence beyond the bound is not ours; it must not make us reserve that much.
            (Some(id), _) if id.sequence < SEQUENCES_MAX => {
                let run = self.seen.entry(id.run).or_default();
                let place = id.sequence as usize;
                if run.len() <= place {
                    run.resize((place + 1).next_power_of_two(), 0);
                }
                self.duplicates += u64::from(run[place] > 0);
                run[place] = run[place].saturating_add(1);
            }
            (_, Some(message_id)) => {
                let mut again = false;
                for recipient in recipients {
                    let times = self.seen_elsewhere.entry([message_id, b"\0", recipient].concat().into()).or_default();
                    *times += 1;
                    again |= *times > 1;
                }
                self.duplicates += u64::from(again);
            }
            _ => self.without_id += 1,
        }
    }

    fn note_arrival(&mut self, now: Instant) {
        while self.recent.front().is_some_and(|oldest| now.duration_since(*oldest) > ARRIVALS_KEPT_FOR) {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
    }
}

/// What the audit looks for in a header.
#[derive(Debug, Default, PartialEq, Eq)]
struct Marks<'a> {
    bench_id: Option<BenchId>,
    message_id: Option<&'a [u8]>,
    sent_unix_ns: Option<u64>,
}

impl<'a> Marks<'a> {
    fn find(content: &'a [u8]) -> Self {
        let header = memmem::find(content, b"\r\n\r\n").map_or(content, |end| &content[..end + 2]);
        let bench_id = field(header, b"\r\nX-Bench-Id:").and_then(BenchId::parse);
        let sent = field(header, b"\r\nX-Bench-Sent:").and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
        let message_id = if bench_id.is_some() { None } else { message_id(header) };
        Self { bench_id, message_id, sent_unix_ns: sent }
    }
}

/// The value of a field that the injector wrote, hence in this very spelling.
fn field<'a>(header: &'a [u8], start: &[u8]) -> Option<&'a [u8]> {
    let value = &header[memmem::find(header, start)? + start.len()..];
    Some(value[..memchr::memchr(b'\r', value)?].trim_ascii())
}

/// Anybody's Message-ID, in any spelling.
fn message_id(header: &[u8]) -> Option<&[u8]> {
    const NAME: &[u8] = b"message-id:";
    let line = header
        .split(|c| *c == b'\n')
        .find(|line| line.len() > NAME.len() && line[..NAME.len()].eq_ignore_ascii_case(NAME))?;
    let value = line[NAME.len()..].trim_ascii();
    (!value.is_empty()).then_some(value)
}

fn since_unix_ns(sent: u64) -> Option<Duration> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    // Clocks of two machines may disagree: what seems to come from the future took no time.
    Some(now.saturating_sub(Duration::from_nanos(sent)))
}

pub const ARRIVALS_KEPT_FOR: Duration = Duration::from_millis(500);
const SEQUENCES_MAX: u64 = 1 << 31;

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn enter(ledger: &Ledger, header: &str, recipients: &[&str]) {
        let recipients: Vec<Vec<u8>> = recipients.iter().map(|recipient| recipient.as_bytes().to_vec()).collect();
        let content = format!("{header}\r\n\r\nMessage-ID: <not this one>\r\n");
        ledger.received(&ReceivedMessage {
            peer: Ipv4Addr::LOCALHOST.into(),
            ehlo: "a",
            mail: b"<>",
            recipients: &recipients,
            content: content.as_bytes(),
            wire_bytes: content.len() as u64,
            chunked: false,
            whole: true,
            now: Instant::now(),
        });
    }

    #[test]
    fn duplicates_are_found_by_bench_id() {
        let ledger = Ledger::new(true);
        let ids = [(1, 0), (1, 1), (2, 0), (1, 1), (1, 1)];
        for (run, sequence) in ids {
            enter(&ledger, &format!("A: b\r\nX-Bench-Id: {}", BenchId { run, sequence }), &["<r@b>"]);
        }
        let totals = ledger.totals();
        assert_eq!((totals.messages, totals.duplicates, totals.distinct()), (5, 2, 3));
        assert_eq!(ledger.times_seen(BenchId { run: 1, sequence: 1 }), 3);
        assert_eq!(ledger.times_seen(BenchId { run: 1, sequence: 9 }), 0);
        assert_eq!(ledger.distinct_of_run(1), 2);
        // An absurd sequence costs no memory and is no match.
        enter(&ledger, "A: b\r\nX-Bench-Id: 0000000000000001-999999999999", &["<r@b>"]);
        assert_eq!(ledger.totals().duplicates, 2);
        assert_eq!(ledger.summary().messages_without_id, 1);
    }

    #[test]
    fn duplicates_are_found_by_message_id_and_recipient() {
        let ledger = Ledger::new(true);
        enter(&ledger, "Subject: x\r\nMESSAGE-Id:  <1@a>", &["<r@b>"]);
        enter(&ledger, "Message-ID: <1@a>", &["<other@b>"]);
        assert_eq!(ledger.totals().duplicates, 0);
        enter(&ledger, "message-id: <1@a>", &["<new@b>", "<r@b>"]);
        assert_eq!(ledger.totals().duplicates, 1);
        enter(&ledger, "Subject: none", &["<r@b>"]);
        assert_eq!(ledger.summary().messages_without_id, 1);
    }

    #[test]
    fn end_to_end_latency_comes_from_the_header() {
        let ledger = Ledger::new(false);
        let sent = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() - Duration::from_millis(300);
        enter(&ledger, &format!("A: b\r\nX-Bench-Sent: {:020}", sent.as_nanos()), &["<r@b>"]);
        let summary = ledger.summary().end_to_end.unwrap();
        assert_eq!(summary.count, 1);
        assert!((300.0..5_000.0).contains(&summary.p50_ms), "{summary:?}");
        ledger.forget_messages();
        assert!(ledger.summary().end_to_end.is_none());
        assert_eq!(ledger.totals().messages, 0);
    }
}
