//! Shapes with a symbolic first dimension, and how they broadcast.
//!
//! The shape that each op produces is computed in `ops`.

use std::fmt;

/// One dimension of a shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// A size known when the graph is built.
    Fixed(u32),
    /// The candidates of a batch, or its examples in training.
    Rows,
    /// The short-history events of a batch.
    History,
}

/// The shape of a tensor: at most one symbolic dimension, and it comes first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape(Vec<Dim>);

impl Shape {
    /// The shape `[rows, width]`.
    pub fn rows(width: u32) -> Self {
        Self(vec![Dim::Rows, Dim::Fixed(width)])
    }

    /// The shape `[history, width]`.
    pub fn history(width: u32) -> Self {
        Self(vec![Dim::History, Dim::Fixed(width)])
    }

    /// A shape without a symbolic dimension.
    pub fn fixed(dims: &[u32]) -> Self {
        Self(dims.iter().map(|&d| Dim::Fixed(d)).collect())
    }

    pub(crate) fn new(dims: Vec<Dim>) -> Self {
        Self(dims)
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[Dim] {
        &self.0
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// The size of a fixed dimension; `None` if it is symbolic or does not exist.
    pub fn size(&self, axis: usize) -> Option<u32> {
        match self.0.get(axis) {
            Some(&Dim::Fixed(size)) => Some(size),
            _ => None,
        }
    }

    /// The size of the last dimension, if it is fixed.
    pub fn width(&self) -> Option<u32> {
        self.size(self.rank().checked_sub(1)?)
    }

    /// The same shape with one dimension set to `size`.
    pub(crate) fn with(&self, axis: usize, size: u32) -> Self {
        let mut dims = self.0.clone();
        dims[axis] = Dim::Fixed(size);
        Self(dims)
    }

    /// The shape of an element-wise op on `self` and `other`, broadcast from the right.
    pub(crate) fn broadcast(&self, other: &Self) -> Option<Self> {
        let rank = self.rank().max(other.rank());
        let dim = |shape: &Self, axis: usize| {
            let missing = rank - shape.rank();
            if axis < missing { Dim::Fixed(1) } else { shape.0[axis - missing] }
        };
        (0..rank)
            .map(|axis| match (dim(self, axis), dim(other, axis)) {
                (a, b) if a == b => Some(a),
                (Dim::Fixed(1), b) => Some(b),
                (a, Dim::Fixed(1)) => Some(a),
                _ => None,
            })
            .collect::<Option<Vec<_>>>()
            .filter(|dims| dims.iter().skip(1).all(|d| matches!(d, Dim::Fixed(_))))
            .map(Self)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dim = |dim: &Dim| match dim {
            Dim::Fixed(size) => size.to_string(),
            Dim::Rows => "rows".into(),
            Dim::History => "history".into(),
        };
        write!(f, "[{}]", self.0.iter().map(dim).collect::<Vec<String>>().join(", "))
    }
}
