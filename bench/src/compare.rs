//! The same load through the engine and through other mail systems, in turns, on the same machine.
//!
//! Each system takes its turn in each round, with a fresh spool on the same disk and a sink of its own; a round begins
//! with another system each time. What a 250 promises differs from system to system, so that each has its durability
//! beside its figures, and its whole configuration in the report. CPU time is that of all its processes, also of those
//! that ended: each system is in a control group of its own.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

pub(crate) use self::group::ControlGroup;
pub use self::mta::Mta;
pub(crate) use self::mta::RunningMta;
use crate::interrupt::Interrupt;
use crate::measure::Machine;
use crate::peers::{Durability, Engine, EngineSite};
use crate::relay::{InjectedSide, RelayOptions, SinkSide, inject_side};
use crate::report::{Figures, align, note, show_number};

mod group;
mod mta;

#[derive(Debug, Clone)]
pub struct CompareOptions {
    /// Load and tools, and the engine. Its rounds are those of the comparison.
    pub relay: RelayOptions,
    /// Against which the engine is held.
    pub rivals: Vec<Mta>,
    /// Takes the engine's turn out, for a look at the rivals alone.
    pub without_engine: bool,
}

#[derive(Debug)]
pub struct CompareReport {
    pub systems: Vec<System>,
    pub setup: Value,
}

/// One mail system and what was found.
#[derive(Debug)]
pub struct System {
    pub name: &'static str,
    pub version: String,
    pub durability: &'static str,
    pub config: String,
    pub rounds: Vec<Figures>,
}

impl CompareReport {
    pub fn get(&self, name: &str) -> Option<&System> {
        self.systems.iter().find(|system| system.name == name)
    }

    /// Whether the engine delivered everything once. What a rival loses or doubles is its finding.
    pub fn holds(&self) -> bool {
        let is_zero = |round: &Figures, name: &str| round.get(name).is_none_or(|count| count == 0.0);
        let holds = |round: &Figures| is_zero(round, "lost") && is_zero(round, "duplicates");
        self.get(ENGINE).is_none_or(|engine| engine.rounds.iter().all(holds))
    }

    pub fn to_json(&self) -> Value {
        let mut systems = Map::new();
        for system in &self.systems {
            let value = json!({
                "version": system.version,
                "durability": system.durability,
                "config": system.config,
                "medians": Figures::medians(&system.rounds).to_json(),
                "rounds": system.rounds.iter().map(Figures::to_json).collect::<Vec<_>>(),
            });
            systems.insert(system.name.to_owned(), value);
        }
        json!({ "setup": self.setup, "systems": systems })
    }

