//! Tests of the client: the dialogs in `tests/dialog/client_*.smtp`, what dialogs can't say, and random peers.
//!
//! A dialog is a text, one step a line; `#` begins a comment.
//! ```text
//! set lmtp | required | verified | disabled | no-pipelining | no-chunking | back-to-back | send-8bit | auth |
//!     auth-in-clear | in-doubt-hold              before anything else
//! S: 250 OK               the peer sends a line; adjacent lines come in one read
//! S~ 250 O                the peer sends octets without a line ending; \r, \n, \xNN, \\ are understood
//! C: EHLO us.example      the client has written this line; it must have written nothing else before the next step
//! send A B key=value …    starts a transaction to A and B; keys: from, size, body, prefix, dsn (of MAIL), rcpt-dsn (of
//!                         the recipient before it); flags: 8bit, utf8, dots
//! ride A B key=value …    the same, riding
//! hold / release [N]      writes are no longer reported / reported again, or N octets of them
//! close TEXT | timeout | quit | tls ok | tls failed TEXT | intended
//! -> TEXT                 the next event begins with TEXT, or is "closed"; all events must be named
//! ```
//! Every dialog runs whole and cut into pieces of 1 to 7 octets.

#![expect(clippy::disallowed_methods, reason = "reads dialogs")]

use std::collections::BTreeMap;

use postrider_spool::record::DsnParameters;
use proptest::prelude::*;

use super::*;
use crate::deliver::verdict::{Fate, HostAction, RecipientVerdict, Retry, When};
use crate::limits::STUFF_WINDOW_OCTETS;

#[derive(Debug, Clone)]
struct Text {
    prefix: Vec<u8>,
    body: Vec<u8>,
}

impl Content for Text {
    type Piece = Vec<u8>;
    fn prefix_piece(&self) -> Vec<u8> {
        self.prefix.clone()
    }
    fn body_piece(&self) -> Vec<u8> {
        self.body.clone()
    }
}

/// A client, what it wrote, and a clock.
struct World {
    client: SmtpClient<Text>,
    now: Now,
    /// Written and not yet looked at.
    wire: Vec<u8>,
    unreported: usize,
    holding: bool,
    addresses: BTreeMap<u64, Vec<String>>,
    next_ticket: u64,
}

impl World {
    fn new(options: ClientOptions) -> Self {
        let now = Now::default();
        let client = SmtpClient::new(now, options);
        let (wire, addresses) = (Vec::new(), BTreeMap::new());
        Self { client, now, wire, unreported: 0, holding: false, addresses, next_ticket: 1 }
    }

    /// A client whose session is up; `offers` are the keywords of the EHLO reply.
    fn open(offers: &[&str]) -> Self {
        let mut world = Self::new(options());
        world.receive(b"220 mx\r\n");
        let lines = offers.iter().map(|offer| format!("250-{offer}\r\n")).collect::<String>();
        world.receive(format!("250-mx\r\n{lines}250 HELP\r\n").as_bytes());
        assert_eq!(world.events(), ["idle"]);
        world.wire.clear();
        world
    }

    fn with<R>(&mut self, call: impl FnOnce(&mut SmtpClient<Text>, Now, &mut Vec<Chunk<Vec<u8>>>) -> R) -> R {
        let mut out = Vec::new();
        let result = call(&mut self.client, self.now, &mut out);
        loop {
            let octets = out.iter().map(|chunk| chunk.as_ref().len()).sum::<usize>();
            self.wire.extend(out.drain(..).flat_map(|chunk| chunk.as_ref().to_vec()));
            self.unreported += octets;
            if self.holding || self.unreported == 0 {
                return result;
            }
            self.client.handle_written(self.now, std::mem::take(&mut self.unreported), &mut out);
        }
    }

    fn receive(&mut self, input: &[u8]) {
        self.with(|client, now, out| client.handle(now, input, out));
    }

    fn release(&mut self, octets: usize) {
        let octets = octets.min(self.unreported);
        self.unreported -= octets;
        self.with(|client, now, out| client.handle_written(now, octets, out));
    }

