//! Which message gets which outcome when, and a phase of a measurement: writers that append, each waiting for its
//! commit before its next message.
//!
//! Time is counted in messages: most are delivered a few hundred messages after they came; a share is deferred several
//! times and delivered when [`Plan::kept`] newer ones have come. So the number of live messages is stable at any speed,
//! and hours of deferral take seconds. A message that the full spool refused counts as come: time passes for the others
//! all the same, and their delivery is what makes room again.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use postrider_spool::{CommitNumber, MessageId};
use rustix::time::{ClockId, clock_gettime};

use super::driver::{Counters, Driver, Holdings};
use super::mail::{Mail, Turnout};
use crate::interrupt::Interrupt;
use crate::message::Random;
use crate::report::Latencies;

/// What becomes of messages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    /// Of all messages, the share that is deferred.
    pub(super) deferred_share: f64,
    /// How many newer messages come before a deferred one is delivered.
    pub(super) kept: u64,
    /// How often such a message is deferred.
    pub(super) deferrals: u32,
}

impl Plan {
    /// Every message is delivered soon.
    pub(super) const NONE_DEFERRED: Self = Self { deferred_share: 0.0, kept: 0, deferrals: 0 };

    /// A share of all messages is deferred, so many of them at any time.
    pub(super) fn with_live(live: u64, deferred_share: f64, deferrals: u32) -> Self {
        Self { deferred_share, kept: (live as f64 / deferred_share) as u64, deferrals }
    }

    fn interval(&self) -> u64 {
        (self.kept / u64::from(self.deferrals.max(1))).max(1)
    }
}

/// The messages that have no final outcome yet.
#[derive(Debug)]
pub(super) struct Traffic {
    plan: Plan,
    /// Messages that have come.
    clock: u64,
    /// When messages that are not deferred are delivered, in order.
    prompt: VecDeque<(u64, MessageId)>,
    /// When a deferred one is tried again, and how often it will be deferred yet: at first, and after that, each in
    /// order, and while the spool is filled. A heap of them all took as much time as their outcomes.
    first_tries: VecDeque<(u64, MessageId, u32)>,
    retries: VecDeque<(u64, MessageId, u32)>,
    filled: BinaryHeap<Reverse<(u64, MessageId, u32)>>,
    random: Random,
    /// While the spool is filled, the share that is deferred. These come with a part of their time behind them, as
    /// after hours of the same.
    fill_share: Option<f64>,
}

impl Traffic {
    pub(super) fn new(plan: Plan) -> Self {
        Self {
            plan,
            clock: 0,
            prompt: VecDeque::new(),
            first_tries: VecDeque::new(),
            retries: VecDeque::new(),
            filled: BinaryHeap::new(),
            random: Random::new(SEED),
            fill_share: None,
        }
    }

    pub(super) fn deferred(&self) -> u64 {
        (self.first_tries.len() + self.retries.len() + self.filled.len()) as u64
    }

    fn is_empty(&self) -> bool {
        self.prompt.is_empty() && self.deferred() == 0
    }

    /// A message is durable.
    fn enter(&mut self, id: MessageId) {
        if self.random.unit() >= self.fill_share.unwrap_or(self.plan.deferred_share) {
            self.prompt.push_back((self.clock + PROMPT_DELAY, id));
            return;
        }
        let interval = self.plan.interval();
        if self.fill_share.is_some() {
            let left = (self.random.unit() * self.plan.kept as f64) as u64;
            self.filled.push(Reverse((self.clock + left % interval, id, (left / interval) as u32)));
        } else {
            self.first_tries.push_back((self.clock + PROMPT_DELAY, id, self.plan.deferrals));
        }
    }

    /// The deferred message that is tried next.
    fn next_try(&self) -> Option<(u64, MessageId, u32)> {
        let filled = self.filled.peek().map(|Reverse(tried)| tried);
        self.first_tries.front().into_iter().chain(self.retries.front()).chain(filled).min().copied()
    }

    /// The next outcome that is due.
    fn due(&self) -> Option<(MessageId, Turnout)> {
        if let Some((due, id)) = self.prompt.front()
            && *due <= self.clock
        {
            return Some((*id, Turnout::Delivered));
        }
        let (due, id, left) = self.next_try()?;
        let turnout = if left > 0 { Turnout::Deferred } else { Turnout::Delivered };
        (due <= self.clock).then_some((id, turnout))
    }

