//! Copies of a store: inference pruning leaves optimizer state out, a saved run keeps
//! it. A copy is written beside its place and renamed into it, so it is there whole or not at all.

use std::fs;
use std::path::Path;

use hypercast_core::atomic_dir;

use crate::error::{Result, io};
use crate::index;
use crate::journal::{Journal, JournalHead};
use crate::lock::ReadersLock;
use crate::meta::{Meta, StoreKind};
use crate::slab::{ROWS_PER_SLAB, RowShape, SlabId, slabs_for};
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
        index::build(partial, rows, ids, &[], || view.base.check_always_whole())?;
        Journal::create(partial, reader.dim(), JournalHead::folded(reader.generation(), rows))?;
        ReadersLock::create(partial)?;
        Meta::new(&reader.options(), StoreKind::Inference, format)?.write(partial)
    })
}

/// Copies every file of the store in `from` but its locks. The caller holds the writer lock and has
/// committed, so the files do not change meanwhile; `check` says at the end whether they are whole.
pub(crate) fn copy(from: &Path, dir: &Path, check: impl FnOnce() -> Result<()>) -> Result<()> {
    into_place(dir, |partial| {
        for entry in fs::read_dir(from).map_err(io("read", from))? {
            let path = entry.map_err(io("read", from))?.path();
            let name = path.file_name().expect("an entry of a directory has a name");
            let kind = path.extension().unwrap_or_default();
            if path.is_file() && kind != "lock" && kind != "partial" {
                let to = partial.join(name);
                let copied = fs::copy(&path, &to).map_err(io("copy", &path))?;
                if fs::metadata(&path).map_err(io("read", &path))?.len() != copied {
                    let what = "it was cut off while it was copied".into();
                    return Err(Error::FileLost { path, what });
                }
            }
        }
        check()?;
        ReadersLock::create(partial)
    })
}

/// Fills a folder beside `dir`, which must not exist or be empty, and gives it that name.
fn into_place(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    refuse_nonempty(dir)?;
    atomic_dir::replace(dir, fill)
}

fn write_rows(view: &View, dir: &Path, shape: RowShape) -> Result<()> {
    let mut values = vec![0.0; shape.dim];
    let mut rows = view.ids_and_rows();
    for number in 0..slabs_for(view.len()) {
        let writing = Writing { fresh: true, rows: ROWS_PER_SLAB };
        let mut slab = RowSlabWriter::open(dir, SlabId { number, shape }, writing)?;
        for (at, (id, row)) in rows.by_ref().take(ROWS_PER_SLAB).enumerate() {
            view.copy_row(row, &mut values)?;
            slab.set(at, id, &values)?;
        }
        slab.target.sync()?;
    }
    Ok(())
}

fn refuse_nonempty(dir: &Path) -> Result<()> {
    match fs::read_dir(dir).map(|mut entries| entries.next()) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(Error::AlreadyExists { path: dir.to_owned(), what: "other files" }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io("read", dir)(error)),
    }
}
