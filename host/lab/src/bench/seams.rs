//! The seams by which a simulator owns clock, chance and disk, beside the calls of the standard
//! library that they go on to. They cost a flag of the thread, so their ratios are 1 or nearly so.

use std::{
    fs::{self, File},
    hash::{BuildHasher as _, RandomState},
    hint::black_box,
    io::Write as _,
    time::Instant,
};

use hypercast_core::{clock, disk, entropy};

use super::{
    BenchOptions, BenchReport, temporary,
    timing::{Rival, Scale, timed},
};
use crate::error::{CommonErrors as _, Error, Result};

/// Calls per timed repetition.
const CALLS: usize = 100_000;

/// Records that a timed repetition appends to a file, and the bytes of each: those of an event.
const RECORDS: usize = 10_000;
const RECORD: [u8; 200] = [7; 200];

/// Measures each seam beside the standard library.
///
/// # Errors
/// A temporary folder that cannot be made or filled.
pub(super) fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    race(report, options, "a read of the clock", clock::instant, Instant::now)?;
    let number = || RandomState::new().hash_one(0_u64);
    race(report, options, "a random number", entropy::number, number)?;
    append(report, options)
}

/// Races many calls of a seam against as many of the standard library.
fn race<T>(
    report: &mut BenchReport,
    options: &BenchOptions,
    name: &str,
    seam: impl Fn() -> T,
    standard: impl Fn() -> T,
) -> Result<()> {
    let scale = Scale { unit: "ns", of_seconds: |s| s * 1e9 / CALLS as f64 };
    let ours = timed(|| {
        (0..CALLS).for_each(|_| drop(black_box(seam())));
        Ok(())
    });
    let standard = timed(|| {
        (0..CALLS).for_each(|_| drop(black_box(standard())));
        Ok(())
    });
    let rivals = vec![Rival { name: STANDARD, run: standard }];
    report.race(&format!("seams: {name}"), scale, options.runs, ours, rivals)?;
    Ok(())
}

/// The rival of every seam.
const STANDARD: &str = "the standard library";

/// Races records that are appended one by one and not synced, because a sync would hide the rest.
fn append(report: &mut BenchReport, options: &BenchOptions) -> Result<()> {
    let folder = temporary()?;
    let path = folder.path().join("records");
    let failed = || Error::io(&path);
    let ours = timed(|| {
        let mut file = disk::File::create(&path).map_err(failed())?;
        (0..RECORDS).try_for_each(|_| file.write_all(&RECORD)).map_err(failed())?;
        disk::remove_file(&path).map_err(failed())
    });
    let standard = timed(|| {
        let mut file = File::create(&path).map_err(failed())?;
        (0..RECORDS).try_for_each(|_| file.write_all(&RECORD)).map_err(failed())?;
        fs::remove_file(&path).map_err(failed())
    });
    let scale = Scale { unit: "ns", of_seconds: |s| s * 1e9 / RECORDS as f64 };
    let name = "seams: an event appended to a file, without a sync";
    let rivals = vec![Rival { name: STANDARD, run: standard }];
    report.race(name, scale, options.runs, ours, rivals)?;
    Ok(())
}
