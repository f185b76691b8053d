//! Whether what an FM's trainer learned may be published. It is compared with the FM that serves on
//! the newest requests: those that the trainer predicted before it learned from them, and that what
//! serves has not learned from.
//!
//! What serves is the version's own last publication, loaded as a daemon loads it, or before the
//! first publication the version that answers. The gate holds a publication whose NE is worse than
//! the limit allows; a first one that is no better than the base rate; and one whose TAEs or
//! feature statistics moved too far, since experts are pinned to a version's TAEs. A model that has
//! more than doubled what it learned may move. Where nothing can be compared, because there are too
//! few rows or nothing serves, it publishes.

use std::{borrow::Cow, collections::VecDeque, mem, path::Path, sync::Arc};

use hypercast_fm::{
    checkpoint::FmManifest,
    example::Example,
    inference::{FmOutput, FmServingOptions, FoundationModel},
    runtime::FmRuntime,
    spec::FmSpec,
    standardise::ColumnShift,
    trainer::{FmTrainer, StepOutput},
};
use serde_json::{Value, json};

use super::super::{
    eval_window::{EvalWindow, WindowPredictions, WindowRow},
    holds::HoldLog,
    logging::{FmLoading, LoadedFmVersion, Registered, RequestPoint},
};
use super::serving_follower::{ServingFollower, ServingSlot};
use crate::ServiceContext;
use crate::error::Result;
use crate::job_metrics::JobMetrics;
use hypercast_config::FmGateSettings;
use hypercast_core::logging::RepeatedFailures;
use hypercast_data::schema::spec_growths;
use hypercast_expert::train::TaskTargets;

/// The newest requests that are kept until the next publication. A request is at most a record of
/// the stream.
pub(super) const MOST_REQUESTS: usize = 256;

/// The newest requests whose TAEs are compared.
const TAE_REQUESTS: usize = 32;

/// Decides what of an FM is published.
pub(super) struct FmPublishGate {
    settings: FmGateSettings,
    spec: FmSpec,
    /// Whether this version was published, so that its own publications are what serves.
    has_published: bool,
    serving: ServingSlot,
    requests: VecDeque<MeasuredRequest>,
    /// How many of the newest requests are not in the window yet.
    unscored: usize,
    pub(super) window: EvalWindow,
    /// Requests up to this time may come a second time, and say nothing then.
    pub(super) reread_until_ms: Option<i64>,
    tae_drift: Option<f64>,
    failures: RepeatedFailures,
    holds: HoldLog,
}

/// What is trained, and where.
pub(super) struct TrainedVersion<'a> {
    pub(super) version: &'a str,
    pub(super) spec: &'a FmSpec,
    /// The trainer's work folder.
    pub(super) work: &'a Path,
    pub(super) has_published: bool,
    pub(super) runtime: Arc<dyn FmRuntime>,
}

/// A request with what the trainer said of its targets before it learned from them.
struct MeasuredRequest {
    example: Example,
    position: u64,
    /// `[targets * tasks]`.
    predictions: Vec<f32>,
    labels: Vec<f32>,
    mask: Vec<bool>,
}

/// What the gate decided, and what it measured, for people.
pub(super) struct FmVerdict {
    /// Why the publication is held; `None` if it is not.
    pub(super) held: Option<String>,
    pub(super) evaluation: Value,
    pub(super) tae_drift: Option<f64>,
}

