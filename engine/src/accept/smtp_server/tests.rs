//! Dialogs: every `server_*.smtp` of `tests/dialog` is a session, played against the core whole, octet by octet and in
//! odd pieces.
//!
//! Lines: `C:` the client sends this and CRLF, `c:` without CRLF (both know `\r \n \t \0 \\ \xNN`, and `\*N{…}`
//! repeats); `S:` the server's next reply line; `M:` a message comes out (`<reverse> -> recipients`), `D:` its content,
//! `A:` how it is answered (`ok`, or a refusal); `T:` `starttls` (the event), `tls` (the handshake), `shutdown` or a
//! wait (`300s`); `X:` the server closes; `O:` options at the top: `no-relay`, `starttls`, `reject`, `max=N`, `whole`
//! (not to be split); `#` a comment.

#![expect(clippy::disallowed_methods, reason = "reads dialogs")]

use std::fs;
use std::path::Path;

use postrider_spool::record::{LogId, Sequence};
use proptest::prelude::*;

use super::*;

const START: Now = Now { monotonic: Duration::from_secs(1_000), wall_ms: 1_764_547_200_000 };

fn options() -> SessionOptions {
    SessionOptions {
        hostname: "mta.example".into(),
        client: "192.0.2.7:40000".parse().unwrap(),
        may_relay: true,
        trusted: true,
        max_message_bytes: 1_000,
        line_endings: LineEndings::Fix,
        received_detail: ReceivedDetail::Full,
        starttls: false,
    }
}

/// A caller as the rules in the module header want it.
struct Session {
    server: SmtpServer,
    now: Now,
    unconsumed: Vec<u8>,
    out: Vec<u8>,
    event: Option<ServerEvent>,
    piece: usize,
}

impl Session {
    fn new(options: SessionOptions, piece: usize) -> Self {
        let mut out = Vec::new();
        let server = SmtpServer::new(START, options, 7, &mut out);
        Self { server, now: START, unconsumed: Vec::new(), out, event: None, piece }
    }

    fn send(&mut self, octets: &[u8]) {
        for piece in octets.chunks(self.piece) {
            self.unconsumed.extend_from_slice(piece);
            self.run();
        }
    }

    fn run(&mut self) {
        while self.event.is_none() {
            let handled = self.server.handle(self.now, &self.unconsumed, &mut self.out);
            self.unconsumed.drain(..handled.consumed);
            self.event = handled.event;
            if handled.consumed == 0 {
                break;
            }
        }
        let complete = !self.server.is_waiting() && self.event.is_none();
        assert!(!complete || self.unconsumed.len() < COMMAND_LINE_BYTES_MAX, "a caller's buffer would overflow");
    }

    fn answer(&mut self, answer: Result<MessageId, Refusal>) {
        self.server.handle_answer(self.now, answer, &mut self.out);
        self.run();
    }

    fn message(&mut self) -> Received {
        match self.event.take() {
            Some(ServerEvent::Message(received)) => *received,
            other => panic!("no message but {other:?}; out: {}", self.out.escape_ascii()),
        }
    }

    fn reply_line(&mut self) -> Option<String> {
        let end = self.out.windows(2).position(|w| w == b"\r\n")?;
        let line = String::from_utf8(self.out.drain(..end + 2).collect()).unwrap();
        Some(line.trim_end_matches("\r\n").to_owned())
    }
}

fn message_id() -> MessageId {
    MessageId::new(LogId(1), Sequence(42))
}

/// `\r \n \t \0 \\ \xNN` and `\*N{…}`.
fn unescape(text: &str) -> Vec<u8> {
    let mut octets = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        octets.extend_from_slice(&rest.as_bytes()[..at]);
        let escape = &rest[at + 1..];
        let mut length = 1;
        match escape.as_bytes()[0] {
            b'r' => octets.push(b'\r'),
            b'n' => octets.push(b'\n'),
            b't' => octets.push(b'\t'),
            b'0' => octets.push(0),
            b'\\' => octets.push(b'\\'),
            b'x' => {
                octets.push(u8::from_str_radix(&escape[1..3], 16).unwrap());
                length = 3;
            }
            b'*' => {
                let (open, close) = (escape.find('{').unwrap(), escape.find('}').unwrap());
                let times = escape[1..open].parse().unwrap();
                octets.extend(unescape(&escape[open + 1..close]).repeat(times));
                length = close + 1;
            }
            other => panic!("unknown escape {}", other as char),
        }
        rest = &escape[length..];
    }
    octets.extend_from_slice(rest.as_bytes());
    octets
}

fn parse_refusal(text: &str) -> Refusal {
    let (code, rest) = text.split_once(' ').unwrap();
    let (enhanced, text) = rest.split_once(' ').unwrap();
    let parts: Vec<u16> = enhanced.split('.').map(|part| part.parse().unwrap()).collect();
    Refusal::new(code.parse().unwrap(), (parts[0] as u8, parts[1], parts[2]), text)
}

