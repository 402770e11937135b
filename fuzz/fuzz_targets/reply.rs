//! See `body/reply.rs`.
#![no_main]

#[path = "../body/reply.rs"]
mod reply;

libfuzzer_sys::fuzz_target!(|octets: &[u8]| reply::run(octets));
