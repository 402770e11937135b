//! One pass over a spool: what is damaged, then what is live, log by log.
//!
//! Recovery reads every segment in use and checks every checksum in it, bodies included. It holds one segment file and
//! 36 octets for each live message in memory, never all messages.

use std::path::{Path, PathBuf};

use postrider_spool::record::RecipientResult;
use postrider_spool::{
    Envelope, Fate, Inspection, Log, LogId, Message, MessageId, Reason, RecoverOptions, Recovered, Sequence, Spool,
    Statistics,
};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::render::{Cell, Table, bytes, count};

/// A spool that can be read.
pub(crate) struct Reading {
    path: PathBuf,
    inspection: Inspection,
}

/// What a pass meets.
pub(crate) enum Met<'a> {
    Region(&'a Region<'a>),
    Message(&'a Live<'a>),
}

/// Octets that recovery would cut off or quarantine.
pub(crate) struct Region<'a> {
    log: LogId,
    /// Below the spool's directory.
    pub(crate) file: &'a Path,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    finding: Finding,
}

#[derive(Clone, Copy)]
enum Finding {
    Damage(Reason),
    Cut,
}

/// A message with recipients that wait, and whose octets are all as they were written.
pub(crate) struct Live<'a> {
    pub(crate) id: MessageId,
    pub(crate) message: &'a Message,
    pub(crate) envelope: Envelope,
    pending: &'a [u32],
    /// By index, ascending.
    results: &'a [RecipientResult],
    /// It may have been delivered: nothing was left that would tell.
    pub(crate) is_held: bool,
}

/// What is known of one recipient.
pub(crate) struct RecipientState<'a> {
    pub(crate) index: u32,
    pub(crate) address: &'a str,
    /// Without a final fate.
    pub(crate) is_pending: bool,
    /// Only for those that are pending.
    pub(crate) due_ms: Option<u64>,
    /// What the last attempt came to, where there was one.
    pub(crate) result: Option<&'a RecipientResult>,
}

/// What a pass comes to.
pub(crate) struct Report {
    pub(crate) logs: Vec<LogReport>,
    pub(crate) meta_error: Option<String>,
}

pub(crate) struct LogReport {
    log: LogId,
    /// Or why it can't be read.
    statistics: Result<Statistics, String>,
    whole: u64,
    /// Damaged regions.
    damaged: u64,
    pub(crate) cut: u64,
}

impl Reading {
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let inspection = Spool::inspect(path).map_err(Failure::Spool)?;
        Ok(Self { path: path.to_owned(), inspection })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the logs that are wanted. Ends with the first failure of `visit`.
    pub(crate) fn read(
        &self,
        wants: impl Fn(LogId) -> bool,
        visit: &mut dyn FnMut(Met<'_>) -> Result<(), Failure>,
    ) -> Result<Report, Failure> {
        let mut logs = Vec::new();
        for &log in self.inspection.log_ids().iter().filter(|log| wants(**log)) {
            logs.push(self.read_log(log, visit)?);
        }
        self.inspection.check_undisturbed().map_err(Failure::Spool)?;
        Ok(Report { logs, meta_error: self.inspection.meta_error().map(ToString::to_string) })
    }

    fn read_log(
        &self,
        log: LogId,
        visit: &mut dyn FnMut(Met<'_>) -> Result<(), Failure>,
    ) -> Result<LogReport, Failure> {
        let (mut whole, mut damaged, mut cut) = (0, 0, 0);
        let mut visited = Ok(());
        let mut see = |recovered: Recovered<'_>| {
            // Recovery can't be stopped, only ignored.
            if visited.is_err() {
                return;
            }
            let is_held = matches!(recovered, Recovered::Held { .. });
            let region = match recovered {
                Recovered::Record { .. } | Recovered::Summary { .. } => return,
                Recovered::Message { id, message, pending, results, .. }
                | Recovered::Held { id, message, pending, results } => {
                    // It was whole when it was read for the first time; one that is not any more counts as damaged.
                    if let (Ok(envelope), true) = (message.envelope(), message.content_matches()) {
                        whole += 1;
                        let envelope = envelope.to_envelope();
                        visited = visit(Met::Message(&Live { id, message, envelope, pending, results, is_held }));
                    }
                    return;
                }
                Recovered::Quarantined(it) => {
                    damaged += 1;
                    self.region(log, &it.file, it.offset, it.bytes, Finding::Damage(it.reason))
                }
                Recovered::Cut(it) => {
                    cut += 1;
                    self.region(log, &it.file, it.offset, it.bytes, Finding::Cut)
                }
            };
            visited = visit(Met::Region(&region));
        };
        let options = RecoverOptions { event_cursor: Sequence(u64::MAX), reads_everything: true, ..Default::default() };
        let directory = self.inspection.log_directory(log).map_err(|error| error.to_string());
        let recovered = directory
            .and_then(|directory| Log::recover(directory, options, &mut see).map_err(|error| error.to_string()));
        visited?;
        Ok(LogReport { log, statistics: recovered.map(|log| log.statistics()), whole, damaged, cut })
    }

    fn region<'a>(&self, log: LogId, file: &'a Path, offset: u64, bytes: u64, finding: Finding) -> Region<'a> {
        Region { log, file: file.strip_prefix(&self.path).unwrap_or(file), offset, bytes, finding }
    }
}

