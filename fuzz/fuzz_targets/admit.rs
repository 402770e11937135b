//! See `body/admit.rs`.
#![no_main]

#[path = "../body/admit.rs"]
mod admit;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| admit::run(octets));
