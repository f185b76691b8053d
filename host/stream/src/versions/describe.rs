//! What is registered of a version, from its files: an FM's checkpoint, an expert's plugin and parameters.
//! Files are checked as serving checks them, so that what cannot be served is not registered.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hypercast_fm::checkpoint::FmManifest;

use super::{ExpertVersion, FmVersion, VersionState, Weights, content_hash, schema_hash};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::Config;
use hypercast_core::clock::now_ms;
use hypercast_data::schema::Schema;
use hypercast_expert::{Blueprint, Engine, LoadOptions, ServedExpert};

impl FmVersion {
    /// As its manifest has it. One whose trainer publishes has [`Weights::Published`].
    pub fn of(manifest: &FmManifest, schema: &Schema, weights: Weights) -> Self {
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

/// An expert's version before it is looked at.
#[derive(Debug, Clone)]
pub struct NewExpert {
    /// The expert's name.
    pub name: String,
    /// Its version, a semver.
    pub version: String,
    /// The component.
    pub plugin: PathBuf,
    /// The surfaces that it is to serve.
    pub surfaces: Vec<String>,
    /// The FM version that it pins.
    pub fm: String,
    /// Values of that FM's TAE.
    pub tae_dim: usize,
    /// Whether it goes without the TAE.
    pub without_tae: bool,
    /// Where its parameters are.
    pub weights: Weights,
}

impl NewExpert {
    /// Loads the plugin, and the parameters where they are in a file, as serving would.
    ///
    /// # Errors
    /// Whatever would keep it from being served.
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

    /// The same of a plugin that is loaded, with the expert as it would serve where its parameters are in a file.
    ///
    /// # Errors
    /// Whatever would keep it from being served.
    pub fn describe_loaded(
        &self,
        config: &Config,
        schema: &Schema,
        blueprint: &Arc<Blueprint>,
    ) -> Result<(ExpertVersion, Option<ServedExpert>)> {
        for surface in &self.surfaces {
            if schema.surface(surface).is_none() || !blueprint.serves(surface) {
                return Err(Error::refused(format!(
                    "plugin {} of expert {} does not serve surface {surface:?}, or the data set has none of that name",
                    self.plugin.display(),
                    self.name
                )));
            }
        }
        let breaker = config.plugin_limits.breaker();
        let expert = match &self.weights {
            Weights::Path(path) => {
                Some(ServedExpert::open(blueprint.clone(), path, config.device, breaker)?)
            }
            Weights::Published => None,
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

/// Copies a file of a version to where no later build or training writes: `NAME/VERSION` among the experts' parameters.
///
/// # Errors
/// What the file system says; another file of that name that is there already.
pub fn keep(
    config: &Config,
    name: &str,
    version: &str,
    file: &Path,
    as_name: &str,
) -> Result<PathBuf> {
    let dir = config.paths.experts.join(name).join(version);
    std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
    let bytes = std::fs::read(file).map_err(Error::io(file))?;
    let kept = dir.join(as_name);
    if kept.exists() {
        if std::fs::read(&kept).map_err(Error::io(&kept))? != bytes {
            return Err(Error::refused(format!(
                "expert {name} {version} has another {as_name} already ({}); give what is different a new version",
                kept.display()
            )));
        }
    } else {
        let draft = kept.with_extension("partial");
        std::fs::write(&draft, &bytes)
            .and_then(|()| std::fs::rename(&draft, &kept))
            .map_err(Error::io(&kept))?;
    }
    std::fs::canonicalize(&kept).map_err(Error::io(&kept))
}
