//! kill -9 under load: every acknowledged message must arrive, and few may arrive twice.
//!
//! The engine is killed and restarted on the same spool while an injector keeps sending, reconnecting as often as it
//! takes. An acknowledged id that never reaches the sink is lost. An outcome that was not yet committed when the engine
//! died lets its message arrive again: at each kill at most what was under way on the sink's connections plus what was
//! delivered in the last 10 ms; and no more than the restarted engine counts. In the end a clean restart must send
//! nothing more.
//!
//! kill -9 shows that the process keeps its promise; pages that it wrote survive in the kernel, so it says nothing
//! about the disk.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::inject::{InjectOptions, Injector};
use crate::interrupt::Interrupt;
use crate::message::{BenchId, Random};
use crate::peers::{Engine, EngineOptions, EngineSite, metric};
use crate::report::note;
use crate::sink::ledger::Ledger;
use crate::sink::{Sink, SinkOptions};

#[derive(Debug, Clone)]
pub struct KillOptions {
    pub engine: EngineOptions,
    /// Its `to`, `messages` and `persist` are set here.
    pub inject: InjectOptions,
    pub kills: u32,
    /// The engine runs this long between a start and a kill, drawn evenly.
    pub run_min: Duration,
    pub run_max: Duration,
    pub sink_delay: Duration,
    /// A stillness so long at the sink is the end.
    pub quiet: Duration,
    pub seed: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct KillReport {
    pub kills: Vec<KillRecord>,
    pub audit: Audit,
    /// Messages that the sink got after the last clean restart: not one is due then.
    pub sent_after_clean_restart: u64,
    /// What else went wrong, in words.
    pub failures: Vec<String>,
    pub durability: crate::peers::Durability,
    pub spool_filesystem: &'static str,
}

#[derive(Debug, Clone, Serialize)]
pub struct KillRecord {
    pub accepted_before: u64,
    pub delivered_before: u64,
    /// Connections open at the sink when the signal was sent.
    pub connections: u64,
    /// Deliveries in the 10 ms before.
    pub recent_deliveries: u64,
    /// Recipients who may get their message twice, as the restarted engine says (`possible_duplicates`), if it does.
    pub counted: Option<u64>,
    pub ready_after_ms: Option<f64>,
    /// From the restart to the next delivery.
    pub first_delivery_after_ms: Option<f64>,
}

/// Acknowledged against delivered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Audit {
    pub acknowledged: u64,
    pub lost: u64,
    /// The first few, to look for in the spool.
    pub lost_ids: Vec<String>,
    pub duplicates: u64,
    pub duplicates_allowed: u64,
    /// Arrived though the answer to their final dot was lost with the connection: allowed.
    pub delivered_unacknowledged: u64,
}

impl Audit {
    pub fn take(run: u64, acknowledged: &[u64], ledger: &Ledger, duplicates_allowed: u64) -> Self {
        let missing = |sequence: &&u64| ledger.times_seen(BenchId { run, sequence: **sequence }) == 0;
        let lost: Vec<&u64> = acknowledged.iter().filter(missing).collect();
        let name = |sequence: &&u64| BenchId { run, sequence: **sequence }.to_string();
        let found = acknowledged.len() as u64 - lost.len() as u64;
        Self {
            acknowledged: acknowledged.len() as u64,
            lost: lost.len() as u64,
            lost_ids: lost.iter().take(LOST_IDS_SHOWN).map(name).collect(),
            duplicates: ledger.totals().duplicates,
            duplicates_allowed,
            delivered_unacknowledged: ledger.distinct_of_run(run) - found,
        }
    }

    pub fn holds(&self) -> bool {
        self.lost == 0 && self.duplicates <= self.duplicates_allowed
    }
}

impl KillReport {
    pub fn holds(&self) -> bool {
        let is_counted = self.counted().is_none_or(|counted| self.audit.duplicates <= counted);
        self.audit.holds() && is_counted && self.sent_after_clean_restart == 0 && self.failures.is_empty()
    }

    /// By an engine that counts.
    fn counted(&self) -> Option<u64> {
        self.kills.iter().map(|kill| kill.counted).sum()
    }

