//! The service over real sockets: shapes of answers and errors, and who gets any.

#![expect(clippy::disallowed_methods, reason = "asks over loopback")]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use super::*;
use crate::admin::metrics::ShardMetrics;
use crate::admin::{
    Chosen, Inspected, MailChoice, MessageState, QueueRow, Reloaded, SuspensionEnd, SuspensionRow, TlsReportRow,
    WallTime,
};
use crate::config::Changes;
use crate::engine::ReloadError;
use crate::runtime::event_file::EventLogStatistics;

#[derive(Default)]
struct Engine {
    unready: Option<String>,
    stuck: bool,
    rows: usize,
    asked: Mutex<Vec<MessageFilter>>,
    suspended: Mutex<Vec<SuspensionRow>>,
    chosen: Mutex<Vec<(MailChoice, String)>>,
    reload_fails: Option<ReloadError>,
}

impl Engine {
    fn choose(&self, choice: MailChoice, reason: String) -> Chosen {
        self.chosen.lock().unwrap().push((choice, reason));
        Chosen { recipients: [("acme@example.net".to_owned(), 2), ("example.org".to_owned(), 1)].into() }
    }
}

impl Backend for Engine {
    fn queues(&self, _: usize) -> Reply<'_, QueueReport> {
        let row = QueueRow {
            queue: "acme@example.net".into(),
            domain: "example.net".into(),
            tenant: Some("acme".into()),
            depth: 3,
            ready: 1,
            rate_per_s: 0.5,
            next_due: Some(WallTime(1_795_000_000_123)),
            last_answer: Some("451 4.2.0 later".into()),
            ..QueueRow::default()
        };
        Box::pin(async { Ok(QueueReport { total: 3, queues: vec![row] }) })
    }

    fn tls_report(&self) -> Reply<'_, Vec<TlsReportRow>> {
        let row = TlsReportRow {
            policy_type: "tlsa",
            policy_domain: "mx.example.net".into(),
            recipient_domain: "example.net".into(),
            successful_sessions: 3,
            failed_sessions: [("tlsa-invalid", 1)].into(),
        };
        Box::pin(async { Ok(vec![row]) })
    }

    fn messages(&self, filter: MessageFilter) -> Reply<'_, Vec<MessageRow>> {
        let row = |number: usize| MessageRow {
            id: format!("{number:016x}"),
            recipient: "a@example.net".into(),
            queue: "example.net".into(),
            num_attempts: 2,
            due: Some(WallTime(1_795_000_000_000)),
            last_answer: None,
            blocked_by: Some("connection refused by 127.0.0.1:2526, next try in 12 s".into()),
            state: MessageState::Ready,
            sender: "b@example.org".into(),
            created: WallTime(1_794_999_000_000),
            expires: WallTime(1_795_999_000_000),
            size: 2_048,
            tenant: None,
            campaign: None,
            site: None,
            egress_source: None,
        };
        let rows: Vec<_> = (1..=self.rows.min(filter.limit)).map(row).collect();
        self.asked.lock().unwrap().push(filter);
        let stuck = self.stuck;
        Box::pin(async move {
            if stuck {
                std::future::pending::<()>().await;
            }
            Ok(rows)
        })
    }

    fn status(&self) -> Reply<'_, Status> {
        Box::pin(async { Err(Unavailable("shard 1 is gone".into())) })
    }

    fn suspensions(&self) -> Reply<'_, Vec<SuspensionRow>> {
        let rows = self.suspended.lock().unwrap().clone();
        Box::pin(async { Ok(rows) })
    }

    fn suspend(&self, suspension: SuspensionRow, end: SuspensionEnd) -> Reply<'_, Result<String, String>> {
        let (until, left) = match end {
            SuspensionEnd::After(left) => (WallTime(1_795_000_000_000 + left.as_millis() as u64), left),
            SuspensionEnd::At(until) => (until, Duration::from_millis(until.0 - 1_795_000_000_000)),
        };
        let id = format!("id-{}", self.suspended.lock().unwrap().len());
        self.suspended.lock().unwrap().push(SuspensionRow { id: id.clone(), until, left, ..suspension });
        Box::pin(async { Ok(Ok(id)) })
    }

    fn has_tenant(&self, name: &str) -> bool {
        name == "acme"
    }

    fn resume(&self, id: String) -> Reply<'_, bool> {
        let mut suspended = self.suspended.lock().unwrap();
        let before = suspended.len();
        suspended.retain(|row| row.id != id);
        let removed = suspended.len() < before;
        Box::pin(async move { Ok(removed) })
    }

    fn inspect(&self, id: MessageId, want_body: bool) -> Reply<'_, Option<Inspected>> {
        let inspected = Inspected {
            sender: "n@acme.example".into(),
            recipients: (0..id.sequence().0).map(|number| format!("r{number}@example.net")).collect(),
            tenant: "acme".into(),
            due: WallTime(1_795_000_000_123),
            num_attempts: 2,
            data: want_body.then(|| b"Subject: \xe9\r\n\r\n".to_vec()),
            ..Inspected::default()
        };
        Box::pin(async move { Ok(Some(inspected).filter(|inspected| !inspected.recipients.is_empty())) })
    }

    fn bounce(&self, choice: MailChoice, reason: String) -> Reply<'_, (String, Chosen)> {
        let chosen = self.choose(choice, reason);
        Box::pin(async { Ok(("id-7".to_owned(), chosen)) })
    }

    fn release(&self, choice: MailChoice, reason: String) -> Reply<'_, Chosen> {
        let chosen = self.choose(choice, reason);
        Box::pin(async { Ok(chosen) })
    }

    fn reload(&self) -> Reply<'_, Result<Reloaded, ReloadError>> {
        let changed = vec!["tenant \"acme\"".to_owned()];
        let changes = Changes { added: vec!["route \"a.test\"".to_owned()], removed: Vec::new(), changed };
        let reloaded = Reloaded { changes, since: WallTime(1_795_000_000_123) };
        let answer = self.reload_fails.clone().map_or(Ok(reloaded), Err);
        Box::pin(async { Ok(answer) })
    }

    fn readiness(&self) -> Result<(), String> {
        self.unready.clone().map_or(Ok(()), Err)
    }

    fn liveness(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Sends each request over a connection of its own to a served engine.
fn ask(engine: Engine, tokens: &[&str], requests: &[&str]) -> (Vec<(u16, String, String)>, Arc<Engine>) {
    let tokens = tokens.iter().map(|token| hexadecimal(digest::digest(&digest::SHA256, token.as_bytes()).as_ref()));
    let options = watch::Sender::new(AdminOptions { admin_token_sha256: tokens.collect() }).subscribe();
    let engine = Arc::new(engine);
    let backend: Arc<dyn Backend> = Arc::<Engine>::clone(&engine);
    // The clock jumps while everybody waits, so that timeouts take no time.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answers = runtime.block_on(async {
        let listener = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let metrics = Metrics::new(vec![Arc::new(ShardMetrics::default())], EventLogStatistics::default);
        let shutdown = async move { drop(stopped.await) };
        let server = tokio::spawn(serve(listener, options, backend, Arc::new(metrics), shutdown));
        let mut answers = Vec::new();
        for request in requests {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let (first, rest) = request.split_once('\n').unwrap_or((request, ""));
            let host = if rest.contains("Host:") { "" } else { "Host: localhost\r\n" };
            let (rest, body) = rest.split_once("\n\n").unwrap_or((rest, ""));
            let mut fields: String = rest.lines().map(|line| format!("{line}\r\n")).collect();
            if !body.is_empty() {
                fields += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
            }
            let text = format!("{first} HTTP/1.1\r\n{host}Connection: close\r\n{fields}\r\n{body}");
            stream.write_all(text.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            answers.push((status, head.to_ascii_lowercase(), body.to_owned()));
        }
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
        answers
    });
    (answers, engine)
}

