//! Where a pair connects to, and what becomes of its tickets when it can't.

use std::sync::Arc;
use std::time::Duration;

use super::{Connect, Order, Pair, Pools, same_route};
use crate::handover::{Attempt, Blocked, Route};
use crate::mail::time::Now;
use crate::pool::connection::{ConnectionKey, SlotState};
use crate::pool::site::Choice;

impl Pools {
    /// Opens as many connections as tickets wait for one, within the limit.
    pub(super) fn connect(&mut self, now: Now, place: u32, random: &mut dyn FnMut(u64) -> u64) {
        loop {
            let pair = &mut self.pairs[place as usize];
            if !pair.wants_connection() {
                return;
            }
            if pair.open.len() >= pair.shaping.connection_limit as usize {
                self.make_room(now, place);
                return;
            }
            if !self.may_connect(now, place) {
                return;
            }
            let pair = &self.pairs[place as usize];
            let attempt = &pair.tickets[pair.opening as usize];
            let route = attempt.route.clone();
            match self.choose_host(now, place, attempt, random) {
                Choice::Connect { host, to } => {
                    if !self.has_slot(place) || !self.may_open(place) {
                        return;
                    }
                    let pair = &mut self.pairs[place as usize];
                    pair.hosts.begin(now.monotonic, to);
                    let attempt = &pair.tickets[pair.opening as usize];
                    let required = route.requirement(host).expect("only a host that may be used is chosen");
                    let tls = pair.hosts.tls_to_use(now.monotonic, to, required.clone());
                    let host_name = route.site.hosts[host].name.clone();
                    let policy = route.tls_policy(host, &attempt.domain);
                    let site = Arc::from(&*route.site.name);
                    let connection =
                        self.slots.open(place, host_name.clone(), to, site, required, Arc::clone(&route.terms));
                    pair.open.push(connection);
                    pair.opening += 1;
                    self.join_rollup(now, place, connection);
                    let pair = &self.pairs[place as usize];
                    let (source, shaping) = (pair.key.source, Arc::clone(&pair.shaping));
                    let connect = Connect { connection, source, host_name, to, tls, policy, shaping };
                    self.orders.push_back(Order::Connect(Box::new(connect)));
                }
                Choice::Wait { is_own: true, .. } if self.has_connection_for(now, place, attempt) => return,
                Choice::Wait { until, reason, is_own: true } => self.hold(now, place, &route, until, reason),
                Choice::Wait { until, reason, is_own: false } => return self.block(now, place, until, reason),
                // The same hosts may do for other domains. What the DNS could not say it may say soon; a policy lasts.
                Choice::Nowhere if let Some(reason) = route.unknown_tlsa() => {
                    self.hold(now, place, &route, now.monotonic + self.options.back_off.first, reason);
                }
                Choice::Nowhere if route.sts.is_some() => {
                    let until = now.monotonic + self.options.back_off.max;
                    let reason = "the domain's MTA-STS policy names none of its MX hosts that have an address".into();
                    self.hold(now, place, &route, until, reason);
                }
                Choice::Nowhere => {
                    let until = now.monotonic + self.options.back_off.first;
                    let reason = "the site has no address that this source can connect to".into();
                    return self.block(now, place, until, reason);
                }
            }
        }
    }

    /// Whether the shard may begin one more connection; if not, the pair stands in line.
    fn may_open(&mut self, place: u32) -> bool {
        let is_first = self.pairs[place as usize].open.is_empty();
        let may = self.openings.take(is_first);
        if !may {
            self.openings.wait(place, is_first);
        }
        may
    }

    /// Where a message may be taken to by a new connection.
    fn choose_host(&self, now: Now, place: u32, attempt: &Attempt, random: &mut dyn FnMut(u64) -> u64) -> Choice {
        let pair = &self.pairs[place as usize];
        let Pair { key, hosts, .. } = pair;
        let route = &attempt.route;
        let source = &self.options.sources[key.source];
        let mut order = route.site.attempt_order(random);
        order.retain(|(_, to)| source.reaches(to));
        let requirement = |host| route.requirement(host);
        let needs = |need| attempt.needs(need);
        hosts.keep_serving(now.monotonic, &mut order, requirement, pair.is_under_way(), &needs);
        if attempt.is_retry {
            hosts.put_unwell_last(now.monotonic, &mut order);
        }
        hosts.choose(now.monotonic, &order, requirement)
    }

