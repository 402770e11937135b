//! The command line, and what each command asks and shows.
//!
//! Over 500 lines: each command stands with its options.

use std::collections::BTreeMap;
use std::io::Write;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::client::Client;
use crate::failure::Failure;
use crate::render::{Cell, Table, bytes, count, duration, printable, write_pairs};
use crate::row::{Message, Messages, Queue, Queues, Reloaded, Status, Suspended};
use crate::spool::{self, SpoolCommand};

/// Operates a running Postrider engine over its HTTP service, and reads a spool at rest
#[derive(Parser)]
#[command(name = "postctl", version, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// Where the engine's HTTP service is [default: $POSTRIDER_URL, else http://127.0.0.1:8025]
    #[arg(long, global = true, value_name = "URL")]
    url: Option<String>,
    /// The admin token, where the engine has admin_tokens [default: $POSTRIDER_TOKEN]
    #[arg(long, global = true, value_name = "TOKEN")]
    token: Option<String>,
    /// Prints JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Queues that hold mail
    #[command(subcommand)]
    Queue(QueueCommand),
    /// Messages that are not finished
    #[command(subcommand)]
    Message(MessageCommand),
    /// Says why a message has not gone yet, and when it will be tried
    Why {
        /// The id that the 250 reply named
        id: String,
    },
    /// The engine at a glance
    Status,
    /// Has the engine read its configuration anew, and take it up as a whole or not at all
    ///
    /// With errors everything is as before: they are printed as `postrider check` prints them, and the exit code is 2.
    Reload,
    /// A spool that no engine has open; it is only read
    #[command(subcommand)]
    Spool(SpoolCommand),
    /// Prints a completion script for a shell
    Completions { shell: clap_complete::Shell },
}

#[derive(Subcommand)]
enum QueueCommand {
    /// All of them
    List {
        /// At most so many
        #[arg(long)]
        limit: Option<u32>,
    },
    /// Everything about one
    Show {
        /// Its name, as `queue list` shows it
        queue: String,
    },
    /// What is suspended
    Suspended,
    /// Suspends mail for a while: a tenant's, a campaign's, to a domain; or a source, at a site or everywhere
    Suspend {
        #[command(flatten)]
        choice: QueueChoice,
        /// An egress source
        #[arg(long, conflicts_with_all = ["tenant", "campaign", "domain"])]
        source: Option<String>,
        /// A site's or a provider's name, as `queue list` shows it
        #[arg(long, requires = "source")]
        site: Option<String>,
        /// How long, as in "1h 30m" [default: 5m]
        #[arg(long = "for", value_name = "DURATION")]
        duration: Option<String>,
        /// Stands in `blocked by` of what waits
        #[arg(long)]
        reason: String,
    },
    /// Ends a suspension before its time
    Resume {
        /// As `queue suspended` shows it
        id: String,
    },
    /// Ends what is queued now, as AdminBounce: all that every given option fits
    Bounce {
        #[command(flatten)]
        choice: QueueChoice,
        /// Only what is held as in doubt
        #[arg(long)]
        held: bool,
        /// Stands in the events
        #[arg(long)]
        reason: String,
    },
    /// Tries again what is held as in doubt; it may arrive twice
    Release {
        #[command(flatten)]
        choice: QueueChoice,
        /// Stands in the events
        #[arg(long)]
        reason: String,
    },
}

#[derive(Args, Default)]
struct QueueChoice {
    #[arg(long)]
    tenant: Option<String>,
    #[arg(long)]
    campaign: Option<String>,
    /// The recipients' domain
    #[arg(long)]
    domain: Option<String>,
}

#[derive(Subcommand)]
enum MessageCommand {
    /// Where they are: attempts made, when due, what the peer last said
    Show {
        #[command(flatten)]
        choice: MessageChoice,
        /// At most so many rows
        #[arg(long, conflicts_with = "id")]
        limit: Option<u32>,
    },
    /// Prints one as it is sent; octets that are not UTF-8 are replaced
    Cat {
        /// The id that the 250 reply named
        id: String,
    },
    /// Ends one, as AdminBounce
    Bounce {
        /// The id that the 250 reply named
        id: String,
        /// Stands in the events
        #[arg(long)]
        reason: String,
    },
    /// Tries one again that is held as in doubt; it may arrive twice
    Release {
        /// The id that the 250 reply named
        id: String,
        /// Stands in the events
        #[arg(long)]
        reason: String,
    },
}

