//! Postrider: an outbound mail delivery engine.
//!
//! The modules stand in the order of a message's path.

// The path: accept → spool → schedule → pool → deliver → outcome.
pub mod accept;
pub mod admin;
pub mod config;
pub mod deliver;
pub mod engine;
pub mod fair;
pub mod handover;
pub mod limits;
pub mod mail;
pub mod outcome;
pub mod pool;
pub mod progress;
mod runtime;
pub mod schedule;
pub mod shard;

// Programs on top of the engine.
pub mod demo;
pub mod serve;

pub use admin::Reloaded;
pub use config::Config;
pub use engine::{
    Accepted, Campaign, CampaignMessage, Engine, EngineBuilder, InjectError, Message, ReloadError, StartError,
    SuspendError,
};
pub use mail::dsn::{DsnRequest, Notify, RecipientDsn, ReturnedContent};
pub use outcome::event::{EventId, EventKind, EventRecord};
pub use outcome::event_log::{EventItem, EventStream};
pub use runtime::control::Addresses;
pub use runtime::event_file::EventLogStatistics;
