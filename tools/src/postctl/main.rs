//! postctl: asks a running engine over its HTTP service.
//!
//! Exit codes: 0 done; 1 the engine can't be reached, refused, or has no such thing; 2 the command line is wrong.

mod client;
mod command;
mod failure;
mod render;
mod row;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser as _;

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
    let mut text = Vec::new();
    match command::execute(arguments, environment, &mut text) {
        Ok(()) => match out.write_all(&text).and_then(|()| out.flush()) {
            Ok(()) => DONE,
            // Whoever read our output has seen enough (`postctl … | head`).
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => DONE,
            Err(error) => {
                let _ = writeln!(err, "postctl: can't write: {error}");
                FAILED
            }
        },
        Err(failure) => {
            let _ = writeln!(err, "postctl: {failure}");
            if failure.is_usage() { USAGE } else { FAILED }
        }
    }
}

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
