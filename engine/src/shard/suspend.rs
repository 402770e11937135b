//! Suspensions at a shard: made here or told by the control thread, obeyed by home and owner.
//!
//! As owner the shard stops its pairs at once: tickets go home, idle connections end, what is on the wire comes to its
//! end; or it holds them to stricter limits. As home it takes back what is ready for them, so that it goes by another
//! source of its pool or is held.

use std::sync::Arc;
use std::time::Duration;

use super::{Action, Shard};
use crate::handover::{Attempt, Blocked, ControlMessage, PairKey, ShardMessage};
use crate::limits::{SUSPENDED_PAUSE, SUSPENSION_REASON_OCTETS_MAX};
use crate::mail::time::Now;
use crate::pool::suspension::{Effect, Flow, Scope, Suspension};

impl Shard {
    /// Decided here: it is in force at this shard at once, and soon everywhere.
    pub(super) fn announce_suspension(
        &mut self,
        now: Now,
        scope: Scope,
        effect: Effect,
        reason: &str,
        lasts: Duration,
    ) {
        let until_ms = now.wall_ms + lasts.as_millis() as u64;
        let id = u128::from(self.random.u64(..)) << 64 | u128::from(self.random.u64(..));
        let reason = Arc::from(&reason[..reason.floor_char_boundary(SUSPENSION_REASON_OCTETS_MAX)]);
        let suspension = Suspension { id, scope, effect, reason, until_ms };
        // Answers to what was under way say the same again.
        let grace_ms = lasts.as_millis() as u64 / 10;
        let present = self.suspensions.present(now.wall_ms, &suspension);
        if present.is_some_and(|it| it.effect == effect && it.until_ms + grace_ms >= until_ms) {
            return;
        }
        self.metrics.suspensions_made.inc();
        self.actions.push_back(Action::Control(ControlMessage::Suspend(Box::new(suspension.clone()))));
        self.announced.retain(|announced| announced.until_ms > now.wall_ms);
        self.announced.push(suspension.clone());
        self.suspend(now, vec![suspension]);
    }

    /// The control thread has told of one. Where more came meanwhile, all that is ready is looked at once for them all.
    pub(super) fn suspend_told(&mut self, now: Now, suspension: Suspension) {
        let mut suspensions = vec![suspension];
        let is_one = |message: &mut ShardMessage| matches!(message, ShardMessage::Suspend(_));
        while let Some(ShardMessage::Suspend(next)) = self.inbox.pop_front_if(is_one) {
            suspensions.push(*next);
        }
        suspensions.retain(|told| !self.is_overtaken(now, told));
        if !suspensions.is_empty() {
            self.suspend(now, suspensions);
        }
    }

    /// Whether one was decided here since that stands in for what the control thread tells: it will tell of that, too,
    /// and nothing looser holds until then.
    fn is_overtaken(&mut self, now: Now, told: &Suspension) -> bool {
        let is_it = |own: &Suspension| own.is_like(told) && own.effect == told.effect && own.until_ms == told.until_ms;
        // It tells in the order in which it was told. Those before this one were too many for it.
        if let Some(place) = self.announced.iter().position(is_it) {
            self.announced.drain(..=place);
        }
        self.announced.iter().any(|own| own.is_like(told) && own.until_ms > now.wall_ms)
    }

    /// The suspensions are in force, or go on to another end.
    pub(super) fn suspend(&mut self, now: Now, suspensions: Vec<Suspension>) {
        let (mut scopes, mut has_limits) = (Vec::new(), false);
        for suspension in suspensions {
            let (scope, effect) = (suspension.scope.clone(), suspension.effect);
            let blocked = Blocked { until_ms: suspension.until_ms, reason: suspension.blocked_by() };
            self.suspensions.insert(now.wall_ms, suspension);
            if let Effect::Limit(_) = effect {
                has_limits = true;
            } else if blocked.until_ms > now.wall_ms {
                if scope.is_whole() {
                    self.pools.suspend(now, |pair| scope.covers_pair(pair), &blocked);
                }
                scopes.push(scope);
            }
        }
        if has_limits {
            self.refresh_limits(now);
        }
        self.withdraw_suspended(now, &scopes);
    }

    /// An owner has refused a ticket because it knows of something that suspends it. Mostly this is known here by now.
    /// Where it is not, the mail waits for a moment: shards notice within a second that the wall clock was set back, so
    /// what ended meanwhile may be over here and in force there, and the ticket would go to and fro.
    pub(super) fn take_back_suspended(&mut self, now: Now, attempt: Attempt) {
        let entry = attempt.ticket.entry;
        self.unpin(attempt.message.id());
        self.home.take_back(entry);
        if self.bounce_returned(entry) {
            return;
        }
        if self.is_suspended(now, &attempt) {
            return self.route(now, entry);
        }
        let until_ms = now.wall_ms + SUSPENDED_PAUSE.as_millis() as u64;
        self.home.wait_for_source(entry, Blocked { until_ms, reason: "suspended".into() });
    }

    /// Whether this shard knows of something that keeps it from its source: a suspension, or that the address is gone.
    pub(super) fn is_suspended(&self, now: Now, attempt: &Attempt) -> bool {
        let flow = Flow { tenant: &attempt.flow.tenant, campaign: &attempt.flow.campaign, domain: &attempt.domain };
        let (source, to) = (attempt.pair.source, attempt.pair.destination());
        !self.plumbed[source] || self.suspensions.find(now.wall_ms, source, to, flow).is_some()
    }

    fn withdraw_suspended(&mut self, now: Now, scopes: &[Scope]) {
        let covers = |pair: &PairKey| scopes.iter().any(|scope| scope.covers_pair(pair));
        if scopes.iter().any(|scope| !scope.is_whole()) {
            self.pools.call_back(|pair| scopes.iter().any(|scope| !scope.is_whole() && scope.covers_pair(pair)));
        }
        let suspensions = &self.suspensions;
        let withdrawn = self.home.withdraw_ready(covers, |pair, queue| {
            let flow = Flow { tenant: &queue.tenant, campaign: &queue.campaign, domain: &queue.domain };
            suspensions.find(now.wall_ms, pair.source, pair.destination(), flow).is_some()
        });
        for entry in withdrawn {
            self.route(now, entry);
        }
    }

    /// The suspension has ended before its time.
    pub(super) fn resume(&mut self, now: Now, id: u128) {
        let Some(Suspension { scope, effect, .. }) = self.suspensions.remove(id) else { return };
        if let Effect::Limit(_) = effect {
            return self.refresh_limits(now);
        }
        let suspensions = &self.suspensions;
        let free = |pair: &PairKey| scope.covers_pair(pair) && suspensions.of_pair(now.wall_ms, pair).is_none();
        self.pools.resume(now, &mut |below| self.random.u64(0..below), free);
        self.home.retry_all_sources();
    }

    /// The wall clock was set forward. Pairs wait by the other clock for the end of what suspends them: those for which
    /// it has come by this one go on.
    pub(super) fn resume_ended(&mut self, now: Now) {
        self.suspensions.expire(now.wall_ms);
        let suspensions = &self.suspensions;
        let free = |pair: &PairKey| suspensions.of_pair(now.wall_ms, pair).is_none();
        self.pools.resume(now, &mut |below| self.random.u64(0..below), free);
        self.home.retry_all_sources();
    }

    /// Limits that rules have set begin, climb back and end: pairs have those that hold now.
    pub(super) fn refresh_limits(&mut self, now: Now) {
        let limits = self.suspensions.limits(now.wall_ms);
        self.pools.set_stricter(now, &mut |below| self.random.u64(0..below), limits);
    }
}
