//! The injector's side of one connection: commands out, replies in.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The last line's code, and that line for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) code: u16,
    pub(crate) text: String,
}

impl Reply {
    pub(crate) fn is_positive(&self) -> bool {
        (200..300).contains(&self.code)
    }
}

/// A connection, with what has arrived beyond the reply last taken.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: TcpStream,
    input: Vec<u8>,
    taken: usize,
    pub(crate) offers_size: bool,
    pub(crate) offers_pipelining: bool,
}

impl Wire {
    /// Connects, takes the greeting and says EHLO.
    pub(crate) async fn open(to: SocketAddr, ehlo: &str) -> io::Result<Self> {
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(to)).await??;
        stream.set_nodelay(true)?;
        let input = Vec::with_capacity(INPUT_BYTES);
        let mut wire = Self { stream, input, taken: 0, offers_size: false, offers_pipelining: false };
        wire.expect(220).await?;
        wire.send(format!("EHLO {ehlo}\r\n").as_bytes()).await?;
        loop {
            let read = |line: &[u8]| {
                (code_of(line), line.get(3) != Some(&b'-'), offers(line, b"SIZE"), offers(line, b"PIPELINING"))
            };
            let (code, last, size, pipelining) = wire.line(read).await?;
            wire.offers_size |= size;
            wire.offers_pipelining |= pipelining;
            match (code, last) {
                (Some(250), true) => return Ok(wire),
                (Some(250), false) => {}
                (code, _) => {
                    return Err(io::Error::other(format!("EHLO was answered {}", code.unwrap_or(0))));
                }
            }
        }
    }

    pub(crate) async fn send(&mut self, octets: &[u8]) -> io::Result<()> {
        self.stream.write_all(octets).await
    }

    /// Both parts in one segment where they fit.
    pub(crate) async fn send_parts(&mut self, first: &[u8], second: &[u8]) -> io::Result<()> {
        let parts = [io::IoSlice::new(first), io::IoSlice::new(second)];
        let sent = self.stream.write_vectored(&parts).await?;
        if sent < first.len() {
            self.send(&first[sent..]).await?;
        }
        let sent = sent.saturating_sub(first.len());
        if sent < second.len() { self.send(&second[sent..]).await } else { Ok(()) }
    }

    /// The next whole reply.
    pub(crate) async fn reply(&mut self) -> io::Result<Reply> {
        loop {
            let found = self
                .line(|line| {
                    let code = code_of(line)?;
                    let reply = || Reply { code, text: String::from_utf8_lossy(line).trim_end().to_owned() };
                    // Every message brings several: no text of the positive ones is ever shown.
                    let quiet = || Reply { code, text: String::new() };
                    Some((line.get(3) == Some(&b'-'), if code < 400 { quiet() } else { reply() }))
                })
                .await?;
            match found {
                Some((true, _)) => {}
                Some((false, reply)) => return Ok(reply),
                None => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "not an SMTP reply"));
                }
            }
        }
    }

    pub(crate) async fn quit(mut self) {
        // The server closes whatever the outcome.
        if self.send(b"QUIT\r\n").await.is_ok() {
            let _ = timeout(QUIT_TIMEOUT, self.reply()).await;
        }
    }

    async fn expect(&mut self, code: u16) -> io::Result<()> {
        let reply = self.reply().await?;
        if reply.code == code { Ok(()) } else { Err(io::Error::other(format!("the greeting was {}", reply.text))) }
    }

    /// Hands one line, CRLF included, to `read`.
    async fn line<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.input[self.taken..]) {
                let result = read(&self.input[self.taken..=self.taken + end]);
                self.taken += end + 1;
                if self.taken == self.input.len() {
                    self.input.clear();
                    self.taken = 0;
                }
                return Ok(result);
            }
            if self.input.len() - self.taken > LINE_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "reply line too long"));
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

fn code_of(line: &[u8]) -> Option<u16> {
    let code = std::str::from_utf8(line.get(..3)?).ok()?.parse().ok()?;
    matches!(line.get(3), Some(b' ' | b'-' | b'\r' | b'\n')).then_some(code)
}

fn offers(line: &[u8], keyword: &[u8]) -> bool {
    line.get(4..4 + keyword.len()).is_some_and(|word| word.eq_ignore_ascii_case(keyword))
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);
const INPUT_BYTES: usize = 4096;
const LINE_BYTES_MAX: usize = 65_536;
