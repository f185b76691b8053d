//! Handles that read a store beside its one writer, in the same process: [`StoreHandle`], and what
//! the writer keeps for them, `Published`. Other processes open a `StoreReader` instead.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicPtr, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::epoch::Epochs;
use crate::error::Result;
use crate::gather::{self, RowSource};
use crate::index::NONE;
use crate::live::LiveRows;
use crate::lock::ReadersLock;
use crate::overlay::Overlay;
use crate::view::{Base, View};

/// How long a checkpoint waits for handles' reads that are under way.
const PATIENCE: Duration = Duration::from_secs(2);

/// Reads a store while its writer goes on. Clones are cheap, every thread may have one or share
/// one, and no call waits for the writer or for another reader.
///
/// It sees committed rows only: each row it gives is whole, as some commit left it, and a read that
/// begins after [`Store::commit`](crate::Store::commit) returned sees that commit. A read that runs
/// while a commit is being published may see some rows before and some after it. It lives on when
/// the writer is dropped, with what was committed last.
#[derive(Debug, Clone)]
pub struct StoreHandle {
    shared: Arc<HandleShared>,
}

#[derive(Debug)]
struct HandleShared {
    dir: PathBuf,
    epochs: Epochs,
    live: AtomicPtr<LiveRows>,
    generation: AtomicU64,
    len: AtomicU64,
    /// Held once the writer is gone, so that another does not change the slabs under the handles.
    lock: Mutex<Option<ReadersLock>>,
}

impl StoreHandle {
    /// Copies the rows of `ids` to `out`, `[ids.len(), dim]` row-major; a missing
    /// id gives zeros. Returns the number of missing ids, or
    /// [`Error::FileLost`](crate::Error::FileLost).
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<usize> {
        let _pin = self.shared.epochs.pin();
        gather::gather(self.shared.live(), ids, out)
    }

    /// Looks whether every file is whole, also those that nobody reads at the moment. It costs a
    /// system call a file.
    ///
    /// # Errors
    /// [`Error::FileLost`](crate::Error::FileLost) with the first file that was cut.
    pub fn check_files(&self) -> Result<()> {
        let _pin = self.shared.epochs.pin();
        gather::check_files(self.shared.live())
    }

    /// Whether `id` has a row.
    pub fn contains(&self, id: u64) -> bool {
        let _pin = self.shared.epochs.pin();
        let live = self.shared.live();
        let is_there =
            |row| row != NONE && !matches!(live.place(row), gather::ValueLocation::Missing);
        is_there(live.base().index.find(id)) || is_there(live.find_young(id))
    }

    /// Ids that have a row.
    pub fn len(&self) -> usize {
        self.shared.len.load(Acquire) as usize
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The width of a row, in values.
    pub fn dim(&self) -> usize {
        let _pin = self.shared.epochs.pin();
        self.shared.live().base().shape.dim
    }

    /// A generation whose commit is wholly visible.
    pub fn generation(&self) -> u64 {
        self.shared.generation.load(Acquire)
    }
}

impl HandleShared {
    /// What there is to read. The caller is within an epoch, or the writer.
    #[inline]
    fn live(&self) -> &LiveRows {
        // SAFETY: it lives until it is replaced and every reader from before has left its epoch.
        unsafe { &*self.live.load(Acquire) }
    }
}

impl Drop for HandleShared {
    fn drop(&mut self) {
        // SAFETY: it came from a box, and no handle and no writer is left.
        drop(unsafe { Box::from_raw(*self.live.get_mut()) });
    }
}

/// The writer's side of its handles.
#[derive(Debug)]
pub(crate) struct HandlePublisher {
    shared: Arc<HandleShared>,
    /// Earlier checkpoints' rows, by the epoch in which they were replaced.
    past: Vec<(u64, Box<LiveRows>)>,
}

impl HandlePublisher {
    /// Publishes what `view` shows, which must be committed, upon `base`.
    pub fn new(dir: &Path, base: Base, view: &View, generation: u64) -> HandlePublisher {
        let shared = HandleShared {
            dir: dir.to_owned(),
            epochs: Epochs::default(),
            live: AtomicPtr::new(Box::into_raw(Box::new(LiveRows::new(base)))),
            generation: AtomicU64::new(generation),
            len: AtomicU64::new(view.len() as u64),
            lock: Mutex::new(None),
        };
        let published = HandlePublisher { shared: Arc::new(shared), past: Vec::new() };
        for at in 0..view.overlay.len() {
            published.publish_row(&view.overlay, at);
        }
        published.publish_young(published.shared.live(), view);
        published
    }

