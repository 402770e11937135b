//! A fast SMTP sink that keeps books: counts, duplicates, latencies, peers and their EHLO names.
//!
//! [`Sink::start`] binds and serves on threads of its own until the [`Sink`] is stopped or dropped. All threads accept
//! on the same listening sockets. A connection's octets go through one receive buffer per thread and
//! [`session::Session`]; replies of a pipelined group leave in one write.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener as StdListener};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll, ready};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use self::dkim::DkimCheck;
use self::faults::{FaultPlan, Stage};
use self::ledger::Ledger;
use self::session::{Flow, Keep, ReceivedMessage, Receiver, Session};
use self::tls::TlsIdentity;

pub mod dkim;
pub mod faults;
pub mod ledger;
pub mod session;
pub mod tls;

/// How a sink behaves.
#[derive(Debug)]
pub struct SinkOptions {
    /// Port 0 is allowed.
    pub listen: Vec<SocketAddr>,
    /// Hears the loopback device alone, so that an unspecified address means all of 127.0.0.0/8.
    pub loopback_device: bool,
    pub threads: usize,
    pub faults: Arc<FaultPlan>,
    /// Waited before each group of replies.
    pub delay: Duration,
    /// Every message goes here: `00000001.eml` as sent, `00000001.json` with its envelope.
    pub dump: Option<PathBuf>,
    pub audit: bool,
    /// Offers CHUNKING.
    pub chunking: bool,
    /// Offers STARTTLS.
    pub tls: Option<TlsIdentity>,
    /// Gets a share of the messages to verify.
    pub dkim: Option<Arc<DkimCheck>>,
    /// Greets nobody until [`Sink::open`]; who connects waits.
    pub closed: bool,
}

impl SinkOptions {
    /// One thread on a free loopback port, with audit.
    pub fn on_loopback() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            loopback_device: false,
            threads: 1,
            faults: Arc::new(FaultPlan::none()),
            delay: Duration::ZERO,
            dump: None,
            audit: true,
            chunking: true,
            tls: None,
            dkim: None,
            closed: false,
        }
    }
}

/// A running sink.
#[derive(Debug)]
pub struct Sink {
    addresses: Vec<SocketAddr>,
    ledger: Arc<Ledger>,
    faults: Arc<FaultPlan>,
    open: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Sink {
    pub fn start(options: SinkOptions) -> Result<Self> {
        let listeners = options
            .listen
            .iter()
            .map(|address| listen(*address, options.loopback_device))
            .collect::<Result<Vec<_>>>()?;
        let addresses = listeners.iter().map(StdListener::local_addr).collect::<io::Result<Vec<_>>>()?;
        if let Some(dump) = &options.dump {
            fs::create_dir_all(dump).with_context(|| format!("cannot create {}", dump.display()))?;
        }
        let ledger = Arc::new(Ledger::new(options.audit));
        let faults = options.faults.clone();
        let (open, opened) = watch::channel(!options.closed);
        let (stop, stopped) = watch::channel(false);
        let shared = Arc::new(Shared { ledger: ledger.clone(), options, sessions: AtomicU64::new(0) });
        let mut threads = Vec::new();
        for number in 0..shared.options.threads.max(1) {
            let listeners = listeners.iter().map(StdListener::try_clone).collect::<io::Result<Vec<_>>>()?;
            let (shared, opened, stopped) = (shared.clone(), opened.clone(), stopped.clone());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let serve = move || runtime.block_on(serve(listeners, shared, opened, stopped));
            threads.push(std::thread::Builder::new().name(format!("{THREAD_NAME}{number}")).spawn(serve)?);
        }
        Ok(Self { addresses, ledger, faults, open, stop, threads })
    }

    /// The addresses bound, in the order asked for.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    pub fn faults(&self) -> &Arc<FaultPlan> {
        &self.faults
    }

