//! Loads what a push brings: the plugin is compiled, and its parameters are those of the push or of
//! the version that serves.

use std::{path::Path, sync::Arc};

use hypercast_expert::{Blueprint, LoadOptions, Parameters, Plugin, SavedParameters, ServedExpert};
use hypercast_stream::{
    registry::{
        ExpertVersion, NewExpert, ReadExpert, Registry, WeightsLocation, read_version_file,
    },
    streams::Topic,
};

use super::{Acceptor, KeptFiles, LoadedPush, PushToLoad, refuse};
use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::{signature::PushManifest, transitions},
    versions::weight_updates,
};

/// Loads a push as serving would.
pub(super) fn load(
    acceptor: &Acceptor,
    of: &PushToLoad<'_>,
    files: &mut KeptFiles<'_>,
) -> Result<LoadedPush> {
    acceptor.load(of, files)
}

impl Acceptor {
    /// Loads the version of a rollout after a restart, as serving would.
    ///
    /// # Errors
    /// The version cannot be served.
    pub fn open(&self, expert: &ExpertVersion) -> Result<ServedExpert> {
        let sha256 = expert.sha256.as_ref();
        let blueprint = self.registered(expert)?;
        match &expert.weights {
            WeightsLocation::Path(path) => {
                let parameters = sha256.and_then(|sha256| sha256.parameters.as_deref());
                let parameters = read_version_file(path, parameters)?;
                let saved = SavedParameters::from_bytes(&parameters, path)?;
                let device = self.settings.now().device;
                Ok(ServedExpert::open(blueprint, saved, device, self.breaker())?)
            }
            WeightsLocation::Published => Err(Error::internal(format!(
                "{} {} publishes its weights, and a pushed version has them in a file",
                expert.name, expert.version
            ))),
        }
    }

    /// The plugin of a registered version.
    fn registered(&self, expert: &ExpertVersion) -> Result<Arc<Blueprint>> {
        let component = expert.sha256.as_ref().map(|sha256| sha256.component.as_str());
        let component = read_version_file(&expert.plugin, component)?;
        let options = self.options(&expert.name, &expert.fm, expert.tae_dim);
        self.blueprint(&expert.plugin, &component, &options)
    }

    /// The plugin whose file at `path` has these bytes.
    fn blueprint(
        &self,
        path: &Path,
        component: &[u8],
        options: &LoadOptions,
    ) -> Result<Arc<Blueprint>> {
        let plugin = Plugin::from_file(&self.wasm, path, component, &options.limits)?;
        Ok(Arc::new(Blueprint::new(plugin, &self.schema, options)?))
    }

    fn options(&self, expert: &str, fm: &str, tae_dim: usize) -> LoadOptions {
        let fm_version = Some(fm.to_owned());
        let own = self.settings.now().load_options(expert, self.content_dim);
        LoadOptions { tae_dim, fm_version, ..own }
    }

    fn load(&self, of: &PushToLoad<'_>, files: &mut KeptFiles<'_>) -> Result<LoadedPush> {
        let PushToLoad { manifest, push, registry } = *of;
        let plugin = files.keep(push.component, "wasm")?;
        let serving = transitions::main_version(registry, &manifest.name);
        let file = Path::new("the push's parameters");
        let saved = push.parameters.map(|bytes| SavedParameters::from_bytes(bytes, file));
        let (fm, tae_dim) = pin(manifest, saved.transpose()?.as_ref(), registry, serving)?;
        let options = self.options(&manifest.name, &fm, tae_dim);
        let blueprint = self.blueprint(&plugin, push.component, &options)?;
        let parameters = match push.parameters {
            Some(bytes) => bytes.to_vec(),
            None => self.warm_start(manifest, &blueprint, serving)?,
        };
        let path = files.keep(&parameters, "safetensors")?;
        let config = self.settings.now();
        let entry = config.experts.iter().find(|entry| entry.name == manifest.name);
        let surfaces = match (manifest.surfaces.is_empty(), serving, entry) {
            (false, ..) => manifest.surfaces.clone(),
            (true, Some(serving), _) => serving.surfaces.clone(),
            (true, None, Some(entry)) => {
                let own = config.serving_surfaces(entry, &self.schema);
                let own = own.map_err(|error| Error::from(error).of_the_host())?;
                own.iter().map(|at| self.schema.surfaces[usize::from(*at)].clone()).collect()
            }
            (true, None, None) => {
                return refuse(format!(
                    "no version of {} serves yet, so the push must name its surfaces (`hypercast plugin sign --surfaces`)",
                    manifest.name
                ));
            }
        };
        let without_tae = match serving {
            Some(serving) => serving.without_tae,
            None => entry.is_some_and(|entry| entry.without_tae),
        };
        let new = NewExpert {
            name: manifest.name.clone(),
            version: manifest.version.clone(),
            plugin,
            surfaces,
            fm,
            tae_dim,
            content_dim: self.content_dim,
            without_tae,
            weights: WeightsLocation::Path(path),
        };
        let component = push.component;
        let read = ReadExpert { blueprint, component, parameters: Some(parameters) };
        let (mut version, expert) = new.describe_read(&config, &self.schema, &read)?;
        registry.check_flops_share(&version, &config)?;
        version.parent = serving.map(|serving| serving.version.clone());
        Ok(LoadedPush { version, expert: expert.map(Arc::new) })
    }

