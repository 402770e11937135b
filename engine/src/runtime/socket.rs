//! Connections and listeners on a shard's ring.
//!
//! A [`Socket`] is closed when its last clone is dropped and the last operation in flight on it has ended. Its futures
//! are lazy and don't borrow it, so that one may be kept over many turns of a `select!`. To drop one that has begun and
//! not ended would lose the octets that it still receives, or send half of a list of parts; so that **poisons** the
//! socket: it is shut down, and every later operation fails. On a timeout call [`Socket::abort`] and await the future.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;
use std::{fmt, future, io, net};

use socket2::{SockAddr, SockRef};

use super::net::{is_local_address, open_stream};
use super::uring::{self, Descriptor, Operation, PeerAddress, SendPosition, SendScratch};
use crate::mail::endpoint::Endpoint;

/// Whence and whither to connect.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectOptions {
    /// Bound before connecting; None: the kernel chooses.
    pub(crate) source: Option<IpAddr>,
    /// Binds `source` even if the machine doesn't have the address (IP_FREEBIND).
    pub(crate) freebind: bool,
    pub(crate) to: Endpoint,
}

/// A connection, or one to be.
#[derive(Clone)]
pub(crate) struct Socket(Rc<Inner>);

struct Inner {
    descriptor: Descriptor,
    stage: Cell<Stage>,
    aborted: Cell<bool>,
    poisoned: Cell<bool>,
    receiving: Cell<bool>,
    sending: Cell<bool>,
    bytes_sent: Cell<u64>,
    bytes_received: Cell<u64>,
    /// Kept between sends.
    scratch: RefCell<Option<SendScratch>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open(Endpoint),
    Connecting,
    Connected,
    Failed,
}

impl Socket {
    /// Makes a socket and binds it to the source address, without connecting.
    ///
    /// EADDRNOTAVAIL says that the machine does not have the source address.
    pub(crate) fn open(options: &ConnectOptions) -> io::Result<Self> {
        let socket = open_stream(options.source, options.freebind, options.to)?;
        Ok(Self::new(socket.into(), Stage::Open(options.to)))
    }

    fn new(descriptor: OwnedFd, stage: Stage) -> Self {
        Self(Rc::new(Inner {
            descriptor: Rc::new(descriptor),
            stage: Cell::new(stage),
            aborted: Cell::new(false),
            poisoned: Cell::new(false),
            receiving: Cell::new(false),
            sending: Cell::new(false),
            bytes_sent: Cell::new(0),
            bytes_received: Cell::new(0),
            scratch: RefCell::new(Some(SendScratch::new())),
        }))
    }

