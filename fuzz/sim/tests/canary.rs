//! A checker that does not see a planted bug is blind: each is found within a hundred seeds.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

#[test]
fn each_planted_bug_is_found() {
    let next = AtomicUsize::new(0);
    let blind = Mutex::new(Vec::new());
    let look = || {
        while let Some(&(canary, first)) = CANARIES.get(next.fetch_add(1, Ordering::Relaxed)) {
            let seed = (first..first + SEEDS).find(|seed| is_found(canary, *seed));
            println!("{canary}: {seed:?}");
            blind.lock().unwrap().extend(seed.is_none().then_some(canary));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(look))));
    let blind = blind.into_inner().unwrap();
    assert!(blind.is_empty(), "nobody saw {blind:?}");
}

/// A broken promise is a panic, and that ends the process.
fn is_found(canary: &str, seed: u64) -> bool {
    let seed = seed.to_string();
    let mut simulator = Command::new(simulator());
    simulator.args(["--seeds", "1", "--base", &seed, "--canary", canary]);
    let output = simulator.stdin(Stdio::null()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || told.contains("panicked"), "{told}");
    !output.status.success()
}

/// `POSTRIDER_SIM` may name another than that of the tests' profile: an optimised one is faster.
fn simulator() -> OsString {
    std::env::var_os("POSTRIDER_SIM").unwrap_or_else(|| env!("CARGO_BIN_EXE_postrider-sim").into())
}

/// As `--help` lists them, and the first seed that is tried: what found it when it was last looked for from the
/// beginning, so that this does not take long. Each was below a hundred.
const CANARIES: [(&str, u64); 28] = [
    ("early-sync", 0),
    ("no-reset", 0),
    ("dropped-outcome", 0),
    ("dropped-mail", 0),
    ("early-fin", 0),
    ("changed-due", 0),
    ("started-twice", 0),
    ("other-source", 0),
    ("higher-limit", 0),
    ("higher-rate", 2),
    ("shared-flow", 2),
    ("endless-events", 49),
    ("forgotten-limits", 7),
    ("forgotten-use", 12),
    ("renamed-limits", 12),
    ("untold-home", 1),
    ("unheard-suspension", 1),
    ("trusting-handshake", 3),
    ("old-policies", 9),
    ("lost-segment", 0),
    ("reversed-preference", 1),
    ("longer-life", 0),
    ("deaf-rules", 1),
    ("unrolled-provider", 18),
    ("old-shaping", 3),
    ("equal-sources", 1),
    ("made-up-suspension", 0),
    ("hidden-failures", 0),
];

const SEEDS: u64 = 100;
