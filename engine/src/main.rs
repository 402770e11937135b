//! The `postrider` program: arguments → configuration → engine → exit code.
//!
//! Exit codes: 0 done; 1 failure at run time; 2 wrong usage or configuration.

use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use postrider::config::{self, Config, ConfigErrors};
use postrider::{admin, demo, serve};

/// A message makes some hundred small allocations, many of which another thread frees.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    postrider::abort_on_panic();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are errors to clap, with exit code 0; where nobody reads them, nothing is lost.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match arguments.command {
        Command::Serve(file) => run_serve(&file),
        Command::Demo(arguments) => run_demo(&arguments),
        Command::Check(arguments) if arguments.shipped_providers => say(&config::SHIPPED_PROVIDERS),
        Command::Check(arguments) => run_check(&arguments.file),
        Command::Version => say(&format!("postrider {}\n", env!("CARGO_PKG_VERSION"))),
    }
}

/// Outbound mail delivery engine
#[derive(Debug, Parser)]
#[command(name = "postrider", version, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Accept mail by SMTP, keep it durably and deliver it, until SIGTERM
    Serve(ConfigFile),
    /// Send, sign, deliver and verify generated mail, all in this process
    Demo(DemoArguments),
    /// Check a configuration and print what it amounts to, defaults included
    Check(CheckArguments),
    /// Print the version
    Version,
}

#[derive(Debug, Clone, Args)]
struct ConfigFile {
    /// Configuration in TOML; without it: SMTP on 127.0.0.1:2525, HTTP on 127.0.0.1:8025, spool in ./postrider-data
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct CheckArguments {
    #[command(flatten)]
    file: ConfigFile,
    /// Print the shipped provider rules instead, as they would stand in a configuration
    #[arg(long)]
    shipped_providers: bool,
}

#[derive(Debug, Args)]
struct DemoArguments {
    /// Messages to send
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    messages: u32,
    /// SMTP sessions that send them
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
    sessions: u32,
    /// Shards of the engine [default: one per allowed CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    shards: Option<u16>,
}

impl ConfigFile {
    /// Without a file: the defaults, checked as a file would be.
    fn load(&self) -> Result<Config, ConfigErrors> {
        match &self.config {
            Some(path) => Config::load(path),
            None => Config::from_toml("", "defaults", Path::new(".")),
        }
    }
}

fn run_serve(file: &ConfigFile) -> ExitCode {
    let config = match file.load() {
        Ok(config) => config,
        Err(errors) => return complain(&errors, USAGE),
    };
    admin::log::init("info");
    let file = file.clone();
    match serve::run(config, move || file.load()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&format!("postrider: {error}"), FAILURE),
    }
}

fn run_demo(arguments: &DemoArguments) -> ExitCode {
    admin::log::init("warn");
    let options = demo::Options {
        messages: arguments.messages,
        sessions: arguments.sessions,
        shards: arguments.shards.map(usize::from),
    };
    match demo::run(&options) {
        Ok(report) if report.is_success() => say(&report),
        Ok(report) => {
            say(&report);
            ExitCode::from(FAILURE)
        }
        Err(error) => complain(&format!("postrider demo: {error}"), FAILURE),
    }
}

fn run_check(file: &ConfigFile) -> ExitCode {
    match file.load() {
        Ok(mut config) => {
            config.warnings.extend(serve::unplumbed_sources(&config));
            say(&config::describe(&config))
        }
        Err(errors) => complain(&errors, USAGE),
    }
}

/// On standard output. A reader that went away has seen what it wanted.
fn say(text: &dyn fmt::Display) -> ExitCode {
    match write!(io::stdout().lock(), "{text}").and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&format!("postrider: standard output: {error}"), FAILURE)
        }
        _ => ExitCode::SUCCESS,
    }
}

/// On standard error; if that fails there is nobody left to tell.
fn complain(text: &dyn fmt::Display, code: u8) -> ExitCode {
    let _ = writeln!(io::stderr().lock(), "{text}");
    ExitCode::from(code)
}

const FAILURE: u8 = 1;
const USAGE: u8 = 2;
