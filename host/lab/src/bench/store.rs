//! The embedding store: random batched reads beside the raw copy of rows whose places are known, which is as fast as the
//! machine goes, and beside other embedded stores; the tail of reads while a writer updates rows; what opening costs.
//!
//! Everything lies in a temporary folder, which is removed at the end.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hypercast_store::{Adagrad, RowFormat, Store, StoreOptions, StoreReader, Verify};

use crate::bench::report::{Report, Rival};
use crate::bench::{Options, rivals};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::quantile::quantile;

/// Values a row.
pub(super) const DIM: usize = 64;
/// Ids a read.
const BATCH: usize = 512;
/// Reads of a timed repetition.
const READS: usize = 400;
/// How far ahead the raw copy with prefetch looks.
const AHEAD: usize = 8;
/// Updates a second while reads are timed, and how many are committed at once.
const UPDATES_A_SECOND: f64 = 100_000.0;
const UPDATES_A_COMMIT: usize = 10_000;
/// A rival that has not loaded all rows by then is measured with those it has.
const LOADING: Duration = Duration::from_secs(150);

/// Which rows a bench reads.
pub(super) struct Pattern {
    rows: Vec<usize>,
    ids: Vec<u64>,
}

impl Pattern {
    /// Random reads of a store of so many rows.
    fn new(rows: usize) -> Pattern {
        let rows: Vec<usize> =
            (0..READS * BATCH).map(|at| mix(at as u64) as usize % rows).collect();
        let ids = rows.iter().map(|&row| id(row)).collect();
        Pattern { rows, ids }
    }

    /// Reads all of it by `read`, which gives the number of missing ids; adds each read's time.
    fn time(&self, read: &mut Read<'_>, times_us: &mut Vec<f64>) {
        let mut out = vec![0.0; BATCH * DIM];
        for (rows, ids) in self.rows.chunks_exact(BATCH).zip(self.ids.chunks_exact(BATCH)) {
            let start = Instant::now();
            let missing = read(Batch { rows, ids }, &mut out);
            times_us.push(start.elapsed().as_secs_f64() * 1e6);
            assert_eq!(missing, 0, "every row is there");
        }
    }

    /// The median microseconds of a read by each, in turns, after one turn of each that does not count. Single reads are
    /// timed: they are short beside the slices in which a busy machine gives its cores away.
    fn medians_us(&self, runs: usize, contenders: &mut [Box<Read<'_>>]) -> Vec<f64> {
        let mut times = vec![Vec::new(); contenders.len()];
        for run in 0..=runs {
            for (times, contender) in times.iter_mut().zip(contenders.iter_mut()) {
                if run == 1 {
                    times.clear();
                }
                self.time(contender, times);
            }
        }
        times.into_iter().map(|mut times| quantile(&mut times, 0.5)).collect()
    }
}

/// One read's rows, by number and by id.
#[derive(Clone, Copy)]
struct Batch<'a> {
    rows: &'a [usize],
    ids: &'a [u64],
}

/// A read; gives the number of missing ids.
type Read<'a> = dyn FnMut(Batch<'_>, &mut [f32]) -> usize + 'a;

/// Million rows a second.
fn speed(read_us: f64) -> f64 {
    BATCH as f64 / read_us
}

/// The id of a row: spread over the whole range.
pub(super) fn id(row: usize) -> u64 {
    mix(row as u64 + 0x0123_4567)
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Measures the store.
///
/// # Errors
/// A temporary folder that cannot be made or filled.
pub(super) fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let folder = Folder::new()?;
    let rows = options.rows;
    let ours = folder.0.join("ours");
    let took = load(&ours, rows)?;
    let of = format!("{} rows of {DIM} f32", count(rows));
    report.add(format!("store: load {of}"), (took.as_secs_f64(), "s"), None);
    report.add("store: bytes a row, index included", (bytes(&ours)? / rows as f64, "bytes"), None);
    if options.wants("reads") {
        reads(options, report, &ours, &of)?;
    }
    if options.wants("open") {
        open(options, report, &ours, &of)?;
    }
    if options.wants("writer") {
        beside_a_writer(options, report, &ours, &of)?;
    }
    if options.wants("formats") {
        formats(options, report, &folder.0)?;
    }
    if options.wants("rivals") {
        against_rivals(options, report, &folder.0)?;
    }
    Ok(())
}

fn load(dir: &Path, rows: usize) -> Result<Duration> {
    const PART: usize = 8192;
    let start = Instant::now();
    let mut store = Store::create(dir, &StoreOptions { dim: DIM, init_scale: 0.1, seed: 1 })?;
    let mut out = vec![0.0; PART * DIM];
    for first in (0..rows).step_by(PART) {
        let ids: Vec<u64> = (first..rows.min(first + PART)).map(id).collect();
        store.gather_or_init(&ids, &mut out[..ids.len() * DIM])?;
        if (first / PART).is_multiple_of(32) {
            store.commit()?;
        }
    }
    store.checkpoint()?;
    Ok(start.elapsed())
}

