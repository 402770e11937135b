//! Crash images: at any write, the disk as it may be found after the power went, with some of the sectors that were not
//! synced yet, torn ones too. What is recovered must be everything acknowledged and, of the commit in flight, all or
//! nothing.
//!
//! `SPOOL_CRASH_IMAGES` sets about how many images are looked at. `CRASH_SECONDS` goes on for so long, from another
//! history each time. `SPOOL_CRASH_SEED` says with which history to begin.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

mod world;

use postrider_spool::sim::Faults;
use postrider_spool::{Durability, SpoolOptions};
use world::{Random, Seen, World};

fn options() -> SpoolOptions {
    SpoolOptions {
        segment_bytes: 48 << 10,
        max_bytes: 600 << 10,
        hot_bytes: 64 << 10,
        durability: Durability::Fsync,
        ..SpoolOptions::DEFAULT
    }
}

/// One history, with images taken on the way. Mail comes and goes, and some of it stays for long.
fn run(seed: u64, steps: u64, images_per_write: u64) -> (u64, Seen) {
    let mut world = World::new(seed, options());
    world.looks = true;
    let mut random = Random(seed ^ 0x5eed);
    let final_in_ten = 3 + random.below(7);
    let fails = random.one_in(2);
    world.strikes = fails;
    let full_from = if random.one_in(3) { random.below(steps) } else { steps };
    for step in 0..steps {
        if step == full_from {
            world.set_full(true);
        }
        match random.below(34) {
            0..9 => {
                let length = if random.one_in(12) { 15_000 + random.below(25_000) } else { random.below(4_000) };
                let recipients = if random.one_in(15) { 40 } else { 1 + random.below(3) as u32 };
                world.append_message(recipients, length as usize);
            }
            9..18 => {
                world.append_outcome(final_in_ten);
            }
            18..25 => {
                let images = if random.one_in(4) { images_per_write } else { 0 };
                world.step(images);
            }
            25 => world.settle(),
            26 => world.move_cursor(),
            27 => world.advance(random.below(300)),
            30 if random.one_in(2) => {
                let bytes = if random.one_in(4) { 15_000 + random.below(25_000) } else { random.below(4_000) };
                world.append_body(bytes as usize);
            }
            30 => world.release_body(),
            31..34 => world.append_sharing(1 + random.below(3) as u32),
            28 if fails && random.one_in(4) => world.set_faults(Faults {
                operations_left: Some(random.below(4)),
                sectors_written: if random.one_in(4) { 1_000 } else { random.below(60) },
                is_interruption: random.one_in(4),
                only: if random.one_in(6) { Some("checkpoint-") } else { None },
                ..Faults::default()
            }),
            28 if random.one_in(4) => world.set_faults(Faults {
                write_bytes_max: random.one_in(2).then(|| 1 + random.below(9_000) as usize),
                ..Faults::default()
            }),
            28 => {
                world.set_faults(Faults::default());
                world.log().begin_reopen();
            }
            _ if random.one_in(8) => world.pin_one(),
            _ if random.one_in(6) => world.unpin_one(),
            _ if random.one_in(12) => world.crash(),
            _ if random.one_in(20) => world.restart(),
            _ if random.one_in(2) => world.read_all(),
            _ => world.read_one(),
        }
    }
    world.set_full(false);
    world.empty();
    world.crash();
    (world.images, world.seen)
}

/// A history on a disk that is full of mail. What becomes of it is written down while the power goes, processes die and
/// writes fail, over and over; and then all of it can be.
fn run_on_full_disk(seed: u64, steps: u64, images_per_write: u64) -> (u64, Seen) {
    let mut world = World::new(seed, SpoolOptions { segment_bytes: 160 << 10, max_bytes: 100 << 20, ..options() });
    world.looks = true;
    let mut random = Random(seed ^ 0xf011);
    let segments = 2 + random.below(4);
    while world.log().statistics().segments_in_use < segments {
        let (recipients, length) = (1 + random.below(3) as u32, random.below(6_000) as usize);
        world.append_message(recipients, length);
        if random.one_in(6) {
            world.append_outcome(2);
        }
        world.advance(random.below(40));
        world.settle();
    }
    // All that the log wants to keep in reserve is there.
    for _ in 0..20 {
        world.advance(200);
        world.settle();
    }
    world.set_full(true);
    while world.append_message(1, 1 + random.below(4_000) as usize) {
        if random.one_in(3) {
            world.settle();
        }
    }
    let mut deferred = 0;
    for _ in 0..steps {
        match random.below(16) {
            // What is deferred counts, and so does the segment that it is written to; but the reserve has an end.
            0..5 => {
                let is_deferred = deferred < 12 && random.one_in(4);
                deferred += u64::from(is_deferred && world.append_outcome(0));
                if !is_deferred {
                    world.append_outcome(10);
                }
            }
            5..9 => world.step(if random.one_in(4) { images_per_write } else { 0 }),
            9 => world.settle(),
            10 => world.move_cursor(),
            11 => world.advance(random.below(300)),
            12 => world.set_faults(Faults {
                operations_left: Some(random.below(3)),
                sectors_written: if random.one_in(4) { 1_000 } else { random.below(60) },
                is_interruption: random.one_in(4),
                only: if random.one_in(6) { Some("checkpoint-") } else { None },
                ..Faults::default()
            }),
            13 => {
                world.set_faults(Faults::default());
                world.log().begin_reopen();
            }
            14 if random.one_in(2) => world.crash(),
            14 => world.restart(),
            _ if random.one_in(2) => world.read_all(),
            _ => world.read_one(),
        }
    }
    world.empty();
    world.crash();
    (world.images, world.seen)
}

