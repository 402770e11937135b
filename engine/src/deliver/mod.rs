//! Stage 5: one message to some of its recipients over one connection, and what came of it.
//!
//! * `route.rs`: which hosts take mail for a domain.
//! * `attempt.rs`: the transaction that a client is given, its result, the stages between.
//! * `content.rs`: the message's octets on their way to the wire.
//! * `extension.rs`: what the peer offers.
//! * `mta_sts.rs`: MTA-STS policies.
//! * `dane.rs`: what TLSA records require.
//! * `in_flight.rs`: one transaction on a connection.
//! * `tls_policy.rs`: what TLS a domain requires, and what a connection has proved.
//! * `smtp_client.rs`: the SMTP and LMTP client, without I/O.
//! * `blame.rs`: whether a refusal blames our address.
//! * `verdict.rs`: what a failure means. The only file that decides it.

pub mod attempt;
pub(crate) mod blame;
pub mod content;
pub mod dane;
pub mod extension;
pub(crate) mod in_flight;
pub mod mta_sts;
pub mod route;
pub mod smtp_client;
pub mod tls_policy;
pub mod verdict;
