//! Impressions as the sorts keep them: numbers at fixed places, without what their keys say.
//!
//! All impressions of a schema take the same number of bytes, so that a row can be copied and
//! compared without decoding it.

use hypercast_data::dataset::Impression;
use hypercast_data::schema::{FeatureKind, MISSING, Schema, columns_of};
use hypercast_fm::example::Outcome;

/// Which numbers a row has: all but its time and its request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowLayout {
    /// The bytes of a mask of actions.
    mask: usize,
    values: usize,
    ids: usize,
    dense: usize,
}

/// Where a row has its item.
const ITEM: std::ops::Range<usize> = 8..16;

/// The bytes before those of masks, values and features.
const FIXED_BYTES: usize = 27;

impl RowLayout {
    pub(crate) fn new(schema: &Schema) -> RowLayout {
        let count = |kind| columns_of(&schema.context_features, kind).len();
        let (ids, dense) = (count(FeatureKind::Categorical), count(FeatureKind::Dense));
        let mask = schema.actions.len().div_ceil(8);
        RowLayout { mask, values: schema.values.len(), ids, dense }
    }

    /// The length of a row.
    pub(crate) fn bytes(&self) -> usize {
        FIXED_BYTES + 2 * self.mask + 4 * self.values + 8 * self.ids + 4 * self.dense
    }

    /// Replaces `bytes` by the row. Context features that it lacks are missing.
    pub(crate) fn pack(&self, row: &Impression, bytes: &mut Vec<u8>) {
        bytes.clear();
        bytes.extend(row.user.to_le_bytes());
        bytes.extend(row.item.to_le_bytes());
        bytes.extend(row.outcome_ms.to_le_bytes());
        bytes.extend(row.surface.to_le_bytes());
        bytes.push(row.history_only.into());
        for mask in [row.outcome.actions, row.outcome.known] {
            bytes.extend(&mask.to_le_bytes()[..self.mask]);
        }
        for value in &row.outcome.values[..self.values] {
            bytes.extend(value.to_le_bytes());
        }
        for at in 0..self.ids {
            bytes.extend(row.context.ids.get(at).unwrap_or(&0).to_le_bytes());
        }
        for at in 0..self.dense {
            bytes.extend(row.context.dense.get(at).unwrap_or(&MISSING).to_le_bytes());
        }
    }

    /// Replaces all of `row` but its time and its request.
    pub(crate) fn unpack(&self, bytes: &[u8], row: &mut Impression) {
        let mut numbers = Numbers { bytes };
        row.user = u64::from_le_bytes(numbers.take());
        row.item = u64::from_le_bytes(numbers.take());
        row.outcome_ms = i64::from_le_bytes(numbers.take());
        row.surface = u16::from_le_bytes(numbers.take());
        row.history_only = numbers.take() == [1];
        let [actions, known] = [(); 2].map(|()| numbers.mask(self.mask));
        row.outcome = Outcome { actions, known, ..Outcome::UNKNOWN };
        for value in &mut row.outcome.values[..self.values] {
            *value = f32::from_le_bytes(numbers.take());
        }
        row.context.ids.clear();
        row.context.ids.extend((0..self.ids).map(|_| u64::from_le_bytes(numbers.take())));
        row.context.dense.clear();
        row.context.dense.extend((0..self.dense).map(|_| f32::from_le_bytes(numbers.take())));
    }
}

/// The bytes of a packed row's item.
pub(crate) fn item_bytes(row: &[u8]) -> &[u8] {
    &row[ITEM]
}

/// A row's numbers, one after the other.
struct Numbers<'a> {
    bytes: &'a [u8],
}

impl Numbers<'_> {
    fn take<const BYTES: usize>(&mut self) -> [u8; BYTES] {
        let (number, rest) = self.bytes.split_first_chunk().expect("as long as the layout");
        self.bytes = rest;
        *number
    }

    /// A mask of so many bytes.
    fn mask(&mut self, bytes: usize) -> u64 {
        let (mask, rest) = self.bytes.split_at(bytes);
        self.bytes = rest;
        mask.iter().rev().fold(0, |mask, &byte| mask << 8 | u64::from(byte))
    }
}
