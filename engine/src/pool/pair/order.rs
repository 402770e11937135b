//! What the owner of pairs decides, for its shard to carry out.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{LimitId, Shaping};
use crate::fair::Flow;
use crate::handover::{Attempt, Blocked, PairKey, Permit, RollupKey, Ticket, TlsPolicyKey, TlsRequirement};
use crate::mail::endpoint::Endpoint;
use crate::pool::connection::ConnectionKey;

/// What the owner decided.
#[derive(Debug)]
pub enum Order {
    Connect(Box<Connect>),
    Start {
        connection: ConnectionKey,
        attempt: Box<Attempt>,
    },
    Quit {
        connection: ConnectionKey,
    },
    Credits {
        home: usize,
        pair: PairKey,
        /// None: standing ones.
        flow: Option<Arc<Flow>>,
        credits: u32,
    },
    Block {
        home: usize,
        pair: PairKey,
        blocked: Blocked,
    },
    /// One of the pair's homes is to know that a rate holds the pair, and which of its tickets wait.
    Paced {
        home: usize,
        pair: PairKey,
        blocked: Blocked,
        waiting: Box<[Ticket]>,
    },
    /// Units of a limit are to be reserved durably; [`super::Pools::handle_reserved`] is the answer.
    Reserve {
        limit: Arc<str>,
        units: u32,
        period: Duration,
    },
    /// The keeper of the limits over many pairs is asked; [`super::Pools::handle_permit`] is the answer.
    Want {
        home: usize,
        pair: PairKey,
        flow: Arc<Flow>,
        limits: Arc<[LimitId]>,
        units: u32,
    },
    /// So much of a permit was used at that time, or not at all.
    Spent {
        permit: Permit,
        at: Option<Duration>,
    },
    /// A source has sent all that its warm-up allows to a roll-up until then.
    WarmedUp {
        pair: PairKey,
        quota: u32,
        until_ms: u64,
    },
    /// No attempt was made, because something suspends the mail; the ticket goes home.
    Suspended {
        attempt: Box<Attempt>,
    },
    /// No attempt was made; the ticket goes home. `stays`: its turn had come, and nothing is wrong with its source.
    Return {
        attempt: Box<Attempt>,
        stays: bool,
    },
    /// A home is to send nothing more to the roll-up's pairs; [`super::Pools::handle_withdrawn`] is the answer.
    Withdraw {
        home: usize,
        rollup: RollupKey,
        number: u64,
    },
    /// A home may send to them again.
    Keep {
        home: usize,
        rollup: RollupKey,
    },
    /// The keeper is to forget what waits there; [`super::Pools::handle_unwanted`] is the answer.
    Unwant {
        rollup: RollupKey,
        number: u64,
    },
    /// The ticket goes home likewise, and no host meets the TLS requirement of its domain until then.
    Hold {
        attempt: Box<Attempt>,
        blocked: Blocked,
    },
}

/// A connection to be opened.
#[derive(Debug)]
pub struct Connect {
    pub connection: ConnectionKey,
    pub source: usize,
    pub host_name: String,
    pub to: Endpoint,
    pub tls: TlsRequirement,
    /// What its session counts for.
    pub policy: TlsPolicyKey,
    pub shaping: Arc<Shaping>,
}

/// What the end of a session means for its host.
#[derive(Debug, Clone)]
pub enum HostFate {
    /// It just ended.
    Fine,
    BackOff {
        reason: Arc<str>,
    },
    /// It can't be had with the TLS that was required; mail with another requirement may go to it.
    BackOffTls {
        reason: Arc<str>,
    },
    /// Its TLS is broken, the rest may work.
    RetryInClear,
    /// It could not be asked, for a reason of ours that passes.
    Pause {
        reason: Arc<str>,
    },
}
