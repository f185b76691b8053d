//! What an expert's network costs beside a one-stage model of its FM's size, and whether a new
//! version may cost that.

use std::{fs, path::Path};

use hypercast_config::{Config, FlopsShare};
use hypercast_expert as expert;
use hypercast_fm::{checkpoint::FmManifest, cost::one_stage_flops};

use super::{ExpertVersion, FmVersion, Registry, VersionState, WeightsLocation, content_hash};
use crate::error::Result;

impl Registry {
    /// What a version costs; none if that was not noted yet of it or of the FM that it pins.
    pub fn flops_share(&self, version: &ExpertVersion) -> Option<FlopsShare> {
        let one_stage = self.fm(&version.fm)?.one_stage_flops?;
        Some(FlopsShare { network: version.flops?, one_stage })
    }

    /// Checks what a new version costs. What is registered stays, and so does a component that this
    /// expert has already, by the registry or the configuration: it comes with other parameters or
    /// for another FM. One that pins an FM of which no size was noted, and which has no checkpoint
    /// here, is not checked: daemons tell its share when they load it.
    ///
    /// # Errors
    /// It costs more than the surfaces allow that it is to serve.
    pub fn check_flops_share(&self, version: &ExpertVersion, config: &Config) -> Result<()> {
        if self.has_component(version) || is_configured(config, self, version) {
            return Ok(());
        }
        let one_stage = match self.fm(&version.fm) {
            Some(fm) => fm.one_stage_flops.or_else(|| of_checkpoint(fm)),
            None => of_manifest(&config.paths.fm, &version.fm),
        };
        let cost = version.flops.zip(one_stage);
        let cost = cost.map(|(network, one_stage)| FlopsShare { network, one_stage });
        let Some(cost) = cost else { return Ok(()) };
        let checked = config.plugin_limits.check_flops_share(&version.surfaces, cost);
        checked.map_err(|over| expert::Error::misfit(&version.name, over.refusal()).into())
    }

    /// Whether this version is registered, or another one that is in use and has its component on
    /// its surfaces.
    fn has_component(&self, version: &ExpertVersion) -> bool {
        let known = self.expert(&version.name).map(|expert| expert.in_order()).unwrap_or_default();
        known.iter().any(|known| {
            known.version == version.version
                || known.state != VersionState::Retired
                    && known.plugin_hash == version.plugin_hash
                    && covers(&known.surfaces, &version.surfaces)
        })
    }
}

/// Whether the configuration serves these surfaces with this component, which it can as long as no
/// version of the expert is registered.
fn is_configured(config: &Config, registry: &Registry, version: &ExpertVersion) -> bool {
    let entry = config.experts.iter().find(|entry| entry.name == version.name && !entry.shadow);
    entry.filter(|_| registry.expert(&version.name).is_none()).is_some_and(|entry| {
        (entry.surfaces.is_empty() || covers(&entry.surfaces, &version.surfaces))
            && config.parameters(entry).exists()
            && fs::read(&entry.plugin)
                .is_ok_and(|component| content_hash(&component) == version.plugin_hash)
    })
}

fn covers(surfaces: &[String], of: &[String]) -> bool {
    of.iter().all(|surface| surfaces.contains(surface))
}

/// The size of an FM that was registered before sizes were noted.
fn of_checkpoint(fm: &FmVersion) -> Option<u64> {
    match &fm.weights {
        WeightsLocation::Path(dir) => of_manifest(dir, &fm.version),
        WeightsLocation::Published => None,
    }
}

/// The size of an FM's version by its checkpoint, if it is that of this folder.
fn of_manifest(dir: &Path, version: &str) -> Option<u64> {
    let manifest = FmManifest::read(dir).ok().filter(|manifest| manifest.version == version)?;
    Some(one_stage_flops(&manifest.config, &manifest.spec))
}
