//! Where a streaming trainer stands: its saved state and its position in the stream, replaced as
//! one whole.

use std::path::{Path, PathBuf};

use hypercast_fm::{
    checkpoint::{recover_directory, replace_directory},
    trainer::FmTrainer,
};
use hypercast_stream::streams::StreamPlace;
use serde::{Deserialize, Serialize};

use super::progress::ProgressWindow;
use crate::error::{CommonErrors as _, Error, Result};

const FORMAT: u32 = 1;

/// What is saved besides the trainer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct FmCheckpoint {
    format: u32,
    /// The position of the next record in the joined stream.
    pub(super) position: u64,
    /// Of the record before it ([`StreamPlace`]); older checkpoints have none.
    #[serde(default)]
    pub(super) checksum: Option<u32>,
    /// Requests learned from.
    pub(super) requests: u64,
    /// Corrections learned from.
    pub(super) corrections: u64,
    /// Time of the newest request.
    pub(super) until_ms: i64,
    /// When the newest event was taken in.
    pub(super) ingested_ms: i64,
    /// What was predicted since the last line.
    pub(super) window: ProgressWindow,
}

fn saved_dir(work: &Path) -> PathBuf {
    work.join("saved")
}

/// The folder of the FM trainer's own state.
pub(super) fn trainer_dir(work: &Path) -> PathBuf {
    saved_dir(work).join("trainer")
}

impl FmCheckpoint {
    /// Where it stands in the joined stream.
    pub(super) fn stream_place(&self) -> StreamPlace {
        StreamPlace { position: self.position, checksum: self.checksum }
    }

    /// What was saved; none where nothing was.
    pub(super) fn read(work: &Path) -> Result<Option<FmCheckpoint>> {
        let dir = saved_dir(work);
        recover_directory(&dir)?;
        let path = dir.join("place.json");
        let Some(text) = Error::found(&path, std::fs::read(&path))? else { return Ok(None) };
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

    /// Saves it with its trainer.
    pub(super) fn write(&self, work: &Path, trainer: &mut dyn FmTrainer) -> Result<()> {
        replace_directory(&saved_dir(work), |draft| {
            trainer.save(&draft.join("trainer"))?;
            let path = draft.join("place.json");
            let place = FmCheckpoint { format: FORMAT, ..self.clone() };
            let text = serde_json::to_vec_pretty(&place).expect("plain values");
            std::fs::write(&path, text).map_err(Error::io(&path))
        })
    }
}
