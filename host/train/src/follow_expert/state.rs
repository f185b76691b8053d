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
    /// It comes after the rest in the file.
    #[serde(skip)]
    pub(super) addition: StateAddition,
}

/// What the files of earlier releases do not have, and their readers pass over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct StateAddition {
    /// The position of the next order to try a row again; none before the first step.
    pub(super) orders: Option<u64>,
    /// The usual loss of a step; 0 where it is not known.
    pub(super) mean_loss: f64,
    /// Of the record before its position in the stream of joined examples. It comes last in the
    /// file, and files of before it end there.
    #[serde(skip)]
    pub(super) checksum: Option<u32>,
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
        let Some(bytes) = Error::found(&path, fs::read(&path))? else { return Ok(None) };
        let wrong = |why: &str| {
            Error::data(&path, format!("{why}; remove it to train the expert anew on the logs"))
        };
        let damaged = || wrong("it is damaged");
        let (format, rest) = bytes.split_first_chunk().ok_or_else(damaged)?;
        let (checksum, body) = rest.split_first_chunk().ok_or_else(damaged)?;
        let format = u32::from_le_bytes(*format);
        if format != FORMAT {
            return Err(wrong(&format!("format {format}, this build reads {FORMAT}")));
        }
        if u32::from_le_bytes(*checksum) != crc32fast::hash(body) {
            return Err(damaged());
        }
        let unreadable = |error: postcard::Error| wrong(&error.to_string());
        let (state, rest) = postcard::take_from_bytes::<FollowerState>(body).map_err(unreadable)?;
        let addition = match rest {
            [] => StateAddition::default(),
            rest => {
                let (addition, rest) = postcard::take_from_bytes(rest).map_err(unreadable)?;
                let checksum = match rest {
                    [] => None,
                    rest => postcard::from_bytes(rest).map_err(unreadable)?,
                };
                StateAddition { checksum, ..addition }
            }
        };
        Ok(Some(FollowerState { addition, ..state }))
    }

    /// Saves it: after a crash the old one is there or this one.
    pub(super) fn write(&self, work: &Path) -> Result<()> {
        let path = path(work);
        let unwritable = |error: postcard::Error| Error::data(&path, error.to_string());
        let mut body = postcard::to_stdvec(self).map_err(unwritable)?;
        body.extend(postcard::to_stdvec(&self.addition).map_err(unwritable)?);
        body.extend(postcard::to_stdvec(&self.addition.checksum).map_err(unwritable)?);
        let checksum = crc32fast::hash(&body).to_le_bytes();
        let bytes = [&FORMAT.to_le_bytes(), &checksum, &body[..]].concat();
        atomic_file::write(&path, &bytes).map_err(Error::io(&path))
    }
}
