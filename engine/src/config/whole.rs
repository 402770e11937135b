//! What a configuration that a program has put together has to keep to. Text is checked as it is read; here is what
//! fields of [`Config`] say of one another, and what the shards take for given.

use std::collections::HashSet;

use super::egress::DEFAULT_POOL;
use super::{Config, RetrySchedule, value};
use crate::limits::CONFIG_SHARDS_MAX;

impl Config {
    /// Whether an engine can run on it; if not, the first reason. What is read from a file always passes.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.shards.is_some_and(|shards| shards == 0 || shards as u64 > CONFIG_SHARDS_MAX) {
            return Err(format!("shards: a number from 1 to {CONFIG_SHARDS_MAX}, or None"));
        }
        if value::domain(&self.hostname).is_err() {
            return Err(format!("hostname: {:?} is not a domain name", self.hostname));
        }
        self.check_egress()?;
        unique("tenants", self.tenants.iter().map(|tenant| &*tenant.name))?;
        for tenant in &self.tenants {
            if self.pool(&tenant.egress_pool).is_none() {
                return Err(format!("tenant {:?}: there is no egress pool {:?}", tenant.name, tenant.egress_pool));
            }
        }
        if self.routes.iter().any(|route| route.to.is_empty()) {
            return Err("routes: each has one target at least".to_owned());
        }
        if matches!(&self.retry.schedule, RetrySchedule::Listed(intervals) if intervals.is_empty()) {
            return Err("retry: the list of intervals has one at least".to_owned());
        }
        let shaping = &self.shaping;
        let counts = [shaping.connection_limit, shaping.max_deliveries_per_connection, shaping.max_in_flight];
        if counts.contains(&0) || shaping.max_recipients_per_batch == 0 {
            return Err("shaping: connection_limit, max_deliveries_per_connection, max_recipients_per_batch and \
                        max_in_flight are 1 at least"
                .to_owned());
        }
        Ok(())
    }

    fn check_egress(&self) -> Result<(), String> {
        let sources = self.egress_sources.len();
        unique("egress_sources", self.egress_sources.iter().map(|source| &*source.name))?;
        unique("egress_pools", self.egress_pools.iter().map(|pool| &*pool.name))?;
        if self.pool(DEFAULT_POOL).is_none() {
            return Err(format!("egress_pools: there is none named {DEFAULT_POOL:?}"));
        }
        for pool in &self.egress_pools {
            if pool.sources.is_empty() {
                return Err(format!("egress pool {:?}: it has no source", pool.name));
            }
            if pool.sources.iter().any(|&(source, weight)| source >= sources || weight == 0) {
                return Err(format!("egress pool {:?}: an index of a source is too large, or a weight 0", pool.name));
            }
        }
        let of_warmups = self.warmups.iter().map(|warmup| warmup.source);
        let of_limits = self.limits.iter().filter_map(|limit| limit.source);
        let of_rules = self.shaping_rules.default_sources.iter().map(|&(source, _)| source);
        if of_warmups.chain(of_limits).chain(of_rules).any(|source| source >= sources) {
            return Err("warmups, limits, shaping_rules: an index of an egress source is too large".to_owned());
        }
        Ok(())
    }
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(format!("{what}: two are named {name:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DomainPattern, EgressPool, Route, Tenant};

    fn refused(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::new("mta.test");
        assert_eq!(config.check(), Ok(()));
        change(&mut config);
        config.check().expect_err("it is refused")
    }

    #[test]
    fn what_no_engine_could_run_on_is_told() {
        let pool = |name: &str, sources: &[(usize, u32)]| EgressPool { name: name.into(), sources: sources.into() };
        let pools = |pools: Vec<EgressPool>| refused(|config| config.egress_pools = pools);
        assert_eq!(pools(vec![pool("a", &[(0, 1)])]), "egress_pools: there is none named \"default\"");
        assert_eq!(pools(vec![pool("default", &[])]), "egress pool \"default\": it has no source");
        let index = "egress pool \"default\": an index of a source is too large, or a weight 0";
        assert_eq!(pools(vec![pool("default", &[(1, 1)])]), index);
        assert_eq!(pools(vec![pool("default", &[(0, 0)])]), index);
        let nowhere = refused(|config| {
            config.tenants.push(Tenant { egress_pool: "b".into(), ..Tenant::new("acme") });
        });
        assert_eq!(nowhere, "tenant \"acme\": there is no egress pool \"b\"");
        let twice = refused(|config| config.tenants = vec![Tenant::new("acme"), Tenant::new("acme")]);
        assert_eq!(twice, "tenants: two are named \"acme\"");
        assert_eq!(refused(|config| config.shards = Some(0)), "shards: a number from 1 to 256, or None");
        assert_eq!(refused(|config| config.hostname.clear()), "hostname: \"\" is not a domain name");
        let to_none = refused(|config| config.routes.push(Route::new(DomainPattern::Any, Vec::new())));
        assert_eq!(to_none, "routes: each has one target at least");
        let never = refused(|config| config.retry.schedule = RetrySchedule::Listed(Vec::new()));
        assert_eq!(never, "retry: the list of intervals has one at least");
        assert!(refused(|config| config.shaping.connection_limit = 0).starts_with("shaping: connection_limit"));
    }
}
