//! Ranges of values and dense features.
//!
//! A number far from all others needs no other fault to do harm: a value of 1e15 stops the rows
//! that it reaches, and a feature of 1e15 hides the differences between all others. The daemon
//! refuses or clips what is sent beyond a range, as the schema says. Where examples are made or
//! read, everything is clipped once more, because streams and logs may hold what another process
//! or an earlier release let pass.

use std::sync::Arc;

use hypercast_fm::example::{Example, Item, Outcome};
use serde::{Deserialize, Serialize};

use super::{Feature, FeatureKind, Schema, columns_of};

/// The range of a value or of a dense feature.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueRange {
    /// The name of the value or feature.
    pub name: String,
    /// The least number that counts as it is.
    pub low: f32,
    /// The greatest number that counts as it is.
    pub high: f32,
    /// The fate of a number beyond the range where it is sent.
    #[serde(default)]
    pub beyond: BeyondRange,
}

/// The fate of a number that is sent beyond its range.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BeyondRange {
    /// It becomes the nearest number in the range.
    #[default]
    Clip,
    /// The request or the event is refused.
    Refuse,
}

impl ValueRange {
    /// Whether a number is outside the range. NaN, which means "unknown" or "missing", is not.
    pub fn is_beyond(&self, number: f32) -> bool {
        number < self.low || number > self.high
    }

    /// The nearest number in the range; NaN stays.
    pub fn clip(&self, number: f32) -> f32 {
        number.clamp(self.low, self.high)
    }
}

/// The ranges of all columns of an example that a caller can set, in their order.
#[derive(Debug, Clone, Default)]
pub struct ColumnRanges {
    /// Of `Outcome::values`.
    values: Bounds,
    /// Of `Item::dense`.
    item: Bounds,
    /// Of `User::dense`.
    user: Bounds,
    /// Of the first of `Target::features`: the dense features of items, users and contexts.
    features: Bounds,
}

impl ColumnRanges {
    /// The ranges that a schema gives.
    pub fn new(schema: &Schema) -> ColumnRanges {
        let dense =
            |features: &[Feature]| Bounds::of(schema, &columns_of(features, FeatureKind::Dense));
        let features: Vec<String> = schema.features_of(FeatureKind::Dense).collect();
        ColumnRanges {
            values: Bounds::of(schema, &schema.values),
            item: dense(&schema.item_features),
            user: dense(&schema.user_features),
            features: Bounds::of(schema, &features),
        }
    }

    /// Clips all numbers of an example, whatever its schema says of numbers that are sent. Returns
    /// how many were beyond their ranges, those of shared items and users included.
    pub fn clip(&self, example: &mut Example) -> usize {
        let mut clipped = 0;
        if !self.user.hold(&example.user.dense) {
            clipped += self.user.clip(&mut Arc::make_mut(&mut example.user).dense);
        }
        for event in &mut example.history {
            clipped += self.clip_item(&mut event.item) + self.clip_outcome(&mut event.outcome);
        }
        for target in &mut example.targets {
            clipped += self.clip_item(&mut target.item) + self.clip_outcome(&mut target.outcome);
            clipped += self.features.clip(&mut target.features);
        }
        clipped
    }

    fn clip_item(&self, item: &mut Arc<Item>) -> usize {
        // Most items are shared with the state or other examples; what changes is copied.
        if self.item.hold(&item.dense) { 0 } else { self.item.clip(&mut Arc::make_mut(item).dense) }
    }

    fn clip_outcome(&self, outcome: &mut Outcome) -> usize {
        self.values.clip(&mut outcome.values)
    }
}

/// The ranges of some columns, up to the last one that has a range.
#[derive(Debug, Clone, Default)]
struct Bounds(Vec<Option<ValueRange>>);

impl Bounds {
    fn of(schema: &Schema, columns: &[impl AsRef<str>]) -> Bounds {
        let range = |name: &str| schema.ranges.iter().find(|range| range.name == name).cloned();
        let mut ranges: Vec<_> = columns.iter().map(|name| range(name.as_ref())).collect();
        ranges.truncate(ranges.iter().rposition(Option::is_some).map_or(0, |last| last + 1));
        Bounds(ranges)
    }

    /// Whether no number is beyond its range.
    fn hold(&self, numbers: &[f32]) -> bool {
        let mut ranges = self.0.iter().zip(numbers);
        ranges.all(|(range, &number)| range.as_ref().is_none_or(|range| !range.is_beyond(number)))
    }

    /// Clips numbers, of which there may be fewer than ranges, and counts those that change.
    fn clip(&self, numbers: &mut [f32]) -> usize {
        let mut clipped = 0;
        for (range, number) in self.0.iter().zip(numbers) {
            if let Some(range) = range
                && range.is_beyond(*number)
            {
                *number = range.clip(*number);
                clipped += 1;
            }
        }
        clipped
    }
}
