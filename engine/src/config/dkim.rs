//! `[[dkim]]`: who signs, and whether the private keys can.

use std::path::PathBuf;
use std::sync::Arc;

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject;

use super::error::{Place, Placed, Wrong};
use super::load::read_text;
use super::reader::Section;
use super::{DkimAlgorithm, DkimIdentity, DkimKeyPem, value};
use crate::limits;

impl DkimKeyPem {
    /// Checks a private key in PEM form, PKCS#1 or PKCS#8, and derives its public half. `path` is for messages only.
    pub fn from_pem(path: PathBuf, pem: String) -> Result<Self, String> {
        let (algorithm, public_key_base64) = inspect(&pem)?;
        Ok(Self { path, pem, algorithm, public_key_base64 })
    }
}

impl DkimIdentity {
    /// The name and the text of the TXT record to publish (RFC 6376 §3.6.1, RFC 8463 §4 for Ed25519).
    pub fn dns_record(&self) -> (String, String) {
        let kind = match self.key.algorithm {
            DkimAlgorithm::RsaSha256 { .. } => "rsa",
            DkimAlgorithm::Ed25519Sha256 => "ed25519",
        };
        let name = format!("{}._domainkey.{}", self.selector, self.domain);
        (name, format!("v=DKIM1; k={kind}; p={}", self.key.public_key_base64))
    }
}

pub(super) fn read(top: &Section<'_>) -> Vec<DkimIdentity> {
    let mut identities: Vec<(DkimIdentity, Place)> = Vec::new();
    for section in top.tables("dkim", "[[dkim]]") {
        let place = section.place_of("selector").unwrap_or(section.place);
        let Some(identity) = read_identity(section) else { continue };
        let same =
            |other: &&(DkimIdentity, Place)| other.0.domain == identity.domain && other.0.selector == identity.selector;
        if let Some((_, other)) = identities.iter().find(same) {
            let (record, _) = identity.dns_record();
            let wrong = Wrong::new(format!("{record} is already that of the one at {}", top.report.describe(*other)));
            top.report.add(place, "dkim.selector", wrong.instead("write another selector"));
        }
        identities.push((identity, place));
    }
    identities.into_iter().map(|(identity, _)| identity).collect()
}

fn read_identity(section: Section<'_>) -> Option<DkimIdentity> {
    let domain = section.text("domain", "\"example.com\"", value::dns_name);
    let selector = section.text("selector", "\"s1\"", selector);
    let template = section.text("key", "\"keys/{domain}-{selector}.pem\"", check_template);
    for (key, example) in
        [("domain", "\"example.com\""), ("selector", "\"s1\""), ("key", "\"keys/{domain}-{selector}.pem\"")]
    {
        if section.place_of(key).is_none() {
            section.missing(key, example);
        }
    }
    let sign_for = section.list("sign_for", "[\"example.com\"]", sign_for);
    let headers = section.list("headers", "[\"From\", \"Subject\"]", header_name);
    if let Some(headers) = &headers
        && !headers.value.is_empty()
        && !headers.value.iter().any(|header| header.value.eq_ignore_ascii_case("from"))
    {
        let wrong = Wrong::new("does not have \"From\", which must be signed (RFC 6376 §5.4)");
        section.wrong(headers.place, "headers", wrong.instead("add \"From\", or leave it out for the default list"));
    }
    let key = match (&domain, &selector, template) {
        (Some(domain), Some(selector), Some(template)) => read_key(&section, &template, &domain.value, &selector.value),
        _ => None,
    };
    section.finish();
    let domain = domain?.value;
    let values = |list: Placed<Vec<Placed<String>>>| list.value.into_iter().map(|found| found.value).collect();
    Some(DkimIdentity {
        sign_for: sign_for.map_or_else(|| vec![domain.clone()], values),
        domain,
        selector: selector?.value,
        key: Arc::new(key?),
        headers: headers.map_or_else(Vec::new, values),
    })
}