fn ask_one(engine: Engine, request: &str) -> (u16, Value) {
    let (mut answers, _) = ask(engine, &[], &[request]);
    let (status, _, body) = answers.remove(0);
    (status, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}")))
}

fn error(status: u16, code: &str, message: &str) -> (u16, Value) {
    (status, json!({ "error": { "code": code, "message": message } }))
}

#[test]
fn queues_have_the_documented_shape() {
    let expected = json!({ "total": 3, "queues": [{
        "queue": "acme@example.net", "domain": "example.net", "tenant": "acme", "campaign": null, "site": null,
        "egress_source": null, "depth": 3, "ready": 1, "rate_per_s": 0.5,
        "next_due": "2026-11-18T11:06:40.123Z", "last_answer": "451 4.2.0 later",
    }]});
    assert_eq!(ask_one(Engine::default(), "GET /api/admin/queues/v1"), (200, expected));
}

#[test]
fn messages_have_the_documented_shape_and_the_filter_arrives() {
    let request = "GET /api/admin/messages/v1?recipient=A%2Bb@Example.NET&tenant=acme&message_id=%3Cx@y%3E&limit=1";
    let (answers, engine) = ask(Engine { rows: 1, ..Engine::default() }, &[], &[request]);
    let expected = json!({ "truncated": false, "messages": [{
        "id": "0000000000000001", "recipient": "a@example.net", "queue": "example.net", "num_attempts": 2,
        "due": "2026-11-18T11:06:40.000Z", "last_answer": null,
        "blocked_by": "connection refused by 127.0.0.1:2526, next try in 12 s", "state": "ready",
        "sender": "b@example.org", "created": "2026-11-18T10:50:00.000Z", "expires": "2026-11-30T00:36:40.000Z",
        "size": 2_048, "tenant": null, "campaign": null, "site": null, "egress_source": null,
    }]});
    assert_eq!(serde_json::from_str::<Value>(&answers[0].2).unwrap(), expected);
    let filter = MessageFilter {
        id: None,
        recipient: Some("A+b@example.net".into()),
        tenant: Some("acme".into()),
        message_id: Some("x@y".into()),
        limit: 2,
    };
    assert_eq!(*engine.asked.lock().unwrap(), [filter]);
}

