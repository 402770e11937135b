//! What a peer offers in its reply to EHLO or LHLO (RFC 5321 §4.1.1.1).

use std::fmt;

use crate::mail::reply::Reply;

/// The service extensions that we know. After STARTTLS what was offered in the clear is forgotten (RFC 3207 §4.2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extensions {
    /// RFC 2920.
    pub pipelining: bool,
    /// RFC 1870: the largest message in octets; `None` when not told, or told as 0, which is "no fixed maximum".
    pub size_max: Option<u64>,
    /// RFC 1870 is offered at all.
    pub size: bool,
    /// RFC 6152.
    pub eight_bit_mime: bool,
    /// RFC 6531.
    pub smtp_utf8: bool,
    /// RFC 2034.
    pub enhanced_status_codes: bool,
    /// RFC 3207.
    pub start_tls: bool,
    /// RFC 3030.
    pub chunking: bool,
    /// RFC 4954, with these mechanisms.
    pub auth_plain: bool,
    pub auth_login: bool,
    /// RFC 3461.
    pub dsn: bool,
    /// RFC 9422 `LIMITS MAILMAX=n`: transactions of one session.
    pub mails_max: Option<u32>,
    /// RFC 9422 `LIMITS RCPTMAX=n`. RCPTDOMAINMAX bounds nothing: a transaction's recipients are at one domain.
    pub recipients_max: Option<u32>,
}

impl Extensions {
    /// The first line names the host; each further one is a keyword with parameters, in any case.
    pub fn parse(reply: &Reply) -> Self {
        let mut offered = Self::default();
        for line in reply.lines().skip(1) {
            let mut words = line.split_ascii_whitespace();
            let Some(keyword) = words.next() else { continue };
            match keyword.to_ascii_uppercase().as_str() {
                "PIPELINING" => offered.pipelining = true,
                "SIZE" => {
                    offered.size = true;
                    offered.size_max = words.next().and_then(|w| w.parse().ok()).filter(|&octets| octets > 0);
                }
                "8BITMIME" => offered.eight_bit_mime = true,
                "SMTPUTF8" => offered.smtp_utf8 = true,
                "ENHANCEDSTATUSCODES" => offered.enhanced_status_codes = true,
                "STARTTLS" => offered.start_tls = true,
                "CHUNKING" => offered.chunking = true,
                "DSN" => offered.dsn = true,
                // Old servers write AUTH=LOGIN.
                "AUTH" | "AUTH=LOGIN" | "AUTH=PLAIN" => {
                    let first = keyword.split_once('=').map(|(_, mechanism)| mechanism);
                    for mechanism in first.into_iter().chain(words) {
                        offered.auth_plain |= mechanism.eq_ignore_ascii_case("PLAIN");
                        offered.auth_login |= mechanism.eq_ignore_ascii_case("LOGIN");
                    }
                }
                "LIMITS" => {
                    for (name, max) in words.filter_map(limit) {
                        match name.to_ascii_uppercase().as_str() {
                            "MAILMAX" => offered.mails_max = Some(max),
                            "RCPTMAX" => offered.recipients_max = Some(max),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        offered
    }
}

impl fmt::Display for Extensions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = [
            (self.pipelining, "PIPELINING"),
            (self.eight_bit_mime, "8BITMIME"),
            (self.smtp_utf8, "SMTPUTF8"),
            (self.enhanced_status_codes, "ENHANCEDSTATUSCODES"),
            (self.start_tls, "STARTTLS"),
            (self.chunking, "CHUNKING"),
            (self.dsn, "DSN"),
            (self.auth_plain, "AUTH PLAIN"),
            (self.auth_login, "AUTH LOGIN"),
        ];
        let mut words = flags.iter().filter(|(on, _)| *on).map(|(_, word)| (*word).to_owned()).collect::<Vec<_>>();
        if self.size {
            words.push(self.size_max.map_or("SIZE".to_owned(), |octets| format!("SIZE {octets}")));
        }
        words.extend(self.mails_max.map(|count| format!("LIMITS MAILMAX={count}")));
        words.extend(self.recipients_max.map(|count| format!("LIMITS RCPTMAX={count}")));
        f.write_str(&words.join(", "))
    }
}

fn limit(word: &str) -> Option<(&str, u32)> {
    let (name, value) = word.split_once('=')?;
    value.parse().ok().filter(|&max| max > 0).map(|max| (name, max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keywords_are_read_in_any_case_and_order() {
        let reply = Reply::new(
            250,
            "mx.example greets you\nPipelining\nSIZE 1000\n8bitmime\nSTARTTLS\nENHANCEDSTATUSCODES\nCHUNKING\n\
             SMTPUTF8\nDsn\nX-UNKNOWN y\nLIMITS MailMax=10 RCPTDOMAINMAX=1 RCPTMAX=50",
        );
        let offered = Extensions::parse(&reply);
        assert_eq!(
            offered.to_string(),
            "PIPELINING, 8BITMIME, SMTPUTF8, ENHANCEDSTATUSCODES, STARTTLS, CHUNKING, DSN, SIZE 1000, \
             LIMITS MAILMAX=10, LIMITS RCPTMAX=50"
        );
    }

    #[test]
    fn the_greeting_line_is_no_keyword() {
        assert_eq!(Extensions::parse(&Reply::new(250, "PIPELINING")), Extensions::default());
    }

    #[test]
    fn mechanisms_that_we_know_are_remembered_rfc_4954_3() {
        let offered = |text: &str| Extensions::parse(&Reply::new(250, text)).to_string();
        assert_eq!(offered("x\nAUTH CRAM-MD5 login plain"), "AUTH PLAIN, AUTH LOGIN");
        assert_eq!(offered("x\nAUTH CRAM-MD5 XOAUTH2"), "");
        assert_eq!(offered("x\nAUTH=LOGIN PLAIN\nAUTH LOGIN"), "AUTH PLAIN, AUTH LOGIN");
    }

    #[test]
    fn odd_parameters_are_as_none() {
        let offered = Extensions::parse(&Reply::new(250, "x\nSIZE 0\nLIMITS MAILMAX=0 RCPTMAX=0\n\n"));
        assert_eq!(offered, Extensions { size: true, ..Extensions::default() });
        let offered = Extensions::parse(&Reply::new(250, "x\nSIZE lots\nLIMITS MAILMAX=many RCPTMAX"));
        assert_eq!(offered, Extensions { size: true, ..Extensions::default() });
    }
}
