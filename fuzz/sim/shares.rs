//! After a run with rates, when all is well and nothing waits: tenants of one pair share it as was promised.

use std::sync::Arc;

use postrider::accept::Received;
use postrider::handover::ShardMessage;

use crate::canary::Canary;
use crate::checker::{Marker, Sent};
use crate::clock::{MINUTE, Micros, SECOND};
use crate::dns::IMPLICIT;
use crate::world::{SITES, World};

/// So many of others' recipients go for so many of one's own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    others: usize,
    own: usize,
}

impl Share {
    pub(crate) fn of_others(self, own: usize) -> usize {
        own * self.others / self.own
    }
}

impl World {
    /// One queues much, another a little behind it, in the same class or in a higher one.
    pub(crate) fn compare_shares(&mut self) {
        let (large, small_name, others) = match self.own.below(3) {
            // As much as it has had, for each of the other's.
            0 => ("large", "small", 1),
            // Of a lower class no more than that either.
            1 => ("bulk", "high", 1),
            // A lower class has a part of sixteen, and keeps it.
            _ => ("high", "bulk", 16),
        };
        let campaigns = 1 + self.own.below(4);
        let counts = self.draw_counts(others);
        self.compare_flows((large, "f", campaigns), (small_name, "f"), counts, Share { others, own: 1 });
    }

    /// The same for two campaigns of one tenant.
    pub(crate) fn compare_campaigns(&mut self) {
        let counts = self.draw_counts(1);
        self.compare_flows(("large", "f", 1), ("large", "g"), counts, Share { others: 1, own: 1 });
    }

    /// Few do not wait for the many; and where they are more, nobody gets more than its share.
    fn draw_counts(&mut self, others: usize) -> (usize, usize) {
        let few = 5 + self.own.below(5) as usize;
        if others == 1 && self.own.one_in(2) { (150, 6 * few) } else { (40 * others, few) }
    }

    /// A higher class queues more than a lower one, behind it, which gets no more than its part. Only where no source
    /// is avoided: what moves to another one has waited for nothing there.
    pub(crate) fn compare_classes(&mut self) {
        let (lower, higher, own) = match self.own.below(3) {
            0 => ("bulk", "high", 16),
            1 => ("bulk", "large", 4),
            _ => ("large", "high", 4),
        };
        self.compare_flows((lower, "f", 1), (higher, "f"), (80, 20 * own), Share { others: 1, own });
    }

    fn compare_flows(
        &mut self,
        (large, of_large, campaigns): (&str, &str, u64),
        (small_name, of_small): (&str, &str),
        (many, few): (usize, usize),
        share: Share,
    ) {
        let rate = self.wanted.shaping.max_message_rate.expect("a pair has a rate in such a run");
        let many = many + self.own.below(100) as usize;
        let large = if self.canary == Some(Canary::SharedFlow) { small_name } else { large };
        self.queue(large, of_large, many, campaigns);
        let wait = self.own.below(5 * SECOND);
        self.pass(wait);
        let small = self.queue(small_name, of_small, few, 1);
        let since = self.clock.micros();
        while !self.is_quiet() {
            assert!(self.clock.micros() < since + 600 * MINUTE, "NOTHING-LOST: what was queued last does not go");
            self.step();
        }
        let per_second = rate.count as usize / rate.period.as_secs() as usize;
        // As `fair.rs` derives it: what is left of a round goes before the next; what is in hand, paced for the next
        // 0.1 s; what each home sends unasked; two that are on the way. The rest goes while the owner hears of it.
        let round = share.others.div_ceil(share.own);
        let under_way =
            round + 2 + per_second / 10 + 2 * self.shards.len() + 2 + per_second / 20 + rate.max_burst as usize;
        // What is held back by a limit of its own has no claim.
        let of_small = self.wanted.tenant(small_name).expect("it is there");
        if of_small.max_message_rate.is_some() {
            return;
        }
        let limits = self.wanted.limits.iter().map(|limit| (&limit.name, limit.max_message_rate));
        let tenants = self.wanted.tenants.iter().filter_map(|tenant| Some((&tenant.name, tenant.max_message_rate?)));
        let limits: Vec<String> = limits.chain(tenants).map(|(name, rate)| format!("{name}: {rate}")).collect();
        let what = format!(
            "{small_name} behind {large} at {rate}, {} shards, {campaigns} campaigns, {limits:?}",
            self.shards.len()
        );
        self.rates.check_share(&what, SITES - 1, since, &small, share, under_way);
    }

    /// So many messages of a tenant, at all shards; returns when all are accepted.
    fn queue(&mut self, tenant: &str, name: &str, count: usize, campaigns: u64) -> Vec<Marker> {
        let mut markers = Vec::new();
        for number in 0..count {
            let campaign = number as u64 % campaigns;
            let marker = self.ledger.send(|marker| Sent {
                reverse_path: format!("m{marker}@client.example"),
                recipients: vec![format!("r@{IMPLICIT}")],
                steering: format!("X-Tenant: {tenant}\r\nX-Campaign: {name}{campaign}\r\n"),
                content: format!("Subject: m{marker}\r\n\r\n").into_bytes(),
                sources: vec![0, 1],
                first_attempt_ms: None,
            });
            let sent = self.ledger.sent(marker);
            let content = [sent.steering.as_bytes(), &sent.content].concat();
            let received = Received::embedded(sent.reverse_path.clone(), sent.recipients.clone(), content);
            self.ledger.finish(marker);
            let policy = Arc::clone(&self.policy);
            let admitted = policy.admit(self.clock.now(), received, [marker, marker]).expect("it is as it should be");
            self.injections.insert(marker, marker);
            let shard = self.own.below(self.shards.len() as u64) as usize;
            self.mail(shard, ShardMessage::Inject { injection: marker, admitted: Box::new(admitted) });
            markers.push(marker);
            // With more behind, the event log would be.
            if markers.len() % 10 == 0 {
                self.wait_for_answers();
            }
        }
        self.wait_for_answers();
        markers
    }

    fn wait_for_answers(&mut self) {
        while !self.injections.is_empty() || self.events_waiting() > 0 {
            self.step();
        }
    }

    pub(crate) fn pass(&mut self, time: Micros) {
        let end = self.clock.micros() + time;
        while self.clock.micros() < end {
            self.step();
        }
    }
}
