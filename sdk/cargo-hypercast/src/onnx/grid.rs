//! Arrays that are known when a model is read: weights, shapes and indices, and the ids that each
//! place of an input stands for.

use anyhow::{Result, ensure};

/// An array of any number of dimensions, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid<T> {
    /// The size of each dimension; none for a single value.
    pub sizes: Vec<usize>,
    /// As many as the product of the sizes.
    pub values: Vec<T>,
}

impl<T: Clone> Grid<T> {
    /// # Errors
    /// The values are not as many as the sizes say.
    pub fn new(sizes: Vec<usize>, values: Vec<T>) -> Result<Self> {
        let count = elements(&sizes);
        ensure!(
            count == Some(values.len()),
            "a tensor of shape {sizes:?} has {} values",
            values.len()
        );
        Ok(Self { sizes, values })
    }

    /// An array of one dimension.
    pub fn vector(values: Vec<T>) -> Self {
        Self { sizes: vec![values.len()], values }
    }

    /// The same values in another shape.
    pub fn reshaped(&self, sizes: Vec<usize>) -> Result<Self> {
        Self::new(sizes, self.values.clone())
    }

    /// The array whose dimension `i` is the dimension `perm[i]` of this one.
    pub fn transposed(&self, perm: &[usize]) -> Self {
        let sizes: Vec<usize> = perm.iter().map(|&axis| self.sizes[axis]).collect();
        let strides = strides(&self.sizes);
        let strides: Vec<usize> = perm.iter().map(|&axis| strides[axis]).collect();
        let at =
            |place: &[usize]| -> usize { place.iter().zip(&strides).map(|(p, s)| p * s).sum() };
        let values = places(&sizes).map(|place| self.values[at(&place)].clone()).collect();
        Self { sizes, values }
    }

    /// The entries `indices` of one dimension, in that order.
    pub fn taken(&self, axis: usize, indices: &[usize]) -> Self {
        let inner: usize = self.sizes[axis + 1..].iter().product();
        let block = self.sizes[axis] * inner;
        let blocks = self.values.chunks(block.max(1));
        let of = |block: &[T]| -> Vec<T> {
            indices.iter().flat_map(|&at| block[at * inner..][..inner].to_vec()).collect()
        };
        let mut sizes = self.sizes.clone();
        sizes[axis] = indices.len();
        Self { values: blocks.flat_map(of).collect(), sizes }
    }

    /// Arrays of one shape, but for the dimension along which they are put together.
    pub fn concatenated(parts: &[Self], axis: usize) -> Result<Self> {
        let mut sizes = parts[0].sizes.clone();
        let is_like = |part: &Self| {
            let mut pairs = part.sizes.iter().zip(&sizes).enumerate();
            part.sizes.len() == sizes.len()
                && pairs.all(|(at, (own, size))| at == axis || own == size)
        };
        ensure!(parts.iter().all(is_like), "it puts together arrays of different shapes");
        sizes[axis] = parts.iter().map(|part| part.sizes[axis]).sum();
        let block = |part: &Self| part.sizes[axis..].iter().product::<usize>();
        let outer: usize = sizes[..axis].iter().product();
        let values = (0..outer).flat_map(|at| {
            let of = move |part: &Self| part.values[at * block(part)..][..block(part)].to_vec();
            parts.iter().flat_map(of).collect::<Vec<T>>()
        });
        Self::new(sizes, values.collect())
    }

    /// `apply` of each pair of values, broadcast from the right as in ONNX.
    pub fn zipped<U: Clone, V: Clone>(
        &self,
        other: &Grid<U>,
        apply: impl Fn(&T, &U) -> Result<V>,
    ) -> Result<Grid<V>> {
        let sizes = broadcast(&self.sizes, &other.sizes)?;
        let value = |place: Vec<usize>| {
            let own = &self.values[offset(&self.sizes, &place)];
            apply(own, &other.values[offset(&other.sizes, &place)])
        };
        let values = places(&sizes).map(value).collect::<Result<_>>()?;
        Ok(Grid { sizes, values })
    }

    /// `apply` of each value.
    pub fn mapped<V>(&self, apply: impl FnMut(&T) -> V) -> Grid<V> {
        Grid { sizes: self.sizes.clone(), values: self.values.iter().map(apply).collect() }
    }
}

/// The number of values of a shape, unless it overflows.
pub fn elements(sizes: &[usize]) -> Option<usize> {
    sizes.iter().try_fold(1usize, |product, size| product.checked_mul(*size))
}

/// The shape of two shapes, broadcast from the right.
///
/// # Errors
/// Two sizes differ, and neither is 1.
pub fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let size = |sizes: &[usize], axis: usize| {
        (axis + sizes.len()).checked_sub(rank).map_or(1, |own| sizes[own])
    };
    let mut sizes = Vec::with_capacity(rank);
    for axis in 0..rank {
        let (a_size, b_size) = (size(a, axis), size(b, axis));
        let fits = a_size == b_size || a_size == 1 || b_size == 1;
        ensure!(fits, "the shapes {a:?} and {b:?} do not broadcast");
        sizes.push(if a_size == 1 { b_size } else { a_size });
    }
    Ok(sizes)
}

fn strides(sizes: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; sizes.len()];
    for axis in (1..sizes.len()).rev() {
        strides[axis - 1] = strides[axis] * sizes[axis];
    }
    strides
}

/// Where the value for `place` of a shape that `sizes` was broadcast to is.
fn offset(sizes: &[usize], place: &[usize]) -> usize {
    let own = &place[place.len() - sizes.len()..];
    let of =
        |((&size, at), stride): ((&usize, &usize), usize)| if size == 1 { 0 } else { at * stride };
    sizes.iter().zip(own).zip(strides(sizes)).map(of).sum()
}

/// All places of a shape, row-major.
fn places(sizes: &[usize]) -> impl Iterator<Item = Vec<usize>> {
    let strides = strides(sizes);
    let sizes = sizes.to_vec();
    let count: usize = sizes.iter().product();
    (0..count).map(move |at| sizes.iter().zip(&strides).map(|(size, s)| at / s % size).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_move_as_in_the_arrays_of_python() {
        let grid = Grid::new(vec![2, 3], vec![0, 1, 2, 3, 4, 5]).unwrap();
        assert_eq!(grid.transposed(&[1, 0]).values, [0, 3, 1, 4, 2, 5]);
        assert_eq!(grid.taken(1, &[2, 0]).values, [2, 0, 5, 3]);
        assert_eq!(grid.taken(0, &[1]).values, [3, 4, 5]);
        let twice = Grid::concatenated(&[grid.clone(), grid.taken(1, &[1])], 1).unwrap();
        assert_eq!((twice.sizes, twice.values), (vec![2, 4], vec![0, 1, 2, 1, 3, 4, 5, 4]));
        let column = Grid::new(vec![2, 1], vec![10, 20]).unwrap();
        let sum = grid.zipped(&column, |a, b| Ok(a + b)).unwrap();
        assert_eq!(sum.values, [10, 11, 12, 23, 24, 25]);
        assert!(grid.zipped(&Grid::vector(vec![1, 2]), |a, b| Ok(a + b)).is_err());
        assert!(grid.reshaped(vec![4]).is_err());
    }
}
