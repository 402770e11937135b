//! What TLS a domain's mail requires of a host, and what a connection has proved. Pure.
//!
//! A requirement belongs to a recipient's domain, a proof to a connection, and so to its host: a transaction rides only
//! on a connection whose proof meets its own domain's requirement, whoever had the connection opened. A proof is as
//! good as the check behind it, so sessions are resumed under the same verifier only (`runtime/tls.rs`).

use std::sync::Arc;

use super::dane::{DanePolicy, HostDane};
use super::mta_sts::{StsMode, StsPolicy};
use crate::config::TlsMode;

/// What a domain's mail requires of the connection to one host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TlsRequirement {
    /// In the clear only.
    Disabled,
    /// Encrypted where the host offers it and its TLS works (RFC 7435).
    Opportunistic,
    /// Any certificate.
    Encrypted,
    /// A certificate for the host's name that a trusted root vouches for.
    Verified,
    /// A certificate that the host's TLSA records name.
    Dane(Arc<DanePolicy>),
}

/// What the TLS of a connection has proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsProof {
    /// In the clear, and TLS was not asked for.
    Unasked,
    /// In the clear, because the host has no TLS that works.
    Nothing,
    /// Nobody overhears; who the host is, nobody knows.
    Encrypted,
    /// The host has this name.
    Verified,
    /// The host is the one that these TLSA records name.
    Dane(Arc<DanePolicy>),
}

/// Why there was no session with the TLS that was wanted (RFC 8460 §4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFailure {
    StartTlsNotSupported,
    CertificateHostMismatch,
    CertificateExpired,
    CertificateNotTrusted,
    ValidationFailure,
    TlsaInvalid,
    DnssecInvalid,
}

impl TlsFailure {
    pub const ALL: [Self; 7] = [
        Self::StartTlsNotSupported,
        Self::CertificateHostMismatch,
        Self::CertificateExpired,
        Self::CertificateNotTrusted,
        Self::ValidationFailure,
        Self::TlsaInvalid,
        Self::DnssecInvalid,
    ];

    /// As reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::StartTlsNotSupported => "starttls-not-supported",
            Self::CertificateHostMismatch => "certificate-host-mismatch",
            Self::CertificateExpired => "certificate-expired",
            Self::CertificateNotTrusted => "certificate-not-trusted",
            Self::ValidationFailure => "validation-failure",
            Self::TlsaInvalid => "tlsa-invalid",
            Self::DnssecInvalid => "dnssec-invalid",
        }
    }
}

/// A handshake that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandshakeError {
    pub failure: TlsFailure,
    /// For operators.
    pub text: String,
}

impl From<String> for HandshakeError {
    fn from(text: String) -> Self {
        Self { failure: TlsFailure::ValidationFailure, text }
    }
}

/// Which policy a session was made under (RFC 8460 §4.2).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TlsPolicyKey {
    pub kind: PolicyKind,
    /// With TLSA records the name that they are at, else the recipients' domain (RFC 8460 §1.1).
    pub domain: Arc<str>,
    pub recipient_domain: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    Tlsa,
    Sts,
    None,
}

impl TlsProof {
    /// What vouched for the peer, for its record.
    pub fn verified_by(&self) -> &'static str {
        match self {
            Self::Unasked | Self::Nothing | Self::Encrypted => "",
            Self::Verified => "pkix",
            Self::Dane(_) => "dane",
        }
    }
}

impl TlsRequirement {
    /// What the SMTP client is to do about STARTTLS; who the host is is for others to judge.
    pub fn mode(&self) -> TlsMode {
        match self {
            Self::Disabled => TlsMode::Disabled,
            Self::Opportunistic => TlsMode::Opportunistic,
            Self::Encrypted => TlsMode::Required,
            Self::Verified | Self::Dane(_) => TlsMode::Verified,
        }
    }

    /// The host's name in the handshake. RFC 7672 §8.1: the TLSA base domain, where there is one.
    pub fn server_name<'a>(&'a self, host_name: &'a str) -> &'a str {
        match self {
            Self::Dane(policy) => &policy.base,
            Self::Disabled | Self::Opportunistic | Self::Encrypted | Self::Verified => host_name,
        }
    }

