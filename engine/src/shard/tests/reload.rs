//! Another configuration while mail waits and goes: what it changes, and what it leaves alone.

use super::moving::config_with_sources;
use super::*;
use crate::config::{EgressSource, RetrySchedule};
use crate::handover::Generation;
use crate::shard::Reload;

impl World {
    /// The shard gets what is made of its configuration.
    fn reload(&mut self, change: impl FnOnce(&mut Config)) {
        let before = Arc::clone(&self.shard.config);
        let mut config = Config::clone(&before);
        config.egress_sources.retain(|source| !source.is_retired);
        change(&mut config);
        let config = Arc::new(config.aligned_with(&before).unwrap());
        let policy = Arc::new(Policy::new(&config).unwrap());
        let mut first = Reload::first(before, Arc::clone(&self.shard.policy));
        (first.generation, first.shared_limits) = (self.shard.generation, Arc::clone(&self.shard.shared_limits));
        let reload = first.followed_by(config, policy);
        self.shard.handle_message(ShardMessage::Reload(Arc::new(reload)));
        self.sync();
    }

    /// A peer that offers nothing, up to the first transaction's beginning.
    fn accept_plain(&mut self) -> (ConnectionKey, String) {
        let peer = self.accept_connection();
        let said = self.peer_says(peer, "250 peer.example\r\n");
        (peer, said)
    }
}

fn route_to(address: &str) -> Route {
    let to = vec![RouteTarget::Address(address.parse().unwrap())];
    Route { tls: Some(TlsMode::Disabled), ..Route::new(DomainPattern::Any, to) }
}

fn signer(selector: &str) -> DkimIdentity {
    let key = aws_lc_rs::signature::Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap().to_pkcs8().unwrap();
    let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, key.as_ref());
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n");
    let key = Arc::new(DkimKeyPem::from_pem("ed.pem".into(), pem).unwrap());
    let (domain, selector) = ("client.example".to_owned(), selector.to_owned());
    DkimIdentity { domain, selector, key, sign_for: vec!["*".to_owned()], headers: Vec::new() }
}

#[test]
fn the_same_configuration_changes_nothing() {
    let mut world = World::new();
    accepted(&mut world);
    let (peer, said) = world.accept_plain();
    assert!(said.starts_with("MAIL"), "{said}");
    accepted(&mut world);
    let (out, wakes) = (world.shard.home.out(), world.shard.next_timeout(world.now));
    world.reload(|_| {});
    assert_eq!((world.shard.home.out(), world.shard.next_timeout(world.now)), (out, wakes));
    assert_eq!(world.shard.generation, Generation(0));
    let said = world.take_message(peer);
    assert!(said.contains("MAIL FROM:"), "the next one goes by the same connection: {said}");
    assert!(world.closed.is_empty());
}

/// Both what is ready and what waits for its next attempt.
#[test]
fn what_waits_goes_by_the_new_route_with_its_attempts_at_its_due_time() {
    let mut world = World::new();
    accepted(&mut world);
    let (peer, _) = world.accept_plain();
    world.peer_says(peer, "451 later\r\n");
    world.pass(Duration::from_secs(1));
    let (key, entry) = world.shard.home.entries().next().unwrap();
    let due_ms = entry.due_ms;
    assert_eq!(entry.attempts, 1);
    // Another one waits for a host that is down.
    world.shard.connection_closed(world.now, peer, "reset");
    world.shard.connection_gone(world.now, peer);
    accepted(&mut world);
    let (connection, _) = world.connects.pop().unwrap();
    let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
    world.shard.connect_failed(world.now, connection, &refused);
    world.sync();
    assert_eq!((world.connects.len(), world.shard.home.len()), (0, 2));

    world.reload(|config| config.routes = vec![route_to("127.0.0.2:25")]);
    assert_eq!(world.connects.len(), 1, "what is due goes at once, whatever held it there");
    assert_eq!(world.connects[0].1.to_string(), "127.0.0.2:25");
    let (other, said) = world.accept_plain();
    assert!(said.starts_with("MAIL"), "{said}");
    world.take_message(other);
    assert_eq!((world.shard.home.entry(key).due_ms, world.shard.home.entry(key).attempts), (due_ms, 1));
    world.pass(Duration::from_millis(due_ms - world.now.wall_ms - 1));
    world.to_peer.clear();
    assert_eq!(world.shard.home.len(), 1);
    while world.connects.is_empty() && world.to_peer.is_empty() {
        assert!(world.now.wall_ms <= due_ms + 1_000);
        world.pass(Duration::from_millis(1));
    }
    assert_eq!(world.now.wall_ms, due_ms);
    let (third, _) = world.accept_plain();
    world.take_message(third);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates().iter().filter(|fate| **fate == Fate::Delivered).count(), 2);
}

