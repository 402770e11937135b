//! The engine's delivering half alone: a full queue leaves through a few connections. How fast over a long way, and at
//! what CPU time a message? Beside it in the same run, by the same way to the same kind of sink, bare io_uring loops
//! that write the same octets in one or two round trips a message.
//!
//! A long way leads through a proxy that delays; without a delay there is none. All messages are in the spool before
//! the proxy lets the first octet through, or the sink greets, so that accepting them is not in the figures. What is:
//! scheduling, pools, the client, outcomes and their commits, the event log. How much of that is not the client's tells
//! a pass in which nothing is sent: the engine's own route to nowhere.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};

use self::bare::BareLoop;
use self::proxy::Proxy;
use crate::compare::{ControlGroup, Mta, RunningMta};
use crate::inject::{InjectOptions, Injector};
use crate::interrupt::Interrupt;
use crate::measure::{Machine, Usage};
use crate::message::Sizes;
use crate::peers::{EngineOptions, EngineSite, OutboundTls, SmtpSourceRun};
use crate::report::{Figures, note, rounds_json, table};
use crate::sign::client_config;
use crate::sink::tls::TlsIdentity;
use crate::sink::{Sink, SinkOptions};

mod bare;
mod proxy;

#[derive(Debug, Clone)]
pub struct DeliverOptions {
    pub engine: EngineOptions,
    pub messages: u64,
    pub message_bytes: usize,
    pub connections: usize,
    /// There and back, without what the machine itself takes. None: straight to the sink, without a proxy.
    pub round_trip: Duration,
    pub deliveries_per_connection: u64,
    pub chunking: Chunking,
    /// Whole transactions on a connection, with `Chunking::BackToBack`.
    pub in_flight: u32,
    /// Whether the sink offers CHUNKING.
    pub sink_chunking: bool,
    /// All go by STARTTLS, the bare loops too. Not to a server of one's own.
    pub tls: bool,
    pub rounds: usize,
    /// A server instead of the sink, and smtp-source, which finds that server's own limit.
    pub server: Option<(Server, PathBuf)>,
}

/// Who takes the mail instead of the sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// One's own, which runs already.
    At(SocketAddr),
    /// Is started for a round, and throws away what it takes.
    Started(Mta),
}

/// The engine's `chunking` key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Chunking {
    Off,
    On,
    #[value(name = "back_to_back")]
    BackToBack,
}

#[derive(Debug)]
pub struct DeliverReport {
    pub rounds: Vec<Figures>,
    pub setup: Value,
}

impl DeliverReport {
    pub fn to_json(&self) -> Value {
        rounds_json(&self.setup, &self.rounds)
    }

    pub fn to_table(&self) -> String {
        table(&self.rounds)
    }
}

/// What a pass took.
#[derive(Debug, Clone, Copy)]
struct Pass {
    per_second: f64,
    cpu_us: f64,
}

pub fn deliver(options: &DeliverOptions, interrupt: &Interrupt) -> Result<DeliverReport> {
    ensure!(!options.tls || options.server.is_none(), "a server is spoken to in the clear");
    ensure!(options.rounds > 0 && options.messages > 1, "at least one round and two messages are needed");
    let setup = json!({
        "machine": Machine::look(),
        "messages": options.messages,
        "message_bytes": options.message_bytes,
        "connections": options.connections,
        "round_trip_ms": options.round_trip.as_secs_f64() * 1e3,
        "deliveries_per_connection": options.deliveries_per_connection,
        "chunking": options.chunking,
        "max_in_flight": options.in_flight,
        "sink_offers_chunking": options.sink_chunking,
        "tls": options.tls,
        "durability": options.engine.durability,
        "server": options.server.as_ref().map(|(server, _)| server.to_string()),
        "engine_config": options.config(),
    });
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let figures = round(options, interrupt)?;
        if options.rounds > 1 {
            note(&format!("round {number} of {}: {}", options.rounds, figures.to_json()));
        }
        rounds.push(figures);
    }
    Ok(DeliverReport { rounds, setup })
}