impl Region<'_> {
    pub(crate) fn what(&self) -> String {
        match self.finding {
            Finding::Damage(reason) => reason.to_string(),
            Finding::Cut => "unfinished last commit, never acknowledged".into(),
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        let (kind, message) = match self.finding {
            Finding::Damage(Reason::Record { message, .. }) => ("damage", Some(message.to_string())),
            Finding::Damage(_) => ("damage", None),
            Finding::Cut => ("cut", None),
        };
        json!({
            "log": log_name(self.log), "file": self.file.display().to_string(), "offset": self.offset,
            "bytes": self.bytes, "kind": kind, "what": self.what(), "message": message,
        })
    }
}

impl Live<'_> {
    pub(crate) fn recipients(&self) -> impl Iterator<Item = RecipientState<'_>> {
        self.envelope.recipients.iter().zip(0..).map(|(recipient, index)| {
            let is_pending = self.pending.binary_search(&index).is_ok();
            let found = self.results.binary_search_by_key(&index, |result| result.index);
            let result = found.ok().map(|found| &self.results[found]);
            let due_ms = match result.map(|result| result.fate) {
                Some(Fate::Deferred { due_ms }) => due_ms,
                _ => self.envelope.first_attempt_ms,
            };
            let due_ms = is_pending.then_some(due_ms);
            RecipientState { index, address: &recipient.address, is_pending, due_ms, result }
        })
    }
}

impl Report {
    /// What is damaged, in words.
    pub(crate) fn damage(&self) -> Option<String> {
        let mut parts = Vec::new();
        let regions: u64 = self.logs.iter().map(|log| log.damaged).sum();
        if regions > 0 {
            parts.push(count(regions, "damaged region"));
        }
        let lost: u64 = self.logs.iter().map(LogReport::lost).sum();
        if lost > 0 {
            parts.push(format!("{} can't be read again", count(lost, "message")));
        }
        for log in &self.logs {
            if let Err(reason) = &log.statistics {
                parts.push(format!("log {} can't be read: {reason}", log_name(log.log)));
            }
        }
        parts.extend(self.meta_error.clone());
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// Fails when anything is damaged.
    pub(crate) fn into_result(self, next: &'static str) -> Result<(), Failure> {
        self.damage().map_or(Ok(()), |what| Err(Failure::Damage { what, next }))
    }

    pub(crate) fn to_table(&self) -> Table {
        let mut table = Table::new(&["LOG", "MESSAGES", "BYTES", "SEGMENTS", "SPARES", "STATE"]);
        for log in &self.logs {
            let statistics = log.statistics.clone().unwrap_or_default();
            table.push(vec![
                Cell::text(&log_name(log.log)),
                Cell::number(statistics.live_messages),
                Cell::number(bytes(statistics.live_bytes)),
                Cell::number(statistics.segments_in_use),
                Cell::number(statistics.segments_spare),
                Cell::text(&log.state()),
            ]);
        }
        table
    }

    pub(crate) fn to_json(&self) -> Vec<Value> {
        self.logs.iter().map(LogReport::to_json).collect()
    }
}

impl LogReport {
    /// Live messages that were not whole when they were read for the second time.
    fn lost(&self) -> u64 {
        self.statistics.as_ref().map_or(0, |statistics| statistics.live_messages - self.whole)
    }

    fn state(&self) -> String {
        if self.statistics.is_err() {
            return "can't be read".into();
        }
        let mut parts = Vec::new();
        if self.damaged > 0 || self.lost() > 0 {
            parts.push(format!("damaged ({})", count(self.damaged + self.lost(), "place")));
        } else {
            parts.push("whole".to_owned());
        }
        if self.cut > 0 {
            parts.push(format!("{} cut", count(self.cut, "unfinished commit")));
        }
        parts.join(", ")
    }

    fn to_json(&self) -> Value {
        let statistics = self.statistics.clone().unwrap_or_default();
        json!({
            "log": log_name(self.log), "messages": statistics.live_messages, "bytes": statistics.live_bytes,
            "segments": statistics.segments_in_use, "spares": statistics.segments_spare,
            "damaged": self.damaged + self.lost(), "cut": self.cut, "error": self.statistics.as_ref().err(),
        })
    }
}

/// As in the directory's name, and at the begin of a message's id.
fn log_name(log: LogId) -> String {
    format!("{:04x}", log.0)
}
