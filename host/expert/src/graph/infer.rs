//! What each op makes of its inputs (type and shape), and what it costs.
//!
//! Every rule returns the result's type and shape, or the rule that is broken. Requests stay apart
//! because a symbolic dimension stays first and never meets the other one.

use hypercast_fm::cost::CANDIDATES;

use super::{Fold, Lead, Op, TensorShape, Type};

/// The result of an op other than `Input` and `Parameter`.
pub(super) fn infer(
    op: &Op,
    inputs: &[(Type, &TensorShape)],
) -> Result<(Type, TensorShape), String> {
    check_arity(op, inputs.len())?;
    check_types(op, inputs)?;
    let shapes: Vec<&TensorShape> = inputs.iter().map(|(_, shape)| *shape).collect();
    let x = shapes.first().copied();
    let ty = match op {
        Op::Concat { .. } | Op::Slice { .. } | Op::Reshape { .. } | Op::Transpose { .. } => {
            inputs[0].0
        }
        _ => Type::Number,
    };
    let shape = match (op, x) {
        (Op::Constant { shape, .. }, _) => constant(shape)?,
        (Op::Outcome { .. }, _) => TensorShape::led(Lead::Rows, &[1]),
        (Op::MatMul, Some(a)) => matmul(a, shapes[1])?,
        (Op::Binary(_) | Op::Compare(_), Some(a)) => broadcast(a, shapes[1])?,
        (Op::Where, Some(c)) => same(c, &shapes)?,
        (Op::Concat { axis }, Some(_)) => concat(&shapes, *axis)?,
        (Op::Slice { axis, start, end }, Some(x)) => slice(x, *axis, *start, *end)?,
        (Op::Reshape { shape }, Some(x)) => reshape(x, shape)?,
        (Op::Transpose { perm }, Some(x)) => transpose(x, perm)?,
        (Op::Gather | Op::EmbeddingBag, Some(table)) => lookup(op, table, shapes[1])?,
        (Op::Softmax { axis }, Some(x)) => fixed_axis(x, *axis).map(|_| x.clone())?,
        (Op::Reduce { axis, .. }, Some(x)) => {
            let at = fixed_axis(x, *axis)?;
            let mut shape = x.clone();
            shape.dims[at] = 1;
            shape
        }
        (Op::LayerNormalization { .. }, Some(x)) => layer_norm(x, shapes[1], shapes[2])?,
        (Op::HstuAttention { heads, .. }, Some(_)) => {
            hstu(&shapes[..3], Lead::History, *heads)?;
            let rows = hstu(&shapes[3..], Lead::Rows, *heads)?;
            refuse_if!(
                rows.dims != shapes[0].dims,
                "the history's width {} and the rows' {} differ",
                shapes[0].dims[0],
                rows.dims[0]
            );
            rows
        }
        (Op::HstuHistory { heads, .. }, Some(_)) => hstu(&shapes, Lead::History, *heads)?,
        (Op::Pool(_), Some(x)) => pool(x)?,
        (Op::Segment(_) | Op::SegmentRank, Some(x)) => segment(x)?,
        (Op::SegmentPairSum { functions }, Some(a)) => pair_sum(a, shapes[1], functions.len())?,
        (Op::Dropout { per_row: true, .. }, Some(x)) if x.lead.is_none() => {
            return Err("`per-row` needs a symbolic first dimension".into());
        }
        (_, Some(x)) => x.clone(),
        (_, None) => unreachable!("the arity was checked"),
    };
    Ok((ty, shape))
}

fn check_arity(op: &Op, inputs: usize) -> Result<(), String> {
    let expected = match op {
        Op::Constant { .. } | Op::Outcome { .. } => 0,
        Op::MatMul | Op::Binary(_) | Op::Compare(_) | Op::Gather | Op::EmbeddingBag => 2,
        Op::SegmentPairSum { .. } => 2,
        Op::Where | Op::LayerNormalization { .. } | Op::HstuHistory { .. } => 3,
        Op::HstuAttention { .. } => 6,
        Op::Concat { .. } if (1..=256).contains(&inputs) => return Ok(()),
        Op::Concat { .. } => return Err(format!("it has {inputs} inputs, but takes 1 to 256")),
        _ => 1,
    };
    refuse_if!(inputs != expected, "it has {inputs} inputs, but takes {expected}");
    Ok(())
}

