//! A keeper by itself: what it permits, to whom, and when.

use std::path::Path;

use super::*;
use crate::config::Config;
use crate::handover::PairKey;
use crate::limits::ARRIVAL_SPREAD;

/// That of a limit, as it is held.
const SECOND: Duration = Duration::from_secs(1).saturating_add(ARRIVAL_SPREAD);

/// A keeper and what it has permitted, by tenant.
struct Bench {
    keeper: Keeper,
    rules: Arc<SharedLimits>,
    now: Now,
    permits: Vec<(Duration, Arc<str>, Permit)>,
    waits: usize,
    reserved: Vec<(Arc<str>, u32)>,
    generation: Generation,
}

impl Bench {
    /// The first second of short limits, which counts as used up, is over.
    fn new(rules: &str) -> Self {
        let text = format!("{rules}[spool]\nallow_filesystem = true\n");
        let config = Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap();
        let rules = Arc::new(SharedLimits::new(&config));
        let mut keeper = Keeper::new(Arc::clone(&rules));
        let now = Now { monotonic: Duration::ZERO, wall_ms: 1_800_000_000_000 };
        keeper.begin(now);
        let mut bench = Self {
            keeper,
            rules,
            now,
            permits: Vec::new(),
            waits: 0,
            reserved: Vec::new(),
            generation: Generation::default(),
        };
        bench.pass(SECOND);
        bench
    }

    fn want(&mut self, priority: u8, tenant: &str, provider: &str, units: u32) {
        let flow = Arc::new(Flow { priority, tenant: tenant.into(), campaign: "".into(), ..Flow::default() });
        let pair = PairKey { source: 0, rollup: provider.into(), site: "mx.test".into() };
        let limits = pair.shared_limits(&self.rules, &flow).expect("some limit covers it");
        self.keeper
            .handle_want(self.now, Want { owner: 0, home: 0, pair, flow, limits, units, generation: self.generation });
        self.listen();
    }

