//! What a failure means, and what happens then. The one file that decides it; everything else only reports.
//!
//! Looking for "what happens on a 421"? Read [`RULES`] from the top: the first row that fits a recipient's
//! [`Circumstances`] is its verdict. Before MAIL was written there is no recipient to judge; then [`SESSION_RULES`] say
//! what becomes of the host. What we refuse without asking the peer is in [`Refusal`].
//!
//! Invariants: every circumstance has a rule (a test walks them all); a retry that counts no attempt happens only where
//! the connection has served another transaction or none was begun, or another recipient was accepted, so that
//! repeating it always gets somewhere; only a loss after the last octet of the content is in doubt.
//!
//! See also: `attempt.rs` for the stages and their texts.
//!
//! Over 500 lines: one table decides what a failure means.

use std::time::Duration;

use postrider_spool::record::Answer;

use crate::config::TlsMode;
use crate::deliver::attempt::Stage;
use crate::deliver::blame;
use crate::handover::{CountsAs, Elsewhere, Need};
use crate::limits::ANSWER_TEXT_OCTETS_MAX;
use crate::mail::reply::Reply;

/// What one transaction meant for one recipient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipientVerdict {
    pub fate: Fate,
    pub fault: Fault,
    pub scope: Scope,
    /// The row that decided, for metrics and for the simulator's count.
    pub rule: &'static str,
    pub answer: Answer,
    /// The answer is the peer's own, and not ours in its place.
    pub is_peers: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Delivered,
    Bounce,
    /// This host lacks what the message needs: [`RecipientVerdict::elsewhere`] says what that means.
    BounceIfLastHost(Need),
    Retry(Retry),
    /// It may have left, under its own envelope or another message's: never retried by itself, shown to the operator.
    Hold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    pub when: When,
    pub counts_attempt: bool,
    /// The peer may have taken the message; the retry is then a possible duplicate.
    pub in_doubt: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Back among the messages that are ready; the host itself may be backing off.
    AtOnce,
    /// As soon as another source of its pool may be tried; where there is none, as `[retry]` says.
    OtherSource,
    /// As `[retry]` says.
    Scheduled,
}

/// Whose fault it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Nobody,
    /// What the sender wrote: addresses or content.
    Message,
    Peer,
    /// The network between.
    Route,
    Us,
}

/// What else will fail likewise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Recipient,
    Message,
    Host,
    /// The address that mail leaves from, at this site.
    Source,
}

/// A host could not be used, or must not be used for now. It counts no attempt for any message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionFailure {
    pub stage: Stage,
    pub action: HostAction,
    pub fault: Fault,
    /// The host's, or our source's there.
    pub scope: Scope,
    pub rule: &'static str,
    pub answer: Answer,
    /// The answer is the peer's own, and not ours in its place.
    pub is_peers: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostAction {
    /// Leave this host alone for a while and try another MX host.
    BackOff,
    /// The same, but only for mail that requires such TLS of it: mail that does not may go there.
    BackOffTls,
    /// The same host at once, on a new connection with TLS disabled; remember it for a while (RFC 7435).
    RetryInClear,
    /// This source tries the host again in a moment; it says nothing about the host.
    Pause,
}

/// What came instead of success, or success itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    Replied(Reply),
    /// Closed, reset, or a write failed; in the words of the caller.
    Lost(String),
    TimedOut {
        after: Duration,
    },
    /// Our source has no port left for this host.
    NoPort,
    /// The peer no longer speaks SMTP.
    Garbled(String),
    /// TLS is required, and there is no STARTTLS to ask for.
    TlsNotOffered,
    /// The route has credentials, and the peer no mechanism that we know.
    AuthNotOffered,
    /// The route has credentials that are not said in the clear, and there is no TLS.
    AuthInClear,
}

/// All that a verdict on a recipient depends on.
#[derive(Debug, Clone)]
pub struct Circumstances<'a> {
    pub stage: Stage,
    pub happened: &'a Happened,
    /// The connection ends, nothing of this transaction was executed, and repeating it elsewhere gets somewhere: MAIL
    /// was not answered, or only with that there have been enough of them, and the connection has served another
    /// transaction or MAIL was not even written.
    pub nothing_executed: bool,
    /// The content's last octet, final dot included, was handed to the network.
    pub content_written: bool,
    /// It went by BDAT (RFC 3030), which is a command and can be out of order; a final dot can not.
    pub chunked: bool,
    pub mail_accepted: bool,
    /// Another recipient of this transaction was accepted.
    pub others_accepted: bool,
    pub encrypted: bool,
    /// LMTP: the reply to the content is one recipient's alone (RFC 2033 §4.2).
    pub reply_per_recipient: bool,
    /// What is in doubt is not sent again by itself (`in_doubt = "hold"`).
    pub holds: bool,
}

/// What becomes of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connection {
    Stays,
    Ends,
    /// It ends, and so does our trust in the host for a while.
    EndsAndHostBacksOff,
}

