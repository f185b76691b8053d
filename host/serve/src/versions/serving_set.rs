//! The versions that serve at one moment: FM versions, and for each surface the expert versions
//! that share its users. A set never changes; a request uses one from its beginning to its end.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
};

use hypercast_config::{FlopsShare, OverFlopsShare, PluginLimits};
use hypercast_core::clock::now_ms;
use hypercast_data::schema::{MainTasks, Schema};
use hypercast_expert::{ExpertTimes, Fault, FmRows, RankOutcome, ServedExpert, Tae};
use hypercast_fm::{
    checkpoint::FmManifest, cost::one_stage_flops, history::CacheCounts, inference::FmOutput,
    spec::TaskSpec,
};
use hypercast_stream::registry::{
    Shares, VersionState, WeightsLocation, choose_version, user_bucket,
};

use crate::{
    fm::FmTier,
    metrics::arm_outcomes::TrafficSplit,
    rollout::ArmStats,
    threads::{Current, lock},
    versions::desired_set::{DesiredExpert, DesiredFm},
};

/// A loaded FM version.
#[derive(Clone)]
pub struct ServedFm {
    /// Where it runs.
    pub tier: Arc<FmTier>,
    pub(crate) desired: DesiredFm,
    /// What experts read of its predictions; none in a process without experts.
    pub(super) main_tasks: MainTasks,
}

/// An FM's answer as experts read it.
pub struct AlignedOutput<'a> {
    tae: &'a [f32],
    /// Of the schema's main tasks.
    predictions: Cow<'a, [f32]>,
}

impl ServedFm {
    /// The manifest of its checkpoint.
    pub fn manifest(&self) -> &FmManifest {
        self.tier.manifest()
    }

    /// The version of the expert, a semver.
    pub fn version(&self) -> &str {
        &self.manifest().version
    }

    /// Whether files that it reads are damaged which were made of publications, so that they can be
    /// made again, or it runs in another process and has changed there.
    pub(super) fn is_to_be_made_anew(&self) -> bool {
        let is_published = self.desired.weights == WeightsLocation::Published;
        self.tier.is_outgrown() || (is_published && self.tier.check_files().is_err())
    }

    /// The tasks that it predicts itself.
    pub fn tasks(&self) -> &[TaskSpec] {
        self.manifest().spec.main_tasks()
    }

    /// Its answer as experts read it, whose main tasks are the schema's.
    pub fn aligned<'a>(&self, output: &'a FmOutput) -> AlignedOutput<'a> {
        AlignedOutput { tae: &output.tae, predictions: self.predictions(output) }
    }

    /// Its predictions of the schema's main tasks.
    pub fn predictions<'a>(&self, output: &'a FmOutput) -> Cow<'a, [f32]> {
        self.main_tasks.predictions(&self.manifest().spec, &output.main)
    }
}

/// A loaded expert version.
#[derive(Clone)]
pub struct ExpertArm {
    /// The expert's name.
    pub name: String,
    /// The version of the expert, a semver.
    pub version: String,
    /// `NAME@VERSION`, in metrics and answers.
    pub label: String,
    /// The FM version that it pins.
    pub fm: String,
    /// The share of the expert's users that it serves.
    pub share: f64,
    pub(crate) live: Arc<LiveExpert>,
    pub(crate) desired: DesiredExpert,
}

/// An expert whose parameters may be replaced by newer ones. Serving sets share it, so that a new
/// set does not lose an update.
pub(crate) struct LiveExpert {
    pub(super) expert: Current<ServedExpert>,
    /// Its statistics since it was loaded.
    pub(crate) stats: Arc<ArmStats>,
}

impl LiveExpert {
    pub(crate) fn new(expert: ServedExpert) -> Self {
        Self { expert: Current::new(expert), stats: Arc::default() }
    }
}

impl ExpertArm {
    /// What the expert reads of the FM's answer: nothing if it was trained without.
    pub fn fm_rows<'a>(&self, answer: Option<&'a AlignedOutput<'_>>) -> FmRows<'a> {
        let answer = answer.filter(|_| !self.desired.without_tae);
        answer.map_or(FmRows::WITHOUT, |AlignedOutput { tae, predictions }| FmRows {
            tae: Tae::Rows(tae),
            predictions,
        })
    }

