//! A log on a simulated disk beside a model of what it must hold.
//!
//! The model is a list of what was appended, by commit. What is recovered from a disk must be what one of few prefixes
//! of it says: everything up to the last durable commit, and either nothing or all of the one commit that was in
//! flight.
//!
//! Over 500 lines: one model, all steps that change it, and all that is held against it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::checkpoint_format::{CheckpointBlock, CheckpointHeader};
use postrider_spool::limits::SPARES_RESERVED;
use postrider_spool::record::{Answer, CommitNumber};
use postrider_spool::sim::{Faults, SimDisk};
use postrider_spool::{
    AppendError, BodyId, Completion, Envelope, Fate, Fetch, Log, LogDirectory, MessageId, Operation, Outcome, Progress,
    ReadError, Recipient, RecipientResult, RecordRef, RecoverOptions, Recovered, Sequence, Spool, SpoolOptions,
    Summarize, execute,
};

/// A generator of random numbers that is the same everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    pub(crate) fn one_in(&mut self, number: u64) -> bool {
        self.below(number) == 0
    }
}

/// What was appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Appended {
    Message { id: MessageId, recipients: u32, content: Content },
    Outcome { sequence: Sequence, id: MessageId, results: Vec<(u32, Fate, u32)> },
}

impl Appended {
    fn sequence(&self) -> u64 {
        match self {
            Self::Message { id, .. } => id.sequence().0,
            Self::Outcome { sequence, .. } => sequence.0,
        }
    }
}

/// What is sent: so many octets of prefix, and so many of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Content {
    prefix: usize,
    body: usize,
    fill: u8,
}

/// A live message as the model has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) content: Content,
    /// Attempts and due time of each pending recipient that has been deferred.
    pub(crate) pending: BTreeMap<u32, Option<(u32, u64)>>,
}

pub(crate) type Model = BTreeMap<MessageId, Live>;

pub(crate) fn apply(model: &mut Model, appended: &Appended) {
    match appended {
        Appended::Message { id, recipients, content } => {
            let pending = (0..*recipients).map(|index| (index, None)).collect();
            model.insert(*id, Live { content: *content, pending });
        }
        Appended::Outcome { id, results, .. } => {
            let Some(live) = model.get_mut(id) else { return };
            for (index, fate, attempts) in results {
                match fate {
                    Fate::Deferred { due_ms } => {
                        if let Some(state) = live.pending.get_mut(index) {
                            *state = Some((*attempts, *due_ms));
                        }
                    }
                    _ => {
                        live.pending.remove(index);
                    }
                }
            }
            if live.pending.is_empty() {
                model.remove(id);
            }
        }
    }
}

/// What the log's owner tells of its messages in checkpoints: what the model knows at that moment. Of every third
/// message it tells nothing.
struct Summaries<'a> {
    durable: &'a Model,
    pending: &'a [(CommitNumber, Appended)],
    /// Made when it is first asked for.
    model: Option<Model>,
}

impl Summarize for Summaries<'_> {
    fn begin(&mut self) {}

    fn summarize(&mut self, id: MessageId, handle: u32, summary: &mut Vec<u8>) {
        assert_eq!(handle, handle_of(id), "{id}");
        if id.sequence().0.is_multiple_of(3) {
            return;
        }
        let model = self.model.get_or_insert_with(|| expected(self.durable, self.pending));
        let Live { content: Content { prefix, body, fill }, pending } = &model[&id];
        summary.extend((*prefix as u32).to_le_bytes());
        summary.extend((*body as u32).to_le_bytes());
        summary.push(*fill);
        for (index, state) in pending {
            let (attempts, due_ms) = state.unwrap_or((0, 0));
            summary.extend(index.to_le_bytes());
            summary.extend(attempts.to_le_bytes());
            summary.extend(due_ms.to_le_bytes());
        }
    }
}

