//! What a sender says of a message beside its content stands in its events, as far as `[events] meta` asks for it.

use postrider::outcome::event::EventKind;
use postrider::{InjectError, Message};

use crate::support::embedded::{Running, block_on, to_sink};
use crate::support::message;
use crate::support::sink::Sink;

fn inject(running: &Running, meta: &[(&str, &str)]) -> Result<(), InjectError> {
    let message = Message {
        reverse_path: "sender@sender.test".to_owned(),
        recipients: vec!["ada@shop.test".to_owned()],
        content: message("meta"),
        meta: meta.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        ..Message::default()
    };
    block_on(running.engine.inject(message)).map(|_| ())
}

#[test]
fn events_have_what_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let mut config = to_sink(directory.path(), sink.address());
    config.events.meta = vec!["customer*".to_owned(), "egress_pool".to_owned()];
    let mut running = Running::start(config);
    inject(&running, &[("customer", "17"), ("customer_order", "A-1"), ("secret", "x")]).unwrap();
    for kind in [EventKind::Reception, EventKind::Delivery] {
        let event: serde_json::Value = serde_json::from_str(running.event(kind).to_json()).unwrap();
        let expected = serde_json::json!({ "customer": "17", "customer_order": "A-1", "egress_pool": "default" });
        assert_eq!(event["meta"], expected, "{kind}");
    }
    running.shutdown();
}

#[test]
fn names_that_are_none_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let running = Running::start(to_sink(directory.path(), sink.address()));
    let long = "x".repeat(256);
    let many: Vec<(String, String)> = (0..65).map(|number| (format!("n{number}"), String::new())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (&name[..], &value[..])).collect();
    for meta in [&[("", "x")][..], &[(&long, "x")], &[("a\nb", "x")], &[("a", "1"), ("a", "2")], &many] {
        let refused = inject(&running, meta);
        assert!(
            matches!(&refused, Err(InjectError::Refused(text)) if text.starts_with("501 5.5.4 meta: ")),
            "{meta:?}"
        );
    }
    inject(&running, &many[1..]).unwrap();
    running.shutdown();
}
