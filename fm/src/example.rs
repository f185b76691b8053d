//! An example: one request with everything that was known when it was made and, in training, the
//! outcomes of its candidates.
//!
//! Examples are produced by the host's feature stage, consumed by the FM and the experts, and
//! stored in feature logs. How a model turns them into tensors is in [`crate::batch`].

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The most actions that an outcome can have: one bit each.
pub const MAX_ACTIONS: usize = 64;

/// The most real values that an outcome can have.
pub const MAX_VALUES: usize = 8;

/// An item, with its features in the schema's order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Item {
    /// The id in the data set.
    pub id: u64,
    /// One value per categorical feature of `schema.item_features`.
    pub ids: Vec<u64>,
    /// One value per dense feature of `schema.item_features`.
    pub dense: Vec<f32>,
    /// The content vector, of unit norm; empty for an item without one.
    #[serde(with = "shared")]
    pub content: Arc<[f32]>,
}

/// A user, with features in the schema's order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct User {
    /// The id in the data set.
    pub id: u64,
    /// One value per categorical user feature.
    pub ids: Vec<u64>,
    /// One value per dense user feature.
    pub dense: Vec<f32>,
}

/// The outcome of an impression.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Bit i: action i of the schema happened.
    pub actions: u64,
    /// Bit i: it is known whether action i happened. An impression is outside the sample space of
    /// tasks on unknown actions.
    pub known: u64,
    /// Real-valued outcomes (`schema.values`); NaN where unknown.
    #[serde(with = "outcome_values")]
    pub values: [f32; MAX_VALUES],
}

impl Outcome {
    /// An outcome of which nothing is known.
    pub const UNKNOWN: Outcome = Outcome { actions: 0, known: 0, values: [f32::NAN; MAX_VALUES] };

    /// Whether an action is known to have happened.
    pub fn has_action(&self) -> bool {
        self.actions & self.known != 0
    }
}

/// A past impression in a user's history.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// The item that was shown.
    #[serde(with = "shared")]
    pub item: Arc<Item>,
    /// The surface, an index into `schema.surfaces`.
    pub surface: u16,
    /// When it was shown, in milliseconds since the epoch.
    pub time_ms: i64,
    /// What the user did with it.
    pub outcome: Outcome,
}

/// A candidate of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Target {
    /// The candidate item.
    #[serde(with = "shared")]
    pub item: Arc<Item>,
    /// The categorical columns, in the order of `Schema::id_columns`.
    pub ids: Vec<u64>,
    /// The numeric columns, in the order of `Schema::feature_columns`.
    pub features: Vec<f32>,
    /// The outcome; `Outcome::UNKNOWN` while serving.
    pub outcome: Outcome,
    /// `[tasks]`: the true probabilities in simulated data, otherwise empty.
    pub truth: Vec<f32>,
}

/// One request: the unit of training, logging and serving.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Example {
    /// The request's id, unique in the data set.
    pub request: u64,
    /// The user who made the request.
    #[serde(with = "shared")]
    pub user: Arc<User>,
    /// The surface, an index into `schema.surfaces`.
    pub surface: u16,
    /// When it was made, in milliseconds since the epoch.
    pub time_ms: i64,
    /// The user's last events on all surfaces, oldest first, with the outcomes known at `time_ms`.
    pub history: Vec<Event>,
    /// The candidates.
    pub targets: Vec<Target>,
}

/// Serialises an `Arc` as its value. Serde's feature for this would apply to the whole workspace
/// and rebuild everything that depends on serde.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize + ?Sized, S: Serializer>(
        value: &Arc<T>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        T::serialize(value, to)
    }

    pub(super) fn deserialize<'de, T: ?Sized, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<T>, D::Error>
    where
        Box<T>: Deserialize<'de>,
    {
        Box::deserialize(from).map(Arc::from)
    }
}

