//! Whole configurations: every error's text, the defaults, includes, and the description.

use std::path::Path;
use std::time::Duration;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;

use super::*;

/// Cases of `## name`, a configuration, `--`, and the errors expected; the directory of the files is written DIR.
const ERROR_CASES: &str = include_str!("tests/errors.txt");
/// The example of every key that is to be.
const INTERFACE: &str = include_str!("tests/interface.toml");
const REFERENCE: &str = include_str!("../../docs/configuration.md");

#[test]
fn every_error_says_where_what_and_what_instead() {
    let directory = files();
    let mut seen = 0;
    for case in ERROR_CASES.split("## ").skip(1) {
        let (name, rest) = case.split_once('\n').unwrap();
        let (text, expected) = rest.split_once("--\n").unwrap();
        let found = errors(text, directory.path());
        assert_eq!(found.trim_end(), expected.trim_end(), "\ncase {name}; it printed:\n{found}\n");
        seen += 1;
    }
    assert!(seen > 30, "{seen} cases");
}

#[test]
fn every_error_has_a_place_and_all_but_syntax_errors_an_alternative() {
    for line in ERROR_CASES.lines().filter(|line| line.starts_with("t.toml:")) {
        let mut parts = line.splitn(4, ':').skip(1);
        assert!(parts.next().unwrap().parse::<usize>().is_ok_and(|number| number > 0), "{line}");
        assert!(parts.next().unwrap().parse::<usize>().is_ok_and(|number| number > 0), "{line}");
        assert!(line.contains("; ") || line.contains("not valid TOML"), "{line}");
        assert!(line.len() < 300, "{line}");
    }
}

