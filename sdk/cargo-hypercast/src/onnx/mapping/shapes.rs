//! Operators that move values, and compute none. They work on shapes, indices and ids as on
//! numbers.

use anyhow::{Context, Result, bail, ensure};

use super::{Mapper, NodeView, numbers_of};
use crate::onnx::grid::{Grid, elements};
use crate::onnx::model::Constant;
use crate::onnx::network::SdkCall;
use crate::onnx::value::{
    BATCH, BatchedShape, ComputedTensor, IdCell, MappedValue, Weights, axis_of, shown,
};

/// The most values of a constant that a model's code makes.
const MAX_VALUES: usize = 1 << 24;

impl Mapper {
    /// What an operator gives that moves values; none if it is another operator.
    pub(super) fn shape_operator(
        &mut self,
        view: &NodeView<'_>,
    ) -> Result<Option<Vec<MappedValue>>> {
        let value = match view.op() {
            "Constant" => constant_node(view)?,
            "ConstantOfShape" => constant_of_shape(view)?,
            "Identity" | "Dropout" => view.input(0)?.clone(),
            "Cast" => self.cast(view.input(0)?, view.integer("to", 1))?,
            "Shape" => shape_of(view)?,
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => {
                let value = view.input(0)?;
                let dims = new_dims(view, &value.dims())?;
                self.reshaped(value, dims)?
            }
            "Expand" => expanded(view)?,
            "Transpose" => self.transposed(view)?,
            "Concat" => self.concatenated(view)?,
            "Slice" => self.sliced(view)?,
            "Split" => return self.split(view).map(Some),
            "Gather" => self.gathered(view)?,
            "GatherND" => self.gathered_by_tuples(view)?,
            _ => return Ok(None),
        };
        Ok(Some(vec![value]))
    }

    fn cast(&mut self, value: &MappedValue, to: i64) -> Result<MappedValue> {
        // FLOAT, FLOAT16, DOUBLE and BFLOAT16 of `TensorProto.DataType`.
        let to_numbers = [1, 10, 11, 16].contains(&to);
        Ok(match value {
            MappedValue::Ids { cells, batch } if to_numbers => {
                let mut steps = Vec::new();
                for IdCell { column, offset } in &cells.values {
                    let id = self.network.input(SdkCall::Id(column.clone()), 1)?;
                    let number = self.network.unary("to_numbers", id)?;
                    steps.push(match offset {
                        0 => number,
                        offset => self.network.scalar("+", number, *offset as f32)?,
                    });
                }
                let dims = BatchedShape { sizes: cells.sizes.clone(), batch: Some(*batch) };
                let all = self.network.concat(&steps, 0)?;
                let step = self.network.reshape(all, dims.stored())?;
                MappedValue::Numbers(ComputedTensor { step, dims })
            }
            MappedValue::Integers(values) if to_numbers => {
                MappedValue::Weights(Weights { values: numbers_of(values)?, name: None })
            }
            MappedValue::Weights(weights) if !to_numbers => {
                MappedValue::Integers(weights.values.mapped(|value| *value as i64))
            }
            MappedValue::Numbers(_) if !to_numbers => bail!("it makes integers of numbers"),
            other => other.clone(),
        })
    }

    /// The same values in another shape.
    pub(super) fn reshaped(
        &mut self,
        value: &MappedValue,
        dims: BatchedShape,
    ) -> Result<MappedValue> {
        Ok(match value {
            MappedValue::Numbers(numbers) => {
                let step = self.network.reshape(numbers.step, dims.stored())?;
                MappedValue::Numbers(ComputedTensor { step, dims })
            }
            MappedValue::Weights(Weights { values, name }) => MappedValue::Weights(Weights {
                values: values.reshaped(dims.sizes)?,
                name: name.clone(),
            }),
            MappedValue::Integers(values) => MappedValue::Integers(values.reshaped(dims.sizes)?),
            MappedValue::Ids { cells, .. } => MappedValue::Ids {
                batch: dims.batch.context("it loses the batch")?,
                cells: cells.reshaped(dims.sizes)?,
            },
        })
    }

