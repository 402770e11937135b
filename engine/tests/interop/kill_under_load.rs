//! kill -9 under load, five times: whatever got its 250 is delivered, and duplicates are bounded.
//!
//! A killed process leaves the page cache alone, so this shows process safety; the disk is `spool`'s matter.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::client::Client;
use crate::support::process::{Postrider, to_sink};
use crate::support::sink::{Delivered, Sink};
use crate::support::{event_log, http, message, poll_for, token};
use crate::tools;

const KILLS: usize = 5;
const CLIENTS: usize = 4;

/// An outcome waits at most so long for its commit; deliveries of this time may be repeated.
const WINDOW: Duration = Duration::from_millis(10);

/// The signal came at some time between the two.
struct Kill {
    from: Instant,
    to: Instant,
}

#[test]
fn nothing_acknowledged_is_lost() {
    let per_round = tools::messages() / KILLS;
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let config = to_sink(sink.address());
    let mut acknowledged: HashMap<String, String> = HashMap::new();
    let mut delivered: Vec<Delivered> = Vec::new();
    let mut kills = Vec::new();
    for round in 0..KILLS {
        let postrider = Postrider::start(directory.path(), &config);
        let injected = inject_until_killed(postrider, round, per_round, &mut kills);
        assert!(injected.len() >= per_round, "round {round} is under load when it is killed: {}", injected.len());
        acknowledged.extend(injected);
        delivered.extend(sink.taken_so_far());
    }

    let postrider = Postrider::start(directory.path(), &config);
    poll_for(tools::patience(), "the queue is empty", || {
        let status = http::json(postrider.http(), "/api/admin/status/v1");
        (status["recipients"] == 0).then_some(())
    });
    postrider.terminate();
    delivered.extend(sink.taken_so_far());

    let mut times: HashMap<String, usize> = HashMap::new();
    for it in &delivered {
        *times.entry(token(&it.content)).or_default() += 1;
    }
    let lost: Vec<&String> = acknowledged.keys().filter(|token| !times.contains_key(*token)).collect();
    assert!(lost.is_empty(), "{} of {} acknowledged messages are lost: {lost:?}", lost.len(), acknowledged.len());

    let duplicates: usize = times.values().map(|count| count - 1).sum();
    let late = |kill: &Kill| delivered.iter().filter(|it| it.at + WINDOW >= kill.from && it.at <= kill.to).count();
    let bound = kills.len() * sink.connections_most() + kills.iter().map(late).sum::<usize>();
    println!(
        "{} kills, {} acknowledged, {} delivered, {duplicates} duplicates (at most {bound})",
        kills.len(),
        acknowledged.len(),
        delivered.len()
    );
    assert!(duplicates <= bound, "{duplicates} duplicates, at most {bound}");

    let events = event_log::read(&directory.path().join("spool/events"));
    let finals = event_log::finals(&events);
    for (token, id) in &acknowledged {
        assert_eq!(finals.get(&(id.clone(), format!("{token}@sink.test"))), Some(&1), "one final record of {token}");
    }
    assert!(finals.values().all(|&count| count == 1), "also of what was not acknowledged");
    let receptions = events.iter().filter(|event| event["type"] == "Reception").count();
    assert_eq!(receptions, finals.len(), "one Reception for each message");
}

/// Token and id of every message that got its 250. The kill comes after `count` of them, while clients go on.
fn inject_until_killed(
    postrider: Postrider,
    round: usize,
    count: usize,
    kills: &mut Vec<Kill>,
) -> HashMap<String, String> {
    let smtp = postrider.smtp();
    let (sender, acknowledged) = channel();
    let mut injected = HashMap::new();
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let sender = sender.clone();
            scope.spawn(move || inject(smtp, &format!("{round}-{client}"), &sender));
        }
        drop(sender);
        injected.extend(acknowledged.iter().take(count));
        let from = Instant::now();
        postrider.kill();
        kills.push(Kill { from, to: Instant::now() });
        // Every client has met the end of its connection by now, or is about to.
        injected.extend(acknowledged);
    });
    injected
}

/// Sends one message after the other until the connection breaks.
fn inject(smtp: SocketAddr, prefix: &str, acknowledged: &Sender<(String, String)>) {
    let mut client = Client::ready(smtp).expect("the engine serves");
    for number in 0.. {
        let token = format!("{prefix}-{number}");
        match client.submit("sender@sender.test", &[&format!("{token}@sink.test")], &message(&token)) {
            Ok(id) => acknowledged.send((token, id)).expect("the test waits for all"),
            Err(_) => return,
        }
    }
}
