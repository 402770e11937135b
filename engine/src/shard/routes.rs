//! The routes that a home knows: static ones, and where mail went lately.

use std::sync::Arc;
use std::time::Duration;

use ahash::{HashMap, HashMapExt as _};

use crate::config::{self, RouteIndex, RouteTarget};
use crate::deliver::dane::HostDane;
use crate::deliver::route::{Host, Site};
use crate::handover::{Route, RouteKey};
use crate::limits::ROUTES_CACHED_MAX;
use crate::mail::endpoint::Endpoint;
use crate::mail::time::Now;

/// Static routes, prepared once. Those to plain addresses need no lookup and never expire.
#[derive(Debug)]
pub(super) struct StaticRoutes {
    fixed: Vec<Option<Route>>,
    pub(super) index: Arc<RouteIndex>,
    any_discards: bool,
    /// Some routes are not everybody's.
    pub(super) any_matched: bool,
}

impl StaticRoutes {
    pub(super) fn new(routes: &[config::Route]) -> Self {
        let any_discards = routes.iter().any(config::Route::discards);
        let any_matched = routes.iter().any(|route| route.matches.is_some());
        let fixed = routes.iter().map(fixed_route).collect();
        Self { fixed, index: Arc::new(RouteIndex::new(routes)), any_discards, any_matched }
    }
}

/// Where mail went lately.
#[derive(Debug)]
pub(super) struct RouteCache {
    pub(super) statics: Arc<StaticRoutes>,
    found: HashMap<RouteKey, Route>,
}

impl RouteCache {
    pub(super) fn new(statics: Arc<StaticRoutes>) -> Self {
        Self { statics, found: HashMap::new() }
    }

    pub(super) fn get(&self, now: Now, key: &RouteKey) -> Option<Route> {
        if let Some(route) = self.fixed(key) {
            return Some(route.clone());
        }
        let route = self.found.get(key)?;
        (route.site.expires > now.monotonic).then(|| route.clone())
    }

    /// Whether mail is thrown away.
    pub(super) fn discards(&self, routes: &[config::Route], key: &RouteKey) -> bool {
        self.statics.any_discards && self.place_of(key).is_some_and(|place| routes[place].discards())
    }

    /// A static route to plain addresses.
    pub(super) fn fixed(&self, key: &RouteKey) -> Option<&Route> {
        self.statics.fixed.get(self.place_of(key)?)?.as_ref()
    }

    /// Of the static route that mail takes, if it takes one.
    fn place_of(&self, key: &RouteKey) -> Option<usize> {
        self.statics.index.place_of(&key.domain, key.matched)
    }

    pub(super) fn insert(&mut self, now: Now, key: &RouteKey, route: Route) {
        if self.found.len() >= ROUTES_CACHED_MAX {
            self.found.retain(|_, route| route.site.expires > now.monotonic);
        }
        if self.found.len() >= ROUTES_CACHED_MAX {
            self.found.clear();
        }
        self.found.insert(key.clone(), route);
    }
}

/// The site of a static route all of whose targets are addresses or Unix sockets.
fn fixed_route(route: &config::Route) -> Option<Route> {
    let mut hosts = Vec::new();
    for (preference, target) in route.to.iter().enumerate() {
        let (name, address) = match target {
            RouteTarget::Address(address) => (address.ip().to_string(), Endpoint::Ip(*address)),
            RouteTarget::Unix(path) => (target.to_string(), Endpoint::Unix(*path)),
            RouteTarget::Host { .. } | RouteTarget::Mx(_) | RouteTarget::Discard => return None,
        };
        let preference = if route.balance { 0 } else { preference.min(usize::from(u16::MAX)) as u16 };
        hosts.push(Host { name, preference, addresses: vec![address], dane: HostDane::default() });
    }
    let name: Vec<String> = route.to.iter().map(ToString::to_string).collect();
    let site = Site { name: name.join(","), hosts, expires: Duration::MAX };
    // What it asks of TLS is told with its shaping.
    let tls = config::TlsMode::Opportunistic;
    Some(Route { site: Arc::new(site), tls, sts: None, dane: false, terms: Arc::clone(&route.terms) })
}
