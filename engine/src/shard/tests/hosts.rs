//! Which of a site's hosts gets a message: what one lacks another may have, and trouble sends its retry to another.

use super::*;

/// A route to two hosts, the first preferred.
fn config() -> Config {
    let to = ["127.0.0.1:25", "127.0.0.2:25"].map(|to| RouteTarget::Address(to.parse().unwrap())).to_vec();
    let mut config = Config::new("mta.example");
    config.routes = vec![Route { tls: Some(TlsMode::Disabled), ..Route::new(DomainPattern::Any, to) }];
    config
}

/// RFC 6152 §3: what one host lacks another may have. Only when all have said so it bounces, and no attempt is counted
/// for those that were asked before.
#[test]
fn what_a_host_lacks_is_looked_for_at_the_others() {
    let run = |second: &str| {
        let mut world = World::open(TempDir::new().unwrap(), START, config());
        let session = world.connect_client();
        world.client_says(session, CLIENT);
        world.client_says(session, "Subject: x\r\n\r\nH\u{e9}llo\r\n.\r\n");
        world.sync();
        assert_eq!(world.connects[0].1.to_string(), "127.0.0.1:25");
        let first = world.accept_connection();
        assert_eq!(world.peer_says(first, "250 peer.example\r\n"), "", "it is kept for other mail");
        assert_eq!(world.connects[0].1.to_string(), "127.0.0.2:25");
        let peer = world.accept_connection();
        let said = world.peer_says(peer, second);
        world.pass(Duration::from_secs(1));
        (world, peer, said)
    };
    let (mut world, peer, said) = run("250-peer.example\r\n250 8BITMIME\r\n");
    assert_eq!(said, "MAIL FROM:<a@client.example> BODY=8BITMIME\r\n");
    world.peer_says(peer, "451 not now\r\n");
    world.pass(Duration::from_secs(1));
    assert!(matches!(world.fates()[..], [Fate::Deferred { .. }]));
    assert_eq!(world.shard.home.entries().next().expect("it waits").1.attempts, 1, "only where MAIL was said");
    accepted(&mut world);
    assert_eq!(world.connects.len(), 0, "plain mail goes by either");

    let (world, _, said) = run("250 peer.example\r\n");
    assert_eq!((said.as_str(), world.connects.len()), ("", 0));
    assert_eq!(world.fates(), [Fate::Bounced]);
}

/// RFC 5321 §5.1: what a host put off for its own sake goes to another one next time, though the connection to the
/// first is still there; what it has said of the message alone it is asked again.
#[test]
fn a_retry_goes_to_another_host_where_the_first_had_trouble() {
    for (answer, next) in [("452 4.3.1 no room", 2), ("451 4.7.1 greylisted", 1)] {
        let mut config = config();
        config.shaping.idle_timeout = Duration::from_secs(86_400);
        let mut world = World::open(TempDir::new().unwrap(), START, config);
        accepted(&mut world);
        assert_eq!(world.connects[0].1.to_string(), "127.0.0.1:25");
        let first = world.accept_connection();
        assert!(world.peer_says(first, "250 peer.example\r\n").starts_with("MAIL FROM"));
        world.peer_says(first, &format!("{answer}\r\n"));
        world.pass(Duration::from_secs(1));
        assert!(matches!(world.fates()[..], [Fate::Deferred { .. }]));
        accepted(&mut world);
        assert_eq!(world.to_peer, "RSET\r\n", "first attempts go to the preferred one");
        assert!(world.peer_says(first, "250 ok\r\n").starts_with("MAIL FROM"));
        assert_eq!(world.peer_says(first, "550 5.7.1 no\r\n"), "", "which takes none");
        world.to_peer.clear();
        world.pass(Duration::from_secs(7_200));
        let connects: Vec<String> = world.connects.iter().map(|(_, to)| to.to_string()).collect();
        match next {
            2 => assert_eq!((connects, world.to_peer.as_str()), (vec!["127.0.0.2:25".to_owned()], ""), "{answer}"),
            _ => {
                assert_eq!((connects, world.to_peer.as_str()), (vec![], "RSET\r\n"), "{answer}");
                continue;
            }
        }
        let second = world.accept_connection();
        assert!(world.peer_says(second, "250 peer.example\r\n").starts_with("MAIL FROM"));
        world.peer_says(second, "450 4.7.1 the first host is up\r\n");
        world.shard.connection_closed(world.now, second, "closed by the peer");
        world.shard.connection_gone(world.now, second);
        world.pass(Duration::from_secs(1));
        world.pass(Duration::from_secs(7_200));
        assert_eq!(world.to_peer, "RSET\r\n");
        assert!(world.peer_says(first, "250 ok\r\n").starts_with("MAIL FROM"), "the first is asked again");
    }
}

