//! Shutdown finishes what is on the wire, takes nothing new, and leaves the rest for the next start.

use std::sync::mpsc::channel;
use std::time::Duration;

use postrider::config::HttpListener;
use postrider::outcome::event::EventKind;

use crate::support::client::Client;
use crate::support::embedded::{Running, to_sink};
use crate::support::event_log;
use crate::support::http;
use crate::support::sink::{Answer, Sink, Verb};
use crate::support::{PATIENCE, message, poll};

#[test]
fn a_delivery_under_way_is_finished() {
    let directory = tempfile::tempdir().unwrap();
    let (content_came, content) = channel();
    let (release, released) = channel::<()>();
    let mut first = true;
    let sink = Sink::scripted(move |step| {
        if step.verb == Verb::Content && std::mem::take(&mut first) {
            content_came.send(()).unwrap();
            // The test's end releases it as well.
            let _ = released.recv_timeout(PATIENCE);
        }
        Answer::Usual
    });
    let mut config = to_sink(directory.path(), sink.address());
    config.shaping.connection_limit = 1;
    config.shards = Some(1);
    config.http_listeners = vec![HttpListener { address: "127.0.0.1:0".parse().unwrap(), ..HttpListener::default() }];
    let events = config.events_path();
    let running = Running::start(config.clone());
    let (smtp, admin) = (running.smtp(), running.engine.addresses().http[0]);
    let ids: Vec<String> = (0..5).map(|n| running.inject(&[&format!("{n}@sink.test")], &message("busy"))).collect();
    content.recv_timeout(PATIENCE).expect("the first message's content arrives");

    let ending = std::thread::spawn(move || running.shutdown());
    poll("no new client is served", || match Client::connect(smtp) {
        Ok(client) => (client.greeting.code == 421).then_some(()),
        Err(_) => Some(()),
    });
    assert!(!ending.is_finished(), "it waits for what is on the wire");
    let (status, answer) = http::get(admin, "/api/check-readiness/v1").unwrap();
    assert_eq!(status, 503, "who balances load sends nothing here any more: {answer}");
    release.send(()).unwrap();
    let rest = ending.join().unwrap();
    // The envelope that rode behind the first message's content was on the wire as well.
    let finished = rest.iter().filter(|event| event.kind == EventKind::Delivery).count();
    assert!((1..=2).contains(&finished), "{rest:?}");
    assert_eq!(sink.taken_so_far().len(), finished, "what was delivered was recorded before the end");

    let running = Running::start(config);
    assert_eq!(sink.take(5 - finished).len(), 5 - finished, "the others go after the next start");
    running.rows_when("empty", <[postrider::admin::MessageRow]>::is_empty);
    running.shutdown();
    assert!(sink.taken_so_far().is_empty(), "none of them went twice");
    let finals = event_log::finals(&event_log::read(&events));
    assert_eq!(finals.len(), ids.len());
    assert!(finals.values().all(|&count| count == 1), "{finals:?}");
}

/// A peer that never answers holds the end up no longer than `shutdown_grace`.
#[test]
fn the_grace_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let (content_came, content) = channel();
    let (release, released) = channel::<()>();
    let sink = Sink::scripted(move |step| {
        if step.verb == Verb::Content {
            content_came.send(()).unwrap();
            // Until the test has ended.
            let _ = released.recv();
            return Answer::Close;
        }
        Answer::Usual
    });
    let mut config = to_sink(directory.path(), sink.address());
    config.shutdown_grace = Duration::from_millis(300);
    let running = Running::start(config.clone());
    let id = running.inject(&["a@sink.test"], &message("stuck"));
    content.recv_timeout(PATIENCE).expect("the content arrives");
    running.shutdown();
    drop(release);
    sink.recover();
    let running = Running::start(config);
    let rows = running.rows();
    assert!(rows.iter().all(|row| row.id == id), "it was not lost: {rows:?}");
    assert_eq!(sink.next().recipients, ["a@sink.test"], "it goes again");
}

/// A client that is idle or amid a transaction is told; nothing half-sent is taken.
#[test]
fn clients_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let running = Running::start(to_sink(directory.path(), sink.address()));
    let mut client = Client::ready(running.smtp()).unwrap();
    let rest = running.shutdown();
    assert!(client.rest().unwrap_or_default().starts_with("421 4.3.2"), "the idle client is told");
    assert!(rest.is_empty());
}
