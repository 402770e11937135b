//! Stage 3 at a shard: which entries go now, by which source, and the tickets that carry them to the pair's owner.

use std::sync::Arc;
use std::time::Duration;

use postrider_spool::record::{Answer, Fate, MessageId};
use postrider_spool::{Message, ReadError};

use super::ask::EntryRows;
use super::outcome::outcome_of;
use super::shaping::Place;
use super::{Action, Shard};
use crate::config::{self, EgressPool, Shaping};
use crate::deliver::route::{RouteFailure, RouteFailureKind, Site};
use crate::fair::Flow;
use crate::handover::{
    Attempt, Blocked, ControlMessage, Credit, Generation, PairKey, Route, RouteKey, ShardMessage, Ticket,
};
use crate::limits::{DUE_ENTRIES_PER_TURN, SOURCE_RETRY, UNREADABLE_RETRY, UNRECORDED_RETRY};
use crate::mail::address::queue_domain;
use crate::mail::endpoint::Endpoint;
use crate::mail::time::{Now, StepWatch};
use crate::pool::egress::EgressTurns;
use crate::pool::suspension::{self, Destination};
use crate::pool::warmup::{DAY_MS, DayQuota};
use crate::schedule::queue::{Entry, EntryKey, Need};

/// A ticket whose message is being read from the disk.
#[derive(Debug)]
pub(super) struct PendingTicket {
    owner: usize,
    pair: PairKey,
    pub(super) entry: EntryKey,
    credit: Credit,
    generation: Generation,
}

/// What waits for a message to be read from the disk.
#[derive(Debug)]
pub(super) enum PendingRead {
    Ticket(PendingTicket),
    End(Ending),
    Ask { question: u64, rows: Box<EntryRows> },
    Inspect { question: u64, want_body: bool },
}

/// An entry that ends by our own decision.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) entry: EntryKey,
    pub(super) fate: Fate,
    pub(super) answer: Answer,
}

impl Shard {
    /// Routes the entries whose time has come, up to a turn's bound.
    pub(super) fn release_due(&mut self, now: Now) {
        for _ in 0..DUE_ENTRIES_PER_TURN {
            let Some(entry) = self.home.pop_due(now.wall_ms) else { return };
            self.route(now, entry);
        }
    }

    /// Puts an entry into the queue of the pair that it goes by; ends it where its time is over.
    pub(super) fn route(&mut self, now: Now, entry: EntryKey) {
        self.route_behind(now, entry, None);
    }

    /// The same, where a block of its domain is just over.
    fn route_behind(&mut self, now: Now, entry: EntryKey, block: Option<&Arc<str>>) {
        if self.stopped {
            return; // What would end here might not become durable: the next start routes it.
        }
        if self.home.entry(entry).expires_ms <= now.wall_ms {
            // The sweep would find it, but later.
            let block = block.filter(|_| self.home.entry(entry).last_answer.is_none());
            let held_by = block.cloned().or_else(|| self.last_block(now, entry));
            let answer = self.expiry_answer(entry, held_by.as_deref());
            return self.end_entry(now, Ending { entry, fate: Fate::Expired, answer });
        }
        let key = self.home.queue_of(entry).route.clone();
        if self.routes.discards(&self.config.routes, &key) {
            return self.end_entry(now, Ending { entry, fate: Fate::Delivered, answer: discarded() });
        }
        if self.home.is_held(&key) {
            return self.home.wait_for_route(entry);
        }
        let Some(route) = self.routes.get(now, &key) else {
            return self.home.wait_for_route(entry);
        };
        let place = self.shapings.place(&key, &route);
        match self.choose_source(now, entry, place.destination(), &route.site) {
            Ok(source) => self.home.make_ready(entry, &place.pair(source)),
            Err(blocked) => self.home.wait_for_source(entry, blocked),
        }
    }

