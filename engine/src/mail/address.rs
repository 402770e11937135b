//! Mailbox addresses as SMTP writes them (RFC 5321 §4.1.2, RFC 6531 §3.3).
//!
//! Stricter than a peer must be only where a reply or a command line could be forged (control characters, spaces
//! outside quotes) or where a domain could never be looked up. Laxer in one thing: dots may stand anywhere in an
//! unquoted local part, because mailboxes such as `a..b@` and `a.@` exist; whether they do is for the peer to say.

use std::borrow::Cow;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::limits::{DOMAIN_BYTES_MAX, DOMAIN_LABEL_BYTES_MAX, LOCAL_PART_BYTES_MAX};

/// A mailbox: local part as given (with its quotes), domain in lower case (an IPv6 literal as `[IPv6:2001:db8::1]`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    text: String,
    at: usize,
}

impl Address {
    /// `text` is all of a mailbox, without angle brackets and source route.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let local_length = local_part_length(text)?;
        let local = &text[..local_length];
        let Some(domain) = text[local_length..].strip_prefix('@') else {
            return Err(if local_length == text.len() { AddressError::NoDomain } else { AddressError::LocalPart });
        };
        check_domain(domain)?;
        let mut address = String::with_capacity(text.len());
        address.push_str(local);
        address.push('@');
        push_canonical_domain(&mut address, domain);
        Ok(Self { text: address, at: local_length })
    }

    pub fn local(&self) -> &str {
        &self.text[..self.at]
    }

    /// A host name, or an address literal with its brackets.
    pub fn domain(&self) -> &str {
        &self.text[self.at + 1..]
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn into_string(self) -> String {
        self.text
    }

    pub fn is_ascii(&self) -> bool {
        self.text.is_ascii()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What is wrong with an address; displayed to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressError {
    Empty,
    NoDomain,
    LocalPart,
    LocalPartTooLong,
    Domain,
    DomainTooLong,
    Literal,
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "the address is empty",
            Self::NoDomain => "the address has no domain",
            Self::LocalPart => "the local part is malformed",
            Self::LocalPartTooLong => "the local part is too long",
            Self::Domain => "the domain is malformed",
            Self::DomainTooLong => "the domain is too long",
            Self::Literal => "the address literal is malformed",
        })
    }
}

impl std::error::Error for AddressError {}

/// The path in a MAIL or RCPT command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    /// `<>`
    Null,
    /// `<Postmaster>`, in any case, which needs no domain (RFC 5321 §4.1.1.3).
    Postmaster,
    Mailbox(Address),
}

impl Path {
    /// Reads `<…>` at the start of `text` and returns what follows it. A source route is dropped (RFC 5321 §4.1.1.3,
    /// appendix C: servers accept it and ignore it).
    pub fn parse(text: &str) -> Result<(Self, &str), PathError> {
        let inner = text.strip_prefix('<').ok_or(PathError::Brackets)?;
        let end = closing_bracket(inner).ok_or(PathError::Brackets)?;
        let (path, rest) = (&inner[..end], &inner[end + 1..]);
        if path.is_empty() {
            return Ok((Self::Null, rest));
        }
        let mailbox = if path.starts_with('@') { strip_source_route(path)? } else { path };
        if mailbox.eq_ignore_ascii_case("postmaster") {
            return Ok((Self::Postmaster, rest));
        }
        let address = Address::parse(mailbox).map_err(PathError::Address)?;
        Ok((Self::Mailbox(address), rest))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathError {
    /// No `<` or no matching `>`.
    Brackets,
    Address(AddressError),
}

/// The domain of an address that was parsed before; empty for the null path.
pub fn domain_of(address: &str) -> &str {
    address.rsplit_once('@').map_or("", |(_, domain)| domain)
}

/// The domain that an address's mail is queued under: [`ascii_domain`] of its own.
pub fn queue_domain(address: &str) -> Cow<'_, str> {
    ascii_domain(domain_of(address))
}

/// A domain in lower case as the configuration and the DNS name it, in ASCII (RFC 5890 §2.3.2.1). One that has no such
/// form stays as it is.
pub fn ascii_domain(domain: &str) -> Cow<'_, str> {
    if domain.is_ascii() {
        return Cow::Borrowed(domain);
    }
    idna::domain_to_ascii(domain).map_or(Cow::Borrowed(domain), Cow::Owned)
}

/// The domain that mail is queued under, where somebody has written it by hand: in any case, in Unicode or not, or with
/// the dot at the end that the DNS has. None: no mail can be for it.
pub fn read_domain(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').filter(|name| is_host_name(name)).unwrap_or(text);
    let mut domain = String::with_capacity(text.len());
    push_canonical_domain(&mut domain, text);
    check_domain(&domain).ok()?;
    Some(ascii_domain(&domain).into_owned())
}

/// An address as it is kept, where somebody has written it by hand: the case of its domain does not matter, that of the
/// local part may (RFC 5321 §2.4).
pub fn canonical_address(text: &str) -> String {
    let Some((local, domain)) = text.rsplit_once('@') else { return text.to_owned() };
    let mut address = format!("{local}@");
    push_canonical_domain(&mut address, domain);
    address
}

