//! Stage 4, at the owner shard of an (egress source, roll-up) pair: which source, how many connections, to which host.
//!
//! * `egress.rs`: which source of a pool a message goes by.
//! * `pair.rs`: a pair's tickets, credits, connections and back-off; all its limits have this one owner.
//! * `pair/tickets.rs`: which of its tickets is begun first. `pair/opening.rs`: where it connects to.
//! * `rate.rs`: a limit that holds in every window of its own length.
//! * `pair/limiters.rs`: which limits a pair is under; `pair/rollup.rs`: those that a provider's sites share;
//!   `pair/pacing.rs`: whose turn it is by them.
//! * `pair/moving.rs`: how pairs move to another shard.
//! * `demand.rs`: what homes have ready for a pair, and whose turn it is.
//! * `connection.rs`: the connection slots of a shard.
//! * `openings.rs`: when a shard begins a connection, and who waits for that.
//! * `automation.rs`: which rules fire on a peer's answers, and what they make of limits.
//! * `suspension.rs`: what must not be sent for a while, or only within stricter limits.
//! * `site.rs`: which host of a site is tried next, and which are left alone for a while.
//! * `warmup.rs`: what a source in its warm-up has sent today.
//! * `keeper.rs`: limits over many pairs, for which owners ask.
//! * `balance.rs`: what moves from a busy shard to another.
//! * `trust.rs`: how much is put in flight with a site's hosts.

pub mod automation;
pub mod balance;
pub mod connection;
mod demand;
pub mod egress;
pub mod keeper;
mod openings;
pub mod pair;
pub mod rate;
pub mod site;
pub mod suspension;
pub mod trust;
pub mod warmup;
