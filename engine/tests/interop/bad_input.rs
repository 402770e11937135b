//! Bad input gets a clear reply or exit code, and good mail goes through all the while.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::client::{Client, submit};
use crate::support::process::{self, Postrider, to_sink, write_config};
use crate::support::sink::{Sink, Verb};
use crate::support::{PATIENCE, http, message, poll, token};
use crate::tools;

struct Serving {
    _directory: tempfile::TempDir,
    sink: Sink,
    postrider: Postrider,
}

impl Serving {
    fn start(more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let sink = Sink::start();
        let postrider = Postrider::start(directory.path(), &format!("{}{more}", to_sink(sink.address())));
        Self { _directory: directory, sink, postrider }
    }

    /// Good mail goes through, and the engine ends cleanly.
    fn end(self) {
        submit(self.postrider.smtp(), "s@sender.test", &["a@sink.test"], &message("good"));
        assert_eq!(token(&self.sink.next().content), "good");
        self.postrider.terminate();
        assert!(self.sink.taken_so_far().is_empty(), "nothing else was accepted");
    }
}

#[test]
fn garbage_commands() {
    let serving = Serving::start("");
    let mut client = Client::connect(serving.postrider.smtp()).unwrap();
    for garbage in ["\u{1}\u{2}\u{3}", "", "MAIL", "RCPT TO:<a@b.test>", "DATA", "XYZZY é"] {
        let reply = client.command(garbage).unwrap();
        assert!((500..=555).contains(&reply.code), "{garbage:?}: {reply}");
    }
    let mut last = client.command("EHLO client.test").unwrap();
    assert_eq!(last.code, 250, "the session is as good as before: {last}");
    for _ in 0..100 {
        last = client.command("VERB").unwrap();
        if last.code == 421 {
            break;
        }
    }
    assert_eq!(last.code, 421, "after too many errors the session ends");
    assert_eq!(client.rest().unwrap_or_default(), "");

    let mut browser = Client::connect(serving.postrider.smtp()).unwrap();
    let reply = browser.command("GET / HTTP/1.1").unwrap();
    assert!((400..=599).contains(&reply.code), "{reply}");
    assert_eq!(browser.rest().unwrap_or_default(), "", "a page's script gets no further");

    let mut binary = TcpStream::connect(serving.postrider.smtp()).unwrap();
    let noise: Vec<u8> = (0..200_000).map(|_| fastrand::u8(..)).collect();
    // It may be closed on before all is written.
    let _ = binary.write_all(&noise);
    serving.end();
}

#[test]
fn over_long_lines() {
    let serving = Serving::start("");
    let mut client = Client::ready(serving.postrider.smtp()).unwrap();
    let reply = client.command(&format!("NOOP {}", "x".repeat(1 << 20))).unwrap();
    assert_eq!(reply.code, 500, "{reply}");
    let long = format!("MAIL FROM:<{}@sender.test>", "x".repeat(3_000));
    let reply = client.command(&long).unwrap();
    assert!((500..=553).contains(&reply.code), "{reply}");
    // A line of content has no business being so long (RFC 5321 §4.5.3.1.6), but it is not ours to refuse.
    let content = [&*message("good"), format!("{}\r\n", "x".repeat(100_000)).as_bytes()].concat();
    let reply = client.send("s@sender.test", &["a@sink.test"], &content).unwrap();
    if reply.code == 250 {
        assert_eq!(token(&serving.sink.next().content), "good");
    } else {
        assert!((500..=554).contains(&reply.code), "{reply}");
    }
    assert_eq!(client.command("NOOP").unwrap().code, 250, "the session goes on");
    serving.end();
}

#[test]
fn over_size_messages() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let listeners = "[[listener]]\nprotocol = \"smtp\"\naddress = \"127.0.0.1:0\"\nmax_message_size = \"100KiB\"\n\
                     [[listener]]\nprotocol = \"http\"\naddress = \"127.0.0.1:0\"\n";
    let config = write_config(directory.path(), &format!("{}{listeners}", to_sink(sink.address())));
    let postrider = Postrider::start_file(&config);
    let mut client = Client::ready(postrider.smtp()).unwrap();
    let reply = client.command("MAIL FROM:<s@sender.test> SIZE=200000").unwrap();
    assert_eq!((reply.code, &reply.text[..5]), (552, "5.3.4"), "said beforehand: {reply}");
    let mut large = message("large");
    large.resize(large.len() + 200_000, b'x');
    large.extend(b"\r\n");
    let reply = client.send("s@sender.test", &["a@sink.test"], &large).unwrap();
    assert_eq!((reply.code, &reply.text[..5]), (552, "5.3.4"), "found out: {reply}");
    let serving = Serving { _directory: directory, sink, postrider };
    serving.end();
}

