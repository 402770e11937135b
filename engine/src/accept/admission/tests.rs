//! Tests of the policy at acceptance: what is taken out, what is added, and that all else stays byte for byte.

use std::time::Duration;

use postrider_spool::record::DsnParameters;
use proptest::prelude::*;

use super::*;
use crate::accept::dkim_sign::tests::{identity, verify};
use crate::config::{EgressPool, EgressSource, RetryRules, Tenant};

pub(super) const NOW: Now = Now { monotonic: Duration::from_secs(1), wall_ms: 1_764_547_200_500 };

fn config() -> Config {
    let mut config = Config::new("mta.example");
    config.egress_sources = vec![EgressSource {
        name: "ip-a".to_owned(),
        source_address: None,
        ehlo_domain: "mta.example".to_owned(),
        suspend_when_unplumbed: false,
        is_retired: false,
    }];
    config.egress_pools =
        ["default", "bulk"].map(|name| EgressPool { name: name.to_owned(), sources: vec![(0, 1)] }).to_vec();
    config.retry.max_age = Duration::from_secs(1_000);
    config.feedback_reference = true;
    config
}

fn policy() -> Policy {
    Policy::new(&config()).unwrap()
}

pub(super) fn received(content: impl Into<Vec<u8>>) -> Received {
    Received {
        reverse_path: "a@a.example".to_owned(),
        recipients: vec!["b@b.example".to_owned()],
        content: content.into(),
        eight_bit_declared: false,
        smtputf8_declared: false,
        helo: "client.example".to_owned(),
        protocol: "ESMTP",
        client: Some("192.0.2.7:1234".parse().unwrap()),
        session_id: 9,
        trusted: true,
        received_detail: ReceivedDetail::Full,
        dsn: DsnParameters::default(),
        meta: Vec::new(),
    }
}

fn admit(content: &str) -> Result<Admitted, Refusal> {
    policy().admit(NOW, received(content), [1, 2])
}

fn text(octets: &[u8]) -> &str {
    std::str::from_utf8(octets).unwrap()
}

fn refused(content: &str) -> String {
    admit(content).unwrap_err().to_string()
}

/// One policy serves all shards.
#[test]
fn policy_is_shared() {
    fn shared<T: Send + Sync>(_: &T) {}
    shared(&policy());
}

/// docs/smtp.md, "What is changed in a message".
#[test]
fn prefix_in_order() {
    let admitted = admit("Subject: x\r\n\r\nbody\r\n").unwrap();
    let names = MessageNames::derive([1, 2]);
    let (public, secret) = (format!("{:016x}", names.public), &names.secret);
    assert_eq!(
        text(&admitted.prefix),
        format!(
            "Received: from client.example ([192.0.2.7])\r\n\tby mta.example with ESMTP id {public}\r\n\t\
             for <b@b.example>;\r\n\tMon, 1 Dec 2025 00:00:00 +0000\r\n\
             Date: Mon, 1 Dec 2025 00:00:00 +0000\r\n\
             Message-ID: <19ad73585f4.{public}@mta.example>\r\n\
             X-Postrider-Ref: {secret}\r\n"
        )
    );
    assert_eq!(text(&admitted.content), "Subject: x\r\n\r\nbody\r\n");
    assert_eq!(secret.len(), 32);
    assert_ne!(MessageNames::derive([1, 3]).secret, *secret);
    assert!(!secret.contains(&public));
}

#[test]
fn only_what_is_missing_is_added() {
    let mut config = config();
    config.feedback_reference = false;
    let policy = Policy::new(&config).unwrap();
    let mut message = received("date: x\r\nMESSAGE-ID: y\r\n\r\n");
    message.received_detail = ReceivedDetail::None;
    let admitted = policy.admit(NOW, message, [1, 2]).unwrap();
    assert_eq!(text(&admitted.prefix), "");
    // Those in the body don't count.
    let admitted = admit("Subject: x\r\n\r\nDate: x\r\nMessage-ID: y\r\n").unwrap();
    assert!(text(&admitted.prefix).contains("\r\nDate: Mon, 1 Dec 2025"));
}

