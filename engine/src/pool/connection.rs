//! The connection slots of a shard.
//!
//! | state | leaves by |
//! |---|---|
//! | `Opening` | the session is up → `Idle`; it fails → `Closing` |
//! | `Idle` | a transaction → `Busy`; idle too long, used up, or the peer ends it → `Closing` |
//! | `Busy` | the transaction is over → `Idle`; the connection is lost → `Closing` |
//! | `Closing` | the peer's FIN is seen: the slot is free. Until then the connection counts. |

use std::sync::Arc;
use std::time::Duration;

use crate::config::Terms;
use crate::handover::{TlsProof, TlsRequirement};
use crate::mail::endpoint::Endpoint;

/// A connection's place in its shard; reused after the connection is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionKey(pub u32);

#[derive(Debug)]
pub struct Slot {
    /// The pair's place at its owner.
    pub pair: u32,
    pub host_name: String,
    pub address: Endpoint,
    /// The site whose host it is: a transaction rides only with its own site's hosts.
    pub site: Arc<str>,
    /// What it was opened for.
    pub tls: TlsRequirement,
    pub proof: TlsProof,
    /// It serves routes with these terms only.
    pub terms: Arc<Terms>,
    pub deliveries: u32,
    /// The most that its peer takes (RFC 9422 MAILMAX).
    pub deliveries_max: u32,
    /// Its source is not what it was when it was opened: it takes nothing more.
    pub is_retired: bool,
    state: SlotState,
}

impl Slot {
    fn begin_delivery(&mut self) {
        self.deliveries += 1;
        assert!(self.deliveries <= self.deliveries_max, "LIMITS-HOLD: a peer gets no more than it takes in a session");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    Opening,
    Idle { since: Duration },
    Busy,
    Closing,
}

/// All connection slots of a shard.
#[derive(Debug, Default)]
pub struct Slots {
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    len: usize,
    closing: usize,
}

impl Slots {
    pub fn open(
        &mut self,
        pair: u32,
        host_name: String,
        address: Endpoint,
        site: Arc<str>,
        tls: TlsRequirement,
        terms: Arc<Terms>,
    ) -> ConnectionKey {
        let proof = tls.proof_in_clear();
        let (deliveries, deliveries_max, is_retired, state) = (0, u32::MAX, false, SlotState::Opening);
        let slot =
            Slot { pair, host_name, address, site, tls, proof, terms, deliveries, deliveries_max, is_retired, state };
        self.len += 1;
        if let Some(place) = self.free.pop() {
            self.slots[place as usize] = Some(slot);
            return ConnectionKey(place);
        }
        self.slots.push(Some(slot));
        ConnectionKey(self.slots.len() as u32 - 1)
    }

    pub fn get(&self, key: ConnectionKey) -> &Slot {
        self.slots[key.0 as usize].as_ref().expect("the connection has a slot")
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Those whose place will soon be free.
    pub fn closing(&self) -> usize {
        self.closing
    }

    pub fn state(&self, key: ConnectionKey) -> SlotState {
        self.get(key).state
    }

    /// Moves a connection on; a move that the table at the top doesn't have is a bug.
    pub fn set_state(&mut self, key: ConnectionKey, next: SlotState) {
        let slot = self.slots[key.0 as usize].as_mut().expect("the connection has a slot");
        let legal = matches!(
            (slot.state, next),
            (SlotState::Opening | SlotState::Busy, SlotState::Idle { .. } | SlotState::Closing)
                | (SlotState::Idle { .. }, SlotState::Busy | SlotState::Closing)
        );
        assert!(legal, "{:?} → {next:?}", slot.state);
        match next {
            SlotState::Busy => slot.begin_delivery(),
            SlotState::Closing => self.closing += 1,
            SlotState::Opening | SlotState::Idle { .. } => {}
        }
        slot.state = next;
    }

    /// Idle connections, those first that are so longest.
    pub fn longest_idle(&self, count: usize) -> Vec<ConnectionKey> {
        if count == 0 {
            return Vec::new();
        }
        let idle = |(place, slot): (usize, &Option<Slot>)| match slot.as_ref()?.state {
            SlotState::Idle { since } => Some((since, ConnectionKey(place as u32))),
            SlotState::Opening | SlotState::Busy | SlotState::Closing => None,
        };
        let mut idle: Vec<_> = self.slots.iter().enumerate().filter_map(idle).collect();
        idle.sort_unstable();
        idle.into_iter().take(count).map(|(_, key)| key).collect()
    }

    /// The handshake that the connection was opened for has succeeded.
    pub fn set_encrypted(&mut self, key: ConnectionKey) {
        let slot = self.slots[key.0 as usize].as_mut().expect("the connection has a slot");
        slot.proof = slot.tls.proof_of_handshake();
    }

    /// The peer takes so many deliveries on this connection.
    pub fn bound_deliveries(&mut self, key: ConnectionKey, max: u32) {
        self.slots[key.0 as usize].as_mut().expect("the connection has a slot").deliveries_max = max;
    }

    /// The connection takes nothing more.
    pub fn retire(&mut self, key: ConnectionKey) {
        self.slots[key.0 as usize].as_mut().expect("the connection has a slot").is_retired = true;
    }

    /// A transaction rides behind the present one.
    pub fn count_delivery(&mut self, key: ConnectionKey) {
        let slot = self.slots[key.0 as usize].as_mut().expect("the connection has a slot");
        assert_eq!(slot.state, SlotState::Busy, "a transaction rides behind another");
        slot.begin_delivery();
    }

    pub fn free(&mut self, key: ConnectionKey) -> Slot {
        let slot = self.slots[key.0 as usize].take().expect("the connection has a slot");
        assert_eq!(slot.state, SlotState::Closing, "a connection counts until it is closed");
        self.free.push(key.0);
        self.len -= 1;
        self.closing -= 1;
        slot
    }
}
