//! What is written, and in which order. Every command written is expected to be answered.

use std::borrow::Cow;

use super::{ClientEvent, Expected, SmtpClient};
use crate::config::{Chunking, DeliveryProtocol as Protocol, InDoubt};
use crate::deliver::attempt::Transaction;
use crate::deliver::content::{Chunk, Content, push_bytes};
use crate::deliver::in_flight::{Form, InFlight, Intent, Mail};
use crate::limits::STUFF_WINDOW_OCTETS;

impl<C: Content> SmtpClient<C> {
    pub(super) fn pipelines(&self) -> bool {
        self.options.pipelining && self.offered.pipelining
    }

    /// How the next transaction's content goes out.
    pub(super) fn form(&self) -> Form {
        match self.options.chunking {
            Chunking::Off => Form::Data,
            // The final dot is what waits for the intent's record, while the rest is on its way.
            _ if self.options.in_doubt == InDoubt::Hold => Form::Data,
            _ if !self.offered.chunking => Form::Data,
            // In LMTP the number of replies to the content depends on the replies before it (RFC 2033 §4.2).
            Chunking::BackToBack if self.pipelines() && self.options.protocol == Protocol::Smtp => Form::Whole,
            Chunking::On | Chunking::BackToBack => Form::Chunk,
        }
    }

    pub(super) fn begin(&mut self, transaction: Transaction<C>, reset: bool, out: &mut Vec<Chunk<C::Piece>>) {
        let form = self.form();
        let transaction = InFlight::new(transaction, form, &self.offered, self.options.eight_bit);
        let settled = transaction.is_settled();
        self.transactions.push_back(transaction);
        if settled {
            // Results come in the order of the transactions, so it waits for the one before it.
            if self.transactions.len() == 1 {
                self.finish(!self.reset_first);
            }
            return;
        }
        if reset {
            self.write_command("RSET", Expected::Reset, out);
        }
        if self.pipelines() {
            self.write_envelope(out);
            if form == Form::Whole {
                self.begin_content(self.transactions.len() - 1, out);
            }
        } else if !reset {
            self.write_next(out);
        }
    }

    /// All of the newest transaction's envelope in one write (RFC 2920 §3.1: DATA last); BDAT waits for a recipient.
    pub(super) fn write_envelope(&mut self, out: &mut Vec<Chunk<C::Piece>>) {
        let place = self.transactions.len() - 1;
        self.write_mail(place, out);
        let mut from = 0;
        while let Some(slot) = self.transactions[place].next_waiting(from) {
            self.write_recipient(place, slot, out);
            from = slot + 1;
        }
        if self.transactions[place].form() == Form::Data {
            self.write_command("DATA", Expected::Data, out);
        }
    }

    pub(super) fn write_mail(&mut self, place: usize, out: &mut Vec<Chunk<C::Piece>>) {
        self.mails_begun += 1;
        self.mails.push(self.transactions[place].ticket());
        self.transactions[place].mail_begin = Some(self.emitted);
        self.emitted += write_line(&self.transactions[place].mail_command, out);
        self.expected.push_back(Expected::Mail);
    }

    fn write_recipient(&mut self, place: usize, slot: usize, out: &mut Vec<Chunk<C::Piece>>) {
        self.emitted += write_line(self.transactions[place].recipient_command(slot), out);
        self.expected.push_back(Expected::Recipient(slot));
    }

    /// Without PIPELINING, the command after the one just answered; with it, all are written already, but for BDAT.
    pub(super) fn write_next(&mut self, out: &mut Vec<Chunk<C::Piece>>) {
        if !self.expected.is_empty() {
            return;
        }
        let front = &self.transactions[0];
        if front.mail_begin.is_none() {
            self.write_mail(0, out);
        } else if front.mail == Mail::Refused {
            self.finish(false);
        } else if let Some(slot) = front.next_waiting(0) {
            self.write_recipient(0, slot, out);
        } else if front.accepted_count() > 0 && front.form() == Form::Chunk {
            self.begin_content(0, out);
        } else if front.accepted_count() > 0 {
            self.write_command("DATA", Expected::Data, out);
        } else {
            self.finish(false);
        }
    }

