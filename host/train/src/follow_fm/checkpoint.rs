//! Where a streaming trainer stands: its saved state and its position in the stream, replaced as
//! one whole.

use std::path::{Path, PathBuf};

use hypercast_core::{atomic_dir, atomic_file, disk};
use hypercast_fm::trainer::FmTrainer;
use hypercast_stream::streams::{StreamPlace, StreamTrail};
use serde::{Deserialize, Serialize};

use super::{super::eval_window::EvalWindow, progress::ProgressWindow};
use crate::error::{CommonErrors as _, Error, Result};

const FORMAT: u32 = 1;

/// What is saved besides the trainer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct FmCheckpoint {
    format: u32,
    /// Where it stands in the joined stream. Older checkpoints have fewer places.
    #[serde(flatten)]
    pub(super) joined: StreamTrail,
    /// The position of the next order to try a record again; none before the first step.
    #[serde(default)]
    pub(super) orders: Option<u64>,
    /// Requests learned from.
    pub(super) requests: u64,
    /// Corrections learned from.
    pub(super) corrections: u64,
    /// Time of the newest request.
    pub(super) until_ms: i64,
    /// When the newest event was taken in.
    pub(super) ingested_ms: i64,
    /// `until_ms` where the stream was cut or made anew: what comes again of before may have been
    /// learned from. None if it never was.
    #[serde(default)]
    pub(super) reread_until_ms: Option<i64>,
    /// The furthest position up to which it had learned when the stream was cut or made anew. What
    /// comes again of before it may have been learned from.
    #[serde(default)]
    pub(super) furthest_position: u64,
    /// What was predicted since the last line.
    pub(super) window: ProgressWindow,
}

/// The rows that the gate has measured.
const MEASURED_FILE: &str = "measured.bin";

fn saved_dir(work: &Path) -> PathBuf {
    work.join("saved")
}

/// The folder of the FM trainer's own state.
pub(super) fn trainer_dir(work: &Path) -> PathBuf {
    saved_dir(work).join("trainer")
}

/// Puts the rows that the gate had measured into its window. Without them, as an earlier release
/// left it or after another schema, it measures anew.
pub(super) fn read_measured(work: &Path, window: &mut EvalWindow) {
    let path = saved_dir(work).join(MEASURED_FILE);
    let Ok(bytes) = disk::read(&path) else { return };
    match postcard::from_bytes(&bytes) {
        Ok(rows) => window.restore(rows),
        Err(error) => tracing::warn!(%error, "{}: the gate measures anew", path.display()),
    }
}

impl FmCheckpoint {
    /// One that has learned from nothing.
    pub(super) fn at(place: StreamPlace) -> FmCheckpoint {
        FmCheckpoint { joined: place.into(), ..FmCheckpoint::default() }
    }

    /// The position of the next record in the joined stream.
    pub(super) fn position(&self) -> u64 {
        self.joined.place().position
    }

    /// Stands at an earlier place, where the stream was cut or made anew.
    pub(super) fn go_back_to(&mut self, place: StreamPlace) {
        self.furthest_position = self.trained_position();
        self.reread_until_ms = Some(self.until_ms);
        self.joined.move_to(place);
    }

    /// The position before which any record may have been learned from.
    pub(super) fn trained_position(&self) -> u64 {
        self.position().max(self.furthest_position)
    }

    /// What was saved; none where nothing was.
    pub(super) fn read(work: &Path) -> Result<Option<FmCheckpoint>> {
        let dir = saved_dir(work);
        atomic_dir::recover(&dir)?;
        let path = dir.join("place.json");
        let Some(text) = Error::found(&path, disk::read(&path))? else { return Ok(None) };
        let place: FmCheckpoint =
            serde_json::from_slice(&text).map_err(|error| Error::data(&path, error.to_string()))?;
        if place.format != FORMAT {
            let reason = format!("format {}, this build reads {FORMAT}", place.format);
            return Err(Error::data(
                &path,
                format!("{reason}; remove {} to begin anew", dir.display()),
            ));
        }
        Ok(Some(place))
    }

    /// Saves it with its trainer, and what the gate has measured.
    pub(super) fn write(
        &self,
        work: &Path,
        trainer: &mut dyn FmTrainer,
        measured: &EvalWindow,
    ) -> Result<()> {
        atomic_dir::replace(&saved_dir(work), |draft| {
            trainer.save(&draft.join("trainer"))?;
            let path = draft.join(MEASURED_FILE);
            let rows = postcard::to_stdvec(&measured.rows).expect("plain values");
            atomic_file::write(&path, &rows).map_err(Error::io(&path))?;
            let path = draft.join("place.json");
            let place = FmCheckpoint { format: FORMAT, ..self.clone() };
            let text = serde_json::to_vec_pretty(&place).expect("plain values");
            atomic_file::write(&path, &text).map_err(Error::io(&path))
        })
    }
}
