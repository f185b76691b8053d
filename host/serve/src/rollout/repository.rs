//! The repository of pushed files, named by their content, and the pushes of each expert. An old
//! push that is sent again, or other content under the same version, is refused.
//!
//! Files are written atomically and durably. That a push was accepted and that its rollout is to
//! begin is one record. One process at a time accepts pushes for a folder; others may read its
//! files. The repository knows neither keys nor what the registry decides.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use hypercast_config::sha256;
use hypercast_core::{
    atomic_dir, atomic_file, dir_lock::DirLock, disk, error::ErrorKind, logging::RepeatedFailures,
};
use hypercast_data::versioned;
use hypercast_stream::registry::Change;
use serde::{Deserialize, Serialize};

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::{Rollout, signature::PushManifest},
    threads::lock,
};

/// The version of the format of the lists of pushes.
const FORMAT: u32 = 1;

/// How far in the future a push may be signed, in milliseconds. Later pushes must be newer, so a
/// wrong clock would block them.
const AHEAD_MS: i64 = 300_000;

/// Limit of a name, in bytes.
const LONGEST_NAME: usize = 64;

/// The folder of pushed files.
#[derive(Debug)]
pub struct Repository {
    dir: PathBuf,
    /// Held from the first push, or from the start if no other process holds it.
    owned: Mutex<Option<DirLock>>,
    unreadable: Mutex<RepeatedFailures>,
}

/// A version that was pushed before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PushedVersion {
    /// When it was signed, milliseconds since the epoch.
    pub created_ms: i64,
    /// SHA-256 of its component.
    pub component: String,
    /// SHA-256 of the parameters that came with it.
    pub parameters: Option<String>,
}

/// A rollout that is to begin, with what it changes in the registry first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PendingRollout {
    /// The rollout at its first step.
    pub rollout: Rollout,
    /// Changes that register and promote what the configuration serves; empty if something is
    /// promoted already.
    pub adoption: Vec<Change>,
    /// When the push can no longer begin a rollout, milliseconds since the epoch; never if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<i64>,
}

/// The versions of one expert that were pushed.
#[derive(Debug, Default, Serialize, Deserialize)]
struct PushHistory {
    newest_ms: i64,
    versions: BTreeMap<String, PushedVersion>,
    /// The rollout of the newest push, until it has a file of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pending: Option<PendingRollout>,
}

impl Repository {
    /// Opens the folder, and creates it if it is missing.
    ///
    /// # Errors
    /// The folder cannot be created.
    pub fn open(dir: &Path) -> Result<Self> {
        for part in ["objects", "names"] {
            atomic_dir::create(&dir.join(part))?;
        }
        let dir = disk::canonicalize(dir).map_err(Error::io(dir))?;
        Ok(Self { dir, owned: Mutex::default(), unreadable: Mutex::default() })
    }

    /// Makes this process the one that accepts pushes for the folder, until it ends.
    ///
    /// # Errors
    /// Refused: another process is, and the message names it. Internal: the folder cannot be used.
    pub fn own(&self) -> Result<()> {
        let mut owned = lock(&self.owned);
        if owned.is_none() {
            let held = DirLock::acquire(&self.dir).map_err(|error| {
                let held = error.kind() == ErrorKind::Refused;
                let error = Error::from(error);
                if !held {
                    return error;
                }
                error.within(
                    "another daemon accepts pushes for this folder of experts; send them, and rollbacks of what it recorded, there",
                )
            })?;
            *owned = Some(held);
        }
        Ok(())
    }

    /// Whether the same push was sent before; if not, it is allowed after those before it.
    ///
    /// # Errors
    /// Refused: an invalid name, an older push, or other content. Internal: a file cannot be read.
    pub fn has_seen(&self, manifest: &PushManifest, now_ms: i64) -> Result<bool> {
        check_name(&manifest.name)?;
        let known = self.known(&manifest.name)?;
        let PushManifest { name, version, created_ms, .. } = manifest;
        let refuse = |why: String| Err(Error::refused(why));
        if let Some(pushed) = known.versions.get(version) {
            if (&pushed.component, &pushed.parameters)
                != (&manifest.component, &manifest.parameters)
            {
                return refuse(format!(
                    "{name} {version} was pushed before with other content; use a new version"
                ));
            }
            if pushed.created_ms == *created_ms {
                return Ok(true);
            }
        }
        if *created_ms <= known.newest_ms {
            return refuse(format!(
                "this push of {name} was signed at {created_ms}, but a push signed at {} is known, and older pushes are refused; sign it anew",
                known.newest_ms
            ));
        }
        if *created_ms > now_ms + AHEAD_MS {
            return refuse(format!(
                "this push of {name} was signed at {created_ms}, which is ahead of this machine's clock ({now_ms}); set the signer's clock, and sign it anew"
            ));
        }
        Ok(false)
    }