    /// The outcome that was due has been appended.
    fn pass(&mut self) {
        let clock = self.clock;
        if self.prompt.pop_front_if(|(due, _)| *due <= clock).is_some() {
            return;
        }
        let Some(tried) = self.next_try() else { return };
        let queues = [&mut self.first_tries, &mut self.retries];
        if queues.into_iter().all(|queue| queue.pop_front_if(|front| *front == tried).is_none()) {
            self.filled.pop();
        }
        let (due, id, left) = tried;
        if left > 0 {
            // All wait as long, so they stay in order.
            self.retries.push_back((due + self.plan.interval(), id, left - 1));
        }
    }

    /// The spool is full of what was planned: from here on, what it was filled with waits in order with the rest.
    fn end_fill(&mut self) {
        self.fill_share = None;
        self.retries.extend(self.filled.drain().map(|Reverse(tried)| tried));
        self.retries.make_contiguous().sort_unstable();
    }

    /// Everything is delivered at once.
    fn hasten(&mut self) {
        let queues = self.first_tries.drain(..).chain(self.retries.drain(..));
        let deferred = queues.chain(self.filled.drain().map(|Reverse(tried)| tried));
        self.prompt.extend(deferred.map(|(_, id, _)| (0, id)));
        self.prompt.iter_mut().for_each(|(due, _)| *due = 0);
    }
}

/// How messages come, and until when.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) writers: usize,
    /// Messages a second; `None`: each writer appends its next when the last is durable.
    pub(super) rate: Option<f64>,
    /// Whether messages get their outcomes meanwhile, or wait for [`Bench::settle`].
    pub(super) with_outcomes: bool,
    pub(super) until: Until,
}

/// A phase ends when any of these is reached.
#[derive(Debug, Clone, Copy)]
pub(super) struct Until {
    pub(super) messages: u64,
    pub(super) time: Duration,
    /// Deferred messages there are.
    pub(super) deferred: u64,
}

impl Until {
    pub(super) const NEVER: Self = Self { messages: u64::MAX, time: Duration::MAX, deferred: u64::MAX };
}

/// What a phase found.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    pub(super) messages: u64,
    /// Times that a writer was told that the spool takes none.
    pub(super) refused: u64,
    pub(super) elapsed: Duration,
    /// Of the whole process, the kernel's workers included.
    pub(super) cpu: Duration,
    /// From an append, or from the first try at it, until it is durable.
    pub(super) latencies: Latencies,
    pub(super) counters: Counters,
}

impl Found {
    pub(super) fn add(&mut self, other: &Self) {
        self.messages += other.messages;
        self.refused += other.refused;
        self.elapsed += other.elapsed;
        self.cpu += other.cpu;
        self.latencies.add(&other.latencies);
        self.counters.commits += other.counters.commits;
        self.counters.written_bytes += other.counters.written_bytes;
    }

    pub(super) fn per_second(&self) -> f64 {
        self.messages as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    pub(super) fn cpu_us_each(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.messages.max(1) as f64
    }
}

/// A spool under measurement.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    pub(super) driver: Driver,
    pub(super) traffic: Traffic,
    pub(super) mail: Mail,
    pub(super) interrupt: &'a Interrupt,
}

