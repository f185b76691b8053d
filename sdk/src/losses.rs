//! Losses of a task, in place of the host's cross-entropy or squared error.
//!
//! Each function takes the task and the tensor that is its output, and returns the loss of each
//! row, `[rows, 1]`, for [`Graph::loss`](crate::Graph::loss). The host takes the mean over the
//! task's rows, by their weights. Losses are tensors, so they can be added:
//!
//! ```
//! # use hypercast_sdk::{
//! #     Description, Expert, Graph, HostInfo, Linear, SchemaTask, TaskKind, losses,
//! # };
//! struct Listwise;
//!
//! impl Expert for Listwise {
//!     fn describe(info: &HostInfo) -> Description {
//!         Description::new("listwise", "1.0.0").all_tasks(info)
//!     }
//!
//!     fn network(g: &Graph) {
//!         let logit = Linear::new("click", 1).apply(g.tae());
//!         g.output("click", logit);
//!         g.loss("click", losses::bce("click", logit) + losses::listwise_softmax("click", logit));
//!     }
//! }
//! # let click = SchemaTask {
//! #     name: "click".into(), kind: TaskKind::Binary, label: "click".into(), surfaces: vec![],
//! # };
//! # let info = HostInfo { tae_dim: 4, tasks: vec![click], ..HostInfo::default() };
//! # let (_, network) = hypercast_sdk::build::<Listwise>(&info)?;
//! # assert_eq!(network.outputs[0].options[0].name, "loss");
//! # Ok::<(), String>(())
//! ```
//!
//! **Calibration.** [`pairwise_logistic`] and [`listwise_softmax`] compare the rows of a request
//! and do not change if all outputs rise together, so what they train has an order and no scale:
//! its probabilities are not rates of anything, its NE can be above 1, and an `evaluate` that looks
//! at NE or calibration holds it. Add [`bce`], as above, for a task whose probabilities are used or
//! measured. [`focal`] draws probabilities towards the middle, too. [`quantile`] and [`huber`]
//! predict a quantile, or something between mean and median, and the host does not move such
//! predictions to the labels' mean.

use crate::graph::Tensor;
use crate::segment::PairwiseFunction::{Identity, Softplus, Step};

/// Below a sum of weights, which is at least one row's where there is any.
const SMALLEST_WEIGHT: f32 = 1e-6;

/// Binary cross-entropy, the host's own loss of a binary task.
pub fn bce<'g>(task: &str, output: Tensor<'g>) -> Tensor<'g> {
    let logit = logit(task, output);
    logit.softplus() - logit * output.graph().label(task)
}

/// Cross-entropy with a factor `(1 - p)^gamma`, p being the probability of what happened, so that
/// rows that are predicted well count less (Lin et al., 2017). 0 is [`bce`], 2 is usual.
pub fn focal<'g>(task: &str, output: Tensor<'g>, gamma: f32) -> Tensor<'g> {
    let sign = output.graph().label(task) * 2.0 - 1.0;
    let right = logit(task, output) * sign;
    // ln(1 - p) is -softplus(right), and -ln p is softplus(-right).
    (right.softplus() * -gamma).exp() * (-right).softplus()
}

/// The pinball loss, which a regression's `quantile` (above 0, below 1) minimises.
pub fn quantile<'g>(task: &str, output: Tensor<'g>, quantile: f32) -> Tensor<'g> {
    let above = output.graph().label(task) - output;
    (above * quantile).max(above * (quantile - 1.0))
}

/// Half the squared error of a regression up to errors of `delta`, and linear beyond. A label's
/// deviation is 1/2.
pub fn huber<'g>(task: &str, output: Tensor<'g>, delta: f32) -> Tensor<'g> {
    let error = (output.graph().label(task) - output).abs();
    let near = error.min(output.graph().constant(delta));
    near * (error - near * 0.5)
}

/// The logistic loss of pairs (RankNet): for each row the mean, by their weights, over the rows of
/// its request with a lower label of `ln(1 + e^(theirs - own))`; 0 without any. It has no scale:
/// see the module's text.
pub fn pairwise_logistic<'g>(task: &str, output: Tensor<'g>) -> Tensor<'g> {
    let g = output.graph();
    let (lower, weight) = (-g.label(task), g.weight(task));
    let nothing = weight * 0.0;
    let (own, others) = ([lower, nothing, output], [lower, weight, output]);
    let functions = [Step, Identity, Softplus];
    let sum = |width: usize| {
        let others = g.concat(&others[..width]);
        g.concat(&own[..width]).segment_pair_sum(others, &functions[..width])
    };
    sum(3) / sum(2).max(g.constant(SMALLEST_WEIGHT))
}

/// The cross-entropy of a softmax over the rows of a request that count (ListNet, Cao et al.,
/// 2007): each row's label, which must not be negative, times the negative logarithm of its share.
/// It has no scale: see the module's text.
pub fn listwise_softmax<'g>(task: &str, output: Tensor<'g>) -> Tensor<'g> {
    let g = output.graph();
    -(g.label(task) * output.segment_log_softmax(g.mask(task)))
}

/// The cross-entropy with the probability of a teacher's `logit`, such as the FM's. Nothing is
/// learned by the teacher.
pub fn distillation<'g>(task: &str, output: Tensor<'g>, teacher: Tensor<'g>) -> Tensor<'g> {
    let logit = logit(task, output);
    logit.softplus() - logit * teacher.stop_gradient().sigmoid()
}

/// The log odds that an output of a binary task says.
fn logit<'g>(task: &str, output: Tensor<'g>) -> Tensor<'g> {
    output + output.graph().base_logit(task)
}
