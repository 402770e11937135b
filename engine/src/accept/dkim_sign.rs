//! DKIM signatures (RFC 6376; RFC 8463 for Ed25519; RFC 8301 for key sizes), relaxed/relaxed.
//!
//! Keys, hashing and canonicalization are mail-auth's. The rest is done here, for three reasons:
//! * mail-auth's signer asks the system's clock for `t=` and hashes the body once per signer; cores are given the time,
//!   and the body is hashed once for all signers.
//! * its header writer may fold between the end of `b=` and the final semicolon, which some verifiers (dkimpy) don't
//!   take for a part of the signature; ours never ends a tag with white space.
//! * its body canonicalization keeps an empty line where the body ends with lines of white space only. RFC 6376 §3.4.4
//!   drops white space first and then the empty lines; so does `body_hash`.
//!
//! A signature can fail only by a fault of the cryptographic library.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mail_auth::common::crypto::{
    CryptoError, DkimKey, Ed25519Key, HashContext as _, HashImpl, HashOutput, RsaKey, Sha256, SigningKey as _,
};
use mail_auth::common::to_a_label;
use mail_auth::dkim::Canonicalization;
use mail_auth::dkim::canonicalize::BodyHasher;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject;

use crate::config::DkimIdentity;
use crate::limits::{SIGNATURES_MAX, SIGNED_FIELDS_MAX};
use crate::mail::header::{Field, fields};

/// A private key that can sign.
#[derive(Clone)]
pub struct SigningKey {
    key: Arc<DkimKey>,
}

/// Reads an RSA key (PKCS#1 or PKCS#8, 2048 to 8192 bits) or an Ed25519 key (PKCS#8) in PEM.
pub fn load_key(pem: &str) -> Result<SigningKey, String> {
    if pem.contains("ENCRYPTED") {
        return Err("the private key is encrypted".to_owned());
    }
    let der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| "no private key in PEM form".to_owned())?;
    if let PrivateKeyDer::Pkcs8(pkcs8) = &der
        && let Ok(key) = Ed25519Key::from_pkcs8_maybe_unchecked_der(pkcs8.secret_pkcs8_der())
    {
        return Ok(SigningKey { key: Arc::new(DkimKey::Ed25519(key)) });
    }
    let key = RsaKey::from_key_der(der).map_err(|error| match error {
        // The cryptographic library's words. It takes no RSA key below 2048 bits, which is what RFC 8301 §3.2 asks for.
        mail_auth::Error::Crypto(CryptoError::Library(reason)) => match reason.as_str() {
            "TooSmall" => "the RSA key is shorter than 2048 bits".to_owned(),
            "TooLarge" => "the RSA key is longer than 8192 bits".to_owned(),
            _ => format!("neither a usable RSA nor a usable Ed25519 key ({reason})"),
        },
        other => other.to_string(),
    })?;
    Ok(SigningKey { key: Arc::new(DkimKey::Rsa(key)) })
}

impl SigningKey {
    pub fn is_rsa(&self) -> bool {
        matches!(*self.key, DkimKey::Rsa(_))
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_rsa() { "SigningKey(RSA)" } else { "SigningKey(Ed25519)" })
    }
}

/// All configured identities.
#[derive(Debug, Default)]
pub struct Signers {
    identities: Vec<Identity>,
}

#[derive(Debug)]
struct Identity {
    domain: String,
    selector: String,
    key: SigningKey,
    /// Lower case; `*` co-signs everything.
    sign_for: Vec<String>,
    fields: Vec<String>,
}