#[derive(Args)]
#[group(required = true, multiple = true)]
struct MessageChoice {
    /// The id that the 250 reply named
    #[arg(conflicts_with_all = ["recipient", "tenant", "message_id"])]
    id: Option<String>,
    /// All messages to this address
    #[arg(long)]
    recipient: Option<String>,
    /// All messages of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// All messages with this Message-ID field
    #[arg(long)]
    message_id: Option<String>,
}

pub(crate) fn execute(
    arguments: Arguments,
    environment: impl Fn(&str) -> Option<String>,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let Arguments { url, token, json, command } = arguments;
    let command = match command {
        Command::Completions { shell } => {
            // Its generator panics when it can't write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "postctl", &mut script);
            out.write_all(&script)?;
            return Ok(());
        }
        Command::Spool(command) => return spool::execute(command, json, out),
        command => command,
    };
    let url = url.or_else(|| environment("POSTRIDER_URL")).unwrap_or_else(|| DEFAULT_URL.into());
    let token = token.or_else(|| environment("POSTRIDER_TOKEN"));
    let session = Session { client: Client::new(&url, token)?, json };
    match command {
        Command::Queue(QueueCommand::List { limit }) => session.queue_list(limit, out),
        Command::Queue(QueueCommand::Show { queue }) => session.queue_show(&queue, out),
        Command::Queue(QueueCommand::Suspended) => session.suspended(out),
        Command::Queue(QueueCommand::Suspend { choice, source, site, duration, reason }) => {
            let (path, mut request) = match source {
                None => (SUSPEND, choice.narrow(json!({ "reason": reason }))),
                Some(source) => {
                    let name = format!("{source}->{}@smtp_client", site.as_deref().unwrap_or("*"));
                    (SUSPEND_READY, json!({ "name": name, "reason": reason }))
                }
            };
            if let Some(duration) = duration {
                request["duration"] = json!(duration);
            }
            session.suspend(path, &request, out)
        }
        Command::Queue(QueueCommand::Resume { id }) => session.resume(&id, out),
        Command::Queue(QueueCommand::Bounce { choice, held, reason }) => {
            session.bounce(json!({ "held": held, "reason": reason }), &choice, out)
        }
        Command::Queue(QueueCommand::Release { choice, reason }) => {
            session.release(json!({ "reason": reason }), &choice, out)
        }
        Command::Message(MessageCommand::Show { choice, limit }) => session.message_show(&choice, limit, out),
        Command::Message(MessageCommand::Cat { id }) => session.message_cat(&id, out),
        Command::Message(MessageCommand::Bounce { id, reason }) => {
            session.bounce(json!({ "message": id, "reason": reason }), &QueueChoice::default(), out)
        }
        Command::Message(MessageCommand::Release { id, reason }) => {
            session.release(json!({ "message": id, "reason": reason }), &QueueChoice::default(), out)
        }
        Command::Why { id } => session.why(&id, out),
        Command::Status => session.status(out),
        Command::Reload => session.reload(out),
        Command::Spool(_) | Command::Completions { .. } => unreachable!("answered above, without an engine"),
    }
}

struct Session {
    client: Client,
    json: bool,
}

impl Session {
    fn queue_list(&self, limit: Option<u32>, out: &mut impl Write) -> Result<(), Failure> {
        let limit = limit.map(|limit| limit.to_string());
        let query: Vec<_> = limit.iter().map(|limit| ("limit", limit.as_str())).collect();
        let answer = self.client.get(QUEUES, &query)?;
        if self.json {
            return write_json(&answer, out);
        }
        let answer: Queues = self.read(answer)?;
        if !answer.queues.is_empty() {
            let heads = ["QUEUE", "SITE", "SOURCE", "DEPTH", "READY", "RATE/S", "NEXT DUE", "LAST ANSWER"];
            let mut table = Table::new(&heads);
            for queue in &answer.queues {
                table.push(queue_row(queue));
            }
            table.write(out)?;
        }
        let queues = answer.queues.len() as u64;
        let shown: u64 = answer.queues.iter().map(|queue| queue.depth).sum();
        if shown < answer.total {
            writeln!(
                out,
                "{shown} of {} in {}; see --limit",
                count(answer.total, "recipient"),
                count(queues, "queue")
            )?;
        } else {
            writeln!(out, "{} in {}", count(answer.total, "recipient"), count(queues, "queue"))?;
        }
        Ok(())
    }

