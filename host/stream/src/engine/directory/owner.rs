//! A stream's one writer: who it is says the file `owner` in the stream's folder.

use std::path::Path;
use std::time::Duration;

use crate::engine::Topic;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::dir_lock::{DirLock, LockAttempt};

/// How long a claim waits for a writer that is about to go, as those are that take turns.
const TURN: Duration = Duration::from_secs(2);

/// Claims the right to write to a stream, whose folder exists, or says who has it.
pub(super) fn claim(topic: &Topic, folder: &Path) -> Result<DirLock> {
    let path = folder.join("owner");
    match DirLock::try_acquire(&path, TURN)? {
        LockAttempt::Acquired(owner) => Ok(owner),
        LockAttempt::Held(who) => Err(Error::data(
            &path,
            format!(
                "{who} writes to the stream {topic}, and a stream has one writer: stop it, or give this process another engine.dir"
            ),
        )),
    }
}
