//! The state of rollouts in files: one per rollout, replaced as a whole at every step.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use hypercast_core::{atomic_dir, atomic_file, disk};
use hypercast_data::versioned;

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::Rollout,
};

/// The version of the files' format.
const FORMAT: u32 = 1;

/// Most rollouts of an expert that are kept after their end.
const REMEMBERED: usize = 32;

/// Rollouts by name and version.
pub(super) type RolloutMap = BTreeMap<(String, String), Rollout>;

/// The files of rollouts in the state folder.
pub(super) struct RolloutFiles {
    dir: PathBuf,
}

impl RolloutFiles {
    /// Opens the folder, and creates it if it is missing.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        atomic_dir::create(dir)?;
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// Reads all rollouts. A file that cannot be read is logged and left alone.
    pub(super) fn read(&self) -> Result<RolloutMap> {
        let mut all = RolloutMap::new();
        for name in disk::names(&self.dir).map_err(Error::io(&self.dir))? {
            let path = self.dir.join(name);
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let bytes = disk::read(&path).map_err(Error::io(&path))?;
            match versioned::from_json::<Rollout>(&bytes, FORMAT) {
                Ok(rollout) => {
                    all.insert((rollout.name().to_owned(), rollout.version().to_owned()), rollout);
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a rollout's file cannot be read; its version stays as the registry has it");
                }
            }
        }
        Ok(all)
    }

    pub(super) fn write(&self, rollout: &Rollout) -> Result<()> {
        let text = format!("{:#}\n", versioned::to_json(rollout, FORMAT));
        let path = self.path(rollout);
        atomic_file::write(&path, text.as_bytes()).map_err(Error::io(&path))
    }

    /// Removes the oldest finished rollouts of an expert.
    pub(super) fn trim(&self, all: &mut RolloutMap, name: &str) {
        let mut over: Vec<(i64, (String, String))> = all
            .iter()
            .filter(|((own, _), rollout)| own == name && !rollout.is_active())
            .map(|(key, rollout)| (rollout.begun_ms, key.clone()))
            .collect();
        over.sort();
        over.truncate(over.len().saturating_sub(REMEMBERED));
        for (_, key) in over {
            if let Some(rollout) = all.remove(&key) {
                // If that fails, the file is read at the next start and removed then.
                let _ = disk::remove_file(&self.path(&rollout));
            }
        }
    }

    fn path(&self, rollout: &Rollout) -> PathBuf {
        self.dir.join(format!("{}.json", rollout.label()))
    }
}
