//! Prepared networks of two linear layers on the CPU, one block of rows at a time: both layers and
//! the linear path read a block while it is in the L1 cache.

use std::ops::Range;

use burn::tensor::TensorMetadata;
use burn_flex::{Flex, FlexTensor};
use rayon::prelude::*;

use super::dense::{BLOCK, PANEL, PARALLEL_FROM, Prepared};
use super::isa::{DetectedIsa, Isa, IsaKernel};
use super::lanes::Lanes;
use super::mlp::load;
use super::product::{Activation, Factor, Matrix, TileBase, multiply, multiply_onto};
use super::{StridedRows, add_to, matrix, readable, rows, values};
use crate::mlp::LinearWeights;
use crate::prepared_mlp::{MlpRows, MlpWeights, PreparedMlp, SharedColumns};

/// The weights of a network of two linear layers.
#[derive(Debug)]
pub struct CpuPreparedMlp {
    hidden: SplitLinear,
    direct: Option<SplitLinear>,
    output: Prepared,
    /// Whether rows have no column of their own. Those of their groups then take that place.
    is_once_a_group: bool,
}

/// The weights of a linear layer, by the columns of its input.
#[derive(Debug)]
struct SplitLinear {
    /// Of the columns that each row has for itself. It has the bias if no column is shared.
    own: Prepared,
    /// Of those that groups of rows share, with the bias.
    shared: Option<Prepared>,
}

impl SplitLinear {
    fn new(
        weight: StridedRows<'_>,
        [from, to]: [usize; 2],
        bias: &[f32],
        shared: Range<usize>,
    ) -> Self {
        let row = |at: usize| &weight.data[at * weight.stride..][..to];
        let part = |rows: &mut dyn Iterator<Item = usize>, bias: &[f32]| {
            let data: Vec<f32> = rows.flat_map(row).copied().collect();
            let from = data.len() / to.max(1);
            Prepared::new(StridedRows { data: &data, stride: to }, [from, to], bias)
        };
        if shared.is_empty() {
            return Self { own: part(&mut (0..from), bias), shared: None };
        }
        let own = part(&mut (0..shared.start).chain(shared.end..from), &[]);
        Self { own, shared: Some(part(&mut shared.clone(), bias)) }
    }

    /// The products of the shared columns, a row a group.
    fn products(&self, shared: StridedRows<'_>, groups: usize, isa: DetectedIsa) -> Matrix {
        let mut products = Matrix::default();
        if let Some(linear) = &self.shared {
            isa.run(SharedProducts { shared, groups, linear, products: &mut products });
        }
        products
    }
}

/// Computes the products of the columns that groups share.
struct SharedProducts<'a> {
    shared: StridedRows<'a>,
    groups: usize,
    linear: &'a Prepared,
    products: &'a mut Matrix,
}

impl IsaKernel for SharedProducts<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let SharedProducts { shared, groups, linear, products } = self;
        products.resize(groups, linear.to);
        let factor = Factor { data: shared, rows: 0..groups, first: 0 };
        let panels = 0..linear.to.div_ceil(PANEL);
        multiply::<V, R>(&factor, linear, panels, Activation::None, |row, panel, values| {
            products.row_mut(row)[panel * PANEL..][..PANEL].copy_from_slice(values);
        });
    }
}

/// The inputs of a network of all rows.
struct MlpInput<'a> {
    own: StridedRows<'a>,
    group_of: &'a [u32],
    /// Products of the shared columns: those of the hidden layer, and of the linear path.
    products: [Matrix; 2],
    added: Option<StridedRows<'a>>,
}

/// Computes a block of rows.
struct PreparedMlpBlock<'a> {
    network: &'a CpuPreparedMlp,
    input: &'a MlpInput<'a>,
    first: usize,
    scratch: &'a mut BlockScratch,
    out: &'a mut [f32],
}

/// Buffers that a thread uses again.
#[derive(Default)]
struct BlockScratch {
    own: Matrix,
    hidden: Matrix,
}

impl IsaKernel for PreparedMlpBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes, const R: usize>(self) {
        let PreparedMlpBlock { network, input, first, scratch, out } = self;
        let CpuPreparedMlp { hidden, direct, output, .. } = network;
        let (to, BlockScratch { own, hidden: activated }) = (output.to, scratch);
        let rows = first..first + out.len() / to;
        load(own, input.own, rows.clone(), hidden.own.from);
        activated.resize(rows.len(), hidden.own.to);
        let factor = own.factor(0..rows.len());
        let [hidden_products, direct_products] = &input.products;
        let base = |linear: &'_ SplitLinear, products| match linear.shared {
            Some(_) => TileBase::Rows { sums: products, row_of: &input.group_of[rows.clone()] },
            None => TileBase::Bias,
        };
        let (panels, silu) = (0..hidden.own.to.div_ceil(PANEL), Activation::Silu);
        let onto = base(hidden, hidden_products);
        multiply_onto::<V, R>(&factor, &hidden.own, panels, onto, silu, |row, panel, values| {
            activated.row_mut(row)[panel * PANEL..][..PANEL].copy_from_slice(values);
        });
        let (panels, none) = (0..to.div_ceil(PANEL), Activation::None);
        let inner = activated.factor(0..rows.len());
        multiply::<V, R>(&inner, output, panels.clone(), none, |row, panel, values| {
            let columns = panel * PANEL..to.min((panel + 1) * PANEL);
            let out = &mut out[row * to..][columns.clone()];
            match input.added {
                Some(added) => {
                    let added = &added.data[(rows.start + row) * added.stride..][columns];
                    for ((out, value), added) in out.iter_mut().zip(values).zip(added) {
                        *out = *value + added;
                    }
                }
                None => out.copy_from_slice(&values[..out.len()]),
            }
        });
        if let Some(direct) = direct {
            let onto = base(direct, direct_products);
            multiply_onto::<V, R>(
                &factor,
                &direct.own,
                panels,
                onto,
                none,
                |row, panel, values| {
                    let columns = panel * PANEL..to.min((panel + 1) * PANEL);
                    for (out, value) in out[row * to..][columns].iter_mut().zip(values) {
                        *out += *value;
                    }
                },
            );
        }
    }
}

