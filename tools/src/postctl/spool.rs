//! `postctl spool`: reads a spool that no engine has open, by the engine's own recovery, and changes nothing in it.

mod export;
mod listing;
mod mbox;
mod reading;
mod view;

use std::io::Write;
use std::path::PathBuf;

use clap::{Subcommand, ValueHint};
use postrider_spool::MessageId;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::render::{Cell, Table, count, write_pairs};
use export::{Export, Format};
use listing::Listing;
use reading::{Live, Met, Reading};

#[derive(Subcommand)]
pub(crate) enum SpoolCommand {
    /// Recipients that wait, and what each log holds
    Ls {
        #[command(flatten)]
        spool: SpoolChoice,
        /// Only this recipient
        #[arg(long, value_name = "ADDRESS")]
        recipient: Option<String>,
        /// Only messages of this tenant
        #[arg(long)]
        tenant: Option<String>,
        /// At most so many rows
        #[arg(long)]
        limit: Option<u64>,
    },
    /// Prints a message as it would be sent, octet for octet
    Cat {
        #[command(flatten)]
        spool: SpoolChoice,
        /// The id that the 250 reply named
        id: MessageId,
        /// Prints the envelope and the recipients' states instead
        #[arg(long)]
        envelope: bool,
    },
    /// Checks every octet that is in use, and tells what is damaged
    Verify {
        #[command(flatten)]
        spool: SpoolChoice,
    },
    /// Writes messages that are not finished into files
    Export {
        #[command(flatten)]
        spool: SpoolChoice,
        /// Where to: the folder for eml, the file for mbox
        #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
        to: PathBuf,
        /// eml: a file for each message, and one with its envelope beside it; mbox: one file, no envelopes
        #[arg(long, value_enum, default_value_t = Format::Eml)]
        format: Format,
        /// Only this message; can be given again
        #[arg(long = "id", value_name = "ID")]
        ids: Vec<MessageId>,
    },
}

#[derive(clap::Args)]
pub(crate) struct SpoolChoice {
    /// The directory that spool.path names
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    path: PathBuf,
}

pub(crate) fn execute(command: SpoolCommand, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    match command {
        SpoolCommand::Ls { spool, recipient, tenant, limit } => {
            let filter = Filter { recipient, tenant, limit: limit.unwrap_or(u64::MAX) };
            list(&Reading::open(&spool.path)?, &filter, json, out)
        }
        SpoolCommand::Cat { envelope: false, .. } if json => {
            Err(Failure::Usage("a message is octets, not JSON; --json goes with --envelope".into()))
        }
        SpoolCommand::Cat { spool, id, envelope } => cat(&Reading::open(&spool.path)?, id, envelope, json, out),
        SpoolCommand::Verify { spool } => verify(&Reading::open(&spool.path)?, json, out),
        SpoolCommand::Export { spool, to, format, ids } => {
            let reading = Reading::open(&spool.path)?;
            Export::new(&reading, &to, format, &ids)?.run(json, out)
        }
    }
}

/// Which rows `ls` shows.
struct Filter {
    recipient: Option<String>,
    tenant: Option<String>,
    limit: u64,
}

impl Filter {
    fn wants_message(&self, live: &Live<'_>) -> bool {
        self.tenant.as_ref().is_none_or(|tenant| *tenant == live.envelope.tenant)
    }

    fn wants_recipient(&self, address: &str) -> bool {
        self.recipient.as_ref().is_none_or(|wanted| is_same_address(wanted, address))
    }
}

/// Local parts are case-sensitive, domains are not (RFC 5321 §2.4).
fn is_same_address(one: &str, other: &str) -> bool {
    match (one.rsplit_once('@'), other.rsplit_once('@')) {
        (Some((local, domain)), Some((other_local, other_domain))) => {
            local == other_local && domain.eq_ignore_ascii_case(other_domain)
        }
        _ => one == other,
    }
}

