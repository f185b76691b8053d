//! An expert as it serves: plugin, graph, parameters and device together.
//!
//! A [`Blueprint`] is a plugin whose description and graph were checked against a schema; trainer
//! and server build on it. A [`ServedExpert`] adds trained parameters and answers requests. Every
//! fault of a guest or its network becomes [`RankOutcome::Degraded`], and the caller answers with
//! the FM's ranking. Calls are synchronous: run them on blocking threads.

use std::borrow::{Borrow, Cow};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypercast_data::schema::Schema;
use hypercast_fm::example::Example;
use hypercast_fm::label_scale::{LabelScale, LabelScales};

use super::batch::{ExpertBatch, ExpertColumns};
use super::breaker::{Breaker, BreakerConfig, BreakerState, FailedCall};
use super::counters::{CountersSnapshot, ExpertCounters};
use super::cpu_budget::ThreadPermit;
use super::fm_rows::FmRows;
use super::graph::{ExpertGraph, GraphLimits, NetworkUse};
use super::network::{BufferPool, ServingNetwork, network};
use super::normalise::Normaliser;
use super::params::{Parameters, Provenance, SavedParameters};
use super::train::prediction;
use super::wasm::contract::{
    self, Description, HostInfo, HostSchema, Prediction, Ranked, Task, TaskKind, VectorWidths,
};
use super::wasm::{Call, Engine, ExpertFault, Fault, Limits, Plugin};
use super::{Device, Error};

/// The FM that an expert is loaded for, and the expert's limits.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The name under which the expert is registered, and its log lines are kept; `None` keeps them
    /// under the plugin's own name, which a plugin chooses itself.
    pub registered: Option<String>,
    /// Limits of the guest's calls.
    pub limits: Limits,
    /// Size and cost of the graph.
    pub graph_limits: GraphLimits,
    /// The FM's number of TAE values a target; 0 without an FM.
    pub tae_dim: usize,
    /// The number of values of the items' content vectors; 0 without any.
    pub content_dim: usize,
    /// The FM's version (semver), which the description's `fm-version` must accept; `None` without
    /// an FM.
    pub fm_version: Option<String>,
    /// Offers no predictions of the FM, to see what its embedding alone carries.
    pub without_fm_logits: bool,
}

impl LoadOptions {
    /// The widths of the vectors that experts read.
    pub fn vectors(&self) -> VectorWidths {
        VectorWidths { tae: self.tae_dim, content: self.content_dim }
    }
}

/// A plugin whose description and graph fit a schema.
pub struct Blueprint {
    /// The component, ready for calls.
    pub plugin: Plugin,
    /// The result of the plugin's `describe`.
    pub description: Description,
    /// The host's schema and FM, as the plugin sees them.
    pub info: HostInfo,
    /// The plugin's network after all checks.
    pub graph: Arc<ExpertGraph>,
    /// The description's columns, resolved against the schema.
    pub columns: ExpertColumns,
    /// The scales on which tasks begin to learn.
    scales: LabelScales,
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

    /// Gets the description and network of `plugin` and checks both.
    pub fn new(plugin: Plugin, schema: &Schema, options: &LoadOptions) -> Result<Blueprint, Error> {
        Blueprint::as_of(plugin, schema, schema, options)
    }

