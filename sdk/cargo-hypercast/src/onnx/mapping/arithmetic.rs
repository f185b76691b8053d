//! Operators that compute each value for itself.

use anyhow::{Context, Result, bail, ensure};

use super::{Mapper, NodeView};
use crate::onnx::grid::{Grid, broadcast};
use crate::onnx::network::StepId;
use crate::onnx::value::{BATCH, BatchedShape, ComputedTensor, IdCell, MappedValue, Weights};

/// Two tensors whose shapes broadcast as the contract has it, and the shape of what they give.
struct Aligned {
    a: StepId,
    b: StepId,
    dims: BatchedShape,
}

impl Mapper {
    /// What an operator gives that computes each value for itself; none if it is another operator.
    pub(super) fn arithmetic(&mut self, view: &NodeView<'_>) -> Result<Option<MappedValue>> {
        if let Some(op) = binary_call(view.op()) {
            let mut result = view.input(0)?.clone();
            for index in 1..view.inputs.len() {
                result = self.binary(op, &result, view.input(index)?)?;
            }
            return Ok(Some(result));
        }
        if let Some(method) = unary_call(view.op()) {
            return self.each(view, |network, x| network.unary(method, x)).map(Some);
        }
        let (alpha, beta) = (|default| view.number("alpha", default), view.number("beta", 0.5));
        let value = match view.op() {
            "Mean" => {
                let mut sum = view.input(0)?.clone();
                for index in 1..view.inputs.len() {
                    sum = self.binary("+", &sum, view.input(index)?)?;
                }
                self.binary("/", &sum, &literal(view.inputs.len() as f32))?
            }
            "GreaterOrEqual" => {
                let less = self.binary("less", view.input(0)?, view.input(1)?)?;
                self.binary("-", &literal(1.0), &less)?
            }
            "LessOrEqual" => {
                let greater = self.binary("greater", view.input(0)?, view.input(1)?)?;
                self.binary("-", &literal(1.0), &greater)?
            }
            "Not" => self.binary("-", &literal(1.0), view.input(0)?)?,
            "Where" => self.chosen(view.input(0)?, view.input(1)?, view.input(2)?)?,
            "Reciprocal" => self.binary("/", &literal(1.0), view.input(0)?)?,
            "Pow" => self.power(view)?,
            "Clip" => {
                // A bound may be infinite, which code has no literal for.
                let finite = |bound: f32| bound.clamp(f32::MIN, f32::MAX);
                let min = view.single("min", 1)?.map_or(f32::MIN, finite);
                let max = view.single("max", 2)?.map_or(f32::MAX, finite);
                self.each(view, |network, x| network.clip(x, min, max))?
            }
            "HardSigmoid" => self.hard_sigmoid(view, alpha(0.2), beta)?,
            "HardSwish" => {
                let gate = self.hard_sigmoid(view, 1.0 / 6.0, 0.5)?;
                self.binary("*", view.input(0)?, &gate)?
            }
            "Swish" => {
                ensure!(alpha(1.0) == 1.0, "its alpha is not 1");
                self.each(view, |network, x| network.unary("silu", x))?
            }
            "LeakyRelu" => self.leaky(view.input(0)?, &literal(alpha(0.01)))?,
            "PRelu" => self.leaky(view.input(0)?, view.input(1)?)?,
            "Elu" => self.each(view, |network, x| {
                let (positive, minus) = (network.unary("relu", x)?, network.unary("neg", x)?);
                let below = network.unary("relu", minus)?;
                let below = network.unary("neg", below)?;
                let below = network.unary("exp", below)?;
                let below = network.scalar("-", below, 1.0)?;
                let below = network.scalar("*", below, alpha(1.0))?;
                network.binary("+", positive, below)
            })?,
            "Gelu" => self.gelu(view)?,
            _ => return Ok(None),
        };
        Ok(Some(value))
    }

    /// What `build` makes of the numbers of the first input, of the same shape.
    fn each(
        &mut self,
        view: &NodeView<'_>,
        build: impl FnOnce(&mut crate::onnx::network::SdkNetwork, StepId) -> Result<StepId>,
    ) -> Result<MappedValue> {
        let ComputedTensor { step, dims } = self.computed(view.input(0)?)?;
        let step = build(&mut self.network, step)?;
        Ok(MappedValue::Numbers(ComputedTensor { step, dims }))
    }

