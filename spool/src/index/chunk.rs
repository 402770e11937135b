//! Neighbouring entries of the index, and the search among them.

use super::Entry;

/// Neighbouring entries, by sequence; never empty.
#[derive(Debug)]
pub(super) struct Chunk {
    /// No entry in it is below, and none in those before is above. Kept here, so that looking for a chunk reads
    /// neighbouring memory.
    pub(super) first: u64,
    pub(super) entries: Vec<Entry>,
}

impl Chunk {
    /// Of the first entry that is not below.
    pub(super) fn position_of(&self, sequence: u64) -> usize {
        self.entries.partition_point(|entry| entry.sequence() < sequence)
    }

    /// Finds an entry whose sequence is not below the chunk's first. `end` is above all in it, `None` in the last one.
    ///
    /// What stays long is a sample of all that came, so its sequences lie about evenly: a guess comes close, and from
    /// there the search goes in steps that double.
    pub(super) fn search(&self, sequence: u64, end: Option<u64>) -> Option<usize> {
        let entries = &self.entries;
        let end = end.or_else(|| entries.last().map(|last| last.sequence() + 1))?;
        if sequence >= end {
            return None;
        }
        let share = (sequence - self.first) as f64 / (end - self.first) as f64;
        let guess = ((share * entries.len() as f64) as usize).min(entries.len() - 1);
        let (mut low, mut high, mut step) = (0, entries.len(), SEARCH_STEP);
        if entries[guess].sequence() < sequence {
            low = guess + 1;
            while low + step < high {
                if entries[low + step].sequence() > sequence {
                    high = low + step;
                    break;
                }
                low += step;
                step *= 2;
            }
        } else {
            high = guess + 1;
            while high > step {
                if entries[high - step - 1].sequence() < sequence {
                    low = high - step;
                    break;
                }
                high -= step;
                step *= 2;
            }
        }
        let position = low + entries[low..high].binary_search_by_key(&sequence, Entry::sequence).ok()?;
        Some(position)
    }
}

/// The first step away from a guess, in entries.
const SEARCH_STEP: usize = 4;
