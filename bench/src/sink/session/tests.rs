//! Tests of the sink's sessions.

use std::net::Ipv4Addr;

use super::*;
use crate::message::stuff;

struct KeptMessage {
    mail: Vec<u8>,
    recipients: Vec<Vec<u8>>,
    content: Vec<u8>,
    wire_bytes: u64,
    chunked: bool,
}

#[derive(Default)]
struct Kept {
    messages: Vec<KeptMessage>,
    ehlo: Vec<String>,
    refused: Vec<Stage>,
    greylisted: u32,
}

impl Receiver for Kept {
    fn greeted(&mut self, _peer: IpAddr, ehlo: &str) {
        self.ehlo.push(ehlo.to_owned());
    }

    fn received(&mut self, message: &ReceivedMessage<'_>) {
        self.messages.push(KeptMessage {
            mail: message.mail.to_vec(),
            recipients: message.recipients.to_vec(),
            content: message.content.to_vec(),
            wire_bytes: message.wire_bytes,
            chunked: message.chunked,
        });
    }

    fn refused(&mut self, stage: Stage) {
        self.refused.push(stage);
    }

    fn greylisted(&mut self) {
        self.greylisted += 1;
    }
}

/// Feeds `input` in pieces of `piece` octets; gives replies, what was received and the last flow.
fn run(plan: FaultPlan, input: &[u8], piece: usize) -> (String, Kept, Flow) {
    let mut out = Vec::new();
    let now = Instant::now();
    let mut session = Session::new(Arc::new(plan), Keep::All, Ipv4Addr::LOCALHOST.into(), 1, now, &mut out);
    let mut kept = Kept::default();
    let mut flow = Flow::Continue;
    for part in input.chunks(piece) {
        flow = session.handle(now, part, &mut out, &mut kept);
    }
    (String::from_utf8(out).unwrap(), kept, flow)
}

fn codes(replies: &str) -> Vec<&str> {
    replies.lines().filter(|line| line.as_bytes()[3] == b' ').map(|line| &line[..3]).collect()
}

#[test]
fn a_pipelined_session_is_the_same_in_pieces_of_any_size() {
    let contents: [&[u8]; 7] =
        [b"", b".", b"..\r\n", b"a\r\n.\r\nb\r\n", b"a\n.\nb\r\n", b"a\r\n.\rb\r\n", b"\r\n.a\r\n\r\n..\r\n"];
    for content in contents {
        let mut input = b"EHLO a.example\r\nMAIL FROM:<s@a> SIZE=3\r\nrcpt to: <r@b>\r\nDATA\r\n".to_vec();
        stuff(content, &mut input);
        input.extend_from_slice(b"MAIL FROM:<>\r\nRCPT TO:<x@y>\r\nRCPT TO:<z@y>\r\nDATA\r\nzwei\r\n.\r\nQUIT\r\n");
        let mut expected = content.to_vec();
        if !content.is_empty() && !content.ends_with(b"\r\n") {
            expected.extend_from_slice(b"\r\n");
        }
        for piece in 1..12 {
            let (replies, kept, flow) = run(FaultPlan::none(), &input, piece);
            let expected_codes = "220 250 250 250 354 250 250 250 250 354 250 221";
            assert_eq!(codes(&replies).join(" "), expected_codes, "{content:?} in pieces of {piece}");
            assert_eq!(kept.messages.len(), 2);
            assert_eq!(kept.messages[0].mail, b"<s@a> SIZE=3");
            assert_eq!(kept.messages[0].recipients, [b"<r@b>".to_vec()]);
            assert_eq!(kept.messages[0].content, expected, "{content:?} in pieces of {piece}");
            assert_eq!(kept.messages[1].recipients.len(), 2);
            assert_eq!(kept.messages[1].content, b"zwei\r\n");
            assert_eq!(kept.ehlo, ["a.example"]);
            assert_eq!(flow, Flow::Close);
        }
    }
}

#[test]
fn chunks_are_joined_and_nothing_in_them_is_a_command() {
    let input = b"EHLO a\r\nMAIL FROM:<s@a>\r\nRCPT TO:<r@b>\r\nBDAT 12\r\na\r\n.\r\nQUIT\r\nBDAT 3 LAST\r\n\r\n.\
        MAIL FROM:<t@a>\r\nBDAT 5 LAST\r\nabcdeRSET\r\n";
    for piece in 1..input.len() {
        let (replies, kept, flow) = run(FaultPlan::none(), input, piece);
        assert_eq!(codes(&replies).join(" "), "220 250 250 250 250 250 250 503 250");
        assert_eq!(kept.messages.len(), 1);
        assert_eq!(kept.messages[0].content, b"a\r\n.\r\nQUIT\r\n\r\n.");
        assert!(kept.messages[0].chunked);
        assert_eq!(kept.messages[0].wire_bytes, 15);
        assert_eq!(flow, Flow::Continue);
    }
}