    fn transaction(&mut self, words: &str) -> Transaction<Text> {
        let mut transaction = Transaction {
            ticket: self.next_ticket,
            reverse_path: "from@us.example".into(),
            recipients: [].into(),
            content: Text { prefix: Vec::new(), body: b"Subject: x\r\n\r\nbody\r\n".to_vec() },
            size: 0,
            eight_bit: false,
            smtputf8: false,
            dot_lines: false,
            dsn: DsnParameters::default(),
        };
        let mut size = None;
        let mut recipients = Vec::new();
        for word in words.split_whitespace() {
            match word.split_once('=') {
                Some(("from", path)) => transaction.reverse_path = path.into(),
                Some(("size", octets)) => size = octets.parse().ok(),
                Some(("body", text)) => transaction.content.body = unescape(text),
                Some(("dsn", text)) => transaction.dsn.mail = String::from_utf8(unescape(text)).unwrap(),
                Some(("rcpt-dsn", text)) => {
                    let index = 9 + recipients.len() as u32;
                    transaction.dsn.recipients.push((index, String::from_utf8(unescape(text)).unwrap()));
                }
                Some(("prefix", text)) => transaction.content.prefix = unescape(text),
                Some(_) => panic!("unknown key in {words:?}"),
                None if word == "8bit" => transaction.eight_bit = true,
                None if word == "utf8" => transaction.smtputf8 = true,
                None if word == "dots" => transaction.dot_lines = true,
                None => recipients.push((10 + recipients.len() as u32, word.to_owned())),
            }
        }
        let octets = transaction.content.prefix.len() + transaction.content.body.len();
        transaction.size = size.unwrap_or(octets as u64);
        transaction.recipients = recipients.into();
        self.next_ticket += 1;
        let addresses = transaction.recipients.iter().map(|(_, address)| address.clone()).collect();
        self.addresses.insert(transaction.ticket, addresses);
        transaction
    }

    fn send(&mut self, words: &str) {
        let transaction = self.transaction(words);
        self.with(|client, now, out| client.start(now, transaction, out));
    }

    fn ride(&mut self, words: &str) {
        let transaction = self.transaction(words);
        self.with(|client, _, out| client.ride(transaction, out));
    }

    fn time_out(&mut self) {
        let deadline = self.client.next_timeout().expect("a deadline");
        self.client.handle_timeout(Now { monotonic: deadline - Duration::from_millis(1), ..self.now });
        assert!(self.client.poll_event().is_none(), "not before its time");
        self.now.monotonic = deadline;
        self.client.handle_timeout(self.now);
    }

    /// Each event as the lines that dialogs expect.
    fn events(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(event) = self.client.poll_event() {
            match event {
                ClientEvent::Idle => lines.push("idle".to_owned()),
                ClientEvent::StartTls => lines.push("starttls".to_owned()),
                ClientEvent::Intend { ticket, recipients } => {
                    let addresses = recipients.iter().map(|index| &*self.addresses[&ticket][*index as usize - 10]);
                    lines.push(format!("intend {}", addresses.collect::<Vec<_>>().join(" ")));
                }
                ClientEvent::Closed { failure: None } => lines.push("closed".to_owned()),
                ClientEvent::Closed { failure: Some(failure) } => lines.push(describe_failure(&failure)),
                ClientEvent::Finished(result) => {
                    lines.extend(result.irregularity.map(|irregularity| format!("irregular: {irregularity}")));
                    let addresses = self.addresses.remove(&result.ticket).expect("a transaction ends once");
                    assert_eq!(addresses.len(), result.results.len(), "one verdict per recipient");
                    for (place, ((index, verdict), address)) in result.results.iter().zip(addresses).enumerate() {
                        assert_eq!(*index as usize, 10 + place, "in order, with its own index");
                        lines.push(format!("{address}: {}", describe(verdict)));
                    }
                }
            }
        }
        lines
    }
}

fn options() -> ClientOptions {
    ClientOptions {
        ehlo: "us.example".to_owned(),
        protocol: DeliveryProtocol::Smtp,
        auth: None,
        pipelining: true,
        chunking: Chunking::On,
        max_in_flight: 4,
        in_doubt: InDoubt::Retry,
        eight_bit: EightBit::Fail,
        tls: TlsMode::Opportunistic,
        timeouts: Timeouts::default(),
    }
}

/// Whole transactions in flight.
const WHOLE: Chunking = Chunking::BackToBack;

fn describe(verdict: &RecipientVerdict) -> String {
    let fate = match verdict.fate {
        Fate::Delivered => "delivered",
        Fate::Bounce => "bounces",
        Fate::BounceIfLastHost(_) => "bounces if this is the last host",
        Fate::Hold => "held",
        Fate::Retry(Retry { when: When::AtOnce, counts_attempt: false, in_doubt: false }) => "again at once",
        Fate::Retry(Retry { when: When::Scheduled, counts_attempt: true, in_doubt: false }) => "later",
        Fate::Retry(Retry { when: When::OtherSource, counts_attempt: true, in_doubt: false }) => "from another source",
        Fate::Retry(Retry { when: When::Scheduled, counts_attempt: true, in_doubt: true }) => "later, in doubt",
        Fate::Retry(retry) => panic!("no such retry: {retry:?}"),
    };
    let answer = &verdict.answer;
    let status =
        answer.enhanced.map_or(String::new(), |(class, subject, detail)| format!("{class}.{subject}.{detail} "));
    format!("{fate} ({}) {} {status}{} [{}]", verdict.rule, answer.code, answer.text, answer.command)
}