#[test]
fn received_field_tells_as_much_as_configured() {
    let first_line = |message: Received| {
        let admitted = policy().admit(NOW, message, [1, 2]).unwrap();
        text(&admitted.prefix).replace("\r\n\t", " ").lines().next().unwrap().to_owned()
    };
    let with = |change: fn(&mut Received)| {
        let mut message = received("");
        change(&mut message);
        first_line(message)
    };
    let id = format!("{:016x}", MessageNames::derive([1, 2]).public);
    let date = "Mon, 1 Dec 2025 00:00:00 +0000";
    assert_eq!(
        with(|m| m.received_detail = ReceivedDetail::NoClient),
        format!("Received: by mta.example with ESMTP id {id} for <b@b.example>; {date}")
    );
    // RFC 5321 §7.6.
    assert_eq!(
        with(|m| m.recipients.push("c@c.example".to_owned())),
        format!("Received: from client.example ([192.0.2.7]) by mta.example with ESMTP id {id}; {date}")
    );
    assert!(with(|m| m.client = Some("[2001:db8::1]:9".parse().unwrap())).contains(" ([IPv6:2001:db8::1]) "));
    assert!(with(|m| m.client = Some("[::ffff:192.0.2.1]:9".parse().unwrap())).contains(" ([192.0.2.1]) "));
    assert!(with(|m| m.helo.clear()).starts_with("Received: from [192.0.2.7] ([192.0.2.7]) by"));
    assert!(with(|m| m.client = None).starts_with("Received: by mta.example"));
    assert_eq!(with(|m| m.received_detail = ReceivedDetail::None), format!("Date: {date}"));
}

#[test]
fn fields_that_must_not_travel_are_taken_out() {
    let content = "Return-Path: <x@y>\r\nFrom: a@a.example\r\nBCC: secret@x.example,\r\n\tother@x.example\r\n\
                   X-Tenant: t\r\nTo: b@b.example\r\nx-job: j\r\nX-Campaign : c\r\nX-Virtual-MTA: bulk\r\n\
                   X-Schedule: {}\r\nBcc-Like: kept\r\n\r\nBcc: in the body\r\n";
    let mut config = config();
    config.tenants = vec![Tenant {
        name: "t".to_owned(),
        egress_pool: "bulk".to_owned(),
        domains: Vec::new(),
        priority: Priority::High,
        max_message_rate: None,
        max_injection_rate: None,
        retry: RetryRules::default(),
    }];
    let admitted = Policy::new(&config).unwrap().admit(NOW, received(content), [1, 2]).unwrap();
    assert_eq!((&admitted.envelope.tenant[..], admitted.envelope.priority), ("t", 0));
    assert_eq!(
        text(&admitted.content),
        "From: a@a.example\r\nTo: b@b.example\r\nBcc-Like: kept\r\n\r\nBcc: in the body\r\n"
    );
    assert_eq!(admitted.envelope.campaign, "c");
    assert_eq!(admitted.envelope.egress_pool, "bulk");
    assert_eq!(text(&admitted.content[admitted.body_start..]), "Bcc: in the body\r\n");
    assert_eq!(text(&admit("Bcc: x\r\n").unwrap().content), "");
}

#[test]
fn strangers_do_not_steer() {
    let mut message =
        received("X-Tenant: t\r\nX-Campaign: c\r\nX-Virtual-MTA: nowhere\r\nX-Schedule: nonsense\r\nTo: x\r\n\r\n");
    message.trusted = false;
    let admitted = policy().admit(NOW, message, [1, 2]).unwrap();
    assert_eq!(text(&admitted.content), "To: x\r\n\r\n");
    let envelope = admitted.envelope;
    assert_eq!((&envelope.campaign[..], &envelope.egress_pool[..]), ("", "default"));
    assert_eq!((envelope.first_attempt_ms, envelope.expires_ms), (NOW.wall_ms, NOW.wall_ms + 1_000_000));
}

#[test]
fn envelope_says_what_is_known() {
    let mut message = received(".\r\n");
    message.recipients.push("c@c.example".to_owned());
    let envelope = policy().admit(NOW, message, [1, 2]).unwrap().envelope;
    assert_eq!(envelope.reverse_path, "a@a.example");
    assert_eq!(envelope.recipients.iter().map(|r| &r.address[..]).collect::<Vec<_>>(), ["b@b.example", "c@c.example"]);
    assert_eq!(envelope.created_ms, NOW.wall_ms);
    assert_eq!(envelope.reception_protocol, "ESMTP");
    assert_eq!(envelope.client_address, "192.0.2.7:1234");
    assert_eq!(envelope.client_name, "client.example");
    assert_eq!((envelope.session_id, envelope.priority), (9, 1));
}

