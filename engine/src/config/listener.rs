//! `[[listener]]`: where mail and administration come in.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use rustls::crypto::aws_lc_rs;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::error::{Place, Placed, Wrong};
use super::load::read_text;
use super::reader::Section;
use super::{Config, HttpListener, LineEndings, ListenerTls, ReceivedDetail, SmtpListener, value};
use crate::limits;

#[derive(Clone, Copy)]
enum Protocol {
    Smtp,
    Http,
}

impl SmtpListener {
    /// Whether this client may relay without AUTH.
    pub fn may_relay(&self, client: IpAddr) -> bool {
        contains(&self.relay_from, client)
    }

    /// Whether this client may give X-Tenant and the like.
    pub fn trusts(&self, client: IpAddr) -> bool {
        contains(&self.trusted_hosts, client)
    }
}

impl super::DnsConfig {
    /// Whether a host found by MX, A or AAAA or given as address literal must not be connected to.
    pub fn prohibits(&self, host: IpAddr) -> bool {
        contains(&self.prohibited_hosts, host)
    }
}

/// An IPv4 address inside IPv6 (`::ffff:127.0.0.1`) is that IPv4 address.
fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// Listeners that are configured replace the default ones, all of them.
pub(super) fn read(top: &Section<'_>, config: &mut Config) {
    let mut sections = top.tables("listener", "[[listener]]");
    if sections.is_empty() {
        return;
    }
    if let Some(beyond) = sections.get(limits::CONFIG_LISTENERS_MAX) {
        let wrong = Wrong::new(format!("more than {} listeners", limits::CONFIG_LISTENERS_MAX));
        top.wrong(beyond.place, "listener", wrong.instead("use fewer"));
        sections.truncate(limits::CONFIG_LISTENERS_MAX);
    }
    config.smtp_listeners.clear();
    config.http_listeners.clear();
    let mut addresses: Vec<Placed<SocketAddr>> = Vec::new();
    for section in sections {
        let protocols = [("smtp", Protocol::Smtp), ("http", Protocol::Http)];
        let protocol = section.choice("protocol", &protocols, &["smtps", "lmtp", "https"]);
        let address = read_address(&section, &mut addresses);
        match protocol {
            Some(Protocol::Smtp) => config.smtp_listeners.push(read_smtp(section, address)),
            Some(Protocol::Http) => config.http_listeners.push(read_http(section, address)),
            None if section.place_of("protocol").is_none() => section.missing("protocol", "\"smtp\" or \"http\""),
            // Without a protocol it is unknown which keys may stand here.
            None => {}
        }
    }
}

fn read_address(section: &Section<'_>, taken: &mut Vec<Placed<SocketAddr>>) -> SocketAddr {
    let unknown = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 0);
    let Some(found) = section.text("address", "\"127.0.0.1:2525\"", |text| value::socket_address(text, 2525)) else {
        if section.place_of("address").is_none() {
            section.missing("address", "\"127.0.0.1:2525\"");
        }
        return unknown;
    };
    if let Some(other) = taken.iter().find(|other| overlap(other.value, found.value)) {
        let at = section.report.describe(other.place);
        let wrong = if other.value == found.value {
            Wrong::new(format!("\"{}\" is already the address of the listener at {at}", found.value))
        } else {
            Wrong::new(format!("\"{}\" overlaps with \"{}\" of the listener at {at}", found.value, other.value))
        };
        section.wrong(found.place, "address", wrong.instead("write another port or address"));
    }
    let address = found.value;
    taken.push(found);
    address
}

/// Port 0 is a free port each time. An unspecified address takes the port on all addresses of its family.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let one_for_all = a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() != 0 && a.port() == b.port() && a.is_ipv4() == b.is_ipv4() && (one_for_all || a.ip() == b.ip())
}

fn read_smtp(section: Section<'_>, address: SocketAddr) -> SmtpListener {
    let mut listener = SmtpListener { address, ..SmtpListener::default() };
    let networks = |key| {
        let list = section.list(key, "[\"127.0.0.0/8\"]", value::network)?;
        Some(list.value.into_iter().map(|network| network.value).collect::<Vec<_>>())
    };
    listener.relay_from = networks("relay_from").unwrap_or(listener.relay_from);
    listener.trusted_hosts = networks("trusted_hosts").unwrap_or_else(|| listener.relay_from.clone());
    let sizes = limits::CONFIG_MESSAGE_BYTES_MIN..=limits::CONFIG_MESSAGE_BYTES_MAX;
    let size = section.size("max_message_size", "50MiB", sizes);
    listener.max_message_bytes = size.map_or(listener.max_message_bytes, |found| found.value);
    let endings = [("fix", LineEndings::Fix), ("reject", LineEndings::Reject)];
    listener.line_endings = section.choice("line_endings", &endings, &[]).unwrap_or(listener.line_endings);
    let details =
        [("full", ReceivedDetail::Full), ("no-client", ReceivedDetail::NoClient), ("none", ReceivedDetail::None)];
    listener.received = section.choice("received", &details, &[]).unwrap_or(listener.received);
    listener.tls = read_tls(&section);
    section.not_yet(&[("auth_without_tls", Some("false"))]);
    section.inapplicable(&["admin_tokens"], "for protocol \"smtp\"");
    section.finish();
    listener
}

