//! The load generator: sessions that send messages and remember every acknowledged one.
//!
//! Closed loop: each session sends its next message when the last was answered. Open loop: messages are due at a fixed
//! rate, and a latency counts from the time a message was due, so that a stall of the server counts against every
//! message that it delayed, not just the one that it hit (coordinated omission).
//!
//! A message whose answer was lost is sent again under a new id: the old one may or may not have been accepted, and is
//! nobody's loss either way.
//!
//! Over 500 lines: sessions, and what is remembered of each message.

use std::fs::File;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use tokio::sync::watch;

use self::pace::{Alarm, Pace};
use self::wire::{Reply, Wire};
use crate::measure;
use crate::message::{BenchId, Draft, Sizes, Stock, StockOptions, draw_run_id};
use crate::report::{Latencies, LatencySummary};

mod pace;
pub(crate) mod wire;

/// What is sent, and how.
#[derive(Debug, Clone)]
pub struct InjectOptions {
    pub to: SocketAddr,
    pub ehlo: String,
    pub sender: String,
    pub recipient_domain: String,
    pub domains: usize,
    /// Above one each message is of one of so many, with a sender domain of its own.
    pub tenants: usize,
    /// Of Zipf's law, by which both are drawn; 0 draws them evenly.
    pub domain_exponent: f64,
    pub sizes: Sizes,
    pub dotted: bool,
    /// `X-Schedule` asks for no attempt before this.
    pub first_attempt: Option<jiff::Timestamp>,
    pub sessions: usize,
    /// `None`: until stopped.
    pub messages: Option<u64>,
    /// Messages a second; `None`: closed loop.
    pub rate: Option<f64>,
    /// MAIL, RCPT and DATA in one write, where the server offers PIPELINING; else each waits for its answer, as
    /// smtp-source does.
    pub pipelined: bool,
    pub one_connection_per_message: bool,
    /// Goes on after refusals and lost connections until every message was accepted.
    pub persist: bool,
    /// Gets a line with the id of each acknowledged message, before that session sends its next.
    pub ack_file: Option<PathBuf>,
    pub threads: usize,
    pub seed: u64,
}

impl InjectOptions {
    /// 20 pipelining sessions in a closed loop, 2-KiB messages to one domain.
    pub fn to(to: SocketAddr) -> Self {
        Self {
            to,
            ehlo: "postbench.test".into(),
            sender: "bench@sender.test".into(),
            recipient_domain: "bench.test".into(),
            domains: 1,
            tenants: 1,
            domain_exponent: 1.0,
            sizes: Sizes::fixed(2048),
            dotted: false,
            first_attempt: None,
            sessions: 20,
            messages: None,
            rate: None,
            pipelined: true,
            one_connection_per_message: false,
            persist: false,
            ack_file: None,
            threads: 1,
            seed: 1,
        }
    }
}

/// A run in progress.
#[derive(Debug)]
pub struct Injector {
    shared: Arc<Shared>,
    abandon: watch::Sender<bool>,
    threads: Vec<std::thread::JoinHandle<Result<()>>>,
}

/// What a run did.
#[derive(Debug, Clone)]
pub struct Injected {
    pub run: u64,
    pub accepted: u64,
    pub refused: u64,
    /// Sent, or partly so, without an answer: the server may have accepted them.
    pub unanswered: u64,
    pub connections: u64,
    pub bytes: u64,
    pub first_sent: Option<Instant>,
    pub last_accepted: Option<Instant>,
    pub latencies: Latencies,
    /// Of the injector's own threads.
    pub cpu: Duration,
    /// The last trouble, for the operator.
    pub trouble: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct InjectSummary {
    pub run: String,
    pub accepted: u64,
    pub refused: u64,
    pub unanswered: u64,
    pub connections: u64,
    pub bytes: u64,
    pub seconds: f64,
    pub messages_per_second: f64,
    pub mb_per_second: f64,
    /// Open loop: from when the message was due; closed loop: from when its sending began.
    pub accept: Option<LatencySummary>,
    pub trouble: Option<String>,
}

impl Injected {
    pub fn elapsed(&self) -> Duration {
        self.first_sent.zip(self.last_accepted).map_or(Duration::ZERO, |(first, last)| last - first)
    }

