//! What copying costs: a log that is nearly full copies for what it wins, and comes to rest.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::record::Answer;
use postrider_spool::sim::{Faults, SimDisk};
use postrider_spool::{
    AppendError, Envelope, Fate, Log, MessageId, Outcome, Recipient, RecipientResult, RecoverOptions, Sequence, Spool,
    SpoolOptions, execute,
};

struct Rig {
    _spool: Spool,
    disk: SimDisk,
    log: Log,
    live: Vec<MessageId>,
    now: Duration,
    random: u64,
}

impl Rig {
    fn new(seed: u64, segment_bytes: u64) -> Self {
        let disk = SimDisk::new(seed);
        let options = SpoolOptions { segment_bytes, max_bytes: SEGMENTS * segment_bytes, ..SpoolOptions::default() };
        let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
        let directory = spool.assign(1).unwrap().remove(0).remove(0);
        let recover = RecoverOptions { seed, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
        let log = Log::recover(directory, recover, &mut |_| {}).unwrap();
        Self { _spool: spool, disk, log, live: Vec::new(), now: Duration::ZERO, random: seed }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % bound
    }

    fn settle(&mut self) {
        self.now += Duration::from_millis(5);
        let mut left = 100_000;
        while let Some(operation) = self.log.poll_operation(self.now, &mut ()) {
            self.log.handle_completion(self.now, execute(operation));
            left -= 1;
            assert!(left > 0, "it goes on and on: {:?}", self.log.statistics());
        }
    }

    /// Mail until no more is taken.
    fn fill(&mut self, bytes_max: u64) {
        let mut refused = 0;
        while refused < 40 {
            let envelope =
                Envelope { recipients: vec![Recipient { address: "b@example.net".into() }], ..Envelope::default() };
            let length = self.below(bytes_max) as usize;
            match self.log.append_message(&envelope, b"", &vec![b'x'; length]) {
                Ok((id, _)) => {
                    self.live.push(id);
                    refused = 0;
                    if self.below(3) == 0 {
                        self.settle();
                    }
                }
                Err(AppendError::Full(_)) => {
                    refused += 1;
                    self.settle();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn tell(&mut self, position: usize, fate: Fate) {
        let result = RecipientResult {
            index: 0,
            recipient: "b@example.net".into(),
            queue: "example.net".into(),
            fate,
            attempts: 1,
            answer: Answer { text: "later".repeat(10), ..Answer::default() },
        };
        let id = self.live[position];
        let outcome = Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() };
        if self.log.append_outcome(&outcome).is_ok() && fate.is_final() {
            self.live.swap_remove(position);
        }
    }

    /// A twentieth of the messages ends, and where `defers`, as many others are deferred.
    fn end_some(&mut self, defers: bool) {
        for _ in 0..1 + self.live.len() / 20 {
            if self.live.len() < 2 {
                return;
            }
            let position = self.below(self.live.len() as u64) as usize;
            self.tell(position, Fate::Delivered);
            if defers {
                let position = self.below(self.live.len() as u64) as usize;
                self.tell(position, Fate::Deferred { due_ms: 5 });
            }
            if self.below(4) == 0 {
                self.settle();
            }
        }
    }

    /// A second.
    fn rest(&mut self) {
        for _ in 0..200 {
            self.settle();
        }
    }
}

/// Mail comes until none is taken, a twentieth of it ends all over the segments, and so on: where what is live is
/// nearly all that there is room for, the log wins a tenth of a segment by copying the rest of it, and so it copies
/// at the most some ten times what it takes. When nothing more comes, it comes to rest. In small segments, where a
/// frame's padding is much, what had just been copied was once copied again, on and on: five hundred segments in a
/// second.
#[test]
fn a_full_log_copies_for_what_it_wins_and_rests() {
    let mut all_taken = 0;
    for segment_bytes in [32_u64 << 10, 48 << 10, 64 << 10, 160 << 10] {
        for is_disk_full in [false, true] {
            for (seed, bytes_max) in (0..3).flat_map(|seed| [500, 4_000, segment_bytes / 4].map(|max| (seed, max))) {
                let mut rig = Rig::new(seed, segment_bytes);
                if is_disk_full {
                    let capacity = SEGMENTS * segment_bytes + (200 << 10);
                    rig.disk.set_faults(Faults { capacity: Some(capacity), ..Faults::default() });
                }
                rig.fill(bytes_max);
                let begin = rig.log.statistics();
                for _ in 0..8 {
                    rig.end_some(seed == 1);
                    rig.fill(bytes_max);
                    rig.rest();
                    let rested = rig.log.statistics().bytes_copied;
                    rig.rest();
                    let copied = rig.log.statistics().bytes_copied - rested;
                    assert_eq!(copied, 0, "{segment_bytes} {is_disk_full} {seed} {bytes_max}");
                }
                let end = rig.log.statistics();
                let copied = end.bytes_copied - begin.bytes_copied;
                let taken = end.bytes_messages + end.bytes_outcomes - begin.bytes_messages - begin.bytes_outcomes;
                // Each segment may be copied once before the first is won.
                assert!(
                    copied <= 12 * taken + SEGMENTS * segment_bytes,
                    "{segment_bytes} {is_disk_full} {seed} {bytes_max}: {copied} for {taken}"
                );
                all_taken += taken;
            }
        }
    }
    assert!(all_taken > 20 << 20, "{all_taken}");
}

const SEGMENTS: u64 = 16;
