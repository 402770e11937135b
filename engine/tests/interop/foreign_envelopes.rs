//! Each message goes out once, under its own reverse path and to its own recipient, when the peer refuses all
//! recipients of every second transaction, also where transactions ride on warm connections (RFC 2920 §3.1).
//!
//! Real Exim, without RSET, answers 503 to the MAIL after such a transaction and keeps the first reverse path.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use crate::servers::{Kind, Recipients};
use crate::support::client::Client;
use crate::support::dns_server::{DnsServer, Entry};
use crate::support::process::{Postrider, to_sink};
use crate::support::sink::{Answer, Delivered, Sink, Verb};
use crate::support::tap::Tap;
use crate::support::{event_log, http, message, poll_for, token};
use crate::tools;

/// In the clear, so that the tap can look; few connections, so that there is always somebody to ride; early retries.
const WARM: &str = "tls = \"disabled\"\n[retry]\nretry_interval = [\"1s\"]\n[shaping.default]\nconnection_limit = 2\n";
/// What is added to it: whole transactions are in flight, content included.
const BACK_TO_BACK: &str = "chunking = \"back_to_back\"\n";

#[test]
fn real_exim() {
    let sink = Sink::start();
    let Some(exim) = Kind::Exim.start(sink.address(), Recipients::DeferEverySecond) else { return };
    every_second_transaction_is_deferred(&sink, exim.address, "");
    every_second_transaction_is_deferred(&sink, exim.address, BACK_TO_BACK);
}

#[test]
fn real_postfix() {
    let sink = Sink::start();
    let policy = Recipients::AskPolicy(policy_server());
    let Some(postfix) = Kind::Postfix.start(sink.address(), policy) else { return };
    every_second_transaction_is_deferred(&sink, postfix.address, "");
    every_second_transaction_is_deferred(&sink, postfix.address, BACK_TO_BACK);
}

#[test]
fn a_sink_that_keeps_the_refused_envelope() {
    let sink = Sink::start();
    refuse_every_second(&sink, "451 4.7.1 Not this one", OFFERS);
    every_second_transaction_is_deferred(&sink, sink.address(), "");
    refuse_every_second(&sink, "451 4.7.1 Not this one", OFFERS_CHUNKING);
    every_second_transaction_is_deferred(&sink, sink.address(), "");
    every_second_transaction_is_deferred(&sink, sink.address(), BACK_TO_BACK);
}

#[test]
fn a_sink_that_refuses_for_good() {
    let sink = Sink::start();
    refuse_every_second(&sink, "550 5.7.1 Not this one", OFFERS);
    let count = tools::messages() / 2;
    let directory = tempfile::tempdir().unwrap();
    let tap = Tap::start(sink.address());
    let postrider = Postrider::start(directory.path(), &format!("{}{WARM}", to_sink(tap.address())));
    send(postrider.smtp(), count);
    tap.open();
    settled(&postrider, count);
    postrider.terminate();
    let delivered = sink.taken_so_far();
    each_its_own(&delivered);
    let events = event_log::read(&directory.path().join("spool/events"));
    let bounced = events.iter().filter(|event| event["type"] == "Bounce").count();
    assert_eq!(delivered.len() + bounced, count, "one fate each");
    assert!(bounced >= count / 3, "every second transaction is refused: {bounced} of {count}");
    assert_rides(&tap, delivered.len() / 4);
}

