//! A peer's octets through the reply parser: in one piece and octet by octet they are the same replies, whose text is
//! safe.

use postrider::mail::reply::{Reply, ReplyError, ReplyParser};

pub(crate) fn run(octets: &[u8]) {
    let whole = replies(&[octets]);
    let single: Vec<&[u8]> = octets.chunks(1).collect();
    assert_eq!(replies(&single), whole, "the pieces change nothing");
    for reply in whole.iter().flatten() {
        assert!((200..600).contains(&reply.code), "{}", reply.code);
        assert!(reply.lines().all(|line| !line.contains(char::is_control)), "{reply:?}");
        assert!(!reply.text().contains(char::is_control), "{reply:?}");
        // A status of another class than the code would make a refusal look like a success.
        let classes = [reply.is_positive(), reply.is_transient(), reply.is_permanent()];
        assert!(classes.iter().filter(|is_so| **is_so).count() <= 1);
    }
}

/// Until the first error: behind it there is no telling where a reply begins.
fn replies(pieces: &[&[u8]]) -> Vec<Result<Reply, ReplyError>> {
    let mut parser = ReplyParser::default();
    let mut found = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let (consumed, reply) = parser.parse(rest);
            assert!(consumed > 0 && consumed <= rest.len());
            rest = &rest[consumed..];
            let failed = matches!(reply, Some(Err(_)));
            found.extend(reply);
            if failed {
                return found;
            }
        }
    }
    found
}
