//! The measurements of the spool's crate, small: what they count, and that every ratio is there.

use std::process::Command;
use std::time::Duration;

use postrider_bench::interrupt::Interrupt;
use postrider_bench::report::Figures;
use postrider_bench::spool::{Part, SpoolOptions, SpoolReport, spool};
use serde_json::Value;

const POSTBENCH: &str = env!("CARGO_BIN_EXE_postbench");

fn options(part: Part) -> SpoolOptions {
    SpoolOptions {
        parts: vec![part],
        rounds: 1,
        writers: vec![1, 7],
        message_bytes: 2048,
        messages: 300,
        duration: Duration::from_secs(60),
        rate: None,
        live: 600,
        deferred_share: 0.2,
        deferrals: 3,
        live_sizes: 2,
        outcomes_along: false,
        segment_bytes: 256 << 10,
        parent: None,
    }
}

fn assert_positive(figures: &Figures, names: &[&str]) {
    for name in names {
        assert!(figures.get(name).is_some_and(|value| value > 0.0), "{name} in {figures:?}");
    }
}

#[test]
fn appends_are_measured_beside_bare_writes() {
    let options = SpoolOptions { rounds: 2, ..options(Part::Append) };
    let report = spool(&options, &Interrupt::default()).unwrap();
    // Upkeep may have a commit of its own.
    for (name, per_commit) in [("append_1", 0.9..=1.0), ("append_7", 6.0..=7.0)] {
        let measurement = report.get(name).unwrap();
        assert_eq!(measurement.rounds.len(), 2);
        for round in &measurement.rounds {
            assert_eq!(round.get("messages"), Some(300.0));
            assert!(per_commit.contains(&round.get("messages_per_commit").unwrap()), "{round:?}");
            // The record is longer than what it carries, and a frame is whole blocks.
            assert!(round.get("written_bytes_per_message").unwrap() > 2048.0);
            assert_positive(round, &["records_ratio", "latency_ratio", "cpu_us_per_record", "bare_cpu_us_per_record"]);
            assert_positive(round, &["records_ratio_to_ring", "ring_cpu_us_per_record"]);
            assert_positive(round, &["commit_p999_ms", "bare_p999_ms", "ring_p999_ms"]);
        }
    }
    let json = report.to_json();
    assert_eq!(json["measurements"]["append_7"]["medians"]["messages"], 300.0);
    assert!(json["setup"]["record_bytes"].as_u64().unwrap() > 2048);
    assert!(report.to_text().contains("append 7\n"), "{}", report.to_text());
}

#[test]
fn outcomes_may_come_along_with_appends() {
    let apart = SpoolOptions { writers: vec![50], messages: 1_500, segment_bytes: 1 << 20, ..options(Part::Append) };
    let along = SpoolOptions { outcomes_along: true, ..apart.clone() };
    let measured = |options: &SpoolOptions| spool(options, &Interrupt::default()).unwrap();
    let written = |report: &SpoolReport| {
        let round = &report.get("append_50").unwrap().rounds[0];
        assert_positive(round, &["records_ratio", "latency_ratio"]);
        round.get("written_bytes_per_message").unwrap()
    };
    assert!(written(&measured(&along)) > written(&measured(&apart)) + 50.0);
}

#[test]
fn writers_are_compared_with_and_without_maintenance() {
    let options = SpoolOptions { rate: Some(3_000.0), ..options(Part::Maintenance) };
    let report = spool(&options, &Interrupt::default()).unwrap();
    let [round] = &report.get("maintenance").unwrap().rounds[..] else { panic!("one round") };
    assert_eq!((round.get("idle_messages"), round.get("busy_messages")), (Some(300.0), Some(300.0)));
    assert_positive(round, &["live_messages", "idle_commit_p999_ms", "busy_commit_p999_ms", "p999_ratio"]);
    assert!(round.get("zeroed_mib_per_second").is_some() && round.get("checkpoint_mib_per_second").is_some());
}

#[test]
fn what_is_written_is_told_part_by_part() {
    let options = SpoolOptions { messages: u64::MAX, ..options(Part::Amplification) };
    let report = spool(&options, &Interrupt::default()).unwrap();
    let round = &report.get("amplification").unwrap().rounds[0];
    assert_eq!(round.get("messages"), Some(1_200.0));
    assert_positive(round, &["amplification", "live_messages", "of_it_outcomes"]);
    let parts = ["messages", "outcomes", "copies", "checkpoints", "padding_and_headers"];
    let sum: f64 = parts.iter().map(|part| round.get(&format!("of_it_{part}")).unwrap()).sum();
    assert!((sum - round.get("amplification").unwrap()).abs() < 1e-6, "{round:?}");
    assert!(round.get("of_it_messages").unwrap() > 1.0);
    assert!(round.get("outcomes_per_message").unwrap() > 1.0);
}

#[test]
fn deferred_mail_is_held_against_an_empty_spool() {
    let report = spool(&options(Part::Deferred), &Interrupt::default()).unwrap();
    let round = &report.get("deferred").unwrap().rounds[0];
    assert_eq!((round.get("empty_messages"), round.get("loaded_messages")), (Some(300.0), Some(300.0)));
    assert_positive(round, &["throughput_ratio", "deferred_part_of_spool", "loaded_cpu_us_per_message"]);
}

#[test]
fn the_command_takes_its_parts() {
    let run = |arguments: &[&str]| {
        Command::new(POSTBENCH).args(["spool", "--json", "--segment", "256k"]).args(arguments).output().unwrap()
    };
    let output = run(&["append", "--writers", "2", "--messages", "50"]);
    assert!(output.status.success(), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["measurements"]["append_2"]["rounds"][0]["messages"], 50.0);
    assert_eq!(json["measurements"].as_object().unwrap().len(), 1);
    assert_eq!(run(&["appendix"]).status.code(), Some(2));
    assert_eq!(run(&["--writers", "0"]).status.code(), Some(1));
}
