//! Automation rules at a shard: as owner it shows peers' answers to them and carries out what fires; as home it ends
//! the mail of a queue that is to bounce.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use postrider_spool::record::{Answer, Fate, MessageId};

use super::Shard;
use super::schedule::Ending;
use crate::admin::answer_text;
use crate::config::{AutomationAction, AutomationRule};
use crate::deliver::attempt::{Stage, TransactionResult};
use crate::deliver::verdict::{self, SessionFailure};
use crate::fair::Flow;
use crate::handover::{Attempt, CountsAs, PairKey, ShardMessage};
use crate::limits::{DUE_ENTRIES_PER_TURN, SUSPENSION_REASON_OCTETS_MAX};
use crate::mail::queue_name::QueueName;
use crate::mail::time::Now;
use crate::pool::automation::{self, Limited};
use crate::pool::connection::ConnectionKey;
use crate::pool::suspension::{self, Effect, Scope};
use crate::schedule::queue::{Entry, EntryKey, QueueKey};

/// Entries that are decided about: those taken from wherever they waited, and those that bounce once they come back.
#[derive(Debug, Default)]
pub(super) struct Bouncing {
    taken: VecDeque<Taken>,
    out: BTreeMap<EntryKey, BouncingOut>,
}

/// Entries that wait nowhere, and what is to become of them.
#[derive(Debug)]
struct Taken {
    entries: Vec<EntryKey>,
    fate: Fate,
    answer: Arc<Answer>,
}

#[derive(Debug)]
struct BouncingOut {
    entry: (MessageId, QueueKey),
    answer: Arc<Answer>,
}

impl Bouncing {
    pub(super) fn is_empty(&self) -> bool {
        self.taken.is_empty()
    }
}

impl Shard {
    /// A transaction has ended: what the peer said is looked at, and may come to count as something else.
    pub(super) fn react_to_result(&mut self, now: Now, attempt: &Attempt, result: &mut TransactionResult) {
        let rules = &attempt.shaping.automation;
        if rules.is_empty() {
            return;
        }
        // One reply may be about many recipients.
        let mut seen: Vec<(String, Option<CountsAs>)> = Vec::new();
        for (_, verdict) in &mut result.results {
            if !verdict.is_peers || matches!(verdict.fate, verdict::Fate::Delivered | verdict::Fate::Hold) {
                continue;
            }
            let answer = answer_text(verdict.answer.code, verdict.answer.enhanced, &verdict.answer.text);
            let counts_as = match seen.iter().find(|(known, _)| *known == answer) {
                Some((_, counts_as)) => *counts_as,
                None => {
                    let bounces =
                        self.react(now, rules, &attempt.pair, Some((&attempt.flow, &attempt.domain)), &answer);
                    let by_rule = automation::counts_as(rules, &answer);
                    if by_rule.is_some() {
                        self.metrics.automation_fired.inc();
                    }
                    let counts_as = by_rule.or(bounces.then_some(CountsAs::Permanent));
                    seen.push((answer, counts_as));
                    counts_as
                }
            };
            if let Some(counts_as) = counts_as {
                verdict.recount(counts_as);
            }
        }
    }

    /// A session has ended outside of any transaction, or never came up.
    pub(super) fn react_to_failure(&mut self, now: Now, connection: ConnectionKey, failure: &SessionFailure) {
        // Of the others the transaction has told already.
        let stage = failure.stage;
        let is_told = matches!(stage, Stage::Mail | Stage::Recipient | Stage::Data | Stage::Content | Stage::Final);
        if is_told || !failure.is_peers {
            return;
        }
        let Some(rules) = self.deliveries.get(&connection).map(|it| Arc::clone(it.automation())) else { return };
        let pair = self.pools.pair_of(connection).clone();
        let answer = answer_text(failure.answer.code, failure.answer.enhanced, &failure.answer.text);
        self.react(now, &rules, &pair, None, &answer);
    }

    /// Whether the queue of the message that was answered bounces.
    fn react(
        &mut self,
        now: Now,
        rules: &[Arc<AutomationRule>],
        pair: &PairKey,
        about: Option<(&Arc<Flow>, &Arc<str>)>,
        answer: &str,
    ) -> bool {
        let mut bounces = false;
        let flow =
            about.map(|(flow, domain)| suspension::Flow { tenant: &flow.tenant, campaign: &flow.campaign, domain });
        for rule in self.automation.handle_answer(now.monotonic, rules, pair, flow, answer) {
            self.metrics.automation_fired.inc();
            let reason = format!("{}: {answer}", rule.name);
            if let (AutomationAction::BounceQueue, Some((flow, domain))) = (rule.action, about) {
                bounces = true;
                self.bounce_everywhere(flow, domain, &reason);
                continue;
            }
            let (scope, lasts) = (Scope::pair(pair), rule.duration);
            let (tenant, campaign) =
                (about.map(|it| Arc::clone(&it.0.tenant)), about.map(|it| Arc::clone(&it.0.campaign)));
            let (scope, effect, lasts) = match rule.action {
                AutomationAction::Suspend => (scope, Effect::Stop, lasts),
                AutomationAction::SuspendTenant => (Scope { tenant, ..scope }, Effect::Stop, lasts),
                AutomationAction::SuspendCampaign => (Scope { tenant, campaign, ..scope }, Effect::Stop, lasts),
                AutomationAction::SuspendSource => {
                    (Scope { source: Some(pair.source), ..Scope::default() }, Effect::Stop, lasts)
                }
                AutomationAction::Set(settings) => (scope, Effect::Limit(Limited { settings, recovery: None }), lasts),
                AutomationAction::Halve(halved) => {
                    let present = self.suspensions.recovering(now.wall_ms, pair, halved);
                    let configured = self.pools.configured_limits(pair);
                    match Limited::halved(now.wall_ms, halved, lasts, configured, present) {
                        Some((limited, lasts)) => (scope, Effect::Limit(limited), lasts),
                        None => continue,
                    }
                }
                AutomationAction::Defer | AutomationAction::Fail | AutomationAction::BounceQueue => continue,
            };
            self.announce_suspension(now, scope, effect, &reason, lasts);
        }
        bounces
    }

