//! Hosts that take mail, each with its own bad habits, and one connection as its host sees it.
//!
//! Over 500 lines: all bad habits of a host meet in its one dialog.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem;
use std::net::SocketAddr;

use crate::calm::PUT_OFF;
use crate::canary::Canary;
use crate::checker::{BLAME, Delivered, Lack, Ledger, Marker, domain_of, marker_of};
use crate::clock::{MINUTE, Micros, SECOND};
use crate::dsn;
use crate::mix::{Fault, Mix};
use crate::random::Random;
use crate::rates::Rates;
use crate::tls::Watch;
use crate::world::{BY_CAMPAIGN, BY_SENDER, EHLO_DOMAINS, SITES};

/// A host, for as long as the run lasts.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    /// Its other address; or the one that it has, so that IPv4 sources can't reach it.
    pub(crate) six: Option<SocketAddr>,
    pub(crate) is_six_only: bool,
    pub(crate) site: usize,
    pub(crate) preference: u16,
    pub(crate) habits: Habits,
    /// Not reachable until then, and whether nobody says so.
    pub(crate) down_until: Micros,
    pub(crate) is_down_silently: bool,
    /// Answers 421 to everything until then.
    pub(crate) busy_until: Micros,
    /// When each (source, reverse path, recipient) was first put off.
    put_off: BTreeMap<(usize, String, String), Micros>,
    /// When recipients were tried lately.
    tried: VecDeque<Micros>,
    transactions: u64,
    /// When connections ended without a transaction since the last that had one, by source.
    unused: BTreeMap<usize, VecDeque<Micros>>,
    /// Which sources it has refused for their address's sake, in mail to which domains.
    pub(crate) blamed: BTreeSet<(usize, String)>,
}

/// What a host does all the time.
#[derive(Debug, Clone)]
pub(crate) struct Habits {
    knows_ehlo: bool,
    pipelining: bool,
    chunking: bool,
    eight_bit: bool,
    utf8: bool,
    auth: bool,
    size_max: Option<u64>,
    /// Of transactions on a connection, and of recipients in each.
    limit: Option<usize>,
    pub(crate) tls: Tls,
    demands_tls: bool,
    refuses_every_second: bool,
    greylists_for: Option<Micros>,
    /// So many recipients in ten seconds are punished.
    recipients_punished: Option<usize>,
    pub(crate) idle_max: Option<Micros>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tls {
    NotOffered,
    Works,
    Refused,
    Broken,
    Injected,
}

impl Tls {
    fn draw(random: &mut Random, mix: &mut Mix) -> Self {
        if !mix.strikes(Fault::TlsOffered, random) {
            return Self::NotOffered;
        }
        let kinds = [
            (Fault::TlsRefused, Self::Refused),
            (Fault::TlsBroken, Self::Broken),
            (Fault::TlsInjected, Self::Injected),
        ];
        let struck = kinds.into_iter().find(|(fault, _)| mix.strikes(*fault, random));
        struck.map_or(Self::Works, |(_, kind)| kind)
    }
}

/// What surrounds a connection at the moment.
pub(crate) struct Around<'a> {
    pub(crate) now: Micros,
    pub(crate) random: &'a mut Random,
    pub(crate) mix: &'a mut Mix,
    pub(crate) ledger: &'a mut Ledger,
    pub(crate) rates: &'a mut Rates,
    pub(crate) tls: Watch<'a>,
    /// Of the octets that the engine sent to this connection: how many it had sent by then.
    pub(crate) written: &'a VecDeque<(u64, Micros)>,
    pub(crate) limits: PeerLimits,
    /// The engine listens to this connection.
    pub(crate) is_heard: bool,
    pub(crate) canary: Option<Canary>,
    /// Some mail goes by LMTP.
    pub(crate) lmtp: Option<&'a mut Random>,
    /// Some mail has a route of its own.
    pub(crate) has_matched_routes: bool,
    /// Peers offer DSN.
    pub(crate) has_dsn: bool,
    /// The domain whose mail comes with credentials.
    pub(crate) with_credentials: Option<&'a str>,
}

