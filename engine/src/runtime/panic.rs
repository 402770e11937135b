//! What a panic ends: the process, whatever the profile that it was built with says.

use std::panic;
use std::process;

/// Has every panic end the process from now on, behind the report that it has always made: for programs that aren't
/// built with `panic = "abort"`. To be called first thing; a hook that is set later has to see to it itself.
///
/// tokio ends only the task that panics, and its shard would limp on without it.
pub fn abort_on_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panicked| {
        report(panicked);
        process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;
    use std::thread;

    use super::*;

    /// Tests are always built to unwind.
    #[test]
    fn a_panic_in_any_thread_ends_the_process() {
        if env::var_os(CHILD).is_some() {
            abort_on_panic();
            let _ = thread::spawn(|| panic!("in a thread of its own")).join();
            return;
        }
        let mut child = Command::new(env::current_exe().expect("a test is a file"));
        child.args(["--exact", "runtime::panic::tests::a_panic_in_any_thread_ends_the_process", "--nocapture"]);
        let output = child.env(CHILD, "").output().expect("a test can be run again");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("in a thread of its own"), "{told}");
    }

    const CHILD: &str = "POSTRIDER_TEST_PANIC";
}
