//! The engine in a process of its own between injector and sink: what does a relayed message cost, how many go through?
//!
//! Each round has an engine, a spool and a sink of its own. A warm-up opens the connections and fills the caches; what
//! it costs isn't counted. CPU time is counted from just before the first message until a moment after the last
//! delivery, so that the outcomes' commits belong to it; rates end with the last acknowledgement and the last delivery.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::inject::{InjectOptions, Injector};
use crate::interrupt::Interrupt;
use crate::measure::{self, Machine, Memory, MemoryWatch, Usage};
use crate::message::Sizes;
use crate::peers::{Dkim, Engine, EngineOptions, EngineSite, OutboundTls, SmtpSink, SmtpSourceRun};
use crate::report::{Figures, Latencies, note, table};
use crate::sink::dkim::DkimCheck;
use crate::sink::tls::TlsIdentity;
use crate::sink::{self, Sink, SinkOptions};

#[derive(Debug, Clone)]
pub struct RelayOptions {
    pub engine: EngineOptions,
    /// Its `to`, `messages` and `persist` are set here.
    pub inject: InjectOptions,
    pub messages: u64,
    pub warmup: u64,
    pub rounds: usize,
    /// Postfix's smtp-source instead of our injector.
    pub smtp_source: Option<PathBuf>,
    /// Postfix's smtp-sink instead of our sink.
    pub smtp_sink: Option<PathBuf>,
    pub sink_delay: Duration,
    pub sink_threads: usize,
    /// Whether the sink lets TLS sessions be resumed.
    pub tls_resumption: bool,
    /// Of the messages, so many are verified where the engine signs and the sink is ours.
    pub verify_percent: f64,
}

/// All rounds.
#[derive(Debug)]
pub struct RelayReport {
    pub rounds: Vec<Figures>,
    pub setup: Value,
}

impl RelayReport {
    pub fn to_json(&self) -> Value {
        json!({
            "setup": self.setup,
            "medians": Figures::medians(&self.rounds).to_json(),
            "rounds": self.rounds.iter().map(Figures::to_json).collect::<Vec<_>>(),
        })
    }

    pub fn to_table(&self) -> String {
        table(&self.rounds)
    }

    /// Whether every message arrived exactly once in every round, and no signature looked at was wrong.
    pub fn is_complete(&self) -> bool {
        self.rounds.iter().all(|round| {
            ["lost", "duplicates", "dkim_failed"].iter().all(|name| round.get(name).is_none_or(|count| count == 0.0))
        })
    }
}

pub fn relay(options: &RelayOptions, interrupt: &Interrupt) -> Result<RelayReport> {
    let sizes = &options.inject.sizes;
    ensure!(options.rounds > 0 && options.messages > 0, "at least one round and one message are needed");
    let source_fits = options.inject.rate.is_none() && options.inject.domains == 1 && options.inject.tenants == 1;
    ensure!(options.smtp_source.is_none() || source_fits, "smtp-source knows neither rates nor domains nor tenants");
    let secure = options.engine.tls == Some(OutboundTls::Required);
    ensure!(options.smtp_sink.is_none() || !secure, "smtp-sink speaks no TLS");
    let mut setup = json!({
        "machine": Machine::look(),
        "messages": options.messages,
        "warmup": options.warmup,
        "size": sizes.to_string(),
        "sessions": options.inject.sessions,
        "rate": options.inject.rate,
        "domains": options.inject.domains,
        "tenants": options.inject.tenants,
        "pipelined": options.inject.pipelined && options.smtp_source.is_none(),
        "one_connection_per_message": options.inject.one_connection_per_message,
        "durability": options.engine.durability,
        "dkim": options.engine.dkim,
        "outbound_tls": secure,
        "injector": options.smtp_source.as_ref().map_or("postbench", |_| "smtp-source"),
        "sink": options.smtp_sink.as_ref().map_or("postbench", |_| "smtp-sink"),
        "sink_delay_ms": options.sink_delay.as_secs_f64() * 1e3,
    });
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let mut round = Round::begin(options, interrupt, &mut setup)?;
        let result = round.run(options, interrupt);
        let is_whole = |figures: &Figures| figures.get("lost") == Some(0.0);
        if !result.as_ref().is_ok_and(is_whole) {
            note(&format!("spool and log are left in {}", round.site.keep().display()));
        }
        let figures = result?;
        if options.rounds > 1 {
            let cpu = figures.get("engine_cpu_us_per_message").unwrap_or_default();
            let rate = figures.get("delivered_per_second").unwrap_or_default();
            note(&format!("round {number} of {}: {cpu:.1} µs a message, {rate:.0} delivered/s", options.rounds));
        }
        rounds.push(figures);
    }
    Ok(RelayReport { rounds, setup })
}

