//! The engine and the other mail systems, small.

use std::path::Path;
use std::time::Duration;

use postrider_bench::compare::{CompareOptions, Mta, compare};
use postrider_bench::inject::InjectOptions;
use postrider_bench::interrupt::Interrupt;
use postrider_bench::peers::{Dkim, Durability, EngineOptions};
use postrider_bench::relay::RelayOptions;

/// Postfix is the system's own; `.ci/run` unpacks the two that Debian allows on no machine beside it.
#[test]
fn other_mail_systems_are_held_against_the_engine() {
    let program = Path::new(env!("CARGO_BIN_EXE_postbench")).with_file_name("postrider");
    assert!(program.is_file() || std::env::var_os("CI").is_none(), "no engine at {}", program.display());
    if !program.is_file() {
        eprintln!("skipped: postrider was not built beside postbench (cargo build --workspace)");
        return;
    }
    let root = program.ancestors().nth(2).unwrap().join("interop/root");
    let mut rivals = Vec::new();
    if Path::new("/usr/sbin/postfix").is_file() && rustix::process::geteuid().is_root() {
        rivals.push(Mta::Postfix(None));
        if root.join("usr/sbin/exim4").is_file() && root.join("usr/sbin/smtpd").is_file() {
            rivals.extend([Mta::Exim(root.clone()), Mta::OpenSmtpd(root)]);
        }
    }
    let count = rivals.len();
    assert!(count == 3 || std::env::var_os("CI").is_none(), "with CI=true nothing is left out: {rivals:?}");
    let engine = EngineOptions {
        program,
        arguments: Vec::new(),
        shards: Some(1),
        durability: Durability::Fsync,
        dkim: Dkim::None,
        tenants: 1,
        tls: None,
        spool_parent: None,
        config_extra: String::new(),
        keep: false,
    };
    let relay = RelayOptions {
        engine,
        inject: InjectOptions { sessions: 4, ..InjectOptions::to(([127, 0, 0, 1], 1).into()) },
        messages: 30,
        warmup: 5,
        rounds: 2,
        sites: 1,
        count_calls: true,
        smtp_source: None,
        smtp_sink: None,
        sink_delay: Duration::ZERO,
        sink_threads: 1,
        tls_resumption: true,
        verify_percent: 0.0,
    };
    let names: Vec<&str> = rivals.iter().map(Mta::name).collect();
    let report = compare(&CompareOptions { relay, rivals, without_engine: false }, &Interrupt::default()).unwrap();
    assert!(report.holds(), "{}", report.to_text());
    assert_eq!(report.systems.len(), count + 1);
    for name in std::iter::once("postrider").chain(names) {
        let system = report.get(name).unwrap();
        assert!(!system.version.is_empty() && system.config.contains("127.0.0.1"), "{name}");
        assert_eq!(system.durability.starts_with("synced"), name != "opensmtpd", "{name}");
        assert_eq!(system.rounds.len(), 2);
        for round in &system.rounds {
            for (figure, value) in [("accepted", 30.0), ("lost", 0.0), ("duplicates", 0.0)] {
                assert_eq!(round.get(figure), Some(value), "{name}: {figure}");
            }
            for figure in ["delivered_per_second", "accepted_per_second", "anonymous_mib", "accept_p50_ms"] {
                assert!(round.get(figure).is_some_and(|value| value > 0.0), "{name}: {figure}");
            }
            assert!(round.get("cpu_us_per_message").is_some(), "{name}");
        }
    }
    let json = report.to_json();
    assert_eq!(json["systems"]["postrider"]["medians"]["accepted"], 30.0);
    assert!(report.to_text().contains("\npostrider: "), "{}", report.to_text());
}
