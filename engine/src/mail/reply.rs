//! An SMTP reply (RFC 5321 §4.2) as a peer sends it, and its incremental parser.
//!
//! Real peers bend the grammar, so the parser is lenient where nothing can be misunderstood: a bare LF ends a line,
//! the space after the code may be missing, a continued line may lack its code, lines may differ in code (the last
//! one rules), blank lines are skipped, and told of where they stand in place of a reply. It is strict where guessing
//! could be dangerous: what does not begin with a code of 200–599 is no reply. All lengths are bounded: text beyond
//! them is dropped, a peer that goes on and on is given up.
//!
//! Text is made safe to store and show: octets that are not UTF-8 are replaced, control characters become spaces.

use std::fmt;

use crate::limits::{REPLY_DROPPED_OCTETS_MAX, REPLY_LINE_OCTETS_MAX, REPLY_LINES_MAX};

/// One complete reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// 200–599.
    pub code: u16,
    /// Lines joined by LF, without code and separator.
    lines: String,
}

impl Reply {
    pub fn new(code: u16, text: &str) -> Self {
        Self { code, lines: text.to_owned() }
    }

    /// The text of each line, without the code; an enhanced status is still in it.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.split('\n')
    }

    /// The lines joined by one space, each without its enhanced status code.
    pub fn text(&self) -> String {
        self.enhanced_and_text().1
    }

    /// RFC 3463 status at the beginning of the first line (RFC 2034 §4), also from peers that did not announce it.
    pub fn enhanced(&self) -> Option<(u8, u16, u16)> {
        split_enhanced(self.lines().next().unwrap_or_default()).0
    }

    /// [`Self::enhanced`] and [`Self::text`], for which the first line is looked at once.
    pub fn enhanced_and_text(&self) -> (Option<(u8, u16, u16)>, String) {
        let mut lines = self.lines().map(split_enhanced);
        let (enhanced, first) = lines.next().unwrap_or_default();
        let mut text = String::with_capacity(self.lines.len());
        text.push_str(first.trim_ascii());
        for (_, line) in lines {
            let line = line.trim_ascii();
            if !text.is_empty() && !line.is_empty() {
                text.push(' ');
            }
            text.push_str(line);
        }
        (enhanced, text)
    }

    /// 2yz: done.
    pub fn is_positive(&self) -> bool {
        self.code / 100 == 2
    }

    /// 4yz: not now.
    pub fn is_transient(&self) -> bool {
        self.code / 100 == 4
    }

    /// 5yz: not ever.
    pub fn is_permanent(&self) -> bool {
        self.code / 100 == 5
    }
}

/// What a peer sent is no SMTP reply, or never ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyError {
    NotAReply,
    TooManyLines,
    TooLong,
}

impl fmt::Display for ReplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAReply => "the peer sent something that is not an SMTP reply",
            Self::TooManyLines => "the peer's reply has too many lines",
            Self::TooLong => "the peer's reply is too long",
        })
    }
}

impl std::error::Error for ReplyError {}

/// Assembles replies from octets that come in pieces of any size.
///
/// After an error the parser is of no further use: there is no telling where the next reply begins.
#[derive(Debug, Default)]
pub struct ReplyParser {
    /// The unfinished line, at most [`REPLY_LINE_OCTETS_MAX`] octets of it.
    line: Vec<u8>,
    /// Finished lines of the unfinished reply.
    lines: String,
    lines_count: usize,
    /// Octets beyond the bound of a line, and those of blank lines, since the last reply.
    dropped_octets: usize,
    blank: bool,
}

