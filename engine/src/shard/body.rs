//! Shared bodies at a shard: which of its log's bodies hold what the embedding API's campaigns share.
//!
//! A body is appended with the first message that shares it, so a campaign without messages leaves nothing behind. It
//! is held for as long as somebody outside could send another message, that is while the [`SharedContent`] lives: its
//! handle, and each message on its way here, own it. After that the messages themselves keep it in the spool.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use postrider_spool::record::MessageId;
use postrider_spool::{AppendError, BodyId, CommitNumber, Envelope, Log};

use super::Shard;
use crate::accept::SharedContent;

/// The bodies that the log which takes mail holds for campaigns, by [`SharedContent::id`]. There are as many as the
/// embedding program has handles, which the engine bounds.
#[derive(Debug, Default)]
pub(super) struct HeldBodies {
    held: BTreeMap<u64, HeldBody>,
}

#[derive(Debug)]
struct HeldBody {
    body: BodyId,
    content: Weak<SharedContent>,
}

impl HeldBodies {
    pub(super) fn append_message(
        &mut self,
        log: &mut Log,
        envelope: &Envelope,
        prefix: &[u8],
        content: &Arc<SharedContent>,
    ) -> Result<(MessageId, CommitNumber), AppendError> {
        if let Some(held) = self.held.get(&content.id()) {
            match log.append_message_sharing(envelope, prefix, held.body) {
                // It went with a commit that failed.
                Err(AppendError::UnknownBody) => {}
                appended => return appended,
            }
        }
        let (body, _) = log.append_body(content.octets())?;
        self.held.insert(content.id(), HeldBody { body, content: Arc::downgrade(content) });
        log.append_message_sharing(envelope, prefix, body)
    }
}

impl Shard {
    /// Nobody holds content any more that nobody outside can send with.
    pub(super) fn release_bodies(&mut self) {
        let Some(active) = self.logs.first_mut() else { return };
        self.bodies.held.retain(|_, held| {
            let is_wanted = held.content.strong_count() > 0;
            if !is_wanted {
                active.log.release_body(held.body);
            }
            is_wanted
        });
    }
}
