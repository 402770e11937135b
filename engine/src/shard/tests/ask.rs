//! Questions about messages, and what happens while these are read.

use super::*;
use crate::admin::MessageState;

/// Every row is of the moment of the question: while messages are read, entries are split, and what was split off
/// would be in no row.
#[test]
fn an_answer_is_of_the_moment_of_its_question() {
    let mut world = World::new();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "451 4.2.1 not now\r\n");
    world.pass(Duration::from_secs(1));
    let World { directory, now, shard, _spool, .. } = world;
    drop((shard, _spool));
    let mut world = World::open(directory, now, Config::new("mta.example"));
    world.ask(MessageFilter { limit: 10, ..MessageFilter::default() });
    assert!(world.rows.is_none(), "the message is not in memory");

    // It comes due first, then it is read.
    world.pass(Duration::from_secs(30 * 60));
    assert_eq!(world.connects.len(), 1, "meanwhile it is tried again");
    let rows = world.rows.take().expect("the question is answered");
    let [row] = &rows[..] else { panic!("one recipient: {rows:?}") };
    assert_eq!((row.state, row.num_attempts), (MessageState::Scheduled, 1));
    assert_eq!(row.last_answer.as_deref(), Some("451 4.2.1 not now"));
    assert!((row.recipient.as_str(), row.size) > ("", 0), "and it tells what the message does: {row:?}");
}

/// Recipients and messages are counted at the same moment, and not one of them as a gauge had it a second ago.
#[test]
fn messages_and_recipients_are_counted_together() {
    let mut world = World::new();
    for count in 1..=2 {
        accepted(&mut world);
        world.shard.answer(world.now, 0, Ask::Queues { limit: 0 });
        let mut answers = std::iter::from_fn(|| world.shard.poll_action()).filter_map(|action| match action {
            Action::Control(ControlMessage::Answer { told: Told::Queues { total, messages, rows }, .. }) => {
                Some((total, messages, rows.len()))
            }
            _ => None,
        });
        assert_eq!(answers.next(), Some((count, count, 0)));
    }
}
