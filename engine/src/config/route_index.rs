//! Which static route a domain takes, found without looking at every route: there may be a hundred thousand.

use std::collections::HashMap;

use super::{DomainPattern, MatchedRoute, Route};

/// Places of the routes that are everybody's; of the same pattern the first counts.
#[derive(Debug, Default)]
pub(crate) struct RouteIndex {
    exact: HashMap<String, usize>,
    /// With their leading dots.
    suffixes: HashMap<String, usize>,
    any: Option<usize>,
}

impl RouteIndex {
    pub(crate) fn new(routes: &[Route]) -> Self {
        let mut index = Self::default();
        for (place, route) in routes.iter().enumerate().filter(|(_, route)| route.matches.is_none()) {
            match &route.domain {
                DomainPattern::Any => _ = index.any.get_or_insert(place),
                DomainPattern::Suffix(suffix) => _ = index.suffixes.entry(suffix.clone()).or_insert(place),
                DomainPattern::Exact(domain) => _ = index.exact.entry(domain.clone()).or_insert(place),
            }
        }
        index
    }

    /// The place of the route that mail to a domain, in lower case, takes; None: by MX.
    pub(crate) fn place_of(&self, domain: &str, matched: Option<MatchedRoute>) -> Option<usize> {
        match matched {
            Some(MatchedRoute(place)) => Some(place as usize),
            None => self.first(domain),
        }
    }

    fn first(&self, domain: &str) -> Option<usize> {
        let exact = self.exact.get(domain).copied();
        // The part before a suffix is never empty.
        let dots = domain.match_indices('.').map(|(dot, _)| dot).filter(|dot| *dot > 0);
        let suffixes = dots.filter_map(|dot| self.suffixes.get(&domain[dot..]).copied());
        suffixes.chain(exact).chain(self.any).min()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::{RouteMatch, Terms, TlsMode};
    use super::*;

    fn route(domain: DomainPattern, is_everybodys: bool) -> Route {
        let matches = (!is_everybodys).then(RouteMatch::default);
        Route {
            domain,
            matches,
            to: Vec::new(),
            balance: false,
            tls: Some(TlsMode::Disabled),
            terms: Arc::<Terms>::default(),
        }
    }

    proptest! {
        /// Against looking at each in turn.
        #[test]
        fn it_finds_the_first_route_that_fits(
            routes in prop::collection::vec((0..3u8, "[ab](\\.[ab]){0,2}", prop::bool::weighted(0.8)), 0..12),
            domain in "[ab](\\.[ab]){0,3}",
        ) {
            let routes: Vec<Route> = routes.into_iter().map(|(kind, name, is_everybodys)| match kind {
                0 => route(DomainPattern::Any, is_everybodys),
                1 => route(DomainPattern::Suffix(format!(".{name}")), is_everybodys),
                _ => route(DomainPattern::Exact(name), is_everybodys),
            }).collect();
            let in_turn = routes.iter().position(|route| route.matches.is_none() && route.domain.matches(&domain));
            prop_assert_eq!(RouteIndex::new(&routes).place_of(&domain, None), in_turn);
        }
    }
}
