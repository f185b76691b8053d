//! What a trainer publishes and a server takes over: dense weights by name, sparse rows by id, and the
//! manifest with the statistics that go with them.
//!
//! An [`Update`] is checked here as far as it can be without a model; how it is applied is `live`'s, how it travels
//! and which of the weights are in it is decided above.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use burn::{module::Module, tensor::backend::Backend};
use hypercast_store::{ServingStore, Store};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    checkpoint::{Manifest, Named, Tensors, weights_of, write_tensors, write_whole},
};

/// A dense tensor that serving needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Its path in the model, as in a checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

impl Dense {
    pub(crate) fn of<B: Backend, M: Module<B>>(module: &M) -> Vec<Dense> {
        let dense = |(name, data): (String, burn::tensor::TensorData)| {
            let shape = data.shape.iter().copied().collect();
            let values = data.convert::<f32>().into_vec().expect("converted to f32");
            Dense { name, shape, values }
        };
        weights_of(module).into_iter().map(dense).collect()
    }
}

/// A trainer's model as it would serve.
#[derive(Debug)]
pub struct Trained<'a> {
    /// What it says of itself.
    pub manifest: Manifest,
    /// The dense weights that predict.
    pub dense: Vec<Dense>,
    /// The sparse rows, all committed.
    pub rows: &'a Store,
}

/// Some consecutive values of a dense tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// The tensor's path in the model.
    pub name: String,
    /// The shape of the whole tensor.
    pub shape: Vec<usize>,
    /// The first value's place in the row-major whole.
    pub start: usize,
    /// The values.
    pub values: Vec<f32>,
}

/// New weights for a model that serves.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// Whether it is all of the weights: a row that is not here is gone.
    pub whole: bool,
    /// The model's new manifest: version, configuration and specification are those of the old one.
    pub manifest: Manifest,
    /// Dense weights.
    pub pieces: Vec<Piece>,
    /// Ids of the rows.
    pub ids: Vec<u64>,
    /// `[ids.len(), embedding_dim]`.
    pub rows: Vec<f32>,
    /// Ids whose rows are gone.
    pub removed: Vec<u64>,
}

impl Update {
    /// Refuses what contradicts itself or cannot be the weights of a model: numbers that are not finite, lengths
    /// that do not fit, a row that is there and gone.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<()> {
        let refused = |why: String| Err(Error::Update(why));
        let Manifest { config, spec, statistics, .. } = &self.manifest;
        config.validate_for(spec)?;
        let dim = config.embedding_dim;
        if self.rows.len() != self.ids.len() * dim {
            let (rows, ids) = (self.rows.len(), self.ids.len());
            return refused(format!("{rows} values for {ids} rows of {dim}"));
        }
        if let Some(at) = self.rows.iter().position(|value| !value.is_finite()) {
            return refused(format!("the row of {:016x} is not finite", self.ids[at / dim]));
        }
        let gone: HashSet<u64> = self.removed.iter().copied().collect();
        if let Some(id) = self.ids.iter().find(|id| gone.contains(id)) {
            return refused(format!("the row of {id:016x} is both there and gone"));
        }
        let widths = (statistics.item_dense.width(), statistics.features.width());
        if widths != (spec.item_dense, spec.features) || !statistics.is_finite() {
            return refused(format!("statistics of {widths:?} columns do not fit the model"));
        }
        self.pieces.iter().try_for_each(Piece::check)
    }

    /// Puts the pieces into `dense`, which has every tensor of the model.
    pub(crate) fn place(&self, dense: &mut Tensors) -> Result<()> {
        for piece in &self.pieces {
            let Some((shape, values)) = dense.get_mut(&piece.name) else {
                return Err(Error::Update(format!("the model has no tensor {}", piece.name)));
            };
            if *shape != piece.shape {
                let Piece { name, shape: sent, .. } = piece;
                return Err(Error::Update(format!("{name} is {sent:?}, in the model {shape:?}")));
            }
            values[piece.start..piece.start + piece.values.len()].copy_from_slice(&piece.values);
        }
        Ok(())
    }

    /// The dense tensors of an update that is whole.
    fn tensors(&self) -> Result<Tensors> {
        let mut places: Vec<(&str, usize, usize, usize)> = Vec::new();
        for piece in &self.pieces {
            let (len, end) = (piece.shape.iter().product(), piece.start + piece.values.len());
            places.push((&piece.name, piece.start, end, len));
        }
        places.sort_unstable();
        // Before there is room for any: a shape may say more than all of memory.
        for of_one in places.chunk_by(|a, b| a.0 == b.0) {
            let (name, _, _, len) = of_one[0];
            let goes_on = |end, &(_, from, to, of): &(&str, usize, usize, usize)| {
                (from == end && of == len).then_some(to)
            };
            let end = of_one.iter().try_fold(0, goes_on);
            if end != Some(len) {
                return Err(Error::Update(format!("only a part of {name} is there")));
            }
        }
        let mut tensors: Tensors = HashMap::new();
        for piece in &self.pieces {
            let room = || (piece.shape.clone(), vec![0.0; piece.shape.iter().product()]);
            tensors.entry(piece.name.clone()).or_insert_with(room);
        }
        self.place(&mut tensors)?;
        Ok(tensors)
    }

    /// The names of the tensors and whether all of `dense` is there.
    pub(crate) fn is_complete(&self, dense: &Tensors) -> Result<()> {
        let tensors = self.tensors()?;
        match dense.keys().find(|name| !tensors.contains_key(*name)) {
            Some(name) => Err(Error::Update(format!("{name} is missing"))),
            None => Ok(()),
        }
    }

    /// Writes an update that is whole as a checkpoint for serving into `dir`, replacing what is there. It is not
    /// one to train on: what only training needs is never published.
    ///
    /// # Errors
    /// An update that is not whole, or that [`Update::check`] refuses; what the file system says.
    pub fn checkpoint(&self, dir: &Path) -> Result<()> {
        /// Rows a commit: they are in memory until then.
        const ROWS: usize = 1 << 16;
        self.check()?;
        if !self.whole {
            return Err(Error::Update("a part of the weights makes no checkpoint".into()));
        }
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let tensors: Vec<Named> = self
            .tensors()?
            .into_iter()
            .map(|(name, (shape, values))| (name, shape, bytes(&values)))
            .collect();
        let config = &self.manifest.config;
        write_whole(dir, |draft| {
            write_tensors(&tensors, &draft.join("model.safetensors"))?;
            let store = draft.join("store");
            let mut store = ServingStore::create(store, config.embedding_dim, config.serving_rows)?;
            let rows = self.rows.chunks(ROWS * config.embedding_dim);
            for (ids, rows) in self.ids.chunks(ROWS).zip(rows) {
                store.upsert_rows(ids, rows)?;
                store.commit()?;
            }
            store.checkpoint()?;
            self.manifest.write(draft)
        })
    }
}

impl Piece {
    fn check(&self) -> Result<()> {
        let Piece { name, shape, start, values } = self;
        let len = shape.iter().try_fold(1usize, |len, &size| len.checked_mul(size));
        let end = start.checked_add(values.len());
        match (len, end) {
            (Some(len), Some(end)) if end <= len => {}
            _ => {
                let count = values.len();
                let why = format!("{name} {shape:?} has no {count} values from {start} on");
                return Err(Error::Update(why));
            }
        }
        match values.iter().any(|value| !value.is_finite()) {
            true => Err(Error::Update(format!("{name} holds a value that is not finite"))),
            false => Ok(()),
        }
    }
}
