//! Operators bounce queued mail, and release or bounce what is held as in doubt.

use super::*;
use crate::admin::{MailChoice, MessageState};
use crate::config::InDoubt;
use crate::shard::ConnectError;

fn config() -> Config {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    config.shaping.in_doubt = InDoubt::Hold;
    config
}

fn world() -> World {
    World::open(TempDir::new().unwrap(), START, config())
}

fn restart(world: World) -> World {
    let World { directory, now, shard, _spool, .. } = world;
    drop((shard, _spool));
    World::open(directory, now, config())
}

impl World {
    /// Recipients that were chosen, by queue.
    fn operate(&mut self, ask: Ask) -> Vec<(String, u64)> {
        self.shard.handle_message(ShardMessage::Ask { question: 9, ask: Box::new(ask) });
        self.sync();
        self.chosen.take().expect("it is answered").recipients.into_iter().collect()
    }

    fn bounce(&mut self, choice: MailChoice) -> Vec<(String, u64)> {
        self.operate(Ask::Bounce { choice, reason: "a test".into() })
    }

    fn release(&mut self, choice: MailChoice) -> Vec<(String, u64)> {
        self.operate(Ask::Release { choice, reason: "a test".into() })
    }

    fn states(&mut self) -> Vec<(MessageState, u32)> {
        self.ask(MessageFilter { limit: 10, ..MessageFilter::default() });
        self.sync();
        let rows = self.rows.take().expect("the question is answered");
        rows.into_iter().map(|row| (row.state, row.num_attempts)).collect()
    }
}

/// One message whose reply was lost.
fn with_one_held() -> World {
    let mut world = world();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250-peer.example\r\n250 PIPELINING\r\n");
    world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
    world.sync();
    world.shard.connection_closed(world.now, peer, "reset");
    world.settle();
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_secs(120));
    world.connects.clear();
    assert_eq!(world.states(), [(MessageState::Held, 1)]);
    world.events.clear();
    world
}

fn domain(name: &str) -> MailChoice {
    MailChoice { domain: Some(name.to_owned()), ..MailChoice::default() }
}

/// It is due at once, on record, with its attempt and what the operator said; and then goes its way.
#[test]
fn what_is_held_is_tried_again_when_it_is_released() {
    for restarts in [false, true] {
        let mut world = with_one_held();
        assert_eq!(world.release(domain("other.example")), []);
        assert_eq!(world.states(), [(MessageState::Held, 1)], "only what was chosen");
        assert_eq!(world.release(MailChoice::default()), [("peer.example".to_owned(), 1)]);
        assert_eq!(world.release(MailChoice::default()), [], "once");
        world.pass(Duration::from_millis(5));
        assert_eq!(world.fates(), [Fate::Deferred { due_ms: world.now.wall_ms - 5 }]);
        let Some(Logged::Outcome(outcome)) = world.events.last().map(|event| &event.record) else {
            panic!("its event")
        };
        assert_eq!((outcome.results[0].attempts, outcome.results[0].is_intent()), (1, false));
        let text = &outcome.results[0].answer.text;
        assert!(text.starts_with("Administrator released with reason: a test"), "{text}");
        assert_eq!((outcome.reverse_path.as_str(), outcome.size > 0), ("a@client.example", true));
        assert_eq!(world.shard.metrics.possible_duplicates.get(), 1);
        let mut world = if restarts { restart(world) } else { world };
        world.pass(Duration::from_secs(1));
        let peer = world.accept_connection();
        world.peer_says(peer, "250-peer.example\r\n250 PIPELINING\r\n");
        world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
        world.sync();
        world.peer_says(peer, "250 taken\r\n");
        world.pass(Duration::from_secs(1));
        assert_eq!(world.fates().last(), Some(&Fate::Delivered));
        assert_eq!(world.shard.home.len(), 0);
    }
}

/// It is over, and nobody has looked yet: on record it is held no more, and ends as what it is.
#[test]
fn what_is_over_is_released_to_its_end() {
    let mut world = with_one_held();
    let (_, entry) = world.shard.home.entries().next().unwrap();
    let expires_ms = entry.expires_ms;
    world.now.wall_ms = expires_ms + 10;
    // Before the turn that would find it.
    let ask = Ask::Release { choice: MailChoice::default(), reason: "a test".into() };
    world.shard.answer(world.now, 9, ask);
    world.sync();
    world.pass(Duration::from_secs(2));
    assert_eq!(world.fates(), [Fate::Deferred { due_ms: expires_ms - 1 }, Fate::Expired]);
}

