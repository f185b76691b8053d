//! One thread's share of a training batch: forward, loss, backward.
//!
//! A batch is split by request, so shards share only the weights. The loss averages over the whole
//! batch, so each shard receives the number of valid samples of all shards. Predictions are always
//! made for whole examples and without dropout, as in serving; where training samples parts of the
//! examples, uses dropout or keeps an average of the weights, predicting is a separate pass. The
//! trainer applies the gradients.

use std::collections::HashMap;

use burn::{
    backend::Autodiff,
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
    alignment::{AlignmentModules, AlignmentOutput},
    batch::FmBatch,
    checkpoint::assign_weights,
    device::Cpu,
    inference::{FmOutput, numbers, prediction, to_output},
    label_scale::LabelScales,
    loss::{LossTargets, cell_weights, mtml_loss},
    model::{self, BatchAttention, EmbeddedBatch, FmModel, ModelOutput, lock_weight_rng},
    spec::{FmConfig, FmSpec},
    trainer::StepOutput,
    update::WeightTensor,
};

/// All dense weights: the model, and the alignment modules that only training needs.
#[derive(Module, Debug)]
pub(crate) struct FmNetwork<B: Backend> {
    pub(crate) model: FmModel<B>,
    pub(crate) alignments: AlignmentModules<B>,
}

/// New weights from the configuration's seed. The CPU draws them, so they are the same on every
/// device. All are drawn here rather than at their first use, while the lock keeps other threads
/// from drawing.
pub(crate) fn fresh_network<A: AutodiffBackend + HstuBackend>(
    config: &FmConfig,
    spec: &FmSpec,
) -> FmNetwork<A> {
    let _alone = lock_weight_rng();
    Autodiff::<Cpu>::seed(&Default::default(), config.seed);
    let drawn = WeightTensor::of(&FmNetwork::<Autodiff<Cpu>>::new(config, spec));
    let drawn = drawn.into_iter().map(|weight| (weight.name, (weight.shape, weight.values)));
    assign_weights(FmNetwork::new(config, spec), drawn.collect())
        .expect("one network has the same weights on all devices")
}

impl<A: AutodiffBackend + HstuBackend> FmNetwork<A> {
    fn new(config: &FmConfig, spec: &FmSpec) -> Self {
        let device = &A::Device::default();
        FmNetwork {
            model: FmModel::new(config, spec, device),
            alignments: AlignmentModules::new(config, spec, device),
        }
    }
}

/// A batch with the sparse rows of its keys.
pub(crate) struct GatheredBatch {
    pub(crate) batch: FmBatch,
    /// `[keys, embedding_dim]`.
    pub(crate) rows: Vec<f32>,
}

/// A batch where a pass computes.
struct PassInputs<'a, B: Backend> {
    batch: &'a FmBatch,
    embedded: EmbeddedBatch<B>,
    attention: BatchAttention,
}

impl<'a, B: HstuBackend> PassInputs<'a, B> {
    /// Those of a part, with its rows `[keys, embedding_dim]` where the pass computes.
    fn new(part: &'a GatheredBatch, rows: &Tensor<B, 2>, config: &FmConfig) -> Result<Self> {
        let batch = &part.batch;
        let attention = model::batch_attention(config, batch)?;
        Ok(Self { batch, embedded: EmbeddedBatch::new(batch, rows), attention })
    }

    /// Those of a part whose rows are not yet there.
    fn of(part: &'a GatheredBatch, config: &FmConfig) -> Result<Self> {
        Self::new(part, &part.rows(), config)
    }
}

impl<'a, A: AutodiffBackend> PassInputs<'a, A> {
    /// The same without an autodiff graph.
    fn inner(&self) -> PassInputs<'a, A::InnerBackend> {
        let EmbeddedBatch { tokens, profiles } = self.embedded.clone();
        let profiles = profiles.map(Tensor::inner);
        let embedded = EmbeddedBatch { tokens: tokens.inner(), profiles };
        PassInputs { batch: self.batch, embedded, attention: self.attention.clone() }
    }
}

impl GatheredBatch {
    /// The rows on a device, `[keys, embedding_dim]`.
    fn rows<B: Backend>(&self) -> Tensor<B, 2> {
        model::rows_of(&self.batch, self.rows.clone())
    }
}

