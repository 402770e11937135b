//! Instructions and heap allocations that the engine's hot cores take for a message, counted by callgrind and dhat and
//! held against the committed `instructions.json`: seconds are too noisy on a shared machine to see a core get slower,
//! these are not.
//!
//! ```console
//! $ cargo run --release -p postrider-bench --example instructions              # exit code 1 outside the tolerance
//! $ cargo run --release -p postrider-bench --example instructions -- --update  # what is found is the baseline
//! ```
//!
//! Each core runs in a process of its own under `valgrind --tool=callgrind`, which counts between the entry of
//! [`measured`] and its end only. Fewer instructions than the baseline are outside the tolerance, too: a gain that is
//! not entered could be lost again unnoticed. Allocations have no tolerance: they do not depend on the build. Both take
//! the engine's buffers as they are after some messages.
//!
//! Over 500 lines: each core that is counted stands with its preparation.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use postrider::accept::dkim_sign::{BodyHash, Signers};
use postrider::accept::smtp_data::{ContentReceiver, Framing};
use postrider::accept::{ServerEvent, SessionOptions, SmtpServer};
use postrider::config::{
    Chunking, DeliveryProtocol, DkimAlgorithm, DkimIdentity, DkimKeyPem, EightBit, InDoubt, LineEndings,
    ReceivedDetail, Timeouts, TlsMode,
};
use postrider::deliver::attempt::Transaction;
use postrider::deliver::content::{Chunk, Content};
use postrider::deliver::smtp_client::{ClientEvent, ClientOptions, SmtpClient};
use postrider::handover::{PairKey, RecipientGroup, Spooled};
use postrider::mail::time::Now;
use postrider::schedule::queue::{Home, Need};
use postrider_bench::report::{note, print};
use postrider_spool::record::{DsnParameters, Envelope, LogId, MessageId, Recipient, Sequence};
use postrider_spool::{Log, Progress, RecoverOptions, Spool, SpoolOptions, Summarize, execute};
use serde::{Deserialize, Serialize};

/// What `instructions.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Baseline {
    architecture: String,
    /// The compiler that it was made with. Another one may count otherwise with the same right.
    rustc: String,
    tolerance_percent: f64,
    /// By operation.
    cores: BTreeMap<String, Counts>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Counts {
    instructions: u64,
    /// Blocks that were taken from the heap, or moved to a larger place; two decimals.
    allocations: f64,
}

/// One hot core: its name, how many operations are counted, and a function that prepares them and then calls
/// [`measured`] once.
struct Core {
    name: &'static str,
    operations: u64,
    run: fn(u64) -> Result<()>,
}

