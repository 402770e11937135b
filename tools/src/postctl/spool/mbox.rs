//! A message in an mbox file: RFC 4155, with the quoting of mboxrd, which can be taken back exactly.

use std::io::{self, Write};

use postrider_spool::Message;

use super::view::timestamp;

/// Appends a message: its separator line, its lines ended by LF, and an empty line.
pub(crate) fn write_message(
    out: &mut impl Write,
    reverse_path: &str,
    created_ms: u64,
    message: &Message,
) -> io::Result<()> {
    writeln!(out, "From {} {}", sender(reverse_path), timestamp(created_ms).strftime("%a %b %e %H:%M:%S %Y"))?;
    // One piece, because a line may begin in the one part and end in the other.
    let content = [message.prefix(), message.body()].concat();
    write_lines(out, &content)?;
    writeln!(out)
}

fn write_lines(out: &mut impl Write, content: &[u8]) -> io::Result<()> {
    for line in content.split_inclusive(|octet| *octet == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let quotes = line.iter().take_while(|octet| **octet == b'>').count();
        if line[quotes..].starts_with(b"From ") {
            out.write_all(b">")?;
        }
        out.write_all(line)?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// One word, as readers expect it: a local part may have blanks in quotes.
fn sender(reverse_path: &str) -> String {
    if reverse_path.is_empty() {
        return "MAILER-DAEMON".into();
    }
    reverse_path.chars().map(|c| if c.is_whitespace() || c.is_control() { '_' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(content: &str) -> String {
        let mut out = Vec::new();
        write_lines(&mut out, content.as_bytes()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_that_look_like_separators_are_quoted() {
        assert_eq!(lines("A: b\r\n\r\nFrom x\r\n>From y\r\n>>From z\r\n"), "A: b\n\n>From x\n>>From y\n>>>From z\n");
        assert_eq!(
            lines("from x\r\n From x\r\nFrom\r\n> From x\r\nFrom: x"),
            "from x\n From x\nFrom\n> From x\nFrom: x\n"
        );
        assert_eq!(lines("a\nb\rc\r\r\n"), "a\nb\rc\r\n");
    }

    #[test]
    fn a_sender_is_one_word() {
        assert_eq!(sender(""), "MAILER-DAEMON");
        assert_eq!(sender("a@example.net"), "a@example.net");
        assert_eq!(sender("\"a b\"@example.net"), "\"a_b\"@example.net");
    }
}