fn describe_failure(failure: &SessionFailure) -> String {
    let action = match failure.action {
        HostAction::BackOff => "host backs off",
        HostAction::BackOffTls => "host backs off for such TLS",
        HostAction::RetryInClear => "again in the clear",
        HostAction::Pause => "again in a moment",
    };
    let answer = &failure.answer;
    let status =
        answer.enhanced.map_or(String::new(), |(class, subject, detail)| format!("{class}.{subject}.{detail} "));
    format!("closed: {action} ({}) {} {status}{} [{}]", failure.rule, answer.code, answer.text, answer.command)
}

fn unescape(text: &str) -> Vec<u8> {
    let mut octets = Vec::new();
    let mut rest = text.bytes();
    while let Some(octet) = rest.next() {
        octets.push(match (octet, octet == b'\\') {
            (_, true) => match rest.next() {
                Some(b'r') => b'\r',
                Some(b'n') => b'\n',
                Some(b's') => b' ',
                Some(b'\\') => b'\\',
                Some(b'x') => {
                    let digits = [rest.next().unwrap(), rest.next().unwrap()];
                    u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
                }
                other => panic!("unknown escape {other:?} in {text:?}"),
            },
            (octet, false) => octet,
        });
    }
    octets
}

/// Runs a dialog, the peer's octets in pieces of `piece`; panics where it does not go as written.
fn run_dialog(name: &str, text: &str, piece: usize) {
    let lines = text.lines().enumerate().map(|(number, line)| (number + 1, line));
    let mut steps = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')).peekable();
    let mut options = options();
    while let Some((_, words)) = steps.next_if(|(_, line)| line.starts_with("set ")) {
        match &words["set ".len()..] {
            "lmtp" => options.protocol = DeliveryProtocol::Lmtp,
            "no-pipelining" => options.pipelining = false,
            "auth" | "auth-in-clear" => {
                let (username, password) = ("user".to_owned(), "pass".to_owned());
                let without_tls = &words["set ".len()..] == "auth-in-clear";
                options.auth = Some(Credentials { username, password, without_tls });
            }
            "send-8bit" => options.eight_bit = EightBit::Send,
            "no-chunking" => options.chunking = Chunking::Off,
            "back-to-back" => options.chunking = WHOLE,
            "in-doubt-hold" => options.in_doubt = InDoubt::Hold,
            "required" => options.tls = TlsMode::Required,
            "verified" => options.tls = TlsMode::Verified,
            "disabled" => options.tls = TlsMode::Disabled,
            other => panic!("{name}: unknown setting {other:?}"),
        }
    }
    let mut world = World::new(options);
    let mut pending = Vec::<String>::new();
    while let Some((number, line)) = steps.next() {
        let here = format!("{name}:{number} (pieces of {piece}): {line}");
        let (word, argument) = line.split_once(' ').unwrap_or((line, ""));
        if word == "C:" {
            let end =
                world.wire.windows(2).position(|w| w == b"\r\n").unwrap_or_else(|| panic!("{here}\nwrote nothing"));
            let written = world.wire.drain(..end + 2).collect::<Vec<_>>();
            assert_eq!(String::from_utf8_lossy(&written[..end]), argument, "{here}");
            continue;
        }
        if word == "->" {
            assert!(!pending.is_empty(), "{here}\nno event");
            let event = pending.remove(0);
            // "closed" alone says that nobody is to blame.
            let begins = event.starts_with(argument) && (argument != "closed" || event == "closed");
            assert!(begins, "{here}\nbut it is {event}");
            continue;
        }
        assert_eq!(String::from_utf8_lossy(&world.wire), "", "{here}\nwritten before");
        assert_eq!(pending, [""; 0], "{here}\nevents before");
        match word {
            "S:" | "S~" => {
                let mut input = peer_octets(word, argument);
                while let Some((_, line)) = steps.next_if(|(_, line)| line.starts_with("S:") || line.starts_with("S~"))
                {
                    input.extend(peer_octets(&line[..2], line.get(3..).unwrap_or_default()));
                }
                input.chunks(piece).for_each(|input| world.receive(input));
            }
            "send" => world.send(argument),
            "ride" => world.ride(argument),
            "hold" => world.holding = true,
            "release" => {
                world.holding = !argument.is_empty();
                world.release(argument.parse().unwrap_or(usize::MAX));
            }
            "close" => world.client.handle_closed(argument),
            "timeout" => world.time_out(),
            "quit" => world.with(SmtpClient::quit),
            "intended" => world.with(SmtpClient::handle_intended),
            "tls" if argument == "ok" => world.with(SmtpClient::handle_tls_started),
            "tls" => world.client.handle_tls_failed(argument.strip_prefix("failed ").expect("tls ok or tls failed")),
            _ => panic!("{here}\nunknown step"),
        }
        pending = world.events();
    }
    assert_eq!(String::from_utf8_lossy(&world.wire), "", "{name}: written at the end");
    assert_eq!(pending, [""; 0], "{name}: events at the end");
}

