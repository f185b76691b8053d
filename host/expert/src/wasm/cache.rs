//! Compiled components, kept on disk by what they were made of, so that a restart
//! or a second process need not compile them again. A file that is damaged, foreign
//! or of another host is never used: the component is compiled instead.
//!
//! What is loaded runs as machine code, so every file carries an HMAC-SHA256 with a key that was drawn for the folder
//! and that nobody but the daemon's user can read. That does not protect from who can write as that user: they could
//! replace the daemon itself.

use std::fs::{self, File, OpenOptions, Permissions};
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ring::rand::SecureRandom;
use ring::{digest, hmac};
use wasmtime::component::Component;

/// What a file begins with.
const MAGIC: &[u8; 8] = b"HCWASM1\n";

/// Bytes of an HMAC-SHA256, and of its key.
const TAG: usize = 32;

/// The folder's key.
const KEY: &str = "key";

/// Files are named `HASH.cwasm`.
const EXTENSION: &str = "cwasm";

/// Where compiled components are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// The folder, for the daemon's user alone; it is made where it is missing.
    pub folder: PathBuf,
    /// What it may hold in bytes; those used longest ago go first.
    pub bytes: u64,
}

/// A folder that is ours.
pub(super) struct Cache {
    config: CacheConfig,
    key: hmac::Key,
}

impl Cache {
    /// Opens the folder, or makes it.
    pub(super) fn open(config: &CacheConfig) -> io::Result<Cache> {
        let folder = &config.folder;
        if !folder.exists() {
            fs::create_dir_all(folder)?;
            fs::set_permissions(folder, Permissions::from_mode(0o700))?;
        }
        let key = match read_key(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make_key(folder)?,
            read => read?,
        };
        check_owned(folder, &folder.join(KEY))?;
        Ok(Cache { config: config.clone(), key: hmac::Key::new(hmac::HMAC_SHA256, &key) })
    }

    /// The component of these bytes: from its file, or compiled and then kept.
    pub(super) fn component(
        &self,
        engine: &wasmtime::Engine,
        bytes: &[u8],
    ) -> wasmtime::Result<Component> {
        let name = name(engine, bytes);
        if let Some(component) = self.load(engine, &name) {
            return Ok(component);
        }
        let component = Component::from_binary(engine, bytes)?;
        if let Err(error) =
            component.serialize().map_err(io::Error::other).and_then(|code| self.keep(&name, &code))
        {
            tracing::warn!(folder = %self.config.folder.display(), %error, "a compiled plugin is not kept; the next start compiles it again");
        }
        Ok(component)
    }

    fn load(&self, engine: &wasmtime::Engine, name: &str) -> Option<Component> {
        let path = self.path(name);
        let mut file = match OpenOptions::new().read(true).custom_flags(NO_FOLLOW).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => return self.distrust(&path, &error.to_string()),
        };
        let mut content = Vec::new();
        // Twice the bound of the folder is no file of ours.
        if let Err(error) =
            (&mut file).take(self.config.bytes.saturating_add(64)).read_to_end(&mut content)
        {
            return self.distrust(&path, &error.to_string());
        }
        let Some((tag, code)) =
            content.strip_prefix(MAGIC).and_then(|rest| rest.split_at_checked(TAG))
        else {
            return self.distrust(&path, "it is no compiled plugin");
        };
        if hmac::verify(&self.key, &signed(name, code), tag).is_err() {
            return self.distrust(&path, "it is damaged, or was not made here");
        }
        // The HMAC says that whoever wrote `code` under this name knew the folder's key, which was drawn at random, is
        // readable by the daemon's user alone (checked when the folder was opened), and is used by `keep` alone, on the
        // output of `serialize`. `code` is our copy in memory, so the file cannot change between check and use. The name
        // holds the hash of the component, wasmtime's version and the engine's settings with the CPU's features;
        // wasmtime compares the latter two again and refuses others.
        // SAFETY: `code` is what `Component::serialize` made, by the HMAC just verified; see above.
        match unsafe { Component::deserialize(engine, code) } {
            Ok(component) => {
                // Used now: it goes last when there is no room. A time that cannot be set makes it go earlier.
                let _ = file.set_modified(SystemTime::now());
                Some(component)
            }
            Err(error) => self.distrust(&path, &error.to_string()),
        }
    }

    fn distrust(&self, path: &Path, why: &str) -> Option<Component> {
        tracing::warn!(file = %path.display(), why, "a compiled plugin is not used; compiling it again");
        // What cannot be removed is replaced when the new one is renamed over it.
        let _ = fs::remove_file(path);
        None
    }

    fn keep(&self, name: &str, code: &[u8]) -> io::Result<()> {
        let folder = &self.config.folder;
        let size = (MAGIC.len() + TAG + code.len()) as u64;
        if size > self.config.bytes {
            return Err(io::Error::other(format!(
                "it has {size} bytes, and the folder may hold {}",
                self.config.bytes
            )));
        }
        self.make_room(self.config.bytes - size)?;
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
        let tag = hmac::sign(&self.key, &signed(name, code));
        file.write_all(MAGIC)?;
        file.write_all(tag.as_ref())?;
        file.write_all(code)?;
        file.persist(self.path(name)).map(drop).map_err(|error| error.error)
    }

    /// Lets go of what was used longest ago, until no more than so many bytes are left.
    fn make_room(&self, most: u64) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.config.folder)? {
            let path = entry?.path();
            // Another process may let go of the same.
            if let (Some(EXTENSION), Ok(meta)) =
                (path.extension().and_then(|e| e.to_str()), fs::symlink_metadata(&path))
            {
                files.push((meta.modified()?, meta.len(), path));
            }
        }
        files.sort();
        let mut held: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if held <= most {
                break;
            }
            let _ = fs::remove_file(&path);
            held -= bytes;
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.config.folder.join(name).with_extension(EXTENSION)
    }
}

