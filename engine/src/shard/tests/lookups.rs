//! What the DNS says of a domain, and for how long it counts.

use super::super::{RouteCache, StaticRoutes};
use super::*;
use crate::deliver::route::RouteFailure;

/// All mail goes where the DNS says; the test answers.
fn world() -> World {
    let mut world = World::new();
    world.shard.config = Arc::new(Config::new("mta.example"));
    world.shard.routes = RouteCache::new(Arc::new(StaticRoutes::new(&[])));
    world
}

fn answer(world: &mut World, result: Result<handover::Route, RouteFailure>) {
    world.shard.handle_message(ShardMessage::Routed { key: RouteKey::of_domain("peer.example"), result });
    world.sync();
}

/// RFC 2308 §7: that nobody could say something counts for a while, too. New mail asks no earlier.
#[test]
fn what_nobody_could_say_is_not_asked_before_its_time() {
    let mut world = world();
    accepted(&mut world);
    assert_eq!(world.lookups, 1);
    let expires = world.now.monotonic + Duration::from_secs(100);
    answer(&mut world, Err(RouteFailure::defer("no name server answered".to_owned()).until(expires)));
    for _ in 0..98 {
        world.pass(Duration::from_secs(1));
    }
    accepted(&mut world);
    assert_eq!(world.lookups, 1);
    let entries = world.shard.home.entries();
    let reasons: Vec<_> = entries.map(|(key, _)| world.shard.home.blocked_by(key).map(|it| &*it.reason)).collect();
    assert_eq!(reasons, [Some("451 4.4.3 no name server answered"); 2]);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.lookups, 2);
}

/// An answer counts until its TTL is over, and no longer.
#[test]
fn a_route_is_asked_for_again_when_its_time_is_over() {
    let mut world = world();
    accepted(&mut world);
    let address: SocketAddr = "127.0.0.1:25".parse().unwrap();
    let host = Host {
        name: "mx.example".to_owned(),
        preference: 0,
        addresses: vec![address.into()],
        dane: HostDane::default(),
    };
    let expires = world.now.monotonic + Duration::from_secs(30);
    let site = Arc::new(Site { name: "mx.example".to_owned(), hosts: vec![host], expires });
    let route = handover::Route { site, tls: TlsMode::Disabled, terms: Arc::default(), sts: None, dane: true };
    answer(&mut world, Ok(route));
    world.pass(Duration::from_secs(29));
    accepted(&mut world);
    assert_eq!((world.lookups, world.connects.len()), (1, 2));
    world.pass(Duration::from_secs(2));
    accepted(&mut world);
    assert_eq!((world.lookups, world.connects.len()), (2, 2), "who knows whether it still goes there");
}
