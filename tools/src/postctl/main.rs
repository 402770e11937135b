//! postctl: asks a running engine over its HTTP service, and reads a spool that no engine uses.
//!
//! Exit codes: 0 done; 1 the engine can't be reached, refused, or has no such thing, or the spool is damaged, in use or
//! has no such message; 2 the command line is wrong, or the
//! configuration that the engine was to reload.

mod client;
mod command;
mod failure;
mod render;
mod row;
mod spool;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser as _;

use crate::failure::Failure;

fn main() -> ExitCode {
    let environment = |name: &str| std::env::var(name).ok();
    let code = run(std::env::args_os(), environment, &mut io::stdout().lock(), &mut io::stderr().lock());
    ExitCode::from(code)
}

/// The whole program, with its surroundings as arguments.
fn run(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<String>,
    out: &mut impl Write,
    err: &mut impl Write,
) -> u8 {
    let arguments = match command::Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are "errors" that go to standard output and end well.
            let text = error.render();
            let asked_for = !error.use_stderr();
            let _ = if asked_for { write!(out, "{text}") } else { write!(err, "{text}") };
            return if asked_for { DONE } else { USAGE };
        }
    };
    let json = arguments.json;
    let mut out = io::BufWriter::new(out);
    let executed = command::execute(arguments, environment, &mut out);
    // Also what was shown before it failed.
    let flushed = out.flush().map_err(Failure::Write);
    match executed.and(flushed) {
        Ok(()) => DONE,
        // Whoever read our output has seen enough (`postctl … | head`).
        Err(Failure::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => DONE,
        Err(failure) => {
            let _ = if json { writeln!(err, "{}", failure.to_json()) } else { writeln!(err, "postctl: {failure}") };
            if failure.is_usage() { USAGE } else { FAILED }
        }
    }
}

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
