//! Live messages as files, written one by one while the spool is read. Nothing that exists is overwritten.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use postrider_spool::{LogId, MessageId};
use serde_json::json;

use super::reading::{Live, Met, Reading, Report};
use super::{SHOW_WHERE, mbox, view};
use crate::failure::Failure;
use crate::render::{bytes, count};

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    Eml,
    Mbox,
}

pub(crate) struct Export<'a> {
    reading: &'a Reading,
    to: &'a Path,
    format: Format,
    /// All, when there is none.
    ids: BTreeSet<MessageId>,
    exported: BTreeSet<MessageId>,
    messages: u64,
    octets: u64,
}

impl<'a> Export<'a> {
    pub(crate) fn new(reading: &'a Reading, to: &'a Path, format: Format, ids: &[MessageId]) -> Result<Self, Failure> {
        if is_inside(to, reading.path()).map_err(|error| failed(to, error))? {
            return Err(Failure::Usage(format!("{} is in the spool, which is not to be changed", to.display())));
        }
        let ids = ids.iter().copied().collect();
        Ok(Self { reading, to, format, ids, exported: BTreeSet::new(), messages: 0, octets: 0 })
    }

    pub(crate) fn run(mut self, json: bool, out: &mut impl Write) -> Result<(), Failure> {
        let report = match self.format {
            Format::Eml => self.write_folder()?,
            Format::Mbox => self.write_mbox()?,
        };
        let Self { messages, octets, to, .. } = self;
        if json {
            writeln!(out, "{:#}", json!({ "messages": messages, "bytes": octets, "to": to.display().to_string() }))?;
        } else {
            writeln!(out, "exported {}, {}, to {}", count(messages, "message"), bytes(octets), to.display())?;
        }
        report.into_result(SHOW_WHERE)?;
        let missing: Vec<MessageId> = self.ids.difference(&self.exported).copied().collect();
        if missing.is_empty() { Ok(()) } else { Err(Failure::NoSuchMessages(missing)) }
    }

    fn write_folder(&mut self) -> Result<Report, Failure> {
        let folder = self.to;
        fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
        let report = self.read(&mut |live| {
            let content = folder.join(format!("{}.eml", live.id));
            write_new(&content, |file| {
                file.write_all(live.message.prefix())?;
                file.write_all(live.message.body())
            })?;
            // Written last: where it is, the message is whole.
            let envelope = folder.join(format!("{}.json", live.id));
            write_new(&envelope, |file| writeln!(file, "{:#}", view::message_json(live)))
        })?;
        sync(folder)?;
        Ok(report)
    }

    fn write_mbox(&mut self) -> Result<Report, Failure> {
        let path = self.to;
        let mut file = BufWriter::new(File::create_new(path).map_err(|error| failed(path, error))?);
        let written = self.read(&mut |live| {
            let envelope = &live.envelope;
            mbox::write_message(&mut file, &envelope.reverse_path, envelope.created_ms, live.message)
                .map_err(|error| failed(path, error))
        });
        let report = written.and_then(|report| {
            file.flush().and_then(|()| file.get_ref().sync_all()).map_err(|error| failed(path, error))?;
            Ok(report)
        });
        if report.is_err() {
            // A part of it would pass for the whole.
            let _ = fs::remove_file(path);
        }
        report
    }

    fn read(&mut self, write: &mut dyn FnMut(&Live<'_>) -> Result<(), Failure>) -> Result<Report, Failure> {
        let logs: BTreeSet<LogId> = self.ids.iter().map(|id| id.log()).collect();
        let reading = self.reading;
        reading.read(|log| logs.is_empty() || logs.contains(&log), &mut |met| {
            let Met::Message(live) = met else { return Ok(()) };
            if !self.ids.is_empty() {
                if !self.ids.contains(&live.id) {
                    return Ok(());
                }
                self.exported.insert(live.id);
            }
            write(live)?;
            self.messages += 1;
            self.octets += live.message.size();
            Ok(())
        })
    }
}

/// Leaves no part of a file behind.
fn write_new(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<(), Failure> {
    let mut file = BufWriter::new(File::create_new(path).map_err(|error| failed(path, error))?);
    let written = write(&mut file).and_then(|()| file.flush());
    written.map_err(|error| {
        let _ = fs::remove_file(path);
        failed(path, error)
    })
}

/// Whoever reads "exported" may delete the spool. One call, because a sync for each file would take milliseconds each.
fn sync(folder: &Path) -> Result<(), Failure> {
    let synced = File::open(folder).and_then(|folder| rustix::fs::syncfs(folder).map_err(io::Error::from));
    synced.map_err(|error| failed(folder, error))
}

/// Whether a file that is perhaps still to be made lies in a directory.
fn is_inside(path: &Path, directory: &Path) -> io::Result<bool> {
    let path = std::path::absolute(path)?;
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(&path);
    Ok(existing.canonicalize()?.starts_with(directory.canonicalize()?))
}

fn failed(path: &Path, error: io::Error) -> Failure {
    Failure::File { path: PathBuf::from(path), error }
}
