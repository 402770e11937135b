//! Rules of the tree that neither rustc nor clippy checks, each with its exceptions and their reasons.
//!
//! Sources are read as text: line comments are left out where code is looked at, and so are unit tests, which stand at
//! a file's foot (`#[cfg(test)] mod tests {`) or in a sibling `tests.rs`.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The data path. What one stage makes goes to the next through `handover.rs` and the shard.
const STAGES: [&str; 5] = ["accept", "schedule", "pool", "deliver", "outcome"];

/// Stages that may name another: (file or folder in engine/src, stage, reason).
const STAGE_EXCEPTIONS: &[(&str, &str, &str)] = &[];

/// Clocks, sockets, files, randomness and rings: only `engine/src/runtime` has them.
const WORLD: &[&str] = &[
    "tokio_uring",
    "socket2",
    "io_uring::",
    "std::fs",
    "fs::read",
    "fs::write",
    "std::os::unix::net",
    "TcpStream",
    "TcpListener",
    "TcpSocket",
    "UdpSocket",
    "UnixStream",
    "UnixDatagram",
    "Instant::now",
    "SystemTime",
    "Timestamp::now",
    "tokio::time",
    "thread::sleep",
    "aws_lc_rs::rand",
    "Rng::new",
    "fastrand::u",
];

/// Files and folders in engine/src that may use some of them all the same.
const WORLD_EXCEPTIONS: &[(&str, &[&str], &str)] = &[
    (
        "config",
        &["std::fs", "fs::read"],
        "reads configuration, keys and the list of mounts, once, before anything runs",
    ),
    ("demo", WORLD, "a program on top of the engine, with senders and a sink of its own"),
    ("engine/listeners.rs", &["TcpListener"], "names the type of the listeners that runtime/net.rs has bound"),
    ("engine/start.rs", &["thread::sleep"], "runs on the event log's thread, which may wait"),
    (
        "admin",
        &["TcpStream", "TcpListener", "tokio::time", "Instant::now"],
        "HTTP on the control thread: deadlines of connections that runtime/control.rs has listened for",
    ),
];

const UNSAFE_ALLOWED: &[&str] = &["engine/src/runtime/", "spool/src/file.rs", "spool/src/file/"];

/// `allow` says nothing when it becomes pointless; `expect` does.
const ALLOW_EXCEPTIONS: &[(&str, &str)] =
    &[("engine/tests/support/", "each test program uses another part of it, so that no `expect` holds for all")];

const FOLDERS: [&str; 5] = ["bench", "engine", "fuzz", "spool", "tools"];

const LINES_MAX: usize = 500;
const COLUMNS_MAX: usize = 120;

#[test]
fn stages_do_not_import_one_another() {
    let mut wrong = Findings::new("one stage names another; let the shard hand a value over, with a type of its own");
    for stage in STAGES {
        for source in sources(&format!("engine/src/{stage}")) {
            for (number, line) in source.production() {
                for other in STAGES.into_iter().filter(|other| *other != stage) {
                    if names_module(&line, other) && !excepted(STAGE_EXCEPTIONS, &source.name, &[other]) {
                        wrong.add(&source, number, &line);
                    }
                }
            }
        }
    }
    wrong.report();
}

#[test]
fn only_the_runtime_touches_the_world() {
    let mut wrong = Findings::new("clocks, sockets, files and randomness belong into engine/src/runtime");
    for source in sources("engine/src") {
        if source.name.starts_with("engine/src/runtime/") {
            continue;
        }
        for (number, line) in source.production() {
            for word in WORLD.iter().filter(|word| line.contains(**word)) {
                let allowed = WORLD_EXCEPTIONS
                    .iter()
                    .any(|(place, words, _)| source.is_in(&format!("engine/src/{place}")) && words.contains(word));
                if !allowed {
                    wrong.add(&source, number, &line);
                }
            }
        }
    }
    wrong.report();
}

#[test]
fn unsafe_code_is_in_two_places() {
    let mut wrong = Findings::new("unsafe code belongs into engine/src/runtime or the spool's file layer");
    for source in sources("") {
        if source.is_this_file() || UNSAFE_ALLOWED.iter().any(|place| source.name.starts_with(place)) {
            continue;
        }
        for (number, line) in source.code() {
            if ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"]
                .iter()
                .any(|it| line.contains(it))
            {
                wrong.add(&source, number, &line);
            }
        }
    }
    wrong.report();
}

