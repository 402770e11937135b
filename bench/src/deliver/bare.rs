//! The least that delivering can cost: one thread, a tokio-uring runtime with the engine's ring flags, a task a
//! connection that writes ready octets and counts replies; where asked, as TLS records of rustls' own making.

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use tokio_uring::net::TcpStream;

use crate::measure;
use crate::spool::on_ring;

#[derive(Debug, Clone)]
pub(super) struct BareLoop {
    pub(super) to: SocketAddr,
    pub(super) connections: usize,
    pub(super) messages: u64,
    pub(super) message_bytes: usize,
    /// 1: the next envelope goes with the content; 2: it waits for the content's reply.
    pub(super) round_trips: u32,
    /// By STARTTLS, once a connection.
    pub(super) tls: Option<Arc<ClientConfig>>,
}

impl BareLoop {
    /// The CPU time of its thread.
    pub(super) fn run(&self) -> Result<Duration> {
        let this = self.clone();
        let thread = thread::Builder::new().name("bare".into()).spawn(move || {
            let before = measure::this_thread_cpu();
            on_ring(this.serve())?;
            Ok(measure::this_thread_cpu().saturating_sub(before))
        })?;
        thread.join().map_err(|_| anyhow!("the bare loop panicked"))?
    }

    async fn serve(self) -> Result<()> {
        let left = Rc::new(Cell::new(self.messages));
        let this = Rc::new(self);
        let mut tasks = Vec::new();
        for _ in 0..this.connections {
            tasks.push(tokio_uring::spawn(this.clone().connection(left.clone())));
        }
        for task in tasks {
            task.await.context("a connection's task ended")??;
        }
        Ok(())
    }

    async fn connection(self: Rc<Self>, left: Rc<Cell<u64>>) -> Result<()> {
        let stream = TcpStream::connect(self.to).await?;
        let mut peer = Peer { stream, room: Vec::with_capacity(ROOM_BYTES), tls: None };
        peer.stream.set_nodelay(true)?;
        peer.replies(1).await?;
        peer.write(EHLO).await?;
        peer.replies(1).await?;
        if let Some(config) = &self.tls {
            peer.write(b"STARTTLS\r\n").await?;
            peer.replies(1).await?;
            peer.secure(config.clone()).await?;
            peer.write(EHLO).await?;
            peer.replies(1).await?;
        }
        let envelope = b"MAIL FROM:<bench@sender.test> SIZE=2048\r\nRCPT TO:<r@bench.test>\r\nDATA\r\n".to_vec();
        let mut content = format!("From: bench@sender.test\r\nSubject: bare\r\n\r\n{}", "x".repeat(70)).into_bytes();
        while content.len() < self.message_bytes {
            content
                .extend_from_slice(b"\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
        }
        content.extend_from_slice(b"\r\n.\r\n");
        let riding = [&*content, b"RSET\r\n", &*envelope].concat();
        let next = || left.replace(left.get().saturating_sub(1)) > 0;
        if !next() {
            return Ok(());
        }
        peer.write(&envelope).await?;
        peer.replies(3).await?;
        while next() {
            if self.round_trips == 1 {
                peer.write(&riding).await?;
                peer.replies(5).await?;
            } else {
                peer.write(&content).await?;
                peer.replies(1).await?;
                peer.write(&envelope).await?;
                peer.replies(3).await?;
            }
        }
        peer.write(&content).await?;
        peer.replies(1).await
    }
}

struct Peer {
    stream: TcpStream,
    room: Vec<u8>,
    tls: Option<Box<ClientConnection>>,
}

impl Peer {
    async fn secure(&mut self, config: Arc<ClientConfig>) -> Result<()> {
        let mut tls = ClientConnection::new(config, ServerName::try_from("postbench.test")?)?;
        tls.set_buffer_limit(None);
        self.tls = Some(Box::new(tls));
        while self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
            self.write(b"").await?;
            if self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
                self.receive(&mut Vec::new()).await?;
            }
        }
        // The last flight.
        self.write(b"").await
    }

    async fn write(&mut self, octets: &[u8]) -> Result<()> {
        let out = match &mut self.tls {
            None => octets.to_vec(),
            Some(tls) => {
                tls.writer().write_all(octets)?;
                let mut records = Vec::with_capacity(octets.len() + RECORDS_ROOM_BYTES);
                while tls.wants_write() {
                    tls.write_tls(&mut records)?;
                }
                records
            }
        };
        if out.is_empty() { Ok(()) } else { Ok(self.stream.write_all(out).await.0?) }
    }

    /// One read, behind what `text` has.
    async fn receive(&mut self, text: &mut Vec<u8>) -> Result<()> {
        let (result, room) = self.stream.read(std::mem::take(&mut self.room)).await;
        let length = result?;
        ensure!(length > 0, "the peer closed");
        match &mut self.tls {
            None => text.extend_from_slice(&room[..length]),
            Some(tls) => {
                let mut records = &room[..length];
                while !records.is_empty() {
                    tls.read_tls(&mut records)?;
                    let plain = tls.process_new_packets()?.plaintext_bytes_to_read();
                    let begin = text.len();
                    text.resize(begin + plain, 0);
                    tls.reader().read_exact(&mut text[begin..])?;
                }
            }
        }
        self.room = room;
        Ok(())
    }

    /// Takes so many replies, all of which have to be positive.
    async fn replies(&mut self, mut expected: usize) -> Result<()> {
        let mut text = Vec::new();
        while expected > 0 {
            self.receive(&mut text).await?;
            while let Some(end) = memchr::memchr(b'\n', &text) {
                ensure!(matches!(text[0], b'2' | b'3'), "refused: {}", String::from_utf8_lossy(&text[..end]));
                expected = expected.saturating_sub(usize::from(text.get(3) == Some(&b' ')));
                text.drain(..=end);
            }
        }
        Ok(())
    }
}

const EHLO: &[u8] = b"EHLO bare.postbench.test\r\n";
const ROOM_BYTES: usize = 4_096;
/// What records take beyond what is in them.
const RECORDS_ROOM_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sign::client_config;
    use crate::sink::tls::TlsIdentity;
    use crate::sink::{Sink, SinkOptions};

    #[test]
    fn all_messages_go_out_in_one_round_trip_each_or_in_two() {
        for (round_trips, secure) in [(1, false), (2, false), (1, true), (2, true)] {
            let identity = secure.then(|| TlsIdentity::generate(true).unwrap());
            let options = SinkOptions { audit: false, tls: identity, ..SinkOptions::on_loopback() };
            let sink = Sink::start(options).unwrap();
            let to = sink.addresses()[0];
            let tls = secure.then(|| client_config(false).unwrap());
            let bare = BareLoop { to, connections: 3, messages: 50, message_bytes: 20_480, round_trips, tls };
            bare.run().unwrap();
            let totals = sink.ledger().totals();
            assert_eq!((totals.messages, totals.refused), (50, 0));
            assert!(totals.bytes >= 50 * 20_480, "{} octets", totals.bytes);
            let handshakes: u64 = sink.ledger().summary().tls.values().sum();
            assert_eq!(handshakes, if secure { 3 } else { 0 });
        }
    }
}
