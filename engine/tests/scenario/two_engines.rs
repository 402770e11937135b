//! Two engines in one process, each with a spool of its own: one relays through the other.

use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, to_sink};
use crate::support::sink::Sink;
use crate::support::{message, token};

#[test]
fn one_relays_through_the_other() {
    const COUNT: usize = 50;
    let (first_directory, second_directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sink = Sink::start();
    let mut second = Running::start(to_sink(second_directory.path(), sink.address()));
    let mut config = to_sink(first_directory.path(), second.smtp());
    config.egress_sources[0].ehlo_domain = "first.test".into();
    let mut first = Running::start(config);
    for number in 0..COUNT {
        first.inject(&["a@sink.test"], &message(&number.to_string()));
    }
    let arrived = sink.take(COUNT);
    let mut tokens: Vec<usize> = arrived.iter().map(|it| token(&it.content).parse().unwrap()).collect();
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..COUNT), "each message arrives once");
    for delivered in arrived {
        assert_eq!(delivered.ehlo, "mta.test");
        let text = String::from_utf8(delivered.content).unwrap();
        let received = text.lines().filter(|line| line.starts_with("Received:")).count();
        assert_eq!(received, 2, "both have left their mark: {text}");
    }
    for engine in [&mut first, &mut second] {
        assert!(engine.finals(COUNT).iter().all(|event| event.kind == EventKind::Delivery));
    }
    // One's end leaves the other at work.
    first.shutdown();
    second.inject(&["a@sink.test"], &message("after"));
    assert_eq!(token(&sink.next().content), "after");
    second.shutdown();
}

/// A spool belongs to one engine at a time.
#[test]
fn a_spool_is_not_shared() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let config = to_sink(directory.path(), sink.address());
    let running = Running::start(config.clone());
    let error = postrider::Engine::builder(config).start().expect_err("the spool is in use").to_string();
    assert!(error.contains("spool"), "the error says what is in use: {error}");
    running.inject(&["a@sink.test"], &message("unharmed"));
    assert_eq!(token(&sink.next().content), "unharmed");
}
