//! The nouns of one attempt: the transaction that a client is given, the result it gives back, the stages between, and
//! the envelope as this peer can be sent it.
//!
//! Addresses are ours: accepted once and kept in the spool. They are checked again before they go into a command,
//! because what is written there decides whose mail goes to whom.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::Duration;

use memchr::memmem;
use postrider_spool::record::DsnParameters;

use crate::config::{Chunking, EightBit, Timeouts};
use crate::deliver::content::Content;
use crate::deliver::extension::Extensions;
use crate::deliver::verdict::{RecipientVerdict, Refusal};
use crate::mail::dsn::is_parameters;

/// One message to some of its recipients, all at one domain.
#[derive(Debug, Clone)]
pub struct Transaction<C> {
    /// Comes back in the result; means nothing here.
    pub ticket: u64,
    /// Without angle brackets; empty is the null reverse path.
    pub reverse_path: Arc<str>,
    /// Index in the message's envelope, and address; at least one.
    pub recipients: Arc<[(u32, String)]>,
    pub content: C,
    /// Octets of the content, before dot-stuffing.
    pub size: u64,
    /// The content has octets above 127.
    pub eight_bit: bool,
    /// An address or a header field is not ASCII.
    pub smtputf8: bool,
    /// A line of the content begins with a dot.
    pub dot_lines: bool,
    /// What the sender asked for by RFC 3461; sent to peers that offer DSN.
    pub dsn: DsnParameters,
}

/// What became of a [`Transaction`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionResult {
    pub ticket: u64,
    /// Every recipient of the transaction, exactly once, in its order.
    pub results: Vec<(u32, RecipientVerdict)>,
    /// MAIL went out, in part at least.
    pub mail_written: bool,
    /// Recipients for whom the content's last octets were given to the connection, and who are sent it again when what
    /// became of them is lost.
    pub sent_recipients: u32,
    pub irregularity: Option<Irregularity>,
}

/// Something went wrong between transactions on one connection: fewer are put in flight at this site for a day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irregularity {
    ForeignEnvelope,
    RecipientAcceptedWithoutMail,
    ResetRefused,
    /// A whole transaction in flight met a 503.
    OutOfStep,
    /// The peer offers CHUNKING, and refused BDAT as a command.
    ChunkRefused,
    /// The connection was lost with whole transactions in flight.
    LostInFlight,
}

impl Irregularity {
    /// The peer confused its transactions: an error for the operator's log.
    pub fn is_confusion(self) -> bool {
        match self {
            Self::ForeignEnvelope | Self::RecipientAcceptedWithoutMail | Self::ResetRefused => true,
            Self::OutOfStep | Self::ChunkRefused | Self::LostInFlight => false,
        }
    }

    /// What is left of `chunking` at its site.
    pub fn leaves(self) -> Chunking {
        match self {
            Self::OutOfStep | Self::LostInFlight => Chunking::On,
            Self::ChunkRefused | Self::ForeignEnvelope | Self::RecipientAcceptedWithoutMail | Self::ResetRefused => {
                Chunking::Off
            }
        }
    }
}

impl fmt::Display for Irregularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ForeignEnvelope => {
                "the peer took a message whose MAIL it had not accepted: it may have left under another reverse path"
            }
            Self::RecipientAcceptedWithoutMail => {
                "the peer refused MAIL but accepted a recipient; the content was kept back and the connection closed"
            }
            Self::ResetRefused => "the peer refused RSET; the connection was closed before the next transaction",
            Self::OutOfStep => "the peer answered 503 to a transaction in flight",
            Self::ChunkRefused => "the peer offers CHUNKING but refused BDAT: its mail goes by DATA",
            Self::LostInFlight => "the connection was lost with transactions in flight",
        })
    }
}

/// Where a session is. What differs by stage stands in one table, `Stage::row`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    Connect,
    Banner,
    Ehlo,
    Helo,
    StartTls,
    Handshake,
    Auth,
    Idle,
    Reset,
    Mail,
    Recipient,
    Data,
    Content,
    Final,
    Quit,
}

