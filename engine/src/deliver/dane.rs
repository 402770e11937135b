//! DANE for SMTP (RFC 7672): what a host's TLSA records require of its certificate. Pure: the records come from
//! `runtime/dns/dnssec.rs`, certificates are read in `runtime/dane.rs`.
//!
//! Of a host whose TLSA records can't be had nobody knows what it requires, so no mail goes there
//! ([`HostDane::Unknown`]); whoever can suppress an answer could otherwise switch DANE off.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, SHA512, digest};

use crate::limits::TLSA_RECORDS_MAX;

/// What the DNS says, provably, of how a host shows who it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum HostDane {
    /// It has no TLSA records, or none that anybody vouches for.
    #[default]
    Absent,
    /// It has such records, but none that can be used: it has TLS (RFC 7672 §2.2).
    Unusable,
    Usable(Arc<DanePolicy>),
    /// Nobody could say, or what was said is forged. The host must not be used (RFC 7672 §2.1.2, §2.2).
    Unknown(Arc<str>),
}

/// The usable TLSA records of a host, and the names that count with them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DanePolicy {
    /// The TLSA base domain: the name in the handshake, and the first that a certificate may be for.
    pub base: String,
    /// Further names that a certificate may be for (RFC 7672 §3.2.2). Empty where names don't count.
    more_names: Vec<String>,
    /// Sorted.
    records: Vec<TlsaRecord>,
}

/// RFC 6698 §2.1.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TlsaRecord {
    pub usage: u8,
    pub selector: u8,
    pub matching: u8,
    pub data: Vec<u8>,
}

impl HostDane {
    /// What a secure TLSA record set at a base domain means. Names are in lower case, without final dot; `next_hop` are
    /// the recipients' domain and what it is an alias of.
    pub fn of_records(base: &str, next_hop: &[String], records: impl IntoIterator<Item = TlsaRecord>) -> Self {
        let mut records: Vec<TlsaRecord> = records.into_iter().filter(TlsaRecord::is_usable).collect();
        // RFC 7671 §9: of several digests of one usage and selector the strongest counts, and whole data beside it.
        let stronger: Vec<_> =
            records.iter().filter(|record| record.matching == SHA2_512).map(TlsaRecord::subject).collect();
        records.retain(|record| record.matching != SHA2_256 || !stronger.contains(&record.subject()));
        records.sort();
        records.dedup();
        records.truncate(TLSA_RECORDS_MAX);
        if records.is_empty() {
            return Self::Unusable;
        }
        // RFC 7672 §3.1.1: names don't count where the certificate itself is named. Without them, the same host is
        // the same for all domains.
        let names_count = records.iter().any(|record| record.usage == DANE_TA);
        let more_names = next_hop.iter().filter(|name| names_count && *name != base).cloned().collect();
        Self::Usable(Arc::new(DanePolicy { base: base.to_owned(), more_names, records }))
    }
}

impl DanePolicy {
    /// Whether the records name the certificate that the peer showed as its own (DANE-EE).
    pub fn names_certificate(&self, certificate: &[u8], key: &[u8]) -> bool {
        self.records.iter().any(|record| record.usage == DANE_EE && record.matches(certificate, key))
    }

    /// Whether the records name a certificate of the chain, but the first, as a trust anchor (DANE-TA).
    pub fn names_anchor(&self, certificate: &[u8], key: &[u8]) -> bool {
        self.records.iter().any(|record| record.usage == DANE_TA && record.matches(certificate, key))
    }

    /// Trust anchors that stand in the records whole: they need not be in the chain.
    pub fn whole_anchors(&self) -> impl Iterator<Item = &[u8]> {
        let whole = |record: &&TlsaRecord| (record.usage, record.selector, record.matching) == (DANE_TA, FULL, EXACT);
        self.records.iter().filter(whole).map(|record| &*record.data)
    }

    /// For which name a certificate must be that a trust anchor vouches for: any of these (RFC 7672 §3.2.2).
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&*self.base).chain(self.more_names.iter().map(String::as_str))
    }
}

impl fmt::Display for DanePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, TlsaRecord { usage, selector, matching, .. }) in self.records.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{usage} {selector} {matching}")?;
        }
        Ok(())
    }
}

impl TlsaRecord {
    /// RFC 7672 §3.1.3: the public roots of usages 0 and 1 are of no use in SMTP. What is unassigned, or can't be what
    /// it says, is of none either (RFC 6698 §4.1).
    fn is_usable(&self) -> bool {
        let length = match self.matching {
            EXACT => !self.data.is_empty(),
            SHA2_256 => self.data.len() == 32,
            SHA2_512 => self.data.len() == 64,
            _ => false,
        };
        length && matches!(self.usage, DANE_TA | DANE_EE) && matches!(self.selector, FULL | SPKI)
    }

    fn subject(&self) -> (u8, u8) {
        (self.usage, self.selector)
    }

    /// RFC 6698 §2.1: compares the selected part of a certificate, both given as DER.
    fn matches(&self, certificate: &[u8], key: &[u8]) -> bool {
        let selected = if self.selector == FULL { certificate } else { key };
        match self.matching {
            EXACT => selected == self.data,
            SHA2_256 => digest(&SHA256, selected).as_ref() == self.data,
            SHA2_512 => digest(&SHA512, selected).as_ref() == self.data,
            _ => false,
        }
    }
}

