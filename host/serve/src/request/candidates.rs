//! The candidates of a rank request as columns: their ids, and for each feature the values that
//! were sent.
//!
//! A body has candidates as a list, or as columns already, which say each name once and are what a
//! data frame gives. Either way no candidate has a map of its own here. What names and values mean
//! is for [`super::convert`] to say.

use std::{collections::BTreeMap, fmt};

use hypercast_data::dataset::entity_id::EntityId;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

use crate::request::named_features::{FeatureValue, NamedFeatures, unique_keys};

/// The form of the candidates in a body, and so of the ranking in the answer to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BodyForm {
    /// A list of objects.
    #[default]
    Rows,
    /// An object of lists.
    Columns,
}

/// The candidates of a request.
///
/// In JSON `[{"id": 3, "features": {"price": 2.5}}, ...]`, or
/// `{"id": [3, ...], "features": {"price": [2.5, ...]}}`.
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    ids: Vec<EntityId>,
    features: BTreeMap<String, SentColumn>,
    form: BodyForm,
}

/// A candidate by itself, to make a request of.
#[derive(Debug, Clone)]
pub struct RankCandidate {
    /// The item's id.
    pub id: EntityId,
    /// Item or context features by name; needed for an item the host does not know.
    pub features: NamedFeatures,
}

/// The values of a feature that were sent, each with its candidate's index, in ascending order.
#[derive(Debug, Clone, Default)]
pub struct SentColumn(Vec<(usize, FeatureValue)>);

impl Candidates {
    /// The items' ids, in the order in which they were sent.
    pub fn ids(&self) -> &[EntityId] {
        &self.ids
    }

    /// The features that were sent with any candidate, by name.
    pub fn features(&self) -> &BTreeMap<String, SentColumn> {
        &self.features
    }

    /// The form that the body had.
    pub fn form(&self) -> BodyForm {
        self.form
    }
}

impl FromIterator<RankCandidate> for Candidates {
    fn from_iter<I: IntoIterator<Item = RankCandidate>>(from: I) -> Self {
        let mut all = Self::default();
        for (at, RankCandidate { id, features }) in from.into_iter().enumerate() {
            all.ids.push(id);
            for (name, value) in features {
                all.features.entry(name).or_default().0.push((at, value));
            }
        }
        all
    }
}

impl SentColumn {
    /// The value of the candidate at `index`, if one was sent.
    pub fn get(&self, index: usize) -> Option<&FeatureValue> {
        // Where every candidate has one, it stands at its own index.
        let own = self.0.get(index).filter(|(at, _)| *at == index);
        let found = || {
            let place = self.0.binary_search_by_key(&index, |(at, _)| *at);
            place.ok().map(|place| &self.0[place])
        };
        own.or_else(found).map(|(_, value)| value)
    }

    /// The first candidate that has a value, if one has.
    pub(crate) fn first(&self) -> Option<usize> {
        self.0.first().map(|(at, _)| *at)
    }
}

