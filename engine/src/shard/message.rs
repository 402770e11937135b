//! What shards, and the control thread, tell a shard: who takes it in.

use super::{Action, Shard};
use crate::handover::ShardMessage;
use crate::mail::time::Now;

impl Shard {
    /// Tells a shard; to itself, without a detour.
    pub(super) fn tell(&mut self, to: usize, message: ShardMessage) {
        if to == self.id {
            self.inbox.push_back(message);
        } else {
            self.actions.push_back(Action::Shard { to, message });
        }
    }

    pub(super) fn receive(&mut self, now: Now, message: ShardMessage) {
        match message {
            ShardMessage::Ready { home, pair, flow, generation, backlog, unused } => {
                let backlog = self.pools.hear(home, generation, backlog);
                self.pools.handle_ready(now, home, &pair, &flow, backlog, unused);
            }
            ShardMessage::Ticket { attempt, left, credit } => self.receive_ticket(now, attempt, left, credit),
            ShardMessage::Credits { pair, flow, credits } => self.home.add_credits(&pair, flow.as_ref(), credits),
            ShardMessage::Blocked { pair, blocked } => self.home.block_pair(&pair, blocked),
            ShardMessage::Paced { pair, blocked, waiting } => self.home.pace_pair(&pair, blocked, waiting),
            ShardMessage::Want(want) => self.keeper.handle_want(now, *want),
            ShardMessage::Permit(answer) => self.pools.handle_permit(now, *answer),
            ShardMessage::Spent { permit, at } => self.keeper.handle_spent(now, &permit, at),
            ShardMessage::AskInjection { home, number, tenant, recipients } => {
                let may = self.keeper.may_inject(now, &tenant, recipients);
                self.tell(home, ShardMessage::MayInject { number, may });
            }
            ShardMessage::MayInject { number, may } => self.may_inject(now, number, may),
            ShardMessage::LimitHolds { limit, blocked } => self.home.hold_limit(limit, blocked),
            ShardMessage::Reserved { limit, units } if self.keeper.handle_reserved(now, &limit, units) => {}
            ShardMessage::Reserved { limit, units } => {
                self.pools.handle_reserved(now, &mut |below| self.random.u64(0..below), &limit, units);
            }
            ShardMessage::Intend(intend) => self.intend(now, *intend),
            ShardMessage::Intended(key) => self.intended(now, key),
            ShardMessage::Settled(settled) => self.settle(now, *settled),
            ShardMessage::Suspended { attempt } => self.take_back_suspended(now, *attempt),
            ShardMessage::Unstarted { attempt, stays } => self.take_back(now, *attempt, stays),
            ShardMessage::Distrust { site, leaves } => self.pools.distrust(now, &site, leaves),
            ShardMessage::Held { attempt, blocked } => self.hold_domain(*attempt, blocked),
            ShardMessage::Routed { key, result } => self.handle_route(now, &key, result),
            ShardMessage::RuleSite { domain, site } => self.shapings.learn_site(&domain, &site),
            ShardMessage::Owner { pair, owner } => self.home.set_owner(&pair, owner),
            ShardMessage::Release { rollup } => self.release(now, rollup),
            ShardMessage::Withdraw { rollup, owner, number } => self.withdraw(rollup, owner, number),
            ShardMessage::Withdrawn { home, number } => self.pools.handle_withdrawn(home, number),
            ShardMessage::Unwant { owner, rollup, number } => self.keeper.handle_unwant(now, owner, rollup, number),
            ShardMessage::Unwanted { rollup, number } => self.pools.handle_unwanted(now, &rollup, number),
            ShardMessage::TakeOver(state) => self.take_over(now, *state),
            ShardMessage::Moved { rollup, owner } => self.home.follow_owner(&rollup, owner),
            ShardMessage::AskCarried => self.tell_carried(),
            ShardMessage::SourcePlumbed { source, plumbed } => self.set_plumbed(now, source, plumbed),
            ShardMessage::SpoolGone { gone } => self.logs.iter_mut().for_each(|home| home.is_gone = gone),
            ShardMessage::Suspend(suspension) => self.suspend_told(now, *suspension),
            ShardMessage::Resume { id } => self.resume(now, id),
            ShardMessage::BounceQueue { flow, domain, reason } => self.bounce_queue(&flow, &domain, &reason),
            ShardMessage::EventCursor { log, sequence } => self.set_event_cursor(log, sequence),
            ShardMessage::Inject { injection, admitted } => self.inject(now, injection, *admitted),
            ShardMessage::Reload(reload) => self.reload(now, &reload),
            ShardMessage::Ask { question, ask } => self.answer(now, question, *ask),
            ShardMessage::Stop => self.stop(now),
        }
    }
}
