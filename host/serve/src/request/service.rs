//! The ranking tier: a request's features, its ranking, and what is kept of it. The FM's output
//! comes from its own tier in between.
//!
//! Every call blocks; the HTTP side runs it on a worker thread. A fault of an expert never fails a
//! request: the FM's own ranking is returned, marked degraded. If the FM cannot be reached, the
//! expert ranks without its embedding.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_core::clock::now_ms;
use hypercast_data::{dataset::Dataset, features::RequestInput, schema::Schema};
use hypercast_expert::{ExpertPredictions, RankOutcome, ServedExpert, wasm::contract};
use hypercast_fm::{example::Example, inference::FmOutput, spec::TaskSpec};
use hypercast_stream::{registry::schema_hash, streams::StreamEngine};
use tokio::runtime::Handle;

use crate::{
    error::Result,
    http::reload::Settings,
    metrics::{
        Metrics, RankedByArm, RankedRequest, STAGES,
        prediction_log::{ArmPredictions, PredictionLog, ShownItems},
    },
    request::{
        api::{
            AnsweringExpert, Explanation, RankAnswer, RankRequest, Ranked, Refusal, RequestResult,
        },
        convert::Converter,
        events::check_request,
        ids::RequestIds,
        streams::EventStreams,
    },
    request_log::{RequestLog, RequestToLog},
    versions::{
        serving_set::{ExpertArm, ServedFm, ServingModels, ServingSet},
        shadow::{ShadowQueue, ShadowRequest, ShadowWorker, of_fm},
    },
};

/// Everything that a rank request needs besides the models.
pub struct RankingService {
    settings: Arc<Settings>,
    schema: Arc<Schema>,
    converter: Converter,
    streams: Arc<EventStreams>,
    models: Arc<ServingModels>,
    predictions: Arc<PredictionLog>,
    shadows: ShadowQueue,
    metrics: Arc<Metrics>,
    requests: RequestIds,
    request_log: RequestLog,
}

/// What the service shares with the rest of the process.
pub struct RankingContext {
    /// The configuration, which a reload may change.
    pub settings: Arc<Settings>,
    /// The versions that serve.
    pub models: Arc<ServingModels>,
    /// Counts requests.
    pub metrics: Arc<Metrics>,
    /// The runtime from which shadows call FMs in other processes.
    pub handle: Handle,
}

/// A request with its features, and the versions that answer it.
pub struct Fetched {
    /// The request, as a slice of one example.
    pub example: Arc<[Example]>,
    /// The versions that serve it, whatever serves the next request.
    pub set: Arc<ServingSet>,
    /// The expert version that answers, with its parameters of this moment.
    arm: Option<(Arc<ExpertArm>, Arc<ServedExpert>)>,
    unknown_items: Vec<u64>,
    start: Instant,
    took: Duration,
}

impl Fetched {
    /// The FM version to ask: the one that the expert pins.
    pub fn fm(&self) -> &ServedFm {
        let pinned = self.arm.as_ref().and_then(|(arm, _)| self.set.fm(&arm.fm));
        pinned.unwrap_or_else(|| self.set.default_fm())
    }
}

/// The answer of the FM's tier.
pub struct FmAnswer {
    /// The output, or why there is none.
    pub output: RequestResult<Arc<FmOutput>>,
    /// Time until the answer, waiting included.
    pub took: Duration,
}

/// Why an answer is degraded.
struct Degradation {
    /// The metric's label.
    cause: &'static str,
    /// The text for the caller.
    reason: String,
}

/// Time spent in each of [`STAGES`].
type StageTimes = [Duration; STAGES.len()];

impl RankingService {
    /// Loads the feature state and starts the streams.
    ///
    /// # Errors
    /// Streams that cannot be read, or written by this process.
    pub fn load(
        context: RankingContext,
        dataset: &Dataset,
        engine: Arc<dyn StreamEngine>,
    ) -> Result<Self> {
        let RankingContext { settings, models, metrics, handle } = context;
        let config = &*settings.now();
        let schema = dataset.schema.clone();
        let streams = Arc::new(EventStreams::start(engine, config, dataset, metrics.clone())?);
        let predictions = Arc::new(PredictionLog::new(config.server.served_predictions));
        let shadows = ShadowQueue::start(ShadowWorker {
            share: config.server.shadow_share,
            queue: config.server.shadow_queue,
            deadline: Duration::from_millis(config.server.deadline_ms),
            handle,
            log: predictions.clone(),
            metrics: metrics.clone(),
        })?;
        let counted = metrics.clone();
        let request_log = RequestLog::start(
            &config.paths.state.join("recorded"),
            schema_hash(&schema),
            &config.recorded,
            move |what| counted.request_logged(what),
        )?;
        Ok(Self {
            converter: Converter::new(schema.clone()),
            settings,
            schema,
            streams,
            models,
            predictions,
            shadows,
            metrics,
            requests: RequestIds::new(),
            request_log,
        })
    }

