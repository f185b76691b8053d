//! What followers have: the values that were last published, which movement is measured against.
//!
//! Dense values are in memory. Rows are in a store of their own in the publisher's work folder, mapped, so that they
//! take memory only where they changed lately; in memory besides are the ids of rows that moved and were not sent
//! yet. It is made by a snapshot and thrown away with the process. It does not send anything.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::Path,
};

use hypercast_store::{RowFormat, ServingStore};

use super::{
    DenseTensor, Rows, TensorSlice, Weights,
    select::{Candidate, Chosen, Limits, choose},
    wire::{block_bytes, row_bytes},
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::PublishSettings;

/// Values of a block, at most.
const MOST_BLOCK: usize = 1 << 16;

/// And at least, but for a tensor's last.
const LEAST_BLOCK: usize = 1 << 8;

/// Rows looked at together.
pub(super) const ROWS: usize = 1 << 12;

/// What was published.
pub(super) struct Mirror {
    dense: Vec<Kept>,
    /// Values a block.
    block: usize,
    rows: Option<RowMirror>,
}

struct Kept {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
    /// For each block: publications that went without it since it moved.
    waited: Vec<u32>,
}

struct RowMirror {
    store: ServingStore,
    /// Rows that moved and were not sent, with the publications since then.
    waiting: HashMap<u64, u32>,
    /// Removals that were not sent.
    removed: BTreeSet<u64>,
    /// The trainer's, up to which changes were looked at.
    generation: u64,
}

/// What a delta sends.
#[derive(Debug, Default)]
pub(super) struct Delta {
    pub(super) blocks: Vec<TensorSlice>,
    pub(super) ids: Vec<u64>,
    pub(super) rows: Vec<f32>,
    pub(super) removed: Vec<u64>,
    waiting: Waiting,
}

/// What waits if a delta is sent.
#[derive(Debug, Default)]
struct Waiting {
    /// Tensor, block and publications.
    blocks: Vec<(usize, usize, u32)>,
    rows: HashMap<u64, u32>,
    removed: BTreeSet<u64>,
    generation: u64,
}

/// A component.
#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Piece { tensor: usize, block: usize },
    Row(u64),
}

impl Mirror {
    /// Of a snapshot; its rows are still to be [`Mirror::keep_rows`]. `work` is replaced.
    pub(super) fn new(
        source: &dyn Weights,
        settings: &PublishSettings,
        work: &Path,
    ) -> Result<Self> {
        let dense = source.dense();
        let values: usize = dense.iter().map(|tensor| tensor.values.len()).sum();
        let rows = source.rows().map_or(0, |rows| rows.len() * row_bytes(rows.dim()));
        let total = 4 * values + rows;
        // A budget has some tens of blocks, so that it can be spent well.
        let block = (total as f64 * settings.share / 4.0 / 32.0) as usize;
        let block = block.clamp(LEAST_BLOCK, MOST_BLOCK);
        let kept = |tensor: &DenseTensor<'_>| Kept {
            name: tensor.name.into(),
            shape: tensor.shape.into(),
            values: tensor.values.into(),
            waited: vec![0; tensor.values.len().div_ceil(block)],
        };
        if work.exists() {
            fs::remove_dir_all(work).map_err(Error::io(work))?;
        }
        let rows = source.rows().map(|rows| -> Result<RowMirror> {
            Ok(RowMirror {
                store: ServingStore::create(work, rows.dim(), RowFormat::F32)?,
                waiting: HashMap::new(),
                removed: BTreeSet::new(),
                generation: rows.generation(),
            })
        });
        let rows = rows.transpose()?;
        Ok(Self { dense: dense.iter().map(kept).collect(), block, rows })
    }

    /// Notes rows that were published.
    pub(super) fn keep_rows(&mut self, ids: &[u64], rows: &[f32]) -> Result<()> {
        if let Some(mirror) = &mut self.rows {
            mirror.store.upsert_rows(ids, rows)?;
            mirror.store.commit()?;
        }
        Ok(())
    }

    /// The whole of the dense weights, in blocks.
    pub(super) fn all_blocks(&self) -> impl Iterator<Item = TensorSlice> + '_ {
        self.dense.iter().flat_map(move |kept| {
            let blocks = kept.values.chunks(self.block).enumerate();
            blocks.map(move |(at, values)| kept.block(at * self.block, values))
        })
    }

    /// All weights of `source` as a snapshot has them, before compression.
    pub(super) fn all_bytes(&self, source: &dyn Weights) -> u64 {
        let of = |kept: &Kept| -> usize {
            kept.values.chunks(self.block).map(|block| block_bytes(&kept.name, block.len())).sum()
        };
        let dense: usize = self.dense.iter().map(of).sum();
        let rows = source.rows().map_or(0, |rows| rows.len() * row_bytes(rows.dim()));
        (dense + rows) as u64
    }

    /// What to send of `source` now; none where only a snapshot will do.
    pub(super) fn choose(
        &self,
        source: &dyn Weights,
        settings: &PublishSettings,
    ) -> Result<Option<Delta>> {
        let dense = source.dense();
        let same = dense.len() == self.dense.len()
            && dense.iter().zip(&self.dense).all(|(tensor, kept)| kept.is(tensor));
        if !same || source.rows().is_some() != self.rows.is_some() {
            return Ok(None);
        }
        let mut budget = (self.all_bytes(source) as f64 * settings.share) as u64;
        let mut delta = Delta::default();
        let mut candidates = self.moved_blocks(&dense);
        if let (Some(rows), Some(mirror)) = (source.rows(), &self.rows) {
            let Some(gone) = rows.removed_since(mirror.generation) else { return Ok(None) };
            let mut gone: BTreeSet<u64> = gone.into_iter().chain(mirror.removed.clone()).collect();
            gone.retain(|&id| !rows.contains(id) && mirror.store.contains(id));
            delta.removed = gone.iter().copied().take((budget / 8) as usize).collect();
            delta.removed.iter().for_each(|id| _ = gone.remove(id));
            budget -= 8 * delta.removed.len() as u64;
            candidates.extend(mirror.moved(rows));
            delta.waiting.removed = gone;
            delta.waiting.generation = rows.generation();
        }
        let limits = Limits { budget, starve_after: settings.starve_after };
        let Chosen { sent, left } = choose(candidates, limits);
        for candidate in left {
            match candidate.what {
                What::Piece { tensor, block } => {
                    delta.waiting.blocks.push((tensor, block, candidate.waited + 1));
                }
                What::Row(id) => _ = delta.waiting.rows.insert(id, candidate.waited + 1),
            }
        }
        for candidate in sent {
            match candidate.what {
                What::Piece { tensor, block } => {
                    let start = block * self.block;
                    let values = dense[tensor].values.chunks(self.block).nth(block);
                    let values = values.expect("a candidate is a block of the tensor");
                    delta.blocks.push(self.dense[tensor].block(start, values));
                }
                What::Row(id) => delta.ids.push(id),
            }
        }
        if let Some(rows) = source.rows() {
            delta.rows = vec![0.0; delta.ids.len() * rows.dim()];
            rows.gather(&delta.ids, &mut delta.rows);
        }
        Ok(Some(delta))
    }

    /// Notes that a delta was sent.
    pub(super) fn sent(&mut self, delta: &Delta) -> Result<()> {
        self.dense.iter_mut().for_each(|kept| kept.waited.fill(0));
        for &(tensor, block, waited) in &delta.waiting.blocks {
            self.dense[tensor].waited[block] = waited;
        }
        for block in &delta.blocks {
            let kept = self.dense.iter_mut().find(|kept| kept.name == block.name);
            let kept = kept.expect("blocks are of tensors that are kept");
            kept.values[block.start..block.start + block.values.len()]
                .copy_from_slice(&block.values);
        }
        if let Some(mirror) = &mut self.rows {
            mirror.store.remove_rows(&delta.removed);
            mirror.store.upsert_rows(&delta.ids, &delta.rows)?;
            mirror.store.commit()?;
            mirror.waiting.clone_from(&delta.waiting.rows);
            mirror.removed.clone_from(&delta.waiting.removed);
            mirror.generation = delta.waiting.generation;
        }
        Ok(())
    }

    fn moved_blocks(&self, dense: &[DenseTensor<'_>]) -> Vec<Candidate<What>> {
        let mut moved = Vec::new();
        for (tensor, (now, kept)) in dense.iter().zip(&self.dense).enumerate() {
            let scale = rms(now.values).max(rms(&kept.values)).max(f64::MIN_POSITIVE);
            let blocks = now.values.chunks(self.block).zip(kept.values.chunks(self.block));
            for (block, (now, was)) in blocks.enumerate() {
                let movement = distance(now, was) / scale;
                if movement > 0.0 {
                    let bytes = block_bytes(&kept.name, now.len()) as u64;
                    let waited = kept.waited[block];
                    let what = What::Piece { tensor, block };
                    moved.push(Candidate { what, bytes, movement, waited });
                }
            }
        }
        moved
    }
}

