//! A plan → a set that serves: what the set before has already is taken over,
//! everything else is loaded and checked here, off the path of requests. A set is whole or is not made.

use std::{path::Path, sync::Arc};

use hypercast_fm::inference::{self, FoundationModel};

use super::{
    feed::{self, Feed, Feeds},
    fm_batcher::FmBatcher,
    fm_remote::RemoteFm,
    fm_tier::FmTier,
    metrics::Metrics,
    plan::{FmSource, Plan, PlannedExpert, PlannedFm},
    set::{Arm, LiveExpert, ServedFm, ServingSet},
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, FmTierConfig};
use hypercast_data::schema::Schema;
use hypercast_expert::{Blueprint, Engine, LoadOptions, ServedExpert};
use hypercast_stream::registry::{WeightsLocation, content_hash};
use hypercast_stream::streams::{StreamEngine as Streams, Topic};

/// Loads versions for one process.
pub struct Loader {
    config: Config,
    fm_config: FmTierConfig,
    schema: Option<Arc<Schema>>,
    wasm: Engine,
    metrics: Arc<Metrics>,
    streams: Arc<dyn Streams>,
    feeds: Arc<Feeds>,
}

impl Loader {
    /// For a process whose FM tier is configured so, and which has a schema if it runs experts.
    ///
    /// # Errors
    /// A Wasm engine that does not start.
    pub fn new(
        config: &Config,
        fm_config: &FmTierConfig,
        schema: Option<Arc<Schema>>,
        (streams, metrics): (Arc<dyn Streams>, Arc<Metrics>),
    ) -> Result<Self> {
        let wasm = Engine::new(config.guests())?;
        let (config, fm_config) = (config.clone(), fm_config.clone());
        Ok(Self { config, fm_config, schema, wasm, metrics, streams, feeds: Arc::default() })
    }

    /// What compiles its components.
    pub fn wasm(&self) -> Engine {
        self.wasm.clone()
    }

    /// The streams of weights that what it loaded follows.
    pub fn feeds(&self) -> Arc<Feeds> {
        self.feeds.clone()
    }

