//! The network as a list of the SDK's calls, with the shape of each result. `source` writes them as
//! Rust.

use anyhow::{Result, ensure};

use super::ensemble::{ROW_VALUES, TreeLayout};
use super::grid::{Grid, broadcast, elements};

/// A call's place in [`SdkNetwork::steps`].
pub type StepId = usize;

/// The highest rank of a tensor of the contract.
const MAX_RANK: usize = 4;

/// A call of the SDK that gives a tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum SdkCall {
    /// Numeric features as they are.
    Features(Vec<String>),
    /// An id column.
    Id(String),
    /// A vector of the item.
    Vector(String),
    /// The target-aware embedding.
    Tae,
    /// Weights of the model, by their index in [`SdkNetwork::parameters`].
    Parameter(usize),
    /// An operator (`+`) or method (`max`) of two tensors.
    Binary(&'static str, StepId, StepId),
    /// An operator of a tensor and a number, or of a number and a tensor.
    Scalar {
        op: &'static str,
        of: StepId,
        number: f32,
        number_first: bool,
    },
    /// A method without arguments.
    Unary(&'static str, StepId),
    Clip(StepId, f32, f32),
    MatMul(StepId, StepId),
    /// To the sizes of the step.
    Reshape(StepId),
    /// Of the dimensions behind the rows, counted from 0.
    Transpose(StepId, Vec<usize>),
    /// Of the last dimension.
    Slice(StepId, usize, usize),
    /// Along the last dimension.
    Concat(Vec<StepId>),
    /// Rows of a table by an id column.
    Gather(StepId, StepId),
    LayerNormalization {
        of: StepId,
        scale: StepId,
        bias: StepId,
        epsilon: f32,
    },
    /// The leaves of trees that a row falls into. The ensemble is a file as weights are.
    Trees {
        of: StepId,
        file: usize,
        comparisons: usize,
    },
}

impl SdkCall {
    /// The steps that it reads.
    pub fn reads(&self) -> Vec<StepId> {
        match self {
            SdkCall::Features(_)
            | SdkCall::Id(_)
            | SdkCall::Vector(_)
            | SdkCall::Tae
            | SdkCall::Parameter(_) => Vec::new(),
            SdkCall::Binary(_, a, b) | SdkCall::MatMul(a, b) | SdkCall::Gather(a, b) => {
                vec![*a, *b]
            }
            SdkCall::Scalar { of, .. }
            | SdkCall::Unary(_, of)
            | SdkCall::Clip(of, ..)
            | SdkCall::Reshape(of)
            | SdkCall::Transpose(of, _)
            | SdkCall::Slice(of, ..)
            | SdkCall::Trees { of, .. } => vec![*of],
            SdkCall::Concat(parts) => parts.clone(),
            SdkCall::LayerNormalization { of, scale, bias, .. } => vec![*of, *scale, *bias],
        }
    }
}

/// A call and what is known of its result.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkStep {
    pub call: SdkCall,
    /// Whether the first dimension of the result is the rows.
    pub rows: bool,
    /// The dimensions behind the rows; all of a result without rows.
    pub sizes: Vec<usize>,
    /// What the model calls the value that it is a part of.
    pub name: String,
}

/// Weights of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelParameter {
    /// What the model calls them.
    pub source: String,
    /// The parameter's name, and that of its file.
    pub name: String,
    pub values: Grid<f32>,
    /// Whether it is a constant of the model's own code, which does not learn.
    pub is_frozen: bool,
}

/// The calls, each behind those that it reads.
#[derive(Debug, Default)]
pub struct SdkNetwork {
    pub steps: Vec<NetworkStep>,
    pub parameters: Vec<ModelParameter>,
    /// What the model calls the value that is mapped now.
    pub name: String,
    /// What all trees compute of a candidate.
    tree_values: usize,
}

impl SdkNetwork {
    fn push(&mut self, call: SdkCall, rows: bool, sizes: Vec<usize>) -> Result<StepId> {
        let rank = sizes.len() + usize::from(rows);
        ensure!(rank <= MAX_RANK, "its result has {rank} dimensions; an expert has at most 4");
        let name = self.name.clone();
        self.steps.push(NetworkStep { call, rows, sizes, name });
        Ok(self.steps.len() - 1)
    }

