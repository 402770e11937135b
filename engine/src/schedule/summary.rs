//! What the schedule knows of a message, for the spool's checkpoints: a restart reads it in place of the message.
//!
//! A checkpoint has one stream of summaries, one a message. Queues and answers are written in full where the stream
//! first mentions them and by number afterwards; numbers count the definitions from the stream's beginning, so a number
//! never changes its meaning, whatever the home has forgotten or given to others between two slices.
//!
//! ```text
//! summary     entry, as often as there are entries; the spool knows its length
//! entry       queue | answer | recipients | attempts | due | expiry
//! queue       0 | tenant | campaign | domain | pool | priority, 1 byte      defines the next queue
//!             ... | priority + 128 | sender routes, 8 bytes | route        the same where routes ask for senders
//!             n                                                            the n-th queue of the stream, from 1
//! answer      0                                                            none yet
//!             1 | text                                                     defines the next answer
//!             n + 1                                                        the n-th answer of the stream, from 1
//! recipients  count | first index | distance of each further one from the one before
//! attempts    number
//! due         number: Unix milliseconds
//! expiry      milliseconds behind the due time, zigzag: 0, -1, 1, -2, .. are 0, 1, 2, 3, ..
//! route       0: its domain's; else one more than the place of the route with a `match` that it takes
//! text        length in octets | UTF-8; tenant, campaign, domain and pool are texts
//! ```
//!
//! Each number is LEB128: seven bits a byte, the lowest first, the top bit set where more follow. A deferred message
//! with one recipient takes 16 to 20 bytes.
//!
//! Which route with a `match` a message takes depends on its sender, which no summary tells. So a queue has the choice
//! beside a digest of all that decides it; with other such routes the message is read, and its sender decides anew.
//! Where no route asks for senders now, what a queue is made of is enough.
//!
//! The bytes come from a disk under a checksum. What is wrong with them all the same is a [`SummaryError`], and the
//! message itself is read instead.
//!
//! Over 500 lines: writing and reading mirror each other.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use postrider_spool::record::MessageId;

use super::answer::{AnswerId, Identity};
use super::entry::NewEntry;
use super::queue::{EntryKey, Home, QueueKey, QueueParts};
use crate::config::{Config, MatchedRoute, RoutedMail};
use crate::mail::address::ascii_domain;

/// Writes a stream of summaries. Every checkpoint of every log is a stream of its own.
#[derive(Debug, Default)]
pub struct SummaryWriter {
    queues: Numbers,
    queues_defined: u64,
    answers: Numbers,
    /// Queues' last answers, for the entries that have none of their own.
    queue_answers: Numbers,
    answers_defined: u64,
    /// [`Config::sender_routes`].
    sender_routes: Option<u64>,
}

impl SummaryWriter {
    pub fn new(sender_routes: Option<u64>) -> Self {
        Self { sender_routes, ..Self::default() }
    }

    /// A stream begins. So it must after a summary that did not get into its stream: later ones may rely on it.
    pub fn begin(&mut self) {
        *self = Self::new(self.sender_routes);
    }

    /// Appends what is known of a message, of which `first` is any entry. What is out with an intent on record is told
    /// as that record has it.
    pub fn summarize(&mut self, home: &Home, first: EntryKey, out: &mut Vec<u8>) {
        for key in home.entries_of(first) {
            let entry = home.entry(key);
            let Some(intent) = home.intent_of(key) else {
                self.put_entry(home, key, entry.recipients, out);
                continue;
            };
            self.put_queue(home, key, out);
            self.answers_defined += 1;
            put_number(out, DEFINE_ANSWER);
            put_text(out, &intent.answer);
            put_recipients(intent.recipients.iter().copied(), out);
            put_state(entry.attempts + 1, entry.expires_ms, entry.expires_ms, out);
            let others: Vec<u32> =
                entry.recipients.filter(|index| intent.recipients.binary_search(index).is_err()).collect();
            if !others.is_empty() {
                self.put_entry(home, key, others.into_iter(), out);
            }
        }
    }

    fn put_entry(
        &mut self,
        home: &Home,
        key: EntryKey,
        recipients: impl ExactSizeIterator<Item = u32>,
        out: &mut Vec<u8>,
    ) {
        let entry = home.entry(key);
        self.put_queue(home, key, out);
        match entry.last_answer {
            Some(answer) => self.put_answer(home, key, answer, out),
            None => put_number(out, 0),
        }
        put_recipients(recipients, out);
        put_state(entry.attempts, entry.due_ms, entry.expires_ms, out);
    }

