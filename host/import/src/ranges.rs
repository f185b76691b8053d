//! Ranges of values and dense features, inferred from imported data.
//!
//! A range holds 0 and the other numbers but for the outermost thousandth on each side, with half
//! as much room again. So a few wild numbers in the data do not widen it, a column that is never
//! negative does not become so, and what is new but alike passes. The outermost thousandth is that
//! of the numbers other than 0: a column that is rarely anything else keeps what it then is. A 0
//! counts as a number of a feature, which is NaN where it is missing; of a value it mostly says
//! that nothing happened.

use std::fmt;

use serde::{Deserialize, Serialize};

use hypercast_core::hash::splitmix64;
use hypercast_data::dataset::Impression;
use hypercast_data::schema::{FeatureKind, Schema, ValueRange, columns_of};
use hypercast_fm::example::{Item, User};

/// Fewer numbers than this say nothing about further ones.
const FEWEST_NUMBERS: usize = 100;

/// The share of numbers on each side that does not count.
const OUTER_SHARE: f64 = 1e-3;

/// The most numbers of a column that are looked at together; a thousandth of them is enough to say
/// where the outermost thousandth of all begins.
const SAMPLE: usize = 1 << 18;

/// The bound of a range, relative to the outermost number that counts.
const ROOM: f64 = 1.5;

/// A range with what the data says of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InferredRange {
    /// The range as it stands in the schema.
    pub range: ValueRange,
    /// The least number of the data.
    pub least: f32,
    /// The greatest number of the data.
    pub greatest: f32,
    /// Numbers of the data beyond the range, which are clipped when examples are made; an estimate
    /// from a sample of 262,144 numbers if there are more.
    pub clipped: u64,
}

impl fmt::Display for InferredRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InferredRange { range, least, greatest, clipped } = self;
        let ValueRange { name, low, high, .. } = range;
        write!(f, "{name}: {least} to {greatest}; its range is {low} to {high}")?;
        if *clipped > 0 {
            write!(f, ", which clips {clipped} numbers")?;
        }
        Ok(())
    }
}

/// Sees all impressions of a data set, and then tells the ranges of its columns.
pub(super) struct RangeInference<'a> {
    schema: &'a Schema,
    values: Vec<NumberSketch>,
    context: Vec<NumberSketch>,
}

impl<'a> RangeInference<'a> {
    /// Before the first impression.
    pub(super) fn new(schema: &'a Schema) -> RangeInference<'a> {
        let context = columns_of(&schema.context_features, FeatureKind::Dense).len();
        RangeInference {
            schema,
            values: vec![NumberSketch::default(); schema.values.len()],
            context: vec![NumberSketch::of_feature(); context],
        }
    }

    /// Takes the numbers of an impression into account.
    pub(super) fn see(&mut self, row: &Impression) {
        let values = self.values.iter_mut().zip(row.outcome.values);
        let context = self.context.iter_mut().zip(row.context.dense.iter().copied());
        values.chain(context).for_each(|(sketch, number)| sketch.see(number));
    }

    /// The ranges of all values and dense features that have enough numbers and none in the schema
    /// yet, in the schema's order.
    pub(super) fn inferred(self, items: &[Item], users: &[User]) -> Vec<InferredRange> {
        let schema = self.schema;
        let all = [&schema.item_features, &schema.user_features, &schema.context_features];
        let [item, user, context] = all.map(|features| columns_of(features, FeatureKind::Dense));
        let of_items = of_entities(&item, items.iter().map(|item| &item.dense));
        let of_users = of_entities(&user, users.iter().map(|user| &user.dense));
        let values = schema.values.iter().map(String::as_str).zip(self.values);
        let context = context.iter().map(String::as_str).zip(self.context);
        let all = values.chain(of_items).chain(of_users).chain(context);
        let is_open = |name: &str| schema.ranges.iter().all(|range| range.name != name);
        all.filter(|(name, _)| is_open(name))
            .filter_map(|(name, sketch)| sketch.inferred(name))
            .collect()
    }
}

/// Sketches of the dense features of items or users.
fn of_entities<'a, 'b>(
    names: &'a [String],
    rows: impl Iterator<Item = &'b Vec<f32>>,
) -> Vec<(&'a str, NumberSketch)> {
    let sketch = |name: &'a String| (name.as_str(), NumberSketch::of_feature());
    let mut sketches: Vec<(&str, NumberSketch)> = names.iter().map(sketch).collect();
    for dense in rows {
        for ((_, sketch), &number) in sketches.iter_mut().zip(dense) {
            sketch.see(number);
        }
    }
    sketches
}

/// The numbers of a column: all of them up to [`SAMPLE`], and a sample of that many beyond.
#[derive(Debug, Clone, Default)]
pub(super) struct NumberSketch {
    counts_zeros: bool,
    zeros: u64,
    /// Numbers that are known and not 0.
    count: u64,
    /// Of those.
    sample: Vec<f32>,
    least: f32,
    greatest: f32,
}

impl NumberSketch {
    /// One of a feature, of which 0 is a number as any other.
    pub(super) fn of_feature() -> NumberSketch {
        NumberSketch { counts_zeros: true, ..NumberSketch::default() }
    }