    fn reload(&self, out: &mut impl Write) -> Result<(), Failure> {
        let answer = self.client.post(RELOAD, &json!({})).map_err(Failure::of_reload)?;
        if self.json {
            return write_json(&answer, out);
        }
        let Reloaded { added, removed, changed, since } = self.read(answer)?;
        if added.is_empty() && removed.is_empty() && changed.is_empty() {
            writeln!(out, "nothing has changed; in force since {since}")?;
            return Ok(());
        }
        for (what, tables) in [("added", added), ("removed", removed), ("changed", changed)] {
            for table in tables {
                writeln!(out, "{what:<8} {}", printable(&table))?;
            }
        }
        writeln!(out, "in force since {since}")?;
        Ok(())
    }

    fn queue_show(&self, name: &str, out: &mut impl Write) -> Result<(), Failure> {
        let mut answer = self.client.get(QUEUES, &[])?;
        let rows = answer["queues"].as_array_mut().ok_or_else(|| self.client.strange())?;
        rows.retain(|row| row["queue"] == name);
        if rows.is_empty() {
            return Err(Failure::NoSuchQueue(printable(name)));
        }
        if self.json {
            let rows = std::mem::take(rows);
            return write_json(&serde_json::json!({ "queues": rows }), out);
        }
        let answer: Queues = self.read(answer)?;
        for (place, queue) in answer.queues.iter().enumerate() {
            if place > 0 {
                writeln!(out)?;
            }
            write_pairs(out, "", &queue_pairs(queue))?;
        }
        Ok(())
    }

    fn message_show(&self, choice: &MessageChoice, limit: Option<u32>, out: &mut impl Write) -> Result<(), Failure> {
        let limit = limit.map(|limit| limit.to_string());
        let query = [
            ("recipient", choice.recipient.as_deref()),
            ("tenant", choice.tenant.as_deref()),
            ("message_id", choice.message_id.as_deref()),
            ("limit", limit.as_deref()),
        ];
        let query: Vec<_> = query.iter().filter_map(|(name, value)| Some((*name, (*value)?))).collect();
        let answer = match &choice.id {
            Some(id) => self.client.get(&message_path(id), &[])?,
            None => self.client.get(MESSAGES, &query)?,
        };
        if self.json {
            return write_json(&answer, out);
        }
        let answer: Messages = self.read(answer)?;
        if answer.messages.is_empty() {
            writeln!(out, "no message in the spool fits")?;
            return Ok(());
        }
        let mut table =
            Table::new(&["ID", "RECIPIENT", "QUEUE", "STATE", "ATTEMPTS", "DUE", "BLOCKED BY", "LAST ANSWER"]);
        for message in &answer.messages {
            table.push(message_row(message));
        }
        table.write(out)?;
        if answer.truncated {
            writeln!(out, "there are more; see --limit")?;
        }
        Ok(())
    }

    fn message_cat(&self, id: &str, out: &mut impl Write) -> Result<(), Failure> {
        let answer = self.client.get(INSPECT, &[("id", id), ("want_body", "true")])?;
        if self.json {
            return write_json(&answer, out);
        }
        let data = answer["message"]["data"].as_str().ok_or_else(|| self.client.strange())?;
        out.write_all(data.as_bytes())?;
        Ok(())
    }

    /// Sources at sites, and whose mail; the two calls list different ones.
    fn suspended(&self, out: &mut impl Write) -> Result<(), Failure> {
        let (ready, whose) = (self.client.get(SUSPEND_READY, &[])?, self.client.get(SUSPEND, &[])?);
        if self.json {
            return write_json(&json!({ "ready_queues": ready, "mail": whose }), out);
        }
        let (ready, whose): (Vec<Suspended>, Vec<Suspended>) = (self.read(ready)?, self.read(whose)?);
        if ready.is_empty() && whose.is_empty() {
            writeln!(out, "nothing is suspended")?;
            return Ok(());
        }
        let mut table = Table::new(&["ID", "WHAT", "LEFT", "REASON"]);
        for row in ready.iter().chain(&whose) {
            table.push(vec![
                Cell::text(&row.id),
                Cell::text(&row.what()),
                Cell::text(&row.duration),
                Cell::text(&row.reason),
            ]);
        }
        table.write(out)?;
        Ok(())
    }

    fn suspend(&self, path: &str, request: &Value, out: &mut impl Write) -> Result<(), Failure> {
        let answer = self.client.post(path, request)?;
        self.show_id(answer, "suspended", out)
    }