fn check_types(op: &Op, inputs: &[(Type, &TensorShape)]) -> Result<(), String> {
    for (index, (ty, _)) in inputs.iter().enumerate() {
        let expected = match op {
            Op::Cast => Type::Id,
            Op::Gather | Op::EmbeddingBag if index == 1 => Type::Id,
            Op::Concat { .. } => inputs[0].0,
            Op::Slice { .. } | Op::Reshape { .. } | Op::Transpose { .. } => *ty,
            _ => Type::Number,
        };
        if *ty != expected {
            let (is, takes) = match expected {
                Type::Number => ("i64 ids", "f32; `Cast` or `EmbeddingBag` turns ids into numbers"),
                Type::Id => ("f32", "i64 ids"),
            };
            return Err(format!("its input {index} is {is}, but it takes {takes}"));
        }
    }
    Ok(())
}

fn constant(dims: &[usize]) -> Result<TensorShape, String> {
    // A scalar becomes a vector of one value, which broadcasts in the same way.
    let shape = if dims.is_empty() { TensorShape::fixed(&[1]) } else { TensorShape::fixed(dims) };
    refuse_if!(shape.dims.contains(&0), "its shape {shape} contains a 0");
    Ok(shape)
}

fn matmul(a: &TensorShape, b: &TensorShape) -> Result<TensorShape, String> {
    refuse_if!(b.lead.is_some() || b.dims.len() != 2, "its second input {b} is not a fixed matrix");
    refuse_if!(a.rank() < 2, "its first input {a} has rank 1");
    let (k, n) = (b.dims[0], b.dims[1]);
    let mut shape = a.clone();
    let last = shape.dims.last_mut().ok_or("its first input has no fixed last dimension")?;
    refuse_if!(*last != k, "the inner dimensions {last} and {k} differ");
    *last = n;
    Ok(shape)
}

fn broadcast(a: &TensorShape, b: &TensorShape) -> Result<TensorShape, String> {
    let (long, short) = if a.rank() >= b.rank() { (a, b) } else { (b, a) };
    let offset = long.rank() - short.rank();
    let mut shape = long.clone();
    if let Some(lead) = short.lead {
        refuse_if!(
            offset > 0,
            "{short} would put its symbolic dimension inside {long}: reshape it to the same \
                 rank first"
        );
        shape.lead = Some(lead);
    }
    match (long.lead, short.lead) {
        (Some(x), Some(y)) if x != y => {
            return Err("`rows` meets `history`; only HstuAttention and the Pool ops cross from \
                        one to the other"
                .into());
        }
        // A fixed dimension that meets a symbolic one must be 1.
        (Some(_), None) if offset == 0 => meets_symbolic(short.dims[0])?,
        (None, Some(_)) => {
            meets_symbolic(long.dims[0])?;
            shape.dims.remove(0);
        }
        _ => {}
    }
    // The remaining fixed dimensions, aligned at the right.
    let other =
        &short.dims[usize::from(short.lead.is_none() && shape.lead.is_some() && offset == 0)..];
    let base = shape.dims.len() - other.len();
    for (dim, with) in shape.dims[base..].iter_mut().zip(other) {
        *dim = match (*dim, *with) {
            (x, y) if x == y || y == 1 => x,
            (1, y) => y,
            (x, y) => return Err(format!("dimensions {x} and {y} do not broadcast")),
        };
    }
    Ok(shape)
}

fn meets_symbolic(dim: usize) -> Result<(), String> {
    refuse_if!(dim != 1, "a symbolic dimension meets {dim} (only 1 broadcasts)");
    Ok(())
}

fn same(first: &TensorShape, all: &[&TensorShape]) -> Result<TensorShape, String> {
    match all.iter().find(|shape| **shape != first) {
        None => Ok(first.clone()),
        Some(other) => Err(format!("its inputs {first} and {other} differ in shape")),
    }
}

/// The position of a fixed axis in `dims`.
fn fixed_axis(x: &TensorShape, axis: usize) -> Result<usize, String> {
    refuse_if!(axis >= x.rank(), "its axis {axis} is outside {x}");
    axis.checked_sub(x.lead.iter().len())
        .ok_or_else(|| format!("its axis {axis} is the symbolic dimension of {x}"))
}

