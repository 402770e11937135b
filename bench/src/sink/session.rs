//! The sink's side of one SMTP session, without I/O: octets in, replies and received messages out.
//!
//! Calling order: [`Session::new`] appends the greeting; then [`Session::handle`] for whatever arrived, which
//! consumes all of it. Replies gather in `out`, so that a pipelined group is answered by one write.
//! Trusts nobody to be polite but assumes that the peer is a mail system under test: it checks little beyond what
//! keeps the counts right.
//!
//! Over 500 lines: all commands of a session are in one place.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use memchr::memmem;

use super::faults::{FaultPlan, Stage};
use crate::message::Random;

/// What a session hands out: one call per transaction that was answered 250.
pub trait Receiver {
    fn greeted(&mut self, peer: IpAddr, ehlo: &str);
    fn received(&mut self, message: &ReceivedMessage<'_>);
    fn refused(&mut self, stage: Stage);
    fn greylisted(&mut self);
}

/// A message whose final dot (or last chunk) is about to be answered 250.
#[derive(Debug)]
pub struct ReceivedMessage<'a> {
    pub peer: IpAddr,
    pub ehlo: &'a str,
    /// Arguments as they stood in the commands: `<a@example> SIZE=1`.
    pub mail: &'a [u8],
    pub recipients: &'a [Vec<u8>],
    /// The content without dot-stuffing: all of it when kept whole, else its first octets.
    pub content: &'a [u8],
    /// Content octets on the wire, without the final dot.
    pub wire_bytes: u64,
    pub chunked: bool,
    /// Whether `content` is all of it.
    pub whole: bool,
    pub now: Instant,
}

/// What the caller does after writing `out`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    Continue,
    /// Do the handshake, then call [`Session::secured`].
    StartTls,
    Close,
}

/// Of which messages the whole content is kept; of the others it is the header.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    All,
    /// Drawn at random: 0 to 1 of them.
    Share(f64),
}

#[derive(Debug)]
pub struct Session {
    plan: Arc<FaultPlan>,
    keep: Keep,
    /// Of the present message.
    whole: bool,
    peer: IpAddr,
    random: Random,
    state: State,
    /// The beginning of a command whose end has not arrived.
    line: Vec<u8>,
    ehlo: String,
    mail: Option<Vec<u8>>,
    recipients: Vec<Vec<u8>>,
    content: Vec<u8>,
    wire_bytes: u64,
    closing: bool,
    offers_chunking: bool,
    tls: Tls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    NotOffered,
    Offered,
    /// STARTTLS was answered 220.
    Starting,
    Secured,
}

#[derive(Debug)]
enum State {
    Command,
    Data(DotScan),
    Chunk {
        left: u64,
        last: bool,
        wanted: bool,
    },
    /// Between chunks of one message: only BDAT, RSET and such may come.
    Chunks,
}

impl Session {
    pub fn new(plan: Arc<FaultPlan>, keep: Keep, peer: IpAddr, seed: u64, now: Instant, out: &mut Vec<u8>) -> Self {
        let mut session = Self {
            plan,
            keep,
            whole: keep == Keep::All,
            peer,
            random: Random::new(seed),
            state: State::Command,
            line: Vec::new(),
            ehlo: String::new(),
            mail: None,
            recipients: Vec::new(),
            content: Vec::new(),
            wire_bytes: 0,
            closing: false,
            offers_chunking: true,
            tls: Tls::NotOffered,
        };
        if !session.fails(Stage::Greeting, now, out) {
            out.extend_from_slice(b"220 postbench.test ESMTP postbench sink\r\n");
        } else {
            session.closing = true;
        }
        session
    }

    /// BDAT is understood all the same.
    pub fn offer_no_chunking(&mut self) {
        self.offers_chunking = false;
    }

    pub fn offer_starttls(&mut self) {
        self.tls = Tls::Offered;
    }

    /// The handshake is done. RFC 3207 §4.2: what was learnt before it is forgotten.
    pub fn secured(&mut self) {
        self.reset();
        self.ehlo.clear();
        self.tls = Tls::Secured;
    }

