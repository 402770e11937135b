//! Those who submit mail: sessions that pipeline or don't, and the embedding API; and what they write.

use std::net::SocketAddr;
use std::sync::Arc;

use postrider::accept::{Received, SharedContent};
use postrider::config::SmtpListener;
use postrider::handover::ShardMessage;
use postrider::shard::SessionKey;
use postrider_spool::record::DsnParameters;

use crate::checker::{Marker, Sent};
use crate::client::{self, Client};
use crate::clock::{HOUR, MINUTE, MS, Micros, SECOND};
use crate::dns::Dns;
use crate::dsn;
use crate::mix::Fault;
use crate::random::Random;
use crate::rates;
use crate::world::{Event, OTHER_POOL, World};

/// Content that messages share, and the shard that is their home.
#[derive(Debug)]
pub(crate) struct Campaign {
    content: Arc<SharedContent>,
    shard: usize,
}

impl World {
    /// Somebody has mail, and the next will have some after a while.
    pub(crate) fn submit(&mut self) {
        if self.mix.is_healed() {
            return;
        }
        // Bursts, with pauses between them.
        let wait = if self.random.one_in(12) { self.random.below(self.pause_max) } else { self.random.below(SECOND) };
        self.clock.after(wait, Event::Submit);
        if self.ledger.counts.recipients >= self.recipients_wanted {
            return;
        }
        let shard = self.random.below(self.shards.len() as u64) as usize;
        match self.random.below(6) {
            0 => self.inject(shard),
            1 => self.inject_sharing(shard),
            _ => self.open_session(shard),
        }
    }

    /// The embedding API's campaigns: some are begun, some get one message more, some come to their end.
    fn inject_sharing(&mut self, shard: usize) {
        if self.campaigns.is_empty() || self.campaigns.len() < CAMPAIGNS_MAX && self.random.one_in(4) {
            let lines = self.random.below(60);
            let octets = (0..lines).flat_map(|line| format!("{line:.<60}\r\n").into_bytes());
            let octets: Vec<u8> = b"X-Shared: yes\r\n\r\n".iter().copied().chain(octets).collect();
            self.next_content += 1;
            let content = self.policy.share(self.next_content, octets).expect("it is as it should be");
            self.campaigns.push(Campaign { content: Arc::new(content), shard });
        }
        let place = self.random.below(self.campaigns.len() as u64) as usize;
        let Campaign { content, shard } = &self.campaigns[place];
        let (content, shard) = (Arc::clone(content), *shard);
        self.inject_one(shard, Some(&content));
        if self.random.one_in(12) {
            self.campaigns.swap_remove(place);
        }
    }

    fn open_session(&mut self, shard: usize) {
        let address = SocketAddr::from(([127, 0, 0, 1], 4_000));
        let opened = self.shards[shard].open_session(self.clock.now(), &SmtpListener::default(), address);
        let Some(session) = opened else { return };
        self.clients.insert((shard, session), Client::new(&mut self.random));
        self.turn(shard);
        self.clock.after(MS, Event::Client { shard, session });
    }

    fn inject(&mut self, shard: usize) {
        self.inject_one(shard, None);
    }

    fn inject_one(&mut self, shard: usize, shared: Option<&Arc<SharedContent>>) {
        let now_ms = self.clock.now().wall_ms;
        let tenants = self.has_rates.then_some(&mut self.own);
        let mut own = Vec::new();
        let marker = self.ledger.send(|marker| {
            let mut sent = message(marker, true, now_ms, &self.dns, &mut self.random, tenants);
            own.clone_from(&sent.content);
            if let Some(shared) = shared {
                own = format!("Subject: m{marker}\r\n").into_bytes();
                sent.content = [&own, shared.octets()].concat();
            }
            sent
        });
        let sent = self.ledger.sent(marker);
        let content = [sent.steering.as_bytes(), &own].concat();
        let dsn = if self.has_dsn { dsn::asked(marker, &sent) } else { DsnParameters::default() };
        let received = Received {
            dsn,
            smtputf8_declared: client::is_utf8(&sent),
            ..Received::embedded(sent.reverse_path.clone(), sent.recipients.clone(), content)
        };
        self.ledger.finish(marker);
        let (now, random) = (self.clock.now(), [marker, marker]);
        let admitted = match shared {
            Some(shared) => self.policy.admit_sharing(now, received, shared, random),
            None => self.policy.admit(now, received, random),
        };
        match admitted {
            Ok(admitted) => {
                self.injections.insert(marker, marker);
                let message = ShardMessage::Inject { injection: marker, admitted: Box::new(admitted) };
                self.mail(shard, message);
            }
            Err(_) => self.ledger.refuse(marker, None),
        }
    }

