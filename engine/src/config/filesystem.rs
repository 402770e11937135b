//! Which file system a spool would be on.
//!
//! The spool's promises rest on what ext4 and XFS do with a synced write into blocks written before; on others they are
//! untested, and on a tmpfs nothing is durable at all. The kind is read from `/proc/self/mountinfo` (proc(5)), because
//! statfs(2) would need unsafe code and gives a number only.

use std::path::{Path, PathBuf};

use super::SpoolConfig;

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filesystem {
    /// As the kernel names it: `ext4`, `xfs`, `btrfs`, `overlay`, `tmpfs`, `nfs4` …
    pub kind: String,
    pub mount_point: PathBuf,
}

impl Filesystem {
    /// Whether the spool is made for it.
    pub fn is_supported(&self) -> bool {
        matches!(self.kind.as_str(), "ext4" | "xfs")
    }
}

impl SpoolConfig {
    /// The file system that the spool's directory is on, or would be once it is created. An error is for the operator.
    pub fn filesystem(&self) -> Result<Filesystem, String> {
        let unknown = |reason: String| Filesystem { kind: format!("unknown ({reason})"), mount_point: PathBuf::new() };
        let found = find(&self.path).unwrap_or_else(unknown);
        if found.is_supported() || self.allow_filesystem {
            return Ok(found);
        }
        let why = match found.kind.as_str() {
            "tmpfs" | "ramfs" => "is lost with the machine's power",
            _ => "has not been tested for what a spool needs",
        };
        Err(format!("{} is on the file system {}, which {why}", self.path.display(), found.kind))
    }
}

fn find(path: &Path) -> Result<Filesystem, String> {
    let mounts = std::fs::read("/proc/self/mountinfo").map_err(|error| format!("/proc/self/mountinfo: {error}"))?;
    let absolute = std::path::absolute(path).map_err(|error| error.to_string())?;
    // The directory need not exist yet: its nearest ancestor decides.
    let existing = absolute.ancestors().find_map(|ancestor| ancestor.canonicalize().ok());
    let existing = existing.ok_or_else(|| format!("{} cannot be resolved", absolute.display()))?;
    mount_of(&String::from_utf8_lossy(&mounts), &existing).ok_or_else(|| "no mount point fits".to_owned())
}

/// Fields: id, parent, device, root, mount point, options, optional fields up to `-`, kind, source, options. The
/// longest mount point above the path counts; of two at the same point, the later covers the earlier.
fn mount_of(mountinfo: &str, path: &Path) -> Option<Filesystem> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mount_point = PathBuf::from(unescape(front.split(' ').nth(4)?));
        let kind = back.split(' ').next()?.to_owned();
        path.starts_with(&mount_point).then_some(Filesystem { kind, mount_point })
    });
    mounts.max_by_key(|mount| mount.mount_point.components().count())
}

/// Space, tab, newline and backslash stand as three octal digits behind a backslash.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, character)| text.replace(code, character))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw - proc proc rw
24 22 0:22 / /var rw - btrfs /dev/vdb rw
25 24 0:23 / /var/spool rw master:1 - tmpfs tmpfs rw
26 25 8:1 / /var/spool rw - xfs /dev/sda1 rw
27 22 0:24 / /mnt/my\\040disk rw - nfs4 server:/x rw
not a line
";

    fn kind(path: &str) -> String {
        mount_of(MOUNTS, Path::new(path)).unwrap().kind
    }

    #[test]
    fn the_nearest_and_latest_mount_counts() {
        assert_eq!(kind("/home/x"), "ext4");
        assert_eq!(kind("/var/log"), "btrfs");
        assert_eq!(kind("/var/spool/postrider"), "xfs", "mounted over the tmpfs");
        assert_eq!(kind("/var/spooler"), "btrfs", "whole names only");
        assert_eq!(kind("/mnt/my disk/a"), "nfs4");
        assert_eq!(mount_of("", Path::new("/")), None);
    }

    #[test]
    fn unsupported_kinds_need_consent() {
        let mut spool = SpoolConfig { path: "/proc/none/spool".into(), ..SpoolConfig::default() };
        let refusal = "/proc/none/spool is on the file system proc, which has not been tested for what a spool needs";
        assert_eq!(spool.filesystem(), Err(refusal.into()));
        spool.allow_filesystem = true;
        assert_eq!(spool.filesystem().map(|found| found.kind), Ok("proc".into()));
    }
}
