//! Features of a context that only training knows; what models do about them is in
//! [`hypercast_fm::training_only`].

use hypercast_fm::training_only::TrainingOnlyColumns;

use super::{FeatureKind, MissingColumns, Schema};

/// Words in the names of features that say where an item stood among those shown with it.
const POSITION: [&str; 4] = ["position", "pos", "rank", "slot"];

impl Schema {
    /// The columns of a target that serving does not know, and training does: a retired feature is
    /// missing in both.
    pub fn training_only_columns(&self) -> TrainingOnlyColumns {
        let is_own = |name: &str| {
            let features = &self.context_features;
            features.iter().any(|feature| feature.training_only && feature.name == name)
                && !self.is_retired(name)
        };
        let own = self.id_fields().into_iter().filter(|field| is_own(&field.name));
        let ids = own.flat_map(|field| field.columns).collect();
        let dense: Vec<String> = self.features_of(FeatureKind::Dense).collect();
        let optional = MissingColumns::new(self);
        let first = self.feature_columns().len() - optional.optional().len();
        let (mut numbers, mut missing) = (Vec::new(), Vec::new());
        for (at, &column) in optional.optional().iter().enumerate() {
            if is_own(&dense[column]) {
                numbers.push(column);
                missing.push(first + at);
            }
        }
        TrainingOnlyColumns { ids, numbers, missing }
    }
}

/// Whether a feature is named as the place that an item had among those shown with it, which
/// follows from the ranking, so that no request can send it.
pub fn is_position_name(name: &str) -> bool {
    let name = name.to_lowercase();
    let parts: Vec<&str> = name.split(['_', '.', '-', ' ']).collect();
    // A slot of time is none of a list.
    let is_of_time = parts.contains(&"time");
    !is_of_time && (name.contains(POSITION[0]) || POSITION.iter().any(|word| parts.contains(word)))
}
