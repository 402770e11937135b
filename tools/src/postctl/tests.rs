//! The program against an HTTP server of a few lines: what is asked, what is shown, how it ends.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::thread;

use serde_json::{Value, json};

use crate::run;

struct Ended {
    code: u8,
    out: String,
    err: String,
}

fn postctl(arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let arguments = ["postctl"].iter().chain(arguments).map(Into::into);
    let environment =
        |name: &str| environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = run(arguments, environment, &mut out, &mut err);
    Ended { code, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
}

/// Runs postctl against a server that answers one request. Gives the request, too.
fn with_engine(status: &str, body: &str, arguments: &[&str]) -> (Ended, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut request = String::new();
        let mut lines = BufReader::new(&stream);
        let mut body_bytes = 0;
        loop {
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            if let Some(length) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                body_bytes = length.parse().unwrap();
            }
            request.push_str(line);
            request.push('\n');
        }
        let mut body = vec![0; body_bytes];
        lines.read_exact(&mut body).unwrap();
        request.push_str(std::str::from_utf8(&body).unwrap());
        (&stream).write_all(answer.as_bytes()).unwrap();
        request
    });
    let ended = postctl(arguments, &[("POSTRIDER_URL", &url)]);
    (ended, server.join().unwrap())
}

fn shown(body: &Value, arguments: &[&str]) -> String {
    let (ended, _) = with_engine("200 OK", &body.to_string(), arguments);
    assert_eq!((ended.code, ended.err.as_str()), (0, ""));
    ended.out
}

fn queues() -> Value {
    json!({ "total": 1_205, "queues": [
        {
            "queue": "spring:acme@example.net", "domain": "example.net", "tenant": "acme", "campaign": "spring",
            "site": "mx1.example.net", "egress_source": "ip-a", "depth": 1_203, "ready": 17, "rate_per_s": 99.95,
            "next_due": "2026-11-18T11:06:40.000Z", "last_answer": "451 4.7.1 try \u{1b}[31mlater", "new": 1,
        },
        {
            "queue": "example.org", "domain": "example.org", "tenant": null, "campaign": null, "site": null,
            "egress_source": null, "depth": 2, "ready": 0, "rate_per_s": 0.0, "next_due": null, "last_answer": null,
        },
    ]})
}

fn messages() -> Value {
    json!({ "truncated": false, "messages": [{
        "id": "000100000000002a", "recipient": "a@example.net", "queue": "example.net", "num_attempts": 2,
        "due": "2026-11-18T11:06:40.000Z", "last_answer": "451 4.2.0 later", "blocked_by": null,
        "state": "scheduled", "sender": "", "created": "2026-11-18T10:00:00.000Z",
        "expires": "2026-11-23T10:00:00.000Z", "size": 2_048,
    }, {
        "id": "000100000000002a", "recipient": "b@example.org", "queue": "example.org", "num_attempts": 0,
        "due": "2026-11-18T10:00:00.000Z", "last_answer": null,
        "blocked_by": "127.0.0.1:2526 refused the connection; next try 2026-11-18T10:00:30.000Z",
        "state": "ready", "sender": "n@acme.example", "created": "2026-11-18T10:00:00.000Z",
        "expires": "2026-11-23T10:00:00.000Z", "size": 2_048,
    }]})
}

fn status() -> Value {
    json!({
        "live": true, "ready": false, "reason": "the spool is full", "version": "0.1.0",
        "hostname": "mta.example.com", "node_id": "557f3ad4-2c8c-41ee-976e-782d7e12e173",
        "started": "2026-11-18T10:00:00.000Z", "uptime_s": 93_784, "shards": 2,
        "listeners": [
            { "protocol": "smtp", "address": "127.0.0.1:2525" }, { "protocol": "http", "address": "127.0.0.1:8025" },
        ],
        "spool": {
            "path": "/var/spool/postrider", "durability": "fsync", "used_bytes": 53_687_091_200_u64,
            "max_bytes": 53_687_091_200_u64, "open": false, "closed_reason": "max_size is reached",
        },
        "events": { "path": "/var/log/postrider", "blocked": null },
        "messages": 1, "recipients": 2, "connections_in": 3, "connections_out": 4,
        "received": 1_000, "delivered": 998, "deferred": 5, "failed": 0,
    })
}

