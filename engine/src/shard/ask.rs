//! Questions about a home's mail, for the control thread.

use std::collections::VecDeque;
use std::time::Duration;

use postrider_spool::record::{ArchivedEnvelope, MessageId};
use postrider_spool::{Fetch, Message, ReadError};

use super::home_log::entry_of;
use super::recover::QUARANTINED;
use super::schedule::PendingRead;
use super::{Action, Shard};
use crate::admin::{Inspected, MessageFilter, MessageRow, MessageState, QueueRow, WallTime};
use crate::handover::{Ask, ControlMessage, Told};
use crate::limits::{ASK_PATIENCE, ASK_READS_MAX, DUE_FOR_LONG, INSPECTED_OCTETS_MAX};
use crate::mail::address::queue_domain;
use crate::mail::time::Now;
use crate::schedule::queue::EntryKey;

/// A question whose answer waits for messages to be read.
#[derive(Debug)]
pub(super) struct Asked {
    filter: MessageFilter,
    /// Of the recipient that is looked for.
    domain: Option<String>,
    rows: Vec<MessageRow>,
    waiting: usize,
    /// What is looked at once no more is waited for, so that only so many are read at once.
    rest: VecDeque<MessageId>,
    until: Duration,
}

/// What a row of each of an entry's recipients says, as of the question; what the message itself tells is missing.
///
/// While messages are read, entries are split, retried and ended. A row made only then would show another time than
/// the rows beside it, and a recipient that was split off meanwhile would be in none.
#[derive(Debug)]
pub(super) struct EntryRows {
    row: MessageRow,
    recipients: Vec<u32>,
}

impl Shard {
    pub(super) fn answer(&mut self, now: Now, question: u64, ask: Ask) {
        let told = match ask {
            Ask::Messages { filter } => return self.ask_messages(now, question, filter),
            Ask::Inspect { id, want_body } if self.entries_of(id).next().is_some() => {
                return self.fetch(now, id, PendingRead::Inspect { question, want_body });
            }
            Ask::Inspect { .. } => Told::Inspected(None),
            Ask::Queues { limit } => self.queue_rows(limit),
            Ask::TlsReport => Told::TlsReport(self.tls_report.rows().collect()),
            Ask::Bounce { choice, reason } => self.bounce_chosen(&choice, &reason),
            Ask::Release { choice, reason } => self.release_chosen(now, &choice, &reason),
        };
        self.actions.push_back(Action::Control(ControlMessage::Answer { question, told }));
    }

    /// The message that a question is about is at hand, or can't be read. It may have come to its end meanwhile.
    pub(super) fn tell_inspected(&mut self, question: u64, want_body: bool, message: Option<&Message>) {
        let found = message.and_then(|message| self.inspected(want_body, message));
        let told = Told::Inspected(found.map(Box::new));
        self.actions.push_back(Action::Control(ControlMessage::Answer { question, told }));
    }

    fn inspected(&self, want_body: bool, message: &Message) -> Option<Inspected> {
        let keys: Vec<EntryKey> = self.entries_of(message.id()).collect();
        let first = keys.iter().min_by_key(|key| self.due(**key).0)?;
        let indices = keys.iter().flat_map(|key| self.home.entry(*key).recipients);
        let octets = || {
            let (prefix, body) = (message.prefix(), message.body());
            let prefix = &prefix[..prefix.len().min(INSPECTED_OCTETS_MAX)];
            [prefix, &body[..body.len().min(INSPECTED_OCTETS_MAX - prefix.len())]].concat()
        };
        let inspected = message.read(|envelope| Inspected {
            sender: envelope.reverse_path.as_str().to_owned(),
            recipients: indices.map(|index| recipient_at(Some(envelope), index)).collect(),
            tenant: envelope.tenant.as_str().to_owned(),
            campaign: envelope.campaign.as_str().to_owned(),
            egress_pool: envelope.egress_pool.as_str().to_owned(),
            num_attempts: self.home.entry(*first).attempts,
            due: self.due(*first),
            data: want_body.then(octets),
        });
        inspected.ok()
    }

