//! Refusals on request: which stage answers what, how often and until when; and greylisting.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::message::Random;

/// Where in a session a reply can be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Greeting,
    Ehlo,
    Mail,
    Rcpt,
    Data,
    /// The answer to the final dot, or to the last chunk.
    Dot,
}

impl Stage {
    pub const ALL: [Self; 6] = [Self::Greeting, Self::Ehlo, Self::Mail, Self::Rcpt, Self::Data, Self::Dot];

    pub fn name(self) -> &'static str {
        match self {
            Self::Greeting => "greeting",
            Self::Ehlo => "ehlo",
            Self::Mail => "mail",
            Self::Rcpt => "rcpt",
            Self::Data => "data",
            Self::Dot => "dot",
        }
    }
}

/// Shared by all sessions of a sink.
#[derive(Debug)]
pub struct FaultPlan {
    replies: [Vec<Refusal>; 6],
    greylist: Option<Greylist>,
    until: Option<Instant>,
    active: AtomicBool,
}

/// A reply with the share of a stage's chances that it takes: 0 to 1.
#[derive(Debug)]
struct Refusal {
    share: f64,
    reply: String,
}

/// When each (peer, reverse path, recipient) was first seen, by a hash of it.
#[derive(Debug)]
struct Greylist {
    lasting: Duration,
    hasher: RandomState,
    first_seen: Mutex<HashMap<u64, Instant>>,
}

impl FaultPlan {
    /// `replies` are whole reply lines without CRLF, such as `451 4.2.1 busy`, which `percent` of the chances get; or
    /// with a percentage of their own, `5%:451 4.2.1 busy`. Those of one stage exclude each other.
    pub fn new(replies: &[(Stage, String)], percent: f64, lasting: Option<Duration>, now: Instant) -> Result<Self> {
        ensure!((0.0..=100.0).contains(&percent), "a percentage is between 0 and 100, not {percent}");
        let mut plan = Self { until: lasting.map(|lasting| now + lasting), ..Self::none() };
        for (stage, text) in replies {
            let (percent, reply) = match text.split_once("%:") {
                Some((own, reply)) => (own.trim().parse().with_context(|| format!("{own:?} in {text:?}"))?, reply),
                None => (percent, text.as_str()),
            };
            ensure!((0.0..=100.0).contains(&percent), "a percentage is between 0 and 100, not {percent}");
            let code = reply.get(..3).unwrap_or_default();
            let is_code = code.len() == 3 && code.bytes().all(|c| c.is_ascii_digit());
            ensure!(is_code && matches!(reply.as_bytes().get(3), None | Some(b' ')), "{reply:?} is not an SMTP reply");
            ensure!(matches!(code.as_bytes()[0], b'4' | b'5'), "{reply:?} refuses nothing; write 4xx or 5xx");
            ensure!(!reply.contains(['\r', '\n']), "{reply:?} must be one line");
            plan.replies[*stage as usize].push(Refusal { share: percent / 100.0, reply: reply.to_owned() });
        }
        let share_of = |refusals: &Vec<Refusal>| refusals.iter().map(|refusal| refusal.share).sum::<f64>();
        let most = plan.replies.iter().map(share_of).fold(0.0, f64::max);
        ensure!(most <= 1.0 + 1e-9, "a stage's refusals add up to {:.1} %", most * 100.0);
        Ok(plan)
    }

    /// Refuses nothing.
    pub fn none() -> Self {
        Self { replies: Default::default(), greylist: None, until: None, active: AtomicBool::new(true) }
    }

    /// Each new (peer, reverse path, recipient) is put off until it has been known for so long.
    pub fn greylist(mut self, lasting: Duration) -> Self {
        let first_seen = Mutex::default();
        self.greylist = Some(Greylist { lasting, hasher: RandomState::new(), first_seen });
        self
    }

    pub fn greylists(&self, peer: IpAddr, mail: Option<&[u8]>, recipient: &[u8], now: Instant) -> bool {
        let Some(greylist) = self.greylist.as_ref().filter(|_| self.is_active(now)) else {
            return false;
        };
        // Parameters such as SIZE may differ from one attempt to the next.
        let path = |text: &[u8]| memchr::memchr(b'>', text).map_or(text.len(), |end| end + 1);
        let mail = mail.unwrap_or_default();
        let key = greylist.hasher.hash_one((peer, &mail[..path(mail)], &recipient[..path(recipient)]));
        let mut seen = greylist.first_seen.lock().unwrap_or_else(PoisonError::into_inner);
        now.saturating_duration_since(*seen.entry(key).or_insert(now)) < greylist.lasting
    }