impl Around<'_> {
    /// RIGHT-ENVELOPE: what has a route of its own goes there, and nothing else does.
    fn check_route(&self, reverse_path: &str, recipient: &str, site: usize, is_encrypted: bool) {
        let marker = marker_of(reverse_path);
        let is_at = |domain: &str| recipient.rsplit_once('@').is_some_and(|(_, of)| of == domain);
        let wanted = if is_at(BY_SENDER) && marker % 10 == 7 {
            Some(SITES + 2)
        } else if is_at(BY_CAMPAIGN) && self.ledger.sent(marker).steering.contains("X-Campaign: c1\r\n") {
            Some(SITES + 3)
        } else {
            None
        };
        assert!(site != SITES + 3 || is_encrypted, "RIGHT-ENVELOPE: {marker} to {recipient} went in the clear");
        let own = Some(site).filter(|site| *site >= SITES + 2);
        assert_eq!(
            own,
            wanted.filter(|_| self.has_matched_routes),
            "RIGHT-ENVELOPE: the route of {marker} to {recipient}"
        );
    }

    /// RIGHT-ENVELOPE: mail comes with its own route's credentials, and with no others.
    fn check_terms(&self, recipient: &str, site: usize, is_authenticated: bool) {
        let domain = self.with_credentials.filter(|_| site < SITES);
        let wants = domain.is_some_and(|domain| recipient.rsplit_once('@').is_some_and(|(_, of)| of == domain));
        assert_eq!(is_authenticated, wants, "RIGHT-ENVELOPE: credentials for {recipient}");
    }

    pub(crate) fn strikes(&mut self, fault: Fault) -> bool {
        self.mix.strikes(fault, self.random)
    }

    /// When the engine sent the last of so many octets.
    fn written_at(&self, octets: u64) -> Micros {
        let place = self.written.partition_point(|&(until, _)| until < octets);
        self.written.get(place).expect("what was read was written").1
    }
}

/// What the engine promised about one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerLimits {
    pub(crate) deliveries_max: u64,
    pub(crate) recipients_max: usize,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) host: usize,
    source: usize,
    input: Vec<u8>,
    /// What it says next, in order.
    pub(crate) says: VecDeque<Say>,
    is_closed: bool,
    is_handshaking: bool,
    is_encrypted: bool,
    /// It was greeted by LHLO.
    is_lmtp: bool,
    /// It has said that it has TLS.
    offers_tls: bool,
    deliveries: u64,
    /// Octets that it has looked at.
    read: u64,
    /// What its last EHLO had, and whether AUTH was obeyed.
    offers: Offers,
    is_authenticated: bool,
    /// The last MAIL, whatever was said to it: its reverse path, and when it was written; and its parameters.
    mail: Option<(String, Micros)>,
    parameters: Vec<String>,
    /// The last reverse path that it said yes to.
    kept: Option<String>,
    transaction: Transaction,
}

/// What a peer told that it takes.
#[derive(Debug, Clone, Copy, Default)]
struct Offers {
    eight_bit: bool,
    utf8: bool,
    size_max: Option<u64>,
    dsn: bool,
}

/// Something that a peer says, or its end.
#[derive(Debug)]
pub(crate) enum Say {
    Text {
        wait: Micros,
        text: Vec<u8>,
        /// The engine learns from it that this was taken.
        takes: Option<Taken>,
    },
    Close,
}

pub(crate) type Taken = (Marker, Vec<String>);

#[derive(Debug, Default)]
struct Transaction {
    reverse_path: Option<String>,
    recipients: Vec<String>,
    content: Phase,
    /// Its reverse path is another's.
    is_foreign: bool,
}

/// Whether commands come, or content.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Commands,
    Content,
    /// One chunk of so many octets, the only one (RFC 3030).
    Chunk(usize),
    /// It is refused before its end.
    Unwanted,
    /// It was refused; what still comes is nothing to anybody.
    Discarded,
}