impl FmPublishGate {
    pub(super) fn new(
        context: &ServiceContext<'_>,
        trained: &TrainedVersion<'_>,
        window: EvalWindow,
        telemetry: &JobMetrics,
    ) -> Result<FmPublishGate> {
        let ServiceContext { config, engine, dataset } = context;
        let serving = FmServingOptions {
            device: config.device,
            history_cache_bytes: 0,
            warmup_histories: 0,
            growths: spec_growths(&dataset.schema)?.into(),
        };
        let loading = FmLoading {
            engine: engine.clone(),
            runtime: trained.runtime.clone(),
            serving,
            work: trained.work.join("serving"),
        };
        let registered = Registered::new(&**engine, &config.paths.fm)?;
        let serving = ServingFollower::new(trained.version, loading, registered);
        Ok(FmPublishGate {
            settings: config.fm_gate.clone(),
            spec: trained.spec.clone(),
            has_published: trained.has_published,
            serving: ServingSlot::new(serving),
            requests: VecDeque::new(),
            unscored: 0,
            window,
            reread_until_ms: None,
            tae_drift: None,
            failures: RepeatedFailures::default(),
            holds: HoldLog::new(trained.work, telemetry),
        })
    }

    /// Notes what was said of requests that are not learned from yet, by their positions in the
    /// stream.
    pub(super) fn observe(&mut self, examples: Vec<Example>, positions: &[u64], said: &StepOutput) {
        if self.settings.rows == 0 {
            return;
        }
        let (width, mut row) = (self.spec.tasks.len(), 0);
        for (at, (example, &position)) in examples.into_iter().zip(positions).enumerate() {
            let cells = row * width..(row + example.targets.len()) * width;
            row += example.targets.len();
            let is_known = self.reread_until_ms.is_some_and(|until_ms| example.time_ms <= until_ms);
            if said.set_aside.contains(&at) || cells.is_empty() || is_known {
                continue;
            }
            if self.requests.len() == MOST_REQUESTS {
                self.requests.pop_front();
            }
            self.requests.push_back(MeasuredRequest {
                example,
                position,
                predictions: said.predictions[cells.clone()].to_vec(),
                labels: said.labels[cells.clone()].to_vec(),
                mask: said.mask[cells].to_vec(),
            });
            self.unscored = (self.unscored + 1).min(self.requests.len());
        }
    }

    /// Notes what is said of requests that will come again when they are learned from, for one
    /// decision alone ([`FmPublishGate::take_back`]). Those of which no number is said are set
    /// aside, as learning from them would be, unless that is so of all: then the weights are why.
    pub(super) fn look_at(&mut self, examples: Vec<Example>, positions: &[u64], said: StepOutput) {
        let (width, mut row) = (self.spec.tasks.len(), 0);
        let mut is_harmful = |example: &Example| {
            let mut cells = row * width..(row + example.targets.len()) * width;
            row += example.targets.len();
            cells.any(|cell| said.mask[cell] && !said.predictions[cell].is_finite())
        };
        let all = 0..examples.len();
        let mut set_aside: Vec<usize> = all.filter(|&at| is_harmful(&examples[at])).collect();
        if set_aside.len() == examples.len() {
            set_aside.clear();
        }
        self.observe(examples, positions, &StepOutput { set_aside, ..said });
    }

    /// Forgets what was looked at since the window had these rows. Where it led to the first
    /// publication, they say nothing more either.
    pub(super) fn take_back(&mut self, rows: VecDeque<WindowRow>) {
        self.forget();
        if !self.has_published {
            self.window.rows = rows;
        }
    }

    /// Adds the requests that were observed since to the window, with what the FM that serves says
    /// of them.
    pub(super) fn score(&mut self) {
        if self.settings.rows == 0 {
            return;
        }
        if let Err(error) = self.serving.wait().catch_up(self.has_published)
            && self.failures.is_news(&error)
        {
            tracing::warn!(%error, "what serves cannot be loaded, so that nothing is compared with it");
        }
        let first = self.requests.len() - mem::take(&mut self.unscored);
        let new = self.requests.range(first..);
        let (mut fresh, mut learned): (Vec<_>, Vec<_>) =
            new.partition(|request| self.is_fresh(request));
        let examples = fresh.iter().map(|request| &request.example);
        let said = self.comparable().map(|fm| self.infer_served(fm, examples)).transpose();
        let serving = said.unwrap_or_else(|error| {
            if self.failures.is_news(&error) {
                tracing::warn!(%error, "what serves cannot predict, so that nothing is compared with it");
            }
            None
        });
        if self.has_published {
            // They say nothing: what serves has learned from them.
            learned.clear();
        }
        let serving = match serving {
            Some(said) => columns(&said.main, self.spec.main_tasks().len()),
            None => {
                learned.append(&mut fresh);
                Vec::new()
            }
        };
        for (requests, serving) in [(learned, Vec::new()), (fresh, serving)] {
            let measured = MeasuredColumns::of(&requests, &self.spec);
            let said = WindowPredictions {
                candidate: &measured.candidate,
                serving: &serving,
                targets: &measured.targets,
            };
            self.window.push(requests.iter().map(|request| &request.example), said, |_| true);
        }
    }