    fn is_active(&self, now: Instant) -> bool {
        self.active.load(Ordering::Relaxed) && self.until.is_none_or(|until| now < until)
    }

    /// Switches the plan off or on again; gives what it is now.
    pub fn toggle(&self) -> bool {
        !self.active.fetch_xor(true, Ordering::Relaxed)
    }

    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
    }

    pub fn reply(&self, stage: Stage, now: Instant, random: &mut Random) -> Option<&str> {
        let refusals = &self.replies[stage as usize];
        if refusals.is_empty() || !self.is_active(now) {
            return None;
        }
        let mut point = random.unit();
        for refusal in refusals {
            if refusal.share >= 1.0 || point < refusal.share {
                return Some(&refusal.reply);
            }
            point -= refusal.share;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusals(plan: &FaultPlan, now: Instant) -> usize {
        let mut random = Random::new(1);
        (0..1000).filter(|_| plan.reply(Stage::Rcpt, now, &mut random).is_some()).count()
    }

    #[test]
    fn refuses_by_share_time_and_switch() {
        let now = Instant::now();
        let busy = [(Stage::Rcpt, "451 4.2.1 busy".to_owned())];
        let plan = FaultPlan::new(&busy, 100.0, Some(Duration::from_secs(5)), now).unwrap();
        assert_eq!(refusals(&plan, now), 1000);
        assert!(plan.reply(Stage::Data, now, &mut Random::new(1)).is_none());
        assert_eq!(refusals(&plan, now + Duration::from_secs(5)), 0);
        assert!(!plan.toggle());
        assert_eq!(refusals(&plan, now), 0);
        assert!(plan.toggle());
        assert_eq!(refusals(&plan, now), 1000);
        let some = refusals(&FaultPlan::new(&busy, 10.0, None, now).unwrap(), now);
        assert!((60..150).contains(&some), "{some}");
    }

    #[test]
    fn a_stage_answers_by_a_mix() {
        let now = Instant::now();
        let mix = |texts: &[&str]| {
            let replies: Vec<_> = texts.iter().map(|text| (Stage::Rcpt, (*text).to_owned())).collect();
            FaultPlan::new(&replies, 100.0, None, now)
        };
        let plan = mix(&["20%:451 4.2.1 busy", "5%:550 5.1.1 nobody"]).unwrap();
        let mut random = Random::new(1);
        let mut counts = [0; 3];
        for _ in 0..10_000 {
            let reply = plan.reply(Stage::Rcpt, now, &mut random);
            counts[usize::from(reply.is_some()) + usize::from(reply == Some("550 5.1.1 nobody"))] += 1;
        }
        assert!((7_300..7_700).contains(&counts[0]) && (1_800..2_200).contains(&counts[1]), "{counts:?}");
        assert!((400..600).contains(&counts[2]), "{counts:?}");
        assert!(mix(&["60%:451 a", "50%:452 b"]).is_err());
        assert!(mix(&["x%:451 a"]).is_err());
    }

    #[test]
    fn greylisting_puts_off_what_is_new() {
        let now = Instant::now();
        let plan = FaultPlan::none().greylist(Duration::from_secs(5));
        let peer = IpAddr::from([127, 0, 0, 1]);
        let asks = |mail: &[u8], recipient: &[u8], after: u64| {
            plan.greylists(peer, Some(mail), recipient, now + Duration::from_secs(after))
        };
        assert!(asks(b"<a@b> SIZE=1", b"<c@d>", 0));
        assert!(asks(b"<a@b> SIZE=2", b"<c@d>", 4));
        assert!(asks(b"<a@b>", b"<e@d>", 4));
        assert!(!asks(b"<a@b> SIZE=2", b"<c@d> NOTIFY=NEVER", 5));
        assert!(asks(b"<a@b>", b"<e@d>", 8));
        assert!(!plan.toggle());
        assert!(!asks(b"<new@b>", b"<c@d>", 9));
    }

    #[test]
    fn odd_replies_are_refused() {
        for reply in ["busy", "45", "250 fine", "4511 x", "451 a\r\n250 b"] {
            assert!(FaultPlan::new(&[(Stage::Rcpt, reply.to_owned())], 1.0, None, Instant::now()).is_err(), "{reply}");
        }
    }
}