/// One engine with its sink.
struct Round {
    // Fields are dropped in this order: the engine before its directory and before the sink it is connected to.
    engine: Engine,
    site: EngineSite,
    sink: SinkSide,
    dkim: Option<Arc<DkimCheck>>,
}

pub(crate) enum SinkSide {
    Own(Sink),
    Postfix(SmtpSink),
}

/// What an injector did, whichever it was.
pub(crate) struct InjectedSide {
    pub(crate) first_sent: Instant,
    pub(crate) last_accepted: Instant,
    pub(crate) accepted: u64,
    pub(crate) refused: u64,
    pub(crate) latencies: Option<Latencies>,
    pub(crate) cpu: Duration,
}

impl Round {
    fn begin(options: &RelayOptions, interrupt: &Interrupt, setup: &mut Value) -> Result<Self> {
        let verifies = options.smtp_sink.is_none() && options.engine.dkim != Dkim::None && options.verify_percent > 0.0;
        let dkim = if verifies { Some(Arc::new(DkimCheck::start(options.verify_percent)?)) } else { None };
        let sink = SinkSide::start(options, dkim.clone(), interrupt)?;
        let site = EngineSite::prepare(options.engine.clone(), sink.address())?;
        for (name, record) in dkim.iter().flat_map(|_| &site.dkim_records) {
            dkim.as_ref().map(|dkim| dkim.publish(name, record)).transpose()?;
        }
        setup["spool_filesystem"] = json!(site.filesystem);
        setup["config"] = json!(site.config);
        let engine = site.start(interrupt)?;
        Ok(Self { engine, site, sink, dkim })
    }

    fn run(&mut self, options: &RelayOptions, interrupt: &Interrupt) -> Result<Figures> {
        if options.warmup > 0 {
            let before = self.sink.messages();
            let accepted = inject_side(options, options.warmup, self.site.smtp, interrupt)?.accepted;
            let arrived = self.wait_for(before + accepted, interrupt)?;
            ensure!(arrived, "the warm-up's messages did not all arrive:\n{}", self.site.log_tail());
            interrupt.pause(SETTLE)?;
        }
        self.sink.forget_messages();
        if let SinkSide::Own(_) = &self.sink {
            self.dkim.iter().for_each(|dkim| dkim.forget());
        }
        let pid = self.engine.pid();
        let before = self.sink.messages();
        let sink_cpu_before = self.sink.cpu()?;
        let usage_before = Usage::of(pid).context("the engine has ended")?;
        let watch = MemoryWatch::start(pid)?;

        let injected = inject_side(options, options.messages, self.site.smtp, interrupt)?;
        self.wait_for(before + injected.accepted, interrupt)?;
        let sink_cpu = self.sink.cpu()?.saturating_sub(sink_cpu_before);
        interrupt.pause(SETTLE)?;

        self.engine.check_alive(&self.site)?;
        let usage = Usage::of(pid)?.since(&usage_before);
        let mut figures = Figures::default();
        self.push_counts(&mut figures, &injected, before);
        push_usage(&mut figures, &usage, injected.accepted);
        let per_message = |cpu: Duration| cpu.as_secs_f64() * 1e6 / injected.accepted.max(1) as f64;
        figures.push("injector_cpu_us_per_message", "µs", per_message(injected.cpu));
        figures.push("sink_cpu_us_per_message", "µs", per_message(sink_cpu));
        let memory = Memory::of(pid)?;
        figures.push("peak_rss_mib", "MiB", mib(memory.peak_rss_bytes));
        figures.push("peak_anonymous_mib", "MiB", mib(watch.finish().max(memory.anon_bytes + memory.shmem_bytes)));
        if let Some(latencies) = &injected.latencies {
            figures.push_latencies(["accept_p50_ms", "accept_p99_ms", "accept_p999_ms"], latencies);
        }
        if let SinkSide::Own(sink) = &self.sink {
            let names = ["end_to_end_p50_ms", "end_to_end_p99_ms", "end_to_end_p999_ms"];
            figures.push_latencies(names, &sink.ledger().latencies());
        }
        figures.push("ready_after_ms", "ms", self.engine.ready_after.as_secs_f64() * 1e3);
        self.engine.terminate(interrupt, &self.site)?;
        Ok(figures)
    }

