//! Adapters between publications and the models: an FM in training, and an expert's parameters.
//!
//! Only this module knows the models' types. The models check whether an update fits.

use std::{collections::HashMap, path::Path, sync::Arc};

use hypercast_expert::Parameters;
use hypercast_fm::{
    checkpoint::FmManifest,
    update::{TrainedWeights, WeightTensor, WeightUpdate},
};
use hypercast_store::Store;

use super::{
    DenseTensor, Publication, PublicationFollower, PublicationKind, TensorSlice, WeightSource,
};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{StreamEngine, Topic};

impl WeightSource for TrainedWeights<'_> {
    fn manifest(&self) -> String {
        serde_json::to_string(&self.manifest).expect("a manifest is plain values")
    }

    fn dense(&self) -> Vec<DenseTensor<'_>> {
        let named = self.dense.iter();
        named
            .map(|WeightTensor { name, shape, values }| DenseTensor { name, shape, values })
            .collect()
    }

    fn rows(&self) -> Option<&Store> {
        self.rows
    }
}

impl WeightSource for Parameters {
    fn manifest(&self) -> String {
        serde_json::to_string(&self.provenance).expect("a provenance is plain values")
    }

    fn dense(&self) -> Vec<DenseTensor<'_>> {
        let tensors = self.tensors();
        tensors.map(|(name, shape, values)| DenseTensor { name, shape, values }).collect()
    }

    fn rows(&self) -> Option<&Store> {
        None
    }
}

/// Converts a publication of an FM for [`hypercast_fm::inference::FoundationModel::update`].
///
/// # Errors
/// The manifest cannot be read: the publication is not of an FM, or of another version of this
/// program.
pub fn fm_update(publication: Publication) -> Result<WeightUpdate> {
    let Publication { header, blocks, ids, rows, removed } = publication;
    let manifest: FmManifest = serde_json::from_str(&header.manifest).map_err(|error| {
        Error::internal(format!("published weights have no readable FM manifest: {error}"))
    })?;
    Ok(WeightUpdate {
        complete: header.kind == PublicationKind::Snapshot,
        manifest,
        dense: blocks,
        row_ids: ids,
        rows,
        removed_row_ids: removed,
    })
}

/// Writes the published weights of an FM as a checkpoint, to load with
/// [`hypercast_fm::inference::load_updatable`], and returns a follower that continues from there.
/// `None` if there is no snapshot yet. The returned publication has no weights.
///
/// # Errors
/// The engine cannot be reached, the weights form no model, or the disk is full.
pub fn bootstrap(
    engine: Arc<dyn StreamEngine>,
    topic: Topic,
    dir: &Path,
) -> Result<Option<(Publication, PublicationFollower)>> {
    let mut follower = PublicationFollower::open(engine, topic)?;
    let Some(mut weights) = follower.next(std::time::Duration::ZERO)? else { return Ok(None) };
    while let Some(later) = follower.next(std::time::Duration::ZERO)? {
        weights.absorb(later)?;
    }
    fm_update(weights.clone())?.checkpoint(dir)?;
    weights.blocks.clear();
    weights.ids.clear();
    weights.rows.clear();
    Ok(Some((weights, follower)))
}

impl Publication {
    /// Applies a later publication, so that this one has the weights of both.
    ///
    /// # Errors
    /// A block does not belong to a tensor of this publication: the two are not of one model.
    pub fn absorb(&mut self, later: Publication) -> Result<()> {
        if later.header.kind == PublicationKind::Snapshot {
            *self = later;
            return Ok(());
        }
        let width =
            |publication: &Publication| publication.rows.len().checked_div(publication.ids.len());
        if let (Some(dim), Some(was)) = (width(&later), width(self))
            && dim != was
        {
            return Err(Error::internal(format!(
                "published weights: rows of {dim} values follow rows of {was}; they are of different models"
            )));
        }
        let dim = width(&later).unwrap_or(0);
        self.header = super::PublicationHeader { kind: self.header.kind, ..later.header };
        for block in later.blocks {
            patch(&mut self.blocks, &block)?;
        }
        let mut index: HashMap<u64, usize> =
            self.ids.iter().enumerate().map(|(at, &id)| (id, at)).collect();
        for (id, row) in later.ids.iter().zip(later.rows.chunks(dim.max(1))) {
            match index.get(id) {
                Some(at) => self.rows[at * dim..(at + 1) * dim].copy_from_slice(row),
                None => {
                    index.insert(*id, self.ids.len());
                    self.ids.push(*id);
                    self.rows.extend_from_slice(row);
                }
            }
        }
        let width = width(self).unwrap_or(0);
        for id in later.removed {
            if let Some(at) = index.remove(&id) {
                self.ids.swap_remove(at);
                let last = self.rows.len() - width;
                self.rows.copy_within(last.., at * width);
                self.rows.truncate(last);
                if let Some(&moved) = self.ids.get(at) {
                    index.insert(moved, at);
                }
            }
        }
        Ok(())
    }
}

/// Copies a block's values over the blocks that contain them.
fn patch(blocks: &mut [TensorSlice], new: &TensorSlice) -> Result<()> {
    let mut covered = 0;
    for block in
        blocks.iter_mut().filter(|block| block.name == new.name && block.shape == new.shape)
    {
        let from = block.start.max(new.start);
        let to = (block.start + block.values.len()).min(new.start + new.values.len());
        if from < to {
            block.values[from - block.start..to - block.start]
                .copy_from_slice(&new.values[from - new.start..to - new.start]);
            covered += to - from;
        }
    }
    if covered == new.values.len() {
        return Ok(());
    }
    Err(Error::internal(format!(
        "published weights: {} {:?} is not a tensor of this model",
        new.name, new.shape
    )))
}