fn peer_octets(word: &str, argument: &str) -> Vec<u8> {
    let mut octets = unescape(argument);
    if word == "S:" {
        octets.extend_from_slice(b"\r\n");
    }
    octets
}

#[test]
fn dialogs() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dialog");
    let mut count = 0;
    for entry in std::fs::read_dir(directory).expect("the dialogs") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if !name.starts_with("client_") || !name.ends_with(".smtp") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a text");
        // Where the border of a read decides, the dialog says so.
        let pieces = if text.contains("# in one read") { 0 } else { 7 };
        run_dialog(&name, &text, usize::MAX);
        (1..=pieces).for_each(|piece| run_dialog(&name, &text, piece));
        count += 1;
    }
    assert!(count >= 130, "{count} dialogs");
}

/// All that the peer offers for riding.
const OFFERS: &[&str] = &["PIPELINING", "SIZE", "8BITMIME"];

#[test]
fn the_ride_and_the_end_of_the_content_are_one_write() {
    let mut world = World::open(OFFERS);
    world.send("a@x");
    world.wire.clear();
    world.holding = true;
    world.receive(b"250 ok\r\n250 ok\r\n");
    assert!(!world.client.can_ride(), "not before the content");
    // What the caller does: the content and the ride go to the same out.
    let ride = world.transaction("b@x");
    let mut out = Vec::new();
    world.client.handle(world.now, b"354 go\r\n", &mut out);
    assert!(world.client.can_ride());
    world.client.ride(ride, &mut out);
    assert!(!world.client.can_ride(), "one message in flight, one envelope behind it");
    let chunks = out.iter().map(|c| String::from_utf8_lossy(c.as_ref()).into_owned()).collect::<Vec<_>>();
    assert!(matches!(&out[..], [Chunk::Spool(_), Chunk::Bytes(_)]), "content as it is, one text behind it");
    assert_eq!(chunks[1], ".\r\nRSET\r\nMAIL FROM:<from@us.example> SIZE=20\r\nRCPT TO:<b@x>\r\nDATA\r\n");
    assert_eq!(world.client.in_flight(), 2);
    assert_eq!(world.client.deliveries(), 2);
}

/// What is in flight is sent again where a peer drops the connection: so it is bounded in octets as well.
#[test]
fn only_so_many_octets_are_in_flight() {
    let half = "x".repeat(IN_FLIGHT_OCTETS_MAX as usize / 2);
    for (body, most) in [("x", 4), (&*half, 2)] {
        let mut world = World::new(ClientOptions { chunking: WHOLE, ..options() });
        world.receive(b"220 mx\r\n");
        world.receive(b"250-mx\r\n250-PIPELINING\r\n250 CHUNKING\r\n");
        assert_eq!(world.events(), ["idle"]);
        world.send(&format!("a@x body={body}"));
        let mut in_flight = 1;
        while world.client.can_ride() {
            world.ride(&format!("a@x body={body}"));
            in_flight += 1;
        }
        assert_eq!(in_flight, most);
    }
}

/// RIGHT-ENVELOPE: the peer may keep the reverse path of the first, though we refused the second ourselves.
#[test]
fn a_transaction_that_we_refuse_clears_no_envelope() {
    let mut world = World::open(&["PIPELINING"]);
    world.send("a@x from=first@us.example");
    world.receive(b"250 ok\r\n550 no\r\n503 no\r\n");
    world.send("b@x 8bit");
    assert_eq!(world.events().len(), 4, "both have ended");
    world.wire.clear();
    world.send("c@x");
    assert!(world.wire.starts_with(b"RSET\r\nMAIL"), "{}", world.wire.escape_ascii());
}

