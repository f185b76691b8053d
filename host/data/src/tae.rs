//! Target-aware embeddings (TAEs) on the wire: f32, bf16, or int8 with a scale per row, as an
//! embedding store keeps its rows.
//!
//! Everything else uses f32; this module converts.

pub use hypercast_store::RowFormat as TaeFormat;

use crate::error::{CommonErrors as _, Error, Result};

/// Appends `values`, of shape `[rows, dim]`, to `out`.
///
/// # Panics
/// `values` are not whole rows.
pub fn encode(format: TaeFormat, values: &[f32], dim: usize, out: &mut Vec<u8>) {
    assert!(
        dim > 0 && values.len().is_multiple_of(dim),
        "{} values are not whole rows of {dim}",
        values.len()
    );
    let (start, row_bytes) = (out.len(), format.row_bytes(dim));
    out.resize(start + values.len() / dim * row_bytes, 0);
    for (row, bytes) in values.chunks_exact(dim).zip(out[start..].chunks_exact_mut(row_bytes)) {
        format.encode(row, bytes);
    }
}

/// Decodes what [`encode`] wrote, to shape `[rows, dim]`.
///
/// # Errors
/// `bytes` are not whole rows.
pub fn decode(format: TaeFormat, bytes: &[u8], dim: usize) -> Result<Vec<f32>> {
    let row_bytes = format.row_bytes(dim);
    if dim == 0 || !bytes.len().is_multiple_of(row_bytes) {
        return Err(Error::invalid(format!(
            "{} bytes are not whole TAEs of {dim} values in {format:?}",
            bytes.len()
        )));
    }
    let mut values = vec![0.0; bytes.len() / row_bytes * dim];
    for (row, bytes) in values.chunks_exact_mut(dim).zip(bytes.chunks_exact(row_bytes)) {
        format.decode(bytes, row);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_comes_back_within_its_precision() {
        let values: Vec<f32> =
            (0..48).map(|at| ((at * 37 % 19) as f32 - 9.0) * 0.37f32.powi(at / 16)).collect();
        for (format, precision) in
            [(TaeFormat::F32, 0.0), (TaeFormat::Bf16, 1.0 / 256.0), (TaeFormat::Int8, 0.5 / 127.0)]
        {
            let mut bytes = Vec::new();
            encode(format, &values, 16, &mut bytes);
            assert_eq!(bytes.len(), 3 * format.row_bytes(16));
            let back = decode(format, &bytes, 16).unwrap();
            for (row, back) in values.chunks(16).zip(back.chunks(16)) {
                let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                for (x, back) in row.iter().zip(back) {
                    let size = if format == TaeFormat::Int8 { largest } else { x.abs() };
                    assert!(
                        (x - back).abs() <= size * precision * 1.001,
                        "{format:?}: {x}, {back}"
                    );
                }
            }
            assert!(decode(format, &bytes[1..], 16).is_err());
        }
    }

    #[test]
    fn a_row_of_zeros_and_what_is_not_a_number_survive() {
        for format in [TaeFormat::F32, TaeFormat::Bf16, TaeFormat::Int8] {
            let mut bytes = Vec::new();
            encode(format, &[0.0; 4], 4, &mut bytes);
            assert_eq!(decode(format, &bytes, 4).unwrap(), [0.0; 4]);
        }
        let mut bytes = Vec::new();
        encode(TaeFormat::Bf16, &[f32::NAN, f32::INFINITY], 2, &mut bytes);
        let back = decode(TaeFormat::Bf16, &bytes, 2).unwrap();
        assert!(back[0].is_nan() && back[1] == f32::INFINITY);
    }
}
