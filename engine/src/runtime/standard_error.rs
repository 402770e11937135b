//! Whether standard error takes a log line now: a reader that stands still must not stop the engine.
#![expect(unsafe_code, reason = "std does not ask whether a descriptor can be written to")]

use std::time::Duration;

/// Waits until a line can be written without standing still, for `patience` at most. A pipe says so while it has room
/// for a page of 4 KiB; a file always. What can't be asked is written to.
pub(crate) fn has_room(patience: Duration) -> bool {
    let mut asked = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    let patience_ms = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one initialised pollfd, which lives until the call is over.
    let answers = unsafe { libc::poll(&raw mut asked, 1, patience_ms) };
    answers != 0
}