impl Signers {
    pub fn new(identities: &[DkimIdentity]) -> Result<Self, String> {
        let load = |identity: &DkimIdentity| {
            let key =
                load_key(&identity.key.pem).map_err(|error| format!("{}: {error}", identity.key.path.display()))?;
            let sign_for = match &identity.sign_for[..] {
                [] => vec![identity.domain.to_lowercase()],
                some => some.iter().map(|domain| domain.to_lowercase()).collect(),
            };
            let mut fields = match &identity.headers[..] {
                [] => DEFAULT_FIELDS.iter().map(|name| (*name).to_owned()).collect(),
                some => some.to_vec(),
            };
            // RFC 6376 §5.4: From must be signed.
            if !fields.iter().any(|name| name.eq_ignore_ascii_case("From")) {
                fields.insert(0, "From".to_owned());
            }
            let (domain, selector) = (identity.domain.clone(), identity.selector.clone());
            Ok(Identity { domain, selector, key, sign_for, fields })
        };
        Ok(Self { identities: identities.iter().map(load).collect::<Result<_, String>>()? })
    }

    /// Which identities sign mail of this From domain: all with the most specific `sign_for` that fits, and all with
    /// `*`.
    pub fn select(&self, from_domain: Option<&str>) -> Vec<usize> {
        // The configuration has domains as the DNS has them (RFC 6376 §3.5, `d=`).
        let from_domain = from_domain.map(to_a_label);
        let fits = |identity: &Identity| {
            let from_domain = from_domain.as_deref()?;
            let specific = identity.sign_for.iter().filter(|domain| is_at_or_below(from_domain, domain));
            specific.map(String::len).max()
        };
        let most_specific = self.identities.iter().filter_map(fits).max();
        let signs = |identity: &Identity| {
            (most_specific.is_some() && fits(identity) == most_specific) || identity.sign_for.iter().any(|d| d == "*")
        };
        let chosen = self.identities.iter().enumerate().filter(|(_, identity)| signs(identity));
        chosen.map(|(index, _)| index).take(SIGNATURES_MAX).collect()
    }

    pub fn is_rsa(&self, index: usize) -> bool {
        self.identities[index].key.is_rsa()
    }

    /// The signature fields of the `chosen` identities, in this order. `header` is what they cover, top to bottom;
    /// `wall_s` is Unix time.
    pub fn sign(
        &self,
        chosen: &[usize],
        header: &[&[u8]],
        body_hash: &BodyHash,
        wall_s: u64,
    ) -> Result<Vec<u8>, SignError> {
        let mut out = Vec::with_capacity(chosen.len() * SIGNATURE_BYTES_TYPICAL);
        let fields: Vec<Field<'_>> = header.iter().flat_map(|block| fields(block)).collect();
        for index in chosen {
            self.identities[*index].sign(&fields, &body_hash.0, wall_s, &mut out)?;
        }
        Ok(out)
    }
}

/// The digest of a canonical body, as `bh=` has it: one for all signatures, and for all messages that share the body.
#[derive(Debug, Clone)]
pub struct BodyHash(String);

impl BodyHash {
    pub fn of(body: &[u8]) -> Self {
        Self(BASE64.encode(body_hash(body)))
    }
}

/// The cryptographic library failed.
#[derive(Debug)]
pub struct SignError(mail_auth::Error);

impl fmt::Display for SignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DKIM signing failed: {}", self.0)
    }
}

impl std::error::Error for SignError {}

