//! Crash images: at any moment, what may be found when the power has just gone.

use std::collections::BTreeMap;

use postrider_spool::checkpoint_format::{CheckpointBlock, CheckpointHeader};
use postrider_spool::execute;
use postrider_spool::format::{Chain, SegmentBlock, SegmentHeader};
use postrider_spool::limits::BLOCK_BYTES;

use crate::random::Random;
use crate::world::{Past, World};

/// How often which kind of image was looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Images {
    /// All that was not synced is gone.
    pub(crate) losing_all: u64,
    /// Any part of it is there.
    pub(crate) losing_some: u64,
    /// Of these, the engine ran on until all its mail had come to an end.
    pub(crate) finished: u64,
    pub(crate) crashes: u64,
    pub(crate) kills: u64,
}

impl World {
    /// Executes some of the operations that are out, in any order.
    pub(crate) fn execute(&mut self) {
        for _ in 0..1 + self.random.below(3) {
            if self.operations.is_empty() {
                return;
            }
            let place = self.random.below(self.operations.len() as u64) as usize;
            let (shard, log, operation) = self.operations.swap_remove(place);
            self.completions.push((shard, log, execute(operation)));
        }
    }

    /// The same, with looks at what would be found if the power went just before, and in the midst of it.
    pub(crate) fn execute_under_looks(&mut self, looks: u64, images: &mut Images) {
        let losing_all = self.disk.crash(0);
        images.losing_all += 1;
        self.look_at(losing_all, images);
        self.disk.hold_syncs(true);
        self.execute();
        for _ in 0..looks {
            images.losing_some += 1;
            let image = self.disk.crash(self.random.below(1 << 30));
            self.look_at(image, images);
        }
        self.disk.hold_syncs(false);
    }

    fn look_at(&mut self, image: postrider_spool::sim::SimDisk, images: &mut Images) {
        let past = self.past.clone();
        let (seed, shards) = (self.random.below(1 << 30), 1 + self.random.below(3) as usize);
        let goes_on = self.random.one_in(GOES_ON_ONE_IN);
        let world = Self::start(past, image, seed, shards);
        if goes_on {
            images.finished += 1;
            world.finish();
        }
    }

    /// The power goes in the midst of something, or only the process dies; a start follows at once or after a while.
    pub(crate) fn restart(mut self, images: &mut Images) -> Self {
        let is_kill = self.random.one_in(4);
        self.disk.hold_syncs(true);
        if self.random.one_in(2) {
            self.execute();
        }
        let (seed, shards) = (self.random.below(1 << 30), 1 + self.random.below(3) as usize);
        let next = if is_kill { self.disk.restart() } else { self.disk.crash(seed) };
        images.kills += u64::from(is_kill);
        images.crashes += u64::from(!is_kill);
        let mut random = Random::new(seed);
        self.survey();
        let Self { mut past, .. } = self;
        pause(&mut past, &mut random);
        Self::start(past, next, seed, shards)
    }
}

impl World {
    /// Counts what the spool has made use of.
    fn survey(&mut self) {
        let mut newest = BTreeMap::new();
        for path in self.disk.paths() {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap();
            let bytes = self.disk.bytes(&path);
            let block = &bytes[..bytes.len().min(BLOCK_BYTES as usize)];
            if name.starts_with("checkpoint-") {
                let is_finished = matches!(CheckpointHeader::decode(block), CheckpointBlock::Header(_));
                self.past.seen.checkpoints += u64::from(is_finished);
            } else if name.starts_with("segment-")
                && let SegmentBlock::Header(header) = SegmentHeader::decode(block)
            {
                self.past.seen.copies += u64::from(header.chain == Chain::Copies);
                let (number, files) = newest.entry(header.log).or_insert((0, 0));
                *number = header.number.max(*number);
                *files += 1;
            }
        }
        self.past.seen.reused += newest.values().map(|(number, files)| number - files).sum::<u64>();
    }
}

fn pause(past: &mut Past, random: &mut Random) {
    past.wall_ms += match random.below(8) {
        0..2 => random.below(14_400_000),
        2..4 => random.below(10_000),
        _ => 0,
    };
}

/// So many images are run on until all their mail has come to an end.
const GOES_ON_ONE_IN: u64 = 60;
