//! TLS as a filter between a socket and a core: octets in, octets out, no I/O.
//!
//! Received octets go through [`TlsSession::handle_received`], which appends the plain text; what is to be sent goes
//! through [`TlsSession::write`], which appends what belongs on the wire. After each call, also one that failed,
//! [`TlsSession::poll_wire`] gives handshake messages and alerts, which are to be sent too.
//!
//! A [`TlsVerifier`] is a policy of which certificates are good, with the sessions that were made under it. Sessions
//! are never resumed under another verifier: a resumed session shows no certificate, so it is as good as the check that
//! it began with. Keys are agreed by X25519MLKEM768 where the peer can.
//!
//! Over 500 lines: both sides of a session and the verifiers, with their tests.

use std::io::{self, BufRead, IoSlice, Write};
use std::net::IpAddr;
use std::sync::Arc;
use std::{env, fmt, fs};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConnection, Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::ServerConnection;
use rustls::{
    CertificateError, CipherSuite, ClientConfig, Connection, DigitallySignedStruct, HandshakeKind, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::config::TlsConfig;
use crate::deliver::tls_policy::{HandshakeError, TlsFailure};
use crate::limits::{TLS_RECORD_BYTES, TLS_SESSIONS_MAX};

/// Which servers' certificates are good. Clones share the remembered sessions.
#[derive(Debug, Clone)]
pub(crate) struct TlsVerifier(Arc<ClientConfig>);

impl TlsVerifier {
    /// Any certificate: opportunistic TLS (RFC 7435) and `tls = "required"`. Nobody knows who the server is.
    pub(crate) fn any_certificate() -> Self {
        let schemes = provider().signature_verification_algorithms.supported_schemes();
        Self::custom(Arc::new(AnyCertificate(schemes)), TLS_SESSIONS_MAX)
    }

    /// A certificate that is as a verifier of one's own has it.
    pub(super) fn custom(verifier: Arc<dyn ServerCertVerifier>, sessions_max: usize) -> Self {
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("the provider has the default versions")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Self::of(config, sessions_max)
    }

    /// A certificate for the host's name that the public roots vouch for, or those in the file of SSL_CERT_FILE,
    /// and those that are configured.
    pub(crate) fn public_roots(config: &TlsConfig) -> Result<Self, TlsError> {
        let mut more = config.extra_roots_pem.as_ref().clone();
        if let Some(path) = env::var_os("SSL_CERT_FILE") {
            let read = fs::read(&path);
            more.push(b'\n');
            more.extend(
                read.map_err(|error| TlsError::new(format!("SSL_CERT_FILE {}: {error}", path.to_string_lossy())))?,
            );
        }
        Self::with_roots(&more)
    }

    /// For one who speaks TLS by itself.
    pub(crate) fn client_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0)
    }

    fn with_roots(more_pem: &[u8]) -> Result<Self, TlsError> {
        // Compiled in, because a container may have no roots at all.
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        let mut added = Vec::new();
        for certificate in CertificateDer::pem_slice_iter(more_pem) {
            let certificate = certificate.map_err(|error| TlsError::new(format!("a root certificate: {error}")))?;
            added.push(certificate.clone());
            roots.add(certificate).map_err(|error| TlsError::new(format!("a root certificate: {error}")))?;
        }
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| TlsError::new(format!("the root certificates: {error}")))?;
        Ok(Self::custom(Arc::new(Roots { webpki, added }), TLS_SESSIONS_MAX))
    }

    fn of(mut config: ClientConfig, sessions_max: usize) -> Self {
        config.resumption = Resumption::in_memory_sessions(sessions_max);
        Self(Arc::new(config))
    }
}

/// A host's name, or its address, also in brackets, as certificates have it.
pub(crate) fn server_name(host_name: &str) -> Result<ServerName<'static>, TlsError> {
    let host_name = host_name.trim_end_matches('.');
    let address = host_name.trim_start_matches('[').trim_end_matches(']').trim_start_matches("IPv6:");
    match address.parse::<IpAddr>() {
        Ok(address) => Ok(ServerName::IpAddress(address.into())),
        Err(_) => ServerName::try_from(host_name.to_owned())
            .map_err(|_| TlsError::new(format!("{host_name:?} can't be in a certificate"))),
    }
}

