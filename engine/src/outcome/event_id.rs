//! The names of an event and of the engine that wrote it.

use std::fmt;
use std::str::FromStr;

use postrider_spool::record::{LogId, Sequence};
use uuid::Uuid;

/// Names the engine that wrote an event; stable as long as its spool exists. Written as a UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub [u8; 16]);

impl NodeId {
    /// A UUID for a session, so that sessions of several nodes can be told apart (version 8 of RFC 9562 §5.8).
    pub(super) fn session(&self, session_id: u64) -> Self {
        let mut bytes = self.0;
        bytes[6] = bytes[6] & 0x0f | 0x80;
        bytes[8..].copy_from_slice(&session_id.to_be_bytes());
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(bytes)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Uuid::from_bytes(self.0).hyphenated().encode_lower(&mut Uuid::encode_buffer()))
    }
}

impl FromStr for NodeId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Of the forms that a UUID may be written in, only the one that `Display` gives.
        let uuid = Uuid::try_parse(text).ok().filter(|_| text.len() == 36);
        uuid.map(|uuid| Self(*uuid.as_bytes())).ok_or(ParseIdError("a node id is a UUID"))
    }
}

/// Names an event for good. `index` is the recipient's place in the record.
///
/// Written `LLLL-SSSSSSSSSSSS-I`: log and sequence in hexadecimal as in a message id, the index in decimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId {
    pub log: LogId,
    pub sequence: Sequence,
    pub index: u32,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}-{:012x}-{}", self.log.0, self.sequence.0, self.index)
    }
}

impl FromStr for EventId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: ParseIdError = ParseIdError("an event id is LLLL-SSSSSSSSSSSS-I");
        let mut parts = text.splitn(3, '-');
        let (Some(log), Some(sequence), Some(index)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(EXPECTED);
        };
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
        if log.len() != 4 || sequence.len() != 12 || !digits(log) || !digits(sequence) {
            return Err(EXPECTED);
        }
        if index.is_empty() || !index.bytes().all(|b| b.is_ascii_digit()) {
            return Err(EXPECTED);
        }
        Ok(Self {
            log: LogId(u16::from_str_radix(log, 16).map_err(|_| EXPECTED)?),
            sequence: Sequence(u64::from_str_radix(sequence, 16).map_err(|_| EXPECTED)?),
            index: index.parse().map_err(|_| EXPECTED)?,
        })
    }
}

/// The text is not an id of the kind asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParseIdError(&'static str);

impl fmt::Display for ParseIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for ParseIdError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::event::tests::NODE;

    #[test]
    fn ids_are_read_back() {
        let id = EventId { log: LogId(0xbeef), sequence: Sequence(0x1_0000_0001), index: 12 };
        assert_eq!(id.to_string(), "beef-000100000001-12");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "beef-000100000001", "beef-000100000001-", "beef-000100000001--1", "beef-+00100000001-1"] {
            assert!(bad.parse::<EventId>().is_err(), "{bad}");
        }
        assert_eq!(NODE.to_string().parse(), Ok(NODE));
        for bad in ["", "557f3ad42c8c41ee976e782d7e12e173", "557f3ad4-2c8c-41ee-976e-782d7e12e17é"] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
    }
}