/// The requests of a batch that one thread processes.
pub(crate) struct Shard {
    /// The whole examples, for which predictions are made.
    pub(crate) whole: GatheredBatch,
    /// The parts of the examples to learn from; none to learn from the whole examples.
    pub(crate) sample: Option<GatheredBatch>,
}

/// The settings that all shards of a batch share.
#[derive(Clone, Copy)]
pub(crate) struct PassContext<'a> {
    pub(crate) config: &'a FmConfig,
    pub(crate) spec: &'a FmSpec,
    /// Of the regressions, as predictions are made by.
    pub(crate) scales: &'a LabelScales,
    /// `[tasks]`: the number of valid samples over all shards.
    pub(crate) valid: &'a [u32],
    /// `[surfaces][tasks]`: how much of a task's gradient reaches what tasks share.
    pub(crate) shares: &'a [Vec<f32>],
}

/// The result of processing a shard.
pub(crate) struct ShardResult {
    /// The predictions for the whole examples.
    pub(crate) output: StepOutput,
    pub(crate) gradients: ShardGradients,
}

/// The loss of a shard and its gradients.
#[derive(Default)]
pub(crate) struct ShardGradients {
    /// The shard's share of the batch's loss.
    pub(crate) loss: f32,
    /// Gradients of the dense weights.
    pub(crate) dense: GradientsParams,
    /// Keys of the sparse rows that have gradients.
    pub(crate) keys: Vec<u64>,
    /// `[keys, embedding_dim]`: gradients of the sparse rows.
    pub(crate) row_gradients: Vec<f32>,
}

/// How many valid samples each task has over all shards, including targets that sampling left out:
/// the loss weights of the remaining ones make up for them.
pub(crate) fn valid_samples(shards: &[Shard], tasks: usize) -> Vec<u32> {
    let mut valid = vec![0; tasks];
    for shard in shards {
        for (at, &inside) in shard.whole.batch.mask.iter().enumerate() {
            valid[at % tasks] += u32::from(inside);
        }
    }
    valid
}

/// Predicts and differentiates a shard: learns with a fork that has an autodiff graph, and predicts
/// with weights without one.
pub(crate) fn pass<A>(
    learning: &FmNetwork<A>,
    predicting: &FmNetwork<A::InnerBackend>,
    shard: Shard,
    context: PassContext<'_>,
) -> Result<ShardResult>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    let Shard { whole, sample } = shard;
    let config = context.config;
    // A device has the work of both passes before the host waits for a result of either.
    let (separate, learned) = match &sample {
        None => {
            let rows = whole.rows::<A>().require_grad();
            let inputs = PassInputs::new(&whole, &rows, config)?;
            let predict = || NetworkOutput::new(predicting, inputs.inner(), context);
            let separate = config.needs_prediction_pass().then(predict);
            (separate, Some(learn(learning, inputs, rows, context)))
        }
        Some(sample) => {
            let separate = NetworkOutput::new(predicting, PassInputs::of(&whole, config)?, context);
            let mut learned = None;
            if sample.batch.targets() > 0 {
                let rows = sample.rows::<A>().require_grad();
                let inputs = PassInputs::new(sample, &rows, config)?;
                learned = Some(learn(learning, inputs, rows, context));
            }
            (Some(separate), learned)
        }
    };
    let (gradients, own) = learned.unzip();
    let separate = separate.map(|output| output.read(&whole.batch, context));
    let output = separate.or_else(|| own.map(|output| output.read(&whole.batch, context)));
    let (output, gradients) = (output.unwrap_or_default(), gradients.unwrap_or_default());
    Ok(ShardResult { output, gradients })
}

/// A network's predictions for a part's targets, with their labels; the loss is 0.
pub(crate) fn predict<B: HstuBackend>(
    network: &FmNetwork<B>,
    part: &GatheredBatch,
    context: PassContext<'_>,
) -> Result<StepOutput> {
    let batch = &part.batch;
    if batch.targets() == 0 {
        return Ok(StepOutput::default());
    }
    let inputs = PassInputs::of(part, context.config)?;
    Ok(NetworkOutput::new(network, inputs, context).read(batch, context))
}

