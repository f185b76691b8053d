//! Converts names and JSON values into the schema's columns. Refusals name the caller's mistake in
//! the caller's words.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use hypercast_core::clock::mistaken_unit;
use hypercast_data::{
    dataset::{ContextFeatures, content::unit_vector, entity_id::EntityId},
    features::{CandidateInput, RequestInput},
    schema::{BeyondRange, Feature, FeatureKind, IdKind, Schema, ValueRange, fill_tags},
};
use hypercast_fm::example::{Item, MAX_VALUES, Outcome};
use hypercast_fm::training_only::ReadFor;
use hypercast_stream::events::check_time;
use prometheus::IntCounterVec;

use crate::{
    metrics::{Metrics, beyond_range},
    request::{
        api::{RankRequest, Refusal, RequestResult},
        candidates::{BodyForm, SentColumn},
        named_features::{FeatureValue, NamedFeatures},
    },
};

/// The part of a text that a refusal shows, in bytes.
const SHOWN_BYTES: usize = 100;

/// Refuses a time that is out of range, or that looks like one in another unit.
pub(crate) fn check_sent_time(time_ms: i64) -> RequestResult<()> {
    if let Some(unit) = mistaken_unit(time_ms) {
        let why = format!("{time_ms} looks like {unit}; send milliseconds since 1970");
        return Err(Refusal::BadRequest(why));
    }
    check_time(time_ms).map_err(|why| Refusal::BadRequest(why.to_string()))
}

/// Converts requests with one schema.
#[derive(Debug, Clone)]
pub struct Converter {
    /// The schema that bodies are converted by.
    pub(crate) schema: Arc<Schema>,
    /// The width of content vectors, 0 for none; without it any width is taken.
    content_width: Option<usize>,
    /// The schema's ranges by name.
    ranges: HashMap<String, ValueRange>,
    /// Numbers beyond them, by name and fate.
    beyond: IntCounterVec,
}

/// The columns that a request has for its candidates, by the index of the feature.
struct CandidateColumns<'a> {
    item: Vec<Option<&'a SentColumn>>,
    context: Vec<Option<&'a SentColumn>>,
    /// The context features of the whole request.
    of_request: Vec<Option<&'a FeatureValue>>,
}

impl Converter {
    /// A converter for `schema` and a data set without content vectors.
    pub fn new(schema: Arc<Schema>) -> Self {
        let by_name = |range: &ValueRange| (range.name.clone(), range.clone());
        let ranges = schema.ranges.iter().map(by_name).collect();
        Self { schema, content_width: Some(0), ranges, beyond: beyond_range() }
    }

    /// Takes content vectors of this width; of any if none.
    #[must_use]
    pub fn with_content(self, width: Option<usize>) -> Self {
        Self { content_width: width, ..self }
    }

    /// The same for another schema of the data set, and content vectors of this width.
    pub(crate) fn under(&self, schema: Arc<Schema>, content_width: usize) -> Self {
        let beyond = self.beyond.clone();
        Self { beyond, ..Self::new(schema).with_content(Some(content_width)) }
    }

    /// Counts numbers beyond their ranges in a daemon's metrics.
    pub(crate) fn counting_in(self, metrics: &Metrics) -> Self {
        Self { beyond: metrics.beyond_range.clone(), ..self }
    }

    /// Converts a rank request; `known` returns the stored features of an item. An item that is a
    /// candidate more than once is ranked once, as it was named first.
    ///
    /// # Errors
    /// An unknown surface or feature name, a value of the wrong kind, a time out of range, or a
    /// number beyond a range that refuses it.
    pub fn request(
        &self,
        request: &RankRequest,
        id: u64,
        time_ms: i64,
        known: impl Fn(u64) -> Option<Arc<Item>>,
    ) -> RequestResult<RequestInput> {
        let surface = self.surface(&request.surface)?;
        check_sent_time(time_ms).map_err(|refusal| refusal.at("time_ms"))?;
        let shared = Arc::new(self.context_of(&request.context, ReadFor::Prediction)?);
        let of_request = CandidateInput {
            item: 0,
            features: None,
            context: shared,
            outcome: Outcome::UNKNOWN,
            truth: Vec::new(),
        };
        let user = self.user(&request.user).map_err(|refusal| refusal.at("user"))?;
        let columns = self.candidate_columns(request)?;
        let ids = request.candidates.ids();
        let mut seen = HashSet::with_capacity(ids.len());
        let mut candidates = Vec::with_capacity(ids.len());
        for (at, id) in ids.iter().enumerate() {
            let place = |refusal: Refusal| refusal.at(&format!("candidates[{at}].id"));
            let item = self.item(id).map_err(place)?;
            if seen.insert(item) {
                let mut candidate = CandidateInput { item, ..of_request.clone() };
                let whose = |refusal: Refusal| refusal.at(&format!("candidate {id}"));
                self.take_own(&columns, at, &mut candidate, &known).map_err(whose)?;
                candidates.push(candidate);
            }
        }
        Ok(RequestInput { request: id, user, user_features: None, surface, time_ms, candidates })
    }

