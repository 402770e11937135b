//! Log lines for operators, set up by binaries only.
//!
//! The engine speaks through `tracing` everywhere. An embedding program that installs no subscriber hears nothing and
//! pays next to nothing; `postrider serve` calls [`init`].

use std::io::{self, IsTerminal as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::limits::LOG_PATIENCE;
use crate::runtime::standard_error;

/// Writes log lines to standard error. What is shown: `POSTRIDER_LOG`, else `RUST_LOG`, else `default_filter`
/// (`info`, `warn,postrider::deliver=debug` …). Under systemd each line gets its journal priority and no time of its
/// own. Does nothing when the process has a subscriber already. A filter that can't be read is told, and
/// `default_filter` used.
///
/// Where the reader of a pipe stands still, lines are lost instead of the engine standing still with it; the next one
/// that can be written says how many.
pub fn init(default_filter: &str) {
    let asked = ["POSTRIDER_LOG", "RUST_LOG"].into_iter().find_map(|name| Some((name, std::env::var(name).ok()?)));
    let parsed = asked.as_ref().map(|(_, text)| text.parse::<EnvFilter>());
    let (filter, refused) = match parsed {
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (EnvFilter::new(default_filter), Some(error)),
        None => (EnvFilter::new(default_filter), None),
    };
    // systemd sets it to the device and inode of the stream that it reads; that it is set at all is enough here.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some() && !io::stderr().is_terminal();
    // Another subscriber is there already: an embedding program's own, which is to stay.
    let _ = tracing::subscriber::set_global_default(subscriber(filter, journal, Stderr::new(journal)));
    if let (Some(error), Some((name, text))) = (refused, asked) {
        tracing::warn!("{name}={text:?} is no log filter ({error}); \"{default_filter}\" is used");
    }
}

fn subscriber<W>(filter: EnvFilter, journal: bool, writer: W) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // A line that can't be written is lost. To say so would be one more line, with a macro that panics if it fails: a
    // log on a full disk must not end the engine.
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).log_internal_errors(false);
    if journal {
        Box::new(lines.with_ansi(false).with_level(false).without_time().finish())
    } else {
        Box::new(lines.with_ansi(io::stderr().is_terminal()).finish())
    }
}

struct Stderr {
    journal: bool,
    lines: Mutex<Lossy<io::Stderr>>,
}

impl Stderr {
    fn new(journal: bool) -> Self {
        let (prefix, has_room) = (if journal { "<4>" } else { "" }, standard_error::has_room);
        Self { journal, lines: Mutex::new(Lossy { prefix, to: io::stderr(), has_room, lost: 0 }) }
    }
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = PrefixedLine<Taken<'a, io::Stderr>>;

    fn make_writer(&'a self) -> Self::Writer {
        PrefixedLine { prefix: "", to: Taken(&self.lines) }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self::Writer {
        let prefix = if self.journal { journal_priority(*metadata.level()) } else { "" };
        PrefixedLine { prefix, to: Taken(&self.lines) }
    }
}

/// Writes each line if there is room for it.
struct Lossy<W> {
    /// Of its own lines.
    prefix: &'static str,
    to: W,
    has_room: fn(Duration) -> bool,
    /// Lines since the last one that could be written.
    lost: u64,
}

impl<W: io::Write> Lossy<W> {
    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        // Only the first one waits: else each line of many would hold up its thread.
        let patience = if self.lost == 0 { LOG_PATIENCE } else { Duration::ZERO };
        if !(self.has_room)(patience) {
            self.lost += 1;
            return Ok(());
        }
        let lost = std::mem::take(&mut self.lost);
        if lost > 0 {
            let told = format!("{}standard error was not read: {lost} lines are lost\n", self.prefix);
            self.to.write_all(told.as_bytes())?;
        }
        self.to.write_all(line)
    }
}

/// One line at a time: between the question for room and the write no other thread takes it.
struct Taken<'a, W>(&'a Mutex<Lossy<W>>);

impl<W: io::Write> io::Write for Taken<'_, W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_line(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).to.flush()
    }
}

/// sd-daemon(3): a line may begin with its syslog level in angle brackets.
fn journal_priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}

/// One log line; the prefix goes before its first byte, in the same write.
struct PrefixedLine<W> {
    prefix: &'static str,
    to: W,
}

impl<W: io::Write> io::Write for PrefixedLine<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.prefix.is_empty() {
            return self.to.write(bytes);
        }
        let prefix = std::mem::take(&mut self.prefix);
        self.to.write_all(&[prefix.as_bytes(), bytes].concat())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines {
        journal: bool,
        text: Arc<Mutex<Vec<u8>>>,
    }

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.text.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Lines {
        type Writer = PrefixedLine<Self>;

        fn make_writer(&'a self) -> Self::Writer {
            PrefixedLine { prefix: "", to: self.clone() }
        }

        fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self::Writer {
            let prefix = if self.journal { journal_priority(*metadata.level()) } else { "" };
            PrefixedLine { prefix, to: self.clone() }
        }
    }

    #[test]
    fn journal_lines_carry_their_priority_and_the_filter_holds() {
        let lines = Lines { journal: true, ..Lines::default() };
        let subscriber = subscriber(EnvFilter::new("info"), true, lines.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!(target: "spool", "disk is full");
            tracing::info!(target: "engine", "listening on {}", 25);
            tracing::debug!(target: "engine", "hidden");
        });
        let text = lines.text.lock().unwrap().clone();
        assert_eq!(String::from_utf8(text).unwrap(), "<3>spool: disk is full\n<6>engine: listening on 25\n");
    }

    #[test]
    fn lines_that_nobody_takes_are_counted() {
        thread_local!(static HAS_ROOM: std::cell::Cell<bool> = const { std::cell::Cell::new(true) });
        let lines = Mutex::new(Lossy { prefix: "<4>", to: Vec::new(), has_room: |_| HAS_ROOM.get(), lost: 0 });
        let mut to = Taken(&lines);
        to.write_all(b"one\n").unwrap();
        HAS_ROOM.set(false);
        to.write_all(b"two\n").unwrap();
        to.write_all(b"three\n").unwrap();
        HAS_ROOM.set(true);
        to.write_all(b"four\n").unwrap();
        to.write_all(b"five\n").unwrap();
        let text = String::from_utf8(lines.into_inner().unwrap().to).unwrap();
        assert_eq!(text, "one\n<4>standard error was not read: 2 lines are lost\nfour\nfive\n");
    }
}
