//! The main file and the files it includes → one tree.
//!
//! `include = ["tenants/*.toml"]`: patterns stand for file names only, not for directories; the files of one pattern
//! are merged in the order of their names, patterns in the order given, each file once. A pattern without `*` or `?`
//! names a file that must exist. Included files include nothing.

use std::path::{Path, PathBuf};

use super::document::{self, Table};
use super::error::{Place, Placed, Report, Wrong};
use super::load::read_text;
use super::reader::Section;
use crate::limits;

/// Parses the main text and everything it includes. None if the main text is not TOML.
pub(super) fn read_all(text: &str, name: &str, base_dir: &Path, report: &mut Report) -> Option<Table> {
    let file = report.add_file(name, text, base_dir);
    let mut root = document::parse(text, file, report)?;
    let patterns = {
        let top = Section::new("", Place { file, offset: 0 }, &root, report);
        let example = "[\"tenants/*.toml\"]";
        top.list("include", example, check_pattern).map_or_else(Vec::new, |list| list.value)
    };

    let mut included: Vec<PathBuf> = Vec::new();
    for pattern in patterns {
        let paths = match matching_files(&base_dir.join(&pattern.value)) {
            Ok(Some(paths)) => paths,
            Ok(None) => {
                report.warn(format!("include {:?} finds nothing: its directory is not there", pattern.value));
                continue;
            }
            Err(reason) => {
                report.add(pattern.place, "include", Wrong::new(format!("{:?}: {reason}", pattern.value)));
                continue;
            }
        };
        for path in paths {
            if included.contains(&path) {
                continue;
            }
            if included.len() + 1 >= limits::CONFIG_FILES_MAX {
                let wrong = format!("more than {} files are included", limits::CONFIG_FILES_MAX - 1);
                report.add(pattern.place, "include", Wrong::new(wrong));
                return Some(root);
            }
            read_included(&path, &pattern, &mut root, report);
            included.push(path);
        }
    }
    Some(root)
}

fn read_included(path: &Path, pattern: &Placed<String>, root: &mut Table, report: &mut Report) {
    let text = match read_text(path, limits::CONFIG_FILE_BYTES_MAX) {
        Ok(text) => text,
        Err(reason) => {
            let wrong = Wrong::new(format!("{} cannot be read: {reason}", path.display()));
            report.add(pattern.place, "include", wrong.instead("write the path of a file, relative to this one"));
            return;
        }
    };
    let base_dir = path.parent().unwrap_or(Path::new("."));
    let file = report.add_file(&path.display().to_string(), &text, base_dir);
    let Some(mut table) = document::parse(&text, file, report) else { return };
    if let Some(entry) = table.entries.remove("include") {
        let wrong = Wrong::new("works in the main file only");
        report.add(entry.key_place, "include", wrong.instead("write the pattern there"));
    }
    document::merge(root, table, "", report);
}

fn check_pattern(text: &str) -> Result<String, Wrong> {
    let directory = text.rsplit_once('/').map_or("", |(directory, _)| directory);
    if directory.contains(['*', '?']) {
        let wrong = Wrong::new(format!("{text:?} has a wildcard in a directory's name"));
        return Err(wrong.instead("write one pattern for each directory"));
    }
    if text.is_empty() || text.ends_with('/') || text.contains('\0') {
        let wrong = Wrong::new(format!("{text:?} names no file"));
        return Err(wrong.instead("write for example \"tenants/*.toml\""));
    }
    Ok(text.into())
}

/// The files that a pattern stands for, in the order of their names. None: their directory is not there.
fn matching_files(pattern: &Path) -> Result<Option<Vec<PathBuf>>, String> {
    let name = pattern.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !name.contains(['*', '?']) {
        return Ok(Some(vec![pattern.to_path_buf()]));
    }
    let directory = pattern.parent().unwrap_or(Path::new("."));
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{} cannot be listed: {error}", directory.display())),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| format!("{} cannot be listed: {error}", directory.display()))?.path();
        let matching = path.file_name().and_then(|found| found.to_str()).is_some_and(|found| matches(name, found));
        if matching && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(Some(paths))
}

/// `*` is any run of characters, `?` any one; a hidden file only matches a pattern that begins with a dot.
fn matches(pattern: &str, name: &str) -> bool {
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut seen) = (0, 0);
    // Where to go on when the run that the last `*` stands for must be one longer.
    let mut again: Option<(usize, usize)> = None;
    while seen < name.len() {
        match pattern.get(at) {
            Some('*') => {
                again = Some((at + 1, seen + 1));
                at += 1;
            }
            Some(wanted) if *wanted == '?' || *wanted == name[seen] => {
                at += 1;
                seen += 1;
            }
            _ => {
                let Some((after_star, longer)) = again else { return false };
                (at, seen) = (after_star, longer);
                again = Some((after_star, longer + 1));
            }
        }
    }
    pattern[at..].iter().all(|rest| *rest == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names() {
        assert!(matches("*.toml", "a.toml"));
        assert!(matches("*.toml", "a.toml.toml"));
        assert!(!matches("*.toml", "a.toml.bak"));
        assert!(!matches("*.toml", ".a.toml"));
        assert!(matches("??-*x*", "10-axb"));
        assert!(!matches("?", ""));
        assert!(matches("a*a", "aa"));
        assert!(!matches("a*a", "a"));
        assert!(matches("*", "é"));
        assert!(matches("?", "é"));
        // Exponential in a naive matcher.
        assert!(!matches(&"*a".repeat(40), &"b".repeat(4_000)));
    }

    #[test]
    fn wildcards_stand_for_file_names_only() {
        assert!(check_pattern("tenants/*.toml").is_ok());
        assert!(check_pattern("*/x.toml").is_err());
        assert!(check_pattern("tenants/").is_err());
    }
}