    fn queue_rows(&self, limit: usize) -> Told {
        let mut rows: Vec<Option<QueueRow>> = vec![None; self.home.queue_places()];
        let mut total = 0;
        for (key, entry) in self.home.entries() {
            let queue = self.home.queue_of(key);
            total += entry.recipients.len() as u64;
            let row = rows[entry.queue.0 as usize].get_or_insert_with(|| QueueRow {
                queue: queue.name.to_string(),
                domain: queue.domain.to_string(),
                tenant: some(&queue.tenant),
                campaign: some(&queue.campaign),
                site: None,
                egress_source: None,
                depth: 0,
                ready: 0,
                rate_per_s: (queue.rate_per_s * 10.0).round() / 10.0,
                next_due: None,
                last_answer: queue.last_answer.as_deref().map(str::to_owned),
            });
            row.depth += entry.recipients.len() as u64;
            if let Some(pair) = self.home.pair_of(key) {
                row.ready += entry.recipients.len() as u64;
                row.site = Some(pair.site.to_string());
                row.egress_source = Some(self.config.egress_sources[pair.source].name.clone());
            }
            // Before anything was heard since the start, what an entry was told before it.
            if row.last_answer.is_none() {
                row.last_answer = entry.last_answer.map(str::to_owned);
            }
            let due = self.due(key);
            if row.next_due.is_none_or(|next| due.0 < next.0) {
                row.next_due = Some(due);
            }
        }
        let rows = rows.into_iter().flatten().take(limit).collect();
        let messages = self.logs.iter().map(|home| home.log.statistics().live_messages).sum();
        Told::Queues { total, messages, rows }
    }

    /// Messages that are no longer in memory are read first, so many at once; the answer comes when all are at hand.
    fn ask_messages(&mut self, now: Now, question: u64, filter: MessageFilter) {
        let domain = filter.recipient.as_deref().map(|recipient| queue_domain(recipient).into_owned());
        let until = now.monotonic + ASK_PATIENCE;
        let mut asked = Asked { filter, domain, rows: Vec::new(), waiting: 0, rest: VecDeque::new(), until };
        let keys: Vec<EntryKey> = match asked.filter.id {
            Some(id) => self.entries_of(id).filter(|key| self.fits(&asked, *key)).collect(),
            None => self.home.entries().map(|(key, _)| key).filter(|key| self.fits(&asked, *key)).collect(),
        };
        let mut keys = keys.into_iter();
        while asked.goes_on()
            && let Some(key) = keys.next()
        {
            if let Some(id) = self.begins(&asked, key) {
                self.look_at(now, question, &mut asked, id);
            }
        }
        if asked.wants_more() {
            asked.rest = keys.filter_map(|key| self.begins(&asked, key)).collect();
        }
        self.finish_ask(now, question, asked);
    }

    /// By what an entry itself tells.
    fn fits(&self, asked: &Asked, key: EntryKey) -> bool {
        let queue = self.home.queue_of(key);
        asked.filter.tenant.as_deref().is_none_or(|tenant| *queue.tenant == *tenant)
            && asked.domain.as_deref().is_none_or(|domain| *queue.domain == *domain)
    }

    /// The entry's message, where it is the first of its entries that fit: all of them are looked at together, since
    /// some may be split before it is the message's turn.
    fn begins(&self, asked: &Asked, key: EntryKey) -> Option<MessageId> {
        // A message's ring leads from each entry to one that was made before it, so an earlier one is found at once.
        let is_earlier = |other: EntryKey| other < key && self.fits(asked, other);
        (!self.home.entries_of(key).any(is_earlier)).then(|| self.home.entry(key).message)
    }

