//! Tests of signing: mail-auth verifies what was signed.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Instant;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{EcdsaKeyPair, Ed25519KeyPair};
use mail_auth::common::parse::TxtRecordParser;
use mail_auth::common::verify::DomainKey;
use mail_auth::{AuthenticatedMessage, DkimResult, MessageAuthenticator, ResolverCache, Txt};
use proptest::prelude::*;

use super::*;
use crate::config::DkimKeyPem;

static RSA_PKCS8: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let key = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
    AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&key).unwrap().as_ref().to_vec()
});

static ED25519_PKCS8: LazyLock<Vec<u8>> =
    LazyLock::new(|| Ed25519KeyPair::generate_pkcs8v1(&SystemRandom::new()).unwrap().as_ref().to_vec());

fn pem(label: &str, der: &[u8]) -> String {
    let text = BASE64.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

pub(crate) fn identity(domain: &str, selector: &str, rsa: bool, sign_for: &[&str]) -> DkimIdentity {
    let der = if rsa { &*RSA_PKCS8 } else { &*ED25519_PKCS8 };
    DkimIdentity {
        domain: domain.to_owned(),
        selector: selector.to_owned(),
        key: Arc::new(DkimKeyPem::from_pem(PathBuf::from("key.pem"), pem("PRIVATE KEY", der)).unwrap()),
        sign_for: sign_for.iter().map(|domain| (*domain).to_owned()).collect(),
        headers: Vec::new(),
    }
}

/// DNS as a map: mail-auth asks its cache first.
struct Records(HashMap<Box<str>, Txt>);

impl ResolverCache<Box<str>, Txt> for Records {
    fn get<Q: Hash + Eq + ?Sized>(&self, name: &Q) -> Option<Txt>
    where
        Box<str>: Borrow<Q>,
    {
        self.0.get(name).cloned()
    }

    fn remove<Q: Hash + Eq + ?Sized>(&self, _name: &Q) -> Option<Txt>
    where
        Box<str>: Borrow<Q>,
    {
        None
    }

    fn insert(&self, _key: Box<str>, _value: Txt, _valid_until: Instant) {}
}

/// Every signature of `message` → whether mail-auth's verifier takes it, with the published keys of `identities`.
pub(crate) fn verify(message: &[u8], identities: &[DkimIdentity]) -> Vec<bool> {
    let record = |identity: &DkimIdentity| {
        let (name, record) = identity.dns_record();
        let key = DomainKey::parse(record.as_bytes()).unwrap();
        (format!("{name}.").into_boxed_str(), Txt::DomainKey(Arc::new(key)))
    };
    let records = Records(identities.iter().map(record).collect());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let authenticator = MessageAuthenticator::new_google().unwrap();
        let message = AuthenticatedMessage::parse(message).unwrap();
        let parameters = mail_auth::Parameters::from(&message).with_txt_cache(&records);
        let results = authenticator.verify_dkim(parameters).await;
        results.iter().map(|output| *output.result() == DkimResult::Pass).collect()
    })
}

fn both() -> Vec<DkimIdentity> {
    vec![identity("a.example", "rsa", true, &[]), identity("a.example", "ed", false, &[])]
}

/// `header` + CRLF + `body`, with signatures in front.
fn signed(identities: &[DkimIdentity], header: &str, body: &[u8]) -> Vec<u8> {
    let signers = Signers::new(identities).unwrap();
    let chosen: Vec<usize> = (0..identities.len()).collect();
    let mut message = signers.sign(&chosen, &[header.as_bytes()], &BodyHash::of(body), 1_764_547_200).unwrap();
    message.extend_from_slice(header.as_bytes());
    message.extend_from_slice(b"\r\n");
    message.extend_from_slice(body);
    message
}

const HEADER: &str = "From: A <a@a.example>\r\nTo: b@b.example,\r\n\tc@c.example\r\nSubject:  two  words \r\n";

#[test]
fn verifies_with_both_algorithms() {
    let message = signed(&both(), HEADER, b"Hello\r\n");
    assert_eq!(verify(&message, &both()), [true, true]);
    let text = String::from_utf8(message).unwrap();
    assert!(
        text.starts_with(
            "DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed;\r\n\td=a.example; s=rsa; t=1764547200;"
        )
    );
    assert!(text.lines().all(|line| line.len() <= 78));
    // A changed octet anywhere is noticed.
    assert_eq!(verify(text.replace("Hello", "hello").as_bytes(), &both()), [false, false]);
    assert_eq!(verify(text.replace("two", "three").as_bytes(), &both()), [false, false]);
}

