//! Streams from one home to another: what arrives is what was there, or an error.

use std::collections::BTreeMap;

use postrider_spool::record::{LogId, Sequence};
use proptest::prelude::*;

use super::*;
use crate::config::{DomainPattern, Route, RouteMatch, RouteTarget, Wildcard};
use crate::handover::{RecipientGroup, Spooled};
use crate::limits::{ANSWERS_KEPT_OCTETS, QUEUES_KEPT};

const START_MS: u64 = 1_800_000_000_000;
const BATCH_MAX: usize = 1_000;

fn id(number: u64) -> MessageId {
    MessageId::new(LogId(3), Sequence(number))
}

fn group(domain: &str, recipients: &[u32], attempts: u32, answer: Option<&str>) -> RecipientGroup {
    RecipientGroup {
        domain: domain.into(),
        recipients: recipients.into(),
        attempts,
        due_ms: START_MS + u64::from(attempts) * 1_234_567,
        last_answer: answer.map(Arc::from),
        matched: None,
    }
}

fn spooled(number: u64, groups: Vec<RecipientGroup>) -> Spooled {
    Spooled {
        message: id(number),
        tenant: format!("tenant{}", number % 3),
        campaign: if number.is_multiple_of(2) { String::new() } else { "spring".to_owned() },
        egress_pool: "default".to_owned(),
        priority: (number % 3) as u8,
        expires_ms: START_MS + 432_000_000 + number,
        groups,
    }
}

/// Messages of one to three entries over many queues, some deferred.
fn messages(home: &mut Home, count: u64) -> Vec<(MessageId, EntryKey)> {
    let insert = |number: u64| {
        let domain = format!("peer{}.example", number % 70);
        let answer = (!number.is_multiple_of(4)).then(|| format!("451 4.7.{} later", number % 9));
        let mut groups = vec![group(&domain, &[(number % 40) as u32], (number % 4) as u32, answer.as_deref())];
        if number.is_multiple_of(5) {
            let many: Vec<u32> = (100..100 + number as u32 % 90 + 1).map(|index| index * 3).collect();
            groups.push(group("other.example", &many, 2, Some("452 4.2.2 full")));
            groups.push(group("third.example", &[41, 45, 50], 0, None));
        }
        let message = spooled(number, groups);
        (message.message, home.insert(&message).expect("it has entries"))
    };
    (1..=count).map(insert).collect()
}

type Known = BTreeMap<(MessageId, Vec<u32>), (u32, u64, u64, Option<String>, String, String, u8)>;

fn known(home: &Home) -> Known {
    let entries = home.entries().map(|(key, entry)| {
        let queue = home.queue_of(key);
        let (name, pool) = (queue.name.to_string(), queue.pool.to_string());
        let last_answer = entry.last_answer.map(str::to_owned);
        let state = (entry.attempts, entry.due_ms, entry.expires_ms, last_answer, name, pool, queue.priority);
        ((entry.message, entry.recipients.collect()), state)
    });
    entries.collect()
}

fn pending(home: &Home, first: EntryKey) -> Vec<u32> {
    let mut pending: Vec<u32> = home.entries_of(first).flat_map(|key| home.entry(key).recipients).collect();
    pending.sort_unstable();
    pending
}

fn summary(writer: &mut SummaryWriter, home: &Home, first: EntryKey) -> Vec<u8> {
    let mut out = Vec::new();
    writer.summarize(home, first, &mut out);
    out
}

#[test]
fn a_home_is_the_same_behind_a_restart() {
    let mut home = Home::default();
    let messages = messages(&mut home, 500);
    let split = home.entries_of(messages[4].1).nth(1).expect("it has three entries");
    let (recipients, rest): (Vec<u32>, Vec<u32>) = home.entry(split).recipients.partition(|index| index % 2 == 0);
    home.keep_only(split, &recipients);
    home.split(split, &rest, 9, START_MS - 5);
    let (mut writer, mut reader, mut restarted) =
        (SummaryWriter::default(), SummaryReader::new(BATCH_MAX, None), Home::default());
    writer.begin();
    for &(message, first) in &messages {
        let summary = summary(&mut writer, &home, first);
        let key = reader.read(&mut restarted, message, &summary, Some(&pending(&home, first)));
        let key = key.expect("it is well-formed").expect("it has entries");
        assert_eq!(restarted.entries_of(key).count(), home.entries_of(first).count());
        assert_eq!(restarted.entry(key).message, message);
    }
    assert_eq!(known(&restarted), known(&home));
    assert_eq!(restarted.queues().count(), home.queues().count());
    assert_eq!(restarted.next_due_ms(), home.next_due_ms());
    let recipients: usize = home.entries().map(|(_, entry)| entry.recipients.len()).sum();
    for home in [&home, &restarted] {
        assert_eq!((home.recipients(), home.scheduled_recipients()), (recipients as u64, recipients as u64));
    }
}

