//! Loads a desired set of versions. It takes over what the old set has already; everything else is
//! loaded and checked here, off the path of requests. A set is complete or is not created.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use hypercast_config::{Config, FmTierConfig};
use hypercast_core::logging::RepeatedFailures;
use hypercast_data::schema::{MainTasks, Schema, fm_spec, spec_growths};
use hypercast_expert::{Blueprint, Engine, LoadOptions, Plugin, SavedParameters, ServedExpert};
use hypercast_fm::growth::SpecGrowth;
use hypercast_fm::inference::{self, FmServingOptions, FoundationModel};
use hypercast_stream::{
    registry::{WeightsLocation, content_hash, read_version_file},
    streams::{StreamEngine as Streams, Topic},
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    fm::{FmTier, batcher::FmBatcher, remote::RemoteFm},
    metrics::Metrics,
    threads::lock,
    versions::{
        desired_set::{DesiredExpert, DesiredFm, DesiredSet},
        serving_set::{ExpertArm, LiveExpert, ServedFm, ServingSet},
        weight_updates::{self, FeedTarget, WeightFeed, WeightFeeds},
    },
};

/// Loads versions for one process.
pub struct VersionLoader {
    pub(super) config: Config,
    fm_config: FmTierConfig,
    schema: Option<Arc<Schema>>,
    /// The width of the content vectors that experts read here; 0 without any.
    content_dim: usize,
    /// The way from FMs of before the schema grew.
    growths: Arc<[SpecGrowth]>,
    wasm: Engine,
    pub(super) metrics: Arc<Metrics>,
    streams: Arc<dyn Streams>,
    /// The streams of published weights that the loaded versions follow.
    pub(crate) feeds: Arc<WeightFeeds>,
    failures: Mutex<RepeatedFailures>,
}

/// What the loaders of a process share.
#[derive(Clone)]
pub struct LoaderContext {
    /// The engine that compiles components and runs all guests.
    pub wasm: Engine,
    /// The streams of published weights.
    pub streams: Arc<dyn Streams>,
    /// The metrics of the process.
    pub metrics: Arc<Metrics>,
}

/// The schema of what a process loads.
pub enum LoaderSchema {
    /// It runs experts, and an FM of this schema, beside content vectors of this width: that of
    /// the data set from which the features of items are loaded.
    OfExperts {
        /// The schema.
        schema: Arc<Schema>,
        /// The width; 0 without any.
        content_dim: usize,
    },
    /// It runs FMs alone. Those of before this schema grew are taken through its growth.
    OfFm(Option<Arc<Schema>>),
}

impl VersionLoader {
    /// A loader for a process with this FM tier.
    ///
    /// # Errors
    /// No FM can be made for the schema.
    pub fn new(
        config: &Config,
        fm_config: &FmTierConfig,
        schema: LoaderSchema,
        context: LoaderContext,
    ) -> Result<Self> {
        let LoaderContext { wasm, streams, metrics } = context;
        let growths = match &schema {
            LoaderSchema::OfExperts { schema, .. } | LoaderSchema::OfFm(Some(schema)) => {
                spec_growths(schema)?.into()
            }
            LoaderSchema::OfFm(None) => Arc::default(),
        };
        let (schema, content_dim) = match schema {
            LoaderSchema::OfExperts { schema, content_dim } => (Some(schema), content_dim),
            LoaderSchema::OfFm(_) => (None, 0),
        };
        Ok(Self {
            config: config.clone(),
            fm_config: fm_config.clone(),
            schema,
            content_dim,
            growths,
            wasm,
            metrics,
            streams,
            feeds: Arc::default(),
            failures: Mutex::default(),
        })
    }

