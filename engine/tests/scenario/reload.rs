//! A running engine takes up another configuration: at the next message, on all shards, without losing what it has.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use postrider::config::{DomainPattern, ListenerTls, Route, RouteTarget};
use postrider::outcome::event::EventKind;
use postrider::{Engine, ReloadError};
use rustls_pki_types::CertificateDer;

use crate::support::embedded::{Running, block_on, to_sink};
use crate::support::sink::Sink;

const CONTENT: &[u8] = b"From: a@sender.test\r\nSubject: x\r\n\r\nHello\r\n";

/// The SIZE that EHLO offers.
fn offered_size(smtp: SocketAddr) -> String {
    let mut stream = TcpStream::connect(smtp).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    lines.next().unwrap().unwrap();
    stream.write_all(b"EHLO client.test\r\n").unwrap();
    lines.map(Result::unwrap).find_map(|line| line.strip_prefix("250-SIZE ").map(str::to_owned)).unwrap()
}

/// A certificate for the engine's name, and the key.
fn identity() -> (CertificateDer<'static>, ListenerTls) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(["mta.test".to_owned()]).unwrap().self_signed(&key).unwrap();
    let pem = |text: String| Arc::new(text.into_bytes());
    let files = ListenerTls { certificate_pem: pem(certificate.pem()), key_pem: pem(key.serialize_pem()) };
    (certificate.der().clone(), files)
}

/// Whether a client that trusts this certificate alone gets through STARTTLS.
fn is_shown(smtp: SocketAddr, certificate: &CertificateDer<'static>) -> bool {
    let mut stream = TcpStream::connect(smtp).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
    lines.next().unwrap();
    stream.write_all(b"EHLO client.test\r\n").unwrap();
    lines.find(|line| line.starts_with("250 ")).unwrap();
    stream.write_all(b"STARTTLS\r\n").unwrap();
    assert!(lines.next().unwrap().starts_with("220 "));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = "mta.test".try_into().unwrap();
    rustls::ClientConnection::new(Arc::new(config), name).unwrap().complete_io(&mut stream).is_ok()
}

#[test]
fn the_next_session_has_the_new_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let ((old, old_files), (new, new_files)) = (identity(), identity());
    let mut config = to_sink(directory.path(), sink.address());
    config.smtp_listeners[0].tls = Some(old_files);
    let running = Running::start(config.clone());
    let shown = |running: &Running| [&old, &new].map(|certificate| is_shown(running.smtp(), certificate));
    assert_eq!(shown(&running), [true, false]);
    config.smtp_listeners[0].tls = Some(new_files);
    block_on(running.engine.reload(config)).unwrap();
    assert_eq!(shown(&running), [false, true]);
    running.shutdown();
}

#[test]
fn another_configuration_is_in_force_at_the_next_message() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (Sink::start(), Sink::start());
    let before = to_sink(directory.path(), first.address());
    let mut running = Running::start(before.clone());
    for number in 0..10 {
        running.inject(&[&format!("r{number}@peer.test")], CONTENT);
    }
    running.finals(10);

    let mut after = before.clone();
    after.routes = vec![Route::new(DomainPattern::Any, vec![RouteTarget::Address(second.address())])];
    after.smtp_listeners[0].max_message_bytes = 1 << 20;
    let reloaded = block_on(running.engine.reload(after.clone())).unwrap();
    let port = after.smtp_listeners[0].address;
    assert_eq!(reloaded.changes.changed, [format!("listener \"smtp {port}\""), "route \"*\"".to_owned()]);
    assert_eq!(offered_size(running.smtp()), (1 << 20).to_string());
    for number in 0..10 {
        running.inject(&[&format!("r{number}@peer.test")], CONTENT);
    }
    let finals = running.finals(10);
    assert!(finals.iter().all(|event| event.kind == EventKind::Delivery));
    assert_eq!((first.taken_so_far().len(), second.taken_so_far().len()), (10, 10));

    let again = block_on(running.engine.reload(after.clone())).unwrap();
    assert!(again.changes.is_empty() && again.since == reloaded.since);
    let mut other = after.clone();
    other.shards = Some(3);
    let mut nowhere = after.clone();
    nowhere.egress_pools[0].sources[0].0 = 7;
    let error = block_on(running.engine.reload(nowhere)).unwrap_err();
    assert!(matches!(&error, ReloadError::Invalid(why) if why.contains("index of a source")), "{error}");

    let needs_restart = ReloadError::NeedsRestart(vec!["shards: a change of it needs a restart".to_owned()]);
    assert_eq!(block_on(running.engine.reload(other)), Err(needs_restart));
    assert_eq!(block_on(running.engine.reload_source()), Err(ReloadError::NoSource));
    running.inject(&["r@peer.test"], CONTENT);
    running.finals(1);
    assert_eq!(second.taken_so_far().len(), 1);
    running.shutdown();
}

/// Of those that are out, that wait, and that come meanwhile, none is lost or doubled, while the route goes to and fro.
#[test]
fn nothing_is_lost_or_doubled_while_it_reloads_under_load() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (Sink::start(), Sink::start());
    let config = to_sink(directory.path(), first.address());
    let mut running = Running::start(config.clone());
    let count = 400;
    for number in 0..count {
        running.inject(&[&format!("r{number}@peer.test")], CONTENT);
        if number % 10 == 0 {
            let to = if number % 20 == 0 { second.address() } else { first.address() };
            let mut other = config.clone();
            other.routes = vec![Route::new(DomainPattern::Any, vec![RouteTarget::Address(to)])];
            block_on(running.engine.reload(other)).unwrap();
        }
    }
    let finals = running.finals(count);
    assert!(finals.iter().all(|event| event.kind == EventKind::Delivery));
    let taken = [first.taken_so_far().len(), second.taken_so_far().len()];
    assert!(taken[0] + taken[1] == count && taken.iter().all(|taken| *taken > 0), "{taken:?}");
    running.shutdown();
}

/// A file on a dead network file system, or a pipe, never comes: a stop waits for nobody who reads it.
#[test]
fn a_stop_does_not_wait_for_a_configuration_that_never_comes() {
    let directory = tempfile::tempdir().unwrap();
    let config = to_sink(directory.path(), Sink::start().address());
    let (release, gate) = mpsc::channel::<()>();
    let (again, gate) = (config.clone(), Mutex::new(gate));
    let read = move || {
        let _ = gate.lock().unwrap().recv();
        Ok(again.clone())
    };
    let engine = Engine::builder(config).reload_from(read).start().unwrap();
    let (done, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let asked = runtime.block_on(async { tokio::time::timeout(PATIENCE, engine.reload_source()).await.is_ok() });
        drop(runtime);
        engine.shutdown().unwrap();
        let _ = done.send(asked);
    });
    let asked = ended.recv_timeout(Duration::from_secs(30));
    drop(release);
    thread.join().unwrap();
    assert_eq!(asked, Ok(false), "it ended while the configuration was being read");
}

const PATIENCE: Duration = Duration::from_millis(100);
