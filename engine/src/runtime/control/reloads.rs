//! Another configuration, on its way to all shards.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use super::{Control, send};
use crate::handover::ShardMessage;
use crate::limits::LIMIT_KEEPER;
use crate::runtime::renewal::Renewal;
use crate::runtime::shard_loop::Mail;

/// What is done once all shards have a configuration, whoever still waits for it.
pub(crate) struct TakenUp(pub(crate) Box<dyn FnOnce() + Send>);

impl fmt::Debug for TakenUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TakenUp")
    }
}

/// Configurations that shards are about to take up.
#[derive(Debug)]
pub(super) struct Reloads {
    /// They are not sent yet.
    pub(super) waiting: VecDeque<(Arc<Renewal>, TakenUp)>,
    sent: u64,
    /// By shard.
    taken_up: Vec<u64>,
    /// What is done when all have so many.
    then: VecDeque<(u64, TakenUp)>,
}

impl Reloads {
    pub(super) fn new(shards: usize) -> Self {
        Self { waiting: VecDeque::new(), sent: 0, taken_up: vec![0; shards], then: VecDeque::new() }
    }

    pub(super) fn add(&mut self, taken_up: TakenUp) {
        self.sent += 1;
        self.then.push_back((self.sent, taken_up));
    }

    /// Whether some shard may not have the last one yet.
    pub(super) fn are_under_way(&self) -> bool {
        !self.waiting.is_empty() || !self.then.is_empty()
    }

    pub(super) fn taken_up(&mut self, shard: usize) {
        self.taken_up[shard] += 1;
        let by_all = self.taken_up.iter().copied().min().unwrap_or_default();
        while let Some((_, TakenUp(then))) = self.then.pop_front_if(|(number, _)| *number <= by_all) {
            then();
        }
    }
}

impl Control {
    /// What waits to be reloaded is, unless something is just moving from one shard to another: that takes seconds.
    pub(super) async fn reload_waiting(&mut self) {
        while !self.directory.is_moving()
            && let Some((renewal, taken_up)) = self.reloads.waiting.pop_front()
        {
            self.reload(renewal, taken_up).await;
        }
    }

    /// Gives another configuration to whoever needs it. Nothing here can fail.
    pub(super) async fn reload(&mut self, renewal: Arc<Renewal>, taken_up: TakenUp) {
        let generation = renewal.reload.generation;
        let before = std::mem::replace(&mut self.config, Arc::clone(&renewal.reload.config));
        self.unplumbed.resize(self.config.egress_sources.len(), false);
        self.suspensions.set_sources(&self.config.egress_sources);
        for (options, new) in self.http_options.iter().zip(&renewal.http) {
            options.send_replace(new.clone());
        }
        if let Some((resolver, policies)) = renewal.names.clone() {
            (self.resolver, self.policies) = (resolver, policies);
        }
        self.lookups_of.send_replace(generation);
        // The keeper of limits has to be the first: others ask it by what they have.
        const { assert!(LIMIT_KEEPER == 0) };
        for shard in &self.shards {
            send(shard, Mail::Reload(Arc::clone(&renewal))).await;
        }
        for id in self.suspensions.end_other_quotas(self.clock.now().wall_ms, &self.config) {
            self.tell_all(|| ShardMessage::Resume { id }).await;
        }
        self.save_suspensions();
        self.reloads.add(taken_up);
        if self.config.delivers_as(&before) {
            return;
        }
        let (rule_sites, unknown_rule_sites) = watch::channel(0);
        self.unknown_rule_sites = unknown_rule_sites;
        self.follow_rule_sites(rule_sites);
        self.look_at_sources().await;
    }
}
