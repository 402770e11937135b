//! Every bound of the spool, and how the bounds relate.

/// The unit of placement: frames begin and end on such boundaries, so that no acknowledged block is ever rewritten.
pub const BLOCK_BYTES: u64 = 4096;

/// The smallest segment, for tests; the configured size must be a multiple of [`BLOCK_BYTES`].
pub const SEGMENT_BYTES_MIN: u64 = 8 * BLOCK_BYTES;

/// The size of a segment unless told otherwise. It bounds a message: 50 MiB fit with room to spare.
pub const SEGMENT_BYTES_DEFAULT: u64 = 64 << 20;

/// The largest segment: an offset inside one is kept as a 32-bit number of [`ALIGN_BYTES`] units, and a frame's length
/// as a 32-bit number of bytes.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Archives and records begin at multiples of this in the file.
pub const ALIGN_BYTES: u64 = 16;

/// Bytes of a log's newest segments that are served from the map; colder ones are read.
pub const HOT_BYTES_DEFAULT: u64 = 256 << 20;

/// What the spool may hold unless told otherwise.
pub const MAX_BYTES_DEFAULT: u64 = 50 << 30;

/// Segment files of one log. The index names them by 16 bits.
pub const SEGMENTS_MAX: usize = u16::MAX as usize - 1;

/// A gathering frame that has reached this is closed, and the next begins: it bounds how long one write lasts. One
/// message may be larger, and then its frame is.
pub const FRAME_BYTES_TARGET: usize = 4 << 20;

/// Bytes that wait for their commit in one log; above it mail is refused ([`crate::Closed::Backlog`]).
pub const PENDING_MAIL_BYTES_MAX: u64 = 128 << 20;

/// The same for outcomes, which are refused later than mail.
pub const PENDING_OUTCOME_BYTES_MAX: u64 = 192 << 20;

/// Commit buffers kept for reuse in one log, and how large a kept one may be.
pub const BUFFERS_KEPT_MAX: usize = 3;
pub const BUFFER_KEPT_BYTES_MAX: usize = 8 << 20;

/// Free segments that a log keeps ready.
pub const SPARES_WANTED: usize = 3;

/// Of these, the ones that mail never takes: outcomes and copies need them to empty a full spool. What outcomes have
/// filled can be used again only after they have gone on in another one, so they need two.
pub const SPARES_RESERVED: usize = 2;

/// And the ones that copies leave to outcomes.
pub const SPARES_RESERVED_FROM_COPIES: usize = 1;

/// Free segments above this many are given back to the file system. Where checkpoints are far apart, segments become
/// free in batches, and so many more are kept as were begun between two of them: a new file costs its zeroing, and,
/// until that is done, metadata with each commit.
pub const SPARES_KEPT_MIN: usize = 6;

/// One step of zeroing a new segment, and the least time from one step's begin to the next's.
pub const ZERO_STEP_BYTES: u64 = 256 << 10;
pub const ZERO_STEP_INTERVAL_MS: u64 = 4;

/// How long preallocation waits after it failed (no space left on the device).
pub const PREALLOCATION_RETRY_MS: u64 = 1_000;

/// Copy-forward begins when a log has more segments than this in use and the oldest is mostly dead.
pub const COPY_FORWARD_SEGMENTS_MIN: usize = 4;

/// The oldest segment counts as mostly dead when its live bytes are at most this share of its size, in percent.
pub const COPY_FORWARD_LIVE_PERCENT_MAX: u64 = 50;

/// Room gets less when so much of what mail may take is used, in percent.
pub const COPY_FORWARD_HURRIED_USED_PERCENT: u64 = 85;

/// While room gets less, a segment is worth copying with a live share of at most so many percent, and so many more for
/// each percent that is used beyond that, up to the last of these.
pub const COPY_FORWARD_HURRIED_PERCENT_MIN: u64 = 25;
pub const COPY_FORWARD_HURRIED_PERCENT_STEP: u64 = 6;
pub const COPY_FORWARD_HURRIED_PERCENT_MAX: u64 = 75;

/// While mail is refused for want of space nearly anything is worth copying.
pub const COPY_FORWARD_PRESSED_PERCENT_MAX: u64 = 90;

/// Bytes that copy-forward may read in a second while there is room.
pub const COPY_FORWARD_BYTES_PER_S: u64 = 16 << 20;

/// When room gets less, this many times what is appended may be read besides, and so much of it later. A segment that
/// is full of mail has to be read once at most, so this keeps up with any rate.
pub const COPY_FORWARD_EARNED_RATIO: u64 = 2;
pub const COPY_FORWARD_EARNED_BYTES_MAX: u64 = 4 << 20;

/// What counts in a segment is read in windows of this size.
pub const COPY_FORWARD_WINDOW_BYTES: u64 = 256 << 10;

/// Items that copy-forward takes up in one slice, and the least time from one slice to the next: less than a commit
/// takes.
pub const COPY_FORWARD_SLICE_ITEMS: usize = 64;
pub const COPY_FORWARD_SLICE_INTERVAL_US: u64 = 200;

/// Copies are gathered until they have this many bytes, and then written as one frame, for which mail waits; with
/// fewer while there is room.
pub const COPY_FORWARD_GATHER_BYTES: usize = 256 << 10;
pub const COPY_FORWARD_GATHER_CALM_BYTES: usize = 64 << 10;

/// Records that are read for copying at the same time.
pub const COPY_FORWARD_READS_MAX: usize = 8;

/// Entries of the index that are gone over at a time, in search of what counts in a segment, and the least time from
/// one such slice to the next: at most a few percent of a core.
pub const COPY_FORWARD_SCAN_ENTRIES: usize = 4_096;
pub const COPY_FORWARD_SCAN_INTERVAL_MS: u64 = 1;

