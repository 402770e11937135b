//! `[[route]]`: static routes instead of MX.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::error::{Place, Placed, Wrong};
use super::load::read_text;
use super::reader::Section;
use super::route_match::{self, RouteMatch};
use super::shaping;
use super::{
    Config, Credentials, DeliveryProtocol, DomainPattern, Route, RouteTarget, Terms, TlsMode, UnixPath, value,
};
use crate::limits;

/// The words of the `tls` key of routes and of shaping.
pub(super) const TLS_MODES: [(&str, TlsMode); 4] = [
    ("opportunistic", TlsMode::Opportunistic),
    ("required", TlsMode::Required),
    ("verified", TlsMode::Verified),
    ("disabled", TlsMode::Disabled),
];

const PROTOCOLS: [(&str, DeliveryProtocol); 2] = [("smtp", DeliveryProtocol::Smtp), ("lmtp", DeliveryProtocol::Lmtp)];
const AUTH_EXAMPLE: &str = "auth = { username = \"user\", password_file = \"secret\" }";
const SMTP_PORT: u16 = 25;

impl Route {
    /// To these targets, in their order, by SMTP, with TLS as shaping says.
    pub fn new(domain: DomainPattern, to: Vec<RouteTarget>) -> Self {
        Self { domain, matches: None, to, balance: false, tls: None, terms: Arc::default() }
    }

    /// What its mail asks of TLS where shaping asks for `shaping`.
    pub fn tls_beside(&self, shaping: TlsMode) -> TlsMode {
        let has_secret = self.terms.auth.as_ref().is_some_and(|auth| !auth.without_tls);
        match (self.tls, shaping) {
            (Some(own), _) => own,
            // Over a Unix socket it is not spoken.
            _ if self.to.iter().any(|target| matches!(target, RouteTarget::Unix(_))) => TlsMode::Opportunistic,
            (None, TlsMode::Opportunistic | TlsMode::Disabled) if has_secret => TlsMode::Required,
            (None, shaping) => shaping,
        }
    }

    /// Whether mail is thrown away instead of sent.
    pub fn discards(&self) -> bool {
        self.to == [RouteTarget::Discard]
    }

    /// Whether its hosts are known without asking the DNS.
    pub fn is_fixed(&self) -> bool {
        self.to.iter().all(|to| matches!(to, RouteTarget::Address(_) | RouteTarget::Unix(_) | RouteTarget::Discard))
    }
}

impl Config {
    /// The route for a recipient's domain, in lower case, of those that are everybody's; None: by MX.
    pub fn route_for(&self, domain: &str) -> Option<&Route> {
        self.routes.iter().find(|route| route.matches.is_none() && route.domain.matches(domain))
    }
}

impl DomainPattern {
    /// Whether a domain, in lower case, fits.
    pub fn matches(&self, domain: &str) -> bool {
        match self {
            Self::Any => true,
            // `.example.com` itself is no domain, so the part before the suffix is never empty.
            Self::Suffix(suffix) => domain.len() > suffix.len() && domain.ends_with(suffix.as_str()),
            Self::Exact(exact) => domain == exact,
        }
    }

    /// The patterns, as text, whose domains include all of this one's, itself among them.
    fn covering(&self) -> Vec<String> {
        let own = self.to_string();
        let domain = own.trim_start_matches("*.");
        let mut patterns = vec!["*".to_owned(), own.clone()];
        let dots = domain.match_indices('.').map(|(dot, _)| format!("*{}", &domain[dot..]));
        patterns.extend(dots);
        patterns
    }
}

impl std::fmt::Display for DomainPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
            Self::Exact(domain) => f.write_str(domain),
        }
    }
}

impl std::fmt::Display for RouteTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{path}"),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
            Self::Mx(name) => write!(f, "mx:{name}"),
            Self::Discard => f.write_str("discard"),
        }
    }
}

