//! Whose mail it is, and what they may say (docs/configuration.md, "[[tenant]]").

use std::time::Duration;

use postrider_spool::record::DsnParameters;

use super::*;
use crate::accept::{Admitted, Policy, Received};
use crate::config::{EgressPool, EgressSource, ReceivedDetail, RetryInterval, RetryRules};
use crate::mail::time::Now;

const NOW: Now = Now { monotonic: Duration::from_secs(1), wall_ms: 1_764_547_200_000 };

fn tenant(name: &str, domains: &[&str]) -> crate::config::Tenant {
    crate::config::Tenant {
        name: name.to_owned(),
        egress_pool: "default".to_owned(),
        domains: domains.iter().map(|&domain| domain.to_owned()).collect(),
        priority: Priority::Normal,
        max_message_rate: None,
        max_injection_rate: None,
        retry: RetryRules::default(),
    }
}

/// Sources a, b and c; pools "default" with a, "acme" with a and b, "c" with b alone.
fn config(tenants: Vec<crate::config::Tenant>) -> Config {
    let mut config = Config::new("mta.example");
    let source = |name: &str| EgressSource { name: name.to_owned(), ..EgressSource::unbound("mta.example") };
    config.egress_sources = ["a", "b", "c"].map(source).to_vec();
    let pool = |(name, sources): (&str, &[usize])| EgressPool {
        name: name.to_owned(),
        sources: sources.iter().map(|&source| (source, 1)).collect(),
    };
    config.egress_pools = [("default", &[0][..]), ("acme", &[0, 1, 2]), ("c", &[1])].map(pool).to_vec();
    config.tenants = tenants;
    config.return_path_domains = vec!["bounces.example".to_owned()];
    config
}

fn admit(config: &Config, reverse_path: &str, header: &str, trusted: bool) -> Result<Admitted, String> {
    let received = Received {
        reverse_path: reverse_path.to_owned(),
        recipients: vec!["b@b.example".to_owned()],
        content: format!("{header}\r\nbody\r\n").into_bytes(),
        eight_bit_declared: false,
        smtputf8_declared: false,
        helo: String::new(),
        protocol: "ESMTP",
        client: None,
        session_id: 0,
        trusted,
        received_detail: ReceivedDetail::None,
        dsn: DsnParameters::default(),
        meta: Vec::new(),
    };
    let admitted = Policy::new(config).unwrap().admit(NOW, received, [1, 2]);
    admitted.map_err(|refusal| refusal.to_string())
}

/// The chosen tenant, by MAIL FROM and header.
fn chosen(config: &Config, reverse_path: &str, header: &str) -> Result<String, String> {
    admit(config, reverse_path, header, true).map(|admitted| admitted.envelope.tenant)
}

#[test]
fn mail_from_decides_before_from() {
    let config = config(vec![tenant("acme", &["acme.example"]), tenant("zeta", &["zeta.example"])]);
    let chosen = |reverse_path, header| chosen(&config, reverse_path, header);
    let own = "From: x@acme.example\r\n";
    assert_eq!(chosen("x@acme.example", own).unwrap(), "acme");
    assert_eq!(chosen("x@mail.acme.example", own).unwrap(), "acme");
    assert_eq!(chosen("x@acme.example", "Subject: no From at all\r\n").unwrap(), "acme");
    assert_eq!(chosen("", own).unwrap(), "acme", "the null reverse path says nothing");
    assert_eq!(chosen("x@bounces.example", own).unwrap(), "acme", "bounce domains are everybody's");
    assert_eq!(chosen("x@vip.bounces.example", "From: x@news.acme.example\r\n").unwrap(), "acme");
    assert_eq!(chosen("x@other.example", "From: x@other.example\r\n").unwrap(), "", "the engine's own");
    assert_eq!(chosen("x@notacme.example", "From: x@notacme.example\r\n").unwrap(), "", "whole labels");
    assert_eq!(
        chosen("x@acme.example", "From: x@zeta.example\r\n").unwrap_err(),
        "550 5.7.1 From: zeta.example is no domain of tenant acme"
    );
    assert_eq!(
        chosen("x@other.example", own).unwrap_err(),
        "550 5.7.1 MAIL FROM: other.example is no domain of tenant acme"
    );
}

#[test]
fn of_several_none_is_chosen() {
    let config = config(vec![
        tenant("acme", &["shared.example", "acme.example"]),
        tenant("zeta", &["shared.example", "news.acme.example"]),
    ]);
    let chosen = |reverse_path, header| chosen(&config, reverse_path, header);
    let shared = "From: x@shared.example\r\n";
    assert_eq!(
        chosen("x@shared.example", shared).unwrap_err(),
        "550 5.7.1 MAIL FROM: several tenants list shared.example; name one with X-Tenant"
    );
    assert_eq!(
        chosen("", shared).unwrap_err(),
        "550 5.7.1 From: several tenants list shared.example; name one with X-Tenant"
    );
    assert_eq!(chosen("x@shared.example", "From: x@acme.example\r\n").unwrap(), "acme", "From tells them apart");
    assert_eq!(chosen("x@shared.example", "X-Tenant: zeta\r\nFrom: x@shared.example\r\n").unwrap(), "zeta");
    assert_eq!(chosen("x@news.acme.example", "").unwrap(), "zeta", "the nearer one");
    assert_eq!(chosen("x@acme.example", "").unwrap(), "acme");
}

