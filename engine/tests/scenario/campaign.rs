//! Campaigns by the embedding API: one body for all, header fields, envelope and signature for each.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use postrider::outcome::event::EventKind;
use postrider::{CampaignMessage, InjectError};

use crate::support::embedded::{Running, block_on, retry_after, to_sink};
use crate::support::event_log;
use crate::support::sink::{Delivered, Sink, Verb};

const COMMON: &str = "From: News <news@sender.test>\r\nSubject: News\r\nMIME-Version: 1.0\r\n\
                      Content-Type: text/plain; charset=utf-8\r\n";

/// With lines that begin with dots, and octets above 127.
fn content() -> String {
    let lines: String = (0..3_000).map(|number| format!(".{number} caf\u{e9}\r\n")).collect();
    format!("{COMMON}\r\n{lines}")
}

fn message(number: usize) -> CampaignMessage {
    CampaignMessage {
        reverse_path: format!("bounce+{number}@sender.test"),
        recipients: vec![format!("r{number}@sink.test")],
        header: own(number).into_bytes(),
        ..CampaignMessage::default()
    }
}

fn own(number: usize) -> String {
    format!(
        "To: <r{number}@sink.test>\r\nMessage-ID: <{number}@sender.test>\r\nList-Unsubscribe: <https://x/{number}>\r\n"
    )
}

/// Each came whole, under its own envelope, with its own fields above the common ones; once each.
fn check(delivered: Vec<Delivered>, numbers: std::ops::Range<usize>) {
    let mut seen = Vec::new();
    for Delivered { reverse_path, recipients, content: received, .. } in delivered {
        let number: usize = recipients[0].trim_start_matches('r').split('@').next().unwrap().parse().unwrap();
        seen.push(number);
        assert_eq!(recipients, [format!("r{number}@sink.test")]);
        assert_eq!(reverse_path, format!("bounce+{number}@sender.test"));
        let received = String::from_utf8(received).unwrap();
        assert!(received.starts_with("Received: "), "{}", &received[..200]);
        assert!(received.ends_with(&format!("{}{}", own(number), content())), "{}", &received[..800]);
    }
    seen.sort_unstable();
    assert!(seen.into_iter().eq(numbers), "each came once");
}

/// How often the octets are in the spool's files.
fn copies_of(octets: &str, spool: &Path) -> usize {
    let mut copies = 0;
    for entry in std::fs::read_dir(spool).unwrap() {
        let path = entry.unwrap().path();
        copies += match path.is_dir() {
            true => copies_of(octets, &path),
            false => memchr::memmem::find_iter(&std::fs::read(&path).unwrap(), octets).count(),
        };
    }
    copies
}

/// Half of a campaign waits over a restart with another number of shards, and a new handle sends the other half.
#[test]
fn each_message_comes_whole_also_after_a_restart() {
    const HALF: usize = 60;
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let address = sink.address();
    let mut config = to_sink(directory.path(), address);
    retry_after(&mut config, &[Duration::from_millis(200)]);
    let events = config.events_path();
    drop(sink);

    let running = Running::start(config.clone());
    let campaign = running.engine.campaign(content()).unwrap();
    let accepted = block_on(campaign.inject_all((0..HALF - 1).map(message)));
    let mut ids: BTreeMap<String, usize> = BTreeMap::new();
    for (number, accepted) in accepted.into_iter().enumerate() {
        ids.insert(accepted.unwrap().id.to_string(), number);
    }
    let last = block_on(campaign.inject(message(HALF - 1))).unwrap();
    ids.insert(last.id.to_string(), HALF - 1);
    assert_eq!(ids.len(), HALF);
    assert_eq!(running.rows().len(), HALF);
    running.shutdown();
    let refused = block_on(campaign.inject(message(0))).unwrap_err();
    assert_eq!(refused, InjectError::Ended, "the handle is the first engine's");

    config.shards = Some(3);
    let running = Running::start(config);
    assert_eq!(running.rows().len(), HALF, "what was accepted goes on");
    let campaign = running.engine.campaign(content()).unwrap();
    for accepted in block_on(campaign.inject_all((HALF..2 * HALF).map(message))) {
        accepted.unwrap();
    }
    drop(campaign);
    let sink = Sink::start_at(address);
    check(sink.take(2 * HALF), 0..2 * HALF);
    running.rows_when("empty", <[_]>::is_empty);
    running.shutdown();
    assert!(sink.taken_so_far().is_empty(), "once");
    let finals = event_log::finals(&event_log::read(&events));
    assert_eq!(finals.len(), 2 * HALF);
    assert!(finals.values().all(|count| *count == 1), "{finals:?}");
}

/// Content is spooled once, whatever the number of messages, and reckoned whole in what is told of each.
#[test]
fn content_is_spooled_once() {
    const COUNT: usize = 200;
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Mail, "451 4.2.1 later");
    let mut config = to_sink(directory.path(), sink.address());
    retry_after(&mut config, &[Duration::from_secs(3_600)]);
    config.spool.max_size_bytes = 64 << 20;
    let spool = config.spool.path.clone();
    let mut running = Running::start(config);
    let marked = format!("{}The one and only.\r\n", content());
    let unused = running.engine.campaign("\r\nNever sent.\r\n").unwrap();
    let campaign = running.engine.campaign(&marked).unwrap();
    for accepted in block_on(campaign.inject_all((0..COUNT).map(message))) {
        accepted.unwrap();
    }
    let reception = running.event(EventKind::Reception);
    let told: serde_json::Value = serde_json::from_str(reception.to_json()).unwrap();
    let size = told["size"].as_u64().unwrap();
    assert!(size > marked.len() as u64, "{size}");
    running.rows_when("all were tried", |rows| rows.iter().all(|row| row.num_attempts == 1));
    running.shutdown();
    assert_eq!(copies_of("The one and only.", &spool), 1);
    assert_eq!(copies_of("Never sent.", &spool), 0);
    drop((unused, campaign));
}

/// A handle that sent nothing leaves nothing; what can't be shared is refused with the reason.
#[test]
fn what_can_not_be_shared_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let running = Running::start(to_sink(directory.path(), sink.address()));
    let refused = running.engine.campaign("no header\r\n\r\nbody\r\n").unwrap_err().to_string();
    assert!(refused.starts_with("554 5.6.0"), "{refused}");
    let campaign = running.engine.campaign("\r\nbody\r\n").unwrap();
    let with_body = CampaignMessage { header: b"To: x\r\n\r\nbody\r\n".to_vec(), ..message(1) };
    let nobody = CampaignMessage { recipients: Vec::new(), ..message(1) };
    let bad = CampaignMessage { recipients: vec!["@".to_owned()], ..message(1) };
    let answers = block_on(campaign.inject_all([with_body, message(2), nobody, bad]));
    let codes: Vec<String> = answers
        .iter()
        .map(|answer| match answer {
            Ok(_) => "taken".to_owned(),
            Err(refusal) => refusal.to_string().split(' ').take(2).collect::<Vec<_>>().join(" "),
        })
        .collect();
    assert_eq!(codes, ["554 5.6.0", "taken", "554 5.5.1", "553 5.1.3"]);
    assert!(sink.next().content.ends_with(format!("{}\r\nbody\r\n", own(2)).as_bytes()));
    running.shutdown();
}
