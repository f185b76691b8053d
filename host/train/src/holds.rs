//! Publications that a gate holds: counted, and noted in the trainer's work folder, where
//! `hypercast versions list` reads them.

use std::path::{Path, PathBuf};

use prometheus::{Gauge, IntCounter};
use serde::{Deserialize, Serialize};

use crate::error::{CommonErrors as _, Error, Result};
use crate::job_metrics::JobMetrics;
use hypercast_config::Config;
use hypercast_core::{atomic_file, clock::now_ms, disk};

/// What a version's gate holds: the content of `held.json`, which is there while it holds
/// something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldPublications {
    /// Publications held one after another.
    pub in_a_row: u64,
    /// When the first of them was held, milliseconds since the epoch.
    pub since_ms: i64,
    /// Why the last one was held.
    pub reason: String,
}

impl HeldPublications {
    /// What a trainer holds, by its work folder; `None` if it holds nothing.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(work: &Path) -> Result<Option<HeldPublications>> {
        let path = path(work);
        let Some(text) = Error::found(&path, disk::read(&path))? else { return Ok(None) };
        let held =
            serde_json::from_slice(&text).map_err(|error| Error::data(&path, error.to_string()))?;
        Ok(Some(held))
    }
}

/// A version whose trainer holds what it learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HeldVersion {
    /// The expert's name, or `fm`.
    pub kind: String,
    /// The version.
    pub version: String,
    /// What is held.
    pub held: HeldPublications,
}

impl HeldVersion {
    /// All that trainers hold in the folders of a configuration, also of versions that are not
    /// registered because nothing of them was published yet.
    ///
    /// # Errors
    /// A folder or file that cannot be read.
    pub fn all(config: &Config) -> Result<Vec<HeldVersion>> {
        let mut all = Vec::new();
        let mut follow = vec![("fm".to_owned(), config.paths.fm_work.clone())];
        follow.extend(folders(&config.paths.experts)?.into_iter().map(|dir| (name(&dir), dir)));
        for (kind, dir) in follow {
            for work in folders(&dir.join("follow"))? {
                if let Some(held) = HeldPublications::read(&work)? {
                    all.push(HeldVersion { kind: kind.clone(), version: name(&work), held });
                }
            }
        }
        Ok(all)
    }
}

/// The folders in a folder, by name; none if it is not there.
fn folders(dir: &Path) -> Result<Vec<PathBuf>> {
    let names = Error::found(dir, disk::names(dir))?.unwrap_or_default();
    let paths = names.into_iter().map(|name| dir.join(name));
    Ok(paths.filter(|path| disk::is_dir(path)).collect())
}

fn name(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn path(work: &Path) -> PathBuf {
    work.join("held.json")
}

/// Notes what a trainer's gate holds.
pub(super) struct HoldLog {
    work: PathBuf,
    total: IntCounter,
    in_a_row: Gauge,
}

impl HoldLog {
    pub(super) fn new(work: &Path, telemetry: &JobMetrics) -> HoldLog {
        let log = HoldLog {
            work: work.to_path_buf(),
            total: telemetry.counter(
                "hypercast_held_publications_total",
                "Publications that the gate held: what was trained is worse than what serves, or \
                 beyond another limit; the trainer's lines and `hypercast versions list` say why",
            ),
            in_a_row: telemetry.gauge(
                "hypercast_held_in_a_row",
                "Publications held since the last one that was published",
            ),
        };
        // Those that were held before a restart are held still.
        if let Ok(Some(held)) = HeldPublications::read(work) {
            log.in_a_row.set(held.in_a_row as f64);
        }
        log
    }

    /// Notes that a publication is held.
    ///
    /// # Errors
    /// The work folder cannot be written.
    pub(super) fn held(&self, reason: &str) -> Result<()> {
        let before = HeldPublications::read(&self.work)?;
        let held = HeldPublications {
            in_a_row: before.as_ref().map_or(0, |before| before.in_a_row) + 1,
            since_ms: before.map_or_else(now_ms, |before| before.since_ms),
            reason: reason.to_owned(),
        };
        self.total.inc();
        self.in_a_row.set(held.in_a_row as f64);
        let (path, text) = (path(&self.work), serde_json::to_vec(&held).expect("plain values"));
        atomic_file::write(&path, &text).map_err(Error::io(&path))
    }

    /// Notes that a publication was let through.
    ///
    /// # Errors
    /// The work folder cannot be written.
    pub(super) fn released(&self) -> Result<()> {
        self.in_a_row.set(0.0);
        let path = path(&self.work);
        Error::found(&path, disk::remove_file(&path)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_are_counted_until_one_is_released() {
        let dir = tempfile::tempdir().unwrap();
        let telemetry = JobMetrics::default();
        let log = HoldLog::new(dir.path(), &telemetry);
        assert_eq!(HeldPublications::read(dir.path()).unwrap(), None);
        log.held("it is worse").unwrap();
        let first = HeldPublications::read(dir.path()).unwrap().unwrap();
        log.held("it is much worse").unwrap();
        let second = HeldPublications::read(dir.path()).unwrap().unwrap();
        let expected = HeldPublications { in_a_row: 2, reason: "it is much worse".into(), ..first };
        assert_eq!(second, expected);
        assert!(telemetry.render().contains("hypercast_held_in_a_row 2"));
        let restarted = JobMetrics::default();
        HoldLog::new(dir.path(), &restarted);
        assert!(restarted.render().contains("hypercast_held_in_a_row 2"));
        log.released().unwrap();
        log.released().unwrap();
        assert_eq!(HeldPublications::read(dir.path()).unwrap(), None);
        let said = telemetry.render();
        assert!(said.contains("hypercast_held_in_a_row 0"), "{said}");
        assert!(said.contains("hypercast_held_publications_total 2"), "{said}");
    }

    #[test]
    fn what_is_held_is_found_in_the_folders_of_all_trainers() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.paths.fm_work = dir.path().join("fm-work");
        config.paths.experts = dir.path().join("experts");
        assert_eq!(HeldVersion::all(&config).unwrap(), []);
        let fm = crate::follow_fm::work_dir(&config, "2.0.0");
        let entry = toml::from_str("name = \"home\"\nplugin = \"home.wasm\"").unwrap();
        let expert = crate::follow_expert::work_dir(&config, &entry, "1.1.0");
        for work in [&fm, &expert] {
            std::fs::create_dir_all(work).unwrap();
            HoldLog::new(work, &JobMetrics::default()).held("it is worse").unwrap();
        }
        let released = crate::follow_expert::work_dir(&config, &entry, "1.0.0");
        std::fs::create_dir_all(&released).unwrap();
        let found = HeldVersion::all(&config).unwrap();
        let found: Vec<String> =
            found.iter().map(|own| format!("{} {}", own.kind, own.version)).collect();
        assert_eq!(found, ["fm 2.0.0", "home 1.1.0"]);
    }
}