/// A host name: letters, digits, hyphens, underscores and non-ASCII letters (RFC 5321 §4.1.2, RFC 6531 §3.3).
///
/// Underscores are no host names by the book, but stand in the DNS and in mail.
pub fn is_host_name(domain: &str) -> bool {
    !domain.is_empty()
        && domain.len() <= DOMAIN_BYTES_MAX
        && domain.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= DOMAIN_LABEL_BYTES_MAX
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_' || is_utf8_letter(c))
        })
}

fn check_domain(domain: &str) -> Result<(), AddressError> {
    if domain.len() > DOMAIN_BYTES_MAX {
        return Err(AddressError::DomainTooLong);
    }
    if let Some(rest) = domain.strip_prefix('[') {
        let literal = rest.strip_suffix(']').ok_or(AddressError::Literal)?;
        return check_literal(literal);
    }
    if is_host_name(domain) { Ok(()) } else { Err(AddressError::Domain) }
}

/// RFC 5321 §4.1.3. General address literals have no registered tag beside IPv6 and lead nowhere.
fn check_literal(literal: &str) -> Result<(), AddressError> {
    let tag = literal.get(..5).filter(|tag| tag.eq_ignore_ascii_case("IPv6:"));
    let well_formed = match tag {
        Some(_) => literal[5..].parse::<Ipv6Addr>().is_ok(),
        None => literal.parse::<Ipv4Addr>().is_ok(),
    };
    if well_formed { Ok(()) } else { Err(AddressError::Literal) }
}

/// How many octets at the start of `text` are a local part.
fn local_part_length(text: &str) -> Result<usize, AddressError> {
    let length = if text.starts_with('"') {
        quoted_length(text).ok_or(AddressError::LocalPart)?
    } else {
        text.find(|c: char| !is_atom_or_dot(c)).unwrap_or(text.len())
    };
    match length {
        0 if text.is_empty() => Err(AddressError::Empty),
        0 => Err(AddressError::LocalPart),
        _ if length > LOCAL_PART_BYTES_MAX => Err(AddressError::LocalPartTooLong),
        _ => Ok(length),
    }
}

/// The length of the quoted string at the start of `text`, quotes included (RFC 5321 §4.1.2: qtextSMTP and
/// quoted-pairSMTP are printable ASCII; RFC 6531 adds the rest of Unicode).
fn quoted_length(text: &str) -> Option<usize> {
    let mut characters = text.char_indices().skip(1);
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some(at + 1),
            '\\' => {
                characters.next().filter(|(_, quoted)| matches!(quoted, ' '..='~'))?;
            }
            ' '..='~' => {}
            _ if is_utf8_letter(c) => {}
            _ => return None,
        }
    }
    None
}

/// Lower case, but for the tag of an IPv6 literal, which everybody writes `IPv6:` (RFC 5321 §4.1.3).
fn push_canonical_domain(address: &mut String, domain: &str) {
    let tag = domain.get(..IPV6_LITERAL.len()).filter(|tag| tag.eq_ignore_ascii_case(IPV6_LITERAL));
    let rest = match tag {
        Some(_) => {
            address.push_str(IPV6_LITERAL);
            &domain[IPV6_LITERAL.len()..]
        }
        None => domain,
    };
    if rest.is_ascii() {
        address.extend(rest.chars().map(|c| c.to_ascii_lowercase()));
    } else {
        address.push_str(&rest.to_lowercase());
    }
}

/// Where the `>` is that closes a path: not one inside a quoted local part.
fn closing_bracket(inner: &str) -> Option<usize> {
    let mut quoted = false;
    let mut escaped = false;
    for (at, byte) in inner.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'>' if !quoted => return Some(at),
            _ => {}
        }
    }
    None
}

/// `@relay,@relay:mailbox` → `mailbox`.
fn strip_source_route(path: &str) -> Result<&str, PathError> {
    let malformed = PathError::Address(AddressError::Domain);
    let mut rest = path;
    loop {
        let hop = rest.strip_prefix('@').ok_or(malformed)?;
        // A colon inside an address literal is no end of the route.
        let from = if hop.starts_with('[') { hop.find(']').ok_or(malformed)? } else { 0 };
        let end = from + hop[from..].find([',', ':']).ok_or(malformed)?;
        check_domain(&hop[..end]).map_err(PathError::Address)?;
        rest = &hop[end + 1..];
        if hop.as_bytes()[end] == b':' {
            return Ok(rest);
        }
    }
}

/// RFC 5321 `Atom` characters (RFC 5322 §3.2.3 atext), non-ASCII ones by RFC 6531, and dots.
fn is_atom_or_dot(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~.".contains(c) || is_utf8_letter(c)
}

/// Beyond ASCII anything goes but control characters and what would look like a space or a line end.
fn is_utf8_letter(c: char) -> bool {
    !c.is_ascii() && !c.is_control() && !c.is_whitespace()
}

