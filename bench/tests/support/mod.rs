//! What tests with the real engine share.

use std::path::{Path, PathBuf};

/// `cargo test --workspace` builds postrider beside postbench; `cargo test -p postrider-bench` alone does not.
#[expect(clippy::print_stderr, reason = "a test's helper")]
pub(crate) fn postrider() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_BIN_EXE_postbench")).with_file_name("postrider");
    assert!(program.is_file() || std::env::var_os("CI").is_none(), "no engine at {}", program.display());
    if !program.is_file() {
        eprintln!("skipped: postrider was not built beside postbench (cargo build --workspace)");
    }
    program.is_file().then_some(program)
}