/// Plays one transcript; `piece` is how many octets the server sees at a time. False: not to be split.
fn play(name: &str, transcript: &str, piece: usize) -> bool {
    let mut options = options();
    let mut whole = false;
    for word in transcript.lines().filter_map(|line| line.strip_prefix("O:")).flat_map(str::split_whitespace) {
        match word.split_once('=') {
            None if word == "no-relay" => options.may_relay = false,
            None if word == "starttls" => options.starttls = true,
            None if word == "reject" => options.line_endings = LineEndings::Reject,
            None if word == "whole" => whole = true,
            Some(("max", bytes)) => options.max_message_bytes = bytes.parse().unwrap(),
            _ => panic!("{name}: unknown option {word}"),
        }
    }
    if whole && piece != usize::MAX {
        return false;
    }
    let mut session = Session::new(options, piece);
    let mut pending = Vec::new();
    let mut content = None;
    for (number, line) in transcript.lines().enumerate() {
        let place = format!("{name}:{} (pieces of {piece})", number + 1);
        if line.is_empty() || line.starts_with(['#', 'O']) {
            continue;
        }
        let (kind, text) = line.split_once(':').unwrap_or_else(|| panic!("{place}: what is this?"));
        let text = text.strip_prefix(' ').unwrap_or(text);
        if !matches!(kind, "C" | "c") && !pending.is_empty() {
            session.send(&std::mem::take(&mut pending));
        }
        match kind {
            "C" => pending.extend([unescape(text), b"\r\n".to_vec()].concat()),
            "c" => pending.extend(unescape(text)),
            "S" => assert_eq!(session.reply_line().as_deref(), Some(text), "{place}"),
            "M" => {
                let received = session.message();
                let recipients = received.recipients.join(" ");
                assert_eq!(format!("<{}> -> {recipients}", received.reverse_path), text, "{place}");
                content = Some(received.content);
            }
            "D" => assert_eq!(
                content.take().expect("D: follows M:").escape_ascii().to_string(),
                unescape(text).escape_ascii().to_string(),
                "{place}"
            ),
            "A" => {
                assert_eq!(session.out.escape_ascii().to_string(), "", "{place}: replied before the commit");
                session.answer(if text == "ok" { Ok(message_id()) } else { Err(parse_refusal(text)) });
            }
            "T" => change_the_world(&mut session, text, &place),
            "X" => {
                assert!(matches!(session.event, Some(ServerEvent::Close)), "{place}: {:?}", session.event);
                assert_eq!(session.out.escape_ascii().to_string(), "", "{place}");
                session.event = None;
            }
            _ => panic!("{place}: unknown line"),
        }
    }
    assert!(pending.is_empty(), "{name}: the last line must be the server's");
    assert_eq!(session.out.escape_ascii().to_string(), "", "{name}: more replies");
    assert!(session.event.is_none(), "{name}: {:?}", session.event);
    true
}

fn change_the_world(session: &mut Session, what: &str, place: &str) {
    match what {
        "starttls" => assert!(matches!(session.event.take(), Some(ServerEvent::StartTls)), "{place}"),
        "tls" => session.server.handle_tls_started(session.now),
        "shutdown" => {
            session.server.handle_shutdown(session.now, &mut session.out);
        }
        wait => {
            let seconds = wait.strip_suffix('s').unwrap().parse().unwrap();
            session.now.monotonic += Duration::from_secs(seconds);
            session.server.handle_timeout(session.now, &mut session.out);
        }
    }
    session.run();
}

#[test]
fn dialogs() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dialog");
    let mut played = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("server_") || !name.ends_with(".smtp") {
            continue;
        }
        let transcript = fs::read_to_string(&path).unwrap();
        assert!(play(&name, &transcript, usize::MAX));
        for piece in [1, 2, 3, 5, 61] {
            play(&name, &transcript, piece);
        }
        played += 1;
    }
    assert!(played >= 25, "only {played} dialogs");
}

/// A session that is up to DATA.
fn session_in_data(options: SessionOptions) -> Session {
    let mut session = Session::new(options, usize::MAX);
    session.send(b"EHLO c\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n");
    session.out.clear();
    session
}

