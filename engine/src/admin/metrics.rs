//! Counters that shards write and `/metrics` reads.
//!
//! Each shard has a [`ShardMetrics`] of its own and is its only writer, so that an increment is a plain load and store
//! of a cache line that no other core writes. The control thread reads them all and tells sums. One table, in
//! `families`, gives each metric its name, kind and help; both exposition formats come from it.
//!
//! Names are KumoMTA's where the meaning is the same, with its values of the label `service`. KumoMTA's counters have
//! no `_total` at their end, so neither have ours.
//!
//! Over 500 lines: one table of all metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use serde_json::{Map, Value, json};

use crate::deliver::verdict::SESSION_RULES;
use crate::runtime::event_file::EventLogStatistics;

/// Only grows. One writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        // Not fetch_add: with one writer nothing can come between, and this takes no lock on the bus.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub fn inc(&self) {
        self.add(1);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A present number. One writer.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub fn add(&self, n: u64) {
        self.set(self.get() + n);
    }

    /// Takes away what was added before.
    pub fn sub(&self, n: u64) {
        let value = self.get();
        assert!(value >= n, "a gauge below zero: something ended that was not counted when it began");
        self.set(value - n);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often a value fell into each bucket. One writer.
#[derive(Debug)]
pub struct Histogram {
    /// Upper bounds, included; ascending.
    bounds: &'static [f64],
    /// One more than bounds: the last is for everything above.
    counts: Box<[Counter]>,
    /// The bits of an f64.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| Counter::default()).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    pub fn observe(&self, value: f64) {
        let place = self.bounds.partition_point(|&bound| bound < value);
        self.counts[place].inc();
        let sum = f64::from_bits(self.sum.load(Ordering::Relaxed)) + value;
        self.sum.store(sum.to_bits(), Ordering::Relaxed);
    }

    /// How many values there were, and their sum.
    pub fn count_and_sum(&self) -> (u64, f64) {
        (self.counts.iter().map(Counter::get).sum(), f64::from_bits(self.sum.load(Ordering::Relaxed)))
    }
}

/// What one shard counts.
#[derive(Debug)]
pub struct ShardMetrics {
    /// Loop turns; a shard whose number stands still is stuck.
    pub turns: Counter,
    pub connections_in: Gauge,
    pub connections_in_accepted: Counter,
    /// Refused or closed at once because of a limit.
    pub connections_in_denied: Counter,
    pub connections_out: Gauge,
    pub connections_out_made: Counter,
    /// 4xx and 5xx answers that we gave.
    pub rejections: Counter,
    /// Messages whose commit was answered.
    pub received_smtp: Counter,
    pub received_http: Counter,
    pub received_embedded: Counter,
    /// Sessions that ended outside of any transaction, or never came up; by their place in [`SESSION_RULES`].
    pub session_failures: [Counter; SESSION_RULES.len()],
    /// Recipients, here and below.
    pub delivered: Counter,
    pub transient_failures: Counter,
    /// Bounce, Expiration and AdminBounce.
    pub failures: Counter,
    /// Deliveries that a crash or a lost reply may have made twice.
    pub possible_duplicates: Counter,
    /// Entries of messages that the engine died of, again and again, and that are held therefore.
    pub quarantined_messages: Counter,
    /// Suspensions made here, by a rule or by a peer that refuses our address.
    pub suspensions_made: Counter,
    /// Automation rules that have fired here.
    pub automation_fired: Counter,
    /// Roll-ups that this shard was to let go to another, those that it kept after all, and those that it took over.
    pub moves_begun: Counter,
    pub moves_given_up: Counter,
    pub moves_done: Counter,
    /// Suspensions in force everywhere; told by one shard, because all have the same.
    pub suspensions: Gauge,
    /// Not due yet.
    pub scheduled: Gauge,
    /// Due, or with a connection.
    pub ready: Gauge,
    /// Messages with a recipient left.
    pub messages: Gauge,
    pub signatures_rsa: Counter,
    pub signatures_ed25519: Counter,
    /// From MAIL to the final answer, in seconds.
    pub delivery_duration_s: Histogram,
    /// From MAIL to our final answer, in seconds.
    pub transaction_duration_s: Histogram,
    /// From acceptance to a transaction that has delivered something, in seconds.
    pub delivered_age_s: Histogram,
    pub spool_used_bytes: Gauge,
    pub spool_segments: Gauge,
    /// 1 while this shard's log takes no mail.
    pub spool_closed: Gauge,
    /// 1 while none of this shard's logs has taken a write for long.
    pub spool_broken: Gauge,
    /// Why, for people; written when that changes.
    spool_closed_reason: Mutex<String>,
    pub spool_commits: Counter,
    pub spool_commit_bytes: Counter,
    pub spool_commit_records: Histogram,
    /// From the write's submission to its completion, in seconds.
    pub spool_commit_duration_s: Histogram,
    pub spool_quarantined_records: Counter,
    pub spool_held_messages: Counter,
    /// Files of the spool that could not be made, counted once for each cause.
    pub spool_files_not_made: Counter,
    pub spool_damaged_messages: Counter,
}

