//! The engine in a process of its own between injector and sink: what does a relayed message cost, how many go through?
//!
//! Each round has an engine, a spool and a sink of its own. A warm-up opens the connections and fills the caches; what
//! it costs isn't counted. CPU time is counted from just before the first message until a moment after the last
//! delivery, so that the outcomes' commits belong to it; rates end with the last acknowledgement and the last delivery.
//!
//! Over 500 lines: a round is one story, from the engine's start to the figures.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::inject::{InjectOptions, Injector};
use crate::interrupt::Interrupt;
use crate::measure::tracepoint::{KernelCalls, KernelWatch};
use crate::measure::{self, Machine, Memory, MemoryWatch, Usage};
use crate::message::{Sizes, numbered_domain};
use crate::peers::{Dkim, Engine, EngineOptions, EngineSite, OutboundTls, SmtpSink, SmtpSourceRun, free_port};
use crate::plot::{self, Chart, Line};
use crate::report::{Figures, Latencies, note, table};
use crate::sink::dkim::DkimCheck;
use crate::sink::ledger::Ledger;
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
    /// Recipient domains that are routed to an address of the sink's each, so that each is a site; 1: all to one.
    pub sites: usize,
    /// Counts what the engine asks of the kernel, where that is permitted.
    pub count_calls: bool,
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
    /// For the charts, of each round.
    courses: Vec<Course>,
}

/// How a round went.
#[derive(Debug, Default)]
pub(crate) struct Course {
    /// Messages delivered until so many seconds after the begin.
    delivered: Vec<(f64, u64)>,
    accept: Option<Latencies>,
    end_to_end: Option<Latencies>,
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
        let mut text = table(&self.rounds);
        if let Some(why) = self.setup["calls_not_counted"].as_str() {
            text.push_str(&format!("system calls, ring operations and syncs: – ({why})\n"));
        }
        text
    }

    /// Charts of rates and latencies, as SVG; of the last round, where it had our own injector and sink.
    pub fn plot(&self, path: &Path) -> Result<()> {
        let course = self.courses.last().context("there is no round to plot")?;
        plot::write(path, &course.charts())
    }

    /// Whether every message arrived exactly once in every round, and no signature looked at was wrong.
    pub fn is_complete(&self) -> bool {
        self.rounds.iter().all(|round| {
            ["lost", "duplicates", "dkim_failed"].iter().all(|name| round.get(name).is_none_or(|count| count == 0.0))
        })
    }
}

pub fn relay(options: &RelayOptions, interrupt: &Interrupt) -> Result<RelayReport> {
    ensure!(options.rounds > 0, "at least one round is needed");
    let mut setup = check(options)?;
    let (mut rounds, mut courses) = (Vec::new(), Vec::new());
    for number in 1..=options.rounds {
        let mut round = Round::begin(options, interrupt, &mut setup)?;
        let result = round.run(options, interrupt, &mut setup);
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
        courses.push(round.course);
    }
    Ok(RelayReport { rounds, setup, courses })
}

