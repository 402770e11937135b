//! What fails before MAIL counts no attempt: the host backs off, and the messages say what they wait for.

use postrider::admin::MessageRow;
use postrider::config::TlsMode;
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, to_sink};
use crate::support::message;
use crate::support::sink::{Sink, Verb};

/// Messages wait, blocked and untried, while `verb` is answered so; then they go as if nothing had been.
fn no_attempt(verb: Verb, reply: &str, expected: &str) {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(verb, reply);
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    for token in ["one", "two", "three"] {
        running.inject(&["a@sink.test"], &message(token));
    }
    let all_blocked = |rows: &[MessageRow]| {
        let all = |row: &MessageRow| is_blocked_by(std::slice::from_ref(row), expected) && row.num_attempts == 0;
        rows.len() == 3 && rows.iter().all(all)
    };
    let rows = running.rows_when("all blocked", all_blocked);
    for row in rows {
        let blocked_by = row.blocked_by.unwrap_or_default();
        assert!(blocked_by.contains(&sink.address().to_string()), "and which host: {blocked_by}");
        assert!(row.due.is_some(), "and when it is tried again");
    }
    sink.recover();
    for event in running.finals(3) {
        assert_eq!((event.kind, event.attempts), (EventKind::Delivery, 1), "the first attempt: {}", event.to_json());
    }
    let rest = running.shutdown();
    assert!(rest.iter().all(|event| event.kind == EventKind::Reception), "no failure is recorded: {rest:?}");
}

/// Before its connection fails, a message waits for that.
fn is_blocked_by(rows: &[MessageRow], why: &str) -> bool {
    rows.iter().any(|row| row.blocked_by.as_deref().is_some_and(|blocked| blocked.contains(why)))
}

#[test]
fn a_554_greeting() {
    no_attempt(Verb::Connect, "554 5.3.2 No service here", "554 5.3.2 No service here");
}

#[test]
fn a_421_greeting() {
    no_attempt(Verb::Connect, "421 4.3.2 Closing down", "421 4.3.2 Closing down");
}

#[test]
fn a_refused_ehlo() {
    no_attempt(Verb::Ehlo, "550 5.7.1 Not you", "550 5.7.1 Not you");
}

#[test]
fn a_refused_connection() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let address = sink.address();
    drop(sink);
    let mut running = Running::start(to_sink(directory.path(), address));
    running.inject(&["a@sink.test"], &message("waiting"));
    let rows = running.rows_when("blocked", |rows| is_blocked_by(rows, "refused"));
    assert_eq!(rows[0].num_attempts, 0);
    let sink = Sink::start_at(address);
    let delivery = running.event(EventKind::Delivery);
    assert_eq!(delivery.attempts, 1);
    sink.next();
}

/// A static route that says nothing of TLS leaves it to shaping: nothing goes in the clear that must not.
#[test]
fn no_tls_where_shaping_requires_it_of_a_static_route() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let mut config = to_sink(directory.path(), sink.address());
    config.shaping.tls = TlsMode::Required;
    let running = Running::start(config);
    running.inject(&["a@sink.test"], &message("waiting"));
    let rows = running.rows_when("blocked", |rows| is_blocked_by(rows, "TLS is required"));
    assert_eq!(rows[0].num_attempts, 0);
    running.shutdown();
    assert_eq!(sink.count(Verb::Mail), 0);
}