#[test]
fn nothing_rides_where_it_must_not() {
    let mut plain = World::open(&["SIZE"]);
    plain.send("a@x");
    assert!(!plain.client.can_ride(), "no PIPELINING");
    let mut world = World::open(OFFERS);
    assert!(!world.client.can_ride(), "nothing to ride behind");
    world.holding = true;
    let body = "x\\r\\n.\\r\\n".repeat(STUFF_WINDOW_OCTETS / 4);
    world.send(&format!("a@x dots body={body}"));
    world.release(usize::MAX);
    world.receive(b"250 ok\r\n250 ok\r\n354 go\r\n");
    assert!(!world.client.can_ride(), "the content is not wholly in out");
    while !world.client.can_ride() {
        assert!(world.unreported > 0);
        assert!(world.unreported < STUFF_WINDOW_OCTETS * 2, "at most a window is copied at a time");
        world.release(usize::MAX);
    }
    world.ride("b@x");
    world.holding = false;
    world.release(usize::MAX);
    world.receive(b"250 ok\r\n");
    assert_eq!(world.events().len(), 1);
}

#[test]
fn each_stage_has_its_own_time() {
    let minutes = |world: &World| world.client.next_timeout().map(|t| (t - world.now.monotonic).as_secs() / 60);
    let mut world = World::open(OFFERS);
    assert_eq!(minutes(&world), None, "idle for as long as the pool likes");
    world.now.monotonic = Duration::from_secs(7);
    world.send("a@x");
    assert_eq!(minutes(&world), Some(5));
    world.now.monotonic += Duration::from_secs(200);
    world.receive(b"250 ok\r\n250 o");
    assert_eq!(minutes(&world), Some(5), "a reply begins the next one's time");
    world.now.monotonic += Duration::from_secs(60);
    world.receive(b"k");
    assert_eq!(minutes(&world), Some(4), "a piece of a reply does not");
    world.holding = true;
    world.receive(b"\r\n354 go\r\n");
    assert_eq!(minutes(&world), Some(3), "for each block of content");
    world.now.monotonic += Duration::from_secs(170);
    world.release(5);
    assert_eq!(minutes(&world), Some(3), "progress begins it again");
    world.holding = false;
    world.release(usize::MAX);
    assert_eq!(minutes(&world), Some(10), "for the reply to the final dot");
    world.now.monotonic += Duration::from_secs(60);
    world.ride("b@x");
    assert_eq!(minutes(&world), Some(9), "the ride does not lengthen it");
    world.receive(b"250 ok\r\n");
    assert_eq!(minutes(&world), Some(5), "now for RSET");
}

#[test]
fn an_endless_reply_is_given_up() {
    let mut world = World::open(OFFERS);
    world.send("a@x");
    for _ in 0..1000 {
        world.receive(b"250-more\r\n");
    }
    let events = world.events();
    assert!(events[0].starts_with("a@x: later (unexpected_reply) 451 4.5.0 the peer's reply has too many lines"));
    assert_eq!(events.len(), 2);
    world.receive(b"250 ok\r\n");
    world.client.handle_closed("end of stream");
    assert_eq!(world.events(), [""; 0], "the end comes once");
}

#[test]
fn what_the_peer_offers_can_be_shown() {
    let world = World::open(OFFERS);
    assert_eq!(world.client.extensions().to_string(), "PIPELINING, 8BITMIME, SIZE");
}

/// A peer that follows RFC 5321 but for its whims, and remembers what it took.
///
/// It may keep the reverse path of a transaction whose recipients were all refused, and answer 503 to the next MAIL, as
/// a real Exim does when no RSET comes between.
#[derive(Debug, Default)]
struct Peer {
    whims: Vec<u8>,
    whim: usize,
    pipelining: bool,
    keeps_reverse_path: bool,
    chunking: bool,
    buffer: Vec<u8>,
    in_content: bool,
    reverse_path: Option<String>,
    recipients: Vec<String>,
    closed: bool,
    loses_replies: bool,
    /// Content, reverse path and recipients of each message that it took responsibility for.
    taken: Vec<(String, String, Vec<String>)>,
}

impl Peer {
    fn whim(&mut self) -> u8 {
        self.whim += 1;
        self.whims.get(self.whim - 1).copied().unwrap_or(0)
    }

