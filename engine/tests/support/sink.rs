//! A receiving SMTP server that does as it is told and records what it sees.
//!
//! One thread per connection, plain blocking sockets. Each command, and the arrival of the content, is shown to a
//! script, which may answer in place of the sink; without one everything is accepted. What was answered 250 after its
//! content is a delivery, recorded before the reply is written: as a real server it may have taken what its client
//! never hears of.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::PATIENCE;

/// The moments at which a script may answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Verb {
    Connect,
    Ehlo,
    Mail,
    Rcpt,
    Data,
    /// The final dot has come.
    Content,
    Rset,
    Quit,
    Other,
}

/// What a script is shown.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    /// Counts connections from 0.
    pub(crate) session: u64,
    pub(crate) verb: Verb,
    /// The whole line; empty for `Connect` and `Content`.
    pub(crate) line: &'a str,
    /// Of the transaction so far.
    pub(crate) recipients: &'a [String],
}

/// What a script answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// What the sink says by itself.
    Usual,
    /// A reply of one line, or of several separated by LF, without the final line ending.
    Reply(String),
    /// The connection is closed without a reply.
    Close,
}

impl From<&str> for Answer {
    fn from(reply: &str) -> Self {
        Self::Reply(reply.to_owned())
    }
}

/// A message that the sink answered with 250.
#[derive(Debug, Clone)]
pub(crate) struct Delivered {
    pub(crate) session: u64,
    pub(crate) peer: SocketAddr,
    pub(crate) ehlo: String,
    /// Without angle brackets.
    pub(crate) reverse_path: String,
    pub(crate) recipients: Vec<String>,
    /// Dot-unstuffed, otherwise as it came.
    pub(crate) content: Vec<u8>,
    pub(crate) at: Instant,
}

