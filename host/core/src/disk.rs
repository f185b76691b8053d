//! Files by the names of `std::fs`, on the disk of this machine or on that of a simulated host.
//! What must survive a crash is written through it, so that a simulator can end the process before
//! any operation, fail it, or lose what was not synced.

use std::{
    ffi::OsString,
    fs::{self, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use crate::simulated::{self, SimulatedFile};

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// To read a file that exists.
    Read,
    /// To write a file that exists, such as a device.
    Write,
    /// To read and write; the file is created if needed, and keeps its content.
    Keep,
    /// To write; the file is created if needed, and loses its content.
    Truncate,
    /// To write a file that does not exist yet, which its owner alone can read.
    Private,
}

/// What is known of a file or folder without opening it.
#[derive(Debug, Clone)]
pub struct Metadata {
    /// Whether it is a file with content of its own, not a folder or a device.
    pub is_file: bool,
    /// Whether it is a folder.
    pub is_dir: bool,
    /// The length of a file in bytes.
    pub length: u64,
    /// When the content changed last, since 1970. A simulated disk counts the changes instead.
    pub modified: Duration,
    /// Who may read it; simulated files have no such bits.
    pub permissions: Option<fs::Permissions>,
}

/// An open file, which is closed when it is dropped.
#[derive(Debug)]
pub struct File(AnyFile);

#[derive(Debug)]
enum AnyFile {
    System(fs::File),
    Simulated(SimulatedCursor),
}

/// A simulated file, and where it is read and written next.
#[derive(Debug)]
struct SimulatedCursor {
    file: SimulatedFile,
    at: u64,
}

impl Drop for SimulatedCursor {
    fn drop(&mut self) {
        if let Some(host) = simulated::host() {
            host.close(self.file);
        }
    }
}

impl SimulatedCursor {
    fn host(&self) -> io::Result<std::rc::Rc<dyn simulated::SimulatedHost>> {
        simulated::host().ok_or_else(|| {
            io::Error::other(format!("simulated file {} is used outside of its host", self.file))
        })
    }
}

impl File {
    /// Opens a file to read.
    ///
    /// # Errors
    /// As `std::fs::File::open`.
    pub fn open(path: &Path) -> io::Result<File> {
        File::open_as(path, OpenMode::Read)
    }

    /// Opens a file to write, without the content that it may have.
    ///
    /// # Errors
    /// As `std::fs::File::create`.
    pub fn create(path: &Path) -> io::Result<File> {
        File::open_as(path, OpenMode::Truncate)
    }

    /// Opens a file for what the mode says.
    ///
    /// # Errors
    /// As `std::fs::OpenOptions::open`.
    pub fn open_as(path: &Path, mode: OpenMode) -> io::Result<File> {
        if let Some(host) = simulated::host() {
            let file = host.open(path, mode)?;
            return Ok(File(AnyFile::Simulated(SimulatedCursor { file, at: 0 })));
        }
        let mut options = fs::OpenOptions::new();
        match mode {
            OpenMode::Read => options.read(true),
            OpenMode::Write => options.write(true),
            OpenMode::Keep => options.read(true).write(true).create(true).truncate(false),
            OpenMode::Truncate => options.write(true).create(true).truncate(true),
            OpenMode::Private => options.write(true).create_new(true).mode(0o600),
        };
        Ok(File(AnyFile::System(options.open(path)?)))
    }

    /// Reads from an offset on; 0 bytes mean that the file ends there.
    ///
    /// # Errors
    /// The file system fails.
    pub fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        match &self.0 {
            AnyFile::System(file) => file.read_at(buffer, at),
            AnyFile::Simulated(cursor) => cursor.host()?.read_at(cursor.file, buffer, at),
        }
    }

    /// Writes all bytes from an offset on.
    ///
    /// # Errors
    /// The file system fails; a part may be written.
    pub fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match &self.0 {
            AnyFile::System(file) => file.write_all_at(bytes, at),
            AnyFile::Simulated(cursor) => {
                let mut done = 0;
                while done < bytes.len() {
                    let host = cursor.host()?;
                    done += host.write_at(cursor.file, &bytes[done..], at + done as u64)?;
                }
                Ok(())
            }
        }
    }

    /// Cuts or extends the file.
    ///
    /// # Errors
    /// The file system fails.
    pub fn set_len(&self, length: u64) -> io::Result<()> {
        match &self.0 {
            AnyFile::System(file) => file.set_len(length),
            AnyFile::Simulated(cursor) => cursor.host()?.set_len(cursor.file, length),
        }
    }

    /// The length in bytes.
    ///
    /// # Errors
    /// The file system fails.
    pub fn length(&self) -> io::Result<u64> {
        match &self.0 {
            AnyFile::System(file) => Ok(file.metadata()?.len()),
            AnyFile::Simulated(cursor) => cursor.host()?.length(cursor.file),
        }
    }

    /// Makes content and metadata durable; the name is made so by [`sync_dir`].
    ///
    /// # Errors
    /// The file system fails.
    pub fn sync_all(&self) -> io::Result<()> {
        match &self.0 {
            AnyFile::System(file) => file.sync_all(),
            AnyFile::Simulated(cursor) => cursor.host()?.sync(cursor.file),
        }
    }

    /// Makes the content durable, and of the metadata what is needed to read it.
    ///
    /// # Errors
    /// The file system fails.
    pub fn sync_data(&self) -> io::Result<()> {
        match &self.0 {
            AnyFile::System(file) => file.sync_data(),
            AnyFile::Simulated(cursor) => cursor.host()?.sync(cursor.file),
        }
    }

    /// Locks the file for this opening of it.
    ///
    /// # Errors
    /// Another opening holds it, or the file system fails.
    pub fn try_lock(&self) -> Result<(), TryLockError> {
        match &self.0 {
            AnyFile::System(file) => file.try_lock(),
            AnyFile::Simulated(cursor) => {
                cursor.host().map_err(TryLockError::Error)?.try_lock(cursor.file)
            }
        }
    }

    /// Releases the lock that this file has.
    ///
    /// # Errors
    /// The file system fails.
    pub fn unlock(&self) -> io::Result<()> {
        match &self.0 {
            AnyFile::System(file) => file.unlock(),
            AnyFile::Simulated(cursor) => cursor.host()?.unlock(cursor.file),
        }
    }

    /// Lets those read and write the file who may read and write another.
    ///
    /// # Errors
    /// The file system fails.
    pub fn set_permissions(&self, like: &Metadata) -> io::Result<()> {
        match (&self.0, &like.permissions) {
            (AnyFile::System(file), Some(permissions)) => file.set_permissions(permissions.clone()),
            _ => Ok(()),
        }
    }
}