impl Default for ShardMetrics {
    fn default() -> Self {
        Self {
            turns: Counter::default(),
            connections_in: Gauge::default(),
            connections_in_accepted: Counter::default(),
            connections_in_denied: Counter::default(),
            connections_out: Gauge::default(),
            connections_out_made: Counter::default(),
            rejections: Counter::default(),
            received_smtp: Counter::default(),
            received_http: Counter::default(),
            received_embedded: Counter::default(),
            session_failures: Default::default(),
            delivered: Counter::default(),
            transient_failures: Counter::default(),
            failures: Counter::default(),
            possible_duplicates: Counter::default(),
            quarantined_messages: Counter::default(),
            suspensions_made: Counter::default(),
            automation_fired: Counter::default(),
            moves_begun: Counter::default(),
            moves_given_up: Counter::default(),
            moves_done: Counter::default(),
            suspensions: Gauge::default(),
            scheduled: Gauge::default(),
            ready: Gauge::default(),
            messages: Gauge::default(),
            signatures_rsa: Counter::default(),
            signatures_ed25519: Counter::default(),
            delivery_duration_s: Histogram::new(DURATION_BOUNDS_S),
            transaction_duration_s: Histogram::new(DURATION_BOUNDS_S),
            delivered_age_s: Histogram::new(AGE_BOUNDS_S),
            spool_used_bytes: Gauge::default(),
            spool_segments: Gauge::default(),
            spool_closed: Gauge::default(),
            spool_broken: Gauge::default(),
            spool_closed_reason: Mutex::default(),
            spool_commits: Counter::default(),
            spool_commit_bytes: Counter::default(),
            spool_commit_records: Histogram::new(RECORDS_BOUNDS),
            spool_commit_duration_s: Histogram::new(COMMIT_BOUNDS_S),
            spool_quarantined_records: Counter::default(),
            spool_held_messages: Counter::default(),
            spool_damaged_messages: Counter::default(),
            spool_files_not_made: Counter::default(),
        }
    }
}

impl ShardMetrics {
    /// Why this shard's log takes no mail; None where it does.
    pub fn spool_closed_reason(&self) -> Option<String> {
        let reason = self.spool_closed_reason.lock().unwrap_or_else(PoisonError::into_inner);
        Some(reason.clone()).filter(|reason| !reason.is_empty())
    }

    pub fn set_spool_closed(&self, reason: Option<String>) {
        self.spool_closed.set(u64::from(reason.is_some()));
        *self.spool_closed_reason.lock().unwrap_or_else(PoisonError::into_inner) = reason.unwrap_or_default();
    }
}

/// Every shard's metrics and those of the event writer.
pub struct Metrics {
    shards: Vec<Arc<ShardMetrics>>,
    event_log: Box<dyn Fn() -> EventLogStatistics + Send + Sync>,
}

impl Metrics {
    pub fn new(
        shards: Vec<Arc<ShardMetrics>>,
        event_log: impl Fn() -> EventLogStatistics + Send + Sync + 'static,
    ) -> Self {
        Self { shards, event_log: Box::new(event_log) }
    }

