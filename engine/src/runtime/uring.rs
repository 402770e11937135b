//! A shard's ring: whether the kernel gives us one, the runtime on it, and every submission queue entry (SQE).
//!
//! tokio-uring queues an SQE at once and submits it when tokio next parks, so what an SQE names must live, unmoved and
//! still meaning the same, until its completion. Hence the rules of this file:
//!
//! * **Stable data owns all that its SQE names**: the descriptor (an `Rc`, so that its number can't come to mean
//!   another file meanwhile), buffers on the heap, address, message header and vectors. It comes back with the result.
//! * Stable data never uses the ring in `Drop`: tokio-uring drops it while it holds its driver borrowed.
//! * Each operation completes once; multishot and zero-copy sends, which complete twice, panic in tokio-uring.
//! * No linked operations: a full submission queue splits a link silently.
//! * Dropping an [`Operation`] does not cancel it. Cancel with [`cancel_operations`] and await both.
//! * Before the runtime is dropped every operation must have completed, because tokio-uring 0.5 frees the stable data
//!   of unfinished operations before it cancels them; [`run_shard`] sees to that.
//!
//! See also `socket.rs`, which makes connections of these operations.

#![expect(unsafe_code, reason = "SQEs and sockaddr structures hold raw pointers")]

use std::cell::Cell;
use std::future::Future;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::{fmt, fs, io, mem};

use io_uring::types::{CancelBuilder, Fd};
use io_uring::{cqueue, opcode, squeue};
use socket2::{SockAddr, SockAddrStorage};
use tokio_uring::{InFlightOneshot, OneshotOutputTransform, UnsubmittedOneshot};

use crate::limits::{
    RING_COMPLETIONS, RING_ENTRIES, RING_SET_UP_PAUSE, RING_SET_UP_TRIES, SEND_BYTES_PER_OPERATION,
    SEND_PIECES_PER_OPERATION,
};

/// Asks the kernel for a ring with the flags that shards use, and gives it back.
pub(crate) fn check_available() -> Result<(), RingUnavailable> {
    match ring_flags().build(2) {
        Ok(_) => Ok(()),
        Err(error) => Err(RingUnavailable { error, disabled: read_disabled_sysctl() }),
    }
}

/// io_uring can't be used here. The text says why and what to do about it.
#[derive(Debug)]
pub(crate) struct RingUnavailable {
    error: io::Error,
    /// `kernel.io_uring_disabled`, which kernels before 6.6 don't have.
    disabled: Option<u8>,
}

impl fmt::Display for RingUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the kernel refuses an io_uring ({}). ", self.error)?;
        let forbidden = matches!(self.error.raw_os_error(), Some(libc::EPERM | libc::EACCES));
        match (self.error.raw_os_error(), self.disabled) {
            (_, Some(2)) if forbidden => f.write_str(
                "The sysctl kernel.io_uring_disabled is 2: no process may use io_uring. \
                 Set it to 0 with `sysctl -w kernel.io_uring_disabled=0`.",
            ),
            (_, Some(1)) if forbidden => f.write_str(
                "The sysctl kernel.io_uring_disabled is 1: only processes with CAP_SYS_ADMIN or in the group that \
                 kernel.io_uring_group names may use io_uring. Add this user to that group, or set it to 0 with \
                 `sysctl -w kernel.io_uring_disabled=0`.",
            ),
            (_, disabled) if forbidden => {
                match disabled {
                    Some(value) => write!(f, "The sysctl kernel.io_uring_disabled is {value}, which allows it, so ")?,
                    None => f.write_str("The sysctl kernel.io_uring_disabled can't be read; if it is 0 or absent, ")?,
                }
                f.write_str(
                    "a seccomp filter or security module forbids it. The default seccomp profile of container \
                     runtimes does: allow io_uring_setup, io_uring_enter and io_uring_register in a profile of your \
                     own, or run the container with `--security-opt seccomp=unconfined`.",
                )
            }
            (Some(libc::ENOSYS), _) => f.write_str(
                "Either this kernel is built without io_uring (CONFIG_IO_URING), or a seccomp filter hides it, as some \
                 container runtimes' default profiles and sandboxes do: allow io_uring_setup, io_uring_enter and \
                 io_uring_register there. Linux 6.1 or later is needed.",
            ),
            (Some(libc::EINVAL), _) => f.write_str("This kernel is too old: Linux 6.1 or later is needed."),
            (Some(libc::ENOMEM), _) => f.write_str(
                "The limit of locked memory may be too low: raise it (`ulimit -l`, LimitMEMLOCK= under systemd).",
            ),
            (Some(libc::EMFILE | libc::ENFILE), _) => {
                f.write_str("No file descriptor is left: raise the limit (`ulimit -n`, LimitNOFILE= under systemd).")
            }
            _ => f.write_str("Linux 6.1 or later with io_uring is needed."),
        }
    }
}