    pub fn summary(&self) -> InjectSummary {
        let seconds = self.elapsed().as_secs_f64();
        let per_second = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
        InjectSummary {
            run: format!("{:016x}", self.run),
            accepted: self.accepted,
            refused: self.refused,
            unanswered: self.unanswered,
            connections: self.connections,
            bytes: self.bytes,
            seconds,
            messages_per_second: per_second(self.accepted as f64),
            mb_per_second: per_second(self.bytes as f64 / 1e6),
            accept: self.latencies.summary(),
            trouble: self.trouble.clone(),
        }
    }
}

impl Injector {
    pub fn start(options: InjectOptions) -> Result<Self> {
        ensure!(options.sessions > 0, "at least one session is needed");
        ensure!(options.rate.is_none_or(|rate| rate > 0.0), "a rate is above 0");
        let stock = Stock::new(&StockOptions {
            run: draw_run_id(),
            sender: options.sender.clone(),
            recipient_domain: options.recipient_domain.clone(),
            domains: options.domains,
            tenants: options.tenants,
            domain_exponent: options.domain_exponent,
            sizes: options.sizes.clone(),
            dotted: options.dotted,
            first_attempt: options.first_attempt,
        })?;
        let ack_file = options.ack_file.as_ref().map(|path| {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot write {}", path.display()))
        });
        let shared = Arc::new(Shared {
            ack_file: ack_file.transpose()?,
            pace: options.rate.map(|rate| Pace::new(Instant::now(), rate)),
            clock: WallClock::new(),
            stock: Arc::new(stock),
            taken: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
            under_way: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            tally: Mutex::default(),
            options,
        });
        let thread_count = shared.options.threads.clamp(1, shared.options.sessions);
        let (abandon, abandoned) = watch::channel(false);
        let mut threads = Vec::new();
        for number in 0..thread_count {
            let (shared, abandoned) = (shared.clone(), abandoned.clone());
            let work = move || run_thread(&shared, number, thread_count, abandoned);
            threads.push(std::thread::Builder::new().name(format!("{THREAD_NAME}{number}")).spawn(work)?);
        }
        Ok(Self { shared, abandon, threads })
    }

    /// Lets the sessions finish the messages they are at.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Cuts all connections, for a server that no longer answers.
    pub fn abandon(&self) {
        self.abandon.send_replace(true);
    }

    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(std::thread::JoinHandle::is_finished)
    }

    pub fn accepted(&self) -> u64 {
        self.shared.tally().accepted.len() as u64
    }

    /// Waits for the end; gives the sequences of the acknowledged messages, too.
    pub fn finish(mut self) -> Result<(Injected, Vec<u64>)> {
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("an injector thread panicked"),
            }
        }
        let tally = std::mem::take(&mut *self.shared.tally());
        let injected = Injected {
            run: self.shared.stock.run(),
            accepted: tally.accepted.len() as u64,
            refused: tally.refused,
            unanswered: tally.unanswered + self.shared.under_way.load(Ordering::Relaxed),
            connections: tally.connections,
            bytes: tally.bytes,
            first_sent: tally.first_sent,
            last_accepted: tally.last_accepted,
            latencies: tally.latencies,
            cpu: tally.cpu,
            trouble: tally.trouble,
        };
        Ok((injected, tally.accepted))
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        self.abandon();
        for thread in self.threads.drain(..) {
            // Whoever drops it unfinished doesn't want its results.
            let _ = thread.join();
        }
    }
}

/// Runs to the end.
pub fn inject(options: InjectOptions) -> Result<Injected> {
    Ok(Injector::start(options)?.finish()?.0)
}

#[derive(Debug)]
struct Shared {
    options: InjectOptions,
    stock: Arc<Stock>,
    pace: Option<Pace>,
    clock: WallClock,
    ack_file: Option<File>,
    /// Messages begun, each counted once however often it is sent.
    taken: AtomicU64,
    /// Ids used.
    sequence: AtomicU64,
    /// Transactions begun and not ended.
    under_way: AtomicU64,
    stop: AtomicBool,
    tally: Mutex<Tally>,
}

#[derive(Debug, Default)]
struct Tally {
    accepted: Vec<u64>,
    refused: u64,
    unanswered: u64,
    connections: u64,
    bytes: u64,
    first_sent: Option<Instant>,
    last_accepted: Option<Instant>,
    latencies: Latencies,
    cpu: Duration,
    trouble: Option<String>,
}

