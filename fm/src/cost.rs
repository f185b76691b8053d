//! The cost of a model: its parameters, and the floating-point operations of a request computed
//! from the configuration.
//!
//! A multiply and an add count as two operations. Activations, norms and look-ups are not counted,
//! because they are small compared to the matrix products.

use crate::spec::{FmConfig, FmSpec};

/// The number of values in a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct ModelSize {
    /// Dense weights that serving needs.
    pub serving: usize,
    /// All dense weights, alignment modules included.
    pub dense: usize,
    /// Values in sparse rows.
    pub sparse: usize,
}

/// The number of tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenCounts {
    /// History events.
    pub history: usize,
    /// Targets, one token each.
    pub targets: usize,
}

/// Floating-point operations of a forward pass over one request, whose history is computed once for
/// all its targets.
pub fn flops(config: &FmConfig, spec: &FmSpec, tokens: TokenCounts) -> f64 {
    let FmConfig { dim, heads, qk_dim, v_dim, layers, .. } = *config;
    let (h, m) = (tokens.history.min(config.max_history) as f64, tokens.targets as f64);
    let (d, qk, v) = (dim as f64, (heads * qk_dim) as f64, (heads * v_dim) as f64);
    let input =
        (spec.token_fields() * config.embedding_dim + spec.item_numbers() + spec.content) as f64;
    let embedding = (h + m) * 2.0 * (input * d + d * d) + h * 2.0 * spec.outcome_width() as f64 * d;
    let candidate = spec.candidate_width(config) as f64;
    let (hidden, direct) = if candidate > 0.0 { (2.0 * d, d) } else { (0.0, 0.0) };
    let columns = m * 2.0 * (candidate * (hidden + direct) + hidden * d);
    let pair = 2.0 * qk + 2.0 * v;
    let of_targets = m * visible_tokens(config, h);
    let of_history: f64 = (0..h as usize).map(|at| visible_tokens(config, at as f64)).sum();
    let inner = (h + m) * 2.0 * d * (2.0 * v + 2.0 * qk)
        + (of_targets + of_history) * pair
        + (h + m) * 2.0 * v * d;
    let last = m * 2.0 * d * (2.0 * v + 2.0 * qk)
        + h * 2.0 * d * (v + qk)
        + of_targets * pair
        + m * 2.0 * v * d;
    let tae = config.tae_width() as f64;
    let projection = if config.tae_dim == 0 { 0.0 } else { m * 2.0 * d * tae };
    let tasks = spec.main_tasks().len() as f64;
    let head = m * 2.0 * (tae * d + (tae + d) * tasks);
    embedding + columns + (layers as f64 - 1.0) * inner + last + projection + head
}

/// The candidates of the request over which the cost of a history is shared, wherever a cost is one
/// a candidate.
pub const CANDIDATES: usize = 20;

/// Floating-point operations a candidate of a one-stage model of this size, over a full history
/// that [`CANDIDATES`] share.
///
/// A one-stage model is what a surface would have without the FM: one model of the FM's size,
/// trained on that surface alone, whose own heads rank. An expert's cost is counted alike.
pub fn one_stage_flops(config: &FmConfig, spec: &FmSpec) -> u64 {
    let tokens = TokenCounts { history: config.max_history, targets: CANDIDATES };
    (flops(config, spec, tokens) / CANDIDATES as f64).round() as u64
}

/// Floating-point operations of one more candidate over a full history that is kept.
pub fn candidate_flops(config: &FmConfig, spec: &FmSpec) -> u64 {
    let cost = |targets| flops(config, spec, TokenCounts { history: config.max_history, targets });
    (cost(2) - cost(1)).round() as u64
}

/// The number of tokens that a token attends to, itself included, if it has `before` predecessors.
fn visible_tokens(config: &FmConfig, before: f64) -> f64 {
    match config.window {
        0 => before + 1.0,
        window => (before + 1.0).min((window + config.global + 1) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{TaskLabel, TaskSpec};

    fn spec() -> FmSpec {
        FmSpec {
            surfaces: vec!["a".into()],
            actions: 1,
            values: 0,
            item_ids: 0,
            item_dense: 0,
            item_optional: Vec::new(),
            profile_ids: vec![],
            id_widths: Default::default(),
            features: 0,
            tasks: vec![TaskSpec {
                name: "t".into(),
                main: true,
                label: TaskLabel::Action(0),
                transform: Default::default(),
                surfaces: vec![true],
                weight: 1.0,
            }],
            content: 0,
            training_only: Default::default(),
            alignments: Default::default(),
        }
    }

    #[test]
    fn the_history_is_counted_once_per_request() {
        let config = FmConfig { max_history: 100, ..FmConfig::default() };
        let cost = |history, targets| flops(&config, &spec(), TokenCounts { history, targets });
        let own = cost(100, 2) - cost(100, 1);
        assert!((cost(100, 12) - cost(100, 2) - 10.0 * own).abs() < 1.0, "targets cost alike");
        assert!(cost(100, 1) > 20.0 * own, "and little beside the history");
        assert_eq!(cost(500, 1), cost(100, 1), "events beyond max_history cost nothing");
        let window = FmConfig { window: 8, global: 2, ..config.clone() };
        assert!(flops(&window, &spec(), TokenCounts { history: 100, targets: 1 }) < cost(100, 1));
    }

    #[test]
    fn a_one_stage_model_shares_a_full_history_among_candidates() {
        let config = FmConfig { max_history: 100, ..FmConfig::default() };
        let cost = |history, targets| flops(&config, &spec(), TokenCounts { history, targets });
        let (own, history) = (cost(100, 2) - cost(100, 1), 2.0 * cost(100, 1) - cost(100, 2));
        let expected = own + history / 20.0;
        assert!((one_stage_flops(&config, &spec()) as f64 - expected).abs() < 1.0);
        assert!((candidate_flops(&config, &spec()) as f64 - own).abs() < 1.0);
    }

    #[test]
    fn one_layer_by_hand() {
        let config = FmConfig {
            dim: 4,
            layers: 1,
            heads: 1,
            qk_dim: 2,
            v_dim: 3,
            embedding_dim: 5,
            max_history: 10,
            ..FmConfig::default()
        };
        // One target, no history: input of `token_fields` * 5 values.
        let input = spec().token_fields() as f64 * 5.0;
        let expected = 2.0 * (input * 4.0 + 16.0) // token
            + 2.0 * 4.0 * 10.0 // U, Q, V, K
            + 10.0 // it sees itself
            + 2.0 * 3.0 * 4.0 // output
            + 2.0 * (4.0 * 4.0 + (4.0 + 4.0)); // head
        assert_eq!(flops(&config, &spec(), TokenCounts { history: 0, targets: 1 }), expected);
    }
}
