//! `postrider demo`: the engine, generated senders and a sink in one process, on loopback.
//!
//! It is a program that embeds the engine as any other would, not a part of the data path; so its senders, sink and
//! files are plain tokio and std. Everything that is sent is generated again where it arrives, and compared; see
//! `verify`.
//!
//! The spool is a new directory for each run, on a real file system where one is writable, synced as in production, and
//! removed at the end. A run without progress for `PATIENCE` is broken off, so that it ends in bounded time.
#![expect(clippy::disallowed_methods, reason = "a program on top of the engine, with senders and a sink of its own")]
//!
//! Over 500 lines: what the demo starts, waits for and ends, in one order.

mod message;
mod report;
mod sender;
mod sink;
mod usage;
mod verify;

use std::fmt;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::Ed25519KeyPair;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use crossbeam::channel;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::oneshot;

use self::message::{Generator, SENDER_DOMAIN};
pub use self::report::Report;
use self::report::{Latency, Stage};
use self::sender::Senders;
use self::sink::Sink;
use self::usage::{CpuReading, CpuUse};
use self::verify::{Arrival, Progress, Tally, Verifier};
use crate::config::{
    Config, DkimAlgorithm, DkimIdentity, DkimKeyPem, DomainPattern, Durability, RetrySchedule, Route, RouteTarget,
    SpoolConfig, TlsMode,
};
use crate::engine::Engine;
use crate::outcome::event_log::{EventItem, EventStream};
use crate::runtime::clock::Clock;
use crate::runtime::net::allowed_cpus;
use crate::runtime::random::os_random_u64;
use crate::runtime::signal::{Signal, Signals};

/// How much a demo does.
#[derive(Debug, Clone)]
pub struct Options {
    /// At least 1.
    pub messages: u32,
    /// SMTP sessions that send, at least 1.
    pub sessions: u32,
    /// None: one per allowed CPU.
    pub shards: Option<usize>,
}

/// Why a demo could not be run at all.
#[derive(Debug)]
pub struct DemoError(String);

impl fmt::Display for DemoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for DemoError {}

/// Runs a demo to its end.
pub fn run(options: &Options) -> Result<Report, DemoError> {
    let run = os_random_u64();
    let clock = Clock::start();
    let directory = Directory::create(run)?;
    let identities = generate_keys()?;
    let generator = Generator::new(run, clock.now().wall_ms);
    let tally = Arc::new(Mutex::new(Tally::new(options.messages)));

    let (arrivals, arrived) = channel::bounded(ARRIVALS_WAITING_MAX);
    let sink = Sink::bind(clock, arrivals).map_err(|error| failed("the sink", &error))?;
    let sink_address = sink.address().map_err(|error| failed("the sink", &error))?;
    let config = configuration(options, directory.path.join("spool"), sink_address, &identities);
    let filesystem = config.spool.filesystem().map_or_else(|_| "unknown".to_owned(), |found| found.kind);
    let engine = Engine::builder(config).start().map_err(|error| DemoError(error.to_string()))?;
    let mut events = engine.events();

    let verifiers = start_verifiers(&generator, &identities, &arrived, &tally)?;
    drop(arrived);
    let interrupted = Arc::new(AtomicBool::new(false));
    let signals = Worker::start("signals", {
        let interrupted = Arc::clone(&interrupted);
        || note_interrupt(interrupted)
    })?;
    let sink = Worker::start(SINK_THREAD, || async {
        if let Err(error) = sink.run().await {
            tracing::error!(%error, "the demo's sink failed");
        }
    })?;

    let before = CpuReading::now();
    let started = clock.now().monotonic;
    let smtp = engine.addresses().smtp[0];
    let senders = Arc::new(Senders::new(smtp, generator, options.messages, clock, Arc::clone(&tally)));
    let sessions = options.sessions;
    let senders = Worker::start(SENDERS_THREAD, move || senders.run(sessions))?;
    let watch = Watch { clock, tally: &tally, senders: &senders, interrupted: &interrupted };
    let broken_off = watch.until_settled(&mut events, options.messages);
    let measured = Measured {
        started,
        ended: clock.now().monotonic,
        cpu: CpuReading::now().zip(before).map(|(after, before)| after.since(&before)),
        commits: engine.addresses().http.first().and_then(|address| read_commits(*address)),
    };

    // What is still on its way arrives before the engine is down; only then it shows whether anything came twice.
    senders.stop();
    let end = engine.shutdown();
    sink.stop();
    for verifier in verifiers {
        verifier.join().map_err(|_| DemoError("a verifier panicked".to_owned()))?;
    }
    take_events(&mut events, &tally);
    signals.stop();

    let mut tally = lock(&tally);
    if let Err(error) = end {
        tally.note(format!("the engine did not end cleanly: {error}"));
    }
    let spool = format!("{} ({filesystem}, fsync)", directory.path.display());
    Ok(report(options, spool, describe_keys(&identities), measured, broken_off, &tally))
}