    /// Reads what was written to it; returns its replies.
    fn read(&mut self, octets: &[u8]) -> Vec<u8> {
        self.buffer.extend_from_slice(octets);
        let mut replies = Vec::new();
        while !self.closed {
            if let Some((length, content)) = self.chunk() {
                self.buffer.drain(..length);
                let reply = self.answer_chunk(content);
                replies.extend_from_slice(reply.as_bytes());
                continue;
            }
            let end: &[u8] = if self.in_content { b"\r\n.\r\n" } else { b"\r\n" };
            let found = self.buffer.windows(end.len()).position(|window| window == end);
            let lone_dot = self.in_content && self.buffer.starts_with(b".\r\n");
            let Some(length) = (if lone_dot { Some(0) } else { found.map(|at| at + 2) }) else { break };
            let line = self.buffer.drain(..length).collect::<Vec<_>>();
            if self.in_content {
                self.buffer.drain(..3);
            }
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if text.starts_with("BDAT") {
                // It waits for the rest of the chunk.
                self.buffer.splice(..0, line);
                break;
            }
            let reply = self.answer(&text);
            replies.extend_from_slice(reply.as_bytes());
        }
        if self.loses_replies { Vec::new() } else { replies }
    }

    /// BDAT with all of its chunk: how many octets that is, and the content, a dot more in front of its dot line as if
    /// it had come by DATA.
    fn chunk(&self) -> Option<(usize, String)> {
        let end = self.buffer.windows(2).position(|window| window == b"\r\n")?;
        let command = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        let size = command.strip_prefix("BDAT ")?.strip_suffix(" LAST").expect("one chunk").parse::<usize>().unwrap();
        let content = self.buffer.get(end + 2..end + 2 + size)?;
        Some((end + 2 + size, String::from_utf8_lossy(content).trim_end().replace("\n.", "\n..")))
    }

    fn answer_chunk(&mut self, content: String) -> String {
        if self.recipients.is_empty() {
            // Its octets are not commands, whatever becomes of it (RFC 3030 §4.2).
            let whim = self.whim();
            self.closed |= whim >= 250;
            return if self.closed { String::new() } else { "503 5.5.1 no recipients\r\n".to_owned() };
        }
        self.in_content = true;
        self.answer(&content)
    }

    fn answer(&mut self, line: &str) -> String {
        let whim = self.whim();
        if whim >= 250 {
            self.closed = true;
            return if whim.is_multiple_of(2) { "421 4.3.2 closing\r\n".to_owned() } else { String::new() };
        }
        let refusal = match whim {
            220..230 => Some("450 4.2.0 not now\r\n"),
            230..245 => Some("550 5.7.1 no\r\n"),
            _ => None,
        };
        if self.in_content {
            self.in_content = false;
            let reverse_path = self.reverse_path.take().expect("an envelope");
            let recipients = std::mem::take(&mut self.recipients);
            let Some(refusal) = refusal else {
                if !recipients.is_empty() {
                    self.taken.push((line.to_owned(), reverse_path, recipients));
                }
                if whim >= 248 {
                    // It took the message, and its reply is lost, or all that it said at a time.
                    self.closed = true;
                    self.loses_replies = whim == 248;
                    return String::new();
                }
                return "250-2.0.0 queued\r\n250 as such\r\n".to_owned();
            };
            return refusal.to_owned();
        }
        let (verb, argument) = line.split_once([' ', ':']).unwrap_or((line, ""));
        let path = argument.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map(|(path, _)| path.to_owned());
        match (verb, refusal) {
            ("EHLO", _) => {
                let offers = [(self.pipelining, "PIPELINING"), (self.chunking, "CHUNKING")];
                let lines = offers.into_iter().filter(|(on, _)| *on).map(|(_, offer)| format!("250-{offer}\r\n"));
                format!("250-mx\r\n{}250 HELP\r\n", lines.collect::<String>())
            }
            ("QUIT", _) => "221 bye\r\n".to_owned(),
            ("RSET", _) => {
                (self.reverse_path, self.recipients) = (None, Vec::new());
                "250 flushed\r\n".to_owned()
            }
            ("MAIL", _) if self.reverse_path.is_some() => "503 5.5.1 sender already given\r\n".to_owned(),
            ("MAIL", None) => {
                self.reverse_path = path;
                "250 ok\r\n".to_owned()
            }
            ("RCPT", None) if self.reverse_path.is_some() => {
                self.recipients.push(path.expect("a path"));
                "250 ok\r\n".to_owned()
            }
            ("RCPT", None) => "503 5.5.1 need MAIL\r\n".to_owned(),
            ("DATA", None) if !self.recipients.is_empty() => {
                self.in_content = true;
                "354 go\r\n".to_owned()
            }
            ("DATA", None) if self.reverse_path.is_some() && whim % 2 == 1 => {
                self.in_content = true;
                "354 go, for nobody\r\n".to_owned()
            }
            ("DATA", _) => {
                if !self.keeps_reverse_path {
                    self.reverse_path = None;
                }
                "503 5.5.1 no recipients\r\n".to_owned()
            }
            (_, Some(refusal)) => refusal.to_owned(),
            (verb, None) => panic!("the client wrote {verb:?}"),
        }
    }
}

