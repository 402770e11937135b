//! The SMTP server's state machine (RFC 5321, with the extensions that EHLO lists). No I/O, no clock.
//!
//! Calling order: [`SmtpServer::new`] writes the greeting; then [`SmtpServer::handle`] with whatever the client sent,
//! again and again with what it did not consume. Its events hand control over: after `Message` nothing is consumed
//! until [`SmtpServer::handle_answer`], after `StartTls` until [`SmtpServer::handle_tls_started`]; `Close` comes once
//! `out` holds the last reply, and is repeated. [`SmtpServer::next_timeout`] is the one deadline.
//!
//! Invariants: a 250 to the end of a message needs a `MessageId`, which only a commit makes. A message has at most
//! `RECIPIENTS_MAX` recipients, each once. Replies come in the order of commands (RFC 2920).
//!
//! Over 500 lines, because every command changes the one session's state: apart they would need it all passed around.

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use memchr::memchr;
use postrider_spool::record::{DsnParameters, MessageId};

use super::smtp_command::{self, Bdat, Mail, Verb};
use super::smtp_data::{ContentFault, ContentReceiver, Framing};
use super::{Received, Refusal};
use crate::config::{LineEndings, ReceivedDetail, SmtpListener};
use crate::limits::{
    COMMAND_LINE_BYTES_MAX, HELO_BYTES_MAX, RECIPIENTS_MAX, REPLY_BYTES_MAX, SERVER_IDLE_MAX, SESSION_ERRORS_MAX,
};
use crate::mail::time::Now;

/// What a session may do and says of itself.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    pub hostname: Arc<str>,
    pub client: SocketAddr,
    /// Without it every recipient is 550 5.7.1.
    pub may_relay: bool,
    /// Passed on in [`Received`].
    pub trusted: bool,
    pub max_message_bytes: u64,
    pub line_endings: LineEndings,
    pub received_detail: ReceivedDetail,
    pub starttls: bool,
}

impl SessionOptions {
    pub fn new(hostname: Arc<str>, listener: &SmtpListener, client: SocketAddr) -> Self {
        // An IPv4 client of an IPv6 socket is still an IPv4 client to whoever wrote `relay_from`.
        let address = client.ip().to_canonical();
        Self {
            hostname,
            client: SocketAddr::new(address, client.port()),
            may_relay: listener.relay_from.iter().any(|net| net.contains(&address)),
            trusted: listener.trusted_hosts.iter().any(|net| net.contains(&address)),
            max_message_bytes: listener.max_message_bytes,
            line_endings: listener.line_endings,
            received_detail: listener.received,
            starttls: listener.tls.is_some(),
        }
    }
}

/// One session. See the module for the order of calls.
#[derive(Debug)]
pub struct SmtpServer {
    options: SessionOptions,
    session_id: u64,
    state: State,
    helo: Option<Helo>,
    tls: bool,
    transaction: Option<Transaction>,
    /// When the transaction began, also while its message waits.
    began: Option<Duration>,
    errors: u32,
    /// 4xx and 5xx replies that nobody has counted yet.
    refused: u32,
    deadline: Duration,
    /// The engine shuts down: close after the message that is under way.
    stopping: bool,
}

/// What [`SmtpServer::handle`] did.
#[derive(Debug)]
pub struct Handled {
    pub consumed: usize,
    pub event: Option<ServerEvent>,
}

#[derive(Debug)]
pub enum ServerEvent {
    /// A whole message; it waits for [`SmtpServer::handle_answer`].
    Message(Box<Received>),
    /// `out` ends with the 220 of STARTTLS.
    StartTls,
    /// Write `out` and close.
    Close,
}

#[derive(Debug)]
enum State {
    Command,
    /// The rest of an over-long command line is dropped.
    LongLine,
    Data(ContentReceiver),
    Chunk(Chunk),
    /// A message waits for its commit.
    Waiting,
    StartingTls,
    Closed,
}

/// A BDAT chunk whose octets arrive.
#[derive(Debug)]
struct Chunk {
    size: u64,
    remaining: u64,
    last: bool,
    /// The octets are dropped and this is the reply.
    refusal: Option<Refusal>,
}

#[derive(Debug)]
struct Helo {
    name: String,
    extended: bool,
}

#[derive(Debug)]
struct Transaction {
    mail: Mail,
    recipients: Vec<String>,
    recipient_refused: bool,
    /// Content that came by BDAT so far (RFC 3030).
    chunks: Option<ContentReceiver>,
}