    /// Whether the greeting already refused the session.
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    pub fn handle(&mut self, now: Instant, input: &[u8], out: &mut Vec<u8>, receiver: &mut impl Receiver) -> Flow {
        let mut rest = input;
        while !rest.is_empty() && !self.closing {
            if self.tls == Tls::Starting {
                // RFC 3207 §6: commands that came in clear behind STARTTLS may be somebody else's.
                self.closing = true;
                break;
            }
            rest = match &mut self.state {
                State::Data(scan) => match scan.find(rest) {
                    DotFound::End { consumed, content } => {
                        self.keep(&rest[..content]);
                        self.wire_bytes += consumed as u64;
                        self.end_data(now, out, receiver);
                        &rest[consumed..]
                    }
                    DotFound::No => {
                        self.keep(rest);
                        self.wire_bytes += rest.len() as u64;
                        &[]
                    }
                },
                State::Chunk { left, last, wanted } => {
                    let taken = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= taken as u64;
                    let (done, last, wanted) = (*left == 0, *last, *wanted);
                    if wanted {
                        self.keep(&rest[..taken]);
                        self.wire_bytes += taken as u64;
                    }
                    if done {
                        self.end_chunk(now, last, wanted, out, receiver);
                    }
                    &rest[taken..]
                }
                State::Command | State::Chunks => self.take_line(now, rest, out, receiver),
            };
        }
        match self.tls {
            _ if self.closing => Flow::Close,
            Tls::Starting => Flow::StartTls,
            _ => Flow::Continue,
        }
    }

