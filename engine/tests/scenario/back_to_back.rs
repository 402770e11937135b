//! Whole transactions in flight over real sockets: each message arrives once, octet for octet, under its own envelope.

use std::collections::BTreeSet;
use std::path::Path;

use postrider::config::{Chunking, Config};
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, to_sink};
use crate::support::sink::{Answer, Sink, Step, Verb};
use crate::support::{message, token};

const OFFERS: &str = "250-sink.test\n250-PIPELINING\n250-SIZE 104857600\n250-8BITMIME\n250 CHUNKING";

fn config(directory: &Path, sink: &Sink) -> Config {
    let mut config = to_sink(directory, sink.address());
    config.shaping.chunking = Chunking::BackToBack;
    config.shaping.connection_limit = 2;
    config
}

fn offering(step: &Step<'_>) -> Answer {
    if step.verb == Verb::Ehlo { Answer::from(OFFERS) } else { Answer::Usual }
}

/// Of `r7@sink.test`, also within a command.
fn number_of(text: &str) -> Option<usize> {
    let (local_part, _) = text.split_once('@')?;
    local_part.rsplit_once('r')?.1.parse().ok()
}

/// Small ones in numbers, some larger than what a socket takes at a time, some with lines that begin with a dot.
fn content(number: usize) -> Vec<u8> {
    let mut content = message(&number.to_string());
    let lines = if number.is_multiple_of(25) { 30_000 } else { number };
    (0..lines).for_each(|line| content.extend_from_slice(format!(".line {line} of {number}\r\n").as_bytes()));
    content
}

#[test]
fn many_messages_arrive_once_each() {
    const MESSAGES: usize = 300;
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::scripted(offering);
    let mut running = Running::start(config(directory.path(), &sink));
    for number in 0..MESSAGES {
        let recipient = format!("r{number}@sink.test");
        running.try_inject(&format!("s{number}@sender.test"), &[&recipient], &content(number)).unwrap();
    }
    let finals = running.finals(MESSAGES);
    assert!(finals.iter().all(|event| event.kind == EventKind::Delivery && event.attempts == 1));
    assert!(finals.iter().all(|event| event.command.starts_with("BDAT ")), "content went by BDAT");
    let mut seen = BTreeSet::new();
    for delivered in sink.take(MESSAGES) {
        let number: usize = token(&delivered.content).parse().unwrap();
        assert_eq!(delivered.reverse_path, format!("s{number}@sender.test"), "RIGHT-ENVELOPE");
        assert_eq!(delivered.recipients, [format!("r{number}@sink.test")]);
        assert!(delivered.content.ends_with(&content(number)), "{number} octet for octet");
        assert!(seen.insert(number), "once");
    }
    assert!(running.shutdown().is_empty() && sink.taken_so_far().is_empty());
    assert_eq!(sink.count(Verb::Data), 0);
}

/// A peer that refuses some recipients and some content: each message has its own fate, and its own only.
#[test]
fn each_message_has_its_own_fate() {
    const MESSAGES: usize = 60;
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::scripted(|step| match step.verb {
        Verb::Rcpt if number_of(step.line).is_some_and(|n| n.is_multiple_of(3)) => Answer::from("550 5.1.1 nobody"),
        Verb::Content if number_of(&step.recipients[0]).is_some_and(|n| n.is_multiple_of(5)) => {
            Answer::from("554 5.7.1 not that")
        }
        _ => offering(step),
    });
    let mut running = Running::start(config(directory.path(), &sink));
    for number in 0..MESSAGES {
        let reverse_path = format!("s{number}@sender.test");
        running.try_inject(&reverse_path, &[&format!("r{number}@sink.test")], &content(number % 20)).unwrap();
    }
    for event in running.finals(MESSAGES) {
        let number = number_of(&event.recipient).unwrap();
        let expected = match number {
            _ if number.is_multiple_of(3) => (EventKind::Bounce, "nobody"),
            _ if number.is_multiple_of(5) => (EventKind::Bounce, "not that"),
            _ => (EventKind::Delivery, "taken"),
        };
        assert_eq!((event.kind, &*event.text), expected, "{number}");
    }
    let taken = (0..MESSAGES).filter(|n| !n.is_multiple_of(3) && !n.is_multiple_of(5)).count();
    for delivered in sink.take(taken) {
        let number = number_of(&delivered.recipients[0]).unwrap();
        assert_eq!(delivered.reverse_path, format!("s{number}@sender.test"), "RIGHT-ENVELOPE");
    }
    assert!(running.shutdown().is_empty() && sink.taken_so_far().is_empty());
}

/// A connection is lost in the middle: what was in flight is sent again, and nothing is lost.
#[test]
fn a_lost_connection_loses_nothing() {
    const MESSAGES: usize = 40;
    let directory = tempfile::tempdir().unwrap();
    let mut contents = 0;
    let sink = Sink::scripted(move |step| {
        contents += usize::from(step.verb == Verb::Content);
        if step.verb == Verb::Content && contents == 5 { Answer::Close } else { offering(step) }
    });
    let mut running = Running::start(config(directory.path(), &sink));
    for number in 0..MESSAGES {
        running.inject(&[&format!("r{number}@sink.test")], &content(number));
    }
    let finals = running.finals(MESSAGES);
    assert!(finals.iter().all(|event| event.kind == EventKind::Delivery), "all arrive in the end");
    assert!(finals.iter().any(|event| event.attempts == 2), "those in flight were in doubt");
    // The peer may have taken what its lost replies were about: that comes twice.
    let mut arrived = BTreeSet::new();
    while arrived.len() < MESSAGES {
        arrived.insert(token(&sink.next().content));
    }
}

/// Who offers CHUNKING and does not know BDAT has refused no message: by DATA it takes them. A 503 may as well be about
/// what was in flight, so that a chunk by itself is tried before.
#[test]
fn a_peer_that_refuses_bdat_gets_its_mail_by_data() {
    for (chunking, refusal, attempts) in [
        (Chunking::On, "500 5.5.2 what?", 2),
        (Chunking::On, "503 5.5.1 not now", 2),
        (Chunking::BackToBack, "502 5.5.1 not built", 2),
        (Chunking::BackToBack, "503 5.5.1 not now", 3),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let mut by_data = false;
        let sink = Sink::scripted(move |step| match step.verb {
            Verb::Content if !by_data => Answer::from(refusal),
            Verb::Data | Verb::Mail => {
                by_data = step.verb == Verb::Data;
                Answer::Usual
            }
            _ => offering(step),
        });
        let mut config = config(directory.path(), &sink);
        config.shaping.chunking = chunking;
        config.shaping.connection_limit = 1;
        let mut running = Running::start(config);
        for number in 0..2 {
            running.inject(&["a@sink.test"], &message(&number.to_string()));
            let event = running.event_where("final", |event| event.kind.is_final());
            assert_eq!((event.kind, &*event.command), (EventKind::Delivery, "."), "{refusal}: {}", event.to_json());
            // It is remembered of the site.
            assert_eq!(event.attempts, if number == 0 { attempts } else { 1 }, "{refusal}: {}", event.to_json());
        }
    }
}