impl Shared {
    fn tally(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The number of the next message to send, or `None` at the end.
    fn take(&self) -> Option<u64> {
        if self.stopped() {
            return None;
        }
        let number = self.taken.fetch_add(1, Ordering::Relaxed);
        self.options.messages.is_none_or(|messages| number < messages).then_some(number)
    }

    fn note_accepted(&self, sequence: u64, bytes: usize, begun: Instant) -> io::Result<()> {
        if let Some(mut file) = self.ack_file.as_ref() {
            let id = BenchId { run: self.stock.run(), sequence };
            // One unbuffered write a line: it is in the kernel before the next message goes out.
            file.write_all(format!("{id}\n").as_bytes())?;
        }
        let now = Instant::now();
        let mut tally = self.tally();
        tally.accepted.push(sequence);
        tally.bytes += bytes as u64;
        tally.latencies.record(now.saturating_duration_since(begun));
        tally.last_accepted = Some(now);
        Ok(())
    }
}

fn run_thread(
    shared: &Arc<Shared>,
    number: usize,
    thread_count: usize,
    mut abandoned: watch::Receiver<bool>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut sessions = tokio::task::JoinSet::new();
        for index in (number..shared.options.sessions).step_by(thread_count) {
            sessions.spawn(Session::new(shared.clone(), index as u64).run());
        }
        let all_ended = async {
            while let Some(ended) = sessions.join_next().await {
                ended??;
            }
            anyhow::Ok(())
        };
        tokio::select! {
            ended = all_ended => ended,
            // An error means that nobody is left to want the rest.
            _ = abandoned.wait_for(|abandoned| *abandoned) => Ok(()),
        }
    })?;
    shared.tally().cpu += measure::this_thread_cpu();
    Ok(())
}

struct Session {
    shared: Arc<Shared>,
    draft: Draft,
    wire: Option<Wire>,
}

/// How one try at a message ended.
enum Try {
    Accepted,
    Refused(Reply),
    /// Something was sent; no answer came.
    Unanswered(io::Error),
    /// No connection, hence nothing sent.
    Unreachable(io::Error),
}

impl Session {
    fn new(shared: Arc<Shared>, index: u64) -> Self {
        let draft = Draft::new(shared.stock.clone(), shared.options.seed.wrapping_mul(SEED_STRIDE).wrapping_add(index));
        Self { shared, draft, wire: None }
    }

    async fn run(mut self) -> Result<()> {
        let shared = self.shared.clone();
        let alarm = shared.pace.map(|_| Alarm::new()).transpose()?;
        while let Some(number) = shared.take() {
            let mut due = None;
            if let (Some(pace), Some(alarm)) = (shared.pace, &alarm) {
                let at = pace.due(number);
                alarm.wait_until(at).await?;
                due = Some(at);
            }
            if !self.message(due).await? {
                break;
            }
        }
        if let Some(wire) = self.wire.take() {
            wire.quit().await;
        }
        Ok(())
    }

    /// Sends one message, again and again when persisting. False: no use going on.
    async fn message(&mut self, due: Option<Instant>) -> Result<bool> {
        let shared = self.shared.clone();
        let begun = due.unwrap_or_else(Instant::now);
        loop {
            let sequence = shared.sequence.fetch_add(1, Ordering::Relaxed);
            let trouble = match self.attempt(sequence, begun).await {
                Try::Accepted => {
                    shared
                        .note_accepted(sequence, self.draft.message_bytes, begun)
                        .context("cannot write the ack file")?;
                    return Ok(true);
                }
                Try::Refused(reply) => {
                    shared.tally().refused += 1;
                    if reply.code == 421 {
                        self.wire = None;
                    }
                    reply.text
                }
                Try::Unanswered(error) => {
                    self.wire = None;
                    shared.tally().unanswered += 1;
                    format!("connection lost: {error}")
                }
                Try::Unreachable(error) => {
                    if !shared.options.persist {
                        shared.stop.store(true, Ordering::Relaxed);
                    }
                    format!("cannot connect to {}: {error}", shared.options.to)
                }
            };
            shared.tally().trouble = Some(trouble);
            if shared.stopped() {
                return Ok(false);
            }
            if !shared.options.persist {
                return Ok(true);
            }
            tokio::time::sleep(PERSIST_PAUSE).await;
        }
    }

