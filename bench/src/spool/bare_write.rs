//! What commits are measured against: synced writes of the same sizes into blocks that were written before, one at a
//! time, of bytes that nobody made or checked.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use rustix::io::{ReadWriteFlags, pwritev2};

use super::traffic::{Found, process_cpu};

/// A file that was written from end to end, and is written again and again.
#[derive(Debug)]
pub(super) struct BareFile {
    file: File,
    file_bytes: u64,
    offset: u64,
}

impl BareFile {
    pub(super) fn create(parent: &Path, file_bytes: u64) -> Result<Self> {
        let mut file = tempfile::tempfile_in(parent)?;
        let step = vec![0; FILL_STEP_BYTES];
        let mut left = file_bytes;
        while left > 0 {
            let bytes = left.min(step.len() as u64);
            file.write_all(&step[..bytes as usize])?;
            left -= bytes;
        }
        file.sync_all()?;
        Ok(Self { file, file_bytes, offset: 0 })
    }

    /// Writes `buffer` so many times, on behalf of `messages_each` messages each time.
    pub(super) fn run(&mut self, buffer: &[u8], writes: u64, messages_each: u64) -> Result<Found> {
        let bytes = buffer.len() as u64;
        ensure!(bytes <= self.file_bytes, "a commit of {bytes} bytes is longer than the file of {}", self.file_bytes);
        let mut found = Found::default();
        let (begun, cpu) = (Instant::now(), process_cpu());
        for _ in 0..writes {
            if self.offset + bytes > self.file_bytes {
                self.offset = 0;
            }
            let since = Instant::now();
            let written = pwritev2(&self.file, &[IoSlice::new(buffer)], self.offset, ReadWriteFlags::DSYNC)?;
            ensure!(written == buffer.len(), "a write ended after {written} of {bytes} bytes");
            self.offset += bytes;
            found.latencies.record(since.elapsed());
        }
        found.elapsed = begun.elapsed();
        found.cpu = process_cpu().saturating_sub(cpu);
        found.messages = writes * messages_each;
        Ok(found)
    }
}

const FILL_STEP_BYTES: usize = 1 << 20;
