//! Which of a message's recipients an entry has, in four bytes.
//!
//! Nearly every entry has one recipient, or some of a message's first few. Only what is neither costs a list of its
//! own.
//!
//! ```text
//! 31 30                                                          0
//!  0 |  a bit for each of the recipients 0 to 30                    at least one is set
//!  1  0 |  the index of the only recipient
//!  1  1 |  the number of a list
//! ```

/// An entry's recipients, packed; what a list's number means is known to its [`RecipientLists`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecipientSet(u32);

/// The lists of the entries that need one.
#[derive(Debug, Default)]
pub(super) struct RecipientLists {
    /// An empty list's number is vacant.
    lists: Vec<Box<[u32]>>,
    vacant: Vec<u32>,
}

/// Indices into an envelope's recipients, ascending.
#[derive(Debug, Clone)]
pub struct Recipients<'a>(Remaining<'a>);

#[derive(Debug, Clone)]
enum Remaining<'a> {
    Mask(u32),
    One(Option<u32>),
    List(std::slice::Iter<'a, u32>),
}

impl RecipientLists {
    pub(super) fn pack(&mut self, recipients: &[u32]) -> RecipientSet {
        assert!(!recipients.is_empty(), "an entry without recipients is removed");
        if recipients.iter().all(|&index| index < MASK_BITS) {
            return RecipientSet(recipients.iter().fold(0, |mask, index| mask | 1 << index));
        }
        match *recipients {
            [index] if index <= NUMBER_MAX => RecipientSet(NOT_MASK | index),
            _ => RecipientSet(NOT_MASK | IS_LIST | self.list(recipients)),
        }
    }

    /// The set is about to be forgotten.
    pub(super) fn release(&mut self, set: RecipientSet) {
        if let Some(number) = set.list_number() {
            self.lists[number as usize] = Box::default();
            self.vacant.push(number);
        }
    }

    pub(super) fn recipients(&self, set: RecipientSet) -> Recipients<'_> {
        Recipients(match set.list_number() {
            Some(number) => Remaining::List(self.lists[number as usize].iter()),
            None if set.0 & NOT_MASK != 0 => Remaining::One(Some(set.0 & NUMBER_MAX)),
            None => Remaining::Mask(set.0),
        })
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        let lists: usize = self.lists.iter().map(|list| size_of_val(&**list)).sum();
        lists + self.lists.capacity() * size_of::<Box<[u32]>>() + self.vacant.capacity() * size_of::<u32>()
    }

    fn list(&mut self, recipients: &[u32]) -> u32 {
        let mut list = recipients.to_vec();
        list.sort_unstable();
        list.dedup();
        if let Some(number) = self.vacant.pop() {
            self.lists[number as usize] = list.into();
            return number;
        }
        let number = self.lists.len() as u32;
        assert!(number <= NUMBER_MAX, "there are fewer lists than entries");
        self.lists.push(list.into());
        number
    }
}

impl RecipientSet {
    fn list_number(self) -> Option<u32> {
        (self.0 & (NOT_MASK | IS_LIST) == NOT_MASK | IS_LIST).then_some(self.0 & NUMBER_MAX)
    }
}

impl Iterator for Recipients<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        match &mut self.0 {
            Remaining::Mask(0) => None,
            Remaining::Mask(mask) => {
                let index = mask.trailing_zeros();
                *mask &= *mask - 1;
                Some(index)
            }
            Remaining::One(index) => index.take(),
            Remaining::List(list) => list.next().copied(),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = match &self.0 {
            Remaining::Mask(mask) => mask.count_ones() as usize,
            Remaining::One(index) => usize::from(index.is_some()),
            Remaining::List(list) => list.len(),
        };
        (left, Some(left))
    }
}

impl ExactSizeIterator for Recipients<'_> {}

/// Recipients that have a bit.
const MASK_BITS: u32 = 31;
const NOT_MASK: u32 = 1 << 31;
const IS_LIST: u32 = 1 << 30;
const NUMBER_MAX: u32 = IS_LIST - 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_comes_out_as_it_went_in() {
        let sets: [&[u32]; 8] =
            [&[0], &[30], &[0, 1, 2, 30], &[31], &[999], &[NUMBER_MAX], &[u32::MAX], &[3, 30, 31, 70, 999]];
        let mut lists = RecipientLists::default();
        let packed = sets.map(|recipients| lists.pack(recipients));
        for (recipients, set) in sets.into_iter().zip(packed) {
            let unpacked = lists.recipients(set);
            assert_eq!(unpacked.len(), recipients.len());
            assert_eq!(unpacked.collect::<Vec<_>>(), recipients);
        }
        assert_eq!(lists.lists.len(), 2, "only what fits nowhere else has a list");
    }

    #[test]
    fn a_list_is_given_to_another_after_its_entry() {
        let mut lists = RecipientLists::default();
        let first = lists.pack(&[70, 40]);
        assert_eq!(lists.recipients(first).collect::<Vec<_>>(), [40, 70]);
        lists.release(first);
        assert_eq!(lists.pack(&[50, 60]), first);
        assert_eq!(lists.recipients(first).collect::<Vec<_>>(), [50, 60]);
    }
}
