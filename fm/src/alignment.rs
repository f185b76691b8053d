//! The alignment modules (section 3.1.3): one a surface, from the TAE and the
//! auxiliary features to that surface's auxiliary tasks.
//!
//! They exist to shape the TAE in training; a serving checkpoint has none.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use hypercast_kernels::attention::HstuBackend;

use crate::{
    model::through,
    spec::{FmConfig, FmSpec},
};

/// Hidden width of an alignment module: "lightweight" in the paper's words.
const HIDDEN: usize = 32;

/// One surface's module.
#[derive(Module, Debug)]
pub struct Alignment<B: Backend> {
    hidden: Linear<B>,
    output: Linear<B>,
}

/// The modules of the surfaces that have an auxiliary task.
#[derive(Module, Debug)]
pub struct Alignments<B: Backend> {
    modules: Vec<Option<Alignment<B>>>,
    tasks: usize,
}

/// The outputs of one surface's module in a batch.
#[derive(Debug)]
pub struct Aligned<B: Backend> {
    /// Which targets of the batch.
    pub rows: Vec<usize>,
    /// `[rows, auxiliary tasks]`.
    pub outputs: Tensor<B, 2>,
}

impl<B: Backend> Alignments<B> {
    /// Fresh weights.
    pub fn new(config: &FmConfig, spec: &FmSpec, device: &B::Device) -> Self {
        let tasks = spec.auxiliary_tasks().len();
        let module = |surface: usize| {
            spec.auxiliary_tasks().iter().any(|task| task.surfaces[surface]).then(|| Alignment {
                hidden: LinearConfig::new(config.tae_width() + spec.features, HIDDEN).init(device),
                output: LinearConfig::new(HIDDEN, tasks).init(device),
            })
        };
        Self { modules: (0..spec.surfaces.len()).map(module).collect(), tasks }
    }
}

impl<B: HstuBackend> Alignments<B> {
    /// `tae` `[R, tae]`, `features` `[R, features]`, and the surface of each row.
    pub fn forward(
        &self,
        tae: &Tensor<B, 2>,
        features: &Tensor<B, 2>,
        surfaces: &[u16],
    ) -> Vec<Aligned<B>> {
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
            let outputs = through(input, [&module.hidden, &module.output]);
            all.push(Aligned { rows, outputs });
        }
        all
    }
}

impl<B: Backend> Alignments<B> {
    /// The modules of the given surfaces alone. A fork of a module that no row uses would leave its
    /// weights in the autodiff graph for good, and every later step would look them over.
    pub fn only(&self, surfaces: &[u16]) -> Self {
        let used = |surface: usize| surfaces.iter().any(|&used| usize::from(used) == surface);
        let keep = |(surface, module): (usize, &Option<Alignment<B>>)| {
            module.clone().filter(|_| used(surface))
        };
        Self { modules: self.modules.iter().enumerate().map(keep).collect(), tasks: self.tasks }
    }

    /// Auxiliary tasks.
    pub fn tasks(&self) -> usize {
        self.tasks
    }
}