    fn transposed(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        let value = view.input(0)?;
        let rank = value.dims().sizes.len();
        let perm = match view.attribute("perm") {
            Some(perm) => {
                perm.ints.iter().map(|axis| axis_of(*axis, rank)).collect::<Result<Vec<_>>>()?
            }
            None => (0..rank).rev().collect(),
        };
        let mut sorted = perm.clone();
        sorted.sort_unstable();
        ensure!(sorted.into_iter().eq(0..rank), "its perm {perm:?} is not of {rank} dimensions");
        self.permuted(value, &perm)
    }

    /// A value with its dimensions reordered.
    pub(super) fn permuted(&mut self, value: &MappedValue, perm: &[usize]) -> Result<MappedValue> {
        let place = |batch: usize| perm.iter().position(|axis| *axis == batch);
        Ok(match value {
            MappedValue::Numbers(ComputedTensor { step, dims }) => {
                let sizes = perm.iter().map(|&axis| dims.sizes[axis]).collect();
                let others = perm.iter().filter(|axis| Some(**axis) != dims.batch);
                let others = others.map(|&axis| dims.stored_axis(axis)).collect::<Result<_>>()?;
                let step = match dims.others().len() {
                    0 => *step,
                    _ => self.network.transpose(*step, others)?,
                };
                let batch = dims.batch.and_then(place);
                MappedValue::Numbers(ComputedTensor { step, dims: BatchedShape { sizes, batch } })
            }
            MappedValue::Weights(Weights { values, name }) => MappedValue::Weights(Weights {
                values: values.transposed(perm),
                name: name.clone(),
            }),
            MappedValue::Integers(values) => MappedValue::Integers(values.transposed(perm)),
            MappedValue::Ids { cells, batch } => MappedValue::Ids {
                cells: cells.transposed(perm),
                batch: place(*batch).context("it loses the batch")?,
            },
        })
    }

    fn concatenated(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        let first = view.input(0)?;
        let axis = axis_of(view.integer("axis", 0), first.dims().sizes.len())?;
        let parts = (0..view.inputs.len()).map(|index| view.input(index));
        let parts = parts.collect::<Result<Vec<&MappedValue>>>()?;
        let integers = |part: &&MappedValue| match part {
            MappedValue::Integers(values) => Some(values.clone()),
            _ => None,
        };
        if let Some(parts) = parts.iter().map(integers).collect::<Option<Vec<_>>>() {
            return Ok(MappedValue::Integers(Grid::concatenated(&parts, axis)?));
        }
        if let MappedValue::Ids { batch, .. } = first {
            ensure!(*batch != axis, "it puts rows together");
            let cells = |part: &&MappedValue| match part {
                MappedValue::Ids { cells, batch: own } if own == batch => Ok(cells.clone()),
                _ => bail!("it puts ids and other values together"),
            };
            let cells = parts.iter().map(cells).collect::<Result<Vec<_>>>()?;
            return Ok(MappedValue::Ids {
                cells: Grid::concatenated(&cells, axis)?,
                batch: *batch,
            });
        }
        let numbers = parts.iter().map(|part| self.computed(part)).collect::<Result<Vec<_>>>()?;
        let mut dims = numbers[0].dims.clone();
        let is_like = |part: &ComputedTensor| {
            part.dims.batch == dims.batch && part.dims.sizes.len() == dims.sizes.len()
        };
        ensure!(
            numbers.iter().all(is_like),
            "it puts values of rows together with values that are the same for all rows"
        );
        let stored_axis = dims.stored_axis(axis)?;
        dims.sizes[axis] = numbers.iter().map(|part| part.dims.sizes[axis]).sum();
        let steps: Vec<_> = numbers.iter().map(|part| part.step).collect();
        let step = self.network.concat(&steps, stored_axis)?;
        Ok(MappedValue::Numbers(ComputedTensor { step, dims }))
    }

