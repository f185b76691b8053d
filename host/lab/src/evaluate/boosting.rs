//! Gradient boosting beside FM and experts: what a team would use instead, on the same rows, with
//! the same counters.
//!
//! It is LightGBM, run by Python: the script trains and predicts, and leaves a table that is scored
//! here as every other arm is.

use std::{path::Path, process::Command};

use hypercast_data::dataset::table::{CellType, Field, TableReader};

use super::{
    scores::{EvaluationScores, ScoredImpression},
    stream::{DatasetStream, TestMode},
};
use crate::{
    demo::replay::PredictionArm,
    error::{CommonErrors as _, Error, Result},
};

/// Also a program of its own, which says more about itself.
const SCRIPT: &str = include_str!("../../python/boosting.py");

/// The table's columns, in this order.
const COLUMNS: [(&str, CellType); 6] = [
    ("user", CellType::U64),
    ("surface", CellType::U32),
    ("time_ms", CellType::I64),
    ("task", CellType::U32),
    ("label", CellType::F32),
    ("said", CellType::F32),
];

/// Trains boosting by `python`, with a table of its predictions in `work`, and adds these.
///
/// # Errors
/// Python or one of its packages is missing, or the script fails; what it printed is above.
pub fn score(
    python: &Path,
    stream: &DatasetStream<'_>,
    work: &Path,
    scores: &mut EvaluationScores,
) -> Result<()> {
    let table = work.join("boosting.parquet");
    let mode = match stream.mode {
        TestMode::Fixed => "once",
        TestMode::Streaming => "daily",
    };
    let mut command = Command::new(python);
    command.arg("-c").arg(SCRIPT).arg(&stream.dataset.dir).args(["--schema", "--mode", mode]);
    command.arg(format!("--test-from={}", stream.window.test_from_ms));
    command.arg(format!("--utc-offset-h={}", stream.window.utc_offset_h));
    command.arg("--predictions").arg(&table).stdout(std::io::stderr());
    // Its threads else spin while they wait, which on a busy machine takes the time of all.
    command.env("OMP_WAIT_POLICY", "PASSIVE");
    let status = command.status().map_err(Error::io(python))?;
    if !status.success() {
        return Err(Error::invalid(format!(
            "--boosting: {} ended with {status}; it needs lightgbm, pandas and pyarrow",
            python.display()
        )));
    }
    let reader = TableReader::open(&table)?;
    let fields = COLUMNS.map(|(name, kind)| Field::new(name, kind));
    for group in 0..reader.groups() {
        let columns = reader.read(group, &fields)?;
        for (row, &user) in columns[0].u64s().iter().enumerate() {
            let surface = u16::try_from(columns[1].u32s()[row])
                .map_err(|_| Error::data(&table, "column `surface` is out of range"))?;
            let of = ScoredImpression {
                user,
                surface,
                time_ms: columns[2].i64s()[row],
                task: columns[3].u32s()[row] as usize,
                arm: PredictionArm::Boosting,
                label: columns[4].f32s()[row],
            };
            scores.push(of, columns[5].f32s()[row]);
        }
    }
    Ok(())
}