/// From then on what is put off waits as is said now.
#[test]
fn what_is_put_off_waits_as_the_new_configuration_says() {
    let mut world = World::new();
    accepted(&mut world);
    let (peer, _) = world.accept_plain();
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    world.reload(|config| config.retry.schedule = RetrySchedule::Listed(vec![minutes(7), minutes(70)]));
    world.peer_says(peer, "451 later\r\n");
    world.pass(Duration::ZERO);
    let (_, entry) = world.shard.home.entries().next().unwrap();
    assert_eq!((entry.attempts, entry.due_ms), (1, world.now.wall_ms + 7 * 60_000));
}

/// A transaction that is under way comes to its end where it was begun.
#[test]
fn what_is_on_the_wire_ends_as_it_began() {
    let mut world = World::new();
    accepted(&mut world);
    let (peer, _) = world.accept_plain();
    world.reload(|config| config.routes = vec![route_to("127.0.0.2:25")]);
    world.take_message(peer);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.fates(), world.connects.len()), (vec![Fate::Delivered], 0));
}

/// It was begun from an address that its source no longer has.
#[test]
fn a_connection_that_was_on_its_way_carries_nothing_under_another_address() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    accepted(&mut world);
    world.reload(|config| config.egress_sources[0].source_address = Some(std::net::IpAddr::from([127, 0, 0, 99])));
    let (connection, _) = world.connects.remove(0);
    let made =
        Connected { local: "127.0.0.11:5000".parse().ok(), peer: "127.0.0.1:25".parse::<SocketAddr>().unwrap().into() };
    world.shard.connected(world.now, connection, made);
    world.peer_says(connection, "220 peer.example\r\n");
    assert_eq!(world.peer_says(connection, "250 peer.example\r\n"), "QUIT\r\n");
}

#[test]
fn a_source_that_is_removed_sends_nothing_more_and_its_mail_goes_by_the_others() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(2));
    accepted(&mut world);
    accepted(&mut world);
    assert_eq!(world.connect_sources, [0, 1]);
    let (second, _) = world.accept_plain();
    let (first, _) = world.accept_plain();
    // One waits behind each.
    accepted(&mut world);
    accepted(&mut world);
    let begun = world.connect_sources.len();
    world.reload(|config| {
        config.egress_sources.remove(0);
        config.egress_pools[0].sources = vec![(0, 1)];
    });
    assert!(world.shard.config.egress_sources[0].is_retired);
    assert_eq!(world.take_message(first), "QUIT\r\n", "what was on the wire ends, and then the connection");
    let mut said = world.take_message(second);
    for _ in 0..2 {
        assert!(said.starts_with("MAIL"), "{said}");
        said = world.take_message(second);
    }
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates(), [Fate::Delivered; 4]);
    assert!(!world.connect_sources[begun..].contains(&0), "{:?}", world.connect_sources);
}

#[test]
fn a_source_that_is_added_takes_its_share() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    world.reload(|config| {
        let two = config_with_sources(2);
        config.egress_sources = two.egress_sources.into_iter().rev().collect();
        config.egress_pools = two.egress_pools;
    });
    let names: Vec<&str> = world.shard.config.egress_sources.iter().map(|source| source.name.as_str()).collect();
    assert_eq!(names, ["a", "b"], "the known one has its index");
    accepted(&mut world);
    accepted(&mut world);
    world.connect_sources.sort_unstable();
    assert_eq!(world.connect_sources, [0, 1]);
}

#[test]
fn an_address_that_changes_is_used_from_then_on() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(1));
    accepted(&mut world);
    let (peer, _) = world.accept_plain();
    world.take_message(peer);
    assert!(world.closed.is_empty(), "it waits for more");
    let other = Some(std::net::IpAddr::from([127, 0, 0, 99]));
    world.reload(|config| config.egress_sources[0].source_address = other);
    assert_eq!(world.to_peer, "QUIT\r\n");
    accepted(&mut world);
    assert_eq!(world.connects.len(), 1, "by a connection from the other address");
    let is_at = |source: &EgressSource| source.source_address == other;
    assert!(is_at(&world.shard.config.egress_sources[world.connect_sources[1]]));
}