/// What a peer without any state may say.
const SAYS: [&[u8]; 10] = [
    b"220 hello\r\n",
    b"250-mx\r\n250-PIPELINING\r\n250-CHUNKING\r\n250 STARTTLS\r\n",
    b"250 ok\r\n",
    b"250 ok\r\n250 ok\r\n",
    b"354 go\r\n",
    b"451 no\r\n",
    b"550 5.1.1 no\r\n",
    b"421 bye\r\n",
    b"452 4.5.3 many\r\n",
    b"503 what\r\n",
];

/// Sends `messages` through one connection to `peer`, riding where `rides` allows; checks every promise from outside.
fn converse(
    mut peer: Peer,
    (chunking, in_doubt): (Chunking, InDoubt),
    messages: usize,
    rides: u8,
    piece: usize,
) -> BTreeMap<u64, TransactionResult> {
    let mut world = World::new(ClientOptions { chunking, in_doubt, ..options() });
    let mut intended = BTreeMap::new();
    let mut asked = false;
    let mut results = BTreeMap::<u64, TransactionResult>::new();
    let mut started = 0;
    let mut closed = false;
    let words = |number: usize| {
        let recipients = (0..=number % 3).map(|place| format!("r{number}-{place}@x ")).collect::<String>();
        // Some with lines that begin with a dot.
        format!("{recipients} from=sender{number}@us body=Number:\\s{number}\\r\\n\\r\\n.dots\\r\\n dots")
    };
    world.receive(b"220 mx\r\n");
    for _ in 0..1000 {
        while let Some(event) = world.client.poll_event() {
            assert!(!closed, "nothing comes after the end");
            match event {
                ClientEvent::Idle if started < messages => {
                    started += 1;
                    world.send(&words(started));
                }
                ClientEvent::Idle => world.with(SmtpClient::quit),
                ClientEvent::Finished(result) => {
                    assert!(results.insert(result.ticket, result).is_none(), "a transaction ends once");
                }
                ClientEvent::Closed { .. } => closed = true,
                ClientEvent::StartTls => unreachable!("not offered"),
                ClientEvent::Intend { ticket, recipients } => {
                    assert!(intended.insert(ticket, recipients).is_none(), "once for each");
                    asked = true;
                }
            }
        }
        if std::mem::take(&mut asked) {
            world.with(SmtpClient::handle_intended);
        }
        while started < messages && rides >> (started % 8) & 1 == 1 && world.client.can_ride() {
            started += 1;
            world.ride(&words(started));
        }
        if closed {
            break;
        }
        let written = std::mem::take(&mut world.wire);
        let replies = peer.read(&written);
        replies.chunks(piece).for_each(|input| world.receive(input));
        if peer.closed {
            world.client.handle_closed("end of stream");
        }
    }
    assert!(closed, "the conversation ends");
    assert_eq!(results.len(), started, "every transaction has its result");
    check_taken(&peer, &results);
    if in_doubt == InDoubt::Hold {
        check_intended(&peer, &results, &intended);
    }
    results
}

/// Nothing was taken of which it was not recorded before that it may be.
fn check_intended(peer: &Peer, results: &BTreeMap<u64, TransactionResult>, intended: &BTreeMap<u64, Vec<u32>>) {
    for (content, _, recipients) in &peer.taken {
        let number = content.strip_prefix("Number: ").and_then(|rest| rest.split("\r\n").next()).expect("its number");
        let intended = &intended[&number.parse::<u64>().expect("a number")];
        assert_eq!(intended.len(), recipients.len(), "{content}: of all that the peer had accepted, and of no others");
    }
    for result in results.values() {
        for (index, verdict) in &result.results {
            let uncounted = matches!(verdict.fate, Fate::Retry(Retry { counts_attempt: false, .. }));
            let was_intended = intended.get(&result.ticket).is_some_and(|indexes| indexes.contains(index));
            assert!(!uncounted || !was_intended, "what is recorded of it is never taken back unsaid: {verdict:?}");
            assert!(!matches!(verdict.fate, Fate::Retry(Retry { in_doubt: true, .. })), "{verdict:?}");
        }
    }
}

