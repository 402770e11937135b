//! What the end of a message that was never attempted says it waited for.

use super::*;
use crate::config::RetrySchedule;
use crate::deliver::route::{RouteFailure, RouteFailureKind};
use crate::shard::ConnectError;

/// Nobody but the test knows where mail goes.
fn world_without_routes() -> World {
    let mut world = World::new();
    world.shard.config = Arc::new(Config::new("mta.example"));
    world.shard.routes = crate::shard::RouteCache::new(Arc::new(crate::shard::StaticRoutes::new(&[])));
    world
}

/// Its turn comes when its time is over, and before the sweep that looks for such messages.
#[test]
fn a_message_that_expires_at_its_turn_tells_what_it_waited_for() {
    let mut config = Config::new("mta.example");
    // Hosts back off for so long.
    config.retry.schedule = RetrySchedule::Listed(vec![Duration::from_millis(100)]);
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    let times = "{\"first_attempt\":\"2027-01-15T08:00:00.000Z\",\"expires\":\"2027-01-15T08:00:00.600Z\"}";
    world.client_says(session, &format!("X-Schedule: {times}\r\n{CONTENT}"));
    world.sync();
    let (connection, _) = world.connects.pop().expect("a connection is wanted");
    let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
    world.shard.connect_failed(world.now, connection, &refused);
    world.sync();
    let blocked = |world: &World| {
        let (key, _) = world.shard.home.entries().next().expect("it waits");
        world.shard.home.blocked_by(key).cloned()
    };
    let waited_for = blocked(&world).expect("the host backs off").reason;
    world.now = Now { monotonic: START.monotonic + Duration::from_millis(700), wall_ms: START.wall_ms + 700 };
    assert!(world.shard.next_sweep > world.now.monotonic, "the sweep is still to come");
    world.sync();
    assert_eq!((world.shard.home.len(), world.connects.len()), (0, 0), "its turn came, and it was over");
    world.pass(Duration::from_millis(10));
    let Some(Logged::Outcome(outcome)) = world.events.last().map(|event| &event.record) else { panic!("an outcome") };
    let [result] = &outcome.results[..] else { panic!("{outcome:?}") };
    assert_eq!((result.fate, result.attempts), (Fate::Expired, 0));
    assert_eq!(result.answer.text, format!("Message expired; last answer: {waited_for}"));
}

/// Its domain's block is over with its time: the answer of the DNS comes behind it, or never.
#[test]
fn a_message_that_expires_with_its_domains_block_tells_why() {
    for is_answered in [true, false] {
        let mut world = world_without_routes();
        let session = world.connect_client();
        world.client_says(session, CLIENT);
        let times = "{\"first_attempt\":\"2027-01-15T08:00:00.000Z\",\"expires\":\"2027-01-15T08:00:01.500Z\"}";
        world.client_says(session, &format!("X-Schedule: {times}\r\n{CONTENT}"));
        world.sync();
        let failure = RouteFailure {
            kind: RouteFailureKind::Defer,
            code: 451,
            enhanced: (4, 4, 3),
            text: "no name server answers".to_owned(),
            expires: world.now.monotonic,
        };
        let key = RouteKey::of_domain("peer.example");
        world.shard.handle_message(ShardMessage::Routed { key: key.clone(), result: Err(failure) });
        world.sync();
        world.pass(Duration::from_secs(1));
        assert_eq!((world.lookups, world.shard.home.len()), (2, 1), "it is asked for again");
        if is_answered {
            world.now.monotonic += Duration::from_millis(600);
            world.now.wall_ms += 600;
            let site = Site { name: "mx.example".to_owned(), hosts: Vec::new(), expires: Duration::MAX };
            let route = handover::Route {
                site: Arc::new(site),
                tls: TlsMode::Opportunistic,
                sts: None,
                dane: true,
                terms: Arc::default(),
            };
            world.shard.handle_message(ShardMessage::Routed { key, result: Ok(route) });
            world.sync();
            assert_eq!(world.shard.home.len(), 0, "and before the sweep");
        }
        world.pass(Duration::from_secs(1));
        world.pass(Duration::from_millis(10));
        let Some(Logged::Outcome(outcome)) = world.events.last().map(|event| &event.record) else { panic!("none") };
        let text = "Message expired; last answer: 451 4.4.3 no name server answers";
        assert_eq!((outcome.results[0].fate, &*outcome.results[0].answer.text), (Fate::Expired, text));
    }
}