#[test]
fn more_rows_than_the_limit_are_told_as_truncated() {
    let (status, body) = ask_one(Engine { rows: 500, ..Engine::default() }, "GET /api/admin/messages/v1");
    assert_eq!((status, body["truncated"].as_bool()), (200, Some(true)));
    assert_eq!(body["messages"].as_array().unwrap().len(), HTTP_ROWS_DEFAULT);
}

#[test]
fn one_message_is_found_or_404() {
    let request = "GET /api/admin/messages/v1/000100000000002A";
    let (answers, engine) = ask(Engine { rows: 1, ..Engine::default() }, &[], &[request]);
    assert_eq!(answers[0].0, 200);
    assert_eq!(engine.asked.lock().unwrap()[0].id, Some(MessageId::from_raw(0x0001_0000_0000_002a)));
    let message = "no message 000100000000002a is in the spool; if it was, the event log has its outcome";
    let absent = ask_one(Engine::default(), "GET /api/admin/messages/v1/000100000000002a");
    assert_eq!(absent, error(404, "not_found", message));
}

#[test]
fn bad_requests_get_json_that_says_what_is_wrong() {
    let bad = |request: &str| ask_one(Engine::default(), request);
    assert_eq!(
        bad("GET /api/admin/messages/v1/zz"),
        error(400, "bad_request", "\"zz\": a message id is 16 hexadecimal digits")
    );
    for limit in ["0", "10001"] {
        assert_eq!(
            bad(&format!("GET /api/admin/messages/v1?limit={limit}")),
            error(400, "bad_request", "limit: a number from 1 to 10000")
        );
    }
    for query in ["rcpt=a@b.example", "limit=many", "limit=1&limit=2"] {
        let (status, body) = bad(&format!("GET /api/admin/messages/v1?{query}"));
        assert_eq!((status, body["error"]["code"].as_str()), (400, Some("bad_request")), "{query}");
    }
    let large = format!("POST /api/admin/release/v1\n\n\n{{\"reason\":\"{}\"}}", "x".repeat(3 << 20));
    for (request, status, code) in [
        (&*large, 413, "too_large"),
        ("POST /api/admin/release/v1", 415, "unsupported_media_type"),
        ("POST /api/admin/release/v1\n\n\n{", 400, "bad_request"),
        // Which field an item of an array is, no document says.
        ("POST /api/admin/release/v1\n\n\n[null,null,null,null,\"x\"]", 400, "bad_request"),
        ("POST /api/admin/bounce/v1\n\n\n[\"spring\",null,null,[],null,false,\"x\"]", 400, "bad_request"),
        ("POST /api/admin/suspend/v1\n\n\n[\"spring\",null,null,\"x\"]", 400, "bad_request"),
        // No mail is for such a domain, and who wrote it believes that some has stopped.
        ("POST /api/admin/suspend/v1\n\n\n{\"domain\":\"*\",\"reason\":\"x\"}", 400, "bad_request"),
        ("POST /api/admin/bounce/v1\n\n\n{\"domain\":\"@example.net\",\"reason\":\"x\"}", 400, "bad_request"),
        ("GET /api/admin/messages/v1/%ff", 400, "bad_request"),
        ("POST /api/admin/suspend-ready-q/v1\n\n\n[\"ip-a->*\",\"x\"]", 400, "bad_request"),
        ("DELETE /api/admin/suspend/v1\n\n\n[\"id-0\"]", 400, "bad_request"),
        ("POST /api/admin/bounce/v1\n\n\n{\"tenant\":\"\",\"reason\":\"x\"}", 400, "bad_request"),
        ("POST /api/admin/release/v1\n\n\n{\"domain\":\"\",\"reason\":\"x\"}", 400, "bad_request"),
    ] {
        let (found, body) = bad(request);
        assert_eq!((found, body["error"]["code"].as_str()), (status, Some(code)), "{body}");
    }
    assert_eq!(
        bad("GET /api/inject/v1"),
        error(404, "not_found", "there is no /api/inject/v1; GET /api/openapi.json lists what there is")
    );
    assert_eq!(
        bad("DELETE /api/admin/queues/v1"),
        error(405, "method_not_allowed", "DELETE is not possible for /api/admin/queues/v1")
    );
}