/// `O_NOFOLLOW` of Linux on x86-64 and aarch64 differ; elsewhere a link is followed, and what it leads to is checked all the same.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
const NO_FOLLOW: i32 = 0o400_000;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
const NO_FOLLOW: i32 = 0o100_000;
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
const NO_FOLLOW: i32 = 0;

/// What a compiled component is made of: the component, wasmtime, its settings, the CPU's features.
fn name(engine: &wasmtime::Engine, bytes: &[u8]) -> String {
    let mut settings = Sha256(digest::Context::new(&digest::SHA256));
    engine.precompile_compatibility_hash().hash(&mut settings);
    let mut whole = digest::Context::new(&digest::SHA256);
    whole.update(settings.0.finish().as_ref());
    whole.update(digest::digest(&digest::SHA256, bytes).as_ref());
    whole.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A hasher that loses nothing.
struct Sha256(digest::Context);

impl Hasher for Sha256 {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("the digest is asked for as a whole")
    }
}

/// What the HMAC is of: no file can stand for another.
fn signed(name: &str, code: &[u8]) -> Vec<u8> {
    [name.as_bytes(), digest::digest(&digest::SHA256, code).as_ref()].concat()
}

fn read_key(folder: &Path) -> io::Result<[u8; TAG]> {
    let mut key = [0; TAG];
    let mut file = File::open(folder.join(KEY))?;
    file.read_exact(&mut key)?;
    Ok(key)
}

/// Draws a key, unless another process was first: then its key is read.
fn make_key(folder: &Path) -> io::Result<[u8; TAG]> {
    let mut key = [0; TAG];
    ring::rand::SystemRandom::new()
        .fill(&mut key)
        .map_err(|_| io::Error::other("the system gives no random bytes"))?;
    // Temporary files are readable by their owner alone.
    let mut file = tempfile::Builder::new().prefix(".key-").tempfile_in(folder)?;
    file.write_all(&key)?;
    match file.persist_noclobber(folder.join(KEY)) {
        Ok(_) => Ok(key),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => read_key(folder),
        Err(error) => Err(error.error),
    }
}

