//! What peers answer leads to what the rules say, once as often as they say, and to nothing else.

use std::path::Path;

use super::moving::config_with_sources;
use super::*;
use crate::handover::PairKey;
use crate::pool::suspension::{Effect, Scope};
use crate::schedule::queue::EntryKey;

const SITE: &str = "127.0.0.1:25";

/// A world with `sources` and these rules for all sites.
fn world(sources: u8, rules: &str) -> World {
    let text = format!("[spool]\nallow_filesystem = true\n[shaping.default]\n{rules}");
    let mut config = config_with_sources(sources);
    config.shaping = Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap().shaping;
    World::open(TempDir::new().unwrap(), START, config)
}

fn rule(when: &str, rest: &str) -> String {
    format!("[[shaping.default.automation]]\nwhen = '{when}'\n{rest}\n")
}

fn pair() -> PairKey {
    PairKey { source: 0, rollup: SITE.into(), site: SITE.into() }
}

fn campaign(world: &mut World, campaign: &str) {
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.client_says(session, &format!("X-Campaign: {campaign}\r\n{CONTENT}"));
    world.sync();
}

/// A new connection answers the next message's MAIL.
fn answer_mail(world: &mut World, reply: &str) {
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, reply);
    close(world);
}

/// Peers close what we have closed.
fn close(world: &mut World) {
    world.sync();
    for connection in std::mem::take(&mut world.closed) {
        world.shard.connection_gone(world.now, connection);
    }
    world.sync();
}

fn held(world: &World, key: EntryKey) -> Option<String> {
    world.shard.home.blocked_by(key).map(|blocked| blocked.reason.to_string())
}

fn all_held(world: &World) -> Vec<String> {
    world.shard.home.entries().filter_map(|(key, _)| held(world, key)).collect()
}

#[test]
fn the_third_answer_in_a_minute_suspends_the_source_there() {
    let rules = rule(r"^421 .*\[TSS04\]", "threshold = \"3/min\"\naction = \"suspend\"\nfor = \"2h\"");
    let mut world = world(1, &format!("connection_limit = 3\n{rules}"));
    (0..3).for_each(|_| accepted(&mut world));
    for count in 0..3 {
        assert!(world.suspensions.is_empty(), "after {count}");
        answer_mail(&mut world, "421 4.7.0 [TSS04] Messages from 192.0.2.1\r\n");
    }
    let [suspension] = &world.suspensions[..] else { panic!("{:?}", world.suspensions) };
    assert_eq!((&suspension.scope, suspension.effect), (&Scope::pair(&pair()), Effect::Stop));
    assert_eq!(suspension.until_ms, world.now.wall_ms + 7_200_000);
    let reason = "rule 1 of [shaping.default]: 421 4.7.0 [TSS04] Messages from 192.0.2.1";
    assert_eq!(&*suspension.reason, reason);
    accepted(&mut world);
    assert_eq!(all_held(&world), [format!("suspended: {reason}")], "the other three wait for their retry");
    world.pass(Duration::from_secs(7_199));
    assert!(world.connects.is_empty());
    world.pass(Duration::from_secs(2));
    assert!(!world.connects.is_empty());
}

#[test]
fn answers_of_more_than_a_minute_do_not_add_up() {
    let rules = rule("^451", "threshold = \"2/min\"\naction = \"suspend\"\nfor = \"1h\"");
    let mut world = world(1, &format!("max_deliveries_per_connection = 1\n{rules}"));
    for _ in 0..3 {
        accepted(&mut world);
        answer_mail(&mut world, "451 later\r\n");
        world.pass(Duration::from_secs(60));
    }
    assert!(world.suspensions.is_empty());
    accepted(&mut world);
    answer_mail(&mut world, "451 later\r\n");
    world.pass(Duration::from_secs(59));
    accepted(&mut world);
    answer_mail(&mut world, "451 later\r\n");
    assert_eq!(world.suspensions.len(), 1);
}