    /// A message is read once, however many of its entries fit.
    fn look_at(&mut self, now: Now, question: u64, asked: &mut Asked, id: MessageId) {
        let keys = self.entries_of(id).filter(|key| self.fits(asked, *key));
        let rows: Vec<Box<EntryRows>> = keys.map(|key| self.entry_rows(now, key)).collect();
        if rows.is_empty() {
            return; // It has ended meanwhile, and its log may be gone.
        }
        let place = self.log_index(id.log());
        let fetched = self.logs[place].log.message(id);
        if matches!(fetched, Ok(Fetch::Read(_)) | Err(ReadError::Busy)) {
            asked.waiting += rows.len();
        }
        match fetched {
            Ok(Fetch::Ready(message)) => rows.into_iter().for_each(|rows| asked.take(rows, Some(&message))),
            Ok(Fetch::Read(operation)) => {
                let pending = rows.into_iter().map(|rows| PendingRead::Ask { question, rows });
                self.reading.entry(id).or_default().extend(pending);
                self.start_operation(place, operation);
            }
            Err(ReadError::Busy) => {
                self.unread.extend(rows.into_iter().map(|rows| (id, PendingRead::Ask { question, rows })));
            }
            Err(ReadError::Unknown) => {}
            Err(_) => rows.into_iter().for_each(|rows| asked.take(rows, None)),
        }
    }

    pub(super) fn entries_of(&self, id: MessageId) -> impl Iterator<Item = EntryKey> {
        let log = self.logs.iter().find(|home| home.log.id() == id.log());
        let first = log.and_then(|home| home.log.handle(id)).and_then(|handle| entry_of(&self.home, id, handle));
        first.into_iter().flat_map(|first| self.home.entries_of(first))
    }

    /// A message that a question waits for was read. One that has ended meanwhile is left out.
    pub(super) fn ask_read(
        &mut self,
        now: Now,
        question: u64,
        rows: Box<EntryRows>,
        read: Result<&Message, &ReadError>,
    ) {
        let Some(mut asked) = self.asked.remove(&question) else { return };
        asked.waiting -= 1;
        if !matches!(read, Err(ReadError::Unknown)) {
            asked.take(rows, read.ok());
        }
        self.finish_ask(now, question, asked);
    }

    fn finish_ask(&mut self, now: Now, question: u64, mut asked: Asked) {
        if asked.waiting == 0 && now.monotonic < asked.until {
            while asked.goes_on()
                && let Some(id) = asked.rest.pop_front()
            {
                self.look_at(now, question, &mut asked, id);
            }
        }
        if asked.waiting > 0 {
            self.asked.insert(question, asked);
            return;
        }
        let told = if asked.wants_more() && !asked.rest.is_empty() {
            Told::MessagesUnread(asked.rest.len())
        } else {
            Told::Messages(asked.rows)
        };
        self.actions.push_back(Action::Control(ControlMessage::Answer { question, told }));
    }

    fn entry_rows(&self, now: Now, key: EntryKey) -> Box<EntryRows> {
        let entry = self.home.entry(key);
        let queue = self.home.queue_of(key);
        let pair = self.home.pair_of(key);
        let blocked = self.home.blocked_by(key);
        let is_held = entry.is_held();
        let row = MessageRow {
            id: entry.message.to_string(),
            recipient: String::new(),
            queue: queue.name.to_string(),
            num_attempts: entry.attempts,
            due: Some(self.due(key)),
            last_answer: entry.last_answer.map(str::to_owned),
            blocked_by: if is_held {
                let why = match entry.last_answer {
                    Some(last) if last.contains(QUARANTINED) => "the engine died each time that it worked on it",
                    _ => "it may have been delivered, and is not sent again",
                };
                Some(format!("held: {why}; ends {}", WallTime(entry.expires_ms)))
            } else {
                let told = blocked.map(|b| format!("{}; next try {}", b.reason, WallTime(b.until_ms)));
                told.or_else(|| self.what_it_waits_for(now, key))
            },
            state: match self.home.state_name(key) {
                _ if is_held => MessageState::Held,
                "scheduled" => MessageState::Scheduled,
                "in delivery" => MessageState::Delivering,
                _ => MessageState::Ready,
            },
            sender: String::new(),
            created: WallTime(0),
            expires: WallTime(entry.expires_ms),
            size: 0,
            tenant: some(&queue.tenant),
            campaign: some(&queue.campaign),
            site: pair.map(|pair| pair.site.to_string()),
            egress_source: pair.map(|pair| self.config.egress_sources[pair.source].name.clone()),
        };
        Box::new(EntryRows { row, recipients: entry.recipients.collect() })
    }

