//! What a name of the model stands for while it is mapped.

use anyhow::{Context, Result, ensure};

use super::grid::Grid;
use super::network::StepId;

/// Stands for the size of the batch in a shape that the model computes with.
pub const BATCH: i64 = i64::MIN;

/// A shape of the model, which may have the batch in any place. Steps have the rows first, and the
/// other dimensions behind them in the model's order.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchedShape {
    /// With 1 for the batch.
    pub sizes: Vec<usize>,
    /// Which of them is the batch.
    pub batch: Option<usize>,
}

impl BatchedShape {
    /// A batch, then fixed sizes.
    pub fn batched(sizes: &[usize]) -> Self {
        Self { sizes: [&[1], sizes].concat(), batch: Some(0) }
    }

    /// The sizes but for the batch.
    pub fn others(&self) -> Vec<usize> {
        let own = self.sizes.iter().enumerate().filter(|(axis, _)| Some(*axis) != self.batch);
        own.map(|(_, size)| *size).collect()
    }

    /// The dimensions of a step that holds such values. A tensor of the contract has one at least
    /// besides the rows.
    pub fn stored(&self) -> Vec<usize> {
        let others = self.others();
        if others.is_empty() { vec![1] } else { others }
    }

    /// An axis of a step by the model's own axis.
    ///
    /// # Errors
    /// It is that of the batch.
    pub fn stored_axis(&self, axis: usize) -> Result<usize> {
        let batch = self.batch.filter(|batch| *batch <= axis);
        ensure!(
            batch != Some(axis),
            "it works along the batch (axis {axis}); an expert computes each row for itself"
        );
        Ok(axis - usize::from(batch.is_some()))
    }

    /// The shape as the model's `Shape` says it.
    pub fn as_integers(&self) -> Vec<i64> {
        let size = |(axis, size): (usize, &usize)| {
            if Some(axis) == self.batch { BATCH } else { *size as i64 }
        };
        self.sizes.iter().enumerate().map(size).collect()
    }

    /// The shape that a model computed.
    ///
    /// # Errors
    /// It has a size below 0, or the batch twice.
    pub fn of_integers(sizes: &[i64]) -> Result<Self> {
        let mut batches = sizes.iter().enumerate().filter(|(_, size)| **size == BATCH);
        let batch = batches.next().map(|(axis, _)| axis);
        ensure!(batches.next().is_none(), "its shape {} has the batch twice", shown(sizes));
        let size = |size: &i64| match *size {
            BATCH => Ok(1),
            size => usize::try_from(size).with_context(|| format!("its shape {}", shown(sizes))),
        };
        Ok(Self { sizes: sizes.iter().map(size).collect::<Result<_>>()?, batch })
    }
}

/// A shape in words.
pub fn shown(sizes: &[i64]) -> String {
    let size = |size: &i64| if *size == BATCH { "batch".to_owned() } else { size.to_string() };
    format!("[{}]", sizes.iter().map(size).collect::<Vec<_>>().join(", "))
}

/// An axis that may count from the end.
pub fn axis_of(axis: i64, rank: usize) -> Result<usize> {
    let from_start = if axis < 0 { axis + rank as i64 } else { axis };
    let axis = usize::try_from(from_start).ok().filter(|axis| *axis < rank);
    axis.with_context(|| format!("axis {from_start} of a tensor of {rank} dimensions"))
}

/// Numbers that the network computes.
#[derive(Debug, Clone, PartialEq)]
pub struct ComputedTensor {
    pub step: StepId,
    pub dims: BatchedShape,
}

/// Numbers that the file has.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    pub values: Grid<f32>,
    /// The name of the initializer that they come from; none of a constant in the model's code.
    pub name: Option<String>,
}

/// What the model reads at a place of an input of ids: an id column, plus a number.
#[derive(Debug, Clone, PartialEq)]
pub struct IdCell {
    pub column: String,
    pub offset: i64,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq)]
pub enum MappedValue {
    Numbers(ComputedTensor),
    Weights(Weights),
    /// A shape or indices.
    Integers(Grid<i64>),
    /// The grid has size 1 in the place of the batch.
    Ids {
        cells: Grid<IdCell>,
        batch: usize,
    },
}

impl MappedValue {
    /// Its shape in the model, with the batch where the model has it.
    pub fn dims(&self) -> BatchedShape {
        match self {
            MappedValue::Numbers(ComputedTensor { dims, .. }) => dims.clone(),
            MappedValue::Weights(Weights { values, .. }) => {
                BatchedShape { sizes: values.sizes.clone(), batch: None }
            }
            MappedValue::Integers(values) => {
                BatchedShape { sizes: values.sizes.clone(), batch: None }
            }
            MappedValue::Ids { cells, batch } => {
                BatchedShape { sizes: cells.sizes.clone(), batch: Some(*batch) }
            }
        }
    }
}
