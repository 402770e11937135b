//! A new configuration for a running engine: what it may change, and its sources where the running one has them.
//!
//! A source is an index wherever the engine keeps something about it: pairs, suspensions, warm-ups, limits. So a known
//! name keeps its index, a new one goes behind all others, and one that is gone stays as *retired*: nothing goes by it.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;

use super::{Config, Layer, Provider, ProviderMatch, Settings};
use crate::limits;

impl Config {
    /// What of it a running engine can't take up, each in words that name the key; empty: nothing.
    pub fn needs_restart(&self, running: &Self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        let mut look = |key: &str, differs: bool| found.extend(differs.then(|| key.to_owned()));
        look("shards", self.shards != running.shards);
        look("pin", self.pin != running.pin);
        look("spool.path", self.spool.path != running.spool.path);
        look("spool.durability", self.spool.durability != running.spool.durability);
        look("spool.max_size", self.spool.max_size_bytes != running.spool.max_size_bytes);
        look("events.path", self.events_path() != running.events_path());
        let addresses = |config: &Self| -> (Vec<SocketAddr>, Vec<SocketAddr>) {
            let mut smtp: Vec<_> = config.smtp_listeners.iter().map(|listener| listener.address).collect();
            let mut http: Vec<_> = config.http_listeners.iter().map(|listener| listener.address).collect();
            smtp.sort_unstable();
            http.sort_unstable();
            (smtp, http)
        };
        look("listener.address", addresses(self) != addresses(running));
        // Sites would move to other roll-ups, with nothing of what their limits have counted.
        for name in other_rollups(self, running) {
            look(&format!("provider.{name:?}.match"), true);
        }
        // Each message's own: none of those that wait has its sender at hand.
        look("route.match.sender", self.sender_routes() != running.sender_routes());
        found.into_iter().map(|key| format!("{key}: a change of it needs a restart")).collect()
    }

    /// The same, with the indices of a running engine's sources. Fails where too many were retired since its start.
    pub fn aligned_with(mut self, running: &Self) -> Result<Self, String> {
        let own = std::mem::take(&mut self.egress_sources);
        let mut sources = running.egress_sources.clone();
        sources.iter_mut().for_each(|source| source.is_retired = true);
        let mut known: HashMap<String, usize> =
            sources.iter().enumerate().map(|(index, source)| (source.name.clone(), index)).collect();
        let mut indices = Vec::with_capacity(own.len());
        for source in own {
            let index = *known.entry(source.name.clone()).or_insert(sources.len());
            indices.push(index);
            if index == sources.len() {
                sources.push(source);
            } else {
                sources[index] = source;
            }
        }
        if sources.len() > limits::CONFIG_EGRESS_SOURCES_MAX {
            return Err("egress_source: so many have come and gone since the start that it needs a restart".to_owned());
        }
        self.egress_sources = sources;
        let moved = |source: &mut usize| *source = indices[*source];
        self.egress_pools.iter_mut().flat_map(|pool| &mut pool.sources).for_each(|(source, _)| moved(source));
        self.warmups.iter_mut().for_each(|warmup| moved(&mut warmup.source));
        self.limits.iter_mut().filter_map(|limit| limit.source.as_mut()).for_each(moved);
        let of_layers = |layer: &mut Layer| layer.sources.iter_mut().for_each(|(source, _)| moved(source));
        let rules = &mut self.shaping_rules;
        rules.default_sources.iter_mut().for_each(|(source, _): &mut (usize, Settings)| moved(source));
        rules.providers.iter_mut().map(|provider| &mut provider.layer).for_each(of_layers);
        rules.domains.iter_mut().map(|domain| &mut domain.layer).for_each(of_layers);
        // Listeners stay where they are bound, in whatever order they are written now.
        in_order_of(&mut self.smtp_listeners, &running.smtp_listeners, |listener| listener.address);
        in_order_of(&mut self.http_listeners, &running.http_listeners, |listener| listener.address);
        Ok(self)
    }

