//! Predictions and user embeddings of a model in training, without training it.
//!
//! The results are those of a checkpoint written at this moment. Nothing changes: no gradient, no
//! new row in the store, no statistics. The caller decides at which step to ask.

use hypercast_kernels::attention::HstuBackend;

use crate::{
    Result,
    example::Example,
    inference::GatheredRows,
    model,
    shard::{self, FmNetwork, GatheredBatch, PassContext},
    trainer::StepOutput,
};

/// The network's predictions for a part's targets, with their labels; the loss is 0.
pub(crate) fn predict<B: HstuBackend>(
    network: FmNetwork<B>,
    part: GatheredBatch,
    context: PassContext<'_, B>,
) -> Result<StepOutput> {
    if part.batch.targets() == 0 {
        return Ok(StepOutput::default());
    }
    let predictions = shard::predict(&network, &part, context)?;
    let mut output = StepOutput::default();
    output.append(predictions, part.batch);
    Ok(output)
}

/// The user embeddings of a part's requests, `[requests, user_state_width]`; zeros without a
/// history.
pub(crate) fn user_states<B: HstuBackend>(
    network: FmNetwork<B>,
    part: GatheredBatch,
    context: PassContext<'_, B>,
) -> Result<Vec<f32>> {
    let PassContext { config, device, .. } = context;
    let GatheredBatch { batch, rows } = part;
    let width = config.user_state_width();
    let requests = batch.history_offsets.len() - 1;
    let mut all = vec![0.0; requests * width];
    if batch.history_tokens() == 0 {
        return Ok(all);
    }
    let embedded = GatheredRows::new(&batch, &rows, config.embedding_dim).tensors(device);
    let attention = model::batch_attention(config, &batch)?;
    let states = network.model.user_states(embedded, &batch, &attention);
    let states: Vec<f32> =
        states.into_data().convert::<f32>().into_vec().expect("converted to f32");
    let known =
        (0..requests).filter(|&at| batch.history_offsets[at + 1] > batch.history_offsets[at]);
    for (at, state) in known.zip(states.chunks_exact(width)) {
        all[at * width..(at + 1) * width].copy_from_slice(state);
    }
    Ok(all)
}

/// A copy of an example without its targets.
pub(crate) fn without_targets(example: &Example) -> Example {
    Example {
        request: example.request,
        user: example.user.clone(),
        surface: example.surface,
        time_ms: example.time_ms,
        history: example.history.clone(),
        targets: Vec::new(),
    }
}
