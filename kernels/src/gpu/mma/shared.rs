//! Tiles of matrices in shared memory: copying them and waiting for the copies.

use cubecl::prelude::barrier::{Barrier, copy_async_checked};
use cubecl::prelude::*;

use super::plan::{CHUNK_BYTES, MmaPlan};
use crate::gpu::tile::{TileColumns, TileRows};

/// Rows of a matrix in shared memory, each padded by 16 bytes.
#[derive(CubeType)]
pub(super) struct Tile<E: Float> {
    pub(super) memory: SharedMemory<E>,
    #[cube(comptime)]
    pub(super) width: usize,
    /// Elements from one row to the next.
    #[cube(comptime)]
    pub(super) pitch: usize,
}

#[cube]
pub(super) fn tile<E: Float>(
    #[comptime] rows: usize,
    #[comptime] width: usize,
    #[comptime] plan: MmaPlan,
) -> Tile<E> {
    let pitch = comptime!(width + plan.chunk);
    let memory = SharedMemory::<E>::new_aligned(comptime!(rows * pitch), CHUNK_BYTES);
    Tile::<E> { memory, width, pitch }
}

/// The part of a matrix that a tile is filled with.
#[derive(CubeType, Clone, Copy)]
pub(super) struct SharedSource {
    pub(super) rows: TileRows,
    pub(super) columns: TileColumns,
}

#[cube]
impl<E: Float> Tile<E> {
    /// Copies `count` rows into the tile's rows from `at` on, with zeros for missing rows
    /// and columns. An asynchronous copy has arrived once an `Arrival` was waited for.
    pub(super) fn fill(
        &mut self,
        matrix: &Tensor<E>,
        source: SharedSource,
        at: u32,
        #[comptime] count: usize,
        #[comptime] plan: MmaPlan,
    ) {
        let length = comptime!(plan.chunk);
        let chunks_a_row = comptime!((self.width / length) as u32);
        let chunks = comptime!(count as u32 * chunks_a_row);
        let mut chunk = UNIT_POS;
        while chunk < chunks {
            let row = chunk / chunks_a_row;
            let column = (chunk % chunks_a_row) * comptime!(length as u32);
            let inside = row < source.rows.count;
            let left =
                select(inside, source.columns.count - column.min(source.columns.count), 0u32);
            let left = left.min(comptime!(length as u32)) as usize;
            // Where nothing is left nothing is read, but an address must be valid all the same.
            let start = (source.rows.first + row) as usize * matrix.stride(0)
                + (source.columns.first + column) as usize;
            let start = select(left > 0, start, 0usize);
            let to = (at + row) as usize * self.pitch + column as usize;
            if comptime!(plan.asynchronous) {
                copy_async_checked(
                    &matrix.slice(start, start + left),
                    &mut self.memory.slice_mut(to, to + length),
                    comptime!(length as u32),
                );
            } else {
                for i in 0..length {
                    let mut value = E::from_int(0);
                    if i < left {
                        value = matrix[start + i];
                    }
                    self.memory[to + i] = value;
                }
            }
            chunk += CUBE_DIM;
        }
    }
}

/// Synchronises the workgroup's asynchronous copies with their readers.
#[derive(CubeType)]
pub(super) struct Arrival {
    barrier: ComptimeOption<Shared<Barrier>>,
}

#[cube]
pub(super) fn arrival(#[comptime] plan: MmaPlan) -> Arrival {
    let barrier = match comptime!(plan.asynchronous) {
        true => ComptimeOption::new_Some(Barrier::shared(CUBE_DIM, UNIT_POS == 0)),
        false => ComptimeOption::new_None(),
    };
    Arrival { barrier }
}

#[cube]
impl Arrival {
    /// Makes the next `wait` wait for the copies that the unit began so far.
    pub(super) fn expect(&self) {
        #[comptime]
        match &self.barrier {
            ComptimeOption::Some(barrier) => barrier.commit_copy_async(),
            ComptimeOption::None => {}
        }
    }

    /// Waits for all units, and for what they copied. All must call it together.
    pub(super) fn wait(&self) {
        #[comptime]
        match &self.barrier {
            ComptimeOption::Some(barrier) => barrier.arrive_and_wait(),
            ComptimeOption::None => sync_cube(),
        }
    }
}
