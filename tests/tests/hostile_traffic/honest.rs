//! A simulated world whose past trains the models, whose rest is sent live, and the NE of what is
//! served for it.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use hypercast_core::clock::now_ms;
use hypercast_data::{
    dataset::{Dataset, Entities, Impression, write_dataset},
    schema::{BinaryLabels, Schema, TaskRole},
    simulate::{SimulateOptions, simulate},
};
use hypercast_fm::{
    example::{Item, User},
    metrics::LogLossSums,
};
use hypercast_serve::{
    api::{ActionBody, EventsRequest, ImpressionBody, RankAnswer, RankCandidate, RankRequest},
    convert::Converter,
};

/// Honest requests in a round.
pub const ROUND_REQUESTS: usize = 64;

/// How much is simulated.
pub struct WorldSize {
    pub users: usize,
    /// Requests that train the models.
    pub past: usize,
    /// Rounds that can be sent.
    pub rounds: usize,
}

/// What a request showed, with the outcomes.
pub type HonestRequest = Vec<Impression>;

/// The requests that are sent live.
pub struct HonestWorld {
    labels: BinaryLabels,
    converter: Converter,
    users: usize,
    live: Vec<HonestRequest>,
}

/// The bodies of a round.
pub struct RoundBodies<'a> {
    pub requests: &'a [HonestRequest],
    /// A ranking for each request.
    pub rankings: Vec<String>,
    pub impressions: String,
    pub actions: String,
}

impl HonestWorld {
    /// Simulates, and writes the past as the data set `dir/data`, ending now.
    pub fn prepare(dir: &Path, size: &WorldSize) -> HonestWorld {
        let into = dir.join("world");
        let requests = size.past + size.rounds * ROUND_REQUESTS;
        let WorldSize { users, .. } = *size;
        let options = SimulateOptions { into, users, items: 300, requests, surfaces: 2, seed: 5 };
        simulate(&options).expect("a world can be simulated");
        let world = Dataset::open(&options.into).unwrap();
        let rows: Vec<Impression> = world.impressions().unwrap().map(Result::unwrap).collect();
        let mut requests: Vec<HonestRequest> =
            rows.chunk_by(|a, b| a.request == b.request).map(<[_]>::to_vec).collect();
        let live = requests.split_off(size.past);
        let mut past = requests.concat();
        let newest_ms = past.iter().map(|row| row.outcome_ms).max().expect("a past");
        let later_ms = now_ms() - newest_ms;
        for row in &mut past {
            row.time_ms += later_ms;
            row.outcome_ms += later_ms;
        }
        let mut items: Vec<Item> = world.items.values().map(|item| (**item).clone()).collect();
        items.sort_by_key(|item| item.id);
        let mut users: Vec<User> = world.users.values().map(|user| (**user).clone()).collect();
        users.sort_by_key(|user| user.id);
        let schema = &*world.schema;
        let entities = Entities { schema, items: &items, item_names: &[], users: &users };
        write_dataset(&dir.join("data"), &entities, &mut past).unwrap();
        std::fs::remove_dir_all(&options.into).unwrap();
        let converter = Converter::new(world.schema.clone());
        let labels = BinaryLabels::new(&world.schema);
        HonestWorld { labels, converter, users: size.users, live }
    }

    /// How many users share the requests.
    pub fn users(&self) -> usize {
        self.users
    }

    /// The rounds in order.
    pub fn rounds(&self) -> impl Iterator<Item = &[HonestRequest]> {
        self.live.chunks_exact(ROUND_REQUESTS)
    }

