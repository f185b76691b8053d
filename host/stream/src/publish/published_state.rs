//! The weights that followers have, against which movement is measured.
//!
//! Dense values are in memory. Rows are in a memory-mapped store in the publisher's work directory,
//! so they take memory only where they changed recently; only the ids of moved rows that were not
//! sent are in memory. The state begins with a snapshot and ends with the process.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use hypercast_config::PublishSettings;
use hypercast_core::disk;
use hypercast_fm::update::WeightTensor;
use hypercast_store::{RowFormat, ServingStore, Store, StoreReader};

use super::{
    DenseTensor, TensorSlice, WeightSource,
    codec::{WeightsPart, WeightsTotal, block_bytes, row_bytes},
    select::{DeltaCandidate, DeltaLimits, DeltaSelection, select},
};
use crate::error::{CommonErrors as _, Error, Result};

/// The most values of a block.
const MAX_BLOCK_VALUES: usize = 1 << 16;

/// The fewest values of a block, except for a tensor's last one.
const MIN_BLOCK_VALUES: usize = 1 << 8;

/// Rows that are compared at a time.
pub(super) const ROWS: usize = 1 << 12;

/// The published weights of a model.
pub(super) struct PublishedState {
    dense: Vec<WeightTensor>,
    /// Values per block.
    block: usize,
    rows: Option<ServingStore>,
    unsent: UnsentChanges,
}

/// The content of a delta.
#[derive(Debug, Default)]
pub(super) struct Delta {
    pub(super) weights: WeightsPart,
    /// What is still unsent after this delta.
    unsent: UnsentChanges,
}

/// What moved and was not sent.
#[derive(Debug, Default)]
struct UnsentChanges {
    /// Blocks and rows, with the publications without them since they moved.
    waited: HashMap<WeightComponent, u32>,
    /// Removed rows.
    removed: BTreeSet<u64>,
    /// The trainer's generation up to which changes were considered.
    generation: u64,
}

/// A component of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum WeightComponent {
    Block { tensor: usize, block: usize },
    Row(u64),
}

impl PublishedState {
    /// The state of a snapshot, without its rows ([`PublishedState::copy_rows`]). The directory
    /// `work` is replaced.
    pub(super) fn new(
        source: &dyn WeightSource,
        settings: &PublishSettings,
        work: &Path,
    ) -> Result<Self> {
        let dense = source.dense();
        let values: usize = dense.iter().map(|tensor| tensor.values.len()).sum();
        // A budget has some tens of blocks, so that it can be used well.
        let total = 4 * values + rows_bytes(source);
        let block = (total as f64 * settings.share / 4.0 / 32.0) as usize;
        let dense = dense.iter().map(|tensor| WeightTensor {
            name: tensor.name.into(),
            shape: tensor.shape.into(),
            values: tensor.values.into(),
        });
        Error::found(work, disk::remove_dir_all(work))?;
        let create = |rows: &Store| ServingStore::create(work, rows.dim(), RowFormat::F32);
        let generation = source.rows().map_or(0, Store::generation);
        Ok(Self {
            dense: dense.collect(),
            block: block.clamp(MIN_BLOCK_VALUES, MAX_BLOCK_VALUES),
            rows: source.rows().map(create).transpose()?,
            unsent: UnsentChanges { generation, ..UnsentChanges::default() },
        })
    }

    /// Adds the rows of a snapshot.
    pub(super) fn copy_rows(&mut self, rows: &StoreReader) -> Result<()> {
        let dim = rows.dim();
        let (ids, mut values) = (rows.ids().collect::<Vec<_>>(), vec![0.0; ROWS * dim]);
        for ids in ids.chunks(ROWS) {
            let values = &mut values[..ids.len() * dim];
            rows.gather(ids, values)?;
            self.keep_rows(ids, values)?;
        }
        Ok(rows.check_files()?)
    }

    /// The rows, if the model has any.
    pub(super) fn rows(&self) -> Option<&ServingStore> {
        self.rows.as_ref()
    }

