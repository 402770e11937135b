//! The demo's messages: of many shapes, and the same again from the same number.
//!
//! So nothing that was sent needs to be kept: whoever gets a message makes it once more and compares.

use std::ops::Range;

use fastrand::Rng;

use crate::mail::header;

/// Makes the messages of one run.
#[derive(Debug, Clone)]
pub(crate) struct Generator {
    /// Tells the messages of this run from any other's.
    run: u64,
    date: String,
}

/// One message as it is handed to the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Generated {
    pub(crate) number: u32,
    /// Empty: the null reverse path.
    pub(crate) reverse_path: String,
    pub(crate) recipient: String,
    /// Ends with CRLF; dots are not doubled.
    pub(crate) content: Vec<u8>,
    pub(crate) eight_bit: bool,
    /// Fields that the engine adds because they are missing, of [`ADDED_WHERE_MISSING`].
    pub(crate) missing: Vec<&'static str>,
    /// Fields of `content` that the engine has to take out, in order.
    removed: Vec<Range<usize>>,
}

impl Generator {
    pub(crate) fn new(run: u64, wall_ms: u64) -> Self {
        Self { run, date: header::format_date(wall_ms).into_owned() }
    }

    pub(crate) fn message(&self, number: u32) -> Generated {
        let mut random = Rng::with_seed(self.run ^ (u64::from(number) << 32 | 0x9e37));
        let mut generated = Generated {
            number,
            reverse_path: if number % 50 == 7 { String::new() } else { format!("bounce+{number}@{SENDER_DOMAIN}") },
            recipient: format!("m{number}@d{}.{RECIPIENT_DOMAIN}", number % 5),
            content: Vec::with_capacity(CONTENT_BYTES_MAX + LINE_BYTES_MAX),
            eight_bit: false,
            missing: Vec::new(),
            removed: Vec::new(),
        };
        self.write_header(&mut generated);
        generated.content.extend_from_slice(b"\r\n");
        // Most mail is small, some is not: each doubling of the size is as likely as the next.
        let doublings = (CONTENT_BYTES_MAX / CONTENT_BYTES_MIN).ilog2();
        let size = (CONTENT_BYTES_MIN as f64 * 2_f64.powf(random.f64() * f64::from(doublings))) as usize;
        if number % 64 != 63 {
            write_body(&mut generated.content, Shape::of(number), size, &mut random);
        }
        generated.eight_bit = !generated.content.is_ascii();
        generated
    }

    /// The number of the message that this content is, or was before it was altered.
    pub(crate) fn number_of(&self, content: &[u8]) -> Option<u32> {
        let field = header::fields(content).find(|field| field.is(NUMBER_FIELD))?;
        let value = header::unfold(field.value);
        let (run, number) = value.split_once('-')?;
        (u64::from_str_radix(run, 16).ok()? == self.run).then(|| number.parse().ok())?
    }

    fn write_header(&self, generated: &mut Generated) {
        let number = generated.number;
        let run = self.run;
        let mut field = |text: String| generated.content.extend_from_slice(text.as_bytes());
        field(format!("{NUMBER_FIELD}: {run:016x}-{number}\r\n"));
        if number % 10 == 1 {
            field(format!(
                "Received: from app{number}.{SENDER_DOMAIN} by relay.{SENDER_DOMAIN};\r\n\t{}\r\n",
                self.date
            ));
        }
        field(match number % 3 {
            0 => format!("From: Demo <news@{SENDER_DOMAIN}>\r\n"),
            1 => format!("From:\r\n \"A, Demo\"\r\n\t<news@mail.{SENDER_DOMAIN}>\r\n"),
            _ => format!("from: news@{SENDER_DOMAIN}\r\n"),
        });
        field(format!("To: <{}>\r\n", generated.recipient));
        field(match number % 4 {
            0 => format!("Subject: Message {number}\r\n"),
            1 => "Subject:  two  spaces,\r\n\ta fold, and trailing space \r\n".to_owned(),
            2 => "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n".to_owned(),
            _ => format!("SUBJECT:{}\r\n", "x".repeat(200)),
        });
        if number.is_multiple_of(5) {
            generated
                .removed_field(&format!("Bcc: hidden{number}@{RECIPIENT_DOMAIN},\r\n hidden@{RECIPIENT_DOMAIN}\r\n"));
        }
        if number % 8 == 3 {
            generated.missing.push("Date");
        } else {
            generated.field(&format!("Date: {}\r\n", self.date));
        }
        if number % 4 == 1 {
            generated.removed_field(&format!("X-Campaign: demo-{}\r\n", number % 3));
        }
        if number % 8 == 5 {
            generated.missing.push("Message-ID");
        } else {
            generated.field(&format!("Message-ID: <{number}.{run:x}@{SENDER_DOMAIN}>\r\n"));
        }
        generated.field("MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n");
        generated.field("Content-Transfer-Encoding: 8bit\r\nx-Odd-CASE :  kept as it is\t \r\n");
        generated.field(&format!("List-Unsubscribe: <https://{SENDER_DOMAIN}/u/{number}>\r\n"));
    }
}