    /// Why a shard's log takes no mail, where one takes none.
    pub fn spool_closed_reason(&self) -> Option<String> {
        self.shards.iter().find_map(|shard| shard.spool_closed_reason())
    }

    /// A sum over the shards, for status and the like.
    pub fn sum(&self, of: impl Fn(&ShardMetrics) -> u64) -> u64 {
        self.shards.iter().map(|shard| of(shard)).sum()
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn prometheus_text(&self) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Snapshot(self.families())));
        let mut out = String::new();
        text::encode_registry(&mut out, &registry).expect("a String takes every character");
        out
    }

    /// KumoMTA's `/metrics.json`: an object of `{help, type, value}`, where `value` is a number or an object of
    /// label, label value, number. A histogram's value is `{sum, count, buckets: [[bound, count up to it], …]}`.
    pub fn json(&self) -> Value {
        let families = self.families().into_iter().map(|family| {
            let value = match family.label {
                None => family.samples.first().map_or(Value::Null, |(_, sample)| sample.json()),
                Some(label) => {
                    let by_label = family.samples.iter().map(|(value, sample)| ((*value).into(), sample.json()));
                    json!({ label: by_label.collect::<Map<String, Value>>() })
                }
            };
            (family.name.into(), json!({ "help": family.help, "type": family.kind(), "value": value }))
        });
        Value::Object(families.collect())
    }

    #[rustfmt::skip]
    fn families(&self) -> Vec<Family> {
        use Kind::{Counter as C, Gauge as G};
        let one = |name, help, kind, of: Read| Family {
            name, help, kind, label: None, samples: vec![("", Sample::Number(self.sum(of)))],
        };
        let some = |name, help, kind, label, parts: &[(&'static str, Read)]| Family {
            name, help, kind, label: Some(label),
            samples: parts.iter().map(|&(value, of)| (value, Sample::Number(self.sum(of)))).collect(),
        };
        let histogram = |name, help, label, value, of: fn(&ShardMetrics) -> &Histogram| Family {
            name, help, kind: Kind::Histogram, label, samples: vec![(value, self.add_up(of))],
        };
        let session_failures = SESSION_RULES.iter().enumerate().map(|(place, rule)| {
            (rule.name, Sample::Number(self.sum(|shard| shard.session_failures[place].get())))
        });
        let events = (self.event_log)();
        let event = |name, help, kind, number| Family {
            name, help, kind, label: None, samples: vec![("", Sample::Number(number))],
        };
        let bare = (None, "");
        let client = (Some("service"), "smtp_client");
        vec![
            // KumoMTA's.
            some("connection_count", "Open connections.", G, "service", &[
                ("esmtp_listener", |s| s.connections_in.get()), ("smtp_client", |s| s.connections_out.get())]),
            some("total_connection_count", "Connections ever made.", C, "service", &[
                ("esmtp_listener", |s| s.connections_in_accepted.get()),
                ("smtp_client", |s| s.connections_out_made.get())]),
            some("total_connections_denied", "Connections refused because of a limit.", C, "service", &[
                ("esmtp_listener", |s| s.connections_in_denied.get())]),
            some("smtp_server_rejections", "Answers 4xx and 5xx given to clients.", C, "service", &[
                ("esmtp_listener", |s| s.rejections.get())]),
            some("total_messages_received", "Messages accepted.", C, "service", &[
                ("esmtp_listener", |s| s.received_smtp.get()), ("http_listener", |s| s.received_http.get()),
                ("embedded", |s| s.received_embedded.get())]),
            some("total_messages_delivered", "Recipients delivered.", C, "service", &[
                ("smtp_client", |s| s.delivered.get())]),
            some("total_messages_transfail", "Attempts that failed for the time being.", C, "service", &[
                ("smtp_client", |s| s.transient_failures.get())]),
            some("total_messages_fail", "Recipients that ended without delivery.", C, "service", &[
                ("smtp_client", |s| s.failures.get())]),
            one("scheduled_count_total", "Recipients that are not due yet.", G, |s| s.scheduled.get()),
            some("ready_count", "Recipients that are due or being tried.", G, "service", &[
                ("smtp_client", |s| s.ready.get())]),
            one("message_count", "Messages that have a recipient left.", G, |s| s.messages.get()),
            histogram("deliver_message_latency_rollup", "Seconds from MAIL to the final answer, delivering.",
                client.0, client.1, |s| &s.delivery_duration_s),
            histogram("smtpsrv_transaction_duration", "Seconds from MAIL to the final answer, accepting.",
                bare.0, bare.1, |s| &s.transaction_duration_s),
            // Ours.
            histogram("delivered_message_age", "Seconds from acceptance to delivery, for each transaction.",
                client.0, client.1, |s| &s.delivered_age_s),
            one("possible_duplicates", "Deliveries that may have been made twice.", C,
                |s| s.possible_duplicates.get()),
            one("quarantined_messages", "Messages held because the engine died over them.", C,
                |s| s.quarantined_messages.get()),
            one("suspensions", "Suspensions in force.", G, |s| s.suspensions.get()),
            one("suspensions_made", "Suspensions made by the engine itself.", C, |s| s.suspensions_made.get()),
            Family { name: "session_failures", help: "Sessions with hosts that came to nothing.", kind: C,
                label: Some("verdict"), samples: session_failures.collect() },
            one("automation_fired", "Automation rules fired.", C, |s| s.automation_fired.get()),
            one("pair_moves_begun", "Moves of pairs to another shard that began.", C, |s| s.moves_begun.get()),
            one("pair_moves_done", "Moves that came to their end.", C, |s| s.moves_done.get()),
            one("pair_moves_given_up", "Moves that would have held up mail.", C, |s| s.moves_given_up.get()),
            some("dkim_signatures", "DKIM signatures made.", C, "algorithm", &[
                ("rsa-sha256", |s| s.signatures_rsa.get()), ("ed25519-sha256", |s| s.signatures_ed25519.get())]),
            one("shard_turns", "Loop turns of all shards.", C, |s| s.turns.get()),
            one("spool_used_bytes", "Bytes of segments in use.", G, |s| s.spool_used_bytes.get()),
            one("spool_segments", "Segments in use.", G, |s| s.spool_segments.get()),
            one("spool_closed_logs", "Logs that take no mail.", G, |s| s.spool_closed.get()),
            one("spool_broken_shards", "Shards none of whose logs has taken a write for half a minute.", G,
                |s| s.spool_broken.get()),
            one("spool_commits", "Commits written.", C, |s| s.spool_commits.get()),
            one("spool_commit_bytes", "Bytes of commits written.", C, |s| s.spool_commit_bytes.get()),
            histogram("spool_commit_records", "Records in a commit.", bare.0, bare.1, |s| &s.spool_commit_records),
            histogram("spool_commit_duration_seconds", "Seconds that a commit took.", bare.0, bare.1,
                |s| &s.spool_commit_duration_s),
            one("spool_quarantined_records", "Damaged records set aside.", C, |s| s.spool_quarantined_records.get()),
            one("spool_held_messages", "Messages held at the start.", C, |s| s.spool_held_messages.get()),
            one("spool_damaged_messages", "Damaged ones that were met.", C, |s| s.spool_damaged_messages.get()),
            one("spool_files_not_made", "Causes for which a file of the spool could not be made.", C,
                |s| s.spool_files_not_made.get()),
            event("events_written", "Events synced to the event log.", C, events.events),
            event("event_frames", "Frames synced to the event log.", C, events.frames),
            event("event_bytes", "Bytes synced to the event log, compressed.", C, events.bytes),
            event("event_files", "Event files begun.", C, events.files),
            event("event_write_failures", "Failed tries to write the event log.", C, events.failures),
            event("event_batches_waiting", "Batches that wait for the event writer.", G, events.waiting_batches),
            event("event_log_blocked", "1 while events can't be written and no mail is taken.", G,
                u64::from(events.blocked)),
        ]
    }

    fn add_up(&self, of: fn(&ShardMetrics) -> &Histogram) -> Sample {
        let mut buckets: Vec<(f64, u64)> = Vec::new();
        let mut sum = 0.0;
        for histogram in self.shards.iter().map(|shard| of(shard)) {
            let bounds = histogram.bounds.iter().copied().chain([f64::INFINITY]);
            buckets.resize_with(histogram.counts.len(), Default::default);
            for ((bucket, bound), count) in buckets.iter_mut().zip(bounds).zip(&histogram.counts) {
                *bucket = (bound, bucket.1 + count.get());
            }
            sum += f64::from_bits(histogram.sum.load(Ordering::Relaxed));
        }
        Sample::Histogram { sum, buckets }
    }
}

