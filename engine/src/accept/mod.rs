//! Stage 1, accept: from a client's octets to a signed message that is ready for the spool.
//!
//! The hand-overs are types: octets → [`Received`] ([`smtp_server`], or the embedding API) → [`Admitted`]
//! ([`admission`]: policy, header work) → signed [`Admitted`] ([`dkim_sign`]). Only the spool's commit turns that into
//! a message id, and only a message id turns into a 250. All of it is free of I/O, clocks and randomness.

use std::fmt;
use std::net::SocketAddr;

use postrider_spool::record::DsnParameters;

use crate::config::ReceivedDetail;
use crate::limits::REFUSAL_TEXT_BYTES_MAX;

pub mod admission;
pub mod dkim_sign;
pub mod smtp_command;
pub mod smtp_data;
pub mod smtp_server;
mod tenant;

pub use admission::{Admitted, Policy, SharedContent};
pub use smtp_server::{Handled, ServerEvent, SessionOptions, SmtpServer};

/// A message as it came in, before any policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Without angle brackets; empty is the null reverse path.
    pub reverse_path: String,
    /// Local part as given, domain in lower case, each once.
    pub recipients: Vec<String>,
    /// Dot-unstuffed; line endings are CRLF, the last one included; no NUL. May be empty.
    pub content: Vec<u8>,
    /// The client said BODY=8BITMIME.
    pub eight_bit_declared: bool,
    /// The client said SMTPUTF8.
    pub smtputf8_declared: bool,
    /// What the client called itself, reduced to characters that a Received field may hold; may be empty.
    pub helo: String,
    /// RFC 3848 and RFC 6531 §4.3 names for SMTP; otherwise `HTTP`, `embedded`.
    pub protocol: &'static str,
    pub client: Option<SocketAddr>,
    pub session_id: u64,
    /// The client may steer by X-Tenant, X-Campaign, X-Virtual-MTA and X-Schedule.
    pub trusted: bool,
    pub received_detail: ReceivedDetail,
    /// What the sender asked for by RFC 3461.
    pub dsn: DsnParameters,
    /// Names and values that an embedding program gave; a bounded name each.
    pub meta: Vec<(String, String)>,
}

impl Received {
    /// What an embedding program gives: it is trusted, and may send any octets.
    pub fn embedded(reverse_path: String, recipients: Vec<String>, content: Vec<u8>) -> Self {
        Self {
            reverse_path,
            recipients,
            content,
            eight_bit_declared: true,
            smtputf8_declared: true,
            helo: String::new(),
            protocol: "embedded",
            client: None,
            session_id: 0,
            trusted: true,
            received_detail: ReceivedDetail::Full,
            dsn: DsnParameters::default(),
            meta: Vec::new(),
        }
    }
}

/// A refusal that a client may see: its text is one line of printable ASCII and tells nothing of our insides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    code: u16,
    enhanced: (u8, u16, u16),
    text: String,
}

impl Refusal {
    /// Characters that don't belong into a reply line are replaced, too long a text is cut.
    pub fn new(code: u16, enhanced: (u8, u16, u16), text: impl AsRef<str>) -> Self {
        assert!((400..600).contains(&code));
        assert!(u16::from(enhanced.0) == code / 100);
        let printable = |c: char| if matches!(c, ' '..='~') { c } else { '?' };
        let text = text.as_ref().chars().take(REFUSAL_TEXT_BYTES_MAX).map(printable).collect();
        Self { code, enhanced, text }
    }

    pub fn code(&self) -> u16 {
        self.code
    }

    /// RFC 3463 class, subject, detail.
    pub fn enhanced(&self) -> (u8, u16, u16) {
        self.enhanced
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// The client may try again.
    pub fn is_temporary(&self) -> bool {
        self.code < 500
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (class, subject, detail) = self.enhanced;
        write!(f, "{} {class}.{subject}.{detail} {}", self.code, self.text)
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_one_printable_line() {
        let refusal = Refusal::new(550, (5, 7, 1), "no\r\n250 ok \u{e9}\0");
        assert_eq!(refusal.to_string(), "550 5.7.1 no??250 ok ??");
        assert_eq!(Refusal::new(451, (4, 3, 0), "x".repeat(9_999)).text().len(), REFUSAL_TEXT_BYTES_MAX);
    }
}