    /// Whether a connection that has proved this may carry the mail.
    pub fn is_met_by(&self, proof: &TlsProof) -> bool {
        match self {
            Self::Disabled => matches!(proof, TlsProof::Unasked | TlsProof::Nothing),
            // Where it was not even asked for, the host might have had it.
            Self::Opportunistic => *proof != TlsProof::Unasked,
            Self::Encrypted => matches!(proof, TlsProof::Encrypted | TlsProof::Verified | TlsProof::Dane(_)),
            Self::Verified => *proof == TlsProof::Verified,
            // Other records, or other names, were another check.
            Self::Dane(policy) => matches!(proof, TlsProof::Dane(proved) if proved == policy),
        }
    }

    /// What a connection that was opened for this has proved before any handshake.
    pub fn proof_in_clear(&self) -> TlsProof {
        if *self == Self::Disabled { TlsProof::Unasked } else { TlsProof::Nothing }
    }

    /// What the handshake has proved that was made for this.
    pub fn proof_of_handshake(&self) -> TlsProof {
        match self {
            Self::Disabled => TlsProof::Unasked,
            Self::Opportunistic | Self::Encrypted => TlsProof::Encrypted,
            Self::Verified => TlsProof::Verified,
            Self::Dane(policy) => TlsProof::Dane(Arc::clone(policy)),
        }
    }
}

