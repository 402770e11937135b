//! Which shard owns what, and what moves from a busy shard to another.
//!
//! The control thread asks it, and carries out what it says. `pool/balance.rs` decides what moves, and
//! `pool/pair/moving.rs` has the steps of a move.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use crate::handover::{PairKey, RollupKey, ShardMessage};
use crate::limits::PAIRS_MAX;
use crate::pool::balance::{Balance, Uneven};
use crate::pool::pair::OwnerState;

pub(crate) struct Directory {
    shards: usize,
    /// What a provider's sites have in common is kept by one owner.
    owners: HashMap<RollupKey, usize>,
    next: usize,
    balance: Balance,
    /// When it was looked last, and the time that each shard's thread had taken by then.
    looked: Option<(Duration, Vec<Duration>)>,
    /// A shard was asked what it carries.
    asked: Option<Uneven>,
    moving: Option<Moving>,
}

#[derive(Debug)]
struct Moving {
    rollup: RollupKey,
    from: usize,
    to: usize,
}

/// What a shard is to be told.
pub(crate) type Told = (usize, ShardMessage);

impl Directory {
    pub(crate) fn new(shards: usize) -> Self {
        Self {
            shards,
            owners: HashMap::new(),
            next: 0,
            balance: Balance::new(shards),
            looked: None,
            asked: None,
            moving: None,
        }
    }

    /// The owner of a pair's source and roll-up; new ones are dealt out in turn. While they move it is the old one.
    pub(crate) fn owner(&mut self, pair: &PairKey) -> usize {
        let key = pair.rollup_key();
        if let Some(&owner) = self.owners.get(&key) {
            return owner;
        }
        if self.owners.len() >= PAIRS_MAX {
            // Still one owner a pair, whoever asks: the name alone decides.
            let sum = pair.rollup.bytes().fold(pair.source, |sum, byte| sum.wrapping_mul(31) + usize::from(byte));
            return sum % self.shards;
        }
        let owner = self.next;
        self.next = (owner + 1) % self.shards;
        self.owners.insert(key, owner);
        owner
    }

    /// Whether a roll-up is on its way from one shard to another.
    pub(crate) fn is_moving(&self) -> bool {
        self.moving.is_some()
    }

    /// Looks whether a shard has stayed busy while another has not: it is asked what it carries.
    pub(crate) fn look(&mut self, now: Duration, threads: &ThreadTimes) -> Option<Told> {
        let taken: Option<Vec<Duration>> = (0..self.shards).map(|shard| threads.taken(shard)).collect();
        let (before, then) = self.looked.replace((now, taken?))?;
        let passed = now.saturating_sub(before).as_secs_f64();
        let (_, taken) = self.looked.as_ref()?;
        let share = |(now, then): (&Duration, &Duration)| now.saturating_sub(*then).as_secs_f64() / passed;
        let busy: Vec<f64> = taken.iter().zip(&then).map(share).collect();
        if passed <= 0.0 || self.moving.is_some() || self.asked.is_some() {
            return None;
        }
        let uneven = self.balance.observe(&busy)?;
        self.asked = Some(uneven);
        Some((uneven.from, ShardMessage::AskCarried))
    }

    /// What the shard that was asked carries. It may have to let some of it go.
    pub(crate) fn handle_carried(&mut self, now: Duration, carried: &[(RollupKey, f64)]) -> Option<Told> {
        let uneven = self.asked.take()?;
        let rollup = self.balance.choose(now, uneven, carried)?;
        self.begin(rollup, uneven.to)
    }

    /// The owner is to let a roll-up go, one at a time. What the directory does not name can't move.
    fn begin(&mut self, rollup: RollupKey, to: usize) -> Option<Told> {
        let from = *self.owners.get(&rollup)?;
        if self.moving.is_some() || from == to {
            return None;
        }
        self.moving = Some(Moving { rollup: rollup.clone(), from, to });
        Some((from, ShardMessage::Release { rollup }))
    }

    /// The owner has let it go, and another takes over; or it keeps it.
    pub(crate) fn handle_released(
        &mut self,
        now: Duration,
        rollup: RollupKey,
        state: Option<Box<OwnerState>>,
    ) -> Option<Told> {
        let moving = self.moving.as_ref().filter(|moving| moving.rollup == rollup);
        let &Moving { from, to, .. } = moving.expect("nobody lets go what is not to move");
        let name = &*rollup.rollup;
        match state {
            Some(state) => Some((to, ShardMessage::TakeOver(state))),
            None => {
                tracing::info!(
                    source = rollup.source,
                    rollup = name,
                    from,
                    to,
                    "a busy shard keeps what it was to give"
                );
                self.moving = None;
                self.balance.settle(now, rollup);
                None
            }
        }
    }

