//! The demo's senders: SMTP clients of the plain kind, several sessions on one ordinary tokio runtime.
//!
//! The envelope of the next message goes out behind the content of the current one (RFC 2920 §3.1), so that a message
//! costs one round trip. They share no code with the engine's own client, only the parser of replies.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use postrider_spool::record::MessageId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::message::{Generated, Generator};
use super::verify::Tally;
use crate::mail::reply::{Reply, ReplyParser};
use crate::runtime::clock::{self, Clock};

/// What all sessions share.
#[derive(Debug)]
pub(crate) struct Senders {
    pub(crate) engine: SocketAddr,
    pub(crate) generator: Generator,
    pub(crate) messages: u32,
    pub(crate) clock: Clock,
    pub(crate) tally: Arc<Mutex<Tally>>,
    next: AtomicU32,
    /// Messages that were answered 4xx; as many as there are sessions at most.
    again: Mutex<Vec<u32>>,
}

impl Senders {
    pub(crate) fn new(
        engine: SocketAddr,
        generator: Generator,
        messages: u32,
        clock: Clock,
        tally: Arc<Mutex<Tally>>,
    ) -> Self {
        Self { engine, generator, messages, clock, tally, next: AtomicU32::new(0), again: Mutex::new(Vec::new()) }
    }

    /// Sends every message until it is accepted or refused for good. What goes wrong is in the tally.
    pub(crate) async fn run(self: Arc<Self>, sessions: u32) {
        let mut running = JoinSet::new();
        for _ in 0..sessions.min(self.messages) {
            running.spawn(Arc::clone(&self).session());
        }
        while running.join_next().await.is_some() {}
    }

    async fn session(self: Arc<Self>) {
        if let Err(reason) = self.converse().await {
            self.tally().note(format!("a sender's session failed: {reason}"));
        }
    }

    async fn converse(&self) -> Result<(), String> {
        let mut session = Session::open(self.engine).await?;
        let mut current = self.begin(&mut session).await?;
        while let Some(message) = current {
            current = match self.transact(&mut session, &message).await? {
                Some(next) => Some(next),
                None => self.begin(&mut session).await?,
            };
        }
        session.write(b"QUIT\r\n").await?;
        session.reply().await.map(drop)
    }

    /// Takes a message and sends its envelope.
    async fn begin(&self, session: &mut Session) -> Result<Option<Generated>, String> {
        let Some(message) = self.take() else { return Ok(None) };
        let mut out = Vec::new();
        write_envelope(&message, &mut out);
        session.write(&out).await.map_err(|error| self.lose(&message, error))?;
        Ok(Some(message))
    }

