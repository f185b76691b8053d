//! The FM as the daemon asks it: here, or in another process.

use std::{sync::Arc, time::Instant};

use hypercast_fm::{
    checkpoint::Manifest,
    example::Example,
    history::CacheCounts,
    inference::{self, FmOutput, FoundationModel},
};

use super::{api::Refusal, fm_batcher::FmBatcher, fm_remote::RemoteFm, metrics::Metrics};
use crate::{
    config::{Config, FmTierConfig},
    error::Result,
};

/// A tier that runs the FM.
pub enum FmTier {
    /// In this process.
    Local(FmBatcher),
    /// In another one.
    Remote(Box<RemoteFm>),
}

impl FmTier {
    /// Loads the FM, or connects to the process that has it.
    ///
    /// # Errors
    /// A checkpoint or a process that cannot be used.
    pub fn open(config: &Config, tier: &FmTierConfig, metrics: &Arc<Metrics>) -> Result<Self> {
        if !tier.url.is_empty() {
            return Ok(Self::Remote(Box::new(RemoteFm::connect(&tier.url)?)));
        }
        let fm: Arc<dyn FoundationModel> =
            Arc::from(inference::load(&config.paths.fm, tier.loading(config.device))?);
        metrics.version("fm", "fm", &fm.manifest().version);
        Ok(Self::Local(FmBatcher::start(fm, tier, metrics.clone())?))
    }

    /// What the checkpoint says of itself.
    pub fn manifest(&self) -> &Manifest {
        match self {
            Self::Local(fm) => fm.manifest(),
            Self::Remote(fm) => fm.manifest(),
        }
    }

    /// What the FM says of the examples' targets, in order.
    ///
    /// # Errors
    /// See [`FmBatcher::infer`] and [`RemoteFm::infer`].
    pub async fn infer(
        &self,
        examples: Arc<[Example]>,
        deadline: Instant,
    ) -> std::result::Result<FmOutput, Refusal> {
        match self {
            Self::Local(fm) => fm.infer(examples, deadline).await,
            Self::Remote(fm) => fm.infer(examples, deadline).await,
        }
    }

    /// What the history cache was worth; none where the FM is in another process.
    pub fn cache_counts(&self) -> Option<CacheCounts> {
        match self {
            Self::Local(fm) => Some(fm.cache_counts()),
            Self::Remote(_) => None,
        }
    }
}
