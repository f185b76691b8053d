//! A plan → a set that serves: what the set before has already is taken over,
//! everything else is loaded and checked here, off the path of requests. A set is whole or is not made.

use std::{path::Path, sync::Arc};

use hypercast_fm::inference::{self, FoundationModel};

use super::{
    fm_batcher::FmBatcher,
    fm_remote::RemoteFm,
    fm_tier::FmTier,
    metrics::Metrics,
    plan::{FmSource, Plan, PlannedExpert, PlannedFm},
    set::{Arm, ServedFm, ServingSet},
};
use crate::{
    config::{Config, FmTierConfig},
    error::{Error, Result},
    expert::{Blueprint, Engine, Expert, LoadOptions},
    schema::Schema,
    versions::{Weights, content_hash},
};

/// Loads versions for one process.
pub struct Loader {
    config: Config,
    fm_config: FmTierConfig,
    schema: Option<Arc<Schema>>,
    wasm: Engine,
    metrics: Arc<Metrics>,
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
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let wasm = Engine::new(config.plugin_limits.engine())?;
        Ok(Self { config: config.clone(), fm_config: fm_config.clone(), schema, wasm, metrics })
    }

    /// Loads what `plan` has and `old` has not.
    ///
    /// # Errors
    /// Anything that is missing, damaged, changed or refused, with the version that it belongs to.
    pub fn load(&self, plan: &Plan, old: Option<&ServingSet>, revision: u64) -> Result<ServingSet> {
        let mut fms: Vec<ServedFm> = Vec::new();
        let (mut configured, mut default) = (None, None);
        for planned in &plan.fms {
            let fm = self.fm(planned, old).map_err(|error| match &planned.version {
                Some(version) => Error::Invalid(format!("FM {version}: {error}")),
                None => error,
            })?;
            let version = fm.version().to_owned();
            if planned.version.is_none() {
                configured = Some(version.clone());
            }
            default = Some(version);
            // The configured checkpoint may be a registered version too: one copy serves both.
            if !fms.iter().any(|other| other.version() == fm.version()) {
                fms.push(fm);
            }
        }
        let default = default.ok_or_else(|| Error::Invalid("no FM is to be served".into()))?;
        let mut arms = Vec::new();
        for planned in &plan.experts {
            let arm = self.arm(planned, configured.as_deref().unwrap_or(&default), &fms, old);
            arms.push(Arc::new(arm.map_err(|error| match &planned.version {
                Some(version) => {
                    Error::Invalid(format!("expert {} {version}: {error}", planned.name))
                }
                None => error,
            })?));
        }
        let set = ServingSet::new(revision, fms, default, arms);
        self.metrics.in_service(&set);
        Ok(set)
    }

    fn fm(&self, planned: &PlannedFm, old: Option<&ServingSet>) -> Result<ServedFm> {
        let alike = |fm: &&ServedFm| {
            (&fm.planned.version, &fm.planned.source) == (&planned.version, &planned.source)
        };
        let tier = match old.and_then(|old| old.fms().find(alike)) {
            Some(loaded) => loaded.tier.clone(),
            None => Arc::new(self.open_fm(planned)?),
        };
        let found = &tier.manifest().version;
        match &planned.version {
            Some(version) if version != found => Err(Error::Invalid(format!(
                "what is registered as FM {version} is FM {found} now; register that, and restore the checkpoint"
            ))),
            _ => Ok(ServedFm { tier, state: planned.state, planned: planned.clone() }),
        }
    }

    fn open_fm(&self, planned: &PlannedFm) -> Result<FmTier> {
        let fm: Arc<dyn FoundationModel> = match &planned.source {
            FmSource::Remote(url) => {
                let remote = RemoteFm::connect(url, planned.version.as_deref())?;
                return Ok(FmTier::Remote(Box::new(remote)));
            }
            FmSource::Checkpoint(dir) => {
                Arc::from(inference::load(dir, self.fm_config.loading(self.config.device))?)
            }
            FmSource::Published => {
                return Err(Error::Invalid(
                    "its weights are in a stream, which this daemon does not read yet; register a checkpoint of it".into(),
                ));
            }
        };
        Ok(FmTier::Local(FmBatcher::start(fm, &self.fm_config, self.metrics.clone())?))
    }

    fn arm(
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
            .ok_or_else(|| Error::Invalid(format!("it pins FM {pinned}, which is not loaded")))?;
        let alike = |arm: &&Arc<Arm>| {
            let same = PlannedExpert {
                state: planned.state,
                share: planned.share,
                surfaces: planned.surfaces.clone(),
                ..arm.planned.clone()
            };
            same == *planned && arm.fm == pinned
        };
        let expert = match old.and_then(|old| old.arms().iter().find(alike)) {
            Some(arm) => arm.expert.clone(),
            None => Arc::new(self.open_expert(planned, fm)?),
        };
        let version = planned.version.clone().unwrap_or_else(|| expert.version().to_owned());
        Ok(Arm {
            name: planned.name.clone(),
            label: format!("{}@{version}", planned.name),
            version,
            fm: pinned.to_owned(),
            share: planned.share,
            expert,
            planned: planned.clone(),
        })
    }

    fn open_expert(&self, planned: &PlannedExpert, fm: &ServedFm) -> Result<Expert> {
        let schema = self.schema.as_ref().expect("a process with experts has a schema");
        if let Some(hash) = &planned.plugin_hash {
            unchanged(&planned.plugin, hash)?;
        }
        let options = LoadOptions {
            tae_dim: fm.manifest().config.tae_width(),
            fm_version: Some(fm.version().to_owned()),
            ..self.config.plugin_limits.load_options()
        };
        let blueprint = Arc::new(Blueprint::load(&self.wasm, &planned.plugin, schema, &options)?);
        for &surface in &planned.surfaces {
            let surface = &schema.surfaces[usize::from(surface)];
            if !blueprint.serves(surface) {
                let serves = blueprint.description.surfaces.join("`, `");
                return Err(Error::Invalid(format!(
                    "expert `{}` is refused: it serves `{serves}`, not surface `{surface}`",
                    blueprint.description.name
                )));
            }
        }
        let Weights::Path(path) = &planned.weights else {
            return Err(Error::Invalid(
                "its parameters are in a stream, which this daemon does not read yet; register a file of them".into(),
            ));
        };
        if !path.is_file() {
            let why = format!(
                "expert {:?} has no trained parameters; run `hypercast train expert {}`",
                planned.name, planned.name
            );
            return Err(Error::data(path, why));
        }
        let breaker = self.config.plugin_limits.breaker();
        Ok(Expert::open(blueprint, path, self.config.device, breaker)?)
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