/// What one turn of the state machine did with the input.
enum Step {
    NeedsInput,
    Consumed(usize),
    Event(usize, ServerEvent),
}

impl SmtpServer {
    /// Appends the greeting to `out`.
    pub fn new(now: Now, options: SessionOptions, session_id: u64, out: &mut Vec<u8>) -> Self {
        write_line(out, &format!("220 {} ESMTP Postrider", options.hostname));
        Self {
            options,
            session_id,
            state: State::Command,
            helo: None,
            tls: false,
            transaction: None,
            began: None,
            errors: 0,
            refused: 0,
            deadline: now.monotonic + SERVER_IDLE_MAX,
            stopping: false,
        }
    }

    pub fn session_id(&self) -> u64 {
        self.session_id
    }

    /// MAIL was accepted, and what it began has not ended.
    pub fn is_in_transaction(&self) -> bool {
        self.transaction.is_some()
    }

    /// Content has begun, and its end has not come.
    pub fn is_amid_content(&self) -> bool {
        matches!(self.state, State::Data(_) | State::Chunk(_))
    }

    /// Octets of memory that the content takes which is being received.
    pub fn content_bytes(&self) -> u64 {
        let chunks = self.transaction.as_ref().and_then(|transaction| transaction.chunks.as_ref());
        let data = if let State::Data(receiver) = &self.state { Some(receiver) } else { None };
        data.or(chunks).map_or(0, ContentReceiver::memory_bytes)
    }

    /// Lets go of that content; the client is told at its end, and may send it again later.
    pub fn give_up_content(&mut self) {
        let chunks = self.transaction.as_mut().and_then(|transaction| transaction.chunks.as_mut());
        let data = if let State::Data(receiver) = &mut self.state { Some(receiver) } else { None };
        if let Some(receiver) = data.or(chunks) {
            receiver.give_up();
        }
    }

    /// How many 4xx and 5xx replies were appended since this was asked last.
    pub fn take_refused(&mut self) -> u32 {
        std::mem::take(&mut self.refused)
    }

    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// Takes what the client sent. Without an event, `consumed == 0` means that more input is needed; otherwise write
    /// `out` and call again with the rest. An incomplete command line stays with the caller, whose buffer must hold
    /// [`COMMAND_LINE_BYTES_MAX`] octets.
    pub fn handle(&mut self, now: Now, input: &[u8], out: &mut Vec<u8>) -> Handled {
        let replies_start = out.len();
        let mut consumed = 0;
        while out.len() - replies_start < REPLY_BYTES_MAX {
            let rest = &input[consumed..];
            let step = match &mut self.state {
                State::Command => self.take_line(rest, out),
                State::LongLine => self.skip_line(rest, out),
                State::Data(_) => self.take_data(rest, out),
                State::Chunk(_) => self.take_chunk(rest, out),
                State::StartingTls if !rest.is_empty() => {
                    // RFC 3207 §4.2: such octets came before the encryption, perhaps from someone in the middle.
                    self.state = State::Closed;
                    Step::Consumed(0)
                }
                State::Waiting | State::StartingTls => Step::NeedsInput,
                State::Closed => return Handled { consumed: input.len(), event: Some(ServerEvent::Close) },
            };
            let event = match step {
                Step::NeedsInput => break,
                Step::Consumed(octets) => {
                    consumed += octets;
                    None
                }
                Step::Event(octets, event) => {
                    consumed += octets;
                    Some(event)
                }
            };
            self.deadline = now.monotonic + SERVER_IDLE_MAX;
            if self.transaction.is_some() {
                self.began.get_or_insert(now.monotonic);
            } else if !self.is_waiting() {
                self.began = None;
            }
            if event.is_some() {
                return Handled { consumed, event };
            }
        }
        Handled { consumed, event: None }
    }

    /// Answers the end of the message that was handed out. Call [`Self::handle`] next, also without input. Tells how
    /// long the transaction took since its MAIL.
    pub fn handle_answer(&mut self, now: Now, answer: Result<MessageId, Refusal>, out: &mut Vec<u8>) -> Duration {
        assert!(self.is_waiting());
        let began = self.began.take().expect("a message has come by a transaction");
        self.state = State::Command;
        self.deadline = now.monotonic + SERVER_IDLE_MAX;
        match answer {
            Ok(id) => {
                self.errors = 0;
                // To a vector nothing fails to be written.
                let _ = write!(out, "250 2.0.0 OK id={id}\r\n");
            }
            Err(refusal) => self.refuse(&refusal, out),
        }
        self.close_if_stopping(out);
        now.monotonic.saturating_sub(began)
    }

