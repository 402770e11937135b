//! The demo's sink: takes every message and hands it to the verifiers.
//!
//! Its protocol is the engine's own server core, on an ordinary tokio runtime; it refuses bare CR and LF, so that
//! whatever else the engine's client would write comes to light.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use crossbeam::channel::{self, TrySendError};
use postrider_spool::record::MessageId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::verify::Arrival;
use crate::accept::{Received, ServerEvent, SessionOptions, SmtpServer};
use crate::config::{LineEndings, ReceivedDetail};
use crate::limits::RECEIVE_BYTES_MAX;
use crate::runtime::clock::{self, Clock};

/// A bound sink.
#[derive(Debug)]
pub(crate) struct Sink {
    listener: std::net::TcpListener,
    clock: Clock,
    arrivals: channel::Sender<Arrival>,
}

impl Sink {
    /// On a free port of the loopback interface.
    pub(crate) fn bind(clock: Clock, arrivals: channel::Sender<Arrival>) -> std::io::Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, clock, arrivals })
    }

    pub(crate) fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until it is dropped.
    pub(crate) async fn run(self) -> std::io::Result<()> {
        let listener = TcpListener::from_std(self.listener)?;
        let places = Arc::new(Semaphore::new(SESSIONS_MAX));
        let mut sessions = 0;
        loop {
            // The semaphore is never closed.
            let place = Arc::clone(&places).acquire_owned().await;
            let Ok((stream, client)) = listener.accept().await else {
                clock::sleep(PAUSE).await;
                continue;
            };
            sessions += 1;
            let session = Session { clock: self.clock, arrivals: self.arrivals.clone(), number: sessions };
            tokio::spawn(async move {
                // A connection that fails is the engine's to report: the message will be missing, or come again.
                let _ = session.run(stream, client).await;
                drop(place);
            });
        }
    }
}

struct Session {
    clock: Clock,
    arrivals: channel::Sender<Arrival>,
    number: u64,
}

impl Session {
    async fn run(self, mut stream: TcpStream, client: SocketAddr) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let options = SessionOptions {
            hostname: "sink.test".into(),
            client,
            may_relay: true,
            trusted: false,
            max_message_bytes: MESSAGE_BYTES_MAX,
            line_endings: LineEndings::Reject,
            received_detail: ReceivedDetail::None,
            starttls: false,
        };
        let mut out = Vec::new();
        let mut server = SmtpServer::new(self.clock.now(), options, self.number, &mut out);
        let mut input = Vec::with_capacity(RECEIVE_BYTES_MAX);
        let mut received = 0;
        loop {
            let handled = server.handle(self.clock.now(), &input, &mut out);
            input.drain(..handled.consumed);
            match handled.event {
                Some(ServerEvent::Message(message)) => {
                    received += 1;
                    self.deliver(*message).await;
                    let id = MessageId::from_raw(self.number << 32 | received);
                    server.handle_answer(self.clock.now(), Ok(id), &mut out);
                    continue;
                }
                Some(ServerEvent::Close | ServerEvent::StartTls) => return stream.write_all(&out).await,
                None => {}
            }
            if !out.is_empty() {
                stream.write_all(&out).await?;
                out.clear();
            }
            if handled.consumed == 0 && stream.read_buf(&mut input).await? == 0 {
                return Ok(());
            }
        }
    }

    /// The verifiers' queue is bounded; when it is full, the engine has to wait for its 250.
    async fn deliver(&self, message: Received) {
        let mut arrival = Arrival {
            at: self.clock.now().monotonic,
            reverse_path: message.reverse_path,
            recipients: message.recipients,
            content: message.content,
        };
        while let Err(error) = self.arrivals.try_send(arrival) {
            match error {
                TrySendError::Full(back) => arrival = back,
                TrySendError::Disconnected(_) => return,
            }
            clock::sleep(PAUSE).await;
        }
    }
}

const PAUSE: std::time::Duration = std::time::Duration::from_millis(1);
const SESSIONS_MAX: usize = 1_024;
const MESSAGE_BYTES_MAX: u64 = 1 << 20;
