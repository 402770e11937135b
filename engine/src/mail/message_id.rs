//! Message identifiers that we add where a message has none (RFC 5322 §3.6.4).

/// A `msg-id` with its angle brackets: the time makes it unique over restarts, `unique` within a millisecond.
///
/// `domain` is our host name. `unique` must not be worth keeping secret.
pub fn generate(wall_ms: u64, unique: u64, domain: &str) -> String {
    format!("<{wall_ms:x}.{unique:016x}@{domain}>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_dot_atom_on_both_sides() {
        assert_eq!(generate(1_764_547_200_000, 0xbeef, "mta.example"), "<19ad7358400.000000000000beef@mta.example>");
        assert_ne!(generate(1, 2, "a.example"), generate(2, 1, "a.example"));
    }
}
