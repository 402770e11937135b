//! One record's bytes: its header, what it says, its content, and the checksums of both.

use rkyv::api::high::to_bytes_in;
use rkyv::rancor::Failure;

use crate::append::is_settled;
use crate::format::{RECORD_HEADER_BYTES, RecordHeader};
use crate::limits::ALIGN_BYTES;
use crate::packed;
use crate::record::{CopiedState, Envelope, Outcome};
use crate::tombstone::Final;

/// What writes itself as an archive.
pub(crate) trait WriteArchive {
    fn write_to(&self, buffer: &mut Vec<u8>);

    /// An outcome with final fates only: once it is an event it is read by a start alone, with its whole frame, so it
    /// may refer to another one there.
    fn as_settled(&self) -> Option<&Outcome> {
        None
    }
}

/// An outcome behind another one in its frame.
pub(crate) struct Later<'a> {
    pub(crate) outcome: &'a Outcome,
    pub(crate) base: &'a Outcome,
}

impl WriteArchive for Later<'_> {
    fn write_to(&self, buffer: &mut Vec<u8>) {
        packed::write_later_outcome(self.outcome, self.base, buffer);
    }
}

impl WriteArchive for Envelope {
    fn write_to(&self, buffer: &mut Vec<u8>) {
        // Serialising can fail only where the writer does, and memory does not.
        to_bytes_in::<_, Failure>(self, buffer).expect("an archive in memory");
    }
}

impl WriteArchive for Outcome {
    fn write_to(&self, buffer: &mut Vec<u8>) {
        packed::write_outcome(self, buffer);
    }

    fn as_settled(&self) -> Option<&Outcome> {
        is_settled(self).then_some(self)
    }
}

impl WriteArchive for CopiedState {
    fn write_to(&self, buffer: &mut Vec<u8>) {
        packed::write_state(self, buffer);
    }
}

impl WriteArchive for Vec<Final> {
    fn write_to(&self, buffer: &mut Vec<u8>) {
        packed::write_tombstones(self, buffer);
    }
}

/// An archive as it was read: its pointers are relative, so that it is the same anywhere with the same alignment.
pub(crate) struct Verbatim<'a>(pub(crate) &'a [u8]);

impl WriteArchive for Verbatim<'_> {
    fn write_to(&self, buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(self.0);
    }
}

/// Writes a record but for its checksums, and fills in the header's lengths.
pub(crate) fn write_record(
    buffer: &mut Vec<u8>,
    header: &mut RecordHeader,
    archive: Option<&dyn WriteArchive>,
    state: Option<&CopiedState>,
    content: [&[u8]; 2],
) {
    let start = buffer.len();
    assert!((start as u64).is_multiple_of(ALIGN_BYTES));
    buffer.resize(start + RECORD_HEADER_BYTES, 0);
    header.archive_length = archive.map_or(0, |archive| write_archive(buffer, archive));
    header.state_length = state.map_or(0, |state| write_archive(buffer, state));
    header.prefix_length = content[0].len() as u32;
    header.body_length = content[1].len() as u32;
    buffer.reserve(content[0].len() + content[1].len() + ALIGN_BYTES as usize);
    buffer.extend_from_slice(content[0]);
    buffer.extend_from_slice(content[1]);
    pad(buffer);
    header.encode_unsealed(&mut buffer[start..start + RECORD_HEADER_BYTES]);
}

/// The buffer goes to a multiple of a block in the file, so an aligned position in it is one there.
pub(crate) fn write_archive(buffer: &mut Vec<u8>, archive: &dyn WriteArchive) -> u32 {
    let start = buffer.len();
    archive.write_to(buffer);
    let length = (buffer.len() - start) as u32;
    pad(buffer);
    length
}

pub(crate) fn pad(buffer: &mut Vec<u8>) {
    let length = buffer.len().next_multiple_of(ALIGN_BYTES as usize);
    buffer.resize(length, 0);
}
