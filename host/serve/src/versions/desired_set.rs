//! Which versions should be loaded: from the registry, or from the configuration as long as nothing
//! was promoted. Loads nothing itself.

use std::{collections::BTreeMap, path::PathBuf};

use hypercast_config::{Config, ExpertEntry, ExpertLimits};
use hypercast_data::schema::Schema;
use hypercast_stream::registry::{
    FileHashes, Registry, VersionState, WeightsLocation, content_hash,
};

use crate::error::{CommonErrors as _, Error, Result};

/// An FM version that should be loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct DesiredFm {
    /// Its version; none for whatever the configured checkpoint is.
    pub version: Option<String>,
    /// Where its weights come from, unless it runs in another process.
    pub weights: WeightsLocation,
    /// Its state in the registry.
    pub state: VersionState,
}

/// An expert version that should be loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct DesiredExpert {
    /// The expert's name.
    pub name: String,
    /// Its version; none for the plugin's own.
    pub version: Option<String>,
    /// Path of the component.
    pub plugin: PathBuf,
    /// Expected hash of the component.
    pub plugin_hash: Option<String>,
    /// Expected SHA-256 of the files, if they were registered with it.
    pub sha256: Option<FileHashes>,
    /// Where its parameters come from.
    pub weights: WeightsLocation,
    /// The FM version that it pins; none for the configured one.
    pub fm: Option<String>,
    /// Whether it runs without the TAE.
    pub without_tae: bool,
    /// Its surfaces, by index.
    pub surfaces: Vec<u16>,
    /// Active, shadow, or active on standby with a share of 0.
    pub state: VersionState,
    /// The share of the expert's users that it serves.
    pub share: f64,
    /// Its own limits from the configuration; with others it is loaded anew.
    pub limits: ExpertLimits,
    /// Hash of the configured files, so that a reload sees changes; none for a registered version.
    pub content: Option<String>,
}

/// Content hashes of the configured experts' files, by name; none if a file cannot be read.
pub type ExpertFileHashes = BTreeMap<String, Option<String>>;

/// Hashes the files of the configured experts.
pub fn expert_file_hashes(config: &Config) -> ExpertFileHashes {
    let content = |entry: &ExpertEntry| {
        let plugin = std::fs::read(&entry.plugin).ok()?;
        let parameters = std::fs::read(config.parameters(entry)).ok()?;
        Some(format!("{} {}", content_hash(&plugin), content_hash(&parameters)))
    };
    config.experts.iter().map(|entry| (entry.name.clone(), content(entry))).collect()
}

/// All versions that should be loaded.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DesiredSet {
    /// FM versions; the last one answers where no expert does.
    pub fms: Vec<DesiredFm>,
    /// Versions of experts.
    pub experts: Vec<DesiredExpert>,
}

impl DesiredSet {
    /// The desired versions of a process. `hashes` are those of the configured experts' files, so
    /// that changed files at the same paths are loaded again.
    ///
    /// # Errors
    /// The configuration or the registry contradicts the schema or itself.
    pub fn new(
        config: &Config,
        schema: Option<&Schema>,
        registry: &Registry,
        hashes: &ExpertFileHashes,
    ) -> Result<Self> {
        let mut plan = Self::default();
        // A promoted version comes last and becomes the default.
        if registry.leaves_the_configured_fm() {
            let weights = WeightsLocation::Path(config.paths.fm.clone());
            plan.fms.push(DesiredFm { version: None, weights, state: VersionState::Active });
        }
        plan.fms.extend(registry.live_fms().into_iter().map(|fm| DesiredFm {
            version: Some(fm.version.clone()),
            weights: fm.weights.clone(),
            state: fm.state,
        }));
        // The sort is stable: shadows first, then by age, the newest last.
        plan.fms.sort_by_key(|fm| fm.state == VersionState::Active);
        if let Some(schema) = schema {
            plan.experts = registered_experts(config, registry, schema)?;
            if !registry.has_promoted() {
                plan.experts.extend(configured_experts(config, schema, hashes)?);
            }
        }
        Ok(plan)
    }

    /// Whether an FM version must be loaded: it is the configured one, or a serving expert pins it.
    pub fn needs(&self, fm: &DesiredFm) -> bool {
        fm.version.is_none()
            || self.experts.iter().any(|expert| expert.share > 0.0 && expert.fm == fm.version)
    }
}