#[test]
fn only_trusted_hosts_name_a_tenant() {
    let config = config(vec![tenant("acme", &["acme.example"]), tenant("any", &[])]);
    let named = "X-Tenant: any\r\nFrom: x@elsewhere.example\r\n";
    assert_eq!(chosen(&config, "y@elsewhere.example", named).unwrap(), "any");
    assert_eq!(admit(&config, "y@elsewhere.example", named, false).unwrap().envelope.tenant, "");
    assert_eq!(
        chosen(&config, "", "X-Tenant: nobody\r\n").unwrap_err(),
        "550 5.7.1 X-Tenant: no tenant is called nobody"
    );
    let without = self::config(Vec::new());
    assert_eq!(chosen(&without, "", "X-Tenant: nobody\r\n").unwrap(), "", "where there are no tenants");
    let foreign = "X-Tenant: acme\r\nFrom: x@elsewhere.example\r\n";
    assert_eq!(
        chosen(&config, "x@acme.example", foreign).unwrap_err(),
        "550 5.7.1 From: elsewhere.example is no domain of tenant acme"
    );
}

/// A reader may show any of several From fields or mailboxes (RFC 5322 §3.6 allows one field, with a list).
#[test]
fn every_address_in_from_counts() {
    let config = config(vec![tenant("acme", &["acme.example"])]);
    let chosen = |header| chosen(&config, "x@acme.example", header);
    assert_eq!(chosen("From: a@acme.example, b@x.acme.example\r\n").unwrap(), "acme");
    for header in [
        "From: a@acme.example, b@bank.example\r\n",
        "From: a@acme.example\r\nFrom: b@bank.example\r\n",
        "From: b@bank.example\r\nFrom: a@acme.example\r\n",
    ] {
        assert_eq!(chosen(header).unwrap_err(), "550 5.7.1 From: bank.example is no domain of tenant acme", "{header}");
    }
    for header in ["From: nobody\r\n", "From: a@acme.example, b\r\n", "From:\r\n", "From: <@bank.example>\r\n"] {
        let refused = chosen(header).unwrap_err();
        assert!(refused.starts_with("550 5.7.1 From: not every address can be read"), "{header}: {refused}");
    }
}

/// RFC 5890 §2.3.2.1: a U-label and its A-label are one domain.
#[test]
fn domains_beyond_ascii_are_compared_by_their_a_labels() {
    let config = config(vec![tenant("acme", &["xn--bcher-kva.example"])]);
    let from = "From: x@B\u{fc}cher.example\r\n";
    assert_eq!(chosen(&config, "x@b\u{fc}cher.example", from).unwrap(), "acme");
    assert_eq!(chosen(&config, "", from).unwrap(), "acme");
}

/// RIGHT-ENVELOPE: a message leaves from a source of its tenant's pool.
#[test]
fn a_tenant_uses_its_own_pool_and_the_sources_of_it() {
    let pool = |tenants: Vec<crate::config::Tenant>, header: &str| {
        let admitted = admit(&config(tenants), "x@acme.example", header, true);
        admitted.map(|admitted| admitted.envelope.egress_pool)
    };
    let acme = || vec![crate::config::Tenant { egress_pool: "acme".to_owned(), ..tenant("acme", &["acme.example"]) }];
    assert_eq!(pool(acme(), "").unwrap(), "acme");
    assert_eq!(pool(acme(), "X-Virtual-MTA: acme\r\n").unwrap(), "acme");
    assert_eq!(pool(acme(), "X-Virtual-MTA: b\r\n").unwrap(), "b");
    for name in ["default", "c"] {
        let refused = pool(acme(), &format!("X-Virtual-MTA: {name}\r\n")).unwrap_err();
        let text = format!("550 5.7.1 X-Virtual-MTA: {name} is neither the pool of tenant acme nor a source of it");
        assert_eq!(refused, text, "a source whose name another pool has would mean that pool");
    }
    assert_eq!(pool(vec![tenant("acme", &["acme.example"])], "X-Virtual-MTA: b\r\n").unwrap_err()[..9], *"550 5.7.1");
    assert_eq!(pool(Vec::new(), "X-Virtual-MTA: b\r\n").unwrap(), "b", "the engine's own may use any");
}

#[test]
fn class_and_age_are_the_tenants() {
    let mut slow = tenant("slow", &["slow.example"]);
    slow.priority = Priority::Bulk;
    slow.retry = RetryRules {
        interval: Some(RetryInterval::First(Duration::from_secs(60))),
        max_age: Some(Duration::from_secs(600)),
        ..RetryRules::default()
    };
    let config = config(vec![slow]);
    let envelope = |reverse_path| admit(&config, reverse_path, "", true).unwrap().envelope;
    let (tenants, own) = (envelope("x@slow.example"), envelope("x@other.example"));
    assert_eq!((tenants.priority, tenants.expires_ms - NOW.wall_ms), (2, 600_000));
    assert_eq!((own.priority, own.expires_ms - NOW.wall_ms), (1, 5 * 86_400_000));
}
