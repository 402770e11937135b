//! What one stage hands to the next, and what shards tell each other.
//!
//! Each hand-over changes the type, so that steps can't be left out or swapped:
//!
//! ```text
//! Received → Appended → Spooled → (entry: due, ready) → Attempt → Settled → Outcome record
//! ```
//!
//! A [`Spooled`] exists only for a durable record: [`crate::shard::Shard`] makes it when the spool reports the commit,
//! and only a `Spooled` can be answered with 250 or be scheduled.
//!
//! Over 500 lines: whatever crosses between stages, and between shards, is in one place.

use std::sync::Arc;
use std::time::Duration;

use postrider_spool::record::{DsnParameters, MessageId, Outcome};

use crate::accept::Refusal;
use crate::accept::admission::Admitted;
use crate::admin::{Chosen, Inspected, MailChoice, MessageFilter, MessageRow, QueueRow, TlsReportRow};
use crate::config::{Chunking, LimitId, MatchedRoute, Shaping, SharedLimits, Subject, Terms, TlsMode};
use crate::deliver::attempt::TransactionResult;
use crate::deliver::dane::HostDane;
use crate::deliver::mta_sts::StsPolicy;
use crate::deliver::route::{RouteFailure, Site};
use crate::deliver::tls_policy;
pub use crate::deliver::tls_policy::{HandshakeError, PolicyKind, TlsFailure, TlsPolicyKey, TlsProof, TlsRequirement};
use crate::fair::Flow;
use crate::mail::endpoint::Endpoint;
use crate::pool::connection::ConnectionKey;
use crate::pool::pair::OwnerState;
use crate::pool::suspension::{Destination, Suspension};
use crate::schedule::queue::EntryKey;
use crate::shard::Reload;

/// A message whose record is durable.
#[derive(Debug, Clone)]
pub struct Spooled {
    pub message: MessageId,
    pub tenant: String,
    pub campaign: String,
    pub egress_pool: String,
    pub priority: u8,
    pub expires_ms: u64,
    pub groups: Vec<RecipientGroup>,
}

/// Recipients at one domain with the same state: an entry-to-be.
#[derive(Debug, Clone)]
pub struct RecipientGroup {
    pub domain: Arc<str>,
    pub recipients: Box<[u32]>,
    pub attempts: u32,
    pub due_ms: u64,
    pub last_answer: Option<Arc<str>>,
    /// The route with a `match` that it takes.
    pub matched: Option<MatchedRoute>,
}

/// What mail is routed by: its domain, and the route with a `match` that it takes, where it takes one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteKey {
    pub domain: Arc<str>,
    pub matched: Option<MatchedRoute>,
}

impl RouteKey {
    /// Of mail that takes its domain's route, whosever it is.
    pub fn of_domain(domain: impl Into<Arc<str>>) -> Self {
        Self { domain: domain.into(), matched: None }
    }
}

/// An egress source and a site: what connections, rates and back-off belong to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PairKey {
    /// Index into the configuration's egress sources.
    pub source: usize,
    /// The site's name; a provider's, where one rolls it up. All sites of a roll-up have one owner.
    pub rollup: Arc<str>,
    pub site: Arc<str>,
}

/// An egress source and a roll-up: its pairs have one owner, and move to another together.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RollupKey {
    /// Index into the configuration's egress sources.
    pub source: usize,
    pub rollup: Arc<str>,
}

impl RollupKey {
    pub fn covers(&self, pair: &PairKey) -> bool {
        self.source == pair.source && self.rollup == pair.rollup
    }
}

impl PairKey {
    /// What its owner is looked up by.
    pub fn rollup_key(&self) -> RollupKey {
        RollupKey { source: self.source, rollup: Arc::clone(&self.rollup) }
    }

    pub fn destination(&self) -> Destination<'_> {
        Destination { rollup: &self.rollup, site: &self.site }
    }

    /// What a limit over many pairs may ask about a flow here.
    pub fn subject<'a>(&'a self, flow: &'a Flow) -> Subject<'a> {
        // What no provider rolls up is its own roll-up.
        let provider = (self.rollup != self.site).then_some(&*self.rollup);
        let Flow { tenant, campaign, pool, domain, .. } = flow;
        Subject { tenant, campaign, pool, domain, source: self.source, provider, site: &self.site }
    }

    /// The limits over many pairs that a flow is under here.
    pub fn shared_limits(&self, limits: &SharedLimits, flow: &Flow) -> Option<Arc<[LimitId]>> {
        let found: Vec<LimitId> = limits.of(self.subject(flow)).collect();
        (!found.is_empty()).then(|| found.into())
    }
}