impl CpuPreparedMlp {
    /// The output of rows, each with columns of its own.
    fn of_rows(
        &self,
        own: FlexTensor,
        shared: Option<SharedColumns<'_, FlexTensor>>,
        added: Option<FlexTensor>,
    ) -> FlexTensor {
        let (isa, count, to) = (Isa::best().checked(), own.shape()[0], self.output.to);
        assert_eq!(own.shape()[1], self.hidden.own.from, "the columns of a row");
        let (own, added) = (readable(own), added.map(readable));
        let (products, group_of) = match (&self.hidden.shared, shared) {
            (Some(linear), Some(SharedColumns { values, group_of })) => {
                let [groups, width] = [values.shape()[0], values.shape()[1]];
                assert_eq!((width, group_of.len()), (linear.from, count), "the shared columns");
                assert!(group_of.iter().all(|&group| (group as usize) < groups), "a group");
                let values = readable(values);
                let of = |linear: &SplitLinear| linear.products(rows(&values), groups, isa);
                let direct = self.direct.as_ref().map(of).unwrap_or_default();
                ([of(&self.hidden), direct], group_of)
            }
            (None, None) => Default::default(),
            _ => panic!("weights with shared columns need their values, and others have none"),
        };
        let added = added.as_ref().map(rows);
        let input = MlpInput { own: rows(&own), group_of, products, added };
        let mut out = vec![0.0; count * to];
        let block = |scratch: &mut BlockScratch, index: usize, out: &mut [f32]| {
            let first = index * BLOCK;
            isa.run(PreparedMlpBlock { network: self, input: &input, first, scratch, out });
        };
        let size = (BLOCK * to).max(1);
        if count * self.work() < PARALLEL_FROM {
            let mut scratch = BlockScratch::default();
            let parts = out.chunks_mut(size).enumerate();
            parts.for_each(|(index, out)| block(&mut scratch, index, out));
        } else {
            let parts = out.par_chunks_mut(size).enumerate();
            parts.for_each_init(BlockScratch::default, |scratch, (index, out)| {
                block(scratch, index, out);
            });
        }
        matrix(out, count, to)
    }

    /// The output of rows without columns of their own: that of their groups.
    fn repeated(
        &self,
        shared: SharedColumns<'_, FlexTensor>,
        added: Option<FlexTensor>,
    ) -> FlexTensor {
        let (to, count) = (self.output.to, shared.group_of.len());
        let of_groups = self.of_rows(shared.values, None, None);
        let row = |&group: &u32| &values(&of_groups)[group as usize * to..][..to];
        let mut out: Vec<f32> = shared.group_of.iter().flat_map(row).copied().collect();
        if let Some(added) = added.map(readable) {
            let added = rows(&added);
            for (at, out) in out.chunks_exact_mut(to).enumerate() {
                add_to(Some(out), &added.data[at * added.stride..][..to]);
            }
        }
        matrix(out, count, to)
    }

    /// Multiply-adds of a row.
    fn work(&self) -> usize {
        let of = |linear: &Prepared| linear.from * linear.to;
        let direct = self.direct.as_ref().map_or(0, |direct| of(&direct.own));
        of(&self.hidden.own) + direct + of(&self.output)
    }
}

impl PreparedMlp<Flex> for CpuPreparedMlp {
    fn prepare(weights: MlpWeights<FlexTensor>, shared: Range<usize>) -> Self {
        let MlpWeights { hidden, output, direct } = weights;
        let shape = |weight: &FlexTensor| [weight.shape()[0], weight.shape()[1]];
        let (of_hidden, of_output) = (shape(&hidden.weight), shape(&output.weight));
        let readable_linear = |of: LinearWeights<FlexTensor>| LinearWeights {
            weight: readable(of.weight),
            bias: readable(of.bias),
        };
        let (hidden, output) = (readable_linear(hidden), readable_linear(output));
        let is_once_a_group = shared.len() == of_hidden[0];
        let shared = if is_once_a_group { 0..0 } else { shared };
        let split = |weight: &FlexTensor, bias: &[f32]| {
            SplitLinear::new(rows(weight), shape(weight), bias, shared.clone())
        };
        Self {
            hidden: split(&hidden.weight, values(&hidden.bias)),
            direct: direct.map(|direct| split(&readable(direct), &[])),
            output: Prepared::new(rows(&output.weight), of_output, values(&output.bias)),
            is_once_a_group,
        }
    }

    fn forward(&self, input: MlpRows<'_, FlexTensor>) -> FlexTensor {
        let MlpRows { own, shared, added } = input;
        match shared {
            Some(shared) if self.is_once_a_group => self.repeated(shared, added),
            shared => self.of_rows(own, shared, added),
        }
    }
}
