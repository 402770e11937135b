//! What kind of failure an answer tells: `bounce_classification`, in KumoMTA's class names.
//!
//! Tables are asked in turn, the surest first: phrases by which a receiver means something other than its code says;
//! enhanced status codes that say what they mean (RFC 3463 §3 and IANA's registry of later ones); phrases that
//! receivers use; codes so general that any phrase is better; the bare reply code. It is a hint for reports and
//! suppression lists. What happens to a message is decided elsewhere (`deliver/verdict.rs`), from codes alone.

use postrider_spool::record::Answer;
use serde::Serialize;

use crate::limits::CLASSIFY_TEXT_OCTETS_MAX;

/// KumoMTA's predefined classes, those that an answer to our mail can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum BounceClass {
    /// There is no such mailbox.
    InvalidRecipient,
    /// The mailbox exists but is disabled, expired or has moved.
    InactiveMailbox,
    /// The domain does not exist or takes no mail.
    BadDomain,
    /// The reverse path or its domain is refused.
    InvalidSender,
    /// The mailbox or the system is full, or the message larger than it takes.
    QuotaIssues,
    /// The sending address is on a block list or has a bad reputation.
    SpamBlock,
    /// The content was taken for spam.
    SpamContent,
    /// Spam was the reason, without saying whether source or content.
    SpamRelated,
    VirusRelated,
    ProhibitedAttachment,
    /// The content was refused for another reason.
    ContentRelated,
    /// SPF, DKIM, DMARC, reverse DNS or SMTP AUTH.
    AuthenticationFailed,
    RelayDenied,
    TooManyRecipients,
    PolicyRelated,
    ProtocolErrors,
    BadConfiguration,
    /// A DNS answer was missing or wrong.
    DNSFailure,
    RoutingErrors,
    /// Nobody answered at the peer's address.
    NoAnswerFromHost,
    /// A connection was lost on the way.
    BadConnection,
    /// Greylisting, throttling, congestion: later it may work.
    TransientFailure,
    /// Not delivered within the message's life.
    MessageExpired,
    Uncategorized,
}

/// Classifies an answer that was not a success.
pub fn classify(answer: &Answer) -> BounceClass {
    // A peer's replies have come out of step, and its words are about something else.
    if matches!(answer.code / 100, 2 | 3) {
        return ProtocolErrors;
    }
    let lookup = |table: &[Code]| {
        let (_, subject, detail) = answer.enhanced?;
        table.iter().find(|code| code.0 == subject && code.1.contains(&detail)).map(|code| code.2)
    };
    let transient = answer.code / 100 == 4;
    let text = text_read(answer);
    by_phrase(&text, &[PHRASES_BEFORE_CODES, if transient { TRANSIENT_BEFORE_CODES } else { &[] }])
        .or_else(|| lookup(TELLING_CODES))
        .or_else(|| by_phrase(&text, &[PHRASES, if transient { TRANSIENT_PHRASES } else { &[] }]))
        .or_else(|| lookup(GENERAL_CODES))
        .or_else(|| REPLY_CODES.iter().find(|rule| rule.0.contains(&answer.code)).map(|rule| rule.1))
        .unwrap_or(BounceClass::Uncategorized)
}

/// In lower case.
fn text_read(answer: &Answer) -> Vec<u8> {
    let octets = answer.text.len().min(CLASSIFY_TEXT_OCTETS_MAX);
    answer.text.as_bytes()[..octets].to_ascii_lowercase()
}

fn by_phrase(text: &[u8], tables: &[&[Phrase]]) -> Option<BounceClass> {
    let mut phrases = tables.iter().copied().flatten();
    let found = phrases.find(|(phrase, _)| memchr::memmem::find(text, phrase.as_bytes()).is_some());
    found.map(|&(_, class)| class)
}

