//! An expert as it is served: plugin, graph, parameters and device together.
//!
//! A [`Blueprint`] is a plugin whose description and graph were checked against
//! a schema; trainer and server build on it. An [`Expert`] adds trained
//! parameters and answers requests. Whatever a guest or its network does wrong
//! comes back as [`RankOutcome::Degraded`]: the caller answers with the FM's
//! own ranking. Calls are synchronous; run them on blocking threads.

use std::borrow::Borrow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypercast_fm::example::Example;

use super::batch::{Columns, ExpertBatch, Tae};
use super::breaker::{Breaker, BreakerConfig, BreakerState, Lost};
use super::counters::{Counters, CountersSnapshot};
use super::gate::Pass;
use super::graph::{Graph, GraphLimits};
use super::network::{Network, network};
use super::normalise::Normaliser;
use super::params::{Parameters, Provenance, SavedParameters, hash_text};
use super::pool::Pool;
use super::train::prediction;
use super::wasm::contract::{self, Description, HostInfo, Prediction, RankRequest, Ranked};
use super::wasm::{Call, Engine, ExpertFault, Fault, Limits, Plugin};
use super::{Device, Error};
use hypercast_data::schema::Schema;

/// What an expert is loaded for, and how much it may use.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Limits of guest calls.
    pub limits: Limits,
    /// Limits of the graph.
    pub graph_limits: GraphLimits,
    /// The width of the FM's TAE; 0 without an FM.
    pub tae_dim: usize,
    /// The FM's version (semver), which the description's `fm-version` must
    /// accept; `None` without an FM.
    pub fm_version: Option<String>,
}

/// A plugin whose description and graph fit a schema.
pub struct Blueprint {
    /// The component.
    pub plugin: Plugin,
    /// What it says of itself.
    pub description: Description,
    /// What it was told.
    pub info: HostInfo,
    /// Its checked network.
    pub graph: Arc<Graph>,
    /// Its columns, resolved against the schema.
    pub columns: Columns,
    fm_version: String,
}

impl Blueprint {
    /// Loads and checks the component at `path`.
    pub fn load(
        engine: &Engine,
        path: &Path,
        schema: &Schema,
        options: &LoadOptions,
    ) -> Result<Blueprint, Error> {
        Blueprint::new(Plugin::load(engine, path, &options.limits)?, schema, options)
    }

    /// Asks `plugin` for its description and network, and checks both.
    pub fn new(
        mut plugin: Plugin,
        schema: &Schema,
        options: &LoadOptions,
    ) -> Result<Blueprint, Error> {
        let info = contract::host_info(schema, options.tae_dim);
        let description = plugin.describe(&info)?;
        check_fm_version(&description, options.fm_version.as_deref())?;
        let network = plugin.network(&info)?;
        let graph = Arc::new(Graph::new(&description, &network, &info, &options.graph_limits)?);
        let columns = Columns::new(&description, schema, options.tae_dim)?;
        let fm_version = options.fm_version.clone().unwrap_or_default();
        Ok(Blueprint { plugin, description, info, graph, columns, fm_version })
    }

    /// Fresh parameters for training, with the standardisation of its log.
    pub fn init_parameters(&self, normaliser: Normaliser, seed: u64) -> Parameters {
        let provenance = Provenance {
            plugin: self.description.name.clone(),
            plugin_version: self.description.version.clone(),
            contract: contract::VERSION.to_owned(),
            graph: hash_text(&self.graph),
            fm_version: self.fm_version.clone(),
            tae_dim: self.columns.tae_dim(),
            tasks: self.description.tasks.iter().map(|task| task.name.clone()).collect(),
            trained_rows: 0,
            trained_until_ms: 0,
            normaliser,
        };
        Parameters::init(&self.graph, provenance, seed)
    }

    /// The parameters of a file, which must be those of this very network and FM.
    pub fn restore(&self, path: &Path) -> Result<Parameters, Error> {
        let trained = Parameters::restore(&self.graph, SavedParameters::read(path)?)?;
        let found = &trained.provenance;
        if (found.fm_version.as_str(), found.tae_dim) != (&self.fm_version, self.columns.tae_dim())
        {
            let why = format!(
                "it was trained on TAEs of FM `{}` with {} values, and this FM is `{}` with {}; train the expert on this FM's log",
                found.fm_version,
                found.tae_dim,
                self.fm_version,
                self.columns.tae_dim()
            );
            return Err(Error::Parameters { path: path.to_path_buf(), why });
        }
        if found.normaliser.names != self.columns.feature_names() {
            let why = "it was trained with other numeric features than the schema has; train the expert again".to_owned();
            return Err(Error::Parameters { path: path.to_path_buf(), why });
        }
        Ok(trained)
    }

