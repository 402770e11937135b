//! DANE with signed zones that a real Unbound serves: it validates itself (`trust_ad`), or leaves that to the engine
//! (`validate`). The zones are signed by ldns, from a root of our own down.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use postrider::config::{Config, Dnssec, DomainPattern, Route, RouteTarget};

use crate::servers::installed;
use crate::support::embedded::{Running, config};
use crate::support::sink::{Sink, Verb};
use crate::support::tls_front::TlsFront;
use crate::support::{at_loopback, message, tlsa};
use crate::tools::{self, Server};

#[test]
fn unbound_validates_and_is_believed() {
    let Some(world) = World::new("validator iterator") else { return };
    // A wildcard MX and a wildcard TLSA.
    world.check(|config| config.dns.dnssec = Dnssec::TrustAd, Ok(BY_DANE));
}

#[test]
fn unbound_leaves_validation_to_the_engine() {
    let Some(world) = World::new("iterator") else { return };
    let anchor = fs::read_to_string(world.directory.path().join("root.key")).unwrap();
    let validate = |config: &mut Config| {
        config.dns.dnssec = Dnssec::Validate;
        config.dns.trust_anchor = Some(anchor.into());
    };
    // hickory 0.26.3 takes an answer of a wildcard whose own NSEC is the proof for a forged one, and so does this test:
    // the mail waits. Those of NSEC3 zones it takes.
    world.check(validate, Err("MX lookup of any.wild.good.test: DNS error: DNSSEC validation failed"));
}

/// Whose keys are not the trust anchor's is nobody: no answer counts, and nothing is sent.
#[test]
fn another_trust_anchor_proves_nothing() {
    let Some(world) = World::new("iterator") else { return };
    let running = world.engine(|config| config.dns.dnssec = Dnssec::Validate);
    running.inject(&["a@good.test"], &message("good"));
    running.rows_when("it is blocked", |rows| {
        let blocked = rows.iter().filter_map(|row| row.blocked_by.as_ref());
        blocked.into_iter().any(|blocked| blocked.contains("MX lookup of good.test"))
    });
    running.shutdown();
    assert_eq!(world.sink.count(Verb::Mail), 0);
}

/// What becomes of mail to a domain: what its event tells, or why it is blocked.
type Fate = Result<&'static str, &'static str>;

const FATES: [(&str, Fate); 12] = [
    ("good.test", Ok(BY_DANE)),
    // RFC 7672 §2.2.2: an MX host that is an alias has the records of what it leads to, not those of its own name.
    ("alias-mx.good.test", Ok(BY_DANE)),
    // If that has none, or nobody vouches for it, its own.
    ("half-alias-mx.good.test", Ok(BY_DANE)),
    // The same of a host that a route names.
    ("routed.test", Ok(BY_DANE)),
    ("nsec3.test", Ok(BY_DANE)),
    // A wildcard MX and a wildcard TLSA.
    ("any.wild.nsec3.test", Ok(BY_DANE)),
    // That a signed zone has no records is proven, by NSEC3 too: then there is no DANE.
    ("none.nsec3.test", Ok(BY_NOBODY)),
    // An unsigned zone's records say nothing.
    ("plain.test", Ok(BY_NOBODY)),
    ("wrong.good.test", Err("no TLSA record (3 1 1) names the peer's certificate")),
    ("bare.good.test", Err("STARTTLS")),
    ("bogus.test", Err("mx.bogus.test must not be used: TLSA lookup of _25._tcp.mx.bogus.test")),
    ("mx-bogus.bogus.test", Err("MX lookup of mx-bogus.bogus.test")),
];

const BY_DANE: &str = r#""tls_protocol_version":"TLSv1.3","tls_verified_by":"dane""#;
const BY_NOBODY: &str = r#""tls_protocol_version":"TLSv1.3","tls_peer"#;

/// Two MX hosts, one with a certificate that nobody vouches for, one without TLS; a name server for their domains.
struct World {
    sink: Sink,
    bare: Sink,
    _front: TlsFront,
    _unbound: Server,
    dns: SocketAddr,
    directory: tempfile::TempDir,
}

