//! Reloads: other configurations at random times, mostly the same, at times with other limits, shares or sources.
//! Shards take one up one after the other, so for a while there are two.
//!
//! All that is drawn here comes from a generator of its own: a run without reloads is what it was.

use std::sync::Arc;

use postrider::accept::Policy;
use postrider::config::{Config, Rate, Shaping};
use postrider::handover::{Generation, ShardMessage};
use postrider::shard::Reload;

use crate::canary::Canary;
use crate::clock::{MINUTE, Micros, SECOND};
use crate::mix::Fault;
use crate::peer::PeerLimits;
use crate::random::Random;
use crate::rates;
use crate::tls;
use crate::world::{Event, World};

/// What a run's engine was to read, and when.
#[derive(Debug)]
pub(crate) struct Reloads {
    random: Random,
    /// Without any reload.
    base: Arc<Config>,
    /// What the shards of this life have, or are about to have.
    last: Arc<Reload>,
    epochs: Vec<Epoch>,
    /// Of the last one, the shards that don't have it yet.
    missing: usize,
}

/// A configuration, as the operator has written it, and from when until when some shard may have gone by it.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) config: Arc<Config>,
    pub(crate) from: Micros,
    pub(crate) until: Micros,
    /// The same of connections that are begun, which nothing keeps back.
    connects_until: Micros,
}

impl Reloads {
    /// `given` is what the engine is to read in place of what the operator wants.
    pub(crate) fn new(seed: u64, wanted: &Arc<Config>, given: &Arc<Config>, policy: &Arc<Policy>) -> Self {
        Self {
            random: Random::new(seed.rotate_left(32) ^ 0x7e10_ad00),
            base: Arc::clone(wanted),
            last: Arc::new(Reload::first(Arc::clone(given), Arc::clone(policy))),
            epochs: vec![Epoch::new(Arc::clone(wanted), 0)],
            missing: 0,
        }
    }

    /// When the run reloads; mostly never.
    pub(crate) fn times(&mut self, is_frequent: bool, end: Micros) -> Vec<Micros> {
        if !self.random.one_in(if is_frequent { 2 } else { 6 }) {
            return Vec::new();
        }
        let count = 1 + self.random.below(20);
        (0..count).map(|_| self.random.below(end)).collect()
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.epochs.len() > 1
    }

    /// Whether some shard has not taken up the last one yet.
    pub(crate) fn is_under_way(&self) -> bool {
        self.missing > 0
    }

    /// As the operator wants it now.
    pub(crate) fn wanted_now(&self) -> Arc<Config> {
        Arc::clone(&self.epochs.last().expect("there is one from the beginning").config)
    }

    pub(crate) fn epochs(&self) -> &[Epoch] {
        &self.epochs
    }

    /// The most that a pair may have of connections when another one is begun.
    pub(crate) fn connection_limit(&self, now: Micros) -> usize {
        let in_force = self.epochs.iter().filter(|epoch| epoch.connects_until >= now);
        let limits = in_force.map(|epoch| epoch.config.shaping.connection_limit as usize);
        limits.max().expect("one is in force")
    }

    /// What a connection's peer may get.
    pub(crate) fn peer_limits(&self, now: Micros) -> PeerLimits {
        let in_force = || self.epochs.iter().filter(|epoch| epoch.until >= now).map(|epoch| &epoch.config.shaping);
        let deliveries = in_force().map(|shaping| u64::from(shaping.max_deliveries_per_connection));
        let recipients = in_force().map(|shaping| shaping.max_recipients_per_batch as usize);
        PeerLimits {
            deliveries_max: deliveries.max().expect("one is in force"),
            recipients_max: recipients.max().expect("one is in force"),
        }
    }

    /// What a life begins with is in force at all its shards from the beginning.
    pub(crate) fn begin_life(&mut self, now: Micros) {
        self.last = Arc::new(Reload::first(Arc::clone(&self.last.config), Arc::clone(&self.last.policy)));
        self.end_earlier(now);
    }

    pub(crate) fn taken_up(&mut self, now: Micros) {
        self.missing = self.missing.saturating_sub(1);
        if self.missing == 0 {
            self.end_earlier(now);
        }
    }

    /// What was begun under an earlier configuration may take its time until its MAIL.
    fn end_earlier(&mut self, now: Micros) {
        self.missing = 0;
        let last = self.epochs.len() - 1;
        for epoch in &mut self.epochs[..last] {
            epoch.until = epoch.until.min(now + UNDER_WAY_MAX);
            epoch.connects_until = epoch.connects_until.min(now + SECOND);
        }
    }

