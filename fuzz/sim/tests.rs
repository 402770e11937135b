//! A few seeds, and one of them twice. `tests/canary.rs` plants bugs; `cargo run --release -p postrider-sim` runs many.

use crate::world::World;

/// A seed for each number of shards that a run may begin with.
#[test]
fn a_few_seeds_keep_every_promise() {
    for seed in 1..=3 {
        println!("seed {seed}:{}", World::mix_of(seed));
        let report = World::run(seed, None);
        assert!(report.counts.delivered > 0, "seed {seed}: {report:?}");
    }
}

/// Tenants of all classes share pairs, with limits over many pairs and without. By the first three, a class whose
/// permits came behind others' had none of use; by the others, it waited for its share once more with its ticket.
#[test]
fn shares_are_as_they_were_promised() {
    for seed in [25, 26, 71, 89, 321, 391, 621, 951] {
        println!("seed {seed}");
        assert!(World::run_shares(seed, None).counts.delivered > 0);
    }
}

/// One seed replays all.
#[test]
fn a_seed_gives_the_same_run_again() {
    assert_eq!(World::run(7, None), World::run(7, None));
}
