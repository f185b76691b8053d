//! Columns that are known in training alone, such as the position at which an item was shown: the
//! ranking decides it, so no request can send it.
//!
//! Models learn from these columns and are asked without them, by a neutral stand-in: a number
//! counts as its column's mean, and an id is one that no data has, whose embedding nobody trained
//! in the FM, and is zeros in experts.
//! That is what stands for what serving sees everywhere else, too: in predictions before learning,
//! TAEs for logs, gates and evaluations. Examples and logs keep the true values.
//!
//! Training does not hide the columns from time to time, so that models would learn what "missing"
//! means: they would learn that what an earlier ranking put first is clicked more, which is what
//! the column is there to explain (DECISIONS.md has figures). For the same reason the stand-in is
//! not a missing value, as rows of the log may have.
//!
//! The batch builders of the FM and of experts apply this, so no caller can forget it.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::example::{Example, Target};

/// An id that no category has: what callers send is below it, and files have ids below 2^63.
const UNSEEN_ID: u64 = u64::MAX;

/// What an example is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFor {
    /// A prediction or an embedding, as serving makes it.
    Prediction,
    /// A rule of a plugin, to which the columns are missing.
    Rule,
    /// A step of training.
    Learning,
}

/// The columns of a target that only training knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingOnlyColumns {
    /// Of `Target::ids`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<usize>,
    /// Of `Target::features`: the numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numbers: Vec<usize>,
    /// Of `Target::features`: those that say whether one of the numbers is missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<usize>,
}

impl TrainingOnlyColumns {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty() && self.numbers.is_empty()
    }

    /// A target as its reader sees it.
    ///
    /// # Panics
    /// The target lacks a column.
    pub fn target<'a>(&self, target: &'a Target, reader: ReadFor) -> Cow<'a, Target> {
        if self.is_empty() || reader == ReadFor::Learning {
            return Cow::Borrowed(target);
        }
        let mut seen = target.clone();
        self.hide(&mut seen.ids, &mut seen.features, reader);
        Cow::Owned(seen)
    }

    /// The targets of an example as their reader sees them.
    ///
    /// # Panics
    /// A target lacks a column.
    pub fn targets<'a>(&self, example: &'a Example, reader: ReadFor) -> Cow<'a, [Target]> {
        if self.is_empty() || reader == ReadFor::Learning {
            return Cow::Borrowed(&example.targets);
        }
        let mut seen = example.targets.clone();
        for Target { ids, features, .. } in &mut seen {
            self.hide(ids, features, reader);
        }
        Cow::Owned(seen)
    }

    /// Puts what stands for the columns into a target's ids and features.
    pub(crate) fn hide(&self, target_ids: &mut [u64], features: &mut [f32], reader: ReadFor) {
        if reader == ReadFor::Learning {
            return;
        }
        let is_rule = reader == ReadFor::Rule;
        // Standardised, NaN is the mean: of a number, and of how often it is missing.
        let (id, missing) = if is_rule { (0, 1.0) } else { (UNSEEN_ID, f32::NAN) };
        self.ids.iter().for_each(|&column| target_ids[column] = id);
        self.numbers.iter().for_each(|&column| features[column] = f32::NAN);
        self.missing.iter().for_each(|&column| features[column] = missing);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::example::{Item, Outcome, User};

    #[test]
    fn learning_alone_sees_them() {
        let target = Target {
            item: Arc::new(Item::default()),
            ids: vec![5, 6],
            features: vec![1.0, 2.0, 0.0, 0.0],
            outcome: Outcome::UNKNOWN,
            truth: vec![],
        };
        let example = Example {
            request: 1,
            user: Arc::new(User::default()),
            surface: 0,
            time_ms: 1,
            history: vec![],
            targets: vec![target.clone(), target],
        };
        let columns = TrainingOnlyColumns { ids: vec![1], numbers: vec![0], missing: vec![3] };
        let readers = [(ReadFor::Prediction, UNSEEN_ID, f32::NAN), (ReadFor::Rule, 0, 1.0)];
        for (reader, id, missing) in readers {
            let seen = columns.targets(&example, reader);
            for target in [&seen[1], &*columns.target(&example.targets[0], reader)] {
                assert_eq!(target.ids, [5, id]);
                assert!(target.features[0].is_nan());
                assert_eq!(target.features[1..3], [2.0, 0.0]);
                assert_eq!(target.features[3].to_bits(), missing.to_bits());
            }
        }
        assert!(matches!(columns.targets(&example, ReadFor::Learning), Cow::Borrowed(_)));
        let none = TrainingOnlyColumns::default();
        assert!(matches!(none.targets(&example, ReadFor::Prediction), Cow::Borrowed(_)));
    }
}
