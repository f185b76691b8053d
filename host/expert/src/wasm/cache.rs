//! A cache of compiled components on disk, so that a restart or a second process need not compile
//! them again. A file that is damaged, from another folder or for another host is never used: the
//! component is compiled instead.
//!
//! A loaded file runs as machine code. So every file has an HMAC-SHA256 with a random key of the
//! folder that only the daemon's user can read. This does not protect from an attacker who can
//! write as that user, but such an attacker could replace the daemon itself.

use std::fs::{self, File, OpenOptions, Permissions};
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hypercast_core::{atomic_file, hex::hex};
use ring::rand::SecureRandom;
use ring::{digest, hmac};
use wasmtime::component::Component;

/// The first bytes of a file.
const MAGIC: &[u8; 8] = b"HCWASM1\n";

/// The size of an HMAC-SHA256 and of its key.
const TAG: usize = 32;

/// The file name of the folder's key.
const KEY: &str = "key";

/// The extension of a compiled component: `HASH.cwasm`.
const EXTENSION: &str = "cwasm";

/// The folder and size of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// A folder for the daemon's user alone; created if it is missing.
    pub folder: PathBuf,
    /// The largest size of all files in bytes; the least recently used are deleted first.
    pub bytes: u64,
}

/// An open cache folder.
pub(super) struct Cache {
    config: CacheConfig,
    key: hmac::Key,
}

impl Cache {
    /// Opens the folder, and creates it if it is missing.
    pub(super) fn open(config: &CacheConfig) -> io::Result<Cache> {
        let folder = &config.folder;
        if !folder.exists() {
            fs::create_dir_all(folder)?;
            fs::set_permissions(folder, Permissions::from_mode(0o700))?;
        }
        let key = match read_key(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => create_key(folder)?,
            read => read?,
        };
        check_owned(folder, &folder.join(KEY))?;
        Ok(Cache { config: config.clone(), key: hmac::Key::new(hmac::HMAC_SHA256, &key) })
    }

