//! How much is put in flight with the hosts of a site: less, for a day, after something went wrong between messages.
//!
//! A 503 to, or a loss of, whole transactions in flight says that this peer is not up to them. A peer that confused
//! envelopes, or does not know the BDAT that it offers, gets one message at a time, by DATA, where every step is
//! answered before the next.

use std::sync::Arc;
use std::time::Duration;

use ahash::HashMap;

use crate::config::Chunking;
use crate::limits::{DISTRUST, DISTRUSTED_SITES_MAX};

/// The sites that are trusted less for now.
#[derive(Debug, Default)]
pub struct Trust {
    sites: HashMap<Arc<str>, Distrust>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Distrust {
    /// Until then no whole transactions are in flight, and until then nothing rides.
    whole_until: Duration,
    riding_until: Duration,
}

impl Trust {
    /// From now on there is no more at the site than `leaves`.
    pub fn lapse(&mut self, now: Duration, site: &Arc<str>, leaves: Chunking) {
        let over = |distrust: &Distrust| distrust.whole_until <= now && distrust.riding_until <= now;
        if self.sites.len() >= DISTRUSTED_SITES_MAX && !self.sites.contains_key(site) {
            self.sites.retain(|_, distrust| !over(distrust));
        }
        if self.sites.len() >= DISTRUSTED_SITES_MAX && !self.sites.contains_key(site) {
            let soonest = self.sites.iter().min_by_key(|(_, distrust)| distrust.whole_until.max(distrust.riding_until));
            let soonest = soonest.map(|(site, _)| Arc::clone(site));
            soonest.map(|site| self.sites.remove(&site));
        }
        let distrust = self.sites.entry(Arc::clone(site)).or_default();
        distrust.whole_until = now + DISTRUST;
        if leaves == Chunking::Off {
            distrust.riding_until = now + DISTRUST;
        }
    }

    /// What is done with the site's hosts where `asked` is asked for.
    pub fn chunking(&self, now: Duration, site: &str, asked: Chunking) -> Chunking {
        // Nearly always there is nobody to distrust.
        let Some(distrust) = (!self.sites.is_empty()).then(|| self.sites.get(site)).flatten() else { return asked };
        match asked {
            _ if distrust.riding_until > now => Chunking::Off,
            Chunking::BackToBack if distrust.whole_until > now => Chunking::On,
            _ => asked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Chunking = Chunking::BackToBack;

    #[test]
    fn a_site_is_trusted_less_for_a_day() {
        let mut trust = Trust::default();
        let (lost, confused): (Arc<str>, Arc<str>) = ("lost".into(), "confused".into());
        let at = Duration::from_secs;
        trust.lapse(at(10), &lost, Chunking::On);
        trust.lapse(at(10), &confused, Chunking::Off);
        assert_eq!(trust.chunking(at(11), "lost", WHOLE), Chunking::On);
        assert_eq!(trust.chunking(at(11), "lost", Chunking::On), Chunking::On);
        assert_eq!(trust.chunking(at(11), "lost", Chunking::Off), Chunking::Off);
        assert_eq!(trust.chunking(at(11), "confused", WHOLE), Chunking::Off);
        assert_eq!(trust.chunking(at(11), "confused", Chunking::On), Chunking::Off);
        assert_eq!(trust.chunking(at(11), "other", WHOLE), WHOLE);
        let day = at(86_400);
        assert_eq!(trust.chunking(at(9) + day, "confused", Chunking::On), Chunking::Off);
        assert_eq!(trust.chunking(at(10) + day, "confused", WHOLE), WHOLE);
    }

    #[test]
    fn a_lesser_lapse_does_not_shorten_a_greater_one() {
        let mut trust = Trust::default();
        let site: Arc<str> = "site".into();
        trust.lapse(Duration::ZERO, &site, Chunking::Off);
        trust.lapse(Duration::from_secs(1), &site, Chunking::On);
        assert_eq!(trust.chunking(Duration::from_secs(2), "site", WHOLE), Chunking::Off);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut trust = Trust::default();
        for number in 0..DISTRUSTED_SITES_MAX as u64 + 10 {
            trust.lapse(Duration::from_secs(number), &format!("site {number}").into(), Chunking::On);
        }
        assert_eq!(trust.sites.len(), DISTRUSTED_SITES_MAX);
        let now = Duration::from_secs(DISTRUSTED_SITES_MAX as u64 + 10);
        assert_eq!(trust.chunking(now, "site 0", WHOLE), WHOLE, "the oldest is forgotten first");
        assert_eq!(trust.chunking(now, "site 100", WHOLE), Chunking::On);
    }
}
