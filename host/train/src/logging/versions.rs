//! The FM versions that the logging tier computes embeddings with, each with weights
//! that had learned nothing that is still to be logged.
//!
//! A publication is put in service once the tier's own position in `joined` is at or past the
//! position up to which its trainer had learned; until then the next one waits, and the older
//! weights stay. In a stream that was made anew positions begin again, so what is newer than all
//! that a trainer had learned from counts as past it, too. The gate of an FM's trainer loads what
//! serves in the same way, without waiting.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hypercast_fm::{
    checkpoint::FmManifest,
    example::Example,
    inference::{self, FmOutput, FmServingOptions, FoundationModel},
    runtime::FmRuntime,
};

use crate::error::Result;
use hypercast_core::disk;
use hypercast_data::logs::LogVersion;
use hypercast_data::schema::MainTasks;
use hypercast_stream::publish::{
    self, Publication, PublicationHeader, TrainingPosition, fm_update,
};
use hypercast_stream::registry::{self, WeightsLocation};
use hypercast_stream::streams::{StreamEngine, Topic};

/// Where a request is in `joined`, and when it was.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestPoint {
    pub(crate) position: u64,
    pub(crate) time_ms: i64,
}

impl RequestPoint {
    /// Behind all that any weights have learned from.
    pub(crate) const LAST: RequestPoint = RequestPoint { position: u64::MAX, time_ms: i64::MAX };

    /// Whether weights that were trained so far may have learned from it.
    pub(crate) fn may_be_learned(self, trained: TrainingPosition) -> bool {
        let TrainingPosition { trained_position, trained_until_ms, .. } = trained;
        // What is not of this stream has a time all the same, unless nothing was learned.
        let is_newer = trained_until_ms > 0 && self.time_ms > trained_until_ms;
        self.position < trained_position && !is_newer
    }
}

/// A version that is to be logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToLog {
    /// The version.
    pub version: String,
    /// A checkpoint of it, which any of its publications is newer than.
    pub checkpoint: Option<PathBuf>,
    /// Whether its weights are published.
    pub published: bool,
}

/// The registry's active and shadow versions, and the configured checkpoint as long as it serves
/// (`serve::plan`).
pub struct Registered {
    follower: registry::RegistryFollower,
    checkpoint: PathBuf,
}

impl Registered {
    /// Those of an engine's registry, or the checkpoint in a folder.
    ///
    /// # Errors
    /// An engine that cannot be reached.
    pub fn new(engine: &dyn StreamEngine, checkpoint: &Path) -> Result<Registered> {
        let follower = registry::RegistryFollower::new(engine)?;
        Ok(Registered { follower, checkpoint: checkpoint.to_path_buf() })
    }

