//! What operators do with mail that waits: it is to end, whatever is under way with it; or, where it is held as in
//! doubt, it is tried again.
//!
//! What it draws is its own, so that runs without it stay as they were.

use std::sync::Arc;

use postrider::admin::{MailChoice, MessageFilter, MessageRow, MessageState};
use postrider::handover::{Ask, ShardMessage};
use postrider::mail::queue_name::QueueName;

use crate::checker::{Ledger, domain_of};
use crate::clock::MINUTE;
use crate::random::Random;
use crate::world::{ASK_READS_MAX, Event, World};

/// Of every so manieth seed.
const EVERY: u64 = 4;

/// Whether anybody does.
pub(crate) fn draw(seed: u64) -> Option<Random> {
    let mut random = Random::new(seed.rotate_left(48));
    random.one_in(EVERY).then_some(random)
}

impl World {
    /// Now and then some mail is bounced or released: of a domain, a campaign or a tenant, or one message. A shard
    /// answers with how many recipients those are, which must be as many as it has just told of.
    pub(crate) fn operate(&mut self) {
        let Some(mut random) = self.operator.clone() else { return };
        self.clock.after(5 * MINUTE + random.below(20 * MINUTE), Event::Operate);
        let choice = (self.ledger.open() < ASK_READS_MAX).then(|| self.ask()).flatten();
        let releases = random.one_in(2);
        let choice = choice.map(|mut rows| {
            rows.retain(|row| !releases || row.state == MessageState::Held);
            rows
        });
        let choice = choice.filter(|rows| !rows.is_empty()).map(|rows| {
            let row = &rows[random.below(rows.len() as u64) as usize];
            let of_domain = Some(domain_of(&row.recipient).to_owned()).filter(|domain| domain.is_ascii());
            match random.below(4) {
                0 => MailChoice { message: row.id.parse().ok(), ..MailChoice::default() },
                1 => MailChoice { campaign: row.campaign.clone(), domain: of_domain, ..MailChoice::default() },
                2 => MailChoice { tenant: row.tenant.clone(), domain: of_domain, ..MailChoice::default() },
                _ => MailChoice { queues: vec![row.queue.clone()], ..MailChoice::default() },
            }
        });
        self.operator = Some(random);
        if let Some(choice) = choice {
            (0..self.shards.len()).for_each(|shard| self.choose(shard, &choice, releases));
        }
    }

    fn choose(&mut self, shard: usize, choice: &MailChoice, releases: bool) {
        let Some(rows) = self.ask_shard(shard, MessageFilter::default()) else { return };
        let is_chosen = |row: &&MessageRow| {
            let (tenant, campaign) = (row.tenant.as_deref(), row.campaign.as_deref());
            let [tenant, campaign] = [tenant, campaign].map(Option::unwrap_or_default);
            (!releases || row.state == MessageState::Held)
                && choice.message.is_none_or(|id| id.to_string() == row.id)
                && choice.fits(QueueName { campaign, tenant, domain: domain_of(&row.recipient) })
        };
        let chosen: Vec<&MessageRow> = rows.iter().filter(is_chosen).collect();
        self.ledger.choose(&chosen, releases.then(|| self.clock.now().wall_ms));
        self.questions += 1;
        let (choice, reason) = (choice.clone(), Arc::from("no longer wanted"));
        let ask = if releases { Ask::Release { choice, reason } } else { Ask::Bounce { choice, reason } };
        self.shards[shard].handle_message(ShardMessage::Ask { question: self.questions, ask: Box::new(ask) });
        self.turn(shard);
        let told = self.chosen.remove(&self.questions).expect("it is answered at once");
        assert_eq!(told, chosen.len() as u64, "the operator is told how many recipients those are");
    }
}

impl Ledger {
    /// These must end, whatever becomes of what is under way, or be tried again; unless the engine ends first.
    fn choose(&mut self, rows: &[&MessageRow], released_ms: Option<u64>) {
        for row in rows {
            let key = (row.id.parse().expect("an id"), row.recipient.clone());
            if let Some(at_ms) = released_ms {
                self.released.insert(key, at_ms);
                continue;
            }
            self.bounced.insert(key.clone());
            self.unwanted.insert(key);
        }
    }
}
