//! SIGINT and SIGTERM end a run in good order, so that the processes it started end too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Raised by a signal; looked at wherever a run waits.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes over both signals for the rest of the process.
    pub fn watch() -> Result<Self> {
        let interrupt = Self::default();
        let raise = interrupt.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut int, mut term) = {
            let _guard = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let wait = move || {
            runtime.block_on(async {
                tokio::select! { _ = int.recv() => {} _ = term.recv() => {} }
                raise.0.store(true, Ordering::Relaxed);
            });
        };
        std::thread::Builder::new().name("signals".into()).spawn(wait)?;
        Ok(interrupt)
    }

    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Looks at `done` every few milliseconds until it holds.
    pub fn until(&self, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        while !self.wait_until(LONG, &mut done)? {}
        Ok(())
    }

    /// Looks at `done` every few milliseconds until it holds (true) or the time is over (false).
    pub fn wait_until(&self, patience: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
        let end = Instant::now() + patience;
        loop {
            self.check()?;
            if done()? {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// A wait that a signal cuts short.
    pub fn pause(&self, duration: Duration) -> Result<()> {
        self.wait_until(duration, || Ok(false)).map(|_| ())
    }
}

const LONG: Duration = Duration::from_secs(3600);
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
