//! Answers questions about one expert, a line of JSON each: what an installed `hypercast` does for
//! `hypercast-testkit`, so that tests outside this repository link no part of the host.
//!
//! A question is a [`Question`]; its answer is `{"ok": ...}` or `{"error": "..."}`. The first one
//! opens the expert. A number that is NaN is null.

use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::cases::Case;
use crate::contract::{self, Data, HostInfo, NamedColumn, Prediction, RankRequest, TaskKind};
use crate::harness::{Harness, Ranking};
use crate::request_spec::{RankedCandidate, RankedSpec, RequestSpec};
use crate::runtime::RankCall;
use crate::world::World;

/// The longest question, in bytes.
const QUESTION_BYTES: u64 = 64 << 20;

/// The expert to test, and the world to test it in. What is missing is as in [`World::default`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorldSpec {
    /// The component.
    pub component: PathBuf,
    /// The `schema.toml` of a data set.
    pub schema: Option<PathBuf>,
    /// Parameters that `hypercast plugin train` wrote; random ones if missing.
    pub parameters: Option<PathBuf>,
    /// Whether parameters are those that training begins with, in place of random ones.
    pub untrained: bool,
    /// Values of an embedding, 0 without a foundation model.
    pub tae_dim: Option<usize>,
    /// Values of the items' content vectors.
    pub content_dim: Option<usize>,
    /// What users, items and outcomes are generated from.
    pub seed: Option<u64>,
    /// The version of the FM.
    pub fm_version: Option<String>,
    /// The most candidates of a request.
    pub max_candidates: Option<usize>,
    /// The limit of FLOPs per candidate.
    pub max_flops: Option<u64>,
    /// The deadline of a call, in milliseconds.
    pub deadline_ms: Option<u32>,
    /// Whether a ranking may leave candidates out.
    pub may_drop_candidates: bool,
}

/// What can be asked.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Question {
    Open(WorldSpec),
    CheckAll,
    Golden { file: PathBuf },
    Predict { request: RequestSpec },
    Rank { request: RequestSpec, predictions: Option<BTreeMap<String, Vec<Option<f32>>>> },
    RankCall { request: RequestSpec },
    HostInfo,
    Train { requests: usize },
}