    /// The mail of a queue may be at any home, and its tickets at any owner.
    fn bounce_everywhere(&mut self, flow: &Arc<Flow>, domain: &Arc<str>, reason: &str) {
        let reason: Arc<str> = reason[..reason.floor_char_boundary(SUSPENSION_REASON_OCTETS_MAX)].into();
        let queue = QueueName { campaign: &flow.campaign, tenant: &flow.tenant, domain };
        tracing::warn!(%queue, %reason, "the queue bounces");
        for shard in 0..self.pools.homes() {
            let (flow, domain, reason) = (Arc::clone(flow), Arc::clone(domain), Arc::clone(&reason));
            self.tell(shard, ShardMessage::BounceQueue { flow, domain, reason });
        }
    }

    /// All that is in the queue is to end: what waits at this home now, what is out when it comes back unsettled.
    pub(super) fn bounce_queue(&mut self, flow: &Flow, domain: &str, reason: &str) {
        let is_of = |other: &Flow| other.tenant == flow.tenant && other.campaign == flow.campaign;
        self.pools.call_back_tickets(|attempt| is_of(&attempt.flow) && *attempt.domain == *domain);
        let (waiting, out) = self.home.withdraw_queues(|queue| is_of(&queue.flow) && *queue.domain == *domain);
        self.bounce(waiting, out, &format!("the queue is bounced by {reason}"));
    }

    /// What was taken from where it waited ends now, what is out when it comes back unsettled.
    pub(super) fn bounce(&mut self, waiting: Vec<EntryKey>, out: Vec<EntryKey>, reason: &str) {
        // RFC 3463 §3.8: X.7.1, a policy of ours.
        let text = reason.to_owned();
        let answer = Arc::new(Answer { code: 551, enhanced: Some((5, 7, 1)), text, command: String::new() });
        for key in out {
            let entry = self.home.entry(key);
            let out = BouncingOut { entry: (entry.message, entry.queue), answer: Arc::clone(&answer) };
            self.bouncing.out.insert(key, out);
        }
        self.decide(waiting, Fate::AdminBounced, answer);
    }

    /// Entries that were taken from where they waited go on so, with the turns that follow.
    pub(super) fn decide(&mut self, entries: Vec<EntryKey>, fate: Fate, answer: Arc<Answer>) {
        if !entries.is_empty() {
            self.bouncing.taken.push_back(Taken { entries, fate, answer });
        }
    }

    /// An entry has come home. Whether it ends here, because its queue was bounced while it was out.
    pub(super) fn bounce_returned(&mut self, entry: EntryKey) -> bool {
        let Some(out) = self.bouncing.out.remove(&entry) else { return false };
        // Its place may be another's by now.
        if !self.home.has_entry(entry) || (self.home.entry(entry).message, self.home.entry(entry).queue) != out.entry {
            return false;
        }
        if self.home.is_out(entry) {
            self.bouncing.out.insert(entry, out);
            return false;
        }
        if self.home.withdraw_one(entry) {
            self.decide(vec![entry], Fate::AdminBounced, out.answer);
        }
        true
    }

    /// Parts an entry. If its queue was bounced while it was out, the part that waits from now on ends.
    pub(super) fn split(&mut self, entry: EntryKey, recipients: &[u32], attempts: u32, due_ms: u64) -> EntryKey {
        let part = self.home.split(entry, recipients, attempts, due_ms);
        let Entry { message, queue, .. } = self.home.entry(entry);
        let out = self.bouncing.out.get(&entry).filter(|out| out.entry == (message, queue));
        if let Some(answer) = out.map(|out| Arc::clone(&out.answer))
            && self.home.withdraw_one(part)
        {
            self.decide(vec![part], Fate::AdminBounced, answer);
        }
        part
    }

    /// Not everything that comes home tells so.
    pub(super) fn sweep_bouncing(&mut self) {
        let out: Vec<EntryKey> = self.bouncing.out.keys().copied().collect();
        for entry in out {
            self.bounce_returned(entry);
        }
    }

    /// Up to a turn's bound.
    pub(super) fn end_bouncing(&mut self, now: Now) {
        for _ in 0..DUE_ENTRIES_PER_TURN {
            let Some(Taken { entries, fate, answer }) = self.bouncing.taken.front_mut() else { return };
            match entries.pop() {
                Some(entry) => {
                    let (fate, answer) = (*fate, Answer::clone(answer));
                    self.end_entry(now, Ending { entry, fate, answer });
                }
                None => _ = self.bouncing.taken.pop_front(),
            }
        }
    }
}
