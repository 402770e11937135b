//! `match` of a `[[route]]`: whose mail goes by it.
//!
//! Tenant and campaign are what a queue is made of; the sender is each message's own. So which of the routes with a
//! `match` a message takes is decided once, when its envelope is at hand, and is part of its queue from then on.

use aws_lc_rs::digest;

use super::error::Wrong;
use super::reader::Section;
use super::{Config, Route, Tenant};
use crate::limits;

/// Whose mail goes by a route. What it leaves open fits all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RouteMatch {
    /// A tenant's name.
    pub tenant: Option<String>,
    pub campaign: Option<Wildcard>,
    /// The reverse path; the null one is empty.
    pub sender: Option<Wildcard>,
}

/// Text in which `*` stands for any octets, or none; case means nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wildcard(String);

/// What a route may ask for of a message, beside the recipient's domain.
#[derive(Debug, Clone, Copy)]
pub struct RoutedMail<'a> {
    pub tenant: &'a str,
    pub campaign: &'a str,
    pub sender: &'a str,
}

/// A configured route that has a `match`, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MatchedRoute(pub u32);

impl RouteMatch {
    fn fits(&self, mail: &RoutedMail<'_>) -> bool {
        let fits = |pattern: &Option<Wildcard>, text| pattern.as_ref().is_none_or(|pattern| pattern.fits(text));
        self.tenant.as_deref().is_none_or(|tenant| tenant == mail.tenant)
            && fits(&self.campaign, mail.campaign)
            && fits(&self.sender, mail.sender)
    }

    /// Whether it is certain that all that fits the other one fits this one.
    pub(super) fn covers(&self, other: &Self) -> bool {
        let covers = |one: &Option<Wildcard>, other: &Option<Wildcard>| one.is_none() || one == other;
        (self.tenant.is_none() || self.tenant == other.tenant)
            && covers(&self.campaign, &other.campaign)
            && covers(&self.sender, &other.sender)
    }
}