/// What is read at the end of the sending, before anything is shut down.
struct Measured {
    started: Duration,
    ended: Duration,
    cpu: Option<CpuUse>,
    commits: Option<u64>,
}

fn report(
    options: &Options,
    spool: String,
    signatures: String,
    measured: Measured,
    broken_off: Option<String>,
    tally: &Tally,
) -> Report {
    let (acceptance, end_to_end) = tally.latencies();
    let after = |at: Duration| at.saturating_sub(measured.started);
    Report {
        messages: options.messages,
        content_bytes: tally.content_bytes,
        sessions: options.sessions.min(options.messages),
        shards: options.shards.unwrap_or_else(|| allowed_cpus().len()),
        spool,
        signatures,
        accepted: Stage { count: tally.accepted, after: after(tally.accepted_at) },
        delivered: Stage { count: tally.arrived, after: after(tally.arrived_at) },
        verified: Stage { count: tally.verified(), after: after(measured.ended) },
        acceptance: Latency::of(&acceptance),
        end_to_end: Latency::of(&end_to_end),
        cpu: measured.cpu,
        commits: measured.commits,
        receptions: tally.receptions,
        deliveries: tally.deliveries,
        transient_failures: tally.transient_failures,
        postponed: tally.postponed,
        broken_off,
        problems: tally.problems(),
    }
}

fn failed(what: &str, error: &dyn fmt::Display) -> DemoError {
    DemoError(format!("{what} can't be started: {error}"))
}

/// A panic ends the process, so a poisoned lock is met in tests only.
fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

fn configuration(options: &Options, spool: PathBuf, sink: SocketAddr, identities: &[DkimIdentity]) -> Config {
    let mut config = Config::new("demo.test");
    config.shards = options.shards;
    config.spool = SpoolConfig {
        path: spool,
        durability: Durability::Fsync,
        max_size_bytes: SPOOL_BYTES_MAX,
        // It is for one run only, and the report names it.
        allow_filesystem: true,
    };
    let loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
    config.smtp_listeners.truncate(1);
    config.smtp_listeners[0].address = loopback;
    config.http_listeners.truncate(1);
    config.http_listeners[0].address = loopback;
    let to = vec![RouteTarget::Address(sink)];
    config.routes = vec![Route { tls: Some(TlsMode::Disabled), ..Route::new(DomainPattern::Any, to) }];
    config.dkim = identities.to_vec();
    config.shaping.connection_limit = DELIVERY_CONNECTIONS;
    // A delivery that fails for the moment is to come within the run's patience.
    config.retry.schedule = RetrySchedule::Listed(vec![Duration::from_secs(1)]);
    config.shutdown_grace = SHUTDOWN_GRACE;
    config
}

fn generate_keys() -> Result<Vec<DkimIdentity>, DemoError> {
    let error = |_| DemoError("DKIM keys can't be generated".to_owned());
    let rsa = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).map_err(error)?;
    let rsa = AsDer::<Pkcs8V1Der<'_>>::as_der(&rsa).map_err(error)?;
    let ed25519 = Ed25519KeyPair::generate_pkcs8v1(&SystemRandom::new()).map_err(error)?;
    [("rsa", rsa.as_ref()), ("ed25519", ed25519.as_ref())]
        .map(|(selector, der)| identity(selector, der))
        .into_iter()
        .collect()
}

fn identity(selector: &str, pkcs8: &[u8]) -> Result<DkimIdentity, DemoError> {
    let mut pem = "-----BEGIN PRIVATE KEY-----\n".to_owned();
    let text = BASE64.encode(pkcs8);
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, next) = rest.split_at(rest.len().min(PEM_LINE_BYTES));
        pem.extend([line, "\n"]);
        rest = next;
    }
    pem.push_str("-----END PRIVATE KEY-----\n");
    let key = DkimKeyPem::from_pem(PathBuf::from(format!("generated-{selector}")), pem).map_err(DemoError)?;
    Ok(DkimIdentity {
        domain: SENDER_DOMAIN.to_owned(),
        selector: selector.to_owned(),
        key: Arc::new(key),
        sign_for: vec![SENDER_DOMAIN.to_owned()],
        headers: Vec::new(),
    })
}