impl Host {
    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        (!self.is_six_only).then_some(self.address).into_iter().chain(self.six)
    }

    pub(crate) fn new(name: String, address: SocketAddr, site: usize, random: &mut Random, mix: &mut Mix) -> Self {
        Self {
            name,
            address,
            six: None,
            is_six_only: false,
            site,
            preference: 10 * (1 + random.below(2) as u16),
            habits: Habits::draw(random, mix),
            down_until: 0,
            is_down_silently: false,
            busy_until: 0,
            put_off: BTreeMap::new(),
            tried: VecDeque::new(),
            transactions: 0,
            unused: BTreeMap::new(),
            blamed: BTreeSet::new(),
        }
    }

    /// From now on it is as kind as can be.
    pub(crate) fn heal(&mut self) {
        self.habits = Habits::kind();
        self.down_until = 0;
        self.busy_until = 0;
    }

    fn is_punishing(&mut self, now: Micros) -> bool {
        let Some(recipients_max) = self.habits.recipients_punished else { return false };
        self.tried.push_back(now);
        while self.tried.front().is_some_and(|&at| at + 10 * SECOND < now) {
            self.tried.pop_front();
        }
        self.tried.len() > recipients_max
    }
}

impl Habits {
    fn kind() -> Self {
        Self {
            knows_ehlo: true,
            pipelining: true,
            chunking: true,
            eight_bit: true,
            utf8: true,
            auth: true,
            size_max: None,
            limit: None,
            tls: Tls::Works,
            demands_tls: false,
            refuses_every_second: false,
            greylists_for: None,
            recipients_punished: None,
            idle_max: None,
        }
    }

    fn draw(random: &mut Random, mix: &mut Mix) -> Self {
        let mut habits = Self::kind();
        habits.tls = Tls::draw(random, mix);
        habits.demands_tls = habits.tls != Tls::NotOffered && mix.strikes(Fault::TlsDemanded, random);
        habits.knows_ehlo = !mix.strikes(Fault::EhloUnknown, random);
        habits.pipelining = !mix.strikes(Fault::NoPipelining, random);
        habits.chunking = !mix.strikes(Fault::NoChunking, random);
        habits.eight_bit = !mix.strikes(Fault::NoEightBit, random);
        habits.utf8 = !mix.strikes(Fault::NoUtf8, random);
        habits.auth = !mix.strikes(Fault::AuthNotOffered, random);
        habits.size_max = mix.strikes(Fault::SizeLimited, random).then(|| 2_000 + random.below(4_000));
        let few = mix.strikes(Fault::FewRecipients, random);
        habits.limit = few.then(|| 1 + random.below(4) as usize).filter(|_| habits.knows_ehlo);
        habits.refuses_every_second = random.one_in(6) && mix.strikes(Fault::RefusesEverySecond, random);
        let greylists = mix.strikes(Fault::Greylisted, random);
        habits.greylists_for = greylists.then(|| (1 + random.below(20)) * MINUTE);
        let punishes = mix.strikes(Fault::RateLimited, random);
        habits.recipients_punished = punishes.then(|| 3 + random.below(30) as usize);
        let idle = mix.strikes(Fault::IdleClosed, random);
        habits.idle_max = idle.then(|| (1 + random.below(60)) * SECOND);
        habits
    }
}

impl Peer {
    pub(crate) fn new(host: usize, source: usize) -> Self {
        Self {
            host,
            source,
            input: Vec::new(),
            says: VecDeque::new(),
            is_closed: false,
            is_handshaking: false,
            is_encrypted: false,
            is_lmtp: false,
            offers_tls: false,
            deliveries: 0,
            read: 0,
            offers: Offers::default(),
            is_authenticated: false,
            mail: None,
            parameters: Vec::new(),
            kept: None,
            transaction: Transaction::default(),
        }
    }

    pub(crate) fn greet(&mut self, host: &Host, around: &mut Around<'_>) {
        if host.busy_until > around.now || around.strikes(Fault::BannerBusy) {
            self.close_with("421 4.3.2 not now");
        } else if around.strikes(Fault::BannerRefuses) {
            let welcome = "554 5.7.1 nobody is welcome";
            self.close_with(if around.random.one_in(2) { BLAME } else { welcome });
        } else {
            let late = around.strikes(Fault::LateBanner);
            let wait = if late { around.random.below(6 * MINUTE) } else { 0 };
            self.say_after(wait, "220 peer.example ESMTP");
        }
    }

    /// A connection that nobody used for a while ends.
    pub(crate) fn dismiss(&mut self, around: &mut Around<'_>) {
        if around.random.one_in(2) {
            self.say("421 4.4.2 idle for too long");
        }
        self.close();
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.is_handshaking
    }