impl ReplyParser {
    /// Takes octets up to the end of one reply and says how many; `None` when all were taken and it isn't complete.
    pub fn parse(&mut self, input: &[u8]) -> (usize, Option<Result<Reply, ReplyError>>) {
        let mut consumed = 0;
        while let Some(length) = memchr::memchr(b'\n', &input[consumed..]) {
            let line = &input[consumed..consumed + length];
            let finished = if self.line.is_empty() && length <= REPLY_LINE_OCTETS_MAX {
                self.read_line(line.trim_ascii_end())
            } else {
                self.take(line).and_then(|()| self.finish_line())
            };
            consumed += length + 1;
            if let Some(result) = finished.transpose() {
                return (consumed, Some(result));
            }
        }
        match self.take(&input[consumed..]) {
            Ok(()) => (input.len(), None),
            Err(error) => (input.len(), Some(Err(error))),
        }
    }

    /// Whether a blank line stood where a reply should begin, since this was last asked. Where several replies are
    /// awaited it may have been one of them.
    pub fn take_blank(&mut self) -> bool {
        std::mem::take(&mut self.blank)
    }

    fn take(&mut self, octets: &[u8]) -> Result<(), ReplyError> {
        let kept = octets.len().min(REPLY_LINE_OCTETS_MAX - self.line.len());
        self.line.extend_from_slice(&octets[..kept]);
        self.drop_octets(octets.len() - kept)
    }

    fn drop_octets(&mut self, count: usize) -> Result<(), ReplyError> {
        self.dropped_octets += count;
        if self.dropped_octets > REPLY_DROPPED_OCTETS_MAX { Err(ReplyError::TooLong) } else { Ok(()) }
    }

    /// The line is complete but for its LF.
    fn finish_line(&mut self) -> Result<Option<Reply>, ReplyError> {
        let mut line = std::mem::take(&mut self.line);
        let result = self.read_line(line.trim_ascii_end());
        line.clear();
        self.line = line;
        result
    }

    fn read_line(&mut self, line: &[u8]) -> Result<Option<Reply>, ReplyError> {
        let inside = self.lines_count > 0;
        if line.is_empty() {
            self.blank |= !inside;
            self.drop_octets(1)?;
            return Ok(None);
        }
        let (code, last, text) = match split_code(line) {
            Some(parts) => parts,
            None if inside => (0, false, line),
            None => return Err(ReplyError::NotAReply),
        };
        if self.lines_count == REPLY_LINES_MAX {
            return Err(ReplyError::TooManyLines);
        }
        if inside {
            self.lines.push('\n');
        }
        push_safe(&mut self.lines, text);
        self.lines_count += 1;
        if !last {
            return Ok(None);
        }
        self.lines_count = 0;
        self.dropped_octets = 0;
        Ok(Some(Reply { code, lines: std::mem::take(&mut self.lines) }))
    }
}

/// `(code, is the last line, text)`.
fn split_code(line: &[u8]) -> Option<(u16, bool, &[u8])> {
    let (digits, rest) = line.split_at_checked(3)?;
    let valid = matches!(digits[0], b'2'..=b'5') && digits[1].is_ascii_digit() && digits[2].is_ascii_digit();
    if !valid {
        return None;
    }
    let code = digits.iter().fold(0, |code, digit| code * 10 + u16::from(digit - b'0'));
    match rest {
        [] => Some((code, true, rest)),
        [b'-', text @ ..] => Some((code, false, text)),
        [b' ' | b'\t', text @ ..] => Some((code, true, text)),
        // "2500 octets" is no reply, "250OK" is one.
        [b'0'..=b'9', ..] => None,
        _ => Some((code, true, rest)),
    }
}

fn push_safe(to: &mut String, text: &[u8]) {
    // All that most replies have.
    if let Some(text) =
        std::str::from_utf8(text).ok().filter(|text| text.bytes().all(|octet| matches!(octet, b' '..=b'~')))
    {
        return to.push_str(text);
    }
    to.reserve(text.len());
    to.extend(String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { ' ' } else { c }));
}