/// The site of a domain's mail with the TLS that the mail requires.
#[derive(Debug, Clone)]
pub struct Route {
    pub site: Arc<Site>,
    pub tls: TlsMode,
    /// The domain's MTA-STS policy, where one counts.
    pub sts: Option<Arc<StsPolicy>>,
    /// Whether the hosts' TLSA records count.
    pub dane: bool,
    pub terms: Arc<Terms>,
}

impl Route {
    /// What a connection to one of the site's hosts must have proved; None: the mail must not go there.
    pub fn requirement(&self, host: usize) -> Option<TlsRequirement> {
        let host = &self.site.hosts[host];
        if host.addresses.iter().all(Endpoint::is_unix) {
            // Nobody can listen in between, and there is no name to vouch for; `check` refuses to ask for more.
            return Some(TlsRequirement::Disabled);
        }
        let dane = if self.dane { &host.dane } else { &HostDane::Absent };
        tls_policy::requirement(self.tls, dane, self.sts.as_deref(), &host.name)
    }

    /// The addresses that the mail may go to, of those that its source reaches, and what it requires of each.
    pub fn usable(&self, reaches: impl Fn(&Endpoint) -> bool) -> impl Iterator<Item = (Endpoint, TlsRequirement)> {
        let hosts = self.site.hosts.iter().enumerate();
        let addresses = hosts.flat_map(|(place, host)| host.addresses.iter().map(move |&address| (place, address)));
        let reached = addresses.filter(move |(_, address)| reaches(address));
        reached.filter_map(|(host, address)| Some((address, self.requirement(host)?)))
    }

    /// The policy that a session with one of the site's hosts counts for.
    pub fn tls_policy(&self, host: usize, recipient_domain: &str) -> TlsPolicyKey {
        let host = &self.site.hosts[host];
        let recipient_domain = Arc::from(recipient_domain);
        let (kind, domain) = match &host.dane {
            HostDane::Usable(policy) if self.dane => (PolicyKind::Tlsa, Arc::from(&*policy.base)),
            HostDane::Unusable | HostDane::Unknown(_) if self.dane => (PolicyKind::Tlsa, Arc::from(&*host.name)),
            _ if self.sts.is_some() => (PolicyKind::Sts, Arc::clone(&recipient_domain)),
            _ => (PolicyKind::None, Arc::clone(&recipient_domain)),
        };
        TlsPolicyKey { kind, domain, recipient_domain }
    }

    /// Why one of the site's hosts must not be used: nobody knows whether it has TLSA records.
    pub fn unknown_tlsa(&self) -> Option<Arc<str>> {
        self.site.hosts.iter().find_map(|host| match &host.dane {
            HostDane::Unknown(why) if self.dane => Some(format!("{} must not be used: {why}", host.name).into()),
            _ => None,
        })
    }

    /// Whether a connection to the site's host of this name, which has proved so much, may carry the mail.
    pub fn is_met_by(&self, host_name: &str, proof: &TlsProof) -> bool {
        let host = self.site.hosts.iter().position(|host| host.name == host_name);
        let requirement = host.and_then(|host| self.requirement(host));
        requirement.is_some_and(|requirement| requirement.is_met_by(proof))
    }
}

/// One entry on its way through a pair's owner: a ticket, with all that a transaction needs.
#[derive(Debug)]
pub struct Attempt {
    pub ticket: Ticket,
    pub pair: PairKey,
    /// Whose turn it takes.
    pub flow: Arc<Flow>,
    /// Its recipients'.
    pub domain: Arc<str>,
    pub route: Route,
    pub shaping: Arc<Shaping>,
    pub reverse_path: Arc<str>,
    pub recipients: Arc<[(u32, String)]>,
    pub message: postrider_spool::Message,
    /// The record of what becomes of it, with what that copies from the message.
    pub outcome: Box<Outcome>,
    pub eight_bit: bool,
    pub smtputf8: bool,
    pub dot_lines: bool,
    pub dsn: DsnParameters,
    /// An earlier attempt has counted.
    pub is_retry: bool,
    /// Its MAIL was written, and its recipients count.
    pub is_counted: bool,
    /// The owner has it where the flow is under limits over many pairs.
    pub permit: Option<Permit>,
    /// Of the configuration that it was routed by.
    pub generation: Generation,
}

