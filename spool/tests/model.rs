//! Random operations on a log against a model, with I/O errors after some operations, crashes and restarts on the way.
//!
//! `SPOOL_MODEL_CASES` sets how many sequences are tried.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod world;

use postrider_spool::sim::Faults;
use postrider_spool::{Durability, SpoolOptions};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use world::World;

#[derive(Debug, Clone)]
enum Step {
    Message { recipients: u32, length: usize },
    Outcome { final_in_ten: u64 },
    Body { bytes: usize },
    Share { recipients: u32 },
    Release,
    Deliver { newer: usize },
    Execute { times: u8 },
    Settle,
    Advance { ms: u64 },
    MoveCursor,
    Read,
    ReadAll,
    Pin,
    Unpin,
    Fail { after: u64, sectors: u64 },
    Shorten { bytes: usize },
    Fill,
    Heal,
    Reopen,
    Restart,
    Crash,
    Look,
}

fn step() -> impl Strategy<Value = Step> {
    let recipients = prop_oneof![8 => 1_u32..4, 1 => 30_u32..70];
    let length = prop_oneof![6 => 0_usize..3_000, 2 => 3_000_usize..12_000, 1 => 20_000_usize..30_000];
    prop_oneof![
        12 => (2_u64..11).prop_map(|final_in_ten| Step::Outcome { final_in_ten }),
        1 => length.clone().prop_map(|bytes| Step::Body { bytes }),
        4 => recipients.clone().prop_map(|recipients| Step::Share { recipients }),
        1 => Just(Step::Release),
        12 => (recipients, length).prop_map(|(recipients, length)| Step::Message { recipients, length }),
        4 => (0_usize..6).prop_map(|newer| Step::Deliver { newer }),
        12 => (1_u8..5).prop_map(|times| Step::Execute { times }),
        4 => Just(Step::Settle),
        3 => (0_u64..2_000).prop_map(|ms| Step::Advance { ms }),
        4 => Just(Step::MoveCursor),
        3 => Just(Step::Read),
        2 => Just(Step::ReadAll),
        1 => Just(Step::Pin),
        1 => Just(Step::Unpin),
        1 => (0_u64..6, prop_oneof![3 => 0_u64..40, 1 => Just(1_000)])
            .prop_map(|(after, sectors)| Step::Fail { after, sectors }),
        1 => (1_usize..9_000).prop_map(|bytes| Step::Shorten { bytes }),
        1 => Just(Step::Fill),
        2 => Just(Step::Heal),
        4 => Just(Step::Reopen),
        1 => Just(Step::Restart),
        1 => Just(Step::Crash),
        2 => Just(Step::Look),
    ]
}

fn run(seed: u64, steps: &[Step]) {
    let options = SpoolOptions {
        segment_bytes: 32 << 10,
        max_bytes: 400 << 10,
        hot_bytes: 64 << 10,
        durability: Durability::Fsync,
        ..SpoolOptions::default()
    };
    let mut world = World::new(seed, options);
    world.strikes = seed.is_multiple_of(3);
    for step in steps {
        match *step {
            Step::Message { recipients, length } => {
                world.append_message(recipients, length);
            }
            Step::Outcome { final_in_ten } => {
                world.append_outcome(final_in_ten);
            }
            Step::Body { bytes } => world.append_body(bytes),
            Step::Share { recipients } => world.append_sharing(recipients),
            Step::Release => world.release_body(),
            Step::Execute { times } => (0..times).for_each(|_| world.step(0)),
            Step::Deliver { newer } => world.deliver_behind(newer),
            Step::Settle => world.settle(),
            Step::Advance { ms } => world.advance(ms),
            Step::MoveCursor => world.move_cursor(),
            Step::Read => world.read_one(),
            Step::ReadAll => world.read_all(),
            Step::Pin => world.pin_one(),
            Step::Unpin => world.unpin_one(),
            Step::Fail { after, sectors } => {
                world.set_faults(Faults { operations_left: Some(after), sectors_written: sectors, ..Faults::default() })
            }
            Step::Shorten { bytes } => {
                world.set_faults(Faults { write_bytes_max: Some(bytes), ..Faults::default() });
            }
            Step::Fill => world.set_full(true),
            Step::Heal => world.set_full(false),
            Step::Reopen => {
                world.log().begin_reopen();
            }
            Step::Restart => world.restart(),
            Step::Crash => world.crash(),
            Step::Look => world.look_at_image(),
        }
    }
    world.set_full(false);
    world.empty();
    world.crash();
}

#[test]
fn a_log_behaves_like_its_model() {
    let cases = std::env::var("SPOOL_MODEL_CASES").map_or(200, |cases| cases.parse().unwrap());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 3_000, ..Config::default() };
    let strategy = (any::<u64>(), prop::collection::vec(step(), 1..250));
    TestRunner::new(config)
        .run(&strategy, |(seed, steps)| {
            run(seed, &steps);
            Ok(())
        })
        .unwrap();
}

/// After two failed commits and a restart of the process, a segment header may be in the cache and not on the medium.
/// Once recovery believed it, and so took a frame for void that was there after the next crash.
#[test]
fn a_header_that_is_only_cached_is_not_believed() {
    let options = SpoolOptions { segment_bytes: 32 << 10, ..SpoolOptions::default() };
    for (seed, sectors_written) in (0..20).flat_map(|seed| [8, 60].map(|sectors| (seed, sectors))) {
        let mut world = World::new(seed, options);
        world.append_message(1, 24_000);
        world.settle();
        // The first commit of another segment fails, though most of it gets there.
        assert!(world.append_message(1, 5_000));
        let faults = Faults { operations_left: Some(0), is_permanent: true, ..Faults::default() };
        world.set_faults(Faults { sectors_written, ..faults });
        world.settle();
        // So does the commit that would void it, and nothing of that gets there.
        world.log().begin_reopen();
        world.set_faults(faults);
        world.settle();
        world.set_faults(Faults::default());
        world.restart();
    }
}

/// A log fails, and fails again before anything but the frame that reopened it is durable: the segment that was begun
/// for that holds nothing, and is won back.
#[test]
fn a_log_that_fails_again_loses_no_segment() {
    for seed in 0..10 {
        let mut world = World::new(seed, SpoolOptions { segment_bytes: 32 << 10, ..SpoolOptions::default() });
        world.append_message(1, 1_000);
        world.settle();
        for _ in 0..3 {
            assert!(world.append_outcome(0));
            world.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
            world.settle();
            world.set_faults(Faults::default());
            assert!(world.log().begin_reopen());
            world.settle();
        }
        assert_eq!(world.log().statistics().write_failures, 3);
        world.empty();
    }
}
