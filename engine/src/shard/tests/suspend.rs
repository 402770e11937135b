//! What is suspended is not sent; it goes by another source of its pool, or waits and says why.

use super::moving::config_with_sources;
use super::*;
use crate::config::LimitSettings;
use crate::handover::PairKey;
use crate::pool::automation::Limited;
use crate::pool::suspension::{Effect, Scope, Suspension};

const SITE: &str = "127.0.0.1:25";

fn pair(source: usize) -> PairKey {
    PairKey { source, rollup: SITE.into(), site: SITE.into() }
}

fn suspension(id: u128, scope: Scope, until_ms: u64) -> ShardMessage {
    ShardMessage::Suspend(Box::new(Suspension {
        id,
        scope,
        effect: Effect::Stop,
        reason: "421 4.7.0 slow down".into(),
        until_ms,
    }))
}

fn tell(world: &mut World, message: ShardMessage) {
    world.shard.handle_message(message);
    world.sync();
}

/// Where entries stand: by source, or None where they are held.
fn sources(world: &World) -> Vec<Option<usize>> {
    world.shard.home.entries().map(|(key, _)| world.shard.home.pair_of(key).map(|pair| pair.source)).collect()
}

fn held_by(world: &World) -> Vec<String> {
    let blocked = |key| world.shard.home.blocked_by(key).map(|blocked| blocked.reason.to_string());
    world.shard.home.entries().filter_map(|(key, _)| blocked(key)).collect()
}

#[test]
fn mail_goes_by_the_other_source_and_comes_back_after_the_suspension() {
    let mut config = config_with_sources(2);
    config.shaping.connection_limit = 1;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let until_ms = world.now.wall_ms + 60_000;
    tell(&mut world, suspension(1, Scope::pair(&pair(0)), until_ms));
    for _ in 0..4 {
        accepted(&mut world);
    }
    assert_eq!(sources(&world), [Some(1); 4]);
    assert_eq!(world.connect_sources, [1]);
    world.pass(Duration::from_secs(61));
    for _ in 0..4 {
        accepted(&mut world);
    }
    assert_eq!(sources(&world).iter().filter(|source| **source == Some(0)).count(), 2, "turn and turn about again");
    assert_eq!(world.connect_sources, [1, 0]);
}

/// Mail that was ready meanwhile would go to and fro: its owner refuses it, and its home knows of nothing.
#[test]
fn what_was_over_before_the_clock_was_set_back_stays_so() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    let until_ms = world.now.wall_ms + 60_000;
    tell(&mut world, suspension(1, Scope::pair(&pair(0)), until_ms));
    tell(&mut world, suspension(2, Scope { campaign: Some("c".into()), ..Scope::default() }, until_ms + 3_600_000));
    world.pass(Duration::from_millis(59_500));
    // Both within a second, so that nobody has looked in between.
    world.now.monotonic += Duration::from_millis(600);
    world.now.wall_ms -= 3_600_000 - 600;
    world.sync();
    accepted(&mut world);
    assert_eq!((world.connect_sources.len(), held_by(&world)), (1, vec![]));
    assert_eq!(world.shard.suspensions.len(), 1, "what lasts longer goes on");
}

/// What was ready for the source and not begun moves at once; tickets come back to their homes first.
#[test]
fn what_waits_for_a_suspended_source_moves() {
    let mut config = config_with_sources(2);
    config.shaping.connection_limit = 1;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for _ in 0..8 {
        accepted(&mut world);
    }
    assert_eq!(sources(&world).iter().filter(|source| **source == Some(0)).count(), 4);
    let until_ms = world.now.wall_ms + 60_000;
    tell(&mut world, suspension(1, Scope::pair(&pair(0)), until_ms));
    assert_eq!(sources(&world), [Some(1); 8]);
}

/// Told in one turn, they are carried out together, each for what it is about.
#[test]
fn several_suspensions_at_once_hold_what_each_is_about() {
    let mut config = config_with_sources(3);
    config.shaping.connection_limit = 1;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for _ in 0..9 {
        accepted(&mut world);
    }
    let until_ms = world.now.wall_ms + 60_000;
    let nobodys = Scope { domain: Some("elsewhere.test".into()), ..Scope::default() };
    for (id, scope) in [(1, Scope::pair(&pair(0))), (2, nobodys), (3, Scope::pair(&pair(2)))] {
        world.shard.handle_message(suspension(id, scope, until_ms));
    }
    world.sync();
    assert_eq!(sources(&world), [Some(1); 9]);
    assert_eq!(world.shard.suspensions.len(), 3);
}

