//! Any content through the policy at acceptance: the body stays octet for octet, what must not travel is gone, what is
//! added is there once, and it can be signed.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use postrider::accept::smtp_data::clean_content;
use postrider::accept::{Policy, Received};
use postrider::config::{Config, DkimIdentity, DkimKeyPem, LineEndings, ReceivedDetail};
use postrider::mail::header;
use postrider::mail::time::Now;
use postrider_spool::record::DsnParameters;

pub(crate) fn run(octets: &[u8]) {
    let [choices, content @ ..] = octets else { return };
    let Ok(content) = clean_content(content, LineEndings::Fix, 1 << 20) else { return };
    let now = Now { monotonic: Duration::ZERO, wall_ms: 1_764_547_200_000 };
    let Ok(mut admitted) = policy().admit(now, received(*choices, content.clone()), [1, 2]) else { return };
    admitted.sign(now).expect("it can be signed");

    assert!(admitted.prefix.is_empty() || admitted.prefix.ends_with(b"\r\n"));
    assert!(admitted.envelope.expires_ms >= admitted.envelope.first_attempt_ms);
    assert_eq!(admitted.envelope.recipients.len(), 1);
    let body = &content[header::body_start(&content)..];
    assert!(admitted.content.ends_with(body), "the body arrives as it was sent");

    let wire = [&admitted.prefix[..], &admitted.content].concat();
    assert!(wire.ends_with(body));
    let has_junk = header::lines(&content).any(|line| matches!(line, header::Line::Junk { .. }));
    if has_junk {
        return;
    }
    for name in ["X-Tenant", "X-Campaign", "X-Job", "X-Virtual-MTA", "X-Schedule", "Return-Path", "Bcc"] {
        assert!(!header::fields(&wire).any(|field| field.is(name)), "{name} travels");
    }
    for name in ["Date", "Message-ID"] {
        let sent = header::fields(&content).filter(|field| field.is(name)).count();
        assert_eq!(header::fields(&wire).filter(|field| field.is(name)).count(), sent.max(1), "{name}");
    }
    // The key signs for everybody; a message without a From has no domain and is co-signed all the same.
    assert_eq!(header::fields(&admitted.prefix).filter(|field| field.is("DKIM-Signature")).count(), 1);
}

fn received(choices: u8, content: Vec<u8>) -> Received {
    Received {
        reverse_path: "a@b.example".to_owned(),
        recipients: vec!["c@d.example".to_owned()],
        content,
        eight_bit_declared: true,
        smtputf8_declared: choices & 1 != 0,
        helo: "client.example".to_owned(),
        protocol: "ESMTP",
        client: (choices & 2 != 0).then(|| ([192, 0, 2, 7], 40_000).into()),
        session_id: 7,
        trusted: choices & 4 != 0,
        received_detail: [ReceivedDetail::Full, ReceivedDetail::NoClient, ReceivedDetail::None]
            [usize::from(choices >> 3) % 3],
        dsn: DsnParameters::default(),
        meta: Vec::new(),
    }
}

fn policy() -> &'static Policy {
    static POLICY: OnceLock<Policy> = OnceLock::new();
    POLICY.get_or_init(|| {
        let mut config = Config::new("mta.example");
        config.events.headers = vec!["Subject".to_owned(), "X-*".to_owned()];
        let key = DkimKeyPem::from_pem(PathBuf::from("rfc8463.pem"), KEY.to_owned()).expect("a key");
        config.dkim.push(DkimIdentity {
            domain: "football.example.com".to_owned(),
            selector: "brisbane".to_owned(),
            key: Arc::new(key),
            sign_for: vec!["*".to_owned()],
            headers: Vec::new(),
        });
        Policy::new(&config).expect("a policy")
    })
}

/// The published key of RFC 8463 §A.1, as PKCS#8.
const KEY: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g
-----END PRIVATE KEY-----
";