    /// The versions that serve.
    pub fn models(&self) -> &ServingModels {
        &self.models
    }

    /// Predictions that wait for their outcomes.
    pub fn predictions(&self) -> &PredictionLog {
        &self.predictions
    }

    /// The data set's schema.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Fetches the current features of a request, for FM and expert.
    ///
    /// # Errors
    /// The request is wrong.
    pub fn fetch(&self, request: &RankRequest) -> RequestResult<Fetched> {
        self.check_size(request)?;
        let start = Instant::now();
        let time_ms = request.time_ms.unwrap_or_else(now_ms);
        check_request(request.request)?;
        let id = request.request.unwrap_or_else(|| self.requests.next());
        let set = self.models.set();
        let state = self.streams.state();
        let input: RequestInput =
            self.converter.request(request, id, time_ms, |item| state.item(item).cloned())?;
        let unknown_items = input
            .candidates
            .iter()
            .map(|c| c.item)
            .filter(|&item| state.item(item).is_none())
            .collect();
        let arm = set.arm(input.surface, request.user);
        let arm = arm.map(|arm| (arm.clone(), arm.expert()));
        let example = [state.fetch(&input, set.max_history)].into();
        Ok(Fetched { example, set, arm, unknown_items, start, took: start.elapsed() })
    }

    /// Ranks the candidates of a request with the FM's output. Without it the expert runs without
    /// the TAE, and the answer is marked degraded.
    ///
    /// # Errors
    /// [`Refusal::Unreachable`], if there is neither an FM nor an expert.
    pub fn rank(
        &self,
        request: &RankRequest,
        fetched: &Fetched,
        fm: FmAnswer,
    ) -> RequestResult<RankAnswer> {
        let example = &fetched.example[0];
        let limit = request.limit.unwrap_or(usize::MAX).clamp(1, example.targets.len());
        let output = fm.output.as_deref().ok();
        let ranked = fetched.arm.as_ref().map(|(arm, expert)| {
            let (outcome, spent) = expert.serve(example, arm.tae(rows(output)), limit);
            (arm, outcome, spent)
        });
        let arm = ranked.as_ref().map(|(arm, outcome, spent)| RankedByArm {
            arm,
            outcome,
            spent: *spent,
        });
        let spent = arm.map(|arm| arm.spent).unwrap_or_default();
        let times = [fetched.took, fm.took, spent.network, spent.wasm];
        let outcome = arm.map(|arm| arm.outcome);
        let degradation = self.degradation(example, &fm, outcome);
        let ranking = match (outcome, &fm.output) {
            (Some(RankOutcome::Ranked { ranked, predictions }), _) => {
                Ok(expert_ranking(example, ranked, predictions))
            }
            (_, Ok(output)) => Ok(fm_ranking(example, fetched.fm().tasks(), output, limit)),
            (_, Err(refusal)) => Err(refusal.clone()),
        };
        self.metrics.ranked(RankedRequest {
            surface: &self.schema.surfaces[usize::from(example.surface)],
            arm,
            fm: fetched.fm().version(),
            degraded: degradation.as_ref().map(|degradation| degradation.cause),
            times,
            took: ranking.is_ok().then(|| fetched.start.elapsed()),
        });
        let mut answer = RankAnswer {
            request: example.request,
            ranking: ranking?,
            fm_version: fetched.fm().version().to_owned(),
            expert: fetched.arm.as_ref().map(|(arm, expert)| AnsweringExpert {
                name: arm.name.clone(),
                plugin: expert.name().to_owned(),
                version: arm.version.clone(),
                arm: arm.label.clone(),
            }),
            degraded: degradation.is_some(),
            reason: degradation.map(|degradation| degradation.reason),
            new_user: example.history.is_empty(),
            unknown_items: fetched.unknown_items.clone(),
            explain: None,
        };
        self.keep_predictions(fetched, output, outcome);
        self.log_request(fetched, fm.output.as_ref().ok(), &answer);
        if request.explain && self.settings.now().server.explain {
            answer.explain = Some(explain(fetched, output, outcome, times));
        }
        Ok(answer)
    }

    /// Why the answer is degraded, if it is.
    fn degradation(
        &self,
        example: &Example,
        fm: &FmAnswer,
        outcome: Option<&RankOutcome>,
    ) -> Option<Degradation> {
        let (cause, reason) = match (outcome, &fm.output) {
            (Some(RankOutcome::Ranked { .. }), Ok(_)) => return None,
            (Some(RankOutcome::Ranked { .. }), Err(refusal)) => {
                ("no_fm", format!("ranked without the FM's embedding: {refusal}"))
            }
            (Some(RankOutcome::Degraded(fault)), _) => (fault.cause.label(), fault.to_string()),
            (None, _) => {
                let surface = &self.schema.surfaces[usize::from(example.surface)];
                ("no_expert", format!("no expert serves surface {surface:?}"))
            }
        };
        Some(Degradation { cause, reason })
    }