/// How often another configuration was taken up since the start. Shards have it one after the other: what is of an
/// earlier one is not taken, and so comes anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub u64);

/// An owner wants to write MAIL for a home's flow, which is under limits over many pairs.
#[derive(Debug, Clone)]
pub struct Want {
    pub owner: usize,
    pub home: usize,
    pub pair: PairKey,
    pub flow: Arc<Flow>,
    pub limits: Arc<[LimitId]>,
    /// Recipients.
    pub units: u32,
    pub generation: Generation,
}

/// What the keeper of limits says to a [`Want`].
#[derive(Debug)]
pub struct WantAnswer {
    pub home: usize,
    pub pair: PairKey,
    pub flow: Arc<Flow>,
    /// The want's.
    pub generation: Generation,
    /// Another answer, that it waits, came before.
    pub waited: bool,
    /// `None`: it waits, and another answer will come.
    pub permit: Option<Permit>,
}

/// It may be written, for so many recipients. They count as written until the keeper hears how it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permit {
    pub limits: Arc<[LimitId]>,
    pub units: u32,
    /// When.
    pub given: Duration,
    /// Who asked for it, and the limit at which that took its turn, where it had to wait.
    pub asker: Arc<Flow>,
    pub turn: Option<LimitId>,
}

impl Permit {
    /// Keeps what it permits of these limits, and returns the rest.
    pub fn leave(&mut self, limits: Arc<[LimitId]>) -> Option<Self> {
        let others: Arc<[LimitId]> = self.limits.iter().copied().filter(|id| !limits.contains(id)).collect();
        let part = |limits: Arc<[LimitId]>| {
            let turn = self.turn.filter(|turn| limits.contains(turn));
            Self { limits, turn, ..self.clone() }
        };
        let (left, kept) = (part(others), part(limits));
        *self = kept;
        (!left.limits.is_empty()).then_some(left)
    }
}

impl Attempt {
    /// What it may need of its host; the client looks closer.
    pub fn needs(&self, need: Need) -> bool {
        match need {
            Need::EightBitMime => self.eight_bit,
            Need::SmtpUtf8 => self.smtputf8,
        }
    }
}

/// Names an entry that is out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket {
    pub home: usize,
    pub entry: EntryKey,
}

/// What a home has ready of a flow for a pair.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Entries.
    pub ready: usize,
    /// When the one that goes next was due, and its recipients; of no meaning where none is ready.
    pub oldest_due_ms: u64,
    pub next_recipients: u32,
}

/// What a ticket is sent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credit {
    /// Each home has a few for itself, so that fresh mail to an idle pair needs no extra hop.
    Standing,
    /// The owner has given it to the flow whose turn it was.
    Turn,
}

/// An attempt that was made, on its way home.
#[derive(Debug)]
pub struct Settled {
    pub attempt: Box<Attempt>,
    pub result: TransactionResult,
    pub context: Arc<DeliveryContext>,
}

/// A transaction's last octet waits until it is durable that, from then on, it is in doubt whether it was taken.
#[derive(Debug)]
pub struct Intend {
    pub key: IntentKey,
    pub ticket: Ticket,
    pub message: MessageId,
    /// Those that the peer has accepted.
    pub recipients: Vec<(u32, String)>,
    pub peer_name: String,
}

/// Who waits for an intent's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntentKey {
    pub owner: usize,
    pub connection: ConnectionKey,
    /// The owner counts its intents, so that a late answer is nobody else's.
    pub number: u64,
}

/// Where an attempt was made, for its record: the same for all of a connection.
#[derive(Debug, Clone, Default)]
pub struct DeliveryContext {
    pub peer_name: String,
    pub peer_address: String,
    pub source_address: String,
    pub tls_protocol: String,
    pub tls_cipher: String,
    /// What vouched for the peer: `pkix`, `dane`, or nothing.
    pub tls_verified_by: &'static str,
    /// The parts of the peer's certificate's subject name.
    pub tls_peer_subject: Vec<String>,
    pub session_id: u64,
}

