//! A disk that forgets what was not synced: files and folders in memory, each with what it has and
//! what of it is durable.
//!
//! After a power cut each sector of 512 bytes that was written since the last sync has its old or
//! its new bytes, and the length of the file is the old one, the new one or between. Names behave
//! as the mode says ([`NameOrder`]). A sync that fails loses the sectors that it was to write, and
//! later syncs do not write them, as on Linux.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs::TryLockError,
    io::{self, ErrorKind},
    path::{Component, Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use hypercast_core::{
    disk::{Metadata, OpenMode},
    hash::mix_parts,
    simulated::SimulatedFile,
};

/// What a disk writes as a whole or not at all, in bytes.
pub const SECTOR: usize = 512;

/// Which changes of names survive a power cut without a sync of their folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NameOrder {
    /// All up to some moment, as in a file system with a journal.
    Journal,
    /// Any of them, in their order, which is all that POSIX promises.
    Any,
}

/// What is left to chance when the power is cut.
#[derive(Debug, Clone, Copy)]
pub struct PowerCut {
    /// From it and from the name of what is chosen.
    pub seed: u64,
    /// Which names in folders survive.
    pub names: NameOrder,
}

/// A fault of the disk's own code that a run of the simulator must find: a sync that does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskLie {
    /// Of segments of streams.
    SegmentSync,
    /// Of files that are renamed afterwards.
    DraftSync,
    /// Of the names in folders.
    FolderSync,
    /// Locks are always granted.
    Locks,
    /// Files of rollouts get no name, so that they are as if they were not written.
    RolloutRenames,
}

/// The disk of one machine.
#[derive(Default)]
pub struct Disk {
    root: FolderRef,
    open: BTreeMap<SimulatedFile, OpenedFile>,
    opened: u64,
    changes: u64,
    /// The planted fault that it has.
    pub lie: Option<DiskLie>,
}

type FileRef = Rc<RefCell<FileNode>>;
type FolderRef = Rc<RefCell<FolderNode>>;

#[derive(Clone)]
enum Node {
    File(FileRef),
    Folder(FolderRef),
}

#[derive(Default)]
struct FileNode {
    data: Vec<u8>,
    synced: Vec<u8>,
    /// Sectors that were written since the last sync.
    dirty: BTreeSet<usize>,
    /// Sectors that a failed sync lost.
    lost: BTreeSet<usize>,
    /// The number of its last change among all of the disk.
    modified: u64,
    locked_by: Option<SimulatedFile>,
}

#[derive(Default)]
struct FolderNode {
    entries: BTreeMap<OsString, Node>,
    synced: BTreeMap<OsString, Node>,
    /// Since the last sync, in order.
    changes: Vec<NameChange>,
}

/// A change of a folder's names, which a power cut keeps or loses as a whole.
struct NameChange {
    number: u64,
    removed: Option<OsString>,
    set: Option<(OsString, Node)>,
}

struct OpenedFile {
    file: FileRef,
    path: PathBuf,
}

impl Disk {
    /// Opens a file.
    ///
    /// # Errors
    /// As on a real disk.
    pub fn open(&mut self, path: &Path, mode: OpenMode) -> io::Result<SimulatedFile> {
        let (folder, name) = self.place(path)?;
        let found = folder.borrow().entries.get(&name).cloned();
        let file = match (found, mode) {
            (Some(Node::Folder(_)), _) => return Err(ErrorKind::IsADirectory.into()),
            (Some(_), OpenMode::Private) => return Err(ErrorKind::AlreadyExists.into()),
            (None, OpenMode::Read | OpenMode::Write) => return Err(ErrorKind::NotFound.into()),
            (Some(Node::File(file)), _) => file,
            (None, _) => {
                let file = FileRef::default();
                self.change(&folder, None, Some((name, Node::File(file.clone()))));
                file
            }
        };
        if mode == OpenMode::Truncate {
            file.borrow_mut().set_len(0);
        }
        self.opened += 1;
        self.open.insert(self.opened, OpenedFile { file, path: path.to_path_buf() });
        Ok(self.opened)
    }

    /// Closes a file; one that a power cut closed already is none of its business.
    pub fn close(&mut self, file: SimulatedFile) {
        if let Some(closed) = self.open.remove(&file) {
            let mut closed = closed.file.borrow_mut();
            closed.locked_by = closed.locked_by.filter(|&holder| holder != file);
        }
    }

    /// The path by which a file was opened; empty if it is not open.
    pub fn path(&self, file: SimulatedFile) -> PathBuf {
        self.open.get(&file).map(|open| open.path.clone()).unwrap_or_default()
    }

