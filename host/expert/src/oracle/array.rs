//! Dense values, and the operators that only move them.

use crate::graph::{Node, Op};

/// A dense value, row-major.
#[derive(Clone, Debug, Default)]
pub(super) struct Array<T> {
    pub(super) dims: Vec<usize>,
    pub(super) data: Vec<T>,
}

impl<T: Copy> Array<T> {
    pub(super) fn fill(dims: Vec<usize>, f: impl FnMut(&[usize]) -> T) -> Array<T> {
        let data = indices(&dims).iter().map(|index| index.as_slice()).map(f).collect();
        Array { dims, data }
    }

    /// The value at `index`, aligned from the right, with size 1 broadcast.
    pub(super) fn at(&self, index: &[usize]) -> T {
        let index = &index[index.len() - self.dims.len()..];
        let flat = index
            .iter()
            .zip(&self.dims)
            .fold(0, |flat, (i, dim)| flat * dim + if *dim == 1 { 0 } else { *i });
        self.data[flat]
    }

    /// A row of a matrix.
    pub(super) fn row(&self, row: usize) -> &[T] {
        let width = self.dims[1];
        &self.data[row * width..][..width]
    }

    /// The values along `axis`, of every other index in order, each with their places in the data.
    pub(super) fn along(&self, axis: usize) -> Vec<Vec<usize>> {
        let inner: usize = self.dims[axis + 1..].iter().product();
        let size = self.dims[axis];
        let from = |at: usize| at / inner * inner * size + at % inner;
        let fibre = |at: usize| (0..size).map(|step| from(at) + step * inner).collect();
        (0..self.data.len() / size).map(fibre).collect()
    }
}

/// The result of an operator that only moves values; none for another one.
pub(super) fn moved<T: Copy>(
    node: &Node,
    dims: &[usize],
    inputs: &[&Array<T>],
) -> Option<Array<T>> {
    let x = inputs.first()?;
    let dims = dims.to_vec();
    Some(match &node.op {
        Op::Concat { axis } => Array::fill(dims, |i| {
            let mut position = i[*axis];
            let mut part = 0;
            while position >= inputs[part].dims[*axis] {
                position -= inputs[part].dims[*axis];
                part += 1;
            }
            inputs[part].at(&with(i, *axis, position))
        }),
        Op::Slice { axis, start, .. } => {
            Array::fill(dims, |i| x.at(&with(i, *axis, i[*axis] + start)))
        }
        Op::Reshape { .. } => Array { dims, data: x.data.clone() },
        Op::Transpose { perm } => Array::fill(dims, |i| {
            let mut source = vec![0; i.len()];
            perm.iter().zip(i).for_each(|(axis, at)| source[*axis] = *at);
            x.at(&source)
        }),
        _ => return None,
    })
}

/// The index with another value at `axis`.
pub(super) fn with(index: &[usize], axis: usize, value: usize) -> Vec<usize> {
    let mut index = index.to_vec();
    index[axis] = value;
    index
}

fn indices(dims: &[usize]) -> Vec<Vec<usize>> {
    dims.iter().fold(vec![vec![]], |prefixes, dim| {
        let extend = |prefix: &Vec<usize>| {
            (0..*dim).map(|i| [prefix.as_slice(), &[i]].concat()).collect::<Vec<_>>()
        };
        prefixes.iter().flat_map(extend).collect()
    })
}
