//! What operators see of a peer that fails, over kill -9 and restart: attempts, due times, what blocks, one record.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::client::submit;
use crate::support::process::{Postrider, to_sink};
use crate::support::sink::{Sink, Verb};
use crate::support::{event_log, http, message, poll};
use crate::tools;

const COUNT: usize = 20;

/// The second retry is far away, so that nothing moves while it is looked at.
const RETRY: &str = "[retry]\nretry_interval = [\"1s\", \"20s\"]\n";

#[test]
fn attempts_and_due_times_survive_kill_9() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Rcpt, "451 4.2.1 Mailbox busy");
    let config = to_sink(sink.address()) + RETRY;
    let postrider = Postrider::start(directory.path(), &config);
    let ids: Vec<String> = (0..COUNT)
        .map(|number| submit(postrider.smtp(), "s@sender.test", &[&format!("{number}@sink.test")], &message("busy")))
        .collect();
    let before = states(&postrider, &ids, |state| state.attempts == 2);
    for state in &before {
        assert_eq!(state.last_answer, "451 4.2.1 Mailbox busy");
    }
    compare_with_postctl(&postrider, &ids[0], &before[0]);
    // An event is written when its outcome is durable; before, a kill may repeat the attempt.
    poll("both attempts of each are recorded", || {
        let events = event_log::read(&directory.path().join("spool/events"));
        (events.iter().filter(|event| event["type"] == "TransientFailure").count() == 2 * COUNT).then_some(())
    });
    postrider.kill();

    let postrider = Postrider::start(directory.path(), &config);
    assert_eq!(states(&postrider, &ids, |_| true), before, "the same attempts, the same due times");
    compare_with_postctl(&postrider, &ids[0], &before[0]);
    assert_eq!(sink.count(Verb::Rcpt), 2 * COUNT, "the restart tried nothing before its time");
    sink.recover();
    let mut recipients: Vec<String> = sink.take(COUNT).into_iter().flat_map(|it| it.recipients).collect();
    recipients.sort();
    recipients.dedup();
    assert_eq!(recipients.len(), COUNT, "all are delivered");
    postrider.terminate();
    assert!(sink.taken_so_far().is_empty(), "once");

    let events = event_log::read(&directory.path().join("spool/events"));
    for id in &ids {
        let own = |kind: &str| events.iter().filter(|e| e["id"] == **id && e["type"] == kind).count();
        assert_eq!((own("Reception"), own("TransientFailure"), own("Delivery")), (1, 2, 1), "{id}");
    }
    assert!(event_log::finals(&events).values().all(|&count| count == 1));
}

/// The sink is down: no attempt is counted, `blocked_by` says why and when next, and a restart changes nothing.
#[test]
fn a_host_that_is_down_counts_no_attempt() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let address = sink.address();
    drop(sink);
    let config = to_sink(address) + RETRY;
    let mut postrider = Postrider::start(directory.path(), &config);
    let id = submit(postrider.smtp(), "s@sender.test", &["a@sink.test"], &message("down"));
    for _ in 0..2 {
        let row = poll("the message is blocked", || {
            let rows = http::messages(postrider.http(), "recipient=a@sink.test");
            // Before its first connection has failed it waits for that.
            rows.into_iter().find(|row| row["blocked_by"].as_str().is_some_and(|why| why.contains("refused")))
        });
        assert_eq!((&row["id"], &row["num_attempts"]), (&Value::from(&*id), &Value::from(0)), "{row}");
        let blocked_by = row["blocked_by"].as_str().unwrap();
        assert!(blocked_by.contains(&address.to_string()), "{blocked_by}");
        assert!(blocked_by.contains("next try 20"), "it says when: {blocked_by}");
        assert!(row["due"].is_string(), "{row}");
        postrider.kill();
        postrider = Postrider::start(directory.path(), &config);
    }
    let sink = Sink::start_at(address);
    assert_eq!(sink.next().recipients, ["a@sink.test"]);
    poll("the queue is empty", || http::messages(postrider.http(), "recipient=a@sink.test").is_empty().then_some(()));
    postrider.terminate();
    let events = event_log::read(&directory.path().join("spool/events"));
    let kinds: Vec<&str> = events.iter().map(|event| event_log::text(event, "type")).collect();
    assert_eq!(kinds, ["Reception", "Delivery"]);
    assert_eq!(events[1]["num_attempts"], 1);
}

#[test]
fn a_5xx_is_one_bounce_record() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Rcpt, "550 5.1.1 <a@sink.test> unknown");
    let postrider = Postrider::start(directory.path(), &(to_sink(sink.address()) + RETRY));
    let id = submit(postrider.smtp(), "s@sender.test", &["a@sink.test"], &message("refused"));
    poll("the queue is empty", || {
        let status = http::json(postrider.http(), "/api/admin/status/v1");
        (status["failed"] == 1 && status["recipients"] == 0).then_some(())
    });
    postrider.terminate();
    let events = event_log::read(&directory.path().join("spool/events"));
    let finals: Vec<&Value> = events.iter().filter(|event| event_log::is_final(event)).collect();
    assert_eq!(finals.len(), 1, "{events:?}");
    let bounce = finals[0];
    assert_eq!((&bounce["type"], &bounce["id"]), (&"Bounce".into(), &Value::from(id)));
    let response = &bounce["response"];
    assert_eq!((&response["code"], &response["content"]), (&550.into(), &"<a@sink.test> unknown".into()), "{bounce}");
    let enhanced = serde_json::json!({ "class": 5, "subject": 1, "detail": 1 });
    assert_eq!((&response["enhanced_code"], &response["command"]), (&enhanced, &"RCPT TO:<a@sink.test>".into()));
    assert_eq!(sink.count(Verb::Rcpt), 1);
}

/// What an operator sees of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    attempts: u64,
    due: String,
    last_answer: String,
}

impl State {
    fn of(row: &Value) -> Self {
        let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
        let attempts = row["num_attempts"].as_u64().unwrap_or_else(|| panic!("attempts in {row}"));
        Self { attempts, due: text("due"), last_answer: text("last_answer") }
    }
}

/// Each message's state, in the order of `ids`, as soon as all are `ready`.
fn states(postrider: &Postrider, ids: &[String], ready: impl Fn(&State) -> bool) -> Vec<State> {
    poll("all messages are in the state looked for", || {
        let states: Vec<State> = ids
            .iter()
            .map(|id| {
                let answer = http::json(postrider.http(), &format!("/api/admin/messages/v1/{id}"));
                let row = answer["messages"].get(0).unwrap_or(&answer);
                State::of(row)
            })
            .collect();
        states.iter().all(&ready).then_some(states)
    })
}

/// `postctl message show --json` tells the same, where the program was built (`cargo test --workspace` does).
fn compare_with_postctl(postrider: &Postrider, id: &str, state: &State) {
    let postctl: PathBuf = Path::new(env!("CARGO_BIN_EXE_postrider")).with_file_name("postctl");
    if !postctl.is_file() {
        return tools::missing("postctl was not built beside postrider (cargo build --workspace)");
    }
    let url = format!("http://{}", postrider.http());
    let shown = tools::run(Command::new(postctl).args(["--url", &url, "--json", "message", "show", id]));
    let shown: Value = serde_json::from_str(&shown).unwrap_or_else(|error| panic!("{error}: {shown}"));
    let row = shown.get("messages").and_then(|messages| messages.get(0)).unwrap_or(&shown);
    assert_eq!(State::of(row), *state);
}
