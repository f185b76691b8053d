//! Decision trees, and the order in which `hypercast_sdk::Trees` evaluates them.
//!
//! The SDK evaluates complete binary trees, all of one depth at once. A tree of another shape is
//! cut into parts that are complete: a part begins at the root, or at a node below the part above
//! it, and then its rows are those that take all branches of the path to that node. A deeper part
//! has fewer parts below it, and more places that the tree does not have; the cut with the fewest
//! comparisons is found from the leaves up.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use super::grid::Grid;

/// How a split compares a feature with its threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitMode {
    LessOrEqual,
    Less,
    GreaterOrEqual,
    Greater,
    Equal,
    NotEqual,
}

/// A node of a tree.
#[derive(Debug, Clone, PartialEq)]
pub enum TreeNode {
    Split {
        mode: SplitMode,
        feature: usize,
        threshold: f32,
        /// The nodes where it holds, and where it does not.
        children: [usize; 2],
    },
    /// What a row that falls into it adds to each target.
    Leaf(Vec<f32>),
}

/// Trees whose leaves are summed.
#[derive(Debug, Clone, PartialEq)]
pub struct Ensemble {
    /// Those of all trees, which name each other by their place here.
    pub nodes: Vec<TreeNode>,
    /// The node at which each tree begins. Every other node is the child of one.
    pub roots: Vec<usize>,
    pub targets: usize,
}

/// Parts of trees that are complete to one depth, at the end of paths of one length.
#[derive(Debug, Clone, PartialEq)]
pub struct TreeParts {
    pub count: usize,
    pub path: usize,
    pub depth: usize,
}

/// An ensemble as the SDK evaluates it.
#[derive(Debug, Clone, PartialEq)]
pub struct TreeLayout {
    pub parts: Vec<TreeParts>,
    /// Of each comparison what it reads, the threshold, what is wanted and whether it is of
    /// equality, as `hypercast_sdk::Trees::new` has them.
    pub comparisons: Vec<[f32; 4]>,
    /// `[leaves, targets]`; 0 in places that no row falls into, and where a part is below.
    pub weights: Grid<f32>,
    /// What trees without a split add to each target.
    pub constant: Vec<f32>,
}

/// Values that the trees of an expert have room for, for each candidate: a host allows 2^18 over
/// its network.
pub const ROW_VALUES: usize = 250_000;

/// Complete trees that are deeper have more places than comparisons are allowed.
const MAX_PART_DEPTH: usize = 14;

/// A comparison that no row passes, in a place that the tree does not have.
const NOTHING: [f32; 4] = [0.0, 0.0, 1.0, 0.0];

/// What `hypercast_sdk::Trees` computes of each comparison of an ensemble.
fn values_of_comparison(any_is_equality: bool) -> usize {
    if any_is_equality { 12 } else { 8 }
}

impl TreeLayout {
    /// The values that it computes of a candidate.
    pub fn row_values(&self) -> usize {
        let any_is_equality = self.comparisons.iter().any(|[.., is_equality]| *is_equality == 1.0);
        values_of_comparison(any_is_equality) * self.comparisons.len()
    }

    /// The file that `hypercast_sdk::Trees::new` reads.
    pub fn file(&self) -> Grid<f32> {
        let part = |own: &TreeParts| [own.count, own.path, own.depth].map(|number| number as f32);
        let row = |row: usize| self.comparisons.iter().map(move |own| own[row]);
        let values = std::iter::once(self.parts.len() as f32)
            .chain(self.parts.iter().flat_map(part))
            .chain((0..4).flat_map(row));
        Grid::vector(values.collect())
    }
}

/// How the trees are cut.
struct TreeCut {
    /// For each node, its parent and whether it is the child where the split holds.
    parents: Vec<Option<(usize, bool)>>,
    /// How deep each node is in its tree.
    depths: Vec<usize>,
    /// The depth of the part that would begin at each node.
    part_depths: Vec<usize>,
    /// The comparisons of that part, and of all below it.
    costs: Vec<usize>,
}

impl Ensemble {
    fn children(&self, node: usize) -> &[usize] {
        match &self.nodes[node] {
            TreeNode::Split { children, .. } => children,
            TreeNode::Leaf(_) => &[],
        }
    }

    fn splits_below(&self, nodes: &[usize]) -> Vec<usize> {
        let children = nodes.iter().flat_map(|node| self.children(*node));
        children.copied().filter(|child| !self.children(*child).is_empty()).collect()
    }

