//! The SMTP (RFC 5321) and LMTP (RFC 2033) client: one connection, without I/O.
//!
//! Calling order: [`SmtpClient::new`] when connected; [`SmtpClient::handle`] with what the peer sent; write what it
//! appended to `out`, and tell [`SmtpClient::handle_written`]; drain [`SmtpClient::poll_event`] after every call; call
//! [`SmtpClient::handle_timeout`] at [`SmtpClient::next_timeout`]. After [`ClientEvent::Idle`] a transaction may be
//! started. After [`ClientEvent::StartTls`] the caller writes `out`, does the handshake, and reports how it went; from
//! then on octets go in and out as plaintext. [`ClientEvent::Closed`] comes once and last: write `out`, then close.
//!
//! Invariants:
//! * Every command written has its place in the queue of replies to come, and every reply goes to the one in front.
//! * Every transaction that was started has one [`ClientEvent::Finished`], in order, with one verdict per recipient.
//! * Content is sent only after its own MAIL and one of its recipients were accepted, and DATA, where it goes by DATA,
//!   was answered 354. Only whole transactions (`chunking = "back_to_back"`) don't wait: there BDAT tells the peer
//!   where the content ends, and the replies tell us under which envelope it went.
//! * A 354 is answered with the message or by closing; with a lone dot only where every recipient was refused.
//! * A transaction that rides behind another begins with RSET.
//! * Where what is in doubt is to be held, no final dot is put out before its intent is recorded.
//!
//! What a reply, a loss or a timeout means is decided in `verdict.rs`. Here are the calls, the time and the state; what
//! is written is in `smtp_client/command.rs`, what replies move in `answer.rs`, how it ends in `ending.rs`.

mod answer;
mod auth;
mod command;
mod ending;

use std::collections::VecDeque;
use std::time::Duration;

use self::auth::AuthStep;
use crate::config::{Chunking, Credentials, DeliveryProtocol, EightBit, InDoubt, Timeouts, TlsMode};
use crate::deliver::attempt::{Stage, Transaction, TransactionResult};
use crate::deliver::content::{Chunk, Content};
use crate::deliver::extension::Extensions;
use crate::deliver::in_flight::{Form, InFlight, Intent};
use crate::deliver::verdict::{Happened, SessionFailure};
use crate::limits::{IN_FLIGHT_MAX, IN_FLIGHT_OCTETS_MAX, STUFF_WINDOW_OCTETS};
use crate::mail::reply::{Reply, ReplyParser};
use crate::mail::time::Now;

/// One connection to a peer.
pub struct SmtpClient<C: Content> {
    options: ClientOptions,
    phase: Phase,
    parser: ReplyParser,
    /// What each reply to come answers, oldest first. Replies of a transaction come before those of the next.
    expected: VecDeque<Expected>,
    /// Replies to content that is not reported as written yet; never more than are expected.
    early: VecDeque<Reply>,
    transactions: VecDeque<InFlight<C>>,
    offered: Extensions,
    encrypted: bool,
    /// The peer may remember the last envelope (RFC 5321 §4.1.1.4 clears it only after content).
    reset_first: bool,
    /// The peer has accepted RSET on this connection.
    knows_reset: bool,
    /// Octets appended to `out` so far, and those reported as written.
    emitted: u64,
    written: u64,
    mails_begun: u32,
    /// Since [`Self::take_sent`].
    sent_recipients: u64,
    mails_answered: u32,
    /// The tickets of transactions whose MAIL was put into `out`, since somebody asked.
    mails: Vec<u64>,
    deadline: Option<Duration>,
    parting: Option<Parting>,
    events: VecDeque<ClientEvent>,
}

/// The connection ends as soon as what is in flight is answered.
struct Parting {
    failure: Option<SessionFailure>,
}

