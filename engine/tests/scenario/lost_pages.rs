//! The disk does not give back what was written to it, and the kernel has dropped it from memory: touching the spool's
//! map is a SIGBUS then. The engine lives on, nobody gets zeroes for a message, and it goes once it can be read again.

use std::fs::{self, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postrider::config::{Chunking, Config};
use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, retry_after, to_sink};
use crate::support::message;
use crate::support::sink::{Answer, Sink, Verb};
use crate::support::tls_front::TlsFront;

/// Lines that begin with a dot are copied, and their first octets looked at.
#[test]
fn content_that_is_stuffed() {
    loses_its_pages(false, |config| config.shaping.chunking = Chunking::Off, &b"..\r\nA line\r\n".repeat(2_000));
}

/// The kernel reads what goes as it is.
#[test]
fn content_that_goes_as_it_is() {
    loses_its_pages(false, |config| config.shaping.chunking = Chunking::Off, &b"A line\r\n".repeat(3_000));
}

#[test]
fn content_that_is_encrypted() {
    loses_its_pages(true, |_| {}, &b"A line\r\n".repeat(3_000));
}

/// A file that is cut off stands in for pages that can't be read: the kernel's answer is the same.
fn loses_its_pages(is_encrypted: bool, change: impl FnOnce(&mut Config), lines: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    let kept: Arc<Mutex<Vec<Kept>>> = Arc::default();
    let (cut, spool) = (Arc::clone(&kept), directory.path().join("spool"));
    let sink = Sink::scripted(move |step| {
        let mut cut = cut.lock().unwrap();
        if step.verb == Verb::Rcpt && cut.is_empty() {
            *cut = cut_off(&spool);
        }
        Answer::Usual
    });
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let front = TlsFront::try_start_at(any, &["peer.test"], sink.address()).unwrap();
    let mut config = to_sink(directory.path(), if is_encrypted { front.address() } else { sink.address() });
    // By then the octets are back.
    retry_after(&mut config, &[Duration::from_secs(1)]);
    change(&mut config);
    let mut running = Running::start(config);
    let content = [&message("lost")[..], lines].concat();
    let id = running.inject(&["a@d.test"], &content);
    let failure = running.event(EventKind::TransientFailure).to_json().to_owned();
    assert!(failure.contains(&id), "{failure}");
    assert_eq!(running.rows().len(), 1, "it waits");
    for (path, octets) in kept.lock().unwrap().iter() {
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(octets, 0).unwrap();
    }
    running.event(EventKind::Delivery);
    let delivered = sink.next();
    assert!(delivered.content.ends_with(&content), "as it came, with a field in front");
    assert_eq!(front.handshakes() > 0, is_encrypted);
    running.shutdown();
}

/// A segment, and what was in it.
type Kept = (PathBuf, Vec<u8>);

/// Cuts all segments off.
fn cut_off(spool: &Path) -> Vec<Kept> {
    let logs = fs::read_dir(spool).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let files = logs.flat_map(|log| fs::read_dir(log).unwrap()).map(|entry| entry.unwrap().path());
    let segments = files.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("segment-"));
    let mut kept = Vec::new();
    for path in segments {
        let mut octets = fs::read(&path).unwrap();
        octets.truncate(octets.iter().rposition(|octet| *octet != 0).map_or(0, |last| last + 1));
        OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
        kept.push((path, octets));
    }
    kept
}
