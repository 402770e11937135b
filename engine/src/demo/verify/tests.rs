//! Tests of the demo's verifier: it notices everything that can go wrong.

use super::super::generate_keys;
use super::*;
use crate::accept::dkim_sign::{BodyHash, Signers};
use crate::mail::time::Now;

const NOW: Now = Now { monotonic: Duration::ZERO, wall_ms: 1_764_547_200_000 };

/// A generator, keys, and what an engine that does all right makes of a message.
struct World {
    generator: Generator,
    identities: Vec<DkimIdentity>,
    signers: Signers,
}

impl World {
    fn new() -> Self {
        let identities = generate_keys().unwrap();
        let signers = Signers::new(&identities).unwrap();
        Self { generator: Generator::new(0xabc, NOW.wall_ms), identities, signers }
    }

    fn verifier(&self) -> Verifier {
        Verifier::new(self.generator.clone(), &self.identities).unwrap()
    }

    fn delivered(&self, number: u32) -> Arrival {
        let sent = self.generator.message(number);
        let content = sent.expected();
        let mut added = String::new();
        for name in &sent.missing {
            added.push_str(&format!("{name}: something\r\n"));
        }
        added.push_str("X-Postrider-Ref: 0123\r\n");
        let body = header::body_start(&content);
        let signed = [added.as_bytes(), &content[..body - 2]];
        let signatures =
            self.signers.sign(&[0, 1], &signed, &BodyHash::of(&content[body..]), NOW.wall_ms / 1_000).unwrap();
        let received = b"Received: by demo.test;\r\n\tnow\r\n";
        Arrival {
            at: Duration::from_millis(5),
            reverse_path: sent.reverse_path,
            recipients: vec![sent.recipient],
            content: [&received[..], &signatures, added.as_bytes(), &content].concat(),
        }
    }

    /// The faults of message `number` after `alter` has been at it.
    fn faults(&self, number: u32, alter: impl FnOnce(&mut Arrival)) -> Vec<String> {
        let mut arrival = self.delivered(number);
        alter(&mut arrival);
        let verdict = self.verifier().verify(&arrival);
        assert_eq!(verdict.number, Some(number));
        verdict.faults
    }
}

fn replace(arrival: &mut Arrival, from: &str, to: &str) {
    let at = arrival.content.windows(from.len()).position(|window| window == from.as_bytes()).expect("it is there");
    arrival.content.splice(at..at + from.len(), to.bytes());
}

#[test]
fn every_shape_of_message_is_right_when_it_arrives_as_sent() {
    let world = World::new();
    let verifier = world.verifier();
    for number in 0..130 {
        let verdict = verifier.verify(&world.delivered(number));
        assert_eq!(verdict, Verdict { number: Some(number), at: Duration::from_millis(5), faults: Vec::new() });
    }
}

#[test]
fn a_flipped_bit_anywhere_in_what_was_sent_is_named() {
    let world = World::new();
    let delivered = world.delivered(2);
    let start = delivered.content.len() - world.generator.message(2).expected().len();
    let verifier = world.verifier();
    for at in (start..delivered.content.len()).step_by(37).chain([start, delivered.content.len() - 1]) {
        let mut arrival = delivered.clone();
        arrival.content[at] ^= 0x20;
        let verdict = verifier.verify(&arrival);
        assert_eq!(verdict.number, Some(2));
        assert!(!verdict.faults.is_empty(), "octet {at}");
    }
    let faults = world.faults(2, |arrival| replace(arrival, "The end.", "The eNd."));
    assert_eq!(
        faults[0],
        format!(
            "its body differs at octet {}: sent \"nd.\\r\\n\", arrived \"Nd.\\r\\n\"",
            world.generator.message(2).expected().len() - 5
        )
    );
    assert_eq!(faults[1], "its DKIM signature rsa is wrong: Calculated body hash does not match signature hash");
    assert_eq!(faults.len(), 3);
}

#[test]
fn white_space_that_signatures_forgive_is_not_forgiven() {
    let world = World::new();
    let faults = world.faults(0, |arrival| arrival.content.extend_from_slice(b"\r\n"));
    assert_eq!(faults.len(), 1);
    assert!(faults[0].ends_with("sent the end, arrived \"\\r\\n\""), "{faults:?}");
    let faults = world.faults(0, |arrival| replace(arrival, "Subject: ", "Subject:  "));
    assert_eq!(faults.len(), 1);
    assert!(faults[0].starts_with("its header differs at octet "), "{faults:?}");
}