fn reads(options: &Options, report: &mut Report, ours: &Path, of: &str) -> Result<()> {
    let reader = StoreReader::open_with(ours, Verify::Journal)?;
    let raw = plain_copy(&reader, options.rows);
    let pattern = Pattern::new(options.rows);
    let mut contenders: Vec<Box<Read<'_>>> = vec![
        Box::new(|batch, out| reader.gather(batch.ids, out)),
        Box::new(|batch, out| raw_copy(&raw, batch.rows, out, None)),
        Box::new(|batch, out| raw_copy(&raw, batch.rows, out, Some(AHEAD))),
    ];
    let took = pattern.medians_us(options.runs, &mut contenders);
    let name = format!("store: {BATCH} random rows a read, of {of}");
    let raw_loops = ["a raw copy, places known", "a raw copy, places known, with prefetch"];
    for (rival, took_raw) in raw_loops.into_iter().zip(&took[1..]) {
        let rival = Rival { name: rival.to_owned(), value: speed(*took_raw) };
        report.add(name.clone(), (speed(took[0]), "Mrows/s"), Some(rival));
    }
    Ok(())
}

/// The rows in the order of their numbers, in an array.
fn plain_copy(reader: &StoreReader, rows: usize) -> Vec<f32> {
    const PART: usize = 4096;
    let mut raw = vec![0.0; rows * DIM];
    for (part, out) in raw.chunks_mut(PART * DIM).enumerate() {
        let ids: Vec<u64> = (part * PART..).map(id).take(out.len() / DIM).collect();
        assert_eq!(reader.gather(&ids, out), 0, "every row is there");
    }
    raw
}

fn raw_copy(raw: &[f32], rows: &[usize], out: &mut [f32], ahead: Option<usize>) -> usize {
    for (at, (&row, out)) in rows.iter().zip(out.chunks_exact_mut(DIM)).enumerate() {
        if let Some(&next) = ahead.and_then(|ahead| rows.get(at + ahead)) {
            prefetch(&raw[next * DIM..][..DIM]);
        }
        out.copy_from_slice(&raw[row * DIM..][..DIM]);
    }
    0
}

