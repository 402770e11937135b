//! The world outside the cores: rings, sockets, clocks, randomness, names, signals, and the queues between threads.
//!
//! Nothing else in the engine imports `tokio_uring`, opens a socket or asks a clock. `uring.rs` alone builds SQEs.
#![expect(clippy::disallowed_methods, reason = "the engine touches the world here")]

pub(crate) mod aside;
pub(crate) mod cgroup;
pub(crate) mod clock;
pub(crate) mod control;
pub(crate) mod dane;
pub(crate) mod directory;
pub(crate) mod dns;
pub(crate) mod event_file;
pub(crate) mod heartbeats;
pub(crate) mod limit_file;
pub(crate) mod link;
pub(crate) mod mailbox;
pub(crate) mod mta_sts;
pub(crate) mod net;
pub(crate) mod panic;
pub(crate) mod progress_file;
pub(crate) mod questions;
pub(crate) mod random;
pub(crate) mod renewal;
pub(crate) mod shard_loop;
pub(crate) mod signal;
pub(crate) mod socket;
pub(crate) mod spool_place;
pub(crate) mod standard_error;
pub(crate) mod state_file;
pub(crate) mod suspension_list;
pub(crate) mod tls;
pub(crate) mod uring;
