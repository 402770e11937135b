//! Stage 3, at a message's home shard: when each recipient group is due, and which goes next.
//!
//! * `queue.rs`: the entries of a home and the queues they stand in.
//! * `due.rs`: entries that wait for a time.
//! * `fair.rs`: the order among entries that are ready for one (egress source, roll-up) pair.
//! * `retry.rs`: when to try again.

pub mod due;
pub mod fair;
pub mod queue;
pub mod retry;