    /// Reads from an offset on.
    ///
    /// # Errors
    /// The file is not open.
    pub fn read_at(&self, file: SimulatedFile, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let file = self.file(file)?.borrow();
        let rest = file.data.get(at as usize..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    /// Writes from an offset on. `written_back` sectors become durable without a sync, as a kernel
    /// does it at any time.
    ///
    /// # Errors
    /// The file is not open.
    pub fn write_at(
        &mut self,
        file: SimulatedFile,
        bytes: &[u8],
        at: u64,
        written_back: bool,
    ) -> io::Result<usize> {
        self.changes += 1;
        let mut node = self.file(file)?.borrow_mut();
        node.write(bytes, at as usize, written_back);
        node.modified = self.changes;
        Ok(bytes.len())
    }

    /// Cuts or extends a file.
    ///
    /// # Errors
    /// The file is not open.
    pub fn set_len(&mut self, file: SimulatedFile, length: u64) -> io::Result<()> {
        self.file(file)?.borrow_mut().set_len(length as usize);
        Ok(())
    }

    /// The length of a file.
    ///
    /// # Errors
    /// The file is not open.
    pub fn length(&self, file: SimulatedFile) -> io::Result<u64> {
        Ok(self.file(file)?.borrow().data.len() as u64)
    }

    /// Makes a file's content durable.
    ///
    /// # Errors
    /// The file is not open.
    pub fn sync(&mut self, file: SimulatedFile) -> io::Result<()> {
        let path = self.path(file);
        let ends = |end: &str| path.extension().is_some_and(|of| of == OsStr::new(end));
        let lies = match self.lie {
            Some(DiskLie::SegmentSync) => ends("records"),
            Some(DiskLie::DraftSync) => ends("partial"),
            _ => false,
        };
        if !lies {
            self.file(file)?.borrow_mut().sync();
        }
        Ok(())
    }

    /// What a sync does that fails.
    pub fn fail_sync(&mut self, file: SimulatedFile) {
        if let Ok(file) = self.file(file) {
            let mut file = file.borrow_mut();
            let dirty = std::mem::take(&mut file.dirty);
            file.lost.extend(dirty);
        }
    }

    /// Locks a file for one opening of it.
    ///
    /// # Errors
    /// Another opening holds it.
    pub fn try_lock(&mut self, file: SimulatedFile) -> Result<(), TryLockError> {
        let mut node = self.file(file).map_err(TryLockError::Error)?.borrow_mut();
        let is_held = node.locked_by.is_some_and(|holder| holder != file);
        if is_held && self.lie != Some(DiskLie::Locks) {
            return Err(TryLockError::WouldBlock);
        }
        node.locked_by = Some(file);
        Ok(())
    }

    /// Releases the lock of one opening.
    ///
    /// # Errors
    /// The file is not open.
    pub fn unlock(&mut self, file: SimulatedFile) -> io::Result<()> {
        let mut node = self.file(file)?.borrow_mut();
        node.locked_by = node.locked_by.filter(|&holder| holder != file);
        Ok(())
    }

    /// What a path names.
    ///
    /// # Errors
    /// Nothing.
    pub fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        let node = self.node(path)?;
        let (length, modified) = match &node {
            Node::File(file) => (file.borrow().data.len() as u64, file.borrow().modified),
            Node::Folder(_) => (0, 0),
        };
        let modified = Duration::from_nanos(modified);
        let is_file = matches!(node, Node::File(_));
        Ok(Metadata { is_file, is_dir: !is_file, length, modified, permissions: None })
    }

    /// The names in a folder.
    ///
    /// # Errors
    /// There is no such folder.
    pub fn names(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        Ok(self.folder(folder)?.borrow().entries.keys().cloned().collect())
    }

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// There is no such folder.
    pub fn sync_dir(&mut self, folder: &Path) -> io::Result<()> {
        let folder = self.folder(folder)?;
        let mut folder = folder.borrow_mut();
        if self.lie != Some(DiskLie::FolderSync) {
            folder.synced = folder.entries.clone();
            folder.changes.clear();
        }
        Ok(())
    }

    /// Makes a folder.
    ///
    /// # Errors
    /// The name is taken, or the folder above is missing.
    pub fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        let (folder, name) = self.place(path)?;
        if folder.borrow().entries.contains_key(&name) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        self.change(&folder, None, Some((name, Node::Folder(FolderRef::default()))));
        Ok(())
    }

    /// Removes a file, or a folder with all in it.
    ///
    /// # Errors
    /// There is none.
    pub fn remove(&mut self, path: &Path, is_dir: bool) -> io::Result<()> {
        match (self.node(path)?, is_dir) {
            (Node::Folder(_), false) => return Err(ErrorKind::IsADirectory.into()),
            (Node::File(_), true) => return Err(ErrorKind::NotADirectory.into()),
            _ => {}
        }
        let (folder, name) = self.place(path)?;
        self.change(&folder, Some(name), None);
        Ok(())
    }

