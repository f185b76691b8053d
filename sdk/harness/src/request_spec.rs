//! A request in JSON: the body of a daemon's `POST /v1/rank`, of which everything may be left out.
//! What is left out is generated, as in [`RequestBuilder`].

use std::collections::BTreeMap;

use hypercast_data::dataset::entity_id::EntityId;
use hypercast_data::schema::{MissingColumns, Schema, category_id, fill_tags, is_missing_text};
use serde::{Deserialize, Serialize};

use crate::cases::{Case, RequestBuilder};
use crate::world::World;

/// The most candidates and past events of a request that is generated.
const MOST: usize = 100_000;

/// A request by the names and ids that callers know.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RequestSpec {
    /// Its id, from which everything else is generated.
    pub request: Option<u64>,
    /// The first one that the expert serves, if missing.
    pub surface: Option<String>,
    /// The user to rank for, whose features follow from the id.
    pub user: Option<EntityId>,
    /// Milliseconds since 1970.
    pub time_ms: Option<i64>,
    /// Items, or how many; 20 if missing.
    pub candidates: Option<CandidateSpecs>,
    /// The number of past events of the user; 30 if missing.
    pub history: Option<usize>,
    /// Features that all candidates have, by name.
    pub context: BTreeMap<String, FeatureSpec>,
    /// The candidates' embeddings, one after the other.
    pub tae: Option<Vec<f32>>,
    /// How many candidates the caller wants back; all if missing.
    pub limit: Option<usize>,
    /// Of no meaning here: predictions are always told.
    pub explain: bool,
}

/// Which candidates a request has.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "candidates: a number, a list of {\"id\": ..., \"features\": {...}}, or the columns \
                 {\"id\": [...], \"features\": {...}}"
)]
pub enum CandidateSpecs {
    /// So many, which are generated.
    Count(usize),
    /// These, in this order.
    Items(Vec<CandidateSpec>),
    /// These, as columns.
    Columns(CandidateSpecColumns),
}

/// The candidates of a request as columns.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CandidateSpecColumns {
    id: Vec<EntityId>,
    #[serde(default)]
    features: BTreeMap<String, Vec<FeatureSpec>>,
}

/// A candidate of a request.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CandidateSpec {
    id: EntityId,
    #[serde(default)]
    features: BTreeMap<String, FeatureSpec>,
}

/// The value of a feature or of a column that is counted.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "a feature: a number, a text, a list of these, or null")]
pub enum FeatureSpec {
    /// The id of a category.
    Id(u64),
    /// A number.
    Number(f32),
    /// The text of a category, whose id is the one that an import assigns.
    Text(String),
    /// The values of a feature that can have several.
    List(Vec<FeatureSpec>),
    /// The value is missing.
    Missing(()),
}

/// What an expert makes of a request.
#[derive(Debug, Clone, Serialize)]
pub struct RankedSpec {
    /// The candidates, best first.
    pub ranking: Vec<RankedCandidate>,
}

/// One place of a ranking.
#[derive(Debug, Clone, Serialize)]
pub struct RankedCandidate {
    /// The item's id, or the key of one that is a text.
    pub id: u64,
    /// Its index among the request's candidates.
    pub row: usize,
    /// What the expert ranks by.
    pub score: f32,
    /// How likely the expert is to put it there, if it explores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub propensity: Option<f32>,
    /// One for each task.
    pub predictions: BTreeMap<String, f32>,
}

impl RequestSpec {
    /// Builds the request. `surface` is that of a request that names none.
    ///
    /// # Errors
    /// The schema lacks a name, or a value does not fit its column.
    pub fn build(&self, world: &World, surface: Option<&str>) -> Result<Case, String> {
        let schema = world.schema();
        let mut builder = world.request(self.request.unwrap_or(1)).serving();
        if let Some(name) = self.surface.as_deref().or(surface) {
            if schema.surface(name).is_none() {
                let known = schema.surfaces.join(", ");
                return Err(format!("the schema has no surface `{name}`; it has: {known}"));
            }
            builder = builder.surface(name);
        }
        if let Some(user) = &self.user {
            builder = builder.user(user.key());
        }
        let mut case = self.sized(builder)?.build();
        let missing = MissingColumns::new(schema);
        let example = &mut case.example;
        example.request = self.request.unwrap_or(example.request);
        example.time_ms = self.time_ms.unwrap_or(example.time_ms);
        for (row, target) in example.targets.iter_mut().enumerate() {
            let own = self.candidates.iter().flat_map(|candidates| candidates.features_of(row));
            for (name, value) in self.context.iter().chain(own) {
                let in_row = |why| format!("candidate {row}: {why}");
                set(schema, name, value, &mut target.ids, &mut target.features).map_err(in_row)?;
            }
            missing.fill(&mut target.features);
        }
        if let Some(tae) = &self.tae {
            let (given, expected) = (tae.len(), case.tae.len());
            if given != expected {
                return Err(format!("`tae` has {given} values; the candidates have {expected}"));
            }
            case.tae.clone_from(tae);
        }
        Ok(case)
    }

