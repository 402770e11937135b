//! Recipients of one message at one domain share a transaction, and each has a fate of its own.

use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, to_sink};
use crate::support::message;
use crate::support::sink::{Answer, Sink, Verb};

#[test]
fn one_goes_one_bounces_one_waits() {
    let directory = tempfile::tempdir().unwrap();
    let mut busy = true;
    let sink = Sink::scripted(move |step| match step.verb {
        Verb::Rcpt if step.line.contains("gone@") => Answer::from("550 5.1.1 No such user"),
        Verb::Rcpt if step.line.contains("busy@") && std::mem::take(&mut busy) => Answer::from("452 4.2.2 Full"),
        _ => Answer::Usual,
    });
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    let recipients = ["good@sink.test", "gone@sink.test", "busy@sink.test"];
    let id = running.inject(&recipients, &message("partial"));

    let first = sink.next();
    assert_eq!(first.recipients, ["good@sink.test"]);
    let second = sink.next();
    assert_eq!(second.recipients, ["busy@sink.test"], "only who was deferred is tried again");
    assert_eq!((sink.count(Verb::Mail), sink.count(Verb::Rcpt)), (2, 4), "the three shared a transaction");

    let mut fates: Vec<(String, EventKind, u16, u32)> = Vec::new();
    while fates.iter().filter(|fate| fate.1.is_final()).count() < 3 {
        let event = running.event_where("outcome", |event| event.kind != EventKind::Reception);
        assert_eq!(event.message.to_string(), id);
        fates.push((event.recipient.clone(), event.kind, event.code, event.attempts));
    }
    let expected = [
        ("busy@sink.test", EventKind::TransientFailure, 452, 1),
        ("busy@sink.test", EventKind::Delivery, 250, 2),
        ("gone@sink.test", EventKind::Bounce, 550, 1),
        ("good@sink.test", EventKind::Delivery, 250, 1),
    ];
    for fate in expected {
        let fate = (fate.0.to_owned(), fate.1, fate.2, fate.3);
        assert!(fates.contains(&fate), "{fate:?} in {fates:?}");
    }
    assert_eq!(fates.len(), expected.len(), "{fates:?}");
    running.shutdown();
    assert!(sink.taken_so_far().is_empty());
}

/// One transaction holds recipients of one domain only.
#[test]
fn domains_get_transactions_of_their_own() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let running = Running::start(to_sink(directory.path(), sink.address()));
    running.inject(&["a@one.test", "b@two.test", "c@one.test"], &message("domains"));
    let mut envelopes: Vec<Vec<String>> = sink.take(2).into_iter().map(|it| it.recipients).collect();
    envelopes.sort();
    assert_eq!(envelopes, [vec!["a@one.test".to_owned(), "c@one.test".to_owned()], vec!["b@two.test".to_owned()]]);
}

/// `max_recipients_per_batch` splits what is more.
#[test]
fn a_batch_has_its_limit() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let mut config = to_sink(directory.path(), sink.address());
    config.shaping.max_recipients_per_batch = 10;
    let running = Running::start(config);
    let recipients: Vec<String> = (0..25).map(|number| format!("{number}@sink.test")).collect();
    running.inject(&recipients.iter().map(String::as_str).collect::<Vec<_>>(), &message("many"));
    let mut batches: Vec<usize> = sink.take(3).iter().map(|it| it.recipients.len()).collect();
    batches.sort_unstable();
    assert_eq!(batches, [5, 10, 10]);
}