impl std::error::Error for RingUnavailable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Runs `future` on a ring of its own, on this thread, and returns what it returns.
///
/// When `future` ends, operations still in flight are cancelled and awaited, and the tasks that wait for them may run
/// once more; new operations go nowhere and never end. This counts only operations built in this file: others, such
/// as the spool's, must have been awaited before.
pub(crate) fn run_shard<F: Future>(name: &str, future: F) -> io::Result<F::Output> {
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES).uring_builder(&ring_flags());
    let runtime = set_up(&builder).map_err(|error| {
        let text = format!("{name}: cannot set up its io_uring: {error}{}", remedy(&error));
        io::Error::new(error.kind(), text)
    })?;
    let (output, in_flight) = runtime.block_on(async {
        RING.with(|ring| ring.closing.set(false));
        let output = future.await;
        (output, cancel_all().await)
    });
    if in_flight > 0 {
        // Leaking memory is better than letting the kernel write into freed memory.
        tracing::error!(shard = name, in_flight, "operations did not end; their memory is given up");
        mem::forget(runtime);
    }
    Ok(output)
}

/// What rings of an engine that has just ended took is given back by the kernel a moment later.
fn set_up(builder: &tokio_uring::Builder) -> io::Result<tokio_uring::Runtime> {
    let mut tries = 1;
    loop {
        match tokio_uring::Runtime::new(builder) {
            Err(error) if error.kind() == io::ErrorKind::OutOfMemory && tries < RING_SET_UP_TRIES => {
                tries += 1;
                std::thread::sleep(RING_SET_UP_PAUSE);
            }
            result => return result,
        }
    }
}

/// Rings count as locked memory where the process may not lock as much as it likes.
fn remedy(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::OutOfMemory {
        "; raise the limit of locked memory (`ulimit -l`, LimitMEMLOCK= under systemd), 1 MiB for each shard"
    } else {
        ""
    }
}

/// Starts a task on this shard.
pub(crate) fn spawn<F>(future: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    tokio_uring::spawn(future)
}

/// `setup_defer_taskrun` would hang tokio-uring, which waits by epoll; without the other two a message costs twice.
fn ring_flags() -> io_uring::Builder {
    let mut flags = tokio_uring::uring_builder();
    flags.setup_coop_taskrun().setup_single_issuer().setup_clamp().setup_cqsize(RING_COMPLETIONS);
    flags
}

fn read_disabled_sysctl() -> Option<u8> {
    fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?.trim().parse().ok()
}

/// What this thread's ring has in flight. Like tokio-uring's own driver, there is one per thread at a time.
struct Ring {
    in_flight: Cell<usize>,
    closing: Cell<bool>,
}

thread_local! {
    static RING: Ring = const { Ring { in_flight: Cell::new(0), closing: Cell::new(false) } };
}

/// Whether the shard on this thread has ended and only waits for its operations. Tasks that still run must not begin
/// operations of their own making, such as the spool's.
pub(crate) fn is_closing() -> bool {
    RING.with(|ring| ring.closing.get())
}

/// Goes through the ring once, so that what was queued is submitted and other tasks have their turn. `yield_now` would
/// not do: the ring submits only when tokio parks.
pub(crate) async fn breathe() {
    // SAFETY: the SQE names nothing.
    let _ = unsafe { queue((), opcode::Nop::new().build()) }.await;
}

/// How many operations of this file have not ended on this thread.
pub(crate) fn operations_in_flight() -> usize {
    RING.with(|ring| ring.in_flight.get())
}

async fn cancel_all() -> usize {
    RING.with(|ring| ring.closing.set(true));
    for _ in 0..DRAIN_ROUNDS {
        if operations_in_flight() == 0 {
            return 0;
        }
        let sqe = opcode::AsyncCancel2::new(CancelBuilder::any().all()).build();
        // SAFETY: the SQE names nothing.
        let _ = unsafe { queue((), sqe) }.await;
        // A cancelled operation's completion may come after the cancellation's.
        tokio::time::sleep(DRAIN_PAUSE).await;
    }
    operations_in_flight()
}

/// Counts an operation from its submission until its stable data is given back or dropped.
struct InFlight;

impl InFlight {
    fn begin() -> Self {
        RING.with(|ring| ring.in_flight.set(ring.in_flight.get() + 1));
        Self
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // The thread may be ending, and its ring's count with it.
        let _ = RING.try_with(|ring| ring.in_flight.set(ring.in_flight.get() - 1));
    }
}

/// An operation on the ring: resolves to its result and its stable data.
#[must_use = "an operation must be awaited: dropping it does not cancel it"]
pub(crate) struct Operation<D: Unpin + 'static>(State<D>);

