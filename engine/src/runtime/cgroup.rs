//! What the control groups that this process is in let it have, of both versions. They nest: the least counts.

use std::fs;

/// How many CPUs' worth of time, rounded up; None: no quota.
pub(crate) fn cpus() -> Option<usize> {
    let of = |directory: &str| match read(directory, "cpu.max") {
        Some(text) => parse_quota(&text),
        None => {
            let (quota, period) = (read(directory, "cpu.cfs_quota_us")?, read(directory, "cpu.cfs_period_us")?);
            parse_quota(&format!("{} {period}", quota.trim()))
        }
    };
    least("cpu", &["cpu", "cpu,cpuacct"], of)
}

/// Octets of memory that this process may use before it is killed: what its groups or the machine have. None: nobody
/// says so.
pub(crate) fn memory_bytes() -> Option<u64> {
    let of = |directory: &str| {
        let text = read(directory, "memory.max").or_else(|| read(directory, "memory.limit_in_bytes"))?;
        // "max" is no number. Version 1 writes a number that no machine has.
        text.trim().parse::<u64>().ok()
    };
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| parse_total(&text));
    least("memory", &["memory"], of).into_iter().chain(machine).min()
}

fn least<T: Ord>(controller: &str, mounts: &[&str], of: impl Fn(&str) -> Option<T>) -> Option<T> {
    let memberships = fs::read_to_string("/proc/self/cgroup").ok()?;
    directories(&memberships, controller, mounts).iter().filter_map(|directory| of(directory)).min()
}

fn read(directory: &str, name: &str) -> Option<String> {
    fs::read_to_string(format!("{directory}/{name}")).ok()
}

/// The directories that may hold a bound of ours. Inside a container its own group is mounted as the root.
fn directories(memberships: &str, controller: &str, mounts: &[&str]) -> Vec<String> {
    let mut directories = Vec::new();
    for line in memberships.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let mounts: &[&str] = match controllers {
            "" => &["", "unified"],
            list if list.split(',').any(|name| name == controller) => mounts,
            _ => continue,
        };
        for mount in mounts {
            let root = format!("/sys/fs/cgroup/{mount}");
            let root = root.trim_end_matches('/');
            let mut path = path.trim_end_matches('/');
            loop {
                directories.push(format!("{root}{path}"));
                let Some(end) = path.rfind('/') else { break };
                path = &path[..end];
            }
        }
    }
    directories
}

/// `QUOTA PERIOD` in microseconds; "max" or a negative quota is none.
fn parse_quota(text: &str) -> Option<usize> {
    let mut numbers = text.split_whitespace();
    let quota: u64 = numbers.next()?.parse().ok()?;
    let period: u64 = numbers.next()?.parse().ok()?;
    if period == 0 { None } else { usize::try_from(quota.div_ceil(period)).ok() }
}

/// `MemTotal:       24689768 kB` of proc_meminfo(5).
fn parse_total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_read_in_both_forms() {
        assert_eq!(parse_quota("max 100000\n"), None);
        assert_eq!(parse_quota("-1 100000\n"), None);
        assert_eq!(parse_quota("150000 100000\n"), Some(2));
        assert_eq!(parse_quota("100000 100000\n"), Some(1));
        assert_eq!(parse_quota("5000 100000"), Some(1));
        assert_eq!(parse_quota("1 0"), None);
        assert_eq!(parse_quota(""), None);
    }

    #[test]
    fn bounds_are_looked_for_up_to_the_root() {
        let found = directories("0::/a.slice/b.service\n", "cpu", &["cpu"]);
        assert_eq!(found[..3], ["/sys/fs/cgroup/a.slice/b.service", "/sys/fs/cgroup/a.slice", "/sys/fs/cgroup"]);
        let text = "4:memory:/x\n3:cpu,cpuacct:/docker/1\n";
        let found = directories(text, "cpu", &["cpu", "cpu,cpuacct"]);
        assert!(found.contains(&"/sys/fs/cgroup/cpu,cpuacct/docker/1".to_owned()), "{found:?}");
        assert!(!found.iter().any(|directory| directory.ends_with("/x")));
        assert_eq!(directories(text, "memory", &["memory"]), ["/sys/fs/cgroup/memory/x", "/sys/fs/cgroup/memory"]);
        assert!(directories("garbage\n\n::\n", "cpu", &["cpu"]).len() < 4);
    }

    #[test]
    fn the_machine_has_memory() {
        assert_eq!(parse_total("MemFree: 1 kB\nMemTotal:       24689768 kB\n"), Some(24_689_768 << 10));
        assert_eq!(parse_total("MemTotal: none"), None);
        assert!(memory_bytes().is_some_and(|bytes| bytes > 16 << 20));
    }
}
