//! What the sink shows in a TLS handshake: a certificate of its own making, which opportunistic TLS takes as any other.

use std::fmt;
use std::sync::Arc;

use anyhow::Result;
use rustls::server::{NoServerSessionStorage, ServerSessionMemoryCache};
use rustls::{HandshakeKind, ServerConfig, ServerConnection};
use rustls_pki_types::PrivateKeyDer;
use tokio_rustls::TlsAcceptor;

/// A key, its self-signed certificate, and the sessions that can be resumed. TLS 1.3 and 1.2.
#[derive(Clone)]
pub struct TlsIdentity(Arc<ServerConfig>);

impl TlsIdentity {
    /// ECDSA P-256. What is not `resumable` gives out no tickets, so that every handshake is a full one.
    pub fn generate(resumable: bool) -> Result<Self> {
        let key = rcgen::KeyPair::generate()?;
        let certificate = rcgen::CertificateParams::new(vec!["postbench.test".to_owned()])?.self_signed(&key)?;
        let der = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], der)?;
        config.session_storage =
            if resumable { ServerSessionMemoryCache::new(SESSIONS_MAX) } else { Arc::new(NoServerSessionStorage {}) };
        config.send_tls13_tickets = if resumable { config.send_tls13_tickets } else { 0 };
        Ok(Self(Arc::new(config)))
    }

    pub(crate) fn config(&self) -> &Arc<ServerConfig> {
        &self.0
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.clone())
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsIdentity")
    }
}

/// Version and kind of a finished handshake, such as `TLSv1_3 full`.
pub(super) fn describe(connection: &ServerConnection) -> String {
    let version = connection.protocol_version().and_then(|version| version.as_str()).unwrap_or("unknown");
    let kind = match connection.handshake_kind() {
        Some(HandshakeKind::Resumed) => "resumed",
        _ => "full",
    };
    format!("{version} {kind}")
}

/// Two for each connection of a pool's.
const SESSIONS_MAX: usize = 100_000;