const IPV6_LITERAL: &str = "[IPv6:";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mailbox(text: &str) -> (String, &str) {
        match Path::parse(text).unwrap() {
            (Path::Mailbox(address), rest) => (address.into_string(), rest),
            (other, _) => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn domain_is_lowered_and_local_part_kept() {
        assert_eq!(mailbox("<Bob.Smith@Example.COM>").0, "Bob.Smith@example.com");
        assert_eq!(
            mailbox("<\"Bob @ <home>\"@Example.com> SIZE=1"),
            ("\"Bob @ <home>\"@example.com".into(), " SIZE=1")
        );
        assert_eq!(mailbox(r#"<"a\"b\\"@example.com>"#).0, r#""a\"b\\"@example.com"#);
        assert_eq!(mailbox("<jürgen@BÜCHER.example>").0, "jürgen@bücher.example");
        assert_eq!(mailbox("<a..b.@docomo.example>").0, "a..b.@docomo.example");
    }

    /// RFC 5321 §4.1.3.
    #[test]
    fn address_literals() {
        assert_eq!(mailbox("<a@[192.0.2.1]>").0, "a@[192.0.2.1]");
        assert_eq!(mailbox("<a@[ipv6:2001:DB8::1]>").0, "a@[IPv6:2001:db8::1]");
        for bad in
            ["<a@[192.0.2]>", "<a@[2001:db8::1]>", "<a@[IPv6:192.0.2.1]>", "<a@[]>", "<a@[192.0.2.1>", "<a@[é:1]>"]
        {
            assert_eq!(Path::parse(bad), Err(PathError::Address(AddressError::Literal)), "{bad}");
        }
    }

    #[test]
    fn what_is_written_by_hand_is_found() {
        for (text, domain) in [
            ("Example.COM", Some("example.com")),
            ("example.com.", Some("example.com")),
            ("BÜCHER.example", Some("xn--bcher-kva.example")),
            ("[IPV6:2001:DB8::1]", Some("[IPv6:2001:db8::1]")),
            ("[192.0.2.1]", Some("[192.0.2.1]")),
            ("*", None),
            ("@example.com", None),
            ("not a domain!", None),
            ("example.com..", None),
            (".", None),
            ("", None),
        ] {
            assert_eq!(read_domain(text).as_deref(), domain, "{text:?}");
        }
        assert_eq!(canonical_address("Bob@BÜCHER.example"), "Bob@bücher.example");
        assert_eq!(canonical_address("x@[ipv6:2001:DB8::1]"), "x@[IPv6:2001:db8::1]");
        assert_eq!(canonical_address("nobody"), "nobody");
    }

    /// RFC 5321 §4.1.1.3 and appendix C.
    #[test]
    fn source_route_is_dropped() {
        assert_eq!(mailbox("<@a.example,@b.example:user@c.example>").0, "user@c.example");
        assert_eq!(mailbox("<@[IPv6:::1]:user@c.example>").0, "user@c.example");
        assert!(Path::parse("<@a.example>").is_err());
        assert!(Path::parse("<@a.example,b:user@c.example>").is_err());
    }

    #[test]
    fn special_paths() {
        assert_eq!(Path::parse("<>"), Ok((Path::Null, "")));
        assert_eq!(Path::parse("<PostMaster>"), Ok((Path::Postmaster, "")));
        assert_eq!(Path::parse("<bob>"), Err(PathError::Address(AddressError::NoDomain)));
        assert_eq!(Path::parse("bob@example.com"), Err(PathError::Brackets));
        assert_eq!(Path::parse("<bob@example.com"), Err(PathError::Brackets));
        assert_eq!(Path::parse("<\"bob>@example.com"), Err(PathError::Brackets));
    }

    #[test]
    fn malformed_addresses() {
        let long = "a".repeat(256);
        for (bad, error) in [
            ("", AddressError::Empty),
            ("@example.com", AddressError::LocalPart),
            ("a b@example.com", AddressError::LocalPart),
            ("a@b@example.com", AddressError::Domain),
            ("\"a\"b@example.com", AddressError::LocalPart),
            ("\"a", AddressError::LocalPart),
            ("a\u{85}b@example.com", AddressError::LocalPart),
            ("a@", AddressError::Domain),
            ("a@exa mple.com", AddressError::Domain),
            ("a@example..com", AddressError::Domain),
            ("a@example.com.", AddressError::Domain),
            ("a@-example.com", AddressError::Domain),
            ("a@example.com\u{a0}", AddressError::Domain),
            (&format!("{long}@example.com"), AddressError::LocalPartTooLong),
            (&format!("a@{long}"), AddressError::DomainTooLong),
        ] {
            assert_eq!(Address::parse(bad), Err(error), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_nothing_dangerous_passes(text in "\\PC*|[<>@\":\\\\,. a\r\n\u{0}\u{e9}\\[\\]]{0,24}") {
            let _ = Path::parse(&text);
            if let Ok(address) = Address::parse(&text) {
                prop_assert!(!address.as_str().contains(['\r', '\n', '\0']));
                // What was taken apart once is taken apart the same way again.
                prop_assert_eq!(Address::parse(address.as_str()), Ok(address));
            }
        }
    }
}
