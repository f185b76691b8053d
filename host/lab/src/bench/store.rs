//! The embedding store: random batched reads beside a raw copy of rows whose places are known,
//! which is the machine's limit, and beside other embedded stores; the tail of reads beside a
//! writer; the cost of opening; and, where memory is too small for the store, reads from the disk
//! beside what the disk gives.
//!
//! Everything is in a temporary folder (`TMPDIR`), which is removed at the end.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use hypercast_core::{hash::mix64, quantile::quantile};
use hypercast_store::{Adagrad, RowFormat, Store, StoreOptions, StoreReader, Verify};

use super::{
    BenchOptions, BenchReport,
    direct_reads::{DirectReads, bytes_from_disk, page_size},
    rivals,
    timing::{Contender, MS, Rival, Scale, timed},
};
use crate::error::{CommonErrors as _, Error, Result};

/// The groups of figures, in the order in which they are measured.
pub(super) const GROUPS: [&str; 6] = ["reads", "disk", "open", "writer", "formats", "rivals"];

/// Values per row.
pub(super) const DIM: usize = 64;

/// Ids per read.
const BATCH: usize = 512;

/// Reads per timed repetition.
const READS: usize = 400;

/// How many rows ahead the raw copy prefetches.
const PREFETCH_AHEAD: usize = 8;

/// Reads from the disk per timed repetition, each of rows that are drawn anew: some come again.
const DISK_READS: usize = 40;

/// Rows per second that the writer updates while reads are timed, and how many it commits at once.
const UPDATES_PER_SECOND: f64 = 100_000.0;
const UPDATES_PER_COMMIT: usize = 10_000;

/// The bench's folder is its own, so no other program cuts a file.
pub(super) const WHOLE: &str = "the store's files are whole";

/// The random rows of a read pattern.
pub(super) struct ReadPattern {
    rows: Vec<usize>,
    ids: Vec<u64>,
}

/// A read of rows, given by number and by id; returns the number of missing ids.
type ReadFn<'a> = dyn FnMut(&[usize], &[u64], &mut [f32]) -> usize + 'a;

impl ReadPattern {
    /// Random reads of a store of `rows` rows.
    fn new(rows: usize) -> ReadPattern {
        let random = |at: usize| mix64(at as u64) as usize % rows;
        let rows: Vec<usize> = (0..READS * BATCH).map(random).collect();
        let ids = rows.iter().map(|&row| id(row)).collect();
        ReadPattern { rows, ids }
    }

    /// Does every read, and adds the seconds of each to `times_s`. Single reads are timed, since
    /// they are short beside the time slices of a busy machine.
    fn time(&self, read: &mut ReadFn<'_>, times_s: &mut Vec<f64>) {
        let mut out = vec![0.0; BATCH * DIM];
        for (rows, ids) in self.rows.chunks_exact(BATCH).zip(self.ids.chunks_exact(BATCH)) {
            let start = Instant::now();
            let missing = read(rows, ids, &mut out);
            times_s.push(start.elapsed().as_secs_f64());
            assert_eq!(missing, 0, "every row exists");
        }
    }

    /// A contender that reads so.
    fn read_by<'a>(
        &'a self,
        mut read: impl FnMut(&[usize], &[u64], &mut [f32]) -> usize + 'a,
    ) -> Contender<'a> {
        Box::new(move |times_s| {
            self.time(&mut read, times_s);
            Ok(())
        })
    }

    fn gather<'a>(&'a self, reader: &'a StoreReader) -> Contender<'a> {
        self.read_by(|_, ids, out| reader.gather(ids, out).expect(WHOLE))
    }
}

/// Millions of rows per second.
fn speed(read_s: f64) -> f64 {
    BATCH as f64 / (read_s * 1e6)
}

/// The id of a row: spread over the whole range.
pub(super) fn id(row: usize) -> u64 {
    mix64(row as u64 + 0x0123_4567)
}

