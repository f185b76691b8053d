//! An expert in a world, with the questions that a test can ask.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use hypercast_sdk::raw::types::{Column, Data, NamedColumn, OfferedColumn, RankRequest};
use hypercast_sdk::{HostInfo, Prediction, Request, SchemaTask, TaskKind};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::process::{HostError, HostProcess, numbers, read_numbers};
use crate::request::TestRequest;
use crate::world::TestWorld;

/// An expert in the runtime of an installed `hypercast`. Its parameters are random, unless a file
/// of trained ones is given or it was [trained](TestExpert::train).
pub struct TestExpert {
    host: Mutex<HostProcess>,
}

/// A request's candidates in order, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct TestRanking {
    /// The item ids.
    pub items: Vec<u64>,
    /// The index of each item among the request's candidates.
    pub rows: Vec<usize>,
    /// The scores that the expert gave.
    pub scores: Vec<f32>,
    /// The propensities that the expert gave, if it explores.
    pub propensities: Vec<Option<f32>>,
}

/// The first failure of each check that an expert failed: where, what was seen, and what to do.
/// `{:?}` prints the same text as `{}`, so that a test can return it.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} of the checks that every expert must pass failed:\n{}", .0.len(), .0.join("\n"))]
pub struct FailedChecks(pub Vec<String>);

impl fmt::Debug for FailedChecks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TestExpert {
    /// Loads a component as a daemon does.
    ///
    /// # Errors
    /// There is no `hypercast`, or it refuses the component.
    pub fn load(component: impl AsRef<Path>, world: &TestWorld) -> Result<TestExpert, HostError> {
        TestExpert::open(component.as_ref(), world, json!({}))
    }

    /// As [`TestExpert::load`], with the parameters in a file that `cargo hypercast train` wrote.
    ///
    /// # Errors
    /// As there, or the parameters belong to another network.
    pub fn with_parameters(
        component: impl AsRef<Path>,
        parameters: impl AsRef<Path>,
        world: &TestWorld,
    ) -> Result<TestExpert, HostError> {
        let parameters = absolute(parameters.as_ref());
        TestExpert::open(component.as_ref(), world, json!({ "parameters": parameters }))
    }

    /// As [`TestExpert::load`], with the parameters that training begins with: the weights of a
    /// model that was trained elsewhere.
    ///
    /// # Errors
    /// As there.
    pub fn untrained(
        component: impl AsRef<Path>,
        world: &TestWorld,
    ) -> Result<TestExpert, HostError> {
        TestExpert::open(component.as_ref(), world, json!({ "untrained": true }))
    }

    /// As [`TestExpert::load`], for an expert that leaves candidates out on purpose.
    ///
    /// # Errors
    /// As there.
    pub fn that_drops_candidates(
        component: impl AsRef<Path>,
        world: &TestWorld,
    ) -> Result<TestExpert, HostError> {
        TestExpert::open(component.as_ref(), world, json!({ "may_drop_candidates": true }))
    }

    fn open(component: &Path, world: &TestWorld, options: Value) -> Result<TestExpert, HostError> {
        let mut spec = json!(world);
        spec["component"] = json!(absolute(component));
        for (name, value) in options.as_object().into_iter().flatten() {
            spec[name] = value.clone();
        }
        let mut host = HostProcess::start()?;
        host.ask::<Value>(&json!({ "open": spec }))?;
        Ok(TestExpert { host: Mutex::new(host) })
    }

    /// Runs the checks that every expert must pass.
    ///
    /// # Errors
    /// The first failure of each check that fails.
    pub fn check_all(&self) -> Result<(), FailedChecks> {
        let failures = match self.ask::<Vec<String>>(&json!("check_all")) {
            Ok(failures) => failures,
            Err(error) => vec![error.to_string()],
        };
        if failures.is_empty() { Ok(()) } else { Err(FailedChecks(failures)) }
    }

    /// Compares rankings and predictions for a fixed set of requests with those in `file`. If the
    /// environment variable `HYPERCAST_GOLDEN` is `write`, writes the file instead.
    ///
    /// # Errors
    /// The answers differ, the expert faults, or the file cannot be read or written.
    pub fn golden(&self, file: impl AsRef<Path>) -> Result<(), HostError> {
        self.ask(&json!({ "golden": { "file": absolute(file.as_ref()) } }))
    }

    /// Runs the network on a request's candidates. Returns one value per candidate for each task.
    ///
    /// # Errors
    /// The request does not fit the schema, or the call faults.
    pub fn predict(&self, request: &TestRequest) -> Result<BTreeMap<String, Vec<f32>>, HostError> {
        let question = json!({ "predict": { "request": request.value(None) } });
        let predicted: BTreeMap<String, Vec<Option<f32>>> = self.ask(&question)?;
        Ok(predicted.into_iter().map(|(task, values)| (task, read_numbers(values))).collect())
    }

    /// Runs the network, then `rank`, as a daemon does.
    ///
    /// # Errors
    /// As [`TestExpert::predict`].
    pub fn rank(&self, request: &TestRequest, limit: usize) -> Result<TestRanking, HostError> {
        self.ranked(json!({ "request": request.value(Some(limit)) }))
    }

    /// Runs `rank` alone, with the given predictions, to test the value model and the rules.
    ///
    /// # Errors
    /// As [`TestExpert::predict`].
    pub fn rank_with(
        &self,
        request: &TestRequest,
        predictions: &[(&str, Vec<f32>)],
        limit: usize,
    ) -> Result<TestRanking, HostError> {
        let predictions: BTreeMap<&str, Value> =
            predictions.iter().map(|(task, values)| (*task, numbers(values))).collect();
        self.ranked(json!({ "request": request.value(Some(limit)), "predictions": predictions }))
    }