    /// The same of a plugin that is told an earlier layout of the schema, so that its network is
    /// the one that was trained then. It reads its columns where they are now, and is told the
    /// names of all surfaces from then on.
    pub fn as_of(
        mut plugin: Plugin,
        layout: &Schema,
        schema: &Schema,
        options: &LoadOptions,
    ) -> Result<Blueprint, Error> {
        if let Some(registered) = &options.registered {
            plugin.keep_log_under(registered);
        }
        let surface = own_surface(&plugin, layout, schema, options.vectors())?;
        let mut host = HostSchema::on(surface.as_deref(), layout, options.vectors());
        plugin.limit(&mut host.info);
        if options.without_fm_logits {
            contract::withhold_fm_logits(&mut host.info);
        }
        let description = plugin.describe(&host.info)?;
        let told = description.only_surface() == surface.as_deref();
        if !schema.owned.is_empty() && !told {
            let why = "the surfaces of its description depend on what it is told: let it name the \
                       same ones whatever the host has";
            return Err(Error::refused(&description.name, why));
        }
        check_fm_version(&description.fm_version, options.fm_version.as_deref())
            .map_err(|why| Error::refused(&description.name, why))?;
        let network = plugin.network(&host.info)?;
        let graph =
            Arc::new(ExpertGraph::new(&description, &network, &host, &options.graph_limits)?);
        let actions = host.info.actions.len();
        let columns = ExpertColumns::as_of(&description, actions, schema, options.vectors())?;
        // Its network is known now, and requests may be of surfaces that are new since.
        host.info.surfaces.clone_from(&schema.surfaces);
        let fm_version = options.fm_version.clone().unwrap_or_default();
        let scales = fresh_scales(&description, schema, &graph);
        Ok(Blueprint { plugin, description, info: host.info, graph, columns, scales, fm_version })
    }

    /// Fresh parameters for training on a log with the statistics `normaliser`.
    pub fn init_parameters(&self, normaliser: Normaliser, seed: u64) -> Parameters {
        let fm_version = &self.fm_version;
        let tae_dim = self.columns.tae_dim();
        let mut provenance =
            Provenance::new(&self.description, &self.graph, fm_version, tae_dim, normaliser);
        provenance.contract = self.plugin.contract().version().to_owned();
        provenance.labels = self.scales.clone();
        Parameters::init(&self.graph, provenance, seed)
    }

    /// The parameters of a file of exactly this network and FM.
    pub fn restore(&self, saved: SavedParameters) -> Result<Parameters, Error> {
        let path = saved.path().to_path_buf();
        let mut trained = Parameters::restore(&self.graph, saved)?;
        let found = &trained.provenance;
        let tae_dim = self.columns.tae_dim();
        let why = if (found.fm_version.as_str(), found.tae_dim) != (&self.fm_version, tae_dim) {
            format!(
                "it was trained on TAEs of FM `{}` with {} values, and this FM is `{}` with \
                 {tae_dim}; train the expert on this FM's log",
                found.fm_version, found.tae_dim, self.fm_version,
            )
        } else if let Some(grown) = found.normaliser.grown(self.columns.feature_names()) {
            trained.provenance.normaliser = grown;
            return Ok(trained);
        } else {
            "it was trained with numeric features that the schema lacks; train the expert again"
                .to_owned()
        };
        Err(Error::Parameters { path, why })
    }

    /// Checks the network's memory for another use than to serve as it was loaded to: to serve
    /// larger requests, or to be trained.
    ///
    /// # Errors
    /// It needs more than `limit` bytes.
    pub fn check_memory(&self, usage: &NetworkUse, limit: u64) -> Result<(), Error> {
        let checked = self.graph.check_memory(&self.description, usage, limit);
        checked.map(drop).map_err(|why| Error::misfit(&self.description.name, why))
    }

    /// Floating-point operations of its network for a candidate, with its share of a full short
    /// history.
    pub fn flops(&self) -> u64 {
        self.graph.cost.per_candidate(self.description.history_len)
    }

    /// Whether the expert can serve `surface`.
    pub fn serves(&self, surface: &str) -> bool {
        self.description.surfaces.is_empty()
            || self.description.surfaces.iter().any(|served| served == surface)
    }
}

/// The scales of the tasks. A network that bounds a task's outputs itself, or says that they are
/// whole, has them where they are to be, so that task has no scale.
pub(crate) fn fresh_scales(
    description: &Description,
    schema: &Schema,
    graph: &ExpertGraph,
) -> LabelScales {
    let tasks = description.tasks.iter().enumerate();
    let scaled = tasks.filter(|(index, _)| {
        !graph.whole_outputs[*index] && !graph.is_bounded(graph.outputs[*index])
    });
    let scale = |(_, task): (usize, &Task)| {
        let declared = schema.task(&task.name).map(|index| schema.tasks[index].transform);
        let scale = match task.kind {
            TaskKind::Binary => LabelScale::of_rate(),
            TaskKind::Regression => LabelScale::of_value(declared.unwrap_or_default()),
        };
        (task.name.clone(), scale)
    };
    scaled.map(scale).collect()
}