/// Those that may have it can't be reached: that is no reason to bounce.
#[test]
fn a_host_that_backs_off_may_have_what_another_lacks() {
    let mut world = World::open(TempDir::new().unwrap(), START, config());
    accepted(&mut world);
    let refuse = |world: &mut World, to: &str| {
        let (connection, address) = world.connects.pop().expect("a connection is wanted");
        assert_eq!(address.to_string(), to);
        let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
        world.shard.connect_failed(world.now, connection, &refused);
        world.settle();
    };
    refuse(&mut world, "127.0.0.1:25");
    let second = world.accept_connection();
    world.peer_says(second, "250 peer.example\r\n");
    world.peer_says(second, "450 no\r\n");
    world.pass(Duration::from_secs(1));
    // Of the second it is known what that host lacks: nobody else waits with it for the first host's time.
    for deferred in [2, 3] {
        let session = world.connect_client();
        world.client_says(session, CLIENT);
        world.client_says(session, "Subject: x\r\n\r\nH\u{e9}llo\r\n.\r\n");
        world.sync();
        world.pass(Duration::from_secs(1));
        let fates = world.fates();
        assert!(fates.len() == deferred && fates.iter().all(|fate| matches!(fate, Fate::Deferred { .. })), "{fates:?}");
    }
    let held = world.shard.home.entries().filter_map(|(_, entry)| entry.last_answer).collect::<Vec<_>>();
    assert_eq!(held.iter().filter(|answer| answer.starts_with("451 4.6.3 ")).count(), 2, "{held:?}");
    world.to_peer.clear();
    accepted(&mut world);
    assert_eq!((world.to_peer.as_str(), world.connects.len()), ("RSET\r\n", 0), "plain mail goes");
}

/// One domain's policy names only the host that is down: its mail waits, and that of another domain, behind it in line,
/// goes to the other host. RFC 8461 §5.1.
#[test]
fn a_policy_that_leaves_no_host_holds_its_own_domain_alone() {
    use crate::deliver::mta_sts::StsPolicy;
    let mut config = config();
    let to = config.routes.remove(0).to;
    config.routes = ["strict.example", "peer.example"]
        .map(|domain| Route {
            tls: Some(TlsMode::Opportunistic),
            ..Route::new(DomainPattern::Exact(domain.into()), to.clone())
        })
        .to_vec();
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    // Both are looked up, and the test answers.
    world.shard.config = Arc::new(Config::new("mta.example"));
    world.shard.routes = super::super::RouteCache::new(Arc::new(super::super::StaticRoutes::new(&[])));
    let host = |place: u16| Host {
        name: format!("mx{place}.example"),
        preference: place,
        addresses: vec![Endpoint::Ip(format!("192.0.2.{place}:25").parse().unwrap())],
        dane: HostDane::default(),
    };
    let site = Arc::new(Site { name: "mx.example".to_owned(), hosts: vec![host(1), host(2)], expires: Duration::MAX });
    let policy = StsPolicy::parse("version: STSv1\nmode: enforce\nmax_age: 604800\nmx: mx1.example\n").unwrap();
    let sts = Some(Arc::new(policy));
    for (domain, sts) in [("strict.example", sts), ("peer.example", None)] {
        accepted_for(&mut world, domain);
        let route = handover::Route {
            site: site.clone(),
            tls: TlsMode::Opportunistic,
            terms: Arc::default(),
            sts,
            dane: false,
        };
        let key = RouteKey::of_domain(domain);
        world.shard.handle_message(ShardMessage::Routed { key, result: Ok(route) });
        world.sync();
        let (connection, to) = world.connects.pop().expect("a connection is wanted");
        if domain == "strict.example" {
            assert_eq!(to.to_string(), "192.0.2.1:25");
            let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
            world.shard.connect_failed(world.now, connection, &refused);
            world.settle();
            assert_eq!(world.connects, [], "the policy does not name the other");
        } else {
            assert_eq!(to.to_string(), "192.0.2.2:25");
        }
    }
    assert_eq!(world.fates(), [], "no attempt was made");
    let blocked = world.shard.home.entries().filter_map(|(key, _)| world.shard.home.blocked_by(key)).count();
    assert_eq!(blocked, 1);
}

/// [retry] may wait for hours; a host that was down is looked for sooner.
#[test]
fn a_host_is_left_alone_for_minutes_at_most() {
    use crate::limits::{HOST_BACK_OFF_FIRST_MAX, HOST_BACK_OFF_MAX};
    let mut config = Config::new("mta.example");
    let hours = |hours: u64| Duration::from_secs(3_600 * hours);
    for schedule in [
        crate::config::RetrySchedule::Doubling { first: hours(1), max: hours(8) },
        crate::config::RetrySchedule::Listed(vec![hours(1), hours(8)]),
    ] {
        config.retry.schedule = schedule;
        let back_off = crate::shard::orders::pool_options(&config, 1, Arc::default()).back_off;
        assert_eq!((back_off.first, back_off.max), (HOST_BACK_OFF_FIRST_MAX, HOST_BACK_OFF_MAX));
    }
}

