//! What a run found: named figures in a fixed order, as JSON and as a table with medians over rounds.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Latencies in nanoseconds, 3 significant digits, up to an hour.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

impl Latencies {
    pub fn new() -> Self {
        let bounds = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3);
        Self(bounds.unwrap_or_else(|_| unreachable!("the bounds are constants that the library takes")))
    }

    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn add(&mut self, other: &Self) {
        // Both have the same bounds, so that this can't fail.
        let _ = self.0.add(&other.0);
    }

    pub fn count(&self) -> u64 {
        self.0.len()
    }

    pub fn clear(&mut self) {
        self.0.reset();
    }

    /// In milliseconds; 0 when nothing was recorded.
    pub fn quantile_ms(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1e6
    }

    pub fn summary(&self) -> Option<LatencySummary> {
        (!self.0.is_empty()).then(|| LatencySummary {
            count: self.0.len(),
            mean_ms: self.0.mean() / 1e6,
            p50_ms: self.quantile_ms(0.5),
            p99_ms: self.quantile_ms(0.99),
            p999_ms: self.quantile_ms(0.999),
            max_ms: self.0.max() as f64 / 1e6,
        })
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct LatencySummary {
    pub count: u64,
    pub mean_ms: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub max_ms: f64,
}

/// One named figure. A figure that a run could not take is left out, not zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure {
    pub name: &'static str,
    pub unit: &'static str,
    pub value: f64,
}

/// The figures of one round.
#[derive(Debug, Clone, Default)]
pub struct Figures(Vec<Figure>);

impl Figures {
    pub fn push(&mut self, name: &'static str, unit: &'static str, value: f64) {
        self.0.push(Figure { name, unit, value });
    }

    pub fn push_latencies(&mut self, names: [&'static str; 3], latencies: &Latencies) {
        if latencies.count() > 0 {
            for (name, quantile) in names.into_iter().zip([0.5, 0.99, 0.999]) {
                self.push(name, "ms", latencies.quantile_ms(quantile));
            }
        }
    }

    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|figure| figure.name == name).map(|figure| figure.value)
    }

    pub fn to_json(&self) -> Value {
        let object: Map<String, Value> =
            self.0.iter().map(|figure| (figure.name.to_owned(), json!(rounded(figure.value)))).collect();
        Value::Object(object)
    }

    /// The median of each figure over the rounds that have it.
    pub fn medians(rounds: &[Self]) -> Self {
        let mut medians = Self::default();
        for figure in rounds.iter().flat_map(|round| &round.0) {
            if medians.get(figure.name).is_none() {
                let values = rounds.iter().filter_map(|round| round.get(figure.name)).collect();
                medians.push(figure.name, figure.unit, median(values));
            }
        }
        medians
    }
}

/// What most reports are: medians and rounds, and what they were taken with.
pub fn rounds_json(setup: &Value, rounds: &[Figures]) -> Value {
    json!({
        "setup": setup,
        "medians": Figures::medians(rounds).to_json(),
        "rounds": rounds.iter().map(Figures::to_json).collect::<Vec<_>>(),
    })
}

/// Of rounds that have the figures `lost` and `duplicates`.
pub fn all_arrived_once(rounds: &[Figures]) -> bool {
    rounds.iter().all(|round| ["lost", "duplicates"].iter().all(|name| round.get(name) == Some(0.0)))
}

/// Rows are figures; columns are the medians and, when there are several, the rounds.
pub fn table(rounds: &[Figures]) -> String {
    let medians = Figures::medians(rounds);
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut head = vec![String::new(), "unit".to_owned()];
    head.push(if rounds.len() > 1 { "median".to_owned() } else { "value".to_owned() });
    if rounds.len() > 1 {
        head.extend((1..=rounds.len()).map(|number| format!("round {number}")));
    }
    rows.push(head);
    for figure in &medians.0 {
        let mut row = vec![figure.name.replace('_', " "), figure.unit.to_owned(), show_number(figure.value)];
        if rounds.len() > 1 {
            row.extend(rounds.iter().map(|round| round.get(figure.name).map_or("-".to_owned(), show_number)));
        }
        rows.push(row);
    }
    align(&rows)
}

/// The first two columns to the left, the others to the right.
pub(crate) fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Writing into a String cannot fail.
            let _ = match column {
                0 => write!(line, "{cell:<width$}"),
                1 => write!(line, "  {cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

pub(crate) fn show_number(value: f64) -> String {
    let magnitude = value.abs();
    let decimals = match magnitude {
        _ if value.fract() == 0.0 => 0,
        m if m >= 1000.0 => 0,
        m if m >= 100.0 => 1,
        m if m >= 1.0 => 2,
        _ => 3,
    };
    let plain = format!("{magnitude:.decimals$}");
    let (whole, fraction) = plain.split_once('.').map_or((plain.as_str(), None), |(w, f)| (w, Some(f)));
    let mut text = String::new();
    if value < 0.0 {
        text.push('-');
    }
    for (place, digit) in whole.chars().enumerate() {
        if place > 0 && (whole.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if let Some(fraction) = fraction {
        text.push('.');
        text.push_str(fraction);
    }
    text
}

fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

/// Prints to standard output; a closed pipe is no error of ours.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Prints a line of progress or trouble to standard error, where it can't get into the JSON.
pub fn note(text: &str) {
    // There is nowhere left to tell of a closed standard error.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

const LATENCY_NS_MAX: u64 = 3_600_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_taken_over_the_rounds_that_have_the_figure() {
        let mut rounds = Vec::new();
        for value in [5.0, 1.0, 3.0] {
            let mut figures = Figures::default();
            figures.push("cpu_us", "µs", value);
            if value > 1.0 {
                figures.push("rare", "", value);
            }
            rounds.push(figures);
        }
        let medians = Figures::medians(&rounds);
        assert_eq!(medians.get("cpu_us"), Some(3.0));
        assert_eq!(medians.get("rare"), Some(4.0));
        assert_eq!(medians.to_json().to_string(), r#"{"cpu_us":3.0,"rare":4.0}"#);
        let text = table(&rounds);
        assert!(text.lines().next().unwrap().contains("round 3"), "{text}");
        assert!(text.contains("rare    "), "{text}");
    }

    #[test]
    fn numbers_are_grouped_and_cut() {
        assert_eq!(show_number(1_234_567.0), "1,234,567");
        assert_eq!(show_number(1_234.567_8), "1,235");
        assert_eq!(show_number(-0.12345), "-0.123");
        assert_eq!(show_number(12.345), "12.35");
        assert_eq!(show_number(999.0), "999");
    }

    #[test]
    fn latencies_are_kept_to_three_digits() {
        let mut latencies = Latencies::new();
        assert!(latencies.summary().is_none());
        for ms in 1..=1000 {
            latencies.record(Duration::from_millis(ms));
        }
        let summary = latencies.summary().unwrap();
        assert_eq!(summary.count, 1000);
        assert!((summary.p50_ms - 500.0).abs() < 1.0, "{summary:?}");
        assert!((summary.p99_ms - 990.0).abs() < 1.0, "{summary:?}");
        // More than an hour is counted as an hour, not lost.
        latencies.record(Duration::from_secs(10_000));
        assert_eq!(latencies.count(), 1001);
    }
}
