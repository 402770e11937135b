//! The simulator: whole engines over hours and days of virtual time, in a world that fails as it was drawn, and
//! checkers that watch from outside whether what `ARCHITECTURE.md` promises holds.
//!
//! One seed replays a run exactly, with the same commit. A broken promise is a panic that names it; the seed stands in
//! front of it.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a program for a terminal")]

mod back_off;
mod blame;
mod calm;
mod canary;
mod checker;
mod client;
mod clock;
mod counted;
mod disk;
mod dns;
mod dsn;
mod event_log;
mod families;
mod fired;
mod lmtp;
mod mix;
mod moves;
mod net;
mod operate;
mod peer;
mod press;
mod providers;
mod random;
mod rates;
mod reload;
mod shares;
mod suspensions;
mod tenants;
#[cfg(test)]
mod tests;
mod timely;
mod tls;
mod wall;
mod warmup;
mod workload;
mod world;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::Parser;

use canary::Canary;
use postrider::deliver::verdict::{RULES, Refusal, SESSION_RULES, refuse};
use world::{Report, World};

/// Runs whole engines in virtual time, with faults, and checks what was promised.
#[derive(Debug, Parser)]
struct Options {
    /// Run this seed only, and tell its mix of faults.
    #[arg(long, conflicts_with_all = ["seeds", "base", "minutes"])]
    seed: Option<u64>,
    /// Run so many seeds.
    #[arg(long, default_value_t = u64::MAX)]
    seeds: u64,
    /// The first of them; default: the time.
    #[arg(long)]
    base: Option<u64>,
    /// Stop after so many minutes of real time.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Fail where a verdict or a fault has been rarer than once in a hundred runs.
    #[arg(long)]
    covers_all: bool,
    /// Compare shares only, in a world without faults.
    #[arg(long)]
    shares: bool,
    /// Plant a bug into the world: a checker has to find it.
    #[arg(long)]
    canary: Option<Canary>,
}

fn main() {
    let options = Options::parse();
    let run = if options.shares { World::run_shares } else { World::run };
    if let Some(seed) = options.seed {
        println!("seed {seed}:{}", World::mix_of(seed));
        let report = run(seed, options.canary);
        println!("{report:#?}");
        return;
    }
    let base = options.base.unwrap_or_else(|| {
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        time.as_secs() * 1_000
    });
    println!("base seed {base}");
    let begin = Instant::now();
    let until = begin + Duration::from_secs_f64(options.minutes * 60.0);
    let mut totals = Totals::default();
    for seed in (base..).take(usize::try_from(options.seeds).unwrap_or(usize::MAX)) {
        if Instant::now() >= until {
            break;
        }
        std::panic::set_hook(Box::new(move |panic| eprintln!("seed {seed}: {panic}")));
        totals.add(&run(seed, options.canary));
    }
    totals.print(begin.elapsed());
    if options.covers_all {
        let rare = totals.rare();
        assert!(rare.is_empty(), "not seen often enough in {} runs: {rare:?}", totals.runs);
    }
}

/// What all runs together were like.
#[derive(Debug, Default)]
struct Totals {
    runs: u64,
    runs_that_count: u64,
    recipients: u64,
    virtual_hours: u64,
    events: u64,
    crashes: u64,
    moves: u64,
    turns_max: u64,
    faults: BTreeMap<&'static str, u64>,
    verdicts: BTreeMap<&'static str, u64>,
    sessions: BTreeMap<&'static str, u64>,
}

impl Totals {
    fn add(&mut self, report: &Report) {
        self.runs += 1;
        self.runs_that_count += u64::from(report.counts_as_run());
        self.recipients += report.counts.recipients;
        self.virtual_hours += report.duration / clock::HOUR;
        self.events += report.events;
        self.crashes += report.crashes;
        self.moves += report.moves;
        self.turns_max = self.turns_max.max(report.turns_max);
        for (name, count) in &report.faults {
            *self.faults.entry(name).or_default() += count;
        }
        for (name, count) in &report.verdicts {
            *self.verdicts.entry(name).or_default() += count;
        }
        for (name, count) in &report.sessions {
            *self.sessions.entry(name).or_default() += count;
        }
    }

    /// What ten thousand runs would not have met a hundred times.
    fn rare(&self) -> Vec<&'static str> {
        let recipients = RULES.iter().map(|rule| rule.name).chain(REFUSALS.map(|refusal| refuse(refusal).rule));
        let of = |counts: &BTreeMap<&'static str, u64>, name| counts.get(name).copied().unwrap_or_default();
        let recipients = recipients.map(|name| (name, of(&self.verdicts, name)));
        let sessions = SESSION_RULES.iter().map(|rule| (rule.name, of(&self.sessions, rule.name)));
        let faults = self.faults.iter().map(|(name, count)| (*name, *count));
        let all = recipients.chain(sessions).chain(faults);
        all.filter(|(_, count)| count * 100 < self.runs).map(|(name, _)| name).collect()
    }

    fn print(&self, took: Duration) {
        for (title, rows) in
            [("verdict", &self.verdicts), ("verdict on a session", &self.sessions), ("fault", &self.faults)]
        {
            println!("{title:-<64}");
            for (name, count) in rows {
                println!("{count:>10}  {name}");
            }
        }
        println!(
            "{} runs, {} of them long and full enough; {} recipients, {} hours, {} crashes, {} moves, {} events",
            self.runs, self.runs_that_count, self.recipients, self.virtual_hours, self.crashes, self.moves, self.events
        );
        println!("at most {} turns in a second", self.turns_max);
        println!("{:.0} runs a minute", self.runs as f64 / took.as_secs_f64().max(0.001) * 60.0);
    }
}

/// What the engine refuses without asking the peer.
const REFUSALS: [Refusal; 7] = [
    Refusal::TooLarge,
    Refusal::EightBit,
    Refusal::AddressNotAscii,
    Refusal::HeaderNotAscii,
    Refusal::BadRecipient,
    Refusal::BadReversePath,
    Refusal::BeyondRecipientsMax,
];