    /// Sees a number; one that is unknown or not finite does not count.
    pub(super) fn see(&mut self, number: f32) {
        if !number.is_finite() || (number == 0.0 && !self.counts_zeros) {
            return;
        }
        if self.count + self.zeros == 0 {
            (self.least, self.greatest) = (number, number);
        }
        (self.least, self.greatest) = (self.least.min(number), self.greatest.max(number));
        if number == 0.0 {
            self.zeros += 1;
            return;
        }
        self.count += 1;
        if self.sample.len() < SAMPLE {
            self.sample.push(number);
            return;
        }
        // Each of all numbers is as likely as any other to be in the sample at the end.
        let at = (splitmix64(self.count) % self.count) as usize;
        if let Some(place) = self.sample.get_mut(at) {
            *place = number;
        }
    }

    /// The range of the column; none if too few numbers are known, or all of them are 0.
    pub(super) fn inferred(mut self, name: &str) -> Option<InferredRange> {
        let numbers = &mut self.sample;
        if numbers.is_empty() || numbers.len() + (self.zeros as usize) < FEWEST_NUMBERS {
            return None;
        }
        numbers.sort_unstable_by(f32::total_cmp);
        let last = numbers.len() - 1;
        let outer = (last as f64 * OUTER_SHARE) as usize;
        let bound = |number: f32| rounded_out(f64::from(number) * ROOM);
        let (low, high) = (bound(numbers[outer].min(0.0)), bound(numbers[last - outer].max(0.0)));
        let range = ValueRange::new(name, low, high);
        let clipped = numbers.iter().filter(|&&number| range.is_beyond(number)).count() as u64;
        let clipped = clipped * self.count / numbers.len() as u64;
        Some(InferredRange { range, least: self.least, greatest: self.greatest, clipped })
    }
}

/// A number with two digits, rounded away from 0.
fn rounded_out(number: f64) -> f32 {
    if number == 0.0 {
        return 0.0;
    }
    let digits = 1 - number.abs().log10().floor() as i32;
    let scale = 10f64.powi(digits.abs());
    // Dividing keeps 0.1 what people write as 0.1.
    // What floating point adds to an even number does not round it up.
    let up = |number: f64| (number - 1e-6).ceil();
    let rounded = if digits < 0 {
        up(number.abs() / scale) * scale
    } else {
        up(number.abs() * scale) / scale
    };
    (rounded.copysign(number) as f32).clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(numbers: impl IntoIterator<Item = f32>) -> Option<InferredRange> {
        let mut sketch = NumberSketch::default();
        numbers.into_iter().for_each(|number| sketch.see(number));
        sketch.inferred("n")
    }

    fn of_feature(numbers: impl IntoIterator<Item = f32>) -> Option<InferredRange> {
        let mut sketch = NumberSketch::of_feature();
        numbers.into_iter().for_each(|number| sketch.see(number));
        sketch.inferred("n")
    }

    fn bounds(numbers: impl IntoIterator<Item = f32>) -> [f32; 2] {
        let ValueRange { low, high, .. } = range(numbers).unwrap().range;
        [low, high]
    }

    #[test]
    fn a_range_holds_what_is_usual_with_room() {
        assert_eq!(bounds((0..200).map(|i| i as f32 / 199.0)), [0.0, 1.5]);
        assert_eq!(bounds((0..200).map(|i| 18.0 + (i % 60) as f32)), [0.0, 120.0]);
        assert_eq!(bounds((0..200).map(|i| -1e-3 * i as f32)), [-0.3, 0.0]);
        assert_eq!(bounds((0..200).map(|i| i as f32 * 1e30 - 1e32)), [-1.5e32, 1.5e32]);
    }

    #[test]
    fn wild_and_missing_numbers_do_not_widen_it() {
        let usual = (0..2000).map(|i| (i % 40) as f32 / 10.0);
        let wild = [f32::NAN, f32::INFINITY, 1e15, -3e38];
        let found = range(usual.chain(wild)).unwrap();
        assert_eq!([found.range.low, found.range.high], [0.0, 5.9]);
        assert_eq!((found.least, found.greatest, found.clipped), (-3e38, 1e15, 2));
        assert!(found.to_string().contains("its range is 0 to 5.9, which clips 2 numbers"));
    }

    #[test]
    fn few_numbers_give_none() {
        assert_eq!(range((0..90).map(|i| i as f32)), None);
        assert_eq!(range((0..500).map(|_| 0.0)), None);
        assert_eq!(of_feature((0..500).map(|_| 0.0)), None);
        assert_eq!(of_feature((0..90).map(|i| (i % 2) as f32)), None);
    }

    #[test]
    fn zeros_are_numbers_of_a_feature() {
        // As the discount of items, of which few have one.
        let discounts = (0..1000).map(|i| if i % 20 == 0 { 5.0 + (i % 7) as f32 } else { 0.0 });
        assert_eq!(range(discounts.clone()), None, "50 purchases say little of others");
        let found = of_feature(discounts).unwrap();
        assert_eq!((found.least, found.greatest, found.clipped), (0.0, 11.0, 0));
        assert_eq!([found.range.low, found.range.high], [0.0, 17.0]);
        // Not one in a thousand: it stays what it is.
        let rare = (0..100_000).map(|i| if i % 2_000 == 0 { 7.0 } else { 0.0 });
        assert_eq!(of_feature(rare).unwrap().range.high, 11.0);
    }
}
