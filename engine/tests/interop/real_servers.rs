//! Mail of many shapes to real servers, by STARTTLS where it is offered, where it is required, and in the clear: each
//! message arrives once, with its own envelope, octet for octet, and the event log says how it went.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::servers::{Kind, Recipients};
use crate::support::client::Client;
use crate::support::process::Postrider;
use crate::support::sink::{Delivered, Sink};
use crate::support::{PATIENCE, event_log, http, poll_for};
use crate::tools;

/// Recipient domains, and what their routes say of TLS.
const WAYS: [(&str, &str); 3] =
    [("opportunistic.test", "opportunistic"), ("required.test", "required"), ("clear.test", "disabled")];

#[test]
fn postfix() {
    talk(Kind::Postfix, Abilities { smtputf8: true, quoted: true, line_octets: 50_000 });
}

#[test]
fn exim() {
    talk(Kind::Exim, Abilities { smtputf8: true, quoted: true, line_octets: 50_000 });
}

#[test]
fn opensmtpd() {
    talk(Kind::OpenSmtpd, Abilities { smtputf8: false, quoted: false, line_octets: 10_000 });
}

#[test]
fn aiosmtpd() {
    talk(Kind::Aiosmtpd, Abilities { smtputf8: true, quoted: true, line_octets: 998 });
}

#[test]
fn haraka() {
    talk(Kind::Haraka, Abilities { smtputf8: true, quoted: true, line_octets: 10_000 });
}

#[derive(Debug, Clone, Copy)]
struct Abilities {
    smtputf8: bool,
    /// It takes a quoted local part, with spaces.
    quoted: bool,
    /// The longest line that it takes, without CRLF.
    line_octets: usize,
}

/// One message to send.
struct Sent {
    content: Vec<u8>,
    reverse_path: String,
    recipients: Vec<String>,
    needs: Needs,
    way: &'static str,
}

fn talk(kind: Kind, abilities: Abilities) {
    let sink = Sink::start();
    let Some(peer) = kind.start(sink.address(), Recipients::Accept) else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut config = "hostname = \"mta.test\"\nshards = 2\n[spool]\npath = \"spool\"\nallow_filesystem = true\n\
                      [retry]\nretry_interval = [\"1s\"]\n"
        .to_owned();
    for (domain, tls) in WAYS {
        config += &format!("[[route]]\ndomain = \"{domain}\"\nto = [\"{}\"]\ntls = \"{tls}\"\n", peer.address);
    }
    let postrider = Postrider::start(directory.path(), &config);
    let encrypts = completes_starttls(peer.address);
    // What Debian 12 has of OpenSMTPD offers STARTTLS and fails in the handshake, whoever asks.
    assert!(encrypts || kind == Kind::OpenSmtpd, "{kind:?} has TLS");
    let sent = inject(&postrider, abilities, encrypts);
    let expected: usize = sent.values().filter(|sent| arrives(sent, abilities)).map(|sent| sent.recipients.len()).sum();
    let mut missing: BTreeMap<(String, String), ()> = BTreeMap::new();
    for (id, sent) in sent.iter().filter(|(_, sent)| arrives(sent, abilities)) {
        missing.extend(sent.recipients.iter().map(|recipient| ((id.clone(), recipient.clone()), ())));
    }
    poll_for(2 * PATIENCE, "everything has an outcome", || {
        let status = http::json(postrider.http(), "/api/admin/status/v1");
        let done = status["delivered"].as_u64().unwrap_or_default() + status["failed"].as_u64().unwrap_or_default();
        (done > 0 && status["recipients"] == 0).then_some(())
    });
    while !missing.is_empty() {
        arrived(&sink.next(), &sent, &mut missing);
    }
    postrider.terminate();
    assert!(sink.taken_so_far().is_empty(), "more than was sent");
    let address = peer.address.to_string();
    check_events(&event_log::read(&directory.path().join("spool/events")), &sent, abilities, &address, encrypts);
    println!("{kind:?}: {} messages to {expected} recipients arrived as they were sent", sent.len());
}

/// Whether a handshake succeeds, by OpenSSL's judgement.
fn completes_starttls(address: SocketAddr) -> bool {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-brief", "-starttls", "smtp", "-connect", &address.to_string()]);
    let output = command.stdin(Stdio::null()).output().expect("openssl is installed");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).contains("CONNECTION ESTABLISHED")
}

fn arrives(sent: &Sent, abilities: Abilities) -> bool {
    match sent.needs {
        Needs::Nothing => true,
        Needs::Smtputf8 => abilities.smtputf8,
        Needs::Quoted => abilities.quoted,
    }
}