#[test]
fn mail_of_a_tenant_that_is_removed_is_delivered_as_it_was_accepted() {
    let mut config = Config::new("mta.example");
    config.dkim = vec![signer("old")];
    let tenant = |name: &str| Tenant {
        name: name.to_owned(),
        egress_pool: "default".to_owned(),
        domains: vec!["client.example".to_owned()],
        priority: Priority::High,
        max_message_rate: Some(crate::config::Rate { count: 100, period: Duration::from_secs(1), max_burst: 1 }),
        max_injection_rate: None,
        retry: RetryRules::default(),
    };
    config.tenants = vec![tenant("acme")];
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    // A short period begins as if it had been used up.
    world.settle();
    world.pass(Duration::from_secs(2));
    accepted(&mut world);
    let (peer, _) = world.accept_plain();
    world.peer_says(peer, "451 later\r\n");
    world.pass(Duration::from_secs(1));
    world.reload(|config| {
        config.tenants.clear();
        config.dkim.clear();
    });
    let (key, entry) = world.shard.home.entries().next().unwrap();
    assert_eq!(&*world.shard.home.queue_of(key).tenant, "acme");
    let wait = entry.due_ms - world.now.wall_ms;
    world.shard.connection_closed(world.now, peer, "reset");
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_millis(wait));
    let (peer, said) = world.accept_plain();
    assert!(said.starts_with("MAIL"), "{said}");
    for _ in 0..2 {
        world.peer_says(peer, "250 ok\r\n");
    }
    let content = world.peer_says(peer, "354 go\r\n");
    assert_eq!(content.matches("s=old;").count(), 1, "{content}");
    world.peer_says(peer, "250 taken\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates().last(), Some(&Fate::Delivered));
}

/// A transaction of a client ends under the policy that it began under; the session's next one does not.
#[test]
fn a_key_that_changes_signs_what_begins_from_then_on() {
    let mut config = Config::new("mta.example");
    config.dkim = vec![signer("old")];
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.reload(|config| config.dkim = vec![signer("new")]);
    world.client_says(session, CONTENT);
    world.sync();
    let envelope = CLIENT.split_once("\r\n").unwrap().1;
    world.client_says(session, envelope);
    world.client_says(session, CONTENT);
    world.sync();
    assert_eq!(world.shard.metrics.signatures_ed25519.get(), 2, "each is counted");
    let (peer, _) = world.accept_plain();
    let mut contents = Vec::new();
    for _ in 0..2 {
        for _ in 0..2 {
            world.peer_says(peer, "250 ok\r\n");
        }
        contents.push(world.peer_says(peer, "354 go\r\n"));
        let said = world.peer_says(peer, "250 taken\r\n");
        if said.starts_with("RSET") {
            world.peer_says(peer, "250 ok\r\n");
        }
    }
    let selectors = |content: &String| ["s=old;", "s=new;"].map(|selector| content.matches(selector).count());
    assert_eq!(contents.iter().map(selectors).collect::<Vec<_>>(), [[1, 0], [0, 1]]);
}

/// Connections that a lower limit does not let be end, the idle ones at once.
#[test]
fn a_lower_connection_limit_ends_what_is_too_much() {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 3;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for _ in 0..3 {
        accepted(&mut world);
    }
    let peers: Vec<ConnectionKey> = (0..3).map(|_| world.accept_plain().0).collect();
    world.take_message(peers[0]);
    assert!(world.closed.is_empty());
    world.reload(|config| config.shaping.connection_limit = 1);
    assert_eq!(world.to_peer, "QUIT\r\n", "the idle one");
    assert_eq!(world.take_message(peers[1]), "QUIT\r\n");
    assert_eq!(world.take_message(peers[2]), "", "one may stay");
    accepted(&mut world);
    assert!(world.to_peer.contains("MAIL FROM:") && world.connects.is_empty());
}

/// What a queue's mail takes is decided by the routes that there are now.
#[test]
fn a_route_of_a_campaign_is_taken_once_it_is_there() {
    let mut world = World::new();
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.client_says(session, &format!("X-Campaign: spring\r\n{CONTENT}"));
    world.sync();
    let (peer, _) = world.accept_plain();
    world.peer_says(peer, "451 later\r\n");
    world.pass(Duration::from_secs(1));
    world.shard.connection_closed(world.now, peer, "reset");
    world.shard.connection_gone(world.now, peer);
    let campaign = Some(crate::config::Wildcard::new("spring"));
    let matches = Some(crate::config::RouteMatch { campaign, ..Default::default() });
    world.reload(|config| config.routes.insert(0, Route { matches, ..route_to("127.0.0.3:25") }));
    let due_ms = world.shard.home.entries().next().unwrap().1.due_ms;
    world.pass(Duration::from_millis(due_ms - world.now.wall_ms));
    assert_eq!(world.connects[0].1.to_string(), "127.0.0.3:25");
}