fn describe_keys(identities: &[DkimIdentity]) -> String {
    let name = |identity: &DkimIdentity| match identity.key.algorithm {
        DkimAlgorithm::RsaSha256 { bits } => format!("RSA-{bits}"),
        DkimAlgorithm::Ed25519Sha256 => "Ed25519".to_owned(),
    };
    identities.iter().map(name).collect::<Vec<_>>().join(" and ")
}

fn start_verifiers(
    generator: &Generator,
    identities: &[DkimIdentity],
    arrived: &channel::Receiver<Arrival>,
    tally: &Arc<Mutex<Tally>>,
) -> Result<Vec<JoinHandle<()>>, DemoError> {
    // One verifies several times what one shard signs.
    let threads = allowed_cpus().len().div_ceil(4);
    let start = |number: usize| {
        let verifier = Verifier::new(generator.clone(), identities).map_err(DemoError)?;
        let (arrived, tally) = (arrived.clone(), Arc::clone(tally));
        let thread = std::thread::Builder::new().name(format!("{VERIFIER_THREAD}-{number}")).spawn(move || {
            for arrival in arrived {
                let verdict = verifier.verify(&arrival);
                lock(&tally).arrive(verdict);
            }
        });
        thread.map_err(|error| failed("a verifier", &error))
    };
    (0..threads).map(start).collect()
}

async fn note_interrupt(interrupted: Arc<AtomicBool>) {
    let Ok(mut signals) = Signals::new() else { return };
    while signals.next().await != Signal::Terminate {}
    interrupted.store(true, Ordering::Relaxed);
}

/// A thread with an ordinary runtime that runs one future.
///
/// It lives until it is stopped, also when the future has ended before: the CPU time of a thread that is gone can't be
/// told from the engine's.
#[derive(Debug)]
struct Worker {
    stop: oneshot::Sender<()>,
    finished: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Worker {
    fn start<F: Future<Output = ()>>(name: &str, make: impl FnOnce() -> F + Send + 'static) -> Result<Self, DemoError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| failed(name, &error))?;
        let (stop, mut stopped) = oneshot::channel();
        let finished = Arc::new(AtomicBool::new(false));
        let is_finished = Arc::clone(&finished);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = make() => {
                        is_finished.store(true, Ordering::Release);
                        // An error says that the worker was dropped, which stops it as well.
                        let _ = stopped.await;
                    }
                    _ = &mut stopped => {}
                }
            });
        });
        Ok(Self { stop, finished, thread: thread.map_err(|error| failed(name, &error))? })
    }

    fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Drops the future, and all tasks that it spawned, wherever they are.
    fn stop(self) {
        // The thread waits for it.
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

/// Waits for the end of a run.
struct Watch<'a> {
    clock: Clock,
    tally: &'a Mutex<Tally>,
    senders: &'a Worker,
    interrupted: &'a AtomicBool,
}

impl Watch<'_> {
    /// Some: why it was broken off.
    fn until_settled(&self, events: &mut EventStream, messages: u32) -> Option<String> {
        let bar = progress_bar(messages);
        let mut last = (Progress::default(), self.clock.now().monotonic);
        let broken_off = loop {
            std::thread::sleep(TICK);
            take_events(events, self.tally);
            let senders_finished = self.senders.is_finished();
            let (progress, settled) = {
                let tally = lock(self.tally);
                (tally.progress(), tally.is_settled())
            };
            bar.set_position(progress.arrived.into());
            bar.set_message(format!("{} accepted", report::grouped(progress.accepted.into())));
            if senders_finished && settled {
                break None;
            }
            if self.interrupted.load(Ordering::Relaxed) {
                break Some("interrupted by a signal".to_owned());
            }
            let now = self.clock.now().monotonic;
            if progress != last.0 {
                last = (progress, now);
            } else if now.saturating_sub(last.1) > PATIENCE {
                break Some(format!("no progress for {} s", PATIENCE.as_secs()));
            }
        };
        bar.finish_and_clear();
        broken_off
    }
}

