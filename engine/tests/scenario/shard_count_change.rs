//! The number of shards may change between two runs: mail of logs that have lost their shard is taken along.

use std::collections::BTreeMap;

use postrider::admin::MessageRow;

use crate::support::embedded::{Running, to_sink};
use crate::support::event_log;
use crate::support::message;
use crate::support::sink::Sink;

#[test]
fn one_then_four_then_two() {
    const EACH: usize = 40;
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let address = sink.address();
    let mut config = to_sink(directory.path(), address);
    drop(sink);

    let mut ids = BTreeMap::new();
    for shards in [1, 4] {
        config.shards = Some(shards);
        let running = Running::start(config.clone());
        let kept = running.rows().into_iter().map(|row| (row.id, row.recipient)).collect::<BTreeMap<_, _>>();
        assert_eq!(kept, ids, "{shards} shards have taken up what earlier ones left");
        for number in 0..EACH {
            let recipient = format!("{shards}-{number}@sink.test");
            ids.insert(running.inject(&[&recipient], &message(&recipient)), recipient);
        }
        running.shutdown();
    }
    assert_eq!(ids.len(), 2 * EACH);

    config.shards = Some(2);
    let events = config.events_path();
    let running = Running::start(config);
    assert_eq!(running.rows().len(), 2 * EACH);
    let sink = Sink::start_at(address);
    let mut arrived: Vec<String> = sink.take(2 * EACH).into_iter().flat_map(|it| it.recipients).collect();
    arrived.sort();
    let mut expected: Vec<String> = ids.values().cloned().collect();
    expected.sort();
    assert_eq!(arrived, expected, "each message arrives");
    running.rows_when("empty", <[MessageRow]>::is_empty);
    running.shutdown();
    assert!(sink.taken_so_far().is_empty(), "once");

    let finals = event_log::finals(&event_log::read(&events));
    assert_eq!(finals.len(), 2 * EACH);
    assert!(finals.iter().all(|((id, recipient), &count)| count == 1 && ids[id] == *recipient), "{finals:?}");
}
