//! The file in which limits over a minute or longer are reserved ahead, and the thread that alone writes it.
//!
//! `limits` in the spool's directory has one line for each reservation, in the order in which they were asked for: wall
//! time in milliseconds, units, the limit's name. A reservation is answered once its line is durable; all that wait are
//! written and synced together. At the start, and when the file has grown, what no longer counts is left out: the rest
//! goes to a file beside it, which then takes its place.
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

use crate::limits::{LIMIT_FILE_BYTES_MAX, LIMIT_FILE_RETRY_PAUSE, LIMIT_PERIOD_MAX};
use crate::pool::rate::PastLimits;
use crate::shard::Reservation;

pub(crate) struct LimitFile {
    path: PathBuf,
    file: File,
    /// Whole lines that were written.
    octets: u64,
    is_synced: bool,
}

/// What the thread is told. It does not end by itself: a shard whose operations hang keeps its sender.
#[derive(Debug)]
pub(crate) enum LimitMail {
    Reserve { shard: usize, reservation: Reservation },
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
        let past = read(&text, now_ms);
        let (file, octets) = replace(&path, &past, is_synced)?;
        Ok((Self { path, file, octets, is_synced }, past))
    }

    /// Serves until it is told to stop. `tell` gives a shard its answer.
    pub(crate) fn start(
        mut self,
        tell: impl Fn(usize, Reservation) + Send + 'static,
    ) -> io::Result<(Sender<LimitMail>, JoinHandle<io::Result<()>>)> {
        let (sender, asked) = channel();
        let thread = std::thread::Builder::new().name("limits".to_owned()).spawn(move || {
            self.serve(&asked, tell);
            Ok(())
        })?;
        Ok((sender, thread))
    }

    fn serve(&mut self, asked: &Receiver<LimitMail>, tell: impl Fn(usize, Reservation)) {
        while let Ok(first) = asked.recv() {
            let mut batch = Vec::new();
            for mail in std::iter::once(first).chain(asked.try_iter()) {
                match mail {
                    LimitMail::Reserve { shard, reservation } => batch.push((shard, reservation)),
                    LimitMail::Stop => return,
                }
            }
            let mut lines: String = batch.iter().map(|(_, reservation)| line(reservation)).collect();
            while let Err(error) = self.append(lines.as_bytes()) {
                let path = self.path.display();
                tracing::error!(%error, "{path} can not be written; mail under limits over a minute or longer waits");
                match asked.recv_timeout(LIMIT_FILE_RETRY_PAUSE) {
                    Ok(LimitMail::Reserve { shard, reservation }) => {
                        lines.push_str(&line(&reservation));
                        batch.push((shard, reservation));
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(LimitMail::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            let now_ms = batch.iter().map(|(_, reservation)| reservation.at_ms).max().unwrap_or_default();
            for (shard, reservation) in batch {
                tell(shard, reservation);
            }
            if self.octets > LIMIT_FILE_BYTES_MAX
                && let Err(error) = self.shorten(now_ms)
            {
                tracing::warn!(%error, "{} grows", self.path.display());
            }
        }
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

    fn shorten(&mut self, now_ms: u64) -> io::Result<()> {
        let text = fs::read(&self.path)?;
        let past = read(&String::from_utf8_lossy(&text), now_ms);
        (self.file, self.octets) = replace(&self.path, &past, self.is_synced)?;
        Ok(())
    }
}

fn line(reservation: &Reservation) -> String {
    let Reservation { limit, at_ms, units } = reservation;
    format!("{at_ms} {units} {limit}\n")
}

/// The reservations that may still count: a limiter takes each as used when the second after it was asked for.
fn read(text: &str, now_ms: u64) -> PastLimits {
    let mut past: PastLimits = PastLimits::new();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for (limit, reservation) in whole.lines().filter_map(parse) {
        past.entry(limit.to_owned()).or_default().push(reservation);
    }
    let forgotten_ms = now_ms.saturating_sub(LIMIT_PERIOD_MAX.as_millis() as u64);
    past.retain(|_, reservations| {
        let old = reservations.iter().take_while(|(at_ms, _)| *at_ms < forgotten_ms).count();
        reservations.drain(..old.saturating_sub(2));
        reservations.last().is_some_and(|(at_ms, _)| *at_ms >= forgotten_ms)
    });
    past
}

/// The limit, when it was reserved and how much.
fn parse(line: &str) -> Option<(&str, (u64, u32))> {
    let mut parts = line.splitn(3, ' ');
    let reservation = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some((parts.next()?, reservation))
}

/// Lines that are whole and no reservations.
fn damaged_lines(text: &str) -> usize {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter(|line| parse(line).is_none()).count()
}

/// Puts a file with these lines in the place of the one that is there.
fn replace(path: &Path, past: &PastLimits, is_synced: bool) -> io::Result<(File, u64)> {
    let unfinished = path.with_extension("new");
    let mut lines = String::new();
    for (limit, reservations) in past {
        let limit: Arc<str> = limit.as_str().into();
        for &(at_ms, units) in reservations {
            lines.push_str(&line(&Reservation { limit: Arc::clone(&limit), at_ms, units }));
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
        Reservation { limit: limit.into(), at_ms, units }
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
            assert_eq!(past["recipients by ip-a at mx.test"], [(NOW, 5)]);
            assert_eq!(past["b"], [(NOW + 1, 7)]);
        }
    }

    #[test]
    fn damage_is_seen_and_costs_nothing_else() {
        let text = "1800000000000 5 a\n\0\0\0\n1800000000001 x b\n1800000000002 7 a b\n1800000000003 9 cut o";
        assert_eq!(damaged_lines(text), 2);
        let past = read(text, NOW);
        assert_eq!((past.len(), &past["a"][..], &past["a b"][..]), (2, &[(NOW, 5)][..], &[(NOW + 2, 7)][..]));
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
        let steps: Vec<u64> = past["a"].iter().map(|(at_ms, _)| (at_ms - NOW) / (DAY / 4)).collect();
        assert_eq!(steps, [3, 4, 5, 6, 7, 8, 9], "a day's, and two before that may have been used in it");
    }
}
