//! What the supervisor tells us (signals) and what we tell it (sd_notify). For the control thread.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tokio::signal::unix;

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGTERM or SIGINT.
    Terminate,
    /// SIGHUP.
    Reload,
}

/// The signals of this process, from [`Signals::new`] on. They no longer end it by themselves.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: unix::Signal,
    interrupt: unix::Signal,
    hang_up: unix::Signal,
}

impl Signals {
    /// Inside a tokio runtime.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: unix::signal(unix::SignalKind::terminate())?,
            interrupt: unix::signal(unix::SignalKind::interrupt())?,
            hang_up: unix::signal(unix::SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal. May be dropped and called again without loss.
    pub(crate) async fn next(&mut self) -> Signal {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => Signal::Terminate,
            _ = self.interrupt.recv() => Signal::Terminate,
            _ = self.hang_up.recv() => Signal::Reload,
        }
    }
}

/// Tells the supervisor our state, such as `READY=1` or `STOPPING=1` (sd_notify(3)). False: nobody wants to know.
pub(crate) fn notify_supervisor(state: &str) -> io::Result<bool> {
    match env::var_os("NOTIFY_SOCKET") {
        Some(socket) => notify(&socket, state).map(|()| true),
        None => Ok(false),
    }
}

fn notify(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        // sd_notify(3): a leading @ stands for the abstract namespace.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn signals_are_told_apart() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut signals = Signals::new().unwrap();
            let process = std::process::id().to_string();
            for (name, expected) in
                [("-HUP", Signal::Reload), ("-TERM", Signal::Terminate), ("-INT", Signal::Terminate)]
            {
                let status = std::process::Command::new("kill").args([name, &process]).status().unwrap();
                assert!(status.success());
                assert_eq!(signals.next().await, expected);
            }
        });
    }

    #[test]
    fn the_supervisor_is_told_on_a_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let supervisor = UnixDatagram::bind(&path).unwrap();
        notify(path.as_os_str(), "READY=1").unwrap();
        assert_eq!(received(&supervisor), "READY=1");
        drop(supervisor);
        assert!(notify(path.as_os_str(), "READY=1").is_err());
    }

    #[test]
    fn the_supervisor_is_told_in_the_abstract_namespace() {
        let name = format!("postrider-test-{}", std::process::id());
        let supervisor = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        notify(OsStr::new(&format!("@{name}")), "STOPPING=1").unwrap();
        assert_eq!(received(&supervisor), "STOPPING=1");
    }
}