    /// Whether mail that waits is routed and sent alike by both. Of two with the same indices of sources.
    pub fn delivers_as(&self, other: &Self) -> bool {
        self.egress_sources == other.egress_sources
            && self.egress_pools == other.egress_pools
            && self.warmups == other.warmups
            && self.tenants == other.tenants
            && self.limits == other.limits
            && self.routes == other.routes
            && self.shaping == other.shaping
            && self.shaping_rules == other.shaping_rules
            && self.retry == other.retry
            && self.dns == other.dns
            && self.tls == other.tls
    }

    /// The egress source of this name, unless it is retired.
    pub fn source_named(&self, name: &str) -> Option<usize> {
        self.egress_sources.iter().position(|source| source.name == name && !source.is_retired)
    }
}

/// The providers that come, go or have other sites, by name.
fn other_rollups<'a>(one: &'a Config, other: &'a Config) -> BTreeSet<&'a str> {
    let (one, other) = (rollups(one), rollups(other));
    let names = one.keys().chain(other.keys()).copied();
    names.filter(|name| one.get(name) != other.get(name)).collect()
}

fn rollups(config: &Config) -> HashMap<&str, &[ProviderMatch]> {
    let of = |provider: &&Provider| !provider.matches.is_empty();
    let providers = config.shaping_rules.providers.iter().filter(of);
    providers.map(|provider| (provider.name.as_str(), provider.matches.as_slice())).collect()
}

