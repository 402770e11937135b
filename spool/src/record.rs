//! The records that the spool keeps: what they say, not how they are framed (that is `format.rs`).
//!
//! Two kinds hold mail state. An [`Envelope`] heads a message record, whose header block and body follow it as raw
//! bytes. An [`Outcome`] tells what became of some of a message's recipients in one transaction, one line each; it is
//! *absolute* (attempts = 3, due = T), so that applying it twice changes nothing, and it is self-contained: an event
//! can be derived from it when the message itself is no longer on disk.
//!
//! Envelopes are rkyv archives, read in place: [`ArchivedEnvelope`]. Outcomes, and states, are packed (`packed.rs`);
//! they were rkyv archives once, and such are read.

use std::fmt;
use std::str::FromStr;

use rkyv::rancor::Failure;
use rkyv::{Archive, Deserialize, Serialize};

/// Names a log for as long as the spool exists; never used for another log, even after the log is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LogId(pub u16);

/// A commit of a log: everything appended under one number becomes durable at once. Numbers only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct CommitNumber(pub u64);

/// A record's number within its log. The first record of a log has sequence 1; numbers only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Sequence(pub u64);

/// A message's name: the log that holds it and the sequence of its message record.
///
/// Written as 16 hexadecimal digits: 4 of the log, 12 of the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(u64);

impl MessageId {
    /// `sequence` must be below 2^48, which at a million messages a second lasts nine years.
    pub fn new(log: LogId, sequence: Sequence) -> Self {
        assert!(sequence.0 < 1 << SEQUENCE_BITS);
        Self(u64::from(log.0) << SEQUENCE_BITS | sequence.0)
    }

    pub fn log(self) -> LogId {
        LogId((self.0 >> SEQUENCE_BITS) as u16)
    }

    pub fn sequence(self) -> Sequence {
        Sequence(self.0 & ((1 << SEQUENCE_BITS) - 1))
    }

    /// The form in which records name a message.
    pub fn to_raw(self) -> u64 {
        self.0
    }

    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for MessageId {
    type Err = ParseMessageIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hexadecimal = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !hexadecimal {
            return Err(ParseMessageIdError);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| ParseMessageIdError)
    }
}

/// A shared body's name, of the same form as a message's: the log that holds it and the sequence of its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BodyId(MessageId);

impl BodyId {
    pub(crate) fn new(id: MessageId) -> Self {
        Self(id)
    }

    pub(crate) fn message_id(self) -> MessageId {
        self.0
    }

    /// The log that holds the body, and must hold the messages that share it.
    pub fn log(self) -> LogId {
        self.0.log()
    }
}

impl fmt::Display for BodyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The text is not 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParseMessageIdError;

impl fmt::Display for ParseMessageIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message id is 16 hexadecimal digits")
    }
}

impl std::error::Error for ParseMessageIdError {}

/// What is known of a message beside its content. Times are Unix milliseconds.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[rkyv(derive(Debug))]
pub struct Envelope {
    /// Without angle brackets; empty is the null reverse path.
    pub reverse_path: String,
    /// A recipient's place here is its index in every [`Outcome`].
    pub recipients: Vec<Recipient>,
    /// Empty: the engine's own.
    pub tenant: String,
    pub campaign: String,
    pub egress_pool: String,
    /// 0 high, 1 normal, 2 bulk.
    pub priority: u8,
    pub created_ms: u64,
    /// Before this time no attempt is made.
    pub first_attempt_ms: u64,
    /// From this time on no attempt is begun; the message ends as Expiration.
    pub expires_ms: u64,
    /// The content has octets above 127.
    pub eight_bit: bool,
    /// An address or a header field is not ASCII, so that the peer must offer SMTPUTF8.
    pub smtputf8: bool,
    /// A line of the content (prefix included) begins with a dot, so that DATA needs dot-stuffing (RFC 5321 §4.5.2).
    pub dot_lines: bool,
    /// How the message came: `ESMTP`, `HTTP`, `LMTP`, `embedded`; and behind it, a line each, what
    /// [`Envelope::set_dsn`] puts there.
    pub reception_protocol: String,
    /// The client's address and port, empty where there is none.
    pub client_address: String,
    pub client_name: String,
    pub session_id: u64,
    /// Header fields captured for events, as `[events] headers` asks.
    pub headers: Vec<(String, String)>,
    pub meta: Vec<(String, String)>,
}