/// What `interface.toml` shows and this version does not do yet; nothing else in it may be refused.
#[test]
fn the_interface_example_has_known_keys_only() {
    let directory = files();
    let found = errors(INTERFACE, directory.path());
    let found: Vec<&str> = found.lines().map(|line| line.splitn(4, ':').nth(3).unwrap_or(line)).collect();
    let expected = [
        " tenant.credentials: is not available yet; leave it out",
        " tenant.tokens: is not available yet; leave it out",
        " dsn.generate: is not available yet; write generate = \"never\" or leave it out",
        " events.webhook: is not available yet; leave it out",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_file_that_says_nothing_means_the_defaults() {
    let directory = tempfile::tempdir().unwrap();
    let config = Config::from_toml("[spool]\nallow_filesystem = true", "t.toml", directory.path()).unwrap();
    let mut expected = Config::default();
    expected.spool.allow_filesystem = true;
    expected.spool.path = directory.path().join("postrider-data");
    assert_eq!(format!("{config:?}"), format!("{expected:?}"));
    assert_eq!(config.events_path(), directory.path().join("postrider-data/events"));
}

#[test]
fn the_defaults_are_those_of_the_reference() {
    let config = Config::new("mta.example.com");
    assert_eq!((config.shards, config.pin, config.feedback_reference), (None, false, true));
    assert_eq!(config.shutdown_grace, Duration::from_secs(30));
    assert_eq!(config.spool.path, Path::new("postrider-data"));
    assert_eq!((config.spool.durability, config.spool.max_size_bytes), (Durability::Fsync, 50 << 30));
    assert!(!config.spool.allow_filesystem);
    let [smtp] = config.smtp_listeners.as_slice() else { panic!("one SMTP listener") };
    assert_eq!(smtp.address, "127.0.0.1:2525".parse::<SocketAddr>().unwrap());
    assert!(smtp.may_relay("127.0.0.9".parse().unwrap()) && smtp.may_relay("::1".parse().unwrap()));
    assert!(smtp.may_relay("::ffff:127.0.0.1".parse().unwrap()), "IPv4 inside IPv6");
    assert!(!smtp.may_relay("192.0.2.1".parse().unwrap()) && !smtp.trusts("192.0.2.1".parse().unwrap()));
    assert_eq!((smtp.max_message_bytes, smtp.line_endings), (50 << 20, LineEndings::Fix));
    assert!(smtp.tls.is_none() && smtp.received == ReceivedDetail::Full);
    let [http] = config.http_listeners.as_slice() else { panic!("one HTTP listener") };
    assert_eq!(http.address, "127.0.0.1:8025".parse::<SocketAddr>().unwrap());
    assert!(config.dns.servers.is_empty());
    for prohibited in ["127.0.0.1", "0.0.0.0", "::", "::1", "169.254.1.1", "fe80::1", "224.0.0.1", "::ffff:127.0.0.1"] {
        assert!(config.dns.prohibits(prohibited.parse().unwrap()), "{prohibited}");
    }
    assert!(!config.dns.prohibits("192.0.2.1".parse().unwrap()));
    assert_eq!(config.default_pool().sources, [(0, 1)]);
    assert_eq!(config.egress_sources[0].source_address, None);
    assert_eq!(config.egress_sources[0].ehlo_domain, "mta.example.com");
    let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
    assert_eq!(config.retry.schedule, RetrySchedule::Doubling { first: minutes(20), max: minutes(240) });
    assert_eq!(config.retry.max_age, minutes(5 * 1_440));
    assert_eq!((config.shaping.connection_limit, config.shaping.max_deliveries_per_connection), (10, 100));
    assert_eq!((config.shaping.max_recipients_per_batch, config.shaping.idle_timeout), (100, minutes(1)));
    assert!(config.shaping.pipelining && config.shaping.tls == TlsMode::Opportunistic);
}

/// RFC 5321 §4.5.3.2: the timeouts that a client must at least have.
#[test]
fn default_timeouts_follow_rfc_5321_4_5_3_2() {
    let timeouts = Timeouts::default();
    let at_least = [(timeouts.banner, 5), (timeouts.mail, 5), (timeouts.rcpt, 5), (timeouts.data, 2)];
    let at_least = at_least.into_iter().chain([(timeouts.data_block, 3), (timeouts.data_end, 10)]);
    for (timeout, minutes) in at_least {
        assert!(timeout >= Duration::from_secs(minutes * 60));
    }
}

#[test]
fn everything_available_is_read() {
    let directory = files();
    let text = include_str!("tests/full.toml");
    let config = Config::from_toml(text, "t.toml", directory.path()).unwrap();
    assert_eq!(config.hostname, "mta.example.com");
    assert_eq!((config.shards, config.pin, config.feedback_reference), (Some(2), true, false));
    assert_eq!(config.spool.path, directory.path().join("spool"));
    assert_eq!((config.spool.durability, config.spool.max_size_bytes), (Durability::None, 1 << 30));
    let smtp = &config.smtp_listeners[0];
    assert_eq!((smtp.line_endings, smtp.received), (LineEndings::Reject, ReceivedDetail::NoClient));
    assert!(smtp.may_relay("192.0.2.9".parse().unwrap()) && !smtp.trusts("192.0.2.9".parse().unwrap()));
    assert!(smtp.tls.as_ref().unwrap().key_pem.starts_with(b"-----BEGIN"));
    assert_eq!(config.http_listeners[0].admin_token_sha256, ["ab".repeat(32)]);
    assert_eq!(
        config.dns.servers,
        ["127.0.0.1:5300", "9.9.9.9:53"].map(|server| server.parse::<SocketAddr>().unwrap())
    );
    assert!(!config.dns.prohibits("127.0.0.1".parse().unwrap()));
    let targets = |domain| config.route_for(domain).map(|route| (route.to.clone(), route.tls));
    let address = RouteTarget::Address("[::1]:2526".parse().unwrap());
    let host = RouteTarget::Host { name: "sink.example".into(), port: 26 };
    assert_eq!(targets("a.test"), Some((vec![address, host], Some(TlsMode::Disabled))));
    assert_eq!(targets("b.a.test"), targets("a.test"));
    assert_eq!(targets("test"), Some((vec![RouteTarget::Mx("mx.example".into())], None)));
    assert_eq!(targets("[192.0.2.7]"), Some((vec![RouteTarget::Mx("mx.example".into())], None)));
    assert_eq!(targets("example.com"), None);
    assert_eq!(config.pool("shared").unwrap().sources, [(1, 3), (0, 1)]);
    assert_eq!(config.default_pool().sources, [(2, 1)]);
    assert_eq!(config.egress_sources[2].name, "unspecified");
    assert_eq!(config.egress_sources[1].ehlo_domain, "mta.example.com");
    assert_eq!(config.dkim[0].sign_for, ["a.example"]);
    assert_eq!(config.dkim[1].sign_for, ["*"]);
    assert_eq!(config.dkim[0].key.algorithm, DkimAlgorithm::Ed25519Sha256);
    assert_eq!(config.dkim[1].key.algorithm, DkimAlgorithm::RsaSha256 { bits: 2048 });
    assert_eq!(config.dkim[1].key.path, directory.path().join("keys/a.example-s2.pem"));
    let minutes = |list: [u64; 3]| list.map(|minutes| Duration::from_secs(60 * minutes)).to_vec();
    assert_eq!(config.retry.schedule, RetrySchedule::Listed(minutes([1, 5, 20])));
    assert_eq!(config.shaping.timeouts.connect, Duration::from_secs(10));
    assert_eq!(config.shaping.timeouts.data_end, Timeouts::default().data_end);
    assert_eq!(config.shaping.tls, TlsMode::Required);
    assert_eq!(config.events_path(), Path::new("/var/log/postrider"));
    assert_eq!(config.events.headers, ["Subject", "X-Customer-*"]);
}

#[test]
fn included_files_merge_in_the_order_of_their_names() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("conf.d")).unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("main.toml", "include = [\"conf.d/*.toml\"]\n[spool]\nallow_filesystem = true\n");
    write("conf.d/20.toml", "[[route]]\ndomain = \"*\"\nto = [\"b.example:25\"]\n[events]\npath = \"events\"\n");
    write("conf.d/10.toml", "[[route]]\ndomain = \"a.test\"\nto = [\"a.example:25\"]\n[spool]\nmax_size = \"1GiB\"\n");
    write("conf.d/30.toml.off", "nonsense");
    let config = Config::load(&directory.path().join("main.toml")).unwrap();
    let routes: Vec<String> = config.routes.iter().map(|route| route.domain.to_string()).collect();
    assert_eq!(routes, ["a.test", "*"]);
    assert_eq!(config.spool.max_size_bytes, 1 << 30);
    assert_eq!(config.events_path(), directory.path().join("conf.d/events"), "relative to the file that says so");

    write("main.toml", "include = [\"conf.d/*.toml\", \"confd/*.toml\", \"keys/?\"]\nspool.allow_filesystem = true\n");
    std::fs::create_dir(directory.path().join("keys")).unwrap();
    let told = describe(&Config::load(&directory.path().join("main.toml")).unwrap());
    let lines: Vec<&str> = told.lines().filter(|line| line.contains("include ")).collect();
    assert_eq!(lines, ["warning: include \"confd/*.toml\" finds nothing: its directory is not there"]);

    write("conf.d/40.toml", "include = []\nhostname = \"b.example\"\n[spool]\nmax_size = \"2GiB\"\n");
    let errors = Config::load(&directory.path().join("main.toml")).unwrap_err().to_string();
    let expected = "\
DIR/conf.d/40.toml:1:1: include: works in the main file only; write the pattern there
DIR/conf.d/40.toml:4:1: spool.max_size: is already given at DIR/conf.d/10.toml:5:1; leave one of them out";
    assert_eq!(errors.replace(&directory.path().display().to_string(), "DIR"), expected);
}