#[test]
fn received_says_how_it_came() {
    let mut session = Session::new(options(), usize::MAX);
    session.send(b"EHLO (evil)\\x\r\nMAIL FROM:<a@b.example> BODY=8BITMIME SMTPUTF8\r\nRCPT TO:<c@d.example>\r\n");
    session.send(b"DATA\r\n.\r\n");
    let received = session.message();
    assert_eq!(received.protocol, "UTF8SMTP");
    assert_eq!(received.helo, "?evil??x");
    assert!(received.eight_bit_declared);
    assert!(received.smtputf8_declared);
    assert!(received.trusted);
    assert_eq!(received.client, Some("192.0.2.7:40000".parse().unwrap()));
    assert_eq!(received.session_id, 7);
    assert!(received.content.is_empty());
    assert_eq!(protocol_name(false, false, false), "SMTP");
    assert_eq!(protocol_name(true, true, false), "ESMTPS");
}

/// RFC 5321 §4.5.3.1.8 and §4.5.3.1.10.
#[test]
fn too_many_recipients() {
    let mut session = Session::new(options(), usize::MAX);
    session.send(b"EHLO c\r\nMAIL FROM:<a@b.example>\r\n");
    session.out.clear();
    for number in 0..RECIPIENTS_MAX {
        session.send(format!("RCPT TO:<r{number}@d.example>\r\n").as_bytes());
        assert_eq!(session.reply_line().unwrap(), "250 2.1.5 OK");
    }
    for _ in 0..2 * SESSION_ERRORS_MAX {
        session.send(b"RCPT TO:<one.more@d.example>\r\n");
        assert_eq!(session.reply_line().unwrap(), "452 4.5.3 more than 1000 recipients");
    }
    assert_eq!(session.server.take_refused(), 2 * SESSION_ERRORS_MAX, "each is told as a refusal");
    session.send(b"RCPT TO:<r7@D.example>\r\n");
    assert_eq!(session.reply_line().unwrap(), "250 2.1.5 OK");
    session.send(b"DATA\r\n.\r\n");
    assert_eq!(session.message().recipients.len(), RECIPIENTS_MAX);
}

/// A client that never reads must not make us hold replies without end.
#[test]
fn replies_of_one_call_are_bounded() {
    let mut out = Vec::new();
    let mut server = SmtpServer::new(START, options(), 1, &mut out);
    let input = b"EHLO a\r\n".repeat(8_000);
    let handled = server.handle(START, &input, &mut out);
    assert!(handled.consumed > 0 && handled.consumed < input.len());
    assert!(out.len() < REPLY_BYTES_MAX + 1_024);
}

#[test]
fn nothing_is_consumed_while_a_message_waits() {
    let mut session = session_in_data(options());
    session.send(b"x\r\n.\r\nNOOP\r\n");
    session.message();
    assert!(session.server.is_waiting());
    assert_eq!(session.server.next_timeout(), Duration::MAX);
    session.run();
    assert_eq!(session.unconsumed, b"NOOP\r\n");
    session.answer(Ok(message_id()));
    assert_eq!(session.out, b"250 2.0.0 OK id=000100000000002a\r\n250 2.0.0 OK\r\n");
}

#[test]
fn good_mail_forgives_errors() {
    let mut session = Session::new(options(), usize::MAX);
    for _ in 0..3 {
        for _ in 0..SESSION_ERRORS_MAX - 1 {
            session.send(b"FOO\r\n");
        }
        session.send(b"EHLO c\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n.\r\n");
        session.message();
        session.answer(Ok(message_id()));
    }
    assert!(session.event.is_none());
}

/// A client whose mail we put off does nothing wrong, however often it tries.
#[test]
fn what_is_put_off_is_no_error_of_the_client() {
    let mut session = Session::new(options(), usize::MAX);
    session.send(b"EHLO c\r\n");
    for _ in 0..2 * SESSION_ERRORS_MAX {
        session.send(b"MAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n.\r\n");
        session.message();
        session.answer(Err(Refusal::new(452, (4, 3, 1), "later")));
    }
    assert!(session.event.is_none());
    session.out.clear();
    session.send(b"NOOP\r\n");
    assert_eq!(session.reply_line().unwrap(), "250 2.0.0 OK");
}

/// RFC 5321 §4.1.4: by either word.
#[test]
fn a_second_greeting_ends_the_transaction() {
    for greeting in ["EHLO c", "HELO c"] {
        let mut session = Session::new(options(), usize::MAX);
        session.send(b"EHLO c\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n");
        session.send(format!("{greeting}\r\n").as_bytes());
        session.out.clear();
        session.send(b"DATA\r\n");
        assert_eq!(session.reply_line().unwrap(), "503 5.5.1 say MAIL first", "{greeting}");
    }
}

/// RFC 3207 §4.2: also a transaction that was begun in the clear.
#[test]
fn what_was_begun_in_the_clear_does_not_go_on_within_tls() {
    let mut session = Session::new(SessionOptions { starttls: true, ..options() }, usize::MAX);
    session.send(b"EHLO c\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nSTARTTLS\r\n");
    assert!(matches!(session.event.take(), Some(ServerEvent::StartTls)));
    session.server.handle_tls_started(session.now);
    session.out.clear();
    session.send(b"DATA\r\n");
    assert_eq!(session.reply_line().unwrap(), "503 5.5.1 say MAIL first");
}

