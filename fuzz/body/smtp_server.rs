//! A client's octets through the SMTP server: replies are lines of printable text, messages are clean, and in which
//! pieces the octets come changes nothing.
//!
//! The first octet chooses options, the second the size of the pieces; the rest is what the client sends.

use std::time::Duration;

use postrider::accept::{Received, Refusal, ServerEvent, SessionOptions, SmtpServer};
use postrider::config::{LineEndings, ReceivedDetail};
use postrider::limits::COMMAND_LINE_BYTES_MAX;
use postrider::mail::time::Now;
use postrider_spool::record::{LogId, MessageId, Sequence};

pub(crate) fn run(octets: &[u8]) {
    let [choices, piece, input @ ..] = octets else { return };
    let whole = observe(*choices, input, usize::MAX);
    // Where TLS starts, what came with STARTTLS ends the session and what comes later does not: there pieces matter.
    let pieces = observe(*choices, input, usize::from(*piece).max(1));
    if choices & STARTTLS == 0 {
        assert_eq!(pieces, whole, "the pieces change nothing");
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    out: String,
    messages: Vec<(String, Vec<String>, Vec<u8>)>,
    closed: bool,
}

fn observe(choices: u8, input: &[u8], piece: usize) -> Seen {
    let options = options(choices);
    let now = Now { monotonic: Duration::from_secs(1_000), wall_ms: 1_764_547_200_000 };
    let mut out = Vec::new();
    let mut server = SmtpServer::new(now, options, 7, &mut out);
    let mut messages = Vec::new();
    let mut unconsumed = Vec::new();
    let mut closed = false;
    let mut rest = input;
    while !closed {
        let handled = server.handle(now, &unconsumed, &mut out);
        unconsumed.drain(..handled.consumed);
        match handled.event {
            Some(ServerEvent::Message(received)) => {
                messages.push(check_message(*received));
                let refused = choices & REFUSES != 0 && messages.len() % 2 == 0;
                let answer = if refused { Err(Refusal::new(452, (4, 3, 1), "full")) } else { Ok(id(messages.len())) };
                server.handle_answer(now, answer, &mut out);
            }
            Some(ServerEvent::StartTls) if unconsumed.is_empty() => server.handle_tls_started(now),
            Some(ServerEvent::StartTls) => {}
            Some(ServerEvent::Close) => closed = true,
            None if handled.consumed > 0 => {}
            None if rest.is_empty() => break,
            None => {
                assert!(unconsumed.len() < COMMAND_LINE_BYTES_MAX, "a caller's buffer would overflow");
                let (next, later) = rest.split_at(piece.min(rest.len()));
                unconsumed.extend_from_slice(next);
                rest = later;
            }
        }
    }
    assert!(out.ends_with(b"\r\n"));
    assert!(out.iter().all(|octet| matches!(octet, b'\r' | b'\n' | b' '..=b'~')), "{}", out.escape_ascii());
    Seen { out: String::from_utf8_lossy(&out).into_owned(), messages, closed }
}

fn check_message(received: Received) -> (String, Vec<String>, Vec<u8>) {
    let content = &received.content;
    assert!(!received.recipients.is_empty());
    assert!(content.len() as u64 <= MESSAGE_BYTES_MAX + 2);
    assert!(content.is_empty() || content.ends_with(b"\r\n"));
    assert!(!content.contains(&0));
    for (at, octet) in content.iter().enumerate() {
        match octet {
            b'\n' => assert!(at > 0 && content[at - 1] == b'\r', "a bare LF"),
            b'\r' => assert_eq!(content.get(at + 1), Some(&b'\n'), "a bare CR"),
            _ => {}
        }
    }
    (received.reverse_path, received.recipients, received.content)
}

fn options(choices: u8) -> SessionOptions {
    SessionOptions {
        hostname: "mta.example".into(),
        client: ([192, 0, 2, 7], 40_000).into(),
        may_relay: choices & FOREIGN == 0,
        trusted: choices & FOREIGN == 0,
        max_message_bytes: MESSAGE_BYTES_MAX,
        line_endings: if choices & REJECTS == 0 { LineEndings::Fix } else { LineEndings::Reject },
        received_detail: ReceivedDetail::Full,
        starttls: choices & STARTTLS != 0,
    }
}

fn id(number: usize) -> MessageId {
    MessageId::new(LogId(1), Sequence(number as u64))
}

const STARTTLS: u8 = 1;
const REJECTS: u8 = 2;
const FOREIGN: u8 = 4;
const REFUSES: u8 = 8;
const MESSAGE_BYTES_MAX: u64 = 1_000;