    /// Loads what `plan` has and `old` has not.
    ///
    /// # Errors
    /// Anything that is missing, damaged, changed or refused, with the version that it belongs to.
    pub fn load(&self, plan: &Plan, old: Option<&ServingSet>, revision: u64) -> Result<ServingSet> {
        let mut fms: Vec<ServedFm> = Vec::new();
        let (mut configured, mut default) = (None, None);
        // What answers nobody must not keep others from answering: it is left out, and told.
        let mut unloaded = Vec::new();
        for planned in &plan.fms {
            let fm = match self.fm(planned, old) {
                Ok(fm) => fm,
                Err(error) if !plan.needs(planned) => {
                    unloaded.push(error.to_string());
                    continue;
                }
                Err(error) => return Err(error),
            };
            let version = fm.version().to_owned();
            if planned.version.is_none() {
                configured = Some(version.clone());
            }
            // Shadows come first, so one answers only where there is no other.
            default = Some(version);
            // The configured checkpoint may be a registered version too: one copy serves both.
            if !fms.iter().any(|other| other.version() == fm.version()) {
                fms.push(fm);
            }
        }
        let default = default.ok_or_else(|| {
            Error::invalid(format!("no FM can be served: {}", unloaded.join("; ")))
        })?;
        let mut arms = Vec::new();
        for planned in &plan.experts {
            match self.arm(planned, configured.as_deref().unwrap_or(&default), &fms, old) {
                Ok(arm) => arms.push(Arc::new(arm)),
                // As the configuration has it, a daemon starts whole or not at all.
                Err(error) if planned.share == 0.0 && planned.version.is_some() => {
                    unloaded.push(error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        let mut set = ServingSet::new(revision, fms, default, arms);
        set.unloaded = unloaded;
        self.metrics.in_service(&set);
        Ok(set)
    }

    fn fm(&self, planned: &PlannedFm, old: Option<&ServingSet>) -> Result<ServedFm> {
        self.try_fm(planned, old).map_err(|error| match &planned.version {
            Some(version) => Error::invalid(format!("FM {version}: {error}")),
            None => error,
        })
    }

    fn try_fm(&self, planned: &PlannedFm, old: Option<&ServingSet>) -> Result<ServedFm> {
        let alike = |fm: &&ServedFm| {
            (&fm.planned.version, &fm.planned.source) == (&planned.version, &planned.source)
        };
        let tier = match old.and_then(|old| old.fms().find(alike)) {
            Some(loaded) => loaded.tier.clone(),
            None => self.open_fm(planned)?,
        };
        let found = &tier.manifest().version;
        match &planned.version {
            Some(version) if version != found => Err(Error::invalid(format!(
                "what is registered as FM {version} is FM {found} now; register that, and restore the checkpoint"
            ))),
            _ => Ok(ServedFm { tier, state: planned.state, planned: planned.clone() }),
        }
    }

    fn open_fm(&self, planned: &PlannedFm) -> Result<Arc<FmTier>> {
        let fm: Arc<dyn FoundationModel> = match &planned.source {
            FmSource::Remote(url) => {
                let remote = RemoteFm::connect(url, &self.fm_config, planned.version.as_deref())?;
                return Ok(Arc::new(FmTier::Remote(Box::new(remote))));
            }
            FmSource::Checkpoint(dir) => {
                Arc::from(inference::load(dir, self.fm_config.loading(self.config.device))?)
            }
            FmSource::Published => return self.follow_fm(planned),
        };
        self.local(fm)
    }

    fn local(&self, fm: Arc<dyn FoundationModel>) -> Result<Arc<FmTier>> {
        let batcher = FmBatcher::start(fm, &self.fm_config, self.metrics.clone())?;
        Ok(Arc::new(FmTier::Local(batcher)))
    }

    fn follow_fm(&self, planned: &PlannedFm) -> Result<Arc<FmTier>> {
        let version = planned.version.as_deref().expect("what is published is registered");
        let serving = self.fm_config.loading(self.config.device);
        let base = self.config.paths.fm_work.join("served");
        let topic = Topic::fm(version);
        let (fm, follower, folder) = feed::open_fm((self.streams.clone(), topic), &base, serving)?;
        let tier = self.local(fm)?;
        self.feeds.add(Feed::fm(version, follower, (&tier, folder)));
        Ok(tier)
    }

    fn arm(
        &self,
        planned: &PlannedExpert,
        configured_fm: &str,
        fms: &[ServedFm],
        old: Option<&ServingSet>,
    ) -> Result<Arm> {
        let arm = self.try_arm(planned, configured_fm, fms, old);
        arm.map_err(|error| match &planned.version {
            Some(version) => Error::invalid(format!("expert {} {version}: {error}", planned.name)),
            None => error,
        })
    }

    fn try_arm(
        &self,
        planned: &PlannedExpert,
        configured_fm: &str,
        fms: &[ServedFm],
        old: Option<&ServingSet>,
    ) -> Result<Arm> {
        let pinned = planned.fm.as_deref().unwrap_or(configured_fm);
        let fm = fms
            .iter()
            .find(|fm| fm.version() == pinned)
            .ok_or_else(|| Error::invalid(format!("it pins FM {pinned}, which is not loaded")))?;
        let alike = |arm: &&Arc<Arm>| {
            let same = PlannedExpert {
                state: planned.state,
                share: planned.share,
                surfaces: planned.surfaces.clone(),
                ..arm.planned.clone()
            };
            same == *planned && arm.fm == pinned
        };
        let live = match old.and_then(|old| old.arms().iter().find(alike)) {
            Some(arm) => arm.live.clone(),
            None => self.open_expert(planned, fm)?,
        };
        let version = planned.version.clone().unwrap_or_else(|| live.now().version().to_owned());
        Ok(Arm {
            name: planned.name.clone(),
            label: format!("{}@{version}", planned.name),
            version,
            fm: pinned.to_owned(),
            share: planned.share,
            live,
            planned: planned.clone(),
        })
    }

    fn open_expert(&self, planned: &PlannedExpert, fm: &ServedFm) -> Result<Arc<LiveExpert>> {
        let schema = self.schema.as_ref().expect("a process with experts has a schema");
        if let Some(hash) = &planned.plugin_hash {
            unchanged(&planned.plugin, hash)?;
        }
        let options = LoadOptions {
            tae_dim: fm.manifest().config.tae_width(),
            fm_version: Some(fm.version().to_owned()),
            ..self.config.load_options(&planned.name)
        };
        let blueprint = Arc::new(Blueprint::load(&self.wasm, &planned.plugin, schema, &options)?);
        for &surface in &planned.surfaces {
            let surface = &schema.surfaces[usize::from(surface)];
            if !blueprint.serves(surface) {
                let serves = blueprint.description.surfaces.join("`, `");
                return Err(Error::invalid(format!(
                    "expert `{}` is refused: it serves `{serves}`, not surface `{surface}`",
                    blueprint.description.name
                )));
            }
        }
        let breaker = self.config.plugin_limits.breaker();
        match &planned.weights {
            WeightsLocation::Path(path) if !path.is_file() => {
                let why = format!(
                    "expert {:?} has no trained parameters; run `hypercast train expert {}`",
                    planned.name, planned.name
                );
                Err(Error::data(path, why))
            }
            WeightsLocation::Path(path) => {
                let expert = ServedExpert::open(blueprint, path, self.config.device, breaker)?;
                Ok(Arc::new(LiveExpert::new(expert)))
            }
            WeightsLocation::Published => {
                let version = planned.version.as_deref().expect("what is published is registered");
                let topic = Topic::expert(&planned.name, version);
                let (parameters, follower) =
                    feed::open_expert((self.streams.clone(), topic), &blueprint)?;
                let device = self.config.device;
                let expert = ServedExpert::new(blueprint, parameters.clone(), device, breaker)?;
                let live = Arc::new(LiveExpert::new(expert));
                let label = format!("{}@{version}", planned.name);
                self.feeds.add(Feed::expert(label, follower, (&live, parameters, device)));
                Ok(live)
            }
        }
    }
}

fn unchanged(plugin: &Path, hash: &str) -> Result<()> {
    let bytes = std::fs::read(plugin).map_err(Error::io(plugin))?;
    match content_hash(&bytes) == hash {
        true => Ok(()),
        false => Err(Error::data(
            plugin,
            "it is not the component that was registered; restore it, or register it as a new version",
        )),
    }
}