#[test]
fn with_no_source_left_mail_is_held_and_says_why() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    let until_ms = world.now.wall_ms + 60_000;
    tell(&mut world, suspension(1, Scope::pair(&pair(0)), until_ms));
    for _ in 0..3 {
        accepted(&mut world);
    }
    assert_eq!(held_by(&world), ["suspended: 421 4.7.0 slow down"; 3]);
    assert_eq!(world.shard.home.ready(), 3);
    assert!(world.connects.is_empty());
    let (key, _) = world.shard.home.entries().next().unwrap();
    assert_eq!(world.shard.home.blocked_by(key).unwrap().until_ms, until_ms);
    world.pass(Duration::from_secs(59));
    assert!(world.connects.is_empty(), "not before its end");
    world.pass(Duration::from_secs(2));
    assert!(!world.connects.is_empty() && held_by(&world).is_empty());
}

/// The pair waited by the clock that can't be set: mail stood at it until then, however its other sources were free.
#[test]
fn a_suspension_that_a_step_of_the_clock_ends_is_over() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    accepted(&mut world);
    let until_ms = world.now.wall_ms + 36_000_000;
    tell(&mut world, suspension(1, Scope::pair(&pair(0)), until_ms));
    accepted(&mut world);
    let begun = world.connects.len();
    world.now.wall_ms = until_ms + 3_600_000;
    world.pass(Duration::from_secs(1));
    let connection = world.connects[begun - 1].0;
    let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionReset.into());
    world.shard.connect_failed(world.now, connection, &refused);
    for _ in 0..60 {
        world.pass(Duration::from_secs(1));
    }
    assert!(world.connects.len() > begun && held_by(&world).is_empty(), "{begun} {:?}", held_by(&world));
}

/// It goes as soon as one of its sources may.
#[test]
fn what_is_held_waits_for_the_first_of_its_sources() {
    for first in [0, 1] {
        let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(2));
        let ends_ms = [60_000, 600_000].map(|wait_ms| world.now.wall_ms + wait_ms);
        tell(&mut world, suspension(1, Scope::pair(&pair(first)), ends_ms[0]));
        tell(&mut world, suspension(2, Scope::pair(&pair(1 - first)), ends_ms[1]));
        accepted(&mut world);
        let (key, _) = world.shard.home.entries().next().unwrap();
        assert_eq!(world.shard.home.blocked_by(key).unwrap().until_ms, ends_ms[0]);
        world.pass(Duration::from_secs(61));
        assert_eq!(world.connect_sources, [first]);
    }
}

/// What another source has under way at the same site goes on, and its connection stays.
#[test]
fn a_suspended_source_holds_up_no_other_at_the_same_site() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(2));
    accepted(&mut world);
    accepted(&mut world);
    assert_eq!(world.connect_sources, [0, 1]);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.take_message(peer);
    world.to_peer.clear();
    let until_ms = world.now.wall_ms + 60_000;
    tell(&mut world, suspension(1, Scope::pair(&pair(0)), until_ms));
    assert_eq!(world.closed, [], "the other source's is idle, and of use");
    assert!(world.to_peer.contains("MAIL FROM:"), "what waited for the one goes by the other at once");
}

/// A peer that wants no more of us is not kept waiting either.
#[test]
fn an_idle_connection_ends_with_the_suspension() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    assert_eq!(world.take_message(peer), "", "it is kept");
    world.to_peer.clear();
    let until_ms = world.now.wall_ms + 60_000;
    tell(&mut world, suspension(1, Scope::pair(&pair(0)), until_ms));
    assert_eq!(world.to_peer, "QUIT\r\n");
}

