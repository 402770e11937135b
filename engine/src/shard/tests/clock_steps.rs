//! A wall clock that is set: nothing waits for longer than it would have, and nothing goes that should not.

use super::*;
use crate::config::RetrySchedule;
use crate::deliver::route::{RouteFailure, RouteFailureKind};

const MONTH_MS: u64 = 30 * 86_400_000;

fn retries() -> Config {
    let mut config = Config::new("mta.example");
    config.retry.schedule = RetrySchedule::Listed(vec![Duration::from_secs(1_200)]);
    config.retry.max_age = Duration::from_secs(365 * 86_400);
    config
}

/// Taken, tried once and deferred.
fn deferred(world: &mut World) {
    accepted(world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "450 4.2.0 later\r\n");
    world.pass(Duration::from_secs(1));
    assert!(matches!(world.fates()[..], [Fate::Deferred { .. }]));
    world.shard.connection_closed(world.now, peer, "gone");
    world.shard.connection_gone(world.now, peer);
    world.sync();
}

/// The same turn as any, with the clock at another time.
fn set_clock(world: &mut World, wall_ms: u64) {
    world.now.wall_ms = wall_ms;
    world.sync();
}

#[test]
fn a_clock_that_is_set_back_holds_no_retry() {
    let mut world = World::open(TempDir::new().unwrap(), START, retries());
    deferred(&mut world);
    let wall_ms = world.now.wall_ms;
    set_clock(&mut world, wall_ms - 7_200_000);
    for _ in 0..1_190 {
        world.pass(Duration::from_secs(1));
    }
    assert!(world.connects.is_empty(), "it is not tried earlier either");
    for _ in 0..15 {
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(world.connects.len(), 1);
}

/// Mail that was deferred by a clock that stood a month ahead waited for that month.
#[test]
fn a_clock_that_was_ahead_for_a_while_holds_no_retry() {
    let mut world = World::open(TempDir::new().unwrap(), START, retries());
    let wall_ms = world.now.wall_ms;
    world.sync();
    set_clock(&mut world, wall_ms + MONTH_MS);
    deferred(&mut world);
    let ahead_ms = world.now.wall_ms;
    set_clock(&mut world, ahead_ms - MONTH_MS);
    for _ in 0..1_205 {
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(world.connects.len(), 1);
}

#[test]
fn what_was_due_and_blocked_goes_on_when_the_block_would_have_ended() {
    let mut config = retries();
    // Nobody but the test knows the route.
    config.retry.max_age = Duration::from_secs(86_400);
    let mut world = World::open(TempDir::new().unwrap(), START, config.clone());
    world.shard.config = Arc::new(config);
    world.shard.routes = crate::shard::RouteCache::new(Arc::new(crate::shard::StaticRoutes::new(&[])));
    accepted(&mut world);
    assert_eq!(world.lookups, 1);
    let failure = RouteFailure {
        kind: RouteFailureKind::Defer,
        code: 451,
        enhanced: (4, 4, 3),
        text: "no answer".to_owned(),
        expires: world.now.monotonic + Duration::from_secs(30),
    };
    let key = RouteKey::of_domain("peer.example");
    world.shard.handle_message(ShardMessage::Routed { key, result: Err(failure) });
    world.pass(Duration::from_secs(1));
    let wall_ms = world.now.wall_ms;
    set_clock(&mut world, wall_ms - 7_200_000);
    for _ in 0..32 {
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(world.lookups, 2);
}

/// It may have left already, and only its expiry ends it; a first attempt that is wanted at a time comes at that time.
#[test]
fn held_mail_and_first_attempts_to_come_stay_where_they_are() {
    let mut config = retries();
    config.retry.max_age = Duration::from_secs(3_600);
    config.shaping.in_doubt = crate::config::InDoubt::Hold;
    let mut world = World::open(TempDir::new().unwrap(), START, config.clone());
    let session = world.connect_client();
    world.client_says(session, &CLIENT.replace("peer.example", "later.example"));
    let first_attempt = "X-Schedule: {\"first_attempt\":\"2027-01-15T10:00:00.000Z\"}\r\n";
    world.client_says(session, &format!("{first_attempt}{CONTENT}"));
    world.sync();
    let due = |world: &World| {
        let mut due: Vec<(u64, bool)> =
            world.shard.home.entries().map(|(_, entry)| (entry.due_ms, entry.is_held())).collect();
        due.sort_unstable();
        due
    };
    let scheduled_ms = START.wall_ms + 7_200_000;
    assert_eq!(due(&world), [(scheduled_ms, false)]);
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    for reply in ["250 ok\r\n", "250 ok\r\n", "354 go\r\n"] {
        world.peer_says(peer, reply);
    }
    world.sync();
    world.shard.connection_closed(world.now, peer, "the connection was closed");
    world.shard.connection_gone(world.now, peer);
    world.sync();
    let before = due(&world);
    assert_eq!((before.len(), before[0].1), (2, true), "{before:?}");
    // Nobody has looked for what is over yet.
    world.now.monotonic += Duration::from_millis(1);
    let wall_ms = world.now.wall_ms;
    set_clock(&mut world, wall_ms - 86_400_000);
    assert_eq!(due(&world), before);
}

/// It waits for nothing but a while, and that while is by the clock that was set.
#[test]
fn what_waits_for_a_while_waits_no_longer_when_the_clock_is_set_back() {
    let mut world = World::open(TempDir::new().unwrap(), START, retries());
    world.shard.set_events_full(true);
    accepted(&mut world);
    assert!(world.connects.is_empty(), "the event log takes nothing");
    let wall_ms = world.now.wall_ms;
    set_clock(&mut world, wall_ms - MONTH_MS);
    world.shard.set_events_full(false);
    for _ in 0..=crate::limits::UNRECORDED_RETRY.as_secs() {
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(world.connects.len(), 1);
}

/// A source in its warm-up has each day's quota once, also where the day begins twice.
#[test]
fn a_clock_that_is_set_back_gives_no_day_twice() {
    let rules = "hostname = \"mta.example\"\n[spool]\nallow_filesystem = true\n\
                 [[egress_source]]\nname = \"new\"\nsource_address = \"127.0.0.11\"\n\
                 [[egress_pool]]\nname = \"default\"\nsources = [{ source = \"new\" }]\n\
                 [provider.slow]\nmatch = [{ domain = \"peer.example\" }]\n\
                 [warmup.new]\nstart = \"2027-01-15\"\ndaily.slow = [2, 2]\n";
    let config = Config::from_toml(rules, "t.toml", std::path::Path::new("/nonexistent")).unwrap();
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let send = |world: &mut World| {
        accepted(world);
        let peer = world.accept_connection();
        world.peer_says(peer, "250 peer.example\r\n");
        world.take_message(peer);
        world.shard.connection_closed(world.now, peer, "gone");
        world.shard.connection_gone(world.now, peer);
        world.sync();
    };
    let (hour_ms, midnight_ms) = (3_600_000, START.wall_ms + 16 * 3_600_000);
    send(&mut world);
    for wall_ms in [midnight_ms + hour_ms, midnight_ms - hour_ms] {
        set_clock(&mut world, wall_ms);
        send(&mut world);
    }
    set_clock(&mut world, midnight_ms + 2 * hour_ms);
    accepted(&mut world);
    assert!(world.connects.is_empty(), "two have gone since that day began first");
}
