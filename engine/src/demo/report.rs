//! What the demo tells at its end: a table, and whatever is wrong.

use std::fmt::{self, Write as _};
use std::time::Duration;

use super::usage::CpuUse;
use super::verify::Problem;

/// The result of a run; displays as the table and the verdict.
#[derive(Debug, Clone)]
pub struct Report {
    pub(super) messages: u32,
    pub(super) content_bytes: u64,
    pub(super) sessions: u32,
    pub(super) shards: usize,
    /// Directory and file system.
    pub(super) spool: String,
    /// Algorithms and sizes.
    pub(super) signatures: String,
    pub(super) accepted: Stage,
    pub(super) delivered: Stage,
    pub(super) verified: Stage,
    pub(super) acceptance: Latency,
    pub(super) end_to_end: Latency,
    /// None where /proc does not tell.
    pub(super) cpu: Option<CpuUse>,
    /// None where the engine's metrics could not be read.
    pub(super) commits: Option<u64>,
    pub(super) receptions: u64,
    pub(super) deliveries: u64,
    pub(super) transient_failures: u64,
    pub(super) postponed: u64,
    /// Why it ended before everything was settled.
    pub(super) broken_off: Option<String>,
    pub(super) problems: Vec<Problem>,
}

/// How many messages came so far, and when the last did, counted from the first sender's start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stage {
    pub(super) count: u32,
    pub(super) after: Duration,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Latency {
    p50: Duration,
    p99: Duration,
    max: Duration,
}

impl Latency {
    /// Of latencies in ascending order.
    pub(super) fn of(sorted: &[Duration]) -> Self {
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100);
            sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p50: at(50), p99: at(99), max: at(100) }
    }
}

impl Report {
    /// Whether every message was accepted, and delivered once and as sent, with valid signatures and its two events.
    pub fn is_success(&self) -> bool {
        self.problems.is_empty() && self.broken_off.is_none() && self.verified.count == self.messages
    }

    fn write_stages(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<16}{:>10}{:>11}{:>11}", "", "messages", "after", "per second")?;
        writeln!(f, "{:<16}{:>10}", "sent", grouped(self.messages.into()))?;
        for (name, stage, meaning) in [
            ("accepted", self.accepted, "250 after the synced commit"),
            ("delivered", self.delivered, "taken by the sink"),
            ("verified", self.verified, "once, octet for octet, signatures valid, both events logged"),
        ] {
            let rate = f64::from(stage.count) / stage.after.as_secs_f64().max(1e-9);
            let after = format!("{:.2} s", stage.after.as_secs_f64());
            let count = grouped(stage.count.into());
            writeln!(f, "{name:<16}{count:>10}{after:>11}{:>11}   {meaning}", grouped(rate as u64))?;
        }
        Ok(())
    }

    fn write_latencies(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<16}{:>10}{:>11}{:>11}", "latency", "p50", "p99", "max")?;
        for (name, latency, meaning) in [
            ("acceptance", self.acceptance, "content sent to 250"),
            ("end to end", self.end_to_end, "content sent to content at the sink"),
        ] {
            let [p50, p99, max] = [latency.p50, latency.p99, latency.max].map(milliseconds);
            writeln!(f, "{name:<16}{p50:>10}{p99:>11}{max:>11}   {meaning}")?;
        }
        Ok(())
    }

    fn write_cpu(&self, f: &mut fmt::Formatter<'_>, cpu: &CpuUse) -> fmt::Result {
        let senders = cpu.of(super::SENDERS_THREAD) + cpu.main;
        let sink = cpu.of(super::SINK_THREAD);
        let verifiers = cpu.of(super::VERIFIER_THREAD);
        let engine = cpu.process.saturating_sub(senders + sink + verifiers);
        let each = |time: Duration| format!("{:.0} µs", time.as_secs_f64() * 1e6 / f64::from(self.messages.max(1)));
        let mut parts = String::new();
        for (name, prefix) in [("shards", "shard-"), ("control", "control"), ("events", "events")] {
            let separator = if parts.is_empty() { "" } else { ", " };
            write!(parts, "{separator}{name} {}", each(cpu.of(prefix)))?;
        }
        writeln!(f, "\n{:<16}{:>10}", "CPU", "a message")?;
        writeln!(f, "{:<16}{:>10}{:25}{parts}", "engine", each(engine), "")?;
        for (name, time) in [("senders", senders), ("sink", sink), ("verifier", verifiers), ("process", cpu.process)] {
            writeln!(f, "{name:<16}{:>10}", each(time))?;
        }
        Ok(())
    }

    fn write_durability(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        if let Some(commits) = self.commits {
            let each = f64::from(self.accepted.count) / commits.max(1) as f64;
            writeln!(f, "{:<16}{:>10}   {each:.1} messages a commit", "synced commits", grouped(commits))?;
        }
        let (receptions, deliveries) = (grouped(self.receptions), grouped(self.deliveries));
        writeln!(f, "{:<16}{:>10}   Reception {receptions}, Delivery {deliveries}", "events", grouped(self.events()))?;
        if self.transient_failures > 0 {
            writeln!(
                f,
                "{:<16}{:>10}   deliveries that were tried again",
                "put off",
                grouped(self.transient_failures)
            )?;
        }
        if self.postponed > 0 {
            writeln!(f, "{:<16}{:>10}   answers 4xx to the senders", "postponed", grouped(self.postponed))?;
        }
        Ok(())
    }

    fn events(&self) -> u64 {
        self.receptions + self.deliveries + self.transient_failures
    }

    fn write_verdict(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verified, messages) = (grouped(self.verified.count.into()), grouped(self.messages.into()));
        if self.is_success() {
            return writeln!(
                f,
                "\n{verified} of {messages} messages verified: each arrived once, octet for octet, with valid \
                 signatures."
            );
        }
        writeln!(f)?;
        for problem in self.problems.iter().take(PROBLEMS_SHOWN) {
            writeln!(f, "{problem}")?;
        }
        if self.problems.len() > PROBLEMS_SHOWN {
            writeln!(f, "and {} more", grouped((self.problems.len() - PROBLEMS_SHOWN) as u64))?;
        }
        if let Some(reason) = &self.broken_off {
            writeln!(f, "broken off: {reason}")?;
        }
        writeln!(f, "FAILED: {verified} of {messages} messages verified")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = self.content_bytes as f64 / 1e6;
        writeln!(
            f,
            "{} messages of 0.5 to 16 KB ({megabytes:.1} MB), {} SMTP sessions, {} shards",
            grouped(self.messages.into()),
            self.sessions,
            self.shards
        )?;
        writeln!(f, "spool {}; signed with {}\n", self.spool, self.signatures)?;
        self.write_stages(f)?;
        self.write_latencies(f)?;
        if let Some(cpu) = &self.cpu {
            self.write_cpu(f, cpu)?;
        }
        self.write_durability(f)?;
        self.write_verdict(f)
    }
}

