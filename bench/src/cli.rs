//! The command line, turned into the options of each part.
//!
//! Over 500 lines, because options that commands share are told once, and all commands stand beside them.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use postrider_bench::campaign::CampaignOptions;
use postrider_bench::compare::{CompareOptions, Mta};
use postrider_bench::deliver::{Chunking, DeliverOptions, Server};
use postrider_bench::growth::{Axis, GrowthOptions};
use postrider_bench::inject::InjectOptions;
use postrider_bench::kill::KillOptions;
use postrider_bench::memory::MemoryOptions;
use postrider_bench::message::Sizes;
use postrider_bench::peers::{Dkim, Durability, EngineOptions, OutboundTls, SENDER_DOMAIN};
use postrider_bench::relay::{RelayOptions, is_single};
use postrider_bench::restart::RestartOptions;
use postrider_bench::sign::SignOptions;
use postrider_bench::sink::SinkOptions;
use postrider_bench::sink::dkim::DkimCheck;
use postrider_bench::sink::faults::{FaultPlan, Stage};
use postrider_bench::sink::tls::TlsIdentity;
use postrider_bench::sites::SitesOptions;
use postrider_bench::splice::SpliceOptions;
use postrider_bench::spool::{Part, SpoolOptions};
use postrider_bench::units::{parse_bytes, parse_duration};

/// Load generator, sink and measurements for mail systems.
///
/// Exit codes: 0 done; 1 runtime failure, or a promise was broken (messages lost or doubled); 2 usage error.
#[derive(Debug, Parser)]
#[command(name = "postbench", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Accept mail, count it, look for duplicates; JSON at the end (SIGTERM, SIGINT or --expect).
    Sink(SinkArgs),
    /// Send mail in a closed loop or at a rate; remember every acknowledged message.
    Inject(InjectArgs),
    /// Measure an engine between injector and sink.
    Relay(PlottedRelayArgs),
    /// Be a relay without a spool, which answers when the sink has: `relay --engine postbench` gives the floor.
    Serve(ServeArgs),
    /// kill -9 an engine under load, again and again; then hold the acknowledged messages against the delivered ones.
    Kill(KillArgs),
    /// Measure the spool alone, each figure beside its bare counterpart.
    Spool(SpoolArgs),
    /// Measure an engine's delivering half over a long way, beside a bare loop over the same.
    Wan(WanArgs),
    /// Measure what a delivery costs an engine, beside bare loops with one and two round trips.
    Client(ClientArgs),
    /// Relay the same load through the engine and other mail systems, in turns.
    Compare(CompareArgs),
    /// Measure what signatures and outbound TLS cost an engine, beside bare signatures and handshakes.
    Sign(SignArgs),
    /// kill -9 an engine with a full spool and start it again: how soon does mail move, and is all still there?
    Restart(RestartArgs),
    /// Measure what a long queue takes in memory, and from the mail that passes and drains.
    Memory(MemoryArgs),
    /// Measure many sites with a queue each, beside the same mail for one site.
    Sites(SitesArgs),
    /// Relay large messages, beside a bare splice of two sockets and synced writes of the same octets.
    Splice(SpliceArgs),
    /// Measure CPU time a message against queue, connections, sites, message size and shards.
    Growth(GrowthArgs),
    /// Measure what a campaign's recipient costs to accept through the embedding API, in CPU and in spool.
    Campaign(CampaignArgs),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct SinkArgs {
    /// Where to listen; may be given several times. Port 0 is allowed.
    #[arg(long, default_value = "127.0.0.1:2526")]
    listen: Vec<SocketAddr>,
    /// Threads, all accepting on all addresses.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Refuse in place of the greeting, e.g. "421 4.3.2 later". A 421 closes the connection.
    #[arg(long, value_name = "REPLY")]
    reply_greeting: Vec<String>,
    #[arg(long, value_name = "REPLY")]
    reply_ehlo: Vec<String>,
    #[arg(long, value_name = "REPLY")]
    reply_mail: Vec<String>,
    /// Refuse recipients, e.g. "451 4.2.1 busy"; a mix: "5%:451 4.2.1 busy", and again "1%:550 5.1.1 nobody".
    #[arg(long, value_name = "REPLY")]
    reply_rcpt: Vec<String>,
    #[arg(long, value_name = "REPLY")]
    reply_data: Vec<String>,
    /// Refuse after the content.
    #[arg(long, value_name = "REPLY")]
    reply_dot: Vec<String>,
    /// Put off each new (peer, sender, recipient) with 450 until it has been known for so long.
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    greylist: Option<Duration>,
    /// Offer STARTTLS, with a certificate made for the run.
    #[arg(long)]
    tls: bool,
    /// A DKIM key to verify signatures with: SELECTOR._domainkey.DOMAIN=RECORD. May be given several times.
    #[arg(long, value_name = "NAME=RECORD")]
    dkim_record: Vec<String>,
    /// Verify so many of the messages. A signature that is wrong or missing makes the exit code 1.
    #[arg(long, default_value_t = 1.0, value_name = "PERCENT", requires = "dkim_record")]
    dkim_sample: f64,
    /// Of the chances to refuse, take so many, where the reply does not say how many.
    #[arg(long, default_value_t = 100.0, value_name = "PERCENT")]
    fail_percent: f64,
    /// Refuse only so long after the start. SIGUSR1 switches refusing off and on at any time.
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    fail_until: Option<Duration>,
    /// Wait so long before each group of replies.
    #[arg(long, value_parser = parse_duration, default_value = "0s", value_name = "DURATION")]
    delay: Duration,
    /// Write each message to DIR: 00000001.eml as sent, 00000001.json with its envelope.
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    /// Look for duplicates by X-Bench-Id, else by Message-ID and recipient.
    #[arg(long, value_enum, default_value = "on", default_missing_value = "on", num_args = 0..=1)]
    audit: Switch,
    /// End after so many different messages.
    #[arg(long, value_name = "MESSAGES")]
    pub(crate) expect: Option<u64>,
    /// After the last expected message wait at most so long for the peers to close their connections.
    #[arg(long, value_parser = parse_duration, default_value = "1s", value_name = "DURATION")]
    pub(crate) linger: Duration,
    /// No line per second on standard error.
    #[arg(long)]
    pub(crate) quiet: bool,
}