    fn resume(&self, id: &str, out: &mut impl Write) -> Result<(), Failure> {
        let answer = self.client.delete(SUSPEND, &json!({ "id": id }))?;
        self.show_id(answer, "ended", out)
    }

    fn show_id(&self, answer: Value, what: &str, out: &mut impl Write) -> Result<(), Failure> {
        if self.json {
            return write_json(&answer, out);
        }
        let id = answer["id"].as_str().ok_or_else(|| self.client.strange())?;
        writeln!(out, "{what}: {}", printable(id))?;
        if let Some(warning) = answer["warning"].as_str() {
            writeln!(out, "warning: {}", printable(warning))?;
        }
        Ok(())
    }

    fn bounce(&self, request: Value, choice: &QueueChoice, out: &mut impl Write) -> Result<(), Failure> {
        let answer = self.client.post(BOUNCE, &choice.narrow(request))?;
        self.show_chosen(answer, "bounced", "chosen; what is on the wire ends only if it comes back undelivered", out)
    }

    fn release(&self, request: Value, choice: &QueueChoice, out: &mut impl Write) -> Result<(), Failure> {
        let answer = self.client.post(RELEASE, &choice.narrow(request))?;
        self.show_chosen(answer, "released", "tried again", out)
    }

    /// Recipients by queue, and in all.
    fn show_chosen(&self, answer: Value, key: &str, what: &str, out: &mut impl Write) -> Result<(), Failure> {
        if self.json {
            return write_json(&answer, out);
        }
        let chosen: BTreeMap<String, u64> = self.read(answer[key].clone())?;
        if !chosen.is_empty() {
            let mut table = Table::new(&["QUEUE", "RECIPIENTS"]);
            for (queue, recipients) in &chosen {
                table.push(vec![Cell::text(queue), Cell::number(recipients)]);
            }
            table.write(out)?;
        }
        writeln!(out, "{} {what}", count(chosen.values().sum(), "recipient"))?;
        Ok(())
    }

    fn why(&self, id: &str, out: &mut impl Write) -> Result<(), Failure> {
        let answer = self.client.get(&message_path(id), &[])?;
        if self.json {
            return write_json(&answer, out);
        }
        let answer: Messages = self.read(answer)?;
        for (place, message) in answer.messages.iter().enumerate() {
            if place > 0 {
                writeln!(out)?;
            }
            writeln!(out, "{} to {}", printable(&message.id), printable(&message.recipient))?;
            write_pairs(out, "  ", &reasons(message))?;
        }
        Ok(())
    }

    fn status(&self, out: &mut impl Write) -> Result<(), Failure> {
        let answer = self.client.get(STATUS, &[])?;
        if self.json {
            return write_json(&answer, out);
        }
        let status: Status = self.read(answer)?;
        write_pairs(out, "", &status_pairs(&status))?;
        Ok(())
    }

    fn read<T: DeserializeOwned>(&self, answer: Value) -> Result<T, Failure> {
        serde_json::from_value(answer).map_err(|_| self.client.strange())
    }
}

impl QueueChoice {
    fn narrow(&self, mut request: Value) -> Value {
        let parts = [("tenant", &self.tenant), ("campaign", &self.campaign), ("domain", &self.domain)];
        for (name, part) in parts {
            if let Some(part) = part {
                request[name] = json!(part);
            }
        }
        request
    }
}

fn queue_row(queue: &Queue) -> Vec<Cell> {
    vec![
        Cell::text(&queue.queue),
        Cell::maybe(queue.site.as_deref()),
        Cell::maybe(queue.egress_source.as_deref()),
        Cell::number(queue.depth),
        Cell::number(queue.ready),
        Cell::number(format_args!("{:.1}", queue.rate_per_s)),
        Cell::maybe(queue.next_due.as_deref()),
        Cell::maybe(queue.last_answer.as_deref()),
    ]
}

fn queue_pairs(queue: &Queue) -> Vec<(&'static str, String)> {
    let maybe = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    vec![
        ("queue", queue.queue.clone()),
        ("domain", queue.domain.clone()),
        ("tenant", maybe(&queue.tenant)),
        ("campaign", maybe(&queue.campaign)),
        ("site", maybe(&queue.site)),
        ("egress source", maybe(&queue.egress_source)),
        ("depth", format!("{}, {} ready", count(queue.depth, "recipient"), queue.ready)),
        ("rate", format!("{:.1}/s", queue.rate_per_s)),
        ("next due", maybe(&queue.next_due)),
        ("last answer", maybe(&queue.last_answer)),
    ]
}

