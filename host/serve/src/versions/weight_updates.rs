//! Applies published weights to models that serve, between their requests (paper section 3.3.4).
//! Models that no longer serve are dropped.
//!
//! A publication that does not follow the current weights, or does not fit the model, is refused:
//! the weights stay, and the model waits for the next snapshot.

use hypercast_core::{logging::RepeatedFailures, shutdown::Shutdown};
use std::{
    path::Path,
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant},
};

use hypercast_expert::{Blueprint, Device, FeatureStatistics, Parameters};
use hypercast_fm::inference::{self, FmServingOptions, FoundationModel};
use hypercast_stream::{
    publish::{self, Publication, PublicationFollower, PublicationKind},
    streams::{StreamEngine, Topic},
};
use tempfile::TempDir;

use crate::{
    error::{CommonErrors as _, Error, Result},
    fm::FmTier,
    metrics::Metrics,
    threads::lock,
    versions::serving_set::LiveExpert,
};

/// Shortest time of a round over all feeds.
const ROUND: Duration = Duration::from_millis(100);

/// Back-off of a feed that failed.
const REST: Duration = Duration::from_secs(5);

/// The feeds of all models that a process has loaded.
#[derive(Default)]
pub struct WeightFeeds {
    new: Mutex<Vec<WeightFeed>>,
}

/// The publications of one version, and the model that they are applied to.
pub struct WeightFeed {
    /// `fm@VERSION` or `NAME@VERSION`.
    label: String,
    follower: PublicationFollower,
    model: FeedTarget,
    refused: u64,
    /// When to try again after a failure.
    rest_until: Option<Instant>,
    awaits_snapshot: bool,
    failures: RepeatedFailures,
}

/// The model that publications are applied to.
pub(super) enum FeedTarget {
    /// An FM, with the folder of its rows, which goes with it.
    Fm { tier: Weak<FmTier>, _folder: TempDir },
    /// An expert with its current parameters.
    Expert { live: Weak<LiveExpert>, parameters: Box<Parameters>, device: Device },
}

impl WeightFeed {
    /// A feed of `fm@VERSION` or `NAME@VERSION`.
    pub(super) fn new(label: String, follower: PublicationFollower, model: FeedTarget) -> Self {
        Self {
            label,
            follower,
            model,
            refused: 0,
            rest_until: None,
            awaits_snapshot: false,
            failures: RepeatedFailures::default(),
        }
    }

    fn is_served(&self) -> bool {
        match &self.model {
            FeedTarget::Fm { tier, .. } => tier.strong_count() > 0,
            FeedTarget::Expert { live, .. } => live.strong_count() > 0,
        }
    }

    /// Applies all publications that have arrived until `stop`.
    fn round(&mut self, stop: &Shutdown, metrics: &Metrics) {
        if self.rest_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        self.rest_until = None;
        while !stop.is_requested() {
            let next = self.follower.next(Duration::ZERO);
            self.count_refused(metrics);
            match next {
                Ok(None) => return,
                Ok(Some(publication)) => self.take(publication, metrics),
                Err(error) => {
                    if self.failures.is_news(&error) {
                        tracing::warn!(%error, version = self.label, "published weights cannot be read; trying again");
                    }
                    self.rest_until = Some(Instant::now() + REST);
                    return;
                }
            }
        }
    }

    fn take(&mut self, publication: Publication, metrics: &Metrics) {
        if self.awaits_snapshot && publication.header.kind == PublicationKind::Delta {
            metrics.publication_refused(&self.label);
            return;
        }
        let header = publication.header.clone();
        match self.apply(publication) {
            Ok(true) => {
                self.awaits_snapshot = false;
                metrics.publication_applied(&self.label, &header);
            }
            // The model no longer serves.
            Ok(false) => {}
            Err(error) => {
                if self.failures.is_news(&error) {
                    tracing::error!(%error, version = self.label, "published weights are refused; the weights before keep serving until the next snapshot");
                }
                self.awaits_snapshot = true;
                metrics.publication_refused(&self.label);
            }
        }
    }

