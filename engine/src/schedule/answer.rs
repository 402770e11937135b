//! Peers' last answers, each kept once however many entries it was given to.
//!
//! Most of a backlog has heard one of a few answers, but an answer may also name the message and so be unlike every
//! other. Number and octets are bounded; an entry whose answer finds no room shows its queue's last one instead.

use std::sync::Arc;

use ahash::HashMap;

use crate::limits::{ANSWERS_KEPT, ANSWERS_KEPT_OCTETS};

/// An entry's last answer: none, one that is kept, or its queue's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AnswerId(u32);

#[derive(Debug, Default)]
pub(super) struct Answers {
    kept: Vec<Kept>,
    vacant: Vec<u32>,
    places: HashMap<Arc<str>, u32>,
    octets: usize,
    serial: u64,
}

#[derive(Debug, Default)]
struct Kept {
    /// None: the place is vacant.
    text: Option<Arc<str>>,
    uses: u32,
    serial: u64,
}

/// Tells an answer, a queue or its last answer from all others that there ever were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) place: u32,
    /// From 1; never used again.
    pub(super) serial: u64,
}

impl Answers {
    /// Finds or makes room for an answer, and counts one use of it.
    pub(super) fn keep(&mut self, text: &str) -> AnswerId {
        if let Some(&place) = self.places.get(text) {
            return self.share(AnswerId::at(place));
        }
        if self.places.len() >= ANSWERS_KEPT || self.octets + text.len() > ANSWERS_KEPT_OCTETS {
            return AnswerId::OF_QUEUE;
        }
        self.serial += 1;
        let text = Arc::<str>::from(text);
        let kept = Kept { text: Some(Arc::clone(&text)), uses: 1, serial: self.serial };
        let place = match self.vacant.pop() {
            Some(place) => {
                self.kept[place as usize] = kept;
                place
            }
            None => {
                self.kept.push(kept);
                self.kept.len() as u32 - 1
            }
        };
        self.octets += text.len();
        self.places.insert(text, place);
        AnswerId::at(place)
    }

    /// Counts one more use.
    pub(super) fn share(&mut self, id: AnswerId) -> AnswerId {
        if let Some(place) = id.place() {
            self.kept[place as usize].uses += 1;
        }
        id
    }

    /// One use less; the last one forgets the answer.
    pub(super) fn release(&mut self, id: AnswerId) {
        let Some(place) = id.place() else { return };
        let kept = &mut self.kept[place as usize];
        kept.uses -= 1;
        if kept.uses == 0
            && let Some(text) = kept.text.take()
        {
            self.octets -= text.len();
            self.places.remove(&text);
            self.vacant.push(place);
        }
    }

    /// None where the entry has no answer of its own.
    pub(super) fn text(&self, id: AnswerId) -> Option<&Arc<str>> {
        self.kept[id.place()? as usize].text.as_ref()
    }

    pub(super) fn identity(&self, id: AnswerId) -> Option<Identity> {
        let place = id.place()?;
        Some(Identity { place, serial: self.kept[place as usize].serial })
    }

    /// One more use of the answer that was found to have this identity, unless it has been forgotten since.
    pub(super) fn share_identified(&mut self, identity: Identity) -> Option<AnswerId> {
        let kept = self.kept.get(identity.place as usize)?;
        let same = kept.text.is_some() && kept.serial == identity.serial;
        same.then(|| self.share(AnswerId::at(identity.place)))
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        let place = size_of::<(Arc<str>, u32)>();
        self.octets
            + self.kept.capacity() * size_of::<Kept>()
            + self.vacant.capacity() * size_of::<u32>()
            + self.places.capacity() * place
    }
}

impl AnswerId {
    pub(super) const NONE: Self = Self(0);
    pub(super) const OF_QUEUE: Self = Self(1);

    pub(super) fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// At most [`Self::NUMBER_MAX`].
    pub(super) fn number(self) -> u32 {
        self.0
    }

    pub(super) const NUMBER_MAX: usize = ANSWERS_KEPT + 1;

    fn at(place: u32) -> Self {
        Self(place + 2)
    }

    fn place(self) -> Option<u32> {
        self.0.checked_sub(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_kept_once_and_as_long_as_it_is_used() {
        let mut answers = Answers::default();
        let first = answers.keep("451 later");
        assert_eq!(answers.keep("451 later"), first);
        let other = answers.keep("452 full");
        answers.release(first);
        assert_eq!(answers.text(first).map(|text| &**text), Some("451 later"));
        let identity = answers.identity(first).expect("it is kept");
        answers.release(first);
        assert_eq!(answers.text(first), None);
        assert_eq!(answers.keep("450 busy"), first, "the place is reused");
        assert_eq!(answers.share_identified(identity), None, "by another answer");
        assert_eq!(answers.text(other).map(|text| &**text), Some("452 full"));
    }

    #[test]
    fn what_finds_no_room_is_left_to_the_queue() {
        let mut answers = Answers::default();
        for number in 0..ANSWERS_KEPT {
            assert_ne!(answers.keep(&number.to_string()), AnswerId::OF_QUEUE);
        }
        assert_eq!(answers.keep("one more"), AnswerId::OF_QUEUE);
        let known = answers.keep("7");
        answers.release(known);
        answers.release(known);
        assert_ne!(answers.keep("one more"), AnswerId::OF_QUEUE);
        assert_eq!(answers.kept.len(), ANSWERS_KEPT);
        let long = "x".repeat(ANSWERS_KEPT_OCTETS);
        assert_eq!(Answers::default().keep(&long).number(), 2);
        assert_eq!(answers.keep(&long), AnswerId::OF_QUEUE);
    }
}
