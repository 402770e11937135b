//! The least that delivering can cost: one thread, a tokio-uring runtime with the engine's ring flags, a task a
//! connection that writes ready octets and counts replies.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
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
        let mut peer = Peer { stream: TcpStream::connect(self.to).await?, room: Vec::with_capacity(4_096) };
        peer.stream.set_nodelay(true)?;
        peer.replies(1).await?;
        peer.write(b"EHLO bare.postbench.test\r\n").await?;
        peer.replies(1).await?;
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
}

impl Peer {
    async fn write(&self, octets: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(octets.to_vec()).await.0?)
    }

    /// Takes so many replies, all of which have to be positive.
    async fn replies(&mut self, mut expected: usize) -> Result<()> {
        let mut text = Vec::new();
        while expected > 0 {
            let (result, room) = self.stream.read(std::mem::take(&mut self.room)).await;
            let length = result?;
            ensure!(length > 0, "the peer closed");
            text.extend_from_slice(&room[..length]);
            self.room = room;
            while let Some(end) = memchr::memchr(b'\n', &text) {
                ensure!(matches!(text[0], b'2' | b'3'), "refused: {}", String::from_utf8_lossy(&text[..end]));
                expected = expected.saturating_sub(usize::from(text.get(3) == Some(&b' ')));
                text.drain(..=end);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::{Sink, SinkOptions};

    #[test]
    fn all_messages_go_out_in_one_round_trip_each_or_in_two() {
        for round_trips in [1, 2] {
            let sink = Sink::start(SinkOptions { audit: false, ..SinkOptions::on_loopback() }).unwrap();
            let to = sink.addresses()[0];
            let bare = BareLoop { to, connections: 3, messages: 50, message_bytes: 2_048, round_trips };
            bare.run().unwrap();
            let totals = sink.ledger().totals();
            assert_eq!((totals.messages, totals.refused), (50, 0));
            assert!(totals.bytes >= 50 * 2_048, "{} octets", totals.bytes);
        }
    }
}