    pub(crate) fn tls_started(&mut self) {
        self.is_handshaking = false;
        self.is_encrypted = true;
        self.read += self.input.len() as u64;
        self.input.clear();
        self.transaction = Transaction::default();
    }

    /// Octets came.
    pub(crate) fn receive(&mut self, octets: &[u8], host: &mut Host, around: &mut Around<'_>) {
        if self.is_closed || self.is_handshaking {
            return;
        }
        self.input.extend_from_slice(octets);
        while !self.is_closed && !self.is_handshaking {
            match self.transaction.content {
                Phase::Commands => {
                    let Some(end) = find(&self.input, b"\r\n") else { return };
                    let line: Vec<u8> = self.input.drain(..end + 2).collect();
                    self.read += line.len() as u64;
                    let line = String::from_utf8(line).expect("commands are UTF-8");
                    self.obey(line.trim_end(), host, around);
                }
                Phase::Chunk(octets) => {
                    if self.input.len() < octets {
                        return;
                    }
                    let content: Vec<u8> = self.input.drain(..octets).collect();
                    self.read += content.len() as u64;
                    self.finish_chunk(&content, around);
                }
                phase => {
                    if phase == Phase::Unwanted {
                        self.refuse_early(around);
                        continue;
                    }
                    let Some((end, behind)) = content_end(&self.input) else { return };
                    let content: Vec<u8> = self.input.drain(..behind).collect();
                    self.read += content.len() as u64;
                    self.finish(phase, &unstuffed(&content[..end]), around);
                }
            }
        }
    }

    fn obey(&mut self, command: &str, host: &mut Host, around: &mut Around<'_>) {
        self.watch(command, host, around);
        if host.busy_until > around.now || around.strikes(Fault::Busy) {
            return self.close_with("421 4.3.2 too busy");
        }
        let (verb, rest) = command.split_at(command.find([' ', ':']).unwrap_or(command.len()));
        // What follows a chunk's size is content whatever was said to it, and RSET is obeyed by everybody.
        if !matches!(verb, "RSET" | "BDAT") && around.strikes(Fault::Garbage) {
            return self.say(if around.random.one_in(2) { "HTTP/1.1 400 Bad Request" } else { "\u{0}\u{ff}" });
        }
        match verb {
            "EHLO" | "LHLO" => {
                self.is_lmtp = verb == "LHLO";
                self.check_name(rest);
                self.ehlo(host, around);
            }
            "HELO" => {
                self.check_name(rest);
                self.say("250 peer.example");
            }
            "STARTTLS" => self.start_tls(host),
            "AUTH" if around.strikes(Fault::AuthRefused) => self.say("535 5.7.8 who are you?"),
            "AUTH" => {
                self.is_authenticated = true;
                self.say("235 2.7.0 welcome");
            }
            "RSET" => {
                self.transaction = Transaction::default();
                self.say("250 2.0.0 as you like");
            }
            "NOOP" => self.say("250 2.0.0 ok"),
            "QUIT" => {
                self.count_unused(host, around.now);
                self.close_with("221 2.0.0 bye");
            }
            "MAIL" => self.mail(path(rest), host, around),
            "RCPT" => self.rcpt(path(rest), host, around),
            "DATA" => self.data(host, around),
            "BDAT" => self.bdat(rest),
            _ => self.say("500 5.5.1 what?"),
        }
    }

    /// Rates count recipients of what was written, whatever is said to it.
    fn watch(&mut self, command: &str, host: &Host, around: &mut Around<'_>) {
        if let Some(rest) = command.strip_prefix("MAIL ") {
            self.mail = Some((path(rest), around.written_at(self.read)));
            self.parameters = words_behind(rest);
        }
        if let (Some(rest), Some((reverse_path, at))) = (command.strip_prefix("RCPT "), &self.mail) {
            let words: Vec<String> = words_behind(rest);
            dsn::check(self.offers.dsn, reverse_path, &path(rest), &self.parameters, &words);
            around.rates.see(*at, self.source, host.site, reverse_path, &path(rest));
            let place = (self.source, self.host, host);
            around.tls.check(*at, reverse_path, &path(rest), place, self.offers_tls, around.ledger);
        }
    }