    /// A client says something, if it has anything to say, and it is wanted.
    pub(crate) fn step_client(&mut self, shard: usize, session: SessionKey) {
        let Some(client) = self.clients.get_mut(&(shard, session)) else { return };
        let is_gone = client.is_done || self.mix.strikes(Fault::ClientGone, &mut self.random);
        if is_gone {
            self.clients.remove(&(shard, session));
            self.shards[shard].session_closed(session);
            return self.turn(shard);
        }
        if client.has_output() && self.shards[shard].session_wants_input(session) {
            let input = client.take_output(&mut self.random, &mut self.ledger);
            self.shards[shard].session_received(self.clock.now(), session, &input);
            self.turn(shard);
        }
        let slow = self.mix.strikes(Fault::ClientSlow, &mut self.random);
        let wait = if slow { self.random.below(7 * MINUTE) } else { MS + self.random.below(100 * MS) };
        self.clock.after(wait, Event::Client { shard, session });
    }
}

/// One to six recipients at a few domains, seldom many, and content of many lengths.
pub(crate) fn message(
    marker: Marker,
    is_injected: bool,
    now_ms: u64,
    dns: &Dns,
    random: &mut Random,
    tenants: Option<&mut Random>,
) -> Sent {
    let domains: Vec<&str> = dns.domains().collect();
    let count = if random.one_in(12) { 6 + random.below(30) } else { 1 + random.below(5) };
    let utf8 = random.one_in(60);
    let malformed = is_injected && random.one_in(40);
    let recipients = (0..count).map(|place| {
        // The last ones take no mail.
        let bound = if random.one_in(25) { domains.len() } else { domains.len() - 2 };
        let domain = domains[random.below(bound as u64) as usize];
        match random.below(3) {
            0 if utf8 => format!("ü{place}@{domain}"),
            0 if malformed => format!("r {place}@{domain}"),
            _ => format!("r{place}@{domain}"),
        }
    });
    let recipients = recipients.collect();
    let subject = if random.one_in(50) { " é" } else { "" };
    let mut content = format!("Subject: m{marker}{subject}\r\n\r\n").into_bytes();
    if random.one_in(20) {
        content.extend_from_slice("naïve\r\n".as_bytes());
    }
    let octets = if random.one_in(15) { 3_000 + random.below(9_000) } else { random.below(1_200) };
    while (content.len() as u64) < octets {
        let dot = if random.one_in(20) { "." } else { "" };
        content.extend_from_slice(format!("{dot}{:-<60}\r\n", random.below(1 << 30)).as_bytes());
    }
    let mut sent = Sent {
        reverse_path: format!("m{marker}@client.example"),
        recipients,
        steering: String::new(),
        content,
        sources: vec![0, 1],
        first_attempt_ms: None,
    };
    steer(&mut sent, now_ms, random);
    // Their pool is the default one.
    if sent.sources == [0, 1]
        && let Some(tenant) = tenants.and_then(rates::tenant)
    {
        sent.steering.push_str(&format!("X-Tenant: {tenant}\r\n"));
    }
    if malformed && random.one_in(4) {
        sent.reverse_path = format!("m{marker}@client .example");
    }
    sent
}

/// What the message asks of the engine.
fn steer(sent: &mut Sent, now_ms: u64, random: &mut Random) {
    if random.one_in(3) {
        sent.steering.push_str(&format!("X-Campaign: c{}\r\n", random.below(3)));
    }
    if random.one_in(5) {
        sent.steering.push_str(&format!("X-Virtual-MTA: {OTHER_POOL}\r\n"));
        sent.sources = vec![2];
    }
    if random.one_in(30) {
        let first_attempt_ms = now_ms / 1_000 * 1_000 + random.below(FIRST_ATTEMPT_IN_MAX / MS) / 1_000 * 1_000;
        let time = jiff::Timestamp::from_millisecond(first_attempt_ms as i64).expect("a time in this century");
        sent.steering.push_str(&format!("X-Schedule: {{\"first_attempt\":\"{time}\"}}\r\n"));
        sent.first_attempt_ms = Some(first_attempt_ms);
    }
}

/// The longest delay that a message asks for.
pub(crate) const FIRST_ATTEMPT_IN_MAX: Micros = 2 * HOUR;

/// Campaigns at a time.
const CAMPAIGNS_MAX: usize = 4;