#[test]
fn virtual_mta_names_a_pool_or_a_source() {
    let pool = |value: &str| admit(&format!("X-Virtual-MTA: {value}\r\n\r\n")).map(|a| a.envelope.egress_pool);
    assert_eq!(pool("bulk").unwrap(), "bulk");
    assert_eq!(pool("ip-a").unwrap(), "ip-a");
    assert_eq!(pool("").unwrap(), "default");
    assert_eq!(
        pool("nowhere").unwrap_err().to_string(),
        "550 5.7.1 X-Virtual-MTA: no egress pool or source is called nowhere"
    );
    assert_eq!(pool(&"x".repeat(300)).unwrap_err().code(), 550);
}

#[test]
fn campaign_before_job() {
    let campaign = |content: &str| admit(content).unwrap().envelope.campaign;
    assert_eq!(campaign("X-Job: j\r\nX-Campaign: one\r\n\r\n"), "one");
    assert_eq!(campaign("X-Job: j\r\nX-Campaign:\r\n\r\n"), "j");
    assert_eq!(campaign("X-Campaign: folded\r\n name\r\n\r\n"), "folded name");
    assert_eq!(refused("X-Campaign: a\u{7}b\r\n\r\n"), "550 5.6.0 X-Campaign: the name is too long or not printable");
}

/// Which of two is meant nobody can know; with X-Tenant it decides whose mail it is.
#[test]
fn a_steering_field_says_one_thing() {
    let says = "is there more than once, and says different things; leave all but one out";
    for name in ["X-Tenant", "X-Campaign", "X-Job", "X-Virtual-MTA", "X-Schedule"] {
        let twice = |first: &str, second: &str| format!("{name}: {first}\r\nTo: x\r\n{name}: {second}\r\n\r\n");
        assert_eq!(refused(&twice("bulk", "default")), format!("550 5.6.0 {name}: {says}"));
        let mut stranger = received(twice("bulk", "default"));
        stranger.trusted = false;
        assert_eq!(text(&policy().admit(NOW, stranger, [1, 2]).unwrap().content), "To: x\r\n\r\n");
        for (first, second) in [("bulk", "bulk"), ("", "bulk"), ("bulk", "")] {
            let schedule = "{\"first_attempt\":\"2026-12-01T00:00:00Z\"}";
            let value =
                |text: &str| if name == "X-Schedule" { text.replace("bulk", schedule) } else { text.to_owned() };
            admit(&twice(&value(first), &value(second))).unwrap();
        }
    }
}

