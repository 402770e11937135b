//! What stands inside the strings of a configuration: durations, sizes, domain names, networks, addresses.
//!
//! Every parser says what is wrong and, where it can guess it, what to write instead. A bare number never passes for a
//! duration or a size: `60` meant seconds in one mail server and minutes in another.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::error::Wrong;

const DURATION_UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

/// A whole number and a unit: `250ms`, `60s`, `20m`, `4h`, `5d`.
/// `example` is one of those, for an answer to a text without a unit.
pub(super) fn duration(text: &str, example: &str) -> Result<Duration, Wrong> {
    let for_example = format!("write for example \"{example}\" (units: ms, s, m, h, d)");
    let milliseconds = with_unit(text, &DURATION_UNITS, "a duration", &for_example, |unit| {
        Some(match unit.to_ascii_lowercase().trim_end_matches('s') {
            "sec" | "second" => "s",
            "min" | "minute" => "m",
            "hr" | "hour" => "h",
            "day" => "d",
            _ => return None,
        })
    })?;
    Ok(Duration::from_millis(milliseconds))
}

/// A whole number of bytes and a unit: `50MiB`, `1GB`.
pub(super) fn size(text: &str, example: &str) -> Result<u64, Wrong> {
    let for_example = format!("write for example \"{example}\" (units: B, KiB, MiB, GiB, TiB, kB, MB, GB, TB)");
    with_unit(text, &SIZE_UNITS, "a size", &for_example, |unit| {
        Some(match unit.to_ascii_lowercase().as_str() {
            "k" | "kib" | "kb" => "KiB",
            "m" | "mib" | "mb" => "MiB",
            "g" | "gib" | "gb" => "GiB",
            "t" | "tib" | "tb" => "TiB",
            "byte" | "bytes" => "B",
            _ => return None,
        })
    })
}

fn with_unit(
    text: &str,
    units: &[(&str, u64)],
    noun: &str,
    for_example: &str,
    meant: impl Fn(&str) -> Option<&'static str>,
) -> Result<u64, Wrong> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(Wrong::new(format!("{text:?} is not {noun}")).instead(for_example));
    }
    if unit.is_empty() {
        return Err(Wrong::new(format!("{text:?} has no unit")).instead(for_example));
    }
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else {
        let instead =
            meant(unit.trim()).map_or_else(|| for_example.to_owned(), |unit| format!("write \"{number}{unit}\""));
        return Err(Wrong::new(format!("{text:?} has no unit that is known here")).instead(instead));
    };
    let product = number.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor));
    product.ok_or_else(|| Wrong::new(format!("{text:?} is too large")).instead("write less"))
}

/// The shortest exact way to write a duration: `20m`, `2h20m`, `1d4h`.
pub(super) fn duration_text(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, milliseconds) in DURATION_UNITS {
        if rest >= milliseconds {
            text.push_str(&format!("{}{unit}", rest / milliseconds));
            rest %= milliseconds;
        }
    }
    if text.is_empty() { "0s".into() } else { text }
}

/// The shortest exact way to write a size in binary units.
pub(super) fn size_text(bytes: u64) -> String {
    let fits = SIZE_UNITS.iter().take(4).find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor));
    fits.map_or_else(|| format!("{bytes}B"), |(unit, factor)| format!("{}{unit}", bytes / factor))
}

