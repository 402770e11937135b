//! A full spool refuses mail with 452 and takes it again when the queue has drained; what was taken is delivered.

use postrider::admin::MessageRow;

use crate::support::client::Client;
use crate::support::embedded::{Running, to_sink};
use crate::support::sink::{Sink, Verb};
use crate::support::{message, poll};

#[test]
fn a_full_spool_answers_452_and_recovers() {
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::answering(Verb::Connect, "421 4.3.2 Not now");
    let mut config = to_sink(directory.path(), sink.address());
    config.shards = Some(1);
    config.spool.max_size_bytes = 16 << 20;
    let running = Running::start(config);
    let mut large = message("large");
    large.extend(std::iter::repeat_n(*b"0123456789abcdef0123456789abcdef\r\n", 30_000).flatten());

    let mut client = Client::ready(running.smtp()).unwrap();
    let (mut taken, mut refused) = (Vec::new(), 0);
    poll("it is full", || {
        assert!(taken.len() < 40, "16 MiB do not hold 40 messages of 1 MB");
        let recipient = format!("{}@sink.test", taken.len());
        let reply = client.send("sender@sender.test", &[&recipient], &large).unwrap();
        if reply.code == 250 {
            taken.push(recipient);
            refused = 0;
            return None;
        }
        assert_eq!(reply.code, 452, "{reply}");
        assert!(reply.text.starts_with("4.3.1"), "{reply}");
        // Before that, it may be that the next segment is not ready yet.
        refused += 1;
        (refused >= 20 && taken.len() >= 5).then_some(())
    });
    assert_eq!(client.command("NOOP").unwrap().code, 250, "the session goes on");
    let refused = running.try_inject("sender@sender.test", &["b@sink.test"], &large).expect_err("it is full");
    assert!(refused.to_string().starts_with("452 4.3.1"), "the embedding API says so too: {refused}");

    sink.recover();
    let mut arrived: Vec<String> = sink.take(taken.len()).into_iter().flat_map(|it| it.recipients).collect();
    arrived.sort();
    taken.sort();
    assert_eq!(arrived, taken, "what was taken is delivered, also from a full spool");
    running.rows_when("empty", <[MessageRow]>::is_empty);

    poll("mail is taken again", || {
        let reply = client.send("sender@sender.test", &["after@sink.test"], &large).unwrap();
        assert!(matches!(reply.code, 250 | 452), "{reply}");
        (reply.code == 250).then_some(())
    });
    assert_eq!(sink.next().recipients, ["after@sink.test"]);
}
