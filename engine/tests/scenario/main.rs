//! One behaviour per file, through the embedding API, between a client and a sink that does as it is told.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "tests fail where they stand, and tell what they skipped"
)]

#[path = "../support/mod.rs"]
mod support;

mod automation;
mod back_to_back;
mod bounce_5xx;
mod bounce_queued;
mod busy_shard;
mod campaign;
mod captured_metadata;
mod dane;
mod deliver_once;
mod dns_mx;
mod dsn_parameters;
mod expiry;
mod full_spool;
mod greeting_failure;
mod header_rules;
mod idn_domain;
mod last_words;
mod limits_over_stops;
mod lost_pages;
mod mta_sts;
mod multi_recipient;
mod null_mx;
mod reload;
mod restart_keeps_due;
mod retry_451;
mod route_match;
mod shard_count_change;
mod shutdown_while_busy;
mod suspend_source;
mod two_engines;
mod unix_socket;
mod unread_log;
