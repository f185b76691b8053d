//! The ensembles of decision trees of `ai.onnx.ml`, in the form of attributes that its versions 1
//! to 3 have.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

use super::{Mapper, NodeView};
use crate::onnx::ensemble::{Ensemble, SplitMode, TreeNode};
use crate::onnx::grid::Grid;
use crate::onnx::network::{SdkCall, SdkNetwork, StepId};
use crate::onnx::proto::NodeProto;
use crate::onnx::value::{BatchedShape, ComputedTensor, MappedValue};

/// No ensemble of so many nodes has few enough comparisons.
const MAX_NODES: usize = 1 << 20;

/// What a classifier gives for two classes, if its leaves have weights of one alone: the score of
/// the second class, and the first's by it, as onnxruntime has it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum FirstClassScore {
    Negative,
    /// Of weights that are all positive: the score is a probability.
    Complement,
}

/// The scores of a node.
struct EnsembleScores {
    ensemble: Ensemble,
    base: Vec<f32>,
    other: Option<FirstClassScore>,
}

impl Mapper {
    /// What a node of trees gives, and its name: of a classifier the scores, and never the label.
    pub(super) fn trees(
        &mut self,
        node: &NodeProto,
        needed: &BTreeSet<&str>,
    ) -> Result<(String, MappedValue)> {
        let view = self.view(node)?;
        let (scores, output) = match view.op() {
            "TreeEnsembleRegressor" => (EnsembleScores::of_regressor(&view)?, node.output.first()),
            "TreeEnsembleClassifier" => {
                let [label, output] = &node.output[..] else { bail!("it has no scores") };
                ensure!(
                    !needed.contains(label.as_str()),
                    "it gives a class, and an expert predicts probabilities: name the tasks of the \
                     output of its probabilities, --output OUTPUT=none,probability:TASK"
                );
                (EnsembleScores::of_classifier(&view)?, Some(output))
            }
            "ZipMap" => bail!(
                "it makes a dictionary of each row: convert the model with zipmap=False (with \
                 options={{\"zipmap\": False}} of skl2onnx), or take this node out of the file and \
                 make its input `{}` the output",
                node.input.first().map_or("", String::as_str)
            ),
            "TreeEnsemble" => bail!(
                "it is of ai.onnx.ml 5: convert the model for 3, with target_opset={{\"\": 15, \
                 \"ai.onnx.ml\": 3}}"
            ),
            _ => bail!(
                "operators of domain `{}` other than ensembles of trees are not supported: leave \
                 them out of the model that is exported",
                node.domain
            ),
        };
        let output = output.context("it has no output")?;
        self.network.name.clone_from(output);
        let is_logistic = match view.text("post_transform") {
            None | Some("NONE") => false,
            Some("LOGISTIC") => true,
            Some(other) => bail!("its post_transform {other} is none of NONE and LOGISTIC"),
        };
        let value = self.scores(&view, scores, is_logistic)?;
        Ok((output.clone(), MappedValue::Numbers(value)))
    }

    fn scores(
        &mut self,
        view: &NodeView<'_>,
        EnsembleScores { ensemble, base, other }: EnsembleScores,
        is_logistic: bool,
    ) -> Result<ComputedTensor> {
        let mut width = ensemble.targets;
        let mut step = self.sums(view, ensemble, base)?;
        let network = &mut self.network;
        let transformed = |network: &mut SdkNetwork, step| {
            if is_logistic { network.unary("sigmoid", step) } else { Ok(step) }
        };
        if let Some(other) = other {
            let first = match other {
                FirstClassScore::Complement if !is_logistic => {
                    network.scalar_first("-", 1.0, step)?
                }
                _ => network.unary("neg", step)?,
            };
            let (first, second) = (transformed(network, first)?, transformed(network, step)?);
            step = network.concat(&[first, second], 0)?;
            width = 2;
        } else {
            step = transformed(network, step)?;
        }
        Ok(ComputedTensor { step, dims: BatchedShape::batched(&[width]) })
    }

    /// What the trees add to each target, and its base value.
    fn sums(
        &mut self,
        view: &NodeView<'_>,
        mut ensemble: Ensemble,
        mut base: Vec<f32>,
    ) -> Result<StepId> {
        let ComputedTensor { step, dims } = self.computed(view.input(0)?)?;
        let (Some(0), [_, features]) = (dims.batch, &dims.sizes[..]) else {
            bail!("its input is no batch of features")
        };
        let output = self.network.name.clone();
        self.network.name.clone_from(&self.network.steps[step].name);
        let features = self.read_features(step, *features, &mut ensemble)?;
        let layout = ensemble.layout()?;
        ensure!(!layout.parts.is_empty(), "none of its trees has a split");
        base.iter_mut().zip(&layout.constant).for_each(|(base, own)| *base += own);
        let name = match view.node.name.as_str() {
            "" => self.network.free_name(view.op()),
            name => self.network.free_name(name),
        };
        self.network.name = format!("{output}_leaves");
        let leaves = self.network.trees(features, &name, &layout)?;
        self.network.name = output;
        let weights = self.network.parameter(&format!("{name}.leaves"), layout.weights, false)?;
        let base = self.network.parameter(&format!("{name}.base"), Grid::vector(base), false)?;
        let sums = self.network.matmul(leaves, weights)?;
        self.network.binary("+", sums, base)
    }