/// What rustls has on aws-lc-rs, but with TLS 1.3's SHA-256 suite before that of SHA-384: processors have instructions
/// for SHA-256 only, and a handshake hashes much.
pub(super) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// A server's side: its certificate chain and private key, both PEM.
pub(crate) fn server_config(certificate_pem: &[u8], key_pem: &[u8]) -> Result<Arc<ServerConfig>, TlsError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate_pem)
        .collect::<Result<_, _>>()
        .map_err(|error| TlsError::new(format!("the certificate is not readable PEM: {error}")))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem)
        .map_err(|error| TlsError::new(format!("the private key is not readable PEM: {error}")))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider has the default versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| TlsError::new(format!("certificate and key can't be used together: {error}")))?;
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(TlsError::from)?;
    Ok(Arc::new(config))
}

/// One connection's TLS, on either side.
#[derive(Debug)]
pub(crate) struct TlsSession(Connection);

/// What a call of [`TlsSession::handle_received`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received {
    /// The peer said that it sends no more. An end of stream without it may be an attacker's.
    pub(crate) peer_closed: bool,
}

/// What is to be told about a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TlsFacts {
    /// `TLSv1.3`.
    pub(crate) protocol: String,
    /// IANA's name: `TLS_AES_256_GCM_SHA384`.
    pub(crate) cipher: String,
    /// `X25519MLKEM768`; empty when resumed without a new agreement.
    pub(crate) key_exchange: String,
    /// The parts of the certificate's subject name, as in `CN=mx.example.com`.
    pub(crate) peer_subject: Vec<String>,
    pub(crate) resumed: bool,
}

impl TlsSession {
    /// Begins a client's side. Its first octets come out of [`TlsSession::poll_wire`].
    pub(crate) fn client(verifier: &TlsVerifier, host_name: &str) -> Result<Self, TlsError> {
        let connection = ClientConnection::new(verifier.0.clone(), server_name(host_name)?)?;
        Ok(Self::of(connection.into()))
    }

    pub(crate) fn server(config: &Arc<ServerConfig>) -> Result<Self, TlsError> {
        Ok(Self::of(ServerConnection::new(config.clone())?.into()))
    }

    fn of(mut connection: Connection) -> Self {
        // The caller bounds what it gives us; a limit here would silently take less than all.
        connection.set_buffer_limit(None);
        Self(connection)
    }

    /// Takes all octets from the wire and appends what they say in plain. After an error the connection is lost, but
    /// what stood before the octets that made it is in `plain`, and an alert may wait in [`TlsSession::poll_wire`].
    pub(crate) fn handle_received(&mut self, mut wire: &[u8], plain: &mut Vec<u8>) -> Result<Received, TlsError> {
        let mut peer_closed = false;
        while !wire.is_empty() && !peer_closed {
            self.0.read_tls(&mut wire).map_err(|error| TlsError::new(error.to_string()))?;
            let processed = self.0.process_new_packets();
            let mut reader = self.0.reader();
            // Err(WouldBlock) says that there is no more for now.
            while let Ok(octets @ [_, ..]) = reader.fill_buf() {
                plain.extend_from_slice(octets);
                let taken = octets.len();
                reader.consume(taken);
            }
            peer_closed = processed?.peer_has_closed();
        }
        Ok(Received { peer_closed })
    }

    /// Encrypts all parts and appends the result, behind whatever [`TlsSession::poll_wire`] would have given. During
    /// the handshake the parts are kept until it is over.
    pub(crate) fn write<B: AsRef<[u8]>>(&mut self, plain: &[B], wire: &mut Vec<u8>) {
        // Together, so that small parts share a record.
        let slices: Vec<_> = plain.iter().map(|part| IoSlice::new(part.as_ref())).collect();
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        let written = self.0.writer().write_vectored(&slices).expect("there is no limit");
        assert_eq!(written, length);
        self.poll_wire(wire);
    }

