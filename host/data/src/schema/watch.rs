//! Notices that a schema has grown while a process uses it.
//!
//! A record has the layout of a grown schema only if its writer has read that, so the file changed
//! before. Whoever looks at the file after it has read records, and before it uses them, therefore
//! never takes a record of a layout that it does not know.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use hypercast_core::disk;

use super::Schema;
use super::growth::SchemaGrowth;

/// The file of a schema that a process uses.
#[derive(Debug)]
pub struct SchemaWatch {
    path: PathBuf,
    own: Arc<Schema>,
    /// Whether it is that of logs, which may be of before; then only what makes another layout is
    /// looked for.
    is_of_logs: bool,
    /// Whether it is the FM's trainer's, which alone reads alignment modules.
    is_of_fm_trainer: bool,
    /// The content of the file that was looked at last, and has not grown.
    seen: Mutex<Vec<u8>>,
}

impl SchemaWatch {
    /// Watches a `schema.toml`, of which the process uses `own`, without its alignment modules.
    pub fn new(path: PathBuf, own: Arc<Schema>) -> SchemaWatch {
        let (is_of_logs, is_of_fm_trainer) = (false, false);
        SchemaWatch { path, own, is_of_logs, is_of_fm_trainer, seen: Mutex::default() }
    }

    /// Watches the `schema.toml` of an FM's trainer. A change of alignment modules alone counts.
    pub fn of_fm_trainer(path: PathBuf, own: Arc<Schema>) -> SchemaWatch {
        SchemaWatch { is_of_fm_trainer: true, ..SchemaWatch::new(path, own) }
    }

    /// Watches the `schema.toml` of logs that a process reads. Their writer may not have taken over
    /// yet what the process has, ranges for example, which are not waited for.
    pub fn of_logs(path: PathBuf, own: Arc<Schema>) -> SchemaWatch {
        SchemaWatch { is_of_logs: true, ..SchemaWatch::new(path, own) }
    }

    /// Whether the file has a schema that has grown from the one in use. A file that cannot be
    /// read, or has another schema than `hypercast schema apply` makes, is logged and left alone.
    pub fn has_grown(&self) -> bool {
        // A file that is being made, or on a disk that is away for a moment, is looked at again.
        let Ok(text) = disk::read(&self.path) else { return false };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if *seen == text {
            return false;
        }
        let has_grown = match Schema::load(&self.path) {
            Ok(found) => self.is_grown(&found),
            Err(error) => {
                tracing::error!(%error, "a schema was changed to one that cannot be used; going on with the one of before");
                false
            }
        };
        if !has_grown {
            *seen = text;
        }
        has_grown
    }

    fn is_grown(&self, found: &Schema) -> bool {
        let own = self.own.layout();
        let is_of_own = found.layouts().any(|layout| layout == own);
        match SchemaGrowth::between(&self.own, found) {
            Ok(growth) if growth.is_empty() => false,
            Ok(growth) if growth.is_for_fm_trainer() => self.is_of_fm_trainer,
            Ok(growth) if is_of_own => !(self.is_of_logs && growth.is_layout_same()),
            // Logs whose writer has not taken over yet what this process has.
            _ if self.own.layouts().any(|layout| layout == found.layout()) => false,
            _ => {
                tracing::error!(
                    "{}: it was changed, but not by `hypercast schema apply`; this process goes on \
                     with the schema that it has. Put schema.previous.toml or a copy of the file \
                     back, and let the schema grow with that command",
                    self.path.display()
                );
                false
            }
        }
    }
}
