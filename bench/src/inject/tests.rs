//! Tests of the injector.

use std::sync::Arc;

use socket2::{Domain, Socket, Type};

use super::*;
use crate::sink::faults::{FaultPlan, Stage};
use crate::sink::{Sink, SinkOptions};

fn sink_refusing(stage: Stage, reply: &str, percent: f64) -> Sink {
    let plan = FaultPlan::new(&[(stage, reply.to_owned())], percent, None, Instant::now()).unwrap();
    Sink::start(SinkOptions { faults: Arc::new(plan), ..SinkOptions::on_loopback() }).unwrap()
}

fn options(sink: &Sink, messages: u64) -> InjectOptions {
    InjectOptions { messages: Some(messages), sessions: 4, ..InjectOptions::to(sink.addresses()[0]) }
}

/// What a sink heard of a run after all its sessions said QUIT.
fn check_all_arrived_once(sink: &Sink, injected: &Injected, messages: u64) {
    let summary = sink.ledger().summary();
    assert_eq!(injected.accepted, messages);
    assert_eq!((summary.messages, summary.duplicates, summary.messages_without_id), (messages, 0, 0));
    assert_eq!(injected.latencies.count(), messages);
    assert_eq!(summary.end_to_end.unwrap().count, messages);
    assert_eq!(injected.bytes, summary.bytes);
}

#[test]
fn every_way_of_sending_arrives_once() {
    let ways = [(true, false), (false, false), (true, true), (false, true)];
    for (pipelined, one_connection_per_message) in ways {
        let sink = Sink::start(SinkOptions::on_loopback()).unwrap();
        let injected = inject(InjectOptions { pipelined, one_connection_per_message, ..options(&sink, 50) }).unwrap();
        check_all_arrived_once(&sink, &injected, 50);
        let summary = sink.ledger().summary();
        let connections = if one_connection_per_message { 50 } else { 4 };
        assert_eq!(summary.connections, connections);
        assert_eq!(injected.connections, connections);
        let (_, peer) = summary.peers.iter().next().unwrap();
        assert_eq!(peer.ehlo.get("postbench.test"), Some(&connections));
        assert_eq!((injected.refused, injected.unanswered, injected.trouble), (0, 0, None));
    }
}

#[test]
fn an_open_loop_keeps_its_rate_and_counts_from_when_messages_were_due() {
    let delay = Duration::from_millis(20);
    let sink = Sink::start(SinkOptions { delay, ..SinkOptions::on_loopback() }).unwrap();
    // One session can do at most 25/s (two groups of replies a message): at 100/s the later ones wait ever longer.
    let injected = inject(InjectOptions { sessions: 1, rate: Some(100.0), ..options(&sink, 25) }).unwrap();
    check_all_arrived_once(&sink, &injected, 25);
    let summary = injected.summary().accept.unwrap();
    // The last was due at 240 ms and accepted after at least 25 × 40 ms.
    assert!(summary.max_ms >= 750.0, "{summary:?}");

    let quick = Sink::start(SinkOptions::on_loopback()).unwrap();
    let injected = inject(InjectOptions { rate: Some(500.0), ..options(&quick, 100) }).unwrap();
    check_all_arrived_once(&quick, &injected, 100);
    assert!(injected.elapsed() >= Duration::from_millis(197), "{:?}", injected.elapsed());
}

