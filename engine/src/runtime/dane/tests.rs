//! Handshakes in memory with peers whose certificates TLSA records name, or don't.

use aws_lc_rs::digest::{SHA256, SHA512, digest};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PublicKeyData as _};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::PrivateKeyDer;

use super::*;
use crate::deliver::dane::{HostDane, TlsaRecord};
use crate::deliver::tls_policy::HandshakeError;
use crate::runtime::tls::TlsSession;

/// A certificate of its own, and the CA that signed it.
struct Peer {
    certificate: CertificateDer<'static>,
    key: KeyPair,
    ca: CertificateDer<'static>,
    ca_key: Vec<u8>,
}

impl Peer {
    fn new(names: &[&str]) -> Self {
        Self::with(names, |_| {})
    }

    fn with(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut of_ca = CertificateParams::new(Vec::new()).unwrap();
        of_ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().unwrap();
        let ca = of_ca.self_signed(&ca_key).unwrap().der().clone();
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut parameters = CertificateParams::new(names).unwrap();
        change(&mut parameters);
        let key = KeyPair::generate().unwrap();
        let ca_key_der = ca_key.subject_public_key_info();
        let certificate = parameters.signed_by(&key, &Issuer::new(of_ca, ca_key)).unwrap().der().clone();
        Self { certificate, key, ca, ca_key: ca_key_der }
    }

    /// Shows these certificates, and signs with this key, whosever it is.
    fn server(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Arc<ServerConfig> {
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let shown = CertifiedKey::new(chain, any_supported_type(&key).unwrap());
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
        Arc::new(config)
    }

    fn with_chain(&self) -> Arc<ServerConfig> {
        Self::server(vec![self.certificate.clone(), self.ca.clone()], &self.key)
    }

    fn alone(&self) -> Arc<ServerConfig> {
        Self::server(vec![self.certificate.clone()], &self.key)
    }

    fn record(&self, usage: u8, selector: u8, matching: u8) -> TlsaRecord {
        let (certificate, key) = match usage {
            2 => (&self.ca, self.ca_key.clone()),
            _ => (&self.certificate, self.key.subject_public_key_info()),
        };
        let selected = if selector == 0 { certificate.to_vec() } else { key };
        let data = match matching {
            1 => digest(&SHA256, &selected).as_ref().to_vec(),
            2 => digest(&SHA512, &selected).as_ref().to_vec(),
            _ => selected,
        };
        TlsaRecord { usage, selector, matching, data }
    }
}

fn policy(records: impl IntoIterator<Item = TlsaRecord>) -> Arc<DanePolicy> {
    let HostDane::Usable(policy) = HostDane::of_records("mx.a.test", &["a.test".to_owned()], records) else {
        panic!("the records are usable");
    };
    policy
}

/// Whether the session was resumed, or why there is none.
fn shake_hands(verifiers: &DaneVerifiers, policy: &Arc<DanePolicy>, with: &Arc<ServerConfig>) -> Result<bool, String> {
    let mut client = TlsSession::client(&verifiers.of(policy), &policy.base).unwrap();
    let mut server = TlsSession::server(with).unwrap();
    let mut nothing = Vec::new();
    loop {
        let mut wire = Vec::new();
        client.poll_wire(&mut wire);
        server.handle_received(&wire, &mut nothing).map_err(|error| format!("the server: {error}"))?;
        wire.clear();
        server.poll_wire(&mut wire);
        if wire.is_empty() {
            return Ok(client.facts().resumed);
        }
        client.handle_received(&wire, &mut nothing).map_err(|error| {
            let HandshakeError { failure, text } = error.into();
            format!("{}: {text}", failure.name())
        })?;
    }
}

fn check(records: impl IntoIterator<Item = TlsaRecord>, with: &Arc<ServerConfig>) -> Result<(), String> {
    shake_hands(&DaneVerifiers::default(), &policy(records), with).map(|_| ())
}

#[track_caller]
fn assert_refused(result: Result<(), String>, because: &str) {
    let error = result.unwrap_err();
    assert!(error.contains(because), "{error}");
}

/// RFC 7672 §3.1.1: neither the names in the certificate nor its dates count.
#[test]
fn a_certificate_that_a_record_names_is_good_whatever_it_says() {
    let peer = Peer::with(&["other.test"], |parameters| parameters.not_after = rcgen::date_time_ymd(2001, 1, 1));
    for (selector, matching) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
        check([peer.record(3, selector, matching)], &peer.alone()).unwrap();
    }
    let stranger = Peer::new(&["mx.a.test"]);
    for (selector, matching) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
        let result = check([peer.record(3, selector, matching)], &stranger.with_chain());
        assert_refused(
            result,
            &format!("tlsa-invalid: invalid peer certificate: no TLSA record (3 {selector} {matching}) names"),
        );
    }
    // RFC 7672 §2.2: one of several is enough, for example while a key is changed.
    check([stranger.record(3, 1, 1), peer.record(3, 1, 1)], &peer.alone()).unwrap();
}