#[test]
fn a_broken_missing_or_additional_signature_is_named() {
    let world = World::new();
    let faults = world.faults(4, |arrival| {
        let tag = b"; s=ed25519;";
        let signature = arrival.content.windows(tag.len()).position(|window| window == tag).unwrap();
        let mut windows = arrival.content[signature..].windows(3);
        let digit = signature + windows.position(|window| matches!(window, b" b=" | b"\tb=")).unwrap() + 9;
        let altered = if arrival.content[digit] == b'A' { b'B' } else { b'A' };
        arrival.content[digit] = altered;
    });
    assert_eq!(faults.len(), 1);
    assert!(faults[0].starts_with("its DKIM signature ed25519 is wrong: "), "{faults:?}");

    let faults = world.faults(4, |arrival| replace(arrival, "s=rsa;", "s=xyz;"));
    assert_eq!(faults, ["it has no DKIM signature rsa"]);

    let faults = world.faults(4, |arrival| {
        let fields: Vec<_> = header::fields(&arrival.content).collect();
        let range = fields.iter().find(|field| field.is("DKIM-Signature")).unwrap().range();
        let copy = arrival.content[range.clone()].to_vec();
        arrival.content.splice(range.start..range.start, copy);
    });
    assert_eq!(faults, ["it has several DKIM signatures rsa", "it has 3 DKIM signatures"]);

    // Other keys of the same names.
    let other = Verifier::new(world.generator.clone(), &generate_keys().unwrap()).unwrap();
    assert_eq!(other.verify(&world.delivered(4)).faults.len(), 2);
}

#[test]
fn envelope_and_added_fields_are_looked_at() {
    let world = World::new();
    let faults = world.faults(1, |arrival| arrival.reverse_path = "other@sender.test".to_owned());
    assert_eq!(faults, ["it came from <other@sender.test>, but was sent from <bounce+1@sender.test>"]);
    let faults = world.faults(1, |arrival| arrival.recipients.push("x@recipient.test".to_owned()));
    assert_eq!(faults.len(), 1);
    let faults = world.faults(1, |arrival| {
        arrival.content.splice(0..0, *b"X-Other: 1\r\n");
    });
    assert_eq!(faults, ["it does not have one new Received field, on top", "a field X-Other was added"]);
    let faults = world.faults(1, |arrival| {
        let at = header::fields(&arrival.content).nth(1).unwrap().start;
        arrival.content.splice(at..at, *b"Date: now\r\n");
    });
    assert_eq!(faults[0], "1 Date fields were added instead of 0");
    // 3 comes without Date.
    let faults = world.faults(3, |arrival| replace(arrival, "Date: something\r\n", ""));
    assert!(faults.contains(&"0 Date fields were added instead of 1".to_owned()), "{faults:?}");
    // 5 has a Bcc, which must not arrive.
    let sent = world.generator.message(5);
    let text = String::from_utf8_lossy(&sent.content).into_owned();
    let bcc = &text[text.find("Bcc:").unwrap()..text.find("Date:").unwrap()];
    let faults = world.faults(5, |arrival| replace(arrival, "\r\nDate: ", &format!("\r\n{bcc}Date: ")));
    assert!(faults[0].starts_with("its header differs at octet "), "{faults:?}");
}

#[test]
fn a_stranger_and_one_whose_number_was_altered() {
    let world = World::new();
    let verifier = world.verifier();
    let mut stranger = world.delivered(0);
    stranger.content = b"Subject: hello\r\n\r\n".to_vec();
    stranger.recipients = vec!["someone@else.test".to_owned()];
    let verdict = verifier.verify(&stranger);
    assert_eq!((verdict.number, &*verdict.faults[0]), (None, "it does not bear the number of any message"));
    let mut tally = Tally::new(1);
    tally.arrive(verdict);
    assert!(tally.problems()[1].to_string().starts_with("something arrived that was not sent: "));
    let faults = world.faults(9, |arrival| replace(arrival, "X-Demo-Number: ", "X-Demo-Number: f"));
    assert!(faults[0].starts_with("its header differs at octet 15"), "{faults:?}");
}

fn id(number: u32) -> MessageId {
    MessageId::from_raw(u64::from(number) + 1)
}

fn right(number: u32) -> Verdict {
    Verdict { number: Some(number), at: Duration::from_millis(30), faults: Vec::new() }
}