/// Sends every shape on every way, again and again until there are some hundred; by id.
fn inject(postrider: &Postrider, abilities: Abilities, encrypts: bool) -> BTreeMap<String, Sent> {
    let mut sent = BTreeMap::new();
    let mut client = Client::ready(postrider.smtp()).unwrap();
    let shapes = shapes(abilities);
    let rounds = tools::peer_messages().div_ceil(WAYS.len() * shapes.len());
    let ways = WAYS.into_iter().filter(|(_, tls)| encrypts || *tls != "required");
    let each = (0..rounds).flat_map(|_| ways.clone()).flat_map(|way| shapes.iter().map(move |shape| (way, shape)));
    for (number, ((domain, _), shape)) in each.enumerate() {
        let to = |local: &&str| format!("{}@{domain}", local.replace('#', &number.to_string()));
        let it = Sent {
            content: shape.content.clone(),
            reverse_path: shape.reverse_path.replace('#', &number.to_string()),
            recipients: shape.recipients.iter().map(to).collect(),
            needs: shape.needs,
            way: domain,
        };
        sent.insert(submit(&mut client, &it), it);
    }
    sent
}

/// The id that the engine gave it.
fn submit(client: &mut Client, sent: &Sent) -> String {
    let parameters = if sent.needs == Needs::Smtputf8 { " BODY=8BITMIME SMTPUTF8" } else { " BODY=8BITMIME" };
    let mail = client.command(&format!("MAIL FROM:<{}>{parameters}", sent.reverse_path)).unwrap();
    assert_eq!(mail.code, 250, "{mail}");
    for recipient in &sent.recipients {
        let rcpt = client.command(&format!("RCPT TO:<{recipient}>")).unwrap();
        assert_eq!(rcpt.code, 250, "{recipient}: {rcpt}");
    }
    let data = client.command("DATA").unwrap();
    assert_eq!(data.code, 354, "{data}");
    client.write(&crate::support::client::stuffed(&sent.content)).unwrap();
    let reply = client.reply().unwrap();
    assert_eq!(reply.code, 250, "{reply}");
    reply.text.split("id=").nth(1).expect("the reply names the id").trim().to_owned()
}

/// Holds what came against what was sent. It is known by recipient, which no two messages share.
fn arrived(it: &Delivered, sent: &BTreeMap<String, Sent>, missing: &mut BTreeMap<(String, String), ()>) {
    for recipient in &it.recipients {
        let found = sent.iter().find(|(_, sent)| sent.recipients.contains(recipient));
        let (id, sent) = found.unwrap_or_else(|| panic!("nobody sent to {recipient}"));
        assert!(missing.remove(&(id.clone(), recipient.clone())).is_some(), "{recipient} got it twice");
        assert_eq!(it.reverse_path, sent.reverse_path, "the reverse path of the message to {recipient}");
        if !it.content.ends_with(&sent.content) {
            let from = it.content.len().saturating_sub(sent.content.len());
            let differs = it.content[from..].iter().zip(&sent.content).position(|(came, went)| came != went);
            let head = String::from_utf8_lossy(&it.content[..it.content.len().min(3_000)]);
            panic!("to {recipient} came {} octets, differing {differs:?} in\n{head}", it.content.len());
        }
    }
}

fn check_events(events: &[Value], sent: &BTreeMap<String, Sent>, abilities: Abilities, peer: &str, encrypts: bool) {
    let deferrals: Vec<&Value> = events.iter().filter(|event| event["type"] == "TransientFailure").collect();
    assert!(deferrals.is_empty(), "nothing went wrong on the way: {deferrals:?}");
    let finals = event_log::finals(events);
    assert_eq!(finals.len(), sent.values().map(|sent| sent.recipients.len()).sum::<usize>());
    assert!(finals.values().all(|&records| records == 1), "one final record each");
    let mut ciphers = BTreeSet::new();
    for event in events.iter().filter(|event| event_log::is_final(event)) {
        let text = |field| event_log::text(event, field);
        let sent = &sent[text("id")];
        assert_eq!(text("sender"), sent.reverse_path, "in {event}");
        if !arrives(sent, abilities) {
            assert_eq!(text("type"), "Bounce", "in {event}");
            // RFC 6531 §3.2: without SMTPUTF8 it must not be sent.
            let enhanced = &event["response"]["enhanced_code"];
            let ours = enhanced["subject"] == 6 && matches!(enhanced["detail"].as_u64(), Some(7 | 9));
            assert_eq!(ours, sent.needs == Needs::Smtputf8, "5.6.7 or 5.6.9 where SMTPUTF8 is missing: {event}");
            continue;
        }
        assert_eq!((text("type"), &event["response"]["code"]), ("Delivery", &250.into()), "in {event}");
        assert_eq!(event["num_attempts"], 1, "nothing went wrong on the way: {event}");
        assert_eq!(text_of(&event["peer_address"]["addr"]), peer, "in {event}");
        assert_eq!(event["delivery_protocol"], "ESMTP", "in {event}");
        let encrypted = encrypts && sent.way != "clear.test";
        let protocol = event["tls_protocol_version"].as_str();
        assert_eq!(protocol.is_some_and(|protocol| protocol.starts_with("TLSv1.")), encrypted, "in {event}");
        assert_eq!(event["tls_cipher"].is_string(), encrypted, "in {event}");
        ciphers.extend(event["tls_cipher"].as_str().map(|cipher| format!("{} {cipher}", protocol.unwrap_or_default())));
    }
    println!("by {ciphers:?}");
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is text"))
}

