//! Which roll-up should move from a busy shard to one that is less so.
//!
//! A pure policy: it is told how busy the shards were since the last look, asks one that stayed busy what it carries,
//! and names the roll-up that halves the difference best. What a shard does for a roll-up is taken to be its part of
//! the transactions; so what else keeps a shard busy, as accepting mail does, makes it move less, never more.
//!
//! Nothing moves back and forth: a shard has to stay busy, and another clearly less so, over some looks; a move must
//! take a good part of the difference away; and what has moved, or could not, stays for some minutes.
//!
//! Order of calls: [`Balance::observe`] at each look; where it names shards, [`Balance::choose`]; [`Balance::settle`]
//! when the move is over.

use std::time::Duration;

use ahash::HashMap;

use crate::handover::RollupKey;
use crate::limits::{MOVE_LOOKS, MOVE_STAY};

/// From where to where something should move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Uneven {
    pub from: usize,
    pub to: usize,
    /// How busy the first is, and how much less the other.
    busy: f64,
    difference: f64,
}

#[derive(Debug)]
pub struct Balance {
    shards: Vec<Observed>,
    /// Until when what has moved stays where it is.
    stays: HashMap<RollupKey, Duration>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Observed {
    /// Looks, one after the other, at which it was busy and another clearly less so.
    looks: u32,
    /// Averaged over as many.
    busy: f64,
}

impl Balance {
    pub fn new(shards: usize) -> Self {
        Self { shards: vec![Observed::default(); shards], stays: HashMap::default() }
    }

    /// How busy each shard was since the last look: parts of one core.
    pub fn observe(&mut self, busy: &[f64]) -> Option<Uneven> {
        assert_eq!(busy.len(), self.shards.len(), "each shard is looked at");
        let least = busy.iter().copied().fold(f64::INFINITY, f64::min);
        for (shard, &busy) in self.shards.iter_mut().zip(busy) {
            shard.busy += (busy - shard.busy) / f64::from(MOVE_LOOKS);
            let stays = busy >= BUSY && busy - least >= DIFFERENCE;
            shard.looks = if stays { shard.looks + 1 } else { 0 };
        }
        let by_load = |a: &(usize, &Observed), b: &(usize, &Observed)| a.1.busy.total_cmp(&b.1.busy);
        let stayed = self.shards.iter().enumerate().filter(|(_, shard)| shard.looks >= MOVE_LOOKS);
        let (from, most) = stayed.max_by(by_load)?;
        let (to, least) = self.shards.iter().enumerate().min_by(by_load)?;
        let difference = most.busy - least.busy;
        (difference >= DIFFERENCE).then_some(Uneven { from, to, busy: most.busy, difference })
    }

    /// The roll-up that should move, of those that the busy shard carries, each with its transactions a second.
    pub fn choose(&mut self, now: Duration, uneven: Uneven, carried: &[(RollupKey, f64)]) -> Option<RollupKey> {
        self.stays.retain(|_, until| *until > now);
        let total: f64 = carried.iter().map(|(_, carried)| carried).sum();
        // What is all that a shard has would only make the other one busy.
        if carried.len() < 2 || total <= 0.0 {
            return None;
        }
        let left = |carried: f64| (uneven.difference - 2.0 * uneven.busy * carried / total).abs();
        let may_move = carried.iter().filter(|(rollup, _)| !self.stays.contains_key(rollup));
        let best = may_move.min_by(|(a, a_carried), (b, b_carried)| {
            left(*a_carried).total_cmp(&left(*b_carried)).then_with(|| a.cmp(b))
        });
        let (rollup, carried) = best?;
        (left(*carried) <= uneven.difference * LEFT_MAX).then(|| rollup.clone())
    }