/// Three messages for which all went well.
fn books() -> Tally {
    let mut tally = Tally::new(3);
    for number in 0..3 {
        tally.send(number, 100, Duration::from_millis(10));
        tally.event(EventKind::Reception, id(number), "");
        tally.accept(number, id(number), Duration::from_millis(20));
        tally.arrive(right(number));
        tally.event(EventKind::Delivery, id(number), "");
    }
    tally
}

fn told(tally: &Tally) -> Vec<String> {
    tally.problems().iter().map(Problem::to_string).collect()
}

#[test]
fn books_that_balance() {
    let mut tally = books();
    assert!(tally.is_settled());
    assert_eq!((tally.verified(), told(&tally)), (3, Vec::new()));
    let (acceptance, end_to_end) = tally.latencies();
    assert_eq!(acceptance, [Duration::from_millis(10); 3]);
    assert_eq!(end_to_end, [Duration::from_millis(20); 3]);
    assert_eq!(tally.content_bytes, 300);
    // A delivery that was put off and then succeeded is right.
    tally.event(EventKind::TransientFailure, id(1), "");
    assert_eq!((tally.verified(), tally.transient_failures), (3, 1));
}

#[test]
fn a_missing_message_is_named() {
    let mut tally = Tally::new(2);
    tally.accept(0, id(0), Duration::ZERO);
    tally.accept(1, id(1), Duration::ZERO);
    for number in 0..2 {
        tally.event(EventKind::Reception, id(number), "");
        tally.event(EventKind::Delivery, id(number), "");
    }
    tally.arrive(right(0));
    assert!(!tally.is_settled());
    assert_eq!(tally.verified(), 1);
    assert_eq!(told(&tally), ["message 1: missing: it was accepted as 0000000000000002 and did not arrive"]);
}

#[test]
fn a_double_is_named() {
    let mut tally = books();
    tally.arrive(right(2));
    assert_eq!((tally.verified(), tally.arrived), (2, 3));
    assert_eq!(told(&tally), ["message 2: doubled: it arrived 2 times"]);
}

#[test]
fn a_wrong_message_is_named() {
    let mut tally = Tally::new(1);
    tally.accept(0, id(0), Duration::ZERO);
    tally.event(EventKind::Reception, id(0), "");
    tally.event(EventKind::Delivery, id(0), "");
    tally.arrive(Verdict { faults: vec!["its body differs".to_owned()], ..right(0) });
    assert!(tally.is_settled());
    assert_eq!((tally.verified(), told(&tally)), (0, vec!["message 0: wrong: its body differs".to_owned()]));
}

#[test]
fn events_that_do_not_add_up_are_named() {
    let mut tally = books();
    tally.event(EventKind::Delivery, id(0), "");
    tally.event(EventKind::Reception, id(1), "");
    tally.event(EventKind::Bounce, id(1), "550 no");
    tally.event(EventKind::Reception, id(7), "");
    tally.note("2 events were missed".to_owned());
    assert_eq!(tally.verified(), 1);
    assert_eq!(
        told(&tally),
        [
            "message 0: the event log has 1 Reception and 2 Delivery of 0000000000000001",
            "message 1: the event log has 2 Reception and 1 Delivery of 0000000000000002",
            "event Bounce of 0000000000000002: 550 no",
            "2 events were missed",
            "1 ids in the event log were never given out",
        ]
    );
    // None at all.
    let mut tally = Tally::new(1);
    tally.accept(0, id(0), Duration::ZERO);
    tally.arrive(right(0));
    assert!(!tally.is_settled());
    assert_eq!(told(&tally), ["message 0: the event log has 0 Reception and 0 Delivery of 0000000000000001"]);
}

#[test]
fn a_message_that_was_not_accepted_is_named() {
    let mut tally = Tally::new(3);
    tally.refuse(0, "452 full".to_owned(), true);
    tally.refuse(0, "554 no".to_owned(), false);
    tally.refuse(1, "the session ended before the answer".to_owned(), false);
    tally.arrive(right(1));
    assert_eq!(tally.postponed, 1);
    assert_eq!(
        told(&tally),
        [
            "message 0: not accepted: 554 no",
            "message 1: not accepted: the session ended before the answer; it arrived all the same, 1 times",
            "message 2: not accepted: it was not sent in time",
        ]
    );
}

#[test]
fn one_id_for_two_messages_is_named() {
    let mut tally = Tally::new(2);
    for number in 0..2 {
        tally.accept(number, id(0), Duration::ZERO);
        tally.arrive(right(number));
    }
    tally.event(EventKind::Reception, id(0), "");
    tally.event(EventKind::Delivery, id(0), "");
    assert_eq!(told(&tally), ["an id was given to several messages"]);
}
