//! The bench: load generator, sink, and measurements of a mail system between the two.
//!
//! Independent of the engine: it is started as a process, as any rival would be. Only [`spool`] links what it measures,
//! the spool's crate, beside bare writes to the same disk.

pub mod bare;
pub mod campaign;
pub mod compare;
pub mod deliver;
pub mod growth;
pub mod inject;
pub mod interrupt;
pub mod keys;
pub mod kill;
pub mod measure;
pub mod memory;
pub mod message;
pub mod peers;
mod plot;
pub mod relay;
pub mod report;
pub mod restart;
pub mod sign;
pub mod sink;
pub mod sites;
pub mod splice;
pub mod spool;
mod standing;
pub mod units;
