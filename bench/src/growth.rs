//! CPU time a message against what may grow: the queue, connections, sites, the message, shards. Flat is good.
//!
//! Each point is a relay of the same load with one thing changed, by an engine of its own; only the queue grows in one
//! engine, which relays the load again after each filling. Big messages are fewer, so that a point stays short.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::interrupt::Interrupt;
use crate::message::Sizes;
use crate::peers::EngineOptions;
use crate::plot::{Chart, Line, write};
use crate::relay::{RelayOptions, Round, relay};
use crate::report::{Figures, align, note, show_number};
use crate::standing::{Standing, check_sink};

/// What grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Messages that wait meanwhile.
    Queue,
    /// Sessions that inject at a time; as many connections are allowed outward.
    Connections,
    /// Recipient domains, each a site of its own.
    Sites,
    /// Octets of a message.
    Size,
    /// The engine's shards.
    Shards,
}

#[derive(Debug, Clone)]
pub struct GrowthOptions {
    pub relay: RelayOptions,
    /// With the points of each.
    pub axes: Vec<(Axis, Vec<usize>)>,
    /// Where the charts go.
    pub plot: Option<PathBuf>,
}

#[derive(Debug)]
pub struct GrowthReport {
    pub curves: Vec<Curve>,
    pub setup: Value,
}

#[derive(Debug)]
pub struct Curve {
    pub axis: Axis,
    pub points: Vec<Point>,
}

/// The medians of a point's rounds.
#[derive(Debug)]
pub struct Point {
    pub at: usize,
    pub figures: Figures,
}

impl GrowthReport {
    /// Whether all messages of all points arrived, once.
    pub fn holds(&self) -> bool {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        points().all(|point| ["lost", "duplicates"].iter().all(|name| point.figures.get(name) == Some(0.0)))
    }

    pub fn to_json(&self) -> Value {
        let point = |point: &Point| json!({ "at": point.at, "figures": point.figures.to_json() });
        let curve =
            |curve: &Curve| json!({ "axis": curve.axis, "points": curve.points.iter().map(point).collect::<Vec<_>>() });
        json!({ "setup": self.setup, "curves": self.curves.iter().map(curve).collect::<Vec<_>>() })
    }

    pub fn to_table(&self) -> String {
        let mut rows = vec![
            ["growing", "unit", "at", "cpu us", "by the first", "delivered/s", "MB/s", "connections"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for curve in &self.curves {
            let first = curve.points.first().and_then(|point| point.figures.get(CPU)).unwrap_or_default();
            for point in &curve.points {
                let get = |name: &str| point.figures.get(name).map_or("–".to_owned(), show_number);
                let by_first = point.figures.get(CPU).map_or("–".to_owned(), |cpu| show_number(cpu / first));
                let (name, unit) = curve.axis.names();
                rows.push(vec![
                    name.to_owned(),
                    unit.to_owned(),
                    show_number(point.at as f64),
                    get(CPU),
                    by_first,
                    get("delivered_per_second"),
                    get("delivered_mb_per_second"),
                    get("sink_connections"),
                ]);
            }
        }
        align(&rows)
    }

    fn charts(&self) -> Vec<Chart> {
        let chart = |curve: &Curve| {
            let line = |name: &str, figure: &str| Line {
                name: name.to_owned(),
                points: curve
                    .points
                    .iter()
                    .filter_map(|point| Some((point.at as f64, point.figures.get(figure)?)))
                    .collect(),
            };
            let (name, unit) = curve.axis.names();
            Chart {
                title: format!("CPU time a message by {name}"),
                x: unit.to_owned(),
                y: "µs".to_owned(),
                logarithmic: true,
                lines: vec![line("user and system", CPU), line("user", "engine_user_us_per_message")],
            }
        };
        self.curves.iter().map(chart).collect()
    }
}

impl Axis {
    /// Its name, and the unit of its points.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Queue => ("queue", "messages that wait"),
            Self::Connections => ("connections", "sessions"),
            Self::Sites => ("sites", "sites"),
            Self::Size => ("size", "octets of a message"),
            Self::Shards => ("shards", "shards"),
        }
    }