#[test]
fn a_common_message_takes_few_bytes() {
    let mut home = Home::default();
    let messages = messages(&mut home, 500);
    let mut writer = SummaryWriter::default();
    writer.begin();
    let mut again = false;
    for _ in 0..2 {
        for &(message, first) in &messages {
            let length = summary(&mut writer, &home, first).len();
            let common = !message.sequence().0.is_multiple_of(5);
            assert!(!(again && common) || (16..=20).contains(&length), "{length} bytes for {message}");
        }
        again = true;
    }
}

#[test]
fn settled_recipients_and_gone_messages_are_left_out_but_what_they_define_is_learned() {
    let mut home = Home::default();
    let gone = home.insert(&spooled(2, vec![group("a.example", &[0], 1, Some("451 later"))])).expect("an entry");
    let groups = vec![group("a.example", &[0, 1, 2], 1, Some("451 later")), group("b.example", &[3], 0, None)];
    let kept = home.insert(&spooled(8, groups)).expect("an entry");
    let (mut writer, mut reader, mut restarted) =
        (SummaryWriter::default(), SummaryReader::new(BATCH_MAX, None), Home::default());
    writer.begin();
    let first = summary(&mut writer, &home, gone);
    let second = summary(&mut writer, &home, kept);
    assert!(!second.windows(9).any(|octets| octets == b"451 later"), "it is a number by now");
    assert_eq!(reader.read(&mut restarted, id(2), &first, None), Ok(None));
    assert_eq!((restarted.len(), restarted.queues().count()), (0, 0));
    let key = reader.read(&mut restarted, id(8), &second, Some(&[1, 2])).expect("well-formed").expect("an entry");
    assert_eq!(restarted.len(), 1);
    let entry = restarted.entry(key);
    assert_eq!((entry.last_answer, entry.recipients.collect::<Vec<_>>()), (Some("451 later"), vec![1, 2]));
    assert_eq!(reader.read(&mut restarted, id(8), &second, Some(&[])), Ok(None));
}

/// Nothing lost, nothing doubled: what the spool says is pending has one entry each, or the message is read.
#[test]
fn a_summary_of_other_recipients_is_refused_and_the_stream_goes_on() {
    let mut home = Home::default();
    let first = home.insert(&spooled(1, vec![group("a.example", &[0, 1], 0, None)])).expect("an entry");
    let doubled = home.split(first, &[1], 3, START_MS);
    let (mut writer, mut reader, mut restarted) =
        (SummaryWriter::default(), SummaryReader::new(BATCH_MAX, None), Home::default());
    writer.begin();
    let twice = summary(&mut writer, &home, first);
    home.remove(doubled);
    let once = summary(&mut writer, &home, first);
    for (summary, pending) in [(&twice, &[0, 1][..]), (&once, &[0, 1, 2]), (&Vec::new(), &[0])] {
        let read = reader.read(&mut restarted, id(1), summary, Some(pending));
        assert_eq!(read, Err(SummaryError::Recipients), "{pending:?}");
        assert_eq!(restarted.len(), 0);
    }
    assert!(reader.read(&mut restarted, id(1), &once, Some(&[0, 1])).expect("well-formed").is_some());
}

#[test]
fn a_smaller_batch_divides_an_entry() {
    let mut home = Home::default();
    let recipients: Vec<u32> = (0..25).collect();
    let first = home.insert(&spooled(1, vec![group("a.example", &recipients, 1, Some("451 x"))])).expect("an entry");
    let mut writer = SummaryWriter::default();
    let summary = summary(&mut writer, &home, first);
    let mut restarted = Home::default();
    let key = SummaryReader::new(10, None).read(&mut restarted, id(1), &summary, Some(&recipients));
    let key = key.expect("well-formed").expect("it has entries");
    let sizes: Vec<usize> = restarted.entries_of(key).map(|key| restarted.entry(key).recipients.len()).collect();
    assert_eq!(sizes, [10, 10, 5]);
    assert_eq!(pending(&restarted, key), recipients);
}

