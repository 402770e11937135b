//! Routes by tenant, campaign and sender: the first that fits, also for what waits over a restart.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use postrider::Config;
use postrider::config::{DomainPattern, Priority, RetryRules, Route, RouteMatch, RouteTarget, Tenant, Wildcard};

use crate::support::embedded::{Running, config};
use crate::support::poll;
use crate::support::sink::Sink;

const MAIL: [(&str, &str); 6] = [
    ("x@news.acme.test", "Subject: by sender\r\n\r\n"),
    ("X@NEWS.acme.test", "X-Campaign: winter-1\r\nSubject: by sender, too\r\n\r\n"),
    ("x@acme.test", "X-Campaign: Winter-2\r\nSubject: by campaign\r\n\r\n"),
    ("x@acme.test", "Subject: by tenant\r\n\r\n"),
    ("x@zeta.test", "Subject: another tenant's\r\n\r\n"),
    ("", "X-Tenant: zeta\r\nSubject: of nobody\r\n\r\n"),
];

struct Sinks {
    sinks: [Sink; 4],
}

impl Sinks {
    /// The routes in this order; the last sink is everybody's.
    fn config(addresses: [SocketAddr; 4], order: [usize; 4], directory: &Path) -> Config {
        let mut config = config(directory);
        let tenant = |name: &str| Tenant {
            name: name.to_owned(),
            egress_pool: "default".to_owned(),
            domains: vec![format!("{name}.test")],
            priority: Priority::Normal,
            retry: RetryRules::default(),
            max_message_rate: None,
            max_injection_rate: None,
        };
        config.tenants = vec![tenant("acme"), tenant("zeta")];
        let matches = [
            Some(RouteMatch { sender: Some(Wildcard::new("*@news.acme.test")), ..RouteMatch::default() }),
            Some(RouteMatch { campaign: Some(Wildcard::new("winter-*")), ..RouteMatch::default() }),
            Some(RouteMatch { tenant: Some("acme".to_owned()), ..RouteMatch::default() }),
            None,
        ];
        let route = |place: usize| {
            let to = vec![RouteTarget::Address(addresses[place])];
            Route { matches: matches[place].clone(), ..Route::new(DomainPattern::Any, to) }
        };
        config.routes = order.map(route).to_vec();
        config
    }

    /// Which sink each message came to.
    fn take(self) -> BTreeMap<String, usize> {
        let mut came = BTreeMap::new();
        poll("all mail", || {
            for (place, sink) in self.sinks.iter().enumerate() {
                for delivered in sink.taken_so_far() {
                    let text = String::from_utf8(delivered.content).unwrap();
                    let subject = text.lines().find_map(|line| line.strip_prefix("Subject: ")).unwrap().to_owned();
                    assert!(came.insert(subject, place).is_none(), "{text}");
                }
            }
            (came.len() == MAIL.len()).then_some(())
        });
        came
    }
}

fn inject(running: &Running) {
    for (sender, content) in MAIL {
        running.try_inject(sender, &["a@peer.test"], content.as_bytes()).unwrap();
    }
}

fn came<const N: usize>(mail: [(&str, usize); N]) -> BTreeMap<String, usize> {
    mail.into_iter().map(|(subject, sink)| (subject.to_owned(), sink)).collect()
}

fn by_sender_first() -> BTreeMap<String, usize> {
    came([
        ("by sender", 0),
        ("by sender, too", 0),
        ("by campaign", 1),
        ("by tenant", 2),
        ("another tenant's", 3),
        ("of nobody", 3),
    ])
}

#[test]
fn the_first_route_that_fits_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let sinks = Sinks { sinks: std::array::from_fn(|_| Sink::start()) };
    let addresses = std::array::from_fn(|place| sinks.sinks[place].address());
    let running = Running::start(Sinks::config(addresses, [0, 1, 2, 3], directory.path()));
    inject(&running);
    assert_eq!(sinks.take(), by_sender_first());
    running.shutdown();
}

/// Mail waits, because nobody listens, over a restart with the same routes or others, on more shards or fewer.
#[test]
fn mail_that_waits_goes_by_the_routes_of_the_new_start() {
    let orders: [([usize; 4], BTreeMap<String, usize>); 3] = [
        ([0, 1, 2, 3], by_sender_first()),
        (
            [2, 1, 0, 3],
            came([
                ("by sender", 2),
                ("by sender, too", 2),
                ("by campaign", 2),
                ("by tenant", 2),
                ("another tenant's", 3),
                ("of nobody", 3),
            ]),
        ),
        (
            [1, 0, 2, 3],
            came([
                ("by sender", 0),
                ("by sender, too", 1),
                ("by campaign", 1),
                ("by tenant", 2),
                ("another tenant's", 3),
                ("of nobody", 3),
            ]),
        ),
    ];
    for (shards, (order, expected)) in [3, 1, 2].into_iter().zip(orders) {
        let directory = tempfile::tempdir().unwrap();
        let addresses = {
            let sinks: [Sink; 4] = std::array::from_fn(|_| Sink::start());
            std::array::from_fn(|place| sinks[place].address())
        };
        let running = Running::start(Sinks::config(addresses, [0, 1, 2, 3], directory.path()));
        inject(&running);
        assert_eq!(running.rows().len(), MAIL.len());
        running.shutdown();
        let sinks = Sinks { sinks: addresses.map(Sink::start_at) };
        let mut config = Sinks::config(addresses, order, directory.path());
        config.shards = Some(shards);
        let running = Running::start(config);
        assert_eq!(sinks.take(), expected, "{order:?}");
        running.shutdown();
    }
}
