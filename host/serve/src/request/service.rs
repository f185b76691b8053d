//! The ranking tier: a request's features, its ranking, and what is kept of it. The FM's output
//! comes from its own tier in between.
//!
//! Every call blocks; the HTTP side runs it on a worker thread. A fault of an expert never fails a
//! request: the FM's own ranking is returned, marked degraded. If the FM cannot be reached, the
//! expert ranks without its embedding.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_core::{clock::now_ms, shutdown::Shutdown};
use hypercast_data::{
    dataset::{Dataset, entity_id::EntityId},
    features::RequestInput,
    schema::CoreColumns,
};
use hypercast_expert::wasm::contract::Ranked as RankedRow;
use hypercast_expert::{ExpertPredictions, RankOutcome, ServedExpert};
use hypercast_fm::{example::Example, inference::FmOutput};
use hypercast_stream::{events::EventWriter, registry::schema_hash, streams::StreamEngine};
use tokio::runtime::Handle;

use crate::{
    error::Result,
    http::reload::Settings,
    metrics::{
        Metrics, RankTimes, STAGES,
        arm_outcomes::ArmOutcomes,
        prediction_log::{ArmPredictions, PredictionLog},
    },
    request::{
        api::{
            AnsweringExpert, BodyForm, Explanation, RankAnswer, RankRequest, RankedPlaces, Refusal,
            RequestResult,
        },
        convert::Converter,
        events::check_request,
        ids::RequestIds,
        rankings::RankingRecorder,
        streams::EventStreams,
    },
    request_log::{RecordedRequest, RequestLog},
    versions::{
        serving_set::{ExpertArm, ServedFm, ServingModels, ServingSet},
        shadow::{ShadowQueue, ShadowRequest, ShadowWorker, of_fm},
    },
};

/// Everything that a rank request needs besides the models.
pub struct RankingService {
    pub(crate) settings: Arc<Settings>,
    /// Converts bodies, by the data set's schema.
    pub(crate) converter: Converter,
    /// The width of the items' content vectors in its feature state; 0 without any.
    pub(crate) content_dim: usize,
    /// The streams of events and outcomes.
    pub(crate) streams: EventStreams,
    /// The versions that serve.
    pub(crate) models: Arc<ServingModels>,
    /// Predictions that wait for their outcomes.
    pub(crate) predictions: Arc<PredictionLog>,
    /// What came of each arm's answers.
    pub(crate) arm_outcomes: Arc<ArmOutcomes>,
    metrics: Arc<Metrics>,
    queues: Arc<RequestQueues>,
    schema_hash: String,
    core: CoreColumns,
}

/// What requests of all services of a process share: they outlive a growth of the schema.
struct RequestQueues {
    shadows: ShadowQueue,
    request_log: RequestLog,
    rankings: RankingRecorder,
    ids: RequestIds,
}

/// A request with its features, and the versions that answer it.
pub struct Fetched {
    /// The request, as a slice of one example.
    pub example: Arc<[Example]>,
    /// The same as the FM is shown it.
    pub core: Arc<[Example]>,
    /// The versions that serve it, whatever serves the next request.
    pub set: Arc<ServingSet>,
    /// The expert version that answers, with its parameters of this moment.
    arm: Option<(Arc<ExpertArm>, Arc<ServedExpert>)>,
    /// Targets that the feature state does not know.
    unknown_targets: Vec<usize>,
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

/// Time spent in each of [`STAGES`].
type StageTimes = [Duration; STAGES.len()];

/// What the service shares with the rest of the daemon.
pub(crate) struct RankingContext {
    pub(crate) settings: Arc<Settings>,
    pub(crate) models: Arc<ServingModels>,
    pub(crate) metrics: Arc<Metrics>,
    /// The runtime from which shadows call FMs in other processes.
    pub(crate) handle: Handle,
    /// Ends the streams' threads.
    pub(crate) stop: Shutdown,
}

impl RankingService {
    /// Loads the feature state and starts the streams. A service that follows one of `before`,
    /// whose streams have ended, goes on with what requests share.
    ///
    /// # Errors
    /// Streams that cannot be read, or written by this process.
    pub(crate) fn load(
        context: RankingContext,
        dataset: &Dataset,
        engine: Arc<dyn StreamEngine>,
        before: Option<&RankingService>,
    ) -> Result<Self> {
        let RankingContext { settings, models, metrics, handle, stop } = context;
        let config = &*settings.now();
        let streams_before = before.map(|before| &before.streams);
        let streams =
            EventStreams::start(engine, config, dataset, metrics.clone(), stop, streams_before)?;
        let (predictions, queues) = match before {
            Some(before) => (before.predictions.clone(), before.queues.clone()),
            None => {
                let predictions = Arc::new(PredictionLog::new(config.server.served_predictions));
                let shadows = ShadowWorker {
                    settings: settings.clone(),
                    handle,
                    log: predictions.clone(),
                    metrics: metrics.clone(),
                    failures: Mutex::default(),
                };
                let writer = streams.intake.writer.clone();
                let queues = RequestQueues::start(config, shadows, writer, &metrics)?;
                (predictions, Arc::new(queues))
            }
        };
        Ok(Self {
            converter: Converter::new(dataset.schema.clone()).counting_in(&metrics),
            content_dim: dataset.content,
            settings,
            streams,
            models,
            predictions,
            arm_outcomes: before.map(|before| before.arm_outcomes.clone()).unwrap_or_default(),
            metrics,
            queues,
            schema_hash: schema_hash(&dataset.schema),
            core: CoreColumns::new(&dataset.schema),
        })
    }