/// A checkpoint is written in slices. What a home forgets between two of them, and whom it gives the places to, must
/// not change the meaning of a number.
#[test]
fn places_given_to_others_between_slices_are_defined_again() {
    let mut home = Home::default();
    let mut stream = Vec::new();
    let mut writer = SummaryWriter::default();
    writer.begin();
    let mut write = |home: &Home, number: u64, first: EntryKey| {
        stream.push((number, summary(&mut writer, home, first), pending(home, first)));
    };
    let first = home.insert(&spooled(3, vec![group("a.example", &[0], 1, Some("451 a"))])).expect("an entry");
    write(&home, 3, first);
    let (before, answer) = (home.queue_identity(home.entry(first).queue), home.answer_identity(first));
    home.remove(first);
    for number in 0..QUEUES_KEPT as u64 {
        let domain = format!("idle{number}.example");
        let entry = home.insert(&spooled(6, vec![group(&domain, &[0], 0, None)])).expect("an entry");
        home.remove(entry);
    }
    home.forget_idle();
    assert_eq!(home.queues().count(), 0);
    let mut reused = false;
    for number in 0..=QUEUES_KEPT as u64 {
        let domain = format!("new{number}.example");
        let next = home.insert(&spooled(9, vec![group(&domain, &[0], 1, Some("452 b"))])).expect("an entry");
        if home.queue_identity(home.entry(next).queue).place == before.place {
            assert_eq!(home.answer_identity(next).map(|b| b.place), answer.map(|a| a.place));
            write(&home, 9, next);
            reused = true;
            break;
        }
        home.remove(next);
    }
    assert!(reused, "a place is used again");
    let (mut reader, mut restarted) = (SummaryReader::new(BATCH_MAX, None), Home::default());
    for (number, summary, pending) in &stream {
        let pending = (*number == 9).then_some(&**pending);
        reader.read(&mut restarted, id(*number), summary, pending).expect("it is well-formed");
    }
    assert_eq!(known(&restarted), known(&home));
}

/// As mail comes and goes between slices, each message arrives as it was when it was written.
#[test]
fn a_stream_of_a_home_that_changes_tells_what_was_true_at_each_slice() {
    let mut random = fastrand::Rng::with_seed(5);
    let mut home = Home::default();
    let mut live = messages(&mut home, 500);
    let (mut writer, mut reader, mut restarted) =
        (SummaryWriter::default(), SummaryReader::new(BATCH_MAX, None), Home::default());
    writer.begin();
    let mut expected = Known::new();
    while let Some((message, first)) = live.pop() {
        let written = summary(&mut writer, &home, first);
        let read = reader.read(&mut restarted, message, &written, Some(&pending(&home, first)));
        assert!(read.expect("it is well-formed").is_some());
        expected.extend(known(&home).into_iter().filter(|((of, _), _)| *of == message));
        for key in home.entries_of(first).collect::<Vec<_>>() {
            home.remove(key);
        }
        if let Some(key) = home.pop_due(u64::MAX) {
            let rest: Vec<u32> = home.entry(key).recipients.collect();
            home.defer(key, &rest, random.u32(1..9), START_MS + random.u64(..9_999_999), &format!("45{} x", message));
        }
    }
    assert_eq!(home.len(), 0);
    assert_eq!(known(&restarted), expected);
}

#[test]
fn an_answer_that_was_left_to_the_queue_arrives_as_the_entrys_own() {
    let mut home = Home::default();
    let long = "4".repeat(ANSWERS_KEPT_OCTETS);
    home.insert(&spooled(3, vec![group("a.example", &[0], 1, Some(&long))]));
    let first = home.insert(&spooled(6, vec![group("b.example", &[0], 1, Some("451 b"))])).expect("an entry");
    assert_eq!((home.answer_identity(first), home.entry(first).last_answer), (None, Some("451 b")));
    let mut writer = SummaryWriter::default();
    let (mut reader, mut restarted) = (SummaryReader::new(BATCH_MAX, None), Home::default());
    for again in [false, true] {
        let summary = summary(&mut writer, &home, first);
        assert_eq!(summary.windows(5).any(|octets| octets == b"451 b"), !again, "it is a number by then");
        let key = reader.read(&mut restarted, id(6), &summary, Some(&[0])).expect("well-formed").expect("an entry");
        assert_eq!(restarted.entry(key).last_answer, Some("451 b"));
        assert!(restarted.answer_identity(key).is_some());
    }
}

#[test]
fn behind_a_malformed_summary_the_stream_is_lost() {
    let (mut reader, mut home) = (SummaryReader::new(BATCH_MAX, None), Home::default());
    assert_eq!(reader.read(&mut home, id(1), &[1], None), Err(SummaryError::Malformed("queue")));
    assert_eq!(reader.read(&mut home, id(2), &[], None), Err(SummaryError::Lost));
}