    /// The expert with its newest parameters. A request calls this once.
    pub fn expert(&self) -> Arc<ServedExpert> {
        self.live.expert.now()
    }

    /// Counts a request that it ranked, or failed to.
    pub fn count(&self, outcome: &RankOutcome, spent: ExpertTimes) {
        let fault = match outcome {
            // A busy plugin is not this version's fault.
            RankOutcome::Degraded(fault) if !matches!(fault.cause, Fault::Busy(_)) => Some(fault),
            _ => None,
        };
        self.live.stats.add(spent.network + spent.wasm, fault.is_some());
        // An open breaker repeats the faults before it, so its message is left out.
        if let Some(fault) = fault.filter(|fault| fault.cause != Fault::Open) {
            self.live.stats.add_fault(now_ms(), fault.to_string());
        }
    }
}

/// The expert versions of a surface.
#[derive(Clone, Default)]
struct SurfaceRoute {
    expert: String,
    shares: Shares,
    arms: BTreeMap<String, Arc<ExpertArm>>,
    shadows: Vec<Arc<ExpertArm>>,
}

/// The set of versions that serve.
#[derive(Clone)]
pub struct ServingSet {
    /// Number of registry decisions that it includes.
    pub revision: u64,
    /// The longest history that one of its FMs reads.
    pub max_history: usize,
    /// The most candidates of a request, for which the memory of its experts was checked.
    pub max_candidates: usize,
    /// Why shadow and standby versions could not be loaded.
    pub unloaded: Vec<String>,
    fms: BTreeMap<String, ServedFm>,
    default_fm: String,
    /// Every expert version, including those on standby.
    pub(crate) arms: Vec<Arc<ExpertArm>>,
    routes: HashMap<u16, SurfaceRoute>,
}

impl ServingSet {
    /// Builds the set from loaded versions, for requests of at most `max_candidates`.
    ///
    /// # Panics
    /// If `default_fm` is not among the FMs.
    pub fn new(
        max_candidates: usize,
        fms: Vec<ServedFm>,
        default_fm: String,
        arms: Vec<Arc<ExpertArm>>,
    ) -> Self {
        let fms: BTreeMap<String, ServedFm> =
            fms.into_iter().map(|fm| (fm.version().to_owned(), fm)).collect();
        assert!(fms.contains_key(&default_fm), "FM {default_fm} is not loaded");
        let mut routes: HashMap<u16, SurfaceRoute> = HashMap::new();
        for arm in &arms {
            for &surface in &arm.desired.surfaces {
                let route = routes.entry(surface).or_default();
                match arm.desired.state {
                    VersionState::Shadow => route.shadows.push(arm.clone()),
                    _ if arm.share > 0.0 => {
                        route.expert.clone_from(&arm.name);
                        route.shares.insert(arm.version.clone(), arm.share);
                        route.arms.insert(arm.version.clone(), arm.clone());
                    }
                    _ => {}
                }
            }
        }
        let lengths = fms.values().map(|fm| fm.manifest().config.max_history);
        let max_history = lengths.max().unwrap_or(0);
        let (revision, unloaded) = (0, Vec::new());
        Self { revision, max_history, max_candidates, unloaded, fms, default_fm, arms, routes }
    }

    /// An FM version, if it is loaded.
    pub fn fm(&self, version: &str) -> Option<&ServedFm> {
        self.fms.get(version)
    }

    /// The FM that answers where no expert does.
    pub fn default_fm(&self) -> &ServedFm {
        &self.fms[&self.default_fm]
    }

    /// Every FM version that is loaded.
    pub fn fms(&self) -> impl Iterator<Item = &ServedFm> {
        self.fms.values()
    }

    /// The expert version that serves a user on a surface.
    pub fn arm(&self, surface: u16, user: u64) -> Option<&Arc<ExpertArm>> {
        let route = self.routes.get(&surface)?;
        route.arms.get(choose_version(&route.shares, user_bucket(user, &route.expert))?)
    }

