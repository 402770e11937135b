//! What became of the mail: the last stage of the data path.
//!
//! The spool's outcome records are the truth. Here they become events, one JSON line per recipient: `event` says what
//! a line holds, `classify` names the kind of failure, `event_log` puts lines into frames that survive a crash exactly
//! once and hands them to subscribers. The files themselves are written by `runtime/event_file.rs`. `tls_report`
//! counts TLS sessions.

pub mod classify;
pub mod event;
mod event_id;
pub mod event_log;
pub mod tls_report;
