//! What writers feel of maintenance: the same paced load on a spool at rest and on one that is being tidied.
//!
//! The busy spool holds a set of deferred messages among as many dead ones, so that copying forward goes on from the
//! first moment, and the growing log has new segments filled with zeros.

use anyhow::{Result, ensure};

use super::SpoolOptions;
use super::driver::{Driver, Setup};
use super::mail::Mail;
use super::traffic::{Bench, Found, Load, Plan, Traffic, Until};
use crate::interrupt::Interrupt;
use crate::report::Figures;

pub(super) async fn maintenance(options: &SpoolOptions, setup: &Setup<'_>, interrupt: &Interrupt) -> Result<Figures> {
    let until = Until { messages: options.messages, time: options.duration, ..Until::NEVER };
    let rate = options.rate.unwrap_or(RATE);
    let load = Load { writers: WRITERS, rate: Some(rate), with_outcomes: true, until };
    let (idle, _) = measured(options, setup, interrupt, Plan::NONE_DEFERRED, &load).await?;
    let plan = Plan::with_live(options.live, options.deferred_share, options.deferrals);
    let (busy, live) = measured(options, setup, interrupt, plan, &load).await?;
    let mut figures = Figures::default();
    figures.push("live_messages", "messages", live as f64);
    figures.push("idle_messages", "messages", idle.messages as f64);
    figures.push("busy_messages", "messages", busy.messages as f64);
    figures.push("busy_refused", "messages", busy.refused as f64);
    figures.push("copies", "messages", busy.counters.copies as f64);
    figures.push("copied_mib_per_second", "MiB/s", mib_per_second(busy.counters.copy_bytes, &busy));
    figures.push("idle_zeroed_mib_per_second", "MiB/s", mib_per_second(idle.counters.zeroed_bytes, &idle));
    figures.push("zeroed_mib_per_second", "MiB/s", mib_per_second(busy.counters.zeroed_bytes, &busy));
    figures.push("checkpoint_mib_per_second", "MiB/s", mib_per_second(busy.counters.checkpoint_bytes, &busy));
    figures.push("segments_retired", "", busy.counters.segments_retired as f64);
    figures.push_latencies(["idle_commit_p50_ms", "idle_commit_p99_ms", "idle_commit_p999_ms"], &idle.latencies);
    figures.push_latencies(["busy_commit_p50_ms", "busy_commit_p99_ms", "busy_commit_p999_ms"], &busy.latencies);
    let p999 = |found: &Found| found.latencies.quantile_ms(0.999);
    figures.push("p999_ratio", "≤ 2", p999(&busy) / p999(&idle));
    Ok(figures)
}

/// A phase on a spool of its own, and how many live messages were in it at the end.
async fn measured(
    options: &SpoolOptions,
    setup: &Setup<'_>,
    interrupt: &Interrupt,
    plan: Plan,
    load: &Load,
) -> Result<(Found, u64)> {
    let mail = Mail::new(options.message_bytes)?;
    let driver = Driver::open(setup).await?;
    let mut bench = Bench { driver, traffic: Traffic::new(plan), mail, interrupt };
    let result = phase(options, &mut bench, plan, load).await;
    let live = bench.driver.holdings().live_messages;
    bench.driver.close().await;
    let found = result?;
    ensure!(found.messages > 0, "the spool took no message");
    Ok((found, live))
}

async fn phase(options: &SpoolOptions, bench: &mut Bench<'_>, plan: Plan, load: &Load) -> Result<Found> {
    if plan == Plan::NONE_DEFERRED {
        bench.warm_up(WARM_UP_SEGMENTS * options.segment_bytes).await?;
    } else {
        bench.fill(options.live, FILL_SHARE).await?;
    }
    bench.run(load).await
}

fn mib_per_second(bytes: u64, found: &Found) -> f64 {
    bytes as f64 / f64::from(1 << 20) / found.elapsed.as_secs_f64().max(1e-9)
}

const WRITERS: usize = 64;
/// More than zeroing keeps up with, less than a tenth of what 64 writers reach.
const RATE: f64 = 20_000.0;
/// An empty log has one in use, one that is emptied and two in store.
const WARM_UP_SEGMENTS: u64 = 4;
/// Of what fills the spool, the deferred part: less than half, so that copying is worth it at once.
const FILL_SHARE: f64 = 0.45;
