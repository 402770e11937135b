//! A message as its readers see it: in the map or in memory of its own, checked when used.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fmt, io};

use crate::error::ReadError;
use crate::file::Map;
use crate::format::RecordHeader;
use crate::record::{ArchivedEnvelope, MessageId};
use crate::storage::ReadBuffer;

/// A message's envelope and content, in place. Cheap to clone; any clone keeps the memory alive, and a segment that is
/// mapped by one is not reused.
#[derive(Clone)]
pub struct Message {
    inner: Arc<Inner>,
}

impl Message {
    /// A record that begins at `start` of `memory`. The header must have been read from there.
    pub(crate) fn new(memory: Memory, start: usize, generation: u64, header: RecordHeader) -> Self {
        Self { inner: Arc::new(Inner { memory, start, generation, header, body: None, lease: None }) }
    }

    /// The message with the shared body whose record begins at `start` of `memory`. Its checksum must have been checked
    /// when it came from the medium.
    pub(crate) fn with_body(&self, memory: Memory, start: usize, header: RecordHeader) -> Self {
        let Inner { memory: own, start: own_start, generation, header: own_header, lease, .. } = &*self.inner;
        let body = Some(SharedBody { memory, start, header });
        let inner = Inner {
            memory: own.clone(),
            start: *own_start,
            generation: *generation,
            header: *own_header,
            body,
            lease: lease.clone(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The message's memory counts among what was read until the last of its clones and pieces is gone.
    pub(crate) fn with_lease(self, lease: Arc<Lease>) -> Self {
        let inner = Arc::try_unwrap(self.inner).map(|inner| Inner { lease: Some(lease), ..inner });
        Self { inner: inner.map_or_else(|shared| shared, Arc::new) }
    }

    pub fn id(&self) -> MessageId {
        MessageId::from_raw(self.inner.header.message)
    }

    /// The envelope, after its checksum and its structure were checked.
    pub fn envelope(&self) -> Result<&ArchivedEnvelope, ReadError> {
        let inner = &*self.inner;
        let head = inner.memory.bytes(inner.start, inner.header.head_bytes());
        let damaged = |what| self.check_intact().err().unwrap_or(ReadError::Damaged { what });
        if !inner.header.head_matches(inner.generation, head) {
            return Err(damaged("the envelope's checksum differs"));
        }
        let archive = &head[inner.header.archive_range()];
        rkyv::access::<ArchivedEnvelope, rkyv::rancor::Failure>(archive)
            .map_err(|_| damaged("the envelope is not well formed"))
    }

    /// What somebody wants to know of the envelope and the content, unless the disk fails meanwhile.
    pub fn read<T>(&self, read: impl FnOnce(&ArchivedEnvelope) -> T) -> Result<T, ReadError> {
        let read = read(self.envelope()?);
        self.check_intact().map(|()| read)
    }

    /// Whether what was read of it so far is what the file has: its disk may have failed, and then there were zeroes.
    /// To be asked before anything comes of it.
    pub fn is_intact(&self) -> bool {
        let Inner { memory, body, .. } = &*self.inner;
        !memory.is_lost() && body.as_ref().is_none_or(|body| !body.memory.is_lost())
    }

    /// The same, as what a read would have come to.
    pub fn check_intact(&self) -> Result<(), ReadError> {
        if self.is_intact() { Ok(()) } else { Err(lost()) }
    }

    /// What was put in front of the message as it came.
    pub fn prefix(&self) -> &[u8] {
        self.bytes(self.inner.header.prefix_range())
    }

    /// The message as it came.
    pub fn body(&self) -> &[u8] {
        self.inner.body()
    }

    /// Octets of prefix and body.
    pub fn size(&self) -> u64 {
        (self.prefix().len() + self.body().len()) as u64
    }

    pub fn prefix_piece(&self) -> Piece {
        Piece { inner: Arc::clone(&self.inner), is_body: false }
    }

    pub fn body_piece(&self) -> Piece {
        Piece { inner: Arc::clone(&self.inner), is_body: true }
    }

    pub(crate) fn header(&self) -> &RecordHeader {
        &self.inner.header
    }

    /// Whether what its own record holds of prefix and body has its checksum. A shared body's is checked when it is
    /// read.
    pub fn content_matches(&self) -> bool {
        self.inner.header.content_matches(self.inner.generation, self.bytes(self.inner.header.content_range()))
    }

    /// Bytes at `range`, counted from the record's begin.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.inner.bytes(range)
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message").field("id", &self.id()).field("size", &self.size()).finish()
    }
}

/// A part of a message's content that keeps its memory alive and in place, so that it may be named in a vector of a
/// ring operation.
#[derive(Clone)]
pub struct Piece {
    inner: Arc<Inner>,
    is_body: bool,
}

impl Piece {
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    pub fn is_empty(&self) -> bool {
        self.as_ref().is_empty()
    }

    /// Its octets for the kernel, and for nobody else: where the file can't be read, to touch them ends the process.
    pub fn to_send(&self) -> &[u8] {
        let (memory, start, range) = self.inner.place(self.is_body);
        memory.bytes_to_send(start + range.start, range.len())
    }

    /// As [`Message::is_intact`].
    pub fn is_intact(&self) -> bool {
        !self.inner.place(self.is_body).0.is_lost()
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        let (memory, start, range) = self.inner.place(self.is_body);
        memory.bytes(start + range.start, range.len())
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Piece").field("len", &self.len()).finish()
    }
}

/// Where a record's bytes are.
#[derive(Debug, Clone)]
pub(crate) enum Memory {
    Mapped(Arc<Map>),
    Owned(Arc<ReadBuffer>),
}

impl Memory {
    pub(crate) fn bytes(&self, start: usize, length: usize) -> &[u8] {
        match self {
            Self::Mapped(map) => map.bytes(start, length),
            Self::Owned(buffer) => &buffer[start..start + length],
        }
    }

    fn bytes_to_send(&self, start: usize, length: usize) -> &[u8] {
        match self {
            Self::Mapped(map) => map.bytes_to_send(start, length),
            Self::Owned(buffer) => &buffer[start..start + length],
        }
    }

    pub(crate) fn is_lost(&self) -> bool {
        match self {
            Self::Mapped(map) => map.is_lost(),
            Self::Owned(_) => false,
        }
    }
}

/// What is read of a map whose file can't be.
pub(crate) fn lost() -> ReadError {
    ReadError::from(&io::Error::other("the disk does not give it back"))
}

struct Inner {
    memory: Memory,
    /// Of the record in `memory`.
    start: usize,
    generation: u64,
    header: RecordHeader,
    /// In place of one in the record.
    body: Option<SharedBody>,
    /// Of memory that was read for it.
    lease: Option<Arc<Lease>>,
}

/// Bytes that are in somebody's hands, and count as such until this is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    held: Arc<AtomicU64>,
    bytes: u64,
}

impl Lease {
    pub(crate) fn new(held: &Arc<AtomicU64>, bytes: u64) -> Self {
        held.fetch_add(bytes, Ordering::Relaxed);
        Self { held: Arc::clone(held), bytes }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

struct SharedBody {
    memory: Memory,
    start: usize,
    header: RecordHeader,
}

impl Inner {
    fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.memory.bytes(self.start + range.start, range.len())
    }

    fn body(&self) -> &[u8] {
        let (memory, start, range) = self.place(true);
        memory.bytes(start + range.start, range.len())
    }

    /// Where the body is, or the prefix: a record, and a range of it.
    fn place(&self, is_body: bool) -> (&Memory, usize, Range<usize>) {
        match &self.body {
            Some(SharedBody { memory, start, header }) if is_body => (memory, *start, header.body_range()),
            _ if is_body => (&self.memory, self.start, self.header.body_range()),
            _ => (&self.memory, self.start, self.header.prefix_range()),
        }
    }
}
