//! The file in which limits over a minute or longer are reserved ahead, and the thread that alone writes it.
//!
//! `limits` in the spool's directory has one line for each reservation, in the order in which they were asked for:
//! `per`, the limit's period in seconds, wall time in milliseconds, units, the limit's name. Earlier versions told no
//! period: such a line begins with the wall time, and counts for a day. A reservation is answered once its line is
//! durable; all that wait are written and synced together. At the start, and whenever the file has grown to twice what
//! was left of it, what no longer counts is left out: the rest goes to a file beside it, which then takes its place. Of
//! a limit that is what was reserved in its last period, some hundred lines, and the two reservations before, which may
//! have been used in it; these stay for a day after the limit's last one.
//!
//! A shard that ends leaves what it knows of its limits. Once all have, and nobody can use anything any more, the lines
//! of these limits are replaced: `used`, wall time, units and name tell what still counts; `due`, wall time, interval
//! in microseconds and name when the next unit is. What was reserved and not used is thus given back. Whatever is used
//! later has been reserved before, behind these lines, so a crash needs no other rule. If the file can't be written, it
//! stays as it was.
//!
//! A `clock` line tells by how much the wall clock was ahead of the time since the machine's start when the lines
//! behind it were written, and which start that was: where the clock has been set since, their times are moved by as
//! much. Over a start of the machine itself they are taken as they are.
//!
//! A line that a crash cut off was not answered, so nothing was sent on it: it is left out.
//!
//! What can fail: the disk. Then nothing is answered, mail under these limits waits, and it is tried again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::limits::{LIMIT_FILE_BYTES_MAX, LIMIT_FILE_RETRY_PAUSE, LIMIT_PERIOD_MAX};
use crate::pool::rate::{Due, Past, PastLimits};
use crate::runtime::clock::WallScale;
use crate::shard::Reservation;

pub(crate) struct LimitFile {
    path: PathBuf,
    file: File,
    /// Whole lines that were written.
    octets: u64,
    /// What there was of them when it was last shortened.
    shortened_octets: u64,
    is_synced: bool,
    /// By which the last lines of the file were written.
    scale: WallScale,
    /// What the shards have left.
    left: PastLimits,
}

/// What the thread is told. It does not end by itself: a shard whose operations hang keeps its sender.
#[derive(Debug)]
pub(crate) enum LimitMail {
    Reserve {
        shard: usize,
        reservation: Reservation,
    },
    /// A shard has ended, with this known of its limits.
    Leave(Vec<(Arc<str>, Past)>),
    /// All have.
    Stop,
}

impl LimitFile {
    /// What was reserved before, by limit, and the file for what comes. `is_synced`: as the spool is.
    pub(crate) fn open(directory: &Path, now_ms: u64, is_synced: bool) -> io::Result<(Self, PastLimits)> {
        let path = directory.join("limits");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8_lossy(&text);
        let damaged = damaged_lines(&text);
        if damaged > 0 {
            let path = path.display();
            tracing::error!(
                lines = damaged,
                "{path} is damaged; limits over a minute or longer may let pass once more what was reserved there"
            );
        }
        let scale = WallScale::now();
        let past = read(&text, now_ms, &scale);
        let (file, octets) = replace(&path, &past, &scale, is_synced)?;
        Ok((Self { path, file, octets, shortened_octets: octets, is_synced, scale, left: PastLimits::new() }, past))
    }

    /// Serves until it is told to stop. `tell` gives a shard its answer.
    pub(crate) fn start(
        mut self,
        tell: impl Fn(usize, Reservation) + Send + 'static,
    ) -> io::Result<(Sender<LimitMail>, JoinHandle<io::Result<()>>)> {
        let (sender, asked) = channel();
        let thread = std::thread::Builder::new().name("limits".to_owned()).spawn(move || {
            if self.serve(&asked, tell)
                && let Err(error) = self.settle()
            {
                let path = self.path.display();
                tracing::warn!(%error, "{path} can not be written; what was reserved and not used counts as used");
            }
            Ok(())
        })?;
        Ok((sender, thread))
    }