#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[rkyv(derive(Debug))]
pub struct Recipient {
    /// Local part as given, domain in lower case.
    pub address: String,
}

/// What one transaction, or one decision, meant for some recipients of a message. Times are Unix milliseconds.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[rkyv(derive(Debug))]
pub struct Outcome {
    /// [`MessageId::to_raw`].
    pub message: u64,
    pub at_ms: u64,
    pub results: Vec<RecipientResult>,
    /// Copied from the envelope and the message record, for the event.
    pub reverse_path: String,
    pub tenant: String,
    pub campaign: String,
    pub egress_pool: String,
    pub created_ms: u64,
    pub size: u64,
    pub reception_protocol: String,
    pub headers: Vec<(String, String)>,
    pub meta: Vec<(String, String)>,
    /// Where it was tried; empty strings where nothing was connected.
    pub site: String,
    pub peer_name: String,
    pub peer_address: String,
    pub egress_source: String,
    pub source_address: String,
    pub delivery_protocol: String,
    /// The protocol's name, and behind it a line for what vouched for the peer, where something did.
    pub tls_protocol: String,
    /// The cipher's name, and behind it a line for each part of the peer's certificate's subject name.
    pub tls_cipher: String,
    pub session_id: u64,
}

#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[rkyv(derive(Debug))]
pub struct RecipientResult {
    /// Index into [`Envelope::recipients`].
    pub index: u32,
    pub recipient: String,
    /// `domain`, or `campaign:tenant@domain` in KumoMTA's form.
    pub queue: String,
    pub fate: Fate,
    /// Attempts made so far, this one included.
    pub attempts: u32,
    pub answer: Answer,
}

/// What a copy of a message knows of its recipients: their present, absolute state.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[rkyv(derive(Debug))]
pub struct CopiedState {
    /// [`Envelope::recipients`] in number.
    pub recipients: u32,
    /// Recipients with a final fate; it was told by outcome records that may be gone.
    pub finished: Vec<u32>,
    /// The latest state of others that have one.
    pub deferred: Vec<RecipientResult>,
}

/// RFC 3461's parameters as they stand in commands, encoded. Empty where none were given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DsnParameters {
    /// Of MAIL: `RET=HDRS ENVID=QQ314159`.
    pub mail: String,
    /// Of RCPT: `NOTIFY=FAILURE ORCPT=rfc822;a@b`, by index into [`Envelope::recipients`]; those that have some.
    pub recipients: Vec<(u32, String)>,
}

impl DsnParameters {
    /// From the lines behind the first of [`Envelope::reception_protocol`]. What is no such line is passed over.
    fn parse(text: &str) -> Self {
        let mut parameters = Self::default();
        for line in text.split('\n').skip(1) {
            match line.split_once(' ') {
                Some(("MAIL", words)) => parameters.mail = words.to_owned(),
                Some((index, words)) => {
                    parameters.recipients.extend(index.parse().ok().map(|index| (index, words.to_owned())));
                }
                None => {}
            }
        }
        parameters
    }
}

impl Envelope {
    /// To be called once. The parameters hold no line ending.
    pub fn set_dsn(&mut self, parameters: &DsnParameters) {
        let of_mail = Some(("MAIL".to_owned(), &parameters.mail)).filter(|(_, words)| !words.is_empty());
        let of_recipients = parameters.recipients.iter().map(|(index, words)| (index.to_string(), words));
        for (key, words) in of_mail.into_iter().chain(of_recipients) {
            assert!(!words.contains('\n'), "a parameter is part of a line");
            self.reception_protocol.push_str(&format!("\n{key} {words}"));
        }
    }

    pub fn dsn(&self) -> DsnParameters {
        DsnParameters::parse(&self.reception_protocol)
    }

    pub fn reception_protocol(&self) -> &str {
        first_line(&self.reception_protocol)
    }
}

fn first_line(text: &str) -> &str {
    text.split('\n').next().unwrap_or_default()
}

impl RecipientResult {
    /// A deferral that nobody has answered yet: what is so if nothing more is heard of an attempt. It stands before the
    /// octets that can't be taken back, and what becomes of them is recorded after it. No event tells of it.
    pub fn is_intent(&self) -> bool {
        self.answer.code == 0 && !self.fate.is_final()
    }
}