impl Bench<'_> {
    pub(super) async fn run(&mut self, load: &Load) -> Result<Found> {
        let counters = self.driver.counters();
        let cpu = process_cpu();
        let begun = Instant::now();
        let mut writers = Writers::new(load.writers);
        let mut found = Found::default();
        let mut retry_at = begun;
        loop {
            self.interrupt.check()?;
            let now = Instant::now();
            let come = writers.appended + found.refused;
            let is_over = writers.appended >= load.until.messages
                || now - begun >= load.until.time
                || self.traffic.deferred() >= load.until.deferred;
            let due = load.rate.map_or(u64::MAX, |rate| ((now - begun).as_secs_f64() * rate) as u64);
            let wanted = (load.until.messages - writers.appended.min(load.until.messages))
                .min(due.saturating_sub(come))
                .min(writers.idle() as u64);
            if !is_over && now >= retry_at {
                for left in (0..wanted).rev() {
                    let Some((id, commit)) = self.driver.append(&mut self.mail)? else {
                        found.refused += left + 1;
                        self.traffic.clock += left + 1;
                        writers.refused_since.get_or_insert(now);
                        retry_at = now + RETRY_PAUSE;
                        self.check_stall(&writers, now)?;
                        break;
                    };
                    writers.wait(id, commit, now);
                    self.traffic.clock += 1;
                }
            }
            if is_over && writers.waiting.is_empty() {
                break;
            }
            let next = load.rate.map(|rate| begun + Duration::from_secs_f64((come + 1) as f64 / rate));
            let until = if retry_at > now { Some(retry_at) } else { next.filter(|_| !is_over) };
            // An engine hears what became of earlier messages while a commit runs, too.
            self.driver.send_off().await?;
            if load.with_outcomes {
                self.append_outcomes()?;
            }
            self.driver.turn(until).await?;
            let now = Instant::now();
            while let Some((id, since)) = writers.released(self.driver.durable()) {
                found.latencies.record(now - since);
                self.traffic.enter(id);
            }
        }
        found.messages = writers.appended;
        found.elapsed = begun.elapsed();
        found.cpu = process_cpu().saturating_sub(cpu);
        found.counters = self.driver.counters().since(&counters);
        Ok(found)
    }

    /// Fills and empties so many bytes of segments, so that later phases find them used before.
    pub(super) async fn warm_up(&mut self, bytes: u64) -> Result<()> {
        let until = Until { messages: bytes / self.mail.message_bytes(), ..Until::NEVER };
        self.run(&Load { writers: FILL_WRITERS, rate: None, with_outcomes: false, until }).await?;
        self.settle().await
    }

    /// Fills the spool until so many deferred messages are in it, as after hours of the planned traffic. They are
    /// `share` of all that is appended, the rest being dead soon.
    pub(super) async fn fill(&mut self, live: u64, share: f64) -> Result<()> {
        self.traffic.fill_share = Some(share);
        let until = Until { deferred: live, ..Until::NEVER };
        self.run(&Load { writers: FILL_WRITERS, rate: None, with_outcomes: true, until }).await?;
        self.traffic.end_fill();
        Ok(())
    }

    /// Delivers everything, and waits until its segments can be used again.
    pub(super) async fn settle(&mut self) -> Result<()> {
        self.traffic.hasten();
        while !self.traffic.is_empty() || self.driver.has_uncommitted() {
            self.interrupt.check()?;
            self.append_outcomes()?;
            self.driver.turn(Some(Instant::now() + RETRY_PAUSE)).await?;
        }
        self.driver.rest().await
    }

    /// A spool that is too small for what lives in it never takes mail again.
    fn check_stall(&self, writers: &Writers, now: Instant) -> Result<()> {
        let is_stalled = writers.refused_since.is_some_and(|since| now - since > STALL_PATIENCE);
        let Holdings { live_messages, live_bytes, used_bytes } = self.driver.holdings();
        ensure!(
            !is_stalled,
            "the spool took no mail for {STALL_PATIENCE:?}: {live_messages} live messages with {live_bytes} bytes keep \
             {used_bytes} bytes in use"
        );
        Ok(())
    }

    fn append_outcomes(&mut self) -> Result<()> {
        for _ in 0..OUTCOMES_MAX {
            let Some((id, turnout)) = self.traffic.due() else { break };
            if !self.driver.append_outcome(&mut self.mail, id, turnout)? {
                break;
            }
            self.traffic.pass();
        }
        Ok(())
    }
}

/// Who has appended and waits for the commit, in commit order.
#[derive(Debug)]
struct Writers {
    count: usize,
    waiting: VecDeque<(CommitNumber, MessageId, Instant)>,
    appended: u64,
    refused_since: Option<Instant>,
}

impl Writers {
    fn new(count: usize) -> Self {
        Self { count, waiting: VecDeque::with_capacity(count), appended: 0, refused_since: None }
    }

    fn idle(&self) -> usize {
        self.count - self.waiting.len()
    }

    fn wait(&mut self, id: MessageId, commit: CommitNumber, now: Instant) {
        self.waiting.push_back((commit, id, self.refused_since.take().unwrap_or(now)));
        self.appended += 1;
    }

    fn released(&mut self, durable: CommitNumber) -> Option<(MessageId, Instant)> {
        self.waiting.pop_front_if(|(commit, ..)| *commit <= durable).map(|(_, id, since)| (id, since))
    }
}

/// User and system time of all threads, to the nanosecond.
pub(super) fn process_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

const SEED: u64 = 1;
/// An attempt ends so many messages after its message came.
const PROMPT_DELAY: u64 = 500;
const FILL_WRITERS: usize = 512;
/// Outcomes in one turn: commits must go out between.
const OUTCOMES_MAX: usize = 4_096;
/// How long a writer waits after the spool took nothing.
const RETRY_PAUSE: Duration = Duration::from_millis(1);
const STALL_PATIENCE: Duration = Duration::from_secs(120);
