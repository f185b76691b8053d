//! What rollouts need to know of the versions that serve: their statistics and the quality of their
//! predictions.

use std::{collections::BTreeMap, sync::Arc};

use hypercast_expert::wasm::contract::{Quality, Slice};

use crate::{
    error::Result,
    http::reload::Settings,
    metrics::{
        prediction_log::QualityKey,
        window::{LiveQuality, QualityWindow},
    },
    request::service::RankingService,
    rollout::{Acceptor, ArmStats, RolloutContext, RolloutService, evaluation::EvaluateFn, replay},
    versions::{loader::LoaderContext, serving_set::ExpertArm},
};

/// Looks up loaded versions.
pub trait VersionLookup: Send + Sync {
    /// A loaded version of an expert.
    fn arm(&self, name: &str, version: &str) -> Option<Arc<ExpertArm>>;

    /// What is measured of a loaded version; needs no guest, unlike the version itself.
    fn measured(&self, name: &str, version: &str) -> Option<MeasuredArm> {
        self.arm(name, version).map(|arm| MeasuredArm::new(&arm))
    }

    /// Why the registry's newest decision is not served.
    fn problem(&self) -> Option<String>;

    /// Recent quality of a version beside another one of the same expert: each task on each
    /// surface, and on all surfaces together.
    fn slices(&self, name: &str, version: &str, before: Option<&str>) -> Vec<MeasuredSlice>;
}

/// The quality of a version for a task, with what a plugin is not told.
pub struct MeasuredSlice {
    /// What the plugin is told.
    pub slice: Slice,
    /// The version's error over that of the base rate, as far as it counts (see
    /// [`LiveQuality::relative_error`]).
    pub error: Option<f64>,
    /// That of the version before.
    pub error_before: Option<f64>,
}

/// What is measured of a loaded version.
pub struct MeasuredArm {
    /// The share of the expert's users that it serves.
    pub share: f64,
    /// Its counts since it was loaded.
    pub stats: Arc<ArmStats>,
    /// Asks its plugin how good it is.
    pub evaluate: EvaluateFn,
}

impl MeasuredArm {
    fn new(arm: &ExpertArm) -> Self {
        let expert = arm.expert();
        let evaluate: EvaluateFn = Box::new(move |evaluation| {
            let blueprint = expert.blueprint();
            blueprint.plugin.evaluate(&blueprint.info, evaluation)
        });
        Self { share: arm.share, stats: arm.live.stats.clone(), evaluate }
    }
}

/// Starts the rollouts of a daemon with experts. Goes on with the pushes of `before`, whose thread
/// has ended.
pub(crate) fn start(
    settings: Arc<Settings>,
    service: Arc<RankingService>,
    shared: &LoaderContext,
    before: Option<&RolloutService>,
) -> Result<RolloutService> {
    let (schema, config) = (service.converter.schema.clone(), settings.now());
    let acceptor = match before {
        Some(before) => before.acceptor.under(schema),
        None => Acceptor::new(settings, schema, shared.wasm.clone(), shared.streams.clone())?,
    };
    let acceptor = Arc::new(acceptor.with_content(service.content_dim));
    let context = RolloutContext { acceptor, serving: service, replay: replay::run };
    RolloutService::start(&config, context)
}

impl VersionLookup for RankingService {
    fn arm(&self, name: &str, version: &str) -> Option<Arc<ExpertArm>> {
        let set = self.models.set();
        set.arms.iter().find(|arm| arm.name == name && arm.version == version).cloned()
    }

    fn problem(&self) -> Option<String> {
        self.models.problem()
    }

    fn slices(&self, name: &str, version: &str, before: Option<&str>) -> Vec<MeasuredSlice> {
        let label = |version: &str| format!("{name}@{version}");
        let windows = self.predictions.windows();
        // The windows of the version and of the one before: of each task on each surface, then on
        // all.
        let mut pairs: BTreeMap<(bool, &str, u16), [Vec<&QualityWindow>; 2]> = BTreeMap::new();
        for (key, own) in windows.iter().filter(|(key, _)| key.arm == label(version)) {
            let of_before = |before| QualityKey { arm: label(before), ..key.clone() };
            let before = before.and_then(|before| windows.get(&of_before(before)));
            for place in [(false, &*key.task, key.surface), (true, &*key.task, 0)] {
                let [owns, befores] = pairs.entry(place).or_default();
                owns.push(own);
                befores.extend(before);
            }
        }
        let slices = pairs.iter().map(|((whole, task, surface), windows)| {
            let [own, before] = windows.each_ref().map(|windows| {
                (!windows.is_empty()).then(|| QualityWindow::together(windows.iter().copied()))
            });
            let own = own.unwrap_or_default();
            MeasuredSlice {
                error: own.relative_error(),
                error_before: before.and_then(|before| before.relative_error()),
                slice: Slice {
                    task: (*task).to_owned(),
                    surface: (!whole)
                        .then(|| self.converter.schema.surfaces[usize::from(*surface)].clone()),
                    examples: own.n,
                    candidate: told(own),
                    serving: before.map(told),
                },
            }
        });
        slices.collect()
    }
}

/// What a plugin is told of a quality. Outcomes are kept without users.
fn told(LiveQuality { ne, calibration, mse, .. }: LiveQuality) -> Quality {
    Quality { ne, auc: None, gauc: None, calibration, mse }
}
