//! Categorical features of several values: tags, genres, interests.
//!
//! Such a feature has as many columns of ids as it may have values, `NAME_1`, `NAME_2` and so on.
//! They hold different ids from the first column on, and 0 in the rest. So everything that moves
//! columns of ids moves tags, too. Models take the columns of a feature together: they look up the
//! ids in one table and read the mean of the rows, zeros if there is no id.

use std::ops::Range;

use super::{BUILT_IN_IDS, Feature, FeatureKind, Schema};

/// The most values that a feature can have at once.
pub const MAX_TAGS: usize = 32;

/// A built-in id or categorical feature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdField {
    /// Its name in the schema.
    pub name: String,
    /// Its columns among those that are asked for.
    pub columns: Range<usize>,
}

impl Feature {
    /// The number of its columns.
    pub fn width(&self) -> usize {
        self.max_values.unwrap_or(1)
    }

    /// The names of its columns.
    pub fn columns(&self) -> Vec<String> {
        match self.max_values {
            None => vec![self.name.clone()],
            Some(most) => (1..=most).map(|at| format!("{}_{at}", self.name)).collect(),
        }
    }
}

impl IdField {
    /// The categorical features among `features`, with their columns from `first` on.
    pub fn of<'a>(features: impl IntoIterator<Item = &'a Feature>, first: usize) -> Vec<IdField> {
        let features = features.into_iter();
        let features = features.filter(|feature| feature.kind == FeatureKind::Categorical);
        let mut end = first;
        let field = |feature: &Feature| {
            let start = end;
            end += feature.width();
            IdField { name: feature.name.clone(), columns: start..end }
        };
        features.map(field).collect()
    }
}

impl Schema {
    /// The built-in ids and categorical features, with their columns among
    /// [`Schema::id_columns`].
    pub fn id_fields(&self) -> Vec<IdField> {
        let built_in = BUILT_IN_IDS.iter().enumerate();
        let built_in =
            built_in.map(|(at, name)| IdField { name: name.to_string(), columns: at..at + 1 });
        built_in.chain(IdField::of(self.features(), BUILT_IN_IDS.len())).collect()
    }
}

/// Sets the columns of a feature of several values: the first different ids that are not 0. Returns
/// whether some were left out because they are too many.
pub fn fill_tags(columns: &mut [u64], ids: impl IntoIterator<Item = u64>) -> bool {
    columns.fill(0);
    let (mut count, mut is_cut) = (0, false);
    for id in ids {
        if id == 0 || columns[..count].contains(&id) {
            continue;
        }
        match columns.get_mut(count) {
            Some(column) => {
                *column = id;
                count += 1;
            }
            None => is_cut = true,
        }
    }
    is_cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_different_ids_then_zeros() {
        let mut columns = [9; 3];
        assert!(!fill_tags(&mut columns, [5, 0, 5, 7]));
        assert_eq!(columns, [5, 7, 0]);
        assert!(!fill_tags(&mut columns, [1, 2, 3, 2]));
        assert!(fill_tags(&mut columns, [1, 2, 3, 2, 4]));
        assert_eq!(columns, [1, 2, 3], "the first ones");
        assert!(!fill_tags(&mut columns, []));
        assert_eq!(columns, [0; 3]);
    }

    #[test]
    fn fields_say_where_their_columns_are() {
        let features = [
            Feature::new("brand", FeatureKind::Categorical),
            Feature::new("price", FeatureKind::Dense),
            Feature::tags("genres", 3),
            Feature::new("shop", FeatureKind::Categorical),
        ];
        let fields = IdField::of(&features, 4);
        let places: Vec<_> =
            fields.iter().map(|field| (field.name.as_str(), field.columns.clone())).collect();
        assert_eq!(places, [("brand", 4..5), ("genres", 5..8), ("shop", 8..9)]);
        assert_eq!(features[2].columns(), ["genres_1", "genres_2", "genres_3"]);
    }
}
