//! Pairs move to another shard: under load, and with all that limits have counted.

use super::*;
use crate::config::{LimitSettings, Rate};
use crate::limits::MOVE_PATIENCE;
use crate::pool::automation::Limited;
use crate::pool::suspension::{Effect, Scope};

impl Engine {
    /// All owned pairs of a site that nobody rolls up, or of a provider.
    fn rollups(&self, name: &str) -> Vec<RollupKey> {
        let named = self.owners.keys().filter(|(_, rollup)| **rollup == *name);
        let mut rollups: Vec<RollupKey> =
            named.map(|(source, rollup)| RollupKey { source: *source, rollup: Arc::clone(rollup) }).collect();
        rollups.sort_unstable();
        rollups
    }

    /// They are to move to the next shard each; then time goes on until they have, or have not.
    pub(super) fn move_on(&mut self, name: &str) {
        for rollup in self.rollups(name) {
            let owner = self.owners[&(rollup.source, Arc::clone(&rollup.rollup))];
            let over = self.moves.len() + 1;
            self.begin_move(rollup, owner);
            while self.moves.len() < over {
                self.run_until(self.now + Duration::from_millis(1));
            }
        }
    }

    fn begin_move(&mut self, rollup: RollupKey, owner: usize) {
        self.moving.insert(rollup.clone(), (owner + 1) % self.shards.len());
        self.mail[owner].push_back(ShardMessage::Release { rollup });
    }

    fn waiting(&self) -> usize {
        self.shards.iter().map(|shard| shard.home.len()).sum()
    }

    pub(super) fn done(&self) -> usize {
        self.moves.iter().filter(|(_, done)| *done).count()
    }
}

/// Under load, again and again: no window and no connection is too many, and nothing is lost or sent twice.
#[test]
fn a_rate_and_a_connection_limit_hold_over_moves() {
    for shards in [2, 3] {
        let mut engine = Engine::start(TWENTY, shards);
        queue(&mut engine, 600, 500);
        for second in 2..25 {
            engine.run_until(seconds(second));
            engine.move_on(SLOW);
        }
        assert_eq!(engine.done(), 23, "each came to its end");
        let sink = engine.sink(SLOW);
        assert!(sink.open_most <= 5 && sink.most_within(seconds(1)) <= 20, "{}", sink.most_within(seconds(1)));
        let sent = sink.between(seconds(1), seconds(25));
        assert!(
            sent >= 24 * 20 * 8 / 10,
            "{sent}: a move holds mail up for no longer than its connections take to end"
        );
        engine.run_until(seconds(45));
        assert_eq!((engine.sink(SLOW).mails.len(), engine.sink(FAST).mails.len(), engine.waiting()), (600, 500, 0));
    }
}

#[test]
fn what_no_rate_holds_moves_under_load_too() {
    for shards in [2, 4] {
        let mut engine = Engine::start("", shards);
        queue(&mut engine, 3_000, 3_000);
        for part in 1..8 {
            engine.run_until(Duration::from_millis(100 * part));
            for site in [SLOW, FAST] {
                engine.move_on(site);
            }
        }
        assert_eq!(engine.done(), 14);
        assert!(engine.waiting() > 0, "it was under load");
        engine.run_until(seconds(60));
        assert_eq!((engine.sink(SLOW).mails.len(), engine.sink(FAST).mails.len(), engine.waiting()), (3_000, 3_000, 0));
    }
}

/// A move does not wait for a transaction that takes minutes: the owner goes on as before.
#[test]
fn a_move_is_given_up_for_a_slow_transaction() {
    let mut engine = Engine::start("[shaping.\"slow.test\"]\nconnection_limit = 2\n", 2);
    engine.content_takes = seconds(300);
    queue(&mut engine, 2, 0);
    engine.run_until(seconds(1));
    engine.content_takes = Duration::ZERO;
    queue(&mut engine, 500, 0);
    let begun = engine.now;
    engine.move_on(SLOW);
    assert_eq!(engine.done(), 0);
    assert!(engine.now < begun + MOVE_PATIENCE + Duration::from_millis(100));
    engine.run_until(seconds(290));
    assert_eq!(engine.waiting(), 502, "both connections are taken");
    engine.run_until(seconds(330));
    assert_eq!((engine.sink(SLOW).mails.len(), engine.waiting()), (502, 0));
    engine.move_on(SLOW);
    assert_eq!(engine.done(), 1, "later it can");
}