/// Takes one number from a shard.
type Read = fn(&ShardMetrics) -> u64;

/// One metric with all its label values.
#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    label: Option<&'static str>,
    /// Label value and number.
    samples: Vec<(&'static str, Sample)>,
}

impl Family {
    fn kind(&self) -> &'static str {
        match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

#[derive(Debug)]
enum Sample {
    Number(u64),
    /// Upper bound and how many fell into just this bucket.
    Histogram {
        sum: f64,
        buckets: Vec<(f64, u64)>,
    },
}

impl Sample {
    fn encode(&self, metric: &mut MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        match self {
            // `encode_counter` would put `_total` behind the name.
            Self::Number(number) => metric.encode_gauge(number),
            Self::Histogram { sum, buckets } => {
                let count = buckets.iter().map(|bucket| bucket.1).sum();
                metric.encode_histogram::<NoLabelSet>(*sum, count, buckets, None)
            }
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Number(number) => json!(number),
            Self::Histogram { sum, buckets } => {
                let mut count = 0;
                let buckets: Vec<_> = buckets
                    .iter()
                    .map(|&(bound, here)| {
                        count += here;
                        let bound = if bound.is_finite() { json!(bound) } else { json!("+Inf") };
                        json!([bound, count])
                    })
                    .collect();
                json!({ "sum": sum, "count": count, "buckets": buckets })
            }
        }
    }
}

/// What one scrape tells.
#[derive(Debug)]
struct Snapshot(Vec<Family>);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for family in &self.0 {
            let kind = match family.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
            };
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, kind)?;
            for (value, sample) in &family.samples {
                match family.label {
                    // An empty label set would be written as `{}`.
                    None => sample.encode(&mut metric)?,
                    Some(label) => sample.encode(&mut metric.encode_family(&[(label, *value)])?)?,
                }
            }
        }
        Ok(())
    }
}

