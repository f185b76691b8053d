//! Predictions and user embeddings of a model in training, without training it.
//!
//! The results are those of a checkpoint written at this moment. Nothing changes: no gradient, no
//! new row in the store, no statistics. The caller decides at which step to ask.

use hypercast_kernels::attention::HstuBackend;

use crate::{
    Result,
    batch::FmBatch,
    inference::numbers,
    model,
    shard::{self, FmNetwork, GatheredBatch, PassContext, ShardPredictions},
};

/// The network's predictions for a part's targets, with the part.
pub(crate) fn predict<B: HstuBackend>(
    network: FmNetwork<B>,
    part: GatheredBatch,
    context: PassContext<'_>,
) -> Result<(ShardPredictions, FmBatch)> {
    let predictions = match part.batch.targets() {
        0 => ShardPredictions::default(),
        _ => shard::predict(&network, &part, context)?,
    };
    Ok((predictions, part.batch))
}

/// The user embeddings of a part's requests, `[requests, user_state_width]`; zeros without a
/// history.
pub(crate) fn user_states<B: HstuBackend>(
    network: FmNetwork<B>,
    part: GatheredBatch,
    context: PassContext<'_>,
) -> Result<Vec<f32>> {
    let (config, batch) = (context.config, &part.batch);
    let width = config.user_state_width();
    let requests = batch.history_offsets.len() - 1;
    let mut all = vec![0.0; requests * width];
    if batch.history_tokens() == 0 {
        return Ok(all);
    }
    let attention = model::batch_attention(config, batch)?;
    let states = numbers(network.model.user_states(part.embed(), batch, &attention));
    let known =
        (0..requests).filter(|&at| batch.history_offsets[at + 1] > batch.history_offsets[at]);
    for (at, state) in known.zip(states.chunks_exact(width)) {
        all[at * width..(at + 1) * width].copy_from_slice(state);
    }
    Ok(all)
}