#[test]
fn numbers_of_things_are_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let listeners = "[[listener]]\nprotocol = \"http\"\naddress = \"127.0.0.1:0\"\n".repeat(65);
    let listeners_error = "t.toml:193:1: listener: more than 64 listeners; use fewer";
    let sources: String =
        (0..4_097).map(|n| format!("[[egress_source]]\nname = \"s{n}\"\nsource_address = \"192.0.2.1\"\n")).collect();
    let sources_error = "t.toml:12289:1: egress_source: more than 4096 egress sources; use fewer";
    let targets = format!("[[route]]\ndomain = \"*\"\nto = [{}]\n", "\"a.example:25\",".repeat(65));
    let targets_error =
        "t.toml:3:6: route.to: has more than 64 targets; write fewer, or a name that has several addresses";
    let intervals = format!("[retry]\nretry_interval = [{}]\n", "\"1m\",".repeat(101));
    let intervals_error =
        "t.toml:2:18: retry.retry_interval: has more than 100 intervals; leave some out; the last one is repeated";
    for (text, expected) in
        [(listeners, listeners_error), (sources, sources_error), (targets, targets_error), (intervals, intervals_error)]
    {
        assert_eq!(errors(&text, directory.path()), expected);
    }
}

#[test]
fn unreadable_files_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let load = |name: &str| Config::load(&directory.path().join(name)).unwrap_err().to_string();
    let strip = |text: String| text.replace(&directory.path().display().to_string(), "DIR");
    let instead = "write the path of a configuration file";
    assert_eq!(strip(load("x.toml")), format!("DIR/x.toml: cannot be read: there is no such file; {instead}"));
    assert_eq!(strip(load("")), format!("DIR/: cannot be read: it is a directory; {instead}"));
    std::fs::write(directory.path().join("latin1.toml"), b"# \xe4").unwrap();
    let not_utf8 = "cannot be read: it is not UTF-8 from byte 2";
    assert_eq!(strip(load("latin1.toml")), format!("DIR/latin1.toml: {not_utf8}; save it as UTF-8"));
    std::fs::write(directory.path().join("spool.toml"), "[spool]\npath = \"latin1.toml\"\n").unwrap();
    std::fs::write(directory.path().join("events.toml"), "[events]\npath = \"latin1.toml\"\n").unwrap();
    let events = strip(load("events.toml"));
    let wrong = "2:8: events.path: DIR/latin1.toml is not a directory; write the path of a directory, or of a new one";
    assert!(events.contains(wrong), "{events}");
    let spool = "spool.path: DIR/latin1.toml is not a directory; write the path of a directory, or of a new one";
    assert_eq!(strip(load("spool.toml")), format!("DIR/spool.toml:2:8: {spool}"));
    std::fs::write(directory.path().join("large.toml"), "#".repeat(8 << 20) + "#").unwrap();
    let large = "cannot be read: it is larger than 8MiB";
    assert_eq!(strip(load("large.toml")), format!("DIR/large.toml: {large}; {instead}"));
}

