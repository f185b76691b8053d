//! The tier of experts: a request's features, its ranking, and events into the
//! live state. What the FM says comes from its own tier, in between.
//!
//! Every call blocks; the HTTP side runs it on a worker thread. A fault of an
//! expert never fails a request: the FM's own ranking answers, marked degraded.
//! Nor does an FM that cannot be reached: the expert ranks without its embedding.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_fm::{checkpoint::Manifest, example::Example, inference::FmOutput, spec::TaskSpec};

use super::{
    api::{ExpertVersion, Explanation, RankAnswer, RankRequest, Ranked, Refusal},
    convert::Converter,
    events::check_request,
    ids::RequestIds,
    metrics::{Metrics, STAGES},
    streams::Streams,
};
use crate::{
    config::{Config, ExpertEntry},
    dataset::Dataset,
    error::{Error, Result},
    expert::{
        Blueprint, Engine, Expert, LoadOptions, Predictions, RankOutcome, Registry, Route, Tae,
        wasm::contract,
    },
    features::RequestInput,
    join::now_ms,
    schema::Schema,
};

/// Everything that a request needs besides the FM, loaded.
pub struct Service {
    config: Config,
    schema: Arc<Schema>,
    converter: Converter,
    streams: Arc<Streams>,
    fm: FmFacts,
    registry: Registry,
    /// What was configured for each expert.
    entries: Vec<(Arc<Expert>, ExpertEntry)>,
    metrics: Arc<Metrics>,
    requests: RequestIds,
}

/// What of the FM's manifest a request needs.
struct FmFacts {
    version: String,
    max_history: usize,
    tasks: Vec<TaskSpec>,
}

impl FmFacts {
    fn of(manifest: &Manifest) -> Self {
        Self {
            version: manifest.version.clone(),
            max_history: manifest.config.max_history,
            tasks: manifest.spec.main_tasks().to_vec(),
        }
    }
}

/// A request with its features.
pub struct Fetched {
    /// The request, alone.
    pub example: Arc<[Example]>,
    unknown_items: Vec<u64>,
    start: Instant,
    took: Duration,
}

/// What the FM's tier said.
pub struct FmAnswer {
    /// Its output, or why there is none.
    pub output: std::result::Result<FmOutput, Refusal>,
    /// How long that took, waiting included.
    pub took: Duration,
}

/// Time spent in each of [`STAGES`].
type StageTimes = [Duration; STAGES.len()];

impl Service {
    /// Loads every expert that fits the FM, and the live state.
    ///
    /// # Errors
    /// Anything missing, damaged or refused: a daemon starts whole or not at all.
    pub fn load(config: &Config, fm: &Manifest, metrics: Arc<Metrics>) -> Result<Self> {
        let dataset = Dataset::open(&config.paths.dataset)?;
        let schema = dataset.schema.clone();
        let (registry, entries) = load_experts(config, &schema, fm)?;
        for (expert, entry) in &entries {
            metrics.version("expert", &entry.name, expert.version());
        }
        let engine = crate::engine::open(&config.engine)?;
        let streams = Arc::new(Streams::start(engine, config, &dataset, metrics.clone())?);
        Ok(Self {
            converter: Converter::new(schema.clone()),
            config: config.clone(),
            schema,
            streams,
            fm: FmFacts::of(fm),
            registry,
            entries,
            metrics,
            requests: RequestIds::new(),
        })
    }

    /// The features of a request as of now, for FM and expert alike.
    ///
    /// # Errors
    /// A request that is the caller's mistake.
    pub fn fetch(&self, request: &RankRequest) -> std::result::Result<Fetched, Refusal> {
        self.check_size(request)?;
        let start = Instant::now();
        let time_ms = request.time_ms.unwrap_or_else(now_ms);
        check_request(request.request)?;
        let id = request.request.unwrap_or_else(|| self.requests.next());
        let state = self.streams.state();
        let input: RequestInput =
            self.converter.request(request, id, time_ms, |item| state.item(item).cloned())?;
        let unknown_items = input
            .candidates
            .iter()
            .map(|c| c.item)
            .filter(|&item| state.item(item).is_none())
            .collect();
        let example = state.fetch(&input, self.fm.max_history);
        Ok(Fetched { example: [example].into(), unknown_items, start, took: start.elapsed() })
    }