/// Measures the store.
///
/// # Errors
/// A temporary folder that cannot be made or filled.
pub(super) fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = super::temporary()?;
    let bench = StoreBench { options, dir: dir.path() };
    let start = Instant::now();
    load(&bench.ours(), options.rows)?;
    report.figure(format!("store: load {}", bench.size()), start.elapsed().as_secs_f64(), "s");
    let bytes = bench.bytes_a_row(&bench.ours())?;
    report.figure("store: bytes a row, index included", bytes, "bytes");
    let measures: [StoreGroup<'_>; GROUPS.len()] = [
        StoreBench::reads,
        StoreBench::reads_from_disk,
        StoreBench::open,
        StoreBench::beside_a_writer,
        StoreBench::formats,
        StoreBench::rivals,
    ];
    for (group, measure) in GROUPS.iter().zip(measures) {
        if options.wants(group) {
            measure(&bench, report)?;
        }
    }
    Ok(())
}

/// Adds the figures of a group.
type StoreGroup<'a> = fn(&StoreBench<'a>, &mut BenchReport) -> Result<()>;

/// Fills a new store.
fn load(dir: &Path, rows: usize) -> Result<()> {
    const PART: usize = 8192;
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
    Ok(())
}

struct StoreBench<'a> {
    options: &'a BenchOptions,
    dir: &'a Path,
}