    /// Some entries of a dimension.
    fn taken(
        &mut self,
        value: &MappedValue,
        axis: usize,
        indices: &[usize],
    ) -> Result<MappedValue> {
        let size = value.dims().sizes[axis];
        if let Some(index) = indices.iter().find(|index| **index >= size) {
            bail!("entry {index} of a dimension of {size}");
        }
        Ok(match value {
            MappedValue::Numbers(ComputedTensor { step, dims }) => {
                let step = self.network.take(*step, dims.stored_axis(axis)?, indices)?;
                let mut dims = dims.clone();
                dims.sizes[axis] = indices.len();
                MappedValue::Numbers(ComputedTensor { step, dims })
            }
            MappedValue::Weights(Weights { values, name }) => MappedValue::Weights(Weights {
                values: values.taken(axis, indices),
                name: name.clone(),
            }),
            MappedValue::Integers(values) => MappedValue::Integers(values.taken(axis, indices)),
            MappedValue::Ids { cells, batch } => {
                ensure!(*batch != axis, "it takes some of the rows");
                MappedValue::Ids { cells: cells.taken(axis, indices), batch: *batch }
            }
        })
    }

    fn sliced(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        let mut value = view.input(0)?.clone();
        let dims = value.dims();
        let wanted = |name: &str, index: usize| {
            view.integers(name, index)?.with_context(|| format!("its `{name}` is missing"))
        };
        let (starts, ends) = (wanted("starts", 1)?, wanted("ends", 2)?);
        let axes = view.integers("axes", 3)?.unwrap_or((0..starts.len() as i64).collect());
        let steps = view.integers("steps", 4)?.unwrap_or(vec![1; starts.len()]);
        let sizes = [&ends, &axes, &steps].map(Vec::len);
        ensure!(sizes == [starts.len(); 3], "its starts, ends, axes and steps are not as many");
        for (((start, end), axis), step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
            let axis = axis_of(*axis, dims.sizes.len())?;
            ensure!(*step > 0, "its step of {step} goes backwards");
            if dims.batch == Some(axis) {
                let is_whole = *start == 0 && (*end == BATCH || *end >= i64::from(i32::MAX));
                ensure!(is_whole && *step == 1, "it takes some of the rows");
                continue;
            }
            let size = dims.sizes[axis];
            let indices = (place_of(*start, size)..place_of(*end, size)).step_by(*step as usize);
            value = self.taken(&value, axis, &indices.collect::<Vec<usize>>())?;
        }
        Ok(value)
    }

    fn split(&mut self, view: &NodeView<'_>) -> Result<Vec<MappedValue>> {
        let value = view.input(0)?;
        let sizes = value.dims().sizes;
        let axis = axis_of(view.integer("axis", 0), sizes.len())?;
        let size = sizes[axis];
        let parts = view.node.output.len();
        let lengths = match view.integers("split", 1)? {
            Some(lengths) => lengths,
            None => {
                let each = size.div_ceil(parts);
                let length = |part: usize| each.min(size.saturating_sub(part * each)) as i64;
                (0..parts).map(length).collect()
            }
        };
        let mut start = 0;
        let mut part = |length: &i64| {
            let end = usize::try_from(*length).ok().and_then(|length| length.checked_add(start));
            let end = end.filter(|end| *end <= size);
            let end =
                end.with_context(|| format!("its parts {lengths:?} of a dimension of {size}"))?;
            let indices: Vec<usize> = (start..end).collect();
            start = end;
            self.taken(value, axis, &indices)
        };
        lengths.iter().map(&mut part).collect()
    }

