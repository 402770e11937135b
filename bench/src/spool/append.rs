//! Durable appends beside the same bytes written bare.
//!
//! Writers append in bursts that fit into segments which were used before; between bursts, all messages get their
//! outcomes and their segments are retired, which isn't counted unless [`SpoolOptions::outcomes_along`] asks for it.
//! After each burst as many bare writes follow, each as long as the burst's commits were on average: by a call, and on
//! the ring, where the kernel hands them to a worker, as it does with commits. So all see the same minutes of a machine
//! that has other work, and what the ring costs is told apart from what the spool does.

use anyhow::Result;

use super::SpoolOptions;
use super::bare_write::{BareFile, BareWrites};
use super::driver::{Driver, Setup};
use super::mail::Mail;
use super::traffic::{Bench, Found, Load, Plan, Traffic, Until};
use crate::interrupt::Interrupt;
use crate::report::Figures;

pub(super) async fn append(
    options: &SpoolOptions,
    setup: &Setup<'_>,
    writers: usize,
    interrupt: &Interrupt,
) -> Result<Figures> {
    let mail = Mail::new(options.message_bytes)?;
    let driver = Driver::open(setup).await?;
    let mut bench = Bench { driver, traffic: Traffic::new(Plan::NONE_DEFERRED), mail, interrupt };
    let mut bare_file = BareFile::create(setup.parent, BURST_SEGMENTS * setup.segment_bytes)?;
    let result = bursts(options, setup, writers, &mut bench, &mut bare_file).await;
    bench.driver.close().await;
    Ok(figures(writers, &result?))
}

async fn bursts(
    options: &SpoolOptions,
    setup: &Setup<'_>,
    writers: usize,
    bench: &mut Bench<'_>,
    bare_file: &mut BareFile,
) -> Result<Measured> {
    let burst_bytes = BURST_SEGMENTS * setup.segment_bytes;
    // Envelope and headers take up to so much more; then a commit is padded to whole blocks.
    let record_bytes = bench.mail.message_bytes() + RECORD_OVERHEAD_MAX;
    let commit_bytes = (writers as u64 * record_bytes).next_multiple_of(BLOCK_BYTES);
    let burst = (burst_bytes / commit_bytes).max(1) * writers as u64;
    bench.warm_up(burst_bytes + setup.segment_bytes).await?;
    let Measured { mut spool, mut bare, mut ring } = Measured::default();
    while spool.messages < options.messages && spool.elapsed < options.duration {
        let messages = burst.min(options.messages - spool.messages);
        let until = Until { messages, time: options.duration - spool.elapsed, ..Until::NEVER };
        let load = Load { writers, rate: None, with_outcomes: options.outcomes_along, until };
        let found = bench.run(&load).await?;
        bench.settle().await?;
        let commits = found.counters.commits.max(1);
        let commit_bytes = found.counters.written_bytes.div_ceil(commits).next_multiple_of(BLOCK_BYTES);
        let each = found.messages as f64 / commits as f64;
        bare.add(&bare_file.run(BareWrites::Call, commit_bytes as usize, commits, each).await?);
        ring.add(&bare_file.run(BareWrites::Ring, commit_bytes as usize, commits, each).await?);
        spool.add(&found);
    }
    Ok(Measured { spool, bare, ring })
}

/// What took turns.
#[derive(Debug, Default)]
struct Measured {
    spool: Found,
    bare: Found,
    ring: Found,
}

fn figures(writers: usize, measured: &Measured) -> Figures {
    let Measured { spool, bare, ring } = measured;
    let mut figures = Figures::default();
    let messages = spool.messages.max(1) as f64;
    figures.push("messages", "messages", spool.messages as f64);
    figures.push("messages_per_commit", "", messages / spool.counters.commits.max(1) as f64);
    figures.push("written_bytes_per_message", "bytes", spool.counters.written_bytes as f64 / messages);
    figures.push("records_per_second", "records/s", spool.per_second());
    figures.push("bare_records_per_second", "records/s", bare.per_second());
    figures.push("ring_records_per_second", "records/s", ring.per_second());
    // A lone writer's rate is its latency; no rate is asked of it.
    let goal = if writers > 1 { "≥ 0.80" } else { "" };
    figures.push("records_ratio", goal, spool.per_second() / bare.per_second());
    figures.push("records_ratio_to_ring", "", spool.per_second() / ring.per_second());
    let goal = if writers == 64 { "µs, ≤ 3" } else { "µs" };
    figures.push("cpu_us_per_record", goal, spool.cpu_us_each());
    figures.push("bare_cpu_us_per_record", "µs", bare.cpu_us_each());
    figures.push("ring_cpu_us_per_record", "µs", ring.cpu_us_each());
    figures.push_latencies(["commit_p50_ms", "commit_p99_ms", "commit_p999_ms"], &spool.latencies);
    figures.push_latencies(["bare_p50_ms", "bare_p99_ms", "bare_p999_ms"], &bare.latencies);
    figures.push_latencies(["ring_p50_ms", "ring_p99_ms", "ring_p999_ms"], &ring.latencies);
    let goal = if writers == 1 { "≤ 1.30" } else { "" };
    figures.push("latency_ratio", goal, spool.latencies.quantile_ms(0.5) / bare.latencies.quantile_ms(0.5));
    figures
}

/// A log keeps six free segments and gives others back, so that a burst of more would write into new ones.
const BURST_SEGMENTS: u64 = 4;
const RECORD_OVERHEAD_MAX: u64 = 512;
const BLOCK_BYTES: u64 = 4096;
