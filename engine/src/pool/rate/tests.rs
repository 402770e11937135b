//! No window has more than the limit, the mean is near it, and neither changes over a crash.

use proptest::prelude::*;

use super::*;

fn rate(count: u32, seconds: u64, max_burst: u32) -> Rate {
    Rate { count, period: Duration::from_secs(seconds), max_burst }
}

/// An engine's life: everything that may be taken is, as soon as it may, `late` after its time.
struct Life {
    limiter: Limiter,
    now: Duration,
    started: Started,
    past: Past,
}

impl Life {
    fn start(rate: Rate, started: Started, past: &Past) -> Self {
        let limiter = Limiter::new(rate, started, Some(past));
        Self { limiter, now: started.monotonic, started, past: past.clone() }
    }

    /// Monotonic time is another in each life; wall time goes on.
    fn wall(&self) -> Duration {
        Duration::from_millis(self.started.wall_ms) + self.now - self.started.monotonic
    }

    /// What a stop leaves.
    fn leave(&self) -> Past {
        self.limiter.past(Now { monotonic: self.now, wall_ms: self.wall().as_millis() as u64 }).unwrap_or_default()
    }

    /// Takes so many units once their time has come, and tells the wall time.
    fn take(&mut self, units: u32, late: Duration) -> Duration {
        while let Some(amount) = self.limiter.reserve() {
            let at_ms = self.wall().as_millis() as u64;
            self.past.reserved.push((at_ms, amount));
            self.limiter.reserved(amount);
        }
        assert!(self.limiter.is_reserved(units));
        self.now = self.now.max(self.limiter.ready_at(units)) + late;
        self.limiter.take(self.now, units);
        self.wall()
    }
}

/// The most units in any half-open window of the period.
fn most(taken: &[(Duration, u32)], period: Duration) -> u32 {
    let (mut most, mut sum, mut first) = (0, 0, 0);
    for &(at, units) in taken {
        sum += units;
        while taken[first].0 + period <= at {
            sum -= taken[first].1;
            first += 1;
        }
        most = most.max(sum);
    }
    most
}

/// That of the limit, as it is held.
fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds) + ARRIVAL_SPREAD
}

const START: Started = Started { monotonic: Duration::from_secs(5), wall_ms: 1_800_000_000_000 };

