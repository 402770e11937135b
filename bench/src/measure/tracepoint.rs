//! What a process asks of the kernel, counted by the kernel's own tracepoints: system calls, operations on rings, and
//! synced writes, by whichever call they come.
//!
//! The counters are perf events on all of the process's threads and on those that they start; they need the right to
//! use tracepoints (root, or CAP_PERFMON with readable tracefs). Nothing is sampled or stopped.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};
use perf_event::events::Tracepoint;
use perf_event::{Builder, Counter};

/// Totals since the start of counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelCalls {
    pub system_calls: u64,
    /// Submitted to rings; none of these is a system call of its own.
    pub ring_operations: u64,
    /// Writes or files made durable; `None` on a file system that does not tell.
    pub syncs: Option<u64>,
}

#[derive(Debug)]
pub struct KernelWatch {
    system_calls: Vec<Counter>,
    ring_operations: Vec<Counter>,
    syncs: Option<Vec<Counter>>,
}

impl KernelWatch {
    /// Counts from now on. The error says what is in the way.
    pub fn start(pid: u32, filesystem: &str) -> Result<Self> {
        let sync = match filesystem {
            "ext4" => Some("ext4/ext4_sync_file_enter"),
            "xfs" => Some("xfs/xfs_file_fsync"),
            _ => None,
        };
        Ok(Self {
            system_calls: counters(pid, "raw_syscalls/sys_enter")?,
            ring_operations: counters(pid, "io_uring/io_uring_submit_req")?,
            syncs: sync.map(|sync| counters(pid, sync)).transpose()?,
        })
    }

    pub fn read(&mut self) -> io::Result<KernelCalls> {
        Ok(KernelCalls {
            system_calls: sum(&mut self.system_calls)?,
            ring_operations: sum(&mut self.ring_operations)?,
            syncs: self.syncs.as_mut().map(|counters| sum(counters)).transpose()?,
        })
    }
}

fn sum(counters: &mut [Counter]) -> io::Result<u64> {
    counters.iter_mut().map(Counter::read).sum()
}

/// One for each thread. A thread's count holds those of the threads that it starts from now on.
fn counters(pid: u32, tracepoint: &str) -> Result<Vec<Counter>> {
    let tracepoint_id = id_of(tracepoint)?;
    let mut counters = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let Some(thread) = task.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let mut builder = Builder::new(Tracepoint::with_id(tracepoint_id));
        builder.observe_pid(thread).any_cpu().include_kernel().inherit(true).enabled(true);
        match builder.build() {
            Ok(counter) => counters.push(counter),
            // The thread has ended.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {}
            Err(error) => return Err(error).with_context(|| format!("{tracepoint} cannot be counted")),
        }
    }
    Ok(counters)
}

fn id_of(tracepoint: &str) -> Result<u64> {
    for root in TRACEFS {
        let path = Path::new(root).join(tracepoint).join("id");
        if let Ok(text) = fs::read_to_string(&path) {
            return text.trim().parse().with_context(|| format!("{} holds {text:?}", path.display()));
        }
    }
    bail!("{tracepoint} is not in {}, or may not be read", TRACEFS[0])
}

const TRACEFS: [&str; 2] = ["/sys/kernel/tracing/events", "/sys/kernel/debug/tracing/events"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_syncs_of_this_process_are_counted() {
        let file = tempfile::NamedTempFile::new_in(crate::peers::disk_directory().unwrap()).unwrap();
        let filesystem = crate::measure::filesystem_of(file.path()).unwrap();
        let mut watch = match KernelWatch::start(std::process::id(), filesystem) {
            Ok(watch) => watch,
            Err(error) => {
                assert!(error.to_string().contains("raw_syscalls/sys_enter"), "{error:#}");
                return;
            }
        };
        let before = watch.read().unwrap();
        // Of a thread that starts later, too. Other tests run in this process: there may be more.
        let sync = move || (0..10).for_each(|_| file.as_file().sync_all().unwrap());
        std::thread::spawn(sync).join().unwrap();
        let after = watch.read().unwrap();
        assert!(after.system_calls >= before.system_calls + 10, "{before:?} {after:?}");
        if let (Some(before), Some(after)) = (before.syncs, after.syncs) {
            assert!(after >= before + 10, "{before} {after}");
        }
    }

    #[test]
    fn what_cannot_be_counted_is_said() {
        let error = counters(std::process::id(), "raw_syscalls/no_such_point").unwrap_err().to_string();
        assert!(error.contains("no_such_point is not in"), "{error}");
    }
}