    /// Records a push together with its rollout, which is to begin: also after a restart, until
    /// [`Repository::begun`].
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn remember(&self, manifest: &PushManifest, pending: PendingRollout) -> Result<()> {
        let mut known = self.known(&manifest.name)?;
        known.newest_ms = known.newest_ms.max(manifest.created_ms);
        let pushed = PushedVersion {
            created_ms: manifest.created_ms,
            component: manifest.component.clone(),
            parameters: manifest.parameters.clone(),
        };
        known.versions.insert(manifest.version.clone(), pushed);
        known.pending = Some(pending);
        self.write(&manifest.name, &known)
    }

    /// The rollouts that were recorded and have not begun.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn pending(&self) -> Result<Vec<PendingRollout>> {
        let names = self.dir.join("names");
        let mut pending = Vec::new();
        for name in disk::names(&names).map_err(Error::io(&names))? {
            let path = names.join(name);
            let name = path.file_stem().and_then(|name| name.to_str());
            if let Some(name) = name.filter(|_| path.extension().is_some_and(|of| of == "json")) {
                match self.known(name) {
                    Ok(known) => pending.extend(known.pending),
                    // It must not hold up the rollouts of others.
                    Err(error) if lock(&self.unreadable).is_news(&error) => {
                        tracing::error!(%error, "the pushes of {name} cannot be read");
                    }
                    Err(_) => {}
                }
            }
        }
        Ok(pending)
    }

    /// Notes that the rollout of an expert's newest push has a file of its own, or was given up.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begun(&self, rollout: &Rollout) -> Result<()> {
        let mut known = self.known(rollout.name())?;
        let is_same = |pending: &PendingRollout| {
            (pending.rollout.version(), pending.rollout.created_ms)
                == (rollout.version(), rollout.created_ms)
        };
        match known.pending.take_if(|pending| is_same(pending)) {
            Some(_) => self.write(rollout.name(), &known),
            None => Ok(()),
        }
    }

    fn write(&self, name: &str, known: &PushHistory) -> Result<()> {
        let text = versioned::to_json(known, FORMAT).to_string();
        let path = self.name_path(name);
        atomic_file::write(&path, text.as_bytes()).map_err(Error::io(&path))
    }

    /// Stores bytes under their hash, unless they are there already.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn keep(&self, bytes: &[u8], extension: &str) -> Result<PathBuf> {
        let path = self.dir.join("objects").join(format!("{}.{extension}", sha256(bytes)));
        // A damaged file is written again.
        if disk::read(&path).is_ok_and(|there| there == bytes) {
            return Ok(path);
        }
        atomic_file::write(&path, bytes).map_err(Error::io(&path))?;
        Ok(path)
    }

    /// Makes room for `bytes` under the limit `most`: removes files that are not in `used`, oldest
    /// first.
    ///
    /// # Errors
    /// Refused: the files in use leave no room.
    pub fn make_room(&self, bytes: u64, most: u64, used: &HashSet<PathBuf>) -> Result<()> {
        let objects = self.dir.join("objects");
        let mut files: Vec<(Duration, u64, PathBuf)> = Vec::new();
        for name in disk::names(&objects).map_err(Error::io(&objects))? {
            let path = objects.join(name);
            let about = disk::metadata(&path).map_err(Error::io(&path))?;
            files.push((about.modified, about.length, path));
        }
        files.sort();
        let mut held: u64 = files.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in files.iter().filter(|(_, _, path)| !used.contains(path)) {
            if held + bytes <= most {
                break;
            }
            disk::remove_file(path).map_err(Error::io(path))?;
            held -= size;
        }
        if held + bytes > most {
            return Err(Error::refused(format!(
                "versions in use take {held} bytes, and {bytes} more exceed the repository's {most} (rollout.repository_mib); retire versions"
            )));
        }
        Ok(())
    }

    /// Removes the file of a push that was refused.
    pub fn forget(&self, path: &Path) {
        // If that fails, the file is removed when room is needed.
        let _ = disk::remove_file(path);
    }

    fn known(&self, name: &str) -> Result<PushHistory> {
        let path = self.name_path(name);
        match disk::read(&path) {
            Ok(bytes) => versioned::from_json(&bytes, FORMAT).map_err(|error| {
                Error::data(&path, format!("the list of pushes is damaged ({error}); restore it; moving it away also removes the protection against old pushes"))
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(PushHistory::default()),
            Err(error) => Err(Error::io(&path)(error)),
        }
    }

    fn name_path(&self, name: &str) -> PathBuf {
        self.dir.join("names").join(format!("{name}.json"))
    }
}

/// Checks that a name can be a part of a path.
///
/// # Errors
/// Refused: it cannot.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let valid = !name.is_empty()
        && name.len() <= LONGEST_NAME
        && !name.starts_with('.')
        && name.chars().all(plain);
    if valid {
        return Ok(());
    }
    Err(Error::refused(format!(
        "{:?} is not a valid expert name: use letters, digits, - _ . (at most {LONGEST_NAME}, not starting with a dot)",
        &name[..name.floor_char_boundary(LONGEST_NAME)]
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fixtures, rollout::PolicyOverrides};

    fn manifest(version: &str, content: &[u8], created_ms: i64) -> PushManifest {
        PushManifest {
            name: "feed".into(),
            version: version.into(),
            contract: "1.0.0".into(),
            surfaces: Vec::new(),
            fm: None,
            component: sha256(content),
            parameters: None,
            created_ms,
            audience: None,
            expires_ms: None,
            policy: PolicyOverrides::default(),
        }
    }

    fn pending(manifest: &PushManifest) -> PendingRollout {
        let expert = fixtures::expert_version(&manifest.name, &manifest.version);
        let created_ms = manifest.created_ms;
        let rollout = Rollout { created_ms, ..fixtures::rollout(expert) };
        PendingRollout { rollout, adoption: Vec::new(), expires_ms: manifest.expires_ms }
    }

    #[test]
    fn an_accepted_push_and_its_rollout_are_one_record_until_the_rollout_has_begun() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (manifest("1.0.0", b"a", 1000), manifest("1.1.0", b"b", 2000));
        let repository = Repository::open(dir.path()).unwrap();
        repository.remember(&first, pending(&first)).unwrap();
        // Another process finds both or neither.
        let repository = Repository::open(dir.path()).unwrap();
        assert!(repository.has_seen(&first, 1000).unwrap());
        assert_eq!(repository.pending().unwrap(), [pending(&first)]);
        repository.begun(&pending(&second).rollout).unwrap();
        assert_eq!(repository.pending().unwrap().len(), 1, "another one has begun");
        repository.begun(&pending(&first).rollout).unwrap();
        assert_eq!(repository.pending().unwrap(), []);
        assert!(repository.has_seen(&first, 1000).unwrap());
    }

    #[test]
    fn an_old_push_or_other_content_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open(dir.path()).unwrap();
        let first = manifest("1.0.0", b"a", 1000);
        assert!(!repository.has_seen(&first, 1000).unwrap());
        repository.remember(&first, pending(&first)).unwrap();
        assert!(repository.has_seen(&first, 1000).unwrap());
        let second = manifest("1.1.0", b"b", 2000);
        repository.remember(&second, pending(&second)).unwrap();
        let again = manifest("1.0.0", b"a", 3000);
        assert!(!repository.has_seen(&again, 3000).unwrap(), "the signature is new");
        for (manifest, word) in [
            (manifest("1.0.0", b"other", 3000), "other content"),
            (manifest("1.0.1", b"c", 1500), "signed anew"),
            (manifest("1.0.1", b"c", 2000), "a push signed at 2000 is known"),
            (manifest("1.0.1", b"c", 3000 + AHEAD_MS + 1), "clock"),
            (
                PushManifest { name: "../x".into(), ..manifest("1.0.1", b"c", 3000) },
                "not a valid expert name",
            ),
        ] {
            let why = repository.has_seen(&manifest, 3000).unwrap_err().to_string();
            assert!(why.contains(word) || why.contains("sign it anew"), "{word}: {why}");
        }
        // Another expert has pushes of its own.
        let other = PushManifest { name: "search".into(), ..manifest("1.0.0", b"a", 1) };
        assert!(!repository.has_seen(&other, 3000).unwrap());
    }

    #[test]
    fn room_is_made_by_what_nothing_uses() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open(dir.path()).unwrap();
        let paths: Vec<PathBuf> =
            (0..4u8).map(|at| repository.keep(&[at; 100], "wasm").unwrap()).collect();
        assert_eq!(repository.keep(&[0; 100], "wasm").unwrap(), paths[0]);
        let used: HashSet<PathBuf> = [paths[0].clone(), paths[1].clone()].into();
        repository.make_room(100, 400, &used).unwrap();
        assert_eq!(paths.iter().filter(|path| path.exists()).count(), 3);
        let why = repository.make_room(300, 400, &used).unwrap_err().to_string();
        assert!(why.contains("repository_mib"), "{why}");
        assert!(paths[0].exists() && paths[1].exists());
    }
}
