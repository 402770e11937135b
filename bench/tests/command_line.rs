//! The `postbench` commands as a user runs them.

#![expect(clippy::unwrap_used, reason = "clippy takes only the test functions themselves for tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStderr, Command, Stdio};

use serde_json::Value;

const POSTBENCH: &str = env!("CARGO_BIN_EXE_postbench");

/// A sink process on a free port.
struct SinkProcess {
    child: Child,
    stderr: BufReader<ChildStderr>,
    address: SocketAddr,
}

impl SinkProcess {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(POSTBENCH);
        command.args(["sink", "--listen", "127.0.0.1:0", "--quiet"]).args(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap().parse().unwrap();
        Self { child, stderr, address }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    fn finish(mut self) -> Value {
        let mut json = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut json).unwrap();
        assert!(self.child.wait().unwrap().success());
        serde_json::from_str(&json).unwrap()
    }
}

fn inject(to: SocketAddr, arguments: &[&str]) -> (bool, Value) {
    let mut command = Command::new(POSTBENCH);
    command.args(["inject", &to.to_string(), "--json", "--sessions", "3"]).args(arguments);
    let output = command.output().unwrap();
    (output.status.success(), serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn a_sink_ends_when_it_has_what_it_expects() {
    let sink = SinkProcess::start(&["--expect", "60"]);
    let (success, injected) = inject(sink.address, &["--messages", "60"]);
    assert!(success);
    assert_eq!(injected["accepted"], 60);
    assert_eq!(injected["accept"]["count"], 60);
    let report = sink.finish();
    assert_eq!(report["messages"], 60);
    assert_eq!(report["duplicates"], 0);
    assert_eq!(report["connections"], 3);
    assert_eq!(report["peers"]["127.0.0.1"]["ehlo"]["postbench.test"], 3);
}

#[test]
fn a_sink_refuses_until_told_otherwise() {
    let mut sink = SinkProcess::start(&["--reply-rcpt", "451 4.2.1 busy"]);
    let (success, injected) = inject(sink.address, &["--messages", "5"]);
    assert!(!success);
    assert_eq!(injected["refused"], 5);
    assert_eq!(injected["trouble"], "451 4.2.1 busy");
    sink.signal("-USR1");
    let mut line = String::new();
    sink.stderr.read_line(&mut line).unwrap();
    assert_eq!(line, "refusing no more\n");
    let (success, injected) = inject(sink.address, &["--messages", "5"]);
    assert!(success);
    assert_eq!(injected["accepted"], 5);
    sink.signal("-TERM");
    let report = sink.finish();
    assert_eq!(report["messages"], 5);
    assert_eq!(report["refused"]["rcpt"], 5);
}

#[test]
fn a_dumped_message_is_what_was_sent() {
    let directory = tempfile::tempdir().unwrap();
    let sink = SinkProcess::start(&["--dump", directory.path().to_str().unwrap(), "--expect", "1"]);
    let mut session = b"EHLO me\r\nMAIL FROM:<a@b> BODY=8BITMIME\r\nRCPT TO:<c@d>\r\nDATA\r\n".to_vec();
    session.extend_from_slice(b"X: y\r\n\r\n..\r\n\xff\r\n.\r\nQUIT\r\n");
    let mut stream = TcpStream::connect(sink.address).unwrap();
    stream.write_all(&session).unwrap();
    let mut replies = String::new();
    stream.read_to_string(&mut replies).unwrap();
    assert!(replies.contains("354 ") && replies.ends_with("221 2.0.0 Bye\r\n"), "{replies}");
    sink.finish();
    assert_eq!(std::fs::read(directory.path().join("00000001.eml")).unwrap(), b"X: y\r\n\r\n.\r\n\xff\r\n");
    let envelope = std::fs::read_to_string(directory.path().join("00000001.json")).unwrap();
    let envelope: Value = serde_json::from_str(&envelope).unwrap();
    assert_eq!(envelope["mail"], "<a@b> BODY=8BITMIME");
    assert_eq!(envelope["rcpt"][0], "<c@d>");
    assert_eq!(envelope["ehlo"], "me");
}

#[test]
fn mistakes_on_the_command_line_are_exit_code_2() {
    let exit_code = |arguments: &[&str]| {
        let output = Command::new(POSTBENCH).args(arguments).output().unwrap();
        assert!(!output.stderr.is_empty(), "{arguments:?}");
        output.status.code()
    };
    assert_eq!(exit_code(&["inject", "--size", "2 parsecs"]), Some(2));
    assert_eq!(exit_code(&["sink", "--listen", "nowhere"]), Some(2));
    assert_eq!(exit_code(&["sink", "--reply-rcpt", "busy"]), Some(2));
    assert_eq!(exit_code(&["relay", "--injector", "smtp-source:/no/such/file"]), Some(2));
    assert_eq!(exit_code(&["relay", "--engine", "/no/such/engine"]), Some(1));
}
