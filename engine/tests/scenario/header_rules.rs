//! What is changed in a message (docs/smtp.md), seen at the other end.

use postrider::outcome::event::EventKind;

use crate::support::client::{self, Client};
use crate::support::embedded::{Running, to_sink};
use crate::support::message;
use crate::support::sink::Sink;

/// The message as it arrives, in its parts: the field names that were put in front, and the rest.
fn relayed(content: &[u8], expected_rest: &[u8]) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let running = Running::start(to_sink(directory.path(), sink.address()));
    client::submit(running.smtp(), "sender@sender.test", &["a@sink.test"], content);
    let arrived = sink.next().content;
    let shown = || String::from_utf8_lossy(&arrived).into_owned();
    let front = arrived.strip_suffix(expected_rest).unwrap_or_else(|| panic!("the rest byte for byte: {}", shown()));
    let front = std::str::from_utf8(front).unwrap();
    let starts_field = |line: &&str| !line.starts_with([' ', '\t']);
    front.lines().filter(starts_field).map(|line| line.split(':').next().unwrap().to_ascii_lowercase()).collect()
}

#[test]
fn a_complete_message_gets_received_and_a_reference() {
    let content = message("complete");
    let front = relayed(&content, &content);
    assert_eq!(front, ["received", "x-postrider-ref"]);
}

#[test]
fn date_and_message_id_are_added_where_missing() {
    let content = b"From: a@sender.test\r\nSubject: bare\r\n\r\nbody\r\n";
    let mut front = relayed(content, content);
    assert_eq!(front.remove(0), "received", "on top");
    front.sort();
    assert_eq!(front, ["date", "message-id", "x-postrider-ref"]);
}

#[test]
fn our_own_fields_and_bcc_are_removed() {
    let removed = "X-Tenant: t\r\nX-Campaign: spring\r\n sale\r\nx-job: j\r\nReturn-Path: <r@sender.test>\r\n\
                   Bcc: secret@sink.test,\r\n other@sink.test\r\n";
    let kept = [
        "From: a@sender.test\r\nDate: Sun, 1 Nov 2026 12:00:00 +0000\r\n",
        "Message-ID: <1@a.test>\r\nTo: b@c.test\r\n",
    ];
    let body = "\r\nBcc: in the body\r\nX-Tenant: stays\r\n";
    // X-Tenant names a tenant that isn't there: with none configured it is only removed.
    let content = format!("{}{removed}{}{body}", kept[0], kept[1]);
    let front = relayed(content.as_bytes(), format!("{}{}{body}", kept[0], kept[1]).as_bytes());
    assert_eq!(front, ["received", "x-postrider-ref"]);
}

#[test]
fn bodies_arrive_byte_for_byte() {
    let head = "From: a@sender.test\r\nDate: Sun, 1 Nov 2026 12:00:00 +0000\r\nMessage-ID: <1@a.test>\r\n";
    let long = "x".repeat(998);
    let bodies: [&[u8]; 5] = [
        b"",
        b"\r\n",
        b"\r\n.\r\n..\r\n.x\r\n\r\n.\r\n",
        b"\r\n8 bit: \xe4\xf6\xfc \xff\x80\r\n trailing space \r\n\t\r\n\r\n",
        format!("\r\n{long}\r\n.{}\r\n", &long[1..]).leak().as_bytes(),
    ];
    for body in bodies {
        let content = [head.as_bytes(), body].concat();
        relayed(&content, &content);
    }
}

#[test]
fn the_campaign_is_in_the_event() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    let content = [b"X-Campaign: spring\r\n", &*message("campaign")].concat();
    running.inject(&["a@sink.test"], &content);
    let delivery = running.event(EventKind::Delivery);
    assert_eq!(&*delivery.campaign, "spring");
    assert!(delivery.queue.starts_with("spring:"), "KumoMTA's queue name: {}", delivery.queue);
}

#[test]
fn a_loop_ends_with_554() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let running = Running::start(to_sink(directory.path(), sink.address()));
    let mut client = Client::ready(running.smtp()).unwrap();
    let received = "Received: from a by b; Sun, 1 Nov 2026 12:00:00 +0000\r\n";
    let with = |count: usize| [received.repeat(count).as_bytes(), &*message("loop")].concat();
    let reply = client.send("s@sender.test", &["a@sink.test"], &with(101)).unwrap();
    assert_eq!((reply.code, &reply.text[..5]), (554, "5.4.6"), "{reply}");
    let reply = client.send("s@sender.test", &["a@sink.test"], &with(100)).unwrap();
    assert_eq!(reply.code, 250, "{reply}");
    sink.next();
}