    /// Whether it was told to stop.
    fn serve(&mut self, asked: &Receiver<LimitMail>, tell: impl Fn(usize, Reservation)) -> bool {
        while let Ok(first) = asked.recv() {
            let mut batch = Vec::new();
            for mail in std::iter::once(first).chain(asked.try_iter()) {
                match mail {
                    LimitMail::Reserve { shard, reservation } => batch.push((shard, reservation)),
                    LimitMail::Leave(past) => self.leave(past),
                    LimitMail::Stop => return true,
                }
            }
            let mut lines = self.change_of_scale();
            lines.extend(batch.iter().map(|(_, reservation)| line(reservation)));
            while let Err(error) = self.append(lines.as_bytes()) {
                let path = self.path.display();
                tracing::error!(%error, "{path} can not be written; mail under limits over a minute or longer waits");
                match asked.recv_timeout(LIMIT_FILE_RETRY_PAUSE) {
                    Ok(LimitMail::Reserve { shard, reservation }) => {
                        lines.push_str(&line(&reservation));
                        batch.push((shard, reservation));
                    }
                    Ok(LimitMail::Leave(past)) => self.leave(past),
                    Ok(LimitMail::Stop) => return true,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            }
            let now_ms = batch.iter().map(|(_, reservation)| reservation.at_ms).max().unwrap_or_default();
            for (shard, reservation) in batch {
                tell(shard, reservation);
            }
            if self.has_grown()
                && let Err(error) = self.shorten(now_ms)
            {
                tracing::warn!(%error, "{} grows", self.path.display());
            }
        }
        false
    }

    fn leave(&mut self, past: Vec<(Arc<str>, Past)>) {
        for (limit, past) in past {
            self.left.entry(limit.to_string()).or_default().add(past);
        }
    }

    /// Of limits that nobody has told of, all that was reserved counts on.
    fn settle(&mut self) -> io::Result<()> {
        if self.left.is_empty() {
            return Ok(());
        }
        let text = fs::read(&self.path)?;
        let scale = self.scale.changed().unwrap_or_else(|| self.scale.clone());
        let mut past = read(&String::from_utf8_lossy(&text), 0, &scale);
        past.extend(std::mem::take(&mut self.left));
        (self.file, self.octets) = replace(&self.path, &past, &scale, self.is_synced)?;
        Ok(())
    }

    /// What is to stand before the next lines, where the clock has been set since the last ones.
    fn change_of_scale(&mut self) -> String {
        let changed = self.scale.changed();
        let line = changed.as_ref().map(scale_line).unwrap_or_default();
        self.scale = changed.unwrap_or_else(|| self.scale.clone());
        line
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        // What a failed write left behind.
        self.file.set_len(self.octets)?;
        self.file.write_all(lines)?;
        if self.is_synced {
            self.file.sync_data()?;
        }
        self.octets += lines.len() as u64;
        Ok(())
    }

    /// Were it shortened again before it has doubled, each line might cost a file of others.
    fn has_grown(&self) -> bool {
        self.octets > LIMIT_FILE_BYTES_MAX.max(2 * self.shortened_octets)
    }

    fn shorten(&mut self, now_ms: u64) -> io::Result<()> {
        let text = fs::read(&self.path)?;
        let past = read(&String::from_utf8_lossy(&text), now_ms, &self.scale);
        (self.file, self.octets) = replace(&self.path, &past, &self.scale, self.is_synced)?;
        self.shortened_octets = self.octets;
        Ok(())
    }
}

fn line(reservation: &Reservation) -> String {
    let Reservation { limit, at_ms, units, period } = reservation;
    format!("per {} {at_ms} {units} {limit}\n", period.as_secs())
}

fn scale_line(WallScale { boot, ahead_ms }: &WallScale) -> String {
    format!("clock {ahead_ms} {boot}\n")
}

/// What may still count, in terms of this scale: a limiter takes each reservation as used when the second after it was
/// asked for.
fn read(text: &str, now_ms: u64, scale: &WallScale) -> PastLimits {
    let mut limits: PastLimits = PastLimits::new();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut moved_ms = 0;
    for line in whole.lines() {
        if let Some(told) = parse_scale(line) {
            moved_ms = scale.moved_ms(&told);
            continue;
        }
        let Some((limit, line)) = parse(line) else { continue };
        let past = limits.entry(limit.to_owned()).or_default();
        let at = |at_ms: u64| at_ms.saturating_add_signed(moved_ms);
        match line {
            Line::Reserved(period, at_ms, units) => {
                past.reserved.push((at(at_ms), units));
                past.period = period.or(past.period);
            }
            Line::Used(at_ms, units) => past.used.push((at(at_ms), units)),
            Line::Due(due) => past.due = Some(Due { at_ms: at(due.at_ms), ..due }),
        }
    }
    let before_ms = |period: Duration| now_ms.saturating_sub(period.as_millis() as u64);
    let forgotten_ms = before_ms(LIMIT_PERIOD_MAX);
    limits.retain(|_, Past { used, reserved, due, period }| {
        let old_ms = before_ms(period.unwrap_or(LIMIT_PERIOD_MAX));
        used.retain(|(at_ms, _)| *at_ms >= old_ms);
        let old = reserved.iter().take_while(|(at_ms, _)| *at_ms < old_ms).count();
        reserved.drain(..old.saturating_sub(2));
        // Units that are reserved may be used at any time later. After a day they are taken to be lost.
        if reserved.last().is_some_and(|(at_ms, _)| *at_ms < forgotten_ms) {
            reserved.clear();
        }
        due.take_if(|due| due.at_ms <= now_ms);
        !used.is_empty() || !reserved.is_empty() || due.is_some()
    });
    limits
}

/// What a line tells of its limit.
enum Line {
    Reserved(Option<Duration>, u64, u32),
    Used(u64, u32),
    Due(Due),
}

/// The limit, and what is told of it.
fn parse(line: &str) -> Option<(&str, Line)> {
    let (kind, rest) = line.split_once(' ')?;
    let (period, told) = match kind {
        "used" | "due" => (None, rest),
        "per" => {
            let (seconds, told) = rest.split_once(' ')?;
            (Some(Duration::from_secs(seconds.parse().ok()?).min(LIMIT_PERIOD_MAX)), told)
        }
        _ => (None, line),
    };
    let mut parts = told.splitn(3, ' ');
    let at_ms = parts.next()?.parse().ok()?;
    let number = parts.next()?;
    let told = match kind {
        "used" => Line::Used(at_ms, number.parse().ok()?),
        "due" => Line::Due(Due { at_ms, interval_us: number.parse().ok()? }),
        _ => Line::Reserved(period, at_ms, number.parse().ok()?),
    };
    Some((parts.next()?, told))
}

fn parse_scale(line: &str) -> Option<WallScale> {
    let (ahead_ms, boot) = line.strip_prefix("clock ")?.split_once(' ')?;
    Some(WallScale { boot: boot.to_owned(), ahead_ms: ahead_ms.parse().ok()? })
}

/// Lines that are whole and tell nothing.
fn damaged_lines(text: &str) -> usize {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter(|line| parse(line).is_none() && parse_scale(line).is_none()).count()
}

/// Puts a file with these lines in the place of the one that is there.
fn replace(path: &Path, past: &PastLimits, scale: &WallScale, is_synced: bool) -> io::Result<(File, u64)> {
    let unfinished = path.with_extension("new");
    let mut lines = scale_line(scale);
    for (limit, Past { used, reserved, due, period }) in past {
        lines.extend(used.iter().map(|(at_ms, units)| format!("used {at_ms} {units} {limit}\n")));
        lines.extend(due.iter().map(|Due { at_ms, interval_us }| format!("due {at_ms} {interval_us} {limit}\n")));
        let limit: Arc<str> = limit.as_str().into();
        let period = period.unwrap_or(LIMIT_PERIOD_MAX);
        for &(at_ms, units) in reserved {
            lines.push_str(&line(&Reservation { limit: Arc::clone(&limit), at_ms, units, period }));
        }
    }
    fs::write(&unfinished, &lines)?;
    let file = OpenOptions::new().append(true).open(&unfinished)?;
    if is_synced {
        file.sync_all()?;
    }
    fs::rename(&unfinished, path)?;
    if is_synced && let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok((file, lines.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const DAY: u64 = 86_400_000;

    fn reservation(limit: &str, at_ms: u64, units: u32) -> Reservation {
        Reservation { limit: limit.into(), at_ms, units, period: LIMIT_PERIOD_MAX }
    }

    #[test]
    fn what_was_answered_is_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let (file, past) = LimitFile::open(directory.path(), NOW, true).unwrap();
        assert!(past.is_empty());
        let (told, answers) = channel();
        let (asked, thread) = file.start(move |shard, reservation| told.send((shard, reservation)).unwrap()).unwrap();
        let sent = [(0, reservation("recipients by ip-a at mx.test", NOW, 5)), (1, reservation("b", NOW + 1, 7))];
        for (shard, reservation) in sent.clone() {
            asked.send(LimitMail::Reserve { shard, reservation }).unwrap();
        }
        assert_eq!(answers.iter().take(2).collect::<Vec<_>>(), sent);
        asked.send(LimitMail::Stop).unwrap();
        thread.join().unwrap().unwrap();
        // A crash in the midst of a line.
        let mut file = OpenOptions::new().append(true).open(directory.path().join("limits")).unwrap();
        file.write_all(b"1800000000002 9 recipients by ip-a at mx.te").unwrap();
        for _ in 0..2 {
            let (_, past) = LimitFile::open(directory.path(), NOW + 5, true).unwrap();
            assert_eq!(past.len(), 2, "{past:?}");
            assert_eq!(past["recipients by ip-a at mx.test"].reserved, [(NOW, 5)]);
            assert_eq!(past["b"].reserved, [(NOW + 1, 7)]);
        }
    }

    #[test]
    fn damage_is_seen_and_costs_nothing_else() {
        let text = "1800000000000 5 a\n\0\0\0\n1800000000001 x b\n1800000000002 7 a b\n1800000000003 9 cut o";
        assert_eq!(damaged_lines(text), 2);
        let past = read(text, NOW, &WallScale::now());
        assert_eq!(
            (past.len(), &past["a"].reserved[..], &past["a b"].reserved[..]),
            (2, &[(NOW, 5)][..], &[(NOW + 2, 7)][..])
        );
    }

    #[test]
    fn what_no_longer_counts_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let (mut file, _) = LimitFile::open(directory.path(), NOW, false).unwrap();
        for step in 0..10 {
            file.append(line(&reservation("a", NOW + step * DAY / 4, 1)).as_bytes()).unwrap();
        }
        file.append(line(&reservation("gone", NOW, 1)).as_bytes()).unwrap();
        file.shorten(NOW + 9 * DAY / 4).unwrap();
        let (_, past) = LimitFile::open(directory.path(), NOW + 9 * DAY / 4, false).unwrap();
        assert_eq!(past.len(), 1, "{past:?}");
        let steps: Vec<u64> = past["a"].reserved.iter().map(|(at_ms, _)| (at_ms - NOW) / (DAY / 4)).collect();
        assert_eq!(steps, [3, 4, 5, 6, 7, 8, 9], "a day's, and two before that may have been used in it");
    }

    /// Of a short limit no more is kept than counts in its own period, also where it is shortened again and again.
    #[test]
    fn a_limit_is_kept_for_its_own_period() {
        let directory = tempfile::tempdir().unwrap();
        let (mut file, _) = LimitFile::open(directory.path(), NOW, false).unwrap();
        let minute = Duration::from_secs(60);
        for second in 0..3_600 {
            let reservation = Reservation { period: minute, ..reservation("a", NOW + second * 1_000, 1) };
            file.append(line(&reservation).as_bytes()).unwrap();
            if second % 600 == 0 {
                file.shorten(reservation.at_ms).unwrap();
            }
        }
        file.append(format!("{} 7 old\n", NOW + 3_000_000).as_bytes()).unwrap();
        let now = NOW + 3_600_000;
        let (_, past) = LimitFile::open(directory.path(), now, false).unwrap();
        let kept: Vec<u64> = past["a"].reserved.iter().map(|(at_ms, _)| (now - at_ms) / 1_000).collect();
        assert_eq!((kept.len(), kept[0], past["a"].period), (62, 62, Some(minute)), "and the two before that");
        assert_eq!(past["old"].reserved, [(NOW + 3_000_000, 7)], "what has no period counts for a day");
        let (_, past) = LimitFile::open(directory.path(), now + DAY / 2, false).unwrap();
        assert_eq!(past["a"].reserved.len(), 2, "they may be used yet");
        assert!(LimitFile::open(directory.path(), now + DAY, false).unwrap().1.is_empty());
    }

    /// Most of what is there may still count: then it grows, rather than being written anew with each line.
    #[test]
    fn it_is_shortened_once_it_has_doubled() {
        let directory = tempfile::tempdir().unwrap();
        let (file, _) = LimitFile::open(directory.path(), NOW, false).unwrap();
        let grown = |octets, shortened_octets| {
            let file = file.file.try_clone().unwrap();
            let (path, left) = (directory.path().join("limits"), PastLimits::new());
            let scale = WallScale::now();
            LimitFile { path, file, octets, shortened_octets, is_synced: false, scale, left }.has_grown()
        };
        let max = LIMIT_FILE_BYTES_MAX;
        assert_eq!(
            [grown(max, 0), grown(max + 1, 0), grown(max + 1, max), grown(2 * max + 1, max)],
            [false, true, false, true]
        );
    }

    /// A limit whose file is `name`'s and `b`'s, after an engine that left this of `name`.
    fn stopped(directory: &Path, name: &str, past: Past) -> io::Result<()> {
        let (file, _) = LimitFile::open(directory, NOW, true)?;
        let (told, answers) = channel();
        let (asked, thread) = file.start(move |shard, reservation| told.send((shard, reservation)).unwrap())?;
        for limit in [name, "b"] {
            asked.send(LimitMail::Reserve { shard: 0, reservation: reservation(limit, NOW, 9) }).unwrap();
        }
        assert_eq!(answers.iter().take(2).count(), 2);
        asked.send(LimitMail::Leave(vec![(name.into(), past)])).unwrap();
        asked.send(LimitMail::Stop).unwrap();
        thread.join().unwrap()
    }

    #[test]
    fn a_stop_leaves_what_was_used() {
        let directory = tempfile::tempdir().unwrap();
        let name = "provider recipients by ip-a at a provider";
        let due = Some(Due { at_ms: NOW + 40_000, interval_us: 20_000_000 });
        let (used, reserved) = (vec![(NOW + 3, 2), (NOW + 9, 1)], vec![(NOW + 10, 4)]);
        let told = Past { used, reserved, due, period: Some(LIMIT_PERIOD_MAX) };
        stopped(directory.path(), name, told.clone()).unwrap();
        let (mut file, past) = LimitFile::open(directory.path(), NOW + 20, true).unwrap();
        assert_eq!(past[name], told);
        assert_eq!(past["b"].reserved, [(NOW, 9)], "nobody has told of it: all that was reserved counts");
        // What the next engine reserves counts beside it, after a crash, too.
        file.append(line(&reservation(name, NOW + 30, 5)).as_bytes()).unwrap();
        drop(file);
        let (_, past) = LimitFile::open(directory.path(), NOW + 41_000, true).unwrap();
        let reserved = vec![(NOW + 10, 4), (NOW + 30, 5)];
        assert_eq!(past[name], Past { reserved, due: None, ..told });
        // An engine of which nothing counts any more leaves nothing.
        stopped(directory.path(), name, Past::default()).unwrap();
        let (_, past) = LimitFile::open(directory.path(), NOW + 20, true).unwrap();
        assert_eq!(past.keys().collect::<Vec<_>>(), ["b"]);
    }

    /// The clock was set between these lines, and again before the next start: they are as old as they are.
    #[test]
    fn a_clock_that_is_set_makes_nothing_older() {
        let boot = "c2e1".to_owned();
        let scale = |ahead_ms| WallScale { boot: boot.clone(), ahead_ms };
        let text = [
            "per 3600 1799999999000 1 a\n",
            &scale_line(&scale(1_000_000)),
            "per 3600 1800000000000 5 a\n",
            &scale_line(&scale(9_000_000)),
            "per 3600 1800008003000 7 a\nused 1800008004000 2 b\ndue 1800008005000 60 b\n",
        ]
        .concat();
        assert_eq!(damaged_lines(&text), 0);
        let past = read(&text, NOW, &scale(900_000));
        let reserved = [(NOW - 1_000, 1), (NOW - 100_000, 5), (NOW - 97_000, 7)];
        assert_eq!(past["a"].reserved, reserved, "what was told before there was a scale is as it is");
        assert_eq!((&past["b"].used[..], past["b"].due), (&[(NOW - 96_000, 2)][..], None));
        let past = read(&text, NOW, &WallScale { boot: "d3f2".to_owned(), ahead_ms: 5 });
        assert_eq!(past["a"].reserved, [(NOW - 1_000, 1), (NOW, 5), (NOW + 8_003_000, 7)], "another start");
    }

    #[test]
    fn a_clock_that_was_set_is_told_before_the_next_line() {
        let directory = tempfile::tempdir().unwrap();
        let (mut file, _) = LimitFile::open(directory.path(), NOW, false).unwrap();
        assert_eq!(file.change_of_scale(), "");
        let now = file.scale.clone();
        file.scale.ahead_ms -= 7_000;
        assert!(file.change_of_scale().starts_with("clock "));
        assert!(file.scale.ahead_ms.abs_diff(now.ahead_ms) < 1_000 && file.change_of_scale().is_empty());
        let written = fs::read_to_string(directory.path().join("limits")).unwrap();
        assert_eq!(written, scale_line(&now), "and at the head of each file");
    }

    /// It is no part of the line that is written when the disk works again.
    #[test]
    fn what_a_failed_write_left_is_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let (mut file, _) = LimitFile::open(directory.path(), NOW, false).unwrap();
        file.append(line(&reservation("a", NOW, 1)).as_bytes()).unwrap();
        file.file.write_all(b"1800000000001 9").unwrap();
        file.append(line(&reservation("b", NOW + 1, 2)).as_bytes()).unwrap();
        let (_, past) = LimitFile::open(directory.path(), NOW + 1, false).unwrap();
        assert_eq!((&past["a"].reserved[..], &past["b"].reserved[..]), (&[(NOW, 1)][..], &[(NOW + 1, 2)][..]));
    }