    fn put_queue(&mut self, home: &Home, key: EntryKey, out: &mut Vec<u8>) {
        let queue = home.queue_of(key);
        let identity = home.queue_identity(home.entry(key).queue);
        if let Some(number) = self.queues.mention(identity, &mut self.queues_defined) {
            return put_number(out, number);
        }
        put_number(out, DEFINE_QUEUE);
        for text in [&queue.tenant, &queue.campaign, &queue.domain, &queue.pool] {
            put_text(out, text);
        }
        let Some(sender_routes) = self.sender_routes else { return out.push(queue.priority) };
        out.push(queue.priority | ROUTED);
        out.extend_from_slice(&sender_routes.to_le_bytes());
        put_number(out, queue.route.matched.map_or(0, |MatchedRoute(place)| u64::from(place) + 1));
    }

    fn put_answer(&mut self, home: &Home, key: EntryKey, answer: &str, out: &mut Vec<u8>) {
        let number = match home.answer_identity(key) {
            Some(identity) => self.answers.mention(identity, &mut self.answers_defined),
            None => {
                let identity = home.queue_answer_identity(home.entry(key).queue);
                self.queue_answers.mention(identity, &mut self.answers_defined)
            }
        };
        match number {
            Some(number) => put_number(out, number + DEFINE_ANSWER),
            None => {
                put_number(out, DEFINE_ANSWER);
                put_text(out, answer);
            }
        }
    }
}

/// The numbers that a stream has given, by the places of what they were given to.
#[derive(Debug, Default)]
struct Numbers {
    places: Vec<Numbered>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Numbered {
    serial: u64,
    number: u64,
}

impl Numbers {
    /// The number of what the stream has defined; none where it is to be defined now, as the next one.
    fn mention(&mut self, Identity { place, serial }: Identity, defined: &mut u64) -> Option<u64> {
        let place = place as usize;
        if self.places.len() <= place {
            self.places.resize(place + 1, Numbered::default());
        }
        let known = &mut self.places[place];
        if known.serial == serial {
            return Some(known.number);
        }
        *defined += 1;
        *known = Numbered { serial, number: *defined };
        None
    }
}

/// Reads a stream of summaries into a home. It must be given all of the stream's summaries, in their order.
#[derive(Debug)]
pub struct SummaryReader<'a> {
    batch_max: usize,
    /// Where some routes have a `match`.
    matching: Option<&'a Config>,
    sender_routes: Option<u64>,
    queues: Vec<LearnedQueue>,
    answers: Vec<LearnedAnswer>,
    /// A summary was malformed: the numbers behind it mean nothing.
    lost: bool,
    /// The summary's entries and their recipients; here for their memory.
    entries: Vec<ReadEntry>,
    recipients: Vec<u32>,
    sorted: Vec<u32>,
}

/// A queue of the stream, and which it is in the home once something stands in it.
#[derive(Debug)]
struct LearnedQueue {
    name: QueueParts,
    /// Only its messages' senders can tell the route.
    needs_sender: bool,
    identity: Option<Identity>,
}

#[derive(Debug)]
struct LearnedAnswer {
    text: Box<str>,
    identity: Option<Identity>,
}

#[derive(Debug)]
struct ReadEntry {
    /// Places in the tables of what was learned.
    queue: usize,
    answer: Option<usize>,
    /// Where they are in [`SummaryReader::recipients`].
    recipients: Range<usize>,
    attempts: u32,
    due_ms: u64,
    expires_ms: u64,
}

/// Why a message is to be read instead of its summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SummaryError {
    /// This field of it can't be what was written. The rest of the stream is lost with it.
    Malformed(&'static str),
    /// It comes behind a malformed one, which may have defined what it names.
    Lost,
    /// Its entries don't have exactly the pending recipients, each once.
    Recipients,
    /// Its sender decides the route.
    Sender,
}

impl<'a> SummaryReader<'a> {
    /// A stream begins. No entry gets more than `batch_max` recipients. `matching` is the configuration where some of
    /// its routes have a `match`.
    pub fn new(batch_max: usize, matching: Option<&'a Config>) -> Self {
        assert!(batch_max > 0, "an entry has recipients");
        Self {
            batch_max,
            matching,
            sender_routes: matching.and_then(Config::sender_routes),
            queues: Vec::new(),
            answers: Vec::new(),
            lost: false,
            entries: Vec::new(),
            recipients: Vec::new(),
            sorted: Vec::new(),
        }
    }

    /// Takes the next summary. The message's entries for its `pending` recipients, ascending, are put into the home:
    /// all or none of them. Without `pending` only definitions are learned, because the message is gone or has changed.
    ///
    /// Returns the first entry, if there is one.
    pub fn read(
        &mut self,
        home: &mut Home,
        message: MessageId,
        summary: &[u8],
        pending: Option<&[u32]>,
    ) -> Result<Option<EntryKey>, SummaryError> {
        if self.lost {
            return Err(SummaryError::Lost);
        }
        self.decode(summary).inspect_err(|_| self.lost = true)?;
        let Some(pending) = pending else { return Ok(None) };
        self.keep_only(pending)?;
        if self.entries.iter().any(|entry| self.queues[entry.queue].needs_sender) {
            return Err(SummaryError::Sender);
        }
        Ok(self.insert(home, message))
    }