/// Answers one question a line until the input ends.
///
/// # Errors
/// Input or output fails.
pub fn serve(mut input: impl BufRead, mut output: impl Write) -> std::io::Result<()> {
    let mut open = None;
    loop {
        let mut line = String::new();
        if input.by_ref().take(QUESTION_BYTES).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = serde_json::from_str(&line)
            .map_err(|why| format!("this `hypercast` cannot answer that: {why}"))
            .and_then(|question| answer(question, &mut open));
        let answer = match answer {
            Ok(answer) => json!({ "ok": answer }),
            Err(why) => json!({ "error": why }),
        };
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
}

fn answer(question: Question, open: &mut Option<Harness>) -> Result<Value, String> {
    if let Question::Open(spec) = &question {
        let opened = open.insert(spec.load()?);
        return Ok(described(opened));
    }
    let harness = open.as_mut().ok_or("open an expert first")?;
    Ok(match question {
        Question::Open(_) => Value::Null,
        Question::CheckAll => {
            let failures = harness.check_all().err().map_or(Vec::new(), |failures| failures.0);
            json!(failures.iter().map(|failure| failure.to_string()).collect::<Vec<_>>())
        }
        Question::Golden { file } => {
            harness.golden(&file).map_err(|failure| failure.to_string())?;
            Value::Null
        }
        Question::Predict { request } => {
            let predictions = harness.predict(&harness.requested(&request)?)?;
            let by_task = predictions.tasks.into_iter().map(|one| (one.task, json!(one.values)));
            Value::Object(by_task.collect())
        }
        Question::Rank { request, predictions } => {
            let predictions = predictions.map(given);
            json!(harness.rank_spec(&request, predictions)?)
        }
        Question::RankCall { request } => {
            let case = harness.requested(&request)?;
            let predictions = harness.predict(&case)?.for_rank().into_owned();
            call_value(harness.call(&case, predictions, limit(&request, &case)))
        }
        Question::HostInfo => info_value(&harness.info),
        Question::Train { requests } => {
            let log = harness.world.log(requests, &harness.surfaces());
            *harness = harness.clone().trained(&log).map_err(|error| error.to_string())?;
            Value::Null
        }
    })
}

impl WorldSpec {
    /// Loads the expert.
    ///
    /// # Errors
    /// Why the host refuses it, or a file that cannot be read.
    pub fn load(&self) -> Result<Harness, String> {
        let world = match &self.schema {
            Some(file) => World::from_file(file).map_err(|error| error.to_string())?,
            None => World::default(),
        };
        let world = world
            .tae_dim(self.tae_dim.unwrap_or(64))
            .content_dim(self.content_dim.unwrap_or(0))
            .seed(self.seed.unwrap_or(1));
        let world = match &self.fm_version {
            Some(version) => world.fm_version(version),
            None => world,
        };
        let world = self.max_candidates.into_iter().fold(world, World::max_candidates);
        let world = self.max_flops.into_iter().fold(world, World::max_flops);
        let world = self.deadline_ms.into_iter().fold(world, World::deadline_ms);
        let harness = world.component(&self.component).map_err(|error| error.to_string())?;
        let harness =
            if self.may_drop_candidates { harness.may_drop_candidates() } else { harness };
        if self.untrained {
            return harness.untrained().map_err(|error| error.to_string());
        }
        let with_file = |file: &Path| harness.clone().parameters(file);
        let trained = self.parameters.as_deref().map(with_file).transpose();
        Ok(trained.map_err(|error| error.to_string())?.unwrap_or(harness))
    }
}

impl Harness {
    /// Runs the expert on a request in JSON, with its own predictions or with given ones.
    ///
    /// # Errors
    /// The request does not fit the schema, or the expert faults.
    pub fn rank_spec(
        &self,
        spec: &RequestSpec,
        given: Option<Vec<Prediction>>,
    ) -> Result<RankedSpec, String> {
        let case = self.requested(spec)?;
        let predictions = match given {
            Some(given) => given,
            None => self.predict(&case)?.for_rank().into_owned(),
        };
        let ranking = self.rank_by(&case, predictions.clone(), limit(spec, &case))?;
        let Ranking { items, rows, scores, propensities } = ranking;
        let place = |at: usize| {
            let of_task = |one: &Prediction| {
                (one.task.clone(), one.values.get(rows[at]).copied().unwrap_or(f32::NAN))
            };
            RankedCandidate {
                id: items[at],
                row: rows[at],
                score: scores[at],
                propensity: propensities[at],
                predictions: predictions.iter().map(of_task).collect(),
            }
        };
        Ok(RankedSpec { ranking: (0..rows.len()).map(place).collect() })
    }

    /// The request of a specification, by default on the first surface that the expert serves.
    fn requested(&self, spec: &RequestSpec) -> Result<Case, String> {
        let first = self.surfaces().first().map(|index| usize::from(*index));
        spec.build(&self.world, first.map(|index| self.info.surfaces[index].as_str()))
    }
}

fn limit(spec: &RequestSpec, case: &Case) -> usize {
    spec.limit.unwrap_or(usize::MAX).min(case.candidates())
}

fn given(predictions: BTreeMap<String, Vec<Option<f32>>>) -> Vec<Prediction> {
    let number = |value: Option<f32>| value.unwrap_or(f32::NAN);
    let one = |(task, values): (String, Vec<Option<f32>>)| Prediction {
        task,
        values: values.into_iter().map(number).collect(),
    };
    predictions.into_iter().map(one).collect()
}

fn described(harness: &Harness) -> Value {
    let description = harness.description();
    let tasks: Vec<&str> = description.tasks.iter().map(|task| task.name.as_str()).collect();
    json!({
        "name": description.name,
        "version": description.version,
        "tasks": tasks,
        "contract": contract::VERSION,
    })
}

/// The arguments of `rank`, under the names that `expert.wit` gives them.
fn call_value(call: RankCall) -> Value {
    let RankCall { request, predictions, columns } = call;
    let RankRequest { surface, user, time_ms, request, seed, candidates, limit } = request;
    let prediction = |one: Prediction| json!({ "task": one.task, "values": one.values });
    let column = |NamedColumn { column, data }: NamedColumn| {
        let data = match data {
            Data::Numbers(values) => json!({ "numbers": values }),
            Data::Ids(values) => json!({ "ids": values }),
            Data::Integers(values) => json!({ "integers": values }),
        };
        json!({ "kind": column.kind, "name": column.name, "data": data })
    };
    json!({
        "surface": surface,
        "user": user,
        "time_ms": time_ms,
        "request": request,
        "seed": seed,
        "candidates": candidates,
        "limit": limit,
        "predictions": predictions.into_iter().map(prediction).collect::<Vec<_>>(),
        "columns": columns.into_iter().map(column).collect::<Vec<_>>(),
    })
}

/// The schema as an expert is told it, under the names of `expert.wit`.
fn info_value(info: &HostInfo) -> Value {
    let HostInfo { tae_dim, surfaces, actions, values, tasks, features, ids, history_ids, columns } =
        info;
    let task = |task: &contract::SchemaTask| {
        let is_binary = matches!(task.kind, TaskKind::Binary);
        json!({
            "name": task.name,
            "is_binary": is_binary,
            "label": task.label,
            "surfaces": task.surfaces,
        })
    };
    let offered = |column: &contract::OfferedColumn| json!({ "kind": column.kind, "name": column.name, "width": column.width });
    json!({
        "tae_dim": tae_dim,
        "surfaces": surfaces,
        "actions": actions,
        "values": values,
        "tasks": tasks.iter().map(task).collect::<Vec<_>>(),
        "features": features,
        "ids": ids,
        "history_ids": history_ids,
        "columns": columns.iter().map(offered).collect::<Vec<_>>(),
    })
}
