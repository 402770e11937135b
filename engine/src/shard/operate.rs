//! What operators do with a home's mail: it is bounced, or what is held as in doubt is tried again.

use std::collections::BTreeMap;
use std::sync::Arc;

use postrider_spool::record::{Answer, Fate};

use super::Shard;
use crate::admin::{Chosen, MailChoice};
use crate::fair::Flow;
use crate::handover::Told;
use crate::mail::queue_name::QueueName;
use crate::mail::time::Now;
use crate::schedule::queue::{EntryKey, Queue};

impl Shard {
    /// What is chosen ends: what waits at once, what is on the wire when it comes back unsettled.
    pub(super) fn bounce_chosen(&mut self, choice: &MailChoice, reason: &str) -> Told {
        if !choice.held {
            self.pools.call_back_tickets(|attempt| {
                let Flow { tenant, campaign, .. } = &*attempt.flow;
                choice.message.is_none_or(|wanted| wanted == attempt.message.id())
                    && choice.fits(QueueName { campaign, tenant, domain: &attempt.domain })
            });
        }
        let is_whole_queues = choice.message.is_none() && !choice.held;
        let (waiting, out) = if is_whole_queues {
            self.home.withdraw_queues(|queue| is_chosen(choice, queue))
        } else {
            self.withdraw_chosen(choice)
        };
        let told = self.count_chosen(waiting.iter().chain(&out));
        self.bounce(waiting, out, &format!("Administrator bounced with reason: {reason}"));
        told
    }

    /// What is held as in doubt, of what is chosen, is tried again: it may arrive twice.
    pub(super) fn release_chosen(&mut self, now: Now, choice: &MailChoice, reason: &str) -> Told {
        let (waiting, _) = self.withdraw_chosen(&MailChoice { held: true, ..choice.clone() });
        let told = self.count_chosen(waiting.iter());
        let text = format!("Administrator released with reason: {reason}; it was held as in doubt");
        // RFC 3463 §3.1: X.0.0. Nothing is wrong any more.
        let answer = Answer { code: 451, enhanced: Some((4, 0, 0)), text, command: String::new() };
        let answer = Arc::new(answer);
        for key in waiting {
            // What is due when it expires counts as held. What is over by now ends at its turn.
            let due_ms = now.wall_ms.min(self.home.entry(key).expires_ms.saturating_sub(1));
            self.decide(vec![key], Fate::Deferred { due_ms }, Arc::clone(&answer));
        }
        told
    }

    /// The chosen entries that wait, taken from where they do, and those that are out.
    fn withdraw_chosen(&mut self, choice: &MailChoice) -> (Vec<EntryKey>, Vec<EntryKey>) {
        let fits = |key: &EntryKey| {
            let entry = self.home.entry(*key);
            (!choice.held || entry.is_held() && !self.home.is_out(*key)) && is_chosen(choice, self.home.queue_of(*key))
        };
        let chosen: Vec<EntryKey> = match choice.message {
            Some(id) => self.entries_of(id).filter(fits).collect(),
            None => self.home.entries().map(|(key, _)| key).filter(fits).collect(),
        };
        let (out, waiting): (Vec<_>, Vec<_>) = chosen.into_iter().partition(|key| self.home.is_out(*key));
        // What is decided about already is left to that.
        let waiting = waiting.into_iter().filter(|key| self.home.withdraw_one(*key)).collect();
        (waiting, out)
    }

    fn count_chosen<'a>(&self, keys: impl Iterator<Item = &'a EntryKey>) -> Told {
        let mut recipients: BTreeMap<String, u64> = BTreeMap::new();
        for key in keys {
            let count = self.home.entry(*key).recipients.len() as u64;
            *recipients.entry(self.home.queue_of(*key).name.to_string()).or_default() += count;
        }
        Told::Chosen(Chosen { recipients })
    }
}

fn is_chosen(choice: &MailChoice, queue: &Queue) -> bool {
    let Queue { campaign, tenant, domain, .. } = queue;
    choice.fits(QueueName { campaign, tenant, domain })
}
