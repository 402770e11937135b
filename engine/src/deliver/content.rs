//! Message content on its way to the wire: octets from the spool's map as they are, or dot-stuffed copies of them.
//!
//! RFC 5321 §4.1.1.4: content ends with CRLF.CRLF, where the first CRLF is the content's own last line ending; content
//! without one gets it. RFC 5321 §4.5.2: a line that begins with a dot gets another one. Most content has no such line
//! and is sent without a copy; the rest is copied in windows, so that a large message never doubles in memory. Behind
//! BDAT (RFC 3030 §2) a length says where content ends: nothing is stuffed or copied. It ends with a CRLF all the same,
//! so that what arrives does not depend on how it was sent.

use std::ops::Range;

use memchr::memmem;

use crate::limits::STUFF_WINDOW_OCTETS;

/// A message's octets, wire-ready but for dot-stuffing: `prefix` (headers put in front), then `body` (the rest).
pub trait Content {
    /// Owns or pins the memory that it shows.
    type Piece: AsRef<[u8]>;
    fn prefix_piece(&self) -> Self::Piece;
    fn body_piece(&self) -> Self::Piece;
}

impl Content for postrider_spool::Message {
    type Piece = postrider_spool::Piece;

    fn prefix_piece(&self) -> Self::Piece {
        Self::prefix_piece(self)
    }

    fn body_piece(&self) -> Self::Piece {
        Self::body_piece(self)
    }
}

/// Octets to write. Written in order, they are the connection's stream.
#[derive(Debug)]
pub enum Chunk<P> {
    Bytes(Vec<u8>),
    Spool(P),
}

impl<P: AsRef<[u8]>> AsRef<[u8]> for Chunk<P> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Spool(piece) => piece.as_ref(),
        }
    }
}

/// Appends text to the stream, in the last chunk where that is ours.
pub fn push_bytes<P>(out: &mut Vec<Chunk<P>>, bytes: &[u8]) {
    match out.last_mut() {
        Some(Chunk::Bytes(last)) => last.extend_from_slice(bytes),
        _ => {
            // A group of commands follows, or a number of them, each of which would make it grow.
            let mut chunk = Vec::with_capacity(bytes.len().max(COMMANDS_OCTETS_TYPICAL));
            chunk.extend_from_slice(bytes);
            out.push(Chunk::Bytes(chunk));
        }
    }
}

/// Puts one message's content into the stream, final dot included, or BDAT and its one chunk.
#[derive(Debug)]
pub enum ContentWriter<P> {
    Chunk {
        prefix: P,
        body: P,
    },
    Plain {
        prefix: P,
        body: P,
    },
    Stuffed {
        prefix: P,
        body: P,
        position: usize,
    },
    /// What ends the content (RFC 5321 §4.1.1.4).
    End(&'static [u8]),
    Finished,
}

/// `BDAT <size> LAST` for all of the content.
pub fn chunk_command<C: Content>(content: &C) -> String {
    let (prefix, body) = (content.prefix_piece(), content.body_piece());
    let (prefix, body) = (prefix.as_ref(), body.as_ref());
    format!("BDAT {} LAST", prefix.len() + body.len() + chunk_end(prefix, body).len())
}

impl<P: AsRef<[u8]>> ContentWriter<P> {
    /// One chunk, with its command in front.
    pub fn chunk<C: Content<Piece = P>>(content: &C) -> Self {
        Self::Chunk { prefix: content.prefix_piece(), body: content.body_piece() }
    }

    pub fn new<C: Content<Piece = P>>(content: &C, dot_lines: bool) -> Self {
        let (prefix, body) = (content.prefix_piece(), content.body_piece());
        if dot_lines { Self::Stuffed { prefix, body, position: 0 } } else { Self::Plain { prefix, body } }
    }

    /// Appends what comes next and returns its octets. Call again, when that was written, unless it is finished.
    pub fn write(&mut self, out: &mut Vec<Chunk<P>>) -> usize {
        let octets = self.write_but_end(out);
        let Self::End(dot) = *self else { return octets };
        *self = Self::Finished;
        push_bytes(out, dot);
        octets + dot.len()
    }