    async fn attempt(&mut self, sequence: u64, begun: Instant) -> Try {
        let mut wire = match self.wire.take() {
            Some(wire) => wire,
            None => match Wire::open(self.shared.options.to, &self.shared.options.ehlo).await {
                Ok(wire) => {
                    self.shared.tally().connections += 1;
                    wire
                }
                Err(error) => return Try::Unreachable(error),
            },
        };
        self.draft.write(sequence, self.shared.clock.unix_ns(begun), wire.offers_size);
        self.shared.tally().first_sent.get_or_insert(begun);
        self.shared.under_way.fetch_add(1, Ordering::Relaxed);
        // RFC 2920 §3.1: only where it is offered.
        let outcome = if self.shared.options.pipelined && wire.offers_pipelining {
            pipelined_transaction(&mut wire, &mut self.draft).await
        } else {
            stepwise_transaction(&mut wire, &self.draft).await
        };
        self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
        match outcome {
            Ok(reply) => {
                if self.shared.options.one_connection_per_message {
                    wire.quit().await;
                } else {
                    self.wire = Some(wire);
                }
                if reply.is_positive() { Try::Accepted } else { Try::Refused(reply) }
            }
            Err(error) => Try::Unanswered(error),
        }
    }
}

/// Two round trips: the envelope and DATA, then the content. Gives the reply that decided.
async fn pipelined_transaction(wire: &mut Wire, draft: &mut Draft) -> io::Result<Reply> {
    let mut group = std::mem::take(&mut draft.mail);
    group.extend_from_slice(&draft.rcpt);
    group.extend_from_slice(b"DATA\r\n");
    wire.send(&group).await?;
    draft.mail = group;
    let mail = wire.reply().await?;
    if mail.code == 421 {
        return Ok(mail);
    }
    let rcpt = wire.reply().await?;
    let data = wire.reply().await?;
    let envelope_fits = mail.is_positive() && rcpt.is_positive();
    if data.code == 354 {
        // RFC 2920 §3.1: without a valid recipient only the dot may follow.
        if envelope_fits {
            wire.send_parts(&draft.header, &draft.body).await?;
        } else {
            wire.send(b".\r\n").await?;
        }
        let dot = wire.reply().await?;
        return Ok(if envelope_fits {
            dot
        } else if mail.is_positive() {
            rcpt
        } else {
            mail
        });
    }
    abandon(wire, [mail, rcpt, data]).await
}

/// Four round trips, each command waiting for its answer.
async fn stepwise_transaction(wire: &mut Wire, draft: &Draft) -> io::Result<Reply> {
    for command in [&draft.mail[..], &draft.rcpt] {
        wire.send(command).await?;
        let reply = wire.reply().await?;
        if !reply.is_positive() {
            return abandon(wire, [reply]).await;
        }
    }
    wire.send(b"DATA\r\n").await?;
    let data = wire.reply().await?;
    if data.code != 354 {
        return abandon(wire, [data]).await;
    }
    wire.send_parts(&draft.header, &draft.body).await?;
    wire.reply().await
}

/// Leaves the transaction, so that the next can begin; gives the first refusal.
async fn abandon<const N: usize>(wire: &mut Wire, replies: [Reply; N]) -> io::Result<Reply> {
    let refusal = replies.into_iter().find(|reply| !reply.is_positive());
    let refusal = refusal.ok_or_else(|| io::Error::other("DATA was answered 2xx"))?;
    if refusal.code != 421 {
        wire.send(b"RSET\r\n").await?;
        wire.reply().await?;
    }
    Ok(refusal)
}

/// Turns monotonic times into wall times, from one look at both clocks.
#[derive(Debug)]
struct WallClock {
    instant: Instant,
    unix: Duration,
}

impl WallClock {
    fn new() -> Self {
        Self { instant: Instant::now(), unix: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() }
    }

    fn unix_ns(&self, at: Instant) -> u64 {
        let unix = self.unix + at.saturating_duration_since(self.instant);
        u64::try_from(unix.as_nanos()).unwrap_or(u64::MAX)
    }
}

const THREAD_NAME: &str = "inject-";
const PERSIST_PAUSE: Duration = Duration::from_millis(20);
const SEED_STRIDE: u64 = 0x1_0000;

#[cfg(test)]
mod tests;
