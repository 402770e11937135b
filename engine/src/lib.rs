//! Postrider: an outbound mail delivery engine.
//!
//! [`Engine::builder`] starts an engine from a [`Config`], made in code or read from a file ([`Config::load`]). An
//! engine has threads of its own; its methods may be called from any thread and any async runtime.
//!
//! ```no_run
//! use postrider::{Config, Engine, EventItem, Message};
//!
//! # async fn send() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = Config::new("mta.example.com");
//! config.spool.path = "spool".into();
//! let engine = Engine::builder(config).start()?;
//! let mut events = engine.events();
//! let accepted = engine
//!     .inject(Message {
//!         reverse_path: "news@example.com".to_owned(),
//!         recipients: vec!["ada@example.net".to_owned()],
//!         content: b"From: news@example.com\r\nSubject: Hello\r\n\r\nHello\r\n".to_vec(),
//!         ..Message::default()
//!     })
//!     .await?; // It is on the disk.
//! while let Some(item) = events.next().await {
//!     if let EventItem::Event(event) = item
//!         && event.message == accepted.id
//!         && event.kind.is_final()
//!     {
//!         println!("{}: {} {}", event.kind, event.code, event.text);
//!         break;
//!     }
//! }
//! engine.shutdown()?;
//! # Ok(())
//! # }
//! ```
//!
//! What is named at this level, [`config`], and the rows and filters of [`admin`] are the API. The modules of a
//! message's path, in its order below, are public for the simulator and the benchmarks, and change at any time.

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
pub use postrider_spool::record::MessageId;
pub use runtime::control::Addresses;
pub use runtime::event_file::EventLogStatistics;
pub use runtime::panic::abort_on_panic;
