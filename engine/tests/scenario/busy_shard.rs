//! Two busy sites of one shard, while the other shard has nothing to send: whatever moves, all arrives once.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use postrider::config::{DomainPattern, HttpListener, Route, RouteTarget};

use crate::support::embedded::{Running, config};
use crate::support::http;
use crate::support::sink::Sink;
use crate::support::{message, poll, token};

/// Whether anything moves is the policy's to say, by how busy this machine's threads are: so many messages are sent at
/// most, and fewer once something has moved.
#[test]
fn what_a_busy_shard_gives_away_arrives_once() {
    const CLIENTS: usize = 6;
    const EACH_MAX: usize = 1_500;
    let directory = tempfile::tempdir().unwrap();
    let sinks = [Sink::start(), Sink::start(), Sink::start()];
    let mut config = config(directory.path());
    for (name, sink) in ["a.test", "idle.test", "c.test"].iter().zip(&sinks) {
        let to = vec![RouteTarget::Address(sink.address())];
        config.routes.push(Route::new(DomainPattern::Exact((*name).to_owned()), to));
    }
    config.http_listeners = vec![HttpListener { address: "127.0.0.1:0".parse().unwrap(), ..HttpListener::default() }];
    let running = Running::start(config);
    // Owners are dealt out in turn: the first and the third site are one shard's.
    for (name, sink) in ["a.test", "idle.test", "c.test"].iter().zip(&sinks) {
        running.inject(&[&format!("first@{name}")], &message("first"));
        assert_eq!(token(&sink.next().content), "first");
    }
    let admin = running.engine.addresses().http[0];
    let moves = |what: &str| {
        let (_, text) = http::get(admin, "/metrics").unwrap();
        let name = format!("pair_moves_{what}");
        let line = text.lines().find(|line| line.starts_with(&name) && !line.starts_with('#'));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).unwrap_or_else(|| panic!("{name}: {text}"))
    };
    let has_moved = AtomicBool::new(false);
    let mut sent = BTreeMap::new();
    std::thread::scope(|scope| {
        let (running, has_moved, moves) = (&running, &has_moved, &moves);
        let send = |client: usize| {
            let mut tokens = Vec::new();
            for number in 0..EACH_MAX {
                if number % 100 == 0 && (has_moved.load(Ordering::Relaxed) || moves("done") > 0) {
                    has_moved.store(true, Ordering::Relaxed);
                    break;
                }
                let (token, site) = (format!("{client}-{number}"), ["a.test", "c.test"][number % 2]);
                running.inject(&[&format!("{token}@{site}")], &message(&token));
                tokens.push(token);
            }
            tokens
        };
        let clients: Vec<_> = (0..CLIENTS).map(|client| scope.spawn(move || send(client))).collect();
        for client in clients {
            sent.extend(client.join().unwrap().into_iter().map(|token| (token, 0)));
        }
    });
    running.rows_when("nothing is left in the queue", <[postrider::admin::MessageRow]>::is_empty);
    for delivered in sinks.iter().flat_map(Sink::taken_so_far) {
        *sent.get_mut(&token(&delivered.content)).expect("it was sent") += 1;
    }
    assert!(sent.values().all(|count| *count == 1), "each once: {sent:?}");
    // The sites' mail may have ended while something was moving.
    let ended = || moves("begun") == moves("done") + moves("given_up");
    poll("each move comes to an end", || ended().then_some(()));
    eprintln!("{} messages, {} moves, {} given up", sent.len(), moves("done"), moves("given_up"));
    running.shutdown();
}
