//! The body of the fuzz target for recovery, on its seeds and on a few mutations of them; `FUZZ_SECONDS=60` goes on
//! longer.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "what is found is shown, and ends the test")]

#[path = "../../fuzz/body/smoke.rs"]
mod smoke;
#[path = "../../fuzz/body/spool_recover.rs"]
mod spool_recover;

#[test]
fn spool_recover() {
    smoke::smoke("spool_recover", 200, spool_recover::run);
}
