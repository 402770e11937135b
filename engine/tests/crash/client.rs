//! A client that submits mail, pipelined or step by step, and sometimes goes away in the middle.

use std::collections::VecDeque;
use std::mem;

use postrider_spool::record::{LogId, MessageId};

use crate::ledger::{Ledger, Marker, Sent};
use crate::world::Random;

/// What the next reply answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Greeting,
    Ehlo,
    Envelope,
    Data(Marker),
    Content(Marker),
}

#[derive(Debug)]
pub(crate) struct Client {
    is_pipelining: bool,
    /// Transactions that it still wants to make.
    left: u64,
    awaited: VecDeque<Awaited>,
    /// Commands that are to be said once the present one is answered.
    commands: VecDeque<(String, Awaited)>,
    replies: Vec<u8>,
    /// Written, and not with the shard yet; and what is finished when all of it is.
    out: Vec<u8>,
    finishes: Option<Marker>,
    pub(crate) is_done: bool,
}

impl Client {
    pub(crate) fn new(random: &mut Random) -> Self {
        Self {
            is_pipelining: random.one_in(2),
            left: 1 + random.below(4),
            awaited: VecDeque::from([Awaited::Greeting]),
            commands: VecDeque::new(),
            replies: Vec::new(),
            out: Vec::new(),
            finishes: None,
            is_done: false,
        }
    }

    /// The shard said something: it counts as heard when it is said.
    pub(crate) fn hear(&mut self, bytes: &[u8], log: LogId, random: &mut Random, ledger: &mut Ledger) {
        self.replies.extend_from_slice(bytes);
        while let Some(end) = self.replies.windows(2).position(|pair| pair == b"\r\n") {
            let line: Vec<u8> = self.replies.drain(..end + 2).collect();
            let line = String::from_utf8(line).expect("replies are ASCII");
            if line.as_bytes()[3] != b'-' {
                self.heard(line.trim_end(), log, random, ledger);
            }
        }
    }

    fn heard(&mut self, reply: &str, log: LogId, random: &mut Random, ledger: &mut Ledger) {
        let Some(awaited) = self.awaited.pop_front() else {
            // 421: it took too long.
            self.is_done = true;
            return;
        };
        let is_positive = reply.starts_with('2') || reply.starts_with('3');
        match awaited {
            Awaited::Content(marker) if is_positive => {
                let id = reply.split("id=").nth(1).expect("the id is told");
                ledger.accept(marker, id.trim().parse::<MessageId>().expect("an id"));
            }
            Awaited::Content(marker) => {
                let in_doubt = reply.contains("Spool failed").then_some(log);
                ledger.refuse(marker, in_doubt);
            }
            Awaited::Data(marker) if is_positive => {
                let sent = ledger.sent(marker);
                self.out.extend_from_slice(&stuffed(&sent.content));
                self.out.extend_from_slice(b".\r\n");
                self.finishes = Some(marker);
                self.awaited.push_back(Awaited::Content(marker));
            }
            Awaited::Greeting => self.say("EHLO client.example".to_owned(), Awaited::Ehlo),
            _ if !is_positive => self.is_done = true,
            _ => {}
        }
        if self.awaited.is_empty() && !self.is_done {
            self.go_on(random, ledger);
        }
    }

    fn go_on(&mut self, random: &mut Random, ledger: &mut Ledger) {
        if self.commands.is_empty() {
            if self.left == 0 {
                self.is_done = true;
                return;
            }
            self.left -= 1;
            let marker = ledger.send(|marker| message(marker, random));
            let sent = ledger.sent(marker);
            let mail = format!("MAIL FROM:<{}>", sent.reverse_path);
            self.commands.push_back((mail, Awaited::Envelope));
            for recipient in &sent.recipients {
                self.commands.push_back((format!("RCPT TO:<{recipient}>"), Awaited::Envelope));
            }
            self.commands.push_back(("DATA".to_owned(), Awaited::Data(marker)));
        }
        let now = if self.is_pipelining { self.commands.len() } else { 1 };
        for (command, awaited) in self.commands.drain(..now).collect::<Vec<_>>() {
            self.say(command, awaited);
        }
    }

    fn say(&mut self, command: String, awaited: Awaited) {
        self.out.extend_from_slice(command.as_bytes());
        self.out.extend_from_slice(b"\r\n");
        self.awaited.push_back(awaited);
    }

    pub(crate) fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// What reaches the shard now: all that was written, or a part of it.
    pub(crate) fn take_output(&mut self, random: &mut Random, ledger: &mut Ledger) -> Vec<u8> {
        let mut taken = mem::take(&mut self.out);
        if random.one_in(5) {
            self.out = taken.split_off(random.below(taken.len() as u64) as usize);
        }
        if self.out.is_empty()
            && let Some(marker) = self.finishes.take()
        {
            ledger.finish(marker);
        }
        taken
    }
}

/// One to six recipients at a few domains, and content of many lengths.
pub(crate) fn message(marker: Marker, random: &mut Random) -> Sent {
    let count = if random.one_in(12) { 6 + random.below(30) } else { 1 + random.below(5) };
    let recipients = (0..count).map(|place| {
        let domain = match random.below(40) {
            0 => "nowhere.example",
            1..6 => "looked-up.example",
            draw => ["a.example", "b.example", "c.example", "d.example"][draw as usize % 4],
        };
        format!("r{place}@{domain}")
    });
    let recipients = recipients.collect();
    let mut content = format!("Subject: m{marker}\r\n\r\n").into_bytes();
    let octets = if random.one_in(15) { 4_000 + random.below(16_000) } else { random.below(1_500) };
    while (content.len() as u64) < octets {
        let dot = if random.one_in(20) { "." } else { "" };
        content.extend_from_slice(format!("{dot}{:-<60}\r\n", random.below(1 << 30)).as_bytes());
    }
    Sent { reverse_path: format!("m{marker}@client.example"), recipients, content }
}

/// RFC 5321 §4.5.2.
fn stuffed(content: &[u8]) -> Vec<u8> {
    let mut stuffed = Vec::with_capacity(content.len() + 16);
    for line in content.split_inclusive(|octet| *octet == b'\n') {
        if line.starts_with(b".") {
            stuffed.push(b'.');
        }
        stuffed.extend_from_slice(line);
    }
    stuffed
}
