//! A directory that one process uses at a time, with a state file that is replaced as a whole.
//!
//! A new state is written beside the old one, synced and renamed, and it has a checksum. So after a
//! crash there is either the old state or the new one.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use hypercast_core::{atomic_file, dir_lock::DirLock, disk};
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{StreamPlace, StreamTrail};

/// The first bytes of the file, which name its layout.
const MAGIC: &[u8; 8] = b"hcstate1";

/// The state is written often and read rarely, so compression is fast rather than strong.
const LEVEL: i32 = 1;

/// A directory with a state, locked by this process.
#[derive(Debug)]
pub struct StateDir {
    dir: PathBuf,
    _lock: DirLock,
}

impl StateDir {
    /// Creates the directory if needed and locks it.
    ///
    /// # Errors
    /// Another process uses the directory; the error names its process id.
    pub fn lock(dir: &Path) -> Result<StateDir> {
        Ok(StateDir { _lock: DirLock::acquire(dir)?, dir: dir.to_path_buf() })
    }

    /// The directory that this locks.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Replaces the state, where its owner stands in the stream that it follows, and what the owner
    /// saves besides, which came later than the layout of the state.
    ///
    /// # Errors
    /// The file cannot be written, for example because the disk is full. The old state is then
    /// still there.
    pub fn write<T: Serialize, L: Serialize>(
        &self,
        state: &T,
        trail: &StreamTrail,
        later: &L,
    ) -> Result<()> {
        let path = self.path();
        let failed = |error: postcard::Error| Error::data(&path, error.to_string());
        let plain = (state, trail.place(), trail.earlier(), later);
        let plain = postcard::to_allocvec(&plain).map_err(failed)?;
        let packed = zstd::encode_all(&plain[..], LEVEL).map_err(Error::io(&path))?;
        let checksum = crc32fast::hash(&packed).to_le_bytes();
        let written = atomic_file::write_with(&path, |file| {
            [MAGIC, &checksum[..], &packed].iter().try_for_each(|part| file.write_all(part))
        });
        written.map_err(Error::io(&path))
    }

    /// Reads the state, if there is one, where its owner stands, and what it saved besides. States
    /// of earlier versions do not say where, or say no earlier places, or have the default besides.
    ///
    /// # Errors
    /// The state is damaged, or another version wrote it.
    pub fn read<T: DeserializeOwned, L: DeserializeOwned + Default>(
        &self,
    ) -> Result<Option<(T, Option<StreamTrail>, L)>> {
        let path = self.path();
        let Some(bytes) = Error::found(&path, disk::read(&path))? else { return Ok(None) };
        let failed = |why: &str| {
            let what_to_do = "move it away to begin at the first event again";
            Error::data(&path, format!("{why}; {what_to_do}"))
        };
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| failed("this version does not read the file's format"))?;
        let (checksum, packed) =
            rest.split_first_chunk::<4>().ok_or_else(|| failed("the file is cut short"))?;
        if crc32fast::hash(packed) != u32::from_le_bytes(*checksum) {
            return Err(failed("the checksum is wrong: the file is damaged"));
        }
        let plain = zstd::decode_all(packed).map_err(|error| failed(&error.to_string()))?;
        let wrong = |error: postcard::Error| failed(&error.to_string());
        let (state, rest) = postcard::take_from_bytes(&plain).map_err(wrong)?;
        if rest.is_empty() {
            return Ok(Some((state, None, L::default())));
        }
        let (place, rest) = postcard::take_from_bytes::<StreamPlace>(rest).map_err(wrong)?;
        let (earlier, rest) = match rest {
            [] => (Vec::new(), rest),
            rest => postcard::take_from_bytes(rest).map_err(wrong)?,
        };
        let later = match rest {
            [] => L::default(),
            rest => postcard::from_bytes(rest).map_err(wrong)?,
        };
        Ok(Some((state, Some(StreamTrail::new(place, earlier)), later)))
    }

    fn path(&self) -> PathBuf {
        self.dir.join("state")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_state_is_whole_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = StateDir::lock(dir.path()).unwrap();
        assert_eq!(folder.read::<Vec<u64>, u64>().unwrap(), None);
        let state: Vec<u64> = (0..1000).collect();
        let place = |position| StreamPlace { position, checksum: Some(1 << 30) };
        let trail = StreamTrail::new(place(7), vec![place(2), place(5)]);
        // As earlier releases wrote it.
        folder.write(&state, &trail, &()).unwrap();
        assert_eq!(folder.read().unwrap(), Some((state.clone(), Some(trail.clone()), 0_u64)));
        folder.write(&state, &trail, &9_u64).unwrap();
        assert_eq!(folder.read().unwrap(), Some((state, Some(trail), 9_u64)));
        let path = folder.path();
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = folder.read::<Vec<u64>, ()>().unwrap_err().to_string();
        assert!(error.contains("checksum") && error.contains("move it away"), "{error}");
        fs::write(&path, &bytes[..10]).unwrap();
        assert!(folder.read::<Vec<u64>, ()>().unwrap_err().to_string().contains("cut short"));
    }
}