/// One row of the table.
pub struct Rule {
    pub name: &'static str,
    applies: fn(&Circumstances<'_>) -> bool,
    fate: Fate,
    fault: Fault,
    /// `None`: the message's, or the recipient's where only one was answered.
    scope: Option<Scope>,
    connection: Connection,
}

/// Read from the top; the first that applies decides.
pub const RULES: &[Rule] = &[
    Rule {
        // Another's reverse path was used: RSET did not clear what the peer kept. Possible only where whole
        // transactions are in flight, because else content follows only an accepted MAIL.
        name: FOREIGN_ENVELOPE,
        applies: |c| c.stage == Stage::Final && c.class() == 2 && !c.mail_accepted,
        fate: Fate::Hold,
        fault: Fault::Us,
        scope: Some(Scope::Message),
        connection: Connection::Ends,
    },
    Rule {
        name: "delivered",
        applies: |c| c.stage == Stage::Final && c.class() == 2,
        fate: Fate::Delivered,
        fault: Fault::Nobody,
        scope: None,
        connection: Connection::Stays,
    },
    Rule {
        // The peer closed a connection kept open between messages, or takes no more on it, or a transaction before this
        // one ended it.
        name: "not_executed",
        applies: |c| c.nothing_executed,
        fate: AT_ONCE,
        fault: Fault::Peer,
        scope: Some(Scope::Host),
        connection: Connection::Ends,
    },
    Rule {
        // RFC 5321 §3.8: the host is shutting down or wants to be left alone, whatever it was asked.
        name: "service_closing",
        applies: |c| c.code() == 421,
        fate: LATER,
        fault: Fault::Peer,
        scope: Some(Scope::Host),
        connection: Connection::EndsAndHostBacksOff,
    },
    Rule {
        // RFC 5321 §4.5.3.1.10: those accepted go now, the rest in a transaction of its own.
        name: "too_many_recipients",
        applies: |c| c.too_many_recipients() && c.others_accepted,
        fate: AT_ONCE,
        fault: Fault::Peer,
        scope: Some(Scope::Recipient),
        connection: Connection::Stays,
    },
    Rule {
        // The same for the first recipient is no limit of the transaction; 552 still means 452 (RFC 5321 §4.5.3.1.10).
        name: "too_many_recipients_alone",
        applies: |c| c.too_many_recipients() && c.has_enhanced_detail(5, 3),
        fate: LATER,
        fault: Fault::Peer,
        scope: Some(Scope::Recipient),
        connection: Connection::Stays,
    },
    Rule {
        // RFC 3207 §4: it insists on TLS, but we had to do without; a later handshake may succeed.
        name: "tls_demanded",
        applies: |c| c.code() == 530 && !c.encrypted && c.stage != Stage::Final,
        fate: LATER,
        fault: Fault::Peer,
        scope: Some(Scope::Host),
        connection: Connection::Ends,
    },
    Rule {
        // RFC 5321 §4.2.2: these codes are about the command, which this peer has offered. By DATA the message gets an
        // answer of its own. A status that is not about the protocol (RFC 3463 §3.6) is one.
        name: CHUNK_REFUSED,
        applies: |c| c.stage == Stage::Final && c.chunked && c.refuses_command(),
        fate: LATER,
        fault: Fault::Peer,
        scope: Some(Scope::Host),
        connection: Connection::Ends,
    },
    Rule {
        // "Bad sequence of commands" says nothing about the message: the two sides disagree where they are.
        name: OUT_OF_STEP,
        applies: |c| c.code() == 503 && (c.stage != Stage::Final || c.chunked),
        fate: LATER,
        fault: Fault::Peer,
        scope: Some(Scope::Host),
        connection: Connection::Ends,
    },
    Rule {
        // Its disk is full, its own DNS does not answer: the retry goes to another host of the site, where there is one
        // (RFC 5321 §5.1).
        name: HOST_UNWELL,
        applies: |c| c.speaks_of_host(),
        fate: LATER,
        fault: Fault::Peer,
        scope: Some(Scope::Host),
        connection: Connection::Stays,
    },
    Rule {
        name: "refused_for_now",
        applies: |c| c.class() == 4,
        fate: LATER,
        fault: Fault::Peer,
        scope: None,
        connection: Connection::Stays,
    },
    Rule {
        // "Client host blocked using …", "banned sending IP": another address of the pool may well be welcome, so it is
        // no hard bounce. What counts as blame stands in `blame.rs`.
        name: "source_refused",
        applies: |c| c.happened.blames_source(),
        fate: ELSEWHERE,
        fault: Fault::Us,
        scope: Some(Scope::Source),
        connection: Connection::Stays,
    },
    Rule {
        name: "refused",
        applies: |c| c.class() == 5,
        fate: Fate::Bounce,
        fault: Fault::Message,
        scope: None,
        connection: Connection::Stays,
    },
    Rule {
        // As below, where the operator would rather lose a message than send it twice.
        name: "in_doubt_held",
        applies: |c| c.content_written && c.holds,
        fate: Fate::Hold,
        fault: Fault::Route,
        scope: Some(Scope::Host),
        connection: Connection::EndsAndHostBacksOff,
    },
    Rule {
        // The answer to the final dot never came, or makes no sense: the peer may have taken the message.
        name: "in_doubt",
        applies: |c| c.content_written,
        fate: IN_DOUBT,
        fault: Fault::Route,
        scope: Some(Scope::Host),
        connection: Connection::EndsAndHostBacksOff,
    },
    Rule {
        name: "timed_out",
        applies: |c| matches!(c.happened, Happened::TimedOut { .. }),
        fate: LATER,
        fault: Fault::Peer,
        scope: Some(Scope::Host),
        connection: Connection::EndsAndHostBacksOff,
    },
    Rule {
        name: "connection_lost",
        applies: |c| matches!(c.happened, Happened::Lost(_)),
        fate: LATER,
        fault: Fault::Route,
        scope: Some(Scope::Host),
        connection: Connection::EndsAndHostBacksOff,
    },
    Rule {
        // 354 to MAIL, 250 to DATA, or no SMTP at all.
        name: "unexpected_reply",
        applies: |_| true,
        fate: LATER,
        fault: Fault::Peer,
        scope: Some(Scope::Host),
        connection: Connection::EndsAndHostBacksOff,
    },
];

/// A recipient's verdict, and what becomes of the connection. `command` is what the reply answers, or was to answer.
pub fn judge(circumstances: &Circumstances<'_>, command: &str) -> (RecipientVerdict, Connection) {
    let rule = RULES.iter().find(|rule| (rule.applies)(circumstances)).expect("the last rule applies to everything");
    let one_recipient = circumstances.stage == Stage::Recipient || circumstances.reply_per_recipient;
    let mut answer = circumstances.happened.answer(circumstances.stage, command);
    if rule.fate == Fate::Hold {
        answer = held(rule, answer);
    }
    let verdict = RecipientVerdict {
        fate: rule.fate,
        fault: rule.fault,
        scope: rule.scope.unwrap_or(if one_recipient { Scope::Recipient } else { Scope::Message }),
        rule: rule.name,
        answer,
        is_peers: matches!(circumstances.happened, Happened::Replied(_)),
    };
    (verdict, rule.connection)
}

/// One row of the table for hosts: what went wrong before a transaction began.
pub struct SessionRule {
    pub name: &'static str,
    applies: fn(Stage, &Happened, TlsMode) -> bool,
    action: HostAction,
    fault: Fault,
    scope: Scope,
}

/// Read from the top; the first that applies decides.
pub const SESSION_RULES: &[SessionRule] = &[
    SessionRule {
        name: "host_busy",
        applies: |_, happened, _| happened.code() == 421,
        action: HostAction::BackOff,
        fault: Fault::Peer,
        scope: Scope::Host,
    },
    SessionRule {
        name: "tls_failed_in_clear_instead",
        applies: |stage, _, tls| stage.is_tls() && tls == TlsMode::Opportunistic,
        action: HostAction::RetryInClear,
        fault: Fault::Peer,
        scope: Scope::Host,
    },
    SessionRule {
        // Octets in the clear behind the reply to STARTTLS (RFC 3207 §6): somebody meddles. Where TLS is opportunistic
        // it is one more broken handshake: who can inject can as well hide STARTTLS, and nothing of it is believed.
        name: "tls_injection",
        applies: |stage, happened, _| stage == Stage::StartTls && matches!(happened, Happened::Garbled(_)),
        action: HostAction::BackOffTls,
        fault: Fault::Route,
        scope: Scope::Host,
    },
    SessionRule {
        name: "tls_required",
        applies: |stage, _, _| stage.is_tls(),
        action: HostAction::BackOffTls,
        fault: Fault::Peer,
        scope: Scope::Host,
    },
    SessionRule {
        // What the route says of us is wrong, or not what the peer asks for. Mail waits until somebody puts it right;
        // it is never the mail's fault (RFC 4954 §4.1).
        name: "auth_failed",
        applies: |stage, happened, _| {
            stage == Stage::Auth
                && matches!(happened, Happened::Replied(_) | Happened::AuthNotOffered | Happened::AuthInClear)
        },
        action: HostAction::BackOff,
        fault: Fault::Us,
        scope: Scope::Host,
    },
    SessionRule {
        // Those that are in use come back soon, and other sources have theirs.
        name: "no_port",
        applies: |_, happened, _| matches!(happened, Happened::NoPort),
        action: HostAction::Pause,
        fault: Fault::Us,
        scope: Scope::Host,
    },
    SessionRule {
        name: "connect_failed",
        applies: |stage, _, _| stage == Stage::Connect,
        action: HostAction::BackOff,
        fault: Fault::Route,
        scope: Scope::Host,
    },
    SessionRule {
        // A greeting, or a reply to EHLO, that refuses our address: its other hosts share the list.
        name: "source_refused",
        applies: |_, happened, _| happened.blames_source(),
        action: HostAction::BackOff,
        fault: Fault::Us,
        scope: Scope::Source,
    },
    SessionRule {
        // A banner of 554, too, is about the host and us, not about a message (RFC 5321 §3.1).
        name: "host_refuses",
        applies: |_, happened, _| happened.code() != 0,
        action: HostAction::BackOff,
        fault: Fault::Peer,
        scope: Scope::Host,
    },
    SessionRule {
        name: "host_lost",
        applies: |_, _, _| true,
        action: HostAction::BackOff,
        fault: Fault::Route,
        scope: Scope::Host,
    },
];

impl SessionFailure {
    /// The place of the row that decided, in [`SESSION_RULES`]; none where a transaction's verdict did.
    pub fn session_rule(&self) -> Option<usize> {
        let of_transaction =
            matches!(self.stage, Stage::Mail | Stage::Recipient | Stage::Data | Stage::Content | Stage::Final);
        let place = SESSION_RULES.iter().position(|rule| rule.name == self.rule);
        place.filter(|_| !of_transaction)
    }

