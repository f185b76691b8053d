//! The owner of a work folder: one process at a time. A second start is refused with the first
//! one's process id.
//!
//! It is a kernel lock on an open file, so the death of a process, however sudden, gives the folder
//! free: a lock file that is left over means nothing by itself. What is in the folder is its owner's business.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Seek, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::error::{CommonErrors as _, Error, Result};

/// How often a claim that waits looks again.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Holds a folder until it is dropped.
#[derive(Debug)]
pub struct Owner {
    file: File,
}

/// What came of a claim.
#[derive(Debug)]
pub enum Claim {
    /// It is ours.
    Taken(Owner),
    /// Somebody has it, in words.
    Of(String),
}

impl Owner {
    /// Takes `dir`, which is made if need be.
    ///
    /// # Errors
    /// Another owner (the error has its process id), or what the file system says.
    pub fn take(dir: &Path) -> Result<Owner> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        match Owner::claim(&dir.join("owner.lock"), Duration::ZERO)? {
            Claim::Taken(owner) => Ok(owner),
            Claim::Of(who) => Err(Error::data(
                dir,
                format!("{who} works here; stop it first, or take another folder"),
            )),
        }
    }

    /// Claims what the lock file `path` stands for, and waits so long for an owner that is about to go.
    ///
    /// # Errors
    /// What the file system says.
    pub fn claim(path: &Path, patience: Duration) -> Result<Claim> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(Error::io(path))?;
        let until = Instant::now() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    thread::sleep(LOOK_EVERY);
                }
                Err(TryLockError::WouldBlock) => return Ok(Claim::Of(owner_of(&mut file))),
                Err(TryLockError::Error(error)) => return Err(Error::io(path)(error)),
            }
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(Error::io(path))?;
        Ok(Claim::Taken(Owner { file }))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // By hand, since a child between fork and exec has copies of open files. If it fails, closing does it all the same.
        drop(self.file.unlock());
    }
}

fn owner_of(file: &mut File) -> String {
    let mut pid = String::new();
    // The text only serves the message; the lock itself has answered.
    match (file.read_to_string(&mut pid), pid.trim()) {
        (Ok(_), pid) if !pid.is_empty() => format!("process {pid}"),
        _ => "another process".to_owned(),
    }
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
