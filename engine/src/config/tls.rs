//! `[tls]`: whose certificates are trusted, beside the public roots.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::TlsConfig;
use super::error::Wrong;
use super::load::read_text;
use super::reader::Section;
use crate::limits;

pub(super) fn read(section: Section<'_>) -> TlsConfig {
    let mut roots = Vec::new();
    if let Some(files) = section.list("extra_roots", "[\"ca.pem\"]", |text| Ok(PathBuf::from(text))) {
        for file in files.value {
            let path = section.report.base_dir(file.place).join(file.value);
            match read_text(&path, limits::PEM_FILE_BYTES_MAX).and_then(|text| check(&text).map(|()| text)) {
                Ok(text) => {
                    roots.extend_from_slice(text.as_bytes());
                    roots.push(b'\n');
                }
                Err(reason) => {
                    let wrong = Wrong::new(format!("{} cannot be used: {reason}", path.display()));
                    let instead = "write the path of a PEM file with root certificates, relative to this file";
                    section.wrong(file.place, "extra_roots", wrong.instead(instead));
                }
            }
        }
    }
    section.finish();
    TlsConfig { extra_roots_pem: Arc::new(roots) }
}

fn check(text: &str) -> Result<(), String> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        store.add(certificate).map_err(|error| error.to_string())?;
    }
    if store.is_empty() { Err("it has no certificate".to_owned()) } else { Ok(()) }
}
