//! Inference pruning: a copy of a generation's rows without optimizer state. It is
//! written beside its place and renamed into it, so it is there whole or not at all.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Result, io};
use crate::header::sync_dir;
use crate::index::IndexWriter;
use crate::journal::{Head, Journal};
use crate::lock::ReadersLock;
use crate::meta::{Kind, Meta};
use crate::slab::{ROWS_PER_SLAB, RowSlab, SlabId, slabs_for};
use crate::view::View;
use crate::{Error, StoreReader};

/// Writes what `reader` sees, which is `view`, into `dir`.
pub(crate) fn write(reader: &StoreReader, view: &View, dir: &Path) -> Result<()> {
    refuse_nonempty(dir)?;
    let partial = partial(dir);
    if partial.exists() {
        // Left by a snapshot that was cut off.
        fs::remove_dir_all(&partial).map_err(io("remove", &partial))?;
    }
    fs::create_dir_all(&partial).map_err(io("create", &partial))?;
    write_rows(view, &partial, reader.dim())?;
    IndexWriter::build(&partial, view.rows(), view.ids())?;
    let head = Head::folded(reader.generation(), view.rows());
    Journal::create(&partial, reader.dim(), head)?;
    ReadersLock::create(&partial)?;
    Meta::new(&reader.options(), Kind::Inference)?.write(&partial)?;
    fs::rename(&partial, dir).map_err(io("rename to", dir))?;
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => sync_dir(Path::new(".")),
    }
}

fn write_rows(view: &View, dir: &Path, dim: usize) -> Result<()> {
    let mut values = vec![0.0; dim];
    for number in 0..slabs_for(view.rows()) {
        let mut slab = RowSlab::open_mut(dir, SlabId { number, dim }, true)?;
        let start = number * ROWS_PER_SLAB;
        for row in start..view.rows().min(start + ROWS_PER_SLAB) {
            view.copy_rows(&[row as u32], &mut values);
            slab.set(row - start, view.id(row as u32), &values);
        }
        slab.sync()?;
    }
    Ok(())
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

fn partial(dir: &Path) -> PathBuf {
    let mut name: OsString = dir.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}
