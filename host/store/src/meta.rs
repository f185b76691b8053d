//! `meta.json`: what a store was made with. It is written once, last of all
//! files, so a directory without it never was a complete store.

use std::fs;
use std::path::{Path, PathBuf};

use hypercast_core::atomic_file;
use serde::{Deserialize, Serialize};

use crate::error::{Result, corrupt, io};
use crate::slab::{ROWS_PER_SLAB, RowShape};
use crate::{Error, RowFormat, StoreOptions};

/// The version of every file of a store.
pub(crate) const FORMAT_VERSION: u64 = 2;
const MAX_DIM: usize = 4096;

/// What a store is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StoreKind {
    /// Has optimizer state.
    Training,
    /// A snapshot without it.
    Inference,
}

/// The content of `meta.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Meta {
    pub format_version: u64,
    pub kind: StoreKind,
    pub dim: usize,
    pub row_format: RowFormat,
    pub init_scale: f32,
    pub seed: u64,
    pub rows_per_slab: usize,
    /// CRC-32 of this object's compact JSON with a 0 here.
    pub crc32: u32,
}

impl Meta {
    /// The meta of a new store, if the options are in range.
    pub fn new(options: &StoreOptions, kind: StoreKind, row_format: RowFormat) -> Result<Meta> {
        let &StoreOptions { dim, init_scale, seed } = options;
        if !(1..=MAX_DIM).contains(&dim) {
            return Err(Error::Options(format!("dim is {dim}, it must be 1 to {MAX_DIM}")));
        }
        if !(init_scale.is_finite() && init_scale >= 0.0) {
            return Err(Error::Options(format!(
                "init_scale is {init_scale}, it must be finite and at least 0"
            )));
        }
        let mut meta = Meta {
            format_version: FORMAT_VERSION,
            kind,
            dim,
            row_format,
            init_scale,
            seed,
            rows_per_slab: ROWS_PER_SLAB,
            crc32: 0,
        };
        meta.crc32 = meta.checksum();
        Ok(meta)
    }

    /// The options it records.
    pub fn options(&self) -> StoreOptions {
        StoreOptions { dim: self.dim, init_scale: self.init_scale, seed: self.seed }
    }

    /// What its rows are like.
    pub fn shape(&self) -> RowShape {
        RowShape { dim: self.dim, format: self.row_format }
    }

    /// Whether `dir` has a `meta.json`.
    pub fn exists(dir: &Path) -> bool {
        path(dir).exists()
    }

    /// Reads and checks `dir`'s.
    pub fn read(dir: &Path) -> Result<Meta> {
        /// The version comes first, since another version's fields are unknown.
        #[derive(Deserialize)]
        struct FormatVersion {
            format_version: u64,
        }
        let path = path(dir);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NotAStore { path: dir.to_owned() });
            }
            Err(e) => return Err(io("read", &path)(e)),
        };
        let damaged = |e: serde_json::Error| corrupt(&path, e.to_string());
        let FormatVersion { format_version: found } =
            serde_json::from_slice(&text).map_err(damaged)?;
        if found != FORMAT_VERSION {
            return Err(Error::Version { path, found, supported: FORMAT_VERSION });
        }
        let meta: Meta = serde_json::from_slice(&text).map_err(damaged)?;
        if meta.crc32 != meta.checksum() {
            return Err(corrupt(&path, "its checksum does not match"));
        }
        if meta.rows_per_slab != ROWS_PER_SLAB {
            return Err(corrupt(&path, "rows_per_slab is not this version's"));
        }
        Ok(meta)
    }

    /// Writes it into `dir`, whole or not at all.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = path(dir);
        let text = serde_json::to_string_pretty(self).expect("plain numbers serialise") + "\n";
        atomic_file::write(&path, text.as_bytes()).map_err(io("write", &path))
    }

    fn checksum(&self) -> u32 {
        let bare = Meta { crc32: 0, ..self.clone() };
        crc32fast::hash(&serde_json::to_vec(&bare).expect("plain numbers serialise"))
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join("meta.json")
}