    /// The serving version's parameters, if they cover the new network completely.
    fn warm_start(
        &self,
        manifest: &PushManifest,
        blueprint: &Arc<Blueprint>,
        serving: Option<&ExpertVersion>,
    ) -> Result<Vec<u8>> {
        let Some(serving) = serving else {
            return refuse(format!(
                "no version of {} serves, so there are no parameters to start from; train it (`cargo hypercast train`) and push it with --parameters",
                manifest.name
            ));
        };
        let fresh = |normaliser: &_| blueprint.init_parameters(Clone::clone(normaliser), 0);
        let (mut parameters, report, trained_rows) = match &serving.weights {
            WeightsLocation::Path(path) => {
                let saved = SavedParameters::read(path);
                let saved = saved.map_err(|error| Error::from(error).of_the_host())?;
                let mut fresh = fresh(&saved.provenance.normaliser);
                let report = fresh.warm_start(&saved);
                (fresh, report, saved.provenance.trained_rows)
            }
            WeightsLocation::Published => {
                let published = self.published(serving).map_err(Error::of_the_host)?;
                let mut fresh = fresh(&published.provenance.normaliser);
                let report = fresh.warm_start_from(&published, |_| true);
                (fresh, report, published.provenance.trained_rows)
            }
        };
        parameters.provenance.trained_rows = trained_rows;
        if !report.fresh.is_empty() {
            return refuse(format!(
                "it came without parameters, and the serving version {} {} lacks {} of its {} by name and shape: {}; train it (`cargo hypercast train`) and push it with --parameters",
                serving.name,
                serving.version,
                report.fresh.len(),
                report.fresh.len() + report.kept.len(),
                few(&report.fresh)
            ));
        }
        parameters.provenance.fm_version.clone_from(&serving.fm);
        let draft = tempfile::Builder::new().suffix(".safetensors").tempfile();
        let draft = draft.map_err(Error::io(std::env::temp_dir()))?;
        parameters.save(draft.path())?;
        std::fs::read(draft.path()).map_err(Error::io(draft.path()))
    }

    /// The newest published parameters of a version.
    fn published(&self, serving: &ExpertVersion) -> Result<Parameters> {
        let blueprint = self.registered(serving)?;
        let topic = Topic::expert(&serving.name, &serving.version);
        Ok(weight_updates::open_expert(self.streams.clone(), topic, &blueprint)?.0)
    }
}

/// The FM version to pin, and the width of its TAE.
fn pin(
    manifest: &PushManifest,
    saved: Option<&SavedParameters>,
    registry: &Registry,
    serving: Option<&ExpertVersion>,
) -> Result<(String, usize)> {
    let trained = saved.map(|saved| saved.provenance.fm_version.clone());
    let own = manifest.fm.clone().or(trained).or(serving.map(|serving| serving.fm.clone()));
    let Some(fm) = own else {
        return refuse(format!(
            "no version of {} serves, so there are no FM and no parameters to start from; train it (`cargo hypercast train`) and push it with --parameters",
            manifest.name
        ));
    };
    match registry.fm(&fm) {
        Some(known) => Ok((fm, known.tae_dim)),
        None => {
            let known: Vec<&str> = registry.fms().iter().map(|fm| fm.version.as_str()).collect();
            refuse(format!(
                "it pins FM {fm}, which is not registered here; known are {known:?} (`hypercast versions register fm` adds one)"
            ))
        }
    }
}

fn few(names: &[String]) -> String {
    const FEW: usize = 12;
    let shown = names.iter().take(FEW).map(|name| format!("`{name}`")).collect::<Vec<_>>();
    let more = names.len().saturating_sub(FEW);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}