/// RFC 7672 §3.1.2, §3.2.2.
#[test]
fn a_trust_anchor_vouches_for_a_chain_with_one_of_our_names() {
    for name in ["mx.a.test", "a.test", "*.a.test"] {
        let peer = Peer::new(&[name]);
        for (selector, matching) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            check([peer.record(2, selector, matching)], &peer.with_chain()).unwrap();
        }
    }
    let peer = Peer::new(&["mx.other.test"]);
    let not_for =
        "certificate-host-mismatch: invalid peer certificate: the peer's certificate is not for mx.a.test nor a.test";
    assert_refused(check([peer.record(2, 1, 1)], &peer.with_chain()), not_for);
    let expired = Peer::with(&["mx.a.test"], |parameters| parameters.not_after = rcgen::date_time_ymd(2001, 1, 1));
    assert_refused(check([expired.record(2, 1, 1)], &expired.with_chain()), "certificate-expired: ");
}

#[test]
fn a_trust_anchor_has_to_be_in_the_chain_or_whole_in_the_record() {
    let peer = Peer::new(&["mx.a.test"]);
    assert_refused(check([peer.record(2, 0, 1)], &peer.alone()), "no TLSA record (2 0 1)");
    check([peer.record(2, 0, 0)], &peer.alone()).unwrap();
    // The anchor is shown, but has not signed.
    let stranger = Peer::new(&["mx.a.test"]);
    let borrowed = Peer::server(vec![stranger.certificate.clone(), peer.ca.clone()], &stranger.key);
    assert_refused(check([peer.record(2, 0, 1)], &borrowed), "certificate-not-trusted: ");
    // A record that names the peer's own certificate as an anchor is none for itself.
    let own = TlsaRecord { usage: 2, ..peer.record(3, 0, 1) };
    assert_refused(check([own], &peer.with_chain()), "no TLSA record (2 0 1)");
}

/// A certificate is public: who shows it has to have its key.
#[test]
fn somebody_elses_certificate_is_of_no_use() {
    let (peer, thief) = (Peer::new(&["mx.a.test"]), Peer::new(&["mx.a.test"]));
    let stolen = Peer::server(vec![peer.certificate.clone(), peer.ca.clone()], &thief.key);
    for usage in [2, 3] {
        assert_refused(check([peer.record(usage, 1, 1)], &stolen), "BadSignature");
    }
}

#[test]
fn sessions_are_resumed_under_the_same_records_only() {
    let peer = Peer::new(&["mx.a.test"]);
    let server = peer.with_chain();
    let verifiers = DaneVerifiers::default();
    let (key, anchor) = (policy([peer.record(3, 1, 1)]), policy([peer.record(2, 1, 1)]));
    assert_eq!(shake_hands(&verifiers, &key, &server), Ok(false));
    assert_eq!(shake_hands(&verifiers, &policy([peer.record(3, 1, 1)]), &server), Ok(true), "they are the same");
    assert_eq!(shake_hands(&verifiers, &anchor, &server), Ok(false));
    let stranger = policy([Peer::new(&["mx.a.test"]).record(3, 1, 1)]);
    assert!(shake_hands(&verifiers, &stranger, &server).is_err(), "no session may stand in for the check");
    for count in 0..DANE_VERIFIERS_MAX as u32 {
        let mut record = peer.record(3, 1, 1);
        record.data[..4].copy_from_slice(&count.to_be_bytes());
        verifiers.of(&policy([record]));
    }
    assert!(verifiers.0.borrow().len() <= DANE_VERIFIERS_MAX);
    assert_eq!(shake_hands(&verifiers, &key, &server), Ok(false), "what made room begins anew");
}