/// Reads the routes and checks them against one another, the listeners and the sources in `config`.
pub(super) fn read(top: &Section<'_>, config: &Config) -> Vec<Route> {
    let mut routes = Vec::new();
    let mut places: BTreeMap<String, Vec<(Place, RouteMatch)>> = BTreeMap::new();
    for section in top.tables("route", "[[route]]") {
        let domain = section.text("domain", "\"*.example.com\"", pattern);
        let matches = route_match::read(&section, &config.tenants);
        let domain = match section.place_of("domain") {
            None if section.place_of("match").is_some() => {
                Some(Placed { value: DomainPattern::Any, place: section.place })
            }
            None => {
                section.missing("domain", "\"*\"");
                None
            }
            Some(_) => domain,
        };
        let protocol = section.choice("protocol", &PROTOCOLS, &[]).unwrap_or_default();
        let to = read_targets(&section, config, protocol);
        let auth = section.table("auth", AUTH_EXAMPLE).and_then(read_auth);
        let tls = read_tls(&section, auth.as_ref());
        if to.iter().any(|target| matches!(target, RouteTarget::Unix(_))) {
            check_unix_tls(&section, tls, auth.as_ref());
        }
        let balance = section.boolean("balance").unwrap_or(false);
        let (chunking, max_in_flight) = shaping::read_chunking(&section);
        let terms = Arc::new(Terms { protocol, auth, chunking, max_in_flight });
        if let Some(domain) = domain {
            let asked = matches.clone().unwrap_or_default();
            let covering = domain.value.covering().into_iter().find_map(|pattern| {
                let (place, _) = places.get(&pattern)?.iter().find(|(_, earlier)| earlier.covers(&asked))?;
                Some((pattern, *place))
            });
            if let Some((earlier, place)) = covering {
                let at = section.report.describe(place);
                let wrong = Wrong::new(format!("is never used: \"{earlier}\" at {at} takes its mail first"));
                let instead = "put this route above that one, or leave it out";
                section.wrong(domain.place, "domain", wrong.instead(instead));
            }
            places.entry(domain.value.to_string()).or_default().push((domain.place, asked));
            routes.push(Route { domain: domain.value, matches, to, balance, tls, terms });
        }
        section.finish();
    }
    routes
}

/// Without being asked, credentials are said under TLS only.
fn read_tls(section: &Section<'_>, auth: Option<&Credentials>) -> Option<TlsMode> {
    let secret = auth.is_some_and(|auth| !auth.without_tls);
    let tls = section.choice("tls", &TLS_MODES, &[]);
    if secret
        && tls == Some(TlsMode::Disabled)
        && let Some(place) = section.place_of("tls")
    {
        let wrong = Wrong::new("\"disabled\" leaves the route's credentials without TLS, where they are not said");
        section.wrong(place, "tls", wrong.instead("write \"required\", or without_tls = true in auth"));
    }
    tls
}

/// Over a Unix socket nothing is encrypted: nobody can listen in between, and there is no name to vouch for.
fn check_unix_tls(section: &Section<'_>, tls: Option<TlsMode>, auth: Option<&Credentials>) {
    let secret = tls.is_none() && auth.is_some_and(|auth| !auth.without_tls);
    if !secret && !matches!(tls, Some(TlsMode::Required | TlsMode::Verified)) {
        return;
    }
    match section.place_of("tls") {
        Some(place) => {
            let wrong = Wrong::new("asks for TLS, which is not spoken over a Unix socket");
            section.wrong(place, "tls", wrong.instead("leave it out, or give the socket a route of its own"));
        }
        None => {
            let place = section.place_of("auth").unwrap_or(section.place);
            let wrong = Wrong::new("has credentials, which are said under TLS only, and a Unix socket has none");
            section.wrong(place, "auth", wrong.instead("write without_tls = true in auth"));
        }
    }
}