/// A tenant's keys stand in for the general ones, each by itself.
#[test]
fn a_tenants_retries_stand_on_the_general_ones() {
    let seconds = Duration::from_secs;
    let doubling = |first, max| RetrySchedule::Doubling { first: seconds(first), max: seconds(max) };
    let general = RetryConfig { schedule: doubling(600, 3_600), max_age: seconds(86_400) };
    let listed = RetryConfig { schedule: RetrySchedule::Listed(vec![seconds(5)]), ..general.clone() };
    let with = |general: &RetryConfig, first: Option<u64>, max: Option<u64>, age: Option<u64>| {
        let rules = RetryRules {
            interval: first.map(|first| RetryInterval::First(seconds(first))),
            max_interval: max.map(seconds),
            max_age: age.map(seconds),
        };
        let RetryConfig { schedule, max_age } = general.with(&rules);
        (schedule, max_age.as_secs())
    };
    assert_eq!(with(&general, None, None, None), (doubling(600, 3_600), 86_400));
    assert_eq!(with(&general, Some(60), None, None), (doubling(60, 3_600), 86_400));
    assert_eq!(with(&general, Some(7_200), None, None), (doubling(7_200, 7_200), 86_400));
    assert_eq!(with(&general, None, Some(1_200), Some(60)), (doubling(600, 1_200), 60));
    assert_eq!(with(&listed, None, Some(1_200), None), (listed.schedule.clone(), 86_400));
    assert_eq!(with(&listed, Some(60), None, None), (doubling(60, 14_400), 86_400));
    let own = RetryInterval::Listed(vec![seconds(1), seconds(2)]);
    let rules = RetryRules { interval: Some(own), ..RetryRules::default() };
    assert_eq!(general.with(&rules).schedule, RetrySchedule::Listed(vec![seconds(1), seconds(2)]));
}

#[test]
fn retry_intervals_double_up_to_the_maximum_or_follow_the_list() {
    let minute = Duration::from_secs(60);
    let doubling = RetrySchedule::Doubling { first: 20 * minute, max: 240 * minute };
    let minutes: Vec<u64> = (1..=6).map(|attempts| doubling.interval(attempts).as_secs() / 60).collect();
    assert_eq!(minutes, [20, 40, 80, 160, 240, 240]);
    assert_eq!(doubling.interval(u32::MAX), 240 * minute);
    assert_eq!(doubling.interval(0), 20 * minute);
    let listed = RetrySchedule::Listed(vec![minute, 5 * minute]);
    assert_eq!([0, 1, 2, 3, u32::MAX].map(|attempts| listed.interval(attempts).as_secs()), [60, 60, 300, 300, 300]);
}

