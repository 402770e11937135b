//! `restart`, small, with a real engine.

mod support;

use std::path::PathBuf;

use postrider_bench::inject::InjectOptions;
use postrider_bench::interrupt::Interrupt;
use postrider_bench::peers::{Dkim, Durability, EngineOptions};
use postrider_bench::restart::{RestartOptions, restart};

use support::postrider;

fn options(program: PathBuf) -> RestartOptions {
    let engine = EngineOptions {
        program,
        arguments: Vec::new(),
        shards: Some(1),
        durability: Durability::None,
        dkim: Dkim::None,
        tenants: 1,
        tls: None,
        spool_parent: None,
        config_extra: String::new(),
        keep: false,
    };
    let inject = InjectOptions { sessions: 4, ..InjectOptions::to(([127, 0, 0, 1], 1).into()) };
    RestartOptions { engine, inject, messages: 200, sites: 5, rounds: 2, cold: false, seed: 1 }
}

#[test]
fn a_full_spool_is_whole_after_each_restart() {
    let Some(program) = postrider() else { return };
    let report = restart(&options(program), &Interrupt::default()).unwrap();
    assert!(report.holds(), "{}", report.to_table());
    assert_eq!(report.rounds.len(), 2);
    let figure = |round: usize, name: &str| report.rounds[round].get(name).unwrap();
    for round in 0..2 {
        assert!(figure(round, "acknowledged") >= 200.0);
        // One site of five, of messages that are spread evenly.
        assert!((1.0..200.0).contains(&figure(round, "delivered")), "{}", report.to_table());
        assert_eq!(figure(round, "left_behind"), 0.0, "{}", report.to_table());
        for name in ["ready_after_ms", "first_delivery_ms", "anonymous_mib", "empty_anonymous_mib"] {
            assert!(figure(round, name) > 0.0, "{name}");
        }
        assert!(figure(round, "bytes_per_entry") >= 0.0);
    }
    let found = figure(1, "queued") + figure(0, "delivered") + figure(1, "delivered");
    let possible = figure(1, "acknowledged") + figure(1, "unanswered");
    assert!((figure(1, "acknowledged")..=possible).contains(&found), "{}", report.to_table());
    assert_eq!(report.to_json()["medians"]["missing"], 0.0);
}

#[test]
fn each_round_needs_a_site() {
    let options = RestartOptions { sites: 1, ..options(PathBuf::from("/bin/true")) };
    let error = restart(&options, &Interrupt::default()).unwrap_err().to_string();
    assert!(error.contains("a site for each"), "{error}");
}