/// A host or domain name, made lower-case (RFC 5321 §4.1.2 "Domain", RFC 1035 §2.3.4 lengths). Not an address literal.
pub(super) fn domain(text: &str) -> Result<String, Wrong> {
    let not = |why: &str| {
        let wrong = Wrong::new(format!("{text:?} is not a domain name: {why}"));
        Err(wrong.instead("write letters, digits and hyphens between dots, as in \"mta.example.com\""))
    };
    if let Some(unrooted) = text.strip_suffix('.')
        && domain(unrooted).is_ok()
    {
        return not("it ends with a dot").map_err(|wrong| wrong.instead(format!("write {unrooted:?}")));
    }
    if text.is_empty() {
        return not("it is empty");
    }
    if text.len() > 253 {
        return not("it is longer than 253 octets");
    }
    if !text.is_ascii() {
        return not("it has letters beyond ASCII").map_err(|wrong| wrong.instead("write its \"xn--…\" form"));
    }
    if text.parse::<IpAddr>().is_ok() {
        return not("it is an IP address").map_err(|wrong| wrong.instead("write a name"));
    }
    for label in text.split('.') {
        if label.is_empty() {
            return not("a label is empty");
        }
        if label.len() > 63 {
            return not("a label is longer than 63 octets");
        }
        if label.starts_with('-') || label.ends_with('-') {
            return not("a label begins or ends with a hyphen");
        }
        if let Some(odd) = label.chars().find(|c| !c.is_ascii_alphanumeric() && *c != '-') {
            return not(&format!("it contains {odd:?}"));
        }
    }
    Ok(text.to_ascii_lowercase())
}

/// Like [`domain`], with underscores: DNS names of selectors and of some recipients' domains have them.
pub(super) fn dns_name(text: &str) -> Result<String, Wrong> {
    match domain(&text.replace('_', "x")) {
        Ok(_) => Ok(text.to_ascii_lowercase()),
        Err(_) => domain(text),
    }
}

/// `10.0.0.0/8`, or an address alone, which means that host.
pub(super) fn network(text: &str) -> Result<IpNet, Wrong> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.into());
    }
    let Ok(network) = text.parse::<IpNet>() else {
        let wrong = Wrong::new(format!("{text:?} is neither an IP address nor a network"));
        return Err(wrong.instead("write for example \"10.0.0.0/8\", \"192.0.2.1\" or \"2001:db8::/32\""));
    };
    if network.trunc() != network {
        let wrong = Wrong::new(format!("{text:?} has bits set beyond its prefix of {}", network.prefix_len()));
        return Err(wrong.instead(format!("write \"{}\" or \"{}\"", network.trunc(), network.addr())));
    }
    Ok(network)
}

/// `127.0.0.1:25` or `[::1]:25`; `port` is what an answer about a missing port suggests.
pub(super) fn socket_address(text: &str, port: u16) -> Result<SocketAddr, Wrong> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address);
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        let with_port = SocketAddr::new(address, port);
        // `::1:25` is an IPv6 address, but was hardly meant as one.
        let meant = text.rsplit_once(':').and_then(|(host, port)| Some((host.parse().ok()?, port.parse().ok()?)));
        let instead = match meant {
            Some((host, port)) => format!("write \"{}\" or \"{with_port}\"", SocketAddr::new(IpAddr::V6(host), port)),
            None => format!("write \"{with_port}\""),
        };
        return Err(Wrong::new(format!("{text:?} has no port")).instead(instead));
    }
    if let Some((host, port)) = text.rsplit_once(':')
        && port.parse::<u16>().is_ok()
    {
        if let Ok(address) = host.parse::<Ipv6Addr>() {
            let wrong = Wrong::new(format!("{text:?} does not tell where the address ends and the port begins"));
            return Err(wrong.instead(format!("write \"[{address}]:{port}\"")));
        }
        let address = match host {
            "" | "*" => Some("0.0.0.0"),
            "localhost" => Some("127.0.0.1"),
            _ => None,
        };
        let example = address.unwrap_or("192.0.2.1");
        let how = if address.is_some() { "write" } else { "write for example" };
        let wrong = Wrong::new(format!("{text:?} has no IP address before the port"));
        return Err(wrong.instead(format!("{how} \"{example}:{port}\"")));
    }
    let wrong = Wrong::new(format!("{text:?} is not an IP address with a port"));
    Err(wrong.instead(format!("write for example \"127.0.0.1:{port}\" or \"[::1]:{port}\"")))
}

/// `"a", "b" or "c"`.
pub(super) fn any_of<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let mut words: Vec<String> = words.into_iter().map(|word| format!("{word:?}")).collect();
    let last = words.pop().unwrap_or_default();
    if words.is_empty() { last } else { format!("{} or {last}", words.join(", ")) }
}