    /// The order of its comparisons and leaves.
    ///
    /// # Errors
    /// It needs more comparisons than an expert has room for.
    pub fn layout(&self) -> Result<TreeLayout> {
        let cut = self.cut();
        let (has_split, constants): (Vec<usize>, Vec<usize>) =
            self.roots.iter().partition(|root| !self.children(**root).is_empty());
        self.check_size(&cut, &has_split)?;
        let mut begins: BTreeMap<[usize; 2], Vec<usize>> = BTreeMap::new();
        let mut rest = has_split;
        while let Some(node) = rest.pop() {
            let depth = cut.part_depths[node];
            begins.entry([cut.depths[node], depth]).or_default().push(node);
            rest.extend((0..depth).fold(vec![node], |nodes, _| self.splits_below(&nodes)));
        }
        let (mut parts, mut comparisons, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for ([path, depth], mut nodes) in begins {
            nodes.sort_unstable();
            parts.push(TreeParts { count: nodes.len(), path, depth });
            let paths: Vec<_> = nodes.iter().map(|node| self.path(&cut, *node)).collect();
            comparisons.extend((0..path).flat_map(|level| paths.iter().map(move |own| own[level])));
            let mut places: Vec<Option<usize>> = nodes.into_iter().map(Some).collect();
            for _ in 0..depth {
                places = self.level(&places, &mut comparisons);
            }
            weights.extend(places.iter().flat_map(|place| self.weights(*place)));
        }
        let mut constant = vec![0.0; self.targets];
        for root in constants {
            constant.iter_mut().zip(self.weights(Some(root))).for_each(|(sum, own)| *sum += own);
        }
        let leaves = parts.iter().map(|own| own.count << own.depth).sum();
        let weights = Grid::new(vec![leaves, self.targets], weights)?;
        Ok(TreeLayout { parts, comparisons, weights, constant })
    }

    fn cut(&self) -> TreeCut {
        let count = self.nodes.len();
        let mut cut = TreeCut {
            parents: vec![None; count],
            depths: vec![0; count],
            part_depths: vec![0; count],
            costs: vec![0; count],
        };
        let mut order = self.roots.clone();
        let mut at = 0;
        while let Some(node) = order.get(at).copied() {
            for (child, holds) in self.children(node).iter().zip([true, false]) {
                cut.parents[*child] = Some((node, holds));
                cut.depths[*child] = cut.depths[node] + 1;
                order.push(*child);
            }
            at += 1;
        }
        for node in order.into_iter().rev().filter(|node| !self.children(*node).is_empty()) {
            cut.costs[node] = usize::MAX;
            let mut below = vec![node];
            for depth in 1..=MAX_PART_DEPTH {
                below = self.splits_below(&below);
                let own = cut.depths[node] + (1 << depth) - 1;
                let cost = below.iter().fold(own, |sum, node| sum.saturating_add(cut.costs[*node]));
                // Of two cuts as good, the one with fewer parts.
                if cost <= cut.costs[node] {
                    (cut.costs[node], cut.part_depths[node]) = (cost, depth);
                }
                if below.is_empty() {
                    break;
                }
            }
        }
        cut
    }

    fn check_size(&self, cut: &TreeCut, roots: &[usize]) -> Result<()> {
        let is_equality = |node: &TreeNode| {
            let TreeNode::Split { mode, .. } = node else { return false };
            matches!(mode, SplitMode::Equal | SplitMode::NotEqual)
        };
        let each = values_of_comparison(self.nodes.iter().any(is_equality));
        let most = ROW_VALUES / each;
        let needed = roots.iter().fold(0usize, |sum, root| sum.saturating_add(cut.costs[*root]));
        ensure!(
            needed <= most,
            "its {} trees are up to {} splits deep and need {needed} comparisons a candidate, more \
             than the {most} that an expert has room for: train with a max_depth (6, say), or \
             fewer trees",
            self.roots.len(),
            cut.depths.iter().max().unwrap_or(&0),
        );
        Ok(())
    }

    /// The comparisons that a row passes which comes to a node.
    fn path(&self, cut: &TreeCut, node: usize) -> Vec<[f32; 4]> {
        let mut path = Vec::new();
        let mut at = node;
        while let Some((parent, holds)) = cut.parents[at] {
            path.push(self.comparison(parent, holds));
            at = parent;
        }
        path.reverse();
        path
    }

    /// Adds the comparisons of a level, and returns the places below it.
    fn level(
        &self,
        places: &[Option<usize>],
        comparisons: &mut Vec<[f32; 4]>,
    ) -> Vec<Option<usize>> {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for place in places {
            let below = match place.map(|node| self.children(node)) {
                Some([yes, no]) => [Some(*yes), Some(*no)],
                // A leaf is passed on to where all rows go.
                _ => [None, *place],
            };
            let own = place.filter(|_| below[0].is_some());
            comparisons.push(own.map_or(NOTHING, |node| self.comparison(node, true)));
            first.push(below[0]);
            second.push(below[1]);
        }
        first.extend(second);
        first
    }

    fn weights(&self, place: Option<usize>) -> Vec<f32> {
        match place.map(|node| &self.nodes[node]) {
            Some(TreeNode::Leaf(weights)) => weights.clone(),
            _ => vec![0.0; self.targets],
        }
    }

    /// What a split reads, its threshold, what is wanted and whether it asks for equality, where a
    /// row is to take the branch where it `holds`, or the other.
    fn comparison(&self, node: usize, holds: bool) -> [f32; 4] {
        let TreeNode::Split { mode, feature, threshold, .. } = &self.nodes[node] else {
            unreachable!("leaves compare nothing")
        };
        // x < t is -x > -t, and x <= t is not x > t.
        let (sign, is_positive, is_equality) = match mode {
            SplitMode::Greater => (1.0, true, false),
            SplitMode::LessOrEqual => (1.0, false, false),
            SplitMode::Less => (-1.0, true, false),
            SplitMode::GreaterOrEqual => (-1.0, false, false),
            SplitMode::Equal => (1.0, true, true),
            SplitMode::NotEqual => (1.0, false, true),
        };
        let number = |is: bool| if is { 1.0 } else { 0.0 };
        // 0 in place of -0, whose bits an average of parameters would change.
        let threshold = sign * threshold + 0.0;
        [sign * (feature + 1) as f32, threshold, number(is_positive == holds), number(is_equality)]
    }
}
