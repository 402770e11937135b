//! What a durable message means for the schedule: its recipients at one domain, in the same state, are one entry.

use std::borrow::Cow;
use std::sync::Arc;

use ahash::{HashMap, HashMapExt as _};
use postrider_spool::record::{Envelope, Fate, MessageId, RecipientResult};
use postrider_spool::{Message, ReadError};

use crate::admin::answer_text;
use crate::config::{Config, RoutedMail};
use crate::handover::{RecipientGroup, Spooled};
use crate::mail::address::queue_domain;

/// What a durable message means for the schedule.
pub(super) fn spooled(message: MessageId, envelope: &Envelope, batch_max: usize) -> Spooled {
    let recipients = envelope.recipients.iter().enumerate();
    let recipients = recipients.map(|(index, recipient)| GroupedRecipient {
        index: index as u32,
        domain: queue_domain(&recipient.address),
        attempts: 0,
        due_ms: envelope.first_attempt_ms,
        last_answer: None,
    });
    Spooled {
        message,
        tenant: envelope.tenant.clone(),
        campaign: envelope.campaign.clone(),
        egress_pool: envelope.egress_pool.clone(),
        priority: envelope.priority,
        expires_ms: envelope.expires_ms,
        groups: group(recipients, batch_max),
    }
}

pub(super) fn recovered_message(
    id: MessageId,
    message: &Message,
    pending: &[u32],
    results: &[RecipientResult],
    batch_max: usize,
    matching: Option<&Config>,
) -> Result<Spooled, ReadError> {
    let envelope = message.envelope()?;
    let first_attempt_ms = envelope.first_attempt_ms.to_native();
    let recipient = |&index: &u32| {
        let address = envelope.recipients.get(index as usize)?.address.as_str();
        let state = results.iter().find(|result| result.index == index);
        let (attempts, due_ms) = match state {
            Some(RecipientResult { attempts, fate: Fate::Deferred { due_ms }, .. }) => (*attempts, *due_ms),
            _ => (0, first_attempt_ms),
        };
        let answer = state.map(|result| &result.answer);
        let last_answer = answer.map(|answer| Arc::from(answer_text(answer.code, answer.enhanced, &answer.text)));
        Some(GroupedRecipient { index, domain: queue_domain(address), attempts, due_ms, last_answer })
    };
    let mut spooled = Spooled {
        message: id,
        tenant: envelope.tenant.as_str().to_owned(),
        campaign: envelope.campaign.as_str().to_owned(),
        egress_pool: envelope.egress_pool.as_str().to_owned(),
        priority: envelope.priority,
        expires_ms: envelope.expires_ms.to_native(),
        groups: group(pending.iter().filter_map(recipient), batch_max),
    };
    if let Some(config) = matching {
        match_routes(config, &mut spooled, envelope.reverse_path.as_str());
    }
    Ok(spooled)
}

/// Which of the routes with a `match` the message's recipients take.
pub(super) fn match_routes(config: &Config, spooled: &mut Spooled, sender: &str) {
    let mail = RoutedMail { tenant: &spooled.tenant, campaign: &spooled.campaign, sender };
    for group in &mut spooled.groups {
        group.matched = config.matched_route(&group.domain, &mail);
    }
}

struct GroupedRecipient<'a> {
    index: u32,
    domain: Cow<'a, str>,
    attempts: u32,
    due_ms: u64,
    last_answer: Option<Arc<str>>,
}

impl GroupedRecipient<'_> {
    fn alone(&self) -> RecipientGroup {
        RecipientGroup {
            domain: Arc::from(&*self.domain),
            recipients: [self.index].into(),
            attempts: self.attempts,
            due_ms: self.due_ms,
            last_answer: self.last_answer.clone(),
            matched: None,
        }
    }
}

/// Recipients at one domain with the same state share an entry, and so a transaction, up to `batch_max`.
fn group<'a>(mut recipients: impl Iterator<Item = GroupedRecipient<'a>>, batch_max: usize) -> Vec<RecipientGroup> {
    let (first, second) = (recipients.next(), recipients.next());
    if let (Some(only), None) = (&first, &second) {
        return vec![only.alone()];
    }
    let recipients = first.into_iter().chain(second).chain(recipients);
    let mut groups: Vec<(RecipientGroup, Vec<u32>)> = Vec::new();
    let mut places = HashMap::new();
    for recipient in recipients {
        let key = (recipient.domain.clone(), recipient.attempts, recipient.due_ms);
        let place = *places.entry(key.clone()).or_insert(groups.len());
        if place == groups.len() || groups[place].1.len() == batch_max {
            places.insert(key, groups.len());
            groups.push((recipient.alone(), vec![recipient.index]));
        } else {
            groups[place].1.push(recipient.index);
        }
    }
    let finish = |(group, indices): (RecipientGroup, Vec<u32>)| RecipientGroup { recipients: indices.into(), ..group };
    groups.into_iter().map(finish).collect()
}