    /// Connects to the address given at [`Socket::open`]. Only once.
    pub(crate) fn connect(&self) -> impl Future<Output = io::Result<()>> + use<> {
        let socket = self.clone();
        async move {
            let Stage::Open(to) = socket.0.stage.get() else {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "a socket is connected only once"));
            };
            if socket.is_aborted() {
                socket.0.stage.set(Stage::Failed);
                return Err(cancelled());
            }
            socket.0.stage.set(Stage::Connecting);
            let guard = PoisonUnlessEnded { socket: &socket, in_flight: None };
            let to = match to {
                Endpoint::Ip(address) => Ok(SockAddr::from(address)),
                Endpoint::Unix(path) => SockAddr::unix(path.as_path()),
            };
            let result = match to {
                Ok(to) => uring::connect(socket.0.descriptor.clone(), to).await.0,
                Err(error) => Err(error),
            };
            guard.ended();
            socket.0.stage.set(if result.is_ok() { Stage::Connected } else { Stage::Failed });
            if socket.is_aborted() {
                // The connection may have come about before the cancellation.
                socket.shut_down();
                return Err(cancelled());
            }
            result.map(|_| ())
        }
    }

    /// Receives into the spare capacity of `buffer`; its length grows by the number returned. Ok(0): the peer (or
    /// [`Socket::abort`]) has ended the stream. One receive at a time.
    pub(crate) fn recv(&self, buffer: Vec<u8>) -> impl Future<Output = (io::Result<usize>, Vec<u8>)> + use<> {
        let socket = self.clone();
        async move {
            let guard = match socket.begin(&socket.0.receiving) {
                Ok(guard) => guard,
                Err(error) => return (Err(error), buffer),
            };
            let (result, buffer) = uring::receive(socket.0.descriptor.clone(), buffer).await;
            guard.ended();
            if let Ok(received) = result {
                socket.0.bytes_received.set(socket.0.bytes_received.get() + received as u64);
            }
            (result, buffer)
        }
    }

    /// Sends all parts in order, however many operations it takes, and returns the number of octets. The parts come
    /// back when no operation uses them any more, also after an error. One send at a time.
    pub(crate) fn send<T>(&self, parts: Vec<T>) -> impl Future<Output = (io::Result<usize>, Vec<T>)> + use<T>
    where
        T: AsRef<[u8]> + 'static,
    {
        let socket = self.clone();
        async move {
            let guard = match socket.begin(&socket.0.sending) {
                Ok(guard) => guard,
                Err(error) => return (Err(error), parts),
            };
            let scratch = socket.0.scratch.take().unwrap_or_else(SendScratch::new);
            let (result, parts, scratch) = socket.send_all(parts, scratch).await;
            guard.ended();
            socket.0.scratch.replace(Some(scratch));
            (result, parts)
        }
    }

    async fn send_all<T: AsRef<[u8]> + 'static>(
        &self,
        mut parts: Vec<T>,
        mut scratch: SendScratch,
    ) -> (io::Result<usize>, Vec<T>, SendScratch) {
        let mut position = SendPosition::default();
        let mut total = 0;
        loop {
            let operation = match uring::send(self.0.descriptor.clone(), parts, position, scratch) {
                Ok(operation) => operation,
                Err((parts, scratch)) => return (Ok(total), parts, scratch),
            };
            let (result, sending) = operation.await;
            (parts, scratch) = (sending.parts, sending.scratch);
            match result {
                Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), parts, scratch),
                Ok(sent) => {
                    position.advance(&parts, sent as usize);
                    total += sent as usize;
                    self.0.bytes_sent.set(self.0.bytes_sent.get() + u64::from(sent));
                }
                Err(error) => return (Err(error), parts, scratch),
            }
        }
    }

    /// Ends whatever is pending on this socket, soon: a connect with ECANCELED, a receive with Ok(0) or an error, a
    /// send with an error. Await their futures as usual. May be called at any time, also twice.
    pub(crate) fn abort(&self) {
        if self.0.aborted.replace(true) {
            return;
        }
        match self.0.stage.get() {
            Stage::Open(_) | Stage::Failed => {}
            Stage::Connected => self.shut_down(),
            Stage::Connecting => {
                let socket = self.clone();
                uring::spawn(async move {
                    // A cancellation may come just while the kernel retries the connect, and then finds nothing.
                    while socket.0.stage.get() == Stage::Connecting {
                        let (result, _) = uring::cancel_operations(socket.0.descriptor.clone()).await;
                        if result.is_err() && socket.0.stage.get() == Stage::Connecting {
                            tokio::time::sleep(CANCEL_AGAIN).await;
                        }
                    }
                });
            }
        }
    }

    /// Whether [`Socket::abort`] was called: an end of stream may then be ours.
    pub(crate) fn is_aborted(&self) -> bool {
        self.0.aborted.get()
    }

    /// Has the kernel acknowledge now what was received so far.
    pub(crate) fn acknowledge(&self) {
        // A Unix socket has nothing to acknowledge. Where it fails otherwise, the kernel acknowledges in its own time.
        let _ = SockRef::from(&*self.0.descriptor).set_tcp_quickack(true);
    }

    /// Sends our FIN. The peer may still send; it has closed too when a receive gives Ok(0).
    pub(crate) fn finish(&self) -> io::Result<()> {
        SockRef::from(&*self.0.descriptor).shutdown(net::Shutdown::Write)
    }

    /// Octets handed to the kernel so far. Grows while a large send is under way.
    pub(crate) fn bytes_sent(&self) -> u64 {
        self.0.bytes_sent.get()
    }

    #[cfg(test)]
    pub(crate) fn bytes_received(&self) -> u64 {
        self.0.bytes_received.get()
    }

    /// None of a Unix socket.
    pub(crate) fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        Ok(SockRef::from(&*self.0.descriptor).local_addr()?.as_socket())
    }

    /// None of a Unix socket.
    pub(crate) fn peer_addr(&self) -> io::Result<Option<SocketAddr>> {
        Ok(SockRef::from(&*self.0.descriptor).peer_addr()?.as_socket())
    }

    fn begin<'a>(&'a self, in_flight: &'a Cell<bool>) -> io::Result<PoisonUnlessEnded<'a>> {
        if self.0.poisoned.get() {
            let text = "an operation on this connection was abandoned";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, text));
        }
        assert!(!in_flight.replace(true), "one operation of a kind at a time");
        Ok(PoisonUnlessEnded { socket: self, in_flight: Some(in_flight) })
    }

    fn shut_down(&self) {
        // It fails where the peer has reset the connection, which is as good.
        let _ = SockRef::from(&*self.0.descriptor).shutdown(net::Shutdown::Both);
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.descriptor.as_raw_fd()
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Socket({:?}, {:?})", self.0.descriptor, self.0.stage.get())
    }
}

