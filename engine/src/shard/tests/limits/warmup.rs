//! A source in its warm-up sends its day's quota and no more, also over a kill; the rest goes by the pool's others.

use super::*;

const RULES: &str = "\
[[egress_source]]
name = \"new\"
source_address = \"127.0.0.11\"
[[egress_source]]
name = \"old\"
source_address = \"127.0.0.12\"
[provider.slow]
match = [{ domain = \"slow.test\" }]
[warmup.new]
start = \"2027-01-15\"
daily.slow = [30, 50]
";
const BOTH: &str = "[[egress_pool]]\nname = \"default\"\nsources = [{ source = \"new\" }, { source = \"old\" }]\n";
const NEW_ALONE: &str = "[[egress_pool]]\nname = \"default\"\nsources = [{ source = \"new\" }]\n";

/// From the start of the tests' clock to midnight.
const TO_MIDNIGHT: Duration = Duration::from_secs(16 * 3_600);
const DAY: Duration = Duration::from_secs(86_400);

impl Engine {
    /// Recipients by the sources "new" and "old" at a site.
    fn by_source(&self, site: &str) -> [u32; 2] {
        let endpoint = Endpoint::Ip(site.parse().unwrap());
        [0, 1].map(|source| self.sources.get(&(source, endpoint)).copied().unwrap_or_default())
    }

    /// To a time of no interest before.
    fn skip_to(&mut self, time: Duration) {
        self.now = time;
        self.run_until(time + seconds(1));
    }
}

#[test]
fn a_days_quota_holds_over_a_kill_and_the_rest_goes_by_the_others() {
    for shards in [[1, 1], [2, 4]] {
        let mut engine = Engine::start(&format!("{RULES}{BOTH}"), shards[0]);
        queue(&mut engine, 20, 0);
        engine.run_until(seconds(5));
        assert_eq!(engine.by_source(SLOW), [10, 10], "what is within the quota goes turn and turn about");
        let mut engine = engine.kill(shards[1]);
        queue(&mut engine, 200, 100);
        let begun = engine.now;
        engine.run_until(begun + seconds(20));
        let [new, old] = engine.by_source(SLOW);
        assert_eq!(new + old, 220, "nothing waits");
        assert!((27..=30).contains(&new), "{new}: a crash costs little, and the quota is kept");
        let [new_fast, old_fast] = engine.by_source(FAST);
        assert_eq!(new_fast + old_fast, 100);
        assert!(new_fast >= 45, "{new_fast}: who is not named has no quota");

        engine.skip_to(TO_MIDNIGHT - seconds(60));
        queue(&mut engine, 100, 0);
        engine.run_until(TO_MIDNIGHT - seconds(1));
        assert_eq!(engine.by_source(SLOW), [new, old + 100], "until midnight it has nothing left");
        engine.skip_to(TO_MIDNIGHT + seconds(1));
        queue(&mut engine, 200, 0);
        engine.run_until(TO_MIDNIGHT + seconds(30));
        assert_eq!(engine.by_source(SLOW), [new + 50, old + 250], "the next day has its own");
        engine.skip_to(TO_MIDNIGHT + DAY + seconds(1));
        queue(&mut engine, 200, 0);
        engine.run_until(TO_MIDNIGHT + DAY + seconds(30));
        assert_eq!(engine.by_source(SLOW), [new + 150, old + 350], "and then the warm-up is over");
    }
}

/// Never outside the pool: without another source mail waits for the next day.
#[test]
fn without_another_source_mail_waits_for_the_next_day() {
    let mut engine = Engine::start(&format!("{RULES}{NEW_ALONE}"), 2);
    queue(&mut engine, 60, 0);
    engine.run_until(seconds(20));
    assert_eq!(engine.by_source(SLOW), [30, 0]);
    let home = &engine.shards[0].home;
    let held = home.entries().find_map(|(key, _)| home.blocked_by(key)).map(|blocked| blocked.reason.to_string());
    assert_eq!(held.as_deref(), Some("suspended: warm-up: 30 recipients a day"));
    engine.skip_to(TO_MIDNIGHT + seconds(1));
    engine.run_until(TO_MIDNIGHT + seconds(20));
    assert_eq!(engine.by_source(SLOW), [60, 0]);
}

/// A message to many is divided, so that a small quota is used in spite of it.
#[test]
fn many_recipients_are_divided() {
    let mut engine = Engine::start(&format!("{RULES}{NEW_ALONE}"), 1);
    let recipients = (0..100).map(|number| format!("r{number}@slow.test")).collect();
    engine.inject_to(0, recipients, Priority::Normal);
    engine.run_until(seconds(20));
    assert_eq!(engine.by_source(SLOW), [30, 0]);
}

#[test]
fn before_its_first_day_a_source_sends_nothing() {
    let mut engine = Engine::start(&format!("{RULES}{BOTH}").replace("01-15", "01-16"), 2);
    queue(&mut engine, 40, 0);
    engine.run_until(seconds(20));
    assert_eq!(engine.by_source(SLOW), [0, 40]);
}

/// Another quota holds from then on, on the same day, for what was sent before as well.
#[test]
fn a_quota_that_changes_counts_what_was_sent_before() {
    for (quota, sent) in [(40, 40), (10, 20)] {
        let mut engine = Engine::start(&format!("{RULES}{BOTH}"), 2);
        queue(&mut engine, 40, 0);
        engine.run_until(seconds(10));
        assert_eq!(engine.by_source(SLOW), [20, 20]);
        engine.reload(&format!("{RULES}{BOTH}").replace("[30, 50]", &format!("[{quota}, 50]")));
        engine.run_until(seconds(11));
        queue(&mut engine, 100, 0);
        engine.run_until(seconds(30));
        assert_eq!(engine.by_source(SLOW), [sent, 140 - sent], "{quota}");
    }
}

/// A day's quota is one, whichever shard counts it.
#[test]
fn a_days_quota_goes_with_its_pairs() {
    let mut engine = Engine::start(&format!("{RULES}{BOTH}"), 2);
    for round in 1..=10 {
        queue(&mut engine, 10, 0);
        engine.run_until(seconds(5 * round));
        engine.move_on("slow");
    }
    assert_eq!(engine.done(), 20, "those of both sources");
    assert_eq!(engine.by_source(SLOW), [30, 70]);
}

/// There may be very many sites. What was answered is not waited for.
#[test]
fn a_reservation_is_waited_for_until_it_is_there() {
    let rules = RULES.replace("daily.slow", "daily.default");
    let rates = "[shaping.default]\nmax_message_rate = \"600/min\"\nmax_connection_rate = \"600/h\"\n";
    let mut engine = Engine::start(&format!("{rules}{BOTH}{rates}"), 2);
    let awaited =
        |engine: &Engine| -> usize { engine.shards.iter().map(|shard| shard.pools.reservations_awaited()).sum() };
    engine.reserving_takes = Duration::from_millis(200);
    queue(&mut engine, 20, 20);
    engine.run_until(Duration::from_millis(100));
    assert!(awaited(&engine) > 0);
    engine.run_until(seconds(30));
    let waiting: usize = engine.shards.iter().map(|shard| shard.home.len()).sum();
    assert_eq!((awaited(&engine), waiting), (0, 0));
}
