//! Bounds on HTTP connections that hold for every call: how many there are, and how long one may keep us waiting.
//!
//! A connection is *new* or *idle* (nothing of a request has come), *receiving* (from a request's first byte until we
//! begin to answer) or *sending*. Each has its deadline. It need not understand HTTP for this: one side speaks at a
//! time. A peer that drips its request octet by octet runs into the same deadline as a silent one.
//!
//! When there are as many as there may be and another comes, one makes room, whoever stands worst (`http_crowd.rs`):
//! so neither those that ask nothing nor slow ones keep a liveness probe waiting.

use std::future::Future as _;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Duration, Instant, Sleep, sleep, sleep_until};

use super::http_crowd::{Crowd, Place, Seat, Standing};
use crate::limits::{HTTP_CONNECTIONS_MAX, HTTP_IDLE_TIMEOUT, HTTP_REQUEST_TIMEOUT};

/// A listener that serves at most so many connections at a time; others wait in the kernel.
pub(super) struct BoundedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    crowd: Arc<Crowd>,
}

impl BoundedListener {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(HTTP_CONNECTIONS_MAX)), crowd: Arc::default() }
    }

    async fn place(&self) -> Place {
        let permit = match Arc::clone(&self.places).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                self.crowd.dismiss_one();
                Arc::clone(&self.places).acquire_owned().await.expect("the semaphore is never closed")
            }
        };
        Crowd::enter(&self.crowd, permit)
    }
}

