//! Crash images with the whole engine on top: at any write, the disk as it may be found after the power went, and an
//! engine that is started on it, at times with another number of shards. Whatever clients, peers and the event log
//! learned before must hold: `fuzz/sim/checker.rs` knows the promises. Time hardly matters here; where it does is the
//! simulator (`fuzz/sim`).
//!
//! `ENGINE_CRASH_IMAGES` sets about how many images are looked at; `CRASH_SECONDS` goes on for so long, from another
//! history each time; `ENGINE_CRASH_SEED` says with which history to begin.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test stops at the first surprise; and begins anew"
)]

#[path = "../../../fuzz/sim/checker.rs"]
mod checker;
#[path = "../../../fuzz/sim/client.rs"]
mod client;
#[path = "../../../fuzz/sim/event_log.rs"]
mod event_log;
mod image;
mod peer;
#[path = "../../../fuzz/sim/random.rs"]
mod random;
mod world;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use checker::Counts;
use image::Images;
use postrider_spool::sim::SimDisk;
use random::Random;
use world::{Past, Seen, World};

/// One history of several lives, with looks at crash images on the way; at its end everything has come to an end.
fn run(seed: u64, lives: u64, counts: Counts, seen: Seen, images: &mut Images) -> Past {
    let mut random = Random::new(!seed);
    let past = Past::new(seed.is_multiple_of(2), counts, seen);
    let mut world = World::start(past, SimDisk::new(seed), seed, 1 + random.below(3) as usize);
    for _ in 0..lives {
        for _ in 0..500 + random.below(3_000) {
            if random.one_in(100) {
                world.execute_under_looks(2, images);
            } else {
                world.step();
            }
        }
        world = world.restart(images);
    }
    world.finish()
}

#[test]
fn every_image_keeps_every_promise() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let wanted = number("ENGINE_CRASH_IMAGES").unwrap_or(600);
    let time = number("CRASH_SECONDS").map(Duration::from_secs);
    let fresh = time.map(|_| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() * 1_000);
    let first = number("ENGINE_CRASH_SEED").or(fresh).unwrap_or(1);
    let begun = Instant::now();
    let (mut counts, mut seen, mut images) = (Counts::default(), Seen::default(), Images::default());
    let mut seed = first;
    let is_over = |images: &Images, histories: u64| {
        images.losing_all + images.losing_some >= wanted
            && histories >= HISTORIES_MIN
            && time.is_none_or(|time| begun.elapsed() >= time)
    };
    while !is_over(&images, seed - first) {
        println!("ENGINE_CRASH_SEED={seed}");
        let past = run(seed, LIVES, counts, seen, &mut images);
        (counts, seen) = (past.ledger.counts, past.seen);
        seed += 1;
    }
    println!("{} histories: {images:?} {counts:?} {seen:?}", seed - first);
    // Else the histories have become too tame to show anything.
    assert!(images.finished > 0);
    assert!(images.crashes > 0);
    assert!(images.kills > 0);
    assert!(counts.accepted > 100);
    assert!(counts.refused > 0);
    assert!(counts.delivered > 500);
    assert!(counts.bounced > 0);
    assert!(counts.expired > 0);
    assert!(counts.deferred > 0);
    assert!(counts.found > 0);
    assert!(counts.repeated > 0);
    assert!(counts.held > 0);
    assert!(seen.failed_operations > 0);
    assert!(seen.logs_removed > 0);
    assert!(seen.sharing > 50);
    assert!(seen.schedules_compared > images.crashes);
    assert!(seen.checkpoints > 0);
    assert!(seen.copies > 0);
    assert!(seen.reused > 0);
}

/// One seed replays all.
#[test]
fn a_seed_gives_the_same_history_again() {
    let history = || {
        let mut images = Images::default();
        let past = run(7, 2, Counts::default(), Seen::default(), &mut images);
        (past.ledger.counts, past.seen, past.wall_ms, images)
    };
    assert_eq!(history(), history());
}

const LIVES: u64 = 5;
/// In fewer, something that is looked for may not happen.
const HISTORIES_MIN: u64 = 4;
