//! Converts names and JSON values into the schema's columns. Refusals name the caller's mistake in
//! the caller's words.

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry},
    fmt,
    marker::PhantomData,
    sync::Arc,
};

use hypercast_core::clock::mistaken_unit;
use hypercast_data::{
    dataset::{ContextFeatures, content::unit_vector, entity_id::EntityId},
    features::{CandidateInput, RequestInput},
    schema::{
        BeyondRange, Feature, FeatureKind, IdKind, Schema, ValueRange, category_id, fill_tags,
        is_missing_text,
    },
};
use hypercast_fm::example::{Item, MAX_VALUES, Outcome};
use hypercast_fm::training_only::ReadFor;
use hypercast_stream::events::check_time;
use prometheus::IntCounterVec;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

use crate::{
    metrics::{Metrics, beyond_range},
    request::api::{RankCandidate, RankRequest, Refusal, RequestResult},
};

/// A feature's value in JSON: an id or number, the text of a category, or a list of categories.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum FeatureValue {
    /// An id, or a whole number.
    Id(u64),
    /// A number.
    Number(f64),
    /// A category's text; its id is the one that an import assigns.
    Text(String),
    /// The values of a feature that can have several.
    List(Vec<FeatureValue>),
    /// JSON's null: the value is missing, whatever is known otherwise.
    Missing,
}

impl FeatureValue {
    /// A number, or that it is missing.
    fn of_number(number: f32) -> Self {
        if number.is_finite() { Self::Number(number.into()) } else { Self::Missing }
    }

    /// The id of a category, 0 if it is missing; none if it is no category.
    fn category(&self) -> Option<u64> {
        match self {
            Self::Missing => Some(0),
            Self::Id(id) => Some((*id).min(MOST_ID)),
            Self::Text(text) if is_missing_text(text) => Some(0),
            Self::Text(text) => Some(category_id(text)),
            Self::Number(_) | Self::List(_) => None,
        }
    }
}

impl<'de> Deserialize<'de> for FeatureValue {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ValueVisitor { is_listed: false })
    }
}

