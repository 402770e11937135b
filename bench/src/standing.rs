//! Mail that waits in the engine until it is let go: of one tenant, whose deliveries are suspended by the engine's own
//! HTTP service while it is accepted.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::inject::{InjectOptions, Injector};
use crate::interrupt::Interrupt;
use crate::measure::Usage;
use crate::peers::EngineOptions;
use crate::relay::{RelayOptions, Round, SinkSide};
use crate::report::note;

/// What waits in an engine.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    suspension: String,
    /// One of each filling.
    runs: Vec<u64>,
    pub(crate) messages: u64,
}

/// What accepting or delivering them took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passage {
    pub(crate) messages: u64,
    pub(crate) per_second: f64,
    pub(crate) cpu_us: f64,
}

impl Passage {
    fn of(messages: u64, elapsed: Duration, cpu: Duration) -> Self {
        let per_second = messages as f64 / elapsed.as_secs_f64().max(1e-9);
        Self { messages, per_second, cpu_us: cpu.as_secs_f64() * 1e6 / messages.max(1) as f64 }
    }
}

impl Standing {
    /// Lets an engine's configuration know the tenant.
    pub(crate) fn configured(engine: &EngineOptions) -> EngineOptions {
        let config_extra = format!("{}\n{TENANT_CONFIG}", engine.config_extra);
        EngineOptions { config_extra, ..engine.clone() }
    }

    /// The tenant's mail waits from now on.
    pub(crate) fn begin(round: &Round) -> Result<Self> {
        let suspension = json!({ "tenant": TENANT, "reason": "postbench", "duration": "12h" });
        let answer = round.site.call("POST", SUSPEND, &suspension)?;
        let id = answer["id"].as_str().context("a suspension was answered without an id")?;
        Ok(Self { suspension: id.to_owned(), ..Self::default() })
    }

    /// So many messages more, to the domains of the load.
    pub(crate) fn fill(
        &mut self,
        round: &mut Round,
        options: &RelayOptions,
        messages: u64,
        interrupt: &Interrupt,
    ) -> Result<Passage> {
        let pid = round.engine.pid();
        let inject = InjectOptions {
            to: round.site.smtp,
            messages: Some(messages),
            sender: format!("bench@{TENANT_DOMAIN}"),
            rate: None,
            sessions: options.inject.sessions.max(FILL_SESSIONS_MIN),
            ..options.inject.clone()
        };
        let before = Usage::of(pid)?;
        let begun = Instant::now();
        let injector = Injector::start(inject)?;
        wait_for_accepted(&injector, round, messages, interrupt)?;
        let (injected, _) = injector.finish()?;
        let elapsed = begun.elapsed();
        interrupt.pause(SETTLE)?;
        ensure!(injected.accepted == messages, "{} of {messages} were accepted", injected.accepted);
        self.runs.push(injected.run);
        self.messages += messages;
        Ok(Passage::of(messages, elapsed, Usage::of(pid)?.since(&before).cpu()))
    }

    pub(crate) fn let_go(&self, round: &Round) -> Result<()> {
        round.site.call("DELETE", SUSPEND, &json!({ "id": self.suspension })).map(|_| ())
    }

    /// Lets go, and waits until all has arrived; what the sink got meanwhile, of whomever, is in the figures.
    pub(crate) fn drain(&self, round: &mut Round, interrupt: &Interrupt) -> Result<Passage> {
        let pid = round.engine.pid();
        let arrived_before = round.sink.messages();
        let before = Usage::of(pid)?;
        let begun = Instant::now();
        self.let_go(round)?;
        let (mut arrived, mut since, mut told) = (arrived_before, Instant::now(), 0);
        loop {
            interrupt.pause(LOOK_INTERVAL)?;
            round.engine.check_alive(&round.site)?;
            let now_arrived = round.sink.messages();
            if now_arrived != arrived {
                (arrived, since) = (now_arrived, Instant::now());
            }
            let came = arrived - arrived_before;
            if came >= self.messages && self.arrived(round) >= self.messages {
                break;
            }
            if self.messages >= NOTES_FROM && came * NOTES_MAX / self.messages > told {
                told = came * NOTES_MAX / self.messages;
                note(&format!("{came} messages delivered, while {} drain", self.messages));
            }
            ensure!(since.elapsed() < STALL_PATIENCE, "deliveries stopped after {came}:\n{}", round.site.log_tail());
        }
        let cpu = Usage::of(pid)?.since(&before).cpu();
        Ok(Passage::of(round.sink.messages() - arrived_before, begun.elapsed(), cpu))
    }

    /// How many of them the sink has, each counted once.
    pub(crate) fn arrived(&self, round: &Round) -> u64 {
        match &round.sink {
            SinkSide::Own(sink) => self.runs.iter().map(|run| sink.ledger().distinct_of_run(*run)).sum(),
            SinkSide::Postfix(_) => 0,
        }
    }
}

fn wait_for_accepted(injector: &Injector, round: &mut Round, messages: u64, interrupt: &Interrupt) -> Result<()> {
    let (mut accepted, mut since, mut told) = (0, Instant::now(), 0);
    interrupt.until(|| {
        let now_accepted = injector.accepted();
        if now_accepted != accepted {
            (accepted, since) = (now_accepted, Instant::now());
        }
        if messages >= NOTES_FROM && accepted * NOTES_MAX / messages > told {
            told = accepted * NOTES_MAX / messages;
            note(&format!("{accepted} of {messages} messages accepted"));
        }
        round.engine.check_alive(&round.site)?;
        ensure!(since.elapsed() < STALL_PATIENCE, "the engine stopped answering after {accepted} of {messages}");
        Ok(injector.is_finished())
    })
}

/// Refuses a sink that does not tell its messages apart.
pub(crate) fn check_sink(options: &RelayOptions) -> Result<Value> {
    ensure!(options.smtp_sink.is_none() && options.smtp_source.is_none(), "this takes postbench's own ends");
    ensure!(options.engine.tenants == 1 && options.inject.rate.is_none(), "this takes no tenants and no rate");
    crate::relay::check(options)
}

const TENANT: &str = "standing";
const TENANT_DOMAIN: &str = "standing.test";
const TENANT_CONFIG: &str = "[[tenant]]\nname = \"standing\"\ndomains = [\"standing.test\"]";
const SUSPEND: &str = "/api/admin/suspend/v1";
/// Accepting is not what is measured with few of them.
const FILL_SESSIONS_MIN: usize = 50;
const SETTLE: Duration = Duration::from_millis(300);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
const STALL_PATIENCE: Duration = Duration::from_secs(60);
const NOTES_MAX: u64 = 10;
/// Fewer are accepted and delivered before anyone wonders.
const NOTES_FROM: u64 = 100_000;
