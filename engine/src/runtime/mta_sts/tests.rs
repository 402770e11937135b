//! Tests of MTA-STS policies against a name server and an HTTPS server on loopback.

use super::super::dns::dns_server::{DnsServer, Entry};
use super::policy_server::PolicyServer;
use super::*;
use crate::config::{DnsConfig, TlsConfig};
use crate::deliver::mta_sts::StsMode;

const ENFORCE: &str = "mode: enforce\nmx: mx.d.test\nmax_age: 600000\n";
const ANNOUNCED: [(&str, Entry); 2] =
    [("_mta-sts.d.test", Entry::Txt("v=STSv1; id=1;")), ("mta-sts.d.test", Entry::A([127, 0, 0, 1]))];

struct World {
    dns: DnsServer,
    web: PolicyServer,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self::with_certificate_for("mta-sts.d.test")
    }

    fn with_certificate_for(name: &str) -> Self {
        let web = PolicyServer::try_start_at("127.0.0.1:0".parse().unwrap(), &[name]).unwrap();
        web.policy(ENFORCE);
        Self { dns: DnsServer::start(&ANNOUNCED), web, directory: tempfile::tempdir().unwrap() }
    }

    /// As at a start.
    fn open(&self) -> PolicyStore {
        self.open_prohibiting(&[])
    }

    fn open_prohibiting(&self, networks: &[&str]) -> PolicyStore {
        let prohibited_hosts = networks.iter().map(|network| network.parse().unwrap()).collect();
        let dns = DnsConfig { servers: vec![self.dns.address()], prohibited_hosts, ..DnsConfig::default() };
        let resolver = Resolver::new(&dns, false, Vec::new()).unwrap();
        let roots = TlsConfig { extra_roots_pem: Arc::new(self.web.certificate_pem().into()) };
        let verifier = TlsVerifier::public_roots(&roots).unwrap();
        let directory = self.directory.path().join("mta-sts");
        let port = self.web.address().port();
        PolicyStore::open_with_port(directory, Clock::start(), resolver, &verifier, port).unwrap()
    }

    fn announce(&self, record: &'static str) {
        self.dns.set_zone(&[("_mta-sts.d.test", Entry::Txt(record)), ANNOUNCED[1]]);
    }
}

fn on_control<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn mode(store: &PolicyStore) -> Option<StsMode> {
    on_control(store.find("d.test")).0.map(|policy| policy.mode)
}

/// RFC 8461 §3.3.
#[test]
fn an_announced_policy_is_fetched_once() {
    let world = World::new();
    let store = world.open();
    for _ in 0..3 {
        let (policy, expires) = on_control(store.find("D.test."));
        assert!(policy.unwrap().names("mx.d.test"));
        assert!(expires < Duration::from_secs(100), "asked again when the announcement's TTL is over: {expires:?}");
    }
    let request = "GET /.well-known/mta-sts.txt HTTP/1.1 host: mta-sts.d.test";
    assert_eq!(world.web.requests(), [request]);
    assert_eq!(mode(&store), Some(StsMode::Enforce));
    assert!(on_control(store.find("[192.0.2.1]")).0.is_none() && on_control(store.find("../d.test")).0.is_none());
}

/// RFC 8461 §5.1: neither the DNS nor the policy's server can take away a policy that is in force.
#[test]
fn a_policy_in_force_survives_restarts_and_failures() {
    let world = World::new();
    assert_eq!(mode(&world.open()), Some(StsMode::Enforce));
    world.web.answer("500 Down", "text/plain", "");
    assert_eq!(mode(&world.open()), Some(StsMode::Enforce));
    world.announce("v=STSv1; id=2;");
    assert_eq!(mode(&world.open()), Some(StsMode::Enforce), "the new one can't be had");
    assert_eq!(world.web.requests().len(), 2);
    world.dns.set_zone(&[]);
    assert_eq!(mode(&world.open()), Some(StsMode::Enforce), "not announced any more");
    world.dns.set_zone(&[("_mta-sts.d.test", Entry::ServFail)]);
    assert_eq!(mode(&world.open()), Some(StsMode::Enforce), "nobody can say");
    world.announce("v=STSv1; id=3;");
    world.web.policy("mode: none\nmax_age: 600000\n");
    assert_eq!(mode(&world.open()), Some(StsMode::None), "a new id brings a new policy");
    assert_eq!(mode(&world.open()), Some(StsMode::None));
    assert_eq!(world.web.requests().len(), 3);
}

#[test]
fn a_policy_ends_with_its_max_age() {
    let world = World::new();
    assert_eq!(mode(&world.open()), Some(StsMode::Enforce));
    let file = world.directory.path().join("mta-sts/d.test");
    let text = fs::read_to_string(&file).unwrap();
    let fetched = text.lines().nth(1).unwrap();
    world.web.answer("500 Down", "text/plain", "");
    let aged = |milliseconds: u64| {
        let earlier = (fetched.parse::<u64>().unwrap() - milliseconds).to_string();
        fs::write(&file, text.replacen(fetched, &earlier, 1)).unwrap();
        mode(&world.open())
    };
    assert_eq!(aged(599_000_000), Some(StsMode::Enforce));
    assert_eq!(aged(600_000_000), None);
    assert!(!file.exists(), "and is removed");
}

