//! The two file locks of a store. Both are kernel locks on open files, so the death of a process,
//! however sudden, releases them: a lock file that is left over means nothing by itself. They are
//! also released by hand on drop: a child process in the instant between fork and exec has copies
//! of all open files, which would prolong them.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hypercast_core::dir_lock::DirLock;

use crate::Error;
use crate::error::{Result, io};

/// Takes `dir`'s writer lock, which its one writer holds for its life, or says who has it.
pub(crate) fn writer_lock(dir: &Path) -> Result<DirLock> {
    DirLock::try_acquire(&dir.join("writer.lock"), Duration::ZERO)?
        .map_err(|holder| Error::Locked { path: dir.to_owned(), holder })
}

/// Held shared by each reader for its life, and exclusively by a checkpoint.
#[derive(Debug)]
pub(crate) struct ReadersLock {
    file: File,
}

impl ReadersLock {
    /// Takes it for a reader; waits while a checkpoint runs.
    pub fn shared(dir: &Path) -> Result<ReadersLock> {
        let path = path(dir);
        // A snapshot may lie on a read-only file system, where the file exists.
        let file = File::open(&path).or_else(|_| open_or_create(&path))?;
        file.lock_shared().map_err(io("lock", &path))?;
        Ok(ReadersLock { file })
    }

    /// Takes it for a checkpoint; `None` while there are readers.
    pub fn try_exclusive(dir: &Path) -> Result<Option<ReadersLock>> {
        let path = path(dir);
        let file = open_or_create(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(ReadersLock { file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(io("lock", &path)(e)),
        }
    }

    /// Makes the lock file, so that readers need not write.
    pub fn create(dir: &Path) -> Result<()> {
        open_or_create(&path(dir)).map(drop)
    }
}

impl Drop for ReadersLock {
    fn drop(&mut self) {
        // If this fails, closing the file releases the lock all the same.
        drop(self.file.unlock());
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join("readers.lock")
}

fn open_or_create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(io("open", path))
}
