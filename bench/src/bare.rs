//! A relay without a spool, a policy or a queue: the floor that an engine is measured against.
//!
//! It passes each message on to the first route's first address, and answers the final dot with what it was answered
//! there. So it can lose nothing. It takes the engine's arguments and configuration, so that every measurement of the
//! engine can be made of it, and tested with it.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

use crate::inject::wire::Wire;
use crate::sink::session::{DotFound, DotScan};

/// Serves until SIGTERM or SIGINT.
pub fn serve(config: &Path) -> Result<()> {
    let text = fs::read_to_string(config).with_context(|| format!("cannot read {}", config.display()))?;
    let config: Config = toml::from_str(&text)?;
    let route = config.route.first().and_then(|route| route.to.first()).context("no [[route]] with an address")?;
    let to: SocketAddr = route.parse().with_context(|| format!("route to {route:?}: write address:port"))?;
    let hostname: Arc<str> = config.hostname.into();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        for listener in config.listener {
            let bound = TcpListener::bind(listener.address).await;
            let bound = bound.with_context(|| format!("cannot listen on {}", listener.address))?;
            let is_http = listener.protocol == "http";
            tokio::spawn(accept(bound, is_http, hostname.clone(), to));
        }
        tokio::select! { _ = term.recv() => {} _ = int.recv() => {} }
        Ok(())
    })
}

#[derive(Debug, Deserialize)]
struct Config {
    hostname: String,
    listener: Vec<Listener>,
    route: Vec<Route>,
}

#[derive(Debug, Deserialize)]
struct Listener {
    protocol: String,
    address: SocketAddr,
}

#[derive(Debug, Deserialize)]
struct Route {
    to: Vec<String>,
}

async fn accept(listener: TcpListener, is_http: bool, hostname: Arc<str>, to: SocketAddr) {
    // It is for tests and comparisons: an error here ends its use, and shows as connections that get no greeting.
    while let Ok((stream, _)) = listener.accept().await {
        let hostname = hostname.clone();
        tokio::spawn(async move {
            // A broken connection concerns its two ends only.
            let _ = if is_http { say_ready(stream).await } else { Session::new(hostname, to).run(stream).await };
        });
    }
}

async fn say_ready(mut stream: TcpStream) -> io::Result<()> {
    let mut request = [0; 1024];
    if stream.read(&mut request).await? > 0 {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await?;
    }
    Ok(())
}

struct Session {
    hostname: Arc<str>,
    to: SocketAddr,
    outward: Option<Wire>,
    input: Vec<u8>,
    /// MAIL, RCPTs and DATA, to be sent on as they came.
    envelope: Vec<u8>,
    recipients: usize,
}

enum Next {
    Command,
    Content,
    Close,
}

impl Session {
    fn new(hostname: Arc<str>, to: SocketAddr) -> Self {
        Self { hostname, to, outward: None, input: Vec::new(), envelope: Vec::new(), recipients: 0 }
    }

    async fn run(mut self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.write_all(b"220 bare relay\r\n").await?;
        let mut out = Vec::new();
        loop {
            if stream.read_buf(&mut self.input).await? == 0 {
                return Ok(());
            }
            let mut taken = 0;
            while let Some(end) = memchr::memchr(b'\n', &self.input[taken..]) {
                let line = taken..taken + end + 1;
                taken = line.end;
                match self.command(line, &mut out) {
                    Next::Command => {}
                    Next::Content => {
                        stream.write_all(&out).await?;
                        out.clear();
                        self.input.drain(..taken);
                        taken = self.content(&mut stream).await?;
                        out.extend_from_slice(&self.pass_on(taken).await);
                    }
                    Next::Close => return stream.write_all(&out).await,
                }
            }
            self.input.drain(..taken);
            stream.write_all(&out).await?;
            out.clear();
        }
    }

    fn command(&mut self, line: Range<usize>, out: &mut Vec<u8>) -> Next {
        let line = &self.input[line];
        match line.get(..4).map(<[u8]>::to_ascii_uppercase).as_deref() {
            Some(b"EHLO" | b"HELO") => out.extend_from_slice(b"250-bare relay\r\n250-PIPELINING\r\n250 SIZE\r\n"),
            Some(verb @ (b"MAIL" | b"RCPT")) => {
                self.recipients += usize::from(verb == b"RCPT");
                self.envelope.extend_from_slice(line);
                out.extend_from_slice(b"250 2.1.0 Ok\r\n");
            }
            Some(b"DATA") => {
                self.envelope.extend_from_slice(line);
                out.extend_from_slice(b"354 go on\r\n");
                return Next::Content;
            }
            Some(b"RSET") => {
                self.forget();
                out.extend_from_slice(b"250 2.0.0 Ok\r\n");
            }
            Some(b"QUIT") => {
                out.extend_from_slice(b"221 2.0.0 Bye\r\n");
                return Next::Close;
            }
            _ => out.extend_from_slice(b"500 5.5.2 unknown command\r\n"),
        }
        Next::Command
    }

    fn forget(&mut self) {
        self.envelope.clear();
        self.recipients = 0;
    }

    /// Receives until the content, stuffed and with its dot, stands at the beginning of `input`; gives its length.
    async fn content(&mut self, stream: &mut TcpStream) -> io::Result<usize> {
        let mut scan = DotScan::default();
        let mut scanned = 0;
        loop {
            if let DotFound::End { consumed, .. } = scan.find(&self.input[scanned..]) {
                return Ok(scanned + consumed);
            }
            scanned = self.input.len();
            if stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Gives the answer for the client.
    async fn pass_on(&mut self, content_bytes: usize) -> Vec<u8> {
        let wire = self.outward.take();
        let answer = match self.transaction(wire, content_bytes).await {
            Ok((wire, answer)) => {
                self.outward = Some(wire);
                answer
            }
            // Dropping the connection abandons whatever the next hop still expects.
            Err(error) => format!("451 4.4.2 the next hop failed: {error}\r\n"),
        };
        self.forget();
        answer.into_bytes()
    }

    async fn transaction(&self, wire: Option<Wire>, content_bytes: usize) -> io::Result<(Wire, String)> {
        let mut wire = match wire {
            Some(wire) => wire,
            None => Wire::open(self.to, &self.hostname).await?,
        };
        wire.send(&self.envelope).await?;
        let mut refusal = None;
        for _ in 0..=self.recipients {
            let reply = wire.reply().await?;
            if !reply.is_positive() {
                refusal.get_or_insert(reply.text);
            }
        }
        let data = wire.reply().await?;
        if let Some(refusal) = refusal.or_else(|| (data.code != 354).then(|| data.text.clone())) {
            return Err(io::Error::other(refusal));
        }
        wire.send(&self.input[..content_bytes]).await?;
        let dot = wire.reply().await?;
        let answer = if dot.is_positive() { "250 2.0.0 Ok\r\n".to_owned() } else { format!("{}\r\n", dot.text) };
        Ok((wire, answer))
    }
}
