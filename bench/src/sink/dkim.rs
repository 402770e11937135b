//! DKIM verification of some of the messages: a run whose signatures are wrong has measured nothing.
//!
//! A thread of its own verifies with mail-auth what the sink hands it; keys are published here as they would be in DNS,
//! and no query leaves the machine. A message passes when each published selector has one valid signature in it.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use mail_auth::common::parse::TxtRecordParser;
use mail_auth::common::verify::DomainKey;
use mail_auth::{AuthenticatedMessage, DkimResult, DnsError, MessageAuthenticator, ResolverCache, Txt};
use serde::Serialize;

/// Shared by a sink's threads.
pub struct DkimCheck {
    share: f64,
    books: Arc<Books>,
    queue: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

/// What was found so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DkimTally {
    pub passed: u64,
    pub failed: u64,
    /// Drawn, but the verifier was behind.
    pub skipped: u64,
    /// Why the first that failed did.
    pub failure: Option<String>,
    #[serde(skip)]
    waiting: u64,
}

#[derive(Default)]
struct Books {
    keys: PublishedKeys,
    tally: Mutex<DkimTally>,
    done: Condvar,
}

impl DkimCheck {
    /// Of `percent` of the messages.
    pub fn start(percent: f64) -> Result<Self> {
        ensure!((0.0..=100.0).contains(&percent), "a percentage is between 0 and 100, not {percent}");
        let books = Arc::new(Books::default());
        let (queue, messages) = sync_channel(QUEUE_MESSAGES_MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let authenticator = {
            let _guard = runtime.enter();
            // Its resolver is never asked: `PublishedKeys` has an answer for every name.
            MessageAuthenticator::new_google().map_err(|error| anyhow!("cannot make a DKIM verifier: {error}"))?
        };
        let theirs = books.clone();
        let work = move || verify_all(&runtime, &authenticator, &theirs, &messages);
        let thread = std::thread::Builder::new().name("dkim".into()).spawn(work)?;
        Ok(Self { share: percent / 100.0, books, queue: Some(queue), thread: Some(thread) })
    }

    /// `name` is that of the TXT record: `selector._domainkey.domain`.
    pub fn publish(&self, name: &str, record: &str) -> Result<()> {
        let key = DomainKey::parse(record.as_bytes()).map_err(|error| anyhow!("{error}"));
        let key = key.with_context(|| format!("{name}: {record:?} is no DKIM key"))?;
        let selector = name.split_once("._domainkey.").with_context(|| format!("{name:?} is no DKIM key's name"))?.0;
        let mut keys = self.books.keys.lock();
        keys.insert(format!("{name}.").into(), (selector.to_owned(), Arc::new(key)));
        Ok(())
    }

    /// Of the messages, the share to be kept whole and handed over: 0 to 1.
    pub fn share(&self) -> f64 {
        self.share
    }

    pub(super) fn look_at(&self, content: &[u8]) {
        self.books.tally().waiting += 1;
        if self.queue.as_ref().is_none_or(|queue| queue.try_send(content.to_vec()).is_err()) {
            let mut tally = self.books.tally();
            tally.waiting -= 1;
            tally.skipped += 1;
        }
    }

    /// Waits for what was handed over so far.
    pub fn tally(&self) -> DkimTally {
        let tally = self.books.tally();
        let done = self.books.done.wait_timeout_while(tally, PATIENCE, |tally| tally.waiting > 0);
        done.unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Counts anew from here.
    pub fn forget(&self) {
        let waiting = self.tally().waiting;
        *self.books.tally() = DkimTally { waiting, ..DkimTally::default() };
    }
}

impl Drop for DkimCheck {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            // Nobody is left to be told.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for DkimCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DkimCheck").field("share", &self.share).field("tally", &*self.books.tally()).finish()
    }
}

impl Books {
    fn tally(&self) -> MutexGuard<'_, DkimTally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn verify_all(
    runtime: &tokio::runtime::Runtime,
    authenticator: &MessageAuthenticator,
    books: &Books,
    messages: &Receiver<Vec<u8>>,
) {
    while let Ok(content) = messages.recv() {
        let fault = fault_of(runtime, authenticator, &books.keys, &content);
        let mut tally = books.tally();
        tally.waiting -= 1;
        match fault {
            None => tally.passed += 1,
            Some(fault) => {
                tally.failed += 1;
                tally.failure.get_or_insert(fault);
            }
        }
        books.done.notify_all();
    }
}

fn fault_of(
    runtime: &tokio::runtime::Runtime,
    authenticator: &MessageAuthenticator,
    keys: &PublishedKeys,
    content: &[u8],
) -> Option<String> {
    let Some(message) = AuthenticatedMessage::parse(content) else {
        return Some("a message can't be parsed".to_owned());
    };
    let parameters = mail_auth::Parameters::from(&message).with_txt_cache(keys);
    let results = runtime.block_on(authenticator.verify_dkim(parameters));
    let selectors: Vec<String> = keys.lock().values().map(|(selector, _)| selector.clone()).collect();
    for selector in selectors {
        let mut made = results.iter().filter(|result| result.signature().is_some_and(|made| made.s == selector));
        match (made.next().map(|result| result.result()), made.next()) {
            (Some(DkimResult::Pass), None) => {}
            (None, _) => return Some(format!("a message has no signature {selector}")),
            (Some(other), None) => return Some(format!("a signature {selector} is wrong: {other:?}")),
            (Some(_), Some(_)) => return Some(format!("a message has several signatures {selector}")),
        }
    }
    None
}

/// DNS as a map that knows of everything whether it exists. Names end with a dot; with each the selector and the key.
#[derive(Default)]
struct PublishedKeys(Mutex<Keys>);

type Keys = HashMap<Box<str>, (String, Arc<DomainKey>)>;

impl PublishedKeys {
    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResolverCache<Box<str>, Txt> for PublishedKeys {
    fn get<Q: Hash + Eq + ?Sized>(&self, name: &Q) -> Option<Txt>
    where
        Box<str>: Borrow<Q>,
    {
        let missing = || Txt::Error(mail_auth::Error::Dns(DnsError::Resolver("no such key".to_owned())));
        Some(self.lock().get(name).map_or_else(missing, |(_, key)| Txt::DomainKey(key.clone())))
    }

    fn remove<Q: Hash + Eq + ?Sized>(&self, _name: &Q) -> Option<Txt>
    where
        Box<str>: Borrow<Q>,
    {
        None
    }

    fn insert(&self, _name: Box<str>, _key: Txt, _valid_until: Instant) {}
}

/// Beyond them samples are skipped, not kept.
const QUEUE_MESSAGES_MAX: usize = 1_000;
const PATIENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use mail_auth::common::crypto::Ed25519Key;
    use mail_auth::common::headers::HeaderWriter;
    use mail_auth::dkim::DkimSigner;

