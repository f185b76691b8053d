//! What rollouts need to know of the versions that serve: their statistics and the quality of their
//! predictions.

use std::{collections::BTreeMap, sync::Arc};

use hypercast_expert::{
    Engine, ServedExpert,
    wasm::contract::{Quality as Measured, Slice},
};
use hypercast_stream::{registry::VersionState, streams::StreamEngine as Streams};

use crate::{
    error::Result,
    http::reload::Settings,
    metrics::{
        prediction_log::QualityKey,
        window::{LiveQuality, QualityWindow},
    },
    request::service::RankingService,
    rollout::{Acceptor, ArmStats, RolloutContext, RolloutService, replay},
};

/// A loaded version.
pub struct LoadedArm {
    /// Its state in the registry.
    pub state: VersionState,
    /// The share of the users that it serves.
    pub share: f64,
    /// Its requests, faults and times.
    pub stats: Arc<ArmStats>,
    /// The expert.
    pub expert: Arc<ServedExpert>,
    /// Whether it runs without the TAE.
    pub without_tae: bool,
}

/// Looks up loaded versions.
pub trait VersionLookup: Send + Sync {
    /// A loaded version of an expert.
    fn arm(&self, name: &str, version: &str) -> Option<LoadedArm>;

    /// Why the registry's newest decision is not served.
    fn problem(&self) -> Option<String>;

    /// Recent quality of a version beside another one of the same expert: each task on each
    /// surface, and on all surfaces together.
    fn slices(&self, name: &str, version: &str, before: Option<&str>) -> Vec<Slice>;
}

/// Starts the rollouts of a daemon with experts.
pub(crate) fn start(
    settings: Arc<Settings>,
    service: Arc<RankingService>,
    wasm: Engine,
    streams: Arc<dyn Streams>,
) -> Result<RolloutService> {
    let schema = Arc::new(service.schema().clone());
    let config = settings.now();
    let trusted = Box::new(move || Ok(settings.now().rollout.keys()?));
    let acceptor = Acceptor::new(&config, trusted, schema.clone(), wasm, streams.clone())?;
    let acceptor = Arc::new(acceptor);
    RolloutService::start(
        &config,
        RolloutContext { acceptor, serving: service, streams, schema, replay: replay::run },
    )
}

impl VersionLookup for RankingService {
    fn arm(&self, name: &str, version: &str) -> Option<LoadedArm> {
        let set = self.models().set();
        let arm = set.arms().iter().find(|arm| arm.name == name && arm.version == version)?;
        Some(LoadedArm {
            state: arm.state(),
            share: arm.share,
            stats: arm.stats().clone(),
            expert: arm.expert(),
            without_tae: arm.without_tae(),
        })
    }

    fn problem(&self) -> Option<String> {
        self.models().problem()
    }

    fn slices(&self, name: &str, version: &str, before: Option<&str>) -> Vec<Slice> {
        let label = |version: &str| format!("{name}@{version}");
        let (own, before) = (label(version), before.map(label));
        // By task and surface: the windows of the version and of the one before.
        let mut pairs: BTreeMap<(String, u16), [Option<QualityWindow>; 2]> = BTreeMap::new();
        for (QualityKey { surface, task, arm }, window) in self.predictions().windows() {
            let place = match &arm {
                arm if *arm == own => 0,
                arm if Some(arm) == before.as_ref() => 1,
                _ => continue,
            };
            pairs.entry((task, surface)).or_default()[place] = Some(window);
        }
        let mut slices = Vec::new();
        let mut whole: BTreeMap<String, [Vec<QualityWindow>; 2]> = BTreeMap::new();
        for ((task, surface), [own, before]) in pairs {
            let Some(own) = own else { continue };
            slices.push(Slice {
                task: task.clone(),
                surface: Some(self.schema().surfaces[usize::from(surface)].clone()),
                examples: own.quality().n,
                candidate: measured(own.quality()),
                serving: before.as_ref().map(|before| measured(before.quality())),
            });
            let [owns, befores] = whole.entry(task).or_default();
            owns.push(own);
            befores.extend(before);
        }
        slices.extend(whole.into_iter().map(|(task, [owns, befores])| {
            let own = QualityWindow::together(owns.iter());
            Slice {
                task,
                surface: None,
                examples: own.n,
                candidate: measured(own),
                serving: (!befores.is_empty())
                    .then(|| measured(QualityWindow::together(befores.iter()))),
            }
        }));
        slices
    }
}

fn measured(quality: LiveQuality) -> Measured {
    // Outcomes are kept without users, and regressions are not measured here.
    let (ne, calibration) = (quality.ne, quality.calibration);
    Measured { ne, auc: None, gauc: None, calibration, mse: None }
}