/// Google answers 451 4.3.0 to a second domain in one transaction.
#[test]
fn one_domain_a_transaction() {
    const DOMAINS: [&str; 3] = ["one.test", "two.test", "three.test"];
    let Some((sink, address)) = Sink::at_port_25() else { return };
    let mixed = |recipients: &[String], line: &str| {
        recipients.first().is_some_and(|first| line.split('@').nth(1).unwrap_or_default() != domain_end(first))
    };
    fn domain_end(recipient: &str) -> String {
        format!("{}>", recipient.split('@').nth(1).unwrap_or_default())
    }
    let (sender, refused) = std::sync::mpsc::channel();
    sink.set_script(move |step| {
        if step.verb == Verb::Rcpt && mixed(step.recipients, step.line) {
            let _ = sender.send(step.line.to_owned());
            return Answer::from("451 4.3.0 Multiple destination domains per transaction is unsupported");
        }
        Answer::Usual
    });
    let mut zone = vec![("mx.test", Entry::A(address))];
    zone.extend(DOMAINS.map(|domain| (domain, Entry::Mx(10, "mx.test"))));
    let dns = DnsServer::start(&zone);
    let directory = tempfile::tempdir().unwrap();
    let config = format!(
        "hostname = \"mta.test\"\nshards = 2\n[spool]\npath = \"spool\"\nallow_filesystem = true\n\
         [dns]\nservers = [\"{}\"]\nprohibited_hosts = []\n",
        dns.address()
    );
    let postrider = Postrider::start(directory.path(), &config);
    let count = tools::messages();
    let mut client = Client::ready(postrider.smtp()).unwrap();
    for number in 0..count {
        let recipients: Vec<String> =
            DOMAINS.iter().flat_map(|domain| [format!("a{number}@{domain}"), format!("b{number}@{domain}")]).collect();
        let recipients: Vec<&str> = recipients.iter().map(String::as_str).collect();
        client.submit(&format!("s{number}@sender.test"), &recipients, &message(&number.to_string())).unwrap();
    }
    let mut seen = BTreeSet::new();
    for delivered in sink.take(DOMAINS.len() * count) {
        let number = token(&delivered.content);
        assert_eq!(delivered.reverse_path, format!("s{number}@sender.test"));
        assert_eq!(delivered.recipients.len(), 2, "a domain's recipients share a transaction: {delivered:?}");
        for recipient in delivered.recipients {
            assert!(recipient[1..].starts_with(&format!("{number}@")), "{recipient} is of message {number}");
            assert!(seen.insert(recipient.clone()), "{recipient} twice");
        }
    }
    assert_eq!(seen.len(), 2 * DOMAINS.len() * count);
    assert_eq!(refused.try_iter().collect::<Vec<_>>(), Vec::<String>::new(), "a second domain in one transaction");
    postrider.terminate();
    assert!(sink.taken_so_far().is_empty(), "more than was sent");
}

/// `server`, which passes on to `sink` (or is it), defers every second transaction.
fn every_second_transaction_is_deferred(sink: &Sink, server: SocketAddr, chunking: &str) {
    let count = tools::messages() / 5;
    let directory = tempfile::tempdir().unwrap();
    let tap = Tap::start(server);
    let postrider = Postrider::start(directory.path(), &format!("{}{WARM}{chunking}", to_sink(tap.address())));
    send(postrider.smtp(), count);
    tap.open();
    settled(&postrider, count);
    let delivered = sink.take(count);
    each_its_own(&delivered);
    postrider.terminate();
    assert!(sink.taken_so_far().is_empty(), "more than was sent");
    assert_rides(&tap, count / 4);
    let deferred = check_events(&directory.path().join("spool/events"), count);
    assert!(deferred >= count / 2, "every second transaction is deferred: {deferred} of {count} messages");
    println!("{count} messages, {deferred} deferrals {chunking}");
}

fn send(smtp: SocketAddr, count: usize) {
    let mut client = Client::ready(smtp).unwrap();
    for number in 0..count {
        let content = message(&number.to_string());
        client.submit(&format!("s{number}@sender.test"), &[&format!("r{number}@d.test")], &content).unwrap();
    }
}

/// Waits until the engine has nothing left to do.
fn settled(postrider: &Postrider, count: usize) {
    poll_for(tools::patience(), "all messages have an outcome", || {
        let status = http::json(postrider.http(), "/api/admin/status/v1");
        let done = status["delivered"].as_u64().unwrap_or_default() + status["failed"].as_u64().unwrap_or_default();
        (done >= count as u64 && status["recipients"] == 0).then_some(())
    });
}

