//! Converts names and JSON values into the schema's columns. Refusals name the caller's mistake in
//! the caller's words.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use hypercast_data::{
    dataset::{ContextFeatures, Impression},
    features::{CandidateInput, RequestInput},
    schema::{Feature, FeatureKind, Schema, category_id},
};
use hypercast_fm::example::{Item, Outcome};
use hypercast_stream::events::check_time;
use serde::{Deserialize, Serialize};

use crate::request::api::{EventBody, RankCandidate, RankRequest, Refusal, RequestResult};

/// A feature's value in JSON: an id or number, or the text of a category.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FeatureValue {
    /// An id, or a whole number.
    Id(u64),
    /// A number.
    Number(f64),
    /// A category's text; its id is the one that an import assigns.
    Text(String),
}

/// Features by name.
pub type NamedFeatures = BTreeMap<String, FeatureValue>;

/// Converts requests with one schema.
#[derive(Debug, Clone)]
pub struct Converter {
    schema: Arc<Schema>,
}

impl Converter {
    /// A converter for `schema`.
    pub fn new(schema: Arc<Schema>) -> Self {
        Self { schema }
    }

    /// Converts a rank request; `known` returns the stored features of an item. An item that is a
    /// candidate more than once is ranked once, as it was named first.
    ///
    /// # Errors
    /// An unknown surface or feature name, a value of the wrong kind, or a time out of range.
    pub fn request(
        &self,
        request: &RankRequest,
        id: u64,
        time_ms: i64,
        known: impl Fn(u64) -> Option<Arc<Item>>,
    ) -> RequestResult<RequestInput> {
        let surface = self.surface(&request.surface)?;
        check_time(time_ms).map_err(|why| Refusal::BadRequest(format!("time_ms: {why}")))?;
        self.refuse_unknown(&request.context, &[&self.schema.context_features], "context")?;
        let shared = Arc::new(self.context(&request.context, &NamedFeatures::new())?);
        let of_request = CandidateInput {
            item: 0,
            features: None,
            context: shared,
            outcome: Outcome::UNKNOWN,
            truth: Vec::new(),
        };
        let mut seen = HashSet::with_capacity(request.candidates.len());
        let candidates = request
            .candidates
            .iter()
            .filter(|candidate| seen.insert(candidate.id))
            .map(|candidate| {
                if candidate.features.is_empty() {
                    Ok(CandidateInput { item: candidate.id, ..of_request.clone() })
                } else {
                    self.candidate(candidate, &request.context, &known)
                }
            })
            .collect::<Result<_, _>>()?;
        Ok(RequestInput {
            request: id,
            user: request.user,
            user_features: None,
            surface,
            time_ms,
            candidates,
        })
    }

    /// Converts an event with its outcome.
    ///
    /// # Errors
    /// An unknown surface, action, value or feature name.
    pub fn event(&self, event: &EventBody) -> RequestResult<Impression> {
        let surface = self.surface(&event.surface)?;
        let outcome = self.outcome(&event.actions, &event.values)?;
        Ok(Impression {
            request: event.request,
            time_ms: event.time_ms,
            outcome_ms: event.outcome_ms.unwrap_or(event.time_ms),
            user: event.user,
            item: event.item,
            surface,
            outcome,
            context: self.context_of(&event.context)?,
            truth: Vec::new(),
            history_only: false,
        })
    }

    /// A context by name, as a caller would send it.
    pub fn named(&self, context: &ContextFeatures) -> NamedFeatures {
        let (mut ids, mut dense) = (context.ids.iter(), context.dense.iter());
        let mut value = |kind| match kind {
            FeatureKind::Categorical => ids.next().map(|&id| FeatureValue::Id(id)),
            FeatureKind::Dense => dense.next().map(|&number| FeatureValue::Number(number.into())),
        };
        let features = self.schema.context_features.iter();
        features.filter_map(|feature| Some((feature.name.clone(), value(feature.kind)?))).collect()
    }

    /// The schema that bodies are converted by.
    pub(crate) fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The bit of an action.
    pub(crate) fn action(&self, name: &str) -> RequestResult<usize> {
        let known = &self.schema.actions;
        self.schema.action(name).ok_or_else(|| unknown("action", name, known))
    }

    /// The index of a real-valued outcome.
    pub(crate) fn value(&self, name: &str) -> RequestResult<usize> {
        self.schema.value(name).ok_or_else(|| unknown("value", name, &self.schema.values))
    }

    /// The context features of an impression.
    pub(crate) fn context_of(&self, named: &NamedFeatures) -> RequestResult<ContextFeatures> {
        self.refuse_unknown(named, &[&self.schema.context_features], "context")?;
        self.context(named, &NamedFeatures::new())
    }

    /// The features of an item or user, with 0 for missing ones.
    pub(crate) fn entity_columns(
        &self,
        features: &[Feature],
        named: &NamedFeatures,
    ) -> RequestResult<(Vec<u64>, Vec<f32>)> {
        if let Some(name) = named.keys().find(|name| features.iter().all(|f| f.name != **name)) {
            let known: Vec<String> = features.iter().map(|feature| feature.name.clone()).collect();
            return Err(unknown("feature", name, &known));
        }
        let (sent_ids, sent_dense) = self.columns(features, &[named])?;
        let (mut ids, mut dense) = (Vec::new(), Vec::new());
        overlay(&mut ids, sent_ids, 0);
        overlay(&mut dense, sent_dense, 0.0);
        Ok((ids, dense))
    }

