//! Another configuration for a running engine: looked at as a whole, made ready, and only then taken up.
//!
//! All that can fail, and all that takes time, is done by whoever asks; then the control thread gives it to all shards.
//! So nothing is half taken up, and no shard waits for a file or for keys to be read.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use tokio::sync::oneshot;

use super::{Engine, Shared};
use crate::accept::Policy;
use crate::admin::http_admin::AdminOptions;
use crate::admin::{Reloaded, WallTime};
use crate::config::{Changes, Config, ConfigErrors};
use crate::limits::RETIRED_LIMITS_MAX;
use crate::runtime::aside::aside;
use crate::runtime::clock::Clock;
use crate::runtime::control::{Command, TakenUp};
use crate::runtime::dns::Resolver;
use crate::runtime::mta_sts::PolicyStore;
use crate::runtime::renewal::{ListenerPolicy, Renewal, Verifiers};
use crate::shard::Reload;

/// Where an engine's configuration comes from, to be read again and again.
pub(super) type Source = Arc<dyn Fn() -> Result<Config, ConfigErrors> + Send + Sync>;

/// Why another configuration was not taken up; all is as it was. Displays what to do, one error a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReloadError {
    /// It has errors, told as `check` tells them.
    Invalid(String),
    /// It is good, but not for a running engine: the keys that differ.
    NeedsRestart(Vec<String>),
    /// The engine was started with a configuration that can't be read again.
    NoSource,
    /// The engine is ending.
    Ended,
}

impl fmt::Display for ReloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(errors) => f.write_str(errors),
            Self::NeedsRestart(keys) => f.write_str(&keys.join("\n")),
            Self::NoSource => f.write_str("the engine has no configuration file that it could read again"),
            Self::Ended => f.write_str("the engine is shutting down"),
        }
    }
}

impl std::error::Error for ReloadError {}

/// What is in force, and since when.
pub(super) struct Live {
    pub(super) reload: Arc<Reload>,
    pub(super) since_ms: u64,
    pub(super) resolver: Resolver,
    pub(super) verifiers: Verifiers,
}

/// What is about to be in force.
struct Prepared {
    live: Arc<Live>,
    renewal: Renewal,
    changes: Changes,
}

impl Engine {
    /// Takes up another configuration without a restart, and tells what it changes once every shard has it.
    ///
    /// It is taken up as a whole or not at all: with an error everything is as before. Sessions and transactions that
    /// are under way end as they began; what waits is routed anew, with its attempts and due times; limits keep what
    /// they have counted. Runs on any executor, and makes ready in the caller's thread. Two at a time go one after the
    /// other.
    pub async fn reload(&self, config: Config) -> Result<Reloaded, ReloadError> {
        let shared = &self.shared;
        let _turn = shared.reloading.lock().await;
        let running = shared.live();
        let prepared = prepare(&running, config, shared.own_addresses(), shared.clock)?;
        shared.take_up(&running, prepared).await
    }

    /// The same with what [`super::EngineBuilder::reload_from`] reads: what SIGHUP and `postctl reload` do. Runs in a
    /// tokio runtime.
    pub async fn reload_source(&self) -> Result<Reloaded, ReloadError> {
        self.shared.reload_source().await
    }
}

impl Shared {
    /// Files, keys and routes may be many: not on the caller's thread, which may be the control thread.
    pub(super) async fn reload_source(&self) -> Result<Reloaded, ReloadError> {
        let Some(source) = self.source.clone() else { return Err(ReloadError::NoSource) };
        let _turn = self.reloading.lock().await;
        let running = self.live();
        let (known, own, clock) = (Arc::clone(&running), self.own_addresses(), self.clock);
        let read = move || {
            let config = source().map_err(|errors| ReloadError::Invalid(errors.to_string()));
            config.and_then(|config| prepare(&known, config, own, clock))
        };
        // A file on a dead network file system never comes.
        let prepared = aside("reload", read);
        let prepared = prepared.map_err(|error| ReloadError::Invalid(format!("it can not be read now: {error}")))?;
        let prepared = prepared.await.map_err(|_| ReloadError::Ended)?;
        self.take_up(&running, prepared?).await
    }

