//! A peer's octets through the SMTP client, amid transactions, losses and timeouts: every transaction ends once, with
//! one verdict for each recipient, and "delivered" is said only of content that was written whole.
//!
//! The first octet chooses options. The rest are steps, separated by NUL; the first octet of a step says what it is.

use std::collections::BTreeMap;
use std::time::Duration;

use postrider::config::{Chunking, Credentials, DeliveryProtocol, EightBit, InDoubt, Timeouts, TlsMode};
use postrider::deliver::attempt::Transaction;
use postrider::deliver::content::{Chunk, Content};
use postrider::deliver::smtp_client::{ClientEvent, ClientOptions, SmtpClient};
use postrider::deliver::verdict::Fate;
use postrider::mail::time::Now;
use postrider_spool::record::DsnParameters;

pub(crate) fn run(octets: &[u8]) {
    let [choices, steps @ ..] = octets else { return };
    let mut world = World::new(*choices);
    for step in steps.split(|octet| *octet == 0) {
        if let [kind, argument @ ..] = step {
            world.step(*kind, argument);
            world.take_events();
        }
    }
    world.client.handle_closed("the end");
    world.take_events();
    assert!(world.closed, "it ends");
    assert!(world.unfinished.is_empty(), "every transaction has its result");
    assert!(world.client.next_timeout().is_none());
}

struct World {
    client: SmtpClient<Text>,
    now: Now,
    /// Written, but not reported.
    unreported: usize,
    holding: bool,
    wire: Vec<u8>,
    handshaking: bool,
    closed: bool,
    /// How many recipients each has.
    unfinished: BTreeMap<u64, usize>,
    begun: u64,
    delivered: usize,
}

impl World {
    fn new(choices: u8) -> Self {
        let options = ClientOptions {
            ehlo: "us.example".to_owned(),
            protocol: if choices & 1 == 0 { DeliveryProtocol::Smtp } else { DeliveryProtocol::Lmtp },
            auth: (choices & 128 != 0).then(|| Credentials {
                username: "user".to_owned(),
                password: "pass".to_owned(),
                without_tls: choices & 1 == 0,
            }),
            pipelining: choices & 2 == 0,
            tls: [TlsMode::Opportunistic, TlsMode::Required, TlsMode::Verified, TlsMode::Disabled]
                [usize::from(choices >> 2) % 4],
            chunking: [Chunking::On, Chunking::BackToBack, Chunking::Off, Chunking::On][usize::from(choices >> 4) % 4],
            max_in_flight: 3,
            in_doubt: if choices & 12 == 8 { InDoubt::Hold } else { InDoubt::Retry },
            eight_bit: if choices & 64 == 0 { EightBit::Fail } else { EightBit::Send },
            timeouts: Timeouts::default(),
        };
        let now = Now::default();
        Self {
            client: SmtpClient::new(now, options),
            now,
            unreported: 0,
            holding: false,
            wire: Vec::new(),
            handshaking: false,
            closed: false,
            unfinished: BTreeMap::new(),
            begun: 0,
            delivered: 0,
        }
    }

    fn step(&mut self, kind: u8, argument: &[u8]) {
        match kind {
            b'S' => self.with(|client, now, out| client.handle(now, argument, out)),
            b'l' => self.with(|client, now, out| client.handle(now, &[argument, b"\r\n"].concat(), out)),
            b's' if self.client.is_idle() => {
                let transaction = self.transaction(argument);
                self.with(|client, now, out| client.start(now, transaction, out));
            }
            b'r' if self.client.can_ride() => {
                let transaction = self.transaction(argument);
                self.with(|client, _, out| client.ride(transaction, out));
            }
            b'h' => self.holding = true,
            b'H' => {
                self.holding = false;
                self.with(|_, _, _| ());
            }
            b't' => {
                if let Some(deadline) = self.client.next_timeout() {
                    self.now.monotonic = deadline;
                    self.client.handle_timeout(self.now);
                }
            }
            b'w' => {
                self.now.monotonic += Duration::from_secs(1);
                self.client.handle_timeout(self.now);
            }
            b'i' => self.with(SmtpClient::handle_intended),
            b'c' => self.client.handle_closed("gone"),
            b'q' if self.client.is_idle() => self.with(SmtpClient::quit),
            b'T' if self.handshaking => {
                self.handshaking = false;
                self.with(SmtpClient::handle_tls_started);
            }
            b'F' if self.handshaking => {
                self.handshaking = false;
                self.client.handle_tls_failed("no");
            }
            _ => {}
        }
    }

    /// Calls the client, takes what it writes, and reports that as written unless writes are held back.
    fn with(&mut self, call: impl FnOnce(&mut SmtpClient<Text>, Now, &mut Vec<Chunk<Vec<u8>>>)) {
        let mut out = Vec::new();
        call(&mut self.client, self.now, &mut out);
        loop {
            for chunk in out.drain(..) {
                self.unreported += chunk.as_ref().len();
                self.wire.extend_from_slice(chunk.as_ref());
            }
            if self.holding || self.unreported == 0 {
                break;
            }
            self.client.handle_written(self.now, std::mem::take(&mut self.unreported), &mut out);
        }
    }

    fn transaction(&mut self, argument: &[u8]) -> Transaction<Text> {
        self.begun += 1;
        let recipients = argument.first().map_or(1, |octet| usize::from(*octet) % 5 + 1);
        let body = [b"Subject: x\r\n\r\n", argument, b"\r\n"].concat();
        let dot_lines = body.windows(2).any(|pair| pair == b"\n.");
        self.unfinished.insert(self.begun, recipients);
        Transaction {
            ticket: self.begun,
            reverse_path: "from@us.example".into(),
            recipients: (0..recipients as u32).map(|index| (index, format!("r{index}@x.example"))).collect(),
            size: body.len() as u64,
            eight_bit: !body.is_ascii(),
            content: Text(body),
            smtputf8: false,
            dot_lines,
            dsn: DsnParameters { mail: "ENVID=x".to_owned(), recipients: vec![(1, "NOTIFY=NEVER".to_owned())] },
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.client.poll_event() {
            assert!(!self.closed, "nothing comes after the end: {event:?}");
            match event {
                ClientEvent::Idle => assert!(self.unfinished.is_empty()),
                ClientEvent::StartTls => self.handshaking = true,
                ClientEvent::Intend { .. } => {}
                ClientEvent::Closed { .. } => {
                    self.handshaking = false;
                    self.closed = true;
                }
                ClientEvent::Finished(result) => {
                    let recipients = self.unfinished.remove(&result.ticket).expect("a transaction ends once");
                    let indices = result.results.iter().map(|(index, _)| *index as usize);
                    assert!(indices.eq(0..recipients), "one verdict for each recipient, in order");
                    let is_delivered = |fate| fate == Fate::Delivered;
                    self.delivered += usize::from(result.results.iter().any(|(_, it)| is_delivered(it.fate)));
                    let count = |end: &[u8]| self.wire.windows(end.len()).filter(|octets| *octets == end).count();
                    let ends = count(b"\r\n.\r\n") + count(b" LAST\r\n");
                    assert!(self.delivered <= ends, "only what was written whole is delivered");
                }
            }
        }
    }
}

struct Text(Vec<u8>);

impl Content for Text {
    type Piece = Vec<u8>;

    fn prefix_piece(&self) -> Vec<u8> {
        Vec::new()
    }

    fn body_piece(&self) -> Vec<u8> {
        self.0.clone()
    }
}
