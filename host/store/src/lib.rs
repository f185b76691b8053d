//! The embedding store: memory-mapped rows by 64-bit id, with row-wise Adagrad state apart and
//! crash-safe commits, read without locks beside its one writer. It sits below the model and knows
//! nothing of tables, features or experts. It deliberately does not send deltas anywhere, nor
//! decide which ids matter: it tells what changed, and admits and expires rows as its caller says.
//!
//! # Layout of a store's directory
//!
//! - `meta.json`: format version, kind (training or inference), dim, row format, init scale, seed,
//!   checksum.
//! - `rows-NNNNN.slab`: 65536 rows: values (f32, bf16, or int8 with a scale), then ids, then a
//!   checksum for each row.
//! - `state-NNNNN.slab`: 65536 row-wise Adagrad accumulators with the generation and clock of the
//!   last change, each with a checksum. Serving never opens it.
//! - `index.table`: buckets of one cache line from exact id to row number, with checksums, and the
//!   free rows. It is never changed but replaced as a whole, and rebuilt from the rows if deleted.
//! - `admission.sketch`: counters of ids without a row, where ids are admitted late.
//! - `journal`: one checksummed head, then the rows of each commit since the last checkpoint.
//! - `writer.lock`, `readers.lock`: file locks, which the kernel drops when a process dies.
//!
//! A row keeps its number for life, so index, values and state are joined by it, and another width
//! or another column (counts, scales) is another slab. When an id is removed, its row's number goes
//! to a new id only after a checkpoint has made an index without it: until then somebody may still
//! come by the number.
//!
//! # Commits: a redo journal
//!
//! Slabs are never changed between checkpoints. An update goes to an
//! in-memory *overlay*: a row's first change copies it there, and a dense array
//! from row number to overlay position finds it again, so training costs no
//! system call and no page fault of a file. [`Store::commit`] appends the rows changed since
//! the last commit to the journal, syncs, and then overwrites the journal's
//! 64-byte head (generation, row count, end of the valid bytes), and syncs
//! again. That one write within one disk sector is the commit: before it, the
//! bytes past the old end mean nothing; after it, they are complete. So a bad
//! checksum below the end is always damage and never a torn write, and is
//! reported instead of being cut off.
//!
//! When the journal has grown to a quarter of the slabs (at least 128 MiB, at most 1 GiB), a
//! *checkpoint* copies the overlay into the slabs, makes another index if many ids are new or any
//! was removed, syncs, and then resets the head. A crash on the way leaves the journal in force: it
//! holds every row that the checkpoint was writing, so whatever the slabs hold for those rows is
//! not looked at; and an index that is newer than the slabs leads to rows that the journal has.
//!
//! Why redo and not undo or shadow pages: an undo journal must be synced
//! before a page is first changed, in the middle of training, and grows by pages where
//! embeddings change by rows (4096 bytes for 132); it also lets readers see
//! uncommitted rows. With redo, slabs change only in a checkpoint, so
//! a reader's view is stable by construction.
//!
//! # Readers of the same process
//!
//! A [`StoreHandle`] reads beside the writer, from any number of threads, and never waits: not for
//! a commit, a checkpoint, or growth. It sees committed rows only. A commit publishes each changed
//! row as a new immutable version, found through a bitmap that stays in the cache (a row without a
//! version costs no miss) and one pointer; a version is used again once every reader that could see
//! it has left its epoch. Versions that never change, and not a version word that a reader checks
//! before and after its copy, so that a copy is made once, at full speed, and cannot be torn. A
//! checkpoint writes only rows that have versions, after the readers from before these have gone;
//! so the same versions shield readers from the slabs' change. Memory is that of the overlay a
//! second time, while there are handles.
//!
//! A read goes through a batch in stages, prefetched some rows ahead: one cache line of the index,
//! then where the row lies, then the row. So many cache misses overlap, and going through the index
//! costs little more than knowing the rows' places. Large batches use two threads. Where rows are
//! larger than memory, the disk is asked first for all pages of a batch, or of each 4096 ids of a
//! larger one, in their order in the files, so that it has many requests at a time; but only while
//! asking pays, which is while rows do come from the disk. Give such a store batches of hundreds of
//! ids; one of fewer than 16 never asks.
//!
//! # Readers of other processes
//!
//! A [`StoreReader`] maps the slabs, reads the journal into an overlay of its own, and so sees
//! exactly the generation committed last when it was opened, whatever a writer does
//! meanwhile. While such readers are open, checkpoints wait and the journal grows; 1 GiB past where
//! it would be folded, [`Store::commit`] refuses with [`Error::JournalHeld`], unless the writer's
//! own process has them ([`Store::reader`]). A long-lived server should serve a snapshot
//! ([`Store::snapshot_into`]), whose rows may be bf16 or int8; a [`ServingStore`] takes newer rows
//! into it, with commits, checkpoints and handles as above.
//!
//! # Integrity and limits
//!
//! Opening reads the whole store once and checks every checksum, or with [`Verify::Journal`] only
//! what can be torn; [`check`] reports all damage. No open needs the store in memory: slabs and
//! index are mapped, and where they are larger than memory, pages are read singly. In memory are
//! the overlay, the ids younger than the index (at most a sixteenth), and a bit a row while
//! verifying. Files are little-endian, and a store must lie on a local disk of a POSIX system,
//! where file locks work. At most 2³² − 2 rows and 2³² − 1 generations, dim at most 4096. The
//! overlay takes about 4·dim + 40 bytes for each distinct row changed since the last checkpoint.
//!
//! # Files that are cut while they are mapped
//!
//! A file that others cut under its mapping does not end the process. Reads of that store fail with
//! [`Error::FileLost`], which names the file, and so do commits. A reader or handle maps the file
//! again at the next read once it has its length and all its checksums again; a writer must be
//! opened again, since what it read may have been zeros. What is made of mapped files and lasts (an
//! index, a snapshot, a copy) takes its place only if they were whole after the last read, and rows
//! of a snapshot only if they have their checksums.

#[cfg(not(all(unix, target_endian = "little")))]
compile_error!("the store maps little-endian files and needs a POSIX system");

mod check;
mod checkpoint;
mod epoch;
mod error;
mod fault_guard;
mod format;
mod gather;
mod handle;
mod header;
mod index;
mod journal;
mod live;
mod lock;
mod mapped_file;
mod memory;
mod meta;
mod overlay;
mod read_ahead;
mod reader;
mod serving;
mod sketch;
mod slab;
mod slab_writer;
mod snapshot;
mod store;
mod view;
mod writer;

pub use check::{StoreCheck, check};
pub use error::{Damage, Error, Result};
pub use format::RowFormat;
pub use handle::StoreHandle;
pub use reader::StoreReader;
pub use serving::ServingStore;
pub use store::Store;

/// How much of a store is checked when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// Every checksum of every file: the store is read once from end to end.
    #[default]
    Full,
    /// The files' headers and sizes and the journal. Damage within slabs or index may go unnoticed,
    /// so run [`check`] now and then.
    Journal,
}

/// What a new store is made with. It is fixed for the store's life.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StoreOptions {
    /// Values a row, from 1 to 4096.
    pub dim: usize,
    /// A new row's values are uniform in `[-init_scale, init_scale)`.
    pub init_scale: f32,
    /// With the id, decides a new row's values.
    pub seed: u64,
}

/// The hyper-parameters of row-wise Adagrad.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adagrad {
    /// The step size.
    pub learning_rate: f32,
    /// Added to the root of the accumulator.
    pub epsilon: f32,
}