impl Stage {
    /// For metrics.
    pub fn label(self) -> &'static str {
        self.row().label
    }

    /// How long the peer may take (RFC 5321 §4.5.3.2), `None` for ever.
    pub fn timeout(self, timeouts: &Timeouts) -> Option<Duration> {
        (self.row().timeout)(timeouts)
    }

    pub fn is_tls(self) -> bool {
        matches!(self, Self::StartTls | Self::Handshake)
    }

    fn row(self) -> StageRow {
        let row = |label, timeout, doing| StageRow { label, timeout, doing };
        match self {
            Self::Connect => row("connect", |t| Some(t.connect), "connecting"),
            Self::Banner => row("banner", |t| Some(t.banner), "waiting for the peer's greeting"),
            Self::Ehlo => row("ehlo", |t| Some(t.ehlo), "waiting for the reply to EHLO"),
            Self::Helo => row("helo", |t| Some(t.ehlo), "waiting for the reply to HELO"),
            Self::StartTls => row("starttls", |t| Some(t.ehlo), "waiting for the reply to STARTTLS"),
            Self::Handshake => row("tls_handshake", |t| Some(t.ehlo), "during the TLS handshake"),
            Self::Auth => row("auth", |t| Some(t.mail), "during AUTH"),
            Self::Idle => row("idle", |_| None, "before the first message"),
            Self::Reset => row("rset", |t| Some(t.mail), "waiting for the reply to RSET"),
            Self::Mail => row("mail", |t| Some(t.mail), "waiting for the reply to MAIL"),
            Self::Recipient => row("rcpt", |t| Some(t.rcpt), "waiting for the reply to RCPT"),
            Self::Data => row("data", |t| Some(t.data), "waiting for the reply to DATA"),
            Self::Content => row("content", |t| Some(t.data_block), "sending the message content"),
            Self::Final => row(
                "final",
                |t| Some(t.data_end),
                "waiting for the reply to the content; the peer may have taken the message, which may arrive twice",
            ),
            Self::Quit => row("quit", |t| Some(t.quit), "waiting for the reply to QUIT"),
        }
    }
}

/// What differs by stage.
struct StageRow {
    /// For metrics.
    label: &'static str,
    timeout: fn(&Timeouts) -> Option<Duration>,
    /// What an operator reads behind "connection lost" or "timed out after 300 s".
    doing: &'static str,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().doing)
    }
}

/// A transaction's envelope as one peer is sent it.
#[derive(Debug)]
pub(crate) struct WireEnvelope {
    /// `MAIL FROM:<…>` with its parameters, without the line ending.
    pub(crate) mail_command: String,
    /// In the transaction's order: `RCPT TO:<…>` with its parameters, without the line ending, or our refusal.
    pub(crate) recipient_commands: Vec<Result<String, Refusal>>,
}

/// Fits a transaction's envelope to what the peer offers.
///
/// # Errors
/// The message can't be sent to this peer at all; the refusal is every recipient's.
pub(crate) fn fit<C: Content>(
    transaction: &Transaction<C>,
    offered: &Extensions,
    eight_bit: EightBit,
) -> Result<WireEnvelope, Refusal> {
    if offered.size_max.is_some_and(|octets_max| transaction.size > octets_max) {
        return Err(Refusal::TooLarge);
    }
    if transaction.eight_bit && !offered.eight_bit_mime && eight_bit == EightBit::Fail {
        return Err(Refusal::EightBit);
    }
    if !is_writable(&transaction.reverse_path) {
        return Err(Refusal::BadReversePath);
    }
    let reverse_path = wire_path(&transaction.reverse_path, offered).ok_or(Refusal::AddressNotAscii)?;
    if transaction.smtputf8 && !offered.smtp_utf8 && !header_is_ascii(&transaction.content) {
        return Err(Refusal::HeaderNotAscii);
    }
    // RFC 6531 §3.4: the parameter is needed when an address or a header field is not ASCII.
    let mut utf8 = transaction.smtputf8 || !reverse_path.is_ascii();
    let mut accepted = 0;
    let recipients = transaction.recipients.iter().map(|(index, address)| {
        let path = wire_recipient(address, offered)?;
        accepted += 1;
        if offered.recipients_max.is_some_and(|count_max| accepted > count_max) {
            return Err(Refusal::BeyondRecipientsMax);
        }
        utf8 |= !path.is_ascii();
        let parameters = recipient_parameters(&transaction.dsn, *index, offered);
        Ok(["RCPT TO:<", &path, ">", &parameters].concat())
    });
    let recipient_commands = recipients.collect();
    let mut mail_command = String::with_capacity(reverse_path.len() + MAIL_OCTETS_TYPICAL);
    for part in ["MAIL FROM:<", &reverse_path, ">"] {
        mail_command.push_str(part);
    }
    if offered.size {
        // To a string nothing fails to be written.
        let _ = write!(mail_command, " SIZE={}", transaction.size);
    }
    if transaction.eight_bit && offered.eight_bit_mime {
        mail_command.push_str(" BODY=8BITMIME");
    }
    if utf8 && offered.smtp_utf8 {
        mail_command.push_str(" SMTPUTF8");
    }
    if offered.dsn && !transaction.dsn.mail.is_empty() && is_parameters(&transaction.dsn.mail) {
        mail_command.push_str(&format!(" {}", transaction.dsn.mail));
    }
    Ok(WireEnvelope { mail_command, recipient_commands })
}

