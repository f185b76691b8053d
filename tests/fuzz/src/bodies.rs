//! Bodies of HTTP requests, and what a daemon does with them: it converts names to columns, joins
//! events, updates the state of features, and runs the FM on the examples.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use hypercast_config::JoinSettings;
use hypercast_data::dataset::{Dataset, entity_id::EntityId};
use hypercast_data::features::{FeatureConfig, FeatureState};
use hypercast_data::schema::Schema;
use hypercast_serve::api::{EventsRequest, RankRequest};
use hypercast_serve::convert::Converter;
use hypercast_serve::fm::remote::decode_examples;
use hypercast_stream::events::EventRecord;
use hypercast_stream::join::{JoinedRecord, Joiner, JoinerOptions, JoinerOutput, StateUpdate};
use serde_json::{Map, Value, json};

use crate::edit;
use crate::model::model;
use crate::world;

/// Passes several bodies to one daemon.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let mut daemon = FuzzDaemon::new();
    for _ in 0..u.int_in_range(1..=8)? {
        let Ok(next) = RequestBody::next(u) else { break };
        match next {
            RequestBody::Rank(text) => daemon.rank(&text),
            RequestBody::Events(text) => daemon.events(&text, u)?,
            RequestBody::Examples(bytes) => embed(&bytes),
        }
    }
    Ok(())
}

enum RequestBody {
    Rank(Vec<u8>),
    Events(Vec<u8>),
    Examples(Vec<u8>),
}

impl RequestBody {
    fn next(u: &mut Unstructured) -> Result<RequestBody> {
        let kind = u.int_in_range(0..=7)?;
        let (sizes, seed) =
            ((u.int_in_range(0..=4)?, u.int_in_range(0..=4)?), u.arbitrary::<u8>()?);
        let mut text = match kind {
            0 => {
                let example = world::example(u64::from(seed), sizes.0, sizes.1);
                postcard::to_stdvec(&[example]).expect("an example is plain values")
            }
            1..=3 => rank(u)?.to_string().into_bytes(),
            _ => events(u)?.to_string().into_bytes(),
        };
        if u.ratio(1, 4)? {
            edit::edits(u, &mut text, 4)?;
        }
        Ok(match kind {
            0 => RequestBody::Examples(text),
            1..=3 => RequestBody::Rank(text),
            _ => RequestBody::Events(text),
        })
    }
}

/// The parts of a daemon: the joiner, and the state of features that its outcomes update.
struct FuzzDaemon {
    converter: Converter,
    joiner: Joiner,
    state: FeatureState,
}

impl FuzzDaemon {
    fn new() -> FuzzDaemon {
        let dataset = dataset(world::schema());
        let config = FeatureConfig {
            history_events: 8,
            max_users: 4,
            max_items: 6,
            max_counter_keys: 8,
            prior_strength: 20.0,
            max_content_mib: 1,
        };
        let settings = JoinSettings { max_impressions: 8, ..JoinSettings::default() };
        let options = JoinerOptions { settings, history_len: 8, max_targets: 3 };
        FuzzDaemon {
            converter: Converter::new(dataset.schema.clone()),
            joiner: Joiner::new(FeatureState::new(&dataset, config), options),
            state: FeatureState::new(&dataset, config),
        }
    }

    fn rank(&self, text: &[u8]) {
        let Ok(request) = serde_json::from_slice::<RankRequest>(text) else { return };
        // A daemon checks `server.max_candidates` first.
        if request.candidates.ids().len() > 64 {
            return;
        }
        let time_ms = request.time_ms.unwrap_or(1_000_000);
        let known = |id| self.state.item(id).cloned();
        let Ok(input) = self.converter.request(&request, 7, time_ms, known) else { return };
        let example = self.state.fetch(&input, 8);
        // An item that is named more than once is a target once, where it was named first.
        let mut seen = HashSet::new();
        let named = request.candidates.ids().iter().map(EntityId::key);
        let expected: Vec<u64> = named.filter(|id| seen.insert(*id)).collect();
        let targets: Vec<u64> = example.targets.iter().map(|target| target.item.id).collect();
        assert_eq!(targets, expected);
        let output = model().served.infer(&[&example]).expect("the example fits the model");
        assert_eq!(output.main.len() % example.targets.len().max(1), 0);
    }

    /// Passes events on. Some records are changed, as if another version had written them.
    fn events(&mut self, text: &[u8], u: &mut Unstructured) -> Result<()> {
        let Ok(request) = serde_json::from_slice::<EventsRequest>(text) else { return Ok(()) };
        let Ok(new_events) = self.converter.new_events(&request, i64::MAX) else { return Ok(()) };
        for new_events in new_events {
            let record = new_events.record(1_000_000).expect("an accepted event can be written");
            let mut payload = record.payload;
            let changed = u.ratio(1, 16)?;
            if changed {
                edit::edits(u, &mut payload, 2)?;
            }
            let fact = match EventRecord::decode(&payload) {
                Ok(fact) => fact,
                Err(_) if changed => continue,
                Err(error) => panic!("a written record cannot be read: {error}"),
            };
            let mut made = JoinerOutput::default();
            self.joiner.take(fact, &mut made);
            for joined in made.joined.iter().filter_map(JoinedRecord::joined) {
                let example = &joined.example;
                model().served.infer(&[example]).expect("a joined example fits the model");
            }
            made.outcomes.into_iter().for_each(|outcome| apply(&mut self.state, outcome.update));
        }
        Ok(())
    }
}

/// A data set without items, users and impressions.
pub fn dataset(schema: Schema) -> Dataset {
    Dataset {
        dir: PathBuf::new(),
        schema: Arc::new(schema),
        items: HashMap::new(),
        item_names: HashMap::new(),
        users: HashMap::new(),
        rows: 0,
        content: 0,
    }
}