/// What was reserved ahead and used of an hour is, at the new owner, and after a kill in the midst of a move.
#[test]
fn an_hours_limit_forgets_nothing() {
    let rules = "[shaping.\"slow.test\"]\nmax_message_rate = \"200/h,max_burst=100\"\n";
    let mut engine = Engine::start(rules, 2);
    queue(&mut engine, 400, 0);
    engine.run_until(seconds(20));
    assert!(engine.sink(SLOW).mails.len() >= 100);
    for part in 1..=20 {
        engine.run_until(seconds(20 + 80 * part));
        engine.move_on(SLOW);
    }
    assert_eq!(engine.done(), 20);
    let rollup = engine.rollups(SLOW).remove(0);
    engine.begin_move(rollup, 0);
    engine.run_until(engine.now + Duration::from_millis(1));
    let mut engine = engine.kill(2);
    engine.run_until(seconds(2 * 3_600));
    let most = engine.sink(SLOW).most_within(seconds(3_600));
    assert!((180..=200).contains(&most), "{most}");
}

/// A limit that a rule has set counts on where the pairs go.
#[test]
fn a_rules_limit_counts_on() {
    let mut engine = Engine::start("", 2);
    let pair = PairKey { source: 0, rollup: SLOW.into(), site: SLOW.into() };
    let rate = Rate { count: 10, period: seconds(30), max_burst: 10 };
    let settings = LimitSettings { max_message_rate: Some(rate), ..LimitSettings::default() };
    let effect = Effect::Limit(Limited { settings, recovery: None });
    let until_ms = START.wall_ms + 3_600_000;
    let suspension = Suspension { id: 1, scope: Scope::pair(&pair), effect, reason: "a rule".into(), until_ms };
    for mail in &mut engine.mail {
        mail.push_back(ShardMessage::Suspend(Box::new(suspension.clone())));
    }
    engine.run_until(seconds(31));
    queue(&mut engine, 100, 0);
    for part in 0..40 {
        engine.run_until(seconds(32 + 3 * part));
        engine.move_on(SLOW);
    }
    assert_eq!(engine.done(), 40);
    let sink = engine.sink(SLOW);
    assert!(sink.mails.len() >= 40 && sink.most_within(seconds(30)) <= 10, "{}", sink.most_within(seconds(30)));
}

/// What is under limits over many pairs, and waits there, asks again from where it is.
#[test]
fn what_waits_at_a_keeper_goes_on_after_a_move() {
    let rules = "[[tenant]]\nname = \"a\"\nmax_message_rate = \"5/s\"\n[[limit]]\nname = \"all\"\n\
                 provider = \"p\"\nmax_message_rate = \"10/s\"\n[[tenant]]\nname = \"b\"\n\
                 [provider.p]\nmatch = [{ domain = \"slow.test\" }]\n";
    for shards in [2, 3] {
        let mut engine = Engine::start(rules, shards);
        for number in 0..100 {
            engine.inject_of(number % shards, "a", 0);
            engine.inject_of(number % shards, "b", 0);
        }
        for second in 2..16 {
            engine.run_until(seconds(second));
            engine.move_on("p");
        }
        assert_eq!(engine.done(), 14);
        let sink = engine.sink(SLOW);
        assert!(sink.most_within(seconds(1)) <= 10);
        let of_a = &engine.senders["a"];
        assert!(of_a.iter().all(|&at| of_a.iter().filter(|&&it| it >= at && it < at + seconds(1)).count() <= 5));
        assert!(sink.mails.len() >= 15 * 10 * 7 / 10, "{}", sink.mails.len());
        engine.run_until(seconds(60));
        assert_eq!((engine.sink(SLOW).mails.len(), engine.waiting()), (200, 0));
    }
}

/// Of a limit that lets something pass each half a minute, nobody waits for the next permit to move.
#[test]
fn what_waits_long_at_a_keeper_does_not_hold_up_a_move() {
    let mut engine = Engine::start("[[tenant]]\nname = \"a\"\nmax_message_rate = \"2/min\"\n", 2);
    (0..10).for_each(|number| engine.inject_of(number % 2, "a", 0));
    for part in 1..10 {
        engine.run_until(seconds(10 * part));
        engine.move_on(SLOW);
    }
    assert_eq!(engine.done(), 9);
    assert!((2..=4).contains(&engine.sink(SLOW).mails.len()), "{}", engine.sink(SLOW).mails.len());
    engine.run_until(seconds(400));
    assert_eq!((engine.sink(SLOW).mails.len(), engine.waiting()), (10, 0));
    assert!(engine.sink(SLOW).most_within(seconds(60)) <= 2);
}

