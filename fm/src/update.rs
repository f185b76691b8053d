//! Weight updates, which a trainer publishes and a serving model applies: dense weights by name,
//! sparse rows by id, and the manifest with the matching statistics.
//!
//! A [`WeightUpdate`] is checked here as far as possible without a model; `live_model` applies it.
//! The caller decides which weights an update contains and how it is transported.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use burn::{
    module::Module,
    tensor::{TensorData, backend::Backend},
};
use hypercast_kernels::attention::tensor;
use hypercast_store::{ServingStore, Store};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    checkpoint::{
        FmManifest, ModuleWeight, TensorMap, replace_checkpoint, weights_of, write_tensors,
    },
};

/// A tensor of dense weights that serving needs.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightTensor {
    /// The tensor's path in the model, as in a checkpoint.
    pub name: String,
    /// The tensor's shape.
    pub shape: Vec<usize>,
    /// The values, row-major.
    pub values: Vec<f32>,
}

impl WeightTensor {
    pub(crate) fn of<B: Backend, M: Module<B>>(module: &M) -> Vec<WeightTensor> {
        let dense = |ModuleWeight { name, value, .. }: ModuleWeight<B>| {
            // The data have the value's own shape, whatever rank the tensor is said to have.
            WeightTensor::new(name, tensor::<B, 1>(value).into_data())
        };
        weights_of(module).into_iter().map(dense).collect()
    }

    pub(crate) fn new(name: String, data: TensorData) -> WeightTensor {
        let shape = data.shape.iter().copied().collect();
        let values = data.convert::<f32>().into_vec().expect("converted to f32");
        WeightTensor { name, shape, values }
    }
}

/// A trainer's current weights for serving.
#[derive(Debug)]
pub struct TrainedWeights<'a> {
    /// The manifest that goes with the weights.
    pub manifest: FmManifest,
    /// The dense weights that make predictions.
    pub dense: Vec<WeightTensor>,
    /// The store of the sparse rows, with nothing uncommitted; `None` for a model without any.
    pub rows: Option<&'a Store>,
}

impl TrainedWeights<'_> {
    /// What has a value that is not finite, if anything has: then it is no model to serve.
    ///
    /// # Errors
    /// The store's errors.
    pub(crate) fn not_finite(&self) -> Result<Option<String>> {
        const ROWS: usize = 1 << 12;
        let is_finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        if let Some(tensor) = self.dense.iter().find(|tensor| !is_finite(&tensor.values)) {
            return Ok(Some(format!("tensor {}", tensor.name)));
        }
        let Some(store) = self.rows else { return Ok(None) };
        let ids: Vec<u64> = store.ids().collect();
        let dim = store.dim();
        for ids in ids.chunks(ROWS) {
            let mut values = vec![0.0; ids.len() * dim];
            store.gather(ids, &mut values)?;
            if let Some(at) = values.chunks(dim).position(|row| !is_finite(row)) {
                return Ok(Some(format!("row {:016x}", ids[at])));
            }
        }
        Ok(None)
    }
}

/// A range of consecutive values of a dense tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorSlice {
    /// The tensor's path in the model.
    pub name: String,
    /// The shape of the whole tensor.
    pub shape: Vec<usize>,
    /// The index of the first value in the row-major tensor.
    pub start: usize,
    /// The values from `start` on.
    pub values: Vec<f32>,
}

/// New weights for a model that is in service.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightUpdate {
    /// Whether the update contains all weights; rows that it does not contain are then removed.
    pub complete: bool,
    /// The model's new manifest, with the same version, configuration and specification as the old.
    pub manifest: FmManifest,
    /// The changed dense weights.
    pub dense: Vec<TensorSlice>,
    /// Ids of the changed sparse rows.
    pub row_ids: Vec<u64>,
    /// `[row_ids, embedding_dim]`: the changed sparse rows.
    pub rows: Vec<f32>,
    /// Ids of the removed sparse rows.
    pub removed_row_ids: Vec<u64>,
}

impl WeightUpdate {
    /// Refuses an update that contradicts itself or cannot be the weights of a model: values that
    /// are not finite, lengths that do not match, rows that are both changed and removed.
    ///
    /// # Errors
    /// The first violation.
    pub fn check(&self) -> Result<()> {
        let FmManifest { config, spec, statistics, .. } = &self.manifest;
        config.validate_for(spec)?;
        let dim = config.embedding_dim;
        if self.rows.len() != self.row_ids.len() * dim {
            let (values, ids) = (self.rows.len(), self.row_ids.len());
            return refused(format!("it has {values} values for {ids} rows of {dim}"));
        }
        if let Some(at) = self.rows.iter().position(|value| !value.is_finite()) {
            return refused(format!(
                "row {:016x} has a value that is not finite",
                self.row_ids[at / dim]
            ));
        }
        let removed: HashSet<u64> = self.removed_row_ids.iter().copied().collect();
        if let Some(id) = self.row_ids.iter().find(|id| removed.contains(id)) {
            return refused(format!("row {id:016x} is both changed and removed"));
        }
        let widths = (statistics.item_dense.width(), statistics.features.width());
        let expected = (spec.item_numbers(), spec.features);
        if widths != expected || !statistics.is_finite() {
            return refused(format!(
                "its statistics are of {widths:?} columns or not finite; the model has {expected:?}"
            ));
        }
        self.dense.iter().try_for_each(TensorSlice::check)
    }

