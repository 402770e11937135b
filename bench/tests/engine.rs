//! The measurements, small, with the real engine: what only it can show.

mod support;

use std::path::PathBuf;
use std::time::Duration;

use postrider_bench::inject::InjectOptions;
use postrider_bench::interrupt::Interrupt;
use postrider_bench::peers::{Dkim, Durability, EngineOptions, OutboundTls};
use postrider_bench::relay::{RelayOptions, relay};
use postrider_bench::sign::{SignOptions, sign};

use support::postrider;

fn engine(program: PathBuf) -> EngineOptions {
    EngineOptions {
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
    }
}

fn relay_options(engine: EngineOptions) -> RelayOptions {
    RelayOptions {
        engine,
        inject: InjectOptions { sessions: 4, ..InjectOptions::to(([127, 0, 0, 1], 1).into()) },
        messages: 200,
        warmup: 20,
        rounds: 1,
        sites: 1,
        count_calls: true,
        smtp_source: None,
        smtp_sink: None,
        sink_delay: Duration::ZERO,
        sink_threads: 1,
        tls_resumption: true,
        verify_percent: 100.0,
    }
}

#[test]
fn signed_mail_of_many_tenants_goes_out_by_tls_and_verifies() {
    let Some(program) = postrider() else { return };
    let engine = EngineOptions { dkim: Dkim::Both, tenants: 5, tls: Some(OutboundTls::Required), ..engine(program) };
    let mut options = relay_options(engine);
    options.inject.tenants = 5;
    options.inject.domains = 10;
    let report = relay(&options, &Interrupt::default()).unwrap();
    assert!(report.is_complete(), "{}", report.to_table());
    let round = &report.rounds[0];
    for (name, value) in [("accepted", 200.0), ("dkim_passed", 200.0), ("dkim_failed", 0.0)] {
        assert_eq!(round.get(name), Some(value), "{name}\n{}", report.to_table());
    }
    let handshakes = round.get("tls_handshakes_full").unwrap() + round.get("tls_handshakes_resumed").unwrap();
    assert!(handshakes >= 1.0 && handshakes == round.get("sink_connections").unwrap(), "{}", report.to_table());
    assert_eq!(report.setup["outbound_tls"], true);
}

#[test]
fn wrong_signatures_make_a_run_incomplete() {
    let Some(program) = postrider() else { return };
    // It signs for a domain that nobody sends from.
    let config_extra = String::new();
    let mut options = relay_options(EngineOptions { dkim: Dkim::Ed25519, config_extra, ..engine(program) });
    options.inject.sender = "bench@elsewhere.test".into();
    let report = relay(&options, &Interrupt::default()).unwrap();
    assert_eq!(report.rounds[0].get("dkim_failed"), Some(200.0), "{}", report.to_table());
    assert!(!report.is_complete());
}

#[test]
fn signing_and_tls_are_measured_beside_bare_operations() {
    let Some(program) = postrider() else { return };
    let relay = relay_options(engine(program));
    let options = SignOptions { relay, rounds: 1, handshakes: 60, bare: Duration::from_millis(20) };
    let report = sign(&options, &Interrupt::default()).unwrap();
    assert!(report.is_complete(), "{}", report.to_table());
    let round = &report.rounds[0];
    let positive = [
        "bare_rsa_us",
        "bare_ed25519_us",
        "rsa_us",
        "rsa_tls_delivered_per_second",
        "rsa_tls_by_bare",
        "bare_handshake_full_us",
        "bare_handshake_resumed_us",
    ];
    for name in positive {
        assert!(round.get(name).is_some_and(|value| value > 0.0), "{name}\n{}", report.to_table());
    }
    // All but the first connections can resume a session.
    assert!(round.get("handshakes_resumed_share").unwrap() > 0.3, "{}", report.to_table());
    assert!(round.get("handshake_full_by_bare").is_some());
}
