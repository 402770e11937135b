//! One TCP connection on a ring, a client's or to a peer: receives, sends what the shard wants sent, does TLS.
//!
//! A task a connection. It keeps one receive in flight and sends beside it; both futures are always awaited to their
//! end, because the kernel owns their buffers until then (see `socket.rs`).
//!
//! Over 500 lines: from its connect to the peer's FIN it is one task, whose steps share a socket and a TLS session.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;

use postrider_spool::Piece;
use tokio::sync::Notify;

use super::shard_loop::ShardLoop;
use super::socket::{Socket, is_out_of_ports};
use super::tls::{TlsError, TlsFacts, TlsSession, steps};
use crate::deliver::content::Chunk;
use crate::handover::TlsRequirement;
use crate::limits::{LAST_WORDS, LINGER, LINGER_STOPPING, RECEIVE_BYTES_MAX, RECEIVE_BYTES_MIN, TLS_WRITE_BYTES};
use crate::mail::endpoint::Endpoint;
use crate::pool::connection::ConnectionKey;
use crate::shard::{ConnectError, Connected, SessionKey, TlsStarted};

type Chunks = Vec<Chunk<Piece>>;

/// Whose connection it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    Session(SessionKey),
    Connection(ConnectionKey),
}

/// A connection as the shard's actions reach it; its task holds the rest.
pub(super) struct Link {
    side: Side,
    socket: Socket,
    out: RefCell<Chunks>,
    wish: RefCell<Wish>,
    wake: Notify,
    /// Plain octets that the shard was told of, and of finished sends.
    reported: Cell<u64>,
    finished: Cell<u64>,
    /// Where the running send began, in the socket's count; none while TLS is on.
    send_began: Cell<Option<u64>>,
}

/// What is to be done once everything is sent.
#[derive(Debug, Default)]
enum Wish {
    #[default]
    Nothing,
    TlsServer,
    TlsClient {
        host_name: String,
        tls: TlsRequirement,
    },
    Close,
}

/// What goes to the kernel as it is.
#[derive(Debug)]
struct ToSend(Chunk<Piece>);

impl AsRef<[u8]> for ToSend {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            Chunk::Bytes(bytes) => bytes.as_slice(),
            Chunk::Spool(piece) => piece.to_send(),
        }
    }
}

/// Whether what was read of it is what the spool has.
fn is_intact(chunk: &Chunk<Piece>) -> bool {
    match chunk {
        Chunk::Bytes(_) => true,
        Chunk::Spool(piece) => piece.is_intact(),
    }
}

impl Link {
    pub(super) fn new(side: Side, socket: Socket) -> Self {
        Self {
            side,
            socket,
            out: RefCell::default(),
            wish: RefCell::default(),
            wake: Notify::new(),
            reported: Cell::new(0),
            finished: Cell::new(0),
            send_began: Cell::new(None),
        }
    }

    pub(super) fn send_bytes(&self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.out.borrow_mut().push(Chunk::Bytes(bytes));
            self.wake.notify_one();
        }
    }

    pub(super) fn send(&self, mut chunks: Chunks) {
        let mut out = self.out.borrow_mut();
        if out.is_empty() {
            *out = chunks;
        } else {
            out.append(&mut chunks);
        }
        self.wake.notify_one();
    }

    pub(super) fn start_tls_server(&self) {
        self.wish(Wish::TlsServer);
    }

    pub(super) fn start_tls_client(&self, host_name: String, tls: TlsRequirement) {
        self.wish(Wish::TlsClient { host_name, tls });
    }

    pub(super) fn close(&self) {
        self.wish(Wish::Close);
    }

    pub(super) fn abort(&self) {
        self.socket.abort();
    }

    pub(super) fn acknowledge(&self) {
        self.socket.acknowledge();
    }

    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Tells the shard how far a long send has come.
    pub(super) fn report_sent(&self, shard_loop: &Rc<ShardLoop>) {
        let (Side::Connection(connection), Some(began)) = (self.side, self.send_began.get()) else { return };
        let sent = self.finished.get() + self.socket.bytes_sent().saturating_sub(began);
        self.report(shard_loop, connection, sent);
    }

    /// A client's session, from its greeting to its end.
    pub(super) async fn run_session(
        self: Rc<Self>,
        shard_loop: Rc<ShardLoop>,
        session: SessionKey,
        tls: Option<Arc<rustls::ServerConfig>>,
    ) {
        LinkTask::new(&self, &shard_loop, tls).run().await;
        shard_loop.end_session(session);
    }

    /// A connection to a peer, from its SYN to the peer's FIN.
    pub(super) async fn run_connection(
        self: Rc<Self>,
        shard_loop: Rc<ShardLoop>,
        connection: ConnectionKey,
        to: Endpoint,
    ) {
        let made = match self.socket.connect().await {
            Ok(()) => self.socket.local_addr().and_then(|local| {
                let peer = self.socket.peer_addr()?.map_or(to, Endpoint::Ip);
                Ok(Connected { local, peer })
            }),
            Err(error) => Err(error),
        };
        let now = shard_loop.clock.now();
        match made {
            Ok(made) => {
                shard_loop.feed(|shard| shard.connected(now, connection, made));
                LinkTask::new(&self, &shard_loop, None).run().await;
                shard_loop.links.borrow_mut().remove(&self.side);
                let now = shard_loop.clock.now();
                shard_loop.feed(|shard| shard.connection_gone(now, connection));
            }
            Err(error) => {
                shard_loop.links.borrow_mut().remove(&self.side);
                let error =
                    if is_out_of_ports(&error, to) { ConnectError::NoPort } else { ConnectError::Failed(error) };
                shard_loop.feed(|shard| shard.connect_failed(now, connection, &error));
            }
        }
    }

    fn wish(&self, wish: Wish) {
        let mut present = self.wish.borrow_mut();
        if !matches!(*present, Wish::Close) {
            *present = wish;
        }
        self.wake.notify_one();
    }

    fn report(&self, shard_loop: &Rc<ShardLoop>, connection: ConnectionKey, sent: u64) {
        let news = sent.saturating_sub(self.reported.get());
        if news > 0 {
            self.reported.set(self.reported.get() + news);
            let now = shard_loop.clock.now();
            shard_loop.feed(|shard| shard.connection_sent(now, connection, news as usize));
        }
    }
}

