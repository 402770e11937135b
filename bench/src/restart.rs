//! An engine with a full spool is killed and started again: when is it ready, when does the first message go out, how
//! much memory does a queued message take, and is all that was acknowledged still there?
//!
//! Every recipient domain is routed to an address of its own, at which nobody listens, so that mail stays queued
//! without an attempt. Once enough is acknowledged, the engine is killed while more is coming. In each round a sink
//! then listens at the address of one site, drawn at random: its messages are among all others in the spool, and the
//! first that arrives is what a restart is for. At the end of a round the engine is killed again.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Advice, fadvise};
use serde_json::{Value, json};

use crate::inject::{InjectOptions, Injector};
use crate::interrupt::Interrupt;
use crate::measure::{Machine, Memory};
use crate::message::Random;
use crate::peers::{Engine, EngineOptions, EngineSite, free_port};
use crate::relay::{mib, site_routes};
use crate::report::{Figures, note, rounds_json, table};
use crate::sink::{Sink, SinkOptions};

#[derive(Debug, Clone)]
pub struct RestartOptions {
    pub engine: EngineOptions,
    /// Its `to`, `messages`, `domains` and `persist` are set here.
    pub inject: InjectOptions,
    /// Acknowledged messages before the first kill.
    pub messages: u64,
    pub sites: usize,
    /// Restarts of the same spool, each with another site.
    pub rounds: usize,
    /// Nothing of the spool is in memory at a start.
    pub cold: bool,
    pub seed: u64,
}

/// All rounds.
#[derive(Debug)]
pub struct RestartReport {
    pub rounds: Vec<Figures>,
    pub setup: Value,
}

impl RestartReport {
    /// Whether no acknowledged message was missing after any restart, and every restart led to deliveries.
    pub fn holds(&self) -> bool {
        self.rounds.iter().all(|round| round.get("missing") == Some(0.0) && round.get("first_delivery_ms").is_some())
    }

    pub fn to_json(&self) -> Value {
        rounds_json(&self.setup, &self.rounds)
    }

    pub fn to_table(&self) -> String {
        table(&self.rounds)
    }
}

pub fn restart(options: &RestartOptions, interrupt: &Interrupt) -> Result<RestartReport> {
    ensure!((1..=SITES_MAX).contains(&options.sites), "sites: write 1 to {SITES_MAX}");
    ensure!((1..=options.sites).contains(&options.rounds), "at least one round, and a site for each, are needed");
    ensure!(options.messages > 0, "at least one message is needed");
    let port = free_port()?.port();
    let mut routes = site_routes(options.sites, &options.inject.recipient_domain, port);
    let mut spool = FullSpool::prepare(options, &routes, interrupt)?;
    let mut random = Random::new(options.seed);
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let route = routes.swap_remove((random.next_u64() % routes.len() as u64) as usize);
        let figures = spool.round(options, &route, interrupt);
        let is_whole = |figures: &Figures| figures.get("missing") == Some(0.0);
        if !figures.as_ref().is_ok_and(is_whole) {
            note(&format!("spool and log are left in {}", spool.site.keep().display()));
        }
        rounds.push(figures?);
        if options.rounds > 1 {
            note(&format!("round {number} of {} is done", options.rounds));
        }
    }
    let setup = json!({
        "machine": Machine::look(),
        "messages": options.messages,
        "sites": options.sites,
        "size": options.inject.sizes.to_string(),
        "cold": options.cold,
        "durability": options.engine.durability,
        "spool_filesystem": spool.site.filesystem,
    });
    Ok(RestartReport { rounds, setup })
}

/// An engine's directory with mail that was acknowledged before the engine was killed.
struct FullSpool {
    site: EngineSite,
    acknowledged: u64,
    /// Sent without an answer: any of them may be in the spool, too.
    unanswered: u64,
    /// Different messages, in the rounds so far. Each round has a site of its own, so that none is counted twice.
    delivered: u64,
    /// Of the engine without mail.
    empty_bytes: u64,
    accepted_per_second: f64,
}

impl FullSpool {
    fn prepare(options: &RestartOptions, routes: &[(String, SocketAddr)], interrupt: &Interrupt) -> Result<Self> {
        let mut site = EngineSite::prepare_routed(options.engine.clone(), routes)?;
        let mut engine = site.start(interrupt)?;
        let empty_bytes = private_bytes(&engine)?;
        let inject = InjectOptions {
            to: site.smtp,
            messages: None,
            domains: options.sites,
            domain_exponent: 0.0,
            persist: true,
            ..options.inject.clone()
        };
        let injector = Injector::start(inject)?;
        let accepted = wait_for_accepted(&injector, &mut engine, &site, options.messages, interrupt);
        if accepted.is_err() {
            note(&format!("spool and log are left in {}", site.keep().display()));
        }
        accepted?;
        engine.kill()?;
        injector.stop();
        injector.abandon();
        let (injected, acknowledged) = injector.finish()?;
        let seconds = injected.elapsed().as_secs_f64().max(1e-9);
        let acknowledged = acknowledged.len() as u64;
        note(&format!("killed with {acknowledged} messages acknowledged in {seconds:.1} s"));
        Ok(Self {
            site,
            acknowledged,
            unanswered: injected.unanswered,
            delivered: 0,
            empty_bytes,
            accepted_per_second: acknowledged as f64 / seconds,
        })
    }

