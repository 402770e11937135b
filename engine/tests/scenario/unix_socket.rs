//! A route to a Unix socket: LMTP without TLS, source or port; each recipient has its own fate. A socket that is not
//! there is a host that can't be reached.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;

use postrider::config::{Config, DeliveryProtocol, DomainPattern, Route, RouteTarget, Terms, UnixPath};
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, config};
use crate::support::message;

fn routed(directory: &Path, socket: &Path) -> Config {
    let mut config = config(directory);
    let to = vec![RouteTarget::Unix(UnixPath::new(socket.to_str().unwrap()).unwrap())];
    let terms = Arc::new(Terms { protocol: DeliveryProtocol::Lmtp, ..Terms::default() });
    config.routes.push(Route { terms, ..Route::new(DomainPattern::Any, to) });
    config
}

/// An LMTP server for one connection. Whoever is called "full" is refused behind the content. It offers STARTTLS, which
/// nobody is to ask for. Tells what it was sent.
fn serve(listener: UnixListener) -> mpsc::Receiver<Vec<String>> {
    let (told, seen) = mpsc::channel();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut out = stream.try_clone().unwrap();
        let mut say = |text: &str| out.write_all(format!("{text}\r\n").as_bytes()).unwrap();
        say("220 lmtp.test");
        let mut lines = BufReader::new(stream).lines();
        let (mut all, mut recipients, mut is_content) = (Vec::new(), Vec::new(), false);
        while let Some(Ok(line)) = lines.next() {
            all.push(line.clone());
            let verb = line.split([' ', ':']).next().unwrap_or_default().to_owned();
            match verb.as_str() {
                "." if is_content => {
                    is_content = false;
                    let recipients: Vec<String> = std::mem::take(&mut recipients);
                    for recipient in recipients {
                        say(if recipient.contains("<full@") { "552 5.2.2 mailbox full" } else { "250 2.0.0 stored" });
                    }
                    told.send(std::mem::take(&mut all)).unwrap();
                }
                _ if is_content => {}
                "LHLO" => say("250-lmtp.test\r\n250-STARTTLS\r\n250 ENHANCEDSTATUSCODES"),
                "RCPT" => {
                    recipients.push(line);
                    say("250 ok");
                }
                "DATA" => {
                    is_content = true;
                    say("354 go");
                }
                "QUIT" => say("221 bye"),
                _ => say("250 ok"),
            }
        }
    });
    seen
}

#[test]
fn lmtp_over_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("lmtp.sock");
    let seen = serve(UnixListener::bind(&socket).unwrap());
    let mut running = Running::start(routed(directory.path(), &socket));
    running.inject(&["ada@shop.test", "full@shop.test"], &message("unix"));
    let stored = running.event(EventKind::Delivery);
    assert_eq!((stored.recipient.as_str(), stored.source_address.as_str()), ("ada@shop.test", ""));
    let site = format!("unix:{}", socket.display());
    assert_eq!(stored.site, site);
    let json: serde_json::Value = serde_json::from_str(stored.to_json()).unwrap();
    assert_eq!(json["peer_address"]["addr"], site.as_str(), "{json}");
    assert_eq!(json["delivery_protocol"], "LMTP");
    let full = running.event(EventKind::Bounce);
    assert_eq!((full.recipient.as_str(), full.code, full.text.as_str()), ("full@shop.test", 552, "mailbox full"));
    let sent = seen.recv().unwrap();
    assert_eq!(sent.iter().filter(|line| line.starts_with("RCPT TO:")).count(), 2, "{sent:#?}");
    assert!(!sent.iter().any(|line| line == "STARTTLS"), "nothing is encrypted: {sent:#?}");
    running.shutdown();
}

#[test]
fn a_socket_that_is_not_there_yet_holds_the_mail() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("later.sock");
    let mut running = Running::start(routed(directory.path(), &socket));
    running.inject(&["ada@shop.test"], &message("later"));
    let named = format!("unix:{}", socket.display());
    running.rows_when("blocked by the socket", |rows| {
        let blocked = rows.first().and_then(|row| row.blocked_by.clone()).unwrap_or_default();
        blocked.contains(&named) && blocked.contains("No such file")
    });
    assert_eq!(running.rows()[0].num_attempts, 0, "nobody was spoken to");
    let seen = serve(UnixListener::bind(&socket).unwrap());
    let stored = running.event(EventKind::Delivery);
    assert_eq!(stored.attempts, 1);
    assert!(seen.recv().unwrap().iter().any(|line| line == "RCPT TO:<ada@shop.test>"));
    running.shutdown();
}
