//! CPU time of this process, thread by thread (proc(5)).

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// CPU time used up to a moment.
#[derive(Debug)]
pub(crate) struct CpuReading {
    process: Duration,
    /// Living threads by their id.
    threads: HashMap<u32, (String, Duration)>,
}

/// CPU time used between two readings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CpuUse {
    /// Threads that ended meanwhile included.
    pub(crate) process: Duration,
    /// The thread that `main` runs on.
    pub(crate) main: Duration,
    /// All other living threads, by name.
    pub(crate) threads: Vec<(String, Duration)>,
}

impl CpuReading {
    /// None where there is no /proc.
    pub(crate) fn now() -> Option<Self> {
        let mut threads = HashMap::new();
        for task in fs::read_dir("/proc/self/task").ok()? {
            let path = task.ok()?.path();
            let id = path.file_name()?.to_str()?.parse().ok()?;
            // A thread may end while we look.
            if let Some((name, time)) = read_stat(&path.join("stat")) {
                threads.insert(id, (name, read_schedstat(&path.join("schedstat")).unwrap_or(time)));
            }
        }
        let (_, process) = read_stat(Path::new("/proc/self/stat"))?;
        Some(Self { process, threads })
    }

    pub(crate) fn since(&self, earlier: &Self) -> CpuUse {
        let mut used = CpuUse { process: self.process.saturating_sub(earlier.process), ..CpuUse::default() };
        for (id, (name, time)) in &self.threads {
            let before = earlier.threads.get(id).map_or(Duration::ZERO, |(_, time)| *time);
            let time = time.saturating_sub(before);
            if *id == std::process::id() {
                used.main = time;
            } else {
                used.threads.push((name.clone(), time));
            }
        }
        used.threads.sort_unstable();
        used
    }
}

impl CpuUse {
    /// Of the threads whose name begins with `prefix`.
    pub(crate) fn of(&self, prefix: &str) -> Duration {
        self.threads.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, time)| *time).sum()
    }
}

/// Name, and user and system time, which count in ticks.
fn read_stat(path: &Path) -> Option<(String, Duration)> {
    parse_stat(&fs::read_to_string(path).ok()?)
}

fn parse_stat(stat: &str) -> Option<(String, Duration)> {
    // The name stands in parentheses and may hold any character.
    let (front, back) = stat.rsplit_once(')')?;
    let name = front.split_once('(')?.1.to_owned();
    // Behind it come fields 3 onwards; 14 and 15 are the times.
    let mut fields = back.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((name, Duration::from_millis((ticks()? + ticks()?) * MS_PER_TICK)))
}

/// Time on a CPU in nanoseconds, where the kernel keeps it.
fn read_schedstat(path: &Path) -> Option<Duration> {
    let text = fs::read_to_string(path).ok()?;
    text.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

/// USER_HZ is 100 on every architecture that we build for.
const MS_PER_TICK: u64 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let stat = "12 (a) (b c) S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20 0 1 0";
        assert_eq!(parse_stat(stat), Some(("a) (b c".to_owned(), Duration::from_millis(1_750))));
        assert_eq!(parse_stat("12 (x) S 1 2"), None);
    }

    #[test]
    fn a_thread_is_seen_by_its_name() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let before = CpuReading::now().unwrap();
        let (done, is_done) = std::sync::mpsc::channel();
        let busy = std::thread::Builder::new().name("usage-test".to_owned()).spawn(move || {
            let sum = (0..20_000_000_u64).fold(1_u64, |sum, n| std::hint::black_box(sum.wrapping_mul(31) ^ n));
            done.send(sum).unwrap();
            // Lives until the reading is taken.
            let _ = stopped.recv();
        });
        is_done.recv().unwrap();
        let used = CpuReading::now().unwrap().since(&before);
        drop(stop);
        busy.unwrap().join().unwrap();
        assert!(used.of("usage-test") > Duration::ZERO, "{used:?}");
        assert!(used.of("no such thread") == Duration::ZERO);
    }
}