/// Connections that ask nothing, that never end their request, that never send its body, and that wait for an engine
/// which does not answer. Once they were left to their time limits, and a probe waited behind them.
#[test]
fn a_probe_is_answered_whatever_others_do() {
    let options = watch::Sender::new(AdminOptions::default()).subscribe();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Metrics::new(vec![Arc::new(ShardMetrics::default())], EventLogStatistics::default);
        let engine = Arc::new(Engine { stuck: true, ..Engine::default() });
        let server = tokio::spawn(serve(listener, options, engine, Arc::new(metrics), std::future::pending()));
        let asked = [
            "",
            "GET /api/check-liv",
            "POST /api/admin/bounce/v1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: 1000\r\n\r\n{",
            "GET /api/admin/messages/v1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ];
        let mut others = Vec::new();
        for text in asked.iter().cycle().take(400) {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // One that was dismissed takes no more.
            let _ = stream.write_all(text.as_bytes()).await;
            others.push(stream);
        }
        let begun = Instant::now();
        for _ in 0..10 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let probe = format!("GET {LIVENESS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            stream.write_all(probe.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
        assert!(begun.elapsed() < HTTP_BACKEND_TIMEOUT / 2, "{:?}", begun.elapsed());
        server.abort();
    });
}

#[test]
fn an_engine_that_does_not_answer_is_503() {
    let unavailable = ask_one(Engine::default(), "GET /api/admin/status/v1");
    assert_eq!(unavailable, error(503, "unavailable", "shard 1 is gone"));
    // In virtual time: the clock jumps to the next timer when all tasks wait.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let engine = Engine { stuck: true, ..Engine::default() };
    let late = runtime.block_on(async { in_time(engine.messages(MessageFilter::default())).await.unwrap_err() });
    assert_eq!((late.status.as_u16(), late.message.as_str()), (503, "the engine did not answer in time"));
}

