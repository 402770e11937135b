//! A seed is a run: what is found once is found again. Maps are seeded anew in each process, so order that hangs on one
//! of them shows here.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::process::{Command, Stdio};

#[test]
fn a_seed_replays() {
    for seed in SEEDS {
        let report = report(seed);
        assert!(report.contains("delivered"), "{report}");
        assert_eq!(report, self::report(seed), "seed {seed}");
    }
}

fn report(seed: u64) -> String {
    let optimised = std::env::var_os("POSTRIDER_SIM");
    let mut simulator = Command::new(optimised.unwrap_or_else(|| env!("CARGO_BIN_EXE_postrider-sim").into()));
    simulator.args(["--seed", &seed.to_string()]);
    let output = simulator.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The last one was no run of its own once: domains that were blocked were asked for in the order of a map.
const SEEDS: [u64; 2] = [1, 1_002_324];
