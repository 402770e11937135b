//! Refusals for our address's sake: what they are about goes on at once, where another source of its pool is welcome.

use postrider::pool::suspension::{Effect, Scope, Suspension};
use postrider_spool::record::{Answer, Fate, Outcome, RecipientResult};

use crate::checker::{BLAME, domain_of, marker_of};
use crate::peer::Host;
use crate::providers::PROVIDER;
use crate::rates;
use crate::warmup::DAY_MS;
use crate::world::{SITES, World};

impl World {
    /// EXACT-RETRY-STATE: who was put off by such a refusal is due at once, unless the engine may know of something
    /// against all other sources.
    pub(crate) fn check_moved(&self, outcome: &Outcome) {
        let waits = |result: &&RecipientResult| {
            let is_put_off = matches!(result.fate, Fate::Deferred { due_ms } if due_ms != outcome.at_ms);
            is_put_off && is_blame(&result.answer)
        };
        for result in outcome.results.iter().filter(waits) {
            let domain = domain_of(&result.recipient);
            let sent = self.ledger.sent(marker_of(&outcome.reverse_path));
            let mut others = sent.sources.iter().filter(|&&source| {
                self.config.egress_sources[source].name != outcome.egress_source
                    && self.is_certainly_welcome(source, domain, outcome)
            });
            let other = others.next();
            assert!(
                other.is_none(),
                "EXACT-RETRY-STATE: {} to {} waits, although source {other:?} is there: {result:?}",
                outcome.reverse_path,
                result.recipient
            );
        }
    }

    /// Whether nothing stands against a source of all that the engine may go by. It forgets whom a domain's peers have
    /// blamed, after hours or with its life; here that counts for the whole run, from when a peer says it.
    fn is_certainly_welcome(&self, source: usize, domain: &str, outcome: &Outcome) -> bool {
        let is_it = |site: &usize| rates::name_of(&self.hosts, *site) == outcome.site;
        // Other names are of routes of their own.
        let Some(site) = (0..SITES).find(is_it) else { return false };
        let is_blamed = |host: &Host| host.blamed.contains(&(source, domain.to_owned()));
        let is_of_pool = |sources: &[(usize, u32)]| sources.iter().any(|(other, _)| *other == source);
        // The other pool has one source, and so none beside it.
        let has_always = self.reloads.epochs().iter().all(|epoch| is_of_pool(&epoch.config.egress_pools[0].sources));
        let is_suspended = |Suspension { scope, effect, until_ms, .. }: &Suspension| {
            *effect == Effect::Stop
                && *until_ms + self.ledger.back_ms > outcome.at_ms
                && scope.source.is_none_or(|suspended| suspended == source)
                && scope.rollup.as_deref().is_none_or(|name| name == outcome.site || name == PROVIDER)
        };
        has_always
            && !self.reached(source, site).is_empty()
            && !self.hosts.iter().any(is_blamed)
            && !self.suspensions.iter().any(is_suspended)
    }
}

/// What a canary tells shards.
pub(crate) fn made_up(now_ms: u64) -> Suspension {
    let scope = Scope { source: Some(1), ..Scope::default() };
    Suspension { id: 1, scope, effect: Effect::Stop, reason: "made up".into(), until_ms: now_ms + DAY_MS }
}

/// As [`BLAME`] reads in a record.
fn is_blame(answer: &Answer) -> bool {
    let is_like = (answer.code, answer.enhanced) == (554, Some((5, 7, 1)));
    is_like && !answer.text.is_empty() && BLAME.ends_with(answer.text.as_str())
}