    use super::*;
    use crate::keys;

    #[test]
    fn only_a_valid_signature_of_each_selector_passes() {
        let directory = tempfile::tempdir().unwrap();
        let key = keys::write_ed25519(directory.path()).unwrap();
        let pem = std::fs::read_to_string(&key.path).unwrap();
        let der: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        let der = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, der).unwrap();
        let secret = Ed25519Key::from_pkcs8_maybe_unchecked_der(&der).unwrap();
        let content = b"From: a@sender.test\r\nSubject: x\r\n\r\nhello\r\n";
        let signer =
            DkimSigner::from_key(secret).domain("sender.test").selector(key.selector).headers(["From", "Subject"]);
        let signed = [signer.sign(content).unwrap().to_header().as_bytes(), content].concat();

        let check = DkimCheck::start(100.0).unwrap();
        check.publish(&format!("{}._domainkey.sender.test", key.selector), &key.record).unwrap();
        check.look_at(&signed);
        let tally = check.tally();
        assert_eq!((tally.passed, tally.failed, tally.failure), (1, 0, None));
        check.look_at(content);
        check.look_at(&signed[..signed.len() - 3]);
        let tally = check.tally();
        assert_eq!((tally.passed, tally.failed), (1, 2));
        assert_eq!(tally.failure.unwrap(), "a message has no signature ed25519");
        check.forget();
        // A second key that did not sign.
        let other = keys::write_rsa_2048(directory.path()).unwrap();
        check.publish("rsa._domainkey.sender.test", &other.record).unwrap();
        check.look_at(&signed);
        let tally = check.tally();
        assert_eq!((tally.passed, tally.failed), (0, 1));
        assert!(check.publish("sender.test", &other.record).is_err());
        assert!(check.publish("x._domainkey.sender.test", "v=spf1 -all").is_err());
    }
}
