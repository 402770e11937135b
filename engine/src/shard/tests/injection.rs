//! A tenant's `max_injection_rate`: recipients accepted, over all shards.

use super::*;

fn world(rate: &str) -> World {
    let text = format!(
        "hostname = \"mta.example\"\n[spool]\nallow_filesystem = true\n[[tenant]]\nname = \"acme\"\n\
         domains = [\"client.example\"]\nmax_injection_rate = \"{rate}\"\n"
    );
    World::open(TempDir::new().unwrap(), START, Config::from_toml(&text, "t.toml", "/nonexistent".as_ref()).unwrap())
}

/// What one more message of so many recipients is answered.
fn answer(world: &mut World, sender: &str, recipients: usize) -> String {
    let session = world.connect_client();
    let recipients: String = (0..recipients).map(|place| format!("RCPT TO:<r{place}@peer.example>\r\n")).collect();
    world.client_says(session, &format!("EHLO client\r\nMAIL FROM:<a@{sender}>\r\n{recipients}DATA\r\n"));
    let early = world.client_says(session, &CONTENT.replace("Subject", &format!("From: a@{sender}\r\nSubject")));
    world.sync();
    let answer = if early.is_empty() { std::mem::take(&mut world.to_client) } else { early };
    answer.split(" id=").next().unwrap_or_default().trim_end().to_owned()
}

const ACCEPTED: &str = "250 2.0.0 OK";
const TOO_MUCH: &str = "450 4.7.0 Tenant acme injects more than it may; try again later";

#[test]
fn what_is_above_the_rate_is_put_off_until_the_window_has_room() {
    let mut world = world("5/s");
    assert_eq!(answer(&mut world, "client.example", 3), ACCEPTED, "a client is not paced");
    assert_eq!(answer(&mut world, "client.example", 2), ACCEPTED);
    assert_eq!(answer(&mut world, "client.example", 1), TOO_MUCH);
    assert_eq!(answer(&mut world, "other.example", 9), ACCEPTED, "others have no such limit");
    world.pass(Duration::from_millis(999));
    assert_eq!(answer(&mut world, "client.example", 1), TOO_MUCH);
    world.pass(Duration::from_millis(1));
    assert_eq!(answer(&mut world, "client.example", 5), ACCEPTED);
    assert_eq!(world.shard.home.len(), 4);
}

#[test]
fn a_burst_may_be_less_than_the_rate() {
    let mut world = world("60/min,max_burst=2");
    let answers: Vec<String> = (0..3).map(|_| answer(&mut world, "client.example", 1)).collect();
    assert_eq!(answers, [ACCEPTED, ACCEPTED, TOO_MUCH]);
    world.pass(Duration::from_secs(1));
    let answers: Vec<String> = (0..2).map(|_| answer(&mut world, "client.example", 1)).collect();
    assert_eq!(answers, [ACCEPTED, TOO_MUCH]);
}

/// To try again would never help.
#[test]
fn a_message_that_no_window_has_room_for_is_refused() {
    let mut world = world("5/s");
    let told = "554 5.5.3 Tenant acme may inject 5 recipients at most; divide the message";
    assert_eq!(answer(&mut world, "client.example", 6), told);
    assert_eq!(answer(&mut world, "client.example", 5), ACCEPTED);
}

/// Whoever waits for its answer while the engine stops is told so, and the session ends.
#[test]
fn who_asks_while_the_engine_stops_is_answered() {
    let mut world = world("5/s");
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.to_client.clear();
    world.shard.session_received(world.now, session, CONTENT.as_bytes());
    world.shard.inbox.push_front(ShardMessage::Stop);
    world.sync();
    assert!(world.to_client.starts_with("451 4.3.2 System is shutting down"), "{}", world.to_client);
    assert!(world.shard.home.is_empty());
}