impl World {
    /// None, with the reason printed, where something is missing.
    fn new(modules: &str) -> Option<Self> {
        let unbound = unpacked("usr/sbin/unbound")?;
        let sign = unpacked("usr/bin/ldns-signzone")?;
        let sink = Sink::start();
        let front = at_loopback(25, |address| TlsFront::try_start_at(address, &["other.test"], sink.address()))?;
        let (bare, bare_ip) = Sink::at_port_25()?;
        let directory = tempfile::tempdir().unwrap();
        let zones = Zones { directory: directory.path(), sign };
        let (ip, bare_ip) = (front.address().ip(), IpAddr::from(bare_ip));
        zones.write_all(ip, bare_ip, &hex(&tlsa::data(front.certificate_pem(), 1, 1)));
        let dns = tools::free_address();
        let here = directory.path().display();
        let mut text = format!(
            "server:\n interface: 127.0.0.1@{}\n port: {}\n username: \"\"\n chroot: \"\"\n directory: \"{here}\"\n\
             \x20pidfile: \"\"\n do-daemonize: no\n use-syslog: no\n do-not-query-localhost: no\n\
             \x20local-zone: \"test.\" nodefault\n module-config: \"{modules}\"\n trust-anchor-file: \"{here}/root.key\"\n\
             remote-control:\n control-enable: no\n",
            dns.port(),
            dns.port(),
        );
        for zone in [".", "good.test", "nsec3.test", "bogus.test", "plain.test"] {
            write!(
                text,
                "auth-zone:\n name: \"{zone}\"\n zonefile: \"{here}/{}.signed\"\n for-downstream: no\n\
                 \x20for-upstream: yes\n fallback-enabled: no\n",
                file_of(zone),
            )
            .unwrap();
        }
        fs::write(directory.path().join("unbound.conf"), text).unwrap();
        let mut unbound = command(&unbound);
        unbound.arg("-d").arg("-c").arg(directory.path().join("unbound.conf"));
        let log = fs::File::create(directory.path().join("output")).unwrap();
        unbound.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let unbound = Server::start(&mut unbound, dns);
        Some(Self { sink, bare, _front: front, _unbound: unbound, dns, directory })
    }

    fn engine(&self, change: impl FnOnce(&mut Config)) -> Running {
        let mut config = config(self.directory.path());
        config.shards = Some(1);
        config.dns.servers = vec![self.dns];
        config.dns.prohibited_hosts.clear();
        config.shaping.mta_sts = false;
        let to = vec![RouteTarget::Host { name: "alias.good.test".to_owned(), port: 25 }];
        config.routes.push(Route::new(DomainPattern::Exact("routed.test".to_owned()), to));
        change(&mut config);
        Running::start(config)
    }

    fn check(&self, change: impl FnOnce(&mut Config), of_nsec_wildcard: Fate) {
        let mut running = self.engine(change);
        let mut fates = FATES.to_vec();
        fates.push(("any.wild.good.test", of_nsec_wildcard));
        for (domain, _) in &fates {
            running.inject(&[&format!("a@{domain}")], &message(domain));
        }
        let delivered = fates.iter().filter(|(_, fate)| fate.is_ok()).count();
        for event in running.finals(delivered) {
            let event = event.to_json();
            let fate = fates.iter().find(|(domain, _)| event.contains(&format!("\"recipient\":\"a@{domain}\"")));
            let Some((_, Ok(told))) = fate else { panic!("it should be blocked: {event}") };
            assert!(event.contains("\"type\":\"Delivery\"") && event.contains(told), "{told}: {event}");
        }
        for (domain, fate) in &fates {
            let Err(because) = fate else { continue };
            running.rows_when(&format!("{domain} is blocked: {because}"), |rows| {
                let row = rows.iter().find(|row| row.recipient == format!("a@{domain}"));
                let row = row.unwrap_or_else(|| panic!("{domain} is queued"));
                assert_eq!(row.num_attempts, 0, "{domain}");
                row.blocked_by.as_ref().is_some_and(|blocked| blocked.contains(because))
            });
        }
        running.shutdown();
        assert_eq!((self.sink.count(Verb::Content), self.bare.count(Verb::Mail)), (delivered, 0));
    }
}

struct Zones<'a> {
    directory: &'a Path,
    sign: PathBuf,
}

