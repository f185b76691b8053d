//! The ops and their attributes: parsed from the names in `sdk/wit/ops.md` into a typed enum.
//! Shapes are checked in `infer`.

use std::fmt::Debug;

use hypercast_kernels::cpu::program::{Fold, Zip};
use hypercast_kernels::pairs::PairFunction;

use crate::wasm::contract::{Attribute, Task, Value, quote};

/// An op with its attributes. Axes count from 0 over all dimensions.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "sdk/wit/ops.md documents each op")]
pub enum Op {
    Input { column: usize },
    Parameter { parameter: usize },
    Constant { value: f32, shape: Vec<usize> },
    MatMul,
    Binary(Zip),
    Unary(Unary),
    Clip { min: f32, max: f32 },
    Softmax { axis: usize },
    Compare(Zip),
    Where,
    Concat { axis: usize },
    Slice { axis: usize, start: usize, end: usize },
    Reshape { shape: Vec<usize> },
    Transpose { perm: Vec<usize> },
    Gather,
    Reduce { kind: Fold, axis: usize },
    LayerNormalization { epsilon: f32 },
    Dropout { rate: f32, per_row: bool },
    StopGradient,
    EmbeddingBag,
    Cast,
    HstuAttention { heads: usize, max_len: usize },
    HstuHistory { heads: usize, max_len: usize },
    Pool(Fold),
    Outcome { part: OutcomePart, task: usize },
    Segment(Fold),
    SegmentRank,
    SegmentPairSum { functions: Vec<PairFunction> },
}

/// What training knows of a task's rows, and serving does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "sdk/wit/ops.md documents each op")]
pub enum OutcomePart {
    Label,
    Mask,
    Weight,
    BaseLogit,
}

/// Elementwise ops of one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "sdk/wit/ops.md documents each op")]
pub enum Unary {
    Exp,
    Log,
    Sqrt,
    Neg,
    Abs,
    Sigmoid,
    Silu,
    Relu,
    Gelu,
    Tanh,
    Softplus,
}

impl Op {
    /// Parses an op and all its attributes, in a network that predicts `tasks`. The error is the
    /// rule that they break.
    pub(super) fn parse(
        name: &str,
        attributes: &[Attribute],
        tasks: &[Task],
    ) -> Result<Op, String> {
        let mut a = Attributes::new(attributes)?;
        let op = match name {
            "Input" => Op::Input { column: a.index("column")? },
            "Parameter" => Op::Parameter { parameter: a.index("parameter")? },
            "Constant" => Op::Constant { value: a.number("value")?, shape: a.indices("shape")? },
            "MatMul" => Op::MatMul,
            "Clip" => clip(&mut a)?,
            "Softmax" => Op::Softmax { axis: a.index("axis")? },
            "Where" => Op::Where,
            "Concat" => Op::Concat { axis: a.index("axis")? },
            "Slice" => {
                Op::Slice { axis: a.index("axis")?, start: a.index("start")?, end: a.index("end")? }
            }
            "Reshape" => Op::Reshape { shape: a.indices("shape")? },
            "Transpose" => Op::Transpose { perm: a.indices("perm")? },
            "Gather" => Op::Gather,
            "LayerNormalization" => layer_normalization(&mut a)?,
            "Dropout" => dropout(&mut a)?,
            "StopGradient" => Op::StopGradient,
            "EmbeddingBag" => Op::EmbeddingBag,
            "Cast" => Op::Cast,
            "HstuAttention" => {
                Op::HstuAttention { heads: a.positive("heads")?, max_len: a.positive("max-len")? }
            }
            "HstuHistory" => {
                Op::HstuHistory { heads: a.positive("heads")?, max_len: a.positive("max-len")? }
            }
            "SegmentRank" => Op::SegmentRank,
            "SegmentPairSum" => Op::SegmentPairSum { functions: pair_functions(&mut a)? },
            _ => match (elementwise(name), named(&OUTCOMES, name)) {
                (Some(op), _) => op,
                (None, Some(part)) => Op::Outcome { part, task: a.task(tasks)? },
                (None, None) => reduction(name, &mut a)?,
            },
        };
        a.finish()?;
        Ok(op)
    }

