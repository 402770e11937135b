//! The queues themselves, by what makes them: their flows, last answers and rates, and when they are forgotten.

use std::sync::Arc;

use super::{EntryKey, Home, Queue, QueueKey, QueueParts};
use crate::fair::Flow;
use crate::handover::RouteKey;
use crate::limits::{PAIRS_KEPT, QUEUES_KEPT};
use crate::mail::queue_name::QueueName;
use crate::schedule::answer::{AnswerId, Identity};

impl Home {
    pub fn queue_of(&self, key: EntryKey) -> &Queue {
        self.queues[self.entries[key].queue.0 as usize].as_ref().expect("an entry's queue exists")
    }

    pub fn queues(&self) -> impl Iterator<Item = &Queue> {
        self.queues.iter().flatten()
    }

    /// The queue of this name; a new one where there is none.
    pub(in crate::schedule) fn queue(&mut self, name: QueueParts) -> QueueKey {
        if let Some(&key) = self.queue_names.get(&name) {
            return key;
        }
        let (tenant, campaign) = (Arc::<str>::from(&*name.tenant), Arc::<str>::from(&*name.campaign));
        let flow = self.flow(name.priority, Arc::clone(&tenant), Arc::clone(&campaign), &name.pool, &name.domain);
        self.queue_serial += 1;
        let queue = Queue {
            name: QueueName { campaign: &campaign, tenant: &tenant, domain: &name.domain }.to_string().into(),
            domain: Arc::clone(&name.domain),
            route: RouteKey { domain: Arc::clone(&name.domain), matched: name.matched },
            tenant,
            campaign,
            pool: Arc::from(&*name.pool),
            priority: name.priority,
            depth: 0,
            last_answer: None,
            last_answer_serial: 0,
            rate_per_s: 0.0,
            delivered: 0,
            flow,
            serial: self.queue_serial,
        };
        let key = match self.free_queues.pop() {
            Some(place) => {
                self.queues[place as usize] = Some(queue);
                QueueKey(place)
            }
            None => {
                self.queues.push(Some(queue));
                QueueKey(self.queues.len() as u32 - 1)
            }
        };
        self.queue_names.insert(name, key);
        key
    }

    /// The flow of these, shared among the queues that have it.
    pub(super) fn flow(
        &mut self,
        priority: u8,
        tenant: Arc<str>,
        campaign: Arc<str>,
        pool: &str,
        domain: &str,
    ) -> Arc<Flow> {
        let (pool, domain) = (self.shared_limits.told_pool(pool), self.shared_limits.told_domain(domain));
        let flow = Flow { priority, tenant, campaign, pool, domain };
        if let Some(known) = self.flows.get(&flow) {
            return Arc::clone(known);
        }
        let flow = Arc::new(flow);
        self.flows.insert(Arc::clone(&flow));
        flow
    }

    pub fn count_delivered(&mut self, key: EntryKey, recipients: u32) {
        let queue = self.entries[key].queue;
        self.queue_mut(queue).delivered += recipients;
    }

    /// Brings the queues' rates up to date; called once a second.
    pub fn update_rates(&mut self) {
        for queue in self.queues.iter_mut().flatten() {
            let delivered = f64::from(std::mem::take(&mut queue.delivered));
            queue.rate_per_s += (delivered - queue.rate_per_s) / RATE_SECONDS;
        }
    }

    /// One more than the highest [`QueueKey`] in use.
    pub fn queue_places(&self) -> usize {
        self.queues.len()
    }

    /// Forgets queues and pairs that hold nothing, once there are many.
    pub fn forget_idle(&mut self) {
        if self.queue_names.len() > QUEUES_KEPT {
            let (queues, free) = (&mut self.queues, &mut self.free_queues);
            self.queue_names.retain(|_, key| {
                let place = &mut queues[key.0 as usize];
                let idle = place.as_ref().is_none_or(|queue| queue.depth == 0);
                if idle {
                    *place = None;
                    free.push(key.0);
                }
                !idle
            });
            free.sort_unstable();
            self.flows = self.queues.iter().flatten().map(|queue| Arc::clone(&queue.flow)).collect();
        }
        if self.pair_keys.len() > PAIRS_KEPT {
            let (pairs, free) = (&mut self.pairs, &mut self.free_pairs);
            self.pair_keys.retain(|_, place| {
                let pair = &mut pairs[*place as usize];
                let idle = pair.as_ref().is_none_or(|pair| pair.ready.is_empty() && pair.out == 0);
                if idle {
                    *pair = None;
                    free.push(*place);
                }
                !idle
            });
            free.sort_unstable();
        }
    }

    pub(in crate::schedule) fn queue_identity(&self, key: QueueKey) -> Identity {
        let queue = self.queues[key.0 as usize].as_ref().expect("the queue exists");
        Identity { place: key.0, serial: queue.serial }
    }

    /// The queue that was found to have this identity, unless it has been forgotten since.
    pub(in crate::schedule) fn queue_identified(&self, identity: Identity) -> Option<QueueKey> {
        let queue = self.queues.get(identity.place as usize)?.as_ref()?;
        (queue.serial == identity.serial).then_some(QueueKey(identity.place))
    }

    /// None where the entry's last answer is its queue's.
    pub(in crate::schedule) fn answer_identity(&self, key: EntryKey) -> Option<Identity> {
        self.answers.identity(self.entries[key].answer())
    }

    pub(in crate::schedule) fn queue_answer_identity(&self, key: QueueKey) -> Identity {
        let queue = self.queues[key.0 as usize].as_ref().expect("the queue exists");
        Identity { place: key.0, serial: queue.last_answer_serial }
    }

    /// Counts one use of an answer for an entry of this queue.
    pub(in crate::schedule) fn keep_answer(&mut self, queue: QueueKey, answer: &str) -> AnswerId {
        let id = self.answers.keep(answer);
        if id == AnswerId::OF_QUEUE && self.queue_mut(queue).last_answer.is_none() {
            self.set_queue_answer(queue, Arc::from(answer));
        }
        id
    }

    /// What a peer said last about the entry, and so about its queue.
    pub fn set_answer(&mut self, key: EntryKey, answer: &str) {
        let id = self.answers.keep(answer);
        let text = self.answers.text(id).map_or_else(|| Arc::from(answer), Arc::clone);
        let entry = &mut self.entries[key];
        let (queue, before) = (entry.queue, entry.answer());
        entry.set_answer(id);
        self.answers.release(before);
        self.set_queue_answer(queue, text);
    }

    pub(super) fn set_queue_answer(&mut self, queue: QueueKey, answer: Arc<str>) {
        self.queue_answer_serial += 1;
        let serial = self.queue_answer_serial;
        let queue = self.queue_mut(queue);
        queue.last_answer = Some(answer);
        queue.last_answer_serial = serial;
    }

    pub(super) fn queue_mut(&mut self, key: QueueKey) -> &mut Queue {
        self.queues[key.0 as usize].as_mut().expect("an entry's queue exists")
    }
}

/// Over how many seconds a queue's rate is averaged.
const RATE_SECONDS: f64 = 10.0;