    /// Fetches the current features of a request, for FM and expert.
    ///
    /// # Errors
    /// The request is wrong, or an id of it has the key of another one.
    pub fn fetch(&self, request: &RankRequest) -> RequestResult<Fetched> {
        let set = self.models.set();
        let (given, most) = (request.candidates.ids().len(), set.max_candidates);
        match given {
            0 => return Err(Refusal::NoCandidates),
            _ if given > most => return Err(Refusal::TooMany { given, what: "candidates", most }),
            _ => {}
        }
        let start = Instant::now();
        let time_ms = request.time_ms.unwrap_or_else(now_ms);
        check_request(request.request)?;
        let id = request.request.unwrap_or_else(|| self.queues.ids.next());
        let state = self.streams.live.state();
        let input: RequestInput =
            self.converter.request(request, id, time_ms, |item| state.item(item).cloned())?;
        let is_unknown = |row: &usize| state.item(input.candidates[*row].item).is_none();
        let unknown_targets = (0..input.candidates.len()).filter(is_unknown).collect();
        let arm = set.arm(input.surface, input.user);
        let arm = arm.map(|arm| (arm.clone(), arm.expert()));
        let example = [state.fetch(&input, set.max_history)].into();
        drop(state);
        let core = self.core.shared(&example);
        self.streams.intake.ids.store(request.text_ids())?;
        Ok(Fetched { example, core, set, arm, unknown_targets, start, took: start.elapsed() })
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
        fm: RequestResult<Arc<FmOutput>>,
        fm_took: Duration,
    ) -> RequestResult<RankAnswer> {
        let example = &fetched.example[0];
        let limit = request.limit.unwrap_or(usize::MAX).clamp(1, example.targets.len());
        let output = fm.as_deref().ok();
        let arm = fetched.arm.as_ref().map(|(arm, _)| &**arm);
        let aligned = output.map(|output| fetched.fm().aligned(output));
        let served = fetched.arm.as_ref().map(|(arm, expert)| {
            let (outcome, spent) = expert.serve(example, arm.fm_rows(aligned.as_ref()), limit);
            arm.count(&outcome, spent);
            (outcome, spent)
        });
        let (outcome, spent) = served.unzip();
        let spent = spent.unwrap_or_default();
        let times = [fetched.took, fm_took, spent.network, spent.wasm];
        let surface = &self.converter.schema.surfaces[usize::from(example.surface)];
        let (cause, reason) = degradation(surface, &fm, outcome.as_ref()).unzip();
        let by_expert = match &outcome {
            Some(RankOutcome::Ranked { ranked, predictions }) => {
                Some((ranked.clone(), by_task(predictions)))
            }
            _ => None,
        };
        let by_fm = fm.as_ref().map(|output| of_fm(fetched.fm(), output));
        let ids = caller_ids(request, example);
        let ranking = match (&by_expert, &by_fm) {
            (Some((places, tasks)), _) => Ok(ranking(&ids, places, tasks)),
            (None, Ok(by_fm)) => {
                let main = &by_fm.tasks[&fetched.fm().tasks()[0].name];
                Ok(ranking(&ids, &best_first(main, limit), &by_fm.tasks))
            }
            (None, Err(refusal)) => Err((*refusal).clone()),
        };
        let total = ranking.is_ok().then(|| fetched.start.elapsed());
        let of_request = RankTimes { stages: times, total };
        self.metrics.ranked(surface, arm, fetched.fm().version(), cause, of_request);
        let ranking = ranking?;
        let by_expert = by_expert.map(|(_, tasks)| tasks);
        let explained = request.explain && self.settings.now().server.explain;
        let answer = RankAnswer {
            request: example.request,
            ranking: RankedPlaces { form: request.candidates.form(), ..ranking },
            fm_version: fetched.fm().version().to_owned(),
            expert: fetched.arm.as_ref().map(|(arm, expert)| AnsweringExpert {
                name: arm.name.clone(),
                plugin: expert.name().to_owned(),
                version: arm.version.clone(),
                arm: arm.label.clone(),
            }),
            degraded: cause.is_some(),
            reason,
            new_user: example.history.is_empty(),
            unknown_items: fetched.unknown_targets.iter().map(|&row| ids[row].clone()).collect(),
            ignored_features: self.converter.ignored_features(request),
            explain: explained.then(|| Explanation {
                expert: by_expert.clone().unwrap_or_default(),
                fm: of_fm(fetched.fm(), output.unwrap_or(&FmOutput::default())).tasks,
                shadows: shadows(fetched, output),
                stages_us: stages_us(fetched, times),
            }),
        };
        let items: Vec<u64> = example.targets.iter().map(|target| target.item.id).collect();
        let keep = |predicted| self.predictions.keep(example.request, &items, predicted);
        let by_arm = arm.filter(|_| by_expert.is_some()).map(|arm| &arm.label);
        let by_arm = by_arm.or(by_fm.as_ref().ok().map(|by_fm| &by_fm.arm));
        let by_arm = by_arm.expect("somebody ranked").clone();
        self.arm_outcomes.answered(example.time_ms);
        self.queues.rankings.record(&answer, by_arm);
        if let (Some(arm), Some(tasks)) = (arm, by_expert) {
            keep(ArmPredictions { arm: arm.label.clone(), tasks });
        }
        by_fm.into_iter().for_each(keep);
        self.log_request(fetched, fm.as_ref().ok(), &answer);
        Ok(answer)
    }

