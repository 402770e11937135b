//! LIMITS-HOLD over reloads: a limit keeps what it has counted, whatever becomes of it.

use super::*;
use crate::handover::Generation;

impl Engine {
    /// All shards get another configuration, one after the other.
    pub(super) fn reload(&mut self, rules: &str) {
        self.reload_as(rules, false);
    }

    /// The same, as if it were another one although it isn't.
    fn reload_as(&mut self, rules: &str, is_forced: bool) {
        self.prepare(rules, is_forced);
        (0..self.mail.len()).for_each(|shard| self.reload_shard(shard));
    }

    fn prepare(&mut self, rules: &str, is_forced: bool) {
        let config = Arc::new(config(rules).aligned_with(&self.config).unwrap());
        let policy = Arc::new(Policy::new(&config).unwrap());
        let mut reload = self.reload.followed_by(Arc::clone(&config), Arc::clone(&policy));
        if is_forced {
            reload.generation = Generation(self.reload.generation.0 + 1);
        }
        (self.config, self.policy, self.reload) = (config, policy, Arc::new(reload));
    }

    fn reload_shard(&mut self, shard: usize) {
        self.mail[shard].push_back(ShardMessage::Reload(Arc::clone(&self.reload)));
    }
}

/// No window of a second has more than the largest of the limits that are in force in it, from their times on.
fn assert_holds(what: &str, mails: &[(Duration, u32)], limits: &[(u64, u32)]) {
    for &(from, _) in mails {
        let to = from + seconds(1);
        let within: u32 = mails.iter().filter(|(at, _)| *at >= from && *at < to).map(|(_, units)| units).sum();
        let begins = |place: usize| limits.get(place).map_or(Duration::MAX, |(at, _)| seconds(*at));
        let in_force = (0..limits.len()).filter(|&place| begins(place) < to && begins(place + 1) >= from);
        let most = in_force.map(|place| limits[place].1).max().unwrap();
        assert!(within <= most, "{what}: {within} from {from:?}, {most} may be");
    }
}

fn slow(rate: &str, more: &str) -> String {
    format!("[shaping.\"slow.test\"]\nmax_message_rate = \"{rate}\"\n{more}")
}

#[test]
fn a_rate_that_changes_holds_in_every_window() {
    for shards in [1, 2, 4] {
        let mut engine = Engine::start(&slow("20/s", ""), shards);
        queue(&mut engine, 400, 0);
        let mut limits = vec![(0, 20)];
        for (at, count) in [(4, 5), (8, 40), (12, 10)] {
            engine.run_until(seconds(at));
            engine.reload(&slow(&format!("{count}/s"), ""));
            limits.push((at, count));
        }
        engine.run_until(seconds(16));
        let sink = engine.sink(SLOW);
        assert_holds(&format!("{shards} shards"), &sink.mails, &limits);
        for (place, (at, count)) in limits.iter().enumerate() {
            let from = seconds(at + 1);
            let sent = sink.mails.iter().filter(|(time, _)| *time >= from && *time < from + seconds(2)).count();
            assert!(sent as u32 >= 2 * count * 9 / 10, "{sent} in two seconds of step {place}, {shards} shards");
        }
    }
}

/// Under a pair's rate, a tenant's, and a limit's, with reloads all the time: neither are windows reset, nor is
/// anything sent twice, nor does it cost more than a little of the rate.
#[test]
fn the_same_configuration_again_and_again_changes_no_rate() {
    let rules = "[[tenant]]\nname = \"a\"\nmax_message_rate = \"15/s\"\n[[limit]]\nname = \"all\"\n\
                 max_message_rate = \"18/s\"\n";
    for (shards, is_forced) in [(1, false), (2, false), (1, true), (2, true), (4, true)] {
        let rules = slow("20/s", rules);
        let mut engine = Engine::start(&rules, shards);
        for number in 0..200 {
            engine.inject_of(number % shards, "a", 0);
        }
        queue(&mut engine, 200, 0);
        for step in 1..=100 {
            engine.run_until(Duration::from_millis(100 * step));
            engine.reload_as(&rules, is_forced);
        }
        engine.run_until(seconds(60));
        let what = format!("{shards} shards, forced: {is_forced}");
        let of_a: Vec<(Duration, u32)> = engine.senders["a"].iter().map(|at| (*at, 1)).collect();
        let sink = engine.sink(SLOW);
        assert_holds(&what, &sink.mails, &[(0, 18)]);
        assert_holds(&what, &of_a, &[(0, 15)]);
        let within = sink.mails.iter().filter(|(at, _)| *at < seconds(10)).count();
        assert!(within >= 9 * 18 * 8 / 10, "{what}: {within} in ten seconds");
        assert_eq!(sink.mails.len(), 400, "{what}: each message once");
    }
}