    /// Measures how far the TAEs of what may be published are from those that this version serves.
    ///
    /// # Errors
    /// The trainer fails to predict.
    pub(super) fn compare_taes(&mut self, trainer: &dyn FmTrainer) -> Result<()> {
        self.tae_drift = None;
        let newest = self.requests.iter().rev().take(TAE_REQUESTS);
        let newest: Vec<&Example> = newest.map(|request| &request.example).collect();
        let Some(fm) = self.comparable().filter(|_| self.has_published && !newest.is_empty())
        else {
            return Ok(());
        };
        let candidate = trainer.predict(&newest)?.tae;
        match self.infer_served(fm, newest.iter().copied()) {
            Ok(serving) => self.tae_drift = Some(relative_distance(&candidate, &serving.tae)),
            Err(error) if self.failures.is_news(&error) => {
                tracing::warn!(%error, "what serves gives no TAEs to compare with");
            }
            Err(_) => {}
        }
        Ok(())
    }

    /// What is decided of weights with this manifest.
    pub(super) fn judge(&self, manifest: &FmManifest) -> FmVerdict {
        let mut reasons: Vec<String> = Vec::new();
        reasons.extend(self.window.beyond(&self.settings.ne_limits()));
        if !self.has_published {
            reasons.extend(self.window.above_base_rate());
        }
        reasons.extend(self.drift(manifest));
        let held = (!reasons.is_empty()).then(|| reasons.join("; "));
        let evaluation = self.window.line();
        FmVerdict { held, evaluation, tae_drift: self.tae_drift }
    }

    /// Notes a publication that is held.
    ///
    /// # Errors
    /// The work folder cannot be written.
    pub(super) fn held(&self, reason: &str) -> Result<()> {
        self.holds.held(reason)
    }

    /// From here on the version's own last publication is what serves.
    ///
    /// # Errors
    /// The work folder cannot be written.
    pub(super) fn published(&mut self) -> Result<()> {
        if !mem::replace(&mut self.has_published, true) {
            self.forget();
        }
        self.holds.released()
    }

    /// Has the version's own last publication loaded beside learning, for the next comparison.
    pub(super) fn catch_up_beside(&mut self) {
        if self.has_published && self.settings.rows > 0 {
            self.serving.catch_up_beside();
        }
    }

    /// Whether that is not done yet, so that a comparison would wait for it.
    pub(super) fn is_catching_up(&self) -> bool {
        self.serving.is_loading()
    }

    /// Forgets what was observed.
    fn forget(&mut self) {
        self.requests.clear();
        self.unscored = 0;
        self.window.rows.clear();
    }

    /// What serves, if anything does; all that compares looks at it after a
    /// [`FmPublishGate::score`].
    fn loaded(&self) -> Option<&LoadedFmVersion> {
        self.serving.idle()?.loaded()
    }

    /// The FM that serves, if it predicts the same tasks from the same columns.
    fn comparable(&self) -> Option<&dyn FoundationModel> {
        let fm = self.loaded()?.fm.as_deref()?;
        (fm.manifest().spec == self.spec.served()).then_some(fm)
    }