fn read_key(section: &Section<'_>, template: &Placed<String>, domain: &str, selector: &str) -> Option<DkimKeyPem> {
    let name = template.value.replace("{domain}", domain).replace("{selector}", selector);
    let path = section.report.base_dir(template.place).join(name);
    let pem = match read_text(&path, limits::PEM_FILE_BYTES_MAX) {
        Ok(pem) => pem,
        Err(reason) => {
            let wrong = Wrong::new(format!("{} cannot be read: {reason}", path.display()));
            section.wrong(template.place, "key", wrong.instead("write the path of a PEM file, relative to this file"));
            return None;
        }
    };
    match DkimKeyPem::from_pem(path.clone(), pem) {
        Ok(key) => Some(key),
        Err(reason) => {
            let wrong = Wrong::new(format!("{}: {reason}", path.display()));
            let instead = "write the path of an unencrypted RSA (2048 to 8192 bits) or Ed25519 private key in PEM form";
            section.wrong(template.place, "key", wrong.instead(instead));
            None
        }
    }
}

fn check_template(text: &str) -> Result<String, Wrong> {
    let rest = text.replace("{domain}", "").replace("{selector}", "");
    if text.is_empty() || rest.contains(['{', '}', '\0']) {
        let wrong = Wrong::new(format!("{text:?} is not a path with {{domain}} and {{selector}} as only placeholders"));
        return Err(wrong.instead("write for example \"keys/{domain}-{selector}.pem\""));
    }
    Ok(text.into())
}

fn selector(text: &str) -> Result<String, Wrong> {
    value::dns_name(text).map_err(|_| {
        Wrong::new(format!("{text:?} is not a selector")).instead("write letters, digits and hyphens, e.g. \"s1\"")
    })
}

fn sign_for(text: &str) -> Result<String, Wrong> {
    if text == "*" {
        return Ok(text.into());
    }
    if let Some(rest) = text.strip_prefix("*.") {
        let wrong = Wrong::new(format!("{text:?} has a wildcard, but domains below are always included"));
        return Err(wrong.instead(format!("write {rest:?}, or \"*\" for every domain")));
    }
    value::dns_name(text)
}

fn header_name(text: &str) -> Result<String, Wrong> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':' && byte != b';') {
        let wrong = Wrong::new(format!("{text:?} is not a header's name"));
        return Err(wrong.instead("write for example \"Subject\""));
    }
    Ok(text.into())
}

/// What kind of key it is, and the `p=` of its record. Verifiers ignore RSA keys below 1024 bits and signers should use
/// 2048 (RFC 8301 §3.2); the cryptography library signs with 2048 to 8192.
fn inspect(pem: &str) -> Result<(DkimAlgorithm, String), String> {
    if pem.contains("ENCRYPTED") {
        return Err("the private key is encrypted".into());
    }
    let Ok(der) = PrivateKeyDer::from_pem_slice(pem.as_bytes()) else {
        return Err(if pem.contains("-----BEGIN PUBLIC KEY-----") || pem.contains("-----BEGIN RSA PUBLIC KEY-----") {
            "it holds a public key, not the private one".into()
        } else if pem.contains("-----BEGIN CERTIFICATE-----") {
            "it holds a certificate, not a private key".into()
        } else if pem.contains("-----BEGIN ") && pem.contains("PRIVATE KEY-----") {
            "its PEM is damaged".into()
        } else {
            "it has no private key in PEM form".into()
        });
    };
    let rsa_key = match &der {
        PrivateKeyDer::Pkcs1(pkcs1) => rsa::KeyPair::from_der(pkcs1.secret_pkcs1_der()),
        PrivateKeyDer::Pkcs8(pkcs8) => {
            if let Ok(key) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8.secret_pkcs8_der()) {
                return Ok((DkimAlgorithm::Ed25519Sha256, STANDARD.encode(key.public_key().as_ref())));
            }
            rsa::KeyPair::from_pkcs8(pkcs8.secret_pkcs8_der())
        }
        _ => return Err("it holds an elliptic curve key, which DKIM does not have".into()),
    };
    let key = rsa_key.map_err(|rejected| match rejected.to_string().as_str() {
        "TooSmall" => "its RSA key is shorter than 2048 bits".to_owned(),
        "TooLarge" => "its RSA key is longer than 8192 bits".to_owned(),
        "WrongAlgorithm" => "it holds neither an RSA nor an Ed25519 key".to_owned(),
        other => format!("its key is not usable ({other})"),
    })?;
    let public: PublicKeyX509Der<'_> = key.public_key().as_der().map_err(|_| "its public half cannot be derived")?;
    let bits = u32::try_from(key.public_modulus_len() * 8).unwrap_or(u32::MAX);
    Ok((DkimAlgorithm::RsaSha256 { bits }, STANDARD.encode(public.as_ref())))
}