fn list(reading: &Reading, filter: &Filter, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let heads = ["ID", "SENDER", "RECIPIENT", "SIZE", "CREATED", "ATTEMPTS", "DUE", "LAST ANSWER"];
    let mut listing = Listing::begin(json, "messages", &heads);
    let mut fit = 0;
    let report = reading.read(|_| true, &mut |met| {
        let Met::Message(live) = met else { return Ok(()) };
        if !filter.wants_message(live) {
            return Ok(());
        }
        for recipient in live.recipients().filter(|it| it.is_pending && filter.wants_recipient(it.address)) {
            fit += 1;
            if fit <= filter.limit {
                listing.push(out, || view::row_json(live, &recipient), || view::row(live, &recipient))?;
            }
        }
        Ok(())
    })?;
    let shown = listing.end(out)?;
    if json {
        let rest = json!({ "logs": report.to_json(), "recipients": fit, "truncated": shown < fit });
        listing::write_rest(&rest, out)?;
    } else {
        if shown < fit {
            writeln!(out, "{shown} of {}; see --limit", count(fit, "recipient"))?;
        } else {
            writeln!(out, "{}", count(fit, "recipient"))?;
        }
        writeln!(out)?;
        report.to_table().write(out)?;
    }
    report.into_result(SHOW_WHERE)
}

fn cat(reading: &Reading, id: MessageId, envelope: bool, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let mut found = false;
    let report = reading.read(|log| log == id.log(), &mut |met| {
        let Met::Message(live) = met else { return Ok(()) };
        if live.id != id {
            return Ok(());
        }
        found = true;
        match (envelope, json) {
            (false, _) => {
                out.write_all(live.message.prefix())?;
                out.write_all(live.message.body())?;
            }
            (true, true) => writeln!(out, "{:#}", view::message_json(live))?,
            (true, false) => write_envelope(live, out)?,
        }
        Ok(())
    })?;
    if found {
        return Ok(());
    }
    // Damage may be the reason why it was not found.
    report.into_result(SHOW_WHERE)?;
    Err(Failure::NoSuchMessages(vec![id]))
}

fn write_envelope(live: &Live<'_>, out: &mut impl Write) -> Result<(), Failure> {
    write_pairs(out, "", &view::envelope_pairs(live))?;
    writeln!(out)?;
    let mut table = Table::new(&["RECIPIENT", "STATE", "ATTEMPTS", "DUE", "LAST ANSWER"]);
    for recipient in live.recipients() {
        table.push(view::recipient_row(&recipient));
    }
    table.write(out)?;
    Ok(())
}

fn verify(reading: &Reading, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let mut listing = Listing::begin(json, "regions", &["FILE", "OFFSET", "BYTES", "WHAT"]);
    let report = reading.read(|_| true, &mut |met| {
        let Met::Region(region) = met else { return Ok(()) };
        let cells = || {
            vec![
                Cell::text(&region.file.display().to_string()),
                Cell::number(region.offset),
                Cell::number(region.bytes),
                Cell::text(&region.what()),
            ]
        };
        listing.push(out, || region.to_json(), cells)?;
        Ok(())
    })?;
    let regions = listing.end(out)?;
    if json {
        let meta: Value = report.meta_error.clone().into();
        let rest = json!({ "logs": report.to_json(), "meta_error": meta, "damaged": report.damage().is_some() });
        listing::write_rest(&rest, out)?;
    } else {
        if regions > 0 {
            writeln!(out)?;
        }
        report.to_table().write(out)?;
        if report.damage().is_none() {
            let cuts: u64 = report.logs.iter().map(|log| log.cut).sum();
            let cut = if cuts == 0 { "" } else { "; what was cut was never acknowledged, and is no damage" };
            writeln!(out, "no damage in {}{cut}", count(report.logs.len() as u64, "log"))?;
        }
    }
    report.into_result(GOES_ON)
}

const SHOW_WHERE: &str = "`postctl spool verify` shows where.";
const GOES_ON: &str = "An engine that starts on it goes on with all the rest, and keeps damaged octets in kept/.";
