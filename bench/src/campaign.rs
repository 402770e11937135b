//! Campaigns through the embedding API: what a recipient costs to accept, in CPU and in spool, beside the body that all
//! share.
//!
//! The engine runs in this process, as it does in a program that embeds it. Its messages wait for a first attempt an
//! hour ahead, so that nothing but acceptance is measured: policy, signature, the record and its synced commit, the
//! entry in the schedule, the event. Each round sends the same campaign unsigned, signed with Ed25519 and signed with
//! RSA, each into a spool of its own; what a signature costs is the difference to the unsigned one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use postrider::{CampaignMessage, Config, Engine};
use postrider_spool::{Log, RecoverOptions, Recovered, Sequence, Spool};
use serde_json::{Value, json};

use crate::interrupt::Interrupt;
use crate::keys::{DkimKey, write_ed25519, write_rsa_2048};
use crate::measure::{Machine, Usage, filesystem_of};
use crate::peers::{Durability, SENDER_DOMAIN, disk_directory};
use crate::report::{Figures, note, table};

#[derive(Debug, Clone)]
pub struct CampaignOptions {
    /// Recipients of each campaign, a message each.
    pub recipients: usize,
    /// Octets of the body.
    pub body_bytes: usize,
    pub shards: Option<usize>,
    pub durability: Durability,
    pub rounds: usize,
    /// Where the spools are made; None: as for other measurements.
    pub spool_parent: Option<PathBuf>,
}

/// All rounds.
#[derive(Debug)]
pub struct CampaignReport {
    pub rounds: Vec<Figures>,
    pub setup: Value,
}

impl CampaignReport {
    pub fn to_json(&self) -> Value {
        json!({
            "setup": self.setup,
            "goals": { "accept_us": ACCEPT_GOAL_US, "spool_bytes": SPOOL_GOAL_BYTES },
            "medians": Figures::medians(&self.rounds).to_json(),
            "rounds": self.rounds.iter().map(Figures::to_json).collect::<Vec<_>>(),
        })
    }

    pub fn to_table(&self) -> String {
        format!(
            "{}\ngoals for a recipient: accept_us ≤ {ACCEPT_GOAL_US}, its signature apart; spool bytes ≤ \
             {SPOOL_GOAL_BYTES}, the body apart\n",
            table(&self.rounds)
        )
    }
}

/// How the messages are signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signing {
    Unsigned,
    Ed25519,
    Rsa,
}

/// What one campaign cost, a recipient.
#[derive(Debug, Clone, Copy)]
struct Cost {
    cpu_us: f64,
    per_second: f64,
    spool_bytes: f64,
    /// Octets of header fields, ours included.
    header_bytes: f64,
}

pub fn campaign(options: &CampaignOptions, interrupt: &Interrupt) -> Result<CampaignReport> {
    ensure!(options.recipients > 0, "at least one recipient is needed");
    ensure!(options.rounds > 0, "at least one round is needed");
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let mut figures = Figures::default();
        figures.push("recipients", "", options.recipients as f64);
        let unsigned = send(options, Signing::Unsigned)?;
        figures.push("accept_us", "µs", unsigned.cpu_us);
        figures.push("per_second", "recipients/s", unsigned.per_second);
        figures.push("header_bytes", "B", unsigned.header_bytes);
        figures.push("spool_bytes", "B", unsigned.spool_bytes);
        interrupt.check()?;
        let ed25519 = send(options, Signing::Ed25519)?;
        figures.push("ed25519_signature_us", "µs", ed25519.cpu_us - unsigned.cpu_us);
        figures.push("ed25519_per_second", "recipients/s", ed25519.per_second);
        figures.push("spool_ed25519_bytes", "B", ed25519.spool_bytes);
        interrupt.check()?;
        let fewer = CampaignOptions { recipients: options.recipients.div_ceil(RSA_SHARE), ..options.clone() };
        let rsa = send(&fewer, Signing::Rsa)?;
        figures.push("rsa_signature_us", "µs", rsa.cpu_us - unsigned.cpu_us);
        figures.push("rsa_per_second", "recipients/s", rsa.per_second);
        figures.push("spool_rsa_bytes", "B", rsa.spool_bytes);
        interrupt.check()?;
        rounds.push(figures);
        if options.rounds > 1 {
            note(&format!("round {number} of {} is done", options.rounds));
        }
    }
    let setup = json!({
        "machine": Machine::look(),
        "recipients": options.recipients,
        "body_bytes": options.body_bytes,
        "shards": options.shards,
        "durability": options.durability,
        "spool_filesystem": filesystem_of(&parent(options)?)?,
    });
    Ok(CampaignReport { rounds, setup })
}

