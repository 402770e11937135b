//! An engine that ends and comes back knows each message's attempts and due time to the millisecond.

use std::time::Duration;

use postrider::admin::MessageRow;
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, retry_after, to_sink};
use crate::support::message;
use crate::support::sink::{Sink, Verb};

/// Id, recipient, attempts, due time, last answer.
type State = (String, String, u32, Option<u64>, Option<String>);

fn state(rows: &[MessageRow]) -> Vec<State> {
    let state = |row: &MessageRow| {
        let due_ms = row.due.map(|due| due.0);
        (row.id.clone(), row.recipient.clone(), row.num_attempts, due_ms, row.last_answer.clone())
    };
    rows.iter().map(state).collect()
}

#[test]
fn attempts_and_due_times_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Rcpt, "451 4.2.1 Mailbox busy");
    let mut config = to_sink(directory.path(), sink.address());
    let hour = Duration::from_secs(3_600);
    retry_after(&mut config, &[Duration::from_millis(100), hour, 2 * hour]);
    let mut running = Running::start(config.clone());
    for number in 0..20 {
        running.inject(&[&format!("{number}@sink.test")], &message(&number.to_string()));
    }
    let mut twice = 0;
    while twice < 20 {
        twice += usize::from(running.event(EventKind::TransientFailure).attempts == 2);
    }
    let before = state(&running.rows());
    assert!(before.iter().all(|(_, _, attempts, due, _)| *attempts == 2 && due.is_some()), "{before:?}");
    assert!(before.iter().all(|row| row.4.as_deref() == Some("451 4.2.1 Mailbox busy")), "{before:?}");
    running.shutdown();

    let seen = sink.count(Verb::Rcpt);
    let running = Running::start(config);
    assert_eq!(state(&running.rows()), before);
    running.shutdown();
    assert_eq!(sink.count(Verb::Rcpt), seen, "nothing was tried before its time");
}

/// What came due while the engine was down goes at once, and once.
#[test]
fn overdue_messages_go_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Rcpt, "451 4.2.1 Mailbox busy");
    let mut config = to_sink(directory.path(), sink.address());
    retry_after(&mut config, &[Duration::from_secs(1)]);
    let mut running = Running::start(config.clone());
    for number in 0..20 {
        running.inject(&[&format!("{number}@sink.test")], &message(&number.to_string()));
    }
    for _ in 0..20 {
        running.event(EventKind::TransientFailure);
    }
    running.shutdown();
    sink.recover();
    let running = Running::start(config);
    let mut recipients: Vec<String> = sink.take(20).into_iter().flat_map(|it| it.recipients).collect();
    recipients.sort();
    recipients.dedup();
    assert_eq!(recipients.len(), 20, "each of them");
    running.rows_when("empty", <[MessageRow]>::is_empty);
    running.shutdown();
    assert!(sink.taken_so_far().is_empty(), "once");
}