fn read_auth(section: Section<'_>) -> Option<Credentials> {
    let username = section.text("username", "\"user\"", |text| {
        let fits = !text.is_empty() && text.len() <= limits::CREDENTIAL_BYTES_MAX && !text.contains('\0');
        fits.then(|| text.to_owned()).ok_or_else(|| {
            let max = limits::CREDENTIAL_BYTES_MAX;
            Wrong::new("is not a name that can be said").instead(format!("write 1 to {max} octets, none of them NUL"))
        })
    });
    if section.place_of("username").is_none() {
        section.missing("username", "\"user\"");
    }
    let file = section.text("password_file", "\"secret\"", |text| Ok::<_, Wrong>(text.to_owned()));
    if section.place_of("password_file").is_none() {
        section.missing("password_file", "\"secret\"");
    }
    let without_tls = section.boolean("without_tls").unwrap_or(false);
    let password = file.and_then(|file| {
        let path = section.report.base_dir(file.place).join(&file.value);
        let text = read_text(&path, limits::PEM_FILE_BYTES_MAX).unwrap_or_else(|reason| {
            let wrong = Wrong::new(format!("{} cannot be read: {reason}", path.display()));
            section.wrong(
                file.place,
                "password_file",
                wrong.instead("write the path of a file that holds the password"),
            );
            "unread".to_owned()
        });
        // Editors end a file with a line ending.
        let password = text.strip_suffix('\n').unwrap_or(&text);
        let password = password.strip_suffix('\r').unwrap_or(password);
        let fits = !password.is_empty() && password.len() <= limits::CREDENTIAL_BYTES_MAX && !password.contains('\0');
        if !fits {
            let wrong = Wrong::new(format!("{} holds no password that can be said", path.display()));
            let max = limits::CREDENTIAL_BYTES_MAX;
            let instead = format!("write 1 to {max} octets into that file, none of them NUL");
            section.wrong(file.place, "password_file", wrong.instead(instead));
        }
        fits.then(|| password.to_owned())
    });
    section.finish();
    Some(Credentials { username: username?.value, password: password?, without_tls })
}

fn read_targets(section: &Section<'_>, config: &Config, protocol: DeliveryProtocol) -> Vec<RouteTarget> {
    let example = "[\"127.0.0.1:2526\"]";
    let Some(list) = section.list("to", example, target) else {
        if section.place_of("to").is_none() {
            section.missing("to", example);
        }
        return Vec::new();
    };
    let empty = section.node("to").is_some_and(|node| node.value.literal().as_deref() == Some("[]"));
    if empty {
        section.wrong(list.place, "to", Wrong::new("has no target").instead(format!("write to = {example}")));
    }
    if list.value.len() > limits::CONFIG_ROUTE_TARGETS_MAX {
        let wrong = Wrong::new(format!("has more than {} targets", limits::CONFIG_ROUTE_TARGETS_MAX));
        section.wrong(list.place, "to", wrong.instead("write fewer, or a name that has several addresses"));
    }
    for target in &list.value {
        if let RouteTarget::Address(address) = target.value
            && let Err(wrong) = check_reachable(address, config)
        {
            section.wrong(target.place, "to", wrong);
        }
        if protocol == DeliveryProtocol::Lmtp
            && let Err(wrong) = check_lmtp(&target.value)
        {
            section.wrong(target.place, "to", wrong);
        }
        if target.value == RouteTarget::Discard && list.value.len() > 1 {
            let wrong = Wrong::new("\"discard\" stands beside other targets");
            section.wrong(target.place, "to", wrong.instead("write to = [\"discard\"], or leave it out"));
        }
    }
    list.value.into_iter().map(|target| target.value).collect()
}

