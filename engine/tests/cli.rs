//! The `postrider` program from outside: what it prints, and its exit codes.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test stops at the first surprise, and drives the world itself"
)]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

fn postrider(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_postrider"));
    command.args(arguments).current_dir(directory).stdin(Stdio::null());
    for variable in ["POSTRIDER_LOG", "RUST_LOG", "NOTIFY_SOCKET", "JOURNAL_STREAM"] {
        command.env_remove(variable);
    }
    command
}

fn run(directory: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = postrider(directory, arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn version_and_help_end_with_0() {
    let directory = tempfile::tempdir().unwrap();
    let version = format!("postrider {}\n", env!("CARGO_PKG_VERSION"));
    for arguments in ["version", "--version"] {
        assert_eq!(run(directory.path(), &[arguments]), (Some(0), version.clone(), String::new()));
    }
    let (code, stdout, stderr) = run(directory.path(), &["--help"]);
    assert_eq!((code, stderr), (Some(0), String::new()));
    let expected = "\
Outbound mail delivery engine

Usage: postrider <COMMAND>

Commands:
  serve    Accept mail by SMTP, keep it durably and deliver it, until SIGTERM
  demo     Send, sign, deliver and verify generated mail, all in this process
  check    Check a configuration and print what it amounts to, defaults included
  version  Print the version

Options:
  -h, --help     Print help
  -V, --version  Print version
";
    assert_eq!(stdout, expected);
}

#[test]
fn wrong_usage_ends_with_2() {
    let directory = tempfile::tempdir().unwrap();
    for arguments in [
        &[][..],
        &["deliver"],
        &["serve", "--port", "25"],
        &["check", "--config"],
        &["demo", "--messages", "0"],
        &["demo", "--messages", "many"],
        &["demo", "--sessions", "501"],
    ] {
        let (code, stdout, stderr) = run(directory.path(), arguments);
        assert_eq!((code, stdout), (Some(2), String::new()), "{arguments:?}");
        assert!(!stderr.is_empty());
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "nothing was created");
}

#[test]
fn check_tells_what_a_configuration_amounts_to() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("good.toml"), "hostname = \"mta.example.com\"\nspool.allow_filesystem = true\n")
        .unwrap();
    let (code, stdout, stderr) = run(directory.path(), &["check", "--config", "good.toml"]);
    assert_eq!((code, stderr), (Some(0), String::new()));
    assert!(stdout.starts_with("hostname  mta.example.com\n"), "{stdout}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "check creates nothing");
}

/// TEST-NET-1 (RFC 5737) is nobody's.
#[test]
fn check_warns_of_a_source_whose_address_is_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let source =
        |name: &str, address: &str| format!("[[egress_source]]\nname = \"{name}\"\nsource_address = \"{address}\"\n");
    let pool = "[[egress_pool]]\nname = \"default\"\nsources = [{ source = \"here\" }, { source = \"gone\" }]\n";
    let text = [
        "hostname = \"mta.example.com\"\nspool.allow_filesystem = true\n",
        &source("here", "127.0.0.1"),
        &source("gone", "192.0.2.1"),
        pool,
    ];
    fs::write(directory.path().join("sources.toml"), text.concat()).unwrap();
    let (code, stdout, _) = run(directory.path(), &["check", "--config", "sources.toml"]);
    assert_eq!(code, Some(0));
    let warnings: Vec<&str> = stdout.lines().filter(|line| line.starts_with("warning: egress source")).collect();
    let expected =
        "warning: egress source \"gone\": this machine does not have 192.0.2.1; nothing goes by it until it has";
    assert_eq!(warnings, [expected]);
}