    /// Offers the request to the request log if it is in the sample.
    fn log_request(&self, fetched: &Fetched, output: Option<&Arc<FmOutput>>, answer: &RankAnswer) {
        if !self.queues.request_log.wants(answer.request) {
            return;
        }
        let (schema, example) = (self.schema_hash.clone(), fetched.example.clone());
        let (fm, output) = (fetched.fm().clone(), output.cloned());
        let arm = fetched.arm.as_ref().map_or_else(String::new, |(arm, _)| arm.label.clone());
        let (at_ms, degraded) = (now_ms(), answer.degraded);
        let RankedPlaces { ids, scores, propensities, .. } = &answer.ranking;
        let keys = ids.iter().map(EntityId::key);
        let ranking = keys.zip(scores.iter().copied()).collect();
        let propensities = propensities.clone();
        let kept = self.queues.request_log.offer(move || RecordedRequest {
            schema,
            at_ms,
            example: example[0].clone(),
            fm: fm.version().to_owned(),
            tae_dim: fm.manifest().config.tae_width(),
            tae: output.as_ref().map(|output| output.tae.clone()).unwrap_or_default(),
            predictions: output
                .map(|output| fm.predictions(&output).into_owned())
                .unwrap_or_default(),
            arm,
            degraded,
            ranking,
            propensities,
        });
        if !kept {
            self.metrics.request_log.with_label_values(&["dropped"]).inc();
        }
    }