    /// An operator of two values. What the file has alone is computed here.
    pub(super) fn binary(
        &mut self,
        op: &'static str,
        a: &MappedValue,
        b: &MappedValue,
    ) -> Result<MappedValue> {
        match (a, b) {
            (MappedValue::Integers(x), MappedValue::Integers(y)) => {
                return Ok(MappedValue::Integers(x.zipped(y, |x, y| of_integers(op, *x, *y))?));
            }
            (MappedValue::Weights(x), MappedValue::Weights(y))
                if number_of(op, 0.0, 0.0).is_some() =>
            {
                let value = |x: &f32, y: &f32| number_of(op, *x, *y).context("it is known");
                let name = x.name.clone().or(y.name.clone());
                let values = x.values.zipped(&y.values, value)?;
                return Ok(MappedValue::Weights(Weights { values, name }));
            }
            (MappedValue::Ids { cells, batch }, MappedValue::Integers(by))
                if ["+", "-"].contains(&op) =>
            {
                return shifted(cells, *batch, &by.mapped(|by| if op == "-" { -by } else { *by }));
            }
            (MappedValue::Integers(by), MappedValue::Ids { cells, batch }) if op == "+" => {
                return shifted(cells, *batch, by);
            }
            _ => {}
        }
        let numbers = match (single(a), single(b)) {
            (_, Some(number)) if a.dims().sizes.len() >= b.dims().sizes.len() => {
                let ComputedTensor { step, dims } = self.computed(a)?;
                ComputedTensor { step: self.network.scalar(op, step, number)?, dims }
            }
            (Some(number), _) if b.dims().sizes.len() >= a.dims().sizes.len() => {
                let ComputedTensor { step, dims } = self.computed(b)?;
                ComputedTensor { step: self.network.scalar_first(op, number, step)?, dims }
            }
            _ => {
                let (a, b) = (self.computed(a)?, self.computed(b)?);
                let Aligned { a, b, dims } = self.aligned(&a, &b)?;
                ComputedTensor { step: self.network.binary(op, a, b)?, dims }
            }
        };
        Ok(MappedValue::Numbers(numbers))
    }

    /// `Where`: by products, but of integers that the file has one or the other.
    fn chosen(
        &mut self,
        condition: &MappedValue,
        yes: &MappedValue,
        no: &MappedValue,
    ) -> Result<MappedValue> {
        if let (MappedValue::Integers(is), MappedValue::Integers(yes), MappedValue::Integers(no)) =
            (condition, yes, no)
        {
            let chosen = is.zipped(yes, |is, yes| Ok((*is != 0).then_some(*yes)))?;
            let values = chosen.zipped(no, |chosen, no| Ok(chosen.unwrap_or(*no)))?;
            return Ok(MappedValue::Integers(values));
        }
        let chosen = self.binary("*", condition, yes)?;
        let others = self.binary("-", &literal(1.0), condition)?;
        let others = self.binary("*", &others, no)?;
        self.binary("+", &chosen, &others)
    }

    /// Two tensors with the rows first and the other dimensions one above the other.
    fn aligned(&mut self, a: &ComputedTensor, b: &ComputedTensor) -> Result<Aligned> {
        let rank = a.dims.sizes.len().max(b.dims.sizes.len());
        let padding = |dims: &BatchedShape| rank - dims.sizes.len();
        let place = |dims: &BatchedShape| dims.batch.map(|batch| batch + padding(dims));
        let batch = place(&a.dims).or(place(&b.dims));
        for ComputedTensor { dims, .. } in [a, b] {
            let own = batch.and_then(|batch| batch.checked_sub(padding(dims)));
            let fits = own.is_none_or(|own| dims.sizes[own] == 1);
            ensure!(
                fits && (dims.batch.is_none() || place(dims) == batch),
                "the batch meets a dimension of another kind"
            );
        }
        let dims = BatchedShape { sizes: broadcast(&a.dims.sizes, &b.dims.sizes)?, batch };
        let mut stored = |ComputedTensor { step, dims: own }: &ComputedTensor| {
            let mut sizes = [vec![1; padding(own)], own.sizes.clone()].concat();
            if let Some(batch) = batch {
                sizes.remove(batch);
            }
            if own.batch.is_none() {
                let ones = sizes.iter().take_while(|size| **size == 1).count();
                sizes.drain(..ones);
            }
            if sizes.is_empty() {
                sizes.push(1);
            }
            self.network.reshape(*step, sizes)
        };
        Ok(Aligned { a: stored(a)?, b: stored(b)?, dims })
    }

    fn power(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        let base = view.input(0)?;
        let exponent = view.single("exponent", 1)?.unwrap_or(f32::NAN);
        let value = match exponent {
            1.0 => return Ok(base.clone()),
            2.0 | -2.0 => self.binary("*", base, base)?,
            3.0 => {
                let square = self.binary("*", base, base)?;
                self.binary("*", &square, base)?
            }
            0.5 | -0.5 => self.each(view, |network, x| network.unary("sqrt", x))?,
            -1.0 => base.clone(),
            other => bail!("its exponent is {other}: 1, 2, 3, 0.5, -0.5, -1 and -2 are supported"),
        };
        if exponent > 0.0 { Ok(value) } else { self.binary("/", &literal(1.0), &value) }
    }

    fn hard_sigmoid(&mut self, view: &NodeView<'_>, alpha: f32, beta: f32) -> Result<MappedValue> {
        self.each(view, |network, x| {
            let scaled = network.scalar("*", x, alpha)?;
            let shifted = network.scalar("+", scaled, beta)?;
            network.clip(shifted, 0.0, 1.0)
        })
    }