    /// From here on nothing can fail but the engine's end. Where nothing has changed, nothing is done.
    async fn take_up(&self, running: &Live, prepared: Option<Prepared>) -> Result<Reloaded, ReloadError> {
        let Some(Prepared { live, renewal, changes }) = prepared else {
            return Ok(Reloaded { changes: Changes::default(), since: WallTime(running.since_ms) });
        };
        let since = WallTime(live.since_ms);
        // A message that is injected under it may ask for what no shard knew before.
        let (policy, new) = (Arc::clone(&self.policy), Arc::clone(&live.reload.policy));
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = live;
        let (reply, told) = oneshot::channel();
        let taken_up = TakenUp(Box::new(move || {
            *policy.write().unwrap_or_else(PoisonError::into_inner) = new;
            // Who asked may have given up.
            let _ = reply.send(());
        }));
        self.commands.send(Command::Reload { renewal: Arc::new(renewal), taken_up }).map_err(|_| ReloadError::Ended)?;
        told.await.map_err(|_| ReloadError::Ended)?;
        tracing::info!(%changes, "another configuration is in force");
        Ok(Reloaded { changes, since })
    }

    pub(super) fn live(&self) -> Arc<Live> {
        Arc::clone(&self.live.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn config(&self) -> Arc<Config> {
        Arc::clone(&self.live().reload.config)
    }

    /// That of a configuration that all shards have.
    pub(super) fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn own_addresses(&self) -> Vec<SocketAddr> {
        self.addresses.smtp.iter().chain(&self.addresses.http).copied().collect()
    }
}

/// Looks at a configuration, and makes all that it takes. None: it says what is in force.
fn prepare(
    running: &Live,
    config: Config,
    own: Vec<SocketAddr>,
    clock: Clock,
) -> Result<Option<Prepared>, ReloadError> {
    config.check().map_err(ReloadError::Invalid)?;
    let before = &running.reload.config;
    let keys = config.needs_restart(before);
    if !keys.is_empty() {
        return Err(ReloadError::NeedsRestart(keys));
    }
    let config = config.aligned_with(before).map_err(|key| ReloadError::NeedsRestart(vec![key]))?;
    if config == **before {
        return Ok(None);
    }
    let changes = Changes::between(before, &config);
    let failed = |what: &str, error: &dyn fmt::Display| ReloadError::Invalid(format!("{what}: {error}"));
    let policy = Policy::new(&config).map_err(ReloadError::Invalid)?;
    let reload = Arc::new(running.reload.followed_by(Arc::new(config), Arc::new(policy)));
    if reload.shared_limits.retired() > RETIRED_LIMITS_MAX {
        let key = "limit: so many have come and gone since the start that it needs a restart";
        return Err(ReloadError::NeedsRestart(vec![key.to_owned()]));
    }
    let config = &reload.config;
    let mut listeners = Vec::with_capacity(config.smtp_listeners.len());
    for listener in &config.smtp_listeners {
        let policy = ListenerPolicy::new(listener);
        listeners.push(Arc::new(policy.map_err(|error| failed(&format!("listener {}", listener.address), &error))?));
    }
    let tls_changes = config.tls != before.tls;
    let verifiers = if tls_changes {
        Verifiers::new(&config.tls).map_err(|error| failed("tls", &error))?
    } else {
        running.verifiers.clone()
    };
    let dns_changes = config.dns != before.dns || config.uses_dane() != before.uses_dane();
    let resolver = if dns_changes {
        Resolver::new(&config.dns, config.uses_dane(), own).map_err(|error| failed("dns", &error))?
    } else {
        running.resolver.clone()
    };
    let mut names = None;
    if dns_changes || tls_changes {
        let directory = config.spool.path.join("mta-sts");
        let policies = PolicyStore::open(directory, clock, resolver.clone(), &verifiers.public_roots)
            .map_err(|error| failed("MTA-STS policies", &error))?;
        names = Some((resolver.clone(), policies));
    }
    let tokens = config.http_listeners.iter().map(|listener| listener.admin_token_sha256.clone());
    let http = tokens.map(|admin_token_sha256| AdminOptions { admin_token_sha256 }).collect();
    let renewal = Renewal { reload: Arc::clone(&reload), listeners, verifiers: verifiers.clone(), names, http };
    let live = Arc::new(Live { reload, since_ms: clock.now().wall_ms, resolver, verifiers });
    Ok(Some(Prepared { live, renewal, changes }))
}
