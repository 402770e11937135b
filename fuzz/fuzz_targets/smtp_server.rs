//! See `body/smtp_server.rs`.
#![no_main]

#[path = "../body/smtp_server.rs"]
mod smtp_server;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| smtp_server::run(octets));
