//! Odd but valid mail survives: CPython's own collection of test messages, and some more, sent by swaks and smtplib
//! through postrider to aiosmtpd.
//!
//! Each client also sends to the sink directly. What came the long way has to equal what came the short way, but for
//! what docs/smtp.md says is put in front and removed.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::{fs, thread};

use crate::support::PATIENCE;
use crate::support::process::{Postrider, to_sink};
use crate::tools::{self, Server};

/// A message that came the short way goes to this domain.
const DIRECT: &str = "direct.test";
const RELAYED: &str = "relayed.test";

#[test]
fn sent_by_smtplib() {
    let Some(Setup { directory, messages, sink, postrider, python }) = Setup::new() else { return };
    let mut command = Command::new(python);
    command.arg(tools::script("send_smtplib.py")).arg(directory.path().join("messages")).arg("smtplib");
    command.args([&sink.port.to_string(), DIRECT, &postrider.smtp().port().to_string(), RELAYED]);
    tools::run(&mut command);
    sink.compare(&messages, "smtplib");
    postrider.terminate();
}

#[test]
fn sent_by_swaks() {
    let Some(swaks) = tools::program("swaks", "Debian: swaks") else { return };
    let Some(Setup { directory, messages, sink, postrider, python: _ }) = Setup::new() else { return };
    for (port, domain) in [(sink.port, DIRECT), (postrider.smtp().port(), RELAYED)] {
        for name in &messages {
            let mut command = Command::new(&swaks);
            command.args(["--server", "127.0.0.1", "--port", &port.to_string(), "--hide-all", "--helo", "client.test"]);
            command.args(["--from", "sender@sender.test", "--to", &format!("{name}.swaks@{domain}"), "--data"]);
            tools::run(command.arg(format!("@{}", directory.path().join("messages").join(name).display())));
        }
    }
    sink.compare(&messages, "swaks");
    postrider.terminate();
}

/// The messages in a directory, and everything running.
struct Setup {
    directory: tempfile::TempDir,
    messages: BTreeSet<String>,
    sink: AiosmtpdSink,
    postrider: Postrider,
    python: PathBuf,
}

impl Setup {
    fn new() -> Option<Self> {
        let python = tools::python("aiosmtpd.smtp")?;
        let corpus = cpython_messages()?;
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("messages");
        fs::create_dir(&folder).unwrap();
        for (name, content) in corpus.into_iter().chain(further_messages()) {
            fs::write(folder.join(name), with_crlf(&content)).unwrap();
        }
        let messages: BTreeSet<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let sink = AiosmtpdSink::start(&python, directory.path());
        let address = format!("127.0.0.1:{}", sink.port).parse().unwrap();
        let postrider = Postrider::start(directory.path(), &to_sink(address));
        Some(Self { directory, messages, sink, postrider, python })
    }
}

struct AiosmtpdSink {
    port: u16,
    folder: PathBuf,
    recipients: Receiver<String>,
    _server: Server,
}

impl AiosmtpdSink {
    fn start(python: &Path, directory: &Path) -> Self {
        let folder = directory.join("arrived");
        fs::create_dir(&folder).unwrap();
        let mut command = Command::new(python);
        command.arg(tools::script("aiosmtpd_sink.py")).arg(&folder).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let port = lines.next().and_then(|line| line.parse().ok()).expect("aiosmtpd tells its port");
        let (sender, recipients) = channel();
        thread::spawn(move || lines.try_for_each(|line| sender.send(line)));
        Self { port, folder, recipients, _server: Server(child) }
    }

    /// Waits for every message on both ways, and compares.
    fn compare(&self, messages: &BTreeSet<String>, client: &str) {
        let both = |name: &String| [DIRECT, RELAYED].map(|domain| format!("{name}.{client}@{domain}"));
        let mut awaited: BTreeSet<String> = messages.iter().flat_map(both).collect();
        while !awaited.is_empty() {
            let recipient = self.recipients.recv_timeout(PATIENCE);
            let recipient = recipient.unwrap_or_else(|_| panic!("these did not arrive: {awaited:?}"));
            assert!(awaited.remove(&recipient), "once, and to its own recipient: {recipient}");
        }
        let read = |name: &str| fs::read(self.folder.join(name)).unwrap();
        for name in messages {
            let [direct, relayed] = both(name);
            assert_eq!(read(&format!("{relayed}.sender")), b"sender@sender.test");
            if let Err(difference) = compare(&read(&direct), &read(&relayed)) {
                let show = |content: Vec<u8>| String::from_utf8_lossy(&content).into_owned();
                panic!(
                    "{name}: {difference}\n--- sent\n{}\n--- arrived\n{}",
                    show(read(&direct)),
                    show(read(&relayed))
                );
            }
        }
        println!("{} messages by {client} arrived byte for byte", messages.len());
    }
}

