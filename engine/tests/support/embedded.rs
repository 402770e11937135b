//! Engines through the embedding API, and their events.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postrider::admin::{MessageFilter, MessageRow};
use postrider::config::{Config, DomainPattern, RetryConfig, RetrySchedule, Route, RouteTarget};
use postrider::outcome::event::{EventKind, EventRecord};
use postrider::outcome::event_log::{EventItem, EventStream};
use postrider::{Engine, InjectError, Message};

use super::PATIENCE;

/// Two shards, a spool in `directory`, one SMTP listener on a port of its own, retries after 200 ms.
pub(crate) fn config(directory: &Path) -> Config {
    let mut config = Config::new("mta.test");
    config.shards = Some(2);
    config.spool.path = directory.join("spool");
    config.spool.allow_filesystem = true;
    config.smtp_listeners[0].address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    config.http_listeners.clear();
    config.shutdown_grace = Duration::from_secs(10);
    retry_after(&mut config, &[Duration::from_millis(200)]);
    config
}

/// [`config`] with everything routed to one address.
pub(crate) fn to_sink(directory: &Path, sink: SocketAddr) -> Config {
    let mut config = config(directory);
    let to = vec![RouteTarget::Address(sink)];
    config.routes.push(Route::new(DomainPattern::Any, to));
    config
}

pub(crate) fn retry_after(config: &mut Config, intervals: &[Duration]) {
    config.retry =
        RetryConfig { schedule: RetrySchedule::Listed(intervals.to_vec()), max_age: Duration::from_secs(86_400) };
}

/// An engine and its events from its start on.
pub(crate) struct Running {
    pub(crate) engine: Engine,
    events: EventStream,
}

impl Running {
    pub(crate) fn start(config: Config) -> Self {
        let engine = Engine::builder(config).start().unwrap_or_else(|error| panic!("the engine starts: {error}"));
        let events = engine.events();
        Self { engine, events }
    }

    pub(crate) fn smtp(&self) -> SocketAddr {
        self.engine.addresses().smtp[0]
    }

    /// The message's id.
    pub(crate) fn inject(&self, recipients: &[&str], content: &[u8]) -> String {
        let accepted = self.try_inject("sender@sender.test", recipients, content);
        accepted.unwrap_or_else(|error| panic!("the message is taken: {error}"))
    }

    pub(crate) fn try_inject(
        &self,
        reverse_path: &str,
        recipients: &[&str],
        content: &[u8],
    ) -> Result<String, InjectError> {
        let message = Message {
            reverse_path: reverse_path.to_owned(),
            recipients: recipients.iter().map(|&recipient| recipient.to_owned()).collect(),
            content: content.to_vec(),
            ..Message::default()
        };
        block_on(self.engine.inject(message)).map(|accepted| accepted.id.to_string())
    }

    /// The next event of a kind; others are passed over.
    pub(crate) fn event(&mut self, kind: EventKind) -> Arc<EventRecord> {
        self.event_where(&kind.to_string(), |event| event.kind == kind)
    }

    pub(crate) fn event_where(&mut self, what: &str, fits: impl Fn(&EventRecord) -> bool) -> Arc<EventRecord> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            match self.events.next_timeout(deadline.saturating_duration_since(Instant::now())) {
                Some(EventItem::Event(event)) if fits(&event) => return event,
                Some(EventItem::Event(event)) => seen.push(event.to_json().to_owned()),
                Some(EventItem::Lagged(count)) => panic!("{count} events were missed while waiting for {what}"),
                None => panic!("no {what} event within {PATIENCE:?}; there were:\n{}", seen.join("\n")),
            }
        }
    }

    /// The next `count` final events, in any order.
    pub(crate) fn finals(&mut self, count: usize) -> Vec<Arc<EventRecord>> {
        (0..count).map(|_| self.event_where("final", |event| event.kind.is_final())).collect()
    }

    /// Every queued recipient.
    pub(crate) fn rows(&self) -> Vec<MessageRow> {
        let filter = MessageFilter { id: None, recipient: None, tenant: None, message_id: None, limit: 10_000 };
        block_on(self.engine.messages(filter)).expect("the engine answers")
    }

    /// Asks for the rows until they are as wanted: a change of a queue that no event tells.
    pub(crate) fn rows_when(&self, what: &str, wanted: impl Fn(&[MessageRow]) -> bool) -> Vec<MessageRow> {
        super::poll(what, || Some(self.rows()).filter(|rows| wanted(rows)))
    }

    /// Ends cleanly, and tells what events had not been read.
    pub(crate) fn shutdown(mut self) -> Vec<Arc<EventRecord>> {
        self.engine.shutdown().unwrap_or_else(|error| panic!("a clean end: {error}"));
        let mut rest = Vec::new();
        while let Some(item) = self.events.try_next() {
            if let EventItem::Event(event) = item {
                rest.push(event);
            }
        }
        rest
    }
}

pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
}