fn each_its_own(delivered: &[Delivered]) {
    let mut seen = BTreeSet::new();
    for it in delivered {
        let number = token(&it.content);
        assert_eq!(it.reverse_path, format!("s{number}@sender.test"), "its own reverse path");
        assert_eq!(it.recipients, [format!("r{number}@d.test")], "its own recipient");
        assert!(seen.insert(number.clone()), "message {number} came twice");
    }
}

fn assert_rides(tap: &Tap, least: usize) {
    // Behind a dot, or behind the last line of what BDAT has sent.
    let rides = tap.count(b"\r\nRSET\r\nMAIL FROM:");
    let bare = tap.count(b"\r\n.\r\nMAIL FROM:");
    println!("{rides} transactions rode");
    assert_eq!(bare, 0, "no envelope rides without RSET");
    assert!(rides >= least, "{rides} transactions rode, fewer than {least}: the test shows nothing");
}

/// One Delivery for each message, and nothing final beside; the number of deferrals.
fn check_events(log: &Path, count: usize) -> usize {
    let events = event_log::read(log);
    let finals = event_log::finals(&events);
    assert_eq!(finals.len(), count);
    assert!(finals.values().all(|&records| records == 1), "one final record each");
    let of = |kind: &str| events.iter().filter(|event| event["type"] == kind).collect::<Vec<_>>();
    assert_eq!(of("Delivery").len(), count);
    for event in of("Delivery") {
        let (sender, recipient) = (event_log::text(event, "sender"), event_log::text(event, "recipient"));
        assert_eq!(sender[1..].split('@').next(), recipient[1..].split('@').next(), "in {event}");
    }
    for event in of("TransientFailure") {
        assert_eq!(event["response"]["code"].as_u64().map(|code| code / 50), Some(9), "45x in {event}");
    }
    of("TransientFailure").len()
}

/// Refuses all recipients of every second transaction of a session and, as real Exim does, keeps the envelope until
/// RSET: the next MAIL is answered 503, and what follows would go under the first reverse path.
fn refuse_every_second(sink: &Sink, refusal: &'static str, offers: &'static str) {
    #[derive(Default)]
    struct Seen {
        transactions: usize,
        open: bool,
    }
    let mut sessions: HashMap<u64, Seen> = HashMap::new();
    sink.set_script(move |step| {
        let seen = sessions.entry(step.session).or_default();
        match step.verb {
            Verb::Mail if seen.open => return Answer::from("503 5.5.1 Sender already given"),
            Verb::Mail => {
                seen.open = true;
                seen.transactions += 1;
            }
            Verb::Rcpt if seen.transactions.is_multiple_of(2) => return Answer::from(refusal),
            Verb::Ehlo => {
                seen.open = false;
                return Answer::from(offers);
            }
            Verb::Content | Verb::Rset => seen.open = false,
            _ => {}
        }
        Answer::Usual
    });
}

const OFFERS: &str = "250-sink.test\n250-PIPELINING\n250-SIZE 104857600\n250 8BITMIME";
const OFFERS_CHUNKING: &str = "250-sink.test\n250-PIPELINING\n250-SIZE 104857600\n250-8BITMIME\n250 CHUNKING";

/// Postfix's policy protocol: defers all recipients of every second transaction that one smtpd process asks about.
fn policy_server() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || decide(stream));
        }
    });
    address
}

fn decide(stream: TcpStream) -> std::io::Result<()> {
    let mut input = BufReader::new(stream);
    let (mut instance, mut transactions) = (String::new(), 0_usize);
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        match line.trim_end().split_once('=') {
            Some(("instance", named)) if named != instance => {
                named.clone_into(&mut instance);
                transactions += 1;
            }
            Some(_) => {}
            None => {
                let action = if transactions.is_multiple_of(2) { "DEFER 4.7.1 Not this one" } else { "DUNNO" };
                input.get_mut().write_all(format!("action={action}\n\n").as_bytes())?;
            }
        }
    }
}