    /// The features that the trees read. Others would cost a product each.
    fn read_features(
        &mut self,
        step: StepId,
        count: usize,
        ensemble: &mut Ensemble,
    ) -> Result<StepId> {
        let feature = |node: &TreeNode| match node {
            TreeNode::Split { feature, .. } => Some(*feature),
            TreeNode::Leaf(_) => None,
        };
        let read: BTreeSet<usize> = ensemble.nodes.iter().filter_map(feature).collect();
        let read: Vec<usize> = read.into_iter().collect();
        let last = read.last().copied().unwrap_or(0);
        ensure!(last < count, "it reads feature {last} of an input of {count}");
        for node in &mut ensemble.nodes {
            if let TreeNode::Split { feature, .. } = node {
                *feature = read.binary_search(feature).expect("it is one of those that are read");
            }
        }
        if read.len() == count || read.is_empty() {
            return Ok(step);
        }
        match &self.network.steps[step].call {
            SdkCall::Features(names) => {
                let names = read.iter().map(|&index| names[index].clone()).collect();
                self.network.input(SdkCall::Features(names), read.len())
            }
            _ => self.network.take(step, 0, &read),
        }
    }
}

impl EnsembleScores {
    fn of_regressor(view: &NodeView<'_>) -> Result<Self> {
        let targets = usize::try_from(view.integer("n_targets", 1)).context("its n_targets")?;
        let ensemble = view.ensemble("target", targets)?;
        let base = view.base_values(&ensemble)?;
        let is_average = match view.text("aggregate_function") {
            None | Some("SUM") => false,
            Some("AVERAGE") => true,
            Some(other) => bail!("its aggregate_function {other} is none of SUM and AVERAGE"),
        };
        let ensemble = if is_average { ensemble.averaged() } else { ensemble };
        Ok(Self { ensemble, base, other: None })
    }

    fn of_classifier(view: &NodeView<'_>) -> Result<Self> {
        let labels = view.attribute("classlabels_int64s").map(|labels| labels.ints.len());
        let labels = labels.filter(|count| *count > 0);
        let texts = || view.attribute("classlabels_strings").map(|labels| labels.strings.len());
        let classes = labels.or_else(texts).context("it has no class labels")?;
        let weighed: BTreeSet<i64> = view.ints("class_ids").iter().copied().collect();
        if classes != 2 || weighed.len() != 1 {
            let ensemble = view.ensemble("class", classes)?;
            let base = view.base_values(&ensemble)?;
            return Ok(Self { ensemble, base, other: None });
        }
        let weighed = usize::try_from(*weighed.first().expect("there is one")).unwrap_or(2);
        let ensemble = view.ensemble("class", classes)?.of_target(weighed);
        // onnxruntime adds a base value to the first class, where there are weights of the second.
        let has_base = !view.floats("base_values").is_empty();
        ensure!(weighed == 0 || !has_base, "its base values are not of the class of its weights");
        let base = view.base_values(&ensemble)?;
        let is_positive = view.floats("class_weights").iter().all(|weight| *weight >= 0.0);
        let other =
            Some(if is_positive { FirstClassScore::Complement } else { FirstClassScore::Negative });
        Ok(Self { ensemble, base, other })
    }
}

impl Ensemble {
    fn with_weights(mut self, targets: usize, change: impl Fn(&[f32]) -> Vec<f32>) -> Self {
        for node in &mut self.nodes {
            if let TreeNode::Leaf(weights) = node {
                *weights = change(weights);
            }
        }
        Self { targets, ..self }
    }

    fn averaged(self) -> Self {
        let (targets, trees) = (self.targets, self.roots.len() as f64);
        let share = |weight: &f32| (f64::from(*weight) / trees) as f32;
        self.with_weights(targets, |weights| weights.iter().map(share).collect())
    }

    fn of_target(self, target: usize) -> Self {
        self.with_weights(1, |weights| vec![weights[target]])
    }
}