    /// Another shard has taken over: every home is to be told what this returns.
    pub(crate) fn handle_took_over(&mut self, now: Duration, rollup: RollupKey) -> (RollupKey, usize) {
        let moving = self.moving.take().filter(|moving| moving.rollup == rollup);
        let Moving { from, to, .. } = moving.expect("nobody takes over what does not move");
        let name = &*rollup.rollup;
        tracing::info!(source = rollup.source, rollup = name, from, to, "a busy shard gave connections to another");
        self.owners.insert(rollup.clone(), to);
        self.balance.settle(now, rollup.clone());
        (rollup, to)
    }
}

/// The processor's time that each shard's thread has taken, as the kernel counts it: it costs the shards nothing.
#[derive(Debug)]
pub(crate) struct ThreadTimes(Vec<OnceLock<PathBuf>>);

impl ThreadTimes {
    pub(crate) fn new(shards: usize) -> Self {
        Self((0..shards).map(|_| OnceLock::new()).collect())
    }

    /// To be called on the shard's thread.
    pub(crate) fn register(&self, shard: usize) {
        if let Ok(thread) = fs::read_link("/proc/thread-self") {
            let _ = self.0[shard].set(PathBuf::from("/proc").join(thread).join("schedstat"));
        }
    }

    /// None where there is no such file: then nothing moves.
    fn taken(&self, shard: usize) -> Option<Duration> {
        let text = fs::read_to_string(self.0[shard].get()?).ok()?;
        Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str) -> PairKey {
        PairKey { source: 0, rollup: name.into(), site: name.into() }
    }

    #[test]
    fn new_pairs_are_dealt_out_in_turn_and_keep_their_owner() {
        let mut directory = Directory::new(2);
        let owners: Vec<usize> = ["a", "b", "a", "c", "b"].iter().map(|name| directory.owner(&pair(name))).collect();
        assert_eq!(owners, [0, 1, 0, 0, 1]);
    }

    #[test]
    fn the_directory_names_the_new_owner_once_it_has_taken_over() {
        let (mut directory, now) = (Directory::new(2), Duration::ZERO);
        let (a, b) = (pair("a"), pair("b"));
        assert_eq!((directory.owner(&a), directory.owner(&b)), (0, 1));
        assert!(directory.begin(pair("unknown").rollup_key(), 1).is_none());
        assert!(directory.begin(a.rollup_key(), 0).is_none(), "it is there");
        let told = directory.begin(a.rollup_key(), 1);
        assert!(matches!(told, Some((0, ShardMessage::Release { .. }))), "{told:?}");
        assert!(directory.begin(b.rollup_key(), 0).is_none(), "one at a time");
        assert!(directory.handle_released(now, a.rollup_key(), None).is_none());
        assert!(directory.begin(b.rollup_key(), 0).is_some(), "the other was given up");
        assert_eq!(directory.owner(&b), 1, "not yet");
        assert_eq!(directory.handle_took_over(now, b.rollup_key()), (b.rollup_key(), 0));
        assert_eq!((directory.owner(&a), directory.owner(&b)), (0, 0));
    }

    /// Nothing that a busy shard carries would do: another time something may.
    #[test]
    fn a_shard_that_has_nothing_to_give_is_asked_again() {
        let (mut directory, now) = (Directory::new(2), Duration::ZERO);
        let busy = [1.0, 0.0];
        for _ in 0..2 {
            let uneven = (0..100).find_map(|_| directory.balance.observe(&busy)).expect("one shard is busy");
            directory.asked = Some(uneven);
            assert!(directory.handle_carried(now, &[]).is_none());
            assert!(directory.asked.is_none(), "it has answered");
        }
    }

    #[test]
    fn the_kernel_tells_what_a_thread_has_taken() {
        let times = ThreadTimes::new(2);
        times.register(0);
        let before = times.taken(0).expect("Linux counts it");
        let mut sum = 0_u64;
        while times.taken(0) < Some(before + Duration::from_millis(5)) {
            sum = (0..10_000).fold(sum, u64::wrapping_add);
        }
        assert!(times.taken(1).is_none(), "of one that is not there it tells nothing");
    }
}
