//! A target without libFuzzer, for `cargo test`: its seeds, then mutations of them, the same ones each time.
//!
//! `FUZZ_SECONDS` sets how long to go on, from another start each time; what is found is printed as a Rust byte string.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fs, panic};

pub(crate) fn smoke(target: &str, rounds: u32, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut paths: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(seeds.len() >= 4, "{target} has {} seeds", seeds.len());
    seeds.iter().for_each(|seed| observed(seed, run));

    let time =
        env::var("FUZZ_SECONDS").ok().map(|text| Duration::from_secs(text.parse().expect("a number of seconds")));
    let begin = Instant::now();
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let mut random = Random(if time.is_some() { start } else { 7 });
    let mut done = 0_u64;
    while time.map_or(done < u64::from(rounds), |time| begin.elapsed() < time) {
        observed(&mutate(&seeds, &mut random), run);
        done += 1;
    }
    println!("{target}: {} seeds, {done} mutations", seeds.len());
}

fn observed(octets: &[u8], run: fn(&[u8])) {
    if let Err(panicked) = panic::catch_unwind(|| run(octets)) {
        println!("input: b\"{}\"", octets.escape_ascii());
        panic::resume_unwind(panicked);
    }
}

/// A seed, perhaps with the end of another, changed in a few places.
fn mutate(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut octets = seeds[random.below(seeds.len())].clone();
    if random.below(4) == 0 {
        let other = &seeds[random.below(seeds.len())];
        octets.truncate(random.below(octets.len() + 1));
        octets.extend_from_slice(&other[random.below(other.len() + 1)..]);
    }
    for _ in 0..=random.below(6) {
        let at = random.below(octets.len() + 1);
        let octet = match random.below(3) {
            0 => b"\0\r\n.: -<>@\"0592ST\xff"[random.below(18)],
            _ => random.below(256) as u8,
        };
        match random.below(6) {
            0 => octets.truncate(at),
            1 => octets.insert(at, octet),
            2 if at < octets.len() => drop(octets.remove(at)),
            3 if at < octets.len() => octets[at] ^= 1 << random.below(8),
            4 => {
                let length = random.below(40).min(octets.len() - at);
                let again = octets[at..at + length].to_vec();
                let to = random.below(octets.len() + 1);
                octets.splice(to..to, again);
            }
            _ if at < octets.len() => octets[at] = octet,
            _ => octets.push(octet),
        }
    }
    octets
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}