    fn push_counts(&self, figures: &mut Figures, injected: &InjectedSide, before: u64) {
        let delivered = self.sink.messages() - before;
        let rate = |count: u64, end: Instant| {
            count as f64 / end.saturating_duration_since(injected.first_sent).as_secs_f64().max(1e-9)
        };
        figures.push("accepted", "messages", injected.accepted as f64);
        figures.push("refused", "messages", injected.refused as f64);
        figures.push("lost", "messages", injected.accepted.saturating_sub(delivered) as f64);
        if let SinkSide::Own(sink) = &self.sink {
            let summary = sink.ledger().summary();
            figures.push("duplicates", "messages", summary.duplicates as f64);
            figures.push("sink_connections", "", summary.connections as f64);
            if !summary.tls.is_empty() || summary.tls_failed > 0 {
                let of_kind =
                    |kind| summary.tls.iter().filter(|(how, _)| how.ends_with(kind)).map(|(_, n)| n).sum::<u64>();
                figures.push("tls_handshakes_full", "", of_kind("full") as f64);
                figures.push("tls_handshakes_resumed", "", of_kind("resumed") as f64);
                figures.push("tls_handshakes_failed", "", summary.tls_failed as f64);
            }
        }
        if let Some(dkim) = &self.dkim {
            let tally = dkim.tally();
            if let Some(failure) = &tally.failure {
                note(&format!("DKIM: {failure}"));
            }
            figures.push("dkim_passed", "messages", tally.passed as f64);
            figures.push("dkim_failed", "messages", tally.failed as f64);
        }
        figures.push("accepted_per_second", "messages/s", rate(injected.accepted, injected.last_accepted));
        if let Some(last) = self.sink.last() {
            figures.push("delivered_per_second", "messages/s", rate(delivered, last));
        }
    }

    /// False when the messages stop coming before `count` is reached.
    fn wait_for(&mut self, count: u64, interrupt: &Interrupt) -> Result<bool> {
        let (mut arrived, mut since) = (self.sink.messages(), Instant::now());
        let mut complete = false;
        interrupt.until(|| {
            let now_arrived = self.sink.messages();
            if now_arrived != arrived {
                (arrived, since) = (now_arrived, Instant::now());
            }
            complete = now_arrived >= count;
            if !complete {
                self.engine.check_alive(&self.site)?;
            }
            Ok(complete || since.elapsed() > STALL_PATIENCE)
        })?;
        Ok(complete)
    }
}

impl SinkSide {
    pub(crate) fn start(options: &RelayOptions, dkim: Option<Arc<DkimCheck>>, interrupt: &Interrupt) -> Result<Self> {
        if let Some(program) = &options.smtp_sink {
            return Ok(Self::Postfix(SmtpSink::start(program, interrupt)?));
        }
        let (delay, threads) = (options.sink_delay, options.sink_threads);
        let secure = options.engine.tls == Some(OutboundTls::Required);
        let tls = if secure { Some(TlsIdentity::generate(options.tls_resumption)?) } else { None };
        Ok(Self::Own(Sink::start(SinkOptions { delay, threads, tls, dkim, ..SinkOptions::on_loopback() })?))
    }

    /// Counts anew from here, where it can.
    pub(crate) fn forget_messages(&self) {
        if let Self::Own(sink) = self {
            sink.ledger().forget_messages();
        }
    }