impl NodeView<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        self.attribute(name).and_then(|attribute| std::str::from_utf8(&attribute.s).ok())
    }

    fn ints(&self, name: &str) -> &[i64] {
        self.attribute(name).map_or(&[], |attribute| &attribute.ints)
    }

    fn floats(&self, name: &str) -> &[f32] {
        self.attribute(name).map_or(&[], |attribute| &attribute.floats)
    }

    fn base_values(&self, ensemble: &Ensemble) -> Result<Vec<f32>> {
        let (base, targets) = (self.floats("base_values"), ensemble.targets);
        ensure!(
            base.is_empty() || base.len() == targets,
            "it has {} base_values, and scores of {targets} classes or targets",
            base.len()
        );
        Ok(if base.is_empty() { vec![0.0; targets] } else { base.to_vec() })
    }

    /// Its trees, whose leaves have weights of `kind`: `class` or `target`.
    fn ensemble(&self, kind: &str, targets: usize) -> Result<Ensemble> {
        let is_double = |name: &str| name.ends_with("_as_tensor");
        if let Some(own) = self.node.attribute.iter().find(|own| is_double(&own.name)) {
            bail!("its `{}` is in double precision: convert it with inputs of float32", own.name);
        }
        let place = |(tree, node): (&i64, &i64)| (*tree, *node);
        let (trees, ids) = (self.ints("nodes_treeids"), self.ints("nodes_nodeids"));
        let count = ids.len();
        let (features, values) = (self.ints("nodes_featureids"), self.floats("nodes_values"));
        let (yes, no) = (self.ints("nodes_truenodeids"), self.ints("nodes_falsenodeids"));
        let modes = self.attribute("nodes_modes").map_or(&[][..], |modes| &modes.strings);
        let sizes = [trees.len(), features.len(), values.len(), yes.len(), no.len(), modes.len()];
        ensure!(
            sizes == [count; 6],
            "its nodes_ attributes are not as many: {count} and {sizes:?}"
        );
        let places: BTreeMap<(i64, i64), usize> =
            trees.iter().zip(ids).map(place).zip(0..).collect();
        ensure!(places.len() == count, "two nodes of a tree have one id");
        let child = |at: usize, ids: &[i64]| {
            let id = ids[at];
            let found = places.get(&(trees[at], id)).copied();
            found.with_context(|| format!("tree {} has no node {id}", trees[at]))
        };
        let node = |at: usize| {
            let Some(mode) = split_mode(&modes[at])? else {
                return Ok(TreeNode::Leaf(vec![0.0; targets]));
            };
            let feature = usize::try_from(features[at]).context("a feature below 0")?;
            ensure!(!values[at].is_nan(), "a threshold is no number");
            // Every feature is finite.
            let threshold = values[at].clamp(f32::MIN, f32::MAX);
            let children = [child(at, yes)?, child(at, no)?];
            Ok(TreeNode::Split { mode, feature, threshold, children })
        };
        let mut nodes = (0..count).map(node).collect::<Result<Vec<_>>>()?;
        let attribute = |name: &str| format!("{kind}_{name}");
        let (trees, ids) = (self.ints(&attribute("treeids")), self.ints(&attribute("nodeids")));
        let (of, weights) = (self.ints(&attribute("ids")), self.floats(&attribute("weights")));
        let sizes = [trees.len(), of.len(), weights.len()];
        ensure!(sizes == [ids.len(); 3], "its {kind}_ attributes are not as many: {sizes:?}");
        for (at, place) in trees.iter().zip(ids).map(place).enumerate() {
            let leaf = places.get(&place).map(|place| &mut nodes[*place]);
            let Some(TreeNode::Leaf(sums)) = leaf else {
                bail!("node {} of tree {} has a weight and is no leaf", place.1, place.0)
            };
            let target = usize::try_from(of[at]).ok().and_then(|target| sums.get_mut(target));
            *target.with_context(|| format!("it has no class or target {}", of[at]))? +=
                weights[at];
        }
        let trees = places.keys().map(|(tree, _)| tree).collect::<BTreeSet<_>>().len();
        let nodes = unfolded(&nodes, trees)?;
        Ok(Ensemble { nodes, roots: (0..trees).collect(), targets })
    }
}

/// Nodes as trees: one that several nodes lead to, as converters have it of sets of categories, is
/// copied for each. Those of the roots come first.
fn unfolded(shared: &[TreeNode], trees: usize) -> Result<Vec<TreeNode>> {
    let mut is_root = vec![true; shared.len()];
    for node in shared {
        let TreeNode::Split { children, .. } = node else { continue };
        children.iter().for_each(|child| is_root[*child] = false);
    }
    let mut from: Vec<usize> = (0..shared.len()).filter(|node| is_root[*node]).collect();
    ensure!(from.len() == trees, "its {trees} trees have {} roots", from.len());
    let mut nodes = Vec::new();
    while let Some(node) = from.get(nodes.len()) {
        let mut node = shared[*node].clone();
        if let TreeNode::Split { children, .. } = &mut node {
            let places = [from.len(), from.len() + 1];
            from.extend(std::mem::replace(children, places));
        }
        nodes.push(node);
        ensure!(nodes.len() < MAX_NODES, "it has a million nodes, or one that is below itself");
    }
    Ok(nodes)
}

/// How a node compares; none of a leaf.
fn split_mode(mode: &[u8]) -> Result<Option<SplitMode>> {
    Ok(Some(match mode {
        b"LEAF" => return Ok(None),
        b"BRANCH_LEQ" => SplitMode::LessOrEqual,
        b"BRANCH_LT" => SplitMode::Less,
        b"BRANCH_GTE" => SplitMode::GreaterOrEqual,
        b"BRANCH_GT" => SplitMode::Greater,
        b"BRANCH_EQ" => SplitMode::Equal,
        b"BRANCH_NEQ" => SplitMode::NotEqual,
        other => bail!("its mode {} is not known", String::from_utf8_lossy(other)),
    }))
}