#[test]
fn planned_refusals_answer_and_are_counted() {
    let now = Instant::now();
    let plan = |stage, reply: &str| FaultPlan::new(&[(stage, reply.to_owned())], 100.0, None, now).unwrap();
    let input = b"EHLO a\r\nMAIL FROM:<s@a>\r\nRCPT TO:<r@b>\r\nDATA\r\n";
    let (replies, kept, _) = run(plan(Stage::Rcpt, "451 4.2.1 busy"), input, 1000);
    assert_eq!(codes(&replies).join(" "), "220 250 250 451 554");
    assert!(replies.contains("451 4.2.1 busy\r\n"));
    assert_eq!(kept.refused, [Stage::Rcpt]);

    let with_content = [&input[..], b"x\r\n.\r\n"].concat();
    let (replies, kept, _) = run(plan(Stage::Dot, "552 5.2.2 full"), &with_content, 1000);
    assert_eq!(codes(&replies).join(" "), "220 250 250 250 354 552");
    assert!(kept.messages.is_empty());

    let (replies, _, flow) = run(plan(Stage::Mail, "421 4.3.2 later"), input, 1000);
    assert_eq!(codes(&replies).join(" "), "220 250 421");
    assert_eq!(flow, Flow::Close);

    let mut out = Vec::new();
    let greeting = Arc::new(plan(Stage::Greeting, "554 5.7.1 no"));
    assert!(Session::new(greeting, Keep::Share(0.0), Ipv4Addr::LOCALHOST.into(), 1, now, &mut out).is_closing());
    assert_eq!(out, b"554 5.7.1 no\r\n");
}

#[test]
fn disorder_is_answered() {
    let input =
        b"HELO a\r\nRCPT TO:<r@b>\r\nDATA\r\nMAIL <s@a>\r\nMAIL FROM:<s@a>\r\nMAIL FROM:<s@a>\r\nFROBNICATE\r\n\
        NOOP\r\nVRFY x\r\nBDAT many\r\n";
    let (replies, _, flow) = run(FaultPlan::none(), input, 7);
    assert_eq!(codes(&replies).join(" "), "220 250 503 554 501 250 503 500 250 252 501");
    assert_eq!(flow, Flow::Close);
    let (replies, _, flow) = run(FaultPlan::none(), &[b'x'; LINE_BYTES_MAX + 2], 10_000);
    assert_eq!(codes(&replies).join(" "), "220 500");
    assert_eq!(flow, Flow::Close);
}

/// RFC 5321 §4.1.1.4: no bare CR or LF may take part in the end, or one message can be smuggled inside another.
#[test]
fn only_crlf_dot_crlf_ends_the_content() {
    let content = b"a\n.\r\nb\r.\r\nc\n.\nd\r\n.\ne\r\n.\rf\r\n";
    let mut input = b"HELO a\r\nMAIL FROM:<s@a>\r\nRCPT TO:<r@b>\r\nDATA\r\n".to_vec();
    input.extend_from_slice(content);
    input.extend_from_slice(b".\r\n");
    for piece in 1..input.len() {
        let (replies, kept, _) = run(FaultPlan::none(), &input, piece);
        assert_eq!(codes(&replies).join(" "), "220 250 250 250 354 250", "in pieces of {piece}");
        // Without the dots that began a line.
        assert_eq!(kept.messages[0].content, b"a\n.\r\nb\r.\r\nc\n.\nd\r\n\ne\r\n\rf\r\n");
        assert_eq!(kept.messages[0].wire_bytes, content.len() as u64);
    }
}

#[test]
fn starttls_is_offered_once_and_what_came_before_it_is_forgotten() {
    let (mut out, mut kept, now) = (Vec::new(), Kept::default(), Instant::now());
    let new = |out: &mut Vec<u8>| {
        let peer = Ipv4Addr::LOCALHOST.into();
        let mut session = Session::new(Arc::new(FaultPlan::none()), Keep::All, peer, 1, now, out);
        session.offer_starttls();
        session
    };
    let mut session = new(&mut out);
    assert_eq!(session.handle(now, b"EHLO a\r\nMAIL FROM:<a@b>\r\n", &mut out, &mut kept), Flow::Continue);
    assert!(out.windows(8).any(|part| part == b"STARTTLS"));
    assert_eq!(session.handle(now, b"STARTTLS\r\n", &mut out, &mut kept), Flow::StartTls);
    session.secured();
    out.clear();
    assert_eq!(session.handle(now, b"EHLO a\r\nSTARTTLS\r\nRCPT TO:<c@d>\r\n", &mut out, &mut kept), Flow::Continue);
    let replies = String::from_utf8(out).unwrap();
    assert!(!replies.contains("STARTTLS"), "{replies}");
    assert_eq!(codes(&replies), ["250", "500", "503"]);

    // RFC 3207 §6: nothing that was sent in clear behind it is taken.
    let mut out = Vec::new();
    let flow = new(&mut out).handle(now, b"EHLO a\r\nSTARTTLS\r\nNOOP\r\n", &mut out, &mut kept);
    assert_eq!(flow, Flow::Close);
    assert!(out.ends_with(b"220 2.0.0 Go ahead\r\n"));
}

#[test]
fn a_greylisted_recipient_is_put_off() {
    let plan = FaultPlan::none().greylist(std::time::Duration::from_secs(5));
    let (replies, kept, _) = run(plan, b"EHLO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n", 100);
    assert_eq!(codes(&replies), ["220", "250", "250", "450", "554"]);
    assert_eq!(kept.greylisted, 1);
}

#[test]
fn a_share_of_the_messages_is_kept_whole() {
    let (mut out, mut kept, now) = (Vec::new(), Kept::default(), Instant::now());
    let peer = Ipv4Addr::LOCALHOST.into();
    let mut session = Session::new(Arc::new(FaultPlan::none()), Keep::Share(0.5), peer, 1, now, &mut out);
    let message =
        [&b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n"[..], &b"0123456789\r\n".repeat(5_000), b".\r\n"].concat();
    for _ in 0..200 {
        session.handle(now, &message, &mut out, &mut kept);
    }
    let whole = kept.messages.iter().filter(|message| message.content.len() == 60_000).count();
    let cut = kept.messages.iter().filter(|message| message.content.len() == HEADER_BYTES_KEPT).count();
    assert_eq!(whole + cut, 200);
    assert!((70..130).contains(&whole), "{whole}");
}
