//! When mail goes: not before its time, and not after its end.

use crate::checker::{Marker, domain_of};
use crate::clock::{MINUTE, MS, Micros};
use crate::world::World;

impl World {
    /// EXACT-RETRY-STATE: RCPT is written for a recipient whose turn has come, and that is not over.
    pub(crate) fn check_time(&self, marker: Marker, recipient: &str) {
        let ledger = &self.ledger;
        // What left before its commit is complained of elsewhere.
        let Some(id) = ledger.ids.get(&marker) else { return };
        let sent = ledger.sent(marker);
        let Some(index) = sent.recipients.iter().position(|known| known == recipient) else { return };
        let durable = &ledger.durable[id];
        let state = durable.recipients[index];
        let now_ms = self.clock.now().wall_ms;
        let is_released = ledger.released.contains_key(&(*id, recipient.to_owned()));
        let is_early = now_ms + ledger.back_ms < state.due_ms && !is_released;
        assert!(
            !is_early,
            "EXACT-RETRY-STATE: {marker} to {recipient} is tried at {now_ms}, and due at {}",
            state.due_ms
        );
        let over_ms = durable.expires_ms + UNDER_WAY_MAX / MS + ledger.forward_ms;
        assert!(
            now_ms < over_ms,
            "EXACT-RETRY-STATE: {marker} to {recipient} is tried at {now_ms}, and was over at {}, at {}",
            durable.expires_ms,
            domain_of(recipient)
        );
    }
}

/// Until the MAIL of what was begun is written: a peer may take its time with what stands before it.
const UNDER_WAY_MAX: Micros = 20 * MINUTE;
