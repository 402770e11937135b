//! The shipped providers: what their real answers lead to, and how a configuration stands over them.

use super::*;
use crate::config::{AutomationRule, Config, Shaping};

fn config(text: &str) -> Config {
    let text = format!("{text}\n[spool]\nallow_filesystem = true\n");
    Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap()
}

/// Of mail to a domain with these hosts.
fn shaping(config: &Config, site: &str) -> (Option<String>, Shaping) {
    let rules = &config.shaping_rules;
    let provider = rules.provider_of("a.example", site);
    let name = provider.map(|place| rules.providers[place].name.clone());
    (name, rules.resolve(&config.shaping, 0, provider, 0..0, None))
}

#[test]
fn real_hosts_are_known() {
    let config = config("");
    for (site, provider) in [
        ("alt1.gmail-smtp-in.l.google.com,gmail-smtp-in.l.google.com", Some("google")),
        ("aspmx.l.google.com,alt1.aspmx.l.google.com,aspmx2.googlemail.com", Some("google")),
        ("mta5.am0.yahoodns.net,mta6.am0.yahoodns.net,mta7.am0.yahoodns.net", Some("yahoo")),
        ("mx-aol.mail.gm0.yahoodns.net", Some("yahoo")),
        ("outlook-com.olc.protection.outlook.com", Some("outlook")),
        ("hotmail-com.olc.protection.outlook.com", Some("outlook")),
        ("contoso-com.mail.protection.outlook.com", Some("office365")),
        ("contoso-com.a-v1.mx.microsoft", Some("office365")),
        ("mx01.mail.icloud.com,mx02.mail.icloud.com", Some("apple")),
        ("mx00.gmx.net,mx01.gmx.net", Some("gmx")),
        ("mx-ha02.web.de,mx-ha03.web.de", Some("gmx")),
        ("mx00.t-online.de,mx01.t-online.de", Some("t-online")),
        ("smtp-in.orange.fr", Some("orange")),
        ("smtpz4.laposte.net", Some("laposte")),
        ("mx1.free.fr,mx2.free.fr", Some("free")),
        ("mxs.mail.ru", Some("mail-ru")),
        ("mx.yandex.ru", Some("yandex")),
        ("mx1.seznam.cz,mx2.seznam.cz", Some("seznam")),
        ("mail.protonmail.ch,mailsec.protonmail.ch", None),
        ("mx.example.com", None),
        ("aspmx.l.google.com,mx.example.com", None),
        ("127.0.0.1:25", None),
    ] {
        let expected = if site.contains("proton") { Some("proton") } else { provider };
        assert_eq!(shaping(&config, site).0.as_deref(), expected, "{site}");
    }
}