#[test]
fn shutdown_says_when_to_close() {
    let mut session = Session::new(options(), usize::MAX);
    assert!(session.server.handle_shutdown(START, &mut session.out));
    let mut session = session_in_data(options());
    assert!(!session.server.handle_shutdown(START, &mut session.out));
    session.send(b".\r\n");
    session.message();
    assert!(!session.server.handle_shutdown(START, &mut session.out));
}

#[test]
fn deadline_moves_with_octets_of_content_and_whole_commands_only() {
    let mut session = Session::new(options(), usize::MAX);
    let first = session.server.next_timeout();
    assert_eq!(first, START.monotonic + SERVER_IDLE_MAX);
    session.now.monotonic += Duration::from_secs(1);
    session.send(b"EHLO");
    assert_eq!(session.server.next_timeout(), first);
    session.send(b" c\r\n");
    assert_eq!(session.server.next_timeout(), first + Duration::from_secs(1));
    // Early calls are harmless.
    session.out.clear();
    session.server.handle_timeout(session.now, &mut session.out);
    assert!(session.out.is_empty());
}

#[test]
fn peers_of_a_listener() {
    let listener = SmtpListener {
        address: "[::]:25".parse().unwrap(),
        relay_from: vec!["192.0.2.0/24".parse().unwrap()],
        trusted_hosts: vec!["192.0.2.7/32".parse().unwrap()],
        max_message_bytes: 1,
        line_endings: LineEndings::Fix,
        received: ReceivedDetail::Full,
        tls: None,
    };
    let of = |client: &str| SessionOptions::new("h".into(), &listener, client.parse().unwrap());
    assert!(of("192.0.2.7:1").may_relay);
    assert!(of("192.0.2.7:1").trusted);
    assert!(of("[::ffff:192.0.2.8]:1").may_relay);
    assert!(of("[::ffff:192.0.2.7]:1").trusted);
    assert!(!of("192.0.2.8:1").trusted);
    assert!(!of("198.51.100.1:1").may_relay);
}

/// What a client could see of a session, whatever the pieces: replies, messages, whether it was closed.
fn observe(input: &[u8], cuts: &[usize]) -> (Vec<u8>, Vec<Received>, bool) {
    let mut session = Session::new(options(), usize::MAX);
    let (mut messages, mut closed) = (Vec::new(), false);
    let mut cuts = [&[0], cuts, &[input.len()]].concat();
    cuts.sort_unstable();
    for window in cuts.windows(2) {
        session.send(&input[window[0]..window[1]]);
        while let Some(event) = session.event.take() {
            match event {
                ServerEvent::Message(received) => {
                    messages.push(*received);
                    session.answer(Ok(message_id()));
                }
                ServerEvent::StartTls => unreachable!("not offered"),
                ServerEvent::Close => closed = true,
            }
            if closed {
                return (session.out, messages, closed);
            }
        }
    }
    (session.out, messages, closed)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_split_of_a_session_looks_the_same(
        parts in prop::collection::vec(prop_oneof![
            Just("EHLO c\r\n"), Just("HELO c\r\n"),
            Just("MAIL FROM:<a@b.example>\r\n"), Just("MAIL FROM:<> SIZE=9\r\n"),
            Just("RCPT TO:<c@d.example>\r\n"), Just("DATA\r\n"), Just("text\r\n"), Just("..dot\r\n"), Just(".\r\n"),
            Just("\n.\n"), Just("\r\n.\r"), Just("BDAT 3\r\nabc"), Just("BDAT 2 LAST\r\n.\r"), Just("BDAT 0 LAST\r\n"),
            Just("RSET\r\n"), Just("NOOP\r\n"), Just("QUIT\r\n"), Just("\u{0}\u{e9}\r\n"), Just("no end"),
        ], 0..16),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let start = "EHLO c\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n";
        let input = [start, &parts.concat()].concat().into_bytes();
        let whole = observe(&input, &[]);
        let cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
        prop_assert_eq!(&observe(&input, &cuts), &whole);
        let everywhere: Vec<usize> = (0..input.len()).collect();
        prop_assert_eq!(&observe(&input, &everywhere), &whole);
    }

    #[test]
    fn garbage_gets_replies_and_nothing_else(input in prop::collection::vec(any::<u8>(), 0..6_000)) {
        let (out, messages, _) = observe(&input, &[]);
        prop_assert!(messages.is_empty());
        prop_assert!(out.ends_with(b"\r\n"));
        prop_assert!(out.iter().all(|octet| matches!(octet, b'\r' | b'\n' | b' '..=b'~')));
    }
}
