//! What a sender asks for by RFC 3461 is kept with the message, also over a restart, and passed on to a peer that
//! offers DSN; one that does not gets the mail without it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use postrider::outcome::event::EventKind;
use postrider::{DsnRequest, InjectError, Message, Notify, RecipientDsn, ReturnedContent};

use crate::support::embedded::{Running, block_on, retry_after, to_sink};
use crate::support::message;
use crate::support::sink::{Answer, Sink, Step, Verb};

fn request() -> DsnRequest {
    let success = Notify::Of { success: true, failure: true, delay: false };
    DsnRequest {
        content: Some(ReturnedContent::Headers),
        envelope_id: Some("order 7+1".to_owned()),
        recipients: vec![
            RecipientDsn { notify: Some(success), original_recipient: Some("Ada@Old.test".to_owned()) },
            RecipientDsn { notify: Some(Notify::Never), ..RecipientDsn::default() },
        ],
    }
}

fn inject(running: &Running, dsn: DsnRequest) -> Result<(), InjectError> {
    let message = Message {
        reverse_path: "sender@sender.test".to_owned(),
        // The second is the first again; the third has no request of its own.
        recipients: ["ada@shop.test", "ada@shop.test", "bob@shop.test"].map(str::to_owned).to_vec(),
        content: message("dsn"),
        dsn,
        ..Message::default()
    };
    block_on(running.engine.inject(message)).map(|_| ())
}

/// A sink that puts the first `deferred` MAIL commands off, and all MAIL and RCPT commands that it was sent.
fn sink(offers_dsn: bool, deferred: usize) -> (Sink, Arc<Mutex<Vec<String>>>) {
    let commands: Arc<Mutex<Vec<String>>> = Arc::default();
    let said = Arc::clone(&commands);
    let sink = Sink::scripted(move |step: &Step<'_>| match step.verb {
        Verb::Ehlo if offers_dsn => Answer::from("250-sink.test\n250-PIPELINING\n250 DSN"),
        Verb::Mail | Verb::Rcpt => {
            let mut said = said.lock().unwrap();
            said.push(step.line.trim_end().to_owned());
            let mails = said.iter().filter(|line| line.starts_with("MAIL")).count();
            if step.verb == Verb::Mail && mails <= deferred { Answer::from("451 4.7.1 later") } else { Answer::Usual }
        }
        _ => Answer::Usual,
    });
    (sink, commands)
}

#[test]
fn parameters_reach_a_peer_with_dsn_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (sink, commands) = sink(true, 1);
    let mut config = to_sink(directory.path(), sink.address());
    retry_after(&mut config, &[Duration::from_millis(300)]);
    let mut running = Running::start(config.clone());
    inject(&running, request()).unwrap();
    running.event(EventKind::TransientFailure);
    running.shutdown();
    let mut running = Running::start(config);
    let delivered = running.finals(2);
    assert!(delivered.iter().all(|event| event.kind == EventKind::Delivery));
    let json: serde_json::Value = serde_json::from_str(delivered[0].to_json()).unwrap();
    assert_eq!(json["reception_protocol"], "embedded", "what stands behind it is nobody's business: {json}");
    let commands = commands.lock().unwrap();
    let last = &commands[commands.len() - 3..];
    assert_eq!(last[0], "MAIL FROM:<sender@sender.test> RET=HDRS ENVID=order+207+2B1");
    assert_eq!(last[1], "RCPT TO:<ada@shop.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;Ada@Old.test");
    assert_eq!(last[2], "RCPT TO:<bob@shop.test>");
    running.shutdown();
}

#[test]
fn a_peer_without_dsn_gets_the_mail_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (sink, commands) = sink(false, 0);
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    inject(&running, request()).unwrap();
    assert!(running.finals(2).iter().all(|event| event.kind == EventKind::Delivery));
    let commands = commands.lock().unwrap();
    let has_any = |line: &String| ["RET=", "ENVID=", "NOTIFY=", "ORCPT="].iter().any(|name| line.contains(name));
    assert!(commands.len() == 3 && !commands.iter().any(has_any), "{commands:?}");
    running.shutdown();
}

#[test]
fn a_request_that_can_not_be_said_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (sink, _) = sink(true, 0);
    let running = Running::start(to_sink(directory.path(), sink.address()));
    let refused =
        |dsn| matches!(inject(&running, dsn), Err(InjectError::Refused(text)) if text.starts_with("501 5.5.4 "));
    assert!(refused(DsnRequest { envelope_id: Some("a\r\nb".to_owned()), ..DsnRequest::default() }));
    assert!(refused(DsnRequest { recipients: vec![RecipientDsn::default(); 4], ..DsnRequest::default() }));
    running.shutdown();
}