#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Our name.
    pub ehlo: String,
    pub protocol: DeliveryProtocol,
    /// What we say of ourselves before the first transaction.
    pub auth: Option<Credentials>,
    /// Use PIPELINING where it is offered.
    pub pipelining: bool,
    /// How content goes where CHUNKING is offered, and how much is in flight.
    pub chunking: Chunking,
    /// Whole transactions in flight at most.
    pub max_in_flight: u32,
    pub in_doubt: InDoubt,
    pub eight_bit: EightBit,
    pub tls: TlsMode,
    pub timeouts: Timeouts,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientEvent {
    /// Nothing is in flight: a transaction may be started, or the connection be kept for later, or be quit.
    Idle,
    /// Write `out`, then do the TLS handshake.
    StartTls,
    /// The final dot of the transaction in front waits for [`SmtpClient::handle_intended`]: record first that from then
    /// on these recipients are in doubt until they are finished. Comes only with `in_doubt = "hold"`.
    Intend {
        ticket: u64,
        /// Indexes in the message's envelope.
        recipients: Vec<u32>,
    },
    Finished(TransactionResult),
    /// The last event. Write `out`, then close without waiting for the peer.
    Closed {
        /// `None`: it just ended, and says nothing about the host.
        failure: Option<SessionFailure>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Until the session is up.
    Greeting,
    Handshaking,
    Open,
    Quitting,
    Closed,
}

/// What a reply to come answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Banner,
    Ehlo,
    Helo,
    StartTls,
    Auth(AuthStep),
    Reset,
    Mail,
    /// The recipient's place in its transaction.
    Recipient(usize),
    Data,
    /// The content, by whichever command; in LMTP for one recipient.
    Final(Option<usize>),
    /// A lone dot after a pointless 354.
    LoneDot,
    Quit,
}