    /// The features of a request that are not read, because they are for training only.
    pub(crate) fn ignored_features(&self, request: &RankRequest) -> Vec<String> {
        let features = self.schema.context_features.iter().filter(|own| own.training_only);
        let is_sent = |name: &String| {
            request.candidates.features().contains_key(name) || request.context.contains_key(name)
        };
        features.map(|feature| feature.name.clone()).filter(is_sent).collect()
    }

    /// The key of a user's id.
    pub(crate) fn user(&self, id: &EntityId) -> RequestResult<u64> {
        key(id, self.schema.ids.users, "users")
    }

    /// The key of an item's id.
    pub(crate) fn item(&self, id: &EntityId) -> RequestResult<u64> {
        key(id, self.schema.ids.items, "items")
    }

    /// A context by name, as a caller would send it.
    pub fn named(&self, context: &ContextFeatures) -> NamedFeatures {
        let (mut ids, mut dense) = (context.ids.iter(), context.dense.iter());
        let mut value = |feature: &Feature| match (feature.kind, feature.max_values) {
            (FeatureKind::Categorical, None) => ids.next().map(|&id| FeatureValue::Id(id)),
            (FeatureKind::Categorical, Some(most)) => {
                let own: Vec<u64> = ids.by_ref().take(most).copied().collect();
                let present = own.iter().filter(|&&id| id != 0);
                let list = present.map(|&id| FeatureValue::Id(id)).collect();
                (!own.is_empty()).then_some(FeatureValue::List(list))
            }
            (FeatureKind::Dense, _) => dense.next().map(|&number| FeatureValue::of_number(number)),
        };
        let features = self.schema.context_features.iter();
        features.filter_map(|feature| Some((feature.name.clone(), value(feature)?))).collect()
    }

    /// The context features of a request, or of an impression, which is to learn from.
    pub(crate) fn context_of(
        &self,
        named: &NamedFeatures,
        reader: ReadFor,
    ) -> RequestResult<ContextFeatures> {
        refuse_unknown(named.keys(), &[&self.schema.context_features])
            .map_err(|refusal| refusal.at("context"))?;
        let mut context = ContextFeatures::default();
        let (ids, dense) = (&mut context.ids, &mut context.dense);
        let features = &self.schema.context_features;
        self.fill(features, |feature| named.get(&features[feature].name), reader, ids, dense)?;
        Ok(context)
    }

    /// All features of an item or user. They must be complete but for those that are optional,
    /// because stored features are not available here.
    pub(crate) fn entity_columns(
        &self,
        features: &[Feature],
        named: &NamedFeatures,
    ) -> RequestResult<(Vec<u64>, Vec<f32>)> {
        let is_missing = |feature: &&Feature| {
            let value = named.get(&feature.name);
            let may_lack = feature.is_optional()
                // Without any there are none.
                || feature.max_values.is_some()
                || self.schema.is_retired(&feature.name);
            !may_lack && matches!(value, None | Some(FeatureValue::Missing))
        };
        if let Some(missing) = features.iter().find(is_missing) {
            let what = format!(
                "feature {:?} is missing; send all of them, or declare it `optional = true` in \
                 schema.toml",
                missing.name
            );
            return Err(Refusal::BadRequest(what));
        }
        refuse_unknown(named.keys(), &[features])?;
        let (mut ids, mut dense) = (Vec::new(), Vec::new());
        let sent = |feature: usize| named.get(&features[feature].name);
        self.fill(features, sent, ReadFor::Learning, &mut ids, &mut dense)?;
        Ok((ids, dense))
    }

    /// An item's content vector, of unit norm; empty if none was sent.
    pub(crate) fn content(&self, sent: Option<&[f32]>) -> RequestResult<Arc<[f32]>> {
        let Some(sent) = sent else { return Ok(Arc::default()) };
        let refused = |why: String| Refusal::BadRequest(format!("content: {why}"));
        match self.content_width {
            Some(0) => Err(refused(
                "the data set has no content vectors; give it a content.parquet, which says how \
                 many numbers a vector has"
                    .into(),
            )),
            Some(width) if width != sent.len() => Err(refused(format!(
                "it has {} numbers; the vectors of this data set have {width}",
                sent.len()
            ))),
            _ => unit_vector(sent).map_err(|why| refused(format!("it {why}"))),
        }
    }