    /// The versions that share the users of a surface.
    pub fn split(&self, surface: u16) -> Option<TrafficSplit<'_>> {
        let SurfaceRoute { expert, shares, .. } = self.routes.get(&surface)?;
        (!shares.is_empty()).then_some(TrafficSplit { expert, shares })
    }

    /// The shadow experts of a surface.
    pub fn shadows(&self, surface: u16) -> &[Arc<ExpertArm>] {
        self.routes.get(&surface).map_or(&[], |route| &route.shadows)
    }

    /// Hits and misses of the history caches of all FM versions in this process.
    pub fn cache_counts(&self) -> CacheCounts {
        let counts = self.fms().filter_map(|fm| fm.tier.cache_counts());
        counts.fold(CacheCounts::default(), |sum, more| CacheCounts {
            full_hits: sum.full_hits + more.full_hits,
            cached_tokens: sum.cached_tokens + more.cached_tokens,
            encoded_tokens: sum.encoded_tokens + more.encoded_tokens,
            warmup_tokens: sum.warmup_tokens + more.warmup_tokens,
            bytes: sum.bytes + more.bytes,
        })
    }

    /// What is wrong with files that its FMs read while they serve, by FM.
    pub fn lost_files(&self) -> Vec<String> {
        let lost = self.fms().filter_map(|fm| {
            let error = fm.tier.check_files().err()?;
            Some(format!("FM {}: {error}", fm.version()))
        });
        lost.collect()
    }

    /// What an expert's network costs beside a one-stage model of the size of its FM.
    pub(crate) fn flops_share(&self, arm: &ExpertArm) -> Option<FlopsShare> {
        let FmManifest { config, spec, .. } =
            self.fms().find(|fm| fm.version() == arm.fm)?.manifest();
        let network = arm.expert().blueprint().flops();
        Some(FlopsShare { network, one_stage: one_stage_flops(config, spec) })
    }

    /// How that is more than a new version may cost, if it is.
    pub(crate) fn over_flops_share(
        &self,
        arm: &ExpertArm,
        schema: &Schema,
        limits: &PluginLimits,
    ) -> Option<OverFlopsShare> {
        let surface = |at: &u16| schema.surfaces.get(usize::from(*at)).cloned();
        let surfaces: Vec<String> = arm.desired.surfaces.iter().filter_map(surface).collect();
        limits.check_flops_share(&surfaces, self.flops_share(arm)?).err()
    }

    fn problem(&self) -> Option<String> {
        (!self.unloaded.is_empty()).then(|| self.unloaded.join("; "))
    }

    /// FM versions that are shadows.
    pub fn shadow_fms(&self) -> impl Iterator<Item = &ServedFm> {
        self.fms().filter(|fm| fm.desired.state == VersionState::Shadow)
    }
}

/// The current set, and what is wrong with the one that should follow it.
pub struct ServingModels {
    set: Current<ServingSet>,
    /// Why the registry's newest decision is not served.
    pub(crate) problem: Mutex<Option<String>>,
    /// Versions that should serve and are not loaded.
    pub(crate) missing: Mutex<Vec<String>>,
}

impl ServingModels {
    /// Begins with a set.
    pub fn new(set: ServingSet) -> Self {
        let problem = set.problem();
        Self { set: Current::new(set), problem: Mutex::new(problem), missing: Mutex::default() }
    }

    /// The current set. A request calls this once.
    pub fn set(&self) -> Arc<ServingSet> {
        self.set.now()
    }

    /// Replaces the set from the next request on.
    pub fn swap(&self, set: ServingSet) {
        let problem = set.problem();
        // Models that only the old set has are unloaded here, or by its last request.
        self.set.replace(set);
        *lock(&self.problem) = problem;
    }

    /// Lets the current versions take requests of at most so many candidates.
    pub(super) fn limit_candidates(&self, max_candidates: usize) {
        let set = self.set();
        if set.max_candidates != max_candidates {
            self.set.replace(ServingSet { max_candidates, ..(*set).clone() });
        }
    }

    /// Why the registry's newest decision is not served.
    pub fn problem(&self) -> Option<String> {
        lock(&self.problem).clone()
    }
}