    /// What so many octets in plain take on the wire, at most; with a little for what else there may be to say.
    pub(crate) fn wire_bytes_max(plain: usize) -> usize {
        plain + (plain / TLS_RECORD_BYTES + 2) * RECORD_OVERHEAD_MAX
    }

    /// Appends what is to be sent.
    pub(crate) fn poll_wire(&mut self, wire: &mut Vec<u8>) {
        while self.0.wants_write() {
            self.0.write_tls(wire).expect("a vector takes all");
        }
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.0.is_handshaking()
    }

    /// Says that we send no more.
    pub(crate) fn close_notify(&mut self, wire: &mut Vec<u8>) {
        self.0.send_close_notify();
        self.poll_wire(wire);
    }

    /// Once the handshake is over.
    pub(crate) fn facts(&self) -> TlsFacts {
        let protocol = self.0.protocol_version().and_then(|version| version.as_str());
        let cipher = self.0.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str());
        let group = self.0.negotiated_key_exchange_group().map(|group| format!("{:?}", group.name()));
        let certificate = self.0.peer_certificates().and_then(<[_]>::first);
        TlsFacts {
            protocol: protocol.unwrap_or_default().replace("TLSv1_", "TLSv1."),
            cipher: cipher.unwrap_or_default().replace("TLS13_", "TLS_"),
            key_exchange: group.unwrap_or_default(),
            peer_subject: certificate.and_then(|certificate| subject(certificate)).unwrap_or_default(),
            resumed: self.0.handshake_kind() == Some(HandshakeKind::Resumed),
        }
    }
}

/// Cuts parts into steps of `step_bytes` each but the last, so that all their records but the last are full.
pub(crate) fn steps<'a>(
    parts: impl Iterator<Item = &'a [u8]>,
    step_bytes: usize,
) -> impl Iterator<Item = Vec<&'a [u8]>> {
    let mut parts = parts.filter(|part| !part.is_empty());
    let mut rest: &[u8] = &[];
    std::iter::from_fn(move || {
        let (mut step, mut room) = (Vec::new(), step_bytes);
        while room > 0 {
            if rest.is_empty() {
                let Some(next) = parts.next() else { break };
                rest = next;
            }
            let (now, later) = rest.split_at(rest.len().min(room));
            step.push(now);
            room -= now.len();
            rest = later;
        }
        (!step.is_empty()).then_some(step)
    })
}

/// Why TLS can't be used. The text is for operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TlsError {
    text: String,
    failure: TlsFailure,
}

impl TlsError {
    pub(super) fn new(text: String) -> Self {
        Self::of(TlsFailure::ValidationFailure, text)
    }

    pub(super) fn of(failure: TlsFailure, text: String) -> Self {
        Self { text, failure }
    }
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<TlsError> for HandshakeError {
    fn from(TlsError { text, failure }: TlsError) -> Self {
        Self { failure, text }
    }
}

impl std::error::Error for TlsError {}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        use CertificateError as E;
        use TlsFailure as F;
        let rustls::Error::InvalidCertificate(wrong) = &error else { return Self::new(error.to_string()) };
        match wrong {
            E::Other(OtherError(inner)) => {
                let failure = inner.downcast_ref().map_or(F::CertificateNotTrusted, |inner: &Self| inner.failure);
                Self::of(failure, format!("invalid peer certificate: {inner}"))
            }
            E::NotValidForName | E::NotValidForNameContext { .. } => {
                Self::of(F::CertificateHostMismatch, error.to_string())
            }
            E::Expired | E::ExpiredContext { .. } => Self::of(F::CertificateExpired, error.to_string()),
            _ => Self::of(F::CertificateNotTrusted, error.to_string()),
        }
    }
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        Self::new(error.to_string())
    }
}