#[test]
fn health_is_200_or_503_with_the_reason() {
    assert_eq!(ask_one(Engine::default(), "GET /api/check-liveness/v1"), (200, json!({ "live": true })));
    assert_eq!(ask_one(Engine::default(), "GET /api/check-readiness/v1"), (200, json!({ "ready": true })));
    let full = || Engine { unready: Some("the spool is full".into()), ..Engine::default() };
    assert_eq!(ask_one(full(), "GET /api/check-readiness/v1"), error(503, "not_ready", "the spool is full"));
    // A probe without a token learns the state and nothing else.
    let (answers, _) = ask(full(), &["secret"], &["GET /api/check-readiness/v1"]);
    assert_eq!(answers[0].0, 503);
    assert!(!answers[0].2.contains("spool"), "{}", answers[0].2);
}

#[test]
fn with_tokens_everybody_needs_one() {
    let requests = [
        "GET /metrics",
        "GET /metrics\nAuthorization: Bearer wrong",
        "GET /metrics\nAuthorization: Basic secret",
        "GET /nowhere",
        "GET /metrics\nAuthorization: bearer second",
        "GET /metrics\nHost: mta.example.com\nAuthorization: Bearer secret",
    ];
    let (answers, _) = ask(Engine::default(), &["secret", "second"], &requests);
    let statuses: Vec<_> = answers.iter().map(|answer| answer.0).collect();
    assert_eq!(statuses, [401, 401, 401, 401, 200, 200]);
    assert!(answers[0].1.contains("www-authenticate: bearer"));
}

#[test]
fn without_tokens_only_this_machine_is_served() {
    let options = AdminOptions::default();
    let allowed = |peer: &str, host: &str| {
        options.check(peer.parse().unwrap(), host, &HeaderMap::new()).map_err(|error| error.status.as_u16())
    };
    assert_eq!(allowed("127.0.0.1:4", "127.0.0.1:8025"), Ok(()));
    assert_eq!(allowed("[::1]:4", "[::1]:8025"), Ok(()));
    assert_eq!(allowed("[::ffff:127.9.9.9]:4", "LocalHost"), Ok(()));
    assert_eq!(allowed("192.0.2.1:4", "127.0.0.1:8025"), Err(403));
    assert_eq!(allowed("[2001:db8::1]:4", "localhost"), Err(403));
    assert_eq!(allowed("[::ffff:192.0.2.1]:4", "localhost"), Err(403));
    // A web page whose name was pointed at 127.0.0.1.
    assert_eq!(allowed("127.0.0.1:4", "evil.example:8025"), Err(403));
    assert_eq!(allowed("127.0.0.1:4", "localhost.evil.example"), Err(403));
}

/// RFC 9112 §3.2.
#[test]
fn a_request_says_once_which_host_it_asks() {
    // Any `Host:` here stands in for the usual one, also as part of another name.
    let requests = [
        ("GET /metrics\nNo-Host: x", 400),
        ("GET /api/check-liveness/v1\nNo-Host: x", 400),
        ("GET /metrics\nHost: localhost\nHost: localhost", 400),
        ("GET /metrics\nHost: localhost\nHost: evil.example", 400),
        ("GET /metrics\nHost: l\u{f6}calhost", 400),
        ("GET /metrics\nHost: ", 403),
        ("GET http://evil.example/metrics\nHost: localhost", 403),
        ("GET http://user@localhost/metrics\nHost: localhost", 403),
        ("GET http://localhost:8025/metrics\nHost: evil.example", 200),
    ];
    let (answers, _) = ask(Engine::default(), &[], &requests.map(|(request, _)| request));
    assert_eq!(answers.iter().map(|answer| answer.0).collect::<Vec<_>>(), requests.map(|(_, status)| status));
    let (answers, _) = ask(Engine::default(), &["secret"], &["GET /metrics\nNo-Host: x"]);
    assert_eq!(answers[0].2, error(400, "bad_request", "a request has one Host field").1.to_string());
}

#[test]
fn metrics_have_both_forms() {
    let (answers, _) = ask(Engine::default(), &[], &["GET /metrics", "GET /metrics.json"]);
    assert!(answers[0].1.contains("content-type: text/plain; version=0.0.4"));
    assert!(answers[0].2.starts_with("# HELP connection_count "));
    assert_eq!(serde_json::from_str::<Value>(&answers[1].2).unwrap()["message_count"]["type"], "gauge");
}