fn read_http(section: Section<'_>, address: SocketAddr) -> HttpListener {
    let mut listener = HttpListener { address, ..HttpListener::default() };
    if let Some(tokens) = section.list("admin_tokens", "[\"sha256:…\"]", token_hash) {
        listener.admin_token_sha256 = tokens.value.into_iter().map(|token| token.value).collect();
    }
    let smtp_only =
        ["relay_from", "trusted_hosts", "max_message_size", "line_endings", "received", "tls", "auth_without_tls"];
    section.inapplicable(&smtp_only, "for protocol \"http\"");
    section.finish();
    listener
}

/// `sha256:` and 64 hexadecimal digits; a token in clear is refused, so that it isn't left in the file.
fn token_hash(text: &str) -> Result<String, Wrong> {
    match text.strip_prefix("sha256:") {
        Some(hash) if hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            Ok(hash.to_ascii_lowercase())
        }
        // The text may be the secret itself, so it isn't repeated.
        _ => Err(Wrong::new("a token is not \"sha256:\" and 64 hexadecimal digits")
            .instead("write what `printf %s TOKEN | sha256sum` prints behind \"sha256:\"")),
    }
}

fn read_tls(section: &Section<'_>) -> Option<ListenerTls> {
    let example = "tls = { certificate = \"mta.pem\", key = \"mta.key\" }";
    let tls = section.table("tls", example)?;
    let certificate = read_pem_file(&tls, "certificate", "\"mta.pem\"");
    let key = read_pem_file(&tls, "key", "\"mta.key\"");
    let place = tls.place;
    if let (Some((_, certificate)), Some((_, key))) = (&certificate, &key)
        && let Err((key_of_error, wrong)) = check_pair(certificate.as_bytes(), key.as_bytes())
    {
        tls.wrong(place_in(&tls, key_of_error, place), key_of_error, wrong);
    }
    tls.finish();
    let ((_, certificate), (_, key)) = (certificate?, key?);
    Some(ListenerTls { certificate_pem: Arc::new(certificate.into_bytes()), key_pem: Arc::new(key.into_bytes()) })
}

fn place_in(section: &Section<'_>, key: &str, otherwise: Place) -> Place {
    section.place_of(key).unwrap_or(otherwise)
}

fn read_pem_file(section: &Section<'_>, key: &'static str, example: &str) -> Option<(PathBuf, String)> {
    let Some(found) = section.text(key, example, |text| Ok(Path::new(text).to_path_buf())) else {
        if section.place_of(key).is_none() {
            section.missing(key, example);
        }
        return None;
    };
    let path = section.report.base_dir(found.place).join(found.value);
    match read_text(&path, limits::PEM_FILE_BYTES_MAX) {
        Ok(text) => Some((path, text)),
        Err(reason) => {
            let wrong = Wrong::new(format!("{} cannot be read: {reason}", path.display()));
            section.wrong(found.place, key, wrong.instead("write the path of a PEM file, relative to this file"));
            None
        }
    }
}

/// Whether a certificate chain and a private key are PEM, understood, and belong together.
fn check_pair(certificate_pem: &[u8], key_pem: &[u8]) -> Result<(), (&'static str, Wrong)> {
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(certificate_pem).collect::<Result<_, _>>().map_err(|_| {
            ("certificate", Wrong::new("the file is not valid PEM").instead("write the path of a PEM certificate"))
        })?;
    if chain.is_empty() {
        let wrong = Wrong::new("the file has no \"-----BEGIN CERTIFICATE-----\" section");
        return Err(("certificate", wrong.instead("write the path of a PEM certificate, its chain behind it")));
    }
    let Ok(key) = PrivateKeyDer::from_pem_slice(key_pem) else {
        let encrypted = key_pem.windows(9).any(|window| window == b"ENCRYPTED");
        let what = if encrypted { "the private key is encrypted" } else { "the file has no private key in PEM form" };
        return Err(("key", Wrong::new(what).instead("write the path of an unencrypted PEM private key")));
    };
    match CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider()) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => {
            let wrong = Wrong::new("the private key does not belong to the certificate");
            Err(("key", wrong.instead("write the path of the key that the certificate was issued for")))
        }
        Err(rustls::Error::InvalidCertificate(error)) => {
            let wrong = Wrong::new(format!("the certificate is not usable: {error}"));
            Err(("certificate", wrong.instead("write the path of an X.509 certificate")))
        }
        Err(error) => {
            let wrong = Wrong::new(format!("the private key is not usable: {error}"));
            Err(("key", wrong.instead("write the path of an RSA, ECDSA or Ed25519 key")))
        }
    }
}
