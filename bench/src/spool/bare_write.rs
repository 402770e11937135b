//! What commits are measured against: synced writes of the same sizes into blocks that were written before, one at a
//! time, of bytes that nobody made or checked.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use rustix::fs::OFlags;
use rustix::io::{ReadWriteFlags, pwritev2};
use tempfile::NamedTempFile;

use super::traffic::{Found, process_cpu};

/// How bare writes are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BareWrites {
    /// By pwritev2(2): nothing is quicker.
    Call,
    /// On the ring: the kernel hands each to a worker thread, as it does with the spool's.
    Ring,
}

/// A file that was written from end to end, and is written again and again.
#[derive(Debug)]
pub(crate) struct BareFile {
    file: NamedTempFile,
    file_bytes: u64,
    offset: u64,
}

impl BareFile {
    pub(crate) fn create(parent: &Path, file_bytes: u64) -> Result<Self> {
        let mut file = NamedTempFile::new_in(parent)?;
        let step = vec![0; FILL_STEP_BYTES];
        let mut left = file_bytes;
        while left > 0 {
            let bytes = left.min(step.len() as u64);
            file.write_all(&step[..bytes as usize])?;
            left -= bytes;
        }
        file.as_file().sync_all()?;
        Ok(Self { file, file_bytes, offset: 0 })
    }

    /// Makes so many writes of so many bytes, each on behalf of some messages.
    pub(super) async fn run(
        &mut self,
        way: BareWrites,
        write_bytes: usize,
        writes: u64,
        messages_each: f64,
    ) -> Result<Found> {
        let fits = write_bytes as u64 <= self.file_bytes;
        ensure!(fits, "a commit of {write_bytes} bytes is longer than the file of {}", self.file_bytes);
        let mut found = match way {
            BareWrites::Call => self.run_calls(&vec![b'x'; write_bytes], writes)?,
            BareWrites::Ring => self.run_on_ring(vec![b'x'; write_bytes], writes).await?,
        };
        found.messages = (writes as f64 * messages_each) as u64;
        Ok(found)
    }

    fn run_calls(&mut self, buffer: &[u8], writes: u64) -> Result<Found> {
        let mut found = Found::default();
        let (begun, cpu) = (Instant::now(), process_cpu());
        for _ in 0..writes {
            let since = Instant::now();
            self.write(buffer)?;
            found.latencies.record(since.elapsed());
        }
        found.elapsed = begun.elapsed();
        found.cpu = process_cpu().saturating_sub(cpu);
        Ok(found)
    }

    /// Synced, and no longer than the file.
    pub(crate) fn write(&mut self, buffer: &[u8]) -> Result<()> {
        let offset = self.advance(buffer.len());
        let written = pwritev2(self.file.as_file(), &[IoSlice::new(buffer)], offset, ReadWriteFlags::DSYNC)?;
        ensure!(written == buffer.len(), "a write ended early");
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    async fn run_on_ring(&mut self, mut buffer: Vec<u8>, writes: u64) -> Result<Found> {
        // The same as RWF_DSYNC with each write.
        let synced: File =
            OpenOptions::new().write(true).custom_flags(OFlags::DSYNC.bits().cast_signed()).open(self.file.path())?;
        let file = tokio_uring::fs::File::from_std(synced);
        let mut found = Found::default();
        let (begun, cpu) = (Instant::now(), process_cpu());
        for _ in 0..writes {
            let offset = self.advance(buffer.len());
            let since = Instant::now();
            let (result, returned) = file.write_at(buffer, offset).submit().await;
            found.latencies.record(since.elapsed());
            ensure!(result? == returned.len(), "a write ended early");
            buffer = returned;
        }
        found.elapsed = begun.elapsed();
        found.cpu = process_cpu().saturating_sub(cpu);
        file.close().await?;
        Ok(found)
    }

    /// Where the next write goes: behind the last one, or to the begin again.
    fn advance(&mut self, bytes: usize) -> u64 {
        if self.offset + bytes as u64 > self.file_bytes {
            self.offset = 0;
        }
        self.offset += bytes as u64;
        self.offset - bytes as u64
    }
}

const FILL_STEP_BYTES: usize = 1 << 20;