/// Refuses the engine's own listeners, which would be a mail loop, and addresses that no source can reach.
fn check_reachable(address: SocketAddr, config: &Config) -> Result<(), Wrong> {
    let is_own = |listener: SocketAddr| {
        let same_host = listener.ip() == address.ip() || (listener.ip().is_unspecified() && address.ip().is_loopback());
        listener.port() == address.port() && same_host
    };
    if config.smtp_listeners.iter().any(|listener| is_own(listener.address)) {
        let wrong = Wrong::new(format!("\"{address}\" is this engine's own listener: mail would go round for ever"));
        return Err(wrong.instead("write another address"));
    }
    let fits = |source: &Option<IpAddr>| source.is_none_or(|source| source.is_ipv4() == address.is_ipv4());
    if !config.egress_sources.iter().any(|source| fits(&source.source_address)) {
        let (family, other) = if address.is_ipv4() { ("IPv4", "IPv6") } else { ("IPv6", "IPv4") };
        let wrong = Wrong::new(format!("\"{address}\" is {family}, but every egress source is bound to {other}"));
        return Err(
            wrong.instead(format!("add an [[egress_source]] with an {family} address, or write an {other} target"))
        );
    }
    Ok(())
}

/// RFC 2033 §5: LMTP is never spoken on port 25.
fn check_lmtp(target: &RouteTarget) -> Result<(), Wrong> {
    let port = match target {
        RouteTarget::Address(address) => address.port(),
        RouteTarget::Host { port, .. } => *port,
        RouteTarget::Mx(_) => SMTP_PORT,
        RouteTarget::Unix(_) | RouteTarget::Discard => return Ok(()),
    };
    if port == SMTP_PORT {
        let wrong = Wrong::new(format!("\"{target}\" is port 25, where LMTP is never spoken"));
        return Err(wrong.instead("write the port that the LMTP server listens on, usually 24"));
    }
    Ok(())
}

fn pattern(text: &str) -> Result<DomainPattern, Wrong> {
    if text == "*" {
        return Ok(DomainPattern::Any);
    }
    // An address literal, e.g. `[192.0.2.1]` (RFC 5321 §4.1.3).
    if let Some(literal) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        let lower = literal.to_ascii_lowercase();
        let is_address = match lower.strip_prefix("ipv6:") {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => lower.parse::<std::net::Ipv4Addr>().is_ok(),
        };
        if is_address {
            return Ok(DomainPattern::Exact(format!("[{lower}]")));
        }
    }
    if let Some(rest) = text.strip_prefix("*.") {
        return Ok(DomainPattern::Suffix(format!(".{}", value::dns_name(rest)?)));
    }
    if let Some(rest) = text.strip_prefix('.') {
        value::dns_name(rest)?;
        return Err(Wrong::new(format!("{text:?} begins with a dot")).instead(format!("write \"*{text}\"")));
    }
    if text.contains('*') {
        let wrong = Wrong::new(format!("{text:?} has a \"*\" that is not a whole label in front"));
        return Err(wrong.instead("write a domain, \"*.suffix\" or \"*\""));
    }
    Ok(DomainPattern::Exact(value::dns_name(text)?))
}