    /// Keeps the predictions of expert and FM until the outcomes are known.
    fn keep_predictions(
        &self,
        fetched: &Fetched,
        fm: Option<&FmOutput>,
        outcome: Option<&RankOutcome>,
    ) {
        let example = &fetched.example[0];
        let items: Vec<u64> = example.targets.iter().map(|target| target.item.id).collect();
        let shown = ShownItems { request: example.request, items: &items };
        if let (Some((arm, _)), Some(RankOutcome::Ranked { predictions, .. })) =
            (&fetched.arm, outcome)
        {
            let tasks = by_task(predictions);
            self.predictions.keep(shown, ArmPredictions { arm: arm.label.clone(), tasks });
        }
        if let Some(output) = fm {
            self.predictions.keep(shown, of_fm(fetched.fm(), output));
        }
    }

    /// Offers the request to the request log if it is in the sample.
    fn log_request(&self, fetched: &Fetched, output: Option<&Arc<FmOutput>>, answer: &RankAnswer) {
        if !self.request_log.wants(answer.request) {
            return;
        }
        let fm = fetched.fm();
        let kept = self.request_log.offer(RequestToLog {
            example: fetched.example.clone(),
            fm: fm.version().to_owned(),
            tae_dim: fm.manifest().config.tae_width(),
            output: output.cloned(),
            arm: fetched.arm.as_ref().map_or_else(String::new, |(arm, _)| arm.label.clone()),
            degraded: answer.degraded,
            ranking: answer.ranking.iter().map(|place| (place.id, place.score)).collect(),
            at_ms: now_ms(),
        });
        if !kept {
            self.metrics.request_logged("dropped");
        }
    }

    /// The streams of events and outcomes.
    pub fn streams(&self) -> &Arc<EventStreams> {
        &self.streams
    }

    /// Stops the streams and saves their state.
    pub fn stop(&self) {
        self.streams.stop();
    }

    /// Does the work that need not delay the answer.
    pub fn after(&self, seen: ShadowRequest) {
        // Prepares a plugin after its own requests only, so that each pays for itself.
        if let Some((_, expert)) = &seen.fetched.arm {
            expert.prepare();
        }
        self.shadows.offer(seen);
    }

    fn check_size(&self, request: &RankRequest) -> RequestResult<()> {
        let (given, most) = (request.candidates.len(), self.settings.now().server.max_candidates);
        match given {
            0 => Err(Refusal::NoCandidates),
            _ if given > most => Err(Refusal::TooMany { given, what: "candidates", most }),
            _ => Ok(()),
        }
    }
}

/// The fallback: sorted by the FM's first main task, best first.
fn fm_ranking(example: &Example, tasks: &[TaskSpec], fm: &FmOutput, limit: usize) -> Vec<Ranked> {
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

fn explain(
    fetched: &Fetched,
    fm: Option<&FmOutput>,
    outcome: Option<&RankOutcome>,
    times: StageTimes,
) -> Explanation {
    let example = &fetched.example[0];
    let micros = |took: Duration| took.as_secs_f64() * 1e6;
    let mut stages: BTreeMap<String, f64> =
        STAGES.iter().zip(times).map(|(stage, took)| (stage.to_string(), micros(took))).collect();
    stages.insert("total".into(), micros(fetched.start.elapsed()));
    // Shadows on another FM version are measured after the answer only.
    let asked = fetched.fm().version();
    let shadows = fetched.set.shadows(example.surface).iter().filter(|arm| arm.fm == asked);
    let shadows =
        shadows.filter_map(|arm| match arm.expert().predict(&[example], arm.tae(rows(fm))) {
            Ok(predictions) => Some((arm.name.clone(), by_task(&predictions))),
            Err(fault) => {
                tracing::warn!(%fault, "a shadow expert failed; the request is not affected");
                None
            }
        });
    Explanation {
        expert: match outcome {
            Some(RankOutcome::Ranked { predictions, .. }) => by_task(predictions),
            _ => BTreeMap::new(),
        },
        fm: fm.map(|output| of_fm(fetched.fm(), output).tasks).unwrap_or_else(|| {
            fetched.fm().tasks().iter().map(|task| (task.name.clone(), Vec::new())).collect()
        }),
        shadows: shadows.collect(),
        stages_us: stages,
    }
}

fn rows(fm: Option<&FmOutput>) -> Option<&[f32]> {
    fm.map(|fm| &*fm.tae)
}

pub(crate) fn by_task(predictions: &ExpertPredictions) -> BTreeMap<String, Vec<f32>> {
    predictions.tasks.iter().map(|task| (task.task.clone(), task.values.clone())).collect()
}

fn expert_ranking(
    example: &Example,
    ranked: &[contract::Ranked],
    predictions: &ExpertPredictions,
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