    /// The compiled component of `bytes`: from its file, or compiled now and saved.
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
        let code = component.serialize().map_err(io::Error::other);
        if let Err(error) = code.and_then(|code| self.save(&name, &code)) {
            let folder = self.config.folder.display();
            tracing::warn!(%folder, %error, "a compiled plugin cannot be cached");
        }
        Ok(component)
    }

    fn load(&self, engine: &wasmtime::Engine, name: &str) -> Option<Component> {
        let path = self.path(name);
        let file = match OpenOptions::new().read(true).custom_flags(NO_FOLLOW).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            file => file,
        };
        let read = file.map_err(wasmtime::Error::from);
        match read.and_then(|file| self.read(engine, name, file)) {
            Ok(component) => Some(component),
            Err(why) => {
                let file = path.display();
                tracing::warn!(%file, %why, "a cached plugin is invalid and is compiled again");
                // If it cannot be removed, the new file replaces it.
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    fn read(
        &self,
        engine: &wasmtime::Engine,
        name: &str,
        mut file: File,
    ) -> wasmtime::Result<Component> {
        let mut content = Vec::new();
        // A valid file is not larger than the whole cache.
        (&mut file).take(self.config.bytes.saturating_add(64)).read_to_end(&mut content)?;
        let rest = content.strip_prefix(MAGIC).and_then(|rest| rest.split_at_checked(TAG));
        let (tag, code) = rest.ok_or_else(|| io::Error::other("it is no compiled plugin"))?;
        hmac::verify(&self.key, &signed(name, code), tag)
            .map_err(|_| io::Error::other("it is damaged, or belongs to another folder"))?;
        // SAFETY: `code` is the output of `Component::serialize`. The HMAC shows that its writer
        // knew the folder's key. The key is random, only the daemon's user can read it (checked
        // when the folder was opened), and only `save` uses it, on the output of `serialize`.
        // `code` is a copy in memory, so it cannot change after the check. The name contains hashes
        // of the component, wasmtime's version and the engine's settings with the CPU's features;
        // wasmtime checks the latter two again.
        let component = unsafe { Component::deserialize(engine, code) }?;
        // The time of last use. If it cannot be set, the file is deleted earlier.
        let _ = file.set_modified(SystemTime::now());
        Ok(component)
    }

    fn save(&self, name: &str, code: &[u8]) -> io::Result<()> {
        let size = (MAGIC.len() + TAG + code.len()) as u64;
        let limit = self.config.bytes;
        let room = limit.checked_sub(size).ok_or_else(|| {
            let why = format!("it has {size} bytes, more than the cache's limit of {limit}");
            io::Error::other(why)
        })?;
        self.make_room(room)?;
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(&self.config.folder)?;
        let tag = hmac::sign(&self.key, &signed(name, code));
        [MAGIC.as_slice(), tag.as_ref(), code]
            .into_iter()
            .try_for_each(|part| file.write_all(part))?;
        file.as_file().sync_all()?;
        file.persist(self.path(name)).map_err(|error| error.error)?;
        atomic_file::sync_dir(&self.config.folder)
    }

    /// Deletes the least recently used files until at most `max_bytes` are left.
    fn make_room(&self, max_bytes: u64) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.config.folder)? {
            let path = entry?.path();
            // Another process may delete the same file.
            if let (Some(EXTENSION), Ok(meta)) =
                (path.extension().and_then(|e| e.to_str()), fs::symlink_metadata(&path))
            {
                files.push((meta.modified()?, meta.len(), path));
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if total <= max_bytes {
                break;
            }
            let _ = fs::remove_file(&path);
            total -= bytes;
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.config.folder.join(name).with_extension(EXTENSION)
    }
}

/// Linux's `O_NOFOLLOW`, which differs between x86-64 and aarch64. Other systems follow a link; the
/// file behind it is checked like any other.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
const NO_FOLLOW: i32 = 0o400_000;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
const NO_FOLLOW: i32 = 0o100_000;
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
const NO_FOLLOW: i32 = 0;

/// The name of a compiled component's file: a hash of all that it depends on, which is the
/// component, wasmtime, its settings and the CPU's features.
fn name(engine: &wasmtime::Engine, bytes: &[u8]) -> String {
    let mut settings = Sha256(digest::Context::new(&digest::SHA256));
    engine.precompile_compatibility_hash().hash(&mut settings);
    let (settings, bytes) = (settings.0.finish(), digest::digest(&digest::SHA256, bytes));
    let whole = [settings.as_ref(), bytes.as_ref()].concat();
    hex(digest::digest(&digest::SHA256, &whole).as_ref())
}

/// SHA-256 as a [`Hasher`], for its full 256 bits.
struct Sha256(digest::Context);

impl Hasher for Sha256 {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("only the full digest is used")
    }
}

/// The signed data: with the name, so that a file cannot be renamed to stand for another one.
fn signed(name: &str, code: &[u8]) -> Vec<u8> {
    [name.as_bytes(), digest::digest(&digest::SHA256, code).as_ref()].concat()
}

fn read_key(folder: &Path) -> io::Result<[u8; TAG]> {
    let mut key = [0; TAG];
    let mut file = File::open(folder.join(KEY))?;
    file.read_exact(&mut key)?;
    Ok(key)
}

/// Creates a random key, or reads the key of another process that created one first.
fn create_key(folder: &Path) -> io::Result<[u8; TAG]> {
    let mut key = [0; TAG];
    ring::rand::SystemRandom::new()
        .fill(&mut key)
        .map_err(|_| io::Error::other("the system has no random bytes"))?;
    // Temporary files are readable by their owner alone.
    let mut file = tempfile::Builder::new().prefix(".key-").tempfile_in(folder)?;
    file.write_all(&key)?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(folder.join(KEY)) {
        Ok(_) => atomic_file::sync_dir(folder).map(|()| key),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => read_key(folder),
        Err(error) => Err(error.error),
    }
}

/// Checks that no other user can write to the folder or read its key.
fn check_owned(folder: &Path, key: &Path) -> io::Result<()> {
    // A file that this process creates belongs to its own user.
    let own = tempfile::tempfile_in(folder)?.metadata()?.uid();
    let (of_folder, of_key) = (fs::metadata(folder)?, fs::symlink_metadata(key)?);
    let refused = |what: &str, path: &Path| {
        Err(io::Error::other(format!(
            "{} {what}; run `chmod go-rwx` on it, or delete it and let the daemon create it",
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
