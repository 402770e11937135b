//! Content that a campaign's messages share: looked at, and its body hashed, once.
//!
//! On the wire a message is what we put in front, then the header fields of its own, then the shared content: header
//! fields, an empty line, a body. So a shared header that has no end, or fields of a message's own that had one, would
//! make something else of what follows. Both are refused, where [`Policy::admit`] takes content as it comes.

use std::fmt;
use std::sync::Arc;

use super::{Admitted, Policy, Received, Refusal, Scan, has_dot_lines, remove_ranges};
use crate::accept::dkim_sign::BodyHash;
use crate::limits::CAPTURED_FIELDS_MAX;
use crate::mail::header::{self, Line};
use crate::mail::time::Now;

/// Content that messages share.
pub struct SharedContent {
    id: u64,
    octets: Vec<u8>,
    /// Of `octets`, but that the ranges that it tells have been taken out.
    scan: Scan,
    header_end: usize,
    pub(super) body_hash: BodyHash,
    pub(super) eight_bit: bool,
    pub(super) dot_lines: bool,
}

impl SharedContent {
    /// Tells it from all others of the engine.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// As they are sent behind the header fields of a message's own.
    pub fn octets(&self) -> &[u8] {
        &self.octets
    }

    pub(super) fn header(&self) -> &[u8] {
        &self.octets[..self.header_end]
    }
}

impl fmt::Debug for SharedContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedContent {}: {} octets", self.id, self.octets.len())
    }
}

impl Policy {
    /// Looks at content that messages are to share: with CRLF line endings, and header fields, or an empty line where
    /// there is none, at its begin. `id` must be no other content's.
    pub fn share(&self, id: u64, mut octets: Vec<u8>) -> Result<SharedContent, Refusal> {
        if !header::lines(&octets).all(|line| matches!(line, Line::Field(_))) {
            let text = "the shared content begins neither with header fields nor with an empty line";
            return Err(Refusal::new(554, (5, 6, 0), text));
        }
        let scan = Scan::of(&octets, &self.captured);
        let removed: usize = scan.removed.iter().map(std::ops::Range::len).sum();
        remove_ranges(&mut octets, &scan.removed);
        let (header_end, body_start) = (scan.header_end - removed, scan.body_start - removed);
        Ok(SharedContent {
            id,
            scan,
            header_end,
            body_hash: BodyHash::of(&octets[body_start..]),
            eight_bit: !octets.is_ascii(),
            dot_lines: has_dot_lines(&octets),
            octets,
        })
    }

    /// Like [`Policy::admit`], for a message whose `content` is the header fields of its own, and nothing else.
    pub fn admit_sharing(
        &self,
        now: Now,
        received: Received,
        shared: &Arc<SharedContent>,
        random: [u64; 2],
    ) -> Result<Admitted, Refusal> {
        let mut end = 0;
        let are_fields = header::lines(&received.content).all(|line| match line {
            Line::Field(field) => {
                end = field.end;
                true
            }
            Line::Junk { .. } => false,
        });
        if !are_fields || end != received.content.len() {
            let text = "what a message has of its own beside shared content has to be header fields only";
            return Err(Refusal::new(554, (5, 6, 0), text));
        }
        let mut scan = Scan::of(&received.content, &self.captured);
        scan.go_on_with(&shared.scan);
        self.admit_scanned(now, received, scan, Some(shared), random)
    }
}

impl Scan {
    /// The shared fields stand below these ones. What is told of places stays.
    fn go_on_with(&mut self, below: &Self) {
        self.has_date |= below.has_date;
        self.has_message_id |= below.has_message_id;
        self.received_fields += below.received_fields;
        self.from.go_on_with(&below.from);
        let room = CAPTURED_FIELDS_MAX.saturating_sub(self.captured.len());
        self.captured.extend(below.captured.iter().take(room).cloned());
        if self.from_domain.is_none() {
            self.from_domain.clone_from(&below.from_domain);
        }
        below.contradictory.into_iter().for_each(|name| self.note_contradiction(name));
        let steering = [
            ("X-Tenant", &mut self.tenant, &below.tenant),
            ("X-Campaign", &mut self.campaign, &below.campaign),
            ("X-Job", &mut self.job, &below.job),
            ("X-Virtual-MTA", &mut self.virtual_mta, &below.virtual_mta),
            ("X-Schedule", &mut self.schedule, &below.schedule),
        ];
        let mut contradictory = Vec::new();
        for (name, own, below) in steering {
            match (&own, below) {
                (None, _) => own.clone_from(below),
                (Some(own), Some(below)) if own != below => contradictory.push(name),
                _ => {}
            }
        }
        contradictory.into_iter().for_each(|name| self.note_contradiction(name));
        self.all_body = false;
    }
}

#[cfg(test)]
mod tests;