#[test]
fn queue_list_is_a_table() {
    let expected = "\
QUEUE                    SITE             SOURCE  DEPTH  READY  RATE/S  NEXT DUE                  LAST ANSWER
spring:acme@example.net  mx1.example.net  ip-a     1203     17   100.0  2026-11-18T11:06:40.000Z  451 4.7.1 try \u{fffd}[31mlater
example.org              -                -           2      0     0.0  -                         -
1205 recipients in 2 queues
";
    assert_eq!(shown(&queues(), &["queue", "list"]), expected);
    assert_eq!(shown(&json!({ "total": 0, "queues": [] }), &["queue", "list"]), "0 recipients in 0 queues\n");
}

#[test]
fn a_cut_queue_list_says_so() {
    let mut some = queues();
    some["total"] = json!(9_999);
    let (ended, request) = with_engine("200 OK", &some.to_string(), &["queue", "list", "--limit", "2"]);
    assert!(ended.out.ends_with("\n1205 of 9999 recipients in 2 queues; see --limit\n"), "{}", ended.out);
    assert!(request.starts_with("GET /api/admin/queues/v1?limit=2 HTTP/1.1\n"), "{request}");
}

#[test]
fn queue_show_tells_all_of_one() {
    let expected = "\
queue:         spring:acme@example.net
domain:        example.net
tenant:        acme
campaign:      spring
site:          mx1.example.net
egress source: ip-a
depth:         1203 recipients, 17 ready
rate:          100.0/s
next due:      2026-11-18T11:06:40.000Z
last answer:   451 4.7.1 try \u{fffd}[31mlater
";
    assert_eq!(shown(&queues(), &["queue", "show", "spring:acme@example.net"]), expected);
    let (ended, _) = with_engine("200 OK", &queues().to_string(), &["queue", "show", "nowhere"]);
    assert_eq!(ended.code, 1);
    assert_eq!(ended.err, "postctl: no mail is in a queue named nowhere; `postctl queue list` shows all\n");
}

#[test]
fn message_show_is_a_table_with_attempts_and_due_times() {
    let expected = "\
ID                RECIPIENT      QUEUE        STATE      ATTEMPTS  DUE                       BLOCKED BY                                                                LAST ANSWER
000100000000002a  a@example.net  example.net  scheduled         2  2026-11-18T11:06:40.000Z  -                                                                         451 4.2.0 later
000100000000002a  b@example.org  example.org  ready             0  2026-11-18T10:00:00.000Z  127.0.0.1:2526 refused the connection; next try 2026-11-18T10:00:30.000Z  -
";
    assert_eq!(shown(&messages(), &["message", "show", "000100000000002a"]), expected);
    let none = json!({ "messages": [], "truncated": false });
    assert_eq!(shown(&none, &["message", "show", "--tenant", "acme"]), "no message in the spool fits\n");
}

#[test]
fn what_is_asked_is_encoded() {
    let asked = |arguments: &[&str]| {
        let (ended, request) = with_engine("200 OK", &messages().to_string(), arguments);
        assert_eq!((ended.code, ended.err.as_str()), (0, ""));
        request.lines().next().unwrap().to_owned()
    };
    assert_eq!(
        asked(&["message", "show", "--recipient", "a+b&c@example.net", "--limit", "5"]),
        "GET /api/admin/messages/v1?recipient=a%2Bb%26c%40example.net&limit=5 HTTP/1.1"
    );
    assert_eq!(
        asked(&["message", "show", "--message-id", "<x@y>"]),
        "GET /api/admin/messages/v1?message_id=%3Cx%40y%3E HTTP/1.1"
    );
    assert_eq!(asked(&["why", "../x"]), "GET /api/admin/messages/v1/%2E%2E%2Fx HTTP/1.1");
}

#[test]
fn why_answers_in_words() {
    let expected = "\
000100000000002a to a@example.net
  now:         waits for its due time, after 2 attempts
  due:         2026-11-18T11:06:40.000Z
  last answer: 451 4.2.0 later
  accepted:    2026-11-18T10:00:00.000Z
  given up:    2026-11-23T10:00:00.000Z
  queue:       example.net
  sender:      <> (the null reverse path)

000100000000002a to b@example.org
  now:        is due and waits for a connection, after 0 attempts
  blocked by: 127.0.0.1:2526 refused the connection; next try 2026-11-18T10:00:30.000Z
  due:        2026-11-18T10:00:00.000Z
  accepted:   2026-11-18T10:00:00.000Z
  given up:   2026-11-23T10:00:00.000Z
  queue:      example.org
  sender:     n@acme.example
";
    assert_eq!(shown(&messages(), &["why", "000100000000002a"]), expected);
}

#[test]
fn status_is_read_at_a_glance() {
    let expected = "\
ready:       no: the spool is full
engine:      postrider 0.1.0 on mta.example.com, 2 shards
node:        557f3ad4-2c8c-41ee-976e-782d7e12e173
running:     1 d 2 h, since 2026-11-18T10:00:00.000Z
listeners:   smtp 127.0.0.1:2525, http 127.0.0.1:8025
spool:       /var/spool/postrider (fsync), 50.0 GiB of 50.0 GiB used; closed: max_size is reached
events:      /var/log/postrider
queued:      2 recipients in 1 message
connections: 3 in, 4 out
received:    1000 messages
outcomes:    998 delivered, 5 deferred, 0 failed
";
    assert_eq!(shown(&status(), &["status"]), expected);
}

#[test]
fn json_is_what_the_engine_said() {
    for (body, arguments) in [
        (queues(), ["queue", "list"].as_slice()),
        (messages(), &["message", "show", "000100000000002a"]),
        (messages(), &["why", "000100000000002a"]),
        (status(), &["status"]),
    ] {
        let out = shown(&body, &[arguments, &["--json"]].concat());
        assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), body);
    }
    let one = shown(&queues(), &["--json", "queue", "show", "example.org"]);
    let expected = json!({ "queues": [queues()["queues"][1]] });
    assert_eq!(serde_json::from_str::<Value>(&one).unwrap(), expected);
}