/// Reads a value as it comes. What serde derives would hold a copy of all that a list contains, for
/// each list that it is in, so that a small body could take gigabytes.
#[derive(Clone, Copy)]
struct ValueVisitor {
    /// Whether it is in a list, so that it is none itself.
    is_listed: bool,
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = FeatureValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_listed {
            "a number, a text or null in the list of a feature"
        } else {
            "a number, a text, a list of these, or null as a feature"
        })
    }

    fn visit_u64<E>(self, id: u64) -> Result<FeatureValue, E> {
        Ok(FeatureValue::Id(id))
    }

    fn visit_i64<E>(self, number: i64) -> Result<FeatureValue, E> {
        Ok(u64::try_from(number).map_or(FeatureValue::Number(number as f64), FeatureValue::Id))
    }

    fn visit_f64<E>(self, number: f64) -> Result<FeatureValue, E> {
        Ok(FeatureValue::Number(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<FeatureValue, E> {
        Ok(FeatureValue::Text(text.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<FeatureValue, E> {
        Ok(FeatureValue::Missing)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<FeatureValue, A::Error> {
        if self.is_listed {
            return Err(de::Error::invalid_type(de::Unexpected::Seq, &self));
        }
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(ValueVisitor { is_listed: true })? {
            if values.len() == MAX_LISTED {
                return Err(de::Error::custom(format!(
                    "the list of a feature has more than {MAX_LISTED} values"
                )));
            }
            values.push(value);
        }
        Ok(FeatureValue::List(values))
    }
}

impl<'de> DeserializeSeed<'de> for ValueVisitor {
    type Value = FeatureValue;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<FeatureValue, D::Error> {
        from.deserialize_any(self)
    }
}

/// The greatest id of a category. The one above stands for what no caller can send (see
/// `hypercast_fm::training_only`), and counts as this one.
const MOST_ID: u64 = u64::MAX - 1;

/// The most values of a list that are read. A feature takes at most
/// [`hypercast_data::schema::MAX_TAGS`] of them.
const MAX_LISTED: usize = 1024;

/// The part of a text that a refusal shows, in bytes.
const SHOWN_BYTES: usize = 100;

/// Features by the names that the schema gives them.
pub type NamedFeatures = BTreeMap<String, FeatureValue>;

/// Refuses a time that is out of range, or that looks like one in another unit.
pub(crate) fn check_sent_time(time_ms: i64) -> RequestResult<()> {
    if let Some(unit) = mistaken_unit(time_ms) {
        let why = format!("{time_ms} looks like {unit}; send milliseconds since 1970");
        return Err(Refusal::BadRequest(why));
    }
    check_time(time_ms).map_err(|why| Refusal::BadRequest(why.to_string()))
}

/// Reads a map in which no key may stand twice. Otherwise the last one would count, silently.
pub(crate) fn unique_keys<'de, D, V>(from: D) -> Result<BTreeMap<String, V>, D::Error>
where
    D: Deserializer<'de>,
    V: Deserialize<'de>,
{
    struct UniqueKeys<V>(PhantomData<V>);

    impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueKeys<V> {
        type Value = BTreeMap<String, V>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of names")
        }

        fn visit_map<M: MapAccess<'de>>(self, mut entries: M) -> Result<Self::Value, M::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = entries.next_entry::<String, V>()? {
                match map.entry(key) {
                    Entry::Vacant(place) => place.insert(value),
                    Entry::Occupied(place) => {
                        let why = format!("{:?} stands twice", place.key());
                        return Err(de::Error::custom(why));
                    }
                };
            }
            Ok(map)
        }
    }

    from.deserialize_map(UniqueKeys(PhantomData))
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
        let mut seen = HashSet::with_capacity(request.candidates.len());
        let mut candidates = Vec::with_capacity(request.candidates.len());
        for (at, candidate) in request.candidates.iter().enumerate() {
            let place = |refusal: Refusal| refusal.at(&format!("candidates[{at}].id"));
            let item = self.item(&candidate.id).map_err(place)?;
            if !seen.insert(item) {
                continue;
            }
            candidates.push(if candidate.features.is_empty() {
                CandidateInput { item, ..of_request.clone() }
            } else {
                self.candidate(candidate, &request.context, &known)?
            });
        }
        Ok(RequestInput { request: id, user, user_features: None, surface, time_ms, candidates })
    }

    /// The features of a request that are not read, because they are for training only.
    pub(crate) fn ignored_features(&self, request: &RankRequest) -> Vec<String> {
        let features = self.schema.context_features.iter().filter(|own| own.training_only);
        let is_sent = |name: &String| {
            let of_candidates = request.candidates.iter().map(|candidate| &candidate.features);
            of_candidates.chain([&request.context]).any(|sent| sent.contains_key(name))
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
        refuse_unknown(named, &[&self.schema.context_features])
            .map_err(|refusal| refusal.at("context"))?;
        self.context(&[named], reader)
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
        refuse_unknown(named, &[features])?;
        let (mut ids, mut dense) = (Vec::new(), Vec::new());
        self.fill(features, &[named], ReadFor::Learning, &mut ids, &mut dense)?;
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

    /// A candidate with features in the request.
    fn candidate(
        &self,
        candidate: &RankCandidate,
        context: &NamedFeatures,
        known: &impl Fn(u64) -> Option<Arc<Item>>,
    ) -> RequestResult<CandidateInput> {
        let (schema, id) = (&self.schema, candidate.id.key());
        refuse_unknown(&candidate.features, &[&schema.item_features, &schema.context_features])
            .map_err(|refusal| refusal.at(&format!("candidate {}", candidate.id)))?;
        let mut features = None;
        if schema.item_features.iter().any(|own| candidate.features.contains_key(&own.name)) {
            // Those in the request, else the stored ones.
            let mut item = known(id).map(Arc::unwrap_or_clone).unwrap_or_default();
            item.id = id;
            let sent = [&candidate.features];
            let (ids, dense) = (&mut item.ids, &mut item.dense);
            self.fill(&schema.item_features, &sent, ReadFor::Prediction, ids, dense)?;
            features = Some(Arc::new(item));
        }
        Ok(CandidateInput {
            item: id,
            features,
            // The candidate's own come before those of its request.
            context: Arc::new(self.context(&[&candidate.features, context], ReadFor::Prediction)?),
            outcome: Outcome::UNKNOWN,
            truth: Vec::new(),
        })
    }

    fn context(&self, from: &[&NamedFeatures], reader: ReadFor) -> RequestResult<ContextFeatures> {
        let mut context = ContextFeatures::default();
        let (ids, dense) = (&mut context.ids, &mut context.dense);
        self.fill(&self.schema.context_features, from, reader, ids, dense)?;
        Ok(context)
    }

    /// Sets columns to the first value that was sent; a feature without one keeps its value, or is
    /// missing. Of more values than a feature can have, the first ones count.
    fn fill(
        &self,
        features: &[Feature],
        from: &[&NamedFeatures],
        reader: ReadFor,
        ids: &mut Vec<u64>,
        dense: &mut Vec<f32>,
    ) -> RequestResult<()> {
        let of_kind = |kind| features.iter().filter(move |feature| feature.kind == kind);
        ids.resize(of_kind(FeatureKind::Categorical).map(Feature::width).sum(), 0);
        let unknown = of_kind(FeatureKind::Dense).map(Feature::missing_number);
        dense.extend(unknown.skip(dense.len()));
        let (mut ids, mut dense) = (&mut ids[..], dense.iter_mut());
        for feature in features {
            let Feature { name, kind, .. } = feature;
            let sent = from.iter().find_map(|named| named.get(name));
            // Whoever still sends a retired feature need not change at once.
            let is_hidden = reader == ReadFor::Prediction && feature.training_only;
            let value = sent.filter(|_| !is_hidden && !self.schema.is_retired(name));
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

fn refuse_unknown(named: &NamedFeatures, features: &[&[Feature]]) -> RequestResult<()> {
    let known: Vec<&str> =
        features.iter().copied().flatten().map(|feature| feature.name.as_str()).collect();
    match named.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(unknown("feature", name, &known)),
        None => Ok(()),
    }
}

fn unknown(what: &str, name: &str, known: &impl std::fmt::Debug) -> Refusal {
    Refusal::BadRequest(format!("unknown {what} {name:?}; there are {known:?}"))
}
