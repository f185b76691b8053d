//! Imports what the configuration serves into the registry, so that a first push has versions
//! before it.
//!
//! Until something is promoted, the configuration decides what serves; the first promotion of any
//! expert would end that for all of them. So all of them are promoted first, as they are, in one
//! decision.

use hypercast_config::{Config, ExpertEntry};
use hypercast_data::schema::Schema;
use hypercast_expert::{Engine, SavedParameters};
use hypercast_fm::checkpoint::FmManifest;
use hypercast_stream::registry::{
    Change, ExpertVersion, FmVersion, NewExpert, Promotion, Registry, VersionState, WeightsLocation,
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::transitions::PlannedChanges,
};

/// Whether the configuration decides what serves.
pub(super) fn is_due(registry: &Registry) -> bool {
    let used = |state| matches!(state, VersionState::Active | VersionState::Retired);
    !registry
        .experts()
        .any(|(_, expert)| expert.versions.values().any(|version| used(version.state)))
}

/// What a daemon serves that has promoted nothing yet.
pub(super) struct ConfiguredVersions<'a> {
    /// Names the FM and the experts.
    pub(super) config: &'a Config,
    /// The data set's schema.
    pub(super) schema: &'a Schema,
    /// The width of the content vectors that experts read; 0 without any.
    pub(super) content_dim: usize,
    /// The engine that runs plugins.
    pub(super) wasm: &'a Engine,
}

impl ConfiguredVersions<'_> {
    /// Changes that register and promote what the configuration serves.
    ///
    /// # Errors
    /// The FM runs elsewhere, or an expert is registered with other content.
    pub(super) fn changes(&self, registry: &Registry) -> Result<Vec<Change>> {
        let ConfiguredVersions { config, schema, .. } = *self;
        let served = config.experts.iter().any(|entry| !entry.shadow);
        if !served && registry.newest_fm().is_some() {
            return Ok(Vec::new());
        }
        if !config.fm_serving.url.is_empty() {
            return Err(Error::refused(
                "nothing is promoted yet, and the FM runs in another process: first register and promote it and the configured experts (`hypercast versions register fm`, `... promote fm`)",
            ));
        }
        let manifest = FmManifest::read(&config.paths.fm)?;
        let dir = config.paths.fm.canonicalize().map_err(Error::io(&config.paths.fm))?;
        let mut plan = PlannedChanges::new(registry);
        if plan.registry.fm(&manifest.version).is_none() {
            let fm = FmVersion::new(&manifest, schema, WeightsLocation::Path(dir));
            plan.add(plan.registry.register_fm(&fm)?)?;
        }
        plan.add(plan.registry.promote_fm(&manifest.version)?)?;
        for entry in config.experts.iter().filter(|entry| !entry.shadow) {
            let expert = self.describe(entry, &manifest)?;
            plan.add(plan.registry.register_expert(&expert)?)?;
            let (name, version) = (expert.name, expert.version);
            let promotion = Promotion { name, version, share: 1.0, replace: false };
            plan.add(plan.registry.promote_expert(&promotion)?)?;
        }
        Ok(plan.changes)
    }

    /// A configured expert as a version to register, with copies of its files.
    fn describe(&self, entry: &ExpertEntry, fm: &FmManifest) -> Result<ExpertVersion> {
        let ConfiguredVersions { config, schema, content_dim, wasm } = *self;
        let parameters = config.parameters(entry);
        let version = SavedParameters::read(&parameters)?.provenance.plugin_version;
        let surfaces = config.serving_surfaces(entry, schema)?;
        let new = NewExpert {
            plugin: entry.plugin.clone(),
            weights: WeightsLocation::Path(parameters),
            name: entry.name.clone(),
            version,
            surfaces: surfaces.iter().map(|at| schema.surfaces[usize::from(*at)].clone()).collect(),
            fm: fm.version.clone(),
            tae_dim: fm.config.tae_width(),
            content_dim,
            without_tae: entry.without_tae,
        };
        Ok(new.describe(config, wasm, schema)?.keep_files(&config.paths.experts)?)
    }
}