fn target(text: &str) -> Result<RouteTarget, Wrong> {
    if text == "discard" {
        return Ok(RouteTarget::Discard);
    }
    if let Some(path) = text.strip_prefix("unix:") {
        let is_plain = path.starts_with('/') && !path.contains(|c: char| c.is_control() || c == ',');
        return UnixPath::new(path).filter(|_| is_plain).map(RouteTarget::Unix).ok_or_else(|| {
            let max = UnixPath::OCTETS_MAX;
            Wrong::new(format!("{text:?} is not the path of a socket"))
                .instead(format!("write \"unix:/path\", absolute, of at most {max} octets, without commas"))
        });
    }
    if let Some(host) = text.strip_prefix("mx:") {
        if host.rsplit_once(':').is_some() {
            let wrong = Wrong::new(format!("{text:?} has a port; hosts found by MX take mail on port 25"));
            return Err(wrong.instead("write \"mx:host\""));
        }
        return Ok(RouteTarget::Mx(value::dns_name(host)?));
    }
    let no_port_0 = |port: u16| {
        if port == 0 {
            let wrong = Wrong::new(format!("{text:?} has port 0, which nothing listens on"));
            return Err(wrong.instead("write the port, usually 25"));
        }
        Ok(port)
    };
    if let Ok(address) = text.parse::<SocketAddr>() {
        if address.ip().is_unspecified() {
            let wrong = Wrong::new(format!("{text:?} is the unspecified address"));
            return Err(wrong.instead("write the address of a host"));
        }
        no_port_0(address.port())?;
        return Ok(RouteTarget::Address(address));
    }
    if let Some((host, port)) = text.rsplit_once(':')
        && let Ok(port) = port.parse::<u16>()
        && !host.contains(':')
    {
        let name = value::dns_name(host)?;
        return Ok(RouteTarget::Host { name, port: no_port_0(port)? });
    }
    if !text.contains(':') && text.parse::<IpAddr>().is_err() && value::dns_name(text).is_ok() {
        return Err(
            Wrong::new(format!("{text:?} has no port")).instead(format!("write \"{text}:25\" or \"mx:{text}\""))
        );
    }
    Err(match value::socket_address(text, 25) {
        Err(wrong) => wrong,
        Ok(_) => Wrong::new(format!("{text:?} is not a target")).instead("write \"host:port\" or \"mx:host\""),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(text: &str, domain: &str) -> bool {
        pattern(text).unwrap().matches(domain)
    }

    #[test]
    fn patterns_fit_whole_labels() {
        assert!(fits("*", "a.test") && fits("*.test", "a.test") && fits("*.test", "b.a.test"));
        assert!(!fits("*.test", "test") && !fits("*.test", "a.xtest") && !fits("*.test", ".test"));
        assert!(fits("Test", "test") && !fits("test", "a.test"));
        assert!(fits("[IPv6:2001:DB8::1]", "[ipv6:2001:db8::1]"));
        assert!(pattern("[300.0.0.1]").is_err() && pattern("[]").is_err());
    }

    /// Whatever fits a pattern fits those that cover it.
    #[test]
    fn covering_patterns_are_wider() {
        for text in ["a.b.test", "*.b.test", "test", "*", "[192.0.2.1]"] {
            for wider in pattern(text).unwrap().covering() {
                let Ok(wider) = pattern(&wider) else { continue };
                for domain in ["a.b.test", "x.b.test", "y.x.b.test", "test", "a.test", "[192.0.2.1]", "example"] {
                    assert!(!fits(text, domain) || wider.matches(domain), "{text} {wider} {domain}");
                }
            }
        }
        assert_eq!(pattern("*.b.test").unwrap().covering(), ["*", "*.b.test", "*.test"]);
    }

    /// What a route does not say, shaping does; but credentials and Unix sockets have their own needs.
    #[test]
    fn a_route_asks_for_what_it_says_or_else_for_what_shaping_says() {
        use TlsMode::{Disabled, Opportunistic, Required, Verified};
        let route = Route::new(DomainPattern::Any, vec![RouteTarget::Mx("mx.example".into())]);
        let (username, password) = ("user".to_owned(), "secret".to_owned());
        let auth = |without_tls| {
            let auth = Some(Credentials { username: username.clone(), password: password.clone(), without_tls });
            Route { terms: Arc::new(Terms { auth, ..Terms::default() }), ..route.clone() }
        };
        let unix = Route { to: vec![RouteTarget::Unix(UnixPath::new("/run/lmtp").unwrap())], ..route.clone() };
        for (shaping, with_secret) in
            [(Opportunistic, Required), (Required, Required), (Verified, Verified), (Disabled, Required)]
        {
            assert_eq!(route.tls_beside(shaping), shaping);
            assert_eq!(auth(true).tls_beside(shaping), shaping);
            assert_eq!(auth(false).tls_beside(shaping), with_secret);
            assert_eq!(unix.tls_beside(shaping), Opportunistic);
            for own in [Opportunistic, Required, Verified, Disabled] {
                assert_eq!(Route { tls: Some(own), ..route.clone() }.tls_beside(shaping), own);
            }
        }
    }
}