fn take_events(events: &mut EventStream, tally: &Mutex<Tally>) {
    let mut tally = lock(tally);
    while let Some(item) = events.try_next() {
        match item {
            EventItem::Event(event) => tally.event(event.kind, event.message, event.to_json()),
            EventItem::Lagged(missed) => tally.note(format!("{missed} events were missed")),
        }
    }
}

/// On standard error, and only where that is a terminal.
fn progress_bar(messages: u32) -> ProgressBar {
    let bar = ProgressBar::new(messages.into());
    // A template that can't be read would be replaced by indicatif's own.
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} delivered and verified, {msg}") {
        bar.set_style(style);
    }
    bar
}

/// From the engine's own `/metrics`, over all shards.
fn read_commits(http: SocketAddr) -> Option<u64> {
    let mut stream = TcpStream::connect_timeout(&http, METRICS_TIMEOUT).ok()?;
    stream.set_read_timeout(Some(METRICS_TIMEOUT)).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.take(METRICS_BYTES_MAX).read_to_string(&mut answer).ok()?;
    sum_metric(&answer, "spool_commits")
}

/// The sum over all label sets of a metric in Prometheus' text form. None: no such metric, or it is still zero.
fn sum_metric(text: &str, name: &str) -> Option<u64> {
    let samples = text.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let known = series.split('{').next()?.trim_end_matches("_total");
        (known == name).then(|| value.parse::<f64>().ok())?
    });
    let sum: f64 = samples.sum();
    (sum > 0.0).then_some(sum as u64)
}

/// A directory that goes away with its value.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
}

impl Directory {
    /// On ext4 or XFS if there is a writable place on one, and rather anywhere else than in memory.
    fn create(run: u64) -> Result<Self, DemoError> {
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
        let mut places = vec![std::env::temp_dir(), PathBuf::from("/var/tmp"), here];
        places.sort_by_key(|place| rank(place));
        let name = format!("postrider-demo-{}-{:08x}", std::process::id(), run as u32);
        let mut failures = Vec::new();
        for place in places {
            let path = place.join(&name);
            // Mail is private, also generated mail.
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) => failures.push(format!("{}: {error}", path.display())),
            }
        }
        Err(DemoError(format!("no directory for the spool can be made: {}", failures.join("; "))))
    }
}

/// The lower, the better is a place for a spool.
fn rank(place: &Path) -> u32 {
    let spool = SpoolConfig { path: place.to_owned(), allow_filesystem: true, ..SpoolConfig::default() };
    match spool.filesystem() {
        Ok(filesystem) if filesystem.is_supported() => 0,
        Ok(filesystem) if matches!(filesystem.kind.as_str(), "tmpfs" | "ramfs") => 2,
        _ => 1,
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the demo's spool could not be removed");
        }
    }
}

const SENDERS_THREAD: &str = "senders";
const SINK_THREAD: &str = "sink";
const VERIFIER_THREAD: &str = "verifier";
/// Without progress for this long a run is broken off.
const PATIENCE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(20);
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// Messages that wait for a verifier.
const ARRIVALS_WAITING_MAX: usize = 4_096;
const SPOOL_BYTES_MAX: u64 = 8 << 30;
const DELIVERY_CONNECTIONS: u32 = 20;
const METRICS_TIMEOUT: Duration = Duration::from_secs(5);
const METRICS_BYTES_MAX: u64 = 4 << 20;
const PEM_LINE_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_summed_over_shards() {
        let text = "# HELP spool_commits Commits.\nspool_commits{shard=\"0\"} 12\nspool_commits_total{shard=\"1\"} 30\n\
                    spool_commit_records_sum 99.0\nspool_commits_other 5\n";
        assert_eq!(sum_metric(text, "spool_commits"), Some(42));
        assert_eq!(sum_metric(text, "absent"), None);
    }

    #[test]
    fn the_directory_is_private_and_goes_away() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = Directory::create(os_random_u64()).unwrap();
        let path = directory.path.clone();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(path.join("file"), "x").unwrap();
        drop(directory);
        assert!(!path.exists());
    }

    #[test]
    fn a_worker_can_be_stopped() {
        let worker = Worker::start("endless", std::future::pending).unwrap();
        assert!(!worker.is_finished());
        worker.stop();
        let (done, is_done) = std::sync::mpsc::channel();
        let worker = Worker::start("short", || async move { done.send(()).unwrap() }).unwrap();
        is_done.recv().unwrap();
        assert!(!worker.thread.is_finished(), "it waits to be stopped");
        worker.stop();
    }
}
