//! Folders that are replaced as a whole: after a crash at any moment, a reader finds the old folder
//! or the new one, complete.
//!
//! The new folder is filled as `PATH.partial`, and every file of it is synced. Then the old one is
//! set aside as `PATH.old`, the new one gets the name, the parent is synced, and only then the old
//! one is removed. A crash between the two renames leaves `PATH.old` alone: readers go by
//! [`current`], and the next writer puts it back.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    atomic_file::{draft_path, rename, sync_dir},
    disk::{self as fs, File},
    error::{CommonErrors as _, Error, Result},
};

/// Replaces the folder `path` by what `fill` writes into the empty folder that it is given. The
/// caller sees to it that there is one writer at a time.
///
/// # Errors
/// `fill` or the file system fails; readers then find the old folder.
pub fn replace<E: From<Error>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let (draft, old) = (draft_path(path), old_path(path));
    recover(path)?;
    // Left by a crash: a draft that was not complete, or an old folder behind a new one.
    remove(&draft)?;
    remove(&old)?;
    create(&draft)?;
    fill(&draft)?;
    sync_tree(&draft).map_err(Error::io(&draft))?;
    if fs::exists(path) {
        rename(path, &old).map_err(Error::io(path))?;
    }
    rename(&draft, path).map_err(Error::io(path))?;
    Ok(remove(&old)?)
}

/// The folder to read: `path`, or the old one where a replacement was cut off between its renames.
pub fn current(path: &Path) -> PathBuf {
    let old = old_path(path);
    if !fs::exists(path) && fs::exists(&old) { old } else { path.to_path_buf() }
}

/// Puts the old folder back where a replacement was cut off between its renames. For writers alone:
/// it would come between the renames of a replacement that runs.
///
/// # Errors
/// The file system fails.
pub fn recover(path: &Path) -> Result<()> {
    match current(path) {
        current if current == path => Ok(()),
        old => rename(&old, path).map_err(Error::io(path)),
    }
}

/// Makes a folder and those above it that are missing, durably.
///
/// # Errors
/// The file system fails.
pub fn create(path: &Path) -> Result<()> {
    let exists = |dir: &&Path| dir.as_os_str().is_empty() || fs::is_dir(dir);
    let missing: Vec<&Path> = path.ancestors().take_while(|dir| !exists(dir)).collect();
    fs::create_dir_all(path).map_err(Error::io(path))?;
    for made in missing {
        sync_dir(parent(made)).map_err(Error::io(made))?;
    }
    Ok(())
}

/// Removes a folder, if there is one.
///
/// # Errors
/// The file system fails.
pub fn remove(path: &Path) -> Result<()> {
    Error::found(path, fs::remove_dir_all(path)).map(drop)
}

/// The folder that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn old_path(path: &Path) -> PathBuf {
    let mut old = path.as_os_str().to_owned();
    old.push(".old");
    old.into()
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for name in fs::names(dir)? {
        let path = dir.join(name);
        if fs::is_dir(&path) {
            sync_tree(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write(path: &Path, content: &str) {
        replace(path, |draft| -> Result<()> {
            create(&draft.join("part"))?;
            let file = draft.join("part/content");
            crate::atomic_file::write(&file, content.as_bytes()).map_err(Error::io(&file))
        })
        .unwrap();
    }

    fn read(path: &Path) -> String {
        fs::read_to_string(current(path).join("part/content")).unwrap()
    }

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_replacement_that_fails_leaves_the_old_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("above/fm");
        write(&path, "old");
        let failed = replace(&path, |_| Err(Error::internal("stopped")));
        assert!(failed.is_err());
        assert_eq!(read(&path), "old");
        write(&path, "new");
        assert_eq!(read(&path), "new");
        assert_eq!(names(path.parent().unwrap()), ["fm"], "no draft and no old folder is left");
    }

    #[test]
    fn versions_with_dots_do_not_meet() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] = ["fm-1.0.0", "fm-1.0.1"].map(|name| dir.path().join(name));
        write(&first, "first");
        replace(&second, |_| -> Result<()> {
            // Both are being written, and the first is finished meanwhile.
            write(&first, "first again");
            Ok(())
        })
        .unwrap();
        assert_eq!(read(&first), "first again");
        // A crash in the first, between its renames, is none of the second's business.
        fs::rename(&first, dir.path().join("fm-1.0.0.old")).unwrap();
        write(&second, "second");
        assert_eq!((read(&first), read(&second)), ("first again".into(), "second".into()));
    }

    /// Every state in which a crash may leave the folders.
    #[test]
    fn a_crash_at_any_step_leaves_the_old_folder_or_the_new_one() {
        for (present, expected) in [
            (vec!["fm", "fm.partial"], "fm"),
            (vec!["fm.old", "fm.partial"], "fm.old"),
            (vec!["fm", "fm.old"], "fm"),
            (vec!["fm"], "fm"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            for name in &present {
                write(&dir.path().join("made"), name);
                fs::rename(dir.path().join("made"), dir.path().join(name)).unwrap();
            }
            let path = dir.path().join("fm");
            assert_eq!(read(&path), expected, "{present:?}");
            recover(&path).unwrap();
            assert_eq!(read(&path), expected, "{present:?}");
            write(&path, "new");
            assert_eq!((read(&path), names(dir.path())), ("new".into(), vec!["fm".into()]));
        }
    }
}
