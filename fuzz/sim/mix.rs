//! The faults of a run: which ones strike, and how often. A run draws its own mix, so that each fault is met alone and
//! beside others.

use std::fmt;

use crate::random::Random;

macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident $name:literal $often:literal,)*) => {
        /// What can go wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Fault {
            $($(#[$doc])* $fault,)*
        }

        /// Each with its name, and the highest rate, in 1 / 10,000 of the occasions, that a run may draw.
        const FAULTS: &[(Fault, &str, u64)] = &[$((Fault::$fault, $name, $often),)*];
    };
}

faults! {
    ConnectRefused "network: connection refused" 1_000,
    NoPort "network: the source has no port left" 200,
    ConnectLost "network: SYN goes unanswered" 500,
    Cut "network: cut at any octet" 800,
    Silent "network: all is lost from some octet on" 200,
    Delayed "network: packet delayed by up to 30 s" 300,
    Split "network: octets come in pieces" 3_000,
    SlowLink "network: a slow link" 300,
    HostDown "host: down for hours" 4_000,
    LateBanner "peer: banner after up to 6 minutes" 300,
    BannerRefuses "peer: banner 554" 300,
    BannerBusy "peer: banner 421" 300,
    Storm "peer: storm of 421" 3_000,
    EhloUnknown "peer: knows only HELO" 1_000,
    EhloBusy "peer: EHLO put off" 200,
    MailDeferred "peer: MAIL put off" 300,
    MailRefused "peer: MAIL refused" 200,
    SourceBlamed "peer: refuses for our address's sake" 200,
    RecipientDeferred "peer: recipient put off" 1_500,
    RecipientRefused "peer: recipient refused" 1_000,
    TooMany "peer: too many recipients" 500,
    RefusesEverySecond "peer: refuses all recipients of every second transaction" 10_000,
    DataDeferred "peer: DATA put off" 300,
    DataRefused "peer: DATA refused" 200,
    ClosedAtData "peer: closed at DATA" 300,
    ContentDeferred "peer: content put off" 500,
    ContentRefused "peer: content refused" 300,
    EarlyRefusal "peer: content refused before its end" 300,
    ClosedBeforeReply "peer: closed before it took the content" 200,
    TakenInSilence "peer: took the content and closed" 200,
    Slow "peer: replies after up to 12 minutes" 100,
    Garbage "peer: garbage" 200,
    WrongCode "peer: a code that makes no sense" 200,
    OutOfStep "peer: 503" 200,
    BdatUnknown "peer: offers CHUNKING, and does not know BDAT" 200,
    Foreign "peer: refuses MAIL, and takes the content under what it kept" 300,
    Busy "peer: 421 in answer to a command" 200,
    Greylisted "peer: greylisting" 6_000,
    RateLimited "peer: punishes too many recipients" 6_000,
    IdleClosed "peer: closes idle connections" 8_000,
    NoPipelining "peer: no PIPELINING" 3_000,
    NoChunking "peer: no CHUNKING" 5_000,
    NoEightBit "peer: no 8BITMIME" 2_000,
    NoUtf8 "peer: no SMTPUTF8" 5_000,
    SizeLimited "peer: small SIZE" 2_000,
    FewRecipients "peer: LIMITS MAILMAX and RCPTMAX" 2_000,
    TlsOffered "peer: STARTTLS" 8_000,
    TlsRefused "TLS: STARTTLS refused" 1_500,
    TlsBroken "TLS: handshake fails" 2_500,
    TlsInjected "TLS: octets behind STARTTLS" 1_500,
    TlsDemanded "TLS: 530 without it" 1_000,
    AuthNotOffered "AUTH: not offered" 1_500,
    AuthRefused "AUTH: credentials refused" 1_000,
    DnsFails "DNS: no answer" 1_500,
    DnsSlow "DNS: an answer after up to 30 s" 2_000,
    NoDomain "DNS: NXDOMAIN" 300,
    NullMx "DNS: null MX" 300,
    MxChanged "DNS: another MX set" 1_000,
    DiskFails "disk: an operation fails" 30,
    DiskFailsOn "disk: all operations fail for a while" 3,
    DiskShort "disk: short write" 200,
    DiskSlow "disk: an operation takes up to 20 s" 50,
    DiskFull "disk: full for a while" 5,
    EventsSlow "events: the log is slow" 5_000,
    EventsFail "events: the log fails for a while" 2,
    ShardStalled "shard: stands still for up to 20 s" 10,
    MailDelayed "shard: messages between shards are late" 300,
    ClientGone "client: gone in the midst" 500,
    ClientSlow "client: silent for up to 7 minutes" 40,
    PowerCut "engine: power cut" 10_000,
    Killed "engine: killed" 10_000,
    Stopped "engine: stopped and started" 10_000,
    ShardsChanged "engine: another number of shards" 10_000,
    PairMoved "control: pairs move to another shard" 10_000,
    // Which runs have these is drawn elsewhere.
    ClockSetForward "clock: set forward by up to four hours" 0,
    ClockSetBack "clock: set back by up to four hours" 0,
    LmtpDeferred "LMTP: content put off for one recipient" 0,
    LmtpRefused "LMTP: content refused for one recipient" 0,
    LmtpCutShort "LMTP: closed before all replies to the content" 0,
    Reloaded "control: another configuration" 0,
    TlsChanged "TLS: a host's TLS is another" 0,
    TlsSelfSigned "TLS: nobody vouches for the certificate" 0,
    TlsOtherName "TLS: the certificate is for another name" 0,
    TlsExpired "TLS: the certificate has expired" 0,
    TlsaMismatch "DANE: the certificate is not what TLSA records name" 0,
    TlsaUnknown "DANE: nobody can say what TLSA records there are" 0,
    TlsaUnusable "DANE: TLSA records that can't be used" 0,
    PolicyChanged "MTA-STS: another policy, or none" 0,
    PolicyNamesOthers "MTA-STS: the policy does not name all hosts" 0,
}

