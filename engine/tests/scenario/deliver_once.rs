//! What is accepted arrives once, and is reported once: by SMTP and by the embedding API, many at a time.

use std::collections::{BTreeMap, HashMap};

use postrider::outcome::event::EventKind;

use crate::support::client::{self, Client};
use crate::support::embedded::{Running, to_sink};
use crate::support::sink::Sink;
use crate::support::{message, token};

#[test]
fn a_message_by_smtp_arrives_once() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    let id = client::submit(running.smtp(), "sender@sender.test", &["a@sink.test"], &message("one"));

    let delivered = sink.next();
    assert_eq!((&*delivered.reverse_path, &*delivered.ehlo), ("sender@sender.test", "mta.test"));
    assert_eq!((delivered.recipients, token(&delivered.content)), (vec!["a@sink.test".to_owned()], "one".to_owned()));
    let reception = running.event(EventKind::Reception);
    assert_eq!((reception.message.to_string(), &*reception.recipient), (id.clone(), "a@sink.test"));
    let delivery = running.event(EventKind::Delivery);
    assert_eq!((delivery.message.to_string(), &*delivery.recipient, delivery.attempts), (id, "a@sink.test", 1));
    assert_eq!((delivery.code, delivery.enhanced, &*delivery.text), (250, Some((2, 0, 0)), "taken"));
    assert!(running.rows().is_empty(), "nothing is left in the queue");
    assert!(running.shutdown().is_empty(), "nothing else was reported");
    assert!(sink.taken_so_far().is_empty(), "nothing else was delivered");
}

/// Both ways in at once, over several connections, each of them with several messages.
#[test]
fn many_messages_arrive_once_each() {
    const CLIENTS: usize = 8;
    const EACH: usize = 50;
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    let mut accepted: BTreeMap<String, String> = BTreeMap::new();
    std::thread::scope(|scope| {
        let running = &running;
        let threads: Vec<_> = (0..CLIENTS)
            .map(|number| {
                scope.spawn(move || {
                    let mut client = Client::ready(running.smtp()).unwrap();
                    let send = |count| {
                        let token = format!("{number}-{count}");
                        let recipient = format!("{token}@sink.test");
                        let id = if number % 2 == 0 {
                            client.submit("sender@sender.test", &[&recipient], &message(&token)).unwrap()
                        } else {
                            running.inject(&[&recipient], &message(&token))
                        };
                        (token, id)
                    };
                    (0..EACH).map(send).collect::<Vec<_>>()
                })
            })
            .collect();
        accepted.extend(threads.into_iter().flat_map(|thread| thread.join().unwrap()));
    });

    let ids: HashMap<&String, &String> = accepted.iter().map(|(token, id)| (id, token)).collect();
    assert_eq!(ids.len(), CLIENTS * EACH, "each message has an id of its own");
    let mut arrived: Vec<String> = sink.take(CLIENTS * EACH).iter().map(|it| token(&it.content)).collect();
    arrived.sort();
    assert!(arrived.iter().eq(accepted.keys()), "each message arrives once");
    for event in running.finals(CLIENTS * EACH) {
        assert_eq!(event.kind, EventKind::Delivery);
        let token = ids[&event.message.to_string()];
        assert_eq!(event.recipient, format!("{token}@sink.test"), "the event names the message's own recipient");
    }
    let finals = running.shutdown().iter().filter(|event| event.kind.is_final()).count();
    assert_eq!((finals, sink.taken_so_far().len()), (0, 0), "nothing is reported or delivered twice");
    assert!(sink.connections_most() <= 10, "connection_limit holds: {}", sink.connections_most());
}

/// INTERFACE: a recipient repeated in a transaction is one delivery.
#[test]
fn a_repeated_recipient_is_one_delivery() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let running = Running::start(to_sink(directory.path(), sink.address()));
    let recipients = ["a@sink.test", "a@SINK.test", "b@sink.test", "a@sink.test"];
    client::submit(running.smtp(), "sender@sender.test", &recipients, &message("twice"));
    assert_eq!(sink.next().recipients, ["a@sink.test", "b@sink.test"]);
    running.shutdown();
    assert!(sink.taken_so_far().is_empty());
}