    fn ranked(&self, question: Value) -> Result<TestRanking, HostError> {
        let answer: RankingAnswer = self.ask(&json!({ "rank": question }))?;
        let places = answer.ranking;
        Ok(TestRanking {
            items: places.iter().map(|place| place.id).collect(),
            rows: places.iter().map(|place| place.row).collect(),
            scores: places.iter().map(|place| place.score).collect(),
            propensities: places.iter().map(|place| place.propensity).collect(),
        })
    }

    /// Trains the expert on a simulated log of so many requests, with the host's own trainer and
    /// the expert's hooks.
    ///
    /// # Errors
    /// A hook faults.
    pub fn train(&self, requests: usize) -> Result<(), HostError> {
        self.ask(&json!({ "train": { "requests": requests } }))
    }

    /// The schema as the expert is told it, to build its network without Wasm
    /// ([`hypercast_sdk::build`]) or to call a hook.
    ///
    /// # Panics
    /// The host has ended.
    #[track_caller]
    pub fn host_info(&self) -> HostInfo {
        let answer: InfoAnswer =
            self.ask(&json!("host_info")).unwrap_or_else(|error| panic!("{error}"));
        answer.into()
    }

    /// A request as `rank` gets it, with the network's predictions and the columns that the
    /// description declares, to call the rule without Wasm, where a debugger can stop.
    ///
    /// # Errors
    /// As [`TestExpert::predict`].
    pub fn rank_call(&self, request: &TestRequest, limit: usize) -> Result<Request, HostError> {
        let question = json!({ "rank_call": { "request": request.value(Some(limit)) } });
        Ok(self.ask::<CallAnswer>(&question)?.into())
    }

    fn ask<T: DeserializeOwned>(&self, question: &Value) -> Result<T, HostError> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner).ask(question)
    }
}

/// The process has the folder of the test, but a path in a message is clearer in full.
fn absolute(file: &Path) -> PathBuf {
    std::path::absolute(file).unwrap_or_else(|_| file.into())
}

#[derive(Deserialize)]
struct RankingAnswer {
    ranking: Vec<PlaceAnswer>,
}

#[derive(Deserialize)]
struct PlaceAnswer {
    id: u64,
    row: usize,
    score: f32,
    #[serde(default)]
    propensity: Option<f32>,
}

#[derive(Deserialize)]
struct CallAnswer {
    surface: String,
    user: u64,
    time_ms: i64,
    request: u64,
    seed: u64,
    candidates: Vec<u64>,
    limit: u32,
    predictions: Vec<PredictionAnswer>,
    columns: Vec<ColumnAnswer>,
}

#[derive(Deserialize)]
struct PredictionAnswer {
    task: String,
    values: Vec<Option<f32>>,
}

#[derive(Deserialize)]
struct ColumnAnswer {
    kind: String,
    name: String,
    data: DataAnswer,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum DataAnswer {
    Numbers(Vec<Option<f32>>),
    Ids(Vec<u64>),
    Integers(Vec<i64>),
}

impl From<CallAnswer> for Request {
    fn from(answer: CallAnswer) -> Request {
        let CallAnswer { surface, user, time_ms, request, seed, candidates, limit, .. } = answer;
        let one = |PredictionAnswer { task, values }: PredictionAnswer| Prediction {
            task,
            values: read_numbers(values),
        };
        let column = |ColumnAnswer { kind, name, data }: ColumnAnswer| NamedColumn {
            column: Column { kind, name },
            data: match data {
                DataAnswer::Numbers(values) => Data::Numbers(read_numbers(values)),
                DataAnswer::Ids(values) => Data::Ids(values),
                DataAnswer::Integers(values) => Data::Integers(values),
            },
        };
        Request::new(
            RankRequest { surface, user, time_ms, request, seed, candidates, limit },
            answer.predictions.into_iter().map(one).collect(),
            answer.columns.into_iter().map(column).collect(),
        )
    }
}

#[derive(Deserialize)]
struct InfoAnswer {
    tae_dim: u32,
    surfaces: Vec<String>,
    actions: Vec<String>,
    values: Vec<String>,
    tasks: Vec<TaskAnswer>,
    features: Vec<String>,
    ids: Vec<String>,
    history_ids: Vec<String>,
    columns: Vec<OfferedAnswer>,
}

#[derive(Deserialize)]
struct TaskAnswer {
    name: String,
    is_binary: bool,
    label: String,
    surfaces: Vec<String>,
}

#[derive(Deserialize)]
struct OfferedAnswer {
    kind: String,
    name: String,
    width: u32,
}

impl From<InfoAnswer> for HostInfo {
    fn from(answer: InfoAnswer) -> HostInfo {
        let task = |TaskAnswer { name, is_binary, label, surfaces }: TaskAnswer| {
            let kind = if is_binary { TaskKind::Binary } else { TaskKind::Regression };
            SchemaTask { name, kind, label, surfaces }
        };
        let offered = |OfferedAnswer { kind, name, width }: OfferedAnswer| OfferedColumn {
            kind,
            name,
            width,
        };
        HostInfo {
            tae_dim: answer.tae_dim,
            surfaces: answer.surfaces,
            actions: answer.actions,
            values: answer.values,
            tasks: answer.tasks.into_iter().map(task).collect(),
            features: answer.features,
            ids: answer.ids,
            history_ids: answer.history_ids,
            columns: answer.columns.into_iter().map(offered).collect(),
        }
    }
}