    /// Gives a file or folder another name in the same folder.
    ///
    /// # Errors
    /// There is none, or a folder that is not empty has the name.
    pub fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = self.node(from)?;
        let is_of_rollout = to.parent().is_some_and(|folder| folder.ends_with("rollouts"));
        if is_of_rollout && self.lie == Some(DiskLie::RolloutRenames) {
            return Ok(());
        }
        let ((folder, old), (target, new)) = (self.place(from)?, self.place(to)?);
        if !Rc::ptr_eq(&folder, &target) {
            return Err(io::Error::new(ErrorKind::Unsupported, "to another folder"));
        }
        if let Ok(Node::Folder(taken)) = self.node(to)
            && !taken.borrow().entries.is_empty()
        {
            return Err(ErrorKind::DirectoryNotEmpty.into());
        }
        self.change(&folder, Some(old), Some((new, node)));
        Ok(())
    }

    /// Loses what was not durable, by chance in part.
    pub fn cut_power(&mut self, cut: PowerCut) {
        self.open.clear();
        let mut pending = BTreeSet::new();
        self.root.borrow().pending(&mut pending);
        let kept = chosen(cut.seed, Path::new(""), 0) as usize % (pending.len() + 1);
        let first_lost = pending.into_iter().nth(kept).unwrap_or(u64::MAX);
        self.root.borrow_mut().cut_power(Path::new("/"), cut, first_lost);
    }

    /// A copy of a file, or of a folder with all in it; none if there is none.
    pub fn copy(&self, path: &Path) -> Option<DiskCopy> {
        self.node(path).ok().map(|node| DiskCopy(node.deep_clone()))
    }

    /// Puts a copy back, durably, in place of what is there.
    pub fn put_back(&mut self, path: &Path, copy: &DiskCopy) {
        let Ok((folder, name)) = self.place(path) else { return };
        let mut folder = folder.borrow_mut();
        let FolderNode { entries, synced, .. } = &mut *folder;
        for names in [entries, synced] {
            names.insert(name.clone(), copy.0.clone());
        }
    }

    /// What is in a file; none if there is none.
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        match self.node(path).ok()? {
            Node::File(file) => Some(file.borrow().data.clone()),
            Node::Folder(_) => None,
        }
    }

    /// Flips bits of a byte in a file, if there is one.
    pub fn flip(&mut self, path: &Path, at: usize, mask: u8) {
        let Ok(Node::File(file)) = self.node(path) else { return };
        let mut file = file.borrow_mut();
        let FileNode { data, synced, .. } = &mut *file;
        for content in [data, synced] {
            if let Some(byte) = content.get_mut(at) {
                *byte ^= mask;
            }
        }
    }

    fn file(&self, file: SimulatedFile) -> io::Result<&FileRef> {
        let open = self.open.get(&file);
        open.map(|open| &open.file).ok_or_else(|| io::Error::other("the file is closed"))
    }

    fn node(&self, path: &Path) -> io::Result<Node> {
        let mut node = Node::Folder(self.root.clone());
        for name in path.components() {
            let Component::Normal(name) = name else { continue };
            let Node::Folder(folder) = &node else { return Err(ErrorKind::NotADirectory.into()) };
            let inner = folder.borrow().entries.get(name).cloned();
            node = inner.ok_or(ErrorKind::NotFound)?;
        }
        Ok(node)
    }

    fn folder(&self, path: &Path) -> io::Result<FolderRef> {
        match self.node(path)? {
            Node::Folder(folder) => Ok(folder),
            Node::File(_) => Err(ErrorKind::NotADirectory.into()),
        }
    }

    /// The folder of a path, and the name in it.
    fn place(&self, path: &Path) -> io::Result<(FolderRef, OsString)> {
        let (folder, name) = (path.parent(), path.file_name());
        let (Some(folder), Some(name)) = (folder, name) else {
            return Err(ErrorKind::InvalidInput.into());
        };
        Ok((self.folder(folder)?, name.to_owned()))
    }

    fn change(
        &mut self,
        folder: &FolderRef,
        removed: Option<OsString>,
        set: Option<(OsString, Node)>,
    ) {
        self.changes += 1;
        let change = NameChange { number: self.changes, removed, set };
        let mut folder = folder.borrow_mut();
        change.apply(&mut folder.entries);
        folder.changes.push(change);
    }
}

/// A part of a disk as it was at some time.
pub struct DiskCopy(Node);

