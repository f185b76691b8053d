//! The FM that serves, as a daemon would load it: the version's own last publication, or before the
//! first one the version that answers. What was published is taken up beside learning, since a
//! snapshot is read and written whole.

use std::panic::resume_unwind;

use hypercast_core::background_job::BackgroundJob;

use super::super::logging::{FmLoading, LoadedFmVersion, Registered, RequestPoint, ToLog};
use crate::error::Result;

/// What serves, loaded as far as somebody last asked.
pub(super) struct ServingFollower {
    /// The version that is trained.
    version: String,
    loading: FmLoading,
    registered: Registered,
    loaded: Option<LoadedFmVersion>,
}

impl ServingFollower {
    /// Nothing is loaded yet.
    pub(super) fn new(
        version: &str,
        loading: FmLoading,
        registered: Registered,
    ) -> ServingFollower {
        ServingFollower { version: version.to_owned(), loading, registered, loaded: None }
    }

    /// What is loaded, if anything is.
    pub(super) fn loaded(&self) -> Option<&LoadedFmVersion> {
        self.loaded.as_ref()
    }

    /// Loads what serves now: the own publications, once the version was published. Nothing is
    /// loaded where that fails.
    ///
    /// # Errors
    /// An engine that cannot be reached, weights that form no model, a full disk.
    pub(super) fn catch_up(&mut self, has_published: bool) -> Result<()> {
        let caught_up = self.advance(has_published);
        if caught_up.is_err() {
            self.loaded = None;
        }
        caught_up
    }

    fn advance(&mut self, has_published: bool) -> Result<()> {
        let version = self.version.clone();
        let wanted = match has_published {
            true => Some(ToLog { version, checkpoint: None, published: true }),
            false => self.registered.answering(&*self.loading.engine)?,
        };
        if self.loaded.as_ref().map(|loaded| &loaded.to_log) != wanted.as_ref() {
            // Both may be of one version, whose work folder has room for one.
            self.loaded = None;
            self.loaded =
                wanted.map(|wanted| LoadedFmVersion::open(&self.loading, wanted)).transpose()?;
        }
        match &mut self.loaded {
            Some(loaded) => loaded.advance(&self.loading, RequestPoint::LAST),
            None => Ok(()),
        }
    }
}

/// A [`ServingFollower`] that another thread has while it loads a publication. Dropping it waits
/// for that.
pub(super) struct ServingSlot {
    idle: Option<ServingFollower>,
    loading: Option<BackgroundJob<ServingFollower>>,
}

impl ServingSlot {
    pub(super) fn new(served: ServingFollower) -> ServingSlot {
        ServingSlot { idle: Some(served), loading: None }
    }

    /// It, if no thread has it; nothing before [`ServingSlot::wait`] while one has.
    pub(super) fn idle(&self) -> Option<&ServingFollower> {
        self.idle.as_ref()
    }

    /// Whether another thread is still at work with it.
    pub(super) fn is_loading(&self) -> bool {
        self.loading.as_ref().is_some_and(|job| !job.is_finished())
    }

    /// What it is, after waiting for a thread that has it.
    pub(super) fn wait(&mut self) -> &mut ServingFollower {
        let loading = self.loading.take().map(BackgroundJob::join);
        let back = loading.map(|back| back.unwrap_or_else(|why| resume_unwind(why)));
        self.idle = self.idle.take().or(back);
        self.idle.as_mut().expect("it is idle or it was loading")
    }

    /// Takes up what was published, on another thread. Who needs it next tries again what fails.
    ///
    /// # Panics
    /// The system has no thread left.
    pub(super) fn catch_up_beside(&mut self) {
        let Some(mut served) = self.idle.take() else { return };
        let catch_up = move || {
            let _ = served.catch_up(true);
            served
        };
        let job = BackgroundJob::start("serving", catch_up);
        self.loading = Some(job.unwrap_or_else(|error| panic!("{error}")));
    }
}

impl Drop for ServingSlot {
    fn drop(&mut self) {
        if let Some(job) = self.loading.take() {
            // If it panicked, the log has the panic already.
            let _ = job.join();
        }
    }
}
