//! Automation end to end: what peers answer suspends a source there and limits another, also after a restart, until the
//! operator ends it.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;

use postrider::admin::{LimitsRow, SuspensionRow};
use postrider::config::Config;

use super::suspend_source::{suspensions, two_sources};
use crate::support::embedded::{Running, block_on};
use crate::support::sink::{Answer, Sink, Verb};
use crate::support::{message, poll};

const RULES: &str = "\
[spool]
allow_filesystem = true
[[shaping.default.automation]]
when = '^450 .*\\[TSS04\\]'
threshold = \"2/min\"
action = \"suspend\"
for = \"2h\"
[[shaping.default.automation]]
when = '^450 .*too many connections'
action = { set = { connection_limit = 1 } }
for = \"2h\"
";

/// By which sources so many new messages arrive in the end.
fn arrive(running: &mut Running, sink: &Sink, count: usize) -> Vec<String> {
    for number in 0..count {
        running.inject(&[&format!("{number}@sink.test")], &message(&number.to_string()));
    }
    let mut sources: Vec<String> = sink.take(count).into_iter().map(|it| it.ehlo).collect();
    running.finals(count);
    sources.sort();
    sources.dedup();
    sources
}

#[test]
fn rules_act_over_a_restart_until_the_operator_ends_it() {
    let directory = tempfile::tempdir().unwrap();
    // Source a is refused as a spammer, source b has too many connections once.
    let sessions_of_a = Mutex::new(HashSet::new());
    let warned = Mutex::new(false);
    let sink = Sink::scripted(move |step| match step.verb {
        Verb::Ehlo if step.line.ends_with("a.mta.test") => {
            sessions_of_a.lock().unwrap().insert(step.session);
            Answer::Usual
        }
        Verb::Mail if sessions_of_a.lock().unwrap().contains(&step.session) => {
            Answer::from("450-4.7.0 [TSS04] Messages from 127.0.0.11\n450 4.7.0 temporarily deferred")
        }
        Verb::Mail if !std::mem::replace(&mut *warned.lock().unwrap(), true) => {
            Answer::from("450 4.7.0 too many connections from 127.0.0.12")
        }
        _ => Answer::Usual,
    });
    let rules = Config::from_toml(RULES, "rules.toml", Path::new("/nonexistent")).unwrap();
    let mut config = two_sources(directory.path(), sink.address());
    config.shaping.automation = rules.shaping.automation;
    let mut running = Running::start(config.clone());
    assert_eq!(arrive(&mut running, &sink, 20), ["b.mta.test"]);
    let rows = |running: &Running| -> [SuspensionRow; 2] {
        poll("two suspensions", || {
            let mut rows = suspensions(running);
            rows.sort_by(|one, other| one.egress_source.cmp(&other.egress_source));
            rows.try_into().ok()
        })
    };
    let [a, b] = rows(&running);
    let site = sink.address().to_string();
    assert_eq!((a.egress_source.as_deref(), a.site.as_deref()), (Some("a"), Some(&*site)));
    let reason = "rule 1 of [shaping.default]: 450 4.7.0 [TSS04] Messages from 127.0.0.11 temporarily deferred";
    assert_eq!((&*a.reason, &a.limits), (reason, &None));
    assert_eq!((b.egress_source.as_deref(), b.site.as_deref()), (Some("b"), Some(&*site)));
    assert_eq!(b.limits, Some(LimitsRow { connection_limit: Some(1), ..LimitsRow::default() }));
    running.shutdown();

    // The peer would take everything now, but it is not asked before the time is over.
    sink.recover();
    let mut running = Running::start(config);
    assert_eq!(arrive(&mut running, &sink, 20), ["b.mta.test"]);
    let [a_now, b_now] = rows(&running);
    assert_eq!((&a_now.id, a_now.until, &b_now.id, b_now.until), (&a.id, a.until, &b.id, b.until));
    assert_eq!(b_now.limits, b.limits);
    for id in [a.id, b.id] {
        assert!(block_on(running.engine.resume(&id)).expect("the engine answers"), "it was in force");
    }
    assert!(suspensions(&running).is_empty());
    assert_eq!(arrive(&mut running, &sink, 20), ["a.mta.test", "b.mta.test"]);
    running.shutdown();
}
