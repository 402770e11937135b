//! Another configuration at a shard, taken up between two turns' messages.
//!
//! What was decided under the one before goes on: transactions of clients and with peers come to their end, records
//! name what they were made with. What waits is routed anew at its own due time, with its own attempts. Limits keep
//! what they have counted (`pool/pair/reload.rs`, `pool/keeper.rs`).
//!
//! Shards take it up one after the other. So each ticket, want and permit has the [`Generation`] that it was made
//! under, and an earlier one is not taken: it goes home, or is asked for again. A home that is behind gets no credits
//! meanwhile (`Pools::hear`). A source keeps its index and a limit its id over all of them (`config/align.rs`), so that
//! whatever is on its way means the same everywhere.

use std::sync::Arc;

use super::routes::{RouteCache, StaticRoutes};
use super::{Action, Shard, orders};
use crate::accept::Policy;
use crate::config::{Config, MatchedRoute, RoutedMail, SharedLimits};
use crate::handover::{ControlMessage, Generation, RouteKey};
use crate::mail::time::Now;
use crate::schedule::queue::Queue;
use crate::schedule::retry::Retries;

/// A configuration with what all shards need of it, made before any has it.
#[derive(Debug)]
pub struct Reload {
    pub generation: Generation,
    pub config: Arc<Config>,
    pub policy: Arc<Policy>,
    pub shared_limits: Arc<SharedLimits>,
    routes: Arc<StaticRoutes>,
}

impl Reload {
    /// What an engine starts with.
    pub fn first(config: Arc<Config>, policy: Arc<Policy>) -> Self {
        let shared_limits = Arc::new(SharedLimits::new(&config));
        let routes = Arc::new(StaticRoutes::new(&config.routes));
        Self { generation: Generation::default(), config, policy, shared_limits, routes }
    }

    /// What follows this one: of the same generation where mail is delivered as before. The configuration has to be
    /// aligned with this one's.
    pub fn followed_by(&self, config: Arc<Config>, policy: Arc<Policy>) -> Self {
        if config.delivers_as(&self.config) {
            let (shared_limits, routes) = (Arc::clone(&self.shared_limits), Arc::clone(&self.routes));
            return Self { generation: self.generation, config, policy, shared_limits, routes };
        }
        let shared_limits = Arc::new(self.shared_limits.replaced_by(&config));
        let routes = Arc::new(StaticRoutes::new(&config.routes));
        Self { generation: Generation(self.generation.0 + 1), config, policy, shared_limits, routes }
    }
}

impl Shard {
    pub(super) fn reload(&mut self, now: Now, reload: &Reload) {
        self.config = Arc::clone(&reload.config);
        self.policy = Arc::clone(&reload.policy);
        self.batch_max = self.config.recipients_per_batch_max();
        self.retries = Retries::new(&self.config);
        if reload.generation > self.generation {
            self.reroute(now, reload);
        }
        self.actions.push_back(Action::Control(ControlMessage::Reloaded { shard: self.id }));
    }

    /// What waits goes as the configuration says now.
    fn reroute(&mut self, now: Now, reload: &Reload) {
        let Reload { generation, config, shared_limits, routes, .. } = reload;
        self.generation = *generation;
        self.plumbed.resize(config.egress_sources.len(), true);
        self.egress.clear();
        self.routes = RouteCache::new(Arc::clone(routes));
        self.shapings = self.shapings.replaced_by(config, Arc::clone(&routes.index));
        self.learn_fixed_sites();
        self.shared_limits = Arc::clone(shared_limits);
        self.keeper.reload(now, *generation, Arc::clone(shared_limits));
        let options = orders::pool_options(config, self.pools.homes(), Arc::clone(shared_limits));
        let random = &mut |below| self.random.u64(0..below);
        self.pools.reload(now, random, *generation, options, &mut |pair| self.shapings.of_pair(pair));
        // Where routes ask for senders, all that decides is the same as it was (`Config::needs_restart`).
        let is_same = config.sender_routes().is_some();
        self.home.reload(Arc::clone(shared_limits), |queue| match routes.any_matched {
            true if is_same => queue.route.matched,
            true => matched_route(config, queue),
            false => None,
        });
    }

    /// Static routes to addresses tell a domain's site without the DNS.
    pub(super) fn learn_fixed_sites(&mut self) {
        for rule in &self.config.shaping_rules.domains {
            if let Some(route) = self.routes.fixed(&RouteKey::of_domain(&*rule.domain)) {
                self.shapings.learn_site(&rule.domain, &route.site.name);
            }
        }
    }
}

/// The route with a `match` that a queue's mail takes, whoever sent it.
fn matched_route(config: &Config, queue: &Queue) -> Option<MatchedRoute> {
    config.matched_route(&queue.domain, &RoutedMail { tenant: &queue.tenant, campaign: &queue.campaign, sender: "" })
}