    /// An outcome by name; actions and values that are missing are unknown.
    pub(crate) fn outcome(
        &self,
        actions: &BTreeMap<String, bool>,
        values: &BTreeMap<String, f32>,
    ) -> RequestResult<Outcome> {
        let schema = &self.schema;
        let mut outcome = Outcome { actions: 0, known: 0, values: [f32::NAN; MAX_VALUES] };
        for (name, &happened) in actions {
            let bit =
                schema.action(name).ok_or_else(|| unknown("action", name, &schema.actions))?;
            outcome.known |= 1 << bit;
            outcome.actions |= u64::from(happened) << bit;
        }
        for (name, &value) in values {
            let at = schema.value(name).ok_or_else(|| unknown("value", name, &schema.values))?;
            outcome.values[at] = self.number(name, value)?;
        }
        Ok(outcome)
    }

    pub(crate) fn surface(&self, name: &str) -> RequestResult<u16> {
        self.schema.surface(name).ok_or_else(|| Refusal::UnknownSurface {
            given: name.to_owned(),
            known: self.schema.surfaces.clone(),
        })
    }

    /// Finds the columns of the features that a request has for its candidates.
    fn candidate_columns<'a>(
        &self,
        request: &'a RankRequest,
    ) -> RequestResult<CandidateColumns<'a>> {
        let (schema, sent) = (&self.schema, request.candidates.features());
        let known = [&schema.item_features[..], &schema.context_features];
        for (name, column) in sent {
            let place = |refusal: Refusal| match (request.candidates.form(), column.first()) {
                (BodyForm::Rows, Some(at)) => {
                    refusal.at(&format!("candidate {}", request.candidates.ids()[at]))
                }
                _ => refusal.at("candidates.features"),
            };
            refuse_unknown([name], &known).map_err(place)?;
        }
        let columns = |features: &[Feature]| -> Vec<Option<&'a SentColumn>> {
            features.iter().map(|feature| sent.get(&feature.name)).collect()
        };
        let of_request = |feature: &Feature| request.context.get(&feature.name);
        Ok(CandidateColumns {
            item: columns(&schema.item_features),
            context: columns(&schema.context_features),
            of_request: schema.context_features.iter().map(of_request).collect(),
        })
    }

    /// Gives a candidate the features that the request has for it alone, the one at `at`.
    fn take_own(
        &self,
        columns: &CandidateColumns<'_>,
        at: usize,
        candidate: &mut CandidateInput,
        known: &impl Fn(u64) -> Option<Arc<Item>>,
    ) -> RequestResult<()> {
        let has_own =
            |of: &[Option<&SentColumn>]| of.iter().flatten().any(|own| own.get(at).is_some());
        if has_own(&columns.item) {
            // Those in the request, else the stored ones.
            let mut item = known(candidate.item).map(Arc::unwrap_or_clone).unwrap_or_default();
            item.id = candidate.item;
            let sent = |feature: usize| columns.item[feature]?.get(at);
            let (ids, dense) = (&mut item.ids, &mut item.dense);
            self.fill(&self.schema.item_features, sent, ReadFor::Prediction, ids, dense)?;
            candidate.features = Some(Arc::new(item));
        }
        if has_own(&columns.context) {
            // The candidate's own come before those of its request.
            let own = |feature: usize| columns.context[feature]?.get(at);
            let sent = |feature: usize| own(feature).or(columns.of_request[feature]);
            let mut context = ContextFeatures::default();
            let (ids, dense) = (&mut context.ids, &mut context.dense);
            self.fill(&self.schema.context_features, sent, ReadFor::Prediction, ids, dense)?;
            candidate.context = Arc::new(context);
        }
        Ok(())
    }

    /// Sets columns to the values that were `sent`, by the index of the feature; one without keeps
    /// its value, or is missing. Of more values than a feature can have, the first ones count.
    fn fill<'v>(
        &self,
        features: &[Feature],
        sent: impl Fn(usize) -> Option<&'v FeatureValue>,
        reader: ReadFor,
        ids: &mut Vec<u64>,
        dense: &mut Vec<f32>,
    ) -> RequestResult<()> {
        let of_kind = |kind| features.iter().filter(move |feature| feature.kind == kind);
        ids.resize(of_kind(FeatureKind::Categorical).map(Feature::width).sum(), 0);
        let unknown = of_kind(FeatureKind::Dense).map(Feature::missing_number);
        dense.extend(unknown.skip(dense.len()));
        let (mut ids, mut dense) = (&mut ids[..], dense.iter_mut());
        for (at, feature) in features.iter().enumerate() {
            let Feature { name, kind, .. } = feature;
            // Whoever still sends a retired feature need not change at once.
            let is_hidden = reader == ReadFor::Prediction && feature.training_only;
            let value = sent(at).filter(|_| !is_hidden && !self.schema.is_retired(name));
            match kind {
                FeatureKind::Categorical => {
                    let columns;
                    (columns, ids) = ids.split_at_mut(feature.width());
                    if let Some(value) = value {
                        self.fill_category(feature, value, columns)?;
                    }
                }
                FeatureKind::Dense => {
                    let column = dense.next().expect("one for each");
                    *column = match value {
                        None => *column,
                        Some(FeatureValue::Missing) => feature.missing_number(),
                        Some(FeatureValue::Id(number)) => self.number(name, *number as f32)?,
                        Some(FeatureValue::Number(number)) => self.number(name, *number as f32)?,
                        Some(value) => return Err(wrong(name, value, "a number")),
                    };
                }
            }
        }
        Ok(())
    }

    /// Sets the columns of a categorical feature.
    fn fill_category(
        &self,
        feature: &Feature,
        value: &FeatureValue,
        columns: &mut [u64],
    ) -> RequestResult<()> {
        let Feature { name, max_values, .. } = feature;
        match (value, max_values) {
            (FeatureValue::Missing, _) => columns.fill(0),
            (value, None) => {
                columns[0] =
                    value.category().ok_or_else(|| wrong(name, value, "an id or a text"))?;
            }
            (FeatureValue::List(values), Some(_)) => {
                let wants = "ids or texts in its list";
                let id = |value: &FeatureValue| {
                    value.category().ok_or_else(|| wrong(name, value, wants))
                };
                let ids = values.iter().map(id).collect::<RequestResult<Vec<u64>>>()?;
                if fill_tags(columns, ids) {
                    self.beyond.with_label_values(&[name, "cut"]).inc();
                }
            }
            (value, Some(_)) => return Err(wrong(name, value, "a list of ids or texts")),
        }
        Ok(())
    }

    /// A number of a value or dense feature, in its range.
    fn number(&self, name: &str, sent: f32) -> RequestResult<f32> {
        if !sent.is_finite() {
            return Err(Refusal::BadRequest(format!("{name:?} is not a number of 32 bits")));
        }
        let Some(range) = self.ranges.get(name).filter(|range| range.is_beyond(sent)) else {
            return Ok(sent);
        };
        match range.beyond {
            BeyondRange::Clip => {
                self.beyond.with_label_values(&[name, "clipped"]).inc();
                Ok(range.clip(sent))
            }
            BeyondRange::Refuse => {
                self.beyond.with_label_values(&[name, "refused"]).inc();
                let ValueRange { low, high, .. } = range;
                Err(Refusal::BadRequest(format!("{name:?} is {sent}; send {low} to {high}")))
            }
        }
    }
}