fn registered_experts(
    config: &Config,
    registry: &Registry,
    schema: &Schema,
) -> Result<Vec<DesiredExpert>> {
    let mut desired = Vec::new();
    for (name, expert) in registry.experts() {
        let entry = config.experts.iter().find(|entry| entry.name == name);
        let limits = entry.map(|entry| entry.limits.clone()).unwrap_or_default();
        for version in expert.in_order() {
            if !matches!(version.state, VersionState::Active | VersionState::Shadow) {
                continue;
            }
            let index = |surface: &String| {
                schema.surface(surface).ok_or_else(|| {
                    Error::invalid(format!(
                        "expert {name} {} serves surface {surface:?}, which the data set lacks",
                        version.version
                    ))
                })
            };
            desired.push(DesiredExpert {
                name: name.to_owned(),
                version: Some(version.version.clone()),
                plugin: version.plugin.clone(),
                plugin_hash: Some(version.plugin_hash.clone()),
                sha256: version.sha256.clone(),
                weights: version.weights.clone(),
                fm: Some(version.fm.clone()),
                without_tae: version.without_tae,
                surfaces: version.surfaces.iter().map(index).collect::<Result<_>>()?,
                state: version.state,
                share: expert.share(&version.version),
                limits: limits.clone(),
                content: None,
            });
        }
    }
    Ok(desired)
}

fn configured_experts(
    config: &Config,
    schema: &Schema,
    hashes: &ExpertFileHashes,
) -> Result<Vec<DesiredExpert>> {
    let mut desired: Vec<DesiredExpert> = Vec::new();
    for entry in &config.experts {
        let surfaces = config.serving_surfaces(entry, schema)?;
        let other = desired.iter().filter(|_| !entry.shadow).find_map(|other| {
            let shared = surfaces.iter().find(|surface| other.surfaces.contains(surface))?;
            (other.state == VersionState::Active).then_some((other, *shared))
        });
        if let Some((other, surface)) = other {
            return Err(Error::invalid(format!(
                "experts {:?} and {:?} both serve surface {:?}; give one other surfaces, or shadow = true",
                other.name,
                entry.name,
                schema.surfaces[usize::from(surface)]
            )));
        }
        desired.push(DesiredExpert {
            name: entry.name.clone(),
            version: None,
            plugin: entry.plugin.clone(),
            plugin_hash: None,
            sha256: None,
            weights: WeightsLocation::Path(config.parameters(entry)),
            fm: None,
            without_tae: entry.without_tae,
            surfaces,
            state: if entry.shadow { VersionState::Shadow } else { VersionState::Active },
            share: if entry.shadow { 0.0 } else { 1.0 },
            limits: entry.limits.clone(),
            content: hashes.get(&entry.name).cloned().flatten(),
        });
    }
    Ok(desired)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{expert_version, fm_version};
    use hypercast_stream::registry::{Change, Decision, ExpertVersion};

    fn schema() -> Schema {
        toml::from_str("surfaces = ['feed', 'search']\nactions = []\ntasks = []").unwrap()
    }

    fn configured() -> Config {
        toml::from_str("[[experts]]\nname = 'all'\nplugin = 'all.wasm'\n").unwrap()
    }

    fn fm(version: &str) -> Change {
        let fm = fm_version(version);
        Change::FmRegistered { fm }
    }

    fn expert(version: &str, fm: &str) -> Change {
        let expert = ExpertVersion {
            fm: fm.into(),
            surfaces: vec!["search".into()],
            ..expert_version("feed", version)
        };
        Change::ExpertRegistered { expert: Box::new(expert) }
    }

    fn plan(registry: &Registry) -> DesiredSet {
        DesiredSet::new(&configured(), Some(&schema()), registry, &BTreeMap::new()).unwrap()
    }

    #[test]
    fn the_configuration_serves_until_something_is_promoted() {
        let mut registry = Registry::default();
        let mut decide = |changes: Vec<Change>| {
            registry.apply(&Decision::new(changes)).unwrap();
            plan(&registry)
        };
        let own = decide(Vec::new());
        assert_eq!((own.fms.len(), own.experts.len()), (1, 1));
        assert_eq!(own.experts[0].surfaces, [0, 1]);
        // Versions in training change nothing.
        assert_eq!(decide(vec![fm("1.0.0"), fm("2.0.0"), expert("1.0.0", "2.0.0")]), own);
        let active = VersionState::Active;
        let state = |version: &str| Change::FmState { version: version.into(), state: active };
        // A promoted FM is loaded beside the one that the configured expert needs.
        let both = decide(vec![state("2.0.0")]);
        assert_eq!((both.fms.len(), both.fms[1].version.as_deref()), (2, Some("2.0.0")));
        assert!(both.needs(&both.fms[0]) && !both.needs(&both.fms[1]));
        let (name, version) = ("feed".to_owned(), "1.0.0".to_owned());
        let promoted = decide(vec![
            Change::ExpertState { name: name.clone(), version: version.clone(), state: active },
            Change::Traffic { name, shares: [(version, 1.0)].into() },
        ]);
        assert_eq!((promoted.fms.len(), promoted.experts.len()), (1, 1));
        assert_eq!(promoted.experts[0].surfaces, [1]);
        assert!(promoted.needs(&promoted.fms[0]));
    }
}
