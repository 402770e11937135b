//! A peer: takes mail, puts it off, refuses it, or breaks off, as it is drawn.

use std::collections::VecDeque;
use std::mem;
use std::net::SocketAddr;

use crate::checker::{Delivered, Lack, Ledger, Marker};
use crate::random::Random;

/// A connection as the peer sees it.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    source: usize,
    pub(crate) is_up: bool,
    /// Sent by the shard, and not read yet.
    pub(crate) incoming: VecDeque<u8>,
    input: Vec<u8>,
    replies: VecDeque<Reply>,
    /// The peer closes behind its last reply.
    pub(crate) hangs_up: bool,
    /// What the shard wished.
    pub(crate) is_closing: bool,
    pub(crate) is_aborted: bool,
    transaction: Transaction,
}

#[derive(Debug)]
struct Reply {
    text: String,
    /// The shard learns from it that this was taken.
    takes: Option<(Marker, Vec<String>)>,
}

#[derive(Debug, Default)]
struct Transaction {
    reverse_path: Option<String>,
    recipients: Vec<String>,
    /// Whether content comes, and not commands.
    is_content: bool,
}

impl Peer {
    pub(crate) fn new(address: SocketAddr, source: usize) -> Self {
        Self {
            address,
            source,
            is_up: false,
            incoming: VecDeque::new(),
            input: Vec::new(),
            replies: VecDeque::new(),
            hangs_up: false,
            is_closing: false,
            is_aborted: false,
            transaction: Transaction::default(),
        }
    }

    pub(crate) fn greet(&mut self, random: &mut Random, is_kind: bool) {
        self.is_up = true;
        match random.below(40) {
            0 if !is_kind => self.reply("421 4.3.2 not now"),
            1 if !is_kind => self.hangs_up = true,
            _ => self.reply("220 peer.example"),
        }
    }

    pub(crate) fn has_replies(&self) -> bool {
        !self.replies.is_empty()
    }

    pub(crate) fn has_input(&self) -> bool {
        !self.incoming.is_empty() && !self.hangs_up
    }

    /// Whether something happens here before anybody says more.
    pub(crate) fn has_work(&self) -> bool {
        !self.is_up || self.has_input() || self.has_replies() || self.hangs_up || self.is_closing || self.is_aborted
    }

    /// Replies that reach the shard now.
    pub(crate) fn take_replies(&mut self, random: &mut Random) -> String {
        let count = 1 + random.below(self.replies.len() as u64) as usize;
        self.replies.drain(..count).map(|reply| reply.text).collect()
    }

    /// The shard will hear no more from this connection.
    pub(crate) fn end(&mut self, ledger: &mut Ledger) {
        for reply in self.replies.drain(..) {
            if let Some((marker, recipients)) = reply.takes {
                ledger.forget(marker, &recipients);
            }
        }
    }

    /// Reads some of what was sent, and answers it. Tells how much it read.
    pub(crate) fn read(&mut self, random: &mut Random, is_kind: bool, ledger: &mut Ledger) -> usize {
        let octets = match random.below(3) {
            0 => 1 + random.below(self.incoming.len() as u64) as usize,
            _ => self.incoming.len(),
        };
        self.input.extend(self.incoming.drain(..octets));
        if !is_kind && random.one_in(60) {
            self.hangs_up = true;
            return octets;
        }
        while !self.hangs_up {
            if self.transaction.is_content {
                let Some(end) = self.input.windows(5).position(|octets| octets == b"\r\n.\r\n") else { break };
                let content: Vec<u8> = self.input.drain(..end + 5).collect();
                self.finish(&unstuffed(&content[..end + 2]), random, is_kind, ledger);
            } else {
                let Some(end) = self.input.windows(2).position(|octets| octets == b"\r\n") else { break };
                let line: Vec<u8> = self.input.drain(..end + 2).collect();
                let line = String::from_utf8(line).expect("commands are ASCII");
                self.obey(line.trim_end(), random, is_kind, ledger);
            }
        }
        octets
    }

