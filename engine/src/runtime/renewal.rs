//! What another configuration gives to the threads, made before any of them has it.

use std::sync::Arc;

use super::dns::Resolver;
use super::mta_sts::PolicyStore;
use super::tls::{self, TlsError, TlsVerifier};
use crate::admin::http_admin::AdminOptions;
use crate::config::{SmtpListener, TlsConfig};
use crate::shard::Reload;

/// All of it. What has not changed is what it was.
pub(crate) struct Renewal {
    pub(crate) reload: Arc<Reload>,
    /// In the order in which the listeners are bound.
    pub(crate) listeners: Vec<Arc<ListenerPolicy>>,
    pub(crate) verifiers: Verifiers,
    /// Where names are looked up in another way.
    pub(crate) names: Option<(Resolver, PolicyStore)>,
    /// Of each HTTP listener, in the order in which they are bound.
    pub(crate) http: Vec<AdminOptions>,
}

impl std::fmt::Debug for Renewal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Renewal {:?}", self.reload.generation)
    }
}

/// What sessions of a listener may do, and with which certificate.
#[derive(Debug)]
pub(crate) struct ListenerPolicy {
    pub(crate) config: SmtpListener,
    pub(crate) tls: Option<Arc<rustls::ServerConfig>>,
}

impl ListenerPolicy {
    pub(crate) fn new(listener: &SmtpListener) -> Result<Self, TlsError> {
        let config = |files: &crate::config::ListenerTls| tls::server_config(&files.certificate_pem, &files.key_pem);
        let tls = listener.tls.as_ref().map(config).transpose()?;
        Ok(Self { config: listener.clone(), tls })
    }
}

/// One of each for the whole engine: a session is resumed only with the verifier that made it.
#[derive(Clone)]
pub(crate) struct Verifiers {
    pub(crate) any_certificate: TlsVerifier,
    pub(crate) public_roots: TlsVerifier,
}

impl Verifiers {
    pub(crate) fn new(config: &TlsConfig) -> Result<Self, TlsError> {
        Ok(Self { any_certificate: TlsVerifier::any_certificate(), public_roots: TlsVerifier::public_roots(config)? })
    }
}
