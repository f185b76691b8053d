//! The foundation model's tier: in this process ([`batcher`]) or in another one ([`remote`]).

pub mod batcher;
pub mod remote;

use std::{sync::Arc, time::Instant};

use hypercast_fm::{
    checkpoint::FmManifest, example::Example, history::CacheCounts, inference::FmOutput,
};

use crate::{
    fm::{batcher::FmBatcher, remote::RemoteFm},
    request::api::RequestResult,
};

/// Where a version of the FM runs.
pub enum FmTier {
    /// In this process, behind a batching queue.
    Local(FmBatcher),
    /// In another process, reached over HTTP.
    Remote(Box<RemoteFm>),
}

impl FmTier {
    /// The manifest of the checkpoint that it was loaded from.
    pub fn manifest(&self) -> &FmManifest {
        match self {
            Self::Local(batcher) => batcher.fm.manifest(),
            Self::Remote(fm) => &fm.manifest,
        }
    }

    /// The FM's predictions and TAEs for the examples' targets, in order.
    ///
    /// # Errors
    /// See [`FmBatcher::infer`] and [`RemoteFm::infer`].
    pub async fn infer(
        &self,
        examples: Arc<[Example]>,
        deadline: Instant,
    ) -> RequestResult<FmOutput> {
        match self {
            Self::Local(fm) => fm.infer(examples, deadline).await,
            Self::Remote(fm) => fm.infer(examples, deadline).await,
        }
    }

    /// Looks whether the files that the FM reads while it serves are whole. Another process looks
    /// after its own.
    ///
    /// # Errors
    /// See [`hypercast_fm::inference::FoundationModel::check_files`].
    pub fn check_files(&self) -> hypercast_fm::Result<()> {
        match self {
            Self::Local(batcher) => batcher.fm.check_files(),
            Self::Remote(_) => Ok(()),
        }
    }

    /// Hits and misses of the history cache; none for an FM in another process.
    pub fn cache_counts(&self) -> Option<CacheCounts> {
        match self {
            Self::Local(batcher) => Some(batcher.fm.cache_counts()),
            Self::Remote(_) => None,
        }
    }
}
