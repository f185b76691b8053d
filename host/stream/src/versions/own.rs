//! What trainers register of themselves: a version that publishes is there to be promoted, without anybody's doing.
//! `hypercast versions register` is for what was trained elsewhere.
//!
//! A version that is there already stays as it is, whoever registered it. One that cannot be registered is published
//! all the same: that is told, and tried again with the next publication.

use hypercast_fm::checkpoint::FmManifest;

use super::{Change, FmVersion, NewExpert, Registry, Versions, Weights, keep};
use crate::engine::Engine;
use crate::error::Result;
use hypercast_config::{Config, ExpertEntry};
use hypercast_data::schema::Schema;
use hypercast_expert as expert;
use hypercast_expert::Provenance;

/// Registers an FM version that is published, as training.
pub fn register_own_fm(engine: &dyn Engine, manifest: &FmManifest, schema: &Schema) {
    let version = &manifest.version;
    let wish = |registry: &Registry| match registry.fm(version) {
        Some(_) => Ok(Vec::new()),
        None => registry.register_fm(&FmVersion::of(manifest, schema, Weights::Published)),
    };
    told(&format!("FM {version}"), decide(engine, wish));
}

/// An expert's version that is published.
#[derive(Clone, Copy)]
pub struct OwnExpert<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The expert.
    pub entry: &'a ExpertEntry,
    /// Its version.
    pub version: &'a str,
    /// What its parameters belong to.
    pub provenance: &'a Provenance,
    /// Where guests run.
    pub guests: &'a expert::Engine,
    /// The schema that it learns by.
    pub schema: &'a Schema,
}

/// Registers an expert's version that is published, as training. Its component is copied to its version's own folder.
pub fn register_own_expert(engine: &dyn Engine, own: OwnExpert<'_>) {
    let OwnExpert { entry, version, .. } = own;
    let wish = |registry: &Registry| match registry.expert_version(&entry.name, version) {
        Some(_) => Ok(Vec::new()),
        None => registry.register_expert(&described(own)?),
    };
    told(&format!("expert {} {version}", entry.name), decide(engine, wish));
}

fn described(own: OwnExpert<'_>) -> Result<super::ExpertVersion> {
    let OwnExpert { config, entry, version, provenance, guests, schema } = own;
    let surfaces = config.serving_surfaces(entry, schema)?;
    let new = NewExpert {
        name: entry.name.clone(),
        version: version.to_owned(),
        plugin: keep(config, &entry.name, version, &entry.plugin, "plugin.wasm")?,
        surfaces: surfaces.iter().map(|at| schema.surfaces[usize::from(*at)].clone()).collect(),
        fm: provenance.fm_version.clone(),
        tae_dim: provenance.tae_dim,
        without_tae: entry.without_tae,
        weights: Weights::Published,
    };
    let described = new.describe(config, guests, schema)?;
    Ok(super::ExpertVersion { trained_ms: provenance.trained_until_ms, ..described })
}

/// Whether something was registered that was not there.
fn decide(engine: &dyn Engine, wish: impl Fn(&Registry) -> Result<Vec<Change>>) -> Result<bool> {
    let is_new = std::cell::Cell::new(false);
    Versions::new(engine).decide(|registry| {
        let changes = wish(registry)?;
        is_new.set(!changes.is_empty());
        Ok::<_, crate::Error>(changes)
    })?;
    Ok(is_new.get())
}

fn told(what: &str, registered: Result<bool>) {
    match registered {
        Ok(true) => tracing::info!(
            "{what} is registered as training: `hypercast versions promote` lets it answer"
        ),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(%error, "{what} is published, but could not be registered; trying again later")
        }
    }
}
