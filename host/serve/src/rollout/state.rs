//! Where rollouts stand, in files: one a rollout, replaced as a whole at every step.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use hypercast_core::atomic_file;

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::Rollout,
};

/// Rollouts of a name that are remembered once they are over.
const REMEMBERED: usize = 32;

/// Rollouts by name and version.
pub(super) type RolloutMap = BTreeMap<(String, String), Rollout>;

/// The folder.
pub(super) struct RolloutFiles {
    dir: PathBuf,
}

impl RolloutFiles {
    /// Makes it if need be.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// What it holds. A file that cannot be read is told of and left alone.
    pub(super) fn read(&self) -> Result<RolloutMap> {
        let mut all = RolloutMap::new();
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir))? {
            let path = entry.map_err(Error::io(&self.dir))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let bytes = fs::read(&path).map_err(Error::io(&path))?;
            match serde_json::from_slice::<Rollout>(&bytes) {
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

    /// Writes one.
    pub(super) fn write(&self, rollout: &Rollout) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(rollout).expect("a plain struct serialises");
        let path = self.path(rollout);
        atomic_file::write(&path, &bytes).map_err(Error::io(&path))
    }

    /// Lets go of the oldest ones of a name that are over.
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
                // One that stays is read again at the next start, and goes then.
                let _ = fs::remove_file(self.path(&rollout));
            }
        }
    }

    fn path(&self, rollout: &Rollout) -> PathBuf {
        self.dir.join(format!("{}.json", rollout.label()))
    }
}
