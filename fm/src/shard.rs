//! One thread's share of a training batch: forward, loss, backward.
//!
//! A batch is split by request, so shards share nothing but the weights. The
//! loss's means are over the whole batch: each shard is told how many valid
//! samples all of them have. What is predicted is always of whole examples
//! without dropout, as serving would; where learning sees anything else, it
//! takes a pass of its own. What is done with the gradients is the trainer's.

use std::collections::HashMap;

use burn::{
    module::Module,
    optim::GradientsParams,
    tensor::{
        Tensor, TensorData,
        backend::{AutodiffBackend, Backend},
    },
};
use hypercast_kernels::attention::HstuBackend;

use crate::{
    Result,
    alignment::{Aligned, Alignments},
    batch::Batch,
    inference::{Gathered, output},
    loss::{Targets, mtml},
    model::{self, Embedded, FmModel, Forward},
    spec::{FmConfig, FmSpec, Label},
};

/// Everything that gradients reach: the model and what only training needs.
#[derive(Module, Debug)]
pub(crate) struct Network<B: Backend> {
    pub(crate) model: FmModel<B>,
    pub(crate) alignments: Alignments<B>,
}

/// A batch with the store's rows of its keys.
pub(crate) struct Part {
    pub(crate) batch: Batch,
    /// `[keys, embedding_dim]`.
    pub(crate) rows: Vec<f32>,
}

/// Some requests of a batch.
pub(crate) struct Shard {
    /// All of them: what is predicted.
    pub(crate) whole: Part,
    /// What is learned from where that is not the whole.
    pub(crate) sample: Option<Part>,
}

impl Shard {
    /// The surfaces of the targets that are learned from.
    pub(crate) fn learned_surfaces(&self) -> &[u16] {
        &self.sample.as_ref().unwrap_or(&self.whole).batch.surfaces
    }
}

/// The weights of a pass: a fork to learn with, and the same without a graph to predict with.
pub(crate) struct Weights<A: AutodiffBackend> {
    pub(crate) learning: Network<A>,
    pub(crate) predicting: Network<A::InnerBackend>,
}

/// What all shards of a batch share.
pub(crate) struct Context<'a, B: Backend> {
    pub(crate) config: &'a FmConfig,
    pub(crate) spec: &'a FmSpec,
    /// Valid samples a task, over all shards.
    pub(crate) valid: &'a [u32],
    pub(crate) device: &'a B::Device,
}

impl<B: Backend> Clone for Context<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Context<'_, B> {}

/// What came of a shard.
pub(crate) struct Pass {
    /// The whole batch.
    pub(crate) batch: Batch,
    /// `[rows, tae_dim]`.
    pub(crate) tae: Vec<f32>,
    /// `[rows, tasks]`; NaN where a task is not valid on the row's surface.
    pub(crate) predictions: Vec<f32>,
    /// What was learned.
    pub(crate) lesson: Lesson,
}

/// What a shard's gradients are.
pub(crate) struct Lesson {
    /// The shard's part of the batch's loss.
    pub(crate) loss: f32,
    /// Of the dense weights.
    pub(crate) gradients: GradientsParams,
    /// Keys of the sparse rows that were learned from.
    pub(crate) keys: Vec<u64>,
    /// `[keys, embedding_dim]`: of the sparse rows.
    pub(crate) row_gradients: Vec<f32>,
}

/// What a network says of the targets of a part.
pub(crate) struct Said {
    /// `[rows, tae_dim]`.
    pub(crate) tae: Vec<f32>,
    /// `[rows, tasks]`; NaN where a task is not valid on the row's surface.
    pub(crate) predictions: Vec<f32>,
}

/// How many valid samples each task has over all shards, left-out ones included: the weights of
/// those that are learned from stand for them.
pub(crate) fn valid_samples(shards: &[Shard], tasks: usize) -> Vec<u32> {
    let mut valid = vec![0; tasks];
    for shard in shards {
        for (at, &inside) in shard.whole.batch.mask.iter().enumerate() {
            valid[at % tasks] += u32::from(inside);
        }
    }
    valid
}

