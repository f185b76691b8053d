//! The owner of a work folder: one process at a time. A second start is refused with the first
//! one's process id.
//!
//! It is a kernel lock on an open file, so the death of a process, however sudden, gives the folder
//! free: a lock file that is left over means nothing by itself. What is in the folder is its owner's business.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Seek, Write},
    path::Path,
};

use crate::error::{Error, Result};

/// Holds a folder until it is dropped.
#[derive(Debug)]
pub struct Owner {
    file: File,
}

impl Owner {
    /// Takes `dir`, which is made if need be.
    ///
    /// # Errors
    /// Another owner (the error has its process id), or what the file system says.
    pub fn take(dir: &Path) -> Result<Owner> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let path = dir.join("owner.lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken(dir, &mut file)),
            Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(Error::io(&path))?;
        Ok(Owner { file })
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // By hand, since a child between fork and exec has copies of open files. If it fails, closing does it all the same.
        drop(self.file.unlock());
    }
}

fn taken(dir: &Path, file: &mut File) -> Error {
    let mut pid = String::new();
    // The text only serves the message; the lock itself has answered.
    let read = file.read_to_string(&mut pid);
    let pid = match (read, pid.trim()) {
        (Ok(_), pid) if !pid.is_empty() => pid,
        _ => "unknown",
    };
    Error::data(dir, format!("process {pid} works here; stop it first, or take another folder"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_with_the_first_ones_process_id() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        let owner = Owner::take(&work).unwrap();
        let refused = Owner::take(&work).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("process {} works here", std::process::id())),
            "{refused}"
        );
        drop(owner);
        Owner::take(&work).unwrap();
    }
}