#[test]
fn the_description_is_complete_and_readable() {
    let directory = files();
    let config = Config::from_toml(include_str!("tests/full.toml"), "t.toml", directory.path()).unwrap();
    let text = describe(&config).replace(&directory.path().display().to_string(), "DIR");
    let mut hidden: Vec<String> = Vec::new();
    for line in text.lines() {
        hidden.push(match line.split_once("p=") {
            Some((front, _)) => format!("{front}p=…"),
            None if line.contains("file system ") => "          file system …".into(),
            None => line.into(),
        });
    }
    let expected = include_str!("tests/full.txt");
    let found = hidden.join("\n") + "\n";
    // Depends on where the tests run.
    let untested = "warning: the spool's file system is neither ext4 nor XFS; its durability is untested\n";
    assert_eq!(found.replace(untested, ""), expected);
}

/// A name as long as its column does not run into the next one, and a key that is said twice is told once.
#[test]
fn long_names_and_keys_said_twice_are_readable() {
    let directory = tempfile::tempdir().unwrap();
    let text = "[spool]\nallow_filesystem = true\n[[egress_source]]\nname = \"mta-eu-west-01\"\n\
                source_address = \"192.0.2.11\"\n[[egress_pool]]\nname = \"acme-dedicated\"\n\
                sources = [{ source = \"mta-eu-west-01\" }]\n[[tenant]]\nname = \"acme-marketing\"\n\
                [[limit]]\nname = \"acme at google\"\ntenant = \"acme-marketing\"\nmax_message_rate = \"5/s\"\n\
                [[route]]\ndomain = \"partner.example\"\nto = [\"192.0.2.1:25\"]\n\
                [provider.google]\nconnection_limit = 77\n[[provider.google.automation]]\nwhen = \"x\"\n\
                action = \"suspend\"\nfor = \"1h\"\n";
    let path = directory.path().join("t.toml");
    std::fs::write(&path, text).unwrap();
    let described = describe(&Config::load(&path).unwrap());
    for expected in [
        "  mta-eu-west-01 192.0.2.11  EHLO",
        "  acme-dedicated mta-eu-west-01 1 (100.0 %)",
        "  acme-marketing any domain; pool default",
        "  acme at google tenant acme-marketing: 5/s",
        "  partner.example 192.0.2.1:25; TLS opportunistic",
        "max_deliveries_per_connection = 50, automation = 4 rules, connection_limit = 77, automation = 1 rule\n",
    ] {
        assert!(described.contains(expected), "{expected}\n{described}");
    }
    assert_eq!(described.matches("connection_limit = ").count(), 1, "{described}");
}

/// RFC 6376 §3.6.1: `p=` is the key verifiers use; so it must be that of the private half.
#[test]
fn the_dns_record_has_the_public_key() {
    let rsa = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
    let pkcs8: Pkcs8V1Der<'_> = rsa.as_der().unwrap();
    let pem =
        |label: &str, der: &[u8]| format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der));
    let from_pkcs8 = DkimKeyPem::from_pem("k".into(), pem("PRIVATE KEY", pkcs8.as_ref())).unwrap();
    // PKCS#8 for RSA is a header of 26 octets around PKCS#1.
    let from_pkcs1 = DkimKeyPem::from_pem("k".into(), pem("RSA PRIVATE KEY", &pkcs8.as_ref()[26..])).unwrap();
    assert_eq!(from_pkcs8.public_key_base64, from_pkcs1.public_key_base64);
    let spki = STANDARD.decode(&from_pkcs8.public_key_base64).unwrap();
    let message = b"signed";
    let mut signature = vec![0; rsa.public_modulus_len()];
    let random = aws_lc_rs::rand::SystemRandom::new();
    rsa.sign(&aws_lc_rs::signature::RSA_PKCS1_SHA256, &random, message, &mut signature).unwrap();
    let public = aws_lc_rs::signature::UnparsedPublicKey::new(&aws_lc_rs::signature::RSA_PKCS1_2048_8192_SHA256, spki);
    public.verify(message, &signature).unwrap();
}