    /// The op's name in the contract.
    pub fn name(&self) -> String {
        match self {
            Op::Binary(op) | Op::Compare(op) => format!("{op:?}"),
            Op::Unary(op) => format!("{op:?}"),
            Op::Reduce { kind, .. } => format!("Reduce{kind:?}"),
            Op::Pool(kind) => format!("Pool{kind:?}"),
            Op::Segment(kind) => format!("Segment{kind:?}"),
            Op::Outcome { part, .. } => format!("{part:?}"),
            // The name of the variant, without its attributes.
            op => format!("{op:?}").split(' ').next().unwrap_or_default().to_owned(),
        }
    }
}

const UNARY: [Unary; 11] = {
    use Unary::*;
    [Exp, Log, Sqrt, Neg, Abs, Sigmoid, Silu, Relu, Gelu, Tanh, Softplus]
};
const BINARY: [Zip; 6] = [Zip::Add, Zip::Sub, Zip::Mul, Zip::Div, Zip::Max, Zip::Min];
const COMPARE: [Zip; 3] = [Zip::Greater, Zip::Less, Zip::Equal];
const FOLDS: [Fold; 3] = [Fold::Sum, Fold::Mean, Fold::Max];
const OUTCOMES: [OutcomePart; 4] = {
    use OutcomePart::*;
    [Label, Mask, Weight, BaseLogit]
};
const PAIR_FUNCTIONS: [PairFunction; 6] = {
    use PairFunction::*;
    [Identity, Step, Softplus, Relu, Sigmoid, Abs]
};

/// The most columns of a sum over pairs: a product of more is no loss of anybody.
const MAX_PAIR_COLUMNS: usize = 8;

/// The names that are made of variants' names, which no name in quotes tells.
#[cfg(test)]
pub(crate) fn names_of_variants() -> Vec<String> {
    let alone = UNARY.iter().map(|op| format!("{op:?}"));
    let alone = alone.chain(BINARY.iter().chain(&COMPARE).map(|op| format!("{op:?}")));
    let alone = alone.chain(OUTCOMES.iter().map(|part| format!("{part:?}")));
    let of_folds = |kind| ["Reduce", "Pool", "Segment"].map(|of| format!("{of}{kind:?}"));
    alone.chain(FOLDS.iter().flat_map(of_folds)).collect()
}

/// An op that has no attribute but its name.
fn elementwise(name: &str) -> Option<Op> {
    named(&UNARY, name)
        .map(Op::Unary)
        .or_else(|| named(&BINARY, name).map(Op::Binary))
        .or_else(|| named(&COMPARE, name).map(Op::Compare))
}

fn reduction(name: &str, a: &mut Attributes) -> Result<Op, String> {
    let kind = |name| named(&FOLDS, name);
    if let Some(kind) = name.strip_prefix("Reduce").and_then(kind) {
        return Ok(Op::Reduce { kind, axis: a.index("axis")? });
    }
    let pool = || name.strip_prefix("Pool").and_then(kind).map(Op::Pool);
    let segment = || name.strip_prefix("Segment").and_then(kind).map(Op::Segment);
    pool().or_else(segment).ok_or_else(|| {
        "the op is unknown; sdk/wit/ops.md lists those of this contract version".to_owned()
    })
}

/// The op whose variant has this name, which is the contract's.
fn named<T: Copy + Debug>(ops: &[T], name: &str) -> Option<T> {
    ops.iter().copied().find(|op| format!("{op:?}") == name)
}

fn clip(a: &mut Attributes) -> Result<Op, String> {
    let (min, max) = (a.number("min")?, a.number("max")?);
    refuse_if!(min > max, "its `min` of {min} is above its `max` of {max}");
    Ok(Op::Clip { min, max })
}

fn layer_normalization(a: &mut Attributes) -> Result<Op, String> {
    let epsilon = a.number("epsilon")?;
    refuse_if!(epsilon <= 0.0, "its `epsilon` of {epsilon} is not positive");
    Ok(Op::LayerNormalization { epsilon })
}