fn wrong(name: &str, value: &FeatureValue, wants: &str) -> Refusal {
    let is = match value {
        FeatureValue::Missing => "null".to_owned(),
        FeatureValue::Id(id) => id.to_string(),
        FeatureValue::Number(number) => number.to_string(),
        FeatureValue::Text(text) => format!("{:?}", &text[..text.floor_char_boundary(SHOWN_BYTES)]),
        FeatureValue::List(values) => format!("a list of {}", values.len()),
    };
    Refusal::BadRequest(format!("feature {name:?} is {is}; it takes {wants}"))
}

/// The key of an id, if it has the form that the schema declares.
fn key(id: &EntityId, declared: IdKind, whose: &str) -> RequestResult<u64> {
    let wrong = |is: &str, declared: &str, send: &str| {
        Refusal::BadRequest(format!(
            "{id} is {is}, but schema.toml declares `ids.{whose} = \"{declared}\"`: send {send}"
        ))
    };
    match (id, declared) {
        (EntityId::Integer(_), IdKind::Integer) | (EntityId::Text(_), IdKind::String) => {
            Ok(id.key())
        }
        (EntityId::Integer(_), IdKind::String) => {
            Err(wrong("a number", "string", "the id in quotes, as the data set has it"))
        }
        (EntityId::Text(_), IdKind::Integer) => {
            Err(wrong("a string", "integer", "a whole number from 0 on, without quotes"))
        }
    }
}

fn refuse_unknown<'a>(
    names: impl IntoIterator<Item = &'a String>,
    features: &[&[Feature]],
) -> RequestResult<()> {
    let known: Vec<&str> =
        features.iter().copied().flatten().map(|feature| feature.name.as_str()).collect();
    match names.into_iter().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(unknown("feature", name, &known)),
        None => Ok(()),
    }
}

fn unknown(what: &str, name: &str, known: &impl std::fmt::Debug) -> Refusal {
    Refusal::BadRequest(format!("unknown {what} {name:?}; there are {known:?}"))
}