    /// A transaction's verdict that is the host's as well.
    pub(crate) fn of_transaction(stage: Stage, verdict: &RecipientVerdict) -> Self {
        let RecipientVerdict { fault, scope, rule, answer, is_peers, .. } = verdict.clone();
        Self { stage, action: HostAction::BackOff, fault, scope, rule, answer, is_peers }
    }
}

/// What a failure outside of any transaction means.
pub fn judge_session(stage: Stage, happened: &Happened, tls: TlsMode, command: &str) -> SessionFailure {
    let rule = SESSION_RULES.iter().find(|rule| (rule.applies)(stage, happened, tls));
    let rule = rule.expect("the last rule applies to everything");
    let answer = happened.answer(stage, command);
    let &SessionRule { name, action, fault, scope, .. } = rule;
    let is_peers = matches!(happened, Happened::Replied(_));
    SessionFailure { stage, action, fault, scope, rule: name, answer, is_peers }
}

/// Connection refused, host unreachable and the like.
pub fn connect_failed(reason: &str) -> SessionFailure {
    judge_session(Stage::Connect, &Happened::Lost(reason.to_owned()), TlsMode::Disabled, "")
}

/// All ports of our address are in use for this host.
pub fn no_port() -> SessionFailure {
    judge_session(Stage::Connect, &Happened::NoPort, TlsMode::Disabled, "")
}

pub fn connect_timed_out(after: Duration) -> SessionFailure {
    judge_session(Stage::Connect, &Happened::TimedOut { after }, TlsMode::Disabled, "")
}

/// What we refuse to put on the wire to this peer, without asking it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// RFC 1870 §6.1: the peer told its limit.
    TooLarge,
    /// RFC 6152 §3: 8-bit content, and no 8BITMIME.
    EightBit,
    /// RFC 6531 §3.4: no SMTPUTF8, and the local part of this address, or of the reverse path, is not ASCII.
    AddressNotAscii,
    /// RFC 6531 §3.4: no SMTPUTF8, and a header field is not ASCII.
    HeaderNotAscii,
    /// Not an address that can be written into a command.
    BadRecipient,
    BadReversePath,
    /// RFC 9422: beyond the peer's RCPTMAX.
    BeyondRecipientsMax,
}