/// What a provider says in a real refusal, and what the first of its rules that matches does.
#[test]
fn real_answers_lead_to_what_they_ask_for() {
    let config = config("");
    for (site, answer, expected) in [
        (
            "gmail-smtp-in.l.google.com",
            "421 4.7.28 Gmail has detected an unusual rate of unsolicited mail originating from your DKIM domain [a.test \
             35]. To protect our users from spam, mail sent from your domain has been temporarily rate limited.",
            Some("suspend_campaign"),
        ),
        (
            "gmail-smtp-in.l.google.com",
            "421 4.7.0 [192.0.2.1 15] Our system has detected an unusual rate of unsolicited mail originating from your \
             IP address. To protect our users from spam, mail sent from your IP address has been temporarily rate limited.",
            Some("set connection_limit 1, max_message_rate 30/min"),
        ),
        ("gmail-smtp-in.l.google.com", "550 5.1.1 The email account that you tried to reach does not exist.", None),
        (
            "gmail-smtp-in.l.google.com",
            "452 4.2.2 The recipient's inbox is out of storage space. https://support.google.com/mail/?p=OverQuotaTemp",
            None,
        ),
        (
            "mta5.am0.yahoodns.net",
            "421 4.7.0 [TSS04] Messages from 192.0.2.1 temporarily deferred due to unexpected volume or user \
             complaints - 4.16.55.1; see https://postmaster.yahooinc.com/error-codes",
            Some("suspend"),
        ),
        ("mta5.am0.yahoodns.net", "554 delivery error: dd This user doesn't have a yahoo.com account", None),
        (
            "hotmail-com.olc.protection.outlook.com",
            "550 5.7.1 Unfortunately, messages from [192.0.2.1] weren't sent. Please contact your Internet service \
             provider since part of their network is on our block list (S3140). You can also refer your provider to \
             http://mail.live.com/mail/troubleshooting.aspx#errors.",
            Some("suspend"),
        ),
        (
            "contoso-com.mail.protection.outlook.com",
            "451 4.7.500 Server busy. Please try again later from [192.0.2.1]. (S77719)",
            Some("set connection_limit 1, max_message_rate 1/s"),
        ),
        (
            "contoso-com.mail.protection.outlook.com",
            "550 5.4.1 Recipient address rejected: Access denied. [a.eop-EUR01.prod.protection.outlook.com]",
            None,
        ),
        ("mx01.mail.icloud.com", "550 5.1.1 <a@icloud.com>: user does not exist", None),
        (
            "mx00.gmx.net",
            "554 gmx.net (mxgmx115) Nemesis ESMTP Service not available No SMTP service IP address is block listed. For \
             explanation visit https://www.gmx.net/mail/senderguidelines?c=bl",
            Some("suspend"),
        ),
        ("mx00.t-online.de", "554 IP=192.0.2.1 - A problem occurred. (Ask your postmaster for help)", Some("suspend")),
        ("smtp-in.orange.fr", "550 5.1.1 mwinf5c31 ME Adresse au moins un destinataire invalide. OFR_416 [416]", None),
        ("smtpz4.laposte.net", "421 Too many connections, slow down. LPN105_104", Some("set connection_limit 1")),
    ] {
        let rules = shaping(&config, site).1.automation;
        let fitting = rules.iter().find(|rule| rule.when.is_match(answer));
        assert_eq!(fitting.map(|rule| rule.action.to_string()).as_deref(), expected, "{answer}");
    }
}

#[test]
fn each_rule_has_an_example_that_no_rule_before_it_takes() {
    let rules = |provider: &Provider| -> Vec<_> {
        let mut shaping = Shaping::default();
        provider.layer.settings.apply(&mut shaping);
        shaping.automation.to_vec()
    };
    let mut seen = 0;
    for provider in &providers() {
        let rules = rules(provider);
        for (place, rule) in rules.iter().enumerate() {
            let example = rule.example.as_deref().unwrap_or_else(|| panic!("{} has no example", rule.name));
            let other = rules[..place].iter().find(|other| other.when.is_match(example));
            assert_eq!(other.map(|other| &other.name), None, "takes the example of {}", rule.name);
            seen += 1;
        }
    }
    assert!(seen > 25, "{seen} rules");
    assert!(SHIPPED_PROVIDERS.matches("https://").count() > 10, "sources are cited");
}

#[test]
fn a_configuration_stands_over_what_is_shipped() {
    let rule = "[[provider.google.automation]]\nwhen = 'mine'\naction = \"defer\"\n";
    let names = |rules: &[std::sync::Arc<AutomationRule>]| -> Vec<String> {
        rules.iter().map(|rule| rule.name.to_string()).collect()
    };
    let google = "gmail-smtp-in.l.google.com";
    let (_, plain) = shaping(&config(""), google);
    let (name, over) = shaping(&config(&format!("[provider.google]\nconnection_limit = 2\n{rule}")), google);
    assert_eq!(name.as_deref(), Some("google"));
    assert_eq!((over.connection_limit, over.max_deliveries_per_connection), (2, plain.max_deliveries_per_connection));
    assert_eq!(names(&over.automation)[..2], ["rule 1 of [provider.google]", "rule 1 of [shipped.provider.google]"]);
    assert_eq!(over.automation.len(), plain.automation.len() + 1);

    let own = format!("[provider.google]\nshipped = false\nmatch = [{{ mx_suffix = \".google.com\" }}]\n{rule}");
    let (_, alone) = shaping(&config(&own), google);
    assert_eq!(names(&alone.automation), ["rule 1 of [provider.google]"]);
    assert_eq!(alone.connection_limit, Shaping::default().connection_limit);

    let other = "[provider.mine]\nmatch = [{ mx_suffix = \".google.com\" }]\n";
    assert_eq!(shaping(&config(other), google).0.as_deref(), Some("mine"), "the configuration's own comes first");
    let none = config("shipped_providers = false\n");
    assert!(none.shaping_rules.is_empty());
    assert_eq!(shaping(&none, google).0, None);
}