/// Outcomes that tell a message's state together; with more they are joined to one record.
pub const STATES_MAX: usize = 16;

/// Messages that wait for that; others wait for their next outcome.
pub const RESTATES_WAITING_MAX: usize = 65_536;

/// A checkpoint is begun when this many times its last size has been written, within these bounds. So checkpoints add
/// at most a twelfth to what is written until a log has a few million messages, and a start reads no more than twice
/// the upper bound beside the checkpoint.
pub const CHECKPOINT_WRITTEN_RATIO: u64 = 12;
pub const CHECKPOINT_WRITTEN_BYTES_MAX: u64 = 768 << 20;

/// While so much is used that dead segments don't wait for it, when this many times its last size has been written, but
/// no more than so many segments for that: a log of a million messages waits for as much in any case, and a start reads
/// no more.
pub const CHECKPOINT_WRITTEN_RATIO_HURRIED: u64 = 48;
pub const CHECKPOINT_WRITTEN_SEGMENTS_HURRIED: u64 = 7;

/// Segments that may have been begun, above those that what is written since the last checkpoint would fill, before
/// another one: one or two are being filled, and each start leaves one that holds little.
pub const CHECKPOINT_SEGMENTS_ABOVE: u64 = 4;

/// When there is need of room, a checkpoint is begun when it can free this many times the last one's size.
pub const CHECKPOINT_FREED_RATIO: u64 = 6;

/// Rows are gathered in slices of about this size, one a turn, at least so far apart.
pub const CHECKPOINT_SLICE_BYTES: usize = 64 << 10;
pub const CHECKPOINT_SLICE_INTERVAL_MS: u64 = 1;

/// Slices are written together when they have this many bytes.
pub const CHECKPOINT_WRITE_BYTES: usize = 256 << 10;

/// The smallest checkpoint file, and how much larger than needed now a new one is made, in percent.
pub const CHECKPOINT_FILE_BYTES_MIN: u64 = 8 * BLOCK_BYTES;
pub const CHECKPOINT_FILE_HEADROOM_PERCENT: u64 = 50;

/// What a checkpoint file has for each message's row at the least: one that was deferred, with a summary, takes less.
pub const CHECKPOINT_ROW_BYTES_MIN: u64 = 64;

/// How long checkpoints rest after one could not be written.
pub const CHECKPOINT_RETRY_MS: u64 = 1_000;

/// Dead segments do not wait for checkpoints when so much of what mail may take is used, in percent.
pub const TOMBSTONES_USED_PERCENT: u64 = 50;

/// For so many bytes of a segment one final fate is kept in mind, of 16 bytes, so that the segment can be used again
/// before checkpoints pass it. With more of them it waits.
pub const TOMBSTONES_SEGMENT_PART: u64 = 1_024;

/// How long copy-forward rests when it found nothing that can be copied just then.
pub const COPY_FORWARD_PAUSE_MS: u64 = 100;

/// How long copy-forward leaves the log alone after it met a message that it could not read.
pub const COPY_FORWARD_RETRY_MS: u64 = 60_000;

/// Bytes of live messages that the scrub checks in a second, and how long it rests between two rounds.
pub const SCRUB_BYTES_PER_S: u64 = 2 << 20;
pub const SCRUB_REST_S: u64 = 3_600;

/// Bytes of messages that were read into memory and are still in somebody's hands, for each log; above it no more are
/// read ([`crate::ReadError::Busy`]). One may be larger.
pub const READ_BYTES_MAX: u64 = 256 << 20;

/// Reads of one log that may be under way at once for [`crate::Log::message`].
pub const READS_MAX: usize = 256;

/// Recipients of a message whose fates fit into its index entry; more need an allocation of their own.
pub const INLINE_RECIPIENTS_MAX: u32 = 31;

/// Entries in one chunk of the index, of 36 bytes: allocators give 10 KiB to one that is larger than 8 KiB.
pub const INDEX_CHUNK_ENTRIES: usize = 284;

/// Bytes that recovery reads at a time.
pub const RECOVERY_READ_BYTES: usize = 4 << 20;

/// Maps of a process: segments of which messages are sent from, and the notes of progress of its engines. Further
/// segments are read, and notes are in memory.
pub(crate) const GUARDED_MAPS_MAX: usize = 4_096;

/// Side files with the bytes of cut or quarantined regions that a log keeps; later damage is reported, not kept.
pub const KEPT_FILES_MAX: usize = 1_000;

const _: () = assert!(SEGMENT_BYTES_DEFAULT.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(SEGMENT_BYTES_DEFAULT <= SEGMENT_BYTES_MAX);
const _: () = assert!(SEGMENT_BYTES_MAX / ALIGN_BYTES <= u32::MAX as u64);
const _: () = assert!(SEGMENT_BYTES_DEFAULT > (50 << 20) + (8 << 20));
const _: () = assert!(SPARES_RESERVED < SPARES_WANTED);
const _: () = assert!(0 < SPARES_RESERVED_FROM_COPIES && SPARES_RESERVED_FROM_COPIES < SPARES_RESERVED);
const _: () = assert!(SPARES_WANTED <= SPARES_KEPT_MIN);
const _: () = assert!(PENDING_MAIL_BYTES_MAX < PENDING_OUTCOME_BYTES_MAX);
const _: () = assert!(BLOCK_BYTES.is_multiple_of(ALIGN_BYTES));
const _: () = assert!(STATES_MAX < 255);
const _: () = assert!(CHECKPOINT_SLICE_BYTES <= CHECKPOINT_WRITE_BYTES);