    /// A row a system, medians; then every configuration.
    pub fn to_text(&self) -> String {
        let head = ["", "CPU µs/message", "×", "delivered/s", "×", "accepted/s", "anonymous MiB", "lost", "doubled"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        let medians: Vec<Figures> = self.systems.iter().map(|system| Figures::medians(&system.rounds)).collect();
        let first = medians.first();
        for (system, median) in self.systems.iter().zip(&medians) {
            let show = |name: &str| median.get(name).map_or("-".to_owned(), show_number);
            let by_first = |name: &str| {
                let quotient = median.get(name)? / first?.get(name)?;
                Some(format!("{quotient:.2}"))
            };
            rows.push(vec![
                system.name.to_owned(),
                show(CPU),
                by_first(CPU).unwrap_or_default(),
                show(DELIVERED),
                by_first(DELIVERED).unwrap_or_default(),
                show("accepted_per_second"),
                show("anonymous_mib"),
                show("lost"),
                show("duplicates"),
            ]);
        }
        let mut text = align(&rows);
        for system in &self.systems {
            // Writing into a String cannot fail.
            let _ = write!(text, "\n{}: {}; {}\n", system.name, system.version, system.durability);
            for line in system.config.lines() {
                let _ = writeln!(text, "    {line}");
            }
        }
        text
    }
}

pub fn compare(options: &CompareOptions, interrupt: &Interrupt) -> Result<CompareReport> {
    let load = &options.relay;
    ensure!(load.rounds > 0 && load.messages > 0, "at least one round and one message are needed");
    let source_fits = load.inject.rate.is_none() && load.inject.domains == 1 && load.inject.tenants == 1;
    ensure!(load.smtp_source.is_none() || source_fits, "smtp-source knows neither rates nor domains nor tenants");
    let contenders = options.contenders()?;
    let mut systems = Vec::new();
    for contender in &contenders {
        systems.push(System {
            name: contender.name(),
            version: String::new(),
            durability: contender.durability(options),
            config: String::new(),
            rounds: Vec::new(),
        });
    }
    for number in 0..load.rounds {
        for turn in 0..contenders.len() {
            let place = (turn + number) % contenders.len();
            let system = &mut systems[place];
            let figures = round(options, &contenders[place], system, interrupt)
                .with_context(|| format!("{} in round {}", system.name, number + 1))?;
            let get = |name: &str| figures.get(name).unwrap_or_default();
            note(&format!(
                "round {} of {}: {}: {:.1} µs a message, {:.0} delivered/s",
                number + 1,
                load.rounds,
                system.name,
                get(CPU),
                get(DELIVERED)
            ));
            system.rounds.push(figures);
        }
    }
    let setup = json!({
        "machine": Machine::look(),
        "messages": load.messages,
        "warmup": load.warmup,
        "size": load.inject.sizes.to_string(),
        "sessions": load.inject.sessions,
        "domains": load.inject.domains,
        "pipelined": load.inject.pipelined && load.smtp_source.is_none(),
        "one_connection_per_message": load.inject.one_connection_per_message,
        "injector": load.smtp_source.as_ref().map_or("postbench", |_| "smtp-source"),
        "sink": load.smtp_sink.as_ref().map_or("postbench", |_| "smtp-sink"),
    });
    Ok(CompareReport { systems, setup })
}

#[derive(Debug)]
enum Contender {
    Engine,
    Rival(Mta),
}

/// A contender that is running.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum Running {
    Engine(EngineSite, Engine),
    Rival(RunningMta),
}

impl CompareOptions {
    fn contenders(&self) -> Result<Vec<Contender>> {
        let mut contenders = Vec::new();
        if !self.without_engine {
            contenders.push(Contender::Engine);
        }
        contenders.extend(self.rivals.iter().cloned().map(Contender::Rival));
        ensure!(!contenders.is_empty(), "there is nothing to compare");
        Ok(contenders)
    }
}

impl Contender {
    fn name(&self) -> &'static str {
        match self {
            Self::Engine => ENGINE,
            Self::Rival(mta) => mta.name(),
        }
    }

    fn durability(&self, options: &CompareOptions) -> &'static str {
        match self {
            Self::Engine if options.relay.engine.durability == Durability::Fsync => "synced before 250",
            Self::Engine => "not synced before 250",
            Self::Rival(mta) => mta.durability(),
        }
    }

    fn start(
        &self,
        options: &CompareOptions,
        sink: &SinkSide,
        group: &ControlGroup,
        system: &mut System,
        interrupt: &Interrupt,
    ) -> Result<Running> {
        Ok(match self {
            Self::Engine => {
                let site = EngineSite::prepare(options.relay.engine.clone(), sink.address())?;
                system.config.clone_from(&site.config);
                system.version = version(&options.relay.engine.program)?;
                let engine = site.start(interrupt)?;
                group.take_in(engine.pid())?;
                Running::Engine(site, engine)
            }
            Self::Rival(mta) => {
                let running = mta.start(Some(sink.address()), group, interrupt)?;
                system.config.clone_from(&running.config);
                system.version.clone_from(&running.version);
                Running::Rival(running)
            }
        })
    }
}

fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

impl Running {
    fn address(&self) -> std::net::SocketAddr {
        match self {
            Self::Engine(site, _) => site.smtp,
            Self::Rival(mta) => mta.address,
        }
    }

    fn check_alive(&mut self) -> Result<()> {
        match self {
            Self::Engine(site, engine) => engine.check_alive(site),
            Self::Rival(mta) => mta.check_alive(),
        }
    }

    fn last_words(&self) -> String {
        match self {
            Self::Engine(site, _) => site.log_tail(),
            Self::Rival(mta) => mta.output(),
        }
    }

