//! The network between the engine and its peers: delay, loss, slow links, octets in pieces, connections that are cut at
//! any octet, and the life of a connection as the engine's driver (`engine/src/runtime/link.rs`) tells it to a shard.
//!
//! Over 500 lines: a connection's life is told from both of its ends.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::SocketAddr;

use postrider::handover::TlsRequirement;
use postrider::pool::connection::ConnectionKey;
use postrider::shard::{ConnectError, Connected, TlsStarted};

use crate::back_off::Heard;
use crate::canary::Canary;
use crate::checker::Marker;
use crate::clock::{MS, Micros, SECOND};
use crate::mix::{Fault, spread};
use crate::peer::{Around, Host, Peer, Say, Taken};
use crate::providers::PROVIDER;
use crate::rates;
use crate::suspensions::Begun;
use crate::tls::{Session, Watch};
use crate::world::{Event, SITES, World};

/// Names a connection for as long as the run lasts.
pub(crate) type LinkId = u64;

/// A connection.
#[derive(Debug)]
pub(crate) struct Link {
    shard: usize,
    connection: ConnectionKey,
    pub(crate) source: usize,
    pub(crate) site: usize,
    peer: Peer,
    address: SocketAddr,
    is_up: bool,
    /// What TLS has come to.
    session: Session,
    begun: Micros,
    /// The shard wants to know what comes.
    is_heard: bool,
    /// The engine's socket is there: the connection counts.
    pub(crate) is_open: bool,
    /// The peer's socket is there.
    is_peer_open: bool,
    /// Nothing arrives any more, and nobody says so.
    is_silent: bool,
    latency: Micros,
    octets_per_second: u64,
    /// Octets that the network takes before it fails, to the peer and from it.
    cut: Option<Cut>,
    emitted: u64,
    /// So many by then.
    written: VecDeque<(u64, Micros)>,
    /// Whose MAIL was the last.
    mailing: Option<Marker>,
    /// The last command was RSET.
    has_reset: bool,
    /// What the engine has heard of the greeting; None: all of it.
    greeting: Option<Vec<u8>>,
    reported: u64,
    /// When the last of what was sent leaves, and when the last of what was said arrives.
    leaves_at: Micros,
    arrives_at: Micros,
    /// Messages that a peer took, and whose reply is on its way.
    unheard: VecDeque<Taken>,
    active_at: Micros,
}

#[derive(Debug, Clone, Copy)]
struct Cut {
    is_to_peer: bool,
    octets_left: u64,
    is_silent: bool,
}

/// What happens to a connection.
#[derive(Debug)]
pub(crate) enum NetEvent {
    Connected,
    ConnectFailed,
    NoPort,
    /// So many octets more are with the kernel.
    Sent(u64),
    ToPeer(Vec<u8>),
    /// The last piece of a reply to content that was taken tells so.
    ToEngine {
        octets: Vec<u8>,
        tells: bool,
    },
    TlsDone,
    PeerClosed(&'static str),
    EngineClosed,
    LingerOver,
    Aborted,
    PeerIdle,
}

impl World {
    pub(crate) fn connect(&mut self, shard: usize, connection: ConnectionKey, source: usize, to: SocketAddr) {
        let is_it = |host: &Host| host.addresses().any(|address| address == to);
        let host = self.hosts.iter().position(is_it).expect("it is one of the hosts");
        let now = self.clock.micros();
        self.connects.iter_mut().for_each(|connects| connects.push((now, source, host, to)));
        let bound = self.config.egress_sources[source].source_address;
        assert!(bound.is_none_or(|own| own.is_ipv4() == to.is_ipv4()), "a source connects within its family");
        self.check_back_off(source, host, to);
        let latency = 200 + self.random.below(80 * MS);
        let slow = self.mix.strikes(Fault::SlowLink, &mut self.random);
        let link = Link {
            shard,
            connection,
            source,
            site: self.hosts[host].site,
            peer: Peer::new(host, source),
            address: to,
            is_up: false,
            session: Session::Clear,
            begun: self.clock.micros(),
            is_heard: true,
            is_open: true,
            is_peer_open: false,
            is_silent: false,
            latency,
            octets_per_second: if slow { 200 + self.random.below(2_000) } else { 10_000_000 },
            cut: self.draw_cut(),
            emitted: 0,
            written: VecDeque::new(),
            mailing: None,
            has_reset: false,
            greeting: Some(Vec::new()),
            reported: 0,
            leaves_at: 0,
            arrives_at: 0,
            unheard: VecDeque::new(),
            active_at: self.clock.micros(),
        };
        let id = self.next_link;
        self.next_link += 1;
        let other = self.links_of.insert((shard, connection), id);
        assert!(other.is_none(), "a connection's place is given to one at a time");
        self.links.insert(id, link);
        self.watch_connections(id);
        self.watch_rollup(source, self.hosts[host].site);
        let is_down = self.hosts[host].down_until > self.clock.micros();
        let is_silent = is_down && self.hosts[host].is_down_silently;
        if is_silent || self.mix.strikes(Fault::ConnectLost, &mut self.random) {
            return;
        }
        let refused = is_down || self.mix.strikes(Fault::ConnectRefused, &mut self.random);
        if self.mix.strikes(Fault::NoPort, &mut self.random) {
            self.clock.after(0, Event::Net(id, NetEvent::NoPort));
            return;
        }
        let event = if refused { NetEvent::ConnectFailed } else { NetEvent::Connected };
        let wait = 2 * latency + self.delay();
        self.clock.after(wait, Event::Net(id, event));
    }