    /// What comes next for an entry that has been due for some time and that nothing holds; nobody knows how long that
    /// takes.
    fn what_it_waits_for(&self, now: Now, key: EntryKey) -> Option<String> {
        if now.wall_ms < self.home.entry(key).due_ms + DUE_FOR_LONG.as_millis() as u64 {
            return None;
        }
        match self.home.state_name(key) {
            "routing" => Some(format!("the hosts of {} are being looked up", self.home.queue_of(key).domain)),
            "ready" => {
                let pair = self.home.pair_of(key)?;
                let source = &self.config.egress_sources[pair.source].name;
                Some(format!("waits for a connection to {} by {source}", pair.site))
            }
            _ => None,
        }
    }

    /// When an entry goes at the earliest: its due time, or the end of what blocks it.
    fn due(&self, key: EntryKey) -> WallTime {
        let due_ms = self.home.entry(key).due_ms;
        WallTime(self.home.blocked_by(key).map_or(due_ms, |blocked| blocked.until_ms.max(due_ms)))
    }
}

impl Asked {
    fn wants_more(&self) -> bool {
        self.rows.len() < self.filter.limit
    }

    fn goes_on(&self) -> bool {
        self.wants_more() && self.waiting < ASK_READS_MAX
    }

    /// Its domain may be written either way, `bücher.example` or `xn--bcher-kva.example`.
    fn is_wanted(&self, recipient: &str) -> bool {
        let local = |address: &str| address.rsplit_once('@').map_or(0, |(local, _)| local.len());
        self.filter.recipient.as_deref().is_none_or(|wanted| {
            wanted[..local(wanted)] == recipient[..local(recipient)]
                && self.domain.as_deref() == Some(&*queue_domain(recipient))
        })
    }

    /// One row a recipient. Of a message that can't be read the rows lack what it would tell.
    fn take(&mut self, rows: Box<EntryRows>, message: Option<&Message>) {
        let envelope = message.and_then(|message| message.envelope().ok());
        if let (Some(wanted), Some(message)) = (&self.filter.message_id, message)
            && !has_message_id(&[message.prefix(), message.body()], wanted)
        {
            return;
        }
        let EntryRows { mut row, recipients } = *rows;
        if let (Some(envelope), Some(message)) = (envelope, message) {
            row.sender = envelope.reverse_path.as_str().to_owned();
            row.created = WallTime(envelope.created_ms.to_native());
            row.size = message.size();
        }
        for index in recipients {
            let recipient = recipient_at(envelope, index);
            if self.is_wanted(&recipient) && self.wants_more() {
                self.rows.push(MessageRow { recipient, ..row.clone() });
            }
        }
    }
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn recipient_at(envelope: Option<&ArchivedEnvelope>, index: u32) -> String {
    let recipient = envelope.and_then(|envelope| envelope.recipients.get(index as usize));
    recipient.map(|recipient| recipient.address.as_str().to_owned()).unwrap_or_default()
}

fn has_message_id(parts: &[&[u8]], wanted: &str) -> bool {
    let is_wanted = |field: crate::mail::header::Field<'_>| {
        field.name.eq_ignore_ascii_case(b"Message-ID")
            && crate::mail::header::unfold(field.value).trim().trim_matches(['<', '>']) == wanted
    };
    parts.iter().any(|part| crate::mail::header::fields(part).any(is_wanted))
}
