//! The op in plain f64 loops, against which every other implementation is tested.
//!
//! It follows the formula in [`crate::attention`] and is not optimised.

use crate::attention::{HstuAttention, HstuInputs, time_bucket};

/// The op on row-major slices shaped as [`HstuInputs`] says: `[H + R, heads * v_dim]`.
///
/// # Panics
/// If the layout and the slices' lengths contradict each other.
pub fn forward(shape: &HstuAttention, inputs: &HstuInputs<&[f64]>) -> Vec<f64> {
    let (rows, heads) = (shape.rows(), shape.heads);
    let columns = |x: &[f64]| x.len().checked_div(rows).unwrap_or(heads);
    let (qk_shape, v_shape) = ([rows, columns(inputs.q)], [rows, columns(inputs.v)]);
    let tables = (inputs.position.map(|p| [p.len()]), inputs.time.map(|t| [t.len()]));
    let dims = shape
        .check(&HstuInputs {
            q: &qk_shape,
            k: &qk_shape,
            v: &v_shape,
            position: tables.0.as_ref().map(|shape| &shape[..]),
            time: tables.1.as_ref().map(|shape| &shape[..]),
        })
        .unwrap_or_else(|error| panic!("{error}"));
    let position_bias =
        |distance: usize| inputs.position.map_or(0.0, |table| table[distance.min(table.len() - 1)]);
    let time_bias = |row: usize, key: usize| match (inputs.time, &shape.times_s) {
        (Some(table), Some(times)) => {
            table[time_bucket(times[row].abs_diff(times[key]), table.len())]
        }
        _ => 0.0,
    };
    let mut out = vec![0.0; rows * heads * dims.v];
    for request in (0..shape.requests()).map(|b| shape.request(b)) {
        let n = request.history.len();
        for row in request.history.clone().chain(request.targets.clone()) {
            let is_target = request.targets.contains(&row);
            let position = if is_target { n } else { row - request.history.start };
            if shape.targets_only && !is_target {
                continue;
            }
            let seen = (0..n)
                .filter(|&key| key <= position && shape.sees(position, key))
                .map(|key| (request.history.start + key, position - key));
            let itself = is_target.then_some((row, 0));
            for (key, distance) in seen.chain(itself) {
                let bias = position_bias(distance) + time_bias(row, key);
                for head in 0..heads {
                    let at = |row, dim| (row * heads + head) * dim..(row * heads + head + 1) * dim;
                    let (q, k) = (&inputs.q[at(row, dims.qk)], &inputs.k[at(key, dims.qk)]);
                    let v = &inputs.v[at(key, dims.v)];
                    let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                    let score = f64::from(shape.alpha) * dot + bias;
                    let weight = score / (1.0 + (-score).exp()) / f64::from(shape.norm);
                    for (cell, v) in out[at(row, dims.v)].iter_mut().zip(v) {
                        *cell += weight * v;
                    }
                }
            }
        }
    }
    out
}