    fn draw_cut(&mut self) -> Option<Cut> {
        let is_silent = self.mix.strikes(Fault::Silent, &mut self.random);
        if !is_silent && !self.mix.strikes(Fault::Cut, &mut self.random) {
            return None;
        }
        // Most connections carry some hundred octets, some many thousand.
        let octets_left = spread(&mut self.random, 16, 11);
        Some(Cut { is_to_peer: self.random.one_in(2), octets_left, is_silent })
    }

    /// What a lost packet costs.
    fn delay(&mut self) -> Micros {
        if self.mix.strikes(Fault::Delayed, &mut self.random) { self.random.below(30 * SECOND) } else { 0 }
    }

    pub(crate) fn link_of(&self, shard: usize, connection: ConnectionKey) -> Option<LinkId> {
        self.links_of.get(&(shard, connection)).copied()
    }

    pub(crate) fn send(&mut self, shard: usize, connection: ConnectionKey, octets: &[u8]) {
        let Some(id) = self.link_of(shard, connection) else { return };
        let link = self.links.get_mut(&id).expect("it is there");
        if !link.is_heard {
            return;
        }
        if octets.starts_with(b"STARTTLS\r\n") {
            link.session = Session::Asked;
        }
        link.emitted += octets.len() as u64;
        link.written.push_back((link.emitted, self.clock.micros()));
        // Commands are written whole.
        let (mut begun, had_reset) = (Vec::new(), std::mem::take(&mut link.has_reset));
        // Without PIPELINING MAIL waits for the reply to RSET: then it was begun with that.
        let has_waited = had_reset && octets.starts_with(b"MAIL ");
        link.has_reset = octets.ends_with(b"RSET\r\n");
        let mut named = Vec::new();
        for line in octets.split_inclusive(|octet| *octet == b'\n') {
            if let Some(rest) = line.strip_prefix(b"MAIL FROM:<m") {
                let marker = rest.iter().take_while(|octet| octet.is_ascii_digit());
                let marker = marker.fold(0, |number, digit| number * 10 + Marker::from(digit - b'0'));
                *self.ledger.mails.get_or_insert_default().entry(marker).or_default() += 1;
                link.mailing = Some(marker);
                if !has_waited {
                    begun.push(marker);
                }
            }
            if let (Some(rest), Some(marker)) = (line.strip_prefix(b"RCPT TO:<"), link.mailing) {
                let end = rest.iter().rposition(|octet| *octet == b'>').expect("the end of a path");
                named.push((marker, String::from_utf8_lossy(&rest[..end]).into_owned()));
            }
        }
        begun.into_iter().for_each(|marker| self.watch_transaction(id, marker));
        named.iter().for_each(|(marker, recipient)| self.check_time(*marker, recipient));
        let mut rest = self.without_resets(octets);
        let (mut broken, mut leaves_at) = (false, self.links[&id].leaves_at.max(self.clock.micros()));
        while !rest.is_empty() {
            let piece = self.split(&mut rest);
            let delay = self.delay();
            let link = self.links.get_mut(&id).expect("it is there");
            leaves_at += 10 + piece.len() as u64 * SECOND / link.octets_per_second;
            self.clock.at(leaves_at, Event::Net(id, NetEvent::Sent(piece.len() as u64)));
            leaves_at += delay;
            let (arrives, fails) = link.cut(true, &piece);
            if !broken && !arrives.is_empty() {
                self.clock.at(leaves_at + link.latency, Event::Net(id, NetEvent::ToPeer(arrives)));
            }
            if fails && !broken {
                broken = true;
                self.fail(id, leaves_at);
            }
        }
        self.links.get_mut(&id).expect("it is there").leaves_at = leaves_at;
    }

