//! Ensembles of decision trees, as LightGBM and XGBoost train them: which leaf of each tree a row
//! falls into.
//!
//! A linear layer on these leaves is the ensemble itself, and one that goes on learning is that of
//! He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook" (ADKDD 2014), section
//! 3: boosted trees transform the features, and online training moves the weights of their leaves.

use crate::graph::{Graph, Tensor, attribute};
use crate::ops::MAX_CONCAT;
use crate::raw::types::{Initialiser, Value};

/// The leaves of an ensemble, as 0 and 1. What it compares never learns.
///
/// Trees are evaluated all at once, as a tensor compiler does (Nakandala et al., "A Tensor Compiler
/// for Unified Machine Learning Prediction Serving", OSDI 2020, section 4): a product with a
/// one-hot matrix chooses the feature of each comparison, and the leaves of complete binary trees
/// follow level by level. A tree that is deep in some places is cut into several complete ones, its
/// parts: one at its root, others below, which a row reaches if it takes all branches of a path.
pub struct Trees<'a> {
    name: String,
    file: &'a [u8],
}

/// Complete binary trees of one depth, each at the end of a path of as many comparisons as the
/// others'; 0 of those at a root.
struct CompleteTrees {
    count: u32,
    path: u32,
    depth: u32,
}

/// What a file of an ensemble has.
struct TreeFile {
    parts: Vec<CompleteTrees>,
    comparisons: Comparisons,
}

/// What is compared, each for all comparisons.
struct Comparisons {
    /// 1 + the index of the feature, negative for one that is compared with its sign changed; 0
    /// reads nothing.
    reads: Vec<f32>,
    thresholds: Vec<f32>,
    /// 1 if a row passes that is above the threshold, 0 if one that is not.
    wanted: Vec<f32>,
    /// 1 where equality is asked for, in place of being above.
    is_equality: Vec<f32>,
}

impl<'a> Trees<'a> {
    /// An ensemble from the file that `cargo hypercast from-onnx` makes of it: f32, little-endian.
    /// First comes the number of kinds of parts, then count, path and depth of each kind; then for
    /// all comparisons what they read (1 + a feature's index; negative: the feature's negative; 0:
    /// nothing), their thresholds, whether being above the threshold is wanted (1) or not (0), and
    /// whether equality is asked for in place of being above (1 or 0).
    ///
    /// The comparisons of a kind are those of the paths, a level of all parts after the other, then
    /// those of the trees' levels. On a level come the first children of all nodes above, which a
    /// row that passes goes to, then the second ones; so do the leaves.
    pub fn new(name: &str, file: &'a [u8]) -> Self {
        Self { name: name.into(), file }
    }

    /// Maps `[rows, features]` to `[rows, leaves]`: 1 for the leaves that a row falls into, 0 for
    /// others. Exact for finite features where a product is in f32; a GPU may round it (TF32).
    pub fn apply<'g>(&self, x: Tensor<'g>) -> Tensor<'g> {
        let g = x.graph();
        g.scope(&self.name, || match TreeFile::read(self.file) {
            Some(TreeFile { parts, comparisons }) => leaves(&parts, comparisons.hold(x)),
            None => g.fail("its file is no ensemble of trees, or is cut"),
        })
    }
}

impl TreeFile {
    fn read(file: &[u8]) -> Option<Self> {
        let (values, []) = file.as_chunks() else { return None };
        let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let (kinds, rest) = values.split_first()?;
        let (parts, rest) = rest.split_at_checked(3 * (*kinds as usize).min(rest.len()))?;
        let part = |own: &[f32; 3]| {
            let [count, path, depth] = own.map(|number| number as u32);
            CompleteTrees { count, path, depth }
        };
        let parts: Vec<CompleteTrees> = parts.as_chunks().0.iter().map(part).collect();
        let sizes = parts.iter().map(CompleteTrees::comparisons);
        let count = sizes.sum::<Option<usize>>().filter(|count| *count > 0)?;
        if rest.len() != 4 * count {
            return None;
        }
        let row = |at: usize| rest[at * count..][..count].to_vec();
        if row(0).iter().any(|read| read.fract() != 0.0 || !read.is_finite()) {
            return None;
        }
        let (reads, thresholds, wanted, is_equality) = (row(0), row(1), row(2), row(3));
        Some(Self { parts, comparisons: Comparisons { reads, thresholds, wanted, is_equality } })
    }
}

impl CompleteTrees {
    fn comparisons(&self) -> Option<usize> {
        // More levels than these have more nodes than a file has comparisons.
        let nodes = (1..31).contains(&self.depth).then(|| (1usize << self.depth) - 1)?;
        nodes.checked_add(self.path as usize)?.checked_mul(self.count as usize)
    }
}

/// The leaves of all parts, by `holds` of each comparison.
fn leaves<'g>(parts: &[CompleteTrees], holds: Tensor<'g>) -> Tensor<'g> {
    let g = holds.graph();
    let mut at = 0;
    let mut next = |width: u32| {
        at += width;
        holds.slice(at - width, at)
    };
    let mut leaves = Vec::new();
    for CompleteTrees { count, path, depth } in parts {
        // Whether a row comes to each node of a level; all of them come to a root.
        let mut reached = (0..*path).map(|_| next(*count)).reduce(|above, own| above * own);
        for level in 0..*depth {
            let holds = next(count << level);
            let children = match reached {
                None => [holds, 1.0 - holds],
                Some(reached) => {
                    let first = reached * holds;
                    [first, reached - first]
                }
            };
            if level + 1 == *depth {
                leaves.extend(children);
            } else {
                reached = Some(g.concat(&children));
            }
        }
    }
    while leaves.len() > 1 {
        leaves = leaves.chunks(MAX_CONCAT).map(|some| g.concat(some)).collect();
    }
    leaves[0]
}

impl Comparisons {
    /// Which comparisons of `x`, `[rows, features]`, hold: `[rows, n]` of 1 and 0.
    fn hold(self, x: Tensor<'_>) -> Tensor<'_> {
        let g = x.graph();
        let features = x.shape().width().unwrap_or(0);
        let count = self.reads.len() as u32;
        let Some(selection) = self.selection(features as usize) else {
            return g.fail(&format!("a comparison reads a feature beyond the {features} given"));
        };
        g.rate_factor(0.0, || {
            let vector = |name: &str, values| fixed(g, name, &[count], values);
            let read = x.matmul(fixed(g, "selection", &[features, count], selection));
            let thresholds = vector("thresholds", self.thresholds);
            let above = read.greater(thresholds);
            let holds = if self.is_equality.contains(&1.0) {
                let is_equality = vector("is_equality", self.is_equality);
                above + is_equality * (read.equal(thresholds) - above)
            } else {
                above
            };
            holds.equal(vector("wanted", self.wanted))
        })
    }

    /// `[features, n]`: 1 or -1 where a comparison reads a feature.
    fn selection(&self, features: usize) -> Option<Vec<f32>> {
        let mut selection = vec![0.0; features * self.reads.len()];
        for (at, read) in self.reads.iter().enumerate().filter(|(_, read)| **read != 0.0) {
            let feature = read.abs() as usize - 1;
            let place = (feature < features).then_some(feature * self.reads.len() + at)?;
            selection[place] = read.signum();
        }
        Some(selection)
    }
}

/// A parameter that training leaves as it is, within a rate factor of 0.
fn fixed<'g>(g: &'g Graph, name: &str, shape: &[u32], values: Vec<f32>) -> Tensor<'g> {
    let values = attribute("values", Value::Numbers(values));
    g.declare(name, shape, Initialiser::Zeros, vec![values])
}