impl Listener for BoundedListener {
    type Io = BoundedConnection<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => return (BoundedConnection::new(stream, Some(self.place().await)), peer),
                Err(error) => {
                    // A client that is gone already costs nothing; for anything else (EMFILE) waiting is all we can do.
                    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
                        tracing::warn!("HTTP: can't accept connections: {error}");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A stream with deadlines. Holds its place until it is dropped.
pub(super) struct BoundedConnection<S> {
    stream: S,
    phase: Phase,
    deadline: Pin<Box<Sleep>>,
    place: Option<Place>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    New,
    Idle,
    Receiving,
    Sending,
}

impl<S> BoundedConnection<S> {
    fn new(stream: S, place: Option<Place>) -> Self {
        // A new connection is there because somebody wants to ask something.
        let deadline = Box::pin(sleep(HTTP_REQUEST_TIMEOUT));
        Self { stream, phase: Phase::New, deadline, place }
    }

    /// Who is to say once a request has come whole.
    pub(super) fn seat(&self) -> Option<Seat> {
        self.place.as_ref().map(Place::seat)
    }

    fn stand(&self, standing: Standing) {
        if let Some(place) = &self.place {
            place.stand(standing);
        }
    }

    fn enter(&mut self, phase: Phase) {
        let time = if phase == Phase::Idle { HTTP_IDLE_TIMEOUT } else { HTTP_REQUEST_TIMEOUT };
        self.phase = phase;
        self.stand(match phase {
            Phase::Idle => Standing::Idle,
            Phase::New | Phase::Receiving => Standing::Slow,
            Phase::Sending => Standing::Served,
        });
        self.deadline.as_mut().reset(Instant::now() + time);
    }

    /// Whether it has to make room for others; wakes the task when it has.
    fn poll_dismissed(&self, context: &mut Context<'_>) -> Poll<io::Error> {
        let dismissed = self.place.as_ref().map_or(Poll::Pending, |place| place.poll_dismissed(context));
        dismissed.map(|()| io::ErrorKind::ConnectionAborted.into())
    }

    /// To be asked whenever the stream has nothing for us; wakes the task when it is to end.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        if let Poll::Ready(error) = self.poll_dismissed(context) {
            return Poll::Ready(error);
        }
        self.deadline.as_mut().poll(context).map(|()| {
            // A Sleep may not be polled again once it is over.
            self.deadline = Box::pin(sleep_until(Instant::now() + HTTP_REQUEST_TIMEOUT));
            io::ErrorKind::TimedOut.into()
        })
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for BoundedConnection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Ready(Ok(())) => {
                // Only the first byte counts, else dripping would go on for ever.
                if self.phase != Phase::Receiving && buffer.filled().len() > before {
                    self.enter(Phase::Receiving);
                }
                if self.phase == Phase::Receiving && self.deadline.is_elapsed() {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(error) => Poll::Ready(error),
            Poll::Pending => {
                // What was sent has left us; the peer may think before it asks again.
                if self.phase == Phase::Sending {
                    self.enter(Phase::Idle);
                }
                self.poll_end(context).map(Err)
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> BoundedConnection<S> {
    /// Every octet taken by the peer gives it time for the next.
    fn note_written(&mut self, written: Poll<io::Result<usize>>, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(_) => self.enter(Phase::Sending),
            Poll::Pending => {
                if self.phase != Phase::Sending {
                    self.enter(Phase::Sending);
                }
                self.stand(Standing::Slow);
                // Registers the wake-up.
                return self.poll_end(context).map(Err);
            }
        }
        written
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for BoundedConnection<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note_written(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note_written(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        // The answer has left us. It may not be looked for another request until there is one.
        if flushed.is_ready() && self.phase == Phase::Sending {
            self.enter(Phase::Idle);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    /// Tokio's clock stands and jumps to the next timer when all tasks wait: no test here takes real time.
    fn in_virtual_time(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(test);
    }

    #[test]
    fn a_silent_peer_is_left_after_the_request_timeout() {
        in_virtual_time(async {
            let (_peer, stream) = duplex(64);
            let mut connection = BoundedConnection::new(stream, None);
            let begun = Instant::now();
            let error = connection.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!((HTTP_REQUEST_TIMEOUT..HTTP_REQUEST_TIMEOUT * 2).contains(&begun.elapsed()));
        });
    }

    #[test]
    fn a_peer_that_drips_is_left_as_well() {
        in_virtual_time(async {
            let (mut peer, stream) = duplex(64);
            tokio::spawn(async move {
                for _ in 0..100 {
                    if peer.write_u8(b'x').await.is_err() {
                        break;
                    }
                    sleep(Duration::from_secs(1)).await;
                }
            });
            let mut connection = BoundedConnection::new(stream, None);
            let begun = Instant::now();
            let error = loop {
                if let Err(error) = connection.read_u8().await {
                    break error;
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(begun.elapsed() <= HTTP_REQUEST_TIMEOUT + Duration::from_secs(1));
        });
    }

    #[test]
    fn between_requests_there_is_more_time_and_each_request_has_its_own() {
        in_virtual_time(async {
            let (mut peer, stream) = duplex(64);
            let mut connection = BoundedConnection::new(stream, None);
            for _ in 0..3 {
                peer.write_u8(b'q').await.unwrap();
                connection.read_u8().await.unwrap();
                connection.write_u8(b'a').await.unwrap();
                peer.read_u8().await.unwrap();
                let idle = tokio::time::timeout(HTTP_IDLE_TIMEOUT - Duration::from_secs(1), connection.read_u8());
                assert!(idle.await.is_err(), "still open");
            }
            let begun = Instant::now();
            let error = connection.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(begun.elapsed() <= Duration::from_secs(2));
        });
    }

    /// Real sockets, and no time: whoever waits is woken by what another does.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "asks over loopback")]
    fn those_that_ask_nothing_make_room_longest_first() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut listener = BoundedListener::new(TcpListener::bind(("127.0.0.1", 0)).await.unwrap());
            let address = listener.local_addr().unwrap();
            let mut peers = Vec::new();
            let mut reads = Vec::new();
            for number in 0..HTTP_CONNECTIONS_MAX {
                peers.push(TcpStream::connect(address).await.unwrap());
                let (mut connection, _) = listener.accept().await;
                if number == 0 {
                    // It has asked something.
                    peers[0].write_u8(b'q').await.unwrap();
                    connection.read_u8().await.unwrap();
                    connection.seat().unwrap().serve();
                }
                reads.push(tokio::spawn(async move { connection.read_u8().await.map_err(|error| error.kind()) }));
                tokio::task::yield_now().await;
            }
            for _ in 0..2 {
                peers.push(TcpStream::connect(address).await.unwrap());
                let (connection, _) = listener.accept().await;
                reads.push(tokio::spawn(async move {
                    let mut connection = connection;
                    connection.read_u8().await.map_err(|error| error.kind())
                }));
            }
            let ended: Vec<usize> = (0..reads.len()).filter(|number| reads[*number].is_finished()).collect();
            assert_eq!(ended, [1, 2], "the first that asks nothing, and the second; what is served goes on");
            assert_eq!((&mut reads[1]).await.unwrap(), Err(io::ErrorKind::ConnectionAborted));
        });
    }

    #[test]
    fn a_peer_that_does_not_read_is_left() {
        in_virtual_time(async {
            let (_peer, stream) = duplex(64);
            let mut connection = BoundedConnection::new(stream, None);
            let begun = Instant::now();
            let error = connection.write_all(&[0; 1_000]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!((HTTP_REQUEST_TIMEOUT..HTTP_REQUEST_TIMEOUT * 2).contains(&begun.elapsed()));
        });
    }
}
