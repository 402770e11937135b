//! A checker that does not see a planted bug is blind: each is found within a hundred seeds.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::process::{Command, Stdio};

#[test]
fn each_planted_bug_is_found() {
    let mut blind = Vec::new();
    for canary in CANARIES {
        let seed = SEEDS.clone().find(|seed| is_found(canary, *seed));
        println!("{canary}: {seed:?}");
        blind.extend(seed.is_none().then_some(canary));
    }
    assert!(blind.is_empty(), "nobody saw {blind:?}");
}

/// A broken promise is a panic, and that ends the process.
fn is_found(canary: &str, seed: u64) -> bool {
    let seed = seed.to_string();
    let mut simulator = Command::new(env!("CARGO_BIN_EXE_postrider-sim"));
    simulator.args(["--seeds", "1", "--base", &seed, "--canary", canary]);
    let output = simulator.stdin(Stdio::null()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || told.contains("panicked"), "{told}");
    !output.status.success()
}

/// As `--help` lists them.
const CANARIES: [&str; 18] = [
    "early-sync",
    "no-reset",
    "dropped-outcome",
    "dropped-mail",
    "early-fin",
    "changed-due",
    "started-twice",
    "other-source",
    "higher-limit",
    "higher-rate",
    "shared-flow",
    "endless-events",
    "forgotten-limits",
    "forgotten-use",
    "untold-home",
    "trusting-handshake",
    "old-policies",
    "lost-segment",
];

const SEEDS: std::ops::Range<u64> = 0..100;