    /// A route's lookup has ended.
    pub(super) fn handle_route(&mut self, now: Now, key: &RouteKey, result: Result<Route, RouteFailure>) {
        if self.stopping {
            return; // The next start asks again.
        }
        match result {
            Ok(mut route) => {
                // A TTL of zero still serves the entries that asked.
                if route.site.expires <= now.monotonic {
                    let expires = now.monotonic + Duration::from_secs(1);
                    route.site = Arc::new(Site { expires, ..Site::clone(&route.site) });
                }
                self.routes.insert(now, key, route);
                let (entries, last_block) = self.home.take_unrouted(key);
                for entry in entries {
                    self.route_behind(now, entry, last_block.as_ref());
                }
            }
            Err(failure) if failure.kind == RouteFailureKind::Bounce => {
                for entry in self.home.take_unrouted(key).0 {
                    let (class, subject, detail) = failure.enhanced;
                    let answer = Answer {
                        code: failure.code,
                        enhanced: Some((class, subject, detail)),
                        text: failure.text.clone(),
                        command: String::new(),
                    };
                    self.end_entry(now, Ending { entry, fate: Fate::Bounced, answer });
                }
            }
            Err(failure) => {
                let wait = failure.expires.saturating_sub(now.monotonic).max(Duration::from_secs(1));
                let until_ms = now.wall_ms + wait.min(self.pause_max()).as_millis() as u64;
                let (class, subject, detail) = failure.enhanced;
                let reason = format!("{} {class}.{subject}.{detail} {}", failure.code, failure.text).into();
                self.home.block_domain(key, Blocked { until_ms, reason });
            }
        }
    }

    /// Answers what the home needs: tickets first of all.
    pub(super) fn serve_needs(&mut self, now: Now) {
        while let Some(need) = self.home.poll_need() {
            match need {
                Need::Route { key } => {
                    let message = ControlMessage::FindRoute { shard: self.id, key };
                    self.actions.push_back(Action::Control(message));
                }
                Need::Owner { pair } if self.stopping => drop(pair),
                Need::Owner { pair } => {
                    let message = ControlMessage::FindOwner { shard: self.id, pair };
                    self.actions.push_back(Action::Control(message));
                }
                Need::Tell { owner, pair, flow, backlog, unused } => {
                    let (home, generation) = (self.id, self.generation);
                    self.tell(owner, ShardMessage::Ready { home, pair, flow, generation, backlog, unused });
                }
                Need::Ticket { owner, pair, entry, credit } => {
                    let generation = self.generation;
                    self.make_ticket(now, PendingTicket { owner, pair, entry, credit, generation });
                }
            }
        }
    }

    /// The ticket counts as a pin on its segment from here until it comes home.
    fn make_ticket(&mut self, now: Now, pending: PendingTicket) {
        let Entry { message: id, expires_ms, .. } = self.home.entry(pending.entry);
        if expires_ms <= now.wall_ms {
            let PendingTicket { owner, pair, entry, credit, .. } = pending;
            let flow = Arc::clone(&self.home.queue_of(entry).flow);
            self.home.take_back(entry);
            self.route(now, entry);
            return self.home.return_credit(owner, &pair, &flow, credit);
        }
        let place = self.log_index(id.log());
        if let Err(closed) = self.logs[place].takes_outcomes(now) {
            return self.hold_unrecorded(now, pending, format!("the spool takes no outcomes: {closed}"));
        }
        if self.events_full {
            return self.hold_unrecorded(now, pending, "the event log can not be written".to_owned());
        }
        self.logs[place].log.pin(id);
        self.fetch(now, id, PendingRead::Ticket(pending));
    }

    /// What becomes of the message could not be written down: without a record, a restart would send it again; without
    /// an event, it piles up in memory. So no attempt is begun, and the entry waits as if it had no source.
    fn hold_unrecorded(&mut self, now: Now, pending: PendingTicket, reason: String) {
        let PendingTicket { owner, pair, entry, credit, .. } = pending;
        let flow = Arc::clone(&self.home.queue_of(entry).flow);
        self.home.take_back(entry);
        if !self.bounce_returned(entry) {
            let until_ms = now.wall_ms + UNRECORDED_RETRY.as_millis() as u64;
            self.home.wait_for_source(entry, Blocked { until_ms, reason: reason.into() });
        }
        self.home.return_credit(owner, &pair, &flow, credit);
    }

