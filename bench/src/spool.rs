//! The spool's crate alone, on a ring as the engine runs it: appends beside bare writes to the same disk, what
//! maintenance costs the writers, how much is written for a byte of mail, and what deferred mail costs the rest.
//!
//! What is compared takes turns within one run, since another hour on the same machine is another machine. Each
//! measurement has a spool of its own, which is removed.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

pub(crate) use self::bare_write::BareFile;
pub(crate) use self::driver::on_ring;
use self::driver::{Setup, record_bytes};
use self::mail::Mail;
use crate::interrupt::Interrupt;
use crate::measure::{self, Machine};
use crate::peers::disk_directory;
use crate::report::{Figures, note, table};

mod amplification;
mod append;
mod bare_write;
mod deferred;
mod driver;
mod mail;
mod maintenance;
mod traffic;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Durable appends beside bare writes.
    Append,
    /// Commit latency while segments are zeroed, copied forward and checkpointed.
    Maintenance,
    /// Bytes written for a byte of mail.
    Amplification,
    /// Throughput beside a set of deferred mail.
    Deferred,
}

#[derive(Debug, Clone)]
pub struct SpoolOptions {
    pub parts: Vec<Part>,
    pub rounds: usize,
    /// Of `append`, one measurement each.
    pub writers: Vec<usize>,
    /// Octets of a message, the signature in front included.
    pub message_bytes: usize,
    /// A phase ends after so many messages …
    pub messages: u64,
    /// … or after this time, but for `amplification`.
    pub duration: Duration,
    /// Messages a second; `None`: closed loop, and for `maintenance` a rate of its own.
    pub rate: Option<f64>,
    /// Deferred messages that are in the spool at any time.
    pub live: u64,
    /// Of all messages, the share that is deferred.
    pub deferred_share: f64,
    /// How often such a message is deferred.
    pub deferrals: u32,
    /// `amplification` goes on until so many times the deferred set has been accepted.
    pub live_sizes: u64,
    /// Whether `append` counts outcomes in: they come along, not between bursts.
    pub outcomes_along: bool,
    pub segment_bytes: u64,
    /// Where spools are made; `None`: a place on disk.
    pub parent: Option<PathBuf>,
}

/// All measurements, each with its rounds.
#[derive(Debug)]
pub struct SpoolReport {
    pub measurements: Vec<Measurement>,
    pub setup: Value,
}

#[derive(Debug)]
pub struct Measurement {
    pub name: String,
    pub rounds: Vec<Figures>,
}

impl SpoolReport {
    pub fn get(&self, name: &str) -> Option<&Measurement> {
        self.measurements.iter().find(|measurement| measurement.name == name)
    }

    pub fn to_json(&self) -> Value {
        let mut all = Map::new();
        for Measurement { name, rounds } in &self.measurements {
            let medians = Figures::medians(rounds).to_json();
            let rounds: Vec<Value> = rounds.iter().map(Figures::to_json).collect();
            all.insert(name.clone(), json!({ "medians": medians, "rounds": rounds }));
        }
        json!({ "setup": self.setup, "measurements": all })
    }

    pub fn to_text(&self) -> String {
        let tables: Vec<String> = self
            .measurements
            .iter()
            .map(|measurement| format!("{}\n{}", measurement.name.replace('_', " "), table(&measurement.rounds)))
            .collect();
        tables.join("\n")
    }
}

pub fn spool(options: &SpoolOptions, interrupt: &Interrupt) -> Result<SpoolReport> {
    check(options)?;
    let parent = match &options.parent {
        Some(parent) => parent.clone(),
        None => disk_directory()?,
    };
    let setup = Setup { parent: &parent, segment_bytes: options.segment_bytes, max_bytes: SPOOL_BYTES_MAX };
    let record_bytes = on_ring(record_bytes(&mut Mail::new(options.message_bytes)?, &parent))?;
    let live_bytes = options.live * record_bytes;
    let mut measurements: Vec<Measurement> = Vec::new();
    for round in 1..=options.rounds {
        for (part, writers) in measured_parts(options) {
            interrupt.check()?;
            let name =
                if part == Part::Append { format!("append_{writers}") } else { format!("{part:?}").to_lowercase() };
            let figures = match part {
                Part::Append => on_ring(append::append(options, &setup, writers, interrupt)),
                Part::Maintenance => on_ring(maintenance::maintenance(options, &setup, interrupt)),
                Part::Amplification => {
                    let setup = Setup { max_bytes: 2 * live_bytes, ..setup };
                    on_ring(amplification::amplification(options, &setup, interrupt))
                }
                Part::Deferred => {
                    let setup = Setup { max_bytes: (live_bytes as f64 / DEFERRED_PART) as u64, ..setup };
                    on_ring(deferred::deferred(options, &setup, interrupt))
                }
            }?;
            if options.rounds > 1 {
                note(&format!("round {round} of {}: {name} is done", options.rounds));
            }
            match measurements.iter_mut().find(|measurement| measurement.name == name) {
                Some(measurement) => measurement.rounds.push(figures),
                None => measurements.push(Measurement { name, rounds: vec![figures] }),
            }
        }
    }
    let setup = json!({
        "machine": Machine::look(),
        "spool_filesystem": measure::filesystem_of(&parent)?,
        "message_bytes": options.message_bytes,
        "record_bytes": record_bytes,
        "segment_bytes": options.segment_bytes,
        "live": options.live,
        "deferred_share": options.deferred_share,
        "deferrals": options.deferrals,
        "rate": options.rate,
        "duration_s": options.duration.as_secs_f64(),
        "outcomes": if options.outcomes_along { "along" } else { "apart" },
    });
    Ok(SpoolReport { measurements, setup })
}

fn check(options: &SpoolOptions) -> Result<()> {
    ensure!(options.rounds > 0 && options.messages > 0, "at least one round and one message are needed");
    ensure!(!options.writers.contains(&0), "at least one writer is needed");
    ensure!(options.live > 0 && options.live_sizes > 0, "at least one deferred message is needed");
    ensure!(options.rate.is_none_or(|rate| rate > 0.0), "a rate is above 0");
    let is_share = options.deferred_share > 0.0 && options.deferred_share <= 1.0;
    ensure!(is_share, "the deferred share is above 0 and at most 100 percent");
    Ok(())
}

/// With the number of writers, where that is told apart.
fn measured_parts(options: &SpoolOptions) -> Vec<(Part, usize)> {
    let with_writers = |part: &Part| match part {
        Part::Append => options.writers.iter().map(|writers| (Part::Append, *writers)).collect(),
        part => vec![(*part, 0)],
    };
    options.parts.iter().flat_map(with_writers).collect()
}

/// Of the spool's size that `deferred` gives to deferred mail.
const DEFERRED_PART: f64 = 0.3;
/// Where the size must not matter.
const SPOOL_BYTES_MAX: u64 = 50 << 30;
