//! One transaction on a connection: which of its recipients are settled, and how.
//!
//! A recipient goes from waiting to accepted to settled, or from waiting to settled at once; settled is for good.

use std::borrow::Cow;

use crate::config::EightBit;
use crate::deliver::attempt::{Irregularity, Transaction, TransactionResult, fit};
use crate::deliver::content::{Content, ContentWriter, chunk_command};
use crate::deliver::extension::Extensions;
use crate::deliver::verdict::{Fate, RecipientVerdict, refuse};

pub(crate) struct InFlight<C: Content> {
    ticket: u64,
    content: C,
    dot_lines: bool,
    form: Form,
    /// Without the line ending.
    pub(crate) mail_command: String,
    pub(crate) mail: Mail,
    /// Where MAIL begins in the connection's outgoing stream.
    pub(crate) mail_begin: Option<u64>,
    slots: Vec<Slot>,
    accepted: usize,
    pub(crate) writer: Option<ContentWriter<C::Piece>>,
    /// Where the content, final dot included, ends in the connection's outgoing stream.
    pub(crate) content_end: Option<u64>,
    /// How many of its recipients [`SmtpClient::take_sent`](super::smtp_client::SmtpClient::take_sent) has counted.
    pub(crate) sent_recipients: u32,
    /// The reply to the content, each of them in LMTP, was positive: the peer has forgotten the envelope.
    pub(crate) taken: bool,
    pub(crate) irregularity: Option<Irregularity>,
    pub(crate) intent: Intent,
}

/// How far what its final dot waits for has come (`in_doubt = "hold"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Intent {
    NotAsked,
    Asked,
    Recorded,
}

/// How the content goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Behind DATA and its 354.
    Data,
    /// Behind BDAT, once a recipient was accepted.
    Chunk,
    /// Behind BDAT, with the envelope, before anything was answered.
    Whole,
}

/// What the peer made of MAIL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mail {
    Unanswered,
    Accepted,
    Refused,
}

#[derive(Debug)]
struct Slot {
    index: u32,
    /// RCPT without the line ending; empty where we refused the recipient ourselves.
    command: String,
    state: SlotState,
}

#[derive(Debug)]
enum SlotState {
    Waiting,
    Accepted,
    Settled(RecipientVerdict),
}