/// KumoMTA's and Prometheus' usual ones.
const DURATION_BOUNDS_S: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Of mail that goes at once, up to mail that has waited for a day.
const AGE_BOUNDS_S: &[f64] = &[0.01, 0.05, 0.25, 1.0, 5.0, 30.0, 300.0, 1800.0, 7200.0, 28_800.0, 86_400.0];
/// A synced write takes 0.1 ms on a good disk and some seconds on a dying one.
const COMMIT_BOUNDS_S: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5];
const RECORDS_BOUNDS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        let shards: Vec<_> = (0..2).map(|_| Arc::new(ShardMetrics::default())).collect();
        shards[0].received_smtp.add(3);
        shards[1].received_smtp.inc();
        shards[1].connections_out.add(7);
        shards[1].connections_out.sub(2);
        for (shard, records) in [(0, 1.0), (0, 3.0), (1, 3.0), (1, 9_999.0)] {
            shards[shard].spool_commit_records.observe(records);
        }
        Metrics::new(shards, || EventLogStatistics { events: 11, blocked: true, ..EventLogStatistics::default() })
    }

    fn block(text: &str, name: &str) -> String {
        let of_it = |line: &&str| {
            let line = line.trim_start_matches("# HELP ").trim_start_matches("# TYPE ");
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{', '_']))
        };
        text.lines().filter(of_it).collect::<Vec<_>>().join("\n")
    }

    /// The alerts that operators are told to make are about metrics that there are.
    #[test]
    fn documents_name_real_metrics() {
        let document = include_str!("../../docs/operating.md");
        let alerts = document.split("### Alerts").nth(1).unwrap().split("\n## ").next().unwrap();
        let text = metrics().prometheus_text();
        let mut looked_at = 0;
        for row in alerts.lines().filter(|line| line.starts_with("| ")).skip(1) {
            let expression = row.split(" | ").next().unwrap();
            let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for word in words.filter(|word| word.contains('_') && !["histogram_quantile", "max_size"].contains(word)) {
                let name = word.trim_end_matches("_bucket");
                assert!(text.contains(&format!("# TYPE {name} ")), "{word}");
                looked_at += 1;
            }
        }
        assert!(looked_at > 15, "{looked_at} metrics");
    }

    #[test]
    fn the_text_has_kumomtas_names_and_sums_over_shards() {
        let text = metrics().prometheus_text();
        assert_eq!(
            block(&text, "total_messages_received"),
            "# HELP total_messages_received Messages accepted.\n\
             # TYPE total_messages_received counter\n\
             total_messages_received{service=\"esmtp_listener\"} 4\n\
             total_messages_received{service=\"http_listener\"} 0\n\
             total_messages_received{service=\"embedded\"} 0"
        );
        assert!(text.contains("\nconnection_count{service=\"smtp_client\"} 5\n"));
        assert!(text.contains("\nevents_written 11\n"));
        assert!(text.contains("\nevent_log_blocked 1\n"));
        assert!(!text.contains("# EOF"), "that line belongs to OpenMetrics");
    }

    #[test]
    fn histograms_add_up_and_are_cumulative() {
        let metrics = metrics();
        assert_eq!(
            block(&metrics.prometheus_text(), "spool_commit_records"),
            "# HELP spool_commit_records Records in a commit.\n\
             # TYPE spool_commit_records histogram\n\
             spool_commit_records_sum 10006.0\n\
             spool_commit_records_count 4\n\
             spool_commit_records_bucket{le=\"1.0\"} 1\n\
             spool_commit_records_bucket{le=\"2.0\"} 1\n\
             spool_commit_records_bucket{le=\"4.0\"} 3\n\
             spool_commit_records_bucket{le=\"8.0\"} 3\n\
             spool_commit_records_bucket{le=\"16.0\"} 3\n\
             spool_commit_records_bucket{le=\"32.0\"} 3\n\
             spool_commit_records_bucket{le=\"64.0\"} 3\n\
             spool_commit_records_bucket{le=\"128.0\"} 3\n\
             spool_commit_records_bucket{le=\"256.0\"} 3\n\
             spool_commit_records_bucket{le=\"512.0\"} 3\n\
             spool_commit_records_bucket{le=\"+Inf\"} 4"
        );
        let json = &metrics.json()["spool_commit_records"]["value"];
        assert_eq!(json["count"], 4);
        assert_eq!(json["buckets"][2], json!([4.0, 3]));
        assert_eq!(json["buckets"][10], json!(["+Inf", 4]));
    }

    #[test]
    fn json_has_kumomtas_shape() {
        let json = metrics().json();
        assert_eq!(
            json["connection_count"],
            json!({
                "help": "Open connections.",
                "type": "gauge",
                "value": { "service": { "esmtp_listener": 0, "smtp_client": 5 } },
            })
        );
        assert_eq!(json["message_count"]["value"], 0);
    }

    /// Prometheus refuses a scrape in which a name occurs twice.
    #[test]
    fn names_are_unique_and_well_formed() {
        let families = metrics().families();
        for (place, family) in families.iter().enumerate() {
            assert!(family.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'));
            assert!(families[..place].iter().all(|other| other.name != family.name), "{}", family.name);
            assert!(family.help.ends_with('.'), "{}", family.name);
        }
    }

    #[test]
    #[should_panic(expected = "a gauge below zero")]
    fn a_gauge_does_not_go_below_zero() {
        Gauge::default().sub(1);
    }
}