    fn gathered(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        let (value, indices) = (view.input(0)?, view.input(1)?);
        let dims = value.dims();
        let axis = axis_of(view.integer("axis", 0), dims.sizes.len())?;
        match indices {
            MappedValue::Integers(indices) => {
                let size = dims.sizes[axis];
                let index = |index: &i64| axis_of(*index, size);
                let flat = indices.values.iter().map(index).collect::<Result<Vec<_>>>()?;
                let taken = self.taken(value, axis, &flat)?;
                let mut dims = taken.dims();
                dims.sizes.splice(axis..=axis, indices.sizes.iter().copied());
                let moved = |batch: usize| batch + indices.sizes.len() - 1;
                dims.batch = dims.batch.map(|own| if own > axis { moved(own) } else { own });
                self.reshaped(&taken, dims)
            }
            MappedValue::Ids { cells, batch } => match (value, axis) {
                (MappedValue::Weights(table), 0) => self.embedded(table, cells, *batch),
                _ => bail!("it looks ids up in something that is no table of weights"),
            },
            _ => bail!("its indices depend on numbers"),
        }
    }

    /// Rows of a table for each cell.
    fn embedded(
        &mut self,
        Weights { values, name }: &Weights,
        cells: &Grid<IdCell>,
        batch: usize,
    ) -> Result<MappedValue> {
        ensure!(
            (1..=2).contains(&values.sizes.len()),
            "its table of shape {:?} is no matrix",
            values.sizes
        );
        let (count, width) = (values.sizes[0], values.sizes.get(1).copied().unwrap_or(1));
        let table = values.reshaped(vec![count, width])?;
        // A model that adds an offset to each of its ids has one table after the other in one. A
        // table of a single row says nothing of its id: then columns share what follows.
        let mut starts: Vec<i64> = cells.values.iter().map(|cell| cell.offset).collect();
        starts.sort_unstable();
        starts.dedup();
        let is_shared = starts.windows(2).any(|pair| pair[0] + 1 == pair[1]);
        let mut steps = Vec::new();
        for IdCell { column, offset } in &cells.values {
            let next = starts.iter().find(|start| *start > offset && !is_shared);
            let end = next.map_or(count, |next| *next as usize);
            let rows = usize::try_from(*offset).ok().filter(|start| *start < end && end <= count);
            let rows = rows.with_context(|| {
                format!("its table has {count} rows, and ids of `{column}` begin at {offset}")
            })?;
            let name = name.clone().unwrap_or_else(|| self.network.name.clone());
            let name = if starts.len() > 1 { format!("{name}.{column}") } else { name };
            let values = table.taken(0, &(rows..end).collect::<Vec<_>>());
            let part = self.network.parameter(&name, values, false)?;
            let id = self.network.input(SdkCall::Id(column.clone()), 1)?;
            steps.push(self.network.gather(part, id)?);
        }
        let mut dims = BatchedShape { sizes: cells.sizes.clone(), batch: Some(batch) };
        dims.sizes.extend(values.sizes.get(1));
        let all = self.network.concat(&steps, 0)?;
        let step = self.network.reshape(all, dims.stored())?;
        Ok(MappedValue::Numbers(ComputedTensor { step, dims }))
    }

    fn gathered_by_tuples(&mut self, view: &NodeView<'_>) -> Result<MappedValue> {
        let value = view.input(0)?;
        let MappedValue::Integers(indices) = view.input(1)? else {
            bail!("its indices depend on data")
        };
        ensure!(view.integer("batch_dims", 0) == 0, "its batch_dims are not 0");
        let (Some(&length), dims) = (indices.sizes.last(), value.dims()) else {
            bail!("its indices are a single number")
        };
        let (first, rest) = dims.sizes.split_at_checked(length).context("its indices")?;
        ensure!(dims.batch.is_none_or(|batch| batch >= length), "it takes some of the rows");
        let mut flat = Vec::new();
        for tuple in indices.values.chunks(length.max(1)) {
            let mut at = 0;
            for (index, size) in tuple.iter().zip(first) {
                at = at * size + axis_of(*index, *size)?;
            }
            flat.push(at);
        }
        let shape = |sizes: &[usize]| {
            let batch = dims.batch.map(|batch| batch - length + sizes.len());
            BatchedShape { sizes: [sizes, rest].concat(), batch }
        };
        let merged = self.reshaped(value, shape(&[first.iter().product()]))?;
        let taken = self.taken(&merged, 0, &flat)?;
        self.reshaped(&taken, shape(&indices.sizes[..indices.sizes.len() - 1]))
    }
}