    /// Ranks the candidates of a request with what the FM says of them. Without it, the expert goes without a TAE and the
    /// answer is marked degraded.
    ///
    /// # Errors
    /// [`Refusal::Unreachable`], where there is neither an FM nor an expert.
    pub fn rank(
        &self,
        request: &RankRequest,
        fetched: &Fetched,
        fm: FmAnswer,
    ) -> std::result::Result<RankAnswer, Refusal> {
        let example = &fetched.example[0];
        let limit = request.limit.unwrap_or(usize::MAX).clamp(1, request.candidates.len());
        let route = self.registry.route(example.surface);
        let mut times = StageTimes::default();
        (times[0], times[1]) = (fetched.took, fm.took);
        let outcome = match route {
            Some(route) => {
                let (outcome, spent) = route.active.serve(
                    example,
                    self.tae(&route.active, fm.output.as_ref().ok()),
                    limit,
                );
                (times[2], times[3]) = (spent.network, spent.wasm);
                Some(outcome)
            }
            None => None,
        };
        let expert = route.map(|route| self.version(&route.active));
        let mut answer = self.answer(example, &fm, outcome.as_ref(), limit, expert)?;
        answer.unknown_items.clone_from(&fetched.unknown_items);
        for (stage, took) in STAGES.iter().zip(times) {
            self.metrics.stage(stage, took);
        }
        if request.explain && self.config.server.explain {
            let total = fetched.start.elapsed();
            let fm = fm.output.as_ref().ok();
            answer.explain =
                Some(self.explain(example, fm, outcome.as_ref(), route, (times, total)));
        }
        Ok(answer)
    }

    /// Events in, and the live state.
    pub fn streams(&self) -> &Arc<Streams> {
        &self.streams
    }

    /// Ends what runs beside requests, with its state saved.
    pub fn stop(&self) {
        self.streams.stop();
    }

    /// Does what can be done between requests, so that the next one need not wait for it.
    pub fn between_requests(&self) {
        for (expert, _) in &self.entries {
            expert.blueprint().plugin.prepare();
        }
    }

    fn check_size(&self, request: &RankRequest) -> std::result::Result<(), Refusal> {
        let (given, most) = (request.candidates.len(), self.config.server.max_candidates);
        match given {
            0 => Err(Refusal::NoCandidates),
            _ if given > most => Err(Refusal::TooMany { given, what: "candidates", most }),
            _ => Ok(()),
        }
    }

    fn version(&self, expert: &Arc<Expert>) -> ExpertVersion {
        ExpertVersion {
            name: self.name(expert).to_owned(),
            plugin: expert.name().to_owned(),
            version: expert.version().to_owned(),
        }
    }

    fn name(&self, expert: &Arc<Expert>) -> &str {
        self.entry(expert).map_or("", |entry| &entry.name)
    }

    fn entry(&self, expert: &Arc<Expert>) -> Option<&ExpertEntry> {
        self.entries.iter().find(|(known, _)| Arc::ptr_eq(known, expert)).map(|(_, entry)| entry)
    }

    /// The TAE as the expert was trained with it.
    fn tae<'a>(&self, expert: &Arc<Expert>, fm: Option<&'a FmOutput>) -> Tae<'a> {
        match (self.entry(expert), fm) {
            (Some(entry), _) if entry.without_tae => Tae::Without,
            (_, Some(fm)) => Tae::Rows(&fm.tae),
            (_, None) => Tae::Without,
        }
    }

    fn answer(
        &self,
        example: &Example,
        fm: &FmAnswer,
        outcome: Option<&RankOutcome>,
        limit: usize,
        expert: Option<ExpertVersion>,
    ) -> std::result::Result<RankAnswer, Refusal> {
        let by_fm = || match &fm.output {
            Ok(said) => Ok(self.fm_ranking(example, said, limit)),
            Err(refusal) => Err(refusal.clone()),
        };
        let (ranking, reason) = match outcome {
            Some(RankOutcome::Ranked { ranked, predictions }) => {
                let without = fm.output.as_ref().err().map(|refusal| {
                    let name = expert.as_ref().map_or("", |expert| &expert.name);
                    self.metrics.degraded(name, "no_fm");
                    format!("ranked without the FM's embedding: {refusal}")
                });
                (expert_ranking(example, ranked, predictions), without)
            }
            Some(RankOutcome::Degraded(fault)) => {
                let name = expert.as_ref().map_or("", |expert| &expert.name);
                self.metrics.degraded(name, fault.cause.label());
                (by_fm()?, Some(fault.to_string()))
            }
            None => {
                let surface = &self.schema.surfaces[usize::from(example.surface)];
                self.metrics.degraded("", "no_expert");
                (by_fm()?, Some(format!("no expert serves surface {surface:?}")))
            }
        };
        Ok(RankAnswer {
            request: example.request,
            ranking,
            fm_version: self.fm.version.clone(),
            expert,
            degraded: reason.is_some(),
            reason,
            new_user: example.history.is_empty(),
            unknown_items: Vec::new(),
            explain: None,
        })
    }

    /// The fallback: by the FM's first main task, best first.
    fn fm_ranking(&self, example: &Example, fm: &FmOutput, limit: usize) -> Vec<Ranked> {
        let tasks = self.main_tasks();
        let mut order: Vec<usize> = (0..example.targets.len()).collect();
        let score = |row: usize| fm.main[row * tasks.len()];
        order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
        order.truncate(limit);
        let ranked = |row: usize| Ranked {
            id: example.targets[row].item.id,
            score: score(row),
            predictions: tasks
                .iter()
                .enumerate()
                .map(|(task, spec)| (spec.name.clone(), fm.main[row * tasks.len() + task]))
                .collect(),
        };
        order.into_iter().map(ranked).collect()
    }

    fn main_tasks(&self) -> &[TaskSpec] {
        &self.fm.tasks
    }

    fn explain(
        &self,
        example: &Example,
        fm: Option<&FmOutput>,
        outcome: Option<&RankOutcome>,
        route: Option<&Route>,
        (times, total): (StageTimes, Duration),
    ) -> Explanation {
        let tasks = self.main_tasks();
        let main = fm.map_or(&[][..], |fm| &fm.main);
        let column = |task: usize| main.iter().skip(task).step_by(tasks.len()).copied().collect();
        let micros = |took: Duration| took.as_secs_f64() * 1e6;
        let mut stages: BTreeMap<String, f64> = STAGES
            .iter()
            .zip(times)
            .map(|(stage, took)| (stage.to_string(), micros(took)))
            .collect();
        stages.insert("total".into(), micros(total));
        let shadows = route.into_iter().flat_map(|route| &route.shadows).filter_map(|shadow| {
            match shadow.predict(&[example], self.tae(shadow, fm)) {
                Ok(predictions) => Some((self.name(shadow).to_owned(), by_task(&predictions))),
                Err(fault) => {
                    tracing::warn!(%fault, "a shadow expert failed; the request is not affected");
                    None
                }
            }
        });
        Explanation {
            expert: match outcome {
                Some(RankOutcome::Ranked { predictions, .. }) => by_task(predictions),
                _ => BTreeMap::new(),
            },
            fm: tasks
                .iter()
                .enumerate()
                .map(|(task, spec)| (spec.name.clone(), column(task)))
                .collect(),
            shadows: shadows.collect(),
            stages_us: stages,
        }
    }
}

