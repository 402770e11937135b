//! A long queue: what a message that waits takes in memory, and what it takes from the mail that passes.
//!
//! One engine relays the load with nothing queued, then again while `queued` messages of another tenant wait, and once
//! more while these are let go. The last is all that a sender has who clears a backlog: new mail comes in, old mail is
//! read back from the spool, both leave through the same pairs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::inject::{InjectOptions, Injector};
use crate::interrupt::Interrupt;
use crate::measure::{Memory, MemoryWatch};
use crate::relay::{RelayOptions, Round, mib};
use crate::report::{Figures, all_arrived_once, note, rounds_json, table};
use crate::standing::{Standing, check_sink};

#[derive(Debug, Clone)]
pub struct MemoryOptions {
    pub relay: RelayOptions,
    /// Messages that wait.
    pub queued: u64,
}

#[derive(Debug)]
pub struct MemoryReport {
    pub rounds: Vec<Figures>,
    pub setup: Value,
}

impl MemoryReport {
    /// Whether all that was acknowledged arrived, once.
    pub fn holds(&self) -> bool {
        all_arrived_once(&self.rounds)
    }

    pub fn to_json(&self) -> Value {
        rounds_json(&self.setup, &self.rounds)
    }

    pub fn to_table(&self) -> String {
        table(&self.rounds)
    }
}

pub fn memory(options: &MemoryOptions, interrupt: &Interrupt) -> Result<MemoryReport> {
    ensure!(options.relay.rounds > 0 && options.queued > 0, "at least one round and one queued message are needed");
    let mut setup = check_sink(&options.relay)?;
    setup["queued"] = json!(options.queued);
    let engine = Standing::configured(&options.relay.engine);
    let relay = RelayOptions { engine, ..options.relay.clone() };
    let mut rounds = Vec::new();
    for number in 1..=relay.rounds {
        let mut round = Round::begin(&relay, interrupt, &mut setup)?;
        let figures = measure(&mut round, &relay, options.queued, interrupt);
        if !figures.as_ref().is_ok_and(|figures| figures.get("lost") == Some(0.0)) {
            note(&format!("spool and log are left in {}", round.site.keep().display()));
        }
        rounds.push(figures?);
        note(&format!("round {number} of {} is done", relay.rounds));
    }
    Ok(MemoryReport { rounds, setup })
}

fn measure(round: &mut Round, relay: &RelayOptions, queued: u64, interrupt: &Interrupt) -> Result<Figures> {
    let pid = round.engine.pid();
    let private_bytes = || Memory::of(pid).map(|memory| memory.private_bytes()).context("the engine has ended");
    let empty_bytes = private_bytes()?;
    round.warm_up(relay, interrupt)?;
    let empty = round.pass(relay, interrupt)?;
    let before_bytes = private_bytes()?;
    let mut standing = Standing::begin(round)?;
    let filled = standing.fill(round, relay, queued, interrupt)?;
    let full_bytes = private_bytes()?;
    let waiting = round.pass(relay, interrupt)?;

    let arrived_before = round.sink.messages();
    let watch = MemoryWatch::start(pid)?;
    let load = InjectOptions { to: round.site.smtp, messages: None, ..relay.inject.clone() };
    let injector = Injector::start(load)?;
    let drained = standing.drain(round, interrupt)?;
    let accepted_meanwhile = injector.accepted();
    injector.stop();
    interrupt.until(|| Ok(injector.is_finished()))?;
    let (injected, _) = injector.finish()?;
    let all = arrived_before + standing.messages + injected.accepted;
    round.wait_for(all, interrupt)?;
    interrupt.pause(SETTLE)?;
    let (arrived, duplicates) = (round.sink.messages(), round.sink.duplicates().unwrap_or_default());
    let (still_queued, _) = round.site.queued("")?;
    let peak_draining = watch.finish();
    round.engine.terminate(interrupt, &round.site)?;

    let get = |figures: &Figures, name: &str| figures.get(name).unwrap_or_default();
    let lost_before = get(&empty, "lost") + get(&waiting, "lost");
    let mut figures = Figures::default();
    figures.push("queued", "messages", queued as f64);
    figures.push("lost", "messages", lost_before + all.saturating_sub(arrived) as f64);
    figures.push("duplicates", "messages", duplicates as f64);
    figures.push("still_queued", "messages", still_queued as f64);
    figures.push("queueing_accepted_per_second", "messages/s", filled.per_second);
    figures.push("queueing_cpu_us_per_message", "µs", filled.cpu_us);
    figures.push("empty_anonymous_mib", "MiB", mib(empty_bytes));
    figures.push("anonymous_mib", if queued == GOAL_QUEUED { "MiB, goal ≤ 250" } else { "MiB" }, mib(full_bytes));
    figures.push("bytes_per_entry", "bytes", full_bytes.saturating_sub(before_bytes) as f64 / queued as f64);
    figures.push("draining_peak_anonymous_mib", "MiB", mib(peak_draining));
    figures.push("empty_delivered_per_second", "messages/s", get(&empty, "delivered_per_second"));
    figures.push("waiting_delivered_per_second", "messages/s", get(&waiting, "delivered_per_second"));
    figures.push("draining_delivered_per_second", "messages/s", drained.per_second);
    let elapsed = drained.messages as f64 / drained.per_second;
    figures.push("draining_accepted_per_second", "messages/s", accepted_meanwhile as f64 / elapsed);
    let by_empty = |per_second: f64| per_second / get(&empty, "delivered_per_second");
    figures.push("waiting_by_empty", "", by_empty(get(&waiting, "delivered_per_second")));
    figures.push("draining_by_empty", "goal ≥ 0.9", by_empty(drained.per_second));
    figures.push("empty_cpu_us_per_message", "µs", get(&empty, "engine_cpu_us_per_message"));
    figures.push("waiting_cpu_us_per_message", "µs", get(&waiting, "engine_cpu_us_per_message"));
    figures.push("draining_cpu_us_per_delivery", "µs", drained.cpu_us);
    Ok(figures)
}

/// What the goal is for.
const GOAL_QUEUED: u64 = 1_000_000;
const SETTLE: Duration = Duration::from_millis(300);
