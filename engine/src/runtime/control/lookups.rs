//! Lookups: of the route that a shard asks for, and of the sites that shaping has tables for.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{Control, send};
use crate::config;
use crate::deliver::route::{RouteFailure, Site};
use crate::handover::{Route, RouteKey, ShardMessage};
use crate::limits::{RULE_SITE_INTERVAL_MAX, RULE_SITE_INTERVAL_MIN, RULE_SITES_PATIENCE};
use crate::runtime::clock::{self, Clock};
use crate::runtime::dns::Resolver;
use crate::runtime::mailbox::Sender;
use crate::runtime::shard_loop::Mail;

impl Control {
    pub(super) fn find_route(&self, shard: usize, key: RouteKey) {
        let (config, resolver, clock) = (Arc::clone(&self.config), self.resolver.clone(), self.clock);
        let policies = self.policies.clone();
        let (lookups, shard) = (Arc::clone(&self.lookups), self.shards[shard].clone());
        let mut unknown_rule_sites = self.unknown_rule_sites.clone();
        self.spawn_lookup(async move {
            // Else the first mail could go before it is known what limits hold for its site.
            let rules = unknown_rule_sites.wait_for(|unknown| *unknown == 0);
            let _ = tokio::time::timeout(RULE_SITES_PATIENCE, rules).await;
            // The semaphore is never closed.
            let _permit = lookups.acquire().await;
            let RouteKey { domain, matched } = &key;
            let route = config.route_of(domain, *matched);
            let by_mx = route.is_none() && config.uses_mta_sts();
            let sts = async { if by_mx { policies.find(domain).await } else { (None, Duration::MAX) } };
            let (found, (sts, sts_expires)) = tokio::join!(find_site(route, &resolver, clock, domain), sts);
            let tls = route.map_or(config.shaping.tls, |route| route.tls_beside(config.shaping.tls));
            let terms = route.map(|route| Arc::clone(&route.terms)).unwrap_or_default();
            let result = found.map(|mut site| {
                site.expires = site.expires.min(sts_expires);
                Route { site: Arc::new(site), tls, sts, dane: true, terms }
            });
            send(&shard, Mail::Core(ShardMessage::Routed { key, result })).await;
        });
    }

    /// A lookup for the configuration that there is now. Once there is another, its answer would be taken for that
    /// one's.
    pub(super) fn spawn_lookup(&self, lookup: impl Future<Output = ()> + Send + 'static) {
        let mut generation = self.lookups_of.subscribe();
        let own = *generation.borrow();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                _ = generation.wait_for(|present| *present != own) => {}
                () = lookup => {}
            }
        });
    }

    /// Tells all shards which site the domains have that shaping has tables for; looked up again as their TTLs say.
    pub(super) fn follow_rule_sites(&self, unknown: watch::Sender<usize>) {
        let is_fixed = |domain: &str| {
            let route = self.config.route_for(domain);
            route.is_some_and(config::Route::is_fixed)
        };
        // Shards know the sites of static routes to addresses by themselves.
        let rules = self.config.shaping_rules.domains.iter();
        let rules = rules.filter(|rule| rule.mx_rollup && !is_fixed(&rule.domain));
        let unknown = Arc::new(unknown);
        for rule in rules {
            unknown.send_modify(|unknown| *unknown += 1);
            let (config, resolver, clock) = (Arc::clone(&self.config), self.resolver.clone(), self.clock);
            let (shards, lookups, unknown) = (self.shards.clone(), Arc::clone(&self.lookups), Arc::clone(&unknown));
            let domain: Arc<str> = Arc::from(&*rule.domain);
            self.spawn_lookup(async move {
                let mut is_first = true;
                while !shards.iter().all(Sender::is_closed) {
                    let permit = lookups.acquire().await;
                    let found = find_site(config.route_for(&domain), &resolver, clock, &domain).await;
                    drop(permit);
                    let expires = match found {
                        Ok(site) => {
                            let name: Arc<str> = Arc::from(&*site.name);
                            for shard in &shards {
                                let (domain, site) = (Arc::clone(&domain), Arc::clone(&name));
                                send(shard, Mail::Core(ShardMessage::RuleSite { domain, site })).await;
                            }
                            site.expires
                        }
                        Err(failure) => {
                            tracing::warn!(%domain, %failure, "it is not known whose site shaping's table is for");
                            failure.expires
                        }
                    };
                    if std::mem::take(&mut is_first) {
                        unknown.send_modify(|unknown| *unknown -= 1);
                    }
                    let wait = expires.saturating_sub(clock.now().monotonic);
                    clock::sleep(wait.clamp(RULE_SITE_INTERVAL_MIN, RULE_SITE_INTERVAL_MAX)).await;
                }
            });
        }
    }
}

/// By a static route where there is one, else by the domain's MX set.
async fn find_site(
    route: Option<&config::Route>,
    resolver: &Resolver,
    clock: Clock,
    domain: &str,
) -> Result<Site, RouteFailure> {
    match route {
        Some(route) => {
            let mut site = resolver.resolve_targets(clock.now(), &route.to).await?;
            if route.balance {
                site.hosts.iter_mut().for_each(|host| host.preference = 0);
            }
            Ok(site)
        }
        None => resolver.resolve_site(clock.now(), domain).await,
    }
}
