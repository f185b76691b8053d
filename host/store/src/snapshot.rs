//! Copies of a store: inference pruning leaves optimizer state out, a saved run keeps
//! it. A copy is written beside its place and renamed into it, so it is there whole or not at all.

use std::fs;
use std::path::Path;

use hypercast_core::atomic_file;

use crate::error::{Result, io};
use crate::header::sync_dir;
use crate::index::{self, IndexContents};
use crate::journal::{Journal, JournalHead};
use crate::lock::ReadersLock;
use crate::meta::{Meta, StoreKind};
use crate::slab::{ROWS_PER_SLAB, RowShape, SlabId};
use crate::slab_writer::{RowSlabWriter, Writing};
use crate::view::View;
use crate::{Error, RowFormat, StoreReader};

/// Writes what `reader` sees, which is `view`, into `dir`, its rows in `format` and without gaps.
pub(crate) fn write(
    reader: &StoreReader,
    view: &View,
    dir: &Path,
    format: RowFormat,
) -> Result<()> {
    into_place(dir, |partial| {
        write_rows(view, partial, RowShape { dim: reader.dim(), format })?;
        let rows = view.len();
        let ids = view.ids_and_rows().map(|(id, _)| id).zip(0..);
        index::build(partial, IndexContents { rows, ids, free: &[] })?;
        Journal::create(partial, reader.dim(), JournalHead::folded(reader.generation(), rows))?;
        ReadersLock::create(partial)?;
        Meta::new(&reader.options(), StoreKind::Inference, format)?.write(partial)
    })
}

/// Copies every file of the store in `from` but its locks. The caller holds the writer lock and has
/// committed, so the files do not change meanwhile.
pub(crate) fn copy(from: &Path, dir: &Path) -> Result<()> {
    into_place(dir, |partial| {
        for entry in fs::read_dir(from).map_err(io("read", from))? {
            let path = entry.map_err(io("read", from))?.path();
            let name = path.file_name().expect("an entry of a directory has a name");
            let kind = path.extension().unwrap_or_default();
            if path.is_file() && kind != "lock" && kind != "partial" {
                let to = partial.join(name);
                fs::copy(&path, &to).map_err(io("copy", &path))?;
                fs::File::open(&to).and_then(|file| file.sync_all()).map_err(io("sync", &to))?;
            }
        }
        ReadersLock::create(partial)?;
        sync_dir(partial)
    })
}

/// Fills a folder beside `dir`, which must not exist or be empty, and gives it that name.
fn into_place(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    refuse_nonempty(dir)?;
    let partial = atomic_file::draft_path(dir);
    if partial.exists() {
        // Left by a copy that was cut off.
        fs::remove_dir_all(&partial).map_err(io("remove", &partial))?;
    }
    fs::create_dir_all(&partial).map_err(io("create", &partial))?;
    fill(&partial)?;
    atomic_file::rename(&partial, dir).map_err(io("rename to", dir))
}

fn write_rows(view: &View, dir: &Path, shape: RowShape) -> Result<()> {
    let mut values = vec![0.0; shape.dim];
    let mut slab: Option<RowSlabWriter> = None;
    for (to, (id, row)) in view.ids_and_rows().enumerate() {
        let at = to % ROWS_PER_SLAB;
        if at == 0 {
            slab.take().map_or(Ok(()), RowSlabWriter::sync)?;
        }
        let slab = match &mut slab {
            Some(slab) => slab,
            None => {
                let id = SlabId { number: to / ROWS_PER_SLAB, shape };
                slab.insert(RowSlabWriter::open(
                    dir,
                    id,
                    Writing { fresh: true, rows: ROWS_PER_SLAB },
                )?)
            }
        };
        view.copy_row(row, &mut values);
        slab.set(at, id, &values)?;
    }
    slab.map_or(Ok(()), RowSlabWriter::sync)
}

fn refuse_nonempty(dir: &Path) -> Result<()> {
    let what = match fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            None => return Ok(()),
            Some(_) => "other files",
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io("read", dir)(e)),
    };
    Err(Error::AlreadyExists { path: dir.to_owned(), what })
}