    /// What is sent, as it leaves; only with a canary another.
    fn without_resets(&self, octets: &[u8]) -> Vec<u8> {
        let mut octets = octets.to_vec();
        if self.canary == Some(Canary::NoReset) {
            let resets: Vec<usize> =
                octets.windows(6).enumerate().filter(|(_, it)| it == b"RSET\r\n").map(|it| it.0).collect();
            for place in resets {
                octets[place..place + 4].copy_from_slice(b"NOOP");
            }
        }
        octets
    }

    /// One piece of what is sent or said: mostly all of it.
    fn split(&mut self, rest: &mut Vec<u8>) -> Vec<u8> {
        if rest.len() > 1 && self.mix.strikes(Fault::Split, &mut self.random) {
            let behind = rest.split_off(1 + self.random.below(rest.len() as u64 - 1) as usize);
            return std::mem::replace(rest, behind);
        }
        std::mem::take(rest)
    }

    /// The connection breaks at an octet.
    fn fail(&mut self, id: LinkId, at: Micros) {
        let link = self.links.get_mut(&id).expect("it is there");
        if link.cut.is_some_and(|cut| cut.is_silent) {
            link.is_silent = true;
        } else {
            self.clock.at(at + link.latency, Event::Net(id, NetEvent::PeerClosed("connection reset by peer")));
        }
    }

    pub(crate) fn start_tls(
        &mut self,
        shard: usize,
        connection: ConnectionKey,
        host_name: String,
        asked: TlsRequirement,
    ) {
        if let Some(id) = self.link_of(shard, connection) {
            self.links.get_mut(&id).expect("it is there").session = Session::Handshaking(host_name, asked);
            self.clock.after(4 * self.links[&id].latency, Event::Net(id, NetEvent::TlsDone));
        }
    }

    /// The shard wants it closed when all is sent.
    pub(crate) fn close(&mut self, shard: usize, connection: ConnectionKey) {
        let Some(id) = self.link_of(shard, connection).filter(|id| self.links[id].is_open) else { return };
        self.stop_hearing(id);
        let link = &self.links[&id];
        let leaves_at = link.leaves_at.max(self.clock.micros());
        self.clock.at(leaves_at + link.latency, Event::Net(id, NetEvent::EngineClosed));
        self.clock.at(leaves_at + LINGER, Event::Net(id, NetEvent::LingerOver));
        if self.canary == Some(Canary::EarlyFin) {
            self.tell_gone(id);
        }
    }

    pub(crate) fn abort(&mut self, shard: usize, connection: ConnectionKey) {
        if let Some(id) = self.link_of(shard, connection) {
            self.clock.after(5, Event::Net(id, NetEvent::Aborted));
        }
    }

    /// What the peer still says reaches nobody.
    fn stop_hearing(&mut self, id: LinkId) {
        let link = self.links.get_mut(&id).expect("it is there");
        link.is_heard = false;
        for (marker, recipients) in link.unheard.drain(..) {
            self.ledger.forget(marker, &recipients);
        }
        if matches!(link.session, Session::Asked | Session::Handshaking(..)) {
            self.tls.fail(link.source, link.peer.host, self.clock.micros());
        }
    }