/// KumoMTA's requests and answers.
#[test]
fn suspensions_are_made_listed_and_ended() {
    let requests = [
        "POST /api/admin/suspend-ready-q/v1\n\n\n\
         {\"name\":\"ip-a->google@smtp_client\",\"reason\":\"a block\",\"duration\":\"1h 30m\"}",
        "POST /api/admin/suspend/v1\n\n\n{\"tenant\":\"acme\",\"domain\":\"Example.NET\",\"reason\":\"a complaint\",\
         \"expires\":\"2026-11-18T12:06:40Z\"}",
        "GET /api/admin/suspend-ready-q/v1",
        "GET /api/admin/suspend/v1",
        "DELETE /api/admin/suspend-ready-q/v1\n\n\n{\"id\":\"id-0\"}",
        "DELETE /api/admin/suspend-ready-q/v1\n\n\n{\"id\":\"id-0\"}",
        "GET /api/admin/suspend-ready-q/v1",
        "POST /api/admin/suspend/v1\n\n\n{\"reason\":\"everything\"}",
        "POST /api/admin/suspend-ready-q/v1\n\n\n{\"name\":\"google\",\"reason\":\"x\"}",
        "POST /api/admin/suspend/v1\n\n\n{\"tenant\":\"a\",\"reason\":\"x\",\"duration\":\"soon\"}",
        "POST /api/admin/suspend/v1\n\n\n{\"tenants\":\"a\",\"reason\":\"x\"}",
        "POST /api/admin/suspend/v1\n\n\n{\"tenant\":\"amce\",\"reason\":\"x\"}",
        "POST /api/admin/suspend/v1\n\n\n{\"tenant\":\"\",\"reason\":\"x\"}",
        "POST /api/admin/suspend/v1\n\n\n{\"tenant\":\"acme\",\"reason\":\" \"}",
    ];
    let (answers, _) = ask(Engine::default(), &[], &requests);
    let json = |place: usize| serde_json::from_str::<Value>(&answers[place].2).unwrap();
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.0).collect();
    assert_eq!(statuses, [200, 200, 200, 200, 200, 404, 200, 400, 400, 400, 400, 200, 400, 400]);
    assert_eq!((json(0), json(1)), (json!({ "id": "id-0" }), json!({ "id": "id-1" })));
    let ready = json!([{ "id": "id-0", "name": "ip-a->google@smtp_client", "reason": "a block",
        "duration": "1h 30m", "expires": "2026-11-18T12:36:40.000Z" }]);
    assert_eq!(json(2), ready);
    let listed = json!([{ "id": "id-1", "campaign": null, "tenant": "acme", "domain": "example.net",
        "reason": "a complaint", "duration": "1h", "expires": "2026-11-18T12:06:40.000Z",
        "egress_source": null, "site": null }]);
    assert_eq!(json(3), listed);
    assert_eq!(json(5)["error"]["message"], "no suspension id-0 is in force");
    assert_eq!(json(6), json!([]));
    assert_eq!(json(9)["error"]["code"], "bad_request");
    let warning = "the configuration has no tenant \"amce\"; only mail that was accepted for it before is stopped";
    assert_eq!(json(11), json!({ "id": "id-1", "warning": warning }));
    assert_eq!(json(12)["error"]["message"], "tenant: is empty; name one, or leave it out");
}

#[test]
fn tls_sessions_are_told_by_policy() {
    let (answers, _) = ask(Engine::default(), &[], &["GET /api/admin/tls-report/v1"]);
    let expected = concat!(
        r#"{"policies":[{"policy_type":"tlsa","policy_domain":"mx.example.net","recipient_domain":"example.net","#,
        r#""successful_sessions":3,"failed_sessions":{"tlsa-invalid":1}}]}"#,
    );
    assert_eq!((answers[0].0, answers[0].2.as_str()), (200, expected));
}

