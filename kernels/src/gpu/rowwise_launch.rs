//! Launches the kernels of [`super::rowwise`].

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::column_sums::{ROWS_A_PASS, add_up};
use super::rowwise::{
    AttentionGradientsLaunch, Gate, GateLaunch, ROW_UNITS, SiluGradientsLaunch, norm_weight_sums,
    normalise as normalise_rows, normalise_backward, silu as silu_rows,
    silu_backward as silu_backward_rows,
};
use super::tile::UNITS;
use super::words::{UploadedWords, option};
use crate::layer::{Affine, SeededDropout};

/// What the rows of a norm are multiplied by.
pub(super) struct RowGate<R: CubeRuntime> {
    values: CubeTensor<R>,
    dropout: Option<(SeededDropout, UploadedWords)>,
}

impl<R: CubeRuntime> RowGate<R> {
    /// A gate `[rows, at least the norm's width]`.
    pub(super) fn new(values: CubeTensor<R>, dropout: Option<SeededDropout>) -> Self {
        let keys = |dropout: SeededDropout| {
            (dropout, UploadedWords::new(&values, &dropout.keys(values.shape()[0])))
        };
        Self { dropout: dropout.map(keys), values }
    }

    fn arg<E: Float>(of: Option<&Self>) -> ComptimeOptionArgs<Gate<E>, R> {
        let Some(Self { values, dropout }) = of else { return ComptimeOptionArgs::None };
        let (dropped, kept) =
            dropout.as_ref().map_or((0, 1.0), |(dropout, _)| (dropout.dropped, dropout.scale));
        ComptimeOptionArgs::Some(GateLaunch::new(
            values.clone().into_tensor_arg(),
            option(dropout.as_ref().map(|(_, keys)| keys)),
            dropped,
            kept,
        ))
    }
}

/// A norm of rows, and its gate.
pub(super) struct RowNorm<R: CubeRuntime> {
    pub(super) weights: Affine<CubeTensor<R>>,
    pub(super) gate: Option<RowGate<R>>,
    pub(super) epsilon: f32,
}

/// The gradients of a norm of rows.
pub(super) struct RowNormGradients<R: CubeRuntime> {
    pub(super) x: CubeTensor<R>,
    /// If there is one.
    pub(super) gate: Option<CubeTensor<R>>,
    pub(super) weights: Affine<CubeTensor<R>>,
}

/// What the gradient of a norm's input is besides.
pub(super) struct RowNormOutput<'a, R: CubeRuntime> {
    /// The number of its rows, at least those of the input: zeros come before those.
    pub(super) rows: usize,
    /// Added to its last rows.
    pub(super) residual: Option<&'a CubeTensor<R>>,
}

impl<R: CubeRuntime> RowNorm<R> {
    /// The rows of `x` `[rows, width]` after the norm and the gate.
    pub(super) fn forward<E: Float + CubeElement>(&self, x: &CubeTensor<R>) -> CubeTensor<R> {
        let [rows, width] = x.shape().dims::<2>();
        let out = empty(x, rows, width, x.dtype);
        if rows == 0 {
            return out;
        }
        // SAFETY: units of a row beyond the last read the first one and write nothing; the weights
        // have the width of `x`, and the gate has its rows and at least its columns.
        unsafe {
            normalise_rows::launch_unchecked::<E, R>(
                &x.client,
                calculate_cube_count_elemwise(&x.client, rows * ROW_UNITS, units()),
                units(),
                x.required_address_type().max(out.required_address_type()),
                x.clone().into_tensor_arg(),
                self.weights.scale.clone().into_tensor_arg(),
                self.weights.shift.clone().into_tensor_arg(),
                RowGate::arg(self.gate.as_ref()),
                out.clone().into_tensor_arg(),
                self.epsilon,
            );
        }
        out
    }

    /// The gradients, given that of what [`RowNorm::forward`] gave, of at least one row.
    pub(super) fn backward<E: Float + CubeElement>(
        &self,
        x: &CubeTensor<R>,
        gradient: &CubeTensor<R>,
        RowNormOutput { rows: out_rows, residual }: RowNormOutput<'_, R>,
    ) -> RowNormGradients<R> {
        let [rows, width] = x.shape().dims::<2>();
        let dx = empty(x, out_rows, width, x.dtype);
        let dgate = self.gate.as_ref().map(|_| empty(x, rows, width, x.dtype));
        let stats = empty(x, rows, 2, DType::F32);
        let written = match &dgate {
            Some(dgate) => ComptimeOptionArgs::Some(dgate.clone().into_tensor_arg()),
            None => ComptimeOptionArgs::None,
        };
        let residual = match residual {
            Some(residual) => ComptimeOptionArgs::Some(residual.clone().into_tensor_arg()),
            None => ComptimeOptionArgs::None,
        };
        let address = [x, gradient, &dx].map(CubeTensor::required_address_type);
        let address = address.into_iter().max().unwrap_or_default();
        // SAFETY: as in `forward`; the gradient has the rows and columns of `x`, the residual those
        // of the last rows of `dx`.
        unsafe {
            normalise_backward::launch_unchecked::<E, R>(
                &x.client,
                calculate_cube_count_elemwise(&x.client, out_rows * ROW_UNITS, units()),
                units(),
                address,
                x.clone().into_tensor_arg(),
                self.weights.scale.clone().into_tensor_arg(),
                self.weights.shift.clone().into_tensor_arg(),
                RowGate::arg(self.gate.as_ref()),
                gradient.clone().into_tensor_arg(),
                residual,
                dx.clone().into_tensor_arg(),
                written,
                stats.clone().into_tensor_arg(),
                self.epsilon,
            );
        }
        let weights = self.weight_gradients::<E>(x, &stats, gradient);
        RowNormGradients { x: dx, gate: dgate, weights }
    }

