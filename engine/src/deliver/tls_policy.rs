//! What TLS a domain's mail requires of a host, and what a connection has proved. Pure.
//!
//! A requirement belongs to a recipient's domain, a proof to a connection, and so to its host: a transaction rides only
//! on a connection whose proof meets its own domain's requirement, whoever had the connection opened. A proof is as
//! good as the check behind it, so sessions are resumed under the same verifier only (`runtime/tls.rs`).

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
}

impl TlsRequirement {
    /// What the SMTP client is to do about STARTTLS; who the host is is for others to judge.
    pub fn mode(&self) -> TlsMode {
        match self {
            Self::Disabled => TlsMode::Disabled,
            Self::Opportunistic => TlsMode::Opportunistic,
            Self::Encrypted => TlsMode::Required,
            Self::Verified => TlsMode::Verified,
        }
    }

    /// Whether a connection that has proved this may carry the mail.
    pub fn is_met_by(&self, proof: &TlsProof) -> bool {
        match self {
            Self::Disabled => matches!(proof, TlsProof::Unasked | TlsProof::Nothing),
            // Where it was not even asked for, the host might have had it.
            Self::Opportunistic => *proof != TlsProof::Unasked,
            Self::Encrypted => matches!(proof, TlsProof::Encrypted | TlsProof::Verified),
            Self::Verified => *proof == TlsProof::Verified,
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
        }
    }
}

/// What a domain's mail requires of one of its hosts; None: it must not go there. `tls` is the operator's word, which a
/// policy can tighten but not loosen; where TLS is switched off it stays off.
pub fn requirement(tls: TlsMode, sts: Option<&StsPolicy>, host: &str) -> Option<TlsRequirement> {
    let own = match tls {
        TlsMode::Disabled => return Some(TlsRequirement::Disabled),
        TlsMode::Opportunistic => TlsRequirement::Opportunistic,
        TlsMode::Required => TlsRequirement::Encrypted,
        TlsMode::Verified => TlsRequirement::Verified,
    };
    match sts.filter(|policy| policy.mode == StsMode::Enforce) {
        // RFC 8461 §5.1: mail goes only to hosts that the policy names, and that prove their name.
        Some(policy) => policy.names(host).then_some(TlsRequirement::Verified),
        None => Some(own),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8461 §5.1.
    #[test]
    fn an_enforced_policy_tightens_what_an_operator_asks_for() {
        use TlsMode as M;
        use TlsRequirement as R;
        let policy = |mode| {
            let text = format!("version: STSv1\nmode: {mode}\nmx: mx.example.com\nmax_age: 86400\n");
            StsPolicy::parse(&text).unwrap()
        };
        let (enforce, testing) = (policy("enforce"), policy("testing"));
        for (tls, own) in
            [(M::Opportunistic, R::Opportunistic), (M::Required, R::Encrypted), (M::Verified, R::Verified)]
        {
            assert_eq!(requirement(tls, Some(&enforce), "mx.example.com"), Some(R::Verified));
            assert_eq!(requirement(tls, Some(&enforce), "evil.example.org"), None);
            assert_eq!(requirement(tls, Some(&testing), "evil.example.org"), Some(own.clone()));
            assert_eq!(requirement(tls, Some(&policy("none")), "mx.example.com"), Some(own.clone()));
            assert_eq!(requirement(tls, None, "mx.example.com"), Some(own));
        }
        assert_eq!(requirement(M::Disabled, Some(&enforce), "evil.example.org"), Some(R::Disabled));
    }

    /// Rows: requirements; columns: proofs.
    #[test]
    fn a_connection_carries_only_what_it_has_proved_enough_for() {
        use TlsProof as P;
        use TlsRequirement as R;
        let proofs = [P::Unasked, P::Nothing, P::Encrypted, P::Verified];
        for (requirement, expected) in [
            (R::Disabled, [true, true, false, false]),
            (R::Opportunistic, [false, true, true, true]),
            (R::Encrypted, [false, false, true, true]),
            (R::Verified, [false, false, false, true]),
        ] {
            let met = proofs.each_ref().map(|proof| requirement.is_met_by(proof));
            assert_eq!(met, expected, "{requirement:?}");
        }
    }

    /// Whoever opens a connection can use it.
    #[test]
    fn a_handshake_proves_what_it_was_made_for() {
        use TlsRequirement as R;
        for requirement in [R::Opportunistic, R::Encrypted, R::Verified] {
            assert!(requirement.is_met_by(&requirement.proof_of_handshake()), "{requirement:?}");
        }
        for requirement in [R::Disabled, R::Opportunistic] {
            assert!(requirement.is_met_by(&requirement.proof_in_clear()), "{requirement:?}");
        }
        for requirement in [R::Encrypted, R::Verified] {
            assert!(!requirement.is_met_by(&requirement.proof_in_clear()), "{requirement:?}");
        }
    }
}
