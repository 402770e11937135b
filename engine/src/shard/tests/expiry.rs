//! What the end of a message that was never attempted says it waited for.

use super::*;
use crate::config::RetrySchedule;
use crate::shard::ConnectError;

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
    assert_eq!((world.shard.stopped, world.outcomes()), (true, 0));
    assert_eq!(world.shard.metrics.failures.get(), 0);
}