    fn weight_gradients<E: Float + CubeElement>(
        &self,
        x: &CubeTensor<R>,
        stats: &CubeTensor<R>,
        gradient: &CubeTensor<R>,
    ) -> Affine<CubeTensor<R>> {
        let [rows, width] = x.shape().dims::<2>();
        let partials = empty(x, rows.div_ceil(ROWS_A_PASS), 2 * width, DType::F32);
        let count = rows.div_ceil(ROWS_A_PASS) * width;
        let address = x.required_address_type().max(gradient.required_address_type());
        // SAFETY: every unit has one column of one block of rows, or none.
        unsafe {
            norm_weight_sums::launch_unchecked::<E, R>(
                &x.client,
                calculate_cube_count_elemwise(&x.client, count, units()),
                units(),
                address,
                x.clone().into_tensor_arg(),
                stats.clone().into_tensor_arg(),
                RowGate::arg(self.gate.as_ref()),
                gradient.clone().into_tensor_arg(),
                partials.clone().into_tensor_arg(),
            );
        }
        let sum = |first_column| {
            let out = vector(x, width);
            add_up::<R, f32, E>(&partials, first_column, &out);
            out
        };
        Affine { scale: sum(0), shift: sum(width) }
    }
}

/// SiLU of `own` plus `bias`, under the rows of `past`, which has the last columns alone.
pub(super) fn silu<R: CubeRuntime, E: Float + CubeElement>(
    own: &CubeTensor<R>,
    past: Option<&CubeTensor<R>>,
    bias: &CubeTensor<R>,
) -> CubeTensor<R> {
    let [rows, columns] = own.shape().dims::<2>();
    let rows = rows + past.map_or(0, |past| past.shape()[0]);
    let out = empty(own, rows, columns, own.dtype);
    if rows == 0 {
        return out;
    }
    let past = match past {
        Some(past) => ComptimeOptionArgs::Some(past.clone().into_tensor_arg()),
        None => ComptimeOptionArgs::None,
    };
    // SAFETY: every unit has one value of `out` or none, and reads the value in its place.
    unsafe {
        silu_rows::launch_unchecked::<E, R>(
            &own.client,
            calculate_cube_count_elemwise(&own.client, rows * columns, units()),
            units(),
            out.required_address_type(),
            own.clone().into_tensor_arg(),
            past,
            bias.clone().into_tensor_arg(),
            out.clone().into_tensor_arg(),
        );
    }
    out
}

/// The gradient of SiLU's output.
pub(super) struct SiluOutputGradients<'a, R: CubeRuntime> {
    /// Of the first columns, or of all.
    pub(super) u: &'a CubeTensor<R>,
    /// Of the other columns, as attention gives them.
    pub(super) qvk: Option<[&'a CubeTensor<R>; 3]>,
}

/// Some rows and columns of what SiLU was applied to.
pub(super) struct SiluBlock<'a, R: CubeRuntime> {
    /// Without the bias.
    pub(super) x: &'a CubeTensor<R>,
    /// How many rows of attention's gradients come before its own.
    pub(super) first_row: usize,
    /// Its first column, among those of the bias and of the gradients.
    pub(super) first_column: usize,
}

/// The gradient of a block, given those of SiLU's output.
pub(super) fn silu_backward<R: CubeRuntime, E: Float + CubeElement>(
    SiluBlock { x, first_row, first_column }: SiluBlock<'_, R>,
    bias: &CubeTensor<R>,
    SiluOutputGradients { u, qvk }: &SiluOutputGradients<'_, R>,
) -> CubeTensor<R> {
    let [rows, columns] = x.shape().dims::<2>();
    let out = empty(x, rows, columns, x.dtype);
    let qvk = match qvk {
        Some([q, v, k]) => ComptimeOptionArgs::Some(AttentionGradientsLaunch::new(
            (*q).clone().into_tensor_arg(),
            (*v).clone().into_tensor_arg(),
            (*k).clone().into_tensor_arg(),
        )),
        None => ComptimeOptionArgs::None,
    };
    // SAFETY: every unit has one value of `out` or none; the gradients have its rows, those of
    // attention `first_row` more, and all columns of the bias.
    unsafe {
        silu_backward_rows::launch_unchecked::<E, R>(
            &x.client,
            calculate_cube_count_elemwise(&x.client, rows * columns, units()),
            units(),
            x.required_address_type().max(out.required_address_type()),
            x.clone().into_tensor_arg(),
            bias.clone().into_tensor_arg(),
            SiluGradientsLaunch::new((*u).clone().into_tensor_arg(), qvk),
            out.clone().into_tensor_arg(),
            first_row as u32,
            first_column as u32,
        );
    }
    out
}

/// The sum of each column of `values`.
pub(super) fn column_sums<R: CubeRuntime, E: Float + CubeElement>(
    values: &CubeTensor<R>,
) -> CubeTensor<R> {
    let out = vector(values, values.shape()[1]);
    add_up::<R, E, E>(values, 0, &out);
    out
}

fn units() -> CubeDim {
    CubeDim::new_1d(UNITS)
}

/// A new matrix on the device of another.
fn empty<R: CubeRuntime>(
    beside: &CubeTensor<R>,
    rows: usize,
    columns: usize,
    dtype: DType,
) -> CubeTensor<R> {
    let (client, device) = (beside.client.clone(), beside.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::new([rows, columns]), dtype)
}

fn vector<R: CubeRuntime>(beside: &CubeTensor<R>, width: usize) -> CubeTensor<R> {
    let (client, device) = (beside.client.clone(), beside.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::new([width]), beside.dtype)
}