    pub fn to_text(&self) -> String {
        let audit = &self.audit;
        let mut text = String::new();
        let show = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"));
        for (number, kill) in self.kills.iter().enumerate() {
            text.push_str(&format!(
                "kill {}: {} accepted, {} delivered, {} connections, {} deliveries in the last 10 ms; ready again \
                 after {}, next delivery after {}\n",
                number + 1,
                kill.accepted_before,
                kill.delivered_before,
                kill.connections,
                kill.recent_deliveries,
                show(kill.ready_after_ms),
                show(kill.first_delivery_after_ms),
            ));
        }
        text.push_str(&format!(
            "acknowledged               {}\nlost                       {}\n\
             duplicates                 {} (allowed: {}, counted by the engine: {})\ndelivered, unacknowledged  {}\n\
             sent after clean restart   {}\nverdict                    {}\n",
            audit.acknowledged,
            audit.lost,
            audit.duplicates,
            audit.duplicates_allowed,
            self.counted().map_or("-".to_owned(), |counted| counted.to_string()),
            audit.delivered_unacknowledged,
            self.sent_after_clean_restart,
            if self.holds() { "holds" } else { "BROKEN" },
        ));
        for id in &audit.lost_ids {
            text.push_str(&format!("lost: {id}\n"));
        }
        for failure in &self.failures {
            text.push_str(&format!("failed: {failure}\n"));
        }
        text
    }
}

pub fn kill(options: &KillOptions, interrupt: &Interrupt) -> Result<KillReport> {
    ensure!(options.run_min <= options.run_max, "the shortest run is longer than the longest");
    let sink = Sink::start(SinkOptions { delay: options.sink_delay, ..SinkOptions::on_loopback() })?;
    let mut site = EngineSite::prepare(options.engine.clone(), sink.addresses()[0])?;
    let engine = site.start(interrupt)?;
    let inject = InjectOptions { to: site.smtp, messages: None, persist: true, ..options.inject.clone() };
    let injector = Injector::start(inject)?;
    let ledger = sink.ledger();
    let run = Run { options, interrupt, ledger, site: &site };
    let mut failures = Vec::new();
    let mut kills = Vec::new();
    // Whatever fails from here on, the acknowledged messages are held against the delivered ones.
    let engine = run.kill_repeatedly(engine, &injector, &mut kills).unwrap_or_else(|error| {
        failures.push(format!("{error:#}"));
        None
    });
    interrupt.pause(options.run_min)?;
    injector.stop();
    if !interrupt.wait_until(STALL_PATIENCE, || Ok(injector.is_finished()))? {
        failures.push(format!("the engine left sessions without an answer for {STALL_PATIENCE:?}"));
        injector.abandon();
    }
    let (injected, acknowledged) = injector.finish()?;
    let allowed = kills.iter().map(|kill: &KillRecord| kill.connections + kill.recent_deliveries).sum();
    let audit = || Audit::take(injected.run, &acknowledged, ledger, allowed);
    run.wait_for_the_rest(audit)?;
    let before = ledger.totals().messages;
    if let Some(engine) = engine
        && let Err(error) = run.restart_cleanly(engine)
    {
        failures.push(format!("{error:#}"));
    }
    interrupt.check()?;
    let sent_after_clean_restart = ledger.totals().messages - before;
    let (durability, spool_filesystem, audit) = (options.engine.durability, site.filesystem, audit());
    let report = KillReport { kills, audit, sent_after_clean_restart, failures, durability, spool_filesystem };
    if !report.holds() {
        note(&format!("spool and log are left in {}", site.keep().display()));
    }
    Ok(report)
}

/// What all parts of a run share.
struct Run<'a> {
    options: &'a KillOptions,
    interrupt: &'a Interrupt,
    ledger: &'a Ledger,
    site: &'a EngineSite,
}