/// What stands behind the path in RCPT, with the space before it; empty where there is nothing, or the peer offers no
/// DSN.
fn recipient_parameters(dsn: &DsnParameters, index: u32, offered: &Extensions) -> String {
    let asked = dsn.recipients.iter().find(|(known, words)| *known == index && is_parameters(words));
    asked.filter(|_| offered.dsn).map(|(_, words)| format!(" {words}")).unwrap_or_default()
}

fn wire_recipient<'a>(address: &'a str, offered: &Extensions) -> Result<Cow<'a, str>, Refusal> {
    if address.is_empty() || !is_writable(address) {
        return Err(Refusal::BadRecipient);
    }
    wire_path(address, offered).ok_or(Refusal::AddressNotAscii)
}

/// The address as this peer may be sent it; `None` where it would need SMTPUTF8.
///
/// A domain that is not ASCII has an ASCII form (RFC 5890 §2.3.2.1), a local part has not (RFC 6531 §3.2).
fn wire_path<'a>(address: &'a str, offered: &Extensions) -> Option<Cow<'a, str>> {
    if address.is_ascii() || offered.smtp_utf8 {
        return Some(Cow::Borrowed(address));
    }
    let (local_part, domain) = address.rsplit_once('@')?;
    if !local_part.is_ascii() {
        return None;
    }
    let domain = idna::domain_to_ascii(domain).ok()?;
    Some(Cow::Owned(format!("{local_part}@{domain}")))
}

/// Nothing in it can end the path or the command: control characters, and `<` or `>` outside a quoted local part.
fn is_writable(address: &str) -> bool {
    // What nearly all are made of.
    let is_plain = |octet: u8| octet.is_ascii_graphic() && !matches!(octet, b'"' | b'\\' | b'<' | b'>');
    if address.bytes().all(is_plain) {
        return true;
    }
    let mut quoted = false;
    let mut escaped = false;
    for character in address.chars() {
        match character {
            _ if character.is_control() => return false,
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '<' | '>' | ' ' if !quoted => return false,
            _ => {}
        }
    }
    !quoted
}

/// Whether all octets up to the empty line are ASCII.
fn header_is_ascii<C: Content>(content: &C) -> bool {
    let (prefix, body) = (content.prefix_piece(), content.body_piece());
    let body = body.as_ref();
    let end = if body.starts_with(b"\r\n") { 0 } else { memmem::find(body, b"\r\n\r\n").unwrap_or(body.len()) };
    prefix.as_ref().is_ascii() && body[..end].is_ascii()
}

