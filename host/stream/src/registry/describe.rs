//! Describes a version for its registration from its files: an FM's checkpoint, or an expert's
//! plugin and parameters. The files pass the same checks as in serving, so that a version that
//! cannot be served is not registered.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use hypercast_config::{Config, sha256};
use hypercast_core::{atomic_dir, atomic_file, clock::now_ms};
use hypercast_data::schema::Schema;
use hypercast_expert::wasm::contract::{Column, HostInfo, HostSchema, VectorWidths};
use hypercast_expert::{Blueprint, Engine, LoadOptions, Plugin, SavedParameters, ServedExpert};
use hypercast_fm::{checkpoint::FmManifest, cost::one_stage_flops};

use super::{
    ExpertVersion, FileHashes, FmVersion, VersionState, WeightsLocation, content_hash,
    earlier_schema_hashes, schema_hash,
};
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
            earlier_schemas: earlier_schema_hashes(schema),
            columns: core_columns(schema),
            tae_dim: manifest.config.tae_width(),
            one_stage_flops: Some(one_stage_flops(&manifest.config, &manifest.spec)),
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
    /// The width of the content vectors that experts read; 0 without any.
    pub content_dim: usize,
    /// Whether it runs without the TAE.
    pub without_tae: bool,
    /// Where its parameters are.
    pub weights: WeightsLocation,
}

impl NewExpert {
    /// Reads and loads the plugin, and the parameters if they are in a file, with the same checks
    /// as serving.
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
            ..config.load_options(&self.name, self.content_dim)
        };
        let component = read_version_file(&self.plugin, None)?;
        let plugin = Plugin::from_file(engine, &self.plugin, &component, &options.limits)?;
        let blueprint = Arc::new(Blueprint::new(plugin, schema, &options)?);
        let parameters = match &self.weights {
            WeightsLocation::Path(path) => Some(read_version_file(path, None)?),
            WeightsLocation::Published => None,
        };
        let read = ReadExpert { blueprint, component: &component, parameters };
        Ok(self.describe_read(config, schema, &read)?.0)
    }

    /// As [`NewExpert::describe`] for what was read. Also returns the expert as it would serve, if
    /// its parameters are in a file.
    ///
    /// # Errors
    /// The version cannot be served.
    pub fn describe_read(
        &self,
        config: &Config,
        schema: &Schema,
        read: &ReadExpert<'_>,
    ) -> Result<(ExpertVersion, Option<ServedExpert>)> {
        let ReadExpert { blueprint, component, parameters } = read;
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
        let expert = match (&self.weights, parameters) {
            (WeightsLocation::Path(path), Some(bytes)) => {
                let saved = SavedParameters::from_bytes(bytes, path)?;
                let breaker = config.plugin_limits.breaker();
                Some(ServedExpert::open(blueprint.clone(), saved, config.device, breaker)?)
            }
            _ => None,
        };
        let version = ExpertVersion {
            name: self.name.clone(),
            version: self.version.clone(),
            state: VersionState::Training,
            parent: None,
            plugin: self.plugin.clone(),
            plugin_hash: content_hash(component),
            sha256: Some(FileHashes {
                component: sha256(component),
                parameters: parameters.as_deref().map(sha256),
            }),
            plugin_version: blueprint.description.version.clone(),
            accepts_fm: blueprint.description.fm_version.clone(),
            fm: self.fm.clone(),
            schema: schema_hash(schema),
            earlier_schemas: earlier_schema_hashes(schema),
            columns: Some(columns_read(blueprint.description.all_columns(), schema)),
            tae_dim: self.tae_dim,
            flops: Some(blueprint.flops()),
            without_tae: self.without_tae,
            surfaces: self.surfaces.clone(),
            created_ms: now_ms(),
            trained_ms: 0,
            weights: self.weights.clone(),
        };
        Ok((version, expert))
    }
}