/// Certificate usages (RFC 7218 §2.1).
const DANE_TA: u8 = 2;
const DANE_EE: u8 = 3;
/// Selectors (RFC 7218 §2.2).
const FULL: u8 = 0;
const SPKI: u8 = 1;
/// Matching types (RFC 7218 §2.3).
const EXACT: u8 = 0;
const SHA2_256: u8 = 1;
const SHA2_512: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    const CERTIFICATE: &[u8] = b"a certificate";
    const KEY: &[u8] = b"its key";

    fn record(usage: u8, selector: u8, matching: u8) -> TlsaRecord {
        let selected = if selector == SPKI { KEY } else { CERTIFICATE };
        let data = match matching {
            SHA2_256 => digest(&SHA256, selected).as_ref().to_vec(),
            SHA2_512 => digest(&SHA512, selected).as_ref().to_vec(),
            _ => selected.to_vec(),
        };
        TlsaRecord { usage, selector, matching, data }
    }

    fn of(records: &[TlsaRecord]) -> HostDane {
        HostDane::of_records("mx.test", &["a.test".to_owned()], records.iter().cloned())
    }

    /// RFC 7672 §3.1: every combination of usage, selector and matching type.
    #[test]
    fn two_usages_two_selectors_and_three_matching_types_can_be_used() {
        for usage in [0, 1, 2, 3, 4, 255] {
            for selector in [0, 1, 2, 255] {
                for matching in [0, 1, 2, 3, 255] {
                    let usable = (2..=3).contains(&usage) && selector <= 1 && matching <= 2;
                    let dane = of(&[record(usage, selector, matching)]);
                    let HostDane::Usable(policy) = dane else {
                        assert!(!usable, "{usage} {selector} {matching}");
                        assert_eq!(dane, HostDane::Unusable);
                        continue;
                    };
                    assert!(usable, "{usage} {selector} {matching}");
                    assert_eq!(policy.names_certificate(CERTIFICATE, KEY), usage == 3);
                    assert_eq!(policy.names_anchor(CERTIFICATE, KEY), usage == 2);
                    assert_eq!(policy.names_certificate(b"another", KEY), usage == 3 && selector == 1);
                    assert_eq!(policy.names_certificate(CERTIFICATE, b"another"), usage == 3 && selector == 0);
                    let whole: Vec<_> = policy.whole_anchors().collect();
                    assert_eq!(whole.is_empty(), (usage, selector, matching) != (2, 0, 0));
                    assert_eq!(policy.to_string(), format!("{usage} {selector} {matching}"));
                }
            }
        }
        assert_eq!(of(&[]), HostDane::Unusable);
    }

    /// RFC 7672 §2.2: a record that can't be used says nothing of the others.
    #[test]
    fn one_usable_record_is_enough() {
        let short = TlsaRecord { data: vec![1; 31], ..record(3, 1, 1) };
        assert_eq!(of(std::slice::from_ref(&short)), HostDane::Unusable);
        assert_eq!(of(&[TlsaRecord { data: vec![1; 32], ..record(3, 1, 2) }]), HostDane::Unusable);
        assert_eq!(of(&[TlsaRecord { data: Vec::new(), ..record(3, 1, 0) }]), HostDane::Unusable);
        let HostDane::Usable(policy) = of(&[short, record(1, 1, 1), record(3, 1, 1)]) else { panic!("one is usable") };
        assert!(policy.names_certificate(b"", KEY) && !policy.names_certificate(b"", b"another"));
    }

    /// RFC 7671 §9.
    #[test]
    fn a_weaker_digest_does_not_count_beside_a_stronger_one() {
        let wrong = |record: TlsaRecord| TlsaRecord { data: vec![9; record.data.len()], ..record };
        let names = |records: &[TlsaRecord]| {
            let HostDane::Usable(policy) = of(records) else { panic!("they are usable") };
            policy.names_certificate(CERTIFICATE, KEY)
        };
        assert!(!names(&[record(3, 1, 1), wrong(record(3, 1, 2))]));
        assert!(names(&[wrong(record(3, 1, 1)), record(3, 1, 2)]));
        assert!(names(&[record(3, 0, 1), wrong(record(3, 1, 2))]), "another selector is another matter");
        assert!(names(&[record(3, 1, 0), wrong(record(3, 1, 2))]), "whole data are no digest");
        let truncated = TlsaRecord { data: vec![9; 63], ..record(3, 1, 2) };
        assert!(names(&[record(3, 1, 1), truncated]), "what can't be used is not stronger");
    }

    /// RFC 7672 §3.2.2.
    #[test]
    fn the_next_hop_counts_as_a_name_where_names_count() {
        let names = |records: &[TlsaRecord]| {
            let next_hop = ["a.test".to_owned(), "alias.test".to_owned(), "mx.test".to_owned()];
            let dane = HostDane::of_records("mx.test", &next_hop, records.iter().cloned());
            let HostDane::Usable(policy) = dane else { panic!("they are usable") };
            policy.names().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(names(&[record(2, 1, 1)]), ["mx.test", "a.test", "alias.test"]);
        assert_eq!(names(&[record(3, 1, 1)]), ["mx.test"]);
        assert_eq!(names(&[record(2, 1, 1), record(3, 1, 1)]), ["mx.test", "a.test", "alias.test"]);
    }

    /// Connections are shared by what is equal here.
    #[test]
    fn the_order_of_the_records_does_not_matter() {
        let records = [record(3, 1, 1), record(2, 0, 1), record(3, 0, 0)];
        let mut reversed = records.clone();
        reversed.reverse();
        assert_eq!(of(&records), of(&reversed));
        assert_ne!(of(&records), of(&records[..2]));
    }
}
