//! An HTTPS server for tests that has one answer: a domain's MTA-STS policy, or what stands in its place.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::PrivateKeyDer;

/// A running server; it stops when dropped.
pub(crate) struct PolicyServer {
    address: SocketAddr,
    certificate_pem: String,
    state: Arc<State>,
}

struct State {
    tls: Arc<ServerConfig>,
    answer: Mutex<String>,
    requests: Mutex<Vec<String>>,
    stopped: AtomicBool,
}

#[allow(dead_code, reason = "not every test uses every call")]
impl PolicyServer {
    /// With a certificate of its own for these names; it answers 404 at first.
    pub(crate) fn try_start_at(address: SocketAddr, names: &[&str]) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let (certificate_pem, tls) = identity(names);
        let state = Arc::new(State {
            tls,
            answer: Mutex::default(),
            requests: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let serving = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stopped.load(Ordering::SeqCst) {
                    return;
                }
                // An error is the client's end of the connection.
                let _ = stream.and_then(|stream| serve(stream, &serving));
            }
        });
        let server = Self { address, certificate_pem, state };
        server.answer("404 Not Found", "text/plain", "");
        Ok(server)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// A root that vouches for the server.
    pub(crate) fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A policy, or rather its lines but for the version.
    pub(crate) fn policy(&self, lines: &str) {
        self.answer("200 OK", "text/plain", &format!("version: STSv1\r\n{}", lines.replace('\n', "\r\n")));
    }

    /// `kind` is the content type; more header lines may stand behind it.
    pub(crate) fn answer(&self, status: &str, kind: &str, body: &str) {
        let length = body.len();
        *lock(&self.state.answer) =
            format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}");
    }

    /// The request line and the Host of each request so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        lock(&self.state.requests).clone()
    }
}

impl Drop for PolicyServer {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        // The accepting thread waits for someone to come.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(stream: TcpStream, state: &State) -> io::Result<()> {
    let connection = ServerConnection::new(Arc::clone(&state.tls)).map_err(io::Error::other)?;
    let mut stream = BufReader::new(StreamOwned::new(connection, stream));
    let mut request = String::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if line.trim().is_empty() {
            break;
        }
        if request.is_empty() || line.to_ascii_lowercase().starts_with("host:") {
            request += line.trim();
            request.push(' ');
        }
    }
    lock(&state.requests).push(request.trim_end().to_owned());
    let answer = lock(&state.answer).clone();
    let stream = stream.get_mut();
    stream.write_all(answer.as_bytes())?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// A certificate that is its own root, and the server that has it.
pub(crate) fn identity(names: &[&str]) -> (String, Arc<ServerConfig>) {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let key = rcgen::KeyPair::generate().expect("a key");
    let certificate = rcgen::CertificateParams::new(names).and_then(|it| it.self_signed(&key)).expect("a certificate");
    let der = PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS#8");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has the default versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], der)
        .expect("the key is the certificate's");
    (certificate.pem(), Arc::new(config))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
