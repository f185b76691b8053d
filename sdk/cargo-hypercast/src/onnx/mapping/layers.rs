//! Operators that compute over dimensions: products, normalisations and reductions.

use anyhow::{Context, Result, bail, ensure};

use super::{Mapper, NodeView};
use crate::onnx::network::StepId;
use crate::onnx::value::{BatchedShape, ComputedTensor, MappedValue, Weights, axis_of, shown};

impl Mapper {
    /// What an operator gives that computes over dimensions; none if it is another operator.
    pub(super) fn layer(&mut self, view: &NodeView<'_>) -> Result<Option<MappedValue>> {
        let numbers = match view.op() {
            "MatMul" => self.matmul(view.input(0)?, view.input(1)?)?,
            "Gemm" => return self.gemm(view).map(Some),
            "BatchNormalization" => return self.batch_normalization(view).map(Some),
            "LayerNormalization" => self.layer_normalization(view)?,
            "Softmax" => self.softmax(view)?,
            "ReduceSum" => self.reduced(view, "sum")?,
            "ReduceMean" => self.reduced(view, "mean")?,
            "ReduceMax" => self.reduced(view, "largest")?,
            _ => return Ok(None),
        };
        Ok(Some(MappedValue::Numbers(numbers)))
    }

    fn matmul(&mut self, a: &MappedValue, b: &MappedValue) -> Result<ComputedTensor> {
        let (x, y) = (a.dims(), b.dims());
        let (m, n) = (x.sizes.len(), y.sizes.len());
        match (x.batch, y.batch) {
            (_, None) if n == 2 && m > 1 && x.batch != Some(m - 1) => {
                let (left, right) = (self.computed(a)?, self.computed(b)?);
                let step = self.network.matmul(left.step, right.step)?;
                let mut dims = left.dims;
                dims.sizes[m - 1] = y.sizes[1];
                Ok(ComputedTensor { step, dims })
            }
            (_, None) if n == 1 => {
                let column = BatchedShape { sizes: vec![y.sizes[0], 1], batch: None };
                let column = self.reshaped(b, column)?;
                let ComputedTensor { step, mut dims } = self.matmul(a, &column)?;
                dims.sizes.pop();
                let step = self.network.reshape(step, dims.stored())?;
                Ok(ComputedTensor { step, dims })
            }
            (Some(0), Some(0)) if m == 3 && n == 3 => self.pairwise(a, b),
            // A B = (B' A')'
            (None, Some(0)) if m == 2 && n == 3 => {
                let (left, right) = (self.permuted(a, &[1, 0])?, self.permuted(b, &[0, 2, 1])?);
                let product = self.matmul(&right, &left)?;
                let MappedValue::Numbers(product) =
                    self.permuted(&MappedValue::Numbers(product), &[0, 2, 1])?
                else {
                    bail!("a product is made of numbers")
                };
                Ok(product)
            }
            _ => bail!(
                "it multiplies {} by {}; supported are a product with a matrix of weights, and one \
                 of two [batch, n, k] and [batch, k, m]",
                shown(&x.as_integers()),
                shown(&y.as_integers())
            ),
        }
    }

    /// The products of the rows of `[batch, n, k]` with the columns of `[batch, k, m]`, each a sum
    /// over k: an expert multiplies by weights alone.
    fn pairwise(&mut self, a: &MappedValue, b: &MappedValue) -> Result<ComputedTensor> {
        let b = self.permuted(b, &[0, 2, 1])?;
        let (left, right) = (self.computed(a)?, self.computed(&b)?);
        let ([_, n, k], [_, m, k2]) = (&left.dims.sizes[..], &right.dims.sizes[..]) else {
            bail!("its operands are no batches of matrices")
        };
        ensure!(k == k2, "the inner dimensions {k} and {k2} differ");
        let (n, m, k) = (*n, *m, *k);
        let rows = self.network.reshape(left.step, vec![n, 1, k])?;
        let columns = self.network.reshape(right.step, vec![1, m, k])?;
        let products = self.network.binary("*", rows, columns)?;
        let sums = self.network.reduce("sum", products)?;
        let step = self.network.reshape(sums, vec![n, m])?;
        Ok(ComputedTensor { step, dims: BatchedShape::batched(&[n, m]) })
    }

    fn gemm(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        let turned =
            |mapper: &mut Self, value: &MappedValue, name: &str| match view.integer(name, 0) {
                0 => Ok(value.clone()),
                _ => mapper.permuted(value, &[1, 0]),
            };
        let a = turned(self, view.input(0)?, "transA")?;
        let b = turned(self, view.input(1)?, "transB")?;
        let is_matrix = |value: &MappedValue| value.dims().sizes.len() == 2;
        ensure!(is_matrix(&a) && is_matrix(&b), "its operands are no matrices");
        let b = scaled(b, view.number("alpha", 1.0))?;
        let product = MappedValue::Numbers(self.matmul(&a, &b)?);
        match view.optional(2) {
            None => Ok(product),
            Some(bias) => {
                let bias = scaled(bias.clone(), view.number("beta", 1.0))?;
                self.binary("+", &product, &bias)
            }
        }
    }

