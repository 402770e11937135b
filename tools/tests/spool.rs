//! `postctl spool` on spools that the crate has written, whole and damaged: what is shown, what is written, how it
//! ends, and that nothing in the spool changes.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::RwLock;
use std::time::{Duration, SystemTime};

use mail_parser::mailbox::mbox::MessageIterator;
use postrider_spool::record::Answer;
use postrider_spool::{
    Envelope, Fate, Log, MessageId, Outcome, Recipient, RecipientResult, RecoverOptions, Sequence, Spool, SpoolOptions,
    execute,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const CREATED_MS: u64 = 1_794_996_000_000;
const PREFIX: &[u8] = b"Received: from client\r\n\tby mta.example.com\r\n";
const FIRST: &[u8] = b"Subject: one\r\n\r\nFrom here on\r\n>From there\r\n.\r\n\xffend\r\n";
const SECOND: &[u8] = b"Subject: two\r\n\r\nno line end";
const SEGMENT: &str = "log-0000/segment-0000";

/// A folder with a spool in it.
struct World {
    folder: TempDir,
}

struct Ended {
    code: i32,
    out: Vec<u8>,
    err: String,
}

impl Ended {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.out).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

impl World {
    fn new() -> Self {
        Self::filled(Self::fill)
    }

    fn filled(fill: impl FnOnce(&mut Log)) -> Self {
        let world = Self { folder: tempfile::tempdir().unwrap() };
        let mut spool = Spool::open(&world.spool(), options()).unwrap();
        let directory = spool.assign(1).unwrap().remove(0).remove(0);
        let recover = RecoverOptions { seed: 1, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
        let mut log = Log::recover(directory, recover, &mut |_| {}).unwrap();
        fill(&mut log);
        close((log, spool));
        world
    }

    /// One log. Message 1 has a recipient that is finished, one that was deferred and one that is new; message 3 has a
    /// null reverse path; message 4 is finished; message 6 is of tenant acme. Each commit takes a block, from 4096 on.
    fn fill(log: &mut Log) {
        let to = ["a@example.net", "b@example.net", "c@example.org"];
        let first = append(log, &envelope("news@acme.example", &to), FIRST);
        let deferred = Answer { code: 451, enhanced: Some((4, 2, 0)), text: "later".into(), command: "RCPT".into() };
        let due_ms = CREATED_MS + 60_000;
        let results = vec![
            result(0, "a@example.net", Fate::Delivered, Answer::default()),
            result(1, "b@example.net", Fate::Deferred { due_ms }, deferred),
        ];
        settle(log, first, results);
        append(log, &envelope("", &["b@example.net"]), SECOND);
        let finished = append(log, &envelope("x@acme.example", &["b@example.net"]), SECOND);
        settle(log, finished, vec![result(0, "b@example.net", Fate::Bounced, Answer::default())]);
        let tenant = Envelope { tenant: "acme".into(), ..envelope("y@acme.example", &["D@Example.net"]) };
        append(log, &tenant, SECOND);
    }

    fn spool(&self) -> PathBuf {
        self.folder.path().join("spool")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `postctl spool COMMAND SPOOL ARGUMENTS` in the folder, and sees to it that the spool stays as it is.
    fn run(&self, command: &str, arguments: &[&str]) -> Ended {
        let before = state(&self.spool());
        let ended = postctl(self.folder.path(), &[&["spool", command, "spool"], arguments].concat());
        assert_eq!(state(&self.spool()), before, "{command} changed the spool");
        ended
    }

    /// The same where nothing goes wrong.
    fn done(&self, command: &str, arguments: &[&str]) -> Ended {
        let ended = self.run(command, arguments);
        assert_eq!((ended.code, ended.err.as_str()), (0, ""), "{}", ended.text());
        ended
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.spool().join(name);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
    }
}

fn postctl(folder: &Path, arguments: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_postctl"));
    command.args(arguments).current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = {
        let _alone = SPAWNING.write().unwrap();
        command.spawn().unwrap()
    };
    let output = child.wait_with_output().unwrap();
    Ended { code: output.status.code().unwrap(), out: output.stdout, err: String::from_utf8(output.stderr).unwrap() }
}

/// Closes a spool. A process that another test is just starting has this one's descriptors, and with them its locks,
/// until it executes its program.
fn close<T>(spool: T) {
    let _nobody_starts = SPAWNING.read().unwrap();
    drop(spool);
}

static SPAWNING: RwLock<()> = RwLock::new(());

fn options() -> SpoolOptions {
    SpoolOptions { segment_bytes: 256 << 10, ..SpoolOptions::default() }
}

fn envelope(reverse_path: &str, to: &[&str]) -> Envelope {
    Envelope {
        reverse_path: reverse_path.into(),
        recipients: to.iter().map(|to| Recipient { address: (*to).into() }).collect(),
        egress_pool: "default".into(),
        priority: 1,
        created_ms: CREATED_MS,
        first_attempt_ms: CREATED_MS + 1,
        expires_ms: CREATED_MS + 432_000_000,
        eight_bit: true,
        reception_protocol: "ESMTP".into(),
        client_address: "192.0.2.1:1025".into(),
        client_name: "client.example".into(),
        headers: vec![("Subject".into(), "one\u{1b}".into())],
        ..Envelope::default()
    }
}

fn result(index: u32, recipient: &str, fate: Fate, answer: Answer) -> RecipientResult {
    RecipientResult { index, recipient: recipient.into(), queue: "example.net".into(), fate, attempts: 1, answer }
}

fn append(log: &mut Log, envelope: &Envelope, body: &[u8]) -> MessageId {
    let (id, _) = log.append_message(envelope, PREFIX, body).unwrap();
    commit(log);
    id
}

fn settle(log: &mut Log, id: MessageId, results: Vec<RecipientResult>) {
    log.append_outcome(&Outcome { message: id.to_raw(), results, ..Outcome::default() }).unwrap();
    commit(log);
}

fn commit(log: &mut Log) {
    let mut now = Duration::ZERO;
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        log.handle_completion(now, execute(operation));
        now += Duration::from_millis(1);
    }
}

/// Every name below a path, with its mode, its time and its bytes.
fn state(path: &Path) -> BTreeMap<PathBuf, (u32, SystemTime, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut paths = vec![path.to_owned()];
    while let Some(path) = paths.pop() {
        let metadata = fs::metadata(&path).unwrap();
        let bytes = if metadata.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        found.insert(path, (metadata.permissions().mode(), metadata.modified().unwrap(), bytes));
    }
    found
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn ls_shows_who_waits() {
    let world = World::new();
    let expected = "\
ID                SENDER             RECIPIENT      SIZE  CREATED                   ATTEMPTS  DUE                       LAST ANSWER
0000000000000001  news@acme.example  b@example.net    96  2026-11-18T10:00:00.000Z         1  2026-11-18T10:01:00.000Z  451 4.2.0 later
0000000000000001  news@acme.example  c@example.org    96  2026-11-18T10:00:00.000Z         0  2026-11-18T10:00:00.001Z  -
0000000000000003  -                  b@example.net    71  2026-11-18T10:00:00.000Z         0  2026-11-18T10:00:00.001Z  -
0000000000000006  y@acme.example     D@Example.net    71  2026-11-18T10:00:00.000Z         0  2026-11-18T10:00:00.001Z  -
4 recipients

LOG   MESSAGES    BYTES  SEGMENTS  SPARES  STATE
0000         3  1.2 KiB         1       3  whole
";
    assert_eq!(world.done("ls", &[]).text(), expected);
    let rows = |arguments: &[&str]| {
        let text = world.done("ls", arguments).text().to_owned();
        let (rows, _) = text.split_once("\n\n").unwrap();
        rows.lines().filter_map(|line| line.strip_prefix("000000000000000")).map(|row| row[..1].to_owned()).collect()
    };
    let all: Vec<String> = rows(&["--recipient", "b@EXAMPLE.net"]);
    assert_eq!(all, ["1", "3"]);
    assert_eq!(rows(&["--recipient", "B@example.net"]), [""; 0]);
    assert_eq!(rows(&["--tenant", "acme"]), ["6"]);
    assert_eq!(rows(&["--limit", "2"]), ["1", "1"]);
    assert!(world.done("ls", &["--limit", "2"]).text().contains("\n2 of 4 recipients; see --limit\n"));
}

#[test]
fn ls_answers_programs() {
    let world = World::new();
    let listed = world.done("ls", &["--json"]).json();
    let expected = json!({
        "id": "0000000000000001", "sender": "news@acme.example", "recipient": "b@example.net", "queue": "example.net",
        "size": 96, "tenant": null, "campaign": null, "created": "2026-11-18T10:00:00.000Z",
        "held": false, "expires": "2026-11-23T10:00:00.000Z", "num_attempts": 1, "due": "2026-11-18T10:01:00.000Z",
        "last_answer": "451 4.2.0 later",
    });
    assert_eq!(listed["messages"][0], expected);
    assert_eq!(listed["messages"].as_array().unwrap().len(), 4);
    assert_eq!((&listed["recipients"], &listed["truncated"]), (&json!(4), &json!(false)));
    assert_eq!(listed["logs"][0]["messages"], 3);
    let none = world.done("ls", &["--json", "--limit", "0"]).json();
    assert_eq!((&none["messages"], &none["truncated"]), (&json!([]), &json!(true)));
}

/// Long tables are written in parts.
#[test]
fn ls_shows_more_than_fits_a_page() {
    let to: Vec<String> = (0..2_000).map(|number| format!("user-{number}@example.net")).collect();
    let to: Vec<&str> = to.iter().map(String::as_str).collect();
    let world = World::filled(|log| {
        append(log, &envelope("x@acme.example", &to[..1_999]), SECOND);
        append(log, &envelope("a-much-longer-sender@acme.example", &to[1_999..]), SECOND);
    });
    let listed = world.done("ls", &[]);
    let lines: Vec<&str> = listed.text().lines().collect();
    assert_eq!(lines.len(), 1 + 2_000 + 1 + 1 + 2);
    let recipients: Vec<&str> = lines[1..2_001].iter().map(|line| line.split_whitespace().nth(2).unwrap()).collect();
    assert_eq!(recipients, to);
    assert_eq!(lines[2_001], "2000 recipients");
    assert_eq!(world.done("ls", &["--json"]).json()["messages"].as_array().unwrap().len(), 2_000);
}

#[test]
fn cat_prints_a_message_as_it_is_sent() {
    let world = World::new();
    assert_eq!(world.done("cat", &["0000000000000001"]).out, [PREFIX, FIRST].concat());
    let expected = "\
id:            0000000000000001
sender:        news@acme.example
size:          96 B (96 octets)
content:       8 bit
accepted:      2026-11-18T10:00:00.000Z
first attempt: 2026-11-18T10:00:00.001Z
given up:      2026-11-23T10:00:00.000Z
tenant:        -
campaign:      -
egress pool:   default
priority:      normal
received by:   ESMTP
client:        client.example 192.0.2.1:1025
header:        Subject: one\u{fffd}

RECIPIENT      STATE     ATTEMPTS  DUE                       LAST ANSWER
a@example.net  finished         -  -                         -
b@example.net  pending          1  2026-11-18T10:01:00.000Z  451 4.2.0 later
c@example.org  pending          0  2026-11-18T10:00:00.001Z  -
";
    assert_eq!(world.done("cat", &["0000000000000001", "--envelope"]).text(), expected);
    let json = world.done("cat", &["0000000000000001", "--envelope", "--json"]).json();
    assert_eq!(
        json["recipients"][1]["answer"],
        json!({
            "code": 451, "enhanced": [4, 2, 0], "content": "later", "command": "RCPT",
        })
    );
    assert_eq!(json["recipients"][0]["state"], "finished");
}

/// Messages that share a body are shown and saved whole, each with what is its own in front.
#[test]
fn a_shared_body_is_in_each_message() {
    let world = World::filled(|log| {
        let (body, _) = log.append_body(SECOND).unwrap();
        for to in ["a@example.net", "b@example.net"] {
            let own = format!("To: {to}\r\n");
            log.append_message_sharing(&envelope("x@acme.example", &[to]), own.as_bytes(), body).unwrap();
        }
        commit(log);
    });
    let listed = world.done("ls", &["--json"]).json();
    let whole = |to: &str| [format!("To: {to}\r\n").as_bytes(), SECOND].concat();
    for (place, to) in ["a@example.net", "b@example.net"].into_iter().enumerate() {
        let row = &listed["messages"][place];
        assert_eq!((&row["recipient"], &row["size"]), (&json!(to), &json!(whole(to).len())));
        let id = row["id"].as_str().unwrap();
        assert_eq!(world.done("cat", &[id]).out, whole(to));
        world.done("export", &["--id", id, "--to", "saved"]);
        assert_eq!(fs::read(world.path(&format!("saved/{id}.eml"))).unwrap(), whole(to));
    }
    world.done("export", &["--format", "mbox", "--to", "saved.mbox"]);
    let saved = fs::read_to_string(world.path("saved.mbox")).unwrap();
    assert_eq!(saved.matches("To: ").count(), 2);
    assert_eq!(saved.matches("no line end").count(), 2);
}

#[test]
fn cat_knows_only_what_waits() {
    let world = World::new();
    for id in ["0000000000000004", "0007000000000001"] {
        let ended = world.run("cat", &[id]);
        assert_eq!((ended.code, ended.text()), (1, ""));
        let expected =
            format!("postctl: no recipient of {id} waits in the spool; if one did, the event log has the outcome\n");
        assert_eq!(ended.err, expected);
    }
    let ended = world.run("cat", &["0000000000000001", "--json"]);
    assert_eq!((ended.code, ended.err.contains("--json goes with --envelope")), (2, true));
    assert_eq!(world.run("cat", &["1"]).code, 2);
}

#[test]
fn verify_of_a_whole_spool() {
    let world = World::new();
    let expected = "\
LOG   MESSAGES    BYTES  SEGMENTS  SPARES  STATE
0000         3  1.2 KiB         1       3  whole
no damage in 1 log
";
    assert_eq!(world.done("verify", &[]).text(), expected);
    let json = world.done("verify", &["--json"]).json();
    assert_eq!((&json["damaged"], &json["regions"], &json["meta_error"]), (&json!(false), &json!([]), &Value::Null));
}

/// A flipped bit in the body of message 3; all others are still there.
#[test]
fn verify_finds_a_flipped_bit() {
    let world = World::new();
    world.change(SEGMENT, |bytes| {
        let at = 3 * 4096 + bytes[3 * 4096..].windows(8).position(|it| it == b"line end").unwrap();
        bytes[at] ^= 1;
    });
    let ended = world.run("verify", &[]);
    let expected = "\
FILE                   OFFSET  BYTES  WHAT
log-0000/segment-0000   12352    352  damaged record 3 about message 0000000000000003

LOG   MESSAGES  BYTES  SEGMENTS  SPARES  STATE
0000         2  928 B         1       3  damaged (1 place)
";
    assert_eq!((ended.code, ended.text()), (1, expected));
    assert_eq!(
        ended.err,
        "postctl: damage was found: 1 damaged region\n  \
         An engine that starts on it goes on with all the rest, and keeps damaged octets in kept/.\n"
    );
    let json = world.run("verify", &["--json"]).json();
    assert_eq!(json["damaged"], true);
    assert_eq!(
        json["regions"],
        json!([{
            "log": "0000", "file": SEGMENT, "offset": 12_352, "bytes": 352, "kind": "damage",
            "what": "damaged record 3 about message 0000000000000003", "message": "0000000000000003",
        }])
    );
    // What is whole can be had, and whoever asks for all of it is told.
    assert_eq!(world.done("cat", &["0000000000000006"]).out, [PREFIX, SECOND].concat());
    for (command, arguments) in [("ls", [].as_slice()), ("export", &["--to", "saved"]), ("cat", &["0000000000000003"])]
    {
        let ended = world.run(command, arguments);
        assert_eq!(ended.code, 1);
        let expected = "postctl: damage was found: 1 damaged region\n  `postctl spool verify` shows where.\n";
        assert_eq!(ended.err, expected);
    }
    assert_eq!(names(&world.path("saved")).len(), 4);
}

#[test]
fn an_unfinished_last_commit_is_no_damage() {
    let world = World::new();
    world.change(SEGMENT, |bytes| bytes[6 * 4096 + 64..7 * 4096].fill(0));
    let ended = world.done("verify", &[]);
    let expected = "\
FILE                   OFFSET  BYTES  WHAT
log-0000/segment-0000   24576   4096  unfinished last commit, never acknowledged

LOG   MESSAGES  BYTES  SEGMENTS  SPARES  STATE
0000         2  928 B         1       3  whole, 1 unfinished commit cut
no damage in 1 log; what was cut was never acknowledged, and is no damage
";
    assert_eq!(ended.text(), expected);
}

#[test]
fn a_truncated_file_is_damage() {
    let world = World::new();
    File::options().write(true).open(world.spool().join(SEGMENT)).unwrap().set_len(4 * 4096).unwrap();
    let ended = world.run("verify", &[]);
    assert_eq!(ended.code, 1);
    let expected = "log-0000/segment-0000   16384      0  the file is shorter than it was\n";
    assert!(ended.text().contains(expected), "{}", ended.text());
    assert!(world.run("ls", &[]).text().contains("\n3 recipients\n"));
}

/// Damage to the only segment when nothing live is left may be the begin of its next use; it isn't passed over.
#[test]
fn damage_where_nothing_is_live_is_told() {
    let world = World::new();
    world.change(SEGMENT, |bytes| {
        for block in [1, 3, 6] {
            bytes[block * 4096 + 100] ^= 1;
        }
    });
    let ended = world.run("verify", &["--json"]);
    assert_eq!(ended.code, 1);
    assert_eq!(ended.json()["regions"][1]["kind"], "damage");
}

#[test]
fn a_spool_without_its_meta_file_can_be_read() {
    let world = World::new();
    fs::remove_file(world.spool().join("SPOOL")).unwrap();
    let ended = world.run("verify", &[]);
    assert_eq!(ended.code, 1);
    assert!(ended.text().contains("  whole\n"), "{}", ended.text());
    assert!(ended.err.contains("spool/SPOOL: the meta file is missing"), "{}", ended.err);
    assert_eq!(world.done("cat", &["0000000000000001"]).out, [PREFIX, FIRST].concat());
}

#[test]
fn a_log_of_a_newer_version_does_not_hide_the_others() {
    let world = World::new();
    let mut spool = Spool::open(&world.spool(), options()).unwrap();
    let logs = spool.assign(2).unwrap();
    close((logs, spool));
    fs::copy(world.spool().join(SEGMENT), world.spool().join("log-0001/segment-0000")).unwrap();
    world.change("log-0001/segment-0000", |bytes| bytes[12] = 9);
    let ended = world.run("ls", &[]);
    assert_eq!(ended.code, 1);
    assert!(ended.text().starts_with("ID "), "{}", ended.text());
    assert!(ended.text().ends_with("\n0001         0      0 B         0       0  can't be read\n"), "{}", ended.text());
    let expected = "log 0001 can't be read: spool/log-0001/segment-0000: format version 9 is newer than ";
    assert!(ended.err.contains(expected), "{}", ended.err);
}

#[test]
fn a_spool_in_use_is_left_alone() {
    let world = World::new();
    let spool = Spool::open(&world.spool(), options()).unwrap();
    for (command, arguments) in
        [("ls", [].as_slice()), ("verify", &[]), ("cat", &["0000000000000001"]), ("export", &["--to", "saved"])]
    {
        let ended = world.run(command, arguments);
        assert_eq!((ended.code, ended.text()), (1, ""));
        let expected = format!("postctl: spool/LOCK: in use by process {}\n  Ask a running engine", std::process::id());
        assert!(ended.err.starts_with(&expected), "{}", ended.err);
    }
    assert!(!world.path("saved").exists());
    close(spool);
    world.done("ls", &[]);
}

#[test]
fn what_is_no_spool_is_told() {
    let world = World::new();
    fs::create_dir(world.path("empty")).unwrap();
    fs::write(world.path("file"), "").unwrap();
    close(Spool::open(&world.path("new"), options()).unwrap());
    for (path, expected) in [
        ("none", "No such file or directory"),
        ("empty", "no spool: "),
        ("file", "no directory; a spool is one"),
        ("new", "a spool without any log: "),
        ("spool/log-0000", "one log of a spool; name the directory above it"),
    ] {
        let ended = postctl(world.folder.path(), &["spool", "verify", path]);
        assert_eq!((ended.code, ended.text()), (1, ""));
        assert!(ended.err.starts_with(&format!("postctl: {path}: {expected}")), "{}", ended.err);
    }
}

/// Root may write anywhere; [`World::run`] sees to it that nothing was.
#[test]
fn nothing_need_be_writable() {
    let world = World::new();
    let set = |mode, files| {
        for path in state(&world.spool()).into_keys() {
            let mode = if path.is_dir() { mode } else { files };
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    set(0o555, 0o444);
    world.done("ls", &[]);
    world.done("verify", &[]);
    world.done("cat", &["0000000000000001"]);
    world.done("export", &["--to", "saved"]);
    set(0o755, 0o644);
}

#[test]
fn exported_messages_are_as_they_were() {
    let world = World::new();
    let ended = world.done("export", &["--to", "saved/here"]);
    assert_eq!(ended.text(), "exported 3 messages, 238 B, to saved/here\n");
    let folder = world.path("saved/here");
    let ids = ["0000000000000001", "0000000000000003", "0000000000000006"];
    let expected: Vec<String> = ids.iter().flat_map(|id| [format!("{id}.eml"), format!("{id}.json")]).collect();
    assert_eq!(names(&folder), expected);
    for (id, body) in ids.iter().zip([FIRST, SECOND, SECOND]) {
        assert_eq!(fs::read(folder.join(format!("{id}.eml"))).unwrap(), [PREFIX, body].concat());
        let envelope = fs::read(folder.join(format!("{id}.json"))).unwrap();
        assert_eq!(envelope, world.done("cat", &[id, "--envelope", "--json"]).out);
    }
    // Nothing is written over.
    fs::remove_file(folder.join("0000000000000001.json")).unwrap();
    let ended = world.run("export", &["--to", "saved/here"]);
    assert_eq!((ended.code, ended.text()), (1, ""));
    assert_eq!(ended.err, "postctl: saved/here/0000000000000001.eml: File exists (os error 17)\n");
}

#[test]
fn chosen_messages_are_exported() {
    let world = World::new();
    let ids = ["--id", "0000000000000006", "--id", "0000000000000001"];
    let ended = world.done("export", &[&["--to", "saved", "--json"], &ids[..]].concat());
    assert_eq!(ended.json(), json!({ "messages": 2, "bytes": 167, "to": "saved" }));
    assert_eq!(names(&world.path("saved")).len(), 4);
    let ended = world.run("export", &["--to", "more", "--id", "0000000000000004", "--id", "0000000000000003"]);
    assert_eq!((ended.code, ended.text()), (1, "exported 1 message, 71 B, to more\n"));
    assert!(ended.err.starts_with("postctl: no recipient of 0000000000000004 waits"), "{}", ended.err);
}

#[test]
fn an_mbox_can_be_read_by_others() {
    let world = World::new();
    world.done("export", &["--to", "saved.mbox", "--format", "mbox"]);
    let text = fs::read(world.path("saved.mbox")).unwrap();
    let first = b"From news@acme.example Wed Nov 18 10:00:00 2026\nReceived: from client\n\tby mta.example.com\n";
    assert!(text.starts_with(first));
    let read = MessageIterator::new(BufReader::new(File::open(world.path("saved.mbox")).unwrap()));
    let read: Vec<_> = read.map(Result::unwrap).collect();
    assert_eq!(
        read.iter().map(|message| message.from()).collect::<Vec<_>>(),
        ["news@acme.example", "MAILER-DAEMON", "y@acme.example"]
    );
    for (message, body) in read.iter().zip([FIRST, SECOND, SECOND]) {
        assert_eq!(message.internal_date() * 1_000, CREATED_MS);
        let mut expected = [PREFIX, body].concat();
        expected.retain(|octet| *octet != b'\r');
        if !expected.ends_with(b"\n") {
            expected.push(b'\n');
        }
        // An empty line separates messages.
        expected.push(b'\n');
        assert_eq!(message.contents(), expected);
    }
    let ended = world.run("export", &["--to", "saved.mbox", "--format", "mbox"]);
    assert_eq!((ended.code, ended.err.as_str()), (1, "postctl: saved.mbox: File exists (os error 17)\n"));
    assert_eq!(fs::read(world.path("saved.mbox")).unwrap(), text);
}

#[test]
fn nothing_is_exported_into_the_spool() {
    let world = World::new();
    for to in ["spool", "spool/new/folder", "./spool/log-0000/x"] {
        let ended = world.run("export", &["--to", to]);
        let expected = format!("postctl: {to} is in the spool, which is not to be changed\n");
        assert_eq!((ended.code, ended.err), (2, expected));
    }
}

#[test]
fn help_is_as_it_is_documented() {
    let help = |arguments: &[&str]| {
        let ended = postctl(Path::new("."), arguments);
        assert_eq!((ended.code, ended.err.as_str()), (0, ""));
        ended.text().to_owned()
    };
    let expected = "\
A spool that no engine has open; it is only read

Usage: postctl spool [OPTIONS] <COMMAND>

Commands:
  ls      Recipients that wait, and what each log holds
  cat     Prints a message as it would be sent, octet for octet
  verify  Checks every octet that is in use, and tells what is damaged
  export  Writes messages that are not finished into files

Options:
      --url <URL>      Where the engine's HTTP service is [default: $POSTRIDER_URL, else
                       http://127.0.0.1:8025]
      --token <TOKEN>  The admin token, where the engine has admin_tokens [default:
                       $POSTRIDER_TOKEN]
      --json           Prints JSON
  -h, --help           Print help
";
    assert_eq!(help(&["spool", "--help"]), expected);
    let expected = "\
Writes messages that are not finished into files

Usage: postctl spool export [OPTIONS] --to <PATH> <DIR>

Arguments:
  <DIR>  The directory that spool.path names

Options:
      --to <PATH>        Where to: the folder for eml, the file for mbox
      --url <URL>        Where the engine's HTTP service is [default: $POSTRIDER_URL, else
                         http://127.0.0.1:8025]
      --format <FORMAT>  eml: a file for each message, and one with its envelope beside it; mbox:
                         one file, no envelopes [default: eml] [possible values: eml, mbox]
      --token <TOKEN>    The admin token, where the engine has admin_tokens [default:
                         $POSTRIDER_TOKEN]
      --id <ID>          Only this message; can be given again
      --json             Prints JSON
  -h, --help             Print help
";
    assert_eq!(help(&["spool", "export", "--help"]), expected);
    for shell in ["bash", "zsh", "fish"] {
        assert!(help(&["completions", shell]).contains("verify"), "{shell}");
    }
    for arguments in [["spool"].as_slice(), &["spool", "ls"], &["spool", "export", "x"], &["spool", "cat", "x"]] {
        assert_eq!(postctl(Path::new("."), arguments).code, 2, "{arguments:?}");
    }
}