/// What a summary told.
fn summarized(summary: &[u8]) -> Live {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let mut pending = BTreeMap::new();
    for state in summary[9..].chunks_exact(16) {
        let attempts = number(&state[4..8]) as u32;
        pending.insert(number(&state[..4]) as u32, (attempts > 0).then_some((attempts, number(&state[8..]))));
    }
    let (prefix, body) = (number(&summary[..4]) as usize, number(&summary[4..8]) as usize);
    Live { content: Content { prefix, body, fill: summary[8] }, pending }
}

fn handle_of(id: MessageId) -> u32 {
    id.sequence().0 as u32 ^ 0x5a5a
}

/// All that is live if everything pending becomes durable.
fn expected(durable: &Model, pending: &[(CommitNumber, Appended)]) -> Model {
    let mut model = durable.clone();
    for (_, appended) in pending {
        apply(&mut model, appended);
    }
    model
}

/// What recovery told.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) model: Model,
    pub(crate) sequences: Vec<u64>,
    pub(crate) cuts: usize,
    pub(crate) summaries: u64,
    pub(crate) quarantines: Vec<String>,
}

pub(crate) struct World {
    pub(crate) disk: SimDisk,
    pub(crate) options: SpoolOptions,
    spool: Option<Spool>,
    log: Option<Log>,
    pub(crate) random: Random,
    pub(crate) now: Duration,
    /// Durable: the model, and the sequences behind the event cursor.
    pub(crate) durable: Model,
    pub(crate) events: Vec<u64>,
    pub(crate) cursor: u64,
    /// Appended, not durable.
    pub(crate) pending: Vec<(CommitNumber, Appended)>,
    /// Of a commit that failed: it may be found after a restart, or not, until the log has been reopened.
    pub(crate) failed: Option<Vec<Appended>>,
    pub(crate) operations: Vec<Operation>,
    pub(crate) reads: BTreeSet<MessageId>,
    pub(crate) pins: Vec<MessageId>,
    /// Bodies that this process appended, and that are not known to be gone.
    bodies: Vec<SharedBody>,
    /// Messages of this process that share one.
    shares: BTreeMap<MessageId, BodyId>,
    /// The highest numbers that were ever acknowledged: they are not given out again.
    last_sequence: u64,
    last_commit: CommitNumber,
    pub(crate) images: u64,
    pub(crate) seen: Seen,
    /// The disk's, also after the power went.
    capacity: Option<u64>,
    faults: Faults,
    /// Octets of copies that had been appended when it was last looked.
    copied: u64,
    /// Whether what is rare fails more often than the rest.
    pub(crate) strikes: bool,
    /// Whether images are looked at where files begin.
    pub(crate) looks: bool,
}

struct SharedBody {
    id: BodyId,
    commit: CommitNumber,
    bytes: usize,
    fill: u8,
    is_held: bool,
}

/// What happened, so that a test can tell that it tested something.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) copies: u64,
    pub(crate) retired: u64,
    pub(crate) given_up: u64,
    pub(crate) failures: u64,
    pub(crate) reopened: u64,
    pub(crate) cuts: u64,
    pub(crate) refused: u64,
    pub(crate) flights_found: u64,
    pub(crate) checkpoints: u64,
    pub(crate) summaries: u64,
    pub(crate) shared: u64,
}

pub(crate) const PATH: &str = "/spool";

impl World {
    pub(crate) fn new(seed: u64, options: SpoolOptions) -> Self {
        let mut world = Self {
            disk: SimDisk::new(seed),
            options,
            spool: None,
            log: None,
            random: Random(seed),
            now: Duration::ZERO,
            durable: Model::new(),
            events: Vec::new(),
            cursor: 0,
            pending: Vec::new(),
            failed: None,
            operations: Vec::new(),
            reads: BTreeSet::new(),
            pins: Vec::new(),
            bodies: Vec::new(),
            shares: BTreeMap::new(),
            last_sequence: 0,
            last_commit: CommitNumber(0),
            images: 0,
            seen: Seen::default(),
            capacity: None,
            faults: Faults::default(),
            copied: 0,
            strikes: false,
            looks: false,
        };
        let found = world.open();
        assert!(found.model.is_empty());
        world
    }

    pub(crate) fn log(&mut self) -> &mut Log {
        self.log.as_mut().unwrap()
    }

