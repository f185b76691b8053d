//! The ops of `sdk/wit/ops.md` as methods and operators of `Tensor`.
//!
//! Each method checks its inputs and computes the shape of its result, so a mistake is reported
//! with the layer where it was made. The host repeats the checks.

use std::ops;

use crate::graph::{Graph, Tensor, attribute, integer};
use crate::raw::types::{Attribute, Value};
use crate::shape::{Dim, Shape};

/// The most inputs of a `Concat`.
pub(crate) const MAX_CONCAT: usize = 256;

/// The settings of the attention ops.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// The number of heads; each gets an equal part of the width.
    pub heads: u32,
    /// The constant by which the attention weights are divided.
    pub max_len: u32,
}

/// Queries, keys and values of one kind of token, `[history or rows, heads * d]` each.
#[derive(Clone, Copy)]
pub struct Projections<'g> {
    /// The queries.
    pub q: Tensor<'g>,
    /// The keys.
    pub k: Tensor<'g>,
    /// The values.
    pub v: Tensor<'g>,
}

impl Graph {
    /// Concatenates tensors along their last dimension.
    pub fn concat<'g>(&'g self, parts: &[Tensor<'g>]) -> Tensor<'g> {
        let Some(first) = parts.first() else {
            return self.fail("Concat of nothing: it takes at least one tensor");
        };
        let shape = first.shape();
        let axis = shape.rank().saturating_sub(1);
        let mut width = 0u32;
        for part in parts {
            let other = part.shape();
            let fits = other.rank() == shape.rank() && other.dims()[..axis] == shape.dims()[..axis];
            let (Some(size), true, false) = (other.width(), fits, part.is_ids()) else {
                return first.mismatch("Concat", *part, "only the last dimension may differ");
            };
            width = width.saturating_add(size);
        }
        if parts.len() == 1 {
            return *first;
        }
        self.push("Concat", parts, &[integer("axis", axis as i64)], shape.with(axis, width))
    }

    /// `HstuAttention`: each row attends to its request's history and to itself. The result does
    /// not depend on the `q` of the history.
    pub fn hstu_attention<'g>(
        &'g self,
        history: Projections<'g>,
        rows: Projections<'g>,
        attention: Attention,
    ) -> Tensor<'g> {
        let inputs = [history.q, history.k, history.v, rows.q, rows.k, rows.v];
        self.attention("HstuAttention", &inputs, attention)
    }

    /// `HstuHistory`: causal attention within each request's history.
    pub fn hstu_history<'g>(
        &'g self,
        history: Projections<'g>,
        attention: Attention,
    ) -> Tensor<'g> {
        self.attention("HstuHistory", &[history.q, history.k, history.v], attention)
    }

    fn attention<'g>(
        &'g self,
        op: &str,
        inputs: &[Tensor<'g>],
        attention: Attention,
    ) -> Tensor<'g> {
        let width = inputs[0].shape().width().unwrap_or(0);
        let wanted = |i: usize| {
            if i < 3 { Shape::history(width) } else { Shape::rows(width) }
        };
        for (i, input) in inputs.iter().enumerate() {
            if input.shape() != wanted(i) || input.is_ids() {
                return self.fail(&format!(
                    "{op}: input {i} must be {}, not {}",
                    wanted(i),
                    describe(*input)
                ));
            }
        }
        if attention.heads == 0 || !width.is_multiple_of(attention.heads) || attention.max_len == 0
        {
            return self.fail(&format!(
                "{op}: width {width} with {} heads and max-len {}: both must be above 0, and the heads must divide the width",
                attention.heads, attention.max_len
            ));
        }
        let attributes = [
            integer("heads", attention.heads.into()),
            integer("max-len", attention.max_len.into()),
        ];
        self.push(op, inputs, &attributes, wanted(inputs.len() - 1))
    }
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident = $op:literal;)*) => {
        impl<'g> Tensor<'g> {
            $($(#[$doc])* pub fn $name(self) -> Tensor<'g> { self.unary($op, &[]) })*
        }
    };
}

unary! {
    /// The exponential e^x.
    exp = "Exp";
    /// The natural logarithm; inputs below 1e-12 count as 1e-12.
    log = "Log";
    /// The square root; inputs below 1e-12 count as 1e-12.
    sqrt = "Sqrt";
    /// The absolute value |x|.
    abs = "Abs";
    /// The logistic function 1 / (1 + e^-x).
    sigmoid = "Sigmoid";
    /// The SiLU activation x * sigmoid(x).
    silu = "Silu";
    /// The ReLU activation max(x, 0).
    relu = "Relu";
    /// The Gaussian error linear unit.
    gelu = "Gelu";
    /// The hyperbolic tangent.
    tanh = "Tanh";
    /// The softplus activation log(1 + e^x).
    softplus = "Softplus";
    /// The same values, without gradient.
    stop_gradient = "StopGradient";
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident = $op:literal;)*) => {
        impl<'g> Tensor<'g> {
            $($(#[$doc])* pub fn $name(self, other: Tensor<'g>) -> Tensor<'g> { self.binary($op, other) })*
        }
    };
}

binary! {
    /// The greater of two values.
    max = "Max";
    /// The smaller of two values.
    min = "Min";
    /// 1 where `self` is greater, else 0.
    greater = "Greater";
    /// 1 where `self` is less, else 0.
    less = "Less";
    /// 1 where the two are equal, else 0.
    equal = "Equal";
}

impl<'g> Tensor<'g> {
    /// The matrix product of `self`, `[.., k]`, and `weight`, `[k, n]`.
    pub fn matmul(self, weight: Tensor<'g>) -> Tensor<'g> {
        let (a, b) = (self.shape(), weight.shape());
        let fits = a.rank() >= 1 && b.rank() == 2 && a.width().is_some() && a.width() == b.size(0);
        match (fits && !self.is_ids() && !weight.is_ids(), b.size(1)) {
            (true, Some(n)) => {
                self.graph.push("MatMul", &[self, weight], &[], a.with(a.rank() - 1, n))
            }
            _ => self.mismatch(
                "MatMul",
                weight,
                "the first's last dimension must be the second's first",
            ),
        }
    }

    /// Limits values to `min..=max`.
    pub fn clip(self, min: f32, max: f32) -> Tensor<'g> {
        self.unary("Clip", &[number("min", min), number("max", max)])
    }

    /// Softmax over the last dimension.
    pub fn softmax(self) -> Tensor<'g> {
        self.unary("Softmax", &[integer("axis", self.shape().rank() as i64 - 1)])
    }

    /// Sum over the last dimension, kept with size 1.
    pub fn sum(self) -> Tensor<'g> {
        self.reduce("ReduceSum")
    }

    /// Mean over the last dimension, kept with size 1.
    pub fn mean(self) -> Tensor<'g> {
        self.reduce("ReduceMean")
    }

    /// Maximum over the last dimension, kept with size 1. (`max` compares two tensors.)
    pub fn largest(self) -> Tensor<'g> {
        self.reduce("ReduceMax")
    }

    /// The entries `[start, end)` of the last dimension.
    pub fn slice(self, start: u32, end: u32) -> Tensor<'g> {
        let shape = self.shape();
        match shape.width() {
            Some(width) if start < end && end <= width && !self.is_ids() => {
                let axis = shape.rank() - 1;
                let attributes = [
                    integer("axis", axis as i64),
                    integer("start", start.into()),
                    integer("end", end.into()),
                ];
                self.graph.push("Slice", &[self], &attributes, shape.with(axis, end - start))
            }
            _ => self.graph.fail(&format!("Slice {start}..{end} of {}", describe(self))),
        }
    }

    /// Reshapes each row to `dims`. A symbolic dimension stays first and is not part of `dims`.
    pub fn reshape(self, dims: &[u32]) -> Tensor<'g> {
        let shape = self.shape();
        let symbolic = shape.dims().first().copied().filter(|d| !matches!(d, Dim::Fixed(_)));
        let size = |dims: &[Dim]| {
            dims.iter().try_fold(1u32, |n, d| {
                if let Dim::Fixed(d) = d { n.checked_mul(*d) } else { Some(n) }
            })
        };
        let fixed = dims.iter().map(|&d| Dim::Fixed(d));
        let result = Shape::new(symbolic.into_iter().chain(fixed).collect());
        if size(shape.dims()) != size(result.dims()) || self.is_ids() {
            return self.graph.fail(&format!("Reshape of {} to {result}", describe(self)));
        }
        let zero = symbolic.map(|_| 0);
        let values = zero.into_iter().chain(dims.iter().copied());
        self.graph.push("Reshape", &[self], &[integers("shape", values)], result)
    }

    /// Reorders dimensions by `perm`. A symbolic dimension must stay first.
    pub fn transpose(self, perm: &[u32]) -> Tensor<'g> {
        let shape = self.shape();
        let mut sorted = perm.to_vec();
        sorted.sort_unstable();
        let complete = sorted.iter().copied().eq(0..shape.rank() as u32);
        let symbolic = shape.dims().first().is_some_and(|d| !matches!(d, Dim::Fixed(_)));
        if !complete || (symbolic && perm.first() != Some(&0)) || self.is_ids() {
            return self.graph.fail(&format!("Transpose of {} by {perm:?}", describe(self)));
        }
        let dims = perm.iter().map(|&axis| shape.dims()[axis as usize]).collect();
        let perm = integers("perm", perm.iter().copied());
        self.graph.push("Transpose", &[self], &[perm], Shape::new(dims))
    }

    /// `self` where `condition` is not 0, else `other`. All three must have the same shape.
    pub fn where_or(self, condition: Tensor<'g>, other: Tensor<'g>) -> Tensor<'g> {
        let shape = self.shape();
        if condition.shape() != shape || other.shape() != shape {
            return self.mismatch("Where", other, "condition and both values must have one shape");
        }
        self.graph.push("Where", &[condition, self, other], &[], shape)
    }

    /// Row `index mod n` of `self`, `[n, d]`, for each of `ids`, `[rows or history, 1]`.
    pub fn gather(self, ids: Tensor<'g>) -> Tensor<'g> {
        self.lookup("Gather", ids)
    }

    /// Row `hash(id) mod n` of `self`, `[n, d]`, averaged over the ids of a row. Zeros for a
    /// feature of several values that has none.
    pub fn embedding_bag(self, ids: Tensor<'g>) -> Tensor<'g> {
        self.lookup("EmbeddingBag", ids)
    }

    /// Converts ids to numbers (f32).
    pub fn to_numbers(self) -> Tensor<'g> {
        if !self.is_ids() {
            return self.graph.fail(&format!("Cast of {}: it takes ids", describe(self)));
        }
        self.graph.push("Cast", &[self], &[], self.shape())
    }

    /// Normalises the last dimension, then multiplies by `scale` and adds `bias`, both `[d]`.
    pub fn layer_normalization(self, scale: Tensor<'g>, bias: Tensor<'g>) -> Tensor<'g> {
        self.layer_normalization_with(scale, bias, 1e-6)
    }

    /// [`Tensor::layer_normalization`] with `epsilon` added to the variance.
    pub fn layer_normalization_with(
        self,
        scale: Tensor<'g>,
        bias: Tensor<'g>,
        epsilon: f32,
    ) -> Tensor<'g> {
        let width = self.shape().width().map(|w| Shape::fixed(&[w]));
        if width.as_ref() != Some(&scale.shape()) || scale.shape() != bias.shape() || self.is_ids()
        {
            return self.mismatch("LayerNormalization", scale, "scale and bias must be [d]");
        }
        let epsilon = number("epsilon", epsilon);
        self.graph.push("LayerNormalization", &[self, scale, bias], &[epsilon], self.shape())
    }

    /// Drops values at `rate`, in [0, 1), in training, and scales up the others.
    pub fn dropout(self, rate: f32) -> Tensor<'g> {
        self.drop(rate, 0)
    }

    /// Drops whole rows at `rate`, in [0, 1), in training, so that the network learns not to depend
    /// on this input alone.
    pub fn dropout_rows(self, rate: f32) -> Tensor<'g> {
        self.drop(rate, 1)
    }

    /// The mean over each request's history, repeated for each of its rows: `[history, d]` to
    /// `[rows, d]`.
    pub fn pool_mean(self) -> Tensor<'g> {
        self.pool("PoolMean")
    }

    /// The maximum over each request's history, repeated for each of its rows.
    pub fn pool_max(self) -> Tensor<'g> {
        self.pool("PoolMax")
    }

    /// The sum over each request's history, repeated for each of its rows.
    pub fn pool_sum(self) -> Tensor<'g> {
        self.pool("PoolSum")
    }

    fn unary(self, op: &str, attributes: &[Attribute]) -> Tensor<'g> {
        if self.is_ids() {
            let why = format!("{op} of {}: embed the ids, or cast them", describe(self));
            return self.graph.fail(&why);
        }
        self.graph.push(op, &[self], attributes, self.shape())
    }

    fn binary(self, op: &str, other: Tensor<'g>) -> Tensor<'g> {
        match self.shape().broadcast(&other.shape()) {
            Some(shape) if !self.is_ids() && !other.is_ids() => {
                self.graph.push(op, &[self, other], &[], shape)
            }
            _ => self.mismatch(op, other, "the shapes do not broadcast"),
        }
    }

    fn reduce(self, op: &str) -> Tensor<'g> {
        let shape = self.shape();
        if shape.width().is_none() || self.is_ids() {
            return self.graph.fail(&format!("{op} of {}", describe(self)));
        }
        let axis = shape.rank() - 1;
        self.graph.push(op, &[self], &[integer("axis", axis as i64)], shape.with(axis, 1))
    }

    fn lookup(self, op: &str, ids: Tensor<'g>) -> Tensor<'g> {
        let table = self.shape();
        let one = op == "EmbeddingBag" || ids.shape().width() == Some(1);
        match (ids.shape().dims(), table.dims()) {
            ([s @ (Dim::Rows | Dim::History), Dim::Fixed(_)], [Dim::Fixed(_), d])
                if one && ids.is_ids() =>
            {
                self.graph.push(op, &[self, ids], &[], Shape::new(vec![*s, *d]))
            }
            _ => self.mismatch(op, ids, "it takes a table [n, d] and ids of rows or history"),
        }
    }

    fn drop(self, rate: f32, per_row: i64) -> Tensor<'g> {
        if !(0.0..1.0).contains(&rate) {
            return self.graph.fail(&format!("Dropout at rate {rate}: it must be in [0, 1)"));
        }
        self.unary("Dropout", &[number("rate", rate), integer("per-row", per_row)])
    }

    fn pool(self, op: &str) -> Tensor<'g> {
        match *self.shape().dims() {
            [Dim::History, Dim::Fixed(width)] if !self.is_ids() => {
                self.graph.push(op, &[self], &[], Shape::rows(width))
            }
            _ => self.graph.fail(&format!("{op} of {}: it takes [history, d]", describe(self))),
        }
    }

    pub(crate) fn mismatch(self, op: &str, other: Tensor<'g>, rule: &str) -> Tensor<'g> {
        self.graph.fail(&format!("{op} of {} with {}: {rule}", describe(self), describe(other)))
    }
}

