//! Where an expert's streaming trainer stands: parameters, optimiser and position in the logs, what
//! it published last and what was measured since, replaced as one whole, with a checksum.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{super::eval_window::WindowRow, ExpertCheckpoint, FeedPosition};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::{atomic_file, disk};
use hypercast_expert::train::SavedTrainer;
use hypercast_fm::label_scale::{LabelScales, ScaleAddition};
use hypercast_stream::streams::{StreamPlace, StreamTrail};

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
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct StateAddition {
    /// The position of the next order to try a row again; none before the first step.
    pub(super) orders: Option<u64>,
    /// The usual loss of a step; 0 where it is not known.
    pub(super) mean_loss: f64,
    /// Where it stands in the stream of joined examples, if it follows that. It comes last in the
    /// file: first the checksum of its place, then its earlier places. Earlier files end before
    /// either.
    #[serde(skip)]
    pub(super) joined: StreamTrail,
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

/// What scales have besides, by task. Files of earlier releases end before it.
type ScaleAdditions = BTreeMap<String, ScaleAddition>;

pub(super) fn additions(scales: LabelScales) -> ScaleAdditions {
    scales.into_iter().map(|(name, scale)| (name, scale.addition())).collect()
}

fn path(work: &Path) -> PathBuf {
    work.join("state.bin")
}

/// A part of a file, and what follows it. Files of earlier releases end before it.
fn next_part<T: DeserializeOwned + Default>(rest: &[u8]) -> postcard::Result<(T, &[u8])> {
    if rest.is_empty() { Ok((T::default(), rest)) } else { postcard::take_from_bytes(rest) }
}

impl FollowerState {
    /// What was saved; none where nothing was.
    pub(super) fn read(work: &Path) -> Result<Option<FollowerState>> {
        let path = path(work);
        let Some(bytes) = Error::found(&path, disk::read(&path))? else { return Ok(None) };
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
        let (addition, rest) = next_part::<StateAddition>(rest).map_err(unreadable)?;
        let (checksum, rest) = next_part(rest).map_err(unreadable)?;
        let (earlier, rest) = next_part(rest).map_err(unreadable)?;
        // Scales of tasks, of the trainer and of what was published last.
        let (mut scales, rest) = next_part::<[LabelScales; 2]>(rest).map_err(unreadable)?;
        let (additions, _) = next_part::<[ScaleAdditions; 2]>(rest).map_err(unreadable)?;
        for (scales, additions) in scales.iter_mut().zip(additions) {
            for (name, addition) in additions {
                scales.entry(name).and_modify(|scale| scale.set_addition(addition));
            }
        }
        let [own, of_published] = scales;
        let joined = match state.place.position {
            FeedPosition::Joined(position) => {
                StreamTrail::new(StreamPlace { position, checksum }, earlier)
            }
            FeedPosition::Logs(_) => StreamTrail::default(),
        };
        let addition = StateAddition { joined, ..addition };
        let mut state = FollowerState { addition, ..state };
        state.trainer.set_scales(own);
        if let LastPublished::Earlier(published) = &mut state.published {
            published.set_scales(of_published);
        }
        Ok(Some(state))
    }

    /// The scales of regressions, of the trainer and of what was published last.
    pub(super) fn scales(&self) -> [LabelScales; 2] {
        let of_published = match &self.published {
            LastPublished::Earlier(published) => published.provenance().labels.clone(),
            LastPublished::Nothing | LastPublished::This => LabelScales::new(),
        };
        [self.trainer.provenance().labels.clone(), of_published]
    }

    /// Saves it: after a crash the old one is there or this one.
    pub(super) fn write(&self, work: &Path) -> Result<()> {
        let path = path(work);
        let unwritable = |error: postcard::Error| Error::data(&path, error.to_string());
        let mut body = postcard::to_stdvec(self).map_err(unwritable)?;
        body.extend(postcard::to_stdvec(&self.addition).map_err(unwritable)?);
        let joined = (self.addition.joined.place().checksum, self.addition.joined.earlier());
        body.extend(postcard::to_stdvec(&joined).map_err(unwritable)?);
        let scales = self.scales();
        body.extend(postcard::to_stdvec(&scales).map_err(unwritable)?);
        body.extend(postcard::to_stdvec(&scales.map(additions)).map_err(unwritable)?);
        let checksum = crc32fast::hash(&body).to_le_bytes();
        let bytes = [&FORMAT.to_le_bytes(), &checksum, &body[..]].concat();
        atomic_file::write(&path, &bytes).map_err(Error::io(&path))
    }
}
