//! Row formats: how a row's values lie in a slab. Training keeps f32; a serving snapshot may be
//! bf16 (half the bytes) or int8 with a scale a row (a quarter). Readers always get f32. It does
//! not decide which format a store has.

use serde::{Deserialize, Serialize};

use crate::gather::copy_floats;

/// How a row's values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowFormat {
    /// As they are.
    #[default]
    F32,
    /// Rounded to the nearest of the upper 16 bits of an f32: a relative error of at most 2⁻⁸.
    Bf16,
    /// A signed byte a value and an f32 scale a row: an absolute error of about 1/254 of the row's
    /// largest value.
    Int8,
}

const SCALE: usize = 4;
const LARGEST: f32 = 127.0;

impl RowFormat {
    /// Bytes of a row of `dim` values.
    pub fn row_bytes(self, dim: usize) -> usize {
        match self {
            RowFormat::F32 => dim * 4,
            RowFormat::Bf16 => dim * 2,
            RowFormat::Int8 => SCALE + dim,
        }
    }

    /// Writes finite `values` into `bytes`, [`RowFormat::row_bytes`] long.
    pub fn encode(self, values: &[f32], bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.row_bytes(values.len()));
        match self {
            RowFormat::F32 => {
                for (slot, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *slot = value.to_le_bytes();
                }
            }
            RowFormat::Bf16 => {
                for (slot, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *slot = to_bf16(*value).to_le_bytes();
                }
            }
            RowFormat::Int8 => {
                let scale = scale_of(values);
                let (head, rest) = bytes.split_at_mut(SCALE);
                head.copy_from_slice(&scale.to_le_bytes());
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                for (slot, value) in rest.iter_mut().zip(values) {
                    *slot = (value * inverse).round().clamp(-LARGEST, LARGEST) as i8 as u8;
                }
            }
        }
    }

    /// Converts a stored row to f32.
    #[inline]
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            RowFormat::F32 => copy_floats(bytes, out),
            RowFormat::Bf16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            RowFormat::Int8 => {
                let (head, rest) = bytes.split_at(SCALE);
                let scale = f32::from_le_bytes(*head.first_chunk().expect("a row has a scale"));
                for (out, byte) in out.iter_mut().zip(rest) {
                    *out = f32::from(*byte as i8) * scale;
                }
            }
        }
    }

    /// What `values` become by being kept; doing it again changes nothing.
    pub fn round(self, values: &mut [f32]) {
        if self == RowFormat::F32 {
            return;
        }
        let mut bytes = vec![0; self.row_bytes(values.len())];
        self.encode(values, &mut bytes);
        self.decode(&bytes, values);
    }
}

/// Rounds to nearest, ties to even; a value that would become infinite stays the largest finite
/// one.
fn to_bf16(value: f32) -> u16 {
    if value.is_nan() {
        return 0x7fc0;
    }
    let bits = value.to_bits();
    if value.is_infinite() {
        return (bits >> 16) as u16;
    }
    let rounded = ((bits + (0x7fff + (bits >> 16 & 1))) >> 16) as u16;
    if rounded & 0x7fff == 0x7f80 { rounded - 1 } else { rounded }
}

/// The largest magnitude over 127, rounded up to 16 significant bits: then all multiples up to 127
/// are exact in f32, and a row that was widened and is kept again gives the same bytes.
fn scale_of(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let scale = largest / LARGEST;
    if scale < f32::MIN_POSITIVE * 256.0 {
        return 0.0;
    }
    let rounded = f32::from_bits((scale.to_bits() + 0xff) & !0xff);
    if (rounded * LARGEST).is_finite() {
        rounded
    } else {
        f32::from_bits(rounded.to_bits() - 0x100)
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn rows_come_back_within_their_error_and_then_stay() {
        let mut rng = StdRng::seed_from_u64(1);
        for round in 0..2000 {
            let size = 10f32.powi(round % 30 - 15);
            let values: Vec<f32> = (0..37).map(|_| rng.random_range(-size..size)).collect();
            let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for format in [RowFormat::F32, RowFormat::Bf16, RowFormat::Int8] {
                let mut kept = values.clone();
                format.round(&mut kept);
                for (value, kept) in values.iter().zip(&kept) {
                    let most = match format {
                        RowFormat::F32 => 0.0,
                        RowFormat::Bf16 => value.abs() / 256.0,
                        RowFormat::Int8 => largest / 253.0,
                    };
                    assert!((value - kept).abs() <= most, "{format:?}: {value} became {kept}");
                }
                let mut again = kept.clone();
                format.round(&mut again);
                assert_eq!(kept, again, "{format:?}");
            }
        }
    }

    #[test]
    fn extremes_stay_finite() {
        for format in [RowFormat::Bf16, RowFormat::Int8] {
            let mut values = [f32::MAX, f32::MIN, 0.0, -0.0, f32::MIN_POSITIVE, 1e-45];
            format.round(&mut values);
            assert!(values.iter().all(|v| v.is_finite()), "{format:?}: {values:?}");
            let mut zeros = [0.0; 3];
            format.round(&mut zeros);
            assert_eq!(zeros, [0.0; 3]);
        }
    }
}
