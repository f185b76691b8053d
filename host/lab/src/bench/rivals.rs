//! Other embedded stores with the same rows, for `hypercast-lab bench store`: redb, LMDB (through
//! heed) and fjall. Each is loaded in the order of its keys, which suits it best, with a cache as
//! large as its rows, and read in one transaction per batch. Only the feature `rivals` builds them.

use std::path::Path;

use hypercast_store::StoreReader;

use crate::error::{CommonErrors as _, Error, Result};

/// A read of a batch, as [`StoreReader::gather`].
pub(super) type RivalRead<'a> = dyn FnMut(&[u64], &mut [f32]) -> usize + 'a;

/// Measures a store that is open for reading.
pub(super) type Measure<'a> = dyn FnMut(&mut RivalRead<'_>) -> RivalResult + 'a;

/// What a rival returns: each has error types of its own.
type RivalResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Ids and their rows as bytes, by rising ids.
type EncodedRows<'a> = dyn Iterator<Item = (u64, Vec<u8>)> + 'a;

/// An embedded store to compare with ours.
pub(super) struct RivalStore {
    pub name: &'static str,
    load: fn(&Path, &mut EncodedRows<'_>) -> RivalResult,
    with_reader: fn(&Path, &mut Measure<'_>) -> RivalResult,
}

impl RivalStore {
    /// Copies the first `rows` rows of our store into `dir`.
    pub fn load(&self, dir: &Path, from: &StoreReader, rows: usize) -> Result<()> {
        let mut ids: Vec<u64> = (0..rows).map(super::store::id).collect();
        ids.sort_unstable();
        let mut values = vec![0.0; super::store::DIM];
        let mut rows = ids.iter().map(|&id| {
            from.gather(&[id], &mut values).expect(super::store::WHOLE);
            (id, values.iter().flat_map(|value| value.to_le_bytes()).collect())
        });
        (self.load)(dir, &mut rows).map_err(|error| self.failed(&*error))
    }

    /// Opens the store for reading and measures it.
    pub fn with_reader(&self, dir: &Path, measure: &mut Measure<'_>) -> Result<()> {
        (self.with_reader)(dir, measure).map_err(|error| self.failed(&*error))
    }

    fn failed(&self, error: &dyn std::error::Error) -> Error {
        Error::internal(format!("{}: {error}", self.name))
    }
}

/// The stores that are built in.
pub(super) fn all() -> Vec<RivalStore> {
    #[cfg(feature = "rivals")]
    return built_in::all();
    #[cfg(not(feature = "rivals"))]
    Vec::new()
}

#[cfg(feature = "rivals")]
mod built_in {
    use std::path::Path;

    use fjall::{Database as FjallDatabase, Keyspace, KeyspaceCreateOptions};
    use heed::types::{Bytes, U64};
    use heed::{CommitOrAbort, Database, Env, EnvOpenOptions};
    use redb::{ReadableDatabase, TableDefinition};

    use super::{EncodedRows, Measure, RivalResult, RivalStore};

    const CACHE_BYTES: usize = 4 << 30;

    pub(super) fn all() -> Vec<RivalStore> {
        vec![
            RivalStore { name: "redb", load: load_redb, with_reader: with_redb },
            RivalStore { name: "LMDB (heed)", load: load_lmdb, with_reader: with_lmdb },
            RivalStore { name: "fjall", load: load_fjall, with_reader: with_fjall },
        ]
    }

    fn copy(bytes: &[u8], out: &mut [f32]) {
        for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*bytes);
        }
    }

    /// Copies the rows that `get` finds; returns the number of missing ids.
    fn gather<E: std::fmt::Debug>(
        ids: &[u64],
        out: &mut [f32],
        mut get: impl FnMut(u64, &mut [f32]) -> std::result::Result<bool, E>,
    ) -> usize {
        let dim = out.len() / ids.len();
        let found = ids.iter().zip(out.chunks_exact_mut(dim)).map(|(&id, out)| get(id, out));
        found.filter(|found| !found.as_ref().expect("a rival reads what it has written")).count()
    }

    const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("rows");

    fn redb(dir: &Path) -> RivalResult<redb::Database> {
        let mut builder = redb::Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        Ok(builder.create(dir.join("redb"))?)
    }

    fn load_redb(dir: &Path, rows: &mut EncodedRows<'_>) -> RivalResult {
        let db = redb(dir)?;
        let write = db.begin_write()?;
        {
            let mut table = write.open_table(TABLE)?;
            for (id, row) in rows {
                table.insert(id, row.as_slice())?;
            }
        }
        Ok(write.commit()?)
    }

    fn with_redb(dir: &Path, measure: &mut Measure<'_>) -> RivalResult {
        let db = redb(dir)?;
        measure(&mut |ids, out| {
            let table = db.begin_read().map(|read| read.open_table(TABLE));
            let table = table.expect("it opens").expect("it has the table");
            gather(ids, out, |id, out| {
                table.get(id).map(|row| row.map(|row| copy(row.value(), out)).is_some())
            })
        })
    }

    fn lmdb(dir: &Path) -> RivalResult<Env> {
        // SAFETY: the folder is temporary and private to this bench, so nothing else truncates the
        // file.
        Ok(unsafe { EnvOpenOptions::new().map_size(64 << 30).open(dir)? })
    }

    type LmdbRows<'a> = Database<'a, U64<heed::byteorder::BigEndian>, Bytes>;

    fn lmdb_rows(env: &Env) -> RivalResult<LmdbRows<'_>> {
        let made = env.create_databases_and_commit(env.write_txn()?, |opener, write| {
            opener.create_database(write, None).map(CommitOrAbort::<_, ()>::Commit)
        })?;
        Ok(made.unwrap_commit())
    }

    fn load_lmdb(dir: &Path, rows: &mut EncodedRows<'_>) -> RivalResult {
        let env = lmdb(dir)?;
        let table = lmdb_rows(&env)?;
        let mut write = env.write_txn()?;
        for (id, row) in rows {
            table.put(&mut write, &id, &row)?;
        }
        Ok(write.commit()?)
    }

    fn with_lmdb(dir: &Path, measure: &mut Measure<'_>) -> RivalResult {
        let env = lmdb(dir)?;
        let table = lmdb_rows(&env)?;
        measure(&mut |ids, out| {
            let read = env.read_txn().expect("it opens");
            gather(ids, out, |id, out| {
                table.get(&read, &id).map(|row| row.map(|row| copy(row, out)).is_some())
            })
        })
    }

    fn fjall(dir: &Path) -> RivalResult<(FjallDatabase, Keyspace)> {
        let db = FjallDatabase::builder(dir.join("fjall")).cache_size(CACHE_BYTES as u64).open()?;
        let rows = db.keyspace("rows", KeyspaceCreateOptions::default)?;
        Ok((db, rows))
    }

    fn load_fjall(dir: &Path, rows: &mut EncodedRows<'_>) -> RivalResult {
        let (_db, table) = fjall(dir)?;
        for (id, row) in rows {
            table.insert(id.to_be_bytes(), row)?;
        }
        table.rotate_memtable_and_wait()?;
        Ok(table.major_compact()?)
    }

    fn with_fjall(dir: &Path, measure: &mut Measure<'_>) -> RivalResult {
        let (_db, table) = fjall(dir)?;
        measure(&mut |ids, out| {
            gather(ids, out, |id, out| {
                table.get(id.to_be_bytes()).map(|row| row.map(|row| copy(&row, out)).is_some())
            })
        })
    }
}
