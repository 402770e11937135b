//! Bugs that are planted into the world, never into the engine: a checker that sees none of them is blind.

use std::sync::Arc;

use postrider::config::{Config, ShapingRules};

/// What goes wrong although it must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Canary {
    /// The disk says that a write is durable before it is.
    EarlySync,
    /// The network takes RSET out of what is sent.
    NoReset,
    /// The record of an outcome never reaches the event log.
    DroppedOutcome,
    /// A message between shards is lost.
    DroppedMail,
    /// A connection is reported gone before the peer's FIN.
    EarlyFin,
    /// A schedule is told with another due time.
    ChangedDue,
    /// A transaction reaches its peer twice.
    StartedTwice,
    /// A connection leaves by another source.
    OtherSource,
    /// The engine is given a higher limit than the operator wants.
    HigherLimit,
    /// The engine is given twice the rates that the operator wants.
    HigherRate,
    /// A tenant's mail comes under another's name, and so takes the other's turns.
    SharedFlow,
    /// Nobody tells a shard that the event log is behind.
    EndlessEvents,
    /// Who takes over pairs from another shard begins with nothing counted.
    ForgottenLimits,
    /// An engine that ends tells nothing of what its limits have counted, and that all is over.
    ForgottenUse,
    /// A reload names limits anew, and so nothing is known of what they have counted.
    RenamedLimits,
    /// A home hears nothing of moves, and goes on with the owner that it knows.
    UntoldHome,
    /// A shard hears nothing of what others have suspended.
    UnheardSuspension,
    /// Every handshake is told as a success, whatever certificate there was.
    TrustingHandshake,
    /// A reload brings nothing of what is asked of TLS.
    OldPolicies,
    /// A crash loses one of the spool's segments.
    LostSegment,
    /// The DNS's preferences reach the engine the other way round.
    ReversedPreference,
    /// The engine is given twice the time for which mail is kept.
    LongerLife,
    /// The engine is given none of the rules about answers.
    DeafRules,
    /// A reload brings none of the limits of connections and transactions.
    OldShaping,
    /// The engine is given pools in which all sources have one share.
    EqualSources,
    /// The engine is given nothing of what a provider's sites have in common.
    UnrolledProvider,
    /// Shards are told that a source is suspended, which nobody has suspended.
    MadeUpSuspension,
    /// From the second in a row on, a host that refuses connections is told as one for which no port is left.
    HiddenFailures,
}

impl Canary {
    /// What the engine reads in place of what the operator has written.
    pub(crate) fn misread(self, config: &mut Config) {
        match self {
            Self::LongerLife => config.retry.max_age *= 2,
            Self::DeafRules => config.shaping.automation = Arc::default(),
            Self::EqualSources => {
                let sources = config.egress_pools.iter_mut().flat_map(|pool| &mut pool.sources);
                sources.for_each(|(_, share)| *share = 1);
            }
            Self::UnrolledProvider => config.shaping_rules = ShapingRules::default(),
            _ => {}
        }
    }
}