    /// Does the work that need not delay the answer.
    pub fn after(&self, seen: ShadowRequest) {
        // Prepares a plugin after its own requests only, so that each pays for itself.
        if let Some((_, expert)) = &seen.fetched.arm {
            expert.prepare();
        }
        self.queues.shadows.offer(seen);
    }
}

impl RequestQueues {
    fn start(
        config: &Config,
        shadows: ShadowWorker,
        writer: Arc<EventWriter>,
        metrics: &Arc<Metrics>,
    ) -> Result<RequestQueues> {
        let counted = metrics.request_log.clone();
        let count = move |what: &'static str| counted.with_label_values(&[what]).inc();
        let dir = config.paths.state.join("recorded");
        Ok(RequestQueues {
            shadows: ShadowQueue::start(shadows)?,
            request_log: RequestLog::start(&dir, &config.recorded, count)?,
            rankings: RankingRecorder::start(writer, metrics)?,
            ids: RequestIds::default(),
        })
    }
}

/// Why an answer is degraded, if it is: the metric's label, and the text for the caller.
fn degradation(
    surface: &str,
    fm: &RequestResult<Arc<FmOutput>>,
    outcome: Option<&RankOutcome>,
) -> Option<(&'static str, String)> {
    match (outcome, fm) {
        (Some(RankOutcome::Ranked { .. }), Ok(_)) => None,
        (Some(RankOutcome::Ranked { .. }), Err(refusal)) => {
            Some(("no_fm", format!("ranked without the FM's embedding: {refusal}")))
        }
        (Some(RankOutcome::Degraded(fault)), _) => Some((fault.cause.label(), fault.to_string())),
        (None, _) => Some(("no_expert", format!("no expert serves surface {surface:?}"))),
    }
}

/// The fallback: candidates with the FM's scores, best first.
fn best_first(scores: &[f32], limit: usize) -> Vec<RankedRow> {
    let place = |(candidate, score)| RankedRow { candidate, score, propensity: None };
    let mut order: Vec<RankedRow> = (0..).zip(scores.iter().copied()).map(place).collect();
    // The sort is stable: of equal candidates the first stays first.
    order.sort_by(|a, b| b.score.total_cmp(&a.score));
    order.truncate(limit);
    order
}

/// The callers' ids of the targets, which are the request's candidates in their order, each where
/// it was named first.
fn caller_ids<'a>(request: &'a RankRequest, example: &Example) -> Vec<&'a EntityId> {
    let mut candidates = request.candidates.ids().iter();
    let mut of = |item: u64| candidates.find(|id| id.key() == item);
    let ids = example.targets.iter().map(|target| of(target.item.id));
    ids.map(|id| id.expect("each target is a candidate of its request")).collect()
}

/// Candidates in the order of `places`, with their scores and the predictions for them.
fn ranking(
    ids: &[&EntityId],
    places: &[RankedRow],
    tasks: &BTreeMap<String, Vec<f32>>,
) -> RankedPlaces {
    let rows = || places.iter().map(|place| place.candidate as usize);
    let of = |values: &[f32]| rows().map(|row| values[row]).collect();
    RankedPlaces {
        ids: rows().map(|row| ids[row].clone()).collect(),
        scores: places.iter().map(|place| place.score).collect(),
        propensities: places.iter().map(|place| place.propensity).collect(),
        predictions: tasks.iter().map(|(task, values)| (task.clone(), of(values))).collect(),
        form: BodyForm::default(),
    }
}

fn stages_us(fetched: &Fetched, times: StageTimes) -> BTreeMap<String, f64> {
    let total = [("total", fetched.start.elapsed())];
    let stages = STAGES.into_iter().zip(times).chain(total);
    stages.map(|(stage, took)| (stage.to_owned(), took.as_secs_f64() * 1e6)).collect()
}

/// The predictions of the shadow experts, by name and task.
fn shadows(
    fetched: &Fetched,
    fm: Option<&FmOutput>,
) -> BTreeMap<String, BTreeMap<String, Vec<f32>>> {
    let example = &fetched.example[0];
    // Shadows on another FM version are measured after the answer only.
    let asked = fetched.fm().version();
    let shadows = fetched.set.shadows(example.surface).iter().filter(|arm| arm.fm == asked);
    let answer = fm.map(|output| fetched.fm().aligned(output));
    let fm_rows = |arm: &ExpertArm| arm.fm_rows(answer.as_ref());
    let predict = |arm: &Arc<ExpertArm>| match arm.expert().predict(&[example], fm_rows(arm)) {
        Ok(predictions) => Some((arm.name.clone(), by_task(&predictions))),
        Err(fault) => {
            tracing::debug!(%fault, "a shadow expert failed; the request is not affected");
            None
        }
    };
    shadows.filter_map(predict).collect()
}

pub(crate) fn by_task(predictions: &ExpertPredictions) -> BTreeMap<String, Vec<f32>> {
    predictions.tasks.iter().map(|task| (task.task.clone(), task.values.clone())).collect()
}
