//! Accepts a push: checks its signature, content and order, and whether it can serve at all. A
//! refused push changes nothing; an accepted one is on the disk.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use hypercast_config::sha256;
use hypercast_core::{clock::now_ms, error::ErrorKind};
use hypercast_data::schema::Schema;
use hypercast_expert::{
    Blueprint, BreakerConfig, Engine, LoadOptions, Parameters, Plugin, SavedParameters,
    ServedExpert, upgrade, wasm::contract,
};
use hypercast_stream::{
    registry::{
        ExpertVersion, NewExpert, ReadExpert, Registry, RegistryClient, VersionState,
        WeightsLocation, read_version_file,
    },
    streams::{StreamEngine as Streams, Topic},
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    http::reload::Settings,
    rollout::{
        Push, Rollout, RolloutPolicy, RolloutStep, frame, import_config,
        repository::{PendingRollout, Repository},
        signature::PushManifest,
        transitions,
    },
    threads::lock,
    versions::weight_updates,
};

/// An accepted push whose rollout can start.
pub struct AcceptedPush {
    /// The rollout, as it is recorded.
    pub pending: Box<PendingRollout>,
    /// The loaded expert.
    pub expert: Arc<ServedExpert>,
}

/// Accepts pushes for one daemon.
pub struct Acceptor {
    /// Read for every push, because a reload may change keys, experts and limits.
    settings: Arc<Settings>,
    pub(super) schema: Arc<Schema>,
    wasm: Engine,
    pub(super) streams: Arc<dyn Streams>,
    pub(super) repository: Repository,
    /// One push at a time checks the recorded pushes and records its own.
    accepting: Mutex<()>,
}

impl Acceptor {
    /// Opens the repository beside the experts' parameters.
    ///
    /// # Errors
    /// The repository's folder cannot be created.
    pub(crate) fn new(
        settings: Arc<Settings>,
        schema: Arc<Schema>,
        wasm: Engine,
        streams: Arc<dyn Streams>,
    ) -> Result<Self> {
        let repository = Repository::open(&settings.now().paths.experts.join("pushed"))?;
        match repository.own() {
            Err(error) if error.kind() == ErrorKind::Refused => {
                tracing::info!(%error, "this daemon accepts no pushes as long as another one does");
            }
            Err(error) => {
                tracing::error!(%error, "this daemon cannot accept pushes until that is mended");
            }
            Ok(()) => {}
        }
        Ok(Self { settings, schema, wasm, streams, repository, accepting: Mutex::default() })
    }

    /// When the breaker of a plugin's calls opens.
    pub(super) fn breaker(&self) -> BreakerConfig {
        self.settings.now().plugin_limits.breaker()
    }

    /// Checks the body of a push that was sent to a version; none if the push is known and its
    /// rollout goes on. `under_way` are the files of rollouts that the registry does not know yet.
    ///
    /// # Errors
    /// A refusal by a rule, an invalid body, or an expert that does not fit; nothing has changed
    /// then.
    pub fn accept(
        &self,
        name: &str,
        version: &str,
        body: &[u8],
        under_way: HashSet<PathBuf>,
    ) -> Result<Option<AcceptedPush>> {
        let config = self.settings.now();
        let settings = &config.rollout;
        let push = frame::Push::decode(body)?;
        let keys = settings.keys().map_err(|error| Error::from(error).of_the_host())?;
        if keys.is_empty() {
            return refuse(
                "this daemon trusts no key; its operator must add public keys to rollout.trusted_keys"
                    .into(),
            );
        }
        let verified = push.signed.verify(&keys)?;
        let policy = verified.policy(&settings.audience, now_ms(), &push.wishes)?;
        let manifest = verified.manifest;
        if (manifest.name.as_str(), manifest.version.as_str()) != (name, version) {
            return refuse(format!(
                "{} {} was signed, but it was pushed as {name} {version}",
                manifest.name, manifest.version
            ));
        }
        check(&manifest, &push)?;
        let limits = RolloutPolicy::new(settings, &policy)?;
        let _one_push = lock(&self.accepting);
        self.repository.own()?;
        if self.repository.has_seen(&manifest, now_ms())? {
            return Ok(None);
        }
        let registry = RegistryClient::new(&*self.streams).read()?;
        registry.check_complete()?;
        let adoption = if import_config::is_due(&registry) {
            import_config::changes(&config, &self.schema, &self.wasm, &registry)
                .map_err(Error::of_the_host)?
        } else {
            Vec::new()
        };
        let mut plan = transitions::PlannedChanges::new(&registry);
        plan.add(adoption)?;
        let transitions::PlannedChanges { registry, changes: adoption } = plan;
        let versions = registry.experts().flat_map(|(_, expert)| expert.versions.values());
        let in_use = versions.filter(|version| version.state != VersionState::Retired);
        let recorded = self.repository.pending()?;
        let recorded = recorded.iter().flat_map(|pending| files(&pending.rollout.expert));
        let used: HashSet<PathBuf> =
            in_use.flat_map(files).chain(under_way).chain(recorded).collect();
        let bytes = push.component.len() + push.parameters.map_or(0, <[u8]>::len);
        // A warm start writes parameters of its own, about as large as those that serve.
        self.repository.make_room(bytes as u64 * 2, settings.repository_mib << 20, &used)?;
        let mut kept: Vec<PathBuf> = Vec::new();
        let loaded = self.load(&manifest, &push, &registry, &mut kept);
        let begun = loaded.and_then(|(expert, loaded)| {
            let rehearsed =
                transitions::rehearse(&registry, &expert, limits.canary_share, limits.replace)?;
            let limits = RolloutPolicy { canary_share: rehearsed.unwrap_or(1.0), ..limits };
            let rollout = new_rollout(expert, &push, &manifest, limits, &registry);
            let expires_ms = manifest.expires_ms;
            let pending = Box::new(PendingRollout { rollout, adoption, expires_ms });
            self.repository.remember(&manifest, (*pending).clone())?;
            Ok(AcceptedPush { pending, expert: Arc::new(loaded) })
        });
        match begun {
            Ok(accepted) => Ok(Some(accepted)),
            Err(error) => {
                for file in kept.iter().filter(|file| !used.contains(*file)) {
                    self.repository.forget(file);
                }
                Err(error)
            }
        }
    }

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
        LoadOptions { tae_dim, fm_version, ..self.settings.now().load_options(expert) }
    }

    fn load(
        &self,
        manifest: &PushManifest,
        push: &Push<'_>,
        registry: &Registry,
        files: &mut Vec<PathBuf>,
    ) -> Result<(ExpertVersion, ServedExpert)> {
        let plugin = self.repository.keep(push.component, "wasm")?;
        files.push(plugin.clone());
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
        let path = self.repository.keep(&parameters, "safetensors")?;
        files.push(path.clone());
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
            without_tae,
            weights: WeightsLocation::Path(path),
        };
        let component = push.component;
        let read = ReadExpert { blueprint, component, parameters: Some(parameters) };
        let (mut version, expert) = new.describe_read(&config, &self.schema, &read)?;
        version.parent = serving.map(|serving| serving.version.clone());
        Ok((version, expert.expect("its parameters are in a file")))
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