fn rates() -> impl Strategy<Value = Rate> {
    let count = prop_oneof![1_u32..30, 1_u32..2_000];
    (count, prop::sample::select(vec![1_u64, 60, 3_600]), 0_u32..1_000).prop_map(|(count, seconds, burst)| {
        let max_burst = if burst < 500 { 1 } else { 1 + burst % count };
        rate(count, seconds, max_burst)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Also over crashes and stops, with lateness, pauses, and transactions of several recipients; and also where the
    /// first of a window is held up on its way by `ARRIVAL_SPREAD`.
    #[test]
    fn no_window_has_more_than_the_limit(
        rate in rates(),
        lives in prop::collection::vec((any::<bool>(), 0_u64..3_000, prop::collection::vec((1_u32..40, 0_u64..40, 0_u8..20), 1..300)), 1..4),
    ) {
        let (mut taken, mut past, mut started) = (Vec::new(), Past::default(), START);
        for (stops, gap, steps) in lives {
            let mut life = Life::start(rate, started, &past);
            for (units, late, pause) in steps {
                let interval = rate.period / rate.count;
                if pause == 0 {
                    life.now += interval * 7;
                }
                let late = Duration::from_millis(late % 20).min(interval) * u32::from(late > 20);
                let units = units.min(rate.batch_max());
                taken.push((life.take(units, late), units));
            }
            let crashed = life.wall() + Duration::from_millis(gap);
            past = if stops { life.leave() } else { life.past };
            // The clock of the next life begins anew, and counts whole milliseconds of wall time.
            started = Started { monotonic: Duration::from_millis(gap), wall_ms: crashed.as_millis() as u64 + 1 };
        }
        let most = most(&taken, rate.period + ARRIVAL_SPREAD);
        prop_assert!(most <= rate.count, "{most} in a window of {rate}");
    }

    #[test]
    fn the_mean_is_near_the_limit(rate in rates()) {
        let mut life = Life::start(rate, START, &Past::default());
        let periods = 5;
        // From the moment at which a period without memory is over.
        let first = life.take(1, Duration::ZERO);
        let mut last = first;
        for _ in 0..periods * rate.count {
            last = life.take(1, Duration::ZERO);
        }
        let mean = f64::from(periods) * rate.period.as_secs_f64() / (last - first).as_secs_f64();
        prop_assert!(mean >= 0.95, "{mean} of {rate}");
    }
}

#[test]
fn units_are_paced_evenly() {
    let mut life = Life::start(rate(20, 1, 1), START, &Past::default());
    let first = life.take(1, Duration::ZERO);
    assert_eq!(first, life.wall());
    assert_eq!(life.now, START.monotonic + seconds(1), "a short period begins as if it had been used up");
    for step in 1..100 {
        assert_eq!(life.take(1, Duration::ZERO) - first, seconds(1) / 20 * step);
    }
    // A third of a nanosecond is not lost.
    let mut life = Life::start(rate(3, 1, 1), START, &Past::default());
    let first = life.take(1, Duration::ZERO);
    let third = (0..300).map(|_| life.take(1, Duration::ZERO)).last().unwrap();
    assert!(third - first <= seconds(1) * 100 + Duration::from_micros(1), "{:?}", third - first);
}

#[test]
fn a_pause_earns_a_burst_and_no_more() {
    let mut life = Life::start(rate(20, 1, 5), START, &Past::default());
    life.now += Duration::from_secs(60);
    let at: Vec<Duration> = (0..7).map(|_| life.take(1, Duration::ZERO)).collect();
    assert!(at[..5].iter().all(|time| *time == at[0]));
    assert_eq!([at[5] - at[0], at[6] - at[0]], [1, 2].map(|units| seconds(1) / 20 * units));
}

#[test]
fn a_little_lateness_does_not_add_up() {
    let mut life = Life::start(rate(100, 1, 1), START, &Past::default());
    let first = life.take(1, Duration::ZERO);
    let mut last = first;
    for _ in 0..1_000 {
        last = life.take(1, Duration::from_millis(2));
    }
    assert!(last - first <= seconds(1) * 10 + Duration::from_millis(100), "{:?}", last - first);
}

#[test]
fn a_crash_uses_up_what_was_reserved() {
    let limit = rate(1_000, 60, 1);
    let mut life = Life::start(limit, START, &Past::default());
    for _ in 0..500 {
        life.take(1, Duration::ZERO);
    }
    let reserved: u32 = life.past.reserved.iter().map(|(_, units)| units).sum();
    assert!((500..=510).contains(&reserved), "at most a hundredth of the limit: {reserved}");
    let started = Started { monotonic: Duration::ZERO, wall_ms: life.wall().as_millis() as u64 };
    let mut life = Life::start(limit, started, &life.past);
    let left = (0..)
        .take_while(|_| life.take(1, Duration::ZERO) < Duration::from_millis(started.wall_ms) + Duration::from_secs(29))
        .count();
    assert!((470..=500).contains(&left), "the rest of the window: {left}");
}

/// Without the second of two reservations that may be out, units could be taken that nobody would know of.
#[test]
fn nothing_is_taken_that_is_not_reserved() {
    let mut limiter = Limiter::new(rate(100, 60, 1), START, None);
    assert!(!limiter.is_reserved(1));
    assert_eq!([limiter.reserve(), limiter.reserve(), limiter.reserve()], [Some(1), Some(1), None]);
    limiter.reserved(1);
    assert!(limiter.is_reserved(1) && !limiter.is_reserved(2));
    limiter.take(START.monotonic, 1);
    assert!(!limiter.is_reserved(1));
    assert_eq!([limiter.reserve(), limiter.reserve()], [Some(1), None]);
}

#[test]
fn another_rate_keeps_the_window() {
    let mut life = Life::start(rate(20, 1, 1), START, &Past::default());
    life.now += Duration::from_secs(10);
    for _ in 0..20 {
        life.take(1, Duration::ZERO);
    }
    life.limiter.set_rate(life.now, rate(5, 1, 1), START, None);
    let ready = life.limiter.ready_at(1);
    assert!(ready >= life.now + Duration::from_millis(800), "15 of the 20 have to be a second old: {ready:?}");
    life.take(1, Duration::ZERO);
}

proptest! {
    /// Over changes at any time: in a window that one falls into the larger limit counts.
    #[test]
    fn no_window_has_more_than_the_larger_limit(
        counts in prop::collection::vec((1_u32..200, 0_u32..1_000), 2..5),
        seconds in prop::sample::select(vec![1_u64, 60]),
        steps in prop::collection::vec((1_u32..20, 0_u8..20), 1..120),
    ) {
        let rates: Vec<Rate> = counts.iter().map(|&(count, burst)| {
            rate(count, seconds, if burst < 500 { 1 } else { 1 + burst % count })
        }).collect();
        let mut life = Life::start(rates[0], START, &Past::default());
        let mut taken: Vec<(Duration, u32, usize)> = Vec::new();
        let mut changes = vec![Duration::ZERO];
        for (place, &next) in rates.iter().enumerate() {
            life.limiter.set_rate(life.now, next, START, None);
            changes.push(life.wall());
            for &(units, pause) in &steps {
                if pause == 0 {
                    life.now += next.period / next.count * 7;
                }
                let units = units.min(next.batch_max());
                taken.push((life.take(units, Duration::ZERO), units, place));
            }
        }
        let period = Duration::from_secs(seconds);
        for (place, &(at, ..)) in taken.iter().enumerate() {
            let within = taken[place..].iter().take_while(|(later, ..)| *later < at + period);
            let (units, last) = within.fold((0, 0), |(sum, _), &(_, units, rate)| (sum + units, rate));
            let allowed = rates[taken[place].2..=last].iter().map(|rate| rate.count).max().unwrap();
            prop_assert!(units <= allowed, "{units} from {at:?}, {allowed} allowed");
        }
    }
}

/// From 20 in a second to 20 in a minute: what went in the last second counts for a minute.
#[test]
fn a_longer_period_counts_what_the_shorter_one_knew() {
    let mut life = Life::start(rate(20, 1, 20), START, &Past::default());
    let last = (0..20).map(|_| life.take(1, Duration::ZERO)).last().unwrap();
    life.limiter.set_rate(life.now, rate(20, 60, 20), START, None);
    assert!(life.take(1, Duration::ZERO) >= last + Duration::from_secs(60));
    // And back: a minute's memory is more than enough for a second.
    life.limiter.set_rate(life.now, rate(20, 1, 20), START, None);
    let first = life.take(1, Duration::ZERO);
    assert!(life.take(1, Duration::ZERO) <= first + Duration::from_secs(1));
}

/// MAIL is under way elsewhere while the period changes, and may be written yet: also where the engine ends.
#[test]
fn what_is_lent_counts_over_another_period_and_a_stop() {
    let mut life = Life::start(rate(2, 60, 2), START, &Past::default());
    while let Some(amount) = life.limiter.reserve() {
        life.limiter.reserved(amount);
    }
    life.limiter.lend(life.now, 1);
    assert_eq!(life.leave().reserved, [(START.wall_ms, 1)], "it counts as if it were used later");
    life.limiter.set_rate(life.now, rate(2, 120, 2), START, None);
    let at = life.now + Duration::from_secs(10);
    life.limiter.settle(at, 1);
    assert_eq!(life.limiter.ready_at(2), at + seconds(120));
}

/// A transaction that came to nothing, of several recipients, costs neither time nor what was reserved.
#[test]
fn what_is_given_back_can_be_taken_again() {
    let rate = rate(1_000, 60, 10);
    let mut life = Life::start(rate, START, &Past::default());
    let mut reserved = 0;
    while let Some(amount) = life.limiter.reserve() {
        life.limiter.reserved(amount);
        reserved += amount;
    }
    for _ in 0..3 {
        life.limiter.lend(life.now, 10);
        life.limiter.give_back(10);
    }
    assert!(life.limiter.is_reserved(reserved));
    life.limiter.lend(life.now, 10);
    assert!(life.limiter.ready_at(1) <= life.now + seconds(60) / rate.count);
}

/// Who writes 100 in place of 1 an hour need not wait for the hour to be over; and nobody bursts.
#[test]
fn what_is_ahead_moves_with_the_rate() {
    let mut life = Life::start(rate(1, 3_600, 1), START, &Past::default());
    let first = life.take(1, Duration::ZERO);
    life.limiter.set_rate(life.now, rate(100, 3_600, 1), START, None);
    let second = life.take(1, Duration::ZERO);
    assert_eq!(second - first, seconds(3_600) / 100);
    assert_eq!(life.take(1, Duration::ZERO) - second, seconds(3_600) / 100);
    life.limiter.set_rate(life.now, rate(50, 3_600, 1), START, None);
    assert_eq!(life.take(1, Duration::ZERO) - second, seconds(3_600) / 100 * 3);
}

/// Two of three a minute have gone: the third goes when it is due, and a fourth with the window.
#[test]
fn a_stop_goes_on_as_if_there_had_been_none() {
    let limit = rate(3, 60, 1);
    let mut life = Life::start(limit, START, &Past::default());
    let first = life.take(1, Duration::ZERO);
    let second = life.take(1, Duration::ZERO);
    let started = Started { monotonic: Duration::from_secs(1), wall_ms: life.wall().as_millis() as u64 + 2_000 };
    let mut life = Life::start(limit, started, &life.leave());
    let third = life.take(1, Duration::ZERO);
    assert!((20_000..20_010).contains(&(third - second).as_millis()), "{:?}", third - second);
    let fourth = life.take(1, Duration::ZERO);
    assert!((60_010..60_020).contains(&(fourth - first).as_millis()), "{:?}", fourth - first);
}

/// The same where only the window tells what has gone.
#[test]
fn a_stop_in_a_burst_leaves_the_rest_of_it() {
    let limit = rate(3, 60, 3);
    let mut life = Life::start(limit, START, &Past::default());
    let first = life.take(1, Duration::ZERO);
    life.take(1, Duration::ZERO);
    let started = Started { monotonic: Duration::from_secs(1), wall_ms: life.wall().as_millis() as u64 + 2_000 };
    let mut life = Life::start(limit, started, &life.leave());
    assert_eq!((life.take(1, Duration::ZERO) - first).as_millis(), 2_000, "one was left");
    let fourth = life.take(1, Duration::ZERO);
    assert!((60_010..60_020).contains(&(fourth - first).as_millis()), "{:?}", fourth - first);
}

/// What was used before the last start is as old as it was, however often the engine is stopped.
#[test]
fn many_stops_make_nothing_younger() {
    let limit = rate(3, 60, 3);
    let mut life = Life::start(limit, START, &Past::default());
    let first = life.take(3, Duration::ZERO);
    for _ in 0..5 {
        let started = Started { monotonic: Duration::ZERO, wall_ms: life.wall().as_millis() as u64 + 1_000 };
        life = Life::start(limit, started, &life.leave());
        life.now += Duration::from_secs(10);
    }
    let fourth = life.take(1, Duration::ZERO);
    assert!((60_010..60_030).contains(&(fourth - first).as_millis()), "{:?}", fourth - first);
}

/// Also what goes so soon after a start that it would share a slice with what was before it.
#[test]
fn another_period_just_after_a_start_counts_what_has_gone() {
    let past = Past { used: vec![(START.wall_ms - 1_000, 1)], ..Past::default() };
    let mut life = Life::start(rate(1_000, 3_600, 20), START, &past);
    let last = (0..20).map(|_| life.take(1, Duration::ZERO)).last().unwrap();
    assert_eq!(last, Duration::from_millis(START.wall_ms), "a burst");
    life.limiter.set_rate(life.now, rate(21, 60, 21), START, Some(&past));
    assert!(life.take(1, Duration::ZERO) >= last + Duration::from_secs(59));
}

/// At the last stop the clock was a month ahead. What was used then counts for one period more; but pace is no further
/// ahead than what is taken together, and it held all for an hour.
#[test]
fn a_clock_that_was_ahead_at_the_last_stop_does_not_hold_the_next_life() {
    const MONTH_MS: u64 = 30 * 86_400_000;
    let rate = rate(36_000, 3_600, 100);
    let wall_ms = 1_800_000_000_000;
    let mut life =
        Life::start(rate, Started { monotonic: Duration::ZERO, wall_ms: wall_ms + MONTH_MS }, &Past::default());
    for _ in 0..10 {
        life.take(100, Duration::ZERO);
    }
    let left = life.leave();
    assert!(left.due.is_some() && !left.used.is_empty());
    let started = Started { monotonic: Duration::from_secs(5), wall_ms };
    let next = Life::start(rate, started, &left);
    let ready = next.limiter.ready_at(1);
    assert!(ready <= started.monotonic + Duration::from_secs(20), "{ready:?}");
}