    /// What a batch has of some columns, `[rows, width]`. Reading the same twice is one step.
    pub fn input(&mut self, call: SdkCall, width: usize) -> Result<StepId> {
        match self.steps.iter().position(|step| step.call == call) {
            Some(step) => Ok(step),
            None => self.push(call, true, vec![width]),
        }
    }

    /// Weights that the model calls `source`. Equal ones of one name are one parameter.
    pub fn parameter(
        &mut self,
        source: &str,
        values: Grid<f32>,
        is_frozen: bool,
    ) -> Result<StepId> {
        ensure!(!values.values.is_empty(), "`{source}` of shape {:?} is empty", values.sizes);
        if let Some(at) = values.values.iter().position(|value| !value.is_finite()) {
            anyhow::bail!("value {at} of `{source}` is {}", values.values[at]);
        }
        let is_it = |own: &ModelParameter| own.source == source && own.values == values;
        if let Some(index) = self.parameters.iter().position(is_it) {
            let is_step = |step: &NetworkStep| step.call == SdkCall::Parameter(index);
            return Ok(self.steps.iter().position(is_step).expect("each parameter has a step"));
        }
        let name = self.free_name(source);
        let sizes = values.sizes.clone();
        self.parameters.push(ModelParameter { source: source.to_owned(), name, values, is_frozen });
        self.push(SdkCall::Parameter(self.parameters.len() - 1), false, sizes)
    }

    /// A name that no parameter has yet, and that a file can have, too.
    pub fn free_name(&self, source: &str) -> String {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let plain = source.chars().take(200).map(|c| if is_plain(c) { c } else { '_' });
        let plain: String = plain.collect();
        let is_free = |name: &String| self.parameters.iter().all(|own| own.name != *name);
        let numbered = (2..).map(|number| format!("{plain}.{number}"));
        let mut names = std::iter::once(plain.clone()).chain(numbered);
        names.find(is_free).expect("the numbers do not end")
    }

    /// An operator or method of two tensors, broadcast from the right.
    pub fn binary(&mut self, op: &'static str, a: StepId, b: StepId) -> Result<StepId> {
        let (x, y) = (&self.steps[a], &self.steps[b]);
        let sizes = broadcast(&x.sizes, &y.sizes)?;
        let rows = x.rows || y.rows;
        let aligned = x.rows != y.rows || x.sizes.len() == y.sizes.len();
        ensure!(!rows || aligned, "the ranks of two values of each row differ");
        self.push(SdkCall::Binary(op, a, b), rows, sizes)
    }

    /// An operator of a tensor and a number.
    pub fn scalar(&mut self, op: &'static str, of: StepId, number: f32) -> Result<StepId> {
        ensure!(number.is_finite(), "it computes with {number}");
        if matches!((op, number), ("*" | "/", 1.0) | ("+" | "-", 0.0)) {
            return Ok(of);
        }
        self.like(of, SdkCall::Scalar { op, of, number, number_first: false })
    }

    /// An operator of a number and a tensor.
    pub fn scalar_first(&mut self, op: &'static str, number: f32, of: StepId) -> Result<StepId> {
        ensure!(number.is_finite(), "it computes with {number}");
        self.like(of, SdkCall::Scalar { op, of, number, number_first: true })
    }

    /// A method whose result has the shape of the tensor.
    pub fn unary(&mut self, method: &'static str, of: StepId) -> Result<StepId> {
        self.like(of, SdkCall::Unary(method, of))
    }

    pub fn clip(&mut self, of: StepId, min: f32, max: f32) -> Result<StepId> {
        self.like(of, SdkCall::Clip(of, min, max))
    }

    pub fn layer_normalization(
        &mut self,
        of: StepId,
        [scale, bias]: [StepId; 2],
        epsilon: f32,
    ) -> Result<StepId> {
        self.like(of, SdkCall::LayerNormalization { of, scale, bias, epsilon })
    }

    fn like(&mut self, of: StepId, call: SdkCall) -> Result<StepId> {
        let NetworkStep { rows, sizes, .. } = self.steps[of].clone();
        self.push(call, rows, sizes)
    }