/// What isn't held is not released, whatever is chosen.
#[test]
fn only_what_is_held_is_released() {
    let mut world = world();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    accepted_for(&mut world, "other.example");
    world.peer_says(peer, "451 4.2.0 later\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.states(), [(MessageState::Scheduled, 1), (MessageState::Delivering, 0)]);
    assert_eq!(world.release(MailChoice::default()), []);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.fates().len(), world.shard.home.len()), (1, 2));
}

#[test]
fn what_is_held_is_bounced_and_the_rest_stays() {
    let mut world = with_one_held();
    accepted_for(&mut world, "other.example");
    let held = MailChoice { held: true, ..MailChoice::default() };
    assert_eq!(world.bounce(held), [("peer.example".to_owned(), 1)]);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates(), [Fate::AdminBounced]);
    let queues: Vec<String> =
        world.shard.home.entries().map(|(key, _)| world.shard.home.queue_of(key).name.to_string()).collect();
    assert_eq!(queues, ["other.example"]);
    assert_eq!(restart(world).shard.home.len(), 1);
}

/// By its id, by its queue, by its domain; what is on the wire ends there, unless it comes back.
#[test]
fn queued_mail_is_bounced() {
    let mut world = world();
    (0..3).for_each(|_| accepted(&mut world));
    accepted_for(&mut world, "other.example");
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    let first = world.shard.home.entries().find(|(key, _)| world.shard.home.is_out(*key)).unwrap().1.message;
    let others: Vec<_> = world.shard.home.entries().map(|(_, entry)| entry.message).filter(|id| *id != first).collect();
    let one = MailChoice { message: Some(others[0]), ..MailChoice::default() };
    assert_eq!(world.bounce(one.clone()), [("peer.example".to_owned(), 1)]);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.bounce(one), [], "it is gone");
    assert_eq!(world.fates(), [Fate::AdminBounced]);
    let queue = MailChoice { queues: vec!["peer.example".to_owned()], ..MailChoice::default() };
    assert_eq!(world.bounce(queue), [("peer.example".to_owned(), 2)]);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates().len(), 2, "the other one is on the wire");
    world.peer_says(peer, "451 4.2.0 later\r\n");
    world.pass(Duration::from_secs(1));
    let fates = world.fates();
    assert_eq!(fates.len(), 4, "{fates:?}");
    assert!(matches!(fates[2], Fate::Deferred { .. }), "its attempt is on record");
    assert_eq!(fates[3], Fate::AdminBounced);
    assert_eq!(world.shard.home.len(), 1, "other.example's");
    assert_eq!(world.bounce(domain("other.example")).len(), 1);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.home.len(), 1, "it has followed on the wire");
    world.shard.connection_closed(world.now, peer, "reset");
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_secs(1));
    // Nothing of it had been said there, so it is tried on another connection, which is refused.
    let (other, _) = world.connects.pop().expect("a connection is wanted");
    let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
    world.shard.connect_failed(world.now, other, &refused);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.shard.home.len(), world.fates().last()), (0, Some(&Fate::AdminBounced)));
    // An outcome's commit may wait for a message's.
    world.pass(Duration::from_millis(10));
    assert_eq!(world.fates().len(), 5);
    assert_eq!(restart(world).shard.home.len(), 0);
}

/// Its ticket keeps its place, and its source.
#[test]
fn what_another_queue_has_in_hand_stays_there() {
    let mut world = world();
    accepted(&mut world);
    accepted_for(&mut world, "other.example");
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    let is_called_back = |world: &mut World, queue: &str| {
        let choice = MailChoice { queues: vec![queue.to_owned()], ..MailChoice::default() };
        world.shard.answer(world.now, 9, Ask::Bounce { choice, reason: "a test".into() });
        world.shard.pools.poll_order().is_some()
    };
    assert!(!is_called_back(&mut world, "peer.example"), "it is on the wire");
    assert!(is_called_back(&mut world, "other.example"));
}