/// A connection is opened for the third message, whose domain asks for less than that of the two before it: it takes
/// this message, with the next one riding, and not those that it is not good enough for.
#[test]
fn a_connection_takes_what_stands_behind_others_that_it_does_not_fit() {
    let mut config = config();
    config.shaping.connection_limit = 3;
    let to = config.routes[0].to.clone();
    let strict = Route::new(DomainPattern::Exact("strict.example".into()), to);
    config.routes.insert(0, Route { tls: Some(TlsMode::Required), ..strict });
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for domain in ["strict.example", "strict.example", "peer.example", "strict.example", "peer.example"] {
        accepted_for(&mut world, domain);
    }
    assert_eq!(world.connects.len(), 3);
    let third = world.accept_connection();
    let envelope = "MAIL FROM:<a@client.example>\r\nRCPT TO:<b@peer.example>\r\nDATA\r\n";
    assert_eq!(world.peer_says(third, "250-peer.example\r\n250 PIPELINING\r\n"), envelope);
    let said = world.peer_says(third, "250 ok\r\n250 ok\r\n354 go\r\n");
    assert!(said.ends_with(&format!("\r\n.\r\nRSET\r\n{envelope}")), "{said}");
}

/// Both connections that there may be to a site, each with a MAIL under way, in the order in which they were opened.
/// Mail for other.example may go by neither.
fn two_connections() -> (World, [ConnectionKey; 2]) {
    let mut config = config();
    config.shaping.connection_limit = 2;
    let to = config.routes[0].to.clone();
    config.routes.insert(0, Route::new(DomainPattern::Exact("other.example".into()), to));
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    (0..2).for_each(|_| accepted(&mut world));
    let [second, first] = [(); 2].map(|()| world.accept_connection());
    for peer in [first, second] {
        assert!(world.peer_says(peer, "250 peer.example\r\n").starts_with("MAIL FROM"));
    }
    world.to_peer.clear();
    (world, [first, second])
}

/// Neither is any good for it: the idle one makes room, though the other is busy.
#[test]
fn an_idle_connection_makes_room_for_what_fits_none() {
    let (mut world, [_, second]) = two_connections();
    accepted_for(&mut world, "other.example");
    assert_eq!((world.to_peer.as_str(), world.connects.len()), ("", 0));
    assert_eq!(world.peer_says(second, "550 5.7.1 no\r\n"), "QUIT\r\n");
    world.shard.connection_gone(world.now, second);
    world.settle();
    let third = world.accept_connection();
    assert!(world.peer_says(third, "250 peer.example\r\n").starts_with("MAIL FROM"));
}

/// Nothing is under way, and both are idle: one makes room, and the other stays while that one is closing.
#[test]
fn one_idle_connection_makes_room_at_a_time() {
    let (mut world, peers) = two_connections();
    for peer in peers {
        assert_eq!(world.peer_says(peer, "550 5.7.1 no\r\n"), "");
    }
    (0..2).for_each(|_| accepted_for(&mut world, "other.example"));
    assert_eq!((world.to_peer.as_str(), world.connects.len()), ("QUIT\r\n", 0));
}

/// The same where the host's TLS has just failed: it waits, and says why, instead of waiting for the idle one's end.
#[test]
fn what_fits_no_connection_and_has_no_host_says_so() {
    let mut config = config();
    config.shaping.connection_limit = 1;
    let to = config.routes[0].to[..1].to_vec();
    config.routes[0].to = to.clone();
    for domain in ["strict.example", "too.example"] {
        let strict = Route::new(DomainPattern::Exact(domain.into()), to.clone());
        config.routes.insert(0, Route { tls: Some(TlsMode::Required), ..strict });
    }
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    accepted_for(&mut world, "strict.example");
    let first = world.accept_connection();
    world.peer_says(first, "250 peer.example\r\n");
    world.shard.connection_gone(world.now, first);
    world.settle();
    assert_eq!(world.connects.len(), 0, "it has no TLS");
    accepted(&mut world);
    let second = world.accept_connection();
    assert!(world.peer_says(second, "250 peer.example\r\n").starts_with("MAIL FROM"));
    assert_eq!(world.peer_says(second, "550 5.7.1 no\r\n"), "");
    accepted_for(&mut world, "too.example");
    world.shard.connection_gone(world.now, second);
    world.settle();
    let keys: Vec<_> = world.shard.home.entries().map(|(key, _)| key).collect();
    let told = keys.iter().filter_map(|key| world.shard.home.blocked_by(*key)).count();
    assert_eq!((keys.len(), told, world.connects.len()), (2, 2, 0));
}