impl StoreBench<'_> {
    fn ours(&self) -> std::path::PathBuf {
        self.dir.join("ours")
    }

    fn reader(&self) -> Result<StoreReader> {
        Ok(StoreReader::open_with(self.ours(), Verify::Journal)?)
    }

    /// `10 million rows of 64 f32`.
    fn size(&self) -> String {
        let rows = self.options.rows;
        let rows = if rows.is_multiple_of(1_000_000) {
            format!("{} million", rows / 1_000_000)
        } else {
            rows.to_string()
        };
        format!("{rows} rows of {DIM} f32")
    }

    fn bytes_a_row(&self, dir: &Path) -> Result<f64> {
        Ok(bytes(dir)? as f64 / self.options.rows as f64)
    }

    fn reads(&self, report: &mut BenchReport) -> Result<()> {
        let reader = self.reader()?;
        let raw = plain_copy(&reader, self.options.rows);
        let pattern = ReadPattern::new(self.options.rows);
        let raw = |ahead| {
            let raw = &raw;
            pattern.read_by(move |rows, _, out| raw_copy(raw, rows, out, ahead))
        };
        let rivals = vec![
            Rival { name: "a raw copy, places known", run: raw(None) },
            Rival {
                name: "a raw copy, places known, with prefetch",
                run: raw(Some(PREFETCH_AHEAD)),
            },
        ];
        let name = format!("store: {BATCH} random rows a read, of {}", self.size());
        let ours = pattern.gather(&reader);
        report.race(
            &name,
            Scale { unit: "Mrows/s", of_seconds: speed },
            self.options.runs,
            ours,
            rivals,
        )?;
        Ok(())
    }

    fn reads_from_disk(&self, report: &mut BenchReport) -> Result<()> {
        let reader = self.reader()?;
        if !reader.is_larger_than_memory() {
            report.note(
                "the store fits into memory, so no reads from the disk: give more --rows, or run \
                 in a control group whose memory is a part of the store",
            );
            return Ok(());
        }
        let disk = DirectReads::open(&self.ours());
        let mut random = (0..).map(|at| mix64(!at));
        let mut out = vec![0.0; BATCH * DIM];
        let (mut rows_read, mut bytes_read) = (0, Ok::<u64, String>(0));
        let ours: Contender<'_> = Box::new(|times_s| {
            let before = bytes_from_disk();
            for _ in 0..DISK_READS {
                let row = |random| id(random as usize % self.options.rows);
                let ids: Vec<u64> = random.by_ref().take(BATCH).map(row).collect();
                let start = Instant::now();
                reader.gather(&ids, &mut out).expect(WHOLE);
                times_s.push(start.elapsed().as_secs_f64());
            }
            rows_read += DISK_READS * BATCH;
            let now = before.and_then(|before| Ok(bytes_from_disk()? - before));
            bytes_read = bytes_read.clone().and_then(|bytes| Ok(bytes + now?));
            Ok(())
        });
        let mut rivals = Vec::new();
        match &disk {
            Ok(disk) => {
                let run: Contender<'_> = Box::new(|times_s| {
                    times_s.push(disk.read_pages(DISK_READS * BATCH)? / DISK_READS as f64);
                    Ok(())
                });
                rivals.push(Rival { name: "single pages, 64 at once, past the cache", run });
            }
            Err(error) => report.note(format!(
                "no reads past the cache beside the store's: its folder refuses them ({error})"
            )),
        }
        let name = format!("store: {BATCH} random rows a read, from the disk");
        let scale = Scale { unit: "krows/s", of_seconds: |read_s| speed(read_s) * 1e3 };
        report.race(&name, scale, self.options.runs, ours, rivals)?;
        match bytes_read {
            Ok(bytes) => {
                let share = bytes as f64 / (rows_read * page_size()) as f64;
                report.figure("store: pages that the disk gave a row", share, "pages");
            }
            Err(why) => report.note(format!("how many pages the disk gave is not known: {why}")),
        }
        Ok(())
    }

    fn open(&self, report: &mut BenchReport) -> Result<()> {
        let ours = &self.ours();
        let open = |verify| timed(move || Ok(StoreReader::open_with(ours, verify)?));
        let rivals = vec![Rival { name: "with every checksum", run: open(Verify::Full) }];
        let name = format!("store: open {}, journal checked", self.size());
        let runs = self.options.runs.min(5);
        report.race(&name, MS, runs, open(Verify::Journal), rivals)?;
        Ok(())
    }

    fn beside_a_writer(&self, report: &mut BenchReport) -> Result<()> {
        let mut store = Store::open_with(self.ours(), Verify::Journal)?;
        let handle = store.handle()?;
        let rows = self.options.rows;
        let pattern = ReadPattern::new(rows);
        let (mut alone_s, mut beside_s, mut updates) = (Vec::new(), Vec::new(), 0.0);
        let turns = self.options.runs.max(3);
        for _ in 0..turns {
            let mut read =
                |_: &[usize], ids: &[u64], out: &mut [f32]| handle.gather(ids, out).expect(WHOLE);
            pattern.time(&mut read, &mut alone_s);
            let stop = AtomicBool::new(false);
            let rate = std::thread::scope(|scope| {
                let writer = scope.spawn(|| update(&mut store, rows, &stop));
                // The first commit makes the overlay that the later ones fill.
                std::thread::sleep(Duration::from_millis(200));
                for _ in 0..5 {
                    pattern.time(&mut read, &mut beside_s);
                }
                stop.store(true, Ordering::Relaxed);
                writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?;
            updates += rate / turns as f64;
        }
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let name = format!("store: {name} of {BATCH} rows of {} beside a writer", self.size());
            let [beside_us, alone_us] =
                [&mut beside_s, &mut alone_s].map(|times_s| quantile(times_s, share) * 1e6);
            report.versus(name, beside_us, "us", "without a writer", alone_us);
        }
        report.figure("store: rows the writer updated a second", updates, "rows/s");
        Ok(())
    }

    fn formats(&self, report: &mut BenchReport) -> Result<()> {
        let store = self.reader()?;
        let pattern = ReadPattern::new(self.options.rows);
        for format in [RowFormat::Bf16, RowFormat::Int8] {
            let dir = self.dir.join("snapshot");
            store.snapshot_into(&dir, format)?;
            let reader = StoreReader::open_with(&dir, Verify::Journal)?;
            let name = format!("store: {BATCH} random rows a read, kept as {format:?}");
            let rivals = vec![Rival { name: "kept as F32", run: pattern.gather(&store) }];
            let ours = pattern.gather(&reader);
            report.race(
                &name,
                Scale { unit: "Mrows/s", of_seconds: speed },
                self.options.runs,
                ours,
                rivals,
            )?;
            let name = format!("store: bytes a row, kept as {format:?}");
            report.figure(name, self.bytes_a_row(&dir)?, "bytes");
            drop(reader);
            std::fs::remove_dir_all(&dir).map_err(Error::io(&dir))?;
        }
        Ok(())
    }

    /// Each rival holds the same rows as our store.
    fn rivals(&self, report: &mut BenchReport) -> Result<()> {
        let rivals = rivals::all();
        if rivals.is_empty() {
            report.note(
                "redb, LMDB (heed) and fjall are not built in; build with `--features rivals`",
            );
        }
        let (pattern, rows) = (ReadPattern::new(self.options.rows), self.options.rows);
        let (reader, dir) = (self.reader()?, self.dir.join("rival"));
        for rival in rivals {
            std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
            let start = Instant::now();
            rival.load(&dir, &reader, rows)?;
            let name = format!("{}: load {}", rival.name, self.size());
            report.figure(name, start.elapsed().as_secs_f64(), "s");
            let name = format!("store: {BATCH} random rows a read, of {}", self.size());
            rival.with_reader(&dir, &mut |read| {
                let run = pattern.read_by(|_, ids, out| read(ids, out));
                let rivals = vec![Rival { name: rival.name, run }];
                let (runs, ours) = (self.options.runs.min(5), pattern.gather(&reader));
                report.race(
                    &name,
                    Scale { unit: "Mrows/s", of_seconds: speed },
                    runs,
                    ours,
                    rivals,
                )?;
                Ok(())
            })?;
            let [ours, theirs] = [self.bytes_a_row(&self.ours())?, self.bytes_a_row(&dir)?];
            report.versus("store: bytes a row on disk", ours, "bytes", rival.name, theirs);
            std::fs::remove_dir_all(&dir).map_err(Error::io(&dir))?;
        }
        Ok(())
    }
}