/// Refuses what can't be done together; else gives what a report says of how it was done.
pub(crate) fn check(options: &RelayOptions) -> Result<Value> {
    let sizes = &options.inject.sizes;
    ensure!(options.messages > 0, "at least one message is needed");
    ensure!((1..=SITES_MAX).contains(&options.sites), "sites: write 1 to {SITES_MAX}");
    let several = options.sites > 1;
    ensure!(!several || options.inject.domains == options.sites, "each site is a domain");
    ensure!(!several || options.smtp_sink.is_none(), "smtp-sink has one address");
    let source_fits = options.inject.rate.is_none() && options.inject.domains == 1 && options.inject.tenants == 1;
    ensure!(options.smtp_source.is_none() || source_fits, "smtp-source knows neither rates nor domains nor tenants");
    let secure = options.engine.tls == Some(OutboundTls::Required);
    ensure!(options.smtp_sink.is_none() || !secure, "smtp-sink speaks no TLS");
    Ok(json!({
        "machine": Machine::look(),
        "messages": options.messages,
        "warmup": options.warmup,
        "size": sizes.to_string(),
        "sessions": options.inject.sessions,
        "rate": options.inject.rate,
        "domains": options.inject.domains,
        "sites": options.sites,
        "tenants": options.inject.tenants,
        "pipelined": options.inject.pipelined && options.smtp_source.is_none(),
        "one_connection_per_message": options.inject.one_connection_per_message,
        "durability": options.engine.durability,
        "dkim": options.engine.dkim,
        "outbound_tls": secure,
        "injector": options.smtp_source.as_ref().map_or("postbench", |_| "smtp-source"),
        "sink": options.smtp_sink.as_ref().map_or("postbench", |_| "smtp-sink"),
        "sink_delay_ms": options.sink_delay.as_secs_f64() * 1e3,
    }))
}

/// One engine with its sink.
pub(crate) struct Round {
    // Fields are dropped in this order: the engine before its directory and before the sink it is connected to.
    pub(crate) engine: Engine,
    pub(crate) site: EngineSite,
    pub(crate) sink: SinkSide,
    dkim: Option<Arc<DkimCheck>>,
    /// Of the latest pass.
    course: Course,
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
    pub(crate) fn begin(options: &RelayOptions, interrupt: &Interrupt, setup: &mut Value) -> Result<Self> {
        let verifies = options.smtp_sink.is_none() && options.engine.dkim != Dkim::None && options.verify_percent > 0.0;
        let dkim = if verifies { Some(Arc::new(DkimCheck::start(options.verify_percent)?)) } else { None };
        let sink = SinkSide::start(options, dkim.clone(), interrupt)?;
        let (engine, address) = (options.engine.clone(), sink.address());
        let site = if options.sites > 1 {
            let routes = site_routes(options.sites, &options.inject.recipient_domain, address.port());
            EngineSite::prepare_routed(engine, &routes)
        } else {
            EngineSite::prepare(engine, address)
        }?;
        for (name, record) in dkim.iter().flat_map(|_| &site.dkim_records) {
            dkim.as_ref().map(|dkim| dkim.publish(name, record)).transpose()?;
        }
        setup["spool_filesystem"] = json!(site.filesystem);
        setup["config"] = json!(site.config);
        let engine = site.start(interrupt)?;
        Ok(Self { engine, site, sink, dkim, course: Course::default() })
    }

    fn run(&mut self, options: &RelayOptions, interrupt: &Interrupt, setup: &mut Value) -> Result<Figures> {
        self.warm_up(options, interrupt)?;
        let mut figures = self.pass(options, interrupt)?;
        self.count_calls(options, interrupt, setup, &mut figures)?;
        figures.push("ready_after_ms", "ms", self.engine.ready_after.as_secs_f64() * 1e3);
        self.engine.terminate(interrupt, &self.site)?;
        Ok(figures)
    }

    pub(crate) fn warm_up(&mut self, options: &RelayOptions, interrupt: &Interrupt) -> Result<()> {
        if options.warmup > 0 {
            let before = self.sink.messages();
            let accepted = inject_side(options, options.warmup, self.site.smtp, interrupt)?.accepted;
            let arrived = self.wait_for(before + accepted, interrupt)?;
            ensure!(arrived, "the warm-up's messages did not all arrive:\n{}", self.site.log_tail());
            interrupt.pause(SETTLE)?;
        }
        Ok(())
    }