    /// Finishes a message whose envelope was sent. Gives the next if its envelope went along.
    async fn transact(&self, session: &mut Session, message: &Generated) -> Result<Option<Generated>, String> {
        let refusal = session.envelope_refusal().await.map_err(|error| self.lose(message, error))?;
        if let Some(refusal) = refusal {
            self.refuse(message, &refusal).await;
            return Ok(None);
        }
        let mut out = Vec::with_capacity(message.content.len() + message.content.len() / 64 + ENVELOPE_BYTES);
        write_content(&message.content, &mut out);
        let next = self.take();
        if let Some(next) = &next {
            write_envelope(next, &mut out);
        }
        self.tally().send(message.number, message.content.len(), self.clock.now().monotonic);
        let reply = match session.write(&out).await {
            Ok(()) => session.reply().await,
            Err(error) => Err(error),
        };
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => {
                // None of its content went out; another session may send it.
                self.again().extend(next.map(|next| next.number));
                return Err(self.lose(message, error));
            }
        };
        match accepted_id(&reply) {
            Some(id) => self.tally().accept(message.number, id, self.clock.now().monotonic),
            None => self.refuse(message, &reply).await,
        }
        Ok(next)
    }

    fn take(&self) -> Option<Generated> {
        let again = self.again().pop();
        let number = again.or_else(|| {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            (next < self.messages).then_some(next)
        })?;
        Some(self.generator.message(number))
    }

    /// 4xx: another try after a pause. The run's own patience bounds how often.
    async fn refuse(&self, message: &Generated, reply: &Reply) {
        let again = reply.is_transient();
        self.tally().refuse(message.number, reply_text(reply), again);
        if again {
            clock::sleep(PAUSE).await;
            self.again().push(message.number);
        }
    }

    fn lose(&self, message: &Generated, error: String) -> String {
        self.tally().refuse(message.number, format!("the session ended before the answer: {error}"), false);
        error
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn again(&self) -> MutexGuard<'_, Vec<u32>> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection.
#[derive(Debug)]
struct Session {
    stream: TcpStream,
    input: Vec<u8>,
    parser: ReplyParser,
}

impl Session {
    async fn open(engine: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect(engine).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let mut session = Self { stream, input: Vec::with_capacity(READ_BYTES), parser: ReplyParser::default() };
        session.expect("the greeting", 220).await?;
        session.write(b"EHLO app.sender.test\r\n").await?;
        let offers = session.expect("EHLO", 250).await?;
        for offer in ["PIPELINING", "8BITMIME", "SIZE"] {
            if !offers.lines().any(|line| line.split(' ').next() == Some(offer)) {
                return Err(format!("EHLO does not offer {offer}"));
            }
        }
        Ok(session)
    }

    async fn expect(&mut self, what: &str, code: u16) -> Result<Reply, String> {
        let reply = self.reply().await?;
        if reply.code == code { Ok(reply) } else { Err(format!("{what} was answered {}", reply_text(&reply))) }
    }

    /// The answers to MAIL, RCPT and DATA; the first that is a refusal.
    async fn envelope_refusal(&mut self) -> Result<Option<Reply>, String> {
        let replies = [self.reply().await?, self.reply().await?, self.reply().await?];
        let [mail, recipient, data] = replies;
        if data.code == 354 && (!mail.is_positive() || !recipient.is_positive()) {
            // RFC 2920 §3.1: DATA was taken although nothing is to be sent.
            self.write(b".\r\n").await?;
            self.reply().await?;
        }
        Ok([mail, recipient].into_iter().find(|reply| !reply.is_positive()).or((data.code != 354).then_some(data)))
    }

    async fn reply(&mut self) -> Result<Reply, String> {
        loop {
            let (consumed, reply) = self.parser.parse(&self.input);
            self.input.drain(..consumed);
            if let Some(reply) = reply {
                return reply.map_err(|error| error.to_string());
            }
            let read = self.stream.read_buf(&mut self.input).await.map_err(|error| error.to_string())?;
            if read == 0 {
                return Err("the engine closed the connection".to_owned());
            }
        }
    }

    async fn write(&mut self, out: &[u8]) -> Result<(), String> {
        self.stream.write_all(out).await.map_err(|error| error.to_string())
    }
}

fn write_envelope(message: &Generated, out: &mut Vec<u8>) {
    let body = if message.eight_bit { " BODY=8BITMIME" } else { "" };
    let envelope = format!(
        "MAIL FROM:<{}> SIZE={}{body}\r\nRCPT TO:<{}>\r\nDATA\r\n",
        message.reverse_path,
        message.content.len(),
        message.recipient
    );
    out.extend_from_slice(envelope.as_bytes());
}

/// RFC 5321 §4.5.2: a dot in front of a line that begins with one; then the final dot.
fn write_content(content: &[u8], out: &mut Vec<u8>) {
    for line in content.split_inclusive(|octet| *octet == b'\n') {
        if line.starts_with(b".") {
            out.push(b'.');
        }
        out.extend_from_slice(line);
    }
    out.extend_from_slice(b".\r\n");
}

/// `250 2.0.0 OK id=<id>`
fn accepted_id(reply: &Reply) -> Option<MessageId> {
    if reply.code != 250 {
        return None;
    }
    reply.text().split(' ').find_map(|word| word.strip_prefix("id="))?.parse().ok()
}

fn reply_text(reply: &Reply) -> String {
    format!("{} {}", reply.code, reply.text())
}

/// Before a message is tried again that was answered 4xx.
const PAUSE: Duration = Duration::from_millis(50);
const READ_BYTES: usize = 4_096;
const ENVELOPE_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_are_doubled_at_line_starts_only() {
        let mut out = Vec::new();
        write_content(b"a.b\r\n.\r\n..x\r\n \r\n", &mut out);
        assert_eq!(out, b"a.b\r\n..\r\n...x\r\n \r\n.\r\n");
    }

    #[test]
    fn an_id_is_read_from_a_250_only() {
        let id = MessageId::from_raw(0x12);
        assert_eq!(accepted_id(&Reply::new(250, &format!("2.0.0 OK id={id}"))), Some(id));
        assert_eq!(accepted_id(&Reply::new(451, &format!("4.0.0 OK id={id}"))), None);
        assert_eq!(accepted_id(&Reply::new(250, "2.0.0 OK")), None);
    }

    #[test]
    fn an_envelope_declares_size_and_eight_bit() {
        let mut message = Generator::new(1, 0).message(8);
        message.eight_bit = true;
        message.content = vec![b'x'; 600];
        let mut out = Vec::new();
        write_envelope(&message, &mut out);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "MAIL FROM:<bounce+8@sender.test> SIZE=600 BODY=8BITMIME\r\nRCPT TO:<m8@d3.recipient.test>\r\nDATA\r\n"
        );
    }
}
