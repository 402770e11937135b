//! Which rules hold for whom, and in which order they win.

use std::path::Path;

use super::*;

fn config(rules: &str) -> Config {
    let text = format!("{SOURCES}\n{rules}\n[spool]\nallow_filesystem = true\n");
    Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap()
}

const SOURCES: &str = "[[egress_source]]\nname = \"ip-a\"\nsource_address = \"127.0.0.11\"\n\
                       [[egress_source]]\nname = \"ip-b\"\nsource_address = \"127.0.0.12\"\n";

#[test]
fn later_tables_win() {
    let config = config(
        "[shaping.default]\nconnection_limit = 1\nmax_deliveries_per_connection = 1\nmax_recipients_per_batch = 1\n\
         [shaping.default.sources.ip-b]\nconnection_limit = 2\nmax_deliveries_per_connection = 2\n\
         [provider.p]\nmatch = [{ mx_suffix = \".mx.test\" }]\nconnection_limit = 3\nprovider_connection_limit = 3\n\
         [provider.p.sources.ip-b]\nconnection_limit = 4\n\
         [shaping.\"site.test\"]\nconnection_limit = 5\n\
         [shaping.\"site.test\".sources.ip-b]\nconnection_limit = 6\n\
         [shaping.\"alone.test\"]\nmx_rollup = false\nconnection_limit = 7\n\
         [shaping.\"alone.test\".sources.ip-b]\nconnection_limit = 8\n",
    );
    let rules = &config.shaping_rules;
    let (site, alone) = (rules.of_domain("site.test").unwrap(), rules.of_domain("alone.test").unwrap());
    let resolve = |source, provider, sites: &[usize], domain| {
        rules.resolve(&config.shaping, source, provider, sites.iter().copied(), domain)
    };
    let limit = |source, provider, sites: &[usize], domain| resolve(source, provider, sites, domain).connection_limit;
    assert_eq!([limit(0, None, &[], None), limit(1, None, &[], None)], [1, 2]);
    assert_eq!([limit(0, Some(0), &[], None), limit(1, Some(0), &[], None)], [3, 4]);
    assert_eq!([limit(0, Some(0), &[site], None), limit(1, Some(0), &[site], None)], [5, 6]);
    assert_eq!([limit(0, Some(0), &[site], Some(alone)), limit(1, Some(0), &[site], Some(alone))], [7, 8]);
    let merged = resolve(1, Some(0), &[site], Some(alone));
    assert_eq!((merged.max_deliveries_per_connection, merged.max_recipients_per_batch), (2, 1));
    assert_eq!(merged.provider_connection_limit, Some(3));
    assert!(!rules.domains[alone].mx_rollup && rules.domains[site].mx_rollup);
    assert_eq!(config.recipients_per_batch_max(), 1);
}

#[test]
fn a_timeout_leaves_the_others() {
    let config = config(
        "[shaping.default]\ntimeouts = { connect = \"1s\" }\n[shaping.\"a.test\"]\ntimeouts = { banner = \"2s\" }\n",
    );
    let shaping = config.shaping_rules.resolve(&config.shaping, 0, None, 0..1, None);
    assert_eq!((shaping.timeouts.connect, shaping.timeouts.banner), (Duration::from_secs(1), Duration::from_secs(2)));
    assert_eq!(shaping.timeouts.mail, Timeouts::default().mail);
}

#[test]
fn all_hosts_belong_to_a_provider() {
    let config = config(
        "[provider.google]\nmatch = [{ mx_suffix = \".google.com\" }, { mx_suffix = \"smtp.goog\" }]\n\
         [provider.gmail]\nmatch = [{ domain = \"gmail.com\" }]\n\
         [provider.workspace]\nmatch = [{ mx_suffix = \".l.google.com\" }]\n",
    );
    let of = |domain, site| {
        let provider = config.shaping_rules.provider_of(domain, site)?;
        Some(config.shaping_rules.providers[provider].name.as_str())
    };
    assert_eq!(of("a.test", "aspmx.google.com,smtp.goog"), Some("google"));
    assert_eq!(of("a.test", "a.smtp.goog,b.smtp.goog"), Some("google"));
    assert_eq!(of("a.test", "aspmx.google.com,mx.test"), None, "all hosts, not some");
    assert_eq!(of("a.test", "google.com"), None, "only what is below");
    assert_eq!(of("a.test", "evilgoogle.com"), None);
    assert_eq!(of("a.test", "evilsmtp.goog"), None);
    assert_eq!(of("a.test", "alt.l.google.com,aspmx.l.google.com"), Some("workspace"), "the longest suffix");
    assert_eq!(of("a.test", "alt.l.google.com,aspmx.google.com"), Some("google"));
    assert_eq!(of("gmail.com", "mx.test"), Some("gmail"));
    assert_eq!(of("gmail.com", "alt.l.google.com"), Some("gmail"), "the domain's name is closest");
    assert_eq!(of("a.test", "mx:aspmx.google.com"), Some("google"), "a static route's");
    assert_eq!(of("a.test", "aspmx.google.com:2525"), Some("google"));
    assert_eq!(of("a.test", "[::1]:25"), None);
}

#[test]
fn rates_bound_a_transaction() {
    let config = config(
        "[shaping.default]\nmax_message_rate = \"100/s\"\n\
         [shaping.\"a.test\"]\nmax_message_rate = \"1000/min\"\n\
         [shaping.\"b.test\"]\nmax_message_rate = \"1/s\"\n\
         [shaping.\"c.test\"]\nmax_message_rate = \"100/h,max_burst=30\"\n",
    );
    let of = |rule| config.shaping_rules.resolve(&config.shaping, 0, None, rule..rule + 1, None).batch_max();
    assert_eq!([config.shaping.batch_max(), of(0), of(1), of(2)], [5, 5, 1, 30]);
}