/// RFC 6376 §3.4.4 and §3.4.6.
#[test]
fn body_corner_cases_verify() {
    for body in [
        &b""[..],
        b"\r\n",
        b"\r\n\r\n\r\n",
        b"no final line ending",
        b"text\r\n\r\n\r\n",
        b"text \t \r\nmore\t\ttext  \r\n",
        b"  leading\r\n\t\r\n inner empty line\r\n",
        b"\r\n\r\nfirst lines empty\r\n",
        b"text \r\n",
        b"text ",
        b"8-bit \xe4\xf6\xfc \xff\x80\r\n",
        b".\r\n..\r\n",
    ] {
        let message = signed(&both(), HEADER, body);
        assert_eq!(verify(&message, &both()), [true, true], "{}", body.escape_ascii());
    }
}

/// RFC 6376 §3.4.4, word by word.
fn canonical_body(body: &[u8]) -> Vec<u8> {
    let mut lines: Vec<Vec<u8>> = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        let (line, next) = match rest.windows(2).position(|w| w == b"\r\n") {
            Some(at) => (&rest[..at], &rest[at + 2..]),
            None => (rest, &b""[..]),
        };
        rest = next;
        let mut reduced = Vec::new();
        for octet in line {
            match octet {
                b' ' | b'\t' if reduced.last() == Some(&b' ') => {}
                b' ' | b'\t' => reduced.push(b' '),
                octet => reduced.push(*octet),
            }
        }
        if reduced.last() == Some(&b' ') {
            reduced.pop();
        }
        lines.push(reduced);
    }
    while lines.last().is_some_and(Vec::is_empty) {
        lines.pop();
    }
    lines.iter().flat_map(|line| [&line[..], b"\r\n"].concat()).collect()
}

fn sha256(octets: &[u8]) -> Vec<u8> {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, octets).as_ref().to_vec()
}

