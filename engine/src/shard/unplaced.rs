//! Admitted messages that wait for room which the spool is about to have: a segment that is being made ready, a commit
//! that is under way. They are whole, so to refuse them would have their senders send all octets again.
//!
//! What waits is bounded in octets and in time; beyond, it is refused as it would be without. It keeps its order; what
//! comes meanwhile gets only room that is too small for the first of those that wait.

use std::collections::VecDeque;
use std::time::Duration;

use postrider_spool::{AppendError, Closed};

use super::Shard;
use super::home_log::{AnswerTo, NoMail};
use crate::accept::{Admitted, Refusal};
use crate::limits::UNPLACED_PATIENCE;
use crate::mail::time::Now;

#[derive(Debug, Default)]
pub(super) struct Unplaced {
    waiting: VecDeque<Waiting>,
    bytes: u64,
}

#[derive(Debug)]
struct Waiting {
    until: Duration,
    admitted: Box<Admitted>,
    answer_to: AnswerTo,
}

impl Shard {
    /// Whether a message of this size may wait for room, for which there was none because of `closed`.
    pub(super) fn may_wait(&self, now: Now, closed: NoMail, size: u64) -> bool {
        matches!(closed, NoMail::Log(Closed::Preparing | Closed::Backlog))
            && !self.stopping
            && !self.logs[0].is_stalled(now)
            && (self.unplaced.bytes == 0 || self.unplaced.bytes + size <= self.memory.unplaced_bytes)
    }

    pub(super) fn wait_for_room(&mut self, now: Now, admitted: Box<Admitted>, answer_to: AnswerTo) {
        self.unplaced.bytes += admitted.size();
        let until = now.monotonic + UNPLACED_PATIENCE;
        self.unplaced.waiting.push_back(Waiting { until, admitted, answer_to });
    }

    /// Places what waits, as far as there is room by now. The others keep their order.
    pub(super) fn place_waiting(&mut self, now: Now) {
        while let Some(Waiting { until, admitted, answer_to }) = self.unplaced.waiting.pop_front() {
            let size = admitted.size();
            self.unplaced.bytes -= size;
            if let AnswerTo::Session(key) = answer_to
                && !self.sessions.contains_key(&key)
            {
                // Its client has given up, and will send it again.
                continue;
            }
            match self.place(now, admitted, answer_to) {
                Ok(()) => {}
                Err((admitted, AppendError::Full(closed)))
                    if now.monotonic < until && self.may_wait(now, NoMail::Log(closed), size) =>
                {
                    self.unplaced.bytes += size;
                    self.unplaced.waiting.push_front(Waiting { until, admitted, answer_to });
                    return;
                }
                Err((_, error)) => self.answer_sender(now, answer_to, Err(refusal_of(&error))),
            }
        }
    }

    /// There will be no room in this life.
    pub(super) fn stop_waiting_for_room(&mut self, now: Now) {
        let Unplaced { waiting, .. } = std::mem::take(&mut self.unplaced);
        for Waiting { answer_to, .. } in waiting {
            self.answer_sender(now, answer_to, Err(Refusal::new(451, (4, 3, 2), "System is shutting down")));
        }
    }
}

pub(super) fn refusal_of(error: &AppendError) -> Refusal {
    match error {
        AppendError::Full(closed) => NoMail::Log(*closed).refusal(),
        AppendError::TooLarge { bytes, bytes_max } => {
            Refusal::new(552, (5, 3, 4), format!("Message of {bytes} octets exceeds the spool's {bytes_max}"))
        }
        AppendError::UnknownBody => unreachable!("a shared body is appended first"),
        AppendError::Failed => Refusal::new(451, (4, 3, 0), "Spool failed, try again later"),
    }
}