    /// Where they are looked for.
    pub(crate) fn duplicates(&self) -> Option<u64> {
        match self {
            Self::Own(sink) => Some(sink.ledger().totals().duplicates),
            Self::Postfix(_) => None,
        }
    }

    pub(crate) fn address(&self) -> std::net::SocketAddr {
        match self {
            Self::Own(sink) => sink.addresses()[0],
            Self::Postfix(sink) => sink.address,
        }
    }

    /// Different messages where that is known.
    pub(crate) fn messages(&self) -> u64 {
        match self {
            Self::Own(sink) => sink.ledger().totals().distinct(),
            Self::Postfix(sink) => sink.count().messages,
        }
    }

    pub(crate) fn last(&self) -> Option<Instant> {
        match self {
            Self::Own(sink) => sink.ledger().totals().last,
            Self::Postfix(sink) => sink.count().last,
        }
    }

    fn cpu(&self) -> Result<Duration> {
        match self {
            Self::Own(_) => Ok(measure::own_threads_cpu(sink::THREAD_NAME)),
            Self::Postfix(sink) => sink.cpu(),
        }
    }
}

pub(crate) fn inject_side(
    options: &RelayOptions,
    messages: u64,
    to: std::net::SocketAddr,
    interrupt: &Interrupt,
) -> Result<InjectedSide> {
    if let Some(program) = &options.smtp_source {
        let source = SmtpSourceRun {
            program: program.clone(),
            to,
            sessions: options.inject.sessions,
            messages,
            message_bytes: options.inject.sizes.mean() as usize,
            one_connection_per_message: options.inject.one_connection_per_message,
        };
        let run = source.run(interrupt)?;
        return Ok(InjectedSide {
            first_sent: run.begun,
            last_accepted: run.ended,
            accepted: messages,
            refused: 0,
            latencies: None,
            cpu: run.cpu,
        });
    }
    let injector = Injector::start(InjectOptions { to, messages: Some(messages), ..options.inject.clone() })?;
    let (mut accepted, mut since) = (0, Instant::now());
    interrupt.until(|| {
        let now_accepted = injector.accepted();
        if now_accepted != accepted {
            (accepted, since) = (now_accepted, Instant::now());
        }
        ensure!(
            since.elapsed() < STALL_PATIENCE,
            "the engine stopped answering after {accepted} of {messages} messages"
        );
        Ok(injector.is_finished())
    })?;
    let (injected, _) = injector.finish()?;
    if let Some(trouble) = &injected.trouble {
        note(&format!("injector: {} refused, {} unanswered: {trouble}", injected.refused, injected.unanswered));
    }
    ensure!(injected.accepted > 0, "no message was accepted");
    Ok(InjectedSide {
        first_sent: injected.first_sent.context("nothing was sent")?,
        last_accepted: injected.last_accepted.context("nothing was accepted")?,
        accepted: injected.accepted,
        refused: injected.refused,
        cpu: injected.cpu,
        latencies: Some(injected.latencies),
    })
}

fn push_usage(figures: &mut Figures, usage: &Usage, messages: u64) {
    let messages = messages.max(1) as f64;
    let micros = |cpu: Duration| cpu.as_secs_f64() * 1e6 / messages;
    figures.push("engine_cpu_us_per_message", "µs", micros(usage.cpu()));
    figures.push("engine_user_us_per_message", "µs", micros(usage.user));
    figures.push("engine_system_us_per_message", "µs", micros(usage.system));
    figures.push("voluntary_switches_per_message", "", usage.voluntary_switches as f64 / messages);
    figures.push("involuntary_switches_per_message", "", usage.involuntary_switches as f64 / messages);
    figures.push("written_bytes_per_message", "bytes", usage.written_bytes as f64 / messages);
    figures.push("minor_faults_per_message", "", usage.minor_faults as f64 / messages);
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The size that smtp-source can send: one.
pub fn is_single(sizes: &Sizes) -> bool {
    !sizes.to_string().contains(',')
}

const SETTLE: Duration = Duration::from_millis(200);
const STALL_PATIENCE: Duration = Duration::from_secs(30);