    /// One restart, until no more mail comes to the site that now listens.
    fn round(
        &mut self,
        options: &RestartOptions,
        (domain, address): &(String, SocketAddr),
        interrupt: &Interrupt,
    ) -> Result<Figures> {
        let sink = Sink::start(SinkOptions { listen: vec![*address], ..SinkOptions::on_loopback() })?;
        if options.cold {
            forget_cached(self.site.path())?;
        }
        let mut engine = self.site.start(interrupt)?;
        let ready_after = engine.ready_after;
        let private_bytes = private_bytes(&engine)?;
        let peak_bytes = Memory::of(engine.pid())?.peak_rss_bytes;
        let first = wait_for_first(&sink, &mut engine, &self.site, interrupt)?;
        wait_until_still(&sink, interrupt)?;
        engine.check_alive(&self.site)?;
        let (queued, left_behind) = self.site.queued(domain)?;
        engine.kill()?;
        let delivered = sink.ledger().totals().distinct();
        sink.stop();
        self.delivered += delivered;

        let found = queued + self.delivered;
        // What was delivered in this round was queued when the memory was read.
        let entries = (queued + delivered).max(1) as f64;
        let mut figures = Figures::default();
        figures.push("acknowledged", "messages", self.acknowledged as f64);
        figures.push("unanswered", "messages", self.unanswered as f64);
        figures.push("accepted_per_second", "messages/s", self.accepted_per_second);
        figures.push("queued", "messages", queued as f64);
        figures.push("delivered", "messages", delivered as f64);
        figures.push("left_behind", "messages", left_behind as f64);
        figures.push("missing", "messages", self.acknowledged.saturating_sub(found) as f64);
        figures.push("ready_after_ms", "ms", ms(ready_after));
        if let Some(first) = first {
            figures.push("first_delivery_ms", "ms", ms(first));
        }
        figures.push("anonymous_mib", "MiB", mib(private_bytes));
        figures.push("empty_anonymous_mib", "MiB", mib(self.empty_bytes));
        let more_bytes = private_bytes.saturating_sub(self.empty_bytes);
        figures.push("bytes_per_entry", "bytes", more_bytes as f64 / entries);
        figures.push("peak_rss_mib", "MiB", mib(peak_bytes));
        Ok(figures)
    }
}

/// Memory that is the process's own: what mapped files take is the kernel's to give away.
fn private_bytes(engine: &Engine) -> Result<u64> {
    Ok(Memory::of(engine.pid()).context("the engine has ended")?.private_bytes())
}

fn wait_for_accepted(
    injector: &Injector,
    engine: &mut Engine,
    site: &EngineSite,
    messages: u64,
    interrupt: &Interrupt,
) -> Result<()> {
    let (mut accepted, mut since, mut told) = (0, Instant::now(), 0);
    interrupt.until(|| {
        let now_accepted = injector.accepted();
        if now_accepted != accepted {
            (accepted, since) = (now_accepted, Instant::now());
        }
        if accepted * NOTES_MAX / messages > told {
            told = accepted * NOTES_MAX / messages;
            note(&format!("{accepted} of {messages} messages accepted"));
        }
        engine.check_alive(site)?;
        let is_stalled = since.elapsed() > STALL_PATIENCE;
        ensure!(!is_stalled, "the engine stopped answering after {accepted} of {messages} messages");
        Ok(accepted >= messages)
    })
}

/// From the engine's start until the first message's arrival; `None` when none comes.
fn wait_for_first(
    sink: &Sink,
    engine: &mut Engine,
    site: &EngineSite,
    interrupt: &Interrupt,
) -> Result<Option<Duration>> {
    interrupt.wait_until(STALL_PATIENCE, || {
        engine.check_alive(site)?;
        Ok(sink.ledger().totals().first.is_some())
    })?;
    Ok(sink.ledger().totals().first.map(|first| first.saturating_duration_since(engine.started)))
}

fn wait_until_still(sink: &Sink, interrupt: &Interrupt) -> Result<()> {
    let (mut seen, mut since) = (0, Instant::now());
    interrupt.until(|| {
        let arrived = sink.ledger().totals().messages;
        if arrived != seen {
            (seen, since) = (arrived, Instant::now());
        }
        Ok(since.elapsed() > QUIET)
    })
}

/// Drops the page cache, or, without the right to, at least what it has of the files below `directory`.
fn forget_cached(directory: &Path) -> Result<()> {
    // Only clean pages can be dropped.
    rustix::fs::sync();
    if fs::write("/proc/sys/vm/drop_caches", "1").is_ok() {
        return Ok(());
    }
    forget_files(directory)
}

fn forget_files(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            forget_files(&path)?;
        } else {
            fadvise(File::open(&path)?, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The engine lists so many queues.
const SITES_MAX: usize = 10_000;
const STALL_PATIENCE: Duration = Duration::from_secs(60);
/// A stillness so long at the sink: the site's mail is delivered and its outcomes are committed.
const QUIET: Duration = Duration::from_secs(1);
const NOTES_MAX: u64 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_files_are_forgotten_all_the_way_down() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("log-0000")).unwrap();
        fs::write(directory.path().join("log-0000/segment-0000"), b"mail").unwrap();
        forget_files(directory.path()).unwrap();
        assert!(forget_files(&directory.path().join("none")).is_err());
    }
}