/// With commas between thousands.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

const PROBLEMS_SHOWN: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            messages: 10_000,
            content_bytes: 47_123_456,
            sessions: 20,
            shards: 2,
            spool: "/tmp/postrider-demo-1 (ext4, fsync)".to_owned(),
            signatures: "RSA-2048 and Ed25519".to_owned(),
            accepted: Stage { count: 10_000, after: Duration::from_millis(4_000) },
            delivered: Stage { count: 10_000, after: Duration::from_millis(4_100) },
            verified: Stage { count: 10_000, after: Duration::from_millis(5_000) },
            acceptance: Latency::of(&[Duration::from_micros(2_100), Duration::from_millis(3)]),
            end_to_end: Latency::default(),
            cpu: Some(CpuUse {
                process: Duration::from_secs(8),
                main: Duration::from_millis(100),
                threads: [("control", 10), ("events", 200), ("senders", 900), ("shard-0", 2_500), ("shard-1", 2_500)]
                    .map(|(name, ms)| (name.to_owned(), Duration::from_millis(ms)))
                    .into(),
            }),
            commits: Some(2_500),
            receptions: 10_000,
            deliveries: 10_000,
            transient_failures: 0,
            postponed: 0,
            broken_off: None,
            problems: Vec::new(),
        }
    }

    #[test]
    fn the_table() {
        let expected = "\
10,000 messages of 0.5 to 16 KB (47.1 MB), 20 SMTP sessions, 2 shards
spool /tmp/postrider-demo-1 (ext4, fsync); signed with RSA-2048 and Ed25519

                  messages      after per second
sent                10,000
accepted            10,000     4.00 s      2,500   250 after the synced commit
delivered           10,000     4.10 s      2,439   taken by the sink
verified            10,000     5.00 s      2,000   once, octet for octet, signatures valid, both events logged

latency                p50        p99        max
acceptance          2.1 ms     3.0 ms     3.0 ms   content sent to 250
end to end          0.0 ms     0.0 ms     0.0 ms   content sent to content at the sink

CPU              a message
engine              700 µs                         shards 500 µs, control 1 µs, events 20 µs
senders             100 µs
sink                  0 µs
verifier              0 µs
process             800 µs

synced commits       2,500   4.0 messages a commit
events              20,000   Reception 10,000, Delivery 10,000

10,000 of 10,000 messages verified: each arrived once, octet for octet, with valid signatures.
";
        assert_eq!(report().to_string(), expected);
        assert!(report().is_success());
    }

    #[test]
    fn what_is_wrong_is_named_and_bounded() {
        let mut failed = report();
        failed.verified.count = 9_974;
        failed.broken_off = Some("no progress for 30 s".to_owned());
        failed.problems = (0..26).map(|number| Problem { number: Some(number), what: "missing".to_owned() }).collect();
        assert!(!failed.is_success());
        let text = failed.to_string();
        let end = "message 19: missing\nand 6 more\nbroken off: no progress for 30 s\nFAILED: 9,974 of 10,000 messages \
                   verified\n";
        assert!(text.ends_with(end), "{text}");
        assert!(text.contains("\nmessage 0: missing\n") && !text.contains("message 20:"));
        // Each reason alone is enough.
        for break_it in [
            |report: &mut Report| report.verified.count -= 1,
            |report: &mut Report| report.broken_off = Some(String::new()),
            |report: &mut Report| report.problems.push(Problem { number: None, what: String::new() }),
        ] {
            let mut broken = report();
            break_it(&mut broken);
            assert!(!broken.is_success());
        }
    }

    #[test]
    fn ranks() {
        let all: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        let [p50, p99, max] = [100, 198, 200].map(Duration::from_millis);
        assert_eq!(Latency::of(&all), Latency { p50, p99, max });
        assert_eq!(Latency::of(&[]), Latency::default());
        assert_eq!(Latency::of(&all[..1]).p99, Duration::from_millis(1));
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
