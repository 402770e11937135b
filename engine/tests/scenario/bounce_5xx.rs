//! A 5xx answer ends a recipient: one Bounce record with the answer and the command that it answered.

use postrider::outcome::event::EventKind;

use crate::support::embedded::{Running, to_sink};
use crate::support::message;
use crate::support::sink::{Sink, Verb};

fn bounced(verb: Verb, reply: &str, command: &str) {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(verb, reply);
    let mut running = Running::start(to_sink(directory.path(), sink.address()));
    let id = running.inject(&["a@sink.test"], &message("refused"));
    let bounce = running.event_where("final", |event| event.kind.is_final());
    assert_eq!((bounce.kind, bounce.message.to_string(), bounce.attempts), (EventKind::Bounce, id, 1));
    assert_eq!((bounce.code, bounce.enhanced, &*bounce.text), (550, Some((5, 1, 1)), "No such user"));
    assert!(bounce.command.starts_with(command), "{command} was answered, not {:?}", bounce.command);
    assert!(running.rows().is_empty(), "nothing is left in the queue");
    let rest = running.shutdown();
    assert!(rest.is_empty(), "one record: {rest:?}");
    assert_eq!((sink.count(verb), sink.taken_so_far().len()), (1, 0), "it is not tried again");
}

#[test]
fn to_rcpt() {
    bounced(Verb::Rcpt, "550 5.1.1 No such user", "RCPT TO:<a@sink.test>");
}

#[test]
fn to_mail() {
    bounced(Verb::Mail, "550 5.1.1 No such user", "MAIL FROM:<sender@sender.test>");
}

#[test]
fn to_data() {
    bounced(Verb::Data, "550 5.1.1 No such user", "DATA");
}

#[test]
fn to_the_final_dot() {
    bounced(Verb::Content, "550 5.1.1 No such user", "");
}

#[test]
fn with_an_answer_of_several_lines() {
    bounced(Verb::Rcpt, "550-5.1.1 No\n550 5.1.1 such user", "RCPT TO:<a@sink.test>");
}