/// What a message may need of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    EightBitMime,
    SmtpUtf8,
}

/// Where a message can go that a host of its site can't take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elsewhere {
    /// Another host of the site may take it.
    AtOnce,
    /// Those that may can't be tried now.
    Later,
    /// None of them can take it.
    Nowhere,
}

/// What a peer's answer counts as, where an automation rule says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountsAs {
    Transient,
    Permanent,
}

/// Why nothing goes, and when it is tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    pub until_ms: u64,
    pub reason: Arc<str>,
}

/// What comes to a shard from others and from the control thread.
#[derive(Debug)]
pub enum ShardMessage {
    /// Owner ← home: this much of the flow is ready for the pair, and `unused` of its credits come back.
    Ready { home: usize, pair: PairKey, flow: Arc<Flow>, generation: Generation, backlog: Backlog, unused: u32 },
    /// Owner ← home: a ticket; `left` is ready of the same flow behind it.
    Ticket { attempt: Box<Attempt>, left: Backlog, credit: Credit },
    /// Home ← owner: so many more tickets of the flow, or of any where none is named: then they are standing ones.
    Credits { pair: PairKey, flow: Option<Arc<Flow>>, credits: u32 },
    /// Home ← owner: the pair is blocked, all credits are void.
    Blocked { pair: PairKey, blocked: Blocked },
    /// Home ← owner: a rate holds the pair; its credits stay. Of its tickets, `waiting` are not begun.
    Paced { pair: PairKey, blocked: Blocked, waiting: Box<[Ticket]> },
    /// Keeper ← owner: a limit over many pairs is to let something pass; answered by `Permit`.
    Want(Box<Want>),
    /// Owner ← keeper.
    Permit(Box<WantAnswer>),
    /// Keeper ← owner: so much of a permit was used at that time, or not at all.
    Spent { permit: Permit, at: Option<Duration> },
    /// Keeper ← home: whether a tenant may inject so many recipients; answered by `MayInject`.
    AskInjection { home: usize, number: u64, tenant: Arc<str>, recipients: u32 },
    /// Home ← keeper.
    MayInject { number: u64, may: bool },
    /// Home ← keeper: what is under this limit waits.
    LimitHolds { limit: LimitId, blocked: Blocked },
    /// Owner or keeper ← runtime: units of a limit are durably reserved, as [`crate::shard::Action::Reserve`] asked.
    Reserved { limit: Arc<str>, units: u32 },
    /// Home ← owner: what an attempt is about to do is to be recorded first; answered by `Intended`.
    Intend(Box<Intend>),
    /// Owner ← home: the intent is durable.
    Intended(IntentKey),
    /// Home ← owner: an attempt was made.
    Settled(Box<Settled>),
    /// Home ← owner: no attempt was made. It `stays` at the source, where its turn had come.
    Unstarted { attempt: Box<Attempt>, stays: bool },
    /// Home ← owner: the same, because the owner knows of something that suspends it.
    Suspended { attempt: Box<Attempt> },
    /// Owner ← owner: something went wrong between messages at a site.
    Distrust { site: Arc<str>, leaves: Chunking },
    /// Home ← owner: no attempt was made, and none can be for mail to this domain: no host meets its TLS requirement.
    Held { attempt: Box<Attempt>, blocked: Blocked },
    /// Home ← control: where mail of this kind goes.
    Routed { key: RouteKey, result: Result<Route, RouteFailure> },
    /// Home ← control: the site of a domain that shaping has a table for.
    RuleSite { domain: Arc<str>, site: Arc<str> },
    /// Home ← control: a pair's owner.
    Owner { pair: PairKey, owner: usize },
    /// Owner ← control: what it has at a roll-up is to go to another shard; answered by [`ControlMessage::Released`].
    /// `pool/pair/moving.rs` has the steps of a move.
    Release { rollup: RollupKey },
    /// Home ← owner: all credits are void, and nothing more is sent to it for a while; answered by `Withdrawn`.
    Withdraw { rollup: RollupKey, owner: usize, number: u64 },
    /// Owner ← home.
    Withdrawn { home: usize, number: u64 },
    /// Keeper ← owner: what it wants at the roll-up and waits is not wanted any more; answered by `Unwanted`.
    Unwant { owner: usize, rollup: RollupKey, number: u64 },
    /// Owner ← keeper.
    Unwanted { rollup: RollupKey, number: u64 },
    /// Owner ← control: it has what another has let go; answered by [`ControlMessage::TookOver`].
    TakeOver(Box<OwnerState>),
    /// Home ← control, or owner where it stays what it is: who has the roll-up's pairs from now on.
    Moved { rollup: RollupKey, owner: usize },
    /// Owner ← control: how much it has carried lately is asked; answered by [`ControlMessage::Carried`].
    AskCarried,
    /// Any ← control: whether a source's address is on this machine.
    SourcePlumbed { source: usize, plumbed: bool },
    /// Any ← control: whether the spool's directory is no longer where it was. What is there is delivered.
    SpoolGone { gone: bool },
    /// Any ← control: a suspension is in force, or goes on to another end.
    Suspend(Box<Suspension>),
    /// Any ← control: a suspension has ended before its time.
    Resume { id: u128 },
    /// Any ← owner: the mail of a tenant's campaign to a domain is to end, by an automation rule.
    BounceQueue { flow: Arc<Flow>, domain: Arc<str>, reason: Arc<str> },
    /// Home ← control: events up to here are on disk.
    EventCursor { log: postrider_spool::record::LogId, sequence: postrider_spool::record::Sequence },
    /// Any ← embedding API: a message to accept; answered by [`crate::shard::Action::Injected`].
    Inject { injection: u64, admitted: Box<Admitted> },
    /// Any ← control: another configuration; answered by [`ControlMessage::Reloaded`]. The shard that keeps the limits
    /// is sent it first.
    Reload(Arc<Reload>),
    /// Any ← control: a question; answered by [`ControlMessage::Answer`].
    Ask { question: u64, ask: Box<Ask> },
    /// Any ← control: finish what is on the wire, take nothing new.
    Stop,
}

