//! See `body/smtp_client.rs`.
#![no_main]

#[path = "../body/smtp_client.rs"]
mod smtp_client;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| smtp_client::run(octets));
