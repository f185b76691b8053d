//! Embedding bags on wgpu against the host's.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorData, f16};
use burn_cubecl::CubeBackend;
use burn_wgpu::{Wgpu, WgpuRuntime};
use hypercast_kernels::attention::HstuBackend;
use hypercast_kernels::embedding_bag::{EmbeddingBags, embedding_bag};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::assert_close;
use crate::gpu::adapter;

type Gpu = Wgpu<f32, i32, u32>;
type HalfGpu = CubeBackend<WgpuRuntime, f16, i32, u32>;

/// Random bags of up to four rows, some without any; or of one each.
fn bags(random: &mut SmallRng, of_one: bool) -> EmbeddingBags {
    let (rows, bags) = (random.random_range(1..40), random.random_range(1..300));
    if of_one {
        let index = (0..bags).map(|_| random.random_range(0..rows as u32)).collect();
        return EmbeddingBags::of_one(rows, index);
    }
    let (mut offsets, mut index) = (vec![0], Vec::new());
    for _ in 0..bags {
        index.extend((0..random.random_range(0..5)).map(|_| random.random_range(0..rows as u32)));
        offsets.push(index.len() as u32);
    }
    EmbeddingBags::new(rows, offsets, index)
}

fn numbers(random: &mut SmallRng, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

/// The means and the gradient of the table on a backend.
fn both<B: HstuBackend>(
    bags: &Arc<EmbeddingBags>,
    table: &[f32],
    gradient: &[f32],
) -> [Vec<f32>; 2] {
    let device = Default::default();
    let dim = table.len() / bags.rows();
    let matrix = |values: &[f32]| {
        let data = TensorData::new(values.to_vec(), [values.len() / dim, dim]);
        Tensor::<Autodiff<B>, 2>::from_data(data, &device)
    };
    let leaf = matrix(table).require_grad();
    let means = embedding_bag(leaf.clone(), bags);
    let gradients = (means.clone() * matrix(gradient)).sum().backward();
    let read = |data: TensorData| data.convert::<f32>().to_vec::<f32>().unwrap();
    [read(means.into_data()), read(leaf.grad(&gradients).unwrap().into_data())]
}

#[test]
fn random_bags_are_those_of_the_host() {
    if !adapter() {
        return;
    }
    let random = &mut SmallRng::seed_from_u64(7);
    for case in 0..40 {
        let bags = Arc::new(bags(random, case % 2 == 0));
        let dim = random.random_range(1..40);
        let table = numbers(random, bags.rows() * dim);
        let gradient = numbers(random, bags.bags() * dim);
        let expected = [bags.forward(&table, dim), bags.backward(&gradient, dim)];
        let found = both::<Gpu>(&bags, &table, &gradient);
        for ((what, found), expected) in ["means", "gradient"].iter().zip(&found).zip(&expected) {
            assert_close(&format!("{what} of case {case}"), found, &wide(expected), 1e-6);
        }
        let found = both::<HalfGpu>(&bags, &table, &gradient);
        for ((what, found), expected) in ["means", "gradient"].iter().zip(&found).zip(&expected) {
            assert_close(&format!("f16 {what} of case {case}"), found, &wide(expected), 4e-3);
        }
    }
}

#[test]
fn more_values_than_one_axis_of_workgroups_has_room_for_are_all_written() {
    if !adapter() {
        return;
    }
    const DIM: usize = 64;
    let random = &mut SmallRng::seed_from_u64(8);
    let index = (0..300_000).map(|_| random.random_range(0..50)).collect();
    let bags = Arc::new(EmbeddingBags::of_one(50, index));
    let table = numbers(random, 50 * DIM);
    let rows =
        Tensor::<Gpu, 2>::from_data(TensorData::new(table.clone(), [50, DIM]), &Default::default());
    let found: Vec<f32> = embedding_bag(rows, &bags).into_data().to_vec().unwrap();
    assert!(found == bags.forward(&table, DIM));
}
