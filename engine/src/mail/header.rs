//! The header block of a message, read in place: where each field lies, where the body begins (RFC 5322 §2.2).
//!
//! Nothing is refused here. A line that is neither a field nor a continuation comes out as [`Line::Junk`], and the
//! block goes on to the first empty line, because that is where verifiers and mail readers look for the body.

use std::borrow::Cow;
use std::ops::Range;

use memchr::memchr;

use super::address::is_host_name;
use super::mailboxes;

/// One logical line of a header block, with its continuation lines and final line ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line<'a> {
    Field(Field<'a>),
    /// Neither a field nor the continuation of one.
    Junk {
        start: usize,
        end: usize,
    },
}

/// A header field; offsets count from the start of the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field<'a> {
    /// As written, without white space before the colon. Printable ASCII.
    pub name: &'a [u8],
    /// All that follows the colon, folds and final CRLF included.
    pub value: &'a [u8],
    pub start: usize,
    pub end: usize,
}

impl Field<'_> {
    pub fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name.as_bytes())
    }

    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }
}

/// The lines of the header block of `content`, top to bottom.
pub fn lines(content: &[u8]) -> Lines<'_> {
    Lines { content, at: 0 }
}

/// The fields alone.
pub fn fields(content: &[u8]) -> impl Iterator<Item = Field<'_>> {
    lines(content).filter_map(|line| match line {
        Line::Field(field) => Some(field),
        Line::Junk { .. } => None,
    })
}

/// Where the body begins: behind the first empty line, or at the end.
pub fn body_start(content: &[u8]) -> usize {
    let mut lines = lines(content);
    lines.by_ref().for_each(drop);
    lines.body_start()
}

/// See [`lines`].
#[derive(Debug, Clone)]
pub struct Lines<'a> {
    content: &'a [u8],
    at: usize,
}

impl Lines<'_> {
    /// Where the body begins; meaningful once the iterator has ended.
    pub fn body_start(&self) -> usize {
        self.at + empty_line_length(&self.content[self.at..])
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = Line<'a>;

    fn next(&mut self) -> Option<Line<'a>> {
        let (content, start) = (self.content, self.at);
        let rest = &content[start..];
        if rest.is_empty() || empty_line_length(rest) > 0 {
            return None;
        }
        let mut end = line_end(content, start);
        let Some(colon) = name_end(&content[start..end]) else {
            self.at = end;
            return Some(Line::Junk { start, end });
        };
        while matches!(content.get(end), Some(b' ' | b'\t')) {
            end = line_end(content, end);
        }
        self.at = end;
        let name = content[start..start + colon].trim_ascii_end();
        Some(Line::Field(Field { name, value: &content[start + colon + 1..end], start, end }))
    }
}

/// A value on one line: folds undone (RFC 5322 §2.2.3), ends trimmed, octets that are not UTF-8 replaced.
pub fn unfold(value: &[u8]) -> String {
    let text = String::from_utf8_lossy(value);
    let text = text.trim_matches([' ', '\t', '\r', '\n']);
    if !text.contains(['\r', '\n']) {
        return text.to_owned();
    }
    text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect()
}

/// The domains of all From fields of a message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FromDomains {
    /// In lower case, in the order of the mailboxes.
    pub domains: Vec<String>,
    /// There is a field without a mailbox, a mailbox without a domain, or what could be read in two ways.
    pub unreadable: bool,
}

impl FromDomains {
    /// Takes in a field's value, and gives the domain of its first mailbox, in lower case.
    pub fn add(&mut self, value: &[u8]) -> Option<String> {
        let read = mailboxes::read(&String::from_utf8_lossy(value));
        let host_name = |domain: String| is_host_name(&domain).then(|| domain.to_lowercase());
        let domains: Vec<Option<String>> = read.domains.into_iter().map(|domain| domain.and_then(host_name)).collect();
        self.unreadable |= read.unreadable || domains.contains(&None);
        let first = domains.first().cloned().flatten();
        self.domains.extend(domains.into_iter().flatten());
        first
    }

    /// Those of fields further down.
    pub fn go_on_with(&mut self, below: &Self) {
        self.domains.extend_from_slice(&below.domains);
        self.unreadable |= below.unreadable;
    }
}

/// RFC 5322 §3.3 date and time, in UTC.
pub fn format_date(wall_ms: u64) -> Cow<'static, str> {
    let formatted = i64::try_from(wall_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map(|at| at.to_zoned(jiff::tz::TimeZone::UTC))
        .and_then(|at| jiff::fmt::rfc2822::DateTimePrinter::new().zoned_to_string(&at).ok());
    formatted.map_or(Cow::Borrowed("Thu, 1 Jan 1970 00:00:00 +0000"), Cow::Owned)
}