impl Kept {
    fn is(&self, tensor: &DenseTensor<'_>) -> bool {
        self.name == tensor.name
            && self.shape == tensor.shape
            && self.values.len() == tensor.values.len()
    }

    fn block(&self, start: usize, values: &[f32]) -> TensorSlice {
        let (name, shape) = (self.name.clone(), self.shape.clone());
        TensorSlice { name, shape, start, values: values.into() }
    }
}

impl RowMirror {
    /// The rows that differ from what was published.
    fn moved(&self, rows: &dyn Rows) -> Vec<Candidate<What>> {
        let dim = rows.dim();
        let mut ids = rows.changed_since(self.generation);
        ids.extend(self.waiting.keys().filter(|&&id| rows.contains(id)));
        ids.sort_unstable();
        ids.dedup();
        let (mut now, mut was) = (vec![0.0; ROWS * dim], vec![0.0; ROWS * dim]);
        let mut moved = Vec::new();
        let (mut square, mut values) = (0.0, 0u64);
        for ids in ids.chunks(ROWS) {
            let (now, was) = (&mut now[..ids.len() * dim], &mut was[..ids.len() * dim]);
            rows.gather(ids, now);
            self.store.gather(ids, was);
            for ((&id, now), was) in ids.iter().zip(now.chunks(dim)).zip(was.chunks(dim)) {
                let movement = distance(now, was);
                square += rms(now).powi(2) * dim as f64;
                values += dim as u64;
                // A new row of zeros is no row to a follower, and gives the same.
                if movement > 0.0 {
                    let waited = self.waiting.get(&id).copied().unwrap_or(0);
                    let bytes = row_bytes(dim) as u64;
                    moved.push(Candidate { what: What::Row(id), bytes, movement, waited });
                }
            }
        }
        let scale = (square / values.max(1) as f64).sqrt().max(f64::MIN_POSITIVE);
        moved.iter_mut().for_each(|candidate| candidate.movement /= scale);
        moved
    }
}

/// The root mean square of values.
fn rms(values: &[f32]) -> f64 {
    let square: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    (square / values.len().max(1) as f64).sqrt()
}

/// The root mean square of differences.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    (square / a.len().max(1) as f64).sqrt()
}
