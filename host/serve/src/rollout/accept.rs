//! Accepts a push: checks its signature, content and order, and whether it can serve at all. A
//! refused push changes nothing; an accepted one is on the disk.

mod load;

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use hypercast_config::{Config, sha256};
use hypercast_core::{clock::now_ms, error::ErrorKind};
use hypercast_data::schema::Schema;
use hypercast_expert::{
    BreakerConfig, Engine, ServedExpert, upgrade,
    wasm::contract::{Contract, EARLIER_VERSION, VERSION},
};
use hypercast_stream::{
    registry::{ExpertVersion, Registry, RegistryFollower, VersionState, WeightsLocation},
    streams::StreamEngine as Streams,
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    http::reload::Settings,
    rollout::{
        Push, Rollout, RolloutPolicy, RolloutStep, frame,
        import_config::{self, ConfiguredVersions},
        repository::{PendingRollout, Repository},
        signature::PushManifest,
        transitions,
    },
    threads::lock,
};

/// An accepted push whose rollout can start.
pub struct AcceptedPush {
    /// The rollout, as it is recorded.
    pub pending: Box<PendingRollout>,
    /// The expert, if it is loaded already; else its replay loads it.
    pub expert: Option<Arc<ServedExpert>>,
}

/// A push whose signature and content are checked.
#[derive(Clone, Copy)]
pub struct PushToLoad<'a> {
    /// What was signed.
    pub manifest: &'a PushManifest,
    /// What came.
    pub push: &'a Push<'a>,
    /// The versions before it.
    pub registry: &'a Registry,
}

/// What a push brings.
pub struct LoadedPush {
    /// The version, with the files that it is in.
    pub version: ExpertVersion,
    /// The expert, if it is loaded already.
    pub expert: Option<Arc<ServedExpert>>,
}

/// Loads a push, and keeps its files.
pub type LoadFn = fn(&Acceptor, &PushToLoad<'_>, &mut KeptFiles<'_>) -> Result<LoadedPush>;

/// The files that a push has brought into the repository so far.
pub struct KeptFiles<'a> {
    repository: &'a Repository,
    paths: Vec<PathBuf>,
}

impl KeptFiles<'_> {
    /// As [`Repository::keep`].
    ///
    /// # Errors
    /// As [`Repository::keep`].
    pub fn keep(&mut self, bytes: &[u8], extension: &str) -> Result<PathBuf> {
        let path = self.repository.keep(bytes, extension)?;
        self.paths.push(path.clone());
        Ok(path)
    }
}

/// Accepts pushes for one daemon.
pub struct Acceptor {
    /// Read for every push, because a reload may change keys, experts and limits.
    settings: Arc<Settings>,
    pub(super) schema: Arc<Schema>,
    /// The width of the content vectors that experts read here; 0 without any.
    content_dim: usize,
    wasm: Engine,
    pub(super) streams: Arc<dyn Streams>,
    pub(super) repository: Arc<Repository>,
    load: LoadFn,
    /// The decisions that pushes are held against. One push at a time checks the recorded pushes
    /// and records its own, also while a request goes on with the acceptor of before a growth.
    accepting: Arc<Mutex<RegistryFollower>>,
}

impl Acceptor {
    /// Opens the repository beside the experts' parameters. Experts read no content vectors.
    ///
    /// # Errors
    /// The repository's folder cannot be created.
    pub(crate) fn new(
        settings: Arc<Settings>,
        schema: Arc<Schema>,
        wasm: Engine,
        streams: Arc<dyn Streams>,
    ) -> Result<Self> {
        let dir = settings.now().paths.experts.join("pushed");
        let repository = Arc::new(Repository::open(&dir)?);
        match repository.own() {
            Err(error) if error.kind() == ErrorKind::Refused => {
                tracing::info!(%error, "this daemon accepts no pushes as long as another one does");
            }
            Err(error) => {
                tracing::error!(%error, "this daemon cannot accept pushes until that is mended");
            }
            Ok(()) => {}
        }
        let accepting = Arc::new(Mutex::new(RegistryFollower::new(&*streams)?));
        Ok(Self {
            settings,
            schema,
            content_dim: 0,
            wasm,
            streams,
            repository,
            load: load::load,
            accepting,
        })
    }

    /// The same for experts that read content vectors of this width, 0 for none.
    pub(crate) fn with_content(self, content_dim: usize) -> Self {
        Self { content_dim, ..self }
    }

    /// One that goes on with this one's repository, for pushes of another schema. What it is to be
    /// told of content vectors, [`Acceptor::with_content`] tells it.
    pub(crate) fn under(&self, schema: Arc<Schema>) -> Self {
        Self {
            settings: self.settings.clone(),
            schema,
            content_dim: self.content_dim,
            wasm: self.wasm.clone(),
            streams: self.streams.clone(),
            repository: self.repository.clone(),
            load: self.load,
            accepting: self.accepting.clone(),
        }
    }

    /// As the daemon's, but `load` loads the pushes.
    ///
    /// # Errors
    /// The repository's folder cannot be created.
    pub fn with_loader(
        config: Config,
        schema: Arc<Schema>,
        wasm: Engine,
        streams: Arc<dyn Streams>,
        load: LoadFn,
    ) -> Result<Self> {
        let settings = Arc::new(Settings::new(config));
        Ok(Self { load, ..Self::new(settings, schema, wasm, streams)? })
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
        let mut decisions = lock(&self.accepting);
        self.repository.own()?;
        if self.repository.has_seen(&manifest, now_ms())? {
            return Ok(None);
        }
        decisions.catch_up(&*self.streams)?;
        let registry = decisions.registry();
        registry.check_complete()?;
        let adoption = if import_config::is_due(registry) {
            let (schema, content_dim, wasm) = (&*self.schema, self.content_dim, &self.wasm);
            let own = ConfiguredVersions { config: &config, schema, content_dim, wasm };
            own.changes(registry).map_err(Error::of_the_host)?
        } else {
            Vec::new()
        };
        let mut plan = transitions::PlannedChanges::new(registry);
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
        let mut kept = KeptFiles { repository: &self.repository, paths: Vec::new() };
        let of = PushToLoad { manifest: &manifest, push: &push, registry: &registry };
        let loaded = (self.load)(self, &of, &mut kept);
        let begun = loaded.and_then(|LoadedPush { version, expert }| {
            let rehearsed =
                transitions::rehearse(&registry, &version, limits.canary_share, limits.replace)?;
            let limits = RolloutPolicy { canary_share: rehearsed.unwrap_or(1.0), ..limits };
            let rollout = new_rollout(version, &push, &manifest, limits, &registry);
            let expires_ms = manifest.expires_ms;
            let pending = Box::new(PendingRollout { rollout, adoption, expires_ms });
            self.repository.remember(&manifest, (*pending).clone())?;
            Ok(AcceptedPush { pending, expert })
        });
        match begun {
            Ok(accepted) => Ok(Some(accepted)),
            Err(error) => {
                for file in kept.paths.iter().filter(|file| !used.contains(*file)) {
                    self.repository.forget(file);
                }
                Err(error)
            }
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
    if Contract::of(&manifest.contract).is_some() {
        return Ok(());
    }
    refuse(format!(
        "it was built for expert contract {}, and this host speaks {VERSION} and \
         {EARLIER_VERSION}; {}. What is built again is signed again",
        manifest.contract,
        upgrade(&manifest.contract)
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
        lasted_ms: 0,
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

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::refused(why))
}
