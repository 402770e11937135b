//! What a process costs, from `/proc`: CPU time, memory, context switches, written bytes.
//!
//! CPU time is the whole thread group's, finished threads and io_uring workers included, in ticks of 10 ms: over a run
//! of seconds the error is below a percent. On loopback the kernel works off a segment's reception in the sender's
//! context, so that each side of a connection is charged for some of the other's work; so it is for every engine.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;

pub mod tracepoint;

/// Counters that only grow; the difference of two is what happened between.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub user: Duration,
    pub system: Duration,
    /// Of the threads alive at the look: a thread that ended took its count with it.
    pub voluntary_switches: u64,
    pub involuntary_switches: u64,
    /// Bytes that the process caused to be written to storage, filling and zeroing included.
    pub written_bytes: u64,
    pub major_faults: u64,
    pub minor_faults: u64,
}

impl Usage {
    pub fn of(pid: u32) -> io::Result<Self> {
        let process = format!("/proc/{pid}");
        let mut usage =
            parse_stat(&fs::read_to_string(format!("{process}/stat"))?).ok_or(io::ErrorKind::InvalidData)?;
        // Only the owner may read it, and a process that has just ended has none.
        if let Ok(text) = fs::read_to_string(format!("{process}/io")) {
            usage.written_bytes = number_after(&text, "\nwrite_bytes:").unwrap_or(0);
        }
        for task in fs::read_dir(format!("{process}/task"))?.flatten() {
            // It may have ended meanwhile.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else {
                continue;
            };
            usage.voluntary_switches += number_after(&status, "\nvoluntary_ctxt_switches:").unwrap_or(0);
            usage.involuntary_switches += number_after(&status, "\nnonvoluntary_ctxt_switches:").unwrap_or(0);
        }
        Ok(usage)
    }

    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
            voluntary_switches: self.voluntary_switches.saturating_sub(earlier.voluntary_switches),
            involuntary_switches: self.involuntary_switches.saturating_sub(earlier.involuntary_switches),
            written_bytes: self.written_bytes.saturating_sub(earlier.written_bytes),
            major_faults: self.major_faults.saturating_sub(earlier.major_faults),
            minor_faults: self.minor_faults.saturating_sub(earlier.minor_faults),
        }
    }

    pub fn cpu(&self) -> Duration {
        self.user + self.system
    }
}

/// proc_pid_stat(5). The name in parentheses may itself hold spaces and parentheses.
fn parse_stat(text: &str) -> Option<Usage> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // The first here is field 3, the state.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let ticks = |count: u64| Duration::from_secs_f64(count as f64 / rustix::param::clock_ticks_per_second() as f64);
    Some(Usage {
        minor_faults: field(10)?,
        major_faults: field(12)?,
        user: ticks(field(14)?),
        system: ticks(field(15)?),
        ..Usage::default()
    })
}

/// Resident memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// The highest ever, mapped files included.
    pub peak_rss_bytes: u64,
    pub anon_bytes: u64,
    pub file_bytes: u64,
    pub shmem_bytes: u64,
}

impl Memory {
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string(format!("/proc/{pid}/status"))?))
    }

    /// What mapped files take is the kernel's to give away; this is not.
    pub fn private_bytes(&self) -> u64 {
        self.anon_bytes + self.shmem_bytes
    }

    fn parse(status: &str) -> Self {
        let bytes = |name: &str| number_after(status, name).unwrap_or(0) * 1024;
        Self {
            peak_rss_bytes: bytes("\nVmHWM:"),
            anon_bytes: bytes("\nRssAnon:"),
            file_bytes: bytes("\nRssFile:"),
            shmem_bytes: bytes("\nRssShmem:"),
        }
    }
}

/// Looks at a process's anonymous memory now and then and keeps the highest; the kernel keeps that only for the whole.
#[derive(Debug)]
pub struct MemoryWatch {
    stop: Arc<AtomicBool>,
    anon_bytes_max: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl MemoryWatch {
    pub fn start(pid: u32) -> io::Result<Self> {
        let (stop, anon_bytes_max) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, highest) = (stop.clone(), anon_bytes_max.clone());
        let watch = move || {
            while !stopped.load(Ordering::Relaxed) {
                let memory = Memory::of(pid).unwrap_or_default();
                highest.fetch_max(memory.private_bytes(), Ordering::Relaxed);
                std::thread::park_timeout(MEMORY_WATCH_INTERVAL);
            }
        };
        let thread = std::thread::Builder::new().name("memory".into()).spawn(watch)?;
        Ok(Self { stop, anon_bytes_max, thread: Some(thread) })
    }