enum State<D: Unpin + 'static> {
    InFlight(InFlightOneshot<Stable<D>, Finish<D>>),
    /// The shard is closing: the ring never saw it, and it never ends. Its task is dropped with the runtime.
    Void(D),
}

struct Stable<D> {
    data: D,
    _count: InFlight,
}

struct Finish<D>(PhantomData<fn() -> D>);

impl<D> OneshotOutputTransform for Finish<D> {
    type Output = (io::Result<u32>, D);
    type StoredData = Stable<D>;

    fn transform_oneshot_output(self, stable: Stable<D>, cqe: cqueue::Entry) -> Self::Output {
        let result = u32::try_from(cqe.result()).map_err(|_| io::Error::from_raw_os_error(-cqe.result()));
        (result, stable.data)
    }
}

impl<D: Unpin + 'static> Future for Operation<D> {
    type Output = (io::Result<u32>, D);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::InFlight(operation) => Pin::new(operation).poll(context),
            State::Void(_) => Poll::Pending,
        }
    }
}

/// Queues an operation, unless the shard is closing, when one after the other would hold up the end.
///
/// # Safety
/// As [`queue`].
unsafe fn submit<D: Unpin + 'static>(data: D, sqe: squeue::Entry) -> Operation<D> {
    if is_closing() {
        return Operation(State::Void(data));
    }
    // SAFETY: as the caller says.
    unsafe { queue(data, sqe) }
}

/// Queues an operation.
///
/// # Safety
/// `data` owns everything that `sqe` names, at addresses that don't change when `data` is moved.
unsafe fn queue<D: Unpin + 'static>(data: D, sqe: squeue::Entry) -> Operation<D> {
    let stable = Stable { data, _count: InFlight::begin() };
    Operation(State::InFlight(UnsubmittedOneshot::new(stable, Finish(PhantomData), sqe).submit()))
}

/// An open file shared with the operations that are in flight on it: it is closed when the last of them has ended.
pub(crate) type Descriptor = Rc<OwnedFd>;

fn raw(descriptor: &Descriptor) -> Fd {
    Fd(descriptor.as_raw_fd())
}

/// Connects a socket. Its data holds the descriptor and the address.
pub(crate) fn connect(descriptor: Descriptor, to: SockAddr) -> Operation<(Descriptor, Box<SockAddr>)> {
    let to = Box::new(to);
    let sqe = opcode::Connect::new(raw(&descriptor), to.as_ptr().cast(), to.len()).build();
    // SAFETY: the SQE names the descriptor and the address, which is boxed; the data owns both.
    unsafe { submit((descriptor, to), sqe) }
}

/// Receives into the spare capacity of `buffer`, which must have some, and lengthens it by what came.
pub(crate) async fn receive(descriptor: Descriptor, mut buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
    let spare = buffer.spare_capacity_mut();
    if spare.is_empty() {
        return (Err(io::Error::new(io::ErrorKind::InvalidInput, "no room to receive into")), buffer);
    }
    let length = u32::try_from(spare.len()).unwrap_or(u32::MAX);
    let sqe = opcode::Recv::new(raw(&descriptor), spare.as_mut_ptr().cast(), length).build();
    // SAFETY: the SQE names the descriptor and the vector's heap memory; the data owns both, and nothing touches the
    // vector until it comes back.
    let (result, (_, mut buffer)) = unsafe { submit((descriptor, buffer), sqe) }.await;
    if let Ok(received) = result {
        let length = buffer.len() + received as usize;
        assert!(length <= buffer.capacity());
        // SAFETY: the kernel has written this many octets behind the former length, within the capacity.
        unsafe { buffer.set_len(length) };
    }
    (result.map(|received| received as usize), buffer)
}

/// Where the next octet to be sent stands in a list of parts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SendPosition {
    part: usize,
    offset: usize,
}

impl SendPosition {
    /// Moves on by `sent` octets. What an operation sent can't be more than it was given.
    pub(crate) fn advance<T: AsRef<[u8]>>(&mut self, parts: &[T], mut sent: usize) {
        while sent > 0 {
            let rest = parts[self.part].as_ref().len() - self.offset;
            if sent < rest {
                self.offset += sent;
                return;
            }
            sent -= rest;
            *self = Self { part: self.part + 1, offset: 0 };
        }
    }
}

/// The message header of a SENDMSG and the vectors it points to.
pub(crate) struct SendScratch {
    header: Box<libc::msghdr>,
    pieces: Vec<libc::iovec>,
}

impl SendScratch {
    pub(crate) fn new() -> Self {
        // SAFETY: a msghdr of zeros is valid: null pointers with zero lengths.
        Self { header: Box::new(unsafe { mem::zeroed() }), pieces: Vec::new() }
    }
}