#[test]
fn every_configuration_error_is_told_with_its_place_and_ends_with_2() {
    let directory = tempfile::tempdir().unwrap();
    let text = "hostnam = \"mta.example.com\"\nspool.allow_filesystem = true\n\n[retry]\nmax_age = 5\n";
    fs::write(directory.path().join("bad.toml"), text).unwrap();
    let expected = "\
bad.toml:1:1: hostnam: is not a known key; did you mean hostname?
bad.toml:5:11: retry.max_age: 5 has no unit; write for example max_age = \"5d\"
";
    for command in ["check", "serve"] {
        let (code, stdout, stderr) = run(directory.path(), &[command, "--config", "bad.toml"]);
        assert_eq!((code, &*stdout, &*stderr), (Some(2), "", expected), "{command}");
    }
}

#[test]
fn a_configuration_that_is_not_there_ends_with_2() {
    let directory = tempfile::tempdir().unwrap();
    for command in ["check", "serve"] {
        let (code, stdout, stderr) = run(directory.path(), &[command, "--config", "absent.toml"]);
        assert_eq!((code, stdout), (Some(2), String::new()));
        assert!(stderr.starts_with("absent.toml: ") && stderr.lines().count() == 1, "{stderr}");
    }
}

/// A configuration of its own spool, on ports that the kernel chooses where none is given.
fn configuration(directory: &Path, smtp: &str, http: &str) {
    let text = format!(
        "hostname = \"mta.example.com\"\nspool = {{ path = \"spool\", allow_filesystem = true }}\n\
         [[listener]]\nprotocol = \"smtp\"\naddress = \"{smtp}\"\n\
         [[listener]]\nprotocol = \"http\"\naddress = \"{http}\"\n"
    );
    fs::write(directory.join("postrider.toml"), text).unwrap();
}

#[test]
fn a_port_in_use_is_named_and_ends_with_1() {
    let occupant = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = occupant.local_addr().unwrap().to_string();
    for (smtp, http) in [(&*address, "127.0.0.1:0"), ("127.0.0.1:0", &*address)] {
        let directory = tempfile::tempdir().unwrap();
        configuration(directory.path(), smtp, http);
        let (code, stdout, stderr) = run(directory.path(), &["serve", "--config", "postrider.toml"]);
        assert_eq!((code, stdout), (Some(1), String::new()), "{stderr}");
        let last = stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("postrider: ") && last.contains(&address), "{stderr}");
    }
}

#[test]
fn a_spool_that_is_in_use_is_named_and_ends_with_1() {
    let directory = tempfile::tempdir().unwrap();
    configuration(directory.path(), "127.0.0.1:0", "127.0.0.1:0");
    let service = Service::start(directory.path());
    let (code, _, stderr) = run(directory.path(), &["serve", "--config", "postrider.toml"]);
    assert_eq!(code, Some(1));
    let last = stderr.lines().last().unwrap_or_default();
    assert!(last.starts_with("postrider: spool ") && last.contains("spool"), "{stderr}");
    assert!(service.end("-TERM").success());
}

/// A running `postrider serve`.
struct Service {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
    smtp: String,
    http: String,
}

impl Service {
    /// Returns when both addresses were logged.
    fn start(directory: &Path) -> Self {
        Self::start_as(postrider(directory, &["serve", "--config", "postrider.toml"]))
    }

    fn start_as(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut service = Self { child, log, smtp: String::new(), http: String::new() };
        service.smtp = service.address("protocol=\"smtp\"");
        service.http = service.address("protocol=\"http\"");
        service
    }

    fn address(&mut self, protocol: &str) -> String {
        let line = self.line(protocol);
        let address = line.split("address=").nth(1).unwrap_or_default();
        assert!(line.contains("listening"), "{line}");
        address.trim().to_owned()
    }