    /// As far as the goals ask.
    pub fn usual_points(self) -> Vec<usize> {
        match self {
            Self::Queue => vec![1_000, 10_000, 100_000, 1_000_000],
            Self::Connections => vec![1, 10, 100, 1_000, 10_000],
            Self::Sites => vec![1, 10, 100, 1_000, 10_000, 100_000],
            Self::Size => vec![512, 2 << 10, 10 << 10, 100 << 10, 1 << 20, 10 << 20],
            Self::Shards => vec![1, 2, 4],
        }
    }
}

pub fn growth(options: &GrowthOptions, interrupt: &Interrupt) -> Result<GrowthReport> {
    let mut setup = check_sink(&options.relay)?;
    ensure!(!options.axes.is_empty(), "nothing was asked for");
    let mut curves = Vec::new();
    for (axis, points) in &options.axes {
        ensure!(points.is_sorted() && points.first().is_some_and(|first| *first > 0), "points grow, from 1 on");
        let figures = match axis {
            Axis::Queue => queue(options, points, interrupt, &mut setup)?,
            axis => relays(options, *axis, points, interrupt)?,
        };
        let points = points.iter().zip(figures).map(|(at, figures)| Point { at: *at, figures }).collect();
        curves.push(Curve { axis: *axis, points });
    }
    setup["config"] = Value::Null;
    let report = GrowthReport { curves, setup };
    if let Some(path) = &options.plot {
        write(path, &report.charts())?;
    }
    Ok(report)
}

/// Every point is an engine's.
fn relays(options: &GrowthOptions, axis: Axis, points: &[usize], interrupt: &Interrupt) -> Result<Vec<Figures>> {
    let mut found = Vec::new();
    for at in points {
        let mut changed = options.relay.clone();
        match axis {
            Axis::Connections => {
                changed.inject.sessions = *at;
                changed.warmup = changed.warmup.max(*at as u64);
                changed.engine = with_connection_limit(&changed.engine, *at);
            }
            Axis::Sites => {
                (changed.sites, changed.inject.domains, changed.inject.domain_exponent) = (*at, *at, 0.0);
            }
            Axis::Size => {
                changed.inject.sizes = Sizes::fixed(*at);
                let most = (POINT_OCTETS_MAX / *at as u64).max(POINT_MESSAGES_MIN);
                changed.messages = changed.messages.min(most);
                changed.warmup = changed.warmup.min(most);
            }
            Axis::Shards => changed.engine.shards = Some(*at),
            Axis::Queue => unreachable!("its points share an engine"),
        }
        let report = relay(&changed, interrupt)?;
        found.push(Figures::medians(&report.rounds));
        tell(axis, *at, found.last());
    }
    Ok(found)
}

fn queue(options: &GrowthOptions, points: &[usize], interrupt: &Interrupt, setup: &mut Value) -> Result<Vec<Figures>> {
    let relay = RelayOptions { engine: Standing::configured(&options.relay.engine), ..options.relay.clone() };
    let mut round = Round::begin(&relay, interrupt, setup)?;
    round.warm_up(&relay, interrupt)?;
    let mut standing = Standing::begin(&round)?;
    let mut found = Vec::new();
    for at in points {
        let more = (*at as u64).checked_sub(standing.messages).context("points grow")?;
        if more > 0 {
            standing.fill(&mut round, &relay, more, interrupt)?;
        }
        let passes = (0..relay.rounds).map(|_| round.pass(&relay, interrupt)).collect::<Result<Vec<_>>>()?;
        found.push(Figures::medians(&passes));
        tell(Axis::Queue, *at, found.last());
    }
    round.engine.terminate(interrupt, &round.site)?;
    Ok(found)
}

fn with_connection_limit(engine: &EngineOptions, limit: usize) -> EngineOptions {
    let shaping = format!("[shaping.default]\nconnection_limit = {}", limit.max(CONNECTION_LIMIT_MIN));
    EngineOptions { config_extra: format!("{}\n{shaping}", engine.config_extra), ..engine.clone() }
}

fn tell(axis: Axis, at: usize, figures: Option<&Figures>) {
    let cpu = figures.and_then(|figures| figures.get(CPU)).unwrap_or_default();
    let (_, unit) = axis.names();
    note(&format!("{at} {unit}: {cpu:.1} µs a message"));
}

const CPU: &str = "engine_cpu_us_per_message";
/// The engine's default.
const CONNECTION_LIMIT_MIN: usize = 10;
/// What a point of big messages sends.
const POINT_OCTETS_MAX: u64 = 400 << 20;
const POINT_MESSAGES_MIN: u64 = 40;
