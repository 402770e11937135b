//! What a mail system of many processes costs: CPU time of all of them, those that have ended included.
//!
//! A system runs in a control group (version 2) of its own. Its CPU time cannot be had from its processes: one that
//! ignores SIGCHLD, as Exim's do, loses the time of the children it forked. The group's is the kernel's own sum, in
//! microseconds.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::measure::Memory;

/// A control group; all that is still in it is killed when it is dropped.
#[derive(Debug)]
pub(crate) struct ControlGroup(PathBuf);

impl ControlGroup {
    /// Needs a writable hierarchy of control groups of version 2, which root has unless a container withholds it.
    pub(crate) fn create() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mount = mount_point(&mounts).context("no control groups of version 2 are mounted here")?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(mount).join(format!("postbench-{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make the control group {}", path.display()))?;
        Ok(Self(path))
    }

    /// The same command, to be begun inside the group, so that nothing it does is left out.
    pub(super) fn inside(&self, command: &Command) -> Command {
        let mut wrapped = Command::new("sh");
        wrapped.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.0.join(PROCESSES));
        wrapped.arg(command.get_program()).args(command.get_args());
        wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        wrapped
    }

    /// Takes in a process that runs already, from here on.
    pub(super) fn take_in(&self, pid: u32) -> Result<()> {
        fs::write(self.0.join(PROCESSES), pid.to_string()).context("cannot move a process into its control group")
    }

    /// User and system time so far.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let text = fs::read_to_string(self.0.join("cpu.stat"))?;
        let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.trim().parse().ok());
        Ok(Duration::from_micros(micros.context("a control group without usage_usec")?))
    }

    /// Anonymous memory of all living processes in bytes; pages that a fork left shared count for each.
    pub(super) fn anonymous_bytes(&self) -> Result<u64> {
        let of = |pid: u32| Memory::of(pid).map_or(0, |memory| memory.anon_bytes + memory.shmem_bytes);
        Ok(self.processes()?.into_iter().map(of).sum())
    }

    /// Kills all that is in it, and waits until it is empty.
    pub(super) fn end(&self) -> Result<()> {
        let begun = Instant::now();
        while !self.processes()?.is_empty() {
            fs::write(self.0.join("cgroup.kill"), "1")?;
            ensure!(begun.elapsed() < END_PATIENCE, "the processes in {} do not end", self.0.display());
            std::thread::sleep(END_LOOK);
        }
        Ok(())
    }

    fn processes(&self) -> Result<Vec<u32>> {
        let text = fs::read_to_string(self.0.join(PROCESSES))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // Whoever wanted to know whether it ended has asked before.
        let _ = self.end();
        let begun = Instant::now();
        // A process that has just ended may be in it for a moment.
        while fs::remove_dir(&self.0).is_err() && begun.elapsed() < END_PATIENCE {
            std::thread::sleep(END_LOOK);
        }
    }
}

fn mount_point(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let place = fields.next()?;
        (fields.next()? == "cgroup2" && OsStr::new(place).is_ascii()).then_some(place)
    })
}

const PROCESSES: &str = "cgroup.procs";
const END_PATIENCE: Duration = Duration::from_secs(20);
const END_LOOK: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_version_is_found_among_others() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_point("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn the_time_of_forked_and_forgotten_processes_is_counted() {
        // A user who may not make groups has no use for them.
        let Ok(group) = ControlGroup::create() else { return };
        // Burns a little in a grandchild that nobody waits for: whoever ignores SIGCHLD loses its children's time.
        let burn = "trap '' CHLD; (sh -c 'i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done' &) ; exec sleep 600";
        let mut command = Command::new("sh");
        command.args(["-c", burn]);
        let mut child = group.inside(&command).spawn().unwrap();
        let begun = Instant::now();
        while group.cpu().unwrap() < Duration::from_millis(20) {
            assert!(begun.elapsed() < Duration::from_secs(60), "no time was counted");
        }
        assert!(group.anonymous_bytes().unwrap() > 0);
        let so_far = group.cpu().unwrap();
        group.end().unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(group.processes().unwrap().is_empty() && group.cpu().unwrap() >= so_far);
    }
}
