//! What a new configuration changes of a running one, by the names of its tables.

use std::collections::BTreeMap;
use std::fmt;

use super::{Config, DomainPattern, Route};

/// Tables and keys, as `egress_source "ip-a"`, each sorted. All empty: nothing has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Changes {
    pub added: Vec<String>,
    pub removed: Vec<String>,
    pub changed: Vec<String>,
}

impl Changes {
    /// Of two configurations with the same indices of sources.
    pub fn between(running: &Config, new: &Config) -> Self {
        let mut all = Self::default();
        all.look("hostname", &running.hostname, &new.hostname);
        all.look("dns", &running.dns, &new.dns);
        all.look("tls", &running.tls, &new.tls);
        all.look("retry", &running.retry, &new.retry);
        all.look("return_path", &running.return_path_domains, &new.return_path_domains);
        all.look("events", &running.events, &new.events);
        all.look("shutdown_grace", &running.shutdown_grace, &new.shutdown_grace);
        all.look("feedback_reference", &running.feedback_reference, &new.feedback_reference);
        let default = |config: &Config| (config.shaping.clone(), config.shaping_rules.default_sources.clone());
        all.look("shaping.default", &default(running), &default(new));
        all.compare("listener", &running.smtp_listeners, &new.smtp_listeners, |it| format!("smtp {}", it.address));
        all.compare("listener", &running.http_listeners, &new.http_listeners, |it| format!("http {}", it.address));
        let in_use = |config: &Config| {
            let sources = config.egress_sources.iter().filter(|source| !source.is_retired);
            sources.cloned().collect::<Vec<_>>()
        };
        all.compare("egress_source", &in_use(running), &in_use(new), |it| it.name.clone());
        all.compare("egress_pool", &running.egress_pools, &new.egress_pools, |it| it.name.clone());
        let source = |config: &Config, index: usize| config.egress_sources[index].name.clone();
        // Their indices are the same in both.
        all.compare("warmup", &running.warmups, &new.warmups, |it| {
            source(if it.source < running.egress_sources.len() { running } else { new }, it.source)
        });
        all.compare("tenant", &running.tenants, &new.tenants, |it| it.name.clone());
        all.compare("limit", &running.limits, &new.limits, |it| it.name.clone());
        all.compare("route", &running.routes, &new.routes, route_name);
        all.compare("dkim", &running.dkim, &new.dkim, |it| format!("{}/{}", it.domain, it.selector));
        let (old, rules) = (&running.shaping_rules, &new.shaping_rules);
        all.compare("provider", &old.providers, &rules.providers, |it| it.name.clone());
        all.compare("shaping", &old.domains, &rules.domains, |it| it.domain.clone());
        for list in [&mut all.added, &mut all.removed, &mut all.changed] {
            list.sort_unstable();
            list.dedup();
        }
        all
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn look<T: PartialEq>(&mut self, key: &str, running: &T, new: &T) {
        self.changed.extend((running != new).then(|| key.to_owned()));
    }

    /// Several of one name are one table.
    fn compare<T: PartialEq>(&mut self, kind: &str, running: &[T], new: &[T], name: impl Fn(&T) -> String) {
        if running == new {
            return;
        }
        let by_name = |list| {
            let mut tables: BTreeMap<String, Vec<&T>> = BTreeMap::new();
            for table in list {
                tables.entry(name(table)).or_default().push(table);
            }
            tables
        };
        let (running, new): (BTreeMap<_, _>, BTreeMap<_, _>) = (by_name(running), by_name(new));
        let count = self.added.len() + self.removed.len() + self.changed.len();
        let label = |name: &String| format!("{kind} {name:?}");
        self.added.extend(new.keys().filter(|name| !running.contains_key(*name)).map(label));
        self.removed.extend(running.keys().filter(|name| !new.contains_key(*name)).map(label));
        let changed = new.iter().filter(|(name, table)| running.get(*name).is_some_and(|known| known != *table));
        self.changed.extend(changed.map(|(name, _)| label(name)));
        if self.added.len() + self.removed.len() + self.changed.len() == count {
            self.changed.push(format!("the order of {kind}"));
        }
    }
}

/// `2 added, 1 removed, 0 changed: egress_source "ip-b", …`, cut where there are many.
impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing has changed");
        }
        let mut is_first = true;
        for (what, names) in [("added", &self.added), ("removed", &self.removed), ("changed", &self.changed)] {
            if names.is_empty() {
                continue;
            }
            f.write_str(if std::mem::take(&mut is_first) { "" } else { "; " })?;
            let shown: Vec<&str> = names.iter().map(String::as_str).take(NAMES_SHOWN).collect();
            write!(f, "{what}: {}", shown.join(", "))?;
            if names.len() > shown.len() {
                write!(f, " and {} more", names.len() - shown.len())?;
            }
        }
        Ok(())
    }
}

fn route_name(route: &Route) -> String {
    let domain = match &route.domain {
        DomainPattern::Any => "*".to_owned(),
        pattern => pattern.to_string(),
    };
    match &route.matches {
        None => domain,
        Some(matches) => format!("{domain} of {matches}"),
    }
}

/// Of each kind of change, in one line.
const NAMES_SHOWN: usize = 8;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(text: &str) -> Config {
        let text = format!("hostname = \"mta.test\"\nspool.allow_filesystem = true\n{text}");
        Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap()
    }

    #[test]
    fn changes_are_named_by_their_tables() {
        let source = "[[egress_source]]\nname = \"ip-a\"\nsource_address = \"192.0.2.1\"\n";
        let route =
            |domain: &str, port: u16| format!("[[route]]\ndomain = \"{domain}\"\nto = [\"127.0.0.1:{port}\"]\n");
        let tenant = |rate: &str| format!("[[tenant]]\nname = \"acme\"\nmax_message_rate = \"{rate}\"\n");
        let old = config(&(route("a.test", 1) + &route("b.test", 1) + &tenant("1/s")));
        let rest = "[provider.google]\nconnection_limit = 3\n[retry]\nmax_age = \"1d\"\n";
        let new = config(&(source.to_owned() + &route("a.test", 2) + &route("c.test", 1) + &tenant("2/s") + rest));
        let new = new.aligned_with(&old).unwrap();
        let changes = Changes::between(&old, &new);
        assert_eq!(changes.added, ["egress_source \"ip-a\"", "route \"c.test\""]);
        assert_eq!(changes.removed, ["route \"b.test\""]);
        assert_eq!(changes.changed, ["provider \"google\"", "retry", "route \"a.test\"", "tenant \"acme\""]);
        let told = "added: egress_source \"ip-a\", route \"c.test\"; removed: route \"b.test\"; changed: provider \
                    \"google\", retry, route \"a.test\", tenant \"acme\"";
        assert_eq!(changes.to_string(), told);
        assert!(Changes::between(&new, &new).is_empty());
        let turned = config(&(route("b.test", 1) + &route("a.test", 1) + &tenant("1/s")));
        assert_eq!(Changes::between(&old, &turned).changed, ["the order of route"]);
    }
}