impl Identity {
    fn sign(&self, fields: &[Field<'_>], body_hash: &str, wall_s: u64, out: &mut Vec<u8>) -> Result<(), SignError> {
        let (names, signed) = self.cover(fields);
        let mut value = format!(" v=1; a={}; c=relaxed/relaxed;", self.key.key.algorithm().name());
        value.push_str(&format!("\r\n\td={}; s={}; t={wall_s};\r\n\t", self.domain, self.selector));
        push_names(&mut value, &names);
        value.push_str(&format!(";\r\n\tbh={body_hash};\r\n\tb="));

        // RFC 6376 §3.7: the signed fields, then this one with an empty b= and without its CRLF.
        let this: (&[u8], &[u8]) = (b"DKIM-Signature", value.as_bytes());
        let signed = signed.iter().map(|field| (field.name, field.value)).chain([this]);
        let mut canonical = Vec::with_capacity(SIGNED_BYTES_TYPICAL);
        Canonicalization::Relaxed.canonicalize_headers(signed, &mut canonical);
        let signature = BASE64.encode(self.key.key.sign(&canonical[..]).map_err(SignError)?);

        out.extend_from_slice(b"DKIM-Signature:");
        out.extend_from_slice(value.as_bytes());
        for (number, piece) in signature.as_bytes().chunks(FOLD_BYTES).enumerate() {
            out.extend_from_slice(if number == 0 { b"" } else { b"\r\n\t" });
            out.extend_from_slice(piece);
        }
        out.extend_from_slice(b"\r\n");
        Ok(())
    }

    /// The names for `h=` and the fields they stand for. The n-th of a name in `h=` is the n-th field from the bottom
    /// (§5.4.2); an over-signed name stands there once more than there are fields, so that none can be added (§8.15).
    fn cover<'a, 'b>(&'a self, fields: &'b [Field<'b>]) -> (Vec<&'a str>, Vec<&'b Field<'b>>) {
        let mut names = Vec::with_capacity(self.fields.len() + OVER_SIGNED_FIELDS.len());
        let mut signed = Vec::with_capacity(fields.len());
        for name in &self.fields {
            let mut of_this_name = fields.iter().rev().filter(|field| field.is(name));
            for field in of_this_name.by_ref().take(SIGNED_FIELDS_MAX.saturating_sub(signed.len())) {
                names.push(name.as_str());
                signed.push(field);
            }
            // Beyond the bound the name would stand for a field that is there.
            let all = of_this_name.next().is_none();
            if all && OVER_SIGNED_FIELDS.iter().any(|over| over.eq_ignore_ascii_case(name)) {
                names.push(name);
            }
        }
        (names, signed)
    }
}

/// The digest of the canonical body. What the body ends with, be it CRLFs, white space or lines of it, is dropped
/// first; the one CRLF that ends a canonical body comes from [`BodyHasher::finish`], and from there none for an empty
/// one.
fn body_hash(body: &[u8]) -> HashOutput {
    let end = body.iter().rposition(|octet| !matches!(octet, b' ' | b'\t' | b'\r' | b'\n')).map_or(0, |at| at + 1);
    let mut hasher = BodyHasher::new(Sha256::hasher(), Canonicalization::Relaxed, 0);
    hasher.write(&body[..end]);
    hasher.finish().0.complete()
}

/// `h=`, folded behind colons (§3.5).
fn push_names(value: &mut String, names: &[&str]) {
    value.push_str("h=");
    let mut width = 2;
    for (number, name) in names.iter().enumerate() {
        if number > 0 {
            value.push(':');
            width += 1;
            if width + name.len() > FOLD_BYTES {
                value.push_str("\r\n\t");
                width = 0;
            }
        }
        value.push_str(name);
        width += name.len();
    }
}

fn is_at_or_below(domain: &str, parent: &str) -> bool {
    domain.strip_suffix(parent).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

const FOLD_BYTES: usize = 72;
const SIGNATURE_BYTES_TYPICAL: usize = 1_024;
const SIGNED_BYTES_TYPICAL: usize = 2_048;

/// RFC 6376 §5.4.1, then what else carries meaning for the reader or for automata.
const DEFAULT_FIELDS: &[&str] = &[
    "From",
    "To",
    "Cc",
    "Subject",
    "Date",
    "Reply-To",
    "Resent-Date",
    "Resent-From",
    "Resent-To",
    "Resent-Cc",
    "In-Reply-To",
    "References",
    "List-Id",
    "List-Help",
    "List-Unsubscribe",
    "List-Subscribe",
    "List-Post",
    "List-Owner",
    "List-Archive",
    "Sender",
    "Message-ID",
    "MIME-Version",
    "Content-Type",
    "Content-Transfer-Encoding",
    "Content-ID",
    "Content-Description",
    "List-Unsubscribe-Post",
    "Feedback-ID",
];

const OVER_SIGNED_FIELDS: &[&str] = &["From", "To", "Cc", "Subject", "Date", "Reply-To"];

#[cfg(test)]
pub(crate) mod tests;
