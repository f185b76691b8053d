//! Looking at a model in training without teaching it: predictions and user
//! embeddings as of this moment.
//!
//! These are what a checkpoint would give now; no gradient, no new row in the
//! store, no statistics. Which moment that is, is the caller's.

use hypercast_kernels::attention::HstuBackend;

use crate::{
    Result,
    example::Example,
    inference::Gathered,
    model,
    shard::{self, Context, Network, Part, Said},
};

/// The predictions for a part's targets.
#[derive(Debug, Default)]
pub(crate) struct Prediction {
    /// `[rows, tae_dim]`.
    pub(crate) tae: Vec<f32>,
    /// `[rows, tasks]`; NaN where a task is not valid on the row's surface.
    pub(crate) predictions: Vec<f32>,
    /// `[rows, tasks]`.
    pub(crate) labels: Vec<f32>,
    /// `[rows, tasks]`.
    pub(crate) mask: Vec<bool>,
}

/// What the network says of a part's targets.
pub(crate) fn predict<B: HstuBackend>(
    network: Network<B>,
    part: Part,
    context: Context<'_, B>,
) -> Result<Prediction> {
    if part.batch.targets() == 0 {
        return Ok(Prediction::default());
    }
    let Said { tae, predictions } = shard::predict(&network, &part, context)?;
    Ok(Prediction { tae, predictions, labels: part.batch.labels, mask: part.batch.mask })
}

/// The user embeddings of a part's requests, `[requests, user_state_width]`; zeros without a history.
pub(crate) fn user_states<B: HstuBackend>(
    network: Network<B>,
    part: Part,
    context: Context<'_, B>,
) -> Result<Vec<f32>> {
    let Context { config, device, .. } = context;
    let Part { batch, rows } = part;
    let width = config.user_state_width();
    let requests = batch.history_offsets.len() - 1;
    let mut all = vec![0.0; requests * width];
    if batch.history_tokens() == 0 {
        return Ok(all);
    }
    let embedded = Gathered::new(&batch, &rows, config.embedding_dim).tensors(device);
    let attention = model::attention(config, &batch)?;
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

/// An example without its targets.
pub(crate) fn bare(example: &Example) -> Example {
    Example {
        request: example.request,
        user: example.user.clone(),
        surface: example.surface,
        time_ms: example.time_ms,
        history: example.history.clone(),
        targets: Vec::new(),
    }
}
