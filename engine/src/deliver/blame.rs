//! Whether a refusal blames the address that mail leaves from.
//!
//! A message that one of our addresses is refused for may well be taken from another, so such a refusal is no verdict
//! on the message: `verdict.rs` asks here before it bounces. Peers say it in words only: most of them answer 550 5.7.1
//! to a listed address, and the same to spam, to a failed DMARC check and to a stranger at a closed list. So this looks
//! for words about a block list, a reputation or a ban *together with* words for a sending address, and not for words
//! about what the sender wrote. A refusal that it takes for blame by mistake is tried again until it expires; one that
//! it misses bounces, as every other permanent refusal does.
//!
//! See also: `engine/rules/providers.toml` for what single providers say.

use crate::limits::BLAME_TEXT_OCTETS_MAX;
use crate::mail::reply::Reply;

/// Whether a permanent refusal is about our address and not about a message or a recipient.
pub(crate) fn blames_source(reply: &Reply) -> bool {
    // RFC 3463 §3: subject 7 is security and policy, 5 and 0 are what peers without a better one write. Addresses (1),
    // mailboxes (2), the mail system (3), the network (4) and content (6) are somebody else's.
    let about_policy = reply.enhanced().is_none_or(|(_, subject, _)| matches!(subject, 0 | 5 | 7));
    if !reply.is_permanent() || !about_policy {
        return false;
    }
    let mut text = reply.text();
    text.truncate(text.floor_char_boundary(BLAME_TEXT_OCTETS_MAX));
    let text = text.to_ascii_lowercase();
    let says = |phrases: &[&str]| phrases.iter().any(|phrase| text.contains(phrase));
    let words = without_links(&text);
    if says(DOMAIN_LISTS) || NOT_THE_ADDRESS.iter().any(|phrase| words.contains(phrase)) {
        return false;
    }
    says(PLAIN_BLAME) || says(LISTED_OR_DISREPUTABLE) && (says(ADDRESS_WORDS) || names_an_address(&text))
}

/// Where to read more is no reason: Microsoft explains a banned address at `…/fwlink/?LinkID=526655`.
fn without_links(text: &str) -> String {
    let before_link = |word: &str| {
        let start = ["http://", "https://", "www."].iter().filter_map(|prefix| word.find(prefix)).min();
        word[..start.unwrap_or(word.len())].to_owned()
    };
    text.split_whitespace().map(before_link).collect::<Vec<_>>().join(" ")
}

/// An IPv4 address, or an IPv6 address in brackets.
fn names_an_address(text: &str) -> bool {
    let part_of_address = |c: char| c.is_ascii_hexdigit() || c == '.' || c == ':';
    text.split(|c: char| !part_of_address(c)).any(|word| {
        let word = word.trim_matches('.');
        let is_address = |word: &str| word.parse::<std::net::IpAddr>().is_ok();
        is_address(word) || is_address(word.trim_matches(':'))
    })
}

/// Lists of domains, also where only the link names them.
const DOMAIN_LISTS: &[&str] = &["dbl", "surbl", "uribl"];

/// What the sender wrote, or how it is authenticated: another address would not help.
const NOT_THE_ADDRESS: &[&str] = &[
    "url",
    "link",
    "domain present",
    "sender domain",
    "sending domain",
    "from domain",
    "domain reputation",
    "content",
    "dmarc",
    "dkim",
    "spf",
    "sender address rejected",
    "user unknown",
    "customer block list",
];

/// These say by themselves that it is about our address.
const PLAIN_BLAME: &[&str] = &[
    "banned sending ip",
    "connections will not be accepted from",
    "connections not accepted from ip",
    "sent from your ip address has been",
    "your ip address is blocked",
    "your ip has been blocked",
    "your ip address has been blocked",
    "block has been placed against your ip",
    "your ip address appears to be",
    "will be permanently deferred",
    "adresse ip source bloquee",
];

/// Lists and reputations, of an address where one is named.
const LISTED_OR_DISREPUTABLE: &[&str] = &[
    "blocked using",
    "listed by",
    "listed in",
    "listed on",
    "listed at",
    "listing in",
    "is listed",
    "in blacklist",
    "blacklisted",
    "blacklist",
    "black list",
    "blocklisted",
    "blocklist",
    "block list",
    "dnsbl",
    "in rbl",
    "ipcheck.proofpoint.com",
    "spamhaus",
    "spamcop",
    "barracudacentral",
    "cloudmark",
    "abusix",
    "poor reputation",
    "bad reputation",
    "low reputation",
    "ip reputation",
    "reputation of the sending ip",
];