/// Certificates as webpki checks them. One that is itself among the added roots is good for its own names, too, though
/// it says that it is an authority's: so does every certificate that `openssl req -x509` makes, and webpki takes an
/// authority for no host.
#[derive(Debug)]
struct Roots {
    webpki: Arc<WebPkiServerVerifier>,
    added: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Roots {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = self.webpki.verify_server_cert(shown, intermediates, name, ocsp_response, now);
        let Err(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(wrong)))) = &found else {
            return found;
        };
        // webpki looks at the dates before.
        let is_authority = matches!(wrong.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity));
        if !is_authority || !self.added.contains(shown) {
            return found;
        }
        match webpki::EndEntityCert::try_from(shown).map(|shown| shown.verify_is_valid_for_subject_name(name)) {
            Ok(Ok(())) => Ok(ServerCertVerified::assertion()),
            _ => {
                let expected = name.to_owned();
                Err(CertificateError::NotValidForNameContext { expected, presented: Vec::new() }.into())
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Takes certificates that no library could check: old forms, weak keys, other people's names. That a server proves to
/// hold such a certificate's key would prove nothing, so the proof is not looked at either.
#[derive(Debug)]
struct AnyCertificate(Vec<SignatureScheme>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}

/// The parts of a certificate's subject (RFC 5280 §4.1.2.6) that have a short name and are text.
fn subject(certificate: &[u8]) -> Option<Vec<String>> {
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (mut rest, _) = element(certificate, SEQUENCE)?;
    if let Some((_, behind)) = element(rest, VERSION) {
        rest = behind;
    }
    // Serial number, signature algorithm, issuer, validity.
    for tag in [INTEGER, SEQUENCE, SEQUENCE, SEQUENCE] {
        (_, rest) = element(rest, tag)?;
    }
    let (mut names, _) = element(rest, SEQUENCE)?;
    let mut parts = Vec::new();
    while let Some((mut set, behind)) = element(names, SET) {
        names = behind;
        while let Some((attribute, behind)) = element(set, SEQUENCE) {
            set = behind;
            let (kind, value) = element(attribute, OBJECT_IDENTIFIER)?;
            // Any string type: its length says where it ends.
            let (value, _) = element(value, *value.first()?)?;
            // 2.5.4.x, naming attributes.
            let short = match kind {
                [0x55, 0x04, 3] => "CN",
                [0x55, 0x04, 6] => "C",
                [0x55, 0x04, 7] => "L",
                [0x55, 0x04, 8] => "ST",
                [0x55, 0x04, 10] => "O",
                [0x55, 0x04, 11] => "OU",
                _ => continue,
            };
            if let Ok(text) = std::str::from_utf8(value) {
                parts.push(format!("{short}={}", text.replace(char::is_control, " ")));
            }
        }
    }
    Some(parts)
}

/// The content of the DER element with this tag that `der` begins with, and what is behind it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = der.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first & 0x80 != 0 {
        let octets = usize::from(first & 0x7f);
        if octets == 0 || octets > 4 || rest.len() < octets {
            return None;
        }
        length = rest[..octets].iter().fold(0, |length, &octet| length << 8 | usize::from(octet));
        rest = &rest[octets..];
    }
    (found == tag && rest.len() >= length).then(|| rest.split_at(length))
}

