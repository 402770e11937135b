//! A source that a peer refuses is suspended there: its mail goes by the pool's other source, also after a restart, and
//! comes back when the suspension ends.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use postrider::SuspendError;
use postrider::admin::{MessageFilter, SuspensionEnd, SuspensionRow};
use postrider::config::{Config, EgressPool, EgressSource, Tenant};
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, block_on, to_sink};
use crate::support::message;
use crate::support::sink::{Answer, Sink, Verb};

pub(super) fn two_sources(directory: &Path, sink: SocketAddr) -> Config {
    let mut config = to_sink(directory, sink);
    let source = |(name, last): (&str, u8)| EgressSource {
        name: name.to_owned(),
        source_address: Some(IpAddr::from([127, 0, 0, last])),
        ehlo_domain: format!("{name}.mta.test"),
        suspend_when_unplumbed: true,
        is_retired: false,
    };
    config.egress_sources = [("a", 11), ("b", 12)].map(source).into();
    config.egress_pools = vec![EgressPool { name: "default".to_owned(), sources: vec![(0, 1), (1, 1)] }];
    config
}

pub(super) fn suspensions(running: &Running) -> Vec<SuspensionRow> {
    block_on(running.engine.suspensions()).expect("the engine answers")
}

/// By which sources `count` new messages arrive.
fn arrive(running: &mut Running, sink: &Sink, count: usize) -> Vec<String> {
    for number in 0..count {
        running.inject(&[&format!("{number}@sink.test")], &message(&number.to_string()));
    }
    let mut sources: Vec<String> = sink.take(count).into_iter().map(|it| it.ehlo).collect();
    sources.sort();
    sources.dedup();
    for _ in 0..count {
        let delivery = running.event(EventKind::Delivery);
        assert_eq!(delivery.attempts, 1, "a refused greeting is no attempt");
    }
    sources
}

#[test]
fn a_refused_source_is_suspended_over_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::scripted(|step| match step.verb {
        Verb::Ehlo if step.line.ends_with("a.mta.test") => {
            Answer::from("554 5.7.1 Client host [127.0.0.11] blocked using list.test")
        }
        _ => Answer::Usual,
    });
    let config = two_sources(directory.path(), sink.address());
    let mut running = Running::start(config.clone());
    assert_eq!(arrive(&mut running, &sink, 20), ["b.mta.test"]);
    let before = suspensions(&running);
    let [row] = &before[..] else { panic!("{before:?}") };
    assert_eq!(row.egress_source.as_deref(), Some("a"));
    assert_eq!(row.site.as_deref(), Some(&*sink.address().to_string()));
    assert!(row.reason.contains("554 5.7.1 Client host [127.0.0.11] blocked using list.test"), "{}", row.reason);
    running.shutdown();

    // The peer would take it now, but nobody asks before the suspension is over.
    sink.recover();
    let mut running = Running::start(config);
    assert_eq!(arrive(&mut running, &sink, 20), ["b.mta.test"]);
    let after = suspensions(&running);
    assert_eq!((&after[0].id, after[0].until), (&row.id, row.until));
    running.shutdown();
}

/// An embedding program does what an operator does by HTTP.
#[test]
fn an_embedding_program_suspends_a_tenant_and_resumes_it() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let mut config = to_sink(directory.path(), sink.address());
    config.tenants.push(Tenant { domains: vec!["sender.test".to_owned()], ..Tenant::new("acme") });
    let mut running = Running::start(config);
    let engine = &running.engine;
    assert_eq!(engine.readiness(), Ok(()));
    let hour = SuspensionEnd::After(Duration::from_secs(3600));
    let everything = block_on(engine.suspend(SuspensionRow::default(), hour)).unwrap_err();
    assert!(matches!(everything, SuspendError::Refused(_)), "{everything}");
    let acme =
        SuspensionRow { tenant: Some("acme".to_owned()), reason: "a\r\ncomplaint".to_owned(), ..Default::default() };
    let id = block_on(engine.suspend(acme, hour)).unwrap();
    running.inject(&["ada@sink.test"], &message("waits"));
    let rows = running.rows_when("it is told why it waits", |rows| {
        rows.iter()
            .any(|row| row.blocked_by.as_ref().is_some_and(|blocked| blocked.contains("suspended: a  complaint")))
    });
    assert_eq!(rows[0].tenant.as_deref(), Some("acme"));
    assert_eq!(block_on(running.engine.messages(MessageFilter::default())).unwrap().len(), 1);
    assert_eq!(block_on(running.engine.status()).unwrap().recipients, 1);
    assert_eq!(block_on(running.engine.resume(&id)), Ok(true));
    running.event(EventKind::Delivery);
    assert_eq!(sink.take(1).len(), 1);
    running.shutdown();
}