impl RecipientVerdict {
    /// What it means for a recipient that this host lacks what its message needs (RFC 6531 §3.5 and RFC 6152 §3 ask
    /// for no more than that it isn't sent there): another host of the site is tried at once and uncounted; where those
    /// that are left can't be reached now, later; it bounces when none is left.
    pub fn elsewhere(&mut self, elsewhere: Elsewhere) {
        assert!(matches!(self.fate, Fate::BounceIfLastHost(_)), "only what this host lacks is looked for elsewhere");
        let deferred = |mut answer: Answer, text: &str| {
            answer.code = 451;
            answer.enhanced = answer.enhanced.map(|(_, subject, detail)| (4, subject, detail));
            answer.text.push_str(text);
            answer
        };
        self.fate = match elsewhere {
            Elsewhere::AtOnce => AT_ONCE,
            Elsewhere::Later => {
                self.answer = deferred(self.answer.clone(), "; other hosts, which may, can not be reached now");
                LATER
            }
            Elsewhere::Nowhere => Fate::Bounce,
        };
    }

    /// An automation rule says what the peer's answer counts as. What is in doubt stays so, and what repeats at once
    /// and uncounted is no answer about the message.
    pub fn recount(&mut self, counts_as: CountsAs) {
        assert!(self.is_peers, "only a peer's answer is counted as something else");
        self.fate = match (self.fate, counts_as) {
            (Fate::Bounce, CountsAs::Transient) => LATER,
            (Fate::Retry(Retry { counts_attempt: true, in_doubt: false, .. }), CountsAs::Permanent) => Fate::Bounce,
            (fate, _) => fate,
        };
    }
}

/// The verdict on what we refuse ourselves.
pub fn refuse(refusal: Refusal) -> RecipientVerdict {
    use Fault::{Nobody, Peer};
    use Scope::{Host, Message, Recipient};
    let elsewhere = Fate::BounceIfLastHost;
    let (eight_bit, utf8) = (elsewhere(Need::EightBitMime), elsewhere(Need::SmtpUtf8));
    let (rule, fate, fault, scope, code, enhanced, text) = match refusal {
        Refusal::TooLarge => (
            "too_large",
            Fate::Bounce,
            Fault::Message,
            Message,
            552,
            (5, 3, 4),
            "the message is larger than the peer accepts",
        ),
        Refusal::EightBit => {
            ("eight_bit", eight_bit, Peer, Host, 554, (5, 6, 3), "8-bit content, but the peer does not offer 8BITMIME")
        }
        Refusal::AddressNotAscii => (
            "address_utf8",
            utf8,
            Peer,
            Host,
            553,
            (5, 6, 7),
            "a non-ASCII address, but the peer does not offer SMTPUTF8",
        ),
        Refusal::HeaderNotAscii => {
            ("header_utf8", utf8, Peer, Host, 554, (5, 6, 9), "a UTF-8 header, but the peer does not offer SMTPUTF8")
        }
        Refusal::BadRecipient => (
            "bad_recipient",
            Fate::Bounce,
            Fault::Message,
            Recipient,
            553,
            (5, 1, 3),
            "the recipient's address is malformed",
        ),
        Refusal::BadReversePath => {
            ("bad_reverse_path", Fate::Bounce, Fault::Message, Message, 553, (5, 1, 7), "the reverse path is malformed")
        }
        Refusal::BeyondRecipientsMax => (
            "recipients_max",
            AT_ONCE,
            Nobody,
            Recipient,
            452,
            (4, 5, 3),
            "more recipients than the peer takes at once",
        ),
    };
    let answer = Answer { code, enhanced: Some(enhanced), text: text.to_owned(), command: String::new() };
    RecipientVerdict { fate, fault, scope, rule, answer, is_peers: false }
}

impl Circumstances<'_> {
    fn code(&self) -> u16 {
        self.happened.code()
    }

    /// 0 where no reply came.
    fn class(&self) -> u16 {
        self.code() / 100
    }

    fn has_enhanced_detail(&self, subject: u16, detail: u16) -> bool {
        let Happened::Replied(reply) = self.happened else { return false };
        reply.enhanced().is_some_and(|(_, s, d)| (s, d) == (subject, detail))
    }

    /// As unknown, misspelt, or not built: not because of what it says.
    fn refuses_command(&self) -> bool {
        let Happened::Replied(reply) = self.happened else { return false };
        matches!(reply.code, 500 | 501 | 502 | 504) && reply.enhanced().is_none_or(|(_, subject, _)| subject == 5)
    }

    /// A mail system's or a network's status (RFC 3463 §3.4 and §3.5) but for "message too big for system"; without
    /// any, "local error in processing" and "insufficient system storage" (RFC 5321 §4.2.3), of which the first is what
    /// greylisting says to RCPT. All else for now is about the message, its recipient or its sender.
    fn speaks_of_host(&self) -> bool {
        let Happened::Replied(reply) = self.happened else { return false };
        reply.is_transient()
            && match reply.enhanced() {
                Some((_, subject, detail)) => matches!(subject, 3 | 4) && (subject, detail) != (3, 4),
                None => matches!(reply.code, 451 | 452) && self.stage != Stage::Recipient,
            }
    }

    /// 452 and 552 mean it with status x.5.3, and without any; other codes for now with that status (OpenSMTPD's 451).
    fn too_many_recipients(&self) -> bool {
        let Happened::Replied(reply) = self.happened else { return false };
        let says_so = match (reply.code, reply.enhanced()) {
            (452 | 552, None) => true,
            (552, _) => self.has_enhanced_detail(5, 3),
            _ => reply.is_transient() && self.has_enhanced_detail(5, 3),
        };
        says_so && self.stage == Stage::Recipient
    }
}

