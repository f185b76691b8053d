//! Trainers register the versions that they publish, so that these can be promoted without further
//! steps. `hypercast versions register` registers versions that were trained elsewhere.
//!
//! A version that is registered already stays as it is. If the registration fails, the trainer
//! still publishes, logs the error once, and tries again with each publication.

use hypercast_config::{Config, ExpertEntry};
use hypercast_core::logging::RepeatedFailures;
use hypercast_data::schema::Schema;
use hypercast_expert::{self as expert, Provenance};
use hypercast_fm::checkpoint::FmManifest;

use super::{ExpertVersion, FmVersion, NewExpert, Registry, RegistryFollower, WeightsLocation};
use crate::error::Result;
use crate::streams::StreamEngine;

/// Registers a published FM version as in training, if the registry does not have it.
pub fn self_register_fm(
    registry: &mut RegistryFollower,
    engine: &dyn StreamEngine,
    manifest: &FmManifest,
    schema: &Schema,
    failures: &mut RepeatedFailures,
) {
    let version = &manifest.version;
    let changes = |registry: &Registry| match registry.fm(version) {
        Some(_) => Ok(Vec::new()),
        None => registry.register_fm(&FmVersion::new(manifest, schema, WeightsLocation::Published)),
    };
    log_registration(&format!("FM {version}"), registry.decide(engine, changes), failures);
}

/// A published version of an expert.
pub struct SelfRegisteredExpert<'a> {
    /// The configuration, for where its files are kept and how its plugin is loaded.
    pub config: &'a Config,
    /// The expert's entry in it.
    pub entry: &'a ExpertEntry,
    /// The surfaces that it will serve, as indexes into the schema.
    pub surfaces: &'a [u16],
    /// The version (semver).
    pub version: &'a str,
    /// The provenance of its parameters.
    pub provenance: &'a Provenance,
    /// The engine that runs plugins.
    pub guests: &'a expert::Engine,
    /// The schema of its training data.
    pub schema: &'a Schema,
    /// The width of the data set's content vectors; 0 without any.
    pub content_dim: usize,
}

/// Registers a published version of an expert as in training, as [`self_register_fm`] does.
pub fn self_register_expert(
    registry: &mut RegistryFollower,
    engine: &dyn StreamEngine,
    name: &str,
    version: &str,
    describe: impl Fn(&Registry) -> Result<ExpertVersion>,
    failures: &mut RepeatedFailures,
) {
    let changes = |registry: &Registry| match registry.expert_version(name, version) {
        Some(_) => Ok(Vec::new()),
        None => registry.register_expert(&describe(registry)?),
    };
    let registered = registry.decide(engine, changes);
    log_registration(&format!("expert {name} {version}"), registered, failures);
}

impl SelfRegisteredExpert<'_> {
    /// As the registry describes it. Its plugin is copied to the version's own directory.
    ///
    /// # Errors
    /// The version cannot be served or costs more than a new one may, or the plugin cannot be
    /// copied.
    pub fn describe(&self, registry: &Registry) -> Result<ExpertVersion> {
        let SelfRegisteredExpert { config, entry, version, provenance, schema, .. } = self;
        let surface = |at: &u16| schema.surfaces[usize::from(*at)].clone();
        let new = NewExpert {
            name: entry.name.clone(),
            version: (*version).to_owned(),
            plugin: entry.plugin.clone(),
            surfaces: self.surfaces.iter().map(surface).collect(),
            fm: provenance.fm_version.clone(),
            tae_dim: provenance.tae_dim,
            content_dim: self.content_dim,
            without_tae: entry.without_tae,
            weights: WeightsLocation::Published,
        };
        let described = new.describe(config, self.guests, schema)?;
        registry.check_flops_share(&described, config)?;
        let kept = described.keep_files(&config.paths.experts)?;
        Ok(ExpertVersion { trained_ms: provenance.trained_until_ms, ..kept })
    }
}

fn log_registration(what: &str, registered: Result<bool>, failures: &mut RepeatedFailures) {
    match registered {
        Ok(true) => tracing::info!(
            "{what} is registered as in training; `hypercast versions promote` puts it into service"
        ),
        Err(error) if failures.is_news(&error) => tracing::warn!(
            %error,
            "{what} is published, but cannot be registered; trying again with each publication"
        ),
        Ok(false) | Err(_) => {}
    }
}
