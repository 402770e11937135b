//! A 4xx answer counts an attempt, keeps the message for its due time, and the message is delivered in the end.

use std::time::Duration;

use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, retry_after, to_sink};
use crate::support::message;
use crate::support::sink::{Answer, Sink, Verb};

#[test]
fn retries_come_on_schedule_until_one_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    let mut refusals = 3;
    let sink = Sink::scripted(move |step| {
        if step.verb == Verb::Rcpt && refusals > 0 {
            refusals -= 1;
            return Answer::from("451 4.2.1 Mailbox busy");
        }
        Answer::Usual
    });
    let mut config = to_sink(directory.path(), sink.address());
    let intervals = [300, 100, 500].map(Duration::from_millis);
    retry_after(&mut config, &intervals);
    let mut running = Running::start(config);
    let id = running.inject(&["a@sink.test"], &message("retried"));

    let mut earlier_due = 0;
    for (attempt, interval) in (1..).zip(intervals) {
        let event = running.event(EventKind::TransientFailure);
        assert_eq!((event.message.to_string(), event.attempts), (id.clone(), attempt));
        assert_eq!((event.code, event.enhanced, &*event.text), (451, Some((4, 2, 1)), "Mailbox busy"));
        assert_eq!(event.command, "RCPT TO:<a@sink.test>");
        assert_eq!(event.due_ms, Some(event.at_ms + interval.as_millis() as u64), "a listed interval is exact");
        assert!(event.at_ms >= earlier_due, "not before it is due");
        earlier_due = event.due_ms.unwrap_or_default();
    }
    let delivery = running.event(EventKind::Delivery);
    assert_eq!((delivery.message.to_string(), delivery.attempts), (id, 4));
    assert!(delivery.at_ms >= earlier_due);
    sink.next();
    running.shutdown();
    assert_eq!((sink.taken_so_far().len(), sink.count(Verb::Rcpt)), (0, 4));
}

/// The same behind the final dot, where the whole message was sent in vain.
#[test]
fn a_451_to_the_final_dot_is_retried() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = true;
    let sink = Sink::scripted(move |step| {
        let refused = step.verb == Verb::Content && std::mem::take(&mut first);
        if refused { Answer::from("451 4.3.0 Try later") } else { Answer::Usual }
    });
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    running.inject(&["a@sink.test"], &message("content"));
    let failure = running.event(EventKind::TransientFailure);
    assert_eq!((failure.code, failure.attempts), (451, 1));
    let delivery = running.event(EventKind::Delivery);
    assert_eq!((delivery.attempts, sink.count(Verb::Content)), (2, 2));
}

/// A connection that breaks before the final reply: the attempt counts, and the message goes again.
#[test]
fn a_connection_lost_in_the_transaction_is_retried() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = true;
    let sink = Sink::scripted(move |step| {
        let closes = step.verb == Verb::Content && std::mem::take(&mut first);
        if closes { Answer::Close } else { Answer::Usual }
    });
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    running.inject(&["a@sink.test"], &message("lost"));
    let failure = running.event(EventKind::TransientFailure);
    assert_eq!(failure.attempts, 1, "{}", failure.to_json());
    let delivery = running.event(EventKind::Delivery);
    assert_eq!(delivery.attempts, 2);
}
