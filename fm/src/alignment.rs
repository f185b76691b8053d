//! The alignment modules (section 3.1.3): one per surface, from the TAE and the auxiliary features
//! to that surface's auxiliary tasks. Their inputs, sizes and tasks are those that the surface's
//! team declared ([`crate::alignment_spec`]), or the usual ones: all numeric columns of the model,
//! a hidden layer, and all auxiliary tasks of the core.
//!
//! They only shape the TAE during training. Inference does not load them.

use burn::{
    module::{Initializer, Module, Param},
    nn::{Linear, LinearConfig},
    tensor::{Int, Tensor, TensorData, activation::silu, backend::Backend},
};
use hypercast_kernels::attention::HstuBackend;

use crate::{
    alignment_spec::{AlignmentSpec, TABLE_ROWS},
    batch::FmBatch,
    model::mlp_forward,
    spec::{FmConfig, FmSpec},
};

/// Hidden widths of the usual alignment module, which the paper calls "lightweight".
const HIDDEN: &[usize] = &[32];

/// The alignment module of one surface.
#[derive(Module, Debug)]
pub struct AlignmentModule<B: Backend> {
    /// `[TABLE_ROWS, embedding_dim]`: the embeddings of its categories, if it reads some.
    table: Option<Param<Tensor<B, 2>>>,
    hidden: Linear<B>,
    /// The hidden layers behind the first one.
    deeper: Vec<Linear<B>>,
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
    /// What it predicts, as indices among all tasks.
    pub tasks: Vec<usize>,
    /// `[rows, tasks]`.
    pub outputs: Tensor<B, 2>,
}