    /// The handshake is done. What the client said before is forgotten (RFC 3207 §4.2).
    pub fn handle_tls_started(&mut self, now: Now) {
        assert!(matches!(self.state, State::StartingTls));
        self.state = State::Command;
        self.tls = true;
        self.helo = None;
        self.transaction = None;
        self.deadline = now.monotonic + SERVER_IDLE_MAX;
    }

    /// Closes with 421 if the deadline has passed.
    pub fn handle_timeout(&mut self, now: Now, out: &mut Vec<u8>) {
        if now.monotonic < self.next_timeout() {
            return;
        }
        match self.state {
            State::Closed | State::StartingTls => self.state = State::Closed,
            _ => self.close_with("421 4.4.2", "idle for too long", out),
        }
    }

    /// Monotonic time at which to call [`Self::handle_timeout`]; never while a message waits for its answer.
    pub fn next_timeout(&self) -> Duration {
        if self.is_waiting() { Duration::MAX } else { self.deadline }
    }

    /// The engine shuts down. True: write `out` and close now. False: a message is under way; after it `handle` says
    /// `Close`.
    pub fn handle_shutdown(&mut self, _now: Now, out: &mut Vec<u8>) -> bool {
        self.stopping = true;
        match self.state {
            State::Command | State::LongLine => self.close_if_stopping(out),
            State::StartingTls => self.state = State::Closed,
            State::Data(_) | State::Chunk(_) | State::Waiting | State::Closed => {}
        }
        matches!(self.state, State::Closed)
    }