/// Lower case; the first that occurs decides, so the more telling ones stand first.
type Phrase = (&'static str, BounceClass);

/// Subject, details, class. The first digit says only whether it is for good, so it is not asked.
type Code = (u16, std::ops::RangeInclusive<u16>, BounceClass);

use BounceClass::{
    AuthenticationFailed, BadConfiguration, BadConnection, BadDomain, ContentRelated, DNSFailure, InactiveMailbox,
    InvalidRecipient, InvalidSender, MessageExpired, NoAnswerFromHost, PolicyRelated, ProhibitedAttachment,
    ProtocolErrors, QuotaIssues, RelayDenied, RoutingErrors, SpamBlock, SpamContent, SpamRelated, TooManyRecipients,
    TransientFailure, VirusRelated,
};

#[rustfmt::skip]
const TELLING_CODES: &[Code] = &[
    // RFC 3463 §3.2, address status.
    (1, 1..=1, InvalidRecipient),       // bad destination mailbox address
    (1, 2..=2, BadDomain),              // bad destination system address
    (1, 3..=4, InvalidRecipient),       // bad syntax; ambiguous
    (1, 6..=6, InactiveMailbox),        // has moved
    (1, 7..=8, InvalidSender),          // bad sender's mailbox or system address
    (1, 10..=10, BadDomain),            // RFC 7505 §4.2: null MX
    // §3.3, mailbox status.
    (2, 2..=3, QuotaIssues),            // mailbox full; message longer than administratively allowed
    (2, 4..=4, InvalidRecipient),       // mailing list expansion
    // §3.4, mail system status.
    (3, 1..=1, QuotaIssues),            // system full
    (3, 4..=4, QuotaIssues),            // message too big for system
    (3, 5..=5, BadConfiguration),
    // §3.5, network and routing status.
    (4, 1..=1, NoAnswerFromHost),
    (4, 2..=2, BadConnection),
    (4, 3..=3, DNSFailure),             // directory server failure
    (4, 4..=4, RoutingErrors),          // unable to route
    (4, 5..=5, TransientFailure),       // system congestion
    (4, 6..=6, RoutingErrors),          // routing loop
    (4, 7..=7, MessageExpired),         // delivery time expired
    // §3.6, mail delivery protocol status.
    (5, 3..=3, TooManyRecipients),
    (5, 1..=2, ProtocolErrors),         // invalid command; syntax error
    (5, 4..=5, ProtocolErrors),         // invalid arguments; wrong version
    // §3.7, message content or media status; RFC 6531 §4.3 for 7 and above.
    (6, 3..=3, ProtocolErrors),         // conversion required but not supported
    (6, 7..=10, ProtocolErrors),        // non-ASCII addresses, UTF-8 header or reply
    // §3.8, security or policy status, and what IANA registered later.
    (7, 8..=11, AuthenticationFailed),  // RFC 4954 §6
    (7, 13..=13, InactiveMailbox),      // RFC 5248 §2.4: user account disabled
    (7, 17..=17, InvalidRecipient),     // RFC 7293 §14: mailbox owner has changed
    (7, 18..=18, BadDomain),            // RFC 7293 §14: domain owner has changed
    (7, 20..=26, AuthenticationFailed), // RFC 7372 §3: DKIM, SPF, reverse DNS
    (7, 27..=27, InvalidSender),        // RFC 7505 §4.2: the sender's domain has a null MX
    (7, 28..=28, PolicyRelated),        // mail flood detected
    (7, 29..=29, AuthenticationFailed), // RFC 8617 §10: ARC
    (7, 30..=30, PolicyRelated),        // RFC 8689 §8: REQUIRETLS
];

#[rustfmt::skip]
const GENERAL_CODES: &[Code] = &[
    (1, 0..=u16::MAX, InvalidRecipient),
    (2, 0..=u16::MAX, InactiveMailbox),  // RFC 3463 §3.3, X.2.1 above all: disabled, not accepting
    (4, 0..=u16::MAX, RoutingErrors),
    (5, 0..=u16::MAX, ProtocolErrors),
    (6, 0..=u16::MAX, ContentRelated),
    (7, 0..=u16::MAX, PolicyRelated),
];

#[rustfmt::skip]
const PHRASES_BEFORE_CODES: &[Phrase] = &[
    // Exchange Online says 5.4.1 about a recipient that it does not have.
    ("recipient address rejected: access denied", InvalidRecipient),
    ("not accepted for policy reasons", PolicyRelated),     // Yahoo's 5.7.9
];

/// A mailbox that is there for all one knows: Postgrey says "Recipient address rejected: Greylisted".
#[rustfmt::skip]
const TRANSIENT_BEFORE_CODES: &[Phrase] = &[
    ("greylist", TransientFailure), ("graylist", TransientFailure), ("too many connections", TransientFailure),
];

#[rustfmt::skip]
const PHRASES: &[Phrase] = &[
    ("spamhaus", SpamBlock), ("spamcop", SpamBlock), ("barracudacentral", SpamBlock), ("sorbs", SpamBlock),
    ("dnsbl", SpamBlock), (" rbl", SpamBlock), ("blocklist", SpamBlock), ("block list", SpamBlock),
    ("blacklist", SpamBlock), ("black list", SpamBlock), ("blocked using", SpamBlock), ("reputation", SpamBlock),
    ("banned sending ip", SpamBlock), ("ipcheck.proofpoint.com", SpamBlock),
    ("virus", VirusRelated), ("malware", VirusRelated), ("infected", VirusRelated),
    ("attachment", ProhibitedAttachment),
    ("looks like spam", SpamContent), ("detected as spam", SpamContent), ("considered spam", SpamContent),
    ("message is spam", SpamContent), ("spam message", SpamContent), ("spam content", SpamContent),
    ("spam score", SpamContent), ("likely unsolicited", SpamContent),
    ("dmarc", AuthenticationFailed), ("dkim", AuthenticationFailed), ("spf", AuthenticationFailed),
    ("unauthenticated", AuthenticationFailed), ("reverse dns", AuthenticationFailed),
    ("ptr record", AuthenticationFailed), ("authentication", AuthenticationFailed),
    ("spam", SpamRelated), ("unsolicited", SpamRelated),
    ("relaying denied", RelayDenied), ("relay access denied", RelayDenied), ("unable to relay", RelayDenied),
    ("relay not permitted", RelayDenied), ("not permitted to relay", RelayDenied), ("relay not allowed", RelayDenied),
    ("too many recipients", TooManyRecipients),
    ("quota", QuotaIssues), ("mailbox full", QuotaIssues), ("mailbox is full", QuotaIssues),
    ("insufficient storage", QuotaIssues), ("out of storage", QuotaIssues), ("message too large", QuotaIssues),
    ("domain not found", BadDomain), ("unknown domain", BadDomain), ("no such domain", BadDomain),
    ("domain does not exist", BadDomain),
    ("sender address rejected", InvalidSender), ("sender rejected", InvalidSender),
    ("invalid sender", InvalidSender), ("sender verify failed", InvalidSender),
    ("inactive", InactiveMailbox), ("disabled", InactiveMailbox), ("deactivated", InactiveMailbox),
    ("suspended", InactiveMailbox), ("no longer active", InactiveMailbox),
    ("user unknown", InvalidRecipient), ("unknown user", InvalidRecipient), ("no such user", InvalidRecipient),
    ("no such recipient", InvalidRecipient), ("no such mailbox", InvalidRecipient), ("no mailbox", InvalidRecipient),
    ("unknown recipient", InvalidRecipient), ("invalid recipient", InvalidRecipient),
    ("recipient rejected", InvalidRecipient), ("recipient address rejected", InvalidRecipient),
    ("user not found", InvalidRecipient), ("recipient not found", InvalidRecipient),
    ("mailbox not found", InvalidRecipient), ("does not exist", InvalidRecipient),
    ("doesn't exist", InvalidRecipient), ("mailbox unavailable", InvalidRecipient),
    ("too many hops", RoutingErrors), ("mail loop", RoutingErrors), ("loops back", RoutingErrors),
    ("connection refused", NoAnswerFromHost), ("no route to host", NoAnswerFromHost),
    ("connection timed out", NoAnswerFromHost),
    ("connection reset", BadConnection), ("connection lost", BadConnection), ("connection closed", BadConnection),
    ("policy", PolicyRelated),
];

/// Asked of 4xx answers only: behind a 5xx such words are politeness.
#[rustfmt::skip]
const TRANSIENT_PHRASES: &[Phrase] = &[
    ("try again", TransientFailure),
    ("rate limit", TransientFailure), ("too quickly", TransientFailure), ("throttl", TransientFailure),
    ("too many", TransientFailure), ("temporarily", TransientFailure), ("temporary", TransientFailure),
    ("overload", TransientFailure),
];

/// RFC 5321 §4.2.3 unless cited.
#[rustfmt::skip]
const REPLY_CODES: &[(std::ops::RangeInclusive<u16>, BounceClass)] = &[
    (421..=421, TransientFailure),
    (452..=452, QuotaIssues),           // insufficient system storage
    (500..=504, ProtocolErrors),
    (521..=521, BadDomain),             // RFC 7504 §3: the host never takes mail
    (530..=538, AuthenticationFailed),  // RFC 4954 §6
    (551..=551, InvalidRecipient),      // user not local
    (552..=552, QuotaIssues),           // exceeded storage allocation
    (553..=553, InvalidRecipient),      // mailbox name not allowed
    (555..=555, ProtocolErrors),        // parameters not recognised
    (556..=556, BadDomain),             // RFC 7504 §4: the domain takes no mail
];

#[cfg(test)]
mod tests {
    use super::*;

    type Case = (u16, Option<(u8, u16, u16)>, &'static str, BounceClass);

    /// Answers as receivers really word them.
    #[rustfmt::skip]
    const CASES: &[Case] = &[
        (550, Some((5, 1, 1)), "The email account that you tried to reach does not exist.", InvalidRecipient),
        (550, Some((5, 1, 1)), "spam", InvalidRecipient), // RFC 3463 §3.2 tells more than a word
        (550, Some((5, 1, 10)), "example.net takes no mail (null MX)", BadDomain),
        (550, Some((5, 1, 2)), "", BadDomain),
        (452, Some((4, 2, 2)), "The recipient's inbox is out of storage space", QuotaIssues),
        (450, Some((4, 2, 1)), "The user is receiving mail at a rate too quickly", TransientFailure),
        (550, Some((5, 2, 1)), "The account is not taking mail", InactiveMailbox),
        (554, Some((5, 7, 1)), "Service unavailable; Client host blocked using zen.spamhaus.org", SpamBlock),
        (550, Some((5, 7, 1)), "This message looks like spam", SpamContent),
        (550, Some((5, 7, 26)), "Unauthenticated mail is not accepted", AuthenticationFailed),
        (550, Some((5, 7, 1)), "mail from acme.example fails DMARC policy", AuthenticationFailed),
        (550, Some((5, 7, 1)), "Access denied", PolicyRelated),
        (554, Some((5, 7, 1)), "<a@b.example>: Relay access denied", RelayDenied),
        (451, Some((4, 7, 1)), "Greylisting in action, please come back later", TransientFailure),
        (550, None, "User unknown in virtual mailbox table", InvalidRecipient),
        (550, None, "", BounceClass::Uncategorized),
        (552, None, "", QuotaIssues),
        (556, None, "", BadDomain),
        (250, Some((2, 1, 5)), "recipient ok", ProtocolErrors),
        (501, None, "what?", ProtocolErrors),
        (554, None, "please try again", BounceClass::Uncategorized),
        (551, Some((5, 4, 7)), "not delivered within 5 days", MessageExpired),
        (451, Some((4, 4, 1)), "connection refused", NoAnswerFromHost),
        (554, Some((5, 4, 6)), "Too many hops", RoutingErrors),
        (452, Some((4, 5, 3)), "Too many recipients", TooManyRecipients),
        (550, Some((5, 6, 7)), "the peer does not offer SMTPUTF8", ProtocolErrors),
        (552, Some((5, 7, 0)), "Our scanner found a VIRUS", VirusRelated),
        (550, Some((5, 0, 0)), "Domain does not exist", BadDomain),
        (550, Some((5, 4, 1)), "Recipient address rejected: Access denied. [x.outlook.com]", InvalidRecipient),
        (554, Some((5, 7, 9)), "Message not accepted for policy reasons. See https://a.example/", PolicyRelated),
        (450, Some((4, 2, 0)), "<a@b.example>: Recipient address rejected: Greylisted", TransientFailure),
        (550, Some((5, 7, 1)), "<a@b.example>: Recipient address rejected: undeliverable", InvalidRecipient),
        (450, None, "Requested mail action not taken: mailbox unavailable Too many connections", TransientFailure),
        (550, Some((5, 7, 606)), "Access denied, banned sending IP [192.0.2.1].", SpamBlock),
        (554, None, "Blocked - see https://ipcheck.proofpoint.com/?ip=192.0.2.1", SpamBlock),
        (554, None, "Transaction failed Reject due to policy restrictions.", PolicyRelated),
        (451, None, "Open relay not allowed", RelayDenied),
    ];

    #[test]
    fn answers_are_classified() {
        for &(code, enhanced, text, class) in CASES {
            let answer = Answer { code, enhanced, text: text.into(), command: String::new() };
            assert_eq!(classify(&answer), class, "{code} {enhanced:?} {text}");
        }
    }

    #[test]
    fn phrases_are_in_lower_case_and_none_hides_behind_an_earlier_one() {
        let all: Vec<_> = PHRASES_BEFORE_CODES.iter().chain(TRANSIENT_BEFORE_CODES).collect();
        assert!(all.iter().all(|(phrase, _)| *phrase == phrase.to_lowercase()));
        let all: Vec<_> = PHRASES.iter().chain(TRANSIENT_PHRASES).collect();
        for (place, (phrase, class)) in all.iter().enumerate() {
            assert_eq!(*phrase, phrase.to_lowercase());
            let hiding = all[..place].iter().find(|(earlier, _)| phrase.contains(earlier));
            assert_eq!(hiding, None, "{phrase} {class:?}");
        }
    }

    #[test]
    fn only_so_much_of_a_text_is_read() {
        let mut text = "é".repeat(CLASSIFY_TEXT_OCTETS_MAX);
        text.push_str("user unknown");
        let answer = Answer { code: 550, enhanced: None, text, command: String::new() };
        assert_eq!(classify(&answer), BounceClass::Uncategorized);
    }
}