    /// The bodies of a round at a time. Every outcome is complete, so that each example is joined
    /// in its round.
    pub fn bodies<'a>(&self, requests: &'a [HonestRequest], now_ms: i64) -> RoundBodies<'a> {
        let (mut shown, mut done) = (EventsRequest::default(), EventsRequest::default());
        let mut rankings = Vec::with_capacity(requests.len());
        for (at, rows) in requests.iter().enumerate() {
            // None is later than its round.
            let time_ms = now_ms - (requests.len() - at) as i64;
            rankings.push(serde_json::to_string(&self.ranking(rows, time_ms)).unwrap());
            shown.impressions.extend(rows.iter().map(|row| self.impression(row, time_ms)));
            done.actions.extend(rows.iter().map(|row| self.action(row, now_ms)));
        }
        let json = |body: &EventsRequest| serde_json::to_string(body).unwrap();
        RoundBodies { requests, rankings, impressions: json(&shown), actions: json(&done) }
    }

    fn schema(&self) -> &Arc<Schema> {
        &self.labels.schema
    }

    fn surface(&self, row: &Impression) -> String {
        self.schema().surfaces[usize::from(row.surface)].clone()
    }

    fn ranking(&self, rows: &[Impression], time_ms: i64) -> RankRequest {
        let candidate =
            |row: &Impression| RankCandidate { id: row.item.into(), features: BTreeMap::new() };
        RankRequest {
            user: rows[0].user.into(),
            surface: self.surface(&rows[0]),
            candidates: rows.iter().map(candidate).collect(),
            request: Some(rows[0].request),
            time_ms: Some(time_ms),
            limit: None,
            context: self.converter.named(&rows[0].context),
            explain: true,
        }
    }

    fn impression(&self, row: &Impression, time_ms: i64) -> ImpressionBody {
        ImpressionBody {
            id: None,
            request: row.request,
            user: row.user.into(),
            item: row.item.into(),
            surface: self.surface(row),
            time_ms,
            context: self.converter.named(&row.context),
        }
    }

    fn action(&self, row: &Impression, time_ms: i64) -> ActionBody {
        let (schema, outcome) = (self.schema(), &row.outcome);
        let known = |bit: &usize| outcome.known >> bit & 1 == 1;
        let happened = |bit: usize| (schema.actions[bit].clone(), outcome.actions >> bit & 1 == 1);
        let values = schema.values.iter().cloned().zip(outcome.values);
        ActionBody {
            id: None,
            request: row.request,
            item: row.item.into(),
            user: Some(row.user.into()),
            time_ms,
            actions: (0..schema.actions.len()).filter(known).map(happened).collect(),
            values: values.filter(|(_, value)| value.is_finite()).collect(),
            complete: true,
        }
    }
}

/// NE of what a system served, by model and main task.
#[derive(Default)]
pub struct ServedNe(BTreeMap<String, LogLossSums>);

impl ServedNe {
    /// Adds what an answer said of each row, by both tiers.
    pub fn push(&mut self, world: &HonestWorld, rows: &[Impression], answer: &RankAnswer) {
        let said = answer.explain.as_ref().expect("it was asked for");
        for (model, predictions) in [("the FM", &said.fm), ("the expert", &said.expert)] {
            for (name, predictions) in predictions {
                let Some(task) = main_task(world.schema(), name) else { continue };
                assert_eq!(predictions.len(), rows.len(), "{model} {name}");
                let sums = self.0.entry(format!("{name} by {model}")).or_default();
                for (row, &probability) in rows.iter().zip(predictions) {
                    if let Some(label) = world.labels.of_outcome(&row.outcome, row.surface, task) {
                        sums.push(probability, label);
                    }
                }
            }
        }
    }

    /// The names of what is measured.
    pub fn slices(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// NE of a slice.
    pub fn ne(&self, slice: &str) -> f64 {
        self.0[slice].normalized_entropy().expect("both labels are there")
    }

    /// Rows of a slice.
    pub fn rows(&self, slice: &str) -> u64 {
        self.0[slice].count
    }
}

fn main_task(schema: &Schema, name: &str) -> Option<usize> {
    schema.task(name).filter(|&task| schema.tasks[task].role == TaskRole::Main)
}