    /// All slots are taken, and the first ticket fits nothing that is there: an idle connection makes room, one at a
    /// time. Where nothing else goes on, it does so though no host can be tried: the tickets go home then, and know
    /// until when.
    fn make_room(&mut self, now: Now, place: u32) {
        let pair = &self.pairs[place as usize];
        let is_idle = |key: &&ConnectionKey| matches!(self.slots.state(**key), SlotState::Idle { .. });
        let is_closing = |key: &ConnectionKey| self.slots.state(*key) == SlotState::Closing;
        let under_way = (pair.busy + pair.opening) as usize;
        if pair.open.len() > under_way
            && let Some(&connection) = pair.open.iter().find(is_idle)
            && !pair.open.iter().any(is_closing)
            && (under_way == 0 || self.is_short_of_room(now, place))
        {
            self.quit(connection);
        }
    }

    /// Whether the pair's first ticket could go by a connection of its own, for which there is no slot, and none that
    /// it fits is up, on its way, or about to make room.
    pub(super) fn is_short_of_room(&self, now: Now, place: u32) -> bool {
        let pair = &self.pairs[place as usize];
        let is_full = pair.open.len() >= pair.shaping.connection_limit as usize || pair.pace.waits_for_slot;
        let Some(first) = pair.tickets.front().filter(|_| is_full && pair.opening == 0) else { return false };
        let source = &self.options.sources[pair.key.source];
        let will_do = |key: &ConnectionKey| {
            self.slots.state(*key) == SlotState::Closing || pair.fits(now, source, self.slots.get(*key), first)
        };
        // Whether there is a host does not depend on the order in which they stand.
        !pair.open.iter().any(will_do)
            && matches!(self.choose_host(now, place, first, &mut |_| 0), Choice::Connect { .. })
    }

    /// Whether a connection that the ticket fits is up: it waits for this one, though no other can be had.
    fn has_connection_for(&self, now: Now, place: u32, attempt: &Attempt) -> bool {
        let pair = &self.pairs[place as usize];
        let source = &self.options.sources[pair.key.source];
        let is_up = |key: &ConnectionKey| !matches!(self.slots.state(*key), SlotState::Opening | SlotState::Closing);
        pair.open.iter().any(|key| is_up(key) && pair.fits(now, source, self.slots.get(*key), attempt))
    }

    /// No host can be tried: while connections that are up still serve, tickets wait for them; else all go home.
    fn block(&mut self, now: Now, place: u32, until: Duration, reason: Arc<str>) {
        if !self.pairs[place as usize].is_under_way() {
            self.close_pair(now, place, until, &reason);
        }
    }

    /// All tickets go home, and no credit is given until then.
    pub(super) fn close_pair(&mut self, now: Now, place: u32, until: Duration, reason: &Arc<str>) {
        let pair = &mut self.pairs[place as usize];
        if let Some(earlier) = pair.blocked_until.replace(until) {
            self.blocked.remove(&(earlier, place));
        }
        self.blocked.insert((until, place));
        self.orders.extend(pair.send_all_home());
        let wait_ms = until.saturating_sub(now.monotonic).as_millis() as u64;
        let blocked = Blocked { until_ms: now.wall_ms + wait_ms, reason: Arc::clone(reason) };
        let permits = pair.demand.void();
        let is_leaving = self.is_leaving(place);
        let pair = &self.pairs[place as usize];
        for home in pair.demand.homes().filter(|_| !is_leaving) {
            self.orders.push_back(Order::Block { home, pair: pair.key.clone(), blocked: blocked.clone() });
        }
        permits.into_iter().for_each(|permit| self.give_back(permit));
    }

    /// No host meets the requirement of this route: its tickets go home, and the others stay.
    fn hold(&mut self, now: Now, place: u32, route: &Route, until: Duration, reason: Arc<str>) {
        let wait_ms = until.saturating_sub(now.monotonic).as_millis() as u64;
        let blocked = Blocked { until_ms: now.wall_ms + wait_ms, reason };
        let pair = &mut self.pairs[place as usize];
        for attempt in std::mem::take(&mut pair.tickets) {
            if same_route(&attempt.route, route) {
                pair.demand.send_home(&attempt.flow, attempt.recipients.len() as u32);
                self.orders.push_back(Order::Hold { attempt, blocked: blocked.clone() });
            } else {
                pair.tickets.push_back(attempt);
            }
        }
    }
}