    fn draw(&mut self, has_policies: bool) -> Config {
        let mut config = Config::clone(&self.base);
        let random = &mut self.random;
        if random.one_in(2) {
            return config;
        }
        let other = |rate: &mut Rate, random: &mut Random| {
            let (count, half) = (rate.count, rate.count.div_ceil(2));
            let others = [(count, 1), (count * 2, 1), (half, 1), (count, 2)];
            let (count, parts) = others[random.below(others.len() as u64) as usize];
            *rate = Rate { count, period: rate.period / parts, max_burst: rate.max_burst.min(count) };
        };
        if has_policies {
            tls::draw_modes(&mut config, random);
        }
        let limits = config.limits.iter_mut().map(|limit| &mut limit.max_message_rate);
        let tenants = config.tenants.iter_mut().filter_map(|tenant| tenant.max_message_rate.as_mut());
        for rate in config.shaping.max_message_rate.iter_mut().chain(tenants).chain(limits) {
            other(rate, random);
        }
        config.limits.retain(|_| !random.one_in(4));
        config.shaping.connection_limit = 1 + random.below(4) as u32;
        config.shaping.max_deliveries_per_connection = 1 + random.below(20) as u32;
        config.shaping.max_recipients_per_batch = 1 + random.below(20) as u32;
        config.egress_pools[0].sources = vec![(0, 1 + random.below(3) as u32), (1, 1 + random.below(3) as u32)];
        // A warm-up that is gone would come back with a new day.
        if config.warmups.is_empty() && random.one_in(3) {
            // "two" is gone, and so "three" stands in its place.
            config.egress_sources.remove(1);
            config.egress_pools[0].sources = vec![(0, 1)];
            config.egress_pools[1].sources = vec![(1, 1)];
            config.limits.retain(|limit| limit.source != Some(1));
        }
        config
    }
}

impl Epoch {
    fn new(config: Arc<Config>, from: Micros) -> Self {
        Self { config, from, until: Micros::MAX, connects_until: Micros::MAX }
    }
}

impl World {
    /// Now and then there is another configuration; once all is well, what the operator wanted at first. The control
    /// thread waits for what moves from one shard to another, as that has its configuration with it.
    pub(crate) fn reload(&mut self) {
        if self.is_stopping() {
            return;
        }
        if self.moves.is_under_way() {
            return self.clock.after(SECOND, Event::Reload);
        }
        let config = if self.mix.is_healed() {
            Config::clone(&self.reloads.base)
        } else {
            self.reloads.draw(self.tls.are_drawn)
        };
        self.reload_to(config);
    }

    pub(crate) fn reload_to(&mut self, config: Config) {
        self.mix.count(Fault::Reloaded);
        let now = self.clock.micros();
        let before = Arc::clone(&self.reloads.last);
        let wanted = config.aligned_with(&before.config).expect("there are few sources");
        let mut given = wanted.clone();
        match self.canary {
            Some(Canary::HigherLimit) => given.shaping.connection_limit += 1,
            Some(Canary::OldShaping) => {
                let Shaping { connection_limit, max_deliveries_per_connection, max_recipients_per_batch, .. } =
                    before.config.shaping;
                let shaping = &mut given.shaping;
                shaping.connection_limit = connection_limit;
                shaping.max_deliveries_per_connection = max_deliveries_per_connection;
                shaping.max_recipients_per_batch = max_recipients_per_batch;
            }
            Some(Canary::HigherRate) => rates::double(&mut given),
            Some(Canary::OldPolicies) => {
                given.shaping.tls = before.config.shaping.tls;
                given.routes.clone_from(&before.config.routes);
            }
            Some(Canary::RenamedLimits) => {
                let generation = before.generation.0 + 1;
                given.limits.iter_mut().for_each(|limit| limit.name += &format!(" {generation}"));
            }
            _ => {}
        }
        self.canary.iter().for_each(|canary| canary.misread(&mut given));
        let given = Arc::new(given);
        let policy = Arc::new(Policy::new(&given).expect("it has no keys"));
        let mut reload = before.followed_by(Arc::clone(&given), Arc::clone(&policy));
        // Also what is the same is taken up as if it were another.
        reload.generation = Generation(before.generation.0 + 1);
        self.reloads.last = Arc::new(reload);
        self.reloads.epochs.push(Epoch::new(Arc::new(wanted), now));
        self.reloads.missing = self.shards.len();
        (self.config, self.policy) = (given, policy);
        for shard in 0..self.shards.len() {
            let message = ShardMessage::Reload(Arc::clone(&self.reloads.last));
            self.mail(shard, message);
        }
    }
}

/// Until the MAIL of what was begun is written: a peer may take its time with what stands before it.
const UNDER_WAY_MAX: Micros = 15 * MINUTE;