    /// Those of this moment, each once.
    ///
    /// # Errors
    /// An engine that cannot be reached, a checkpoint that cannot be read.
    pub fn to_log(&mut self, engine: &dyn StreamEngine) -> Result<Vec<ToLog>> {
        self.follower.catch_up(engine)?;
        let registry = self.follower.registry();
        let mut all: Vec<ToLog> = registry.live_fms().into_iter().map(ToLog::registered).collect();
        if registry.leaves_the_configured_fm() {
            match FmManifest::read(&self.checkpoint) {
                // What is registered of a version says more than the configuration.
                Ok(FmManifest { version, .. }) if all.iter().all(|own| own.version != version) => {
                    let checkpoint = Some(self.checkpoint.clone());
                    all.push(ToLog { version, checkpoint, published: true });
                }
                Ok(_) => {}
                // Where FMs are registered and none was ever trained here, there is none to
                // configure.
                Err(_) if !all.is_empty() && !disk::exists(&self.checkpoint) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(all)
    }

    /// The version that answers: the newest active one, or the configured checkpoint. `None` if
    /// there is neither.
    ///
    /// # Errors
    /// As [`Registered::to_log`].
    pub(crate) fn answering(&mut self, engine: &dyn StreamEngine) -> Result<Option<ToLog>> {
        self.follower.catch_up(engine)?;
        if let Some(fm) = self.follower.registry().newest_fm() {
            return Ok(Some(ToLog::registered(fm)));
        }
        if !disk::exists(&self.checkpoint) {
            return Ok(None);
        }
        let FmManifest { version, .. } = FmManifest::read(&self.checkpoint)?;
        Ok(Some(ToLog { version, checkpoint: Some(self.checkpoint.clone()), published: true }))
    }
}

impl ToLog {
    /// A version by its registration.
    fn registered(fm: &registry::FmVersion) -> ToLog {
        let (checkpoint, published) = match &fm.weights {
            WeightsLocation::Path(path) => (Some(path.clone()), false),
            // What it began from may be another version's: only its own publications are its
            // weights.
            WeightsLocation::Published => (None, true),
        };
        ToLog { version: fm.version.clone(), checkpoint, published }
    }
}

/// How versions are loaded.
pub(crate) struct FmLoading {
    pub(crate) engine: Arc<dyn StreamEngine>,
    /// Loads published weights.
    pub(crate) runtime: Arc<dyn FmRuntime>,
    pub(crate) serving: FmServingOptions,
    /// A folder of this process alone.
    pub(crate) work: PathBuf,
}

/// The versions in use.
pub(super) struct LoadedVersions {
    pub(super) loading: FmLoading,
    pub(super) versions: Vec<LoadedFmVersion>,
}

/// A version with its newest weights that may be used.
pub(crate) struct LoadedFmVersion {
    pub(crate) to_log: ToLog,
    /// None before there are weights.
    pub(crate) fm: Option<Box<dyn FoundationModel>>,
    /// Up to where in `joined` its trainer had learned, if its weights are published.
    pub(crate) trained: Option<TrainingPosition>,
    /// Where its weights come from, if they are published.
    follower: Option<publish::PublicationFollower>,
    /// The next publication, which is ahead of what was logged.
    ahead: Option<Publication>,
}

impl LoadedVersions {
    /// Takes up versions that are new and lets go of those that are out of use.
    pub(super) fn set(&mut self, to_log: Vec<ToLog>) -> Result<()> {
        self.versions.retain(|own| to_log.contains(&own.to_log));
        for to_log in to_log {
            if self.versions.iter().all(|own| own.to_log != to_log) {
                let own = LoadedFmVersion::open(&self.loading, to_log)?;
                self.versions.push(own);
            }
        }
        self.versions.sort_by(|a, b| a.to_log.version.cmp(&b.to_log.version));
        Ok(())
    }

    /// Loads all anew, without the weights that were in service.
    pub(super) fn reload(&mut self) -> Result<()> {
        let versions = std::mem::take(&mut self.versions);
        self.set(versions.into_iter().map(|own| own.to_log).collect())
    }

    /// Puts the newest weights in service that may be used for what comes next. Whether any version
    /// may be used, or will never be for it: if not, weights must come first.
    pub(super) fn advance(&mut self, next: RequestPoint) -> Result<bool> {
        for own in &mut self.versions {
            own.advance(&self.loading, next)?;
        }
        Ok(self.versions.iter().any(|own| own.fm.is_some() || own.ahead.is_some()))
    }

    /// Those that may be used, in the order of [`LoadedVersions::infer`].
    pub(super) fn usable(&self) -> Vec<LogVersion> {
        let usable = self.versions.iter().filter_map(|own| own.fm.as_ref().map(|fm| (own, fm)));
        usable
            .map(|(own, fm)| LogVersion::new(&own.to_log.version, fm.manifest().config.tae_width()))
            .collect()
    }

    /// What each usable version answers for all targets, with the predictions of `main_tasks`.
    pub(super) fn infer(
        &self,
        examples: &[&Example],
        main_tasks: &MainTasks,
    ) -> Result<Vec<FmOutput>> {
        let usable = self.versions.iter().filter_map(|own| own.fm.as_ref());
        usable.map(|fm| Ok(main_tasks.output(&fm.manifest().spec, fm.infer(examples)?))).collect()
    }
}

impl LoadedFmVersion {
    /// # Errors
    /// An engine that cannot be reached, a checkpoint that cannot be loaded.
    pub(crate) fn open(loading: &FmLoading, to_log: ToLog) -> Result<LoadedFmVersion> {
        let topic = Topic::fm(&to_log.version);
        let open = || publish::PublicationFollower::open(loading.engine.clone(), topic);
        let follower = to_log.published.then(open).transpose()?;
        let fm = match (&to_log.checkpoint, to_log.published) {
            (Some(dir), false) => Some(inference::load(dir, loading.serving.clone())?),
            (Some(dir), true) => {
                let work = Self::work(loading, &to_log.version);
                Some(inference::load_updatable(dir, &work.join("rows"), loading.serving.clone())?)
            }
            (None, _) => None,
        };
        Ok(LoadedFmVersion { to_log, fm, trained: None, follower, ahead: None })
    }

    fn work(loading: &FmLoading, version: &str) -> PathBuf {
        loading.work.join(Topic::fm(version).name())
    }

    /// Puts the newest weights in service that may be used for what comes next.
    ///
    /// # Errors
    /// An engine that cannot be reached, weights that form no model, a full disk.
    pub(crate) fn advance(&mut self, loading: &FmLoading, next: RequestPoint) -> Result<()> {
        let Some(follower) = &mut self.follower else { return Ok(()) };
        loop {
            let newer = match self.ahead.take() {
                Some(publication) => Some(publication),
                None => follower.next(Duration::ZERO)?,
            };
            let Some(publication) = newer else { return Ok(()) };
            let trained = trained(&publication.header);
            if next.may_be_learned(trained) {
                self.ahead = Some(publication);
                return Ok(());
            }
            let update = fm_update(publication)?;
            match &self.fm {
                Some(fm) => fm.update(update)?,
                None => {
                    let work = Self::work(loading, &self.to_log.version);
                    let FmLoading { runtime, serving, .. } = loading;
                    self.fm = Some(runtime.load_published(update, &work, serving.clone())?);
                }
            }
            self.trained = Some(trained);
        }
    }
}

fn trained(header: &PublicationHeader) -> TrainingPosition {
    let &PublicationHeader { trained_position, trained_until_ms, ingested_ms, .. } = header;
    TrainingPosition { trained_position, trained_until_ms, ingested_ms }
}