#[test]
fn a_token_is_sent_and_its_absence_explained() {
    let (ended, request) = with_engine("200 OK", &status().to_string(), &["status", "--token", "secret"]);
    assert_eq!(ended.code, 0);
    assert!(request.to_ascii_lowercase().contains("\nauthorization: bearer secret\n"), "{request}");
    let refused = json!({ "error": { "code": "unauthorized", "message": "an admin token is needed" } });
    let (ended, _) = with_engine("401 Unauthorized", &refused.to_string(), &["status"]);
    assert_eq!(ended.code, 1);
    assert_eq!(ended.err, "postctl: an admin token is needed\n  Give the token with --token or POSTRIDER_TOKEN.\n");
}

#[test]
fn the_engines_refusals_are_shown() {
    let unknown = json!({ "error": { "code": "not_found", "message": "no message 1 is in the spool" } });
    let (ended, _) = with_engine("404 Not Found", &unknown.to_string(), &["message", "show", "1"]);
    assert_eq!((ended.code, ended.err.as_str()), (1, "postctl: no message 1 is in the spool\n"));
    let (ended, _) = with_engine("404 Not Found", &unknown.to_string(), &["message", "show", "1", "--json"]);
    assert_eq!((ended.code, serde_json::from_str(&ended.err).ok()), (1, Some(unknown)), "as the engine said it");
}

#[test]
fn with_json_errors_are_json() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    for (url, code, expected) in [(&*url, 1, "unreachable"), ("nowhere", 2, "usage")] {
        let ended = postctl(&["status", "--json", "--url", url], &[]);
        let error: Value = serde_json::from_str(&ended.err).unwrap();
        assert_eq!((ended.code, &error["error"]["code"]), (code, &expected.into()), "{error}");
        assert!(error["error"]["message"].is_string() && ended.out.is_empty(), "{error}");
    }
}

#[test]
fn an_engine_that_is_not_there_is_told_with_what_to_check() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let ended = postctl(&["status", "--url", &url], &[("POSTRIDER_URL", "http://192.0.2.1:1")]);
    assert_eq!((ended.code, ended.out.as_str()), (1, ""));
    assert!(ended.err.starts_with(&format!("postctl: no engine answers at {url}: ")), "{}", ended.err);
    assert!(ended.err.contains("Connection refused"), "{}", ended.err);
    assert!(ended.err.contains("\n  Is it running? (`systemctl status postrider`"), "{}", ended.err);
    assert!(ended.err.ends_with("Give another with --url or POSTRIDER_URL.\n"), "{}", ended.err);
}

#[test]
fn another_server_is_told_as_such() {
    for (status, body) in [("200 OK", "<html>"), ("200 OK", "{}"), ("500 Oops", "{}"), ("302 Found", "")] {
        let (ended, _) = with_engine(status, body, &["status"]);
        assert_eq!(ended.code, 1);
        assert!(ended.err.contains("with something that postctl can't read"), "{}", ended.err);
    }
}

#[test]
fn wrong_command_lines_end_with_2() {
    for arguments in [
        ["queue"].as_slice(),
        &["queue", "suspend"],
        &["message", "show"],
        &["message", "show", "000100000000002a", "--recipient", "a@example.net"],
        &["message", "show", "--limit", "5"],
        &["why"],
        &["status", "--url", "https://127.0.0.1:8025"],
        &["status", "--url", "127.0.0.1:8025"],
        &["status", "--url", "http://127.0.0.1:8025/api"],
        &["completions", "tcsh"],
    ] {
        let ended = postctl(arguments, &[]);
        assert_eq!((ended.code, ended.out.as_str()), (2, ""), "{arguments:?}");
        assert!(!ended.err.is_empty(), "{arguments:?}");
    }
}