impl SinkArgs {
    pub(crate) fn options(&self) -> Result<SinkOptions> {
        let given = [
            (Stage::Greeting, &self.reply_greeting),
            (Stage::Ehlo, &self.reply_ehlo),
            (Stage::Mail, &self.reply_mail),
            (Stage::Rcpt, &self.reply_rcpt),
            (Stage::Data, &self.reply_data),
            (Stage::Dot, &self.reply_dot),
        ];
        let replies: Vec<(Stage, String)> = given
            .into_iter()
            .flat_map(|(stage, replies)| replies.iter().map(move |reply| (stage, reply.clone())))
            .collect();
        let mut faults = FaultPlan::new(&replies, self.fail_percent, self.fail_until, Instant::now())?;
        if let Some(lasting) = self.greylist {
            faults = faults.greylist(lasting);
        }
        let dkim = if self.dkim_record.is_empty() { None } else { Some(Arc::new(DkimCheck::start(self.dkim_sample)?)) };
        for (dkim, text) in dkim.iter().flat_map(|dkim| self.dkim_record.iter().map(move |text| (dkim, text))) {
            let (name, record) = text.split_once('=').with_context(|| format!("{text:?}: write NAME=RECORD"))?;
            dkim.publish(name.trim(), record.trim())?;
        }
        Ok(SinkOptions {
            listen: self.listen.clone(),
            loopback_device: false,
            threads: self.threads,
            faults: Arc::new(faults),
            delay: self.delay,
            dump: self.dump.clone(),
            audit: self.audit == Switch::On,
            tls: if self.tls { Some(TlsIdentity::generate(true)?) } else { None },
            dkim,
            chunking: true,
            closed: false,
        })
    }
}

