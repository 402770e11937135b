//! Pairs move to other shards at any time: the control thread's part of it, as `engine/src/pool/pair/moving.rs` has it.
//!
//! What it draws is its own, so that runs without moves stay as they were.

use std::sync::Arc;

use postrider::handover::{RollupKey, ShardMessage};
use postrider::pool::pair::OwnerState;

use crate::canary::Canary;
use crate::clock::{MINUTE, Micros, SECOND};
use crate::mix::Fault;
use crate::random::Random;
use crate::world::{Event, World};

/// What is on its way, and what the control thread has told whom.
#[derive(Debug)]
pub(crate) struct Moves {
    pub(crate) random: Random,
    under_way: Option<Move>,
    /// Those that came to their end.
    pub(crate) done: u64,
    /// When each shard hears the last of what it was told: that keeps its order before a move's messages.
    told_at: Vec<Micros>,
}

#[derive(Debug)]
struct Move {
    rollup: RollupKey,
    to: usize,
    begun: Micros,
}

impl Moves {
    pub(crate) fn new(seed: u64) -> Self {
        Self { random: Random::new(seed.rotate_left(32) ^ 0x6d6f_7665), under_way: None, done: 0, told_at: Vec::new() }
    }

    pub(crate) fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// A life begins.
    pub(crate) fn begin(&mut self, shards: usize) {
        self.under_way = None;
        self.told_at = vec![0; shards];
    }

    /// A shard is told something.
    pub(crate) fn tell(&mut self, shard: usize, at: Micros) {
        self.told_at[shard] = self.told_at[shard].max(at);
    }
}

impl World {
    /// Now and then a roll-up is to move, whatever is under way there.
    pub(crate) fn begin_move(&mut self) {
        let wait = 10 * SECOND + self.moves.random.below(MINUTE);
        // Where windows are looked at, more often than most of them are long.
        self.clock.after(if self.has_rates { wait / 10 } else { wait }, Event::Move);
        let now = self.clock.micros();
        if let Some(Move { begun, rollup, .. }) = &self.moves.under_way {
            assert!(now < begun + MOVE_MAX, "{rollup:?} moves since {begun}: its mail waits");
            return;
        }
        let shards = self.shards.len();
        // What moves has its configuration with it; and all shards are told of one move before there is another.
        if self.reloads.is_under_way() || self.moves.told_at.iter().any(|&at| at > now) {
            return;
        }
        if shards < 2 || self.owners.is_empty() || !self.mix.strikes(Fault::PairMoved, &mut self.moves.random) {
            return;
        }
        let place = self.moves.random.below(self.owners.len() as u64) as usize;
        let ((source, rollup), &from) = self.owners.iter().nth(place).expect("it is one of them");
        let rollup = RollupKey { source: *source, rollup: Arc::clone(rollup) };
        let to = (from + 1 + self.moves.random.below(shards as u64 - 1) as usize) % shards;
        self.moves.under_way = Some(Move { rollup: rollup.clone(), to, begun: now });
        self.mail(from, ShardMessage::Release { rollup });
    }

    /// The owner has let it go, or keeps it.
    pub(crate) fn released(&mut self, rollup: &RollupKey, state: Option<Box<OwnerState>>) {
        let under_way = self.moves.under_way.as_ref().filter(|it| it.rollup == *rollup);
        let to = under_way.expect("nobody lets go what is not to move").to;
        match state {
            None => self.moves.under_way = None,
            Some(_) if self.canary == Some(Canary::ForgottenLimits) => self.took_over(rollup),
            Some(state) => self.tell_in_order(to, ShardMessage::TakeOver(state)),
        }
    }

    pub(crate) fn took_over(&mut self, rollup: &RollupKey) {
        let under_way = self.moves.under_way.take().filter(|it| it.rollup == *rollup);
        let owner = under_way.expect("nobody takes over what does not move").to;
        self.owners.insert((rollup.source, Arc::clone(&rollup.rollup)), owner);
        self.moves.done += 1;
        let told: Vec<usize> = (0..self.shards.len()).filter(|home| !self.is_untold(*home)).collect();
        for shard in told {
            self.tell_in_order(shard, ShardMessage::Moved { rollup: rollup.clone(), owner });
        }
    }

    fn is_untold(&self, home: usize) -> bool {
        self.canary == Some(Canary::UntoldHome) && home == self.shards.len() - 1
    }

    /// A message to a home that hears nothing of moves: what it would have answered.
    pub(crate) fn forged_answer(&self, to: usize, message: &ShardMessage) -> Option<(usize, ShardMessage)> {
        let ShardMessage::Withdraw { owner, number, .. } = *message else { return None };
        self.is_untold(to).then_some((owner, ShardMessage::Withdrawn { home: to, number }))
    }

    /// Behind all that the control thread has told the shard before.
    fn tell_in_order(&mut self, to: usize, message: ShardMessage) {
        let wait = 20 + self.moves.random.below(500);
        let at = (self.clock.micros() + wait).max(self.moves.told_at[to] + 1);
        self.moves.tell(to, at);
        self.clock.at(at, Event::Answer { to, message: Box::new(message) });
    }
}

/// Three seconds of patience, and shards that stand still or hear late meanwhile.
const MOVE_MAX: Micros = 3 * MINUTE;