impl std::fmt::Display for RouteMatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let null = |pattern: &Wildcard| if pattern.0.is_empty() { "none".to_owned() } else { pattern.0.clone() };
        let parts = [
            self.tenant.as_ref().map(|tenant| format!("tenant {tenant}")),
            self.campaign.as_ref().map(|campaign| format!("campaign {}", null(campaign))),
            self.sender.as_ref().map(|sender| format!("sender {}", if sender.0.is_empty() { "<>" } else { &sender.0 })),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

impl Wildcard {
    pub fn new(pattern: &str) -> Self {
        Self(pattern.to_ascii_lowercase())
    }

    pub fn fits(&self, text: &str) -> bool {
        let text = text.to_ascii_lowercase();
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = text.strip_prefix(first) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        // The first place that fits a part leaves the most to those behind it.
        for part in parts {
            let Some(place) = rest.find(part) else { return false };
            rest = &rest[place + part.len()..];
        }
        rest.ends_with(last)
    }
}

impl Config {
    /// The route with a `match` that mail to a domain, in lower case, takes; None: that of its domain.
    pub fn matched_route(&self, domain: &str, mail: &RoutedMail<'_>) -> Option<MatchedRoute> {
        let fits = |route: &Route| {
            route.domain.matches(domain) && route.matches.as_ref().is_none_or(|matches| matches.fits(mail))
        };
        let place = self.routes.iter().position(fits)?;
        self.routes[place].matches.is_some().then_some(MatchedRoute(place as u32))
    }

    /// The route of mail to a domain, in lower case; None: by MX.
    pub fn route_of(&self, domain: &str, matched: Option<MatchedRoute>) -> Option<&Route> {
        match matched {
            Some(MatchedRoute(place)) => self.routes.get(place as usize),
            None => self.route_for(domain),
        }
    }

    /// Where routes ask for senders: a digest of all that decides which of those with a `match` a message takes. The
    /// choice for a message whose sender isn't at hand is known only from one made under the same digest.
    pub fn sender_routes(&self) -> Option<u64> {
        let asks_for_sender = |route: &Route| route.matches.as_ref().is_some_and(|matches| matches.sender.is_some());
        if !self.routes.iter().any(asks_for_sender) {
            return None;
        }
        // Behind the last one that has a `match` nothing decides about it.
        let last = self.routes.iter().rposition(|route| route.matches.is_some()).unwrap_or_default();
        let decisive: Vec<_> = self.routes[..=last].iter().map(|route| (&route.domain, &route.matches)).collect();
        let digest = digest::digest(&digest::SHA256, format!("{decisive:?}").as_bytes());
        Some(digest.as_ref().iter().take(8).fold(0, |number, octet| number << 8 | u64::from(*octet)))
    }
}

pub(super) fn read(route: &Section<'_>, tenants: &[Tenant]) -> Option<RouteMatch> {
    let section = route.table("match", EXAMPLE)?;
    let tenant = section.text("tenant", "\"acme\"", |name| Ok::<_, Wrong>(name.to_owned()));
    if let Some(name) = tenant.as_ref().filter(|name| tenants.iter().all(|tenant| tenant.name != name.value)) {
        let wrong = Wrong::new(format!("there is no tenant {:?}", name.value));
        section.wrong(name.place, "tenant", wrong.instead("write the name of a [[tenant]], or leave it out"));
    }
    let matches = RouteMatch {
        tenant: tenant.map(|found| found.value),
        campaign: section.text("campaign", "\"newsletter-*\"", wildcard).map(|found| found.value),
        sender: section.text("sender", "\"*@news.example\"", sender).map(|found| found.value),
    };
    if ["tenant", "campaign", "sender"].iter().all(|key| section.place_of(key).is_none()) {
        let wrong = Wrong::new("asks for nothing").instead(format!("write {EXAMPLE}, or leave it out"));
        route.wrong(section.place, "match", wrong);
    }
    section.finish();
    Some(matches)
}

fn wildcard(text: &str) -> Result<Wildcard, Wrong> {
    if text.len() > limits::ROUTING_NAME_BYTES_MAX || text.chars().any(char::is_control) {
        let wrong = Wrong::new("is too long or not printable");
        return Err(wrong.instead(format!("write at most {} printable octets", limits::ROUTING_NAME_BYTES_MAX)));
    }
    Ok(Wildcard::new(text))
}

fn sender(text: &str) -> Result<Wildcard, Wrong> {
    let is_plain = text.is_empty() || text == "<>" || text.contains(['@', '*']) && !text.contains(['<', '>', ' ']);
    if !is_plain {
        let wrong = Wrong::new(format!("{text:?} fits no address"));
        return Err(
            wrong.instead("write for example \"a@news.example\", \"*@news.example\", \"*@*.news.example\" or \"<>\"")
        );
    }
    wildcard(if text == "<>" { "" } else { text })
}

const EXAMPLE: &str = "match = { sender = \"*@news.example\" }";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        let fits = |pattern: &str, text: &str| Wildcard::new(pattern).fits(text);
        for (pattern, text) in [
            ("*@news.example", "Bounce+1@News.Example"),
            ("*", ""),
            ("*", "x"),
            ("", ""),
            ("a*b*c", "abc"),
            ("a*b*c", "a-b-b-c"),
            ("*ab", "aab"),
            ("*a*a", "aa"),
            ("*@*.news.example", "x@de.news.example"),
            ("**", "x"),
            ("é*", "ée"),
        ] {
            assert!(fits(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("*@news.example", "x@de.news.example"),
            ("*@*.news.example", "x@news.example"),
            ("", "x"),
            ("a", "aa"),
            ("a*", "ba"),
            ("*a*a", "a"),
            ("ab*ba", "aba"),
            ("a*b*c", "acb"),
        ] {
            assert!(!fits(pattern, text), "{pattern} {text}");
        }
    }

    /// By trying every place for every star.
    #[test]
    fn wildcards_fit_as_by_trial() {
        fn trial(pattern: &[u8], text: &[u8]) -> bool {
            match pattern {
                [] => text.is_empty(),
                [b'*', rest @ ..] => (0..=text.len()).any(|skipped| trial(rest, &text[skipped..])),
                [octet, rest @ ..] => text.first() == Some(octet) && trial(rest, &text[1..]),
            }
        }
        let texts = |letters: &'static [u8], length: u32| {
            let count = letters.len().pow(length);
            (0..count).map(move |mut number| {
                let letter = |_| {
                    let letter = letters[number % letters.len()];
                    number /= letters.len();
                    letter
                };
                (0..length).map(letter).collect::<Vec<u8>>()
            })
        };
        for pattern in (0..5).flat_map(|length| texts(b"ab*", length)) {
            for text in (0..5).flat_map(|length| texts(b"ab", length)) {
                let (pattern, text) = (std::str::from_utf8(&pattern).unwrap(), std::str::from_utf8(&text).unwrap());
                let expected = trial(pattern.as_bytes(), text.as_bytes());
                assert_eq!(Wildcard::new(pattern).fits(text), expected, "{pattern} {text}");
            }
        }
    }
}