/// Connections that say nothing, or stop amid a message, hold nobody else up.
#[test]
fn half_open_connections() {
    let serving = Serving::start("");
    let count = tools::half_open().min(descriptors().saturating_sub(500));
    let mut silent = Vec::new();
    for number in 0..count {
        let stream = TcpStream::connect(serving.postrider.smtp()).unwrap();
        if number % 2 == 0 {
            (&stream).write_all(b"EHLO client.test\r\nMAIL FROM:<s@s.te").unwrap();
        }
        silent.push(stream);
    }
    poll("all are served", || (connections(&serving.postrider) >= count as u64).then_some(()));
    println!("{count} half-open connections");
    submit(serving.postrider.smtp(), "s@sender.test", &["a@sink.test"], &message("amid"));
    assert_eq!(token(&serving.sink.next().content), "amid");
    drop(silent);
    poll("they are gone", || (connections(&serving.postrider) == 0).then_some(()));
    serving.end();
}

/// More connections than descriptors: the listener waits, and doesn't spin; later comers are served when others go.
#[test]
fn too_few_descriptors() {
    let Some(prlimit) = tools::program("prlimit", "Debian: util-linux") else { return };
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let config = write_config(directory.path(), &format!("{}{}", to_sink(sink.address()), process::LISTENERS));
    let postrider = Postrider::start_under(&[&prlimit.to_string_lossy(), "--nofile=100:100"], &config);
    let connect = |_| TcpStream::connect(postrider.smtp()).unwrap();
    let silent: Vec<TcpStream> = (0..300).map(connect).collect();
    silent[0].set_read_timeout(Some(PATIENCE)).unwrap();
    (&silent[0]).read_exact(&mut [0; 4]).expect("the first is greeted");

    let measured = Duration::from_secs(1);
    let (begun, before) = (Instant::now(), cpu_ticks(postrider.pid()));
    poll("a while", || (begun.elapsed() >= measured).then_some(()));
    let ticks = cpu_ticks(postrider.pid()) - before;
    assert!(ticks < 40, "it spins: {ticks} hundredths of a second of CPU in {measured:?}");
    drop(silent);
    let serving = Serving { _directory: directory, sink, postrider };
    serving.end();
}

/// User and system time of a process, in hundredths of a second.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name, in parentheses, may hold anything.
    let numbers = stat.rsplit_once(')').unwrap().1.split_whitespace();
    numbers.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

fn connections(postrider: &Postrider) -> u64 {
    http::json(postrider.http(), "/api/admin/status/v1")["connections_in"].as_u64().unwrap()
}

/// As many descriptors as this process may have, after asking for more.
fn descriptors() -> usize {
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let limit = |place| line.split_whitespace().nth(place).unwrap().to_owned();
    let (soft, hard) = (limit(3), limit(4));
    let mut raise = Command::new("prlimit");
    raise.args(["--pid", &std::process::id().to_string(), &format!("--nofile={hard}:")]);
    // Without the program the limit stays as it is.
    let raised = raise.output().is_ok_and(|output| output.status.success());
    if raised { hard } else { soft }.parse().unwrap()
}

