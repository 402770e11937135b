//! How transactions and connections end: every transaction gets its result, every connection its one last event.

use super::command::write_line;
use super::{ClientEvent, Expected, Parting, Phase, SmtpClient};
use crate::deliver::attempt::{Irregularity, Stage};
use crate::deliver::content::{Chunk, Content};
use crate::deliver::in_flight::{InFlight, Mail};
use crate::deliver::verdict::{Connection, Happened, SessionFailure, judge, judge_session};
use crate::mail::reply::Reply;

impl<C: Content> SmtpClient<C> {
    /// The transaction in front is over; all its recipients are settled.
    pub(super) fn finish(&mut self, envelope_forgotten: bool) {
        self.reset_first = !envelope_forgotten;
        self.finish_front();
        // What would have ridden behind it, had we not refused it ourselves, awaits no reply.
        while self.transactions.front().is_some_and(|next| next.mail_begin.is_none()) {
            self.finish_front();
        }
        if self.transactions.is_empty() {
            match self.parting.take() {
                Some(Parting { failure }) => self.close(failure),
                None => self.events.push_back(ClientEvent::Idle),
            }
        }
    }

    /// Begins nothing more, and closes when all that is in flight is answered.
    pub(super) fn part_later(&mut self, failure: Option<SessionFailure>) {
        self.parting.get_or_insert(Parting { failure });
    }

    fn finish_front(&mut self) {
        let front = self.transactions.pop_front().expect("a transaction is in flight");
        self.events.push_back(ClientEvent::Finished(front.into_result(self.written)));
    }

    /// The connection ends while the reply in front was awaited.
    pub(super) fn end(&mut self, happened: Happened) {
        match self.phase {
            Phase::Closed => {}
            Phase::Quitting => self.close(None),
            Phase::Handshaking => self.fail_session(Stage::Handshake, &happened, "STARTTLS"),
            Phase::Greeting => {
                let at = self.expected.front().copied().unwrap_or(Expected::Banner);
                let command = self.session_command(at);
                self.fail_session(self.stage_of(at), &happened, &command);
            }
            Phase::Open => {
                self.settle_early();
                if self.phase == Phase::Closed {
                    return;
                }
                match self.expected.front() {
                    Some(&at) => self.end_at(at, happened),
                    None => self.end_idle(&happened),
                }
            }
        }
    }

    /// A refusal that came before all content was written stands, though the rest can't be written any more. Success
    /// can't: the peer has not seen the final dot.
    pub(super) fn settle_early(&mut self) {
        for reply in std::mem::take(&mut self.early) {
            let refused = reply.is_transient() || reply.is_permanent();
            if !refused || !self.awaits_content() {
                return;
            }
            let Some(Expected::Final(slot)) = self.expected.pop_front() else { return };
            self.on_final(slot, reply);
        }
    }

    /// A connection that was used just ended; for one that never was we blame the host, or we would come back for ever.
    pub(super) fn end_idle(&mut self, happened: &Happened) {
        if self.mails_answered > 0 {
            self.close(None);
        } else {
            self.fail_session(Stage::Idle, happened, "");
        }
    }

    /// The connection ends with transactions in flight; the one in front stood at `at`. Those behind were not executed.
    pub(super) fn end_at(&mut self, at: Expected, happened: Happened) {
        let mut failure = None;
        for (place, mut transaction) in std::mem::take(&mut self.transactions).into_iter().enumerate() {
            let at = if place == 0 { at } else { Expected::Mail };
            let stage = if place == 0 { self.stage_of_front(at, &transaction) } else { Stage::Mail };
            let repeatable = self.mails_answered > 0 || place > 0 || !transaction.mail_is_written(self.written);
            // Replies come in order: behind a 421 nothing was executed (RFC 5321 §3.8), behind a loss who knows.
            let executed = self.content_is_out(&transaction, &happened) && !happened.is_service_closing();
            let nothing_executed = transaction.mail == Mail::Unanswered && repeatable && !executed;
            let unrelated = executed && transaction.mail == Mail::Unanswered;
            let happened = if unrelated { happened.clone().unrelated() } else { happened.clone() };
            if transaction.is_whole() && !happened.is_service_closing() {
                transaction.irregularity.get_or_insert(Irregularity::LostInFlight);
            }
            let circumstances = self.circumstances(&transaction, stage, &happened, nothing_executed);
            let (verdict, connection) = judge(&circumstances, &self.command_of(&transaction, at));
            // A peer that refused it all and left, as Exim's `drop` does, has spoken about this message, not itself.
            let drops_it = matches!(happened, Happened::Lost(_)) && transaction.is_refused();
            if place == 0 && connection == Connection::EndsAndHostBacksOff && !drops_it {
                failure = Some(SessionFailure::of_transaction(stage, &verdict));
            }
            transaction.settle_rest(verdict);
            self.events.push_back(ClientEvent::Finished(transaction.into_result(self.written)));
        }
        self.close(failure);
    }

    /// Whether the peer may have all of the content. What lies in `out` is written before we close; only a connection
    /// that is lost takes no more.
    pub(super) fn content_is_out(&self, transaction: &InFlight<C>, happened: &Happened) -> bool {
        let goes_out = transaction.is_whole() && !matches!(happened, Happened::Lost(_));
        transaction.content_is_written(if goes_out { self.emitted } else { self.written })
    }

    /// The peer said no before any transaction.
    pub(super) fn refuse_session(&mut self, at: Expected, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        // RFC 5321 §3.1: even after 554 the client takes leave with QUIT.
        self.emitted += write_line("QUIT", out);
        let command = self.session_command(at);
        self.fail_session(self.stage_of(at), &Happened::Replied(reply), &command);
    }

    pub(super) fn fail_session(&mut self, stage: Stage, happened: &Happened, command: &str) {
        self.close(Some(judge_session(stage, happened, self.options.tls, command)));
    }

    pub(super) fn close(&mut self, failure: Option<SessionFailure>) {
        assert!(self.transactions.is_empty(), "every transaction has its result before the end");
        assert_ne!(self.phase, Phase::Closed, "the end comes once");
        self.phase = Phase::Closed;
        self.deadline = None;
        self.expected.clear();
        self.early.clear();
        // One that nobody has taken yet is no longer true.
        self.events.retain(|event| *event != ClientEvent::Idle);
        self.events.push_back(ClientEvent::Closed { failure });
    }
}
