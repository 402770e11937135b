//! A tiny authoritative DNS server for tests, on a loopback port of its own, over UDP and TCP.
//!
//! Its zone is a table of names and entries. A name that is not in the table does not exist (NXDOMAIN), one without an
//! entry of the type asked for has no such record (NODATA); both come with an SOA, so that they may be cached. Names
//! below a CNAME's target are left to the resolver to ask for.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, CNAME, MX, NS, SOA, TLSA, TXT};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

/// What the zone says of a name. A name may have several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "not every test uses every kind")]
pub(crate) enum Entry {
    A([u8; 4]),
    Aaaa(Ipv6Addr),
    Mx(u16, &'static str),
    /// `MX 0 .` (RFC 7505).
    NullMx,
    Cname(&'static str),
    Txt(&'static str),
    /// Usage, selector, matching type, and the data.
    Tlsa([u8; 3], &'static [u8]),
    /// Nothing about the name has the AD bit, whatever [`DnsServer::set_authentic`] says.
    Insecure,
    /// Any question about the name is answered SERVFAIL.
    ServFail,
    /// Any question about the name is answered with the servers that are to be asked instead.
    Referral,
    /// No question about the name is answered.
    Silent,
    /// Over UDP the answer is empty and marked as truncated, so that it has to be fetched by TCP.
    Truncated,
}

/// A running server; it stops when dropped.
pub(crate) struct DnsServer {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    zone: Mutex<Zone>,
    stopped: AtomicBool,
}

#[derive(Default)]
struct Zone {
    entries: HashMap<String, Vec<Entry>>,
    ttl: u32,
    authentic: bool,
    /// (name, type, whether by TCP).
    questions: Vec<(String, String, bool)>,
}

#[allow(dead_code, reason = "not every test uses every call")]
impl DnsServer {
    /// Serves `zone`: names in lower case without final dot.
    pub(crate) fn start(zone: &[(&str, Entry)]) -> Self {
        let (udp, tcp) = bind();
        let address = udp.local_addr().expect("a bound socket has an address");
        let state = Arc::new(State { zone: Mutex::default(), stopped: AtomicBool::new(false) });
        let server = Self { address, state: state.clone() };
        server.set_zone(zone);
        server.set_ttl(60);
        let udp_state = state.clone();
        thread::spawn(move || serve_udp(&udp, &udp_state));
        thread::spawn(move || serve_tcp(&tcp, &state));
        server
    }

    /// For `[dns] servers`.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Replaces the zone.
    pub(crate) fn set_zone(&self, zone: &[(&str, Entry)]) {
        let mut entries: HashMap<String, Vec<Entry>> = HashMap::new();
        for (name, entry) in zone {
            entries.entry((*name).to_owned()).or_default().push(*entry);
        }
        self.state.zone().entries = entries;
    }

    /// Seconds; also for negative answers. 60 at first.
    pub(crate) fn set_ttl(&self, ttl: u32) {
        self.state.zone().ttl = ttl;
    }

    /// Whether answers have the AD bit, as of a resolver that has found their signatures good (RFC 4035 §3.2.3).
    pub(crate) fn set_authentic(&self, authentic: bool) {
        self.state.zone().authentic = authentic;
    }

    /// How often the name was asked for with this type, such as "MX".
    pub(crate) fn questions(&self, name: &str, kind: &str) -> usize {
        let asked = |question: &&(String, String, bool)| question.0 == name && question.1 == kind;
        self.state.zone().questions.iter().filter(asked).count()
    }

    pub(crate) fn questions_by_tcp(&self) -> usize {
        self.state.zone().questions.iter().filter(|question| question.2).count()
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        // Both threads wait for something to come.
        if let Ok(socket) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)) {
            let _ = socket.send_to(&[], self.address);
        }
        let _ = TcpStream::connect(self.address);
    }
}

impl State {
    fn zone(&self) -> MutexGuard<'_, Zone> {
        self.zone.lock().expect("no thread of the server panics")
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

/// The same port for both.
fn bind() -> (UdpSocket, TcpListener) {
    for _ in 0..100 {
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port is free");
        let address = udp.local_addr().expect("a bound socket has an address");
        if let Ok(tcp) = TcpListener::bind(address) {
            return (udp, tcp);
        }
    }
    panic!("no port is free for both UDP and TCP");
}

fn serve_udp(socket: &UdpSocket, state: &State) {
    let mut buffer = [0; 4096];
    while let Ok((length, client)) = socket.recv_from(&mut buffer) {
        if state.is_stopped() {
            return;
        }
        if let Some(answer) = answer(state, &buffer[..length], false) {
            let _ = socket.send_to(&answer, client);
        }
    }
}

fn serve_tcp(listener: &TcpListener, state: &Arc<State>) {
    for stream in listener.incoming() {
        if state.is_stopped() {
            return;
        }
        let Ok(stream) = stream else { continue };
        let state = state.clone();
        thread::spawn(move || serve_stream(stream, &state));
    }
}

/// RFC 1035 §4.2.2: each message is preceded by its length in two octets.
fn serve_stream(mut stream: TcpStream, state: &State) -> io::Result<()> {
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut question)?;
        let Some(answer) = answer(state, &question, true) else { continue };
        let length = u16::try_from(answer.len()).expect("test zones are small");
        stream.write_all(&[&length.to_be_bytes()[..], &answer].concat())?;
    }
}

fn answer(state: &State, question: &[u8], by_tcp: bool) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).ok()?;
    let query = question.queries.first()?.clone();
    let (name, kind) = (query.name().clone(), query.query_type());
    let key = name.to_ascii().trim_end_matches('.').to_ascii_lowercase();
    let mut zone = state.zone();
    zone.questions.push((key.clone(), kind.to_string(), by_tcp));
    let mut response = Message::response(question.id, OpCode::Query);
    response.metadata.authoritative = true;
    response.metadata.recursion_desired = question.recursion_desired;
    response.metadata.recursion_available = true;
    response.add_query(query);
    // RFC 6840 §5.8: only those who ask for it get it.
    let asks = question.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok) || question.authentic_data;
    let entries = zone.entries.get(&key);
    let has = |entry| entries.is_some_and(|entries| entries.contains(&entry));
    response.metadata.authentic_data = zone.authentic && asks && !has(Entry::Insecure);
    if has(Entry::Silent) {
        return None;
    } else if has(Entry::ServFail) {
        response.metadata.response_code = ResponseCode::ServFail;
    } else if has(Entry::Referral) {
        let server = NS(Name::from_ascii("a.root-servers.example.").expect("a good name"));
        response.add_authority(Record::from_rdata(Name::root(), zone.ttl, RData::NS(server)));
    } else if has(Entry::Truncated) && !by_tcp {
        response.metadata.truncation = true;
    } else {
        let data = entries.into_iter().flatten().filter_map(|entry| record_data(*entry, kind));
        response.add_answers(data.map(|data| Record::from_rdata(name.clone(), zone.ttl, data)));
        if entries.is_none() {
            response.metadata.response_code = ResponseCode::NXDomain;
        }
        if response.answers.is_empty() {
            let root = Name::root();
            let soa = SOA::new(root.clone(), root.clone(), 1, 3600, 600, 86400, zone.ttl);
            response.add_authority(Record::from_rdata(root, zone.ttl, RData::SOA(soa)));
        }
    }
    Some(response.to_vec().expect("test zones can be written"))
}

fn record_data(entry: Entry, kind: RecordType) -> Option<RData> {
    let name = |text: &str| Name::from_ascii(format!("{text}.")).expect("test zones have good names");
    match (entry, kind) {
        (Entry::A(octets), RecordType::A) => Some(RData::A(A(octets.into()))),
        (Entry::Aaaa(address), RecordType::AAAA) => Some(RData::AAAA(AAAA(address))),
        (Entry::Mx(preference, exchange), RecordType::MX) => Some(RData::MX(MX::new(preference, name(exchange)))),
        (Entry::NullMx, RecordType::MX) => Some(RData::MX(MX::new(0, Name::root()))),
        (Entry::Tlsa([usage, selector, matching], data), RecordType::TLSA) => {
            Some(RData::TLSA(TLSA::new(usage.into(), selector.into(), matching.into(), data.to_vec())))
        }
        (Entry::Txt(text), RecordType::TXT) => Some(RData::TXT(TXT::new(vec![text.to_owned()]))),
        // RFC 1034 §3.6.2: the alias is the answer to a question of any type.
        (Entry::Cname(target), _) => Some(RData::CNAME(CNAME(name(target)))),
        _ => None,
    }
}