/// The place of a bound in a dimension: it may count from the end, and ends with the dimension.
fn place_of(bound: i64, size: usize) -> usize {
    let size = size as i64;
    (if bound < 0 { bound.saturating_add(size) } else { bound }).clamp(0, size) as usize
}

fn shape_of(view: &NodeView<'_>) -> Result<MappedValue> {
    let shape = view.input(0)?.dims().as_integers();
    let (start, end) = (view.integer("start", 0), view.integer("end", i64::MAX));
    let part = shape.get(place_of(start, shape.len())..place_of(end, shape.len()));
    Ok(MappedValue::Integers(Grid::vector(part.unwrap_or_default().to_vec())))
}

fn constant_node(view: &NodeView<'_>) -> Result<MappedValue> {
    if let Some(constant) = view.tensor("value")? {
        return Ok(match constant {
            Constant::Numbers(values) => MappedValue::Weights(Weights { values, name: None }),
            Constant::Integers(values) => MappedValue::Integers(values),
        });
    }
    let [attribute] = view.node.attribute.as_slice() else { bail!("it has no value") };
    let single = |values| Grid { sizes: Vec::new(), values };
    let weights = |values| MappedValue::Weights(Weights { values, name: None });
    Ok(match attribute.name.as_str() {
        "value_int" => MappedValue::Integers(Grid { sizes: Vec::new(), values: vec![attribute.i] }),
        "value_ints" => MappedValue::Integers(Grid::vector(attribute.ints.clone())),
        "value_float" => weights(single(vec![attribute.f])),
        "value_floats" => weights(Grid::vector(attribute.floats.clone())),
        other => bail!("its `{other}` is no number"),
    })
}

fn constant_of_shape(view: &NodeView<'_>) -> Result<MappedValue> {
    let MappedValue::Integers(shape) = view.input(0)? else { bail!("its shape depends on data") };
    // A value that is the same for all rows broadcasts: the batch's place has size 1.
    let BatchedShape { sizes, .. } = BatchedShape::of_integers(&shape.values)?;
    let count = elements(&sizes).filter(|count| *count <= MAX_VALUES);
    let count = count.with_context(|| format!("its shape {sizes:?} is too large"))?;
    Ok(match view.tensor("value")? {
        Some(Constant::Integers(value)) => {
            let value = value.values.first().copied().unwrap_or_default();
            MappedValue::Integers(Grid { values: vec![value; count], sizes })
        }
        Some(Constant::Numbers(value)) => {
            let value = value.values.first().copied().unwrap_or_default();
            let values = Grid { values: vec![value; count], sizes };
            MappedValue::Weights(Weights { values, name: None })
        }
        None => {
            let values = Grid { values: vec![0.0; count], sizes };
            MappedValue::Weights(Weights { values, name: None })
        }
    })
}

/// A value of which the model makes a larger one by repeating it: what reads it broadcasts it.
fn expanded(view: &NodeView<'_>) -> Result<MappedValue> {
    let (value, shape) = (view.input(0)?, view.integers("shape", 1)?.context("its shape")?);
    let own = value.dims().as_integers();
    let padding = shape.len().saturating_sub(own.len());
    let padded = std::iter::repeat_n(&1, padding).chain(&own);
    // Any size but the batch may count: in a sum, say.
    let fits = |(to, from): (&i64, &i64)| to == from || *to == 1 || (*to == BATCH && *from == 1);
    ensure!(
        shape.len() >= own.len() && shape.iter().zip(padded).all(fits),
        "it repeats values of {} to {}",
        shown(&own),
        shown(&shape)
    );
    Ok(value.clone())
}

