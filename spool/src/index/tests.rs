//! Against maps, for all that the index is asked.

use std::collections::BTreeMap;
use std::collections::btree_map;

use super::{Entry, Index, NOWHERE, Pending, Place, Row, Settles};

fn place(number: u32) -> Place {
    Place { slot: 1, offset16: number, length16: 1 }
}

fn finally(index: u32) -> impl Iterator<Item = (u32, Settles)> {
    [(index, Settles::Finally)].into_iter()
}

/// Random insertions, removals and restorations, against a map.
#[test]
fn behaves_like_a_map() {
    let mut index = Index::default();
    let mut model = BTreeMap::new();
    let mut random = 12345_u64;
    let mut draw = |bound: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % bound
    };
    let mut next = 1_u64;
    for step in 0..60_000_u32 {
        match draw(10) {
            0..5 => {
                index.insert(next, place(step), 1, &[]);
                model.insert(next, step);
                next += 1 + draw(3);
            }
            5 => {
                let sequence = draw(next);
                if let btree_map::Entry::Vacant(vacant) = model.entry(sequence) {
                    index.insert(sequence, place(step), 2, &[1]);
                    vacant.insert(step);
                }
            }
            6..9 => {
                let sequence = draw(next);
                let gone = index.settle(sequence, place(0), finally(0));
                assert_eq!(gone.map(|(before, gone)| (before.entry.record().offset16, gone)), {
                    model.remove(&sequence).map(|offset| (offset, true))
                });
            }
            _ => {
                let sequence = draw(next);
                if let Some((before, _)) = index.settle(sequence, place(0), finally(0)) {
                    assert!(index.restore(before).is_none());
                }
            }
        }
    }
    assert_eq!(index.len(), model.len());
    assert!(index.iter().map(|entry| (entry.sequence(), entry.record().offset16)).eq(model.clone()));
    for first in [0, 100, 3_000, next] {
        let range = index.iter_from(first).map(Entry::sequence);
        assert!(range.eq(model.range(first..).map(|(sequence, _)| *sequence)), "from {first}");
    }
    let allocated: usize = index.chunks.iter().map(|chunk| chunk.entries.capacity() * size_of::<Entry>()).sum();
    assert!(allocated <= 4 * size_of::<Entry>() * index.len(), "{allocated} bytes for {} entries", index.len());
}

/// All else that is known of the message stays: who is pending, its content's place, its body, the owner's handle.
#[test]
fn some_of_the_outcomes_can_be_forgotten() {
    for pending in [Pending::Few(6), Pending::Many([6, 1].into())] {
        let nowhere = Place { slot: NOWHERE, ..place(9) };
        let row = |outcome, older: &[Place]| Row {
            sequence: 5,
            record: place(1),
            outcome,
            older: older.to_vec(),
            pending: pending.clone(),
            body: Some(2),
            is_held: true,
        };
        let cases = [
            (row(Some(place(4)), &[nowhere, place(2), nowhere, place(3)]), row(Some(place(4)), &[place(2), place(3)])),
            (row(Some(nowhere), &[place(2), place(3)]), row(Some(place(3)), &[place(2)])),
            (row(Some(nowhere), &[nowhere]), row(None, &[])),
        ];
        for (before, after) in cases {
            let mut index = Index::default();
            for sequence in [1, 9] {
                index.insert(sequence, place(8), 1, &[]);
            }
            assert!(index.insert_row(before));
            index.set_handle(5, 77);
            let entry = *index.get(5).unwrap();
            index.retain_states(&entry, |state| state.slot != NOWHERE);
            let entry = *index.get(5).unwrap();
            assert_eq!((index.row(&entry), entry.handle), (after, 77));
            assert!(index.get(1).is_some() && index.get(9).is_some());
        }
    }
}

/// Guesses go wrong where sequences lie unevenly; what is found does not.
#[test]
fn finds_what_is_there_however_it_lies() {
    let even: Vec<u64> = (0..3_000).map(|number| 100 + number * 20).collect();
    let close: Vec<u64> = (0..3_000).map(|number| 7 + number).collect();
    let squares: Vec<u64> = (0..3_000).map(|number| number * number * 5).collect();
    let late: Vec<u64> = (0..3_000).map(|number| (1 << 40) - (3_000 - number) * (3_000 - number)).collect();
    let far: Vec<u64> = (0..3_000_u64).map(|number| (number / 200) << 40 | number).collect();
    for sequences in [even, close, squares, late, far] {
        let mut index = Index::default();
        for sequence in &sequences {
            index.insert(*sequence, place(1), 1, &[]);
        }
        // Backwards, so that nothing is near what was found last.
        for (number, sequence) in sequences.iter().enumerate().rev() {
            assert_eq!(index.get(*sequence).map(Entry::sequence), Some(*sequence));
            let next = sequences.get(number + 1).copied();
            assert_eq!(index.get(sequence + 1).map(Entry::sequence), next.filter(|next| *next == sequence + 1));
        }
    }
}