    /// Greets those who wait since a closed sink was started, and all others.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Closes all connections and waits for the threads.
    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        self.stop.send_replace(true);
        for thread in self.threads.drain(..) {
            // A panic ends the process; in tests it has been printed.
            let _ = thread.join();
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.join();
    }
}

#[derive(Debug)]
struct Shared {
    ledger: Arc<Ledger>,
    options: SinkOptions,
    sessions: AtomicU64,
}

fn listen(address: SocketAddr, loopback_device: bool) -> Result<StdListener> {
    let bound = || -> io::Result<StdListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if loopback_device {
            socket.bind_device(Some(b"lo"))?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    };
    bound().with_context(|| format!("cannot listen on {address}"))
}

async fn serve(
    listeners: Vec<StdListener>,
    shared: Arc<Shared>,
    opened: watch::Receiver<bool>,
    mut stopped: watch::Receiver<bool>,
) {
    for listener in listeners {
        match TcpListener::from_std(listener) {
            Ok(listener) => drop(tokio::spawn(accept(listener, opened.clone(), shared.clone()))),
            Err(error) => crate::report::note(&format!("sink: cannot serve: {error}")),
        }
    }
    // The runtime ends with this task, and with it all connections. An error means that the sink was dropped.
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn accept(listener: TcpListener, mut opened: watch::Receiver<bool>, shared: Arc<Shared>) {
    // An error means that the sink was dropped.
    let _ = opened.wait_for(|open| *open).await;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Without it small replies would wait for an acknowledgement; failing to set it costs only time.
                let _ = stream.set_nodelay(true);
                tokio::spawn(connection(stream, peer.ip().to_canonical(), shared.clone()));
            }
            // A connection that was reset while it waited, or too many open files: the next may fare better.
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn connection(stream: TcpStream, peer: IpAddr, shared: Arc<Shared>) {
    shared.ledger.connected(peer);
    // A connection that breaks is the peer's affair; the ledger shows what is missing.
    let _ = converse(stream, peer, &shared).await;
    shared.ledger.disconnected();
}

async fn converse(mut stream: TcpStream, peer: IpAddr, shared: &Shared) -> io::Result<()> {
    let mut out = Vec::new();
    let options = &shared.options;
    let seed = shared.sessions.fetch_add(1, Ordering::Relaxed);
    let keep = match &options.dkim {
        _ if options.dump.is_some() => Keep::All,
        Some(dkim) => Keep::Share(dkim.share()),
        None => Keep::Share(0.0),
    };
    let mut session = Session::new(options.faults.clone(), keep, peer, seed, Instant::now(), &mut out);
    if !options.chunking {
        session.offer_no_chunking();
    }
    if options.tls.is_some() {
        session.offer_starttls();
    }
    answer(&mut stream, &mut out, shared).await?;
    if session.is_closing() {
        return Ok(());
    }
    let flow = dialog(&mut stream, &mut session, &mut out, shared).await?;
    let (Flow::StartTls, Some(identity)) = (flow, &options.tls) else {
        return Ok(());
    };
    let mut stream = match identity.acceptor().accept(stream).await {
        Ok(stream) => stream,
        Err(error) => {
            shared.ledger.tls_failed();
            return Err(error);
        }
    };
    shared.ledger.secured(tls::describe(stream.get_ref().1));
    session.secured();
    dialog(&mut stream, &mut session, &mut out, shared).await.map(|_| ())
}

/// Until the peer closes, or the session ends, or goes on in TLS.
async fn dialog<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    session: &mut Session,
    out: &mut Vec<u8>,
    shared: &Shared,
) -> io::Result<Flow> {
    let mut desk = Desk { shared };
    loop {
        let Some(flow) = std::future::poll_fn(|context| receive(context, stream, session, out, &mut desk)).await?
        else {
            return Ok(Flow::Close);
        };
        answer(stream, out, shared).await?;
        if flow != Flow::Continue {
            return Ok(flow);
        }
    }
}

