//! MTA-STS policies (RFC 8461): what a domain says of its MX hosts. Pure: they are fetched in `runtime/mta_sts.rs`.

use std::fmt;
use std::time::Duration;

use mail_auth::common::parse::TxtRecordParser;
use mail_auth::mta_sts::MtaSts;

use crate::limits::{STS_AGE_MAX, STS_HOSTS_MAX};

/// A domain's policy (RFC 8461 §3.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StsPolicy {
    pub mode: StsMode,
    /// For how long after it was fetched it holds.
    pub max_age: Duration,
    /// In lower case; `*.example.com` stands for one label in front.
    hosts: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StsMode {
    /// Mail goes only to hosts that the policy names, with a certificate that is good for their name.
    Enforce,
    /// As if there were no policy.
    Testing,
    /// The domain no longer has one.
    None,
}

/// Why a text is not a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StsError(String);

impl fmt::Display for StsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StsError {}

impl StsPolicy {
    /// Reads a policy. Of a repeated field the first counts, but for `mx`; fields of other names are extensions.
    pub fn parse(text: &str) -> Result<Self, StsError> {
        let (mut version, mut mode, mut max_age, mut hosts) = (None, None, None, Vec::new());
        for line in text.split('\n').map(str::trim).filter(|line| !line.is_empty()) {
            let Some((name, value)) = line.split_once(':') else {
                return Err(StsError(format!("{line:?} is not a field")));
            };
            match (name.trim_end(), value.trim()) {
                ("version", value) => _ = version.get_or_insert(value),
                ("mode", value) => _ = mode.get_or_insert(value),
                ("max_age", value) => _ = max_age.get_or_insert(value),
                ("mx", value) => hosts.push(host_pattern(value)?),
                _ => {}
            }
        }
        if version != Some("STSv1") {
            return Err(StsError(format!("version {version:?} is not STSv1")));
        }
        let mode = match mode {
            Some("enforce") => StsMode::Enforce,
            Some("testing") => StsMode::Testing,
            Some("none") => StsMode::None,
            other => return Err(StsError(format!("mode {other:?} is unknown"))),
        };
        let seconds = max_age.filter(|text| text.len() <= MAX_AGE_DIGITS_MAX).and_then(|text| text.parse().ok());
        let Some(seconds) = seconds else { return Err(StsError(format!("max_age {max_age:?} is not a number"))) };
        if hosts.is_empty() && mode != StsMode::None {
            return Err(StsError("no mx is named".to_owned()));
        }
        if hosts.len() > STS_HOSTS_MAX {
            return Err(StsError(format!("more than {STS_HOSTS_MAX} mx are named")));
        }
        Ok(Self { mode, max_age: Duration::from_secs(seconds).min(STS_AGE_MAX), hosts })
    }

    /// Whether the policy names a host, which is in lower case (RFC 8461 §4.1: as RFC 6125 §6.4 compares, with `*` for
    /// the whole first label).
    pub fn names(&self, host: &str) -> bool {
        self.hosts.iter().any(|pattern| match pattern.strip_prefix("*.") {
            None => pattern == host,
            Some(rest) => host.split_once('.').is_some_and(|(first, behind)| !first.is_empty() && behind == rest),
        })
    }
}

/// The id of a domain's policy, from the TXT records at `_mta-sts` (RFC 8461 §3.1). None: there is no policy, also
/// where there are two records or a bad one.
pub fn policy_id<'a>(records: impl Iterator<Item = &'a [u8]>) -> Option<String> {
    let mut records = records.filter(|record| record.starts_with(b"v=STSv1;"));
    let (record, other) = (records.next()?, records.next());
    let MtaSts { id } = MtaSts::parse(record).ok()?;
    let good = (1..=ID_OCTETS_MAX).contains(&id.len()) && id.bytes().all(|octet| octet.is_ascii_alphanumeric());
    (other.is_none() && good).then_some(id)
}

fn host_pattern(value: &str) -> Result<String, StsError> {
    let lower = value.trim_end_matches('.').to_ascii_lowercase();
    let name = lower.strip_prefix("*.").unwrap_or(&lower);
    let label = |label: &str| {
        !label.is_empty() && label.bytes().all(|octet| octet.is_ascii_alphanumeric() || b"-_".contains(&octet))
    };
    if !name.split('.').all(label) {
        return Err(StsError(format!("mx {value:?} is neither a name nor *. and a name")));
    }
    Ok(lower)
}