impl Run<'_> {
    /// Gives the engine of the last restart.
    fn kill_repeatedly(
        &self,
        mut engine: Engine,
        injector: &Injector,
        kills: &mut Vec<KillRecord>,
    ) -> Result<Option<Engine>> {
        let (options, interrupt, ledger) = (self.options, self.interrupt, self.ledger);
        let mut random = Random::new(options.seed);
        for number in 1..=options.kills {
            let span = (options.run_max - options.run_min).mul_f64(random.unit());
            interrupt.pause(options.run_min + span)?;
            engine.check_alive(self.site)?;
            let (accepted_before, totals) = (injector.accepted(), ledger.totals());
            let signalled = engine.kill()?;
            let recent_deliveries = ledger.arrivals_between(signalled - RECENT, signalled);
            let delivered_before = totals.messages;
            note(&format!(
                "kill {number} of {}: {accepted_before} accepted, {delivered_before} delivered",
                options.kills
            ));
            // First the sink works off what the dead engine had written: that is no delivery of the next one's.
            interrupt.wait_until(CLOSE_PATIENCE, || Ok(ledger.totals().connections_open == 0))?;
            let (restarted, delivered) = (Instant::now(), ledger.totals().messages);
            let mut record = KillRecord {
                accepted_before,
                delivered_before,
                connections: totals.connections_open,
                recent_deliveries,
                counted: None,
                ready_after_ms: None,
                first_delivery_after_ms: None,
            };
            let started = self.site.start(interrupt);
            if let Ok(engine) = &started {
                record.counted = metric(self.site.http, "possible_duplicates").ok().map(|counted| counted as u64);
                let moved = interrupt.wait_until(STALL_PATIENCE, || Ok(ledger.totals().messages > delivered))?;
                record.ready_after_ms = Some(engine.ready_after.as_secs_f64() * 1e3);
                record.first_delivery_after_ms = moved.then(|| restarted.elapsed().as_secs_f64() * 1e3);
            }
            kills.push(record);
            engine = started?;
        }
        Ok(Some(engine))
    }

    /// Until all is there and still, or what is missing no longer comes.
    fn wait_for_the_rest(&self, audit: impl Fn() -> Audit) -> Result<()> {
        let (mut seen, mut since, mut lost) = (0, Instant::now(), None);
        self.interrupt.until(|| {
            let arrived = self.ledger.totals().messages;
            if arrived != seen {
                (seen, since, lost) = (arrived, Instant::now(), None);
            }
            // Complete is not over: what else the engine holds may be a second copy.
            if since.elapsed() < self.options.quiet {
                return Ok(false);
            }
            let is_complete = *lost.get_or_insert_with(|| audit().lost) == 0;
            Ok(is_complete || since.elapsed() > STALL_PATIENCE)
        })
    }

    fn restart_cleanly(&self, mut engine: Engine) -> Result<()> {
        engine.terminate(self.interrupt, self.site)?;
        let mut engine = self.site.start(self.interrupt)?;
        self.interrupt.pause(self.options.quiet)?;
        engine.terminate(self.interrupt, self.site)
    }
}

const RECENT: Duration = Duration::from_millis(10);
const STALL_PATIENCE: Duration = Duration::from_secs(30);
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);
const LOST_IDS_SHOWN: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inject;
    use crate::message::stuff;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    #[test]
    fn planted_loss_and_duplicates_are_found() {
        let sink = Sink::start(SinkOptions::on_loopback()).unwrap();
        let options = InjectOptions { messages: Some(20), sessions: 2, ..InjectOptions::to(sink.addresses()[0]) };
        let run = inject::inject(options).unwrap().run;
        let acknowledged: Vec<u64> = (0..20).collect();
        let ledger = sink.ledger();
        assert!(Audit::take(run, &acknowledged, ledger, 0).holds());

        // Acknowledged but never delivered.
        let with_lost: Vec<u64> = (0..21).collect();
        let audit = Audit::take(run, &with_lost, ledger, 0);
        assert_eq!((audit.lost, audit.holds()), (1, false));
        assert_eq!(audit.lost_ids, [BenchId { run, sequence: 20 }.to_string()]);

        // Delivered, but its acknowledgement was lost.
        let audit = Audit::take(run, &acknowledged[1..], ledger, 0);
        assert_eq!((audit.delivered_unacknowledged, audit.holds()), (1, true));

        // Delivered again.
        let mut session = b"HELO a\r\nMAIL FROM:<>\r\nRCPT TO:<r@b>\r\nDATA\r\n".to_vec();
        stuff(format!("A: b\r\nX-Bench-Id: {}\r\n\r\n", BenchId { run, sequence: 3 }).as_bytes(), &mut session);
        session.extend_from_slice(b"QUIT\r\n");
        let mut stream = TcpStream::connect(sink.addresses()[0]).unwrap();
        stream.write_all(&session).unwrap();
        let mut replies = String::new();
        stream.read_to_string(&mut replies).unwrap();
        assert!(replies.ends_with("221 2.0.0 Bye\r\n"), "{replies}");
        let audit = Audit::take(run, &acknowledged, ledger, 0);
        assert_eq!((audit.duplicates, audit.holds()), (1, false));
        assert!(Audit::take(run, &acknowledged, ledger, 1).holds());
    }
}
