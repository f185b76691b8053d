//! Files that are replaced as a whole: after a crash at any moment, a reader finds the old content
//! or the new one. Folders are in `atomic_dir`.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::{
    atomic_dir::parent,
    disk::{self as fs, File, OpenMode},
};

/// Replaces the file `path` by `bytes`, and syncs it and its directory.
///
/// # Errors
/// The file system fails; the old file is then unchanged.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// Replaces the file `path` by what `fill` writes, and syncs it and its directory. Who may read the
/// old file may read the new one, and no others. A device, such as `/dev/stdout`, is written as it
/// is.
///
/// # Errors
/// `fill` or the file system fails; the old file is then unchanged.
pub fn write_with(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    let old = fs::metadata(path).ok();
    if old.as_ref().is_some_and(|old| !old.is_file) {
        let mut device = BufWriter::new(File::open_as(path, OpenMode::Write)?);
        return fill(&mut device).and_then(|()| device.flush());
    }
    let draft = draft_path(path);
    let mut file = BufWriter::new(File::create(&draft)?);
    if let Some(old) = old {
        file.get_ref().set_permissions(&old)?;
    }
    fill(&mut file)?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    rename(&draft, path)
}

/// Where the new content of `path` is until it is complete: `PATH.partial`.
pub fn draft_path(path: &Path) -> PathBuf {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".partial");
    draft.into()
}

/// Gives the complete, synced file or directory `draft` the name `path`, and syncs the directory
/// that holds it.
///
/// # Errors
/// The file system fails.
pub fn rename(draft: &Path, path: &Path) -> io::Result<()> {
    fs::rename(draft, path)?;
    sync_dir(parent(path))
}

/// Writes a new file that its owner alone can read, and syncs it and its directory.
///
/// # Errors
/// The file exists, or the file system fails.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::open_as(path, OpenMode::Private)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    sync_dir(parent(path))
}

/// Syncs the entries of a directory.
///
/// # Errors
/// The file system fails.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_new_file_is_as_private_as_the_old_one() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_secret(&path, b"secret").unwrap();
        assert!(write_secret(&path, b"another").is_err());
        write(&path, b"changed").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"changed");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write(&path, b"old").unwrap();
        let failed = write_with(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("stopped"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
    }
}