fn prefetch(row: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, and every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

fn open(options: &Options, report: &mut Report, ours: &Path, of: &str) -> Result<()> {
    let took = |verify| -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..options.runs.min(5) {
            let start = Instant::now();
            StoreReader::open_with(ours, verify)?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(quantile(&mut times, 0.5))
    };
    let full = Rival { name: "with every checksum".into(), value: took(Verify::Full)? };
    let name = format!("store: open {of}, journal checked");
    report.add(name, (took(Verify::Journal)?, "ms"), Some(full));
    Ok(())
}

fn beside_a_writer(options: &Options, report: &mut Report, ours: &Path, of: &str) -> Result<()> {
    let mut store = Store::open_with(ours, Verify::Journal)?;
    let handle = store.handle()?;
    let pattern = Pattern::new(options.rows);
    let mut alone = Vec::new();
    let mut beside = Vec::new();
    let mut updates = 0.0;
    // In turns, so that what else the machine does meets both alike.
    for _ in 0..options.runs.max(3) {
        let mut read = |batch: Batch<'_>, out: &mut [f32]| handle.gather(batch.ids, out);
        pattern.time(&mut read, &mut alone);
        let stop = AtomicBool::new(false);
        let rate = std::thread::scope(|scope| {
            let writer = scope.spawn(|| update(&mut store, options.rows, &stop));
            // The first commit makes the overlay that the later ones fill.
            std::thread::sleep(Duration::from_millis(200));
            for _ in 0..5 {
                pattern.time(&mut read, &mut beside);
            }
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        updates += rate / options.runs.max(3) as f64;
    }
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let rival = Rival { name: "without a writer".into(), value: quantile(&mut alone, share) };
        let name = format!("store: {name} of {BATCH} rows of {of} beside a writer");
        report.add(name, (quantile(&mut beside, share), "us"), Some(rival));
    }
    report.add("store: rows the writer updated a second", (updates, "rows/s"), None);
    Ok(())
}

/// Trains random rows at the set rate until it is told to stop; gives the rate that it reached.
fn update(store: &mut Store, rows: usize, stop: &AtomicBool) -> Result<f64> {
    const PART: usize = 1000;
    let adagrad = Adagrad { learning_rate: 0.01, epsilon: 1e-6 };
    let grads = vec![0.01; PART * DIM];
    let start = Instant::now();
    let mut updated = 0;
    while !stop.load(Ordering::Relaxed) {
        let ids: Vec<u64> =
            (updated..updated + PART).map(|at| id(mix(!(at as u64)) as usize % rows)).collect();
        store.adagrad(&ids, &grads, &adagrad)?;
        updated += PART;
        if updated.is_multiple_of(UPDATES_A_COMMIT) {
            store.commit()?;
        }
        let due = Duration::from_secs_f64(updated as f64 / UPDATES_A_SECOND);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
    Ok(updated as f64 / start.elapsed().as_secs_f64())
}

fn formats(options: &Options, report: &mut Report, folder: &Path) -> Result<()> {
    let store = StoreReader::open_with(folder.join("ours"), Verify::Journal)?;
    let pattern = Pattern::new(options.rows);
    for format in [RowFormat::Bf16, RowFormat::Int8] {
        let dir = folder.join("snapshot");
        store.snapshot_into(&dir, format)?;
        let reader = StoreReader::open_with(&dir, Verify::Journal)?;
        let mut contenders: Vec<Box<Read<'_>>> = vec![
            Box::new(|batch, out| reader.gather(batch.ids, out)),
            Box::new(|batch, out| store.gather(batch.ids, out)),
        ];
        let took = pattern.medians_us(options.runs, &mut contenders);
        drop(contenders);
        let name = format!("store: {BATCH} random rows a read, kept as {format:?}");
        let rival = Rival { name: "kept as F32".into(), value: speed(took[1]) };
        report.add(name, (speed(took[0]), "Mrows/s"), Some(rival));
        let name = format!("store: bytes a row, kept as {format:?}");
        report.add(name, (bytes(&dir)? / options.rows as f64, "bytes"), None);
        drop(reader);
        std::fs::remove_dir_all(&dir).map_err(Error::io(&dir))?;
    }
    Ok(())
}

/// Each rival holds the same rows, or as many as it loads in time; then our store has as many.
fn against_rivals(options: &Options, report: &mut Report, folder: &Path) -> Result<()> {
    let rivals = rivals::all();
    if rivals.is_empty() {
        report.note(
            "redb, LMDB (heed) and fjall are not built in: build with `--features rivals` to be compared with them",
        );
    }
    for rival in rivals {
        let dir = folder.join("rival");
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let all = StoreReader::open_with(folder.join("ours"), Verify::Journal)?;
        let start = Instant::now();
        let loaded = rival.load(&dir, &all, options.rows, start + LOADING)?;
        drop(all);
        report.add(
            format!("{}: load {} rows", rival.name, count(loaded)),
            (start.elapsed().as_secs_f64(), "s"),
            None,
        );
        let small = folder.join("ours-small");
        let ours = if loaded < options.rows {
            load(&small, loaded)?;
            &small
        } else {
            &folder.join("ours")
        };
        against(options, report, &rival, (ours, &dir), loaded)?;
        for dir in [&dir, &small] {
            if dir.exists() {
                std::fs::remove_dir_all(dir).map_err(Error::io(dir))?;
            }
        }
    }
    Ok(())
}

fn against(
    options: &Options,
    report: &mut Report,
    rival: &rivals::Rival,
    (ours, theirs): (&Path, &Path),
    rows: usize,
) -> Result<()> {
    let reader = StoreReader::open_with(ours, Verify::Journal)?;
    let pattern = Pattern::new(rows);
    let took = rival.with_reader(theirs, &mut |read| {
        let mut contenders: Vec<Box<Read<'_>>> = vec![
            Box::new(|batch, out| reader.gather(batch.ids, out)),
            Box::new(|batch, out| read(batch.ids, out)),
        ];
        pattern.medians_us(options.runs.min(5), &mut contenders)
    })?;
    let of = format!("{} rows of {DIM} f32", count(rows));
    let name = format!("store: {BATCH} random rows a read, of {of}");
    let them = Rival { name: rival.name.to_owned(), value: speed(took[1]) };
    report.add(name, (speed(took[0]), "Mrows/s"), Some(them));
    let them = Rival { name: rival.name.to_owned(), value: bytes(theirs)? / rows as f64 };
    report.add("store: bytes a row on disk", (bytes(ours)? / rows as f64, "bytes"), Some(them));
    Ok(())
}

/// Bytes of a folder's files.
fn bytes(dir: &Path) -> Result<f64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let meta = entry.metadata().map_err(Error::io(dir))?;
        sum += if meta.is_dir() { bytes(&entry.path())? as u64 } else { meta.len() };
    }
    Ok(sum as f64)
}

fn count(rows: usize) -> String {
    match rows {
        rows if rows.is_multiple_of(1_000_000) => format!("{} million", rows / 1_000_000),
        rows => rows.to_string(),
    }
}

/// A folder that goes when the bench does.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("hypercast-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(Error::io(&path))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{}: {error}; remove it by hand", self.0.display());
        }
    }
}