    /// The message is at hand: its ticket goes to the pair's owner.
    pub(super) fn send_ticket(&mut self, now: Now, pending: PendingTicket, message: Message) {
        let PendingTicket { owner, pair, entry, credit, generation } = pending;
        if !self.home.is_owned_by(&pair, owner) {
            // The pair has moved while the message was read, and with it all credits are void.
            self.unpin(message.id());
            self.home.take_back_to(entry, pair.source);
            return self.route(now, entry);
        }
        let queue = self.home.queue_of(entry);
        let (key, flow) = (queue.route.clone(), Arc::clone(&queue.flow));
        let route = self.routes.get(now, &key);
        let placed = route.map(|route| (self.shapings.place(&key, &route), route));
        let stands = |place: &Place| generation == self.generation && place.is_of(&pair);
        let Some((place, mut route)) = placed.filter(|(place, _)| stands(place)) else {
            // The route expired or changed while the entry was ready, or the configuration did.
            self.unpin(message.id());
            self.home.take_back_to(entry, pair.source);
            self.route(now, entry);
            return self.home.return_credit(owner, &pair, &flow, credit);
        };
        let shaping = self.shapings.shaping(pair.source, &place);
        route.tls = self.shapings.tls(&place, &shaping);
        route.sts = route.sts.filter(|_| shaping.mta_sts);
        route.dane = shaping.dane;
        let batch_max = self.batch_max(now, &pair, &shaping).min(self.home.limited_batch_max(&pair, &flow));
        self.bound_recipients(entry, batch_max);
        let ticket = Ticket { home: self.id, entry };
        let domain = (flow, key.domain, generation);
        match attempt(&message, ticket, pair.clone(), domain, route, shaping, self.home.entry(entry)) {
            Ok(attempt) => {
                // As it is now: the message may have been read meanwhile, and the owner been told of more.
                let left = self.home.left_behind(&attempt.pair, &attempt.flow);
                self.tell(owner, ShardMessage::Ticket { attempt: Box::new(attempt), left, credit });
            }
            Err(error) => self.hold_unreadable(now, &PendingTicket { owner, pair, entry, credit, generation }, &error),
        }
    }

    /// The most recipients of one transaction of a pair.
    fn batch_max(&self, now: Now, pair: &PairKey, shaping: &Shaping) -> usize {
        let warmup = self.config.warmup_of(pair.source);
        let quota = warmup.and_then(|warmup| warmup.quota(&pair.rollup, now.wall_ms / DAY_MS));
        let quota = quota.map_or(usize::MAX, DayQuota::batch_max);
        shaping.batch_max().min(self.pools.stricter_at(pair).batch_max()).min(quota)
    }

    /// A transaction's recipients are bounded by its site's shaping; those above are an entry of their own.
    fn bound_recipients(&mut self, key: EntryKey, batch_max: usize) {
        let entry = self.home.entry(key);
        let (attempts, due_ms) = (entry.attempts, entry.due_ms);
        if entry.recipients.len() > batch_max {
            let recipients: Vec<u32> = entry.recipients.collect();
            let (now, later) = recipients.split_at(batch_max);
            self.home.keep_only(key, now);
            self.split(key, later, attempts, due_ms);
        }
    }

    /// The message can't be read from the spool: it is kept, and tried again later; its expiry ends it.
    pub(super) fn hold_unreadable(&mut self, now: Now, ticket: &PendingTicket, error: &ReadError) {
        let &PendingTicket { owner, ref pair, entry, credit, .. } = ticket;
        let Entry { message: id, recipients, attempts, expires_ms, .. } = self.home.entry(entry);
        // What is due when it expires counts as held in doubt.
        let due_ms = (now.wall_ms + UNREADABLE_RETRY.as_millis() as u64).min(expires_ms.saturating_sub(1));
        let recipients: Vec<u32> = recipients.collect();
        tracing::error!(%id, %error, "a message can not be read from the spool");
        self.unpin(id);
        self.home.defer(entry, &recipients, attempts, due_ms, &format!("the spool can not read it: {error}"));
        let flow = Arc::clone(&self.home.queue_of(entry).flow);
        self.home.return_credit(owner, pair, &flow, credit);
    }

    pub(super) fn unpin(&mut self, id: MessageId) {
        let place = self.log_index(id.log());
        self.logs[place].log.unpin(id);
    }

    /// A wall clock that was set forward makes mail due earlier, which is harmless, and ends suspensions. Set back, it
    /// would hold mail for as long as the step is, and what was suspended until some time before would be again.
    pub(super) fn notice_step(&mut self, now: Now) {
        let steps = self.steps.get_or_insert_with(|| StepWatch::new(now));
        match steps.wall_stepped(now) {
            None => {}
            Some(step_ms @ ..0) => {
                let by_ms = step_ms.unsigned_abs();
                self.suspensions.expire(now.wall_ms.saturating_add(by_ms));
                self.home.set_clock_back(now.wall_ms, by_ms);
            }
            Some(_) => self.resume_ended(now),
        }
    }

