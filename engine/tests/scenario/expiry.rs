//! A message that can't be delivered within `max_age` ends as Expiration, with the last answer in it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use postrider::admin::MessageRow;
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, retry_after, to_sink};
use crate::support::event_log;
use crate::support::sink::{Sink, Verb};
use crate::support::{message, poll};

#[test]
fn a_deferred_message_expires_once() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Rcpt, "451 4.2.1 Mailbox busy");
    let mut config = to_sink(directory.path(), sink.address());
    retry_after(&mut config, &[Duration::from_millis(400)]);
    config.retry.max_age = Duration::from_secs(1);
    let next_ms = 400;
    let mut running = Running::start(config);
    let id = running.inject(&["a@sink.test"], &message("late"));
    let end = running.event_where("final", |event| event.kind.is_final());
    assert_eq!((end.kind, end.message.to_string()), (EventKind::Expiration, id));
    assert_eq!(end.enhanced, Some((5, 4, 7)));
    assert!(end.text.contains("Mailbox busy"), "the last answer is told: {}", end.text);
    // At its last attempt it is known that the next would come too late.
    assert!(end.at_ms + next_ms >= end.created_ms + 1_000, "not before its time: {}", end.to_json());
    assert!(end.attempts >= 2, "it was tried while there was time: {}", end.to_json());
    assert!(running.rows().is_empty(), "nothing is left in the queue");
    assert!(running.shutdown().is_empty(), "nothing is reported behind the end");
}

/// Also a message that never had an attempt, since its host was down all the time.
#[test]
fn a_blocked_message_expires() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let address = sink.address();
    drop(sink);
    let mut config = to_sink(directory.path(), address);
    config.retry.max_age = Duration::from_secs(1);
    let mut running = Running::start(config);
    running.inject(&["a@sink.test"], &message("blocked"));
    let end = running.event_where("final", |event| event.kind.is_final());
    assert_eq!((end.kind, end.attempts), (EventKind::Expiration, 0));
    assert!(end.text.contains("refused"), "what it waited for is told: {}", end.text);
}

/// What expires while the engine is down is ended when it is back, not sent.
#[test]
fn a_message_expires_over_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let address = sink.address();
    drop(sink);
    let mut config = to_sink(directory.path(), address);
    config.retry.max_age = Duration::from_secs(1);
    let running = Running::start(config.clone());
    running.inject(&["a@sink.test"], &message("late"));
    let expires_ms = running.rows()[0].expires.0;
    running.shutdown();
    poll("it is past its time", || {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        (now_ms > expires_ms).then_some(())
    });
    let sink = Sink::start_at(address);
    let events = config.events_path();
    let running = Running::start(config);
    running.rows_when("empty", <[MessageRow]>::is_empty);
    running.shutdown();
    assert_eq!((sink.count(Verb::Mail), sink.taken_so_far().len()), (0, 0), "it was not sent");
    let events = event_log::read(&events);
    let kinds: Vec<&str> = events.iter().map(|event| event_log::text(event, "type")).collect();
    assert_eq!(kinds, ["Reception", "Expiration"]);
}
