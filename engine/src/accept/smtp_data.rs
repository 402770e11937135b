//! Content on its way in: end of data, dot-unstuffing, line endings (RFC 5321 §4.1.1.4, §4.5.2; RFC 3030).
//!
//! Only CRLF.CRLF ends a message (the first CRLF may be the DATA command's own). A dot is taken off only behind a CRLF,
//! which is where a sender that stuffs by the book put it. A bare CR or LF is therefore never part of an end of data,
//! whichever of the two treatments it gets, so no two readers can disagree about where a message ends ("SMTP
//! smuggling").
//!
//! Octets are looked at with SIMD search for CR, LF and NUL, and are copied once, in runs as long as the input allows.
//! All state between two inputs is one `Place`; a split anywhere changes nothing.

use memchr::memchr3;

use super::Refusal;
use crate::config::LineEndings;
use crate::limits::CONTENT_RESERVE_BYTES_MAX;

/// Takes the octets of one message, in any pieces.
#[derive(Debug)]
pub struct ContentReceiver {
    content: Vec<u8>,
    place: Place,
    framing: Framing,
    line_endings: LineEndings,
    bytes_max: u64,
    fault: Option<ContentFault>,
}

/// How the end of the content is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// DATA: by CRLF.CRLF; lines are dot-stuffed.
    Dot,
    /// BDAT: by counting, which the caller does.
    Counted,
}

/// Why content is refused. The first fault stands; what follows it is read and dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentFault {
    TooLarge,
    Nul,
    BareLineEnding,
    /// Of all that is being received, there is too much to go on with this.
    NoRoom,
}

impl ContentReceiver {
    /// `declared_bytes` is what the client said with SIZE; it only helps to take memory at once.
    pub fn new(framing: Framing, line_endings: LineEndings, bytes_max: u64, declared_bytes: Option<u64>) -> Self {
        let reserve = declared_bytes.unwrap_or(0).min(bytes_max).min(CONTENT_RESERVE_BYTES_MAX);
        Self {
            content: Vec::with_capacity(reserve as usize),
            place: Place::LineStart,
            framing,
            line_endings,
            bytes_max,
            fault: None,
        }
    }

    /// Takes octets from `input`: how many, and whether the end of data is behind the last of them. Takes all of
    /// `input` unless the end comes first; with [`Framing::Counted`] it never does.
    pub fn receive(&mut self, input: &[u8]) -> (usize, bool) {
        let mut at = 0;
        // What lies between `kept` and `at` is content that is not copied yet.
        let mut kept = 0;
        while at < input.len() {
            let octet = input[at];
            match self.place {
                Place::Text => {
                    let Some(offset) = memchr3(b'\r', b'\n', 0, &input[at..]) else {
                        break;
                    };
                    at += offset;
                    (at, kept) = self.receive_special(input, at, kept);
                }
                Place::LineStart if octet == b'.' && self.framing == Framing::Dot => {
                    self.keep(&input[kept..at]);
                    at += 1;
                    kept = at;
                    self.place = Place::Dot;
                }
                Place::LineStart => self.place = Place::Text,
                Place::Dot if octet == b'\r' => {
                    at += 1;
                    kept = at;
                    self.place = Place::DotCr;
                }
                // RFC 5321 §4.5.2: other characters follow on the line, so the dot was stuffed.
                Place::Dot => self.place = Place::Text,
                Place::DotCr if octet == b'\n' => {
                    self.place = Place::LineStart;
                    return (at + 1, true);
                }
                Place::Cr if octet == b'\n' => {
                    self.keep(b"\r\n");
                    at += 1;
                    kept = at;
                    self.place = Place::LineStart;
                }
                Place::DotCr | Place::Cr => {
                    self.keep_bare_line_ending();
                    self.place = Place::Text;
                }
            }
        }
        if kept < input.len() {
            self.keep(&input[kept..]);
        }
        (input.len(), false)
    }

    /// The content, ending with CRLF or empty.
    pub fn finish(mut self) -> Result<Vec<u8>, ContentFault> {
        if matches!(self.place, Place::Cr | Place::DotCr) {
            self.keep_bare_line_ending();
        }
        match self.fault {
            Some(fault) => Err(fault),
            None => {
                // Counted content may end without a line ending. A next hop that gets it by DATA needs one before its
                // dot.
                if !self.content.is_empty() && !self.content.ends_with(b"\r\n") {
                    self.content.extend_from_slice(b"\r\n");
                }
                Ok(self.content)
            }
        }
    }