impl<C: Content> SmtpClient<C> {
    /// The connection was just made; the peer speaks first.
    pub fn new(now: Now, options: ClientOptions) -> Self {
        let mut client = Self {
            options,
            phase: Phase::Greeting,
            parser: ReplyParser::default(),
            expected: VecDeque::from([Expected::Banner]),
            early: VecDeque::new(),
            transactions: VecDeque::new(),
            offered: Extensions::default(),
            encrypted: false,
            reset_first: false,
            knows_reset: false,
            emitted: 0,
            written: 0,
            mails_begun: 0,
            sent_recipients: 0,
            mails: Vec::new(),
            mails_answered: 0,
            deadline: None,
            parting: None,
            events: VecDeque::new(),
        };
        client.restart_timer(now);
        client
    }

    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        self.events.pop_front()
    }

    /// The peer has not said all that it is to say yet.
    pub fn awaits_replies(&self) -> bool {
        self.expected.len() > self.early.len()
    }

    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Open && self.transactions.is_empty()
    }

    /// For the transactions that are begun from now on.
    pub fn set_chunking(&mut self, chunking: Chunking) {
        self.options.chunking = chunking;
    }

    /// What the peer offered last, that is, within TLS where that was started.
    pub fn extensions(&self) -> &Extensions {
        &self.offered
    }

    /// Transactions for which MAIL was put into `out` on this connection.
    pub fn deliveries(&self) -> u32 {
        self.mails_begun
    }

    /// Tickets of transactions whose MAIL was put into `out` since the last call. Rates count then: without PIPELINING,
    /// it waits for the reply to RSET.
    pub fn poll_mail(&mut self) -> Option<u64> {
        // Never more than those of one call, which are few.
        if self.mails.is_empty() { None } else { Some(self.mails.remove(0)) }
    }

    /// Recipients for whom the last octets of a message were put into `out` since the last call, and who are sent it
    /// again when what became of them is lost. [`TransactionResult::sent_recipients`] tells it at the end.
    pub fn take_sent(&mut self) -> u64 {
        std::mem::take(&mut self.sent_recipients)
    }

    pub fn in_flight(&self) -> usize {
        self.transactions.len()
    }

    /// When [`Self::handle_timeout`] is to be called, in monotonic time. `None` while idle: the pool decides then.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.deadline
    }

    /// Takes all of `input`, what the peer sent (decrypted).
    pub fn handle(&mut self, now: Now, input: &[u8], out: &mut Vec<Chunk<C::Piece>>) {
        let mut rest = input;
        let mut answered = false;
        while !rest.is_empty() && !matches!(self.phase, Phase::Handshaking | Phase::Closed) {
            let (consumed, parsed) = self.parser.parse(rest);
            rest = &rest[consumed..];
            if self.parser.take_blank() && self.expected.len() - self.early.len() > 1 {
                // It may stand for a reply, and then all that follow would be taken for the one before.
                self.end(Happened::Garbled("the peer sent a blank line in place of a reply".to_owned()));
                continue;
            }
            match parsed {
                None => {}
                Some(Ok(reply)) => {
                    answered = true;
                    self.take_reply(reply, out);
                    if self.phase == Phase::Handshaking && rest.is_empty() {
                        self.events.push_back(ClientEvent::StartTls);
                    }
                }
                Some(Err(error)) => self.end(Happened::Garbled(error.to_string())),
            }
        }
        if self.phase == Phase::Handshaking && !rest.is_empty() {
            // RFC 3207 §6: whoever sent this in the clear must not be heard as if it came within TLS.
            let injected = Happened::Garbled("octets in the clear behind the reply to STARTTLS".to_owned());
            self.fail_session(Stage::StartTls, &injected, "STARTTLS");
        }
        if answered {
            self.restart_timer(now);
        }
    }

    /// Begins a transaction; the client must be idle.
    pub fn start(&mut self, now: Now, transaction: Transaction<C>, out: &mut Vec<Chunk<C::Piece>>) {
        assert!(self.is_idle(), "a transaction is started only when nothing is in flight");
        self.begin(transaction, self.reset_first, out);
        self.restart_timer(now);
    }

    /// Whether the next transaction may ride behind the content now: all of that is in `out` and awaits its reply, and
    /// the peer offers PIPELINING (RFC 2920 §3.1 lets RSET and MAIL follow the content in one group).
    pub fn can_ride(&self) -> bool {
        let Some(last) = self.transactions.back() else { return false };
        // What we refused ourselves has no content.
        let behind_content = last.content_end.is_some() || last.mail_begin.is_none();
        let open = self.phase == Phase::Open && self.parting.is_none();
        let room = match (self.options.chunking, self.form()) {
            (Chunking::Off, _) => false,
            (Chunking::BackToBack, Form::Whole) => {
                let octets: u64 = self.transactions.iter().map(InFlight::content_octets).sum();
                self.transactions.len() < self.options.max_in_flight as usize && octets < IN_FLIGHT_OCTETS_MAX
            }
            _ => self.transactions.len() == IN_FLIGHT_MAX - 1,
        };
        open && behind_content && room && self.pipelines() && self.early.is_empty()
    }

    /// Writes the next transaction's envelope behind the current content. Its own content follows only its own replies,
    /// or at once where whole transactions are in flight.
    pub fn ride(&mut self, transaction: Transaction<C>, out: &mut Vec<Chunk<C::Piece>>) {
        assert!(self.can_ride(), "a transaction rides only behind content that is wholly in out");
        // Without RSET a peer that refused all recipients of the last transaction may keep that one's reverse path.
        self.begin(transaction, true, out);
    }

    /// `octets` more of what was appended to `out` were handed to the network. Report it as soon as it is known, in any
    /// case before the loss of the connection; of a write in doubt, report all.
    pub fn handle_written(&mut self, now: Now, octets: usize, out: &mut Vec<Chunk<C::Piece>>) {
        let in_content = self.stage() == Stage::Content;
        self.written += octets as u64;
        assert!(self.written <= self.emitted, "more was reported as written than was put out");
        if self.phase != Phase::Open {
            return;
        }
        if !in_content {
            // While whole transactions are being written, progress counts whatever reply is awaited.
            if self.transactions.back().is_some_and(InFlight::is_whole) {
                self.restart_timer(now);
            }
            return;
        }
        if self.emitted - self.written < STUFF_WINDOW_OCTETS as u64 / 2 {
            self.write_content(0, out);
        }
        while !self.awaits_content()
            && let Some(reply) = self.early.pop_front()
        {
            self.on_reply(reply, out);
        }
        self.restart_timer(now);
    }

    /// What [`ClientEvent::Intend`] asked for the transaction in front is durable: its content may end.
    pub fn handle_intended(&mut self, now: Now, out: &mut Vec<Chunk<C::Piece>>) {
        if let Some(front) = self.transactions.front_mut().filter(|front| front.intent == Intent::Asked) {
            front.intent = Intent::Recorded;
            self.write_content(0, out);
            self.restart_timer(now);
        }
    }

    pub fn handle_tls_started(&mut self, now: Now, out: &mut Vec<Chunk<C::Piece>>) {
        assert_eq!(self.phase, Phase::Handshaking, "TLS was asked for");
        self.phase = Phase::Greeting;
        self.encrypted = true;
        // RFC 3207 §4.2: what was learnt in the clear is discarded.
        self.offered = Extensions::default();
        self.write_ehlo(out);
        self.restart_timer(now);
    }

    pub fn handle_tls_failed(&mut self, text: &str) {
        if self.phase == Phase::Handshaking {
            self.end(Happened::Lost(text.to_owned()));
        }
    }

    /// The peer closed, or reading or writing failed; `reason` is for the operator.
    pub fn handle_closed(&mut self, reason: &str) {
        self.end(Happened::Lost(reason.to_owned()));
    }

    /// Gives the connection up if its time has come.
    pub fn handle_timeout(&mut self, now: Now) {
        if self.deadline.is_some_and(|deadline| deadline <= now.monotonic) {
            let after = self.stage().timeout(&self.options.timeouts).unwrap_or_default();
            self.end(Happened::TimedOut { after });
        }
    }

    /// Takes leave; the client must be idle. [`ClientEvent::Closed`] follows the peer's answer, its close or a timeout.
    pub fn quit(&mut self, now: Now, out: &mut Vec<Chunk<C::Piece>>) {
        assert!(self.is_idle(), "only an idle connection is quit");
        self.phase = Phase::Quitting;
        self.write_command("QUIT", Expected::Quit, out);
        self.restart_timer(now);
    }

    /// Waits for the peer's answer to QUIT until then at the longest.
    pub fn bound_quit(&mut self, until: Duration) {
        if self.phase == Phase::Quitting {
            self.deadline = Some(self.deadline.map_or(until, |deadline| deadline.min(until)));
        }
    }
}