impl Generated {
    /// What of the content is to arrive, behind the fields that the engine puts in front.
    pub(crate) fn expected(&self) -> Vec<u8> {
        let mut expected = Vec::with_capacity(self.content.len());
        let mut kept_from = 0;
        for removed in &self.removed {
            expected.extend_from_slice(&self.content[kept_from..removed.start]);
            kept_from = removed.end;
        }
        expected.extend_from_slice(&self.content[kept_from..]);
        expected
    }

    fn field(&mut self, text: &str) {
        self.content.extend_from_slice(text.as_bytes());
    }

    fn removed_field(&mut self, text: &str) {
        let start = self.content.len();
        self.field(text);
        self.removed.push(start..self.content.len());
    }
}

/// What a body consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Text,
    EightBit,
    Dots,
    LongLines,
    EmptyLines,
    Base64,
    WhiteSpace,
    /// Lines of all the others.
    Mixed,
}

impl Shape {
    const ALL: [Self; 8] = [
        Self::Text,
        Self::EightBit,
        Self::Dots,
        Self::LongLines,
        Self::EmptyLines,
        Self::Base64,
        Self::WhiteSpace,
        Self::Mixed,
    ];

    fn of(number: u32) -> Self {
        Self::ALL[number as usize % Self::ALL.len()]
    }
}

/// Appends lines until `content` has about `size` octets.
///
/// A body never ends with a line of white space: RFC 6376 §3.4.4 drops it from the hash and mail-auth's verifier, which
/// the demo's sink asks, does not. The engine's own tests compare such bodies with the RFC.
fn write_body(content: &mut Vec<u8>, shape: Shape, size: usize, random: &mut Rng) {
    while content.len() + LAST_LINE.len() < size {
        let shape = match shape {
            Shape::Mixed => Shape::ALL[random.usize(..Shape::ALL.len() - 1)],
            one => one,
        };
        write_line(content, shape, random);
        content.extend_from_slice(b"\r\n");
    }
    content.extend_from_slice(LAST_LINE);
    if shape == Shape::EmptyLines {
        content.extend_from_slice(b"\r\n\r\n\r\n");
    }
}

fn write_line(content: &mut Vec<u8>, shape: Shape, random: &mut Rng) {
    match shape {
        Shape::Text | Shape::Mixed => write_words(content, 60, random),
        Shape::EightBit => {
            content.extend_from_slice("Grüße, Δοκιμή, 試験 — ".as_bytes());
            content.extend((0..40).map(|_| 0x80 | random.u8(..)));
        }
        Shape::Dots => {
            let dots = [&b"."[..], b"..", b"...", b". ", b".\t.", b" ."][random.usize(..6)];
            content.extend_from_slice(dots);
            if random.bool() {
                write_words(content, 30, random);
            }
        }
        Shape::LongLines => {
            // RFC 5322 §2.1.1: 998 octets without the CRLF.
            let end = content.len() + LINE_BYTES_MAX;
            write_words(content, LINE_BYTES_MAX, random);
            content.truncate(end);
        }
        Shape::EmptyLines => {
            if random.u8(..3) == 0 {
                write_words(content, 20, random);
            }
        }
        Shape::Base64 => {
            const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            for _ in 0..19 {
                let mut bits = random.u64(..);
                for _ in 0..4 {
                    content.push(DIGITS[bits as usize % DIGITS.len()]);
                    bits >>= 6;
                }
            }
        }
        Shape::WhiteSpace => {
            content.extend_from_slice(b"\t  ");
            write_words(content, 20, random);
            content.extend_from_slice(b"  \t two\t\ttabs \t ");
        }
    }
}