    pub(crate) fn surface(&self, name: &str) -> RequestResult<u16> {
        self.schema.surface(name).ok_or_else(|| Refusal::UnknownSurface {
            given: name.to_owned(),
            known: self.schema.surfaces.clone(),
        })
    }

    /// A candidate with features in the request.
    fn candidate(
        &self,
        candidate: &RankCandidate,
        context: &NamedFeatures,
        known: &impl Fn(u64) -> Option<Arc<Item>>,
    ) -> RequestResult<CandidateInput> {
        let schema = &self.schema;
        let place = format!("candidate {}", candidate.id);
        self.refuse_unknown(
            &candidate.features,
            &[&schema.item_features, &schema.context_features],
            &place,
        )?;
        let own = schema
            .item_features
            .iter()
            .any(|feature| candidate.features.contains_key(&feature.name));
        let features =
            own.then(|| self.item(candidate, known(candidate.id)).map(Arc::new)).transpose()?;
        Ok(CandidateInput {
            item: candidate.id,
            features,
            context: Arc::new(self.context(context, &candidate.features)?),
            outcome: Outcome::UNKNOWN,
            truth: Vec::new(),
        })
    }

    /// The item's features: those in the request, else the stored ones, else 0.
    fn item(&self, candidate: &RankCandidate, known: Option<Arc<Item>>) -> RequestResult<Item> {
        let mut item = known.map_or_else(Item::default, |item| (*item).clone());
        item.id = candidate.id;
        let (ids, dense) = self.columns(&self.schema.item_features, &[&candidate.features])?;
        overlay(&mut item.ids, ids, 0);
        overlay(&mut item.dense, dense, 0.0);
        Ok(item)
    }

    /// Context features: the candidate's own before those of its request.
    fn context(
        &self,
        request: &NamedFeatures,
        candidate: &NamedFeatures,
    ) -> RequestResult<ContextFeatures> {
        let (ids, dense) = self.columns(&self.schema.context_features, &[candidate, request])?;
        let mut context = ContextFeatures::default();
        overlay(&mut context.ids, ids, 0);
        overlay(&mut context.dense, dense, 0.0);
        Ok(context)
    }

    #[allow(
        clippy::type_complexity,
        reason = "two lists of optional columns read better than a type for them"
    )]
    fn columns(
        &self,
        features: &[Feature],
        from: &[&NamedFeatures],
    ) -> RequestResult<(Vec<Option<u64>>, Vec<Option<f32>>)> {
        let (mut ids, mut dense) = (Vec::new(), Vec::new());
        for feature in features {
            let value = from.iter().find_map(|named| named.get(&feature.name));
            let wrong = |wants| {
                Refusal::BadRequest(format!(
                    "feature {:?} is {value:?}; it takes {wants}",
                    feature.name
                ))
            };
            match (feature.kind, value) {
                (FeatureKind::Categorical, None) => ids.push(None),
                (FeatureKind::Dense, None) => dense.push(None),
                (FeatureKind::Categorical, Some(FeatureValue::Id(id))) => ids.push(Some(*id)),
                (FeatureKind::Categorical, Some(FeatureValue::Text(text))) => {
                    ids.push(Some(category_id(text)))
                }
                (FeatureKind::Dense, Some(FeatureValue::Id(number))) => {
                    dense.push(Some(*number as f32))
                }
                (FeatureKind::Dense, Some(FeatureValue::Number(number))) => {
                    dense.push(Some(*number as f32))
                }
                (FeatureKind::Categorical, Some(_)) => return Err(wrong("an id or a text")),
                (FeatureKind::Dense, Some(_)) => return Err(wrong("a number")),
            }
        }
        Ok((ids, dense))
    }

    fn refuse_unknown(
        &self,
        named: &NamedFeatures,
        features: &[&Vec<Feature>],
        place: &str,
    ) -> RequestResult<()> {
        let known: Vec<&str> =
            features.iter().flat_map(|list| list.iter().map(|f| f.name.as_str())).collect();
        match named.keys().find(|name| !known.contains(&name.as_str())) {
            Some(name) => Err(Refusal::BadRequest(format!(
                "{place}: unknown feature {name:?}; there are {known:?}"
            ))),
            None => Ok(()),
        }
    }
}

fn unknown(what: &str, name: &str, known: &[String]) -> Refusal {
    Refusal::BadRequest(format!("unknown {what} {name:?}; there are {known:?}"))
}

/// Replaces columns by the values that were sent; a column that neither has becomes `blank`.
fn overlay<T: Copy>(columns: &mut Vec<T>, sent: Vec<Option<T>>, blank: T) {
    columns.resize(sent.len(), blank);
    for (column, sent) in columns.iter_mut().zip(sent) {
        *column = sent.unwrap_or(*column);
    }
}