impl Outcome {
    /// `verified_by` is what vouched for the peer: `pkix`, `dane`, or nothing.
    pub fn set_tls_protocol(&mut self, protocol: &str, verified_by: &str) {
        self.tls_protocol = protocol.to_owned();
        if !verified_by.is_empty() {
            self.tls_protocol.push('\n');
            self.tls_protocol.push_str(verified_by);
        }
    }

    /// The protocol's name and what vouched for the peer.
    pub fn tls_protocol(&self) -> (&str, &str) {
        self.tls_protocol.split_once('\n').unwrap_or((&self.tls_protocol, ""))
    }

    /// `subject` is the subject name of the peer's certificate, in parts.
    pub fn set_tls_cipher(&mut self, cipher: &str, subject: &[String]) {
        self.tls_cipher = cipher.to_owned();
        for part in subject {
            self.tls_cipher.push('\n');
            self.tls_cipher.push_str(&part.replace('\n', " "));
        }
    }

    /// The cipher's name and the parts of the subject name of the peer's certificate.
    pub fn tls_cipher(&self) -> (&str, impl Iterator<Item = &str> + Clone) {
        let mut lines = self.tls_cipher.split('\n');
        (lines.next().unwrap_or_default(), lines)
    }
}

impl ArchivedEnvelope {
    pub fn dsn(&self) -> DsnParameters {
        DsnParameters::parse(&self.reception_protocol)
    }

    pub fn reception_protocol(&self) -> &str {
        first_line(&self.reception_protocol)
    }

    /// An owned copy.
    pub fn to_envelope(&self) -> Envelope {
        rkyv::deserialize::<Envelope, Failure>(self).expect("strings and numbers are copied without fail")
    }
}

impl ArchivedOutcome {
    /// An owned copy.
    pub(crate) fn to_outcome(&self) -> Outcome {
        rkyv::deserialize::<Outcome, Failure>(self).expect("strings and numbers are copied without fail")
    }
}

impl ArchivedCopiedState {
    /// An owned copy.
    pub(crate) fn to_state(&self) -> CopiedState {
        rkyv::deserialize::<CopiedState, Failure>(self).expect("strings and numbers are copied without fail")
    }
}

/// A recipient's fate. All but `Deferred` are final: exactly one of them per recipient.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[rkyv(derive(Debug, Clone, Copy, PartialEq, Eq))]
pub enum Fate {
    Deferred { due_ms: u64 },
    Delivered,
    Bounced,
    Expired,
    AdminBounced,
}

impl Fate {
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Deferred { .. })
    }
}

/// A peer's reply, or ours in its place.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[rkyv(derive(Debug))]
pub struct Answer {
    /// 0: there is none; see [`RecipientResult::is_intent`].
    pub code: u16,
    /// RFC 3463 class, subject, detail.
    pub enhanced: Option<(u8, u16, u16)>,
    /// The text without codes, lines joined by one space.
    pub text: String,
    /// The command that was answered, as written on the wire without its line ending; empty where there was none.
    pub command: String,
}

const SEQUENCE_BITS: u32 = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dsn_parameters_come_out_as_they_went_in() {
        let parameters = DsnParameters {
            mail: "RET=HDRS ENVID=a+2Bb".to_owned(),
            recipients: vec![(0, "NOTIFY=NEVER".to_owned()), (700, "NOTIFY=DELAY ORCPT=rfc822;a@b".to_owned())],
        };
        let of_recipients = DsnParameters { mail: String::new(), ..parameters.clone() };
        for parameters in [parameters, of_recipients, DsnParameters::default()] {
            let mut envelope = Envelope { reception_protocol: "ESMTP".to_owned(), ..Envelope::default() };
            envelope.set_dsn(&parameters);
            assert_eq!((envelope.dsn(), envelope.reception_protocol()), (parameters.clone(), "ESMTP"));
            let bytes = rkyv::to_bytes::<Failure>(&envelope).expect("it is serialised");
            let archived = rkyv::access::<ArchivedEnvelope, Failure>(&bytes).expect("it is well formed");
            assert_eq!((archived.dsn(), archived.reception_protocol()), (parameters, "ESMTP"));
        }
    }

    /// A disk may say anything.
    #[test]
    fn what_is_no_parameter_line_is_passed_over() {
        let parse = DsnParameters::parse;
        assert_eq!(parse(""), DsnParameters::default());
        assert_eq!(parse("ESMTP\n\nx\nx y\n-1 z\n2 w").recipients, [(2, "w".to_owned())]);
    }
}
