//! Many sites with a queue each, beside the same mail for one site.
//!
//! In each case the messages are accepted while their tenant is suspended, so that every site has its queue, and then
//! let go. A site's few messages take a connection of their own, which one site's do not need; so the one site is
//! measured twice, by connections that are kept, and by as many connections as the many sites take.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::interrupt::Interrupt;
use crate::peers::EngineOptions;
use crate::relay::{RelayOptions, Round, SinkSide};
use crate::report::{Figures, all_arrived_once, note, rounds_json, table};
use crate::standing::{Passage, Standing, check_sink};

#[derive(Debug, Clone)]
pub struct SitesOptions {
    /// Its `sites` are those of the many.
    pub relay: RelayOptions,
    pub messages_per_site: u64,
    /// At a time with each of the many; the one has the engine's default.
    pub connections_per_site: Option<u32>,
}

#[derive(Debug)]
pub struct SitesReport {
    pub rounds: Vec<Figures>,
    pub setup: Value,
}

impl SitesReport {
    /// Whether all arrived, once.
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

/// What one case took.
struct Case {
    accepted: Passage,
    delivered: Passage,
    connections: u64,
    lost: u64,
    duplicates: u64,
}

impl Case {
    fn cpu_us(&self) -> f64 {
        self.accepted.cpu_us + self.delivered.cpu_us
    }
}

pub fn sites(options: &SitesOptions, interrupt: &Interrupt) -> Result<SitesReport> {
    let relay = &options.relay;
    ensure!(relay.rounds > 0 && options.messages_per_site > 0, "at least one round and one message are needed");
    ensure!(relay.sites > 1, "at least two sites are needed");
    let mut setup = check_sink(relay)?;
    setup["messages_per_site"] = json!(options.messages_per_site);
    setup["connections_per_site"] = json!(options.connections_per_site);
    let few = options.connections_per_site;
    let messages = relay.sites as u64 * options.messages_per_site;
    let mut rounds = Vec::new();
    for number in 1..=relay.rounds {
        let kept = case(relay, 1, (u64::MAX, None), messages, interrupt, &mut setup)?;
        let closed = case(relay, 1, (options.messages_per_site, None), messages, interrupt, &mut setup)?;
        let many = case(relay, relay.sites, (u64::MAX, few), messages, interrupt, &mut setup)?;
        let mut figures = Figures::default();
        let cases = [&kept, &closed, &many];
        figures.push("messages", "messages", messages as f64);
        figures.push("lost", "messages", cases.iter().map(|case| case.lost).sum::<u64>() as f64);
        figures.push("duplicates", "messages", cases.iter().map(|case| case.duplicates).sum::<u64>() as f64);
        figures.push("one_site_connections", "", kept.connections as f64);
        figures.push("one_site_accept_us", "µs", kept.accepted.cpu_us);
        figures.push("one_site_deliver_us", "µs", kept.delivered.cpu_us);
        figures.push("one_site_delivered_per_second", "messages/s", kept.delivered.per_second);
        figures.push("one_site_reconnecting_connections", "", closed.connections as f64);
        figures.push("one_site_reconnecting_accept_us", "µs", closed.accepted.cpu_us);
        figures.push("one_site_reconnecting_deliver_us", "µs", closed.delivered.cpu_us);
        figures.push("one_site_reconnecting_delivered_per_second", "messages/s", closed.delivered.per_second);
        figures.push("many_sites_connections", "", many.connections as f64);
        figures.push("many_sites_accept_us", "µs", many.accepted.cpu_us);
        figures.push("many_sites_deliver_us", "µs", many.delivered.cpu_us);
        figures.push("many_sites_delivered_per_second", "messages/s", many.delivered.per_second);
        figures.push("cpu_many_by_one", "goal ≤ 1.5", many.cpu_us() / kept.cpu_us());
        figures.push("cpu_many_by_one_reconnecting", "", many.cpu_us() / closed.cpu_us());
        note(&format!("round {number} of {} is done", relay.rounds));
        rounds.push(figures);
    }
    Ok(SitesReport { rounds, setup })
}

fn case(
    relay: &RelayOptions,
    sites: usize,
    shaping: (u64, Option<u32>),
    messages: u64,
    interrupt: &Interrupt,
    setup: &mut Value,
) -> Result<Case> {
    let mut relay = RelayOptions { engine: engine(&relay.engine, shaping), sites, ..relay.clone() };
    relay.inject.domains = sites;
    relay.inject.domain_exponent = 0.0;
    let mut round = Round::begin(&relay, interrupt, setup)?;
    let found = run(&mut round, &relay, messages, interrupt);
    if !found.as_ref().is_ok_and(|case| case.lost == 0) {
        note(&format!("spool and log are left in {}", round.site.keep().display()));
    }
    found
}

fn run(round: &mut Round, relay: &RelayOptions, messages: u64, interrupt: &Interrupt) -> Result<Case> {
    round.warm_up(relay, interrupt)?;
    round.sink.forget_messages();
    let mut standing = Standing::begin(round)?;
    let accepted = standing.fill(round, relay, messages, interrupt)?;
    let delivered = standing.drain(round, interrupt)?;
    round.engine.terminate(interrupt, &round.site)?;
    let SinkSide::Own(sink) = &round.sink else { unreachable!("it was checked that the sink is our own") };
    let summary = sink.ledger().summary();
    let lost = messages.checked_sub(standing.arrived(round)).context("more arrived than was sent")?;
    Ok(Case { accepted, delivered, connections: summary.connections, lost, duplicates: summary.duplicates })
}

fn engine(engine: &EngineOptions, (per_connection, connections): (u64, Option<u32>)) -> EngineOptions {
    let deliveries = per_connection.min(DELIVERIES_MAX);
    // A site's connection is of no use when its queue is empty, and there may be more sites than descriptors.
    let mut shaping =
        format!("[shaping.default]\nmax_deliveries_per_connection = {deliveries}\nidle_timeout = \"50ms\"");
    if let Some(connections) = connections {
        shaping.push_str(&format!("\nconnection_limit = {connections}"));
    }
    let engine = Standing::configured(engine);
    EngineOptions { config_extra: format!("{}\n{shaping}", engine.config_extra), ..engine }
}

/// The engine's own bound.
const DELIVERIES_MAX: u64 = 1_000_000;