    fn listen(&mut self) {
        while let Some(said) = self.keeper.poll() {
            match said {
                Said::Answer { answer: WantAnswer { permit: None, .. }, .. } => self.waits += 1,
                Said::Answer { answer: WantAnswer { permit: Some(permit), flow, .. }, .. } => {
                    self.permits.push((self.now.monotonic, Arc::clone(&flow.tenant), permit));
                }
                Said::Reserve { limit, units, .. } => self.reserved.push((limit, units)),
                Said::Holds { .. } | Said::Unwanted { .. } => {}
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now.monotonic + time;
        loop {
            let next = self.keeper.next_timeout().filter(|&next| next <= end);
            let at = next.unwrap_or(end).max(self.now.monotonic);
            self.now.wall_ms += (at - self.now.monotonic).as_millis() as u64;
            self.now.monotonic = at;
            if next.is_none() {
                return;
            }
            self.keeper.wake(self.now);
            self.listen();
        }
    }

    fn spend(&mut self, place: usize, at: Option<Duration>) {
        let permit = self.permits[place].2.clone();
        self.keeper.handle_spent(self.now, &permit, at);
        self.listen();
    }

    fn tenants(&self) -> String {
        self.permits.iter().map(|(_, tenant, _)| &**tenant).collect()
    }
}

fn tenant(name: &str, rate: &str) -> String {
    format!("[[tenant]]\nname = \"{name}\"\nmax_message_rate = \"{rate}\"\n")
}

#[test]
fn what_is_permitted_counts_until_it_is_used_and_a_period_longer() {
    let mut bench = Bench::new(&tenant("a", "2/s,max_burst=2"));
    (0..4).for_each(|_| bench.want(1, "a", "p", 1));
    assert_eq!((bench.permits.len(), bench.waits), (2, 2));
    bench.pass(60 * SECOND);
    assert_eq!(bench.permits.len(), 2, "nobody has told what became of them");
    let used = bench.now.monotonic;
    bench.spend(0, Some(used));
    bench.pass(SECOND / 2);
    assert_eq!(bench.permits.len(), 2);
    bench.spend(1, None);
    assert_eq!(bench.permits.len(), 3, "what was not used goes to the next at once");
    bench.pass(SECOND);
    assert_eq!(bench.permits.len(), 4);
    assert_eq!(bench.permits[3].0, used + SECOND);
}

#[test]
fn a_want_needs_all_its_limits_and_takes_of_none_while_it_waits() {
    let rules = tenant("a", "1/s") + &tenant("b", "100/s");
    let provider = "[provider.p]\nmatch = [{ domain = \"p.test\" }]\n[[limit]]\nname = \"p\"\nprovider = \"p\"\n\
                    max_message_rate = \"1/s\"\n";
    let mut bench = Bench::new(&(rules + provider));
    bench.want(1, "a", "p", 1);
    bench.want(1, "a", "q", 1);
    bench.want(1, "b", "p", 1);
    assert_eq!(bench.tenants(), "a", "the others wait for a's limit and for p's");
    bench.want(1, "b", "q", 1);
    assert_eq!(bench.tenants(), "ab");
    bench.spend(0, Some(bench.now.monotonic));
    bench.pass(SECOND);
    assert_eq!(bench.tenants(), "abab", "each limit let one pass");
}

#[test]
fn those_that_wait_go_by_turns() {
    let mut bench = Bench::new("[[limit]]\nname = \"all\"\nmax_message_rate = \"10/s\"\n");
    (0..20).for_each(|_| bench.want(1, "a", "p", 1));
    (0..2).for_each(|_| bench.want(1, "b", "p", 1));
    bench.want(0, "c", "p", 1);
    let mut told = 0;
    for _ in 0..40 {
        while told < bench.permits.len() {
            let at = bench.permits[told].0;
            bench.spend(told, Some(at));
            told += 1;
        }
        bench.pass(SECOND / 10);
    }
    assert_eq!(bench.permits.len(), 23);
    let order = bench.tenants();
    assert!(order.find('c').unwrap() <= 2 && order.rfind('b').unwrap() <= 6, "{order}");
    let times: Vec<Duration> = bench.permits.iter().map(|(at, ..)| *at).collect();
    assert!(times.windows(11).all(|window| window[10] - window[0] >= SECOND), "{times:?}");
}

#[test]
fn who_comes_stands_behind_those_that_wait() {
    let mut bench = Bench::new("[[limit]]\nname = \"all\"\nmax_message_rate = \"10/s\"\n");
    ["x", "a", "a"].into_iter().for_each(|tenant| bench.want(1, tenant, "p", 1));
    // It may pass by now, and the keeper was not woken yet.
    bench.now.monotonic += SECOND / 10;
    bench.want(1, "b", "p", 1);
    assert_eq!(bench.tenants(), "xa");
}

#[test]
fn a_turn_that_came_to_nothing_is_had_again() {
    let mut bench = Bench::new("[[limit]]\nname = \"all\"\nmax_message_rate = \"10/s\"\n");
    bench.want(1, "x", "p", 1);
    ["a", "b"].into_iter().for_each(|tenant| (0..20).for_each(|_| bench.want(1, tenant, "p", 1)));
    for told in 1..25 {
        bench.pass(SECOND / 10);
        let (at, ref tenant, _) = bench.permits[told];
        let is_used = &**tenant == "b";
        bench.spend(told, is_used.then_some(at));
    }
    let order = bench.tenants();
    assert!(order[1..25].matches('a').count() >= 15, "{order}");
}

/// What is lent may be used late: only what has been used is behind the last reservation.
#[test]
fn longer_limits_are_reserved_ahead_of_what_is_lent() {
    let mut bench = Bench::new(&tenant("a", "600/min,max_burst=600"));
    (0..9).for_each(|_| bench.want(1, "a", "p", 1));
    assert_eq!(bench.permits.len(), 0, "nothing is reserved yet");
    let answer = |bench: &mut Bench| {
        for (limit, units) in std::mem::take(&mut bench.reserved) {
            assert!(bench.keeper.handle_reserved(bench.now, &limit, units));
            bench.listen();
        }
    };
    assert_eq!(&*bench.reserved[0].0, "tenant a");
    answer(&mut bench);
    assert_eq!(bench.permits.len(), 9);
    assert!(!bench.keeper.handle_reserved(bench.now, "tenant b", 1), "it is none of these");
}

/// Who wants something still asks again, under the new configuration: what waited would be permitted twice.
#[test]
fn a_reload_ends_all_waiting_and_forgets_no_use() {
    let mut bench = Bench::new(&tenant("a", "1/s"));
    (0..3).for_each(|_| bench.want(1, "a", "p", 1));
    assert_eq!((bench.permits.len(), bench.waits), (1, 2));
    bench.keeper.reload(bench.now, Generation(1), Arc::clone(&bench.rules));
    bench.spend(0, Some(bench.now.monotonic));
    bench.generation = Generation(1);
    bench.want(1, "a", "p", 1);
    assert_eq!(bench.permits.len(), 1, "what was used before counts");
    bench.pass(60 * SECOND);
    assert_eq!(bench.permits.len(), 2);
    bench.spend(1, None);
    bench.pass(60 * SECOND);
    assert_eq!(bench.permits.len(), 2, "nobody else waits");
}

/// One that has waited for its tenant's limit does not start anew behind all others at the next.
#[test]
fn who_has_had_a_turn_stands_in_front() {
    let rules = tenant("a", "1/s") + "[[limit]]\nname = \"all\"\nmax_message_rate = \"2/s\"\n";
    let mut bench = Bench::new(&rules);
    bench.want(1, "a", "p", 1);
    bench.want(1, "a", "p", 1);
    (0..30).for_each(|_| bench.want(1, "b", "p", 1));
    let mut told = 0;
    for _ in 0..200 {
        while told < bench.permits.len() {
            let at = bench.permits[told].0;
            bench.spend(told, Some(at));
            told += 1;
        }
        bench.pass(SECOND / 20);
    }
    let order = bench.tenants();
    assert!((1..=4).contains(&order.rfind('a').unwrap()), "{order}");
}

/// Its owner lets a roll-up go: what it asked for there takes nobody's place, and the others go on.
#[test]
fn what_is_not_wanted_any_more_gives_way() {
    let mut bench = Bench::new(&tenant("a", "1/s"));
    for provider in ["p", "p", "q", "p", "q"] {
        bench.want(1, "a", provider, 1);
    }
    assert_eq!((bench.permits.len(), bench.waits), (1, 4));
    bench.spend(0, Some(bench.now.monotonic));
    let rollup = RollupKey { source: 0, rollup: "p".into() };
    bench.keeper.handle_unwant(bench.now, 1, rollup.clone(), 6);
    assert!(matches!(bench.keeper.poll(), Some(Said::Unwanted { owner: 1, number: 6, .. })), "another's stay");
    bench.keeper.handle_unwant(bench.now, 0, rollup, 7);
    bench.listen();
    for place in 1..3 {
        bench.pass(SECOND);
        assert_eq!(bench.permits.len(), place + 1, "one a second goes on");
        bench.spend(place, Some(bench.now.monotonic));
    }
    bench.pass(60 * SECOND);
    assert_eq!(bench.permits.len(), 3, "and no more is wanted");
}
