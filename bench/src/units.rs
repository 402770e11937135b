//! Sizes and durations as the command line writes them: `2k`, `10MiB`, `50ms`, `1.5s`.

use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Bytes. `k` and `m` are powers of 1,024, as in Postfix's tools; `kb` and `mb` are the same.
pub fn parse_bytes(text: &str) -> Result<usize> {
    let (number, unit) = split(text)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" | "kib" => 1024.0,
        "m" | "mb" | "mib" => 1024.0 * 1024.0,
        other => bail!("unknown unit {other:?} in {text:?}; write 2048, 2k or 10MiB"),
    };
    Ok((number * factor) as usize)
}

/// A duration; a bare number means seconds.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let (number, unit) = split(text)?;
    let seconds = match unit {
        "" | "s" => number,
        "us" | "µs" => number / 1e6,
        "ms" => number / 1e3,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        other => bail!("unknown unit {other:?} in {text:?}; write 50ms, 5s or 2m"),
    };
    Duration::try_from_secs_f64(seconds).with_context(|| format!("{text:?} is not a duration"))
}

fn split(text: &str) -> Result<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().with_context(|| format!("{text:?} does not begin with a number"))?;
    Ok((number, text[end..].trim()))
}

/// A duration for a reader: three significant digits.
pub fn show_duration(duration: Duration) -> String {
    let ns = duration.as_nanos() as f64;
    match ns {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{:.3} µs", ns / 1e3),
        ns if ns < 1e9 => format!("{:.3} ms", ns / 1e6),
        ns => format!("{:.3} s", ns / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_carry_their_units() {
        assert_eq!(parse_bytes("2048").unwrap(), 2048);
        assert_eq!(parse_bytes("2k").unwrap(), 2048);
        assert_eq!(parse_bytes("1.5 MiB").unwrap(), 1_572_864);
        assert!(parse_bytes("2 parsecs").is_err());
        assert!(parse_bytes("").is_err());
        assert_eq!(parse_duration("5").unwrap(), Duration::from_secs(5));
        assert_eq!(parse_duration("50ms").unwrap(), Duration::from_millis(50));
        assert_eq!(parse_duration("250us").unwrap(), Duration::from_micros(250));
        assert!(parse_duration("5 fortnights").is_err());
    }

    #[test]
    fn durations_are_shown_with_a_fitting_unit() {
        assert_eq!(show_duration(Duration::from_nanos(1_234_567)), "1.235 ms");
        assert_eq!(show_duration(Duration::from_millis(61_500)), "61.500 s");
    }
}
