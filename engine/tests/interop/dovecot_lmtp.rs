//! Dovecot's LMTP server, by TCP with and without TLS, and by a Unix socket: of a message's recipients one has it, one
//! is refused by name, and one behind the content because its mailbox is full; each has its own fate.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::servers::{self, Dovecot};
use crate::support::client::Client;
use crate::support::process::Postrider;
use crate::support::{PATIENCE, event_log, http, poll_for};

/// Recipient domains, what their routes say of TLS, and whether they lead to the Unix socket.
const WAYS: [(&str, &str, bool); 4] = [
    ("opportunistic.test", "opportunistic", false),
    ("required.test", "required", false),
    ("clear.test", "disabled", false),
    ("socket.test", "opportunistic", true),
];

const ROUNDS: usize = 8;

#[test]
fn dovecot() {
    let Some(Dovecot { peer, socket, mail }) = servers::dovecot() else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut config = "hostname = \"mta.test\"\nshards = 2\n[spool]\npath = \"spool\"\nallow_filesystem = true\n\
                      [retry]\nretry_interval = [\"1s\"]\n"
        .to_owned();
    for (domain, tls, is_unix) in WAYS {
        let to = if is_unix { format!("unix:{}", socket.display()) } else { peer.address.to_string() };
        config += &format!("[[route]]\ndomain = \"{domain}\"\nprotocol = \"lmtp\"\nto = [\"{to}\"]\ntls = \"{tls}\"\n");
    }
    let postrider = Postrider::start(directory.path(), &config);
    let mut sent = BTreeMap::new();
    let mut client = Client::ready(postrider.smtp()).unwrap();
    for number in 0..ROUNDS * WAYS.len() {
        let (domain, content) = (WAYS[number % WAYS.len()].0, content(number));
        let recipients = ["ada", "nobody", "full"].map(|name| format!("{name}@{domain}"));
        let recipients: Vec<&str> = recipients.iter().map(String::as_str).collect();
        let id = client.submit(&format!("s{number}@sender.test"), &recipients, &content).unwrap();
        sent.insert(id, (number, domain));
    }
    let recipients = 3 * sent.len() as u64;
    poll_for(2 * PATIENCE, "everything has an outcome", || {
        let status = http::json(postrider.http(), "/api/admin/status/v1");
        let done = status["delivered"].as_u64().unwrap_or_default() + status["failed"].as_u64().unwrap_or_default();
        (done == recipients && status["recipients"] == 0).then_some(())
    });
    postrider.terminate();
    check_events(&event_log::read(&directory.path().join("spool/events")), &sent);
    check_mailbox(&mail.join("ada/new"), sent.len());
    assert_eq!(delivered(&mail.join("full/new")), [""; 0], "what was refused is not there");
}

/// Of many lengths, some with lines that begin with a dot, some in UTF-8.
fn content(number: usize) -> Vec<u8> {
    let dots = ".\r\n..\r\n.x\r\n".repeat(number % 3);
    let lines = "Grüße, a line of text\r\n".repeat(1 << (number % 14));
    format!("From: s@sender.test\r\nTo: x@there.test\r\nSubject: m{number}\r\n\r\n{dots}{lines}").into_bytes()
}

fn check_events(events: &[Value], sent: &BTreeMap<String, (usize, &str)>) {
    let finals: Vec<&Value> = events.iter().filter(|event| event_log::is_final(event)).collect();
    assert_eq!(finals.len(), 3 * sent.len());
    for event in finals {
        let text = |field| event_log::text(event, field);
        let (number, domain) = sent[text("id")];
        assert_eq!(text("sender"), format!("s{number}@sender.test"), "in {event}");
        let (name, at) = text("recipient").split_once('@').unwrap();
        assert_eq!(at, domain, "in {event}");
        let code = event["response"]["code"].as_u64().unwrap();
        let expected = match name {
            "ada" => ("Delivery", 250, "."),
            "nobody" => ("Bounce", 550, "RCPT TO:<nobody@"),
            _ => ("Bounce", 552, "."),
        };
        assert_eq!((text("type"), code), (expected.0, expected.1), "in {event}");
        let command = event["response"]["command"].as_str().unwrap();
        assert!(command.starts_with(expected.2) || command.starts_with("BDAT "), "in {event}");
        assert_eq!((text("delivery_protocol"), &event["num_attempts"]), ("LMTP", &1.into()), "in {event}");
        let (_, tls, is_unix) = WAYS.into_iter().find(|(way, ..)| *way == domain).unwrap();
        let is_encrypted = tls != "disabled" && !is_unix;
        assert_eq!(event["tls_cipher"].is_string(), is_encrypted, "in {event}");
        let address = event["peer_address"]["addr"].as_str().unwrap();
        assert_eq!(address.starts_with("unix:/"), is_unix, "in {event}");
    }
    let deferrals: Vec<&Value> = events.iter().filter(|event| event["type"] == "TransientFailure").collect();
    assert!(deferrals.is_empty(), "nothing went wrong on the way: {deferrals:?}");
}

fn check_mailbox(folder: &Path, messages: usize) {
    let mut missing: Vec<usize> = (0..messages).collect();
    for text in delivered(folder) {
        let subject = text.lines().find_map(|line| line.strip_prefix("Subject: m")).expect("it has a subject");
        let number: usize = subject.parse().unwrap();
        let place = missing.iter().position(|&known| known == number);
        missing.remove(place.unwrap_or_else(|| panic!("{number} came twice")));
        assert!(text.contains(&format!("Return-Path: <s{number}@sender.test>\r\n")), "RIGHT-ENVELOPE: {number}");
        assert!(text.as_bytes().ends_with(&content(number)), "{number} octet for octet");
    }
    assert_eq!(missing, [0; 0], "these did not come");
}

fn delivered(folder: &Path) -> Vec<String> {
    let Ok(files) = std::fs::read_dir(folder) else { return Vec::new() };
    files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap()).collect()
}