    /// The same, but for the final dot, which is left for [`Self::write`]. A chunk has none, and is written whole.
    pub fn write_but_end(&mut self, out: &mut Vec<Chunk<P>>) -> usize {
        match std::mem::replace(self, Self::Finished) {
            Self::Finished => 0,
            Self::End(dot) => {
                *self = Self::End(dot);
                0
            }
            Self::Chunk { prefix, body } => {
                let end = chunk_end(prefix.as_ref(), body.as_ref());
                let size = prefix.as_ref().len() + body.as_ref().len() + end.len();
                let command = format!("BDAT {size} LAST\r\n");
                push_bytes(out, command.as_bytes());
                out.extend([prefix, body].into_iter().filter(|p| !p.as_ref().is_empty()).map(Chunk::Spool));
                if !end.is_empty() {
                    push_bytes(out, end);
                }
                command.len() + size
            }
            Self::Plain { prefix, body } => {
                let octets = prefix.as_ref().len() + body.as_ref().len();
                *self = Self::End(final_dot(prefix.as_ref(), body.as_ref()));
                out.extend([prefix, body].into_iter().filter(|p| !p.as_ref().is_empty()).map(Chunk::Spool));
                octets
            }
            Self::Stuffed { prefix, body, position } => {
                let total = prefix.as_ref().len() + body.as_ref().len();
                let window = position..total.min(position + STUFF_WINDOW_OCTETS);
                let mut bytes = Vec::with_capacity(window.len() + window.len() / 16 + 8);
                stuff(prefix.as_ref(), body.as_ref(), window.clone(), &mut bytes);
                *self = if window.end == total {
                    Self::End(final_dot(prefix.as_ref(), body.as_ref()))
                } else {
                    Self::Stuffed { prefix, body, position: window.end }
                };
                let octets = bytes.len();
                out.push(Chunk::Bytes(bytes));
                octets
            }
        }
    }

    /// Whether only the final dot is left.
    pub fn is_at_end(&self) -> bool {
        matches!(self, Self::End(_))
    }

    pub fn is_finished(&self) -> bool {
        matches!(self, Self::Finished)
    }
}

/// The octets that end the content (RFC 5321 §4.1.1.4).
fn final_dot(prefix: &[u8], body: &[u8]) -> &'static [u8] {
    match last_two(prefix, body) {
        [Some(b'\r'), Some(b'\n')] => b".\r\n",
        // No content at all: the CRLF that ended DATA serves.
        [None, None] => b".\r\n",
        _ => b"\r\n.\r\n",
    }
}

/// What a chunk lacks of its last line ending.
fn chunk_end(prefix: &[u8], body: &[u8]) -> &'static [u8] {
    match last_two(prefix, body) {
        [Some(b'\r'), Some(b'\n')] | [None, None] => b"",
        _ => b"\r\n",
    }
}

fn last_two(prefix: &[u8], body: &[u8]) -> [Option<u8>; 2] {
    let mut last = body.iter().rev().chain(prefix.iter().rev()).copied();
    let second = last.next();
    [last.next(), second]
}

/// Appends `window` of prefix and body together, with a dot more before each line that begins with one.
fn stuff(prefix: &[u8], body: &[u8], window: Range<usize>, to: &mut Vec<u8>) {
    let border = prefix.len();
    let before =
        |position: usize| position.checked_sub(1).map(|p| if p < border { prefix[p] } else { body[p - border] });
    let parts = [
        (window.start.min(border), &prefix[window.start.min(border)..window.end.min(border)]),
        (window.start.max(border), &body[window.start.max(border) - border..window.end.max(border) - border]),
    ];
    for (position, part) in parts {
        let previous = [position.checked_sub(1).and_then(before), before(position)];
        let begins_line = matches!(previous, [Some(b'\r'), Some(b'\n')] | [None, None]);
        if begins_line && part.first() == Some(&b'.') {
            to.push(b'.');
        }
        // "\r\n." can overlap the part's first two octets only by the case above or by the two cases below.
        let split = match (previous[1], part) {
            (Some(b'\r'), [b'\n', b'.', ..]) => 1,
            _ => 0,
        };
        to.extend_from_slice(&part[..split]);
        if split == 1 {
            to.push(b'.');
        }
        let mut copied = split;
        for found in memmem::find_iter(&part[split..], b"\r\n.") {
            let dot = split + found + 2;
            to.extend_from_slice(&part[copied..dot]);
            to.push(b'.');
            copied = dot;
        }
        to.extend_from_slice(&part[copied..]);
    }
}

