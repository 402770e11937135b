//! A client that submits mail, pipelined or step by step, and sometimes goes away in the middle.

use std::collections::VecDeque;
use std::mem;

use postrider_spool::record::{LogId, MessageId};

use crate::checker::{Ledger, Marker, Sent};
use crate::random::Random;

/// Writes the next message.
pub(crate) type Write<'a> = dyn FnMut(Marker) -> Sent + 'a;

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
    pub(crate) fn hear(&mut self, bytes: &[u8], log: LogId, ledger: &mut Ledger, write: &mut Write<'_>) {
        self.replies.extend_from_slice(bytes);
        while let Some(end) = self.replies.windows(2).position(|pair| pair == b"\r\n") {
            let line: Vec<u8> = self.replies.drain(..end + 2).collect();
            let line = String::from_utf8(line).expect("replies are ASCII");
            if line.as_bytes()[3] != b'-' {
                self.heard(line.trim_end(), log, ledger, write);
            }
        }
    }

    fn heard(&mut self, reply: &str, log: LogId, ledger: &mut Ledger, write: &mut Write<'_>) {
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
                self.out.extend_from_slice(sent.steering.as_bytes());
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
            self.go_on(ledger, write);
        }
    }

    fn go_on(&mut self, ledger: &mut Ledger, write: &mut Write<'_>) {
        if self.commands.is_empty() {
            if self.left == 0 {
                self.is_done = true;
                return;
            }
            self.left -= 1;
            let marker = ledger.send(&mut *write);
            let sent = ledger.sent(marker);
            let utf8 = if is_utf8(&sent) { " SMTPUTF8" } else { "" };
            let mail = format!("MAIL FROM:<{}>{utf8}", sent.reverse_path);
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

/// Whether RFC 6531 is needed for its envelope or its header.
pub(crate) fn is_utf8(sent: &Sent) -> bool {
    let header = sent.content.split(|octet| *octet == b'\r').next().unwrap_or_default();
    !sent.reverse_path.is_ascii() || !sent.recipients.iter().all(|it| it.is_ascii()) || !header.is_ascii()
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