fn message_row(message: &Message) -> Vec<Cell> {
    vec![
        Cell::text(&message.id),
        Cell::text(&message.recipient),
        Cell::text(&message.queue),
        Cell::text(&message.state),
        Cell::number(message.num_attempts),
        Cell::maybe(message.due.as_deref()),
        Cell::maybe(message.blocked_by.as_deref()),
        Cell::maybe(message.last_answer.as_deref()),
    ]
}

/// In the order in which one asks: what now, why, when, what was, until when.
fn reasons(message: &Message) -> Vec<(&'static str, String)> {
    let now = match message.state.as_str() {
        "scheduled" => "waits for its due time".into(),
        "ready" => "is due and waits for a connection".into(),
        "delivering" => "is being tried right now".into(),
        "held" => "is held, and not sent again by itself".into(),
        other => other.to_owned(),
    };
    let attempts = count(message.num_attempts.into(), "attempt");
    let mut pairs = vec![("now", format!("{now}, after {attempts}"))];
    let optional = [
        ("blocked by", &message.blocked_by),
        ("due", &message.due),
        ("last answer", &message.last_answer),
        ("accepted", &message.created),
        ("given up", &message.expires),
    ];
    pairs.extend(optional.into_iter().filter_map(|(name, text)| Some((name, text.clone()?))));
    pairs.push(("queue", message.queue.clone()));
    let sender = if message.sender.is_empty() { "<> (the null reverse path)" } else { &message.sender };
    pairs.push(("sender", sender.to_owned()));
    pairs
}

fn status_pairs(status: &Status) -> Vec<(&'static str, String)> {
    let ready = match (&status.ready, &status.reason) {
        (true, _) => "yes".into(),
        (false, Some(reason)) => format!("no: {reason}"),
        (false, None) => "no".into(),
    };
    let listeners: Vec<_> = status.listeners.iter().map(|at| format!("{} {}", at.protocol, at.address)).collect();
    let spool = &status.spool;
    let used = format!("{} of {} used", bytes(spool.used_bytes), bytes(spool.max_bytes));
    let closed = spool.closed_reason.as_ref().map_or(String::new(), |reason| format!("; closed: {reason}"));
    let blocked = status.events.blocked.as_ref().map_or(String::new(), |reason| format!("; blocked: {reason}"));
    vec![
        ("ready", ready),
        (
            "engine",
            format!("postrider {} on {}, {}", status.version, status.hostname, count(status.shards.into(), "shard")),
        ),
        ("node", status.node_id.clone()),
        ("running", format!("{}, since {}", duration(status.uptime_s), status.started)),
        ("listeners", listeners.join(", ")),
        ("spool", format!("{} ({}), {used}{closed}", spool.path, spool.durability)),
        ("events", format!("{}{blocked}", status.events.path)),
        ("queued", format!("{} in {}", count(status.recipients, "recipient"), count(status.messages, "message"))),
        ("connections", format!("{} in, {} out", status.connections_in, status.connections_out)),
        ("received", count(status.received, "message")),
        ("outcomes", format!("{} delivered, {} deferred, {} failed", status.delivered, status.deferred, status.failed)),
    ]
}

fn write_json(answer: &Value, out: &mut impl Write) -> Result<(), Failure> {
    writeln!(out, "{answer:#}")?;
    Ok(())
}

/// An id is 16 hexadecimal digits; whatever else was given must not become another call.
fn message_path(id: &str) -> String {
    let mut path = format!("{MESSAGES}/");
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("%{byte:02X}"));
        }
    }
    path
}

const DEFAULT_URL: &str = "http://127.0.0.1:8025";
const QUEUES: &str = "/api/admin/queues/v1";
const MESSAGES: &str = "/api/admin/messages/v1";
const STATUS: &str = "/api/admin/status/v1";
const INSPECT: &str = "/api/admin/inspect-message/v1";
const SUSPEND: &str = "/api/admin/suspend/v1";
const SUSPEND_READY: &str = "/api/admin/suspend-ready-q/v1";
const BOUNCE: &str = "/api/admin/bounce/v1";
const RELEASE: &str = "/api/admin/release/v1";
const RELOAD: &str = "/api/admin/reload/v1";