    pub(crate) fn net(&mut self, id: LinkId, event: NetEvent) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let (shard, connection, now) = (link.shard, link.connection, self.clock.now());
        match event {
            NetEvent::Connected if link.is_open => {
                link.is_up = true;
                link.is_peer_open = true;
                self.failures.may_be_back(link.heard(self.clock.micros()));
                let made = Connected { local: Some(address_of(link.source, link.address)), peer: link.address.into() };
                self.shards[shard].connected(now, connection, made);
                self.with_peer(id, |peer, host, around| peer.greet(host, around));
                self.watch_idle(id);
                self.turn(shard);
            }
            NetEvent::ConnectFailed if link.is_open && !link.is_up => {
                self.connect_failed(id, &ConnectError::Failed(ErrorKind::ConnectionRefused.into()));
            }
            NetEvent::NoPort if link.is_open && !link.is_up => self.connect_failed(id, &ConnectError::NoPort),
            NetEvent::Sent(octets) if link.is_heard && !link.is_silent => {
                link.reported += octets;
                self.shards[shard].connection_sent(now, connection, octets as usize);
                self.turn(shard);
            }
            NetEvent::ToPeer(octets) if link.is_peer_open && !link.is_silent => {
                self.with_peer(id, |peer, host, around| peer.receive(&octets, host, around));
                self.turn(shard);
            }
            NetEvent::ToEngine { octets, tells } if link.is_heard && !link.is_silent => {
                if tells {
                    link.unheard.pop_front();
                }
                self.note_greeting(id, &octets);
                self.shards[shard].connection_received(now, connection, &octets);
                self.turn(shard);
            }
            NetEvent::TlsDone if link.is_heard && !link.is_silent => self.finish_handshake(id),
            NetEvent::PeerClosed(reason) if link.is_open && link.is_up && !link.is_silent => {
                link.is_peer_open = false;
                self.lose(id, reason);
            }
            NetEvent::EngineClosed if link.is_peer_open && !link.is_silent => {
                link.is_peer_open = false;
                let at = link.arrives_at.max(self.clock.micros());
                self.clock.at(at + link.latency, Event::Net(id, NetEvent::PeerClosed("closed")));
            }
            NetEvent::LingerOver if link.is_open => self.lose(id, "closed"),
            NetEvent::Aborted if link.is_open && !link.is_up => {
                self.connect_failed(id, &ConnectError::Failed(ErrorKind::TimedOut.into()));
            }
            NetEvent::Aborted if link.is_open => self.lose(id, "aborted"),
            NetEvent::PeerIdle => self.watch_idle(id),
            _ => {}
        }
    }

    /// The engine hears these octets, perhaps of the peer's greeting.
    fn note_greeting(&mut self, id: LinkId, octets: &[u8]) {
        let link = self.links.get_mut(&id).expect("it is there");
        let Some(mut greeting) = link.greeting.take() else { return };
        greeting.extend_from_slice(octets);
        // Who hears less of it than the whole line has heard no greeting.
        let Some(end) = greeting.windows(2).position(|octets| octets == b"\r\n") else {
            link.greeting = Some(greeting);
            return;
        };
        let source = self.wanted.egress_sources[link.source].name.as_str();
        let site = self.site_of(id);
        let greeting = String::from_utf8_lossy(&greeting[..end]);
        let rules = &self.wanted.shaping.automation;
        self.fired.hear_greeting(self.clock.now().wall_ms, (source, &site), &greeting, rules);
    }

