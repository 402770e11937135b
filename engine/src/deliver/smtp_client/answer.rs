//! What each reply moves: the session towards its transactions, a transaction towards its verdicts.

use super::{ClientEvent, Expected, Phase, SmtpClient};
use crate::config::{DeliveryProtocol as Protocol, InDoubt, TlsMode};
use crate::deliver::attempt::{Irregularity, Stage};
use crate::deliver::content::{Chunk, Content};
use crate::deliver::extension::Extensions;
use crate::deliver::in_flight::{Form, InFlight, Mail};
use crate::deliver::verdict::{
    CHUNK_REFUSED, Circumstances, Connection, Fate, Happened, OUT_OF_STEP, RecipientVerdict, judge,
};
use crate::mail::reply::Reply;

impl<C: Content> SmtpClient<C> {
    pub(super) fn take_reply(&mut self, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        if reply.code == 421 {
            // RFC 5321 §3.8: it may come in answer to anything, or to nothing.
            self.end(Happened::Replied(reply));
        } else if self.expected.is_empty() || self.early.len() == self.expected.len() {
            self.end(Happened::Garbled(format!("the peer sent a reply to nothing: {} {}", reply.code, reply.text())));
        } else if self.awaits_content() {
            self.early.push_back(reply);
        } else {
            self.on_reply(reply, out);
        }
    }

    /// The reply in front answers content of which, as far as we know, not everything is written.
    pub(super) fn awaits_content(&self) -> bool {
        let is_final = matches!(self.expected.front(), Some(Expected::Final(_)));
        is_final && !self.transactions[0].content_is_written(self.written)
    }

    pub(super) fn on_reply(&mut self, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        let expected = self.expected.pop_front().expect("a reply is taken only where one is expected");
        match expected {
            Expected::Banner if reply.is_positive() => self.write_ehlo(out),
            Expected::Ehlo => self.on_ehlo(reply, out),
            Expected::Helo if reply.is_positive() => self.on_session_up(out),
            Expected::StartTls => self.on_start_tls(reply, out),
            Expected::Auth(step) => self.on_auth(step, reply, out),
            Expected::Banner | Expected::Helo => self.refuse_session(expected, reply, out),
            Expected::Reset => self.on_reset(reply, out),
            Expected::Mail => self.on_mail(reply, out),
            Expected::Recipient(slot) => self.on_recipient(slot, reply, out),
            Expected::Data => self.on_data(reply, out),
            Expected::Final(slot) => self.on_final(slot, reply),
            Expected::LoneDot => self.finish(false),
            Expected::Quit => self.close(None),
        }
    }

    pub(super) fn on_ehlo(&mut self, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        if reply.is_permanent() && self.options.protocol == Protocol::Smtp {
            // RFC 5321 §3.2: a server that does not know EHLO is asked with HELO.
            let helo = format!("HELO {}", self.options.ehlo);
            self.write_command(&helo, Expected::Helo, out);
        } else if !reply.is_positive() {
            self.refuse_session(Expected::Ehlo, reply, out);
        } else {
            self.offered = Extensions::parse(&reply);
            let wanted = !self.encrypted && self.options.tls != TlsMode::Disabled;
            if wanted && self.offered.start_tls {
                self.write_command("STARTTLS", Expected::StartTls, out);
            } else {
                self.on_session_up(out);
            }
        }
    }

    /// The handshake begins with the octet behind a positive reply.
    pub(super) fn on_start_tls(&mut self, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        if reply.is_positive() {
            self.phase = Phase::Handshaking;
        } else if self.options.tls == TlsMode::Opportunistic {
            self.on_session_up(out);
        } else {
            self.refuse_session(Expected::StartTls, reply, out);
        }
    }

    pub(super) fn on_session_up(&mut self, out: &mut Vec<Chunk<C::Piece>>) {
        let required = matches!(self.options.tls, TlsMode::Required | TlsMode::Verified);
        if required && !self.encrypted {
            self.fail_session(Stage::StartTls, &Happened::TlsNotOffered, "");
            return;
        }
        if self.must_authenticate() { self.authenticate(out) } else { self.open() }
    }

    pub(super) fn open(&mut self) {
        self.phase = Phase::Open;
        self.events.push_back(ClientEvent::Idle);
    }

    pub(super) fn on_reset(&mut self, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        if reply.is_positive() {
            self.knows_reset = true;
            self.write_next(out);
        } else {
            // Who took it before has had enough of this connection: Exim answers 554 to the eleventh command in a row
            // that is no mail, and it counts RSET. With whole transactions in flight that is one more way to lose them.
            if !self.knows_reset {
                self.transactions[0].irregularity = Some(Irregularity::ResetRefused);
            }
            self.end_at(Expected::Reset, Happened::Replied(reply));
        }
    }

    pub(super) fn on_mail(&mut self, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        self.mails_answered += 1;
        if reply.is_positive() {
            self.transactions[0].mail = Mail::Accepted;
            return self.write_next(out);
        }
        self.transactions[0].mail = Mail::Refused;
        let happened = Happened::Replied(reply);
        let (verdict, connection) = self.judge_front(Expected::Mail, &happened);
        self.transactions[0].settle_rest(verdict);
        self.go_on(connection, Expected::Mail, happened, out);
    }