#[test]
fn counts_each_recipient_once() {
    for recipients in [1, 2, 31, 32, 33, 64, 65, 1000] {
        let mut index = Index::default();
        assert!(index.insert(7, place(1), recipients, &[]));
        for recipient in 0..recipients {
            let settled = [recipient, recipient, 5000].map(|recipient| (recipient, Settles::Finally));
            let (_, gone) = index.settle(7, place(2), settled.into_iter()).unwrap();
            assert_eq!(gone, recipient + 1 == recipients);
            if !gone {
                let left = index.pending(index.get(7).unwrap());
                assert_eq!(left, (recipient + 1..recipients).collect::<Vec<_>>());
            }
        }
        assert!(index.wide.is_empty());
        assert!(!index.insert(8, place(1), recipients, &(0..recipients).collect::<Vec<_>>()));
    }
}

#[test]
fn a_change_can_be_taken_back() {
    let mut index = Index::default();
    index.insert(7, place(1), 40, &[3]);
    let all = (0..40).map(|index| (index, Settles::Finally));
    let (before, gone) = index.settle(7, place(2), all).unwrap();
    assert!(gone);
    assert_eq!(index.len(), 0);
    index.restore(before);
    let entry = *index.get(7).unwrap();
    assert_eq!(index.pending(&entry).len(), 39);
    assert_eq!(entry.outcome(), None);
    let before = index.relocate(7, place(9)).unwrap();
    assert_eq!(index.restore(before).unwrap().entry.record(), place(9));
    assert_eq!(index.get(7).unwrap().record(), place(1));
}

/// What outcomes told before is told by the copy, so none of them counts any more.
#[test]
fn a_copy_takes_the_place_of_outcomes() {
    let mut index = Index::default();
    index.insert(7, place(1), 3, &[]);
    for (number, recipient) in [(2, 0), (3, 1)] {
        index.settle(7, place(number), [(recipient, Settles::ForNow)].into_iter()).unwrap();
    }
    let before = index.relocate(7, place(9)).unwrap();
    assert_eq!(before.states().count(), 2);
    assert_eq!(index.states(index.get(7).unwrap()).count(), 0);
    index.audit();
    index.restore(before);
    assert_eq!(index.states(index.get(7).unwrap()).count(), 2);
    index.audit();
}

/// An outcome counts for as long as it tells the newest state of some pending recipient.
#[test]
fn outcomes_count_while_they_tell_something() {
    for recipients in [3, 40] {
        let mut index = Index::default();
        index.insert(7, place(1), recipients, &[]);
        let states = |index: &Index| -> Vec<u32> {
            let entry = index.get(7).unwrap();
            index.states(entry).map(|place| place.offset16).collect()
        };
        let some = |index, settles| [(index, settles)].into_iter();
        index.settle(7, place(2), some(0, Settles::ForNow)).unwrap();
        index.settle(7, place(3), some(1, Settles::ForNow)).unwrap();
        let (before, _) = index.settle(7, place(4), some(0, Settles::ForNow)).unwrap();
        assert_eq!(states(&index), [4, 3, 2]);
        assert_eq!(before.states().map(|place| place.offset16).collect::<Vec<_>>(), [3, 2]);
        index.restore(before);
        assert_eq!(states(&index), [3, 2]);
        let (before, _) = index.settle(7, place(5), (0..recipients).map(|index| (index, Settles::ForNow))).unwrap();
        assert_eq!(states(&index), [5]);
        index.restore(before);
        index.settle(7, place(9), some(2, Settles::Finally)).unwrap();
        assert_eq!(states(&index), [3, 2], "a final fate alone tells nothing of the others");
        index.restate(7, place(6)).unwrap();
        assert_eq!(states(&index), [6]);
        assert!(index.older.is_empty());
    }
}