    /// Takes one command line from `input` and gives back what is behind it.
    fn take_line<'a>(
        &mut self,
        now: Instant,
        input: &'a [u8],
        out: &mut Vec<u8>,
        receiver: &mut impl Receiver,
    ) -> &'a [u8] {
        let Some(end) = memchr::memchr(b'\n', input) else {
            self.line.extend_from_slice(input);
            if self.line.len() > LINE_BYTES_MAX {
                out.extend_from_slice(b"500 5.5.2 line too long\r\n");
                self.closing = true;
            }
            return &[];
        };
        let (line, rest) = input.split_at(end + 1);
        if self.line.is_empty() {
            self.command(now, line.trim_ascii_end(), out, receiver);
        } else {
            let mut whole = std::mem::take(&mut self.line);
            whole.extend_from_slice(line);
            self.command(now, whole.trim_ascii_end(), out, receiver);
            // Its room is used for the next one.
            whole.clear();
            self.line = whole;
        }
        rest
    }

    fn command(&mut self, now: Instant, line: &[u8], out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        let verb_end = line.iter().position(|&c| c == b' ' || c == b':').unwrap_or(line.len());
        let mut verb = [0; 8];
        let verb = match verb.get_mut(..verb_end) {
            Some(verb) => {
                verb.copy_from_slice(&line[..verb_end]);
                verb.make_ascii_uppercase();
                &*verb
            }
            None => b"",
        };
        let arguments = line[verb_end..].trim_ascii();
        match verb {
            b"MAIL" => self.mail(now, arguments, out, receiver),
            b"RCPT" => self.rcpt(now, arguments, out, receiver),
            b"DATA" => self.data(now, out, receiver),
            b"BDAT" => self.bdat(now, arguments, out, receiver),
            b"EHLO" | b"HELO" => self.hello(now, verb == b"EHLO", arguments, out, receiver),
            b"RSET" => {
                self.reset();
                out.extend_from_slice(b"250 2.0.0 Ok\r\n");
            }
            b"STARTTLS" if self.tls == Tls::Offered => {
                out.extend_from_slice(b"220 2.0.0 Go ahead\r\n");
                self.tls = Tls::Starting;
            }
            b"NOOP" => out.extend_from_slice(b"250 2.0.0 Ok\r\n"),
            b"VRFY" => out.extend_from_slice(b"252 2.0.0 Try it\r\n"),
            b"QUIT" => {
                out.extend_from_slice(b"221 2.0.0 Bye\r\n");
                self.closing = true;
            }
            _ => out.extend_from_slice(b"500 5.5.2 unknown command\r\n"),
        }
    }

    fn hello(&mut self, now: Instant, extended: bool, name: &[u8], out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        if self.fails(Stage::Ehlo, now, out) {
            receiver.refused(Stage::Ehlo);
            return;
        }
        self.reset();
        self.ehlo = String::from_utf8_lossy(name).into_owned();
        receiver.greeted(self.peer, &self.ehlo);
        if !extended {
            out.extend_from_slice(b"250 postbench.test\r\n");
            return;
        }
        out.extend_from_slice(EHLO_REPLY);
        if self.offers_chunking {
            out.extend_from_slice(b"250-CHUNKING\r\n");
        }
        if self.tls == Tls::Offered {
            out.extend_from_slice(b"250-STARTTLS\r\n");
        }
        out.extend_from_slice(b"250 ENHANCEDSTATUSCODES\r\n");
    }

    fn mail(&mut self, now: Instant, arguments: &[u8], out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        let Some(path) = strip_prefix_ignore_case(arguments, b"FROM:") else {
            out.extend_from_slice(b"501 5.5.4 write MAIL FROM:<address>\r\n");
            return;
        };
        if self.mail.is_some() {
            // RFC 5321 §4.1.4: no MAIL inside a transaction.
            out.extend_from_slice(b"503 5.5.1 nested MAIL\r\n");
        } else if self.fails(Stage::Mail, now, out) {
            receiver.refused(Stage::Mail);
        } else {
            self.mail = Some(path.trim_ascii().to_vec());
            self.whole = match self.keep {
                Keep::All => true,
                Keep::Share(share) => share > 0.0 && self.random.unit() < share,
            };
            out.extend_from_slice(b"250 2.1.0 Ok\r\n");
        }
    }

    fn rcpt(&mut self, now: Instant, arguments: &[u8], out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        let Some(path) = strip_prefix_ignore_case(arguments, b"TO:") else {
            out.extend_from_slice(b"501 5.5.4 write RCPT TO:<address>\r\n");
            return;
        };
        if self.mail.is_none() {
            out.extend_from_slice(b"503 5.5.1 MAIL first\r\n");
        } else if self.recipients.len() >= RECIPIENTS_MAX {
            out.extend_from_slice(b"452 4.5.3 too many recipients\r\n");
        } else if self.fails(Stage::Rcpt, now, out) {
            receiver.refused(Stage::Rcpt);
        } else if self.plan.greylists(self.peer, self.mail.as_deref(), path.trim_ascii(), now) {
            out.extend_from_slice(b"450 4.2.0 greylisted, try again later\r\n");
            receiver.greylisted();
        } else {
            self.recipients.push(path.trim_ascii().to_vec());
            out.extend_from_slice(b"250 2.1.5 Ok\r\n");
        }
    }

    fn data(&mut self, now: Instant, out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        if self.recipients.is_empty() || matches!(self.state, State::Chunks) {
            // RFC 5321 §3.3: with no valid recipient, 503 or 554.
            out.extend_from_slice(b"554 5.5.1 no valid recipients\r\n");
        } else if self.fails(Stage::Data, now, out) {
            receiver.refused(Stage::Data);
            self.reset();
        } else {
            out.extend_from_slice(b"354 End with CRLF.CRLF\r\n");
            self.state = State::Data(DotScan::default());
        }
    }

    /// RFC 3030 §2: the octets follow at once, whatever the answer; so they are taken even if refused.
    fn bdat(&mut self, now: Instant, arguments: &[u8], out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        let mut words = arguments.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let size = words.next().and_then(|word| std::str::from_utf8(word).ok()?.parse().ok());
        let Some(left) = size else {
            // Without the count nothing behind it can be told apart.
            out.extend_from_slice(b"501 5.5.4 write BDAT octets [LAST]\r\n");
            self.closing = true;
            return;
        };
        let last = words.next().is_some_and(|word| word.eq_ignore_ascii_case(b"LAST"));
        let wanted = !self.recipients.is_empty();
        self.state = State::Chunk { left, last, wanted };
        if left == 0 {
            self.end_chunk(now, last, wanted, out, receiver);
        }
    }

    fn end_data(&mut self, now: Instant, out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        self.wire_bytes = self.wire_bytes.saturating_sub(3);
        if self.whole {
            unstuff(&mut self.content);
        }
        self.end_message(now, false, out, receiver);
    }

    fn end_chunk(&mut self, now: Instant, last: bool, wanted: bool, out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        if !wanted {
            out.extend_from_slice(b"503 5.5.1 no valid recipients\r\n");
            self.state = State::Command;
        } else if last {
            self.end_message(now, true, out, receiver);
        } else {
            out.extend_from_slice(b"250 2.0.0 Ok\r\n");
            self.state = State::Chunks;
        }
    }

    fn end_message(&mut self, now: Instant, chunked: bool, out: &mut Vec<u8>, receiver: &mut impl Receiver) {
        if self.fails(Stage::Dot, now, out) {
            receiver.refused(Stage::Dot);
        } else {
            receiver.received(&ReceivedMessage {
                peer: self.peer,
                ehlo: &self.ehlo,
                mail: self.mail.as_deref().unwrap_or_default(),
                recipients: &self.recipients,
                content: &self.content,
                wire_bytes: self.wire_bytes,
                chunked,
                whole: self.whole,
                now,
            });
            out.extend_from_slice(b"250 2.0.0 Ok\r\n");
        }
        self.reset();
    }

    fn reset(&mut self) {
        self.state = State::Command;
        self.mail = None;
        self.recipients.clear();
        self.content.clear();
        if self.content.capacity() > CONTENT_ROOM_KEPT_BYTES {
            self.content = Vec::new();
        }
        self.wire_bytes = 0;
    }

    fn keep(&mut self, content: &[u8]) {
        let room = if self.whole { content.len() } else { HEADER_BYTES_KEPT.saturating_sub(self.content.len()) };
        self.content.extend_from_slice(&content[..room.min(content.len())]);
    }

    fn fails(&mut self, stage: Stage, now: Instant, out: &mut Vec<u8>) -> bool {
        let Some(reply) = self.plan.reply(stage, now, &mut self.random) else {
            return false;
        };
        out.extend_from_slice(reply.as_bytes());
        out.extend_from_slice(b"\r\n");
        // RFC 5321 §3.8: 421 closes the session.
        self.closing |= reply.starts_with("421");
        true
    }
}