/// The load, for all commands that send.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Connections at a time.
    #[arg(long, default_value_t = 20)]
    sessions: usize,
    /// Octets of a message: 2k, which is usual, or sizes with weights: 1k:70,4k:25,100k:5.
    #[arg(long)]
    size: Option<Sizes>,
    /// Open loop: messages a second, over all sessions.
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// MAIL, RCPT and DATA in one write, where the server offers PIPELINING; off: each waits for its answer, as with
    /// smtp-source.
    #[arg(long, value_enum, default_value = "on", default_missing_value = "on", num_args = 0..=1)]
    pipelined: Switch,
    /// As smtp-source does without -d.
    #[arg(long)]
    one_connection_per_message: bool,
    /// Recipient domains, drawn by Zipf's law: d000000.bench.test and so on.
    #[arg(long, default_value_t = 1)]
    domains: usize,
    /// Tenants, drawn likewise, each with a sender domain of its own: t000000.sender.test and so on.
    #[arg(long, default_value_t = 1)]
    tenants: usize,
    /// Of Zipf's law: 0 draws domains and tenants evenly.
    #[arg(long, default_value_t = 1.0, value_name = "EXPONENT")]
    zipf: f64,
    /// Every third body line begins with a dot.
    #[arg(long)]
    dotted: bool,
    #[arg(long, default_value_t = 1)]
    injector_threads: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl LoadArgs {
    fn options(&self, to: SocketAddr) -> InjectOptions {
        InjectOptions {
            sender: format!("bench@{SENDER_DOMAIN}"),
            domains: self.domains,
            tenants: self.tenants,
            domain_exponent: self.zipf,
            sizes: self.size.clone().unwrap_or(Sizes::fixed(SIZE_USUAL)),
            dotted: self.dotted,
            sessions: self.sessions,
            rate: self.rate,
            pipelined: self.pipelined == Switch::On,
            one_connection_per_message: self.one_connection_per_message,
            threads: self.injector_threads,
            seed: self.seed,
            ..InjectOptions::to(to)
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct InjectArgs {
    /// The server.
    #[arg(default_value = "127.0.0.1:2525")]
    to: SocketAddr,
    #[command(flatten)]
    load: LoadArgs,
    #[arg(long, default_value_t = 10_000)]
    messages: u64,
    /// Envelope sender and From.
    #[arg(long)]
    from: Option<String>,
    #[arg(long, default_value = "bench.test")]
    recipient_domain: String,
    /// Go on after refusals and lost connections until all messages were accepted.
    #[arg(long)]
    persist: bool,
    /// Append the id of each acknowledged message.
    #[arg(long, value_name = "FILE")]
    ack_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl InjectArgs {
    /// Whether refusals on the way don't make the run a failure.
    pub(crate) fn persists(&self) -> bool {
        self.persist
    }

    pub(crate) fn options(&self) -> InjectOptions {
        let load = self.load.options(self.to);
        InjectOptions {
            messages: Some(self.messages),
            sender: self.from.clone().unwrap_or(load.sender),
            recipient_domain: self.recipient_domain.clone(),
            persist: self.persist,
            ack_file: self.ack_file.clone(),
            ..load
        }
    }
}

/// How results are given.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// JSON on standard output (the table then goes to standard error); with a value, into that file.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub(crate) json: Option<PathBuf>,
}

/// The engine under test.
#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// Default: postrider beside postbench.
    #[arg(long)]
    engine: Option<PathBuf>,
    #[arg(long)]
    shards: Option<usize>,
    #[arg(long, value_enum, default_value = "fsync")]
    durability: Durability,
    /// Sign with keys made for the run.
    #[arg(long, value_enum, default_value = "none")]
    dkim: Dkim,
    /// Where the temporary spool is made; default: the system's temporary directory, if on disk.
    #[arg(long, value_name = "DIR")]
    spool_dir: Option<PathBuf>,
    /// TOML to put at the end of the engine's configuration.
    #[arg(long, value_name = "FILE")]
    config_extra: Option<PathBuf>,
    /// Leave configuration, spool and log behind.
    #[arg(long)]
    keep: bool,
    /// More arguments for `postrider serve`.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

impl EngineArgs {
    fn options(&self) -> Result<EngineOptions> {
        let config_extra = match &self.config_extra {
            Some(path) => std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
            None => String::new(),
        };
        let program = match &self.engine {
            Some(program) => program.clone(),
            None => std::env::current_exe()?.with_file_name("postrider"),
        };
        Ok(EngineOptions {
            program,
            arguments: self.arguments.clone(),
            shards: self.shards,
            durability: self.durability,
            dkim: self.dkim,
            tenants: 1,
            tls: None,
            spool_parent: self.spool_dir.clone(),
            config_extra,
            keep: self.keep,
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The engine's configuration; only its listeners and its first route are heeded.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct RelayArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    load: LoadArgs,
    /// Counted messages of a round.
    #[arg(long, default_value_t = 20_000)]
    messages: u64,
    /// Messages before the counted ones.
    #[arg(long, default_value_t = 1_000)]
    warmup: u64,
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Recipient domains with a site each, drawn evenly.
    #[arg(long, conflicts_with = "domains")]
    sites: Option<usize>,
    /// Count system calls, ring operations and syncs; it takes the right to use the kernel's tracepoints.
    #[arg(long, value_enum, default_value = "on", default_missing_value = "on", num_args = 0..=1)]
    count_calls: Switch,
    /// `smtp-source:PATH` to inject with Postfix's tool.
    #[arg(long, value_name = "TOOL:PATH")]
    injector: Option<String>,
    /// `smtp-sink:PATH` to receive with Postfix's tool.
    #[arg(long, value_name = "TOOL:PATH")]
    sink: Option<String>,
    /// Wait so long before each group of the sink's replies.
    #[arg(long, value_parser = parse_duration, default_value = "0s", value_name = "DURATION")]
    sink_delay: Duration,
    #[arg(long, default_value_t = 1)]
    sink_threads: usize,
    /// Deliver by TLS: the sink offers STARTTLS, and the engine has to use it.
    #[arg(long)]
    tls: bool,
    /// Verify the signatures of so many messages, where the engine signs and the sink is ours.
    #[arg(long, default_value_t = 1.0, value_name = "PERCENT")]
    verify: f64,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// `relay` itself, not what is made of it.
#[derive(Debug, Args)]
pub(crate) struct PlottedRelayArgs {
    #[command(flatten)]
    pub(crate) relay: RelayArgs,
    /// Write charts of rate and latencies as SVG.
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
}

impl RelayArgs {
    pub(crate) fn options(&self) -> Result<RelayOptions> {
        self.options_with_sites(1)
    }

    /// With so many sites, where the command line doesn't say.
    fn options_with_sites(&self, sites: usize) -> Result<RelayOptions> {
        let sites = self.sites.unwrap_or(sites);
        let mut inject = self.load.options(NOWHERE);
        if sites > 1 {
            (inject.domains, inject.domain_exponent) = (sites, 0.0);
        }
        let smtp_source = self.injector.as_deref().map(|tool| tool_path(tool, "smtp-source")).transpose()?;
        ensure!(smtp_source.is_none() || is_single(&inject.sizes), "smtp-source sends one size only");
        Ok(RelayOptions {
            engine: EngineOptions {
                tenants: self.load.tenants,
                tls: self.tls.then_some(OutboundTls::Required),
                ..self.engine.options()?
            },
            inject,
            messages: self.messages,
            warmup: self.warmup,
            rounds: self.rounds,
            sites,
            count_calls: self.count_calls == Switch::On,
            smtp_source,
            smtp_sink: self.sink.as_deref().map(|tool| tool_path(tool, "smtp-sink")).transpose()?,
            sink_delay: self.sink_delay,
            sink_threads: self.sink_threads,
            tls_resumption: true,
            verify_percent: self.verify,
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    relay: RelayArgs,
    /// Default: postrider, and of the others those whose programs are found.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SYSTEMS")]
    systems: Vec<SystemName>,
    /// A tree of unpacked packages with usr/sbin/postfix, to run it in by chroot; default: the system's own.
    #[arg(long, value_name = "DIR")]
    postfix_root: Option<PathBuf>,
    /// A tree of unpacked packages with usr/sbin/exim4; default: what .ci/run made.
    #[arg(long, value_name = "DIR")]
    exim_root: Option<PathBuf>,
    /// A tree of unpacked packages with usr/sbin/smtpd; default: what .ci/run made.
    #[arg(long, value_name = "DIR")]
    opensmtpd_root: Option<PathBuf>,
    /// KumoMTA's kumod.
    #[arg(long, value_name = "PATH")]
    kumomta: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lowercase")]
enum SystemName {
    Postrider,
    Postfix,
    Exim,
    OpenSmtpd,
    KumoMta,
}

impl CompareArgs {
    pub(crate) fn output(&self) -> &OutputArgs {
        &self.relay.output
    }

    pub(crate) fn options(&self) -> Result<CompareOptions> {
        let relay = self.relay.options()?;
        ensure!(relay.engine.tls.is_none() && relay.engine.dkim == Dkim::None, "the others neither sign nor encrypt");
        let own_postfix = || Path::new("/usr/sbin/postfix").is_file().then_some(None);
        let found = [
            (SystemName::Postfix, self.postfix_root.clone().map(Some).or_else(own_postfix).map(Mta::Postfix)),
            (SystemName::Exim, tree(self.exim_root.as_ref(), "usr/sbin/exim4")?.map(Mta::Exim)),
            (SystemName::OpenSmtpd, tree(self.opensmtpd_root.as_ref(), "usr/sbin/smtpd")?.map(Mta::OpenSmtpd)),
            (SystemName::KumoMta, self.kumomta.clone().map(Mta::KumoMta)),
        ];
        let mut rivals = Vec::new();
        for (name, mta) in found {
            let asked = self.systems.contains(&name);
            ensure!(mta.is_some() || !asked, "{name:?} was not found; README.md says how to get it");
            rivals.extend(mta.filter(|_| asked || self.systems.is_empty()));
        }
        let without_engine = !self.systems.is_empty() && !self.systems.contains(&SystemName::Postrider);
        Ok(CompareOptions { relay, rivals, without_engine })
    }
}

#[derive(Debug, Args)]
pub(crate) struct SignArgs {
    #[command(flatten)]
    relay: RelayArgs,
    /// Relays that open a connection for each message, to find what a handshake costs; 0: none.
    #[arg(long, default_value_t = 3_000, value_name = "MESSAGES")]
    handshakes: u64,
    /// How long each bare signature and handshake is repeated.
    #[arg(long, value_parser = parse_duration, default_value = "500ms", value_name = "DURATION")]
    bare: Duration,
}

impl SignArgs {
    pub(crate) fn output(&self) -> &OutputArgs {
        &self.relay.output
    }

    pub(crate) fn options(&self) -> Result<SignOptions> {
        let given = &self.relay;
        ensure!(!given.tls && given.engine.dkim == Dkim::None, "sign takes all kinds by itself: no --tls, no --dkim");
        let relay = given.options()?;
        Ok(SignOptions { rounds: relay.rounds, relay, handshakes: self.handshakes, bare: self.bare })
    }
}

#[derive(Debug, Args)]
pub(crate) struct MemoryArgs {
    /// Its --sites are 1,000 where not given.
    #[command(flatten)]
    relay: RelayArgs,
    /// Messages that wait.
    #[arg(long, default_value_t = 1_000_000, value_name = "MESSAGES")]
    queued: u64,
}

impl MemoryArgs {
    pub(crate) fn output(&self) -> &OutputArgs {
        &self.relay.output
    }

    pub(crate) fn options(&self) -> Result<MemoryOptions> {
        Ok(MemoryOptions { relay: self.relay.options_with_sites(1_000)?, queued: self.queued })
    }
}

#[derive(Debug, Args)]
pub(crate) struct SitesArgs {
    /// Its --sites are 100,000 where not given; --messages does not count.
    #[command(flatten)]
    relay: RelayArgs,
    #[arg(long, default_value_t = 5, value_name = "MESSAGES")]
    messages_per_site: u64,
    /// The engine's connection_limit for the many sites; default: the engine's own.
    #[arg(long, value_name = "CONNECTIONS")]
    connections_per_site: Option<u32>,
}

impl SitesArgs {
    pub(crate) fn output(&self) -> &OutputArgs {
        &self.relay.output
    }

    pub(crate) fn options(&self) -> Result<SitesOptions> {
        let relay = self.relay.options_with_sites(100_000)?;
        let connections_per_site = self.connections_per_site;
        Ok(SitesOptions { relay, messages_per_site: self.messages_per_site, connections_per_site })
    }
}

#[derive(Debug, Args)]
pub(crate) struct SpliceArgs {
    /// Its --size is 100k where not given.
    #[command(flatten)]
    relay: RelayArgs,
}

impl SpliceArgs {
    pub(crate) fn output(&self) -> &OutputArgs {
        &self.relay.output
    }

    pub(crate) fn options(&self) -> Result<SpliceOptions> {
        let mut relay = self.relay.options()?;
        if self.relay.load.size.is_none() {
            relay.inject.sizes = Sizes::fixed(SIZE_LARGE);
        }
        Ok(SpliceOptions { relay })
    }
}

#[derive(Debug, Args)]
pub(crate) struct GrowthArgs {
    #[command(flatten)]
    relay: RelayArgs,
    /// What shall grow; default: each in turn.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT")]
    only: Vec<Axis>,
    /// Points up to this one alone.
    #[arg(long, value_name = "POINT")]
    up_to: Option<usize>,
    /// Write charts as SVG.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

impl GrowthArgs {
    pub(crate) fn output(&self) -> &OutputArgs {
        &self.relay.output
    }

    pub(crate) fn options(&self) -> Result<GrowthOptions> {
        let axes = if self.only.is_empty() { Axis::value_variants() } else { &self.only };
        let points = |axis: &Axis| {
            let most = self.up_to.unwrap_or(usize::MAX);
            (*axis, axis.usual_points().into_iter().filter(|point| *point <= most).collect())
        };
        let axes: Vec<(Axis, Vec<usize>)> = axes.iter().map(points).collect();
        Ok(GrowthOptions { relay: self.relay.options()?, axes, plot: self.plot.clone() })
    }
}

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    load: LoadArgs,
    #[arg(long, default_value_t = 5)]
    kills: u32,
    /// The engine runs at least so long before it is killed …
    #[arg(long, value_parser = parse_duration, default_value = "300ms", value_name = "DURATION")]
    run_min: Duration,
    /// … and at most so long.
    #[arg(long, value_parser = parse_duration, default_value = "1500ms", value_name = "DURATION")]
    run_max: Duration,
    /// Wait so long before each group of the sink's replies.
    #[arg(long, value_parser = parse_duration, default_value = "0s", value_name = "DURATION")]
    sink_delay: Duration,
    /// A stillness so long at the sink is the end.
    #[arg(long, value_parser = parse_duration, default_value = "2s", value_name = "DURATION")]
    quiet: Duration,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl KillArgs {
    pub(crate) fn options(&self) -> Result<KillOptions> {
        Ok(KillOptions {
            engine: self.engine.options()?,
            inject: self.load.options(NOWHERE),
            kills: self.kills,
            run_min: self.run_min,
            run_max: self.run_max,
            sink_delay: self.sink_delay,
            quiet: self.quiet,
            seed: self.load.seed,
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct SpoolArgs {
    /// Default: all.
    #[arg(value_enum)]
    parts: Vec<Part>,
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Writers of `append`, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,64,512")]
    writers: Vec<usize>,
    /// Octets of a message, its signature included.
    #[arg(long, value_parser = parse_bytes, default_value = "2k", value_name = "BYTES")]
    size: usize,
    /// How long a phase lasts, but for `amplification`.
    #[arg(long, value_parser = parse_duration, default_value = "5s", value_name = "DURATION")]
    duration: Duration,
    /// End a phase after so many messages, if that is earlier.
    #[arg(long)]
    messages: Option<u64>,
    /// Open loop: messages a second; default: closed loop, and 20,000 for `maintenance`. Not for `append`.
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// Deferred messages in the spool at any time.
    #[arg(long, default_value_t = 200_000, value_name = "MESSAGES")]
    live: u64,
    /// Of all messages, so many are deferred.
    #[arg(long, default_value_t = 5.0, value_name = "PERCENT")]
    deferred: f64,
    /// How often each of them is.
    #[arg(long, default_value_t = 5, value_name = "TIMES")]
    deferrals: u32,
    /// `amplification` accepts so many times the deferred messages.
    #[arg(long, default_value_t = 5, value_name = "TIMES")]
    live_sizes: u64,
    /// Outcomes come apart from what `append` measures, or along with it.
    #[arg(long, value_enum, default_value = "apart")]
    outcomes: Outcomes,
    /// Bytes of a segment.
    #[arg(long, value_parser = parse_bytes, default_value = "64MiB", value_name = "BYTES")]
    segment: usize,
    /// Where spools are made; default: the system's temporary directory, if on disk.
    #[arg(long, value_name = "DIR")]
    spool_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Outcomes {
    Apart,
    Along,
}

impl SpoolArgs {
    pub(crate) fn options(&self) -> SpoolOptions {
        SpoolOptions {
            parts: if self.parts.is_empty() { Part::value_variants().to_vec() } else { self.parts.clone() },
            rounds: self.rounds,
            writers: self.writers.clone(),
            message_bytes: self.size,
            messages: self.messages.unwrap_or(u64::MAX),
            duration: self.duration,
            rate: self.rate,
            live: self.live,
            deferred_share: self.deferred / 100.0,
            deferrals: self.deferrals,
            live_sizes: self.live_sizes,
            outcomes_along: self.outcomes == Outcomes::Along,
            segment_bytes: self.segment as u64,
            parent: self.spool_dir.clone(),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct CampaignArgs {
    /// Recipients, a message each; of each campaign that is sent: unsigned, signed with Ed25519, signed with RSA.
    #[arg(long, default_value_t = 100_000)]
    recipients: usize,
    /// Octets of the body that they share.
    #[arg(long, value_parser = parse_bytes, default_value = "20k", value_name = "SIZE")]
    body: usize,
    /// Default: one per allowed CPU.
    #[arg(long)]
    shards: Option<usize>,
    #[arg(long, value_enum, default_value = "fsync")]
    durability: Durability,
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Where the spools are made.
    #[arg(long, value_name = "DIR")]
    spool_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl CampaignArgs {
    pub(crate) fn options(&self) -> CampaignOptions {
        CampaignOptions {
            recipients: self.recipients,
            body_bytes: self.body,
            shards: self.shards,
            durability: self.durability,
            rounds: self.rounds,
            spool_parent: self.spool_dir.clone(),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// Messages in the spool when the engine is killed.
    #[arg(long, default_value_t = 1_000_000)]
    messages: u64,
    /// Sites that they go to, evenly.
    #[arg(long, default_value_t = 1_000)]
    sites: usize,
    /// Octets of a message: 2k, or sizes with weights: 1k:70,4k:25,100k:5.
    #[arg(long, default_value = "2k")]
    size: Sizes,
    /// Connections that inject at a time.
    #[arg(long, default_value_t = 50)]
    sessions: usize,
    /// Restarts of the same spool, each delivering to another site.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Drop the page cache before each start; it is the whole machine's where that is permitted.
    #[arg(long)]
    cold: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl RestartArgs {
    pub(crate) fn options(&self) -> Result<RestartOptions> {
        let (sizes, sessions, seed) = (self.size.clone(), self.sessions, self.seed);
        let sender = format!("bench@{SENDER_DOMAIN}");
        Ok(RestartOptions {
            engine: self.engine.options()?,
            inject: InjectOptions { sender, sizes, sessions, seed, ..InjectOptions::to(NOWHERE) },
            messages: self.messages,
            sites: self.sites,
            rounds: self.rounds,
            cold: self.cold,
            seed,
        })
    }
}

/// What a full queue is delivered through.
#[derive(Debug, Args)]
struct DrainArgs {
    /// At a time, of the engine as of the bare loops.
    #[arg(long, default_value_t = 10)]
    connections: usize,
    /// Octets of a message.
    #[arg(long, value_parser = parse_bytes, default_value = "2k", value_name = "BYTES")]
    size: usize,
    /// The engine's `max_deliveries_per_connection`.
    #[arg(long, default_value_t = 100_000)]
    deliveries_per_connection: u64,
    /// The engine's `chunking`.
    #[arg(long, value_enum, default_value = "on")]
    chunking: Chunking,
    /// The engine's `max_in_flight`, which counts with back_to_back.
    #[arg(long, default_value_t = 8)]
    max_in_flight: u32,
    /// The sink offers CHUNKING.
    #[arg(long, value_enum, default_value = "off", default_missing_value = "on", num_args = 0..=1)]
    sink_chunking: Switch,
    /// By TLS 1.3, over connections that stay open; the bare loops too.
    #[arg(long)]
    tls: bool,
    #[arg(long, default_value_t = 1)]
    rounds: usize,
}

#[derive(Debug, Args)]
pub(crate) struct WanArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    drain: DrainArgs,
    #[arg(long, default_value_t = 3_000)]
    messages: u64,
    /// There and back.
    #[arg(long, value_parser = parse_duration, default_value = "40ms", value_name = "DURATION")]
    round_trip: Duration,
    /// To a server instead of the sink: one's own at an address, or `postfix` or `exim`, which are started and throw
    /// the mail away. smtp-source finds that server's limit, without the long way, and feeds the engine.
    #[arg(long, value_name = "ADDRESS|postfix|exim", requires = "smtp_source")]
    server: Option<String>,
    #[arg(long, value_name = "PATH")]
    smtp_source: Option<PathBuf>,
    /// A tree of unpacked packages with usr/sbin/exim4; default: what .ci/run made.
    #[arg(long, value_name = "DIR")]
    exim_root: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    drain: DrainArgs,
    #[arg(long, default_value_t = 30_000)]
    messages: u64,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl WanArgs {
    pub(crate) fn options(&self) -> Result<DeliverOptions> {
        let server = match self.server.as_deref() {
            None => None,
            Some("postfix") => Some(Server::Started(Mta::Postfix(None))),
            Some("exim") => {
                let root = tree(self.exim_root.as_ref(), "usr/sbin/exim4")?;
                Some(Server::Started(Mta::Exim(root.context("no exim4 was found; README.md says how to get it")?)))
            }
            Some(address) => {
                let address = address.parse();
                Some(Server::At(address.context("--server: write an address and a port, postfix, or exim")?))
            }
        };
        let server = server.zip(self.smtp_source.clone());
        let options = self.drain.options(&self.engine, self.messages)?;
        Ok(DeliverOptions { round_trip: self.round_trip, server, ..options })
    }
}

impl ClientArgs {
    pub(crate) fn options(&self) -> Result<DeliverOptions> {
        self.drain.options(&self.engine, self.messages)
    }
}

impl DrainArgs {
    fn options(&self, engine: &EngineArgs, messages: u64) -> Result<DeliverOptions> {
        Ok(DeliverOptions {
            engine: engine.options()?,
            messages,
            message_bytes: self.size,
            connections: self.connections,
            round_trip: Duration::ZERO,
            deliveries_per_connection: self.deliveries_per_connection,
            chunking: self.chunking,
            in_flight: self.max_in_flight,
            sink_chunking: self.sink_chunking == Switch::On,
            tls: self.tls,
            rounds: self.rounds,
            server: None,
        })
    }
}

/// The tree of unpacked packages that was named, or else the one beside the folder that postbench was built into.
fn tree(given: Option<&PathBuf>, program: &str) -> Result<Option<PathBuf>> {
    let made = std::env::current_exe()?.parent().and_then(Path::parent).map(|target| target.join("interop/root"));
    let found = given.cloned().or_else(|| made.filter(|root| root.join(program).is_file()));
    Ok(found)
}

fn tool_path(tool: &str, name: &str) -> Result<PathBuf> {
    let Some(path) = tool.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')) else {
        bail!("{tool:?}: write {name}:/path/to/{name}");
    };
    ensure!(Path::new(path).is_file(), "no {name} at {path}");
    Ok(path.into())
}

/// Replaced by the engine's own address.
const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

/// Of a message, in octets.
const SIZE_USUAL: usize = 2 << 10;
const SIZE_LARGE: usize = 100 << 10;

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn relay_options(arguments: &[&str]) -> Result<RelayOptions> {
        let cli = Cli::try_parse_from(["postbench", "relay"].iter().chain(arguments))?;
        let Command::Relay(relay) = cli.command else { bail!("not relay") };
        relay.relay.options()
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn relay_takes_switches_sizes_and_what_is_behind_the_dashes() {
        let options =
            relay_options(&["--pipelined", "off", "--size", "1k:1,2k:3", "--shards", "2", "--", "--log", "debug"])
                .unwrap();
        assert!(!options.inject.pipelined);
        assert_eq!(options.inject.sizes.to_string(), "1024:1,2048:3");
        assert_eq!(options.engine.shards, Some(2));
        assert_eq!(options.engine.arguments, ["--log", "debug"]);
        assert!(relay_options(&["--pipelined", "--dkim", "both"]).unwrap().inject.pipelined);
    }

    #[test]
    fn tools_are_named_with_their_kind() {
        assert!(relay_options(&["--injector", "/usr/sbin/smtp-source"]).is_err());
        assert!(relay_options(&["--injector", "smtp-source:/no/such/file"]).is_err());
        assert!(relay_options(&["--size", "1k:1,2k:3", "--injector", "smtp-source:/bin/sh"]).is_err());
        assert!(relay_options(&["--injector", "smtp-source:/bin/sh"]).unwrap().smtp_source.is_some());
    }

    #[test]
    fn the_sink_refuses_odd_replies() {
        let sink_options = |arguments: &[&str]| {
            let Command::Sink(sink) = Cli::try_parse_from(["postbench", "sink"].iter().chain(arguments))?.command
            else {
                bail!("not sink")
            };
            sink.options()
        };
        assert!(
            sink_options(&["--reply-rcpt", "451 4.2.1 busy", "--fail-percent", "10", "--fail-until", "5s"]).is_ok()
        );
        assert!(sink_options(&["--reply-rcpt", "busy"]).is_err());
        assert!(sink_options(&["--fail-percent", "101"]).is_err());
        assert!(sink_options(&["--audit", "off"]).is_ok_and(|options| !options.audit));
        let two = sink_options(&["--listen", "127.0.0.1:0", "--listen", "[::1]:0"]).unwrap();
        assert_eq!(two.listen.len(), 2);
    }
}
