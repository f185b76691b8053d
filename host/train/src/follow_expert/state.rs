//! Where an expert's streaming trainer stands: parameters, optimiser and position in the logs, what
//! it published last and what was measured since, replaced as one whole, with a checksum.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{super::eval_window::WindowRow, ExpertCheckpoint};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::atomic_file;
use hypercast_expert::train::SavedTrainer;

const FORMAT: u32 = 2;

/// The content of `state.bin`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct FollowerState {
    pub(super) place: ExpertCheckpoint,
    pub(super) trainer: SavedTrainer,
    pub(super) published: LastPublished,
    /// Since then.
    pub(super) measured: Vec<WindowRow>,
}

/// What was published last, beside what is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum LastPublished {
    /// Nothing yet.
    Nothing,
    /// The content of `state.bin`.
    This,
    /// What was so then; what came after it is held.
    Earlier(Box<SavedTrainer>),
}

fn path(work: &Path) -> PathBuf {
    work.join("state.bin")
}

impl FollowerState {
    /// What was saved; none where nothing was.
    pub(super) fn read(work: &Path) -> Result<Option<FollowerState>> {
        let path = path(work);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let wrong = |why: &str| {
            Error::data(&path, format!("{why}; remove it to train the expert anew on the logs"))
        };
        let (head, body) = bytes.split_at_checked(8).ok_or_else(|| wrong("it is damaged"))?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if word(0) != FORMAT {
            return Err(wrong(&format!("format {}, this build reads {FORMAT}", word(0))));
        }
        if word(4) != crc32fast::hash(body) {
            return Err(wrong("it is damaged"));
        }
        let state = postcard::from_bytes(body).map_err(|error| wrong(&error.to_string()))?;
        Ok(Some(state))
    }

    /// Saves it: after a crash the old one is there or this one.
    pub(super) fn write(&self, work: &Path) -> Result<()> {
        let path = path(work);
        let body =
            postcard::to_stdvec(self).map_err(|error| Error::data(&path, error.to_string()))?;
        let checksum = crc32fast::hash(&body).to_le_bytes();
        let bytes = [&FORMAT.to_le_bytes(), &checksum, &body[..]].concat();
        atomic_file::write(&path, &bytes).map_err(Error::io(&path))
    }
}