    pub fn finish(mut self) -> u64 {
        self.join();
        self.anon_bytes_max.load(Ordering::Relaxed)
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.join();
    }
}

/// CPU time of this process's threads whose name begins so; for the bench's own part.
pub fn own_threads_cpu(name_prefix: &str) -> Duration {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return Duration::ZERO;
    };
    let cpu = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        name.starts_with(name_prefix).then(|| thread_cpu(&task.path()))
    });
    cpu.sum()
}

/// CPU time of the calling thread so far.
pub fn this_thread_cpu() -> Duration {
    thread_cpu(Path::new("/proc/thread-self"))
}

fn thread_cpu(task: &Path) -> Duration {
    let schedule = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
    Duration::from_nanos(schedule.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0))
}

/// What the figures were taken on.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub memory_bytes: u64,
}

impl Machine {
    pub fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: number_after(&format!("\n{}", read("/proc/meminfo")), "\nMemTotal:").unwrap_or(0) * 1024,
        }
    }
}

/// The type of the file system that holds `path`: a synced write to tmpfs proves nothing.
pub fn filesystem_of(path: &Path) -> io::Result<&'static str> {
    Ok(match rustix::fs::statfs(path)?.f_type as u64 {
        0xEF53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683E => "btrfs",
        0x0102_1994 => "tmpfs",
        0x794C_7630 => "overlay",
        0x2FC1_2FC1 => "zfs",
        0x6969 => "nfs",
        _ => "another",
    })
}

fn number_after(text: &str, name: &str) -> Option<u64> {
    let rest = &text[text.find(name)? + name.len()..];
    rest.trim_ascii_start().split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

const MEMORY_WATCH_INTERVAL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_behind_the_name() {
        let line = "42 (a) b (c)) S 1 42 42 0 -1 4194560 1000 0 7 0 250 125 0 0 20 0 3 0 100 200 300";
        let usage = parse_stat(line).unwrap();
        assert_eq!(usage.minor_faults, 1000);
        assert_eq!(usage.major_faults, 7);
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        assert_eq!(usage.cpu(), Duration::from_secs_f64(250.0 / ticks) + Duration::from_secs_f64(125.0 / ticks));
        assert_eq!(parse_stat("42 (a) S 1"), None);
    }

    #[test]
    fn memory_is_given_in_bytes() {
        let status = "Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t  2048 kB\nVmRSS:\t 3 kB\n\
            RssAnon:\t 512 kB\nRssFile:\t 4 kB\nRssShmem:\t 0 kB\n";
        let memory = Memory::parse(status);
        let expected = Memory { peak_rss_bytes: 2 << 20, anon_bytes: 512 << 10, file_bytes: 4096, shmem_bytes: 0 };
        assert_eq!(memory, expected);
    }

    #[test]
    fn this_process_is_seen() {
        let pid = std::process::id();
        let before = Usage::of(pid).unwrap();
        // Until it shows: any fixed amount of work may be too little for a fast machine.
        let mut sum = 0u64;
        while Usage::of(pid).unwrap().since(&before).cpu().is_zero() {
            sum = (0..100_000u64).fold(sum, |sum, value| sum.wrapping_mul(31).wrapping_add(value));
        }
        std::hint::black_box(sum);
        let memory = Memory::of(pid).unwrap();
        assert!(memory.anon_bytes > 0 && memory.peak_rss_bytes >= memory.anon_bytes, "{memory:?}");
        let watch = MemoryWatch::start(pid).unwrap();
        while watch.anon_bytes_max.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        assert!(watch.finish() > 0);
        assert!(Machine::look().cpus > 0);
    }

    #[test]
    fn own_threads_are_told_apart_by_name() {
        let spin = || {
            while own_threads_cpu("spinner-").is_zero() {
                std::hint::spin_loop();
            }
            own_threads_cpu("spinner-")
        };
        let spun = std::thread::Builder::new().name("spinner-1".into()).spawn(spin).unwrap().join().unwrap();
        assert!(!spun.is_zero());
        assert!(own_threads_cpu("no such thread").is_zero());
    }
}