    /// Lets the peer act, and carries what it says.
    fn with_peer(&mut self, id: LinkId, act: impl FnOnce(&mut Peer, &mut Host, &mut Around<'_>)) {
        let link = self.links.get_mut(&id).expect("it is there");
        link.active_at = self.clock.micros();
        let mut around = Around {
            now: self.clock.micros(),
            random: &mut self.random,
            mix: &mut self.mix,
            ledger: &mut self.ledger,
            rates: &mut self.rates,
            tls: Watch {
                policies: &self.tls,
                epochs: self.reloads.epochs(),
                shards: self.shards.len(),
                session: &link.session,
                begun: link.begun,
            },
            written: &link.written,
            limits: self.reloads.peer_limits(self.clock.micros()),
            is_heard: link.is_heard,
            canary: self.canary,
            lmtp: self.lmtp.as_mut(),
            has_dsn: self.has_dsn,
            with_credentials: self.dns.with_credentials(),
            has_matched_routes: self.wanted.routes.iter().any(|route| route.matches.is_some()),
        };
        let host = &mut self.hosts[link.peer.host];
        act(&mut link.peer, host, &mut around);
        while let Some(say) = self.links.get_mut(&id).expect("it is there").peer.says.pop_front() {
            match say {
                Say::Text { wait, text, takes } => self.say(id, wait, text, takes),
                Say::Close => {
                    let link = self.links.get_mut(&id).expect("it is there");
                    link.is_peer_open = false;
                    let at = link.arrives_at.max(self.clock.micros()) + link.latency;
                    let closed = NetEvent::PeerClosed("the connection was closed");
                    self.clock.at(at, Event::Net(id, closed));
                }
            }
        }
    }

    fn say(&mut self, id: LinkId, wait: Micros, text: Vec<u8>, takes: Option<Taken>) {
        let link = self.links.get_mut(&id).expect("it is there");
        let tells = takes.is_some();
        match takes {
            Some((marker, recipients)) if !link.is_heard => self.ledger.forget(marker, &recipients),
            Some(taken) => link.unheard.push_back(taken),
            None => {}
        }
        let mut at = link.arrives_at.max(self.clock.micros()) + wait;
        let mut rest = text;
        while !rest.is_empty() {
            let piece = self.split(&mut rest);
            at += self.delay() + 10;
            let link = self.links.get_mut(&id).expect("it is there");
            let (octets, fails) = link.cut(false, &piece);
            let tells = tells && rest.is_empty() && octets.len() == piece.len();
            if !octets.is_empty() {
                self.clock.at(at + link.latency, Event::Net(id, NetEvent::ToEngine { octets, tells }));
            }
            if fails {
                link.is_peer_open = false;
                self.fail(id, at);
                break;
            }
        }
        self.links.get_mut(&id).expect("it is there").arrives_at = at;
    }

    fn finish_handshake(&mut self, id: LinkId) {
        let link = self.links.get_mut(&id).expect("it is there");
        let (shard, connection) = (link.shard, link.connection);
        if !link.peer.is_handshaking() {
            return;
        }
        let host = &self.hosts[link.peer.host];
        let result = self.tls.shake_hands(link.peer.host, host, &link.session, self.canary, &mut self.mix);
        match &result {
            Ok(proof) => {
                link.session = Session::Up(*proof);
                link.peer.tls_started();
            }
            Err(_) => {
                link.is_peer_open = false;
                self.tls.fail(link.source, link.peer.host, self.clock.micros());
            }
        }
        let result = result.map(|_| TlsStarted {
            protocol: "TLSv1.3".to_owned(),
            cipher: "TLS_AES_128_GCM_SHA256".to_owned(),
            peer_subject: vec![format!("CN={}", host.name)],
        });
        self.shards[shard].connection_tls(self.clock.now(), connection, result);
        self.turn(shard);
    }

    /// A peer that closes idle connections looks at this one, and will look again.
    fn watch_idle(&mut self, id: LinkId) {
        let link = &self.links[&id];
        let Some(idle_max) = self.hosts[link.peer.host].habits.idle_max.filter(|_| link.is_peer_open) else { return };
        let over_at = link.active_at + idle_max;
        if self.clock.micros() >= over_at {
            self.mix.count(Fault::IdleClosed);
            self.with_peer(id, |peer, _, around| peer.dismiss(around));
        } else {
            self.clock.at(over_at, Event::Net(id, NetEvent::PeerIdle));
        }
    }

    /// The connection is over, for whatever reason.
    fn lose(&mut self, id: LinkId, reason: &str) {
        let link = self.links.get_mut(&id).expect("it is there");
        let (shard, connection, now, is_heard) = (link.shard, link.connection, self.clock.now(), link.is_heard);
        let unreported = link.emitted - link.reported;
        self.failures.may_be_back(link.heard(self.clock.micros()));
        // The kernel took what fits into its buffer.
        if is_heard && unreported > 0 && !link.is_silent {
            link.reported += unreported;
            self.shards[shard].connection_sent(now, connection, unreported as usize);
        }
        self.end_link(id);
        if is_heard {
            self.shards[shard].connection_closed(now, connection, reason);
            self.turn(shard);
        }
        self.tell_gone(id);
        self.links.remove(&id);
    }

    /// The shard may use the connection's place again.
    fn tell_gone(&mut self, id: LinkId) {
        let link = &self.links[&id];
        let key @ (shard, connection) = (link.shard, link.connection);
        if self.links_of.get(&key) == Some(&id) {
            self.links_of.remove(&key);
            self.shards[shard].connection_gone(self.clock.now(), connection);
            self.turn(shard);
        }
    }

    fn connect_failed(&mut self, id: LinkId, error: &ConnectError) {
        let link = self.links.remove(&id).expect("it is there");
        self.links_of.remove(&(link.shard, link.connection));
        let is_hidden =
            self.canary == Some(Canary::HiddenFailures) && self.failures.has_failed(link.source, link.address);
        self.note_failure(&link, error);
        let told = if is_hidden { &ConnectError::NoPort } else { error };
        self.shards[link.shard].connect_failed(self.clock.now(), link.connection, told);
        self.turn(link.shard);
    }

    fn note_failure(&mut self, link: &Link, error: &ConnectError) {
        let heard = link.heard(self.clock.micros());
        let is_same = |other: &Link| (other.source, other.address) == (link.source, link.address);
        let is_up = self.links.values().any(|other| other.is_up && is_same(other));
        match error {
            ConnectError::Failed(_) => self.failures.fail(heard, is_up, &self.config.retry.schedule),
            _ => self.failures.hear(heard),
        }
    }

    /// Both sockets are gone.
    fn end_link(&mut self, id: LinkId) {
        self.stop_hearing(id);
        let link = self.links.get_mut(&id).expect("it is there");
        link.is_open = false;
        link.is_peer_open = false;
    }

    /// The engine's process is gone, and with it all its sockets.
    pub(crate) fn end_all_links(&mut self) {
        for id in self.links.keys().copied().collect::<Vec<_>>() {
            self.stop_hearing(id);
        }
        self.links.clear();
        self.links_of.clear();
    }

    /// The network is mended: connections of before, which may be silent or slow, break.
    pub(crate) fn break_all_links(&mut self) {
        for (id, link) in &mut self.links {
            link.is_silent = false;
            let event =
                if link.is_up { NetEvent::PeerClosed("connection reset by peer") } else { NetEvent::ConnectFailed };
            self.clock.after(link.latency, Event::Net(*id, event));
        }
    }

    /// LIMITS-HOLD: a pair's connections count from connect until the peer's FIN.
    fn watch_connections(&self, id: LinkId) {
        let Link { source, site, shard, .. } = self.links[&id];
        let open = self.links.values().filter(|link| link.is_open && (link.source, link.site) == (source, site));
        let open = open.count();
        let limit = self.reloads.connection_limit(self.clock.micros());
        assert!(open <= limit, "LIMITS-HOLD: {open} connections of source {source} to site {site}, of {limit}");
        self.in_force.check_connection(self.begun(&self.links[&id], &self.site_of(id)), open);
        let open = self.links.values().filter(|link| link.is_open && link.shard == shard).count();
        assert!(open <= self.sockets_max / 4 * 3, "BOUNDED-MEMORY: shard {shard} has {open} connections");
    }

    fn watch_transaction(&mut self, id: LinkId, marker: Marker) {
        let site = self.site_of(id);
        let begun = self.begun(&self.links[&id], &site);
        self.in_force.check_transaction(begun, &self.ledger.sent(marker));
    }

    fn begun<'a>(&self, link: &Link, site: &'a str) -> Begun<'a> {
        let (at, now_ms) = (self.clock.micros(), self.clock.now().wall_ms);
        let rollup = if self.rollup.has(link.site) { PROVIDER } else { site };
        Begun { shard: link.shard, source: link.source, site, rollup, at, now_ms }
    }

    /// The name of its site.
    fn site_of(&self, id: LinkId) -> String {
        let host = &self.hosts[self.links[&id].peer.host];
        if host.site < SITES { rates::name_of(&self.hosts, host.site) } else { host.address.to_string() }
    }
}

impl Link {
    /// What becomes of it is known now.
    fn heard(&self, now: Micros) -> Heard {
        Heard { source: self.source, to: self.address, begun: self.begun, now }
    }

    /// What of a piece arrives, and whether the connection fails there.
    fn cut(&mut self, is_to_peer: bool, piece: &[u8]) -> (Vec<u8>, bool) {
        let Some(cut) = self.cut.as_mut().filter(|cut| cut.is_to_peer == is_to_peer) else {
            return (piece.to_vec(), false);
        };
        let arrives = piece.len().min(cut.octets_left as usize);
        cut.octets_left -= arrives as u64;
        (piece[..arrives].to_vec(), arrives < piece.len())
    }
}

/// What a source connects from, to a peer of this family.
pub(crate) fn address_of(source: usize, peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => SocketAddr::from(([10, 1, 0, 1 + source as u8], 5_000)),
        SocketAddr::V6(_) => SocketAddr::from(([0xfd01, 0, 0, 0, 0, 0, 0, 1 + source as u16], 5_000)),
    }
}

/// As `engine/src/limits.rs` has it.
const LINGER: Micros = 2 * SECOND;