fn by_task(predictions: &Predictions) -> BTreeMap<String, Vec<f32>> {
    predictions.tasks.iter().map(|task| (task.task.clone(), task.values.clone())).collect()
}

fn expert_ranking(
    example: &Example,
    ranked: &[contract::Ranked],
    predictions: &Predictions,
) -> Vec<Ranked> {
    ranked
        .iter()
        .map(|place| {
            let row = place.candidate as usize;
            Ranked {
                id: example.targets[row].item.id,
                score: place.score,
                predictions: predictions
                    .tasks
                    .iter()
                    .map(|task| (task.task.clone(), task.values[row]))
                    .collect(),
            }
        })
        .collect()
}

type Entries = Vec<(Arc<Expert>, ExpertEntry)>;

/// A surface's experts while the configuration is read.
#[derive(Default)]
struct Planned {
    active: Option<Arc<Expert>>,
    shadows: Vec<Arc<Expert>>,
}

fn load_experts(config: &Config, schema: &Schema, fm: &Manifest) -> Result<(Registry, Entries)> {
    let engine = Engine::new(config.plugin_limits.engine())?;
    let options = LoadOptions {
        tae_dim: fm.config.tae_width(),
        fm_version: Some(fm.version.clone()),
        ..config.plugin_limits.load_options()
    };
    let mut routes: BTreeMap<u16, Planned> = BTreeMap::new();
    let mut entries = Entries::new();
    for entry in &config.experts {
        let blueprint = Arc::new(Blueprint::load(&engine, &entry.plugin, schema, &options)?);
        let expert = open_expert(config, entry, blueprint)?;
        entries.push((expert.clone(), entry.clone()));
        for surface in config.serving_surfaces(entry, schema)? {
            let route = routes.entry(surface).or_default();
            match entry.shadow {
                true => route.shadows.push(expert.clone()),
                false => {
                    if let Some(other) = route.active.replace(expert.clone()) {
                        return Err(Error::Invalid(format!(
                            "experts {:?} and {:?} both serve surface {:?}; give one other surfaces, or shadow = true",
                            entries
                                .iter()
                                .find(|(known, _)| Arc::ptr_eq(known, &other))
                                .map_or("", |(_, entry)| &entry.name),
                            entry.name,
                            schema.surfaces[usize::from(surface)]
                        )));
                    }
                }
            }
        }
    }
    let mut registry = Registry::new();
    for (surface, Planned { active, shadows }) in routes {
        if let Some(active) = active {
            registry.insert(
                schema,
                &schema.surfaces[usize::from(surface)],
                Route { active, shadows },
            )?;
        }
    }
    Ok((registry, entries))
}

fn open_expert(
    config: &Config,
    entry: &ExpertEntry,
    blueprint: Arc<Blueprint>,
) -> Result<Arc<Expert>> {
    let path = config.parameters(entry);
    if !path.is_file() {
        let why = format!(
            "expert {:?} has no trained parameters; run `hypercast train expert {}`",
            entry.name, entry.name
        );
        return Err(Error::data(path, why));
    }
    Ok(Arc::new(Expert::open(blueprint, &path, config.device, config.plugin_limits.breaker())?))
}