/// The surface that a plugin serves, if it serves one alone. It is asked with the core; one that
/// fails without what belongs to its surface is asked with that of each surface. Where nothing
/// belongs to any, it is not asked.
fn own_surface(
    plugin: &Plugin,
    layout: &Schema,
    schema: &Schema,
    vectors: VectorWidths,
) -> Result<Option<String>, Error> {
    if schema.owned.is_empty() {
        return Ok(None);
    }
    let declared = |surface: Option<&str>| {
        let mut host = HostSchema::on(surface, layout, vectors);
        plugin.limit(&mut host.info);
        plugin.declared(&host.info)
    };
    let description = declared(None).or_else(|error| {
        let on = |surface: &String| declared(Some(surface)).ok();
        let mut all = layout.owned.keys().filter_map(|surface| Some((surface, on(surface)?)));
        let own = all.find(|(surface, own)| own.only_surface() == Some(surface));
        own.map(|(_, description)| description).ok_or(error)
    })?;
    description.check_owners(schema).map_err(|why| Error::refused(&description.name, why))?;
    Ok(description.only_surface().map(str::to_owned))
}

fn check_fm_version(wanted: &str, fm_version: Option<&str>) -> Result<(), String> {
    let requirement = semver::VersionReq::parse(wanted).map_err(|_| {
        let wanted = wanted.escape_debug();
        format!("its fm-version `{wanted}` is no semver requirement (use `*` for any)")
    })?;
    let Some(found) = fm_version else { return Ok(()) };
    let version = semver::Version::parse(found)
        .map_err(|error| format!("the FM's version `{found}` is no semver version: {error}"))?;
    let fits = requirement == semver::VersionReq::STAR || requirement.matches(&version);
    refuse_if!(!fits, "it accepts FM versions `{wanted}`, and this FM is {found}");
    Ok(())
}

/// The predictions of one request or batch.
#[derive(Debug, Clone)]
pub struct ExpertPredictions {
    /// For each task, in the description's order, a value a row: the probability of a binary task,
    /// the value of a regression in the unit of its label.
    pub tasks: Vec<Prediction>,
    /// The ranking scores of the tasks that have one, under the names of [`contract::score_name`].
    pub scores: Vec<Prediction>,
}

impl ExpertPredictions {
    /// The predictions of what a network computes of rows, `[rows, graph.predicted()]`, whose
    /// outputs are on `scales`.
    pub fn new(
        graph: &ExpertGraph,
        tasks: &[Task],
        scales: &LabelScales,
        outputs: &[f32],
    ) -> ExpertPredictions {
        let scored = tasks.iter().zip(&graph.scores).filter(|(_, score)| score.is_some());
        let scored: Vec<&Task> = scored.map(|(task, _)| task).collect();
        let column = |index: usize| outputs.iter().skip(index).step_by(tasks.len() + scored.len());
        let of_task = |(index, task): (usize, &Task)| {
            let value = |output: &f32| match scales.get(&task.name) {
                Some(scale) => scale.prediction(*output),
                None => prediction(task.kind, *output),
            };
            Prediction { task: task.name.clone(), values: column(index).map(value).collect() }
        };
        let score = |(index, task): (usize, &&Task)| Prediction {
            task: contract::score_name(&task.name),
            values: column(tasks.len() + index).copied().collect(),
        };
        ExpertPredictions {
            tasks: tasks.iter().enumerate().map(of_task).collect(),
            scores: scored.iter().enumerate().map(score).collect(),
        }
    }

    /// What `rank` reads: the predictions of the tasks, then the ranking scores.
    pub fn for_rank(&self) -> Cow<'_, [Prediction]> {
        let ExpertPredictions { tasks, scores } = self;
        if scores.is_empty() { tasks.into() } else { [tasks.as_slice(), scores].concat().into() }
    }

    /// The ranking score of the task `name`, one a row; none if the network has none.
    pub fn score(&self, name: &str) -> Option<&[f32]> {
        let name = contract::score_name(name);
        let score = self.scores.iter().find(|score| score.task == name)?;
        Some(&score.values)
    }

    /// The values of the task `name`, one a row.
    pub fn task(&self, name: &str) -> Option<&[f32]> {
        let prediction = self.tasks.iter().find(|prediction| prediction.task == name)?;
        Some(&prediction.values)
    }
}