/// The candidate that `text` was probably meant to be: at most two edits, or a third of a short word, away.
pub(super) fn did_you_mean<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let text = text.to_ascii_lowercase().replace('-', "_");
    let scored = candidates.into_iter().map(|candidate| (edit_distance(&text, candidate), candidate));
    let (distance, candidate) = scored.min()?;
    let longest = text.chars().count().max(candidate.chars().count());
    (distance <= 2.min(longest.div_ceil(3))).then_some(candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let swapped = if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    rows[i - 2][j - 2] + 1
                } else {
                    usize::MAX
                };
                replaced.min(swapped).min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1)
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong<T: std::fmt::Debug>(result: Result<T, Wrong>) -> String {
        let wrong = result.unwrap_err();
        format!("{}; {}", wrong.what, wrong.instead.unwrap_or_default())
    }

    #[test]
    fn durations_carry_units() {
        for (text, milliseconds) in
            [("250ms", 250), ("60s", 60_000), ("20m", 1_200_000), ("4h", 14_400_000), ("5d", 432_000_000), ("0s", 0)]
        {
            assert_eq!(duration(text, "20m"), Ok(Duration::from_millis(milliseconds)));
        }
        let units = "write for example \"20m\" (units: ms, s, m, h, d)";
        assert_eq!(wrong(duration("20", "20m")), format!("\"20\" has no unit; {units}"));
        assert_eq!(wrong(duration("soon", "20m")), format!("\"soon\" is not a duration; {units}"));
        assert_eq!(wrong(duration("-5s", "20m")), format!("\"-5s\" is not a duration; {units}"));
        assert_eq!(wrong(duration("20min", "20m")), "\"20min\" has no unit that is known here; write \"20m\"");
        assert_eq!(wrong(duration("3 hours", "20m")), "\"3 hours\" has no unit that is known here; write \"3h\"");
        assert_eq!(wrong(duration("99999999999999999d", "20m")), "\"99999999999999999d\" is too large; write less");
    }

    #[test]
    fn sizes_carry_units() {
        for (text, bytes) in
            [("0B", 0), ("1kB", 1_000), ("1KiB", 1_024), ("50GiB", 50 << 30), ("2TB", 2_000_000_000_000)]
        {
            assert_eq!(size(text, "50MiB"), Ok(bytes));
        }
        assert_eq!(wrong(size("50G", "50MiB")), "\"50G\" has no unit that is known here; write \"50GiB\"");
        assert_eq!(
            wrong(size("50", "50MiB")),
            "\"50\" has no unit; write for example \"50MiB\" (units: B, KiB, MiB, GiB, TiB, kB, MB, GB, TB)"
        );
        assert_eq!(wrong(size("99999999TiB", "50MiB")), "\"99999999TiB\" is too large; write less");
    }

    #[test]
    fn what_is_written_out_reads_back() {
        for text in ["250ms", "1s", "90m", "36h", "5d"] {
            let exact = duration(text, "20m").unwrap();
            let total: Duration = split_units(&duration_text(exact)).map(|part| duration(part, "20m").unwrap()).sum();
            assert_eq!(total, exact);
        }
        assert_eq!(duration_text(Duration::from_secs(8_400)), "2h20m");
        assert_eq!(duration_text(Duration::ZERO), "0s");
        for text in ["50GiB", "50MiB", "1000B", "3KiB"] {
            assert_eq!(size_text(size(text, "50MiB").unwrap()), text);
        }
    }

    fn split_units(text: &str) -> impl Iterator<Item = &str> {
        let mut rest = text;
        std::iter::from_fn(move || {
            let unit = rest.find(|c: char| c.is_ascii_alphabetic())?;
            let end = rest[unit..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |next| unit + next);
            let (part, after) = rest.split_at(end);
            rest = after;
            Some(part)
        })
    }

    #[test]
    fn domains_follow_rfc_5321_4_1_2() {
        assert_eq!(domain("Mta.Example.COM"), Ok("mta.example.com".into()));
        assert_eq!(domain("localhost"), Ok("localhost".into()));
        assert!(domain(&format!("{}.example", "a".repeat(63))).is_ok());
        let how = "write letters, digits and hyphens between dots, as in \"mta.example.com\"";
        for (text, why) in [
            ("", "it is empty"),
            ("a..b", "a label is empty"),
            ("-a.b", "a label begins or ends with a hyphen"),
            ("a_b.c", "it contains '_'"),
        ] {
            assert_eq!(wrong(domain(text)), format!("{text:?} is not a domain name: {why}; {how}"));
        }
        assert_eq!(wrong(domain("a.b.")), "\"a.b.\" is not a domain name: it ends with a dot; write \"a.b\"");
        assert_eq!(wrong(domain("10.0.0.1")), "\"10.0.0.1\" is not a domain name: it is an IP address; write a name");
        assert_eq!(
            wrong(domain("müller.example")),
            "\"müller.example\" is not a domain name: it has letters beyond ASCII; write its \"xn--…\" form"
        );
        assert!(wrong(domain(&format!("{}.b", "a".repeat(64)))).contains("a label is longer than 63 octets"));
        assert!(wrong(domain(&"a.".repeat(130))).contains("it is longer than 253 octets"));
        assert_eq!(dns_name("S1._Domain"), Ok("s1._domain".into()));
        assert!(dns_name("a b").is_err());
    }

    #[test]
    fn networks_and_addresses() {
        assert_eq!(network("192.0.2.1").unwrap().to_string(), "192.0.2.1/32");
        assert_eq!(network("2001:db8::/32").unwrap().to_string(), "2001:db8::/32");
        assert_eq!(
            wrong(network("10.1.2.3/8")),
            "\"10.1.2.3/8\" has bits set beyond its prefix of 8; write \"10.0.0.0/8\" or \"10.1.2.3\""
        );
        assert!(wrong(network("10.0.0.0/33")).starts_with("\"10.0.0.0/33\" is neither an IP address nor a network"));
        assert_eq!(socket_address("[::1]:25", 25).unwrap().to_string(), "[::1]:25");
        assert_eq!(wrong(socket_address("127.0.0.1", 25)), "\"127.0.0.1\" has no port; write \"127.0.0.1:25\"");
        assert_eq!(wrong(socket_address("::1", 25)), "\"::1\" has no port; write \"[::1]:25\"");
        assert_eq!(
            wrong(socket_address("::1:2525", 25)),
            "\"::1:2525\" has no port; write \"[::1]:2525\" or \"[::1:2525]:25\""
        );
        assert_eq!(
            wrong(socket_address("localhost:2525", 25)),
            "\"localhost:2525\" has no IP address before the port; write \"127.0.0.1:2525\""
        );
        assert_eq!(
            wrong(socket_address("mx.example:25", 25)),
            "\"mx.example:25\" has no IP address before the port; write for example \"192.0.2.1:25\""
        );
        assert_eq!(
            wrong(socket_address("here", 25)),
            "\"here\" is not an IP address with a port; write for example \"127.0.0.1:25\" or \"[::1]:25\""
        );
    }

    #[test]
    fn words_are_joined() {
        assert_eq!(any_of(["a"]), "\"a\"");
        assert_eq!(any_of(["a", "b"]), "\"a\" or \"b\"");
        assert_eq!(any_of(["a", "b", "c"]), "\"a\", \"b\" or \"c\"");
    }

    #[test]
    fn suggestions_are_near() {
        let keys = ["hostname", "shards", "pin", "include"];
        assert_eq!(did_you_mean("hostnmae", keys), Some("hostname"));
        assert_eq!(did_you_mean("host-name", keys), Some("hostname"));
        assert_eq!(did_you_mean("shard", keys), Some("shards"));
        assert_eq!(did_you_mean("pn", keys), Some("pin"));
        assert_eq!(did_you_mean("color", keys), None);
        assert_eq!(did_you_mean("x", []), None);
    }
}