    /// Another handle on the same store, for another thread.
    pub fn handle(&self) -> StoreHandle {
        StoreHandle { shared: Arc::clone(&self.shared) }
    }

    /// Whether any handle is left.
    pub fn is_read(&self) -> bool {
        Arc::strong_count(&self.shared) > 1
    }

    /// Publishes the dirty rows of `view`, which were just committed. Rows come before the ids
    /// that lead to them, and removals last, so an id whose row is exchanged is never missing.
    pub fn commit(&mut self, view: &View, generation: u64) {
        let (live, overlay) = (self.shared.live(), &view.overlay);
        let (removed, set): (Vec<usize>, Vec<usize>) =
            overlay.dirty().partition(|&at| overlay.is_removed(at));
        set.iter().for_each(|&at| self.publish_row(overlay, at));
        for at in set {
            let entry = overlay.entry(at);
            if live.base().index.find(entry.id) != entry.row {
                live.publish_id(entry.id, entry.row, &self.shared.epochs);
            }
        }
        removed.iter().for_each(|&at| self.publish_row(overlay, at));
        self.shared.len.store(view.len() as u64, Release);
        self.shared.generation.store(generation, Release);
        self.collect();
    }

    /// Waits until no reader can come by a row of the slabs that has a version above. False if one
    /// takes too long.
    pub fn settle(&self) -> bool {
        self.shared.epochs.wait(PATIENCE)
    }

    /// Replaces the slabs and versions by what a checkpoint has made of them.
    pub fn rebase(&mut self, view: &View) {
        let live = LiveRows::new(view.base.clone());
        self.publish_young(&live, view);
        let old = self.shared.live.swap(Box::into_raw(Box::new(live)), Release);
        // SAFETY: it came from a box, and nobody finds it here any more; readers who have it are
        // waited for.
        let old = unsafe { Box::from_raw(old) };
        self.past.push((self.shared.epochs.current(), old));
        self.collect();
    }

    fn publish_row(&self, overlay: &Overlay, at: usize) {
        let values = (!overlay.is_removed(at)).then(|| overlay.values(at));
        self.shared.live().publish(overlay.entry(at).row, values, &self.shared.epochs);
    }

    fn publish_young(&self, live: &LiveRows, view: &View) {
        for (id, row) in view.young() {
            live.publish_id(id, row, &self.shared.epochs);
        }
    }

    fn collect(&mut self) {
        let epochs = &self.shared.epochs;
        epochs.advance();
        epochs.advance();
        self.past.retain(|(epoch, _)| !epochs.is_past(*epoch));
        self.shared.live().collect(epochs);
    }
}

impl Drop for HandlePublisher {
    fn drop(&mut self) {
        if self.is_read() {
            // This is the writer, which is not in a checkpoint, so nobody has the lock and it does
            // not wait. If it fails, the handles' rows are at the mercy of another writer's
            // checkpoint; there is nobody to tell.
            if let (Ok(lock), Ok(mut slot)) =
                (ReadersLock::shared(&self.shared.dir), self.shared.lock.lock())
            {
                *slot = Some(lock);
            }
        }
        if self.shared.epochs.wait(PATIENCE) {
            self.past.clear();
        }
        for (_, live) in self.past.drain(..) {
            // A read of seconds is still under way: rather lose this memory than its rows.
            Box::leak(live);
        }
    }
}

const _: () = {
    const fn is_shared<T: Send + Sync + Clone>() {}
    is_shared::<StoreHandle>();
};