    fn sized(&self, builder: RequestBuilder) -> Result<RequestBuilder, String> {
        let history = self.history.unwrap_or(30);
        let builder = builder.history(history);
        let (candidates, builder) = match &self.candidates {
            None => (0, builder),
            Some(CandidateSpecs::Count(count)) => (*count, builder.candidates(*count)),
            Some(CandidateSpecs::Items(items)) => {
                (items.len(), builder.items(items.iter().map(|item| item.id.key())))
            }
            Some(CandidateSpecs::Columns(columns)) => {
                columns.check()?;
                (columns.id.len(), builder.items(columns.id.iter().map(EntityId::key)))
            }
        };
        if candidates.max(history) > MOST {
            return Err(format!("a request has at most {MOST} candidates and past events"));
        }
        Ok(builder)
    }
}

impl CandidateSpecs {
    /// What was given for a candidate alone, by name.
    fn features_of(&self, row: usize) -> Vec<(&String, &FeatureSpec)> {
        match self {
            CandidateSpecs::Count(_) => Vec::new(),
            CandidateSpecs::Items(items) => {
                items.get(row).into_iter().flat_map(|item| &item.features).collect()
            }
            CandidateSpecs::Columns(CandidateSpecColumns { features, .. }) => {
                let of = features.iter();
                of.filter_map(|(name, values)| Some((name, values.get(row)?))).collect()
            }
        }
    }
}

impl CandidateSpecColumns {
    fn check(&self) -> Result<(), String> {
        let rows = self.id.len();
        match self.features.iter().find(|(_, values)| values.len() != rows) {
            None => Ok(()),
            Some((name, values)) => {
                let given = values.len();
                Err(format!(
                    "feature `{name}` has {given} values for {rows} candidates: give one for each, \
                     null where it is missing"
                ))
            }
        }
    }
}

/// Sets a column or the columns of a feature by name.
fn set(
    schema: &Schema,
    name: &str,
    value: &FeatureSpec,
    ids: &mut [u64],
    numbers: &mut [f32],
) -> Result<(), String> {
    let numeric = schema.feature_columns();
    if let Some(at) = numeric.iter().position(|column| column == name) {
        numbers[at] = value.number().ok_or_else(|| format!("`{name}` is a number"))?;
        return Ok(());
    }
    let fields = schema.id_fields();
    let Some(field) = fields.iter().find(|field| field.name == name) else {
        let ids: Vec<&str> = fields.iter().map(|field| field.name.as_str()).collect();
        let known = [numeric.join(", "), ids.join(", ")].join("; ids: ");
        return Err(format!("the schema has no feature `{name}`; it has {known}"));
    };
    let listed = match value {
        FeatureSpec::List(values) => values.as_slice(),
        one => std::slice::from_ref(one),
    };
    let of_list: Option<Vec<u64>> = listed.iter().map(FeatureSpec::category).collect();
    let of_list = of_list.ok_or_else(|| format!("`{name}` is a category: a text or an id"))?;
    let columns = &mut ids[field.columns.clone()];
    if fill_tags(columns, of_list.iter().copied()) {
        return Err(format!("`{name}` has at most {} values", columns.len()));
    }
    Ok(())
}

impl FeatureSpec {
    /// As a number, NaN if it is missing; none if it is something else.
    fn number(&self) -> Option<f32> {
        match self {
            FeatureSpec::Id(id) => Some(*id as f32),
            FeatureSpec::Number(number) => Some(*number),
            FeatureSpec::Missing(()) => Some(f32::NAN),
            FeatureSpec::Text(_) | FeatureSpec::List(_) => None,
        }
    }

    /// As the id of a category, 0 if it is missing; none if it is something else.
    fn category(&self) -> Option<u64> {
        match self {
            FeatureSpec::Id(id) => Some(*id),
            FeatureSpec::Text(text) if is_missing_text(text) => Some(0),
            FeatureSpec::Text(text) => Some(category_id(text)),
            FeatureSpec::Missing(()) => Some(0),
            FeatureSpec::Number(_) | FeatureSpec::List(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(candidates: &str) -> Result<Case, String> {
        let spec = format!(r#"{{"user": 3, "candidates": {candidates}}}"#);
        serde_json::from_str::<RequestSpec>(&spec).unwrap().build(&World::default(), None)
    }

    #[test]
    fn candidates_as_columns_are_those_of_a_list() {
        let world = World::default();
        let name = &world.schema().feature_columns()[0];
        let list = format!(
            r#"[{{"id": 7, "features": {{"{name}": 2.5}}}},
                {{"id": 5, "features": {{"{name}": null}}}}]"#
        );
        let columns = format!(r#"{{"id": [7, 5], "features": {{"{name}": [2.5, null]}}}}"#);
        let [list, columns] = [list, columns].map(|form| built(&form).unwrap().example.targets);
        assert_eq!(list.iter().map(|target| target.item.id).collect::<Vec<_>>(), [7, 5]);
        assert_eq!(list[0].features[0], 2.5);
        assert_eq!(columns.len(), 2);
        for (column, row) in columns.iter().zip(&list) {
            assert_eq!((column.item.id, &column.ids), (row.item.id, &row.ids));
            let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&column.features), bits(&row.features));
        }
        let short = format!(r#"{{"id": [7, 5], "features": {{"{name}": [2.5]}}}}"#);
        assert!(built(&short).unwrap_err().contains("has 1 values for 2 candidates"));
    }
}