/// Every `toml` example of the reference is read without an error, and every key of `interface.toml` is described
/// there.
#[test]
fn the_reference_is_true() {
    let directory = files();
    let mut examples = 0;
    for block in REFERENCE.split("```toml\n").skip(1) {
        let text = block.split("```").next().unwrap();
        let found = errors(text, directory.path());
        assert_eq!(found, "no errors", "\n{text}");
        examples += 1;
    }
    assert!(examples >= 10, "{examples} examples");
    for line in INTERFACE.lines() {
        let Some((key, _)) = line.split_once(" = ") else { continue };
        let key = key.rsplit('.').next().unwrap_or(key);
        if key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
            assert!(REFERENCE.contains(&format!("`{key}`")), "{key} is not in docs/configuration.md");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let _ = Config::from_toml(&text, "t.toml", Path::new("/nonexistent"));
    }

    /// Known keys with values of every kind, in any section.
    #[test]
    fn no_value_panics(
        section in prop::sample::select(SECTIONS),
        key in prop::sample::select(KEYS),
        value in prop_oneof![
            "\"[a-z0-9:.*/{}\\[\\]é-]{0,20}\"",
            "-?[0-9]{1,25}",
            "[0-9]{1,3}\\.[0-9]{1,3}",
            Just("true".to_owned()),
            Just("[]".to_owned()),
            Just("{}".to_owned()),
            Just("[{}]".to_owned()),
            Just("[[], 1, \"x\"]".to_owned()),
            Just("2026-12-01".to_owned()),
        ],
    ) {
        let text = format!("{section}\n{key} = {value}\n");
        let _ = Config::from_toml(&text, "t.toml", Path::new("/nonexistent"));
    }

    /// The place of an unknown key is where it stands, whatever characters are in front of it.
    #[test]
    fn places_count_characters(lines in prop::collection::vec("[a-zäöü€😀 ]{0,9}", 0..9), front in "[äöü€😀]{1,9}") {
        let mut text: String = lines.iter().map(|line| format!("# {line}\r\n")).collect();
        text.push_str(&format!("events = {{ meta = [\"{front}\"], zzz = 1 }}"));
        let errors = Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap_err();
        let unknown = errors.iter().find(|error| error.key == "events.zzz").unwrap();
        let column = "events = { meta = [\"\"], ".len() + front.chars().count() + 1;
        prop_assert_eq!(unknown.position, Some((lines.len() + 1, column)));
    }
}

const SECTIONS: &[&str] = &[
    "",
    "[spool]",
    "[[listener]]",
    "[[listener]]\nprotocol = \"smtp\"",
    "[[listener]]\nprotocol = \"http\"",
    "[dns]",
    "[[route]]",
    "[[egress_source]]",
    "[[egress_pool]]",
    "[[dkim]]",
    "[[tenant]]",
    "[return_path]",
    "[retry]",
    "[shaping]",
    "[shaping.default]",
    "[shaping.default.timeouts]",
    "[shaping.\"a.test\"]",
    "[shaping.\"a.test\".sources.unspecified]",
    "[provider.p]",
    "[provider.p.sources.unspecified]",
    "[[provider.p.match]]",
    "[events]",
    "[dsn]",
];

const KEYS: &[&str] = &[
    "hostname",
    "shards",
    "pin",
    "include",
    "shutdown_grace",
    "spool",
    "listener",
    "route",
    "shaping",
    "dkim",
    "path",
    "durability",
    "max_size",
    "protocol",
    "address",
    "relay_from",
    "tls",
    "max_message_size",
    "admin_tokens",
    "servers",
    "prohibited_hosts",
    "domain",
    "to",
    "name",
    "source_address",
    "ehlo_domain",
    "sources",
    "selector",
    "key",
    "sign_for",
    "headers",
    "retry_interval",
    "max_retry_interval",
    "max_age",
    "connection_limit",
    "max_message_rate",
    "mx_rollup",
    "match",
    "mx_suffix",
    "idle_timeout",
    "timeouts",
    "connect",
    "default",
    "meta",
    "generate",
    "egress_pool",
    "domains",
    "priority",
    "retry",
    "zzz",
];

