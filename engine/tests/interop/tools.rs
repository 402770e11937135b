//! Where the third-party programs are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::{PATIENCE, poll};

/// How many messages the larger tests send.
pub(crate) fn messages() -> usize {
    size("INTEROP_MESSAGES", 1_000)
}

/// How many messages of all shapes go to each real server, at least.
pub(crate) fn peer_messages() -> usize {
    size("INTEROP_PEER_MESSAGES", 100)
}

/// How long all those messages may take.
pub(crate) fn patience() -> Duration {
    PATIENCE + Duration::from_millis(20) * messages() as u32
}

/// How many messages wait for a rate; None where it is to be quick.
pub(crate) fn rates_queued() -> Option<usize> {
    std::env::var_os("INTEROP_RATES").map(|_| size("INTEROP_RATES", 0))
}

/// How many connections are left half-open.
pub(crate) fn half_open() -> usize {
    size("INTEROP_HALF_OPEN", 2_000)
}

fn size(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |count| count.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

/// The program, or None with the reason printed; fails when `CI=true`.
pub(crate) fn program(name: &str, install: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/bin".into()]);
    let found = places.map(|place| place.join(name)).find(|candidate| candidate.is_file());
    if found.is_none() {
        missing(&format!("{name} is not installed ({install})"));
    }
    found
}

/// A Python that has these modules: `INTEROP_PYTHON`, else the one that `.ci/run` makes, else the system's.
pub(crate) fn python(modules: &str) -> Option<PathBuf> {
    let mut candidates: Vec<PathBuf> = std::env::var_os("INTEROP_PYTHON").map(PathBuf::from).into_iter().collect();
    // The binary is in TARGET/PROFILE.
    if let Some(target) = Path::new(env!("CARGO_BIN_EXE_postrider")).ancestors().nth(2) {
        candidates.push(target.join("interop/venv/bin/python"));
    }
    candidates.extend(["python3".into(), "/usr/bin/python3".into()]);
    let has_modules = |python: &PathBuf| {
        let run = Command::new(python).args(["-c", &format!("import {modules}")]).output();
        run.is_ok_and(|output| output.status.success())
    };
    let found = candidates.into_iter().find(has_modules);
    if found.is_none() {
        missing(&format!("no Python has the modules {modules}"));
    }
    found
}

/// A script of this folder.
pub(crate) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(name)
}

pub(crate) fn missing(what: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{what}; with CI=true nothing is skipped");
    eprintln!("skipped: {what}");
}

/// Runs to the end; its standard output. Fails with its words when it fails.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

/// A port that was free a moment ago, for servers that can't tell which one they got.
pub(crate) fn free_address() -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port is free");
    listener.local_addr().expect("a bound socket has an address")
}

/// A server that is killed when dropped.
pub(crate) struct Server(pub(crate) std::process::Child);

impl Server {
    /// Starts it and waits until it accepts connections.
    pub(crate) fn start(command: &mut Command, address: std::net::SocketAddr) -> Self {
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut server = Self(child);
        poll("the server accepts connections", || {
            let ended = server.0.try_wait().expect("a child can be asked");
            assert!(ended.is_none(), "{command:?} ended: {ended:?}");
            std::net::TcpStream::connect(address).ok()
        });
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
