//! A rate and a connection limit of one site, over a kill -9, while another site is served as fast as it takes.
//!
//! A sink on a busy machine sees mail late, never early. So what is asserted holds whatever the load: no mail comes
//! before its time, counted from before the engine's start.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::client::Client;
use crate::support::process::{Postrider, to_sink};
use crate::support::sink::{Answer, Sink, Verb};
use crate::support::{message, poll};

const INTERVAL: Duration = Duration::from_millis(50);
const QUEUED: usize = 200;

#[test]
fn a_rate_holds_over_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    let fast = Sink::start();
    let mails: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let slow = Sink::start();
    log_mails(&slow, &mails);
    let address = slow.address();
    let slow_route = format!("[[route]]\ndomain = \"slow.test\"\nto = [\"{address}\"]\n[[route]]");
    let mut config = to_sink(fast.address()).replacen("[[route]]", &slow_route, 1);
    config += "[shaping.\"slow.test\"]\nconnection_limit = 5\nmax_message_rate = \"20/s\"\n";

    let begun = Instant::now();
    let postrider = Postrider::start(directory.path(), &config);
    let mut client = Client::ready(postrider.smtp()).unwrap();
    for domain in ["slow.test", "fast.test"] {
        for number in 0..QUEUED {
            let recipient = format!("r{number}@{domain}");
            client.submit("sender@sender.test", &[&recipient], &message("rates")).unwrap();
        }
    }
    assert_eq!(fast.take(QUEUED).len(), QUEUED, "the other site is not held up");
    let arrived = || mails.lock().unwrap().len();
    poll("some have gone", || (arrived() >= 50).then_some(()));
    postrider.kill();
    assert!(arrived() < QUEUED, "it was killed in the midst of it");
    assert!(slow.connections_most() <= 5);
    drop(slow);

    let slow = poll("the sink is back", || Sink::try_start_at(address).ok());
    log_mails(&slow, &mails);
    let postrider = Postrider::start(directory.path(), &config);
    let before = arrived();
    poll("it goes on", || (arrived() >= before + 40).then_some(()));
    postrider.terminate();
    assert!(slow.connections_most() <= 5);
    for (place, at) in mails.lock().unwrap().iter().enumerate() {
        let earliest = INTERVAL * u32::try_from(place).unwrap();
        assert!(at.duration_since(begun) >= earliest, "mail {place} came after {:?}", at.duration_since(begun));
    }
}

fn log_mails(sink: &Sink, mails: &Arc<Mutex<Vec<Instant>>>) {
    let mails = Arc::clone(mails);
    sink.set_script(move |step| {
        if step.verb == Verb::Mail {
            mails.lock().unwrap().push(Instant::now());
        }
        Answer::Usual
    });
}
