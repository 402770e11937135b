//! A home on its own: what it needs, what it gives out, what stays.

use postrider_spool::record::{LogId, Sequence};

use super::*;
use crate::handover::RecipientGroup;
use crate::limits::STANDING_CREDITS;

fn pair() -> PairKey {
    PairKey { source: 0, rollup: "mx.example".into(), site: "mx.example".into() }
}

fn flow() -> Arc<Flow> {
    Arc::new(Flow { priority: 1, tenant: "".into(), campaign: "".into(), ..Flow::default() })
}

fn home_with(messages: u64) -> Home {
    let mut home = Home::default();
    for sequence in 1..=messages {
        insert(&mut home, sequence, (0, sequence), 10_000);
    }
    home
}

/// A message to one recipient, with its attempts so far and the time of the next.
fn insert(home: &mut Home, sequence: u64, (attempts, due_ms): (u32, u64), expires_ms: u64) {
    let group = RecipientGroup {
        domain: "peer.example".into(),
        recipients: Box::new([0]),
        attempts,
        due_ms,
        last_answer: None,
        matched: None,
    };
    home.insert(&Spooled {
        message: MessageId::new(LogId(0), Sequence(sequence)),
        tenant: String::new(),
        campaign: String::new(),
        egress_pool: "default".to_owned(),
        priority: 1,
        expires_ms,
        groups: vec![group],
    });
}

fn all_ready(home: &mut Home) {
    while let Some(entry) = home.pop_due(5_000) {
        home.make_ready(entry, &pair());
    }
}

fn needs(home: &mut Home) -> Vec<Need> {
    std::iter::from_fn(|| home.poll_need()).collect()
}

fn tickets(needs: &[Need]) -> Vec<EntryKey> {
    let ticket = |need: &Need| if let Need::Ticket { entry, .. } = need { Some(*entry) } else { None };
    needs.iter().filter_map(ticket).collect()
}

/// What the owner was told: how much is ready, and how many credits it gets back.
fn told(needs: &[Need]) -> Vec<(usize, u32)> {
    let told = |need: &Need| match need {
        Need::Tell { backlog, unused, .. } => Some((backlog.ready, *unused)),
        _ => None,
    };
    needs.iter().filter_map(told).collect()
}

#[test]
fn a_new_pair_asks_for_its_owner_once_and_sends_the_standing_tickets() {
    let mut home = home_with(10);
    all_ready(&mut home);
    assert_eq!(needs(&mut home), [Need::Owner { pair: pair() }]);
    home.set_owner(&pair(), 1);
    let needs = needs(&mut home);
    assert_eq!(tickets(&needs).len(), STANDING_CREDITS as usize);
    assert_eq!((home.out(), home.ready()), (2, 8));
    assert!(told(&needs).is_empty(), "the tickets say how many are left");
}

#[test]
fn credits_are_spent_to_the_last_and_no_further() {
    let mut home = home_with(10);
    all_ready(&mut home);
    home.set_owner(&pair(), 0);
    needs(&mut home);
    home.add_credits(&pair(), None, 3);
    assert_eq!(tickets(&needs(&mut home)).len(), 3);
    home.add_credits(&pair(), None, 100);
    assert_eq!(tickets(&needs(&mut home)).len(), 5);
    assert_eq!((home.out(), home.ready()), (10, 0));
}

/// No ticket could be made on them.
#[test]
fn credits_of_no_use_go_to_the_next_entry_or_back() {
    let mut home = home_with(10);
    all_ready(&mut home);
    home.set_owner(&pair(), 0);
    needs(&mut home);
    home.return_credit(0, &pair(), &flow(), Credit::Standing);
    assert_eq!(tickets(&needs(&mut home)).len(), 1);
    home.return_credit(0, &pair(), &flow(), Credit::Turn);
    assert_eq!(told(&needs(&mut home)), [(7, 1)]);
    home.return_credit(1, &pair(), &flow(), Credit::Turn);
    assert_eq!(needs(&mut home), [], "another owner's is nothing to this one");
}

#[test]
fn the_owner_is_told_when_what_it_waits_for_has_gone() {
    let mut home = home_with(10);
    all_ready(&mut home);
    home.set_owner(&pair(), 0);
    needs(&mut home);
    for (entry, _) in home.sweep_expired(20_000) {
        home.remove(entry);
    }
    assert_eq!(home.len(), 2, "what is out is waited for");
    home.add_credits(&pair(), Some(&flow()), 8);
    let needs = needs(&mut home);
    assert_eq!((tickets(&needs).len(), told(&needs)), (0, vec![(0, 8)]));
}