    fn obey(&mut self, command: &str, random: &mut Random, is_kind: bool, ledger: &mut Ledger) {
        let draw = if is_kind { u64::MAX } else { random.below(100) };
        let (verb, rest) = command.split_at(command.find([' ', ':']).unwrap_or(command.len()));
        let path = || rest[rest.find('<').expect("a path") + 1..rest.rfind('>').expect("its end")].to_owned();
        match (verb, draw) {
            ("EHLO", 0) => self.reply("421 4.3.2 not now"),
            ("EHLO", draw) if draw % 3 == 0 => {
                ledger.lack(self.address.to_string(), Lack::EightBit);
                self.reply("250 peer.example");
            }
            ("EHLO", _) => self.reply("250-peer.example\r\n250-PIPELINING\r\n250 8BITMIME"),
            ("RSET", _) => {
                self.transaction = Transaction::default();
                self.reply("250 2.0.0 as you like");
            }
            ("QUIT", _) => {
                self.reply("221 2.0.0 bye");
                self.hangs_up = true;
            }
            ("MAIL", 0..2) => self.close("421 4.3.2 closing"),
            ("MAIL", 2..4) => self.reply("451 4.7.1 later"),
            ("MAIL", _) if self.transaction.reverse_path.is_none() => {
                self.transaction.reverse_path = Some(path());
                self.reply("250 2.1.0 ok");
            }
            ("RCPT", draw) if self.transaction.reverse_path.is_some() => match draw {
                0..14 => self.reply("450 4.2.1 later"),
                14..22 => {
                    let reverse_path = self.transaction.reverse_path.clone().unwrap_or_default();
                    ledger.bounce(&reverse_path, &path());
                    self.reply("550 5.1.1 unknown");
                }
                22..24 => self.reply("452 4.5.3 too many"),
                _ => {
                    self.transaction.recipients.push(path());
                    self.reply("250 2.1.5 ok");
                }
            },
            ("DATA", _) if self.transaction.recipients.is_empty() => self.reply("503 5.5.1 no recipients"),
            ("DATA", 0..2) => self.reply("451 4.3.0 later"),
            ("DATA", 2) => self.hangs_up = true,
            ("DATA", _) => {
                self.transaction.is_content = true;
                self.reply("354 go on");
            }
            _ => self.reply("503 5.5.1 not now"),
        }
    }

    fn finish(&mut self, content: &[u8], random: &mut Random, is_kind: bool, ledger: &mut Ledger) {
        let Transaction { reverse_path, recipients, .. } = mem::take(&mut self.transaction);
        let reverse_path = reverse_path.expect("MAIL came before");
        match if is_kind { u64::MAX } else { random.below(100) } {
            0..6 => self.reply("451 4.3.0 later"),
            6..9 => {
                for recipient in &recipients {
                    ledger.bounce(&reverse_path, recipient);
                }
                self.reply("554 5.6.0 unwanted");
            }
            9..11 => self.close("421 4.3.2 closing"),
            11..13 => self.hangs_up = true,
            draw => {
                let (source, reverse_path) = (self.source, reverse_path.as_str());
                let delivered = Delivered {
                    source,
                    reverse_path,
                    recipients: &recipients,
                    content,
                    is_awaited: true,
                    is_foreign: false,
                };
                let marker = ledger.take(delivered);
                if draw < 16 {
                    // It is taken, and nobody hears of it.
                    ledger.forget(marker, &recipients);
                    self.hangs_up = true;
                    return;
                }
                let text = "250 2.0.0 taken\r\n".to_owned();
                self.replies.push_back(Reply { text, takes: Some((marker, recipients)) });
            }
        }
    }

    fn reply(&mut self, text: &str) {
        self.replies.push_back(Reply { text: format!("{text}\r\n"), takes: None });
    }

    fn close(&mut self, text: &str) {
        self.reply(text);
        self.hangs_up = true;
    }
}

fn unstuffed(content: &[u8]) -> Vec<u8> {
    let lines = content.split_inclusive(|octet| *octet == b'\n');
    lines.flat_map(|line| line.strip_prefix(b".").unwrap_or(line)).copied().collect()
}