    /// A move is over, done or not: it stays, and the shards are looked at anew.
    pub fn settle(&mut self, now: Duration, rollup: RollupKey) {
        self.stays.insert(rollup, now + MOVE_STAY);
        self.shards.iter_mut().for_each(|shard| shard.looks = 0);
    }
}

/// From here on a shard is busy, and so much less so is clearly less: parts of one core.
const BUSY: f64 = 0.6;
const DIFFERENCE: f64 = 0.25;

/// The part of the difference that a move may leave at most.
const LEFT_MAX: f64 = 0.7;

#[cfg(test)]
mod tests {
    use super::*;

    fn rollup(name: &str) -> RollupKey {
        RollupKey { source: 0, rollup: name.into() }
    }

    fn carried(all: &[(&str, f64)]) -> Vec<(RollupKey, f64)> {
        all.iter().map(|&(name, carried)| (rollup(name), carried)).collect()
    }

    /// What comes of so many equal looks.
    fn looks(balance: &mut Balance, count: u32, busy: &[f64]) -> Option<Uneven> {
        (0..count).map(|_| balance.observe(busy)).last().flatten()
    }

    fn uneven(busy: &[f64]) -> (Balance, Uneven) {
        let mut balance = Balance::new(busy.len());
        // Averages are nearly there.
        let uneven = looks(&mut balance, 8 * MOVE_LOOKS, busy).expect("it stayed uneven");
        (balance, uneven)
    }

    #[test]
    fn a_shard_must_stay_busy_and_another_clearly_less_so() {
        let mut balance = Balance::new(3);
        assert_eq!(looks(&mut balance, MOVE_LOOKS - 1, &[0.2, 0.95, 0.5]), None);
        assert_eq!(balance.observe(&[0.2, 0.3, 0.5]), None, "it did not stay");
        assert_eq!(looks(&mut balance, MOVE_LOOKS - 1, &[0.2, 0.95, 0.5]), None);
        let found = balance.observe(&[0.2, 0.95, 0.5]).expect("now it did");
        assert_eq!((found.from, found.to), (1, 0));
        for even in [[0.5, 0.1, 0.1], [0.9, 0.8, 0.7], [0.0, 0.0, 0.0]] {
            assert_eq!(looks(&mut Balance::new(3), 8 * MOVE_LOOKS, &even), None, "{even:?}");
        }
    }

    #[test]
    fn the_roll_up_that_halves_the_difference_moves() {
        let (mut balance, found) = uneven(&[1.0, 0.2]);
        let all = carried(&[("half", 500.0), ("much", 400.0), ("some", 60.0), ("little", 40.0)]);
        assert_eq!(balance.choose(Duration::ZERO, found, &all), Some(rollup("much")));
        // 0.9 of it would leave the other shard as busy.
        let all = carried(&[("most", 900.0), ("little", 100.0)]);
        assert_eq!(balance.choose(Duration::ZERO, found, &all), None, "too much, or too little");
    }

    #[test]
    fn what_is_all_that_a_shard_has_stays() {
        let (mut balance, found) = uneven(&[1.0, 0.0]);
        assert_eq!(balance.choose(Duration::ZERO, found, &carried(&[("all", 900.0)])), None);
        assert_eq!(balance.choose(Duration::ZERO, found, &[]), None);
    }

    #[test]
    fn what_has_moved_stays_for_some_minutes() {
        let (mut balance, found) = uneven(&[1.0, 0.1]);
        let all = carried(&[("a", 500.0), ("b", 500.0)]);
        assert_eq!(balance.choose(Duration::ZERO, found, &all), Some(rollup("a")));
        balance.settle(Duration::ZERO, rollup("a"));
        assert_eq!(looks(&mut balance, MOVE_LOOKS - 1, &[0.1, 1.0]), None, "looked at anew");
        assert!(balance.observe(&[0.1, 1.0]).is_none_or(|found| found.from == 1), "and not the other way at once");
        assert_eq!(balance.choose(Duration::from_secs(1), found, &all), Some(rollup("b")));
        assert_eq!(balance.choose(MOVE_STAY, found, &all), Some(rollup("a")), "for that long");
    }
}