    fn ehlo(&mut self, host: &Host, around: &mut Around<'_>) {
        let Habits { knows_ehlo, pipelining, chunking, eight_bit, utf8, auth, size_max, limit, tls, .. } =
            host.habits.clone();
        let lacks = [(!eight_bit, Lack::EightBit), (!utf8, Lack::Utf8), (size_max.is_some(), Lack::Size)];
        for (_, lack) in lacks.into_iter().filter(|(lacks, _)| *lacks || !knows_ehlo) {
            host.addresses().for_each(|address| around.ledger.lack(address.to_string(), lack));
        }
        if !knows_ehlo {
            return self.say("500 5.5.1 EHLO?");
        }
        if around.strikes(Fault::EhloBusy) {
            return self.say("450 4.3.2 later");
        }
        self.offers = Offers { eight_bit, utf8, size_max, dsn: around.has_dsn };
        let mut lines = vec!["peer.example".to_owned(), "ENHANCEDSTATUSCODES".to_owned()];
        lines.extend(pipelining.then(|| "PIPELINING".to_owned()));
        lines.extend(chunking.then(|| "CHUNKING".to_owned()));
        lines.extend(eight_bit.then(|| "8BITMIME".to_owned()));
        lines.extend(around.has_dsn.then(|| "DSN".to_owned()));
        lines.extend(utf8.then(|| "SMTPUTF8".to_owned()));
        lines.extend(auth.then(|| "AUTH PLAIN LOGIN".to_owned()));
        lines.extend(size_max.map(|size| format!("SIZE {size}")));
        lines.extend(limit.map(|max| format!("LIMITS MAILMAX={max} RCPTMAX={max}")));
        if tls != Tls::NotOffered && !self.is_encrypted {
            self.offers_tls = true;
            lines.push("STARTTLS".to_owned());
        }
        let last = lines.len() - 1;
        let lines = lines.iter().enumerate();
        let lines: Vec<String> =
            lines.map(|(place, line)| format!("250{}{line}", if place == last { ' ' } else { '-' })).collect();
        self.say(&lines.join("\r\n"));
    }

    fn start_tls(&mut self, host: &Host) {
        match host.habits.tls {
            Tls::Refused => self.say("454 4.7.0 no TLS today"),
            Tls::NotOffered => self.say("502 5.5.1 no TLS"),
            tls => {
                self.say(if tls == Tls::Injected { "220 go on\r\n250 2.0.0 injected" } else { "220 go on" });
                self.is_handshaking = true;
            }
        }
    }

    /// CONNECTIONS-USED: nobody connects again and again and has nothing to say.
    fn count_unused(&self, host: &mut Host, now: Micros) {
        if self.deliveries == 0 {
            let unused = host.unused.entry(self.source).or_default();
            unused.push_back(now);
            unused.retain(|&at| at + UNUSED_WITHIN > now);
            assert!(unused.len() <= UNUSED_MAX, "CONNECTIONS-USED: {} in a row without a transaction", unused.len());
        }
    }

    fn mail(&mut self, reverse_path: String, host: &mut Host, around: &mut Around<'_>) {
        self.deliveries += 1;
        host.unused.remove(&self.source);
        assert!(
            self.deliveries <= around.limits.deliveries_max.min(host.habits.limit.map_or(u64::MAX, |max| max as u64)),
            "LIMITS-HOLD: {} transactions on one connection",
            self.deliveries
        );
        if self.transaction.reverse_path.is_some() {
            // As Exim does: the first reverse path is kept.
            self.say("503 5.5.1 sender already given");
        } else if host.habits.demands_tls && !self.is_encrypted {
            self.say("530 5.7.0 STARTTLS first");
        } else if around.strikes(Fault::MailDeferred) {
            self.say("451 4.7.1 later");
        } else if around.strikes(Fault::MailRefused) {
            around.ledger.bounce(&reverse_path, "");
            self.say("550 5.7.1 not from you");
        } else if around.strikes(Fault::SourceBlamed) {
            // To which of its domains this goes, RCPT will tell.
            let sent = around.ledger.sent(marker_of(&reverse_path));
            host.blamed.extend(sent.recipients.iter().map(|recipient| (self.source, domain_of(recipient).to_owned())));
            self.say(BLAME);
        } else if self.kept.as_ref().is_some_and(|kept| *kept != reverse_path)
            && around.mix.has(Fault::Foreign)
            && around.strikes(Fault::Foreign)
        {
            // As one does that does not know RSET.
            self.transaction.reverse_path = self.kept.clone();
            self.transaction.is_foreign = true;
            self.say("503 5.5.1 sender already given");
        } else if around.strikes(Fault::OutOfStep) {
            self.say("503 5.5.1 not now");
        } else if around.strikes(Fault::WrongCode) {
            self.say("354 what?");
        } else {
            host.transactions += 1;
            self.kept = Some(reverse_path.clone());
            self.transaction.reverse_path = Some(reverse_path);
            self.say("250 2.1.0 ok");
        }
    }