impl Serialize for Candidates {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct CandidateBody<'a> {
            id: &'a EntityId,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            features: BTreeMap<&'a str, &'a FeatureValue>,
        }
        #[derive(Serialize)]
        struct CandidatesBody<'a> {
            id: &'a [EntityId],
            features: BTreeMap<&'a str, Vec<Option<&'a FeatureValue>>>,
        }
        let features = || self.features.iter().map(|(name, column)| (name.as_str(), column));
        match self.form {
            BodyForm::Rows => to.collect_seq(self.ids.iter().enumerate().map(|(at, id)| {
                let sent = features().filter_map(|(name, column)| Some((name, column.get(at)?)));
                CandidateBody { id, features: sent.collect() }
            })),
            BodyForm::Columns => {
                let all = features().map(|(name, column)| {
                    (name, (0..self.ids.len()).map(|at| column.get(at)).collect())
                });
                let features = all.collect();
                CandidatesBody { id: &self.ids, features }.serialize(to)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Candidates {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(CandidatesVisitor)
    }
}

/// The keys of a candidate, and of the columns of all.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "lowercase")]
enum Key {
    Id,
    Features,
}

struct CandidatesVisitor;

impl<'de> Visitor<'de> for CandidatesVisitor {
    type Value = Candidates;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of candidates, or their columns `id` and `features`")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<Candidates, A::Error> {
        let mut all = Candidates::default();
        while rows.next_element_seed(CandidateReader(&mut all))?.is_some() {}
        Ok(all)
    }

    fn visit_map<M: MapAccess<'de>>(self, mut columns: M) -> Result<Candidates, M::Error> {
        let (mut ids, mut features) = (None, None);
        while let Some(key) = columns.next_key()? {
            match key {
                Key::Id => set_once(&mut ids, columns.next_value()?, "id")?,
                Key::Features => {
                    set_once(&mut features, columns.next_value_seed(AllColumns)?, "features")?;
                }
            }
        }
        let ids: Vec<EntityId> = ids.ok_or_else(|| de::Error::missing_field("id"))?;
        let features = features.unwrap_or_default();
        for (name, SentColumn(values)) in &features {
            if values.len() != ids.len() {
                let (given, wanted) = (values.len(), ids.len());
                let why = format!(
                    "feature {name:?} has {given} values for {wanted} candidates: send one for \
                     each, null where it is missing"
                );
                return Err(de::Error::custom(why));
            }
        }
        Ok(Candidates { ids, features, form: BodyForm::Columns })
    }
}

fn set_once<T, E: de::Error>(place: &mut Option<T>, value: T, key: &'static str) -> Result<(), E> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(E::duplicate_field(key)),
    }
}

/// Reads a candidate of a list, behind those that were read before.
struct CandidateReader<'a>(&'a mut Candidates);

impl<'de> DeserializeSeed<'de> for CandidateReader<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for CandidateReader<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a candidate: {\"id\": ..., \"features\": {...}}")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut row: M) -> Result<(), M::Error> {
        let Candidates { ids, features, .. } = self.0;
        let (mut id, mut sent) = (None, None);
        while let Some(key) = row.next_key()? {
            match key {
                Key::Id => set_once(&mut id, row.next_value()?, "id")?,
                Key::Features => {
                    let of_row = RowFeatures { features, at: ids.len() };
                    set_once(&mut sent, row.next_value_seed(of_row)?, "features")?;
                }
            }
        }
        ids.push(id.ok_or_else(|| de::Error::missing_field("id"))?);
        Ok(())
    }
}

/// Reads the features of the candidate at `at` into their columns.
struct RowFeatures<'a> {
    features: &'a mut BTreeMap<String, SentColumn>,
    at: usize,
}

impl<'de> DeserializeSeed<'de> for RowFeatures<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for RowFeatures<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of names")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut sent: M) -> Result<(), M::Error> {
        let Self { features, at } = self;
        while let Some(SentColumn(column)) = sent.next_key_seed(ColumnOf { features, at })? {
            column.push((at, sent.next_value()?));
        }
        Ok(())
    }
}

/// Finds the column of a name, which must not have a value of the candidate at `at` yet: otherwise
/// one of the two would count, silently.
struct ColumnOf<'a> {
    features: &'a mut BTreeMap<String, SentColumn>,
    at: usize,
}

impl<'de, 'a> DeserializeSeed<'de> for ColumnOf<'a> {
    type Value = &'a mut SentColumn;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_str(self)
    }
}

impl<'a> Visitor<'_> for ColumnOf<'a> {
    type Value = &'a mut SentColumn;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a feature")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
        if !self.features.contains_key(name) {
            self.features.insert(name.to_owned(), SentColumn::default());
        }
        let column = self.features.get_mut(name).expect("inserted above");
        match column.0.last() {
            Some((at, _)) if *at == self.at => Err(E::custom(format!("{name:?} stands twice"))),
            _ => Ok(column),
        }
    }
}

/// Reads the features of all candidates, each a list with a value a candidate.
struct AllColumns;