#[test]
fn an_early_end_sends_what_was_held() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    let until_ms = world.now.wall_ms + 3_600_000;
    tell(&mut world, suspension(1, Scope { source: Some(0), ..Scope::default() }, until_ms));
    for _ in 0..3 {
        accepted(&mut world);
    }
    assert_eq!(held_by(&world).len(), 3, "what is on the wire comes to its end");
    world.peer_says(peer, "250 ok\r\n");
    world.peer_says(peer, "250 ok\r\n");
    world.peer_says(peer, "354 go\r\n");
    assert_eq!(world.peer_says(peer, "250 taken\r\n"), "QUIT\r\n", "its connection takes nothing more");
    tell(&mut world, ShardMessage::Resume { id: 2 });
    assert_eq!(held_by(&world).len(), 3, "that was another");
    tell(&mut world, ShardMessage::Resume { id: 1 });
    world.pass(Duration::ZERO);
    assert!(held_by(&world).is_empty());
    assert_eq!(world.connects.len(), 3);
}

#[test]
fn a_suspended_campaign_holds_no_other() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    let scope = Scope { campaign: Some("spring".into()), ..Scope::pair(&pair(0)) };
    let until_ms = world.now.wall_ms + 60_000;
    let inject = |world: &mut World, campaign: &str| {
        let session = world.connect_client();
        world.client_says(session, CLIENT);
        world.client_says(session, &format!("X-Campaign: {campaign}\r\n{CONTENT}"));
        world.sync();
    };
    // Some are with the owner already, which gives them back.
    for campaign in ["spring", "autumn", "spring", "autumn"] {
        inject(&mut world, campaign);
    }
    tell(&mut world, suspension(1, scope, until_ms));
    for campaign in ["spring", "autumn"] {
        inject(&mut world, campaign);
    }
    let home = &world.shard.home;
    let mut seen: Vec<(String, bool)> = home
        .entries()
        .map(|(key, _)| (home.queue_of(key).campaign.to_string(), home.blocked_by(key).is_some()))
        .collect();
    seen.sort();
    let expected = [("autumn", false), ("autumn", false), ("autumn", false), ("spring", true), ("spring", true)];
    let expected: Vec<(String, bool)> =
        expected.into_iter().chain([("spring", true)]).map(|(name, held)| (name.to_owned(), held)).collect();
    assert_eq!(seen, expected);
}

/// Nor does it take others from the line that they stand in.
#[test]
fn what_waits_beside_a_suspended_campaign_goes() {
    let mut config = config_with_sources(1);
    config.shaping.connection_limit = 1;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for campaign in ["spring", "autumn"].repeat(8) {
        let session = world.connect_client();
        world.client_says(session, CLIENT);
        world.client_says(session, &format!("X-Campaign: {campaign}\r\n{CONTENT}"));
        world.sync();
    }
    let scope = Scope { campaign: Some("spring".into()), ..Scope::pair(&pair(0)) };
    let until_ms = world.now.wall_ms + 60_000;
    tell(&mut world, suspension(1, scope, until_ms));
    let peer = world.accept_connection();
    let mut said = world.peer_says(peer, "250 peer.example\r\n");
    while said.contains("MAIL FROM:") {
        said = world.take_message(peer);
    }
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), world.shard.home.len()), (8, 8));
}

/// A greeting that refuses our address is no host's fault: the pool's other source is used at once.
#[test]
fn a_greeting_that_refuses_our_address_suspends_the_source_there() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(2));
    accepted(&mut world);
    let (connection, peer) = world.connects.pop().expect("a connection is wanted");
    let made = Connected { local: "127.0.0.11:5000".parse().ok(), peer };
    world.shard.connected(world.now, connection, made);
    world.peer_says(connection, "554-No SMTP service\r\n554 IP address is block listed.\r\n");
    world.sync();
    assert_eq!(sources(&world), [Some(1)]);
    assert_eq!(world.connect_sources, [0, 1]);
    assert_eq!(world.shard.home.entries().next().unwrap().1.attempts, 0, "no attempt was made");
    let [suspension] = &world.suspensions[..] else { panic!("{:?}", world.suspensions) };
    assert_eq!(suspension.scope, Scope::pair(&pair(0)));
    assert!(suspension.reason.contains("554 No SMTP service IP address is block listed."), "{suspension:?}");
}