#[test]
fn schedule() {
    let times = |json: &str| {
        let envelope = admit(&format!("X-Schedule: {json}\r\n\r\n")).unwrap().envelope;
        (envelope.first_attempt_ms as i64 - NOW.wall_ms as i64, envelope.expires_ms as i64 - NOW.wall_ms as i64)
    };
    assert_eq!(times("{}"), (0, 1_000_000));
    assert_eq!(times(r#"{"first_attempt":"2025-12-01T01:00:00.500Z"}"#), (3_600_000, 4_600_000));
    assert_eq!(times(r#"{"first_attempt":"2025-12-01T02:00:00.5+01:00"}"#), (3_600_000, 4_600_000));
    assert_eq!(times(r#"{"first_attempt":"2001-01-01T00:00:00Z"}"#), (0, 1_000_000));
    assert_eq!(
        times("{\"first_attempt\":\"2025-12-01T01:00:00.5Z\",\r\n \"expires\":\"2025-12-01T02:00:00.5Z\"}"),
        (3_600_000, 7_200_000)
    );
    for (json, error) in [
        ("soon", "expected value"),
        ("[1]", "invalid type"),
        (r#"["2025-12-01T01:00:00Z",null]"#, "invalid type: sequence, expected an object"),
        (r#"{"first":"2025-12-01T00:00:00Z"}"#, "unknown field `first`"),
        (r#"{"expires":7}"#, "invalid type"),
        (r#"{"first_attempt":"tomorrow"}"#, "first_attempt is no RFC 3339 time"),
        (r#"{"first_attempt":"2025-12-01"}"#, "first_attempt is no RFC 3339 time"),
        (r#"{"expires":"2025-12-01T00:00:00Z"}"#, "expires before the first attempt"),
        (
            r#"{"first_attempt":"2025-12-01T03:00:00Z","expires":"2025-12-01T02:00:00Z"}"#,
            "expires before the first attempt",
        ),
    ] {
        let refusal = refused(&format!("X-Schedule: {json}\r\n\r\n"));
        assert!(refusal.starts_with("550 5.6.0 X-Schedule: "), "{refusal}");
        assert!(refusal.contains(error), "{refusal}");
    }
    assert!(refused(&format!("X-Schedule: {{{}\r\n\r\n", " ".repeat(2_000) + "}")).contains("too long"));
}

/// RFC 5321 §6.3.
#[test]
fn loops_are_cut() {
    assert!(admit(&"Received: x\r\n".repeat(100)).is_ok());
    assert_eq!(refused(&"received: x\r\n".repeat(101)), "554 5.4.6 too many Received fields: the message loops");
}

#[test]
fn messages_without_a_proper_header() {
    // Empty, or no header: nothing to separate.
    for content in ["", "\r\n", "\r\nbody\r\n", "Subject: only\r\n", "Subject: x\r\n\r\n"] {
        let admitted = admit(content).unwrap();
        assert_eq!(text(&admitted.content), content);
        assert!(!text(&admitted.prefix).ends_with("\r\n\r\n"), "{content:?}");
    }
    // The first line is no field: all is body, and stays.
    for content in [
        "just text\r\n",
        "just text\r\nBcc: x\r\n\r\nmore\r\n",
        " leading space: x\r\n",
        "\tBcc: x\r\n",
        ": x\r\n",
        "\u{e9}: x\r\n\r\n",
        "-----\r\n",
    ] {
        let admitted = admit(content).unwrap();
        assert_eq!(text(&admitted.content), content);
        assert!(text(&admitted.prefix).ends_with("\r\n\r\n"), "{content:?}");
        assert_eq!(admitted.body_start, 0);
    }
    // A broken block keeps all from the broken line on.
    let content = "To: x\r\nbroken line\r\nBcc: kept\r\nX-Campaign: not meant\r\n\r\nbody\r\n";
    let admitted = admit(content).unwrap();
    assert_eq!(text(&admitted.content), content);
    assert_eq!(admitted.envelope.campaign, "");
    let admitted = admit("Bcc: gone\r\nbroken line\r\nBcc: kept\r\n\r\nbody\r\n").unwrap();
    assert_eq!(text(&admitted.content), "broken line\r\nBcc: kept\r\n\r\nbody\r\n");
    // A mailbox file's separator.
    let content = "From a@a.example Mon Dec  1 00:00:00 2025\r\nSubject: x\r\nBcc: gone\r\n\r\nbody\r\n";
    let admitted = admit(content).unwrap();
    assert_eq!(text(&admitted.content), content.replace("Bcc: gone\r\n", ""));
    assert!(!text(&admitted.prefix).ends_with("\r\n\r\n"));
}

#[test]
fn properties_of_the_content() {
    let of = |content: &[u8], declared: bool| {
        let mut message = received(content);
        message.smtputf8_declared = declared;
        let envelope = policy().admit(NOW, message, [1, 2]).unwrap().envelope;
        (envelope.eight_bit, envelope.smtputf8, envelope.dot_lines)
    };
    assert_eq!(of(b"Subject: x\r\n\r\na\r\n", true), (false, false, false));
    assert_eq!(of(b"Subject: x\r\n\r\n\xff\r\n", true), (true, false, false));
    assert_eq!(of("Subject: \u{e9}\r\n\r\na\r\n".as_bytes(), true), (true, true, false));
    assert_eq!(of("Subject: \u{e9}\r\n\r\na\r\n".as_bytes(), false), (true, false, false));
    assert_eq!(of(b"Subject: x\r\n\r\n.\r\n", false), (false, false, true));
    assert_eq!(of(b".leading\r\n", false), (false, false, true));
    assert_eq!(of(b"Subject: x\r\n\r\na.\n.", false), (false, false, false));
    // What is taken out does not count.
    assert_eq!(of("Bcc: \u{e9}\r\nSubject: x\r\n\r\n".as_bytes(), true), (false, false, false));

    let mut message = received("");
    message.recipients = vec!["\u{e9}@b.example".to_owned()];
    let envelope = policy().admit(NOW, message, [1, 2]).unwrap().envelope;
    assert!(envelope.smtputf8);
    // By the Received field's `for`.
    assert!(envelope.eight_bit);
    let mut message = received("");
    message.reverse_path = "\u{e9}@b.example".to_owned();
    assert!(policy().admit(NOW, message, [1, 2]).unwrap().envelope.smtputf8);
}

#[test]
fn captured_headers() {
    let mut config = config();
    config.events.headers = ["subject", "X-Customer-*", "Message-ID", "Bcc"].map(str::to_owned).to_vec();
    let policy = Policy::new(&config).unwrap();
    let content = format!(
        "Subject: a\r\n b\r\nX-Customer-Id: 7\r\nX-Custom: no\r\nBcc: x\r\nX-CUSTOMER-: {}\r\n\r\nSubject: body\r\n",
        "\u{e9}".repeat(9_999)
    );
    let headers = policy.admit(NOW, received(content), [1, 2]).unwrap().envelope.headers;
    let names: Vec<&str> = headers.iter().map(|(name, _)| &name[..]).collect();
    assert_eq!(names, ["Subject", "X-Customer-Id", "Bcc", "X-CUSTOMER-", "Message-ID"]);
    assert_eq!(headers[0].1, "a b");
    assert_eq!(headers[3].1.len(), CAPTURED_VALUE_BYTES_MAX);
    assert!(headers[4].1.starts_with('<'));
    let many = policy.admit(NOW, received("Subject: x\r\n".repeat(500)), [1, 2]).unwrap();
    assert_eq!(many.envelope.headers.len(), CAPTURED_FIELDS_MAX);
}

#[test]
fn captured_metadata() {
    let mut config = config();
    let with = |meta: &[&str], config: &mut Config| {
        config.events.meta = meta.iter().map(|name| (*name).to_owned()).collect();
        let given = [("customer", "17"), ("customer_tag", &"é".repeat(9_999)), ("campaign", "own")];
        let given = given.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let message = Received { meta: given, ..received("X-Campaign: spring\r\n\r\nx\r\n") };
        Policy::new(config).unwrap().admit(NOW, message, [1, 2]).unwrap().envelope.meta
    };
    assert_eq!(with(&[], &mut config), []);
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(
        with(&["customer", "egress_pool", "tenant"], &mut config),
        [pair("customer", "17"), pair("egress_pool", "default")]
    );
    let all = with(&["*"], &mut config);
    let names: Vec<&str> = all.iter().map(|(name, _)| &name[..]).collect();
    let found = ["egress_pool", "received_from", "reception_protocol"];
    assert_eq!(names, [["customer", "customer_tag", "campaign"], found].concat());
    assert_eq!(all[1].1.len(), CAPTURED_VALUE_BYTES_MAX);
    assert_eq!(all[2], pair("campaign", "own"), "what its sender says counts");
}

pub(super) fn signing_config() -> Config {
    let mut config = config();
    config.dkim = vec![
        identity("a.example", "rsa", true, &[]),
        identity("a.example", "ed", false, &[]),
        identity("us.example", "co", false, &["*"]),
    ];
    config
}

fn signed(content: &[u8]) -> (Admitted, Vec<u8>) {
    let policy = Policy::new(&signing_config()).unwrap();
    let mut admitted = policy.admit(NOW, received(content), [1, 2]).unwrap();
    admitted.sign(NOW).unwrap();
    let message = [&admitted.prefix[..], &admitted.content].concat();
    (admitted, message)
}

#[test]
fn signatures_stand_under_received_and_verify() {
    let policy = Policy::new(&signing_config()).unwrap();
    let content = "Bcc: gone\r\nFrom: A <x@Sub.A.example>\r\nSubject: x\r\n\r\nbody\r\n";
    let mut admitted = policy.admit(NOW, received(content), [1, 2]).unwrap();
    assert_eq!((admitted.rsa_signatures(), admitted.ed25519_signatures()), (1, 2));
    let before = admitted.prefix.clone();
    admitted.sign(NOW).unwrap();
    assert_eq!((admitted.rsa_signatures(), admitted.ed25519_signatures()), (0, 0));
    let prefix = text(&admitted.prefix);
    let order: Vec<&str> = prefix
        .split("\r\n")
        .filter(|line| !line.starts_with('\t'))
        .map(|line| line.split(':').next().unwrap())
        .collect();
    let expected =
        ["Received", "DKIM-Signature", "DKIM-Signature", "DKIM-Signature", "Date", "Message-ID", "X-Postrider-Ref", ""];
    assert_eq!(order, expected);
    let unsigned = text(&before);
    assert!(prefix.starts_with(&unsigned[..unsigned.find("Date:").unwrap()]));
    assert!(prefix.ends_with(&unsigned[unsigned.find("Date:").unwrap()..]));

    let message = [&admitted.prefix[..], &admitted.content].concat();
    assert_eq!(verify(&message, &signing_config().dkim), [true, true, true]);
    // What we added is signed, too.
    let forged = text(&message).replace("Message-ID: <", "Message-ID: <f");
    assert_eq!(verify(forged.as_bytes(), &signing_config().dkim), [false, false, false]);
    // The next hop's Received is no harm.
    let relayed = [b"Received: from mta.example by mx.example\r\n", &message[..]].concat();
    assert_eq!(verify(&relayed, &signing_config().dkim), [true, true, true]);
}

#[test]
fn odd_messages_are_signed_so_that_they_verify() {
    for (content, signatures) in [
        (&b""[..], 1),
        (b"\r\n", 1),
        (b"\r\nbody only\r\n", 1),
        (b"no header at all\r\n\r\nreally\r\n", 1),
        (b"From: not an address\r\n\r\nx\r\n", 1),
        (b"From: a@other.example\r\n\r\nx\r\n", 1),
        (b"From: a@a.example\r\n", 3),
        (b"From: a@a.example\r\n\r\n", 3),
        (b"From: a@a.example\r\n\r\n\r\n\r\n", 3),
        (b"From: a@a.example\r\nSubject: \xe9\xff\r\n\r\n\xe9\r\n", 3),
        (b"Bcc: x\r\nFrom: a@a.example\r\nX-Job: 1\r\n\r\nx \r\n\r\n", 3),
        (b"From: a@a.example\r\nTo: 1@x\r\nTo: 2@x\r\nFrom: b@b.example\r\n\r\n.\r\n..\r\n", 3),
    ] {
        let (_, message) = signed(content);
        assert_eq!(verify(&message, &signing_config().dkim), vec![true; signatures], "{}", content.escape_ascii());
    }
}

#[test]
fn nobody_signs() {
    let mut admitted = admit("From: a@a.example\r\n\r\n").unwrap();
    let before = admitted.prefix.clone();
    admitted.sign(NOW).unwrap();
    assert_eq!(admitted.prefix, before);
}

fn header_line() -> impl Strategy<Value = (&'static str, bool)> {
    prop::sample::select(vec![
        ("Subject: x\r\n", false),
        ("To: a@b.example,\r\n c@d.example\r\n", false),
        ("X-Long: \r\n\t\r\n \r\n", false),
        ("Date: x\r\n", false),
        ("Resent-Bcc: x\r\n", false),
        ("X-8: \u{e9}\r\n", false),
        (".dot: x\r\n", false),
        ("Bcc: x\r\n", true),
        ("RETURN-PATH:\r\n\t<>\r\n", true),
        ("X-Tenant\t: \r\n", true),
        ("X-Job: \r\n", true),
        ("bcc:\r\n", true),
    ])
}

proptest! {
    #[test]
    fn all_else_stays_byte_for_byte(
        lines in prop::collection::vec(header_line(), 0..12),
        body in prop::sample::select(vec![
            "", "\r\n", "\r\nBcc: x\r\n", "\r\n.\r\n", "junk\r\nBcc: x\r\n\r\n", "\r\n\r\n\u{e9}",
        ]),
    ) {
        // Without a header, `junk` is the first line, and so is body; with one, it breaks it. It stays either way.
        let content: String = lines.iter().map(|(line, _)| *line).chain([body]).collect();
        let kept: String = lines.iter().filter(|(_, gone)| !gone).map(|(line, _)| *line).chain([body]).collect();
        let admitted = admit(&content).unwrap();
        prop_assert_eq!(text(&admitted.content), &kept);
        prop_assert_eq!(admitted.envelope.dot_lines, format!("\r\n{kept}").contains("\r\n."));
        prop_assert!(admitted.prefix.ends_with(b"\r\n"));
        let body_start = admitted.body_start;
        prop_assert!(body_start >= admitted.header_end && body_start <= kept.len());
    }

    #[test]
    fn nothing_panics(content in prop::collection::vec(any::<u8>(), 0..200), trusted: bool) {
        let mut message = received(content);
        message.trusted = trusted;
        let policy = policy();
        if let Ok(mut admitted) = policy.admit(NOW, message, [3, 4]) {
            admitted.sign(NOW).unwrap();
        }
    }
}