    fn decode(&mut self, summary: &[u8]) -> Result<(), SummaryError> {
        self.entries.clear();
        self.recipients.clear();
        let mut input = Input { rest: summary };
        while !input.rest.is_empty() {
            let queue = self.decode_queue(&mut input)?;
            let answer = self.decode_answer(&mut input)?;
            let recipients = self.decode_recipients(&mut input)?;
            let attempts = input.number("attempts")?;
            let attempts = u32::try_from(attempts).map_err(|_| SummaryError::Malformed("attempts"))?;
            let due_ms = input.number("due")?;
            let behind_ms = unzigzag(input.number("expiry")?);
            let expires_ms = due_ms.checked_add_signed(behind_ms).ok_or(SummaryError::Malformed("expiry"))?;
            self.entries.push(ReadEntry { queue, answer, recipients, attempts, due_ms, expires_ms });
        }
        Ok(())
    }

    fn decode_queue(&mut self, input: &mut Input<'_>) -> Result<usize, SummaryError> {
        let number = input.number("queue")?;
        if number != DEFINE_QUEUE {
            return place(number, self.queues.len()).ok_or(SummaryError::Malformed("queue"));
        }
        let (tenant, campaign) = (input.text("tenant")?.to_owned(), input.text("campaign")?.to_owned());
        let (domain, pool) = (Arc::from(ascii_domain(input.text("domain")?)), input.text("pool")?.to_owned());
        let [priority] = *input.octets(1, "priority")? else { unreachable!("one was asked for") };
        let told = if priority & ROUTED == 0 { None } else { Some(decode_route(input)?) };
        let name = QueueParts { domain, tenant, campaign, pool, priority: priority & !ROUTED, matched: None };
        let queue = self.routed(name, told)?;
        self.queues.push(queue);
        Ok(self.queues.len() - 1)
    }

    /// A queue with the route that its mail takes. `told` is the choice that was made, behind the digest it was made
    /// under.
    fn routed(&self, name: QueueParts, told: Option<(u64, u64)>) -> Result<LearnedQueue, SummaryError> {
        let Some(config) = self.matching else { return Ok(LearnedQueue { name, needs_sender: false, identity: None }) };
        let mut needs_sender = false;
        let matched = match (self.sender_routes, told) {
            (None, _) => {
                let mail = RoutedMail { tenant: &name.tenant, campaign: &name.campaign, sender: "" };
                config.matched_route(&name.domain, &mail)
            }
            (Some(now), Some((then, number))) if now == then => match place(number, config.routes.len()) {
                Some(place) => Some(MatchedRoute(place as u32)),
                None if number == 0 => None,
                None => return Err(SummaryError::Malformed("route")),
            },
            (Some(_), _) => {
                needs_sender = true;
                None
            }
        };
        Ok(LearnedQueue { name: QueueParts { matched, ..name }, needs_sender, identity: None })
    }

    fn decode_answer(&mut self, input: &mut Input<'_>) -> Result<Option<usize>, SummaryError> {
        match input.number("answer")? {
            0 => Ok(None),
            DEFINE_ANSWER => {
                self.answers.push(LearnedAnswer { text: input.text("answer")?.into(), identity: None });
                Ok(Some(self.answers.len() - 1))
            }
            number => match place(number - DEFINE_ANSWER, self.answers.len()) {
                Some(place) => Ok(Some(place)),
                None => Err(SummaryError::Malformed("answer")),
            },
        }
    }

    fn decode_recipients(&mut self, input: &mut Input<'_>) -> Result<Range<usize>, SummaryError> {
        let malformed = SummaryError::Malformed("recipients");
        let first = self.recipients.len();
        let mut before: Option<u32> = None;
        // A count that is too large soon finds the summary's end.
        for _ in 0..input.number("recipients")? {
            let distance = u32::try_from(input.number("recipients")?).map_err(|_| malformed)?;
            let index = match before {
                None => distance,
                Some(_) if distance == 0 => return Err(malformed),
                Some(before) => before.checked_add(distance).ok_or(malformed)?,
            };
            self.recipients.push(index);
            before = Some(index);
        }
        if before.is_none() {
            return Err(malformed);
        }
        Ok(first..self.recipients.len())
    }