// Where it stands.
impl<C: Content> SmtpClient<C> {
    fn stage(&self) -> Stage {
        match (self.phase, self.expected.front()) {
            (Phase::Handshaking, _) => Stage::Handshake,
            (_, None) => Stage::Idle,
            (_, Some(&at)) => match self.transactions.front() {
                Some(front) => self.stage_of_front(at, front),
                None => self.stage_of(at),
            },
        }
    }

    fn stage_of_front(&self, at: Expected, front: &InFlight<C>) -> Stage {
        let content = matches!(at, Expected::Final(_)) && !front.content_is_written(self.written);
        if content { Stage::Content } else { self.stage_of(at) }
    }

    fn stage_of(&self, at: Expected) -> Stage {
        match at {
            Expected::Banner => Stage::Banner,
            Expected::Ehlo => Stage::Ehlo,
            Expected::Helo => Stage::Helo,
            Expected::StartTls => Stage::StartTls,
            Expected::Auth(_) => Stage::Auth,
            Expected::Reset => Stage::Reset,
            Expected::Mail => Stage::Mail,
            Expected::Recipient(_) => Stage::Recipient,
            Expected::Data | Expected::LoneDot => Stage::Data,
            Expected::Final(_) => Stage::Final,
            Expected::Quit => Stage::Quit,
        }
    }

    fn restart_timer(&mut self, now: Now) {
        let timeout = if self.phase == Phase::Closed { None } else { self.stage().timeout(&self.options.timeouts) };
        self.deadline = timeout.map(|timeout| now.monotonic + timeout);
    }
}

#[cfg(test)]
mod tests;