    #[test]
    fn what_two_leave_of_one_limit_counts_together() {
        let directory = tempfile::tempdir().unwrap();
        let (file, _) = LimitFile::open(directory.path(), NOW, false).unwrap();
        let (asked, thread) = file.start(|_, _| ()).unwrap();
        for units in [2, 5] {
            let past = Past { used: vec![(NOW, units)], ..Past::default() };
            asked.send(LimitMail::Leave(vec![("a".into(), past)])).unwrap();
        }
        asked.send(LimitMail::Stop).unwrap();
        thread.join().unwrap().unwrap();
        let (_, past) = LimitFile::open(directory.path(), NOW, false).unwrap();
        assert_eq!(past["a"].used, [(NOW, 2), (NOW, 5)]);
    }

    /// Only the start of the next engine may take what was left; one that can't be written changes nothing.
    #[test]
    fn a_stop_without_a_disk_gives_nothing_back() {
        let directory = tempfile::tempdir().unwrap();
        // In the place of the file that is to take the other's.
        let in_the_way = directory.path().join("limits.new");
        let (file, _) = LimitFile::open(directory.path(), NOW, true).unwrap();
        fs::create_dir(&in_the_way).unwrap();
        let (told, answers) = channel();
        let (asked, thread) = file.start(move |shard, _| told.send(shard).unwrap()).unwrap();
        asked.send(LimitMail::Reserve { shard: 0, reservation: reservation("a", NOW, 9) }).unwrap();
        assert_eq!(answers.recv(), Ok(0));
        asked.send(LimitMail::Leave(vec![("a".into(), Past::default())])).unwrap();
        asked.send(LimitMail::Stop).unwrap();
        thread.join().unwrap().unwrap();
        fs::remove_dir(&in_the_way).unwrap();
        let (_, past) = LimitFile::open(directory.path(), NOW, true).unwrap();
        assert_eq!(past["a"].reserved, [(NOW, 9)]);
    }
}