    fn apply(&mut self, publication: Publication) -> Result<bool> {
        match &mut self.model {
            FeedTarget::Fm { tier, .. } => {
                let Some(tier) = tier.upgrade() else { return Ok(false) };
                let FmTier::Local(batcher) = &*tier else {
                    unreachable!("the FM of another process is fed there")
                };
                batcher.fm.update(publish::fm_update(publication)?)?;
            }
            FeedTarget::Expert { live, parameters, device } => {
                let Some(live) = live.upgrade() else { return Ok(false) };
                let mut new = parameters.apply(&publication.parameter_update())?;
                let names = &parameters.provenance.normaliser.names;
                let Some(grown) = new.provenance.normaliser.grown(names) else {
                    return Err(Error::invalid(
                        "they were trained with numeric features that this daemon's schema lacks; \
                         it takes them once `hypercast schema apply` has run here",
                    ));
                };
                new.provenance.normaliser = grown;
                live.expert.replace(live.expert.now().renewed(new.clone(), *device)?);
                **parameters = new;
            }
        }
        Ok(true)
    }

    fn count_refused(&mut self, metrics: &Metrics) {
        let publish::Refusals { damaged, foreign, torn, out_of_chain } = self.follower.refusals;
        let refused = damaged + foreign + torn + out_of_chain;
        for _ in self.refused..refused {
            metrics.publication_refused(&self.label);
        }
        self.refused = refused;
    }
}

impl WeightFeeds {
    /// Follows one more stream of published weights.
    pub fn add(&self, feed: WeightFeed) {
        lock(&self.new).push(feed);
    }

    /// Applies publications of all feeds until `stop`.
    pub fn follow(&self, stop: &Shutdown, metrics: &Metrics) {
        let mut feeds = Vec::new();
        while !stop.is_requested() {
            feeds.append(&mut lock(&self.new));
            feeds.retain(WeightFeed::is_served);
            feeds.iter_mut().for_each(|feed| feed.round(stop, metrics));
            std::thread::sleep(ROUND);
        }
    }
}

/// Loads an FM from its publications into a new folder under `base`. Returns what follows them from
/// there on, too.
///
/// # Errors
/// Nothing is published yet (unavailable), or the weights do not make a model.
pub fn open_fm(
    streams: Arc<dyn StreamEngine>,
    topic: Topic,
    base: &Path,
    serving: FmServingOptions,
) -> Result<(Arc<dyn FoundationModel>, PublicationFollower, TempDir)> {
    std::fs::create_dir_all(base).map_err(Error::io(base))?;
    let folder =
        tempfile::Builder::new().prefix("fm-").tempdir_in(base).map_err(Error::io(base))?;
    let checkpoint = folder.path().join("checkpoint");
    let (_, follower) = publish::bootstrap(streams, topic.clone(), &checkpoint)?
        .ok_or_else(|| nothing_yet(&topic))?;
    let fm = inference::load_updatable(&checkpoint, &folder.path().join("rows"), serving)?;
    Ok((Arc::from(fm), follower, folder))
}

/// Loads an expert's parameters from its publications. Returns what follows them from there on,
/// too.
///
/// # Errors
/// Nothing is published yet (unavailable), or the parameters belong to another network.
pub fn open_expert(
    streams: Arc<dyn StreamEngine>,
    topic: Topic,
    blueprint: &Blueprint,
) -> Result<(Parameters, PublicationFollower)> {
    let mut follower = PublicationFollower::open(streams, topic.clone())?;
    let first = follower.next(Duration::ZERO)?.ok_or_else(|| nothing_yet(&topic))?;
    // The first snapshot replaces these initial values; it is refused unless it has all of them.
    let fresh = blueprint.init_parameters(FeatureStatistics::new(&[]).finish(), 0);
    let mut parameters = fresh.apply(&first.parameter_update())?;
    while let Some(later) = follower.next(Duration::ZERO)? {
        parameters = parameters.apply(&later.parameter_update())?;
    }
    let Some(grown) = parameters.provenance.normaliser.grown(blueprint.columns.feature_names())
    else {
        return Err(Error::invalid(
            "its parameters were trained with numeric features that the schema lacks; train the expert again",
        ));
    };
    parameters.provenance.normaliser = grown;
    Ok((parameters, follower))
}

fn nothing_yet(topic: &Topic) -> Error {
    Error::unreachable(format!(
        "nothing is published in stream {topic} yet; start its trainer with --follow, and try again after its first publication"
    ))
}