    /// A method that makes one value of the last dimension.
    pub fn reduce(&mut self, method: &'static str, of: StepId) -> Result<StepId> {
        let NetworkStep { rows, mut sizes, .. } = self.steps[of].clone();
        if let Some(last) = sizes.last_mut() {
            *last = 1;
        }
        self.push(SdkCall::Unary(method, of), rows, sizes)
    }

    /// The product with a matrix without rows.
    pub fn matmul(&mut self, a: StepId, b: StepId) -> Result<StepId> {
        let (x, y) = (&self.steps[a], &self.steps[b]);
        let (Some(k), [inner, n], false) = (x.sizes.last(), y.sizes.as_slice(), y.rows) else {
            anyhow::bail!("the product of {:?} and {:?} is not supported", x.sizes, y.sizes)
        };
        ensure!(k == inner, "the inner dimensions {k} and {inner} of a product differ");
        let (rows, mut sizes, n) = (x.rows, x.sizes.clone(), *n);
        sizes.pop();
        sizes.push(n);
        self.push(SdkCall::MatMul(a, b), rows, sizes)
    }

    /// The same values with other dimensions behind the rows.
    pub fn reshape(&mut self, of: StepId, sizes: Vec<usize>) -> Result<StepId> {
        let step = &self.steps[of];
        if step.sizes == sizes {
            return Ok(of);
        }
        let fits = elements(&step.sizes) == elements(&sizes);
        ensure!(fits, "{:?} does not have the values of {sizes:?}", step.sizes);
        let rows = step.rows;
        // Of two reshapes, one behind the other, only the last one counts.
        let from = if let SdkCall::Reshape(before) = step.call { before } else { of };
        if self.steps[from].sizes == sizes {
            return Ok(from);
        }
        self.push(SdkCall::Reshape(from), rows, sizes)
    }

    /// Reorders the dimensions behind the rows.
    pub fn transpose(&mut self, of: StepId, perm: Vec<usize>) -> Result<StepId> {
        if perm.iter().enumerate().all(|(axis, from)| axis == *from) {
            return Ok(of);
        }
        let NetworkStep { call, rows, sizes, .. } = &self.steps[of];
        if let SdkCall::Transpose(before, earlier) = call {
            let both = perm.iter().map(|&axis| earlier[axis]).collect();
            return self.transpose(*before, both);
        }
        let (rows, sizes) = (*rows, perm.iter().map(|&axis| sizes[axis]).collect());
        self.push(SdkCall::Transpose(of, perm), rows, sizes)
    }

    /// The entries `indices` of one of the dimensions behind the rows, in that order.
    pub fn take(&mut self, of: StepId, axis: usize, indices: &[usize]) -> Result<StepId> {
        let sizes = self.steps[of].sizes.clone();
        ensure!(!indices.is_empty(), "it takes nothing of {sizes:?}");
        if indices.iter().copied().eq(0..sizes[axis]) {
            return Ok(of);
        }
        // With the dimensions behind it as one, the entries are parts of the last dimension.
        let inner: usize = sizes[axis + 1..].iter().product();
        let flat = [&sizes[..axis], &[sizes[axis] * inner]].concat();
        let flat = self.reshape(of, flat)?;
        let mut parts = Vec::new();
        for run in indices.chunk_by(|a, b| a + 1 == *b) {
            let (start, end) = (run[0] * inner, (run[0] + run.len()) * inner);
            parts.push(self.slice(flat, start, end)?);
        }
        let taken = self.concat_last(parts)?;
        let mut result = sizes;
        result[axis] = indices.len();
        self.reshape(taken, result)
    }

    /// A part of the last dimension.
    fn slice(&mut self, of: StepId, start: usize, end: usize) -> Result<StepId> {
        let NetworkStep { call, rows, mut sizes, .. } = self.steps[of].clone();
        if let SdkCall::Concat(parts) = call {
            let mut offset = 0;
            for part in parts {
                let width = self.steps[part].sizes.last().copied().unwrap_or(0);
                if offset <= start && end <= offset + width {
                    return self.slice(part, start - offset, end - offset);
                }
                offset += width;
            }
        }
        if sizes.last() == Some(&(end - start)) {
            return Ok(of);
        }
        if let Some(last) = sizes.last_mut() {
            *last = end - start;
        }
        self.push(SdkCall::Slice(of, start, end), rows, sizes)
    }