/// What a domain's mail requires of one of its hosts; None: it must not go there. `tls` is the operator's word, which a
/// policy can tighten but not loosen; where TLS is switched off it stays off. A host's TLSA records take the place of
/// all other checks of who it is (RFC 8461 §2).
pub fn requirement(tls: TlsMode, dane: &HostDane, sts: Option<&StsPolicy>, host: &str) -> Option<TlsRequirement> {
    let own = match tls {
        TlsMode::Disabled => return Some(TlsRequirement::Disabled),
        // RFC 7672 §2.2: records that can't be used still say that the host has TLS.
        TlsMode::Opportunistic if *dane == HostDane::Unusable => TlsRequirement::Encrypted,
        TlsMode::Opportunistic => TlsRequirement::Opportunistic,
        TlsMode::Required => TlsRequirement::Encrypted,
        TlsMode::Verified => TlsRequirement::Verified,
    };
    match dane {
        HostDane::Usable(policy) => return Some(TlsRequirement::Dane(Arc::clone(policy))),
        HostDane::Unknown(_) => return None,
        HostDane::Absent | HostDane::Unusable => {}
    }
    match sts.filter(|policy| policy.mode == StsMode::Enforce) {
        // RFC 8461 §5.1: mail goes only to hosts that the policy names, and that prove their name.
        Some(policy) => policy.names(host).then_some(TlsRequirement::Verified),
        None => Some(own),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deliver::dane::TlsaRecord;

    const NO_DANE: HostDane = HostDane::Absent;

    fn dane(octet: u8) -> HostDane {
        let record = TlsaRecord { usage: 3, selector: 1, matching: 1, data: vec![octet; 32] };
        HostDane::of_records("mx.example.com", &[], [record])
    }

    fn policy_of(dane: &HostDane) -> Arc<DanePolicy> {
        let HostDane::Usable(policy) = dane else { panic!("it is usable") };
        Arc::clone(policy)
    }

    fn sts(mode: &str) -> StsPolicy {
        StsPolicy::parse(&format!("version: STSv1\nmode: {mode}\nmx: mx.example.com\nmax_age: 86400\n")).unwrap()
    }

    /// Where TLS is off nobody has asked for it, which is no proof that the peer has none.
    #[test]
    fn what_is_proved_without_a_handshake() {
        assert_eq!(TlsRequirement::Disabled.proof_in_clear(), TlsProof::Unasked);
        assert_eq!(TlsRequirement::Opportunistic.proof_in_clear(), TlsProof::Nothing);
    }

    /// RFC 7672 §3.1.3, §8.1: the server is asked for by the name at which the records are, which an alias is not.
    #[test]
    fn the_name_that_is_asked_for_is_that_of_the_records() {
        let policy = policy_of(&dane(1));
        assert_eq!(TlsRequirement::Dane(policy).server_name("alias.example.net"), "mx.example.com");
        assert_eq!(TlsRequirement::Verified.server_name("alias.example.net"), "alias.example.net");
    }

    /// RFC 8461 §5.1.
    #[test]
    fn an_enforced_policy_tightens_what_an_operator_asks_for() {
        use TlsMode as M;
        use TlsRequirement as R;
        let requirement = |tls, sts: Option<&StsPolicy>, host| requirement(tls, &NO_DANE, sts, host);
        let (enforce, testing) = (sts("enforce"), sts("testing"));
        for (tls, own) in
            [(M::Opportunistic, R::Opportunistic), (M::Required, R::Encrypted), (M::Verified, R::Verified)]
        {
            assert_eq!(requirement(tls, Some(&enforce), "mx.example.com"), Some(R::Verified));
            assert_eq!(requirement(tls, Some(&enforce), "evil.example.org"), None);
            assert_eq!(requirement(tls, Some(&testing), "evil.example.org"), Some(own.clone()));
            assert_eq!(requirement(tls, Some(&sts("none")), "mx.example.com"), Some(own.clone()));
            assert_eq!(requirement(tls, None, "mx.example.com"), Some(own));
        }
        assert_eq!(requirement(M::Disabled, Some(&enforce), "evil.example.org"), Some(R::Disabled));
    }

    /// RFC 8461 §2: DANE takes precedence over MTA-STS; RFC 7672 §2.2: what each kind of TLSA answer means.
    #[test]
    fn tlsa_records_take_the_place_of_other_checks() {
        use TlsMode as M;
        use TlsRequirement as R;
        let (usable, enforce) = (dane(1), sts("enforce"));
        let unknown = HostDane::Unknown("SERVFAIL".into());
        let required = Some(R::Dane(policy_of(&usable)));
        for tls in [M::Opportunistic, M::Required, M::Verified] {
            for (sts, host) in [(None, "mx.example.com"), (Some(&enforce), "mx.example.com"), (Some(&enforce), "evil")]
            {
                assert_eq!(requirement(tls, &usable, sts, host), required, "{tls:?} {host}");
                assert_eq!(requirement(tls, &unknown, sts, host), None, "{tls:?} {host}");
            }
        }
        for dane in [&usable, &unknown, &HostDane::Unusable] {
            assert_eq!(requirement(M::Disabled, dane, Some(&enforce), "evil"), Some(R::Disabled));
        }
        let unusable = |tls, sts| requirement(tls, &HostDane::Unusable, sts, "mx.example.com");
        assert_eq!(unusable(M::Opportunistic, None), Some(R::Encrypted));
        assert_eq!(unusable(M::Required, None), Some(R::Encrypted));
        assert_eq!(unusable(M::Verified, None), Some(R::Verified));
        assert_eq!(unusable(M::Opportunistic, Some(&enforce)), Some(R::Verified));
        assert_eq!(requirement(M::Opportunistic, &HostDane::Unusable, Some(&enforce), "evil"), None);
    }

    /// Rows: requirements; columns: proofs.
    #[test]
    fn a_connection_carries_only_what_it_has_proved_enough_for() {
        use TlsProof as P;
        use TlsRequirement as R;
        let (first, second) = (policy_of(&dane(1)), policy_of(&dane(2)));
        let proofs = [P::Unasked, P::Nothing, P::Encrypted, P::Verified, P::Dane(Arc::clone(&first)), P::Dane(second)];
        for (requirement, expected) in [
            (R::Disabled, [true, true, false, false, false, false]),
            (R::Opportunistic, [false, true, true, true, true, true]),
            (R::Encrypted, [false, false, true, true, true, true]),
            (R::Verified, [false, false, false, true, false, false]),
            (R::Dane(first), [false, false, false, false, true, false]),
        ] {
            let met = proofs.each_ref().map(|proof| requirement.is_met_by(proof));
            assert_eq!(met, expected, "{requirement:?}");
        }
    }

    /// Whoever opens a connection can use it.
    #[test]
    fn a_handshake_proves_what_it_was_made_for() {
        use TlsRequirement as R;
        let dane = || R::Dane(policy_of(&dane(1)));
        for requirement in [R::Opportunistic, R::Encrypted, R::Verified, dane()] {
            assert!(requirement.is_met_by(&requirement.proof_of_handshake()), "{requirement:?}");
        }
        for requirement in [R::Disabled, R::Opportunistic] {
            assert!(requirement.is_met_by(&requirement.proof_in_clear()), "{requirement:?}");
        }
        for requirement in [R::Encrypted, R::Verified, dane()] {
            assert!(!requirement.is_met_by(&requirement.proof_in_clear()), "{requirement:?}");
        }
    }
}