/// Both have the same addresses.
fn in_order_of<T>(own: &mut [T], running: &[T], address: impl Fn(&T) -> SocketAddr) {
    for (place, there) in running.iter().enumerate() {
        let found = own[place.min(own.len())..].iter().position(|listener| address(listener) == address(there));
        if let Some(behind) = found {
            own[place..].rotate_left(behind);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(text: &str) -> Config {
        let text = format!("hostname = \"mta.test\"\n[spool]\nallow_filesystem = true\n{text}");
        Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap()
    }

    fn sources(names: &[&str]) -> String {
        let source = |(place, name): (usize, &&str)| {
            format!("[[egress_source]]\nname = \"{name}\"\nsource_address = \"192.0.2.{}\"\n", place + 1)
        };
        let members: Vec<String> = names.iter().map(|name| format!("{{ source = \"{name}\" }}")).collect();
        let list: String = names.iter().enumerate().map(source).collect();
        format!("{list}[[egress_pool]]\nname = \"default\"\nsources = [{}]\n", members.join(", "))
    }

    fn names(config: &Config) -> Vec<(&str, bool)> {
        config.egress_sources.iter().map(|source| (source.name.as_str(), source.is_retired)).collect()
    }

    #[test]
    fn a_known_source_keeps_its_index_wherever_it_stands() {
        let first = config(&sources(&["a", "b"]));
        let rest = "[warmup.c]\nstart = \"2026-12-01\"\ndaily.default = [5]\n\
                    [shaping.default.sources.b]\nconnection_limit = 3\n\
                    [provider.google.sources.c]\nconnection_limit = 4\n\
                    [shaping.\"x.test\".sources.b]\nconnection_limit = 5\n\
                    [[limit]]\nname = \"l\"\negress_source = \"c\"\nmax_message_rate = \"1/s\"\n";
        let second = config(&(sources(&["c", "b"]) + rest)).aligned_with(&first).unwrap();
        assert_eq!(names(&second), [("a", true), ("b", false), ("c", false)]);
        assert_eq!(second.egress_pools[0].sources, [(2, 1), (1, 1)]);
        assert_eq!((second.warmups[0].source, second.limits[0].source), (2, Some(2)));
        assert_eq!(second.shaping_rules.default_sources[0].0, 1);
        let google = second.shaping_rules.providers.iter().find(|provider| provider.name == "google").unwrap();
        assert_eq!((google.layer.sources[0].0, second.shaping_rules.domains[0].layer.sources[0].0), (2, 1));
        assert_eq!((second.source_named("a"), second.source_named("c")), (None, Some(2)));

        let third = config(&sources(&["a"])).aligned_with(&second).unwrap();
        assert_eq!(names(&third), [("a", false), ("b", true), ("c", true)], "one that comes back has its place");
        assert_eq!(third.egress_pools[0].sources, [(0, 1)]);
    }

    #[test]
    fn the_same_text_is_the_same_configuration() {
        let text = sources(&["a", "b"])
            + "[[shaping.default.automation]]\nwhen = '^421'\naction = \"suspend\"\nfor = \"1h\"\n\
               [[route]]\ndomain = \"*.test\"\nto = [\"127.0.0.1:25\"]\n";
        let running = config(&text);
        assert!(config(&text).aligned_with(&running).unwrap() == running);
        for (old, new) in [("421", "422"), ("1h", "2h"), ("127.0.0.1", "127.0.0.2"), ("192.0.2.2", "192.0.2.3")] {
            assert!(config(&text.replace(old, new)).aligned_with(&running).unwrap() != running, "{new}");
        }
    }

    #[test]
    fn what_needs_a_restart_is_named() {
        let listener = |address: &str| format!("[[listener]]\nprotocol = \"smtp\"\naddress = \"{address}\"\n");
        let by_sender =
            |to: &str| format!("[[route]]\ndomain = \"*\"\nmatch = {{ sender = \"{to}\" }}\nto = [\"127.0.0.1:25\"]\n");
        let plain = "[[route]]\ndomain = \"x.test\"\nto = [\"127.0.0.1:25\"]\n";
        let running = config(&(listener("127.0.0.1:2525") + &by_sender("*@a.test")));
        let found = |text: &str| config(text).needs_restart(&running);
        assert_eq!(found(&(listener("127.0.0.1:2525") + &by_sender("*@a.test"))), [""; 0]);
        assert_eq!(
            found(&(listener("127.0.0.1:2526") + &by_sender("*@a.test"))),
            ["listener.address: a change of it needs a restart"]
        );
        let same = listener("127.0.0.1:2525");
        assert_eq!(
            found(&(same.clone() + &by_sender("*@b.test"))),
            ["route.match.sender: a change of it needs a restart"]
        );
        assert_eq!(found(&(same.clone() + &by_sender("*@a.test") + plain)), [""; 0], "it stands behind");
        let own = "[provider.mine]\nmatch = [{ mx_suffix = \".mine.test\" }]\n";
        assert_eq!(
            found(&(same.clone() + &by_sender("*@a.test") + own)),
            ["provider.\"mine\".match: a change of it needs a restart"]
        );
        let moved = "[provider.yahoo]\nshipped = false\nmatch = [{ mx_suffix = \".mine.test\" }]\n";
        assert_eq!(
            found(&(same.clone() + &by_sender("*@a.test") + own + moved)),
            ["mine", "yahoo"].map(|name| format!("provider.{name:?}.match: a change of it needs a restart"))
        );
        let text = format!(
            "shards = 3\npin = true\nspool.path = \"/s\"\nspool.max_size = \"9GiB\"\n\
                            spool.durability = \"none\"\nspool.allow_filesystem = true\nevents.path = \"/e\"\n\
                            {same}{}",
            by_sender("*@a.test")
        );
        let all = Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap().needs_restart(&running);
        let keys: Vec<&str> = all.iter().filter_map(|line| line.split(':').next()).collect();
        assert_eq!(keys, ["shards", "pin", "spool.path", "spool.durability", "spool.max_size", "events.path"]);
    }

    #[test]
    fn listeners_keep_their_places() {
        let listener = |port: u16, size: &str| {
            format!(
                "[[listener]]\nprotocol = \"smtp\"\naddress = \"127.0.0.1:{port}\"\nmax_message_size = \"{size}\"\n"
            )
        };
        let running = config(&(listener(25, "1MiB") + &listener(26, "1MiB") + &listener(27, "1MiB")));
        let turned = config(&(listener(27, "7MiB") + &listener(25, "5MiB") + &listener(26, "6MiB")));
        let turned = turned.aligned_with(&running).unwrap();
        let sizes = turned.smtp_listeners.iter().map(|it| (it.address.port(), it.max_message_bytes >> 20));
        assert_eq!(sizes.collect::<Vec<_>>(), [(25, 5), (26, 6), (27, 7)]);
    }
}