    fn rcpt(&mut self, recipient: String, host: &mut Host, around: &mut Around<'_>) {
        if self.transaction.reverse_path.is_none() {
            return self.say("503 5.5.1 MAIL first");
        }
        let reverse_path = self.asked_path();
        around.check_protocol(&recipient, self.is_lmtp);
        around.check_terms(&recipient, host.site, self.is_authenticated);
        around.check_route(&reverse_path, &recipient, host.site, self.is_encrypted);
        let accepted = self.transaction.recipients.len();
        let domain = |address: &str| address.rsplit_once('@').map(|(_, domain)| domain.to_owned());
        let other = self.transaction.recipients.iter().find(|other| domain(other) != domain(&recipient));
        assert!(other.is_none(), "RIGHT-ENVELOPE: {other:?} and {recipient} in one transaction");
        assert!(
            accepted < around.limits.recipients_max.min(host.habits.limit.unwrap_or(usize::MAX)),
            "LIMITS-HOLD: more than {accepted} recipients in one transaction"
        );
        if host.habits.refuses_every_second && host.transactions.is_multiple_of(2) {
            around.mix.count(Fault::RefusesEverySecond);
            around.ledger.bounce(&reverse_path, &recipient);
            self.say("550 5.1.1 nobody in this transaction");
        } else if host.is_punishing(around.now) {
            around.mix.count(Fault::RateLimited);
            host.busy_until = around.now + 5 * SECOND + around.random.below(2 * MINUTE);
            self.say("450 4.7.0 too much mail from you");
        } else if recipient.starts_with(&format!("{PUT_OFF}@"))
            && around.ledger.deferred_until(marker_of(&reverse_path)).is_none()
        {
            self.say("450 4.2.1 later");
        } else if self.is_greylisted(host, &reverse_path, &recipient, around) {
            self.say("451 4.7.1 greylisted");
        } else if around.strikes(Fault::RecipientDeferred) {
            self.say("450 4.2.1 later");
        } else if around.strikes(Fault::RecipientRefused) {
            around.ledger.bounce(&reverse_path, &recipient);
            self.say("550 5.1.1 unknown");
        } else if around.strikes(Fault::SourceBlamed) {
            host.blamed.insert((self.source, domain_of(&recipient).to_owned()));
            self.say(BLAME);
        } else if around.strikes(Fault::TooMany) {
            self.say(if around.random.one_in(2) { "452 4.5.3 too many" } else { "552 5.5.3 too many" });
        } else {
            self.transaction.recipients.push(recipient);
            self.say("250 2.1.5 ok");
        }
    }

    fn is_greylisted(&self, host: &mut Host, reverse_path: &str, recipient: &str, around: &mut Around<'_>) -> bool {
        let Some(wait) = host.habits.greylists_for else { return false };
        let key = (self.source, reverse_path.to_owned(), recipient.to_owned());
        let first = *host.put_off.entry(key).or_insert(around.now);
        let is_early = around.now < first + wait;
        if is_early {
            around.mix.count(Fault::Greylisted);
        }
        is_early
    }