    /// Ends what is past its time and not on the wire.
    pub(super) fn expire(&mut self, now: Now) {
        for (entry, held_by) in self.home.sweep_expired(now.wall_ms) {
            // A block may have ended together with the message's time.
            let held_by = held_by.or_else(|| self.last_block(now, entry));
            let answer = self.expiry_answer(entry, held_by.as_deref());
            self.end_entry(now, Ending { entry, fate: Fate::Expired, answer });
        }
    }

    /// What an entry that was never attempted last waited for, with its domain or at one of its pool's sources.
    fn last_block(&mut self, now: Now, entry: EntryKey) -> Option<Arc<str>> {
        if self.home.entry(entry).last_answer.is_some() {
            return None;
        }
        let queue = self.home.queue_of(entry);
        let (key, sources) = (queue.route.clone(), named_pool(&self.config, &queue.pool).sources);
        if let Some(of_domain) = self.home.last_block_of_domain(&key) {
            return Some(of_domain);
        }
        let route = self.routes.get(now, &key)?;
        let place = self.shapings.place(&key, &route);
        let of_pair = sources.iter().find_map(|&(source, _)| self.home.last_block(&place.pair(source)));
        of_pair.or_else(|| self.out_of_reach(&self.home.queue_of(entry).pool, &route.site))
    }

    /// Why none of a pool's sources can ever connect to a site: its addresses are of another family.
    fn out_of_reach(&self, pool: &str, site: &Site) -> Option<Arc<str>> {
        let reaches = |&(source, _): &(usize, u32)| reaches(&self.config.egress_sources[source], site);
        if named_pool(&self.config, pool).sources.iter().any(reaches) {
            return None;
        }
        let is_four = |address: Endpoint| matches!(address, Endpoint::Ip(address) if address.is_ipv4());
        let family = if site.addresses().any(is_four) { "IPv4" } else { "IPv6" };
        Some(format!("no source of pool {pool} can connect to {}, which has {family} addresses only", site.name).into())
    }

    fn expiry_answer(&self, entry: EntryKey, held_by: Option<&str>) -> Answer {
        let last = self.home.entry(entry).last_answer;
        let text = match held_by.or(last) {
            Some(last) => format!("Message expired; last answer: {last}"),
            None => "Message expired before an attempt could be made".to_owned(),
        };
        expired(text)
    }

    /// A source's address came to or went from this machine.
    pub(super) fn set_plumbed(&mut self, now: Now, source: usize, plumbed: bool) {
        if self.plumbed[source] == plumbed {
            return;
        }
        self.plumbed[source] = plumbed;
        if plumbed {
            return self.home.retry_all_sources();
        }
        self.pools.call_back(|pair| pair.source == source);
        for entry in self.home.withdraw_ready(|pair| pair.source == source, |_, _| true) {
            self.route(now, entry);
        }
    }

    /// The source that an entry goes by: the one where its turn had come; else, of those of its pool that are there,
    /// reach the site and are not suspended for it, one that its domain doesn't avoid, where there is one. With none,
    /// what holds it.
    fn choose_source(&mut self, now: Now, entry: EntryKey, to: Destination<'_>, site: &Site) -> Result<usize, Blocked> {
        let kept = self.home.take_source(entry);
        let queue = self.home.queue_of(entry);
        let flow = suspension::Flow { tenant: &queue.tenant, campaign: &queue.campaign, domain: &queue.domain };
        if !self.egress.contains_key(&*queue.pool) {
            let turns = EgressTurns::new(&named_pool(&self.config, &queue.pool));
            self.egress.insert(queue.pool.to_string(), turns);
        }
        let turns = self.egress.get_mut(&*queue.pool).expect("it was just put there");
        let (plumbed, avoided, suspensions) = (&self.plumbed, &self.avoided, &self.suspensions);
        let reaching = |source: usize| reaches(&self.config.egress_sources[source], site);
        let usable =
            |source| plumbed[source] && reaching(source) && suspensions.find(now.wall_ms, source, to, flow).is_none();
        let is_welcome = |source| usable(source) && !avoided.avoids(now.monotonic, &queue.domain, source);
        if let Some(source) = kept.filter(|&source| turns.has(source) && is_welcome(source)) {
            return Ok(source);
        }
        let welcome = turns.next(is_welcome);
        if let Some(source) = welcome.or_else(|| turns.next(usable)) {
            return Ok(source);
        }
        if let Some(reason) = self.out_of_reach(&queue.pool, site) {
            return Err(Blocked { until_ms: now.wall_ms + self.pause_max().as_millis() as u64, reason });
        }
        let unplumbed = || Blocked {
            until_ms: now.wall_ms + SOURCE_RETRY.as_millis() as u64,
            reason: format!("no source of pool {} has its address on this machine", queue.pool).into(),
        };
        let sources = named_pool(&self.config, &queue.pool).sources;
        let sources = sources.iter().filter(|(source, _)| reaching(*source));
        let suspended = sources.filter_map(|&(source, _)| suspensions.find(now.wall_ms, source, to, flow));
        let first = suspended.min_by_key(|suspension| suspension.until_ms);
        Err(first.map_or_else(unplumbed, |first| Blocked { until_ms: first.until_ms, reason: first.blocked_by() }))
    }

