//! Limits over many pairs: a tenant's, and `[[limit]]`. They hold over sources, sites, shards and kills, and what they
//! hold back holds up nobody else.

use super::*;

const SOURCES: &str = "\
[[egress_source]]
name = \"one\"
source_address = \"127.0.0.11\"
[[egress_source]]
name = \"two\"
source_address = \"127.0.0.12\"
[[egress_pool]]
name = \"default\"
sources = [{ source = \"one\" }, { source = \"two\" }]
";

const PROVIDER: &str = "[provider.p]\nmatch = [{ domain = \"slow.test\" }]\n";

fn rules(rate: &str) -> String {
    format!("{SOURCES}[[tenant]]\nname = \"a\"\nmax_message_rate = \"{rate}\"\n[[tenant]]\nname = \"b\"\n")
}

impl Engine {
    /// So many messages of a tenant over all homes, to these domains in turn.
    fn queue_of(&mut self, tenant: &str, count: usize, domains: &[&str]) {
        for number in 0..count {
            let recipient = format!("r{number}@{}", domains[number % domains.len()]);
            self.inject_for(number / domains.len() % self.shards.len(), tenant, 0, vec![recipient]);
        }
    }

    fn sent_by(&self, tenant: &str) -> &[Duration] {
        self.senders.get(tenant).map_or(&[], Vec::as_slice)
    }
}

/// The most in any half-open window of this length.
fn most_within(times: &[Duration], period: Duration) -> usize {
    let window = |&from: &Duration| times.iter().filter(|&&at| at >= from && at < from + period).count();
    times.iter().map(window).max().unwrap_or_default()
}

/// How long the second tenant's mail takes by the side of the first's.
fn time_of_b(shards: usize, of_a: usize) -> Duration {
    let mut engine = Engine::start(&rules("1/s"), shards);
    engine.queue_of("a", of_a, &["slow.test"]);
    engine.run_until(seconds(3));
    engine.queue_of("b", 1_000, &["slow.test"]);
    engine.run_until(seconds(30));
    assert_eq!(engine.sent_by("b").len(), 1_000);
    if of_a > 0 {
        let of_a = engine.sent_by("a");
        assert_eq!(most_within(of_a, seconds(1)), 1);
        assert!((27..=29).contains(&of_a.len()), "{} with {shards} shards", of_a.len());
    }
    engine.sent_by("b")[999] - seconds(3)
}

#[test]
fn a_limited_tenant_slows_no_other_at_the_same_pair() {
    for shards in [1, 2, 4] {
        let (alone, beside) = (time_of_b(shards, 0), time_of_b(shards, 500));
        assert!(beside < alone + Duration::from_millis(100), "{beside:?} instead of {alone:?} with {shards} shards");
    }
}

/// FAIR: under one limit over all mail, which is a little more than the pair's own rate, less, or much more.
fn waits_behind(ahead: &str, behind: &str, limit: &str, shards: usize) -> (usize, Duration) {
    let limit = format!("[[limit]]\nname = \"all\"\nmax_message_rate = \"{limit}\"\n");
    let mut engine = Engine::start(&format!("{}{limit}", tenants("10/s")), shards);
    for number in 0..2_000 {
        engine.inject_of(number % shards, ahead, number % 3);
    }
    engine.run_until(seconds(3));
    let before = engine.sent_by(ahead).len();
    for number in 0..4 {
        engine.inject_of(number % shards, behind, 0);
    }
    engine.run_until(seconds(60));
    let sent = engine.sent_by(behind);
    assert_eq!(sent.len(), 4, "{behind} behind {ahead} with {shards} shards");
    let others = engine.sent_by(ahead)[before..].iter().filter(|at| **at <= sent[3]).count();
    (others, sent[3] - seconds(3))
}

#[test]
fn flows_under_one_limit_share_a_pair() {
    for shards in [1, 2, 4] {
        for limit in ["8/s", "12/s", "30/s", "500/s"] {
            let under_way = 4 + 2 * shards;
            let (others, _) = waits_behind("large", "small", limit, shards);
            assert!(others <= 4 + under_way, "{others} of the same class, {shards} shards, {limit}");
            let (others, _) = waits_behind("high", "bulk", limit, shards);
            assert!(others <= 16 * 5 + under_way, "{others} of a higher class, {shards} shards, {limit}");
            let (_, wait) = waits_behind("bulk", "high", limit, shards);
            assert!(wait < seconds(2), "{wait:?}, {shards} shards, {limit}");
        }
    }
}

#[test]
fn a_limit_can_be_of_a_domain_or_a_pool() {
    for shards in [1, 2, 4] {
        for (selector, covers_both) in [("domain = \"slow.test\"", false), ("egress_pool = \"default\"", true)] {
            let rules = rules("1000/s");
            let limit = format!("[[limit]]\nname = \"some\"\n{selector}\nmax_message_rate = \"20/s\"\n");
            let mut engine = Engine::start(&format!("{rules}{limit}"), shards);
            engine.queue_of("a", 600, &["slow.test", "fast.test"]);
            engine.queue_of("b", 600, &["slow.test", "fast.test"]);
            engine.run_until(seconds(11));
            let what = format!("{selector} with {shards} shards");
            let [slow, fast] = [SLOW, FAST].map(|site| engine.sink(site));
            let mut limited = Sink { mails: slow.mails.clone(), ..Sink::default() };
            match covers_both {
                true => limited.mails.extend(&fast.mails),
                false => assert_eq!(fast.mails.len(), 600, "{what}: what it does not name goes at full speed"),
            }
            limited.mails.sort();
            assert!(limited.most_within(seconds(1)) <= 20, "{what}: {}", limited.most_within(seconds(1)));
            assert!(limited.mails.len() >= 19 * 10, "{what}: {}", limited.mails.len());
        }
    }
}

#[test]
fn a_tenants_limit_is_over_sources_sites_and_shards() {
    for shards in [1, 2, 4] {
        let mut engine = Engine::start(&rules("20/s"), shards);
        engine.queue_of("a", 1_000, &["slow.test"]);
        engine.queue_of("a", 1_000, &["fast.test"]);
        engine.run_until(seconds(21));
        let sent = engine.sent_by("a");
        assert!(most_within(sent, seconds(1)) <= 20);
        assert!(sent.len() >= 19 * 20, "{} with {shards} shards", sent.len());
        let halves = [SLOW, FAST].map(|site| engine.sink(site).mails.len());
        assert!(halves[0].abs_diff(halves[1]) <= 40, "{halves:?} with {shards} shards");
        assert_eq!(engine.sources.len(), 4, "by each source to each site");
    }
}

fn holds_over_kills(rules: &str, period: Duration, limit: usize, life: Duration) {
    for shards in [[2, 2], [4, 2], [1, 4]] {
        let mut engine = Engine::start(rules, shards[0]);
        let mean = limit as f64 / period.as_secs_f64();
        engine.queue_of("a", (3.0 * mean * life.as_secs_f64()) as usize, &["slow.test", "fast.test"]);
        engine.run_until(life);
        let before = engine.sent_by("a").to_vec();
        let mut engine = engine.kill(shards[1]);
        let again = engine.now;
        engine.run_until(again + life);
        let after = engine.sent_by("a");
        let most = most_within(&[&before, after].concat(), period);
        assert!(most <= limit, "{most} within {period:?}");
        for sent in [&before, after] {
            // The first second of a life counts as used up.
            let rate = sent.len() as f64 / (life - seconds(1)).as_secs_f64();
            assert!(rate >= 0.95 * mean, "{rate} a second, of {mean}, with {shards:?} shards");
        }
    }
}

#[test]
fn they_hold_over_a_kill_and_a_change_of_shards() {
    holds_over_kills(&rules("20/s"), seconds(1), 20, seconds(15));
}

/// A window of a minute spans the crash: what was sent before counts after it.
#[test]
fn longer_ones_hold_over_a_kill_and_a_change_of_shards() {
    holds_over_kills(&rules("600/min"), seconds(60), 600, seconds(90));
}

#[test]
fn a_limit_at_a_provider_leaves_the_rest_alone() {
    let limit = "[[limit]]\nname = \"a at p\"\ntenant = \"a\"\nprovider = \"p\"\nmax_message_rate = \"10/s\"\n";
    let rules = rules("100/s") + PROVIDER + limit;
    let mut engine = Engine::start(&rules, 2);
    engine.queue_of("a", 1_000, &["slow.test"]);
    engine.queue_of("a", 1_000, &["fast.test"]);
    engine.queue_of("b", 500, &["slow.test"]);
    engine.run_until(seconds(11));
    assert_eq!(engine.sent_by("b").len(), 500);
    let sent = engine.sent_by("a");
    assert!(most_within(sent, seconds(1)) <= 100, "the tenant's own limit holds too");
    assert!(sent.len() >= 950, "{}", sent.len());
    let at_slow = engine.sink(SLOW).mails.len() - 500;
    assert!((95..=100).contains(&at_slow), "{at_slow}");
}

/// FAIR: tenants that share one limit share it evenly, and a higher class passes.
#[test]
fn a_shared_limit_is_shared_by_turns() {
    for shards in [1, 2, 4] {
        let tenants =
            "[[tenant]]\nname = \"a\"\n[[tenant]]\nname = \"b\"\n[[tenant]]\nname = \"c\"\npriority = \"high\"\n";
        let limit = "[[limit]]\nname = \"all\"\nmax_message_rate = \"20/s\"\n";
        let mut engine = Engine::start(&format!("{SOURCES}{tenants}{limit}"), shards);
        engine.queue_of("a", 2_000, &["slow.test", "fast.test"]);
        engine.run_until(seconds(3));
        engine.queue_of("b", 60, &["slow.test"]);
        engine.run_until(seconds(5));
        engine.queue_of("c", 1, &["fast.test"]);
        engine.run_until(seconds(5) + Duration::from_millis(200));
        assert_eq!(engine.sent_by("c").len(), 1, "with {shards} shards");
        engine.run_until(seconds(10));
        let last = engine.sent_by("b").last().copied().unwrap_or(Duration::MAX);
        assert_eq!(engine.sent_by("b").len(), 60, "with {shards} shards: {last:?}");
    }
}

/// Recipients count, not transactions, and none has more than its part of the limit.
#[test]
fn recipients_are_counted() {
    let mut engine = Engine::start(&rules("100/s"), 2);
    for number in 0..200 {
        let recipients = (0..1 + number % 12).map(|place| format!("r{place}@slow.test")).collect();
        engine.inject_for(number % 2, "a", 0, recipients);
    }
    engine.run_until(seconds(9));
    let sink = engine.sink(SLOW);
    assert!(sink.mails.iter().all(|(_, recipients)| *recipients <= 5));
    assert!(sink.most_within(seconds(1)) <= 100);
    let sent: u32 = sink.mails.iter().map(|(_, recipients)| recipients).sum();
    assert!(sent >= 700, "{sent}");
}

/// The pair lets fewer recipients go together than the tenant's limit does.
#[test]
fn a_permit_is_no_more_than_the_pair_can_use() {
    let rules = rules("100/s") + "[shaping.\"slow.test\"]\nmax_message_rate = \"2/s\"\n";
    let mut engine = Engine::start(&rules, 2);
    for number in 0..20 {
        engine.inject_for(number % 2, "a", 0, (0..5).map(|place| format!("r{place}@slow.test")).collect());
    }
    engine.run_until(seconds(28));
    let sent: u32 = engine.sink(SLOW).mails.iter().map(|(_, recipients)| recipients).sum();
    assert_eq!(sent, 100, "by each source two a second");
}

/// A paced pair and a site that takes nothing hold none of the tenant's permits for longer than they can use them.
#[test]
fn a_slow_site_keeps_no_permits() {
    for shards in [1, 2] {
        let rules = rules("20/s") + "[shaping.\"slow.test\"]\nmax_message_rate = \"1/min\"\n";
        let mut engine = Engine::start(&rules, shards);
        engine.queue_of("a", 1_000, &["slow.test"]);
        engine.queue_of("a", 1_000, &["fast.test"]);
        engine.run_until(seconds(21));
        assert!(engine.sink(FAST).mails.len() >= 19 * 19, "{}", engine.sink(FAST).mails.len());
        assert!(engine.sink(SLOW).mails.len() <= 2);
    }
}

/// FAIR: at a pair so slow that a permit would be given back before its time, a lower class has its part.
#[test]
fn a_slow_pair_under_a_limit_shares_by_turns() {
    for shards in [1, 2, 4] {
        let tenants = "[[tenant]]\nname = \"b\"\npriority = \"bulk\"\n[[tenant]]\nname = \"c\"\npriority = \"high\"\n";
        let limit = "[[limit]]\nname = \"all\"\nmax_message_rate = \"20/s\"\n";
        let pair = "[shaping.\"slow.test\"]\nmax_message_rate = \"30/min\"\n";
        let mut engine = Engine::start(&format!("{tenants}{limit}{pair}"), shards);
        engine.queue_of("c", 400, &["slow.test"]);
        engine.run_until(seconds(10));
        engine.queue_of("b", 6, &["slow.test"]);
        engine.run_until(seconds(300));
        let bulk = engine.sent_by("b").len();
        assert_eq!(bulk, 6, "with {shards} shards");
        assert!(engine.sink(SLOW).mails.len() >= 147, "{}", engine.sink(SLOW).mails.len());
    }
}

/// FAIR: who asks for a permit has its part beside one that needs none and so has tickets in hand all the time.
#[test]
fn a_flow_under_a_limit_has_its_part_beside_one_that_is_under_none() {
    for (behind, ahead, expected) in [("normal", "normal", 20), ("bulk", "high", 2), ("high", "bulk", 20)] {
        for shards in [1, 2, 4] {
            let tenants = format!(
                "[[tenant]]\nname = \"a\"\npriority = \"{ahead}\"\n\
                 [[tenant]]\nname = \"b\"\npriority = \"{behind}\"\nmax_message_rate = \"50/s\"\n"
            );
            let pair = "[shaping.\"slow.test\"]\nmax_message_rate = \"2/s\"\n";
            let mut engine = Engine::start(&format!("{tenants}{pair}"), shards);
            engine.queue_of("a", 400, &["slow.test"]);
            engine.run_until(seconds(10));
            engine.queue_of("b", 20, &["slow.test"]);
            engine.run_until(seconds(35));
            let sent = engine.sent_by("b").len();
            assert!(sent >= expected, "{sent} of {behind} behind {ahead} with {shards} shards");
        }
    }
}

/// `blocked_by` names the limit.
#[test]
fn what_waits_for_a_limit_says_so() {
    let mut engine = Engine::start(&rules("1/min"), 2);
    engine.queue_of("a", 10, &["slow.test"]);
    engine.run_until(seconds(5));
    let home = &engine.shards[1].home;
    let blocked = home.entries().find_map(|(key, _)| home.blocked_by(key)).expect("one of them tells");
    assert_eq!(&*blocked.reason, "rate limit of 1/min of tenant a");
}

/// One shard counts what all take.
#[test]
fn an_injection_rate_is_over_all_shards() {
    for shards in [1, 2, 4] {
        let tenant = "[[tenant]]\nname = \"a\"\nmax_injection_rate = \"10/s\"\n";
        let mut engine = Engine::start(tenant, shards);
        for tenth in 0..100 {
            engine.run_until(Duration::from_millis(100 * tenth));
            engine.queue_of("a", 3, &["fast.test"]);
        }
        engine.run_until(seconds(12));
        let accepted = engine.sent_by("a").len();
        assert_eq!(accepted + engine.put_off, 300);
        assert!((96..=110).contains(&accepted), "{accepted} with {shards} shards");
    }
}

/// Mail of one recipient and of several, under limits of their own at a pair that has a rate, too.
#[test]
fn limited_flows_of_mixed_sizes_go_on_at_a_paced_pair() {
    let rules = "[shaping.default]\nconnection_limit = 6\nmax_message_rate = \"300/s\"\n\
                 [[tenant]]\nname = \"acme\"\npriority = \"high\"\nmax_message_rate = \"100/s\"\n[[tenant]]\nname = \"b\"\n\
                 [[limit]]\nname = \"minute\"\ncampaign = \"1\"\nmax_message_rate = \"200/min\"\n";
    for shards in [1, 2] {
        let mut engine = Engine::start(rules, shards);
        let mut recipients = 0;
        for number in 0..400 {
            let count = [1, 1, 2, 5][number * 7 % 11 % 4];
            let to = (0..count).map(|to| format!("r{to}@{SLOW_DOMAIN}")).collect();
            if number % 2 == 0 {
                recipients += count;
                engine.inject_for(number % shards, "acme", 0, to);
            } else {
                engine.inject_for(number % shards, "b", 1, to);
            }
            engine.run_until(Duration::from_millis(15 * number as u64));
        }
        let end = engine.now + seconds(recipients as u64 / 100 + 2);
        engine.run_until(end);
        assert_eq!(engine.sent_by("acme").len(), 200, "{shards} shards, {recipients} recipients");
    }
}