/// What stands around the path in MAIL.
const MAIL_OCTETS_TYPICAL: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deliver::verdict::{Fate, refuse};

    struct Text(&'static str);

    impl Content for Text {
        type Piece = &'static str;
        fn prefix_piece(&self) -> &'static str {
            "Received: x\r\n"
        }
        fn body_piece(&self) -> &'static str {
            self.0
        }
    }

    fn transaction(reverse_path: &str, recipients: &[&str]) -> Transaction<Text> {
        let recipients = (0..).zip(recipients).map(|(index, address)| (index, (*address).to_owned())).collect();
        Transaction {
            ticket: 1,
            reverse_path: reverse_path.into(),
            recipients,
            content: Text("Subject: x\r\n\r\nbody"),
            size: 100,
            eight_bit: false,
            smtputf8: false,
            dot_lines: false,
            dsn: DsnParameters::default(),
        }
    }

    fn everything() -> Extensions {
        Extensions { size: true, size_max: Some(1000), eight_bit_mime: true, smtp_utf8: true, ..Extensions::default() }
    }

    fn commands(envelope: &WireEnvelope) -> Vec<Result<&str, Refusal>> {
        envelope.recipient_commands.iter().map(|command| command.as_deref().map_err(|&refusal| refusal)).collect()
    }

    #[test]
    fn parameters_are_sent_where_offered_and_needed() {
        let plain = transaction("a@example.org", &["b@example.net"]);
        assert_eq!(
            fit(&plain, &everything(), EightBit::Fail).expect("fits").mail_command,
            "MAIL FROM:<a@example.org> SIZE=100"
        );
        assert_eq!(
            fit(&plain, &Extensions::default(), EightBit::Fail).expect("fits").mail_command,
            "MAIL FROM:<a@example.org>"
        );
        let eight_bit = Transaction { eight_bit: true, smtputf8: true, ..transaction("", &["b@example.net"]) };
        let command = fit(&eight_bit, &everything(), EightBit::Fail).expect("fits").mail_command;
        assert_eq!(command, "MAIL FROM:<> SIZE=100 BODY=8BITMIME SMTPUTF8");
    }

    #[test]
    fn what_the_peer_cannot_take_is_not_sent() {
        let refusal =
            |t: &Transaction<Text>, offered: &Extensions| fit(t, offered, EightBit::Fail).expect_err("refused");
        let none = Extensions::default();
        // RFC 1870 §6.1: exactly the limit still fits.
        let large = Transaction { size: 1001, ..transaction("", &["b@c"]) };
        assert_eq!(refusal(&large, &everything()), Refusal::TooLarge);
        assert!(fit(&Transaction { size: 1000, ..large }, &everything(), EightBit::Fail).is_ok());
        let eight_bit = Transaction { eight_bit: true, ..transaction("", &["b@c"]) };
        assert_eq!(refusal(&eight_bit, &none), Refusal::EightBit);
        assert_eq!(refusal(&transaction("ä@c", &["b@c"]), &none), Refusal::AddressNotAscii);
        let sent = fit(&eight_bit, &none, EightBit::Send).expect("as it is");
        assert_eq!(sent.mail_command, "MAIL FROM:<>", "a parameter that was not offered is not sent");
        let header = Transaction { content: Text("Subject: ä\r\n\r\n"), smtputf8: true, ..transaction("", &["b@c"]) };
        assert_eq!(refusal(&header, &none), Refusal::HeaderNotAscii);
        // Only the header counts, not the body.
        let body = Transaction { content: Text("Subject: a\r\n\r\nä\r\n\r\n"), ..header };
        assert!(fit(&body, &none, EightBit::Fail).is_ok());
        let no_header = Transaction { content: Text("\r\nä\r\n\r\n"), ..body };
        assert!(fit(&no_header, &none, EightBit::Fail).is_ok());
    }

    #[test]
    fn a_domain_goes_as_a_label_but_a_local_part_cannot() {
        let recipients = ["b@bücher.example", "ü@example.net", "c@example.net"];
        let envelope =
            fit(&transaction("a@straße.example", &recipients), &Extensions::default(), EightBit::Fail).expect("fits");
        assert_eq!(envelope.mail_command, "MAIL FROM:<a@xn--strae-oqa.example>");
        let expected =
            [Ok("RCPT TO:<b@xn--bcher-kva.example>"), Err(Refusal::AddressNotAscii), Ok("RCPT TO:<c@example.net>")];
        assert_eq!(commands(&envelope), expected);
        let envelope = fit(&transaction("a@b", &recipients), &everything(), EightBit::Fail).expect("fits");
        assert_eq!(commands(&envelope)[..2], [Ok("RCPT TO:<b@bücher.example>"), Ok("RCPT TO:<ü@example.net>")]);
        assert_eq!(envelope.mail_command, "MAIL FROM:<a@b> SIZE=100 SMTPUTF8");
    }

    #[test]
    fn an_address_cannot_smuggle_a_command() {
        for address in ["a@b>\r\nRCPT TO:<c@d", "a@b> NOTIFY=NEVER", "a@b\0", "a\n@b", "<a@b>", "\"a@b", "", "a b@c"] {
            let envelope = fit(&transaction("", &[address]), &everything(), EightBit::Fail)
                .expect("only the recipient is refused");
            assert_eq!(commands(&envelope), [Err(Refusal::BadRecipient)], "{address:?}");
        }
        assert_eq!(refuse(Refusal::BadRecipient).fate, Fate::Bounce);
        for address in ["\"a > b\"@c", "\"a\\\"b\"@c", "a=b+c@[127.0.0.1]"] {
            let envelope = fit(&transaction("", &[address]), &everything(), EightBit::Fail).expect("fits");
            assert_eq!(commands(&envelope), [Ok(format!("RCPT TO:<{address}>").as_str())]);
        }
        assert_eq!(
            fit(&transaction("a\r\n", &["b@c"]), &everything(), EightBit::Fail).expect_err("refused"),
            Refusal::BadReversePath
        );
    }

    #[test]
    fn rcptmax_cuts_the_transaction_rfc_9422() {
        let offered = Extensions { recipients_max: Some(2), ..Extensions::default() };
        let envelope = fit(&transaction("", &["a@x", "b@x", "c@x", "d@x"]), &offered, EightBit::Fail).expect("fits");
        let beyond = Err(Refusal::BeyondRecipientsMax);
        assert_eq!(commands(&envelope), [Ok("RCPT TO:<a@x>"), Ok("RCPT TO:<b@x>"), beyond, beyond]);
    }

    #[test]
    fn the_stage_after_the_final_dot_warns_of_duplicates() {
        assert!(Stage::Final.to_string().contains("may arrive twice"));
        let timeouts = Timeouts::default();
        let minutes = |stage: Stage| stage.timeout(&timeouts).map(|t| t.as_secs() / 60);
        // RFC 5321 §4.5.3.2.1–6.
        let stages = [Stage::Banner, Stage::Mail, Stage::Recipient, Stage::Data, Stage::Content, Stage::Final];
        assert_eq!(stages.map(minutes), [5, 5, 5, 2, 3, 10].map(Some));
    }
}