impl Read for File {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            AnyFile::System(file) => file.read(buffer),
            AnyFile::Simulated(cursor) => {
                let read = cursor.host()?.read_at(cursor.file, buffer, cursor.at)?;
                cursor.at += read as u64;
                Ok(read)
            }
        }
    }
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            AnyFile::System(file) => file.write(bytes),
            AnyFile::Simulated(cursor) => {
                let written = cursor.host()?.write_at(cursor.file, bytes, cursor.at)?;
                cursor.at += written as u64;
                Ok(written)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The content of a file.
///
/// # Errors
/// As `std::fs::read`.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    if simulated::host().is_none() {
        return fs::read(path);
    }
    let mut content = Vec::new();
    File::open(path)?.read_to_end(&mut content)?;
    Ok(content)
}

/// The content of a file that is text.
///
/// # Errors
/// As `std::fs::read_to_string`.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

/// What a path names.
///
/// # Errors
/// As `std::fs::metadata`.
pub fn metadata(path: &Path) -> io::Result<Metadata> {
    if let Some(host) = simulated::host() {
        return host.metadata(path);
    }
    let of = fs::metadata(path)?;
    let (is_file, is_dir, length) = (of.is_file(), of.is_dir(), of.len());
    let modified = of.modified().unwrap_or(UNIX_EPOCH).duration_since(UNIX_EPOCH);
    let (modified, permissions) = (modified.unwrap_or_default(), Some(of.permissions()));
    Ok(Metadata { is_file, is_dir, length, modified, permissions })
}

/// The absolute path of what a path names, without symbolic links. A simulated disk has none.
///
/// # Errors
/// As `std::fs::canonicalize`.
pub fn canonicalize(path: &Path) -> io::Result<PathBuf> {
    match simulated::host() {
        None => fs::canonicalize(path),
        Some(host) => host.metadata(path).map(|_| path.to_path_buf()),
    }
}

/// Whether a path names something.
pub fn exists(path: &Path) -> bool {
    metadata(path).is_ok()
}

/// Whether a path names a file.
pub fn is_file(path: &Path) -> bool {
    metadata(path).is_ok_and(|of| of.is_file)
}

/// Whether a path names a folder.
pub fn is_dir(path: &Path) -> bool {
    metadata(path).is_ok_and(|of| of.is_dir)
}

/// The names in a folder, sorted.
///
/// # Errors
/// As `std::fs::read_dir`.
pub fn names(folder: &Path) -> io::Result<Vec<OsString>> {
    if let Some(host) = simulated::host() {
        return host.names(folder);
    }
    let entries = fs::read_dir(folder)?;
    let mut names: Vec<OsString> =
        entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    names.sort_unstable();
    Ok(names)
}

/// Makes the names in a folder durable.
///
/// # Errors
/// The file system fails.
pub fn sync_dir(folder: &Path) -> io::Result<()> {
    match simulated::host() {
        None => fs::File::open(folder)?.sync_all(),
        Some(host) => host.sync_dir(folder),
    }
}

/// Makes a folder and those above it that are missing.
///
/// # Errors
/// As `std::fs::create_dir_all`.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    let Some(host) = simulated::host() else { return fs::create_dir_all(path) };
    let missing: Vec<&Path> = path.ancestors().take_while(|above| !is_dir(above)).collect();
    missing.into_iter().rev().try_for_each(|above| host.create_dir(above))
}

/// Removes a file from its folder.
///
/// # Errors
/// As `std::fs::remove_file`.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match simulated::host() {
        None => fs::remove_file(path),
        Some(host) => host.remove_file(path),
    }
}

/// Removes a folder with all in it.
///
/// # Errors
/// As `std::fs::remove_dir_all`.
pub fn remove_dir_all(path: &Path) -> io::Result<()> {
    match simulated::host() {
        None => fs::remove_dir_all(path),
        Some(host) => host.remove_dir_all(path),
    }
}

/// Gives a file or folder another name, in place of what had it.
///
/// # Errors
/// As `std::fs::rename`.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match simulated::host() {
        None => fs::rename(from, to),
        Some(host) => host.rename(from, to),
    }
}