/// Whether nobody else can write to the folder or read its key. A file that this process just made has its own user.
fn check_owned(folder: &Path, key: &Path) -> io::Result<()> {
    let own = tempfile::tempfile_in(folder)?.metadata()?.uid();
    let (of_folder, of_key) = (fs::metadata(folder)?, fs::symlink_metadata(key)?);
    let refused = |what: &str, path: &Path| {
        Err(io::Error::other(format!(
            "{} {what}; make it `chmod go-rwx`, or empty it and let the daemon make it",
            path.display()
        )))
    };
    if of_folder.uid() != own || of_key.uid() != own {
        return refused("belongs to another user", folder);
    }
    if of_folder.mode() & 0o022 != 0 {
        return refused("can be written by others", folder);
    }
    if !of_key.is_file() || of_key.mode() & 0o077 != 0 {
        return refused("can be read by others", key);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest component, with a custom section so that there are several.
    fn component(mark: u8) -> Vec<u8> {
        [b"\0asm\x0d\0\x01\0".as_slice(), &[0, 3, 1, b'm', mark]].concat()
    }

    fn open(folder: &Path, bytes: u64) -> Cache {
        Cache::open(&CacheConfig { folder: folder.join("compiled"), bytes }).unwrap()
    }

    fn files(cache: &Cache) -> Vec<PathBuf> {
        let entries =
            fs::read_dir(&cache.config.folder).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some()).collect()
    }

    #[test]
    fn what_was_compiled_is_loaded_by_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let engine = wasmtime::Engine::default();
        open(dir.path(), 1 << 20).component(&engine, &component(1)).unwrap();
        let again = open(dir.path(), 1 << 20);
        let name = name(&engine, &component(1));
        assert!(again.load(&engine, &name).is_some());
        assert!(again.load(&engine, &super::name(&engine, &component(2))).is_none());
        let mut other = wasmtime::Config::new();
        other.epoch_interruption(true);
        let other = wasmtime::Engine::new(&other).unwrap();
        assert_ne!(name, super::name(&other, &component(1)), "other settings, another file");
    }

    #[test]
    fn no_byte_of_a_file_can_change_and_no_file_can_stand_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let engine = wasmtime::Engine::default();
        let cache = open(dir.path(), 1 << 20);
        cache.component(&engine, &component(1)).unwrap();
        let (one, two) = (name(&engine, &component(1)), name(&engine, &component(2)));
        let whole = fs::read(cache.path(&one)).unwrap();
        for at in
            (0..whole.len()).step_by(whole.len() / 97 + 1).chain([0, 8, 39, 40, whole.len() - 1])
        {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(cache.path(&one), &damaged).unwrap();
            assert!(cache.load(&engine, &one).is_none(), "byte {at}");
            assert!(!cache.path(&one).exists(), "it is gone");
        }
        for length in [0, 7, 8, 39, 40, whole.len() - 1] {
            fs::write(cache.path(&one), &whole[..length]).unwrap();
            assert!(cache.load(&engine, &one).is_none(), "{length} bytes");
        }
        fs::write(cache.path(&two), &whole).unwrap();
        assert!(cache.load(&engine, &two).is_none(), "a file under another name");
        let elsewhere = tempfile::tempdir().unwrap();
        let foreign = open(elsewhere.path(), 1 << 20);
        fs::write(foreign.path(&one), &whole).unwrap();
        assert!(foreign.load(&engine, &one).is_none(), "a file of another folder");
        cache.component(&engine, &component(1)).unwrap();
        assert!(cache.load(&engine, &one).is_some(), "it is compiled and kept again");
    }

    #[test]
    fn the_folder_is_bounded_and_what_was_used_last_stays() {
        let dir = tempfile::tempdir().unwrap();
        let engine = wasmtime::Engine::default();
        let cache = open(dir.path(), 1 << 20);
        cache.component(&engine, &component(1)).unwrap();
        let size = fs::metadata(&files(&cache)[0]).unwrap().len();
        let cache = open(dir.path(), 2 * size + size / 2);
        for mark in 2..6 {
            let kept = File::open(cache.path(&name(&engine, &component(1)))).unwrap();
            kept.set_modified(SystemTime::now() + std::time::Duration::from_secs(60)).unwrap();
            cache.component(&engine, &component(mark)).unwrap();
            assert!(files(&cache).len() <= 2);
        }
        assert!(cache.load(&engine, &name(&engine, &component(1))).is_some());
        assert!(cache.load(&engine, &name(&engine, &component(5))).is_some());
        let none = open(dir.path(), 10);
        none.component(&engine, &component(9)).unwrap();
        assert!(none.load(&engine, &name(&engine, &component(9))).is_none(), "too big to be kept");
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("compiled");
        open(dir.path(), 1 << 20);
        fs::set_permissions(&folder, Permissions::from_mode(0o777)).unwrap();
        let config = CacheConfig { folder: folder.clone(), bytes: 1 };
        let refused = Cache::open(&config).err().unwrap().to_string();
        assert!(refused.contains("can be written by others"), "{refused}");
        fs::set_permissions(&folder, Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(folder.join(KEY), Permissions::from_mode(0o644)).unwrap();
        let refused = Cache::open(&config).err().unwrap().to_string();
        assert!(refused.contains("can be read by others"), "{refused}");
    }
}