const CORES: [Core; 7] = [
    Core { name: "smtp_server_message_2k", operations: 200, run: smtp_server },
    Core { name: "content_receiver_100k_dotted", operations: 20, run: content_receiver },
    Core { name: "smtp_client_message_2k", operations: 200, run: smtp_client },
    Core { name: "queue_entry_due_ready_ticket", operations: 1_000, run: queue },
    Core { name: "spool_append_and_commit_2k", operations: 512, run: spool },
    Core { name: "dkim_body_hash_2k", operations: 200, run: dkim_body_hash },
    Core { name: "dkim_header_ed25519", operations: 50, run: dkim_header },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => compare(false),
        ["--update"] => compare(true),
        ["--core", name] => run_core(name).map(|()| true),
        ["--allocations", name] => {
            let _profiler = dhat::Profiler::builder().testing().build();
            run_core(name).and_then(|()| Ok(print(&ALLOCATIONS.load(Ordering::Relaxed).to_string())?)).map(|()| true)
        }
        _ => Err(anyhow::anyhow!("usage: instructions [--update]")),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            note(&format!("instructions: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn compare(update: bool) -> Result<bool> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        note("skipped: valgrind is not installed (Debian: valgrind)");
        return Ok(!update);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/instructions.json");
    let baseline: Option<Baseline> = match fs::read_to_string(&path) {
        Ok(text) => Some(serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?),
        Err(_) if update => None,
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let tolerance = baseline.as_ref().map_or(TOLERANCE_PERCENT, |baseline| baseline.tolerance_percent);
    let rustc = rustc()?;
    if let Some(baseline) = baseline.as_ref().filter(|_| !update) {
        if baseline.architecture != std::env::consts::ARCH {
            note(&format!("skipped: the baseline is of {}", baseline.architecture));
            return Ok(true);
        }
        if baseline.rustc != rustc {
            note(&format!("skipped: the baseline was made with {}, this is {rustc}", baseline.rustc));
            return Ok(true);
        }
    }
    let (mut cores, mut text, mut holds) = (BTreeMap::new(), String::new(), true);
    for core in &CORES {
        let found = count(core)?;
        let expected = baseline.as_ref().and_then(|baseline| baseline.cores.get(core.name)).copied();
        let verdict = judge(found, expected, tolerance);
        holds &= verdict.is_ok();
        let (Ok(words) | Err(words)) = verdict;
        let Counts { instructions, allocations } = found;
        // Writing into a String cannot fail.
        let _ =
            writeln!(text, "{:<30} {instructions:>9} instructions, {allocations:>6.2} allocations  {words}", core.name);
        cores.insert(core.name.to_owned(), found);
    }
    print(&text)?;
    if update {
        let architecture = std::env::consts::ARCH.to_owned();
        let new = Baseline { architecture, rustc, tolerance_percent: tolerance, cores };
        fs::write(&path, format!("{}\n", serde_json::to_string_pretty(&new)?))?;
        note(&format!("{} is written", path.display()));
        return Ok(true);
    }
    if !holds {
        note("outside the tolerance; where that is meant, run it again with --update and commit the baseline");
    }
    Ok(holds)
}

fn judge(found: Counts, expected: Option<Counts>, tolerance_percent: f64) -> Result<String, String> {
    let Some(expected) = expected else { return Err("has no baseline".to_owned()) };
    let percent = (found.instructions as f64 / expected.instructions as f64 - 1.0) * 100.0;
    let words = format!("{percent:+.2} % of {}", expected.instructions);
    if percent.abs() > tolerance_percent {
        return Err(format!("{words}: more than {tolerance_percent} %"));
    }
    if (found.allocations - expected.allocations).abs() > 0.005 {
        return Err(format!("{words}; {} allocations before", expected.allocations));
    }
    Ok(words)
}

fn rustc() -> Result<String> {
    let program = std::env::var_os("RUSTC").map_or("rustc".into(), PathBuf::from);
    let output = Command::new(program).arg("--version").output().context("cannot ask rustc for its version")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn count(core: &Core) -> Result<Counts> {
    let output = Command::new(std::env::current_exe()?).args(["--allocations", core.name]).output()?;
    let words = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{} failed:\n{}", core.name, String::from_utf8_lossy(&output.stderr));
    let allocations: u64 = words.trim().parse().context("no allocations were told")?;
    let allocations = (allocations * 100 / core.operations) as f64 / 100.0;
    Ok(Counts { instructions: instructions(core)?, allocations })
}

/// By operation.
fn instructions(core: &Core) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*instructions*measured*"])
        .arg(std::env::current_exe()?)
        .args(["--core", core.name])
        .output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} failed under valgrind:\n{words}", core.name);
    let line = words.lines().find_map(|line| line.split_once("Collected :")).context("valgrind counted nothing")?;
    let all: u64 = line.1.trim().parse().context("valgrind counted nothing")?;
    ensure!(all > 0, "{}: valgrind did not see where counting begins", core.name);
    Ok(all / core.operations)
}

fn run_core(name: &str) -> Result<()> {
    let Some(core) = CORES.iter().find(|core| core.name == name) else { bail!("no core is called {name}") };
    (core.run)(core.operations)
}

/// What is counted. It is found by its name.
#[inline(never)]
fn measured(operations: u64, operation: &mut dyn FnMut(u64)) {
    for number in 0..operations {
        operation(number);
    }
}

/// What [`measured`] took, where a profiler runs.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// Some operations before, so that buffers have their sizes; then those that count.
fn warm_and_measure(operations: u64, mut operation: impl FnMut(u64)) {
    for number in 0..WARM_UP {
        operation(number);
    }
    let is_profiled = std::env::args().any(|argument| argument == "--allocations");
    let taken = || if is_profiled { dhat::HeapStats::get().total_blocks } else { 0 };
    let before = taken();
    measured(operations, &mut |number| operation(WARM_UP + number));
    ALLOCATIONS.store(taken() - before, Ordering::Relaxed);
}

fn now() -> Now {
    Now { monotonic: Duration::from_secs(1_000), wall_ms: CREATED_MS }
}

/// Lines of 64 octets; every fourth begins with a dot where asked.
fn body(bytes: usize, dotted: bool) -> Vec<u8> {
    let line = |number: usize| {
        let first = if dotted && number.is_multiple_of(4) { "." } else { "x" };
        format!("{first}{}\r\n", "abcdefghi ".repeat(6).get(..61).unwrap_or_default())
    };
    (0..bytes / 64).map(line).collect::<String>().into_bytes()
}

fn stuffed(content: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    postrider_bench::message::stuff(content, &mut wire);
    wire
}

const HEADER: &[u8] = b"From: Ada <ada@sender.test>\r\nTo: <r000000000042@bench.test>\r\nSubject: A message\r\n\
    Date: Sun, 22 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1.000000000042@sender.test>\r\nMIME-Version: 1.0\r\n\
    Content-Type: text/plain; charset=us-ascii\r\n\r\n";

/// A session that takes pipelined transactions.
fn smtp_server(operations: u64) -> Result<()> {
    let options = SessionOptions {
        hostname: "mta.example".into(),
        client: ([192, 0, 2, 7], 40_000).into(),
        may_relay: true,
        trusted: true,
        max_message_bytes: 50 << 20,
        line_endings: LineEndings::Fix,
        received_detail: ReceivedDetail::Full,
        starttls: false,
    };
    let mut out = Vec::new();
    let mut server = SmtpServer::new(now(), options, 7, &mut out);
    server.handle(now(), b"EHLO client.example\r\n", &mut out);
    let envelope = b"MAIL FROM:<bench@sender.test> SIZE=2048\r\nRCPT TO:<r000000000042@bench.test>\r\nDATA\r\n";
    let content = stuffed(&[HEADER, &body(2_048 - HEADER.len(), false)].concat());
    let mut messages = 0;
    warm_and_measure(operations, |number| {
        out.clear();
        for input in [&envelope[..], &content] {
            let mut rest = input;
            while !rest.is_empty() {
                let handled = server.handle(now(), rest, &mut out);
                rest = &rest[handled.consumed..];
                if let Some(ServerEvent::Message(received)) = handled.event {
                    messages += u64::from(!received.content.is_empty());
                    server.handle_answer(now(), Ok(id(number)), &mut out);
                }
            }
        }
    });
    ensure!(messages == WARM_UP + operations, "{messages} messages were received: {}", String::from_utf8_lossy(&out));
    Ok(())
}

/// The search for CRLF.CRLF and for what is stuffed, in pieces as they come from a socket.
fn content_receiver(operations: u64) -> Result<()> {
    let content = body(100 << 10, true);
    let wire = stuffed(&content);
    let mut whole = 0;
    warm_and_measure(operations, |_| {
        let mut receiver = ContentReceiver::new(Framing::Dot, LineEndings::Fix, 50 << 20, Some(content.len() as u64));
        for piece in wire.chunks(16 << 10) {
            receiver.receive(piece);
        }
        whole += u64::from(receiver.finish().is_ok_and(|received| received.len() == content.len()));
    });
    ensure!(whole == WARM_UP + operations, "only {whole} contents were received whole");
    Ok(())
}

struct Text(Arc<[u8]>);

impl Content for Text {
    type Piece = Arc<[u8]>;

    fn prefix_piece(&self) -> Self::Piece {
        Arc::new([])
    }

    fn body_piece(&self) -> Self::Piece {
        self.0.clone()
    }
}

/// A connection that stays: transactions without CHUNKING, answered at once.
fn smtp_client(operations: u64) -> Result<()> {
    let options = ClientOptions {
        ehlo: "mta.example".to_owned(),
        protocol: DeliveryProtocol::Smtp,
        auth: None,
        pipelining: true,
        tls: TlsMode::Disabled,
        chunking: Chunking::On,
        max_in_flight: 8,
        in_doubt: InDoubt::Retry,
        eight_bit: EightBit::Fail,
        timeouts: Timeouts::default(),
    };
    let mut client: SmtpClient<Text> = SmtpClient::new(now(), options);
    let mut out = Vec::new();
    let content: Arc<[u8]> = [HEADER, &body(2_048 - HEADER.len(), false)].concat().into();
    let (mut delivered, mut idle) = (0, false);
    let mut take = |client: &mut SmtpClient<Text>| {
        while let Some(event) = client.poll_event() {
            match event {
                ClientEvent::Finished(result) => delivered += result.results.len() as u64,
                ClientEvent::Idle => idle = true,
                _ => {}
            }
        }
        delivered
    };
    let written = |client: &mut SmtpClient<Text>, out: &mut Vec<Chunk<Arc<[u8]>>>| {
        loop {
            let bytes = out.drain(..).map(|chunk| chunk.as_ref().len()).sum();
            if bytes == 0 {
                return;
            }
            client.handle_written(now(), bytes, out);
        }
    };
    for reply in [&b"220 peer\r\n"[..], b"250-peer\r\n250-PIPELINING\r\n250-SIZE 1000000\r\n250 8BITMIME\r\n"] {
        client.handle(now(), reply, &mut out);
        written(&mut client, &mut out);
    }
    take(&mut client);
    warm_and_measure(operations, |number| {
        let transaction = Transaction {
            ticket: number,
            reverse_path: "bench@sender.test".into(),
            recipients: [(0, "r000000000042@bench.test".to_owned())].into(),
            size: content.len() as u64,
            eight_bit: false,
            content: Text(content.clone()),
            smtputf8: false,
            dot_lines: false,
            dsn: DsnParameters::default(),
        };
        client.start(now(), transaction, &mut out);
        written(&mut client, &mut out);
        for replies in [&b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n354 Go ahead\r\n"[..], b"250 2.0.0 Ok: queued\r\n"] {
            client.handle(now(), replies, &mut out);
            written(&mut client, &mut out);
        }
        take(&mut client);
    });
    let delivered = take(&mut client);
    ensure!(delivered == WARM_UP + operations, "{delivered} transactions ended");
    Ok(())
}

/// An entry's way through its home: scheduled, due, ready, sent out as a ticket, and removed; 10,000 others wait.
fn queue(operations: u64) -> Result<()> {
    let pair = PairKey { source: 0, rollup: "mx.example".into(), site: "mx.example".into() };
    let domain: Arc<str> = "peer.example".into();
    let spooled = |sequence: u64, due_ms: u64| Spooled {
        message: MessageId::new(LogId(0), Sequence(sequence)),
        tenant: "acme".to_owned(),
        campaign: String::new(),
        egress_pool: "default".to_owned(),
        priority: 1,
        expires_ms: CREATED_MS + 432_000_000,
        groups: vec![RecipientGroup {
            domain: domain.clone(),
            recipients: Box::new([0]),
            attempts: 0,
            due_ms,
            last_answer: None,
            matched: None,
        }],
    };
    let mut home = Home::default();
    for sequence in 0..10_000 {
        home.insert(&spooled(1_000_000 + sequence, CREATED_MS + 60_000 + sequence));
    }
    let mut sent_out = 0;
    warm_and_measure(operations, |number| {
        home.insert(&spooled(1 + number, CREATED_MS));
        let Some(entry) = home.pop_due(CREATED_MS) else { return };
        home.make_ready(entry, &pair);
        home.add_credits(&pair, None, 1);
        while let Some(need) = home.poll_need() {
            match need {
                Need::Owner { pair } => home.set_owner(&pair, 0),
                Need::Ticket { entry, .. } => {
                    home.remove(entry);
                    sent_out += 1;
                }
                _ => {}
            }
        }
    });
    ensure!(sent_out == WARM_UP + operations, "{sent_out} tickets were sent out");
    Ok(())
}

struct NoSummaries;

impl Summarize for NoSummaries {
    fn begin(&mut self) {}

    fn summarize(&mut self, _: MessageId, _: u32, _: &mut Vec<u8>) {}
}

/// Records encoded and appended, and a commit for every 64 of them, to files by plain writes: the kernel's part is not
/// counted.
fn spool(operations: u64) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let options = SpoolOptions { segment_bytes: 4 << 20, max_bytes: 256 << 20, ..SpoolOptions::default() };
    let mut spool = Spool::open(directory.path(), options)?;
    let own = spool.assign(1)?.remove(0).remove(0);
    let recover = RecoverOptions { seed: 1, event_cursor: Sequence(0), ..RecoverOptions::default() };
    let mut log = Log::recover(own, recover, &mut |_| {})?;
    let envelope = Envelope {
        reverse_path: "bench@sender.test".into(),
        recipients: vec![Recipient { address: "r000000000042@bench.test".into() }],
        egress_pool: "default".into(),
        created_ms: CREATED_MS,
        first_attempt_ms: CREATED_MS,
        expires_ms: CREATED_MS + 432_000_000,
        reception_protocol: "ESMTP".into(),
        ..Envelope::default()
    };
    let (prefix, content) = (body(640, false), body(1_408, false));
    let clock = std::cell::Cell::new(Duration::ZERO);
    let work = |log: &mut Log| {
        // Zeroing has a pace of its own, by a clock that goes as fast as it is asked.
        clock.set(clock.get() + Duration::from_millis(20));
        while let Some(operation) = log.poll_operation(clock.get(), &mut NoSummaries) {
            if let Progress::Failed { error } = log.handle_completion(clock.get(), execute(operation)) {
                note(&format!("a commit failed: {error}"));
            }
        }
    };
    for _ in 0..SPOOL_PREPARATIONS {
        work(&mut log);
    }
    let mut refused = None;
    warm_and_measure(operations, |number| {
        if let Err(error) = log.append_message(&envelope, &prefix, &content) {
            refused = Some(error);
        }
        if number % 64 == 63 {
            work(&mut log);
        }
    });
    work(&mut log);
    ensure!(refused.is_none(), "the spool took a message not: {refused:?}");
    ensure!(!log.has_uncommitted(), "not all was committed");
    Ok(())
}

/// Body canonicalisation (relaxed) with its SHA-256.
fn dkim_body_hash(operations: u64) -> Result<()> {
    let content = body(2_048, false);
    warm_and_measure(operations, |_| {
        std::hint::black_box(BodyHash::of(&content));
    });
    Ok(())
}

/// Header canonicalisation with an Ed25519 signature, which is always the same for the same header.
fn dkim_header(operations: u64) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let key = postrider_bench::keys::write_ed25519(directory.path())?;
    let key = DkimKeyPem {
        pem: fs::read_to_string(&key.path)?,
        path: key.path,
        algorithm: DkimAlgorithm::Ed25519Sha256,
        public_key_base64: String::new(),
    };
    let identity = DkimIdentity {
        domain: "sender.test".to_owned(),
        selector: "s1".to_owned(),
        key: Arc::new(key),
        sign_for: Vec::new(),
        headers: Vec::new(),
    };
    let signers = Signers::new(&[identity]).map_err(anyhow::Error::msg)?;
    let chosen = signers.select(Some("sender.test"));
    let hash = BodyHash::of(b"x\r\n");
    let mut signed = 0;
    warm_and_measure(operations, |_| {
        signed += u64::from(signers.sign(&chosen, &[HEADER], &hash, CREATED_MS / 1_000).is_ok_and(|it| !it.is_empty()));
    });
    ensure!(signed == WARM_UP + operations, "{signed} headers were signed");
    Ok(())
}

fn id(number: u64) -> MessageId {
    MessageId::new(LogId(1), Sequence(number + 1))
}

/// The same source counts up to 6 % otherwise when code elsewhere, or the folder that it is built in, has changed.
const TOLERANCE_PERCENT: f64 = 10.0;
const WARM_UP: u64 = 64;
const SPOOL_PREPARATIONS: usize = 200;
/// 2025-11-24T16:00:00Z.
const CREATED_MS: u64 = 1_764_000_000_000;