/// What is described is served, and what is served (`router`) is described.
#[test]
fn openapi_describes_what_exists() {
    let described: Value = serde_json::from_str(OPENAPI).unwrap();
    let paths: BTreeSet<&str> = described["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    let source = include_str!("../http_admin.rs");
    let routed = source.split(".route(").skip(1).map(|rest| rest.split('"').nth(1).unwrap());
    assert_eq!(paths, routed.collect());
    let requests: Vec<_> =
        paths.iter().map(|path| format!("GET {}", path.replace("{id}", "0000000000000001"))).collect();
    let requests: Vec<&str> = requests.iter().map(String::as_str).collect();
    let (answers, _) = ask(Engine { rows: 1, ..Engine::default() }, &[], &requests);
    for ((request, answer), path) in requests.iter().zip(&answers).zip(&paths) {
        let expected = match request {
            _ if described["paths"][path]["get"].is_null() => 405,
            _ if request.ends_with("/inspect-message/v1") => 400,
            // The engine of these tests has no status to tell.
            _ if request.ends_with("/status/v1") => 503,
            _ => 200,
        };
        assert_eq!(answer.0, expected, "{request}");
    }
    let row = &described["components"]["schemas"]["Message"]["properties"];
    let answer = answers.iter().zip(&requests).find(|(_, request)| request.ends_with("/messages/v1")).unwrap().0;
    let shown: Value = serde_json::from_str(&answer.2).unwrap();
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(row), names(&shown["messages"][0]));
}

/// A key that is in no body is answered with those that are.
#[test]
fn openapi_names_the_keys_of_each_body() {
    let described: Value = serde_json::from_str(OPENAPI).unwrap();
    let schema = |node: &Value| {
        let node = &node["content"]["application/json"]["schema"];
        let name = node["$ref"].as_str().map(|name| name.rsplit('/').next().unwrap().to_owned());
        name.map_or(node.clone(), |name| described["components"]["schemas"][&name].clone())
    };
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let mut bodies = 0;
    for (path, calls) in described["paths"].as_object().unwrap() {
        for (method, call) in calls.as_object().unwrap() {
            let good = schema(&call["responses"]["200"]);
            if let Some(required) = good["required"].as_array() {
                let keys = names(&good["properties"]);
                assert!(required.iter().all(|key| keys.contains(key.as_str().unwrap())), "{method} {path}");
            }
            if call["requestBody"].is_null() {
                continue;
            }
            let body = schema(&call["requestBody"]);
            assert_eq!(body["additionalProperties"], false, "{method} {path}");
            let request = format!("{} {path}\n\n\n{{\"?\":1}}", method.to_uppercase());
            let (status, answer) = ask_one(Engine::default(), &request);
            let text = answer["error"]["message"].as_str().unwrap();
            let taken = text.split('`').skip(3).step_by(2).map(str::to_owned).collect();
            assert_eq!((status, names(&body["properties"])), (400, taken), "{text}");
            bodies += 1;
        }
    }
    assert_eq!(bodies, 6);
}