    /// Writes the dense weights into `dense`, which has every tensor of the model.
    pub(crate) fn write_into(&self, dense: &mut TensorMap) -> Result<()> {
        for slice in &self.dense {
            let Some((shape, values)) = dense.get_mut(&slice.name) else {
                return refused(format!("the model has no tensor {}", slice.name));
            };
            if *shape != slice.shape {
                let TensorSlice { name, shape: sent, .. } = slice;
                return refused(format!(
                    "{name} has shape {sent:?}; in the model it has {shape:?}"
                ));
            }
            values[slice.start..slice.end()].copy_from_slice(&slice.values);
        }
        Ok(())
    }

    /// The dense tensors of a complete update, assembled from its slices.
    pub(crate) fn tensors(&self) -> Result<TensorMap> {
        let mut slices: Vec<&TensorSlice> = self.dense.iter().collect();
        slices.sort_unstable_by_key(|slice| (&slice.name, slice.start, slice.end(), slice.len()));
        // Check before allocating: a damaged shape may claim more than all of memory.
        for of_tensor in slices.chunk_by(|a, b| a.name == b.name) {
            let len = of_tensor[0].len();
            let continued = |end, slice: &&TensorSlice| {
                (slice.start == end && slice.len() == len).then_some(slice.end())
            };
            if of_tensor.iter().try_fold(0, continued) != Some(len) {
                return refused(format!("it contains only a part of {}", of_tensor[0].name));
            }
        }
        let mut tensors: TensorMap = HashMap::new();
        for slice in &self.dense {
            let zeros = || (slice.shape.clone(), vec![0.0; slice.len()]);
            tensors.entry(slice.name.clone()).or_insert_with(zeros);
        }
        self.write_into(&mut tensors)?;
        Ok(tensors)
    }

    /// Checks that the update has every value of every tensor in `dense`.
    pub(crate) fn check_complete(&self, dense: &TensorMap) -> Result<()> {
        let tensors = self.tensors()?;
        match dense.keys().find(|name| !tensors.contains_key(*name)) {
            Some(name) => refused(format!("tensor {name} is missing")),
            None => Ok(()),
        }
    }

    /// Writes a complete update as a checkpoint for serving into `dir`, replacing its content.
    /// Training cannot resume from it, because weights that only training needs are not published.
    ///
    /// # Errors
    /// An update that is not complete or that [`WeightUpdate::check`] refuses, and errors of the
    /// file system.
    pub fn checkpoint(&self, dir: &Path) -> Result<()> {
        /// Rows per commit, which bounds the rows in memory.
        const ROWS_PER_COMMIT: usize = 1 << 16;
        self.check()?;
        if !self.complete {
            let why = "it contains only a part of the weights, which cannot become a checkpoint";
            return refused(why);
        }
        let tensor = |(name, (shape, values))| WeightTensor { name, shape, values };
        let tensors = self.tensors()?.into_iter().map(tensor).collect();
        let config = &self.manifest.config;
        replace_checkpoint(dir, |draft| {
            write_tensors(tensors, &draft.join("model.safetensors"))?;
            let store = draft.join("store");
            let mut store = ServingStore::create(store, config.embedding_dim, config.serving_rows)?;
            let rows = self.rows.chunks(ROWS_PER_COMMIT * config.embedding_dim);
            for (ids, rows) in self.row_ids.chunks(ROWS_PER_COMMIT).zip(rows) {
                store.upsert_rows(ids, rows)?;
                store.commit()?;
            }
            store.checkpoint()?;
            self.manifest.write(draft)
        })
    }
}

impl TensorSlice {
    /// The number of values in the whole tensor.
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The index after the last value.
    fn end(&self) -> usize {
        self.start + self.values.len()
    }

    fn check(&self) -> Result<()> {
        let TensorSlice { name, shape, start, values } = self;
        let len = shape.iter().try_fold(1usize, |len, &size| len.checked_mul(size));
        let (count, end) = (values.len(), start.checked_add(values.len()));
        if len.zip(end).is_none_or(|(len, end)| end > len) {
            return refused(format!(
                "{name} of shape {shape:?} has no {count} values from index {start} on"
            ));
        }
        if values.iter().any(|value| !value.is_finite()) {
            return refused(format!("{name} has a value that is not finite"));
        }
        Ok(())
    }
}

/// The error of an update that cannot be applied.
pub(crate) fn refused<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::Update(why.into()))
}
