//! The process is killed, and the next one tells what that may have cost.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::mpsc::channel;

use crate::support::client::submit;
use crate::support::process::{Postrider, to_sink};
use crate::support::sink::{Answer, Sink, Verb};
use crate::support::{http, message, poll};

fn metric(postrider: &Postrider, name: &str) -> u64 {
    let (_, text) = http::get(postrider.http(), "/metrics").unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a number") as u64
}

/// The peer has the whole message, and nobody knows what became of it: it comes again, and the metric has said so.
#[test]
fn what_a_kill_can_repeat_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let (arrived, has_arrived) = channel();
    let (release, is_released) = channel::<()>();
    let sink = Sink::scripted(move |step| {
        if step.verb == Verb::Content {
            // Who listens and who releases are gone after the first.
            let _ = arrived.send(());
            let _ = is_released.recv();
        }
        Answer::Usual
    });
    let config = to_sink(sink.address());
    let postrider = Postrider::start(directory.path(), &config);
    assert_eq!(metric(&postrider, "possible_duplicates"), 0);
    submit(postrider.smtp(), "s@sender.test", &["a@sink.test", "b@sink.test"], &message("one"));
    has_arrived.recv().unwrap();
    postrider.kill();
    drop((release, has_arrived));

    let postrider = Postrider::start(directory.path(), &config);
    assert_eq!(metric(&postrider, "possible_duplicates"), 2, "recipients");
    assert_eq!(sink.take(2).len(), 2, "it came twice");
    poll("its outcome is durable", || (http::messages(postrider.http(), "").is_empty()).then_some(()));
    postrider.terminate();

    let postrider = Postrider::start(directory.path(), &config);
    assert_eq!(metric(&postrider, "possible_duplicates"), 0, "a clean end leaves nothing in doubt");
    postrider.terminate();
    assert!(sink.taken_so_far().is_empty());
}

/// What a panic over the message would leave in the file `progress`: its id where the first shard's part begins.
fn leave_in_hand(directory: &Path, id: &str) {
    let file = OpenOptions::new().write(true).open(directory.join("spool/progress")).unwrap();
    let id = u64::from_str_radix(id, 16).unwrap();
    file.write_all_at(&id.to_ne_bytes(), 1024).unwrap();
}

/// Three times the engine was found dead over the same message: it is held, the rest goes, and the operator decides.
#[test]
fn a_message_that_the_engine_dies_of_is_held() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Rcpt, "451 4.2.1 Mailbox busy");
    let config = to_sink(sink.address()) + "[retry]\nretry_interval = [\"1s\"]\n";
    let postrider = Postrider::start(directory.path(), &config);
    let poison = submit(postrider.smtp(), "s@sender.test", &["poison@sink.test"], &message("poison"));
    postrider.kill();
    for start in 1..=3 {
        leave_in_hand(directory.path(), &poison);
        let postrider = Postrider::start(directory.path(), &config);
        let expected = u64::from(start == 3);
        assert_eq!(metric(&postrider, "quarantined_messages"), expected, "start {start}:\n{}", postrider.log());
        if start < 3 {
            postrider.kill();
            continue;
        }
        sink.recover();
        submit(postrider.smtp(), "s@sender.test", &["other@sink.test"], &message("other"));
        assert_eq!(sink.next().recipients, ["other@sink.test"]);
        let state = poll("it is held", || {
            let rows = http::messages(postrider.http(), "");
            rows.into_iter().find(|row| row["id"] == *poison && row["state"] == "held")
        });
        assert!(state["blocked_by"].as_str().unwrap().starts_with("held: the engine died"), "{state}");
        postrider.terminate();
    }
    let postrider = Postrider::start(directory.path(), &config);
    let rows = http::messages(postrider.http(), "");
    assert!(rows.len() == 1 && rows[0]["state"] == "held", "it stays so: {rows:?}");
    let (code, answer) = http::post(postrider.http(), "/api/admin/release/v1", "{\"reason\":\"mended\"}").unwrap();
    assert_eq!(code, 200, "{answer}");
    assert_eq!(sink.next().recipients, ["poison@sink.test"]);
    postrider.terminate();
}
