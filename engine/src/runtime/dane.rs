//! Certificates checked by TLSA records (RFC 7672 §3).
//!
//! A verifier for each set of records, with sessions of its own: a session is resumed only under the records that its
//! certificate was checked by. Bounded; a set that is forgotten costs handshakes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::tls::{TlsError, TlsVerifier, provider};
use crate::deliver::dane::DanePolicy;
use crate::deliver::tls_policy::TlsFailure;
use crate::limits::{DANE_SESSIONS_MAX, DANE_VERIFIERS_MAX};

/// A shard's verifiers by sets of TLSA records.
#[derive(Debug, Default)]
pub(super) struct DaneVerifiers(RefCell<HashMap<Arc<DanePolicy>, TlsVerifier>>);

impl DaneVerifiers {
    pub(super) fn of(&self, policy: &Arc<DanePolicy>) -> TlsVerifier {
        let mut verifiers = self.0.borrow_mut();
        if verifiers.len() >= DANE_VERIFIERS_MAX && !verifiers.contains_key(policy) {
            verifiers.clear();
        }
        let made = || {
            let verifier = Dane { policy: Arc::clone(policy), provider: provider() };
            TlsVerifier::custom(Arc::new(verifier), DANE_SESSIONS_MAX)
        };
        verifiers.entry(Arc::clone(policy)).or_insert_with(made).clone()
    }
}

#[derive(Debug)]
struct Dane {
    policy: Arc<DanePolicy>,
    provider: Arc<CryptoProvider>,
}

impl Dane {
    fn check(
        &self,
        shown: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), TlsError> {
        let certificate = EndEntityCert::try_from(shown).map_err(|error| unreadable(&error))?;
        // RFC 7672 §3.1.1: neither names nor dates count; the records are the domain's own word, and have their own.
        if self.policy.names_certificate(shown, &certificate.subject_public_key_info()) {
            return Ok(());
        }
        let mut anchors = Vec::new();
        for intermediate in intermediates {
            // One that can't be read is no anchor; whether it is needed shows below.
            let Ok(read) = EndEntityCert::try_from(intermediate) else { continue };
            if self.policy.names_anchor(intermediate, &read.subject_public_key_info()) {
                anchors.push(intermediate.clone());
            }
        }
        anchors.extend(self.policy.whole_anchors().map(CertificateDer::from));
        let anchors: Vec<_> = anchors.iter().filter_map(|anchor| anchor_from_trusted_cert(anchor).ok()).collect();
        if anchors.is_empty() {
            let text = format!("no TLSA record ({}) names the peer's certificate", self.policy);
            return Err(TlsError::of(TlsFailure::TlsaInvalid, text));
        }
        let algorithms = self.provider.signature_verification_algorithms.all;
        certificate
            .verify_for_usage(algorithms, &anchors, intermediates, now, KeyUsage::server_auth(), None, None)
            .map_err(|error| not_vouched_for(&error))?;
        // RFC 7672 §3.2.2.
        let is_for = |name: &str| {
            ServerName::try_from(name).is_ok_and(|name| certificate.verify_is_valid_for_subject_name(&name).is_ok())
        };
        if !self.policy.names().any(is_for) {
            let names = self.policy.names().collect::<Vec<_>>().join(" nor ");
            let text = format!("the peer's certificate is not for {names}");
            return Err(TlsError::of(TlsFailure::CertificateHostMismatch, text));
        }
        Ok(())
    }
}

fn not_vouched_for(error: &webpki::Error) -> TlsError {
    let failure = match error {
        webpki::Error::CertExpired { .. } => TlsFailure::CertificateExpired,
        _ => TlsFailure::CertificateNotTrusted,
    };
    TlsError::of(failure, format!("not vouched for by what the TLSA records name: {error}"))
}

fn unreadable(error: &webpki::Error) -> TlsError {
    TlsError::new(format!("the peer's certificate can't be read: {error}"))
}

impl ServerCertVerifier for Dane {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let wrong = |error| rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))));
        self.check(shown, intermediates, now).map(|()| ServerCertVerified::assertion()).map_err(wrong)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