/// Checks that the content is what was signed, and was sent to the right place.
fn check(manifest: &PushManifest, push: &Push<'_>) -> Result<()> {
    if let Err(error) = semver::Version::parse(&manifest.version) {
        return refuse(format!(
            "version {:?} is not a semantic version: {error}",
            manifest.version
        ));
    }
    let same = |what: &str, signed: &str, bytes: &[u8]| {
        let found = sha256(bytes);
        if found == signed {
            return Ok(());
        }
        refuse(format!(
            "the {what} is not the one that was signed: its SHA-256 is {found}, and {signed} was signed; it was changed or truncated"
        ))
    };
    same("component", &manifest.component, push.component)?;
    match (&manifest.parameters, push.parameters) {
        (Some(signed), Some(bytes)) => same("parameter file", signed, bytes)?,
        (None, None) => {}
        (Some(_), None) => return refuse("parameters were signed, but the push has none".into()),
        (None, Some(_)) => {
            return refuse("its parameters were not signed; sign it with --parameters".into());
        }
    }
    let major = |version: &str| version.split('.').next().map(str::to_owned);
    if major(&manifest.contract) == major(contract::VERSION) {
        return Ok(());
    }
    refuse(format!(
        "it was built for expert contract {}, and this host speaks {}; {}, and sign it again",
        manifest.contract,
        contract::VERSION,
        upgrade(&manifest.contract, contract::VERSION)
    ))
}

/// The rollout of an accepted push, at its first step.
fn new_rollout(
    expert: ExpertVersion,
    push: &Push<'_>,
    manifest: &PushManifest,
    limits: RolloutPolicy,
    registry: &Registry,
) -> Rollout {
    let now_ms = now_ms();
    let previous = transitions::main_version(registry, &manifest.name);
    let mut rollout = Rollout {
        key: push.signed.key.clone(),
        created_ms: manifest.created_ms,
        begun_ms: now_ms,
        step: RolloutStep::Replay,
        since_ms: now_ms,
        previous: previous.map(|previous| previous.version.clone()),
        displaced: if limits.replace {
            transitions::displaced(registry, &expert)
        } else {
            Vec::new()
        },
        limits,
        before_us: None,
        settled: false,
        cause: None,
        log: Vec::new(),
        expert,
    };
    let version = &rollout.expert;
    let from = match manifest.parameters {
        Some(_) => "its own parameters".to_owned(),
        None => format!("the parameters of {}", version.parent.as_deref().unwrap_or("none")),
    };
    let text = format!(
        "signed by key {}; component {} ({} bytes), plugin version {}, with {from}, on FM {}, for {:?}",
        rollout.key,
        &manifest.component[..16],
        push.component.len(),
        version.plugin_version,
        version.fm,
        version.surfaces
    );
    rollout.add_line(text);
    rollout
}

/// The files of a version.
pub(super) fn files(expert: &ExpertVersion) -> Vec<PathBuf> {
    match &expert.weights {
        WeightsLocation::Path(path) => vec![expert.plugin.clone(), path.clone()],
        WeightsLocation::Published => vec![expert.plugin.clone()],
    }
}

fn few(names: &[String]) -> String {
    const FEW: usize = 12;
    let shown = names.iter().take(FEW).map(|name| format!("`{name}`")).collect::<Vec<_>>();
    let more = names.len().saturating_sub(FEW);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::refused(why))
}
