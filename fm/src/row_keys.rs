//! The keys of rows in the embedding store: which row a value of a token's field has.
//!
//! A store has rows by 64 bits and knows no fields, so a key has both: the field is mixed into the
//! top byte of the value by an exclusive or. Within a field no two values share a row. Of two
//! fields, values below 2^56 never do, and larger ones, which are hashes, only if all their bits
//! happen to fit: a chance of 2^-64 for each pair.

/// The format of models whose fields have numbers of their own (`FmManifest::field_numbers`). Their
/// keys have all bits.
pub(crate) const GROWN_FORMAT: u32 = 3;

/// How a model's store names its rows; the format of its checkpoint says which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKeys {
    /// Of checkpoints and training runs of format 1: values of more than 56 bits are folded into
    /// 56, beside the byte of the field. Two ids of a field may share a row.
    Folded,
    /// All 64 bits of a value.
    Whole,
}

impl RowKeys {
    /// The keys of a checkpoint or training run of this format.
    pub(crate) fn of_format(format: u32) -> RowKeys {
        if format < 2 { RowKeys::Folded } else { RowKeys::Whole }
    }

    /// The key of a field's value. Below 2^56 both kinds give the same.
    pub fn key(self, field: usize, value: u64) -> u64 {
        const LOW: u64 = (1 << 56) - 1;
        let namespace = (field as u64) << 56;
        match self {
            RowKeys::Whole => namespace ^ value,
            RowKeys::Folded => {
                namespace | ((value ^ (value >> 56).wrapping_mul(0x9E37_79B9_7F4A_7C15)) & LOW)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_keys_keep_all_bits_and_small_values_where_they_were() {
        let (whole, folded) = (RowKeys::Whole, RowKeys::Folded);
        // Both fold to 5.
        let pair = [5, 1 << 56 | (5 ^ (0x9E37_79B9_7F4A_7C15 & ((1 << 56) - 1)))];
        assert_eq!(folded.key(3, pair[0]), folded.key(3, pair[1]));
        assert_ne!(whole.key(3, pair[0]), whole.key(3, pair[1]));
        for field in [0, 1, 9] {
            for value in [0, 7, (1 << 56) - 1] {
                assert_eq!(whole.key(field, value), folded.key(field, value));
                assert_eq!(whole.key(field, value) >> 56, field as u64);
            }
            // The other way round is one exclusive or, so no two values have one key.
            assert_eq!(whole.key(field, whole.key(field, u64::MAX - 5)), u64::MAX - 5);
        }
        assert_eq!([1, 2].map(RowKeys::of_format), [folded, whole]);
    }
}