/// A question about a home's mail, or what an operator wants done with it.
#[derive(Debug, Clone)]
pub enum Ask {
    Queues {
        limit: usize,
    },
    TlsReport,
    Messages {
        filter: MessageFilter,
    },
    Inspect {
        id: MessageId,
        want_body: bool,
    },
    /// Mail is to end by the operator's word; answered before it has.
    Bounce {
        choice: MailChoice,
        reason: Arc<str>,
    },
    /// What is held as in doubt is to be tried again.
    Release {
        choice: MailChoice,
        reason: Arc<str>,
    },
}

#[derive(Debug)]
pub enum Told {
    /// Recipients and messages that are not finished, and what is said of each queue.
    Queues {
        total: u64,
        messages: u64,
        rows: Vec<QueueRow>,
    },
    TlsReport(Vec<TlsReportRow>),
    Messages(Vec<MessageRow>),
    /// Rows are missing: so many messages more would have to be read from the disk than there was time for.
    MessagesUnread(usize),
    Inspected(Option<Box<Inspected>>),
    Chosen(Chosen),
}

/// What a shard tells the control thread.
#[derive(Debug)]
pub enum ControlMessage {
    FindRoute {
        shard: usize,
        key: RouteKey,
    },
    FindOwner {
        shard: usize,
        pair: PairKey,
    },
    /// The source's address could not be bound.
    Unplumbed {
        source: usize,
    },
    Answer {
        question: u64,
        told: Told,
    },
    /// A suspension is in force at this shard; all others are to know, and a restart is.
    Suspend(Box<Suspension>),
    /// The shard has let go what it had at a roll-up; or not, because that would have taken too long.
    Released {
        shard: usize,
        rollup: RollupKey,
        state: Option<Box<OwnerState>>,
    },
    TookOver {
        shard: usize,
        rollup: RollupKey,
    },
    /// Transactions lately, by source and roll-up; those with the most.
    Carried {
        shard: usize,
        carried: Vec<(RollupKey, f64)>,
    },
    /// The shard has taken up one more of the configurations that it was sent.
    Reloaded {
        shard: usize,
    },
    /// The shard has stopped: nothing is out, nothing waits for a commit.
    Stopped {
        shard: usize,
    },
}

/// The reply that a message's sender gets.
pub type AcceptAnswer = Result<MessageId, Refusal>;

/// Where a connection may be made to, in the order of trial.
pub type AttemptOrder = Vec<(usize, Endpoint)>;