/// A reply to MAIL or to the content is one answer, however many recipients it is about.
#[test]
fn one_reply_counts_once() {
    let rules = rule("^451", "threshold = \"2/min\"\naction = \"suspend\"\nfor = \"1h\"");
    let mut world = world(1, &rules);
    let session = world.connect_client();
    let two = "RCPT TO:<b@peer.example>\r\nRCPT TO:<c@peer.example>\r\n";
    world.client_says(session, &CLIENT.replace("RCPT TO:<b@peer.example>\r\n", two));
    world.client_says(session, CONTENT);
    world.sync();
    answer_mail(&mut world, "451 4.3.0 later\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.fates().len(), 2);
    assert!(world.suspensions.is_empty());
}

#[test]
fn a_rule_says_what_an_answer_counts_as() {
    let rules = rule("^550 .*greylist", "action = \"defer\"") + &rule("^451 .*no such user", "action = \"fail\"");
    let mut world = world(1, &format!("max_deliveries_per_connection = 1\n{rules}"));
    let replies = ["550 5.7.1 greylisted\r\n", "451 no such user\r\n", "550 5.1.1 else\r\n", "451 else\r\n"];
    for reply in replies {
        accepted(&mut world);
        answer_mail(&mut world, reply);
        world.pass(Duration::from_secs(1));
    }
    let is_final: Vec<bool> = world.fates().iter().map(|fate| fate.is_final()).collect();
    assert_eq!(is_final, [false, true, true, false]);
    assert_eq!(world.shard.metrics.automation_fired.get(), 2);
}

/// Ours are no answers of a peer; a greeting is one, though no message was sent.
#[test]
fn only_what_a_peer_said_counts() {
    let rules = rule("^4", "action = \"suspend_source\"\nfor = \"1h\"");
    let mut world = world(1, &rules);
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.shard.connection_closed(world.now, peer, "reset");
    world.shard.connection_gone(world.now, peer);
    world.sync();
    world.pass(Duration::from_secs(40));
    assert!(world.suspensions.is_empty(), "{:?}", world.suspensions);
    accepted(&mut world);
    let (connection, peer) = world.connects.pop().expect("a connection is wanted");
    let made = Connected { local: "127.0.0.11:5000".parse().ok(), peer };
    world.shard.connected(world.now, connection, made);
    world.peer_says(connection, "421 too many connections\r\n");
    world.sync();
    let [suspension] = &world.suspensions[..] else { panic!("{:?}", world.suspensions) };
    assert_eq!(suspension.scope, Scope { source: Some(0), ..Scope::default() });
}

#[test]
fn a_campaign_is_suspended_alone() {
    let rules = rule("^450", "action = \"suspend_campaign\"\nfor = \"1h\"");
    let mut world = world(1, &rules);
    campaign(&mut world, "spring");
    answer_mail(&mut world, "450 4.7.28 your DKIM domain\r\n");
    let scope = Scope { tenant: Some("".into()), campaign: Some("spring".into()), ..Scope::pair(&pair()) };
    assert_eq!(world.suspensions[0].scope, scope);
    campaign(&mut world, "spring");
    campaign(&mut world, "autumn");
    let state = |(key, _): (EntryKey, _)| {
        (world.shard.home.queue_of(key).campaign.to_string(), world.shard.home.state_name(key))
    };
    let states: Vec<(String, &str)> = world.shard.home.entries().map(state).collect();
    assert!(states.contains(&("spring".to_owned(), "routing")), "{states:?}");
    assert!(states.contains(&("autumn".to_owned(), "in delivery")), "{states:?}");
}

/// With fewer connections allowed the surplus ends after what it carries, though more waits.
#[test]
fn a_set_limit_ends_surplus_connections() {
    let set = "action = { set = { connection_limit = 1 } }\nfor = \"1h\"";
    let mut world = world(1, &format!("connection_limit = 3\n{}", rule("^450 .*too many", set)));
    (0..9).for_each(|_| accepted(&mut world));
    let peers: Vec<ConnectionKey> = (0..3).map(|_| world.accept_connection()).collect();
    for &peer in &peers {
        world.peer_says(peer, "250-peer.example\r\n250 PIPELINING\r\n");
    }
    let said = world.peer_says(peers[0], "250 ok\r\n250 ok\r\n354 go\r\n");
    assert!(said.contains("\r\n.\r\nRSET\r\n"), "the next one rides: {said}");
    world.peer_says(peers[0], "450 4.7.0 too many connections\r\n250 reset\r\n");
    let [suspension] = &world.suspensions[..] else { panic!("{:?}", world.suspensions) };
    assert!(matches!(suspension.effect, Effect::Limit(_)));
    for &peer in &peers[1..] {
        let said = world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
        assert!(said.ends_with("\r\n.\r\n"), "nothing rides on what is to end: {said}");
        world.peer_says(peer, "250 taken\r\n");
    }
    for &peer in &peers {
        world.peer_says(peer, "221 bye\r\n");
    }
    assert_eq!(world.closed.len(), 2, "one stays");
    close(&mut world);
    assert!(world.connects.is_empty(), "one is as many as may be open");
    world.pass(Duration::from_secs(3_601));
    assert_eq!(world.shard.pools.stricter_at(&pair()).connection_limit, None, "the limit is over");
}

#[test]
fn a_set_rate_holds_mail_and_is_told() {
    let set = "action = { set = { max_message_rate = \"6/min\" } }\nfor = \"1h\"";
    let rules = rule("^450", set);
    let mut world = world(1, &format!("max_deliveries_per_connection = 1\n{rules}"));
    accepted(&mut world);
    answer_mail(&mut world, "450 4.7.0 slow down\r\n");
    world.pass(Duration::from_secs(1));
    for _ in 0..8 {
        accepted(&mut world);
    }
    world.pass(Duration::from_secs(11));
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.take_message(peer);
    world.peer_says(peer, "221 bye\r\n");
    close(&mut world);
    let held = all_held(&world);
    assert!(
        held.iter().any(|reason| reason.contains("6/min by rule 1 of [shaping.default]: 450 4.7.0 slow")),
        "{held:?}"
    );
    let limits = world.shard.pools.stricter_at(&pair());
    assert_eq!(limits.max_message_rate.map(|rate| rate.to_string()).as_deref(), Some("6/min"));
    let id = world.suspensions[0].id;
    world.shard.handle_message(ShardMessage::Resume { id });
    world.sync();
    assert_eq!(world.shard.pools.stricter_at(&pair()).max_message_rate, None, "the operator has ended it");
    assert!(world.connects.len() > 1, "and what was held goes at once: {}", world.connects.len());
}

/// Whoever was on the wire and hears the same later prolongs it: the peer has not changed its mind.
#[test]
fn a_suspension_lasts_from_the_last_answer_on() {
    let rules = rule("^421", "action = \"suspend\"\nfor = \"100s\"");
    let mut world = world(1, &rules);
    let begun_ms = world.now.wall_ms;
    for _ in 0..3 {
        accepted(&mut world);
    }
    world.connects.reverse();
    let peers = [(); 3].map(|()| {
        let peer = world.accept_connection();
        assert!(world.peer_says(peer, "250 peer.example\r\n").starts_with("MAIL FROM:"));
        peer
    });
    let mut ends = Vec::new();
    for peer in peers {
        world.peer_says(peer, "421 4.7.0 slow down\r\n");
        ends.push(world.suspensions.last().map(|suspension| suspension.until_ms - begun_ms));
        world.pass(Duration::from_secs(if ends.len() == 1 { 9 } else { 30 }));
    }
    assert_eq!(ends, [Some(100_000), Some(100_000), Some(139_000)], "a little more is not worth telling");
    assert_eq!(world.suspensions.len(), 2);
}

/// What one transaction had before is more than the rate lets pass together: it is divided, also where its ticket is at
/// the pair already.
#[test]
fn a_set_rate_divides_what_is_too_large_for_it() {
    let set = "action = { set = { max_message_rate = \"200/min\" } }\nfor = \"1h\"";
    let rules = rule("^450", set);
    let mut world = world(1, &format!("connection_limit = 1\n{rules}"));
    accepted(&mut world);
    for number in 0..2 {
        let session = world.connect_client();
        let recipients: String = (0..20).map(|place| format!("RCPT TO:<r{place}@peer.example>\r\n")).collect();
        let begin = format!("EHLO client.example\r\nMAIL FROM:<a{number}@client.example>\r\n{recipients}DATA\r\n");
        world.client_says(session, &begin);
        world.client_says(session, CONTENT);
        world.sync();
    }
    assert!(world.shard.home.entries().any(|(_, entry)| entry.recipients.len() == 20));
    let (connection, peer) = world.connects.pop().expect("a connection is wanted");
    let made = Connected { local: "127.0.0.1:5000".parse().ok(), peer };
    world.shard.connected(world.now, connection, made);
    world.peer_says(connection, "220 peer.example\r\n");
    world.peer_says(connection, "250-peer.example\r\n250 PIPELINING\r\n");
    let mut said =
        world.peer_says(connection, "450 4.7.0 slow down\r\n503 5.5.1 MAIL first\r\n503 5.5.1 MAIL first\r\n");
    let limits = world.shard.pools.stricter_at(&pair());
    let most = limits.batch_max();
    assert!(most < 20, "{most}");
    let mut sent = 0;
    for _ in 0..600 {
        let recipients = said.matches("RCPT TO:").count();
        assert!(recipients <= most, "{recipients} at once");
        sent += recipients;
        if recipients > 0 {
            let envelope = "250 2.0.0 ok\r\n".repeat(said.matches("RSET").count() + 1 + recipients);
            world.peer_says(connection, &format!("{envelope}354 go\r\n"));
            said = world.peer_says(connection, "250 2.0.0 taken\r\n");
        } else {
            world.to_peer.clear();
            world.pass(Duration::from_millis(100));
            said = std::mem::take(&mut world.to_peer);
        }
    }
    assert_eq!(sent, 40);
}

#[test]
fn a_halved_limit_climbs_back() {
    let halve = "action = { halve = [\"connection_limit\", \"max_message_rate\"] }\nfor = \"10m\"";
    let rules = rule("^450", halve);
    let mut world = world(1, &format!("max_deliveries_per_connection = 1\nconnection_limit = 20\n{rules}"));
    let limit = |world: &World| world.shard.pools.stricter_at(&pair()).connection_limit;
    accepted(&mut world);
    answer_mail(&mut world, "450 4.7.0 slow down\r\n");
    assert_eq!(limit(&world), Some(10), "without a rate there is none to halve");
    accepted(&mut world);
    answer_mail(&mut world, "450 4.7.0 slow down\r\n");
    assert_eq!(limit(&world), Some(10), "that was under way");
    world.pass(Duration::from_secs(30));
    accepted(&mut world);
    answer_mail(&mut world, "450 4.7.0 slow down\r\n");
    assert_eq!(limit(&world), Some(5));
    for (minutes, expected) in [(10, Some(7)), (20, Some(9)), (70, Some(19)), (80, None)] {
        let begun = world.suspensions.last().unwrap();
        let Effect::Limit(limited) = begun.effect else { panic!("{begun:?}") };
        let at_ms = limited.recovery.unwrap().since_ms + minutes * 60_000 + 1_000;
        world.pass(Duration::from_millis(at_ms - world.now.wall_ms));
        assert_eq!(limit(&world), expected, "{minutes} minutes");
    }
}

/// Ready, scheduled and answered just now: all of the queue ends, and nothing else.
#[test]
fn a_queue_bounces_and_others_stay() {
    let rules = rule("^550 .*blocked", "action = \"bounce_queue\"");
    let mut world = world(1, &format!("connection_limit = 1\n{rules}"));
    campaign(&mut world, "spring");
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "451 later\r\n");
    world.sync();
    for name in ["spring", "autumn", "spring", "autumn", "spring"] {
        campaign(&mut world, name);
    }
    world.peer_says(peer, "250 reset\r\n");
    world.peer_says(peer, "550 5.7.1 campaign blocked\r\n");
    world.pass(Duration::from_secs(1));
    let left: Vec<String> =
        world.shard.home.entries().map(|(key, _)| world.shard.home.queue_of(key).campaign.to_string()).collect();
    assert_eq!(left, ["autumn", "autumn"]);
    let mut fates: Vec<Fate> = world.fates().into_iter().filter(|fate| fate.is_final()).collect();
    fates.sort_by_key(|fate| *fate == Fate::AdminBounced);
    assert_eq!(fates, [Fate::Bounced, Fate::AdminBounced, Fate::AdminBounced, Fate::AdminBounced]);
    let text = world.events.iter().rev().find_map(|event| match &event.record {
        Logged::Outcome(outcome) if outcome.results[0].fate == Fate::AdminBounced => {
            Some(outcome.results[0].answer.text.clone())
        }
        _ => None,
    });
    let expected = "the queue is bounced by rule 1 of [shaping.default]: 550 5.7.1 campaign blocked";
    assert_eq!(text.as_deref(), Some(expected));
}