    pub(super) fn on_recipient(&mut self, slot: usize, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        let expected = Expected::Recipient(slot);
        let front = &mut self.transactions[0];
        if front.mail == Mail::Refused && reply.is_positive() {
            // It kept an older reverse path: whatever is sent now goes out under that.
            front.irregularity = Some(Irregularity::RecipientAcceptedWithoutMail);
            if front.is_whole() {
                // The content is under way already: only the reply to it tells whether it has left.
                self.part_later(None);
                return;
            }
            return self.end_at(expected, Happened::Replied(reply));
        }
        if front.mail == Mail::Refused {
            return self.write_next(out);
        }
        if reply.is_positive() {
            front.accept(slot);
            return self.write_next(out);
        }
        let happened = Happened::Replied(reply);
        let (verdict, connection) = self.judge_front(expected, &happened);
        self.transactions[0].settle(slot, verdict);
        self.go_on(connection, expected, happened, out);
    }

    pub(super) fn on_data(&mut self, reply: Reply, out: &mut Vec<Chunk<C::Piece>>) {
        let front = &self.transactions[0];
        let any_accepted = front.accepted_count() > 0;
        if reply.code == 354 && any_accepted {
            return self.begin_content(0, out);
        }
        if reply.code == 354 && front.mail == Mail::Accepted && self.options.protocol == Protocol::Smtp {
            // RFC 2920 §3.1: all recipients were refused, so the dot sends nothing to nobody; its reply is ignored.
            return self.write_command(".", Expected::LoneDot, out);
        }
        if !any_accepted && (reply.is_transient() || reply.is_permanent()) {
            return self.finish(false);
        }
        let happened = Happened::Replied(reply);
        let (verdict, connection) = self.judge_front(Expected::Data, &happened);
        self.transactions[0].settle_rest(verdict);
        match connection {
            Connection::Stays => self.finish(false),
            _ => self.end_at(Expected::Data, happened),
        }
    }

    pub(super) fn on_final(&mut self, slot: Option<usize>, reply: Reply) {
        let taken = reply.is_positive();
        let expected = Expected::Final(slot);
        let front = &mut self.transactions[0];
        front.taken &= taken;
        if front.is_whole() && front.accepted_count() == 0 && !(taken && front.mail == Mail::Refused) {
            // Nobody is left for this reply to decide about: MAIL or every recipient was refused before.
            return self.finish(false);
        }
        let happened = Happened::Replied(reply);
        let (verdict, connection) = self.judge_front(expected, &happened);
        let front = &mut self.transactions[0];
        match slot {
            Some(slot) => front.settle(slot, verdict),
            None if verdict.fate == Fate::Hold => {
                front.irregularity = Some(Irregularity::ForeignEnvelope);
                front.overrule(&verdict);
            }
            None => front.settle_rest(verdict),
        }
        if connection != Connection::Stays && !self.parts_later(connection) {
            self.end_at(expected, happened);
        } else if !matches!(self.expected.front(), Some(Expected::Final(_))) {
            let taken = self.transactions[0].taken;
            self.finish(taken);
        }
    }

    /// After a reply that was judged: on with the transaction, or the connection's end.
    pub(super) fn go_on(
        &mut self,
        connection: Connection,
        at: Expected,
        happened: Happened,
        out: &mut Vec<Chunk<C::Piece>>,
    ) {
        match connection {
            Connection::Stays => self.write_next(out),
            _ if self.parts_later(connection) => {}
            Connection::Ends | Connection::EndsAndHostBacksOff => self.end_at(at, happened),
        }
    }

    /// Whole transactions are in flight: each of them has its own replies to come, which say more than our leaving now.
    fn parts_later(&mut self, connection: Connection) -> bool {
        let later = connection == Connection::Ends && self.transactions[0].is_whole();
        if later {
            self.part_later(None);
        }
        later
    }

    /// The verdict on the transaction in front for a reply while the connection goes on.
    pub(super) fn judge_front(&mut self, at: Expected, happened: &Happened) -> (RecipientVerdict, Connection) {
        let front = &self.transactions[0];
        let is_used_up = at == Expected::Mail && self.mails_answered > 1 && happened.says_session_is_full();
        let circumstances = self.circumstances(front, self.stage_of(at), happened, is_used_up);
        let (verdict, connection) = judge(&circumstances, &self.command_of(front, at));
        let irregularity = match verdict.rule {
            OUT_OF_STEP if front.is_whole() => Some(Irregularity::OutOfStep),
            OUT_OF_STEP if circumstances.chunked && circumstances.stage == Stage::Final => {
                Some(Irregularity::ChunkRefused)
            }
            CHUNK_REFUSED => Some(Irregularity::ChunkRefused),
            _ => None,
        };
        if irregularity.is_some() {
            self.transactions[0].irregularity = irregularity;
        }
        (verdict, connection)
    }

    pub(super) fn circumstances<'a>(
        &self,
        transaction: &InFlight<C>,
        stage: Stage,
        happened: &'a Happened,
        nothing_executed: bool,
    ) -> Circumstances<'a> {
        Circumstances {
            stage,
            happened,
            nothing_executed,
            chunked: transaction.form() != Form::Data,
            content_written: self.content_is_out(transaction, happened),
            mail_accepted: transaction.mail == Mail::Accepted,
            others_accepted: transaction.accepted_count() > 0,
            encrypted: self.encrypted,
            reply_per_recipient: stage == Stage::Final && self.options.protocol == Protocol::Lmtp,
            holds: self.options.in_doubt == InDoubt::Hold,
        }
    }
}
