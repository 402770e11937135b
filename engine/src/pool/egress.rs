//! Which source of a pool a message goes by, and which sources a domain's mail avoids.

use std::sync::Arc;
use std::time::Duration;

use ahash::HashMap;

use crate::config::EgressPool;
use crate::limits::{SOURCE_AVOIDED, SOURCES_AVOIDED_MAX};

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

    /// Whether the source is of the pool.
    pub fn has(&self, source: usize) -> bool {
        self.sources.iter().any(|turn| turn.source == source)
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

/// The sources that domains' peers refused for the address itself, at one home shard.
///
/// It only turns a choice: a domain that avoids all sources of its pool is sent to by any of them, at its own pace of
/// retries. It is not kept over a restart; the next refusal brings it back.
#[derive(Debug, Default)]
pub struct AvoidedSources {
    until: HashMap<(Arc<str>, usize), Duration>,
}

impl AvoidedSources {
    /// A peer of this domain refused the source's address just now.
    pub fn refused(&mut self, now: Duration, domain: &Arc<str>, source: usize) {
        if self.until.len() >= SOURCES_AVOIDED_MAX {
            self.until.retain(|_, until| *until > now);
        }
        if self.until.len() >= SOURCES_AVOIDED_MAX {
            self.until.clear();
        }
        self.until.insert((Arc::clone(domain), source), now + SOURCE_AVOIDED);
    }

    pub fn avoids(&self, now: Duration, domain: &Arc<str>, source: usize) -> bool {
        // Nearly always there is none.
        !self.until.is_empty() && self.until.get(&(Arc::clone(domain), source)).is_some_and(|until| *until > now)
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
    #[test]
    fn a_source_is_avoided_by_one_domain_for_a_while() {
        let mut avoided = AvoidedSources::default();
        let (a, b): (Arc<str>, Arc<str>) = ("a.example".into(), "b.example".into());
        avoided.refused(Duration::ZERO, &a, 1);
        let last = SOURCE_AVOIDED - Duration::from_millis(1);
        assert!(avoided.avoids(Duration::ZERO, &a, 1) && avoided.avoids(last, &a, 1));
        assert!(!avoided.avoids(Duration::ZERO, &b, 1) && !avoided.avoids(Duration::ZERO, &a, 0));
        assert!(!avoided.avoids(SOURCE_AVOIDED, &a, 1));
    }

    #[test]
    fn refusals_are_remembered_up_to_a_bound() {
        let mut avoided = AvoidedSources::default();
        for number in 0..3 * SOURCES_AVOIDED_MAX {
            avoided.refused(Duration::ZERO, &format!("{number}.example").into(), 0);
            assert!(avoided.until.len() <= SOURCES_AVOIDED_MAX);
        }
        let last = format!("{}.example", 3 * SOURCES_AVOIDED_MAX - 1).into();
        assert!(avoided.avoids(Duration::ZERO, &last, 0));
    }
}