    /// The next line of the log that holds `text`.
    fn line(&mut self, text: &str) -> String {
        let mut log = String::new();
        loop {
            let start = log.len();
            assert!(self.log.read_line(&mut log).unwrap() > 0, "{text} did not come; the log is:\n{log}");
            if log[start..].contains(text) {
                return log[start..].to_owned();
            }
        }
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    fn end(mut self, signal: &str) -> ExitStatus {
        self.signal(signal);
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It has ended, unless a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn serve_logs_its_addresses_and_ends_with_0_on_a_signal() {
    for signal in ["-TERM", "-INT"] {
        let directory = tempfile::tempdir().unwrap();
        configuration(directory.path(), "127.0.0.1:0", "127.0.0.1:0");
        let mut service = Service::start(directory.path());

        let mut greeting = String::new();
        BufReader::new(TcpStream::connect(&service.smtp).unwrap()).read_line(&mut greeting).unwrap();
        assert_eq!(greeting, "220 mta.example.com ESMTP Postrider\r\n");

        let mut http = TcpStream::connect(&service.http).unwrap();
        http.write_all(b"GET /api/check-liveness/v1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        http.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");

        service.signal("-HUP");
        service.line("the configuration has not changed");
        assert_eq!(service.end(signal).code(), Some(0));
    }
}

/// What the engine answers to `POST /api/admin/reload/v1`: the status, and the body.
fn reload(http: &str) -> (u16, String) {
    let mut http = TcpStream::connect(http).unwrap();
    let request =
        "POST /api/admin/reload/v1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    http.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    http.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn greeting(smtp: &str) -> String {
    let mut greeting = String::new();
    BufReader::new(TcpStream::connect(smtp).unwrap()).read_line(&mut greeting).unwrap();
    greeting
}

#[test]
fn a_changed_file_is_taken_up_and_a_faulty_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    configuration(directory.path(), "127.0.0.1:0", "127.0.0.1:0");
    let file = directory.path().join("postrider.toml");
    let good = fs::read_to_string(&file).unwrap();
    let mut service = Service::start(directory.path());
    let (status, body) = reload(&service.http);
    assert!(status == 200 && body.starts_with("{\"added\":[],\"removed\":[],\"changed\":[],\"since\":"), "{body}");

    // By HTTP: what a start would use, and what it would not.
    let changed = good.replace("mta.example.com", "new.example.com") + "[[tenant]]\nname = \"acme\"\n";
    fs::write(&file, &changed).unwrap();
    let (status, body) = reload(&service.http);
    assert_eq!(status, 200, "{body}");
    let told = "{\"added\":[\"tenant \\\"acme\\\"\"],\"removed\":[],\"changed\":[\"egress_source \\\"unspecified\\\"\",\
                \"hostname\"],\"since\":";
    assert!(body.starts_with(told), "{body}");
    assert_eq!(greeting(&service.smtp), "220 new.example.com ESMTP Postrider\r\n");

    fs::write(&file, changed.replace("name = \"acme\"", "nam = \"acme\"")).unwrap();
    let (status, body) = reload(&service.http);
    assert_eq!(status, 422, "{body}");
    let errors = run(directory.path(), &["check", "--config", "postrider.toml"]).2;
    assert_eq!(errors.lines().count(), 2, "{errors}");
    for line in errors.lines() {
        assert!(body.contains(&line.replace('"', "\\\"")), "{line} in {body}");
    }
    fs::write(&file, format!("shards = 3\n{changed}")).unwrap();
    let (status, body) = reload(&service.http);
    assert!(status == 409 && body.contains("shards: a change of it needs a restart"), "{body}");
    assert_eq!(greeting(&service.smtp), "220 new.example.com ESMTP Postrider\r\n");

    // Of an HTTP listener too: the next call needs the token.
    let token = format!("admin_tokens = [\"sha256:{}\"]\n[[tenant]]", "ab".repeat(32));
    fs::write(&file, changed.replace("[[tenant]]", &token)).unwrap();
    assert_eq!(reload(&service.http).0, 200);
    assert_eq!(reload(&service.http).0, 401);

    // By SIGHUP.
    fs::write(&file, format!("shards = 3\n{changed}")).unwrap();
    service.signal("-HUP");
    service.line("shards: a change of it needs a restart");
    service.line("all is as it was");
    fs::write(&file, &good).unwrap();
    service.signal("-HUP");
    service.line("the configuration is in force");
    assert_eq!(greeting(&service.smtp), "220 mta.example.com ESMTP Postrider\r\n");
    assert_eq!(service.end("-TERM").code(), Some(0));
}

/// sd_notify(3): RELOADING=1 with the time, then READY=1 again.
#[test]
fn the_supervisor_hears_of_a_reload() {
    let directory = tempfile::tempdir().unwrap();
    configuration(directory.path(), "127.0.0.1:0", "127.0.0.1:0");
    let notify = directory.path().join("notify");
    let told = UnixDatagram::bind(&notify).unwrap();
    // Only so that a failure ends.
    told.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let heard = || {
        let mut message = [0; 256];
        let length = told.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let mut command = postrider(directory.path(), &["serve", "--config", "postrider.toml"]);
    let command = command.env("NOTIFY_SOCKET", &notify).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    assert_eq!(heard(), "READY=1");
    let kill = |signal: &str| {
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success())
    };
    kill("-HUP");
    let reloading = heard();
    let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect(&reloading);
    assert!(time.parse::<u64>().is_ok_and(|time| time > 0), "{reloading}");
    assert_eq!(heard(), "READY=1");
    kill("-TERM");
    assert_eq!(heard(), "STOPPING=1");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// A log on a full disk is no reason to end: standard error takes nothing, and systemd hears all the same that it runs.
#[test]
fn a_log_that_cannot_be_written_does_not_end_the_engine() {
    let directory = tempfile::tempdir().unwrap();
    configuration(directory.path(), "127.0.0.1:0", "127.0.0.1:0");
    let notify = directory.path().join("notify");
    let told = UnixDatagram::bind(&notify).unwrap();
    // Only so that a failure ends.
    told.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = postrider(directory.path(), &["serve", "--config", "postrider.toml"]);
    let mut child = command.env("NOTIFY_SOCKET", &notify).stdout(Stdio::null()).stderr(full).spawn().unwrap();
    let mut message = [0; 256];
    let length = told.recv(&mut message).unwrap();
    assert!(message[..length].starts_with(b"READY=1"), "{}", String::from_utf8_lossy(&message[..length]));
    let status = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// A limit of what a file may hold (`LimitFSIZE=`) is told and not died of; what is there goes on.
#[test]
fn a_limit_of_file_sizes_is_told() {
    let directory = tempfile::tempdir().unwrap();
    configuration(directory.path(), "127.0.0.1:0", "127.0.0.1:0");
    let mut command = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_postrider");
    // In blocks of 512 octets: a segment is larger.
    command.args(["-c", "ulimit -f 2000; exec \"$0\" serve --config postrider.toml", program]);
    command.current_dir(directory.path()).stdin(Stdio::null()).env_remove("NOTIFY_SOCKET").env_remove("POSTRIDER_LOG");
    let mut service = Service::start_as(command);
    let line = service.line("a file of the spool can't be made");
    assert!(line.contains("segment") && line.contains("File too large"), "{line}");
    assert!(greeting(&service.smtp).starts_with("220 "), "whoever asks is told to try again later");
    assert_eq!(service.end("-TERM").code(), Some(0));
}

#[test]
fn a_small_demo_verifies_all_its_messages_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = postrider(directory.path(), &["demo", "--messages", "150", "--sessions", "7"]);
    let Output { status, stdout, stderr } = command.env("TMPDIR", directory.path()).output().unwrap();
    let stdout = String::from_utf8(stdout).unwrap();
    let log = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(0), "{stdout}{log}");
    let verdict = "150 of 150 messages verified: each arrived once, octet for octet, with valid signatures.";
    assert_eq!(stdout.lines().last(), Some(verdict), "{log}");
    assert!(stdout.contains("Reception 150, Delivery 150\n"), "{stdout}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "the spool was removed");
}
