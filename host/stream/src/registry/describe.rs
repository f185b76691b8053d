//! Describes a version for its registration from its files: an FM's checkpoint, or an expert's
//! plugin and parameters. The files pass the same checks as in serving, so that a version that
//! cannot be served is not registered.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hypercast_config::Config;
use hypercast_core::{atomic_dir, atomic_file, clock::now_ms};
use hypercast_data::schema::Schema;
use hypercast_expert::{Blueprint, Engine, LoadOptions, ServedExpert};
use hypercast_fm::checkpoint::FmManifest;

use super::{ExpertVersion, FmVersion, VersionState, WeightsLocation, content_hash, schema_hash};
use crate::error::{CommonErrors as _, Error, Result};

impl FmVersion {
    /// A version as its manifest describes it. If its trainer publishes, `weights` is
    /// [`WeightsLocation::Published`].
    pub fn new(manifest: &FmManifest, schema: &Schema, weights: WeightsLocation) -> Self {
        Self {
            version: manifest.version.clone(),
            state: VersionState::Training,
            parent: None,
            from_checkpoint: None,
            schema: schema_hash(schema),
            tae_dim: manifest.config.tae_width(),
            created_ms: now_ms(),
            trained_ms: manifest.trained_until_ms,
            weights,
        }
    }
}

/// A version of an expert to register.
#[derive(Debug, Clone)]
pub struct NewExpert {
    /// The expert's name.
    pub name: String,
    /// The version (semver).
    pub version: String,
    /// The plugin file.
    pub plugin: PathBuf,
    /// The surfaces that it will serve.
    pub surfaces: Vec<String>,
    /// The FM version that it pins.
    pub fm: String,
    /// The width of that FM's TAE.
    pub tae_dim: usize,
    /// Whether it runs without the TAE.
    pub without_tae: bool,
    /// Where its parameters are.
    pub weights: WeightsLocation,
}

impl NewExpert {
    /// Loads the plugin, and the parameters if they are in a file, with the same checks as serving.
    ///
    /// # Errors
    /// The version cannot be served.
    pub fn describe(
        &self,
        config: &Config,
        engine: &Engine,
        schema: &Schema,
    ) -> Result<ExpertVersion> {
        let options = LoadOptions {
            tae_dim: self.tae_dim,
            fm_version: Some(self.fm.clone()),
            ..config.load_options(&self.name)
        };
        let blueprint = Arc::new(Blueprint::load(engine, &self.plugin, schema, &options)?);
        Ok(self.describe_loaded(config, schema, &blueprint)?.0)
    }

    /// As [`NewExpert::describe`] for a loaded plugin. Also returns the expert as it would serve,
    /// if its parameters are in a file.
    ///
    /// # Errors
    /// The version cannot be served.
    pub fn describe_loaded(
        &self,
        config: &Config,
        schema: &Schema,
        blueprint: &Arc<Blueprint>,
    ) -> Result<(ExpertVersion, Option<ServedExpert>)> {
        for surface in &self.surfaces {
            if schema.surface(surface).is_none() || !blueprint.serves(surface) {
                return Err(Error::refused(format!(
                    "plugin {} of expert {} does not serve surface {surface:?}, or the data set \
                     has no such surface",
                    self.plugin.display(),
                    self.name
                )));
            }
        }
        let expert = match &self.weights {
            WeightsLocation::Path(path) => Some(ServedExpert::open(
                blueprint.clone(),
                path,
                config.device,
                config.plugin_limits.breaker(),
            )?),
            WeightsLocation::Published => None,
        };
        let bytes = std::fs::read(&self.plugin).map_err(Error::io(&self.plugin))?;
        let version = ExpertVersion {
            name: self.name.clone(),
            version: self.version.clone(),
            state: VersionState::Training,
            parent: None,
            plugin: self.plugin.clone(),
            plugin_hash: content_hash(&bytes),
            plugin_version: blueprint.description.version.clone(),
            accepts_fm: blueprint.description.fm_version.clone(),
            fm: self.fm.clone(),
            schema: schema_hash(schema),
            tae_dim: self.tae_dim,
            without_tae: self.without_tae,
            surfaces: self.surfaces.clone(),
            created_ms: now_ms(),
            trained_ms: 0,
            weights: self.weights.clone(),
        };
        Ok((version, expert))
    }
}

/// Copies a file of a version to `NAME/VERSION` below `experts_dir`, where no later build or
/// training writes. Returns the path of the copy.
///
/// # Errors
/// The file cannot be copied, or there is another file of that name.
pub fn keep_version_file(
    experts_dir: &Path,
    name: &str,
    version: &str,
    file: &Path,
    as_name: &str,
) -> Result<PathBuf> {
    let dir = experts_dir.join(name).join(version);
    atomic_dir::create(&dir)?;
    let bytes = std::fs::read(file).map_err(Error::io(file))?;
    let kept = dir.join(as_name);
    if kept.exists() {
        if std::fs::read(&kept).map_err(Error::io(&kept))? != bytes {
            return Err(Error::refused(format!(
                "expert {name} {version} has another {as_name} already ({}); register the changed \
                 file as a new version",
                kept.display()
            )));
        }
    } else {
        atomic_file::write(&kept, &bytes).map_err(Error::io(&kept))?;
    }
    std::fs::canonicalize(&kept).map_err(Error::io(&kept))
}