/// The shape that an operator which only changes the shape gives.
fn new_dims(view: &NodeView<'_>, dims: &BatchedShape) -> Result<BatchedShape> {
    let rank = dims.sizes.len();
    let axes = |rank: usize| -> Result<Option<Vec<usize>>> {
        let axes = view.integers("axes", 1)?;
        axes.map(|axes| axes.iter().map(|axis| axis_of(*axis, rank)).collect()).transpose()
    };
    let mut shape = dims.as_integers();
    match view.op() {
        "Flatten" => {
            let axis = view.integer("axis", 1);
            let axis = if axis == rank as i64 { rank } else { axis_of(axis, rank)? };
            let product = |sizes: &[i64]| -> Result<i64> {
                let (batch, others): (Vec<i64>, Vec<i64>) =
                    sizes.iter().partition(|size| **size == BATCH);
                let product: i64 = others.iter().product();
                ensure!(
                    batch.is_empty() || product == 1,
                    "it mixes the batch with other dimensions"
                );
                Ok(if batch.is_empty() { product } else { BATCH })
            };
            shape = vec![product(&shape[..axis])?, product(&shape[axis..])?];
        }
        "Squeeze" => {
            let axes = axes(rank)?;
            let goes = |axis: usize, size: i64| match &axes {
                Some(axes) => axes.contains(&axis),
                None => size == 1,
            };
            let own = dims.as_integers();
            let gone = own.iter().enumerate().filter(|(axis, size)| goes(*axis, **size));
            let is_one = |(_, size): (usize, &i64)| *size == 1;
            ensure!(gone.clone().all(is_one), "it drops a dimension that is not 1");
            let kept = own.iter().enumerate().filter(|(axis, size)| !goes(*axis, **size));
            shape = kept.map(|(_, size)| *size).collect();
        }
        "Unsqueeze" => {
            let added = view.integers("axes", 1)?.context("its axes are missing")?.len();
            let mut axes = axes(rank + added)?.unwrap_or_default();
            axes.sort_unstable();
            axes.into_iter().for_each(|axis| shape.insert(axis, 1));
        }
        _ => {
            let wanted = view.integers("shape", 1)?.context("its shape is missing")?;
            shape = resolved(&wanted, dims, view.integer("allowzero", 0) == 1)?;
        }
    }
    let new = BatchedShape::of_integers(&shape)?;
    let before = |dims: &BatchedShape| dims.batch.map(|batch| dims.sizes[..batch].iter().product());
    let same: (Option<usize>, Option<usize>) = (before(dims), before(&new));
    ensure!(
        same.0 == same.1,
        "its shape {} mixes the batch of {} with other dimensions",
        shown(&shape),
        shown(&dims.as_integers())
    );
    Ok(new)
}

/// The target of a `Reshape`, in which 0 keeps a size and -1 is what is left.
fn resolved(wanted: &[i64], dims: &BatchedShape, allows_zero: bool) -> Result<Vec<i64>> {
    let own = dims.as_integers();
    let kept = |(axis, size): (usize, &i64)| match *size {
        0 if !allows_zero => {
            own.get(axis).copied().context("its shape keeps a size that is not there")
        }
        size => Ok(size),
    };
    let mut shape = wanted.iter().enumerate().map(kept).collect::<Result<Vec<_>>>()?;
    let count: usize = dims.sizes.iter().product();
    let others = shape.iter().filter(|size| **size > 0).product::<i64>().max(1) as usize;
    if let Some(open) = shape.iter().position(|size| *size == -1) {
        let is_batch = dims.batch.is_some() && !shape.contains(&BATCH);
        ensure!(
            count.is_multiple_of(others) && (!is_batch || count == others),
            "its shape {} does not fit {}",
            shown(wanted),
            shown(&own)
        );
        shape[open] = if is_batch { BATCH } else { (count / others) as i64 };
    }
    Ok(shape)
}