    /// The load, from its first message to its last delivery.
    pub(crate) fn pass(&mut self, options: &RelayOptions, interrupt: &Interrupt) -> Result<Figures> {
        self.sink.forget_messages();
        if let SinkSide::Own(_) = &self.sink {
            self.dkim.iter().for_each(|dkim| dkim.forget());
        }
        let pid = self.engine.pid();
        let before = self.sink.messages();
        let sink_cpu_before = self.sink.cpu()?;
        let usage_before = Usage::of(pid).context("the engine has ended")?;
        let watch = MemoryWatch::start(pid)?;
        let rate_watch = self.sink.watch_rate()?;

        let injected = inject_side(options, options.messages, self.site.smtp, interrupt)?;
        self.wait_for(before + injected.accepted, interrupt)?;
        let delivered = rate_watch.map(RateWatch::finish).unwrap_or_default();
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
        figures.push("peak_anonymous_mib", "MiB", mib(watch.finish().max(memory.private_bytes())));
        if let Some(latencies) = &injected.latencies {
            figures.push_latencies(["accept_p50_ms", "accept_p99_ms", "accept_p999_ms"], latencies);
        }
        if let SinkSide::Own(sink) = &self.sink {
            let names = ["end_to_end_p50_ms", "end_to_end_p99_ms", "end_to_end_p999_ms"];
            figures.push_latencies(names, &sink.ledger().latencies());
        }
        let end_to_end = match &self.sink {
            SinkSide::Own(sink) => Some(sink.ledger().latencies()),
            SinkSide::Postfix(_) => None,
        };
        self.course = Course { delivered, accept: injected.latencies, end_to_end };
        Ok(figures)
    }