fn round(options: &DeliverOptions, interrupt: &Interrupt) -> Result<Figures> {
    let mut figures = Figures::default();
    let one = bare(options, interrupt, 1)?;
    figures.push("bare_per_second", "messages/s", one.per_second);
    figures.push("bare_cpu_us_per_message", "µs", one.cpu_us);
    if options.server.is_none() {
        let two = bare(options, interrupt, 2)?;
        figures.push("bare_two_round_trips_per_second", "messages/s", two.per_second);
        figures.push("bare_two_round_trips_cpu_us_per_message", "µs", two.cpu_us);
        let engine = engine(options, interrupt, None)?;
        figures.push("engine_per_second", "messages/s", engine.per_second);
        figures.push("engine_cpu_us_per_message", "µs", engine.cpu_us);
        figures.push("rate_engine_by_bare", "", engine.per_second / one.per_second);
        figures.push("cpu_engine_by_bare", "", engine.cpu_us / one.cpu_us);
        figures.push("cpu_engine_by_bare_two_round_trips", "", engine.cpu_us / two.cpu_us);
        let settled = discarding(options, interrupt)?;
        figures.push("discarding_cpu_us_per_message", "µs", settled);
        figures.push("cpu_client_by_bare", "", (engine.cpu_us - settled) / one.cpu_us);
        figures.push("cpu_client_by_bare_two_round_trips", "", (engine.cpu_us - settled) / two.cpu_us);
    }
    if let Some((server, smtp_source)) = &options.server {
        let mut started: Option<(RunningMta, ControlGroup)> = None;
        let to = match server {
            Server::At(address) => *address,
            Server::Started(mta) => {
                let group = ControlGroup::create()?;
                started.insert((mta.start(None, &group, interrupt)?, group)).0.address
            }
        };
        let source = SmtpSourceRun {
            program: smtp_source.clone(),
            to,
            sessions: options.connections,
            messages: options.messages,
            message_bytes: options.message_bytes,
            one_connection_per_message: false,
        };
        let own = source.run(interrupt)?;
        let limit = options.messages as f64 / own.ended.duration_since(own.begun).as_secs_f64();
        let engine = engine(options, interrupt, Some(&source))?;
        figures.push("server_limit_per_second", "messages/s", limit);
        figures.push("engine_per_second", "messages/s", engine.per_second);
        figures.push("engine_cpu_us_per_message", "µs", engine.cpu_us);
        figures.push("rate_engine_by_bare", "", engine.per_second / one.per_second);
        figures.push("rate_engine_by_server_limit", "", engine.per_second / limit);
    }
    Ok(figures)
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => write!(f, "{address}"),
            Self::Started(mta) => f.write_str(mta.name()),
        }
    }
}

impl DeliverOptions {
    fn config(&self) -> String {
        let chunking = match self.chunking {
            Chunking::Off => "off",
            Chunking::On => "on",
            Chunking::BackToBack => "back_to_back",
        };
        format!(
            "{}\n[shaping.default]\nconnection_limit = {}\nmax_deliveries_per_connection = {}\n\
             chunking = \"{chunking}\"\nmax_in_flight = {}\n",
            self.engine.config_extra, self.connections, self.deliveries_per_connection, self.in_flight,
        )
    }

    fn sink(&self) -> Result<Sink> {
        let tls = if self.tls { Some(TlsIdentity::generate(true)?) } else { None };
        let (audit, chunking, closed) = (false, self.sink_chunking, true);
        Sink::start(SinkOptions { audit, chunking, tls, closed, ..SinkOptions::on_loopback() })
    }
}

/// A sink, or the server instead of it, and the way there, which nothing gets through until it is opened.
struct Peer {
    sink: Sink,
    proxy: Option<Proxy>,
}

impl Peer {
    fn start(options: &DeliverOptions, server: Option<SocketAddr>) -> Result<Self> {
        let sink = options.sink()?;
        let to = server.unwrap_or(sink.addresses()[0]);
        let is_far = options.server.is_some() || !options.round_trip.is_zero();
        let proxy = if is_far { Some(Proxy::start(to, options.round_trip / 2)?) } else { None };
        Ok(Self { sink, proxy })
    }

    fn address(&self) -> SocketAddr {
        self.proxy.as_ref().map_or(self.sink.addresses()[0], Proxy::address)
    }

    fn open(&self) {
        self.sink.open();
        if let Some(proxy) = &self.proxy {
            proxy.open();
        }
    }
}

/// From the first message's arrival to the last's.
fn rate(sink: &Sink) -> Result<f64> {
    let totals = sink.ledger().totals();
    let (first, last) = totals.first.zip(totals.last).context("nothing arrived")?;
    Ok((totals.messages - 1) as f64 / last.duration_since(first).as_secs_f64())
}

fn bare(options: &DeliverOptions, interrupt: &Interrupt, round_trips: u32) -> Result<Pass> {
    let peer = Peer::start(options, None)?;
    peer.open();
    let bare = BareLoop {
        to: peer.address(),
        connections: options.connections,
        messages: options.messages,
        message_bytes: options.message_bytes,
        round_trips,
        tls: if options.tls { Some(client_config(false)?) } else { None },
    };
    let cpu = bare.run()?;
    interrupt.check()?;
    ensure!(peer.sink.ledger().totals().messages == options.messages, "the bare loop lost count");
    Ok(Pass { per_second: rate(&peer.sink)?, cpu_us: per_message(cpu, options.messages) })
}