macro_rules! operator {
    ($($trait:ident $method:ident $op:literal,)*) => {$(
        impl<'g> ops::$trait for Tensor<'g> {
            type Output = Tensor<'g>;
            fn $method(self, other: Self) -> Self { self.binary($op, other) }
        }
        impl<'g> ops::$trait<f32> for Tensor<'g> {
            type Output = Tensor<'g>;
            fn $method(self, other: f32) -> Self { self.binary($op, self.graph.constant(other)) }
        }
        impl<'g> ops::$trait<Tensor<'g>> for f32 {
            type Output = Tensor<'g>;
            fn $method(self, other: Tensor<'g>) -> Tensor<'g> { other.graph.constant(self).binary($op, other) }
        }
    )*};
}

operator! { Add add "Add", Sub sub "Sub", Mul mul "Mul", Div div "Div", }

impl<'g> ops::Neg for Tensor<'g> {
    type Output = Tensor<'g>;
    fn neg(self) -> Self {
        self.unary("Neg", &[])
    }
}

pub(crate) fn number(name: &str, value: f32) -> Attribute {
    attribute(name, Value::Number(value))
}

fn integers(name: &str, values: impl Iterator<Item = u32>) -> Attribute {
    attribute(name, Value::Integers(values.map(i64::from).collect()))
}

pub(crate) fn describe(tensor: Tensor<'_>) -> String {
    let ids = if tensor.is_ids() { "ids " } else { "" };
    format!("{ids}{}", tensor.shape())
}