/// Serialises the values of an outcome as records have had them since there could be four: four
/// numbers. Where a later value is known, [`MORE`] stands in the place of the fourth, which follows
/// with the others. So records without such a value are the same as before, to either side.
mod outcome_values {
    use std::fmt;

    use serde::de::{Deserializer, Error, SeqAccess, Visitor};
    use serde::ser::{SerializeTuple, Serializer};

    use super::MAX_VALUES;

    /// The values that every record has.
    const FIRST: usize = 4;

    /// The numbers of a record that has all values.
    const ALL: usize = MAX_VALUES + 1;

    /// A NaN that no computation gives. Unknown values are written as `f32::NAN`.
    const MORE: u32 = 0x7fc5_a1e8;

    pub(super) fn serialize<S: Serializer>(
        values: &[f32; MAX_VALUES],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let values = values.map(|value| if value.is_nan() { f32::NAN } else { value });
        let has_more = values[FIRST..].iter().any(|value| !value.is_nan());
        let mut tuple = to.serialize_tuple(if has_more { ALL } else { FIRST })?;
        for (at, value) in values.iter().enumerate().take(if has_more { MAX_VALUES } else { FIRST })
        {
            if has_more && at == FIRST - 1 {
                tuple.serialize_element(&f32::from_bits(MORE))?;
            }
            tuple.serialize_element(value)?;
        }
        tuple.end()
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<[f32; MAX_VALUES], D::Error> {
        from.deserialize_tuple(ALL, ValuesVisitor)
    }

    struct ValuesVisitor;

    impl<'de> Visitor<'de> for ValuesVisitor {
        type Value = [f32; MAX_VALUES];

        fn expecting(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(text, "{FIRST} values, or {ALL} numbers with a mark before the others")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<Self::Value, A::Error> {
            let mut next = || {
                numbers.next_element::<f32>()?.ok_or_else(|| A::Error::custom("a value is missing"))
            };
            let mut values = [f32::NAN; MAX_VALUES];
            for value in &mut values[..FIRST] {
                *value = next()?;
            }
            if values[FIRST - 1].to_bits() == MORE {
                for value in &mut values[FIRST - 1..] {
                    *value = next()?;
                }
            }
            Ok(values)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An outcome as it was written when actions had 32 bits and there were four values.
    #[derive(Serialize)]
    struct EarlierOutcome {
        actions: u32,
        known: u32,
        values: [f32; 4],
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn an_outcome_of_before_is_read_and_one_that_fits_is_written_as_before() {
        let values = [0.25, f32::NAN, -3.0, 7.5];
        let earlier = EarlierOutcome { actions: 1 << 31 | 5, known: u32::MAX, values };
        let stored = postcard::to_allocvec(&(&earlier, 77u8)).unwrap();
        let (read, behind): (Outcome, u8) = postcard::from_bytes(&stored).unwrap();
        assert_eq!((read.actions, read.known, behind), (1 << 31 | 5, 0xffff_ffff, 77));
        assert_eq!(bits(&read.values[..4]), bits(&values));
        assert!(read.values[4..].iter().all(|value| value.is_nan()));
        assert_eq!(postcard::to_allocvec(&(&read, 77u8)).unwrap(), stored, "as before");
    }

    #[test]
    fn every_action_and_every_value_is_read_back() {
        for known in 0..=MAX_VALUES {
            let mut values = [f32::NAN; MAX_VALUES];
            values[MAX_VALUES - known..].fill(1.5);
            let outcome = Outcome { actions: 1 << 63, known: u64::MAX - known as u64, values };
            let stored = postcard::to_allocvec(&(outcome, 77u8)).unwrap();
            let (read, behind): (Outcome, u8) = postcard::from_bytes(&stored).unwrap();
            assert_eq!((read.actions, read.known), (outcome.actions, outcome.known));
            assert_eq!((bits(&read.values), behind), (bits(&values), 77), "{known} values");
            let cut = postcard::from_bytes::<Outcome>(&stored[..stored.len() - 2]);
            assert!(cut.is_err(), "{known} values");
        }
    }
}