    /// `LeakyRelu` and `PRelu`: `relu(x) - slope * relu(-x)`.
    fn leaky(&mut self, x: &MappedValue, slope: &MappedValue) -> Result<MappedValue> {
        let ComputedTensor { step, dims } = self.computed(x)?;
        let positive = self.network.unary("relu", step)?;
        let minus = self.network.unary("neg", step)?;
        let negative = self.network.unary("relu", minus)?;
        let of = |step| MappedValue::Numbers(ComputedTensor { step, dims: dims.clone() });
        let negative = self.binary("*", &of(negative), slope)?;
        self.binary("-", &of(positive), &negative)
    }

    fn gelu(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        match view.attribute("approximate").map(|approximate| approximate.s.as_slice()) {
            None | Some(b"none") => self.each(view, |network, x| network.unary("gelu", x)),
            // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
            Some(b"tanh") => self.each(view, |network, x| {
                let square = network.binary("*", x, x)?;
                let inner = network.scalar("*", square, 0.044_715)?;
                let inner = network.scalar("+", inner, 1.0)?;
                let inner = network.binary("*", inner, x)?;
                let inner = network.scalar("*", inner, (2.0 / std::f32::consts::PI).sqrt())?;
                let tanh = network.unary("tanh", inner)?;
                let twice = network.scalar("+", tanh, 1.0)?;
                let twice = network.binary("*", twice, x)?;
                network.scalar("*", twice, 0.5)
            }),
            Some(_) => bail!("its `approximate` is not known"),
        }
    }
}

/// The SDK's operator or method for an operator of two or more tensors.
fn binary_call(op: &str) -> Option<&'static str> {
    Some(match op {
        "Add" | "Sum" => "+",
        "Sub" => "-",
        "Mul" | "And" => "*",
        "Div" => "/",
        "Max" | "Or" => "max",
        "Min" => "min",
        "Greater" => "greater",
        "Less" => "less",
        "Equal" => "equal",
        _ => return None,
    })
}

/// The SDK's method for an operator of one tensor.
fn unary_call(op: &str) -> Option<&'static str> {
    Some(match op {
        "Exp" => "exp",
        "Log" => "log",
        "Sqrt" => "sqrt",
        "Neg" => "neg",
        "Abs" => "abs",
        "Sigmoid" => "sigmoid",
        "Relu" => "relu",
        "Tanh" => "tanh",
        "Softplus" => "softplus",
        _ => return None,
    })
}

/// A number in the code of the model.
fn literal(number: f32) -> MappedValue {
    let values = Grid { sizes: Vec::new(), values: vec![number] };
    MappedValue::Weights(Weights { values, name: None })
}

/// The number of a value that is written into the code: one of the model's code, or of rank 0. A
/// weight of one value is none, since it learns.
fn single(value: &MappedValue) -> Option<f32> {
    match value {
        MappedValue::Weights(Weights { values: Grid { sizes, values }, name }) => {
            match values.as_slice() {
                [number] if sizes.is_empty() || name.is_none() => Some(*number),
                _ => None,
            }
        }
        MappedValue::Integers(Grid { values, .. }) => match values.as_slice() {
            [number] if *number != BATCH => Some(*number as f32),
            _ => None,
        },
        _ => None,
    }
}

fn number_of(op: &str, x: f32, y: f32) -> Option<f32> {
    Some(match op {
        "+" => x + y,
        "-" => x - y,
        "*" => x * y,
        "/" => x / y,
        _ => return None,
    })
}

fn of_integers(op: &str, x: i64, y: i64) -> Result<i64> {
    if x == BATCH || y == BATCH {
        return match (op, x, y) {
            ("*", size, 1) | ("*", 1, size) | ("+", size, 0) | ("+", 0, size) => Ok(size),
            ("/", BATCH, 1) | ("-", BATCH, 0) => Ok(BATCH),
            ("equal", ..) => Ok(i64::from(x == y)),
            _ => bail!("it computes with the size of the batch"),
        };
    }
    let value = match op {
        "+" => x.checked_add(y),
        "-" => x.checked_sub(y),
        "*" => x.checked_mul(y),
        "/" => x.checked_div(y),
        "max" => Some(x.max(y)),
        "min" => Some(x.min(y)),
        "greater" => Some(i64::from(x > y)),
        "less" => Some(i64::from(x < y)),
        "equal" => Some(i64::from(x == y)),
        _ => None,
    };
    value.with_context(|| format!("`{op}` of {x} and {y}"))
}

/// Ids to which a model adds numbers.
fn shifted(cells: &Grid<IdCell>, batch: usize, by: &Grid<i64>) -> Result<MappedValue> {
    let add = |cell: &IdCell, by: &i64| {
        let offset = cell.offset.checked_add(*by).context("its offset overflows")?;
        Ok(IdCell { column: cell.column.clone(), offset })
    };
    let shifted = cells.zipped(by, add)?;
    ensure!(shifted.sizes == cells.sizes, "it makes more of its ids than they are");
    Ok(MappedValue::Ids { cells: shifted, batch })
}
