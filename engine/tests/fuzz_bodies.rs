//! The bodies of the fuzz targets, on their seeds and on a few mutations of them; `FUZZ_SECONDS=60` goes on longer.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "what is found is shown, and ends the test"
)]

#[path = "../../fuzz/body/admit.rs"]
mod admit;
#[path = "../../fuzz/body/config.rs"]
mod config;
#[path = "../../fuzz/body/reply.rs"]
mod reply;
#[path = "../../fuzz/body/smoke.rs"]
mod smoke;
#[path = "../../fuzz/body/smtp_client.rs"]
mod smtp_client;
#[path = "../../fuzz/body/smtp_server.rs"]
mod smtp_server;

use smoke::smoke;

#[test]
fn reply() {
    smoke("reply", 2_000, reply::run);
}

#[test]
fn smtp_server() {
    smoke("smtp_server", 1_000, smtp_server::run);
}

#[test]
fn smtp_client() {
    smoke("smtp_client", 1_000, smtp_client::run);
}

#[test]
fn admit() {
    smoke("admit", 1_000, admit::run);
}

#[test]
fn config() {
    smoke("config", 500, config::run);
}
