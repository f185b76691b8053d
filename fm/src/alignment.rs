//! The alignment modules (section 3.1.3): one per surface, from the TAE and the auxiliary features
//! to that surface's auxiliary tasks.
//!
//! They only shape the TAE during training. Inference does not load them.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use hypercast_kernels::attention::HstuBackend;

use crate::{
    model::mlp_forward,
    spec::{FmConfig, FmSpec},
};

/// Hidden width of an alignment module, which the paper calls "lightweight".
const HIDDEN: usize = 32;

/// The alignment module of one surface.
#[derive(Module, Debug)]
pub struct AlignmentModule<B: Backend> {
    hidden: Linear<B>,
    output: Linear<B>,
}

/// The alignment modules of all surfaces; a surface without an auxiliary task has none.
#[derive(Module, Debug)]
pub struct AlignmentModules<B: Backend> {
    modules: Vec<Option<AlignmentModule<B>>>,
}

/// The outputs of one surface's module for its targets in a batch.
#[derive(Debug, Clone)]
pub struct AlignmentOutput<B: Backend> {
    /// Indices of the surface's targets in the batch.
    pub rows: Vec<usize>,
    /// `[rows, auxiliary tasks]`.
    pub outputs: Tensor<B, 2>,
}

impl<B: Backend> AlignmentModules<B> {
    /// Modules with newly drawn weights.
    pub fn new(config: &FmConfig, spec: &FmSpec, device: &B::Device) -> Self {
        let tasks = spec.auxiliary_tasks().len();
        let module = |surface: usize| {
            spec.auxiliary_tasks().iter().any(|task| task.surfaces[surface]).then(|| {
                AlignmentModule {
                    hidden: LinearConfig::new(config.tae_width() + spec.features, HIDDEN)
                        .init(device),
                    output: LinearConfig::new(HIDDEN, tasks).init(device),
                }
            })
        };
        Self { modules: (0..spec.surfaces.len()).map(module).collect() }
    }
}

impl<B: HstuBackend> AlignmentModules<B> {
    /// The outputs by surface, from `tae` `[R, tae]`, `features` `[R, features]` and each row's
    /// surface.
    pub fn forward(
        &self,
        tae: &Tensor<B, 2>,
        features: &Tensor<B, 2>,
        surfaces: &[u16],
    ) -> Vec<AlignmentOutput<B>> {
        let mut rows: Vec<Vec<usize>> = vec![Vec::new(); self.modules.len()];
        surfaces.iter().enumerate().for_each(|(row, &surface)| rows[surface as usize].push(row));
        let mut all = Vec::new();
        for (rows, module) in rows.into_iter().zip(&self.modules) {
            let Some(module) = module.as_ref().filter(|_| !rows.is_empty()) else { continue };
            let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            let index =
                Tensor::<B, 1, Int>::from_data(TensorData::new(index, [rows.len()]), &tae.device());
            let input = Tensor::cat(
                vec![tae.clone().select(0, index.clone()), features.clone().select(0, index)],
                1,
            );
            let outputs = mlp_forward(input, [&module.hidden, &module.output]);
            all.push(AlignmentOutput { rows, outputs });
        }
        all
    }
}

impl<B: Backend> AlignmentModules<B> {
    /// Only the modules of the given surfaces. The fork of a module that no row uses would stay in
    /// the autodiff graph, and every later step would visit its weights.
    pub fn only(&self, surfaces: &[u16]) -> Self {
        let used = |surface: usize| surfaces.iter().any(|&used| usize::from(used) == surface);
        let keep = |(surface, module): (usize, &Option<AlignmentModule<B>>)| {
            module.clone().filter(|_| used(surface))
        };
        Self { modules: self.modules.iter().enumerate().map(keep).collect() }
    }
}