/// Where mail-auth's own canonicalization differs; all other verifiers follow the RFC.
#[test]
fn bodies_that_end_with_lines_of_white_space() {
    for body in [&b"text\r\n \r\n"[..], b"text\r\n\t\r\n \r\n\r\n", b" \r\n", b"\r\n \t", b"text\r\n "] {
        let expected = sha256(&canonical_body(body));
        assert_eq!(body_hash(body).as_ref(), expected, "{}", body.escape_ascii());
    }
    // RFC 6376 §3.4.4: the hash of nothing.
    assert_eq!(BASE64.encode(body_hash(b" \r\n")), "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
}

#[test]
fn header_is_covered_and_over_signed() {
    let message = signed(&both()[..1], "From: a@a.example\r\nComments: x\r\n", b"body\r\n");
    let text = String::from_utf8(message.clone()).unwrap();
    let unfolded = text.replace("\r\n\t", " ");
    assert!(unfolded.contains("; h=From:From:To:Cc:Subject:Date:Reply-To; bh="), "{unfolded}");
    assert_eq!(verify(&message, &both()), [true]);
    // What no name stands for may be added; what one stands for may not, whether it was there or not.
    for (added, passes) in [
        ("Comments: y\r\n", true),
        ("Sender: z@z.example\r\n", true),
        ("From: evil@evil.example\r\n", false),
        ("To: evil@evil.example\r\n", false),
        ("subject: evil\r\n", false),
        ("Reply-To: evil@evil.example\r\n", false),
    ] {
        assert_eq!(verify(format!("{added}{text}").as_bytes(), &both()), [passes], "{added}");
        let below = text.replace("Comments: x\r\n", &format!("Comments: x\r\n{added}"));
        assert_eq!(verify(below.as_bytes(), &both()), [passes], "{added} below");
    }
}

/// RFC 6376 §5.4.2: repeated fields count from the bottom.
#[test]
fn repeated_fields_are_signed_each() {
    let header =
        "From: a@a.example\r\nTo: one@b.example\r\nReferences: <1@x>\r\nTo: two@b.example\r\nFROM: b@a.example\r\n";
    let message = signed(&both(), header, b"body\r\n");
    assert_eq!(verify(&message, &both()), [true, true]);
    let text = String::from_utf8(message).unwrap();
    let unfolded = text.replace("\r\n\t", " ");
    assert!(unfolded.contains("h=From:From:From:To:To:To:Cc:Subject:Date:Reply-To:References; bh="), "{unfolded}");
    for (from, to) in [("one@", "uno@"), ("two@", "due@"), ("b@a", "c@a"), ("To: one@b.example\r\n", "")] {
        assert_eq!(verify(text.replacen(from, to, 1).as_bytes(), &both()), [false, false], "{from}");
    }
}

#[test]
fn odd_header_fields_verify() {
    let long = "x".repeat(100_000);
    for header in [
        "From: a@a.example\r\nSubject:\r\n".to_owned(),
        "From: a@a.example\r\nSubject: \r\n \r\n".to_owned(),
        "From:a@a.example\r\nSubject:\tx\ty\r\n\t z\r\n".to_owned(),
        "From: \u{e4} <a@a.example>\r\nSubject: \u{1f4e7}\r\n".to_owned(),
        format!("From: a@a.example\r\nSubject: {long}\r\n {long}\r\n"),
        "Subject: no From at all\r\n".to_owned(),
    ] {
        let message = signed(&both(), &header, b"body\r\n");
        assert_eq!(verify(&message, &both()), [true, true], "{}", &header[..header.len().min(80)]);
    }
}

#[test]
fn fields_beyond_the_bound_stay_unsigned() {
    let header = format!("From: a@a.example\r\n{}", "To: b@b.example\r\n".repeat(2 * SIGNED_FIELDS_MAX));
    let message = signed(&both()[1..], &header, b"body\r\n");
    assert_eq!(verify(&message, &both()), [true]);
    assert!(message.len() < header.len() + 16 * SIGNED_FIELDS_MAX);
}

#[test]
fn who_signs() {
    let signers = Signers::new(&[
        identity("a.example", "s0", false, &[]),
        identity("a.example", "s1", true, &["A.example"]),
        identity("x.example", "s2", false, &["sub.a.example", "other.example"]),
        identity("us.example", "s3", false, &["*"]),
    ])
    .unwrap();
    assert_eq!(signers.select(Some("a.example")), [0, 1, 3]);
    assert_eq!(signers.select(Some("deep.a.example")), [0, 1, 3]);
    assert_eq!(signers.select(Some("sub.a.example")), [2, 3]);
    assert_eq!(signers.select(Some("x.sub.a.example")), [2, 3]);
    assert_eq!(signers.select(Some("nota.example")), [3]);
    assert_eq!(signers.select(Some("example")), [3]);
    assert_eq!(signers.select(None), [3]);
    assert!(signers.is_rsa(1) && !signers.is_rsa(0));
    // RFC 6531 mail: the From domain in letters, the configured one as in the DNS.
    let signers = Signers::new(&[identity("xn--bcher-kva.example", "s0", false, &[])]).unwrap();
    assert_eq!(signers.select(Some("b\u{fc}cher.example")), [0]);
}

#[test]
fn chosen_headers() {
    let mut identity = identity("a.example", "ed", false, &[]);
    identity.headers = vec!["subject".to_owned(), "X-Kept".to_owned()];
    let identities = [identity];
    let message = signed(&identities, "From: a@a.example\r\nX-Kept: 1\r\nSubject: s\r\nTo: t@t.example\r\n", b"");
    let text = String::from_utf8(message.clone()).unwrap();
    assert!(text.contains("h=From:From:subject:subject:X-Kept;"), "{text}");
    assert_eq!(verify(&message, &identities), [true]);
}

#[test]
fn keys_in_every_form() {
    // RFC 5958 §2: in PKCS#8 the PKCS#1 key is the last value, behind 26 octets of wrapping.
    assert!(load_key(&pem("RSA PRIVATE KEY", &RSA_PKCS8[26..])).unwrap().is_rsa());
    assert!(load_key(&pem("PRIVATE KEY", &RSA_PKCS8)).unwrap().is_rsa());
    assert!(!load_key(&pem("PRIVATE KEY", &ED25519_PKCS8)).unwrap().is_rsa());
    let version_2 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    assert!(!load_key(&pem("PRIVATE KEY", version_2.as_ref())).unwrap().is_rsa());
    // Text around the key, as `openssl rsa -text` writes it.
    assert!(load_key(&format!("Private-Key: (2048 bit)\n{}", pem("PRIVATE KEY", &RSA_PKCS8))).is_ok());
}

#[test]
fn keys_that_are_refused() {
    let ecdsa =
        EcdsaKeyPair::generate_pkcs8(&aws_lc_rs::signature::ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
            .unwrap();
    for (pem, error) in [
        (String::new(), "no private key in PEM form"),
        ("garbage".to_owned(), "no private key in PEM form"),
        (pem("CERTIFICATE", b"x"), "no private key in PEM form"),
        (RSA_1024.to_owned(), "the RSA key is shorter than 2048 bits"),
        (pem("RSA PRIVATE KEY", b"\x30\x82"), "neither a usable RSA nor a usable Ed25519 key"),
        (pem("PRIVATE KEY", &RSA_PKCS8[..100]), "neither a usable RSA nor a usable Ed25519 key"),
        (pem("PRIVATE KEY", ecdsa.as_ref()), "neither a usable RSA nor a usable Ed25519 key"),
        (pem("ENCRYPTED PRIVATE KEY", b"x"), "encrypted"),
    ] {
        let refused = load_key(&pem).unwrap_err();
        assert!(refused.contains(error), "{pem}: {refused}");
    }
}

/// What `openssl genrsa -traditional 1024` writes.
const RSA_1024: &str = "\
-----BEGIN RSA PRIVATE KEY-----
MIICXgIBAAKBgQDXXrSW3UKrUEq/6oQOln6LXowkUHu9egjdFHEmQKJ1TV/5Bhbv
kBfBkBejkQ6yE4p2u3DwrxUXqVtPl+dRfI95tuVvC+B8Ti6/JV0PDNAQ+8CJVBAH
PvSaUe0rcN8vmK7Mkm6pRciC0DLcgdXpAuAqIBOgAMK1eW6PWOrKHyGFgwIDAQAB
AoGATEsQTiEzbNyUnkfFYCWPzm8/1d1s+EIywZ5sNtDOvB8c0GqH1XWF9NvGg/ru
6cZiVo0wBRMAtdEYt6loGEW3zQ92TM8gz0fAvp8TAQW3R+nparPIyNr9sB8AN75C
0VtegGvDEtwNi1c75kN8ftWs5pKFheB8kjoKnE7PEDbhLwECQQD6pbaHq7mqakxV
rh3BZmXsclAX0chWXU6O+XccgBSuaxNhmAFranRvbUn/iXs+u9yo7piT+2qYadIm
Q8ZSqdXJAkEA2/ghm9+9E3KDwCO8+aJUEQ4g6zkqk9UZsSD4+kaV6CYhK9wj5JiM
pjSTC4fcL/zS2ldlOCzi44X+BS86x4MW6wJBAOgPZyjDeHnsQtKNC2WVLca1q6vy
AZ7ccrBzDbGob/1wi5gvCRlvjW/g6sMZga76dfk+NqvD+dQ1HWlqFINSVOkCQQDV
SWF9PJKfGrh5Q63m9+k/qE1vBz0rnsOMpoYEVxDfyqj7WDdNXkVymyPBWHi95w2k
PH2e3JcbOj82U7dQ4OEFAkEAxY0WdO9rpD/vqbzoBoCodpOZCWCrIuljc410UYXW
dZSGw3HZHt+uh8l2w+iYXlij86Bxa55ylxYDN8gMFqYykw==
-----END RSA PRIVATE KEY-----";

proptest! {
    #[test]
    fn body_hash_follows_the_rfc(parts in prop::collection::vec(prop_oneof![
        Just("\r\n"), Just(" "), Just("\t"), Just("a"), Just("\u{ff}"), Just("long enough for words"),
    ], 0..24)) {
        let body = parts.concat().into_bytes();
        let expected = sha256(&canonical_body(&body));
        prop_assert_eq!(body_hash(&body).as_ref().to_vec(), expected);
    }

    #[test]
    fn no_signature_has_a_long_line_or_a_bare_line_ending(
        domain in "[a-z]{1,40}\\.example",
        selector in "[a-z0-9]{1,30}",
        wall_s in 1_u64..10_000_000_000,
        extra in 0_usize..40,
    ) {
        let identities = [identity(&domain, &selector, false, &[])];
        let header = format!("From: a@{domain}\r\n{}", "To: x@x.example\r\n".repeat(extra));
        let signers = Signers::new(&identities).unwrap();
        let signature = signers.sign(&[0], &[header.as_bytes()], &BodyHash::of(b"x\r\n"), wall_s).unwrap();
        let text = String::from_utf8(signature).unwrap();
        for line in text.strip_suffix("\r\n").unwrap().split("\r\n") {
            prop_assert!(line.len() <= 110 && !line.contains(['\r', '\n']) && !line.ends_with([' ', '\t']));
        }
        let message = format!("{text}{header}\r\nx\r\n");
        prop_assert_eq!(verify(message.as_bytes(), &identities), [true]);
    }
}
