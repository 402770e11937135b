//! Where mail must not go twice (`in_doubt = "hold"`): that recipients are in doubt is durable before a transaction's
//! last octet is written, so that it holds after a crash, too.
//!
//! The owner's client waits, its home records, and the client goes on. What becomes of the transaction is recorded
//! behind the intent, in the same log.

use postrider_spool::record::{Fate, Outcome, RecipientResult};

use super::Shard;
use crate::deliver::verdict;
use crate::handover::{Intend, IntentKey, ShardMessage};
use crate::mail::time::Now;
use crate::pool::connection::ConnectionKey;
use crate::schedule::queue::Intent;

impl Shard {
    /// A client is about to write a transaction's last octet: its home is to record that first.
    pub(super) fn ask_for_intent(&mut self, connection: ConnectionKey, ticket: u64, recipients: Vec<u32>) {
        self.intents += 1;
        let key = IntentKey { owner: self.id, connection, number: self.intents };
        let delivery = self.deliveries.get_mut(&connection).expect("its client just spoke");
        delivery.intent = Some(key);
        let (_, attempt) = delivery.attempts.front().expect("a client ends the content of what it was given");
        assert_eq!(u64::from(attempt.ticket.entry.0), ticket, "one content ends at a time");
        let mut accepted = recipients.into_iter().peekable();
        let recipients = attempt.recipients.iter().filter(|(index, _)| accepted.next_if_eq(index).is_some());
        let intend = Intend {
            key,
            ticket: attempt.ticket,
            message: attempt.message.id(),
            recipients: recipients.cloned().collect(),
            peer_name: delivery.host_name.clone(),
        };
        self.tell(intend.ticket.home, ShardMessage::Intend(Box::new(intend)));
    }

    /// A transaction's last octet is about to be written: what is so if nothing is heard of it any more is recorded
    /// first. It ends as its settlement is recorded, which follows in the same log.
    pub(super) fn intend(&mut self, now: Now, intend: Intend) {
        let Intend { key, ticket, message, recipients, peer_name } = intend;
        let entry = self.home.entry(ticket.entry);
        assert_eq!(entry.message, message, "an entry that is out stays what it is");
        let (attempts, fate) = (entry.attempts + 1, Fate::Deferred { due_ms: entry.expires_ms });
        let queue = self.home.queue_of(ticket.entry).name.to_string();
        let answer = verdict::intent(&peer_name);
        let intent =
            Intent { recipients: recipients.iter().map(|(index, _)| *index).collect(), answer: answer.text.clone() };
        self.home.intend(ticket.entry, intent);
        let result = |(index, recipient)| {
            let (queue, answer) = (queue.clone(), answer.clone());
            RecipientResult { index, recipient, queue, fate, attempts, answer }
        };
        let results = recipients.into_iter().map(result).collect();
        let outcome = Outcome { message: message.to_raw(), at_ms: now.wall_ms, results, ..Outcome::default() };
        self.append_intent(now, outcome, key);
    }

    /// An intent is durable; the transaction that asked for it may have ended meanwhile.
    pub(super) fn intended(&mut self, now: Now, key: IntentKey) {
        let Some(delivery) = self.deliveries.get_mut(&key.connection) else { return };
        if delivery.intent.take_if(|awaited| *awaited == key).is_some() {
            self.with_client(now, key.connection, |client, out| client.handle_intended(now, out));
        }
    }
}