impl Happened {
    pub(crate) fn is_service_closing(&self) -> bool {
        self.code() == 421
    }

    /// In answer to MAIL, when nobody was named yet, "too many recipients" can't be about them (RFC 3463 §3.6):
    /// OpenSMTPD says so to the MAIL behind the last one that it takes in a session (`max-mails`).
    pub(crate) fn says_session_is_full(&self) -> bool {
        let Self::Replied(reply) = self else { return false };
        reply.code == 452 && reply.enhanced().is_some_and(|(_, subject, detail)| (subject, detail) == (5, 3))
    }

    /// The same for a transaction that a reply was not about, but that ends with it.
    pub(crate) fn unrelated(self) -> Self {
        match self {
            Self::Replied(reply) => Self::Garbled(format!("given up after {} {}", reply.code, reply.text())),
            other => other,
        }
    }

    /// 0 where no reply came.
    fn code(&self) -> u16 {
        match self {
            Self::Replied(reply) => reply.code,
            _ => 0,
        }
    }

    fn blames_source(&self) -> bool {
        matches!(self, Self::Replied(reply) if blame::blames_source(reply))
    }

    /// The peer's reply, or ours in its place.
    fn answer(&self, stage: Stage, command: &str) -> Answer {
        let (code, enhanced, mut text) = match self {
            Self::Replied(reply) => {
                let (enhanced, text) = reply.enhanced_and_text();
                (reply.code, enhanced, text)
            }
            // RFC 3463 §3.5: X.4.1 no answer from the host, X.4.2 bad connection; §3.8: X.7.5 cryptographic failure.
            Self::Lost(reason) if stage == Stage::Connect => (451, Some((4, 4, 1)), reason.clone()),
            Self::NoPort => (451, Some((4, 4, 1)), "the source has no port left for it".to_owned()),
            Self::Lost(reason) | Self::Garbled(reason) if stage.is_tls() => {
                (451, Some((4, 7, 5)), format!("{reason} ({stage})"))
            }
            Self::Lost(reason) => (451, Some((4, 4, 2)), format!("connection lost {stage}: {reason}")),
            Self::TimedOut { after } => {
                let detail = if stage == Stage::Connect { 1 } else { 2 };
                let after = match after.subsec_millis() {
                    0 => format!("{} s", after.as_secs()),
                    _ => format!("{} ms", after.as_millis()),
                };
                (451, Some((4, 4, detail)), format!("timed out after {after} {stage}"))
            }
            Self::TlsNotOffered => (451, Some((4, 7, 4)), "TLS is required, but the peer does not offer it".to_owned()),
            // RFC 4954 §6: X.7.0 for authentication.
            Self::AuthNotOffered => {
                let text = "the route has credentials, but the peer offers neither AUTH PLAIN nor AUTH LOGIN";
                (451, Some((4, 7, 0)), text.to_owned())
            }
            Self::AuthInClear => {
                let text = "the route has credentials, but the connection has no TLS to say them in";
                (451, Some((4, 7, 0)), text.to_owned())
            }
            Self::Garbled(reason) => (451, Some((4, 5, 0)), format!("{reason} ({stage})")),
        };
        truncate(&mut text, ANSWER_TEXT_OCTETS_MAX);
        Answer { code, enhanced, text, command: command.to_owned() }
    }
}

/// What stands in records in place of the answer to what may have left: it is the mark of what is in doubt, to the end.
fn held(rule: &Rule, answer: Answer) -> Answer {
    let why = match rule.name {
        FOREIGN_ENVELOPE => "the peer refused MAIL but took the content, which may have left under another envelope",
        _ => "the peer may have taken the message",
    };
    let last = format!("{} {}", answer.code, answer.text);
    let mut text = format!("in doubt: {why}; it is not sent again by itself ({last})");
    truncate(&mut text, ANSWER_TEXT_OCTETS_MAX);
    Answer { code: 451, enhanced: Some((4, 5, 0)), text, command: answer.command }
}

/// What stands in an intent's record, in place of an answer: all that is known if the engine ends before there is one.
pub fn intent(peer_name: &str) -> Answer {
    let mut text = format!(
        "in doubt: the engine ended while {peer_name} was sent the end of the message, and may have taken it; it is \
         not sent again by itself"
    );
    truncate(&mut text, ANSWER_TEXT_OCTETS_MAX);
    Answer { text, ..Answer::default() }
}

fn truncate(text: &mut String, octets_max: usize) {
    if text.len() > octets_max {
        text.truncate(text.floor_char_boundary(octets_max));
    }
}

/// The rule after which whole transactions are no longer put in flight, and after a chunk by itself none is sent.
pub(crate) const OUT_OF_STEP: &str = "out_of_step";

/// The rule after which content goes by DATA.
pub(crate) const CHUNK_REFUSED: &str = "chunk_refused";

/// The rule after which a retry prefers another host.
pub(crate) const HOST_UNWELL: &str = "host_unwell";

const FOREIGN_ENVELOPE: &str = "foreign_envelope";