#[test]
fn nothing_is_left_to_do_or_allowed_in_silence() {
    let mut wrong =
        Findings::new("file an issue instead of a note; write #[expect(.., reason = \"..\")] instead of allow");
    for source in sources("") {
        if source.is_this_file() {
            continue;
        }
        for (number, line) in source.lines() {
            let note = ["TODO", "FIXME", "XXX:"].iter().any(|note| line.contains(note));
            let allows = line.contains("#[allow(") || line.contains("#![allow(");
            let excepted = ALLOW_EXCEPTIONS.iter().any(|(place, _)| source.name.starts_with(place));
            if note || allows && !(excepted && line.contains("reason =")) {
                wrong.add(&source, number, line);
            }
        }
    }
    wrong.report();
}

#[test]
fn every_file_says_what_it_is() {
    let mut wrong = Findings::new("a file begins with a //! header");
    for source in sources("") {
        let first = source.text.lines().next().unwrap_or_default();
        if !first.starts_with("//! ") {
            wrong.add(&source, 1, first);
        }
    }
    wrong.report();
}

/// A file's own tests don't count, and files of tests may be as long as what they test is wide.
#[test]
fn long_files_say_why_they_are_long() {
    let mut wrong = Findings::new("a file of more than 500 lines says why in its header (`//! Over 500 lines: …`)");
    for source in sources("") {
        let in_tests = source.name.contains("/tests/") || source.name.ends_with("/tests.rs");
        let own = source.production().count();
        if own > LINES_MAX && !in_tests && !source.text.contains("\n//! Over 500 lines") {
            wrong.add(&source, own, "is its last line");
        }
    }
    wrong.report();
}

/// Expected output in tests stands as it is printed.
#[test]
fn lines_are_not_too_long() {
    let mut wrong = Findings::new("a line has at most 120 columns");
    for source in sources("") {
        let in_tests = source.name.contains("/tests/") || source.name.ends_with("/tests.rs");
        for (number, line) in source.lines() {
            let comment = line.trim_start().starts_with("//");
            if line.chars().count() > COLUMNS_MAX && (comment || !in_tests) {
                wrong.add(&source, number, line);
            }
        }
    }
    wrong.report();
}

/// tokio ends only the task that panics, and its shard would limp on without it.
#[test]
fn a_panic_ends_the_process() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("the workspace has a manifest");
    let (_, section) = manifest.split_once("[profile.release]").expect("the profile is configured");
    let section = section.split("\n[").next().unwrap_or_default();
    assert!(section.contains("panic = \"abort\""), "[profile.release] needs panic = \"abort\"");
    for program in ["engine/src/main.rs", "bench/src/main.rs"] {
        let source = fs::read_to_string(root().join(program)).expect("the program has a main file");
        let (_, main) = source.split_once("fn main() -> ExitCode {\n").expect("it has a main function");
        assert!(main.trim_start().starts_with("postrider::abort_on_panic();"), "{program} needs it first thing");
    }
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut wrong = Findings::new("a link leads to no file or heading");
    for path in files(&root(), "md") {
        let source = Source::read(path);
        for (number, line) in source.prose() {
            for target in links(line) {
                let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
                if target.contains("://") || target.starts_with("mailto:") {
                    continue;
                }
                let path = source.path.parent().expect("a file is in a folder").join(file);
                let path = if file.is_empty() { source.path.clone() } else { path };
                let found = path.exists() && (anchor.is_empty() || headings(&path).contains(anchor));
                if !found {
                    wrong.add(&source, number, target);
                }
            }
        }
    }
    wrong.report();
}

#[test]
fn the_top_has_five_folders() {
    let ignored = fs::read_to_string(root().join(".gitignore")).unwrap();
    let ignored: BTreeSet<&str> = ignored.lines().filter_map(|line| line.strip_prefix('/')).collect();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(root()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !is_foreign(&path) && !ignored.contains(&*name) {
            found.insert(name);
        }
    }
    assert_eq!(found.into_iter().collect::<Vec<_>>(), FOLDERS);
}

/// What README.md shows of the embedding API is code that was compiled.
#[test]
fn the_readme_shows_the_example_as_it_is() {
    let example = fs::read_to_string(root().join("engine/examples/embed.rs")).unwrap();
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, shown) = readme.split_once("```rust\n").expect("an example");
    let (shown, _) = shown.split_once("```").expect("its end");
    assert!(!shown.is_empty() && example.ends_with(shown), "README.md shows something else:\n{shown}");
}