impl<'de> DeserializeSeed<'de> for AllColumns {
    type Value = BTreeMap<String, SentColumn>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        let columns: BTreeMap<String, Vec<FeatureValue>> = unique_keys(from)?;
        let sent = |values: Vec<FeatureValue>| SentColumn(values.into_iter().enumerate().collect());
        Ok(columns.into_iter().map(|(name, values)| (name, sent(values))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Candidates, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    /// Everything that was sent, by candidate.
    fn sent(all: &Candidates) -> Vec<String> {
        let of = |(at, id)| {
            let own =
                all.features().iter().filter_map(|(name, column)| Some((name, column.get(at)?)));
            format!("{id} {:?}", own.collect::<Vec<_>>())
        };
        all.ids().iter().enumerate().map(of).collect()
    }

    #[test]
    fn rows_and_columns_are_the_same_candidates() {
        let rows = r#"[{"id": 3, "features": {"price": 2.5, "tags": ["new", 7]}},
            {"features": {"tags": [], "price": null}, "id": 5},
            {"id": 3, "features": {"price": 1, "tags": "x"}}]"#;
        let columns = r#"{"features": {"tags": [["new", 7], [], "x"], "price": [2.5, null, 1]},
            "id": [3, 5, 3]}"#;
        let (rows, columns) = (read(rows).unwrap(), read(columns).unwrap());
        assert_eq!((rows.form(), columns.form()), (BodyForm::Rows, BodyForm::Columns));
        assert_eq!(sent(&rows), sent(&columns));
        assert!(sent(&rows)[1].contains("Missing"), "null says that a value is missing");
        for all in [rows, columns] {
            let again = read(&serde_json::to_string(&all).unwrap()).unwrap();
            assert_eq!((again.form(), sent(&again)), (all.form(), sent(&all)));
        }
    }

    #[test]
    fn what_a_candidate_was_not_sent_with_it_does_not_have() {
        let all = read(
            r#"[{"id": "a"}, {"id": "b", "features": {"x": 1}}, {"id": "c"},
            {"id": "d", "features": {"y": 2, "x": 3}}]"#,
        );
        let all = all.unwrap();
        let [x, y] = ["x", "y"].map(|name| &all.features()[name]);
        let of = |column: &SentColumn| (0..5).map(|at| column.get(at).cloned()).collect::<Vec<_>>();
        let [one, two, three] = [1, 2, 3].map(|id| Some(FeatureValue::Id(id)));
        assert_eq!(of(x), [None, one, None, three, None]);
        assert_eq!((of(y), y.first()), (vec![None, None, None, two, None], Some(3)));
        let again = read(&serde_json::to_string(&all).unwrap()).unwrap();
        assert_eq!(sent(&again), sent(&all));
        assert!(read("[]").unwrap().ids().is_empty());
    }

    #[test]
    fn what_is_wrong_with_candidates_is_said() {
        for (text, why) in [
            ("3", "a list of candidates, or their columns `id` and `features`"),
            (r#"[{"id": 1, "features": {"x": 1, "x": 2}}]"#, r#""x" stands twice"#),
            (r#"{"id": [1], "features": {"x": [1], "x": [2]}}"#, r#""x" stands twice"#),
            (r#"[{"id": 1, "id": 2}]"#, "duplicate field `id`"),
            (r#"[{"id": 1, "features": {}, "features": {}}]"#, "duplicate field `features`"),
            (r#"{"id": [1], "id": [1]}"#, "duplicate field `id`"),
            (r#"[{"features": {}}]"#, "missing field `id`"),
            (r#"{"features": {}}"#, "missing field `id`"),
            (r#"[{"id": 1, "price": 2}]"#, "unknown field `price`, expected `id` or `features`"),
            (r#"{"id": [1], "price": [2]}"#, "unknown field `price`, expected `id` or `features`"),
            (r#"{"id": [1, 2], "features": {"x": [1]}}"#, r#"feature "x" has 1 values for 2"#),
            (
                r#"{"id": [1], "features": {"x": 1}}"#,
                "invalid type: integer `1`, expected a sequence",
            ),
            (r#"[{"id": 1, "features": {"x": [[1]]}}]"#, "in the list of a feature"),
            ("[[1]]", "expected a candidate"),
        ] {
            let said = read(text).unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