    /// As it is outside training: a scale and a shift of each channel.
    fn batch_normalization(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        ensure!(
            view.integer("training_mode", 0) == 0,
            "it is in training mode: call `model.eval()` before the export"
        );
        let mut weights = Vec::new();
        for index in 1..5 {
            match view.input(index)? {
                MappedValue::Weights(own) => weights.push(own.clone()),
                _ => bail!("its input {index} is no weight"),
            }
        }
        let [gamma, beta, mean, variance] = &weights[..] else { unreachable!("there are four") };
        let epsilon = f64::from(view.number("epsilon", 1e-5));
        let factor = |gamma: &f32, variance: &f32| {
            Ok(f64::from(*gamma) / (f64::from(*variance) + epsilon).sqrt())
        };
        let factors = gamma.values.zipped(&variance.values, factor)?;
        let moved = factors.zipped(&mean.values, |factor, mean| Ok(factor * f64::from(*mean)))?;
        let shifts = beta.values.zipped(&moved, |beta, by| Ok((f64::from(*beta) - by) as f32))?;
        let x = view.input(0)?;
        let mut channels = vec![1; x.dims().sizes.len()];
        *channels.get_mut(1).context("its input has no channels")? = factors.values.len();
        let of = |values: crate::onnx::grid::Grid<f32>, name: &Option<String>| {
            let values = values.reshaped(channels[1..].to_vec())?;
            Ok::<_, anyhow::Error>(MappedValue::Weights(Weights { values, name: name.clone() }))
        };
        let scale = of(factors.mapped(|factor| *factor as f32), &gamma.name)?;
        let scaled = self.binary("*", x, &scale)?;
        self.binary("+", &scaled, &of(shifts, &beta.name)?)
    }

    fn layer_normalization(&mut self, view: &NodeView<'_>) -> Result<ComputedTensor> {
        let ComputedTensor { step, dims } = self.computed(view.input(0)?)?;
        let rank = dims.sizes.len();
        let axis = axis_of(view.integer("axis", -1), rank)?;
        let is_last = axis + 1 == rank && dims.batch != Some(axis);
        ensure!(is_last, "it normalises more than the last dimension");
        let width = dims.sizes[axis];
        let scale = self.computed(view.input(1)?)?.step;
        let bias = match view.optional(2) {
            Some(bias) => self.computed(bias)?.step,
            None => {
                let values = crate::onnx::grid::Grid::vector(vec![0.0; width]);
                self.computed(&MappedValue::Weights(Weights { values, name: None }))?.step
            }
        };
        let epsilon = view.number("epsilon", 1e-5);
        let step = self.network.layer_normalization(step, [scale, bias], epsilon)?;
        Ok(ComputedTensor { step, dims })
    }

    fn softmax(&mut self, view: &NodeView<'_>) -> Result<ComputedTensor> {
        let ComputedTensor { step, dims } = self.computed(view.input(0)?)?;
        let axis = axis_of(view.integer("axis", -1), dims.sizes.len())?;
        let axis = dims.stored_axis(axis)?;
        let last_last = moved_last(dims.others().len(), &[axis]);
        let moved = self.network.transpose(step, last_last.clone())?;
        let softmax = self.network.unary("softmax", moved)?;
        let back = (0..last_last.len())
            .map(|axis| last_last.iter().position(|from| *from == axis).unwrap_or(axis));
        let step = self.network.transpose(softmax, back.collect())?;
        Ok(ComputedTensor { step, dims })
    }

    fn reduced(&mut self, view: &NodeView<'_>, method: &'static str) -> Result<ComputedTensor> {
        let ComputedTensor { step, dims } = self.computed(view.input(0)?)?;
        let rank = dims.sizes.len();
        let given = view.integers("axes", 1)?.filter(|axes| !axes.is_empty());
        let axes = match given {
            Some(axes) => axes.iter().map(|axis| axis_of(*axis, rank)).collect::<Result<_>>()?,
            None if view.integer("noop_with_empty_axes", 0) == 1 => Vec::new(),
            None => (0..rank).collect::<Vec<usize>>(),
        };
        if axes.is_empty() {
            return Ok(ComputedTensor { step, dims });
        }
        let stored = axes.iter().map(|axis| dims.stored_axis(*axis)).collect::<Result<Vec<_>>>()?;
        let reduced = self.reduced_over(step, &stored, method)?;
        let is_kept = view.integer("keepdims", 1) == 1;
        let mut result = BatchedShape { sizes: Vec::new(), batch: None };
        for (axis, size) in dims.sizes.iter().enumerate() {
            let goes = axes.contains(&axis);
            if goes && !is_kept {
                continue;
            }
            if dims.batch == Some(axis) {
                result.batch = Some(result.sizes.len());
            }
            result.sizes.push(if goes { 1 } else { *size });
        }
        let step = self.network.reshape(reduced, result.stored())?;
        Ok(ComputedTensor { step, dims: result })
    }

    /// The contract reduces the last dimension: those that go are made one, and the last.
    fn reduced_over(
        &mut self,
        step: StepId,
        axes: &[usize],
        method: &'static str,
    ) -> Result<StepId> {
        let sizes = self.network.steps[step].sizes.clone();
        let moved = self.network.transpose(step, moved_last(sizes.len(), axes))?;
        let of = |goes: bool| {
            let own = (0..sizes.len()).filter(move |axis| axes.contains(axis) == goes);
            own.map(|axis| sizes[axis])
        };
        let all: usize = of(true).product();
        let flat: Vec<usize> = of(false).chain([all]).collect();
        let flat = self.network.reshape(moved, flat)?;
        self.network.reduce(method, flat)
    }
}

/// A permutation that moves some axes behind the others.
fn moved_last(rank: usize, axes: &[usize]) -> Vec<usize> {
    let others = (0..rank).filter(|axis| !axes.contains(axis));
    others.chain((0..rank).filter(|axis| axes.contains(axis))).collect()
}

/// Weights times a number.
fn scaled(value: MappedValue, factor: f32) -> Result<MappedValue> {
    match value {
        value if factor == 1.0 => Ok(value),
        MappedValue::Weights(Weights { values, name }) => {
            let values = values.mapped(|value| value * factor);
            Ok(MappedValue::Weights(Weights { values, name }))
        }
        _ => bail!("its alpha or beta is not 1"),
    }
}
