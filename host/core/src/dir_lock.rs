//! A lock on a work directory: one process at a time. A second process gets an error with the
//! first one's process id.
//!
//! It is a kernel lock on an open file. The kernel releases it when the process dies, so a lock
//! file that is left over means nothing.

use std::{
    fs::TryLockError,
    io::{Read, Write},
    path::Path,
    time::Duration,
};

use crate::{
    atomic_dir, clock,
    disk::{File, OpenMode},
    error::{CommonErrors as _, Error, Result},
};

/// The pause between two attempts to get a lock.
const RETRY_EVERY: Duration = Duration::from_millis(2);

/// Holds a directory until it is dropped.
#[derive(Debug)]
pub struct DirLock {
    file: File,
}

impl DirLock {
    /// Locks `dir`, and creates it if it is missing.
    ///
    /// # Errors
    /// Refused: another process holds it; the error has its process id. Anything else is what the
    /// file system says: a folder that cannot be written, or a file in its place.
    pub fn acquire(dir: &Path) -> Result<DirLock> {
        atomic_dir::create(dir)?;
        DirLock::try_acquire(&dir.join("owner.lock"), Duration::ZERO)?.map_err(|holder| {
            let dir = dir.display();
            Error::refused(format!(
                "{dir}: {holder} works here; stop it first, or use another folder"
            ))
        })
    }

    /// Locks the file `path`, and waits up to `patience` for a holder that is about to end. Gives
    /// the words for the holder if it does not.
    ///
    /// # Errors
    /// The file system fails.
    pub fn try_acquire(
        path: &Path,
        patience: Duration,
    ) -> Result<std::result::Result<DirLock, String>> {
        let mut file = File::open_as(path, OpenMode::Keep).map_err(Error::io(path))?;
        let until = clock::instant() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if clock::instant() < until => {
                    clock::sleep(RETRY_EVERY);
                }
                Err(TryLockError::WouldBlock) => return Ok(Err(holder(&mut file))),
                Err(TryLockError::Error(error)) => return Err(Error::io(path)(error)),
            }
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(Error::io(path))?;
        Ok(Ok(DirLock { file }))
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Closing the file is not enough: a child between fork and exec has a copy of it. If this
        // fails, closing releases the lock a moment later.
        drop(self.file.unlock());
    }
}

fn holder(file: &mut File) -> String {
    let mut pid = String::new();
    // Only the message needs the text, so a failure to read it is not an error.
    match (file.read_to_string(&mut pid), pid.trim()) {
        (Ok(_), pid) if !pid.is_empty() => format!("process {pid}"),
        _ => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_second_process_is_refused_with_the_first_ones_id() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        let lock = DirLock::acquire(&work).unwrap();
        let refused = DirLock::acquire(&work).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused);
        let why = refused.to_string();
        let holder = format!("{}: process {} works here", work.display(), std::process::id());
        assert!(why.contains(&holder), "{why}");
        drop(lock);
        DirLock::acquire(&work).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_used_is_not_held_by_anybody() {
        let dir = tempfile::tempdir().unwrap();
        let (file, blocked) = (dir.path().join("file"), dir.path().join("blocked"));
        std::fs::write(&file, "x").unwrap();
        std::fs::create_dir_all(blocked.join("owner.lock")).unwrap();
        for place in [file, blocked] {
            let error = DirLock::acquire(&place).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
            let why = error.to_string();
            let place = place.display().to_string();
            assert!(why.contains(&place) && !why.contains("works here"), "{why}");
        }
    }
}
