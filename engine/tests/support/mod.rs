//! What scenario and interop tests share: a scripted sink, a client, a DNS server, and engines to put between them.
//!
//! Waiting is always for an event with a deadline ([`PATIENCE`]): what is slow on a busy machine is waited for, what
//! never comes fails the test and says what was missing.

#![allow(dead_code, reason = "each test crate uses a part of it")]

pub(crate) mod client;
pub(crate) mod dns_server;
pub(crate) mod embedded;
pub(crate) mod event_log;
pub(crate) mod http;
pub(crate) mod policy_server;
pub(crate) mod process;
pub(crate) mod sink;
pub(crate) mod tap;
pub(crate) mod tls_front;
pub(crate) mod tlsa;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// How long anything may take before the test fails. Nothing normally takes a tenth of it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Asks again and again, for what no event tells: another process's state. Fails after [`PATIENCE`].
pub(crate) fn poll<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    poll_for(PATIENCE, what, ask)
}

pub(crate) fn poll_for<T>(patience: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {patience:?}");
        // The pace of the questions; nothing depends on it.
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// Something at this port of some loopback address; none where this user may not have such a port.
pub(crate) fn at_loopback<T>(port: u16, start: impl Fn(SocketAddr) -> std::io::Result<T>) -> Option<T> {
    loop {
        let address = [127, fastrand::u8(1..255), fastrand::u8(..), fastrand::u8(1..255)];
        match start(SocketAddr::from((Ipv4Addr::from(address), port))) {
            Ok(started) => return Some(started),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => {
                eprintln!("skipped: a server at port {port} of {address:?}: {error}");
                return None;
            }
        }
    }
}

/// A small message whose body names `token`.
pub(crate) fn message(token: &str) -> Vec<u8> {
    format!(
        "From: Sender <sender@sender.test>\r\nTo: someone@sink.test\r\nSubject: test\r\n\
         Date: Sun, 1 Nov 2026 12:00:00 +0000\r\nMessage-ID: <{token}@sender.test>\r\n\r\ntoken {token}\r\n"
    )
    .into_bytes()
}

/// What [`message`] was given, found in what arrived.
pub(crate) fn token(content: &[u8]) -> String {
    let text = String::from_utf8_lossy(content);
    let found = text.lines().find_map(|line| line.strip_prefix("token "));
    found.unwrap_or_else(|| panic!("a message of ours: {text}")).to_owned()
}
