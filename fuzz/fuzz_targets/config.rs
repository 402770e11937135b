//! See `body/config.rs`.
#![no_main]

#[path = "../body/config.rs"]
mod config;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| config::run(octets));
