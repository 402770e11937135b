//! One SMTP command line → what it asks for (RFC 5321 §4.1.1 and the extensions that EHLO offers).
//!
//! A line is split into verb and arguments first; the arguments of MAIL, RCPT and BDAT have parsers of their own, whose
//! errors are the replies. White space is taken as leniently as clients write it; everything else by the book.

use super::Refusal;
use crate::mail::address::{AddressError, Path, PathError};

/// What a line begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Ehlo,
    Helo,
    Mail,
    Rcpt,
    Data,
    Bdat,
    Rset,
    Noop,
    Quit,
    Vrfy,
    Help,
    StartTls,
    /// Known, and not offered here.
    NotAvailable,
    /// The first line of an HTTP request or header: someone else's browser talks to us.
    Http,
    Unknown,
}

/// Splits a line (without its CRLF).
pub fn split(line: &str) -> (Verb, &str) {
    let end = line.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(line.len());
    let (word, rest) = line.split_at(end);
    let separated = rest.is_empty() || rest.starts_with([' ', '\t']);
    let known = VERBS.iter().find(|(name, _)| name.eq_ignore_ascii_case(word));
    let verb = match known {
        Some((_, verb)) if separated => *verb,
        _ if HTTP_FIELDS.iter().any(|name| line.get(..name.len()).is_some_and(|s| s.eq_ignore_ascii_case(name))) => {
            Verb::Http
        }
        _ => Verb::Unknown,
    };
    (verb, rest.trim_matches([' ', '\t']))
}

/// `MAIL FROM:<path> [parameters]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// Empty: the null reverse path.
    pub reverse_path: String,
    /// RFC 1870.
    pub size: Option<u64>,
    /// RFC 6152: BODY=8BITMIME.
    pub eight_bit: bool,
    /// RFC 6531.
    pub smtputf8: bool,
}

/// `extended`: the client said EHLO, so that it may use parameters.
pub fn parse_mail(arguments: &str, extended: bool) -> Result<Mail, Refusal> {
    let syntax = || Refusal::new(501, (5, 5, 4), "syntax: MAIL FROM:<address> [parameters]");
    let (path, parameters) = parse_path(arguments, "FROM:", syntax, BadAddress::Sender)?;
    let reverse_path = match path {
        Path::Null => String::new(),
        Path::Mailbox(address) => address.into_string(),
        Path::Postmaster => return Err(BadAddress::Sender.refusal(AddressError::NoDomain)),
    };
    let mut mail = Mail { reverse_path, size: None, eight_bit: false, smtputf8: false };
    let mut seen_body = false;
    for parameter in parameters.split_ascii_whitespace() {
        let (name, value) = parameter.split_once('=').map_or((parameter, None), |(name, value)| (name, Some(value)));
        let repeated = match (name.to_ascii_uppercase().as_str(), value) {
            _ if !extended => return Err(unknown_parameter(name)),
            ("SIZE", Some(value)) => mail.size.replace(parse_size(value)?).is_some(),
            ("BODY", Some(value)) => {
                mail.eight_bit = parse_body(value)?;
                std::mem::replace(&mut seen_body, true)
            }
            ("SMTPUTF8", None) => std::mem::replace(&mut mail.smtputf8, true),
            ("SIZE" | "BODY" | "SMTPUTF8", _) => {
                return Err(Refusal::new(501, (5, 5, 4), format!("malformed parameter {name}")));
            }
            _ => return Err(unknown_parameter(name)),
        };
        if repeated {
            return Err(Refusal::new(501, (5, 5, 4), format!("repeated parameter {name}")));
        }
    }
    if !mail.reverse_path.is_ascii() && !mail.smtputf8 {
        return Err(needs_smtputf8());
    }
    Ok(mail)
}

/// `RCPT TO:<path>`. A `<Postmaster>` without a domain is ours: `hostname` (RFC 5321 §4.1.1.3).
pub fn parse_rcpt(arguments: &str, hostname: &str, smtputf8: bool) -> Result<String, Refusal> {
    let syntax = || Refusal::new(501, (5, 5, 4), "syntax: RCPT TO:<address>");
    let (path, parameters) = parse_path(arguments, "TO:", syntax, BadAddress::Recipient)?;
    if let Some(parameter) = parameters.split_ascii_whitespace().next() {
        return Err(unknown_parameter(parameter.split_once('=').map_or(parameter, |(name, _)| name)));
    }
    let recipient = match path {
        Path::Null => return Err(BadAddress::Recipient.refusal(AddressError::Empty)),
        Path::Postmaster => format!("postmaster@{}", hostname.to_lowercase()),
        Path::Mailbox(address) => address.into_string(),
    };
    if !recipient.is_ascii() && !smtputf8 {
        return Err(needs_smtputf8());
    }
    Ok(recipient)
}

/// `BDAT size [LAST]` (RFC 3030 §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bdat {
    pub size: u64,
    pub last: bool,
}