/// One receive into the thread's buffer, worked off before anything else runs; `None` at the peer's end.
fn receive<S: AsyncRead + Unpin>(
    context: &mut TaskContext<'_>,
    stream: &mut S,
    session: &mut Session,
    out: &mut Vec<u8>,
    desk: &mut Desk<'_>,
) -> Poll<io::Result<Option<Flow>>> {
    RECEIVE_BUFFER.with_borrow_mut(|buffer| {
        if buffer.is_empty() {
            buffer.resize(RECEIVE_BUFFER_BYTES, 0);
        }
        let mut room = ReadBuf::new(buffer);
        ready!(Pin::new(stream).poll_read(context, &mut room))?;
        let input = room.filled();
        Poll::Ready(Ok((!input.is_empty()).then(|| session.handle(Instant::now(), input, out, desk))))
    })
}

async fn answer<S: AsyncWrite + Unpin>(stream: &mut S, out: &mut Vec<u8>, shared: &Shared) -> io::Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    if !shared.options.delay.is_zero() {
        tokio::time::sleep(shared.options.delay).await;
    }
    stream.write_all(out).await?;
    // Of TLS: what was written is only a record until then.
    stream.flush().await?;
    out.clear();
    Ok(())
}

/// Enters what a session received into the books, and on disk where asked.
struct Desk<'a> {
    shared: &'a Shared,
}

impl Receiver for Desk<'_> {
    fn greeted(&mut self, peer: IpAddr, ehlo: &str) {
        self.shared.ledger.greeted(peer, ehlo);
    }

    fn received(&mut self, message: &ReceivedMessage<'_>) {
        let number = self.shared.ledger.received(message);
        if let Some(directory) = &self.shared.options.dump
            && let Err(error) = dump(directory, number, message)
        {
            crate::report::note(&format!("sink: cannot dump message {number}: {error}"));
        }
        if let Some(dkim) = self.shared.options.dkim.as_ref().filter(|_| message.whole) {
            dkim.look_at(message.content);
        }
    }

    fn refused(&mut self, stage: Stage) {
        self.shared.ledger.refused(stage);
    }

    fn greylisted(&mut self) {
        self.shared.ledger.greylisted();
    }
}

/// The `.eml` comes last and by renaming: whoever sees it can read both files whole.
fn dump(directory: &Path, number: u64, message: &ReceivedMessage<'_>) -> io::Result<()> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let envelope = json!({
        "peer": message.peer,
        "ehlo": message.ehlo,
        "mail": text(message.mail),
        "rcpt": message.recipients.iter().map(|recipient| text(recipient)).collect::<Vec<_>>(),
        "command": if message.chunked { "BDAT" } else { "DATA" },
    });
    fs::write(directory.join(format!("{number:08}.json")), format!("{envelope}\n"))?;
    let unfinished = directory.join(format!("{number:08}.part"));
    fs::File::create(&unfinished)?.write_all(message.content)?;
    fs::rename(unfinished, directory.join(format!("{number:08}.eml")))
}

thread_local! {
    static RECEIVE_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Of each thread, with its number behind; [`crate::measure`] tells their CPU time by it.
pub const THREAD_NAME: &str = "sink-";
const RECEIVE_BUFFER_BYTES: usize = 256 << 10;
const BACKLOG: i32 = 4096;
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_closed_sink_greets_once_it_is_opened() {
        let sink = Sink::start(SinkOptions { closed: true, ..SinkOptions::on_loopback() }).unwrap();
        let mut client = TcpStream::connect(sink.addresses()[0]).unwrap();
        let mut room = [0; 4];
        client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert_eq!(client.read(&mut room).map_err(|error| error.kind()), Err(io::ErrorKind::WouldBlock));
        sink.open();
        client.set_read_timeout(None).unwrap();
        client.read_exact(&mut room).unwrap();
        assert_eq!(&room, b"220 ");
    }
}
