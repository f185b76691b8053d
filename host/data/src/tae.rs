//! Target-aware embeddings (TAEs) on the wire and in logs: f32, bf16, or int8 with a scale per row.
//!
//! Everything else uses f32; this module converts.

use serde::{Deserialize, Serialize};

use crate::error::{CommonErrors as _, Error, Result};

/// The precision of a TAE's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaeFormat {
    /// 4 bytes per value, exact.
    #[default]
    F32,
    /// 2 bytes per value: the upper half of an f32, rounded to nearest.
    Bf16,
    /// 1 byte per value and 4 bytes per row for a scale that maps the row's largest magnitude to
    /// 127.
    Int8,
}

impl TaeFormat {
    /// The size of a row of `dim` values, in bytes.
    pub fn row_bytes(self, dim: usize) -> usize {
        match self {
            TaeFormat::F32 => 4 * dim,
            TaeFormat::Bf16 => 2 * dim,
            TaeFormat::Int8 => dim + 4,
        }
    }

    /// Appends `values`, of shape `[rows, dim]`, to `out`.
    ///
    /// # Panics
    /// `values` are not whole rows.
    pub fn encode(self, values: &[f32], dim: usize, out: &mut Vec<u8>) {
        assert!(
            dim > 0 && values.len().is_multiple_of(dim),
            "{} values are not whole rows of {dim}",
            values.len()
        );
        out.reserve(values.len() / dim * self.row_bytes(dim));
        for row in values.chunks_exact(dim) {
            match self {
                TaeFormat::F32 => row.iter().for_each(|x| out.extend(x.to_le_bytes())),
                TaeFormat::Bf16 => row.iter().for_each(|x| out.extend(bf16(*x).to_le_bytes())),
                TaeFormat::Int8 => {
                    let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                    let scale = largest / 127.0;
                    out.extend(scale.to_le_bytes());
                    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    out.extend(row.iter().map(|x| (x * factor).round() as i8 as u8));
                }
            }
        }
    }

    /// Decodes what [`Self::encode`] wrote, to shape `[rows, dim]`.
    ///
    /// # Errors
    /// `bytes` are not whole rows.
    pub fn decode(self, bytes: &[u8], dim: usize) -> Result<Vec<f32>> {
        let row_bytes = self.row_bytes(dim);
        if dim == 0 || !bytes.len().is_multiple_of(row_bytes) {
            return Err(Error::invalid(format!(
                "{} bytes are not whole TAEs of {dim} values in {self:?}",
                bytes.len()
            )));
        }
        let mut values = Vec::with_capacity(bytes.len() / row_bytes * dim);
        let float = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let bf16 = |bytes: &[u8]| f32::from_le_bytes([0, 0, bytes[0], bytes[1]]);
        for row in bytes.chunks_exact(row_bytes) {
            match self {
                TaeFormat::F32 => values.extend(row.chunks_exact(4).map(float)),
                TaeFormat::Bf16 => values.extend(row.chunks_exact(2).map(bf16)),
                TaeFormat::Int8 => {
                    let scale = float(row);
                    values.extend(row[4..].iter().map(|x| f32::from(*x as i8) * scale));
                }
            }
        }
        Ok(values)
    }
}

/// The nearest number that bf16 can represent.
pub fn to_bf16(x: f32) -> f32 {
    f32::from_bits(u32::from(bf16(x)) << 16)
}

/// The nearest bf16, ties to even; NaN stays NaN.
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    let round = 0x7FFF + (bits >> 16 & 1);
    (bits.wrapping_add(round) >> 16) as u16
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
            format.encode(&values, 16, &mut bytes);
            assert_eq!(bytes.len(), 3 * format.row_bytes(16));
            let back = format.decode(&bytes, 16).unwrap();
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
            assert!(format.decode(&bytes[1..], 16).is_err());
        }
    }

    #[test]
    fn a_row_of_zeros_and_what_is_not_a_number_survive() {
        for format in [TaeFormat::F32, TaeFormat::Bf16, TaeFormat::Int8] {
            let mut bytes = Vec::new();
            format.encode(&[0.0; 4], 4, &mut bytes);
            assert_eq!(format.decode(&bytes, 4).unwrap(), [0.0; 4]);
        }
        let mut bytes = Vec::new();
        TaeFormat::Bf16.encode(&[f32::NAN, f32::INFINITY], 2, &mut bytes);
        let back = TaeFormat::Bf16.decode(&bytes, 2).unwrap();
        assert!(back[0].is_nan() && back[1] == f32::INFINITY);
    }
}
