//! Work that may wait for a disk, on a thread of its own that nobody waits for: a file on a disk that never answers
//! must not keep the engine from stopping, as a runtime's blocking task would.

use std::{io, thread};

use tokio::sync::oneshot;

/// Runs `work`, and gives its result. Who lets go of the receiver lets the thread be.
pub(crate) fn aside<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (done, result) = oneshot::channel();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Who asked may have given up.
        let _ = done.send(work());
    })?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_runtime_ends_while_work_goes_on() {
        let (release, held) = mpsc::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (mut waits, ended) = runtime.block_on(async {
            let waits = aside("waits", move || held.recv().is_ok()).unwrap();
            (waits, aside("ends", || 7).unwrap().await)
        });
        drop(runtime);
        assert_eq!(ended, Ok(7));
        assert!(waits.try_recv().is_err(), "nobody has waited for it");
        release.send(()).unwrap();
        assert_eq!(waits.blocking_recv(), Ok(true));
    }
}