/// KumoMTA's requests and answers, of what can be meant; the rest is refused by name.
#[test]
fn mail_is_bounced_and_released() {
    let requests = [
        "POST /api/admin/bounce/v1\n\n\n{\"tenant\":\"acme\",\"domain\":\"Example.NET\",\"reason\":\"a\\nmistake\",\
         \"suppress_logging\":false,\"duration\":null}",
        "POST /api/admin/bounce/v1\n\n\n{\"message\":\"000100000000002a\",\"held\":true,\"reason\":\"x\"}",
        "POST /api/admin/bounce/v1\n\n\n{\"queue_names\":[\"example.org\"],\"reason\":\"x\"}",
        "POST /api/admin/release/v1\n\n\n{\"reason\":\"asked\"}",
        "POST /api/admin/release/v1\n\n\n{\"message\":\"000100000000002a\",\"reason\":\"asked\"}",
        "POST /api/admin/bounce/v1\n\n\n{\"reason\":\"everything\"}",
        "POST /api/admin/bounce/v1\n\n\n{\"tenant\":\"acme\"}",
        "POST /api/admin/bounce/v1\n\n\n{\"tenant\":\"acme\",\"reason\":\"x\",\"duration\":\"5m\"}",
        "POST /api/admin/bounce/v1\n\n\n{\"tenant\":\"acme\",\"reason\":\"x\",\"suppress_logging\":true}",
        "POST /api/admin/bounce/v1\n\n\n{\"message\":\"42\",\"reason\":\"x\"}",
        "POST /api/admin/release/v1\n\n\n{\"held\":true,\"reason\":\"x\"}",
        "GET /api/admin/bounce/v1",
    ];
    let (answers, engine) = ask(Engine::default(), &[], &requests);
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.0).collect();
    assert_eq!(statuses, [200, 200, 200, 200, 200, 400, 400, 400, 400, 400, 400, 405]);
    let json = |place: usize| serde_json::from_str::<Value>(&answers[place].2).unwrap();
    let counts = json!({ "acme@example.net": 2, "example.org": 1 });
    assert_eq!(json(0), json!({ "id": "id-7", "bounced": counts, "total_bounced": 3 }));
    assert_eq!(json(3), json!({ "released": counts, "total_released": 3 }));
    let said = |place: usize| json(place)["error"]["message"].as_str().unwrap().to_owned();
    assert!(said(5).contains("without, all mail would end"), "{}", said(5));
    assert!(said(6).starts_with("reason: is missing"), "{}", said(6));
    assert!(said(7).starts_with("duration: "), "{}", said(7));

    let id: Option<MessageId> = Some("000100000000002a".parse().unwrap());
    let all = MailChoice::default();
    let expected = [
        (MailChoice { tenant: Some("acme".into()), domain: Some("example.net".into()), ..all.clone() }, "a mistake"),
        (MailChoice { message: id, held: true, ..all.clone() }, "x"),
        (MailChoice { queues: vec!["example.org".into()], ..all.clone() }, "x"),
        (all.clone(), "asked"),
        (MailChoice { message: id, ..all }, "asked"),
    ];
    assert_eq!(*engine.chosen.lock().unwrap(), expected.map(|(choice, reason)| (choice, reason.to_owned())));
}

/// KumoMTA's answer: one recipient stands by itself, several in a list.
#[test]
fn a_message_is_inspected() {
    let requests = [
        "GET /api/admin/inspect-message/v1?id=0000000000000001",
        "GET /api/admin/inspect-message/v1?id=0000000000000002&want_body=true",
        "GET /api/admin/inspect-message/v1?id=0000000000000000",
        "GET /api/admin/inspect-message/v1?id=1",
        "GET /api/admin/inspect-message/v1",
    ];
    let (answers, _) = ask(Engine::default(), &[], &requests);
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.0).collect();
    assert_eq!(statuses, [200, 200, 404, 400, 400]);
    let json = |place: usize| serde_json::from_str::<Value>(&answers[place].2).unwrap();
    let mut message = json!({ "sender": "n@acme.example", "recipient": "r0@example.net",
        "meta": { "tenant": "acme", "campaign": "", "egress_pool": "" },
        "due": "2026-11-18T11:06:40.123Z", "num_attempts": 2 });
    assert_eq!(json(0), json!({ "id": "0000000000000001", "message": message }));
    message["recipient"] = json!(["r0@example.net", "r1@example.net"]);
    message["data"] = json!("Subject: \u{fffd}\r\n\r\n");
    assert_eq!(json(1), json!({ "id": "0000000000000002", "message": message }));
}

#[test]
fn a_reload_tells_what_it_changes_or_all_that_is_wrong() {
    let (status, body) = ask_one(Engine::default(), "POST /api/admin/reload/v1");
    let expected = json!({
        "added": ["route \"a.test\""], "removed": [], "changed": ["tenant \"acme\""],
        "since": "2026-11-18T11:06:40.123Z",
    });
    assert_eq!((status, body), (200, expected));
    let lines = "a.toml:1:1: x: is not a known key\na.toml:2:1: y: is not a known key";
    let keys = vec!["shards: a change of it needs a restart".to_owned()];
    for (error, status, code, message) in [
        (ReloadError::Invalid(lines.to_owned()), 422, "invalid_configuration", lines),
        (ReloadError::NeedsRestart(keys.clone()), 409, "needs_restart", &*keys[0]),
    ] {
        let engine = Engine { reload_fails: Some(error), ..Engine::default() };
        let expected = json!({ "error": { "code": code, "message": message } });
        assert_eq!(ask_one(engine, "POST /api/admin/reload/v1"), (status, expected));
    }
}