    /// Whether a source of its pool is left for an entry that its domain doesn't avoid.
    pub(super) fn has_welcome_source(&self, now: Now, entry: EntryKey, to: Destination<'_>, site: &Site) -> bool {
        let queue = self.home.queue_of(entry);
        let flow = suspension::Flow { tenant: &queue.tenant, campaign: &queue.campaign, domain: &queue.domain };
        let welcome = |source| {
            self.plumbed[source]
                && reaches(&self.config.egress_sources[source], site)
                && !self.avoided.avoids(now.monotonic, &queue.domain, source)
                && self.suspensions.find(now.wall_ms, source, to, flow).is_none()
        };
        named_pool(&self.config, &queue.pool).sources.iter().any(|&(source, _)| welcome(source))
    }

    fn pause_max(&self) -> Duration {
        super::orders::pool_options(&self.config, 1, Arc::default()).back_off.max
    }
}

/// The answer in place of a peer's when a message has run out of time (RFC 3463 §3.5, X.4.7).
pub(super) fn expired(text: String) -> Answer {
    Answer { code: 551, enhanced: Some((5, 4, 7)), text, command: String::new() }
}

/// The answer in place of a peer's where the route sends nothing.
fn discarded() -> Answer {
    let text = "discarded as its route says; nothing was sent".to_owned();
    Answer { code: 250, enhanced: Some((2, 0, 0)), text, command: String::new() }
}

/// Whether a source can connect to one of the site's addresses.
fn reaches(source: &config::EgressSource, site: &Site) -> bool {
    site.addresses().any(|address| source.reaches(&address))
}

/// A pool by its name, or the pool of the one source that has the name.
fn named_pool(config: &config::Config, name: &str) -> EgressPool {
    if let Some(pool) = config.pool(name) {
        return pool.clone();
    }
    match config.source_named(name) {
        Some(source) => EgressPool { name: name.to_owned(), sources: vec![(source, 1)] },
        // A pool that an earlier configuration had: its mail goes by the default one rather than not at all.
        None => config.default_pool().clone(),
    }
}

fn attempt(
    message: &Message,
    ticket: Ticket,
    pair: PairKey,
    (flow, domain, generation): (Arc<Flow>, Arc<str>, Generation),
    route: Route,
    shaping: Arc<Shaping>,
    entry: Entry<'_>,
) -> Result<Attempt, ReadError> {
    let is_retry = entry.attempts > 0;
    let attempt = message.read(|envelope| {
        let address = |index: u32| envelope.recipients.get(index as usize).map(|it| it.address.as_str().to_owned());
        Attempt {
            ticket,
            pair,
            flow,
            domain,
            route,
            shaping,
            reverse_path: envelope.reverse_path.as_str().into(),
            eight_bit: envelope.eight_bit,
            smtputf8: envelope.smtputf8,
            dot_lines: envelope.dot_lines,
            dsn: envelope.dsn(),
            is_retry,
            recipients: entry.recipients.filter_map(|index| Some((index, address(index)?))).collect(),
            message: message.clone(),
            outcome: Box::new(outcome_of(message.id(), message.size(), envelope)),
            is_counted: false,
            permit: None,
            generation,
        }
    })?;
    let mut domains = attempt.recipients.iter().map(|(_, address)| queue_domain(address));
    let one_domain = domains.next().expect("an entry has recipients of its message");
    assert!(domains.all(|domain| domain == one_domain), "a transaction has one domain");
    Ok(attempt)
}
