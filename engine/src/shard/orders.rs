//! Stage 4 at a shard that owns pairs: what their pools order, and what homes and the keeper of limits send them.

use std::sync::Arc;
use std::time::Duration;

use super::{Action, Reservation, Shard};
use crate::config::{Config, RetrySchedule, SharedLimits};
use crate::handover::{Attempt, Backlog, Credit, ShardMessage, Want};
use crate::limits::{HOST_BACK_OFF_FIRST_MAX, HOST_BACK_OFF_MAX, LIMIT_KEEPER};
use crate::mail::time::Now;
use crate::pool::keeper::Said;
use crate::pool::pair::{Order, PoolOptions};
use crate::pool::site::BackOff;
use crate::pool::suspension::{self, Effect};
use crate::pool::warmup::spent_reason;

impl Shard {
    /// Lets pairs open connections that had to wait for this turn, or for sockets. A quarter of these is for sessions.
    pub(super) fn open_waiting(&mut self, now: Now) {
        let for_sessions = self.sessions.len().max(self.sockets_max / 4);
        let connections_max = self.sockets_left.saturating_sub(for_sessions);
        let inputs = std::mem::take(&mut self.inputs);
        self.pools.open_waiting(now, &mut |below| self.random.u64(0..below), inputs, connections_max);
    }

    /// Carries out what the pools ordered.
    pub(super) fn carry_out_orders(&mut self, now: Now) {
        while let Some(order) = self.pools.poll_order() {
            match order {
                Order::Connect(connect) => self.open_delivery(now, *connect),
                Order::Start { connection, attempt } if self.is_up(connection) => {
                    self.start(now, connection, attempt);
                }
                // It was idle when the order was given, and has ended before this turn.
                Order::Start { mut attempt, .. } => {
                    self.pools.mail_not_written(now, &mut attempt);
                    self.tell(attempt.ticket.home, ShardMessage::Unstarted { attempt, stays: false });
                }
                Order::Quit { connection } => self.quit(now, connection),
                Order::Credits { home, pair, flow, credits } => {
                    self.tell(home, ShardMessage::Credits { pair, flow, credits });
                }
                Order::Block { home, pair, blocked } => self.tell(home, ShardMessage::Blocked { pair, blocked }),
                Order::Paced { home, pair, blocked, waiting } => {
                    self.tell(home, ShardMessage::Paced { pair, blocked, waiting });
                }
                Order::Reserve { limit, units, period } => {
                    let reservation = Reservation { limit, at_ms: now.wall_ms, units, period };
                    self.actions.push_back(Action::Reserve(reservation));
                }
                Order::WarmedUp { pair, quota, until_ms } => {
                    let scope = suspension::Scope::pair(&pair);
                    let reason = spent_reason(quota);
                    let lasts = Duration::from_millis(until_ms.saturating_sub(now.wall_ms));
                    self.announce_suspension(now, scope, Effect::Stop, &reason, lasts);
                }
                Order::Want { home, pair, flow, limits, units } => {
                    let generation = self.generation;
                    let want = Want { owner: self.id, home, pair, flow, limits, units, generation };
                    self.tell(LIMIT_KEEPER, ShardMessage::Want(Box::new(want)));
                }
                Order::Spent { permit, at } => {
                    self.tell(LIMIT_KEEPER, ShardMessage::Spent { permit, at });
                }
                Order::Return { mut attempt, stays } => {
                    self.take_permit(&mut attempt);
                    self.tell(attempt.ticket.home, ShardMessage::Unstarted { attempt, stays });
                }
                Order::Suspended { mut attempt } => {
                    self.take_permit(&mut attempt);
                    self.tell(attempt.ticket.home, ShardMessage::Suspended { attempt });
                }
                Order::Withdraw { home, rollup, number } => {
                    self.tell(home, ShardMessage::Withdraw { rollup, owner: self.id, number });
                }
                Order::Keep { home, rollup } => self.tell(home, ShardMessage::Moved { rollup, owner: self.id }),
                Order::Unwant { rollup, number } => {
                    self.tell(LIMIT_KEEPER, ShardMessage::Unwant { owner: self.id, rollup, number });
                }
                Order::Hold { mut attempt, blocked } => {
                    self.take_permit(&mut attempt);
                    self.count_unknown_tlsa(&attempt);
                    self.tell(attempt.ticket.home, ShardMessage::Held { attempt, blocked });
                }
            }
        }
    }

    /// A ticket goes home without an attempt, and its permit back.
    fn take_permit(&mut self, attempt: &mut Attempt) {
        if let Some(permit) = attempt.permit.take() {
            self.tell(LIMIT_KEEPER, ShardMessage::Spent { permit, at: None });
        }
    }

    /// Tells what the keeper of the limits over many pairs has to say. On all shards but one it has nothing.
    pub(super) fn pass_on_permits(&mut self, now: Now) {
        while let Some(said) = self.keeper.poll() {
            match said {
                Said::Answer { owner, answer } => self.tell(owner, ShardMessage::Permit(Box::new(answer))),
                Said::Unwanted { owner, rollup, number } => {
                    self.tell(owner, ShardMessage::Unwanted { rollup, number });
                }
                Said::Reserve { limit, units, period } => {
                    let reservation = Reservation { limit, at_ms: now.wall_ms, units, period };
                    self.actions.push_back(Action::Reserve(reservation));
                }
                Said::Holds { limit, blocked } => {
                    for shard in 0..self.pools.homes() {
                        self.tell(shard, ShardMessage::LimitHolds { limit, blocked: blocked.clone() });
                    }
                }
            }
        }
    }

    pub(super) fn receive_ticket(&mut self, now: Now, attempt: Box<Attempt>, left: Backlog, credit: Credit) {
        let left = self.pools.hear(attempt.ticket.home, attempt.generation, left);
        if attempt.generation < self.generation {
            return self.pools.refuse_ticket(attempt, left, credit);
        }
        // Its home may not know yet that the source's address is gone, or the pair suspended.
        if self.is_suspended(now, &attempt) {
            return self.pools.refuse_suspended(attempt, left, credit);
        }
        self.pools.handle_ticket(now, &mut |below| self.random.u64(0..below), attempt, left, credit);
    }
}

/// The limits of every pair.
pub(super) fn pool_options(config: &Config, homes: usize, shared_limits: Arc<SharedLimits>) -> PoolOptions {
    let (first, max) = match &config.retry.schedule {
        RetrySchedule::Doubling { first, max } => (*first, *max),
        RetrySchedule::Listed(intervals) => (intervals[0], *intervals.last().unwrap_or(&intervals[0])),
    };
    let first = first.min(HOST_BACK_OFF_FIRST_MAX);
    PoolOptions {
        default: Arc::new(config.shaping.clone()),
        sources: config.egress_sources.clone(),
        warmups: config.warmups.clone(),
        shared_limits,
        back_off: BackOff { first, max: max.min(HOST_BACK_OFF_MAX).max(first) },
        homes,
    }
}