    /// Leaves out the recipients that are settled. No other may be missing, or be there twice.
    fn keep_only(&mut self, pending: &[u32]) -> Result<(), SummaryError> {
        let mut kept = 0;
        for entry in &mut self.entries {
            let first = kept;
            for place in entry.recipients.clone() {
                let index = self.recipients[place];
                if pending.binary_search(&index).is_ok() {
                    self.recipients[kept] = index;
                    kept += 1;
                }
            }
            entry.recipients = first..kept;
        }
        self.sorted.clear();
        self.sorted.extend_from_slice(&self.recipients[..kept]);
        self.sorted.sort_unstable();
        if self.sorted == pending { Ok(()) } else { Err(SummaryError::Recipients) }
    }

    fn insert(&mut self, home: &mut Home, message: MessageId) -> Option<EntryKey> {
        let (mut first, mut last) = (None, None);
        for entry in &self.entries {
            for recipients in self.recipients[entry.recipients.clone()].chunks(self.batch_max) {
                let queue = self.queues[entry.queue].key(home);
                let answer = entry.answer.map_or(AnswerId::NONE, |place| self.answers[place].id(home, queue));
                let &ReadEntry { attempts, due_ms, expires_ms, .. } = entry;
                let entry = NewEntry { message, recipients, queue, attempts, due_ms, expires_ms, answer };
                last = Some(home.insert_entry(entry, last));
                first = first.or(last);
            }
        }
        first
    }
}

fn decode_route(input: &mut Input<'_>) -> Result<(u64, u64), SummaryError> {
    let digest = input.octets(8, "sender routes")?.try_into().map_err(|_| SummaryError::Malformed("sender routes"))?;
    Ok((u64::from_le_bytes(digest), input.number("route")?))
}

impl LearnedQueue {
    fn key(&mut self, home: &mut Home) -> QueueKey {
        if let Some(key) = self.identity.and_then(|identity| home.queue_identified(identity)) {
            return key;
        }
        let key = home.queue(self.name.clone());
        self.identity = Some(home.queue_identity(key));
        key
    }
}

impl LearnedAnswer {
    /// Counts one use of it.
    fn id(&mut self, home: &mut Home, queue: QueueKey) -> AnswerId {
        if let Some(id) = self.identity.and_then(|identity| home.answers.share_identified(identity)) {
            return id;
        }
        let id = home.keep_answer(queue, &self.text);
        self.identity = home.answers.identity(id);
        id
    }
}

impl fmt::Display for SummaryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(field) => write!(f, "the summary's {field} can not be what was written"),
            Self::Lost => f.write_str("the summary comes behind a malformed one"),
            Self::Recipients => f.write_str("the summary does not have exactly the pending recipients"),
            Self::Sender => f.write_str("the message's sender decides its route"),
        }
    }
}

impl std::error::Error for SummaryError {}

struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    fn number(&mut self, field: &'static str) -> Result<u64, SummaryError> {
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let Some((&byte, rest)) = self.rest.split_first() else { break };
            self.rest = rest;
            number |= u64::from(byte & LOW_BITS) << shift;
            if byte & MORE == 0 {
                return Ok(number);
            }
        }
        Err(SummaryError::Malformed(field))
    }

    fn text(&mut self, field: &'static str) -> Result<&'a str, SummaryError> {
        let length = self.number(field)?;
        std::str::from_utf8(self.octets(length, field)?).map_err(|_| SummaryError::Malformed(field))
    }

    fn octets(&mut self, length: u64, field: &'static str) -> Result<&'a [u8], SummaryError> {
        let split = usize::try_from(length).ok().and_then(|length| self.rest.split_at_checked(length));
        let (octets, rest) = split.ok_or(SummaryError::Malformed(field))?;
        self.rest = rest;
        Ok(octets)
    }
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number > u64::from(LOW_BITS) {
        out.push(number as u8 | MORE);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_recipients(recipients: impl ExactSizeIterator<Item = u32>, out: &mut Vec<u8>) {
    put_number(out, recipients.len() as u64);
    let mut before = 0;
    for index in recipients {
        put_number(out, u64::from(index - before));
        before = index;
    }
}

fn put_state(attempts: u32, due_ms: u64, expires_ms: u64, out: &mut Vec<u8>) {
    put_number(out, u64::from(attempts));
    put_number(out, due_ms);
    put_number(out, zigzag(expires_ms as i64 - due_ms as i64));
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_number(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> (i64::BITS - 1)) as u64
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

/// The place of what has a number, of `learned`.
fn place(number: u64, learned: usize) -> Option<usize> {
    let place = usize::try_from(number.checked_sub(1)?).ok()?;
    (place < learned).then_some(place)
}

const DEFINE_QUEUE: u64 = 0;
const DEFINE_ANSWER: u64 = 1;
/// Beside a queue's priority: its route follows.
const ROUTED: u8 = 0x80;

const LOW_BITS: u8 = 0x7f;
const MORE: u8 = 0x80;

#[cfg(test)]
mod tests;