/// Two, where `rest` begins with an empty line; else zero. A bare LF counts only so that the function is total: content
/// has CRLF everywhere by the time it is read here.
fn empty_line_length(rest: &[u8]) -> usize {
    match rest {
        [b'\r', b'\n', ..] => 2,
        [b'\n', ..] => 1,
        _ => 0,
    }
}

fn line_end(content: &[u8], start: usize) -> usize {
    memchr(b'\n', &content[start..]).map_or(content.len(), |at| start + at + 1)
}

/// The colon's place in a line that is a field's first: printable ASCII without a colon, then perhaps white space
/// (RFC 5322 §2.2; the white space is §4.5's obsolete syntax), then the colon.
fn name_end(line: &[u8]) -> Option<usize> {
    let name_length = line.iter().position(|byte| !matches!(byte, 33..=57 | 59..=126))?;
    if name_length == 0 {
        return None;
    }
    let blank = line[name_length..].iter().position(|byte| !matches!(byte, b' ' | b'\t'))?;
    (line[name_length + blank] == b':').then_some(name_length + blank)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(content: &str) -> Vec<String> {
        lines(content.as_bytes())
            .map(|line| match line {
                Line::Field(field) => String::from_utf8(field.name.to_vec()).unwrap(),
                Line::Junk { .. } => "?".to_owned(),
            })
            .collect()
    }

    #[test]
    fn fields_and_body() {
        let content = "From: a\r\nSubject: x\r\n y\r\n\tz\r\nOld  : v\r\n\r\nTo: body\r\n";
        assert_eq!(names(content), ["From", "Subject", "Old"]);
        assert_eq!(&content[body_start(content.as_bytes())..], "To: body\r\n");
        let subject = fields(content.as_bytes()).nth(1).unwrap();
        assert_eq!(unfold(subject.value), "x y\tz");
        assert!(subject.is("SUBJECT"));
    }

    #[test]
    fn broken_blocks() {
        assert_eq!(names(""), [""; 0]);
        assert_eq!(names("\r\nbody\r\n"), [""; 0]);
        assert_eq!(body_start(b"\r\nbody\r\n"), 2);
        assert_eq!(names("no colon here\r\nTo: x\r\n"), ["?", "To"]);
        assert_eq!(names(" To: leading space\r\n"), ["?"]);
        assert_eq!(names(": no name\r\nspace in name: x\r\n"), ["?", "?"]);
        assert_eq!(names("A: 1\r\nT\u{e9}: x\r\nB:2"), ["A", "?", "B"]);
        assert_eq!(body_start(b"A: 1\r\n"), 6);
        assert_eq!(body_start(b"A: 1"), 4);
    }

    #[test]
    fn long_field() {
        let content = format!("Subject: {}\r\n\tend\r\nTo: x\r\n\r\n", "a".repeat(100_000));
        assert_eq!(names(&content), ["Subject", "To"]);
    }

    #[test]
    fn domains_of_from() {
        for (value, domain) in [
            (" Bob <bob@Example.COM>\r\n", Some("example.com")),
            (" \"a@b.example, c\" <c@d.example>\r\n", Some("d.example")),
            (" bob@example.com (Bob @ home.example)\r\n", Some("example.com")),
            (" A <a@one.example>,\r\n B <b@two.example>\r\n", Some("one.example")),
            (" Friends: a@group.example;\r\n", Some("group.example")),
            (" undisclosed:;\r\n", None),
            (" just words\r\n", None),
            (" <@>\r\n", None),
            ("", None),
            ("\r\n", None),
            (" j@b\u{fc}cher.example\r\n", Some("b\u{fc}cher.example")),
        ] {
            assert_eq!(FromDomains::default().add(value.as_bytes()).as_deref(), domain, "{value:?}");
        }
    }

    #[test]
    fn dates() {
        assert_eq!(format_date(1_764_547_200_000), "Mon, 1 Dec 2025 00:00:00 +0000");
        assert!(!format_date(u64::MAX).is_empty());
    }

    proptest! {
        #[test]
        fn lines_tile_the_block(content in "([a-zA-Z: \t\u{e9}]{0,6}(\r\n)?){0,12}") {
            let content = content.as_bytes();
            let mut at = 0;
            let mut iterator = lines(content);
            for line in iterator.by_ref() {
                let (start, end) = match line {
                    Line::Field(field) => (field.start, field.end),
                    Line::Junk { start, end } => (start, end),
                };
                prop_assert_eq!(start, at);
                prop_assert!(end > start);
                at = end;
            }
            let body = iterator.body_start();
            prop_assert!(content[at..body].is_empty() || &content[at..body] == b"\r\n");
            prop_assert!(body == content.len() || body == at + 2);
        }

        #[test]
        fn from_domain_survives_anything(value in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = FromDomains::default().add(&value);
            let _ = unfold(&value);
        }
    }
}