/// The result of a request.
#[derive(Debug, Clone)]
pub enum RankOutcome {
    /// The expert ranked the candidates.
    Ranked {
        /// The candidates, best first: at least one, at most the limit.
        ranked: Vec<Ranked>,
        /// The network's predictions, the input of `rank`.
        predictions: ExpertPredictions,
    },
    /// The expert failed. The caller answers with the FM's ranking, marked as degraded.
    Degraded(ExpertFault),
}

/// The wall-clock time of a request's stages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertTimes {
    /// Building the batch and running the network.
    pub network: Duration,
    /// Preparing and running `rank` in Wasm.
    pub wasm: Duration,
}

/// A trained expert that answers requests.
pub struct ServedExpert {
    blueprint: Arc<Blueprint>,
    network: Box<dyn ServingNetwork>,
    batches: BufferPool<ExpertBatch>,
    provenance: Provenance,
    breaker: Arc<Breaker>,
    counters: Arc<ExpertCounters>,
}

impl ServedExpert {
    /// Puts trained parameters on `device`.
    pub fn new(
        blueprint: Arc<Blueprint>,
        parameters: Parameters,
        device: Device,
        breaker: BreakerConfig,
    ) -> Result<ServedExpert, Error> {
        let breaker = Arc::new(Breaker::new(breaker));
        ServedExpert::with(blueprint, parameters, device, breaker, Arc::default())
    }

    /// The same expert with newer parameters. Both share one breaker and one set of counters.
    pub fn renewed(&self, parameters: Parameters, device: Device) -> Result<ServedExpert, Error> {
        let (breaker, counters) = (self.breaker.clone(), self.counters.clone());
        ServedExpert::with(self.blueprint.clone(), parameters, device, breaker, counters)
    }

    fn with(
        blueprint: Arc<Blueprint>,
        parameters: Parameters,
        device: Device,
        breaker: Arc<Breaker>,
        counters: Arc<ExpertCounters>,
    ) -> Result<ServedExpert, Error> {
        let provenance = parameters.provenance.clone();
        let network = network(blueprint.graph.clone(), parameters, device)?;
        let batches = BufferPool::default();
        Ok(ServedExpert { blueprint, network, batches, provenance, breaker, counters })
    }

    /// Like `new`, with the parameters of a file of exactly this network and FM.
    pub fn open(
        blueprint: Arc<Blueprint>,
        parameters: SavedParameters,
        device: Device,
        breaker: BreakerConfig,
    ) -> Result<ServedExpert, Error> {
        let trained = blueprint.restore(parameters)?;
        ServedExpert::new(blueprint, trained, device, breaker)
    }

    /// The expert's plugin, description and graph.
    pub fn blueprint(&self) -> &Arc<Blueprint> {
        &self.blueprint
    }

    /// The network and FM that its parameters were trained for.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// The plugin's name from its description.
    pub fn name(&self) -> &str {
        &self.blueprint.description.name
    }

    /// The plugin's version from its description.
    pub fn version(&self) -> &str {
        &self.blueprint.description.version
    }

    /// Counts of requests and faults so far.
    pub fn counters(&self) -> CountersSnapshot {
        self.counters.snapshot()
    }

    /// Whether the breaker lets calls pass.
    pub fn breaker_state(&self) -> BreakerState {
        self.breaker.state()
    }