    fn stop(&mut self, interrupt: &Interrupt) -> Result<()> {
        match self {
            Self::Engine(site, engine) => engine.terminate(interrupt, site),
            Self::Rival(mta) => mta.stop(),
        }
    }
}

fn round(
    options: &CompareOptions,
    contender: &Contender,
    system: &mut System,
    interrupt: &Interrupt,
) -> Result<Figures> {
    let load = &options.relay;
    let sink = SinkSide::start(load, None, interrupt)?;
    // Dropped behind what runs in it; what is left then is killed.
    let group = ControlGroup::create()?;
    let mut running = contender.start(options, &sink, &group, system, interrupt)?;
    if load.warmup > 0 {
        let warmed = inject_side(load, load.warmup, running.address(), interrupt);
        let warmed = warmed.with_context(|| running.last_words())?;
        let arrived = wait_for(&sink, &mut running, warmed.accepted, interrupt)?;
        ensure!(arrived, "the warm-up's messages did not all arrive:\n{}", running.last_words());
        interrupt.pause(SETTLE)?;
    }
    sink.forget_messages();
    let (before, cpu_before) = (sink.messages(), group.cpu()?);
    let injected = inject_side(load, load.messages, running.address(), interrupt);
    let injected = injected.with_context(|| running.last_words())?;
    wait_for(&sink, &mut running, before + injected.accepted, interrupt)?;
    interrupt.pause(SETTLE)?;
    running.check_alive()?;
    let cpu = group.cpu()?.saturating_sub(cpu_before);
    let mut figures = Figures::default();
    push(&mut figures, &sink, &injected, before, cpu);
    figures.push("anonymous_mib", "MiB", group.anonymous_bytes()? as f64 / f64::from(1 << 20));
    running.stop(interrupt)?;
    group.end()?;
    Ok(figures)
}

fn push(figures: &mut Figures, sink: &SinkSide, injected: &InjectedSide, before: u64, cpu: Duration) {
    let delivered = sink.messages() - before;
    let rate = |count: u64, end: Instant| {
        count as f64 / end.saturating_duration_since(injected.first_sent).as_secs_f64().max(1e-9)
    };
    figures.push("accepted", "messages", injected.accepted as f64);
    figures.push("refused", "messages", injected.refused as f64);
    figures.push("lost", "messages", injected.accepted.saturating_sub(delivered) as f64);
    if let Some(duplicates) = sink.duplicates() {
        figures.push("duplicates", "messages", duplicates as f64);
    }
    figures.push("accepted_per_second", "messages/s", rate(injected.accepted, injected.last_accepted));
    if let Some(last) = sink.last() {
        figures.push(DELIVERED, "messages/s", rate(delivered, last));
    }
    figures.push(CPU, "µs", cpu.as_secs_f64() * 1e6 / injected.accepted.max(1) as f64);
    if let Some(latencies) = &injected.latencies {
        figures.push_latencies(["accept_p50_ms", "accept_p99_ms", "accept_p999_ms"], latencies);
    }
}

/// False when the messages stop coming before `count` is reached.
fn wait_for(sink: &SinkSide, running: &mut Running, count: u64, interrupt: &Interrupt) -> Result<bool> {
    let (mut arrived, mut since) = (sink.messages(), Instant::now());
    let mut complete = false;
    interrupt.until(|| {
        let now_arrived = sink.messages();
        if now_arrived != arrived {
            (arrived, since) = (now_arrived, Instant::now());
        }
        complete = now_arrived >= count;
        if !complete {
            running.check_alive()?;
        }
        Ok(complete || since.elapsed() > STALL_PATIENCE)
    })?;
    Ok(complete)
}

const ENGINE: &str = "postrider";
const CPU: &str = "cpu_us_per_message";
const DELIVERED: &str = "delivered_per_second";
/// The last deliveries' own ends: queue files removed, logs written.
const SETTLE: Duration = Duration::from_millis(500);
/// A rival may wait with what met a lock until its next queue run.
const STALL_PATIENCE: Duration = Duration::from_secs(30);