fn concat(shapes: &[&TensorShape], axis: usize) -> Result<TensorShape, String> {
    let mut shape = shapes[0].clone();
    let at = fixed_axis(&shape, axis)?;
    for other in &shapes[1..] {
        let mut like = (*other).clone();
        if like.rank() == shape.rank() && like.lead == shape.lead {
            like.dims[at] = shape.dims[at];
        }
        refuse_if!(like != shape, "{} and {other} differ outside axis {axis}", shapes[0]);
        shape.dims[at] = shape.dims[at].checked_add(other.dims[at]).ok_or("its size overflows")?;
    }
    Ok(shape)
}

fn slice(x: &TensorShape, axis: usize, start: usize, end: usize) -> Result<TensorShape, String> {
    let at = fixed_axis(x, axis)?;
    refuse_if!(
        start >= end || end > x.dims[at],
        "{start}..{end} is empty or outside the {} of axis {axis}",
        x.dims[at]
    );
    let mut shape = x.clone();
    shape.dims[at] = end - start;
    Ok(shape)
}

fn reshape(x: &TensorShape, to: &[usize]) -> Result<TensorShape, String> {
    let dims = match (x.lead, to) {
        (Some(_), [0, dims @ ..]) => dims,
        (Some(_), _) => {
            return Err(format!(
                "the first entry of its `shape` must be 0: {x} keeps its symbolic dimension"
            ));
        }
        (None, dims) => dims,
    };
    let shape = TensorShape { lead: x.lead, dims: dims.to_vec() };
    let elements = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
    refuse_if!(
        shape.rank() == 0 || dims.contains(&0) || elements != Some(x.row_elements()),
        "{x} does not have the elements of {shape}"
    );
    Ok(shape)
}

fn transpose(x: &TensorShape, perm: &[usize]) -> Result<TensorShape, String> {
    let mut seen = vec![false; x.rank()];
    let valid = perm.len() == x.rank()
        && perm
            .iter()
            .all(|axis| seen.get_mut(*axis).is_some_and(|seen| !std::mem::replace(seen, true)));
    refuse_if!(!valid, "its `perm` {perm:?} is no permutation of the {} axes of {x}", x.rank());
    let lead = x.lead.iter().len();
    refuse_if!(
        lead == 1 && perm[0] != 0,
        "its `perm` {perm:?} moves the symbolic dimension of {x}, which stays first"
    );
    let dims = perm[lead..].iter().map(|axis| x.dims[axis - lead]).collect();
    Ok(TensorShape { lead: x.lead, dims })
}

fn lookup(op: &Op, table: &TensorShape, ids: &TensorShape) -> Result<TensorShape, String> {
    refuse_if!(
        table.lead.is_some() || table.dims.len() != 2,
        "its table {table} is not a fixed matrix"
    );
    let (Some(lead), [k]) = (ids.lead, ids.dims.as_slice()) else {
        return Err(format!("its ids {ids} are not [rows, k] or [history, k]"));
    };
    refuse_if!(*op == Op::Gather && *k != 1, "its index {ids} has more than one column");
    Ok(TensorShape::led(lead, &[table.dims[1]]))
}

fn layer_norm(
    x: &TensorShape,
    scale: &TensorShape,
    bias: &TensorShape,
) -> Result<TensorShape, String> {
    let d = *x.dims.last().ok_or_else(|| format!("{x} has no fixed last dimension"))?;
    let expected = TensorShape::fixed(&[d]);
    refuse_if!(
        *scale != expected || *bias != expected,
        "its scale {scale} and bias {bias} must be {expected}, the last dimension of {x}"
    );
    Ok(x.clone())
}

fn hstu(qkv: &[&TensorShape], lead: Lead, heads: usize) -> Result<TensorShape, String> {
    let q = qkv[0];
    if q.lead != Some(lead) || q.dims.len() != 1 || qkv.iter().any(|shape| *shape != q) {
        let shapes: Vec<String> = qkv.iter().map(|shape| shape.to_string()).collect();
        let expected = TensorShape::led(lead, &[0]).to_string().replace('0', "heads * d");
        return Err(format!("its q, k, v {} must be {expected}, all alike", shapes.join(", ")));
    }
    refuse_if!(
        !q.dims[0].is_multiple_of(heads),
        "its width {} is not a multiple of its {heads} heads",
        q.dims[0]
    );
    Ok(q.clone())
}