/// A shard that has nothing left to do waits for the others' end. What it decided then might not become durable.
#[test]
fn nothing_expires_during_a_stop() {
    let mut config = Config::new("mta.example");
    config.retry.max_age = Duration::from_secs(60);
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.client_says(session, CONTENT);
    world.sync();
    let (connection, _) = world.connects.pop().expect("a connection is wanted");
    let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
    world.shard.connect_failed(world.now, connection, &refused);
    world.sync();
    world.shard.handle_message(ShardMessage::Stop);
    world.sync();
    world.shard.session_closed(session);
    world.pass(Duration::from_secs(3_600));
    // Nor where it loses its source by then.
    world.shard.handle_message(ShardMessage::SourcePlumbed { source: 0, plumbed: false });
    world.pass(Duration::from_secs(10));
    assert_eq!((world.shard.stopped, world.outcomes()), (true, 0));
    assert_eq!(world.shard.metrics.failures.get(), 0);
}

/// Nor does mail bounce whose domain turns out not to be.
#[test]
fn what_is_found_out_during_a_stop_is_left_to_the_next_start() {
    let mut world = world_without_routes();
    accepted(&mut world);
    world.shard.handle_message(ShardMessage::Stop);
    world.sync();
    let failure = RouteFailure {
        kind: RouteFailureKind::Bounce,
        code: 550,
        enhanced: (5, 1, 2),
        text: "no such domain".to_owned(),
        expires: world.now.monotonic + Duration::from_secs(30),
    };
    let key = RouteKey::of_domain("peer.example");
    world.shard.handle_message(ShardMessage::Routed { key, result: Err(failure) });
    world.pass(Duration::from_secs(10));
    assert_eq!((world.outcomes(), world.shard.home.len()), (0, 1));
}

/// What is due when it expires would count as held in doubt: nobody would try it, and the operator be asked.
#[test]
fn a_retry_that_would_come_with_the_expiry_is_none() {
    let mut config = Config::new("mta.example");
    config.retry.schedule = RetrySchedule::Listed(vec![Duration::from_secs(600)]);
    config.retry.max_age = Duration::from_secs(600);
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "450 4.2.0 later\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!((world.fates(), world.shard.home.len()), (vec![Fate::Expired], 0));
}

/// An operator has bounced it, and its message is still being read: it ends once, and not as expired.
#[test]
fn what_is_decided_about_does_not_expire_meanwhile() {
    let mut world = bounced_and_not_read();
    world.pass_unsynced(Duration::from_secs(70));
    assert_eq!(world.outcomes(), 0);
    world.sync();
    world.pass(Duration::from_secs(1));
    assert_eq!((world.fates(), world.shard.home.len()), (vec![Fate::AdminBounced], 0));
}

/// Nor does a stop come before it: the next start would send it.
#[test]
fn what_is_decided_about_ends_before_the_shard_has_stopped() {
    let mut world = bounced_and_not_read();
    world.shard.handle_message(ShardMessage::Stop);
    world.settle();
    assert!(!world.shard.stopped, "it is still being read");
    world.sync();
    world.pass(Duration::from_secs(1));
    assert_eq!((world.shard.stopped, world.fates()), (true, vec![Fate::AdminBounced]));
}

fn bounced_and_not_read() -> World {
    let config = || {
        let mut config = Config::new("mta.example");
        config.retry.schedule = RetrySchedule::Listed(vec![Duration::from_secs(50)]);
        config.retry.max_age = Duration::from_secs(60);
        config
    };
    let mut world = World::open(TempDir::new().unwrap(), START, config());
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "450 4.2.0 later\r\n");
    world.pass(Duration::from_secs(1));
    let World { directory, now, shard, _spool, .. } = world;
    drop((shard, _spool));
    // What an earlier life wrote is read from the disk.
    let mut world = World::open(directory, now, config());
    world.sync();
    world.events.clear();
    let ask = Ask::Bounce { choice: crate::admin::MailChoice::default(), reason: "a test".into() };
    world.shard.handle_message(ShardMessage::Ask { question: 9, ask: Box::new(ask) });
    world.settle();
    assert_eq!(world.shard.reading.len(), 1, "it is being read");
    world
}