/// The parts of a send, and what is needed to send more of them.
pub(crate) struct Sending<T> {
    /// Open until the operation has ended.
    _descriptor: Descriptor,
    pub(crate) parts: Vec<T>,
    pub(crate) scratch: SendScratch,
}

// Nothing here is pinned: the kernel is given heap addresses only.
impl<T> Unpin for Sending<T> {}

/// Sends parts from `position` on: as many as one operation takes. None: nothing is left to send.
///
/// The kernel waits for room rather than sending less (`MSG_WAITALL`), but may still send less than asked.
pub(crate) fn send<T: AsRef<[u8]> + 'static>(
    descriptor: Descriptor,
    parts: Vec<T>,
    position: SendPosition,
    mut scratch: SendScratch,
) -> Result<Operation<Sending<T>>, (Vec<T>, SendScratch)> {
    scratch.pieces.clear();
    let mut room = SEND_BYTES_PER_OPERATION;
    let mut offset = position.offset;
    for part in parts.iter().skip(position.part) {
        let octets = &part.as_ref()[offset..];
        let octets = &octets[..octets.len().min(room)];
        offset = 0;
        if !octets.is_empty() {
            scratch.pieces.push(libc::iovec { iov_base: octets.as_ptr().cast_mut().cast(), iov_len: octets.len() });
            room -= octets.len();
        }
        if room == 0 || scratch.pieces.len() == SEND_PIECES_PER_OPERATION {
            break;
        }
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
    let sqe = match scratch.pieces.as_mut_slice() {
        [] => return Err((parts, scratch)),
        [piece] => {
            opcode::Send::new(raw(&descriptor), piece.iov_base.cast(), piece.iov_len as u32).flags(flags).build()
        }
        pieces => {
            scratch.header.msg_iov = pieces.as_mut_ptr();
            scratch.header.msg_iovlen = pieces.len();
            opcode::SendMsg::new(raw(&descriptor), &raw const *scratch.header).flags(flags as u32).build()
        }
    };
    // SAFETY: the SQE names the descriptor, the boxed header, the vectors on the heap, and the octets of the parts. The
    // data owns all of them. The parts lie in a `Vec` whose memory is not touched, hence not moved or changed, until
    // the data comes back, so the slices that they lent here stay valid even if a part holds its octets inline.
    Ok(unsafe { submit(Sending { _descriptor: descriptor, parts, scratch }, sqe) })
}

/// Room for a peer's address, on the heap as the kernel writes it.
pub(crate) struct PeerAddress(Box<(SockAddrStorage, libc::socklen_t)>);

/// Accepts a connection. Dropped before its end, it may swallow one: keep it.
pub(crate) fn accept(listener: Descriptor) -> Operation<(Descriptor, PeerAddress)> {
    let storage = SockAddrStorage::zeroed();
    let length = storage.size_of();
    let mut peer = PeerAddress(Box::new((storage, length)));
    let (storage, length) = &mut *peer.0;
    let address = (&raw mut *storage).cast();
    let sqe = opcode::Accept::new(raw(&listener), address, length).flags(libc::SOCK_CLOEXEC).build();
    // SAFETY: the SQE names the descriptor and the boxed address and length; the data owns both.
    unsafe { submit((listener, peer), sqe) }
}

/// Turns a completed [`accept`] into the new connection's descriptor and its peer's address.
pub(crate) fn accepted(result: io::Result<u32>, peer: PeerAddress) -> io::Result<(OwnedFd, SocketAddr)> {
    let number = result?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number as i32) };
    let (storage, length) = *peer.0;
    // SAFETY: the kernel has filled in an address of this length.
    let address = unsafe { SockAddr::new(storage, length) };
    let address = address.as_socket().ok_or_else(|| io::Error::other("a peer without an IP address"))?;
    Ok((descriptor, address))
}

/// Cancels all operations of this ring on a descriptor. They complete with ECANCELED, or as if nothing had happened.
pub(crate) fn cancel_operations(descriptor: Descriptor) -> Operation<Descriptor> {
    let sqe = opcode::AsyncCancel2::new(CancelBuilder::fd(raw(&descriptor)).all()).build();
    // SAFETY: the SQE names only the descriptor, which the data owns.
    unsafe { submit(descriptor, sqe) }
}

/// Reads an eventfd's counter: completes when it is not zero, and sets it to zero.
pub(crate) fn read_counter(eventfd: Descriptor) -> Operation<(Descriptor, Box<[u8; 8]>)> {
    let mut counter = Box::new([0; 8]);
    let sqe = opcode::Read::new(raw(&eventfd), counter.as_mut_ptr(), 8).build();
    // SAFETY: the SQE names the descriptor and the boxed octets; the data owns both.
    unsafe { submit((eventfd, counter), sqe) }
}

const DRAIN_ROUNDS: usize = 5_000;
const DRAIN_PAUSE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests;
