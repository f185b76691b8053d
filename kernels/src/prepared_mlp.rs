//! Networks of two linear layers for serving: weights are prepared once, and what the rows of a
//! group have in common is multiplied once a group.
//!
//! The candidates of a request share its user and context, which are most of what some networks
//! read of them. A product of a row is the sum of those of its parts, so that of the shared part is
//! computed once and added to each row's own. There are no gradients; training uses [`crate::mlp`].

use std::fmt::Debug;
use std::ops::Range;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{Int, Tensor, TensorData};

use crate::attention::{HstuBackend, primitive, tensor};
use crate::mlp::{LinearWeights, MlpInputs, mlp};

/// The weights of `SiLU(x W + b) W' + b' + x W''`.
#[derive(Debug, Clone)]
pub struct MlpWeights<M, V = M> {
    /// The layer before the activation, `[from, hidden]`.
    pub hidden: LinearWeights<M, V>,
    /// The layer after it, `[hidden, to]`.
    pub output: LinearWeights<M, V>,
    /// W'' `[from, to]`: a linear path beside both.
    pub direct: Option<M>,
}

/// The input of a network, by its parts.
#[derive(Debug, Clone)]
pub struct MlpRows<'a, T> {
    /// `[rows, own]`: the columns that are not shared, in the order of the weights' rows.
    pub own: T,
    /// The shared columns, if the weights were laid out for any.
    pub shared: Option<SharedColumns<'a, T>>,
    /// `[rows, to]`: added to the result.
    pub added: Option<T>,
}

/// The columns that groups of rows have in common.
#[derive(Debug, Clone)]
pub struct SharedColumns<'a, T> {
    /// `[groups, shared]`.
    pub values: T,
    /// `[rows]`: the group of each row.
    pub group_of: &'a [u32],
}

/// The weights of a network in a backend's prepared form.
pub trait PreparedMlp<B: HstuBackend>: Debug + Send + Sync + 'static {
    /// Lays out weights. The input's columns `shared` are those that groups of rows have in common;
    /// the range may be empty.
    fn prepare(weights: MlpWeights<FloatTensor<B>>, shared: Range<usize>) -> Self;

    /// The network's output, `[rows, to]`.
    ///
    /// # Panics
    /// If widths do not match, or a group does not exist.
    fn forward(&self, rows: MlpRows<'_, FloatTensor<B>>) -> FloatTensor<B>;
}

/// Unprepared weights and primitive ops on whole rows, for a backend without kernels of its own.
#[derive(Debug)]
pub struct PlainMlp<B: HstuBackend> {
    weights: MlpWeights<Tensor<B, 2>, Tensor<B, 1>>,
    shared: Range<usize>,
}

impl<B: HstuBackend> PreparedMlp<B> for PlainMlp<B> {
    fn prepare(weights: MlpWeights<FloatTensor<B>>, shared: Range<usize>) -> Self {
        let linear = |of: LinearWeights<FloatTensor<B>>| LinearWeights {
            weight: tensor(of.weight),
            bias: tensor(of.bias),
        };
        let MlpWeights { hidden, output, direct } = weights;
        let (hidden, output) = (linear(hidden), linear(output));
        Self { weights: MlpWeights { hidden, output, direct: direct.map(tensor) }, shared }
    }

    fn forward(&self, rows: MlpRows<'_, FloatTensor<B>>) -> FloatTensor<B> {
        let MlpRows { own, shared, added } = rows;
        let MlpWeights { hidden, output, direct } = &self.weights;
        let own = tensor::<B, 2>(own);
        let x = match shared {
            Some(shared) => self.whole(own, shared),
            None => own,
        };
        let inputs = MlpInputs { x: x.clone(), hidden: hidden.clone(), output: output.clone() };
        let mut out = mlp(inputs);
        if let Some(direct) = direct {
            out = out + x.matmul(direct.clone());
        }
        primitive(match added {
            Some(added) => out + tensor(added),
            None => out,
        })
    }
}

impl<B: HstuBackend> PlainMlp<B> {
    /// Each row with all its columns.
    fn whole(&self, own: Tensor<B, 2>, shared: SharedColumns<'_, FloatTensor<B>>) -> Tensor<B, 2> {
        let groups: Vec<i64> = shared.group_of.iter().map(|&group| i64::from(group)).collect();
        let count = groups.len();
        let groups = TensorData::new(groups, [count]);
        let groups = Tensor::<B, 1, Int>::from_data(groups, &own.device());
        let shared = tensor::<B, 2>(shared.values).select(0, groups);
        let (before, width) = (self.shared.start, own.dims()[1]);
        let mut parts = vec![shared];
        if before > 0 {
            parts.insert(0, own.clone().narrow(1, 0, before));
        }
        if width > before {
            parts.push(own.narrow(1, before, width - before));
        }
        Tensor::cat(parts, 1)
    }
}