/// Expiry ends what is held, and tells what held it.
#[test]
fn held_mail_expires() {
    let mut config = config_with_sources(1);
    config.retry.max_age = Duration::from_secs(600);
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let until_ms = world.now.wall_ms + 3_600_000;
    tell(&mut world, suspension(1, Scope::pair(&pair(0)), until_ms));
    accepted(&mut world);
    world.pass(Duration::from_secs(601));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.home.len(), 0);
    let outcome = world.events.iter().find_map(|event| match &event.record {
        Logged::Outcome(outcome) => Some(outcome.results[0].answer.text.clone()),
        _ => None,
    });
    assert_eq!(outcome.as_deref(), Some("Message expired; last answer: suspended: 421 4.7.0 slow down"));
}

/// Rows, events and suspensions have one name for a site, also for one that a provider rolls up.
#[test]
fn a_site_has_one_name() {
    let rules = "hostname = \"mta.example\"\n[spool]\nallow_filesystem = true\n[provider.p]\n\
                 match = [{ domain = \"peer.example\" }]\n[shaping.\"peer.example\"]\nmx_rollup = false\n\
                 [shaping.default]\nmax_deliveries_per_connection = 1\n";
    let config = Config::from_toml(rules, "t.toml", std::path::Path::new("/nonexistent")).unwrap();
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let at = |name: &str| Scope { rollup: Some(name.into()), ..Scope::default() };
    // That of others at the same hosts.
    tell(&mut world, suspension(1, at(SITE), START.wall_ms + 100_000));
    accepted(&mut world);
    assert_eq!(refused_by_peer(&mut world), "peer.example@127.0.0.1:25");
    for (id, name) in [(2, "peer.example@127.0.0.1:25"), (3, "p")] {
        let until_ms = world.now.wall_ms + 10_000;
        tell(&mut world, suspension(id, at(name), until_ms));
        let begun = world.connects.len();
        accepted(&mut world);
        assert_eq!((held_by(&world), world.connects.len()), (vec!["suspended: 421 4.7.0 slow down".to_owned()], begun));
        world.pass(Duration::from_secs(11));
        assert_eq!(refused_by_peer(&mut world), "peer.example@127.0.0.1:25");
    }
}

/// Tells the site that the outcome names.
fn refused_by_peer(world: &mut World) -> String {
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "550 5.1.1 nobody\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.home.len(), 0);
    match world.events.last().map(|event| &event.record) {
        Some(Logged::Outcome(outcome)) => outcome.site.clone(),
        other => panic!("{other:?}"),
    }
}

/// Another was decided here before the control thread has told of the first: what it tells is of before.
#[test]
fn what_was_decided_last_holds_until_all_know_it() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    let limit = |connections| {
        let settings = LimitSettings { connection_limit: Some(connections), ..LimitSettings::default() };
        Effect::Limit(Limited { settings, recovery: None })
    };
    let mut decided = Vec::new();
    for (connections, lasts) in [(2, 60), (1, 30)] {
        let (now, scope, lasts) = (world.now, Scope::pair(&pair(0)), Duration::from_secs(lasts));
        world.shard.announce_suspension(now, scope, limit(connections), "a rule", lasts);
        decided.extend(world.shard.suspensions.iter().cloned());
    }
    let in_force = |world: &World| {
        let limits = world.shard.suspensions.limits(world.now.wall_ms);
        limits.values().map(|limits| limits.settings.connection_limit).collect::<Vec<_>>()
    };
    let [first, last] = <[Suspension; 2]>::try_from(decided).unwrap();
    let another = Suspension { id: 7, effect: limit(3), ..first.clone() };
    for told in [first.clone(), another.clone(), last] {
        tell(&mut world, ShardMessage::Suspend(Box::new(told)));
        assert_eq!(in_force(&world), [Some(1)]);
    }
    tell(&mut world, ShardMessage::Suspend(Box::new(another.clone())));
    assert_eq!(in_force(&world), [Some(3)], "nothing of ours is on its way");
    // The control thread has too many to take this one.
    let (now, scope) = (world.now, Scope::pair(&pair(0)));
    world.shard.announce_suspension(now, scope, limit(1), "a rule", Duration::from_secs(30));
    world.pass(Duration::from_secs(31));
    tell(&mut world, ShardMessage::Suspend(Box::new(another)));
    assert_eq!(in_force(&world), [Some(3)], "ours is over");
}