    /// Whether the expert can serve `surface`.
    pub fn serves(&self, surface: &str) -> bool {
        self.description.surfaces.is_empty()
            || self.description.surfaces.iter().any(|served| served == surface)
    }

    /// Splits outputs `[rows, tasks]` into predictions a task.
    pub(crate) fn predictions(&self, outputs: &[f32]) -> Vec<Vec<f32>> {
        let tasks = &self.description.tasks;
        let column = |index: usize| outputs.iter().skip(index).step_by(tasks.len());
        let of_task = |index: usize| {
            column(index).map(|output| prediction(tasks[index].kind, *output)).collect()
        };
        (0..tasks.len()).map(of_task).collect()
    }
}

fn check_fm_version(description: &Description, fm_version: Option<&str>) -> Result<(), Error> {
    let refused = |why| Err(Error::refused(&description.name, why));
    let wanted = description.fm_version.as_str();
    let Ok(requirement) = semver::VersionReq::parse(wanted) else {
        return refused(format!(
            "its fm-version `{}` is no semver requirement (use `*` for any)",
            wanted.escape_debug()
        ));
    };
    let Some(found) = fm_version else {
        return Ok(());
    };
    match semver::Version::parse(found) {
        Ok(version) if requirement == semver::VersionReq::STAR || requirement.matches(&version) => {
            Ok(())
        }
        Ok(_) => refused(format!("it accepts FM versions `{wanted}`, and this FM is {found}")),
        Err(error) => refused(format!("the FM's version `{found}` is no semver version: {error}")),
    }
}

/// Predictions of one request or batch.
#[derive(Debug, Clone)]
pub struct Predictions {
    /// One a task, in the description's order: probabilities of binary tasks,
    /// values of regressions; one value a row.
    pub tasks: Vec<Prediction>,
}

impl Predictions {
    /// The values of a task.
    pub fn task(&self, name: &str) -> Option<&[f32]> {
        self.tasks
            .iter()
            .find(|prediction| prediction.task == name)
            .map(|prediction| prediction.values.as_slice())
    }
}

/// What came of a request.
#[derive(Debug, Clone)]
pub enum RankOutcome {
    /// The expert's answer.
    Ranked {
        /// Candidates in order, best first; at most the limit, at least one.
        ranked: Vec<Ranked>,
        /// The predictions it was made from.
        predictions: Predictions,
    },
    /// The expert failed: answer with the FM's ranking, marked degraded.
    Degraded(ExpertFault),
}

/// How long a request took, by stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertTimes {
    /// Building the batch and running the network.
    pub network: Duration,
    /// Preparing and running `rank` in Wasm.
    pub wasm: Duration,
}

/// A trained expert.
pub struct Expert {
    blueprint: Arc<Blueprint>,
    network: Box<dyn Network>,
    batches: Pool<ExpertBatch>,
    provenance: Provenance,
    breaker: Arc<Breaker>,
    counters: Arc<Counters>,
}

impl Expert {
    /// Puts trained parameters on `device`.
    pub fn new(
        blueprint: Arc<Blueprint>,
        parameters: Parameters,
        device: Device,
        breaker: BreakerConfig,
    ) -> Result<Expert, Error> {
        let provenance = parameters.provenance.clone();
        let network = network(blueprint.graph.clone(), parameters, device)?;
        Ok(Expert {
            blueprint,
            network,
            batches: Pool::default(),
            provenance,
            breaker: Arc::new(Breaker::new(breaker)),
            counters: Arc::default(),
        })
    }

    /// The same expert with newer parameters: its breaker and counters go on.
    pub fn renewed(&self, parameters: Parameters, device: Device) -> Result<Expert, Error> {
        let provenance = parameters.provenance.clone();
        Ok(Expert {
            blueprint: self.blueprint.clone(),
            network: network(self.blueprint.graph.clone(), parameters, device)?,
            batches: Pool::default(),
            provenance,
            breaker: self.breaker.clone(),
            counters: self.counters.clone(),
        })
    }

    /// As `new`, with the parameters of a file, which must be those of this
    /// very network and FM.
    pub fn open(
        blueprint: Arc<Blueprint>,
        parameters: &Path,
        device: Device,
        breaker: BreakerConfig,
    ) -> Result<Expert, Error> {
        let trained = blueprint.restore(parameters)?;
        Expert::new(blueprint, trained, device, breaker)
    }

    /// The expert's plugin, description and graph.
    pub fn blueprint(&self) -> &Arc<Blueprint> {
        &self.blueprint
    }

    /// What its parameters were trained from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// The plugin's name.
    pub fn name(&self) -> &str {
        &self.blueprint.description.name
    }

    /// The plugin's version.
    pub fn version(&self) -> &str {
        &self.blueprint.description.version
    }