/// Whether `arrived` is `sent` without the fields that are removed, behind the fields that are put in front.
fn compare(sent: &[u8], arrived: &[u8]) -> Result<(), String> {
    const REMOVED: [&str; 7] = ["x-tenant", "x-campaign", "x-job", "x-virtual-mta", "x-schedule", "return-path", "bcc"];
    let (fields, body) = fields(sent);
    let kept = fields.iter().filter(|field| !REMOVED.contains(&name(field).as_str()));
    let expected = [kept.flat_map(|field| field.iter().copied()).collect(), body.to_vec()].concat();
    let front = arrived.strip_suffix(&*expected).ok_or("the rest is not as it was sent")?;

    let (added, behind) = self::fields(front);
    let mut added: Vec<String> = added.iter().map(|field| name(field)).collect();
    let has = |wanted: &str| fields.iter().any(|field| name(field) == wanted);
    let mut wanted = vec!["received", "x-postrider-ref"];
    wanted.extend(["date", "message-id"].into_iter().filter(|field| !has(field)));
    if added.first().is_none_or(|first| first != "received") {
        return Err(format!("Received is not on top: {added:?}"));
    }
    // What has no header gets one, and so the empty line that ends it.
    let expected_behind: &[u8] = if fields.is_empty() && !body.starts_with(b"\r\n") { b"\r\n" } else { b"" };
    if behind != expected_behind {
        return Err(format!("between header and body: {:?}", String::from_utf8_lossy(behind)));
    }
    added.sort();
    wanted.sort_unstable();
    if added == wanted { Ok(()) } else { Err(format!("added: {added:?}, and not {wanted:?}")) }
}

/// Header fields with their continuation lines, and the rest, from the empty line on or from what is no header.
fn fields(content: &[u8]) -> (Vec<&[u8]>, &[u8]) {
    let mut fields: Vec<(usize, usize)> = Vec::new();
    let mut at = 0;
    for line in content.split_inclusive(|&octet| octet == b'\n') {
        let folded = line.starts_with(b" ") || line.starts_with(b"\t");
        match fields.last_mut() {
            Some(field) if folded => field.1 += line.len(),
            // The separator line of a mailbox file is none, but what follows it is the header all the same.
            _ if is_field(line) || at == 0 && line.starts_with(b"From ") => fields.push((at, at + line.len())),
            _ => break,
        }
        at += line.len();
    }
    (fields.into_iter().map(|(start, end)| &content[start..end]).collect(), &content[at..])
}

/// RFC 5322 §3.6.8: printable US-ASCII but the colon; white space before the colon is of old (§4.5.8).
fn is_field(line: &[u8]) -> bool {
    let Some(colon) = line.iter().position(|&octet| octet == b':') else { return false };
    let name = line[..colon].trim_ascii_end();
    !name.is_empty() && name.iter().all(u8::is_ascii_graphic)
}

fn name(field: &[u8]) -> String {
    let name = field.split(|&octet| octet == b':').next().unwrap_or_default();
    String::from_utf8_lossy(name.trim_ascii_end()).to_ascii_lowercase()
}

/// The messages that CPython tests its email package with. Not every distribution's Python comes with its tests.
fn cpython_messages() -> Option<Vec<(String, Vec<u8>)>> {
    let python = tools::python("test.test_email")?;
    let find = "import os, test.test_email as t; print(os.path.join(os.path.dirname(t.__file__), 'data'))";
    let folder = tools::run(Command::new(python).args(["-c", find]));
    let is_message = |name: &str| name.starts_with("msg_") && name.ends_with(".txt");
    let mut messages: Vec<(String, Vec<u8>)> = fs::read_dir(folder.trim())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), path))
        .filter(|(name, _)| is_message(name))
        .map(|(name, path)| (name, fs::read(path).unwrap()))
        .collect();
    messages.sort();
    assert!(messages.len() > 40, "{} has CPython's messages: {}", folder.trim(), messages.len());
    Some(messages)
}

/// What CPython's collection lacks.
fn further_messages() -> Vec<(String, Vec<u8>)> {
    let long = "x".repeat(998);
    let head = "From: a@sender.test\nTo: b@c.test\nDate: Sun, 1 Nov 2026 12:00:00 +0000\nMessage-ID: <1@a.test>\n";
    let nested = "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=o\n\n--o\n\
                  Content-Type: multipart/alternative; boundary=i\n\n--i\n\none\n--i\nContent-Type: text/html\n\n\
                  <b>two</b>\n--i--\n\n--o\nContent-Type: message/rfc822\n\nFrom: c\n\n.\n--o--\n";
    let bodies: [(&str, Vec<u8>); 8] = [
        ("dots", b"\n.\n..\n...x\n. \n.".to_vec()),
        ("long", format!("\n{long}\n.{}\n", &long[1..]).into_bytes()),
        ("eight-bit", b"\nLatin-1 \xe4\xf6\xfc, no UTF-8 \xff\xfe\n".to_vec()),
        ("empty", b"\n".to_vec()),
        ("no-body", b"".to_vec()),
        ("no-final-newline", b"\nthe end".to_vec()),
        ("white-space", b"X-Folded: a\n \n\tb\nX-Empty:\nX-Old : c\n\n \n\t\n  trailing  \n\n\n".to_vec()),
        ("nested", nested.as_bytes().to_vec()),
    ];
    bodies.map(|(name, body)| (format!("more-{name}"), [head.as_bytes(), &*body].concat())).into()
}

fn with_crlf(content: &[u8]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(content.len() + content.len() / 32);
    for (place, &octet) in content.iter().enumerate() {
        if octet == b'\n' && (place == 0 || content[place - 1] != b'\r') {
            wire.push(b'\r');
        }
        wire.push(octet);
    }
    wire
}