fn stream() -> Vec<(MessageId, Vec<u8>, Vec<u32>)> {
    let mut home = Home::default();
    let messages = messages(&mut home, 12);
    let mut writer = SummaryWriter::default();
    writer.begin();
    let summary = |&(message, first): &(MessageId, EntryKey)| {
        (message, summary(&mut writer, &home, first), pending(&home, first))
    };
    messages.iter().map(summary).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn garbage_never_panics(
        summaries in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..4),
    ) {
        let (mut reader, mut home) = (SummaryReader::new(3, None), Home::default());
        for summary in &summaries {
            let read = reader.read(&mut home, id(1), summary, Some(&[0, 1, 5]));
            prop_assert!(read.is_err());
        }
        prop_assert_eq!(home.len(), 0);
    }

    /// A stream with some bytes changed, or cut: each message has all of its pending recipients, once, or none.
    #[test]
    fn damage_never_panics_and_loses_or_doubles_nobody(
        changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..4),
        cut in any::<u16>(),
        cuts in any::<bool>(),
    ) {
        let mut stream = stream();
        for (place, byte) in changes {
            let count = stream.len();
            let summary = &mut stream[usize::from(place) % count].1;
            let place = usize::from(place) / count % summary.len();
            summary[place] ^= byte;
        }
        if cuts {
            let count = stream.len();
            let summary = &mut stream[usize::from(cut) % count].1;
            summary.truncate(usize::from(cut) / count % summary.len());
        }
        let (mut reader, mut home) = (SummaryReader::new(7, None), Home::default());
        for (message, summary, wanted) in &stream {
            let entries = home.len();
            match reader.read(&mut home, *message, summary, Some(wanted)) {
                Ok(Some(first)) => prop_assert_eq!(&pending(&home, first), wanted),
                Ok(None) => prop_assert!(wanted.is_empty()),
                Err(_) => prop_assert_eq!(home.len(), entries),
            }
        }
    }
}

/// What a message's sender decided is told for as long as the same routes would decide it; else the sender has to be
/// looked at. Without routes that ask for senders, what a queue is made of decides.
#[test]
fn a_route_by_sender_is_known_only_under_the_same_routes() {
    let config = |routes: &[(Option<&str>, Option<&str>)]| {
        let mut config = Config::new("mta.example");
        let route = |(tenant, sender): &(Option<&str>, Option<&str>)| {
            let matches =
                RouteMatch { tenant: tenant.map(str::to_owned), campaign: None, sender: sender.map(Wildcard::new) };
            let matches = Some(matches).filter(|matches| *matches != RouteMatch::default());
            Route { matches, ..Route::new(DomainPattern::Any, vec![RouteTarget::Discard]) }
        };
        config.routes = routes.iter().map(route).collect();
        config
    };
    let by_sender = config(&[(None, Some("*@news.example")), (Some("tenant"), None), (None, None)]);
    let changed = config(&[(Some("tenant"), None), (None, Some("*@news.example")), (None, None)]);
    let by_tenant = config(&[(None, None), (Some("tenant"), None)]);
    let tenant_first = config(&[(Some("tenant"), None), (None, None)]);

    let mut home = Home::default();
    let taken = [Some(MatchedRoute(0)), Some(MatchedRoute(1)), None];
    let firsts = taken.map(|matched| {
        let group = RecipientGroup { matched, ..group("peer.example", &[0], 1, None) };
        let spooled = Spooled { tenant: "tenant".to_owned(), ..spooled(home.len() as u64 + 1, vec![group]) };
        home.insert(&spooled).unwrap()
    });
    let stream = |sender_routes| {
        let mut writer = SummaryWriter::new(sender_routes);
        writer.begin();
        firsts.map(|first| {
            let mut summary = Vec::new();
            writer.summarize(&home, first, &mut summary);
            summary
        })
    };
    let read = |summaries: &[Vec<u8>; 3], matching: Option<&Config>| {
        let (mut reader, mut restarted) = (SummaryReader::new(BATCH_MAX, matching), Home::default());
        let mut number = 0;
        summaries.clone().map(|summary| {
            number += 1;
            let key = reader.read(&mut restarted, id(number), &summary, Some(&[0]))?;
            Ok(restarted.queue_of(key.unwrap()).route.matched)
        })
    };
    let told = stream(by_sender.sender_routes());
    assert_eq!(read(&told, Some(&by_sender)), taken.map(Ok));
    assert_eq!(read(&told, Some(&changed)), [Err(SummaryError::Sender); 3]);
    assert_eq!(read(&told, Some(&tenant_first)), [Ok(Some(MatchedRoute(0))); 3]);
    assert_eq!(read(&told, Some(&by_tenant)), [Ok(None); 3]);
    assert_eq!(read(&told, None), [Ok(None); 3]);
    // Written where no route asked for senders, or by an engine that knew of none.
    let untold = stream(None);
    assert_eq!(read(&untold, Some(&by_sender)), [Err(SummaryError::Sender); 3]);
    assert_eq!(read(&untold, Some(&tenant_first)), [Ok(Some(MatchedRoute(0))); 3]);
    assert_eq!(read(&untold, None), [Ok(None); 3]);
}