#[test]
fn sizes_domains_and_dots_arrive_as_drawn() {
    let dump = tempfile::tempdir().unwrap();
    let sink = Sink::start(SinkOptions { dump: Some(dump.path().to_owned()), ..SinkOptions::on_loopback() }).unwrap();
    let sizes = "1k:1,3k:1".parse().unwrap();
    let injected = inject(InjectOptions { sizes, domains: 5, dotted: true, ..options(&sink, 40) }).unwrap();
    assert_eq!(injected.accepted, 40);
    let mut lengths = std::collections::BTreeMap::new();
    for number in 1..=40 {
        let message = std::fs::read(dump.path().join(format!("{number:08}.eml"))).unwrap();
        *lengths.entry(message.len()).or_insert(0) += 1;
        let text = String::from_utf8(message).unwrap();
        let (_, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(body.starts_with(".b") && !body.contains("\r\n..") && body.ends_with("\r\n"), "{body}");
        let envelope = std::fs::read_to_string(dump.path().join(format!("{number:08}.json"))).unwrap();
        let envelope: serde_json::Value = serde_json::from_str(&envelope).unwrap();
        let recipient = envelope["rcpt"][0].as_str().unwrap();
        assert!(recipient.contains("@d00000") && recipient.ends_with(".bench.test>"), "{recipient}");
        assert!(text.contains(&format!("To: {recipient}\r\n")), "{recipient}");
        assert_eq!(envelope["ehlo"], "postbench.test");
    }
    assert_eq!(lengths.keys().copied().collect::<Vec<_>>(), [1024, 3072]);
}

#[test]
fn refusals_are_counted_and_the_session_goes_on() {
    for (stage, pipelined) in
        [(Stage::Mail, true), (Stage::Rcpt, true), (Stage::Data, true), (Stage::Dot, true), (Stage::Rcpt, false)]
    {
        let sink = sink_refusing(stage, "451 4.2.1 busy", 50.0);
        let injected = inject(InjectOptions { pipelined, ..options(&sink, 200) }).unwrap();
        assert_eq!(injected.accepted + injected.refused, 200, "{stage:?}");
        assert!((50..150).contains(&injected.refused), "{stage:?}: {}", injected.refused);
        assert_eq!(injected.trouble.as_deref(), Some("451 4.2.1 busy"));
        assert_eq!(sink.ledger().totals().messages, injected.accepted);
        assert_eq!(injected.connections, 4);
    }
}

#[test]
fn persisting_outlasts_refusals_and_closed_connections() {
    let sink = sink_refusing(Stage::Mail, "421 4.3.2 later", 20.0);
    let injected = inject(InjectOptions { persist: true, ..options(&sink, 40) }).unwrap();
    assert_eq!(injected.accepted, 40);
    assert!(injected.refused > 0);
    assert_eq!(sink.ledger().totals().distinct(), 40);
}

#[test]
fn acknowledged_ids_are_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("acks");
    let sink = Sink::start(SinkOptions::on_loopback()).unwrap();
    let injected = inject(InjectOptions { ack_file: Some(path.clone()), ..options(&sink, 30) }).unwrap();
    let lines = std::fs::read_to_string(path).unwrap();
    let ids: Vec<BenchId> = lines.lines().map(|line| BenchId::parse(line.as_bytes()).unwrap()).collect();
    assert_eq!(ids.len(), 30);
    assert!(ids.iter().all(|id| id.run == injected.run && sink.ledger().times_seen(*id) == 1));
}

#[test]
fn nobody_listening_ends_the_run() {
    // Bound, so that nobody else gets the port, but not listening.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let injected = inject(InjectOptions { messages: Some(10), ..InjectOptions::to(address) }).unwrap();
    assert_eq!(injected.accepted, 0);
    assert!(injected.trouble.unwrap().starts_with("cannot connect to 127.0.0.1:"));
}

#[test]
fn stopping_ends_an_endless_run_with_every_acknowledged_message_at_the_sink() {
    let sink = Sink::start(SinkOptions::on_loopback()).unwrap();
    let injector = Injector::start(InjectOptions { messages: None, ..options(&sink, 0) }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(sink.ledger().wait_for(100));
    injector.stop();
    let (injected, acknowledged) = injector.finish().unwrap();
    assert!(injected.accepted >= 96, "{}", injected.accepted);
    for sequence in acknowledged {
        assert_eq!(sink.ledger().times_seen(BenchId { run: injected.run, sequence }), 1);
    }
}

#[test]
fn a_server_that_never_answers_can_be_left() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let options = InjectOptions { persist: true, ..InjectOptions::to(silent.local_addr().unwrap()) };
    let injector = Injector::start(options.clone()).unwrap();
    let mut connections = Vec::new();
    for _ in 0..options.sessions {
        connections.push(silent.accept().unwrap());
    }
    injector.stop();
    assert!(!injector.is_finished());
    injector.abandon();
    let (injected, acknowledged) = injector.finish().unwrap();
    assert_eq!((injected.accepted, injected.unanswered, acknowledged.len()), (0, 0, 0));
    // Dropping one does the same.
    drop(Injector::start(options).unwrap());
}