impl<B: Backend> AlignmentModules<B> {
    /// Modules with newly drawn weights.
    pub fn new(config: &FmConfig, spec: &FmSpec, device: &B::Device) -> Self {
        let module = |surface: usize| {
            let has_task = spec.auxiliary_tasks().iter().any(|task| task.surfaces[surface]);
            has_task.then(|| AlignmentModule::new(config, spec, surface as u16, device))
        };
        Self { modules: (0..spec.surfaces.len()).map(module).collect() }
    }

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

impl<B: HstuBackend> AlignmentModules<B> {
    /// The outputs by surface, from the targets' `tae` `[R, tae]` and what else the modules read.
    pub fn forward(
        &self,
        tae: &Tensor<B, 2>,
        batch: &FmBatch,
        spec: &FmSpec,
    ) -> Vec<AlignmentOutput<B>> {
        let device = tae.device();
        let data = TensorData::new(batch.features.clone(), [batch.targets(), spec.features]);
        let features = Tensor::from_data(data, &device);
        let mut rows: Vec<Vec<usize>> = vec![Vec::new(); self.modules.len()];
        let surfaces = batch.surfaces.iter().enumerate();
        surfaces.for_each(|(row, &surface)| rows[usize::from(surface)].push(row));
        let mut all = Vec::new();
        for (surface, (rows, module)) in rows.into_iter().zip(&self.modules).enumerate() {
            let Some(module) = module.as_ref().filter(|_| !rows.is_empty()) else { continue };
            let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            let index =
                Tensor::<B, 1, Int>::from_data(TensorData::new(index, [rows.len()]), &device);
            let mut inputs = vec![tae.clone().select(0, index.clone())];
            let own = spec.alignment(surface as u16);
            match own.and_then(|own| own.features.as_ref()) {
                None => inputs.push(features.clone().select(0, index)),
                Some(names) if names.is_empty() => (),
                Some(names) => {
                    let own_features = batch.alignment.features[surface].clone();
                    let data = TensorData::new(own_features, [rows.len(), names.len()]);
                    inputs.push(Tensor::from_data(data, &device));
                }
            }
            inputs.extend(own.zip(module.table.as_ref()).map(|(own, table)| {
                own.fields().embedded(&batch.alignment.ids[surface], &table.val())
            }));
            let outputs = module.forward(Tensor::cat(inputs, 1));
            all.push(AlignmentOutput { rows, tasks: spec.aligned_tasks(surface as u16), outputs });
        }
        all
    }
}

impl<B: Backend> AlignmentModule<B> {
    fn new(config: &FmConfig, spec: &FmSpec, surface: u16, device: &B::Device) -> Self {
        let own = spec.alignment(surface);
        let width = config.embedding_dim;
        let table = own.filter(|own| !own.ids.is_empty()).map(|_| {
            let most = f64::from(config.sparse_init);
            Initializer::Uniform { min: -most, max: most }.init([TABLE_ROWS, width], device)
        });
        let features = own.and_then(|own| own.features.as_ref()).map_or(spec.features, Vec::len);
        let embedded = own.map_or(0, |own| own.ids.len() * width);
        let inputs = config.tae_width() + features + embedded;
        let hidden = own.map_or(HIDDEN, |own: &AlignmentSpec| &own.hidden);
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        Self {
            table,
            hidden: linear(inputs, hidden[0]),
            deeper: hidden.windows(2).map(|widths| linear(widths[0], widths[1])).collect(),
            output: linear(hidden[hidden.len() - 1], spec.aligned_tasks(surface).len()),
        }
    }
}

impl<B: HstuBackend> AlignmentModule<B> {
    fn forward(&self, input: Tensor<B, 2>) -> Tensor<B, 2> {
        let (mut x, mut last) = (input, &self.hidden);
        for next in &self.deeper {
            x = silu(last.forward(x));
            last = next;
        }
        mlp_forward(x, [last, &self.output])
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn_flex::Flex;

    use super::*;
    use crate::{
        alignment_spec::{AlignmentId, AlignmentInputs},
        fields::ABSENT,
        spec::{TaskLabel, TaskSpec},
    };

    type A = Autodiff<Flex>;

    const TARGETS: usize = 4;

    /// Two surfaces; the first has a module of its own, with a column, a category and tags.
    fn spec() -> FmSpec {
        let task = |name: &str, main, surfaces: [bool; 2]| TaskSpec {
            name: name.into(),
            main,
            label: TaskLabel::Action(0),
            transform: Default::default(),
            surfaces: surfaces.into(),
            weight: 1.0,
        };
        let id = |name: &str, columns| AlignmentId { name: name.into(), columns };
        let own = AlignmentSpec {
            hidden: vec![6, 5],
            features: Some(vec!["words".into()]),
            ids: vec![id("intent", 1), id("tags", 2)],
            tasks: vec!["cart".into()],
            training_only: Default::default(),
        };
        FmSpec {
            surfaces: vec!["search".into(), "home".into()],
            actions: 1,
            values: 0,
            item_ids: 0,
            item_dense: 0,
            item_optional: Vec::new(),
            features: 2,
            profile_ids: vec![],
            id_widths: Default::default(),
            content: 0,
            training_only: Default::default(),
            alignments: [("search".into(), own)].into(),
            tasks: vec![
                task("click", true, [true; 2]),
                task("late", false, [false, true]),
                task("cart", false, [true, false]),
            ],
        }
    }

    fn config() -> FmConfig {
        FmConfig { dim: 4, embedding_dim: 3, ..FmConfig::default() }
    }

    /// Targets of the first surface, but for the last one.
    fn batch() -> FmBatch {
        let alignment = AlignmentInputs {
            features: vec![vec![0.5, -1.0, 2.0], vec![]],
            ids: vec![vec![7, 8, 9, 7, 9, ABSENT, 11, ABSENT, ABSENT], vec![]],
        };
        FmBatch {
            target_offsets: vec![0, TARGETS as u32],
            surfaces: vec![0, 0, 0, 1],
            features: (0..2 * TARGETS).map(|at| (at as f32).sin()).collect(),
            alignment,
            ..FmBatch::default()
        }
    }

    fn tae() -> Tensor<A, 2> {
        let values: Vec<f32> = (0..4 * TARGETS).map(|at| (at as f32 * 0.7).cos()).collect();
        Tensor::from_data(TensorData::new(values, [TARGETS, 4]), &Default::default())
    }

    fn values<const D: usize>(tensor: &Tensor<A, D>) -> Vec<f32> {
        tensor.to_data().into_vec().unwrap()
    }

    #[test]
    fn a_module_reads_and_predicts_what_its_surface_names() {
        let (config, spec) = (config(), spec());
        let modules = AlignmentModules::<A>::new(&config, &spec, &Default::default());
        let outputs = |batch: &FmBatch| {
            let all = modules.forward(&tae(), batch, &spec);
            all.iter().map(|of| values(&of.outputs)).collect::<Vec<_>>()
        };
        let said = modules.forward(&tae(), &batch(), &spec);
        let of =
            |at: usize| (said[at].rows.clone(), said[at].tasks.clone(), said[at].outputs.dims());
        assert_eq!(of(0), (vec![0, 1, 2], vec![2], [3, 1]), "its own task alone");
        assert_eq!(of(1), (vec![3], vec![1], [1, 1]), "and no other surface's module has that");
        let before = outputs(&batch());
        let mut changed = batch();
        changed.features.iter_mut().for_each(|value| *value += 1.0);
        let after = outputs(&changed);
        assert!(after[0] == before[0] && after[1] != before[1], "the model's columns");
        let mut changed = batch();
        changed.alignment.features[0][1] += 1.0;
        let after = outputs(&changed);
        assert!(
            after[0][1] != before[0][1] && after[0][0] == before[0][0] && after[1] == before[1]
        );
    }

    #[test]
    fn gradients_reach_the_embeddings_of_what_a_target_has() {
        let (config, spec) = (config(), spec());
        let modules = AlignmentModules::<A>::new(&config, &spec, &Default::default());
        let tae = tae().require_grad();
        let said = modules.forward(&tae, &batch(), &spec);
        let mut gradients = said[0].outputs.clone().sum().backward();
        let tae = tae.grad_remove(&mut gradients).unwrap().into_data().into_vec::<f32>().unwrap();
        let reached: Vec<bool> = tae.chunks(4).map(|row| row.iter().any(|g| *g != 0.0)).collect();
        assert_eq!(reached, [true, true, true, false], "no row of another surface");
        let table = modules.modules[0].as_ref().unwrap().table.as_ref().unwrap().val();
        let rows =
            table.grad_remove(&mut gradients).unwrap().into_data().into_vec::<f32>().unwrap();
        let reached = rows.chunks(3).enumerate().filter(|(_, row)| row.iter().any(|g| *g != 0.0));
        assert_eq!(reached.map(|(at, _)| at).collect::<Vec<_>>(), [7, 8, 9, 11]);

        let own = spec.alignment(0).unwrap();
        let embedded = own.fields().embedded(&batch().alignment.ids[0], &table);
        let (embedded, table) = (values(&embedded), values(&table));
        let mean = |at: usize| (table[8 * 3 + at] + table[9 * 3 + at]) / 2.0;
        for at in 0..3 {
            assert!((embedded[3 + at] - mean(at)).abs() < 1e-7, "the mean of two tags");
            assert_eq!([embedded[6 + at], embedded[15 + at]], [table[7 * 3 + at], 0.0]);
        }
    }
}