type Script = Box<dyn FnMut(&Step<'_>) -> Answer + Send>;

/// A running sink; it stops when dropped.
pub(crate) struct Sink {
    address: SocketAddr,
    state: Arc<State>,
    deliveries: Receiver<Delivered>,
}

struct State {
    script: Mutex<Script>,
    deliveries: Mutex<Sender<Delivered>>,
    counts: Mutex<HashMap<Verb, usize>>,
    connections: Mutex<HashMap<u64, TcpStream>>,
    next_session: AtomicU64,
    connections_most: AtomicUsize,
    stopped: AtomicBool,
}

impl Sink {
    /// Accepts everything, on a port of its own.
    pub(crate) fn start() -> Self {
        Self::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    /// At a given address: that of an earlier sink, which comes back.
    pub(crate) fn start_at(address: SocketAddr) -> Self {
        Self::try_start_at(address).unwrap_or_else(|error| panic!("a sink at {address}: {error}"))
    }

    pub(crate) fn try_start_at(address: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let (sender, deliveries) = channel();
        let state = Arc::new(State {
            script: Mutex::new(Box::new(|_| Answer::Usual)),
            deliveries: Mutex::new(sender),
            counts: Mutex::default(),
            connections: Mutex::default(),
            next_session: AtomicU64::new(0),
            connections_most: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&state);
        std::thread::spawn(move || accept(&listener, &accepting));
        Ok(Self { address, state, deliveries })
    }

    /// At port 25 of some loopback address, as MX hosts are; None where this user may not have such a port.
    pub(crate) fn at_port_25() -> Option<(Self, [u8; 4])> {
        loop {
            let address = [127, fastrand::u8(1..255), fastrand::u8(..), fastrand::u8(1..255)];
            match Self::try_start_at(SocketAddr::from((Ipv4Addr::from(address), 25))) {
                Ok(sink) => return Some((sink, address)),
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {}
                Err(error) => {
                    eprintln!("skipped: a sink at port 25 of {address:?}: {error}");
                    return None;
                }
            }
        }
    }

    /// A sink with a script.
    pub(crate) fn scripted(script: impl FnMut(&Step<'_>) -> Answer + Send + 'static) -> Self {
        let sink = Self::start();
        sink.set_script(script);
        sink
    }

    /// Answers a verb always alike.
    pub(crate) fn answering(verb: Verb, reply: &str) -> Self {
        let sink = Self::start();
        sink.always(verb, reply);
        sink
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set_script(&self, script: impl FnMut(&Step<'_>) -> Answer + Send + 'static) {
        *lock(&self.state.script) = Box::new(script);
    }

    pub(crate) fn always(&self, verb: Verb, reply: &str) {
        let answer = Answer::from(reply);
        self.set_script(move |step| if step.verb == verb { answer.clone() } else { Answer::Usual });
    }

    /// From now on everything is accepted.
    pub(crate) fn recover(&self) {
        self.set_script(|_| Answer::Usual);
    }

    /// The next delivery.
    pub(crate) fn next(&self) -> Delivered {
        let waited = self.deliveries.recv_timeout(PATIENCE);
        waited.unwrap_or_else(|_| panic!("no delivery within {PATIENCE:?}; seen: {:?}", self.counts()))
    }

    pub(crate) fn take(&self, count: usize) -> Vec<Delivered> {
        (0..count).map(|_| self.next()).collect()
    }

    /// What has been delivered and not yet taken.
    pub(crate) fn taken_so_far(&self) -> Vec<Delivered> {
        self.deliveries.try_iter().collect()
    }

    /// How often a verb was seen.
    pub(crate) fn count(&self, verb: Verb) -> usize {
        lock(&self.state.counts).get(&verb).copied().unwrap_or_default()
    }

    /// The most connections that were open at once.
    pub(crate) fn connections_most(&self) -> usize {
        self.state.connections_most.load(Ordering::SeqCst)
    }

    fn counts(&self) -> HashMap<Verb, usize> {
        lock(&self.state.counts).clone()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        // The accepting thread waits for someone to come, the others for their clients.
        let _ = TcpStream::connect(self.address);
        for stream in lock(&self.state.connections).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panicking script fails its test; the rest of the sink need not follow.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for stream in listener.incoming() {
        if state.stopped.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let number = state.next_session.fetch_add(1, Ordering::SeqCst);
        let Ok(kept) = stream.try_clone() else { continue };
        let open = {
            let mut connections = lock(&state.connections);
            connections.insert(number, kept);
            connections.len()
        };
        state.connections_most.fetch_max(open, Ordering::SeqCst);
        let state = Arc::clone(state);
        std::thread::spawn(move || {
            // An error is the client's end of the connection.
            let _ = Session::serve(number, stream, &state);
            lock(&state.connections).remove(&number);
        });
    }
}

struct Session<'a> {
    number: u64,
    peer: SocketAddr,
    input: BufReader<TcpStream>,
    output: Vec<u8>,
    state: &'a State,
    ehlo: String,
    reverse_path: Option<String>,
    recipients: Vec<String>,
}

/// The client is gone, or is to go.
struct Ended;

impl From<std::io::Error> for Ended {
    fn from(_: std::io::Error) -> Self {
        Self
    }
}

impl Session<'_> {
    fn serve(number: u64, stream: TcpStream, state: &State) -> Result<(), Ended> {
        stream.set_nodelay(true)?;
        let mut session = Session {
            number,
            peer: stream.peer_addr()?,
            input: BufReader::new(stream),
            output: Vec::new(),
            state,
            ehlo: String::new(),
            reverse_path: None,
            recipients: Vec::new(),
        };
        session.answer(Verb::Connect, "", "220 sink.test ESMTP")?;
        loop {
            session.flush_unless_more()?;
            let line = session.line()?;
            session.command(&String::from_utf8_lossy(&line))?;
        }
    }

    fn command(&mut self, line: &str) -> Result<(), Ended> {
        let upper = line.to_ascii_uppercase();
        if upper.starts_with("EHLO") {
            self.ehlo = line[4..].trim().to_owned();
            let offers = "250-sink.test\n250-PIPELINING\n250-SIZE 104857600\n250-8BITMIME\n250-SMTPUTF8\n\
                          250 ENHANCEDSTATUSCODES";
            self.answer(Verb::Ehlo, line, offers).map(drop)
        } else if upper.starts_with("HELO") {
            self.ehlo = line[4..].trim().to_owned();
            self.answer(Verb::Ehlo, line, "250 sink.test").map(drop)
        } else if upper.starts_with("MAIL FROM:") {
            if self.answer(Verb::Mail, line, "250 2.1.0 OK")? {
                self.reverse_path = Some(path(line));
                self.recipients.clear();
            }
            Ok(())
        } else if upper.starts_with("RCPT TO:") {
            let usual = if self.reverse_path.is_some() { "250 2.1.5 OK" } else { "503 5.5.1 MAIL first" };
            if self.answer(Verb::Rcpt, line, usual)? {
                self.recipients.push(path(line));
            }
            Ok(())
        } else if upper == "DATA" {
            let usual = if self.recipients.is_empty() { "554 5.5.1 No valid recipients" } else { "354 go on" };
            if self.answer(Verb::Data, line, usual)? { self.content() } else { Ok(()) }
        } else if let Some(size) = upper.strip_prefix("BDAT ").and_then(|rest| rest.strip_suffix(" LAST")) {
            self.chunk(size.parse().map_err(|_| Ended)?)
        } else if upper == "RSET" {
            self.reset();
            self.answer(Verb::Rset, line, "250 2.0.0 OK").map(drop)
        } else if upper == "QUIT" {
            self.answer(Verb::Quit, line, "221 2.0.0 bye")?;
            self.flush()?;
            Err(Ended)
        } else {
            self.answer(Verb::Other, line, "500 5.5.2 what?").map(drop)
        }
    }

    fn content(&mut self) -> Result<(), Ended> {
        self.flush()?;
        let mut content = Vec::new();
        loop {
            let before = content.len();
            self.input.read_until(b'\n', &mut content)?;
            match &content[before..] {
                [] => return Err(Ended),
                b".\r\n" => {
                    content.truncate(before);
                    break;
                }
                [b'.', ..] => drop(content.remove(before)),
                _ => {}
            }
        }
        self.take(content)
    }

    /// RFC 3030 §2: the octets are read whatever becomes of them. Offered only by a script's answer to EHLO.
    fn chunk(&mut self, size: usize) -> Result<(), Ended> {
        let mut content = vec![0; size];
        self.input.read_exact(&mut content)?;
        if self.recipients.is_empty() {
            return self.answer(Verb::Other, "BDAT", "503 5.5.1 No valid recipients").map(drop);
        }
        self.take(content)
    }

    fn take(&mut self, content: Vec<u8>) -> Result<(), Ended> {
        let delivered = Delivered {
            session: self.number,
            peer: self.peer,
            ehlo: self.ehlo.clone(),
            reverse_path: self.reverse_path.clone().unwrap_or_default(),
            recipients: self.recipients.clone(),
            content,
            at: Instant::now(),
        };
        let answer = self.ask(Verb::Content, "");
        let good = match &answer {
            Answer::Usual => true,
            Answer::Reply(reply) => reply.starts_with('2'),
            Answer::Close => false,
        };
        if good {
            // The test may have ended already.
            let _ = lock(&self.state.deliveries).send(delivered);
        }
        self.reset();
        self.say(answer, "250 2.0.0 taken").map(drop)
    }

    fn reset(&mut self) {
        self.reverse_path = None;
        self.recipients.clear();
    }

    /// Whether the reply was positive.
    fn answer(&mut self, verb: Verb, line: &str, usual: &str) -> Result<bool, Ended> {
        let answer = self.ask(verb, line);
        self.say(answer, usual)
    }

    fn ask(&mut self, verb: Verb, line: &str) -> Answer {
        *lock(&self.state.counts).entry(verb).or_default() += 1;
        let step = Step { session: self.number, verb, line, recipients: &self.recipients };
        (lock(&self.state.script))(&step)
    }

    fn say(&mut self, answer: Answer, usual: &str) -> Result<bool, Ended> {
        let reply = match &answer {
            Answer::Usual => usual,
            Answer::Reply(reply) => reply,
            Answer::Close => return Err(Ended),
        };
        self.output.extend_from_slice(reply.replace('\n', "\r\n").as_bytes());
        self.output.extend_from_slice(b"\r\n");
        if reply.starts_with("421") {
            self.flush()?;
            return Err(Ended);
        }
        Ok(reply.starts_with(['2', '3']))
    }

    fn line(&mut self) -> Result<Vec<u8>, Ended> {
        let mut line = Vec::new();
        (&mut self.input).take(65_536).read_until(b'\n', &mut line)?;
        match line.strip_suffix(b"\r\n") {
            Some(line) => Ok(line.to_vec()),
            None => Err(Ended),
        }
    }

    /// Replies to pipelined commands go together.
    fn flush_unless_more(&mut self) -> Result<(), Ended> {
        if self.input.buffer().is_empty() { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Ended> {
        self.input.get_mut().write_all(&self.output)?;
        self.output.clear();
        Ok(())
    }
}

/// The address between angle brackets.
fn path(line: &str) -> String {
    let inner = line.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
    inner.map_or_else(String::new, |(path, _)| path.to_owned())
}
