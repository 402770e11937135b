//! Operators bounce what is queued, over all shards, and the rest goes its way.

use std::time::Duration;

use postrider::admin::MailChoice;
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, block_on, retry_after, to_sink};
use crate::support::message;
use crate::support::sink::{Sink, Verb};

#[test]
fn a_domain_is_bounced_and_others_stay() {
    const EACH: usize = 12;
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Rcpt, "451 4.2.1 later");
    let mut config = to_sink(directory.path(), sink.address());
    retry_after(&mut config, &[Duration::from_secs(3_600)]);
    let mut running = Running::start(config);
    for number in 0..EACH {
        for domain in ["one.test", "two.test"] {
            running.inject(&[&format!("r{number}@{domain}")], &message(&number.to_string()));
        }
    }
    running.rows_when("all were tried", |rows| {
        rows.len() == 2 * EACH && rows.iter().all(|row| row.num_attempts == 1 && row.due.is_some())
    });
    let choice = MailChoice { domain: Some("one.test".to_owned()), ..MailChoice::default() };
    let chosen = block_on(running.engine.bounce(choice.clone(), "a test")).unwrap();
    assert_eq!(chosen.recipients.into_iter().collect::<Vec<_>>(), [("one.test".to_owned(), EACH as u64)]);
    for event in running.finals(EACH) {
        assert_eq!(event.kind, EventKind::AdminBounce);
        let json = event.to_json();
        assert!(json.contains("Administrator bounced with reason: a test"), "{json}");
        assert!(json.contains("@one.test"), "{json}");
    }
    let left = running.rows_when("the others", |rows| rows.len() == EACH);
    assert!(left.iter().all(|row| row.recipient.ends_with("@two.test")), "{left:?}");
    assert_eq!(block_on(running.engine.bounce(choice, "again")).unwrap().total(), 0);
    running.shutdown();
}