impl Zones<'_> {
    /// The right digest is of `digest`, the wrong one of none.
    fn write_all(&self, ip: IpAddr, bare_ip: IpAddr, digest: &str) {
        let wrong = "07".repeat(32);
        let mut root = "@ NS ns.\nns A 127.0.0.1\n".to_owned();
        let good = format!(
            "@ MX 10 mx\nmx A {ip}\n_25._tcp.mx TLSA 3 1 1 {digest}\n\
             *.wild MX 10 mx2\nmx2 A {ip}\n*._tcp.mx2 TLSA 3 1 1 {digest}\n\
             alias-mx MX 10 alias\nalias CNAME mx\n_25._tcp.alias TLSA 3 1 1 {wrong}\n\
             half-alias-mx MX 10 half-alias\nhalf-alias CNAME mx.plain.test.\n\
             _25._tcp.half-alias TLSA 3 1 1 {digest}\n\
             wrong MX 10 mx3\nmx3 A {ip}\n_25._tcp.mx3 TLSA 3 1 1 {wrong}\n\
             bare MX 10 mx4\nmx4 A {bare_ip}\n_25._tcp.mx4 TLSA 3 1 1 {digest}\n"
        );
        root += &self.write_signed("good.test", &good, &[]);
        let nsec3 = format!(
            "@ MX 10 mx\nmx A {ip}\n_25._tcp.mx TLSA 3 1 1 {digest}\nnone MX 10 mx-none\nmx-none A {ip}\n\
             *.wild MX 10 mx2\nmx2 A {ip}\n*._tcp.mx2 TLSA 3 1 1 {digest}\n"
        );
        root += &self.write_signed("nsec3.test", &nsec3, &["-n", "-t", "0"]);
        let bogus = format!(
            "@ MX 10 mx\nmx A {ip}\n_25._tcp.mx TLSA 3 1 1 {wrong}\nmx-bogus MX 10 mx5\nmx5 A {ip}\nmx6 A {ip}\n"
        );
        root += &self.write_signed("bogus.test", &bogus, &[]);
        self.change("bogus.test", &wrong, digest);
        self.change("bogus.test", "mx5.bogus.test.\n", "mx6.bogus.test.\n");
        let plain = format!("@ MX 10 mx\nmx A {ip}\n_25._tcp.mx TLSA 3 1 1 {wrong}\n");
        fs::write(self.directory.join("plain.test.signed"), with_apex("plain.test", &plain)).unwrap();
        root += "plain.test. NS ns.plain.test.\nns.plain.test. A 127.0.0.1\n";
        self.write_signed(".", &root, &[]);
        fs::copy(self.directory.join("root.ksk.key"), self.directory.join("root.key")).unwrap();
    }

    /// Signs a zone; what its parent has to say of it.
    fn write_signed(&self, zone: &str, records: &str, options: &[&str]) -> String {
        let file = file_of(zone);
        fs::write(self.directory.join(file), with_apex(zone, records)).unwrap();
        let keygen = self.sign.with_file_name("ldns-keygen");
        for (kind, flag) in [("ksk", Some("-k")), ("zsk", None)] {
            let made = tools::run(self.command(&keygen).args(["-a", "ECDSAP256SHA256"]).args(flag).arg(zone));
            for ending in ["key", "private"] {
                let from = self.directory.join(format!("{}.{ending}", made.trim()));
                fs::copy(from, self.directory.join(format!("{file}.{kind}.{ending}"))).unwrap();
            }
        }
        let mut sign = self.command(&self.sign);
        let keys = [format!("{file}.zsk"), format!("{file}.ksk")];
        tools::run(sign.args(options).args(["-o", zone, "-f", &format!("{file}.signed"), file]).args(keys));
        let key2ds = self.sign.with_file_name("ldns-key2ds");
        let ds = tools::run(self.command(&key2ds).args(["-n", "-2", &format!("{file}.ksk.key")]));
        format!("{zone}. NS ns.{zone}.\nns.{zone}. A 127.0.0.1\n{ds}\n")
    }

    /// Falsifies a signed zone.
    fn change(&self, zone: &str, from: &str, to: &str) {
        let path = self.directory.join(format!("{}.signed", file_of(zone)));
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        fs::write(path, text.replace(from, to)).unwrap();
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = command(program);
        command.current_dir(self.directory);
        command
    }
}

fn with_apex(zone: &str, records: &str) -> String {
    let dot = if zone == "." { "" } else { "." };
    format!("$ORIGIN {zone}{dot}\n$TTL 60\n@ SOA ns hostmaster 1 3600 600 86400 60\n@ NS ns\nns A 127.0.0.1\n{records}")
}

fn file_of(zone: &str) -> &str {
    if zone == "." { "root" } else { zone }
}

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

/// A program of the tree of unpacked packages; None, with the reason printed, where it is not there.
fn unpacked(program: &str) -> Option<PathBuf> {
    let path = installed("root")?.join(program);
    if !path.is_file() {
        tools::missing(&format!("no {} (.ci/run makes it)", path.display()));
        return None;
    }
    Some(path)
}

/// Runs a program of the tree with the libraries of the tree.
fn command(program: &Path) -> Command {
    let root = program.ancestors().nth(3).expect("it is in usr/bin or usr/sbin");
    let named = |folder: PathBuf, part: &str| {
        let mut entries = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
        entries.find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains(part)))
    };
    let libraries = named(root.join("usr/lib"), "-linux-gnu").expect("a folder of libraries");
    let loader = ["usr/lib64", "usr/lib"].iter().find_map(|folder| named(root.join(folder), "ld-linux"));
    let mut command = Command::new(loader.expect("a dynamic loader"));
    command.arg("--library-path").arg(libraries).arg(program);
    command
}
