//! What of the configuration can change while the daemon runs: a request asks once and keeps what it got.

use std::sync::{Arc, PoisonError, RwLock};

use hypercast_config::Config;

/// The configuration now.
#[derive(Debug)]
pub struct Settings {
    now: RwLock<Arc<Config>>,
}

impl Settings {
    /// Begins with what was read at the start.
    pub fn new(config: Config) -> Arc<Self> {
        Arc::new(Self { now: RwLock::new(Arc::new(config)) })
    }

    /// The configuration now.
    pub fn now(&self) -> Arc<Config> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn replace(&self, config: Config) {
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }
}
