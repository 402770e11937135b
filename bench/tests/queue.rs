//! Measurements of mail that waits, and of what grows: small, with the real engine.

mod support;

use std::path::PathBuf;
use std::time::Duration;

use postrider_bench::deliver::{Chunking, DeliverOptions, deliver};
use postrider_bench::growth::{Axis, GrowthOptions, growth};
use postrider_bench::inject::InjectOptions;
use postrider_bench::interrupt::Interrupt;
use postrider_bench::memory::{MemoryOptions, memory};
use postrider_bench::peers::{Dkim, Durability, EngineOptions};
use postrider_bench::relay::RelayOptions;
use postrider_bench::sites::{SitesOptions, sites};
use postrider_bench::splice::{SpliceOptions, splice};

use support::postrider;

fn relay_options(program: PathBuf, sites: usize) -> RelayOptions {
    let engine = EngineOptions {
        program,
        arguments: Vec::new(),
        shards: Some(2),
        durability: Durability::None,
        dkim: Dkim::None,
        tenants: 1,
        tls: None,
        spool_parent: None,
        config_extra: String::new(),
        keep: false,
    };
    let load = InjectOptions::to(([127, 0, 0, 1], 1).into());
    RelayOptions {
        engine,
        inject: InjectOptions { sessions: 4, domains: sites, domain_exponent: 0.0, ..load },
        messages: 100,
        warmup: 20,
        rounds: 1,
        sites,
        count_calls: true,
        smtp_source: None,
        smtp_sink: None,
        sink_delay: Duration::ZERO,
        sink_threads: 1,
        tls_resumption: true,
        verify_percent: 0.0,
    }
}

#[test]
fn a_long_queue_is_weighed_and_drained_to_the_last() {
    let Some(program) = postrider() else { return };
    let relay = relay_options(program, 7);
    let report = memory(&MemoryOptions { relay, queued: 500 }, &Interrupt::default()).unwrap();
    assert!(report.holds(), "{}", report.to_table());
    let round = &report.rounds[0];
    for (name, value) in [("queued", 500.0), ("lost", 0.0), ("duplicates", 0.0), ("still_queued", 0.0)] {
        assert_eq!(round.get(name), Some(value), "{name}\n{}", report.to_table());
    }
    for name in ["anonymous_mib", "empty_delivered_per_second", "waiting_by_empty", "draining_by_empty"] {
        assert!(round.get(name).is_some_and(|value| value > 0.0), "{name}\n{}", report.to_table());
    }
    assert!(report.setup["config"].as_str().unwrap().contains("[[tenant]]\nname = \"standing\""));
}

#[test]
fn each_site_takes_a_connection_of_its_own() {
    let Some(program) = postrider() else { return };
    let relay = relay_options(program, 40);
    let options = SitesOptions { relay, messages_per_site: 3, connections_per_site: Some(1) };
    let report = sites(&options, &Interrupt::default()).unwrap();
    assert!(report.holds(), "{}", report.to_table());
    let round = &report.rounds[0];
    assert_eq!(round.get("messages"), Some(120.0));
    let connections = |name: &str| round.get(name).unwrap();
    // Some of the sites got none of the messages that were drawn, some more than three.
    assert!((30.0..100.0).contains(&connections("many_sites_connections")), "{}", report.to_table());
    // 120 messages, three a connection, beside those of the warm-up.
    assert!(connections("one_site_reconnecting_connections") >= 40.0, "{}", report.to_table());
    assert!(connections("one_site_connections") < 40.0, "{}", report.to_table());
    assert!(round.get("cpu_many_by_one").is_some(), "{}", report.to_table());
}

#[test]
fn growth_has_its_points_and_its_charts() {
    let Some(program) = postrider() else { return };
    let directory = tempfile::tempdir().unwrap();
    let plot = directory.path().join("growth.svg");
    let axes = vec![
        (Axis::Queue, vec![50, 100]),
        (Axis::Connections, vec![1, 8]),
        (Axis::Sites, vec![1, 30]),
        (Axis::Size, vec![512, 4_096]),
        (Axis::Shards, vec![1, 2]),
    ];
    let relay = relay_options(program, 1);
    let options = GrowthOptions { relay, axes: axes.clone(), plot: Some(plot.clone()) };
    let report = growth(&options, &Interrupt::default()).unwrap();
    assert!(report.holds(), "{}", report.to_table());
    for (curve, (axis, points)) in report.curves.iter().zip(&axes) {
        assert_eq!((curve.axis, curve.points.iter().map(|point| point.at).collect()), (*axis, points.clone()));
        for point in &curve.points {
            assert_eq!(point.figures.get("accepted"), Some(100.0), "{axis:?}\n{}", report.to_table());
            assert!(point.figures.get("engine_cpu_us_per_message").is_some(), "{axis:?}");
        }
    }
    let octets = |point: usize| report.curves[3].points[point].figures.get("delivered_mb_per_second").unwrap();
    assert!(octets(0) > 0.0 && octets(1) > 0.0, "{}", report.to_table());
    let charts = std::fs::read_to_string(plot).unwrap();
    for title in ["by queue", "by connections", "by sites", "by size", "by shards"] {
        assert!(charts.contains(title), "{title}");
    }
}

#[test]
fn delivering_is_held_against_bare_loops_in_clear_and_in_tls() {
    let Some(program) = postrider() else { return };
    for tls in [false, true] {
        let options = DeliverOptions {
            engine: relay_options(program.clone(), 1).engine,
            messages: 60,
            message_bytes: 2_048,
            connections: 3,
            round_trip: Duration::ZERO,
            deliveries_per_connection: 1_000,
            chunking: Chunking::On,
            in_flight: 8,
            sink_chunking: false,
            tls,
            rounds: 1,
            server: None,
        };
        let report = deliver(&options, &Interrupt::default()).unwrap();
        for name in ["bare_cpu_us_per_message", "engine_per_second", "cpu_engine_by_bare"] {
            assert!(report.rounds[0].get(name).is_some(), "{name}\n{}", report.to_table());
        }
        assert_eq!(report.setup["tls"], tls);
    }
}

#[test]
fn large_messages_are_held_against_a_bare_splice() {
    let Some(program) = postrider() else { return };
    let mut relay = relay_options(program, 1);
    relay.inject.sizes = "100k".parse().unwrap();
    let report = splice(&SpliceOptions { relay }, &Interrupt::default()).unwrap();
    assert!(report.is_complete(), "{}", report.to_table());
    let round = &report.rounds[0];
    for name in ["bare_synced_each_mb_per_second", "bare_synced_by_eights_mb_per_second", "engine_mb_per_second"] {
        assert!(round.get(name).is_some_and(|value| value > 0.0), "{name}\n{}", report.to_table());
    }
    assert!(round.get("engine_by_bare_synced_each").is_some_and(|ratio| ratio > 0.0));
}
