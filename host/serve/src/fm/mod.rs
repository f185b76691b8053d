//! The foundation model's tier: in this process ([`batcher`]) or in another one ([`remote`]).

pub mod batcher;
pub mod remote;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use hypercast_fm::{
    checkpoint::FmManifest, example::Example, history::CacheCounts, inference::FmOutput,
};

use crate::{
    fm::{batcher::FmBatcher, remote::RemoteFm},
    http::bodies::ReservedMemory,
    request::api::RequestResult,
};

/// A request to the FM. It may outlive its caller, who can leave while it waits.
pub struct FmRequest {
    /// One, or several of a caller that batches itself.
    pub examples: Arc<[Example]>,
    /// Nobody waits for the answer after this.
    pub deadline: Instant,
    /// The part of the memory for bodies that the examples take; none of a shadow's, which have a
    /// short queue of their own and must keep nothing from callers.
    pub(crate) _reserved: Option<Arc<ReservedMemory>>,
}

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
    pub async fn infer(&self, request: FmRequest) -> RequestResult<FmOutput> {
        match self {
            Self::Local(fm) => fm.infer(request).await,
            Self::Remote(fm) => fm.infer(request).await,
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

    /// Whether another process has another FM now than when this one connected to it.
    pub(crate) fn is_outgrown(&self) -> bool {
        match self {
            Self::Local(_) => false,
            Self::Remote(fm) => fm.is_outgrown.load(Ordering::Relaxed),
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
