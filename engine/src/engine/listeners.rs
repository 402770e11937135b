//! The sockets that clients connect to, SMTP and HTTP.

use std::net::TcpListener;
use std::sync::Arc;

use super::StartError;
use crate::admin::ListenerStatus;
use crate::config::Config;
use crate::runtime::control::Addresses;
use crate::runtime::net;
use crate::runtime::renewal::ListenerPolicy;
use crate::runtime::shard_loop::ListenerSetup;

/// Bound sockets, made before anything is started: a port in use ends the start.
pub(super) struct Listeners {
    pub(super) smtp: Vec<ListenerSetup>,
    pub(super) http: Vec<(TcpListener, crate::config::HttpListener)>,
    pub(super) addresses: Addresses,
}

impl Listeners {
    pub(super) fn bind(config: &Config) -> Result<Self, StartError> {
        let error = |error: std::io::Error| StartError(error.to_string());
        let mut listeners = Self { smtp: Vec::new(), http: Vec::new(), addresses: Addresses::default() };
        for listener in &config.smtp_listeners {
            let socket = net::bind_listener(listener.address).map_err(error)?;
            listeners.addresses.smtp.push(socket.local_addr().map_err(error)?);
            let policy = ListenerPolicy::new(listener)
                .map_err(|error| StartError(format!("listener {}: {error}", listener.address)))?;
            listeners.smtp.push(ListenerSetup { socket: Arc::new(socket), policy: Arc::new(policy) });
        }
        for listener in &config.http_listeners {
            let socket = net::bind_listener(listener.address).map_err(error)?;
            socket.set_nonblocking(true).map_err(error)?;
            listeners.addresses.http.push(socket.local_addr().map_err(error)?);
            listeners.http.push((socket, listener.clone()));
        }
        Ok(listeners)
    }

    pub(super) fn setups(&self) -> Vec<ListenerSetup> {
        let setup = |listener: &ListenerSetup| ListenerSetup {
            socket: Arc::clone(&listener.socket),
            policy: Arc::clone(&listener.policy),
        };
        self.smtp.iter().map(setup).collect()
    }

    pub(super) fn statuses(&self) -> Vec<ListenerStatus> {
        let status = |protocol: &str, address: &std::net::SocketAddr| ListenerStatus {
            protocol: protocol.to_owned(),
            address: address.to_string(),
        };
        let smtp = self.addresses.smtp.iter().map(|address| status("smtp", address));
        smtp.chain(self.addresses.http.iter().map(|address| status("http", address))).collect()
    }
}
