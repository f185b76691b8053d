//! A folder that one process holds, and a state in it that is replaced as a whole.
//!
//! A state is written beside the old one, put on the disk and renamed; what is
//! read back is checked, so a crash leaves the old state or the new one.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::dir_lock::DirLock;

/// The layout of the file: its first bytes.
const MAGIC: &[u8; 8] = b"hcstate1";

/// zstd's fastest usual level: a state is written often and read seldom.
const LEVEL: i32 = 1;

/// A folder that is held.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    _owner: DirLock,
}

impl Folder {
    /// Makes the folder if need be and takes it.
    ///
    /// # Errors
    /// A folder that another process holds: the error has its process id.
    pub fn hold(dir: &Path) -> Result<Folder> {
        Ok(Folder { _owner: DirLock::acquire(dir)?, dir: dir.to_path_buf() })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Replaces the state.
    ///
    /// # Errors
    /// What the file system says, a full disk for one; the old state is then still there.
    pub fn write(&self, state: &impl Serialize) -> Result<()> {
        let (path, young) = (self.path(), self.dir.join("state.new"));
        let wrong = |error: postcard::Error| Error::data(&path, error.to_string());
        let plain = postcard::to_allocvec(state).map_err(wrong)?;
        let packed = zstd::encode_all(&plain[..], LEVEL).map_err(Error::io(&young))?;
        let mut file = File::create(&young).map_err(Error::io(&young))?;
        let checksum = crc32fast::hash(&packed).to_le_bytes();
        let parts: [&[u8]; 3] = [MAGIC, &checksum, &packed];
        let written = parts.iter().try_for_each(|part| file.write_all(part));
        written.and_then(|()| file.sync_all()).map_err(Error::io(&young))?;
        fs::rename(&young, &path).map_err(Error::io(&path))?;
        let dir = File::open(&self.dir).map_err(Error::io(&self.dir))?;
        dir.sync_all().map_err(Error::io(&self.dir))
    }

    /// The state, if there is one.
    ///
    /// # Errors
    /// One that is damaged, or that another version wrote.
    pub fn read<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let path = self.path();
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(Error::io(&path))?,
        };
        let wrong = |why: &str| {
            let what_to_do = "move it away to begin at the first event again";
            Error::data(&path, format!("{why}; {what_to_do}"))
        };
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| wrong("it is no state that this version reads"))?;
        let (checksum, packed) =
            rest.split_first_chunk::<4>().ok_or_else(|| wrong("the file is cut short"))?;
        if crc32fast::hash(packed) != u32::from_le_bytes(*checksum) {
            return Err(wrong("its checksum does not fit: the file is damaged"));
        }
        let plain = zstd::decode_all(packed).map_err(|error| wrong(&error.to_string()))?;
        postcard::from_bytes(&plain).map(Some).map_err(|error| wrong(&error.to_string()))
    }

    fn path(&self) -> PathBuf {
        self.dir.join("state")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_whole_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::hold(dir.path()).unwrap();
        assert_eq!(folder.read::<Vec<u64>>().unwrap(), None);
        let state: Vec<u64> = (0..1000).collect();
        folder.write(&state).unwrap();
        assert_eq!(folder.read::<Vec<u64>>().unwrap(), Some(state));
        let path = folder.path();
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = folder.read::<Vec<u64>>().unwrap_err().to_string();
        assert!(error.contains("checksum") && error.contains("move it away"), "{error}");
        fs::write(&path, &bytes[..10]).unwrap();
        assert!(folder.read::<Vec<u64>>().unwrap_err().to_string().contains("cut short"));
    }
}