impl ExpertVersion {
    /// The version with copies of its files, which are at `NAME/VERSION` below `experts_dir`: no
    /// later build or training writes there.
    ///
    /// # Errors
    /// A file cannot be copied or is not the one that was described, or the version has another.
    pub fn keep_files(mut self, experts_dir: &Path) -> Result<Self> {
        let dir = experts_dir.join(&self.name).join(&self.version);
        atomic_dir::create(&dir)?;
        let sha256 = self.sha256.as_ref();
        let component = sha256.map(|sha256| sha256.component.as_str());
        let parameters = sha256.and_then(|sha256| sha256.parameters.as_deref());
        let keep = |file: &Path, expected, as_name: &str| {
            let (bytes, kept) = (read_version_file(file, expected)?, dir.join(as_name));
            if !kept.exists() {
                atomic_file::write(&kept, &bytes).map_err(Error::io(&kept))?;
            } else if std::fs::read(&kept).map_err(Error::io(&kept))? != bytes {
                return Err(Error::refused(format!(
                    "expert {} {} has another {as_name} already ({}); register the changed file as \
                     a new version",
                    self.name,
                    self.version,
                    kept.display()
                )));
            }
            std::fs::canonicalize(&kept).map_err(Error::io(&kept))
        };
        if let WeightsLocation::Path(path) = &self.weights {
            let kept = keep(path, parameters, "parameters.safetensors")?;
            self.weights = WeightsLocation::Path(kept);
        }
        self.plugin = keep(&self.plugin, component, "plugin.wasm")?;
        Ok(self)
    }
}

/// The columns of a schema's core, by kind and name, and its FM's predictions.
fn core_columns(schema: &Schema) -> Vec<String> {
    let HostInfo { features, ids, history_ids, .. } =
        HostSchema::new(schema, VectorWidths::default()).info;
    let features = features.into_iter().map(Column::Feature);
    let ids = ids.into_iter().map(Column::Id);
    let history_ids = history_ids.into_iter().map(Column::HistoryId);
    let core = schema.core();
    let predictions = core.main_tasks().map(|task| Column::FmLogit(task.name.clone()));
    let columns = features.chain(ids).chain(history_ids).chain(predictions);
    columns.map(|column| column.label()).collect()
}

/// Those of them that an expert reads. Vectors are not the schema's.
fn columns_read<'a>(columns: impl Iterator<Item = &'a Column>, schema: &Schema) -> Vec<String> {
    let of_core = core_columns(schema);
    let label = |column: &Column| match column {
        // The same column of the schema, not standardised.
        Column::RawFeature(name) => Column::Feature(name.clone()).label(),
        other => other.label(),
    };
    let mut read: Vec<String> =
        columns.map(label).filter(|column| of_core.contains(column)).collect();
    read.sort_unstable();
    read.dedup();
    read
}

/// The content of a version's files, read once: what is registered is what was checked.
pub struct ReadExpert<'a> {
    /// The plugin as it was loaded from `component`.
    pub blueprint: Arc<Blueprint>,
    /// The plugin file.
    pub component: &'a [u8],
    /// The parameter file; none if the version's trainer publishes its weights.
    pub parameters: Option<Vec<u8>>,
}

/// Reads a file of a version, which is to have this SHA-256 if it was registered with one.
///
/// # Errors
/// The file cannot be read, or is not the one that was registered.
pub fn read_version_file(path: &Path, expected: Option<&str>) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    match expected {
        Some(expected) if sha256(&bytes) != expected => Err(Error::data(
            path,
            "it is not the file that was registered; restore it, or register it as a new version",
        )),
        _ => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_expert_reads_as_it_is_or_of_the_fm_is_a_column_that_the_fm_has() {
        let schema: Schema = toml::from_str(
            "surfaces = ['feed', 'search']\nactions = ['click', 'cart']\n\
             context_features = [{ name = 'age', kind = 'dense' }, { name = 'words', kind = \
             'dense' }]\n\
             tasks = [{ name = 'tap', role = 'main', kind = 'binary', label = 'click' }]\n\
             owned.search.context_features = ['words']",
        )
        .unwrap();
        let named = |of: fn(String) -> Column, name: &str| of(name.to_owned());
        let read = [
            named(Column::RawFeature, "age"),
            named(Column::Feature, "age"),
            named(Column::Feature, "words"),
            named(Column::FmLogit, "tap"),
            Column::Tae,
        ];
        let read = columns_read(read.iter(), &schema);
        assert_eq!(read, ["feature `age`", "fm logit `tap`"]);
        assert!(read.iter().all(|column| core_columns(&schema).contains(column)));
    }
}
