//! A domain beyond ASCII is the one that the configuration names in its `xn--` form, however an address writes it.

use postrider::config::{DomainPattern, Route, RouteTarget};

use crate::support::embedded::{Running, config};
use crate::support::message;
use crate::support::sink::{Sink, Verb};

#[test]
fn both_forms_go_by_its_route_and_are_one_queue() {
    let directory = tempfile::tempdir().unwrap();
    let (sink, others) = (Sink::start(), Sink::start());
    let mut config = config(directory.path());
    for (domain, sink) in
        [(DomainPattern::Exact("xn--bcher-kva.test".to_owned()), &sink), (DomainPattern::Any, &others)]
    {
        config.routes.push(Route::new(domain, vec![RouteTarget::Address(sink.address())]));
    }
    let mut running = Running::start(config);
    running.inject(&["a@b\u{fc}cher.test", "b@xn--bcher-kva.test", "c@B\u{dc}CHER.test"], &message("both"));
    let queues: Vec<String> = running.finals(3).iter().map(|event| event.queue.to_string()).collect();
    assert_eq!(queues, ["xn--bcher-kva.test"; 3]);
    running.shutdown();
    let delivered = sink.taken_so_far();
    assert_eq!((delivered.len(), delivered[0].recipients.len()), (1, 3), "{delivered:?}");
    assert_eq!(others.count(Verb::Mail), 0);
}
