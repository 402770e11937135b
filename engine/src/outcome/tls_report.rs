//! What TLS sessions with peers came to, by policy: what a report to the policy's domain is made of (RFC 8460). Pure.
//!
//! A session counts once: when its handshake has ended, or when it is known that there will be none. Mail that is sent
//! in the clear on purpose makes no session. Counts go up for as long as the process runs; whoever makes reports takes
//! differences.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::handover::{PolicyKind, TlsFailure, TlsPolicyKey};
use crate::limits::TLS_REPORT_POLICIES_MAX;

/// The sessions that one shard had.
#[derive(Debug, Default)]
pub struct TlsReport {
    policies: HashMap<TlsPolicyKey, Counts>,
}

/// What TLS sessions under one policy came to, since the start (RFC 8460 §4).
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct TlsReportRow {
    /// `tlsa`, `sts` or `no-policy-found`.
    pub policy_type: &'static str,
    pub policy_domain: String,
    pub recipient_domain: String,
    pub successful_sessions: u64,
    /// By result type (RFC 8460 §4.3).
    pub failed_sessions: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Default)]
struct Counts {
    successes: u64,
    failures: [u64; TlsFailure::ALL.len()],
}

impl TlsReport {
    /// A session came to this. Policies beyond the bound are not counted.
    pub fn count(&mut self, policy: TlsPolicyKey, result: Result<(), TlsFailure>) {
        if self.policies.len() >= TLS_REPORT_POLICIES_MAX && !self.policies.contains_key(&policy) {
            return;
        }
        let counts = self.policies.entry(policy).or_default();
        match result {
            Ok(()) => counts.successes += 1,
            Err(failure) => counts.failures[failure as usize] += 1,
        }
    }

    pub fn rows(&self) -> impl Iterator<Item = TlsReportRow> + '_ {
        self.policies.iter().map(|(policy, counts)| {
            let failures = TlsFailure::ALL.iter().zip(counts.failures).filter(|(_, count)| *count > 0);
            TlsReportRow {
                policy_type: match policy.kind {
                    PolicyKind::Tlsa => "tlsa",
                    PolicyKind::Sts => "sts",
                    PolicyKind::None => "no-policy-found",
                },
                policy_domain: policy.domain.to_string(),
                recipient_domain: policy.recipient_domain.to_string(),
                successful_sessions: counts.successes,
                failed_sessions: failures.map(|(failure, count)| (failure.name(), count)).collect(),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(domain: &str) -> TlsPolicyKey {
        TlsPolicyKey { kind: PolicyKind::Sts, domain: domain.into(), recipient_domain: domain.into() }
    }

    #[test]
    fn sessions_are_counted_by_what_they_came_to() {
        let mut report = TlsReport::default();
        report.count(policy("a.test"), Ok(()));
        for failure in TlsFailure::ALL {
            report.count(policy("a.test"), Err(failure));
            report.count(policy("a.test"), Err(failure));
        }
        let row = report.rows().next().unwrap();
        assert_eq!((row.policy_type, &*row.policy_domain, row.successful_sessions), ("sts", "a.test", 1));
        // RFC 8460 §4.3.
        let names = [
            "certificate-expired",
            "certificate-host-mismatch",
            "certificate-not-trusted",
            "dnssec-invalid",
            "starttls-not-supported",
            "tlsa-invalid",
            "validation-failure",
        ];
        assert_eq!(row.failed_sessions.into_iter().collect::<Vec<_>>(), names.map(|name| (name, 2)));
    }

    #[test]
    fn policies_are_bounded() {
        let mut report = TlsReport::default();
        for number in 0..=TLS_REPORT_POLICIES_MAX {
            report.count(policy(&format!("{number}.test")), Ok(()));
        }
        report.count(policy("0.test"), Ok(()));
        assert_eq!(report.rows().count(), TLS_REPORT_POLICIES_MAX);
        assert_eq!(report.rows().map(|row| row.successful_sessions).max(), Some(2));
    }
}
