//! STARTTLS in front of a sink: a server that offers it, shakes hands, and passes everything else through.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustls::ServerConfig;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::policy_server::identity;

/// A running front; it stops when dropped.
pub(crate) struct TlsFront {
    address: SocketAddr,
    certificate_pem: String,
    counts: Arc<Counts>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

#[derive(Default)]
struct Counts {
    handshakes: AtomicUsize,
    refusals: AtomicUsize,
}

#[allow(dead_code, reason = "not every test uses every call")]
impl TlsFront {
    /// In front of `inner`, with a certificate of its own for these names.
    pub(crate) fn try_start_at(address: SocketAddr, names: &[&str], inner: SocketAddr) -> io::Result<Self> {
        let (certificate_pem, tls) = identity(names);
        Self::with_identity(address, certificate_pem, tls, inner)
    }

    pub(crate) fn with_identity(
        address: SocketAddr,
        certificate_pem: String,
        tls: Arc<ServerConfig>,
        inner: SocketAddr,
    ) -> io::Result<Self> {
        let listener = StdListener::bind(address)?;
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let counts = Arc::new(Counts::default());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let counting = Arc::clone(&counts);
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    () = accept(listener, tls, inner, counting) => {}
                    // Dropped or told, it ends.
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { address, certificate_pem, counts, stop: Some(stop) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// A root that vouches for it.
    pub(crate) fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Handshakes that both sides were content with, as far as the server knows.
    pub(crate) fn handshakes(&self) -> usize {
        self.counts.handshakes.load(Ordering::SeqCst)
    }

    /// Handshakes that failed.
    pub(crate) fn refusals(&self) -> usize {
        self.counts.refusals.load(Ordering::SeqCst)
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
    }
}

async fn accept(listener: TcpListener, tls: Arc<ServerConfig>, inner: SocketAddr, counts: Arc<Counts>) {
    while let Ok((stream, _)) = listener.accept().await {
        // An error is somebody's end of the connection.
        let serving = serve(stream, TlsAcceptor::from(Arc::clone(&tls)), inner, Arc::clone(&counts));
        tokio::spawn(async move { _ = serving.await });
    }
}

async fn serve(stream: TcpStream, tls: TlsAcceptor, inner: SocketAddr, counts: Arc<Counts>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut client = BufReader::new(stream);
    let mut inner = BufReader::new(TcpStream::connect(inner).await?);
    inner.get_ref().set_nodelay(true)?;
    let greeting = reply(&mut inner).await?;
    client.write_all(greeting.as_bytes()).await?;
    loop {
        let mut command = String::new();
        if client.read_line(&mut command).await? == 0 {
            return Ok(());
        }
        let upper = command.to_ascii_uppercase();
        if upper.starts_with("STARTTLS") {
            client.write_all(b"220 2.0.0 Go ahead\r\n").await?;
            let accepted = tls.accept(client.into_inner()).await;
            let count = if accepted.is_ok() { &counts.handshakes } else { &counts.refusals };
            count.fetch_add(1, Ordering::SeqCst);
            copy_bidirectional(&mut accepted?, &mut inner).await?;
            return Ok(());
        }
        inner.write_all(command.as_bytes()).await?;
        if upper.starts_with("EHLO") {
            let offers = reply(&mut inner).await?;
            client.write_all(format!("250-front.test\r\n250-STARTTLS\r\n{offers}").as_bytes()).await?;
        } else {
            copy_bidirectional(&mut client, &mut inner).await?;
            return Ok(());
        }
    }
}

/// A whole reply.
async fn reply(inner: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut reply = String::new();
    loop {
        let begin = reply.len();
        if inner.read_line(&mut reply).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if reply.as_bytes().get(begin + 3) != Some(&b'-') {
            return Ok(reply);
        }
    }
}