/// Read from the disk where it has to be; without what is finished.
#[test]
fn a_queued_message_is_looked_at() {
    let mut world = world();
    accepted(&mut world);
    let id = world.shard.home.entries().next().unwrap().1.message;
    let inspect = |world: &mut World, id, want_body| {
        world.shard.handle_message(ShardMessage::Ask { question: 9, ask: Box::new(Ask::Inspect { id, want_body }) });
        world.sync();
        world.inspected.take().expect("it is answered")
    };
    let found = inspect(&mut world, id, true).expect("it is queued");
    assert_eq!((found.sender.as_str(), found.num_attempts, found.due.0), ("a@client.example", 0, START.wall_ms));
    assert_eq!(found.recipients, ["b@peer.example"]);
    let data = String::from_utf8(found.data.unwrap()).unwrap();
    assert!(data.starts_with("Received: ") && data.ends_with("Subject: x\r\n\r\nHello\r\n"), "{data}");
    let mut world = restart(world);
    assert_eq!(inspect(&mut world, id, false).map(|found| found.data), Some(None));
    let other = postrider_spool::MessageId::new(LogId(7), Sequence(1));
    assert_eq!(inspect(&mut world, other, true), None);
    world.bounce(MailChoice { message: Some(id), ..MailChoice::default() });
    world.pass(Duration::from_secs(1));
    assert_eq!(inspect(&mut world, id, true), None);
}

/// Its recipients come back at several times, and none of them waits for another attempt.
#[test]
fn what_comes_back_in_parts_is_bounced_whole() {
    let mut world = world();
    let session = world.connect_client();
    let recipients = "RCPT TO:<b@peer.example>\r\nRCPT TO:<c@peer.example>\r\nRCPT TO:<d@peer.example>\r\n";
    world.client_says(session, &CLIENT.replace("RCPT TO:<b@peer.example>\r\n", recipients));
    world.client_says(session, CONTENT);
    world.sync();
    let peer = world.accept_connection();
    world.peer_says(peer, "250-peer.example\r\n250 PIPELINING\r\n");
    assert_eq!(world.bounce(domain("peer.example")), [("peer.example".to_owned(), 3)]);
    world.peer_says(peer, "250 ok\r\n250 ok\r\n452 4.5.3 too many\r\n450 4.2.0 later\r\n354 go\r\n");
    world.peer_says(peer, "250 ok\r\n");
    world.pass(Duration::from_secs(1));
    world.pass(Duration::from_millis(10));
    let mut fates = world.fates();
    fates.retain(|fate| !matches!(fate, Fate::Deferred { .. }));
    fates.sort_by_key(|fate| *fate == Fate::AdminBounced);
    assert_eq!(fates, [Fate::Delivered, Fate::AdminBounced, Fate::AdminBounced]);
    assert_eq!(world.shard.home.len(), 0);
}

/// Twice in a moment: the second finds nothing left to decide.
#[test]
fn what_is_decided_about_is_not_decided_again() {
    let mut world = world();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "450 4.2.0 later\r\n");
    world.pass(Duration::from_secs(1));
    let id = world.shard.home.entries().next().unwrap().1.message;
    for _ in 0..2 {
        let choice = MailChoice { message: Some(id), ..MailChoice::default() };
        world.shard.handle_message(ShardMessage::Ask {
            question: 9,
            ask: Box::new(Ask::Bounce { choice, reason: "a test".into() }),
        });
    }
    world.sync();
    world.pass(Duration::from_secs(1));
    assert_eq!((world.fates().len(), world.fates().last()), (2, Some(&Fate::AdminBounced)));
    assert_eq!(world.shard.home.len(), 0);
}

/// Its first recipient is delivered; the other one is still found by the message's id.
#[test]
fn what_is_left_of_a_message_is_found_by_its_id() {
    let mut config = config();
    config.shaping.in_doubt = InDoubt::Retry;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let session = world.connect_client();
    let two = "RCPT TO:<b@peer.example>\r\nRCPT TO:<c@other.example>\r\n";
    world.client_says(session, &CLIENT.replace("RCPT TO:<b@peer.example>\r\n", two));
    world.client_says(session, CONTENT);
    world.sync();
    let id = world.shard.home.entries().next().unwrap().1.message;
    let peer = world.accept_connection();
    let said = world.peer_says(peer, "250 peer.example\r\n");
    assert!(said.starts_with("MAIL"), "{said}");
    let said = world.take_message(peer);
    assert!(said.starts_with("MAIL"), "{said}");
    world.peer_says(peer, "450 4.2.0 later\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.home.len(), 1);
    let one = MailChoice { message: Some(id), ..MailChoice::default() };
    assert_eq!(world.bounce(one).len(), 1);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates().last(), Some(&Fate::AdminBounced));
}
