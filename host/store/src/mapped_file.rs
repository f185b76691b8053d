//! A file of a store, mapped for reading, that survives being cut: it is then *lost*, gives zeros,
//! and says so. Once the file has its length and its content again, it is mapped again in the same
//! place, so that pointers into it stay good. Whether the content is right, its owner says.

use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use memmap2::Mmap;

use crate::Error;
use crate::error::{Result, io};
use crate::fault_guard::{FaultGuard, MappingAccess};
use crate::memory::Residency;

/// How long a lost file whose content was wrong is not read again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A mapping of a whole file.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    /// Dropped before the mapping.
    guard: FaultGuard,
    map: Mmap,
    /// The file's number on its disk: another file may have the path by now.
    inode: AtomicU64,
    /// Losses that were made good.
    restored: AtomicU64,
    /// Held while the file is restored: when its content was last found wrong.
    refused: Mutex<Option<Instant>>,
}

impl MappedFile {
    /// Maps the whole file.
    ///
    /// # Safety
    /// No byte of it that a slice covers may be changed meanwhile; it may be cut.
    ///
    /// # Errors
    /// A file that cannot be opened or mapped; `missing` gives the error where there is none.
    pub unsafe fn open(path: PathBuf, missing: impl FnOnce(&Path) -> Error) -> Result<MappedFile> {
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => missing(&path),
            _ => io("open", &path)(error),
        })?;
        let inode = file.metadata().map_err(io("read", &path))?.ino().into();
        // SAFETY: as the caller promises; that it may be cut is what the guard is for.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map", &path))?;
        // SAFETY: the mapping was made just now, and the guard is dropped before it.
        let guard = unsafe { FaultGuard::over(map.as_ptr(), map.len(), MappingAccess::Read) };
        let guard = guard.map_err(io("guard the mapping of", &path))?;
        let (restored, refused) = (AtomicU64::new(0), Mutex::new(None));
        Ok(MappedFile { path, guard, map, inode, restored, refused })
    }

    /// As it was given to [`MappedFile::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says how it will be used.
    pub fn advise(&self, residency: Residency) {
        residency.advise(&self.map);
    }

    /// Fails if it is lost.
    pub fn check(&self) -> Result<()> {
        match self.guard.losses() == self.restored.load(Acquire) {
            true => Ok(()),
            false => Err(self.lost("it was cut off while it was in use")),
        }
    }

    /// Fails if it was ever lost: what was read since it was opened may have been zeros.
    pub fn check_always_whole(&self) -> Result<()> {
        match self.guard.losses() {
            0 => Ok(()),
            _ => Err(self.lost("it was cut off while it was in use")),
        }
    }

    /// Counts it as lost if the file is shorter than its mapping, before anybody reads there.
    pub fn look_at_length(&self) {
        if let Ok(metadata) = fs::metadata(&self.path)
            && metadata.ino() == self.inode.load(Relaxed)
            && metadata.len() < self.map.len() as u64
            && self.check().is_ok()
        {
            self.guard.count_loss();
        }
    }

    /// If it is lost, maps the file again, provided that it has its length and `verify` finds that
    /// it has its content.
    ///
    /// # Errors
    /// [`Error::FileLost`] if it still is.
    pub fn restore(&self, verify: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let losses = self.guard.settled_losses();
        if losses == self.restored.load(Acquire) {
            return Ok(());
        }
        if refused.is_some_and(|at| at.elapsed() < RETRY_AFTER) {
            return Err(self.lost("its content is not what it was"));
        }
        let file = File::open(&self.path).map_err(|error| self.lost(error.to_string()))?;
        let metadata = file.metadata().map_err(|error| self.lost(error.to_string()))?;
        let (found, expected) = (metadata.len(), self.map.len());
        if found != expected as u64 {
            return Err(self.lost(format!("it has {found} of {expected} bytes")));
        }
        self.map_again(&file).map_err(|error| self.lost(error.to_string()))?;
        self.inode.store(metadata.ino(), Relaxed);
        if let Err(error) = verify() {
            *refused = Some(Instant::now());
            return Err(self.lost(format!("its content is not what it was ({error})")));
        }
        // A loss since then is another number, so the file stays lost.
        self.restored.store(losses, Release);
        Ok(())
    }

    fn map_again(&self, file: &File) -> io::Result<()> {
        let (start, len) = (self.map.as_ptr().cast_mut().cast(), self.map.len());
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: the range is this file's own mapping, of the length that the file has.
        let map = unsafe { libc::mmap(start, len, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        if map == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn lost(&self, what: impl Into<String>) -> Error {
        Error::FileLost { path: self.path.clone(), what: what.into() }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_waits_for_handlers_that_are_at_work() {
        let dir = tempfile::tempdir().unwrap();
        let (path, content) = (dir.path().join("file"), vec![7; 3 << 12]);
        fs::write(&path, &content).unwrap();
        let missing = |path: &Path| panic!("{} is missing", path.display());
        // SAFETY: nobody changes the file.
        let file = unsafe { MappedFile::open(path, missing) }.unwrap();
        std::thread::scope(|scope| {
            let mut restoring = None;
            file.guard.lose_slowly(|| {
                restoring = Some(scope.spawn(|| file.restore(|| Ok(()))));
                std::thread::sleep(Duration::from_millis(200));
            });
            restoring.unwrap().join().unwrap().unwrap();
        });
        file.check().unwrap();
        assert!(file[..] == content[..], "the handler's zeros came before the file's bytes");
    }
}