impl<C: Content> InFlight<C> {
    /// Settles at once what can't be sent to this peer.
    pub(crate) fn new(transaction: Transaction<C>, form: Form, offered: &Extensions, eight_bit: EightBit) -> Self {
        assert!(!transaction.recipients.is_empty(), "a transaction has a recipient");
        let indexes = transaction.recipients.iter().map(|(index, _)| *index);
        let refused =
            |index, refusal| Slot { index, command: String::new(), state: SlotState::Settled(refuse(refusal)) };
        let (mail_command, slots) = match fit(&transaction, offered, eight_bit) {
            Ok(envelope) => {
                let slots = indexes.zip(envelope.recipient_commands).map(|(index, command)| match command {
                    Ok(command) => Slot { index, command, state: SlotState::Waiting },
                    Err(refusal) => refused(index, refusal),
                });
                (envelope.mail_command, slots.collect())
            }
            Err(refusal) => (String::new(), indexes.map(|index| refused(index, refusal)).collect()),
        };
        Self {
            ticket: transaction.ticket,
            content: transaction.content,
            dot_lines: transaction.dot_lines,
            form,
            mail_command,
            mail: Mail::Unanswered,
            mail_begin: None,
            slots,
            accepted: 0,
            writer: None,
            content_end: None,
            sent_recipients: 0,
            taken: true,
            irregularity: None,
            intent: Intent::NotAsked,
        }
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot.state, SlotState::Settled(_)))
    }

    /// The peer has refused every recipient for good.
    pub(crate) fn is_refused(&self) -> bool {
        let refused = |slot: &Slot| matches!(&slot.state, SlotState::Settled(verdict) if verdict.fate == Fate::Bounce);
        self.slots.iter().all(refused)
    }

    pub(crate) fn unsettled_count(&self) -> u32 {
        self.slots.iter().filter(|slot| !matches!(slot.state, SlotState::Settled(_))).count() as u32
    }

    /// The first recipient, from the one at `from` on, that the peer has not answered for.
    pub(crate) fn next_waiting(&self, from: usize) -> Option<usize> {
        (from..self.slots.len()).find(|&slot| matches!(self.slots[slot].state, SlotState::Waiting))
    }

    pub(crate) fn accepted(&self) -> impl Iterator<Item = usize> {
        (0..self.slots.len()).filter(|&slot| matches!(self.slots[slot].state, SlotState::Accepted))
    }

    /// The accepted recipients, by their indexes in the envelope.
    pub(crate) fn accepted_indexes(&self) -> Vec<u32> {
        self.accepted().map(|slot| self.slots[slot].index).collect()
    }

    pub(crate) fn ticket(&self) -> u64 {
        self.ticket
    }

    /// How many recipients the peer has accepted, also when they were settled since.
    pub(crate) fn accepted_count(&self) -> usize {
        self.accepted
    }

    pub(crate) fn recipient_command(&self, slot: usize) -> &str {
        &self.slots[slot].command
    }

    pub(crate) fn accept(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        if matches!(slot.state, SlotState::Waiting) {
            slot.state = SlotState::Accepted;
            self.accepted += 1;
        }
    }

    /// A recipient that is settled already stays as it is.
    pub(crate) fn settle(&mut self, slot: usize, verdict: RecipientVerdict) {
        let slot = &mut self.slots[slot];
        if !matches!(slot.state, SlotState::Settled(_)) {
            slot.state = SlotState::Settled(verdict);
        }
    }

    pub(crate) fn settle_rest(&mut self, verdict: RecipientVerdict) {
        let last = self.slots.len() - 1;
        for slot in 0..last {
            self.settle(slot, verdict.clone());
        }
        self.settle(last, verdict);
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.form == Form::Whole
    }

    /// It went out under an envelope that is not its own, whatever was answered before: that is what counts for all
    /// recipients that the peer was told.
    pub(crate) fn overrule(&mut self, verdict: &RecipientVerdict) {
        for slot in self.slots.iter_mut().filter(|slot| !slot.command.is_empty()) {
            slot.state = SlotState::Settled(verdict.clone());
        }
    }

    /// The command whose reply decides about the content.
    pub(crate) fn content_command(&self) -> Cow<'static, str> {
        if self.form == Form::Data { ".".into() } else { chunk_command(&self.content).into() }
    }

    /// Octets of the content, as far as they count for what may be in flight.
    pub(crate) fn content_octets(&self) -> u64 {
        (self.content.prefix_piece().as_ref().len() + self.content.body_piece().as_ref().len()) as u64
    }

    pub(crate) fn begin_content(&mut self) {
        if !self.is_whole() {
            assert_eq!(self.mail, Mail::Accepted, "content follows only its own accepted MAIL");
            assert!(self.accepted > 0, "content follows an accepted recipient");
        }
        self.writer = Some(match self.form {
            Form::Data => ContentWriter::new(&self.content, self.dot_lines),
            Form::Chunk | Form::Whole => ContentWriter::chunk(&self.content),
        });
    }

    /// `written`: octets of the connection's outgoing stream that were handed to the network.
    pub(crate) fn content_is_written(&self, written: u64) -> bool {
        self.content_end.is_some_and(|end| written >= end)
    }

    pub(crate) fn mail_is_written(&self, written: u64) -> bool {
        self.mail != Mail::Unanswered || self.mail_begin.is_some_and(|begin| written > begin)
    }

    /// Every recipient must be settled.
    pub(crate) fn into_result(self, written: u64) -> TransactionResult {
        let mail_written = self.mail_is_written(written);
        let results = self.slots.into_iter().map(|slot| match slot.state {
            SlotState::Settled(verdict) => (slot.index, verdict),
            SlotState::Waiting | SlotState::Accepted => unreachable!("a recipient without a verdict"),
        });
        let results = results.collect();
        TransactionResult {
            ticket: self.ticket,
            results,
            mail_written,
            sent_recipients: self.sent_recipients,
            irregularity: self.irregularity,
        }
    }
}