/// `None`: nobody knows how many octets follow.
pub fn parse_bdat(arguments: &str) -> Option<Bdat> {
    let mut words = arguments.split_ascii_whitespace();
    let size = parse_number(words.next()?)?;
    let last = match words.next() {
        None => false,
        Some(word) if word.eq_ignore_ascii_case("LAST") => true,
        Some(_) => return None,
    };
    words.next().is_none().then_some(Bdat { size, last })
}

/// `keyword<path>` and what follows it.
fn parse_path<'a>(
    arguments: &'a str,
    keyword: &str,
    syntax: impl Fn() -> Refusal,
    which: BadAddress,
) -> Result<(Path, &'a str), Refusal> {
    let given = arguments.get(..keyword.len()).filter(|given| given.eq_ignore_ascii_case(keyword));
    if given.is_none() {
        return Err(syntax());
    }
    // Many clients put a space here, which the grammar does not have.
    let path = arguments[keyword.len()..].trim_start_matches(' ');
    let (path, rest) = Path::parse(path).map_err(|error| match error {
        PathError::Brackets => syntax(),
        PathError::Address(error) => which.refusal(error),
    })?;
    if rest.is_empty() || rest.starts_with([' ', '\t']) { Ok((path, rest)) } else { Err(syntax()) }
}

/// Whose address is bad decides the enhanced code (RFC 3463 §3.2).
#[derive(Clone, Copy)]
enum BadAddress {
    Sender,
    Recipient,
}

impl BadAddress {
    fn refusal(self, error: AddressError) -> Refusal {
        let detail = match self {
            Self::Sender => 7,
            Self::Recipient => 3,
        };
        Refusal::new(553, (5, 1, detail), error.to_string())
    }
}

/// RFC 6531 §3.5.
fn needs_smtputf8() -> Refusal {
    Refusal::new(553, (5, 6, 7), "an address that is not ASCII needs the SMTPUTF8 parameter of MAIL")
}

/// RFC 5321 §4.1.1.11.
fn unknown_parameter(name: &str) -> Refusal {
    let text = match name.to_ascii_uppercase().as_str() {
        "RET" | "ENVID" | "NOTIFY" | "ORCPT" => format!("{name}: DSN is not available"),
        "AUTH" => format!("{name}: AUTH is not available"),
        _ => format!("unknown parameter {name}"),
    };
    Refusal::new(555, (5, 5, 4), text)
}

fn parse_size(value: &str) -> Result<u64, Refusal> {
    parse_number(value).ok_or_else(|| Refusal::new(501, (5, 5, 4), "SIZE must be a number of octets"))
}

fn parse_body(value: &str) -> Result<bool, Refusal> {
    if value.eq_ignore_ascii_case("8BITMIME") {
        Ok(true)
    } else if value.eq_ignore_ascii_case("7BIT") {
        Ok(false)
    } else {
        Err(Refusal::new(501, (5, 5, 4), "BODY must be 7BIT or 8BITMIME"))
    }
}

/// Up to 20 digits (RFC 1870 §5), and no sign.
fn parse_number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.len() <= 20 && text.bytes().all(|b| b.is_ascii_digit());
    // 20 digits may exceed 2^64: larger than any limit either way.
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

const VERBS: &[(&str, Verb)] = &[
    ("RCPT", Verb::Rcpt),
    ("MAIL", Verb::Mail),
    ("DATA", Verb::Data),
    ("BDAT", Verb::Bdat),
    ("EHLO", Verb::Ehlo),
    ("HELO", Verb::Helo),
    ("QUIT", Verb::Quit),
    ("RSET", Verb::Rset),
    ("NOOP", Verb::Noop),
    ("STARTTLS", Verb::StartTls),
    ("VRFY", Verb::Vrfy),
    ("HELP", Verb::Help),
    ("AUTH", Verb::NotAvailable),
    ("EXPN", Verb::NotAvailable),
    ("ETRN", Verb::NotAvailable),
    ("TURN", Verb::NotAvailable),
    ("BURL", Verb::NotAvailable),
    ("SEND", Verb::NotAvailable),
    ("SOML", Verb::NotAvailable),
    ("SAML", Verb::NotAvailable),
    ("GET", Verb::Http),
    ("POST", Verb::Http),
    ("PUT", Verb::Http),
    ("HEAD", Verb::Http),
    ("OPTIONS", Verb::Http),
    ("CONNECT", Verb::Http),
];

