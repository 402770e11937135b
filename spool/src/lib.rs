//! A durable, append-only mail spool of zero-copy records.
//!
//! A [`Spool`] is a directory of logs, one or more for each shard of an engine. A [`Log`] takes messages and what
//! becomes of their recipients, makes them durable in group commits, and gives messages back in place. While it runs it
//! does no I/O: it yields [`Operation`]s and is told what came of them, so that it runs on io_uring, on plain files and
//! on a simulated disk alike.
//!
//! ```
//! use std::time::Duration;
//! use postrider_spool::record::{Envelope, Recipient, Sequence};
//! use postrider_spool::{Fetch, Log, Progress, RecoverOptions, Spool, SpoolOptions, execute};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path();
//! let mut spool = Spool::open(path, SpoolOptions { segment_bytes: 1 << 20, ..SpoolOptions::default() })?;
//! let mine = spool.assign(1)?.remove(0).remove(0);
//! let mut log = Log::recover(mine, RecoverOptions { seed: 7, ..RecoverOptions::default() }, &mut |_| {})?;
//!
//! let recipients = vec![Recipient { address: "b@example.net".into() }];
//! let envelope = Envelope { reverse_path: "a@example.com".into(), recipients, ..Envelope::default() };
//! let (id, commit) = log.append_message(&envelope, b"Received: here\r\n", b"Subject: x\r\n\r\nHello\r\n")?;
//!
//! let now = Duration::ZERO;
//! while let Some(operation) = log.poll_operation(now, &mut ()) {
//!     if let Progress::Durable(number) = log.handle_completion(now, execute(operation)) {
//!         assert!(number >= commit); // Now, and not before, the message may be acknowledged.
//!     }
//! }
//! let Fetch::Ready(message) = log.message(id)? else { panic!("it was just appended") };
//! assert_eq!(message.envelope()?.reverse_path, "a@example.com");
//! assert_eq!(message.body(), b"Subject: x\r\n\r\nHello\r\n");
//! # Ok(())
//! # }
//! ```
//!
//! What becomes of each recipient is appended as an [`Outcome`], absolute: who is deferred stays pending, and a message
//! without a pending recipient is gone. The next start tells what is live, with the latest state of each, and every
//! record that no event was written for yet ([`RecoverOptions::event_cursor`]). Segments are used again only behind the
//! cursor, so that whoever wants no events sets it to the highest number.
//!
//! ```
//! # use std::time::Duration;
//! use postrider_spool::record::Answer;
//! use postrider_spool::{Envelope, Fate, Log, Outcome, Recipient, RecipientResult, RecoverOptions};
//! use postrider_spool::{Recovered, Sequence};
//! # use postrider_spool::{Spool, SpoolOptions, execute};
//!
//! # fn settle(log: &mut Log) {
//! #     while let Some(operation) = log.poll_operation(Duration::ZERO, &mut ()) {
//! #         log.handle_completion(Duration::ZERO, execute(operation));
//! #     }
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path();
//! # let options = SpoolOptions { segment_bytes: 1 << 20, ..SpoolOptions::default() };
//! # let mut spool = Spool::open(path, options)?;
//! # let mine = spool.assign(1)?.remove(0).remove(0);
//! let no_events = Sequence(u64::MAX);
//! let mut log = Log::recover(
//!     mine,
//!     RecoverOptions { seed: 7, event_cursor: no_events, ..RecoverOptions::default() },
//!     &mut |_| {},
//! )?;
//! let recipients = ["b@example.net", "c@example.net"].map(|address| Recipient { address: address.into() });
//! let envelope = Envelope { recipients: recipients.into(), ..Envelope::default() };
//! let (id, _) = log.append_message(&envelope, b"", b"Subject: x\r\n\r\nHello\r\n")?;
//! for (index, fate) in [(0, Fate::Delivered), (1, Fate::Deferred { due_ms: 1_700_000_300_000 })] {
//!     let result = RecipientResult {
//!         index,
//!         recipient: envelope.recipients[index as usize].address.clone(),
//!         queue: "example.net".into(),
//!         fate,
//!         attempts: 1,
//!         answer: Answer::default(),
//!     };
//!     log.append_outcome(&Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() })?;
//! }
//! settle(&mut log); // As above: until all is durable.
//! drop(log);
//!
//! # drop(spool);
//! # let mut spool = Spool::open(path, options)?;
//! # let mine = spool.assign(1)?.remove(0).remove(0);
//! let mut found = Vec::new();
//! Log::recover(
//!     mine,
//!     RecoverOptions { seed: 8, event_cursor: no_events, ..RecoverOptions::default() },
//!     &mut |recovered| match recovered {
//!         Recovered::Message { id, pending, results, .. } => found.push((id, pending.to_vec(), results[0].attempts)),
//!         other => println!("{other:?}"), // Events to be written, summaries, and what was damaged.
//!     },
//! )?;
//! assert_eq!(found, [(id, vec![1], 1)]);
//! # Ok(())
//! # }
//! ```
//!
//! [`Spool::inspect`] reads a spool and leaves it as it is.
//!
//! The bytes on disk are described in `FORMAT.md`.

mod append;
#[cfg(any(feature = "sim", test))]
mod audit;
mod body;
mod checkpoint;
pub mod checkpoint_format;
pub mod checksum;
mod commit;
mod copy_forward;
mod directory;
mod error;
mod file;
pub mod format;
mod frame;
mod index;
mod inspect;
pub mod limits;
mod load;
mod log;
mod message;
mod packed;
mod read;
mod read_only;
pub mod record;
mod recover;
mod replay;
mod retire;
mod scrub;
mod segment;
mod shortage;
#[cfg(any(feature = "sim", test))]
pub mod sim;
mod statistics;
mod storage;
mod survey;
mod tombstone;
mod write_record;

pub use checkpoint::Summarize;
pub use directory::{Durability, LogDirectory, Spool, SpoolOptions};
pub use error::{AppendError, Closed, OpenError, ReadError, RecoverError};
#[cfg(feature = "uring")]
pub use file::execute_on_ring;
pub use file::{FileStorage, Guarded, Map};
pub use inspect::Inspection;
pub use log::{Fetch, Log, Progress};
pub use message::{Message, Piece};
pub use read_only::ReadOnlyStorage;
pub use record::{
    ArchivedEnvelope, BodyId, CommitNumber, Envelope, Fate, LogId, MessageId, Outcome, Recipient, RecipientResult,
    Sequence,
};
pub use recover::{Cut, Kept, Quarantine, Reason, RecordRef, RecoverOptions, Recovered};
pub use statistics::Statistics;
pub use storage::{Completion, LockGuard, Operation, Storage, StorageFile, execute};
