//! Refusals on request: which stage answers what, how often and until when.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

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
    replies: [Option<String>; 6],
    /// Of the chances to refuse, how many are taken: 0 to 1.
    share: f64,
    until: Option<Instant>,
    active: AtomicBool,
}

impl FaultPlan {
    /// `replies` are whole reply lines without CRLF, such as `451 4.2.1 busy`.
    pub fn new(replies: &[(Stage, String)], percent: f64, lasting: Option<Duration>, now: Instant) -> Result<Self> {
        ensure!((0.0..=100.0).contains(&percent), "a percentage is between 0 and 100, not {percent}");
        let mut plan = Self { replies: Default::default(), share: percent / 100.0, ..Self::none() };
        plan.until = lasting.map(|lasting| now + lasting);
        for (stage, reply) in replies {
            let code = reply.get(..3).unwrap_or_default();
            let is_code = code.len() == 3 && code.bytes().all(|c| c.is_ascii_digit());
            ensure!(is_code && matches!(reply.as_bytes().get(3), None | Some(b' ')), "{reply:?} is not an SMTP reply");
            ensure!(matches!(code.as_bytes()[0], b'4' | b'5'), "{reply:?} refuses nothing; write 4xx or 5xx");
            ensure!(!reply.contains(['\r', '\n']), "{reply:?} must be one line");
            plan.replies[*stage as usize] = Some(reply.clone());
        }
        Ok(plan)
    }

    /// Refuses nothing.
    pub fn none() -> Self {
        Self { replies: Default::default(), share: 1.0, until: None, active: AtomicBool::new(true) }
    }

    /// Switches the plan off or on again; gives what it is now.
    pub fn toggle(&self) -> bool {
        !self.active.fetch_xor(true, Ordering::Relaxed)
    }

    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
    }

    pub fn reply(&self, stage: Stage, now: Instant, random: &mut Random) -> Option<&str> {
        let reply = self.replies[stage as usize].as_deref()?;
        let active = self.active.load(Ordering::Relaxed) && self.until.is_none_or(|until| now < until);
        (active && (self.share >= 1.0 || random.unit() < self.share)).then_some(reply)
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
    fn odd_replies_are_refused() {
        for reply in ["busy", "45", "250 fine", "4511 x", "451 a\r\n250 b"] {
            assert!(FaultPlan::new(&[(Stage::Rcpt, reply.to_owned())], 1.0, None, Instant::now()).is_err(), "{reply}");
        }
    }
}