    /// In a load of its own: counting makes each call a little slower.
    fn count_calls(
        &mut self,
        options: &RelayOptions,
        interrupt: &Interrupt,
        setup: &mut Value,
        figures: &mut Figures,
    ) -> Result<()> {
        if !options.count_calls {
            return Ok(());
        }
        let mut watch = match KernelWatch::start(self.engine.pid(), self.site.filesystem) {
            Ok(watch) => watch,
            Err(error) => {
                setup["calls_not_counted"] = json!(format!("{error:#}"));
                return Ok(());
            }
        };
        let before = self.sink.messages();
        let messages = options.messages.div_ceil(COUNTED_PART);
        let accepted = inject_side(options, messages, self.site.smtp, interrupt)?.accepted;
        let arrived = self.wait_for(before + accepted, interrupt)?;
        ensure!(arrived, "the messages that calls were counted with did not all arrive:\n{}", self.site.log_tail());
        interrupt.pause(SETTLE)?;
        push_calls(figures, &watch.read()?, accepted);
        Ok(())
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
            if let SinkSide::Own(sink) = &self.sink {
                let octets = sink.ledger().totals().bytes;
                figures.push("delivered_mb_per_second", "MB/s", rate(octets, last) / 1e6);
            }
        }
    }

    /// False when the messages stop coming before `count` is reached.
    pub(crate) fn wait_for(&mut self, count: u64, interrupt: &Interrupt) -> Result<bool> {
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
        let mut sink = SinkOptions { delay, threads, tls, dkim, ..SinkOptions::on_loopback() };
        if options.sites > 1 {
            sink.listen = vec![SocketAddr::from(([0, 0, 0, 0], free_port()?.port()))];
            sink.loopback_device = true;
        }
        Ok(Self::Own(Sink::start(sink)?))
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

    pub(crate) fn address(&self) -> SocketAddr {
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

    fn watch_rate(&self) -> Result<Option<RateWatch>> {
        match self {
            Self::Own(sink) => RateWatch::start(sink.ledger().clone()).map(Some),
            Self::Postfix(_) => Ok(None),
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

impl Course {
    fn charts(&self) -> Vec<Chart> {
        let steps = self.delivered.windows(2);
        let rate = |pair: &[(f64, u64)]| (pair[1].0, (pair[1].1 - pair[0].1) as f64 / (pair[1].0 - pair[0].0));
        let rates = Line { name: "delivered".to_owned(), points: steps.map(rate).collect() };
        let latencies = [("accepted", &self.accept), ("delivered", &self.end_to_end)];
        let within = |(name, latencies): (&str, &Option<Latencies>)| {
            let latencies = latencies.as_ref().filter(|latencies| latencies.count() > 0)?;
            let point = |percent: u32| (latencies.quantile_ms(f64::from(percent) / 100.0), f64::from(percent));
            Some(Line { name: name.to_owned(), points: (1..=100).map(point).collect() })
        };
        vec![
            Chart {
                title: "Messages delivered a second".to_owned(),
                x: "seconds".to_owned(),
                y: "messages/s".to_owned(),
                logarithmic: false,
                lines: vec![rates],
            },
            Chart {
                title: "Messages within a time".to_owned(),
                x: "ms".to_owned(),
                y: "percent".to_owned(),
                logarithmic: true,
                lines: latencies.into_iter().filter_map(within).collect(),
            },
        ]
    }
}

/// Looks at a sink's count now and then.
struct RateWatch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(f64, u64)>>,
}

impl RateWatch {
    fn start(ledger: Arc<Ledger>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, begun) = (stop.clone(), Instant::now());
        let watch = move || {
            let mut seen = Vec::new();
            loop {
                let is_last = stopped.load(Ordering::Relaxed);
                seen.push((begun.elapsed().as_secs_f64(), ledger.totals().messages));
                if is_last {
                    return seen;
                }
                std::thread::park_timeout(RATE_INTERVAL);
            }
        };
        Ok(Self { stop, thread: std::thread::Builder::new().name("rate".into()).spawn(watch)? })
    }

    fn finish(self) -> Vec<(f64, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        // A panic ends the process, so there is none to join.
        self.thread.join().unwrap_or_default()
    }
}

pub(crate) fn inject_side(
    options: &RelayOptions,
    messages: u64,
    to: SocketAddr,
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

fn push_calls(figures: &mut Figures, calls: &KernelCalls, messages: u64) {
    let per_message = |count: u64| count as f64 / messages.max(1) as f64;
    figures.push("system_calls_per_message", "", per_message(calls.system_calls));
    figures.push("ring_operations_per_message", "", per_message(calls.ring_operations));
    if let Some(syncs) = calls.syncs {
        figures.push("syncs_per_message", "", per_message(syncs));
    }
}

pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Each domain with an address of its own.
pub(crate) fn site_routes(sites: usize, domain: &str, port: u16) -> Vec<(String, SocketAddr)> {
    let name = |site| if sites == 1 { domain.to_owned() } else { numbered_domain(site, domain) };
    (0..sites).map(|site| (name(site), site_address(site, port))).collect()
}

fn site_address(site: usize, port: u16) -> SocketAddr {
    let net = site / SITES_PER_NET;
    SocketAddr::from(([127, 64 + (net >> 8) as u8, net as u8, (site % SITES_PER_NET) as u8 + 1], port))
}

/// The size that smtp-source can send: one.
pub fn is_single(sizes: &Sizes) -> bool {
    !sizes.to_string().contains(',')
}

const SETTLE: Duration = Duration::from_millis(200);
/// Of the load, so much again is sent to count calls.
const COUNTED_PART: u64 = 4;
const RATE_INTERVAL: Duration = Duration::from_millis(100);
const STALL_PATIENCE: Duration = Duration::from_secs(30);
const SITES_PER_NET: usize = 250;
/// As many as the engine's configuration, one file, has room for.
const SITES_MAX: usize = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_site_has_an_address_of_its_own() {
        assert_eq!(site_address(0, 25).to_string(), "127.64.0.1:25");
        assert_eq!(site_address(999, 25).to_string(), "127.64.3.250:25");
        assert_eq!(site_address(SITES_MAX - 1, 25).to_string(), "127.65.143.250:25");
        let routes = site_routes(2, "bench.test", 25);
        assert_eq!(routes[1], ("d000001.bench.test".to_owned(), site_address(1, 25)));
    }
}
