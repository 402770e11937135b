//! The real binary as a process, with a configuration file and ports of its own choosing.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::PATIENCE;

/// A running `postrider serve`; it is killed when dropped.
pub(crate) struct Postrider {
    pid: u32,
    exit: Receiver<ExitStatus>,
    exited: bool,
    log: Arc<Mutex<Vec<String>>>,
    smtp: SocketAddr,
    http: SocketAddr,
}

/// What became of a process that was to end by itself.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Postrider {
    /// Writes `config` and the listeners to a file in `directory`, starts the engine, and waits for its addresses.
    pub(crate) fn start(directory: &Path, config: &str) -> Self {
        let path = write_config(directory, &format!("{config}\n{LISTENERS}"));
        Self::start_file(&path)
    }

    /// With a configuration file that says it all.
    pub(crate) fn start_file(config: &Path) -> Self {
        Self::start_under(&[], config)
    }

    /// Through a program that sets something up and then becomes postrider.
    pub(crate) fn start_under(program: &[&str], config: &Path) -> Self {
        let mut child = command(program, &["serve", "--config", &config.to_string_lossy()])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let pid = child.id();
        let stderr = child.stderr.take().expect("stderr is a pipe");
        let (line_sender, lines) = channel();
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                kept.lock().expect("nothing panics with the log").push(line.clone());
                // Nobody listens any more once the addresses are known.
                let _ = line_sender.send(line);
            }
        });
        let (exit_sender, exit) = channel();
        std::thread::spawn(move || {
            let status = child.wait().expect("a child can be waited for");
            let _ = exit_sender.send(status);
        });
        let nowhere = SocketAddr::from(([0; 4], 0));
        let mut process = Self { pid, exit, exited: false, log, smtp: nowhere, http: nowhere };
        process.await_addresses(&lines);
        process
    }

    fn await_addresses(&mut self, lines: &Receiver<String>) {
        let deadline = Instant::now() + PATIENCE;
        while self.smtp.port() == 0 || self.http.port() == 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(address) = listening(&line, "smtp") {
                        self.smtp = address;
                    } else if let Some(address) = listening(&line, "http") {
                        self.http = address;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no listening addresses in time:\n{}", self.log()),
                Err(RecvTimeoutError::Disconnected) => panic!("postrider ended:\n{}", self.log()),
            }
        }
    }

    pub(crate) fn smtp(&self) -> SocketAddr {
        self.smtp
    }

    pub(crate) fn http(&self) -> SocketAddr {
        self.http
    }

    /// What it has written to stderr so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("nothing panics with the log").join("\n")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// SIGTERM; it has to end with 0.
    pub(crate) fn terminate(mut self) {
        self.signal("TERM");
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "a clean end after SIGTERM ({status}):\n{}", self.log());
    }

    /// SIGKILL. When this returns the process is gone.
    pub(crate) fn kill(mut self) {
        self.signal("KILL");
        self.wait();
    }

    fn wait(&mut self) -> ExitStatus {
        let status = self.exit.recv_timeout(PATIENCE + Duration::from_secs(10));
        let status = status.unwrap_or_else(|_| panic!("postrider did not end:\n{}", self.log()));
        self.exited = true;
        status
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.pid.to_string()]).status();
        assert!(status.expect("kill is on every system").success(), "SIG{name} to postrider:\n{}", self.log());
    }
}

impl Drop for Postrider {
    fn drop(&mut self) {
        // Not when it has ended: its process id may be another's by now.
        if !self.exited && self.exit.try_recv().is_err() {
            let _ = Command::new("kill").args(["-s", "KILL", &self.pid.to_string()]).status();
        }
        if std::thread::panicking() {
            eprintln!("--- postrider's log ---\n{}\n---", self.log());
        }
    }
}

/// Runs the binary to its end.
pub(crate) fn run(arguments: &[&str]) -> Ended {
    run_under(&[], arguments)
}

/// Through a program that sets something up and then becomes postrider.
pub(crate) fn run_under(program: &[&str], arguments: &[&str]) -> Ended {
    let output = command(program, arguments).stdin(Stdio::null()).output().expect("the binary starts");
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A file for `--config`.
pub(crate) fn write_config(directory: &Path, text: &str) -> PathBuf {
    let path = directory.join("postrider.toml");
    std::fs::write(&path, text).expect("a temporary directory is writable");
    path
}

/// Everything to one sink, and a spool on whatever file system the temporary directory has.
pub(crate) fn to_sink(sink: SocketAddr) -> String {
    format!("{BASE}\n[[route]]\ndomain = \"*\"\nto = [\"{sink}\"]\n")
}

const BASE: &str = "hostname = \"mta.test\"\nshards = 2\nshutdown_grace = \"10s\"\n\
                    [spool]\npath = \"spool\"\nallow_filesystem = true\n";

pub(crate) const LISTENERS: &str = "[[listener]]\nprotocol = \"smtp\"\naddress = \"127.0.0.1:0\"\n\
                         [[listener]]\nprotocol = \"http\"\naddress = \"127.0.0.1:0\"\n";

fn command(program: &[&str], arguments: &[&str]) -> Command {
    let words: Vec<&str> = [program, &[env!("CARGO_BIN_EXE_postrider")], arguments].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("NO_COLOR", "1").env_remove("POSTRIDER_LOG").env_remove("RUST_LOG");
    command
}

/// The address in a line such as `… listening protocol="smtp" address=127.0.0.1:40001`.
fn listening(line: &str, protocol: &str) -> Option<SocketAddr> {
    let line = line.replace('"', "");
    if !line.contains("listening") || !line.contains(&format!("protocol={protocol}")) {
        return None;
    }
    let address = line.split("address=").nth(1)?;
    address.split_whitespace().next()?.parse().ok()
}
