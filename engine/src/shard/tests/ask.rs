//! Questions about messages, and what happens while these are read.

use super::*;
use crate::admin::{MessageState, QueueRow};
use crate::limits::{ASK_PATIENCE, ASK_READS_MAX};

/// Every row is of the moment of the question: while messages are read, entries are split, and what was split off
/// would be in no row.
#[test]
fn an_answer_is_of_the_moment_of_its_question() {
    let mut world = World::new();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "451 4.2.1 not now\r\n");
    world.pass(Duration::from_secs(1));
    let World { directory, now, shard, _spool, .. } = world;
    drop((shard, _spool));
    let mut world = World::open(directory, now, Config::new("mta.example"));
    world.ask(MessageFilter { limit: 10, ..MessageFilter::default() });
    assert!(world.rows.is_none(), "the message is not in memory");

    // It comes due first, then it is read.
    world.pass(Duration::from_secs(30 * 60));
    assert_eq!(world.connects.len(), 1, "meanwhile it is tried again");
    let rows = world.rows.take().expect("the question is answered");
    let [row] = &rows[..] else { panic!("one recipient: {rows:?}") };
    assert_eq!((row.state, row.num_attempts), (MessageState::Scheduled, 1));
    assert_eq!(row.last_answer.as_deref(), Some("451 4.2.1 not now"));
    assert!((row.recipient.as_str(), row.size) > ("", 0), "and it tells what the message does: {row:?}");

    let (_, _, rows) = queues(&mut world, 1);
    assert_eq!(rows[0].last_answer.as_deref(), Some("451 4.2.1 not now"), "its queue has heard nothing since");
}

/// Of what has to be read, so much is read at once, and then the next. Whoever says that there is no such message has
/// looked at all of them.
#[test]
fn who_is_looked_for_is_found_behind_many_others() {
    let mut world = World::new();
    let session = world.connect_client();
    let greeting = CLIENT.split_inclusive("\r\n").take_while(|line| !line.starts_with("MAIL")).collect::<String>();
    world.client_says(session, &greeting);
    let count = 2 * ASK_READS_MAX + 100;
    for number in 0..count {
        let to = ["peer.example", "other.example"].map(|domain| format!("RCPT TO:<r{number}@{domain}>\r\n"));
        world.client_says(session, &format!("MAIL FROM:<a@sender.example>\r\n{}DATA\r\n", to.concat()));
        world.client_says(session, CONTENT);
        if number % 100 == 0 {
            world.sync();
        }
    }
    world.sync();
    let World { directory, now, shard, _spool, .. } = world;
    drop((shard, _spool));
    let mut world = World::open(directory, now, Config::new("mta.example"));
    let last = format!("r{}@other.example", count - 1);
    let filter = MessageFilter { recipient: Some(last.clone()), limit: 10, ..MessageFilter::default() };
    world.ask(filter.clone());
    world.sync();
    let rows = world.rows.take().expect("the question is answered");
    assert_eq!(rows.iter().map(|row| &*row.recipient).collect::<Vec<_>>(), [&*last]);
    world.ask(MessageFilter { limit: 2 * count + 1, ..MessageFilter::default() });
    world.sync();
    let rows = world.rows.take().expect("the question is answered");
    let recipients: std::collections::HashSet<String> = rows.iter().map(|row| row.recipient.clone()).collect();
    assert_eq!((rows.len(), recipients.len()), (2 * count, 2 * count), "each once");

    // It takes too long.
    let absent = MessageFilter { recipient: Some("nobody@peer.example".to_owned()), ..filter };
    world.ask(absent.clone());
    world.now.monotonic += ASK_PATIENCE;
    world.sync();
    assert!(world.rows.is_none(), "nobody can say that there is none");
    world.ask(absent);
    world.sync();
    assert_eq!(world.rows.take().map(|rows| rows.len()), Some(0), "now they are at hand, or there was time");
}

/// Recipients and messages are counted at the same moment, and not one of them as a gauge had it a second ago.
#[test]
fn messages_and_recipients_are_counted_together() {
    let mut world = World::new();
    for count in 1..=2 {
        accepted(&mut world);
        let (total, messages, rows) = queues(&mut world, 0);
        assert_eq!((total, messages, rows.len()), (count, count, 0));
    }
}

/// Recipients, messages and rows, as the shard tells them.
fn queues(world: &mut World, limit: usize) -> (u64, u64, Vec<QueueRow>) {
    world.shard.answer(world.now, 0, Ask::Queues { limit });
    let told = std::iter::from_fn(|| world.shard.poll_action()).find_map(|action| match action {
        Action::Control(ControlMessage::Answer { told: Told::Queues { total, messages, rows }, .. }) => {
            Some((total, messages, rows))
        }
        _ => None,
    });
    told.expect("a shard answers at once")
}

/// What nothing holds says nothing at first; after five seconds, what it waits for.
#[test]
fn what_is_due_for_long_says_what_it_waits_for() {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    // By MX, which the world leaves to the test.
    let unknown = DomainPattern::Exact("unknown.example".to_owned());
    config.routes = vec![Route::new(unknown, vec![RouteTarget::Mx("mx.example".to_owned())])];
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for domain in ["unknown.example", "peer.example", "peer.example", "peer.example", "peer.example", "peer.example"] {
        accepted_for(&mut world, domain);
    }
    let told = |world: &mut World| -> Vec<(MessageState, Option<String>)> {
        world.ask(MessageFilter { limit: 10, ..MessageFilter::default() });
        world.sync();
        let rows = world.rows.take().expect("the question is answered");
        rows.into_iter().map(|row| (row.state, row.blocked_by)).collect()
    };
    let first = told(&mut world);
    assert!(first.iter().all(|(_, blocked_by)| blocked_by.is_none()), "{first:?}");
    world.pass(Duration::from_secs(6));
    let then = told(&mut world);
    let count = |state, reason: Option<&str>| {
        then.iter().filter(|(found, told)| (*found, told.as_deref()) == (state, reason)).count()
    };
    assert_eq!(count(MessageState::Ready, Some("the hosts of unknown.example are being looked up")), 1, "{then:?}");
    let others = count(MessageState::Ready, Some("waits for a connection to 127.0.0.1:25 by unspecified"));
    assert!(others > 0 && others + count(MessageState::Delivering, None) == 5, "{then:?}");
}
