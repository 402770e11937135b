//! DKIM keys made for a run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// A selector and the file with its private key (PKCS#8 PEM).
#[derive(Debug, Clone)]
pub struct DkimKey {
    pub selector: &'static str,
    pub path: PathBuf,
    /// What DNS says of it (RFC 6376 §3.6.1, RFC 8463 §4.2).
    pub record: String,
}

pub fn write_rsa_2048(directory: &Path) -> Result<DkimKey> {
    let pair = KeyPair::generate(KeySize::Rsa2048).map_err(|_| anyhow!("cannot make an RSA key"))?;
    let der: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| anyhow!("cannot encode the RSA key"))?;
    let public: PublicKeyX509Der<'_> =
        pair.public_key().as_der().map_err(|_| anyhow!("cannot encode the public RSA key"))?;
    write(directory, "rsa", der.as_ref(), format!("v=DKIM1; k=rsa; p={}", STANDARD.encode(public.as_ref())))
}

pub fn write_ed25519(directory: &Path) -> Result<DkimKey> {
    let pair = Ed25519KeyPair::generate().map_err(|_| anyhow!("cannot make an Ed25519 key"))?;
    let der = pair.to_pkcs8v1().map_err(|_| anyhow!("cannot encode the Ed25519 key"))?;
    let public = STANDARD.encode(pair.public_key().as_ref());
    write(directory, "ed25519", der.as_ref(), format!("v=DKIM1; k=ed25519; p={public}"))
}

fn write(directory: &Path, selector: &'static str, der: &[u8], record: String) -> Result<DkimKey> {
    let path = directory.join(format!("{selector}.pem"));
    fs::write(&path, pem(der))?;
    Ok(DkimKey { selector, path, record })
}

/// RFC 7468 §10.
fn pem(der: &[u8]) -> String {
    let base64 = STANDARD.encode(der);
    let lines: Vec<&str> = base64.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let der = |key: DkimKey| {
            let text = fs::read_to_string(key.path).unwrap();
            let inner: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
            assert!(text.lines().all(|line| line.len() <= 64));
            STANDARD.decode(inner).unwrap()
        };
        let rsa = der(write_rsa_2048(directory.path()).unwrap());
        assert_eq!(KeyPair::from_pkcs8(&rsa).unwrap().public_modulus_len(), 256);
        let ed25519 = der(write_ed25519(directory.path()).unwrap());
        assert!(Ed25519KeyPair::from_pkcs8_maybe_unchecked(&ed25519).is_ok());
    }
}