    fn data(&mut self, host: &Host, around: &mut Around<'_>) {
        if self.transaction.recipients.is_empty() {
            // RFC 2920 §3.1 lets it say either.
            let is_second = host.habits.refuses_every_second && !self.is_lmtp;
            if is_second && self.transaction.reverse_path.is_some() && around.random.one_in(2) {
                self.transaction.content = Phase::Content;
                return self.say("354 go on");
            }
            return self.say("503 5.5.1 no valid recipients");
        }
        if around.strikes(Fault::ClosedAtData) {
            self.close();
        } else if around.strikes(Fault::DataDeferred) {
            self.say("451 4.3.0 later");
        } else if around.strikes(Fault::DataRefused) {
            self.bounce_all(around);
            self.say("554 5.7.1 no");
        } else if around.strikes(Fault::WrongCode) {
            self.say("250 2.0.0 fine");
        } else {
            let early = around.strikes(Fault::EarlyRefusal);
            self.transaction.content = if early { Phase::Unwanted } else { Phase::Content };
            self.say("354 go on");
        }
    }

    /// The engine sends content in one chunk.
    fn bdat(&mut self, rest: &str) {
        let octets = rest.trim().strip_suffix(" LAST").expect("the only chunk is the last");
        self.transaction.content = Phase::Chunk(octets.parse().expect("a number"));
    }

    fn finish_chunk(&mut self, content: &[u8], around: &mut Around<'_>) {
        if !self.transaction.recipients.is_empty() && around.strikes(Fault::BdatUnknown) {
            self.transaction = Transaction::default();
            return self.say("500 5.5.2 what?");
        }
        if !self.transaction.recipients.is_empty() {
            return self.finish(Phase::Content, content, around);
        }
        self.transaction.content = Phase::Commands;
        self.say("503 5.5.1 no valid recipients");
    }

    /// Some content is there, or none yet: it says no, and closes or reads on.
    fn refuse_early(&mut self, around: &mut Around<'_>) {
        if around.random.one_in(2) {
            self.bounce_all(around);
            self.say_of_content("552 5.3.4 too much");
        } else {
            self.say_of_content("451 4.3.1 no room");
        }
        self.transaction.content = Phase::Discarded;
        if around.random.one_in(2) {
            self.close();
        }
    }

    fn finish(&mut self, phase: Phase, content: &[u8], around: &mut Around<'_>) {
        let transaction = mem::take(&mut self.transaction);
        if phase == Phase::Discarded {
            return;
        }
        if transaction.recipients.is_empty() {
            assert!(content.is_empty(), "RIGHT-ENVELOPE: content for nobody");
            // The transaction goes on, as with Exim.
            self.transaction.reverse_path = transaction.reverse_path;
            return self.say("554 5.5.1 no valid recipients");
        }
        self.transaction = transaction;
        if around.strikes(Fault::ContentDeferred) {
            self.say_of_content("451 4.3.0 later");
        } else if around.strikes(Fault::ContentRefused) {
            self.bounce_all(around);
            self.say_of_content("554 5.6.0 unwanted");
        } else if around.strikes(Fault::ClosedBeforeReply) {
            self.close();
        } else if around.strikes(Fault::Busy) {
            self.close_with("421 4.3.2 closing");
        } else if around.strikes(Fault::WrongCode) {
            self.say("354 more?");
        } else {
            self.take(content, around);
        }
        self.transaction = Transaction::default();
    }

    fn take(&mut self, content: &[u8], around: &mut Around<'_>) {
        let Transaction { reverse_path, recipients, is_foreign, .. } = mem::take(&mut self.transaction);
        let reverse_path = reverse_path.expect("MAIL came before");
        assert!(!content.is_empty(), "RIGHT-ENVELOPE: an empty message under {reverse_path}");
        self.check_needs(&reverse_path, &recipients, content);
        let delivered = Delivered {
            source: self.source,
            reverse_path: &reverse_path,
            recipients: &recipients,
            content,
            is_awaited: around.is_heard,
            is_foreign,
        };
        if self.is_lmtp {
            return self.take_each(delivered, around);
        }
        let marker = around.ledger.take(delivered);
        if around.canary == Some(Canary::StartedTwice) && around.random.one_in(50) {
            around.ledger.take(delivered);
        }
        if around.strikes(Fault::TakenInSilence) {
            around.ledger.forget(marker, &recipients);
            return self.close();
        }
        let wait = if around.strikes(Fault::Slow) { around.random.below(12 * MINUTE) } else { 0 };
        let text = b"250 2.0.0 taken\r\n".to_vec();
        self.says.push_back(Say::Text { wait, text, takes: Some((marker, recipients)) });
    }