/// The example of each shipped rule, said by a peer: what the rule says is done, and where it is our address that is
/// refused, no recipient is lost for it.
#[test]
fn shipped_rules_do_what_they_say_and_bounce_nothing_that_blames_our_address() {
    let mut seen = 0;
    for provider in Config::new("mta.example").shaping_rules.providers {
        let rules = {
            let mut shaping = crate::config::Shaping::default();
            provider.layer.settings.apply(&mut shaping);
            shaping.automation
        };
        for rule in rules.iter() {
            let name = &provider.name;
            let text = format!(
                "[spool]\nallow_filesystem = true\n[provider.{name}]\nmatch = [{{ domain = \"peer.example\" }}]\n\
                 max_deliveries_per_connection = 1\n"
            );
            let parsed = Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap();
            let mut config = config_with_sources(2);
            config.shaping_rules = parsed.shaping_rules;
            let mut world = World::open(TempDir::new().unwrap(), START, config);
            let example = rule.example.as_deref().unwrap();
            // Both sources answer as often as it takes.
            for _ in 0..2 * rule.threshold.map_or(1, |threshold| threshold.count.min(4)) {
                accepted(&mut world);
                if world.connects.is_empty() {
                    break;
                }
                answer_mail(&mut world, &format!("{example}\r\n"));
                world.pass(Duration::from_millis(1));
                // Where the host backs off, the greeting of the next connection says the same.
                world.connects.clear();
                if example.starts_with("421") {
                    break;
                }
            }
            let acts = |action: crate::config::AutomationAction| match action {
                crate::config::AutomationAction::Set(_) => "limit",
                crate::config::AutomationAction::Suspend => "stop",
                crate::config::AutomationAction::SuspendCampaign => "stop",
                other => panic!("{other}"),
            };
            let expected = acts(rule.action);
            let made = |it: &Suspension| if matches!(it.effect, Effect::Stop) { "stop" } else { "limit" };
            let is_at_once = rule.threshold.is_none();
            if is_at_once {
                let told = world.suspensions.iter().any(|it| made(it) == expected && it.reason.contains(&*rule.name));
                assert!(told, "{example}: {:?}", world.suspensions);
                assert!(world.suspensions.iter().all(|it| it.scope.rollup.as_deref() == Some(name)), "{example}");
            }
            if matches!(rule.action, crate::config::AutomationAction::Suspend) && example.starts_with('5') {
                let bounced = world.fates().into_iter().any(|fate| fate.is_final());
                assert!(!bounced, "{example} is no bounce");
                assert!(!world.fates().is_empty(), "{example}");
            }
            seen += 1;
        }
    }
    assert!(seen > 25, "{seen}");
}

/// A move is no reason to begin anew with what a peer has said.
#[test]
fn what_was_counted_goes_with_the_pairs() {
    let rules = rule("^451", "threshold = \"2/min\"\naction = \"suspend\"\nfor = \"1h\"");
    let mut world = world(1, &format!("max_deliveries_per_connection = 1\n{rules}"));
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "451 later\r\n");
    let rollup = pair().rollup_key();
    world.shard.handle_message(ShardMessage::Release { rollup: rollup.clone() });
    world.sync();
    assert_eq!(std::mem::take(&mut world.to_peer), "QUIT\r\n");
    world.peer_says(peer, "221 bye\r\n");
    close(&mut world);
    let state = world.released.take().expect("nothing is under way there");
    world.shard.handle_message(ShardMessage::TakeOver(state));
    world.shard.handle_message(ShardMessage::Moved { rollup, owner: 0 });
    world.sync();
    accepted(&mut world);
    answer_mail(&mut world, "451 later\r\n");
    assert_eq!(world.suspensions.len(), 1, "it was the second in that minute");
}
