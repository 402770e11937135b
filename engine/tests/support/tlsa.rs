//! TLSA records for certificates.

use aws_lc_rs::digest::{SHA256, SHA512, digest};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// The data of a record with this selector and matching type for a certificate (RFC 6698 §2.1).
pub(crate) fn data(certificate_pem: &str, selector: u8, matching: u8) -> Vec<u8> {
    let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).expect("a certificate");
    let read = webpki::EndEntityCert::try_from(&certificate).expect("a certificate");
    let selected = if selector == 0 { certificate.to_vec() } else { read.subject_public_key_info().to_vec() };
    match matching {
        1 => digest(&SHA256, &selected).as_ref().to_vec(),
        2 => digest(&SHA512, &selected).as_ref().to_vec(),
        _ => selected,
    }
}