/// RSET, MAIL and some RCPT.
const COMMANDS_OCTETS_TYPICAL: usize = 256;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Whole(Vec<u8>, Vec<u8>);

    impl Content for Whole {
        type Piece = Vec<u8>;
        fn prefix_piece(&self) -> Vec<u8> {
            self.0.clone()
        }
        fn body_piece(&self) -> Vec<u8> {
            self.1.clone()
        }
    }

    fn written(prefix: &[u8], body: &[u8], dot_lines: bool) -> Vec<u8> {
        let mut writer = ContentWriter::new(&Whole(prefix.to_vec(), body.to_vec()), dot_lines);
        let mut out = Vec::new();
        let mut octets = 0;
        while !writer.is_finished() {
            octets += writer.write(&mut out);
        }
        let wire = out.iter().flat_map(|chunk| chunk.as_ref().to_vec()).collect::<Vec<_>>();
        assert_eq!(octets, wire.len());
        wire
    }

    /// RFC 5321 §4.5.2 read literally.
    fn stuffed_slowly(content: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        for (at, &octet) in content.iter().enumerate() {
            let begins_line = at == 0 || content[..at].ends_with(b"\r\n");
            if octet == b'.' && begins_line {
                wire.push(b'.');
            }
            wire.push(octet);
        }
        if !content.is_empty() && !content.ends_with(b"\r\n") {
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(b".\r\n");
        wire
    }

    #[test]
    fn content_ends_with_its_own_line_ending_or_gets_one() {
        assert_eq!(written(b"A: b\r\n", b"\r\ntext\r\n", false), b"A: b\r\n\r\ntext\r\n.\r\n");
        assert_eq!(written(b"A: b\r\n", b"\r\ntext", false), b"A: b\r\n\r\ntext\r\n.\r\n");
        assert_eq!(written(b"A: b\r\n", b"", false), b"A: b\r\n.\r\n");
        assert_eq!(written(b"A: b\r", b"\n", false), b"A: b\r\n.\r\n");
        assert_eq!(written(b"", b"", false), b".\r\n");
        assert_eq!(written(b"", b"\n", false), b"\n\r\n.\r\n");
    }

    #[test]
    fn content_without_dot_lines_is_not_copied() {
        let mut out = Vec::new();
        ContentWriter::new(&Whole(b"A: b\r\n".to_vec(), b"\r\nx\r\n".to_vec()), false).write(&mut out);
        assert!(matches!(&out[..], [Chunk::Spool(_), Chunk::Spool(_), Chunk::Bytes(_)]));
    }

    /// RFC 3030 §2: the chunk is its octets, and nothing in them is a dot line.
    #[test]
    fn a_chunk_is_its_length_and_the_content_as_it_is() {
        let chunk = |prefix: &[u8], body: &[u8]| {
            let content = Whole(prefix.to_vec(), body.to_vec());
            let mut out = Vec::new();
            let octets = ContentWriter::chunk(&content).write(&mut out);
            let wire = out.iter().flat_map(|chunk| chunk.as_ref().to_vec()).collect::<Vec<_>>();
            assert_eq!(octets, wire.len());
            assert!(wire.starts_with(format!("{}\r\n", chunk_command(&content)).as_bytes()));
            String::from_utf8(wire).expect("text")
        };
        assert_eq!(chunk(b"A: b\r\n", b"\r\n.\r\n.x\r\n"), "BDAT 15 LAST\r\nA: b\r\n\r\n.\r\n.x\r\n");
        assert_eq!(chunk(b"A: b\r\n", b"\r\ntext"), "BDAT 14 LAST\r\nA: b\r\n\r\ntext\r\n", "a last line ending");
        assert_eq!(chunk(b"", b""), "BDAT 0 LAST\r\n");
        let mut out = vec![Chunk::Bytes(b"RSET\r\n".to_vec())];
        ContentWriter::chunk(&Whole(b"A: b\r\n".to_vec(), b"\r\n.\r\n".to_vec())).write(&mut out);
        assert!(matches!(&out[..], [Chunk::Bytes(_), Chunk::Spool(_), Chunk::Spool(_)]), "one text, nothing copied");
    }

    #[test]
    fn lines_that_begin_with_a_dot_get_another_rfc_5321_4_5_2() {
        assert_eq!(written(b".a\r\n", b".b\r\n..\r\n.", true), b"..a\r\n..b\r\n...\r\n..\r\n.\r\n");
        assert_eq!(written(b"", b".\r\n", true), b"..\r\n.\r\n");
        assert_eq!(written(b"a\r", b"\n.b\r\n", true), b"a\r\n..b\r\n.\r\n");
        assert_eq!(written(b"a\r\n", b"b.c\n.d\r.e\r\n", true), b"a\r\nb.c\n.d\r.e\r\n.\r\n", "only behind CRLF");
    }

    #[test]
    fn a_large_copy_is_made_in_windows() {
        // Dots fall on every place relative to the windows' borders.
        let body = b"\r\n.xy".repeat(STUFF_WINDOW_OCTETS / 2);
        let mut writer = ContentWriter::new(&Whole(b"A: b".to_vec(), body.clone()), true);
        let mut out = Vec::new();
        writer.write(&mut out);
        assert!(out[0].as_ref().len() < STUFF_WINDOW_OCTETS * 2);
        assert!(!writer.is_finished());
        let content = [b"A: b", &body[..]].concat();
        assert!(written(b"A: b", &body, true) == stuffed_slowly(&content));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn stuffing_agrees_with_the_rule_at_any_border(
            content in proptest::collection::vec(
                prop_oneof![Just(b'.'), Just(b'\r'), Just(b'\n'), Just(b'x')], 0..40),
            border in 0_usize..41,
            window in 0_usize..41,
        ) {
            let (prefix, body) = content.split_at(border.min(content.len()));
            let expected = stuffed_slowly(&content);
            prop_assert_eq!(&written(prefix, body, true), &expected);
            // The same with a border between windows anywhere.
            let window = window.min(content.len());
            let mut wire = Vec::new();
            stuff(prefix, body, 0..window, &mut wire);
            stuff(prefix, body, window..content.len(), &mut wire);
            wire.extend_from_slice(final_dot(prefix, body));
            prop_assert_eq!(wire, expected);
        }
    }
}