const AT_ONCE: Fate = Fate::Retry(Retry { when: When::AtOnce, counts_attempt: false, in_doubt: false });
const ELSEWHERE: Fate = Fate::Retry(Retry { when: When::OtherSource, counts_attempt: true, in_doubt: false });
const LATER: Fate = Fate::Retry(Retry { when: When::Scheduled, counts_attempt: true, in_doubt: false });
const IN_DOUBT: Fate = Fate::Retry(Retry { when: When::Scheduled, counts_attempt: true, in_doubt: true });

#[cfg(test)]
mod tests {
    use super::*;

    /// A transaction's usual circumstances at `stage`.
    fn at<'a>(stage: Stage, happened: &'a Happened) -> Circumstances<'a> {
        Circumstances {
            stage,
            happened,
            nothing_executed: false,
            content_written: stage == Stage::Final,
            chunked: false,
            mail_accepted: true,
            others_accepted: false,
            encrypted: true,
            reply_per_recipient: false,
            holds: false,
        }
    }

    fn replied(text: &str) -> Happened {
        let (code, text) = text.split_once(' ').expect("code and text");
        Happened::Replied(Reply::new(code.parse().expect("a code"), text))
    }

    fn rule(stage: Stage, text: &str) -> &'static str {
        judge(&at(stage, &replied(text)), "").0.rule
    }

    const TRANSACTION_STAGES: [Stage; 6] =
        [Stage::Reset, Stage::Mail, Stage::Recipient, Stage::Data, Stage::Content, Stage::Final];

    /// Walks every combination that a client can report.
    fn for_all(mut visit: impl FnMut(&Circumstances<'_>)) {
        let mut all = vec![
            Happened::Lost("reset".to_owned()),
            Happened::TimedOut { after: Duration::from_secs(300) },
            Happened::NoPort,
            Happened::Garbled("noise".to_owned()),
        ];
        for code in [200, 250, 354, 399, 400, 421, 450, 451, 452, 499, 500, 503, 530, 550, 552, 554, 599] {
            for status in ["", "x.5.3 ", "x.7.1 "] {
                let status = status.replace('x', &(code / 100).to_string());
                all.push(replied(&format!("{code} {status}text")));
                all.push(replied(&format!("{code} {status}client host [192.0.2.1] blocked using a list")));
            }
        }
        for (happened, stage) in all.iter().flat_map(|h| TRANSACTION_STAGES.map(|s| (h, s))) {
            for bits in 0..256_u32 {
                let bit = |n: u32| bits >> n & 1 == 1;
                // Impossible together: written content follows an executed MAIL, an answer to it comes after it.
                if bit(0) && (bit(1) || stage == Stage::Final) {
                    continue;
                }
                visit(&Circumstances {
                    nothing_executed: bit(0),
                    content_written: bit(1),
                    mail_accepted: bit(2),
                    others_accepted: bit(3),
                    encrypted: bit(4),
                    reply_per_recipient: bit(5),
                    chunked: bit(6),
                    holds: bit(7),
                    ..at(stage, happened)
                });
            }
        }
    }

    #[test]
    fn every_circumstance_has_a_verdict_and_every_rule_a_circumstance() {
        let mut seen = std::collections::BTreeSet::new();
        for_all(|c| {
            seen.insert(judge(c, "").0.rule);
        });
        assert_eq!(seen.len(), RULES.len(), "no rule is shadowed by those above it");
    }

    #[test]
    fn promises_hold_in_every_circumstance() {
        for_all(|c| {
            let (verdict, connection) = judge(c, "");
            if verdict.fate == Fate::Delivered {
                assert!(c.stage == Stage::Final && c.mail_accepted && c.class() == 2, "{c:?}");
            }
            if verdict.fate == Fate::Bounce {
                assert_eq!(c.class(), 5, "only the peer's permanent refusal bounces: {c:?}");
            }
            if let Fate::Retry(retry) = verdict.fate {
                assert!(!retry.in_doubt || c.content_written, "in doubt only after the last octet: {c:?}");
                let refused = matches!(c.class(), 4 | 5);
                let doubtful = c.content_written && !refused && !c.nothing_executed && !c.holds;
                assert_eq!(retry.in_doubt, doubtful, "{c:?}");
                assert_eq!(retry.counts_attempt, retry.when != When::AtOnce, "{c:?}");
                if retry.when == When::OtherSource {
                    assert_eq!(c.class(), 5, "what is refused for now is tried again from the same source: {c:?}");
                }
                let progress = c.nothing_executed || c.others_accepted;
                assert!(retry.counts_attempt || progress, "an uncounted retry must get somewhere: {c:?}");
            }
            if verdict.fate == Fate::Hold {
                let foreign = c.class() == 2 && !c.mail_accepted;
                assert!(c.content_written && c.holds || foreign, "held only where it may have left: {c:?}");
                assert!(verdict.answer.text.starts_with("in doubt: "), "{c:?}");
            }
            if c.holds {
                assert!(!matches!(verdict.fate, Fate::Retry(Retry { in_doubt: true, .. })), "never twice: {c:?}");
            }
            if c.code() == 421 || !matches!(c.happened, Happened::Replied(_)) {
                assert_ne!(connection, Connection::Stays, "{c:?}");
            }
        });
    }

    /// A rule may say that an answer counts as another; whether the message has left it can't say.
    #[test]
    fn what_is_in_doubt_stays_so_whatever_a_rule_says() {
        for counts_as in [CountsAs::Transient, CountsAs::Permanent] {
            for_all(|c| {
                let before = judge(c, "").0;
                if !before.is_peers {
                    return;
                }
                let mut verdict = before.clone();
                verdict.recount(counts_as);
                let may_change = match before.fate {
                    Fate::Bounce => counts_as == CountsAs::Transient,
                    Fate::Retry(Retry { counts_attempt, in_doubt, .. }) => {
                        counts_as == CountsAs::Permanent && counts_attempt && !in_doubt
                    }
                    Fate::Delivered | Fate::BounceIfLastHost(_) | Fate::Hold => false,
                };
                assert_eq!(verdict.fate != before.fate, may_change, "{c:?}: {before:?}");
            });
        }
    }

    /// A final dot is no command that could be out of order; BDAT is (RFC 3030 §2).
    #[test]
    fn a_503_to_a_chunk_is_not_about_the_message() {
        let happened = replied("503 5.5.1 BDAT without RCPT");
        let dot = at(Stage::Final, &happened);
        assert_eq!(judge(&dot, ".").0.fate, Fate::Bounce);
        let chunk = Circumstances { chunked: true, ..dot };
        let (verdict, connection) = judge(&chunk, "BDAT 9 LAST");
        assert_eq!((verdict.rule, verdict.fate, connection), (OUT_OF_STEP, LATER, Connection::Ends));
    }

    /// RFC 5321 §4.2.2, RFC 3463 §3.6: what is not about the protocol is about the message.
    #[test]
    fn a_peer_that_does_not_know_bdat_after_all_has_refused_no_message() {
        for text in ["500 what", "500 5.5.2 unknown", "501 5.5.4 size?", "502 5.5.1 not built", "504 no"] {
            let happened = replied(text);
            let dot = at(Stage::Final, &happened);
            assert_eq!(judge(&dot, ".").0.fate, Fate::Bounce, "{text}");
            let chunk = Circumstances { chunked: true, ..dot };
            let (verdict, connection) = judge(&chunk, "BDAT 9 LAST");
            assert_eq!((verdict.rule, verdict.fate, connection), (CHUNK_REFUSED, LATER, Connection::Ends), "{text}");
        }
        for text in ["500 5.7.1 spam", "550 no", "554 5.6.0 malformed"] {
            let happened = replied(text);
            let chunk = Circumstances { chunked: true, ..at(Stage::Final, &happened) };
            assert_eq!(judge(&chunk, "BDAT 9 LAST").0.fate, Fate::Bounce, "{text}");
        }
    }

    #[test]
    fn a_421_is_the_hosts_whatever_was_asked() {
        for stage in TRANSACTION_STAGES {
            let happened = replied("421 4.3.2 going down");
            let (verdict, connection) = judge(&at(stage, &happened), "RCPT TO:<a@b>");
            assert_eq!((verdict.rule, verdict.scope), ("service_closing", Scope::Host));
            assert_eq!(verdict.fate, LATER);
            assert_eq!(connection, Connection::EndsAndHostBacksOff);
            let behind = Circumstances { nothing_executed: true, content_written: false, ..at(stage, &happened) };
            assert_eq!(judge(&behind, "").0.fate, AT_ONCE, "later transactions count no attempt");
        }
    }

    #[test]
    fn classes_decide_where_nothing_special_does() {
        assert_eq!(rule(Stage::Recipient, "550 5.1.1 unknown"), "refused");
        assert_eq!(rule(Stage::Recipient, "450 4.2.1 greylisted"), "refused_for_now");
        assert_eq!(rule(Stage::Recipient, "452 4.2.2 mailbox full"), "refused_for_now");
        assert_eq!(rule(Stage::Recipient, "552 5.2.2 mailbox full"), "refused");
        assert_eq!(rule(Stage::Recipient, "451 please try again later"), "refused_for_now");
        assert_eq!(rule(Stage::Final, "450 4.3.4 too big now"), "refused_for_now");
        assert_eq!(rule(Stage::Mail, "354 what"), "unexpected_reply");
        assert_eq!(rule(Stage::Data, "250 what"), "unexpected_reply");
        assert_eq!(rule(Stage::Final, "354 what"), "in_doubt");
        assert_eq!(rule(Stage::Final, "250 2.0.0 queued"), "delivered");
        assert_eq!(rule(Stage::Mail, "503 5.5.1 nested MAIL"), "out_of_step");
        assert_eq!(rule(Stage::Final, "503 no"), "refused");
    }

    #[test]
    fn a_host_speaks_of_itself_rfc_5321_4_2_3() {
        for stage in [Stage::Mail, Stage::Data, Stage::Final] {
            for text in ["452 4.3.1 no room", "452 no room", "451 local error", "451 4.4.3 no DNS", "450 4.3.2 busy"] {
                let happened = replied(text);
                let (verdict, connection) = judge(&at(stage, &happened), "");
                assert_eq!((verdict.rule, verdict.scope, verdict.fate), (HOST_UNWELL, Scope::Host, LATER), "{text}");
                assert_eq!(connection, Connection::Stays, "others may have been taken by it");
            }
        }
        assert_eq!(rule(Stage::Recipient, "451 4.3.0 lookup failure"), HOST_UNWELL);
    }

    #[test]
    fn too_many_recipients_rfc_5321_4_5_3_1_10() {
        let texts = ["452 4.5.3 many", "552 5.5.3 many", "452 many", "552 many", "552 4.5.3 mixed", "451 4.5.3 many"];
        for text in texts {
            let happened = replied(text);
            let beside = Circumstances { others_accepted: true, ..at(Stage::Recipient, &happened) };
            assert_eq!(judge(&beside, "").0.fate, AT_ONCE, "{text}");
        }
        // The first recipient of a transaction: counted, or it would go round for ever.
        assert_eq!(rule(Stage::Recipient, "452 4.5.3 many"), "too_many_recipients_alone");
        assert_eq!(rule(Stage::Recipient, "552 5.5.3 many"), "too_many_recipients_alone");
        assert_eq!(rule(Stage::Recipient, "451 4.5.3 many"), "too_many_recipients_alone");
        let happened = replied("451 4.7.1 later");
        let beside = Circumstances { others_accepted: true, ..at(Stage::Recipient, &happened) };
        assert_eq!(judge(&beside, "").0.fate, LATER);
        assert_eq!(rule(Stage::Recipient, "452 many"), "refused_for_now");
        assert_eq!(rule(Stage::Recipient, "552 full"), "refused");
    }

    #[test]
    fn a_delivery_without_an_accepted_mail_is_held() {
        let happened = replied("250 queued");
        let foreign = Circumstances { mail_accepted: false, ..at(Stage::Final, &happened) };
        let (verdict, connection) = judge(&foreign, ".");
        assert_eq!((verdict.fate, verdict.fault), (Fate::Hold, Fault::Us));
        assert_eq!(connection, Connection::Ends);
    }

    #[test]
    fn tls_demanded_in_the_clear_is_no_bounce() {
        let happened = replied("530 5.7.0 Must issue a STARTTLS command first");
        let clear = Circumstances { encrypted: false, ..at(Stage::Mail, &happened) };
        assert_eq!(judge(&clear, "").0.rule, "tls_demanded");
        assert_eq!(judge(&at(Stage::Mail, &happened), "").0.rule, "refused");
    }

    /// Never a hard bounce, whatever was asked; the message is tried from another address.
    #[test]
    fn a_refusal_that_blames_our_address_is_no_bounce() {
        let text = "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked using zen.spamhaus.org";
        for stage in TRANSACTION_STAGES {
            let happened = replied(text);
            let (verdict, connection) = judge(&at(stage, &happened), "");
            assert_eq!((verdict.rule, verdict.fate, verdict.scope), ("source_refused", ELSEWHERE, Scope::Source));
            assert_eq!((verdict.fault, connection), (Fault::Us, Connection::Stays));
            assert_eq!(verdict.answer.code, 554, "what is recorded is what the peer said");
        }
        let failure = judge_session(Stage::Banner, &replied(text), TlsMode::Opportunistic, "");
        assert_eq!((failure.rule, failure.action), ("source_refused", HostAction::BackOff));
        assert_eq!(failure.scope, Scope::Source);
        assert_eq!(rule(Stage::Recipient, "550 5.7.1 your message is spam"), "refused");
    }

    #[test]
    fn a_host_that_cannot_be_used_backs_off() {
        for text in ["554 5.7.1 no", "421 4.7.0 later", "450 4.3.2 busy", "521 5.3.2 no mail here"] {
            let failure = judge_session(Stage::Banner, &replied(text), TlsMode::Opportunistic, "");
            assert_eq!(failure.action, HostAction::BackOff);
            assert_eq!(failure.answer.code.to_string(), text[..3]);
        }
        let failure = no_port();
        assert_eq!((failure.rule, failure.action, failure.fault), ("no_port", HostAction::Pause, Fault::Us));
        let failure = connect_failed("connection refused");
        assert_eq!((failure.rule, failure.answer.enhanced), ("connect_failed", Some((4, 4, 1))));
        assert_eq!(connect_timed_out(Duration::from_secs(30)).answer.text, "timed out after 30 s connecting");
        let short = connect_timed_out(Duration::from_millis(1_500));
        assert_eq!(short.answer.text, "timed out after 1500 ms connecting");
    }

    #[test]
    fn tls_trouble_falls_back_only_where_tls_is_opportunistic() {
        let trouble = Happened::Lost("handshake failure".to_owned());
        for (tls, action) in [
            (TlsMode::Opportunistic, HostAction::RetryInClear),
            (TlsMode::Required, HostAction::BackOffTls),
            (TlsMode::Verified, HostAction::BackOffTls),
        ] {
            assert_eq!(judge_session(Stage::Handshake, &trouble, tls, "STARTTLS").action, action);
        }
        let injected = Happened::Garbled("octets in the clear".to_owned());
        let failure = judge_session(Stage::StartTls, &injected, TlsMode::Required, "STARTTLS");
        assert_eq!((failure.rule, failure.action), ("tls_injection", HostAction::BackOffTls));
        // Whether the octets behind the 220 arrive with it or a moment later must not decide whether mail goes at all.
        let failure = judge_session(Stage::StartTls, &injected, TlsMode::Opportunistic, "STARTTLS");
        assert_eq!(failure.action, HostAction::RetryInClear);
    }

    #[test]
    fn our_own_refusals_say_the_status_that_the_rfcs_give() {
        let status = |refusal| refuse(refusal).answer.enhanced;
        assert_eq!(status(Refusal::TooLarge), Some((5, 3, 4)));
        assert_eq!(status(Refusal::EightBit), Some((5, 6, 3)));
        assert_eq!(status(Refusal::AddressNotAscii), Some((5, 6, 7)));
        assert_eq!(status(Refusal::HeaderNotAscii), Some((5, 6, 9)));
        assert_eq!(refuse(Refusal::BeyondRecipientsMax).fate, AT_ONCE);
        assert_eq!(refuse(Refusal::EightBit).fate, Fate::BounceIfLastHost(Need::EightBitMime));
        assert_eq!(refuse(Refusal::AddressNotAscii).fate, Fate::BounceIfLastHost(Need::SmtpUtf8));
        assert_eq!(refuse(Refusal::HeaderNotAscii).fate, Fate::BounceIfLastHost(Need::SmtpUtf8));
    }

    #[test]
    fn answers_are_bounded_at_a_character() {
        let text = format!("550 {}", "ä".repeat(ANSWER_TEXT_OCTETS_MAX));
        let answer = judge(&at(Stage::Mail, &replied(&text)), "").0.answer;
        assert_eq!(answer.text.len(), ANSWER_TEXT_OCTETS_MAX);
    }
}
