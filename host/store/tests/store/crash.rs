//! `kill -9` at random moments, and checkpoints and commits cut off at every
//! step: the store opens to the last committed generation, bit for bit.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use hypercast_core::error::ErrorKind;
use hypercast_store::{Adagrad, Error, Store, StoreOptions, StoreReader};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::model::{Model, exact_grads};

const DIR: &str = "HYPERCAST_STORE_CRASH_DIR";
/// How often the child is killed, where it should not be 20 times.
const ROUNDS: &str = "HYPERCAST_STORE_CRASH_ROUNDS";
const OPTIONS: StoreOptions = StoreOptions { dim: 4, init_scale: 0.1, seed: 11 };
const STEP: Adagrad = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };

/// The updates that lead to a generation: about a thousand new ids and as many old ones.
fn updates(generation: u64) -> (Vec<u64>, Vec<f32>) {
    let mut rng = StdRng::seed_from_u64(generation);
    let end = generation * 1000;
    let mut ids: Vec<u64> = (0..2000)
        .map(|i| if i < 1000 { end + i } else { rng.random_range(0..=end) })
        .map(|id| id.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .collect();
    ids.sort_unstable();
    ids.dedup();
    let grads = exact_grads(&mut rng, ids.len() * OPTIONS.dim);
    (ids, grads)
}

/// What leaves the store before a generation is committed: a few ids of three generations ago,
/// which come back later.
fn expired(generation: u64) -> Vec<u64> {
    match generation.checked_sub(3) {
        Some(old) if generation.is_multiple_of(4) => {
            updates(old).0.into_iter().step_by(40).collect()
        }
        _ => Vec::new(),
    }
}

/// The child: commits generation after generation until it is killed, while threads read what is
/// committed.
fn write_forever(dir: &Path) {
    let opened = match Store::open(dir) {
        Err(Error::NotAStore { .. }) => Store::create(dir, &OPTIONS),
        other => other,
    };
    let mut store = opened.unwrap();
    let handle = store.handle().unwrap();
    std::thread::spawn(move || {
        let mut out = vec![0.0; 2000 * OPTIONS.dim];
        for generation in (1..=handle.generation().max(10)).cycle() {
            let (ids, _) = updates(generation);
            handle.gather(&ids, &mut out[..ids.len() * OPTIONS.dim]).unwrap();
            std::thread::sleep(Duration::from_micros(100));
        }
    });
    println!("open");
    loop {
        let (ids, grads) = updates(store.generation() + 1);
        let half = ids.len() / 2;
        let (first, second) = grads.split_at(half * OPTIONS.dim);
        store.adagrad(&ids[..half], first, &STEP).unwrap();
        store.adagrad(&ids[half..], second, &STEP).unwrap();
        store.remove_rows(&expired(store.generation() + 1));
        let generation = store.commit().unwrap();
        println!("committed {generation}");
        if generation.is_multiple_of(2) {
            // The parent's reader may stand in its way for a moment, which is well.
            store.checkpoint().unwrap();
        }
    }
}

#[test]
fn kill_nine_loses_nothing_committed_and_shows_nothing_else() {
    if let Some(dir) = std::env::var_os(DIR) {
        return write_forever(Path::new(&dir));
    }
    let rounds = std::env::var(ROUNDS).map_or(20, |rounds| rounds.parse().expect("a number"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let mut rng = StdRng::seed_from_u64(now.as_nanos() as u64);
    // A store that grows for ever would only make the comparison longer.
    for first in (0..rounds).step_by(20) {
        kill_and_check(&mut rng, rounds.min(first + 20) - first);
    }
}

/// Kills the writer of a new store so many times, and looks each time at what is left.
fn kill_and_check(rng: &mut StdRng, rounds: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::new(&OPTIONS);
    let mut replayed = 0;
    for round in 0..rounds {
        let mut child = spawn(dir.path());
        let printed = follow_and_kill(&mut child, dir.path(), rng.random_range(1..120));
        let mut store = Store::open(dir.path()).expect("a dead writer's lock is taken over");
        let generation = store.generation();
        assert!(
            generation == printed || generation == printed + 1,
            "round {round}: generation {generation} after {printed} was printed",
        );
        for generation in replayed + 1..=generation {
            let (ids, grads) = updates(generation);
            model.adagrad(&ids, &grads, &STEP);
            for id in expired(generation) {
                model.rows.remove(&id);
            }
        }
        replayed = generation;
        model.check_store(&store);
        model.check_reader(&StoreReader::open(dir.path()).unwrap());
        model.check_state(&mut store);
    }
    assert!(replayed > 0, "the rounds made progress");
    println!("{rounds} kills, {replayed} generations");
}

fn spawn(dir: &Path) -> Child {
    let name = "crash::kill_nine_loses_nothing_committed_and_shows_nothing_else";
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Kills the child some time after it has opened the store; gives the last generation
/// it printed, or the one it had found.
fn follow_and_kill(child: &mut Child, dir: &Path, after_ms: u64) -> u64 {
    let output = BufReader::new(child.stdout.take().unwrap());
    let (opened, is_open) = mpsc::channel();
    let follower = std::thread::spawn(move || {
        let mut printed = None;
        for line in output.lines().map_while(Result::ok) {
            // The test harness begins the same line.
            if line.ends_with("open") {
                opened.send(()).unwrap();
            }
            if let Some(generation) = line.strip_prefix("committed ") {
                printed = Some(generation.parse::<u64>().unwrap());
            }
        }
        printed
    });
    is_open.recv().expect("the child opens the store");
    let found = StoreReader::open(dir).unwrap().generation();
    match Store::open(dir) {
        Err(error @ Error::Locked { .. }) => {
            assert_eq!(error.kind(), ErrorKind::Refused);
            let (why, dir) = (error.to_string(), dir.display());
            let holder = format!("{dir} is open for writing in process {}; stop", child.id());
            assert!(why.contains(&holder), "{why}");
        }
        other => panic!("two writers: {other:?}"),
    }
    std::thread::sleep(Duration::from_millis(after_ms));
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9), "it did not end by itself");
    follower.join().unwrap().unwrap_or(found).max(found)
}

#[test]
fn a_checkpoint_cut_off_anywhere_is_as_if_it_had_not_begun() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let mut model = Model::new(&OPTIONS);
    let mut store = Store::create(at("s"), &OPTIONS).unwrap();
    for generation in 1..=6 {
        let (ids, grads) = updates(generation);
        model.adagrad(&ids, &grads, &STEP);
        store.adagrad(&ids, &grads, &STEP).unwrap();
        store.commit().unwrap();
        if generation == 3 {
            store.checkpoint().unwrap();
        }
    }
    copy(&at("s"), &at("before"));
    assert!(store.checkpoint().unwrap());
    drop(store);
    let files = ["rows-00000.slab", "state-00000.slab", "index.table"];
    for changed in 0..1 << files.len() {
        for half in [false, true] {
            copy(&at("before"), &at("cut"));
            for (_, file) in files.iter().enumerate().filter(|(i, _)| changed >> i & 1 == 1) {
                let mut bytes = std::fs::read(at("s").join(file)).unwrap();
                let old = std::fs::read(at("before").join(file)).unwrap();
                if half && bytes.len() == old.len() {
                    // Pages reach the disk in any order: take every other one.
                    for (new, old) in bytes.chunks_mut(4096).zip(old.chunks(4096)).step_by(2) {
                        new.copy_from_slice(old);
                    }
                }
                std::fs::write(at("cut").join(file), bytes).unwrap();
            }
            model.check_reader(&StoreReader::open(at("cut")).unwrap());
            let mut store = Store::open(at("cut")).unwrap();
            assert_eq!(store.generation(), 6);
            model.check_store(&store);
            assert!(store.checkpoint().unwrap());
            model.check_store(&store);
            drop(store);
            model.check_state(&mut Store::open(at("cut")).unwrap());
            std::fs::remove_dir_all(at("cut")).unwrap();
        }
    }
}

#[test]
fn a_commit_cut_off_anywhere_is_as_if_it_had_not_begun() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let mut model = Model::new(&OPTIONS);
    let mut store = Store::create(at("s"), &OPTIONS).unwrap();
    let mut journals = Vec::new();
    for generation in 1..=2 {
        let (ids, grads) = updates(generation);
        if generation == 1 {
            model.adagrad(&ids, &grads, &STEP);
        }
        store.adagrad(&ids, &grads, &STEP).unwrap();
        store.commit().unwrap();
        journals.push(std::fs::read(at("s").join("journal")).unwrap());
    }
    drop(store);
    let (old, new) = (&journals[0], &journals[1]);
    for keep in (old.len()..=new.len()).step_by(new.len() / 50) {
        // The new record is there up to `keep`, the head is still the old one.
        let mut bytes = new[..keep].to_vec();
        bytes[..64].copy_from_slice(&old[..64]);
        std::fs::write(at("s").join("journal"), bytes).unwrap();
        let mut store = Store::open(at("s")).unwrap();
        assert_eq!(store.generation(), 1);
        model.check_store(&store);
        model.check_state(&mut store);
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
