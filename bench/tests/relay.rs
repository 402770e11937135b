//! The measurements, made of the bare relay: a real process that is started, measured, killed and ended.

use std::path::PathBuf;
use std::time::Duration;

use postrider_bench::inject::InjectOptions;
use postrider_bench::interrupt::Interrupt;
use postrider_bench::kill::{KillOptions, kill};
use postrider_bench::peers::{Dkim, Durability, EngineOptions};
use postrider_bench::relay::{RelayOptions, relay};

fn engine() -> EngineOptions {
    EngineOptions {
        program: PathBuf::from(env!("CARGO_BIN_EXE_postbench")),
        arguments: Vec::new(),
        shards: None,
        durability: Durability::None,
        dkim: Dkim::Ed25519,
        tenants: 1,
        tls: None,
        spool_parent: None,
        config_extra: String::new(),
        keep: false,
    }
}

fn load() -> InjectOptions {
    InjectOptions { sessions: 4, ..InjectOptions::to(([127, 0, 0, 1], 1).into()) }
}

fn relay_options() -> RelayOptions {
    RelayOptions {
        engine: engine(),
        inject: load(),
        messages: 300,
        warmup: 20,
        rounds: 2,
        sites: 1,
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
fn a_relay_is_measured_round_by_round() {
    let report = relay(&relay_options(), &Interrupt::default()).unwrap();
    assert!(report.is_complete());
    assert_eq!(report.rounds.len(), 2);
    for round in &report.rounds {
        // The warm-up's messages are not among them; its connections are: the bare relay opens one for each of its own.
        for (name, value) in [("accepted", 300.0), ("lost", 0.0), ("duplicates", 0.0), ("sink_connections", 8.0)] {
            assert_eq!(round.get(name), Some(value), "{name}");
        }
        for name in
            ["accepted_per_second", "delivered_per_second", "peak_rss_mib", "accept_p99_ms", "end_to_end_p99_ms"]
        {
            assert!(round.get(name).is_some_and(|value| value > 0.0), "{name}");
        }
        assert!(round.get("engine_cpu_us_per_message").is_some());
    }
    let json = report.to_json();
    // Counted, or it is said why not.
    for round in &report.rounds {
        let calls = round.get("system_calls_per_message");
        assert_eq!(calls.is_some(), json["setup"]["calls_not_counted"].is_null(), "{}", report.to_table());
        // To receive, answer and pass on, twice each, takes some.
        assert!(calls.is_none_or(|calls| calls > 4.0), "{}", report.to_table());
    }
    assert_eq!(json["medians"]["accepted"], 300.0);
    assert_eq!(json["setup"]["durability"], "none");
    assert!(json["setup"]["config"].as_str().unwrap().contains("[[dkim]]"));
    assert!(report.to_table().contains("engine cpu us per message"));
    let plot = tempfile::NamedTempFile::new().unwrap();
    report.plot(plot.path()).unwrap();
    let charts = std::fs::read_to_string(plot.path()).unwrap();
    assert!(charts.contains("Messages delivered a second") && charts.contains("percent"), "{charts}");
}

#[test]
fn kills_are_audited() {
    let options = KillOptions {
        engine: engine(),
        inject: load(),
        kills: 2,
        run_min: Duration::from_millis(50),
        run_max: Duration::from_millis(100),
        sink_delay: Duration::ZERO,
        quiet: Duration::from_millis(100),
        seed: 1,
    };
    let report = kill(&options, &Interrupt::default()).unwrap();
    assert!(report.holds(), "{}", report.to_text());
    assert_eq!(report.kills.len(), 2);
    assert!(report.audit.acknowledged > 0);
    // What the relay had passed on but not yet answered was delivered, though never acknowledged: one of each session.
    assert!(report.audit.delivered_unacknowledged <= 8, "{}", report.to_text());
    assert!(report.kills.iter().all(|kill| kill.connections > 0 && kill.first_delivery_after_ms.is_some()));
}

#[test]
fn an_engine_that_does_not_start_is_an_error_with_its_last_words() {
    let mut options = relay_options();
    options.engine.arguments = vec!["--no-such-argument".into()];
    let error = relay(&options, &Interrupt::default()).unwrap_err().to_string();
    assert!(error.contains("before it was ready") && error.contains("--no-such-argument"), "{error}");
    options.engine.program = "/no/such/engine".into();
    let error = relay(&options, &Interrupt::default()).unwrap_err().to_string();
    assert!(error.contains("no engine at /no/such/engine"), "{error}");
}
