//! The `postbench` binary: argv → one of the bench's parts → results and exit code.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use postrider_bench::bare::serve;
use postrider_bench::campaign::campaign;
use postrider_bench::compare::compare;
use postrider_bench::deliver::{DeliverOptions, deliver};
use postrider_bench::growth::growth;
use postrider_bench::inject::{InjectSummary, Injector};
use postrider_bench::interrupt::Interrupt;
use postrider_bench::kill::kill;
use postrider_bench::memory::memory;
use postrider_bench::relay::relay;
use postrider_bench::report::{Figures, note, print, table};
use postrider_bench::restart::restart;
use postrider_bench::sign::sign;
use postrider_bench::sink::Sink;
use postrider_bench::sink::ledger::{Ledger, Totals};
use postrider_bench::sites::sites;
use postrider_bench::splice::splice;
use postrider_bench::spool::spool;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{
    CampaignArgs, Cli, Command, CompareArgs, GrowthArgs, InjectArgs, KillArgs, MemoryArgs, OutputArgs,
    PlottedRelayArgs, RestartArgs, SignArgs, SinkArgs, SitesArgs, SpliceArgs, SpoolArgs,
};

mod cli;

fn main() -> ExitCode {
    postrider::abort_on_panic();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Sink(args) => run_sink(&args),
        Command::Inject(args) => run_inject(&args),
        Command::Relay(args) => run_relay(&args),
        Command::Serve(args) => serve(&args.config).map(|()| true),
        Command::Kill(args) => run_kill(&args),
        Command::Spool(args) => run_spool(&args),
        Command::Wan(args) => run_deliver(args.options(), &args.output),
        Command::Client(args) => run_deliver(args.options(), &args.output),
        Command::Restart(args) => run_restart(&args),
        Command::Sign(args) => run_sign(&args),
        Command::Memory(args) => run_memory(&args),
        Command::Sites(args) => run_sites(&args),
        Command::Splice(args) => run_splice(&args),
        Command::Growth(args) => run_growth(&args),
        Command::Campaign(args) => run_campaign(&args),
        Command::Compare(args) => run_compare(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            note(&format!("postbench: {error:#}"));
            if error.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Marks an error as one of the command line, found after its parsing.
#[derive(Debug)]
struct Usage;

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("these arguments don't fit")
    }
}

