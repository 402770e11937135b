//! A rate and a connection limit of one site, over a kill -9, while another site is served as fast as it takes.
//!
//! A sink on a busy machine sees mail late, never early. So what is asserted holds whatever the load: no mail comes
//! before its time, counted from before the engine's start. What it comes to in a sliding second is printed; with
//! `INTEROP_RATES`, the number of messages queued (200 unless set), it is asserted too, and takes a minute.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::client::Client;
use crate::support::process::{Postrider, to_sink};
use crate::support::sink::{Answer, Sink, Verb};
use crate::support::{PATIENCE, message, poll_for};
use crate::tools;

const INTERVAL: Duration = Duration::from_millis(50);

#[test]
fn a_rate_holds_over_a_kill_on_two_shards() {
    a_rate_holds_over_a_kill(2);
}

#[test]
fn a_rate_holds_over_a_kill_on_four_shards() {
    a_rate_holds_over_a_kill(4);
}

fn a_rate_holds_over_a_kill(shards: usize) {
    let directory = tempfile::tempdir().unwrap();
    // How many wait, and how many are to be seen before the kill and after it.
    let in_full = tools::rates_queued();
    let (queued, seen) = in_full.map_or((200, 50), |queued| (queued, queued.min(50_000) / 100));
    let patience = PATIENCE + 2 * INTERVAL * u32::try_from(seen).unwrap();
    let fast = Sink::start();
    let mails: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let slow = Sink::start();
    log_mails(&slow, &mails);
    let address = slow.address();
    let slow_route = format!("[[route]]\ndomain = \"slow.test\"\nto = [\"{address}\"]\n[[route]]");
    let mut config = to_sink(fast.address()).replacen("[[route]]", &slow_route, 1);
    assert!(config.contains("shards = 2"), "{config}");
    config = config.replace("shards = 2", &format!("shards = {shards}"));
    config += "[shaping.\"slow.test\"]\nconnection_limit = 5\nmax_message_rate = \"20/s\"\n";

    let begun = Instant::now();
    let postrider = Postrider::start(directory.path(), &config);
    let mut client = Client::ready(postrider.smtp()).unwrap();
    for domain in ["slow.test", "fast.test"] {
        for number in 0..queued {
            let recipient = format!("r{number}@{domain}");
            client.submit("sender@sender.test", &[&recipient], &message("rates")).unwrap();
        }
    }
    assert_eq!(fast.take(queued).len(), queued, "the other site is not held up");
    let arrived = || mails.lock().unwrap().len();
    poll_for(patience, "some have gone", || (arrived() >= seen).then_some(()));
    postrider.kill();
    let before = arrived();
    assert!(before + seen < queued, "it was killed in the midst of it");
    assert!(slow.connections_most() <= 5);
    drop(slow);

    let slow = poll_for(patience, "the sink is back", || Sink::try_start_at(address).ok());
    log_mails(&slow, &mails);
    let postrider = Postrider::start(directory.path(), &config);
    poll_for(patience, "it goes on", || (arrived() >= before + seen).then_some(()));
    postrider.terminate();
    assert!(slow.connections_most() <= 5);
    let mails = mails.lock().unwrap();
    for (place, at) in mails.iter().enumerate() {
        let earliest = INTERVAL * u32::try_from(place).unwrap();
        assert!(at.duration_since(begun) >= earliest, "mail {place} came after {:?}", at.duration_since(begun));
    }
    let most = most_in_a_second(&mails);
    let mean = |mails: &[Instant]| (mails.len() - 1) as f64 / (mails[mails.len() - 1] - mails[0]).as_secs_f64();
    let (first, second) = mails.split_at(before);
    let means = [mean(first), mean(second)];
    println!("{shards} shards: {most} in a sliding second at most; {means:.1?} a second before and after the kill");
    if in_full.is_some() {
        assert!(most <= 21, "{most} in a sliding second");
        assert!(means.iter().all(|mean| *mean >= 19.0), "{means:.1?} a second");
    }
}

fn most_in_a_second(mails: &[Instant]) -> usize {
    let within = |first: &Instant| mails.iter().filter(|at| *at >= first && at.duration_since(*first) < SECOND).count();
    mails.iter().map(within).max().unwrap_or_default()
}

const SECOND: Duration = Duration::from_secs(1);

fn log_mails(sink: &Sink, mails: &Arc<Mutex<Vec<Instant>>>) {
    let mails = Arc::clone(mails);
    sink.set_script(move |step| {
        if step.verb == Verb::Mail {
            mails.lock().unwrap().push(Instant::now());
        }
        Answer::Usual
    });
}
