//! Large messages, in octets a second, beside the least that moving and keeping them can take: the same octets through
//! a bare splice of two sockets, and written to a file and synced.
//!
//! The bare relay has a thread and a stream for each CPU. It takes a message's octets from one socket through a pipe to
//! the other without looking at them, and writes as many ready octets behind one another into a file, synced after
//! each message, or after several, as a commit of an engine holds several.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice as splice_octets};
use serde_json::Value;

use crate::interrupt::Interrupt;
use crate::measure;
use crate::peers::disk_directory;
use crate::relay::{RelayOptions, relay};
use crate::report::{Figures, note, rounds_json, table};
use crate::spool::BareFile;

#[derive(Debug, Clone)]
pub struct SpliceOptions {
    pub relay: RelayOptions,
}

#[derive(Debug)]
pub struct SpliceReport {
    pub rounds: Vec<Figures>,
    pub setup: Value,
    complete: bool,
}

impl SpliceReport {
    /// Whether every message arrived, once.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    pub fn to_json(&self) -> Value {
        rounds_json(&self.setup, &self.rounds)
    }

    pub fn to_table(&self) -> String {
        table(&self.rounds)
    }
}

pub fn splice(options: &SpliceOptions, interrupt: &Interrupt) -> Result<SpliceReport> {
    ensure!(options.relay.rounds > 0, "at least one round is needed");
    let sizes = &options.relay.inject.sizes;
    let message_bytes = sizes.mean() as usize;
    let mut report = SpliceReport { rounds: Vec::new(), setup: Value::Null, complete: true };
    for number in 1..=options.relay.rounds {
        let one = bare(options, message_bytes, 1)?;
        let several = bare(options, message_bytes, MESSAGES_A_SYNC)?;
        interrupt.check()?;
        let relayed = relay(&RelayOptions { rounds: 1, ..options.relay.clone() }, interrupt)?;
        report.complete &= relayed.is_complete();
        report.setup = relayed.setup;
        let found = relayed.rounds.first().context("a relay without a round")?;
        let get = |name: &str| found.get(name).with_context(|| format!("the relay found no {name}"));
        let engine = get("delivered_mb_per_second")?;
        let best = one.mb_per_second.max(several.mb_per_second);
        let mut figures = Figures::default();
        figures.push("bare_synced_each_mb_per_second", "MB/s", one.mb_per_second);
        figures.push("bare_synced_each_cpu_us_per_message", "µs", one.cpu_us);
        figures.push("bare_synced_by_eights_mb_per_second", "MB/s", several.mb_per_second);
        figures.push("bare_synced_by_eights_cpu_us_per_message", "µs", several.cpu_us);
        figures.push("engine_mb_per_second", "MB/s", engine);
        figures.push("engine_cpu_us_per_message", "µs", get("engine_cpu_us_per_message")?);
        figures.push("injector_cpu_us_per_message", "µs", get("injector_cpu_us_per_message")?);
        figures.push("sink_cpu_us_per_message", "µs", get("sink_cpu_us_per_message")?);
        for name in ["lost", "duplicates"] {
            figures.push(name, "messages", found.get(name).unwrap_or_default());
        }
        figures.push("engine_by_bare_synced_each", "goal ≥ 0.6", engine / one.mb_per_second);
        figures.push("engine_by_the_better_bare", "", engine / best);
        note(&format!("round {number} of {} is done", options.relay.rounds));
        report.rounds.push(figures);
    }
    Ok(report)
}

#[derive(Debug, Clone, Copy)]
struct Bare {
    mb_per_second: f64,
    /// Of the relaying threads alone.
    cpu_us: f64,
}

fn bare(options: &SpliceOptions, message_bytes: usize, messages_a_sync: u64) -> Result<Bare> {
    let parent = match &options.relay.engine.spool_parent {
        Some(parent) => parent.clone(),
        None => disk_directory()?,
    };
    let streams = thread::available_parallelism()?.get() as u64;
    let each = options.relay.messages.div_ceil(streams);
    let relays = (0..streams).map(|_| BareRelay::prepare(&parent, message_bytes, messages_a_sync));
    let relays = relays.collect::<Result<Vec<_>>>()?;
    let begun = Instant::now();
    let threads: Vec<_> = relays.into_iter().map(|relay| thread::spawn(move || relay.run(each))).collect();
    let mut cpu = Duration::ZERO;
    for thread in threads {
        cpu += thread.join().map_err(|_| anyhow!("the bare relay panicked"))??;
    }
    let messages = streams * each;
    let octets = messages as f64 * message_bytes as f64;
    let cpu_us = cpu.as_secs_f64() * 1e6 / messages as f64;
    Ok(Bare { mb_per_second: octets / 1e6 / begun.elapsed().as_secs_f64(), cpu_us })
}