/// Words for the address that a connection comes from.
const ADDRESS_WORDS: &[&str] = &[
    "client host",
    "your ip",
    "ip address",
    "sending ip",
    "mail from ip",
    "originating ip",
    "your server",
    "your host",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn blames(text: &str) -> bool {
        let (code, text) = text.split_once(' ').expect("code and text");
        blames_source(&Reply::new(code.parse().expect("a code"), text))
    }

    #[test]
    fn refusals_that_blame_our_address() {
        for text in [
            "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked using zen.spamhaus.org",
            "550 5.7.1 Unfortunately, messages from [192.0.2.1] weren't sent. Please contact your Internet service \
             provider since part of their network is on our block list (S3150).",
            "550 5.7.606 Access denied, banned sending IP [192.0.2.1]",
            "550 5.7.606 Access denied, banned sending IP [192.0.2.1]. To request removal from this list please visit \
             https://sender.office.com/ and follow the directions. For more information please go to \
             http://go.microsoft.com/fwlink/?LinkID=526655 AS(1430)",
            "554 5.7.1 client host [192.0.2.1] blocked using a list; see www.example.net/content?url=1",
            "550 5.7.1 Mail from IP 192.0.2.1 was rejected due to listing in Spamhaus SBL.",
            "553 5.7.1 [BL21] Connections will not be accepted from 192.0.2.1, because the ip is in Spamhaus's list",
            "553 5.7.2 [TSS09] All messages from 192.0.2.1 will be permanently deferred; Retrying will NOT succeed.",
            "550 5.7.28 There is an unusual rate of unsolicited email originating from your IP address. To protect our \
             users from spam, email sent from your IP address has been blocked.",
            "550 5.7.1 This message is suspicious due to the very low reputation of the sending IP address.",
            "554 IP=192.0.2.1 - None/bad reputation. Ask your postmaster for help. (NOWL)",
            "554 No SMTP service\nIP address is block listed.",
            "550 mwinf5c04 ME Adresse IP source bloquee pour incident de spam.",
            "550 5.5.0 service refused: 2001:db8::1 is listed by our reputation service",
            "571 192.0.2.1 is listed on our blacklist",
            "550 5.7.0 Blocked - see https://ipcheck.proofpoint.com/?ip=192.0.2.1",
            "550 smtp-13.iol.local IP blacklisted by CSI. For remediation please use \
             http://csi.cloudmark.com/reset-request/?ip=192.0.2.1 [smtp-13.iol.local; LIB_102]",
            "550 mx10.tb MXIN103 Your IP 192.0.2.1 is in RBL.",
            "554 Your access to this mail system from 192.0.2.1 has been rejected due to the sending MTA's poor \
             reputation.",
        ] {
            assert!(blames(text), "{text}");
        }
    }

    #[test]
    fn refusals_that_are_about_something_else() {
        for text in [
            "550 5.1.1 user unknown",
            "550 5.1.1 <a@b.example>: Recipient address rejected: User unknown; 192.0.2.1 is listed nowhere",
            "550 5.7.1 Your email was rejected due to having a domain present in the Spamhaus DBL",
            "550 5.7.1 [CS01] Message rejected due to local policy.",
            "554 5.7.1 This message has been blocked because it contains a URL listed by SURBL (192.0.2.1)",
            "550 5.7.1 the link to 192.0.2.1 is listed on a block list",
            "550 5.7.1 your domain is listed in a blocklist, not your IP; see https://dbl.example/a.example",
            "550 5.7.26 Unauthenticated email from a.example is not accepted due to domain's DMARC policy; your IP \
             address 192.0.2.1 is not listed in its SPF record",
            "550 5.7.1 message classified as spam",
            "550 5.2.1 mailbox disabled, blacklisted for your IP address",
            "554 5.6.0 content blocked using rules of the recipient, client host 192.0.2.1",
            "550 5.7.1 your name is on our block list",
            "550 5.7.1 Service unavailable, Client host [192.0.2.1] blocked by a.example using Customer Block list",
            "421 4.7.1 client host [192.0.2.1] blocked using zen.spamhaus.org",
            "550 Blocklisted version 1.2.3 of your software",
        ] {
            assert!(!blames(text), "{text}");
        }
    }

    #[test]
    fn addresses_are_found_in_running_text() {
        for text in [
            "from 192.0.2.1,",
            "[192.0.2.1]",
            "ip=192.0.2.1 -",
            "address:192.0.2.1",
            "(2001:db8::25)",
            "at ::ffff:192.0.2.1.",
        ] {
            assert!(names_an_address(text), "{text}");
        }
        for text in ["version 1.2.3", "see rfc 5321", "12:30:01", "a.b.c.d", ""] {
            assert!(!names_an_address(text), "{text}");
        }
    }
}