/// Finds CRLF.CRLF, and nothing else, in content that arrives in pieces.
#[derive(Debug)]
pub(crate) struct DotScan {
    /// The last octets of what came before, at most four. The CRLF of the DATA command begins the first line.
    tail: [u8; 4],
    tail_len: usize,
}

impl Default for DotScan {
    fn default() -> Self {
        Self { tail: *b"\r\n\0\0", tail_len: 2 }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum DotFound {
    /// Through the final CRLF. `content` octets belong to the message, unless the end began in an earlier piece.
    End {
        consumed: usize,
        content: usize,
    },
    No,
}

impl DotScan {
    pub(crate) fn find(&mut self, piece: &[u8]) -> DotFound {
        // Across the seam.
        let mut seam = [0; 8];
        let lent = piece.len().min(4);
        seam[..self.tail_len].copy_from_slice(&self.tail[..self.tail_len]);
        seam[self.tail_len..self.tail_len + lent].copy_from_slice(&piece[..lent]);
        let seam = &seam[..self.tail_len + lent];
        if let Some(place) = memmem::find(seam, END_OF_DATA) {
            let consumed = place + END_OF_DATA.len() - self.tail_len;
            return DotFound::End { consumed, content: consumed.min((place + 2).saturating_sub(self.tail_len)) };
        }
        if let Some(place) = memmem::find(piece, END_OF_DATA) {
            return DotFound::End { consumed: place + END_OF_DATA.len(), content: place + 2 };
        }
        let last = if piece.len() >= 4 { &piece[piece.len() - 4..] } else { &seam[seam.len().saturating_sub(4)..] };
        self.tail[..last.len()].copy_from_slice(last);
        self.tail_len = last.len();
        DotFound::No
    }
}

/// RFC 5321 §4.5.2: a line's leading dot is dropped. What of the final dot was kept with an earlier piece goes too.
fn unstuff(content: &mut Vec<u8>) {
    if content.ends_with(b"\r\n.\r") {
        content.truncate(content.len() - 2);
    } else if content.ends_with(b"\r\n.") {
        content.truncate(content.len() - 1);
    } else if content.as_slice() == b"." || content.as_slice() == b".\r" {
        content.clear();
    }
    if content.first() != Some(&b'.') && memmem::find(content, b"\r\n.").is_none() {
        return;
    }
    let mut plain = Vec::with_capacity(content.len());
    let mut rest = content.strip_prefix(b".").unwrap_or(content);
    while let Some(place) = memmem::find(rest, b"\r\n.") {
        plain.extend_from_slice(&rest[..place + 2]);
        rest = &rest[place + 3..];
    }
    plain.extend_from_slice(rest);
    *content = plain;
}

fn strip_prefix_ignore_case<'a>(text: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    // `MAIL FROM:` is split at the space, so that the colon is still there.
    let (head, rest) = text.split_at_checked(prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then_some(rest)
}

const END_OF_DATA: &[u8] = b"\r\n.\r\n";
/// The lines that every peer gets.
const EHLO_REPLY: &[u8] =
    b"250-postbench.test\r\n250-PIPELINING\r\n250-SIZE 1073741824\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n";
const LINE_BYTES_MAX: usize = 65_536;
const RECIPIENTS_MAX: usize = 10_000;
/// Enough for the trace and signature fields that an engine puts in front of the injector's.
const HEADER_BYTES_KEPT: usize = 32 << 10;
const CONTENT_ROOM_KEPT_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;