/// Sends one campaign with an engine and a spool of its own.
fn send(options: &CampaignOptions, signing: Signing) -> Result<Cost> {
    let directory = tempfile::Builder::new().prefix("postbench-").tempdir_in(parent(options)?)?;
    let config = config(options, signing, directory.path())?;
    let spool = config.spool.path.clone();
    let engine = Engine::builder(config).start().map_err(|error| anyhow!("the engine does not start: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    // What the first messages pay for, and the zeroing of segments ahead, is the start's.
    let first = engine.campaign(content(options.body_bytes))?;
    runtime.block_on(first.inject(message(0)))?;
    std::thread::sleep(START_SETTLES);

    let messages: Vec<CampaignMessage> = (1..=options.recipients).map(message).collect();
    let content = content(options.body_bytes);
    let begun = Instant::now();
    let before = Usage::of(std::process::id())?;
    let campaign = engine.campaign(&content)?;
    let answers = runtime.block_on(campaign.inject_all(messages));
    let elapsed = begun.elapsed();
    if let Some(error) = answers.into_iter().find_map(Result::err) {
        bail!("a message was refused: {error}");
    }
    drop((first, campaign));
    // Their events belong to them.
    engine.shutdown().map_err(|error| anyhow!("the engine does not end: {error}"))?;
    let used = Usage::of(std::process::id())?.since(&before);
    let stored = stored(&spool)?;
    ensure!(stored.messages == options.recipients as u64 + 1, "the spool has {} messages", stored.messages);
    let recipients = options.recipients as f64;
    Ok(Cost {
        cpu_us: used.cpu().as_secs_f64() * 1e6 / recipients,
        per_second: recipients / elapsed.as_secs_f64().max(1e-9),
        spool_bytes: stored.bytes_beyond(content.len()) / stored.messages as f64,
        header_bytes: stored.header_bytes as f64 / stored.messages as f64,
    })
}

/// What a spool holds.
#[derive(Debug, Clone, Copy, Default)]
struct Stored {
    messages: u64,
    /// Of the records that count, bodies included.
    record_bytes: u64,
    header_bytes: u64,
}

impl Stored {
    /// Beyond the bodies of the two campaigns, each there once.
    fn bytes_beyond(&self, content: usize) -> f64 {
        self.record_bytes as f64 - 2.0 * content as f64
    }
}

fn stored(path: &Path) -> Result<Stored> {
    let inspection = Spool::inspect(path)?;
    let mut stored = Stored::default();
    for id in inspection.log_ids() {
        let options = RecoverOptions { seed: 0, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
        let log = Log::recover(inspection.log_directory(*id)?, options, &mut |recovered| {
            if let Recovered::Message { message, .. } = recovered {
                stored.messages += 1;
                stored.header_bytes += message.prefix().len() as u64;
            }
        })?;
        stored.record_bytes += log.statistics().live_bytes;
    }
    Ok(stored)
}

fn config(options: &CampaignOptions, signing: Signing, directory: &Path) -> Result<Config> {
    let key: Option<DkimKey> = match signing {
        Signing::Unsigned => None,
        Signing::Ed25519 => Some(write_ed25519(directory)?),
        Signing::Rsa => Some(write_rsa_2048(directory)?),
    };
    let durability = if options.durability == Durability::Fsync { "fsync" } else { "none" };
    let mut text = format!(
        "hostname = \"mta.{SENDER_DOMAIN}\"\n[spool]\ndurability = \"{durability}\"\nallow_filesystem = true\n"
    );
    if let Some(DkimKey { selector, path, .. }) = key {
        let path = path.display();
        text += &format!("[[dkim]]\ndomain = \"{SENDER_DOMAIN}\"\nselector = \"{selector}\"\nkey = \"{path}\"\n");
    }
    let mut config = Config::from_toml(&text, "campaign.toml", directory).map_err(|errors| anyhow!("{errors}"))?;
    config.spool.path = directory.join("spool");
    config.shards = options.shards;
    config.smtp_listeners.clear();
    config.http_listeners.clear();
    Ok(config)
}

/// What all messages share: the common header fields, and a body of printable lines.
fn content(body_bytes: usize) -> Vec<u8> {
    let first_attempt = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
    let mut content = format!(
        "From: News <news@{SENDER_DOMAIN}>\r\nDate: Sat, 28 Nov 2026 12:00:00 +0000\r\nSubject: What is new\r\n\
         MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\
         List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n\
         X-Schedule: {{\"first_attempt\":\"{first_attempt}\"}}\r\n\r\n"
    )
    .into_bytes();
    let lines = (0_u32..)
        .flat_map(|number| format!("{number:>10} The quick brown fox jumps over the lazy dog\r\n").into_bytes());
    content.extend(lines.take(body_bytes.saturating_sub(2)));
    content.extend_from_slice(b"\r\n");
    content
}

/// Its own To, Message-ID, List-Unsubscribe and return path.
fn message(number: usize) -> CampaignMessage {
    CampaignMessage {
        reverse_path: format!("bounce+{number:07}@{SENDER_DOMAIN}"),
        recipients: vec![format!("customer{number:07}@d{}.test", number % RECIPIENT_DOMAINS)],
        header: format!(
            "To: customer{number:07}@d{}.test\r\nMessage-ID: <{number:07}.campaign@{SENDER_DOMAIN}>\r\n\
             List-Unsubscribe: <https://{SENDER_DOMAIN}/unsubscribe/{number:07}>\r\n",
            number % RECIPIENT_DOMAINS
        )
        .into_bytes(),
        ..CampaignMessage::default()
    }
}

fn parent(options: &CampaignOptions) -> Result<PathBuf> {
    options.spool_parent.clone().map_or_else(disk_directory, Ok).context("no place for the spools")
}

/// One in so many recipients is enough where the signature takes thirty times what all the rest does.
const RSA_SHARE: usize = 10;
const RECIPIENT_DOMAINS: usize = 1_000;
const START_SETTLES: Duration = Duration::from_secs(2);
const ACCEPT_GOAL_US: u32 = 15;
const SPOOL_GOAL_BYTES: u32 = 600;