    /// Predicts every target of `examples`, in order. A prediction that is not finite is a fault.
    pub fn predict<'a, E: Borrow<Example>>(
        &self,
        examples: &[E],
        fm: impl Into<FmRows<'a>>,
    ) -> Result<ExpertPredictions, ExpertFault> {
        let outputs = self.batches.with(|batch| {
            self.blueprint.columns.fill(batch, examples, fm, &self.provenance);
            if batch.rows == 0 { Vec::new() } else { self.network.outputs(batch) }
        });
        let predictions = self.predictions(&outputs);
        for Prediction { task, values } in predictions.tasks.iter().chain(&predictions.scores) {
            if let Some(row) = values.iter().position(|value| !value.is_finite()) {
                let why = format!("task `{task}`, row {row}: prediction {}", values[row]);
                return Err(self.fault(Call::Predict, Fault::BadOutput(why)));
            }
        }
        Ok(predictions)
    }

    fn predictions(&self, outputs: &[f32]) -> ExpertPredictions {
        let Blueprint { graph, description, .. } = &*self.blueprint;
        ExpertPredictions::new(graph, &description.tasks, &self.provenance.labels, outputs)
    }

    /// Calls the plugin's `rank`, without the breaker and the thread limit of
    /// [`ServedExpert::serve`].
    pub fn rank<'a>(
        &self,
        example: &Example,
        fm: impl Into<FmRows<'a>>,
        predictions: &ExpertPredictions,
        limit: usize,
    ) -> Result<Vec<Ranked>, ExpertFault> {
        let columns = self.blueprint.columns.rank_columns(example, fm);
        let request = contract::rank_request(example, &self.blueprint.info, limit);
        self.blueprint.plugin.rank(&request, &predictions.for_rank(), &columns)
    }

    /// Answers one request: thread limit, breaker, network, `rank`, counters. `fm` is what the FM
    /// says of the candidates, and `limit` the largest number of candidates in the answer.
    pub fn serve<'a>(
        &self,
        example: &Example,
        fm: impl Into<FmRows<'a>>,
        limit: usize,
    ) -> (RankOutcome, ExpertTimes) {
        let fm = fm.into();
        let start = Instant::now();
        let mut times = ExpertTimes::default();
        let permit = match self.enter(example.user.id, start) {
            Ok(permit) => permit,
            Err(cause) => return (self.degraded(self.fault(Call::Rank, cause)), times),
        };
        let predictions = self.predict(&[example], fm);
        times.network = start.elapsed();
        self.counters.network(times.network);
        let answer = predictions.and_then(|predictions| {
            let start = Instant::now();
            let ranked = self.rank(example, fm, &predictions, limit);
            times.wasm = start.elapsed();
            Ok((ranked?, predictions))
        });
        match answer {
            Ok((ranked, predictions)) => {
                self.breaker.success(example.user.id, Instant::now());
                self.counters.ranked();
                (RankOutcome::Ranked { ranked, predictions }, times)
            }
            Err(fault) => {
                let cost = permit.cost(&self.blueprint.plugin.limits.gate);
                let call = FailedCall { user: example.user.id, at: Instant::now(), cost };
                (self.failed(fault, call), times)
            }
        }
    }

    /// Prepares instances for the next requests, unless the breaker is open.
    pub fn prepare(&self) {
        if self.breaker.state() == BreakerState::Closed {
            self.blueprint.plugin.prepare();
        }
    }

    /// The gate comes first: the breaker's single test call must not be spent on a request that the
    /// gate refuses.
    fn enter(&self, user: u64, now: Instant) -> Result<ThreadPermit<'_>, Fault> {
        let plugin = &self.blueprint.plugin;
        let permit = plugin.gate.enter(&plugin.limits.gate).map_err(Fault::Busy)?;
        if self.breaker.is_set_aside(user, now) {
            return Err(Fault::UserSetAside);
        }
        if self.breaker.admit(now) { Ok(permit) } else { Err(Fault::Open) }
    }

    fn failed(&self, fault: ExpertFault, call: FailedCall) -> RankOutcome {
        // A full instance pool is not the plugin's fault and takes no time.
        if !matches!(fault.cause, Fault::Busy(_)) {
            self.breaker.fault(call);
        }
        self.counters.log(&fault, call.at);
        self.degraded(fault)
    }

    fn degraded(&self, fault: ExpertFault) -> RankOutcome {
        self.counters.fault(&fault.cause);
        RankOutcome::Degraded(fault)
    }

    fn fault(&self, call: Call, cause: Fault) -> ExpertFault {
        ExpertFault::new(self.name(), call, cause)
    }
}