/// One stream: from a socket to another, and to a file.
struct BareRelay {
    message_bytes: usize,
    messages_a_sync: u64,
    file: BareFile,
    /// What is written: as many octets as were passed on.
    octets: Vec<u8>,
    incoming: TcpStream,
    outgoing: TcpStream,
    source: TcpStream,
    drain: TcpStream,
}

impl BareRelay {
    fn prepare(parent: &Path, message_bytes: usize, messages_a_sync: u64) -> Result<Self> {
        ensure!(message_bytes > 0, "a message has octets");
        let commit_bytes = message_bytes * messages_a_sync as usize;
        let (source, incoming) = pair()?;
        let (outgoing, drain) = pair()?;
        Ok(Self {
            message_bytes,
            messages_a_sync,
            file: BareFile::create(parent, (commit_bytes as u64).max(FILE_BYTES))?,
            octets: vec![b'x'; commit_bytes],
            incoming,
            outgoing,
            source,
            drain,
        })
    }

    /// The CPU time of the relay itself.
    fn run(mut self, messages: u64) -> Result<Duration> {
        let (mut source, mut drain, message_bytes) = (self.source, self.drain, self.message_bytes);
        let sender = thread::spawn(move || -> Result<()> {
            let message = vec![b'm'; message_bytes];
            (0..messages).try_for_each(|_| source.write_all(&message))?;
            Ok(())
        });
        let total = messages * message_bytes as u64;
        let receiver = thread::spawn(move || -> Result<()> {
            let (mut room, mut got) = (vec![0; 256 << 10], 0);
            while got < total {
                let length = drain.read(&mut room)?;
                ensure!(length > 0, "the bare relay closed early");
                got += length as u64;
            }
            Ok(())
        });
        let before = measure::this_thread_cpu();
        let pipe = Pipe::new()?;
        let mut unsynced = 0;
        for number in 1..=messages {
            pipe.pass(&self.incoming, &self.outgoing, message_bytes)?;
            unsynced += 1;
            if unsynced == self.messages_a_sync || number == messages {
                self.file.write(&self.octets[..unsynced as usize * message_bytes])?;
                unsynced = 0;
            }
        }
        let cpu = measure::this_thread_cpu().saturating_sub(before);
        for thread in [sender, receiver] {
            thread.join().map_err(|_| anyhow!("an end of the bare relay panicked"))??;
        }
        Ok(cpu)
    }
}

struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
}

impl Pipe {
    fn new() -> Result<Self> {
        let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
        // A system may allow less.
        let _ = fcntl_setpipe_size(&to, PIPE_BYTES);
        Ok(Self { from, to })
    }

    fn pass(&self, from: &TcpStream, to: &TcpStream, octets: usize) -> Result<()> {
        let flags = SpliceFlags::MOVE | SpliceFlags::MORE;
        let mut left = octets;
        while left > 0 {
            let mut inside = splice_octets(from, None, &self.to, None, left, flags)?;
            ensure!(inside > 0, "the source closed early");
            left -= inside;
            while inside > 0 {
                let flags = if left > 0 { flags } else { SpliceFlags::MOVE };
                inside -= splice_octets(&self.from, None, to, None, inside, flags)?;
            }
        }
        Ok(())
    }
}

/// Both ends of a connection on loopback.
fn pair() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

/// A commit of an engine under this load holds several.
const MESSAGES_A_SYNC: u64 = 8;
const PIPE_BYTES: usize = 1 << 20;
/// Written over and over.
const FILE_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn all_octets_come_through_in_their_order() {
        let (mut source, incoming) = pair().unwrap();
        let (outgoing, mut drain) = pair().unwrap();
        let sent: Vec<u8> = (0..300_000u32).map(|number| (number % 251) as u8).collect();
        let message = sent.clone();
        let sender = thread::spawn(move || source.write_all(&message).unwrap());
        let length = sent.len();
        let receiver = thread::spawn(move || {
            let mut got = vec![0; length];
            drain.read_exact(&mut got).unwrap();
            got
        });
        Pipe::new().unwrap().pass(&incoming, &outgoing, length).unwrap();
        sender.join().unwrap();
        assert_eq!(receiver.join().unwrap(), sent);
    }

    #[test]
    fn what_is_passed_on_is_written_too() {
        let directory = tempfile::tempdir().unwrap();
        let relay = BareRelay::prepare(directory.path(), 10_000, 8).unwrap();
        let path = relay.file.path().to_owned();
        let mut kept = File::open(path).unwrap();
        relay.run(11).unwrap();
        let mut written = vec![0; 110_001];
        kept.read_exact(&mut written).unwrap();
        assert!(written[..110_000].iter().all(|octet| *octet == b'x') && written[110_000] == 0);
    }
}
