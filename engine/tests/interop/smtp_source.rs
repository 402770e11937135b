//! Postfix's smtp-source → postrider → Postfix's smtp-sink: everything arrives once, and both DKIM signatures of
//! every message verify with dkimpy.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use postrider::config::DkimKeyPem;

use crate::support::process::{Postrider, to_sink};
use crate::support::{event_log, http, poll_for};
use crate::tools;

const SESSIONS: usize = 20;
const DOMAIN: &str = "sender.test";

#[test]
fn with_a_connection_per_message() {
    relay(&[]);
}

/// `-d`: sessions are kept for the next message.
#[test]
fn with_kept_sessions() {
    relay(&["-d"]);
}

fn relay(options: &[&str]) {
    let Some(source) = tools::program("smtp-source", "Debian: postfix") else { return };
    let Some(sink) = tools::program("smtp-sink", "Debian: postfix") else { return };
    let Some(python) = tools::python("dkim, nacl") else { return };
    let count = tools::messages();
    let directory = tempfile::tempdir().unwrap();
    // smtp-sink drops its privileges and must still reach its dump files.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let dumps = directory.path().join("dumps");
    fs::create_dir(&dumps).unwrap();
    fs::set_permissions(&dumps, fs::Permissions::from_mode(0o777)).unwrap();

    let address = tools::free_address();
    let mut command = Command::new(sink);
    command.stdout(Stdio::null()).args(["-c", "-m", "1000", "-d", &format!("{}/m.", dumps.display())]);
    if is_root() {
        command.args(["-u", "nobody"]);
    }
    command.args([&address.to_string(), "1000"]);
    let sink = tools::Server::start(&mut command, address);
    let dkim = keys(directory.path());
    let postrider = Postrider::start(directory.path(), &format!("{}{dkim}", to_sink(address)));

    // -N puts a number in front of each recipient, so that each message is known by its recipient.
    let mut command = Command::new(source);
    command.args(["-s", &SESSIONS.to_string(), "-m", &count.to_string(), "-l", "2048", "-N"]).args(options);
    command.args(["-f", &format!("s@{DOMAIN}"), "-t", "r@sink.test", &postrider.smtp().to_string()]);
    tools::run(&mut command);
    let status = poll_for(tools::patience(), "all messages are delivered", || {
        let status = http::json(postrider.http(), "/api/admin/status/v1");
        (status["delivered"].as_u64() >= Some(count as u64) && status["recipients"] == 0).then_some(status)
    });
    assert_eq!((&status["delivered"], &status["failed"], &status["deferred"]), (&count.into(), &0.into(), &0.into()));
    postrider.terminate();
    drop(sink);

    let dumped = fs::read_dir(&dumps).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap());
    let recipients: Vec<String> = dumped.map(|dump| recipient(&dump)).collect();
    assert_eq!(recipients.len(), count, "each message arrived once: files");
    let distinct: BTreeSet<&String> = recipients.iter().collect();
    assert_eq!(distinct.len(), count, "each message arrived once: recipients");
    let finals = event_log::finals(&event_log::read(&directory.path().join("spool/events")));
    assert_eq!(finals.len(), count);
    assert!(finals.values().all(|&records| records == 1), "one final record each");

    let mut verify = Command::new(python);
    verify.arg(tools::script("verify_dkim.py")).arg(directory.path().join("dns.json")).arg(&dumps);
    let verified = tools::run(&mut verify);
    assert_eq!(verified.trim(), format!("{count} messages, {} good signatures, 0 bad", 2 * count));
}

/// From smtp-sink's `X-Rcpt-Args: <1r@sink.test>` in front of the message.
fn recipient(dump: &[u8]) -> String {
    let text = String::from_utf8_lossy(dump);
    let line = text.lines().find(|line| line.starts_with("X-Rcpt-Args:"));
    line.unwrap_or_else(|| panic!("an smtp-sink dump: {text}")).to_owned()
}

/// An RSA and an Ed25519 key: their files, the DNS records that dkimpy is to find, and the configuration.
fn keys(directory: &Path) -> String {
    let algorithms = [("rsa", &rcgen::PKCS_RSA_SHA256, "rsa"), ("ed", &rcgen::PKCS_ED25519, "ed25519")];
    let mut config = String::new();
    let mut records = serde_json::Map::new();
    for (selector, algorithm, name) in algorithms {
        let pem = rcgen::KeyPair::generate_for(algorithm).unwrap().serialize_pem();
        let path = directory.join(format!("{selector}.pem"));
        fs::write(&path, &pem).unwrap();
        let public = DkimKeyPem::from_pem(path, pem).unwrap().public_key_base64;
        let record = format!("v=DKIM1; k={name}; p={public}");
        records.insert(format!("{selector}._domainkey.{DOMAIN}."), record.into());
        config += &format!("[[dkim]]\ndomain = \"{DOMAIN}\"\nselector = \"{selector}\"\nkey = \"{selector}.pem\"\n");
    }
    fs::write(directory.join("dns.json"), serde_json::to_string(&records).unwrap()).unwrap();
    config
}

fn is_root() -> bool {
    tools::run(Command::new("id").arg("-u")).trim() == "0"
}
