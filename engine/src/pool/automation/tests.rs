//! When rules fire, and what halving makes of limits.

use super::*;
use crate::config::Config;

fn rules(text: &str) -> Arc<[Arc<AutomationRule>]> {
    let text = format!("[spool]\nallow_filesystem = true\n{text}");
    let config = Config::from_toml(&text, "t.toml", std::path::Path::new("/nonexistent")).unwrap();
    config.shaping.automation
}

fn pair(source: usize, rollup: &str) -> PairKey {
    PairKey { source, rollup: rollup.into(), site: "mx.example".into() }
}

fn flow(tenant: &'static str, campaign: &'static str) -> Option<Flow<'static>> {
    Some(Flow { tenant, campaign, domain: "d.example" })
}

const EACH: &str = "[[shaping.default.automation]]\nwhen = 'slow'\nthreshold = \"2/min\"\naction = \"suspend\"\n\
                    for = \"1h\"\n[[shaping.default.automation]]\nwhen = 'slow'\nthreshold = \"2/min\"\n\
                    action = \"suspend_tenant\"\nfor = \"1h\"\n";

/// How many of the rules fire.
fn fires(automation: &mut Automation, seconds: u64, pair: &PairKey, flow: Option<Flow<'_>>) -> usize {
    automation.handle_answer(Duration::from_secs(seconds), &rules(EACH), pair, flow, "421 slow").len()
}

#[test]
fn each_source_rollup_and_tenant_counts_by_itself() {
    let mut automation = Automation::default();
    assert_eq!(fires(&mut automation, 0, &pair(0, "google"), flow("a", "")), 0);
    assert_eq!(fires(&mut automation, 0, &pair(1, "google"), flow("a", "")), 0);
    assert_eq!(fires(&mut automation, 0, &pair(0, "yahoo"), flow("a", "")), 0);
    assert_eq!(fires(&mut automation, 1, &pair(0, "google"), flow("b", "")), 1, "the source has two, each tenant one");
    assert_eq!(fires(&mut automation, 2, &pair(0, "google"), flow("b", "")), 1, "tenant b; the source counts anew");
    assert_eq!(fires(&mut automation, 2, &pair(1, "google"), None), 1, "before a transaction no tenant counts");
}

#[test]
fn windows_slide() {
    let mut automation = Automation::default();
    let google = pair(0, "google");
    assert_eq!(fires(&mut automation, 0, &google, None), 0);
    assert_eq!(fires(&mut automation, 60, &google, None), 0, "the first is a minute old");
    assert_eq!(fires(&mut automation, 119, &google, None), 1);
}

#[test]
fn windows_are_bounded() {
    let mut automation = Automation::default();
    for number in 0..3 * AUTOMATION_WINDOWS_MAX {
        fires(&mut automation, number as u64, &pair(number, "google"), None);
        assert!(automation.windows.len() <= AUTOMATION_WINDOWS_MAX);
    }
    let last = 3 * AUTOMATION_WINDOWS_MAX - 1;
    assert_eq!(fires(&mut automation, last as u64 + 1, &pair(last, "google"), None), 1, "the latest are known");
}

const BOTH: HalvedLimits = HalvedLimits { connection_limit: true, max_message_rate: true };
const STEP: Duration = Duration::from_secs(60);

fn configured(connections: u32, rate: Option<u32>) -> LimitSettings {
    let rate = rate.map(|count| Rate { count, period: Duration::from_secs(1), max_burst: 10 });
    LimitSettings { connection_limit: Some(connections), max_deliveries_per_connection: None, max_message_rate: rate }
}

fn numbers(settings: LimitSettings) -> (u32, u32) {
    (settings.connection_limit.unwrap(), settings.max_message_rate.unwrap().count)
}

#[test]
fn what_is_halved_climbs_back_by_tenths() {
    let whole = configured(20, Some(100));
    let (first, lasts) = Limited::halved(0, BOTH, STEP, whole, None).unwrap();
    assert_eq!((numbers(first.at(0)), lasts), ((10, 50), 5 * STEP));
    assert_eq!(numbers(first.at(59_999)), (10, 50));
    assert_eq!(numbers(first.at(60_000)), (12, 60));
    assert_eq!(numbers(first.at(240_000)), (18, 90));
    // Trouble again, on the way.
    assert!(Limited::halved(9_999, BOTH, STEP, whole, Some(&first)).is_none(), "just done");
    let (again, lasts) = Limited::halved(120_000, BOTH, STEP, whole, Some(&first)).unwrap();
    assert_eq!((numbers(again.at(120_000)), lasts), ((7, 35), 7 * STEP));
}

#[test]
fn a_half_is_never_nothing() {
    let mut limited = None;
    for count in 0..20 {
        limited = Limited::halved(count * 20_000, BOTH, STEP, configured(7, Some(3)), limited.as_ref()).map(|it| it.0);
    }
    let limited = limited.unwrap();
    assert_eq!(numbers(limited.at(380_000)), (1, 1));
    assert_eq!(limited.settings.max_message_rate.unwrap().max_burst, 1);
    let (limited, _) = Limited::halved(0, BOTH, STEP, configured(8, None), None).unwrap();
    assert_eq!(limited.at(0).max_message_rate, None, "there is none to halve");
    let rate = HalvedLimits { connection_limit: false, ..BOTH };
    assert!(Limited::halved(0, rate, STEP, configured(8, None), None).is_none());
}

/// What an owner has seen goes with the pairs that move, and nothing else does.
#[test]
fn thresholds_count_on_at_another_owner() {
    let (mut old, mut new) = (Automation::default(), Automation::default());
    let (google, yahoo) = (pair(0, "google"), pair(0, "yahoo"));
    assert_eq!(fires(&mut old, 0, &google, flow("a", "")), 0);
    assert_eq!(fires(&mut old, 0, &yahoo, flow("a", "")), 0);
    new.put(Duration::from_secs(1), old.take_out(&google.rollup_key()));
    assert_eq!(fires(&mut new, 2, &google, flow("a", "")), 2, "the second within a minute");
    assert_eq!(fires(&mut old, 2, &yahoo, flow("a", "")), 2, "and so here");
    assert_eq!(fires(&mut old, 3, &google, flow("a", "")), 0, "of which nothing is left");
}