/// The user embeddings of a part's requests, `[requests, user_state_width]`; zeros without a
/// history. The part must have no target.
pub(crate) fn user_states<B: HstuBackend>(
    network: &FmNetwork<B>,
    part: &GatheredBatch,
    context: PassContext<'_>,
) -> Result<Vec<f32>> {
    let (width, batch) = (context.config.user_state_width(), &part.batch);
    let ends = || batch.history_offsets.windows(2);
    let mut all = vec![0.0; ends().len() * width];
    if batch.history_tokens() == 0 {
        return Ok(all);
    }
    let PassInputs { embedded, attention, .. } = PassInputs::of(part, context.config)?;
    let states = numbers(network.model.user_states(embedded, batch, &attention));
    let known = all.chunks_exact_mut(width).zip(ends()).filter(|(_, ends)| ends[1] > ends[0]);
    for ((all, _), state) in known.zip(states.chunks_exact(width)) {
        all.copy_from_slice(state);
    }
    Ok(all)
}

/// Gradients, and the outputs that they are of, of a batch with targets. `rows`, of its keys, are
/// those of the inputs.
fn learn<A>(
    network: &FmNetwork<A>,
    inputs: PassInputs<'_, A>,
    rows: Tensor<A, 2>,
    context: PassContext<'_>,
) -> (ShardGradients, NetworkOutput<A>)
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    let batch = inputs.batch;
    let output = NetworkOutput::new(network, inputs, context);
    let loss = loss(batch, &learned_output(network, &output, batch, context), context);
    let mut gradients = loss.backward();
    let value = loss.into_data().convert::<f32>().iter::<f32>().next().unwrap_or(f32::NAN);
    let row_gradients = rows.grad_remove(&mut gradients).expect("every token has rows");
    let row_gradients = numbers(row_gradients);
    let dense = GradientsParams::from_grads(gradients, network);
    let keys = batch.keys.clone();
    (ShardGradients { loss: value, dense, keys, row_gradients }, output)
}

/// What a network says of a batch's targets, where it computed it.
struct NetworkOutput<B: Backend> {
    forward: ModelOutput<B>,
    aligned: Vec<AlignmentOutput<B>>,
}

impl<B: HstuBackend> NetworkOutput<B> {
    /// The forward pass over a batch with targets.
    fn new(
        network: &FmNetwork<B>,
        PassInputs { batch, embedded, attention }: PassInputs<'_, B>,
        context: PassContext<'_>,
    ) -> Self {
        let forward = network.model.forward(embedded, batch, &attention);
        let aligned = aligned(network, &forward.tae, batch, context.spec);
        Self { forward, aligned }
    }

    /// The same on the host, with the labels; the loss is 0.
    fn read(self, batch: &FmBatch, context: PassContext<'_>) -> StepOutput {
        let mains = context.spec.main_tasks();
        let FmOutput { tae, main } = to_output(self.forward, mains, context.scales);
        let predictions = by_task(batch, &main, &self.aligned, context);
        let (labels, mask) = (batch.labels.clone(), batch.mask.clone());
        StepOutput { tae, predictions, labels, mask, ..StepOutput::default() }
    }
}

/// The outputs from which a network learns. They equal those of the forward pass, but of a task
/// that is new to the model or to a surface's alignment module only a share of the gradient reaches
/// what tasks share. Of an auxiliary one that is the TAE: the hidden layer of a surface's module
/// takes its whole gradient, and the modules of surfaces to which nothing is new learn as ever.
fn learned_output<A: AutodiffBackend + HstuBackend>(
    network: &FmNetwork<A>,
    NetworkOutput { forward, aligned }: &NetworkOutput<A>,
    batch: &FmBatch,
    PassContext { spec, shares, .. }: PassContext<'_>,
) -> NetworkOutput<A> {
    let device = forward.tae.device();
    let shared = |whole: &Tensor<A, 2>, alone: Tensor<A, 2>, shares: &[f32]| {
        let shares =
            Tensor::from_data(TensorData::new(shares.to_vec(), [1, shares.len()]), &device);
        alone.clone() + (whole.clone() - alone) * shares
    };
    let is_part = |shares: &[f32]| shares.iter().any(|&share| share < 1.0);
    let mains = &shares[0][..spec.main_tasks().len()];
    let main = if is_part(mains) {
        shared(&forward.main, network.model.main_alone(forward.tae.clone()), mains)
    } else {
        forward.main.clone()
    };
    let mut aligned = aligned.clone();
    let own_shares: Vec<Vec<f32>> = aligned
        .iter()
        .map(|AlignmentOutput { rows, tasks, .. }| {
            let shares = &shares[usize::from(batch.surfaces[rows[0]])];
            tasks.iter().map(|&task| shares[task]).collect()
        })
        .collect();
    if own_shares.iter().any(|shares| is_part(shares)) {
        let alone = self::aligned(network, &forward.tae.clone().detach(), batch, spec);
        let all = aligned.iter_mut().zip(alone).zip(&own_shares);
        for ((whole, alone), shares) in all.filter(|(_, shares)| is_part(shares)) {
            whole.outputs = shared(&whole.outputs, alone.outputs, shares);
        }
    }
    NetworkOutput { forward: ModelOutput { main, tae: forward.tae.clone() }, aligned }
}

