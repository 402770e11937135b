//! `postrider serve`: the engine as a service, from its start to the signal that ends it.

use std::fmt;
use std::io;

use crate::config::{Config, ConfigErrors, EgressSource};
use crate::engine::{Engine, StartError};
use crate::runtime::clock::supervisor_clock_us;
use crate::runtime::net::is_local_address;
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

/// A warning for each source whose address is not on this machine now: nothing goes by it until it is.
pub fn unplumbed_sources(config: &Config) -> Vec<String> {
    let warning = |source: &EgressSource| {
        let address = source.source_address.filter(|address| !is_local_address(*address))?;
        let name = &source.name;
        Some(format!("egress source {name:?}: this machine does not have {address}; nothing goes by it until it has"))
    };
    config.egress_sources.iter().filter_map(warning).collect()
}

/// Runs an engine until SIGTERM or SIGINT, then ends it within `shutdown_grace`. `read` reads its configuration anew
/// for each reload; SIGHUP is one.
///
/// The supervisor is told when it is ready, when it reloads and when it stops (sd_notify(3)). The actual addresses are
/// logged, one a line.
pub fn run(
    config: Config,
    read: impl Fn() -> Result<Config, ConfigErrors> + Send + Sync + 'static,
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Signals)?;
    // From here on a signal waits until the engine runs, so that it never ends amid its start.
    let mut signals = {
        let _guard = runtime.enter();
        Signals::new().map_err(ServeError::Signals)?
    };
    let engine = Engine::builder(config).reload_from(read).start().map_err(ServeError::Start)?;
    let addresses = engine.addresses();
    for address in &addresses.smtp {
        tracing::info!(protocol = "smtp", %address, "listening");
    }
    for address in &addresses.http {
        tracing::info!(protocol = "http", %address, "listening");
    }
    tell_supervisor("READY=1");
    runtime.block_on(serve_signals(&engine, &mut signals));
    tracing::info!("stopping: no new mail is accepted, what is on the wire is finished");
    tell_supervisor("STOPPING=1");
    engine.shutdown().map_err(ServeError::End)?;
    tracing::info!("stopped");
    Ok(())
}

/// Reloads with each SIGHUP, until it is to end. One that comes meanwhile may be for a newer file: it has its turn.
async fn serve_signals(engine: &Engine, signals: &mut Signals) {
    let mut signal = signals.next().await;
    while signal == Signal::Reload {
        tell_supervisor(&format!("RELOADING=1\nMONOTONIC_USEC={}", supervisor_clock_us()));
        let mut next = None;
        {
            let mut reloading = std::pin::pin!(reload(engine));
            loop {
                tokio::select! {
                    () = &mut reloading => break,
                    came = signals.next() => next = Some(came),
                }
                if next == Some(Signal::Terminate) {
                    return;
                }
            }
        }
        tell_supervisor("READY=1");
        signal = match next {
            Some(signal) => signal,
            None => signals.next().await,
        };
    }
}

/// What came of it is in the log; with an error all is as it was.
async fn reload(engine: &Engine) {
    match engine.reload_source().await {
        Ok(reloaded) if reloaded.changes.is_empty() => {
            tracing::info!(since = %reloaded.since, "SIGHUP: the configuration has not changed");
        }
        Ok(reloaded) => tracing::info!(since = %reloaded.since, "SIGHUP: the configuration is in force"),
        Err(error) => {
            for line in error.to_string().lines() {
                tracing::error!("{line}");
            }
            tracing::error!("SIGHUP: the configuration was not taken up; all is as it was");
        }
    }
}

/// That nobody hears it is no reason to stop.
fn tell_supervisor(state: &str) {
    if let Err(error) = notify_supervisor(state) {
        tracing::warn!(%error, state, "the supervisor could not be notified");
    }
}