#[test]
fn help_version_and_completions_need_no_engine() {
    let help = postctl(&["--help"], &[]);
    assert_eq!((help.code, help.err.as_str()), (0, ""));
    for command in ["queue", "message", "why", "status", "completions"] {
        assert!(help.out.contains(&format!("\n  {command} ")), "{}", help.out);
    }
    assert!(postctl(&["--version"], &[]).out.starts_with("postctl "));
    for shell in ["bash", "zsh", "fish"] {
        let script = postctl(&["completions", shell], &[]);
        assert_eq!(script.code, 0);
        assert!(script.out.contains("postctl"));
    }
}

#[test]
fn numbers_are_said_as_people_do() {
    use crate::render::{bytes, duration, printable};
    assert_eq!([0, 1_023, 1_024, 1_048_575, 1_048_576].map(bytes), ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB"]);
    assert_eq!([0, 59, 60, 3_600, 3_661, 86_400].map(duration), ["0 s", "59 s", "1 min", "1 h", "1 h 1 min", "1 d"]);
    assert_eq!(printable("a\u{202e}b\tc\u{9b}ü"), "a\u{fffd}b\u{fffd}c\u{fffd}ü");
}

/// What was asked, and what is shown of the answer.
fn ordered(answer: &Value, arguments: &[&str]) -> (String, Value, String) {
    let (ended, request) = with_engine("200 OK", &answer.to_string(), arguments);
    assert_eq!((ended.code, ended.err.as_str()), (0, ""));
    let (head, body) = request.rsplit_once('\n').unwrap();
    assert!(head.lines().any(|line| line.eq_ignore_ascii_case("content-type: application/json")), "{head}");
    (head.lines().next().unwrap().to_owned(), serde_json::from_str(body).unwrap(), ended.out)
}

#[test]
fn mail_is_bounced_and_released() {
    let bounced =
        json!({ "id": "x", "bounced": { "acme@example.net": 1_203, "example.org": 1 }, "total_bounced": 1_204 });
    let arguments =
        ["queue", "bounce", "--tenant", "acme", "--domain", "example.net", "--held", "--reason", "a mistake"];
    let expected = "\
QUEUE             RECIPIENTS
acme@example.net        1203
example.org                1
1204 recipients chosen; what is on the wire ends only if it comes back undelivered
";
    let asked = json!({ "tenant": "acme", "domain": "example.net", "held": true, "reason": "a mistake" });
    let line = "POST /api/admin/bounce/v1 HTTP/1.1".to_owned();
    assert_eq!(ordered(&bounced, &arguments), (line.clone(), asked, expected.to_owned()));
    let asked = json!({ "message": "000100000000002a", "reason": "x" });
    let none = json!({ "id": "x", "bounced": {}, "total_bounced": 0 });
    let shown = "0 recipients chosen; what is on the wire ends only if it comes back undelivered\n".to_owned();
    assert_eq!(ordered(&none, &["message", "bounce", "000100000000002a", "--reason", "x"]), (line, asked, shown));

    let released = json!({ "released": { "example.org": 1 }, "total_released": 1 });
    let line = "POST /api/admin/release/v1 HTTP/1.1".to_owned();
    let shown = "QUEUE        RECIPIENTS\nexample.org           1\n1 recipient tried again\n".to_owned();
    let asked = json!({ "reason": "asked" });
    assert_eq!(ordered(&released, &["queue", "release", "--reason", "asked"]), (line.clone(), asked, shown.clone()));
    let asked = json!({ "message": "42", "reason": "asked" });
    assert_eq!(ordered(&released, &["message", "release", "42", "--reason", "asked"]), (line, asked, shown));
    // Without a reason nothing is asked.
    assert_eq!(postctl(&["queue", "bounce", "--tenant", "acme"], &[]).code, 2);
}

#[test]
fn mail_is_suspended_and_resumed() {
    let id = json!({ "id": "9511a32e" });
    let line = |method: &str, call: &str| format!("{method} /api/admin/{call}/v1 HTTP/1.1");
    let suspended = "suspended: 9511a32e\n".to_owned();
    let arguments = ["queue", "suspend", "--tenant", "acme", "--domain", "x.test", "--for", "1h", "--reason", "why"];
    let asked = json!({ "tenant": "acme", "domain": "x.test", "duration": "1h", "reason": "why" });
    assert_eq!(ordered(&id, &arguments), (line("POST", "suspend"), asked, suspended.clone()));
    for (site, name) in [(None, "ip-a->*@smtp_client"), (Some("google"), "ip-a->google@smtp_client")] {
        let mut arguments = vec!["queue", "suspend", "--source", "ip-a", "--reason", "why"];
        arguments.extend(site.into_iter().flat_map(|site| ["--site", site]));
        let asked = json!({ "name": name, "reason": "why" });
        assert_eq!(ordered(&id, &arguments), (line("POST", "suspend-ready-q"), asked, suspended.clone()));
    }
    let warned = json!({ "id": "9511a32e", "warning": "no tenant\u{1b}" });
    let (_, _, out) = ordered(&warned, &arguments);
    assert_eq!(out, suspended + "warning: no tenant\u{fffd}\n");
    let ended = (line("DELETE", "suspend"), id.clone(), "ended: 9511a32e\n".to_owned());
    assert_eq!(ordered(&id, &["queue", "resume", "9511a32e"]), ended);
    // A source is suspended for everybody.
    let both = ["queue", "suspend", "--source", "ip-a", "--tenant", "acme", "--reason", "why"];
    assert_eq!(postctl(&both, &[]).code, 2);
}

#[test]
fn what_is_suspended_says_what_where_and_why() {
    let row = |row: Value| serde_json::from_value::<crate::row::Suspended>(row).unwrap().what();
    let ready =
        json!({ "id": "1", "name": "ip-a->google@smtp_client", "reason": "x", "duration": "5m", "expires": "" });
    assert_eq!(row(ready.clone()), "ip-a->google@smtp_client");
    let mut limited = ready;
    limited["limits"] = json!({ "connection_limit": 1 });
    assert_eq!(row(limited), "ip-a->google@smtp_client: not suspended, limited to {\"connection_limit\":1}");
    let whose = json!({ "id": "2", "campaign": null, "tenant": "acme", "domain": "x.test", "reason": "x", "duration": "5m",
        "expires": "", "egress_source": "ip-a", "site": null });
    assert_eq!(row(whose), "tenant acme, domain x.test, by ip-a");
}

#[test]
fn a_queued_message_is_printed_as_it_is_sent() {
    let answer = json!({ "id": "000100000000002a", "message": { "sender": "", "recipient": "a@x", "meta": {},
        "data": "Subject: \u{fffd}\r\n\r\nHello\r\n", "due": "", "num_attempts": 0 } });
    let (ended, request) = with_engine("200 OK", &answer.to_string(), &["message", "cat", "000100000000002a"]);
    assert_eq!((ended.code, ended.out.as_str()), (0, "Subject: \u{fffd}\r\n\r\nHello\r\n"));
    let asked = "GET /api/admin/inspect-message/v1?id=000100000000002a&want_body=true HTTP/1.1\n";
    assert!(request.starts_with(asked), "{request}");
}

#[test]
fn reload_tells_what_it_changed() {
    let answer = json!({
        "added": ["egress_source \"ip-b\""], "removed": [], "changed": ["limit \"acme\"", "retry"],
        "since": "2026-11-18T11:06:40.000Z",
    });
    let expected = "\
added    egress_source \"ip-b\"
changed  limit \"acme\"
changed  retry
in force since 2026-11-18T11:06:40.000Z
";
    let (ended, request) = with_engine("200 OK", &answer.to_string(), &["reload"]);
    assert_eq!((ended.code, &*ended.out, &*ended.err), (0, expected, ""));
    assert!(request.starts_with("POST /api/admin/reload/v1 "), "{request}");
    let none = json!({ "added": [], "removed": [], "changed": [], "since": "2026-11-18T11:06:40.000Z" });
    assert_eq!(shown(&none, &["reload"]), "nothing has changed; in force since 2026-11-18T11:06:40.000Z\n");
    assert_eq!(shown(&none, &["reload", "--json"]), format!("{none:#}\n"));
}

#[test]
fn a_configuration_that_is_not_taken_up_ends_with_2() {
    let lines = "a.toml:1:1: x: is not a known key\na.toml:2:1: y: is not a known key";
    let body = json!({ "error": { "code": "invalid_configuration", "message": lines } }).to_string();
    let (ended, _) = with_engine("422 Unprocessable Entity", &body, &["reload"]);
    let expected = format!("postctl: the configuration was not taken up; the engine goes on as before\n{lines}\n");
    assert_eq!((ended.code, &*ended.out, ended.err), (2, "", expected));
    let body = json!({ "error": { "code": "unavailable", "message": "shutting down" } }).to_string();
    assert_eq!(with_engine("503 Service Unavailable", &body, &["reload"]).0.code, 1);
}