    /// A message waits for [`Self::handle_answer`]; nothing is consumed meanwhile.
    pub fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting)
    }

    fn take_line(&mut self, input: &[u8], out: &mut Vec<u8>) -> Step {
        let searched = &input[..input.len().min(COMMAND_LINE_BYTES_MAX)];
        let Some(end) = memchr(b'\n', searched) else {
            if searched.len() < COMMAND_LINE_BYTES_MAX {
                return Step::NeedsInput;
            }
            self.state = State::LongLine;
            return Step::Consumed(searched.len());
        };
        let consumed = end + 1;
        // RFC 5321 §2.3.8: only CRLF ends a line. A line that ends otherwise is answered, so that its author learns
        // why.
        let Some(line) = searched[..end].strip_suffix(b"\r") else {
            self.refuse(&Refusal::new(500, (5, 5, 2), "a line must end with CRLF"), out);
            return Step::Consumed(consumed);
        };
        let line = match std::str::from_utf8(line) {
            Ok(line) if !line.contains(|c: char| c.is_control() && c != '\t') => line,
            _ => {
                self.refuse(&Refusal::new(500, (5, 5, 2), "a command must be printable text"), out);
                return Step::Consumed(consumed);
            }
        };
        let event = self.handle_command(line, input.len() > consumed, out);
        match event {
            Some(event) => Step::Event(consumed, event),
            None => Step::Consumed(consumed),
        }
    }

    fn skip_line(&mut self, input: &[u8], out: &mut Vec<u8>) -> Step {
        let Some(end) = memchr(b'\n', input) else {
            return if input.is_empty() { Step::NeedsInput } else { Step::Consumed(input.len()) };
        };
        self.state = State::Command;
        self.refuse(&Refusal::new(500, (5, 5, 2), "the line is too long"), out);
        Step::Consumed(end + 1)
    }

    fn handle_command(&mut self, line: &str, more_follows: bool, out: &mut Vec<u8>) -> Option<ServerEvent> {
        let (verb, arguments) = smtp_command::split(line);
        let done = match verb {
            Verb::Ehlo | Verb::Helo => self.handle_helo(verb == Verb::Ehlo, arguments, out),
            Verb::Mail => self.handle_mail(arguments, out),
            Verb::Rcpt => self.handle_rcpt(arguments, out),
            Verb::Data => self.handle_data(arguments, out),
            Verb::Bdat => self.handle_bdat(arguments, out),
            Verb::Rset if arguments.is_empty() => {
                self.transaction = None;
                write_line(out, "250 2.0.0 OK");
                Ok(())
            }
            Verb::Noop => {
                write_line(out, "250 2.0.0 OK");
                Ok(())
            }
            Verb::Quit => {
                write_line(out, &format!("221 2.0.0 {} closing", self.options.hostname));
                self.state = State::Closed;
                Ok(())
            }
            // RFC 5321 §3.5.3: what we would not look up, we say neither yes nor no to.
            Verb::Vrfy if !arguments.is_empty() => {
                write_line(out, "252 2.0.0 not verified, but would be tried");
                Ok(())
            }
            Verb::Help => {
                write_help(self.options.starttls && !self.tls, out);
                Ok(())
            }
            Verb::StartTls => return self.handle_starttls(arguments, more_follows, out),
            Verb::Rset => Err(Refusal::new(501, (5, 5, 4), "RSET takes no argument")),
            Verb::Vrfy => Err(Refusal::new(501, (5, 5, 4), "syntax: VRFY <address>")),
            Verb::NotAvailable => Err(Refusal::new(502, (5, 5, 1), "this command is not available; try HELP")),
            Verb::Http => {
                self.state = State::Closed;
                Err(Refusal::new(554, (5, 5, 1), "this is an SMTP server, not a web server"))
            }
            Verb::Unknown => Err(Refusal::new(500, (5, 5, 1), "unknown command; try HELP")),
        };
        if let Err(refusal) = done {
            self.refuse(&refusal, out);
        }
        None
    }

    fn handle_helo(&mut self, extended: bool, name: &str, out: &mut Vec<u8>) -> Result<(), Refusal> {
        if name.is_empty() {
            return Err(Refusal::new(501, (5, 5, 4), "your host name is missing"));
        }
        self.helo = Some(Helo { name: safe_helo(name), extended });
        // RFC 5321 §4.1.4: a second greeting is a RSET, too.
        self.transaction = None;
        let hostname = &self.options.hostname;
        if !extended {
            write_line(out, &format!("250 {hostname}"));
            return Ok(());
        }
        write_line(out, &format!("250-{hostname} greets you"));
        write_line(out, "250-PIPELINING");
        write_line(out, &format!("250-SIZE {}", self.options.max_message_bytes));
        if self.options.starttls && !self.tls {
            write_line(out, "250-STARTTLS");
        }
        write_line(out, "250-8BITMIME");
        write_line(out, "250-SMTPUTF8");
        write_line(out, "250-CHUNKING");
        write_line(out, "250-ENHANCEDSTATUSCODES");
        write_line(out, &format!("250 LIMITS RCPTMAX={RECIPIENTS_MAX}"));
        Ok(())
    }

    fn handle_mail(&mut self, arguments: &str, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let Some(helo) = &self.helo else {
            return Err(out_of_order("say EHLO first"));
        };
        if self.transaction.is_some() {
            return Err(out_of_order("a transaction is open; RSET ends it"));
        }
        let mail = smtp_command::parse_mail(arguments, helo.extended)?;
        if mail.size.is_some_and(|size| size > self.options.max_message_bytes) {
            return Err(ContentFault::TooLarge.refusal());
        }
        self.transaction = Some(Transaction { mail, recipients: Vec::new(), recipient_refused: false, chunks: None });
        write_line(out, "250 2.1.0 OK");
        Ok(())
    }

    fn handle_rcpt(&mut self, arguments: &str, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let transaction = self.transaction.as_mut().ok_or_else(|| out_of_order("say MAIL first"))?;
        if transaction.chunks.is_some() {
            return Err(out_of_order("BDAT has begun"));
        }
        let parsed = smtp_command::parse_rcpt(arguments, &self.options.hostname, transaction.mail.smtputf8);
        let recipient = match parsed {
            Ok(recipient) if self.options.may_relay => recipient,
            refused => {
                transaction.recipient_refused = true;
                refused?;
                let client = self.options.client.ip();
                return Err(Refusal::new(550, (5, 7, 1), format!("relaying denied: {client} is not in relay_from")));
            }
        };
        if !transaction.recipients.contains(&recipient) {
            if transaction.recipients.len() >= RECIPIENTS_MAX {
                // RFC 5321 §4.5.3.1.10. No error of the client: it sends the rest in another transaction.
                write_line(out, &format!("452 4.5.3 more than {RECIPIENTS_MAX} recipients"));
                self.refused += 1;
                return Ok(());
            }
            transaction.recipients.push(recipient);
        }
        write_line(out, "250 2.1.5 OK");
        Ok(())
    }

    fn handle_data(&mut self, arguments: &str, out: &mut Vec<u8>) -> Result<(), Refusal> {
        if !arguments.is_empty() {
            return Err(Refusal::new(501, (5, 5, 4), "DATA takes no argument"));
        }
        let transaction = self.transaction_with_recipients()?;
        if transaction.chunks.is_some() {
            return Err(out_of_order("BDAT has begun"));
        }
        let size = transaction.mail.size;
        self.state = State::Data(self.new_receiver(Framing::Dot, size));
        write_line(out, "354 end with <CRLF>.<CRLF>");
        Ok(())
    }

    fn take_data(&mut self, input: &[u8], out: &mut Vec<u8>) -> Step {
        let State::Data(receiver) = &mut self.state else { unreachable!("state was looked at by handle") };
        if input.is_empty() {
            return Step::NeedsInput;
        }
        let (consumed, ended) = receiver.receive(input);
        if !ended {
            return Step::Consumed(consumed);
        }
        match std::mem::replace(&mut self.state, State::Command) {
            State::Data(receiver) => self.end_message(consumed, receiver, out),
            _ => unreachable!("state was looked at above"),
        }
    }

    fn handle_bdat(&mut self, arguments: &str, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let Some(Bdat { size, last }) = smtp_command::parse_bdat(arguments) else {
            // The client goes on with octets that nobody counted; they must not be taken for commands.
            let syntax = Refusal::new(501, (5, 5, 4), "syntax: BDAT octets [LAST]");
            write_line(out, &syntax.to_string());
            self.close_with("421 4.5.0", "the length of the chunk is unknown", out);
            return Ok(());
        };
        // RFC 3030 §2: the octets follow, whatever we say to the command.
        let refusal = self.transaction_with_recipients().err();
        if refusal.is_none() {
            let (line_endings, bytes_max) = (self.options.line_endings, self.options.max_message_bytes);
            let begun = |transaction: &Transaction| {
                let declared = transaction.mail.size.or(Some(size));
                ContentReceiver::new(Framing::Counted, line_endings, bytes_max, declared)
            };
            if let Some(transaction) = self.transaction.as_mut().filter(|transaction| transaction.chunks.is_none()) {
                transaction.chunks = Some(begun(transaction));
            }
        }
        self.state = State::Chunk(Chunk { size, remaining: size, last, refusal });
        Ok(())
    }

    fn take_chunk(&mut self, input: &[u8], out: &mut Vec<u8>) -> Step {
        let State::Chunk(chunk) = &mut self.state else { unreachable!("state was looked at by handle") };
        let piece = &input[..chunk.remaining.min(input.len() as u64) as usize];
        if piece.is_empty() && chunk.remaining > 0 {
            return Step::NeedsInput;
        }
        chunk.remaining -= piece.len() as u64;
        let receiver = self.transaction.as_mut().and_then(|transaction| transaction.chunks.as_mut());
        let mut fault = None;
        if let (None, Some(receiver)) = (&chunk.refusal, receiver) {
            receiver.receive(piece);
            fault = receiver.fault();
        }
        if chunk.remaining > 0 {
            return Step::Consumed(piece.len());
        }
        let (size, last) = (chunk.size, chunk.last);
        let refusal = chunk.refusal.take().or(fault.map(ContentFault::refusal));
        self.state = State::Command;
        let receiver = match &mut self.transaction {
            Some(transaction) if last => transaction.chunks.take(),
            _ => None,
        };
        match (refusal, receiver) {
            (None, Some(receiver)) => return self.end_message(piece.len(), receiver, out),
            (Some(refusal), _) => {
                if last {
                    self.transaction = None;
                }
                self.refuse(&refusal, out);
                self.close_if_stopping(out);
            }
            (None, None) => {
                write_line(out, &format!("250 2.0.0 {size} octets received"));
                self.close_if_stopping(out);
            }
        }
        Step::Consumed(piece.len())
    }

    fn handle_starttls(&mut self, arguments: &str, more_follows: bool, out: &mut Vec<u8>) -> Option<ServerEvent> {
        let refusal = if !self.options.starttls {
            Refusal::new(502, (5, 5, 1), "STARTTLS is not available")
        } else if self.tls {
            out_of_order("TLS is on already")
        } else if !arguments.is_empty() {
            Refusal::new(501, (5, 5, 4), "STARTTLS takes no argument")
        } else if more_follows {
            // RFC 3207 §4.2, RFC 2920 §3.1: STARTTLS ends a group. What follows it was perhaps slipped in.
            self.state = State::Closed;
            Refusal::new(554, (5, 5, 1), "nothing may follow STARTTLS before the handshake")
        } else {
            write_line(out, "220 2.0.0 ready for TLS");
            self.state = State::StartingTls;
            return Some(ServerEvent::StartTls);
        };
        self.refuse(&refusal, out);
        None
    }

    fn transaction_with_recipients(&self) -> Result<&Transaction, Refusal> {
        let transaction = self.transaction.as_ref().ok_or_else(|| out_of_order("say MAIL first"))?;
        if !transaction.recipients.is_empty() {
            Ok(transaction)
        } else if transaction.recipient_refused {
            // RFC 5321 §3.3.
            Err(Refusal::new(554, (5, 5, 1), "no valid recipients"))
        } else {
            Err(out_of_order("say RCPT first"))
        }
    }

    fn new_receiver(&self, framing: Framing, declared_bytes: Option<u64>) -> ContentReceiver {
        ContentReceiver::new(framing, self.options.line_endings, self.options.max_message_bytes, declared_bytes)
    }

    /// The content is complete: hands the message out or refuses it. Either way the transaction is over.
    fn end_message(&mut self, consumed: usize, receiver: ContentReceiver, out: &mut Vec<u8>) -> Step {
        let (Some(transaction), Some(helo)) = (self.transaction.take(), &self.helo) else {
            unreachable!("content is only received in a transaction, which needs a HELO");
        };
        assert!(!transaction.recipients.is_empty());
        let content = match receiver.finish() {
            Ok(content) => content,
            Err(fault) => {
                self.refuse(&fault.refusal(), out);
                self.close_if_stopping(out);
                return Step::Consumed(consumed);
            }
        };
        let Transaction { mail, recipients, .. } = transaction;
        let received = Received {
            reverse_path: mail.reverse_path,
            recipients,
            content,
            eight_bit_declared: mail.eight_bit,
            smtputf8_declared: mail.smtputf8,
            helo: helo.name.clone(),
            protocol: protocol_name(helo.extended, self.tls, mail.smtputf8),
            client: Some(self.options.client),
            session_id: self.session_id,
            trusted: self.options.trusted,
            received_detail: self.options.received_detail,
            dsn: DsnParameters::default(),
            meta: Vec::new(),
        };
        self.state = State::Waiting;
        Step::Event(consumed, ServerEvent::Message(Box::new(received)))
    }

    fn refuse(&mut self, refusal: &Refusal, out: &mut Vec<u8>) {
        write_line(out, &refusal.to_string());
        self.refused += 1;
        if refusal.is_temporary() {
            return;
        }
        self.errors += 1;
        if self.errors >= SESSION_ERRORS_MAX && !matches!(self.state, State::Closed) {
            self.close_with("421 4.7.0", "too many errors", out);
        }
    }

    fn close_if_stopping(&mut self, out: &mut Vec<u8>) {
        if self.stopping && !matches!(self.state, State::Closed) {
            self.close_with("421 4.3.2", "shutting down", out);
        }
    }

    fn close_with(&mut self, codes: &str, why: &str, out: &mut Vec<u8>) {
        write_line(out, &format!("{codes} {} {why}, closing", self.options.hostname));
        self.refused += 1;
        self.state = State::Closed;
        self.transaction = None;
    }
}