/// A home that hears of a reload late gets no credits meanwhile: each of its tickets would only go home, and be asked
/// for again, for as long as that lasts. Then its mail goes, the owner's own all along.
#[test]
fn a_home_that_is_behind_is_waited_for() {
    for (shards, limit) in [(2, ""), (4, ""), (2, "[[limit]]\nname = \"all\"\nmax_message_rate = \"90/s\"\n")] {
        let what = format!("{shards} shards, {limit:?}");
        let rules = slow("100/s", limit);
        let mut engine = Engine::start(&rules, shards);
        (0..400).for_each(|_| engine.inject(0, "r@slow.test", Priority::Normal));
        engine.inject(shards - 1, "late@slow.test", Priority::Normal);
        engine.run_until(seconds(1));
        engine.prepare(&rules, true);
        (0..shards - 1).for_each(|shard| engine.reload_shard(shard));
        engine.run_until(seconds(2));
        // It is their turn at once, and with few ready each that comes home is news to the owner.
        let late = shards - 1;
        for _ in 0..50 {
            engine.run_until(engine.now + Duration::from_millis(40));
            engine.inject(late, "late@slow.test", Priority::High);
            engine.inject(late, "late@fast.test", Priority::High);
        }
        let meanwhile = engine.sink(SLOW).mails.iter().filter(|(at, _)| *at >= Duration::from_millis(1_500)).count();
        assert!(meanwhile > 100, "{what}: {meanwhile} went while one was behind");
        assert!(engine.shards[late].home.len() >= 50, "{what}: something went as it was once configured");
        engine.reload_shard(late);
        engine.run_until(seconds(12));
        let sink = engine.sink(SLOW);
        assert_holds(&what, &sink.mails, &[(0, 100)]);
        assert_eq!((sink.mails.len(), engine.sink(FAST).mails.len()), (451, 50), "{what}: each message once");
    }
}

#[test]
fn limits_over_many_pairs_come_change_and_go() {
    for shards in [1, 2, 4] {
        let tenant = "[[tenant]]\nname = \"a\"\n";
        let limit =
            |rate: &str| format!("{tenant}[[limit]]\nname = \"l\"\ntenant = \"a\"\nmax_message_rate = \"{rate}\"\n");
        let other = "[[limit]]\nname = \"before\"\ndomain = \"fast.test\"\nmax_message_rate = \"1000/s\"\n";
        let mut engine = Engine::start(&slow("100/s", tenant), shards);
        for number in 0..700 {
            engine.inject_of(number % shards, "a", 0);
        }
        engine.run_until(seconds(3));
        // It comes, with another in front of it; goes down; up; and is gone.
        let steps = [
            (3, format!("{tenant}{other}{}", &limit("20/s")[tenant.len()..]), 20),
            (6, limit("5/s"), 5),
            (9, limit("40/s"), 40),
            (12, tenant.to_owned(), 100),
        ];
        let mut limits = vec![(0, 100)];
        for (at, rules, count) in steps {
            engine.run_until(seconds(at));
            engine.reload(&slow("100/s", &rules));
            limits.push((at, count));
        }
        engine.run_until(seconds(60));
        let what = format!("{shards} shards");
        let sink = engine.sink(SLOW);
        assert_holds(&what, &sink.mails, &limits);
        assert_eq!(sink.mails.len(), 700, "{what}");
        for pair in limits.windows(2).skip(1) {
            let [(from, count), (to, _)] = pair else { unreachable!() };
            let sent = sink.mails.iter().filter(|(at, _)| *at >= seconds(from + 1) && *at < seconds(*to)).count();
            assert!(sent as u32 >= 2 * count * 8 / 10, "{what}: {sent} under {count}/s");
        }
    }
}

/// An hour's limit counts what went before it was lowered, and what it counted is not lost with a raise.
#[test]
fn an_hours_limit_keeps_its_count() {
    let rules = |count: u32| slow(&format!("{count}/h,max_burst={}", count / 2), "");
    let mut engine = Engine::start(&rules(100), 2);
    queue(&mut engine, 300, 0);
    engine.run_until(seconds(600));
    let before = engine.sink(SLOW).mails.len();
    assert!((60..=70).contains(&before), "{before}: half at once, and the rest one by one");
    engine.reload(&rules(50));
    engine.run_until(seconds(1_800));
    assert_eq!(engine.sink(SLOW).mails.len(), before, "more went in this hour than may");
    engine.reload(&rules(120));
    engine.run_until(seconds(3_000));
    let after = engine.sink(SLOW).mails.len();
    assert!((before + 15..=120).contains(&after), "{after}");
}
