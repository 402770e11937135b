//! Real servers that end a session early, or take only so many messages in one: each message has its one fate by its
//! first attempt, and the host is not left alone meanwhile. With the usual retries one word taken for another would
//! cost 30 s.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde_json::Value;

use crate::servers::{Kind, Recipients};
use crate::support::client::Client;
use crate::support::process::{Postrider, to_sink};
use crate::support::sink::Sink;
use crate::support::{PATIENCE, event_log, http, message, poll_for};

/// Recipients.
const COUNT: usize = 24;

/// Its `drop` closes behind the refusal. Without CHUNKING, DATA is under way by then.
#[test]
fn exim_drops_whom_it_refuses() {
    by_the_first_attempt(Kind::Exim, Recipients::DropOdd, 1);
}

/// It says 421 to the MAIL behind the last one.
#[test]
fn exim_takes_few_messages_a_session() {
    by_the_first_attempt(Kind::Exim, Recipients::FewASession(3), 1);
}

/// It says 452 4.5.3 to every MAIL behind the last one, and 451 4.5.3 to every RCPT behind the last one.
#[test]
fn opensmtpd_takes_few_messages_a_session() {
    by_the_first_attempt(Kind::OpenSmtpd, Recipients::FewASession(3), 1);
    by_the_first_attempt(Kind::OpenSmtpd, Recipients::FewATransaction(3), 8);
}

fn by_the_first_attempt(kind: Kind, recipients: Recipients, together: usize) {
    let sink = Sink::start();
    let Some(peer) = kind.start(sink.address(), recipients) else { return };
    let refused = |number: usize| matches!(recipients, Recipients::DropOdd) && number % 2 == 1;
    for chunking in ["off", "on"] {
        let events = send(peer.address, chunking, together);
        assert_eq!(events.iter().filter(|event| event["type"] == "TransientFailure").count(), 0, "{chunking}");
        let mut ends = BTreeSet::new();
        for event in events.iter().filter(|event| event_log::is_final(event)) {
            let number = number_of(event_log::text(event, "recipient"));
            let code = event["response"]["code"].as_u64().unwrap();
            let end = if refused(number) { ("Bounce", 550) } else { ("Delivery", 250) };
            assert_eq!((event_log::text(event, "type"), code), end, "in {event}");
            assert_eq!(event["num_attempts"], 1, "in {event}");
            assert!(ends.insert(number), "one end each: {event}");
        }
        assert_eq!(ends.len(), COUNT);
        let mut awaited: BTreeSet<usize> = (0..COUNT).filter(|&number| !refused(number)).collect();
        while !awaited.is_empty() {
            for recipient in sink.next().recipients {
                assert!(awaited.remove(&number_of(&recipient)), "once: {recipient}");
            }
        }
    }
}

/// Sends to [`COUNT`] recipients, so many of them by one message, and waits until each has had its end.
fn send(to: SocketAddr, chunking: &str, together: usize) -> Vec<Value> {
    let directory = tempfile::tempdir().unwrap();
    let settings = format!("tls = \"disabled\"\n[shaping.default]\nconnection_limit = 2\nchunking = \"{chunking}\"\n");
    let postrider = Postrider::start(directory.path(), &format!("{}{settings}", to_sink(to)));
    let mut client = Client::ready(postrider.smtp()).unwrap();
    for number in (0..COUNT).step_by(together) {
        let recipients: Vec<String> = (number..number + together).map(|number| format!("r{number}@d.test")).collect();
        let recipients: Vec<&str> = recipients.iter().map(String::as_str).collect();
        client.submit("s@sender.test", &recipients, &message(&number.to_string())).unwrap();
    }
    poll_for(PATIENCE, "all recipients have an outcome", || {
        let status = http::json(postrider.http(), "/api/admin/status/v1");
        let done = status["delivered"].as_u64().unwrap_or_default() + status["failed"].as_u64().unwrap_or_default();
        (done == COUNT as u64).then_some(())
    });
    postrider.terminate();
    event_log::read(&directory.path().join("spool/events"))
}

fn number_of(recipient: &str) -> usize {
    let number = recipient.strip_prefix('r').and_then(|rest| rest.strip_suffix("@d.test"));
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("one of ours: {recipient}"))
}