/// Applies an outcome to the state of features, as a daemon does.
pub fn apply(state: &mut FeatureState, update: StateUpdate) {
    match update {
        StateUpdate::Outcome(impression) => state.apply(&impression),
        StateUpdate::Corrected(impression) => _ = state.correct(&impression),
        StateUpdate::Item(item) => _ = state.upsert_item(item),
        StateUpdate::User(user) => _ = state.upsert_user(user),
    }
}

/// Handles a body of `/v1/embed`, as the FM's tier does.
fn embed(bytes: &[u8]) {
    let Ok(examples) = decode_examples(bytes) else { return };
    let _ = model().served.infer(&examples.iter().collect::<Vec<_>>());
}

fn rank(u: &mut Unstructured) -> Result<Value> {
    let mut candidates = Vec::new();
    for _ in 0..u.int_in_range(0..=5)? {
        let mut candidate = json!({"id": id(u)?});
        if u.ratio(1, 3)? {
            candidate["features"] = features(u)?;
        }
        candidates.push(candidate);
    }
    let candidates = if u.ratio(1, 4)? { columns(u)? } else { candidates.into() };
    let mut body = json!({"user": id(u)?, "surface": name(u)?, "candidates": candidates});
    for (key, value) in
        [("time_ms", time(u)?), ("limit", id(u)?), ("request", id(u)?), ("context", features(u)?)]
    {
        if u.ratio(1, 3)? {
            body[key] = value;
        }
    }
    Ok(body)
}

/// Candidates as columns, which need not be equally long.
fn columns(u: &mut Unstructured) -> Result<Value> {
    let rows = u.int_in_range(0..=5)?;
    let mut ids = Vec::new();
    for _ in 0..rows {
        ids.push(id(u)?);
    }
    let mut columns = Map::new();
    for _ in 0..u.int_in_range(0..=2)? {
        let row = features(u)?;
        let Some((name, value)) = row.as_object().and_then(|row| row.iter().next()) else {
            continue;
        };
        let rows = if u.ratio(1, 8)? { rows + 1 } else { rows };
        columns.insert(name.clone(), vec![value.clone(); rows].into());
    }
    Ok(json!({"id": ids, "features": columns}))
}

/// A body of `/v1/events`.
pub fn events(u: &mut Unstructured) -> Result<Value> {
    let mut body = Map::new();
    for key in ["items", "users", "impressions", "events", "actions"] {
        let mut list = Vec::new();
        for _ in 0..u.int_in_range(0..=3)? {
            list.push(event(u, key)?);
        }
        if !list.is_empty() {
            body.insert(key.into(), list.into());
        }
    }
    if u.ratio(1, 4)? {
        body.insert("clock_ms".into(), time(u)?);
    }
    Ok(body.into())
}

fn event(u: &mut Unstructured, kind: &str) -> Result<Value> {
    let mut event = match kind {
        "items" => json!({"id": id(u)?, "features": {"tag": id(u)?, "length": number(u)?}}),
        "users" => json!({"id": id(u)?, "features": {"age": number(u)?}}),
        "actions" => json!({"request": id(u)?, "item": id(u)?, "time_ms": time(u)?}),
        _ => {
            json!({"user": id(u)?, "item": id(u)?, "surface": "feed", "time_ms": time(u)?, "request": id(u)?})
        }
    };
    if matches!(kind, "events" | "actions") {
        event["actions"] = json!({name(u)?: u.arbitrary::<bool>()?});
        if u.ratio(1, 3)? {
            event["values"] = json!({"seconds": number(u)?});
        }
    }
    if kind == "actions" && u.ratio(1, 3)? {
        event["complete"] = true.into();
    }
    if kind == "events" && u.ratio(1, 2)? {
        event["outcome_ms"] = time(u)?;
    }
    if matches!(kind, "events" | "impressions") && u.ratio(1, 4)? {
        event["context"] = features(u)?;
    }
    Ok(event)
}

fn features(u: &mut Unstructured) -> Result<Value> {
    let mut features = Map::new();
    for _ in 0..u.int_in_range(0..=2)? {
        let name = *u.choose(&["tag", "length", "network", "load", "age", "other"])?;
        let value = match u.int_in_range(0..=2)? {
            0 => id(u)?,
            1 => number(u)?,
            _ => u.arbitrary::<&str>()?.into(),
        };
        features.insert(name.into(), value);
    }
    Ok(features.into())
}

fn name(u: &mut Unstructured) -> Result<&'static str> {
    Ok(*u.choose(&["feed", "reels", "click", "like", "share", "hide", "nothing", ""])?)
}

/// A few small ids, so that events refer to the same items, and some at the limits.
fn id(u: &mut Unstructured) -> Result<Value> {
    Ok(if u.ratio(15, 16)? {
        u.int_in_range(0..=5u64)?.into()
    } else {
        (*u.choose(&[u64::MAX, 1 << 53, i64::MAX as u64])?).into()
    })
}

fn time(u: &mut Unstructured) -> Result<Value> {
    Ok(if u.ratio(7, 8)? {
        (1_000_000 + 1000 * u.int_in_range(0..=100_000i64)?).into()
    } else {
        (*u.choose(&[i64::MIN, i64::MAX, 0, -1, 1 << 53, i64::MIN + 1])?).into()
    })
}

fn number(u: &mut Unstructured) -> Result<Value> {
    Ok(match u.int_in_range(0..=3)? {
        0 => id(u)?,
        1 => (*u.choose(&[1e300, -1e300, 1e-300, 3.4e38, -0.0])?).into(),
        _ => f64::from(u.arbitrary::<i16>()?).into(),
    })
}