    /// Octets of memory that it takes.
    pub fn memory_bytes(&self) -> u64 {
        self.content.capacity() as u64
    }

    /// Lets go of what it has; the content is refused at its end.
    pub fn give_up(&mut self) {
        self.fail(ContentFault::NoRoom);
    }

    pub fn fault(&self) -> Option<ContentFault> {
        self.fault
    }

    /// A CR, LF or NUL at `at` in running text; returns the new `at` and `kept`.
    fn receive_special(&mut self, input: &[u8], at: usize, kept: usize) -> (usize, usize) {
        match (input[at], &input[at + 1..]) {
            // The usual case: a line ends and the next does not begin with a dot.
            (b'\r', [b'\n', next, ..]) if *next != b'.' => (at + 2, kept),
            (b'\r', [b'\n', ..]) => {
                self.place = Place::LineStart;
                (at + 2, kept)
            }
            (b'\r', _) => {
                self.keep(&input[kept..at]);
                self.place = Place::Cr;
                (at + 1, at + 1)
            }
            (b'\n', _) => {
                self.keep(&input[kept..at]);
                self.keep_bare_line_ending();
                (at + 1, at + 1)
            }
            _ => {
                self.fail(ContentFault::Nul);
                (at + 1, at + 1)
            }
        }
    }

    fn keep(&mut self, run: &[u8]) {
        if self.fault.is_some() {
            return;
        }
        if (self.content.len() + run.len()) as u64 > self.bytes_max {
            self.fail(ContentFault::TooLarge);
            return;
        }
        self.content.extend_from_slice(run);
    }

    fn keep_bare_line_ending(&mut self) {
        match self.line_endings {
            LineEndings::Fix => self.keep(b"\r\n"),
            LineEndings::Reject => self.fail(ContentFault::BareLineEnding),
        }
    }

    fn fail(&mut self, fault: ContentFault) {
        if self.fault.is_none() {
            self.fault = Some(fault);
            self.content = Vec::new();
        }
    }
}

impl ContentFault {
    pub fn refusal(self) -> Refusal {
        match self {
            Self::TooLarge => Refusal::new(552, (5, 3, 4), "the message is larger than this server takes"),
            Self::NoRoom => Refusal::new(452, (4, 3, 1), "too much is being received at once, try again later"),
            Self::Nul => Refusal::new(554, (5, 6, 0), "the message contains a NUL octet"),
            Self::BareLineEnding => {
                Refusal::new(554, (5, 6, 0), "the message contains a CR or LF that is not part of a CRLF")
            }
        }
    }
}

/// Makes content that did not come by SMTP fit for [`super::Received`].
pub fn clean_content(content: &[u8], line_endings: LineEndings, bytes_max: u64) -> Result<Vec<u8>, Refusal> {
    let mut receiver = ContentReceiver::new(Framing::Counted, line_endings, bytes_max, Some(content.len() as u64));
    receiver.receive(content);
    receiver.finish().map_err(ContentFault::refusal)
}

