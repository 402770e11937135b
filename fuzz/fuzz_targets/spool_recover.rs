//! See `body/spool_recover.rs`.
#![no_main]

#[path = "../body/spool_recover.rs"]
mod spool_recover;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| spool_recover::run(octets));