/// At least `size` octets of words.
fn write_words(content: &mut Vec<u8>, size: usize, random: &mut Rng) {
    let end = content.len() + size;
    while content.len() < end {
        content.extend_from_slice(WORDS[random.usize(..WORDS.len())].as_bytes());
        content.push(b' ');
    }
    content.push(b'.');
}

/// The field that numbers a message; it is the first of what is sent.
pub(crate) const NUMBER_FIELD: &str = "X-Demo-Number";
/// docs/smtp.md, "What is changed in a message".
pub(crate) const ADDED_WHERE_MISSING: [&str; 2] = ["Date", "Message-ID"];
/// The From domain; its subdomains send as well.
pub(crate) const SENDER_DOMAIN: &str = "sender.test";
const RECIPIENT_DOMAIN: &str = "recipient.test";
pub(crate) const CONTENT_BYTES_MIN: usize = 512;
pub(crate) const CONTENT_BYTES_MAX: usize = 16 << 10;
const LINE_BYTES_MAX: usize = 998;
const LAST_LINE: &[u8] = b"The end.\r\n";
const WORDS: [&str; 16] = [
    "post", "rider", "carries", "each", "letter", "once", "and", "to", "the", "right", "door", "whatever", "weather",
    "night", "or", "road",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn generator() -> Generator {
        Generator::new(0xfeed, 1_764_547_200_000)
    }

    #[test]
    fn the_same_number_gives_the_same_message() {
        let (first, again) = (generator().message(77), generator().message(77));
        assert_eq!(first, again);
        assert_ne!(first.content, Generator::new(1, 1_764_547_200_000).message(77).content);
        assert_ne!(first.content, generator().message(78).content);
    }

    #[test]
    fn every_message_is_valid_smtp_and_knows_its_number() {
        for number in 0..1_000 {
            let message = generator().message(number);
            let content = &message.content;
            assert!(content.ends_with(b"\r\n"), "{number}");
            assert!((CONTENT_BYTES_MIN / 2..CONTENT_BYTES_MAX + 4_096).contains(&content.len()), "{}", content.len());
            let text = content.strip_suffix(b"\r\n").unwrap();
            for line in text.split(|octet| *octet == b'\n') {
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                assert!(line.len() <= 998 && !line.contains(&b'\r') && !line.contains(&0), "{number}");
            }
            assert_eq!(generator().number_of(content), Some(number));
            assert_eq!(Generator::new(1, 0).number_of(content), None, "another run's");
            assert!(header::fields(content).next().unwrap().is(NUMBER_FIELD));
            assert_eq!(message.eight_bit, !content.is_ascii());
        }
    }

    #[test]
    fn all_shapes_are_there() {
        let messages: Vec<Generated> = (0..200).map(|number| generator().message(number)).collect();
        let bodies = |wanted: &[u8]| {
            let holds = |message: &&Generated| message.content.windows(wanted.len()).any(|window| window == wanted);
            messages.iter().filter(holds).count()
        };
        assert!(bodies(b"\r\n.\r\n") > 10 && bodies(b"\r\n..") > 10);
        assert!(bodies(&[0xe2, 0x80, 0x94]) > 10);
        assert!(bodies(b"\r\n\r\n\r\n") > 10);
        let longest = |message: &Generated| message.content.split(|octet| *octet == b'\n').map(<[u8]>::len).max();
        assert_eq!(messages.iter().filter_map(longest).max(), Some(LINE_BYTES_MAX + 1));
        assert!(messages.iter().any(|message| message.content.ends_with(b"\r\n\r\n") && message.number % 64 == 63));
        assert!(messages.iter().any(|message| message.reverse_path.is_empty()));
        assert!(messages.iter().any(|message| message.content.len() < 1_024));
        assert!(messages.iter().any(|message| message.content.len() > 12_000));
    }

    #[test]
    fn removed_fields_are_cut_out_of_what_is_expected() {
        let message = generator().message(5);
        let text = String::from_utf8_lossy(&message.content).into_owned();
        let expected = String::from_utf8(message.expected()).unwrap();
        assert!(text.contains("Bcc: ") && text.contains("\r\nX-Campaign: demo-2\r\n"));
        assert!(!expected.contains("Bcc") && !expected.contains("hidden") && !expected.contains("X-Campaign"));
        assert_eq!(message.missing, ["Message-ID"]);
        assert!(expected.starts_with(NUMBER_FIELD) && expected.ends_with("The end.\r\n"));
    }
}