/// Poisons the socket when dropped before the operation has ended.
struct PoisonUnlessEnded<'a> {
    socket: &'a Socket,
    in_flight: Option<&'a Cell<bool>>,
}

impl PoisonUnlessEnded<'_> {
    fn ended(self) {
        if let Some(in_flight) = self.in_flight {
            in_flight.set(false);
        }
        std::mem::forget(self);
    }
}

impl Drop for PoisonUnlessEnded<'_> {
    fn drop(&mut self) {
        self.socket.0.poisoned.set(true);
        self.socket.0.aborted.set(true);
        self.socket.shut_down();
    }
}

/// A shard's share in a listening socket.
pub(crate) struct Listener {
    descriptor: Descriptor,
    /// An accept in flight stays here when [`Listener::accept`] is dropped, because it may already hold a connection.
    pending: RefCell<Option<Operation<(Descriptor, PeerAddress)>>>,
}

impl Listener {
    /// Shares `listener`, which all shards may do: each connection comes to one of them.
    pub(crate) fn new(listener: &net::TcpListener) -> io::Result<Self> {
        Ok(Self { descriptor: Rc::new(listener.try_clone()?.into()), pending: RefCell::new(None) })
    }

    /// Waits for the next connection. May be dropped and called again.
    ///
    /// Errors are the kernel's own: where [`is_out_of_descriptors`], pause before calling again.
    pub(crate) async fn accept(&self) -> io::Result<(Socket, SocketAddr)> {
        loop {
            match self.finish_pending().await {
                Err(error) if is_lost_connection(&error) => {}
                result => return result,
            }
        }
    }

    /// Stops accepting on this shard. Returns the connection that was accepted meanwhile, if any.
    pub(crate) async fn close(self) -> Option<(Socket, SocketAddr)> {
        self.pending.borrow().as_ref()?;
        let _ = uring::cancel_operations(self.descriptor.clone()).await;
        self.finish_pending().await.ok()
    }

    async fn finish_pending(&self) -> io::Result<(Socket, SocketAddr)> {
        let (result, (_, peer)) = future::poll_fn(|context| {
            let mut pending = self.pending.borrow_mut();
            let operation = pending.get_or_insert_with(|| uring::accept(self.descriptor.clone()));
            let polled = Pin::new(operation).poll(context);
            if polled.is_ready() {
                *pending = None;
            }
            polled
        })
        .await;
        let (descriptor, peer) = uring::accepted(result, peer)?;
        // A reply is written in one piece; Nagle's algorithm would only hold back the last segment.
        let _ = SockRef::from(&descriptor).set_tcp_nodelay(true);
        Ok((Socket::new(descriptor, Stage::Connected), peer))
    }

    #[cfg(test)]
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        let address = SockRef::from(&*self.descriptor).local_addr()?;
        address.as_socket().ok_or_else(|| io::Error::other("a listener without an IP address"))
    }
}

/// Whether an accept failed because this process or machine has no room for one more connection now.
pub(crate) fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// Whether all ports of our address are in use for this peer.
pub(crate) fn is_out_of_ports(error: &io::Error, to: Endpoint) -> bool {
    // The kernel says the same where the machine has no address of that family.
    let has_family = || match to {
        Endpoint::Ip(to) => to.is_ipv4() || is_local_address(Ipv6Addr::LOCALHOST.into()),
        Endpoint::Unix(_) => false,
    };
    error.raw_os_error() == Some(libc::EADDRNOTAVAIL) && has_family()
}

/// Errors of accept(2) that concern one connection, which was gone before we got it, or nothing at all.
fn is_lost_connection(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR | libc::EPROTO | libc::ENETDOWN))
        || matches!(error.raw_os_error(), Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ENONET))
}

fn cancelled() -> io::Error {
    io::Error::from_raw_os_error(libc::ECANCELED)
}

const CANCEL_AGAIN: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests;