impl Node {
    /// A copy of which everything is durable.
    fn deep_clone(&self) -> Node {
        match self {
            Node::File(file) => {
                let data = file.borrow().data.clone();
                let copy = FileNode { synced: data.clone(), data, ..FileNode::default() };
                Node::File(Rc::new(RefCell::new(copy)))
            }
            Node::Folder(folder) => {
                let entries = folder.borrow().entries.clone();
                let copy = |(name, node): (OsString, Node)| (name, node.deep_clone());
                let entries: BTreeMap<_, _> = entries.into_iter().map(copy).collect();
                let copy = FolderNode { synced: entries.clone(), entries, changes: Vec::new() };
                Node::Folder(Rc::new(RefCell::new(copy)))
            }
        }
    }
}

impl NameChange {
    fn apply(&self, entries: &mut BTreeMap<OsString, Node>) {
        if let Some(name) = &self.removed {
            entries.remove(name);
        }
        if let Some((name, node)) = &self.set {
            entries.insert(name.clone(), node.clone());
        }
    }
}

impl FolderNode {
    /// The numbers of the changes that are not durable.
    fn pending(&self, numbers: &mut BTreeSet<u64>) {
        numbers.extend(self.changes.iter().map(|change| change.number));
        for node in self.entries.values() {
            if let Node::Folder(folder) = node {
                folder.borrow().pending(numbers);
            }
        }
    }

    fn cut_power(&mut self, path: &Path, cut: PowerCut, first_lost: u64) {
        let mut entries = std::mem::take(&mut self.synced);
        for change in self.changes.drain(..) {
            let is_kept = match cut.names {
                NameOrder::Journal => change.number < first_lost,
                NameOrder::Any => chosen(cut.seed, path, change.number) & 1 == 1,
            };
            if is_kept {
                change.apply(&mut entries);
            }
        }
        for (name, node) in &entries {
            let path = path.join(name);
            match node {
                Node::File(file) => file.borrow_mut().cut_power(&path, cut.seed),
                Node::Folder(folder) => folder.borrow_mut().cut_power(&path, cut, first_lost),
            }
        }
        self.synced.clone_from(&entries);
        self.entries = entries;
    }
}

impl FileNode {
    fn write(&mut self, bytes: &[u8], at: usize, written_back: bool) {
        let end = at + bytes.len();
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        self.data[at..end].copy_from_slice(bytes);
        for sector in at / SECTOR..end.div_ceil(SECTOR) {
            self.lost.remove(&sector);
            self.dirty.insert(sector);
            if written_back {
                self.write_back(sector);
            }
        }
    }

    fn write_back(&mut self, sector: usize) {
        let end = ((sector + 1) * SECTOR).min(self.data.len());
        if self.synced.len() < end {
            self.synced.resize(end, 0);
        }
        self.synced[sector * SECTOR..end].copy_from_slice(&self.data[sector * SECTOR..end]);
        self.dirty.remove(&sector);
    }

    fn set_len(&mut self, length: usize) {
        let before = self.data.len();
        self.data.resize(length, 0);
        self.dirty.extend(before.min(length) / SECTOR..before.max(length).div_ceil(SECTOR));
    }

    fn sync(&mut self) {
        let before = std::mem::replace(&mut self.synced, self.data.clone());
        for &sector in &self.lost {
            for at in sector * SECTOR..((sector + 1) * SECTOR).min(self.synced.len()) {
                self.synced[at] = before.get(at).copied().unwrap_or(0);
            }
        }
        self.dirty.clear();
    }

    fn cut_power(&mut self, path: &Path, seed: u64) {
        self.locked_by = None;
        let (old, new) = (self.synced.len(), self.data.len());
        let choice = chosen(seed, path, u64::MAX) as usize;
        let length = match choice % 4 {
            0 => old,
            1 => new,
            _ => old.min(new) + choice / 4 % (old.abs_diff(new) + 1),
        };
        let mut content = vec![0; length];
        for (sector, bytes) in content.chunks_mut(SECTOR).enumerate() {
            let is_new = self.dirty.contains(&sector) && chosen(seed, path, sector as u64) & 1 == 1;
            let source = if is_new { &self.data } else { &self.synced };
            let source = source.get(sector * SECTOR..).unwrap_or_default();
            let known = source.len().min(bytes.len());
            bytes[..known].copy_from_slice(&source[..known]);
        }
        self.dirty.clear();
        self.lost.clear();
        self.data.clone_from(&content);
        self.synced = content;
    }
}

/// A choice that depends on what is chosen and not on what was chosen before, so that it stays as
/// it is when a plan shrinks.
fn chosen(seed: u64, path: &Path, what: u64) -> u64 {
    let name = path.as_os_str().as_encoded_bytes();
    let name = name.iter().fold(0, |hash, &byte| mix_parts(&[hash, byte.into()]));
    mix_parts(&[seed, name, what])
}