/// RFC 8461 §3.1: `sts-id = 1*32(ALPHA / DIGIT)`.
const ID_OCTETS_MAX: usize = 32;
/// RFC 8461 §3.2: `max_age` has up to ten digits.
const MAX_AGE_DIGITS_MAX: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<StsPolicy, StsError> {
        StsPolicy::parse(text)
    }

    fn policy(mode: &str, hosts: &[&str]) -> StsPolicy {
        let hosts: String = hosts.iter().map(|host| format!("mx: {host}\n")).collect();
        parse(&format!("version: STSv1\nmode: {mode}\n{hosts}max_age: 86400\n")).unwrap()
    }

    /// RFC 8461 §3.2, its own example.
    #[test]
    fn a_policy_is_read() {
        let text = "version: STSv1\r\nmode: enforce\r\nmx: mail.example.com\r\nmx: *.Example.net\r\n\
                    mx: backupmx.example.com\r\nmax_age: 604800\r\n";
        let policy = parse(text).unwrap();
        assert_eq!((policy.mode, policy.max_age.as_secs()), (StsMode::Enforce, 604_800));
        assert_eq!(policy.hosts, ["mail.example.com", "*.example.net", "backupmx.example.com"]);
        // Bare LF, other order, no last line end, extensions; of two the first.
        let policy = parse("max_age:5\nmode:testing\nmode: none\nfoo: b:c\nmx:a.b\nversion: STSv1").unwrap();
        assert_eq!((policy.mode, policy.max_age.as_secs()), (StsMode::Testing, 5));
        assert_eq!(parse("version: STSv1\nmode: none\nmax_age: 9999999999").unwrap().max_age, STS_AGE_MAX);
    }

    #[test]
    fn what_is_no_policy_is_told() {
        for text in [
            "",
            "<html>not found</html>",
            "mode: enforce\nmx: a.b\nmax_age: 1",
            "version: STSv2\nmode: enforce\nmx: a.b\nmax_age: 1",
            "version: STSv1\nmode: Enforce\nmx: a.b\nmax_age: 1",
            "version: STSv1\nmode: enforce\nmax_age: 1",
            "version: STSv1\nmode: enforce\nmx: a.b",
            "version: STSv1\nmode: enforce\nmx: a.b\nmax_age: -1",
            "version: STSv1\nmode: enforce\nmx: a.b\nmax_age: 99999999999",
            "version: STSv1\nmode: enforce\nmx: *.*.b\nmax_age: 1",
            "version: STSv1\nmode: enforce\nmx: a..b\nmax_age: 1",
            "version: STSv1\nmode: enforce\nmx:\nmax_age: 1",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        let many = "mx: a.b\n".repeat(STS_HOSTS_MAX + 1);
        assert!(parse(&format!("version: STSv1\nmode: enforce\nmax_age: 1\n{many}")).is_err());
    }

    /// RFC 8461 §4.1: a wildcard stands for exactly one label.
    #[test]
    fn hosts_are_named_by_whole_labels() {
        let policy = policy("enforce", &["mx.example.com", "*.example.net"]);
        for host in ["mx.example.com", "a.example.net"] {
            assert!(policy.names(host), "{host}");
        }
        for host in
            ["example.com", "a.mx.example.com", "example.net", "a.b.example.net", ".example.net", "xexample.net"]
        {
            assert!(!policy.names(host), "{host}");
        }
    }

    /// RFC 8461 §3.1.
    #[test]
    fn one_good_record_announces_a_policy() {
        let id = |records: &[&str]| policy_id(records.iter().map(|record| record.as_bytes()));
        assert_eq!(id(&["v=STSv1; id=20160831085700Z;"]).as_deref(), Some("20160831085700Z"));
        assert_eq!(id(&["v=spf1 -all", "v=STSv1; id=1"]).as_deref(), Some("1"));
        assert_eq!(id(&["v=STSv1; id=1", "v=STSv1; id=2"]), None);
        for bad in ["v=STSv1;", "v=STSv1; id=", "v=STSv1; id=a-b", "v=STSv2; id=1", "id=1; v=STSv1;"] {
            assert_eq!(id(&[bad]), None, "{bad}");
        }
        assert_eq!(id(&[&format!("v=STSv1; id={}", "a".repeat(33))]), None);
        assert_eq!(id(&[]), None);
    }
}