/// Predicts and differentiates a shard.
pub(crate) fn pass<A>(weights: Weights<A>, shard: Shard, context: Context<'_, A>) -> Result<Pass>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    let Shard { whole, sample } = shard;
    let clean = match sample.is_some() || context.config.predicts_apart() {
        true => {
            let Context { config, spec, valid, device } = context;
            Some(predict(&weights.predicting, &whole, Context { config, spec, valid, device })?)
        }
        false => None,
    };
    let (lesson, said) = learn(&weights.learning, sample.as_ref().unwrap_or(&whole), context)?;
    let Said { tae, predictions } = clean.unwrap_or(said);
    Ok(Pass { batch: whole.batch, tae, predictions, lesson })
}

/// What a network says of a part's targets, of which there is one at least.
pub(crate) fn predict<B: HstuBackend>(
    network: &Network<B>,
    part: &Part,
    context: Context<'_, B>,
) -> Result<Said> {
    let Part { batch, rows } = part;
    let embedded = Gathered::new(batch, rows, context.config.embedding_dim).tensors(context.device);
    let attention = model::attention(context.config, batch)?;
    let forward = network.model.forward(embedded, batch, &attention);
    let aligned = aligned(network, &forward, batch, context.spec);
    Ok(said(forward, &aligned, batch, context.spec))
}

