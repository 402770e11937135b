//! How many bytes are written for a byte of mail, while a part of the mail stays for hours.
//!
//! The spool may hold twice what the deferred messages take, so that copying forward has to make room all the time.
//! Every message gets its outcomes. Counted is what is written after the deferred set was built up and the log has gone
//! round once.

use anyhow::Result;

use super::SpoolOptions;
use super::driver::{Counters, Driver, Setup};
use super::mail::Mail;
use super::traffic::{Bench, Found, Load, Plan, Traffic, Until};
use crate::interrupt::Interrupt;
use crate::report::Figures;

pub(super) async fn amplification(options: &SpoolOptions, setup: &Setup<'_>, interrupt: &Interrupt) -> Result<Figures> {
    let mail = Mail::new(options.message_bytes)?;
    let plan = Plan::with_live(options.live, options.deferred_share, options.deferrals);
    let driver = Driver::open(setup).await?;
    let mut bench = Bench { driver, traffic: Traffic::new(plan), mail, interrupt };
    let result = phase(options, &mut bench).await;
    let holdings = bench.driver.holdings();
    let accepted_each = bench.mail.message_bytes();
    bench.driver.close().await;
    let found = result?;
    let mut figures = Figures::default();
    figures.push("messages", "messages", found.messages as f64);
    figures.push("refused", "messages", found.refused as f64);
    figures.push("live_messages", "messages", holdings.live_messages as f64);
    figures.push("live_mib", "MiB", mib(holdings.live_bytes));
    figures.push("used_mib", "MiB", mib(holdings.used_bytes));
    figures.push("max_mib", "MiB", mib(setup.max_bytes));
    figures.push("messages_per_second", "messages/s", found.per_second());
    figures.push("cpu_us_per_message", "µs", found.cpu_us_each());
    push_parts(&mut figures, &found.counters, found.counters.messages * accepted_each);
    Ok(figures)
}

async fn phase(options: &SpoolOptions, bench: &mut Bench<'_>) -> Result<Found> {
    let load = |messages| Load {
        writers: WRITERS,
        rate: options.rate,
        with_outcomes: true,
        until: Until { messages, ..Until::NEVER },
    };
    bench.fill(options.live, FILL_SHARE).await?;
    bench.run(&load(options.live.min(options.messages))).await?;
    bench.run(&load((options.live * options.live_sizes).min(options.messages))).await
}

/// Each part of what was written, by byte of accepted mail.
fn push_parts(figures: &mut Figures, counters: &Counters, accepted_bytes: u64) {
    let ratio = |bytes: u64| bytes as f64 / accepted_bytes.max(1) as f64;
    figures.push("amplification", "≤ 1.50", ratio(counters.written_bytes));
    figures.push("of_it_messages", "", ratio(counters.message_bytes));
    figures.push("of_it_outcomes", "", ratio(counters.outcome_bytes));
    figures.push("of_it_copies", "", ratio(counters.copy_bytes));
    figures.push("of_it_checkpoints", "", ratio(counters.checkpoint_bytes));
    figures.push("of_it_padding_and_headers", "", ratio(counters.padding_bytes()));
    figures.push("zeroing_apart", "", ratio(counters.zeroed_bytes));
    figures.push("outcomes_per_message", "", counters.outcomes as f64 / counters.messages.max(1) as f64);
    figures.push("copies_per_message", "", counters.copies as f64 / counters.messages.max(1) as f64);
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

const WRITERS: usize = 64;
/// Of what fills the spool, the deferred part: it must fit before anything is copied.
const FILL_SHARE: f64 = 0.8;
