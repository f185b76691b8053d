//! The lock of a stream's one writer: the file `owner`, which says who it is.
//! The system lets go of it when the process ends, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::engine::Topic;
use crate::error::{Error, Result};

/// How long a claim waits for a writer that is about to go, as those are that take turns.
const TURN: Duration = Duration::from_secs(2);

/// The right to write to a stream.
#[derive(Debug)]
pub(super) struct Owner {
    _locked: File,
}

impl Owner {
    /// Claims a stream's folder, which exists, or says who has it.
    pub(super) fn claim(topic: &Topic, folder: &Path) -> Result<Owner> {
        let path = folder.join("owner");
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(Error::io(&path))?;
        let until = Instant::now() + TURN;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    thread::sleep(Duration::from_millis(2));
                }
                Err(TryLockError::WouldBlock) => return Err(taken(topic, &path)),
                Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
            }
        }
        let write = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        write.map_err(Error::io(&path))?;
        Ok(Owner { _locked: file })
    }
}

fn taken(topic: &Topic, path: &Path) -> Error {
    let owner = std::fs::read_to_string(path).unwrap_or_default();
    let who = match owner.trim() {
        "" => "another process".to_owned(),
        id => format!("process {id}"),
    };
    Error::data(
        path,
        format!(
            "{who} writes to the stream {topic}, and a stream has one writer: stop it, or give this process another engine.dir"
        ),
    )
}
