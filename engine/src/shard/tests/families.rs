//! A source's address decides which of a site's addresses it connects to; what it can't reach another of its pool does.

use super::moving::config_with_sources;
use super::*;

const FOUR: &str = "192.0.2.1:25";
const SIX: &str = "[2001:db8::1]:25";

/// Sources with these addresses; the test answers for the route.
fn world(addresses: &[Option<&str>]) -> World {
    let mut config = config_with_sources(addresses.len() as u8);
    for (source, address) in config.egress_sources.iter_mut().zip(addresses) {
        source.source_address = address.map(|address| address.parse().unwrap());
    }
    let mut world = World::open(TempDir::new().unwrap(), START, config.clone());
    world.shard.config = Arc::new(config);
    world.shard.routes = super::super::RouteCache::new(Arc::new(super::super::StaticRoutes::new(&[])));
    world
}

fn route(world: &mut World, hosts: &[&[&str]]) {
    let host = |(place, addresses): (usize, &&[&str])| Host {
        name: format!("mx{place}.example"),
        preference: place as u16,
        addresses: addresses.iter().map(|address| Endpoint::Ip(address.parse().unwrap())).collect(),
        dane: HostDane::default(),
    };
    let hosts: Vec<Host> = hosts.iter().enumerate().map(host).collect();
    let site = Arc::new(Site { name: "mx.example".to_owned(), hosts, expires: Duration::MAX });
    let result = Ok(handover::Route { site, tls: TlsMode::Disabled, terms: Arc::default(), sts: None, dane: false });
    world.shard.handle_message(ShardMessage::Routed { key: RouteKey::of_domain("peer.example"), result });
    world.sync();
}

/// Who connected, and to where.
fn connected(world: &World) -> Vec<(usize, String)> {
    let to = world.connects.iter().map(|(_, to)| to.to_string());
    let mut connected: Vec<_> = world.connect_sources.iter().copied().zip(to).collect();
    connected.sort();
    connected
}

#[test]
fn a_bound_source_connects_within_its_family() {
    let mut world = world(&[Some("192.0.2.99"), Some("2001:db8::99"), None]);
    for _ in 0..6 {
        accepted(&mut world);
    }
    route(&mut world, &[&[FOUR, SIX]]);
    let connected = connected(&world);
    assert_eq!(connected.len(), 6);
    for (source, to) in connected {
        assert!(source == 2 || to == [FOUR, SIX][source], "source {source} to {to}");
    }
}

/// What one source can't reach goes by the others of its pool.
#[test]
fn a_source_that_reaches_no_host_leaves_the_site_to_the_others() {
    for (site, expected) in [(SIX, 1), (FOUR, 0)] {
        let mut world = world(&[Some("192.0.2.99"), Some("2001:db8::99")]);
        for _ in 0..4 {
            accepted(&mut world);
        }
        route(&mut world, &[&[site]]);
        assert_eq!(connected(&world), vec![(expected, site.to_owned()); 4]);
    }
}

/// A host of the other family is passed over, though it is preferred.
#[test]
fn a_source_takes_the_first_host_that_it_reaches() {
    let mut world = world(&[Some("192.0.2.99")]);
    accepted(&mut world);
    route(&mut world, &[&[SIX], &[FOUR]]);
    assert_eq!(connected(&world), [(0, FOUR.to_owned())]);
}

#[test]
fn with_no_source_of_the_family_mail_waits_and_says_why_to_its_end() {
    let mut world = world(&[Some("192.0.2.99"), Some("192.0.2.98")]);
    accepted(&mut world);
    route(&mut world, &[&[SIX]]);
    let reason = "no source of pool default can connect to mx.example, which has IPv6 addresses only";
    let blocked = |world: &World| {
        let (key, _) = world.shard.home.entries().next().expect("it waits");
        world.shard.home.blocked_by(key).expect("it is blocked").reason.to_string()
    };
    assert_eq!(blocked(&world), reason);
    world.pass(Duration::from_secs(86_400));
    assert_eq!((blocked(&world).as_str(), world.connects.len()), (reason, 0));
    world.pass(Duration::from_secs(30 * 86_400));
    // Outcomes ride with the next commit, a little later.
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates(), [Fate::Expired]);
    let ends = world.events.iter().filter_map(|event| match &event.record {
        Logged::Outcome(outcome) => Some(outcome.results[0].answer.text.clone()),
        _ => None,
    });
    assert_eq!(ends.collect::<Vec<_>>(), [format!("Message expired; last answer: {reason}")]);
}

/// RFC 6152 §3: who can't be reached by this source has nothing to say about what the message needs.
#[test]
fn a_host_out_of_reach_may_not_have_what_another_lacks() {
    let mut world = world(&[Some("192.0.2.99")]);
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.client_says(session, "Subject: x\r\n\r\nH\u{e9}llo\r\n.\r\n");
    world.sync();
    route(&mut world, &[&[FOUR], &[SIX]]);
    let peer = world.accept_connection();
    assert_eq!(world.peer_says(peer, "250 peer.example\r\n"), "");
    world.pass(Duration::from_secs(1));
    assert_eq!((world.fates(), world.connects.len()), (vec![Fate::Bounced], 0));
}