/// RFC 8446 §5.2 for the header and the tag; TLS 1.2 adds a nonce of eight octets.
const RECORD_OVERHEAD_MAX: usize = 32;
const INTEGER: u8 = 0x02;
const OBJECT_IDENTIFIER: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::TLS_WRITE_BYTES;

    struct Identity {
        certificate: String,
        key: String,
    }

    fn identity(names: &[&str]) -> Identity {
        identity_with(names, |_| {})
    }

    fn identity_with(names: &[&str], change: impl FnOnce(&mut rcgen::CertificateParams)) -> Identity {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut parameters = rcgen::CertificateParams::new(names).unwrap();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(rcgen::DnType::OrganizationName, "Example, Inc.");
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "mx.example.com");
        change(&mut parameters);
        let key = rcgen::KeyPair::generate().unwrap();
        Identity { certificate: parameters.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
    }

    fn server(identity: &Identity) -> Arc<ServerConfig> {
        server_config(identity.certificate.as_bytes(), identity.key.as_bytes()).unwrap()
    }

    /// Carries octets between the two, in pieces, until both are quiet.
    fn converse(
        client: &mut TlsSession,
        server: &mut TlsSession,
        piece: usize,
    ) -> Result<(Vec<u8>, Vec<u8>), TlsError> {
        let (mut at_client, mut at_server, mut wire) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            wire.clear();
            client.poll_wire(&mut wire);
            for octets in wire.chunks(piece) {
                server.handle_received(octets, &mut at_server)?;
            }
            wire.clear();
            server.poll_wire(&mut wire);
            if wire.is_empty() {
                return Ok((at_client, at_server));
            }
            for octets in wire.chunks(piece) {
                client.handle_received(octets, &mut at_client)?;
            }
        }
    }

    fn deliver(from: &mut TlsSession, to: &mut TlsSession, parts: &[&[u8]]) -> (Vec<u8>, usize) {
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        from.write(parts, &mut wire);
        to.handle_received(&wire, &mut plain).unwrap();
        (plain, wire.len())
    }

    #[test]
    fn a_session_is_made_and_tells_its_facts() {
        let config = server(&identity(&["mx.example.com"]));
        for piece in [1, 7, 100_000] {
            let mut client = TlsSession::client(&TlsVerifier::any_certificate(), "other.example.").unwrap();
            let mut server = TlsSession::server(&config).unwrap();
            assert!(client.is_handshaking());
            converse(&mut client, &mut server, piece).unwrap();
            assert!(!client.is_handshaking() && !server.is_handshaking());
            let facts = client.facts();
            assert_eq!(facts.protocol, "TLSv1.3");
            assert_eq!(facts.cipher, "TLS_AES_128_GCM_SHA256");
            assert_eq!(facts.key_exchange, "X25519MLKEM768");
            assert_eq!(facts.peer_subject, ["O=Example, Inc.", "CN=mx.example.com"]);
            assert!(!facts.resumed);
            let (plain, wire) = deliver(&mut client, &mut server, &[b"EHLO ", b"", b"a", b"\r\n"]);
            assert_eq!(plain, b"EHLO a\r\n");
            assert!(wire < 40, "small parts share a record: {wire} octets");
            let large = vec![b'x'; 3 << 20];
            assert!(deliver(&mut server, &mut client, &[&large, b"!"]).0 == [&large[..], b"!"].concat());
        }
    }

    #[test]
    fn what_stands_before_an_error_is_read() {
        let config = server(&identity(&["mx.example.com"]));
        let mut client = TlsSession::client(&TlsVerifier::any_certificate(), "mx.example.com").unwrap();
        let mut server = TlsSession::server(&config).unwrap();
        converse(&mut client, &mut server, 100_000).unwrap();
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        server.write(&["250 2.0.0 Queued\r\n"], &mut wire);
        wire.extend_from_slice(b"554 Too many nonmail commands\r\n");
        assert!(client.handle_received(&wire, &mut plain).is_err());
        assert_eq!(plain, b"250 2.0.0 Queued\r\n");
    }

    /// Envelopes and content share records, and all but the last of a send are full.
    #[test]
    fn what_goes_together_goes_in_as_few_records_as_it_can() {
        let config = server(&identity(&["mx.example.com"]));
        let mut client = TlsSession::client(&TlsVerifier::any_certificate(), "mx.example.com").unwrap();
        let mut server = TlsSession::server(&config).unwrap();
        converse(&mut client, &mut server, 100_000).unwrap();
        let envelope: &[u8] = b"RSET\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n";
        for content in [1_000, 2_048, 16_000, 100_000, 300_000, TLS_WRITE_BYTES - 10] {
            let (header, body) = (vec![b'h'; 500], vec![b'b'; content]);
            let parts = [envelope, b"", &header, &body, b"\r\n.\r\n", envelope];
            let octets: usize = parts.iter().map(|part| part.len()).sum();
            let (mut sends, mut records, mut plain) = (0, 0, Vec::new());
            for step in steps(parts.into_iter(), TLS_WRITE_BYTES) {
                let mut wire = Vec::with_capacity(TlsSession::wire_bytes_max(step.iter().map(|part| part.len()).sum()));
                let capacity = wire.capacity();
                client.write(&step, &mut wire);
                assert_eq!(wire.capacity(), capacity, "it was enough");
                sends += 1;
                let mut rest = &wire[..];
                while let [23, _, _, high, low, ..] = rest {
                    rest = &rest[5 + usize::from(u16::from_be_bytes([*high, *low]))..];
                    records += 1;
                }
                assert!(rest.is_empty(), "application data alone");
                server.handle_received(&wire, &mut plain).unwrap();
            }
            assert!(plain == parts.concat());
            let expected = (octets.div_ceil(TLS_WRITE_BYTES), octets.div_ceil(TLS_RECORD_BYTES));
            assert_eq!((sends, records), expected, "{content} octets of content");
        }
    }

    /// draft-ietf-tls-ecdhe-mlkem: the group's number, 0x11ec, stands in the ClientHello.
    #[test]
    fn every_client_offers_a_post_quantum_group() {
        for verifier in [TlsVerifier::any_certificate(), TlsVerifier::public_roots(&TlsConfig::default()).unwrap()] {
            let mut hello = Vec::new();
            TlsSession::client(&verifier, "mx.example.com").unwrap().poll_wire(&mut hello);
            assert_eq!((hello[0], hello[5]), (22, 1), "a handshake record with a ClientHello");
            let key_share = hello.windows(4).any(|octets| octets == [0x11, 0xec, 0x04, 0xc0]);
            assert!(key_share, "its key share has 1216 octets");
        }
    }

    #[test]
    fn a_close_is_told() {
        let mut client = TlsSession::client(&TlsVerifier::any_certificate(), "192.0.2.1").unwrap();
        let mut server = TlsSession::server(&server(&identity(&["mx.example.com"]))).unwrap();
        converse(&mut client, &mut server, 100).unwrap();
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        client.write(&["QUIT\r\n"], &mut wire);
        assert_eq!(server.handle_received(&wire, &mut plain).unwrap(), Received { peer_closed: false });
        wire.clear();
        client.close_notify(&mut wire);
        wire.extend_from_slice(b"behind the end");
        assert_eq!(server.handle_received(&wire, &mut plain).unwrap(), Received { peer_closed: true });
        assert_eq!(plain, b"QUIT\r\n");
    }

    #[test]
    fn what_is_written_early_follows_the_handshake() {
        let mut client = TlsSession::client(&TlsVerifier::any_certificate(), "mx.example.com").unwrap();
        let mut server = TlsSession::server(&server(&identity(&["mx.example.com"]))).unwrap();
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        client.write(&["EHLO a\r\n"], &mut wire);
        server.handle_received(&wire, &mut plain).unwrap();
        assert_eq!(converse(&mut client, &mut server, 1_000).unwrap().1, b"EHLO a\r\n");
    }

    #[test]
    fn sessions_are_resumed_under_the_same_verifier_only() {
        let identity = identity(&["mx.example.com"]);
        let config = server(&identity);
        let strict = TlsVerifier::with_roots(identity.certificate.as_bytes()).unwrap();
        let any = TlsVerifier::any_certificate();
        let resumed = |verifier: &TlsVerifier, name| {
            let mut client = TlsSession::client(verifier, name).unwrap();
            let mut server = TlsSession::server(&config).unwrap();
            converse(&mut client, &mut server, 1_000).unwrap();
            assert!(!client.facts().peer_subject.is_empty());
            client.facts().resumed
        };
        assert!(!resumed(&any, "mx.example.com"));
        assert!(resumed(&any.clone(), "mx.example.com"), "clones share");
        assert!(!resumed(&strict, "mx.example.com"), "another verifier begins anew");
        assert!(resumed(&strict, "mx.example.com"));
        assert!(!resumed(&any, "mx2.example.com"), "another host begins anew");
    }

    /// The peer's refusal has the result type of RFC 8460 in front.
    fn attempt(config: &Arc<ServerConfig>, verifier: &TlsVerifier, name: &str) -> Result<(), String> {
        let mut client = TlsSession::client(verifier, name).unwrap();
        let mut server = TlsSession::server(config).unwrap();
        let result = converse(&mut client, &mut server, 1_000).map(|_| ());
        let mut alert = Vec::new();
        client.poll_wire(&mut alert);
        assert_eq!(alert.is_empty(), result.is_ok(), "a refusal is told to the peer");
        result.map_err(|error| {
            let HandshakeError { failure, text } = error.into();
            format!("{}: {text}", failure.name())
        })
    }

    /// As `openssl req -x509` makes it: for a host, signed by itself, and an authority's by its own word.
    #[test]
    fn a_host_with_a_trusted_certificate_of_its_own_is_verified() {
        let authority = |parameters: &mut rcgen::CertificateParams| {
            parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        };
        let own = identity_with(&["mx.example.com"], authority);
        let config = server(&own);
        let trusting = TlsVerifier::with_roots(own.certificate.as_bytes()).unwrap();
        attempt(&config, &trusting, "mx.example.com").unwrap();
        let error = attempt(&config, &trusting, "mx.example.net").unwrap_err();
        assert!(error.starts_with("certificate-host-mismatch: ") && error.contains("mx.example.net"), "{error}");
        let other = identity_with(&["mx.example.com"], authority);
        let error = attempt(&server(&other), &trusting, "mx.example.com").unwrap_err();
        assert!(error.starts_with("certificate-not-trusted: "), "{error}");
        let old = identity_with(&["mx.example.com"], |parameters| {
            authority(parameters);
            parameters.not_after = rcgen::date_time_ymd(2020, 1, 1);
        });
        let trusting = TlsVerifier::with_roots(old.certificate.as_bytes()).unwrap();
        let error = attempt(&server(&old), &trusting, "mx.example.com").unwrap_err();
        assert!(error.starts_with("certificate-expired: "), "{error}");
    }

    #[test]
    fn a_verified_session_needs_a_known_root_and_the_right_name() {
        let identity = identity(&["mx.example.com"]);
        let config = server(&identity);
        let attempt = |verifier: &TlsVerifier, name| attempt(&config, verifier, name);
        let public = TlsVerifier::public_roots(&TlsConfig::default()).unwrap();
        assert!(attempt(&public, "mx.example.com").unwrap_err().starts_with("certificate-not-trusted: "));
        let trusting = TlsVerifier::with_roots(identity.certificate.as_bytes()).unwrap();
        attempt(&trusting, "mx.example.com").unwrap();
        let error = attempt(&trusting, "mx.example.net").unwrap_err();
        assert!(error.starts_with("certificate-host-mismatch: ") && error.contains("mx.example.net"), "{error}");
        assert!(attempt(&trusting, "192.0.2.1").is_err());
    }

    #[test]
    fn a_peer_without_tls_is_an_error() {
        let mut client = TlsSession::client(&TlsVerifier::any_certificate(), "mx.example.com").unwrap();
        let error = client.handle_received(b"220 mx.example.com ESMTP\r\n", &mut Vec::new()).unwrap_err();
        assert!(!error.to_string().is_empty());
        let mut wire = Vec::new();
        client.poll_wire(&mut wire);
        assert!(!wire.is_empty());
        TlsSession::client(&TlsVerifier::any_certificate(), "no name").unwrap_err();
    }

    #[test]
    fn unusable_files_are_explained() {
        let (first, second) = (identity(&["a.example"]), identity(&["a.example"]));
        let text = |certificate: &str, key: &str| {
            server_config(certificate.as_bytes(), key.as_bytes()).unwrap_err().to_string()
        };
        assert!(text(&first.certificate, &second.key).contains("can't be used together"));
        assert!(text(&first.certificate, "nonsense").contains("private key"));
        assert!(text("", &first.key).contains("can't be used together"));
        assert!(text("-----BEGIN CERTIFICATE-----\n*", &first.key).contains("certificate"));
    }

    #[test]
    fn any_octets_may_stand_for_a_certificate() {
        let der = CertificateDer::from_pem_slice(identity(&["a.example"]).certificate.as_bytes()).unwrap();
        assert_eq!(subject(&der).unwrap().len(), 2);
        for end in 0..der.len() {
            let _ = subject(&der[..end]);
            let mut damaged = der.to_vec();
            damaged[end] ^= 0xff;
            let _ = subject(&damaged);
        }
        assert_eq!(element(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff], SEQUENCE), None);
        assert_eq!(element(&[0x30, 0x80], SEQUENCE), None);
    }
}