/// A run's rates, and how often each fault struck.
#[derive(Debug, Clone)]
pub(crate) struct Mix {
    rates: Vec<u64>,
    struck: Vec<u64>,
    is_healed: bool,
}

impl Mix {
    /// `own`: for what came later, so that seeds draw what they always did.
    pub(crate) fn draw(random: &mut Random, own: &mut Random) -> Self {
        let mut rate = |&(fault, _, often): &(Fault, &str, u64)| {
            let random = if fault == Fault::PairMoved { &mut *own } else { &mut *random };
            match random.below(4) {
                0 => 0,
                1 => often,
                // Most runs are mostly well.
                _ => often / (1 << random.below(6)),
            }
        };
        let rates = FAULTS.iter().map(|fault| if fault.2 == 0 { 0 } else { rate(fault) });
        Self { rates: rates.collect(), struck: vec![0; FAULTS.len()], is_healed: false }
    }

    /// Whether the fault strikes on this occasion.
    pub(crate) fn strikes(&mut self, fault: Fault, random: &mut Random) -> bool {
        let rate = self.rates[fault as usize];
        if self.is_healed || rate == 0 || random.below(10_000) >= rate {
            return false;
        }
        self.count(fault);
        true
    }

    /// Whether it may strike in this run.
    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.rates[fault as usize] > 0
    }

    pub(crate) fn count(&mut self, fault: Fault) {
        self.struck[fault as usize] += 1;
    }

    /// From now on all is well.
    pub(crate) fn heal(&mut self) {
        self.is_healed = true;
    }

    pub(crate) fn is_healed(&self) -> bool {
        self.is_healed
    }

    /// Every fault with how often it struck.
    pub(crate) fn struck(&self) -> impl Iterator<Item = (&'static str, u64)> {
        FAULTS.iter().map(|(_, name, _)| *name).zip(self.struck.iter().copied())
    }
}

/// Below the bound doubled up to so many times: mostly small values, and now and then large ones.
pub(crate) fn spread(random: &mut Random, bound: u64, doublings: u64) -> u64 {
    let doublings = random.below(doublings + 1);
    random.below(bound << doublings)
}

/// The rates that are not zero.
impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((fault, _, _), rate) in FAULTS.iter().zip(&self.rates).filter(|(_, rate)| **rate > 0) {
            write!(f, " {fault:?}={rate}")?;
        }
        Ok(())
    }
}