/// What came before the next octet, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// CRLF, or nothing yet.
    LineStart,
    /// Anything else.
    Text,
    /// CR, not kept yet.
    Cr,
    /// A dot behind CRLF, not kept.
    Dot,
    /// CRLF, dot, CR: the last two not kept.
    DotCr,
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    type Outcome = (Option<usize>, Result<Vec<u8>, ContentFault>);

    /// Feeds `pieces`; the first part is the number of octets up to the end of data.
    fn receive<'a>(
        pieces: impl IntoIterator<Item = &'a [u8]>,
        framing: Framing,
        line_endings: LineEndings,
        bytes_max: u64,
    ) -> Outcome {
        let mut receiver = ContentReceiver::new(framing, line_endings, bytes_max, None);
        let mut total = 0;
        for piece in pieces {
            let (taken, ended) = receiver.receive(piece);
            total += taken;
            if ended {
                return (Some(total), receiver.finish());
            }
            assert_eq!(taken, piece.len());
        }
        (None, receiver.finish())
    }

    fn data(input: &[u8]) -> Outcome {
        receive([input], Framing::Dot, LineEndings::Fix, u64::MAX)
    }

    fn ended(content: &[u8], input: &[u8]) -> Outcome {
        (Some(input.len()), Ok(content.to_vec()))
    }

    /// RFC 5321 §4.1.1.4, §4.5.2.
    #[test]
    fn end_of_data_and_stuffed_dots() {
        assert_eq!(data(b".\r\n"), ended(b"", b".\r\n"));
        assert_eq!(data(b"a\r\n.\r\nQUIT\r\n"), (Some(6), Ok(b"a\r\n".to_vec())));
        assert_eq!(data(b"..\r\n...\r\n.a\r\n.\r\n"), ended(b".\r\n..\r\na\r\n", b"..\r\n...\r\n.a\r\n.\r\n"));
        assert_eq!(data(b"a\r\n\r\n\r\n.\r\n").1, Ok(b"a\r\n\r\n\r\n".to_vec()));
        assert_eq!(data(b"a\r\n.").0, None);
    }

    /// The octet sequences by which one server's content became another's commands (CVE-2023-51764 and kin).
    #[test]
    fn smuggling_sequences_are_data() {
        for (input, content) in [
            (&b"a\n.\nb"[..], &b"a\r\n.\r\nb\r\n"[..]),
            (b"a\n.\r\nb", b"a\r\n.\r\nb\r\n"),
            (b"a\r\n.\nb", b"a\r\n\r\nb\r\n"),
            (b"a\r.\rb", b"a\r\n.\r\nb\r\n"),
            (b"a\r.\r\nb", b"a\r\n.\r\nb\r\n"),
            (b"a\r\n.\rb", b"a\r\n\r\nb\r\n"),
            (b"a\r\r\n.\r\r\nb", b"a\r\n\r\n\r\n\r\nb\r\n"),
            (b"a\n\r.\r\nb", b"a\r\n\r\n.\r\nb\r\n"),
        ] {
            let name = input.escape_ascii().to_string();
            assert_eq!(data(input), (None, Ok(content.to_vec())), "{name}");
            let whole = [input, b"\r\n.\r\n"].concat();
            assert_eq!(data(&whole), ended(content, &whole), "{name}");
            let (end, refused) = receive([&whole[..]], Framing::Dot, LineEndings::Reject, u64::MAX);
            assert_eq!((end, refused), (Some(whole.len()), Err(ContentFault::BareLineEnding)), "{name}");
        }
    }

    #[test]
    fn nul_is_refused_after_the_end() {
        assert_eq!(data(b"a\0b\r\n.\r\n"), (Some(8), Err(ContentFault::Nul)));
    }

    #[test]
    fn size_counts_unstuffed_octets() {
        let receive = |bytes_max| receive([&b"..a\r\n.\r\n"[..]], Framing::Dot, LineEndings::Fix, bytes_max);
        assert_eq!(receive(4), (Some(8), Ok(b".a\r\n".to_vec())));
        assert_eq!(receive(3), (Some(8), Err(ContentFault::TooLarge)));
    }

    #[test]
    fn refused_content_takes_no_memory() {
        let mut receiver = ContentReceiver::new(Framing::Dot, LineEndings::Fix, 10, Some(u64::MAX));
        assert!(receiver.content.capacity() < 100);
        receiver.receive(&[b'x'; 5_000]);
        receiver.receive(&[b'x'; 5_000]);
        assert_eq!(receiver.content.capacity(), 0);
        assert_eq!(receiver.fault(), Some(ContentFault::TooLarge));
    }

    /// RFC 3030: counted content is not stuffed.
    #[test]
    fn counted_content() {
        let counted = |input: &[u8], line_endings| clean_content(input, line_endings, u64::MAX).map_err(|r| r.code());
        assert_eq!(counted(b"..a\r\n.\r\nb", LineEndings::Reject), Ok(b"..a\r\n.\r\nb\r\n".to_vec()));
        assert_eq!(counted(b"", LineEndings::Fix), Ok(Vec::new()));
        assert_eq!(counted(b"a\r", LineEndings::Fix), Ok(b"a\r\n".to_vec()));
        assert_eq!(counted(b"a\n", LineEndings::Fix), Ok(b"a\r\n".to_vec()));
        assert_eq!(counted(b"a\r", LineEndings::Reject), Err(554));
    }

    /// The rules once more, octet by octet and slowly.
    fn model(input: &[u8], framing: Framing, line_endings: LineEndings) -> Outcome {
        let whole = [b"\r\n", input].concat();
        let end = whole.windows(5).position(|w| w == b"\r\n.\r\n").filter(|_| framing == Framing::Dot);
        let raw = &whole[..end.map_or(whole.len(), |end| end + 2)];
        let (mut content, mut fault) = (Vec::new(), None);
        for (at, octet) in raw.iter().enumerate().skip(2) {
            let after_crlf = raw[..at].ends_with(b"\r\n");
            match octet {
                b'.' if framing == Framing::Dot && after_crlf => {}
                b'\n' if raw[at - 1] == b'\r' => content.push(b'\n'),
                b'\r' if raw.get(at + 1) == Some(&b'\n') => content.push(b'\r'),
                // A final CR may become a CRLF with the next input; `finish` says it won't.
                b'\r' | b'\n' if line_endings == LineEndings::Reject => {
                    fault = fault.or(Some(ContentFault::BareLineEnding));
                }
                b'\r' | b'\n' => content.extend_from_slice(b"\r\n"),
                0 => fault = fault.or(Some(ContentFault::Nul)),
                other => content.push(*other),
            }
        }
        if !content.is_empty() && !content.ends_with(b"\r\n") {
            content.extend_from_slice(b"\r\n");
        }
        (end.map(|end| end + 3), fault.map_or(Ok(content), Err))
    }

    fn stuff(content: &[u8]) -> Vec<u8> {
        let mut stuffed = Vec::new();
        for line in content.split_inclusive(|b| *b == b'\n') {
            if line.starts_with(b".") {
                stuffed.push(b'.');
            }
            stuffed.extend_from_slice(line);
        }
        stuffed.extend_from_slice(b".\r\n");
        stuffed
    }

    fn hostile() -> impl Strategy<Value = Vec<u8>> {
        let octet = prop_oneof![6 => Just(b'\r'), 6 => Just(b'\n'), 6 => Just(b'.'), 3 => any::<u8>(), 1 => Just(0)];
        prop_oneof![
            3 => vec(octet, 0..48),
            // Without NUL, so that the content can be compared.
            3 => vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'.'), Just(b'a')], 0..48),
            1 => vec(prop_oneof![Just("\r\n"), Just("."), Just("text")], 0..32).prop_map(|v| v.concat().into_bytes()),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn any_split_gives_what_the_rules_say(
            input in hostile(),
            cuts in vec(any::<prop::sample::Index>(), 0..6),
            reject: bool,
            counted: bool,
        ) {
            let framing = if counted { Framing::Counted } else { Framing::Dot };
            let line_endings = if reject { LineEndings::Reject } else { LineEndings::Fix };
            let expected = model(&input, framing, line_endings);
            // The order of faults on the way is not part of the rules when only one of them is told.
            let comparable = |outcome: &Outcome| (outcome.0, outcome.1.clone().map_err(|_| ()));

            let whole = receive([&input[..]], framing, line_endings, u64::MAX);
            prop_assert_eq!(comparable(&whole), comparable(&expected));

            let octets = receive(input.chunks(1), framing, line_endings, u64::MAX);
            prop_assert_eq!(&octets, &whole);

            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
            cuts.extend([0, input.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|w| &input[w[0]..w[1]]);
            prop_assert_eq!(&receive(pieces, framing, line_endings, u64::MAX), &whole);

            for cut in 0..=input.len() {
                let (a, b) = input.split_at(cut);
                prop_assert_eq!(&receive([a, b], framing, line_endings, u64::MAX), &whole);
            }

            if let Ok(content) = &whole.1 {
                let bare = content.iter().enumerate().any(|(at, octet)| match octet {
                    b'\r' => content.get(at + 1) != Some(&b'\n'),
                    b'\n' => at == 0 || content[at - 1] != b'\r',
                    octet => *octet == 0,
                });
                prop_assert!(!bare);
            }
        }

        #[test]
        fn unstuff_undoes_stuff(lines in vec("\\.{0,3}[a-z. ]{0,6}", 0..12)) {
            let content: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
            let stuffed = stuff(content.as_bytes());
            let behind = [&stuffed[..], b"QUIT\r\n"].concat();
            let expected = (Some(stuffed.len()), Ok(content.into_bytes()));
            for piece in [1, 2, 3, 7, usize::MAX] {
                let (end, content) = receive(behind.chunks(piece), Framing::Dot, LineEndings::Reject, u64::MAX);
                prop_assert_eq!((end, content), expected.clone());
            }
        }

        #[test]
        fn the_bound_holds_for_every_split(input in hostile(), bytes_max in 0_u64..40, piece in 1_usize..8) {
            let fixed = model(&input, Framing::Dot, LineEndings::Fix);
            let (end, content) = receive(input.chunks(piece), Framing::Dot, LineEndings::Fix, bytes_max);
            prop_assert_eq!(end, fixed.0);
            if let (Some(_), Ok(full)) = fixed {
                prop_assert_eq!(content.is_ok(), full.len() as u64 <= bytes_max);
            }
        }
    }
}
