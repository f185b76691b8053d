//! What is published of a model and how it is taken over: an FM in training, an expert's parameters.
//!
//! Here alone publications meet the models' own types. Whether an update fits is checked by the models.

use std::{collections::HashMap, path::Path, sync::Arc};

use hypercast_fm::{
    checkpoint::FmManifest,
    update::{TrainedWeights, WeightTensor, WeightUpdate},
};
use hypercast_store::Store;

use super::{DenseTensor, Follower, Publication, PublicationKind, Rows, TensorSlice, Weights};
use crate::engine::{Engine, Topic};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_expert::Parameters;

impl Weights for TrainedWeights<'_> {
    fn manifest(&self) -> String {
        serde_json::to_string(&self.manifest).expect("a manifest is plain values")
    }

    fn dense(&self) -> Vec<DenseTensor<'_>> {
        let named = self.dense.iter();
        named
            .map(|WeightTensor { name, shape, values }| DenseTensor { name, shape, values })
            .collect()
    }

    fn rows(&self) -> Option<&dyn Rows> {
        Some(self.rows)
    }
}

impl Rows for Store {
    fn dim(&self) -> usize {
        Store::dim(self)
    }

    fn len(&self) -> usize {
        Store::len(self)
    }

    fn generation(&self) -> u64 {
        Store::generation(self)
    }

    fn ids(&self) -> Box<dyn Iterator<Item = u64> + '_> {
        Box::new(Store::ids(self))
    }

    fn changed_since(&self, generation: u64) -> Vec<u64> {
        Store::changed_since(self, generation).collect()
    }

    fn removed_since(&self, generation: u64) -> Option<Vec<u64>> {
        Store::removed_since(self, generation)
    }

    fn contains(&self, id: u64) -> bool {
        Store::contains(self, id)
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) {
        Store::gather(self, ids, out);
    }
}

impl Weights for Parameters {
    fn manifest(&self) -> String {
        serde_json::to_string(&self.provenance).expect("a provenance is plain values")
    }

    fn dense(&self) -> Vec<DenseTensor<'_>> {
        let tensor = |(name, shape, values)| DenseTensor { name, shape, values };
        self.tensors().map(tensor).collect()
    }

    fn rows(&self) -> Option<&dyn Rows> {
        None
    }
}

/// A publication of an FM, for [`hypercast_fm::inference::FoundationModel::update`].
///
/// # Errors
/// A manifest that cannot be read: it is not of an FM, or of another version's.
pub fn fm_update(publication: Publication) -> Result<WeightUpdate> {
    let Publication { header, blocks, ids, rows, removed } = publication;
    let manifest: FmManifest = serde_json::from_str(&header.manifest).map_err(|error| {
        Error::invalid(format!("published weights: the manifest of an FM is not in them ({error})"))
    })?;
    let piece =
        |TensorSlice { name, shape, start, values }| TensorSlice { name, shape, start, values };
    let pieces = blocks.into_iter().map(piece).collect();
    let whole = header.kind == PublicationKind::Snapshot;
    Ok(WeightUpdate {
        complete: whole,
        manifest,
        dense: pieces,
        row_ids: ids,
        rows,
        removed_row_ids: removed,
    })
}

/// Makes a checkpoint of what is published of an FM now, to be loaded with
/// [`hypercast_fm::inference::load_updatable`] and to be followed from there. None if there is no snapshot yet.
///
/// # Errors
/// An engine that cannot be reached, weights that make no model, a full disk.
pub fn bootstrap(
    engine: Arc<dyn Engine>,
    topic: Topic,
    dir: &Path,
) -> Result<Option<(Publication, Follower)>> {
    let mut follower = Follower::open(engine, topic)?;
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

/// See [`Publication::absorb`].
pub(super) fn absorb(own: &mut Publication, later: Publication) -> Result<()> {
    if later.header.kind == PublicationKind::Snapshot {
        *own = later;
        return Ok(());
    }
    let width =
        |publication: &Publication| publication.rows.len().checked_div(publication.ids.len());
    if let (Some(dim), Some(was)) = (width(&later), width(own))
        && dim != was
    {
        return Err(Error::invalid(format!(
            "published weights: rows of {dim} values come after rows of {was}; they are not of one model"
        )));
    }
    let dim = width(&later).unwrap_or(0);
    own.header = super::Header { kind: own.header.kind, ..later.header };
    for block in later.blocks {
        patch(&mut own.blocks, &block)?;
    }
    let mut places: HashMap<u64, usize> =
        own.ids.iter().enumerate().map(|(at, &id)| (id, at)).collect();
    for (id, row) in later.ids.iter().zip(later.rows.chunks(dim.max(1))) {
        match places.get(id) {
            Some(at) => own.rows[at * dim..(at + 1) * dim].copy_from_slice(row),
            None => {
                places.insert(*id, own.ids.len());
                own.ids.push(*id);
                own.rows.extend_from_slice(row);
            }
        }
    }
    let width = width(own).unwrap_or(0);
    for id in later.removed {
        if let Some(at) = places.remove(&id) {
            own.ids.swap_remove(at);
            let last = own.rows.len() - width;
            own.rows.copy_within(last.., at * width);
            own.rows.truncate(last);
            if let Some(&moved) = own.ids.get(at) {
                places.insert(moved, at);
            }
        }
    }
    Ok(())
}

/// Puts a block over those that hold its values.
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
    match covered == new.values.len() {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "published weights: {} {:?} is not of this model",
            new.name, new.shape
        ))),
    }
}