/// The part of a connection that only its task touches.
struct LinkTask<'a> {
    link: &'a Link,
    shard_loop: &'a Rc<ShardLoop>,
    tls: Option<TlsSession>,
    /// Handshake messages and alerts, to be sent before anything else.
    wire: Vec<u8>,
    server_config: Option<Arc<rustls::ServerConfig>>,
}

/// Why a connection's task ends.
enum End {
    /// The shard wished it, and all is sent.
    Closed,
    /// The peer, or the network, ended it.
    Lost(String),
}

impl<'a> LinkTask<'a> {
    fn new(link: &'a Link, shard_loop: &'a Rc<ShardLoop>, server_config: Option<Arc<rustls::ServerConfig>>) -> Self {
        Self { link, shard_loop, tls: None, wire: Vec::new(), server_config }
    }

    async fn run(&mut self) {
        let socket = self.link.socket.clone();
        let mut receive = pin!(socket.recv(Vec::with_capacity(RECEIVE_BYTES_MIN)));
        // The buffer while no receive runs.
        let mut idle: Option<Vec<u8>> = None;
        let end = loop {
            if let Err(error) = self.flush().await {
                if let Side::Connection(_) = self.link.side {
                    if let Some(buffer) = idle.take() {
                        receive.set(socket.recv(buffer));
                    }
                    idle = self.hear_last_words(receive.as_mut(), |buffer| socket.recv(buffer)).await;
                }
                break End::Lost(error.to_string());
            }
            match self.carry_out_wish() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(end) => break end,
            }
            if let Some(buffer) = idle.take() {
                if !self.wants_input() {
                    idle = Some(buffer);
                    self.link.wake.notified().await;
                    continue;
                }
                receive.set(socket.recv(buffer));
            }
            tokio::select! {
                biased;
                (result, buffer) = receive.as_mut() => {
                    if matches!(self.link.side, Side::Connection(_)) {
                        self.shard_loop.stand_in_line().await;
                    }
                    match self.received(result, buffer) {
                        Ok(buffer) => idle = Some(buffer),
                        Err(end) => {
                            idle = Some(Vec::new());
                            break end;
                        }
                    }
                }
                () = self.link.wake.notified() => {}
            }
        };
        self.part(&end).await;
        let closed = matches!(end, End::Closed);
        let mut runs = idle.is_none();
        if closed && !runs {
            receive.set(socket.recv(Vec::with_capacity(RECEIVE_BYTES_MIN)));
            runs = true;
        }
        let linger = if self.shard_loop.is_stopping.get() { LINGER_STOPPING } else { LINGER };
        let deadline = self.shard_loop.clock.now().monotonic + linger;
        while runs {
            // Input that is left unread would turn our close into a reset, which may overtake our last words.
            let ended = tokio::select! {
                biased;
                (result, _) = receive.as_mut() => !matches!(result, Ok(1..)),
                () = self.shard_loop.clock.sleep_until(deadline) => {
                    socket.abort();
                    // What it still brings is of no interest; that it has ended is.
                    let _ = receive.as_mut().await;
                    true
                }
            };
            runs = closed && !ended;
            if runs {
                receive.set(socket.recv(Vec::with_capacity(RECEIVE_BYTES_MIN)));
            }
        }
    }

    /// Nothing more can be sent, but what came before may lie there unread, and say what is to become of the message: a
    /// 552 in the midst of its content, a 250 and a 421. Returns the buffer once the peer's side has ended, too.
    async fn hear_last_words<R>(&mut self, mut receive: Pin<&mut R>, next: impl Fn(Vec<u8>) -> R) -> Option<Vec<u8>>
    where
        R: Future<Output = (io::Result<usize>, Vec<u8>)>,
    {
        // It is over in both directions, so this takes no time; the bound is for a peer that has half of it open.
        let deadline = self.shard_loop.clock.now().monotonic + LAST_WORDS;
        while !self.link.socket.is_aborted() {
            let (result, buffer) = tokio::select! {
                biased;
                received = receive.as_mut() => received,
                () = self.shard_loop.clock.sleep_until(deadline) => return None,
            };
            self.shard_loop.stand_in_line().await;
            match self.received(result, buffer) {
                Ok(buffer) => receive.set(next(buffer)),
                Err(_) => return Some(Vec::new()),
            }
        }
        None
    }

    /// Last words, and our side of the close.
    async fn part(&mut self, end: &End) {
        match end {
            End::Closed => {
                if let Some(tls) = &mut self.tls {
                    tls.close_notify(&mut self.wire);
                    let _ = self.flush().await;
                }
                let _ = self.link.socket.finish();
            }
            End::Lost(reason) => {
                self.report_lost(reason);
                // A QUIT, or a 421, to one who may still listen.
                let _ = self.flush().await;
                self.link.socket.abort();
            }
        }
    }

    fn report_lost(&self, reason: &str) {
        if let Side::Connection(connection) = self.link.side {
            self.link.report_sent(self.shard_loop);
            // The shard judges by what was sent until now: nothing of it may still go out.
            self.link.out.borrow_mut().clear();
            let now = self.shard_loop.clock.now();
            self.shard_loop.feed(|shard| shard.connection_closed(now, connection, reason));
        }
    }

    /// Does what the shard wished for the time when all is sent; true if it did something.
    fn carry_out_wish(&mut self) -> Result<bool, End> {
        if !self.link.out.borrow().is_empty() && !self.is_handshaking() {
            return Ok(true);
        }
        let wish = std::mem::take(&mut *self.link.wish.borrow_mut());
        let session = match wish {
            Wish::Nothing => return Ok(false),
            Wish::Close => return Err(End::Closed),
            Wish::TlsServer => {
                let Some(config) = &self.server_config else { unreachable!("STARTTLS is offered only with a key") };
                TlsSession::server(config)
            }
            Wish::TlsClient { host_name, tls } => {
                let verifiers = self.shard_loop.verifiers.borrow();
                let name = tls.server_name(&host_name);
                match &tls {
                    TlsRequirement::Verified => TlsSession::client(&verifiers.public_roots, name),
                    TlsRequirement::Dane(policy) => TlsSession::client(&self.shard_loop.dane.of(policy), name),
                    TlsRequirement::Opportunistic | TlsRequirement::Encrypted => {
                        TlsSession::client(&verifiers.any_certificate, name)
                    }
                    TlsRequirement::Disabled => unreachable!("the client does not begin TLS unasked"),
                }
            }
        };
        match session {
            Ok(mut session) => {
                session.poll_wire(&mut self.wire);
                self.tls = Some(session);
                Ok(true)
            }
            Err(error) => self.handshake_failed(error).map(|()| true),
        }
    }

    fn wants_input(&self) -> bool {
        match self.link.side {
            Side::Connection(_) => true,
            Side::Session(_) if self.is_handshaking() => true,
            Side::Session(session) => self.shard_loop.shard.borrow().session_wants_input(session),
        }
    }

    fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(TlsSession::is_handshaking)
    }

    /// Gives the shard what came; returns the buffer for the next receive, larger if this one was filled.
    fn received(&mut self, result: io::Result<usize>, mut buffer: Vec<u8>) -> Result<Vec<u8>, End> {
        match result {
            Ok(0) => return Err(End::Lost("the connection was closed".to_owned())),
            Ok(_) => {}
            Err(error) => return Err(End::Lost(error.to_string())),
        }
        if self.tls.is_some() {
            self.received_wire(&buffer)?;
        } else {
            self.feed_plain(&buffer);
        }
        let filled = buffer.len() == buffer.capacity();
        buffer.clear();
        if filled && buffer.capacity() < RECEIVE_BYTES_MAX {
            buffer.reserve((buffer.capacity() * 4).min(RECEIVE_BYTES_MAX));
        }
        Ok(buffer)
    }

    fn received_wire(&mut self, wire: &[u8]) -> Result<(), End> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        let was_handshaking = tls.is_handshaking();
        let mut plain = Vec::new();
        let result = tls.handle_received(wire, &mut plain);
        tls.poll_wire(&mut self.wire);
        let done = was_handshaking && !tls.is_handshaking();
        let (peer_closed, error) = match result {
            Err(error) if was_handshaking => return self.handshake_failed(error),
            Err(error) => (false, Some(error)),
            Ok(received) => (received.peer_closed, None),
        };
        if done {
            self.handshake_done();
        }
        // Also what stood before an error: Exim says its last 554 in the clear, behind replies that decide about mail.
        if !plain.is_empty() {
            self.feed_plain(&plain);
        }
        if let Some(error) = error {
            return Err(End::Lost(format!("TLS: {error}")));
        }
        if peer_closed { Err(End::Lost("the connection was closed".to_owned())) } else { Ok(()) }
    }

    fn handshake_done(&self) {
        let now = self.shard_loop.clock.now();
        match self.link.side {
            Side::Session(session) => self.shard_loop.feed(|shard| shard.session_tls_started(now, session)),
            Side::Connection(connection) => {
                let facts = self.tls.as_ref().map(TlsSession::facts).unwrap_or_default();
                let TlsFacts { protocol, cipher, peer_subject, .. } = facts;
                let started = TlsStarted { protocol, cipher, peer_subject };
                self.shard_loop.feed(|shard| shard.connection_tls(now, connection, Ok(started)));
            }
        }
    }

    /// For a peer the shard decides what follows; a client that fails here has nothing more to say.
    fn handshake_failed(&mut self, error: TlsError) -> Result<(), End> {
        match self.link.side {
            Side::Session(_) => Err(End::Lost(format!("TLS: {error}"))),
            Side::Connection(connection) => {
                let now = self.shard_loop.clock.now();
                self.shard_loop.feed(|shard| shard.connection_tls(now, connection, Err(error.into())));
                // Whatever it would still say makes no sense without TLS.
                self.link.out.borrow_mut().clear();
                Ok(())
            }
        }
    }

    fn feed_plain(&self, input: &[u8]) {
        let now = self.shard_loop.clock.now();
        match self.link.side {
            Side::Session(session) => self.shard_loop.feed(|shard| shard.session_received(now, session, input)),
            Side::Connection(key) => self.shard_loop.feed(|shard| shard.connection_received(now, key, input)),
        }
    }

    /// Sends everything that waits; during a handshake only the handshake.
    async fn flush(&mut self) -> io::Result<()> {
        loop {
            let chunks = if self.is_handshaking() { Vec::new() } else { self.link.out.take() };
            if chunks.is_empty() && self.wire.is_empty() {
                return Ok(());
            }
            match &mut self.tls {
                None => self.send_plain(chunks).await?,
                Some(_) => self.send_encrypted(&chunks).await?,
            }
        }
    }

    async fn send_plain(&self, chunks: Chunks) -> io::Result<()> {
        let socket = &self.link.socket;
        self.link.send_began.set(Some(socket.bytes_sent()));
        let (result, sent) = socket.send(chunks.into_iter().map(ToSend).collect()).await;
        let mut sent: Chunks = sent.into_iter().map(|ToSend(chunk)| chunk).collect();
        sent.clear();
        let mut out = self.link.out.borrow_mut();
        if out.capacity() == 0 {
            // For what comes next.
            *out = sent;
        }
        drop(out);
        self.link.report_sent(self.shard_loop);
        self.link.send_began.set(None);
        self.sent(result? as u64);
        Ok(())
    }

    /// Encrypts and sends in steps, so that neither memory nor the time between two signs of life grows with a message.
    /// What the handshake left to be said goes with the first.
    async fn send_encrypted(&mut self, chunks: &Chunks) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        let mut wire = std::mem::take(&mut self.wire);
        for step in steps(chunks.iter().map(Chunk::as_ref), TLS_WRITE_BYTES) {
            let octets: usize = step.iter().map(|piece| piece.len()).sum();
            wire.reserve(TlsSession::wire_bytes_max(octets));
            tls.write(&step, &mut wire);
            if !chunks.iter().all(is_intact) {
                return Err(io::Error::other("the spool's disk does not give the message back"));
            }
            let (result, mut sent) = self.link.socket.send(vec![wire]).await;
            result?;
            wire = sent.pop().unwrap_or_default();
            wire.clear();
            let finished = self.link.finished.get() + octets as u64;
            self.link.finished.set(finished);
            if let Side::Connection(connection) = self.link.side {
                self.link.report(self.shard_loop, connection, finished);
            }
        }
        if !wire.is_empty() {
            self.link.socket.send(vec![wire]).await.0?;
        }
        Ok(())
    }

    fn sent(&self, octets: u64) {
        let sent = self.link.finished.get() + octets;
        self.link.finished.set(sent);
        if let Side::Connection(connection) = self.link.side {
            self.link.report(self.shard_loop, connection, sent);
        }
    }
}