fn out_of_order(text: &str) -> Refusal {
    Refusal::new(503, (5, 5, 1), text)
}

/// RFC 3848; RFC 6531 §4.3.
fn protocol_name(extended: bool, tls: bool, smtputf8: bool) -> &'static str {
    match (extended, tls, smtputf8) {
        (false, ..) => "SMTP",
        (true, false, false) => "ESMTP",
        (true, true, false) => "ESMTPS",
        (true, false, true) => "UTF8SMTP",
        (true, true, true) => "UTF8SMTPS",
    }
}

/// The name goes into a Received field: nothing that would end a word, open a comment or break the line.
fn safe_helo(name: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "-._:[]".contains(c) { c } else { '?' };
    name.chars().take(HELO_BYTES_MAX).map(safe).collect()
}

fn write_help(offers_starttls: bool, out: &mut Vec<u8>) {
    let starttls = if offers_starttls { " STARTTLS" } else { "" };
    write_line(out, &format!("214-2.0.0 EHLO HELO MAIL RCPT DATA BDAT RSET NOOP QUIT VRFY HELP{starttls}"));
    write_line(out, "214 2.0.0 Postrider relays mail for the hosts in its relay_from; AUTH and DSN are not available");
}

fn write_line(out: &mut Vec<u8>, line: &str) {
    out.extend_from_slice(line.as_bytes());
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests;