    fn keep_rows(&mut self, ids: &[u64], rows: &[f32]) -> Result<()> {
        if let Some(store) = &mut self.rows {
            store.upsert_rows(ids, rows)?;
            store.commit()?;
        }
        Ok(())
    }

    /// All dense weights, in blocks.
    pub(super) fn all_blocks(&self) -> impl Iterator<Item = TensorSlice> + '_ {
        self.dense.iter().flat_map(move |kept| {
            let blocks = kept.values.chunks(self.block).enumerate();
            blocks.map(move |(at, values)| slice(kept, at * self.block, values))
        })
    }

    /// How much a snapshot of this state has.
    pub(super) fn total(&self) -> WeightsTotal {
        let mut total = WeightsTotal::default();
        for kept in &self.dense {
            total.blocks += kept.values.chunks(self.block).len() as u64;
            total.values += kept.values.len() as u64;
        }
        total.rows = self.rows.as_ref().map_or(0, ServingStore::len) as u64;
        total
    }

    /// The size of a snapshot of `source` before compression.
    pub(super) fn all_bytes(&self, source: &dyn WeightSource) -> u64 {
        let of = |kept: &WeightTensor| -> usize {
            kept.values.chunks(self.block).map(|block| block_bytes(&kept.name, block.len())).sum()
        };
        let dense: usize = self.dense.iter().map(of).sum();
        (dense + rows_bytes(source)) as u64
    }

    /// The next delta of `source`; `None` if only a snapshot will do.
    pub(super) fn next_delta(
        &self,
        source: &dyn WeightSource,
        settings: &PublishSettings,
    ) -> Result<Option<Delta>> {
        let dense = source.dense();
        let same = dense.len() == self.dense.len()
            && dense.iter().zip(&self.dense).all(|(tensor, kept)| is_alike(tensor, kept));
        if !same || source.rows().is_some() != self.rows.is_some() {
            return Ok(None);
        }
        let mut budget = (self.all_bytes(source) as f64 * settings.share) as u64;
        let mut delta = Delta::default();
        let mut candidates = self.moved_blocks(&dense);
        if let (Some(rows), Some(store)) = (source.rows(), &self.rows) {
            let Some(removed) = rows.removed_since(self.unsent.generation) else { return Ok(None) };
            let mut removed: BTreeSet<u64> =
                removed.into_iter().chain(self.unsent.removed.iter().copied()).collect();
            removed.retain(|&id| !rows.contains(id) && store.contains(id));
            delta.weights.removed = removed.iter().copied().take((budget / 8) as usize).collect();
            delta.weights.removed.iter().for_each(|id| _ = removed.remove(id));
            budget -= 8 * delta.weights.removed.len() as u64;
            candidates.extend(self.moved_rows(rows, store)?);
            delta.unsent.removed = removed;
            delta.unsent.generation = rows.generation();
        }
        let limits = DeltaLimits { budget, starve_after: settings.starve_after };
        let DeltaSelection { sent, left } = select(candidates, limits);
        let left = left.into_iter();
        delta.unsent.waited = left.map(|left| (left.component, left.waited + 1)).collect();
        for candidate in sent {
            match candidate.component {
                WeightComponent::Block { tensor, block } => {
                    let start = block * self.block;
                    let values = dense[tensor].values.chunks(self.block).nth(block);
                    let values = values.expect("a candidate is a block of the tensor");
                    delta.weights.blocks.push(slice(&self.dense[tensor], start, values));
                }
                WeightComponent::Row(id) => delta.weights.ids.push(id),
            }
        }
        if let Some(rows) = source.rows() {
            delta.weights.rows = vec![0.0; delta.weights.ids.len() * rows.dim()];
            rows.gather(&delta.weights.ids, &mut delta.weights.rows)?;
            rows.check_files()?;
        }
        Ok(Some(delta))
    }

    /// Records a delta that was sent.
    pub(super) fn sent(&mut self, delta: Delta) -> Result<()> {
        let WeightsPart { blocks, ids, rows, removed } = &delta.weights;
        for block in blocks {
            let kept = self.dense.iter_mut().find(|kept| kept.name == block.name);
            let kept = kept.expect("blocks are of published tensors");
            kept.values[block.start..block.start + block.values.len()]
                .copy_from_slice(&block.values);
        }
        if let Some(store) = &mut self.rows {
            store.remove_rows(removed);
        }
        self.keep_rows(ids, rows)?;
        self.unsent = delta.unsent;
        Ok(())
    }

    fn moved_blocks(&self, dense: &[DenseTensor<'_>]) -> Vec<DeltaCandidate<WeightComponent>> {
        let mut moved = Vec::new();
        for (tensor, (now, kept)) in dense.iter().zip(&self.dense).enumerate() {
            let scale = rms(now.values).max(rms(&kept.values)).max(f64::MIN_POSITIVE);
            let blocks = now.values.chunks(self.block).zip(kept.values.chunks(self.block));
            for (block, (now, was)) in blocks.enumerate() {
                let movement = distance(now, was) / scale;
                if movement > 0.0 {
                    let bytes = block_bytes(&kept.name, now.len());
                    let component = WeightComponent::Block { tensor, block };
                    moved.push(self.candidate(component, bytes, movement));
                }
            }
        }
        moved
    }

    fn candidate(
        &self,
        component: WeightComponent,
        bytes: usize,
        movement: f64,
    ) -> DeltaCandidate<WeightComponent> {
        let waited = self.unsent.waited.get(&component).copied().unwrap_or(0);
        DeltaCandidate { component, bytes: bytes as u64, movement, waited }
    }

    /// The rows that differ from the published ones.
    fn moved_rows(
        &self,
        rows: &Store,
        store: &ServingStore,
    ) -> Result<Vec<DeltaCandidate<WeightComponent>>> {
        let dim = rows.dim();
        let mut ids: Vec<u64> = rows.changed_since(self.unsent.generation).collect();
        ids.extend(self.unsent.waited.keys().filter_map(|component| match *component {
            WeightComponent::Row(id) if rows.contains(id) => Some(id),
            _ => None,
        }));
        ids.sort_unstable();
        ids.dedup();
        let (mut now, mut was) = (vec![0.0; ROWS * dim], vec![0.0; ROWS * dim]);
        let mut moved = Vec::new();
        let (mut square, mut values) = (0.0, 0u64);
        for ids in ids.chunks(ROWS) {
            let (now, was) = (&mut now[..ids.len() * dim], &mut was[..ids.len() * dim]);
            rows.gather(ids, now)?;
            store.gather(ids, was)?;
            for ((&id, now), was) in ids.iter().zip(now.chunks(dim)).zip(was.chunks(dim)) {
                let movement = distance(now, was);
                square += rms(now).powi(2) * dim as f64;
                values += dim as u64;
                // A new row of zeros is equal to a missing row for a follower.
                if movement > 0.0 {
                    let component = WeightComponent::Row(id);
                    moved.push(self.candidate(component, row_bytes(dim), movement));
                }
            }
        }
        let scale = (square / values.max(1) as f64).sqrt().max(f64::MIN_POSITIVE);
        moved.iter_mut().for_each(|candidate| candidate.movement /= scale);
        Ok(moved)
    }
}

fn is_alike(tensor: &DenseTensor<'_>, kept: &WeightTensor) -> bool {
    kept.name == tensor.name
        && kept.shape == tensor.shape
        && kept.values.len() == tensor.values.len()
}

fn slice(kept: &WeightTensor, start: usize, values: &[f32]) -> TensorSlice {
    let (name, shape) = (kept.name.clone(), kept.shape.clone());
    TensorSlice { name, shape, start, values: values.into() }
}

/// The encoded size of all rows.
fn rows_bytes(source: &dyn WeightSource) -> usize {
    source.rows().map_or(0, |rows| rows.len() * row_bytes(rows.dim()))
}

/// The root mean square of values.
fn rms(values: &[f32]) -> f64 {
    let square: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    (square / values.len().max(1) as f64).sqrt()
}

/// The root mean square of the differences.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    (square / a.len().max(1) as f64).sqrt()
}
