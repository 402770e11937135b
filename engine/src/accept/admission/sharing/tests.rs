//! A message that shares content is, to the octet, the message that it would be with content of its own.

use proptest::prelude::*;

use super::*;
use crate::accept::admission::tests::{NOW, received, signing_config};
use crate::accept::dkim_sign::tests::verify;

fn policy() -> Policy {
    let mut config = signing_config();
    config.events.headers = vec!["Subject".to_owned(), "X-*".to_owned()];
    Policy::new(&config).unwrap()
}

/// Signed, with its octets on the wire.
fn whole(admitted: Result<Admitted, Refusal>) -> Result<(Admitted, Vec<u8>), Refusal> {
    let mut admitted = admitted?;
    admitted.sign(NOW)?;
    let shared = admitted.shared.as_ref().map_or(&[][..], |shared| shared.octets());
    let octets = [&admitted.prefix, &admitted.content[..], shared].concat();
    assert_eq!(admitted.size(), octets.len() as u64);
    Ok((admitted, octets))
}

fn both(own: &[u8], shared: &[u8]) -> [Result<(Admitted, Vec<u8>), Refusal>; 2] {
    let policy = policy();
    let content = Arc::new(policy.share(1, shared.to_vec()).unwrap());
    let together = Received { smtputf8_declared: true, ..received([own, shared].concat()) };
    let apart = Received { content: own.to_vec(), ..together.clone() };
    let apart = policy.admit_sharing(NOW, apart, &content, [1, 2]);
    [whole(apart), whole(policy.admit(NOW, together, [1, 2]))]
}

fn assert_alike(own: &[u8], shared: &[u8]) {
    match both(own, shared) {
        [Ok((apart, octets)), Ok((together, expected))] => {
            assert_eq!(octets.escape_ascii().to_string(), expected.escape_ascii().to_string());
            assert_eq!(apart.envelope, together.envelope);
            assert!(verify(&octets, &signing_config().dkim).iter().all(|valid| *valid));
        }
        [apart, together] => assert_eq!(apart.unwrap_err(), together.unwrap_err()),
    }
}

#[test]
fn a_message_is_what_it_would_be_by_itself() {
    let shared: &[&[u8]] = &[
        b"From: a@a.example\r\nSubject: x\r\n\r\nbody\r\n",
        b"From: a@a.example\r\nDate: Mon, 1 Dec 2025 00:00:00 +0000\r\nX-Campaign: below\r\nBcc: z@z\r\n\r\n.dot\r\n",
        b"\r\nbody \xe9 only\r\n",
        b"\r\n",
        b"From: a@a.example\r\nSubject: \xc3\xa9\r\n",
        b"X-Schedule: {\"expires\":\"2025-12-01T00:10:00Z\"}\r\n\r\n",
        b"Received: here\r\nFrom: who?\r\n\r\nx\r\n",
        b"X-Virtual-MTA: nowhere\r\n\r\nx\r\n",
    ];
    let own: &[&[u8]] = &[
        b"",
        b"To: b@b.example\r\nMessage-ID: <1@a.example>\r\nList-Unsubscribe: <https://a.example/1>,\r\n <mailto:1@a.example>\r\n",
        b"From: b@us.example\r\nX-Job: own\r\n",
        b"X-Campaign: own\r\nX-Tenant: nobody\r\nX-Virtual-MTA: bulk\r\n",
        b".dotted: 1\r\n",
        b"Subject: \xff\r\nX-Customer-A: 1\r\n",
    ];
    for own in own {
        for shared in shared {
            assert_alike(own, shared);
        }
    }
}

/// RFC 5321 §6.3: hops are counted wherever they stand.
#[test]
fn hops_are_counted_in_both() {
    let hops = b"Received: x\r\n".repeat(51);
    let [apart, together] = both(&hops, &hops);
    assert_eq!(apart.unwrap_err(), together.unwrap_err());
}

#[test]
fn what_would_end_or_break_the_header_is_refused() {
    let policy = policy();
    for shared in
        ["no field\r\n\r\nbody\r\n", "From: a@b\r\nno field\r\n\r\n", "From x\r\nFrom: a@b\r\n\r\n", " x: y\r\n"]
    {
        assert_eq!(policy.share(1, shared.into()).unwrap_err().enhanced(), (5, 6, 0), "{shared:?}");
    }
    let shared = Arc::new(policy.share(1, b"From: a@a.example\r\n\r\nbody\r\n".to_vec()).unwrap());
    for own in ["To: b\r\n\r\n", "\r\n", "To: b\r\nno field\r\n", "\r\nSubject: x\r\n", "To: b\r\n\r\nFrom: c\r\n"] {
        let refusal = policy.admit_sharing(NOW, received(own), &shared, [1, 2]).unwrap_err();
        assert_eq!(refusal.enhanced(), (5, 6, 0), "{own:?}");
    }
}

fn fields(lines: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "From",
        "To",
        "Subject",
        "Date",
        "Message-ID",
        "Bcc",
        "X-Campaign",
        "X-Job",
        "X-Customer",
        "Received",
        ".x",
    ]);
    let value = prop::sample::select(vec!["a@a.example", "x", "", "é", "b@b.example,\r\n c@sub.a.example"]);
    let line = (name, value).prop_map(|(name, value)| format!("{name}: {value}\r\n"));
    prop::collection::vec(line, lines).prop_map(|lines| lines.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_message_is_what_it_would_be_by_itself(
        own in fields(0..8),
        shared in fields(0..8),
        // The verifier does not drop white space at the end of a body as RFC 6376 §3.4.4 wants it; `dkim_sign` has
        // tests for such bodies.
        body in "((\r\n[ -~é]{0,20}){0,3}\r\n[!-~é])?",
    ) {
        let shared = format!("{shared}\r\n{body}\r\n");
        assert_alike(own.as_bytes(), shared.as_bytes());
    }
}
