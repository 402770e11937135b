//! `postrider serve`: the engine as a service, from its start to the signal that ends it.

use std::fmt;
use std::io;

use crate::config::Config;
use crate::engine::{Engine, StartError};
use crate::runtime::signal::{Signal, Signals, notify_supervisor};

/// Why a service could not start or did not end cleanly. One line that says what to do.
#[derive(Debug)]
pub enum ServeError {
    /// Nothing was accepted.
    Start(StartError),
    Signals(io::Error),
    /// What was accepted is in the spool all the same.
    End(StartError),
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(error) => error.fmt(f),
            Self::Signals(error) => write!(f, "signals can't be received: {error}"),
            Self::End(error) => write!(f, "the engine did not end cleanly: {error}"),
        }
    }
}

impl std::error::Error for ServeError {}

/// Runs an engine until SIGTERM or SIGINT, then ends it within `shutdown_grace`.
///
/// The supervisor is told when it is ready and when it stops (sd_notify(3)). The actual addresses are logged, one a
/// line.
pub fn run(config: Config) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Signals)?;
    // From here on a signal waits until the engine runs, so that it never ends amid its start.
    let mut signals = {
        let _guard = runtime.enter();
        Signals::new().map_err(ServeError::Signals)?
    };
    let engine = Engine::builder(config).start().map_err(ServeError::Start)?;
    let addresses = engine.addresses();
    for address in &addresses.smtp {
        tracing::info!(protocol = "smtp", %address, "listening");
    }
    for address in &addresses.http {
        tracing::info!(protocol = "http", %address, "listening");
    }
    tell_supervisor("READY=1");
    while runtime.block_on(signals.next()) == Signal::Reload {
        tracing::warn!("SIGHUP: reloading the configuration is not available yet; restart to take up changes");
    }
    tracing::info!("stopping: no new mail is accepted, what is on the wire is finished");
    tell_supervisor("STOPPING=1");
    engine.shutdown().map_err(ServeError::End)?;
    tracing::info!("stopped");
    Ok(())
}

/// That nobody hears it is no reason to stop.
fn tell_supervisor(state: &str) {
    if let Err(error) = notify_supervisor(state) {
        tracing::warn!(%error, state, "the supervisor could not be notified");
    }
}
