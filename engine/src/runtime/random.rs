//! Randomness that must not be guessed. Shards have a seeded generator of their own, so that a seed replays them.

/// A number nobody can guess.
pub(crate) fn os_random_u64() -> u64 {
    let mut octets = [0; 8];
    aws_lc_rs::rand::fill(&mut octets).expect("the operating system gives random octets");
    u64::from_le_bytes(octets)
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_two_are_alike() {
        assert_ne!(super::os_random_u64(), super::os_random_u64());
    }
}