/// The rows in the order of their numbers, in an array.
fn plain_copy(reader: &StoreReader, rows: usize) -> Vec<f32> {
    const PART: usize = 4096;
    let mut raw = vec![0.0; rows * DIM];
    for (part, out) in raw.chunks_mut(PART * DIM).enumerate() {
        let ids: Vec<u64> = (part * PART..).map(id).take(out.len() / DIM).collect();
        assert_eq!(reader.gather(&ids, out).expect(WHOLE), 0, "every row exists");
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
        // SAFETY: every x86-64 has the instruction, and it accesses no memory on its own.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// Trains random rows at the set rate until `stop`; returns the rate that it reached.
fn update(store: &mut Store, rows: usize, stop: &AtomicBool) -> Result<f64> {
    const PART: usize = 1000;
    let adagrad = Adagrad { learning_rate: 0.01, epsilon: 1e-6 };
    let grads = vec![0.01; PART * DIM];
    let start = Instant::now();
    let mut updated = 0;
    while !stop.load(Ordering::Relaxed) {
        let ids: Vec<u64> =
            (updated..updated + PART).map(|at| id(mix64(!(at as u64)) as usize % rows)).collect();
        store.adagrad(&ids, &grads, &adagrad)?;
        updated += PART;
        if updated.is_multiple_of(UPDATES_PER_COMMIT) {
            store.commit()?;
        }
        let due = Duration::from_secs_f64(updated as f64 / UPDATES_PER_SECOND);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
    Ok(updated as f64 / start.elapsed().as_secs_f64())
}

/// Bytes of a folder's files.
fn bytes(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let meta = entry.metadata().map_err(Error::io(dir))?;
        sum += if meta.is_dir() { bytes(&entry.path())? } else { meta.len() };
    }
    Ok(sum)
}