/// The distinct keys of all shards and the sums of their gradients `[keys, dim]`.
pub(crate) fn merge_rows(passes: &[ShardResult], dim: usize) -> (Vec<u64>, Vec<f32>) {
    let mut places: HashMap<u64, usize> = HashMap::new();
    let (mut keys, mut sums) = (Vec::new(), Vec::new());
    for gradients in passes.iter().map(|pass| &pass.gradients) {
        for (&key, row) in gradients.keys.iter().zip(gradients.row_gradients.chunks_exact(dim)) {
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
    network: &FmNetwork<B>,
    tae: &Tensor<B, 2>,
    batch: &FmBatch,
    spec: &FmSpec,
) -> Vec<AlignmentOutput<B>> {
    if spec.auxiliary_tasks().is_empty() {
        return Vec::new();
    }
    network.alignments.forward(tae, batch, spec)
}

/// Eq. 3, with the means of eq. 4 over the whole batch.
fn loss<A>(
    batch: &FmBatch,
    NetworkOutput { forward, aligned }: &NetworkOutput<A>,
    context: PassContext<'_>,
) -> Tensor<A, 1>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    let PassContext { spec, scales, valid, .. } = context;
    let (tasks, mains) = (&spec.tasks, spec.main_tasks().len());
    let weights = cell_weights(batch, tasks, valid);
    let all = 0..batch.targets();
    let targets = LossTargets::new(batch, all, tasks, 0..mains, &weights, scales);
    let mut loss = mtml_loss(forward.main.clone(), &targets);
    for AlignmentOutput { rows, tasks: own, outputs } in aligned {
        let (rows, columns) = (rows.iter().copied(), own.iter().copied());
        let targets = LossTargets::new(batch, rows, tasks, columns, &weights, scales);
        loss = loss + mtml_loss(outputs.clone(), &targets);
    }
    loss
}

/// `[rows, tasks]`: the main tasks' values, and the auxiliary ones on the surfaces where they are
/// valid.
fn by_task<B: Backend>(
    batch: &FmBatch,
    main: &[f32],
    aligned: &[AlignmentOutput<B>],
    PassContext { spec, scales, .. }: PassContext<'_>,
) -> Vec<f32> {
    let (tasks, mains) = (spec.tasks.len(), spec.main_tasks().len());
    let mut all = vec![f32::NAN; batch.targets() * tasks];
    for (row, values) in main.chunks_exact(mains).enumerate() {
        all[row * tasks..row * tasks + mains].copy_from_slice(values);
    }
    for aligned in aligned {
        let data = aligned.outputs.clone().into_data().convert::<f32>();
        for (at, value) in data.iter::<f32>().enumerate() {
            let own = &aligned.tasks;
            let (row, task) = (aligned.rows[at / own.len()], own[at % own.len()]);
            if spec.tasks[task].surfaces[batch.surfaces[row] as usize] {
                all[row * tasks + task] = prediction(&spec.tasks[task], scales, value);
            }
        }
    }
    all
}

/// Prepares each of `all` on the calling thread and runs it on another one, `threads` at a time:
/// with long histories a batch has more parts than there are threads. The results are in order.
pub(crate) fn run_in_waves<S, P: Send, T: Send>(
    all: Vec<S>,
    threads: usize,
    prepare: impl Fn(S) -> P,
    run: impl Fn(P) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let mut results = Vec::with_capacity(all.len());
    let mut rest = all.into_iter();
    while rest.len() > 0 {
        std::thread::scope(|scope| -> Result<()> {
            let prepared: Vec<P> = rest.by_ref().take(threads).map(&prepare).collect();
            let run = &run;
            let wave: Vec<_> =
                prepared.into_iter().map(|one| scope.spawn(move || run(one))).collect();
            for thread in wave {
                let result = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                results.push(result?);
            }
            Ok(())
        })?;
    }
    Ok(results)
}