/// A kind of message; `#` in an address stands for the message's number.
struct Shape {
    content: Vec<u8>,
    reverse_path: &'static str,
    recipients: Vec<&'static str>,
    needs: Needs,
}

/// What a peer has to be able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    Smtputf8,
    Quoted,
}

fn shapes(abilities: Abilities) -> Vec<Shape> {
    let mut shapes: Vec<Shape> = bodies(abilities.line_octets).into_iter().map(|body| shape(HEAD, &body)).collect();
    let small = || shape(HEAD, b"\r\nsmall\r\n");
    shapes.push(Shape { reverse_path: "", ..small() });
    shapes.push(Shape { needs: Needs::Quoted, reverse_path: "\"odd # name\"@sender.test", ..small() });
    shapes.push(Shape { recipients: vec!["#a", "#b", "#c", "#d", "#e"], ..small() });
    let long_local = "l#34567890123456789012345678901234567890123456789012345678";
    shapes.push(Shape { recipients: vec![long_local], ..small() });
    shapes.push(Shape { recipients: vec!["x#!$%&'*+-/=?^_`{|}~"], ..small() });
    // RFC 6532: a header in UTF-8, and addresses.
    let utf8 = HEAD.replace("Subject: shapes", "Subject: Grüße aus Köln ✉");
    shapes.push(Shape { needs: Needs::Smtputf8, ..shape(&utf8, "\r\nGrüße\r\n".as_bytes()) });
    shapes.push(Shape { needs: Needs::Smtputf8, recipients: vec!["jürgen#"], ..shape(&utf8, b"\r\nx\r\n") });
    shapes.push(Shape { needs: Needs::Smtputf8, reverse_path: "grüße#@sender.test", ..small() });
    shapes
}

fn shape(head: &str, rest: &[u8]) -> Shape {
    let content = [head.as_bytes(), rest].concat();
    Shape { content, reverse_path: "s#@sender.test", recipients: vec!["r#"], needs: Needs::Nothing }
}

/// What follows the header fields, the empty line included.
fn bodies(line_octets: usize) -> Vec<Vec<u8>> {
    let line = |octets: usize| "x".repeat(octets);
    let mut bodies = vec![
        b"\r\n".to_vec(),
        b"\r\none line\r\n".to_vec(),
        b"\r\n.\r\n..\r\n...\r\n.x\r\n .\r\n.\r\n".to_vec(),
        b"\r\n\r\n\r\n\r\n".to_vec(),
        b"\r\n.\r\n".to_vec(),
        b"\r\nRSET\r\nMAIL FROM:<x@x.test>\r\nQUIT\r\nBDAT 3 LAST\r\n".to_vec(),
        b"\r\ntrailing \r\n\t\r\n  \r\n".to_vec(),
        b"\r\nFrom the beginning of a line\r\n>From here\r\n".to_vec(),
        [b"\r\n".as_slice(), &(1..=255).filter(|octet| !b"\r\n".contains(octet)).collect::<Vec<u8>>(), b"\r\n"]
            .concat(),
        "\r\nGrüße, 日本語, ✉\r\n".as_bytes().to_vec(),
        b"X-Folded: a\r\n \r\n\tb\r\nX-Empty:\r\n\r\nbody\r\n".to_vec(),
        format!("\r\n{}\r\n", line(998)).into_bytes(),
        format!("\r\n.{}\r\n", line(997)).into_bytes(),
        format!("\r\n{}\r\n", line(line_octets)).into_bytes(),
        format!("\r\n{}", format!("{}\r\n", line(76)).repeat(10_000)).into_bytes(),
        format!("\r\n{}", ".\r\n..\r\n".repeat(20_000)).into_bytes(),
    ];
    // Ends around the borders of buffers and TLS records.
    for octets in [4_094, 4_095, 4_096, 8_192, 16_383, 16_384, 16_385, 65_536] {
        let lines = format!("{}\r\n", line(62)).repeat(octets / 64);
        bodies.push(format!("\r\n{lines}{}\r\n", ".".repeat(octets % 64)).into_bytes());
    }
    bodies
}

const HEAD: &str = "From: Sender <sender@sender.test>\r\nTo: someone@there.test\r\nSubject: shapes\r\n\
                    Date: Sun, 1 Nov 2026 12:00:00 +0000\r\nMessage-ID: <shapes@sender.test>\r\n\
                    MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\
                    Content-Transfer-Encoding: 8bit\r\n";
