//! Questions to all shards: few at a time, the others wait here.
//!
//! To answer one a shard may have to go over all of its mail, and does nothing else meanwhile. So those of many askers
//! are put one after the other, with turns of the shards' other work between; who gave up while waiting is passed over.

use std::collections::{HashMap, VecDeque};

use tokio::sync::oneshot;

use crate::handover::{Ask, Told};
use crate::limits::QUESTIONS_RUNNING_MAX;

#[derive(Debug)]
pub(crate) struct Questions {
    shards: usize,
    running: HashMap<u64, Question>,
    waiting: VecDeque<(Ask, oneshot::Sender<Vec<Told>>)>,
    next: u64,
}

#[derive(Debug)]
struct Question {
    answers: Vec<Told>,
    reply: oneshot::Sender<Vec<Told>>,
}

impl Questions {
    pub(crate) fn new(shards: usize) -> Self {
        Self { shards, running: HashMap::new(), waiting: VecDeque::new(), next: 0 }
    }

    pub(crate) fn add(&mut self, ask: Ask, reply: oneshot::Sender<Vec<Told>>) {
        self.waiting.retain(|(_, reply)| !reply.is_closed());
        self.waiting.push_back((ask, reply));
    }

    /// What is to be asked now of each shard, under the number that it answers with.
    pub(crate) fn poll(&mut self) -> Option<(u64, Ask)> {
        while self.running.len() < QUESTIONS_RUNNING_MAX {
            let (ask, reply) = self.waiting.pop_front()?;
            if !reply.is_closed() {
                let number = self.next;
                self.next += 1;
                self.running.insert(number, Question { answers: Vec::new(), reply });
                return Some((number, ask));
            }
        }
        None
    }

    /// One shard's answer. Who gave up meanwhile is not told, but its question runs until all shards are done with it.
    pub(crate) fn answer(&mut self, number: u64, told: Told) {
        let Some(question) = self.running.get_mut(&number) else { return };
        question.answers.push(told);
        if question.answers.len() == self.shards
            && let Some(question) = self.running.remove(&number)
        {
            let _ = question.reply.send(question.answers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Told {
        Told::TlsReport(Vec::new())
    }

    #[test]
    fn few_run_at_a_time_and_those_who_gave_up_are_passed_over() {
        let mut questions = Questions::new(2);
        let count = QUESTIONS_RUNNING_MAX + 3;
        let mut replies: Vec<_> = (0..count)
            .map(|_| {
                let (reply, answers) = oneshot::channel();
                questions.add(Ask::TlsReport, reply);
                Some(answers)
            })
            .collect();
        let running: Vec<u64> = std::iter::from_fn(|| questions.poll()).map(|(number, _)| number).collect();
        assert_eq!(running.len(), QUESTIONS_RUNNING_MAX);

        // The first in line gives up, and so does one that the shards are busy with already.
        replies[QUESTIONS_RUNNING_MAX] = None;
        replies[0] = None;
        assert!(questions.poll().is_none(), "the shards are still busy with it");
        questions.answer(running[0], told());
        assert!(questions.poll().is_none(), "one shard of two has answered");
        questions.answer(running[0], told());
        assert!(questions.poll().is_some());
        assert!(questions.poll().is_none());

        for number in 1..QUESTIONS_RUNNING_MAX as u64 + 2 {
            for _ in 0..2 {
                questions.answer(number, told());
            }
            let _ = questions.poll();
        }
        let mut answered = replies.into_iter().flatten().map(|mut answers| answers.try_recv().is_ok());
        assert!(answered.all(|is_answered| is_answered));
        assert!(questions.running.is_empty() && questions.waiting.is_empty());
    }
}
