//! What deferred mail costs the rest: messages appended and delivered a second while a good part of the spool is
//! deferred and copied forward, against the same on an empty spool.

use anyhow::Result;

use super::SpoolOptions;
use super::driver::{Driver, Setup};
use super::mail::Mail;
use super::traffic::{Bench, Found, Load, Plan, Traffic, Until};
use crate::interrupt::Interrupt;
use crate::report::Figures;

pub(super) async fn deferred(options: &SpoolOptions, setup: &Setup<'_>, interrupt: &Interrupt) -> Result<Figures> {
    let plan = Plan::with_live(options.live, options.deferred_share, options.deferrals);
    let (empty, _) = measured(options, setup, interrupt, Plan::NONE_DEFERRED).await?;
    let (loaded, live_bytes) = measured(options, setup, interrupt, plan).await?;
    let mut figures = Figures::default();
    figures.push("empty_messages", "messages", empty.messages as f64);
    figures.push("loaded_messages", "messages", loaded.messages as f64);
    figures.push("loaded_refused", "messages", loaded.refused as f64);
    figures.push("deferred_part_of_spool", "", live_bytes as f64 / setup.max_bytes as f64);
    figures.push("copies_per_message", "", loaded.counters.copies as f64 / loaded.messages.max(1) as f64);
    figures.push("empty_messages_per_second", "messages/s", empty.per_second());
    figures.push("loaded_messages_per_second", "messages/s", loaded.per_second());
    figures.push("throughput_ratio", "≥ 0.80", loaded.per_second() / empty.per_second());
    figures.push("empty_cpu_us_per_message", "µs", empty.cpu_us_each());
    figures.push("loaded_cpu_us_per_message", "µs", loaded.cpu_us_each());
    Ok(figures)
}

/// A phase on a spool of its own, and the bytes that live messages took at its end.
async fn measured(
    options: &SpoolOptions,
    setup: &Setup<'_>,
    interrupt: &Interrupt,
    plan: Plan,
) -> Result<(Found, u64)> {
    let mail = Mail::new(options.message_bytes)?;
    let driver = Driver::open(setup).await?;
    let mut bench = Bench { driver, traffic: Traffic::new(plan), mail, interrupt };
    let result = phase(options, &mut bench, plan).await;
    let live_bytes = bench.driver.holdings().live_bytes;
    bench.driver.close().await;
    Ok((result?, live_bytes))
}

async fn phase(options: &SpoolOptions, bench: &mut Bench<'_>, plan: Plan) -> Result<Found> {
    let load = |until| Load { writers: WRITERS, rate: options.rate, with_outcomes: true, until };
    if plan == Plan::NONE_DEFERRED {
        bench.warm_up(WARM_UP_SEGMENTS * options.segment_bytes).await?;
    } else {
        bench.fill(options.live, FILL_SHARE).await?;
        // Until the log has gone round, and no file that the fill has made is still without its zeros.
        bench.run(&load(Until { messages: (ROUNDS * options.live).min(options.messages), ..Until::NEVER })).await?;
    }
    bench.run(&load(Until { messages: options.messages, time: options.duration, ..Until::NEVER })).await
}

const WRITERS: usize = 64;
/// An empty log has one in use, one that is emptied and two in store.
const WARM_UP_SEGMENTS: u64 = 4;
const ROUNDS: u64 = 4;
/// Of what fills the spool, the deferred part: it must fit before anything is copied.
const FILL_SHARE: f64 = 0.8;