    /// Puts tensors together along one of the dimensions behind the rows.
    pub fn concat(&mut self, parts: &[StepId], axis: usize) -> Result<StepId> {
        let mut result = self.steps[parts[0]].sizes.clone();
        result[axis] = 0;
        let mut flat = Vec::new();
        for &part in parts {
            let sizes = self.steps[part].sizes.clone();
            let width: usize = sizes[axis..].iter().product();
            result[axis] += sizes[axis];
            flat.push(self.reshape(part, [&sizes[..axis], &[width]].concat())?);
        }
        let all = self.concat_last(flat)?;
        self.reshape(all, result)
    }

    /// Puts tensors together along the last dimension, at most 256 at a time as the contract has
    /// it.
    fn concat_last(&mut self, mut parts: Vec<StepId>) -> Result<StepId> {
        while parts.len() > 1 {
            let mut merged = Vec::new();
            for some in parts.chunks(256) {
                let mut sizes = self.steps[some[0]].sizes.clone();
                let width = |&part: &StepId| self.steps[part].sizes.last().copied().unwrap_or(0);
                let all: usize = some.iter().map(width).sum();
                let rows = self.steps[some[0]].rows;
                let is_like = |&part: &StepId| {
                    let NetworkStep { rows: own, sizes: other, .. } = &self.steps[part];
                    *own == rows && other[..other.len() - 1] == sizes[..sizes.len() - 1]
                };
                ensure!(some.iter().all(is_like), "it puts together tensors of different shapes");
                if let Some(last) = sizes.last_mut() {
                    *last = all;
                }
                merged.push(match some {
                    [one] => *one,
                    some => self.push(SdkCall::Concat(some.to_vec()), rows, sizes)?,
                });
            }
            parts = merged;
        }
        Ok(parts[0])
    }

    /// Rows of a table, one for each row of an id column.
    pub fn gather(&mut self, table: StepId, id: StepId) -> Result<StepId> {
        let width = self.steps[table].sizes[1];
        self.push(SdkCall::Gather(table, id), true, vec![width])
    }

    /// The leaves of trees that a row of features falls into.
    ///
    /// # Errors
    /// An expert has no room for all trees.
    pub fn trees(&mut self, of: StepId, source: &str, layout: &TreeLayout) -> Result<StepId> {
        self.tree_values += layout.row_values();
        ensure!(
            self.tree_values <= ROW_VALUES,
            "with the ensembles before it, it computes {} values a candidate, more than the \
             {ROW_VALUES} that an expert has room for: train with a max_depth (6, say), or fewer \
             trees",
            self.tree_values
        );
        let (source, name) = (source.to_owned(), self.free_name(source));
        let values = layout.file();
        self.parameters.push(ModelParameter { source, name, values, is_frozen: true });
        let (file, comparisons) = (self.parameters.len() - 1, layout.comparisons.len());
        let leaves = layout.weights.sizes[0];
        self.push(SdkCall::Trees { of, file, comparisons }, true, vec![leaves])
    }

    /// How many values the parameters of a step have.
    pub fn parameter_values(&self, step: &NetworkStep) -> usize {
        match &step.call {
            SdkCall::Parameter(index) => self.parameters[*index].values.values.len(),
            // A column that selects a feature, a threshold, what is wanted, and whether equality.
            SdkCall::Trees { of, comparisons, .. } => {
                (self.steps[*of].sizes.iter().product::<usize>() + 3) * comparisons
            }
            _ => 0,
        }
    }

    /// The number that a sigmoid was applied to, if a step is one, or a part or another shape of
    /// one.
    pub fn before_sigmoid(&mut self, of: StepId) -> Result<Option<StepId>> {
        let NetworkStep { call, rows, sizes, .. } = self.steps[of].clone();
        let call = match call {
            SdkCall::Unary("sigmoid", inner) => return Ok(Some(inner)),
            SdkCall::Reshape(inner) => self.before_sigmoid(inner)?.map(SdkCall::Reshape),
            SdkCall::Slice(inner, start, end) => {
                self.before_sigmoid(inner)?.map(|inner| SdkCall::Slice(inner, start, end))
            }
            _ => None,
        };
        call.map(|call| self.push(call, rows, sizes)).transpose()
    }
}
