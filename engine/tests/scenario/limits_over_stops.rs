//! An engine that ends leaves what its limits have counted: the next one goes on as if there had been none between.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use postrider::admin::MessageRow;
use postrider::config::{Config, Rate};
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, to_sink};
use crate::support::message;
use crate::support::sink::Sink;

const HOUR: Duration = Duration::from_secs(3_600);

/// Three an hour, which may go at once; with the keeper's limits the same holds over all shards.
fn limited_pair(directory: &Path, sink: SocketAddr) -> Config {
    let mut config = to_sink(directory, sink);
    config.shaping.max_message_rate = Some(Rate { count: 3, period: HOUR, max_burst: 3 });
    config
}

fn limited_by_keeper(directory: &Path, sink: SocketAddr) -> Config {
    let toml = "[[limit]]\nname = \"all\"\nmax_message_rate = \"3/h,max_burst=3\"\n[spool]\npath = \"unused\"\n";
    let mut config = to_sink(directory, sink);
    config.limits = Config::from_toml(toml, "limits.toml", Path::new("/nonexistent")).unwrap().limits;
    config
}

/// Two go before the stop; the third may go at once behind it, and the fourth not before an hour from the first.
fn goes_on_behind_a_stop(config: Config) {
    let mut running = Running::start(config.clone());
    for number in 1..=2 {
        running.inject(&[&format!("{number}@sink.test")], &message(&number.to_string()));
    }
    running.finals(2);
    running.shutdown();

    let mut running = Running::start(config.clone());
    running.inject(&["3@sink.test"], &message("3"));
    let third = running.event(EventKind::Delivery);
    assert_eq!(third.recipient, "3@sink.test");
    running.inject(&["4@sink.test"], &message("4"));
    let waits = |rows: &[MessageRow]| rows.len() == 1 && rows[0].blocked_by.is_some();
    let rows = running.rows_when("the fourth waits for its limit", waits);
    assert!(rows[0].blocked_by.as_ref().unwrap().contains("3/h"), "{rows:?}");
    running.shutdown();

    // And it waits on behind the next one.
    let running = Running::start(config);
    let rows = running.rows_when("the fourth still waits for its limit", waits);
    assert!(rows[0].blocked_by.as_ref().unwrap().contains("3/h"), "{rows:?}");
    assert_eq!(rows[0].num_attempts, 0);
    running.shutdown();
}

#[test]
fn a_pairs_rate_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    goes_on_behind_a_stop(limited_pair(directory.path(), sink.address()));
    assert_eq!(sink.take(3).len(), 3);
    assert!(sink.taken_so_far().is_empty());
}

#[test]
fn a_limit_over_pairs_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    goes_on_behind_a_stop(limited_by_keeper(directory.path(), sink.address()));
    assert_eq!(sink.take(3).len(), 3);
    assert!(sink.taken_so_far().is_empty());
}
