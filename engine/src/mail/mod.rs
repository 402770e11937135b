//! The nouns that all stages share. Nothing here does I/O.

pub mod address;
pub mod dsn;
pub mod endpoint;
pub mod header;
pub mod json;
pub mod mailboxes;
pub mod message_id;
pub mod queue_name;
pub mod reply;
pub mod time;