fn learn<A>(network: &Network<A>, part: &Part, context: Context<'_, A>) -> Result<(Lesson, Said)>
where
    A: AutodiffBackend + HstuBackend,
{
    let Context { config, spec, device, .. } = context;
    let Part { batch, rows } = part;
    if batch.targets() == 0 {
        let gradients = GradientsParams::new();
        let lesson = Lesson { loss: 0.0, gradients, keys: Vec::new(), row_gradients: Vec::new() };
        return Ok((lesson, Said { tae: Vec::new(), predictions: Vec::new() }));
    }
    let attention = model::attention(config, batch)?;
    let Embedded { tokens, profiles } =
        Gathered::new(batch, rows, config.embedding_dim).tensors::<A>(device);
    let leaves =
        Embedded { tokens: tokens.require_grad(), profiles: profiles.map(Tensor::require_grad) };
    let forward = network.model.forward(leaves.clone(), batch, &attention);
    let aligned = aligned(network, &forward, batch, spec);
    let loss = loss(batch, forward.main.clone(), &aligned, context);
    let value = loss.clone().into_data().convert::<f32>().iter::<f32>().next().unwrap_or(f32::NAN);
    let said = said(forward, &aligned, batch, spec);
    let mut gradients = loss.backward();
    let mut row_gradients = vec![0.0; rows.len()];
    let mut scatter = |leaf: &Tensor<A, 2>, index: &[u32]| {
        if let Some(sparse) = leaf.grad_remove(&mut gradients) {
            add_rows(&mut row_gradients, index, sparse.into_data(), config.embedding_dim);
        }
    };
    scatter(&leaves.tokens, &batch.key_index);
    leaves.profiles.iter().for_each(|profiles| scatter(profiles, &batch.profile_index));
    let gradients = GradientsParams::from_grads(gradients, network);
    let keys = batch.keys.clone();
    Ok((Lesson { loss: value, gradients, keys, row_gradients }, said))
}

fn said<B: Backend>(
    forward: Forward<B>,
    aligned: &[Aligned<B>],
    batch: &Batch,
    spec: &FmSpec,
) -> Said {
    let output = output(forward, spec.main_tasks());
    Said { predictions: predictions(batch, &output.main, aligned, spec), tae: output.tae }
}

/// The distinct keys of all passes and the sums of their gradients `[keys, dim]`.
pub(crate) fn merge_rows(passes: &[Pass], dim: usize) -> (Vec<u64>, Vec<f32>) {
    let mut places: HashMap<u64, usize> = HashMap::new();
    let (mut keys, mut sums) = (Vec::new(), Vec::new());
    for pass in passes {
        let lesson = &pass.lesson;
        for (&key, row) in lesson.keys.iter().zip(lesson.row_gradients.chunks_exact(dim)) {
            let place = *places.entry(key).or_insert(keys.len());
            if place == keys.len() {
                keys.push(key);
                sums.extend_from_slice(row);
            } else {
                let sum = &mut sums[place * dim..(place + 1) * dim];
                sum.iter_mut().zip(row).for_each(|(sum, &gradient)| *sum += gradient);
            }
        }
    }
    (keys, sums)
}

fn aligned<B: HstuBackend>(
    network: &Network<B>,
    forward: &Forward<B>,
    batch: &Batch,
    spec: &FmSpec,
) -> Vec<Aligned<B>> {
    if spec.auxiliary_tasks().is_empty() {
        return Vec::new();
    }
    let data = TensorData::new(batch.features.clone(), [batch.targets(), spec.features]);
    let features = Tensor::from_data(data, &forward.tae.device());
    network.alignments.forward(&forward.tae, &features, &batch.surfaces)
}

/// Eq. 3, with the means of eq. 4 over the whole batch.
fn loss<A: AutodiffBackend>(
    batch: &Batch,
    main: Tensor<A, 2>,
    aligned: &[Aligned<A>],
    context: Context<'_, A>,
) -> Tensor<A, 1> {
    let spec = context.spec;
    let (tasks, mains) = (spec.tasks.len(), spec.main_tasks().len());
    let columns = |from: usize, to: usize| {
        let pick = |index: &usize| (from..to).contains(&(index % tasks));
        let cells = || (0..batch.labels.len()).filter(pick);
        let labels = cells().map(|index| batch.labels[index]).collect();
        let mask: Vec<bool> = cells().map(|index| batch.mask[index]).collect();
        Targets::new(&spec.tasks[from..to], labels, &mask, &context.valid[from..to])
            .weighted(&batch.weights)
    };
    let mut loss = mtml(main, &columns(0, mains));
    if mains < tasks {
        let targets = columns(mains, tasks);
        for aligned in aligned {
            loss = loss + mtml(aligned.outputs.clone(), &targets.rows(&aligned.rows));
        }
    }
    loss
}

fn predictions<B: Backend>(
    batch: &Batch,
    main: &[f32],
    aligned: &[Aligned<B>],
    spec: &FmSpec,
) -> Vec<f32> {
    let (tasks, mains) = (spec.tasks.len(), spec.main_tasks().len());
    let mut all = vec![f32::NAN; batch.targets() * tasks];
    for (row, values) in main.chunks_exact(mains).enumerate() {
        all[row * tasks..row * tasks + mains].copy_from_slice(values);
    }
    for aligned in aligned {
        let data = aligned.outputs.clone().into_data().convert::<f32>();
        for (at, value) in data.iter::<f32>().enumerate() {
            let (row, task) = (aligned.rows[at / (tasks - mains)], mains + at % (tasks - mains));
            if spec.tasks[task].surfaces[batch.surfaces[row] as usize] {
                let binary = matches!(spec.tasks[task].label, Label::Action(_));
                all[row * tasks + task] = if binary { 1.0 / (1.0 + (-value).exp()) } else { value };
            }
        }
    }
    all
}

/// Adds the gradients `[places, fields * dim]` of every place where a key stood to `rows` `[keys, dim]`.
fn add_rows(rows: &mut [f32], index: &[u32], gradients: TensorData, dim: usize) {
    let gradients = gradients.convert::<f32>();
    let flat = gradients.as_slice::<f32>().expect("converted to f32");
    for (&index, part) in index.iter().zip(flat.chunks_exact(dim)) {
        let at = index as usize * dim;
        rows[at..at + dim].iter_mut().zip(part).for_each(|(sum, &g)| *sum += g);
    }
}