fn run_sink(args: &SinkArgs) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Before anything is listening: whoever sees the port may signal.
    let (mut int, mut term, mut usr1) = {
        let _guard = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::user_defined1())?)
    };
    let options = args.options().context(Usage)?;
    let dkim = options.dkim.clone();
    let sink = Sink::start(options)?;
    for address in sink.addresses() {
        note(&format!("listening on {address}"));
    }
    let ended = Arc::new(AtomicBool::new(false));
    let logger = (!args.quiet).then(|| log_every_second(sink.ledger().clone(), ended.clone())).transpose()?;
    runtime.block_on(async {
        let ledger = sink.ledger();
        let expected = async {
            match args.expect {
                Some(count) => {
                    ledger.wait_for(count).await;
                    // The last message is yet to be answered, and a second copy of any may be on its way.
                    let end = Instant::now() + args.linger;
                    while ledger.totals().connections_open > 0 && Instant::now() < end {
                        tokio::time::sleep(LINGER_LOOK).await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        tokio::pin!(expected);
        loop {
            tokio::select! {
                () = &mut expected => break,
                _ = int.recv() => break,
                _ = term.recv() => break,
                _ = usr1.recv() => {
                    note(if sink.faults().toggle() { "refusing again" } else { "refusing no more" });
                }
            }
        }
    });
    ended.store(true, Ordering::Relaxed);
    if let Some(logger) = logger {
        logger.thread().unpark();
        // It only prints.
        let _ = logger.join();
    }
    let ledger = sink.ledger().clone();
    sink.stop();
    let mut summary = serde_json::to_value(ledger.summary())?;
    let dkim = dkim.map(|dkim| dkim.tally());
    summary["dkim"] = serde_json::to_value(&dkim)?;
    print(&format!("{}\n", serde_json::to_string_pretty(&summary)?))?;
    Ok(dkim.is_none_or(|dkim| dkim.failed == 0))
}

fn log_every_second(ledger: Arc<Ledger>, ended: Arc<AtomicBool>) -> Result<std::thread::JoinHandle<()>> {
    let log = move || {
        let start = Instant::now();
        let mut before = ledger.totals();
        for second in 1u32.. {
            let end = start + Duration::from_secs(1) * second;
            while !ended.load(Ordering::Relaxed) && Instant::now() < end {
                std::thread::park_timeout(end.saturating_duration_since(Instant::now()));
            }
            if ended.load(Ordering::Relaxed) {
                return;
            }
            let now = ledger.totals();
            // A quiet second says nothing new.
            if now.messages != before.messages || now.refused != before.refused {
                note(&second_line(second, &before, &now));
            }
            before = now;
        }
    };
    Ok(std::thread::Builder::new().name("log".into()).spawn(log)?)
}

fn second_line(second: u32, before: &Totals, now: &Totals) -> String {
    format!(
        "{second:>5} s  {:>7} messages/s  {:>7.1} MB/s  {:>5} connections  {:>5} refused  {:>9} messages  \
         {} duplicates",
        now.messages - before.messages,
        (now.bytes - before.bytes) as f64 / 1e6,
        now.connections_open,
        now.refused - before.refused,
        now.messages,
        now.duplicates,
    )
}

fn run_inject(args: &InjectArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let injector = Injector::start(args.options())?;
    let waited = interrupt.until(|| Ok(injector.is_finished()));
    // Interrupted, it still tells what it did.
    injector.stop();
    let (injected, _) = injector.finish()?;
    let summary = injected.summary();
    let figures = inject_figures(&summary);
    show(&args.output, &serde_json::to_value(&summary)?, &table(&[figures]))?;
    if let Some(trouble) = &summary.trouble {
        note(&format!("trouble: {trouble}"));
    }
    waited?;
    Ok(summary.refused + summary.unanswered == 0 && summary.accepted > 0 || args.persists())
}

fn inject_figures(summary: &InjectSummary) -> Figures {
    let mut figures = Figures::default();
    figures.push("accepted", "messages", summary.accepted as f64);
    figures.push("refused", "messages", summary.refused as f64);
    figures.push("unanswered", "messages", summary.unanswered as f64);
    figures.push("connections", "", summary.connections as f64);
    figures.push("seconds", "s", summary.seconds);
    figures.push("accepted_per_second", "messages/s", summary.messages_per_second);
    figures.push("mb_per_second", "MB/s", summary.mb_per_second);
    if let Some(accept) = &summary.accept {
        figures.push("accept_mean_ms", "ms", accept.mean_ms);
        figures.push("accept_p50_ms", "ms", accept.p50_ms);
        figures.push("accept_p99_ms", "ms", accept.p99_ms);
        figures.push("accept_p999_ms", "ms", accept.p999_ms);
        figures.push("accept_max_ms", "ms", accept.max_ms);
    }
    figures
}

fn run_relay(args: &PlottedRelayArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = relay(&args.relay.options().context(Usage)?, &interrupt)?;
    show(&args.relay.output, &report.to_json(), &report.to_table())?;
    if let Some(path) = &args.plot {
        report.plot(path)?;
    }
    Ok(report.is_complete())
}

fn run_kill(args: &KillArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = kill(&args.options().context(Usage)?, &interrupt)?;
    show(&args.output, &serde_json::to_value(&report)?, &report.to_text())?;
    Ok(report.holds())
}

fn run_spool(args: &SpoolArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = spool(&args.options(), &interrupt)?;
    show(&args.output, &report.to_json(), &report.to_text())?;
    Ok(true)
}

fn run_restart(args: &RestartArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = restart(&args.options().context(Usage)?, &interrupt)?;
    show(&args.output, &report.to_json(), &report.to_table())?;
    Ok(report.holds())
}

fn run_compare(args: &CompareArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = compare(&args.options().context(Usage)?, &interrupt)?;
    show(args.output(), &report.to_json(), &report.to_text())?;
    Ok(report.holds())
}

fn run_sign(args: &SignArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = sign(&args.options().context(Usage)?, &interrupt)?;
    show(args.output(), &report.to_json(), &report.to_table())?;
    Ok(report.is_complete())
}

fn run_memory(args: &MemoryArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = memory(&args.options().context(Usage)?, &interrupt)?;
    show(args.output(), &report.to_json(), &report.to_table())?;
    Ok(report.holds())
}

fn run_sites(args: &SitesArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = sites(&args.options().context(Usage)?, &interrupt)?;
    show(args.output(), &report.to_json(), &report.to_table())?;
    Ok(report.holds())
}

fn run_splice(args: &SpliceArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = splice(&args.options().context(Usage)?, &interrupt)?;
    show(args.output(), &report.to_json(), &report.to_table())?;
    Ok(report.is_complete())
}

fn run_growth(args: &GrowthArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = growth(&args.options().context(Usage)?, &interrupt)?;
    show(args.output(), &report.to_json(), &report.to_table())?;
    Ok(report.holds())
}

fn run_campaign(args: &CampaignArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = campaign(&args.options(), &interrupt)?;
    show(&args.output, &report.to_json(), &report.to_table())?;
    Ok(true)
}

fn run_deliver(options: Result<DeliverOptions>, output: &OutputArgs) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let report = deliver(&options.context(Usage)?, &interrupt)?;
    show(output, &report.to_json(), &report.to_table())?;
    Ok(true)
}

const LINGER_LOOK: Duration = Duration::from_millis(5);

fn show(output: &OutputArgs, json: &Value, text: &str) -> Result<()> {
    let pretty = format!("{}\n", serde_json::to_string_pretty(json)?);
    match output.json.as_deref() {
        Some(path) if path == Path::new("-") => {
            note(text.trim_end());
            print(&pretty)?;
        }
        Some(path) => {
            std::fs::write(path, pretty).with_context(|| format!("cannot write {}", path.display()))?;
            print(text)?;
        }
        None => print(text)?,
    }
    Ok(())
}