/// The checks above must be able to fail.
#[test]
fn rules_find_what_they_look_for() {
    assert!(names_module("use crate::deliver::verdict;", "deliver"));
    assert!(names_module("use crate::{accept::Received, deliver};", "deliver"));
    assert!(names_module("    let x = super::super::pool::Pair::new();", "pool"));
    assert!(!names_module("use crate::delivery::x;", "deliver"));
    assert!(!names_module("let deliver = pool.deliver();", "deliver"));
    assert_eq!(without_comment("let x = 1; // unsafe {"), "let x = 1; ");
    assert_eq!(without_comment("let x = \"http://a\"; // b"), "let x = \"http://a\"; ");
    assert_eq!(links("see [a](b.md#c), [d](e)").collect::<Vec<_>>(), ["b.md#c", "e"]);
    let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\n".to_owned();
    let source = Source { path: PathBuf::new(), name: "x.rs".to_owned(), text };
    assert_eq!(source.production().map(|(number, _)| number).collect::<Vec<_>>(), [1]);
    assert!(sources("engine/src/accept").len() > 3, "the tree is found");
    assert_eq!(slug("What works, and what does not yet"), "what-works-and-what-does-not-yet");
}

/// A text of the tree; `name` is its path from the root.
struct Source {
    path: PathBuf,
    name: String,
    text: String,
}

impl Source {
    fn read(path: PathBuf) -> Self {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        Self { path, name, text }
    }

    fn is_this_file(&self) -> bool {
        self.name == "tools/tests/tidy.rs"
    }

    fn is_in(&self, place: &str) -> bool {
        self.name == place || self.name.starts_with(&format!("{place}/"))
    }

    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }

    /// Without line comments.
    fn code(&self) -> impl Iterator<Item = (usize, String)> {
        self.lines().map(|(number, line)| (number, without_comment(line).to_owned()))
    }

    /// [`Source::code`] without unit tests.
    fn production(&self) -> impl Iterator<Item = (usize, String)> {
        let end = self.text.find("#[cfg(test)]\nmod tests {").unwrap_or(self.text.len());
        let tests_from = self.text[..end].lines().count();
        let is_test = self.name.ends_with("/tests.rs");
        self.code().filter(move |(number, _)| !is_test && *number <= tests_from)
    }

    /// Outside blocks of code.
    fn prose(&self) -> impl Iterator<Item = (usize, &str)> {
        let mut in_code = false;
        self.lines().filter(move |(_, line)| {
            let fence = line.trim_start().starts_with("```");
            in_code ^= fence;
            !fence && !in_code
        })
    }
}

/// What breaks a rule.
struct Findings {
    rule: &'static str,
    text: String,
}

impl Findings {
    fn new(rule: &'static str) -> Self {
        Self { rule, text: String::new() }
    }

    fn add(&mut self, source: &Source, number: usize, line: &str) {
        let _ = write!(self.text, "\n{}:{number}: {}", source.name, line.trim());
    }

    fn report(self) {
        assert!(self.text.is_empty(), "{}:{}", self.rule, self.text);
    }
}

fn excepted(exceptions: &[(&str, &str, &str)], name: &str, words: &[&str]) -> bool {
    exceptions.iter().any(|(place, word, _)| name.starts_with(&format!("engine/src/{place}")) && words.contains(word))
}

/// Whether a line of code names a module at the top of its crate.
fn names_module(line: &str, module: &str) -> bool {
    let starts = ["crate::", "super::super::"];
    starts.iter().any(|start| {
        line.match_indices(start).any(|(at, _)| {
            let rest = &line[at + start.len()..];
            match rest.strip_prefix('{') {
                Some(list) => list.split(',').any(|path| begins_with_word(path.trim(), module)),
                None => begins_with_word(rest, module),
            }
        })
    })
}

fn begins_with_word(text: &str, word: &str) -> bool {
    let rest = text.strip_prefix(word);
    rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_alphanumeric() || next == '_'))
}

/// Cuts a line comment off. A `//` in a string has no white space in front.
fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with("//") {
        return "";
    }
    line.find(" //").map_or(line, |at| &line[..at + 1])
}

/// The targets of `[text](target)`.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

fn headings(path: &Path) -> BTreeSet<String> {
    let source = Source::read(path.to_owned());
    source
        .prose()
        .filter_map(|(_, line)| line.strip_prefix('#'))
        .map(|text| slug(text.trim_start_matches('#')))
        .collect()
}

/// A heading's anchor.
fn slug(heading: &str) -> String {
    let letters = heading.trim().to_lowercase();
    let kept = letters.chars().filter(|it| it.is_alphanumeric() || matches!(it, ' ' | '-' | '_'));
    kept.map(|it| if it == ' ' { '-' } else { it }).collect()
}

fn root() -> PathBuf {
    fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).unwrap()
}

/// The Rust sources below a folder.
fn sources(folder: &str) -> Vec<Source> {
    files(&root().join(folder), "rs").into_iter().map(Source::read).collect()
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() && !is_foreign(&path) {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == extension) && path.is_file() {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Hidden, or made by cargo.
fn is_foreign(folder: &Path) -> bool {
    let hidden = folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    hidden || folder.join("CACHEDIR.TAG").exists() || folder.ends_with("target")
}
