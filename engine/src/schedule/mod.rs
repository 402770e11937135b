//! Stage 3, at a message's home shard: when each recipient group is due, and which goes next.
//!
//! * `queue.rs`: the entries of a home and the queues they stand in.
//! * `entry.rs`, `recipients.rs`, `answer.rs`: what an entry is made of, compact.
//! * `due.rs`: entries that wait for a time.
//! * `fair.rs`: the order among entries that are ready for one (egress source, roll-up) pair.
//! * `retry.rs`: when to try again.
//! * `summary.rs`: entries as a checkpoint keeps them, so that a restart need not read messages.

mod answer;
mod due;
mod entry;
pub mod fair;
pub mod queue;
mod recipients;
pub mod retry;
pub mod summary;