fn pool(x: &TensorShape) -> Result<TensorShape, String> {
    refuse_if!(
        x.lead != Some(Lead::History) || x.dims.len() != 1,
        "it pools [history, d], not {x}"
    );
    Ok(TensorShape::led(Lead::Rows, &x.dims))
}

fn segment(x: &TensorShape) -> Result<TensorShape, String> {
    refuse_if!(
        x.lead != Some(Lead::Rows) || x.dims.len() != 1,
        "it works within a request's [rows, d], not {x}"
    );
    Ok(x.clone())
}

fn pair_sum(a: &TensorShape, b: &TensorShape, functions: usize) -> Result<TensorShape, String> {
    segment(a)?;
    refuse_if!(
        a != b || a.dims[0] != functions,
        "its inputs {a} and {b} are not both [rows, {functions}], a column for each function"
    );
    Ok(TensorShape::led(Lead::Rows, &[1]))
}

/// The number of values a row that an op needs at once beyond its result. The limits count them.
pub(super) fn working_elements(op: &Op, inputs: &[&TensorShape], result: &TensorShape) -> usize {
    match op {
        Op::EmbeddingBag => inputs[1].dims[0].saturating_mul(result.dims[0]),
        Op::Pool(Fold::Max) => result.dims[0].saturating_mul(2),
        _ => 0,
    }
}

/// The rows of a request with which ops that compare a row with all others are counted.
const COMPARED_ROWS: u64 = 1000;

/// Floating-point operations of a network's predictions, without what only its losses need: a
/// multiply-add counts two, any other arithmetic one an element. Attention counts the full short
/// history, and what compares a request's rows 1,000 of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// For each candidate.
    pub per_row: u64,
    /// For each event of the short history.
    pub per_history: u64,
    /// Once a batch, on parameters alone.
    pub fixed: u64,
}

impl Cost {
    /// The cost of a candidate that shares a full short history, and the arithmetic on parameters,
    /// with the others of [`CANDIDATES`]. `GraphLimits::flops_per_candidate` limits it.
    pub fn per_candidate(&self, history_len: u32) -> u64 {
        let history = self.per_history.saturating_mul(u64::from(history_len));
        self.per_row.saturating_add(history.saturating_add(self.fixed) / CANDIDATES as u64)
    }

    /// Adds one node's cost.
    pub(super) fn add(
        &mut self,
        op: &Op,
        inputs: &[&TensorShape],
        result: &TensorShape,
        history_len: u32,
    ) {
        let pairs = u64::from(history_len) + 1;
        let count = |shape: &TensorShape| shape.row_elements() as u64;
        let elements = count(result);
        let flops = match op {
            Op::Input { .. } | Op::Parameter { .. } | Op::Constant { .. } | Op::StopGradient => 0,
            // Moving values is no arithmetic, and serving skips dropout.
            Op::Concat { .. } | Op::Slice { .. } | Op::Reshape { .. } | Op::Transpose { .. } => 0,
            Op::Gather | Op::Cast | Op::Dropout { .. } => 0,
            Op::MatMul => 2u64.saturating_mul(elements).saturating_mul(inputs[1].dims[0] as u64),
            Op::EmbeddingBag => elements.saturating_mul(inputs[1].dims[0] as u64),
            Op::LayerNormalization { .. } => elements.saturating_mul(8),
            Op::Softmax { .. } => elements.saturating_mul(4),
            Op::Reduce { .. } => count(inputs[0]),
            Op::Outcome { .. } => 0,
            // Sorted: some ten comparisons a row.
            Op::SegmentRank => elements.saturating_mul(10),
            Op::SegmentPairSum { functions } => 8 * COMPARED_ROWS * functions.len() as u64,
            // Q K^T and A V over the history and the row itself.
            Op::HstuAttention { .. } => elements.saturating_mul(4).saturating_mul(pairs),
            // Causal, so half of the pairs.
            Op::HstuHistory { .. } => elements.saturating_mul(2).saturating_mul(pairs),
            _ => elements,
        };
        let bucket = match result.lead {
            // Pooling gives rows, but works on every event.
            _ if matches!(op, Op::Pool(_)) => &mut self.per_history,
            Some(Lead::Rows) => &mut self.per_row,
            Some(Lead::History) => &mut self.per_history,
            None => &mut self.fixed,
        };
        *bucket = bucket.saturating_add(flops);
    }
}