fn errors(text: &str, directory: &Path) -> String {
    let mut text = text.to_owned();
    if !text.contains("spool") {
        text.push_str("\n[spool]\nallow_filesystem = true\n");
    } else if text.contains("[spool]\n") && !text.contains("allow_filesystem") && !text.contains("/proc/none") {
        text = text.replace("[spool]\n", "[spool]\nallow_filesystem = true\n");
    }
    match Config::from_toml(&text, "t.toml", directory) {
        Ok(_) => "no errors".into(),
        Err(errors) => errors.to_string().replace(&directory.display().to_string(), "DIR"),
    }
}

/// A directory with the certificates and keys that the cases name.
fn files() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("keys")).unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    let certificate = rcgen::generate_simple_self_signed(["mta.example.com".into()]).unwrap();
    write("cert.pem", &certificate.cert.pem());
    write("secret", "correct horse\r\n");
    write("empty", "\n");
    write("cert.key", &certificate.signing_key.serialize_pem());
    write("mta.pem", &certificate.cert.pem());
    write("our-ca.pem", &certificate.cert.pem());
    write("mta.key", &certificate.signing_key.serialize_pem());
    write("other.key", &rcgen::KeyPair::generate().unwrap().serialize_pem());
    let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().serialize_pem();
    write("ed25519.pem", &ed25519);
    for name in ["a.example-s1", "acme.example-s1", "example.com-ed1"] {
        write(&format!("keys/{name}.pem"), &ed25519);
    }
    let rsa = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap().serialize_pem();
    for name in ["a.example-s2", "example.com-s1"] {
        write(&format!("keys/{name}.pem"), &rsa);
    }
    let pem = |label: &str, body: &str| format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n");
    write("encrypted.pem", &pem("ENCRYPTED PRIVATE KEY", "AAAA"));
    write("public.pem", &pem("PUBLIC KEY", "AAAA"));
    write("ec.pem", &pem("EC PRIVATE KEY", "AAAA"));
    write("damaged.pem", &pem("RSA PRIVATE KEY", "not base64"));
    write("garbage.pem", "hello");
    write("rsa1024.pem", RSA_1024);
    directory
}

/// A throw-away key: the library generates none that short.
const RSA_1024: &str = "\
-----BEGIN RSA PRIVATE KEY-----
MIICXQIBAAKBgQDt5x6pXcEADAdXcQD6OYgu5kzYDV1Df6QvNFAQFW+RbLAF1vWR
ORj1Qf980xIiwp3uFh9Nml5PZKHWd/ZxGPhq/0xRDwQZUWV5qYznw2PAtyEK0WoB
6id+u4zwL3rHMi5gZqEOEQ5qowxRPNeAojzppsFsB/c+kVX+huk463l33wIDAQAB
AoGBALie8nmHK17I9u2R4atN+HRE/v9vp5/ZL2X+l99Tc0iM6zEs91di0w6J0CZj
eqCFHaCFhHdpw6SjOMDCSfrM4QJQxd3Ys8VnQJT87SZYDo1dT+7sklX1mJDxW74O
YGAb0BmBhQyfNfBrN6KkHmC8R0Evh4gcZiQg641dmBTef9FpAkEA/NF0WkMiyk0f
LPOZ9zdQs/sSOAFrGN7bqJK9smrWVOxqP5dNrpjz6TMYaypTMK+r5lWhk7O4SpU5
gvmcBPfcGwJBAPDlnCiIIkyTUPNegs9BLwFIz9xDM9VnTv/jAr61EsEJ5s1aXiJJ
5Tx32/Tw9a3LAVhswlNK/JBa1EgEZiXZh40CQBsWni7lrp6acNKyLzcL2DvQlP0n
OcBqcIK5ZlXtmJV011WE8q/Yd5nu/ZjN6if3SqXdWvimcwKaxpTABfWKUS0CQQDN
xnVEMjWKT/TATyVSQQ4T/MyCDG3Eh0D2WEZJ/YcNmpWrKNxsUc8dfg1ICGT0lgqK
LC061T01WkEnW4qeHlkpAkBwqG001q/NVE5hBOHqO3PljZAM10Tv2l/pgKYNxPXo
kyExlLN7KdmFLvc70+Q37oa3y6Q7oGNA+ERXtgxLd3oJ
-----END RSA PRIVATE KEY-----
";