    /// Loads the versions of `plan` that `old` does not have.
    ///
    /// # Errors
    /// A version is missing, damaged, changed or refused; the message names it.
    pub fn load(
        &self,
        plan: &DesiredSet,
        old: Option<&ServingSet>,
        revision: u64,
    ) -> Result<ServingSet> {
        let mut fms: Vec<ServedFm> = Vec::new();
        let (mut configured, mut default) = (None, None);
        // A shadow or standby version that fails to load is reported; it never affects live
        // traffic.
        let mut unloaded = Vec::new();
        for desired in &plan.fms {
            let named = |error: Error| match &desired.version {
                Some(version) => error.within(format!("FM {version}")),
                None => error,
            };
            let fm = match self.fm(desired, old).map_err(named) {
                Ok(fm) => fm,
                Err(error) if !plan.needs(desired) => {
                    unloaded.push(error.to_string());
                    continue;
                }
                Err(error) => return Err(error),
            };
            let version = fm.version().to_owned();
            if desired.version.is_none() {
                configured = Some(version.clone());
            }
            // Shadows come first, so one becomes the default only if there is no other version.
            default = Some(version);
            // The configured checkpoint may also be registered; then one copy serves both.
            if !fms.iter().any(|other| other.version() == fm.version()) {
                fms.push(fm);
            }
        }
        let default = default.ok_or_else(|| {
            Error::invalid(format!("no FM can be served: {}", unloaded.join("; ")))
        })?;
        let mut arms = Vec::new();
        for desired in &plan.experts {
            let arm = self.arm(desired, configured.as_deref().unwrap_or(&default), &fms, old);
            let version = desired.version.as_ref().map(|version| format!(" {version}"));
            let label = format!("expert {}{}", desired.name, version.unwrap_or_default());
            match arm.map_err(|error| error.within(label)) {
                Ok(arm) => arms.push(Arc::new(arm)),
                // Configured experts must all load: a daemon starts with everything or not at all.
                Err(error) if desired.share == 0.0 && desired.version.is_some() => {
                    unloaded.push(error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        let max_candidates = self.config.server.max_candidates;
        let mut set = ServingSet::new(max_candidates, fms, default, arms);
        (set.revision, set.unloaded) = (revision, unloaded);
        self.check_memory(&set)?;
        self.warn_of_flops(&set, old);
        self.metrics.set_versions(&set);
        Ok(set)
    }

    /// Warns of experts, new in this set, whose networks cost more than that of a new version may.
    fn warn_of_flops(&self, set: &ServingSet, old: Option<&ServingSet>) {
        let Some(schema) = &self.schema else { return };
        let was_there = |arm: &ExpertArm| {
            let mut before = old.into_iter().flat_map(|old| &old.arms);
            before.any(|other| Arc::ptr_eq(&other.live, &arm.live))
        };
        for arm in set.arms.iter().filter(|arm| !was_there(arm)) {
            if let Some(over) = set.over_flops_share(arm, schema, &self.config.plugin_limits) {
                let expert = arm.label.as_str();
                tracing::warn!(expert, "{over}: it serves, and a new component like it is refused");
            }
        }
    }

    /// Checks that every expert of a set has the memory for requests of as many candidates as the
    /// configuration allows. Those that `old` had were loaded for other requests.
    ///
    /// # Errors
    /// One needs more; the message names its version, and has the figures.
    pub(super) fn check_memory(&self, set: &ServingSet) -> Result<()> {
        for arm in &set.arms {
            let limits = self.config.load_options(&arm.name, self.content_dim).graph_limits;
            let expert = arm.expert();
            let fits = expert.blueprint().check_memory(&limits.serving, limits.memory_bytes);
            fits.map_err(|error| {
                Error::from(error).within(format!(
                    "expert {} cannot serve {} candidates (server.max_candidates)",
                    arm.label, self.config.server.max_candidates
                ))
            })?;
        }
        Ok(())
    }

    fn fm(&self, desired: &DesiredFm, old: Option<&ServingSet>) -> Result<ServedFm> {
        let alike = |fm: &&ServedFm| {
            (&fm.desired.version, &fm.desired.weights) == (&desired.version, &desired.weights)
        };
        let tier = match old.and_then(|old| old.fms().find(alike)) {
            Some(loaded) if loaded.is_to_be_made_anew() => self.made_anew(loaded),
            Some(loaded) => loaded.tier.clone(),
            None => self.open_fm(desired)?,
        };
        let found = &tier.manifest().version;
        match &desired.version {
            Some(version) if version != found => Err(Error::invalid(format!(
                "the checkpoint registered as FM {version} is FM {found} now; register that, and restore the checkpoint"
            ))),
            _ => {
                let main_tasks = self.schema.as_deref().map(MainTasks::new).unwrap_or_default();
                Ok(ServedFm { tier, desired: desired.clone(), main_tasks })
            }
        }
    }

    /// The FM of published weights in new files, or of another process as it is now; as it was, if
    /// that fails for now.
    fn made_anew(&self, loaded: &ServedFm) -> Arc<FmTier> {
        let version = loaded.version();
        self.open_fm(&loaded.desired).inspect(|_| {
            tracing::warn!(
                version,
                "the FM that served had damaged files or has changed in its own process; it was opened anew"
            );
        }).unwrap_or_else(|error| {
            if lock(&self.failures).is_news(&format!("{version}: {error}")) {
                tracing::error!(%error, version, "the FM that serves has damaged files or has changed in its own process, and cannot be opened anew; trying again");
            }
            loaded.tier.clone()
        })
    }

    fn open_fm(&self, desired: &DesiredFm) -> Result<Arc<FmTier>> {
        if !self.fm_config.url.is_empty() {
            let remote = RemoteFm::connect(&self.fm_config, desired.version.as_deref())?;
            return Ok(Arc::new(FmTier::Remote(Box::new(remote))));
        }
        let growths = self.growths.clone();
        let serving = FmServingOptions { growths, ..self.fm_config.loading(self.config.device) };
        let (fm, published): (Arc<dyn FoundationModel>, _) = match &desired.weights {
            WeightsLocation::Path(dir) => (Arc::from(inference::load(dir, serving)?), None),
            WeightsLocation::Published => {
                let version = desired.version.as_deref().expect("what is published is registered");
                let (streams, topic) = (self.streams.clone(), Topic::fm(version));
                let base = self.config.paths.fm_work.join("served");
                let (fm, follower, folder) =
                    weight_updates::open_fm(streams, topic, &base, serving)?;
                (fm, Some((format!("fm@{version}"), follower, folder)))
            }
        };
        // Else the first request would find it.
        if let Some(schema) = &self.schema
            && let Some(misfit) = fm.manifest().spec.misfit(&fm_spec(schema)?)
        {
            return Err(Error::invalid(format!(
                "FM {} reads {misfit}: it was trained with another schema than the data set's. Let \
                 the schema grow with `hypercast schema apply` instead of editing it, or train the FM \
                 (`hypercast train fm`) and then the experts with this one",
                fm.manifest().version
            )));
        }
        let batcher = FmBatcher::start(fm, &self.fm_config, self.metrics.clone())?;
        let tier = Arc::new(FmTier::Local(batcher));
        if let Some((label, follower, folder)) = published {
            let model = FeedTarget::Fm { tier: Arc::downgrade(&tier), _folder: folder };
            self.feeds.add(WeightFeed::new(label, follower, model));
        }
        Ok(tier)
    }

    fn arm(
        &self,
        desired: &DesiredExpert,
        configured_fm: &str,
        fms: &[ServedFm],
        old: Option<&ServingSet>,
    ) -> Result<ExpertArm> {
        let pinned = desired.fm.as_deref().unwrap_or(configured_fm);
        let fm = fms
            .iter()
            .find(|fm| fm.version() == pinned)
            .ok_or_else(|| Error::invalid(format!("it pins FM {pinned}, which is not loaded")))?;
        let alike = |arm: &&Arc<ExpertArm>| {
            let same = DesiredExpert {
                state: desired.state,
                share: desired.share,
                surfaces: desired.surfaces.clone(),
                ..arm.desired.clone()
            };
            same == *desired && arm.fm == pinned
        };
        let live = match old.and_then(|old| old.arms.iter().find(alike)) {
            Some(arm) => arm.live.clone(),
            None => self.open_expert(desired, fm)?,
        };
        let version =
            desired.version.clone().unwrap_or_else(|| live.expert.now().version().to_owned());
        Ok(ExpertArm {
            name: desired.name.clone(),
            label: format!("{}@{version}", desired.name),
            version,
            fm: pinned.to_owned(),
            share: desired.share,
            live,
            desired: desired.clone(),
        })
    }

    /// An expert as it is now or, if its parameters do not fit that, as of the newest layout of the
    /// schema that they fit: it was trained before the schema grew.
    fn open_expert(&self, desired: &DesiredExpert, fm: &ServedFm) -> Result<Arc<LiveExpert>> {
        let schema = self.schema.as_ref().expect("a process with experts has a schema");
        let now = self.open_expert_as_of(&schema.layout(), desired, fm);
        let earlier = |error| {
            let mut layouts = schema.layouts().skip(1);
            let found =
                layouts.find_map(|layout| self.open_expert_as_of(&layout, desired, fm).ok());
            found.ok_or(error)
        };
        now.or_else(earlier)
    }

    fn open_expert_as_of(
        &self,
        layout: &Schema,
        desired: &DesiredExpert,
        fm: &ServedFm,
    ) -> Result<Arc<LiveExpert>> {
        let schema = self.schema.as_ref().expect("a process with experts has a schema");
        let sha256 = desired.sha256.as_ref();
        let component = sha256.map(|sha256| sha256.component.as_str());
        let component = read_version_file(&desired.plugin, component)?;
        if let Some(hash) = &desired.plugin_hash {
            unchanged(&desired.plugin, &component, hash)?;
        }
        let options = LoadOptions {
            tae_dim: fm.manifest().config.tae_width(),
            fm_version: Some(fm.version().to_owned()),
            ..self.config.load_options(&desired.name, self.content_dim)
        };
        let plugin = Plugin::from_file(&self.wasm, &desired.plugin, &component, &options.limits)?;
        let blueprint = Arc::new(Blueprint::as_of(plugin, layout, schema, &options)?);
        for &surface in &desired.surfaces {
            let surface = &schema.surfaces[usize::from(surface)];
            if !blueprint.serves(surface) {
                let serves = blueprint.description.surfaces.join("`, `");
                return Err(Error::invalid(format!(
                    "expert `{}` is refused: it serves `{serves}`, not surface `{surface}`. Its \
                     author adds the surface in `describe`, or operators leave it out of what they \
                     give the expert; until then the version of before serves, or the FM's ranking \
                     answers",
                    blueprint.description.name
                )));
            }
        }
        let breaker = self.config.plugin_limits.breaker();
        match &desired.weights {
            WeightsLocation::Path(path) if !path.is_file() => {
                let why = format!(
                    "expert {:?} has no trained parameters; run `hypercast train expert {}`",
                    desired.name, desired.name
                );
                Err(Error::data(path, why))
            }
            WeightsLocation::Path(path) => {
                let parameters = sha256.and_then(|sha256| sha256.parameters.as_deref());
                let parameters = read_version_file(path, parameters)?;
                let saved = SavedParameters::from_bytes(&parameters, path)?;
                let expert = ServedExpert::open(blueprint, saved, self.config.device, breaker)?;
                Ok(Arc::new(LiveExpert::new(expert)))
            }
            WeightsLocation::Published => {
                let version = desired.version.as_deref().expect("what is published is registered");
                let topic = Topic::expert(&desired.name, version);
                let (parameters, follower) =
                    weight_updates::open_expert(self.streams.clone(), topic, &blueprint)?;
                let device = self.config.device;
                let expert = ServedExpert::new(blueprint, parameters.clone(), device, breaker)?;
                let live = Arc::new(LiveExpert::new(expert));
                let label = format!("{}@{version}", desired.name);
                let (weak, parameters) = (Arc::downgrade(&live), Box::new(parameters));
                let model = FeedTarget::Expert { live: weak, parameters, device };
                self.feeds.add(WeightFeed::new(label, follower, model));
                Ok(live)
            }
        }
    }
}

fn unchanged(plugin: &Path, component: &[u8], hash: &str) -> Result<()> {
    if content_hash(component) == hash {
        return Ok(());
    }
    Err(Error::data(
        plugin,
        "it is not the component that was registered; restore it, or register it as a new version",
    ))
}