/// The status code `2.1.5` at the beginning of `line`, and the text behind it.
fn split_enhanced(line: &str) -> (Option<(u8, u16, u16)>, &str) {
    let end = line.bytes().position(|octet| octet == b' ');
    let (word, rest) = end.map_or((line, ""), |end| (&line[..end], &line[end + 1..]));
    match parse_enhanced(word.as_bytes()) {
        Some(status) => (Some(status), rest),
        None => (None, line),
    }
}

fn parse_enhanced(word: &[u8]) -> Option<(u8, u16, u16)> {
    let [class @ (b'2' | b'4' | b'5'), b'.', rest @ ..] = word else { return None };
    let dot = rest.iter().position(|&octet| octet == b'.')?;
    let number = |digits: &[u8]| {
        let is_plain = matches!(digits.len(), 1..=3) && digits.iter().all(u8::is_ascii_digit);
        is_plain.then(|| digits.iter().fold(0, |number, digit| number * 10 + u16::from(digit - b'0')))
    };
    Some((class - b'0', number(&rest[..dot])?, number(&rest[dot + 1..])?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse_all(input: &[u8]) -> Vec<Result<Reply, ReplyError>> {
        parse_in_pieces(input, input.len().max(1))
    }

    fn parse_in_pieces(input: &[u8], octets: usize) -> Vec<Result<Reply, ReplyError>> {
        let mut parser = ReplyParser::default();
        let mut replies = Vec::new();
        for mut piece in input.chunks(octets) {
            while !piece.is_empty() {
                let (consumed, reply) = parser.parse(piece);
                assert!(consumed > 0, "always makes progress");
                piece = &piece[consumed..];
                if let Some(reply) = reply {
                    let failed = reply.is_err();
                    replies.push(reply);
                    if failed {
                        return replies;
                    }
                }
            }
        }
        replies
    }

    fn one(input: &str) -> Reply {
        let mut replies = parse_all(input.as_bytes());
        assert_eq!(replies.len(), 1, "{input:?}");
        replies.remove(0).expect("a reply")
    }

    #[test]
    fn plain_replies_follow_rfc_5321_4_2() {
        assert_eq!(one("250 OK\r\n"), Reply::new(250, "OK"));
        assert_eq!(one("250\r\n"), Reply::new(250, ""));
        assert_eq!(one("354 \r\n"), Reply::new(354, ""));
        let reply = one("250-first\r\n250-second\r\n250 last\r\n");
        assert_eq!(reply.lines().collect::<Vec<_>>(), ["first", "second", "last"]);
        assert_eq!(reply.text(), "first second last");
    }

    #[test]
    fn several_replies_come_one_at_a_time() {
        let mut parser = ReplyParser::default();
        let input = b"250 a\r\n354 b\r\n25";
        let (consumed, reply) = parser.parse(input);
        assert_eq!((consumed, reply), (7, Some(Ok(Reply::new(250, "a")))));
        let (more, reply) = parser.parse(&input[consumed..]);
        assert_eq!((more, reply), (7, Some(Ok(Reply::new(354, "b")))));
        assert_eq!(parser.parse(&input[consumed + more..]), (2, None));
    }

    #[test]
    fn lenient_where_nothing_can_be_misunderstood() {
        assert_eq!(one("250 bare LF\n"), Reply::new(250, "bare LF"));
        assert_eq!(one("250OK\r\n"), Reply::new(250, "OK"));
        assert_eq!(one("250\tOK\r\n"), Reply::new(250, "OK"));
        assert_eq!(one("\r\n\r\n250 after blank lines\r\n"), Reply::new(250, "after blank lines"));
        assert_eq!(one("220-hello\r\nno code here\r\n220 end\r\n").text(), "hello no code here end");
        assert_eq!(one("250-says yes\r\n550 then no\r\n").code, 550, "the last line rules");
        assert_eq!(one("250 \x00nul\x1b[31m\u{85}\r\n").text(), "nul [31m", "control characters are not shown");
        assert!(parse_all(b"250 caf\xe9\r\n")[0].as_ref().is_ok_and(|r| r.text() == "caf\u{fffd}"));
    }

    #[test]
    fn a_blank_line_in_place_of_a_reply_is_told() {
        let blank = |input: &str| {
            let mut parser = ReplyParser::default();
            parser.parse(input.as_bytes());
            (parser.take_blank(), parser.take_blank())
        };
        assert_eq!(blank("250 a\r\n"), (false, false));
        assert_eq!(blank("\r\n250 a\r\n"), (true, false), "once");
        assert_eq!(blank(" \r\n"), (true, false), "without a reply, too");
        assert_eq!(blank("250-a\r\n\r\n250 b\r\n"), (false, false), "inside a reply it is a line of it");
    }

    #[test]
    fn strict_where_guessing_is_dangerous() {
        for input in ["hello\r\n", "99 x\r\n", "2500 octets\r\n", "150 mark\r\n", "650 no\r\n", "25\r\n", "-250 x\r\n"]
        {
            assert_eq!(parse_all(input.as_bytes()), [Err(ReplyError::NotAReply)], "{input:?}");
        }
    }

    #[test]
    fn enhanced_status_codes_are_taken_off_each_line() {
        let reply = one("550-5.1.1 The account\r\n550 5.1.1 does not exist\r\n");
        assert_eq!(reply.enhanced(), Some((5, 1, 1)));
        assert_eq!(reply.text(), "The account does not exist");
        assert_eq!(one("250 2.0.0\r\n").enhanced(), Some((2, 0, 0)));
        assert_eq!(one("550 5.7.999 x\r\n").enhanced(), Some((5, 7, 999)));
        for text in ["5.1 x", "5.1.1.1 x", "3.1.1 x", "5.1.1: x", "5.1000.1 x", "5..1 x", "5.+1.1 x", "x 5.1.1"] {
            let reply = one(&format!("550 {text}\r\n"));
            assert_eq!((reply.enhanced(), reply.text().as_str()), (None, text));
        }
    }

    #[test]
    fn every_length_is_bounded() {
        let long = format!("250 {}\r\n", "x".repeat(REPLY_LINE_OCTETS_MAX * 2));
        assert_eq!(one(&long).text().len(), REPLY_LINE_OCTETS_MAX - 4, "the rest is dropped");
        let endless = vec![b'2'; REPLY_LINE_OCTETS_MAX + REPLY_DROPPED_OCTETS_MAX + 1];
        assert_eq!(parse_in_pieces(&endless, 1000), [Err(ReplyError::TooLong)]);
        let blank = vec![b'\n'; REPLY_DROPPED_OCTETS_MAX + 1];
        assert_eq!(parse_in_pieces(&blank, 1000), [Err(ReplyError::TooLong)]);
        let lines = "250-x\r\n".repeat(REPLY_LINES_MAX + 1);
        assert_eq!(parse_all(lines.as_bytes()), [Err(ReplyError::TooManyLines)]);
        let just = format!("{}250 x\r\n", "250-x\r\n".repeat(REPLY_LINES_MAX - 1));
        assert_eq!(one(&just).lines().count(), REPLY_LINES_MAX);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

        #[test]
        fn pieces_of_any_size_give_the_same_replies(
            input in proptest::collection::vec(
                prop_oneof![Just("250 ok\r\n"), Just("250-"), Just("550 5.1.1 no\n"), Just("\r\n"), Just("354")],
                0..20,
            ),
            octets in 1_usize..30,
        ) {
            let input = input.concat();
            prop_assert_eq!(parse_all(input.as_bytes()), parse_in_pieces(input.as_bytes(), octets));
        }

        #[test]
        fn any_octets_are_survived(input in proptest::collection::vec(any::<u8>(), 0..300), octets in 1_usize..30) {
            prop_assert_eq!(parse_all(&input), parse_in_pieces(&input, octets));
        }
    }
}