/// Until each home has heard, one of them might still send to the old owner: here one that has new mail, and the old
/// owner's standing credits.
#[test]
fn a_move_waits_for_every_home() {
    for (deaf_for, done) in [(seconds(1), 1), (MOVE_PATIENCE + seconds(1), 0)] {
        let mut engine = Engine::start(TWENTY, 3);
        queue(&mut engine, 3, 0);
        engine.run_until(seconds(3));
        (0..100).for_each(|number| engine.inject(0, &format!("r{number}@slow.test"), Priority::Normal));
        engine.run_until(seconds(4));
        let rollup = engine.rollups(SLOW).remove(0);
        assert_eq!(engine.owners[&(0, Arc::clone(&rollup.rollup))], 0);
        engine.deaf = Some(2);
        (0..100).for_each(|number| engine.inject(2, &format!("r{number}@slow.test"), Priority::Normal));
        engine.begin_move(rollup, 0);
        engine.run_until(seconds(4) + deaf_for);
        assert_eq!(engine.moves.len(), 1 - done, "not before it has heard; or it is given up");
        engine.deaf = None;
        engine.run_until(seconds(6) + deaf_for);
        assert_eq!((engine.moves.len(), engine.done()), (1, done));
        engine.run_until(seconds(40));
        assert_eq!((engine.sink(SLOW).mails.len(), engine.waiting()), (203, 0), "and its mail goes too");
        let sink = engine.sink(SLOW);
        assert!(sink.most_within(seconds(1)) <= 20 && sink.open_most <= 5);
    }
}

/// What was asked for is the old owner's, and nobody else would hear of it.
#[test]
fn a_move_waits_for_its_reservations() {
    let mut engine = Engine::start("[shaping.\"slow.test\"]\nmax_message_rate = \"600/min\"\n", 2);
    engine.reserving_takes = Duration::from_millis(400);
    queue(&mut engine, 200, 0);
    for part in 1..12 {
        engine.run_until(seconds(2 * part));
        engine.move_on(SLOW);
    }
    assert_eq!(engine.done(), 11);
    engine.run_until(seconds(90));
    assert_eq!((engine.sink(SLOW).mails.len(), engine.waiting()), (200, 0), "its rate is not held up for ever");
    let reserved: u32 = engine.reserved.values().flat_map(|past| &past.reserved).map(|(_, units)| units).sum();
    assert!(reserved <= 200 + 2 * 30, "{reserved}: none of them is lost");
}

/// A host that refused is left alone by the new owner for as long.
#[test]
fn a_host_is_left_alone_after_a_move() {
    let mut engine = Engine::start("[retry]\nretry_interval = [\"30s\"]\n", 2);
    engine.are_sinks_down = true;
    queue(&mut engine, 20, 0);
    engine.run_until(seconds(5));
    let tried = engine.refused.len();
    assert!(tried >= 1);
    for second in 6..25 {
        engine.run_until(seconds(second));
        engine.move_on(SLOW);
    }
    assert_eq!((engine.done(), engine.refused.len()), (19, tried), "nobody tries it again");
    engine.are_sinks_down = false;
    engine.run_until(seconds(200));
    assert_eq!((engine.sink(SLOW).mails.len(), engine.waiting()), (20, 0));
}

/// A suspension that began or ended on the way is what the new owner's list says.
#[test]
fn a_suspended_pair_moves_and_goes_on_when_it_may() {
    let mut engine = Engine::start(TWENTY, 2);
    queue(&mut engine, 100, 0);
    engine.run_until(seconds(3));
    let pair = PairKey { source: 0, rollup: SLOW.into(), site: SLOW.into() };
    let (scope, until_ms) = (Scope::pair(&pair), START.wall_ms + 3_600_000);
    let suspension = Suspension { id: 1, scope, effect: Effect::Stop, reason: "operator".into(), until_ms };
    for mail in &mut engine.mail {
        mail.push_back(ShardMessage::Suspend(Box::new(suspension.clone())));
    }
    engine.run_until(seconds(4));
    let sent = engine.sink(SLOW).mails.len();
    engine.move_on(SLOW);
    engine.run_until(seconds(10));
    assert_eq!((engine.done(), engine.sink(SLOW).mails.len()), (1, sent), "it stays suspended");
    for mail in &mut engine.mail {
        mail.push_back(ShardMessage::Resume { id: 1 });
    }
    engine.run_until(seconds(20));
    assert_eq!((engine.sink(SLOW).mails.len(), engine.waiting()), (100, 0));
}

/// After a kill in the midst of a move all that was not sent goes, within the limits.
#[test]
fn a_kill_in_the_midst_of_a_move_loses_nothing() {
    for after_us in [0, 100, 5_000, 15_000, 30_000, 45_000] {
        let mut engine = Engine::start(TWENTY, 2);
        queue(&mut engine, 100, 0);
        engine.run_until(seconds(3));
        let rollup = engine.rollups(SLOW).remove(0);
        let owner = engine.owners[&(0, Arc::clone(&rollup.rollup))];
        engine.begin_move(rollup, owner);
        engine.run_until(engine.now + Duration::from_micros(after_us));
        let mut engine = engine.kill(2);
        engine.run_until(seconds(20));
        assert_eq!(engine.waiting(), 0);
        let sink = engine.sink(SLOW);
        assert!(sink.mails.len() >= 100 && sink.most_within(seconds(1)) <= 20 && sink.open_most <= 5);
    }
}