/// A history with so little room that segments are given up before checkpoints pass them: some of the mail stays and is
/// deferred, and the rest passes by.
fn run_short_of_room(seed: u64, steps: u64, images_per_write: u64) -> (u64, Seen) {
    let mut world = World::new(seed, SpoolOptions { max_bytes: 768 << 10, ..options() });
    world.looks = true;
    let mut random = Random(seed ^ 0x5407);
    let fails = random.one_in(2);
    world.strikes = fails;
    let staying = 60 + random.below(40);
    for _ in 0..steps {
        if world.log().statistics().live_messages < staying {
            world.append_message(1 + random.below(3) as u32, 3_000 + random.below(2_000) as usize);
        }
        world.append_message(1, random.below(6_000) as usize);
        for _ in 0..2 {
            if world.log().statistics().live_messages > staying {
                world.deliver_behind(random.below(4) as usize);
            }
        }
        if random.one_in(4) {
            world.append_outcome(2);
        }
        if random.one_in(2) {
            world.move_cursor();
        }
        world.advance(random.below(10));
        for _ in 0..random.below(6) {
            world.step(if random.one_in(6) { images_per_write } else { 0 });
        }
        match random.below(60) {
            0..5 => world.settle(),
            5 if fails => world.set_faults(Faults {
                operations_left: Some(random.below(4)),
                sectors_written: if random.one_in(4) { 1_000 } else { random.below(60) },
                is_interruption: random.one_in(4),
                only: if random.one_in(6) { Some("checkpoint-") } else { None },
                ..Faults::default()
            }),
            6..9 => {
                world.set_faults(Faults::default());
                world.log().begin_reopen();
            }
            9 if random.one_in(6) => world.crash(),
            10 if random.one_in(8) => world.restart(),
            11 => world.read_one(),
            12..16 => world.read_all(),
            _ => {}
        }
    }
    world.empty();
    world.crash();
    (world.images, world.seen)
}

fn history(seed: u64) -> (u64, Seen) {
    match seed % 4 {
        0 => run_on_full_disk(seed, 300, 1),
        1 => run_short_of_room(seed, 250, 1),
        _ => run(seed, 500, 1),
    }
}

/// A retired segment that was told as damaged, and a whole record that copying took for damaged.
#[test]
fn histories_that_have_found_something() {
    for seed in [50_007, 700_209] {
        history(seed);
    }
}

#[test]
fn every_image_holds_what_was_acknowledged() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let wanted = number("SPOOL_CRASH_IMAGES").unwrap_or(900);
    let time = number("CRASH_SECONDS").map(Duration::from_secs);
    let fresh = time.map(|_| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() * 1_000);
    let first = number("SPOOL_CRASH_SEED").or(fresh).unwrap_or(1);
    let begun = Instant::now();
    let (mut images, mut seed) = (0, first);
    let mut all = Seen::default();
    while images < wanted || time.is_some_and(|time| begun.elapsed() < time) {
        println!("SPOOL_CRASH_SEED={seed}");
        let (looked_at, seen) = history(seed);
        images += looked_at;
        seed += 1;
        all.copies += seen.copies;
        all.retired += seen.retired;
        all.given_up += seen.given_up;
        all.failures += seen.failures;
        all.reopened += seen.reopened;
        all.cuts += seen.cuts;
        all.flights_found += seen.flights_found;
        all.refused += seen.refused;
        all.checkpoints += seen.checkpoints;
        all.summaries += seen.summaries;
        all.shared += seen.shared;
    }
    println!("{images} images in {} histories: {all:?}", seed - first);
    // Else the histories have become too tame to show anything.
    assert!(all.copies > 0);
    assert!(all.retired > 0);
    assert!(all.given_up > 0);
    assert!(all.reopened > 0);
    assert!(all.cuts > 0);
    assert!(all.flights_found > 0);
    assert!(all.checkpoints > 0);
    assert!(all.summaries > 0);
    assert!(all.shared > 0);
}

/// An unfinished commit, then the next header, torn while its frame is whole: nothing tells any more where the segment
/// before ends. It was reported as damage. First the commit failed and the log was reopened, then the power went and
/// came back. On a full disk there is no place to put the unfinished commit's bytes.
#[test]
fn a_torn_header_does_not_make_damage_of_an_unfinished_commit() {
    let mut cuts = 0;
    for seed in 0..60 {
        for (power_goes, is_full) in [(false, false), (true, false), (true, true)] {
            let mut world = World::new(seed, options());
            world.set_full(is_full);
            world.append_message(1, 3_000);
            world.settle();
            world.append_message(1, 3_000);
            world.set_faults(Faults { operations_left: Some(0), sectors_written: 5, ..Faults::default() });
            world.settle();
            world.set_faults(Faults::default());
            if power_goes {
                world.crash();
                assert!(world.append_message(1, 3_000) || is_full && world.append_outcome(0));
            } else {
                assert!(world.log().begin_reopen());
            }
            for _ in 0..3 {
                world.step(20);
            }
            // And a third start, of which no header tells anything new.
            world.crash();
            world.append_message(1, 3_000);
            world.step(20);
            cuts += world.seen.cuts;
        }
    }
    assert!(cuts > 0);
}