    pub(super) fn begin_content(&mut self, place: usize, out: &mut Vec<Chunk<C::Piece>>) {
        let transaction = &mut self.transactions[place];
        transaction.begin_content();
        let alone = self.expected.is_empty();
        assert!(alone || transaction.is_whole(), "content follows the replies to its envelope");
        match self.options.protocol {
            Protocol::Smtp => self.expected.push_back(Expected::Final(None)),
            // RFC 2033 §4.2: one reply for each accepted recipient, in order.
            Protocol::Lmtp => self.expected.extend(transaction.accepted().map(|slot| Expected::Final(Some(slot)))),
        }
        self.write_content(place, out);
    }

    pub(super) fn write_content(&mut self, place: usize, out: &mut Vec<Chunk<C::Piece>>) {
        let Some(transaction) = self.transactions.get_mut(place) else { return };
        let Some(writer) = &mut transaction.writer else { return };
        if self.options.in_doubt == InDoubt::Hold && transaction.intent != Intent::Recorded {
            self.emitted += writer.write_but_end(out) as u64;
            // Not earlier than it must be: what a crash finds intended is held.
            let is_nearly_out = self.emitted - self.written < STUFF_WINDOW_OCTETS as u64;
            if writer.is_at_end() && is_nearly_out && transaction.intent == Intent::NotAsked {
                transaction.intent = Intent::Asked;
                let (ticket, recipients) = (transaction.ticket(), transaction.accepted_indexes());
                self.events.push_back(ClientEvent::Intend { ticket, recipients });
            }
            return;
        }
        self.emitted += writer.write(out) as u64;
        if writer.is_finished() {
            transaction.writer = None;
            transaction.content_end = Some(self.emitted);
            // What is in doubt is sent again then, unless it is held.
            if self.options.in_doubt == InDoubt::Retry {
                let recipients = transaction.unsettled_count();
                transaction.sent_recipients += recipients;
                self.sent_recipients += u64::from(recipients);
            }
        }
    }

    pub(super) fn write_ehlo(&mut self, out: &mut Vec<Chunk<C::Piece>>) {
        let command = self.session_command(Expected::Ehlo);
        self.write_command(&command, Expected::Ehlo, out);
    }

    pub(super) fn write_command(&mut self, command: &str, expected: Expected, out: &mut Vec<Chunk<C::Piece>>) {
        self.emitted += write_line(command, out);
        self.expected.push_back(expected);
    }

    /// The command of the session, outside any transaction, that is answered.
    pub(super) fn session_command(&self, at: Expected) -> Cow<'static, str> {
        match (at, self.options.protocol) {
            (Expected::Ehlo, Protocol::Smtp) => format!("EHLO {}", self.options.ehlo).into(),
            (Expected::Ehlo, Protocol::Lmtp) => format!("LHLO {}", self.options.ehlo).into(),
            (Expected::Helo, _) => format!("HELO {}", self.options.ehlo).into(),
            (Expected::StartTls, _) => "STARTTLS".into(),
            (Expected::Auth(step), _) => step.command().into(),
            _ => "".into(),
        }
    }

    /// The command of `transaction` that is answered.
    pub(super) fn command_of<'a>(&self, transaction: &'a InFlight<C>, at: Expected) -> Cow<'a, str> {
        match at {
            Expected::Reset => "RSET".into(),
            Expected::Mail => transaction.mail_command.as_str().into(),
            Expected::Recipient(slot) => transaction.recipient_command(slot).into(),
            Expected::Data => "DATA".into(),
            Expected::Final(_) => transaction.content_command(),
            Expected::LoneDot => ".".into(),
            _ => self.session_command(at),
        }
    }
}

/// Tells how many octets the command has, with its line ending.
pub(super) fn write_line<P>(command: &str, out: &mut Vec<Chunk<P>>) -> u64 {
    debug_assert!(!command.bytes().any(|b| b.is_ascii_control()), "one command is one line: {command:?}");
    push_bytes(out, command.as_bytes());
    push_bytes(out, b"\r\n");
    command.len() as u64 + 2
}