/// To the sink; or to the server that `source` has sent to, the same messages. What that took the engine itself tells.
fn engine(options: &DeliverOptions, interrupt: &Interrupt, source: Option<&SmtpSourceRun>) -> Result<Pass> {
    let peer = Peer::start(options, source.map(|source| source.to))?;
    let tls = if options.tls { Some(OutboundTls::Required) } else { options.engine.tls };
    let engine_options = EngineOptions { config_extra: options.config(), tls, ..options.engine.clone() };
    let site = EngineSite::prepare(engine_options, peer.address())?;
    let mut engine = site.start(interrupt)?;
    match source {
        Some(source) => {
            SmtpSourceRun { to: site.smtp, ..source.clone() }.run(interrupt)?;
        }
        None => inject(options, site.smtp, None, interrupt)?,
    }
    // What accepting left to be done is not delivering.
    interrupt.pause(SETTLE)?;
    let before = Usage::of(engine.pid())?;
    peer.open();
    let (mut begun, mut left) = (None, options.messages);
    let patience = PATIENCE + 4 * options.round_trip * u32::try_from(options.messages).unwrap_or(u32::MAX);
    let done = interrupt.wait_until(patience, || {
        engine.check_alive(&site)?;
        if source.is_none() {
            return Ok(peer.sink.ledger().totals().messages >= options.messages);
        }
        let (queued, _) = site.queued("")?;
        if queued < left && begun.is_none() {
            begun = Some((Instant::now(), queued));
        }
        left = queued;
        Ok(queued == 0)
    })?;
    let ended = Instant::now();
    ensure!(done, "not all was delivered in {patience:?}:\n{}", site.log_tail());
    interrupt.pause(SETTLE)?;
    let cpu = Usage::of(engine.pid())?.since(&before).cpu();
    engine.terminate(interrupt, &site)?;
    let per_second = match begun {
        Some((begun, queued)) => queued as f64 / ended.duration_since(begun).as_secs_f64(),
        None => rate(&peer.sink)?,
    };
    Ok(Pass { per_second, cpu_us: per_message(cpu, options.messages) })
}

/// The CPU time a message where its route leads nowhere: scheduling, outcomes and their commits, the event log.
fn discarding(options: &DeliverOptions, interrupt: &Interrupt) -> Result<f64> {
    let engine_options = EngineOptions { config_extra: options.config(), tls: None, ..options.engine.clone() };
    let site = EngineSite::prepare_routed(engine_options, &[("*".to_owned(), "discard")])?;
    let mut engine = site.start(interrupt)?;
    // There is no peer to keep them waiting until all are accepted, so they are due later.
    let accepting = ACCEPTING_BASE + ACCEPTING_EACH * u32::try_from(options.messages)?;
    let due = Instant::now() + accepting;
    inject(options, site.smtp, Some(Timestamp::now() + accepting), interrupt)?;
    let early = due.saturating_duration_since(Instant::now() + SETTLE);
    ensure!(!early.is_zero(), "accepting {} messages took longer than {accepting:?}", options.messages);
    interrupt.pause(early)?;
    let before = Usage::of(engine.pid())?;
    interrupt.pause(SETTLE)?;
    let done = interrupt.wait_until(PATIENCE, || {
        engine.check_alive(&site)?;
        Ok(site.queued("")?.0 == 0)
    })?;
    ensure!(done, "not all was discarded in {PATIENCE:?}:\n{}", site.log_tail());
    interrupt.pause(SETTLE)?;
    let cpu = Usage::of(engine.pid())?.since(&before).cpu();
    engine.terminate(interrupt, &site)?;
    Ok(per_message(cpu, options.messages))
}

fn inject(
    options: &DeliverOptions,
    to: SocketAddr,
    first_attempt: Option<Timestamp>,
    interrupt: &Interrupt,
) -> Result<()> {
    let inject = InjectOptions {
        messages: Some(options.messages),
        first_attempt,
        sizes: Sizes::fixed(options.message_bytes),
        ..InjectOptions::to(to)
    };
    let injector = Injector::start(inject)?;
    interrupt.until(|| Ok(injector.is_finished()))?;
    let (injected, _) = injector.finish()?;
    ensure!(injected.accepted == options.messages, "{} of {} accepted", injected.accepted, options.messages);
    Ok(())
}

fn per_message(cpu: Duration, messages: u64) -> f64 {
    cpu.as_secs_f64() * 1e6 / messages as f64
}

/// So that the commits of what went before are in no figure, and those of the last outcomes are.
const SETTLE: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(60);
/// For how long messages may be accepted that are to be discarded together.
const ACCEPTING_BASE: Duration = Duration::from_secs(3);
const ACCEPTING_EACH: Duration = Duration::from_micros(200);
