//! The real binary between real third-party programs: Postfix, Exim, OpenSMTPD, Dovecot, Haraka, aiosmtpd, Postfix's
//! load generator and sink, swaks, smtplib, dkimpy, and Unbound with zones that ldns signs. What needs no such program
//! (`egress_shares`, `peer_failures`, `kill_under_load`, `bad_input`) uses the scripted sink of `support/`.
//!
//! A test whose tool is missing skips with a printed reason; with `CI=true` in the environment it fails instead.
//! `.ci/run` installs the tools. `INTEROP_MESSAGES` sets how many messages the larger tests send (1,000 unless set),
//! `INTEROP_PEER_MESSAGES` how many go to each real server (100), `INTEROP_HALF_OPEN` how many connections are left
//! half-open (2,000), and `INTEROP_RATES` how many messages wait for a rate (200; 50,000 take two minutes more).

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail where they stand, and tell what they counted and skipped"
)]

#[path = "../support/mod.rs"]
mod support;

mod bad_input;
mod dovecot_lmtp;
mod egress_shares;
mod foreign_envelopes;
mod kill_under_load;
mod killed_at_work;
mod odd_mail;
mod peer_failures;
mod rates;
mod real_servers;
mod servers;
mod session_ends;
mod signed_zones;
mod smtp_source;
mod tools;