/// RFC 8461 §3.3: it is refreshed long before it ends, while mail goes on under it.
#[test]
fn an_old_policy_is_fetched_anew() {
    let world = World::new();
    assert_eq!(mode(&world.open()), Some(StsMode::Enforce));
    let file = world.directory.path().join("mta-sts/d.test");
    let text = fs::read_to_string(&file).unwrap();
    let fetched = text.lines().nth(1).unwrap();
    let earlier = (fetched.parse::<u64>().unwrap() - STS_REFRESH_AGE.as_millis() as u64).to_string();
    fs::write(&file, text.replacen(fetched, &earlier, 1)).unwrap();
    world.web.policy("mode: testing\nmx: mx.d.test\nmax_age: 600000\n");
    let store = world.open();
    let refreshed = on_control(async {
        assert_eq!(store.find("d.test").await.0.map(|policy| policy.mode), Some(StsMode::Enforce));
        loop {
            // The refresh runs beside; the test's own deadline is the suite's.
            tokio::task::yield_now().await;
            match store.find("d.test").await.0.map(|policy| policy.mode) {
                Some(StsMode::Enforce) => tokio::time::sleep(Duration::from_millis(1)).await,
                refreshed => break refreshed,
            }
        }
    });
    assert_eq!((refreshed, world.web.requests().len()), (Some(StsMode::Testing), 2));
}

/// However many find the same policy too old, the first fetches another for all.
#[test]
fn an_old_policy_is_fetched_anew_once() {
    let world = World::new();
    let store = world.open();
    assert_eq!(mode(&store), Some(StsMode::Enforce));
    let old_ms = store.kept("d.test").unwrap().fetched_ms;
    {
        // As if it had been fetched a second before.
        let mut state = store.state();
        state.policies.get_mut("d.test").unwrap().fetched_ms = old_ms - 1_000;
    }
    let fetched = on_control(async {
        let mut fetches = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let store = store.clone();
            fetches.spawn(async move { store.fetch("d.test", "1".to_owned(), Some(old_ms - 1_000)).await });
        }
        fetches.join_all().await
    });
    assert!(fetched.iter().all(Option::is_some), "all have it");
    assert_eq!(world.web.requests().len(), 2, "the first fetch, and one refresh");
    assert!(store.state().gates.is_empty());
}

#[test]
fn what_is_not_a_policy_is_not_followed() {
    let world = World::new();
    let bodies = [
        ("404 Not Found", "text/plain", "version: STSv1\nmode: enforce\nmx: a.b\nmax_age: 9".to_owned()),
        ("301 Moved\r\nLocation: https://mta-sts.d.test/", "text/plain", String::new()),
        ("200 OK", "text/html", "version: STSv1\nmode: enforce\nmx: a.b\nmax_age: 9".to_owned()),
        ("200 OK", "text/plain", "<html>".to_owned()),
        ("200 OK", "text/plain", format!("version: STSv1\nmode: none\nmax_age: 9\n{}", "x: y\n".repeat(20_000))),
    ];
    for (status, kind, body) in bodies {
        world.web.answer(status, kind, &body);
        assert_eq!(mode(&world.open()), None, "{status} {kind}");
    }
    assert_eq!(world.web.requests().len(), 5);
    world.web.policy(ENFORCE);
    assert_eq!(mode(&world.open_prohibiting(&["127.0.0.0/8"])), None, "it is nowhere where mail may go");
    assert_eq!(world.web.requests().len(), 5);
    assert_eq!(mode(&world.open()), Some(StsMode::Enforce));
}

/// RFC 8461 §3.3: the certificate is for the policy host's own name.
#[test]
fn a_policy_server_must_prove_its_name() {
    let world = World::with_certificate_for("d.test");
    assert_eq!(mode(&world.open()), None);
    assert!(world.web.requests().is_empty());
}

/// After a failure there is a pause; and who asks meanwhile waits for the fetch that is under way.
#[test]
fn fetches_are_few() {
    let world = World::new();
    world.web.answer("500 Down", "text/plain", "");
    let store = world.open();
    assert_eq!((mode(&store), mode(&store)), (None, None));
    assert_eq!(world.web.requests().len(), 1);
    world.web.policy(ENFORCE);
    let store = world.open();
    let both = on_control(async { tokio::join!(store.find("d.test"), store.find("d.test")) });
    assert!(both.0.0.is_some() && both.1.0.is_some());
    assert_eq!(world.web.requests().len(), 2);
    assert!(store.state().gates.is_empty());
}