    fn open(&mut self) -> Found {
        let seed = self.random.below(1 << 30);
        let (spool, log, found) = open(&self.disk, self.options, seed, self.cursor);
        self.spool = Some(spool);
        self.log = Some(log);
        found
    }

    fn close(&mut self) {
        let statistics = self.log().statistics();
        self.seen.copies += statistics.messages_copied;
        self.seen.retired += statistics.segments_retired;
        self.seen.given_up += statistics.segments_given_up;
        self.seen.failures += statistics.write_failures;
        self.seen.checkpoints += statistics.checkpoints;
        assert_eq!(statistics.damaged, 0, "what is there has been read as something else");
        self.log = None;
        self.spool = None;
        self.operations.clear();
        self.reads.clear();
        self.pins.clear();
        self.bodies.clear();
        self.shares.clear();
        self.copied = 0;
    }

    pub(crate) fn append_message(&mut self, recipients: u32, length: usize) -> bool {
        let fill = if length == 0 { 0 } else { self.random.below(256) as u8 };
        let prefix = vec![b'P'; length / 10];
        let body = vec![fill; length - prefix.len()];
        let spares = self.log().statistics().segments_spare;
        match self.log().append_message(&envelope(recipients), &prefix, &body) {
            Ok((id, commit)) => {
                let content = Content { prefix: prefix.len(), body: body.len(), fill };
                self.note_message(id, commit, recipients, content);
                let left = self.log().statistics().segments_spare;
                assert!(left == spares || left >= SPARES_RESERVED as u64, "mail has taken what outcomes need");
                true
            }
            Err(AppendError::TooLarge { .. }) => {
                assert!(length as u64 + 400 + u64::from(recipients) * 40 > self.options.segment_bytes - 4096);
                false
            }
            Err(AppendError::Full(_) | AppendError::Failed) => {
                self.seen.refused += 1;
                false
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn note_message(&mut self, id: MessageId, commit: CommitNumber, recipients: u32, content: Content) {
        assert_eq!(self.log().set_handle(id, handle_of(id)), recipients > 0);
        assert!(id.sequence().0 > self.last_sequence);
        assert!(commit > self.last_commit);
        self.pending.push((commit, Appended::Message { id, recipients, content }));
    }

    /// A body for messages to share, held for now.
    pub(crate) fn append_body(&mut self, bytes: usize) {
        let fill = if bytes == 0 { 0 } else { 1 + self.random.below(255) as u8 };
        match self.log().append_body(&vec![fill; bytes]) {
            Ok((id, commit)) => self.bodies.push(SharedBody { id, commit, bytes, fill, is_held: true }),
            Err(AppendError::TooLarge { .. }) => assert!(bytes as u64 + 200 > self.options.segment_bytes - 4096),
            Err(AppendError::Full(_) | AppendError::Failed) => self.seen.refused += 1,
            Err(error) => panic!("{error}"),
        }
    }

    /// A message with one of the bodies; one that nobody holds any more may be gone.
    pub(crate) fn append_sharing(&mut self, recipients: u32) {
        if self.bodies.is_empty() {
            return;
        }
        let position = self.random.below(self.bodies.len() as u64) as usize;
        let SharedBody { id: body, bytes, fill, is_held, .. } = self.bodies[position];
        let prefix = vec![b'P'; self.random.below(100) as usize];
        match self.log().append_message_sharing(&envelope(recipients), &prefix, body) {
            Ok((id, commit)) => {
                self.seen.shared += 1;
                let is_named = self.expected().keys().any(|id| self.shares.get(id) == Some(&body));
                assert!(is_held || is_named || !self.reads.is_empty(), "{body} is gone");
                self.shares.insert(id, body);
                self.note_message(id, commit, recipients, Content { prefix: prefix.len(), body: bytes, fill });
            }
            Err(AppendError::UnknownBody) => {
                assert!(!is_held, "{body} is held");
                self.bodies.swap_remove(position);
            }
            Err(AppendError::Full(_) | AppendError::Failed) => self.seen.refused += 1,
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn release_body(&mut self) {
        if let Some(position) = self.bodies.iter().position(|body| body.is_held) {
            self.bodies[position].is_held = false;
            let body = self.bodies[position].id;
            self.log().release_body(body);
        }
    }

    pub(crate) fn expected(&self) -> Model {
        expected(&self.durable, &self.pending)
    }

    /// Some recipients of some message get a fate.
    pub(crate) fn append_outcome(&mut self, final_in_ten: u64) -> bool {
        let expected = self.expected();
        if expected.is_empty() {
            return false;
        }
        let position = match self.random.below(3) {
            0 => 0,
            _ => self.random.below(expected.len() as u64) as usize,
        };
        let (id, live) = expected.iter().nth(position).unwrap();
        let mut results = Vec::new();
        for (index, state) in &live.pending {
            if !results.is_empty() && self.random.one_in(2) {
                continue;
            }
            let attempts = state.map_or(1, |(attempts, _)| attempts + 1);
            let fate = if self.random.below(10) < final_in_ten {
                [Fate::Delivered, Fate::Bounced, Fate::Expired][self.random.below(3) as usize]
            } else {
                Fate::Deferred { due_ms: self.random.below(1 << 30) }
            };
            results.push((*index, fate, attempts));
        }
        let outcome = outcome(*id, &results);
        match self.log().append_outcome(&outcome) {
            Ok((sequence, commit)) => {
                self.pending.push((commit, Appended::Outcome { sequence, id: *id, results }));
                true
            }
            Err(AppendError::Full(_) | AppendError::Failed) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// The message that so many newer ones follow is delivered.
    pub(crate) fn deliver_behind(&mut self, newer: usize) {
        let id = self.expected().keys().rev().nth(newer).copied();
        if let Some(id) = id {
            self.deliver(id);
        }
    }

    /// Every recipient of the message that is pending gets a final fate.
    fn deliver(&mut self, id: MessageId) {
        let pending = &self.expected()[&id].pending;
        let results: Vec<_> = pending.keys().map(|index| (*index, Fate::Delivered, 9)).collect();
        if let Ok((sequence, commit)) = self.log().append_outcome(&outcome(id, &results)) {
            self.pending.push((commit, Appended::Outcome { sequence, id, results }));
        }
    }

    pub(crate) fn poll(&mut self) {
        let mut summaries = Summaries { durable: &self.durable, pending: &self.pending, model: None };
        while let Some(operation) = self.log.as_mut().unwrap().poll_operation(self.now, &mut summaries) {
            self.operations.push(operation);
        }
    }

    /// Executes one of the operations that are out. With `images`, crash images are looked at just before a write
    /// returns.
    pub(crate) fn step(&mut self, images: u64) {
        self.poll();
        if self.operations.is_empty() {
            return;
        }
        let copied = self.log().statistics().bytes_copied;
        let has_copied = copied > self.copied;
        self.copied = copied;
        if has_copied {
            self.read_all();
        }
        let position = self.random.below(self.operations.len() as u64) as usize;
        let operation = self.operations.swap_remove(position);
        let is_write = operation.describe().0 == "write";
        // Copies, tombstones, headers that are covered and seals of checkpoints are rare among all that is written.
        let is_rare = has_copied || operation.describe() == ("write", 4096) && self.random.one_in(5);
        if self.strikes && is_rare && self.random.one_in(4) && self.faults == Faults::default() {
            let sectors_written = [0, 5, 1_000][self.random.below(3) as usize];
            self.set_faults(Faults { operations_left: Some(0), sectors_written, ..Faults::default() });
        }
        let failures = self.disk.failures();
        let before = self.log().statistics();
        let durable = self.log().durable();
        self.disk.hold_syncs(is_write && self.looks);
        let completion = execute(operation);
        if is_write && self.looks {
            // The begin of a file is the begin of its use, or the end, or what makes a checkpoint count.
            let images = if self.disk.last_write() == 0 { images.max(self.random.below(3)) } else { images };
            for _ in 0..images {
                self.look_at_image();
            }
            self.disk.hold_syncs(false);
        }
        assert_eq!(self.disk.unsynced(), 0, "what was written is not durable");
        self.complete(completion);
        let after = self.log().statistics();
        if self.disk.failures() > failures {
            assert_eq!(self.log().durable(), durable);
            assert_eq!(after.checkpoints, before.checkpoints);
            assert_eq!(after.segments_given_up, before.segments_given_up);
            assert!(!self.faults.is_interruption || after.write_failures == before.write_failures);
        }
        assert_eq!(self.spool.as_ref().unwrap().used_bytes(), after.used_bytes);
        self.log().audit();
    }

    fn complete(&mut self, completion: Completion) {
        let now = self.now;
        match self.log().handle_completion(now, completion) {
            Progress::Nothing | Progress::NotMade { .. } => {}
            Progress::Damaged { id, error } => panic!("{id}: {error}"),
            Progress::Durable(commit) => self.acknowledge(commit),
            Progress::Reopened => {
                self.failed = None;
                self.seen.reopened += 1;
            }
            Progress::Failed { .. } => {
                let durable = self.log().durable();
                self.bodies.retain(|body| body.commit <= durable);
                // Only the first of them was under way.
                let first = self.pending.first().map(|(commit, _)| *commit);
                let flight = self.pending.drain(..).filter(|(commit, _)| Some(*commit) == first);
                let flight: Vec<Appended> = flight.map(|(_, appended)| appended).collect();
                if self.failed.is_none() {
                    self.failed = Some(flight);
                }
            }
            Progress::Read { id, result } => {
                self.reads.remove(&id);
                if let Some(live) = self.durable.get(&id) {
                    check_content(&result.unwrap(), live);
                }
            }
        }
    }

    fn acknowledge(&mut self, commit: CommitNumber) {
        assert_eq!(self.log().durable(), commit);
        while self.pending.first().is_some_and(|(number, _)| *number <= commit) {
            let (_, appended) = self.pending.remove(0);
            self.events.push(appended.sequence());
            apply(&mut self.durable, &appended);
            self.last_sequence = self.last_sequence.max(appended.sequence());
        }
        self.last_commit = commit;
    }

    /// Lets everything settle that does not wait for time to pass.
    pub(crate) fn settle(&mut self) {
        loop {
            self.poll();
            if self.operations.is_empty() {
                break;
            }
            self.step(0);
        }
    }

    pub(crate) fn advance(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }

    pub(crate) fn move_cursor(&mut self) {
        if let Some(last) = self.events.last().copied() {
            self.cursor = last;
            self.events.clear();
            self.log().set_event_cursor(Sequence(last));
        }
    }

    pub(crate) fn read_one(&mut self) {
        if self.durable.is_empty() {
            return;
        }
        let position = self.random.below(self.durable.len() as u64) as usize;
        let (id, live) = self.durable.iter().nth(position).map(|(id, live)| (*id, live.clone())).unwrap();
        let gone = !self.expected().contains_key(&id);
        match self.log().message(id) {
            Ok(Fetch::Ready(message)) => check_content(&message, &live),
            Ok(Fetch::Read(operation)) => {
                self.reads.insert(id);
                self.operations.push(operation);
            }
            Err(error) => assert!(gone, "{id}: {error}"),
        }
    }

    /// Whatever is durable can be read, and before anything else happens on the disk.
    pub(crate) fn read_all(&mut self) {
        let expected = self.expected();
        for (id, live) in self.durable.clone() {
            let mut operation = match self.log().message(id) {
                Ok(Fetch::Ready(message)) => {
                    check_content(&message, &live);
                    continue;
                }
                Ok(Fetch::Read(operation)) => operation,
                Err(ReadError::Busy) => return,
                Err(error) => {
                    assert!(!expected.contains_key(&id), "{id}: {error}");
                    continue;
                }
            };
            let now = self.now;
            loop {
                match self.log().handle_completion(now, execute(operation)) {
                    Progress::Read { id: read, result } if read == id => break check_content(&result.unwrap(), &live),
                    // What was read for before waited for the body that it shares.
                    Progress::Read { id: other, .. } => _ = self.reads.remove(&other),
                    _ => {}
                }
                operation = self.log().poll_read().unwrap();
            }
        }
    }

    pub(crate) fn pin_one(&mut self) {
        let id = self.durable.keys().next().copied();
        if let Some(id) = id.filter(|id| self.log().is_live(*id)) {
            self.log().pin(id);
            self.pins.push(id);
        }
    }

    pub(crate) fn unpin_one(&mut self) {
        if let Some(id) = self.pins.pop() {
            self.log().unpin(id);
        }
    }

    pub(crate) fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
        self.disk.set_faults(Faults { capacity: faults.capacity.or(self.capacity), ..faults });
    }

    /// Whether the disk has room for new files from now on.
    pub(crate) fn set_full(&mut self, is_full: bool) {
        self.capacity = is_full.then_some(0);
        self.set_faults(Faults::default());
    }

    /// Everything is delivered, however full the disk is, and then mail is taken again: a full spool can always empty.
    pub(crate) fn empty(&mut self) {
        self.strikes = false;
        self.set_faults(Faults::default());
        self.log().begin_reopen();
        while !self.pins.is_empty() {
            self.unpin_one();
        }
        (0..self.bodies.len()).for_each(|_| self.release_body());
        let mut rests = 0;
        loop {
            self.settle();
            self.move_cursor();
            // What makes room is spread over time.
            self.advance(5);
            let expected = self.expected();
            let is_idle = expected.is_empty() && self.log().is_open_for_mail().is_ok();
            if is_idle {
                return self.pass_by();
            }
            let id = match expected.keys().nth(self.random.below(expected.len().max(1) as u64) as usize) {
                Some(id) if self.log().is_open_for_outcomes().is_ok() => *id,
                _ => {
                    rests += 1;
                    assert!(rests < 2_000, "it never empties: {:?}", self.log().statistics());
                    self.advance(20);
                    continue;
                }
            };
            self.deliver(id);
        }
    }

    /// Mail that is delivered at once passes by, and with it goes all that was there before.
    fn pass_by(&mut self) {
        let retired = self.log().statistics().segments_retired;
        // With room left, nothing has to be used again at first.
        for number in 0..300 {
            if number >= 60 && self.log().statistics().segments_retired > retired {
                break;
            }
            self.append_message(1, 4_000);
            if let Some(id) = self.expected().keys().next().copied() {
                self.deliver(id);
            }
            self.settle();
            self.move_cursor();
            self.advance(60);
        }
        assert!(self.expected().is_empty());
        let statistics = self.log().statistics();
        assert!(statistics.segments_retired > retired);
        let counts = (statistics.live_messages, statistics.live_bytes, statistics.pending_bytes);
        assert_eq!(counts, (0, 0, 0));
    }

    /// What may be found now, most probable first, with the sequences behind the event cursor.
    fn possibilities(&mut self) -> Vec<(Model, Vec<u64>)> {
        let mut found = vec![(self.durable.clone(), self.events.clone())];
        let flight = match &self.failed {
            Some(failed) => failed.clone(),
            None => {
                let first = self.pending.first().map(|(commit, _)| *commit);
                let flight = self.pending.iter().filter(|(commit, _)| Some(*commit) == first);
                flight.map(|(_, appended)| appended.clone()).collect()
            }
        };
        let (mut model, mut events) = found[0].clone();
        for appended in &flight {
            apply(&mut model, appended);
            events.push(appended.sequence());
        }
        found.push((model, events));
        found
    }

    fn check(&mut self, found: &Found) -> (Model, Vec<u64>) {
        assert!(found.quarantines.is_empty(), "{:?}", found.quarantines);
        self.seen.cuts += found.cuts as u64;
        self.seen.summaries += found.summaries;
        let possible = self.possibilities();
        for (position, (model, events)) in possible.iter().enumerate() {
            self.seen.flights_found += u64::from(position == 1);
            if *model == found.model {
                assert!(found.sequences == *events || possible[0].0 == possible[1].0, "{found:?} {events:?}");
                return (model.clone(), found.sequences.clone());
            }
        }
        panic!("recovered {:#?}\nexpected one of {possible:#?}", found.model);
    }

    /// Recovers from a crash image, and from a crash image of what that recovery left. Whoever checks everything, or
    /// can't write, or can't read the newest checkpoint, finds the same.
    pub(crate) fn look_at_image(&mut self) {
        self.images += 1;
        let image = self.disk.crash(self.random.below(1 << 30));
        let other = image.crash(1);
        let found = self.recover_image(&image);
        self.check(&found);
        let again = self.recover_image(&image.crash(1));
        assert_eq!(again.model, found.model);
        assert_eq!(again.sequences, found.sequences);
        assert!(again.quarantines.is_empty(), "{:?}", again.quarantines);
        let recover = RecoverOptions { event_cursor: Sequence(self.cursor), ..RecoverOptions::default() };
        let capacity = self.capacity;
        let otherwise = match self.random.below(6) {
            0 => recover_with(&other, self.options, RecoverOptions { reads_everything: true, ..recover }, capacity),
            1 => {
                let left = self.random.below(6);
                let faults = Faults { operations_left: Some(left), is_permanent: true, capacity, ..Faults::default() };
                recover_on(&other, self.options, recover, faults);
                recover_with(&other.crash(1), self.options, recover, capacity)
            }
            2 => {
                let is_damaged = damage_checkpoint(&other).is_some();
                let mut otherwise = recover_with(&other, self.options, recover, capacity);
                assert_eq!(otherwise.quarantines.len(), usize::from(is_damaged), "{:?}", otherwise.quarantines);
                otherwise.quarantines.clear();
                otherwise
            }
            _ => return,
        };
        assert_eq!(otherwise.model, found.model);
        assert!(otherwise.quarantines.is_empty(), "{:?}", otherwise.quarantines);
    }

    fn recover_image(&mut self, image: &SimDisk) -> Found {
        image.set_faults(Faults { capacity: self.capacity, ..Faults::default() });
        let seed = self.random.below(1 << 30);
        open(image, self.options, seed, self.cursor).2
    }

    /// The power goes and comes back. The log goes on from what is found.
    pub(crate) fn crash(&mut self) {
        let seed = self.random.below(1 << 30);
        self.restart_on(|disk| disk.crash(seed));
    }

    /// The process dies, and the machine does not.
    pub(crate) fn restart(&mut self) {
        self.restart_on(SimDisk::restart);
    }

    fn restart_on(&mut self, next: impl FnOnce(&SimDisk) -> SimDisk) {
        self.close();
        self.disk = next(&self.disk);
        self.set_faults(Faults::default());
        let found = self.open();
        let (model, events) = self.check(&found);
        // What recovery told is acted upon, so it must be on the medium.
        let image = self.disk.crash(1);
        assert_eq!(self.recover_image(&image).model, model);
        self.durable = model;
        self.events = events;
        self.pending.clear();
        self.failed = None;
    }
}

pub(crate) fn open(disk: &SimDisk, options: SpoolOptions, seed: u64, cursor: u64) -> (Spool, Log, Found) {
    let recover = RecoverOptions { seed, event_cursor: Sequence(cursor), ..RecoverOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new(PATH), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let (log, found) = recover_log(directory, recover);
    (spool, log, found)
}

fn recover_with(disk: &SimDisk, options: SpoolOptions, recover: RecoverOptions, capacity: Option<u64>) -> Found {
    recover_on(disk, options, recover, Faults { capacity, ..Faults::default() })
}

/// On a disk on which something goes wrong meanwhile.
fn recover_on(disk: &SimDisk, options: SpoolOptions, recover: RecoverOptions, faults: Faults) -> Found {
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new(PATH), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    disk.set_faults(faults);
    recover_log(directory, recover).1
}

fn recover_log(directory: LogDirectory, recover: RecoverOptions) -> (Log, Found) {
    let mut found = Found::default();
    let log = Log::recover(directory, recover, &mut |mut recovered| note(&mut found, &mut recovered)).unwrap();
    log.audit();
    (log, found)
}

/// Something in the newest checkpoint that counts is not what was written any more. The path, if there is one.
fn damage_checkpoint(disk: &SimDisk) -> Option<PathBuf> {
    let number = |path: &PathBuf| match CheckpointHeader::decode(&disk.bytes(path)[..4096]) {
        CheckpointBlock::Header(header) if header.slices > 0 => Some(header.number),
        _ => None,
    };
    let files = disk.paths().into_iter().filter(|path| path.to_str().unwrap().contains("checkpoint-"));
    let newest = files.filter(|path| number(path).is_some()).max_by_key(number)?;
    let mut bytes = disk.bytes(&newest);
    bytes[4096 + 20] ^= 1;
    disk.set_bytes(&newest, bytes);
    Some(newest)
}

pub(crate) fn note(found: &mut Found, recovered: &mut Recovered<'_>) {
    match recovered {
        Recovered::Record { sequence, record } => {
            if let RecordRef::Message { id, .. } = record {
                assert_eq!(id.sequence(), *sequence);
            }
            assert!(found.sequences.last().is_none_or(|last| *last < sequence.0));
            found.sequences.push(sequence.0);
        }
        Recovered::Summary { id, summary, pending, handle } => {
            let live = summarized(summary);
            let Some(pending) = pending else { return };
            assert!(pending.iter().eq(live.pending.keys()), "{pending:?} {live:?}");
            // Some owners can't use every summary.
            if id.sequence().0.is_multiple_of(5) {
                return;
            }
            **handle = Some(handle_of(*id));
            found.summaries += 1;
            assert!(found.model.insert(*id, live).is_none());
        }
        Recovered::Held { id, .. } => panic!("{id} is held"),
        Recovered::Message { id, message, pending, results, handle } => {
            **handle = handle_of(*id);
            let content = Content {
                prefix: message.prefix().len(),
                body: message.body().len(),
                fill: message.body().first().copied().unwrap_or_default(),
            };
            let mut live = Live { content, pending: BTreeMap::new() };
            for index in pending.iter() {
                let result = results.iter().find(|result| result.index == *index);
                let state = result.map(|result| match result.fate {
                    Fate::Deferred { due_ms } => (result.attempts, due_ms),
                    fate => panic!("{fate:?} of a pending recipient"),
                });
                live.pending.insert(*index, state);
            }
            assert!(results.iter().all(|result| pending.contains(&result.index)));
            check_content(message, &live);
            assert!(found.model.insert(*id, live).is_none());
        }
        Recovered::Quarantined(quarantine) => found.quarantines.push(quarantine.to_string()),
        Recovered::Cut(_) => found.cuts += 1,
    }
}

fn check_content(message: &postrider_spool::Message, live: &Live) {
    let Content { prefix, body, fill } = live.content;
    let recipients = message.envelope().unwrap().recipients.len();
    assert!(live.pending.keys().all(|index| (*index as usize) < recipients));
    assert_eq!(message.prefix(), vec![b'P'; prefix]);
    assert_eq!(message.body(), vec![fill; body]);
    assert_eq!(message.size() as usize, prefix + body);
}

pub(crate) fn envelope(recipients: u32) -> Envelope {
    Envelope {
        reverse_path: "sender@example.com".into(),
        recipients: (0..recipients).map(|index| Recipient { address: format!("r{index}@example.net") }).collect(),
        ..Envelope::default()
    }
}

pub(crate) fn outcome(id: MessageId, results: &[(u32, Fate, u32)]) -> Outcome {
    let results = results.iter().map(|(index, fate, attempts)| RecipientResult {
        index: *index,
        recipient: format!("r{index}@example.net"),
        queue: "example.net".into(),
        fate: *fate,
        attempts: *attempts,
        answer: Answer { code: 451, enhanced: Some((4, 7, 1)), text: "come again".into(), command: "RCPT".into() },
    });
    Outcome { message: id.to_raw(), results: results.collect(), ..Outcome::default() }
}