const HTTP_FIELDS: &[&str] = &["Host:", "User-Agent:", "Content-Type:", "Content-Length:"];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn verbs() {
        assert_eq!(split("ehlo  a.example "), (Verb::Ehlo, "a.example"));
        assert_eq!(split("MAIL FROM:<>"), (Verb::Mail, "FROM:<>"));
        assert_eq!(split("DATA"), (Verb::Data, ""));
        assert_eq!(split("DATA:"), (Verb::Unknown, ":"));
        assert_eq!(split(""), (Verb::Unknown, ""));
        assert_eq!(split("AUTH PLAIN AAA="), (Verb::NotAvailable, "PLAIN AAA="));
        assert_eq!(split("POST / HTTP/1.1").0, Verb::Http);
        assert_eq!(split("host: example.com").0, Verb::Http);
        assert_eq!(split("\u{e9}HLO a").0, Verb::Unknown);
    }

    #[test]
    fn mail() {
        let mail = parse_mail("from: <A@B.example>  body=8bitmime SIZE=12 SMTPUTF8", true).unwrap();
        assert_eq!(mail, Mail { reverse_path: "A@b.example".into(), size: Some(12), eight_bit: true, smtputf8: true });
        assert_eq!(parse_mail("FROM:<>", false).unwrap().reverse_path, "");
        assert_eq!(parse_mail("FROM:<> SIZE=99999999999999999999", true).unwrap().size, Some(u64::MAX));
        for (arguments, reply) in [
            ("", "501 5.5.4 syntax: MAIL FROM:<address> [parameters]"),
            ("FROM:a@b.example", "501 5.5.4 syntax: MAIL FROM:<address> [parameters]"),
            ("FROM:<a@b.example>SIZE=1", "501 5.5.4 syntax: MAIL FROM:<address> [parameters]"),
            ("FROM:<a b@c.example>", "553 5.1.7 the local part is malformed"),
            ("FROM:<a>", "553 5.1.7 the address has no domain"),
            ("FROM:<postmaster>", "553 5.1.7 the address has no domain"),
            ("FROM:<> SIZE=-1", "501 5.5.4 SIZE must be a number of octets"),
            ("FROM:<> SIZE", "501 5.5.4 malformed parameter SIZE"),
            ("FROM:<> SIZE=1 size=1", "501 5.5.4 repeated parameter size"),
            ("FROM:<> BODY=BINARYMIME", "501 5.5.4 BODY must be 7BIT or 8BITMIME"),
            ("FROM:<> BODY=7BIT BODY=7BIT", "501 5.5.4 repeated parameter BODY"),
            ("FROM:<> SMTPUTF8=1", "501 5.5.4 malformed parameter SMTPUTF8"),
            ("FROM:<> RET=FULL", "555 5.5.4 RET: DSN is not available"),
            ("FROM:<> FOO=BAR", "555 5.5.4 unknown parameter FOO"),
            (
                "FROM:<j\u{fc}rgen@b.example>",
                "553 5.6.7 an address that is not ASCII needs the SMTPUTF8 parameter of MAIL",
            ),
        ] {
            assert_eq!(parse_mail(arguments, true).unwrap_err().to_string(), reply, "{arguments}");
        }
        // RFC 5321 §4.1.1.2: parameters need EHLO.
        assert_eq!(parse_mail("FROM:<> SIZE=1", false).unwrap_err().code(), 555);
    }

    #[test]
    fn rcpt() {
        let rcpt = |arguments| parse_rcpt(arguments, "MTA.example", false).map_err(|refusal| refusal.to_string());
        assert_eq!(rcpt("TO:<Bob@Example.COM>"), Ok("Bob@example.com".into()));
        assert_eq!(rcpt("to: <POSTMASTER>"), Ok("postmaster@mta.example".into()));
        assert_eq!(rcpt("TO:<>"), Err("553 5.1.3 the address is empty".into()));
        assert_eq!(rcpt("TO:<bob>"), Err("553 5.1.3 the address has no domain".into()));
        assert_eq!(rcpt("TO:<a@b.example> NOTIFY=NEVER"), Err("555 5.5.4 NOTIFY: DSN is not available".into()));
        assert_eq!(rcpt("<a@b.example>"), Err("501 5.5.4 syntax: RCPT TO:<address>".into()));
        assert!(parse_rcpt("TO:<a@\u{fc}.example>", "", false).is_err());
        assert!(parse_rcpt("TO:<a@\u{fc}.example>", "", true).is_ok());
    }

    #[test]
    fn bdat() {
        assert_eq!(parse_bdat("10"), Some(Bdat { size: 10, last: false }));
        assert_eq!(parse_bdat("0 last"), Some(Bdat { size: 0, last: true }));
        for bad in ["", "x", "-1", "+1", "1 LAS", "1 LAST 2", "LAST"] {
            assert_eq!(parse_bdat(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(
            line in "(MAIL FROM:|RCPT TO:|BDAT |mail from)?[<> @\":=A-Za-z0-9\u{e9}.,\\[\\]\\\\-]{0,32}|\\PC*",
        ) {
            let (_, arguments) = split(&line);
            let _ = parse_mail(arguments, true);
            let _ = parse_rcpt(arguments, "h", true);
            let _ = parse_bdat(arguments);
        }
    }
}
