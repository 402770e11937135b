//! Which source of a pool a message goes by.

use crate::config::EgressPool;

/// The weighted turns of one pool's sources at one home shard.
///
/// Smooth weighted round robin: over any run of as many choices as the weights sum to, each source is chosen exactly
/// its weight's times, and the turns of a heavy source are spread out.
#[derive(Debug)]
pub struct EgressTurns {
    sources: Vec<Turn>,
}

#[derive(Debug)]
struct Turn {
    /// Index into the configuration's egress sources.
    source: usize,
    weight: i64,
    current: i64,
}

impl EgressTurns {
    pub fn new(pool: &EgressPool) -> Self {
        let turn = |&(source, weight): &(usize, u32)| Turn { source, weight: i64::from(weight), current: 0 };
        Self { sources: pool.sources.iter().map(turn).collect() }
    }

    /// The next source among those that `available` admits; what the others would have had is shared by weight.
    pub fn next(&mut self, available: impl Fn(usize) -> bool) -> Option<usize> {
        let mut total = 0;
        let mut best: Option<&mut Turn> = None;
        for turn in self.sources.iter_mut().filter(|turn| available(turn.source)) {
            turn.current += turn.weight;
            total += turn.weight;
            if best.as_ref().is_none_or(|best| turn.current > best.current) {
                best = Some(turn);
            }
        }
        let best = best?;
        best.current -= total;
        Some(best.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns() -> EgressTurns {
        EgressTurns::new(&EgressPool { name: "default".to_owned(), sources: vec![(0, 1), (1, 2), (2, 5)] })
    }

    fn shares(turns: &mut EgressTurns, choices: usize, available: impl Fn(usize) -> bool) -> [usize; 3] {
        let mut shares = [0; 3];
        for _ in 0..choices {
            shares[turns.next(&available).expect("a source is available")] += 1;
        }
        shares
    }

    #[test]
    fn shares_are_the_weights() {
        assert_eq!(shares(&mut turns(), 8000, |_| true), [1000, 2000, 5000]);
    }

    #[test]
    fn the_share_of_a_missing_source_goes_to_the_others_by_weight() {
        let mut turns = turns();
        shares(&mut turns, 1003, |_| true);
        let [a, b, c] = shares(&mut turns, 3000, |source| source != 2);
        assert!(a.abs_diff(1000) <= 2 && b.abs_diff(2000) <= 2 && c == 0, "{a} {b} {c}");
        let [a, b, c] = shares(&mut turns, 8000, |_| true);
        assert!(a.abs_diff(1000) <= 8 && b.abs_diff(2000) <= 8 && c.abs_diff(5000) <= 8, "{a} {b} {c}");
    }

    #[test]
    fn without_a_source_there_is_no_choice() {
        assert_eq!(turns().next(|_| false), None);
    }
}
