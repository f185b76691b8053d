//! What can go wrong in a store. Misuse by the caller's code (slices of the
//! wrong length) panics instead.

use std::io;
use std::path::{Path, PathBuf};

use hypercast_core::error::ErrorKind;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A lock could not be had.
    #[error(transparent)]
    Core(#[from] hypercast_core::Error),
    /// A file is truncated or its checksum does not match.
    #[error(transparent)]
    Corrupt(Box<Damage>),
    /// A file was written by another format version.
    #[error("{} has format version {found}, this build reads version {supported}; use a matching build of hypercast, or train the store anew", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version it has.
        found: u64,
        /// The version that can be read.
        supported: u64,
    },
    /// There is no store in the directory.
    #[error("{} is no embedding store (it has no meta.json); check the path or create a store there", path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
    },
    /// A store, or a part of one, is in the way.
    #[error("{} already holds {what}; open it, or choose another directory", path.display())]
    AlreadyExists {
        /// The directory.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// The options are out of range.
    #[error("bad store option: {0}")]
    Options(String),
    /// A file was cut while it was mapped. Reads go on once it is as it was.
    #[error("{} cannot be read: {what}; put the file back as it was, from a copy of the store, and it is used again", path.display())]
    FileLost {
        /// The file.
        path: PathBuf,
        /// What is wrong with it now.
        what: String,
    },
    /// Another writer has the store open.
    #[error("{} is open for writing in {holder}; stop that process or open a reader", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The process that holds the lock.
        holder: String,
    },
    /// A writer's open of an inference snapshot.
    #[error("{} is an inference snapshot without optimizer state and opens for reading only; train on the store it was taken from", path.display())]
    ReadOnly {
        /// The directory.
        path: PathBuf,
    },
    /// Row numbers are used up.
    #[error("{} is full at {rows} rows; split its ids over several stores", path.display())]
    Full {
        /// The directory.
        path: PathBuf,
        /// How many rows it has.
        rows: usize,
    },
    /// A gradient is NaN, infinite, or too large to square.
    #[error(
        "the gradient of id {id} is not finite (or its square is not); no row was changed; lower the learning rate or clip gradients"
    )]
    NotFinite {
        /// The row's id.
        id: u64,
    },
    /// A value to be kept is NaN or infinite.
    #[error(
        "a value of id {id} is not finite; no row was changed; find out where it comes from and leave the id out"
    )]
    NotFiniteValue {
        /// The row's id.
        id: u64,
    },
    /// Rows of a training store are to be set from outside.
    #[error("{} is a training store, whose rows change by training only; take a snapshot of it and serve that", path.display())]
    NotServing {
        /// The directory.
        path: PathBuf,
    },
    /// Readers keep the journal from being folded into the slabs.
    #[error("{} has grown to {bytes} bytes because readers of the store stay open; close or reopen them, or serve a snapshot, and commit again", path.display())]
    JournalHeld {
        /// The journal.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// An earlier commit of this writer failed.
    #[error("an earlier commit to {} failed; reopen the store, it opens to the last committed generation", path.display())]
    Poisoned {
        /// The directory.
        path: PathBuf,
    },
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Core(error) => error.kind(),
            Error::FileLost { .. } => ErrorKind::Unavailable,
            Error::Locked { .. } => ErrorKind::Refused,
            _ => ErrorKind::Internal,
        }
    }
}

/// One thing that is wrong with a store's files; see [`check`](crate::check).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub what: String,
    /// The number of the row that it concerns.
    pub row: Option<u64>,
    /// The row's id, as far as it can be read.
    pub id: Option<u64>,
    /// The checksum that is written and the one that the bytes have.
    pub checksums: Option<(u32, u32)>,
    /// What to do.
    pub remedy: &'static str,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is damaged: {}", self.path.display(), self.what)?;
        if let Some(row) = self.row {
            write!(f, ", row {row}")?;
        }
        if let Some(id) = self.id {
            write!(f, ", id {id}")?;
        }
        if let Some((expected, found)) = self.checksums {
            write!(f, ", checksum {expected:08x} expected and {found:08x} found")?;
        }
        write!(f, "; {}", self.remedy)
    }
}

impl From<Damage> for Error {
    fn from(damage: Damage) -> Error {
        Error::Corrupt(Box::new(damage))
    }
}

impl Damage {
    /// Damage that concerns a file and not one of its rows.
    pub(crate) fn of_file(path: &Path, what: impl Into<String>, remedy: &'static str) -> Damage {
        let (path, what) = (path.to_owned(), what.into());
        Damage { path, what, row: None, id: None, checksums: None, remedy }
    }
}

/// The remedy where data cannot be had back from the store itself.
pub(crate) const RESTORE: &str = "restore the store's directory from a copy, or train it anew";
/// The remedy for the index, which can be derived from the rows.
pub(crate) const REBUILD: &str = "delete it and open the store once for writing, which rebuilds it from the rows (a damaged snapshot must be made anew)";

/// Wraps an I/O error with what was tried on which path.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// Damage that only a copy of the store can undo.
pub(crate) fn corrupt(path: &Path, what: impl Into<String>) -> Error {
    Damage::of_file(path, what, RESTORE).into()
}