/// The kernel, or a container's filter, may forbid what the engine runs on: it says which, and ends with 1.
#[test]
fn io_uring_forbidden() {
    let Some(python) = tools::python("ctypes") else { return };
    let script = tools::script("without_io_uring.py");
    let directory = tempfile::tempdir().unwrap();
    let sink: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let config = write_config(directory.path(), &format!("{}{}", to_sink(sink), process::LISTENERS));
    let program = [&*python.to_string_lossy(), &*script.to_string_lossy()];
    let ended = process::run_under(&program, &["serve", "--config", &config.to_string_lossy()]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for word in ["io_uring", "seccomp", "kernel.io_uring_disabled"] {
        assert!(ended.stderr.contains(word), "{word} in: {}", ended.stderr);
    }
}

#[test]
fn a_port_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let listener = format!("[[listener]]\nprotocol = \"smtp\"\naddress = \"{address}\"\n");
    let sink: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let config = write_config(directory.path(), &format!("{}{listener}", to_sink(sink)));
    let ended = process::run(&["serve", "--config", &config.to_string_lossy()]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains(&address.to_string()), "it says which: {}", ended.stderr);
    assert!(ended.stderr.contains("in use"), "and why: {}", ended.stderr);
}

/// The error names the file, the line, the column, the key, and what to do.
#[test]
fn an_unreadable_key() {
    let sink: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let dkim = "[[dkim]]\ndomain = \"sender.test\"\nselector = \"s1\"\nkey = \"s1.pem\"\n";
    let missing: fn(&Path) = |_| {};
    let directory_instead: fn(&Path) = |path| fs::create_dir(path).unwrap();
    let no_key: fn(&Path) =
        |path| fs::write(path, "-----BEGIN PRIVATE KEY-----\nbm8ga2V5\n-----END PRIVATE KEY-----\n").unwrap();
    let forbidden: fn(&Path) = |path| {
        fs::write(path, "").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    };
    for make in [missing, directory_instead, no_key, forbidden] {
        let directory = tempfile::tempdir().unwrap();
        make(&directory.path().join("s1.pem"));
        let text = format!("{}{dkim}", to_sink(sink));
        let config = write_config(directory.path(), &text);
        let line = text.lines().position(|line| line.starts_with("key =")).unwrap() + 1;
        for verb in ["serve", "check"] {
            let ended = process::run(&[verb, "--config", &config.to_string_lossy()]);
            assert_eq!(ended.code, Some(2), "{ended:?}");
            assert!(ended.stderr.contains(&format!("postrider.toml:{line}:")), "it says where: {}", ended.stderr);
            assert!(ended.stderr.contains("s1.pem"), "and which file: {}", ended.stderr);
        }
    }
}

#[test]
fn a_wrong_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let config = write_config(directory.path(), "hostnam = \"mta.test\"\n[retry]\nretry_interval = 20\n");
    let ended = process::run(&["check", "--config", &config.to_string_lossy()]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    for place in ["postrider.toml:1:1", "postrider.toml:3:"] {
        assert!(ended.stderr.contains(place), "{place} in:\n{}", ended.stderr);
    }
    assert_eq!(process::run(&["serve", "--no-such-option"]).code, Some(2));
}

/// `max_size` stands for a full disk: 452, nothing accepted is lost, and mail is taken again when space returns.
#[test]
fn a_full_spool() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Connect, "421 4.3.2 Not now");
    let retry = "[retry]\nretry_interval = [\"1s\"]\n";
    let config = to_sink(sink.address()).replace("[spool]\n", "[spool]\nmax_size = \"16MiB\"\n") + retry;
    let postrider = Postrider::start(directory.path(), &config);
    let mut large = message("large");
    large.extend(std::iter::repeat_n(*b"0123456789abcdef0123456789abcdef\r\n", 30_000).flatten());
    let mut client = Client::ready(postrider.smtp()).unwrap();
    let mut accepted = 0;
    let refusal = loop {
        let reply = client.send("s@sender.test", &["a@sink.test"], &large).unwrap();
        if reply.code != 250 {
            break reply;
        }
        accepted += 1;
        assert!(accepted < 100, "100 messages of 1 MB are more than 16 MiB");
    };
    assert_eq!((refusal.code, &refusal.text[..5]), (452, "4.3.1"), "{refusal}");
    let (status, _) = http::get(postrider.http(), "/api/check-liveness/v1").unwrap();
    assert_eq!(status, 200, "but it lives");
    sink.recover();
    assert_eq!(sink.take(accepted).len(), accepted);
    poll("it takes mail again", || {
        let reply = client.send("s@sender.test", &["a@sink.test"], &large).unwrap();
        (reply.code == 250).then_some(())
    });
    sink.next();
    postrider.terminate();
    assert!(sink.taken_so_far().is_empty());
}
