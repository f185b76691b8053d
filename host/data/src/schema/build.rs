//! Parts of schemas that code writes: the importers and the simulator.

use super::{
    Counter, Feature, FeatureKind, LabelTransform, MISSING, Task, TaskKind, TaskRole, ValueRange,
};

impl Feature {
    /// What a dense feature is in a request or event that does not say it: missing if it is
    /// optional, else 0.
    pub fn missing_number(&self) -> f32 {
        if self.is_optional() { MISSING } else { 0.0 }
    }

    /// Whether it may be missing, and models learn from that.
    pub fn is_optional(&self) -> bool {
        self.optional || self.training_only
    }

    /// A feature that is not optional.
    pub fn new(name: &str, kind: FeatureKind) -> Feature {
        Feature { name: name.into(), kind, optional: false, max_values: None, training_only: false }
    }

    /// A categorical feature of several values, at most so many.
    pub fn tags(name: &str, max_values: usize) -> Feature {
        let max_values = Some(max_values);
        Feature { max_values, ..Feature::new(name, FeatureKind::Categorical) }
    }

    /// Features of one type.
    pub fn list(names: &[impl AsRef<str>], kind: FeatureKind) -> Vec<Feature> {
        names.iter().map(|name| Feature::new(name.as_ref(), kind)).collect()
    }

    /// Categorical features, then dense ones.
    pub fn mixed(categorical: &[impl AsRef<str>], dense: &[&str]) -> Vec<Feature> {
        let categorical = Feature::list(categorical, FeatureKind::Categorical);
        [categorical, Feature::list(dense, FeatureKind::Dense)].concat()
    }
}

impl Task {
    /// A task of weight 1 on all surfaces, called as its label.
    pub fn of_label(label: &str, role: TaskRole, kind: TaskKind) -> Task {
        Task {
            name: label.into(),
            role,
            kind,
            label: label.into(),
            transform: LabelTransform::Identity,
            surfaces: Vec::new(),
            weight: 1.0,
        }
    }

    /// Whether it is valid on a surface of its schema.
    pub(super) fn is_valid_on(&self, surface: &str) -> bool {
        self.surfaces.is_empty() || self.surfaces.iter().any(|own| own == surface)
    }
}

impl Counter {
    /// A counter that never forgets for each key and action, named after both without the columns'
    /// `_id`: `user_surface_is_click`.
    pub fn lasting(keys: &[&[&str]], actions: &[impl AsRef<str>]) -> Vec<Counter> {
        let named = |key: &[&str], action: &str| Counter {
            name: key
                .iter()
                .chain([&action])
                .map(|part| part.trim_end_matches("_id"))
                .collect::<Vec<_>>()
                .join("_"),
            key: key.iter().map(|column| column.to_string()).collect(),
            action: action.to_string(),
            half_life_days: 0.0,
        };
        let counters =
            keys.iter().flat_map(|key| actions.iter().map(|action| named(key, action.as_ref())));
        counters.collect()
    }
}

impl ValueRange {
    /// The range of a value or dense feature; what is beyond it is clipped.
    pub fn new(name: &str, low: f32, high: f32) -> ValueRange {
        ValueRange { name: name.into(), low, high, ..ValueRange::default() }
    }
}