    /// Requests and faults so far.
    pub fn counters(&self) -> CountersSnapshot {
        self.counters.snapshot()
    }

    /// The breaker's state.
    pub fn breaker_state(&self) -> BreakerState {
        self.breaker.state()
    }

    /// Predictions for every target of `examples`, in order. A prediction that
    /// is not finite is a fault.
    pub fn predict<E: Borrow<Example>>(
        &self,
        examples: &[E],
        tae: Tae,
    ) -> Result<Predictions, ExpertFault> {
        let outputs = self.batches.with(|batch| {
            self.blueprint.columns.fill(batch, examples, tae, &self.provenance.normaliser);
            if batch.rows == 0 { Vec::new() } else { self.network.outputs(batch) }
        });
        let values = self.blueprint.predictions(&outputs);
        let tasks = self.blueprint.description.tasks.iter().zip(values);
        let tasks: Vec<Prediction> =
            tasks.map(|(task, values)| Prediction { task: task.name.clone(), values }).collect();
        for prediction in &tasks {
            if let Some(row) = prediction.values.iter().position(|value| !value.is_finite()) {
                let why = format!(
                    "task `{}`, row {row}: prediction {}",
                    prediction.task, prediction.values[row]
                );
                return Err(self.fault(Call::Predict, Fault::BadOutput(why)));
            }
        }
        Ok(Predictions { tasks })
    }

    /// Lets the plugin order the request's candidates. It does not ask the
    /// breaker: see [`Expert::serve`].
    pub fn rank(
        &self,
        example: &Example,
        tae: Tae,
        predictions: &Predictions,
        limit: usize,
    ) -> Result<Vec<Ranked>, ExpertFault> {
        let columns = self.blueprint.columns.rank_columns(example, tae);
        let request = RankRequest {
            surface: self
                .blueprint
                .info
                .surfaces
                .get(usize::from(example.surface))
                .cloned()
                .unwrap_or_default(),
            user: example.user.id,
            time_ms: example.time_ms,
            candidates: example.targets.iter().map(|target| target.item.id).collect(),
            limit: limit.min(example.targets.len()) as u32,
        };
        self.blueprint.plugin.rank(&request, &predictions.tasks, &columns)
    }

    /// Answers one request: breaker, fair threads, network, `rank`, counters. `tae` is the
    /// FM's `[candidates, tae_dim]`; `limit` is how many candidates are wanted.
    pub fn serve(&self, example: &Example, tae: Tae, limit: usize) -> (RankOutcome, ExpertTimes) {
        let start = Instant::now();
        let mut times = ExpertTimes::default();
        let pass = match self.enter(start) {
            Ok(pass) => pass,
            Err(cause) => return (self.degraded(self.fault(Call::Rank, cause)), times),
        };
        let predictions = self.predict(&[example], tae);
        times.network = start.elapsed();
        self.counters.network(times.network);
        let answer = predictions.and_then(|predictions| {
            let start = Instant::now();
            let ranked = self.rank(example, tae, &predictions, limit);
            times.wasm = start.elapsed();
            Ok((ranked?, predictions))
        });
        match answer {
            Ok((ranked, predictions)) => {
                self.breaker.success(Instant::now());
                self.counters.ranked();
                (RankOutcome::Ranked { ranked, predictions }, times)
            }
            Err(fault) => {
                let lost = pass.lost(&self.blueprint.plugin.limits().gate);
                (self.failed(fault, lost), times)
            }
        }
    }

    /// Makes ready what the next request would wait for, unless the plugin is left alone.
    pub fn prepare(&self) {
        if self.breaker.state() == BreakerState::Closed {
            self.blueprint.plugin.prepare();
        }
    }

    /// The gate first: a breaker's one try must not be spent on a call that is not made.
    fn enter(&self, now: Instant) -> Result<Pass<'_>, Fault> {
        let plugin = &self.blueprint.plugin;
        let pass = plugin.gate().enter(&plugin.limits().gate).map_err(Fault::Busy)?;
        if self.breaker.admit(now) { Ok(pass) } else { Err(Fault::Open) }
    }

    fn failed(&self, fault: ExpertFault, took: Duration) -> RankOutcome {
        let at = Instant::now();
        // A busy pool says nothing of the plugin, and costs nobody time.
        if !matches!(fault.cause, Fault::Busy(_)) {
            self.breaker.fault(Lost { at, took });
        }
        self.counters.tell(&fault, at);
        self.degraded(fault)
    }

    fn degraded(&self, fault: ExpertFault) -> RankOutcome {
        self.counters.fault(&fault.cause);
        RankOutcome::Degraded(fault)
    }

    fn fault(&self, call: Call, cause: Fault) -> ExpertFault {
        ExpertFault { plugin: self.name().to_owned(), call, cause, trace: Vec::new() }
    }
}