fn dropout(a: &mut Attributes) -> Result<Op, String> {
    let rate = a.number("rate")?;
    refuse_if!(!(0.0..1.0).contains(&rate), "its `rate` of {rate} is outside 0..1");
    match a.index("per-row")? {
        per_row @ (0 | 1) => Ok(Op::Dropout { rate, per_row: per_row == 1 }),
        other => Err(format!("its `per-row` of {other} is neither 0 nor 1")),
    }
}

fn pair_functions(a: &mut Attributes) -> Result<Vec<PairFunction>, String> {
    let Value::Texts(names) = a.take("functions")? else {
        return Err("its attribute `functions` is not a list of texts".to_owned());
    };
    let count = names.len();
    refuse_if!(
        !(1..=MAX_PAIR_COLUMNS).contains(&count),
        "its `functions` are {count}; 1 to {MAX_PAIR_COLUMNS} are allowed"
    );
    let function = |name: &String| {
        let unknown = || {
            let name = quote(name);
            format!("its function `{name}` is unknown; there are {PAIR_FUNCTIONS:?}")
        };
        named(&PAIR_FUNCTIONS, name).ok_or_else(unknown)
    };
    names.iter().map(function).collect()
}

/// The attributes of a node that are not parsed yet. None may remain at the end.
struct Attributes<'a> {
    left: Vec<&'a Attribute>,
}

impl<'a> Attributes<'a> {
    fn new(attributes: &'a [Attribute]) -> Result<Self, String> {
        match attributes.len() {
            0..=16 => Ok(Attributes { left: attributes.iter().collect() }),
            many => Err(format!("it has {many} attributes; no op has more than 3")),
        }
    }

    fn take(&mut self, name: &str) -> Result<&'a Value, String> {
        let at = self.left.iter().position(|attribute| attribute.name == name);
        let at = at.ok_or_else(|| format!("its attribute `{name}` is missing"))?;
        Ok(&self.left.remove(at).value)
    }

    /// The index of the task that it names.
    fn task(&mut self, tasks: &[Task]) -> Result<usize, String> {
        let Value::Text(name) = self.take("task")? else {
            return Err("its attribute `task` is not a text".to_owned());
        };
        let index = tasks.iter().position(|task| task.name == *name);
        index.ok_or_else(|| format!("its task `{}` is not in the description", quote(name)))
    }

    fn number(&mut self, name: &str) -> Result<f32, String> {
        match self.take(name)? {
            Value::Number(value) if value.is_finite() => Ok(*value),
            Value::Number(value) => Err(format!("its attribute `{name}` is {value}")),
            _ => Err(format!("its attribute `{name}` is not a number")),
        }
    }

    fn index(&mut self, name: &str) -> Result<usize, String> {
        match self.take(name)? {
            Value::Integer(value) => usize::try_from(*value)
                .map_err(|_| format!("its attribute `{name}` is negative ({value})")),
            _ => Err(format!("its attribute `{name}` is not an integer")),
        }
    }

    fn positive(&mut self, name: &str) -> Result<usize, String> {
        match self.index(name)? {
            0 => Err(format!("its attribute `{name}` is 0")),
            value => Ok(value),
        }
    }

    fn indices(&mut self, name: &str) -> Result<Vec<usize>, String> {
        let Value::Integers(values) = self.take(name)? else {
            return Err(format!("its attribute `{name}` is not a list of integers"));
        };
        refuse_if!(
            values.len() > super::validate::MAX_RANK,
            "its attribute `{name}` has {} entries; 4 is the highest rank",
            values.len()
        );
        let index = |value: &i64| {
            usize::try_from(*value).map_err(|_| format!("its attribute `{name}` contains {value}"))
        };
        values.iter().map(index).collect()
    }

    fn finish(self) -> Result<(), String> {
        match self.left.first() {
            None => Ok(()),
            Some(extra) => Err(format!("it has no attribute `{}`", extra.name.escape_debug())),
        }
    }
}