/// It was deferred by a clock that was far ahead, and the engine was started since.
#[test]
fn no_retry_waits_for_longer_than_any_does() {
    const EXPIRES_MS: u64 = 100 * 86_400_000;
    let mut home = Home::default();
    let far_ms = RETRY_PAUSE_MAX.as_millis() as u64;
    let entries = [(1, far_ms + 5_000), (1, far_ms + 5_001), (0, far_ms + 5_001), (1, EXPIRES_MS)];
    for (sequence, times) in (1..).zip(entries) {
        insert(&mut home, sequence, times, EXPIRES_MS);
    }
    assert_eq!(home.sweep_expired(5_000), []);
    let due: Vec<u64> = (1..=4)
        .filter_map(|sequence| home.entries().find(|(_, entry)| entry.message.sequence() == Sequence(sequence)))
        .map(|(_, entry)| entry.due_ms)
        .collect();
    assert_eq!(due, [far_ms + 5_000, 5_000, far_ms + 5_001, EXPIRES_MS]);
    let first = home.pop_due(5_000).map(|key| home.entry(key).message.sequence());
    assert_eq!((first, home.pop_due(5_000)), (Some(Sequence(2)), None));
}

#[test]
fn a_blocked_pair_keeps_attempts_and_due_time_and_says_why() {
    let mut home = home_with(3);
    all_ready(&mut home);
    home.set_owner(&pair(), 0);
    let out = tickets(&needs(&mut home));
    for &entry in &out {
        home.take_back(entry);
        home.make_ready(entry, &pair());
    }
    home.block_pair(&pair(), Blocked { until_ms: 9_000, reason: "refused".into() });
    assert_eq!((home.out(), home.ready()), (0, 3));
    for key in [EntryKey(0), EntryKey(1), EntryKey(2)] {
        assert_eq!(home.blocked_by(key).map(|blocked| blocked.until_ms), Some(9_000));
        assert_eq!((home.entry(key).attempts, home.entry(key).due_ms), (0, u64::from(key.0) + 1));
    }
    needs(&mut home);
    home.add_credits(&pair(), None, 3);
    assert_eq!(tickets(&needs(&mut home)).len(), 3, "credits end the block");
    assert_eq!(home.blocked_by(EntryKey(0)), None);
}

/// What was ready by an older answer of the DNS comes back from its pair; the domain is not asked for any earlier.
#[test]
fn a_domain_that_is_held_waits_as_long_as_the_dns_has_it_wait() {
    let blocked = |until_ms, reason: &str| Blocked { until_ms, reason: reason.into() };
    for (dns_ms, held_ms, until_ms) in [(9_000, 7_000, 9_000), (7_000, 9_000, 9_000)] {
        let mut home = home_with(2);
        let (first, second) = (home.pop_due(5_000).unwrap(), home.pop_due(5_000).unwrap());
        home.wait_for_route(first);
        let route = home.queue_of(first).route.clone();
        home.block_domain(&route, blocked(dns_ms, "DNS"));
        home.hold(second, &pair(), blocked(held_ms, "TLS"));
        needs(&mut home);
        assert!(home.is_held(&route));
        home.unblock_domains(until_ms - 1);
        assert_eq!(needs(&mut home), []);
        home.unblock_domains(until_ms);
        assert_eq!(needs(&mut home), [Need::Route { key: route }]);
    }
}

#[test]
fn a_suspended_source_gives_its_entries_back() {
    let mut home = home_with(6);
    all_ready(&mut home);
    home.set_owner(&pair(), 0);
    needs(&mut home);
    assert_eq!(home.withdraw_ready(|pair| pair.source == 1, |_, _| true).len(), 0);
    assert_eq!(home.withdraw_ready(|_| true, |_, _| false).len(), 0);
    assert_eq!(needs(&mut home), [], "nobody is told of what stays");
    assert_eq!(home.withdraw_ready(|pair| pair.source == 0, |_, _| true).len(), 4);
    assert_eq!(told(&needs(&mut home)), [(0, 0)]);
    assert_eq!(home.ready(), 0);
}

/// A backlog is bounded by memory before anything else: each entry's bytes count.
#[test]
fn an_entry_takes_few_bytes() {
    const ENTRIES: u64 = 200_000;
    let domains: Vec<Arc<str>> = (0..1_000).map(|domain| format!("peer{domain}.example").into()).collect();
    let mut home = Home::default();
    for number in 0..ENTRIES {
        let group = RecipientGroup {
            domain: Arc::clone(&domains[(number % 1_000) as usize]),
            recipients: Box::new([0]),
            attempts: (number % 5) as u32,
            due_ms: 1_800_000_000_000 + number * 7_919 % 14_400_000,
            last_answer: (!number.is_multiple_of(5)).then(|| format!("451 4.7.{} later", number % 100).into()),
            matched: None,
        };
        home.insert(&Spooled {
            message: MessageId::new(LogId(0), Sequence(number + 1)),
            tenant: "tenant".to_owned(),
            campaign: String::new(),
            egress_pool: "default".to_owned(),
            priority: 1,
            expires_ms: 1_800_432_000_000,
            groups: vec![group],
        });
    }
    let bytes = home.allocated_bytes() as f64 / ENTRIES as f64;
    assert!(bytes <= 50.0, "{bytes:.1} bytes an entry");
    for key in home.entries().map(|(key, _)| key).collect::<Vec<_>>() {
        home.remove(key);
    }
    let left = home.allocated_bytes();
    assert!(left < 1 << 20, "{left} bytes are left of what was given back");
}