    /// What the FM that serves says of examples of the trainer's.
    fn infer_served<'a>(
        &self,
        fm: &dyn FoundationModel,
        examples: impl Iterator<Item = &'a Example>,
    ) -> hypercast_fm::Result<FmOutput> {
        let served = examples.map(|example| self.spec.served_example(example));
        let served: Vec<Cow<'_, Example>> = served.collect();
        fm.infer(&served.iter().map(|example| &**example).collect::<Vec<_>>())
    }

    /// Whether what serves has not learned from a request.
    fn is_fresh(&self, request: &MeasuredRequest) -> bool {
        let Some(serving) = self.loaded() else { return true };
        let (position, time_ms) = (request.position, request.example.time_ms);
        match (serving.trained, &serving.fm) {
            (Some(trained), _) => !RequestPoint { position, time_ms }.may_be_learned(trained),
            (None, Some(fm)) => time_ms > fm.manifest().trained_until_ms,
            (None, None) => true,
        }
    }

    /// Says what moved too far in this version since it was published last.
    fn drift(&self, manifest: &FmManifest) -> Option<String> {
        let before = self.comparable().filter(|_| self.has_published)?.current_manifest();
        if manifest.requests > 2 * before.requests {
            return None;
        }
        let FmGateSettings { max_tae_drift, max_feature_drift, .. } = self.settings;
        let is_beyond = |drift: f64, limit: f64| drift.is_nan() || drift > limit;
        if let Some(drift) = self.tae_drift.filter(|&drift| is_beyond(drift, max_tae_drift)) {
            return Some(format!(
                "TAEs moved by {drift:.2} of their size, above fm_gate.max_tae_drift of \
                 {max_tae_drift}"
            ));
        }
        let (now, before) = (&manifest.statistics, &before.statistics);
        let shifts = [
            ("of items", now.item_dense.shift_from(&before.item_dense)),
            ("of candidates", now.features.shift_from(&before.features)),
        ];
        let beyond = shifts.into_iter().find_map(|(whose, shift)| {
            let beyond = shift.filter(|shift| is_beyond(shift.deviations, max_feature_drift))?;
            Some((whose, beyond))
        });
        beyond.map(|(whose, ColumnShift { column, deviations })| {
            format!(
                "the mean of numeric column {column} {whose} moved by {deviations:.1} standard \
                 deviations, above fm_gate.max_feature_drift of {max_feature_drift}"
            )
        })
    }
}

impl FmVerdict {
    /// Adds what was measured to a line for people.
    pub(super) fn describe(&self, line: &mut Value) {
        line["evaluation"] = self.evaluation.clone();
        line["tae_drift"] = json!(self.tae_drift);
    }
}

/// What was said of requests' main tasks, by task.
struct MeasuredColumns {
    candidate: Vec<Vec<f32>>,
    targets: Vec<TaskTargets>,
}

impl MeasuredColumns {
    fn of(requests: &[&MeasuredRequest], spec: &FmSpec) -> MeasuredColumns {
        let (width, main) = (spec.tasks.len(), spec.main_tasks().len());
        let mut columns =
            MeasuredColumns { candidate: Vec::new(), targets: vec![TaskTargets::default(); main] };
        columns.candidate.resize(main, Vec::new());
        for request in requests {
            for cell in (0..request.predictions.len()).filter(|cell| cell % width < main) {
                let (task, targets) = (cell % width, &mut columns.targets[cell % width]);
                columns.candidate[task].push(request.predictions[cell]);
                targets.labels.push(request.labels[cell]);
                targets.mask.push(request.mask[cell]);
                targets.weights.push(1.0);
            }
        }
        columns
    }
}

/// The columns of a matrix `[rows * width]`.
fn columns(matrix: &[f32], width: usize) -> Vec<Vec<f32>> {
    let column = |at| matrix.iter().skip(at).step_by(width).copied().collect();
    (0..width).map(column).collect()
}

/// The distance of `a` from `b` over the size of `b`.
fn relative_distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|value| f64::from(value).powi(2)).sum::<f64>()
    };
    let apart = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (apart / square(&mut b.iter().copied()).max(f64::MIN_POSITIVE)).sqrt()
}