    /// A source has a name of its own.
    fn check_name(&self, rest: &str) {
        let name = EHLO_DOMAINS[self.source];
        assert_eq!(rest.trim(), name, "RIGHT-ENVELOPE: how source {} calls itself", self.source);
    }

    /// RIGHT-ENVELOPE: what comes is within what the peer has offered, and MAIL told of it (RFC 6152, 6531, 1870).
    fn check_needs(&self, reverse_path: &str, recipients: &[String], content: &[u8]) {
        let Offers { eight_bit, utf8, size_max, .. } = self.offers;
        let told = |parameter: &str| self.parameters.iter().any(|it| it == parameter);
        let may_be_eight_bit = eight_bit && told("BODY=8BITMIME");
        assert!(content.is_ascii() || may_be_eight_bit, "RIGHT-ENVELOPE: 8-bit content under {:?}", self.parameters);
        let header = &content[..find(content, b"\r\n\r\n").unwrap_or(content.len())];
        let is_ascii = header.is_ascii() && reverse_path.is_ascii() && recipients.iter().all(|it| it.is_ascii());
        assert!(is_ascii || utf8 && told("SMTPUTF8"), "RIGHT-ENVELOPE: UTF-8 under {:?}", self.parameters);
        let Some(size_max) = size_max else { return };
        let size = self.parameters.iter().find_map(|it| it.strip_prefix("SIZE=")?.parse::<u64>().ok());
        // An end of line may be put behind it.
        let is_told = size.is_some_and(|size| size <= size_max && size.abs_diff(content.len() as u64) <= 2);
        assert!(is_told, "RIGHT-ENVELOPE: {} octets of {size_max}, announced as {size:?}", content.len());
    }

    /// What the last MAIL asked for, whatever was said to it.
    pub(crate) fn asked_path(&self) -> String {
        self.mail.as_ref().expect("MAIL came before").0.clone()
    }

    fn bounce_all(&self, around: &mut Around<'_>) {
        let reverse_path = &self.asked_path();
        for recipient in &self.transaction.recipients {
            around.ledger.bounce(reverse_path, recipient);
        }
    }

    /// In LMTP each recipient hears of it (RFC 2033 §4.2).
    fn say_of_content(&mut self, text: &str) {
        let replies = if self.is_lmtp { self.transaction.recipients.len() } else { 1 };
        (0..replies).for_each(|_| self.say(text));
    }

    pub(crate) fn say(&mut self, text: &str) {
        self.say_after(0, text);
    }

    fn say_after(&mut self, wait: Micros, text: &str) {
        let text = format!("{text}\r\n").into_bytes();
        self.says.push_back(Say::Text { wait, text, takes: None });
    }

    pub(crate) fn close_with(&mut self, text: &str) {
        self.say(text);
        self.close();
    }

    pub(crate) fn close(&mut self) {
        self.is_closed = true;
        self.says.push_back(Say::Close);
    }
}

fn path(rest: &str) -> String {
    let (begin, end) = (rest.find('<').expect("a path"), rest.rfind('>').expect("its end"));
    rest[begin + 1..end].to_owned()
}

/// The parameters behind a path.
fn words_behind(rest: &str) -> Vec<String> {
    let behind = &rest[rest.rfind('>').map_or(rest.len(), |end| end + 1)..];
    behind.split_whitespace().map(str::to_owned).collect()
}

/// Where the content ends, and where what follows the final dot begins.
fn content_end(input: &[u8]) -> Option<(usize, usize)> {
    if input.starts_with(b".\r\n") {
        return Some((0, 3));
    }
    find(input, b"\r\n.\r\n").map(|end| (end + 2, end + 5))
}

fn find(octets: &[u8], wanted: &[u8]) -> Option<usize> {
    octets.windows(wanted.len()).position(|window| window == wanted)
}

fn unstuffed(content: &[u8]) -> Vec<u8> {
    let lines = content.split_inclusive(|octet| *octet == b'\n');
    lines.flat_map(|line| line.strip_prefix(b".").unwrap_or(line)).copied().collect()
}

/// Mail goes by another connection, or is called back, while one is opened for it; and where its TLS fails, all are
/// tried again when the host's pause is over.
const UNUSED_MAX: usize = 40;
const UNUSED_WITHIN: Micros = 2 * MINUTE;