fn check_taken(peer: &Peer, results: &BTreeMap<u64, TransactionResult>) {
    let mut taken = BTreeMap::<u64, &Vec<String>>::new();
    for (content, reverse_path, recipients) in &peer.taken {
        let (head, body) = content.split_once("\r\n\r\n").expect("header and body");
        let number = head.strip_prefix("Number: ").expect("its number").parse::<u64>().expect("a number");
        assert_eq!(body, "..dots", "on the wire, a dot more");
        // RIGHT-ENVELOPE.
        assert_eq!(*reverse_path, format!("sender{number}@us"), "under its own reverse path");
        assert!(
            recipients.iter().all(|recipient| recipient.starts_with(&format!("r{number}-"))),
            "to its own recipients"
        );
        assert!(taken.insert(number, recipients).is_none(), "sent once");
    }
    for (number, result) in results {
        assert_eq!(result.results.len(), *number as usize % 3 + 1);
        for (place, (index, verdict)) in result.results.iter().enumerate() {
            assert_eq!(*index as usize, 10 + place);
            let address = format!("r{number}-{place}@x");
            let has_it = taken.get(number).is_some_and(|recipients| recipients.contains(&address));
            match verdict.fate {
                Fate::Delivered => assert!(has_it, "NOTHING-LOST: {address} {verdict:?}"),
                Fate::Retry(Retry { in_doubt: true, .. }) | Fate::Hold => {}
                _ => assert!(!has_it, "no silent duplicate: {address} {verdict:?}"),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    #[test]
    fn no_peer_makes_us_lose_or_double_or_mix_up(
        whims in proptest::collection::vec(prop_oneof![20 => 0_u8..220, 10 => any::<u8>(), 1 => Just(248)], 0..60),
        (pipelining, chunks, keeps_reverse_path) in any::<(bool, bool, bool)>(),
        chunking in prop_oneof![Just(Chunking::Off), Just(Chunking::On), Just(WHOLE)],
        in_doubt in prop_oneof![Just(InDoubt::Retry), Just(InDoubt::Hold)],
        messages in 1_usize..8,
        rides in any::<u8>(),
        piece in 1_usize..40,
    ) {
        let peer = Peer { whims, pipelining, chunking: chunks, keeps_reverse_path, ..Peer::default() };
        converse(peer, (chunking, in_doubt), messages, rides, piece);
    }

    /// Steps in any order, from a peer that may send anything.
    #[test]
    fn nothing_a_peer_sends_is_beyond_a_verdict(
        steps in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..8)), 0..60),
        pipelining in any::<bool>(),
        tls in prop_oneof![Just(TlsMode::Opportunistic), Just(TlsMode::Required), Just(TlsMode::Disabled)],
        protocol in prop_oneof![Just(DeliveryProtocol::Smtp), Just(DeliveryProtocol::Lmtp)],
        chunking in prop_oneof![Just(Chunking::Off), Just(Chunking::On), Just(WHOLE)],
    ) {
        let in_doubt = if pipelining { InDoubt::Hold } else { InDoubt::Retry };
        let mut world = World::new(ClientOptions { pipelining, tls, protocol, chunking, in_doubt, ..options() });
        let mut events = Vec::new();
        let mut begun = Vec::new();
        for (step, noise) in steps {
            match step {
                0..180 => world.receive(SAYS[usize::from(step) % 7]),
                180..190 => world.receive(SAYS[7 + usize::from(step) % 3]),
                190..195 => world.receive(&noise),
                195..200 => world.holding = true,
                200..205 => world.release(noise.len()),
                205..210 => { world.holding = false; world.release(usize::MAX); }
                210..215 if world.client.next_timeout().is_some() => world.time_out(),
                215..218 => world.client.handle_closed("gone"),
                218..220 => world.client.handle_tls_failed("no"),
                250.. => world.with(SmtpClient::handle_intended),
                220..230 if world.client.phase == Phase::Handshaking => world.with(SmtpClient::handle_tls_started),
                230..250 if world.client.can_ride() => {
                    begun.push(format!("{}@ride", begun.len()));
                    let words = begun.last().unwrap().clone();
                    world.ride(&words);
                }
                _ => {}
            }
            if world.client.is_idle() && step % 2 == 0 {
                begun.extend([format!("{}@x", begun.len()), format!("{}@y", begun.len())]);
                let words = begun[begun.len() - 2..].join(" ");
                world.send(&words);
            }
            events.extend(world.events());
        }
        world.client.handle_closed("the end");
        events.extend(world.events());
        prop_assert_eq!(events.iter().filter(|event| event.starts_with("closed")).count(), 1);
        prop_assert!(events.last().unwrap().starts_with("closed"));
        for address in begun {
            let verdicts = events.iter().filter(|event| event.starts_with(&format!("{address}:"))).count();
            prop_assert_eq!(verdicts, 1, "one verdict for {}", address);
        }
        prop_assert!(world.client.next_timeout().is_none());
    }
}
